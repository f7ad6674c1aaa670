"""Regret: against the best rule of each family, paired by market, judged by the worst."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wwwserve.agents.rules import RULES, Rule
from wwwserve.envs.distribution import KINDS
from wwwserve.envs.scenario import load
from wwwserve.envs.state import MarketPlan, plan
from wwwserve.eval import regret, tune
from wwwserve.eval.compare import FIRST_TEST_SEED
from wwwserve.eval.metrics import goodput_value, slo_auc
from wwwserve.eval.play import rollout, scores
from wwwserve.eval.regret import baselines, families, judge, table
from wwwserve.train import mappo

Scores = dict[str, dict[str, NDArray[np.float64]]]


def made(**by_policy: dict[str, list[float]]) -> Scores:
    return {policy: {name: np.array(x) for name, x in each.items()} for policy, each in by_policy.items()}


HAND = made(
    plain={"even": [0.5, 0.6, 0.7], "odd": [0.2, 0.2, 0.2]},
    sharp={"even": [0.4, 0.5, 0.6], "odd": [0.8, 0.9, 0.7]},
    ours={"even": [0.6, 0.7, 0.8], "odd": [0.7, 0.7, 0.7]},
    seer={"even": [0.9, 0.9, 0.9], "odd": [1.0, 1.0, 1.0]},
)


def test_each_family_has_its_own_best_rule() -> None:
    assert judge(HAND, ["plain", "sharp"])["best_rule"] == {"even": "plain", "odd": "sharp"}


def test_regret_is_the_best_rules_score_less_the_own() -> None:
    result = judge(HAND, ["plain", "sharp"])["policies"]
    mean, half = result["ours"]["regret"]["even"]
    assert mean == pytest.approx(-0.1)  # better than every rule
    assert half == pytest.approx(0.0, abs=1e-12)
    assert result["ours"]["regret"]["odd"][0] == pytest.approx(0.1)
    assert result["plain"]["regret"]["even"] == [0.0, 0.0]
    assert result["plain"]["regret"]["odd"][0] == pytest.approx(0.6)
    assert result["ours"]["score"]["odd"][0] == pytest.approx(0.7)


def test_a_policy_is_judged_by_its_worst_family() -> None:
    result = judge(HAND, ["plain", "sharp"])["policies"]
    worst = {name: (each["worst_family"], each["worst_regret"]) for name, each in result.items()}
    assert worst["ours"] == ("odd", pytest.approx(0.1))
    assert worst["sharp"] == ("even", pytest.approx(0.1))
    assert worst["seer"][1] == pytest.approx(-0.2)
    assert result["ours"]["mean_regret"] == pytest.approx(0.0)
    assert result["sharp"]["mean_regret"] == pytest.approx(0.05)


def test_only_rules_set_the_standard() -> None:
    assert judge(HAND, ["plain"])["best_rule"] == {"even": "plain", "odd": "plain"}
    best = judge(HAND, ["plain", "sharp", "seer"])["best_rule"]
    assert best == {"even": "seer", "odd": "seer"}


def test_regrets_are_paired_by_market() -> None:
    """Markets differ far more than policies do; a difference that is always the same has no error."""
    rng = np.random.default_rng(1)
    level = rng.uniform(0.1, 0.8, 20)
    noisy = level + 0.05 + 0.02 * rng.choice([-1, 1], 20)
    result = judge({"a": {"f": level}, "b": {"f": level - 0.03}, "c": {"f": noisy}}, ["a"])["policies"]
    assert result["b"]["regret"]["f"] == [pytest.approx(0.03), pytest.approx(0.0, abs=1e-12)]
    difference = level - noisy
    half = 2.093 * difference.std(ddof=1) / math.sqrt(20)  # Student's t of 19 degrees of freedom
    assert result["c"]["regret"]["f"] == [pytest.approx(difference.mean()), pytest.approx(half, rel=1e-3)]
    assert result["c"]["score"]["f"][1] > 3 * half


def test_a_market_without_a_score_counts_for_no_one() -> None:
    measured = made(a={"f": [0.5, math.nan, 0.7]}, b={"f": [0.4, math.nan, 0.6]})
    result = judge(measured, ["a", "b"])
    assert result["best_rule"] == {"f": "a"}
    assert result["policies"]["b"]["regret"]["f"][0] == pytest.approx(0.1)


def test_the_table_shows_scores_less_the_best_rules_and_the_best_policies_last() -> None:
    lines = table(judge(HAND, ["plain", "sharp"])).splitlines()
    assert lines[0].split()[-4:] == ["even", "odd", "worst", "mean"]
    assert lines[1].split()[-2:] == ["0.6000", "0.8000"]
    cells = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert (list(cells)[:1], list(cells)[-1:]) == (["plain"], ["seer"])
    assert cells["ours"][:3] == ["+0.1000", "-0.1000", "-0.1000"]
    assert cells["seer"][2] == "+0.2000"


def test_baselines_are_the_rules_and_the_best_for_each_kind() -> None:
    names = [policy.name for policy in baselines()]
    assert names[: len(RULES)] == list(RULES)
    assert [name.partition("@")[2] for name in names[len(RULES) :]] == [*KINDS, "anyone"]


def test_families_are_the_scenarios_and_random_markets_of_every_kind() -> None:
    among = families(300, 3, 16, ("paper/alternating-queue", "trace/azure-conv"))
    assert list(among) == ["paper/alternating-queue", "trace/azure-conv", *(f"random/{kind}" for kind in KINDS)]
    assert [p.seed for p in among["paper/alternating-queue"]] == list(range(300, 316))
    assert [p.seed for p in among["trace/azure-conv"]] == [300, 301]
    assert [p.seed for p in among["random/lying"]] == [300, 301, 302]
    assert not [name for name in families(300, 0, 2, ()) if name]


def seeds_of(among: Any) -> set[int]:
    return {p.seed for plans in among.values() for p in plans}


def test_training_tuning_validation_and_test_share_no_seeds() -> None:
    """Whatever the sizes that a user may give, up to thousands of markets."""
    few = ("paper/alternating-queue", "liars/first")
    test = seeds_of(families(FIRST_TEST_SEED, 3, 3, few))
    validation = seeds_of(families(mappo.VALIDATION_SEED, 3, 3, few))
    tuning = seeds_of(tune.markets(3, tune.SEED)) | seeds_of(tune.markets(3, tune.SEED + 10_000))
    ranges = [(0, mappo.TRAINING_SEEDS - 1)]
    ranges += [(min(seeds), max(seeds) + 100_000) for seeds in (tuning, validation, test)]
    for (_, high), (low, _) in pairwise(ranges):
        assert high < low


def test_scores_are_the_measures_of_their_markets() -> None:
    plans: list[MarketPlan] = [plan(load("paper/alternating-queue"), 5), plan(load("market/deadlines"), 6)]
    rule = Rule("earliest_finish")
    found = scores(rule, plans)
    runs = [rollout(p.scenario, rule, [p.seed])[0].requests for p in plans]
    thresholds_s = plans[0].scenario.slo.thresholds_s
    assert found[0] == slo_auc(runs[0].latency_s, thresholds_s)
    assert found[1] == goodput_value(runs[1], plans[1].scenario.slo)
    np.testing.assert_array_equal(scores(rule, plans[::-1], threads=2), found[::-1])


# The command.


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two short families and three rules."""
    short = tune.sample("honest", np.random.default_rng(1), 60.0)

    def two(first_seed: int, count: int, seeds: int) -> dict[str, list[MarketPlan]]:
        return {"one": [plan(short, first_seed + k) for k in range(count)],
                "two": [plan(short, first_seed + 50 + k) for k in range(seeds)]}  # fmt: skip

    monkeypatch.setattr(regret, "families", two)
    monkeypatch.setattr(regret, "baselines", lambda: [Rule("single"), Rule("earliest_finish")])


