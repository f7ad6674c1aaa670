"""Real nodes among faults and adversaries, history after history: `python -m wwwserve.eval.live.world.command`.

A seed is a whole history, and one that violates an invariant is printed with its seed; `--replay` plays it again.
`--alone` shows whether anybody is better off for cheating: each adversary plays the same seeds without the others, and
what it earns is set beside what an honest node earns in its place.
"""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from wwwserve.agents.arguments import Count, File, Range, Seed, UsageError, parse_args, refuse
from wwwserve.agents.protocol import MICRO
from wwwserve.eval.compare import write_json
from wwwserve.eval.live.world.earnings import Earning
from wwwserve.eval.live.world.history import Report, draw, play
from wwwserve.eval.live.world.invariants import Dealing
from wwwserve.eval.live.world.roster import ADVERSARIES
from wwwserve.eval.metrics import interval, paired_ci

PROG = "wwwserve world"

_SHOWN = {
    "dealings": "dealings", "most_lost_of_exposure": "most lost", "most_lost_of_exposure_with_restarts": "restarts",
    "gain": "gain", "income": "income", "spent": "spent", "closings": "closings",
    "earned": "earned",
}  # fmt: skip
_BESIDE = {"honest_earned": "honest", "better_off": "better", "better_off_ci95": "+-", "staked_lost": "stake"}


class Figures:
    """Of many histories."""

    def __init__(self) -> None:
        self.histories = self.violated = self.messages = self.verdicts = 0
        self.virtual_s = 0.0
        self.faults: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.violations: list[dict[str, Any]] = []
        self._dealings: defaultdict[str, list[Dealing]] = defaultdict(list)
        self._earned: defaultdict[str, list[Earning]] = defaultdict(list)  # by strategy, the mean of each history
        self._beside: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, report: Report) -> None:
        """One more."""
        self.histories += 1
        self.violated += bool(report.violations)
        self.messages += report.messages
        self.verdicts += report.duels
        self.virtual_s += report.virtual_s
        self.faults += report.faults
        self.ends += report.ends
        if report.violations:
            self.violations.append(
                {"seed": report.seed, "adversaries": report.adversaries, "violations": report.violations}
            )
        for each in report.dealings:
            self._dealings[each.adversary].append(each)
        for name in {each.strategy for each in report.earnings}:
            self._earned[name].append(_mean([each for each in report.earnings if each.strategy == name]))

    def compare(self, report: Report, honest: Report) -> None:
        """Set what one adversary earned beside what honest nodes did in its places; of histories of one seed."""
        if report.earnings:
            beside = _mean(report.earnings).total, _mean(honest.earnings).total
            self._beside[report.earnings[0].strategy].append(beside)

    def table(self, wall_s: float) -> dict[str, Any]:
        """All of them."""
        return {
            "histories": self.histories, "violated": self.violated, "per_minute": round(60 * self.histories / wall_s),
            "virtual_s": round(self.virtual_s), "messages": self.messages, "verdicts": self.verdicts,
            "faults": sum(self.faults.values()),
            "by_fault": dict(sorted(self.faults.items())), "ends": dict(sorted(self.ends.items())),
            "adversaries": {name: self._row(name) for name in sorted({*self._dealings, *self._earned})},
            "violations": self.violations,
        }  # fmt: skip

    def _row(self, name: str) -> dict[str, float | None]:
        dealings = self._dealings.get(name, [])  # none with those to whom nothing was granted
        return {"dealings": len(dealings)} | (_losses(dealings) if dealings else {}) | self._earnings(name)

    def _earnings(self, name: str) -> dict[str, float | None]:
        """What a node of a strategy earns in a history, credits, and by how much it is better off than honest ones;
        None where nothing was measured."""
        earned, beside = self._earned[name], self._beside[name]
        table: dict[str, Sequence[float]] = {
            "earned": [each.total for each in earned], "credit_earned": [each.credit for each in earned],
            "value_earned": [each.value for each in earned], "work_done": [each.work for each in earned],
            "staked_lost": [each.staked for each in earned], "honest_earned": [honest for _, honest in beside],
        }  # fmt: skip
        found = {key: _credits(interval(values)[0]) if values else None for key, values in table.items()}
        better, spread = paired_ci(*zip(*beside, strict=True)) if len(beside) > 1 else (None, None)
        return found | {"better_off": _credits(better), "better_off_ci95": _credits(spread)}


