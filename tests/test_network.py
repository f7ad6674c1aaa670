"""Whole networks of processes on emulated engines, and what is left of them when nodes die."""

import asyncio
import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import aiohttp
import openai
import pytest
from rich.console import Console

from wwwserve.serving.config import ConfigError
from wwwserve.serving.display import frame, show, table
from wwwserve.serving.local_nodes import NetworkError, Plan, configurations, look, running

MODEL = "qwen3-8b"
PLAN = Plan(nodes=5, base_port=0, policy=None, gpu="rtx-4090", model=MODEL, max_num_seqs=2, speed=5.0)
PATIENCE_S = 120.0


async def ask(session: aiohttp.ClientSession, url: str, stream: bool) -> str:
    """What became of one request: "answered", "failed" with a reason, or "lost" without."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me."}], "max_tokens": 40, "stream": stream}
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            answer = (await response.read()).decode()
    except aiohttp.ClientError:
        return "lost"
    if response.status == 200 and not stream:
        return "answered" if json.loads(answer)["usage"]["completion_tokens"] > 0 else "lost"
    if response.status == 200 and answer.rstrip().endswith("data: [DONE]"):
        return "answered"
    last = answer.strip().splitlines()[-1].removeprefix("data: ")
    return "failed" if json.loads(last)["error"]["message"] else "lost"


async def load(urls: list[str], per_s: float, enough: asyncio.Event) -> dict[str, Counter[str]]:
    """Ask the nodes in turn until it is enough, every second request for a stream; what became of them, by node."""
    seen: dict[str, Counter[str]] = {url: Counter() for url in urls}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session:

        async def one(k: int) -> None:
            url = urls[k % len(urls)]
            seen[url][await ask(session, url, k // len(urls) % 2 == 0)] += 1

        async with asyncio.TaskGroup() as group:
            for k in itertools.count():
                if enough.is_set():
                    break
                group.create_task(one(k))
                await asyncio.sleep(1.0 / per_s)
    return seen


async def until(what: Callable[[], bool]) -> None:
    """Wait for it, outside of the loop. Raises AssertionError after `PATIENCE_S`."""

    def seen() -> bool:
        with contextlib.suppress(NetworkError):  # a busy node may take too long for a look
            return what()
        return False

    until_s = time.monotonic() + PATIENCE_S
    while not await asyncio.to_thread(seen):
        assert time.monotonic() < until_s
        await asyncio.sleep(0.1)


def there(url: str) -> dict[str, bool]:
    """Which peers a node sees."""
    return {peer["key"]: peer["there"] for peer in look(url)["peers"]}


@pytest.mark.parametrize("membership", ["static", "zenoh"])
def test_every_request_ends_once_though_nodes_are_killed_and_stopped(membership: Literal["static", "zenoh"]) -> None:
    with running(PLAN._replace(membership=membership)) as network:
        users = network.urls[:2]  # of these two alone, so that they hand over; the other three have no users
        killed, stopped = network.keys[2:4]

        def handed_over() -> bool:
            return all(look(url)["requests"]["handed_over"] > 10 for url in users)

        async def scene() -> dict[str, Counter[str]]:
            enough = asyncio.Event()
            loading = asyncio.create_task(load(users, 40.0, enough))
            await until(handed_over)
            network.nodes[2].kill()
            await until(lambda: not any(there(url)[killed] for url in users))
            network.nodes[3].send_signal(signal.SIGSTOP)
            await until(lambda: not any(there(url)[stopped] for url in users))
            gone_s = time.monotonic() * PLAN.speed  # as a node tells the time
            await asyncio.sleep(2.0)
            for url in users:
                later = [d for d in look(url)["decisions"] if d["at_s"] > gone_s]
                assert later and not [d for d in later if d["to"] in (killed, stopped)]
            network.nodes[3].send_signal(signal.SIGCONT)
            await until(lambda: there(users[0])[stopped])  # it goes on, and is seen again
            assert not there(users[0])[killed]
            enough.set()
            return await loading

        seen = asyncio.run(scene())
        for url in users:
            totals = look(url)["requests"]
            assert seen[url]["lost"] == 0
            assert totals["answered"] == seen[url]["answered"] > 0.9 * totals["accepted"]
            assert totals["failed"] == seen[url]["failed"]
            assert totals["accepted"] == totals["answered"] + totals["failed"] and totals["cancelled"] == 0


def test_up_answers_an_unmodified_client_and_leaves_nothing_behind() -> None:
    command = [sys.executable, "-m", "wwwserve.serving.cli", "up", "--nodes", "2", "--base-port", "0",
               "--policy", "www_serve",
               "--speed", "20", "--membership", "zenoh"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        client = openai.OpenAI(base_url=ready["nodes"][1] + "/v1", api_key="any")
        assert [model.id for model in client.models.list()] == [MODEL]
        messages: list[Any] = [{"role": "user", "content": "Tell me."}]
        whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12)
        assert whole.usage is not None and whole.usage.completion_tokens == 12
        parts = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
            client.chat.completions.create(model="gpt", messages=messages)
        assert look(ready["nodes"][1])["policy"] == "www_serve"
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        pids = [int(pid) for pid in children.stdout.split()]
        assert len(pids) == 5  # two engines, two nodes, and who ends them if this process cannot
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_node_is_shown_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    requests = {"accepted": 10, "answered": 9, "handed_over": 3, "on_time": 9, "mean_latency_s": 1.25}
    tariff = {"input": 0.012, "cached_input": 0.003, "output": 1.0}
    there = {"label": "south", "key": "K" * 43, "url": "http://10.0.0.2:9", "there": True, "age_s": 1.26,
             "running": 2.0, "waiting": 1.0, "kv_use": 0.1, "tariff": tariff, "stake": 1.2345, "out": 4}  # fmt: skip
    gone = there | {"label": None, "key": "west", "url": None, "there": False, "age_s": None, "kv_use": None}
    show(
        {
            "name": "north", "url": "http://10.0.0.1:9000", "held": 6, "remote": 7, "requests": requests,
            "tariff": {"input": 0.25, "cached_input": 0.1, "output": 1.5}, "markup": 1.25, "margin": -0.1,
            "engine": {"up": False, "reason": "it is not there", "running": 3.0, "waiting": 5.0, "kv_use": 0.25},
            "peers": [there, gone],
            "decisions": [{"to": "local"}, {"to": "south"}], "policy": "www_serve",
        }
    )  # fmt: skip
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in capsys.readouterr().out.splitlines()]
    shown = {row[0]: row[1] for row in rows if len(row) == 2}
    assert (shown["API"], shown["engine"], shown["KV"]) == ("http://10.0.0.1:9000", "down", "-")
    assert shown["reason"] == "it is not there"
    assert shown["policy"] == "www_serve"
    assert (shown["tariff"], shown["markup"], shown["margin"]) == ("0.25/1.5", "1.25", "-10%")
    assert (shown["asked"], shown["in time"], shown["last decisions"]) == ("10", "100%", "local south")
    assert next(row for row in rows if row[:1] == ["peer"])[1:-1] == [
        "there", "age s", "run", "wait", "KV", "tariff", "stake", "ours"
    ]  # fmt: skip
    assert [row[:-1] for row in rows if row[:1] == ["south"]] == [
        ["south", "yes", "1.3", "2", "1", "10%", "0.012/1", "1.23", "4"]
    ]
    assert [row for row in rows if row[:1] == ["west"]] == [
        ["west", "no", "-", "2", "1", "-", "0.012/1", "1.23", "4", "-"]
    ]


@pytest.mark.parametrize("width", [80, 120, 300])
def test_a_network_is_shown_as_far_as_a_terminal_has_place(width: int) -> None:
    requests = {"accepted": 12345, "answered": 12340, "handed_over": 3000, "on_time": 12340, "mean_latency_s": 101.25}
    seen = {
        "url": "http://127.0.0.1:27011", "held": 6, "remote": 7, "requests": requests, "markup": 1.25, "margin": -0.1,
        "tariff": {"input": 0.25, "cached_input": 0.1, "output": 1.5}, "peers": [], "decisions": [{"to": "local"}] * 6,
        "engine": {"up": True, "running": 64.0, "waiting": 512.0, "kv_use": 1.0},
    }  # fmt: skip
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table([seen | {"name": f"n{k}"} for k in range(8)], width))
    shown = console.export_text()
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in shown.splitlines()]
    head = next(row for row in rows if row[:1] == ["node"])
    assert "…" not in shown and sum(row[:1] == ["n7"] for row in rows) == 1
    assert {"node", "running", "KV", "asked", "handed over", "in time", "mean s"} <= set(head)
    assert ("last decisions" in head) is (width == 300) is ("a wider terminal shows more" not in shown)


def test_what_cannot_come_up_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        NetworkError, match=r"--nodes is 200, --engines 64: \d+ ports of 10000 to 19999 are free, expected 13400"
    ):
        configurations(PLAN._replace(nodes=200, engines=64))
    with pytest.raises(NetworkError, match="--nodes is 0"):
        configurations(PLAN._replace(nodes=0))
    with pytest.raises(ConfigError, match="abacus"):
        configurations(PLAN._replace(gpu="abacus"))
    with pytest.raises(ConfigError, match=r"n1: policy must be competitive, .*a bundle, got 'no-such-bundle'"):
        configurations(PLAN._replace(policy="no-such-bundle"))
    with (
        pytest.raises(NetworkError, match=r"node 1 ended with 1: .*manifest.json"),
        running(PLAN._replace(nodes=1, policy=str(tmp_path))),
    ):
        pass
    with pytest.raises(NetworkError, match=r"127\.0\.0\.1:9 is no URL of a node, expected http://HOST:PORT"):
        look("127.0.0.1:9")
    with pytest.raises(NetworkError, match=r"http://127\.0\.0\.1:9 does not answer as a node: nothing listens there"):
        look("http://127.0.0.1:9")


def test_the_page_of_the_network_is_named_below_its_table() -> None:
    [_, page] = frame(["http://127.0.0.1:1", "http://127.0.0.1:2"], "http://127.0.0.1:9100", 80).renderables
    assert page == "console: http://127.0.0.1:9100"


@pytest.mark.parametrize("base_port", [-1, 65535, 80_000])
def test_ports_that_cannot_be_are_named(base_port: int) -> None:
    with pytest.raises(NetworkError, match=f"--base-port is {base_port}, expected 1 to 65534"):
        configurations(PLAN._replace(nodes=2, base_port=base_port))
