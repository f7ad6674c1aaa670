"""What a provider decides: where the request at the head goes, and what others are to pay beyond its own cost.

`route` is 0 to hold, 1 to run here, 2 + k for candidate k; `markup` is an index into `agents.tariff.MARKUPS`. A route
that the mask forbids becomes hold, and is counted by the caller. Whether a peer's request is taken follows from its
price; rules, which know no prices, have an admission policy of thresholds.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.kernel import Floats, Ints, Ints32, Record, kernel
from wwwserve.agents.knowledge import AD_TARIFF, AD_TIME_S, NO_TIME, Peers
from wwwserve.agents.protocol import INPUT, MICRO, OUTPUT, PER_REQUEST, TARIFF_SIZE
from wwwserve.agents.tariff import MARKUPS, in_micro

CANDIDATES = 8  # K
HOLD, LOCAL, FIRST_CANDIDATE = 0, 1, 2
ROUTES = FIRST_CANDIDATE + CANDIDATES
NODES = 1 + CANDIDATES  # the own node and the candidates
FLAT_ACTIONS = ROUTES * MARKUPS.size
AT_COST = 1  # the markup of 0

# Columns of an admission policy: when a provider takes others' work, and how much dearer it sells what it has cached.
MAX_WAIT_S = 0
MAX_KV_USE = 1
PROBABILITY = 2
ONLY_IF_NONE_HELD = 3  # 1 to refuse while own users' requests are undecided
IF_IT_PAYS = 4  # share of what it costs by now that an offer has to bring; 0 for any
KEEP = 5  # cost is times 1 + so much for the share of its prompts that is cached, in a price: conversations stay
ADMISSION_SIZE = 6
WHAT_PAYS = np.array([np.inf, np.inf, 1.0, 0.0, 1.0, 0.0])  # take what pays
NO_DIRECTION = -1


class Actions(NamedTuple):
    """One decision for each of a batch of providers, leading axes [...]."""

    route: Ints32  # [...] 0 to ROUTES - 1
    admission: Floats  # [..., ADMISSION_SIZE]
    markup: Ints32  # [...] index into MARKUPS
    direct: Ints32  # [...] provider to send to, whether it takes it or not; only a router that sees everything sets it


def make_actions(*shape: int) -> Actions:
    """Hold, take what pays, at cost."""
    actions = Actions(
        route=np.zeros(shape, np.int32),
        admission=np.zeros((*shape, ADMISSION_SIZE)),
        markup=np.full(shape, AT_COST, np.int32),
        direct=np.full(shape, NO_DIRECTION, np.int32),
    )
    actions.admission[...] = WHAT_PAYS
    return actions


@kernel
def admit_what_pays(admission: Floats, share: float = 1.0, keep: float = 0.0) -> None:
    """Write WHAT_PAYS into an admission policy [ADMISSION_SIZE], with this share of what it costs as enough, and
    KEEP."""
    for k in range(ADMISSION_SIZE):
        admission[k] = WHAT_PAYS[k]
    admission[IF_IT_PAYS] = share
    admission[KEEP] = keep


def encode(route: NDArray[np.integer], markup: NDArray[np.integer]) -> Ints:
    """One number, 0 to FLAT_ACTIONS - 1, for the two choices."""
    return np.asarray(np.asarray(route, np.int64) * MARKUPS.size + markup, np.int64)


def decode(flat: NDArray[np.integer]) -> tuple[Ints, Ints]:
    """Route and markup of a flat action."""
    number: Ints = np.asarray(flat, np.int64)
    return number // MARKUPS.size, number % MARKUPS.size


@kernel
def may_hold(waited_s: float, last_deadline_s: float) -> bool:
    """Whether a request that waited so long since it arrived may be held: only until its last deadline."""
    return bool(waited_s < last_deadline_s)


@kernel
def affordable(payment: int, peers: Peers, j: int, prompt: int, longest: int) -> bool:
    """Whether peer j can be paid, by the tariff that it advertises, for a prompt and an answer of at most `longest`."""
    if payment == PER_REQUEST:
        return bool(peers.credit[j] >= MICRO)
    tariff = peers.adverts[j, AD_TARIFF : AD_TARIFF + TARIFF_SIZE]
    return bool((in_micro(tariff[INPUT]) * prompt + in_micro(tariff[OUTPUT]) * longest) // 1000 <= peers.credit[j])


@kernel
def may_offer(payment: int, request: Record, peers: Peers, k: int) -> bool:
    """Whether a request, a record of `agents.provider`, may be offered to its candidate k."""
    if k < 0 or k >= request.n_candidates or (request.refused >> k) & 1 == 1:
        return False
    j = request.candidates[k]
    heard = peers.adverts[j, AD_TIME_S] > NO_TIME
    return bool(heard and affordable(payment, peers, j, request.prompt, request.longest))


@kernel
def accept(admission: Floats, wait_s: float, kv_use: float, held: int, profit: float, u: float) -> bool:
    """Whether a provider with this admission policy takes an offer, on its fresh own state.

    `wait_s`: the request's expected wait here; `held`: own users' requests not yet decided; `profit`, credits: what it
    is expected to bring, less what it has to; `u` uniform in (0, 1).
    """
    if admission[ONLY_IF_NONE_HELD] > 0.5 and held > 0:
        return False
    if admission[IF_IT_PAYS] > 0.0 and profit < 0.0:
        return False
    return bool(wait_s <= admission[MAX_WAIT_S] and kv_use <= admission[MAX_KV_USE] and u <= admission[PROBABILITY])
