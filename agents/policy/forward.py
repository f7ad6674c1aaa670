"""The learned policy as kernels: from a view to logits, one view at a time, without allocating.

`agents.policy.network` defines the same function for learning; a bundle's golden pairs and a test hold them together.
The simulator calls these kernels for thousands of providers, a node for one.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.decision import ADMITS, HOLD, LOCAL, PRICES, ROUTES
from wwwserve.agents.kernel import Bytes, Singles, kernel
from wwwserve.agents.view import (
    CROWD_S,
    FINISH_S,
    KV_USE,
    NODE_FEATURES,
    NODES,
    OVERDUE,
    OWN,
    PACE,
    RECORD,
    REQUEST_FEATURES,
    SELF_FEATURES,
    SLOWDOWN_S,
    SPEED_RANK,
    WAITING,
    normalise_row,
    scales,
)

Weights = dict[str, NDArray[np.float32]]

FORBIDDEN = np.float32(-1e9)  # the logit of a route that the mask rules out
ABOUT = len(REQUEST_FEATURES) + len(SELF_FEATURES)
LOGITS = ROUTES + ADMITS + PRICES
SHORTEST_S = np.float32(1e-3)

# What the rule within reads of a node: the time to finish there, what it discounts it by, and how full the node is.
EVIDENCE = (FINISH_S, PACE, RECORD, OVERDUE, SLOWDOWN_S, CROWD_S, KV_USE, SPEED_RANK, WAITING)
# Its settings, in what a softplus of 1 stands for: weights of pace, record, overdue, slowdown and crowd; sharpness of
# the preference; KV use above which the fastest node counts as full, and the slowest; how far a full node is avoided.
SETTING_UNITS = (1.0, 1.0, 1.0, 1.0, 10.0, 1.0, 1.0, 1.0, 10.0)
SETTINGS = len(SETTING_UNITS)
FULL_WIDTH = np.float32(0.05)  # of KV use, from hardly full to nearly full


class Net(NamedTuple):
    """Weights [inputs, outputs] and biases of a policy of width W, contiguous; see `agents.policy.network.Actor`."""

    node_in: Singles  # [len(NODE_FEATURES), W]
    about_in: Singles  # [ABOUT, W]
    in_bias: Singles  # [W]
    node_hidden: Singles  # [W, W]
    hidden_bias: Singles
    pool: Singles  # [ABOUT + 2 W, W]
    pool_bias: Singles
    score_node: Singles  # [W, W]
    score_pool: Singles  # [W, W]
    score_bias: Singles
    score: Singles  # [W, 1]
    hold: Singles  # [W, 1]
    heads_bias: Singles  # [2] of score and hold
    admit: Singles  # [W, ADMITS]
    admit_bias: Singles
    price: Singles  # [W, PRICES]
    price_bias: Singles
    setting: Singles  # [W, SETTINGS]
    setting_bias: Singles
    prior: Singles  # [1]


def net_of(w: Weights) -> Net:
    """The kernels' form of a bundle's weights (matrices [outputs, inputs] there)."""

    def turned(name: str) -> Singles:
        return np.ascontiguousarray(w[f"{name}.weight"].T, np.float32)

    return Net(
        node_in=turned("node_in"),
        about_in=turned("about_in"),
        in_bias=w["node_in.bias"] + w["about_in.bias"],
        node_hidden=turned("node_hidden"),
        hidden_bias=w["node_hidden.bias"].copy(),
        pool=turned("pool"),
        pool_bias=w["pool.bias"].copy(),
        score_node=turned("score_node"),
        score_pool=turned("score_pool"),
        score_bias=w["score_node.bias"] + w["score_pool.bias"],
        score=turned("score"),
        hold=turned("hold"),
        heads_bias=np.concatenate([w["score.bias"], w["hold.bias"]]),
        admit=turned("admit"),
        admit_bias=w["admit.bias"].copy(),
        price=turned("price"),
        price_bias=w["price.bias"].copy(),
        setting=turned("setting"),
        setting_bias=w["setting.bias"].copy(),
        prior=w["prior"].reshape(1).copy(),
    )


def room(net: Net) -> Singles:
    """Scratch that `logits` works in: a row for each node and six more."""
    return np.zeros((NODES + 6, net.in_bias.size), np.float32)


_NODE_UNIT, _NODE_TOP = scales(NODE_FEATURES)
_REQUEST_UNIT, _REQUEST_TOP = scales(REQUEST_FEATURES)
_SELF_UNIT, _SELF_TOP = scales(SELF_FEATURES)


@kernel
def normalise_node(row: Singles, out: Singles) -> None:
    """A node's features [len(NODE_FEATURES)] to about [-1, 1]."""
    normalise_row(row, _NODE_UNIT, _NODE_TOP, out)


