"""Policies by what a user types: the name of a rule or a router, `learned`, or the folder of a bundle."""

import math
from collections.abc import Sequence
from pathlib import Path

from wwwserve.agents.policy import bundle
from wwwserve.agents.rules import RULES, Policy, Rule
from wwwserve.envs.oracle import ORACLES, Oracle
from wwwserve.eval.tuned import OBJECTIVES, tuned_for

DEFAULT_POLICIES = (*RULES, *ORACLES)
LEARNED = "learned"  # the policy that the project ships


class PolicyError(ValueError):
    """A policy that cannot be had; the message is one line."""


def load_policy(argument: str) -> Policy | Oracle:
    """The policy that `argument` stands for. Raises PolicyError.

    A rule, with settings where they differ from its tuned ones (`rank_cap` or `rank_cap:cap_fast=0.2,urgency=3`; the
    policy is then named so in full), or as it was tuned for a kind of market (`rank_cap@deadlines`); `centralized` or
    `omniscient`, which see everything; `competitive` and `cooperative`, the policies that the project
    ships, `learned`, the first of them; else the folder of a bundle.
    """
    name, colon, settings = argument.partition(":")
    rule_name, at, kind = argument.partition("@")
    if at and rule_name in RULES:
        try:
            return tuned_for(rule_name, kind)
        except ValueError as error:
            raise PolicyError(f"policy {argument!r}: {error}") from None
    if name in RULES:
        try:
            rule = Rule(name, _settings(argument, settings) if colon else None)
        except PolicyError:
            raise
        except ValueError as error:
            raise PolicyError(str(error)) from None
        rule.name = argument
        return rule
    if argument in ORACLES:
        return Oracle(argument)
    if argument == LEARNED:
        return _load_bundle(argument, bundle.DEFAULT_BUNDLE)
    if argument in bundle.SHIPPED:
        shipped = _load_bundle(argument, bundle.SHIPPED[argument])
        shipped.name = argument
        return shipped
    if Path(argument).is_dir():
        return _load_bundle(argument, Path(argument))
    raise PolicyError(
        f"unknown policy {argument!r}, expected a rule ({', '.join(RULES)}; RULE@KIND as tuned for one of "
        f"{', '.join(OBJECTIVES)}), a router that sees everything "
        f"({', '.join(ORACLES)}), {LEARNED}, {', '.join(bundle.SHIPPED)} or the folder of a bundle"
    )


def load_policies(arguments: Sequence[str]) -> list[Policy | Oracle]:
    """One policy for each argument; those whose names are the same are named by their arguments. Raises PolicyError."""
    for k, argument in enumerate(arguments):
        if argument in arguments[:k]:
            raise PolicyError(f"policy {argument!r} is given twice")
    policies = [load_policy(argument) for argument in arguments]
    names = [policy.name for policy in policies]
    for policy, argument in zip(policies, arguments, strict=True):
        if names.count(policy.name) > 1:
            policy.name = argument
    return policies


def _settings(argument: str, text: str) -> dict[str, float]:
    settings: dict[str, float] = {}
    for part in text.split(","):
        key, equals, number = part.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not equals or not math.isfinite(value):
            raise PolicyError(f"policy {argument!r}: got {part!r}, expected SETTING=NUMBER")
        if key in settings:
            raise PolicyError(f"policy {argument!r}: setting {key!r} is given twice")
        settings[key] = value
    return settings


def _load_bundle(argument: str, folder: Path) -> Policy:
    try:
        return bundle.load(folder)
    except ValueError as error:
        raise PolicyError(f"policy {argument!r}: {error}") from None
