"""Strengths give back the win rates that they were fitted to, on paper and in duels of a simulated market."""

import numpy as np
import pytest

from wwwserve.agents.hardware import MODELS, QUANTIZATIONS
from wwwserve.agents.protocol import VOTE_A, vote_of
from wwwserve.agents.rules import Rule
from wwwserve.envs.scenario import load
from wwwserve.eval.paper.credits import measure
from wwwserve.eval.strength import (
    MODEL_SIZE,
    QUANTIZATION,
    fit,
    majority,
    model_strengths,
    quantization_strengths,
    wilson,
    win_rates,
)


def test_majority_of_three() -> None:
    assert majority(0.6, 1) == pytest.approx(0.6)
    assert majority(0.6) == pytest.approx(0.6**3 + 3 * 0.6**2 * 0.4)
    assert majority(0.3, 5) + majority(0.7, 5) == pytest.approx(1)
    with pytest.raises(ValueError, match="2 judges can tie"):
        majority(0.6, 2)


def test_fit_finds_the_strengths_that_made_the_rates() -> None:
    truth = np.array([1.5, 0.2, -0.1, -1.6])
    for judges in (1, 3, 7):
        np.testing.assert_allclose(fit(win_rates(truth, judges), judges), truth - truth.mean(), atol=1e-8)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fit([1.2, 0.3, 0.0])
    with pytest.raises(ValueError, match="no strengths"):
        fit([0.99, 0.98, 0.01])  # two cannot win nearly all, as they meet each other


@pytest.mark.parametrize("published", [MODEL_SIZE, QUANTIZATION], ids=["model size", "quantization"])
def test_fitted_rates_are_the_published_ones(published: dict[str, float]) -> None:
    rates = list(published.values())
    np.testing.assert_allclose(win_rates(fit(rates)), rates, atol=0.005)


def test_the_catalogue_has_the_fitted_strengths() -> None:
    models, quantizations = model_strengths(), quantization_strengths()
    assert {name: MODELS[name].strength for name in models} == pytest.approx(models, abs=5e-4)
    assert {name: QUANTIZATIONS[name].strength for name in quantizations} == pytest.approx(quantizations, abs=5e-4)
    assert QUANTIZATIONS["bf16"].strength == QUANTIZATIONS["fp8wo"].strength == 0.0


def test_votes_follow_the_strengths() -> None:
    rng = np.random.default_rng(5)
    a, b = MODELS["qwen3-8b"].strength, MODELS["qwen3-0.6b"].strength
    votes = [vote_of(a, b, u) == VOTE_A for u in rng.random(40_000)]
    assert np.mean(votes) == pytest.approx(1 / (1 + np.exp(b - a)), abs=0.01)


def test_wilson() -> None:
    middle, half = wilson(0, 10)
    assert middle - half == pytest.approx(0.0) and middle + half == pytest.approx(0.2775, abs=1e-3)
    middle, half = wilson(5300, 10_000)
    assert half == pytest.approx(0.0098, abs=1e-4)
    assert np.isnan(wilson(0, 0)).all()


@pytest.mark.parametrize(("name", "published"), [("model-size", MODEL_SIZE), ("quantization", QUANTIZATION)])
def test_duels_of_a_market_come_to_the_published_win_rates(name: str, published: dict[str, float]) -> None:
    found = measure(load(f"paper/{name}"), Rule("www_serve"), range(40_000, 40_010))
    for (rate, half), duels, wanted in zip(found["win_rate"], found["duels"], published.values(), strict=True):
        assert duels > 2000  # so that 0.53 is told from 0.50
        assert half < 0.025
        assert abs(rate - wanted) <= 1.3 * half + 0.005
    assert found["win_rate"][0][0] - found["win_rate"][0][1] > 0.5
    assert found["win_rate"][2][0] + found["win_rate"][2][1] < 0.5
    assert sum(found["duels"]) == 2 * (np.sum(found["wins"]) - np.trace(found["wins"]))
