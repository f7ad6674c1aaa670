"""Why a node decided as it did: what it saw of each candidate when it made its last decisions.

A decision is copied out of the provider's view as it is made, at most `PER_S` in a second, so that a busy node loses no
time by it; what the policy makes of a view is worked out when somebody asks.
"""

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from wwwserve.agents.decision import HOLD, LOCAL, ROUTES
from wwwserve.agents.policy.forward import LearnedPolicy
from wwwserve.agents.rules import Policy
from wwwserve.agents.view import NODE_FEATURES, REQUEST_FEATURES, Views
from wwwserve.serving.fallback import WithFallback
from wwwserve.serving.node_provider import Decision, NodeProvider

KEPT = 48
PER_S = 8


class Reason(NamedTuple):
    """One decision, and what it was made on."""

    number: int  # from 1, of those that were kept
    at_s: float  # by the event loop's clock
    klass: str
    route: int
    view: Views  # [1]
    peers: list[str]  # the candidates, in the order of the view


class Reasons:
    """The last decisions of a node."""

    def __init__(self) -> None:
        self.kept: deque[Reason] = deque(maxlen=KEPT)
        self.count = 0
        self._second_s, self._in_second = -math.inf, 0

    def keep(self, provider: NodeProvider, decision: Decision, klass: str) -> None:
        """Keep what `provider` has just decided, and has in its view still, unless enough is kept in this second."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._second_s + 1.0:
            self._second_s, self._in_second = now_s, 0
        if self._in_second == PER_S:
            return
        self._in_second += 1
        self.count += 1
        nodes, request, me, routes = provider.view
        view = Views(nodes.copy(), request.copy(), me.copy(), routes.copy())
        peers = provider.candidates(decision.request)
        self.kept.append(Reason(self.count, now_s, klass, decision.route, view, peers))

    def since(self, number: int) -> list[Reason]:
        """Those kept after the one of a number."""
        return [each for each in self.kept if each.number > number]


def explain(reason: Reason, policy: Policy, now_s: float) -> dict[str, Any]:
    """A decision for people: where the request went, and of each place that it could have gone to what was seen, in the
    order of `agents.view.NODE_FEATURES`, whether it was legal, and how probable it was to a policy that has
    probabilities. `now_s` is by the event loop's clock."""
    nodes, request, _, routes = (array[0] for array in reason.view)
    probable = probabilities(policy, reason.view)
    places = ["local", *reason.peers]
    return {
        "number": reason.number, "ago_s": round(now_s - reason.at_s, 2), "class": reason.klass,
        "to": "hold" if reason.route == HOLD else places[reason.route - LOCAL],
        "request": request,
        "hold": {"legal": bool(routes[HOLD]), "probability": None if probable is None else probable[HOLD]},
        "places": [
            {
                "place": place, "legal": bool(routes[LOCAL + k]), "seen": nodes[k],
                "probability": None if probable is None else probable[LOCAL + k],
            } for k, place in enumerate(places)
        ],
    }  # fmt: skip


def probabilities(policy: Policy, view: Views) -> list[float] | None:
    """Of each route [ROUTES] in a view [1], as the policy has them; a node takes the most probable. None for a rule,
    and for a view on which a policy does not decide."""
    inner = policy.policy if isinstance(policy, WithFallback) else policy
    if not isinstance(inner, LearnedPolicy):
        return None
    logits = inner.logits(view)[0].astype(np.float64)
    if not np.isfinite(logits).all():
        return None
    weights = np.exp(logits[:ROUTES] - logits[:ROUTES].max())
    return [round(each, 4) for each in (weights / weights.sum()).tolist()]


def legend() -> dict[str, Any]:
    """What the numbers of `explain` are."""

    def told(features: Sequence[Any]) -> list[dict[str, str]]:
        return [{"name": each.name, "unit": each.unit, "meaning": each.meaning} for each in features]

    return {
        "node": told(NODE_FEATURES), "request": told(REQUEST_FEATURES), "kept_per_s": PER_S,
    }  # fmt: skip
