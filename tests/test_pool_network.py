"""A node before two and three emulated engines, as processes: what they carry, caches, and one that is killed."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import aiohttp
import pytest

from wwwserve.serving.local_nodes import (
    NetworkError,
    Process,
    Programs,
    answers,
    emulator,
    free_ports,
    look,
    programs,
    write_nodes,
)

MODEL, SEQS, SPEED = "qwen3-8b", 4, 10.0
READY_S, PATIENCE_S = 180.0, 120.0


class Running(NamedTuple):
    """A node and its engines."""

    made: Programs
    url: str
    ports: list[int]
    engines: list[Process]

    def start_engine(self, k: int) -> Process:
        """Run engine k, again."""
        command = emulator(self.ports[k], max_num_seqs=SEQS, speed=SPEED, seed=k)
        return self.made.start(f"engine {k} at {time.monotonic()}", command)

    def kill(self, k: int) -> None:
        """End engine k at once."""
        os.killpg(self.engines[k].pid, signal.SIGKILL)
        self.engines[k].wait()

    @property
    def seqs(self) -> int:
        """What the node says that it runs at once."""
        return int(look(self.url)["engine"]["profile"]["max_num_seqs"])

    def until(self, what: Callable[[], bool]) -> None:
        def seen() -> bool:
            with suppress(NetworkError):  # a busy node may take too long for a look
                return what()
            return False

        until_s = time.monotonic() + PATIENCE_S
        while not seen():
            assert time.monotonic() < until_s
            time.sleep(0.1)


@contextmanager
def pool(count: int, **more: Any) -> Iterator[Running]:
    """A node before so many engines, all of which answer."""
    *ports, port = free_ports(count + 1)
    urls = [f"http://127.0.0.1:{each}" for each in ports]
    settings = {
        "name": "pool", "port": port, "policy": "single", "peers": [], "market": {"speed": SPEED},
        "engine": {
            "url": urls if count > 1 else urls[0],
            "profile": {"kind": "catalogue", "gpu": "rtx-4090", "model": MODEL, "max_num_seqs": SEQS},
        },
    }  # fmt: skip
    with programs() as made:
        running = Running(made, f"http://127.0.0.1:{port}", ports, [])
        running.engines.extend(running.start_engine(k) for k in range(count))
        made.wait(urls, answers, READY_S)
        (files,) = write_nodes(made.folder, [settings | more])
        made.start("node", files.command())

        def ready(url: str) -> bool:
            return answers(url) and running.seqs == count * SEQS

        made.wait([running.url], ready, READY_S)
        yield running


async def ask(session: aiohttp.ClientSession, url: str, messages: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    """The answer to a chat; of a stream its last event."""
    body = {"model": MODEL, "messages": messages, "max_tokens": 100, "ignore_eos": True} | more
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        said = (await response.read()).decode()
        assert response.status == 200, said
    if not body.get("stream"):
        answer: dict[str, Any] = json.loads(said)
        return answer
    assert said.rstrip().endswith("data: [DONE]"), said[-300:]
    events = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
    assert not any("error" in each for each in events), events[-1]
    last: dict[str, Any] = events[-1]
    return last


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def took_s(url: str, requests: int) -> float:
    """Until so many requests that come at once are answered."""

    async def scene() -> float:
        async with aiohttp.ClientSession() as session:
            await ask(session, url, user("first"), max_tokens=1)
            began_s = time.monotonic()
            await asyncio.gather(*(ask(session, url, user(f"{k}"), max_tokens=400) for k in range(requests)))
            return time.monotonic() - began_s

    return asyncio.run(scene())


def test_two_engines_carry_twice_what_one_does() -> None:
    with pool(1) as one, pool(2) as two:
        times_s = [(took_s(one.url, 24), took_s(two.url, 24)) for _ in range(3)]
    alone_s, both_s = map(min, zip(*times_s, strict=True))
    assert alone_s / both_s == pytest.approx(2.0, rel=0.25)


def test_sessions_stay_on_the_engine_that_has_their_prefix() -> None:
    """Six at once, five turns each, before three engines: all of a prompt but what is new is found cached."""
    shares: list[float] = []

    async def session_of(client: aiohttp.ClientSession, url: str, name: str) -> None:
        messages = user(f"{name} " * 400)
        for turn in range(5):
            said = await ask(client, url, messages)
            usage = said["usage"]
            if turn:
                shares.append(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])
            messages += [said["choices"][0]["message"], *user("and then?")]

    async def scene(url: str) -> None:
        async with aiohttp.ClientSession() as client:
            await asyncio.gather(*(session_of(client, url, f"name{k}") for k in range(6)))

    with pool(3) as three:
        asyncio.run(scene(three.url))
        prefix = look(three.url)["prefix"]["local"]
    assert len(shares) == 24 and min(shares) > 0.75 and sum(shares) / 24 > 0.85
    assert not prefix["alarm"] and prefix["drift"] < 0.1


@pytest.mark.parametrize("count", [2, 3])
def test_no_user_sees_an_error_when_an_engine_is_killed_and_its_share_is_back_with_it(count: int) -> None:
    outcomes: Counter[str] = Counter()

    async def load(url: str, enough: asyncio.Event) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session:

            async def one(k: int) -> None:
                said = await ask(session, url, user(f"request {k}"), stream=k % 2 == 0, max_tokens=200)
                outcomes["stream" if k % 2 == 0 else "whole"] += bool(said["usage"]["completion_tokens"])

            async with asyncio.TaskGroup() as group:
                k = 0
                while not enough.is_set():
                    group.create_task(one(k))
                    k += 1
                    await asyncio.sleep(0.1)

    async def scene(running: Running) -> None:
        enough = asyncio.Event()
        loading = asyncio.create_task(load(running.url, enough))
        await asyncio.sleep(2.0)
        await asyncio.to_thread(running.kill, 0)
        await asyncio.to_thread(running.until, lambda: running.seqs == (count - 1) * SEQS)
        seen = look(running.url)["engine"]
        assert seen["up"] and [each["takes"] for each in seen["each"]] == [False] + [True] * (count - 1)
        await asyncio.sleep(2.0)
        await asyncio.to_thread(running.start_engine, 0)
        await asyncio.to_thread(running.until, lambda: running.seqs == count * SEQS)
        await asyncio.sleep(2.0)
        enough.set()
        await loading

    with pool(count, resume=True) as running:
        asyncio.run(scene(running))
        requests = look(running.url)["requests"]
    assert outcomes["stream"] > 20 and outcomes["whole"] > 20
    assert requests["failed"] == 0 and requests["answered"] == requests["accepted"] == outcomes.total()
