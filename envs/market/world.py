"""One market as kernels take it."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.kernel import inlined, kernel
from wwwserve.agents.knowledge import Peers
from wwwserve.agents.protocol import FREE
from wwwserve.agents.provider import Scratch, write_credit
from wwwserve.agents.view import ViewScratch
from wwwserve.envs.prefix_cache import Cache


class World(NamedTuple):
    """One market, and scratch buffers."""

    m: Any  # MARKET record
    p: NDArray[Any]  # [N] PROVIDER
    e: NDArray[Any]  # [N] ENGINE
    q: NDArray[Any]  # [R] REQUEST
    d: NDArray[Any]  # [D] DUEL
    adverts: NDArray[np.float64]  # [N, ADVERT_SIZE]
    sent_adverts: NDArray[np.float64]  # [N, ADVERT_SIZE]
    peer_stats: NDArray[np.float64]  # [N, N, PEER_STATS_SIZE]
    accounts: NDArray[np.int64]  # [N, ACCOUNT_SIZE]
    tree: NDArray[Any]  # [S] NODE
    cached: NDArray[Any]  # [N, S] CACHED
    heard_s: NDArray[np.float64]  # [N, S]
    turns: NDArray[np.int32]  # [R]
    done: NDArray[np.int64]  # [R]
    draw: Scratch  # [N]
    serves: NDArray[np.bool_]  # [N]
    acted: NDArray[np.bool_]  # [N]
    touched: NDArray[np.bool_]  # [N]
    wake_s: NDArray[np.float64]  # [N]
    credit: NDArray[np.int64]  # [N]
    before: NDArray[np.float64]  # [N]
    viewing: ViewScratch


@inlined
def world_of(markets, b):
    """Market `b` of a batch."""
    return World(
        markets.market[b],
        markets.providers[b],
        markets.engines[b],
        markets.requests[b],
        markets.duels[b],
        markets.adverts[b],
        markets.sent_adverts[b],
        markets.peer_stats[b],
        markets.accounts[b],
        markets.tree[b],
        markets.cached[b],
        markets.heard_s[b],
        markets.turns[b],
        markets.done[b],
        Scratch(markets.stake[b], markets.eligible[b]),
        markets.serves[b],
        markets.acted[b],
        markets.touched[b],
        markets.wake_s[b],
        markets.credit[b],
        markets.before[b],
        ViewScratch(markets.idle_token_s[b], markets.looser_than[b]),
    )


@inlined
def cache_of(w, i):
    """The prefix cache of provider i's engine."""
    return Cache(w.tree, w.cached[i])


@kernel
def peers_of(w, i):
    """What provider i knows of the others, as things stand."""
    write_credit(w.p[i], w.accounts[i], w.m, w.q, w.credit)
    return Peers(w.adverts, w.peer_stats[i], w.credit)


@kernel
def unpaid(w, i):
    """The same without what may be put in escrow with each, for a provider that has no request to decide on."""
    w.p[i].credit = w.accounts[i, FREE]
    return Peers(w.adverts, w.peer_stats[i], w.credit)


@kernel
def count_remote(w, j, change):
    """Provider j has so many more of peers' requests in its engine."""
    w.p[j].remote += change
    w.m.remote += change


@kernel
def set_wake(w, i):
    """Note until when nothing happens by itself at provider i: its engine or its advert has changed."""
    w.wake_s[i] = min(w.e[i].wake_s, w.p[i].advert_lands_s)


@kernel
def lying(w, i):
    """Whether provider i misreports now."""
    return w.p[i].lie_from_s <= w.m.now_s < w.p[i].lie_until_s


@kernel
def claimed_by(w, j, first_s, token_s):
    """The times that provider j promises: those that it expects, unless it lies."""
    if lying(w, j):
        p = w.p[j]
        first_s *= p.lie_promise * p.lie_load / p.lie_speed
        token_s *= p.lie_promise / p.lie_speed
    return first_s, token_s
