"""What a provider gains by itself: `wwwserve game SCENARIO... --policy NAME|BUNDLE --seeds N --json FILE`.

All providers play one policy: that is the profile, with its welfare (the sum of profits) and each provider's profit,
beside what it has alone. Then one provider at a time does something else while the others keep to the policy, in the
same markets: its gain is a share of the profit that it has at the profile. The highest gain of anyone by anything
is the exploitability that was found; a learned deviator (`--deviator`, trained by `train/mappo.py --against`) makes it
more than a list of simple ideas. See `eval.collusion` for `--collusion`.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray

from wwwserve.agents.arguments import Count, File, Folder, Policies, Range, Seed, UsageError, flat, parse_args, refuse
from wwwserve.agents.rules import Policy, Rule
from wwwserve.envs.distribution import KINDS, Kind, sample
from wwwserve.envs.oracle import Oracle
from wwwserve.envs.scenario import Scenario, ScenarioError, load
from wwwserve.envs.state import MarketPlan, plan
from wwwserve.eval.collusion import Players, coalition, tacit
from wwwserve.eval.compare import FIRST_TEST_SEED, Scenarios, check_outputs, columns, write_json
from wwwserve.eval.course import Course, courses, mean_there
from wwwserve.eval.deviations import DEVIATIONS, HONEST, Deviation, Lane, copied, play, profits, summed_gains
from wwwserve.eval.metrics import interval, or_none
from wwwserve.eval.play import REQUESTS_AT_ONCE, run
from wwwserve.eval.policies import PolicyError, load_policy

PROG = "wwwserve game"
ALONE, BEST_WELFARE = "single", "omniscient"
COOPERATIVE = "trust_cap"
LEARNED = "learned"
LEAST_SHARE = 0.01  # of the mean profit of a provider: gains are shares of no less
Tree = dict[str, Any]
Gains = NDArray[np.float64]  # [I, S] of deviator and seed, as shares of own profit
Report = Callable[[str], None]
Payment = Literal["lateness", "quoted", "per_request"]
RANDOM = "random/"  # before the kind of random markets


@dataclass(frozen=True)
class Study:
    """What is asked of a scenario."""

    policy: Policy
    cooperative: Policy
    deviations: tuple[Deviation, ...] = DEVIATIONS
    learned: tuple[Policy, ...] = ()
    """Policies that were trained against the others; the best of them counts for each provider."""
    collusion: bool = False
    coalition: tuple[str, ...] = ()
    """Names of providers that may agree on a markup."""


def game(
    scenario: Scenario, study: Study, seeds: Sequence[int], *, copies: int = 1, threads: int = 1,
    report: Report = lambda line: None,
) -> Tree:  # fmt: skip
    """What providers gain by themselves in one scenario, `copies` of each: what `--json` writes for it.

    Numbers are [mean, half-width of the 95 % interval] over the seeds. `welfare`, that of the `cooperative` policy, of
    `omniscient`, and `loss`, what is missing to the cooperative one as a share of it. By provider `profit`, `alone`,
    `over_alone` (their difference) and `markup` (mean over time while requests arrive). By deviation `mean_gain` (of
    the mean provider), `worst_gain` (of the one that gains most) and all `gains`, shares of own profit.
    Of several learned deviators, what every other seed shows: see `best_of`.
    `exploitability`, `exploiter` and `exploitability_upper`: see `exploited`. `course`, means over seeds at times. With
    `collusion` and `coalition`, what `eval.collusion` finds.
    """
    whole = copied(scenario, copies)
    plans = [plan(whole, seed) for seed in seeds]
    names = [provider.name for provider in whole.providers]
    deviators = list(range(0, len(names), copies))  # of copies, all alike, the first

    runs, course = courses(study.policy, [Lane(each) for each in plans], threads)
    base = profits(runs)
    alone = profits(play(Rule(ALONE), [Lane(each) for each in plans], threads))
    cooperative = profits(play(study.cooperative, [Lane(each) for each in plans], threads)).sum(axis=1)
    welfare = base.sum(axis=1)
    report(f"{whole.name}: welfare {welfare.mean():.1f}, cooperative {cooperative.mean():.1f}")
    markup = np.array([[mean_there(each) for each in market.T] for market in course.markup])  # [S, N]
    cell: Tree = {
        "copies": copies,
        "policy": study.policy.name,
        "payment": whole.economy.payment,
        "welfare": interval(welfare),
        "cooperative": interval(cooperative),
        "omniscient": interval(_omniscient(plans, threads)),
        "loss": interval((cooperative - welfare) / cooperative.mean()),
        "providers": {
            name: {
                "profit": interval(base[:, i]),
                "alone": interval(alone[:, i]),
                "over_alone": interval(base[:, i] - alone[:, i]),
                "markup": interval(markup[:, i]),
            }
            for i, name in enumerate(names)
        },
        "deviations": {},
    }
    gains: dict[str, Gains] = {}
    for deviation in study.deviations:
        gains[deviation.name] = gains_of(study.policy, deviation, deviators, plans, base, threads)
        report(_line(deviation.name, gains[deviation.name]))
    found = [Found(name, names[i], row) for name, each in gains.items() for i, row in zip(deviators, each, strict=True)]
    tried = [
        gains_of(study.policy, Deviation(LEARNED, policy=each), deviators, plans, base, threads)
        for each in study.learned
    ]
    if tried:
        gains[LEARNED] = best_of(tried)
        report(_line(LEARNED, gains[LEARNED]))
        found += [Found(LEARNED, names[i], row) for each in tried for i, row in zip(deviators, each, strict=True)]
    cell["deviations"] = {name: _deviation(each, [names[i] for i in deviators]) for name, each in gains.items()}
    liars = [i for i in deviators if whole.providers[i].misreport is not None]
    if liars:
        honest = gains_of(study.policy, HONEST, liars, plans, base, threads)
        cell["deviations"][HONEST.name] = _deviation(honest, [names[i] for i in liars])
        found += [Found(HONEST.name, names[i], row) for i, row in zip(liars, honest, strict=True)]
    cell |= exploited(found)
    cell["course"] = _course(course, names)
    players = Players(study.policy, plans, threads)
    if study.collusion:
        cell["collusion"] = tacit(players, runs, report)
    if study.coalition:
        cell["coalition"] = coalition(players, [names.index(each) for each in study.coalition], base)
    return cell


def best_of(tried: Sequence[Gains]) -> Gains:
    """What each provider gains by the learned deviator with which it gains most.

    Of several, that is chosen by every other seed, and its gains with the rest are returned: the highest of several
    noisy means is above what any of them is expected to be.
    """
    if len(tried) == 1 or tried[0].shape[1] < 2:
        return tried[0]
    best = np.argmax([each[:, ::2].mean(axis=1) for each in tried], axis=0)
    return np.array([tried[k][row, 1::2] for row, k in enumerate(best)])


class Found(NamedTuple):
    """What one provider gains by one deviation."""

    deviation: str
    provider: str
    gains: NDArray[np.float64]  # [S] by seed, shares of own profit


def exploited(found: Sequence[Found]) -> Tree:
    """The highest gain of one provider by one deviation, at least 0, since nobody has to deviate.

    The highest of many noisy means is above what any of them is expected to be. So `exploiter`, the provider and the
    deviation that gain most, is chosen by every other seed from the first, and `exploitability` is its gain with the
    rest; below two seeds there is none. It is lower than the best deviation's gain where another one was chosen.
    `exploitability_upper` is the highest mean over all seeds, an upper estimate.
    """
    result: Tree = {"exploitability": [0.0, 0.0], "exploiter": None, "exploitability_upper": [0.0, 0.0]}
    if not found:
        return result
    gains = np.array([each.gains for each in found])
    highest = gains[gains.mean(axis=1).argmax()]
    if highest.mean() > 0.0:
        result["exploitability_upper"] = interval(highest)
    chosen = int(gains[:, ::2].mean(axis=1).argmax())
    if gains[chosen, ::2].mean() > 0.0:
        result["exploitability"] = interval(gains[chosen, 1::2])
        result["exploiter"] = {"provider": found[chosen].provider, "deviation": found[chosen].deviation}
    return result


def gains_of(
    policy: Policy, deviation: Deviation, deviators: Sequence[int], plans: Sequence[MarketPlan],
    base: NDArray[np.float64], threads: int,
) -> Gains:  # fmt: skip
    """What each deviator gains by it, paired by seed, as a share of its mean profit in `base` [S, N].

    A share of no less than `LEAST_SHARE` of the mean provider's profit: some have next to none.
    """
    lanes = [Lane(planned, (i,), (deviation,)) for i in deviators for planned in plans]
    found = profits(play(policy, lanes, threads)).reshape(len(deviators), len(plans), -1)
    mean = base.mean(axis=0)
    least = max(LEAST_SHARE * float(np.abs(mean).mean()), 1e-9)
    return np.array([(found[k, :, i] - base[:, i]) / max(abs(mean[i]), least) for k, i in enumerate(deviators)])


def family(
    kind: Kind, study: Study, seeds: Sequence[int], *, payment: Payment | None = None, threads: int = 1,
    report: Report = lambda line: None,
) -> Tree:  # fmt: skip
    """What deviations gain in random markets of a kind, another one for each seed.

    A gain is that of each provider, deviating by itself, summed over them, as a share of the mean welfare of a market:
    the mean provider's gain, weighted by profit, as the profit of one in one run may be next to nothing. Of several
    learned deviators, every other market shows the gain: see `best_of`. `alone` is the sum of what providers have
    alone.
    """
    rng = np.random.default_rng((seeds[0], KINDS.index(kind)))
    plans = [plan(_paid(sample(kind, rng), payment), seed) for seed in seeds]
    base = [each.profit for each in play(study.policy, [Lane(each) for each in plans], threads)]
    welfare = np.array([each.sum() for each in base])
    alone, cooperative = (
        np.array([each.profit.sum() for each in play(policy, [Lane(each) for each in plans], threads)])
        for policy in (Rule(ALONE), study.cooperative)
    )
    gains: dict[str, NDArray[np.float64]] = {}
    tried: list[Gains] = []
    for deviation in (*study.deviations, *(Deviation(LEARNED, policy=each) for each in study.learned)):
        found = summed_gains(study.policy, deviation, plans, base, threads) / welfare.mean()
        if deviation.name == LEARNED:
            tried.append(found[None])
        else:
            gains[deviation.name] = found
        report(f"  {deviation.name}: mean gain {100 * found.mean():+.2f} %")
    if tried:
        gains[LEARNED] = best_of(tried)[0]
    return {
        "policy": study.policy.name,
        "markets": len(plans),
        "welfare": interval(welfare),
        "alone": interval(alone),
        "cooperative": interval(cooperative),
        "loss": interval((cooperative - welfare) / cooperative.mean()),
        "deviations": {name: {"mean_gain": interval(each)} for name, each in gains.items()},
    }


def family_table(name: str, cell: Tree) -> str:
    """One kind of random market as text."""
    gains = [["deviation", "mean gain %"]]
    gains += [[deviation, _percent(each["mean_gain"])] for deviation, each in cell["deviations"].items()]
    head = (
        f"{name}: {cell['policy']}, {cell['markets']} markets; welfare {_pair(cell['welfare'], 1)}, alone "
        f"{_pair(cell['alone'], 1)}, cooperative {_pair(cell['cooperative'], 1)} (loss {_percent(cell['loss'])} %)"
    )
    return f"{head}\n{columns(gains)}"


def _omniscient(plans: Sequence[MarketPlan], threads: int) -> NDArray[np.float64]:
    at_once = max(1, REQUESTS_AT_ONCE // max(each.capacity for each in plans))
    parts = [run(plans[k : k + at_once], Oracle(BEST_WELFARE), threads) for k in range(0, len(plans), at_once)]
    return np.array([each.profit.sum() for part in parts for each in part])


def _deviation(gains: Gains, deviators: Sequence[str]) -> Tree:
    """Mean over deviators, and the one that gains most."""
    worst = int(gains.mean(axis=1).argmax())
    return {
        "mean_gain": interval(gains.mean(axis=0)),
        "worst_gain": interval(gains[worst]),
        "gains": {name: interval(each) for name, each in zip(deviators, gains, strict=True)},
    }


def _line(name: str, gains: Gains) -> str:
    return f"  {name}: mean gain {100 * gains.mean():+.2f} %, worst {100 * gains.mean(axis=1).max():+.2f} %"


def _course(course: Course, names: Sequence[str]) -> Tree:
    """Means over seeds; None where a provider is offline."""
    shown: Tree = {"time_s": course.time_s.tolist()}
    for key in ("markup", "price"):
        values = getattr(course, key)
        online = ~np.isnan(values)
        mean = np.where(online, values, 0.0).sum(axis=0) / np.maximum(online.sum(axis=0), 1)
        mean[~online.any(axis=0)] = np.nan
        shown[key] = {name: [or_none(round(x, 5)) for x in mean[:, i].tolist()] for i, name in enumerate(names)}
    return shown


def table(name: str, cell: Tree) -> str:
    """One scenario's results as text: credits, gains in percent of own profit."""
    rows = [["provider", "profit", "alone", "over alone", "markup"]]
    for provider, each in cell["providers"].items():
        rows.append(
            [
                provider,
                _pair(each["profit"], 1),
                _pair(each["alone"], 1),
                _pair(each["over_alone"], 1, "+"),
                _pair(each["markup"], 2),
            ]
        )
    gains = [["deviation", "mean gain %", "worst gain %", "of"]]
    for deviation, each in cell["deviations"].items():
        worst = max(each["gains"], key=lambda who: each["gains"][who][0])
        gains.append([deviation, _percent(each["mean_gain"]), _percent(each["worst_gain"]), worst])
    head = (
        f"{name}: {cell['policy']}, paid by {cell['payment']}; welfare {_pair(cell['welfare'], 1)}, cooperative "
        f"{_pair(cell['cooperative'], 1)} (loss {_percent(cell['loss'])} %), omniscient {_pair(cell['omniscient'], 1)}"
    )
    parts = [head, columns(rows), columns(gains), _exploited(cell)]
    if "collusion" in cell:
        parts.append(_collusion(cell["collusion"]))
    if "coalition" in cell:
        shown = ", ".join(f"{key} {_percent(gain)}" for key, gain in cell["coalition"]["gains"].items())
        parts.append(f"{' and '.join(cell['coalition']['members'])} together gain, in %: {shown}")
    return "\n".join(parts)


