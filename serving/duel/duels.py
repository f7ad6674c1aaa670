"""Duels on live answers: a request goes to two executors, the user gets the first answer, judges compare the two.

Both executors sign the digest of what they answered. From these signatures follows, by `agents.protocol`, who judges,
and in which order each judge sees the answers, so that the origin, who asks the judges, can choose neither. A judge
checks that before it votes through its own engine, and signs its vote; the votes and both answers are the evidence of
the verdict by which stake moves.
"""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from wwwserve.agents.generator import make_generators
from wwwserve.agents.protocol import (
    A_WINS,
    TIE,
    VOTE_A,
    VOTE_B,
    VOTE_SILENT,
    VOTE_UNDECIDED,
    draw_by_stake,
    duel_outcome,
)
from wwwserve.serving.duel.judge import JudgeError, text_of
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.reply import COMPLETIONS, CompletionRequest, Reply
from wwwserve.serving.http.sse import AnswerMeter, StreamError
from wwwserve.serving.ledger.stakes import Answer, Staked, Verdict, Vote, duel_name
from wwwserve.serving.ledger.statements import StatementError, check, digest
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

    async def ask(self, peer: str, path: str, body: bytes) -> bytes:
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
    electors: tuple[tuple[str, int], ...]  # of whom the judges were drawn, and what each has at stake, by name
    judges: int  # to be drawn


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
    """Which leg the user sees: the one whose first byte came first."""

    reply: Reply
    first: Attempt | None = None

    def is_first(self, leg: Attempt) -> bool:
        if self.first is None:
            self.first = leg
        return self.first is leg


@dataclass(slots=True)
class Record:
    """What one saw of a judge."""

    votes: int = 0
    undecided: int = 0  # of the votes
    outvoted: int = 0
    silent: int = 0
    said_first: int = 0  # votes for the answer that it was shown first


class Drawn(NamedTuple):
    """Who judges a duel."""

    duel: str
    judges: tuple[str, ...]


def in_order(one: Answer, other: Answer) -> tuple[Answer, Answer]:
    """Which is A, and which B, by what neither executor knows of the other."""
    return (one, other) if _key(one) < _key(other) else (other, one)


def draw(a: Answer, b: Answer, electors: Mapping[str, int], count: int) -> Drawn:
    """The judges of a duel, by stake, with uniforms that both signatures make."""
    duel = duel_name(a, b)
    names = sorted(electors)
    stake = np.array([electors[name] for name in names], np.float64)
    drawn = np.zeros(max(count, 1), np.int64)
    uniforms = make_generators(int(duel, 16))[0]
    found = draw_by_stake(stake, np.ones(len(names), np.bool_), count, uniforms, drawn)
    return Drawn(duel, tuple(names[k] for k in drawn[:found]))


def b_first(duel: str, judge: str) -> bool:
    """Whether a judge is shown B before A."""
    return bool(hashlib.sha256(f"{duel} {judge}".encode()).digest()[0] & 1)


def as_shown(vote: int, duel: str, judge: str) -> int:
    """A vote on A and B as one on the first and the second that a judge was shown, or the other way round."""
    if vote in (VOTE_A, VOTE_B) and b_first(duel, judge):
        return VOTE_A + VOTE_B - vote
    return vote


def chance_of_bias(first: int, votes: int) -> float:
    """How likely it is that of `votes` for one of two answers, shown in random order, as far from half or farther are
    for the first, by one to whom the order does not matter (two-sided exact binomial test)."""
    far = abs(2 * first - votes)
    return sum(comb(votes, k) for k in range(votes + 1) if abs(2 * k - votes) >= far) / (1 << votes)


def record_of(verdicts: Iterable[Verdict], judge: str) -> Record:
    """What the evidence says of a judge."""
    record = Record()
    for verdict in verdicts:
        if judge in verdict.judges:
            _count(record, judge, duel_name(verdict.a, verdict.b), _votes(verdict.judges, verdict.votes))
    return record


def _count(record: Record, judge: str, duel: str, votes: Mapping[str, int]) -> None:
    vote = votes[judge]
    record.votes += vote != VOTE_SILENT
    record.undecided += vote == VOTE_UNDECIDED
    record.silent += vote == VOTE_SILENT
    record.said_first += as_shown(vote, duel, judge) == VOTE_A
    outcome = duel_outcome(np.array(list(votes.values()), np.int64))
    record.outvoted += outcome != TIE and vote in (VOTE_A, VOTE_B) and vote != outcome


def _votes(judges: Sequence[str], votes: Iterable[Vote]) -> dict[str, int]:
    said = {vote.judge: vote.vote for vote in votes}
    return {judge: said.get(judge, VOTE_SILENT) for judge in judges}


