"""The learned policy as kernels: from a view to logits, one view at a time, without allocating.

`agents.policy.network` defines the same function for learning; a bundle's golden pairs and a test hold them together.
The simulator calls these kernels for thousands of providers, a node for one.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.decision import ADMISSION_SIZE, HOLD, LOCAL, NODES, ROUTES, Actions, admit_what_pays
from wwwserve.agents.kernel import Bools, Bytes, Floats, Ints32, Singles, kernel
from wwwserve.agents.policy.architecture import (
    ABOUT,
    FORBIDDEN,
    FULL_WIDTH,
    KEEP,
    LOGITS,
    MOST_LATENESS,
    PAYS,
    SETTING_UNITS,
    SETTINGS,
    SHORTEST_S,
    Layers,
    Weights,
)
from wwwserve.agents.view import (
    FINISH_S,
    KV_USE,
    LOAD_S,
    NODE_FEATURES,
    OVERDUE,
    OWN,
    PACE,
    RECORD,
    REQUEST_FEATURES,
    SELF_FEATURES,
    SLOWDOWN_S,
    SPEED_RANK,
    UTILITY,
    WAITING,
    Views,
    normalise_row,
    scales,
)


class Linear(NamedTuple):
    """A layer as the kernels read it, contiguous."""

    weight: Singles  # [inputs, outputs]
    bias: Singles  # [outputs]


class Net(NamedTuple):
    """A policy as the kernels read it."""

    layers: Layers[Linear]
    prior: Singles  # [1]
    pays: Singles  # [1] share of its cost that others' work has to bring
    keep: Singles  # [1] how much dearer it sells for the share of prompts in its cache


def net_of(weights: Weights) -> Net:
    """The kernels' form of weights, whose matrices are [outputs, inputs]."""
    layers = (
        Linear(np.ascontiguousarray(weights[f"{name}.weight"].T, np.float32), weights[f"{name}.bias"].copy())
        for name in Layers._fields
    )
    return Net(Layers(*layers), *(weights[name].reshape(1).copy() for name in ("prior", PAYS, KEEP)))


def scratch(net: Net) -> Singles:
    """What `logits` works in: a row for each node and six more."""
    return np.zeros((NODES + 6, net.layers.node_in.bias.size), np.float32)


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
def _plus(x: Singles, out: Singles) -> None:
    for k in range(out.size):
        out[k] += x[k]


@kernel
def _linear(x: Singles, layer: Linear, out: Singles) -> None:
    """out [O] = x [I] through a layer."""
    _copy(layer.bias, out)
    _add(x, layer.weight, out)


@kernel
def _relu(x: Singles) -> None:
    for k in range(x.size):
        x[k] = max(x[k], np.float32(0.0))


@kernel
def is_node(row: Singles) -> bool:
    """Whether a row of the view is a node: the own one is flagged, on a candidate a request takes time."""
    return bool(row[OWN] + row[FINISH_S] > 0.0)


@kernel
def _one(x: Singles, layer: Linear) -> np.float32:
    """x [I] through a layer of one output."""
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * layer.weight[i, 0]
    return np.float32(layer.bias[0] + total)


@kernel
def settings(net: Net, pooled: Singles, out: Singles) -> None:
    """The settings of the rule within [SETTINGS], at least 0, for what is in view."""
    _linear(pooled, net.layers.setting, out)
    for k in range(out.size):
        x = out[k]
        softplus = max(x, np.float32(0.0)) + np.float32(math.log1p(math.exp(-abs(x))))
        out[k] = np.float32(SETTING_UNITS[k]) * softplus


