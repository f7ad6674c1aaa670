"""A node that may open few files takes fewer connections, says so, and turns the others away as it should."""

import asyncio
import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from stub_nodes import GOOD, MODEL, Stub, play

from wwwserve.serving import config
from wwwserve.serving.http import files
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.local_nodes import READY_S, Command, answers, cpu_s, free_ports, programs

FEW = 160  # file descriptors
USERS = (FEW - config.SPARE_FILES) // 2 * 3 // 4  # connections that are left, of which a quarter is for peers
CLI = [sys.executable, "-m", "wwwserve.serving.cli"]


def test_the_files_of_a_process_bound_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    node = config.parse(GOOD | {"admin": {"port": 9100}}, "t")
    peers = [{"key": Identity.generate().name, "url": f"http://10.0.0.{k}:1"} for k in range(3)]
    for most, more, expected in (
        (8192 + 64 + 64, {}, 4096), (8192 + 64 + 63, {}, 4095), (8192 + 64 + 64, {"peers": peers}, 4094),
        (1 << 62, {}, 4096), (144, {}, 8),
    ):  # fmt: skip
        monkeypatch.setattr(files.resource, "getrlimit", lambda what, most=most: (most, most))
        given = config.parse(GOOD | {"admin": {"port": 9100}} | more, "t")
        fits = files.fitting(given)
        assert fits.limits.connections == expected and (expected < 4096 or fits is given)
    monkeypatch.setattr(files.resource, "getrlimit", lambda what: (143, 143))
    with pytest.raises(config.ConfigError, match=r"at most 143 files can be open .* expected at least 144"):
        files.fitting(node)


def test_the_limit_is_raised_as_far_as_the_system_lets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = [(64, 5000)]
    monkeypatch.setattr(files.resource, "getrlimit", lambda what: limit[0])
    monkeypatch.setattr(files.resource, "setrlimit", lambda what, to: limit.__setitem__(0, to))
    assert files.raise_limit(100) == 5000 and limit == [(5000, 5000)]
    limit[0] = 64, resource.RLIM_INFINITY
    assert files.raise_limit(100) == 100 and limit == [(100, resource.RLIM_INFINITY)]
    assert files.raise_limit(50) == 100


def test_beyond_its_files_a_node_says_to_come_again_and_its_engine_is_not_to_blame(tmp_path: Path) -> None:
    async def scene() -> None:
        stub, port = Stub(tokens=20, pause_s=0.1), free_ports(1)[0]
        Identity.generate().save(tmp_path / "n.pem")
        async with stub.served(), aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            content = GOOD | {"port": port, "engine": GOOD["engine"] | {"url": stub.url}, "policy": "earliest_finish"}
            (tmp_path / "node.yaml").write_text(json.dumps(content | {"key": "n.pem"}))
            url = f"http://127.0.0.1:{port}"

            async def ask(s: aiohttp.ClientSession, after_s: float = 0.0) -> tuple[int, str | None, bytes]:
                await asyncio.sleep(after_s)
                body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
                async with s.post(url + "/v1/chat/completions", json=body) as response:
                    return response.status, response.headers.get("retry-after"), await response.read()

            async def network() -> dict[str, Any]:
                async with session.get(url + "/network") as response:
                    return await response.json() if response.status == 200 else {}

            with programs(tmp_path) as made:
                limited = ["sh", "-c", f'ulimit -n {FEW} && cd "{tmp_path}" && exec "$@"', "sh", *CLI]
                node = made.start("node", Command([*limited, "node", "node.yaml"]))
                await asyncio.to_thread(made.wait, [url], answers, READY_S["emulated"])
                while not (await network())["engine"]["up"]:
                    await asyncio.sleep(0.05)

                async def crowd(count: int) -> "Counter[tuple[int, str | None]]":
                    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as many:
                        said = await asyncio.gather(*(ask(many, 0.01 * k) for k in range(count)))
                    assert all(body.endswith(b"data: [DONE]\n\n") for status, _, body in said if status == 200)
                    return Counter((status, again) for status, again, _ in said)

                said = await crowd(3 * USERS)
                assert set(said) == {(200, None), (503, "1")} and USERS - 5 <= said[200, None] <= USERS
                log = made.log("node").read_text()
                assert f'"missing": {config.LimitsConfig().files - FEW}' in log and "Traceback" not in log

                # Fewer are left than was said at the start: what is beyond is turned away, and the engine is up.
                open_now = len([*Path(f"/proc/{node.pid}/fd").iterdir()])
                resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (open_now + config.SPARE_FILES // 2 + 10, FEW))
                began_s, cpu_before_s = time.monotonic(), cpu_s(node.pid)
                said = await crowd(3 * USERS)
                assert set(said) == {(200, None), (503, "1")} and 0 < said[200, None] < USERS
                assert cpu_s(node.pid) - cpu_before_s < 0.8 * (time.monotonic() - began_s)
                log = made.log("node").read_text()
                assert log.count("new connections are turned away: too many files are open here") == 1
                assert "Traceback" not in log and "the engine is down" not in log
                resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (FEW, FEW))
                assert (await ask(session))[0] == 200 and (await network())["engine"]["up"]

    play(scene)
