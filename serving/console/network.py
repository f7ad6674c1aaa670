"""The console of a network on this machine: what each of its nodes says of itself, on one page."""

import asyncio
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp
import orjson

from wwwserve.serving.config import LimitsConfig
from wwwserve.serving.console.app import Console
from wwwserve.serving.http.asgi import Receive, Scope, Send, check_host, expect, fail
from wwwserve.serving.http.reply import Failed
from wwwserve.serving.http.server import server_of

PORT = 9100  # where it listens, if that is free
CONNECTIONS = 64
PATIENCE_S = 1.0  # for a node to answer
MOST_ASKED = 32  # nodes a second; of more, each is asked less often
OF_NODE = ("name", "key", "policy", "serves", "held", "remote", "tariff", "markup", "margin", "speed", "requests")
OF_OTHER = ("key", "label", "url", "reason")  # peers of other versions
MOST_OTHERS = 16  # of one node that are shown
OF_PEER = ("key", "there", "out", "handed", "answered", "served")


class NetworkSource:
    """Of the nodes at `urls`."""

    page = "network.html"

    def __init__(self, urls: Sequence[str], session: aiohttp.ClientSession) -> None:
        self.urls, self._session = urls, session
        self._seen: list[dict[str, Any]] = [{"url": url, "answers": False} for url in urls]
        self._next = 0

    def hello(self) -> dict[str, Any]:
        """See `serving.console.app.Source`."""
        return {"urls": list(self.urls)}

    async def snapshot(self) -> dict[str, Any]:
        """See `serving.console.app.Source`."""
        due = [(self._next + k) % len(self.urls) for k in range(min(MOST_ASKED, len(self.urls)))]
        self._next = (due[-1] + 1) % len(self.urls)
        for k, seen in zip(due, await asyncio.gather(*(self._ask(self.urls[k]) for k in due)), strict=True):
            self._seen[k] = {**self._seen[k], "answers": False} if seen is None else {**seen, "answers": True}
        return {"nodes": self._seen}

    def urgent(self) -> object:
        """See `serving.console.app.Source`."""
        return None

    async def _ask(self, url: str) -> dict[str, Any] | None:
        """What a node says; None if it does not answer."""
        try:
            async with self._session.get(f"{url}/network") as response:
                seen = orjson.loads(await response.read())
            return _shown(url, seen)
        except (TimeoutError, aiohttp.ClientError, ValueError, LookupError, TypeError):
            return None


def _shown(url: str, seen: dict[str, Any]) -> dict[str, Any]:
    """As much of what a node says as is shown."""
    engine, channels = seen["engine"], seen["ledger"]["channels"] if seen["ledger"] else []
    return {
        "url": url, **{name: seen[name] for name in OF_NODE},
        "engine": {name: engine[name] for name in ("up", "reason", "running", "waiting", "kv_use")}
        | {"max_num_seqs": engine["profile"]["max_num_seqs"]},
        "peers": [{name: peer[name] for name in OF_PEER} for peer in seen["peers"]],
        "other_versions": [{name: each[name] for name in OF_OTHER} for each in seen["other_versions"][:MOST_OTHERS]],
        "paid": sum(each["paid"] for each in channels), "earned": sum(each["earned"] for each in channels),
        "has_ledger": seen["ledger"] is not None,
    }  # fmt: skip


class _App:
    """The ASGI application of the console alone."""

    def __init__(self, console: Console) -> None:
        self.console = console

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            expect(scope["method"], "GET", "HEAD")
            check_host(dict(scope["headers"]).get(b"host", b""))
            if not self.console.has(scope["path"]):
                raise Failed(404, f"there is no {scope['path']}", "not_found_error")
            await self.console(scope, receive, send)
        except Failed as failed:
            await fail(send, failed)


async def _serve(urls: Sequence[str], listener: socket.socket, stop: "asyncio.Future[None]") -> None:
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        console = Console(NetworkSource(urls, session))
        server = server_of(_App(console), LimitsConfig(connections=CONNECTIONS))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await stop
        console.close()
        server.should_exit = True
        await serving


@contextmanager
def network_console(urls: Sequence[str], port: int = PORT) -> Iterator[str]:
    """A console of the nodes at `urls`, in a thread of its own, until the context ends: its URL, at `port` of this
    machine, or another one if that is taken."""
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError:
        listener = socket.create_server(("127.0.0.1", 0))
    loop = asyncio.new_event_loop()
    stop = loop.create_future()
    thread = threading.Thread(target=loop.run_until_complete, args=[_serve(urls, listener, stop)], daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(lambda: None if stop.done() else stop.set_result(None))
        thread.join()
        loop.close()
