"""What another markup would earn: pairs of whole markets that differ in markups alone.

Both markets of a pair have the same arrivals and random numbers, and all play the same policy, or all but one another
one. In one market of the two that one posts markups a notch above, or below, those that its policy chooses. The
difference in its profit is what that earns by itself, with all that follows from it: buyers who are put off today wait,
and pay more tomorrow. Credit to single sales misses that. Were several moved at a time, each would find rivals whose
prices shake, and learn to collude.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.policy.forward import LearnedPolicy
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import ADVERT_DUE, Views, make_views
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import Kind
from wwwserve.envs.state import MarketPlan
from wwwserve.train.rollout import worth_per_s

KEPT = 0.2  # share of the adverts that are learned from


class Notches(NamedTuple):
    """Adverts of providers whose markups were moved, [M] each."""

    views: Views
    markup: NDArray[np.int64]  # the policy's choice
    moved: NDArray[np.int64]  # the markup that was posted instead
    gain: NDArray[np.float32]  # what that brought in profit, as a share of the value of own arrivals


def play_pairs(
    policy: LearnedPolicy, plans: Iterator[tuple[Kind, MarketPlan]], pairs: int, rng: np.random.Generator,
    others: LearnedPolicy | None = None,
) -> Notches:  # fmt: skip
    """Play `pairs` pairs of markets, to their ends, and keep some of the adverts of either market. The one whose
    markups are moved plays `policy`, and so do the others, unless they play `others`."""
    drawn = [next(plans)[1] for _ in range(pairs)]
    batch = MarketBatch([planned for planned in drawn for _ in (0, 1)])
    actions = batch.actions()
    rows = np.arange(2 * pairs)
    mover = np.repeat([rng.integers(len(planned.profiles)) for planned in drawn], 2)
    notch = np.where(rows % 2, np.repeat(rng.choice([-1, 1], pairs), 2), 0)
    seen: list[tuple[NDArray[np.int64], Views, NDArray[np.int64]]] = []
    moves = np.arange(batch.providers) == mover[:, None]
    while not batch.over.all():
        if others is None:
            policy.decide(batch.views, batch.active, batch.uniforms, actions)
        else:
            policy.decide(batch.views, batch.active & moves, batch.uniforms, actions)
            others.decide(batch.views, batch.active & ~moves, batch.uniforms, actions)
        due = batch.active[rows, mover] & (batch.views.me[rows, mover, ADVERT_DUE] > 0.5)
        chosen = actions.markup[rows, mover].astype(np.int64)
        kept = np.nonzero(due & (rng.random(rows.size) < KEPT))[0]
        if kept.size:
            seen.append((kept, Views(*(array[kept, mover[kept]] for array in batch.views)), chosen[kept]))
        actions.markup[rows[due], mover[due]] = np.clip(chosen + notch, 0, MARKUPS.size - 1)[due]
        batch.step(actions)
    profit = batch.markets.providers["profit"][rows, mover]
    value = np.array([worth_per_s(planned) * planned.scenario.duration_s for planned in drawn])
    gain = ((profit[1::2] - profit[0::2]) / np.maximum(value, 1e-9)).astype(np.float32)
    market, markup = (np.concatenate([np.zeros(0, np.int64), *(each[k] for each in seen)]) for k in (0, 2))
    views = Views(*(np.concatenate(arrays) for arrays in zip(make_views(0), *(each[1] for each in seen), strict=True)))
    moved = np.clip(markup + notch[market // 2 * 2 + 1], 0, MARKUPS.size - 1)
    inside = moved != markup  # else at an end of the grid
    return Notches(Views(*(array[inside] for array in views)), markup[inside], moved[inside], gain[market // 2][inside])
