"""Generalised advantage estimation over decisions at irregular times."""

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.kernel import kernel


@kernel
def advantages(reward, elapsed_s, decided, value, cut, cut_value, last_value, gamma, lam, advantage):
    """Advantages of the decisions of a rollout, after Schulman et al. 2016 (arXiv 1506.02438), in continuous time.

    A provider decides at some of the T steps of a market, and the reward between two decisions belongs to the first.
    Discounts are per second: gamma to the power of the time between decisions, and likewise lambda.

    reward [T, B, N], elapsed_s [T, B]; decided [T, B, N] bool; value [T, B, N], read where `decided`; cut [T, B]: the
    market was cut off at the end of that step, with `cut_value` [T, B, N] for what would have followed; last_value
    [B, N] for what follows the last step. Writes `advantage` [T, B, N] where `decided`.
    """
    steps, markets, providers = reward.shape
    for b in range(markets):
        for n in range(providers):
            following_value = last_value[b, n]
            following_advantage = 0.0
            paid = 0.0
            discount = 1.0
            memory = 1.0
            for k in range(steps):
                t = steps - 1 - k
                if cut[t, b]:
                    following_value, following_advantage = cut_value[t, b, n], 0.0
                    paid, discount, memory = 0.0, 1.0, 1.0
                g = gamma ** elapsed_s[t, b]
                paid = reward[t, b, n] + g * paid
                discount *= g
                memory *= lam ** elapsed_s[t, b]
                if decided[t, b, n]:
                    delta = paid + discount * following_value - value[t, b, n]
                    following_advantage = delta + discount * memory * following_advantage
                    following_value = value[t, b, n]
                    advantage[t, b, n] = following_advantage
                    paid, discount, memory = 0.0, 1.0, 1.0


def estimate(
    reward: NDArray[np.float32],
    elapsed_s: NDArray[np.float64],
    decided: NDArray[np.bool_],
    value: NDArray[np.float32],
    cut: NDArray[np.bool_],
    cut_value: NDArray[np.float32],
    last_value: NDArray[np.float32],
    gamma: float,
    lam: float,
) -> NDArray[np.float32]:
    """`advantages` [T, B, N], zero where nothing was decided."""
    advantage = np.zeros_like(value)
    advantages(reward, elapsed_s, decided, value, cut, cut_value, last_value, gamma, lam, advantage)
    return advantage
