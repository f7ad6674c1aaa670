"""Duels in the market: who takes part, who judges, what moves."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from market_checker import Checker
from markets import finish, lengths, market, run, times, to_candidates

from wwwserve.agents.knowledge import (
    DUELS_LOST,
    DUELS_WON,
)
from wwwserve.agents.protocol import ESCROW, FREE, MICRO, STAKED
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.scenario import Scenario
from wwwserve.envs.state import (
    COPY,
    DELEGATED,
    DUELS_SETTLED,
    DUELS_STARTED,
    DUELS_VOID,
    IN_ENGINE,
    JUDGED,
    JUDGEMENT,
    OWN_DONE,
    OWN_FAILED,
    RETURNED,
    SERVED_FOR_PEERS,
    USER,
    Shape,
    plan,
)


def duel_market(arrivals_s: Any, strengths: tuple[float, float], output: int = 30, **economy: Any) -> Scenario:
    """n0 has users, n1 and n2 can answer, n3 to n5 can only judge."""
    judge = {"serves": ["x"], "model": "qwen3-4b"}
    return market(
        {"traffic": times(*arrivals_s), "lengths": lengths(40, output)},
        {"strength": strengths[0]},
        {"strength": strengths[1]},
        *[judge] * 3,
        economy={"duel_probability": 1, "stake_rule": "fixed", "initial_stake": 4, "initial_credit": 5000, **economy},
    )


def test_a_duel_pays_executors_and_judges_and_the_winner_takes_the_stake() -> None:
    batch = MarketBatch([duel_market([1.5], (-20, 20))])
    finish(batch, to_candidates)
    accounts = batch.markets.accounts[0] // MICRO
    assert accounts[:, FREE].tolist() == [5000 - 5, 5001, 5001, 5001, 5001, 5001]
    assert accounts[:, STAKED].tolist() == [4, 0, 8, 4, 4, 4]
    assert accounts[:, ESCROW].tolist() == [0] * 6
    counts = batch.markets.providers[0]["counts"]
    assert counts[:, JUDGED].tolist() == [0, 0, 0, 1, 1, 1]
    assert counts[:, SERVED_FOR_PEERS].tolist() == [0, 1, 1, 0, 0, 0]
    assert counts[0, [DUELS_STARTED, DUELS_SETTLED, DUELS_VOID]].tolist() == [1, 1, 0]
    peer_stats = batch.markets.peer_stats[0, 0]
    assert peer_stats[:, DUELS_WON].tolist() == [0, 0, 1, 0, 0, 0]
    assert peer_stats[:, DUELS_LOST].tolist() == [0, 1, 0, 0, 0, 0]
    q = batch.markets.requests[0]
    back_s = q["finish_s"][:2] + 0.025  # the user has whichever answer comes first
    assert q["kind"][:5].tolist() == [USER, COPY, JUDGEMENT, JUDGEMENT, JUDGEMENT]
    assert q["answer_s"][0] == pytest.approx(back_s.min())


def test_the_stronger_model_wins_more_duels() -> None:
    """Three judges, each for the stronger with chance 3/4: it wins with 27/64 + 27/64."""
    batch = MarketBatch([duel_market(np.linspace(1, 95, 600), (math.log(3), 0.0))], [11])
    finish(batch, to_candidates)
    won, lost = batch.markets.peer_stats[0, 0, 1, [DUELS_WON, DUELS_LOST]]
    settled = won + lost
    assert batch.markets.peer_stats[0, 0, 2, [DUELS_WON, DUELS_LOST]].tolist() == [lost, won]
    assert settled == batch.markets.providers[0, 0]["counts"][DUELS_SETTLED] > 500
    chance = 54 / 64
    assert abs(won / settled - chance) < 4 * math.sqrt(chance * (1 - chance) / settled)
    assert batch.markets.accounts[0, :, STAKED].sum() == 24 * MICRO


def test_duels_do_not_depend_on_the_width_of_the_batch() -> None:
    """Two judges for three seats: nobody else sits there, however many providers another market has."""
    wide = market({"traffic": times(*np.linspace(1, 95, 200)), "lengths": lengths(40, 30)}, *[{}] * 40)
    narrow = duel_market(np.linspace(1, 95, 200), (0.4, 0.0))
    narrow = replace(narrow, providers=narrow.providers[:-1])
    alone, beside = MarketBatch([narrow], [5]), MarketBatch([wide, narrow], [6, 5])
    checker = Checker(beside, 1)
    for _ in run(beside, to_candidates):
        checker.check()
    finish(alone, to_candidates)
    assert beside.markets.accounts[1, :5].tolist() == alone.markets.accounts[0].tolist()
    counts = alone.markets.providers[0]["counts"]
    assert counts[:, JUDGED].sum() == 2 * counts[0, DUELS_STARTED] == 400
    np.testing.assert_array_equal(beside.requests(1).latency_s, alone.requests(0).latency_s)


def test_about_the_set_share_of_delegated_requests_duels() -> None:
    batch = MarketBatch([duel_market(np.linspace(1, 95, 600), (0.0, 0.0), duel_probability=0.3)], [2])
    finish(batch, to_candidates)
    counts = batch.markets.providers[0, 0]["counts"]
    assert counts[DELEGATED] == 600 + counts[DUELS_STARTED]
    assert abs(counts[DUELS_STARTED] / 600 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 600)


@pytest.mark.parametrize("judging", [True, False])
def test_a_market_ends_with_its_duels(judging: bool) -> None:
    """Whoever works on one when the market ends, a judge or the second executor, is paid and fined nothing."""
    scenario = duel_market([1.5], (-20, 20), 400)
    if not judging:  # one is far faster than the other
        fast = replace(scenario.providers[2], gpu="h100")
        scenario = replace(scenario, providers=(*scenario.providers[:2], fast, *scenario.providers[3:]))
    scenario = replace(scenario, decision_interval_s=0.05, gossip_interval_s=0.05)  # judges take less than a second
    end_s = 0.0
    batch = MarketBatch([scenario])
    for _ in run(batch, to_candidates):
        q = batch.markets.requests[0]
        at_work = ((q["kind"] == JUDGEMENT) & (q["status"] == IN_ENGINE)).any()
        out = (q["status"][:2] == IN_ENGINE).any() and not np.isnan(q["answer_s"][0])
        if end_s == 0.0 and (at_work if judging else out):
            end_s = float(batch.now_s[0])
    assert end_s > 0.0
    batch = MarketBatch([scenario])
    batch.markets.market[0]["duration_s"] = end_s
    checker = Checker(batch, 0)
    for _ in run(batch, to_candidates):
        checker.check()
    counts = batch.markets.providers[0, 0]["counts"]
    assert counts[[DUELS_STARTED, DUELS_VOID, DUELS_SETTLED]].tolist() == [1, not judging, judging]
    accounts = batch.markets.accounts[0]
    assert accounts[:, ESCROW].sum() == 0 and accounts[:, STAKED].tolist() == [4 * MICRO] * 6
    assert batch.markets.providers[0]["counts"][:, JUDGED].sum() == 0


def test_both_executors_of_a_duel_stop_when_the_origin_leaves() -> None:
    scenario = market(
        {"traffic": times(1.5, 2.5), "lengths": lengths(50, 6000), "online_s": [[0, 20]]},
        {},
        {},
        economy={"duel_probability": 1, "stake_rule": "fixed"},
        slo={"thresholds_s": [1000]},
    )
    batch = MarketBatch([scenario])
    checker = Checker(batch, 0)
    for _ in run(batch, to_candidates):
        checker.check()
        if 4 <= batch.now_s[0] < 20:
            assert batch.markets.engines[0]["running"].tolist() == [0, 2, 2]
        elif batch.now_s[0] == 20:
            assert batch.markets.engines[0]["running"].tolist() == [0, 0, 0]
    counts = batch.markets.providers[0, 0]["counts"]
    assert (counts[DUELS_STARTED], counts[DUELS_VOID], counts[OWN_FAILED], counts[OWN_DONE]) == (2, 2, 2, 0)


def test_one_executor_of_a_duel_is_enough() -> None:
    """The user's executor leaves: the copy answers, nothing returns, and there is nothing to judge."""
    scenario = market(
        {"traffic": times(1.5), "lengths": lengths(50, 2000)},
        {"online_s": [[0, 5]]},
        {"online_s": [[0, 99]]},
        economy={"duel_probability": 1, "stake_rule": "fixed"},
        slo={"thresholds_s": [1000]},
    )
    batch = MarketBatch([scenario])
    checker = Checker(batch, 0)
    for _ in run(batch, to_candidates):
        checker.check()
    counts = batch.markets.providers[0, 0]["counts"]
    assert (counts[RETURNED], counts[DUELS_VOID], counts[DUELS_SETTLED], counts[OWN_DONE]) == (0, 1, 0, 1)
    assert batch.markets.accounts[0, :, FREE].tolist() == [999 * MICRO, 1000 * MICRO, 1001 * MICRO]


def test_requests_of_lost_duels_never_outgrow_the_records_for_them() -> None:
    """The executors of both duels leave. More duels could outgrow the requests' records in a batch wide in duels."""
    scenario = market(
        {"traffic": times(0.5, 1.5), "lengths": lengths(50, 2000)},
        *[{"online_s": [[0, 4]]}] * 2,
        *[{"online_s": [[5, 100]]}] * 5,
        gossip_interval_s=1.0,
        economy={"duel_probability": 1, "judges": 3},
        slo={"thresholds_s": [1000]},
    )
    planned = plan(scenario, 3)
    assert planned.capacity == 2 * 5
    batch = MarketBatch([planned], shape=Shape(8, planned.capacity, 50))
    checker = Checker(batch, 0)

    for _ in run(batch, to_candidates):
        checker.check()
    counts = batch.markets.providers[0, 0]["counts"]
    assert counts[[RETURNED, DUELS_STARTED, DUELS_VOID, OWN_DONE]].tolist() == [2, 2, 2, 2]
