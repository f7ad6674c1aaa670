"""What an ablation takes away is gone, and nothing else."""

import numpy as np
import pytest
import torch

from wwwserve.agents.decision import FIRST_CANDIDATE, HOLD, LOCAL, make_actions
from wwwserve.agents.policy.forward import LearnedPolicy
from wwwserve.agents.policy.network import Actor, weights_of
from wwwserve.agents.rules import Rule
from wwwserve.agents.view import HAS_REQUEST, NODE_FEATURES, Views
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import sample
from wwwserve.train.ablation import ESTIMATES, StakeOnly, forget_estimates


@pytest.fixture(scope="module")
def views() -> Views:
    """Views of requests, met under a rule."""
    batch = MarketBatch([sample("honest", np.random.default_rng(k), 60.0) for k in range(4)], range(4))
    actions, rule, seen = batch.actions(), Rule("random"), []
    for _ in range(60):
        rows = np.nonzero(batch.active & (batch.views.me[..., HAS_REQUEST] > 0.5))
        seen.append([array[rows].copy() for array in batch.views])
        rule.decide(batch.views, batch.active, batch.dice, actions)
        batch.step(actions)
    return Views(*(np.concatenate(arrays) for arrays in zip(*seen, strict=True)))


def test_a_policy_without_estimates_is_blind_to_them_after_learning(views: Views) -> None:
    torch.manual_seed(3)
    actor = Actor(12)
    forget_estimates(actor)
    optimiser = torch.optim.Adam(actor.parameters(), lr=0.05)
    for _ in range(5):
        route, admit, price = actor(actor.inputs(*(torch.from_numpy(array) for array in views)))
        optimiser.zero_grad()
        (torch.softmax(route, -1)[:, 1].mean() + admit.square().mean() + price.square().mean()).backward()
        optimiser.step()
    policy = LearnedPolicy(weights_of(actor), {})
    found = policy.logits(views)
    for k in range(len(NODE_FEATURES)):
        nodes = views.nodes.copy()
        shown = nodes[..., 0 : k + 1].any(-1) if k == 0 else nodes.any(-1)
        nodes[..., k] = np.where(shown & (nodes[..., k] > 0), nodes[..., k] * 0.5 + 0.1, nodes[..., k])
        changed = not np.allclose(policy.logits(views._replace(nodes=nodes)), found, atol=1e-6)
        if k in ESTIMATES:
            assert not changed, NODE_FEATURES[k].name
        elif NODE_FEATURES[k].name in ("kv_use", "running", "age_s"):
            assert changed, NODE_FEATURES[k].name


def test_by_stake_alone_the_first_candidate_is_the_only_one(views: Views) -> None:
    count = len(views.me)
    before = views.routes.copy()
    actions = make_actions(count)
    args = views, np.ones(count, np.bool_), np.random.default_rng(1).random((count, 4)), actions
    Rule("random").decide(*args)
    assert (actions.route > FIRST_CANDIDATE).any()
    policy = StakeOnly(Rule("random"))
    policy.decide(*args)
    assert set(np.unique(actions.route)) <= {HOLD, LOCAL, FIRST_CANDIDATE}
    assert (actions.route == FIRST_CANDIDATE).any()
    assert policy.name == "random"
    np.testing.assert_array_equal(views.routes, before)
