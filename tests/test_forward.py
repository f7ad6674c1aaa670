"""The kernels of the learned policy compute what its network in torch computes, whatever they are shown."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wwwserve.agents import view as v
from wwwserve.agents.decision import CANDIDATES, FIRST_CANDIDATE, HOLD, LOCAL, ROUTES, make_actions
from wwwserve.agents.policy import architecture, forward
from wwwserve.agents.policy.architecture import EVIDENCE, FORBIDDEN, LOGITS, SET, SHORTEST_S
from wwwserve.agents.policy.forward import LearnedPolicy
from wwwserve.agents.policy.network import Actor, weights_of
from wwwserve.agents.rules import Rule
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import Views, make_views
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import KINDS, sample

WIDTH = 16


@pytest.fixture(scope="module")
def actor() -> Actor:
    """An actor whose every weight matters."""
    torch.manual_seed(3)
    made = Actor(WIDTH)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return made


@pytest.fixture(scope="module")
def policy(actor: Actor) -> LearnedPolicy:
    return LearnedPolicy(weights_of(actor), {})


def random_views(count: int) -> Views:
    """Views anywhere in the ranges of the features, with 0 to 8 candidates and masks of all sorts."""
    rng = np.random.default_rng(5)
    views = make_views(count)
    for values, features in zip(views, (v.NODE_FEATURES, v.REQUEST_FEATURES, v.SELF_FEATURES), strict=False):
        low, high = v.bounds(features)
        drawn = rng.choice([0.0, 0.001, 0.1, 1.0], values.shape) * rng.uniform(low, high, values.shape)
        values[...] = np.clip(drawn, low, high)
    candidates = np.arange(count) % (CANDIDATES + 1)
    views.nodes[:, :, v.OWN] = np.arange(v.NODES) == 0
    views.nodes[:, :, v.FINISH_S] = rng.uniform(0.0, 900.0, (count, v.NODES))
    views.nodes[: count // 10, :2, v.FINISH_S] = 5e-4  # shorter than what the prior tells apart
    views.nodes[np.arange(v.NODES) > candidates[:, None]] = 0
    views.request[:, v.N_CANDIDATES] = candidates
    views.routes[...] = (rng.random((count, ROUTES)) < 0.7) & (
        np.arange(ROUTES) < FIRST_CANDIDATE + candidates[:, None]
    )
    views.routes[:, LOCAL] = 1
    views.routes[::7] = np.arange(ROUTES) == HOLD  # a provider without a request
    return views


def market_views(count: int) -> Views:
    """Views of random markets of every kind in play."""
    rng = np.random.default_rng(6)
    batch = MarketBatch([sample(kind, rng, 120.0) for kind in KINDS for _ in range(4)])
    actions, rule, taken = batch.actions(), Rule("www_serve"), []
    for _ in range(80):
        rows = np.nonzero(batch.active)
        taken.append([array[rows].copy() for array in batch.views])
        rule.decide(batch.views, batch.active, batch.uniforms, actions)
        batch.step(actions)
    columns = [np.concatenate(column) for column in zip(*taken, strict=True)]
    rows = rng.permutation(len(columns[0]))[:count]
    return Views(*(column[rows] for column in columns))


@pytest.fixture(scope="module", params=["random", "markets"])
def seen(request: pytest.FixtureRequest) -> Views:
    return random_views(900) if request.param == "random" else market_views(1500)


def in_torch(actor: Actor, views: Views) -> NDArray[np.float32]:
    """Logits [M, LOGITS] by the network."""
    with torch.no_grad():
        heads = actor(actor.inputs(*(torch.from_numpy(array) for array in views)))
    return np.concatenate([head.numpy() for head in heads], -1)


def assert_close(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


def test_kernels_are_the_network(actor: Actor, policy: LearnedPolicy, seen: Views) -> None:
    ours = policy.logits(seen)
    assert ours.shape == (len(seen.me), LOGITS) and ROUTES + MARKUPS.size == LOGITS
    assert_close(ours, in_torch(actor, seen))
    counts = set(seen.request[:, v.N_CANDIDATES].astype(int).tolist())
    assert len(counts) >= 6
    assert ours[:, ROUTES:].std(0).min() > 0.01  # else there would be little to compare


def test_every_weight_is_read(actor: Actor) -> None:
    rng, views, weights = np.random.default_rng(4), random_views(300), weights_of(actor)
    before = LearnedPolicy(weights, {}).logits(views)
    for name, weight in weights.items():
        if name in SET:
            continue
        changed = (weight + 0.5 * rng.standard_normal(weight.shape)).astype(np.float32)
        assert (LearnedPolicy(weights | {name: changed}, {}).logits(views) != before).any(), name


def test_masked_routes_have_the_logit_of_the_forbidden(policy: LearnedPolicy, seen: Views) -> None:
    routes = policy.logits(seen)[:, :ROUTES]
    assert (routes[seen.routes == 0] == FORBIDDEN).all()
    assert (routes[seen.routes == 1] > FORBIDDEN / 2).all()
    assert (seen.routes == 0).any()


def test_the_mask_changes_no_other_head_and_only_shifts_the_routes(policy: LearnedPolicy, seen: Views) -> None:
    """All that the mask does to what stays legal is to move the reference of the prior, for all nodes alike; and to
    hold is not less likely where fewer nodes are left."""
    rows = np.nonzero(seen.routes[:, LOCAL : FIRST_CANDIDATE + CANDIDATES].sum(1) >= 3)[0]
    views = Views(*(array[rows].copy() for array in seen))
    before = policy.logits(views)
    last = LOCAL + CANDIDATES - views.routes[:, LOCAL:][:, ::-1].argmax(1)
    views.routes[np.arange(len(rows)), last] = 0
    after = policy.logits(views)
    np.testing.assert_array_equal(after[:, ROUTES:], before[:, ROUTES:])
    assert (after[np.arange(len(rows)), last] == FORBIDDEN).all()
    left = views.routes[:, LOCAL:] == 1
    shift = np.where(left, after[:, LOCAL:ROUTES] - before[:, LOCAL:ROUTES], np.nan)
    assert (np.nanmax(shift, 1) - np.nanmin(shift, 1)).max() < 1e-2
    held = views.routes[:, HOLD] == 1
    assert held.any() and (after[held, HOLD] >= before[held, HOLD]).all()


def test_the_order_of_candidates_does_not_matter(policy: LearnedPolicy, seen: Views) -> None:
    """Permuted candidates have permuted logits, also when rows without a node come between them."""
    order = np.random.default_rng(1).permutation(CANDIDATES)
    assert (order != np.arange(CANDIDATES)).any()
    places = np.r_[HOLD, LOCAL, FIRST_CANDIDATE + order]
    shuffled = Views(
        np.ascontiguousarray(seen.nodes[:, np.r_[0, 1 + order]]), seen.request, seen.me,
        np.ascontiguousarray(seen.routes[:, places]),
    )  # fmt: skip
    before, after = policy.logits(seen), policy.logits(shuffled)
    assert_close(after[:, :ROUTES], before[:, places])
    assert_close(after[:, ROUTES:], before[:, ROUTES:])


def test_rows_without_a_node_are_not_read(policy: LearnedPolicy, seen: Views) -> None:
    views = Views(*(array.copy() for array in seen))
    empty = np.arange(v.NODES) > views.request[:, v.N_CANDIDATES, None]
    before = policy.logits(views)
    junk = np.ones(len(v.NODE_FEATURES), np.float32)
    junk[[v.OWN, v.FINISH_S]] = 0
    views.nodes[empty] = junk
    np.testing.assert_array_equal(policy.logits(views), before)


def test_one_view_and_many_agree(policy: LearnedPolicy, seen: Views) -> None:
    """Scratch is left as it falls; nothing of one view gets into the next."""
    many = policy.logits(seen)
    for k in (len(many) - 1, 0, 17, 5):
        np.testing.assert_array_equal(policy.logits(Views(*(array[k : k + 1] for array in seen)))[0], many[k])


def test_decisions_are_the_most_probable(policy: LearnedPolicy, seen: Views) -> None:
    count = len(seen.me)
    active = np.random.default_rng(2).random(count) < 0.8
    actions = make_actions(count)
    actions.route[...] = actions.markup[...] = 77
    policy.decide(seen, active, np.zeros((count, 4)), actions)
    logits = policy.logits(seen)
    np.testing.assert_array_equal(actions.route, np.where(active, logits[:, :ROUTES].argmax(1), 77))
    np.testing.assert_array_equal(actions.markup, np.where(active, logits[:, ROUTES:].argmax(1), 77))
    assert np.take_along_axis(seen.routes, actions.route[:, None].clip(0, ROUTES - 1), 1)[active].all()


def test_features_are_normalised_as_the_view_says(seen: Views) -> None:
    node = np.zeros(len(v.NODE_FEATURES), np.float32)
    about = np.zeros(architecture.ABOUT, np.float32)
    nodes = v.normalise(seen.nodes, v.NODE_FEATURES)
    request, me = v.normalise(seen.request, v.REQUEST_FEATURES), v.normalise(seen.me, v.SELF_FEATURES)
    for k in range(0, len(seen.me), 9):
        forward.normalise_node(seen.nodes[k, 0], node)
        np.testing.assert_allclose(node, nodes[k, 0], rtol=1e-5, atol=1e-6)
        forward.normalise_about(seen.request[k], seen.me[k], about)
        np.testing.assert_allclose(about, np.r_[request[k], me[k]], rtol=1e-5, atol=1e-6)


def node_of(**features: float) -> NDArray[np.float32]:
    row = np.zeros(len(v.NODE_FEATURES), np.float32)
    for name, x in features.items():
        row[getattr(v, name)] = x
    return row


@pytest.mark.parametrize(
    ("node", "time_s"),
    [
        (node_of(FINISH_S=10), 10.0),
        (node_of(FINISH_S=10, PACE=0.5), 10 * np.exp(0.7 * 0.5)),
        (node_of(FINISH_S=10, RECORD=0.5), 10 * np.exp(1.3 * 0.5)),
        (node_of(FINISH_S=10, PACE=-2, RECORD=-1), 10.0),  # to be early earns nothing
        (node_of(FINISH_S=10, PACE=0.5, RECORD=0.2, OVERDUE=30), 10 * np.exp(0.35 + 0.26) + 12),
        (node_of(FINISH_S=10, SLOWDOWN_S=5), 13.0),
        (node_of(FINISH_S=10, LOAD_S=5), 11.5),
        (node_of(FINISH_S=0, OWN=1), float(SHORTEST_S)),
        (node_of(FINISH_S=10, RECORD=500), 10 * np.exp(50.0)),  # no overflow
    ],
)
def test_the_priors_time_is_that_of_trust_cap(actor: Actor, node: NDArray[np.float32], time_s: float) -> None:
    weights = np.array([0.7, 1.3, 0.4, 0.6, 0.3], np.float32)
    assert float(forward.log_time(node, *weights)) == pytest.approx(np.log(time_s), rel=1e-5)
    evidence = torch.from_numpy(node[list(EVIDENCE)][None, None])
    with torch.no_grad():
        found = actor.log_time(evidence, torch.from_numpy(weights)[None])
    assert float(found[0, 0]) == pytest.approx(np.log(time_s), rel=1e-5)


def test_a_hopeless_peer_leaves_gradients_numbers(actor: Actor) -> None:
    evidence = torch.from_numpy(node_of(FINISH_S=10, PACE=90, RECORD=90)[list(EVIDENCE)][None, None])
    weights = torch.full((1, 5), 3.0, requires_grad=True)
    actor.log_time(evidence, weights).sum().backward()
    assert weights.grad is not None and bool(torch.isfinite(weights.grad).all())


def test_settings_depend_on_the_view_and_are_never_negative(actor: Actor) -> None:
    rng = np.random.default_rng(0)
    pooled = rng.uniform(-60, 60, (50, WIDTH)).astype(np.float32)
    net = forward.net_of(weights_of(actor))
    found = np.zeros((len(pooled), architecture.SETTINGS), np.float32)
    for row, out in zip(pooled, found, strict=True):
        forward.settings(net, row, out)
    assert (found >= 0).all() and np.isfinite(found).all() and (found.std(0) > 0.1).all()
    with torch.no_grad():
        np.testing.assert_allclose(found, actor.settings(torch.from_numpy(pooled)).numpy(), rtol=2e-4, atol=1e-6)


def test_an_unlearned_policy_has_the_usual_settings() -> None:
    net = forward.net_of(weights_of(Actor(WIDTH)))
    found = np.zeros(architecture.SETTINGS, np.float32)
    forward.settings(net, np.zeros(WIDTH, np.float32), found)
    assert found.tolist() == pytest.approx([1.0, 1.0, 0.5, 0.5, 10.0, 1.0, 0.3, 0.7, 1.0, 1.0], rel=1e-4)


@pytest.mark.parametrize(
    ("node", "full"),
    [
        (node_of(KV_USE=0.3, SPEED_RANK=0), 0.5),
        (node_of(KV_USE=0.7, SPEED_RANK=1), 0.5),
        (node_of(KV_USE=0.55, SPEED_RANK=0.5), 1 / (1 + np.exp(-1))),
        (node_of(KV_USE=0.0, SPEED_RANK=1), 0.0),
        (node_of(KV_USE=1.0, SPEED_RANK=0), 1.0),
        (node_of(KV_USE=0.0, SPEED_RANK=1, WAITING=1), 1.0),
    ],
)
def test_a_node_is_full_at_the_cap_of_its_rank(actor: Actor, node: NDArray[np.float32], full: float) -> None:
    assert float(forward.fullness(node, np.float32(0.3), np.float32(0.7))) == pytest.approx(full, abs=1e-5)
    evidence = torch.from_numpy(node[list(EVIDENCE)][None, None])
    with torch.no_grad():
        assert float(actor.fullness(evidence, torch.tensor([[0.3, 0.7]]))[0, 0]) == pytest.approx(full, abs=1e-5)


def unlearned(views: Views) -> list[int]:
    """Routes of the rule trust_cap on views without classes."""
    views.request[:, v.LOOSENESS] = 0
    actions = make_actions(len(views.me))
    settings = {"pace": 1, "record": 1, "overdue": 0.5, "own_margin": 1, "slowdown": 0.5, "load": 10}
    Rule("trust_cap", settings).decide(views, np.ones(len(views.me), np.bool_), np.zeros((len(views.me), 4)), actions)
    routes: list[int] = actions.route.tolist()
    return routes


def test_before_it_learns_the_policy_is_nearly_a_rule() -> None:
    torch.manual_seed(1)
    views = market_views(600)
    views = Views(*(array[views.me[:, v.HAS_REQUEST] > 0.5] for array in views))
    routes = LearnedPolicy(weights_of(Actor()), {}).logits(views)[:, :ROUTES].argmax(1)
    assert (routes == np.array(unlearned(views))).mean() > 0.8  # the others go where they bring more
