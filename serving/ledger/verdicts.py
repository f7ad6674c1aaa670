"""What is stated about stakes and duels, what each statement has to show, and who judges. See docs/duels.md.

Whoever has a verdict can check all of it: who was asked what by whom, that nobody alone chose the draw, what each
executor answered and had at stake, who voted what. Nothing in it is anybody's word but what its signature is under.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias, TypeVar

import msgspec

from wwwserve.agents.protocol import A_WINS, B_WINS, MICRO, TIE, VOTE_A, VOTE_B, VOTE_UNDECIDED
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.statements import Signed, StatementError, Struct, check, digest, sign
from wwwserve.serving.market import Whole

MOST_JUDGES = 64
BOND = MICRO  # micro-credits that an origin has at stake, or its duels move no stake


T = TypeVar("T", bound=msgspec.Struct)


class Stake(Struct, frozen=True):
    """What a node stakes from now on."""

    name: str
    number: Whole  # of its statements, ascending
    amount: Whole  # micro-credits


class Staked(Struct, frozen=True, tag="stake"):
    """Signed by the one who stakes."""

    stake: Stake
    signature: str


class Party(Struct, frozen=True):
    """An executor of a duel."""

    name: str
    commitment: str  # digest of a secret, which it gave when it took the request


class DuelOpening(Struct, frozen=True):
    """An origin says which two answered a request."""

    origin: str
    epoch: str  # who may judge, see `Stakes`; "" where that is not agreed, and no stake moves
    request: str  # digest
    a: Party  # by name before b
    b: Party
    commitment: str  # digest of the origin's secret; the nonce of the duel
    bond: Staked | None  # what the origin has at stake; none without an epoch
    signature: str = ""  # of the origin, under this without it

    def signed(self, identity: Identity) -> "DuelOpening":
        """With the origin's signature."""
        return _signed(self, identity, "duel")

    def name(self) -> str:
        """Of the duel."""
        return digest(msgspec.json.encode(msgspec.structs.replace(self, signature="")))

    def parties(self) -> tuple[str, str, str]:
        """Who cannot judge it."""
        return self.origin, self.a.name, self.b.name


class Answer(Struct, frozen=True):
    """What an executor answered in a duel."""

    executor: str
    duel: str  # name
    answer: str  # digest
    secret: str  # to which it had committed itself
    stake: Staked | None  # what it has at stake; none without an epoch
    signature: str = ""  # of the executor, under this without it

    def signed(self, identity: Identity) -> "Answer":
        """With the executor's signature."""
        return _signed(self, identity, "answer")


class Case(Struct, frozen=True):
    """What is judged."""

    opening: DuelOpening
    secret: str  # of the origin
    height: Whole  # above that of every verdict on one of the two executors that came before
    a: Answer
    b: Answer

    def name(self) -> str:
        """Under which judges vote."""
        return digest(msgspec.json.encode(self))

    def seed(self) -> str:
        """What none of the three chose alone: of the draw, and of the order in which a judge sees the answers."""
        return digest(f"{self.opening.name()} {self.secret} {self.a.secret} {self.b.secret}".encode())


class Vote(Struct, frozen=True):
    """What a judge thinks."""

    case: str  # name
    judge: str
    vote: Whole  # as agents.protocol numbers them
    signature: str = ""  # of the judge, under this without it

    def signed(self, identity: Identity) -> "Vote":
        """With the judge's signature."""
        return _signed(self, identity, "vote")


class Verdict(Struct, frozen=True, tag="verdict"):
    """A case and votes on it; whoever has them can put them together."""

    case: Case
    votes: tuple[Vote, ...]


class Conflict(Struct, frozen=True, tag="conflict"):
    """A payer signed two vouchers of one number."""

    one: Signed
    other: Signed

    @property
    def culprit(self) -> str:
        """Who signed both."""
        return self.one.state.payer


class Twice(Struct, frozen=True, tag="twice"):
    """A node signed two stakes of one number."""

    one: Staked
    other: Staked

    @property
    def culprit(self) -> str:
        """Who signed both."""
        return self.one.stake.name


Slash: TypeAlias = Verdict | Conflict | Twice
Statement: TypeAlias = Staked | Slash


def committed(secret: str) -> str:
    """What is told of a secret before it is."""
    return digest(secret.encode())


def parse(content: str | bytes) -> Statement:
    """Read a statement about stake. Raises StatementError for what is none; see `verify` for what it is worth."""
    try:
        stated: Statement = msgspec.json.decode(content, type=Staked | Verdict | Conflict | Twice)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StatementError(f"not a statement about stake: {error}") from None
    return stated


def decode(content: str | bytes) -> Statement:
    """Read a statement about stake. Raises StatementError, also if it is not signed as it has to be, or its evidence
    does not show what it says."""
    stated = parse(content)
    verify(stated)
    return stated


def verify(stated: Statement) -> None:
    """Raises StatementError unless all signatures fit, and the evidence shows what is said."""
    if isinstance(stated, Staked):
        _verify_staked(stated)
    elif isinstance(stated, Conflict):
        _verify_conflict(stated)
    elif isinstance(stated, Twice):
        one, other = stated.one.stake, stated.other.stake
        if (one.name, one.number) != (other.name, other.number) or one == other:
            raise StatementError("two stakes of different numbers, or that say the same, are no conflict")
        _verify_staked(stated.one)
        _verify_staked(stated.other)
    else:
        verify_case(stated.case)
        verify_votes(stated.case, stated.votes)


def _verify_staked(stated: Staked) -> None:
    if stated.stake.number < 1:
        raise StatementError("a stake has a number from 1")
    check(stated.stake.name, "stake", stated.stake, stated.signature)


