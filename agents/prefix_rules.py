"""How public routers dispatch by prefix, each as one kernel over the nodes of a view: the route to take.

Their numbers are settings here, see `agents.rules`. Routers keep the load of their workers fresh and the prefixes that
they sent them; what a provider knows of peers is in the view: adverts, and what it sent since.
"""

import numpy as np

from wwwserve.agents.decision import LOCAL, ROUTES
from wwwserve.agents.kernel import Bytes, Singles, kernel
from wwwserve.agents.view import (
    CACHED,
    FIRST_TOKEN_S,
    KV_TOKENS,
    PREFILL,
    RUNNING,
    SENT_SINCE,
    UNCACHED,
    WAITING,
)


@kernel
def load_of(node: Singles) -> float:
    """Requests there and those sent since its advert."""
    return float(node[RUNNING] + node[WAITING] + node[SENT_SINCE])


@kernel
def _to_prefill(node: Singles) -> float:
    """Tokens that would be there to prefill; what was sent since the advert is taken to be like this request."""
    return float(node[PREFILL] + (1.0 + node[SENT_SINCE]) * node[UNCACHED])


@kernel
def lmetric(nodes: Singles, routes: Bytes) -> int:
    """LMetric: the least product of tokens to prefill and requests in the batch."""
    best, least = LOCAL, np.inf
    for route in range(LOCAL, ROUTES):
        if routes[route]:
            node = nodes[route - LOCAL]
            score = _to_prefill(node) * (load_of(node) + 1.0)
            if score < least:
                best, least = route, score
    return best


@kernel
def affinity_filter(nodes: Singles, routes: Bytes, share: float, penalty_s: float) -> int:
    """llm-d: among the nodes that have at least this share of the prompt the least tokens to prefill; among all where
    there is none, or the first token would come more than `penalty_s` later there than elsewhere."""
    soonest_s, soonest_with_s = np.inf, np.inf
    for route in range(LOCAL, ROUTES):
        if routes[route]:
            first_s = np.float64(nodes[route - LOCAL, FIRST_TOKEN_S])
            soonest_s = min(soonest_s, first_s)
            if nodes[route - LOCAL, CACHED] >= share:
                soonest_with_s = min(soonest_with_s, first_s)
    stay = soonest_with_s <= soonest_s + penalty_s
    best, least = LOCAL, np.inf
    for route in range(LOCAL, ROUTES):
        if routes[route] and (not stay or nodes[route - LOCAL, CACHED] >= share):
            score = _to_prefill(nodes[route - LOCAL])
            if score < least:
                best, least = route, score
    return best


@kernel
def kv_cost(nodes: Singles, routes: Bytes, weight: float) -> int:
    """Dynamo: the least sum of tokens to prefill, with this weight, and of those in use."""
    best, least = LOCAL, np.inf
    for route in range(LOCAL, ROUTES):
        if routes[route]:
            node = nodes[route - LOCAL]
            score = weight * _to_prefill(node) + node[KV_TOKENS]
            if score < least:
                best, least = route, score
    return best


@kernel
def cache_aware(nodes: Singles, routes: Bytes, match: float, gap: float, ratio: float) -> int:
    """SGLang: the node that has most of the prompt, if more than `match` of it; the least loaded one otherwise, and
    where loads differ by more than `gap` requests and by more than `ratio`."""
    best, most = LOCAL, -1.0
    idle, least, highest = LOCAL, np.inf, 0.0
    for route in range(LOCAL, ROUTES):
        if routes[route]:
            load = load_of(nodes[route - LOCAL])
            highest = max(highest, load)
            if load < least:
                idle, least = route, load
            if nodes[route - LOCAL, CACHED] > most:
                best, most = route, np.float64(nodes[route - LOCAL, CACHED])
    uneven = highest - least > gap and highest > ratio * least
    return best if most > match and not uneven else idle


@kernel
def load_aware(nodes: Singles, routes: Bytes, beta: float) -> int:
    """production-stack: the most of the share that is cached, less `beta` times how far the load is above the mean."""
    count, total = 0, 0.0
    for route in range(LOCAL, ROUTES):
        if routes[route]:
            count += 1
            total += load_of(nodes[route - LOCAL])
    mean = total / max(1, count)
    best, most = LOCAL, -np.inf
    for route in range(LOCAL, ROUTES):
        if routes[route]:
            node = nodes[route - LOCAL]
            score = node[CACHED] - beta * (load_of(node) - mean) / max(1.0, mean)
            if score > most:
                best, most = route, score
    return best


@kernel
def busy_cut(nodes: Singles, routes: Bytes, cut: float) -> int:
    """PlanetServe: of the nodes that are not among the busiest (at most this share of the others has less load), the
    one that has most of the prompt; the least loaded one if none has any."""
    best, most, idle, least = LOCAL, 0.0, LOCAL, np.inf
    for route in range(LOCAL, ROUTES):
        if not routes[route]:
            continue
        load, below, others = load_of(nodes[route - LOCAL]), 0, 0
        if load < least:
            idle, least = route, load
        for other in range(LOCAL, ROUTES):
            if routes[other] and other != route:
                others += 1
                below += load_of(nodes[other - LOCAL]) < load
        if below <= cut * others and nodes[route - LOCAL, CACHED] > most:
            best, most = route, np.float64(nodes[route - LOCAL, CACHED])
    return best if most > 0.0 else idle
