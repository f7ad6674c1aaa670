"""The rules of the game: the law of the draw, and that no rule makes or loses a micro-credit."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wwwserve.agents.generator import make_generators
from wwwserve.agents.kernel import Ints
from wwwserve.agents.protocol import (
    A_WINS,
    ACCOUNT_SIZE,
    B_WINS,
    ESCROW,
    FREE,
    LATENESS,
    MICRO,
    PER_REQUEST,
    QUOTED,
    STAKED,
    TARGET_KV_USE,
    TIE,
    VOTE_A,
    VOTE_B,
    VOTE_SILENT,
    VOTE_UNDECIDED,
    available_credit,
    delivered_value,
    draw_by_stake,
    duel_outcome,
    lock,
    move_stake,
    price_of,
    price_of_part,
    settle,
    settle_duel,
    stake_target,
    vote_of,
)

credits = st.integers(0, 10**10)


def draw(stake: list[float], eligible: list[bool], count: int, generator: Ints) -> tuple[int, ...]:
    drawn = np.full(max(count, len(stake)), -1)
    found = draw_by_stake(np.array(stake, np.float64), np.array(eligible), count, generator, drawn)
    assert (drawn[found:] == -1).all()
    return tuple(drawn[:found].tolist())


def frequencies(stake: list[float], eligible: list[bool], count: int, draws: int) -> dict[tuple[int, ...], int]:
    generator = make_generators(11)[0]
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        got = draw(stake, eligible, count, generator)
        seen[got] = seen.get(got, 0) + 1
    return seen


@pytest.mark.parametrize("unit", [1.0, 1e-3, float(MICRO)])
def test_candidates_are_drawn_by_stake_without_replacement(unit: float) -> None:
    stake = [5 * unit, 2 * unit, 100 * unit, 1 * unit, 4 * unit]
    eligible = [True, True, False, True, True]
    seen = frequencies(stake, eligible, 3, 12_000)
    law = {}
    for order in itertools.permutations([0, 1, 3, 4], 3):
        left, chance = 12 * unit, 1.0
        for j in order:
            chance *= stake[j] / left
            left -= stake[j]
        law[order] = chance
    assert set(seen) <= set(law)
    result = stats.chisquare([seen.get(order, 0) for order in law], [12_000 * chance for chance in law.values()])
    assert result.pvalue > 1e-3


def test_those_without_stake_come_last_and_evenly() -> None:
    seen = frequencies([0.0, 3.0, 0.0, 0.0, 1.0], [True] * 5, 4, 12_000)
    assert {order[:2] for order in seen} == {(1, 4), (4, 1)}
    assert sum(n for order, n in seen.items() if order[0] == 1) == pytest.approx(
        9000, abs=4.5 * math.sqrt(12_000 * 3 / 16)
    )
    last: dict[tuple[int, ...], int] = {}
    for order, n in seen.items():
        last[order[2:]] = last.get(order[2:], 0) + n
    assert len(last) == 6
    assert stats.chisquare(list(last.values())).pvalue > 1e-3


def test_a_stake_however_small_comes_before_none() -> None:
    generator = make_generators(2)[0]
    assert {draw([0.0, 1e-12, 1e9], [True] * 3, 2, generator) for _ in range(300)} == {(2, 1)}


@settings(max_examples=300, deadline=None)
@given(
    stake=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=0, max_size=12),
    count=st.integers(0, 14),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_a_draw_is_of_distinct_eligible_nodes_and_as_many_as_there_are(
    stake: list[float], count: int, seed: int, data: st.DataObject
) -> None:
    eligible = data.draw(st.lists(st.booleans(), min_size=len(stake), max_size=len(stake)))
    drawn = draw(stake, eligible, count, make_generators(seed)[0])
    assert len(drawn) == len(set(drawn)) == min(count, sum(eligible))
    assert all(eligible[j] for j in drawn)
    staked = [stake[j] > 0 for j in drawn]
    assert staked == sorted(staked, reverse=True)


TARIFF = np.array([200_000, 50_000, 1_500_001])  # micro-credits per 1000 tokens of input, cached input and output


@pytest.mark.parametrize(
    ("prompt", "cached", "output", "cost"),
    [
        (0, 0, 0, 0),
        (1000, 0, 0, 200_000),
        (1000, 1000, 0, 50_000),
        (1000, 400, 0, 140_000),
        (0, 0, 2000, 3_000_002),
        (0, 0, 1, 1500),
        (3, 1, 1, 1950),
        (1000, 400, 333, 639_500),
    ],
)
@pytest.mark.parametrize("payment", [LATENESS, QUOTED])
def test_prices_are_by_the_token_and_round_down_once(
    payment: int, prompt: int, cached: int, output: int, cost: int
) -> None:
    assert price_of(payment, TARIFF, prompt, cached, output) == cost


@settings(max_examples=200, deadline=None)
@given(
    tariff=st.tuples(*[st.integers(0, 10**9)] * 3), prompt=st.integers(0, 10**6), output=st.integers(0, 10**6),
    data=st.data(),
)  # fmt: skip
def test_prices_are_exact_integers(tariff: tuple[int, int, int], prompt: int, output: int, data: st.DataObject) -> None:
    cached = data.draw(st.integers(0, prompt))
    exact = (tariff[0] * (prompt - cached) + tariff[1] * cached + tariff[2] * output) // 1000
    assert price_of(LATENESS, np.array(tariff), prompt, cached, output) == exact


def test_the_papers_payment_is_a_credit_a_request() -> None:
    assert price_of(PER_REQUEST, TARIFF, 10**6, 0, 10**6) == price_of(PER_REQUEST, TARIFF, 1, 0, 0) == MICRO


def account(free: int = 0, staked: int = 0, escrow: int = 0) -> Ints:
    return np.array([free, staked, escrow])


@pytest.mark.parametrize(
    ("payment", "output", "most", "cost"),
    [
        (PER_REQUEST, 0, 10, 0), (PER_REQUEST, 3, 10, 300_000), (PER_REQUEST, 1, 3, 333_333),
        (PER_REQUEST, 11, 10, MICRO), (PER_REQUEST, 1, 0, 0), (QUOTED, 3, 10, 144_500), (LATENESS, 7, 1, 150_500),
    ],
)  # fmt: skip
def test_part_of_an_answer_costs_its_share(payment: int, output: int, most: int, cost: int) -> None:
    """By the tariff what was there of it, with the prompt."""
    tariff = np.array([200_000, 50_000, 1_500_000])
    assert price_of_part(payment, tariff, 700, 0, output, most) == cost


@pytest.mark.parametrize(
    ("free", "exposed", "limit", "left"), [(10, 0, 5, 5), (10, 3, 5, 2), (1, 3, 5, 1), (10, 7, 5, 0), (0, 0, 5, 0)]
)
def test_available_credit_is_within_the_credit_and_the_limit(free: int, exposed: int, limit: int, left: int) -> None:
    account = np.zeros(ACCOUNT_SIZE, np.int64)
    account[FREE] = free
    assert available_credit(account, exposed, limit) == left


def test_lock_and_settle_by_hand() -> None:
    payer, payee = account(100, 7), account(20, 9)
    assert lock(payer, 60)
    assert payer.tolist() == [40, 7, 60]
    assert not lock(payer, 41)
    assert payer.tolist() == [40, 7, 60]
    assert settle(payer, payee, 60, 25) == 25
    assert (payer.tolist(), payee.tolist()) == ([75, 7, 0], [45, 9, 0])
    assert lock(payer, 75)
    assert settle(payer, payee, 75, 80) == 75  # never more than was locked
    assert (payer.tolist(), payee.tolist()) == ([0, 7, 0], [120, 9, 0])


@settings(max_examples=200, deadline=None)
@given(
    start=st.lists(st.tuples(credits, credits), min_size=3, max_size=3),
    deals=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), credits, credits), max_size=20),
)
def test_escrow_keeps_every_credit_and_makes_no_debt(
    start: list[tuple[int, int]], deals: list[tuple[int, int, int, int]]
) -> None:
    accounts = np.array([account(free, staked) for free, staked in start])
    minted = accounts.sum()
    open_deals = []
    for payer, payee, amount, due in deals:
        free = int(accounts[payer, FREE])
        assert lock(accounts[payer], amount) == (amount <= free)
        if amount <= free:
            open_deals.append((payer, payee, amount, due))
        assert accounts.sum() == minted and accounts.min() >= 0
    for payer, payee, amount, due in open_deals[::2] + open_deals[1::2]:
        assert settle(accounts[payer], accounts[payee], amount, due) == min(amount, due)
        assert accounts.sum() == minted and accounts.min() >= 0
    assert (accounts[:, ESCROW] == 0).all()
    assert accounts[:, STAKED].tolist() == [staked for _, staked in start]


@pytest.mark.parametrize(
    ("share", "target"),
    [
        (0.0, 4),
        (0.2499, 4),
        (0.25, 4),
        (0.2501, 3),
        (0.5, 3),
        (0.5001, 2),
        (0.75, 2),
        (0.7501, 1),
        (1.0, 1),
        (1.0001, 0),
    ],
)
def test_stake_follows_load(share: float, target: int) -> None:
    kv_use = share * TARGET_KV_USE
    assert stake_target(kv_use, 0, 0) == target * MICRO
    assert stake_target(kv_use, 0, 3) == max(0, target - 2) * MICRO  # the dispatcher holds requests
    assert stake_target(kv_use, 1, 0) == 0  # the engine queues
    assert stake_target(kv_use, 1, 3) == 0


def test_a_stake_moves_two_credits_a_second_within_the_free_credit() -> None:
    rich = account(10 * MICRO, 1 * MICRO, 5)
    move_stake(rich, 4 * MICRO, 1.0)
    assert rich.tolist() == [8 * MICRO, 3 * MICRO, 5]
    move_stake(rich, 4 * MICRO, 1.0)
    assert rich.tolist() == [7 * MICRO, 4 * MICRO, 5]
    move_stake(rich, 0, 0.25)
    assert rich.tolist() == [7 * MICRO + MICRO // 2, 3 * MICRO + MICRO // 2, 5]
    move_stake(rich, 0, 60.0)
    assert rich.tolist() == [11 * MICRO, 0, 5]
    poor = account(300_000, 1 * MICRO)
    move_stake(poor, 4 * MICRO, 1.0)
    assert poor.tolist() == [0, 1_300_000, 0]


@settings(max_examples=200, deadline=None)
@given(free=credits, staked=credits, target=credits, elapsed_s=st.floats(0, 1e4))
def test_moving_a_stake_keeps_every_credit(free: int, staked: int, target: int, elapsed_s: float) -> None:
    moved = account(free, staked, 3)
    move_stake(moved, target, elapsed_s)
    assert moved.sum() == free + staked + 3 and moved.min() >= 0
    assert min(staked, target) <= moved[STAKED] <= max(staked, target)
    assert abs(moved[STAKED] - staked) <= 2 * MICRO * elapsed_s


A, B, SILENT, UNDECIDED = VOTE_A, VOTE_B, VOTE_SILENT, VOTE_UNDECIDED


@pytest.mark.parametrize(
    ("votes", "outcome"),
    [
        ([A, B, A], A_WINS),
        ([B, B, A], B_WINS),
        ([A, B], TIE),
        ([], TIE),
        ([SILENT, SILENT, SILENT], TIE),
        ([UNDECIDED, UNDECIDED, B], B_WINS),
        ([A, B, UNDECIDED, SILENT], TIE),
    ],
)
def test_the_majority_of_the_votes_for_an_answer_wins(votes: list[int], outcome: int) -> None:
    assert duel_outcome(np.array(votes, np.int64)) == outcome


# Executors are accounts 1 and 4; judges 0, 2, 3, 5, 6 in another order. Free credit and escrow tell accounts apart.
STAKES = [1_000_003, 2_000_005, 700, 500_019, 3_000_007, 400_000, 900_000]


def table() -> Ints:
    return np.array([account(10 + i, stake, 100 + i) for i, stake in enumerate(STAKES)])


def verdict(judges: list[int], votes: list[int]) -> tuple[int, list[int]]:
    accounts = table()
    outcome = settle_duel(accounts, 1, 4, np.array(judges), np.array(votes))
    np.testing.assert_array_equal(accounts[:, [FREE, ESCROW]], table()[:, [FREE, ESCROW]])
    return outcome, accounts[:, STAKED].tolist()


def test_the_winner_takes_the_losers_stake_and_the_majority_what_the_others_lose() -> None:
    outcome, staked = verdict([3, 0, 5, 6, 2], [A, B, A, SILENT, UNDECIDED])
    assert outcome == A_WINS
    pot = 1_000_003 // 5 + 900_000 // 20  # one outvoted, one silent: 200_000 + 45_000
    assert staked == [
        1_000_003 - 200_000,
        2_000_005 + 3_000_007,
        700,  # undecided
        500_019 + pot // 2,
        0,
        400_000 + pot // 2,
        900_000 - 45_000,
    ]


def test_what_does_not_divide_goes_to_the_first_of_the_majority() -> None:
    outcome, staked = verdict([2, 6, 5, 0, 3], [A, B, SILENT, B, B])
    assert outcome == B_WINS
    pot = 700 // 5 + 400_000 // 20  # 140 + 20_000 among three: 6713 each, 1 left
    assert staked == [1_000_003 + 6713, 0, 560, 500_019 + 6713, 5_000_012, 380_000, 900_000 + 6714]
    assert pot == 3 * 6713 + 1


@pytest.mark.parametrize("votes", [[A, B, SILENT], [SILENT, SILENT, SILENT], [UNDECIDED, A, B]])
def test_a_tie_moves_nothing(votes: list[int]) -> None:
    assert verdict([6, 0, 3], votes) == (TIE, STAKES)


@settings(max_examples=300, deadline=None)
@given(
    stakes=st.lists(credits, min_size=9, max_size=9),
    order=st.permutations(range(9)),
    votes=st.lists(st.sampled_from([A, B, SILENT, UNDECIDED]), max_size=7),
)
def test_a_duel_keeps_every_credit(stakes: list[int], order: list[int], votes: list[int]) -> None:
    accounts = np.zeros((9, ACCOUNT_SIZE), np.int64)
    accounts[:] = np.arange(27).reshape(9, 3)
    accounts[:, STAKED] = stakes
    before = accounts.copy()
    a, b, judges = order[0], order[1], order[2 : 2 + len(votes)]
    outcome = settle_duel(accounts, a, b, np.array(judges, np.int64), np.array(votes, np.int64))
    assert accounts.sum() == before.sum() and accounts.min() >= 0
    np.testing.assert_array_equal(accounts[:, [FREE, ESCROW]], before[:, [FREE, ESCROW]])
    bystanders = order[2 + len(votes) :]
    np.testing.assert_array_equal(accounts[bystanders], before[bystanders])
    if outcome == TIE:
        np.testing.assert_array_equal(accounts, before)
    for judge, vote in zip(judges, votes, strict=True):
        change = accounts[judge, STAKED] - before[judge, STAKED]
        if outcome != TIE:
            assert change >= 0 if vote == outcome else change <= 0


@pytest.mark.parametrize(("a", "b"), [(0.199, -0.289), (-0.289, 0.199), (0.3, 0.3), (2.0, -1.0)])
def test_a_vote_is_a_bradley_terry_draw(a: float, b: float) -> None:
    chance = 1 / (1 + math.exp(b - a))
    assert vote_of(a, b, chance - 1e-9) == VOTE_A
    assert vote_of(a, b, chance + 1e-9) == VOTE_B


def test_votes_on_answers_worlds_apart() -> None:
    assert vote_of(-1000.0, 1000.0, 1e-9) == VOTE_B
    assert vote_of(1000.0, -1000.0, 1 - 1e-9) == VOTE_A


@pytest.mark.parametrize(
    ("latency_s", "value"), [(19.0, 6.0), (20.0, 6.0), (20.1, 4.0), (60.0, 2.0), (61, 0), (np.inf, 0)]
)
def test_an_answer_is_worth_the_share_of_deadlines_it_meets(latency_s: float, value: float) -> None:
    assert delivered_value(6.0, np.array([20.0, 40.0, 60.0]), latency_s) == value
