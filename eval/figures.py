"""Draws results: `wwwserve figures RESULT.json --out DIR [--training LOG]`, each figure as PNG and SVG.

`slo` and `latency` (quantiles, and a summary by policy) from what `eval.compare --json` writes, `learning` from the
log of a training run. From what `eval.game --json` writes: `markups` and `prices` over time, `profit` beside that of
being alone, `deviations` with what they gain, `welfare` (its loss by the number of providers) and `price-cut`, the last
two where they were measured. Every policy has a line style and a marker of its own, so that figures read without
colour.
"""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wwwserve.agents.arguments import UsageError, parse_args, refuse
from wwwserve.agents.rules import RULES
from wwwserve.eval.compare import Tree

PROG = "wwwserve figures"
KEPT = ("single", "www_serve")  # rules that are always drawn by themselves

# Line, marker and colour by policy (colours: Okabe and Ito, distinct to the colour-blind).
_STYLES: dict[str, tuple[Any, str, str]] = {
    "learned": ("-", "*", "#000000"),
    "www_serve": ("-", "o", "#0072b2"),
    "single": (":", "x", "#777777"),
    "random": ((0, (1, 3)), "+", "#777777"),
    "shortest_queue": ((0, (6, 1, 2, 1)), "3", "#0b5fa5"),
    "power_of_two": ((0, (5, 1, 1, 1, 1, 1)), "D", "#56b4e9"),
    "earliest_finish": ("--", "s", "#009e73"),
    "earliest_finish_trust": ("-.", "^", "#d55e00"),
    "deadline_first": ((0, (3, 1, 1, 1)), "v", "#cc79a7"),
    "rank_cap": ((0, (7, 2)), "P", "#e69f00"),
    "trust_cap": ((0, (4, 1, 1, 1, 1, 1, 1, 1)), "d", "#117733"),
    "best_value": ((0, (1, 1)), "<", "#8c6bb1"),
    "lmetric": ((0, (4, 2, 4, 1)), "h", "#a6761d"),
    "affinity_filter": ((0, (6, 2, 1, 1)), ">", "#1b7837"),
    "kv_cost": ((0, (3, 1, 3, 2)), "X", "#762a83"),
    "cache_aware": ((0, (5, 3, 1, 3)), "p", "#b2182b"),
    "load_aware": ((0, (2, 3, 2, 1)), "H", "#4d4d4d"),
    "sticky": ((0, (8, 3)), "8", "#006d5b"),
    "busy_cut": ((0, (1, 4, 3, 1)), "4", "#5a3d8a"),
    "best rule": ("--", "s", "#009e73"),
    "centralized": ("--", "1", "#333333"),
    "omniscient": ("-.", "2", "#333333"),
}
_OTHERS = (("-", "H", "#a6761d"), ("--", ">", "#1b7837"), ("-.", "X", "#762a83"), (":", "p", "#b2182b"),
           ((0, (9, 2, 1, 2)), "h", "#4d4d4d"), ((0, (2, 2)), "8", "#006d5b"),
           ((0, (6, 3)), "4", "#5a3d8a"), ((0, (8, 1, 1, 1)), "|", "#8a3d5a"), ((0, (3, 3)), "_", "#3d5a8a"),
           ((0, (1, 2, 4, 2)), "$o$", "#5a8a3d"), ((0, (5, 2)), "$x$", "#3d3d8a"),
           ((0, (2, 1, 6, 1)), "$v$", "#8a7a3d"), ((0, (7, 2, 2, 2)), "$k$", "#7a3d5a"),
           ((0, (3, 2, 5, 1)), "$s$", "#2d6a8a"), ((0, (4, 4)), "$a$", "#6a8a2d"),
           ((0, (1, 3, 1, 1)), "$c$", "#8a2d6a"))  # fmt: skip
SETTINGS: Any = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "svg.hashsalt": "wwwserve",
    "svg.fonttype": "none",
}


