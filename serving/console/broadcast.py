"""Snapshots for all who listen: each is made once, a second after the one before, and only while somebody listens."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

log = logging.getLogger("wwwserve.console")

INTERVAL_S = 1.0
LOOK_S = 0.25  # between two looks at whether something changed that is not to wait for a second
MOST_LISTENERS = 32


class Broadcast:
    """One stream of snapshots. Who reads too slowly misses some."""

    def __init__(self, make: Callable[[], Awaitable[bytes]], urgent: Callable[[], object]) -> None:
        """A change of what `urgent` returns is told at the next look."""
        self.listeners, self.closed = 0, False
        self._make, self._urgent = make, urgent
        self._next: asyncio.Future[bytes | None] | None = None
        self._making: asyncio.Task[None] | None = None

    @property
    def is_full(self) -> bool:
        """Whether as many listen as may."""
        return self.listeners >= MOST_LISTENERS

    async def listen(self) -> AsyncGenerator[bytes, None]:
        """Snapshots as they are made, until it is closed."""
        self.listeners += 1
        try:
            if self._making is None:
                self._next = asyncio.get_running_loop().create_future()
                self._making = asyncio.create_task(self._keep_making())
            while not self.closed:
                assert self._next is not None
                snapshot = await asyncio.shield(self._next)
                if snapshot is None:
                    return
                yield snapshot
        finally:
            self.listeners -= 1
            if not self.listeners and self._making is not None:
                self._making.cancel()
                self._making = None

    def close(self) -> None:
        """End all that listen, and whoever comes later at once."""
        self.closed = True
        if self._next is not None and not self._next.done():
            self._next.set_result(None)

    async def _keep_making(self) -> None:
        loop = asyncio.get_running_loop()
        while not self.closed:
            until_s, before = loop.time() + INTERVAL_S, self._urgent()
            try:
                made = await self._make()
            except Exception:  # whatever one met, the next one is made
                log.exception("a console's snapshot met an error")
            else:
                assert self._next is not None
                made_for, self._next = self._next, loop.create_future()
                if not made_for.done():
                    made_for.set_result(made)
            while True:
                await asyncio.sleep(min(LOOK_S, max(0.0, until_s - loop.time())))
                if self.closed or loop.time() >= until_s or self._urgent() != before:
                    break
