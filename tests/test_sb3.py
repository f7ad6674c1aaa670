"""The Stable-Baselines3 environment: the VecEnv contract, seeds, masks, horizons, and that PPO learns on it."""

from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

from wwwserve.agents.classes import CLASS_VALUE
from wwwserve.agents.decision import HOLD, LOCAL, NODES, ROUTES
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import CHANCE, HAS_REQUEST, NODE_FEATURES, REQUEST_FEATURES, SELF_FEATURES, normalise
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import sample
from wwwserve.envs.sb3 import OBSERVATION_SIZE, MarketVecEnv
from wwwserve.envs.scenario import Scenario, parse
from wwwserve.envs.state import INVALID, Reward


def market(rate_per_s: float = 0.5, duration_s: float = 30.0, providers: int = 3) -> Scenario:
    """Unlike providers, the first with the most users; a market lasts half a minute and some seconds."""
    nodes = [
        {
            "name": f"n{i + 1}",
            "gpu": ("rtx-4090", "a100-80g", "a40")[i % 3],
            "traffic": {"kind": "poisson", "phases": [{"until_s": duration_s, "rate_per_s": rate_per_s / (i + 1)}]},
        }
        for i in range(providers)
    ]
    lengths = {"output": {"median": 100, "sigma": 0.5, "max": 500}}
    return parse(
        {
            "name": f"rate {rate_per_s}",
            "duration_s": duration_s,
            "drain_s": 20,
            "slo": {"thresholds_s": [5, 10]},
            "defaults": {"lengths": lengths},
            "providers": nodes,
        }
    )


def random_actions(env: MarketVecEnv, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, (ROUTES, MARKUPS.size), (env.num_envs, 2))


def play(env: MarketVecEnv, steps: int, seed: int = 0) -> list[Any]:
    """Everything that `steps` random steps after a reset return."""
    rng = np.random.default_rng(seed)
    seen: list[Any] = [env.reset()]
    seen += [env.step(random_actions(env, rng)) for _ in range(steps)]
    return seen


def test_observations_are_normalised_views_in_the_order_of_the_slots() -> None:
    env = MarketVecEnv([market(0.5), market(2.0)], markets=4, seed=1)
    assert env.num_envs == 12 and env.observation_space.shape == (OBSERVATION_SIZE,)
    observations = env.reset()
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert observations.shape == (12, OBSERVATION_SIZE) and observations.dtype == np.float32
        assert np.abs(observations).max() <= 1.0
        views, me = env.batch.views, OBSERVATION_SIZE - len(SELF_FEATURES)
        for b, p in ((0, 0), (2, 1), (3, 2)):
            row = observations[3 * b + p]
            np.testing.assert_array_equal(row[me:], normalise(views.me[b, p], SELF_FEATURES))
            assert row[2 * len(NODE_FEATURES) + CHANCE] == views.nodes[b, p, 2, CHANCE]
            first = NODES * len(NODE_FEATURES)
            np.testing.assert_array_equal(row[first:me], normalise(views.request[b, p], REQUEST_FEATURES))
        observations, *_ = env.step(random_actions(env, rng))


def test_a_step_is_the_step_of_the_batch() -> None:
    env = MarketVecEnv(market(), markets=3, seed=5, reward=Reward(team_weight=0.3, gamma=0.95))
    env.reset()
    batch = MarketBatch(env.batch.plans, reward=Reward(team_weight=0.3, gamma=0.95))
    actions, rng, differed = batch.actions(), np.random.default_rng(2), False
    for _ in range(25):
        chosen = random_actions(env, rng)
        by_slot = chosen.reshape(3, 3, 2)
        actions.route[...], actions.markup[...] = by_slot[..., 0], by_slot[..., 1]
        batch.step(actions)
        _, rewards, dones, infos = env.step(chosen)
        np.testing.assert_array_equal(rewards, batch.reward.reshape(-1))
        assert [info["active"] for info in infos] == batch.active.reshape(-1).tolist()
        assert [info["elapsed_s"] for info in infos] == np.repeat(batch.elapsed_s, 3).tolist()
        assert not dones.any()
        differed |= np.ptp(rewards.reshape(3, 3), axis=1).max() > 0
    assert differed


def test_rewards_without_arrivals_leave_out_what_no_decision_changes() -> None:
    """For a market in which everything is held, that is all but the discount of what is held."""
    rule = Reward(team_weight=0.3, gamma=1.0)
    whole, rest = (MarketVecEnv(market(), markets=2, seed=5, reward=rule, arrivals=each) for each in (True, False))
    whole.reset(), rest.reset()
    hold, arrived = np.zeros((6, 2), np.int64), 0.0
    for _ in range(5):  # no deadline has passed yet
        (_, paid, _, _), (_, left, _, _) = whole.step(hold), rest.step(hold)
        np.testing.assert_array_equal(left, (whole.batch.reward - whole.batch.given).reshape(-1))
        np.testing.assert_allclose(left, 0.0, atol=1e-6)
        arrived += float(paid.sum())
    m = whole.batch.markets
    value = float(m.providers["known"][0, 0, 0, CLASS_VALUE])
    assert arrived == pytest.approx(value * float(m.market["next_arrival"].sum())) and arrived > 3 * value


