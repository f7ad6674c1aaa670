"""Stake without a host: what each node says it stakes, who lost stake by what evidence, and what that comes to.

Statements are signed and passed on by gossip. What they come to depends on the set of them alone, not on the order in
which a node heard them: everyone who has the same statements knows the same stakes. Whoever stakes numbers its
statements; one who signs two of the same number has no stake. What loses stake names the statement by which it was
staked: each takes what is left of that, at most of the fund that the staker began with.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import msgspec
import numpy as np

from wwwserve.agents.protocol import (
    ACCOUNT_SIZE,
    STAKED,
    VOTE_A,
    VOTE_SILENT,
    VOTE_UNDECIDED,
    forfeit,
    settle_duel,
)
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.statements import Signed, StatementError, Struct, check, digest, sign
from wwwserve.serving.market import Whole

MOST_JUDGES = 64


class Stake(Struct, frozen=True):
    """What a node stakes from now on."""

    name: str
    number: Whole  # of its statements, ascending
    amount: Whole  # micro-credits


class Staked(Struct, frozen=True, tag="stake"):
    """Signed by the one who stakes."""

    stake: Stake
    signature: str


class Answer(Struct, frozen=True):
    """What an executor of a duel answered."""

    executor: str
    request: str  # digest
    answer: str  # digest
    signature: str = ""  # of the executor, under this without it

    def signed(self, identity: Identity) -> "Answer":
        """With the executor's signature."""
        return msgspec.structs.replace(self, signature=sign(identity, "answer", self))


class Vote(Struct, frozen=True):
    """What a judge thinks."""

    duel: str
    judge: str
    vote: Whole  # as agents.protocol numbers them
    signature: str = ""  # of the judge, under this without it

    def signed(self, identity: Identity) -> "Vote":
        """With the judge's signature."""
        return msgspec.structs.replace(self, signature=sign(identity, "vote", self))


class Verdict(Struct, frozen=True, tag="verdict"):
    """A duel that was judged; what moves is by `agents.protocol.settle_duel`."""

    origin: str  # who asked both
    a: Answer
    b: Answer
    judges: tuple[str, ...]
    votes: tuple[Vote, ...]  # of those who voted
    stakes: tuple[Staked, ...]  # of a, b and the judges, in this order
    signature: str = ""  # of the origin, under this without it

    def signed(self, identity: Identity) -> "Verdict":
        """With the origin's signature."""
        return msgspec.structs.replace(self, signature=sign(identity, "verdict", self))


class Conflict(Struct, frozen=True, tag="conflict"):
    """A payer signed two vouchers of one number: its whole stake goes to the payee."""

    stakes: tuple[Staked, ...]  # of the payer and the payee
    one: Signed
    other: Signed


Slash: TypeAlias = Verdict | Conflict
Statement: TypeAlias = Staked | Verdict | Conflict


def duel_name(a: Answer, b: Answer) -> str:
    """Of a duel; nobody can choose it alone."""
    return digest(msgspec.json.encode((a, b)))


