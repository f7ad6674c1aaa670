"""What one provider earns by another policy: `wwwserve rivals SCENARIO... --group NAME POLICY... --json FILE`.

All providers but one play the policy `--among`; the one plays another, and its gain is what that changes of its own
profit in the same market. Every provider is the one in turn. Policies of a group come from the same training with other
seeds. A group is summed up by the interquartile mean over scenarios, as in Agarwal et al. 2021 (arXiv 2108.13264), with
bootstrap intervals: one over training seeds, one over the markets of each scenario.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from wwwserve.agents.arguments import Count, File, Policies, Seed, UsageError, parse_args, refuse
from wwwserve.agents.rules import Policy
from wwwserve.agents.tariff import MARKUPS
from wwwserve.envs.distribution import KINDS, sample
from wwwserve.envs.oracle import Oracle
from wwwserve.envs.scenario import ScenarioError, load
from wwwserve.envs.state import MarketPlan, plan
from wwwserve.eval.compare import FIRST_TEST_SEED, Scenarios, check_outputs, columns, write_json
from wwwserve.eval.deviations import Deviation, Lane, Posting, constant_markups, play, summed_gains
from wwwserve.eval.metrics import CONFIDENCE, interval
from wwwserve.eval.policies import PolicyError, load_policy

PROG = "wwwserve rivals"
RANDOM = "random/"  # before the kind of random markets
RESAMPLES = 2000
Floats = NDArray[np.float64]
Groups = Mapping[str, Sequence[Deviation]]  # one a training seed
Tree = dict[str, Any]


def iqm(values: Floats, axis: int | None = None) -> Floats:
    """Interquartile mean: the mean of what is left without the lowest and the highest quarter."""
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(values, 0.25, axis=axis))


def over_training(found: Floats, rng: np.random.Generator) -> list[float] | None:
    """Bounds of the 95 % interval of the interquartile mean of gains [K, T, M] over training seeds, None with one.

    Bounds are percentiles, as `rliable` has them. But there each task has trainings of its own, which are drawn again
    task by task; here one policy plays all tasks, so that a policy is drawn with all that it gains.
    """
    mean = found.mean(axis=2)
    count = len(mean)
    drawn = rng.integers(0, count, (RESAMPLES, count))
    return _bounds(mean[drawn]) if count > 1 else None


def over_markets(found: Floats, rng: np.random.Generator) -> list[float] | None:
    """The same over the markets of each task, in which all training seeds are played; None with one market."""
    tasks, count = found.shape[1:]
    drawn = rng.integers(0, count, (RESAMPLES, tasks, count))
    resampled = found[:, np.arange(tasks)[:, None], drawn]  # [K, RESAMPLES, T, M]
    return _bounds(resampled.mean(axis=3).swapaxes(0, 1)) if count > 1 else None


def _bounds(resampled: Floats) -> list[float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    middles = iqm(resampled.reshape(len(resampled), -1), axis=1)
    return [float(x) for x in np.percentile(middles, [tail, 100 - tail])]


def gains(
    among: Policy, groups: Groups, tasks: Mapping[str, Sequence[MarketPlan]], threads: int,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Floats]:  # fmt: skip
    """By group the gains [K, T, M] of its K policies in M markets of each of T tasks.

    A gain is the sum of what providers gain, each deviating by itself, as a share of the mean sum of their profits: the
    mean provider's, weighted by profit, since some have next to none.
    """
    shape = len(tasks), len(next(iter(tasks.values())))
    found = {name: np.zeros((len(each), *shape)) for name, each in groups.items()}
    for t, (task, plans) in enumerate(tasks.items()):
        base = [each.profit for each in play(among, [Lane(each) for each in plans], threads)]
        welfare = float(np.mean([each.sum() for each in base]))
        for name, deviations in groups.items():
            for k, deviation in enumerate(deviations):
                found[name][k, t] = summed_gains(among, deviation, plans, base, threads) / welfare
        report(task)
    return found


def summary(found: Floats, tasks: Sequence[str], seed: int = 0) -> Tree:
    """What `--json` says of a group's gains [K, T, M].

    `iqm` over tasks and training seeds of the mean over markets, and its bounds `over_training`, in these very markets,
    and `over_markets`, of these very policies. `tasks` has the mean gain in each with the half-width of its interval
    over markets.
    """
    rng = np.random.default_rng(seed)
    return {
        "training_seeds": len(found),
        "iqm": float(iqm(found.mean(axis=2))),
        "over_training": over_training(found, rng),
        "over_markets": over_markets(found, rng),
        "tasks": {task: interval(each) for task, each in zip(tasks, found.mean(axis=0), strict=True)},
        "gains": found.tolist(),
    }


def table(groups: Mapping[str, Tree]) -> str:
    """Groups as text, gains in percent of own profit."""

    def bounds(pair: Sequence[float] | None) -> str:
        return "-" if pair is None else f"{100 * pair[0]:+.2f} to {100 * pair[1]:+.2f}"

    rows = [["policy", "training seeds", "gain %, IQM", "over training seeds", "over markets"]]
    for name, each in groups.items():
        seeds, middle = str(each["training_seeds"]), f"{100 * each['iqm']:+.2f}"
        rows.append([name, seeds, middle, bounds(each["over_training"]), bounds(each["over_markets"])])
    return columns(rows)


def draw_tasks(names: Sequence[str], seeds: Sequence[int]) -> dict[str, list[MarketPlan]]:
    """A market of each task with each seed; of `random/KIND`, another one. Raises ScenarioError and UsageError."""
    tasks: dict[str, list[MarketPlan]] = {}
    for name in names:
        kind = next((each for each in KINDS if name == f"{RANDOM}{each}"), None)
        if kind is None and name.startswith(RANDOM):
            raise UsageError(f"{name}: expected {RANDOM}KIND with a kind of: {', '.join(KINDS)}")
        if kind is None:
            scenario = load(name)
            tasks[name] = [plan(scenario, seed) for seed in seeds]
        else:
            rng = np.random.default_rng((seeds[0], KINDS.index(kind)))
            tasks[name] = [plan(sample(kind, rng), seed) for seed in seeds]
    return tasks


@dataclass
class Args:
    """Measure what one provider earns by another policy than all others play."""

    scenarios: Scenarios = ()
    """names of packaged scenarios, or files; random/KIND for another market of a kind with each seed"""
    among: Annotated[str, tyro.conf.arg(metavar="NAME|BUNDLE")] = "competitive"
    """what the others play, and what the one is compared with"""
    asking: Annotated[float | None, tyro.conf.arg(metavar="MARKUP")] = None
    """the markup that all of them post, and the one too where it keeps to `--among`; default: what `--among` posts"""
    group: Annotated[Policies, tyro.conf.arg(metavar="NAME POLICY...")] = ()
    """a name, then policies, or bundles, from the same training with other seeds; may be given again"""
    markups: bool = False
    """every constant markup, too, beside the routes of `--among`"""
    seeds: Count = 8
    """markets of each scenario"""
    first_seed: Seed = FIRST_TEST_SEED
    """the seeds are this one and those that follow; `wwwserve train` draws its own below a million"""
    threads: Count = os.cpu_count() or 1
    """CPU threads"""
    json: File = None
    """write the results to this file"""


def _player(argument: str) -> Policy:
    policy = load_policy(argument)
    if isinstance(policy, Oracle):
        raise UsageError(f"{argument!r} sees everything, expected a policy that a provider can play")
    return policy


def _asking(policy: Policy, markup: float | None) -> Policy:
    if markup is None:
        return policy
    if markup not in MARKUPS:
        raise UsageError(f"--asking is {markup:g}, expected one of {', '.join(f'{each:g}' for each in MARKUPS)}")
    return Posting(policy, int(np.argmax(markup == MARKUPS)))


def _groups(args: Args) -> Groups:
    groups: dict[str, Sequence[Deviation]] = {}
    for name, *policies in args.group:
        if not policies:
            raise UsageError(f"--group {name!r}, expected a name and policies")
        if name in groups:
            raise UsageError(f"--group {name!r} is given twice")
        groups[name] = [Deviation(each, policy=_player(each)) for each in policies]
    if args.markups:
        groups |= {each.name: [each] for each in constant_markups()}
    if not groups:
        raise UsageError("nothing to play: expected --group or --markups")
    return groups


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
        if not args.scenarios:
            raise UsageError("no scenario is given")
        groups = _groups(args)
        check_outputs(args.json, None)
        tasks = draw_tasks(args.scenarios, range(args.first_seed, args.first_seed + args.seeds))
        among = _asking(_player(args.among), args.asking)
    except (UsageError, ScenarioError, PolicyError) as error:
        return refuse(PROG, error)
    found = gains(among, groups, tasks, args.threads, lambda line: print(line, file=sys.stderr, flush=True))
    result = {name: summary(each, list(tasks)) for name, each in found.items()}
    print(table(result))
    if args.json is not None:
        about = {"among": among.name, "first_seed": args.first_seed, "seeds": args.seeds, "tasks": list(tasks)}
        write_json(args.json, about | {"groups": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
