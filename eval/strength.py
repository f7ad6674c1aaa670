"""Answer quality as Bradley-Terry strengths, fitted to published win rates: `wwwserve strength`.

A duel is decided by the majority of its judges, each of whom prefers an answer with the chance that the two strengths
give. A published win rate is taken as that of a round robin in which everyone meets each of the others equally often.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wwwserve.agents.arguments import UsageError, parse_args, refuse
from wwwserve.agents.hardware import MODELS, QUANTIZATIONS
from wwwserve.eval.metrics import MeanCi

PROG = "wwwserve strength"
JUDGES = 3
# Reported by WWW.Serve (arXiv 2603.20661), from the strongest to the weakest.
MODEL_SIZE = {"qwen3-8b": 0.57, "qwen3-4b": 0.53, "qwen3-0.6b": 0.39}
QUANTIZATION = {"fp8wo": 0.54, "int4wo-128": 0.49, "int4wo-32": 0.47}


def majority(p: float, judges: int = JUDGES) -> float:
    """Chance that most of an odd number of judges prefer an answer that each prefers with chance `p`."""
    if judges % 2 == 0:
        raise ValueError(f"{judges} judges can tie, expected an odd number")
    return sum(math.comb(judges, k) * p**k * (1 - p) ** (judges - k) for k in range(judges // 2 + 1, judges + 1))


def win_rates(strengths: ArrayLike, judges: int = JUDGES) -> NDArray[np.float64]:
    """Share of its duels that each of `strengths` [N] wins in a round robin, [N]."""
    s = np.asarray(strengths, np.float64)
    wins = [[majority(1 / (1 + math.exp(b - a)), judges) for b in s] for a in s]
    return np.asarray((np.sum(wins, axis=1) - 0.5) / (s.size - 1), np.float64)


def fit(rates: ArrayLike, judges: int = JUDGES) -> NDArray[np.float64]:
    """Strengths [N], their mean 0, whose `win_rates` come nearest to `rates` [N].

    The rates of a round robin have a mean of one half; what given ones deviate from that, from rounding or from ties,
    is taken off all alike. By fixed-point iteration, to 1e-12.
    """
    target = np.asarray(rates, np.float64)
    if not ((target > 0) & (target < 1)).all():
        raise ValueError(f"win rates must be between 0 and 1, got {target.tolist()}")
    target = target - target.mean() + 0.5
    strengths = np.zeros(target.size)
    for _ in range(100_000):
        if np.abs(strengths).max() > 100:
            break
        gap = target - win_rates(strengths, judges)
        if np.abs(gap).max() < 1e-12:
            return np.asarray(strengths - strengths.mean(), np.float64)
        strengths = strengths + 2.0 * gap
    raise ValueError(f"no strengths give the win rates {target.tolist()}")


def model_strengths() -> dict[str, float]:
    """Fitted strengths of the models whose win rates are published."""
    return dict(zip(MODEL_SIZE, fit(list(MODEL_SIZE.values())).tolist(), strict=True))


def quantization_strengths() -> dict[str, float]:
    """Fitted strengths of the quantizations whose win rates are published, that of fp8 being 0."""
    fitted = fit(list(QUANTIZATION.values()))
    return dict(zip(QUANTIZATION, (fitted - fitted[0]).tolist(), strict=True))


def wilson(wins: int, duels: int, z: float = 1.96) -> MeanCi:
    """Middle and half-width of Wilson's 95 % interval of a share; NaN without duels."""
    if duels == 0:
        return math.nan, math.nan
    p, weight = wins / duels, 1 + z * z / duels
    half = z * math.sqrt(p * (1 - p) / duels + z * z / (4 * duels * duels)) / weight
    return (p + z * z / (2 * duels)) / weight, half


@dataclass
class Args:
    """Print published win rates of models, the strengths fitted to them and those in the catalogue."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    try:
        parse_args(Args, PROG, argv)
    except UsageError as error:
        return refuse(PROG, error)
    stored = {**{k: v.strength for k, v in MODELS.items()}, **{k: v.strength for k, v in QUANTIZATIONS.items()}}
    print("                published  fitted rate  strength  in the catalogue")
    for published, strengths in ((MODEL_SIZE, model_strengths()), (QUANTIZATION, quantization_strengths())):
        for (name, rate), won in zip(published.items(), win_rates(list(strengths.values())).tolist(), strict=True):
            print(f"{name:<15} {rate:9.2f} {won:12.4f} {strengths[name]:9.4f} {stored[name]:17.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
