"""What one provider earns by another policy among others: pairing, weights, and intervals whose answer is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wwwserve.agents.rules import Rule
from wwwserve.envs.scenario import Scenario, parse
from wwwserve.envs.state import plan
from wwwserve.eval import rivals
from wwwserve.eval.deviations import Deviation, Lane, constant_markups, play, summed_gains
from wwwserve.eval.rivals import gains, iqm, over_markets, over_training, summary

SEEDS = (1_000_000, 1_000_001)
POLICY = Rule("best_value", {"markup": 0.2})


def market(**changes: Any) -> Scenario:
    """A seller and two buyers that differ by name alone."""
    busy = {"kind": "poisson", "phases": [{"until_s": 60, "rate_per_s": 0.9}]}
    buyer = {"gpu": "rtx-3090", "max_num_seqs": 4, "traffic": busy}
    return parse(
        {
            "name": "market",
            "duration_s": 60,
            "drain_s": 200,
            "slo": {"thresholds_s": [20, 40]},
            "defaults": {
                "serves": ["m"],
                "lengths": {
                    "prompt": {"median": 200, "sigma": 0.3, "max": 512},
                    "output": {"median": 300, "sigma": 0.4, "max": 1024},
                },
            },
            "providers": [
                {"name": "seller", "gpu": "a100-80g"},
                buyer | {"name": "b"},
                buyer | {"name": "c"} | changes,
            ],
        }
    )


@pytest.mark.parametrize("alike", [True, False])
def test_a_gain_is_summed_over_providers_and_of_those_alike_one_deviates_for_all(alike: bool) -> None:
    planned = plan(market() if alike else market(max_num_seqs=6), 7)
    (base,) = play(POLICY, [Lane(planned)], 1)
    single = Deviation("single", policy=Rule("single"))
    changes = [play(POLICY, [Lane(planned, (i,), (single,))], 1)[0].profit[i] - base.profit[i] for i in range(3)]
    expected = changes[0] + 2 * changes[1] if alike else sum(changes)
    assert summed_gains(POLICY, single, [planned], [base.profit], 1) == pytest.approx([expected])
    assert expected < 0.0 and changes[1] != changes[2]


def test_the_same_policy_gains_exactly_nothing_and_a_markup_what_it_does_as_a_policy() -> None:
    plans = [plan(market(), seed) for seed in SEEDS]
    cost = next(each for each in constant_markups() if each.name == "markup 0")
    groups = {
        "same": [Deviation("same", policy=POLICY), Deviation("again", policy=Rule("best_value", {"markup": 0.2}))],
        "cost": [cost],
        "rule": [Deviation("rule", policy=Rule("best_value", {"markup": 0.0}))],
    }
    found = gains(POLICY, groups, {"market": plans, "other": plans[::-1]}, 1)
    assert found["same"].shape == (2, 2, 2) and (found["same"] == 0.0).all()
    assert np.array_equal(found["cost"], found["rule"]) and (found["cost"] < 0.0).all()
    assert found["cost"][0, 0] == pytest.approx(found["cost"][0, 1, ::-1])


def test_iqm_leaves_out_a_quarter_at_either_end() -> None:
    assert iqm(np.array([100.0, 1.0, 2.0, 3.0, -50.0, 4.0, 5.0, 6.0])) == pytest.approx(3.5)


def test_what_tasks_differ_by_leaves_no_doubt() -> None:
    """Tasks that differ much, training seeds not at all. Resampling whole cells would find some."""
    found = np.tile(np.array([0.0, 1.0, 2.0, 30.0])[:, None], (5, 1, 3))
    assert over_training(found, np.random.default_rng(1)) == pytest.approx([1.5, 1.5])
    assert over_markets(found, np.random.default_rng(1)) == pytest.approx([1.5, 1.5])


def test_a_training_seed_is_drawn_with_all_its_tasks() -> None:
    """Three policies, one worse and one better in each of seven tasks: more tasks do not tell which one training gives.
    All three draws are the worse one in 1 of 27 cases."""
    found = np.tile(np.array([-1.0, 0.0, 1.0])[:, None, None], (1, 7, 2))
    assert over_training(found, np.random.default_rng(1)) == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("over", [over_training, over_markets])
def test_the_interval_covers_the_truth_as_often_as_it_should(over: Any) -> None:
    rng = np.random.default_rng(3)
    shape = (12, 3, 1) if over is over_training else (1, 3, 12)
    bounds = [over(rng.normal(0.0, 1.0, shape), rng) for _ in range(60)]
    assert 50 <= sum(low < 0.0 < high for low, high in bounds) <= 60


def test_a_market_that_all_training_seeds_find_hard_is_drawn_for_all_of_them() -> None:
    hard = np.array([0.0, 0.0, 0.0, 1.0])
    low, high = over_markets(np.tile(hard, (9, 1, 1)), np.random.default_rng(2)) or (0.0, 0.0)
    assert (low, high) == (0.0, 0.75)  # drawn apart, the mean of nine would hardly leave 0.25


def test_one_training_seed_has_no_interval_over_training() -> None:
    found = summary(np.array([[[0.1, 0.3, 0.2], [0.0, 0.2, 0.1]]]), ["a", "b"])
    assert found["over_training"] is None and found["training_seeds"] == 1
    assert found["tasks"]["a"][0] == pytest.approx(0.2)
    low, high = found["over_markets"]
    assert found["iqm"] == pytest.approx(0.15)
    assert low < found["iqm"] < high


def test_the_interval_over_training_is_narrow_where_seeds_agree_and_markets_do_not() -> None:
    rng = np.random.default_rng(4)
    found = summary(rng.normal(0.0, 1.0, (1, 2, 6)) + rng.normal(0.0, 0.01, (5, 2, 1)), ["a", "b"])
    training, markets = (high - low for low, high in (found["over_training"], found["over_markets"]))
    assert training < 0.1 < markets


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "market.yaml", tmp_path / "out.json"
    file.write_text(json.dumps(market().to_mapping()))
    argv = [str(file), "--among", "best_value", "--group", "alone", "single", "--markups", "--seeds", "2"]
    assert rivals.main([*argv, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["tasks"] == [str(file)] and result["among"] == "best_value"
    assert list(result["groups"]) == ["alone", *(each.name for each in constant_markups())]
    assert result["groups"]["alone"]["iqm"] < 0.0
    shown = capsys.readouterr().out
    assert f"{100 * result['groups']['alone']['iqm']:+.2f}" in shown
    assert rivals.main([str(file), "--among", "best_value", "--markups", "--asking", "0.3", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    still = [name for name, each in result["groups"].items() if not np.any(each["gains"])]
    assert result["among"] == "best_value at markup 0.3" and still == ["markup 0.3"]


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], "no scenario is given"),
        (["random/nice", "--markups"], "random/nice: expected random/KIND"),
        (["random/thin"], "expected --group or --markups"),
        (
            ["random/thin", "--markups", "--asking", "0.4"],
            "--asking is 0.4, expected one of -0.1, 0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8",
        ),
        (["random/thin", "--group", "alone"], "--group 'alone', expected a name and policies"),
        (["random/thin", "--group", "a", "single", "--group", "a", "single"], "--group 'a' is given twice"),
        (["random/thin", "--group", "a", "omniscient"], "'omniscient' sees everything"),
    ],
)
def test_what_cannot_be_done_is_one_line(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rivals.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and expected in shown.err
