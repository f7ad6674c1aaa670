"""Tuning the rules: what is written, what reads it, and that the defaults are what it found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wwwserve.agents.rules import RULES, Rule
from wwwserve.envs.distribution import KINDS, Kind, kind_of
from wwwserve.eval import tune
from wwwserve.eval.compare import FIRST_TEST_SEED
from wwwserve.eval.tune import draw, markets
from wwwserve.eval.tuned import OBJECTIVES, TUNED, best_for, tuned_for

TUNABLE = [name for name, settings in RULES.items() if any(setting.search for setting in settings.values())]


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TUNED.read_text())
    return found


def test_every_tunable_rule_has_settings_for_every_objective(table: dict[str, Any]) -> None:
    assert list(table["rules"]) == TUNABLE
    for rule, by_objective in table["rules"].items():
        assert tuple(by_objective) == OBJECTIVES
        for each in by_objective.values():
            assert 0 < each["score"] < 1
            assert list(each["settings"]) == list(RULES[rule])


@pytest.mark.parametrize("rule", TUNABLE)
def test_settings_lie_within_their_bounds(rule: str, table: dict[str, Any]) -> None:
    for each in table["rules"][rule].values():
        Rule(rule, each["settings"])  # raises for one out of its range
        for key, value in each["settings"].items():
            setting = RULES[rule][key]
            assert setting.search is not None
            low, high = setting.search
            assert low <= value <= high or value == setting.default, key


@pytest.mark.parametrize("rule", [name for name in TUNABLE if name != "www_serve"])
def test_defaults_are_the_settings_tuned_for_all_kinds(rule: str, table: dict[str, Any]) -> None:
    """Those of www_serve are the published ones."""
    assert Rule(rule).settings == table["rules"][rule]["all"]["settings"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tuned_rules_have_the_settings_of_the_file(objective: str, table: dict[str, Any]) -> None:
    best = table["best"][objective]
    for name in TUNABLE:
        rule = tuned_for(name, objective)
        expected = best if name == best["rule"] else table["rules"][name][objective]
        assert (rule.name, rule.settings) == (f"{name}@{objective}", expected["settings"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_best_for_an_objective_is_one_that_was_tuned_or_needs_no_tuning(
    objective: str, table: dict[str, Any]
) -> None:
    best = best_for(objective)
    name, at, named = best.name.partition("@")
    assert (at, named) == ("@", objective)
    assert {"rule": name, "settings": best.settings} == {
        key: table["best"][objective][key] for key in ("rule", "settings")
    }
    if name in TUNABLE:
        assert best.settings in [each["settings"] for each in table["rules"][name].values()]


def test_an_honest_market_is_of_the_kind_that_it_came_out_as() -> None:
    seen = set()
    for kind, plans in markets(24, 91).items():
        for planned in plans:
            providers = planned.scenario.providers
            models, gpus = {each.model for each in providers}, {each.gpu for each in providers}
            expected = kind
            if kind == "honest" and len(models) == 1:
                expected = "hardware" if len(gpus) > 1 else "alike"
            assert kind_of(planned.scenario) == expected
            seen.add((kind, expected))
    assert len(seen) == len(KINDS) + 2


def test_what_reads_a_file_reads_it_anew(tmp_path: Path) -> None:
    def entry(score: float, wait_s: float) -> dict[str, Any]:
        each = {"settings": {"accept_wait_s": wait_s}, "score": score}
        return dict.fromkeys(OBJECTIVES, each)

    path = tmp_path / "tuned.json"
    rules = {"earliest_finish": entry(0.5, 7.0), "rank_cap": entry(0.7, 8.0), "deadline_first": entry(0.6, 9.0)}
    best = {name: {"rule": "rank_cap", **each} for name, each in rules["rank_cap"].items()}
    path.write_text(json.dumps({"rules": rules, "best": best}))
    assert best_for("lying", path).name == "rank_cap@lying"
    assert best_for("lying", path).settings["accept_wait_s"] == 8.0
    assert tuned_for("deadline_first", "all", path).settings["accept_wait_s"] == 9.0


@pytest.mark.parametrize("rule", TUNABLE)
def test_draws_lie_within_the_search_ranges_and_fill_them(rule: str) -> None:
    rng = np.random.default_rng(1)
    drawn = [draw(rule, rng) for _ in range(300)]
    for key, setting in RULES[rule].items():
        values = np.array([each[key] for each in drawn])
        usual = values == setting.default
        assert setting.search is not None
        low, high = setting.search
        assert 0.15 < usual.mean() < 0.35
        others = values[~usual]
        assert (others >= 0.99 * low).all() and (others <= 1.01 * high).all()
        scale = np.log if low > 0 else np.asarray
        place = (scale(others) - scale(low)) / (scale(high) - scale(low))
        assert place.min() < 0.1 and place.max() > 0.9
        assert 0.4 < place.mean() < 0.6
    assert draw(rule, np.random.default_rng(2)) == draw(rule, np.random.default_rng(2))


def test_tuning_markets_are_those_of_their_seeds() -> None:
    some, same, others = markets(2, 77), markets(2, 77), markets(2, 78)
    assert list(some) == list(KINDS)
    for kind in KINDS:
        assert [p.seed for p in some[kind]] == [77, 78]
        assert [p.scenario.name for p in some[kind]] == [kind] * 2
        assert [p.scenario for p in some[kind]] == [p.scenario for p in same[kind]]
        assert some[kind][0].scenario != others[kind][0].scenario


def test_seeds_of_tuning_come_before_those_of_validation_and_test(table: dict[str, Any]) -> None:
    assert table["seed"] == tune.SEED
    assert max(table["options"][name] for name in ("few", "many")) < 10_000
    assert tune.SEED + 20_000 + table["options"]["last"] < FIRST_TEST_SEED // 2


class Fake:
    """Scores by settings alone, so that what is best is known: near 5 s, or for liars near 50 s."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []

    def __call__(self, rule: Rule, plans: list[str]) -> list[float]:
        goal = 50.0 if plans[0] == "lying" else 5.0
        self.asked.append((rule.settings["accept_wait_s"], plans[0]))
        return [1.0 - abs(np.log(rule.settings["accept_wait_s"] / goal)) / 10 + len(plans) / 100] * len(plans)


