"""The live node before engines that behave and engines that do not: the real servers, on loopback, in one process."""

import asyncio
import contextlib
import itertools
import json
import logging
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web

from wwwserve.agents.knowledge import ADVERT_SIZE
from wwwserve.serving import config, dispatcher, node
from wwwserve.serving.engine import adapter as engine
from wwwserve.serving.engine.adapter import NAMES, EngineError, Sent, read_load
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import Refused
from wwwserve.serving.http.sse import AnswerMeter
from wwwserve.serving.http.upstream import DirectTransport
from wwwserve.serving.local_nodes import free_ports
from wwwserve.serving.market import Promise
from wwwserve.serving.membership.heartbeat import decode

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MODEL = "stub"


@dataclass
class Stub:
    """An engine that does what a test wants."""

    mode: str = "well"
    waiting: int = 0
    tokens: int = 5
    pause_s: float = 0.0
    breaks: int = 99  # of its first answers break off, where that is its mode
    linger_s: float = 0.0  # after the last event of a stream, before its end
    bodies: list[bytes] = field(default_factory=list)
    begun: int = 0
    aborted: int = 0
    says_load: bool = True
    models_served: list[str] = field(default_factory=lambda: [MODEL])
    url: str = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.bodies.append(body)
        self.begun += 1
        if self.mode == "full":
            return web.json_response({"error": "full"}, status=503)
        if self.mode.isdigit():
            return web.json_response({"error": "no"}, status=int(self.mode), headers={"retry-after": "7"})
        if self.mode == "garbage":
            return web.Response(body=b"\x00\xffgarbage", content_type="application/json")
        if self.mode == "hangs up":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        try:
            return await (self.stream(request) if json.loads(body).get("stream") else self.whole())
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise

    async def whole(self) -> web.Response:
        await asyncio.sleep(self.pause_s * self.tokens)
        usage = {"prompt_tokens": 7, "completion_tokens": self.tokens, "total_tokens": 7 + self.tokens}
        return web.json_response({"from": self.url, "choices": [], "usage": usage})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        asked = json.loads(await request.read())
        said = asked["messages"][-1]["content"].count("w") if asked.get("continue_final_message") else 0
        names = {"id": self.url, "object": "chat.completion.chunk", "model": MODEL}
        await self.event(response, names, {"role": "assistant", "content": ""})
        for k in range(said, said + min(self.tokens - said, asked.get("max_tokens", self.tokens))):
            if (
                self.mode in ("breaks off", "ends early", "tells of an error")
                and k == said + 2
                and self.begun <= self.breaks
            ):
                if self.mode == "breaks off":
                    assert request.transport is not None
                    request.transport.abort()
                if self.mode == "tells of an error":
                    await response.write(b'data: {"error": {"message": "the engine is dead"}}\n\n')
                return response
            await self.event(response, names, {"content": f"w{k} "}, None if k < self.tokens - 1 else "stop")
            await asyncio.sleep(self.pause_s)
        if (asked.get("stream_options") or {}).get("include_usage"):
            usage = {
                "prompt_tokens": 7 + said,
                "completion_tokens": self.tokens - said,
                "total_tokens": 7 + self.tokens,
            }
            await response.write(b"data: " + json.dumps(names | {"choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        await asyncio.sleep(self.linger_s)
        return response

    async def event(
        self, response: web.StreamResponse, names: dict[str, str], delta: dict[str, str], reason: str | None = None
    ) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        await response.write(b"data: " + json.dumps(names | {"choices": [choice]}).encode() + b"\n\n")

    async def metrics(self, request: web.Request) -> web.Response:
        if not self.says_load:
            return web.Response(text="")
        lines = (
            f'{name}{{engine="0"}} {value}' for name, value in zip(NAMES["vllm"], (0, self.waiting, 0.0), strict=True)
        )
        return web.Response(text="\n".join(lines))

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.models_served]})

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator["Stub"]:
        app = web.Application(handler_args={"handler_cancellation": True})
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/v1/models", self.models)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
        try:
            yield self
        finally:
            await runner.cleanup()


PROFILE = {"kind": "catalogue", "gpu": "rtx-4090", "model": "qwen3-8b", "max_num_seqs": 8}


class Net:
    """Nodes before stub engines, all each other's peers, and a client."""

    def __init__(self, session: aiohttp.ClientSession, urls: list[str], stubs: list[Stub]) -> None:
        self.session, self.urls, self.stubs = session, urls, stubs
        self.configs: list[dict[str, Any]] = []
        self.keys: list[Identity] = []
        self.running: list[asyncio.Task[None]] = []

    async def start(self, k: int, wall_clock: Callable[[], float] = time.time) -> None:
        """Run node k, for the first time or again."""
        up = asyncio.get_running_loop().create_future()
        ready: Callable[[str, str], None] = lambda key, url: up.set_result(key)  # noqa: E731
        running = asyncio.create_task(node.serve(config.parse(self.configs[k], "test"), ready, wall_clock))
        self.running[k:] = [running, *self.running[k + 1 :]]
        await asyncio.wait({up, running}, return_when=asyncio.FIRST_COMPLETED)
        assert up.done(), running

    async def ask(
        self, k: int = 0, headers: dict[str, str] | None = None, **more: Any
    ) -> tuple[int, bytes, dict[str, str]]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello there"}]} | more
        async with self.session.post(self.urls[k] + "/v1/chat/completions", json=body, headers=headers) as response:
            return response.status, await response.read(), dict(response.headers)

    async def see(self, k: int = 0) -> dict[str, Any]:
        async with self.session.get(self.urls[k] + "/network") as response:
            seen: dict[str, Any] = await response.json()
            return seen

    async def until(self, what: Callable[[], Awaitable[bool]], for_s: float = 60.0) -> None:
        for _ in range(round(for_s / 0.02)):
            if await what():
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"not within {for_s} s")