_UNEXPECTED = (KeyError, TypeError, IndexError, AttributeError, ValueError, StopIteration)  # from data of another form


class FigureError(ValueError):
    """A file that cannot be drawn; the message is one line."""


def draw(result_file: Path, out: Path, training: Path | None = None, best_rule: bool = False) -> list[Path]:
    """Draw a result file, and a training log if given, into the folder `out`; the files written. Raises FigureError.

    With `best_rule`, the best of the rules in each scenario stands for all of them; see `with_best_rule`.
    """
    result = _read(result_file, json.loads)
    if isinstance(result, dict) and "first_seed" in result:
        try:
            return draw_game(result, out)
        except _UNEXPECTED as error:
            raise FigureError(f"{result_file}: not a result of eval.game: {error!r}") from None
    progress = None if training is None else _read(training, lambda text: [json.loads(x) for x in text.splitlines()])
    try:
        files = draw_comparison(with_best_rule(result) if best_rule else result, out)
    except _UNEXPECTED as error:
        raise FigureError(f"{result_file}: not a result of eval.compare: {error!r}") from None
    if progress is not None:
        try:
            files += draw_learning(progress, out)
        except _UNEXPECTED as error:
            raise FigureError(f"{training}: not the log of a training run: {error!r}") from None
    return files


def with_best_rule(result: Tree) -> Tree:
    """A result in which "best rule" is, in each scenario, the rule with the highest SLO AUC; `single` and `www_serve`,
    and what is no rule, stay themselves."""
    shown: Tree = {}
    for scenario, cells in result["scenarios"].items():
        rules = [name for name in cells if name.split("@")[0].split(":")[0] in RULES and name not in KEPT]
        others = {name: cell for name, cell in cells.items() if name not in rules}
        best = max(rules, key=lambda name: cells[name]["slo_auc"][0])
        shown[scenario] = others | {"best rule": cells[best]}
    return result | {"scenarios": shown}


def draw_comparison(result: Tree, out: Path) -> list[Path]:
    """`slo`, `latency` and `latency-summary` from what `eval.compare.compare` returns; the files written."""
    cells = result["scenarios"]
    with plt.rc_context(SETTINGS):
        return [
            *save(by_scenario(cells, slo_panel, "share of requests within the threshold"), out, "slo"),
            *save(by_scenario(cells, latency_panel, "share of requests answered within it"), out, "latency"),
            *save(latency_summary(cells), out, "latency-summary"),
        ]


def draw_game(result: Tree, out: Path) -> list[Path]:
    """The figures of what `eval.game` writes; the files written."""
    cells = result["scenarios"]
    with plt.rc_context(SETTINGS):
        files = [
            *save(by_provider(cells, course_panel("markup", "markup, credits per 1000 output tokens")), out, "markups"),
            *save(by_provider(cells, course_panel("price", "credits per 1000 output tokens")), out, "prices"),
            *save(by_provider(cells, profit_panel), out, "profit"),
        ]
        if any(cell["deviations"] for cell in cells.values()):
            files += save(deviation_gains(cells), out, "deviations")
        families = welfare_losses(cells)
        if any(len(points) > 1 for points in families.values()):
            files += save(welfare(families), out, "welfare")
        cut = {
            name: cell["collusion"]["cut"] for name, cell in cells.items() if cell.get("collusion", {}).get("sellers")
        }
        if cut:
            files += save(price_cuts(cut), out, "price-cut")
        return files


def draw_learning(progress: Sequence[Tree], out: Path) -> list[Path]:
    """`learning` from the lines of a training log; the files written."""
    with plt.rc_context(SETTINGS):
        return save(_learning(progress), out, "learning")


def style_of(name: str, names: Sequence[str]) -> dict[str, Any]:
    """How a policy is drawn; those without a style of their own get one by their place among these."""
    unknown = [each for each in names if each not in _STYLES]
    line, marker, color = _STYLES[name] if name in _STYLES else _OTHERS[unknown.index(name) % len(_OTHERS)]
    return {"linestyle": line, "marker": marker, "color": color, "label": name, "markerfacecolor": "none"}


