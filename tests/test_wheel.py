"""What is released, wheel and source distribution, is a whole node where nothing else of the clone is: light modules,
packaged data and scenarios. The source distribution is installed as docs/deploy/Containerfile does it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from wwwserve.agents.policy.network import Actor, weights_of
from wwwserve.train.export import export

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("agents", "envs", "serving", "train", "eval")
BUILD_FILES = ("pyproject.toml", "LICENSE")


def packaged_data() -> set[str]:
    """Every data file and scenario of the source tree that must travel in the wheel."""
    files = [*(ROOT / "agents/data").rglob("*"), *(ROOT / "envs/data").rglob("*")]
    files += (ROOT / "envs/scenarios").rglob("*.yaml")
    files += (ROOT / "eval").glob("*.json")
    files += (ROOT / "serving/console/static").rglob("*")
    return {f"wwwserve/{file.relative_to(ROOT).as_posix()}" for file in files if file.is_file()}


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of `command`, run where nothing of the source tree can be imported by accident."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the source distribution and the wheel made of it, from a copy, so that the working tree stays
    clean."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, source, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def node_python(wheel, tmp_path_factory) -> Path:
    """Python of a fresh environment: the wheel, its base dependencies, and a package that others import as `agents`."""
    home = tmp_path_factory.mktemp("node")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", wheel, "openai-agents", cwd=home)
    return python


@pytest.fixture(scope="module")
def image_python(dist, tmp_path_factory) -> Path:
    """Python of an environment made of the source distribution by the steps of the container file."""
    home = tmp_path_factory.mktemp("image")
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(home, filter="data")
    (source,) = home.glob("wwwserve-*")
    text = (ROOT / "docs/deploy/Containerfile").read_text(encoding="utf-8")
    copied = set(re.findall(r"^COPY (?!--from)(.*) /src", text, re.MULTILINE))
    assert {part for each in copied for part in each.split()} == {*PACKAGES, *BUILD_FILES}
    settings = dict(re.findall(r"^ENV (\w+)=(.*)$", text, re.MULTILINE))
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    assert settings.keys() == {"PATH", "WWWSERVE_CACHE"}
    env |= {"PATH": f"{home}/bin:{Path(sys.executable).parent}:{env['PATH']}", "WWWSERVE_CACHE": f"{home}/cache"}
    steps = [each for each in re.findall(r"^RUN (.*)$", text, re.MULTILINE) if not each.startswith("useradd")]
    for step in steps:
        here = step.replace("/opt/wwwserve", str(home)).replace("/src", str(source))
        done = subprocess.run(["sh", "-ec", here], cwd=home, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{here}\n{done.stdout}\n{done.stderr}"
    assert len(steps) == 3 and "compiling kernels" in done.stderr
    return home / "bin" / "python"


def test_wheel_holds_the_packages_their_data_and_the_license(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert packaged_data() <= names
    made = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {f"wwwserve/{name}" for name in made} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"wwwserve"}
    assert {name.split("/")[1] for name in names if ".dist-info/" not in name} == set(PACKAGES)


def test_base_install_has_the_command_and_it_verifies_a_bundle_without_torch(node_python, tmp_path):
    torch.manual_seed(1)
    export(weights_of(Actor(width=8)), tmp_path / "policy", {"training": {"seed": 1}, "agent_steps": 0})
    command = node_python.with_name("wwwserve")
    assert run(command, "policy", "verify", tmp_path / "policy", cwd=tmp_path).startswith("ok: ")
    assert "width 8" in run(command, "policy", "show", tmp_path / "policy", cwd=tmp_path)


def test_base_install_has_no_training_libraries(node_python, tmp_path):
    found = run(
        node_python,
        "-c",
        "from importlib.util import find_spec\n"
        "names = ('torch', 'pettingzoo', 'gymnasium', 'stable_baselines3', 'onnx', 'scipy', 'matplotlib')\n"
        "print([name for name in names if find_spec(name)])",
        cwd=tmp_path,
    )
    assert found.strip() == "[]"


def test_it_stands_beside_a_package_of_the_same_name(node_python, tmp_path):
    program = "import agents, wwwserve.agents; print(hasattr(agents, 'Runner'), wwwserve.agents.__name__)"
    assert run(node_python, "-c", program, cwd=tmp_path).split() == ["True", "wwwserve.agents"]


def test_base_install_prints_the_catalogue_and_names_the_extra_for_training(node_python, tmp_path):
    shown = run(node_python, "-m", "wwwserve.agents.hardware", cwd=tmp_path)
    assert "rtx-4090" in shown and "roofline" in shown and "fitted" in shown
    command = [str(node_python.with_name("wwwserve")), "train", "--agent-steps", "200000"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith(": pip install '.[train]' in a clone of the repository\n")


def test_base_install_has_the_tuned_rules(node_python, tmp_path):
    program = "from wwwserve.eval.policies import load_policy; print(load_policy('rank_cap@deadlines').name)"
    assert run(node_python, "-c", program, cwd=tmp_path) == "rank_cap@deadlines\n"


@pytest.mark.parametrize(("release", "compiled"), [("node_python", 1), ("image_python", 0)], ids=["wheel", "sdist"])
def test_what_is_released_runs_a_network_that_answers(release, compiled, request, tmp_path):
    python = request.getfixturevalue(release)
    where = run(python, "-c", "import wwwserve.serving as s; print(s.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parent.parent)
    command = [python.with_name("wwwserve"), "up", "--nodes", "2", "--speed", "10", "--base-port", "0"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["WWWSERVE_CACHE"] = str(python.parent.parent / "cache")
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as up:
        try:
            network = json.loads(up.stdout.readline())  # when it is ready
            question = {"model": network["model"], "max_tokens": 8, "messages": [{"role": "user", "content": "hello"}]}
            asked = urllib.request.Request(
                f"{network['nodes'][0]}/v1/chat/completions",
                json.dumps(question).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(asked, timeout=60) as response:
                assert json.load(response)["usage"]["completion_tokens"] == 8
        finally:
            up.send_signal(signal.SIGINT)
            logged = up.communicate(timeout=60)[1]
    assert up.returncode == 0
    assert logged.count("compiling kernels") == compiled


IMPORT_ALL = """
import importlib, pkgutil, sys
from wwwserve import agents, envs, serving

needs_training_libraries = {"wwwserve.agents.policy.network"}
for package in (agents, serving):
    assert "site-packages" in package.__file__, package.__file__
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name not in needs_training_libraries and not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
            print(module.name)
"""


def test_every_agents_and_serving_module_imports(node_python, tmp_path):
    imported = run(node_python, "-c", IMPORT_ALL, cwd=tmp_path).split()
    assert "wwwserve.agents.kernel" in imported


LOAD_SCENARIOS = """
from wwwserve.envs import scenario

names = scenario.packaged_names()
for name in names:
    scenario.load(name)
print(len(names))
"""


def test_every_packaged_scenario_loads(node_python, tmp_path):
    loaded = int(run(node_python, "-c", LOAD_SCENARIOS, cwd=tmp_path))
    assert loaded == len(list((ROOT / "envs/scenarios").rglob("*.yaml"))) > 0
