"""Latency through departures and joins."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from wwwserve.agents.rules import Policy, Rule
from wwwserve.envs.oracle import Oracle
from wwwserve.envs.scenario import load as load_scenario
from wwwserve.eval import figures
from wwwserve.eval.history import windowed
from wwwserve.eval.metrics import mean_ci, measure
from wwwserve.eval.paper.experiment import (
    BEST_RULE,
    OPEN,
    PUBLISHED,
    Experiment,
    Table,
    Tree,
    contenders,
    load_between,
    pair,
    pairs,
    shown,
)
from wwwserve.eval.play import rollout

SCENARIO = "paper/participation"
WINDOW_S = 50.0


def run(seeds: Sequence[int]) -> Tree:
    """Mean latency by policy and window of arrival, and over stretches with the same nodes online."""
    scenario = load_scenario(SCENARIO)
    chosen = contenders(scenario, seeds)
    policies: dict[str, Policy | Oracle] = {OPEN: Rule(OPEN), **chosen, "centralized": Oracle("centralized")}
    edges_s = np.arange(0.0, scenario.duration_s + WINDOW_S / 2, WINDOW_S)
    changes = sorted(
        {time_s for p in scenario.providers for window in p.online_s for time_s in window if math.isfinite(time_s)}
        | {0.0, scenario.duration_s}
    )
    online = [
        [sum(start <= time_s < end for start, end in p.online_s) for p in scenario.providers] for time_s in changes[:-1]
    ]
    result: Tree = {
        "best_rule": chosen[BEST_RULE].name,
        "edges_s": edges_s.tolist(),
        "changes_s": changes,
        "online": [sum(each) for each in online],
        "load": [load_between(scenario, start, end).market for start, end in pairwise(changes)],
        "policies": {},
    }
    for name, policy in policies.items():
        runs = rollout(scenario, policy, seeds)
        tables = [run.requests for run in runs]
        result["policies"][name] = {
            "latency_s": pairs([windowed(each.latency_s, each.arrival_s, edges_s.tolist()) for each in tables]),
            "stretches_s": pairs([windowed(each.latency_s, each.arrival_s, changes) for each in tables]),
            "slo_auc": pair(mean_ci(np.array([measure(each, scenario)["slo_auc"] for each in tables], np.float64))),
            "unfinished": sum(int(np.isinf(each.latency_s).sum()) for each in tables),
        }
    return result


def draw(data: Tree, out: Path) -> list[Path]:
    """Windowed mean latency over time, with the moments at which nodes come and go."""
    edges_s = np.array(data["edges_s"])
    middle_s = (edges_s[1:] + edges_s[:-1]) / 2
    with plt.rc_context(figures.SETTINGS):
        figure, (axes,) = figures.panels(1, 3.4, data["policies"])
        figure.set_size_inches(8.0, 3.4)
        for name, found in data["policies"].items():
            mean, half = (np.array([x[k] or 0.0 for x in found["latency_s"]], np.float64) for k in (0, 1))
            style = figures.style_of(name, list(data["policies"]))
            axes.plot(middle_s, mean, markevery=3, **style)
            axes.fill_between(middle_s, mean - half, mean + half, color=style["color"], alpha=0.1, lw=0)
        for k, time_s in enumerate(data["changes_s"][1:-1]):
            axes.axvline(time_s, color="black", lw=0.8, ls=(0, (1, 2)))
            word = "leaves" if data["online"][k + 1] < data["online"][k] else "joins"
            axes.annotate(
                f"a node {word}", (time_s, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlabel("arrival (s)")
        axes.set_ylabel(f"mean latency, {WINDOW_S:.0f} s windows (s)")
        figures.legend(figure, [axes])
        return figures.save(figure, out, "participation")


def tables(data: Tree) -> list[Table]:
    """Mean latency by stretch, SLO AUC and what was not answered."""
    changes = data["changes_s"]
    head = [
        f"{start:.0f} to {end:.0f} s, {count} nodes, load {load:.2f}"
        for (start, end), count, load in zip(pairwise(changes), data["online"], data["load"], strict=True)
    ]
    rows = [
        [
            name if name != BEST_RULE else f"{BEST_RULE} (`{data['best_rule']}`)",
            *(shown(x, 1) for x in found["stretches_s"]),
            shown(found["slo_auc"], 3),
            str(found["unfinished"]),
        ]
        for name, found in data["policies"].items()
    ]
    return [Table(["mean latency by arrival, s", *head, "SLO AUC", "unanswered"], rows)]


def lines(data: Tree) -> list[Sequence[str]]:
    """Mean latency as nodes leave and join."""
    here = ", ".join(f"{x[0]:.0f}" for x in data["policies"][PUBLISHED]["stretches_s"])
    return [
        (
            f"mean latency with {', '.join(map(str, data['online']))} nodes, s",
            "rises as nodes leave, falls as they join",
            here,
        )
    ]


PARTICIPATION = Experiment(
    "participation", "Dynamic participation", (SCENARIO,), "participation", run, draw, tables, lines
)