def test_it_counts_decisions_and_those_on_closed_routes() -> None:
    env = MarketVecEnv([market(0.5), market(3.0)], markets=2, seed=0)
    env.reset()
    rng, requests = np.random.default_rng(0), 0
    for _ in range(40):  # before any market starts again, and its counts with it
        requests += int((env.batch.active & (env.batch.views.me[..., HAS_REQUEST] > 0.5)).sum())
        env.step(random_actions(env, rng))
    assert env.decisions == requests
    assert 10 < env.invalid == env.batch.markets.providers["counts"][..., INVALID].sum() < requests


def test_a_horizon_truncates_and_the_market_starts_again() -> None:
    env = MarketVecEnv(market(), markets=3, seed=0)
    rng = np.random.default_rng(0)
    env.reset()
    ended = 0
    for _ in range(400):
        seeds = [planned.seed for planned in env.batch.plans]
        observations, _, dones, infos = env.step(random_actions(env, rng))
        for b, over in enumerate(dones.reshape(3, 3)):
            assert over.all() or not over.any()
            for i in range(3 * b, 3 * b + 3):
                assert ("terminal_observation" in infos[i]) == ("TimeLimit.truncated" in infos[i]) == over[0]
                if over[0]:
                    assert infos[i]["TimeLimit.truncated"] is True
                    assert env.observation_space.contains(infos[i]["terminal_observation"])
                    assert not np.array_equal(infos[i]["terminal_observation"], observations[i])
            assert (env.batch.plans[b].seed != seeds[b]) == over[0]
            assert not over[0] or env.batch.now_s[b] == 0
            ended += over[0]
    assert ended >= 6
    assert len({planned.seed for planned in env.batch.plans}) == 3


def test_the_terminal_observation_is_the_last_of_the_market() -> None:
    env = MarketVecEnv(market(), markets=1, seed=3)
    env.reset()
    batch = MarketBatch(env.batch.plans)
    actions = batch.actions()
    actions.markup[...] = 0
    done = False
    while not done:
        _, _, dones, infos = env.step(np.zeros((3, 2), np.int64))
        batch.step(actions)
        done = bool(dones[0])
    me = np.array([info["terminal_observation"][-len(SELF_FEATURES) :] for info in infos])
    np.testing.assert_array_equal(me, normalise(batch.views.me[0], SELF_FEATURES))


def test_one_seed_gives_one_course() -> None:
    one, two, other = (MarketVecEnv(market(), markets=3, seed=seed) for seed in (4, 4, 5))
    for left, right in zip(play(one, 150), play(two, 150), strict=True):
        if isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right)
        else:
            for a, b in zip(left[:3], right[:3], strict=True):
                np.testing.assert_array_equal(a, b)
    assert not np.array_equal(play(other, 150)[-1][0], play(two, 150)[-1][0])


def test_seed_takes_effect_at_the_next_reset() -> None:
    env = MarketVecEnv(market(), markets=2, seed=1)
    first = play(env, 40)
    env.seed(9)
    ninth = play(env, 40)
    env.seed(1)
    again = play(env, 40)
    np.testing.assert_array_equal(first[-1][0], again[-1][0])
    assert not np.array_equal(first[-1][0], ninth[-1][0])
    env.seed(1)
    play(env, 10)
    assert not np.array_equal(first[-1][0], play(env, 40)[-1][0])  # a second reset is another market


@pytest.mark.parametrize("threads", [1, 2])
def test_a_market_does_not_depend_on_how_many_there_are(threads: int) -> None:
    few, many = MarketVecEnv(market(), markets=2, seed=8), MarketVecEnv(market(), markets=5, seed=8, threads=threads)
    few.reset(), many.reset()
    rng = np.random.default_rng(1)
    for _ in range(150):
        actions = random_actions(many, rng)
        left, right = few.step(actions[:6]), many.step(actions)
        for a, b in zip(left[:3], right[:3], strict=True):
            np.testing.assert_array_equal(a, b[:6])


def test_it_makes_room_for_a_market_with_more_requests() -> None:
    """The batch that grows goes on as one that was as wide from the start."""

    def busier(rng: np.random.Generator) -> Scenario:
        return market(float(rng.uniform(0.1, 4.0)), duration_s=10.0)

    env = MarketVecEnv(busier, markets=4, seed=0)
    wide = MarketVecEnv(busier, markets=4, seed=0)
    wide.batch = MarketBatch(wide.batch.plans, shape=wide.batch.shape._replace(requests=2000))
    start = env.batch.shape.requests
    rng = np.random.default_rng(0)
    env.reset(), wide.reset()
    for _ in range(300):
        actions = random_actions(env, rng)
        for a, b in zip(env.step(actions)[:3], wide.step(actions)[:3], strict=True):
            np.testing.assert_array_equal(a, b)
    assert start < env.batch.shape.requests < 2000 == wide.batch.shape.requests


