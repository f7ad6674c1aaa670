"""A client's connection, which cannot take more of a node than its limits: connections, bytes of a head, time to send.

What HTTP itself refuses is answered here, in the same JSON as all other errors. A client that would go on in another
protocol is answered in HTTP/1.1, and one of HTTP/1.0 gets no chunks.
"""

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from wwwserve.serving.config import LimitsConfig
from wwwserve.serving.http.asgi import WATCH
from wwwserve.serving.http.certificates import certified
from wwwserve.serving.http.files import are_short, most_files
from wwwserve.serving.http.messages import Refused
from wwwserve.serving.http.places import Places, address_of
from wwwserve.serving.http.reply import Failed

log = logging.getLogger("wwwserve.connection")

MOST_READ = 256 * 1024  # bytes that come at once
HANDSHAKE_S = 5.0  # for TLS to be agreed on, and for its end,
PARTS = 4  # in parts, of which a process that is stopped for longer than one loses no more than one
LONGEST_HANDSHAKE_S = 3600.0
MOST_TURNED_AWAY = 64  # connections that have no place and are not closed yet
MOST_WHERE_SHORT = 16  # of those, where files are short
TURNED_AWAY_S = 1.0
CONNECTION = "wwwserve.connection"  # in the scope of a request, the connection that it came by
PEER_PATHS = b"/peer/"  # what their paths begin with

UPGRADE = (b"upgrade", b"http2-settings")  # headers of a request to go on in another protocol

_CROWDED = "too many connections are open here"
_CROWDED_ADDRESS = "too many connections are open here from this address"
_SHORT = "too many files are open here"


class _ToTheEnd(int):
    """Bytes that are left of an answer which has no length: never too few, nor too many."""

    def __lt__(self, other: int) -> bool:
        return False

    def __sub__(self, other: int) -> "_ToTheEnd":
        return self

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


