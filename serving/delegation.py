"""Handing requests to peers: each is signed, escrowed for where there is a ledger, and watched while its answer comes.

A request goes to one peer, or with the market's chance to two, whose answers other peers judge. What a peer promises
and says before its answer is checked here; whether it did as it promised is what the provider learns in the end.
"""

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import orjson

from wwwserve.agents.knowledge import AD_STAKE
from wwwserve.serving.config import NodeConfig
from wwwserve.serving.duel.duels import JUDGE_S, Attempt, Duels
from wwwserve.serving.duel.judge import judgeable
from wwwserve.serving.http.handover import WithoutUsage, for_pay
from wwwserve.serving.http.messages import Refused
from wwwserve.serving.http.peers import PeerClient, refusal
from wwwserve.serving.http.reply import (
    EVENTS,
    MOST_ANSWER,
    CompletionRequest,
    Failed,
    Reply,
    RetryableError,
    pass_stream_on,
)
from wwwserve.serving.http.sse import AnswerMeter, Usage
from wwwserve.serving.http.transport import Response
from wwwserve.serving.ledger.accounts import ESCROW, Accounts, Payment
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.channel_ledger import micro
from wwwserve.serving.ledger.journal import Full
from wwwserve.serving.ledger.stakes import Staked, Verdict
from wwwserve.serving.metrics import Metrics
from wwwserve.serving.node_provider import Decision, NodeProvider, Promise

log = logging.getLogger("wwwserve.delegation")

PEER_PREFIX = "/peer"  # of the paths that peers ask at
PROMPT, TTFT, TPOT = "x-wwwserve-prompt", "x-wwwserve-ttft", "x-wwwserve-tpot"
OFFER_TIMEOUT_S = 2.0  # for a peer to take a request or not
MOST_LINE = 4096  # bytes of the line before a peer's answer
MOST_PROMISED_S = 1e6

_KIND = re.compile(r"[ -~]{1,200}")  # a content type


class Offer(NamedTuple):
    """A request as it is offered to a peer."""

    request: int  # its number with the provider
    peer: str
    completion: CompletionRequest
    prompt: int  # tokens
    most: int  # tokens of the longest answer that it may get


@dataclass(slots=True, eq=False)
class Handed:
    """A request that a peer has taken."""

    peer: str
    taken_s: float
    promise: Promise
    stream: bool
    response: Response
    meter: AnswerMeter
    cancelled: bool = False  # by who asked

    def tokens(self, now_s: float) -> int:
        """Tokens that came so far. An answer that is not streamed shows nothing on its way, so it is as promised."""
        if self.stream:
            return self.meter.tokens
        late_s = now_s - self.taken_s - self.promise.ttft_s
        return int(max(0.0, late_s) / max(self.promise.tpot_s, 1e-9)) + 1


