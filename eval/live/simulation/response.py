"""A response as its reader sees it, whoever answers: a `serving.http.transport.Response`."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType

from wwwserve.eval.live.simulation.loop import VirtualLoop

Header = tuple[bytes, bytes]


class TooLarge(OSError):
    """A body, or a line of it, has more bytes than the reader takes."""


class Incoming(ABC):
    """What has come of a response, and what comes; a context that hangs up. Reading raises OSError if it breaks off."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.status = 0  # until its head is there
        self.headers: Mapping[str, str] = {}  # by names in lower case
        self.raw_headers: Sequence[Header] = ()
        self.unread: list[bytes] = []
        self.ended = False
        self.error: OSError | None = None  # with which it broke off
        self._waiter: asyncio.Future[None] | None = None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Hang up."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Hang up."""

    async def iter_any(self) -> AsyncIterator[bytes]:
        """The body, in pieces as they come."""
        while (piece := await self._some()) is not None:
            yield piece

    async def read(self, limit: int) -> bytes:
        """The rest of the body. Raises TooLarge for more than `limit` bytes."""
        parts, size = [], 0
        while (piece := await self._some()) is not None:
            parts.append(piece)
            size += len(piece)
            if size > limit:
                raise TooLarge(f"the body has more than {limit} bytes")
        return b"".join(parts)

    async def readline(self, limit: int) -> bytes:
        """Up to and with the next newline, or to the end. Raises TooLarge for more than `limit` bytes."""
        line = b""
        while (piece := await self._some()) is not None:
            end = piece.find(b"\n") + 1 or len(piece)
            line += piece[:end]
            if len(line) > limit:
                raise TooLarge(f"a line has more than {limit} bytes")
            if end < len(piece):
                self.unread.insert(0, piece[end:])
            if line.endswith(b"\n"):
                break
        return line

    async def wait_for_head(self) -> None:
        """Until status and headers are there."""
        while not self.status:
            await self._news()

    async def _some(self) -> bytes | None:
        """What has come; None at the end."""
        while not self.unread:
            if self.ended:
                return None
            await self._news()
        piece = b"".join(self.unread) if len(self.unread) > 1 else self.unread[0]
        self.unread.clear()
        return piece

    async def _news(self) -> None:
        if self.error is not None:
            raise self.error
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # For those who bring it.

    def begin(self, status: int, headers: Sequence[Header]) -> None:
        """Its head is there."""
        self.status, self.raw_headers = status, headers
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
        self._wake()

    def add(self, piece: bytes, last: bool) -> None:
        """Some of its body is there."""
        if piece:
            self.unread.append(piece)
        self.ended = last
        self._wake()

    def fail(self, error: OSError) -> None:
        """It breaks off, unless it did already."""
        if self.error is None:
            self.error = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
