"""SLO attainment and latency of the policies in the four settings, and how much of what is open each reaches."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray

from wwwserve.agents.rules import Policy, Rule
from wwwserve.envs.oracle import ORACLES, Oracle
from wwwserve.envs.scenario import PoissonTraffic, Scenario
from wwwserve.envs.scenario import load as load_scenario
from wwwserve.eval import figures
from wwwserve.eval.compare import cell, measures
from wwwserve.eval.metrics import paired_ci
from wwwserve.eval.paper.experiment import (
    BEST_RULE,
    OPEN,
    PUBLISHED,
    Experiment,
    Load,
    Table,
    Tree,
    best_of,
    load_between,
    pair,
    rule_scores,
    shown,
)
from wwwserve.eval.play import rollout
from wwwserve.eval.policies import LEARNED, load_policy

SCENARIOS = ("paper/alternating", "paper/alternating-queue", "paper/mixed-hardware", "paper/mixed-models")
HEADLINE_S = "300"
LEAST_ATTAINMENT = 0.3  # of `single`, for a setting in which a ratio to it means something
PUBLISHED_RATIO, PUBLISHED_SAVING = 1.5, 0.276
RESAMPLES = 2000
ONE_RULE = "one rule"  # the best over all settings
GAINERS = (BEST_RULE, ONE_RULE, LEARNED)


def run(seeds: Sequence[int]) -> Tree:
    """Measures by scenario and policy; the share of the gap that policies close; the best rule's name."""
    result: Tree = {"scenarios": {}, "best_rule": {}, "gap": {}, "load": {}}
    auc: dict[str, dict[str, NDArray[np.float64]]] = {}
    rules = {name: rule_scores(load_scenario(name), seeds) for name in SCENARIOS}
    anywhere = best_of(
        {rule: np.concatenate([rules[name][rule] for name in SCENARIOS]) for rule in rules[SCENARIOS[0]]}
    )
    result["one_rule"] = anywhere.name
    for name in SCENARIOS:
        scenario = load_scenario(name)
        best = best_of(rules[name])
        result["best_rule"][name] = best.name
        result["load"][name] = list(_loads(scenario))
        policies: dict[str, Policy | Oracle] = {
            OPEN: Rule(OPEN),
            PUBLISHED: Rule(PUBLISHED),
            BEST_RULE: best,
            LEARNED: load_policy(LEARNED),
            **{oracle: Oracle(oracle) for oracle in ORACLES},
        }
        auc[name], cells = {}, {}
        for key, policy in policies.items():
            runs = rollout(scenario, policy, seeds)
            trees = measures(runs, scenario)
            cells[key] = cell(trees, runs)
            auc[name][key] = np.array([tree["slo_auc"] for tree in trees])
        auc[name][ONE_RULE] = rules[name][anywhere.name]
        result["scenarios"][name] = cells
        result["gap"][name] = _gap([auc[name]])
        result["gap"][name]["learned - best rule"] = pair(paired_ci(auc[name][LEARNED], auc[name][BEST_RULE]))
    result["gap"]["all four"] = _gap(list(auc.values()))
    return result


def _loads(scenario: Scenario) -> Load:
    """Load of the market over the run, and the least and the most that a node has in any phase."""
    whole = load_between(scenario, 0.0, scenario.duration_s)
    ends = sorted(
        {
            phase.until_s
            for p in scenario.providers
            if isinstance(p.traffic, PoissonTraffic)
            for phase in p.traffic.phases
        }
    )
    phases = [load_between(scenario, start, end) for start, end in pairwise([0.0, *ends])]
    return Load(whole.market, min(each.least for each in phases), max(each.most for each in phases))


def _gap(auc: Sequence[dict[str, NDArray[np.float64]]]) -> Tree:
    """Share of the way from `www_serve` to `omniscient` in SLO AUC, summed over scenarios, with its 95 % interval.

    Resampled over seeds, all policies alike, since a ratio of means has no symmetric interval.
    """
    count = auc[0][OPEN].size
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    found: Tree = {}
    for policy in GAINERS:
        gained = np.sum([each[policy] - each[PUBLISHED] for each in auc], axis=0)
        gap = np.sum([each["omniscient"] - each[PUBLISHED] for each in auc], axis=0)
        low, high = np.percentile(gained[drawn].mean(axis=1) / gap[drawn].mean(axis=1), (2.5, 97.5))
        found[policy] = [float(gained.mean() / gap.mean()), float(low), float(high)]
    return found


