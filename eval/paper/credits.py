"""Credits and requests of nodes that differ in quality or speed: duels, model size, quantization, attention, hardware.

In each of these scenarios one provider has all users, and the others, named `CLASS-NUMBER`, serve what its own node
cannot. They have no users of their own, so all that they own they earned or won.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray

from wwwserve.agents.rules import Policy, Rule
from wwwserve.envs.oracle import Oracle
from wwwserve.envs.scenario import PoissonTraffic, Scenario
from wwwserve.envs.scenario import load as load_scenario
from wwwserve.eval import figures
from wwwserve.eval.history import History, record
from wwwserve.eval.metrics import paired_ci
from wwwserve.eval.paper.experiment import (
    BEST_RULE,
    PUBLISHED,
    Experiment,
    Table,
    Tree,
    contenders,
    pair,
    pairs,
    shown,
)
from wwwserve.eval.strength import MODEL_SIZE, QUANTIZATION, wilson, win_rates
from wwwserve.eval.strength import fit as fit_strengths

SAMPLES = 61
LOADS = (0.5, 1.0, 2.0, 4.0)  # times the scenario's
SELECTION_SEEDS = 8  # for the best rule
SERVED_ATTENTION = {"flashinfer": 788, "triton": 786, "sdpa": 426}
SERVED_HARDWARE = {"a100-80g": 1717, "rtx-4090": 1195, "rtx-3090": 1088}
_DRAWN = (("-", "o", "0.0"), ("--", "s", "0.25"), ("-.", "^", "0.45"), (":", "x", "0.0"))
_BARS = (("0.85", ""), ("1.0", "///"), ("1.0", "..."), ("0.6", ""))


def classes(scenario: Scenario) -> dict[str, list[int]]:
    """Places of the providers of each class, in the order of the file."""
    found: dict[str, list[int]] = {}
    for i, provider in enumerate(scenario.providers):
        if provider.traffic is None:
            found.setdefault(provider.name.rpartition("-")[0], []).append(i)
    return found


def at_load(scenario: Scenario, load: float) -> Scenario:
    """The scenario with as many requests, that come `load` times as fast."""
    providers = []
    for each in scenario.providers:
        if isinstance(each.traffic, PoissonTraffic):
            phases = [replace(p, until_s=p.until_s / load, rate_per_s=p.rate_per_s * load) for p in each.traffic.phases]
            each = replace(each, traffic=PoissonTraffic(tuple(phases)))
        providers.append(each)
    return replace(scenario, duration_s=scenario.duration_s / load, providers=tuple(providers))


def by_class(values: NDArray[np.float64], groups: Mapping[str, list[int]]) -> NDArray[np.float64]:
    """Mean over the nodes of each class: [..., N] to [..., C]."""
    return np.stack([values[..., places].mean(axis=-1) for places in groups.values()], axis=-1)


def run(name: str, seeds: Sequence[int]) -> Tree:
    """What each class earned and served, by policy; with the published policy its course and other loads."""
    scenario = load_scenario(name)
    groups = classes(scenario)
    chosen = contenders(scenario, seeds[:SELECTION_SEEDS])
    result: Tree = {"classes": list(groups), "best_rule": chosen[BEST_RULE].name, "policies": {}, "loads": {}}
    for policy_name, policy in chosen.items():
        result["policies"][policy_name] = measure(scenario, policy, seeds)
    for load in LOADS:
        found = measure(at_load(scenario, load), Rule(PUBLISHED), seeds)
        result["loads"][f"{load:g}"] = {key: found[key] for key in ("share", "grown", "grown_apart")}
    return result


def measure(scenario: Scenario, policy: Policy | Oracle, seeds: Sequence[int]) -> Tree:
    """Growth, served requests, stake won and lost, duels and the course of credits and stake, by class."""
    groups = classes(scenario)
    interval_s = (scenario.duration_s + scenario.drain_s) / (SAMPLES - 1)
    histories = record(scenario, policy, seeds, samples=SAMPLES, interval_s=interval_s)
    credit = np.array([by_class(each.credits - each.credits[0], groups) for each in histories])  # [S, T, C]
    stake = np.array([by_class(each.stake, groups) for each in histories])
    served = np.array([by_class(each.served.astype(np.float64), groups) for each in histories])  # [S, C]
    judged = np.array([by_class(each.judged.astype(np.float64), groups) for each in histories])
    grown = credit[:, -1]
    return {
        "time_s": (interval_s * np.arange(SAMPLES)).tolist(),
        "credit": credit.mean(axis=0).T.tolist(),
        "stake": stake.mean(axis=0).T.tolist(),
        "last_stake": pairs(stake[:, -1]),
        "grown": pairs(grown),
        "grown_apart": [pair(paired_ci(grown[:, k], grown[:, k + 1])) for k in range(grown.shape[1] - 1)],
        "served": pairs(served),
        "share": pairs(served / served.sum(axis=1, keepdims=True)),
        "won_less_lost": pairs(grown - served - judged),  # each request and each judgement was paid one credit
        **_duels(histories, groups),
    }


def _duels(histories: Sequence[History], groups: Mapping[str, list[int]]) -> Tree:
    """Duels between classes: wins of each class [C] over each [C], and the share that each won of its own."""
    place = {i: c for c, places in enumerate(groups.values()) for i in places}
    wins = np.zeros((len(groups), len(groups)), np.int64)
    for each in histories:
        for duel in each.duels:
            if duel.winner in place and duel.loser in place:
                wins[place[duel.winner], place[duel.loser]] += 1
    between = wins * (1 - np.eye(len(groups), dtype=np.int64))
    fought = between.sum(axis=1) + between.sum(axis=0)
    rates = [
        [float(w / n), wilson(int(w), int(n))[1]] if n else [None, None]
        for w, n in zip(between.sum(axis=1).tolist(), fought.tolist(), strict=True)
    ]
    return {"wins": wins.tolist(), "duels": fought.tolist(), "win_rate": rates, "ties": sum(h.ties for h in histories)}


# Drawing.


def _courses(axes: Axes, data: Tree, key: str, label: str) -> None:
    found = data["policies"][PUBLISHED]
    for name, series, (line, marker, color) in zip(data["classes"], found[key], _DRAWN, strict=False):
        axes.plot(
            np.array(found["time_s"]) / 3600, series, ls=line, marker=marker, markevery=8, color=color, mfc="white",
            label=name,
        )  # fmt: skip
    axes.set_xlabel("time (h)")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=8)


def _bars(axes: Axes, names: Sequence[str], groups: Mapping[str, Sequence[Sequence[float | None]]], label: str) -> None:
    """Bars of [mean, half-width], one of each group beside the other at every name."""
    width = 0.8 / len(groups)
    for k, ((group, values), (face, hatch)) in enumerate(zip(groups.items(), _BARS, strict=False)):
        x = np.arange(len(names)) + (k - (len(groups) - 1) / 2) * width
        mean = [v[0] or 0.0 for v in values]
        half = [v[1] or 0.0 for v in values]
        axes.bar(x, mean, width, yerr=half, color=face, hatch=hatch, edgecolor="black", capsize=2, label=group)
    axes.set_xticks(np.arange(len(names)), names)
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=8)


def draw(name: str, published: Mapping[str, float] | None, data: Tree, out: Path) -> list[Path]:
    """Credits over time; then win rates or served requests beside the published ones, or stake and duels."""
    names, ours = data["classes"], data["policies"][PUBLISHED]
    with plt.rc_context(figures.SETTINGS):
        count = 3 if published is None else 2
        figure, axes = plt.subplots(1, count, figsize=(3.9 * count, 3.2), layout="constrained")
        _courses(axes[0], data, "credit", "credits gained by a node")
        if published is None:
            _courses(axes[1], data, "stake", "stake of a node (credits)")
            _bars(axes[2], names, {"against other classes": ours["win_rate"]}, "share of duels won")
        elif not any(ours["duels"]):
            total = sum(published.values())
            bars = {"published": [[published[each] / total, None] for each in names]}
            bars |= {policy: found["share"] for policy, found in data["policies"].items()}
            _bars(axes[1], names, bars, "share of requests served for peers")
        else:
            bars = {"published": [[published[each], None] for each in names], "here": ours["win_rate"]}
            _bars(axes[1], names, bars, "share of duels won")
            axes[1].axhline(0.5, color="black", lw=0.8, ls=":")
            axes[1].set_ylim(0.3, 0.65)
        return figures.save(figure, out, name)


# Numbers.


def tables(published: Mapping[str, float] | None, data: Tree) -> list[Table]:
    """Every class in numbers, by policy; head to head; other loads."""
    names = data["classes"]
    found: list[Table] = []
    fought = data["policies"][PUBLISHED]["duels"]
    if any(fought):
        ours = data["policies"][PUBLISHED]
        rates = [
            ["duels with other classes", *map(str, fought)],
            ["won, here", *(shown(x, 3) for x in ours["win_rate"])],
        ]
        if published is not None:
            expected = win_rates(fit_strengths([published[each] for each in names]))
            rates.insert(0, ["won, published", *(f"{published[each]:.2f}" for each in names)])
            rates.insert(1, ["round robin of the fitted strengths", *(f"{x:.4f}" for x in expected)])
        found.append(Table(["`www_serve`", *names], rates))
        if published is None:
            wins = np.array(ours["wins"], np.float64)
            met = wins + wins.T
            rows = [
                [f"`{a}` wins against", *(f"{wins[i, j] / met[i, j]:.3f}" if i != j else "" for j in range(len(names)))]
                for i, a in enumerate(names)
            ]
            found.append(Table(["head to head", *names], rows))
    rows = []
    if published is not None and not any(fought):
        total = sum(published.values())
        served = [f"{published[each]:.0f} ({published[each] / total:.3f})" for each in names]
        rows.append(["published", "requests served (share)", *served])
    for policy, measured in data["policies"].items():
        label = f"best rule (`{data['best_rule']}`)" if policy == BEST_RULE else f"`{policy}`"
        served = [
            f"{shown(x, 0)} ({share[0]:.3f})" for x, share in zip(measured["served"], measured["share"], strict=True)
        ]
        rows.append([label, "credits gained", *(shown(x, 1) for x in measured["grown"])])
        rows.append([label, "requests served (share)", *served])
        if any(measured["duels"]):
            rows.append([label, "stake won less lost", *(shown(x, 1) for x in measured["won_less_lost"])])
            rows.append([label, "stake at the end", *(shown(x, 2) for x in measured["last_stake"])])
    found.append(Table(["a node, by policy", "", *names], rows))
    if any(fought):
        rows = [[f"{load} times", *(shown(x, 1) for x in each["grown"])] for load, each in data["loads"].items()]
        found.append(Table(["credits gained with `www_serve`, by load", *names], rows))
    else:
        rows = [[f"{load} times", *(shown(x, 3) for x in each["share"])] for load, each in data["loads"].items()]
        found.append(Table(["share served with `www_serve`, by load", *names], rows))
    return found


def lines(published: Mapping[str, float] | None, data: Tree) -> list[Sequence[str]]:
    """Win rates or served requests, and credits, of the classes in the published order."""
    names, ours = data["classes"], data["policies"][PUBLISHED]
    order = " > ".join(f"`{each}`" for each in names)
    grown = ", ".join(f"{x[0]:.0f}" for x in ours["grown"])
    if published is None:
        last = ours["last_stake"][-1]
        return [
            (f"credits gained: {', '.join(names)}", order, grown),
            (
                f"stake of `{names[-1]}` at the end",
                "lost",
                f"{shown(last, 2)}, of others {ours['last_stake'][0][0]:.2f}",
            ),
        ]
    if any(ours["duels"]):
        rates = ", ".join(f"{published[each]:.2f}" for each in names)
        return [
            (f"duels won: {', '.join(names)}", rates, ", ".join(shown(x, 3) for x in ours["win_rate"])),
            ("credits gained, in the same order", order, grown),
        ]
    total = sum(published.values())
    shares = ", ".join(f"{published[each] / total:.3f}" for each in names)
    return [
        (f"requests served, share: {', '.join(names)}", shares, ", ".join(shown(x, 3) for x in ours["share"])),
        ("credits gained, in the same order", order, grown),
    ]


def _experiment(name: str, title: str, published: Mapping[str, float] | None) -> Experiment:
    scenario = f"paper/{name}"
    return Experiment(
        name, title, (scenario,), name, partial(run, scenario), partial(draw, name, published),
        partial(tables, published), partial(lines, published),
    )  # fmt: skip


DUEL = _experiment("duel", "Duels: four classes of quality", None)
MODEL_SIZE_EXPERIMENT = _experiment("model-size", "Model size", MODEL_SIZE)
QUANTIZATION_EXPERIMENT = _experiment("quantization", "Quantization", QUANTIZATION)
ATTENTION = _experiment("attention", "Attention backend", SERVED_ATTENTION)
HARDWARE = _experiment("hardware", "Hardware", SERVED_HARDWARE)
