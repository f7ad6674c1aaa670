"""A `serving.http.transport.Transport` with no more than an engine's API needs: HTTP/1.1 over kept connections.

Parsed by httptools; one response at a time on a connection. A general client costs more than the rest of a node
together. What goes into a request line or a header is checked character by character.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import lru_cache
from types import TracebackType
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools

from wwwserve.serving.http.transport import CONNECT_TIMEOUT_S, MOST_PIECE, AnswerTooLarge, check_request, read_all

MOST_HEAD = 64 * 1024  # bytes of names and values of a response's headers
MOST_UNREAD = 256 * 1024  # bytes of a response that wait to be read, beyond which its sender waits

_NEVER_S = 1e8


class Site(NamedTuple):
    """Where connections go."""

    host: str
    port: int
    tls: bool


class DirectResponse:
    """See `serving.http.transport.Response`."""

    __slots__ = ("_connection", "_done", "_error", "_size", "_unread", "_waiter", "headers", "raw_headers", "status")

    def __init__(self, connection: "_Connection") -> None:
        self.status = 0  # until its head is there
        self.headers: Mapping[str, str] = {}
        self.raw_headers: Sequence[tuple[bytes, bytes]] = ()
        self._connection = connection
        self._unread: deque[bytes] = deque()  # of at most MOST_PIECE bytes each
        self._size = 0  # bytes in them
        self._done = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def iter_any(self) -> AsyncIterator[bytes]:
        """See `serving.http.transport.Response`."""
        while True:
            if self._unread:
                yield self._piece()
                if self._unread:  # there may be much of it, and others have something to do as well
                    await asyncio.sleep(0)
            elif self._done:
                return
            else:
                await self._news()

    def _piece(self) -> bytes:
        """What came first of what is unread, for one turn of the event loop."""
        unread = self._unread
        piece = unread.popleft()
        if unread and len(piece) + len(unread[0]) <= MOST_PIECE:
            pieces, size = [piece], len(piece)
            while unread and size + len(unread[0]) <= MOST_PIECE:
                pieces.append(unread.popleft())
                size += len(pieces[-1])
            piece = b"".join(pieces)
        self._size -= len(piece)
        if self._size <= MOST_UNREAD // 2:
            self._connection.resume()
        return piece

    async def read(self, limit: int) -> bytes:
        """See `serving.http.transport.Response`."""
        return await read_all(self, limit)

    async def readline(self, limit: int) -> bytes:
        """See `serving.http.transport.Response`."""
        line = b""
        async for piece in self.iter_any():
            end = piece.find(b"\n") + 1
            line += piece[:end] if end else piece
            if len(line) > limit:
                raise AnswerTooLarge(f"a line has more than {limit} bytes")
            if end:
                if rest := piece[end:]:
                    self._unread.appendleft(rest)
                    self._size += len(rest)
                break
        return line

    def close(self) -> None:
        """See `serving.http.transport.Response`."""
        self.ended(ConnectionError("it was closed"))

    async def head(self) -> None:
        """Wait until status and headers are there."""
        while not self.status:
            await self._news()

    async def _news(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    @property
    def done(self) -> bool:
        """Whether all of it has come."""
        return self._done

    # What the connection tells it.

    def began(self, status: int, head: list[tuple[bytes, bytes]]) -> None:
        self.status, self.raw_headers = status, head
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head}
        self._wake()

    def came(self, piece: bytes) -> None:
        if len(piece) <= MOST_PIECE:
            self._unread.append(piece)
        else:
            self._unread += [piece[start : start + MOST_PIECE] for start in range(0, len(piece), MOST_PIECE)]
        self._size += len(piece)
        if self._size > MOST_UNREAD:
            self._connection.pause()
        self._wake()

    def ended(self, error: Exception | None = None) -> None:
        """The whole of it is there, unless there is an error."""
        if not self._done and self._error is None:
            self._done, self._error = error is None, error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """A connection to the server, which is in `idle` while it has nothing to do."""

    def __init__(self, idle: "list[_Connection]") -> None:
        self.idle, self.read_s, self.due_s, self.head_bytes = idle, 0.0, 0.0, 0
        self.head: list[tuple[bytes, bytes]] = []
        self.loop = asyncio.get_running_loop()
        self.parser = httptools.HttpResponseParser(self)
        self.response: DirectResponse | None = None
        self.reusable, self.interim, self.paused = True, False, False
        self.answered = False  # whether a byte came of the response
        self.heard_s = 0.0
        self.timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport

    def ask(self, wire: bytes, read_s: float, due_s: float) -> DirectResponse:
        """Send a request, whose response is given up `read_s` without a byte or at `due_s`."""
        self.response = response = DirectResponse(self)
        self.heard_s, self.read_s, self.due_s, self.head_bytes = self.loop.time(), read_s, due_s, 0
        self.head, self.answered = [], False
        self.timer = self.loop.call_at(min(self.heard_s + read_s, due_s), self._look)
        self.transport.write(wire)
        return response

    def release(self) -> None:
        """Its response is no longer of interest: it can take another request if that was all, or is broken off."""
        response, self.response = self.response, None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.resume()
        sent = not self.transport.is_closing() and self.transport.get_write_buffer_size() == 0
        if response is not None and response.done and self.reusable and sent:
            self.idle.append(self)
        else:
            self.transport.abort()

    def _look(self) -> None:
        """Whether it is all there, or anything came, in the time allowed; a slow reader's delay does not count."""
        now_s = self.loop.time()
        if self.paused:
            self.heard_s = now_s
        if (next_s := min(self.heard_s + self.read_s, self.due_s)) > now_s:
            self.timer = self.loop.call_at(next_s, self._look)
        elif self.response is not None:
            self.timer = None
            late = now_s >= self.due_s
            self.response.ended(TimeoutError("it took too long" if late else f"nothing came for {self.read_s:g} s"))
            self.transport.abort()

    def pause(self) -> None:
        if not self.paused and not self.transport.is_closing():
            self.paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self.response is None:  # nothing was asked
            self.transport.abort()
            return
        self.heard_s, self.answered = self.loop.time(), True
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.reusable = False
            self.response.ended(ConnectionError(f"not HTTP: {error}"))
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self in self.idle:
            self.idle.remove(self)
        response = self.response
        if response is None:
            return
        headers = response.headers
        to_the_end = response.status and "content-length" not in headers and "transfer-encoding" not in headers
        if to_the_end and error is None:
            response.ended()
        else:
            response.ended(ConnectionError(str(error or "the connection was closed")))

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head_bytes += len(name) + len(value)
        if self.head_bytes > MOST_HEAD:
            raise ValueError("the head is too large")  # which the parser turns into an error of its own
        if self.response is not None and not self.response.status:
            self.head.append((name, value))

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        self.interim = status < 200
        assert self.response is not None
        if self.interim:
            self.head = []
        elif self.response.status:  # a second response to one request
            self.reusable = False
        else:
            self.reusable = self.parser.should_keep_alive()
            self.response.began(status, self.head)

    def on_body(self, piece: bytes) -> None:
        if self.response is not None and not self.response.done:
            self.response.came(piece)

    def on_message_complete(self) -> None:
        if not self.interim and self.response is not None:
            self.response.ended()


