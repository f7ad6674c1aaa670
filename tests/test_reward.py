"""Rewards by decision: what a placement changed in predicted values, worked out by hand from the engine's profile."""

from typing import Any

import numpy as np
import pytest
from markets import TAKE_ALL, lengths, times
from numpy.typing import NDArray
from scipy import stats

from wwwserve.agents.decision import AT_COST, FIRST_CANDIDATE, HOLD, LOCAL, MAX_WAIT_S, WHAT_PAYS
from wwwserve.agents.estimate import chance_on_time
from wwwserve.agents.hardware import BLOCK_TOKENS, CHUNK_TOKENS, KV_BLOCKS
from wwwserve.agents.kernel import Floats
from wwwserve.agents.knowledge import (
    AD_CONTEXT,
    AD_MEAN_OUTPUT,
    AD_PER_KV_TOKEN_S,
    AD_PER_PAIR_S,
    AD_PER_SEQ_S,
    AD_PER_TOKEN_S,
    AD_PREFILL_BASE_S,
    AD_RUNNING,
    AD_WEIGHT_S,
    on_scrape,
)
from wwwserve.agents.protocol import INPUT, MICRO, OUTPUT
from wwwserve.agents.rules import Rule
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import KINDS, Kind, sample
from wwwserve.envs.engine import advance, tokens_out
from wwwserve.envs.prefix_cache import NO_CACHE
from wwwserve.envs.scenario import Scenario, parse
from wwwserve.envs.state import PROBES_REFUSED, Reward

HERE, TO_FIRST = LOCAL, FIRST_CANDIDATE


DEADLINE_S = 14.0  # within it, 600 tokens of an idle node come with fair odds
NODE = {"gpu": "rtx-4090", "model": "qwen3-8b", "lengths": lengths(100, 600)}


def market(*providers: dict[str, Any], **top: Any) -> Scenario:
    """Requests are worth 3 and paid as quoted; 50 ms round trip and 1 s ticks."""
    slo = {"classes": {"chat": {"share": 1, "deadline_s": DEADLINE_S, "value": 4.8}}}
    named = [{"name": f"n{i}", "serves": ["m"], **provider} for i, provider in enumerate(providers)]
    economy = {"payment": "quoted", "compute_cost_per_ktok": 0.1}
    shared = {"name": "test", "duration_s": 30, "drain_s": 30, "slo": slo, "economy": economy}
    return parse(shared | {"providers": named} | top)


