"""Every command, every example and every configuration on every page does what it says; `doc_pages` says how."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, SHELL, Block, blocks, commands, generator
from stub_nodes import GOOD

from wwwserve.agents import arguments, strict_yaml
from wwwserve.envs import scenario
from wwwserve.serving import cli, config
from wwwserve.serving.http.addresses import is_free

BLOCKS = [block for page in PAGES for block in blocks(page)]
IN_SHELL = [block for block in BLOCKS if block.language in SHELL]
TOOLS = {name: each.module for name, each in cli.COMMANDS.items() if isinstance(each, cli.Tool)}
SCRIPTS = {f"{module.replace('.', '/')}.py": name for name, module in TOOLS.items()}
arguments_of = generator().arguments_of
SERVERS = ("wwwserve up", "wwwserve node", "wwwserve emulator")
AT_MOST_S = 900  # for a block on a machine that has to compile kernels first, and has other work

# `serve` runs a command in the background and returns when it has said that it is ready.
PRELUDE = """
set -euo pipefail
serve() {
  local said=$(mktemp -p "$SCRATCH")
  "$@" > "$said" 2> "$said.log" &
  until [ -s "$said" ]; do kill -0 $! 2> /dev/null || { cat "$said.log"; exit 1; }; sleep 0.1; done
}
cd "$(cat "$SCRATCH/.folder")"
trap 'pwd > "$SCRATCH/.folder"' EXIT
"""


def parse(command: str) -> str | None:
    """What is wrong with a command of ours by its own parser, which carries nothing out; None for nothing."""
    words = shlex.split(command, comments=True)
    if words[:1] == ["python"] and words[1:] and words[1] in SCRIPTS:
        words = ["wwwserve", *SCRIPTS[words[1]].split(), *words[2:]]
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return next((f"make has no {word}" for word in words[1:] if "=" not in word and word not in targets), None)
    if words[0] != "wwwserve":
        return None
    ours = words[1 : next((k for k, word in enumerate(words) if word in ("|", ">", "&&", ";", "&")), None)]
    if ours in (["--help"], ["--version"]):
        return None
    name = next((each for each in cli.COMMANDS if ours[: len(each.split())] == each.split()), None)
    if name is None:
        return f"there is no command {ours[:2]}"
    given = ours[len(name.split()) :]
    try:
        arguments.parse_args(arguments_of(name), f"wwwserve {name}", given)
    except arguments.UsageError as error:
        return str(error)
    except SystemExit:  # after --help
        return None
    return None


def test_a_fence_says_its_language() -> None:
    known = {*SHELL, "python", "yaml", "json", "text"}
    assert [f"{each}: {each.language!r}" for each in BLOCKS if each.language not in known] == []


@pytest.mark.parametrize("page", sorted({block.page for block in IN_SHELL}))
def test_arguments_of_commands_are_parsed(page: str) -> None:
    given = [(block, command) for block in IN_SHELL if block.page == page for command in commands(block.text)]
    wrong = [(str(block), command, reason) for block, command in given if (reason := parse(command)) is not None]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_options_in_a_sentence_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not re.findall(r"python -m\s+(?:agents|envs|serving|train|eval)\b", text)  # not there after an installation
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for command in re.findall(r"`((?:wwwserve|python train/\w+\.py) [^`]+)`", prose):
        words = command.split()
        words = words[1:] if words[0] == "wwwserve" else SCRIPTS[words[1]].split() + words[2:]
        name = next((each for each in cli.COMMANDS if words[: len(each.split())] == each.split()), None)
        if name is None:  # of several, as `wwwserve policy`, or of none
            several = any(each.split()[0] == words[0] for each in cli.COMMANDS)
            assert several or words[0].isupper() or words in (["--help"], ["--version"]), command
            continue
        names = [each.replace("_", "-") for each in arguments_of(name).__dataclass_fields__]
        known = {"--help", *(f"--{each}" for each in names), *(f"--no-{each}" for each in names)}
        assert {word for word in words if word.startswith("--")} <= known, command


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the process in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ports_in_a_row(count: int) -> range:
    """Ports that are free, below those that other tests are given."""
    for first in range(20_000 + os.getpid() % 1000 * 10, 32_000, 10):
        ports = range(first, first + count)
        if all(is_free("127.0.0.1", port) for port in ports):
            return ports
    raise AssertionError("no ports are free")


@pytest.fixture
def state(scratch: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What blocks of a page pass on, beside files: the folder they are in, and processes, which end with the test.

    The environment has `wwwserve` and `python` of this checkout, and free ports.
    """
    programs = tmp_path_factory.mktemp("bin")
    for name, options in (("wwwserve", "-m wwwserve.serving.cli"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {options} "$@"\n')
        (programs / name).chmod(0o755)
    folder = tmp_path_factory.mktemp("state")
    (folder / ".folder").write_text(str(scratch))
    ports = {f"PORT{k}": str(port) for k, port in enumerate(ports_in_a_row(9), 1)}
    given = {"PATH": f"{programs}:{os.environ['PATH']}", "SCRATCH": str(folder), "WANDB_MODE": "offline", **ports}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    yield folder
    for file in folder.glob("group.*"):
        group = int(file.suffix[1:])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
            for _ in range(200):
                os.killpg(group, 0)
                time.sleep(0.05)
            os.killpg(group, signal.SIGKILL)


def run(block: Block, state: Path) -> None:
    """Run a block as one script. AssertionError with all that it printed if a command fails."""
    lines = [*block.first, *commands(block.tested)]
    script = PRELUDE + "\n".join(f"serve {line}" if line.startswith(SERVERS) else line for line in lines)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(["bash", "-c", script], start_new_session=True, text=True, **pipes) as done:
        (state / f"group.{done.pid}").touch()
        said = done.communicate(timeout=AT_MOST_S)[0]
    assert done.returncode == 0, f"{block}\n{said}"


@pytest.mark.parametrize(
    "page", sorted({block.page for block in BLOCKS if block.language in (*SHELL, "python", "yaml")})
)
@pytest.mark.filterwarnings("ignore:PettingZoo in TorchRL is tested using version")
def test_a_page_does_what_it_says(page: str, scratch: Path, state: Path) -> None:
    for block in (each for each in BLOCKS if each.page == page and each.not_run is None):
        if block.language == "yaml":
            load_yaml(block, scratch)
        if block.file is not None:
            (scratch / block.file).write_text(os.path.expandvars(block.tested))
        if block.language == "python":
            exec(compile(block.tested, str(block), "exec"), {"__name__": "example"})
        if block.language in SHELL:
            run(block, state)


def load_yaml(block: Block, folder: Path) -> None:
    """A scenario, or keys of node.yaml, which are read as part of a configuration that has what they leave out."""
    content = strict_yaml.load(block.text)
    if "providers" in content:
        scenario.parse(content)
    else:
        (folder / "genesis.yaml").touch()
        config.parse(GOOD | content, str(block), folder)


@pytest.mark.parametrize("block", [each for each in BLOCKS if each.not_run is not None], ids=str)
def test_commands_that_are_not_run_have_a_reason(block: Block) -> None:
    pytest.skip(f"{block}: {block.not_run}")