def test_the_best_of_the_finalists_is_chosen_for_each_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setattr(tune, "scores", fake)
    monkeypatch.setattr(tune, "markets", lambda count, seed: {kind: [kind] * count for kind in KINDS})
    best = tune.tune("deadline_first", 30, 1, 2, 2, 0)
    assert list(best) == list(OBJECTIVES)
    tried = {wait_s for wait_s, _ in fake.asked}
    by_distance = {goal: min(tried, key=lambda wait_s: abs(np.log(wait_s / goal))) for goal in (5.0, 50.0)}
    assert best["lying"]["settings"]["accept_wait_s"] == by_distance[50.0]
    assert best["honest"]["settings"]["accept_wait_s"] == by_distance[5.0]
    liars = 1 / len(KINDS)
    for_all = min(tried, key=lambda x: (1 - liars) * abs(np.log(x / 5.0)) + liars * abs(np.log(x / 50.0)))
    assert best["all"]["settings"]["accept_wait_s"] == for_all
    top = 1.0 - abs(np.log(by_distance[50.0] / 50.0)) / 10 + 0.02  # from the many, not from the few
    assert best["lying"]["score"] == pytest.approx(top, abs=1e-5)
    among = min(tried, key=lambda x: 2 * abs(np.log(x / 5.0)) + abs(np.log(x / 50.0)))
    assert best["anyone"]["settings"]["accept_wait_s"] == among
    again = len(fake.asked) - 31 * len(KINDS)
    assert 2 * len(KINDS) <= again <= (1 + 2 * len(OBJECTIVES)) * len(KINDS)