def test_masks_show_what_is_open() -> None:
    env = MarketVecEnv([market(0.5), market(3.0)], markets=2, seed=0)
    env.reset()
    rng, decided = np.random.default_rng(0), 0
    for _ in range(100):
        masks = np.stack(env.env_method("action_masks"))
        assert masks.shape == (6, ROUTES + MARKUPS.size) and masks.dtype == np.bool_
        np.testing.assert_array_equal(masks[:, ROUTES:], True)
        active = env.batch.active.reshape(-1)
        np.testing.assert_array_equal(masks[active, :ROUTES], env.batch.views.routes.reshape(6, -1)[active] == 1)
        np.testing.assert_array_equal(masks[~active, :ROUTES], np.tile(np.arange(ROUTES) == HOLD, ((~active).sum(), 1)))
        decided += masks[:, LOCAL].sum()
        routes = [rng.choice(np.flatnonzero(mask[:ROUTES])) for mask in masks]
        env.step(np.array([[route, 2] for route in routes]))
    assert decided > 20
    assert env.batch.markets.providers["counts"][..., INVALID].sum() == 0
    assert env.has_attr("action_masks") and not env.has_attr("level")
    np.testing.assert_array_equal(env.get_attr("action_masks", 4)[0](), env.action_masks()[4])
    np.testing.assert_array_equal(env.env_method("action_masks", indices=[5])[0], env.action_masks()[5])


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rate 0.5 has 2 providers, expected 3"):
        MarketVecEnv([market(), market(providers=2)], markets=2)
    with pytest.raises(ValueError, match="providers, expected"):
        MarketVecEnv(lambda rng: sample("honest", rng), markets=16, seed=0)
    with pytest.raises(ValueError, match="scenarios is empty"):
        MarketVecEnv([])
    with pytest.raises(ValueError, match="markets is 0"):
        MarketVecEnv(market(), markets=0)
    env = MarketVecEnv(market(), markets=1, seed=0)
    env.reset()
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        env.step(np.zeros((2, 3), np.int64))
    for bad in (-1, MARKUPS.size):
        with pytest.raises(ValueError, match="an action is beyond"):
            env.step(np.array([[0, 0], [0, bad], [0, 0]]))
    with pytest.raises(AttributeError, match="no method 'render'"):
        env.env_method("render")
    with pytest.raises(AttributeError, match="cannot be set"):
        env.set_attr("level", 1)
    assert env.env_is_wrapped(VecMonitor) == [False] * 3


def overload() -> Scenario:
    """All users at a node that runs one request at a time and takes 2 s for it; beside it a fast and idle one."""
    lengths = {"prompt": {"median": 50, "sigma": 0.1, "max": 100}, "output": {"median": 100, "sigma": 0.1, "max": 150}}
    busy = {"kind": "poisson", "phases": [{"until_s": 100, "rate_per_s": 1.0}]}
    return parse(
        {
            "name": "overload",
            "duration_s": 100,
            "drain_s": 5,
            "slo": {"classes": {"all": {"share": 1, "deadline_s": 4, "value": 10}}},  # about a credit each
            "defaults": {"lengths": lengths},
            "providers": [{"name": "busy", "max_num_seqs": 1, "traffic": busy}, {"name": "idle", "gpu": "h100"}],
        }
    )


def value_in_time(model: PPO) -> float:
    """Value delivered in time in the first 100 steps of 16 markets of which it has seen none, credits a provider."""
    env = MarketVecEnv(overload(), markets=16, seed=99, reward=Reward(dense=False))
    observations, earned = env.reset(), 0.0
    for _ in range(100):
        actions, _ = model.predict(observations)
        observations, rewards, *_ = env.step(actions)
        earned += float(rewards.mean())
    return earned


def test_ppo_learns_to_hand_over() -> None:
    """From answering a few percent of the requests in time to answering most; all in time would be 50 credits."""
    env = VecMonitor(MarketVecEnv(overload(), markets=16, seed=0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = PPO("MlpPolicy", env, n_steps=32, batch_size=512, n_epochs=5, learning_rate=3e-3, seed=0, device="cpu")
        before = value_in_time(model)
        model.learn(16 * 32 * env.num_envs)
        after = value_in_time(model)
    finally:
        torch.set_num_threads(threads)
    assert model.num_timesteps == 16 * 32 * 32
    assert len(model.ep_info_buffer or ()) > 0  # episodes ended on the way
    assert before < 5 and after > 20