def _verify_conflict(stated: Conflict) -> None:
    one, other = stated.one.state, stated.other.state
    if (one.channel, one.payer, one.payee, one.number) != (other.channel, other.payer, other.payee, other.number):
        raise StatementError("two vouchers of different numbers or channels are no conflict")
    if one == other:
        raise StatementError("two vouchers that say the same are no conflict")
    for each in (stated.one, stated.other):
        check(each.state.payer, "voucher", each.state, each.signature)


def verify_opening(opening: DuelOpening) -> None:
    """Raises StatementError unless its origin signed it, with a bond if stake may move."""
    if len(set(opening.parties())) != 3 or opening.a.name > opening.b.name:
        raise StatementError("a duel has an origin and two executors in the order of their names")
    if (opening.bond is not None) != bool(opening.epoch):
        raise StatementError("there is a bond where stake moves, and nowhere else")
    if opening.bond is not None:
        if opening.bond.stake.name != opening.origin or opening.bond.stake.amount < BOND:
            raise StatementError(f"the bond is not the origin's, or below {BOND} micro-credits")
        _verify_staked(opening.bond)
    _check(opening, opening.origin, "duel")


def verify_answer(answer: Answer, opening: DuelOpening, party: Party) -> None:
    """Raises StatementError unless an executor signed what it answered in that duel, had committed itself to its
    secret, and says what it has at stake if stake may move."""
    if (answer.executor, answer.duel) != (party.name, opening.name()):
        raise StatementError("an answer is not of this duel")
    if committed(answer.secret) != party.commitment:
        raise StatementError("a secret is not what its executor committed itself to")
    if (answer.stake is not None) != bool(opening.epoch):
        raise StatementError("an executor says what it has at stake where stake moves, and nowhere else")
    if answer.stake is not None:
        if answer.stake.stake.name != answer.executor:
            raise StatementError("an executor has its own stake at stake")
        _verify_staked(answer.stake)
    _check(answer, answer.executor, "answer")


def verify_case(case: Case) -> None:
    """Raises StatementError unless all three parties signed their parts, and the secrets are those committed to."""
    verify_opening(case.opening)
    if committed(case.secret) != case.opening.commitment:
        raise StatementError("a secret is not what its origin committed itself to")
    verify_answer(case.a, case.opening, case.opening.a)
    verify_answer(case.b, case.opening, case.opening.b)


def verify_votes(case: Case, votes: Iterable[Vote]) -> None:
    """Raises StatementError unless each vote is on this case, signed, and there once."""
    name, seen = case.name(), set()
    for vote in votes:
        if vote.case != name or not VOTE_A <= vote.vote <= VOTE_UNDECIDED:
            raise StatementError("a vote is not on this case")
        if (vote.judge, vote.vote) in seen:
            raise StatementError("a vote is there twice")
        seen.add((vote.judge, vote.vote))
        _check(vote, vote.judge, "vote")


class Jury(NamedTuple):
    """Who judges a case, in the order drawn, and the weight of each; a winner has the votes of more than `needed`."""

    weights: dict[str, int]
    needed: int


def jury(stakes: Mapping[str, int], parties: Collection[str], seed: str) -> Jury:
    """All that have stake and are no party judge, by their stake, and a winner needs more than three fifths of that,
    and more than a third of all `stakes`. Of more than `MOST_JUDGES` so many seats are drawn by stake, each of weight
    one, and a winner needs more than two thirds of them; nobody wins where the parties have a tenth of the stake.

    In whole numbers alone, so that everyone comes to the same.
    """
    left = {name: stakes[name] for name in sorted(stakes) if stakes[name] > 0 and name not in parties}
    names, bounds = list(left), list(accumulate(left.values()))
    seats, drawn, may_judge = len(left) > MOST_JUDGES, dict[str, int](), sum(left.values())
    for k in range(min(len(left), MOST_JUDGES)):
        at = bisect_right(bounds, int(digest(f"{seed} {k}".encode()), 16) % bounds[-1])
        if seats:
            drawn[names[at]] = drawn.get(names[at], 0) + 1
        else:
            drawn[names[at]] = left[names[at]]
            del names[at]
            bounds = list(accumulate(left[name] for name in names))
    everyone = sum(stakes.values())
    if not seats:
        return Jury(drawn, max(3 * may_judge // 5, everyone // 3))
    return Jury(drawn, 2 * MOST_JUDGES // 3 if 10 * may_judge > 9 * everyone else MOST_JUDGES)


def outcome_of(votes: Iterable[Vote], jury: Jury) -> int:
    """A_WINS or B_WINS if enough of a jury voted so, else TIE; votes of others do not count."""
    cast, weights = {(vote.judge, vote.vote) for vote in votes}, jury.weights
    for_a, for_b = (sum(weights.get(judge, 0) for judge, vote in cast if vote == side) for side in (VOTE_A, VOTE_B))
    if (for_a > jury.needed) == (for_b > jury.needed):  # both only if judges voted twice
        return TIE
    return A_WINS if for_a > jury.needed else B_WINS


def _signed(stated: T, identity: Identity, kind: str) -> T:
    """With a signature under all else."""
    return msgspec.structs.replace(stated, signature=sign(identity, kind, _without(stated)))


def _check(stated: Any, name: str, kind: str) -> None:
    """Raises StatementError unless `name` signed it, without its signature, as a statement of that kind."""
    check(name, kind, _without(stated), stated.signature)


def _without(stated: T) -> T:
    return msgspec.structs.replace(stated, signature="")
