"""What one provider, or some together, may do while the others keep to a policy; and markets in which they do it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.decision import FIRST_CANDIDATE, IF_IT_PAYS, LOCAL, PROBABILITY, Actions, make_actions
from wwwserve.agents.kernel import Bools, Floats
from wwwserve.agents.rules import Policy
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import Views
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.scenario import Misreport, Scenario
from wwwserve.envs.state import MarketPlan
from wwwserve.eval.play import REQUESTS_AT_ONCE, Run, run

CHEAPEST = int(np.argmin(MARKUPS))


@dataclass(frozen=True)
class Deviation:
    """What a deviator does otherwise than the policy that it would keep to."""

    name: str
    markup: int | None = None
    """Index into MARKUPS, whatever happens."""
    misreport: Misreport | None = None
    sells: bool = True
    buys: bool = True
    takes_all: bool = False
    """Take what peers offer, also below its marginal cost."""
    policy: Policy | None = None
    """Another policy decides."""
    from_s: float = 0.0
    until_s: float = math.inf
    """The policy's decisions are changed from then until then; a misreport has times of its own."""


def constant_markups() -> list[Deviation]:
    """A markup that stays as it is, for each of MARKUPS."""
    return [Deviation(f"markup {markup:g}", markup=k) for k, markup in enumerate(MARKUPS)]


DEVIATIONS: tuple[Deviation, ...] = (
    *constant_markups(),
    Deviation("dumping", markup=CHEAPEST, takes_all=True),
    *(Deviation(f"promise {x:g}", misreport=Misreport(promise=x)) for x in (0.5, 0.7, 1.4)),
    Deviation("misreport 0.3", misreport=Misreport(load=0.3)),
    Deviation("speed 1.5", misreport=Misreport(speed=1.5)),
    Deviation("never sharing", sells=False, buys=False),
    Deviation("no buying", buys=False),
)
HONEST = Deviation("honest", misreport=Misreport())
"""For a provider that misreports in the scenario."""


class Lane(NamedTuple):
    """A market with the places of the providers that deviate in it, and what each does."""

    planned: MarketPlan
    deviators: tuple[int, ...] = ()
    deviations: tuple[Deviation, ...] = ()


class Deviating:
    """A policy from which the deviators of each market of a batch depart."""

    def __init__(self, policy: Policy, lanes: Sequence[Lane], providers: int) -> None:
        """`providers`: how many the widest market has."""
        self.name = policy.name
        shape = (len(lanes), providers)
        self._policy = policy
        self._others: list[tuple[Policy, Bools]] = []
        self._markup = np.full(shape, -1, np.int32)
        self._sells, self._buys = np.ones(shape, np.bool_), np.ones(shape, np.bool_)
        self._takes_all = np.zeros(shape, np.bool_)
        self._from_s, self._until_s = np.zeros(shape), np.full(shape, np.inf)
        self._now_s = np.zeros(len(lanes))
        self._actions = make_actions(*shape)
        for b, lane in enumerate(lanes):
            for i, deviation in zip(lane.deviators, lane.deviations, strict=True):
                self._add(b, i, deviation)

    def _add(self, b: int, i: int, deviation: Deviation) -> None:
        self._from_s[b, i], self._until_s[b, i] = deviation.from_s, deviation.until_s
        self._sells[b, i], self._buys[b, i] = deviation.sells, deviation.buys
        self._takes_all[b, i] = deviation.takes_all
        if deviation.markup is not None:
            self._markup[b, i] = deviation.markup
        if deviation.policy is not None:
            rows = next((rows for policy, rows in self._others if policy is deviation.policy), None)
            if rows is None:
                rows = np.zeros_like(self._sells)
                self._others.append((deviation.policy, rows))
            rows[b, i] = True

    def watch(self, batch: MarketBatch) -> None:
        """Look at the clocks; to be called after each step."""
        self._now_s[...] = batch.now_s

    def decide(self, views: Views, active: Bools, uniforms: Floats, actions: Actions) -> None:
        """See `Policy.decide`; all arrays those of the batch, [B, N, ...]."""
        self._policy.decide(views, active, uniforms, actions)
        now_s = self._now_s[:, None]
        deviating = active & (self._from_s <= now_s) & (now_s < self._until_s)
        for policy, rows in self._others:
            mine = rows & deviating
            if mine.any():
                policy.decide(views, mine, uniforms, self._actions)
                for k in range(len(actions)):
                    actions[k][mine] = self._actions[k][mine]
        fixed = deviating & (self._markup >= 0)
        actions.markup[fixed] = self._markup[fixed]
        actions.admission[deviating & self._takes_all, IF_IT_PAYS] = 0.0
        actions.admission[deviating & ~self._sells, PROBABILITY] = 0.0
        actions.route[deviating & ~self._buys & (actions.route >= FIRST_CANDIDATE)] = LOCAL


