"""Policies by hand, on the same view and under the same contract as the learned ones.

A rule is a kernel that picks a route for one view; `Rule` applies it to a batch of providers or to one. What a rule
accepts of others' work it says in its terms, which `agents.decision.accept` applies to the fresh state of the node.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from agents.decision import (
    FIRST_CANDIDATE,
    HOLD,
    LOCAL,
    MAX_KV_USE,
    MAX_WAIT_S,
    ONLY_IF_NONE_HELD,
    PRICES,
    PROBABILITY,
    ROUTES,
    Actions,
)
from agents.kernel import Bools, Bytes, Floats, Ints32, Singles, kernel
from agents.protocol import TARGET_KV_USE
from agents.view import (
    CHANCE,
    COST,
    FINISH_S,
    HAS_REQUEST,
    KV_USE,
    LAST_SLACK_S,
    LOOSENESS,
    N_CANDIDATES,
    OVERDUE,
    PACE,
    RECORD,
    RUNNING,
    SENT_SINCE,
    SPEED_RANK,
    VALUE,
    WAITING,
    Views,
)


class Policy(Protocol):
    """What decides for providers, by hand or learned."""

    name: str

    def decide(self, views: Views, active: Bools, dice: Floats, actions: Actions) -> None:
        """Write the decisions of the `active` [...] providers into `actions` [...].

        `dice` [..., 4]: uniforms in (0, 1), the policy's only source of chance; a request that was refused comes back
        with the same ones.
        """


class Setting(NamedTuple):
    """One number of a rule, 0 to `high`."""

    default: float
    meaning: str
    high: float = 1e9


ACCEPT_WAIT_S = Setting(30.0, "longest expected time to the first token, s, at which others' work is taken")
OWN_MARGIN = Setting(1.0, "a peer must be expected to finish in less than this times the own time")

RULES: dict[str, dict[str, Setting]] = {
    "single": {},
    "random": {},
    "power_of_two": {},
    "www_serve": {
        "target_kv_use": Setting(TARGET_KV_USE, "KV use below which a request runs here, and others' work is taken"),
        "offload": Setting(0.8, "chance to look for a peer, each time", 1.0),
        "queue": Setting(0.2, "chance to queue here when no peer takes it", 1.0),
        "accept": Setting(0.8, "chance to take others' work", 1.0),
        "probes": Setting(3, "peers probed, at most"),
    },
    "earliest_finish": {"accept_wait_s": ACCEPT_WAIT_S, "own_margin": OWN_MARGIN},
    "earliest_finish_trust": {
        "accept_wait_s": ACCEPT_WAIT_S,
        "own_margin": OWN_MARGIN,
        "pace": Setting(1.0, "exponent of the in-flight evidence", 10.0),
        "record": Setting(1.0, "exponent of the record of completed work", 10.0),
        "overdue": Setting(1.0, "seconds added for each second overdue"),
    },
    "deadline_first": {
        "accept_wait_s": ACCEPT_WAIT_S,
        "own_margin": OWN_MARGIN,
        "urgency": Setting(2.0, "loose work is placed when its slack is less than this times its expected time"),
    },
    "rank_cap": {
        "accept_wait_s": ACCEPT_WAIT_S,
        "own_margin": OWN_MARGIN,
        "urgency": Setting(2.0, "loose work goes anywhere when its slack is less than this times its expected time"),
        "cap_fast": Setting(0.3, "KV use up to which the fastest node takes loose work"),
        "cap_slow": Setting(0.8, "and the slowest"),
    },
    "best_value": {"accept_wait_s": ACCEPT_WAIT_S, "price_slope": Setting(4.0, "own price bin at full KV use")},
}
_IDS = {name: k for k, name in enumerate(RULES)}
(
    _SINGLE, _RANDOM, _POWER_OF_TWO, _WWW_SERVE, _EARLIEST, _TRUST, _DEADLINE_FIRST, _RANK_CAP, _BEST_VALUE,
) = range(len(RULES))  # fmt: skip


@kernel
def _node_of(route: int) -> int:
    """Row of the view's nodes that a route leads to."""
    return route - LOCAL