def _key(answer: Answer) -> str:
    return digest(f"{answer.answer} {answer.executor} {answer.request}".encode())


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
            told = msgspec.json.decode(body, type=Attest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Declined(f"not a request to sign: {error}") from None
        if (origin, told.request, told.answer) not in self._answered:
            raise Declined("that was not answered here, or long ago")
        return msgspec.json.encode(Answer(self.identity.name, told.request, told.answer).signed(self.identity))


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
        """Whether there is room for one more."""
        return self.open < MOST_OPEN

    async def run(
        self, ask: CompletionRequest, executors: tuple[str, str], hand: Callable[[str, Attempt], Awaitable[Any]],
        reply: Reply,
    ) -> Any:  # fmt: skip
        """Let two executors answer at once; returns what `hand` does of the one whose answer the user has.

        Raises as `hand` does if the user has none. The rest of the duel goes on by itself.
        """
        race = _Race(reply)
        legs: dict[asyncio.Future[Any], Attempt] = {
            asyncio.ensure_future(hand(name, leg)): leg for name in executors for leg in [Attempt(name, race)]
        }
        self._running += 1
        try:
            try:
                result = await _first(legs, race)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if race.first is None or not race.first.ended or task is None:
                    raise
                task.uncancel()  # who has the whole answer may hang up, and is answered
                result = await _first(legs, race)
        except BaseException:
            await _cancel(legs)
            self.metrics.duel("void")
            raise
        finally:
            self._running -= 1
        closing = asyncio.create_task(self._close(ask, legs))
        self._closing[closing] = legs
        closing.add_done_callback(self._closing.pop)
        return result

    async def stop(self) -> None:
        """End what is open."""
        legs = [leg for each in self._closing.values() for leg in each]
        await _cancel(self._closing)
        await _cancel(legs)  # of those whose end had not begun

    async def _close(self, ask: CompletionRequest, legs: "dict[asyncio.Future[Any], Attempt]") -> None:
        """Once the user has an answer: get the other one, and have both judged."""
        outcome = "void"
        try:
            await asyncio.wait(legs, timeout=SECOND_S)
            await _cancel(legs)
            if all(_came(task) and leg.complete for task, leg in legs.items()):
                outcome = await self._judge(ask, list(legs.values()))
        except Exception:
            log.exception("a duel met an error")
        finally:
            await _cancel(legs)
            self.metrics.duel(outcome)

    async def _judge(self, ask: CompletionRequest, legs: list[Attempt]) -> str:
        request = digest(ask.body)
        signed = await asyncio.gather(*(self._attested(leg, request) for leg in legs))
        if signed[0] is None or signed[1] is None:
            return "void"
        texts = {answer.executor: bytes(leg.body) for answer, leg in zip(signed, legs, strict=True) if answer}
        a, b = in_order(signed[0], signed[1])
        electors = self.peers.electors(ask.model)
        for name in (self.identity.name, a.executor, b.executor):
            electors.pop(name, None)
        electors = dict(sorted(electors.items(), key=lambda each: (-each[1], each[0]))[:MOST_ELECTORS])
        drawn = draw(a, b, electors, min(self.judges, len(electors)))
        if not drawn.judges:
            return "void"
        try:
            pair = Pair(
                ask.path, ask.stream, ask.body.decode(), a, b, texts[a.executor].decode(), texts[b.executor].decode(),
                tuple(sorted(electors.items())), self.judges,
            )  # fmt: skip
        except UnicodeDecodeError:
            return "void"
        body = msgspec.json.encode(pair)
        votes = await asyncio.gather(*(self._vote(judge, drawn.duel, body) for judge in drawn.judges))
        return self._settle(a, b, drawn, [vote for vote in votes if vote is not None])

    async def _attested(self, leg: Attempt, request: str) -> Answer | None:
        """What an executor puts its name to; one that does not stand by its answer has lost, as far as is seen here."""
        told = Attest(request, digest(bytes(leg.body)))
        try:
            async with asyncio.timeout(ATTEST_S):
                answer = msgspec.json.decode(
                    await self.peers.ask(leg.executor, ATTEST_PATH, msgspec.json.encode(told)), type=Answer
                )
            _check_answer(answer)
            if (answer.executor, answer.request, answer.answer) != (leg.executor, told.request, told.answer):
                raise StatementError("it signs another answer")
        except (OSError, TimeoutError, msgspec.DecodeError, StatementError) as error:
            log.warning("an executor does not sign its answer", extra={"peer": leg.executor, "reason": str(error)})
            self.peers.duelled(leg.executor, False)
            return None
        return answer

    async def _vote(self, judge: str, duel: str, body: bytes) -> Vote | None:
        """A judge's vote; None if it stays silent."""
        try:
            async with asyncio.timeout(JUDGE_S):
                vote = msgspec.json.decode(await self.peers.ask(judge, JUDGE_PATH, body), type=Vote)
            if (vote.duel, vote.judge) != (duel, judge) or not VOTE_A <= vote.vote <= VOTE_UNDECIDED:
                raise StatementError("it votes on something else")
            check(judge, "vote", msgspec.structs.replace(vote, signature=""), vote.signature)
        except (OSError, TimeoutError, msgspec.DecodeError, StatementError) as error:
            log.info("a judge is silent", extra={"peer": judge, "reason": str(error) or type(error).__name__})
            return None
        return vote

    def _settle(self, a: Answer, b: Answer, drawn: Drawn, votes: list[Vote]) -> str:
        """Have the verdict move stakes, and remember who won."""
        said = _votes(drawn.judges, votes)
        for judge in drawn.judges:
            _count(self.records.setdefault(judge, Record()), judge, drawn.duel, said)
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


async def _first(legs: "dict[asyncio.Future[Any], Attempt]", race: _Race) -> Any:
    """Result of the leg that the user sees, once it is done; if there is none, what the first of them raised."""
    pending = set(legs)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if race.first is legs[task]:
                return task.result()
    return next(iter(legs)).result()


def _came(task: "asyncio.Future[Any]") -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


async def _cancel(tasks: "Iterable[asyncio.Future[Any]]") -> None:
    """Until all of them are done."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
