"""Duels on live answers: a request goes to two executors, the user gets the first answer, judges compare the two.

The protocol, and what each side checks, is in docs/duels.md; the statements are those of `serving.ledger.verdicts`.
Here is an origin's side; an executor's is `serving.duel.attestor`, a judge's `serving.duel.judge_pool`.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np

from wwwserve.agents.protocol import A_WINS, TIE, duel_outcome
from wwwserve.serving.duel.evidence import Record, count_vote, votes_by
from wwwserve.serving.duel.messages import ATTEST_PATH, Attest, Pair
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.reply import CompletionRequest, Reply
from wwwserve.serving.http.sse import AnswerMeter, StreamError
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import StatementError, digest
from wwwserve.serving.ledger.verdicts import (
    Answer,
    Case,
    DuelOpening,
    Party,
    Verdict,
    Vote,
    committed,
    jury,
    verify_answer,
    verify_votes,
)
from wwwserve.serving.metrics import Metrics
from wwwserve.serving.plain import in_words

log = logging.getLogger("wwwserve.duel")

MOST_OPEN = 32  # duels of a node that are not settled, beyond which none is begun
MOST_ANSWER_BYTES = 1 << 20  # of an answer that is judged
SECOND_S = 120.0  # for the other answer, once the user has one
ATTEST_S = 5.0
ATTEST_TRIES = 3
JUDGE_S = 60.0  # for a vote
REST_S = 5.0  # without a new duel, after one on which no judge voted
RECENT = 16  # duels that ended, kept to look at


class Peers(Protocol):
    """What a duel needs of the node that it is at."""

    def electors(self, model: str) -> dict[str, int]:
        """Peers that serve a model, and what each has at stake, micro-credits."""

    async def request(self, peer: str, path: str, body: bytes) -> bytes:
        """What a peer answers to a signed request. Raises OSError, also for an answer that is not a success."""

    async def vote(self, judge: str, pair: Pair) -> bytes:
        """What a judge answers, paid. Raises OSError, also for an answer that is not a success."""

    def duelled(self, peer: str, won: bool) -> None:
        """A peer's answer won or lost."""

    def settle(self, verdict: Verdict) -> None:
        """A verdict moves stake."""


class Attempt(Reply):
    """The answer of one executor: passed on to the user if it is the first, and kept.

    Whoever hands the request over sets `commitment`, and `owed`, to be called once with whether the executor put its
    name to the answer: else it is not paid.
    """

    def __init__(self, executor: str, race: "_Race") -> None:
        super().__init__()
        self.executor, self.race = executor, race
        self.status = 0
        self.body = bytearray()
        self.too_long = False
        self.commitment = ""
        self.owed: Callable[[bool], object] | None = None
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

    def pay(self, signed: bool) -> None:
        """Pay what is owed, if it is not paid already."""
        owed, self.owed = self.owed, None
        if owed is not None:
            owed(signed)

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


@dataclass(eq=False)
class Ended:
    """A duel that is over, to look at."""

    at_s: float  # by the event loop's clock
    executors: list[str]
    outcome: str = "void"  # as `serving.metrics.Metrics.duel` counts it
    winner: str = ""
    votes: dict[str, int] = field(default_factory=dict)  # by judge, of those asked first


@dataclass(eq=False)
class _Opened:
    """A duel whose executors are known, and to what all three committed themselves."""

    opening: DuelOpening
    secret: str


