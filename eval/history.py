"""The course of a run: what providers own and run, sampled over time, and how its duels ended."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.protocol import A_WINS, MICRO, STAKED, TIE, duel_outcome
from wwwserve.agents.rules import Policy
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.oracle import Oracle
from wwwserve.envs.scenario import Scenario
from wwwserve.envs.state import JUDGED, SERVED_FOR_PEERS
from wwwserve.eval.play import Run, chunks, run


class Duel(NamedTuple):
    """A duel that was judged, by the places of its executors among the providers."""

    winner: int
    loser: int


class History(NamedTuple):
    """One run at `samples` times [T], `interval_s` apart from 0 on; after its end it stays as it ended."""

    outcome: Run
    credits: NDArray[np.float64]  # [T, N] free, staked and in escrow
    stake: NDArray[np.float64]  # [T, N] credits
    running: NDArray[np.int64]  # [T, N] requests on the engine
    served: NDArray[np.int64]  # [N] requests of others
    judged: NDArray[np.int64]  # [N] duels of others
    duels: list[Duel]  # in the order in which they began, ties left out
    ties: int


class _Recorder:
    """Takes samples of every market of a batch as its clock passes them."""

    def __init__(self, samples: int, interval_s: float) -> None:
        self.samples, self.interval_s = samples, interval_s
        self.batch: MarketBatch | None = None

    def __call__(self, batch: MarketBatch) -> None:
        accounts, engines = batch.markets.accounts, batch.markets.engines
        if self.batch is None:
            self.batch = batch
            shape = (batch.count, self.samples, batch.providers)
            self.credits, self.stake, self.running = np.zeros(shape), np.zeros(shape), np.zeros(shape, np.int64)
            self.taken = np.zeros(batch.count, np.int64)
        # A sample shows the market as it stands at the first step that ends at its time or after it.
        passed = np.floor(batch.now_s / self.interval_s + 1e-9).astype(np.int64) + 1
        until = np.where(batch.over, self.samples, np.minimum(passed, self.samples))
        for b in np.flatnonzero(until > self.taken):
            span = slice(self.taken[b], until[b])
            self.credits[b, span] = accounts[b].sum(axis=-1) / MICRO
            self.stake[b, span] = accounts[b, :, STAKED] / MICRO
            self.running[b, span] = engines["running"][b]
            self.taken[b] = until[b]


def record(
    scenario: Scenario, policy: Policy | Oracle, seeds: Sequence[int], *, samples: int, interval_s: float
) -> list[History]:
    """Run `policy` for every provider once with each seed and keep the course of it; in the order of the seeds."""
    found: list[History] = []
    n = len(scenario.providers)
    for plans in chunks(scenario, seeds):
        recorder = _Recorder(samples, interval_s)
        runs = run(plans, policy, 1, recorder)
        batch = recorder.batch
        assert batch is not None  # a market takes at least one step
        counts = batch.markets.providers["counts"]
        for b, outcome in enumerate(runs):
            duels, ties = _duels(batch, b)
            found.append(
                History(
                    outcome=outcome,
                    credits=recorder.credits[b, :, :n],
                    stake=recorder.stake[b, :, :n],
                    running=recorder.running[b, :, :n],
                    served=counts[b, :n, SERVED_FOR_PEERS].copy(),
                    judged=counts[b, :n, JUDGED].copy(),
                    duels=duels,
                    ties=ties,
                )
            )
    return found


def _duels(batch: MarketBatch, b: int) -> tuple[list[Duel], int]:
    """The duels of market b that were settled, and how many of them tied."""
    found: list[Duel] = []
    ties = 0
    executor = batch.markets.requests["executor"][b]
    for duel in batch.markets.duels[b, : batch.markets.market["n_duels"][b]]:
        if duel["void"] or duel["n_judges"] == 0 or duel["pending"] > 0:
            continue
        outcome = duel_outcome(duel["votes"][: duel["n_judges"]])
        if outcome == TIE:
            ties += 1
            continue
        first, second = int(executor[duel["first"]]), int(executor[duel["second"]])
        found.append(Duel(first, second) if outcome == A_WINS else Duel(second, first))
    return found, ties


def windowed(values: NDArray[np.float64], time_s: NDArray[np.float64], edges_s: Sequence[float]) -> list[float]:
    """Mean of the finite `values` [R] in each window between two edges, by their `time_s` [R]; NaN for an empty one."""
    place = np.searchsorted(np.asarray(edges_s), time_s, side="right") - 1
    finite = np.isfinite(values)
    means = []
    for k in range(len(edges_s) - 1):
        inside = values[finite & (place == k)]
        means.append(float(inside.mean()) if inside.size else math.nan)
    return means
