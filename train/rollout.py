"""Rollouts: a batch of training markets played by the current policy, and what learning needs of it.

The policy's kernels read the batch's views where they lie and write the decisions where learning reads them; nothing is
copied between environment and learner. What is random depends on the run's seed, the number of the rollout and the
number of the market in the whole run, so it is the same however the markets are spread over processes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.classes import CLASS_VALUE
from wwwserve.agents.decision import HOLD, NODES, ROUTES, Actions, admit_what_pays
from wwwserve.agents.kernel import Bools, Floats, Ints, Singles, kernel
from wwwserve.agents.policy.architecture import ABOUT, EVIDENCE, LOGITS
from wwwserve.agents.policy.forward import Net, is_node, logits, normalise_about, normalise_node
from wwwserve.agents.policy.forward import scratch as make_scratch
from wwwserve.agents.policy.network import SUMMARY
from wwwserve.agents.rules import Policy
from wwwserve.agents.view import (
    ADVERT_DUE,
    HAS_REQUEST,
    NODE_FEATURES,
    REQUEST_FEATURES,
    Views,
)
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import Kind, kind_of, sample
from wwwserve.envs.scenario import Scenario
from wwwserve.envs.state import MarketPlan, Reward, Shape, plan

FloatArray = NDArray[np.float32]
MOST_PROVIDERS = 12  # in a training market


class Decisions(NamedTuple):
    """Decisions and what is needed to evaluate them anew, [M] each; see `agents.policy.network.Inputs`."""

    step: NDArray[np.int64]  # which step, market and provider
    market: NDArray[np.int64]
    provider: NDArray[np.int64]
    nodes: FloatArray  # [M, NODES, len(NODE_FEATURES)]
    about: FloatArray  # [M, ABOUT]
    evidence: FloatArray  # [M, NODES, len(EVIDENCE)]
    present: FloatArray  # [M, NODES]
    routes: NDArray[np.int8]  # [M, ROUTES] the mask
    choice: NDArray[np.int64]  # [M, 2] route, markup
    log_prob: FloatArray  # [M, 2] of each
    expert: NDArray[np.int64]  # [M, 2] the action of the expert, -1 where there is none
    advertised: NDArray[np.bool_]  # [M] an advert is due, so that the markup matters


def make_decisions(count: int) -> Decisions:
    """Space for `count` decisions."""
    return Decisions(
        step=np.zeros(count, np.int64),
        market=np.zeros(count, np.int64),
        provider=np.zeros(count, np.int64),
        nodes=np.zeros((count, NODES, len(NODE_FEATURES)), np.float32),
        about=np.zeros((count, ABOUT), np.float32),
        evidence=np.zeros((count, NODES, len(EVIDENCE)), np.float32),
        present=np.zeros((count, NODES), np.float32),
        routes=np.zeros((count, ROUTES), np.int8),
        choice=np.zeros((count, 2), np.int64),
        log_prob=np.zeros((count, 2), np.float32),
        expert=np.full((count, 2), -1, np.int64),
        advertised=np.zeros(count, np.bool_),
    )


class Situation(NamedTuple):
    """What a critic reads, leading axes [...]."""

    own: FloatArray  # [..., len(NODE_FEATURES)]
    about: FloatArray  # [..., ABOUT]
    summary: FloatArray  # [..., SUMMARY]


class Rollout(NamedTuple):
    """T steps of B markets of N providers."""

    numbers: NDArray[np.int64]  # [B] of the markets in the whole run
    decisions: Decisions
    summary: FloatArray  # [T, B, SUMMARY] the pooled state of each market where something is learned
    reward: FloatArray  # [T, B, N] in seconds' worth of the market's arrivals
    elapsed_s: NDArray[np.float64]  # [T, B]
    truncated: NDArray[np.bool_]  # [T, B] the market's horizon came at the end of this step
    last: Situation  # [B, N] what follows the rollout
    final: Situation  # [C, N] what followed in the markets that were truncated, in the order of `truncated`
    agent_steps: int


@kernel
def draw(scores: FloatArray, u: float) -> tuple[int, float]:
    """An index with probability softmax(scores [C]), by the uniform `u`, and its log-probability."""
    top = scores[0]
    for k in range(scores.size):
        top = max(top, scores[k])
    total = np.float32(0.0)
    for k in range(scores.size):
        total += np.exp(scores[k] - top)
    left = u * total
    chosen = -1
    for k in range(scores.size):
        weight = np.exp(scores[k] - top)
        if weight > 0.0:
            chosen = k
            left -= weight
            if left < 0.0:
                break
    return chosen, scores[chosen] - top - np.log(total)


@kernel
def act(
    net: Net, views: Views, step: int, m: int, market: Ints, provider: Ints, learned: Bools, uniform: Singles,
    draws_markups: bool, actions: Actions, d: Decisions, work: Singles, out: Singles,
) -> int:  # fmt: skip
    """Decide for each row of `market` and `provider`; `actions` receives the choices, drawn by `uniform` [B, N, 2], but
    the most probable markup unless it `draws_markups`.

    Decisions of the `learned` [B, N] providers are written to `d`, from number m on; there is to be space for one more.
    Returns the number that follows.
    """
    for k in range(market.size):
        b, i = market[k], provider[k]
        nodes, routes = views.nodes[b, i], views.routes[b, i]
        logits(net, nodes, views.request[b, i], views.me[b, i], routes, d.nodes[m], d.about[m], work, out)
        route, d.log_prob[m, 0] = draw(out[:ROUTES], uniform[b, i, 0])
        if draws_markups:
            markup, d.log_prob[m, 1] = draw(out[ROUTES:], uniform[b, i, 1])
        else:
            markup, d.log_prob[m, 1] = int(np.argmax(out[ROUTES:])), np.float32(0.0)
        actions.route[b, i] = route
        admit_what_pays(actions.admission[b, i], net.pays[0], net.keep[0])
        actions.markup[b, i] = markup
        if not learned[b, i]:
            continue
        d.step[m], d.market[m], d.provider[m] = step, b, i
        d.choice[m, 0], d.choice[m, 1] = route, markup
        d.advertised[m] = views.me[b, i, ADVERT_DUE] > 0.5
        for n in range(NODES):
            d.present[m, n] = 1.0 if is_node(nodes[n]) else 0.0
            for f in range(len(EVIDENCE)):
                d.evidence[m, n, f] = nodes[n, EVIDENCE[f]]
        for r in range(ROUTES):
            d.routes[m, r] = routes[r]
        m += 1
    return m


@kernel
def summarise(views: Views, count: Ints, wanted: Bools, own: Singles, about: Singles, summary: Singles) -> None:
    """Mean and maximum [B, SUMMARY] over the `count` [B] providers of each `wanted` [B] market.

    What is pooled are the normalised features of provider and own node; `own` [F] and `about` [ABOUT] are scratch.
    """
    nodes = own.size
    half = summary.shape[1] // 2
    for b in range(wanted.size):
        if not wanted[b]:
            continue
        for k in range(half):
            summary[b, k] = 0.0
            summary[b, half + k] = -np.inf
        for i in range(count[b]):
            normalise_node(views.nodes[b, i, 0], own)
            normalise_about(views.request[b, i], views.me[b, i], about)
            for k in range(half):
                x = own[k] if k < nodes else about[len(REQUEST_FEATURES) + k - nodes]
                summary[b, k] += x / count[b]
                summary[b, half + k] = max(summary[b, half + k], x)


@kernel
def _situations(views: Views, markets: Ints, own: Singles, about: Singles) -> None:
    for k in range(markets.size):
        b = markets[k]
        for i in range(own.shape[1]):
            normalise_node(views.nodes[b, i, 0], own[k, i])
            normalise_about(views.request[b, i], views.me[b, i], about[k, i])


def situations(views: Views, count: NDArray[np.int64], markets: NDArray[np.int64]) -> Situation:
    """The situations [C, N] of all providers of these `markets` [C]; `count` [B] of providers in each."""
    providers = views.me.shape[1]
    own = np.zeros((markets.size, providers, len(NODE_FEATURES)), np.float32)
    about = np.zeros((markets.size, providers, ABOUT), np.float32)
    pooled = np.zeros((count.size, SUMMARY), np.float32)
    _situations(views, markets, own, about)
    wanted = np.zeros(count.size, np.bool_)
    wanted[markets] = True
    summarise(views, count, wanted, np.zeros_like(own[0, 0]), np.zeros_like(about[0, 0]), pooled)
    return Situation(own, about, np.repeat(pooled[markets][:, None], providers, 1))


def worth_per_s(planned: MarketPlan) -> float:
    """Value of the requests that arrive at a provider of this market in a second, on average, credits.

    Rewards are divided by it, so that a busy market of valuable requests does not drown the others in a batch.
    """
    value = planned.known[planned.traffic.provider, planned.traffic.klass, CLASS_VALUE].sum()
    return float(value / (planned.scenario.duration_s * len(planned.profiles)))


class Source(NamedTuple):
    """Where training markets come from."""

    seed: int
    kinds: Sequence[Kind]
    duration_s: float
    drain_s: float
    max_requests: int
    seeds: int  # markets' own seeds are below this
    scenarios: Sequence[Scenario] = ()  # instead of random ones, in turn

    def plans(self, batch: int, market: int, begun: bool = True) -> Iterator[tuple[Kind, MarketPlan]]:
        """Random markets without end, each with its kind as it came out, for place `market` of batch number `batch`;
        the kinds come in turn.

        If `begun`, the first is of any length up to the full one, so that a rollout sees beginnings, middles and ends
        alike.
        """
        rng = np.random.default_rng((self.seed, 0, batch, market))
        turn, share = market, rng.uniform(0.1, 1.0) if begun else 1.0
        while True:
            if self.scenarios:
                scenario = self.scenarios[turn % len(self.scenarios)]
            else:
                scenario = replace(
                    sample(self.kinds[turn % len(self.kinds)], rng, share * self.duration_s), drain_s=self.drain_s
                )
            planned = plan(scenario, int(rng.integers(self.seeds)))
            if worth_per_s(planned) > 0.0 and max(planned.capacity, planned.nodes) <= self.max_requests:
                turn, share = turn + 1, 1.0
                yield "honest" if self.scenarios else kind_of(scenario), planned


class Collector:
    """Steps a share of the training markets: of `total` those numbered rank, rank + world, ..."""

    def __init__(
        self, source: Source, reward: Reward, total: int, *, rank: int = 0, world: int = 1, share: float = 1.0,
        alone: float = 0.5,
    ) -> None:  # fmt: skip
        """`share` of the providers are learned from, others in each rollout; where there are opponents, one plays alone
        against them in a share `alone` of the markets, and is learned from."""
        self.source, self.reward, self.total, self.share, self.alone = source, reward, total, share, alone
        self.numbers = np.arange(rank, total, world)
        self.decisions = make_decisions(4096)
        self.batch: MarketBatch | None = None

    def renew(self, batch: int) -> None:
        """Begin batch number `batch` of markets. A run that is resumed here goes on as one that was never cut."""
        self.streams = [self.source.plans(batch, int(number)) for number in self.numbers]
        drawn = [next(stream) for stream in self.streams]
        if self.batch is None:
            most = max((len(s.providers) for s in self.source.scenarios), default=MOST_PROVIDERS)
            shape = Shape(most, self.source.max_requests, 1, nodes=self.source.max_requests)
            self.batch = MarketBatch([planned for _, planned in drawn], reward=self.reward, shape=shape)
        else:
            for b, (_, planned) in enumerate(drawn):
                self.batch.reset(b, planned)
        self.actions, self.expert = self.batch.actions(), self.batch.actions()
        self.kinds = [kind for kind, _ in drawn]
        self.worth = np.array([worth_per_s(planned) for _, planned in drawn], np.float32)
        self.sizes = np.array([len(planned.profiles) for _, planned in drawn])

    def _opponents(self, opponents: Sequence[Net], number: int, learned: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Who plays which of the `opponents` [B, N], -1 for the policy itself, which alone is `learned` from."""
        against = np.full(learned.shape, -1)
        if opponents:
            rng = np.random.default_rng((self.source.seed, 3, number))
            drawn = rng.integers(len(opponents), size=(self.total, learned.shape[1]))[self.numbers]
            one = rng.integers(2**31, size=self.total)[self.numbers] % self.sizes
            half = rng.random(self.total)[self.numbers] < self.alone
            alone = np.arange(learned.shape[1]) == one[:, None]
            against[half] = np.where(alone, -1, drawn)[half]
            learned[half] = alone[half]
        return against

    def _space(self, count: int, used: int) -> Decisions:
        """Decisions with space for `count`, of which `used` are kept."""
        if count > len(self.decisions.step):
            larger = make_decisions(2 * count)
            columns: Iterable[tuple[Any, Any]] = zip(self.decisions, larger, strict=True)
            for old, new in columns:
                new[:used] = old[:used]
            self.decisions = larger
        return self.decisions

    def _ask_experts(self, experts: Mapping[Kind, Policy], batch: MarketBatch, low: int, high: int) -> None:
        """Write down what the expert of each market's kind would choose where decisions `low` to `high` were made."""
        rows = self.decisions.market[low:high], self.decisions.provider[low:high]
        asked = np.zeros_like(batch.active)
        asked[rows] = True
        kinds = np.array(self.kinds)
        for kind, expert in experts.items():
            expert.decide(batch.views, asked & (kinds == kind)[:, None], batch.uniforms, self.expert)
        actions = self.decisions.expert[low:high]
        actions[:, 0] = self.expert.route[rows]
        actions[:, 1] = self.expert.markup[rows]

    def collect(
        self,
        net: Net,
        number: int,
        steps: int,
        experts: Mapping[Kind, Policy],
        *,
        paid: bool = True,
        draws_markups: bool,
        markups: bool = False,
        adverts: float = 0.0,
        opponents: Sequence[Net] = (),
    ) -> Rollout:
        """Play `steps` steps of what `renew` began with the policy `net`; `number` counts the rollouts of the run.

        What is not `paid` has no reward, which is quicker.

        The `experts` of each kind of market are asked what they would do; there may be none. Recorded are the
        decisions of those that are learned from: on requests, and a share `adverts` of those on an advert alone.
        Without `markups` nothing else is decided on an advert alone: its markup is that of before. Unless it
        `draws_markups`, the most probable ones are posted, as policies do once trained. With `opponents`, in the
        share `alone` of the markets one provider alone plays `net`, the others each one of them.
        """
        assert self.batch is not None, "renew comes first"
        batch, views = self.batch, self.batch.views
        count, providers = batch.count, batch.providers
        rng = np.random.default_rng((self.source.seed, 1, number))
        learned = rng.random((self.total, providers))[self.numbers] < self.share
        work, out = make_scratch(net), np.zeros(LOGITS, np.float32)
        reward = np.zeros((steps, count, providers), np.float32)
        summary = np.zeros((steps, count, SUMMARY), np.float32)
        elapsed_s, truncated = np.zeros((steps, count)), np.zeros((steps, count), np.bool_)
        against = self._opponents(opponents, number, learned)
        own_row, about_row = np.zeros(len(NODE_FEATURES), np.float32), np.zeros(ABOUT, np.float32)
        final: list[Situation] = []
        used = agent_steps = 0
        for t in range(steps):
            uniform = rng.random((self.total, providers, 2), np.float32)[self.numbers]
            batch.markets.market["by_decision"] = paid and self.reward.by_decision
            due = batch.active & (views.me[..., ADVERT_DUE] > 0.5)
            asked = batch.active & (views.me[..., HAS_REQUEST] > 0.5)
            recorded = learned & (asked | (due & (rng.random((self.total, providers))[self.numbers] < adverts)))
            asked |= due if markups else due & recorded
            self.actions.route[...] = HOLD
            first, d = used, self._space(used + int(np.count_nonzero(recorded)) + 1, used)
            for k, each in enumerate((net, *opponents)):
                market, provider = np.nonzero(asked & (against == k - 1))
                used = act(each, views, t, used, market, provider, recorded, uniform, draws_markups,
                           self.actions, d, work, out)  # fmt: skip
            wanted = np.asarray((asked & recorded).any(1))
            summarise(views, self.sizes, wanted, own_row, about_row, summary[t])
            if experts:
                self._ask_experts(experts, batch, first, used)
            else:
                d.expert[first:used] = -1
            batch.step(self.actions)
            # What arrivals bring does not depend on decisions, and is only noise here.
            if paid:
                reward[t] = (batch.reward - batch.given) / self.worth[:, None]
            elapsed_s[t], truncated[t] = batch.elapsed_s, batch.over
            agent_steps += int(self.sizes[elapsed_s[t] > 0].sum())
            if not truncated[t].any():
                continue
            final.append(situations(views, self.sizes, np.nonzero(truncated[t])[0]))
            for b in np.nonzero(truncated[t])[0]:
                self.kinds[b], planned = next(self.streams[b])
                batch.reset(int(b), planned)
                self.worth[b], self.sizes[b] = worth_per_s(planned), len(planned.profiles)
        last = situations(views, self.sizes, np.arange(count))
        final = final or [Situation(*(column[:0] for column in last))]
        finals = Situation(*(np.concatenate(columns) for columns in zip(*final, strict=True)))
        decisions = Decisions._make(column[:used] for column in self.decisions)
        return Rollout(self.numbers, decisions, summary, reward, elapsed_s, truncated, last, finals, agent_steps)