def _in_row(count: int) -> int:
    """Panels side by side: at most three, four as two and two."""
    return 2 if count == 4 else min(count, 3)


def panels(count: int, height: float, labels: Iterable[str]) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, `height` inches each, and room to their right for a legend with these labels."""
    columns = _in_row(count)
    rows = math.ceil(count / columns)
    size = (3.3 * columns + 0.8 + 0.07 * max(map(len, labels)), height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for spare in axes.flat[count:]:
        spare.remove()
    return figure, list(axes.flat[:count])


def by_scenario(cells: Tree, panel: Any, label: str) -> Figure:
    figure, axes = panels(len(cells), 2.9, next(iter(cells.values())))
    for each, (scenario, policies) in zip(axes, cells.items(), strict=True):
        panel(each, policies)
        each.set_title(scenario)
        each.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    for each in axes[:: _in_row(len(axes))]:
        each.set_ylabel(label)
    legend(figure, axes)
    return figure


def slo_panel(axes: Axes, policies: Tree) -> None:
    """Attainment against the threshold, with 95 % intervals over seeds."""
    for name, cell in policies.items():
        points = [(float(key), mean, half or 0.0) for key, (mean, half) in cell["slo"].items() if mean is not None]
        if points:
            x, mean, half = np.array(points).T
            style = style_of(name, list(policies))
            axes.plot(x, mean, **style)
            axes.fill_between(x, mean - half, np.minimum(mean + half, 1.0), color=style["color"], alpha=0.1, lw=0)
    axes.set_xlabel("latency threshold (s)")


def latency_panel(axes: Axes, policies: Tree) -> None:
    """Distribution of latency over all requests: quantiles of the finished, scaled by their share."""
    for name, cell in policies.items():
        if cell["requests"] == cell["unfinished"]:
            continue
        finished = 1 - cell["unfinished"] / cell["requests"]
        quantiles = cell["latency_s"]["quantiles"]
        shares = finished * np.arange(1, len(quantiles) + 1) / (len(quantiles) + 1)
        axes.plot(quantiles, shares, markevery=(4, 12), **style_of(name, list(policies)))
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.set_xlabel("latency (s)")


_SUMMARY = (("p50", "o", "white"), ("mean", "x", "black"), ("p90", "s", "white"), ("p99", "D", "#999999"))


def latency_summary(cells: Tree) -> Figure:
    """Mean and percentiles by policy, with 95 % intervals over seeds."""
    names = list(next(iter(cells.values())))
    figure, axes = panels(len(cells), 0.9 + 0.2 * len(names), names)
    for k, (each, (scenario, policies)) in enumerate(zip(axes, cells.items(), strict=True)):
        places = np.arange(len(policies))
        for key, marker, face in _SUMMARY:
            pairs = [cell["latency_s"][key] for cell in policies.values()]
            mean = np.array([math.nan if m is None else m for m, _ in pairs])
            half = np.array([h or 0.0 for _, h in pairs])
            each.errorbar(
                mean, places, xerr=half, fmt=marker, color="black", markerfacecolor=face, label=key,
                elinewidth=0.8, capsize=2, markersize=4.5, markeredgewidth=1.0,
            )  # fmt: skip
        each.set_yticks(places, names if k % _in_row(len(axes)) == 0 else [])
        each.invert_yaxis()
        each.set_xlim(left=0)
        each.set_xlabel("latency of finished requests (s)")
        each.set_title(scenario)
    legend(figure, axes)
    return figure


def _learning(progress: Sequence[Tree]) -> Figure:
    """Score on validation markets against agent steps, with the rules as levels."""
    rules = progress[0].get("rules", {})
    steps = np.array([line["agent_steps"] for line in progress]) / 1e6
    names = list(progress[0]["scores"])
    figure, axes = panels(len(names), 2.9, next(iter(rules.values()), ["learned"]))
    for each, name in zip(axes, names, strict=True):
        for rule, level in rules.get(name, {}).items():
            style = style_of(rule, list(rules[name]))
            each.plot([steps[0], steps[-1]], [level, level], markevery=[1], clip_on=False, **{**style, "lw": 1.0})
        style = style_of("learned", ["learned"])
        each.plot(steps, [line["scores"][name] for line in progress], zorder=5, **{**style, "marker": None, "lw": 2.0})
        each.set_title(name)
        each.set_xlabel("agent steps (millions)")
    for each in axes[:: _in_row(len(axes))]:
        each.set_ylabel("SLO AUC, or goodput value")
    legend(figure, axes, f"{progress[-1]['seconds'] / 60:.0f} min of training")
    return figure


MANY = 10  # providers, beyond which they are not told apart


def by_provider(cells: Tree, panel: Any) -> Figure:
    """A panel for each scenario, in which providers have styles of their own, unless there are too many."""
    told_apart = [cell["providers"] for cell in cells.values() if len(cell["providers"]) <= MANY]
    names = list(dict.fromkeys(name for each in told_apart for name in each))
    figure, axes = panels(len(cells), 2.9, names or ["-"])
    for each, (scenario, cell) in zip(axes, cells.items(), strict=True):
        alike = {"linestyle": "-", "marker": "o", "color": "#777777", "lw": 0.7, "markersize": 3}
        few = len(cell["providers"]) <= MANY
        panel(each, cell, {name: style_of(name, names) if few else alike for name in cell["providers"]})
        each.set_title(scenario)
    if any(each.get_legend_handles_labels()[1] for each in axes):
        legend(figure, axes)
    return figure


def course_panel(key: str, label: str) -> Any:
    """Draws `markup` or `price` of every provider over time, means over seeds."""

    def panel(axes: Axes, cell: Tree, styles: dict[str, dict[str, Any]]) -> None:
        for name, style in styles.items():
            values = np.array(cell["course"][key][name], np.float64)
            axes.plot(cell["course"]["time_s"], values, **style, markevery=(3, 24))
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("time (s)")
        axes.set_ylabel(label)

    return panel


def profit_panel(axes: Axes, cell: Tree, styles: dict[str, dict[str, Any]]) -> None:
    """Profit against the profit alone, with 95 % intervals over seeds; below the line a provider is worse off."""
    for name, style in styles.items():
        each = cell["providers"][name]
        (x, x_half), (y, y_half) = each["alone"], each["profit"]
        shown = style | {"linestyle": "none"}
        axes.errorbar(x, y, xerr=x_half or 0.0, yerr=y_half or 0.0, elinewidth=0.8, capsize=2, **shown)
    low, high = (pick(*axes.get_xlim(), *axes.get_ylim()) for pick in (min, max))
    axes.plot([low, high], [low, high], color="black", lw=0.8, zorder=0)
    axes.set_xlabel("profit alone (credits)")
    axes.set_ylabel("profit (credits)")


def deviation_gains(cells: Tree) -> Figure:
    """What deviations gain, percent of own profit: the mean provider and the one that gains most."""
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["deviations"]))
    figure, axes = panels(len(cells), 0.9 + 0.2 * len(names), ["gains most"])
    for k, (each, (scenario, cell)) in enumerate(zip(axes, cells.items(), strict=True)):
        for key, label, marker, face in (
            ("mean_gain", "mean", "o", "white"),
            ("worst_gain", "gains most", "s", "#999999"),
        ):
            for row, name in enumerate(names):
                if name in cell["deviations"]:
                    mean, half = cell["deviations"][name][key]
                    each.errorbar(
                        100 * mean, row, xerr=100 * (half or 0.0), fmt=marker, color="black", markerfacecolor=face,
                        elinewidth=0.8, capsize=2, markersize=4.5, label=label if row == 0 else None,
                    )  # fmt: skip
        each.axvline(0.0, color="black", lw=0.8)
        each.set_yticks(range(len(names)), names if k % _in_row(len(axes)) == 0 else [])
        each.invert_yaxis()
        each.set_xlabel("gain (% of own profit)")
        each.set_title(scenario)
    legend(figure, axes)
    return figure


def welfare_losses(cells: Tree) -> dict[str, list[tuple[int, float, float]]]:
    """By scenario without its copies: numbers of providers, loss of welfare and half-width, percent."""
    families: dict[str, list[tuple[int, float, float]]] = {}
    for name, cell in cells.items():
        family = name.removesuffix(f" x{cell['copies']}")
        mean, half = cell["loss"]
        families.setdefault(family, []).append((len(cell["providers"]), 100 * mean, 100 * (half or 0.0)))
    return {family: sorted(points) for family, points in families.items()}


def welfare(families: dict[str, list[tuple[int, float, float]]]) -> Figure:
    """Loss of welfare to the cooperative policy against the number of providers."""
    figure, (axes,) = panels(1, 2.9, families)
    for name, points in families.items():
        x, mean, half = np.array(points).T
        axes.errorbar(x, mean, yerr=half, elinewidth=0.8, capsize=2, **style_of(name, list(families)))
    ticks = sorted({point[0] for points in families.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.minorticks_off()
    axes.axhline(0.0, color="black", lw=0.8)
    axes.set_xlabel("providers")
    axes.set_ylabel("welfare missing (%)")
    legend(figure, [axes])
    return figure


def price_cuts(cuts: Tree) -> Figure:
    """Markups around the time in which one seller is made to sell as cheaply as it can."""
    figure, axes = panels(len(cuts), 2.9, ["others, without the cut"])
    for each, (scenario, cut) in zip(axes, cuts.items(), strict=True):
        each.axvspan(cut["from_s"], cut["until_s"], color="#dddddd", lw=0)
        for key, label, line in (
            ("forced", "who cuts", "-"),
            ("others_markup", "others", "--"),
            ("others_without", "others, without the cut", ":"),
        ):
            each.plot(cut["time_s"], cut[key], label=label, linestyle=line, color="black")
        each.set_ylim(bottom=0.0)
        each.set_title(f"{scenario}: {cut['seller']}")
        each.set_xlabel("time (s)")
        each.set_ylabel("markup")
    legend(figure, axes)
    return figure


def legend(figure: Figure, axes: Sequence[Axes], title: str | None = None) -> None:
    """One legend for all panels, to their right."""
    entries = {label: handle for each in axes for handle, label in zip(*each.get_legend_handles_labels(), strict=True)}
    place: dict[str, Any] = {"frameon": False, "handlelength": 3.6, "title": title, "alignment": "left"}
    figure.legend(list(entries.values()), list(entries), loc="outside right upper", **place)


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.png", out / f"{name}.svg"]
    figure.savefig(files[0])
    figure.savefig(files[1], metadata={"Date": None})
    plt.close(figure)
    return files


def _read(path: Path, parse: Any) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FigureError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise FigureError(f"{path}: not JSON: {error}") from None


@dataclass
class Args:
    """Draw results of `wwwserve compare` and `wwwserve game`."""

    result: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RESULT.json")]
    """what compare --json or game --json wrote"""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """folder for the figures"""
    training: Annotated[Path | None, tyro.conf.arg(metavar="LOG")] = None
    """progress.jsonl of a training run, to draw too"""
    best_rule: bool = False
    """draw the best rule of each scenario in place of every rule"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for a file that cannot be drawn."""
    try:
        args = parse_args(Args, PROG, argv)
        files = draw(args.result, args.out, args.training, args.best_rule)
    except (UsageError, FigureError, OSError) as error:
        return refuse(PROG, error)
    print("\n".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
