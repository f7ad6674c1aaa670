"""What an experiment is, and what several of them use: policies and how the best rule is found."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agents.rules import Policy, Rule
from envs.oracle import Oracle
from envs.scenario import Scenario
from envs.state import plan
from eval.metrics import MeanCi, mean_ci
from eval.policies import LEARNED, load_policy
from eval.regret import yardsticks
from eval.rollout import scores

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
    published: str
    """What the paper shows, in a sentence."""
    data: str
    """Key of its data; figures from the same runs share one."""
    run: Callable[[Sequence[int]], Tree]
    """Its data from runs with these seeds."""
    draw: Callable[[Tree, Path], list[Path]]
    """Draws its data into a folder; the files, PNG and SVG."""
    tables: Callable[[Tree], list[Table]]
    findings: Callable[[Tree], list[str]]
    """What agrees with the paper and what does not, in sentences with their numbers."""
    why: str
    """What explains it, or limits it."""


def load(name: str) -> Policy | Oracle:
    """A policy by name; `best rule@NAME` names are made by `best_rule`."""
    return load_policy(name)


def best_rule(scenario: Scenario, seeds: Sequence[int]) -> Policy:
    """Of every rule with its defaults or tuned for a kind of market, the one with the highest mean score here."""
    plans = [plan(scenario, seed) for seed in seeds]
    rules = yardsticks()
    means = [float(np.nanmean(scores(rule, plans))) for rule in rules]
    return rules[int(np.argmax(means))]


def contenders(scenario: Scenario, seeds: Sequence[int]) -> dict[str, Policy | Oracle]:
    """The published policy, the best rule here and the learned policy, by the names that figures give them."""
    return {PUBLISHED: Rule(PUBLISHED), BEST_RULE: best_rule(scenario, seeds), LEARNED: load_policy(LEARNED)}


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


def percent(value: Sequence[float | None]) -> str:
    """A share with its half-width, as percentages."""
    return shown([None if x is None else 100 * x for x in value], 1) + " %"


def holds(what: bool, yes: str = "as published", no: str = "not as published") -> str:
    """A verdict."""
    return yes if what else no