@kernel
def _advantages(
    reward: Singles, elapsed_s: Floats, decided: Bools, value: Singles, truncated: Bools, final_value: Singles,
    last_value: Singles, gamma: float, lam: float, advantage: Singles,
) -> None:  # fmt: skip
    """Advantages of the decisions of a rollout, after Schulman et al. 2016 (arXiv 1506.02438), in continuous time.

    A provider decides at some of the T steps of a market, and the reward between two decisions belongs to the first.
    Discounts are per second: gamma to the power of the time between decisions, and likewise lambda.

    reward [T, B, N], elapsed_s [T, B]; decided [T, B, N] bool; value [T, B, N], read where `decided`; truncated [T, B]:
    the market was at its horizon after that step, with `final_value` [T, B, N] of what would have followed; last_value
    [B, N] of what follows the last step. Writes `advantage` [T, B, N] where `decided`.
    """
    steps, markets, providers = reward.shape
    for b in range(markets):
        for n in range(providers):
            following_value = last_value[b, n]
            following_advantage = 0.0
            paid = 0.0
            discount = 1.0
            memory = 1.0
            for k in range(steps):
                t = steps - 1 - k
                if truncated[t, b]:
                    following_value, following_advantage = final_value[t, b, n], 0.0
                    paid, discount, memory = 0.0, 1.0, 1.0
                g = gamma ** elapsed_s[t, b]
                paid = reward[t, b, n] + g * paid
                discount *= g
                memory *= lam ** elapsed_s[t, b]
                if decided[t, b, n]:
                    delta = paid + discount * following_value - value[t, b, n]
                    following_advantage = delta + discount * memory * following_advantage
                    following_value = value[t, b, n]
                    advantage[t, b, n] = following_advantage
                    paid, discount, memory = 0.0, 1.0, 1.0


def advantages(
    reward: NDArray[np.float32],
    elapsed_s: NDArray[np.float64],
    decided: NDArray[np.bool_],
    value: NDArray[np.float32],
    truncated: NDArray[np.bool_],
    final_value: NDArray[np.float32],
    last_value: NDArray[np.float32],
    gamma: float,
    lam: float,
) -> NDArray[np.float32]:
    """Advantages [T, B, N], zero where nothing was decided."""
    advantage = np.zeros_like(value)
    _advantages(reward, elapsed_s, decided, value, truncated, final_value, last_value, gamma, lam, advantage)
    return advantage
