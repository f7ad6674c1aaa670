"""Whether a coalition can buy verdicts: `wwwserve coalition --tries 10000`.

In each try, members of a network have random stakes, and some of them, with as much of the stake as `--share` allows,
stand together. They are the origin and one executor of a duel, redraw it as often as they may, vote against the honest
executor, and leave out the votes of honest judges for it. Honest judges are wrong with the chance `--errors`. The rules
are those that nodes have, `serving.ledger.stakes`; signatures, which cannot be forged, are left out. In such networks
a worthless provider of the coalition then duels honest ones for honest origins, and the coalition votes for it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from wwwserve.agents.arguments import Count, File, Range, Seed, UsageError, parse_args, refuse
from wwwserve.agents.protocol import MICRO, VOTE_A, VOTE_B
from wwwserve.eval.compare import write_json
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import digest
from wwwserve.serving.ledger.verdicts import Answer, Case, DuelOpening, Party, Stake, Staked, Verdict, Vote, committed

PROG = "wwwserve coalition"
FUNDS = 100.0  # mean of what a member may stake, credits
PANEL = 3  # judges who are asked first
MOST_DUELS = 200  # of one worthless provider


class Network(NamedTuple):
    """Members of a genesis, by name, and those of them that stand together."""

    stakes: Stakes
    coalition: list[str]
    honest: list[str]


def network(generator: np.random.Generator, count: int, share: float, spread: float) -> Network:
    """A random one of `count` members, of whom some with at most this share of the stake are the coalition. `spread` is
    the standard deviation of the logarithm of a stake."""
    amounts = np.exp(generator.normal(0.0, spread, count))
    funds = {f"n{k:03d}": max(1, round(FUNDS * MICRO * a / amounts.mean())) for k, a in enumerate(amounts)}
    left, coalition = int(share * sum(funds.values())), []
    for name in generator.permutation(list(funds)).tolist():
        if funds[name] <= left:
            coalition.append(name)
            left -= funds[name]
    return Network(Stakes(funds, agreed=True), coalition, [name for name in funds if name not in coalition])


def case_of(stakes: Stakes, origin: str, executors: tuple[str, str], nonce: str) -> Case:
    """A duel, in which each has all that it may stake at stake, after all verdicts so far."""
    a, b = sorted(executors)
    one, other = (Party(name, committed(f"{name} {nonce}")) for name in (a, b))
    bond = _staked(stakes, origin, nonce)
    opening = DuelOpening(origin, stakes.epoch, digest(b""), one, other, committed(nonce), bond)
    answers = [
        Answer(name, opening.name(), digest(name.encode()), f"{name} {nonce}", _staked(stakes, name, nonce))
        for name in (a, b)
    ]
    return Case(opening, nonce, 1 + stakes.height(a, b), *answers)


def _staked(stakes: Stakes, name: str, nonce: str) -> Staked:
    latest = stakes.latest.get(name)
    amount = stakes.funds[name]
    if latest is None or stakes.stake(name) != amount:
        latest = Staked(Stake(name, stakes.next_number(name, amount), amount), nonce)
        stakes.heard(latest)
    return latest


def verdict_on(case: Case, judges: Sequence[str], vote: int) -> Verdict:
    """All these judges vote alike."""
    return Verdict(case, tuple(Vote(case.name(), judge, vote) for judge in judges))


def attack(generator: np.random.Generator, net: Network, errors: float, redraws: int) -> tuple[float, bool]:
    """The coalition tries to slash an honest member. Returns the share of what it needed that it got, 1 or less for
    nothing, and whether it had its way."""
    stakes, (origin, rival) = net.stakes, generator.choice(net.coalition, 2, replace=False).tolist()
    victim = max(net.honest, key=lambda name: stakes.started[name]) if generator.random() < 0.5 else None
    victim = victim or str(generator.choice(net.honest))
    cases = [case_of(stakes, origin, (rival, victim), f"{generator.random()}") for _ in range(redraws)]
    ours = set(net.coalition)
    juries = [stakes.jury(case) for case in cases]
    weights = [sum(w for name, w in jury.weights.items() if name in ours) for jury in juries]
    best = int(np.argmax(weights))
    case, jury = cases[best], juries[best]
    against = VOTE_B if case.a.executor == victim else VOTE_A
    wrong = generator.random(len(jury.weights)) < errors
    cast = [name for name, errs in zip(jury.weights, wrong, strict=True) if name in ours or errs]
    before = stakes.funds[victim]
    stakes.heard(verdict_on(case, cast, against))
    got = sum(jury.weights[name] for name in cast) / (jury.needed + 1) if jury.weights else 0.0
    return got, stakes.funds[victim] < before


def shield(generator: np.random.Generator, net: Network, errors: float) -> int | None:
    """Duels until a worthless member of the coalition has nothing left, though the others vote for it; None if it has
    something after `MOST_DUELS`."""
    stakes, worthless, ours = net.stakes, str(generator.choice(net.coalition)), set(net.coalition)
    for number in range(1, MOST_DUELS + 1):
        origin, rival = generator.choice(net.honest, 2, replace=False).tolist()
        case = case_of(stakes, origin, (worthless, rival), f"{generator.random()}")
        jury = stakes.jury(case)
        judges = list(jury.weights)
        right = [name not in ours and generator.random() >= errors for name in judges]
        if 2 * sum(right[:PANEL]) <= len(right[:PANEL]):
            continue  # the origin asks no more of them
        against = VOTE_B if case.a.executor == worthless else VOTE_A
        stakes.heard(verdict_on(case, [name for name, sees in zip(judges, right, strict=True) if sees], against))
        if stakes.funds[worthless] == 0:
            return number
    return None


def measure(
    count: int, tries: int, *, share: float, spread: float, errors: float, redraws: int, worthless: int, seed: int
) -> dict[str, Any]:
    """What becomes of honest and of worthless members of networks of `count`."""
    generator = np.random.default_rng((seed, count))
    got, slashed, made = [], 0, 0
    while made < tries:
        net = network(generator, count, share, spread)
        if len(net.coalition) < 2 or len(net.honest) < 1:
            continue
        made += 1
        reached, lost = attack(generator, net, errors, redraws)
        got.append(reached)
        slashed += lost
    duels: list[int | None] = []
    while len(duels) < worthless:
        net = network(generator, count, share, spread)
        if net.coalition and len(net.honest) >= 2:
            duels.append(shield(generator, net, errors))
    ended = [each for each in duels if each is not None]
    return {
        "tries": made, "slashed": slashed, "most_of_what_is_needed": round(max(got, default=0.0), 3),
        "worthless": len(duels), "worthless_lost_all": len(ended),
        "duels_until_then": [float(np.quantile(ended, q)) for q in (0.5, 0.95)] if ended else None,
    }  # fmt: skip


@dataclass
class Args:
    """Measure whether a coalition of members can take an honest one's stake, or keep a worthless one's."""

    members: tuple[Annotated[int, Range(6, 500)], ...] = (6, 9, 12, 30, 100)
    """of the networks"""
    tries: Count = 10_000
    """to slash an honest member, in networks of each size"""
    worthless: Count = 200
    """providers that the coalition shields, in networks of each size"""
    share: Annotated[float, Range(0.0, 1.0)] = 1 / 3
    """of the stake that the coalition has at most"""
    spread: Annotated[float, Range(0.0, 3.0)] = 0.0
    """standard deviation of the logarithm of a member's stake; 0: all have the same"""
    errors: Annotated[float, Range(0.0, 1.0)] = 0.005
    """chance of an honest judge to be wrong, on its own"""
    redraws: Count = 10
    """duels that the coalition begins for one that it ends"""
    seed: Seed = 0
    """of all that is random"""
    json: File = None
    """write the figures to this file"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 if an honest member was slashed."""
    try:
        args = parse_args(Args, PROG, argv)
        result = {
            str(count): measure(
                count, args.tries, share=args.share, spread=args.spread, errors=args.errors, redraws=args.redraws,
                worthless=args.worthless, seed=args.seed,
            )
            for count in args.members
        }  # fmt: skip
        print(msgspec.json.format(msgspec.json.encode(result)).decode())
        if args.json:
            write_json(args.json, result)
    except UsageError as error:
        return refuse(PROG, error)
    return int(any(each["slashed"] for each in result.values()))


if __name__ == "__main__":
    sys.exit(main())
