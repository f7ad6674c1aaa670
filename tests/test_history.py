"""The course of a run: samples at their times, credits that add up, duels as they were judged."""

from typing import Any

import numpy as np
import pytest

from wwwserve.agents.rules import Rule
from wwwserve.envs.scenario import Scenario, parse
from wwwserve.eval.history import record, windowed
from wwwserve.eval.play import rollout

MAPPING: dict[str, Any] = {
    "name": "duels",
    "duration_s": 120,
    "drain_s": 200,
    "economy": {"payment": "per_request", "duel_probability": 1.0, "initial_credit": 500, "stake_rule": "fixed"},
    "defaults": {"lengths": {"output": {"median": 300, "sigma": 0.5, "max": 600}}, "gpu": "a100-80g"},
    "providers": [
        {
            "name": "users",
            "gpu": "rtx-3090",
            "max_num_seqs": 2,
            "traffic": {"kind": "poisson", "phases": [{"until_s": 120, "rate_per_s": 1.0}]},
        },
        {"name": "good-1", "strength": 9, "initial_stake": 3},
        {"name": "bad-1", "strength": -9, "initial_stake": 5},
        {"name": "other-1", "strength": 0, "initial_credit": 40},
        {"name": "other-2", "strength": 0},
    ],
}


@pytest.fixture(scope="module")
def duels() -> Scenario:
    return parse(MAPPING)


def test_credits_and_stakes_begin_as_the_scenario_says_and_add_up(duels: Scenario) -> None:
    histories = record(duels, Rule("random"), range(3), samples=41, interval_s=10.0)
    assert len(histories) == 3
    for history in histories:
        assert history.credits.shape == history.stake.shape == history.running.shape == (41, 5)
        np.testing.assert_allclose(history.stake[0], [2, 3, 5, 2, 2])
        np.testing.assert_allclose(history.credits.sum(axis=1), 4 * 500 + 40 + 14, rtol=1e-12)
        assert history.running.max() > 0
        assert (history.running[-1] == 0).all()  # long after the end
        assert history.running[5, 1:].sum() > 0
    # A run is what it is without being watched.
    for history, run in zip(histories, rollout(duels, Rule("random"), range(3)), strict=True):
        np.testing.assert_array_equal(history.outcome.requests.latency_s, run.requests.latency_s)


def test_duels_are_won_by_the_strong_and_paid_by_stakes(duels: Scenario) -> None:
    (history,) = record(duels, Rule("random"), [7], samples=33, interval_s=10.0)
    good, bad = 1, 2
    assert len(history.duels) > 10
    assert all(0 not in duel for duel in history.duels)  # the origin is no executor of its own
    assert [duel for duel in history.duels if bad == duel.winner] == []
    assert [duel for duel in history.duels if good == duel.loser] == []
    assert history.stake[-1, bad] == 0.0
    # Executors have no users: what they own they earned by serving and judging, a credit each, or won in duels.
    won = history.credits[-1] - history.credits[0] - history.served - history.judged
    assert won[good] > 0 > won[bad]
    assert won[1:].sum() + won[0] == pytest.approx(-(history.served + history.judged).sum(), abs=1e-6)


def test_windowed_leaves_out_what_never_ended() -> None:
    values = np.array([1.0, 3.0, np.inf, 5.0, 9.0])
    time_s = np.array([0.0, 9.9, 5.0, 10.0, 99.0])
    got = windowed(values, time_s, [0, 10, 20, 30])
    assert got[:2] == [2.0, 5.0]
    assert np.isnan(got[2])
