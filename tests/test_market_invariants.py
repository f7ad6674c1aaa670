"""What must hold at every step of every market, whatever providers do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from market_checker import Checker
from markets import by_rule, random_market, randomly, run

from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import KINDS, sample


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), illegal=st.sampled_from([0.0, 0.3]))
def test_everything_adds_up_in_random_markets(seed: int, illegal: float) -> None:
    rng = np.random.default_rng(seed)
    batch = MarketBatch([random_market(rng) for _ in range(3)], [seed, seed + 1, seed + 2])
    checkers = [Checker(batch, b) for b in range(batch.count)]
    for checker in checkers:
        checker.check()
    decide = randomly(rng, illegal)
    for _ in run(batch, decide):
        for checker in checkers:
            if not checker.over:
                checker.check()


@pytest.mark.parametrize("kind", KINDS)
def test_everything_adds_up_in_training_markets(kind: str) -> None:
    rng = np.random.default_rng(5)
    batch = MarketBatch([sample(kind, rng, 150.0), sample(kind, rng, 150.0)], [1, 2])  # type: ignore[arg-type]
    checkers = [Checker(batch, b) for b in range(batch.count)]
    for k, _ in enumerate(run(batch, by_rule("random"))):
        if k % 5 == 0:
            for checker in checkers:
                checker.check()