@pytest.mark.usefixtures("small")
def test_the_command_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "regret.json"
    arguments = ["--policy", "random", "single", "--markets", "3", "--seeds", "2", "--processes", "1", "--oracles"]
    assert regret.main([*arguments, "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["options"] == {"markets": 3, "seeds": 2, "first_seed": FIRST_TEST_SEED}
    assert set(written["policies"]) == {"single", "earliest_finish", "random", "centralized", "omniscient"}
    assert set(written["best_rule"]) == {"one", "two"}
    assert set(written["best_rule"].values()) <= {"single", "earliest_finish"}
    shown = capsys.readouterr()
    assert shown.out.rstrip("\n") == table(written)
    assert "random" in shown.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--markets", "1"], "--markets is 1, expected at least 2"),
        (["--seeds", "1"], "--seeds is 1, expected at least 2"),
        (["--processes", "0"], "--processes is 0, expected at least 1"),
        (["--first-seed", "-1"], "--first-seed is -1, expected at least 0"),
        (["--policy", "nobody"], "unknown policy 'nobody'"),
        (["--policy", "random", "random"], "given twice"),
        (["--json", "/nowhere/result.json"], "/nowhere is not a folder"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert regret.main(arguments) == 2
    shown = capsys.readouterr()
    assert named in shown.err and shown.err.count("\n") == 1
    assert shown.err.startswith("wwwserve regret: ") and not shown.out