@contextlib.asynccontextmanager
async def net(*stubs: Stub, **more: Any) -> AsyncIterator[Net]:
    """A network of one node for each stub; `more` goes into the nodes' configurations."""
    async with contextlib.AsyncExitStack() as stack:
        for stub in stubs:
            await stack.enter_async_context(stub.served())
        ports = free_ports(len(stubs))
        scheme = "https" if "tls" in more else "http"
        urls = [f"{scheme}://127.0.0.1:{port}" for port in ports]
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl="tls" not in more))
        )
        made = Net(session, urls, list(stubs))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for k in range(len(stubs)):
            made.keys.append(Identity.generate())
            made.keys[k].save(folder / f"n{k}.pem")
        for k, stub in enumerate(stubs):
            peers = [{"key": made.keys[i].name, "url": url} for i, url in enumerate(urls) if i != k]
            settings = {
                "name": f"n{k}", "key": str(folder / f"n{k}.pem"), "port": ports[k],
                "policy": "earliest_finish", "peers": peers,
                "engine": {"url": stub.url, "profile": PROFILE, "timeout_s": 2.0},
                "market": {"tick_s": 0.1, "gossip_s": 0.2},
            }  # fmt: skip
            made.configs.append(settings | more)
            await made.start(k)
        try:
            for k in range(len(stubs)):

                async def all_there(k: int = k) -> bool:
                    seen = await made.see(k)
                    return bool(seen["engine"]["up"]) and sum(p["there"] for p in seen["peers"]) == len(stubs) - 1

                await made.until(all_there)
            yield made
        finally:
            for task in made.running:
                task.cancel()
            await asyncio.gather(*made.running, return_exceptions=True)


def play(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 180.0))


def busy() -> Stub:
    """An engine so full that whoever can goes elsewhere."""
    return Stub(waiting=200)


# One node.


def test_a_body_goes_to_the_engine_as_it_is_and_its_answer_comes_back_as_it_is() -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            body = b'{"model":"stub", "messages":[], "unheard_of": {"a":[1,2]} ,"seed":18446744073709551615}'
            async with n.session.post(n.urls[0] + "/v1/chat/completions", data=body) as response:
                answer = await response.read()
                assert response.status == 200 and response.content_type == "application/json"
            assert n.stubs[0].bodies == [body]
            assert json.loads(answer)["usage"]["completion_tokens"] == 5
            async with n.session.get(n.urls[0] + "/v1/models") as response:
                assert [each["id"] for each in (await response.json())["data"]] == [MODEL]

    play(scene)


