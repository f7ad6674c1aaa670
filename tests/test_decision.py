"""The action spec: its flat encoding, and the terms on which a probe is accepted."""

import numpy as np
import pytest

from wwwserve.agents.decision import (
    ADMIT_WAIT_S,
    ADMITS,
    CANDIDATES,
    FIRST_CANDIDATE,
    FLAT_ACTIONS,
    MAX_WAIT_S,
    NO_DIRECTION,
    PRICES,
    ROUTES,
    TERMS_SIZE,
    accept,
    affordable,
    decode,
    encode,
    make_actions,
    may_hold,
    may_offer,
    set_admit,
)
from wwwserve.agents.kernel import records
from wwwserve.agents.knowledge import AD_PRICE, ADVERT_SIZE, Peers, make_peer_stats
from wwwserve.agents.protocol import MICRO, PER_KTOK, PER_REQUEST
from wwwserve.agents.provider import REQUEST

INF = np.inf


def terms(wait_s: float = INF, kv_use: float = INF, probability: float = 1.0, only_if_none_held: float = 0.0):
    return np.array([wait_s, kv_use, probability, only_if_none_held])


def test_flat_actions_and_choices_are_one_to_one() -> None:
    flat = np.arange(FLAT_ACTIONS)
    route, admit, price = decode(flat)
    np.testing.assert_array_equal(encode(route, admit, price), flat)
    assert [(x.min(), x.max() + 1) for x in (route, admit, price)] == [(0, ROUTES), (0, ADMITS), (0, PRICES)]
    assert len(set(zip(route.tolist(), admit.tolist(), price.tolist(), strict=True))) == FLAT_ACTIONS


def test_the_encoding_is_the_one_checkpoints_were_trained_with() -> None:
    assert (ROUTES, ADMITS, PRICES, CANDIDATES, FIRST_CANDIDATE) == (10, 6, 8, 8, 2)
    assert encode(np.int32(3), np.int32(2), np.int32(5)) == 165
    assert [int(x) for x in decode(np.int32(165))] == [3, 2, 5]
    # Narrow action types do not overflow.
    assert encode(np.int8(9), np.int8(5), np.int8(7)) == FLAT_ACTIONS - 1


def test_fresh_actions_hold_and_accept_everything() -> None:
    actions = make_actions(2, 3)
    assert actions.route.shape == actions.price.shape == actions.direct.shape == (2, 3)
    assert actions.terms.shape == (2, 3, TERMS_SIZE)
    assert (actions.route == 0).all() and (actions.price == 0).all() and (actions.direct == NO_DIRECTION).all()
    assert accept(actions.terms[1, 2], 1e9, 1.0, 99, 0.999999)


def test_each_admit_bin_accepts_up_to_its_wait() -> None:
    actions = make_actions(2, 3)
    actions.terms[...] = -7.0
    set_admit(actions, np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(actions.terms[..., MAX_WAIT_S].ravel(), ADMIT_WAIT_S)
    taken = [
        [accept(row, wait_s, 1.0, 3, 0.99) for row in actions.terms.reshape(6, -1)] for wait_s in (0.0, 0.5, 19, 21)
    ]
    assert taken == [
        [False, True, True, True, True, True],
        [False, True, True, True, True, True],
        [False, False, False, True, True, True],
        [False, False, False, False, True, True],
    ]


@pytest.mark.parametrize(
    ("offered", "wait_s", "kv_use", "held", "u", "taken"),
    [
        (terms(wait_s=5), 5.0, 0.9, 3, 0.99, True),
        (terms(wait_s=5), 5.1, 0.0, 0, 0.01, False),
        (terms(kv_use=0.65), 99.0, 0.65, 3, 0.99, True),
        (terms(kv_use=0.65), 0.0, 0.66, 0, 0.01, False),
        (terms(probability=0.8), 99.0, 1.0, 3, 0.79, True),
        (terms(probability=0.8), 0.0, 0.0, 0, 0.81, False),
        (terms(probability=0.0), 0.0, 0.0, 0, 1e-9, False),
        (terms(only_if_none_held=1), 99.0, 1.0, 0, 0.99, True),
        (terms(only_if_none_held=1), 0.0, 0.0, 1, 0.01, False),
        (terms(wait_s=-1), 0.0, 0.0, 0, 0.01, False),
    ],
)
def test_accept(offered, wait_s: float, kv_use: float, held: int, u: float, taken: bool) -> None:
    assert accept(offered, wait_s, kv_use, held, u) == taken


def peers(prices: list[float], credit: list[int]) -> Peers:
    adverts = np.zeros((len(prices), ADVERT_SIZE))
    adverts[:, AD_PRICE] = prices
    return Peers(adverts, make_peer_stats(len(prices)), np.array(credit))


def test_a_peer_is_affordable_up_to_its_longest_answer() -> None:
    known = peers([9.0, 2.0, 0.5], [0, 3 * MICRO, MICRO - 1])
    assert affordable(PER_KTOK, known, 1, 1500) and not affordable(PER_KTOK, known, 1, 1501)
    assert affordable(PER_KTOK, known, 2, 1999) and not affordable(PER_KTOK, known, 2, 2000)
    assert affordable(PER_REQUEST, known, 1, 10**6) and not affordable(PER_REQUEST, known, 0, 1)


def test_an_offer_goes_to_candidates_that_did_not_refuse_and_can_be_paid() -> None:
    request = records(1, REQUEST)
    request["n_candidates"], request["refused"], request["longest"] = 3, 0b010, 1000
    request["candidates"][0, :4] = 3, 1, 2, 1
    known = peers([0.0, 1.0, 1.0, 1.0, 1.0], [MICRO, MICRO, MICRO - 1, MICRO, MICRO])
    assert [may_offer(PER_KTOK, request[0], known, k) for k in range(-2, 6)] == [False] * 2 + [True] + [False] * 5


def test_a_request_is_held_until_its_last_deadline() -> None:
    assert [may_hold(waited_s, 20.0) for waited_s in (0.0, 19.99, 20.0, 25.0)] == [True, True, False, False]