@kernel
def log_time(
    node: Singles, pace: np.float32, record: np.float32, overdue: np.float32, slowdown: np.float32, load: np.float32
) -> np.float32:
    """Log of the expected time to finish on a node, s, discounted as `agents.rules.trust_cap` does with these
    weights."""
    lateness = pace * max(node[PACE], np.float32(0.0)) + record * max(node[RECORD], np.float32(0.0))
    trust = math.exp(min(lateness, MOST_LATENESS))
    others_s = slowdown * node[SLOWDOWN_S] + load * node[LOAD_S]
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
    """The logits of one view: `out` [LOGITS] of routes, then markups.

    nodes [NODES, F], request, me, routes as in `agents.view`; `x` [NODES, F] and `about` [ABOUT] receive the normalised
    features, `x` of nodes alone; `work` is `scratch`.
    """
    at = net.layers
    hidden = work[:NODES]
    shared, first, mean, peak, pooled, scored = (
        work[NODES], work[NODES + 1], work[NODES + 2], work[NODES + 3], work[NODES + 4], work[NODES + 5],
    )  # fmt: skip
    width = shared.size
    normalise_about(request, me, about)
    _copy(at.node_in.bias, shared)
    _plus(at.about_in.bias, shared)
    _add(about, at.about_in.weight, shared)
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
        _add(x[n], at.node_in.weight, first)
        _relu(first)
        _linear(first, at.node_hidden, hidden[n])
        _relu(hidden[n])
        for o in range(width):
            mean[o] += hidden[n, o]
            peak[o] = max(peak[o], hidden[n, o])
    for o in range(width):
        mean[o] /= count
    _copy(at.pool.bias, pooled)
    _add(about, at.pool.weight[:ABOUT], pooled)
    _add(mean, at.pool.weight[ABOUT : ABOUT + width], pooled)
    _add(peak, at.pool.weight[ABOUT + width :], pooled)
    _relu(pooled)
    _copy(at.score_node.bias, shared)
    _plus(at.score_pool.bias, shared)
    _add(pooled, at.score_pool.weight, shared)

    now = out[:SETTINGS]  # until routes come there
    settings(net, pooled, now)
    pace, record, overdue, slowdown, load, sharpness = now[0], now[1], now[2], now[3], now[4], now[5]
    cap_fast, cap_slow, avoid, greed = now[6], now[7], now[8], now[9]
    prior = net.prior[0]
    route = out[:ROUTES]
    route[:] = FORBIDDEN
    least, emptiest = np.float32(np.inf), np.float32(np.inf)
    for n in range(NODES):
        if routes[LOCAL + n] and is_node(nodes[n]):
            full = avoid * fullness(nodes[n], cap_fast, cap_slow)
            preferred = sharpness * log_time(nodes[n], pace, record, overdue, slowdown, load)
            cost = prior * (preferred - greed * nodes[n, UTILITY]) + full
            route[LOCAL + n] = cost
            least, emptiest = min(least, cost), min(emptiest, full)
    for n in range(NODES):
        if routes[LOCAL + n] and is_node(nodes[n]):
            _copy(shared, scored)
            _add(hidden[n], at.score_node.weight, scored)
            _relu(scored)
            route[LOCAL + n] = _one(scored, at.score) - (route[LOCAL + n] - least)
    if routes[HOLD]:
        route[HOLD] = _one(pooled, at.hold)
        if emptiest < np.inf:
            route[HOLD] += emptiest
    _linear(pooled, at.markup, out[ROUTES:])


class LearnedPolicy:
    """A policy by its weights; it takes the most probable choice."""

    def __init__(self, weights: Weights, manifest: dict[str, Any]) -> None:
        """`manifest` is the bundle's, which names the policy; else `learned`."""
        self.weights = weights
        self.manifest = manifest
        self.name = str(manifest.get("name", "learned"))
        self._net = net_of(weights)
        self._scratch = (
            scratch(self._net), np.zeros((NODES, len(NODE_FEATURES)), np.float32), np.zeros(ABOUT, np.float32)
        )  # fmt: skip

    def decide(self, views: Views, active: NDArray[np.bool_], uniforms: NDArray[np.float64], actions: Actions) -> None:
        """See `agents.rules.Policy.decide`; the uniforms are not used. `actions` must be contiguous arrays."""
        if not all(array.flags.c_contiguous for array in actions):
            raise ValueError("actions must be contiguous arrays, or what is written to them is lost")
        nodes, request, me, routes = views
        flat = Views(
            nodes.reshape(-1, *nodes.shape[-2:]), request.reshape(-1, request.shape[-1]), me.reshape(-1, me.shape[-1]),
            routes.reshape(-1, routes.shape[-1]),
        )  # fmt: skip
        work, x, about = self._scratch
        _decide(
            self._net, flat, active.reshape(-1), x, about, work, np.zeros(LOGITS, np.float32),
            actions.route.reshape(-1), actions.admission.reshape(-1, ADMISSION_SIZE), actions.markup.reshape(-1),
        )  # fmt: skip

    def logits(self, views: Views) -> NDArray[np.float32]:
        """Logits [M, LOGITS] of views [M]: of routes, then markups."""
        work, x, about = self._scratch
        out = np.zeros((len(views.me), LOGITS), np.float32)
        _logits(self._net, views, x, about, work, out)
        return out


@kernel
def _logits(net: Net, views: Views, x: Singles, about: Singles, work: Singles, out: Singles) -> None:
    for k in range(out.shape[0]):
        logits(net, views.nodes[k], views.request[k], views.me[k], views.routes[k], x, about, work, out[k])


@kernel
def _decide(
    net: Net, views: Views, active: Bools, x: Singles, about: Singles, work: Singles, out: Singles,
    route: Ints32, admission: Floats, markup: Ints32,
) -> None:  # fmt: skip
    for k in range(active.size):
        if active[k]:
            logits(net, views.nodes[k], views.request[k], views.me[k], views.routes[k], x, about, work, out)
            route[k] = np.argmax(out[:ROUTES])
            admit_what_pays(admission[k], net.pays[0], net.keep[0])
            markup[k] = np.argmax(out[ROUTES:])