class Duels:
    """An origin's side."""

    def __init__(
        self, identity: Identity, peers: Peers, metrics: Metrics, *, judges: int, stakes: Stakes | None = None
    ) -> None:
        """`judges` are asked first; the others only if these know a winner, and stake may move."""
        self.identity, self.peers, self.metrics, self.judges, self.stakes = identity, peers, metrics, judges, stakes
        self.records: dict[str, Record] = {}  # of judges
        self.recent: deque[Ended] = deque(maxlen=RECENT)
        self._closing: dict[asyncio.Task[None], dict[asyncio.Future[Any], Attempt]] = {}
        self._running = 0
        self._rests_until_s = 0.0  # by the event loop's clock
        self._turn = asyncio.Lock()  # of what is judged, so that each case comes after the verdict before

    @property
    def open(self) -> int:
        """Duels that are not settled."""
        return self._running + len(self._closing)

    def may_begin(self) -> bool:
        """Whether one more may be open. Not just after one that nobody judged: its second answer was paid for nothing,
        and judges that are gone, or have judged enough for this node, are so for a while."""
        return self.open < MOST_OPEN and asyncio.get_running_loop().time() >= self._rests_until_s

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
            for attempt in attempts.values():
                attempt.pay(True)
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
        closing = list(self._closing.values())
        await _cancel(self._closing)
        for attempts in closing:
            await _cancel(attempts)  # of those whose end had not begun
            for attempt in attempts.values():
                attempt.pay(True)

    async def _close(self, completion: CompletionRequest, attempts: "dict[asyncio.Future[Any], Attempt]") -> None:
        """Once the user has an answer: get the other one, and have both judged."""
        ended = Ended(0.0, sorted(attempt.executor for attempt in attempts.values()))
        try:
            await asyncio.wait(attempts, timeout=SECOND_S)
            await _cancel(attempts)
            if all(_came(task) and attempt.complete for task, attempt in attempts.items()):
                ended.outcome = await self._judge(completion, list(attempts.values()), ended)
        except Exception:
            log.exception("a duel met an error")
        finally:
            await _cancel(attempts)
            for attempt in attempts.values():
                attempt.pay(True)
            self.metrics.duel(ended.outcome)
            ended.at_s = asyncio.get_running_loop().time()
            self.recent.append(ended)

    async def _judge(self, completion: CompletionRequest, attempts: list[Attempt], ended: Ended) -> str:
        a, b = sorted(attempts, key=lambda attempt: attempt.executor)
        if not (a.commitment and b.commitment):
            return "void"
        opened = self._open(completion, a, b)
        one, other = await asyncio.gather(self._attested(opened, a), self._attested(opened, b))
        if one is None or other is None:
            return "void"
        async with self._turn:
            height = 1 + self.stakes.height(a.executor, b.executor) if self.stakes is not None else 1
            case = Case(opened.opening, opened.secret, height, one, other)
            try:
                pair = Pair(
                    case, completion.path, completion.stream, completion.body.decode(), a.body.decode(),
                    b.body.decode(),
                )  # fmt: skip
            except UnicodeDecodeError:
                return "void"
            return await self._vote_on(pair, self._judges(case, completion.model), ended)

    def _open(self, completion: CompletionRequest, a: Attempt, b: Attempt) -> _Opened:
        """A duel of two that have answered; stake may move if all three are of the epoch, and there is a bond."""
        secret, own = secrets.token_hex(32), self.identity.name
        stakes, bond = self.stakes, self.stakes.bond(own) if self.stakes is not None else None
        parties = (own, a.executor, b.executor)
        epoch = stakes.epoch_of(parties) if stakes is not None and bond is not None else ""
        opening = DuelOpening(
            own, epoch, digest(completion.body), Party(a.executor, a.commitment), Party(b.executor, b.commitment),
            committed(secret), bond if epoch else None,
        )  # fmt: skip
        return _Opened(opening.signed(self.identity), secret)

    def _judges(self, case: Case, model: str) -> list[str]:
        """Who can be asked, in the order drawn."""
        there = self.peers.electors(model)
        if case.opening.epoch and self.stakes is not None:
            drawn = self.stakes.jury(case)
        else:
            drawn = jury({name: max(stake, 1) for name, stake in there.items()}, case.opening.parties(), case.seed())
        return [name for name in drawn.weights if name in there]

    async def _attested(self, opened: _Opened, attempt: Attempt) -> Answer | None:
        """What an executor puts its name to, and is paid for; one that does not stand by its answer is not paid, and
        has lost, as far as is seen here."""
        opening, name = opened.opening, attempt.executor
        attest, reason = Attest(opening, digest(bytes(attempt.body))), ""
        party = opening.a if opening.a.name == name else opening.b
        for _ in range(ATTEST_TRIES):
            try:
                async with asyncio.timeout(ATTEST_S):
                    answer = msgspec.json.decode(
                        await self.peers.request(name, ATTEST_PATH, msgspec.json.encode(attest)), type=Answer
                    )
                if answer.answer != attest.answer:
                    raise StatementError("it signs another answer")
                verify_answer(answer, opening, party)
                attempt.pay(True)
                return answer
            except (OSError, TimeoutError, msgspec.DecodeError, StatementError) as error:
                reason = in_words(error)
        log.warning("an executor does not sign its answer", extra={"peer": name, "reason": reason})
        attempt.pay(False)
        self.peers.duelled(name, False)
        return None

    async def _vote_on(self, pair: Pair, judges: list[str], ended: Ended) -> str:
        """Have a pair judged: by the first, and by all where these know a winner and stake may move."""
        if not judges:
            return "void"
        case, panel = pair.case, judges[: self.judges]
        votes = await self._votes(panel, pair)
        said = ended.votes = votes_by(panel, votes)
        for judge in panel:
            count_vote(self.records.setdefault(judge, Record()), judge, case.seed(), said)
        if not votes:
            self._rests_until_s = asyncio.get_running_loop().time() + REST_S
            return "void"
        outcome = duel_outcome(np.array(list(said.values()), np.int64))
        if outcome == TIE:
            return "tie"
        winner, loser = (case.a, case.b) if outcome == A_WINS else (case.b, case.a)
        ended.winner = winner.executor
        self.peers.duelled(winner.executor, True)
        self.peers.duelled(loser.executor, False)
        if case.opening.epoch and self.stakes is not None:
            votes += await self._votes(judges[self.judges :], pair)
            verdict = Verdict(case, tuple(votes))
            if self.stakes.is_news(verdict):
                self.peers.settle(verdict)
        return "won"

    async def _votes(self, judges: list[str], pair: Pair) -> list[Vote]:
        votes = await asyncio.gather(*(self._vote(judge, pair) for judge in judges))
        return [vote for vote in votes if vote is not None]

    async def _vote(self, judge: str, pair: Pair) -> Vote | None:
        """A judge's vote; None if it stays silent."""
        try:
            async with asyncio.timeout(JUDGE_S):
                vote = msgspec.json.decode(await self.peers.vote(judge, pair), type=Vote)
            if vote.judge != judge:
                raise StatementError("it passes on another's vote")
            verify_votes(pair.case, [vote])
        except (OSError, TimeoutError, msgspec.DecodeError, StatementError) as error:
            log.info("a judge is silent", extra={"peer": judge, "reason": in_words(error)})
            return None
        return vote


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