class Connection(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self, limits: LimitsConfig, places: "Places[Connection | Gate]", before: "Gate | None" = None, **options: Any
    ) -> None:  # fmt: skip
        """It takes over the place of `before`."""
        super().__init__(**options)
        self._before = before
        self.limits, self.places, self.address = limits, places, ""
        self.peer: str | None = None  # whose signature was good on a request that came by it
        self.certified: str | None = None  # who is at its other end, by TLS
        self._begun_s: float | None = None  # when the request began that is not all there yet
        self._unread = 0  # bytes of a head that has not come to its end
        self._head = 0  # bytes of names and values of headers
        self._refused: Failed | None = None
        self._hung_up: dict[int, Callable[[], None]] = {}  # by request, what waits for that
        self._requests = 0  # that came
        self._lost = False
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0  # when it goes off

    @classmethod
    def limited(cls, limits: LimitsConfig, tls: ssl.SSLContext | None = None) -> type[asyncio.Protocol]:
        """What makes connections of a server, over TLS with a context for that."""
        places = Places[Connection | Gate](limits.connections, limits.connections_per_address, limits.peer_connections)
        made = partial(cls, limits, places)
        return cast(type[asyncio.Protocol], made if tls is None else partial(Gate, made, places, tls))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self.address = address_of(self.client[0] if self.client else "")
        self.certified = certified(transport)
        if self._before is not None:
            self.places.leave(self._before)
        if are_short(transport.get_extra_info("socket").fileno()):
            if self.places.squeeze(self.loop.time()):
                log.warning("new connections are turned away: " + _SHORT, extra={"most": most_files()})
            self._turn_away(Failed(503, _SHORT, "overloaded", retry_after_s=1), MOST_WHERE_SHORT)
            return
        if not self.places.enter(self, self.address):
            crowded = _CROWDED_ADDRESS if self.places.is_crowded(self.address) else _CROWDED
            self._turn_away(Failed(503, crowded, "overloaded", retry_after_s=1))
            return
        self._begun_s = self._due_s = self.loop.time()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self._timer is not None:
            self._timer.cancel()
        self.places.leave(self)
        self.places.turned_away.pop(self, None)
        super().connection_lost(exc)
        self._lost = True
        for hung_up in [*self._hung_up.values()]:
            hung_up()

    def proved(self, peer: str) -> None:
        """A request came by it that a peer signed. Raises Refused where it has no place and the peer has its share of
        those for peers."""
        if self.peer is None:
            if not self.places.keep_for(self, peer):
                raise Refused("crowded", f"{peer} has its share of the connections that are kept for peers")
            self.peer = peer

    def watch(self, request: int, hung_up: Callable[[], None] | None) -> None:
        """See `asgi.WATCH`; `request` is the number of one that came by it."""
        if hung_up is None:
            self._hung_up.pop(request, None)
            return
        self._hung_up[request] = hung_up
        self.flow.resume_reading()  # which a large body may have paused, and without which nobody is seen to hang up
        if self._lost:
            hung_up()

    def make_room(self) -> None:
        """Close it, on which nothing is under way, as another one needs its place."""
        if self._unread:
            self._refuse(Failed(503, _CROWDED, "overloaded", retry_after_s=1))
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self.transport.is_closing():
            return
        if self in self.places.turned_away:
            self._say_away()
            return
        self._unread += len(data)  # less, once the head is there
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._unread > self.limits.header_bytes + MOST_READ:
            self._refuse(_too_large())

    def _parse(self, data: bytes) -> None:
        rest = memoryview(data)  # of which many requests may be left, each of whom would be copied with all after it
        try:
            while True:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    rest = rest[upgrade.args[0] :]
                if self.parser.get_method() == b"CONNECT":
                    told = "method CONNECT is not allowed"
                    self._refuse(Failed(405, told, "invalid_request_error", allow="GET, HEAD, POST"))
                    return
                self._stay()
                self._unread += len(rest)
        except httptools.HttpParserError:
            self.send_400_response("")

    def _stay(self) -> None:
        """Take a request to go on in another protocol for one in this: parse its head anew without the wish."""
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(each for each in value.split(b",") if each.strip().lower() not in UPGRADE)
            if name not in UPGRADE:
                lines.append(b"%b: %b" % (name, value))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def on_message_begin(self) -> None:
        """See `httptools`."""
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]
        self._requests += 1
        self.scope[WATCH] = partial(self.watch, self._requests)  # type: ignore[literal-required]
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
        if self.places.is_for_peers(self) and not self.url.startswith(PEER_PATHS):
            self._refused = Failed(503, _CROWDED, "overloaded", retry_after_s=1)
            raise self._refused
        if self.parser.should_upgrade():  # so that its body is not read; see `_stay`
            return
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.chunked_encoding, self.cycle.expected_content_length = False, _ToTheEnd()

    def on_body(self, body: bytes) -> None:
        """See `httptools`."""
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See `httptools`."""
        if self.parser.should_upgrade():
            return
        self._begun_s, self._unread = None, 0
        if not self.cycle.response_complete:
            self.places.busy(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """See `HttpToolsProtocol`."""
        if not self.pipeline and self._begun_s is None:
            self.places.idle(self)
        super().on_response_complete()

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

    def _turn_away(self, failed: Failed, most: int = MOST_TURNED_AWAY) -> None:
        """Refuse what comes by it, and read it, for a moment: a connection that is closed with something unread is
        reset, and its answer lost."""
        self._refused = failed
        if not self.places.turn_away(self, self.address, most):
            self._refuse(failed)
            return
        self._timer = self.loop.call_later(TURNED_AWAY_S, self.transport.close)

    def _say_away(self) -> None:
        failed, self._refused = self._refused, None
        if failed is None:  # that was said
            return
        if self.transport.can_write_eof():
            self._say(failed)
            self.transport.write_eof()
        else:
            self._refuse(failed)

    def _refuse(self, failed: Failed) -> None:
        """Close the connection, with an answer if none has begun."""
        self._say(failed)
        self.transport.close()

    def _say(self, failed: Failed) -> None:
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = failed.body()
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
            more = b"".join(b"%b: %b\r\n" % each for each in failed.headers)
            self.transport.write(STATUS_LINE[failed.status] + head + more + b"\r\n" + body)


class Gate(asyncio.Protocol):
    """A connection until TLS is agreed on, which has a place like any other on which nothing is under way.

    TLS is agreed on over a duplicate of its socket: uvloop reads from the one that it accepted right after
    `connection_made`, whatever is asked of it there, and what it had read would be missing.
    """

    def __init__(
        self, make: Callable[..., Connection], places: "Places[Connection | Gate]", tls: ssl.SSLContext, **options: Any
    ) -> None:  # fmt: skip
        self.make, self.places, self.tls, self.options = make, places, tls, options
        self._socket: socket.socket | None = None
        self._agreeing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        accepted = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        peer = accepted.get_extra_info("peername")
        if self.places.enter(self, address_of(peer[0] if peer else "")):
            try:
                raw = accepted.get_extra_info("socket")
                self._socket = socket.socket(raw.family, raw.type, raw.proto, fileno=os.dup(raw.fileno()))
                self._socket.setblocking(False)
                self._agreeing = asyncio.get_running_loop().create_task(self._agree(self._socket))
            except OSError:  # the client is gone already, or this process has too many files open
                self.places.leave(self)
        accepted.abort()

    def make_room(self) -> None:
        """See `Connection`."""
        if self._socket is not None:
            with suppress(OSError):  # it is closed already
                self._socket.shutdown(socket.SHUT_RDWR)  # which ends the handshake

    def _watch(self, left: int) -> None:
        """End what takes too long. Time that this process had none of is not the client's delay."""
        if left == 0:
            self.make_room()
        else:
            self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_S / PARTS, self._watch, left - 1)

    async def _agree(self, sock: socket.socket) -> None:
        make = partial(self.make, before=self, **self.options)
        self._watch(PARTS)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                make, sock, ssl=self.tls, ssl_handshake_timeout=LONGEST_HANDSHAKE_S, ssl_shutdown_timeout=HANDSHAKE_S
            )
        except OSError:  # of what is no TLS, SSLError; of what is ended, ConnectionError
            pass
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self.places.leave(self)


def _too_large() -> Failed:
    return Failed(431, "the headers are too large", "invalid_request_error")
