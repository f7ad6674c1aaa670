"""docs/operations.md: its commands run, on a node that trades with another."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from wwwserve.serving import config
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.local_nodes import READY_S, Command, NetworkError, answers, emulator, free_ports, look, programs

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def run(folder: Path, command: str) -> str:
    done = subprocess.run(
        ["sh", "-ec", command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_commands_of_the_page_run(tmp_path: Path) -> None:
    engine, *ports = free_ports(3)
    folders = {name: tmp_path / name for name in ("north", "south")}
    with programs(tmp_path) as made:
        made.start("engine", emulator(engine))
        made.wait([f"http://127.0.0.1:{engine}"], answers, READY_S["emulated"])
        for (name, folder), port in zip(folders.items(), ports, strict=True):
            folder.mkdir()
            profile = f"--engine http://127.0.0.1:{engine} --gpu rtx-4090 --port {port}"
            run(folder, f"wwwserve init --name {name} {profile}")
        for (name, folder), other in zip(folders.items(), reversed(folders.values()), strict=True):
            run(folder, f"wwwserve join {other}/{other.name}.card.yaml")
            key = Identity.load(other / f"{other.name}.pem").name
            with (folder / "node.yaml").open("a") as file:
                file.write(f'\nledger: {{file: {name}.db, limits: {{"{key}": {{ours: 10, theirs: 10}}}}}}\n')
            made.start(name, Command(["sh", "-c", f'cd "{folder}" && exec wwwserve node node.yaml'], ENVIRONMENT))

        def is_there(url: str) -> bool:
            try:
                return look(url)["ledger"]["channels"][0]["reconciled"] is True
            except (NetworkError, IndexError):
                return False

        made.wait([f"http://127.0.0.1:{port}" for port in ports], is_there, READY_S["emulated"])
        said = [run(folders["north"], each.replace("9000", str(ports[0]))) for each in blocks("sh")]
        assert "0 failed" in said[0] and re.search(r"wwwserve \S+, speaks protocol \d", said[1])
        assert len(said) == len(blocks("sh")) >= 6

        new, old = (Identity.load(folders["north"] / f"{name}.pem").name for name in ("next", "north"))
        before = config.load(folders["south"] / "node.yaml")
        assert [peer.key for peer in before.peers] == [old]
        assert "`ledger` has to name the new one" in run(folders["south"], "wwwserve join ../north/north.card.yaml")
        assert [peer.key for peer in config.load(folders["south"] / "node.yaml").peers] == [new]
        assert look(f"http://127.0.0.1:{ports[0]}")["key"] == old  # the one that runs

        node = made.running["north"]  # which drains, and a journal of another key is refused
        node.terminate()
        assert node.wait(60.0) == 0
        again = made.start(
            "north", Command(["sh", "-c", f'cd "{folders["north"]}" && exec wwwserve node node.yaml'], ENVIRONMENT)
        )
        until_s = time.monotonic() + READY_S["emulated"]
        while again.poll() is None and time.monotonic() < until_s:
            time.sleep(0.1)
        assert again.returncode == 1 and old in made.log("north").read_text().splitlines()[-1]


def test_what_needs_root_is_at_least_a_script() -> None:
    for each in blocks("console"):
        done = subprocess.run(["sh", "-n"], input=each, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    unit = (ROOT / "docs/deploy/wwwserve.service").read_text(encoding="utf-8")
    for part in ("/opt/wwwserve/bin/wwwserve", "/var/lib/wwwserve", "User=wwwserve"):
        assert part in unit and part.removeprefix("User=") in PAGE
    assert {each.name for each in (ROOT / "docs/deploy").glob("*") if each.suffix in (".service", ".yaml")} <= set(
        re.findall(r"`([\w.]+)`", PAGE)
    )