def test_all_that_was_found_best_meets_on_new_markets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was best for liars is best for them there, though another rule had the higher score where it was tuned."""
    fake, seeds = Fake(), []

    def new(count: int, seed: int) -> dict[Kind, Any]:
        seeds.append(seed)
        return {kind: [kind] * count for kind in KINDS}

    monkeypatch.setattr(tune, "scores", fake)
    monkeypatch.setattr(tune, "markets", new)
    monkeypatch.setattr(tune, "RULES", {name: RULES[name] for name in ("earliest_finish", "deadline_first")})
    waits = {"earliest_finish": {"lying": 40.0}, "deadline_first": {"lying": 20.0, "honest": 6.0}}
    rules = {
        name: {
            each: {"settings": Rule(name).settings | {"accept_wait_s": by_kind.get(each, 150.0)}, "score": 0.99}
            for each in OBJECTIVES
        }
        for name, by_kind in waits.items()
    }
    best = tune.play_off(rules, 3, 1)
    assert list(best) == list(OBJECTIVES)
    assert seeds and min(seeds) >= tune.SEED + 20_000
    assert (best["lying"]["rule"], best["lying"]["settings"]["accept_wait_s"]) == ("earliest_finish", 40.0)
    assert (best["honest"]["rule"], best["honest"]["settings"]["accept_wait_s"]) == ("deadline_first", 6.0)
    assert best["lying"]["score"] == pytest.approx(1.0 - abs(np.log(40.0 / 50.0)) / 10 + 0.03, abs=1e-5)
    assert len(fake.asked) == 5 * len(KINDS)  # settings that are best for several take part once


def test_refining_comes_nearer_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "markets", lambda count, seed: {kind: [kind] * count for kind in KINDS})

    def found(refine: int) -> tuple[float, int]:
        fake = Fake()
        monkeypatch.setattr(tune, "scores", fake)
        best = tune.tune("deadline_first", 2, 1, 2, 1, refine)
        return abs(np.log(best["honest"]["settings"]["accept_wait_s"] / 5.0)), len(fake.asked)

    (rough, few), (fine, many) = found(0), found(70)
    assert many - few == 70 * len(KINDS)
    assert fine < 0.02 or fine < 0.5 * rough


@pytest.mark.parametrize("rule", TUNABLE)
def test_variations_are_near_and_within_the_search_ranges(rule: str) -> None:
    rng = np.random.default_rng(3)
    start = draw(rule, rng)
    varied = [tune.vary(rule, start, rng) for _ in range(200)]
    for key, setting in RULES[rule].items():
        values = np.array([each[key] for each in varied])
        assert setting.search is not None
        low, high = setting.search
        assert (values >= low).all() and (values <= high).all()
        assert 0.3 < (values != start[key]).mean() < 0.7 or start[key] in (low, high)
        assert np.abs(values - start[key]).mean() < 0.2 * (high - low)


def test_a_short_run_writes_what_the_readers_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(count: int, seed: int) -> dict[Kind, Any]:
        rng = np.random.default_rng(seed)
        return {kind: [tune.plan(tune.sample(kind, rng, 30.0), seed + k) for k in range(count)] for kind in KINDS}

    monkeypatch.setattr(tune, "markets", short)
    monkeypatch.setattr(tune, "RULES", {name: RULES[name] for name in ("single", "www_serve", "best_value")})
    path = tmp_path / "tuned.json"
    arguments = [
        "--draws",
        "1",
        "--few",
        "1",
        "--many",
        "1",
        "--finalists",
        "1",
        "--refine",
        "1",
        "--last",
        "1",
        "--processes",
        "1",
        "--json",
        str(path),
    ]
    assert tune.main(arguments) == 0
    written = json.loads(path.read_text())
    assert list(written["rules"]) == ["www_serve", "best_value"]
    assert written["options"] == {"draws": 1, "few": 1, "many": 1, "finalists": 1, "refine": 1, "last": 1}
    best = best_for("honest", path)
    assert best.name == f"{written['best']['honest']['rule']}@honest"
    assert tuned_for("www_serve", "lying", path).settings == written["rules"]["www_serve"]["lying"]["settings"]
    shown = capsys.readouterr().out
    assert "best_value: markup" in shown


@pytest.mark.parametrize("name", ["draws", "few", "many", "finalists", "last", "processes"])
def test_a_bad_argument_is_refused_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([f"--{name}", "0"]) == 2
    assert capsys.readouterr().err == f"wwwserve tune: --{name} is 0, expected at least 1\n"
