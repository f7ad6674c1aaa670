"""Requests to one HTTP server over kept connections, with no more than an engine's API needs.

HTTP/1.1, parsed by httptools; one response at a time on a connection. A general client's redirects, cookies, encodings
and proxies are not wanted on the way to an engine, and they cost more than the rest of a node together.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import cast
from urllib.parse import urlsplit

import httptools

CONNECT_S = 5.0
MOST_UNREAD = 256 * 1024  # bytes of a response that wait to be read, beyond which its sender waits


class Response:
    """A response on its way. Reading it raises ConnectionError if it breaks off, TimeoutError if it stays away."""

    __slots__ = ("_connection", "_done", "_error", "_size", "_unread", "_waiter", "headers", "status")

    def __init__(self, connection: "_Connection") -> None:
        self.status = 0  # until its head is there
        self.headers: dict[str, str] = {}  # by names in lower case
        self._connection = connection
        self._unread: list[bytes] = []
        self._size = 0  # bytes in them
        self._done = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def iter_any(self) -> AsyncIterator[bytes]:
        """The body, in pieces as they come."""
        while True:
            if self._unread:
                piece = b"".join(self._unread) if len(self._unread) > 1 else self._unread[0]
                self._unread.clear()
                self._size = 0
                self._connection.resume()
                yield piece
            elif self._done:
                return
            else:
                await self._news()

    async def read(self) -> bytes:
        """The rest of the body."""
        return b"".join([piece async for piece in self.iter_any()])

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

    def began(self, status: int) -> None:
        self.status = status
        self._wake()

    def came(self, piece: bytes) -> None:
        self._unread.append(piece)
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

    def __init__(self, idle: "list[_Connection]", read_s: float) -> None:
        self.idle, self.read_s = idle, read_s
        self.loop = asyncio.get_running_loop()
        self.parser = httptools.HttpResponseParser(self)
        self.response: Response | None = None
        self.reusable, self.interim, self.paused = True, False, False
        self.heard_s = 0.0
        self.timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport

    def ask(self, wire: bytes) -> Response:
        """Send a request."""
        self.response = response = Response(self)
        self.heard_s = self.loop.time()
        self.timer = self.loop.call_later(self.read_s, self._look)
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
        """Whether anything came within the time allowed; while its reader is slow, that does not count."""
        now_s = self.loop.time()
        if self.paused:
            self.heard_s = now_s
        if (left_s := self.heard_s + self.read_s - now_s) > 0:
            self.timer = self.loop.call_later(left_s, self._look)
        elif self.response is not None:
            self.timer = None
            self.response.ended(TimeoutError(f"nothing came for {self.read_s:g} s"))
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
        self.heard_s = self.loop.time()
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
        if self.response is not None and not self.response.status:
            self.response.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        self.interim = status < 200
        assert self.response is not None
        if self.interim:
            self.response.headers.clear()
        elif self.response.status:  # a second response to one request
            self.reusable = False
        else:
            self.reusable = self.parser.should_keep_alive()
            self.response.began(status)

    def on_body(self, piece: bytes) -> None:
        if self.response is not None and not self.response.done:
            self.response.came(piece)

    def on_message_complete(self) -> None:
        if not self.interim and self.response is not None:
            self.response.ended()


class Exchange:
    """A request and its response, as an asynchronous context; leaving it before the response's end breaks it off."""

    __slots__ = ("_connection", "_upstream", "_wire")

    def __init__(self, upstream: "Upstream", wire: bytes) -> None:
        self._upstream, self._wire = upstream, wire
        self._connection: _Connection | None = None

    async def __aenter__(self) -> Response:
        """The response, once its head is there. Raises OSError and TimeoutError."""
        idle = self._upstream.idle
        if idle:
            kept = self._connection = idle.pop()
            response = kept.ask(self._wire)
            try:
                await response.head()
            except ConnectionError:  # the server had closed it, most likely, as it was asked
                kept.release()
            except BaseException:
                kept.release()
                raise
            else:
                return response
        fresh = self._connection = await self._upstream.connect()
        response = fresh.ask(self._wire)
        try:
            await response.head()
        except BaseException:
            fresh.release()
            raise
        return response

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the connection back, or break it off."""
        if self._connection is not None:
            self._connection.release()


class Upstream:
    """The server at a URL, and the connections to it."""

    def __init__(self, url: str, headers: Mapping[str, str], read_s: float) -> None:
        """`headers` go with every request; `read_s`: without a byte, after which a response is given up."""
        parts = urlsplit(url)
        self.host, self.tls = parts.hostname or "", parts.scheme == "https"
        self.port = parts.port or (443 if self.tls else 80)
        self.prefix, self.read_s = parts.path.rstrip("/"), read_s
        lines = [f"host: {parts.netloc.rpartition('@')[2]}", *(f"{name}: {value}" for name, value in headers.items())]
        self._head = "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"content-length: "
        self._context = ssl.create_default_context() if self.tls else None
        self.idle: list[_Connection] = []

    def post(self, path: str, body: bytes) -> Exchange:
        """Ask. A kept connection that is found closed is replaced by a new one, once."""
        start = f"POST {self.prefix}{path} HTTP/1.1\r\n".encode("latin-1")
        return Exchange(self, b"%b%b%d\r\n\r\n%b" % (start, self._head, len(body), body))

    async def connect(self) -> _Connection:
        """A new connection."""
        async with asyncio.timeout(CONNECT_S):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self.idle, self.read_s), self.host, self.port, ssl=self._context
            )
        return connection

    def close(self) -> None:
        """Close the connections that have nothing to do."""
        for connection in self.idle[:]:
            connection.transport.abort()
