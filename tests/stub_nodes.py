"""Live nodes before engines that do what a test wants: the real servers, on loopback, in one process."""

import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from wwwserve.serving import config, node
from wwwserve.serving.engine.adapter import NAMES
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.local_nodes import free_ports

MODEL = "stub"
PROFILE = {"kind": "catalogue", "gpu": "rtx-4090", "model": "qwen3-8b", "max_num_seqs": 8}
GOOD = {"name": "n", "key": "n.pem", "engine": {"url": "http://h:1", "profile": PROFILE}}
ZENOH = {"kind": "zenoh", "network": "x", "listen": ["tcp/127.0.0.1:1"]}


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
    heads: list[dict[str, str]] = field(default_factory=list)  # headers of what it was asked, names in lower case
    says: dict[str, str] = field(default_factory=dict)  # headers of its answers
    begun: int = 0
    aborted: int = 0
    others: dict[str, Any] = field(default_factory=dict)
    says_load: bool = True
    made_at: str = ""  # when it made its metrics, as prometheus_client writes it
    models_served: list[str] = field(default_factory=lambda: [MODEL])
    url: str = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.bodies.append(body)
        self.heads.append({name.lower(): value for name, value in request.headers.items()})
        self.begun += 1
        if self.mode == "full":
            return web.json_response({"error": "full"}, status=503)
        if self.mode.isdigit():
            return web.json_response({"error": "no"}, status=int(self.mode), headers={"retry-after": "7"} | self.says)
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
        return web.json_response({"from": self.url, "choices": [], "usage": usage}, headers=self.says)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"} | self.says)
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

    async def other(self, request: web.Request) -> web.StreamResponse:
        """What is in `others` at its path: an answer, or the events of a stream, which breaks off after None."""
        self.bodies.append(await request.read())
        self.heads.append({name.lower(): value for name, value in request.headers.items()})
        said = self.others.get(request.path)
        if said is None:
            return web.Response(status=404, text="404: Not Found")
        self.begun += 1
        if self.mode.isdigit():
            return web.json_response({"error": "no"}, status=int(self.mode), headers={"retry-after": "7"})
        if not isinstance(said, list):
            await asyncio.sleep(self.pause_s)
            return web.json_response(said, headers=self.says)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in said:
            if event is None:
                assert request.transport is not None
                request.transport.abort()
                break
            await response.write(event)
            await asyncio.sleep(self.pause_s)
        return response

    async def event(
        self, response: web.StreamResponse, names: dict[str, str], delta: dict[str, str], reason: str | None = None
    ) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        await response.write(b"data: " + json.dumps(names | {"choices": [choice]}).encode() + b"\n\n")

    async def metrics(self, request: web.Request) -> web.Response:
        if self.mode == "gone":
            return web.Response(status=502)
        if not self.says_load:
            return web.Response(text="")
        lines = (
            f'{name}{{engine="0"}} {value}' for name, value in zip(NAMES["vllm"], (0, self.waiting, 0.0), strict=True)
        )
        made = [f'vllm:prompt_tokens_created{{engine="0"}} {self.made_at}'] if self.made_at else []
        return web.Response(text="\n".join([*lines, *made]))

    async def models(self, request: web.Request) -> web.Response:
        status = 502 if self.mode == "gone" else 200
        return web.json_response({"data": [{"id": name} for name in self.models_served]}, status=status)

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator["Stub"]:
        app = web.Application(handler_args={"handler_cancellation": True})
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/{path:.*}", self.other)
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
    """A network of one node for each stub; `more` goes into the nodes' configurations, what it has of `engine` beside
    the stub's."""
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
            made.configs.append(settings | more | {"engine": settings["engine"] | more.get("engine", {})})
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
    asyncio.run(asyncio.wait_for(scene(), 600.0))


def busy() -> Stub:
    """An engine so full that whoever can goes elsewhere."""
    return Stub(waiting=200)


async def hang_up(n: Net, k: int) -> None:
    """A user of the first node is gone as soon as the k-th engine has the request."""
    asked = asyncio.create_task(n.ask())

    async def begun() -> bool:
        return n.stubs[k].begun == 1

    await n.until(begun)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
