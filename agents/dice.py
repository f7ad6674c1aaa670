"""Random numbers for kernels: Marsaglia's xorwow ("Xorshift RNGs", JSS 2003), the same bits compiled or not.

A generator is a vector of six int64 words, each holding 32 bits. Kernels take it as an argument and advance it.
"""

import numpy as np

from wwwserve.agents.kernel import Ints, kernel

WORDS = 6
DICE_PER_DECISION = 4  # uniforms that a policy gets with each request
_MASK = np.int64(0xFFFFFFFF)


def make_dice(seed: int | tuple[int, ...], count: int = 1) -> Ints:
    """`count` independent generators, [count, WORDS], from a non-negative seed."""
    words = np.random.SeedSequence(seed).generate_state(count * WORDS).astype(np.int64).reshape(count, WORDS)
    words[:, 0] |= 1  # the shift register must not be all zero
    return words


@kernel
def uniform(dice: Ints) -> float:
    """The next number in (0, 1)."""
    t = dice[0] ^ (dice[0] >> 2)
    dice[0] = dice[1]
    dice[1] = dice[2]
    dice[2] = dice[3]
    dice[3] = dice[4]
    dice[4] = dice[4] ^ ((dice[4] << 4) & _MASK) ^ t ^ ((t << 1) & _MASK)
    dice[5] = (dice[5] + 362437) & _MASK
    return float((((dice[4] + dice[5]) & _MASK) + 0.5) / 4294967296.0)
