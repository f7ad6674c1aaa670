"""The way of a new operator, as the README has it: from nothing to two nodes that trade."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    node = made.start(folder.name, Command(["sh", "-c", f'cd "{folder}" && exec "$@"', "sh", *CLI, *argv]))
    try:
        yield node
    finally:
        node.send_signal(signal.SIGTERM)
    assert node.wait(60.0) == 0


def until_well(folder: Path, doctor: list[str]) -> None:
    """Until doctor finds nothing wrong. Raises AssertionError with what it finds after a while."""
    until_s = time.monotonic() + READY_S["emulated"]
    while (done := run(folder, doctor)).returncode != 0:
        assert time.monotonic() < until_s, done.stdout + done.stderr
    assert done.stdout.endswith(" ok\n") and "\nfailed" not in done.stdout


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
        with started(made, north, nodes[0][1][2]), started(made, south, nodes[1][1][2]):
            for folder, asked in nodes:
                until_well(folder, asked[3])
            for folder, _ in nodes:
                done = run(folder, ["status", "--json", "--config", "node.yaml"])
                seen = json.loads(done.stdout)
                assert seen["name"] == folder.name and seen["policy"] == "competitive"
                assert [peer["there"] for peer in seen["peers"]] == [True]
                assert [peer["label"] for peer in seen["peers"]] == [{"north": "south", "south": "north"}[folder.name]]