def _credits(micro: float | None) -> float | None:
    return None if micro is None else round(micro / MICRO, 6)


def _mean(earnings: Sequence[Earning]) -> Earning:
    """Of the nodes of one history, who play alike."""
    parts = [sum(part) // len(earnings) for part in zip(*(each[1:] for each in earnings), strict=True)]
    return Earning(earnings[0].strategy, *parts)


def _losses(dealings: Sequence[Dealing]) -> dict[str, float]:
    """What honest nodes lost to a kind of peer, in shares of their exposure, and what the peer had of it, in credits a
    dealing."""

    def mean(amounts: Iterable[int]) -> float:
        return round(sum(amounts) / len(dealings) / MICRO, 6)

    alone = [each for each in dealings if each.runs == 1]
    return {
        "most_lost_of_exposure": round(max((each.lost / each.exposure for each in alone), default=0.0), 3),
        "most_lost_of_exposure_with_restarts": round(max(each.lost / each.exposure for each in dealings), 3),
        "gain": mean(each.gain for each in dealings),
        "income": mean(each.income for each in dealings),
        "spent": mean(each.spent for each in dealings),
        "closings": round(sum(each.closings for each in dealings) / len(dealings), 3),
    }


@dataclass
class Args:
    """Play histories of real nodes on virtual time, among faults and adversaries, and check what must hold."""

    histories: Count = 100
    """histories to play"""
    seed: Seed = 0
    """of the first one; the others follow"""
    adversaries: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = tuple(ADVERSARIES)
    """that take part, with others or alone, up to a third of the nodes"""
    honest: bool = False
    """play the same histories with an honest node in each adversary's place"""
    alone: bool = False
    """play each adversary without the others, and an honest node in its place, on the same seeds"""
    duels: Annotated[float, Range(0.0, 1.0)] = 0.0
    """chance of a request that is handed over to go to two, whose answers are judged, in histories of 5 to 9 nodes"""
    replay: Annotated[int | None, tyro.conf.arg(metavar="SEED")] = None
    """play this history alone, and print what came of it"""
    json: File = None
    """write the figures to this file"""

    def check(self) -> None:
        """Raises UsageError for adversaries that there are not, and what does not go together."""
        for name in self.adversaries:
            if name not in ADVERSARIES:
                raise UsageError(f"--adversaries has {name!r}, expected some of {', '.join(ADVERSARIES)}")
        if self.alone and (self.honest or self.replay is not None):
            raise UsageError("--alone goes with neither --honest nor --replay")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 if an invariant was violated."""
    try:
        args = parse_args(Args, PROG, argv)
        args.check()
    except UsageError as error:
        return refuse(PROG, error)
    seeds = range(args.seed, args.seed + args.histories) if args.replay is None else [args.replay]
    figures, start_s = Figures(), time.perf_counter()
    for seed in seeds:
        if args.alone:
            honest = play(draw(seed, args.adversaries[:1], honest=True, duels=args.duels))
            reports = [play(draw(seed, (name,), duels=args.duels)) for name in args.adversaries]
            for report in reports:
                figures.compare(report, honest)
            reports.append(honest)
        else:
            reports = [play(draw(seed, args.adversaries, honest=args.honest, duels=args.duels))]
        for report in reports:
            figures.add(report)
            for violation in report.violations:
                print(f"seed {seed} {'+'.join(report.adversaries) or 'honest'}: {violation}", flush=True)
            if args.replay is not None:
                print(f"digest {report.digest}, {report.messages} messages, {report.virtual_s:.1f} s")
    _show(figures.table(time.perf_counter() - start_s))
    if args.json:
        write_json(args.json, figures.table(time.perf_counter() - start_s))
    return int(figures.violated > 0)


def _show(table: dict[str, Any]) -> None:
    print(
        f"{table['histories']} histories, {table['violated']} violated, {table['per_minute']} a minute, "
        f"{table['faults']} faults, {table['messages']} messages, {table['verdicts']} verdicts"
    )
    rows = table["adversaries"]
    shown = _SHOWN | (_BESIDE if any(row["better_off"] is not None for row in rows.values()) else {})
    print(f"{'adversary':<12} " + " ".join(f"{name:>9}" for name in shown.values()))
    for name, row in rows.items():
        cells = (row.get(key) for key in shown)
        print(f"{name:<12} " + " ".join(f"{'' if cell is None else cell:>9}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
