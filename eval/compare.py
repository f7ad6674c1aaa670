"""Compares policies on the same arrivals: `wwwserve compare SCENARIO... --policy NAME|BUNDLE... --seeds N`.

Every policy runs every scenario with the same seeds, so differences between policies are paired by seed. The seeds
start at a million: `wwwserve train` draws its own below that, and nothing is measured on what it was trained on.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from wwwserve.agents.arguments import (
    Count,
    File,
    Folder,
    Policies,
    Positive,
    Range,
    Seed,
    UsageError,
    flat,
    parse_args,
    refuse,
)
from wwwserve.agents.rules import Policy
from wwwserve.envs.oracle import ORACLES, Oracle
from wwwserve.envs.scenario import Scenario, ScenarioError, load
from wwwserve.eval.deviations import copied
from wwwserve.eval.metrics import mean_ci, measure, or_none, paired_ci, score, time_quantiles
from wwwserve.eval.play import Run, rollout
from wwwserve.eval.policies import DEFAULT_POLICIES, PolicyError, load_policies

FIRST_TEST_SEED = 1_000_000
DEFAULT_BASELINE = "www_serve"
PROG = "wwwserve compare"

Tree = dict[str, Any]
"""Numbers by name, nested as results are."""


def compare(
    scenarios: Sequence[Scenario],
    policies: Sequence[Policy | Oracle],
    seeds: Sequence[int],
    *,
    baseline: str = DEFAULT_BASELINE,
    threads: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> Tree:
    """Run every policy in every scenario with every seed; the mapping that `--json` writes.

    `scenarios`: by scenario and policy, [mean, half-width of the 95 % interval] over seeds of each measure in
    `eval.metrics`, of the 1st to 99th percentile of latency the means, of requests and unfinished ones the sums.
    `paired`: the seeds, and by scenario and policy the same of differences from the policy named `baseline`. A number
    that does not exist (an interval of one seed) is None. `report` gets a line of text after each policy.
    Raises UsageError if names are not unique, there is no baseline, or nothing to run.
    """
    _check(scenarios, policies, seeds, baseline)
    result: Tree = {
        "scenarios": {},
        "paired": {"baseline": baseline, "first_seed": int(seeds[0]), "seeds": len(seeds), "scenarios": {}},
    }
    for scenario in scenarios:
        trees: dict[str, list[Tree]] = {}
        cells = result["scenarios"].setdefault(scenario.name, {})
        for policy in policies:
            start_s = time.perf_counter()
            runs = rollout(scenario, policy, seeds, threads=threads)
            trees[policy.name] = measures(runs, scenario)
            cells[policy.name] = cell(trees[policy.name], runs)
            report(f"{scenario.name}  {policy.name}  {time.perf_counter() - start_s:.1f} s")
        result["paired"]["scenarios"][scenario.name] = {
            name: over_seeds(each, trees[baseline]) for name, each in trees.items() if name != baseline
        }
    return result


def _check(
    scenarios: Sequence[Scenario], policies: Sequence[Policy | Oracle], seeds: Sequence[int], baseline: str
) -> None:
    for kind, names in (("scenario", [s.name for s in scenarios]), ("policy", [p.name for p in policies])):
        if not names:
            raise UsageError(f"no {kind} is given")
        for k, name in enumerate(names):
            if name in names[:k]:
                raise UsageError(f"{kind} name {name!r} is there twice, expected different names")
    if not len(seeds):
        raise UsageError("no seed is given")
    if len(set(seeds)) < len(seeds):
        raise UsageError("a seed is given twice")
    if baseline not in [p.name for p in policies]:
        raise UsageError(f"baseline {baseline!r} is not among the policies")


def measures(runs: Sequence[Run], scenario: Scenario) -> list[Tree]:
    """Every measure of each run by name, with profit and price of each provider."""
    names = [provider.name for provider in scenario.providers]
    return [
        {
            **measure(run.requests, scenario),
            "profit": dict(zip(names, run.profit.tolist(), strict=True)),
            "price": dict(zip(names, run.price.tolist(), strict=True)),
        }
        for run in runs
    ]


def cell(trees: Sequence[Tree], runs: Sequence[Run]) -> Tree:
    """One policy in one scenario: its `measures` over the seeds, percentiles of latency, counts of requests."""
    result = over_seeds(trees) | _totals(runs)
    result["latency_s"]["quantiles"] = _quantiles(runs)
    return result


def over_seeds(trees: Sequence[Tree], baseline: Sequence[Tree] | None = None) -> Tree:
    """[mean, half-width] of each number over the seeds, or of its difference from the baseline's."""
    result: Tree = {}
    for key, value in trees[0].items():
        mine = [tree[key] for tree in trees]
        other = None if baseline is None else [tree[key] for tree in baseline]
        if isinstance(value, dict):
            result[key] = over_seeds(mine, other)
        else:
            result[key] = [or_none(x) for x in (mean_ci(mine) if other is None else paired_ci(mine, other))]
    return result


def _totals(runs: Sequence[Run]) -> Tree:
    return {
        "requests": sum(run.requests.latency_s.size for run in runs),
        "unfinished": sum(int(np.isinf(run.requests.latency_s).sum()) for run in runs),
    }


def _quantiles(runs: Sequence[Run]) -> list[float | None]:
    """Means over seeds of the 1st to 99th percentile of latency, s."""
    table = np.array([time_quantiles(run.requests.latency_s) for run in runs])
    return [or_none(mean_ci(column)[0]) for column in table.T]


