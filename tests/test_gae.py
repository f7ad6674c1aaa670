"""Advantages against sums written out by hand."""

import numpy as np
import pytest

from wwwserve.train.rollout import advantages

GAMMA, LAM = 0.9, 0.8


def run(reward, elapsed_s, decided, value, truncated=None, final_value=None, last_value=0.0):
    """One market, one provider."""
    steps = len(reward)
    shape = (steps, 1, 1)
    return advantages(
        np.array(reward, np.float32).reshape(shape),
        np.array(elapsed_s, np.float64).reshape(steps, 1),
        np.array(decided, np.bool_).reshape(shape),
        np.array(value, np.float32).reshape(shape),
        np.array(truncated or [False] * steps, np.bool_).reshape(steps, 1),
        np.array(final_value or [0.0] * steps, np.float32).reshape(shape),
        np.full((1, 1), last_value, np.float32),
        GAMMA,
        LAM,
    ).ravel()


def test_a_decision_at_every_second_is_the_textbook_formula():
    reward, value, last = [1.0, -2.0, 3.0], [0.5, 0.25, -1.0], 4.0
    delta = [reward[t] + GAMMA * ([*value, last][t + 1]) - value[t] for t in range(3)]
    expected = [sum((GAMMA * LAM) ** (k - t) * delta[k] for k in range(t, 3)) for t in range(3)]
    assert run(reward, [1, 1, 1], [1, 1, 1], value, last_value=last) == pytest.approx(expected, rel=1e-6)


def test_reward_between_decisions_belongs_to_the_one_before():
    got = run([1.0, 2.0, 4.0], [1, 1, 1], [1, 0, 1], [0.5, 99.0, 0.25], last_value=3.0)
    last = 4.0 + GAMMA * 3.0 - 0.25
    first = 1.0 + GAMMA * 2.0 + GAMMA**2 * 0.25 - 0.5 + (GAMMA * LAM) ** 2 * last
    assert got[[0, 2]] == pytest.approx([first, last], rel=1e-6)
    assert got[1] == 0.0


def test_rounds_at_the_same_instant_are_not_discounted():
    got = run([1.0, 2.0], [0, 0.5], [1, 1], [0.0, 0.0], last_value=2.0)
    last = 2.0 + GAMMA**0.5 * 2.0
    assert got == pytest.approx([1.0 + last, last], rel=1e-6)


def test_a_truncation_bootstraps_from_what_would_have_followed_and_not_from_the_next_market():
    got = run(
        [1.0, 2.0, 50.0],
        [1, 1, 1],
        [1, 1, 1],
        [0.5, 0.25, 7.0],
        truncated=[0, 1, 0],
        final_value=[0, 6.0, 0],
        last_value=100.0,
    )  # fmt: skip
    second = 2.0 + GAMMA * 6.0 - 0.25
    first = 1.0 + GAMMA * 0.25 - 0.5 + GAMMA * LAM * second
    assert got[:2] == pytest.approx([first, second], rel=1e-6)


def test_markets_and_providers_are_kept_apart():
    rng = np.random.default_rng(0)
    shape = (20, 3, 4)
    reward, value, final_value = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    elapsed_s, truncated, decided = rng.random(shape[:2]), rng.random(shape[:2]) < 0.1, rng.random(shape) < 0.6
    last_value = rng.normal(size=shape[1:]).astype(np.float32)
    together = advantages(reward, elapsed_s, decided, value, truncated, final_value, last_value, GAMMA, LAM)
    for b in range(3):
        for n in range(4):
            alone = run(
                reward[:, b, n], elapsed_s[:, b], decided[:, b, n], value[:, b, n],
                list(truncated[:, b]), list(final_value[:, b, n]), last_value[b, n],
            )  # fmt: skip
            assert alone == pytest.approx(together[:, b, n])