class Watched:
    """One market, and what it was before its last step."""

    def __init__(self, scenario: Scenario, reward: Reward) -> None:
        self.batch = MarketBatch([scenario], [1], reward=reward)
        self.actions = self.batch.actions()
        self.actions.admission[...] = TAKE_ALL
        self.markup = AT_COST

    def until(self, provider: int) -> None:
        """Step until `provider` has a request to decide on; others run theirs where they arrive."""
        while self.batch.markets.providers[0, provider]["head"] < 0:
            self.step(HERE, HERE)
        self.read_engines()

    def read_engines(self) -> None:
        """Bring every engine, and what its provider knows of it, to now; a market does so only where it is needed."""
        m, now_s = self.batch.markets, float(self.batch.now_s[0])
        for e, p in zip(m.engines[0], m.providers[0], strict=True):
            if e["wake_s"] > now_s:
                advance(e, NO_CACHE, m.requests[0], now_s, np.zeros(8, np.int64), 0)
            tokens = (int(e["profile"][KV_BLOCKS]) - int(e["free_blocks"])) * BLOCK_TOKENS
            on_scrape(p["own"], now_s, float(e["running"]), float(e["waiting"]), float(tokens), 0.0, np.inf)

    def step(self, *routes: int) -> NDArray[np.float32]:
        """One step; the rewards [N]."""
        self.now_s = float(self.batch.now_s[0])
        self.read_engines()
        self.own = [np.array(p["own"]) for p in self.batch.markets.providers[0]]
        self.future = self.batch.markets.providers["future"][0].copy()
        self.actions.route[0] = routes
        self.actions.markup[0] = self.markup
        self.batch.step(self.actions)
        return self.batch.reward[0].copy()

    def cost(self, i: int) -> float:
        """What the request of the last step takes on node i beside its own loss of value: compute, and the chance of
        users who are yet to come there."""
        compute = self.batch.markets.providers["compute"][0, i]
        return float(100 * compute[INPUT] + 600 * compute[OUTPUT] + self.future[i] * 600 / self.own[i][AD_MEAN_OUTPUT])

    def price(self, r: int) -> float:
        """What request r, with a peer, is to cost."""
        tariff = self.batch.markets.requests["tariff"][0, r]
        return float((100 * tariff[INPUT] + 600 * tariff[OUTPUT]) // 1000 / MICRO)

    def predicted(self, r: int) -> float:
        return float(self.batch.markets.requests[0]["predicted"][r])


def times_on(own: Floats, decoding: int) -> tuple[float, float]:
    """Time to the first token of 100 on a node without a queue, and time per token where so many decode."""
    decode_s = own[AD_WEIGHT_S] + decoding * (own[AD_PER_SEQ_S] + own[AD_PER_KV_TOKEN_S] * own[AD_CONTEXT])
    prefill_s = own[AD_PREFILL_BASE_S] + 100 * own[AD_PER_TOKEN_S] + 0.5 * 100 * 100 * own[AD_PER_PAIR_S]
    between_s = max(0.0, prefill_s - own[AD_WEIGHT_S]) / own[AD_MEAN_OUTPUT]
    return max(own[AD_WEIGHT_S], prefill_s) + decode_s, decode_s + decoding * between_s


def delay_on(own: Floats, uncached: float = 100, cached: float = 0) -> float:
    """How long the prefill of a prompt, after what is cached of it, holds up those that decode on a node."""
    compute_s = own[AD_PER_TOKEN_S] * uncached + own[AD_PER_PAIR_S] * uncached * (cached + 0.5 * uncached)
    chunks = max(1.0, uncached / CHUNK_TOKENS)
    return float(max(0.0, chunks * (own[AD_PREFILL_BASE_S] - own[AD_WEIGHT_S]) + compute_s))


def value(waited_s: float, first_s: float, token_s: float, tokens: float) -> float:
    """What is to be expected of 3 credits if `tokens` tokens come at this pace: log time is normal, known to 0.2."""
    return 3.0 * chance_on_time(np.array([DEADLINE_S]), waited_s, first_s, token_s, tokens, 0.2, 1e9)


def value_in_flight(waited_s: float, token_s: float, tokens: int, delay_s: float = 0.0) -> float:
    """What is to be expected of 3 credits while `tokens` are still to come at this pace after a delay: log-logistic of
    shape 8."""
    return 3.0 / (1.0 + ((delay_s + tokens * token_s) / (DEADLINE_S - waited_s)) ** 8)


def test_what_is_in_flight_is_valued_nearly_as_what_is_placed() -> None:
    for tokens in range(200, 600, 20):
        assert value_in_flight(4.0, 0.025, tokens) == pytest.approx(value(4.0, 0.0, 0.025, tokens), abs=0.06)


def test_a_predicted_value_is_that_of_a_lognormal_time() -> None:
    """600 tokens at 20 ms take 12 s at the median; 10 s are left after 1.5 s and the first token 0.5 s later."""
    exact = 3.0 * stats.norm.cdf(np.log(10.0 / 12.0) / 0.2)
    assert value(DEADLINE_S - 10.5, 0.5, 0.02, 600) == pytest.approx(exact, abs=0.06)


@pytest.mark.parametrize("team_weight", [0.0, 0.3, 1.0])
def test_a_placement_on_an_idle_node_pays_its_own_predicted_loss(team_weight: float) -> None:
    """Its value counts in full from its arrival on, so what a placement leaves to chance is a loss."""
    seen = Watched(market(NODE | {"traffic": times(0.25)}, {}), Reward(team_weight, by_decision=True))
    seen.until(0)
    assert seen.predicted(0) == 3.0
    paid = seen.step(HERE, HERE)
    assert seen.now_s == 0.25 and seen.own[0][AD_RUNNING] == 0
    expected = value(0.0, *times_on(seen.own[0], 1), 600)
    assert 0.5 < expected < 2.5
    assert paid.tolist() == [pytest.approx(expected - 3.0 - seen.cost(0), rel=1e-5), 0.0]
    assert seen.predicted(0) == pytest.approx(expected)


@pytest.mark.parametrize("route", [HERE, TO_FIRST])
@pytest.mark.parametrize("team_weight", [0.0, 0.3, 1.0])
def test_who_runs_beside_a_newcomer_is_predicted_anew_at_the_cost_of_who_sent_it(
    team_weight: float, route: int
) -> None:
    """Request 0 runs on node 1 for 5 s when provider 0 sends request 1 there, or else keeps it on node 0."""
    scenario = market(NODE | {"traffic": times(5.25)}, NODE | {"traffic": times(0.25)})
    seen = Watched(scenario, Reward(team_weight, by_decision=True))
    seen.until(1)
    seen.step(HERE, HERE)
    before = seen.predicted(0)
    seen.until(0)
    engine, requests = seen.batch.markets.engines[0, 1], seen.batch.markets.requests[0]
    left = 600 - int(tokens_out(engine, requests, 0))
    assert 300 < left < 450
    paid = seen.step(route, HERE)
    assert seen.now_s == 5.25
    own = value(0.025 if route == TO_FIRST else 0.0, *times_on(seen.own[route - HERE], route), 600)
    if route == HERE:
        assert paid.tolist() == [pytest.approx(own - 3.0 - seen.cost(0), rel=1e-5), 0.0]
        assert seen.predicted(0) == before
        return
    own_1 = seen.own[1]
    alone = value_in_flight(5.0, times_on(own_1, 1)[1], left)
    beside = value_in_flight(5.0, times_on(own_1, 2)[1], left, delay_on(own_1))
    assert beside < alone - 0.02
    others = beside - alone - seen.cost(1)
    price = seen.price(1)
    assert price > 0.05 and seen.cost(1) > 0.05
    expected = own - 3.0 + team_weight * others - (1.0 - team_weight) * price
    assert paid.tolist() == [pytest.approx(expected, rel=1e-5), 0.0]
    assert seen.predicted(0) == pytest.approx(beside)
    assert seen.predicted(1) == pytest.approx(own)
    potential = seen.batch.markets.providers[0]["potential"]
    assert potential[:2].tolist() == pytest.approx([own, beside])


def test_a_long_prompt_holds_up_who_runs_beside_it() -> None:
    scenario = market(NODE | {"traffic": times(5.25), "lengths": lengths(6000, 600)}, NODE | {"traffic": times(0.25)})
    seen = Watched(scenario, Reward(1.0, by_decision=True))
    seen.until(1)
    seen.step(HERE, HERE)
    seen.until(0)
    left = 600 - int(tokens_out(seen.batch.markets.engines[0, 1], seen.batch.markets.requests[0], 0))
    seen.step(TO_FIRST, HERE)
    delay_s = delay_on(seen.own[1], 6000)
    beside = value_in_flight(5.0, times_on(seen.own[1], 2)[1], left, delay_s)
    assert delay_s > 0.5 and seen.predicted(0) == pytest.approx(beside)
    assert beside < value_in_flight(5.0, times_on(seen.own[1], 2)[1], left) - 0.2


def test_the_own_request_beside_a_newcomer_counts_in_full() -> None:
    """However selfish a provider is."""
    seen = Watched(market(NODE | {"traffic": times(0.25, 5.25)}, {}), Reward(0.0, by_decision=True))
    seen.until(0)
    seen.step(HERE, HERE)
    seen.until(0)
    left = 600 - int(tokens_out(seen.batch.markets.engines[0, 0], seen.batch.markets.requests[0], 0))
    paid = seen.step(HERE, HERE)
    alone = value_in_flight(5.0, times_on(seen.own[0], 1)[1], left)
    beside = value_in_flight(5.0, times_on(seen.own[0], 2)[1], left, delay_on(seen.own[0]))
    own = value(0.0, *times_on(seen.own[0], 2), 600)
    assert paid[0] == pytest.approx(own - 3.0 + beside - alone - seen.cost(0), rel=1e-5)


def test_nothing_is_paid_for_arrivals_ends_and_the_horizon() -> None:
    """Requests arrive, are done or run out of time; only the steps of their placements pay."""
    scenario = market(NODE | {"traffic": times(0.25, 1.25, 12.25, 29.5)}, {}, drain_s=3)
    seen = Watched(scenario, Reward(1.0, by_decision=True))
    paid: dict[float, float] = {}
    while not seen.batch.over[0]:
        deciding = seen.batch.markets.providers[0, 0]["head"] >= 0
        rewards = seen.step(HERE, HERE)
        assert not seen.batch.given.any() and rewards[1] == 0
        if deciding:
            paid[seen.now_s] = float(rewards[0])
        else:
            assert rewards[0] == 0
    latency_s = seen.batch.requests(0).latency_s
    assert np.isfinite(latency_s[:3]).all() and np.isinf(latency_s[3])
    assert list(paid) == [0.25, 1.25, 12.25, 29.5]
    assert all(-3 < reward < 0 for reward in paid.values())


def test_a_wait_costs_what_it_makes_impossible_when_it_does() -> None:
    """A held request is worth at most what it would be, begun at once and alone on the own engine."""
    seen = Watched(market(NODE | {"traffic": times(0.25)}, {}, drain_s=60), Reward(1.0, by_decision=True))
    seen.until(0)
    own = np.array(seen.batch.markets.providers[0, 0]["own"])
    token_s = own[AD_WEIGHT_S] + own[AD_PER_SEQ_S] + 400 * own[AD_PER_KV_TOKEN_S]
    worth, lost = 3.0, []
    for _ in range(8):
        paid = seen.step(HOLD, HOLD)
        before, worth = worth, min(worth, value(seen.now_s - 0.25, 0.0, token_s, 600))
        assert paid.tolist() == [pytest.approx(worth - before, rel=1e-4, abs=1e-6), 0.0]
        assert seen.predicted(0) == pytest.approx(worth)
        lost.append(float(paid[0]))
    assert min(lost) < -0.3 and len([x for x in lost if x < -0.01]) > 3
    placed = seen.step(HERE, HERE)
    late = value(seen.now_s - 0.25, *times_on(seen.own[0], 1), 600)
    assert placed[0] == pytest.approx(late - worth - seen.cost(0), rel=1e-4)


@pytest.mark.parametrize("team_weight", [0.0, 1.0])
def test_a_refusal_gives_back_what_the_offer_took(team_weight: float) -> None:
    """From the wait on, and of the request beside which it would have run, too."""
    scenario = market(NODE | {"traffic": times(5.25)}, NODE | {"traffic": times(0.25)}, gossip_interval_s=1)
    seen = Watched(scenario, Reward(team_weight, by_decision=True))
    seen.until(1)
    seen.step(HERE, HERE)
    seen.until(0)
    seen.actions.admission[0, 1, MAX_WAIT_S] = -1.0
    paid = sum(float(seen.step(HOLD, HERE)[0]) for _ in range(7))
    held = seen.predicted(1)
    assert paid == pytest.approx(held - 3.0, rel=1e-4) and held < 2.9
    refused = float(seen.step(TO_FIRST, HERE)[0])
    assert seen.batch.markets.providers["counts"][0, 0, PROBES_REFUSED] == 1
    assert refused == pytest.approx(0.0, abs=1e-6) and seen.predicted(1) == held
    placed = float(seen.step(HERE, HERE)[0])
    assert placed == pytest.approx(seen.predicted(1) - held - seen.cost(0), rel=1e-4)


def test_what_is_held_too_long_is_lost_by_then() -> None:
    scenario = market(NODE | {"traffic": times(0.25)}, {}, drain_s=60, economy={"compute_cost_per_ktok": 0.0})
    seen = Watched(scenario, Reward(1.0, by_decision=True, future=False))
    paid = []
    while not seen.batch.over[0]:
        paid.append(float(seen.step(HOLD, HOLD)[0]))
    assert max(paid) <= 0.0
    assert sum(paid) == pytest.approx(-3.0, abs=1e-3)
    assert len([x for x in paid if x < -0.01]) > 3  # not at once


@pytest.mark.parametrize("by_decision", [False, True])
@pytest.mark.parametrize("team_weight", [0.0, 0.25, 1.0])
def test_payments_count_as_far_as_a_provider_is_selfish(team_weight: float, by_decision: bool) -> None:
    """Provider 0 sends its request to provider 1: in the team's reward what one pays the other cancels."""
    totals, prices = [], []
    for markup in (AT_COST, 7):
        seen = Watched(market(NODE | {"traffic": times(0.25)}, NODE), Reward(team_weight, by_decision=by_decision))
        seen.actions.admission[...] = WHAT_PAYS
        total = np.zeros(2)
        while not seen.batch.over[0]:
            seen.markup = markup
            total += seen.step(TO_FIRST, HERE)
        totals.append(total)
        prices.append(seen.price(0))
        assert seen.batch.requests(0).executor.tolist() == [1]
    more = (1.0 - team_weight) * (prices[1] - prices[0])
    assert prices[1] > prices[0] > 0.0
    np.testing.assert_allclose(totals[1] - totals[0], [-more, 0.0 if by_decision else more], atol=1e-5)


@pytest.mark.parametrize(("promise", "share"), [(1.0, None), (0.4, 0.0)])
def test_a_late_answer_is_expected_to_cost_less(promise: float, share: float | None) -> None:
    """Of one that was promised in 0.4 of the time nothing is expected to be due, of an honest one most; the rest of
    what the origin is paid is the same."""
    scenario = market(NODE | {"traffic": times(0.25)}, NODE | {"misreport": {"promise": promise}},
                      economy={"payment": "lateness", "compute_cost_per_ktok": 0.1})  # fmt: skip
    seen = Watched(scenario, Reward(0.0, by_decision=True))
    seen.until(0)
    paid = float(seen.step(TO_FIRST, HERE)[0])
    own = value(0.025, *times_on(seen.own[1], 1), 600)
    expected = (own - 3.0 - paid) / seen.price(0)
    assert 0.8 < expected < 1.0 if share is None else expected == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_course_of_a_market_does_not_depend_on_the_reward(kind: Kind) -> None:
    scenario = sample(kind, np.random.default_rng(3), 150.0)
    rules = (
        Reward(), Reward(0.3, by_decision=True), Reward(1.0, 0.9, False, False),
        Reward(0.0, by_decision=True, future=False),
    )  # fmt: skip
    batch, rule = [MarketBatch([scenario], [4], reward=each) for each in rules], Rule("best_value")
    actions = batch[0].actions()
    differ = False
    while not batch[0].over.all():
        rule.decide(batch[0].views, batch[0].active, batch[0].uniforms, actions)
        for each in batch:
            each.step(actions)
        for other in batch[1:]:
            for a, b in zip(batch[0].views, other.views, strict=True):
                np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(batch[0].active, other.active)
            differ = differ or bool((batch[0].reward != other.reward).any())
    assert differ
    for other in batch[1:]:
        for a, b in zip(batch[0].requests(0), other.requests(0), strict=True):
            np.testing.assert_array_equal(a, b)
        for name in ("counts", "profit", "own"):
            np.testing.assert_array_equal(batch[0].markets.providers[name], other.markets.providers[name])
        np.testing.assert_array_equal(batch[0].markets.accounts, other.markets.accounts)
