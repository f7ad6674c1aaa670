"""A client's connection, which cannot take more of a node than its limits: connections, bytes of a head, time to send.

What HTTP itself refuses is answered here, in the same JSON as all other errors.
"""

import asyncio
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from wwwserve.serving.config import LimitsConfig
from wwwserve.serving.http.reply import Failed

MOST_READ = 256 * 1024  # bytes that come at once


class Connection(HttpToolsProtocol):
    """One connection."""

    def __init__(self, limits: LimitsConfig, **options: Any) -> None:
        super().__init__(**options)
        self.limits = limits
        self._begun_s: float | None = None  # when the request began that is not all there yet
        self._unread = 0  # bytes of a head that has not come to its end
        self._head = 0  # bytes of names and values of headers
        self._refused: Failed | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0  # when it goes off

    @classmethod
    def limited(cls, limits: LimitsConfig) -> type[asyncio.Protocol]:
        """What makes connections of a server."""
        return cast(type[asyncio.Protocol], partial(cls, limits))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(Failed(503, "too many connections are open here", "overloaded", retry_after_s=1))
            return
        self._begun_s = self._due_s = self.loop.time()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self.transport.is_closing():
            return
        self._unread += len(data)  # less, once the head is there
        super().data_received(data)
        if self._unread > self.limits.header_bytes + MOST_READ:
            self._refuse(_too_large())

    def on_message_begin(self) -> None:
        """See `httptools`."""
        super().on_message_begin()
        self._begun_s, self._head = self.loop.time(), 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """See `httptools`; trailers too."""
        self._head += len(name) + len(value)
        if self._head > self.limits.header_bytes:
            self._refused = _too_large()
            raise self._refused  # which the parser turns into an error of its own
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """See `httptools`."""
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See `httptools`."""
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See `httptools`."""
        self._begun_s, self._unread = None, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What comes is not HTTP."""
        self._refuse(self._refused or Failed(400, "this is not HTTP/1.1", "invalid_request_error"))

    def _watch(self) -> None:
        """Cut off who takes too long to send a request, as far as it is read."""
        now_s = self.loop.time()
        if self._begun_s is not None:
            # What was not read, as it is not wanted yet or this process had no time, is not the client's delay.
            self._begun_s = now_s if self.flow.read_paused else self._begun_s + max(0.0, now_s - self._due_s)
            if now_s - self._begun_s > self.limits.receive_s:
                late = f"the request did not come within {self.limits.receive_s:g} s"
                self._refuse(Failed(408, late, "invalid_request_error"))
                return
        self._due_s = now_s + self.limits.receive_s / 4
        self._timer = self.loop.call_at(self._due_s, self._watch)

    def _refuse(self, failed: Failed) -> None:
        """Close the connection, with an answer if none has begun."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = failed.body()
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[failed.status] + head + body)
        self.transport.close()


def _too_large() -> Failed:
    return Failed(431, "the headers are too large", "invalid_request_error")
