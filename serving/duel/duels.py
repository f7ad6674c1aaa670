"""Duels on live answers: a request goes to two executors, the user gets the first answer, judges compare the two.

Both executors sign the digest of what they answered. From these signatures follows, by `agents.protocol`, who judges,
and in which order each judge sees the answers, so that the origin, who asks the judges, can choose neither. A judge
checks that before it votes through its own engine, and signs its vote; the votes and both answers are the evidence of
the verdict by which stake moves.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from wwwserve.agents.protocol import (
    A_WINS,
    TIE,
    VOTE_A,
    VOTE_UNDECIDED,
    duel_outcome,
)
from wwwserve.serving.duel.evidence import Drawn, Record, as_shown, b_first, count_vote, draw, in_order, votes_by
from wwwserve.serving.duel.judge import JudgeError, text_of
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.reply import COMPLETIONS, CompletionRequest, Reply
from wwwserve.serving.http.sse import AnswerMeter, StreamError
from wwwserve.serving.ledger.stakes import Answer, Staked, Verdict, Vote
from wwwserve.serving.ledger.statements import StatementError, check, digest
from wwwserve.serving.market import Whole
from wwwserve.serving.metrics import Metrics

log = logging.getLogger("wwwserve.duel")

ATTEST_PATH, JUDGE_PATH = "/peer/attest", "/peer/judge"
MOST_OPEN = 32  # duels of a node that are not settled, beyond which none is begun
MOST_ANSWER_BYTES = 1 << 20  # of an answer that is judged
SECOND_S = 120.0  # for the other answer, once the user has one
ATTEST_S = 5.0
JUDGE_S = 60.0  # for a vote
AT_ONCE = 4  # pairs that a judge's engine compares at once, of others' duels
MOST_JUDGING = 64  # pairs that a judge has, beyond which it declines
ANSWERS_KEPT = 4096  # that an executor can still be asked to sign
MOST_ELECTORS = 1024

Judge = Callable[[str, dict[str, Any], tuple[str, str]], Awaitable[int]]


class Declined(Exception):
    """What a peer asks of a judge or an executor is not done; the message says why."""


class Peers(Protocol):
    """What a duel needs of the node that it is at."""

    def electors(self, model: str) -> dict[str, int]:
        """Peers that serve a model, and what each has at stake, micro-credits."""

    async def request(self, peer: str, path: str, body: bytes) -> bytes:
        """What a peer answers to a signed request. Raises OSError, also for an answer that is not a success."""

    def duelled(self, peer: str, won: bool) -> None:
        """A peer's answer won or lost."""

    def staked(self, peer: str) -> Staked | None:
        """What a peer last stated to have at stake."""

    def settle(self, verdict: Verdict) -> None:
        """A signed verdict moves stake."""


class Attest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """To an executor: sign what you answered."""

    request: str  # digest
    answer: str  # digest


class Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """To a judge: what was asked, and two answers."""

    path: str
    stream: bool
    request: str
    a: Answer
    b: Answer
    answer_a: str
    answer_b: str
    electors: tuple[tuple[str, Whole], ...]  # of whom the judges were drawn, and what each has at stake, by name
    judges: Whole  # to be drawn


class Attempt(Reply):
    """The answer of one executor: passed on to the user if it is the first, and kept."""

    def __init__(self, executor: str, race: "_Race") -> None:
        super().__init__()
        self.executor, self.race = executor, race
        self.status = 0
        self.body = bytearray()
        self.too_long = False
        self._meter = AnswerMeter()

    async def start(self, status: int, content_type: str) -> None:
        """See `Reply`."""
        self.started, self.status = True, status
        if self.race.is_first(self):
            await self.race.reply.start(status, content_type)

    async def pass_on(self, chunk: bytes) -> None:
        """See `Reply`."""
        self._keep(chunk)
        try:
            self._meter.feed(chunk)
        except StreamError:
            self.too_long = True
        if self.race.is_first(self):
            await self.race.reply.pass_on(chunk)

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        """See `Reply`."""
        self.started, self.status = True, status
        self._keep(body)
        self._meter.done = True
        if self.race.is_first(self):
            await self.race.reply.whole(status, content_type, body)

    @property
    def ended(self) -> bool:
        """Whether the last of it came."""
        return self._meter.done

    @property
    def complete(self) -> bool:
        """Whether it is an answer that can be judged."""
        return self.ended and self.status == 200 and not self.too_long

    def _keep(self, chunk: bytes) -> None:
        self.too_long = self.too_long or len(self.body) + len(chunk) > MOST_ANSWER_BYTES
        if self.too_long:
            self.body.clear()
        else:
            self.body += chunk