def test_a_stream_comes_chunk_by_chunk() -> None:
    async def scene() -> None:
        async with net(Stub(pause_s=0.1)) as n:
            body = {"model": MODEL, "messages": [], "stream": True}
            loop, times, parts = asyncio.get_running_loop(), [], []
            async with n.session.post(n.urls[0] + "/v1/chat/completions", json=body) as response:
                assert response.content_type == "text/event-stream"
                async for chunk in response.content.iter_any():
                    times.append(loop.time())
                    parts.append(chunk)
            assert b"".join(parts).count(b"data:") == 7 and b"".join(parts).endswith(b"data: [DONE]\n\n")
            assert times[-1] - times[0] > 0.3

    play(scene)


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"[1]", {}, 400, "is a list, expected an object"),
        (b"{}", {}, 400, "model is missing"),
        (b'{"model": "other"}', {}, 404, "no model 'other'"),
        (b'{"model": "stub", "stream": 3}', {}, 400, "stream is not"),
        (b'{"model": "stub"}', {"x-slo-class": "gold"}, 400, "expected one of default"),
        (b'{"model": "stub", "pad": "' + b"x" * 3000 + b'"}', {}, 413, "larger than 2000 bytes"),
        (b'{"model": "stub"}', {"x-pad": "y" * 3000}, 431, "headers are too large"),
        (b'{"model": "stub"}', {"authorization": "Bearer wrong"}, 401, "API key is not known"),
        (b'{"model": "stub"}', {"authorization": ""}, 401, "API key is not known"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_the_reason(
    body: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    async def scene() -> None:
        async with net(Stub(), keys=["good"], limits={"body_bytes": 2000, "header_bytes": 2000}) as n:
            sent = {"authorization": "Bearer good"} | headers
            async with n.session.post(n.urls[0] + "/v1/chat/completions", data=body, headers=sent) as response:
                assert response.status == status
                assert message in (await response.json())["error"]["message"]
            assert n.stubs[0].bodies == []
            assert (await n.ask(headers={"authorization": "Bearer good"}))[0] == 200

    play(scene)


def test_beyond_the_bound_of_its_queue_a_node_says_when_to_come_again() -> None:
    async def scene() -> None:
        async with net(Stub(mode="full"), limits={"held": 3}, market={"tick_s": 5.0}) as n:
            first = [asyncio.create_task(n.ask()) for _ in range(3)]

            async def all_held() -> bool:
                return bool((await n.see())["held"] == 3)

            await n.until(all_held)
            status, _, headers = await n.ask()
            assert (status, headers["Retry-After"]) == (503, "1")
            n.stubs[0].mode = "well"
            assert [each[0] for each in await asyncio.gather(*first)] == [200] * 3
            totals = (await n.see())["requests"]
            assert (totals["accepted"], totals["answered"], totals["turned_away"]) == (3, 3, 1)

    play(scene)


def test_what_is_held_goes_by_deadline_and_is_held_no_longer_than_that() -> None:
    output = {"median": 5.0, "sigma": 0.1, "max": 20}
    classes = {
        name: {"deadline_s": deadline_s, "value": 1.0, "output": output}
        for name, deadline_s in (("batch", 60.0), ("chat", 30.0), ("now", 0.5))
    }

    async def scene() -> None:
        async with net(Stub(mode="full"), classes=classes) as n:

            async def ask(klass: str) -> tuple[str, int, float, dict[str, str]]:
                start_s = time.monotonic()
                status, _, headers = await n.ask(headers={"x-slo-class": klass})
                return klass, status, time.monotonic() - start_s, headers

            late = [asyncio.create_task(ask(klass)) for klass in ("batch", "chat")]
            _, status, took_s, headers = await ask("now")
            assert (status, headers["Retry-After"]) == (503, "1") and took_s >= 0.5
            assert (await n.see())["held"] == 2 and not any(task.done() for task in late)
            n.stubs[0].mode = "well"
            assert [each[1] for each in await asyncio.gather(*late)] == [200, 200]
            decided = "".join(each["class"][0] for each in (await n.see())["decisions"])
            assert "ncb" in decided  # when all three were held, by their deadlines
            totals = (await n.see())["requests"]
            assert (totals["answered"], totals["failed"], totals["on_time"]) == (2, 1, 2)

    play(scene)


@pytest.mark.parametrize("mode", ["garbage", "hangs up"])
def test_an_engine_that_fails_ends_a_request_with_an_error(mode: str) -> None:
    async def scene() -> None:
        async with net(Stub(mode=mode)) as n:
            status, body, _ = await n.ask()
            assert status == 502 and "does not answer as it should" in json.loads(body)["error"]["message"]
            assert (await n.see())["requests"]["failed"] == 1

    play(scene)


@pytest.mark.parametrize(("code", "status"), [(500, 502), (502, 502), (429, 429), (503, 503), (400, 400)])
def test_what_an_engine_answers_reaches_the_user_where_nobody_else_can_serve(code: int, status: int) -> None:
    async def scene() -> None:
        async with net(Stub(mode=str(code)), deadlines_s=[1.0]) as n:
            found, _, headers = await n.ask()
            assert found == status
            assert headers.get("Retry-After") == ("7" if code in (429, 503) else None)
            totals = (await n.see())["requests"]
            assert (totals["answered"], totals["failed"]) == ((1, 0) if code == 400 else (0, 1))
            assert n.stubs[0].begun == {500: 3, 502: 3, 400: 1}.get(code, n.stubs[0].begun)

    play(scene)


@pytest.mark.parametrize("code", [500, 502, 429, 503])
@pytest.mark.parametrize("policy", ["earliest_finish", None])
def test_what_an_idle_engine_turns_away_goes_to_a_peer_at_once(code: int, policy: str | None) -> None:
    async def scene() -> None:
        async with net(Stub(mode=str(code)), Stub(), policy=policy) as n:
            begun_s = time.monotonic()
            answers = await asyncio.gather(*(n.ask() for _ in range(4)))
            assert [status for status, _, _ in answers] == [200] * 4
            assert time.monotonic() - begun_s < 10.0  # far from the last deadline, 120 s
            assert n.stubs[1].begun == 4

    play(scene)


@pytest.mark.parametrize("different", [False, True])
def test_an_engine_is_suspected_once_it_fails_requests_of_different_content(
    different: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that makes an engine fail does not take its node off the network, however often it comes."""
    reasons: list[str] = []
    suspect = engine.Engine.suspect
    monkeypatch.setattr(engine.Engine, "suspect", lambda e, reason: (reasons.append(reason), suspect(e, reason)))

    async def scene() -> None:
        async with net(Stub(mode="500"), Stub()) as n:
            for k in range(3):
                text = f"number {k * different}"
                assert (await n.ask(messages=[{"role": "user", "content": text}]))[0] == 200
            assert n.stubs[1].begun == 3 and n.stubs[0].begun >= 2
            assert set(reasons) == ({"it answers 500"} if different else set())
            n.stubs[0].mode = "well"
            await n.until(lambda: up(n))
            status, body, _ = await n.ask()
            assert status == 200 and json.loads(body)["from"] == n.stubs[0].url

    async def up(n: Net) -> bool:
        return bool((await n.see())["engine"]["up"])

    play(scene)


def test_an_engine_that_never_answers_is_given_up() -> None:
    async def scene() -> None:
        stub = Stub(pause_s=100.0)
        async with net(stub) as n:
            status, _, _ = await n.ask()
            assert status == 502
            assert stub.begun >= 1

    play(scene)


async def hang_up(n: Net, k: int) -> None:
    """A user of the first node is gone as soon as the k-th engine has the request."""
    asked = asyncio.create_task(n.ask())

    async def begun() -> bool:
        return n.stubs[k].begun == 1

    await n.until(begun)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)


def test_a_user_who_hangs_up_stops_the_work() -> None:
    async def scene() -> None:
        async with net(Stub(pause_s=60.0)) as n:
            await hang_up(n, 0)

            async def stopped() -> bool:
                return n.stubs[0].aborted == 1 and (await n.see())["requests"]["cancelled"] == 1

            await n.until(stopped)

    play(scene)


# Several nodes.


def test_overflow_goes_to_a_peer_and_comes_back_whole() -> None:
    async def scene() -> None:
        async with net(busy(), Stub()) as n:
            status, body, _ = await n.ask()
            assert status == 200 and json.loads(body)["from"] == n.stubs[1].url
            status, body, _ = await n.ask(stream=True)
            assert status == 200 and body.count(b"data:") == 7 and n.stubs[1].url.encode() in body
            seen = await n.see()
            assert seen["requests"]["handed_over"] == 2 and n.stubs[0].begun == 0
            async with n.session.get(n.urls[1] + "/metrics") as response:
                page = await response.text()
            assert 'wwwserve_remote_ended_total{outcome="answered"} 2.0' in page
            async with n.session.get(n.urls[0] + "/metrics") as response:
                assert 'wwwserve_requests_ended_total{outcome="answered",where="peer"} 2.0' in await response.text()

    play(scene)


@pytest.mark.parametrize("where", ["local", "peer"])
def test_a_user_who_hangs_up_at_the_last_event_has_been_answered(where: str) -> None:
    async def scene() -> None:
        slow = Stub(linger_s=1.0)
        async with net(*([slow] if where == "local" else [busy(), slow])) as n:
            body = {"model": MODEL, "messages": [], "stream": True}
            async with n.session.post(n.urls[0] + "/v1/chat/completions", json=body) as response:
                async for line in response.content:
                    if line == b"data: [DONE]\n":
                        break
            ended = f'wwwserve_requests_ended_total{{outcome="answered",where="{where}"}} 1.0'

            async def counted() -> bool:
                async with n.session.get(n.urls[0] + "/metrics") as response:
                    return ended in await response.text()

            await n.until(counted, 0.8)
            if where == "peer":
                async with n.session.get(n.urls[1] + "/metrics") as response:
                    assert 'wwwserve_remote_ended_total{outcome="answered"} 1.0' in await response.text()

    play(scene)


@pytest.mark.parametrize(
    ("mode", "stream"),
    [("full", False), ("full", True), ("garbage", False), ("hangs up", False), ("hangs up", True)],
)
def test_a_peer_that_fails_before_the_first_token_is_replaced(mode: str, stream: bool) -> None:
    async def scene() -> None:
        async with net(busy(), Stub(mode=mode), Stub(waiting=20)) as n:
            status, body, _ = await n.ask(stream=stream)
            assert status == 200 and b"error" not in body
            # A kept connection to an engine that hangs up is asked once more on another; whether it was kept is open.
            assert (
                n.stubs[1].begun in ((1, 2) if mode == "hangs up" else (1,))
                and n.stubs[0].begun + n.stubs[2].begun == 1
            )

    play(scene)


def test_a_peer_cannot_send_a_request_elsewhere() -> None:
    """It answers with a redirect, which is not followed."""

    async def scene() -> None:
        async with net(busy(), Stub(), Stub(waiting=500)) as n:
            n.running[1].cancel()
            await asyncio.gather(n.running[1], return_exceptions=True)
            inner: list[str] = []

            async def redirect(request: web.Request) -> web.Response:
                await request.read()
                if request.path.startswith("/peer/v1"):
                    return web.Response(status=307, headers={"location": f"{n.urls[1]}/inner"})
                inner.extend([request.path] if request.path == "/inner" else [])
                return web.Response(status=204)

            app = web.Application()
            app.router.add_route("*", "/{tail:.*}", redirect)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", int(n.urls[1].rpartition(":")[2])).start()
            try:
                assert (await n.ask())[0] == 200
            finally:
                await runner.cleanup()
            assert not inner

    play(scene)


def test_a_peer_that_fails_later_ends_the_stream_with_an_error_and_no_replay() -> None:
    async def scene() -> None:
        async with net(busy(), Stub(mode="breaks off", pause_s=0.05), Stub(waiting=20)) as n:
            status, body, _ = await n.ask(stream=True)
            events = [line for line in body.decode().splitlines() if line]
            texts = [json.loads(each[6:])["choices"][0]["delta"]["content"] for each in events[:3]]
            assert status == 200 and texts == ["", "w0 ", "w1 "]
            assert "broke off" in json.loads(events[-1][6:])["error"]["message"]
            assert len(events) == 4 and n.stubs[2].begun == 0
            assert (await n.see())["requests"]["failed"] == 1

    play(scene)


def told_by(body: bytes) -> tuple[list[dict[str, Any]], str]:
    """Events of a stream but for the last, and the text that they make."""
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], events
    chunks = [json.loads(event[6:]) for event in events[:-2]]
    return chunks, "".join(choice["delta"].get("content", "") for event in chunks for choice in event["choices"])


@pytest.mark.parametrize("mode", ["breaks off", "ends early", "tells of an error"])
@pytest.mark.parametrize("where", ["local", "peer"])
def test_a_stream_that_breaks_off_goes_on_elsewhere_if_the_node_is_to_resume(mode: str, where: str) -> None:
    async def scene() -> None:
        broken = Stub(mode=mode, breaks=1, pause_s=0.05)
        stubs = [broken, Stub(waiting=20)] if where == "local" else [busy(), broken, Stub(waiting=20)]
        async with net(*stubs, resume=True) as n:
            status, body, _ = await n.ask(
                stream=True, max_tokens=5, min_tokens=4, stream_options={"include_usage": True}
            )
            events, text = told_by(body)
            assert status == 200 and text == "w0 w1 w2 w3 w4 "
            assert {(event["id"], event["object"]) for event in events} == {(broken.url, "chat.completion.chunk")}
            assert sum("role" in choice["delta"] for event in events for choice in event["choices"]) == 1
            assert events[-1]["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
            asked = [json.loads(each) for stub in n.stubs for each in stub.bodies]
            [rest] = [each for each in asked if "continue_final_message" in each]
            assert len(asked) == 2 and broken.begun >= 1
            assert rest["messages"][-1] == {"role": "assistant", "content": "w0 w1 "}
            assert rest["continue_final_message"] is True and rest["add_generation_prompt"] is False
            assert (rest["max_tokens"], rest["min_tokens"]) == (3, 2)
            assert (await n.see())["requests"]["answered"] == 1

    play(scene)


def test_a_stream_that_nobody_can_finish_ends_with_an_error() -> None:
    async def scene() -> None:
        async with net(Stub(mode="breaks off", tokens=50), resume=True) as n:
            _, body, _ = await n.ask(stream=True)
            last = json.loads(body.decode().strip().splitlines()[-1][6:])
            assert "does not answer as it should" in last["error"]["message"]
            assert body.count(b"w0 ") == body.count(b"w5 ") == 1 and n.stubs[0].begun == 3

    play(scene)


@pytest.mark.parametrize("more", [{"n": 2}, {"tools": [{}]}, {"response_format": {"type": "json_object"}}])
def test_what_cannot_be_resumed_is_not(more: dict[str, Any]) -> None:
    async def scene() -> None:
        async with net(Stub(mode="breaks off"), Stub(waiting=20), resume=True) as n:
            _, body, _ = await n.ask(stream=True, **more)
            assert b"broke off" in body and n.stubs[0].begun == 1 and n.stubs[1].begun == 0

    play(scene)


def test_a_user_who_hangs_up_stops_the_work_at_a_peer() -> None:
    async def scene() -> None:
        async with net(busy(), Stub(pause_s=60.0)) as n:
            await hang_up(n, 1)

            async def stopped() -> bool:
                return n.stubs[1].aborted == 1 and (await n.see(1))["remote"] == 0

            await n.until(stopped)

    play(scene)


def test_a_peer_that_leaves_gets_nothing_more_and_one_that_comes_back_does() -> None:
    async def scene() -> None:
        async with net(busy(), Stub()) as n:
            n.running[1].cancel()
            await asyncio.gather(n.running[1], return_exceptions=True)

            async def gone() -> bool:
                return not (await n.see())["peers"][0]["there"]

            await n.until(gone)
            n.stubs[0].waiting = 0
            assert json.loads((await n.ask())[1])["from"] == n.stubs[0].url

    play(scene)


async def loaded(n: Net, users: Sequence[int], per_s: float, more: Callable[[int], bool]) -> list[Counter[str]]:
    """Ask the nodes `users` in turn, while there are to be `more` than so many requests, every second time for a
    stream; what clients saw of each."""
    seen = [Counter[str]() for _ in n.urls]

    async def one(k: int) -> None:
        stream = k // len(users) % 2 == 0
        status, body, _ = await n.ask(users[k % len(users)], stream=stream)
        text = body.decode()
        whole = text.endswith("data: [DONE]\n\n") if stream else '"usage"' in text
        if status == 200 and whole:
            outcome = "answered"
        else:  # told what went wrong, in JSON of its own or as the last event
            assert json.loads(text.strip().splitlines()[-1].removeprefix("data: "))["error"]["message"]
            outcome = "failed"
        seen[users[k % len(users)]][outcome] += 1

    async with asyncio.TaskGroup() as group:
        for k in itertools.takewhile(more, itertools.count()):
            group.create_task(one(k))
            await asyncio.sleep(1.0 / per_s)
    return seen


async def check_counts(n: Net, seen: list[Counter[str]]) -> None:
    """What `/metrics` counts is what clients saw."""
    for k, counts in enumerate(seen):
        if not counts:
            continue
        async with n.session.get(n.urls[k] + "/metrics") as response:
            page = await response.text()
        ended: Counter[str] = Counter()
        for outcome, value in re.findall(r'^wwwserve_requests_ended_total{outcome="(\w+)",.*} (\S+)$', page, re.M):
            ended[outcome] += int(float(value))
        assert ended == counts
        assert f"wwwserve_requests_accepted_total {float(counts.total())}" in page


@pytest.mark.parametrize("stub", [Stub(mode="garbage"), Stub(pause_s=60.0), Stub(mode="breaks off", pause_s=0.02)])
def test_every_request_ends_once_whatever_an_engine_does(stub: Stub) -> None:
    """One of five engines, which has users of its own and those of others."""

    async def scene() -> None:
        broken = replace(stub, bodies=[])
        async with net(*(Stub(pause_s=0.02, waiting=2) for _ in range(4)), broken) as n:
            seen = await loaded(n, [0, 1, 4], 60.0, lambda k: k < 180)
            assert broken.begun > 5
            assert sum(counts["answered"] for counts in seen) > 100
            await check_counts(n, seen)

    play(scene)


def test_every_request_ends_once_while_a_node_leaves_and_another_joins() -> None:
    async def scene() -> None:
        async with net(busy(), busy(), Stub(pause_s=0.02), Stub(pause_s=0.02), Stub(pause_s=0.02)) as n:
            enough = asyncio.Event()
            loading = asyncio.create_task(loaded(n, [0, 1], 60.0, lambda k: not enough.is_set()))

            async def begun() -> bool:
                return n.stubs[4].begun > 5

            await n.until(begun)
            n.running[4].cancel()
            await asyncio.gather(n.running[4], return_exceptions=True)
            left = n.stubs[4].begun

            async def there(wanted: bool) -> bool:
                seen = [await n.see(k) for k in (0, 1)]
                return all({p["key"]: p["there"] for p in each["peers"]}[n.keys[4].name] is wanted for each in seen)

            await n.until(lambda: there(False))
            assert n.stubs[4].begun == left
            await n.start(4)
            await n.until(lambda: there(True))

            async def begun_again() -> bool:
                return n.stubs[4].begun > left

            await n.until(begun_again)
            enough.set()
            seen = await loading
            assert sum(counts["failed"] for counts in seen) <= 0.02 * sum(counts.total() for counts in seen)
            await check_counts(n, seen)

    play(scene)


def test_logs_are_lines_of_json_without_prompts_answers_or_keys(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    key, engine_key, prompt = "sk-of-a-user", "sk-of-an-engine", "a prompt to be kept secret"
    sent: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "stream": True}

    async def scene() -> None:
        stubs = Stub(mode="breaks off"), Stub()
        async with net(*stubs, keys=[key], resume=True) as n:
            n.configs[0]["engine"]["key"] = engine_key
            n.running[0].cancel()
            await asyncio.gather(n.running[0], return_exceptions=True)
            await n.start(0)
            allowed = {"authorization": f"Bearer {key}"}
            for mode in ("breaks off", "tells of an error", "garbage", "hangs up", "well"):
                n.stubs[0].mode = mode
                await n.ask(headers=allowed, **sent)
                await n.ask(headers={"authorization": f"Bearer {key}?"}, **sent)

            async def fail(*_: Any) -> None:
                raise RuntimeError("inside")

            monkeypatch.setattr(dispatcher.Dispatcher, "answer", fail)
            assert (await n.ask(headers=allowed, **sent))[0] == 500

    play(scene)
    lines = [node.JsonLines().format(record) for record in caplog.records]
    logged = [json.loads(line) for line in lines]
    assert all({"at", "level", "logger", "message"} <= line.keys() for line in logged)
    assert {"ready", "a peer is there", "given back", "a request met an error"} <= {line["message"] for line in logged}
    page = "\n".join(lines)
    for secret in (key, engine_key, prompt, "w0 "):
        assert secret not in page


def test_strangers_and_nonsense_are_no_peers() -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            for body in (b"", b"{}", b"\xff", json.dumps({"name": "x" * 200}).encode()):
                async with n.session.post(n.urls[0] + "/peer/beat", data=body) as response:
                    assert response.status == 403
            async with n.session.post(n.urls[0] + "/peer/v1/chat/completions", data=b'{"model": "stub"}') as response:
                assert response.status == 403
                assert (await response.json())["error"]["type"] == "unsigned"
            page = await (await n.session.get(n.urls[0] + "/metrics")).text()
            assert 'wwwserve_messages_refused_total{kind="unsigned"} 1.0' in page
            assert 'wwwserve_messages_refused_total{kind="malformed"} 3.0' in page

    play(scene)
    with pytest.raises(Refused, match=f"load has 1 numbers, expected {ADVERT_SIZE}"):
        decode(b'{"name":"a","label":"","url":"u","serves":[],"run":1,"number":1,"load":[1.0],"age_s":0}')


def test_a_node_that_zenoh_tells_of_its_peers_takes_no_beats() -> None:
    async def scene() -> None:
        listen = f"tcp/127.0.0.1:{free_ports(1)[0]}"
        async with (
            net(Stub(), membership=ZENOH | {"listen": [listen]}) as n,
            n.session.post(n.urls[0] + "/peer/beat", data=b"{}") as response,
        ):
            assert response.status == 403
            assert "no beats are sent to it" in (await response.json())["error"]["message"]

    play(scene)


# Loads and configurations.

VLLM_PAGE = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
"""
# Recorded; each file says how.
SGLANG_PAGES = {
    kind: Path(__file__).with_name("sglang").joinpath(f"0.5.23-{kind}.txt").read_text(encoding="utf-8")
    for kind in ("data-parallel", "priority")
}


def test_loads_are_summed_and_the_fullest_cache_counts() -> None:
    assert read_load(VLLM_PAGE, NAMES["vllm"], 1000)[:3] == (5.0, 4.0, 500.0)
    assert read_load(SGLANG_PAGES["data-parallel"], NAMES["sglang"], 1000)[:3] == (12.0, 4.0, 410.0)
    assert read_load(SGLANG_PAGES["priority"], NAMES["sglang"], 1000)[:3] == (12.0, 4.0, 280.0)
    assert read_load("vllm:num_requests_running 1\nvllm:num_requests_waiting 2 1700\nvllm:kv_cache_usage_perc 0.1",
                     NAMES["vllm"], 100)[:3] == (1.0, 2.0, 10.0)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "page", "name"),
    [("vllm", VLLM_PAGE, name) for name in NAMES["vllm"]]
    + [("sglang", page, name) for page in SGLANG_PAGES.values() for name in NAMES["sglang"]],
)
def test_a_missing_metric_is_named(kind: str, page: str, name: str) -> None:
    without = "\n".join(line for line in page.splitlines() if not line.startswith(f"{name}{{"))
    with pytest.raises(EngineError, match=f"no metric {name}"):
        read_load(without, NAMES[kind], 1000)
    with pytest.raises(EngineError, match=f"metric {name} has no number"):
        read_load(re.sub(rf"^({name}{{.*}}) .*$", r"\1 many", page, flags=re.MULTILINE), NAMES[kind], 1000)


@pytest.mark.parametrize("value", ["NaN", "-1", "inf", "1e300"])
def test_a_load_that_cannot_be_is_none(value: str) -> None:
    page = f"vllm:num_requests_running {value}\nvllm:num_requests_waiting 2\nvllm:kv_cache_usage_perc 0.1"
    with pytest.raises(EngineError, match=r"num_requests_running is .*, expected 0 to"):
        read_load(page, NAMES["vllm"], 100)


def test_an_engine_of_an_earlier_version_is_read_as_well() -> None:
    old = VLLM_PAGE.replace("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
    assert read_load(old, NAMES["vllm"], 1000) == read_load(VLLM_PAGE, NAMES["vllm"], 1000)


def test_an_engine_that_does_not_say_its_load_is_used_and_what_it_was_sent_is_counted() -> None:
    async def scene() -> None:
        async with net(Stub(says_load=False)) as n:
            started_s = time.monotonic()
            assert (await n.ask())[0] == 200 and time.monotonic() - started_s < 30
            seen = (await n.see())["engine"]
            assert seen["up"] and "no metric vllm:num_requests_running" in seen["reason"]
            parsed = config.parse(n.configs[0], "t")
            e = engine.Engine("vllm", n.stubs[0].url, parsed.engine_profile(), DirectTransport())
            await e.scrape()
            for _ in range(10):
                e.sent(100)
            await e.scrape()  # what is there by count is there still
            assert e.load()[:3] == (8.0, 2.0, 1120.0)
            for _ in range(10):
                e.returned(100, 20)
            assert e.load()[:3] == (0.0, 0.0, 0.0)
            n.stubs[0].says_load = True
            await e.scrape()
            assert e.reason == "" and e.load()[:3] == (0.0, 0.0, 0.0)

    play(scene)


def test_before_its_engine_is_there_a_node_says_to_come_again() -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            n.running[0].cancel()
            await asyncio.gather(n.running[0], return_exceptions=True)
            n.configs[0]["engine"] |= {"url": f"http://127.0.0.1:{free_ports(1)[0]}"}
            await n.start(0)
            status, _, headers = await n.ask()
            assert (status, headers["Retry-After"]) == (503, "1")

    play(scene)


def test_models_that_an_engine_comes_to_serve_are_served_and_peers_hear_of_them() -> None:
    async def scene() -> None:
        async with net(Stub(), Stub()) as n:
            n.stubs[1].models_served = ["newer", MODEL]

            async def served() -> bool:
                return (await n.see(1))["serves"] == ["newer", MODEL]

            await n.until(served)
            assert (await n.ask(1, model="newer"))[0] == 200 and (await n.ask(0, model="newer"))[0] == 404
            n.stubs[1].models_served = ["newer"]
            await n.until(lambda: heard(n))
            assert (await n.ask(1))[0] == 404

    async def heard(n: Net) -> bool:
        return bool((await n.see(0))["peers"][0]["serves"] == ["newer"])

    play(scene)


def test_what_was_sent_since_the_scrape_is_counted() -> None:
    async def scene() -> None:
        async with Stub(waiting=0).served() as stub:
            profile = config.parse(
                {"name": "n", "key": "n.pem", "engine": {"url": stub.url, "profile": PROFILE}}, "t"
            ).engine_profile()
            e = engine.Engine("vllm", stub.url, profile, DirectTransport())
            assert not e.healthy and e.load().waiting > 100
            await e.scrape()
            assert e.healthy and e.load()[:3] == (0.0, 0.0, 0.0)
            for _ in range(10):
                e.sent(100)
            assert e.load()[:3] == (8.0, 2.0, 1120.0)
            e.returned(100, 20)
            assert e.load()[:3] == (8.0, 1.0, 1120.0 - 128.0)
            await e.scrape()
            assert e.load()[:3] == (0.0, 0.0, 0.0)

    play(scene)


def test_what_runs_is_all_but_the_last_of_those_without_a_token_as_many_as_wait() -> None:
    async def scene() -> None:
        async with Stub(waiting=3).served() as stub:
            profile = config.parse(
                {"name": "n", "key": "n.pem", "engine": {"url": stub.url, "profile": PROFILE}}, "t"
            ).engine_profile()
            e = engine.Engine("vllm", stub.url, profile, DirectTransport())
            await e.scrape()
            there = []
            for k in range(5):
                sent = Sent(k, True, k != 4, AnswerMeter(), 0.0, Promise(1.0, 0.5), e.post("/v1/completions", b""))
                there.append(sent)
            for k, words in ((0, 3), (3, 1)):
                for _ in range(words):
                    there[k].meter.feed(b'data: {"choices": [{"text": "w "}]}\n\n')
            found = [(sent.request, tokens) for sent, tokens in e.progress(there, 2.0)]
            assert found == [(0, 3.0), (3, 1.0), (4, 2.0)]  # the last is not streamed: 1 s beyond its first token
            assert [sent.request for sent, _ in e.progress(there, 0.5)] == [0, 1, 3]

    play(scene)


def test_a_file_is_read_as_it_is_meant(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    whole = yaml.safe_dump(GOOD)
    file.write_text(whole + "stake: 1e-3\n")
    assert config.load(file).stake == 0.001
    for more, message in (("name: again\n", "key 'name' twice"), ("port: !!int x\n", "not YAML"), ("a: [", "not YAML")):
        file.write_text(whole + more)
        with pytest.raises(config.ConfigError, match=f"node.yaml: .*{message}"):
            config.load(file)


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs/node.md").read_text()
    inner = {
        "engine": config.EngineConfig, "market": config.MarketConfig, "limits": config.LimitsConfig,
        "membership": config.ZenohConfig, "membership.tls": config.TlsConfig,
    }  # fmt: skip
    names = set(config.NodeConfig.__struct_fields__)
    names |= {f"{part}.{name}" for part, struct in inner.items() for name in struct.__struct_fields__}
    names = names - set(inner) | {"membership.kind"}
    assert {name for name in names if f"`{name}`" not in page} == set()
    shown = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    assert config.parse(shown, "docs").peers[0].url == "http://10.0.0.2:9000"
    shown = yaml.safe_load(page.split("```yaml\n")[2].partition("```")[0])
    assert config.parse(GOOD | shown, "docs").membership.network == "campus"  # type: ignore[union-attr]


GOOD = {"name": "n", "key": "n.pem", "engine": {"url": "http://h:1", "profile": PROFILE}}
ZENOH = {"kind": "zenoh", "network": "x", "listen": ["tcp/127.0.0.1:1"]}
KEY = Identity.generate().name
TLS = {"ca": __file__, "certificate": __file__, "key": "no.key"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "x"}, "unknown field `nam`"),
        ({"port": "x"}, r"Expected `int`, got `str` - at `\$.port`"),
        ({"port": 70000}, "port must be 0 to 65535, got 70000"),
        ({"deadlines_s": [5, 3]}, "deadlines_s must be"),
        ({"engine": {"url": "h:1", "profile": PROFILE}}, "every url must be http"),
        ({"engine": {"url": "http://h:1", "profile": PROFILE | {"gpu": "abacus"}}}, "abacus"),
        ({"engine": {"url": "http://h:1", "kind": "llm", "profile": PROFILE}}, r"at `\$.engine.kind`"),
        ({"key": ""}, "key must be a file"),
        ({"name": "x" * 65}, "name must be 1 to 64"),
        ({"peers": [{"key": KEY, "url": "http://h:2"}] * 2}, "peers must be of different keys"),
        ({"peers": [{"key": "north", "url": "http://h:2"}]}, "every peer's key must be a public key, got 'north'"),
        ({"classes": {str(k): {"deadline_s": 5} for k in range(5)}}, "at most 4, got 5"),
        ({"market": {"payment": "barter"}}, r"'barter' - at `\$.market.payment`"),
        ({"market": {"prices": [1.0]}}, "unknown field `prices`"),
        ({"compute_cost_per_ktok": -1.0}, "compute_cost_per_ktok must be 0 to 1,000 credits, got -1"),
        ({"policy": "nosuch"}, r"policy must be competitive, cooperative, a rule \(single, .*\) or the folder of a"),
        ({"stake": math.inf}, "stake must be finite, got inf"),
        ({"deadlines_s": [1.0, math.nan]}, "deadlines_s.1 must be finite, got nan"),
        ({"credit": -1.0}, "credit must be 0 to 1,000,000,000 credits, got -1"),
        ({"stake": 1e300}, r"stake must be 0 to 1,000,000,000 credits, got 1e\+300"),
        ({"limits": {"body_bytes": -1}}, "limits.body_bytes must be above 0, got -1"),
        ({"engine": {"url": "http://h:1", "profile": PROFILE | {"max_num_seqs": 10**9}}}, "max_num_seqs must be 1 to"),
        ({"membership": {"kind": "rumour"}}, r"at `\$.membership.kind`"),
        ({"membership": {"kind": "static", "network": "x"}}, "unknown field `network`"),
        ({"membership": {"kind": "zenoh", "network": "x"}}, "missing required field `listen`"),
        ({"membership": ZENOH | {"network": ""}}, "membership.network must be some printable"),
        ({"membership": ZENOH | {"listen": []}}, "membership.listen must be at least one tcp/HOST:PORT"),
        ({"membership": ZENOH | {"connect": ["h:7447"]}}, r"membership.connect must be .* got \('h:7447',\)"),
        ({"membership": ZENOH | {"tls": TLS}}, "membership.listen must be at least one tls/HOST:PORT"),
        (
            {"membership": ZENOH | {"listen": ["tls/h:1"], "tls": TLS}},
            "membership.tls.key must be a file, got 'no.key'",
        ),
        ({"membership": ZENOH, "peers": [{"key": KEY, "url": "http://h:2"}]}, "peers must be left out"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_field(change: dict[str, Any], message: str) -> None:
    for policy in ("cooperative", "competitive", "earliest_finish"):
        assert config.parse(GOOD | {"policy": policy}, "node.yaml").policy == policy
    assert config.parse(GOOD, "node.yaml").port == 9000
    with pytest.raises(config.ConfigError, match=f"node.yaml: .*{message}"):
        config.parse(GOOD | change, "node.yaml")
