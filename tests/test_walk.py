"""The way of a new operator, as the README has it: from nothing to two nodes that trade."""

import json
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from wwwserve.serving.local_nodes import (
    READY_S,
    Command,
    Process,
    Programs,
    answers,
    emulator,
    free_ports,
    local_urls,
    programs,
)

ROOT = Path(__file__).resolve().parent.parent
FEW_FILES = 256  # a shell lets a program have
CLI = [sys.executable, "-m", "wwwserve.serving.cli"]


def commands() -> list[list[str]]:
    """Those of the README's five that are wwwserve's, without comments."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    [block] = [each for each in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if "wwwserve init" in each]
    lines = [line.partition("#")[0].split() for line in block.splitlines()]
    assert lines[0][:2] == ["pip", "install"] and len(lines) == 5
    return [line[1:] for line in lines[1:]]


def on_one_machine(command: list[str], engine: str, port: int, names: dict[str, str]) -> list[str]:
    """A command of the README for a node of another name, engine and port; the profile is known, as is the address."""
    given = [names.get(each.removesuffix(".card.yaml"), each.removesuffix(".card.yaml")) for each in command]
    given = [new + ".card.yaml" * each.endswith(".card.yaml") for new, each in zip(given, command, strict=True)]
    if given[0] != "init":
        return given
    changed = " ".join(given).replace("http://127.0.0.1:8000", engine)
    changed = changed.replace("--calibrate", "--gpu rtx-4090").replace("--url 10.0.0.1", f"--port {port}")
    return changed.split()


def run(folder: Path, argv: list[str]) -> subprocess.CompletedProcess[str]:
    """A command of wwwserve that ends by itself."""
    return subprocess.run(
        [*CLI, *argv], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


@contextmanager
def started(made: Programs, folder: Path, argv: list[str]) -> Iterator[Process]:
    """A node, which has to end well when it is told to."""
    node = made.start(
        folder.name, Command(["sh", "-c", f'ulimit -Sn {FEW_FILES} && cd "{folder}" && exec "$@"', "sh", *CLI, *argv])
    )
    try:
        yield node
    finally:
        node.send_signal(signal.SIGTERM)
    assert node.wait(60.0) == 0


def until(folder: Path, argv: list[str], well: Callable[[str], bool] = lambda said: True) -> None:
    """Until a command ends with 0 and says what is `well`. Raises AssertionError with what it says after a while."""
    until_s = time.monotonic() + READY_S["emulated"]
    while (done := run(folder, argv)).returncode != 0 or not well(done.stdout):
        assert time.monotonic() < until_s, done.stdout + done.stderr


def joined(name: str, peer: str, said: str) -> bool:
    """Whether the node of that name is up and sees the one peer."""
    seen = json.loads(said)
    assert (seen["name"], seen["policy"]) == (name, "competitive")
    assert [each["label"] for each in seen["peers"]] == [peer]
    return bool(seen["engine"]["up"] and seen["peers"][0]["there"])


def test_two_operators_who_follow_the_readme_are_joined(tmp_path: Path) -> None:
    init, join, node, doctor = commands()
    north, south = tmp_path / "north", tmp_path / "south"
    ports = free_ports(4)
    engines = local_urls(ports[:2])
    with programs(tmp_path) as made:
        for k, port in enumerate(ports[:2]):
            made.start(f"engine {k + 1}", emulator(port))
        made.wait(engines, answers, READY_S["emulated"])
        nodes = []
        for folder, engine, port, names in (
            (north, engines[0], ports[2], {}),
            (south, engines[1], ports[3], {"north": "south", "south": "north"}),
        ):
            folder.mkdir()
            asked = [on_one_machine(each, engine, port, names) for each in (init, join, node, doctor)]
            done = run(folder, asked[0])
            assert done.returncode == 0, done.stderr
            nodes.append((folder, asked))
        for (folder, asked), other in zip(nodes, (south, north), strict=True):
            card = other / f"{other.name}.card.yaml"
            (folder / card.name).write_bytes(card.read_bytes())  # as it is sent
            done = run(folder, asked[1])
            assert done.returncode == 0, done.stderr
        alone = run(north, nodes[0][1][3])  # nobody runs yet
        assert alone.returncode == 1 and "does it run?" in alone.stdout
        with started(made, north, nodes[0][1][2]) as first, started(made, south, nodes[1][1][2]):
            for (folder, asked), peer in zip(nodes, ("south", "north"), strict=True):
                until(folder, asked[3])
                status = ["status", "--json", "--config", "node.yaml"]
                until(folder, status, partial(joined, folder.name, peer))
            assert resource.prlimit(first.pid, resource.RLIMIT_NOFILE)[0] > FEW_FILES  # it takes what it may have
        started_here = list(made.running.values())
    assert all(each.poll() is not None for each in started_here)