@kernel
def normalise_about(request: Singles, me: Singles, out: Singles) -> None:
    """The features of request and provider [ABOUT] to about [-1, 1]."""
    normalise_row(request, _REQUEST_UNIT, _REQUEST_TOP, out[: len(REQUEST_FEATURES)])
    normalise_row(me, _SELF_UNIT, _SELF_TOP, out[len(REQUEST_FEATURES) :])


@kernel
def _copy(x: Singles, out: Singles) -> None:
    for k in range(out.size):
        out[k] = x[k]


@kernel
def _add(x: Singles, weight: Singles, out: Singles) -> None:
    """out [O] += x [I] @ weight [I, O]: four inputs at a time, so that `out` is read and written a quarter as often."""
    whole = x.size // 4 * 4
    for i in range(0, whole, 4):
        a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
        if a != 0.0 or b != 0.0 or c != 0.0 or d != 0.0:
            for o in range(out.size):
                out[o] += (a * weight[i, o] + b * weight[i + 1, o]) + (c * weight[i + 2, o] + d * weight[i + 3, o])
    for i in range(whole, x.size):
        for o in range(out.size):
            out[o] += x[i] * weight[i, o]


@kernel
def _relu(x: Singles) -> None:
    for k in range(x.size):
        x[k] = max(x[k], np.float32(0.0))


@kernel
def is_node(row: Singles) -> bool:
    """Whether a row of the view is a node: the own one is flagged, on a candidate a request takes time."""
    return bool(row[OWN] + row[FINISH_S] > 0.0)


@kernel
def _dot(x: Singles, weight: Singles) -> np.float32:
    """x [I] @ weight [I, 1]."""
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * weight[i, 0]
    return total


@kernel
def settings(net: Net, pooled: Singles, out: Singles) -> None:
    """The settings of the rule within [SETTINGS], at least 0, for what is in view."""
    _copy(net.setting_bias, out)
    _add(pooled, net.setting, out)
    for k in range(out.size):
        x = out[k]
        softplus = max(x, np.float32(0.0)) + np.float32(math.log1p(math.exp(-abs(x))))
        out[k] = np.float32(SETTING_UNITS[k]) * softplus


@kernel
def log_time(
    node: Singles, pace: np.float32, record: np.float32, overdue: np.float32, slowdown: np.float32, crowd: np.float32
) -> np.float32:
    """Log of the expected time to finish on a node, s, discounted as `agents.rules.trust_cap` does with these
    weights."""
    trust = math.exp(pace * max(node[PACE], np.float32(0.0)) + record * max(node[RECORD], np.float32(0.0)))
    others_s = slowdown * node[SLOWDOWN_S] + crowd * node[CROWD_S]
    time_s = node[FINISH_S] * np.float32(trust) + overdue * node[OVERDUE] + others_s
    return np.float32(math.log(max(time_s, SHORTEST_S)))


