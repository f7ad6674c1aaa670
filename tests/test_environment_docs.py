"""docs/environment.md: every example runs, and every default, constant and feature is what the code has."""

import importlib
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from wwwserve.agents import decision, view
from wwwserve.agents.tariff import MARKUPS
from wwwserve.envs import scenario
from wwwserve.envs.state import Reward
from wwwserve.envs.traffic import expected_output

PAGE = (Path(__file__).parent.parent / "docs/environment.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
EXAMPLES = [text for language, text in BLOCKS if language == "python"]
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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example's scenario file, and the process in it."""
    (text,) = (text for language, text in BLOCKS if language == "yaml")
    (tmp_path / "two-nodes.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_an_example_for_each_way_in() -> None:
    for module in ("envs.market_v1", "stable_baselines3", "torchrl", "envs.batch", "eval.compare", "envs.scenario"):
        assert any(module in text for text in EXAMPLES), module


@pytest.mark.parametrize("k", range(len(EXAMPLES)))
@pytest.mark.filterwarnings("ignore:PettingZoo in TorchRL is tested using version")
def test_examples_run(k: int, folder: Path) -> None:
    if "torchrl" in EXAMPLES[k]:
        pytest.importorskip("torchrl")
    exec(compile(EXAMPLES[k], f"example {k}", "exec"), {"__name__": "example"})


def test_the_rule_of_the_page_beats_single(folder: Path) -> None:
    (text,) = (text for text in EXAMPLES if "EmptiestCache" in text)
    names: dict = {}
    exec(compile(text, "rule", "exec"), names)
    cells = names["result"]["scenarios"]["two-nodes"]
    assert cells["emptiest_cache"]["slo_auc"][0] > cells["single"]["slo_auc"][0] + 0.05


def table(first: str) -> dict[str, str]:
    """Second column by first, of the table whose head begins with `first`."""
    rows = PAGE.partition(f"| {first} |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return {cell[0].strip("`"): cell[1] for cell in cells}


def test_every_default_is_on_the_page() -> None:
    found = {}
    for kind in KINDS:
        for each in fields(kind):
            if each.default is not MISSING and f"{kind.__name__}.{each.name}" not in WITHOUT_A_VALUE:
                found[f"{kind.__name__}.{each.name}"] = str(each.default)
    found |= {f"Reward.{name}": str(value) for name, value in Reward._field_defaults.items()}
    assert table("key") == found


def test_constants_are_those_of_the_code() -> None:
    for name, value in table("constant").items():
        module, _, constant = name.rpartition(".")
        assert str(getattr(importlib.import_module(f"wwwserve.{module}"), constant)) == value, name


@pytest.mark.parametrize("features", [view.NODE_FEATURES, view.REQUEST_FEATURES, view.SELF_FEATURES])
def test_every_feature_is_on_the_page(features: tuple[view.Feature, ...]) -> None:
    rows = [f"| `{f.name}` | {f.unit} | {f.low:g} to {f.high:g} | {f.meaning} |" for f in features]
    assert "\n".join(rows) in PAGE
    assert f"Version {view.VIEW_VERSION}." in PAGE


def test_actions_are_counted_right() -> None:
    counts = {"route": decision.ROUTES, "markup": MARKUPS.size}
    assert {name: table("part")[name] for name in counts} == {name: str(count) for name, count in counts.items()}
    assert f"`route * {MARKUPS.size} + markup`" in PAGE
    assert f"index into {', '.join(f'{x:g}' for x in MARKUPS)}:" in PAGE
    assert expected_output(scenario.Provider("n"), None).max == 8192
