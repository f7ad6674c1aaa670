"""Credits and requests of nodes that differ in quality or speed: duels, model size, quantization, attention, hardware.

In each of these scenarios one provider has all users, and the others, named `CLASS-NUMBER`, serve what its own node
cannot. They have no users of their own, so all that they own they earned or won.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray

from wwwserve.agents.hardware import ATTENTIONS, LAUNCH_S, Profile, profile
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
    holds,
    pair,
    pairs,
    shown,
)
from wwwserve.eval.policies import LEARNED
from wwwserve.eval.strength import MODEL_SIZE, QUANTIZATION, wilson, win_rates
from wwwserve.eval.strength import fit as fit_strengths

SAMPLES = 61
LOADS = (0.5, 1.0, 2.0, 4.0)  # times the scenario's
SELECTION_SEEDS = 8  # for the best rule
SERVED_ATTENTION = {"flashinfer": 788, "triton": 786, "sdpa": 426}
SERVED_HARDWARE = {"a100-80g": 1717, "rtx-4090": 1195, "rtx-3090": 1088}
ROUNDING = 0.005  # of a published rate
LEVEL = 0.015  # two shares of served requests nearer than this are level
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


def ordered(measured: Tree) -> bool:
    """Whether credits grew in the order of the classes, the first the most."""
    return all(apart[0] > 0 for apart in measured["grown_apart"])


def _at_loads(data: Tree) -> str:
    """At which loads the order of growth is that of the classes."""
    same = [load for load, found in data["loads"].items() if ordered(found)]
    return f"The order holds at {', '.join(same) or 'none'} times this load, of {', '.join(data['loads'])}."


def _growth(data: Tree, policy: str = PUBLISHED) -> str:
    grown = data["policies"][policy]["grown"]
    return ", ".join(f"`{name}` {x[0]:.0f}" for name, x in zip(data["classes"], grown, strict=True))


def _served(data: Tree, policy: str) -> str:
    return ", ".join(f"{x[0]:.0f}" for x in data["policies"][policy]["served"])


def _apart(data: Tree) -> str:
    """Differences of neighbours in growth, with intervals."""
    names = data["classes"]
    return ", ".join(
        f"`{a}` − `{b}` {shown(x, 1, '+')}"
        for a, b, x in zip(names, names[1:], data["policies"][PUBLISHED]["grown_apart"], strict=False)
    )


def _names(data: Tree) -> dict[str, str]:
    return {BEST_RULE: f"the best rule (`{data['best_rule']}`)", LEARNED: "the learned policy"}


def _others(data: Tree) -> str:
    """The order of growth under the other policies."""
    return "; ".join(
        f"with {named} {holds(ordered(data['policies'][policy]), 'the order is the same', 'the order is another')} "
        f"({_growth(data, policy)}, {_served(data, policy)} requests served)"
        for policy, named in _names(data).items()
    )


def quality_findings(data: Tree) -> list[str]:
    """The order of growth and what becomes of random responders."""
    ours = data["policies"][PUBLISHED]
    last = data["classes"].index("random")
    stake, lost, rate = ours["last_stake"][last], ours["won_less_lost"][last], ours["win_rate"][last]
    return [
        f"Published: credits grow with quality and random responders lose theirs. Here a node gains {_growth(data)} "
        f"credits ({_apart(data)}): {holds(ordered(ours))}.",
        f"Random responders win {100 * rate[0]:.1f} % of {ours['duels'][last]} duels with others and lose "
        f"{-lost[0]:.0f} credits of stake each, which is what they began with and earned; at the end {shown(stake, 2)} "
        f"are staked, where the others stake {', '.join(f'{x[0]:.2f}' for x in ours['last_stake'][:last])}: "
        f"{holds(stake[0] < 0.5 * min(x[0] for x in ours['last_stake'][:last]))}.",
        f"{_at_loads(data)} Under other policies: {_others(data)}.",
    ]


def rate_findings(published: Mapping[str, float], data: Tree) -> list[str]:
    """Win rates against the published ones, then what the strengths were not fitted to."""
    ours, names = data["policies"][PUBLISHED], data["classes"]
    off = [abs(x[0] - published[each]) for each, x in zip(names, ours["win_rate"], strict=True)]
    within = all(gap <= x[1] + ROUNDING for gap, x in zip(off, ours["win_rate"], strict=True))
    middle = ours["win_rate"][1]
    told = abs(middle[0] - 0.5) > middle[1]
    return [
        f"Fitted: the published win rates {', '.join(f'{published[each]:.2f}' for each in names)} come out as "
        f"{', '.join(shown(x, 3) for x in ours['win_rate'])} in {sum(ours['duels']) // 2} duels, "
        f"{holds(within, 'within their intervals and the rounding of the published ones', 'outside their intervals')}; "
        f"that of `{names[1]}` is {holds(told, 'told', 'not told')} from 0.50.",
        f"Not fitted: the order in which credits grow. Here a node gains {_growth(data)} credits ({_apart(data)}): "
        f"{holds(ordered(ours))}. Requests served are nearly alike "
        f"({_served(data, PUBLISHED)}), so it is stakes that make the order. {_at_loads(data)}",
        f"Under other policies: {_others(data)}.",
    ]


def served_findings(published: Mapping[str, int], data: Tree) -> list[str]:
    """Shares of served requests beside the published ones, the order of credits, and the loads at which it holds."""
    ours, names = data["policies"][PUBLISHED], data["classes"]
    total = sum(published.values())
    wanted = [published[each] / total for each in names]
    shares = [x[0] for x in ours["share"]]
    off = max(abs(a - b) for a, b in zip(shares, wanted, strict=True))
    same = [load for load, found in data["loads"].items() if in_order([x[0] for x in found["share"]], wanted)]
    return [
        f"Published: {' / '.join(str(published[each]) for each in names)} requests served, shares of "
        f"{', '.join(f'{x:.3f}' for x in wanted)}. Here the shares are {', '.join(f'{x:.3f}' for x in shares)} with "
        f"`www_serve`, off by at most {off:.3f}: the order is {holds(in_order(shares, wanted))}, shares nearer than "
        f"{LEVEL} taken as level. Credits grow by what is served, a credit each: {_growth(data)} ({_apart(data)}).",
        f"The load is not published; ours was chosen near the published shares, so their size is no test, their order "
        f"is: it is as published at {', '.join(same) or 'none'} times this load, of {', '.join(data['loads'])}.",
        "Under other policies the shares are "
        + " and ".join(
            f"{', '.join(f'{x[0]:.3f}' for x in data['policies'][policy]['share'])} with {named}, "
            f"{holds(in_order([x[0] for x in data['policies'][policy]['share']], wanted), 'the same order', 'not so')}"
            for policy, named in _names(data).items()
        )
        + ".",
    ]


def in_order(shares: Sequence[float], wanted: Sequence[float]) -> bool:
    """Whether neighbours among the shares stand to each other as the wanted ones do, level where those are."""
    return all(
        abs(a - b) < LEVEL if abs(x - y) < LEVEL else a > b
        for (a, b), (x, y) in zip(pairwise(shares), pairwise(wanted), strict=True)
    )


def _experiment(
    name: str,
    title: str,
    text: str,
    published: Mapping[str, float] | None,
    findings: Callable[[Tree], list[str]],
    why: str,
) -> Experiment:
    scenario = f"paper/{name}"
    return Experiment(
        name, title, (scenario,), text, name, partial(run, scenario), partial(draw, name, published),
        partial(tables, published), partial(lines, published), findings, why,
    )  # fmt: skip


def _of(gpu: str, quantization: str = "bf16") -> Profile:
    return profile(gpu, "qwen3-8b", quantization=quantization)


def _weight_ms(quantization: str) -> float:
    return 1e3 * _of("rtx-6000-ada", quantization).weight_s


DUEL = _experiment(
    "duel",
    "Duels: four classes of quality",
    "Credits over time and outcomes of duels for models of high, middle and low quality and random responders.",
    None,
    quality_findings,
    "The three models have the strengths fitted below; how random answers compare with any model's is a guess (a "
    f"log-strength of {load_scenario('paper/duel').providers[-1].strength:g}). Here a judge sees the two answers as "
    "they are, whoever it is: judges that vote at random, and would lose by it, are not modelled. Every request handed "
    "over is a duel, and each judge of it is paid a credit too, so that rare duels would cost random responders less "
    "than they earn.",
)
MODEL_SIZE_EXPERIMENT = _experiment(
    "model-size",
    "Model size",
    "Qwen3-8B, 4B and 0.6B win 0.57, 0.53 and 0.39 of their duels, and credits grow in that order.",
    MODEL_SIZE,
    partial(rate_findings, MODEL_SIZE),
    f"Published rates of a round robin must have a mean of one half; these sum to {sum(MODEL_SIZE.values()):.2f}, so "
    f"each is met to {abs(0.5 - sum(MODEL_SIZE.values()) / 3):.4f}. A policy that looks for the earliest finish sends "
    "most work to the small, fast model, whatever judges think of its answers: a record of lost duels is in view, but "
    "nothing that it is trained or tuned for depends on quality.",
)
QUANTIZATION_EXPERIMENT = _experiment(
    "quantization",
    "Quantization",
    "fp8wo, int4wo-128 and int4wo-32 win 0.54, 0.49 and 0.47 of their duels.",
    QUANTIZATION,
    partial(rate_findings, QUANTIZATION),
    f"Fewer bytes of weights make int4 faster to decode than fp8 (a weight read of {_weight_ms('int4wo-128'):.1f} and "
    f"{_weight_ms('int4wo-32'):.1f} ms against {_weight_ms('fp8wo'):.1f}), so where speed decides it works against "
    "quality. That int4 kernels lose efficiency in large batches is not modelled.",
)
ATTENTION = _experiment(
    "attention",
    "Attention backend",
    "FlashInfer, Triton and SDPA serve 788, 786 and 426 requests.",
    SERVED_ATTENTION,
    partial(served_findings, SERVED_ATTENTION),
    "FlashInfer and Triton have one profile, as their kernels are measured to be level. SDPA is slower because it "
    f"moves keys and values {ATTENTIONS['sdpa'].kv_passes:g} times and launches {ATTENTIONS['sdpa'].launches} kernels "
    f"for each sequence and layer; the time of a launch ({1e6 * LAUNCH_S:g} µs) is the lower end of what is reported.",
)
HARDWARE = _experiment(
    "hardware",
    "Hardware",
    "An A100, an RTX 4090 and an RTX 3090 serve 1717, 1195 and 1088 requests.",
    SERVED_HARDWARE,
    partial(served_findings, SERVED_HARDWARE),
    "Profiles are rooflines of published bandwidth and FLOP/s, in which the cards of 24 GB differ by "
    f"{100 * (_of('rtx-3090').weight_s / _of('rtx-4090').weight_s - 1):.0f} % in the weight read and hold "
    f"{_of('rtx-4090').kv_tokens} and {_of('rtx-3090').kv_tokens} tokens, the A100 {_of('a100-80g').kv_tokens}. "
    "Stake follows the share of that in use, which tells the A100 from the two but hardly one of them from the other.",
)
