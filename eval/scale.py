"""One policy on markets of every size: `wwwserve scale --policy NAME|BUNDLE... --json FILE`.

The same mixture of hardware and load with 4, 16, 64 and 256 providers; SLO AUC of each policy, and the time of a
decision. A decision sees eight candidates however many providers there are, so its time must not grow.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from wwwserve.agents.arguments import Count, File, Policies, Range, UsageError, flat, parse_args, refuse
from wwwserve.agents.hardware import profile
from wwwserve.agents.lengths import Lognormal
from wwwserve.agents.rules import RULES, Policy, Rule
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import capacity_per_s
from wwwserve.envs.oracle import Oracle
from wwwserve.envs.scenario import PoissonTraffic, Scenario, parse
from wwwserve.envs.state import plan
from wwwserve.eval.compare import FIRST_TEST_SEED, columns, write_json
from wwwserve.eval.metrics import mean_ci, measure
from wwwserve.eval.policies import PolicyError, load_policies

SIZES = (4, 16, 64, 256)
PROG = "wwwserve scale"
LOAD = 0.85  # of what the providers sustain together
_NODES = (
    ("a100-80g", "qwen3-8b", 128),
    ("rtx-4090", "qwen3-8b", 64),
    ("rtx-6000-ada", "qwen3-4b", 64),
    ("rtx-3090", "qwen3-8b", 64),
)
_OWN_LOAD = (1.3, 0.4, 0.7, 1.6)  # of each in turn, in units of LOAD; half of them early, half of them late
_PROMPT, _OUTPUT = Lognormal(150.0, 0.5, 2048), Lognormal(4000.0, 0.75, 8192)


def market(size: int) -> Scenario:
    """A market of `size` providers, whose hardware and load repeat every four of them."""
    capacities = [capacity_per_s(profile(gpu, model, seqs), _PROMPT, [(1.0, _OUTPUT)]) for gpu, model, seqs in _NODES]
    even = sum(capacities) / sum(share * each for share, each in zip(_OWN_LOAD, capacities, strict=True))
    providers = []
    for i in range(size):
        gpu, model, seqs = _NODES[i % 4]
        rate = LOAD * even * _OWN_LOAD[i % 4] * capacities[i % 4]
        swing = 0.4 if (i // 2) % 2 else -0.4
        phases = [
            {"until_s": 300, "rate_per_s": rate * (1 + swing)},
            {"until_s": 600, "rate_per_s": rate * (1 - swing)},
        ]
        providers.append({
            "name": f"n{i + 1}", "gpu": gpu, "model": model, "max_num_seqs": seqs, "serves": ["qwen3", model],
            "traffic": {"kind": "poisson", "phases": phases},
        })  # fmt: skip
    lengths = {
        "prompt": {"median": _PROMPT.median, "sigma": _PROMPT.sigma, "max": _PROMPT.max},
        "output": {"median": _OUTPUT.median, "sigma": _OUTPUT.sigma, "max": _OUTPUT.max},
    }
    mapping = {"name": f"{size} providers", "duration_s": 600, "defaults": {"lengths": lengths}, "providers": providers}
    return parse(mapping, f"<market of {size}>")


def play(policy: Policy, scenario: Scenario, seeds: Sequence[int], threads: int) -> tuple[list[float], float]:
    """SLO AUC for each seed, and microseconds per decision on one thread."""
    batch = MarketBatch([plan(scenario, seed) for seed in seeds], threads=threads)
    actions = batch.actions()
    spent_s, decisions = 0.0, 0
    while not batch.over.all():
        decisions += int(batch.active.sum())
        start_s = time.perf_counter()
        policy.decide(batch.views, batch.active, batch.uniforms, actions)
        spent_s += time.perf_counter() - start_s
        batch.step(actions)
    aucs = [measure(batch.requests(b), scenario)["slo_auc"] for b in range(len(seeds))]
    return [float(x) for x in aucs], 1e6 * spent_s / max(1, decisions)  # type: ignore[arg-type]


@dataclass
class Args:
    """Judge policies by the market's size."""

    policy: Policies = ()
    """policies beside the rules"""
    sizes: Annotated[tuple[int, ...], Range(1)] = SIZES
    """providers of the markets"""
    requests: Count = 20_000
    """about so many for each size"""
    threads: Count = 2
    """CPU threads"""
    json: File = None
    """write the results to this file"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
        judged = []
        for policy in load_policies(flat(args.policy)):
            if isinstance(policy, Oracle):
                raise UsageError(f"policy {policy.name!r} is no provider's: it sees the whole market")
            judged.append(policy)
    except (UsageError, PolicyError) as error:
        return refuse(PROG, error)
    policies: list[Policy] = [*judged, *(Rule(name) for name in RULES)]
    result: dict[str, Any] = {}
    for policy in policies:
        policy.decide(*_nothing(), actions=MarketBatch([plan(market(4), 0)]).actions())  # compiles
    for size in args.sizes:
        scenario = market(size)
        expected = sum(
            phase.rate_per_s * 300
            for p in scenario.providers
            if isinstance(p.traffic, PoissonTraffic)
            for phase in p.traffic.phases
        )
        count = max(3, round(args.requests / expected))
        seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + count)
        cell = result.setdefault(str(size), {})
        for policy in policies:
            aucs, us = play(policy, scenario, seeds, args.threads)
            cell[policy.name] = {"slo_auc": list(mean_ci(aucs)), "us_per_decision": us, "seeds": count}
    header = ["SLO AUC (microseconds per decision)", *(f"{size} providers" for size in args.sizes)]
    rows = [header]
    for policy in policies:
        cells = [result[str(size)][policy.name] for size in args.sizes]
        rows.append([policy.name, *(f"{c['slo_auc'][0]:.4f} ({c['us_per_decision']:.1f})" for c in cells)])
    print(columns(rows))
    if args.json is not None:
        write_json(args.json, result)
    return 0


def _nothing() -> tuple[Any, Any, Any]:
    """Views, active and uniforms of a fresh market of four in which nobody is asked."""
    batch = MarketBatch([plan(market(4), 0)])
    return batch.views, np.zeros_like(batch.active), batch.uniforms


if __name__ == "__main__":
    sys.exit(main())
