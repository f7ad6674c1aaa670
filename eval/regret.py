"""How far is a policy from the best rule, everywhere: `wwwserve regret --policy NAME|BUNDLE... --json FILE`.

A family is a kind of random market or a packaged scenario. A policy's regret in a family is the best rule's score there
less its own, paired by market; it is judged by its worst regret over all families. Beside every rule with its
defaults stand the best rules for each kind of market, tuned for that kind alone (see `eval.tune`): what an operator
reaches who knows the market.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.arguments import Count, File, Policies, Range, Seed, UsageError, flat, parse_args, refuse
from wwwserve.agents.rules import RULES, Policy, Rule
from wwwserve.envs.oracle import ORACLES, Oracle
from wwwserve.envs.scenario import load
from wwwserve.envs.state import MarketPlan, plan
from wwwserve.eval.compare import FIRST_TEST_SEED, check_outputs, columns, write_json
from wwwserve.eval.metrics import mean_ci, paired_ci
from wwwserve.eval.play import scores
from wwwserve.eval.policies import PolicyError, load_policies
from wwwserve.eval.tune import markets
from wwwserve.eval.tuned import OBJECTIVES, best_for
from wwwserve.eval.workers import each

SCENARIOS = (
    "paper/alternating",
    "paper/alternating-queue",
    "paper/mixed-hardware",
    "paper/mixed-models",
    "paper/bursty-churn",
    "trace/azure-conv",
    "market/deadlines",
    "liars/first",
)
MARKETS, SEEDS = 48, 128  # random markets of each kind and seeds of every scenario that a policy is judged by
PROG = "wwwserve regret"
Families = Mapping[str, Sequence[MarketPlan]]
Scores = dict[str, NDArray[np.float64]]
Tree = dict[str, Any]


def families(first_seed: int, count: int, seeds: int, scenarios: Sequence[str] = SCENARIOS) -> Families:
    """`count` random markets of each kind and every scenario with `seeds` seeds, all seeds from `first_seed` on.

    A trace, a run of which has tens of thousands of requests, is played with an eighth of the seeds, at least two.
    """
    named: dict[str, Sequence[MarketPlan]] = {}
    for name in scenarios:
        scenario = load(name)
        runs = max(2, seeds // 8) if name.startswith("trace/") else seeds
        named[name] = [plan(scenario, first_seed + k) for k in range(runs)]
    if count:
        named |= {f"random/{kind}": plans for kind, plans in markets(count, first_seed).items()}
    return named


def baselines() -> list[Policy]:
    """Every rule with its defaults, and the best for each kind of market and for any peers."""
    return [*(Rule(name) for name in RULES), *(best_for(objective) for objective in OBJECTIVES[1:])]


def everywhere(among: Families, policy: Policy | Oracle) -> Scores:
    """Scores by family, one for each market."""
    return {name: scores(policy, plans) for name, plans in among.items()}


def measure(
    policies: Sequence[Policy | Oracle], among: Families, *, processes: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Scores]:  # fmt: skip
    """Scores by policy and family, one for each market."""
    measured: dict[str, Scores] = {}
    for policy, found in zip(policies, each(partial(everywhere, among), policies, processes), strict=True):
        measured[policy.name] = found
        report(f"{policy.name} measured")
    return measured


def judge(measured: Mapping[str, Mapping[str, NDArray[np.float64]]], rules: Sequence[str]) -> Tree:
    """By policy: score by family, regret by family against the best of `rules` there, and the worst of them.

    All but the worst are [mean, half-width of the 95 % interval]; regrets are paired by market.
    """
    names = list(next(iter(measured.values())))
    best = {family: max(rules, key=lambda rule: float(np.nanmean(measured[rule][family]))) for family in names}
    result: Tree = {"best_rule": best, "policies": {}}
    for policy, by_family in measured.items():
        regrets = {name: paired_ci(measured[best[name]][name], by_family[name]) for name in names}
        worst = max(names, key=lambda name: regrets[name][0])
        result["policies"][policy] = {
            "score": {name: list(mean_ci(by_family[name])) for name in names},
            "regret": {name: list(regrets[name]) for name in names},
            "worst_regret": regrets[worst][0],
            "worst_family": worst,
            "mean_regret": float(np.mean([regrets[name][0] for name in names])),
        }
    return result


def table(result: Tree) -> str:
    """Every policy's score less the best rule's, by family, and its worst regret; the best policies last."""
    names = list(result["best_rule"])
    rows = [["score less the best rule's", *(name.removeprefix("paper/") for name in names), "worst", "mean"]]
    best = [result["policies"][rule]["score"][name][0] for name, rule in result["best_rule"].items()]
    rows.append(["(score of the best rule)", *(f"{x:.4f}" for x in best), "", ""])
    ordered = sorted(result["policies"].items(), key=lambda item: -item[1]["worst_regret"])
    for policy, judged in ordered:
        cells = [f"{-judged['regret'][name][0]:+.4f}" for name in names]
        rows.append([policy, *cells, f"{-judged['worst_regret']:+.4f}", f"{-judged['mean_regret']:+.4f}"])
    return columns(rows)


@dataclass
class Args:
    """Judge policies by their worst regret."""

    policy: Policies = ()
    """policies beside the rules"""
    markets: Annotated[int, Range(2)] = MARKETS
    """random markets of each kind"""
    seeds: Annotated[int, Range(2)] = SEEDS
    """seeds of each packaged scenario"""
    first_seed: Seed = FIRST_TEST_SEED
    """of them all"""
    processes: Count = 2
    """policies measured at a time"""
    oracles: bool = False
    """with the routers that see everything; they set no standard"""
    json: File = None
    """write the results to this file"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
        check_outputs(args.json, None)
        judged = load_policies(flat(args.policy))
    except (UsageError, PolicyError) as error:
        return refuse(PROG, error)
    rules = baselines()
    oracles = [Oracle(name) for name in ORACLES] if args.oracles else []
    names = {rule.name for rule in rules} | set(ORACLES)
    measured = measure(
        [*rules, *oracles, *(p for p in judged if p.name not in names)],
        families(args.first_seed, args.markets, args.seeds),
        processes=args.processes,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    result = judge(measured, [rule.name for rule in rules])
    print(table(result))
    if args.json is not None:
        options = {"markets": args.markets, "seeds": args.seeds, "first_seed": args.first_seed}
        write_json(args.json, result | {"options": options})
    return 0


if __name__ == "__main__":
    sys.exit(main())