class Posting:
    """A policy whose markup is always the same."""

    def __init__(self, policy: Policy, markup: int) -> None:
        """`markup` is an index into MARKUPS."""
        self.name = f"{policy.name} at markup {MARKUPS[markup]:g}"
        self._policy, self._markup = policy, markup

    def decide(self, views: Views, active: Bools, uniforms: Floats, actions: Actions) -> None:
        """See `Policy.decide`."""
        self._policy.decide(views, active, uniforms, actions)
        actions.markup[active] = self._markup


Watch = Callable[[MarketBatch], None]


def play(
    policy: Policy, lanes: Sequence[Lane], threads: int, watching: Callable[[int], Watch] = lambda count: lambda _: None
) -> list[Run]:
    """Run each market to its end, its deviators doing what they do; in order.

    `watching`: makes what watches a batch of so many markets, called for one batch after the other.
    """
    widest = max(lane.planned.capacity for lane in lanes)
    at_once = max(1, REQUESTS_AT_ONCE // widest)
    runs: list[Run] = []
    for k in range(0, len(lanes), at_once):
        some = lanes[k : k + at_once]
        deviating = Deviating(policy, some, max(len(lane.planned.profiles) for lane in some))
        watch = watching(len(some))

        def look(batch: MarketBatch, deviating: Deviating = deviating, watch: Watch = watch) -> None:
            deviating.watch(batch)
            watch(batch)

        runs += run([_lying(lane) for lane in some], deviating, threads, look)
    return runs


def _lying(lane: Lane) -> MarketPlan:
    """The lane's plan with what its deviators misreport; the traffic stays the same."""
    providers = list(lane.planned.scenario.providers)
    for i, deviation in zip(lane.deviators, lane.deviations, strict=True):
        if deviation.misreport is not None:
            providers[i] = replace(providers[i], misreport=deviation.misreport)
    return lane.planned._replace(scenario=replace(lane.planned.scenario, providers=tuple(providers)))


def profits(runs: Sequence[Run]) -> NDArray[np.float64]:
    """Profits of the providers, credits [runs, N]."""
    return np.array([each.profit for each in runs])


def summed_gains(
    policy: Policy, deviation: Deviation, plans: Sequence[MarketPlan], base: Sequence[NDArray[np.float64]], threads: int
) -> NDArray[np.float64]:
    """What providers gain, each deviating by itself, summed over the providers of each market, credits [M].

    `base`: profits [N] of each market's providers when all keep to the policy. Of providers that differ by name alone
    one deviates, and its gain counts for all.
    """
    places = [(m, i, many) for m, each in enumerate(plans) for i, many in _unlike(each.scenario).items()]
    runs = play(policy, [Lane(plans[m], (i,), (deviation,)) for m, i, _ in places], threads)
    found = np.zeros(len(plans))
    for (m, i, many), each in zip(places, runs, strict=True):
        found[m] += many * (each.profit[i] - base[m][i])
    return found


def _unlike(scenario: Scenario) -> dict[int, int]:
    """The first of providers that differ by name alone, and how many they are."""
    nameless = [replace(provider, name="") for provider in scenario.providers]
    return {nameless.index(each): nameless.count(each) for each in nameless}


def copied(scenario: Scenario, copies: int) -> Scenario:
    """The scenario with so many of every provider, each with users of its own: `n1`, `n1-2` and so on.

    Poisson and bursty arrivals are independent; copies of a provider with given times have them all at these.
    """
    if copies == 1:
        return scenario
    providers = tuple(
        each if k == 0 else replace(each, name=f"{each.name}-{k + 1}")
        for each in scenario.providers
        for k in range(copies)
    )
    return replace(scenario, name=f"{scenario.name} x{copies}", providers=providers)
