"""What an experiment is, and what several of them use: the best rule, the load of a scenario, numbers as text."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.hardware import profile
from wwwserve.agents.rules import Policy, Rule
from wwwserve.envs.distribution import capacity_per_s
from wwwserve.envs.oracle import Oracle
from wwwserve.envs.scenario import PoissonTraffic, Scenario
from wwwserve.envs.state import plan
from wwwserve.eval.metrics import MeanCi, mean_ci
from wwwserve.eval.play import scores
from wwwserve.eval.policies import LEARNED, load_policy
from wwwserve.eval.regret import baselines

Tree = dict[str, Any]
"""Numbers by name, as JSON takes them."""

BEST_RULE = "best rule"
PUBLISHED, OPEN = "www_serve", "single"


class Table(NamedTuple):
    """Rows of text under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Experiment(NamedTuple):
    """One figure of the paper: how it is run, drawn and put into numbers."""

    name: str
    title: str
    scenarios: tuple[str, ...]
    data: str
    """Key of its data; figures from the same runs share one."""
    run: Callable[[Sequence[int]], Tree]
    """Its data from runs with these seeds."""
    draw: Callable[[Tree, Path], list[Path]]
    """Draws its data into a folder; the files, PNG and SVG."""
    tables: Callable[[Tree], list[Table]]
    lines: Callable[[Tree], list[Sequence[str]]]
    """Its numbers beside the published ones: what is measured, as published, as it is here."""


class Load(NamedTuple):
    """Requests that come over requests that can be served, in a stretch of a run."""

    market: float
    """Of all users over all nodes that are online."""
    least: float
    """Of the users of one node over what it sustains: the node with the least,"""
    most: float
    """and the node with the most."""


def load_between(scenario: Scenario, from_s: float, until_s: float) -> Load:
    """Load of a scenario of Poisson arrivals and one class; capacity as `envs.distribution.capacity_per_s` has it."""
    rates, capacities = [], []
    for each in scenario.providers:
        rate = 0.0
        if isinstance(each.traffic, PoissonTraffic):
            start_s = 0.0
            for phase in each.traffic.phases:
                shared_s = max(0.0, min(phase.until_s, until_s) - max(start_s, from_s))
                rate += phase.rate_per_s * shared_s / (until_s - from_s)
                start_s = phase.until_s
        engine = profile(
            each.gpu, each.model, each.max_num_seqs, quantization=each.quantization, attention=each.attention
        )
        here_s = sum(max(0.0, min(end, until_s) - max(start, from_s)) for start, end in each.online_s)
        capacity = capacity_per_s(engine, each.lengths.prompt, [(1.0, each.lengths.output)])
        rates.append(rate)
        capacities.append(capacity * here_s / (until_s - from_s))
    own = [rate / capacity for rate, capacity in zip(rates, capacities, strict=True) if rate > 0]
    return Load(sum(rates) / sum(capacities), min(own), max(own))


def rule_scores(scenario: Scenario, seeds: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """The score with each seed of every rule, with its defaults or tuned for a kind of market, by its name."""
    plans = [plan(scenario, seed) for seed in seeds]
    return {rule.name: scores(rule, plans) for rule in baselines()}


def best_of(measured: Mapping[str, NDArray[np.float64]]) -> Policy:
    """The rule with the highest mean."""
    best = max(measured, key=lambda name: float(np.nanmean(measured[name])))
    return next(rule for rule in baselines() if rule.name == best)


def contenders(scenario: Scenario, seeds: Sequence[int]) -> dict[str, Policy | Oracle]:
    """The published policy, the best rule here and the learned policy, by the names that figures give them."""
    return {PUBLISHED: Rule(PUBLISHED), BEST_RULE: best_of(rule_scores(scenario, seeds)), LEARNED: load_policy(LEARNED)}


def pair(values: MeanCi) -> list[float | None]:
    """A mean and its half-width as JSON takes them."""
    return [None if math.isnan(x) else x for x in values]


def pairs(table: Any) -> list[list[float | None]]:
    """`pair` of the mean over the first axis [S, K], for each k."""
    return [pair(mean_ci(column)) for column in np.asarray(table, np.float64).T]


def shown(value: Sequence[float | None], digits: int, sign: str = "") -> str:
    """A mean with its half-width as text."""
    mean, half = value
    if mean is None:
        return "none"
    return f"{mean:{sign}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
