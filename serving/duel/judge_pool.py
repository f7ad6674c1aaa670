"""A judge's side of a duel: what it checks before it asks its engine, and how much of its time an origin may have."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from wwwserve.serving import boundary
from wwwserve.serving.boundary import BoundaryError
from wwwserve.serving.duel.evidence import as_shown, b_first
from wwwserve.serving.duel.judge import JudgeError, text_of
from wwwserve.serving.duel.messages import JUDGED_TOKENS, Declined, Pair
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.reply import COMPLETIONS
from wwwserve.serving.ledger.accounts import Came
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import StatementError, digest
from wwwserve.serving.ledger.verdicts import BOND, Case, Vote, verify_case
from wwwserve.serving.metrics import Metrics

log = logging.getLogger("wwwserve.duel")

AT_ONCE = 4  # pairs that a judge's engine compares at once, of others' duels
MOST_JUDGING = 64  # pairs that a judge has, beyond which it declines
JUDGED_SHARE = 0.1  # of its time that a judge's engine compares answers for one origin,
JUDGED_BURST_S = 30.0  # beyond so much of it
VOTES_KEPT = 4096  # by which a judge knows that it has judged a duel already
MOST_AHEAD = 64  # verdicts on an executor that a judge may not have heard of yet

Judge = Callable[[str, dict[str, Any], tuple[str, str]], Awaitable[int]]


class Fee(Protocol):
    """What is paid for a vote; to be ended once, by what came of it."""

    def end(self, answer: str, came: Came) -> None:
        """See `serving.ledger.accounts.Delivery`."""


Charge = Callable[[int], Fee | None]  # by the tokens of the prompt as which it is paid; raises Declined


class _Quotas:
    """What an origin may have of a judge's time."""

    def __init__(self) -> None:
        self._used: dict[str, tuple[float, float]] = {}  # s beyond the share, and when that was

    def used_s(self, origin: str, now_s: float) -> float:
        """What it has had beyond its share."""
        used_s, at_s = self._used.get(origin, (0.0, now_s))
        return max(0.0, used_s - JUDGED_SHARE * (now_s - at_s))

    def use(self, origin: str, took_s: float, now_s: float) -> None:
        """It had some."""
        self._used[origin] = self.used_s(origin, now_s) + took_s, now_s
        if len(self._used) > VOTES_KEPT:
            self._used = {name: each for name, each in self._used.items() if self.used_s(name, now_s) > 0}


class JudgePool:
    """A judge's side."""

    def __init__(self, identity: Identity, judge: Judge, metrics: Metrics, stakes: Stakes | None = None) -> None:
        self.identity, self.judge, self.metrics, self.stakes = identity, judge, metrics, stakes
        self.judging = 0
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._quotas = _Quotas()
        self._votes: OrderedDict[str, tuple[str, bytes]] = OrderedDict()  # by duel: the case, and the vote on it

    async def vote(self, origin: str, body: bytes, charge: Charge = lambda tokens: None) -> bytes:
        """The signed vote on a pair, once `charge` has agreed to what is paid for that. Raises Declined."""
        clock = asyncio.get_running_loop().time
        if self.judging >= MOST_JUDGING:
            raise Declined("it judges enough already")
        if self._quotas.used_s(origin, clock()) > JUDGED_BURST_S:
            raise Declined("it has judged enough for you, come again later")
        try:
            pair = msgspec.json.decode(body, type=Pair)
            request = boundary.object_of(pair.request.encode())
            boundary.check_shareable(request)
        except (msgspec.DecodeError, UnicodeError, RecursionError, BoundaryError) as error:
            raise Declined(f"not a pair to judge: {error}") from None
        duel, case, own = pair.case.opening.name(), pair.case.name(), self.identity.name
        voted_on, vote = self._votes.get(duel, (case, b""))
        if voted_on != case:
            raise Declined("it has judged that duel already, or is judging it")
        if vote:
            return vote
        self._check(origin, pair)
        if duel in self._votes:
            raise Declined("it is judging that duel")
        seed = pair.case.seed()
        fee, began_s, vote = charge(pair.prompt()), clock(), b""
        self.judging += 1
        self._votes[duel] = case, b""
        try:
            texts = [await text_of(pair.path, pair.stream, each.encode()) for each in (pair.answer_a, pair.answer_b)]
            if b_first(seed, own):
                texts.reverse()
            shown = await self._compare(origin, pair, request, (texts[0], texts[1]))
            vote = msgspec.json.encode(Vote(case, own, as_shown(shown, seed, own)).signed(self.identity))
        except BaseException:
            self._votes.pop(duel, None)
            raise
        finally:
            self.judging -= 1
            if fee is not None:
                fee.end(digest(vote), Came(JUDGED_TOKENS if vote else 0, bool(vote), clock() - began_s, None))
        self._votes[duel] = case, vote
        while len(self._votes) > VOTES_KEPT:
            self._votes.popitem(last=False)
        return vote

    async def _compare(self, origin: str, pair: Pair, request: dict[str, Any], texts: tuple[str, str]) -> int:
        """The vote of the own engine on two answers, in their order. Raises Declined."""
        clock = asyncio.get_running_loop().time
        async with self._turn:
            turn_s = clock()
            try:
                shown = await self.judge(pair.path, request, texts)
                self.metrics.judged("voted")
            except JudgeError as error:
                log.info("cannot judge", extra={"reason": str(error)})
                self.metrics.judged("failed")
                raise Declined("its engine cannot judge that") from None
            finally:
                self._quotas.use(origin, clock() - turn_s, clock())
        return shown

    def _check(self, origin: str, pair: Pair) -> None:
        """Raises Declined for what is not this one's to judge."""
        case, opening = pair.case, pair.case.opening
        if pair.path not in COMPLETIONS:
            raise Declined(f"path is {pair.path[:80]!r}, expected one of {', '.join(COMPLETIONS)}")
        if opening.origin != origin or self.identity.name in opening.parties():
            raise Declined("a duel has an origin, who asks, two executors, and judges that are none of them")
        if opening.epoch:
            self._check_stakes(case)
        if digest(pair.request.encode()) != opening.request:
            raise Declined("the request is not the one that was asked")
        for answer, body in ((case.a, pair.answer_a), (case.b, pair.answer_b)):
            if digest(body.encode()) != answer.answer:
                raise Declined("an answer is not the one that its executor signed")
        try:
            verify_case(case)
        except StatementError as error:
            raise Declined(str(error)) from None

    def _check_stakes(self, case: Case) -> None:
        """Raises Declined where a vote of this one could not count."""
        stakes, opening = self.stakes, case.opening
        if stakes is None or not stakes.has(opening.epoch):
            raise Declined("it is of another epoch")
        if stakes.stake(opening.origin) < BOND:
            raise Declined("its origin has too little at stake")
        if self.identity.name not in stakes.jury(case).weights:
            raise Declined("the draw does not fall on this node")
        before = stakes.height(case.a.executor, case.b.executor)
        if not before < case.height <= before + MOST_AHEAD:
            raise Declined(f"there are verdicts on its executors up to height {before}, and it is of {case.height}")
