"""The rules as `eval.tune` tuned them: `tuned_rules.json` and what is read of it."""

import json
from pathlib import Path
from typing import Any

from wwwserve.agents.rules import Rule
from wwwserve.envs.distribution import KINDS

TUNED = Path(__file__).parent / "tuned_rules.json"
ANYONE = "anyone"
OBJECTIVES = ("all", *KINDS, ANYONE)
"""What rules are tuned for: all kinds of market, one kind, or peers of whom it is not known whether they are honest."""


def best_for(objective: str, file: Path = TUNED) -> Rule:
    """The best rule for one of `OBJECTIVES` with the settings that are best for it, named `rule@objective`."""
    return _named(_read(file)["best"][objective], objective)


def tuned_for(rule: str, objective: str, file: Path = TUNED) -> Rule:
    """This rule with the settings that are best for one of `OBJECTIVES`, named `rule@objective`. Raises ValueError.

    Where the rule is the best of all for it, these are the settings of `best_for`.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"got {objective!r} after @, expected one of {', '.join(OBJECTIVES)}")
    found = _read(file)
    if rule == found["best"][objective]["rule"]:
        return best_for(objective, file)
    if rule not in found["rules"]:
        raise ValueError(f"rule {rule!r} has no settings that are tuned")
    return _named({"rule": rule} | found["rules"][rule][objective], objective)


def _named(entry: dict[str, Any], objective: str) -> Rule:
    rule = Rule(entry["rule"], entry["settings"])
    rule.name = f"{rule.name}@{objective}"
    return rule


def _read(file: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return table
