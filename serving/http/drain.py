"""The end of a node without breaking off what it has begun: no new work, a time for what is open, then an error."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from wwwserve.serving.http.reply import Failed

CUT_S = 2.0  # for what is cut off to tell its client so


class Drain:
    """The work of a node that is open, each in a task of its own."""

    def __init__(self) -> None:
        self.begun = False
        self._open: set[asyncio.Task[object]] = set()
        self._cut: set[asyncio.Task[object]] = set()

    @contextmanager
    def work(self) -> Iterator[None]:
        """What the current task does is work. Raises Failed where none is taken any more, and in its middle where its
        time is over."""
        if self.begun:
            raise Failed(503, "this node is shutting down", "overloaded", retry_after_s=1)
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task in self._cut and task.uncancel() == 0:
                raise Failed(503, "this node was shut down before the answer was whole", "overloaded", 1) from None
            raise
        finally:
            self._open.discard(task)
            self._cut.discard(task)

    async def end(self, limit_s: float) -> None:
        """Take no more work, wait for what is open, for `limit_s` at most, and cut off what then still is."""
        self.begun = True
        if self._open and limit_s > 0:
            await asyncio.wait(set(self._open), timeout=limit_s)
        cut = set(self._open)
        self._cut |= cut
        for task in cut:
            task.cancel()
        if cut:
            await asyncio.wait(cut, timeout=CUT_S)
