"""Random numbers for kernels: Marsaglia's xorwow ("Xorshift RNGs", JSS 2003), the same bits compiled or not.

A generator is a vector of six int64 words, each holding 32 bits. Kernels take it as an argument and advance it.
"""

import numpy as np

from wwwserve.agents.kernel import Ints, kernel

GENERATOR_WORDS = 6
UNIFORMS_PER_DECISION = 4  # uniforms that a policy gets with each request
_MASK = np.int64(0xFFFFFFFF)


def make_generators(seed: int | tuple[int, ...], count: int = 1) -> Ints:
    """`count` independent generators, [count, GENERATOR_WORDS], from a non-negative seed."""
    state = np.random.SeedSequence(seed).generate_state(count * GENERATOR_WORDS)
    words = state.astype(np.int64).reshape(count, GENERATOR_WORDS)
    words[:, 0] |= 1  # the shift register must not be all zero
    return words


@kernel
def uniform(generator: Ints) -> float:
    """The next number in (0, 1)."""
    t = generator[0] ^ (generator[0] >> 2)
    generator[0] = generator[1]
    generator[1] = generator[2]
    generator[2] = generator[3]
    generator[3] = generator[4]
    generator[4] = generator[4] ^ ((generator[4] << 4) & _MASK) ^ t ^ ((t << 1) & _MASK)
    generator[5] = (generator[5] + 362437) & _MASK
    return float((((generator[4] + generator[5]) & _MASK) + 0.5) / 4294967296.0)