class Exchange(AbstractAsyncContextManager[DirectResponse]):
    """A request and its response, as an asynchronous context; leaving it before the response's end breaks it off."""

    __slots__ = ("_connection", "_due_s", "_read_s", "_site", "_transport", "_wire")

    def __init__(self, transport: "DirectTransport", site: Site, wire: bytes, read_s: float, due_s: float) -> None:
        self._transport, self._site, self._wire, self._read_s, self._due_s = transport, site, wire, read_s, due_s
        self._connection: _Connection | None = None

    async def __aenter__(self) -> DirectResponse:
        """The response, once its head is there. A kept connection that is found closed is replaced, once.

        That is so if no byte of a response came, as browsers have it: then the server closed it for being idle, most
        likely, and never read the request. If it did read it, a completion is computed twice, and changes nothing.
        What broke off after its first byte, or on a new connection, is for the caller to try again elsewhere.
        """
        idle = self._transport.idle_at(self._site)
        if idle:
            connection = idle.pop()
            try:
                return await self._ask(connection)
            except ConnectionError:
                if connection.answered:
                    raise
        async with asyncio.timeout_at(self._due_s):
            connection = await self._transport.connect(self._site)
        return await self._ask(connection)

    async def _ask(self, connection: _Connection) -> DirectResponse:
        self._connection = connection
        response = connection.ask(self._wire, self._read_s, self._due_s)
        try:
            await response.head()
        except BaseException:
            connection.release()
            raise
        return response

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the connection back, or break it off."""
        if self._connection is not None:
            self._connection.release()


class DirectTransport:
    """See `serving.http.transport.Transport`: connections to a few servers that the operator names."""

    def __init__(self) -> None:
        self._idle: dict[Site, list[_Connection]] = {}
        self._context: ssl.SSLContext | None = None

    def request(
        self, method: str, url: str, *, body: bytes = b"", headers: Mapping[str, str], timeout_s: float | None,
        read_timeout_s: float, peer: str = "",
    ) -> AbstractAsyncContextManager[DirectResponse]:  # fmt: skip
        """See `serving.http.transport.Transport`; it has no TLS with peers."""
        check_request(method, url, headers)
        site, head = _head(method, url)
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        now_s = asyncio.get_running_loop().time()
        wire = b"%b%bcontent-length: %d\r\n\r\n%b" % (head, lines.encode(), len(body), body)
        return Exchange(self, site, wire, read_timeout_s, now_s + (_NEVER_S if timeout_s is None else timeout_s))

    def idle_at(self, site: Site) -> list[_Connection]:
        """Connections that have nothing to do."""
        return self._idle.setdefault(site, [])

    async def connect(self, site: Site) -> _Connection:
        """A new connection. Raises OSError and TimeoutError."""
        idle = self.idle_at(site)
        if site.tls and self._context is None:
            self._context = ssl.create_default_context()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(idle), site.host, site.port, ssl=self._context if site.tls else None
            )
        return connection

    def close(self) -> None:
        """Close the connections that have nothing to do."""
        for idle in self._idle.values():
            for connection in idle[:]:
                connection.transport.abort()


@lru_cache(maxsize=64)
def _head(method: str, url: str) -> tuple[Site, bytes]:
    """Where a request goes, and its head up to the headers that are its own. Raises OSError for what is no URL."""
    try:
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        site = Site(parts.hostname or "", parts.port or (443 if tls else 80), tls)
    except ValueError as error:
        raise OSError(f"{url!r} is no URL: {error}") from None
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return site, f"{method} {target} HTTP/1.1\r\nhost: {parts.netloc.rpartition('@')[2]}\r\n".encode()
