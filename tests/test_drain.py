"""A node that is told to end takes nothing more, and lets what it has begun end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from stub_nodes import MODEL, Net, Stub, busy, net, play

from wwwserve.serving import config, node


@contextlib.asynccontextmanager
async def ending(n: Net, k: int = 0) -> AsyncIterator[asyncio.Event]:
    """Node k anew, which ends when the event is set."""
    n.running[k].cancel()
    await asyncio.gather(n.running[k], return_exceptions=True)
    stop, up = asyncio.Event(), asyncio.get_running_loop().create_future()
    running = asyncio.create_task(
        node.serve(config.parse(n.configs[k], "test"), lambda *key: up.set_result(key), stop=stop)
    )
    n.running[k] = running
    await asyncio.wait({up, running}, return_when=asyncio.FIRST_COMPLETED)

    async def ready() -> bool:
        seen = await n.see(k)
        return bool(seen["engine"]["up"]) and sum(p["there"] for p in seen["peers"]) == len(n.urls) - 1

    await n.until(ready)
    yield stop


def stream(n: Net, k: int = 0) -> Any:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
    return n.session.post(n.urls[k] + "/v1/chat/completions", json=body)


@pytest.mark.parametrize("streamed", [True, False])
def test_what_is_open_ends_and_nothing_new_is_taken(streamed: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "wwwserve.node")

    async def scene() -> None:
        async with net(Stub(pause_s=0.1, tokens=12)) as n, ending(n) as stop:
            asked = asyncio.create_task(n.ask(stream=streamed))
            await n.until(lambda: begun(n.stubs[0], 1))
            stop.set()
            await n.until(lambda: refused(n))
            async with n.session.get(n.urls[0] + "/health") as response:
                assert response.status == 503 and (await response.json())["status"] == "this node is shutting down"
            status, body, headers = await n.ask()
            assert status == 503 and b"shutting down" in body and headers["Retry-After"] == "1"
            status, body, _ = await asked
            assert status == 200 and b"error" not in body
            assert body.rstrip().endswith(b"data: [DONE]") if streamed else b'"completion_tokens"' in body
            await asyncio.wait_for(n.running[0], 30)
            assert n.stubs[0].begun == 1 and n.stubs[0].aborted == 0
            assert [each.message for each in caplog.records][-2:] == ["nothing more is taken", "ended"]

    play(scene)


@pytest.mark.parametrize("streamed", [True, False])
def test_what_does_not_end_in_time_ends_with_an_error(streamed: bool) -> None:
    async def scene() -> None:
        limits = {"drain_s": 0.3}
        async with net(Stub(pause_s=0.1, tokens=10_000), limits=limits) as n, ending(n) as stop:
            asked = asyncio.create_task(n.ask(stream=streamed))
            await n.until(lambda: begun(n.stubs[0], 1))
            await asyncio.sleep(0.3)
            stop.set()
            status, body, _ = await asked
            assert status == (200 if streamed else 503) and b"was shut down before the answer was whole" in body
            if streamed:
                assert body.rpartition(b"data: ")[2].startswith(b'{"error"') and body.endswith(b"\n\n")
            await asyncio.wait_for(n.running[0], 30)
            await n.until(lambda: aborted(n.stubs[0], 1))

    play(scene)


def test_a_peer_s_request_ends_too_and_peers_send_nothing_more() -> None:
    async def scene() -> None:
        async with net(busy(), Stub(pause_s=0.1, tokens=15)) as n, ending(n, 1) as stop:
            async with stream(n) as response:
                read = await response.content.readany()
                assert n.stubs[1].begun == 1  # the peer has it
                stop.set()
                await n.until(lambda: serves_nothing(n))
                assert (await n.ask())[0] == 200 and n.stubs[1].begun == 1  # on the own engine, full as it is
                read += await response.read()
            assert b"error" not in read and read.endswith(b"data: [DONE]\n\n")
            await asyncio.wait_for(n.running[1], 30)

    play(scene)


def test_what_a_peer_has_is_broken_off_when_its_time_is_over_and_the_user_is_told() -> None:
    async def scene() -> None:
        limits = {"drain_s": 0.3}
        async with net(busy(), Stub(pause_s=0.1, tokens=10_000), limits=limits) as n, ending(n, 1) as stop:
            async with stream(n) as response:
                read = await response.content.readany()
                assert n.stubs[1].begun == 1
                stop.set()
                read += await response.read()
            assert b"the peer broke off" in read.rpartition(b"data: ")[2]
            await asyncio.wait_for(n.running[1], 30)

    play(scene)


def test_what_a_peer_breaks_off_goes_on_elsewhere_where_streams_are_resumed() -> None:
    async def scene() -> None:
        limits = {"drain_s": 0.3}
        async with (
            net(busy(), Stub(pause_s=0.1, tokens=30), limits=limits, resume=True) as n,
            ending(n, 1) as stop,
        ):
            n.stubs[0].tokens = 30
            async with stream(n) as response:
                read = await response.content.readany()
                assert n.stubs[1].begun == 1
                stop.set()
                read += await response.read()
            assert b"error" not in read and read.endswith(b"data: [DONE]\n\n")
            assert [read.count(b'"w%d "' % k) for k in range(30)] == [1] * 30
            assert n.stubs[0].begun == 1
            await asyncio.wait_for(n.running[1], 30)

    play(scene)


async def begun(stub: Stub, count: int) -> bool:
    return stub.begun == count


async def aborted(stub: Stub, count: int) -> bool:
    return stub.aborted == count


async def refused(n: Net) -> bool:
    async with n.session.get(n.urls[0] + "/health") as response:
        return response.status == 503


async def serves_nothing(n: Net) -> bool:
    """Whether the first node has heard that the second takes nothing more."""
    peer = (await n.see(0))["peers"][0]
    return bool(peer["there"] and peer["serves"] == [])
