"""Tunes the rules on training markets: `wwwserve tune --json eval/tuned_rules.json`.

Every rule that has settings is tried with many, drawn at random within `agents.rules.Setting.search`, on random markets
of each kind; those that look best, overall or for a kind, are measured again on more markets, and varied there. What is
best over all kinds becomes the rule's default. At last all that was found best for something, of any rule, meets on
markets that are new to all: the best for each kind there is what an operator could reach who knew the kind of market
and tuned for it, and stands beside the defaults wherever policies are judged. So does the best for "anyone": for peers
of whom it is not known whether they are honest.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import tyro

from wwwserve.agents.arguments import Count, Range, UsageError, parse_args, refuse
from wwwserve.agents.rules import RULES, Rule
from wwwserve.envs.distribution import KINDS, Kind, sample
from wwwserve.envs.state import MarketPlan, plan
from wwwserve.eval.compare import FIRST_TEST_SEED, write_json
from wwwserve.eval.play import scores
from wwwserve.eval.tuned import OBJECTIVES, TUNED
from wwwserve.eval.workers import each

PROG = "wwwserve tune"
SEED = FIRST_TEST_SEED // 4  # apart from what policies are trained, validated and tested on
OF_UNKNOWN_HONESTY: tuple[Kind, ...] = ("honest", "lying", "switching")  # until it shows, one cannot tell which it is
SHORT_QUEUE = 2.0  # requests that wait at an engine
Settings = dict[str, float]


def markets(count: int, seed: int, kinds: Sequence[Kind] = KINDS) -> dict[Kind, list[MarketPlan]]:
    """`count` random markets of each kind."""
    plans: dict[Kind, list[MarketPlan]] = {}
    for kind in kinds:
        rng = np.random.default_rng((seed, KINDS.index(kind)))
        plans[kind] = [plan(sample(kind, rng), seed + k) for k in range(count)]
    return plans


def draw(rule: str, rng: np.random.Generator) -> Settings:
    """Settings of a rule drawn within their search ranges: log-uniform where that is above 0, else uniform.

    One draw in four leaves a setting at its default.
    """
    drawn = {}
    for key, setting in RULES[rule].items():
        if setting.search is None or rng.random() < 0.25:
            drawn[key] = setting.default
            continue
        low, high = setting.search
        value = np.exp(rng.uniform(np.log(low), np.log(high))) if low > 0 else rng.uniform(low, high)
        drawn[key] = float(f"{value:.3g}")
    return drawn


def vary(rule: str, settings: Settings, rng: np.random.Generator) -> Settings:
    """Settings near some: each is changed with a chance of one half, by a third or a tenth of its search range."""
    varied = dict(settings)
    for key, setting in RULES[rule].items():
        if setting.search is None or rng.random() < 0.5:
            continue
        low, high = setting.search
        now = varied[key]
        value = now * np.exp(rng.normal(0.0, 0.3)) if low > 0 else now + rng.normal(0.0, 0.1 * (high - low))
        varied[key] = float(f"{min(max(value, low), high):.3g}")
    return varied


def measured(rule: Rule, plans: dict[Kind, list[MarketPlan]]) -> list[float]:
    """Mean score of a rule for each of `OBJECTIVES`."""
    means = {kind: float(np.mean(scores(rule, plans[kind]))) for kind in KINDS}
    anyone = [means[kind] for kind in OF_UNKNOWN_HONESTY]
    return [float(np.mean(list(means.values()))), *means.values(), float(np.mean(anyone))]


def tune(rule: str, draws: int, few: int, many: int, finalists: int, refine: int) -> dict[str, Any]:
    """The best settings of a rule for each of `OBJECTIVES`, with their mean scores on the many markets.

    `few` and `many` markets of each kind; `finalists` of the draws, by their scores on the few, go on to the many.
    There the best for each objective in turn is varied, `refine` times in all.
    """
    first_markets, last_markets = markets(few, SEED), markets(many, SEED + 10_000)
    rng = np.random.default_rng((SEED, list(RULES).index(rule)))
    tried = [{key: s.default for key, s in RULES[rule].items()}, *(draw(rule, rng) for _ in range(draws))]

    first = np.array([measured(Rule(rule, settings), first_markets) for settings in tried])
    chosen = sorted({0, *np.argsort(-first, axis=0)[:finalists].ravel().tolist()})
    kept = [tried[k] for k in chosen]
    last = [measured(Rule(rule, settings), last_markets) for settings in kept]
    for k in range(refine):
        best = int(np.argmax([found[k % len(OBJECTIVES)] for found in last]))
        kept.append(vary(rule, kept[best], rng))
        last.append(measured(Rule(rule, kept[-1]), last_markets))
    winners = np.argmax(last, axis=0).tolist()
    return {
        name: {"settings": kept[k], "score": round(last[k][column], 5)}
        for column, (name, k) in enumerate(zip(OBJECTIVES, winners, strict=True))
    }


def tune_for(
    rule: str, kinds: Sequence[Kind], draws: int, few: int, many: int, finalists: int, refine: int
) -> dict[str, Any]:
    """The same for these kinds of market alone, by kind; and for all of them, under "all"."""

    def ranked(settings: Settings, plans: dict[Kind, list[MarketPlan]]) -> list[float]:
        means = [float(np.mean(scores(Rule(rule, settings), plans[kind]))) for kind in kinds]
        return [float(np.mean(means)), *means]

    first_markets, last_markets = markets(few, SEED, kinds), markets(many, SEED + 10_000, kinds)
    rng = np.random.default_rng((SEED, list(RULES).index(rule)))
    tried = [{key: s.default for key, s in RULES[rule].items()}, *(draw(rule, rng) for _ in range(draws))]
    first = np.array([ranked(settings, first_markets) for settings in tried])
    kept = [tried[k] for k in sorted({0, *np.argsort(-first, axis=0)[:finalists].ravel().tolist()})]
    last = [ranked(settings, last_markets) for settings in kept]
    for k in range(refine):
        best = int(np.argmax([found[k % (1 + len(kinds))] for found in last]))
        kept.append(vary(rule, kept[best], rng))
        last.append(ranked(kept[-1], last_markets))
    winners = np.argmax(last, axis=0).tolist()
    return {
        name: {"settings": kept[k], "score": round(last[k][column], 5)}
        for column, (name, k) in enumerate(zip(("all", *kinds), winners, strict=True))
    }


def add_kinds(table: dict[str, Any], found: dict[str, Any], kinds: Sequence[Kind], count: int, processes: int) -> None:
    """Put what `tune_for` found for each rule into a table, and the best of all on `count` new markets of each kind.

    A rule that the table did not have gets what is best for all of these kinds everywhere.
    """
    plans = markets(count, SEED + 20_000, kinds)
    for kind in kinds:
        entrants = [Rule(rule, best[kind]["settings"]) for rule, best in found.items()]
        entrants += [Rule(name) for name in RULES if name not in found]
        last = list(each(partial(_mean_score, plans=plans[kind]), entrants, processes))
        k = int(np.argmax(last))
        table["best"][kind] = {"rule": entrants[k].name, "settings": entrants[k].settings, "score": round(last[k], 5)}
    for rule, best in found.items():
        if rule not in table["rules"]:
            table["rules"][rule] = {objective: best["all"] for objective in OBJECTIVES}
        table["rules"][rule] |= {kind: best[kind] for kind in kinds}


def _mean_score(rule: Rule, plans: list[MarketPlan]) -> float:
    return float(np.mean(scores(rule, plans)))


def vary_limits(rule: str, settings: Settings) -> list[Settings]:
    """Settings as they are, with the longest wait at which a peer's request is taken, and with short queues."""
    longest = (RULES[rule]["accept_wait_s"].search or (0.0, np.inf))[1]
    return [
        settings | {"accept_wait_s": wait_s, "max_queue": queue}
        for wait_s in sorted({settings["accept_wait_s"], longest})
        for queue in sorted({settings["max_queue"], SHORT_QUEUE})
    ]


