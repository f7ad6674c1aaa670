"""What a client sends and gets: a body that comes, zipped or not, an answer that goes out, a connection that ends."""

import asyncio
import zlib
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from wwwserve.serving.boundary import BoundaryError, object_of
from wwwserve.serving.http.asgi import WATCH, Receive, Scope, Send, Watch, answer
from wwwserve.serving.http.quotas import Room
from wwwserve.serving.http.reply import ClientDisconnect, Failed, Reply

GZIP = 31  # zlib's number of that format, with the largest window
UNZIPPED = 1 << 18  # bytes in one turn of the event loop

T = TypeVar("T")


class HttpReply(Reply):
    """An answer on its way to the client."""

    def __init__(self, send: Send, headers: Sequence[tuple[bytes, bytes]] = (), counting: bool = False) -> None:
        """`headers` go out with it; what goes out is counted where `counting`."""
        super().__init__()
        self._counting = counting
        self.ended, self._send, self._headers = False, send, headers
        self.status, self.kind = 0, ""  # of what is out
        self.sent, self.events = 0, 0  # bytes of the body, and events of a stream, that are out
        self._last = b"\n\n"  # chunk of a stream that went out
        self.first_s: float | None = None  # when its first byte went out, by the event loop's clock

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the answer, beside its type: the own, and what the engine says of limits where this node has none."""
        if not self.limits:
            return [*self._headers]
        own = {name for name, _ in self._headers}
        return [*self._headers, *(each for each in self.limits if each[0] not in own)]

    async def start(self, status: int, content_type: str, *headers: tuple[bytes, bytes]) -> None:
        """See `Reply`."""
        self.started, self.status, self.kind = True, status, content_type
        head = [(b"content-type", content_type.encode("latin-1")), *headers, *self.headers]
        await self._send({"type": "http.response.start", "status": status, "headers": head})

    async def pass_on(self, chunk: bytes) -> None:
        """See `Reply`."""
        if self._counting:
            self.first_s = self.first_s or asyncio.get_running_loop().time()
            self.sent += len(chunk)
            self.events += chunk.count(b"\ndata:") + chunk.startswith(b"data:")
        self._last = chunk
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        """See `Reply`."""
        self.started = self.ended = True
        self.status, self.sent, self.first_s = status, len(body), asyncio.get_running_loop().time()
        await answer(self._send, status, body, content_type.encode("latin-1"), self.headers)

    async def break_off(self, event: bytes) -> None:
        """End a stream with an event, which begins on a line of its own wherever the stream stopped."""
        await self.pass_on(event if self._last.endswith((b"\n\n", b"\r\n\r\n")) else b"\n\n" + event)
        await self.end()

    async def end(self) -> None:
        """All of it is out."""
        if not self.ended:
            self.ended = True
            await self._send({"type": "http.response.body", "body": b""})


class _Unzip:
    """The inverse of gzip, piece by piece, bounded."""

    def __init__(self, limit: int) -> None:
        self._left, self._zip = limit, zlib.decompressobj(GZIP)

    async def feed(self, piece: bytes) -> bytes:
        """What a piece comes to. Raises Failed where all of them come to too much, or are no gzip."""
        parts = []
        while piece:
            try:
                parts.append(self._zip.decompress(piece, min(self._left + 1, UNZIPPED)))
            except zlib.error:
                raise Failed(400, "the body is not gzip", "invalid_request_error") from None
            self._left -= len(parts[-1])
            if self._left < 0:
                raise Failed(413, "the body is too large when it is unpacked", "invalid_request_error")
            if self._zip.unused_data:
                raise Failed(400, "the body goes on after its gzip", "invalid_request_error")
            piece = self._zip.unconsumed_tail
            await asyncio.sleep(0)
        return b"".join(parts)

    def end(self) -> None:
        """No more comes. Raises Failed if it should."""
        if not self._zip.eof:
            raise Failed(400, "the body is not gzip to its end", "invalid_request_error")


async def receive_body(
    receive: Receive, headers: Mapping[bytes, bytes], who: str, limit: int, coming: Room, encodings: bool = False
) -> bytes:
    """A request's body, unpacked if it is zipped and `encodings` are taken: before and after at most `limit` bytes.

    Raises Failed for one that is too large, and while too many others are coming, ClientDisconnect.
    """
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise _too_large(limit)
    unzip = _Unzip(limit) if encodings and _is_zipped(headers) else None
    message = await receive()
    body: bytes = message.get("body", b"")
    if unzip is None and not message.get("more_body", False) and message["type"] != "http.disconnect":
        if len(body) > limit:
            raise _too_large(limit)
        return body
    parts, came, kept = [], 0, 0
    try:
        while True:
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            came += len(body)
            if came > limit:
                raise _too_large(limit)
            parts.append(body if unzip is None else await unzip.feed(body))
            if not coming.came(who, len(parts[-1])):
                raise Failed(503, "too many large requests come at once", "overloaded", retry_after_s=1)
            kept += len(parts[-1])
            if not message.get("more_body", False):
                break
            message = await receive()
            body = message.get("body", b"")
    finally:
        coming.gone(who, kept)
    if unzip is not None:
        unzip.end()
    return b"".join(parts)


def _too_large(limit: int) -> Failed:
    return Failed(413, f"the body is larger than {limit} bytes", "invalid_request_error")


def _is_zipped(headers: Mapping[bytes, bytes]) -> bool:
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"identity", b"gzip", b"x-gzip"):
        raise Failed(415, "content-encoding is not taken here, expected gzip or none", "invalid_request_error")
    return encoding != b"identity"


def object_in(body: bytes) -> dict[str, Any]:
    """The object of JSON that a body is. Raises Failed."""
    try:
        return object_of(body)
    except BoundaryError as error:
        raise Failed(400, str(error), "invalid_request_error") from None


async def unless_gone(scope: Scope, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up; then raises ClientDisconnect.

    The request is all there, and whoever serves it has put WATCH into its scope. A task that waits for what ASGI's
    `receive` says next would cost a node a twentieth of its time.
    """
    worker = asyncio.current_task()
    assert worker is not None
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True
        worker.cancel()

    watch: Watch = scope[WATCH]
    watch(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if gone and worker.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watch(None)
