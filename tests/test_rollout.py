"""Rollouts of training markets: what is recorded is what was decided, however the work is spread."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from wwwserve.agents.classes import CLASS_MEAN, INPUT_WORTH
from wwwserve.agents.decision import AT_COST, HOLD, IF_IT_PAYS, KEEP
from wwwserve.agents.policy.forward import LearnedPolicy, Net, net_of
from wwwserve.agents.policy.network import Actor, Inputs, weights_of
from wwwserve.agents.rules import RULES, Rule
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import ADVERT_DUE, HAS_REQUEST, NODE_FEATURES, SELF_FEATURES, normalise
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import Kind, sample
from wwwserve.envs.state import Reward
from wwwserve.train import rollout as rollouts
from wwwserve.train.rollout import Collector, Decisions, Rollout, Source, draw, worth_per_s

KINDS: tuple[Kind, ...] = ("honest", "deadlines", "conversation")
EXPERTS: dict[Kind, Rule] = {
    kind: Rule(list(RULES)[k]) for k, kind in enumerate((*KINDS, "alike", "hardware"), start=1)
}
SOURCE = Source(seed=5, kinds=KINDS, duration_s=60.0, drain_s=20.0, max_requests=3000, seeds=1000)
NONE: Mapping[Kind, Rule] = {}
REWARD = Reward(1.0, 1.0, by_decision=True)
MARKETS, STEPS = 7, 24


@pytest.fixture(scope="module")
def actor() -> Actor:
    """An actor of whose choices none is certain."""
    torch.manual_seed(2)
    made = Actor(16, prior=1.0, pays=0.75, keep=0.5)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return made


@pytest.fixture(scope="module")
def net(actor: Actor) -> Net:
    return net_of(weights_of(actor))


class Begun(Collector):
    """A collector whose markets have begun."""

    batch: MarketBatch


def collector(*, source: Source = SOURCE, **share: Any) -> Begun:
    made = Begun(source, REWARD, MARKETS, **share)
    made.renew(0)
    return made


def collected(
    net: Net, number: int = 0, *, steps: int = STEPS, markups: bool = False, adverts: float = 0.0,
    experts: Mapping[Kind, Rule] = NONE, **share: Any,
) -> Rollout:  # fmt: skip
    return collector(**share).collect(net, number, steps, experts, markups=markups, adverts=adverts, draws_markups=True)


@pytest.fixture(scope="module")
def rollout(net: Net) -> Rollout:
    return collected(net, markups=True, adverts=1.0, experts=EXPERTS)


def flat(tree: Any) -> list[NDArray[Any]]:
    """All arrays of nested tuples."""
    if isinstance(tree, tuple):
        return [array for each in tree for array in flat(each)]
    return [np.asarray(tree)]


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(flat(a), flat(b), strict=True):
        np.testing.assert_array_equal(x, y)


# Drawing.


def test_draws_follow_the_softmax() -> None:
    scores = np.array([0.3, -1.2, -1e9, 2.0, 0.9], np.float32)
    chances = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    uniforms = ((np.arange(20_000) + 0.5) / 20_000).astype(np.float32)
    drawn = [draw(scores, u) for u in uniforms]
    counts = np.bincount([k for k, _ in drawn], minlength=5)
    np.testing.assert_allclose(counts / len(drawn), chances, atol=1e-4)
    for k, log_prob in drawn[::500]:
        assert log_prob == pytest.approx(math.log(chances[k]), abs=1e-5)


@pytest.mark.parametrize("u", [0.0, 1e-9, 0.5, 1 - 2**-24, 1.0])
def test_a_draw_is_never_forbidden(u: float) -> None:
    for scores in ([-1e9, 1.0, -1e9, 2.0, -1e9], [1.0, -1e9, -1e9], [-1e9, -1e9, 3.0], [80.0, -1e9, 79.0]):
        chosen, log_prob = draw(np.array(scores, np.float32), np.float32(u))
        assert scores[chosen] > -1e8 and np.isfinite(log_prob)


def test_a_sure_choice_has_log_probability_zero() -> None:
    assert draw(np.array([-1e9, 5.0], np.float32), np.float32(0.7)) == (1, 0.0)


# What is recorded.


def test_torch_finds_the_same_log_probabilities(actor: Actor, rollout: Rollout) -> None:
    d = rollout.decisions
    assert len(d.step) > 150
    with torch.no_grad():
        heads = actor(Inputs(*(torch.from_numpy(x) for x in (d.nodes, d.about, d.evidence, d.present, d.routes))))
        logs = [torch.log_softmax(head, -1) for head in heads]
    again = np.stack([x.gather(1, torch.from_numpy(d.choice[:, k : k + 1]))[:, 0] for k, x in enumerate(logs)], 1)
    np.testing.assert_allclose(d.log_prob, again, rtol=1e-4, atol=1e-4)
    assert np.take_along_axis(d.routes, d.choice[:, :1], 1).all()
    assert all(len(np.unique(d.choice[:, k])) >= 3 for k in range(2))


def test_choices_are_as_frequent_as_their_probabilities(actor: Actor, net: Net) -> None:
    """Each choice of each head, over thousands of decisions: a chi-square statistic of expected and found counts."""
    d = collected(net, steps=60, markups=True, adverts=1.0).decisions
    with torch.no_grad():
        heads = actor(Inputs(*(torch.from_numpy(x) for x in (d.nodes, d.about, d.evidence, d.present, d.routes))))
    for k, head in enumerate(heads):
        p = torch.softmax(head, -1).numpy().astype(np.float64)
        found = (d.choice[:, k : k + 1] == np.arange(p.shape[1])).sum(0)
        score = (found - p.sum(0)) / np.sqrt((p * (1 - p)).sum(0) + 1.0)
        assert np.abs(score).max() < stats.norm.isf(1e-5)


def test_only_decisions_on_requests_are_recorded_unless_adverts_are_learned_from(net: Net, rollout: Rollout) -> None:
    start = rollout.decisions.about.shape[1] - len(SELF_FEATURES)
    few, every = collected(net).decisions, rollout.decisions
    assert (few.about[:, start + HAS_REQUEST] > 0).all()
    bare = every.about[:, start + HAS_REQUEST] == 0
    assert bare.any() and (every.about[bare, start + ADVERT_DUE] > 0).all()
    assert (every.choice[bare, 0] == HOLD).all()
    np.testing.assert_array_equal(every.advertised, every.about[:, start + ADVERT_DUE] > 0)
    some = collected(net, markups=True, adverts=0.3).decisions
    assert 0.1 < (some.about[:, start + HAS_REQUEST] == 0).sum() / bare.sum() < 0.5


def test_of_a_team_adverts_without_a_request_are_recorded_as_well(net: Net) -> None:
    """For the critic, which values what follows a rollout, mostly providers without a request."""
    d = collected(net, markups=False, adverts=1.0).decisions
    start = d.about.shape[1] - len(SELF_FEATURES)
    bare = d.about[:, start + HAS_REQUEST] == 0
    assert bare.any() and not bare.all()
    assert (d.choice[bare, 0] == HOLD).all() and (d.log_prob[bare, 0] == 0.0).all()


def test_unless_markups_are_drawn_the_most_probable_one_is_posted(actor: Actor, net: Net) -> None:
    d = collector().collect(net, 0, 60, NONE, draws_markups=False, markups=True, adverts=1.0).decisions
    with torch.no_grad():
        _, markup = actor(Inputs(*(torch.from_numpy(x) for x in (d.nodes, d.about, d.evidence, d.present, d.routes))))
    assert (d.choice[:, 1] == markup.argmax(-1).numpy()).mean() > 0.999  # but for rounding
    assert len(np.unique(d.choice[:, 0])) >= 3


def test_summaries_are_the_mean_and_maximum_over_the_providers_of_a_market(net: Net) -> None:
    made = collector()
    views, count = made.batch.views, made.batch.markets.market["n_providers"]
    own = normalise(views.nodes[:, :, 0], NODE_FEATURES)
    me = normalise(views.me, SELF_FEATURES)
    seen = [np.concatenate([own[b, :n], me[b, :n]], 1) for b, n in enumerate(count)]
    expected = [np.concatenate([x.mean(0), x.max(0)]) for x in seen]
    rollout = made.collect(net, 0, 1, NONE, markups=True, adverts=1.0, draws_markups=True)
    asked = np.unique(rollout.decisions.market)
    assert len(asked) >= 3
    for b in asked:
        np.testing.assert_allclose(rollout.summary[0, b], expected[b], rtol=1e-4, atol=1e-5)


def test_a_share_of_the_providers_is_learned_from_and_the_markets_go_the_same_way(net: Net) -> None:
    whole = collected(net, steps=40, experts=EXPERTS)
    part = collected(net, steps=40, experts=EXPERTS, share=0.4)
    np.testing.assert_array_equal(part.reward, whole.reward)

    def rows(d: Decisions) -> dict[tuple[int, ...], NDArray[Any]]:
        both = np.concatenate([d.choice, d.expert], 1)
        return dict(zip(zip(d.step.tolist(), d.market.tolist(), d.provider.tolist(), strict=True), both, strict=True))

    all_of_them, some = rows(whole.decisions), rows(part.decisions)
    kept = {key[1:] for key in some}
    assert 0.15 < len(kept) / len({key[1:] for key in all_of_them}) < 0.65
    assert set(some) == {key for key in all_of_them if key[1:] in kept}
    for key, each in some.items():
        np.testing.assert_array_equal(each, all_of_them[key])
    for t, b, _ in some:
        np.testing.assert_array_equal(part.summary[t, b], whole.summary[t, b])


def test_others_are_learned_from_in_another_rollout(net: Net) -> None:
    made = collector(share=0.4)
    pairs = []
    for k in range(2):
        d = made.collect(net, k, 30, NONE, draws_markups=True).decisions
        pairs.append(set(zip(d.market.tolist(), d.provider.tolist(), strict=True)))
    assert pairs[0] - pairs[1] and pairs[1] - pairs[0]


def test_what_is_not_paid_goes_the_same_way_without_rewards(net: Net) -> None:
    paid, unpaid = (collector().collect(net, 0, 40, NONE, paid=paid, draws_markups=True) for paid in (True, False))
    assert np.abs(paid.reward).sum() > 0 and not unpaid.reward.any()
    assert_same(paid.decisions, unpaid.decisions)
    assert_same(paid.elapsed_s, unpaid.elapsed_s)


def test_rewards_are_in_seconds_worth_of_arrivals(net: Net) -> None:
    made = collector()
    worth = np.array([worth_per_s(planned) for planned in made.batch.plans], np.float32)
    at = [planned.scenario.name for planned in made.batch.plans].index("honest")
    one = made.batch.plans[at]
    paid = one.known[:, 0, CLASS_MEAN] + INPUT_WORTH * one.mean_prompt  # of one class, of multiplier 1; no sessions
    value = paid[one.traffic.provider].sum() / 1000
    expected = value / (one.scenario.duration_s * len(one.profiles))
    assert worth[at] == pytest.approx(expected)
    rollout = made.collect(net, 0, 1, NONE, draws_markups=True)
    np.testing.assert_allclose(rollout.reward[0], (made.batch.reward - made.batch.given) / worth[:, None], rtol=1e-6)


def test_markets_end_and_begin_anew_within_a_rollout(net: Net) -> None:
    made = collector()
    rollouts = [made.collect(net, k, 250, NONE, draws_markups=True) for k in range(2)]
    ends = sum(int(each.truncated.sum()) for each in rollouts)
    assert ends >= MARKETS - 2
    for each in rollouts:
        assert len(each.final.own) == each.truncated.sum()
        assert np.isfinite(each.final.summary).all()
        assert each.elapsed_s.max() > 0
    assert not made.batch.over.any()


# However it is spread.


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_decide_what_one_does(net: Net, world: int) -> None:
    whole = collected(net, 3, experts=EXPERTS)
    parts = [collected(net, 3, experts=EXPERTS, rank=rank, world=world) for rank in range(world)]
    assert sum(part.agent_steps for part in parts) == whole.agent_steps
    for rank, part in enumerate(parts):
        mine = np.arange(rank, MARKETS, world)
        for name in ("summary", "reward", "elapsed_s", "truncated"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:, mine], err_msg=name)
        d, all_ = part.decisions, whole.decisions
        chosen = np.isin(all_.market, mine)
        assert chosen.any()
        np.testing.assert_array_equal(mine[d.market], all_.market[chosen])
        for name in Decisions._fields:
            if name != "market":
                np.testing.assert_array_equal(getattr(d, name), getattr(all_, name)[chosen], err_msg=name)


def test_a_rollout_depends_on_its_number_and_the_runs_seed(net: Net) -> None:
    first, again, other = (collected(net, number, steps=6) for number in (0, 0, 1))
    assert_same(first, again)
    assert (first.decisions.choice.shape != other.decisions.choice.shape) or (
        first.decisions.choice != other.decisions.choice
    ).any()
    elsewhere = collected(net, steps=6, source=SOURCE._replace(seed=6))
    assert not np.array_equal(first.reward[:, :, 0], elsewhere.reward[:, :, 0])


def test_renewed_markets_are_those_of_their_batch_whatever_came_before(net: Net) -> None:
    fresh = collector()
    fresh.renew(4)
    used = collector()
    used.collect(net, 0, STEPS, NONE, draws_markups=True)
    used.renew(4)
    assert [p.seed for p in fresh.batch.plans] == [p.seed for p in used.batch.plans]
    assert_same(
        fresh.collect(net, 9, STEPS, NONE, draws_markups=True), used.collect(net, 9, STEPS, NONE, draws_markups=True)
    )
    assert [p.seed for p in collector().batch.plans] != [p.seed for p in fresh.batch.plans]


def test_the_first_markets_of_a_batch_end_at_different_times() -> None:
    """And those after them have the full length, a sixth of it for conversation."""
    drawn = [SOURCE.plans(0, market) for market in range(24)]
    first, second = ([next(stream) for stream in drawn] for _ in range(2))
    full = {kind: SOURCE.duration_s / (6 if kind == "conversation" else 1) for kind in KINDS}
    shares = np.array([planned.scenario.duration_s / full[planned.scenario.name] for _, planned in first])
    assert (shares > 0.1).all() and (shares < 1).all() and np.ptp(shares) > 0.6
    assert all(planned.scenario.duration_s == pytest.approx(full[planned.scenario.name]) for _, planned in second)
    assert all(planned.scenario.drain_s == SOURCE.drain_s for _, planned in first + second)


def test_a_market_may_have_its_full_length_from_the_first_on() -> None:
    planned = next(SOURCE.plans(0, 0, begun=False))[1]
    assert planned.scenario.duration_s == SOURCE.duration_s


def test_a_market_to_which_nobody_comes_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards are shares of what comes, so that there they would be no numbers."""
    busy = sample("honest", np.random.default_rng(1), 60.0)
    silent = replace(busy, providers=tuple(replace(p, traffic=None) for p in busy.providers))
    drawn = iter([silent, silent, busy])
    monkeypatch.setattr(rollouts, "sample", lambda kind, rng, duration_s: next(drawn))
    _, planned = next(SOURCE.plans(0, 0, begun=False))
    assert planned.scenario.providers == busy.providers and planned.traffic.time_s.size > 0


