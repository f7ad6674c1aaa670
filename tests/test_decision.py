"""The action spec: its flat encoding, what may be offered, and when a peer's request is taken."""

import numpy as np
import pytest

from wwwserve.agents.decision import (
    ADMISSION_SIZE,
    AT_COST,
    CANDIDATES,
    FIRST_CANDIDATE,
    FLAT_ACTIONS,
    NO_DIRECTION,
    ROUTES,
    WHAT_PAYS,
    accept,
    admit_what_pays,
    affordable,
    decode,
    encode,
    make_actions,
    may_hold,
    may_offer,
)
from wwwserve.agents.kernel import Floats, records
from wwwserve.agents.knowledge import AD_TARIFF, AD_TIME_S, ADVERT_SIZE, NO_TIME, Peers, make_peer_stats
from wwwserve.agents.protocol import LATENESS, MICRO, PER_REQUEST, QUOTED
from wwwserve.agents.provider import REQUEST
from wwwserve.agents.tariff import MARKUPS

INF = np.inf


def test_flat_actions_and_choices_are_one_to_one() -> None:
    flat = np.arange(FLAT_ACTIONS)
    route, markup = decode(flat)
    np.testing.assert_array_equal(encode(route, markup), flat)
    assert [(x.min(), x.max() + 1) for x in (route, markup)] == [(0, ROUTES), (0, MARKUPS.size)]
    assert len(set(zip(route.tolist(), markup.tolist(), strict=True))) == FLAT_ACTIONS


def test_the_encoding_is_the_one_checkpoints_were_trained_with() -> None:
    assert (ROUTES, MARKUPS.size, CANDIDATES, FIRST_CANDIDATE) == (10, 9, 8, 2)
    assert encode(np.int32(3), np.int32(5)) == 32
    assert [int(x) for x in decode(np.int32(32))] == [3, 5]
    # Narrow action types do not overflow.
    assert encode(np.int8(9), np.int8(8)) == FLAT_ACTIONS - 1


def test_markups_rise_from_below_cost() -> None:
    assert MARKUPS[AT_COST] == 0.0 and MARKUPS[0] < 0.0 and (np.diff(MARKUPS) > 0).all()


def test_fresh_actions_hold_and_take_what_pays_at_cost() -> None:
    actions = make_actions(2, 3)
    assert actions.route.shape == actions.markup.shape == actions.direct.shape == (2, 3)
    assert actions.admission.shape == (2, 3, ADMISSION_SIZE)
    assert (actions.route == 0).all() and (actions.markup == AT_COST).all() and (actions.direct == NO_DIRECTION).all()
    assert accept(actions.admission[1, 2], 1e9, 1.0, 99, 0.0, 0.999999)
    assert not accept(actions.admission[1, 2], 0.0, 0.0, 0, -1e-9, 0.1)
    other = np.full(ADMISSION_SIZE, -7.0)
    admit_what_pays(other)
    np.testing.assert_array_equal(other, WHAT_PAYS)


def admission(
    wait_s: float = INF,
    kv_use: float = INF,
    probability: float = 1.0,
    only_if_none_held: float = 0.0,
    if_it_pays: float = 0.0,
) -> Floats:
    return np.array([wait_s, kv_use, probability, only_if_none_held, if_it_pays])


@pytest.mark.parametrize(
    ("policy", "wait_s", "kv_use", "held", "profit", "u", "taken"),
    [
        (admission(wait_s=5), 5.0, 0.9, 3, -1.0, 0.99, True),
        (admission(wait_s=5), 5.1, 0.0, 0, 9.0, 0.01, False),
        (admission(kv_use=0.65), 99.0, 0.65, 3, -1.0, 0.99, True),
        (admission(kv_use=0.65), 0.0, 0.66, 0, 9.0, 0.01, False),
        (admission(probability=0.8), 99.0, 1.0, 3, -1.0, 0.79, True),
        (admission(probability=0.8), 0.0, 0.0, 0, 9.0, 0.81, False),
        (admission(probability=0.0), 0.0, 0.0, 0, 9.0, 1e-9, False),
        (admission(only_if_none_held=1), 99.0, 1.0, 0, -1.0, 0.99, True),
        (admission(only_if_none_held=1), 0.0, 0.0, 1, 9.0, 0.01, False),
        (admission(wait_s=-1), 0.0, 0.0, 0, 9.0, 0.01, False),
        (admission(if_it_pays=1), 99.0, 1.0, 3, 0.0, 0.99, True),
        (admission(if_it_pays=1), 0.0, 0.0, 0, -0.01, 0.01, False),
        (admission(wait_s=5, if_it_pays=1), 5.1, 0.0, 0, 9.0, 0.01, False),
    ],
)
def test_accept(policy: Floats, wait_s: float, kv_use: float, held: int, profit: float, u: float, taken: bool) -> None:
    assert accept(policy, wait_s, kv_use, held, profit, u) == taken


def peers(tariffs: list[tuple[float, float, float]], credit: list[int]) -> Peers:
    adverts = np.zeros((len(tariffs), ADVERT_SIZE))
    adverts[:, AD_TARIFF : AD_TARIFF + 3] = tariffs
    return Peers(adverts, make_peer_stats(len(tariffs)), np.array(credit))


@pytest.mark.parametrize("payment", [LATENESS, QUOTED])
def test_a_peer_is_affordable_up_to_its_longest_answer(payment: int) -> None:
    """At the price of a prompt of which nothing is cached."""
    known = peers([(0, 0, 9.0), (0.5, 0.0, 2.0), (0, 0, 0.5)], [0, 3 * MICRO, MICRO - 1])
    assert affordable(payment, known, 1, 2000, 1000) and not affordable(payment, known, 1, 2000, 1001)
    assert not affordable(payment, known, 1, 2001, 1000)
    assert affordable(payment, known, 2, 99, 1999) and not affordable(payment, known, 2, 99, 2000)


def test_a_credit_a_request_is_affordable_whatever_its_length() -> None:
    known = peers([(0, 0, 9.0), (0, 0, 9.0)], [MICRO - 1, MICRO])
    assert affordable(PER_REQUEST, known, 1, 10**6, 10**6) and not affordable(PER_REQUEST, known, 0, 1, 1)


def test_an_offer_goes_to_candidates_that_were_heard_did_not_refuse_and_can_be_paid() -> None:
    request = records(1, REQUEST)
    request["n_candidates"], request["refused"], request["longest"] = 4, 0b010, 1000
    request["candidates"][0, :5] = 3, 1, 2, 4, 1
    known = peers([(0, 0, 0.0)] + [(0, 0, 1.0)] * 4, [MICRO, MICRO, MICRO - 1, MICRO, MICRO])
    known.adverts[4, AD_TIME_S] = NO_TIME
    assert [may_offer(QUOTED, request[0], known, k) for k in range(-2, 6)] == [False] * 2 + [True] + [False] * 5


def test_a_request_is_held_until_its_last_deadline() -> None:
    assert [may_hold(waited_s, 20.0) for waited_s in (0.0, 19.99, 20.0, 25.0)] == [True, True, False, False]
