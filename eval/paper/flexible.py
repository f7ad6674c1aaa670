"""What a provider's own settings do: its stake, how often it accepts, how often all offload."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray

from wwwserve.agents.decision import Actions
from wwwserve.agents.kernel import Bools, Floats
from wwwserve.agents.rules import Policy, Rule
from wwwserve.agents.view import Views
from wwwserve.envs.oracle import Oracle
from wwwserve.envs.scenario import Scenario
from wwwserve.envs.scenario import load as load_scenario
from wwwserve.eval import figures
from wwwserve.eval.compare import measures
from wwwserve.eval.history import record
from wwwserve.eval.metrics import mean_ci
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
from wwwserve.eval.play import rollout
from wwwserve.eval.policies import LEARNED

STAKE, ACCEPTANCE, OFFLOAD = "paper/stake", "paper/acceptance", "paper/alternating-queue"
ACCEPT = (0.25, 0.5, 0.75, 1.0)
OFFLOADS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
INTERVAL_S = 20.0
_DRAWN = ((":", "x"), ("-.", "^"), ("--", "s"), ("-", "o"))


class Mixed:
    """A policy in which each provider has its own; provider i decides with `policies[i]`."""

    def __init__(self, name: str, policies: Sequence[Policy]) -> None:
        self.name, self.policies = name, list(policies)

    def decide(self, views: Views, active: Bools, uniforms: Floats, actions: Actions) -> None:
        """See `agents.rules.Policy.decide`; `active` is [B, N]."""
        for i, policy in enumerate(self.policies):
            own = np.zeros_like(active)
            own[:, i] = active[:, i]
            policy.decide(views, own, uniforms, actions)


def run(seeds: Sequence[int]) -> Tree:
    """Running requests over time by stake and by acceptance, SLO AUC by offload frequency."""
    staked, accepting, scenario = (load_scenario(name) for name in (STAKE, ACCEPTANCE, OFFLOAD))
    result: Tree = {"stake": {}, "stakes": [p.initial_stake for p in staked.providers[1:]], "accept": list(ACCEPT)}
    chosen = contenders(staked, seeds)
    result["stake_best_rule"] = chosen[BEST_RULE].name
    for name, policy in chosen.items():
        result["stake"][name] = _course(staked, policy, seeds)
    mixed = Mixed(PUBLISHED, [Rule(PUBLISHED), *(Rule(PUBLISHED, {"accept": each}) for each in ACCEPT)])
    result["acceptance"] = _course(accepting, mixed, seeds)

    chosen = contenders(scenario, seeds)
    result["offload_best_rule"] = chosen[BEST_RULE].name
    result["offload"] = [[x, *_slo_auc(scenario, Rule(PUBLISHED, {"offload": x}), seeds)] for x in OFFLOADS]
    result["levels"] = {name: _slo_auc(scenario, chosen[name], seeds) for name in (BEST_RULE, LEARNED)}
    return result


def _slo_auc(scenario: Scenario, policy: Policy | Oracle, seeds: Sequence[int]) -> list[float | None]:
    return pair(mean_ci([each["slo_auc"] for each in measures(rollout(scenario, policy, seeds), scenario)]))


def _course(scenario: Scenario, policy: Policy | Oracle, seeds: Sequence[int]) -> Tree:
    """Requests that the peers of the first provider run, over time and in the mean, and their shares of its work."""
    samples = int(scenario.duration_s / INTERVAL_S) + 1
    histories = record(scenario, policy, seeds, samples=samples, interval_s=INTERVAL_S)
    running = np.array([each.running[:, 1:] for each in histories], np.float64)  # [S, T, N - 1]
    served: NDArray[np.float64] = np.array([each.served[1:] for each in histories], np.float64)
    return {
        "running": running.mean(axis=0).T.tolist(),
        "mean": pairs(running.mean(axis=1)),
        "share": pairs(served / served.sum(axis=1, keepdims=True)),
    }


def draw(data: Tree, out: Path) -> list[Path]:
    """Three panels: running requests by stake and by acceptance over time, SLO AUC by offload frequency."""
    with plt.rc_context(figures.SETTINGS):
        figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.2), layout="constrained")
        for panel, course, labels, title in (
            (axes[0], data["stake"][PUBLISHED], [f"stake {x:g}" for x in data["stakes"]], "by stake"),
            (axes[1], data["acceptance"], [f"accepts {100 * x:.0f} %" for x in data["accept"]], "by acceptance"),
        ):
            for series, label, (line, marker) in zip(course["running"], labels, _DRAWN, strict=True):
                time_s = INTERVAL_S * np.arange(len(series))
                panel.plot(time_s, series, ls=line, marker=marker, markevery=8, color="black", mfc="white", label=label)
            panel.set_xlabel("time (s)")
            panel.set_ylabel("requests running on the node")
            panel.set_title(f"running requests {title}")
            panel.set_ylim(0, 1.35 * max(map(max, course["running"])))
            panel.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
        x, mean, half = np.array(data["offload"], np.float64).T
        style = figures.style_of(PUBLISHED, [PUBLISHED])
        axes[2].errorbar(x, mean, yerr=np.nan_to_num(half), capsize=3, **style)
        for name, (level, _) in data["levels"].items():
            axes[2].plot(x[[0, -1]], [level, level], **figures.style_of(name, list(data["levels"])))
        axes[2].set_xlabel("offload frequency")
        axes[2].set_ylabel("SLO AUC")
        axes[2].set_title("attainment by offload frequency")
        axes[2].legend(frameon=False, fontsize=8)
        return figures.save(figure, out, "policy")


def tables(data: Tree) -> list[Table]:
    """Shares of delegated work by stake and acceptance, SLO AUC by offload frequency."""
    names = {PUBLISHED: "`www_serve`", BEST_RULE: f"best rule (`{data['stake_best_rule']}`)", LEARNED: "learned"}
    total = sum(data["stakes"])
    stake = [["in proportion", *(f"{x / total:.3f}" for x in data["stakes"])]]
    stake += [[names[name], *(shown(x, 3) for x in course["share"])] for name, course in data["stake"].items()]
    accept = [
        ["share of what peers run", *(shown(x, 3) for x in data["acceptance"]["share"])],
        ["requests running, mean", *(shown(x, 2) for x in data["acceptance"]["mean"])],
    ]
    offload = [
        [
            "SLO AUC",
            *(shown(x[1:], 3) for x in data["offload"]),
            *(shown(data["levels"][name], 3) for name in (BEST_RULE, LEARNED)),
        ]
    ]
    levels = [f"best rule (`{data['offload_best_rule']}`)", "learned"]
    return [
        Table(["share of what peers run, by stake", *(f"{x:g}" for x in data["stakes"])], stake),
        Table(["`www_serve`, by acceptance", *(f"{x:g}" for x in data["accept"])], accept),
        Table(["`www_serve`, by offload frequency", *(f"{x[0]:g}" for x in data["offload"]), *levels], offload),
    ]


def lines(data: Tree) -> list[Sequence[str]]:
    """Running requests by stake and acceptance, attainment by offloading."""
    stake, accept = data["stake"][PUBLISHED]["mean"], data["acceptance"]["mean"]
    return [
        (
            f"requests running at stakes of {', '.join(f'{x:g}' for x in data['stakes'])}",
            "more with more stake",
            ", ".join(f"{x[0]:.1f}" for x in stake),
        ),
        (
            f"requests running at acceptance of {', '.join(f'{x:g}' for x in data['accept'])}",
            "more with more acceptance",
            ", ".join(f"{x[0]:.1f}" for x in accept),
        ),
        (
            f"SLO AUC at offload frequencies of {', '.join(f'{x[0]:g}' for x in data['offload'])}",
            "more with more offloading",
            ", ".join(f"{x[1]:.3f}" for x in data["offload"]),
        ),
    ]


POLICY = Experiment(
    "policy",
    "Flexible policy: stake, acceptance, offloading",
    (STAKE, ACCEPTANCE, OFFLOAD),
    "policy",
    run,
    draw,
    tables,
    lines,
)
