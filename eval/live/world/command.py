"""Real nodes among faults and adversaries, history after history: `python -m wwwserve.eval.live.world.command`.

A seed is a whole history, and one that violates an invariant is printed with its seed; `--replay` plays it again.
"""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from wwwserve.agents.arguments import Count, File, Seed, UsageError, parse_args, refuse
from wwwserve.agents.protocol import MICRO
from wwwserve.eval.compare import write_json
from wwwserve.eval.live.world.adversaries import ADVERSARIES
from wwwserve.eval.live.world.history import Report, draw, play
from wwwserve.eval.live.world.invariants import Dealing

PROG = "wwwserve world"

_SHOWN = {
    "dealings": "dealings", "most_lost_of_exposure": "most lost", "most_lost_of_exposure_with_restarts": "restarts",
    "gain": "gain", "income": "income", "spent": "spent",
}  # fmt: skip


class Figures:
    """Of many histories."""

    def __init__(self) -> None:
        self.histories = self.violated = self.messages = 0
        self.virtual_s = 0.0
        self.faults: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.violations: list[dict[str, Any]] = []
        self._dealings: defaultdict[str, list[Dealing]] = defaultdict(list)

    def add(self, report: Report) -> None:
        """One more."""
        self.histories += 1
        self.violated += bool(report.violations)
        self.messages += report.messages
        self.virtual_s += report.virtual_s
        self.faults += report.faults
        self.ends += report.ends
        if report.violations:
            self.violations.append(
                {"seed": report.seed, "adversaries": report.adversaries, "violations": report.violations}
            )
        for each in report.dealings:
            self._dealings[each.adversary].append(each)

    def table(self, wall_s: float) -> dict[str, Any]:
        """All of them."""
        return {
            "histories": self.histories, "violated": self.violated, "per_minute": round(60 * self.histories / wall_s),
            "virtual_s": round(self.virtual_s), "messages": self.messages, "faults": sum(self.faults.values()),
            "by_fault": dict(sorted(self.faults.items())), "ends": dict(sorted(self.ends.items())),
            "adversaries": {name: _losses(each) for name, each in sorted(self._dealings.items())},
            "violations": self.violations,
        }  # fmt: skip


def _losses(dealings: Sequence[Dealing]) -> dict[str, float]:
    """What honest nodes lost to a kind of peer, in shares of their exposure, and what the peer had of it, in credits a
    dealing."""

    def mean(amounts: Iterable[int]) -> float:
        return round(sum(amounts) / len(dealings) / MICRO, 6)

    alone = [each for each in dealings if each.runs == 1]
    return {
        "dealings": len(dealings),
        "most_lost_of_exposure": round(max((each.lost / each.exposure for each in alone), default=0.0), 3),
        "most_lost_of_exposure_with_restarts": round(max(each.lost / each.exposure for each in dealings), 3),
        "gain": mean(each.gain for each in dealings),
        "income": mean(each.income for each in dealings),
        "spent": mean(each.spent for each in dealings),
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
    replay: Annotated[int | None, tyro.conf.arg(metavar="SEED")] = None
    """play this history alone, and print what came of it"""
    json: File = None
    """write the figures to this file"""

    def check(self) -> None:
        """Raises UsageError for adversaries that there are not."""
        for name in self.adversaries:
            if name not in ADVERSARIES:
                raise UsageError(f"--adversaries has {name!r}, expected some of {', '.join(ADVERSARIES)}")


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
        report = play(draw(seed, args.adversaries, honest=args.honest))
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
        f"{table['faults']} faults, {table['messages']} messages"
    )
    print(f"{'adversary':<12} " + " ".join(f"{name:>9}" for name in _SHOWN.values()))
    for name, row in table["adversaries"].items():
        print(f"{name:<12} " + " ".join(f"{row[key]:>9}" for key in _SHOWN))


if __name__ == "__main__":
    sys.exit(main())
