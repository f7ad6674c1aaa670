"""Rewards: what a step earns, and that each form of it adds up to the same."""

import numpy as np
import pytest
from markets import by_rule, here, lengths, market, randomly, run, times

from wwwserve.agents.protocol import INPUT, OUTPUT
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.state import (
    Reward,
)


def episode(reward: Reward, seed: int, decide_seed: int | None = None) -> tuple[np.ndarray, np.ndarray, MarketBatch]:
    """Rewards [steps, N] and the time at which each step began, of a market with churn, duels and an early horizon."""
    scenario = market(
        {"traffic": times(*np.arange(0.5, 50, 0.7)), "lengths": lengths(100, 900)},
        {"traffic": times(*np.arange(0.3, 50, 2.3)), "lengths": lengths(50, 300), "online_s": [[0, 35]]},
        {"gpu": "a100-80g", "online_s": [[10, 60]]},
        {"max_num_seqs": 2, "traffic": times(*np.arange(1.1, 40, 1.9)), "lengths": lengths(60, 400)},
        economy={"payment": "lateness", "duel_probability": 0.4, "compute_cost_per_ktok": 0.7},
        slo={"thresholds_s": [5, 10, 20]},
        duration_s=60,
        drain_s=2,
    )
    batch = MarketBatch([scenario], [seed], reward=reward)
    decide = by_rule("power_of_two") if decide_seed is None else randomly(np.random.default_rng(decide_seed), 0.2)
    rewards, began = [], []
    for began_s in run(batch, decide):
        rewards.append(batch.reward[0].astype(np.float64))
        began.append(began_s)
    return np.array(rewards), np.array(began), batch


@pytest.mark.parametrize("decide_seed", [None, 8])
@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.8])
@pytest.mark.parametrize("team_weight", [0.0, 0.5])
def test_dense_rewards_sum_to_the_sparse_ones(gamma: float, team_weight: float, decide_seed: int | None) -> None:
    """Potential is 0 at the start and at the end, so the discounted sums agree, whatever is unfinished."""
    sums = []
    for dense in (False, True):
        rewards, began_s, batch = episode(Reward(team_weight, gamma, dense), 6, decide_seed)
        sums.append((gamma**began_s) @ rewards)
        assert batch.markets.market["unresolved"][0] > 0
        if gamma == 1.0 and team_weight == 0.0 and not dense:
            np.testing.assert_allclose(rewards.sum(0), batch.markets.providers[0]["profit"], rtol=1e-5, atol=1e-5)
    sparse, dense_sum = sums
    assert len(set(sparse.round(4))) == 4
    np.testing.assert_allclose(dense_sum, sparse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("team_weight", [0.0, 1.0])
def test_the_dense_reward_comes_with_the_arrival_and_is_known_apart(team_weight: float) -> None:
    """One request, worth 3 and certain to be in time: 3 are expected from its arrival at 0.5 s on until it is done."""
    slo = {"classes": {"chat": {"share": 1, "deadline_s": 90, "value": 3 / 0.925}}}
    scenario = market({"traffic": times(0.5), "lengths": lengths(100, 900)}, {}, slo=slo, duration_s=10)
    share = 1 - team_weight / 2
    batch = MarketBatch([scenario], reward=Reward(team_weight, 0.9, True))
    steps = run(batch, here)
    seen = [(float(batch.reward[0, 0]), float(batch.given[0, 0]), float(batch.elapsed_s[0])) for _ in steps]
    arrived = 0.9**0.5 * 3 * share
    assert seen[0] == pytest.approx((arrived, arrived, 0.5))
    for paid, given_, elapsed_s in seen[1:3]:  # placed, and on its way
        assert paid == pytest.approx((0.9**elapsed_s - 1) * 3 * share, rel=1e-3) and given_ == 0 < elapsed_s
    sparse = MarketBatch([scenario], reward=Reward(team_weight, 0.9, False))
    seen = [(float(sparse.reward[0, 0]), float(sparse.given[0, 0])) for _ in run(sparse, here)]
    assert seen[0] == seen[1] == (0, 0)
    compute = sparse.markets.providers["compute"][0, 0]
    assert max(seen) == (pytest.approx((3 - 100 * compute[INPUT] - 900 * compute[OUTPUT]) * share), 0)


def test_team_weight_mixes_own_profit_with_the_mean() -> None:
    own = episode(Reward(0.0, 0.99, True), 6)[0]
    team = episode(Reward(1.0, 0.99, True), 6)[0]
    half = episode(Reward(0.5, 0.99, True), 6)[0]
    mean = own.mean(1, keepdims=True)
    assert np.abs(own - mean).max() > 0.5
    np.testing.assert_allclose(team, np.broadcast_to(mean, own.shape), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(half, 0.5 * own + 0.5 * mean, rtol=1e-5, atol=1e-5)
