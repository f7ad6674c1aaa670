"""Markups that are learned in markets whose answer is known: sellers without users of their own, and one buyer."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wwwserve.agents.decision import ROUTES, Actions
from wwwserve.agents.policy.forward import LearnedPolicy
from wwwserve.agents.policy.network import weights_of
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import ADVERT_DUE
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import Kind
from wwwserve.envs.scenario import parse
from wwwserve.envs.state import MarketPlan, plan
from wwwserve.train import pricing
from wwwserve.train.mappo import Args, Learner, Processes
from wwwserve.train.pricing import play_pairs
from wwwserve.train.rollout import worth_per_s

SHARPNESS, GREED = 5, 9  # of `agents.policy.architecture.SETTING_UNITS`
COMPUTE = 0.26  # credits for 1000 tokens, on the buyer's own card as well
WORTH = 0.6  # what they are worth in time: a seller alone can ask as much beyond its cost


def toy(sellers: int) -> MarketPlan:
    """A buyer whose own card answers hardly a request in time, and idle sellers who answer all."""
    lengths = {"prompt": {"median": 20, "sigma": 0.0, "max": 100}, "output": {"median": 400, "sigma": 0.0, "max": 600}}
    silent = {"kind": "times", "times_s": []}
    providers: list[dict[str, Any]] = [
        {"name": "buyer", "gpu": "rtx-3090", "model": "qwen3-8b", "serves": ["m"],
         "traffic": {"kind": "times", "times_s": [0.5 + 2.0 * k for k in range(20)]}},
        *({"name": f"s{k}", "gpu": "h100", "model": "qwen3-4b", "serves": ["m"], "traffic": silent}
          for k in range(sellers)),
    ]  # fmt: skip
    scenario = parse(
        {"name": "toy", "duration_s": 41.0, "drain_s": 10.0,
         "slo": {"classes": {"all": {"share": 1.0, "deadline_s": 6.0, "value": WORTH}}},
         "economy": {"compute_cost_per_ktok": COMPUTE}, "defaults": {"lengths": lengths}, "providers": providers},
        "toy",
    )  # fmt: skip
    return plan(scenario, 1)


def endless(planned: MarketPlan) -> Iterator[tuple[Kind, MarketPlan]]:
    while True:
        yield "honest", planned


class Steps(NamedTuple):
    """What was decided in one step."""

    markup: NDArray[np.int32]  # [B, N]
    due: NDArray[np.bool_]  # [B, N]


def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Steps], list[MarketBatch]]:
    """The steps, and the batches, of all markets that `play_pairs` plays from now on."""
    steps: list[Steps] = []
    batches: list[MarketBatch] = []

    class Watched(MarketBatch):
        def __init__(self, plans: list[MarketPlan]) -> None:
            super().__init__(plans)
            batches.append(self)

        def step(self, actions: Actions) -> None:
            steps.append(Steps(actions.markup.copy(), self.active & (self.views.me[..., ADVERT_DUE] > 0.5)))
            super().step(actions)

    monkeypatch.setattr(pricing, "MarketBatch", Watched)
    return steps, batches


def posting(markup: int) -> LearnedPolicy:
    """A policy that buys where it gains most and posts this markup alone."""
    learner = Learner(Args(processes=1), Processes())
    with torch.no_grad():
        at = learner.actor.layers()
        at.setting.bias[SHARPNESS], at.setting.bias[GREED] = -9.0, 9.0
        at.markup.bias[markup] = 60.0
    return LearnedPolicy(weights_of(learner.actor), {})


def test_a_pair_differs_in_the_markup_of_one_provider_by_one_notch(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, batches = watched(monkeypatch)
    pairs, usual, planned = 12, 3, toy(2)
    notches = play_pairs(posting(usual), endless(planned), pairs, np.random.default_rng(2))
    (batch,) = batches
    moves: list[set[tuple[int, int]]] = [set() for _ in range(pairs)]
    for each in steps:
        assert (each.markup[0::2][each.due[0::2]] == usual).all()
        for k, i in zip(*np.nonzero(each.due[1::2] & (each.markup[1::2] != usual)), strict=True):
            moves[k].add((int(i), int(each.markup[2 * k + 1, i]) - usual))
    assert all(len(each) == 1 for each in moves)
    mover, notch = (np.array([next(iter(each))[column] for each in moves]) for column in (0, 1))
    assert set(notch.tolist()) == {-1, 1} and len(set(mover.tolist())) == 3
    for each in steps:  # all its adverts are moved
        moved = each.due[1::2][np.arange(pairs), mover]
        assert (each.markup[1::2][np.arange(pairs), mover] == usual + notch)[moved].all()
    profit = batch.markets.providers["profit"][:, :3]
    value = worth_per_s(planned) * planned.scenario.duration_s
    gain = (profit[1::2] - profit[0::2])[np.arange(pairs), mover] / value
    assert (gain > 0.01).any() and (gain < -0.01).any()
    found = set(zip(notches.moved.tolist(), np.round(notches.gain, 4).tolist(), strict=True))
    expected = set(zip((usual + notch).tolist(), np.round(gain.astype(np.float32), 4).tolist(), strict=True))
    assert found and found <= expected and (notches.markup == usual).all()
    assert len(found) > len(expected) / 2


def test_only_the_one_whose_markups_are_moved_plays_the_policy_where_there_are_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, _ = watched(monkeypatch)
    usual, theirs, pairs = 2, 5, 6
    notches = play_pairs(posting(usual), endless(toy(2)), pairs, np.random.default_rng(2), posting(theirs))
    posted: list[set[int]] = [set() for _ in range(3 * 2 * pairs)]
    for each in steps:
        for b, i in zip(*np.nonzero(each.due), strict=True):
            posted[3 * b + i].add(int(each.markup[b, i]))
    for k in range(pairs):
        still, moved = (posted[3 * b : 3 * b + 3] for b in (2 * k, 2 * k + 1))
        mover = still.index({usual})
        assert [each for i, each in enumerate(still) if i != mover] == [{theirs}] * 2
        assert moved[mover] in ({usual - 1}, {usual + 1})
        assert [each for i, each in enumerate(moved) if i != mover] == [{theirs}] * 2
    assert (notches.markup == usual).all()


def test_at_the_ends_of_the_grid_there_is_no_further_notch() -> None:
    for usual, moved in ((0, 1), (MARKUPS.size - 1, MARKUPS.size - 2)):
        notches = play_pairs(posting(usual), endless(toy(1)), 8, np.random.default_rng(4))
        assert notches.moved.size and (notches.moved == moved).all()


@pytest.mark.parametrize("gain", [0.02, -0.02])
@pytest.mark.parametrize("notch", [1, -1])
def test_a_markup_that_gained_becomes_likelier_and_one_that_lost_less_likely(notch: int, gain: float) -> None:
    learner = Learner(Args(processes=1, markup_entropy=0.0), Processes())
    policy = LearnedPolicy(weights_of(learner.actor), {})
    notches = play_pairs(policy, endless(toy(1)), 4, np.random.default_rng(4))
    usual = np.full_like(notches.markup, 3)
    notches = notches._replace(markup=usual, moved=usual + notch, gain=np.full_like(notches.gain, gain))

    def chances() -> NDArray[np.float64]:
        scores = torch.from_numpy(LearnedPolicy(weights_of(learner.actor), {}).logits(notches.views)[:, ROUTES:])
        found: NDArray[np.float64] = torch.softmax(scores, -1).mean(0).double().numpy()
        return found

    before = chances()
    logged = learner.learn_markups(notches)
    change = chances() - before
    assert np.sign(change[3 + notch]) == np.sign(gain) == -np.sign(change[3])
    assert logged["notch_gain"] == pytest.approx(gain) and logged["notch_size"] == pytest.approx(abs(gain))
    assert logged["markup_posted"] == pytest.approx(MARKUPS[3])


@pytest.mark.parametrize(("sellers", "least", "most"), [(1, 0.5, 0.5), (2, 0.0, 0.05)])
def test_a_seller_alone_takes_what_the_buyer_gains_and_two_compete_it_away(
    sellers: int, least: float, most: float
) -> None:
    """Of two who post the same, neither gains by another notch at cost, nor at the notch above: both are equilibria."""
    learner = Learner(Args(seed=3, markup_entropy=0.02, markup_rate=1.0, processes=1), Processes())
    with torch.no_grad():  # a buyer who goes by what a request brings, not by when it is done
        learner.actor.layers().setting.bias[SHARPNESS], learner.actor.layers().setting.bias[GREED] = -9.0, 9.0
    planned, rng = toy(sellers), np.random.default_rng(5)
    for _ in range(40):
        learner.learn_markups(play_pairs(LearnedPolicy(weights_of(learner.actor), {}), endless(planned), 16, rng))
    notches = play_pairs(LearnedPolicy(weights_of(learner.actor), {}), endless(planned), 16, rng)
    posted = MARKUPS[notches.markup]
    assert len(posted) > 20
    assert least <= float(np.median(posted)) <= most
