"""Comparing policies: the same arrivals for all, the same numbers every time, plain words for what cannot be done."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from wwwserve.agents.arguments import UsageError
from wwwserve.agents.rules import RULES, Rule
from wwwserve.envs.scenario import Scenario, parse
from wwwserve.eval import compare as command
from wwwserve.eval import play as rollouts
from wwwserve.eval.compare import compare, write_json
from wwwserve.eval.metrics import attainment, paired_ci
from wwwserve.eval.play import Run, rollout
from wwwserve.eval.policies import DEFAULT_POLICIES, PolicyError, load_policies, load_policy
from wwwserve.eval.tuned import best_for

SEEDS = range(1_000_000, 1_000_005)
LENGTHS = {"prompt": {"median": 500, "sigma": 0.5, "max": 1024}, "output": {"median": 400, "sigma": 0.7, "max": 1024}}


def busy(rate_per_s: float) -> dict[str, Any]:
    return {"kind": "poisson", "phases": [{"until_s": 60, "rate_per_s": rate_per_s}]}


MAPPING: dict[str, Any] = {
    "name": "small",
    "duration_s": 60,
    "drain_s": 60,
    "slo": {"thresholds_s": [10, 20, 40]},
    "defaults": {"lengths": LENGTHS},
    "providers": [
        {"name": "slow", "gpu": "rtx-3090", "traffic": busy(3.0)},
        {"name": "fast", "gpu": "a100-80g", "traffic": busy(0.3)},
        {"name": "idle", "gpu": "a40"},
    ],
}


@pytest.fixture
def small() -> Scenario:
    return parse(MAPPING)


@pytest.fixture
def small_file(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(MAPPING))
    return str(path)


def same(a: list[Run], b: list[Run]) -> bool:
    return all(
        x.seed == y.seed
        and all(np.array_equal(p, q) for p, q in zip(x.requests, y.requests, strict=True))
        and np.array_equal(x.profit, y.profit)
        and np.array_equal(x.price, y.price)
        for x, y in zip(a, b, strict=True)
    )


# Running.


def test_a_run_depends_on_its_seed_alone(small: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    together = rollout(small, Rule("earliest_finish"), SEEDS)
    assert [run.seed for run in together] == list(SEEDS)
    assert len({run.requests.latency_s.sum() for run in together}) == len(SEEDS)
    assert same(together, rollout(small, Rule("earliest_finish"), SEEDS, threads=3))
    assert same(together[::-1], rollout(small, Rule("earliest_finish"), SEEDS[::-1]))
    monkeypatch.setattr(rollouts, "REQUESTS_AT_ONCE", 500)  # two seeds at a time, about
    assert same(together, rollout(small, Rule("earliest_finish"), SEEDS))
    monkeypatch.setattr(rollouts, "REQUESTS_AT_ONCE", 1)
    assert same(together, rollout(small, Rule("earliest_finish"), SEEDS))


@pytest.mark.parametrize("name", ["random", "www_serve", "centralized", "omniscient"])
def test_every_policy_faces_the_same_requests(small: Scenario, name: str) -> None:
    for run, other in zip(
        rollout(small, Rule("single"), SEEDS[:2]), rollout(small, load_policy(name), SEEDS[:2]), strict=True
    ):
        for field in ("arrival_s", "origin", "klass", "prompt", "output"):
            assert np.array_equal(getattr(run.requests, field), getattr(other.requests, field))
        assert np.any(other.requests.executor != run.requests.executor)


def test_prices_are_means_over_time() -> None:
    economy = {"compute_cost_per_ktok": 0.5}
    providers = [{"name": "a"}, {"name": "b"}, {"name": "c", "online_s": [[40, 60]]}]
    top = {"duration_s": 60, "gossip_interval_s": 1, "economy": economy, "providers": providers}
    quiet = parse({"name": "quiet"} | top)  # nothing runs: what costs is compute

    class DearerAtHalfTime:
        name = "dearer"
        ticks = 0

        def decide(self, views: Any, active: Any, uniforms: Any, actions: Any) -> None:
            self.ticks += 1
            actions.markup[...] = 1  # at cost
            actions.markup[:, 1] = 7 if self.ticks > 30 else 1  # half a credit more, as much as it costs

    (run,) = rollout(quiet, DearerAtHalfTime(), SEEDS[:1])
    at_cost, dearer, late = run.price
    assert at_cost == pytest.approx(0.5)
    assert dearer == pytest.approx(0.75, abs=0.05)  # a price waits for the next advert
    assert late == pytest.approx(0.5, abs=0.05)  # the time in which it is offline does not count


# Comparing.


def test_result_has_exactly_the_keys_of_the_contract(small: Scenario) -> None:
    result = compare([small], [Rule("www_serve"), Rule("single")], SEEDS)
    assert set(result) == {"scenarios", "paired"}
    assert list(result["scenarios"]) == ["small"]
    assert list(result["scenarios"]["small"]) == ["www_serve", "single"]
    cell = result["scenarios"]["small"]["single"]
    times = {"mean", "p50", "p90", "p99"}
    measures = {
        "slo", "slo_auc", "latency_s", "first_token_s", "goodput_value", "interactive", "prefix_hit", "profit", "price",
    }  # fmt: skip
    assert set(cell) == measures | {"requests", "unfinished"}
    assert set(cell["slo"]) == {"10", "20", "40"}
    assert set(cell["latency_s"]) == times | {"quantiles"} and set(cell["first_token_s"]) == times
    assert set(cell["profit"]) == set(cell["price"]) == {"slow", "fast", "idle"}
    assert cell["latency_s"]["quantiles"] == sorted(cell["latency_s"]["quantiles"])
    assert len(cell["latency_s"]["quantiles"]) == 99
    for pair in (cell["slo_auc"], *cell["slo"].values(), cell["profit"]["slow"], cell["latency_s"]["p90"]):
        assert len(pair) == 2 and all(isinstance(x, float) for x in pair)
    assert cell["requests"] > cell["unfinished"] >= 0

    paired = result["paired"]
    assert {k: paired[k] for k in paired if k != "scenarios"} == {
        "baseline": "www_serve",
        "first_seed": SEEDS[0],
        "seeds": len(SEEDS),
    }
    assert list(paired["scenarios"]["small"]) == ["single"]
    assert set(paired["scenarios"]["small"]["single"]) == measures


def test_numbers_are_those_of_the_runs_and_differences_are_paired(small: Scenario) -> None:
    result = compare([small], [Rule("www_serve"), Rule("single")], SEEDS)
    met, base = (
        [attainment(run.requests.latency_s, 20.0) for run in rollout(small, Rule(name), SEEDS)]
        for name in ("single", "www_serve")
    )
    cells = result["scenarios"]["small"]
    difference = result["paired"]["scenarios"]["small"]["single"]["slo"]["20"]
    assert cells["single"]["slo"]["20"][0] == pytest.approx(np.mean(met))
    assert difference == pytest.approx(paired_ci(met, base))
    assert difference[0] == pytest.approx(cells["single"]["slo"]["20"][0] - cells["www_serve"]["slo"]["20"][0])
    assert difference[1] < np.hypot(cells["single"]["slo"]["20"][1], cells["www_serve"]["slo"]["20"][1])


def test_same_policy_under_two_names_differs_by_nothing(small: Scenario) -> None:
    result = compare([small], load_policies(["www_serve", "www_serve:offload=0.8"]), SEEDS)
    difference = result["paired"]["scenarios"]["small"]["www_serve:offload=0.8"]
    assert difference["slo_auc"] == [0.0, 0.0] and difference["profit"]["fast"] == [0.0, 0.0]


def test_one_seed_has_no_interval_and_a_market_without_requests_no_measure() -> None:
    idle = parse({"name": "idle", "duration_s": 5, "providers": [{"name": "n1"}]})
    result = compare([idle], [Rule("www_serve")], [3])
    cell = result["scenarios"]["idle"]["www_serve"]
    assert (cell["requests"], cell["slo_auc"], cell["profit"]) == (0, [None, None], {"n1": [0.0, None]})
    json.dumps(result, allow_nan=False)
    assert "idle" in command.table(result, idle)


@pytest.mark.parametrize(
    "policies, baseline, seeds, expected",
    [
        (["single"], "www_serve", [1], "baseline 'www_serve' is not among the policies"),
        (["single", "single"], "single", [1], "policy name 'single' is there twice"),
        (["single"], "single", [], "no seed"),
        (["single"], "single", [1, 1], "a seed is given twice"),
        ([], "single", [1], "no policy"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(
    small: Scenario, policies: list[str], baseline: str, seeds: list[int], expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        compare([small], [Rule(name) for name in policies], seeds, baseline=baseline)


# Policies by name.


def test_every_default_policy_loads_under_its_name() -> None:
    assert [load_policy(name).name for name in DEFAULT_POLICIES] == [*RULES, "centralized", "omniscient"]


def test_a_rule_takes_settings() -> None:
    policy = load_policy("rank_cap:cap_fast=0.2,urgency=3")
    assert isinstance(policy, Rule)
    assert policy.name == "rank_cap:cap_fast=0.2,urgency=3"
    assert policy.settings == Rule("rank_cap", {"cap_fast": 0.2, "urgency": 3.0}).settings


def test_a_rule_as_tuned_for_a_kind_of_market() -> None:
    best = best_for("deadlines")
    found = load_policy(best.name)
    assert isinstance(found, Rule)
    assert (found.name, found.settings) == (best.name, best.settings)
    assert load_policy("www_serve@lying").name == "www_serve@lying"


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("earliest", "expected a rule .*single.*rank_cap.*centralized, omniscient.* bundle"),
        ("rank_cap:cap=0.2", "no setting 'cap', it has: .*cap_fast"),
        ("rank_cap:cap_fast", "got 'cap_fast', expected SETTING=NUMBER"),
        ("rank_cap:cap_fast=much", "got 'cap_fast=much'"),
        ("rank_cap:cap_fast=nan", "got 'cap_fast=nan'"),
        ("rank_cap:", "got ''"),
        ("rank_cap:urgency=1,urgency=2", "'urgency' is given twice"),
        ("rank_cap@", "got '' after @, expected one of all, honest.*anyone"),
        ("rank_cap@deadline", "got 'deadline' after @"),
        ("single@honest", "rule 'single' has no settings"),
        ("nobody@honest", "unknown policy 'nobody@honest'"),
        ("centralized:x=1", "unknown policy 'centralized:x=1'"),
    ],
)
def test_a_bad_policy_is_explained(argument: str, expected: str) -> None:
    with pytest.raises(PolicyError, match=expected):
        load_policy(argument)


def test_a_folder_that_is_no_bundle_is_explained(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=str(tmp_path)):
        load_policy(str(tmp_path))


# The command.


def run(*argv: str) -> int:
    return command.main(list(argv))


def test_command_writes_the_same_result_whatever_the_threads(
    small_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (small_file, "--policy", "single", "omniscient", "--seeds", "4", "--json")
    assert run(*common, str(tmp_path / "a.json"), "--threads", "1") == 0
    shown = capsys.readouterr().out
    again = (small_file, "--policy", "single", "--policy", "omniscient", "--seeds", "4", "--json")  # each adds
    assert run(*again, str(tmp_path / "b.json"), "--threads", "2") == 0
    assert capsys.readouterr().out == shown
    text = (tmp_path / "a.json").read_text()
    assert text == (tmp_path / "b.json").read_text()
    cells = json.loads(text)["scenarios"]["small"]
    assert list(cells) == ["www_serve", "single", "omniscient"]  # the baseline runs too
    assert f"{cells['single']['slo_auc'][0]:.3f} ±{cells['single']['slo_auc'][1]:.3f}" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json", "small.yaml"}
    assert json.loads(text)["paired"]["first_seed"] == 1_000_000


def test_command_shows_regret_over_scenarios_against_policies_that_see_no_more(
    small_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(MAPPING | {"name": "other", "rtt_ms": 500}))
    policies = ("--policy", "single", "earliest_finish", "omniscient")
    assert run(small_file, str(other), *policies, "--seeds", "3", "--baseline", "single") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert rows[0][-2:] == ["worst", "regret"]
    single, earliest, omniscient = ([float(x) for x in row[1:]] for row in rows[1:])
    assert earliest[-1] == 0.0  # best of the fair in both
    assert single[-1] == pytest.approx(max(earliest[0] - single[0], earliest[1] - single[1]), abs=0.002)
    assert len(omniscient) == 2


def test_command_plays_more_providers_and_more_load(
    small_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = {}
    for name, more in (("once", []), ("twice", ["--copies", "2"]), ("busy", ["--load", "3"])):
        out = tmp_path / f"{name}.json"
        assert (
            run(small_file, "--policy", "single", "--baseline", "single", "--seeds", "8", *more, "--json", str(out))
            == 0
        )
        [(scenario, found)] = json.loads(out.read_text())["scenarios"].items()
        cells[name] = found["single"]
        assert scenario == ("small x2" if name == "twice" else "small")
    assert len(cells["twice"]["profit"]) == 2 * len(cells["once"]["profit"])
    assert cells["twice"]["requests"] == pytest.approx(2 * cells["once"]["requests"], rel=0.3)
    assert cells["busy"]["requests"] == pytest.approx(3 * cells["once"]["requests"], rel=0.3)
    times = tmp_path / "times.yaml"
    given = [{"name": "n", "traffic": {"kind": "times", "times_s": [1.0]}}]
    times.write_text(yaml.safe_dump(MAPPING | {"name": "times", "providers": given}))
    assert run(str(times), "--load", "2") == 2
    assert "2 times as much" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["paper/alternatin"], "paper/alternatin: file: got none of this name"),
        (["FILE", "--policy", "wwwserve"], "unknown policy 'wwwserve'"),
        (["FILE", "--policy", "single", "single"], "policy 'single' is given twice"),
        (["FILE", "--policy", "single", "--policy", "single"], "policy 'single' is given twice"),
        (["FILE", "--baseline", "nobody"], "unknown policy 'nobody'"),
        (["FILE", "FILE"], "scenario name 'small' is there twice"),
        (["FILE", "--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["FILE", "--seeds", "few"], "--seeds: got 'few', expected a number"),
        (["FILE", "--first-seed", "-1"], "--first-seed is -1, expected at least 0"),
        (["FILE", "--json", "nowhere/out.json"], "--json nowhere/out.json: nowhere is not a folder"),
        (["FILE", "--json", "."], "is a folder, expected a file"),
        (["FILE", "--figures", "nowhere/figures"], "--figures nowhere/figures: No such file or directory"),
        (["FILE", "--polcy", "single"], "Unrecognized options: --polcy"),
        ([], "no scenario is given"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_nothing_runs(
    argv: list[str],
    expected: str,
    small_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "rollout", None)
    assert run(*(small_file if each == "FILE" else each for each in argv)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1 and expected in shown.err


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"good": 1})
    with pytest.raises(ValueError):
        write_json(path, {"bad": float("nan")})
    assert json.loads(path.read_text()) == {"good": 1}
    assert list(tmp_path.iterdir()) == [path]
