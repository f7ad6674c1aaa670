"""HTTP as a node speaks it to others: its engine and its peers. Behind a protocol, so that a test can put a network in
memory in its place.

Redirects are never followed, cookies not kept, bodies not decompressed, proxies not looked up in the environment. What
goes wrong is an OSError or a TimeoutError.
"""

import asyncio
import re
import ssl
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import aiohttp
from yarl import URL

from wwwserve.serving.http.certificates import NODE_HOST, KeyCheck, PeerContext
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.sockets import own_socket

CONNECT_TIMEOUT_S = 5.0
MOST_CONTEXTS = 1024  # of peers, for TLS
MOST_PIECE = 1 << 14  # bytes of an answer in one turn of the event loop, as they may be thousands of events

_METHOD = re.compile(r"[A-Z]{1,16}")
_URL = re.compile(r"https?://[!-~]+")
_NAME = re.compile(r"[a-z0-9-]{1,64}")
_VALUE = re.compile(r"[ -~]*")


class AnswerTooLarge(OSError):
    """A body or a line is longer than the caller takes."""


class OtherKeyError(ConnectionError):
    """The other side of a connection is not the peer that was meant."""


class Response(Protocol):
    """A response of which the head is there. Reading its body raises OSError or TimeoutError where it breaks off."""

    status: int
    headers: Mapping[str, str]  # looked up by names in lower case
    raw_headers: Sequence[tuple[bytes, bytes]]

    def iter_any(self) -> AsyncIterator[bytes]:
        """The rest of the body, in pieces as they come."""

    async def read(self, limit: int) -> bytes:
        """The rest of the body, to its end. Raises AnswerTooLarge beyond `limit` bytes."""

    async def readline(self, limit: int) -> bytes:
        """The next line with its end, or what is left of the body. Raises AnswerTooLarge beyond `limit` bytes."""

    def close(self) -> None:
        """Break the response off: whoever reads it gets an OSError."""


class Transport(Protocol):
    """The way to other servers."""

    def request(
        self, method: str, url: str, *, body: bytes = b"", headers: Mapping[str, str], timeout_s: float | None,
        read_timeout_s: float, peer: str = "",
    ) -> AbstractAsyncContextManager[Response]:  # fmt: skip
        """Send a request; the context begins once the head of the response is there. To a `peer`, named by its key,
        nothing goes out before the other side has shown that key, where nodes have TLS.

        Leaving it before the response's end breaks the connection off. `timeout_s` bounds all of it (None: no bound),
        `read_timeout_s` the time without a byte. Raises OSError and TimeoutError.
        """


def check_request(method: str, url: str, headers: Mapping[str, str]) -> None:
    """Raises OSError for characters that could end a line of a request's head, or begin another."""
    if not _METHOD.fullmatch(method):
        raise OSError(f"{method!r} is no method")
    if not _URL.fullmatch(url):
        raise OSError(f"{url!r} is no URL of printable ASCII characters")
    for name, value in headers.items():
        if not (_NAME.fullmatch(name) and _VALUE.fullmatch(value)):
            raise OSError(f"header {name!r} has characters that no header has")


async def read_all(response: Response, limit: int) -> bytes:
    """The rest of a body, for implementations of `Response.read`."""
    pieces, size = [], 0
    async for piece in response.iter_any():
        size += len(piece)
        if size > limit:
            raise AnswerTooLarge(f"the answer has more than {limit} bytes")
        pieces.append(piece)
    return b"".join(pieces) if len(pieces) != 1 else pieces[0]


class AiohttpResponse:
    """A `Response` of aiohttp."""

    __slots__ = ("_response", "headers", "raw_headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self.raw_headers: Sequence[tuple[bytes, bytes]] = response.raw_headers

    async def iter_any(self) -> AsyncIterator[bytes]:
        """See `Response`."""
        try:
            async for came in self._response.content.iter_any():
                yield came[:MOST_PIECE]
                for start in range(MOST_PIECE, len(came), MOST_PIECE):
                    await asyncio.sleep(0)
                    yield came[start : start + MOST_PIECE]
        except aiohttp.ClientError as error:
            raise _os_error(error) from None

    async def read(self, limit: int) -> bytes:
        """See `Response`."""
        return await read_all(self, limit)

    async def readline(self, limit: int) -> bytes:
        """See `Response`."""
        try:
            line = await self._response.content.readline()
        except ValueError:  # longer than aiohttp's buffer
            raise AnswerTooLarge("a line is too long") from None
        except aiohttp.ClientError as error:
            raise _os_error(error) from None
        if len(line) > limit:
            raise AnswerTooLarge(f"a line has more than {limit} bytes")
        return line

    def close(self) -> None:
        """See `Response`."""
        self._response.close()


class AiohttpTransport:
    """A `Transport` over one session of aiohttp; to be used and closed in one event loop."""

    def __init__(self, keepalive_s: float = 30.0, identity: Identity | None = None) -> None:
        """With an `identity` it has TLS with peers, and sends nothing to them without."""
        self._identity = identity
        self._contexts: OrderedDict[str, PeerContext] = OrderedDict()
        self._verified: ssl.SSLContext | bool = True if identity is None else ssl.create_default_context()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=keepalive_s, ssl=True if identity is None else KeyCheck(),
                socket_factory=own_socket,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False, trust_env=False, skip_auto_headers=("accept", "accept-encoding", "user-agent"),
        )  # fmt: skip

    @asynccontextmanager
    async def request(
        self, method: str, url: str, *, body: bytes = b"", headers: Mapping[str, str], timeout_s: float | None,
        read_timeout_s: float, peer: str = "",
    ) -> AsyncIterator[Response]:  # fmt: skip
        """See `Transport`."""
        check_request(method, url, headers)
        secured, host = self._verified, None
        if peer and self._identity is not None:
            if not url.startswith("https://"):
                raise ConnectionError(f"{url} is no address for TLS")
            secured, host = self._context(self._identity, peer), NODE_HOST
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S, sock_read=read_timeout_s)
        asked = self._session.request(
            method, URL(url, encoded=True), data=body or None, headers=headers, timeout=timeout,
            allow_redirects=False, ssl=secured, server_hostname=host,
        )  # fmt: skip
        try:
            response = await asked
        except (aiohttp.ClientError, ValueError) as error:  # a ValueError for a URL that cannot be
            raise _os_error(error) from None
        async with response:
            yield AiohttpResponse(response)

    def _context(self, identity: Identity, peer: str) -> PeerContext:
        context = self._contexts.get(peer)
        if context is None:
            context = self._contexts[peer] = PeerContext.to(identity, peer)
            if len(self._contexts) > MOST_CONTEXTS:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(peer)
        return context

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


def _os_error(error: Exception) -> OSError:
    """An error of aiohttp as what a `Transport` raises."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, aiohttp.ServerFingerprintMismatch):
        return OtherKeyError("it has another key than it is known by")
    broken = isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError)
    return ConnectionError("the connection was broken off" if broken else f"{type(error).__name__}: {error}")