def _exploited(cell: Tree) -> str:
    who = cell["exploiter"]
    by = f" ({who['provider']} by {who['deviation']}, chosen with the other seeds)" if who else ""
    upper = _percent(cell["exploitability_upper"])
    return f"exploitability {_percent(cell['exploitability'])} %{by}; upper estimate {upper} %"


def _collusion(found: Tree) -> str:
    if found["delta"] is None:
        return "profit gain of tacit collusion: no sellers, or a common markup brings them no more than competition"
    cut = found["cut"]
    return (
        f"profit gain of tacit collusion {_pair(found['delta'], 2)} (best responses "
        f"{', '.join(f'{x:g}' for x in found['best_response'].values())}; joint {found['joint_markup']:g}); when "
        f"{cut['seller']} cuts its price the others change their markup by {_pair(cut['response'], 2, '+')}, after it "
        f"by {_pair(cut['response_after'], 2, '+')}"
    )


def _pair(pair: Sequence[float | None], digits: int, sign: str = "") -> str:
    mean, half = pair
    if mean is None:
        return "-"
    return f"{mean:{sign}.{digits}f}" + (f" ±{half:.{digits}f}" if half is not None else "")


def _percent(pair: Sequence[float | None]) -> str:
    return _pair([None if x is None else 100 * x for x in pair], 1, "+")


