"""Whether sellers collude without a word: their profit between that of competition and of one price for all, and what
the others do when one of them cuts its price (Calvano et al. 2020, section 4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.decision import AT_COST
from wwwserve.agents.rules import Policy
from wwwserve.agents.tariff import MARKUPS
from wwwserve.envs.state import MarketPlan
from wwwserve.eval.course import Course, courses, mean_there
from wwwserve.eval.deviations import CHEAPEST, Deviation, Lane, constant_markups, play, profits
from wwwserve.eval.metrics import interval, mean_ci, or_none
from wwwserve.eval.play import Run

SWEEPS = 4  # of best responses, at most
CUT_S = 60.0  # or a fifth of the time in which requests arrive, if that is less
AROUND_S = 120.0  # shown before and after a cut
Tree = dict[str, Any]


@dataclass(frozen=True)
class Players:
    """Those who are studied: a policy that routes for all, and the markets that they meet in, one a seed."""

    policy: Policy
    plans: Sequence[MarketPlan]
    threads: int

    def profits(self, profiles: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Profits [P, S, N] where each provider has a markup, an index, that stays: `profiles` [P][N]."""
        constant = constant_markups()
        lanes = [
            Lane(planned, tuple(range(len(markups))), tuple(constant[k] for k in markups))
            for markups in profiles
            for planned in self.plans
        ]
        runs = profits(play(self.policy, lanes, self.threads))
        return runs.reshape(len(profiles), len(self.plans), -1)


def balance_of(runs: Sequence[Run]) -> NDArray[np.float64]:
    """How many more requests each provider ran for others than others ran for it, over all runs [N]."""
    balance = np.zeros(runs[0].profit.size)
    for each in runs:
        origin, executor = each.requests.origin, each.requests.executor
        moved = (executor >= 0) & (executor != origin)
        balance += np.bincount(executor[moved], minlength=balance.size)
        balance -= np.bincount(origin[moved], minlength=balance.size)
    return balance


def best_responses(players: Players, report: Callable[[str], None] = lambda line: None) -> list[int]:
    """Markups, indices [N], that are best responses to each other: from cost, each provider in turn takes the one with
    the highest mean profit of those that are better than its own for sure (the paired 95 % interval is above zero),
    until none changes its own or `SWEEPS` are over."""
    count = len(players.plans[0].profiles)
    markups = [AT_COST] * count
    for sweep in range(SWEEPS):
        before = list(markups)
        for i in range(count):
            profiles = [[*markups[:i], k, *markups[i + 1 :]] for k in range(MARKUPS.size)]
            own = players.profits(profiles)[:, :, i]
            gains = [mean_ci(each) for each in own - own[markups[i]]]
            better = [k for k, (mean, half) in enumerate(gains) if mean > half]
            markups[i] = max(better, key=lambda k: gains[k][0], default=markups[i])
        report(f"best responses, sweep {sweep + 1}: {' '.join(f'{MARKUPS[k]:g}' for k in markups)}")
        if markups == before:
            break
    return markups


def tacit(players: Players, runs: Sequence[Run], report: Callable[[str], None] = lambda line: None) -> Tree:
    """What `eval.game --collusion` finds; `runs` are of the policy with its own markups.

    `delta`, the profit gain, is that of the sellers over their profit at best responses, as a share of what the best
    common markup brings over it: 0 is competition, 1 a cartel. None where nobody sells, or it is not sure that a common
    markup brings more than competition.
    """
    names = [provider.name for provider in players.plans[0].scenario.providers]
    balance = balance_of(runs)
    sellers = np.flatnonzero(balance > 0).tolist()
    if not sellers:
        return {"sellers": [], "delta": None}
    competing = best_responses(players, report)
    common = [[k] * len(names) for k in range(MARKUPS.size)]
    total = players.profits([competing, *common])[:, :, sellers].sum(axis=2)
    joint = 1 + int(total[1:].mean(axis=1).argmax())
    played = profits(runs)[:, sellers].sum(axis=1)
    room, half = mean_ci(total[joint] - total[0])
    return {
        "sellers": [names[i] for i in sellers],
        "best_response": {name: float(MARKUPS[k]) for name, k in zip(names, competing, strict=True)},
        "joint_markup": float(MARKUPS[joint - 1]),
        "profit": interval(played),
        "best_response_profit": interval(total[0]),
        "joint_profit": interval(total[joint]),
        "delta": interval((played - total[0]) / room) if room > half else None,
        "cut": price_cut(players, int(balance.argmax()), sellers),
    }


def price_cut(players: Players, first: int, sellers: Sequence[int]) -> Tree:
    """What the others do when provider `first` is made to sell as cheaply as it can for `CUT_S`, in the middle of the
    time in which requests arrive: mean markups before and after, with and without the cut. The others are the other
    sellers, or all where there are none."""
    planned = players.plans[0]
    others = [i for i in sellers if i != first] or [i for i in range(len(planned.profiles)) if i != first]
    from_s = 0.5 * planned.scenario.duration_s
    until_s = from_s + min(CUT_S, 0.2 * planned.scenario.duration_s)
    cut = Deviation("price cut", markup=CHEAPEST, from_s=from_s, until_s=until_s)
    with_cut, without = (
        _course(players, [Lane(plan, *who) for plan in players.plans]) for who in (((first,), (cut,)), ((), ()))
    )
    time_s = without.time_s
    shown = (time_s >= from_s - AROUND_S) & (time_s <= until_s + AROUND_S)
    during = (time_s >= from_s) & (time_s < until_s)
    after = (time_s >= until_s) & (time_s <= until_s + AROUND_S)
    change = (with_cut.markup - without.markup)[:, :, others]
    return {
        "seller": planned.scenario.providers[first].name,
        "others": [planned.scenario.providers[i].name for i in others],
        "from_s": from_s,
        "until_s": until_s,
        "response": interval([mean_there(each) for each in change[:, during]]),
        "response_after": interval([mean_there(each) for each in change[:, after]]),
        "time_s": time_s[shown].tolist(),
        "forced": _path(with_cut.markup[:, shown, first : first + 1]),
        "others_markup": _path(with_cut.markup[:, shown][:, :, others]),
        "others_without": _path(without.markup[:, shown][:, :, others]),
    }


def _path(markup: NDArray[np.float64]) -> list[float | None]:
    """Mean markup at each time, of [S, T, n]; None where all are offline."""
    return [or_none(mean_there(each)) for each in markup.swapaxes(0, 1)]


def _course(players: Players, lanes: Sequence[Lane]) -> Course:
    return courses(players.policy, lanes, players.threads)[1]


def coalition(players: Players, members: Sequence[int], base: NDArray[np.float64]) -> Tree:
    """What `members` gain together, as shares of the profit that they have at the policy's own markups, `base` [S, N],
    by agreeing on one markup."""
    constant = constant_markups()
    lanes = [Lane(planned, tuple(members), (each,) * len(members)) for each in constant for planned in players.plans]
    chosen = list(members)
    own = base[:, chosen].sum(axis=1)
    found = profits(play(players.policy, lanes, players.threads))[:, chosen].sum(axis=1)
    gains = (found.reshape(len(constant), -1) - own) / own.mean()
    names = [players.plans[0].scenario.providers[i].name for i in chosen]
    return {"members": names, "gains": {each.name: interval(g) for each, g in zip(constant, gains, strict=True)}}
