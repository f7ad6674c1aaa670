"""One market as kernels take it, and what its providers say of themselves."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.hardware import BLOCK_TOKENS, KV_BLOCKS
from wwwserve.agents.kernel import inlined, kernel
from wwwserve.agents.knowledge import (
    AD_HELD,
    AD_KV_CAPACITY,
    AD_KV_TOKENS,
    AD_PRICE,
    AD_RUNNING,
    AD_STAKE,
    AD_TIME_S,
    AD_WAITING,
    AD_WEIGHT_S,
    MAX_CLASSES,
    on_scrape,
)
from wwwserve.agents.protocol import MICRO, STAKED


class World(NamedTuple):
    """One market, and room to work in."""

    m: Any  # MARKET record
    p: NDArray[Any]  # [N] PROVIDER
    e: NDArray[Any]  # [N] ENGINE
    q: NDArray[Any]  # [R] REQUEST
    d: NDArray[Any]  # [D] DUEL
    adverts: NDArray[np.float64]  # [N, ADVERT_SIZE]
    dealings: NDArray[np.float64]  # [N, N, DEALINGS_SIZE]
    accounts: NDArray[np.int64]  # [N, ACCOUNT_SIZE]
    done: NDArray[np.int64]  # [R]
    stake: NDArray[np.float64]  # [N]
    eligible: NDArray[np.bool_]  # [N]
    before: NDArray[np.float64]  # [N]
    idle_token_s: NDArray[np.float64]  # [NODES]
    looser_than: NDArray[np.int64]  # [MAX_CLASSES]


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
        markets.dealings[b],
        markets.accounts[b],
        markets.done[b],
        markets.stake[b],
        markets.eligible[b],
        markets.before[b],
        markets.idle_token_s[b],
        markets.looser_than[b],
    )


@kernel
def scrape(w, i):
    """Provider i reads its engine."""
    e = w.e[i]
    tokens = (e.profile[KV_BLOCKS] - e.free_blocks) * BLOCK_TOKENS
    on_scrape(w.p[i].own, w.m.now_s, e.running, e.waiting, tokens, 1.0)


@kernel
def lying(w, i):
    return w.p[i].lie_from_s <= w.m.now_s < w.p[i].lie_until_s


@kernel
def publish(w, i):
    """Send provider i's advert to everyone, its load and speed misreported if it lies."""
    p, advert = w.p[i], w.adverts[i]
    p.own[AD_PRICE] = p.price
    p.own[AD_STAKE] = w.accounts[i, STAKED] / MICRO
    for k in range(advert.size):
        advert[k] = p.own[k]
    advert[AD_TIME_S] = w.m.now_s
    if lying(w, i):
        advert[AD_RUNNING] *= p.lie_load
        advert[AD_WAITING] *= p.lie_load
        advert[AD_KV_TOKENS] *= p.lie_load
        for c in range(MAX_CLASSES):
            advert[AD_HELD + c] *= p.lie_load
        for k in range(AD_WEIGHT_S, AD_KV_CAPACITY):
            advert[k] /= p.lie_speed
