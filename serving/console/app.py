"""The ASGI side of a console: its files, which hold no data, and its events, which are for the operator.

/                  the page
/console/NAME      what it is made of
/console/events    server-sent events: `hello` once, then a `snapshot` about every second
"""

import asyncio
from contextlib import aclosing
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import orjson

from wwwserve.serving.console.broadcast import Broadcast
from wwwserve.serving.http.asgi import Receive, Scope, Send, answer
from wwwserve.serving.http.reply import Failed

ROOT, PREFIX = "/", "/console/"
EVENTS = PREFIX + "events"
STATIC = Path(__file__).parent / "static"
KINDS = {".html": b"text/html; charset=utf-8", ".js": b"text/javascript; charset=utf-8", ".css": b"text/css"}
# Nothing but this server's own files is loaded, nothing inline is run, and nobody may frame the page.
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY), (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]  # fmt: skip


class Source(Protocol):
    """What a console shows."""

    page: str  # file of the page

    def hello(self) -> dict[str, Any]:
        """What is told once."""

    async def snapshot(self) -> dict[str, Any]:
        """How things are."""

    def urgent(self) -> object:
        """What is told sooner than in a second if it changes."""


class Console:
    """One console."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.broadcast = Broadcast(self._made, source.urgent)
        self._files = {**_files(), ROOT: _files()[PREFIX + source.page]}

    def is_file(self, path: str) -> bool:
        """Whether that is a file, in which there is nothing that not everyone may know."""
        return path in self._files

    def has(self, path: str) -> bool:
        """Whether that is one of its paths."""
        return path == EVENTS or path in self._files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET or HEAD of one of its paths. Raises Failed."""
        if scope["path"] != EVENTS:
            await answer(send, 200, *self._files[scope["path"]], HEADERS)
            return
        if self.broadcast.closed:
            raise Failed(503, "this node is shutting down", "overloaded", retry_after_s=1)
        if self.broadcast.is_full:
            raise Failed(503, "as many consoles are open as there may be", "overloaded", retry_after_s=5)
        head = [(b"content-type", b"text/event-stream"), *HEADERS]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        gone, telling = asyncio.create_task(_disconnected(receive)), asyncio.create_task(self._tell(send))
        try:
            await asyncio.wait({gone, telling}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            telling.cancel()
            await asyncio.gather(gone, telling, return_exceptions=True)
        await send({"type": "http.response.body", "body": b""})

    def close(self) -> None:
        """End what is open, as a server waits for it when it ends."""
        self.broadcast.close()

    async def _made(self) -> bytes:
        return _event(b"snapshot", await self.source.snapshot())

    async def _tell(self, send: Send) -> None:
        async with aclosing(self.broadcast.listen()) as snapshots:
            await _send(send, _event(b"hello", self.source.hello()))
            async for snapshot in snapshots:
                await _send(send, snapshot)


@cache
def _files() -> dict[str, tuple[bytes, bytes]]:
    """Content and type of each file, by its path."""
    names = {f"{PREFIX}{path.relative_to(STATIC)}": path for path in STATIC.rglob("*") if path.suffix in KINDS}
    return {name: (path.read_bytes(), KINDS[path.suffix]) for name, path in names.items()}


async def _send(send: Send, event: bytes) -> None:
    await send({"type": "http.response.body", "body": event, "more_body": True})


def _event(name: bytes, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
