"""Running a policy through a scenario in the simulated market."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.protocol import OUTPUT
from wwwserve.agents.rules import Policy
from wwwserve.envs.batch import MarketBatch, RequestTable
from wwwserve.envs.oracle import Oracle
from wwwserve.envs.scenario import Scenario
from wwwserve.envs.state import MarketPlan, plan
from wwwserve.eval.metrics import measure, score

REQUESTS_AT_ONCE = 200_000  # bounds memory; about 0.3 KB each


MARKETS_PER_THREAD = 32  # threads meet at every step; with fewer markets, two took twice as long as one


class Run(NamedTuple):
    """What came of one seed."""

    seed: int
    requests: RequestTable
    profit: NDArray[np.float64]  # [N] credits since the start
    price: NDArray[np.float64]  # [N] of 1000 tokens of output by the own tariff, credits, mean over the time online


def rollout(scenario: Scenario, policy: Policy | Oracle, seeds: Sequence[int], *, threads: int = 1) -> list[Run]:
    """Run `policy` for every provider once with each seed, to the end; results in the order of the seeds.

    The seed settles arrivals, lengths and every other chance: policies with the same seed face the same requests.
    """
    return [each for plans in chunks(scenario, seeds) for each in run(plans, policy, threads)]


def scores(policy: Policy | Oracle, plans: Sequence[MarketPlan], *, threads: int = 1) -> NDArray[np.float64]:
    """The score [P] of `policy` in each planned market: `eval.metrics.score` says which measure that is."""
    runs = run(plans, policy, threads)
    named = ((measure(each.requests, p.scenario), score(p.scenario.slo)) for each, p in zip(runs, plans, strict=True))
    return np.array([measured[name] for measured, name in named], np.float64)


def chunks(scenario: Scenario, seeds: Sequence[int]) -> Iterator[list[MarketPlan]]:
    """Plans in groups whose request arrays have at most `REQUESTS_AT_ONCE` entries, or of one plan."""
    plans: list[MarketPlan] = []
    widest = 0
    for seed in seeds:
        planned = plan(scenario, seed)
        widest = max(widest, planned.capacity)
        if plans and widest * (len(plans) + 1) > REQUESTS_AT_ONCE:
            yield plans
            plans, widest = [], planned.capacity
        plans.append(planned)
    if plans:
        yield plans


def run(
    plans: Sequence[MarketPlan],
    policy: Policy | Oracle,
    threads: int,
    watch: Callable[[MarketBatch], None] = lambda batch: None,
) -> list[Run]:
    """Run `policy` for every provider of each planned market, to the end; `watch` sees the batch after each step."""
    batch = MarketBatch(plans, threads=max(1, min(threads, len(plans) // MARKETS_PER_THREAD)))
    actions = batch.actions()
    providers = batch.markets.providers
    price_time, online_s = np.zeros(providers.shape), np.zeros(providers.shape)  # credit seconds; seconds
    while not batch.over.all():
        if isinstance(policy, Oracle):
            policy.decide(batch, actions)
        else:
            policy.decide(batch.views, batch.active, batch.uniforms, actions)
        batch.step(actions)
        took_s = batch.elapsed_s[:, None] * providers["online"]
        price_time += providers["tariff"][..., OUTPUT] * took_s
        online_s += took_s
        watch(batch)
    return [
        Run(
            seed=planned.seed,
            requests=batch.requests(b),
            profit=providers["profit"][b, : len(planned.profiles)].copy(),
            price=(price_time / np.maximum(online_s, 1e-9))[b, : len(planned.profiles)],
        )
        for b, planned in enumerate(plans)
    ]