@dataclass
class Args:
    """Measure what a provider gains by itself."""

    scenarios: Scenarios = ()
    """names of packaged scenarios, or files; random/KIND for a random market of a kind with each seed, of which
    deviations alone are measured"""
    policy: Annotated[str, tyro.conf.arg(metavar="NAME|BUNDLE")] = "best_value"
    """what all providers play: a rule, learned, or the folder of a bundle"""
    cooperative: Annotated[str, tyro.conf.arg(metavar="NAME|BUNDLE")] = COOPERATIVE
    """what they would play as a team: its welfare is the yardstick"""
    deviator: Policies = ()
    """bundles trained against the policy: the best of them, for each provider, is the learned deviator; it is chosen by
    every other seed, and its gain is that with the rest"""
    deviations: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME...")] = None
    """only these deviations, none if no name follows; default: all"""
    copies: Annotated[tuple[int, ...], Range(1), tyro.conf.arg(metavar="N...")] = (1,)
    """so many of each provider, one number after the other"""
    payment: Payment | None = None
    """what a delegated request costs, in place of the scenario's"""
    collusion: bool = False
    """look for tacit collusion, too"""
    coalition: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROVIDER...")] = ()
    """what these providers gain by agreeing on a markup"""
    seeds: Count = 10
    """runs of everything in each scenario"""
    first_seed: Seed = FIRST_TEST_SEED
    """the seeds are this one and those that follow; `wwwserve train` draws its own below a million"""
    threads: Count = os.cpu_count() or 1
    """CPU threads"""
    json: File = None
    """write the results to this file"""
    figures: Folder = None
    """draw the results as PNG and SVG into this folder"""


