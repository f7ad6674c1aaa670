"""The files in docs/deploy: they are what systemd, Compose and Kubernetes take, and what they say runs."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from wwwserve.serving import config
from wwwserve.serving.cli import COMMANDS
from wwwserve.serving.config import LimitsConfig
from wwwserve.serving.http.drain import CUT_S
from wwwserve.serving.local_nodes import READY_S, Command, NetworkError, look, programs

DEPLOY = Path(__file__).resolve().parent.parent / "docs/deploy"
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
SERVER_S = 5.0  # that the server gives connections to end, after the drain
NODES = ("north", "south", "east")
ADMIN_KEY = "said by a test"
OWN = f"wwwserve:{importlib.metadata.version('wwwserve')}"  # the image


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = shutil.which(name, path=ENVIRONMENT["PATH"])
    assert path is not None, f"{name} is missing"
    return subprocess.run(
        [path, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )


def seconds(text: str) -> float:
    found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", text)
    assert found is not None, text
    return 60.0 * int(found[1] or 0) + int(found[2] or 0)


# Images, and what is named.


def test_images_have_versions_and_the_own_one_that_of_the_package() -> None:
    found = set(re.findall(r"^FROM (\S+)|-t (\S+)", (DEPLOY / "Containerfile").read_text(), re.MULTILINE))
    images = {one or other for one, other in found}
    for name in ("compose.yaml", "compose.vllm.yaml", "kubernetes.yaml"):
        images.update(re.findall(r"^\s*(?:- )?image: (\S+)", (DEPLOY / name).read_text(), re.MULTILINE))
    assert {each.rpartition(":")[0] for each in images} == {
        "wwwserve", "docker.io/library/python", "docker.io/prom/prometheus", "docker.io/grafana/grafana",
        "docker.io/vllm/vllm-openai",
    }  # fmt: skip
    for each in images:
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-slim)?$", each), f"{each} has no version"
    assert [each for each in images if each.startswith("wwwserve")] == [OWN]


def test_the_files_and_commands_that_are_named_are_there() -> None:
    """Those in the files' heads, and what the image is built of; that compose and its mounts are is tested below."""
    for file in DEPLOY.iterdir():
        for named in re.findall(r"docs/[\w./-]+\w", file.read_text(encoding="utf-8") if file.is_file() else ""):
            assert (DEPLOY.parent.parent / named).exists(), f"{file.name} names {named}"
    ignored = (DEPLOY / "Containerfile.dockerignore").read_text(encoding="utf-8").split()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    assert ignored[0] == "*" and {f"!{part}" for each in copied for part in each.split()} < set(ignored)
    said = "\n".join(
        (DEPLOY / name).read_text(encoding="utf-8")
        for name in ("Containerfile", "compose.yaml", "kubernetes.yaml", "wwwserve.service")
    )
    commands = set(re.findall(r"(?:wwwserve |CMD \[\"|args: \[|command: \[)(node|emulator|compile|key new)\b", said))
    assert commands == {"node", "emulator", "compile", "key new"} and commands <= COMMANDS.keys()


# systemd.


def test_systemd_takes_the_unit_and_finds_it_locked(tmp_path: Path) -> None:
    unit = tmp_path / "wwwserve.service"
    text = (DEPLOY / "wwwserve.service").read_text(encoding="utf-8")
    assert "/opt/wwwserve/bin/wwwserve" in text
    unit.write_text(text.replace("/opt/wwwserve/bin/wwwserve", sys.executable))  # which has to be there
    done = tool("systemd-analyze", "verify", unit)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    done = tool("systemd-analyze", "security", "--offline=yes", "--threshold=20", unit)  # of 100
    assert done.returncode == 0, done.stdout


def test_systemd_waits_for_the_drain_and_lets_kernels_be_compiled() -> None:
    said = dict(re.findall(r"^(\w+)=(.*)$", (DEPLOY / "wwwserve.service").read_text(encoding="utf-8"), re.MULTILINE))
    assert float(said["TimeoutStopSec"]) >= LimitsConfig().drain_s + CUT_S + SERVER_S
    assert said["KillSignal"] == "SIGTERM" and "MemoryDenyWriteExecute" not in said
    assert int(said["LimitNOFILE"]) >= LimitsConfig().files