def decode(content: str | bytes) -> Statement:
    """Read a statement about stake. Raises StatementError, also if it is not signed as it has to be, or its evidence
    does not show what it says."""
    try:
        stated: Statement = msgspec.json.decode(content, type=Staked | Verdict | Conflict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StatementError(f"not a statement about stake: {error}") from None
    verify(stated)
    return stated


def verify(stated: Statement) -> None:
    """Raises StatementError unless all signatures fit, and the evidence shows what is said."""
    if isinstance(stated, Staked):
        check(stated.stake.name, "stake", stated.stake, stated.signature)
        if stated.stake.number < 1 or stated.stake.amount < 0:
            raise StatementError("a stake has a number from 1 and an amount from 0")
        return
    for each in stated.stakes:
        verify(each)
    named = tuple(each.stake.name for each in stated.stakes)
    if isinstance(stated, Conflict):
        _verify_conflict(stated, named)
    else:
        _verify_verdict(stated, named)


def _verify_conflict(stated: Conflict, named: tuple[str, ...]) -> None:
    one, other = stated.one.state, stated.other.state
    if (one.channel, one.payer, one.payee, one.number) != (other.channel, other.payer, other.payee, other.number):
        raise StatementError("two vouchers of different numbers or channels are no conflict")
    if one == other:
        raise StatementError("two vouchers that say the same are no conflict")
    if named != (one.payer, one.payee):
        raise StatementError("the stakes are not of the payer and the payee")
    for each in (stated.one, stated.other):
        check(each.state.payer, "voucher", each.state, each.signature)


def _verify_verdict(stated: Verdict, named: tuple[str, ...]) -> None:
    a, b = stated.a, stated.b
    parties = {stated.origin, a.executor, b.executor}
    if len(parties) != 3 or a.request != b.request:
        raise StatementError("a duel has an origin, two executors, and one request")
    if not 1 <= len(stated.judges) <= MOST_JUDGES or len({*stated.judges, *parties}) != len(stated.judges) + 3:
        raise StatementError("a judge is party to the duel, or judges twice")
    if named != (a.executor, b.executor, *stated.judges):
        raise StatementError("the stakes are not of the executors and the judges")
    check(stated.origin, "verdict", msgspec.structs.replace(stated, signature=""), stated.signature)
    for answer in (a, b):
        check(answer.executor, "answer", msgspec.structs.replace(answer, signature=""), answer.signature)
    duel = duel_name(a, b)
    for vote in stated.votes:
        if vote.duel != duel or vote.judge not in stated.judges or not VOTE_A <= vote.vote <= VOTE_UNDECIDED:
            raise StatementError("a vote is not one of this duel")
        check(vote.judge, "vote", msgspec.structs.replace(vote, signature=""), vote.signature)
    if len({vote.judge for vote in stated.votes}) != len(stated.votes):
        raise StatementError("a judge votes twice")


class Stakes:
    """What all statements come to. `funds` is what each name can stake at most, micro-credits; a name without has
    nothing at stake, whatever it signs."""

    def __init__(self, funds: Mapping[str, int]) -> None:
        self.started = dict(funds)
        self.funds = dict(funds)
        self.slashes: dict[str, Slash] = {}  # by digest
        self.latest: dict[str, Staked] = {}
        self.broken: set[str] = set()  # who signed two statements of one number
        self._left: dict[tuple[str, int], int] = {}  # of what was staked by a statement that lost or won

    def heard(self, stated: Statement) -> bool:
        """Take a statement into account that `decode` has verified; returns whether it is news."""
        if isinstance(stated, Staked):
            return self._staked(stated)
        name = digest(msgspec.json.encode(stated))
        if name in self.slashes or any(each.stake.name not in self.started for each in stated.stakes):
            return False
        self.slashes[name] = stated
        for each in stated.stakes:
            self._staked(each)
        self._fold()
        return True

    def stake(self, name: str) -> int:
        """What a name has at stake, micro-credits."""
        latest = self.latest.get(name)
        if latest is None or name in self.broken:
            return 0
        return self._at_stake(latest.stake)

    def next_number(self, name: str) -> int:
        """Of the next statement of a name."""
        return self.latest[name].stake.number + 1 if name in self.latest else 1

    def _staked(self, stated: Staked) -> bool:
        stake = stated.stake
        if stake.name not in self.started:
            return False  # nothing of worth: it is not kept, so that names cannot fill the memory
        latest = self.latest.get(stake.name)
        if latest is not None and latest.stake.number == stake.number and latest.stake != stake:
            self.broken.add(stake.name)
        if latest is not None and latest.stake.number >= stake.number:
            return False
        self.latest[stake.name] = stated
        return True

    def _at_stake(self, stake: Stake) -> int:
        left = self._left.get((stake.name, stake.number), stake.amount)
        return max(0, min(left, self.funds.get(stake.name, 0)))

    def _fold(self) -> None:
        """Everything that lost stake, in the one order that all know: by digest."""
        self.funds, self._left = dict(self.started), {}
        for name in sorted(self.slashes):
            slash = self.slashes[name]
            stakes = [each.stake for each in slash.stakes]
            before = [self._at_stake(stake) for stake in stakes]
            after = _after(slash, before)
            for stake, was, now in zip(stakes, before, after, strict=True):
                self._left[stake.name, stake.number] = now
                if stake.name in self.funds:
                    self.funds[stake.name] += now - was


def _after(slash: Slash, stakes: Sequence[int]) -> list[int]:
    """What a slash leaves of the stakes that it names."""
    accounts = np.zeros((len(stakes), ACCOUNT_SIZE), np.int64)
    accounts[:, STAKED] = stakes
    if isinstance(slash, Conflict):
        forfeit(accounts, 0, 1)
    else:
        said = {vote.judge: vote.vote for vote in slash.votes}
        votes = np.array([said.get(judge, VOTE_SILENT) for judge in slash.judges], np.int64)
        settle_duel(accounts, 0, 1, np.arange(2, 2 + len(votes), dtype=np.int64), votes)
    return [int(each) for each in accounts[:, STAKED]]
