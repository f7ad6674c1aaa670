"""What a node was like in the last minutes, a row of numbers a second, so that a console that is opened has a past."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from wwwserve.agents.protocol import OUTPUT
from wwwserve.serving.dispatcher import Dispatcher

log = logging.getLogger("wwwserve.console")

KEPT_S = 600
EVERY_S = 1.0
COLUMNS = (
    "at_s",  # of the wall clock
    "running", "waiting", "held", "kv_use",  # now
    "answered", "failed", "on_time", "handed_over", "served", "latency_s",  # totals since the start
    "prompt_tokens", "cached_tokens",  # the same, of prompts of which an engine told
    "price", "cost",  # credits per 1000 output tokens
)  # fmt: skip


def row(node: Dispatcher, wall_s: float) -> list[float]:
    """The numbers of COLUMNS."""
    load, provider, counts = node.engine.load(), node.provider, node.metrics.totals()
    up, tokens = node.engine.healthy, node.metrics.prompts.values()
    now = (load.running, load.waiting, load.kv_tokens / node.engine.profile.kv_tokens) if up else (0.0, 0.0, 0.0)
    return [
        round(wall_s, 2),
        *now[:2], provider.held, round(now[2], 4),
        *(counts[name] for name in ("answered", "failed", "on_time", "handed_over")),
        sum(each.served for each in node.metrics.traffic.values()), round(node.metrics.total_s, 3),
        sum(each.prompt for each in tokens), sum(each.reported for each in tokens),
        round(provider.tariff[OUTPUT], 5), round(provider.cost[OUTPUT], 5),
    ]  # fmt: skip


class History:
    """The rows of one node."""

    def __init__(self, node: Dispatcher, wall_clock: Callable[[], float] = time.time) -> None:
        self._node, self._wall_clock = node, wall_clock
        self._rows: deque[list[float]] = deque(maxlen=int(KEPT_S / EVERY_S))

    def now(self) -> list[float]:
        """The row of this moment."""
        return row(self._node, self._wall_clock())

    def columns(self) -> dict[str, Any]:
        """All rows, by column."""
        columns = zip(*self._rows, strict=True) if self._rows else ((),) * len(COLUMNS)
        return dict(zip(COLUMNS, columns, strict=True))

    async def run(self) -> None:
        """Take a row a second until cancelled."""
        while True:
            try:
                self._rows.append(self.now())
            except Exception:  # whatever one met, the next one is taken
                log.exception("a row of the history met an error")
            await asyncio.sleep(EVERY_S)
