"""The random numbers of kernels: their law, their independence, and the values that every saved seed depends on."""

import numpy as np
import pytest
from scipy import stats

from wwwserve.agents.generator import GENERATOR_WORDS, make_generators, uniform
from wwwserve.agents.kernel import Floats, Ints

# The state and first outputs of xorwow as its author gives it (Marsaglia, "Xorshift RNGs", 2003).
MARSAGLIA = [123456789, 362436069, 521288629, 88675123, 5783321, 6615241]


def draw(generator: Ints, count: int) -> Floats:
    return np.array([uniform(generator) for _ in range(count)])


def xorwow(state: list[int]) -> int:
    """One step in arbitrary-precision integers; advances `state`."""
    x, y, z, w, v, d = state
    t = x ^ (x >> 2)
    new = (v ^ (v << 4) ^ t ^ (t << 1)) % 2**32
    d = (d + 362437) % 2**32
    state[:] = [y, z, w, v, new, d]
    return (new + d) % 2**32


def test_it_is_xorwow() -> None:
    generator, state = np.array(MARSAGLIA), list(MARSAGLIA)
    assert xorwow(list(MARSAGLIA)) == 246875399
    for _ in range(1000):
        assert uniform(generator) == (xorwow(state) + 0.5) / 2**32
        assert generator.tolist() == state


def test_first_values_of_a_seed_are_pinned() -> None:
    values = [draw(row, 2).tolist() for row in make_generators(7, 2)]
    assert values == [[0.09594923595432192, 0.024463188485242426], [0.3940080077154562, 0.37249553913716227]]
    assert uniform(make_generators((7, 1))[0]) != uniform(make_generators(7)[0])


def test_values_are_uniform_and_inside_the_open_interval() -> None:
    values = draw(make_generators(1)[0], 40_000)
    assert values.min() > 0 and values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    pairs = np.histogram2d(values[:-1:2], values[1::2], bins=10, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


@pytest.mark.parametrize("edge", [0, 2**32 - 1])
def test_the_ends_are_never_reached(edge: int) -> None:
    """A state whose next sum is the smallest or largest word."""
    state = [1, 2, 3, 4, 5, 0]
    new = (xorwow(list(state)) - 362437) % 2**32
    state[5] = (edge - new - 362437) % 2**32
    assert uniform(np.array(state)) == (edge + 0.5) / 2**32


def test_generators_of_one_seed_are_independent() -> None:
    generator = make_generators(3, 8)
    assert generator.shape == (8, GENERATOR_WORDS) and generator.dtype == np.int64
    values = np.array([draw(row, 5000) for row in generator])
    bound = 4.5 / np.sqrt(5000)
    for lag in (0, 1, 5):
        r = np.corrcoef(values[:, : 5000 - lag], values[:, lag:])[:8, 8:]
        if lag == 0:
            np.testing.assert_allclose(np.diag(r), 1.0)
            r = r - np.eye(8)
        assert np.abs(r).max() < bound


def test_each_generator_advances_alone() -> None:
    generator = make_generators(5, 3)
    before = generator.copy()
    uniform(generator[1])
    np.testing.assert_array_equal(generator[[0, 2]], before[[0, 2]])
    assert (generator[1] != before[1]).any()


def test_no_generator_can_get_stuck_at_zero() -> None:
    assert (make_generators(0, 200)[:, 0] % 2 == 1).all()