@kernel
def _earliest(nodes: Singles, routes: Bytes, own_margin: float, pace: float, record: float, overdue: float) -> int:
    """The legal route that is expected to finish first, peers' times discounted by what is known of their delivery."""
    best = LOCAL
    soonest_s = nodes[0, FINISH_S] * own_margin
    for route in range(FIRST_CANDIDATE, ROUTES):
        if routes[route]:
            node = nodes[_node_of(route)]
            trust = math.exp(pace * max(0.0, node[PACE]) + record * max(0.0, node[RECORD]))
            finish_s = node[FINISH_S] * trust + overdue * node[OVERDUE]
            if finish_s < soonest_s:
                best, soonest_s = route, finish_s
    return best


@kernel
def _random(routes: Bytes, u: float) -> int:
    """One of the legal routes other than hold."""
    legal = 0
    for route in range(LOCAL, ROUTES):
        legal += routes[route]
    skip = min(int(u * legal), legal - 1)
    for route in range(LOCAL, ROUTES):
        if routes[route]:
            if skip == 0:
                return route
            skip -= 1
    return LOCAL


@kernel
def _load(node: Singles) -> float:
    return float(node[RUNNING] + node[WAITING] + node[SENT_SINCE])


@kernel
def _www_serve(p: Floats, nodes: Singles, request: Singles, routes: Bytes, dice: Floats) -> int:
    """The published dispatch: here while there is room, else a peer drawn by stake, else the own queue or wait."""
    if nodes[0, KV_USE] < p[0]:
        return LOCAL
    if dice[0] < p[1]:
        for k in range(min(int(request[N_CANDIDATES]), int(p[4]))):
            if routes[FIRST_CANDIDATE + k]:
                return FIRST_CANDIDATE + k
    if dice[1] < p[2]:
        return LOCAL
    return HOLD


@kernel
def _capped(nodes: Singles, routes: Bytes, cap_fast: float, cap_slow: float) -> int:
    """The earliest finish among nodes whose KV use is under their cap by speed rank; hold if there is none."""
    best = HOLD
    soonest_s = np.inf
    for route in range(LOCAL, ROUTES):
        if routes[route]:
            node = nodes[_node_of(route)]
            cap = cap_fast + (cap_slow - cap_fast) * node[SPEED_RANK]
            if node[KV_USE] < cap and node[WAITING] < 0.5 and node[FINISH_S] < soonest_s:
                best, soonest_s = route, node[FINISH_S]
    return best


@kernel
def _best_value(nodes: Singles, request: Singles, routes: Bytes) -> int:
    """The most expected value less payment; among equals the earliest finish."""
    best = LOCAL
    most = -np.inf
    for route in range(LOCAL, ROUTES):
        if routes[route]:
            node = nodes[_node_of(route)]
            worth = np.float64(request[VALUE]) * node[CHANCE] - node[COST] - np.float64(node[FINISH_S]) * 1e-4
            if worth > most:
                best, most = route, worth
    return best


@kernel
def choose(rule: int, p: Floats, nodes: Singles, request: Singles, routes: Bytes, dice: Floats) -> int:
    """The route of one view by the rule of this number with settings `p`; it may hold where the mask forbids that."""
    if rule == _SINGLE:
        return LOCAL
    if rule == _RANDOM:
        return _random(routes, dice[0])
    if rule == _POWER_OF_TWO:
        a, b = _random(routes, dice[0]), _random(routes, dice[1])
        return b if _load(nodes[_node_of(b)]) < _load(nodes[_node_of(a)]) else a
    if rule == _WWW_SERVE:
        return _www_serve(p, nodes, request, routes, dice)
    if rule == _EARLIEST:
        return _earliest(nodes, routes, p[1], 0.0, 0.0, 0.0)
    if rule == _TRUST:
        return _earliest(nodes, routes, p[1], p[2], p[3], p[4])
    if rule == _BEST_VALUE:
        return _best_value(nodes, request, routes)
    best = _earliest(nodes, routes, p[1], 0.0, 0.0, 0.0)
    if request[LOOSENESS] > 0.0 and request[LAST_SLACK_S] > p[2] * nodes[_node_of(best), FINISH_S]:
        if rule == _RANK_CAP:
            return _capped(nodes, routes, p[3], p[4])
        if nodes[_node_of(best), KV_USE] > TARGET_KV_USE or nodes[_node_of(best), WAITING] > 0.5:
            return HOLD
    return best


