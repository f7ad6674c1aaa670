"""What the console of a node shows."""

import asyncio
from typing import Any

from wwwserve.serving.console.history import History
from wwwserve.serving.dispatcher import Dispatcher
from wwwserve.serving.http.drain import Drain
from wwwserve.serving.overview import overview
from wwwserve.serving.reasons import explain, legend

MOST_PEERS = 64  # that are told, of those with which there is most to do
MOST_CHANNELS = 64
MOST_SERVED = 8  # model names of a peer
MOST_REASONS = 24  # told to who comes new


class NodeSource:
    """Of one node."""

    page = "node.html"

    def __init__(self, dispatcher: Dispatcher, history: History, drain: Drain) -> None:
        self.dispatcher, self.history, self.drain = dispatcher, history, drain
        self._told = dispatcher.reasons.count  # the last decision that was

    def hello(self) -> dict[str, Any]:
        """See `serving.console.app.Source`."""
        d = self.dispatcher
        klasses = zip(d.config.class_names, d.last_deadlines_s, strict=True)
        return {
            "history": self.history.columns(), "legend": legend(),
            "reasons": self._explained(d.reasons.count - MOST_REASONS),
            "classes": [{"name": name, "deadline_s": deadline_s} for name, deadline_s in klasses],
        }  # fmt: skip

    async def snapshot(self) -> dict[str, Any]:
        """See `serving.console.app.Source`."""
        d = self.dispatcher
        seen = overview(d, MOST_PEERS)
        del seen["decisions"]
        for peer in seen["peers"]:
            peer["serves"] = peer["serves"][:MOST_SERVED]
        if seen["ledger"] is not None:
            channels = seen["ledger"]["channels"]
            channels.sort(key=lambda each: (bool(each["disagreement"]), each["paid"] + each["earned"]), reverse=True)
            seen["ledger"] |= {
                "channels": channels[:MOST_CHANNELS], "channels_known": len(channels),
                "totals": {name: sum(each[name] for each in channels) for name in ("free", "escrow", "paid", "earned")},
                "no_channel": seen["ledger"]["no_channel"][:MOST_CHANNELS],
                "stake_lost": seen["ledger"]["stake_lost"][-MOST_CHANNELS:],
            }  # fmt: skip
        reasons, self._told = self._explained(self._told), d.reasons.count
        return seen | {"now": self.history.now(), "reasons": reasons, "ends": self.drain.begun or d.leaving}

    def urgent(self) -> object:
        """See `serving.console.app.Source`."""
        return (
            tuple(each.healthy for each in self.dispatcher.engine.engines),
            tuple(self.dispatcher.peers),
            self.drain.begun,
        )

    def _explained(self, after: int) -> list[dict[str, Any]]:
        now_s, policy = asyncio.get_running_loop().time(), self.dispatcher.provider.policy
        return [explain(each, policy, now_s) for each in self.dispatcher.reasons.since(after)]