@dataclass(eq=False)
class _Race:
    """Which attempt the user sees: the one whose first byte came first."""

    reply: Reply
    first: Attempt | None = None

    def is_first(self, attempt: Attempt) -> bool:
        if self.first is None:
            self.first = attempt
        return self.first is attempt


def _check_answer(answer: Answer) -> None:
    check(answer.executor, "answer", msgspec.structs.replace(answer, signature=""), answer.signature)


class Attestor:
    """An executor's side: what it answered to whom, for which it puts its name when asked."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._answered: OrderedDict[tuple[str, str, str], None] = OrderedDict()

    def answered(self, origin: str, request: str, answer: str) -> None:
        """An origin has the whole answer with this digest to its request with that."""
        self._answered[origin, request, answer] = None
        while len(self._answered) > ANSWERS_KEPT:
            self._answered.popitem(last=False)

    def attest(self, origin: str, body: bytes) -> bytes:
        """The signed answer. Raises Declined."""
        try:
            attest = msgspec.json.decode(body, type=Attest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Declined(f"not a request to sign: {error}") from None
        if (origin, attest.request, attest.answer) not in self._answered:
            raise Declined("that was not answered here, or long ago")
        return msgspec.json.encode(Answer(self.identity.name, attest.request, attest.answer).signed(self.identity))


class JudgePool:
    """A judge's side."""

    def __init__(self, identity: Identity, judge: Judge, metrics: Metrics) -> None:
        self.identity, self.judge, self.metrics = identity, judge, metrics
        self.judging = 0
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def vote(self, origin: str, body: bytes) -> bytes:
        """The signed vote on a pair. Raises Declined."""
        if self.judging >= MOST_JUDGING:
            raise Declined("it judges enough already")
        try:
            pair = msgspec.json.decode(body, type=Pair)
            request = msgspec.json.decode(pair.request, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Declined(f"not a pair to judge: {error}") from None
        duel = self._check(origin, pair)
        texts = [text_of(pair.path, pair.stream, each.encode()) for each in (pair.answer_a, pair.answer_b)]
        if b_first(duel, self.identity.name):
            texts.reverse()
        self.judging += 1
        try:
            async with self._turn:
                shown = await self.judge(pair.path, request, (texts[0], texts[1]))
            self.metrics.judged("voted")
        except JudgeError as error:
            log.info("cannot judge", extra={"reason": str(error)})
            shown = VOTE_UNDECIDED
            self.metrics.judged("undecided")
        finally:
            self.judging -= 1
        vote = Vote(duel, self.identity.name, as_shown(shown, duel, self.identity.name))
        return msgspec.json.encode(vote.signed(self.identity))

    def _check(self, origin: str, pair: Pair) -> str:
        """The name of a duel that is this one's to judge. Raises Declined."""
        if pair.path not in COMPLETIONS:
            raise Declined(f"path is {pair.path[:80]!r}, expected one of {', '.join(COMPLETIONS)}")
        a, b, own = pair.a, pair.b, self.identity.name
        electors = dict(pair.electors)
        parties = {origin, a.executor, b.executor}
        if len(parties) != 3 or len(pair.electors) > MOST_ELECTORS or parties & electors.keys():
            raise Declined("a duel has an origin, two executors, and judges that are none of them")
        if len(electors) != len(pair.electors) or min(electors.values(), default=0) < 0:
            raise Declined("an elector is there twice, or has less than nothing at stake")
        if in_order(a, b) != (a, b):
            raise Declined("which answer is A is not for the origin to say")
        for answer, body in ((a, pair.answer_a), (b, pair.answer_b)):
            try:
                _check_answer(answer)
            except StatementError as error:
                raise Declined(str(error)) from None
            if digest(body.encode()) != answer.answer or digest(pair.request.encode()) != answer.request:
                raise Declined("an answer is not the one that its executor signed")
        drawn = draw(a, b, electors, min(max(pair.judges, 1), len(electors) or 1))
        if own not in drawn.judges:
            raise Declined("the draw does not fall on this node")
        return drawn.duel


class Duels:
    """An origin's side."""

    def __init__(self, identity: Identity, peers: Peers, metrics: Metrics, *, judges: int) -> None:
        self.identity, self.peers, self.metrics, self.judges = identity, peers, metrics, judges
        self.records: dict[str, Record] = {}  # of judges
        self._closing: dict[asyncio.Task[None], dict[asyncio.Future[Any], Attempt]] = {}
        self._running = 0

    @property
    def open(self) -> int:
        """Duels that are not settled."""
        return self._running + len(self._closing)

    def may_begin(self) -> bool:
        """Whether one more may be open."""
        return self.open < MOST_OPEN

    async def run(
        self, completion: CompletionRequest, executors: tuple[str, str], hand: Callable[[str, Attempt], Awaitable[Any]],
        reply: Reply,
    ) -> Any:  # fmt: skip
        """Let two executors answer at once; returns what `hand` does of the one whose answer the user has.

        Raises as `hand` does if the user has none. The rest of the duel goes on by itself.
        """
        race = _Race(reply)
        attempts: dict[asyncio.Future[Any], Attempt] = {
            asyncio.ensure_future(hand(each.executor, each)): each
            for each in (Attempt(name, race) for name in executors)
        }
        self._running += 1
        try:
            try:
                result = await _first(attempts, race)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if race.first is None or not race.first.ended or task is None:
                    raise
                task.uncancel()  # who has the whole answer may hang up, and is answered
                result = await _first(attempts, race)
        except BaseException:
            await _cancel(attempts)
            self.metrics.duel("void")
            raise
        finally:
            self._running -= 1
        closing = asyncio.create_task(self._close(completion, attempts))
        self._closing[closing] = attempts
        closing.add_done_callback(self._closing.pop)
        return result

    async def stop(self) -> None:
        """End what is open."""
        attempts = [attempt for each in self._closing.values() for attempt in each]
        await _cancel(self._closing)
        await _cancel(attempts)  # of those whose end had not begun

    async def _close(self, completion: CompletionRequest, attempts: "dict[asyncio.Future[Any], Attempt]") -> None:
        """Once the user has an answer: get the other one, and have both judged."""
        outcome = "void"
        try:
            await asyncio.wait(attempts, timeout=SECOND_S)
            await _cancel(attempts)
            if all(_came(task) and attempt.complete for task, attempt in attempts.items()):
                outcome = await self._judge(completion, list(attempts.values()))
        except Exception:
            log.exception("a duel met an error")
        finally:
            await _cancel(attempts)
            self.metrics.duel(outcome)

    async def _judge(self, completion: CompletionRequest, attempts: list[Attempt]) -> str:
        request = digest(completion.body)
        signed = await asyncio.gather(*(self._attested(attempt, request) for attempt in attempts))
        if signed[0] is None or signed[1] is None:
            return "void"
        texts = {each.executor: bytes(each.body) for each in attempts}
        a, b = in_order(signed[0], signed[1])
        electors = self.peers.electors(completion.model)
        for name in (self.identity.name, a.executor, b.executor):
            electors.pop(name, None)
        electors = dict(sorted(electors.items(), key=lambda each: (-each[1], each[0]))[:MOST_ELECTORS])
        drawn = draw(a, b, electors, min(self.judges, len(electors)))
        if not drawn.judges:
            return "void"
        try:
            pair = Pair(
                completion.path, completion.stream, completion.body.decode(), a, b,
                texts[a.executor].decode(), texts[b.executor].decode(),
                tuple(sorted(electors.items())), self.judges,
            )  # fmt: skip
        except UnicodeDecodeError:
            return "void"
        body = msgspec.json.encode(pair)
        votes = await asyncio.gather(*(self._vote(judge, drawn.duel, body) for judge in drawn.judges))
        return self._settle(a, b, drawn, [vote for vote in votes if vote is not None])

    async def _attested(self, attempt: Attempt, request: str) -> Answer | None:
        """What an executor puts its name to; one that does not stand by its answer has lost, as far as is seen here."""
        attest = Attest(request, digest(bytes(attempt.body)))
        try:
            async with asyncio.timeout(ATTEST_S):
                answer = msgspec.json.decode(
                    await self.peers.request(attempt.executor, ATTEST_PATH, msgspec.json.encode(attest)), type=Answer
                )
            _check_answer(answer)
            if (answer.executor, answer.request, answer.answer) != (attempt.executor, attest.request, attest.answer):
                raise StatementError("it signs another answer")
        except (OSError, TimeoutError, msgspec.DecodeError, StatementError) as error:
            log.warning("an executor does not sign its answer", extra={"peer": attempt.executor, "reason": str(error)})
            self.peers.duelled(attempt.executor, False)
            return None
        return answer

    async def _vote(self, judge: str, duel: str, body: bytes) -> Vote | None:
        """A judge's vote; None if it stays silent."""
        try:
            async with asyncio.timeout(JUDGE_S):
                vote = msgspec.json.decode(await self.peers.request(judge, JUDGE_PATH, body), type=Vote)
            if (vote.duel, vote.judge) != (duel, judge) or not VOTE_A <= vote.vote <= VOTE_UNDECIDED:
                raise StatementError("it votes on something else")
            check(judge, "vote", msgspec.structs.replace(vote, signature=""), vote.signature)
        except (OSError, TimeoutError, msgspec.DecodeError, StatementError) as error:
            log.info("a judge is silent", extra={"peer": judge, "reason": str(error) or type(error).__name__})
            return None
        return vote

    def _settle(self, a: Answer, b: Answer, drawn: Drawn, votes: list[Vote]) -> str:
        """Have the verdict move stakes, and remember who won."""
        said = votes_by(drawn.judges, votes)
        for judge in drawn.judges:
            count_vote(self.records.setdefault(judge, Record()), judge, drawn.duel, said)
        outcome = duel_outcome(np.array(list(said.values()), np.int64))
        stakes = [self.peers.staked(name) for name in (a.executor, b.executor, *drawn.judges)]
        known = tuple(each for each in stakes if each is not None)
        if len(known) == len(stakes):
            verdict = Verdict(self.identity.name, a, b, drawn.judges, tuple(votes), known)
            self.peers.settle(verdict.signed(self.identity))
        if outcome == TIE:
            return "tie"
        winner, loser = (a, b) if outcome == A_WINS else (b, a)
        self.peers.duelled(winner.executor, True)
        self.peers.duelled(loser.executor, False)
        return "won"


async def _first(attempts: "dict[asyncio.Future[Any], Attempt]", race: _Race) -> Any:
    """Result of the attempt that the user sees, once it is done; if there is none, what the first of them raised."""
    pending = set(attempts)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if race.first is attempts[task]:
                return task.result()
    return next(iter(attempts)).result()


def _came(task: "asyncio.Future[Any]") -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


async def _cancel(tasks: "Iterable[asyncio.Future[Any]]") -> None:
    """Until all of them are done."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
