"""What a provider decides: where the request at the head goes, on what terms it takes others' work, at what price.

`route` is 0 to hold, 1 to run here, 2 + k for candidate k. `admit` picks the longest expected wait at which an offer
is taken, `price` one of the market's prices. A route that the mask forbids becomes hold, and is counted by the caller.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.kernel import Floats, Ints, Ints32, Record, kernel
from wwwserve.agents.knowledge import AD_PRICE, AD_TIME_S, NO_TIME, Peers
from wwwserve.agents.protocol import MICRO, price_of

CANDIDATES = 8  # K
HOLD, LOCAL, FIRST_CANDIDATE = 0, 1, 2
ROUTES = FIRST_CANDIDATE + CANDIDATES
ADMIT_WAIT_S = np.array([-1.0, 0.5, 5.0, 20.0, 60.0, np.inf])  # first is never, last is always
ADMITS = ADMIT_WAIT_S.size
PRICES = 8  # most prices a market may post
FLAT_ACTIONS = ROUTES * ADMITS * PRICES

# Columns of the terms on which a provider takes others' work.
MAX_WAIT_S = 0
MAX_KV_USE = 1
PROBABILITY = 2
ONLY_IF_NONE_HELD = 3  # 1 to refuse while own users' requests are undecided
TERMS_SIZE = 4
NO_DIRECTION = -1


class Actions(NamedTuple):
    """One decision for each of a batch of providers, leading axes [...]."""

    route: Ints32  # [...] 0 to ROUTES - 1
    terms: Floats  # [..., TERMS_SIZE]
    price: Ints32  # [...] index into the market's prices
    direct: Ints32  # [...] provider to send to, past its terms; only a router that sees everything sets it


def make_actions(*shape: int) -> Actions:
    """Hold, accept always, lowest price."""
    actions = Actions(
        route=np.zeros(shape, np.int32),
        terms=np.zeros((*shape, TERMS_SIZE)),
        price=np.zeros(shape, np.int32),
        direct=np.full(shape, NO_DIRECTION, np.int32),
    )
    actions.terms[...] = (np.inf, np.inf, 1.0, 0.0)
    return actions


@kernel
def write_terms(terms: Floats, admit: int) -> None:
    """Write the terms [TERMS_SIZE] that stand for `admit`, 0 to ADMITS - 1."""
    terms[MAX_WAIT_S] = ADMIT_WAIT_S[admit]
    terms[MAX_KV_USE] = np.inf
    terms[PROBABILITY] = 1.0
    terms[ONLY_IF_NONE_HELD] = 0.0


@kernel
def _write_all(terms: Floats, admit: Ints) -> None:
    for k in range(admit.size):
        write_terms(terms[k], admit[k])


def set_admit(actions: Actions, admit: NDArray[np.integer]) -> None:
    """Write the terms that stand for `admit` [...], 0 to ADMITS - 1, into `actions`, whose terms are contiguous."""
    _write_all(actions.terms.reshape(-1, TERMS_SIZE), np.asarray(admit, np.int64).reshape(-1))


def encode(route: NDArray[np.integer], admit: NDArray[np.integer], price: NDArray[np.integer]) -> Ints:
    """One number, 0 to FLAT_ACTIONS - 1, for the three choices."""
    return np.asarray((np.asarray(route, np.int64) * ADMITS + admit) * PRICES + price, np.int64)


def decode(flat: NDArray[np.integer]) -> tuple[Ints, Ints, Ints]:
    """Route, admit and price of a flat action."""
    number: Ints = np.asarray(flat, np.int64)
    return number // (ADMITS * PRICES), number // PRICES % ADMITS, number % PRICES


@kernel
def may_hold(waited_s: float, last_deadline_s: float) -> bool:
    """Whether a request that waited so long since it arrived may be held: only until its last deadline."""
    return bool(waited_s < last_deadline_s)


@kernel
def affordable(pricing: int, peers: Peers, j: int, longest: int) -> bool:
    """Whether peer j can be paid for an answer of at most `longest` tokens."""
    price = round(peers.adverts[j, AD_PRICE] * MICRO)
    return bool(price_of(pricing, price, longest) <= peers.credit[j])


@kernel
def may_offer(pricing: int, request: Record, peers: Peers, k: int) -> bool:
    """Whether a request, a record of `agents.provider`, may be offered to its candidate k."""
    if k < 0 or k >= request.n_candidates or (request.refused >> k) & 1 == 1:
        return False
    j = request.candidates[k]
    return bool(peers.adverts[j, AD_TIME_S] > NO_TIME) and affordable(pricing, peers, j, request.longest)


@kernel
def accept(terms: Floats, wait_s: float, kv_use: float, held: int, u: float) -> bool:
    """Whether a provider with these terms takes an offer, on its fresh own state.

    `wait_s`: the request's expected wait here; `held`: own users' requests not yet decided; `u` uniform in (0, 1).
    """
    if terms[ONLY_IF_NONE_HELD] > 0.5 and held > 0:
        return False
    return bool(wait_s <= terms[MAX_WAIT_S] and kv_use <= terms[MAX_KV_USE] and u <= terms[PROBABILITY])
