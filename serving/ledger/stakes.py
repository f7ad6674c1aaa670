"""Stake without a host: what each node says it stakes, who lost stake by what evidence, and what that comes to.

Statements are signed and passed on by gossip. What they come to depends on the set of them alone, not on the order in
which a node heard them: everyone who has the same statements knows the same stakes. Whoever stakes numbers its
statements; one who signs two of the same number, or two vouchers of one number, has nothing at stake from then on.

Verdicts move stake only between keys on which all agree, those of a genesis file: they are the epoch, whose judges
weigh what they may stake by that file. An amendment of it is another epoch; those before still count, by their own
tables, and a duel is of the last one that its three parties know. A verdict counts if judges of more than three fifths
of the weight that may judge say the same, and of more than a third of all stake: no third of the stake can make one.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from wwwserve.agents.protocol import (
    A_WINS,
    ACCOUNT_SIZE,
    STAKED,
    TIE,
    VOTE_A,
    VOTE_B,
    VOTE_UNDECIDED,
    move_stakes,
)
from wwwserve.serving.ledger.statements import digest
from wwwserve.serving.ledger.verdicts import (
    BOND,
    Case,
    Conflict,
    Jury,
    Slash,
    Stake,
    Staked,
    Statement,
    Twice,
    Verdict,
    Vote,
    jury,
    outcome_of,
)

AMOUNTS = 1 << 32  # by which the numbers of one name's statements rise
NUMBERS_KEPT = 64  # statements of a name, back from the last, among which one that says otherwise is found


class _Judged(NamedTuple):
    """A verdict that counts; in the order in which verdicts move stake."""

    height: int
    case: str
    verdict: Verdict
    outcome: int


class Stakes:
    """What all statements come to. `funds` is what each name can stake at most, micro-credits; a name without has
    nothing at stake, whatever it signs."""

    def __init__(
        self, funds: Mapping[str, int], *, agreed: bool = False, earlier: Sequence[Mapping[str, int]] = ()
    ) -> None:  # fmt: skip
        """`agreed`: all nodes have these `funds`, so that verdicts move stake; `earlier`: those before each amendment,
        of which verdicts count as well."""
        self.started = dict(funds)
        self.funds = dict(funds)
        self._tables = {_epoch_of(each): dict(each) for each in (*earlier, funds)} if agreed else {}
        self.epoch = _epoch_of(funds) if agreed else ""
        self.said: dict[str, str] = {}  # epoch that each peer says it has
        self.latest: dict[str, Staked] = {}
        self.slashes: dict[str, Slash] = {}  # by the name of the duel, or of who signed twice
        self.fresh: list[Slash] = []  # news of them, for whoever keeps and passes them on, and takes them out
        self._judged: dict[str, _Judged] = {}  # by the name of the duel
        self._last = (-1, "")  # height and case of the last verdict in order
        self._heights: dict[str, int] = {}  # of the last verdict on an executor
        self._stated: dict[str, dict[int, Staked]] = {}
        self._left: dict[tuple[str, int], int] = {}  # of what was staked by a statement that lost or won

    def is_news(self, stated: Statement) -> bool:
        """Whether `heard` would take a statement into account if it is signed as it says; costs no signature."""
        if isinstance(stated, Staked):
            known = self._stated.get(stated.stake.name, {}).get(stated.stake.number)
            return stated.stake.name in self.started and (known is None or known.stake != stated.stake)
        if isinstance(stated, Verdict):
            return self._merged(stated) is not None
        return stated.culprit in self.started and stated.culprit not in self.slashes

    def heard(self, stated: Statement) -> bool:
        """Take a statement into account that `verdicts.verify` has found good; returns whether it is news."""
        if isinstance(stated, Staked):
            return self._staked(stated)
        if isinstance(stated, Verdict):
            return self._verdict(stated)
        return self._convict(stated)

    def stake(self, name: str) -> int:
        """What a name has at stake, micro-credits."""
        latest = self.latest.get(name)
        return self._at_stake(latest.stake) if latest is not None and name not in self.slashes else 0

    def next_number(self, name: str, amount: int, after: int = 0) -> int:
        """Of the next statement of a name, by which it stakes `amount`, after one numbered `after`. It ends in the
        amount: a node that has forgotten its last statements makes the same again, or one of another number."""
        last = max(after, self.latest[name].stake.number if name in self.latest else 0)
        return (last // AMOUNTS + 1) * AMOUNTS + amount % AMOUNTS

    def height(self, *executors: str) -> int:
        """Of the last verdict on one of them; 0 for none."""
        return max((self._heights.get(name, 0) for name in executors), default=0)

    def jury(self, case: Case) -> Jury:
        """Who of its epoch judges a case. Nobody where no stake moves."""
        parties, table = case.opening.parties(), self._tables.get(case.opening.epoch)
        if table is None or not all(map(table.get, parties)):
            return Jury({}, 0)
        return jury(table, parties, case.seed())

    def has(self, epoch: str) -> bool:
        """Whether it is the own epoch, or one before it."""
        return epoch in self._tables

    def epoch_of(self, parties: Collection[str]) -> str:
        """The last one that all of them know, as far as is known here; "" where one of them may stake nothing in it.
        Who has said nothing knows the first, and whoever is in an epoch knows that."""
        epochs = list(self._tables)
        last = len(epochs) - 1
        for name in parties:
            said = self.said.get(name, "")
            knows = epochs.index(said) if said in self._tables else last if said else 0
            joined = next((k for k, epoch in enumerate(epochs) if self._tables[epoch].get(name)), last + 1)
            last = min(last, max(knows, joined))
        table = self._tables[epochs[last]] if epochs else {}
        return epochs[last] if table and all(map(table.get, parties)) else ""

    def bond(self, name: str) -> Staked | None:
        """By which an origin's duels move stake; None if it has too little at stake."""
        latest = self.latest.get(name)
        enough = latest is not None and min(self.stake(name), latest.stake.amount) >= BOND
        return latest if self.epoch and enough else None

    # Statements.

    def _staked(self, stated: Staked) -> bool:
        stake = stated.stake
        if stake.name not in self.started:
            return False  # nothing of worth: it is not kept, so that names cannot fill the memory
        numbers = self._stated.setdefault(stake.name, {})
        known = numbers.get(stake.number)
        if known is not None:
            return known.stake != stake and self._convict(Twice(known, stated))
        if len(numbers) >= NUMBERS_KEPT and stake.number < min(numbers):
            return False
        numbers[stake.number] = stated
        if len(numbers) > NUMBERS_KEPT:
            del numbers[min(numbers)]
        if stake.name in self.latest and self.latest[stake.name].stake.number > stake.number:
            return False
        self.latest[stake.name] = stated
        return True

    def _convict(self, proof: Conflict | Twice) -> bool:
        if proof.culprit not in self.started or proof.culprit in self.slashes:
            return False
        self.slashes[proof.culprit] = proof
        self.fresh.append(proof)
        return True

    def _merged(self, verdict: Verdict) -> _Judged | None:
        """A verdict with the votes on it that are known already; None if it is no news, or does not count."""
        case, name = verdict.case, verdict.case.name()
        known = self._judged.get(case.opening.name())
        if known is not None and (known.height, known.case) < (case.height, name):
            return None  # of one duel, the first verdict counts
        votes = {(vote.judge, vote.vote): vote for vote in verdict.votes}
        if known is not None and known.case == name:
            before = {(vote.judge, vote.vote): vote for vote in known.verdict.votes}
            if votes.keys() <= before.keys():
                return None
            votes |= before
        jury = self.jury(case)
        if any(judge not in jury.weights for judge, _ in votes):
            return None
        merged = Verdict(case, tuple(votes[key] for key in sorted(votes)))
        outcome = outcome_of(merged.votes, jury)
        return _Judged(case.height, name, merged, outcome) if outcome != TIE else None

    def _verdict(self, verdict: Verdict) -> bool:
        judged = self._merged(verdict)
        if judged is None:
            return False
        case = judged.verdict.case
        duel = case.opening.name()
        new, self._judged[duel], self.slashes[duel] = duel not in self._judged, judged, judged.verdict
        self.fresh.append(judged.verdict)
        for each in (case.opening.bond, case.a.stake, case.b.stake):
            if each is not None:
                self._staked(each)
        if new and judged[:2] > self._last:
            self._move(judged)
        else:
            self._fold()
        return True

    # What they come to.

    def losses(self) -> list[tuple[str, str]]:
        """Who lost stake by evidence that counts, and by which: "verdict", "conflict" or "twice"."""
        found = []
        for name, slash in self.slashes.items():
            if isinstance(slash, Verdict):
                loser = slash.case.b if self._judged[name].outcome == A_WINS else slash.case.a
                found.append((loser.executor, "verdict"))
            else:
                found.append((slash.culprit, type(slash).__name__.lower()))
        return found

    def _at_stake(self, stake: Stake) -> int:
        left = self._left.get((stake.name, stake.number), stake.amount)
        return max(0, min(left, self.funds.get(stake.name, 0)))

    def _fold(self) -> None:
        """All verdicts, in the one order that all know: by height, and where that is the same by case."""
        self.funds, self._left, self._heights, self._last = dict(self.started), {}, {}, (-1, "")
        for judged in sorted(self._judged.values(), key=lambda each: each[:2]):
            self._move(judged)

    def _move(self, judged: _Judged) -> None:
        """Move what a verdict says: the loser's stake, as far as it is left, to the winner, and fines of judges, who
        are fined as if they had as much at stake as the loser."""
        case, self._last = judged.verdict.case, judged[:2]
        stakes = [each.stake.stake for each in (case.a, case.b) if each.stake is not None]
        before = [self._at_stake(stake) for stake in stakes]
        loser = before[1] if judged.outcome == A_WINS else before[0]
        cast = _said(judged.verdict.votes, judged.outcome)
        before += [min(loser, self.funds[judge]) for judge in cast]
        accounts = np.zeros((len(before), ACCOUNT_SIZE), np.int64)
        accounts[:, STAKED] = before
        judges = np.arange(2, len(before), dtype=np.int64)
        move_stakes(accounts, 0, 1, judges, np.array([*cast.values()], np.int64), judged.outcome)
        after = accounts[:, STAKED].tolist()
        for name, was, now in zip((case.a.executor, case.b.executor, *cast), before, after, strict=True):
            self.funds[name] += now - was
        for stake, now in zip(stakes, after, strict=False):
            self._left[stake.name, stake.number] = now
            self._heights[stake.name] = judged.height


def _epoch_of(funds: Mapping[str, int]) -> str:
    return digest(msgspec.json.encode(sorted(funds.items())))


def _said(votes: tuple[Vote, ...], outcome: int) -> dict[str, int]:
    """The vote of each judge; of one that signed several, the one against the outcome."""
    said: dict[str, int] = {}
    for vote in votes:
        against = vote.vote in (VOTE_A, VOTE_B) and vote.vote != outcome
        if vote.judge not in said or against or said[vote.judge] == VOTE_UNDECIDED:
            said[vote.judge] = vote.vote
    return said
