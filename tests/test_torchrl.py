"""TorchRL's own wrapper takes the PettingZoo environment as it is."""

import numpy as np
import pytest
import torch
from torchrl.envs.libs.pettingzoo import PettingZooWrapper
from torchrl.envs.utils import check_env_specs

from wwwserve.agents.decision import FLAT_ACTIONS
from wwwserve.envs.market_v1 import OBSERVATION_SIZE, MarketEnv, observation_bounds, parallel_env
from wwwserve.envs.scenario import Scenario, parse

pytestmark = pytest.mark.filterwarnings("ignore:PettingZoo in TorchRL is tested using version")

NAMES = ["east", "north", "west"]


def market() -> Scenario:
    """Three unlike providers for half a minute and some seconds."""
    gpus = ("rtx-4090", "a100-80g", "a40")
    nodes = [
        {
            "name": name,
            "gpu": gpu,
            "max_num_seqs": 4,
            "traffic": {"kind": "poisson", "phases": [{"until_s": 30, "rate_per_s": 0.6 / (i + 1)}]},
        }
        for i, (name, gpu) in enumerate(zip(NAMES, gpus, strict=True))
    ]
    return parse(
        {
            "name": "three",
            "duration_s": 30,
            "drain_s": 20,
            "slo": {"thresholds_s": [5, 10]},
            "defaults": {"lengths": {"output": {"median": 300, "sigma": 0.5, "max": 800}}},
            "providers": nodes,
        }
    )


def wrap(env: MarketEnv, **settings) -> PettingZooWrapper:
    return PettingZooWrapper(env, group_map={"providers": NAMES}, **settings)


@pytest.mark.parametrize("return_state", [False, True])
def test_its_specs_hold(return_state: bool) -> None:
    check_env_specs(wrap(parallel_env(market()), return_state=return_state))


@pytest.mark.parametrize("scenario", ["paper/alternating", "market/deadlines"])
def test_its_specs_hold_with_a_group_for_each_provider(scenario: str) -> None:
    env = parallel_env(scenario)
    wrapped = PettingZooWrapper(env)
    assert wrapped.group_map == {name: [name] for name in env.possible_agents}
    check_env_specs(wrapped)


def test_a_rollout_of_masked_random_actions_goes_to_the_horizon() -> None:
    torch.manual_seed(0)
    env = parallel_env(market(), team_weight=0.0)
    wrapped = wrap(env, seed=3, return_state=True)
    wrapped.set_seed(3)
    steps = wrapped.rollout(1000)
    length = steps.batch_size[0]
    assert 30 <= length < 1000

    now, then = steps["providers"], steps["next", "providers"]
    assert now["observation", "observation"].shape == (length, 3, OBSERVATION_SIZE)
    assert now["observation", "observation"].dtype == torch.float32
    low, high = observation_bounds()
    seen = then["observation", "observation"].numpy()
    assert (seen >= low).all() and (seen <= high).all()
    assert np.ptp(seen, axis=1).max() > 0  # each provider sees its own
    assert then["reward"].shape == (length, 3, 1) and then["reward"].dtype == torch.float32
    assert (then["reward"].abs().sum((0, 2)) > 0).all()
    assert steps["state"].shape == (length, *env.state_space.shape)

    masks, actions = now["action_mask"], now["action"]
    assert masks.shape == (length, 3, FLAT_ACTIONS) and actions.shape == (length, 3)
    assert masks.gather(-1, actions.unsqueeze(-1)).all()
    assert 0 < masks.float().mean() < 0.5
    assert (then["info", "invalid"] == 0).all()
    assert len(actions[now["info", "active"] > 0].unique()) > 20

    for done in (then["done"], then["truncated"]):
        assert done.shape == (length, 3, 1)
        assert not done[:-1].any() and done[-1].all()
    assert not then["terminated"].any() and not steps["next", "terminated"].any()
    assert steps["next", "done"].flatten().tolist() == [False] * (length - 1) + [True]
    assert steps["next", "truncated"][-1].all()
    assert (then["info", "now_s"][-1] >= 30).all()
    assert wrapped.reset()["providers", "info", "now_s"].eq(0).all()  # and it starts again


def test_it_shows_what_the_environment_shows() -> None:
    """Step for step, the same as the environment played by itself; distinct actions, so that none change places."""
    alone, wrapped = parallel_env(market(), team_weight=0.3), wrap(parallel_env(market(), team_weight=0.3))
    wrapped.set_seed(5)  # which resets it once
    alone.reset(seed=5)
    step, (observations, _) = wrapped.reset(), alone.reset()
    rng, differed = np.random.default_rng(0), False
    for _ in range(25):
        for i, name in enumerate(NAMES):
            seen = step["providers", "observation", "observation"][i].numpy()
            np.testing.assert_array_equal(seen, observations[name]["observation"])
            mask = step["providers", "action_mask"][i].numpy()
            np.testing.assert_array_equal(mask, observations[name]["action_mask"])
        chosen = [rng.choice(np.flatnonzero(observations[name]["action_mask"])) for name in NAMES]
        step["providers", "action"] = torch.tensor(chosen)
        after = wrapped.step(step)["next"]
        observations, rewards, *_ = alone.step(dict(zip(NAMES, chosen, strict=True)))
        paid = after["providers", "reward"].flatten().tolist()
        assert paid == pytest.approx([rewards[name] for name in NAMES])
        differed |= np.ptp(paid) > 0
        step = after
    assert differed