def headline(data: Tree) -> Tree:
    """The setting, among those in which `single` is not hopeless, with the highest ratio of `www_serve` to it."""
    usable = {
        name: cells[PUBLISHED]["slo"][HEADLINE_S][0] / cells[OPEN]["slo"][HEADLINE_S][0]
        for name, cells in data["scenarios"].items()
        if cells[OPEN]["slo"][HEADLINE_S][0] >= LEAST_ATTAINMENT
    }
    name = max(usable, key=lambda each: usable[each])
    cells = data["scenarios"][name]
    return {
        "scenario": name,
        "ratio": usable[name],
        "single": cells[OPEN]["slo"][HEADLINE_S],
        "www_serve": cells[PUBLISHED]["slo"][HEADLINE_S],
        "learned_ratio": cells[LEARNED]["slo"][HEADLINE_S][0] / cells[OPEN]["slo"][HEADLINE_S][0],
        "saving": 1 - cells[PUBLISHED]["latency_s"]["mean"][0] / cells[OPEN]["latency_s"]["mean"][0],
        "learned_saving": 1 - cells[LEARNED]["latency_s"]["mean"][0] / cells[OPEN]["latency_s"]["mean"][0],
    }


def draw_slo(data: Tree, out: Path) -> list[Path]:
    """Attainment against the threshold, a panel for each setting."""
    label = "share of requests within the threshold"
    with plt.rc_context(figures.SETTINGS):
        return figures.save(figures.by_scenario(data["scenarios"], figures.slo_panel, label), out, "slo")


def draw_latency(data: Tree, out: Path) -> list[Path]:
    """Distribution and summary of latency, a panel for each setting."""
    cells = data["scenarios"]
    label = "share of requests answered within it"
    with plt.rc_context(figures.SETTINGS):
        return [
            *figures.save(figures.by_scenario(cells, figures.latency_panel, label), out, "latency"),
            *figures.save(figures.latency_summary(cells), out, "latency-summary"),
        ]


def slo_tables(data: Tree) -> list[Table]:
    """SLO AUC by setting and policy, and the shares of the gap."""
    policies = list(next(iter(data["scenarios"].values())))
    scores = [
        [
            f"`{name}`",
            "{:.2f} ({:.2f} to {:.2f})".format(*data["load"][name]),
            *(shown(cells[policy]["slo_auc"], 3) for policy in policies),
        ]
        for name, cells in data["scenarios"].items()
    ]
    gaps = [
        [
            f"`{name}`" if name in data["best_rule"] else name,
            f"`{data['best_rule'][name]}`" if name in data["best_rule"] else "of each setting",
            *(_share(found[policy]) for policy in GAINERS),
            shown(found["learned - best rule"], 4, "+") if name in data["best_rule"] else "",
        ]
        for name, found in data["gap"].items()
    ]
    best = "share of the gap from `www_serve` to `omniscient`: best rule"
    one = f"one rule for all four, `{data['one_rule']}`"
    return [
        Table(["SLO AUC", "load (of one node, in a phase)", *policies], scores),
        Table(["setting", "the best rule", best, one, "learned", "SLO AUC, learned − best rule"], gaps),
    ]


def _share(found: Sequence[float]) -> str:
    share, low, high = found
    return f"{share:.2f} [{low:.2f}, {high:.2f}]"


def latency_tables(data: Tree) -> list[Table]:
    """Mean latency by setting and policy, with the saving of `www_serve`."""
    policies = list(next(iter(data["scenarios"].values())))
    rows = [
        [
            f"`{name}`",
            *(shown(cells[policy]["latency_s"]["mean"], 1) for policy in policies),
            f"{100 * (1 - cells[PUBLISHED]['latency_s']['mean'][0] / cells[OPEN]['latency_s']['mean'][0]):.1f} %",
        ]
        for name, cells in data["scenarios"].items()
    ]
    return [
        Table(["mean latency, s", *policies, f"`www_serve` saves (published: {100 * PUBLISHED_SAVING:.1f} %)"], rows)
    ]


def slo_lines(data: Tree) -> list[Sequence[str]]:
    """The headline's ratio."""
    best = headline(data)
    what = f"attainment at {HEADLINE_S} s, `www_serve` over `single`, in the best of four settings"
    return [(what, f"up to {PUBLISHED_RATIO}", f"{best['ratio']:.2f}, learned {best['learned_ratio']:.2f}")]


def latency_lines(data: Tree) -> list[Sequence[str]]:
    """The saving in the headline's setting."""
    best = headline(data)
    here = f"−{100 * best['saving']:.1f} %, learned −{100 * best['learned_saving']:.1f} %"
    return [("mean latency against `single`, there", f"−{100 * PUBLISHED_SAVING:.1f} %", here)]


SLO = Experiment("slo", "SLO attainment in four settings", SCENARIOS, "settings", run, draw_slo, slo_tables, slo_lines)
LATENCY = Experiment("latency", "Latency", SCENARIOS, "settings", run, draw_latency, latency_tables, latency_lines)
