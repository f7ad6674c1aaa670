"""The course of markups and prices in a market."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.protocol import OUTPUT
from wwwserve.agents.rules import Policy
from wwwserve.envs.batch import MarketBatch
from wwwserve.eval.deviations import Lane, Watch, play
from wwwserve.eval.play import Run

INTERVAL_S = 5.0


class Course(NamedTuple):
    """What markets of one scenario look like at times [T] while requests arrive, one market a row [S].

    Where a provider is offline, its numbers are NaN.
    """

    time_s: NDArray[np.float64]  # [T]
    markup: NDArray[np.float64]  # [S, T, N] in force
    price: NDArray[np.float64]  # [S, T, N] of output by the tariff in force, credits per 1000 tokens


class Recorder:
    """Takes samples of every market of a batch as its clock passes them."""

    def __init__(self, count: int, time_s: NDArray[np.float64], providers: int) -> None:
        self.time_s = time_s
        self.markup = np.full((count, time_s.size, providers), np.nan)
        self.price = np.full((count, time_s.size, providers), np.nan)
        self._taken = np.zeros(count, np.int64)

    def __call__(self, batch: MarketBatch) -> None:
        """Sees the batch after each step: at a time that this step passed, it stood as it does now, but for adverts
        that are made at the end of the step."""
        passed = np.searchsorted(self.time_s, batch.now_s, side="right")
        providers = batch.markets.providers
        for b in np.flatnonzero(passed > self._taken):
            span = slice(self._taken[b], passed[b])
            online = providers["online"][b] == 1
            self.markup[b, span] = np.where(online, providers["markup"][b], np.nan)
            self.price[b, span] = np.where(online, providers["tariff"][b, :, OUTPUT], np.nan)
            self._taken[b] = passed[b]


def courses(policy: Policy, lanes: Sequence[Lane], threads: int) -> tuple[list[Run], Course]:
    """Run markets of one scenario to their ends and keep the course of each."""
    scenario = lanes[0].planned.scenario
    time_s = np.arange(0.0, scenario.duration_s, INTERVAL_S)
    recorders: list[Recorder] = []

    def watching(count: int) -> Watch:
        recorders.append(Recorder(count, time_s, len(scenario.providers)))
        return recorders[-1]

    runs = play(policy, lanes, threads, watching)
    return runs, Course(
        time_s,
        np.concatenate([each.markup for each in recorders]),
        np.concatenate([each.price for each in recorders]),
    )


def mean_there(values: NDArray[np.float64]) -> float:
    """Mean of what is not NaN; NaN if there is nothing."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else np.nan
