"""docs/environment.md, docs/defaults.md and docs/learners.md: defaults, constants and actions are what the code has."""

import importlib
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from doc_pages import ROOT, blocks

from wwwserve.agents import decision
from wwwserve.agents.tariff import MARKUPS
from wwwserve.envs import scenario
from wwwserve.envs.state import Reward
from wwwserve.envs.traffic import expected_output

DEFAULTS, GAME = ((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("defaults", "environment"))
KINDS = (
    scenario.Scenario, scenario.Slo, scenario.SloClass, scenario.Economy, scenario.Provider, scenario.Lengths,
    scenario.Misreport, scenario.PrefixCache, scenario.SessionsTraffic, scenario.TraceTraffic,
)  # fmt: skip
# Defaults that stand for "none" or "all of it".
WITHOUT_A_VALUE = {
    "Scenario.slo", "Scenario.economy", "Scenario.prefix_cache", "SessionsTraffic.rate_per_s", "SessionsTraffic.phases",
    "Slo.classes", "SloClass.output", "Provider.serves", "Provider.lengths",
    "Provider.traffic", "Provider.online_s", "Provider.misreport", "Provider.strength", "Provider.initial_credit",
    "Provider.initial_stake", "Misreport.from_s", "Misreport.until_s", "TraceTraffic.start_s",
}  # fmt: skip


def test_there_is_an_example_for_each_way_in() -> None:
    examples = [block.text for block in blocks("docs/learners.md") if block.language == "python"]
    for module in ("envs.market_v1", "stable_baselines3", "torchrl", "envs.batch", "eval.compare"):
        assert any(module in text for text in examples), module


def test_the_rule_of_the_page_beats_single(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = blocks("docs/learners.md")
    (market,) = (block for block in shown if block.language == "yaml")
    (rule,) = (block.text for block in shown if "EmptiestCache" in block.text)
    (tmp_path / str(market.file)).write_text(market.text)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(rule, "rule", "exec"), names)
    cells = names["result"]["scenarios"]["small"]
    assert cells["emptiest_cache"]["slo_auc"][0] > cells["single"]["slo_auc"][0] + 0.05


def table(page: str, first: str) -> dict[str, str]:
    """Second column by first, of the table whose head begins with `first`."""
    rows = page.partition(f"| {first} |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return {cell[0].strip("`"): cell[1] for cell in cells}


def test_every_default_is_on_the_page() -> None:
    found = {}
    for kind in KINDS:
        for each in fields(kind):
            if each.default is not MISSING and f"{kind.__name__}.{each.name}" not in WITHOUT_A_VALUE:
                found[f"{kind.__name__}.{each.name}"] = str(each.default)
    found |= {f"Reward.{name}": str(value) for name, value in Reward._field_defaults.items()}
    assert table(DEFAULTS, "key") == found


def test_constants_are_those_of_the_code() -> None:
    for name, value in table(DEFAULTS, "constant").items():
        module, _, constant = name.rpartition(".")
        assert str(getattr(importlib.import_module(f"wwwserve.{module}"), constant)) == value, name


def test_actions_are_counted_right() -> None:
    counts = {"route": decision.ROUTES, "markup": MARKUPS.size}
    assert {name: table(GAME, "part")[name] for name in counts} == {name: str(count) for name, count in counts.items()}
    assert f"`route * {MARKUPS.size} + markup`" in GAME
    assert f"index into {', '.join(f'{x:g}' for x in MARKUPS)}:" in GAME
    assert expected_output(scenario.Provider("n"), None).max == 8192