@kernel
def fullness(node: Singles, cap_fast: np.float32, cap_slow: np.float32) -> np.float32:
    """How full a node is, 0 to 1: its KV use against the cap for its speed rank, smoothly; 1 with requests waiting."""
    if node[WAITING] >= 0.5:
        return np.float32(1.0)
    cap = cap_fast + (cap_slow - cap_fast) * node[SPEED_RANK]
    return np.float32(1.0 / (1.0 + math.exp(-(node[KV_USE] - cap) / FULL_WIDTH)))


@kernel
def logits(
    net: Net, nodes: Singles, request: Singles, me: Singles, routes: Bytes, x: Singles, about: Singles, work: Singles,
    out: Singles,
) -> None:  # fmt: skip
    """The logits of one view: `out` [LOGITS] of routes, then admits, then prices.

    nodes [NODES, F], request, me, routes as in `agents.view`; `x` [NODES, F] and `about` [ABOUT] receive the normalised
    features, `x` of nodes alone; `work` is `room`.
    """
    hidden = work[:NODES]
    shared, first, mean, peak, pooled, scored = (
        work[NODES], work[NODES + 1], work[NODES + 2], work[NODES + 3], work[NODES + 4], work[NODES + 5],
    )  # fmt: skip
    width = shared.size
    normalise_about(request, me, about)
    _copy(net.in_bias, shared)
    _add(about, net.about_in, shared)
    mean[:] = np.float32(0.0)
    peak[:] = np.float32(0.0)
    count = np.float32(0.0)
    for n in range(NODES):
        if not is_node(nodes[n]):
            x[n] = np.float32(0.0)
            continue
        count += np.float32(1.0)
        normalise_node(nodes[n], x[n])
        _copy(shared, first)
        _add(x[n], net.node_in, first)
        _relu(first)
        _copy(net.hidden_bias, hidden[n])
        _add(first, net.node_hidden, hidden[n])
        _relu(hidden[n])
        for o in range(width):
            mean[o] += hidden[n, o]
            peak[o] = max(peak[o], hidden[n, o])
    for o in range(width):
        mean[o] /= count
    _copy(net.pool_bias, pooled)
    _add(about, net.pool[:ABOUT], pooled)
    _add(mean, net.pool[ABOUT : ABOUT + width], pooled)
    _add(peak, net.pool[ABOUT + width :], pooled)
    _relu(pooled)
    _copy(net.score_bias, shared)
    _add(pooled, net.score_pool, shared)

    now = out[ROUTES : ROUTES + SETTINGS]  # until admits and prices come there
    settings(net, pooled, now)
    pace, record, overdue, slowdown, crowd, sharpness = now[0], now[1], now[2], now[3], now[4], now[5]
    cap_fast, cap_slow, avoid = now[6], now[7], now[8]
    prior = net.prior[0] * sharpness
    route = out[:ROUTES]
    route[:] = FORBIDDEN
    least, emptiest = np.float32(np.inf), np.float32(np.inf)
    for n in range(NODES):
        if routes[LOCAL + n] and is_node(nodes[n]):
            full = avoid * fullness(nodes[n], cap_fast, cap_slow)
            cost = prior * log_time(nodes[n], pace, record, overdue, slowdown, crowd) + full
            route[LOCAL + n] = cost
            least, emptiest = min(least, cost), min(emptiest, full)
    for n in range(NODES):
        if routes[LOCAL + n] and is_node(nodes[n]):
            _copy(shared, scored)
            _add(hidden[n], net.score_node, scored)
            _relu(scored)
            route[LOCAL + n] = net.heads_bias[0] + _dot(scored, net.score) - (route[LOCAL + n] - least)
    if routes[HOLD]:
        route[HOLD] = net.heads_bias[1] + _dot(pooled, net.hold)
        if emptiest < np.inf:
            route[HOLD] += emptiest
    _copy(net.admit_bias, out[ROUTES : ROUTES + ADMITS])
    _add(pooled, net.admit, out[ROUTES : ROUTES + ADMITS])
    _copy(net.price_bias, out[ROUTES + ADMITS :])
    _add(pooled, net.price, out[ROUTES + ADMITS :])
