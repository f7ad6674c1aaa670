"""Markups against load: what is counted is what the market posts, and known probabilities have known means."""

import json
from pathlib import Path

import numpy as np
import pytest

from wwwserve.agents.tariff import MARKUPS
from wwwserve.envs.scenario import load
from wwwserve.envs.state import plan
from wwwserve.eval import markups
from wwwserve.eval.markups import by_load, posted
from wwwserve.eval.policies import load_policy
from wwwserve.eval.rivals import draw_tasks


def test_known_probabilities_have_known_means_and_entropies() -> None:
    certain, even = np.eye(MARKUPS.size)[4], np.full(MARKUPS.size, 1 / MARKUPS.size)
    rows = by_load(np.array([0.05, 0.8, 1.0, 1.02]), np.array([certain, even, certain, certain]))
    assert [(row["kv_use"], row["adverts"]) for row in rows] == [([0.0, 0.1], 1), ([0.75, 1.0], 3)]
    assert (rows[0]["posted"], rows[0]["mean"]) == (MARKUPS[4], MARKUPS[4])
    assert rows[0]["entropy"] == pytest.approx(0.0, abs=1e-9)
    assert rows[1]["mean"] == pytest.approx((MARKUPS.mean() + 2 * MARKUPS[4]) / 3)
    assert rows[1]["entropy"] == pytest.approx(np.log(MARKUPS.size) / 3)


def test_adverts_are_those_of_the_market_and_loads_those_of_its_providers() -> None:
    policy = load_policy("competitive")
    found, probability = posted(policy, [plan(load("competition/thin"), 1)])  # type: ignore[arg-type]
    assert len(found) == len(probability) > 4 * 600 / 5  # an advert every few seconds of each of four
    assert probability.sum(axis=1) == pytest.approx(1.0)
    assert 0.0 <= found.min() < 0.1 and 0.5 < found.max() <= 1.0


def test_random_markets_of_a_kind_differ() -> None:
    tasks = draw_tasks(["random/thin", "competition/thin"], [5, 6])
    first, second = tasks["random/thin"]
    assert first.scenario != second.scenario
    assert [each.seed for each in tasks["competition/thin"]] == [5, 6]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert markups.main(["competition/thin", "--seeds", "1", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["loads"]
    shown = capsys.readouterr().out
    assert all(f"{row['mean']:.3f}" in shown for row in rows) and len(rows) >= 3


def test_a_rule_has_no_probabilities(capsys: pytest.CaptureFixture[str]) -> None:
    assert markups.main(["random/thin", "--seeds", "1", "--policy", "best_value"]) == 2
    assert "--policy 'best_value' is not learned" in capsys.readouterr().err
