"""The fit of `agents.hardware.Profile` to measured times of iterations and of first tokens.

The coefficients are nonnegative, with the least relative errors, in which loads far off count less than squared.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from wwwserve.agents.hardware import KNOTS, iteration_s
from wwwserve.agents.kernel import Bools, Floats

FLOOR = 1e-12  # s; a profile has no zeros
AFTER_CACHED = "prefill after cached"  # a kind of load
CLOSE = 0.02  # relative error from which on it counts as such, no longer squared


class CalibrationError(RuntimeError):
    """The engine cannot be measured; the message says why."""


class Sample(NamedTuple):
    """A measured load."""

    decoding: float  # sequences that decode all the while, or that a prompt joins
    kv_tokens: float  # their context, in total and on average
    prefill_tokens: float  # the prompt that was computed; 0 where iterations without prefill were timed
    time_s: float  # of an iteration; of a prompt alone, to the first token
    held_out: bool = False  # not fitted
    cached: float = 0.0  # tokens before that prompt, which attends to them


def _row(sample: Sample) -> tuple[float, ...]:
    """(decoding, KV tokens, prompt, tokens cached before it, s)."""
    return (*sample[:3], sample.cached, sample.time_s)


class Errors(NamedTuple):
    """Relative errors of a fit, over so many loads."""

    loads: int
    mean: float
    p90: float


def nonnegative(columns: Floats, target: Floats) -> Floats:
    """The x of no negative element with the least |columns x - target|² (Lawson and Hanson's active sets)."""
    scale = np.maximum(np.sqrt((columns**2).sum(axis=0)), FLOOR)
    scaled = columns / scale
    found = np.zeros(scaled.shape[1])
    free = np.zeros(len(found), bool)
    for _ in range(10 * len(found)):
        gradient = np.where(free, 0.0, scaled.T @ (target - scaled @ found))
        if gradient.max() <= 1e-10 * max(1.0, float(np.abs(target).max())):
            break
        free[gradient.argmax()] = True
        while True:
            best = np.zeros(len(found))
            best[free] = np.linalg.lstsq(scaled[:, free], target, rcond=None)[0]
            below = free & (best <= 0)
            if not below.any():
                break
            step = float((found[below] / (found[below] - best[below])).min())
            found += step * (best - found)
            free &= found > 1e-15
            found[~free] = 0.0
        found = best
    made: Floats = found / scale
    return made


def robust(columns: Floats, target: Floats) -> Floats:
    """As `nonnegative`, with errors beyond `CLOSE` counted as they are: least squares, weighted anew until it is so."""
    weights = np.ones(len(target))
    for _ in range(20):
        found = nonnegative(columns * weights[:, None], target * weights)
        weights = np.maximum(np.abs(columns @ found - target), CLOSE) ** -0.5
    return found


class Fit(NamedTuple):
    """Coefficients of `agents.hardware`, and what a request takes beside iterations, s."""

    coefficients: tuple[float, float, float, float, float]  # the first five
    seq_tokens: float
    per_pair_s: float
    overhead_s: float
    batch_s: tuple[float, ...] = ()

    def times_s(self, rows: Floats) -> Floats:
        """Of iterations [n, (decoding, KV tokens, prompt, cached before it, ...)]; where nothing decodes, of first
        tokens."""
        five = np.array(self.coefficients)
        found = []
        for decoding, kv_tokens, prompt, cached in rows[:, :4].tolist():
            pairs_s = self.per_pair_s * prompt * (cached + prompt / 2)
            time_s = iteration_s(five, decoding, kv_tokens, prompt, self.seq_tokens, pairs_s)
            if prompt == 0 and self.batch_s:
                time_s += float(np.interp(decoding, 2.0 ** np.arange(len(self.batch_s)), self.batch_s))
            found.append(time_s + self.overhead_s * (decoding == 0))
        return np.array(found)


def fit(samples: Sequence[Sample]) -> Fit:
    """The fit to the loads that are not held out.

    Which prompts are short enough to hide under the weight read is found by trying, from each length on. Raises
    CalibrationError where there are not two numbers of requests that decode at once, and two lengths of prompt.
    """
    rows = np.array([_row(sample) for sample in samples if not sample.held_out])
    decode, alone = rows[:, 2] == 0, (rows[:, 2] > 0) & (rows[:, 0] == 0) & (rows[:, 3] == 0)
    if np.unique(rows[decode, 0]).size < 2:
        raise CalibrationError(f"a fit needs at least two different numbers of requests at once, got {rows[decode, 0]}")
    lengths = np.unique(rows[alone, 2])
    if lengths.size < 2:
        raise CalibrationError(f"a fit needs at least two lengths of prompt, got {lengths}")
    best, least = None, np.inf
    for shortest in lengths[:-1]:
        bound = rows[:, 2] >= shortest  # by compute
        for _ in range(10):
            found = _fit(rows, bound)
            five = np.array(found.coefficients)
            computed_s = (
                five[3]
                + five[4] * (rows[:, 2] + found.seq_tokens * rows[:, 0])
                + found.per_pair_s * rows[:, 2] * (rows[:, 3] + rows[:, 2] / 2)
            )
            is_bound = ~decode & (computed_s > five[0])
            if (is_bound == bound).all():
                break
            bound = is_bound
        error = float(np.abs(found.times_s(rows) / rows[:, 4] - 1.0).sum())
        if error < least:
            best, least = found, error
    assert best is not None
    return best._replace(batch_s=_off_line(best, rows[decode]))


def _off_line(line: Fit, rows: Floats) -> tuple[float, ...]:
    """Medians of what iterations [n, `_row`] of 1, 2, 4, ... sequences take beyond the line."""
    beyond_s = rows[:, 4] - line.times_s(rows)
    found: list[float] = []
    while (at := rows[:, 0] == 2.0 ** len(found)).any() and len(found) < KNOTS:
        found.append(float(np.median(beyond_s[at])))
    return tuple(found)


def _fit(rows: Floats, bound: Bools) -> Fit:
    """The fit to `rows` of which those that are `bound` have their prompts' compute for their first term."""
    decoding, kv_tokens, prompt, cached, time_s = rows.T
    alone, mixed = (prompt > 0) & (decoding == 0), (prompt > 0) & (decoding > 0)
    # Without a hidden prompt, and one that joins others, nothing tells the overhead from the base.
    apart = (alone & ~bound).any() or mixed.any()
    columns = [
        ~bound,
        decoding,
        kv_tokens,
        bound,
        bound * prompt,
        bound * prompt * (cached + prompt / 2),
        alone * apart,
    ]
    columns.append(bound * decoding if mixed.any() else np.zeros(len(rows)))
    x = robust(np.column_stack(columns) / time_s[:, None], np.ones(len(rows)))
    weight_s, per_seq_s, per_kv_token_s, base_s, token_s, pair_s, overhead_s, beside_s = map(float, x)
    token_s = max(token_s, FLOOR)
    seq_tokens = beside_s / token_s if mixed.any() else 1.0
    five = max(weight_s, FLOOR), max(per_seq_s, FLOOR), max(per_kv_token_s, FLOOR), max(base_s, FLOOR), token_s
    return Fit(five, seq_tokens, pair_s, overhead_s)


def errors(found: Fit, samples: Sequence[Sample]) -> dict[str, Errors]:
    """Relative errors of the times that a fit gives, by kind of load."""
    rows = np.array([_row(sample) for sample in samples])
    prefill, beside, held_out = rows[:, 2] > 0, rows[:, 0] > 0, np.array([sample.held_out for sample in samples])
    off = np.abs(found.times_s(rows) / rows[:, 4] - 1.0)
    after = rows[:, 3] > 0
    kinds = {
        "decode": ~prefill, "prefill alone": prefill & ~beside & ~after, AFTER_CACHED: prefill & after,
        "prefill among others": prefill & beside,
    }  # fmt: skip
    return {
        f"{name}, {which}": Errors(int(chosen.sum()), float(off[chosen].mean()), float(np.quantile(off[chosen], 0.9)))
        for name, kind in kinds.items()
        for which, chosen in (("fitted", kind & ~held_out), ("held out", kind & held_out))
        if chosen.any()
    }