def table(result: Tree, scenario: Scenario) -> str:
    """One scenario's results as text: shares with their half-widths, differences from the baseline, times in s."""
    cells, paired = result["scenarios"][scenario.name], result["paired"]
    baseline = paired["baseline"]
    key = score(scenario.slo)
    rows = [
        [
            "policy",
            "slo_auc",
            "goodput",
            f"{key} - {baseline}",
            "latency s",
            "p50",
            "p90",
            "p99",
            "ttft s",
            "in targets",
            "hits",
            "unfinished",
        ]
    ]
    for name, cell in cells.items():
        difference = paired["scenarios"][scenario.name][name][key] if name != baseline else None
        latency = cell["latency_s"]
        rows.append(
            [
                name,
                _pair(cell["slo_auc"], 3),
                _pair(cell["goodput_value"], 3),
                _pair(difference, 3, sign="+") if difference else "",
                _pair(latency["mean"], 1),
                *(_pair([latency[p][0], None], 1) for p in ("p50", "p90", "p99")),
                _pair([cell["first_token_s"]["mean"][0], None], 1),
                _pair(cell["interactive"], 3),
                _pair([cell["prefix_hit"][0], None], 3),
                str(cell["unfinished"]),
            ]
        )
    requests = next(iter(cells.values()))["requests"]
    return f"{scenario.name}: {requests} requests with {paired['seeds']} seeds\n{columns(rows)}"


def regret_table(result: Tree, scenarios: Sequence[Scenario]) -> str:
    """Every policy's score in every scenario, and its worst distance from the best policy there that sees no more.

    Scenarios in which nothing was measured, having no requests, are left out.
    """
    cells = result["scenarios"]
    names = list(cells[scenarios[0].name])
    shown = [s for s in scenarios if cells[s.name][names[0]][score(s.slo)][0] is not None]
    scores = {name: [cells[s.name][name][score(s.slo)][0] for s in shown] for name in names}
    fair = [name for name in names if name not in ORACLES] or names
    best = [max(scores[name][k] for name in fair) for k in range(len(shown))]
    rows = [["policy", *(f"{s.name}{'*' if s.slo.classes else ''}" for s in shown), "worst regret"]]
    for name in names:
        regret = max((b - x for b, x in zip(best, scores[name], strict=True)), default=0.0)
        rows.append([name, *(f"{x:.3f}" for x in scores[name]), f"{regret:.3f}" if name in fair else ""])
    note = "slo_auc, with * goodput_value; regret is against the best policy that sees no more than a provider can"
    return f"{note}\n{columns(rows)}"


def _pair(pair: Sequence[float | None], digits: int, sign: str = "") -> str:
    mean, half = pair
    if mean is None:
        return "-"
    return f"{mean:{sign}.{digits}f}" + (f" ±{half:.{digits}f}" if half is not None else "")


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def write_json(path: Path, result: Tree) -> None:
    """Write a result whole or not at all. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


Scenarios = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SCENARIO...")]


@dataclass
class Args:
    """Compare policies on the same arrivals."""

    scenarios: Scenarios = ()
    """names of packaged scenarios, or files"""
    policy: Policies = ()
    """a rule, as tuned, with settings (rank_cap:cap_fast=0.2,urgency=3) or as tuned for one kind of market
    (rank_cap@deadlines); centralized or omniscient, which see everything; learned, the policy that is shipped; or the
    folder of a bundle; default: every rule and router"""
    seeds: Count = 32
    """runs of each policy in each scenario"""
    first_seed: Seed = FIRST_TEST_SEED
    """the seeds are this one and those that follow; `wwwserve train` draws its own below a million"""
    copies: Count = 1
    """of every provider, each with users of its own: 2 make eight providers of four"""
    load: Positive = 1.0
    """times as many requests or sessions"""
    longer: Annotated[float, Range(1)] = 1.0
    """times as long, with the last rate of each traffic: what only the end of arrivals mends does not count then"""
    threads: Count = os.cpu_count() or 1
    """CPU threads"""
    baseline: Annotated[str, tyro.conf.arg(metavar="NAME|BUNDLE")] = DEFAULT_BASELINE
    """differences are from this policy, which also runs if it is not among the others"""
    json: File = None
    """write the results to this file"""
    figures: Folder = None
    """draw the results as PNG and SVG into this folder"""


def check_outputs(json_file: Path | None, figures: Path | None) -> None:
    """Raises UsageError for what could not be written at the end."""
    if json_file is not None:
        if json_file.is_dir():
            raise UsageError(f"--json {json_file}: is a folder, expected a file")
        if not json_file.parent.is_dir() or not os.access(json_file.parent, os.W_OK):
            raise UsageError(f"--json {json_file}: {json_file.parent} is not a folder that can be written to")
    if figures is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UsageError(
                "--figures needs matplotlib: pip install '.[train]' in a clone of the repository"
            ) from None
        try:
            figures.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"--figures {figures}: {error.strerror}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
        scenarios = [copied(load(name).at_load(args.load).longer(args.longer), args.copies) for name in args.scenarios]
        names = flat(args.policy) or list(DEFAULT_POLICIES)
        names = names if args.baseline in names else [args.baseline, *names]
        policies = load_policies(names)
        baseline = policies[names.index(args.baseline)].name
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        _check(scenarios, policies, seeds, baseline)
        check_outputs(args.json, args.figures)
    except (UsageError, ScenarioError, PolicyError) as error:
        return refuse(PROG, error)

    result = compare(
        scenarios,
        policies,
        seeds,
        baseline=baseline,
        threads=args.threads,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    for scenario in scenarios:
        print(table(result, scenario), end="\n\n")
    if len(scenarios) > 1:
        print(regret_table(result, scenarios))
    if args.json is not None:
        write_json(args.json, result)
    if args.figures is not None:
        from wwwserve.eval import figures

        figures.draw_comparison(result, args.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