# Opponents.


def posting(actor: Actor, markup: int) -> Net:
    """A policy that posts this markup alone."""
    weights = weights_of(actor)
    weights["markup.weight"] = np.zeros_like(weights["markup.weight"])
    weights["markup.bias"] = np.where(np.arange(MARKUPS.size) == markup, 0.0, -60.0).astype(np.float32)
    return net_of(weights)


def test_one_plays_alone_against_other_policies_and_is_alone_learned_from(actor: Actor) -> None:
    made = collector(alone=1.0, share=0.4)
    others = [posting(actor, 6), posting(actor, 7)]
    d = made.collect(
        posting(actor, 4), 0, 60, NONE, markups=True, adverts=1.0, opponents=others, draws_markups=True
    ).decisions
    assert (d.choice[:, 1] == 4).all() and (d.log_prob[:, 1] > -1e-6).all()
    learned = set(zip(d.market.tolist(), d.provider.tolist(), strict=True))
    assert sorted(market for market, _ in learned) == sorted({market for market, _ in learned})
    assert len(learned) >= MARKETS - 1
    posted = {key: int(made.actions.markup[key]) for key in np.ndindex(*made.actions.markup.shape)}
    assert {posted[key] for key in learned} == {4}
    assert {markup for key, markup in posted.items() if key not in learned} == {
        AT_COST,
        6,
        7,
    }  # it: never asked