# Kubernetes.


def documents() -> dict[tuple[str, str], Any]:
    found = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def test_kubernetes_has_the_schema_of_the_manifest() -> None:
    done = tool("kubernetes-validate", "--strict", DEPLOY / "kubernetes.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8").replace("terminationGracePeriodSeconds", "grace")
    assert "grace" in wrong  # and that the check can fail
    done = subprocess.run(
        [shutil.which("kubernetes-validate", path=ENVIRONMENT["PATH"]) or "", "--strict", "/dev/stdin"],
        input=wrong, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0


def test_the_pod_has_one_replica_a_node_that_can_be_and_time_to_drain() -> None:
    found = documents()
    stateful = found["StatefulSet", "wwwserve"]["spec"]
    pod = stateful["template"]["spec"]
    (container,) = pod["containers"]
    settings = yaml.safe_load(found["ConfigMap", "wwwserve"]["data"]["node.yaml"])
    node = config.parse(settings, "kubernetes.yaml")
    assert stateful["replicas"] == 1
    pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause_s + node.limits.drain_s + CUT_S + SERVER_S
    assert [each["containerPort"] for each in container["ports"]] == [node.port]
    assert node.user_keys[0].env in {each["name"] for each in container["env"]}
    mounted = {each["mountPath"] for each in container["volumeMounts"]}
    assert {str(Path(node.key).parent), "/etc/wwwserve"} <= mounted
    volumes = {each["name"] for each in pod["volumes"]} | {
        each["metadata"]["name"] for each in stateful["volumeClaimTemplates"]
    }
    for each in (*pod["initContainers"], container):
        assert {mount["name"] for mount in each["volumeMounts"]} <= volumes
    vllm = found["Service", "vllm"]["spec"]
    assert node.engine.url == f"http://vllm:{vllm['ports'][0]['port']}"
    assert vllm["selector"].items() <= found["Deployment", "vllm"]["spec"]["template"]["metadata"]["labels"].items()


# Compose.


def composed(*files: str) -> dict[str, Any]:
    given = [part for name in files for part in ("-f", DEPLOY / name)]
    done = tool("docker-compose", *given, "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_compose_takes_both_files_and_vllm_stands_in_for_the_emulated_engines() -> None:
    emulated, real = composed("compose.yaml"), composed("compose.yaml", "compose.vllm.yaml")
    assert emulated["services"].keys() == real["services"].keys()
    for name in NODES:
        assert emulated["services"][name] == real["services"][name]
        engine = real["services"][f"engine-{name}"]
        assert engine["image"].startswith("docker.io/vllm/") and "--max-num-seqs=64" in engine["command"]
        assert not {"build", "read_only", "cap_drop", "tmpfs"} & engine.keys()
        assert [each["source"] for each in engine["volumes"]] == ["models"]
        assert seconds(emulated["services"][name]["stop_grace_period"]) >= LimitsConfig().drain_s + CUT_S + SERVER_S


def test_grafana_finds_its_source_and_its_board() -> None:
    services = composed("compose.yaml")["services"]
    grafana = services["grafana"]
    mounts = {each["target"]: Path(each["source"]) for each in grafana["volumes"] if each["type"] == "bind"}
    (source,) = yaml.safe_load(mounts["/etc/grafana/provisioning/datasources/wwwserve.yaml"].read_text())["datasources"]
    assert source["isDefault"] and source["url"] == "http://prometheus:9090" and "prometheus" in services
    (boards,) = yaml.safe_load(mounts["/etc/grafana/provisioning/dashboards/wwwserve.yaml"].read_text())["providers"]
    board = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert mounts[board] == DEPLOY / "board.json" and Path(board).parent == Path(boards["options"]["path"])


def test_prometheus_scrapes_the_nodes_with_the_key_that_they_want() -> None:
    made = composed("compose.yaml")
    prometheus = made["services"]["prometheus"]
    mounts = {each["target"]: Path(each["source"]) for each in prometheus["volumes"] if each["type"] == "bind"}
    assert all(each.is_file() for each in mounts.values())
    (job,) = yaml.safe_load(mounts["/etc/prometheus/prometheus.yml"].read_text())["scrape_configs"]
    (key,) = prometheus["configs"]
    assert key["target"] == f"/etc/prometheus/{job['authorization']['credentials_file']}"
    nodes = {name: yaml.safe_load(made["configs"][name]["content"]) for name in NODES}
    assert {f"{name}:{node['admin']['port']}" for name, node in nodes.items()} == set(
        job["static_configs"][0]["targets"]
    )
    assert {node["admin"]["key"] for node in nodes.values()} == {made["configs"][key["source"]]["content"]}


def test_what_compose_says_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each service as a process with an address of its own, until it is healthy; then users are answered."""
    monkeypatch.setitem(ENVIRONMENT, "WWWSERVE_ADMIN_KEY", ADMIN_KEY)
    made = composed("compose.yaml")
    services = {name: each for name, each in made["services"].items() if each["image"] == OWN}
    assert services.keys() == {*NODES, *(f"engine-{each}" for each in NODES)}
    net = f"127.{1 + os.getpid() % 250}.{1 + os.getpid() // 250 % 250}"
    address = {name: f"{net}.{10 + k}" for k, name in enumerate(services)}

    def placed(text: str, name: str) -> str:
        """What is said in a container, for a process: its own address, those of others, its folders."""
        for any_ in ("0.0.0.0", "127.0.0.1"):
            text = text.replace(any_, address[name])
        text = re.sub(r"\b((?:engine-)?(?:north|south|east)):(\d+)", lambda m: f"{address[m[1]]}:{m[2]}", text)
        return text.replace("/var/lib/wwwserve", f"{tmp_path}/{name}").replace("/etc/wwwserve", f"{tmp_path}/{name}")

    image = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    entrypoint = json.loads(re.findall(r"^ENTRYPOINT (.*)$", image, re.MULTILINE)[0])
    with programs(tmp_path) as running:
        for name, each in services.items():
            folder = tmp_path / name
            folder.mkdir()
            for file in each.get("configs", ()):
                target = Path(placed(file["target"], name))
                target.write_text(placed(made["configs"][file["source"]]["content"], name))
            argv = [placed(part, name) for part in (each["entrypoint"] or entrypoint) + each["command"]]
            inside = ["sh", "-c", f'cd "{folder}" && exec "$@"', "sh", *argv]
            running.start(f"{name} ", Command(inside, ENVIRONMENT))

        def is_healthy(name: str) -> bool:
            test = [placed(part, name) for part in services[name]["healthcheck"]["test"][1:]]
            return subprocess.run(test, env=ENVIRONMENT, capture_output=True, check=False).returncode == 0

        running.wait(list(services), is_healthy, READY_S["emulated"])

        def sees_all(name: str) -> bool:
            try:
                seen = look(f"http://{address[name]}:9100", ADMIN_KEY)
            except NetworkError:
                return False
            return sum(each["there"] for each in seen["peers"]) == len(NODES) - 1

        running.wait(NODES, sees_all, READY_S["emulated"])
        for name in NODES:
            asked = {"model": "qwen3-8b", "max_tokens": 3, "messages": [{"role": "user", "content": "Hello"}]}
            url = f"http://{address[name]}:9000"
            request = urllib.request.Request(
                f"{url}/v1/chat/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                assert json.load(response)["usage"]["completion_tokens"] == 3
            with urllib.request.urlopen(f"{url}/health/live", timeout=60) as response:
                assert response.status == 200
        nodes = [running.running[f"{name} "] for name in NODES]
        for each in nodes:
            each.terminate()
        until_s = time.monotonic() + 30
        while any(each.poll() is None for each in nodes) and time.monotonic() < until_s:
            time.sleep(0.05)
        assert [each.returncode for each in nodes] == [0, 0, 0]