@kernel
def _decide(
    rule: int,
    p: Floats,
    nodes: Singles,
    request: Singles,
    me: Singles,
    routes: Bytes,
    active: Bools,
    dice: Floats,
    route: Ints32,
    terms: Floats,
    price: Ints32,
) -> None:
    for k in range(active.size):
        if not active[k]:
            continue
        route[k] = HOLD
        if me[k, HAS_REQUEST] > 0.5:
            route[k] = choose(rule, p, nodes[k], request[k], routes[k], dice[k])
            if route[k] == HOLD and not routes[k, HOLD]:  # past its last deadline a request is held no longer
                route[k] = LOCAL
        terms[k, MAX_WAIT_S] = np.inf
        terms[k, MAX_KV_USE] = np.inf
        terms[k, PROBABILITY] = 1.0
        terms[k, ONLY_IF_NONE_HELD] = 0.0
        price[k] = 1
        if rule == _WWW_SERVE:
            terms[k, MAX_KV_USE] = p[0]
            terms[k, PROBABILITY] = p[3]
            terms[k, ONLY_IF_NONE_HELD] = 1.0
        elif rule >= _EARLIEST:
            terms[k, MAX_WAIT_S] = p[0]
        if rule == _BEST_VALUE:
            price[k] = min(int(p[1] * nodes[k, 0, KV_USE]), PRICES - 1)


class Rule:
    """A rule by name, with its settings; those not given have their tuned defaults."""

    def __init__(self, name: str, settings: Mapping[str, float] | None = None) -> None:
        """Raises ValueError for an unknown name or setting, and for a setting out of its range."""
        if name not in RULES:
            raise ValueError(f"unknown rule {name!r}, expected one of {', '.join(RULES)}")
        unknown = set(settings or ()) - set(RULES[name])
        if unknown:
            known = ", ".join(RULES[name]) or "none"
            raise ValueError(f"rule {name} has no setting {sorted(unknown)[0]!r}, it has: {known}")
        self.name = name
        self.settings = {key: float((settings or {}).get(key, s.default)) for key, s in RULES[name].items()}
        for key, value in self.settings.items():
            high = RULES[name][key].high
            if not 0.0 <= value <= high:
                raise ValueError(f"rule {name}: setting {key} is {value!r}, expected 0 to {high:g}")
        self._id = _IDS[name]
        self._values = np.array([*self.settings.values(), 0.0])

    def decide(self, views: Views, active: Bools, dice: Floats, actions: Actions) -> None:
        """See `Policy.decide`. `actions` must be contiguous arrays."""
        if not all(array.flags.c_contiguous for array in actions):
            raise ValueError("actions must be contiguous arrays, or what is written to them is lost")
        _decide(
            self._id,
            self._values,
            views.nodes.reshape(-1, *views.nodes.shape[-2:]),
            views.request.reshape(-1, views.request.shape[-1]),
            views.me.reshape(-1, views.me.shape[-1]),
            views.routes.reshape(-1, ROUTES),
            active.reshape(-1),
            dice.reshape(-1, dice.shape[-1]),
            actions.route.reshape(-1),
            actions.terms.reshape(-1, actions.terms.shape[-1]),
            actions.price.reshape(-1),
        )