def test_where_nobody_plays_alone_all_play_the_policy(actor: Actor) -> None:
    net, other = posting(actor, 4), posting(actor, 7)
    alone = collector(alone=0.0).collect(net, 0, STEPS, NONE, markups=True, opponents=[other], draws_markups=True)
    assert_same(alone, collector().collect(net, 0, STEPS, NONE, markups=True, draws_markups=True))
    made = collector(alone=0.5)
    made.collect(net, 0, STEPS, NONE, markups=True, opponents=[other], draws_markups=True)
    found = [set(row.tolist()) for row in made.actions.markup]
    assert {7 in row for row in found} == {True, False}


# Experts.


def test_the_expert_of_the_kind_is_asked(net: Net) -> None:
    made = collector()
    for k in range(8):
        views = type(made.batch.views)(*(array.copy() for array in made.batch.views))
        active, uniforms, kinds = made.batch.active.copy(), made.batch.uniforms.copy(), list(made.kinds)
        d = made.collect(net, k, 1, EXPERTS, draws_markups=True).decisions
        for m in range(len(d.step)):
            b, i = d.market[m], d.provider[m]
            actions = made.batch.actions()
            EXPERTS[kinds[b]].decide(views, active, uniforms, actions)
            assert d.expert[m].tolist() == [actions.route[b, i], actions.markup[b, i]]
            assert d.routes[m, d.expert[m, 0]] == 1


def test_without_an_expert_there_is_no_expert_action(net: Net) -> None:
    assert (collected(net, steps=3, experts=EXPERTS).decisions.expert >= 0).all()
    assert (collected(net, steps=3).decisions.expert == -1).all()


def test_a_learned_policy_would_decide_the_most_probable_of_what_was_drawn(actor: Actor, net: Net) -> None:
    """The collector and the policy that operators run share kernels; here they are asked about the same views."""
    made = collector()
    policy, actions = LearnedPolicy(weights_of(actor), {}), made.batch.actions()
    policy.decide(made.batch.views, made.batch.active, made.batch.uniforms, actions)
    d = made.collect(net, 0, 1, NONE, markups=True, adverts=1.0, draws_markups=True).decisions
    for each in (actions, made.actions):
        assert (each.admission[made.batch.active][:, IF_IT_PAYS] == 0.75).all()
        assert (each.admission[made.batch.active][:, KEEP] == 0.5).all()
    same = d.choice[:, 0] == actions.route[d.market, d.provider]
    likely = np.exp(d.log_prob[:, 0]) > 0.5
    assert likely.any() and same[likely].all()