def _kinds(names: Sequence[str]) -> list[Kind]:
    """The kinds of random market among what is asked for."""
    kinds = [name.removeprefix(RANDOM) for name in names if name.startswith(RANDOM)]
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"{RANDOM}{kind}: expected {RANDOM}KIND with a kind of: {', '.join(KINDS)}")
    return [kind for kind in KINDS if kind in kinds]


def _study(args: Args, scenarios: Sequence[Scenario]) -> Study:
    if not args.scenarios:
        raise UsageError("no scenario is given")
    if len(set(args.scenarios)) < len(args.scenarios) or len({each.name for each in scenarios}) < len(scenarios):
        raise UsageError("a scenario is given twice")
    deviations = {each.name: each for each in DEVIATIONS}
    chosen = tuple(deviations) if args.deviations is None else args.deviations
    for name in chosen:
        if name not in deviations:
            raise UsageError(f"--deviations {name!r}, expected of: {', '.join(deviations)}")
    for each in scenarios:
        unknown = set(args.coalition) - {provider.name for provider in each.providers}
        if unknown:
            raise UsageError(f"--coalition {sorted(unknown)[0]!r} is no provider of {each.name}")
    return Study(
        policy=_player(args.policy),
        cooperative=_player(args.cooperative),
        deviations=tuple(deviations[name] for name in chosen),
        learned=tuple(_player(each) for each in flat(args.deviator)),
        collusion=args.collusion,
        coalition=args.coalition,
    )