def retune(rule: str, found: dict[str, Any], count: int) -> dict[str, Any]:
    """The best for each of `OBJECTIVES` of what was `found` for it before or for all, with other limits: see
    `vary_limits`. Each is measured on `count` markets of the kinds that matter to it."""
    plans = markets(count, SEED + 30_000)
    known: dict[tuple[tuple[float, ...], Kind], float] = {}

    def score(settings: Settings, kinds: Sequence[Kind]) -> float:
        means = []
        for kind in kinds:
            key = tuple(settings.values()), kind
            if key not in known:
                known[key] = float(np.mean(scores(Rule(rule, settings), plans[kind])))
            means.append(known[key])
        return float(np.mean(means))

    best = {}
    for objective in OBJECTIVES:
        kinds = {"all": KINDS, "anyone": OF_UNKNOWN_HONESTY}.get(objective) or (cast(Kind, objective),)
        tried = [each for key in (objective, "all") for each in vary_limits(rule, found[key]["settings"])]
        ranked = [score(settings, kinds) for settings in tried]
        best[objective] = {"settings": tried[int(np.argmax(ranked))], "score": round(max(ranked), 5)}
    return best


def play_off(rules: dict[str, dict[str, Any]], count: int, processes: int) -> dict[str, Any]:
    """The best for each of `OBJECTIVES`, of any rule, on `count` new markets of each kind.

    `rules` is what `tune` found for each; there meet all the settings in it, and the rules that have none to tune.
    """
    entrants: list[Rule] = [Rule(name) for name in RULES if name not in rules]
    for name, found in rules.items():
        distinct = {tuple(each["settings"].items()): each["settings"] for each in found.values()}
        entrants += [Rule(name, settings) for settings in distinct.values()]
    last = list(each(partial(measured, plans=markets(count, SEED + 20_000)), entrants, processes))
    winners = np.argmax(last, axis=0).tolist()
    return {
        name: {"rule": entrants[k].name, "settings": entrants[k].settings, "score": round(last[k][column], 5)}
        for column, (name, k) in enumerate(zip(OBJECTIVES, winners, strict=True))
    }