class Delegation:
    """One node's requests that peers have."""

    def __init__(
        self, config: NodeConfig, provider: NodeProvider, client: PeerClient, metrics: Metrics,
        accounts: Accounts | None, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.config, self.provider, self.client, self.metrics = config, provider, client, metrics
        self.accounts, self.clock = accounts, clock
        self.under_way: set[int] = set()  # requests that are being offered to a peer, or with one
        self.handed: dict[int, Handed] = {}  # by the provider's number of the request
        self.duels = Duels(client.messages.identity, _DuelPeers(self), metrics, judges=config.market.judges)

    def look(self, now_s: float) -> None:
        """The provider learns how much of each answer has come."""
        for request, handed in self.handed.items():
            self.provider.streamed(request, handed.tokens(now_s))

    def gone(self, peer: str) -> None:
        """A peer fell silent: what it has is asked for elsewhere."""
        for handed in [each for each in self.handed.values() if each.peer == peer]:
            handed.response.close()

    async def delegate(
        self, decision: Decision, completion: CompletionRequest, prompt: int, most: int, reply: Reply
    ) -> Usage | None:
        """Hand a request, of `prompt` tokens and for at most `most`, to the peer that was decided on, or, with the
        market's chance, to two.

        Raises RetryableError if the peer did not take it or nothing came of it, Failed if it broke off.
        """
        assert decision.peer is not None
        if self.accounts is not None:
            per_choice = most // completion.choices
            completion, hidden = for_pay(completion, per_choice if self.provider.market.per_ktok else None)
            reply = WithoutUsage(reply) if hidden else reply
        offer = Offer(decision.request, decision.peer, completion, prompt, most)
        rival = self._rival(completion, decision, reply)
        if rival is None:
            return await self._hand_over(offer, reply)

        async def hand(name: str, attempt: Attempt) -> Usage | None:
            if name != rival:
                return await self._hand_over(offer, attempt)
            copy = self.provider.new(None, completion.klass, prompt, most, self.clock(), completion.model)
            self.provider.offer(copy, rival)
            try:
                return await self._hand_over(offer._replace(request=copy, peer=rival), attempt)
            except RetryableError:
                self.provider.mask(offer.request, rival)
                raise
            finally:
                self.provider.release(copy)

        usage: Usage | None = await self.duels.run(completion, (decision.peer, rival), hand, reply)
        return usage

    def _rival(self, completion: CompletionRequest, decision: Decision, reply: Reply) -> str | None:
        """Who answers a request as well; None for nobody. A stream that may be resumed has one executor at a time."""
        chance = self.config.market.duel_probability
        if chance == 0.0 or self.provider.toss() >= chance or reply.resumable or not self.duels.may_begin():
            return None
        if not judgeable(completion.path, orjson.loads(completion.body)):
            return None
        return next((name for name in self.provider.rivals(decision) if name in self.client.adverts), None)

    async def _hand_over(self, offer: Offer, reply: Reply) -> Usage | None:
        """Hand over a request that the provider counts as offered. Raises as `delegate`."""
        request, name, completion = offer.request, offer.peer, offer.completion
        path = PEER_PREFIX + completion.path
        headers = {PROMPT: str(offer.prompt)}
        self.under_way.add(request)
        handed: Handed | None = None
        payment: Payment | None = None
        answered = False
        try:
            if name not in self.client.adverts:
                raise RetryableError("it is gone")
            if self.accounts is not None:
                payment = await self._escrow(name, offer.most, completion.body)
                headers[ESCROW] = payment.header
            async with (
                asyncio.timeout(OFFER_TIMEOUT_S) as patience,
                self.client.request(
                    name, path, completion.body, headers, timeout_s=None, read_timeout_s=self.config.engine.timeout_s
                ) as (response, sealed),
            ):
                if response.status != 200:
                    if payment is not None:
                        payment.refused = True
                    if response.status == 403:
                        refused = await refusal(response)
                        log.warning("a peer refuses a message", extra={"peer": name, "answer": refused.reason})
                    raise RetryableError(f"it answers {response.status}", response.status)
                self.client.messages.check_answer(name, sealed, response.raw_headers)
                promise = _promise(response)
                patience.reschedule(None)
                handed = Handed(name, self.clock(), promise, completion.stream, response, AnswerMeter())
                self.handed[request] = handed
                self.provider.accepted(request, handed.taken_s, promise)
                await self._fetch(completion, handed, payment, reply)
                answered = handed.meter.tokens > 0
        except Refused as error:
            self.metrics.message_refused(error.kind)
            raise RetryableError(str(error)) from None
        except asyncio.CancelledError:
            if handed is not None:
                handed.cancelled = True
            raise
        except (TimeoutError, OSError, KeyError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            if reply.started and not reply.resumable:
                raise Failed(502, f"the peer broke off: {reason}", "peer_error") from None
            raise RetryableError(reason) from None
        finally:
            self._end_attempt(request, handed, answered)
            if payment is not None:
                if handed is not None:
                    payment.end(self._came(handed), handed.meter.complete)
                else:
                    payment.end()
        return handed.meter.usage

    def _end_attempt(self, request: int, handed: Handed | None, answered: bool) -> None:
        """A request is no longer with a peer, which may not have taken it."""
        self.under_way.remove(request)
        if handed is None:
            self.provider.refused(request)
            return
        del self.handed[request]
        if answered:
            self.provider.answered(request, self.clock(), handed.meter.tokens)
        else:
            self.provider.lost(request)

    async def _escrow(self, peer: str, most: int, body: bytes) -> Payment:
        """Raises RetryableError if nothing can be in escrow with the peer."""
        assert self.accounts is not None
        try:
            return await self.accounts.escrow(peer, micro(self.provider.posted(peer)), most, body)
        except Full as error:
            raise RetryableError(f"the ledger cannot be written: {error}") from None
        except LedgerError as error:
            raise RetryableError(str(error)) from None

    def _came(self, handed: Handed) -> int:
        """Tokens that are due of an answer: those that came; of one that is not streamed and that the user did not wait
        for, what was generated by then, as promised."""
        if handed.cancelled and not handed.stream and not handed.meter.complete:
            return handed.tokens(self.clock())
        return handed.meter.tokens

    async def _fetch(
        self, completion: CompletionRequest, handed: Handed, payment: Payment | None, reply: Reply
    ) -> None:
        """The answer of a peer: a line that says how its engine answered, and what it answered."""
        response, meter = handed.response, handed.meter
        status, kind = head_line(await response.readline(MOST_LINE))
        if status == 429 or status >= 500:
            raise RetryableError(f"its engine answers {status}", status)
        watch = payment.feed if payment is not None else None
        if completion.stream and status == 200 and kind.startswith(EVENTS):
            await pass_stream_on(response, kind, reply, meter, watch)
            return
        body = await response.read(MOST_ANSWER)
        if status == 200:
            meter.whole(body)
            if watch is not None:
                watch(body)
        await reply.whole(status, kind, body)


class _DuelPeers:
    """What `serving.duel.duels` needs of a node."""

    def __init__(self, delegation: "Delegation") -> None:
        self._of = delegation

    def electors(self, model: str) -> dict[str, int]:
        """See `serving.duel.duels.Peers`. Without a ledger, the stakes are those that peers advertise."""
        accounts, found = self._of.accounts, {}
        for name, advert in self._of.client.adverts.items():
            if model in advert.serves:
                stake = micro(advert.load[AD_STAKE]) if accounts is None else accounts.ledger.stakes.stake(name)
                found[name] = max(0, stake)
        return found

    async def request(self, peer: str, path: str, body: bytes) -> bytes:
        """See `serving.duel.duels.Peers`."""
        return await self._of.client.post(peer, path, body, timeout_s=JUDGE_S)

    def duelled(self, peer: str, won: bool) -> None:
        """See `serving.duel.duels.Peers`."""
        self._of.provider.duelled(peer, won)
        self._of.metrics.duelled(peer, won)

    def staked(self, peer: str) -> Staked | None:
        """See `serving.duel.duels.Peers`."""
        accounts = self._of.accounts
        return accounts.ledger.stakes.latest.get(peer) if accounts is not None else None

    def settle(self, verdict: Verdict) -> None:
        """See `serving.duel.duels.Peers`."""
        accounts = self._of.accounts
        if accounts is not None:
            stated = msgspec.json.encode(verdict)
            if accounts.ledger.heard(verdict.a.executor, stated):
                accounts.tell_all(stated)


def head_line(line: bytes) -> tuple[int, str]:
    """Status and type of a peer's answer, which go on to the user. Raises ValueError."""
    head = orjson.loads(line)
    if not isinstance(head, dict):
        raise ValueError("the line before its answer is no object")
    status, kind = head.get("status"), head.get("type")
    if type(status) is not int or not 200 <= status < 600:
        raise ValueError(f"its answer has the status {status!r}")
    if not (isinstance(kind, str) and _KIND.fullmatch(kind)):
        raise ValueError(f"its answer has the type {kind!r}")
    return status, kind


def _promise(response: Response) -> Promise:
    """What a peer promises in the head of its answer. Raises KeyError and ValueError."""
    promise = Promise(float(response.headers[TTFT]), float(response.headers[TPOT]))
    if not all(0 <= each <= MOST_PROMISED_S for each in promise):  # and no NaN
        raise ValueError(f"a promise of {promise.ttft_s} s and {promise.tpot_s} s a token")
    return promise