def _paid(scenario: Scenario, payment: Payment | None) -> Scenario:
    """The scenario with another payment, if one is given."""
    return scenario if payment is None else replace(scenario, economy=replace(scenario.economy, payment=payment))


def _player(argument: str) -> Policy:
    policy = load_policy(argument)
    if isinstance(policy, Oracle):
        raise UsageError(f"{argument!r} sees everything, expected a policy that a provider can play")
    return policy


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
        kinds = _kinds(args.scenarios)
        scenarios = [load(name) for name in args.scenarios if not name.startswith(RANDOM)]
        study = _study(args, scenarios)
        check_outputs(args.json, args.figures)
    except (UsageError, ScenarioError, PolicyError) as error:
        return refuse(PROG, error)
    scenarios = [_paid(each, args.payment) for each in scenarios]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    result: Tree = {"first_seed": args.first_seed, "seeds": args.seeds, "scenarios": {}, "families": {}}

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    for kind in kinds:
        found = family(kind, study, seeds, payment=args.payment, threads=args.threads, report=report)
        result["families"][f"{RANDOM}{kind}"] = found
        print(family_table(f"{RANDOM}{kind}", found), end="\n\n", flush=True)
    for scenario in scenarios:
        for copies in dict.fromkeys(args.copies):
            start_s = time.perf_counter()
            name = copied(scenario, copies).name
            result["scenarios"][name] = cell = game(
                scenario, study, seeds, copies=copies, threads=args.threads, report=report
            )
            print(table(name, cell), end="\n\n", flush=True)
            report(f"{name}: {time.perf_counter() - start_s:.1f} s")
    if args.json is not None:
        write_json(args.json, result)
    if args.figures is not None and result["scenarios"]:
        from wwwserve.eval import figures

        figures.draw_game(result, args.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