@dataclass
class Args:
    """Tune the rules on training markets."""

    draws: Count = 64
    """settings drawn for each rule"""
    few: Count = 12
    """markets of each kind for the draws"""
    many: Count = 48
    """markets of each kind for the finalists"""
    finalists: Count = 4
    """draws that go on, overall and by kind"""
    refine: Annotated[int, Range(0)] = 28
    """variations of what is best then"""
    last: Count = 192
    """markets of each kind where all that is best meets"""
    kinds: tuple[Kind, ...] = ()
    """tune for these kinds of market alone; the rest stays as --json has it"""
    again: bool = False
    """start from what --json has, and vary only what a changed market changes most: the limits on waits and queues"""
    processes: Count = 2
    """rules tuned at a time"""
    json: Annotated[Path, tyro.conf.arg(metavar="FILE")] = TUNED
    """write what was found to this file"""


def _retuned(rule: str, before: dict[str, Any], count: int) -> dict[str, Any]:
    return retune(rule, before[rule], count)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
    except UsageError as error:
        return refuse(PROG, error)
    names = [rule for rule in RULES if any(setting.search for setting in RULES[rule].values())]
    rules: dict[str, Any] = {}
    job: Callable[[str], dict[str, Any]] = partial(
        tune, draws=args.draws, few=args.few, many=args.many, finalists=args.finalists, refine=args.refine
    )
    if args.kinds:
        table = json.loads(args.json.read_text())
        budget = {name: getattr(args, name) for name in ("draws", "few", "many", "finalists", "refine")}
        added = dict(
            zip(names, each(partial(tune_for, kinds=args.kinds, **budget), names, args.processes), strict=True)
        )
        add_kinds(table, added, args.kinds, args.last, args.processes)
        table["kinds"] = {"of": [*args.kinds], **budget, "last": args.last}
        for kind in args.kinds:
            table.get("not_tuned", {}).pop(kind, None)
            print(f"{kind}: {table['best'][kind]['rule']} {table['best'][kind]['score']:.4f}")
        write_json(args.json, table)
        return 0
    if args.again:
        found = json.loads(args.json.read_text())
        before = found["rules"]
        names = [rule for rule in names if "max_queue" in RULES[rule]]
        rules = {rule: found for rule, found in before.items() if rule not in names}
        job = partial(_retuned, before=before, count=args.many)
    for rule, best in zip(names, each(job, names, args.processes), strict=True):
        rules[rule] = best
        shown = ", ".join(f"{key} {value:g}" for key, value in best["all"]["settings"].items())
        means = " ".join(f"{name} {found['score']:.4f}" for name, found in best.items())
        print(f"{rule}: {shown}\n  {means}", flush=True)
    best = play_off(rules, args.last, args.processes)
    print("\n".join(f"{name}: {found['rule']} {found['score']:.4f}" for name, found in best.items()))
    settled = ("many", "last") if args.again else ("draws", "few", "many", "finalists", "refine", "last")
    options = {name: getattr(args, name) for name in settled}
    if args.again:
        options = found["options"] | {"again": options}
        rules = {rule: rules[rule] for rule in before}
    content = {"command": "wwwserve tune", "options": options, "seed": SEED, "rules": rules, "best": best}
    write_json(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
