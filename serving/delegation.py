"""Handing requests to peers: each is signed, escrowed for where there is a ledger, and watched while its answer comes.

A request goes to one peer, or with the market's chance to two, whose answers other peers judge. What a peer promises
and says before its answer is checked here; whether it did as it promised is what the provider learns in the end.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import msgspec
import orjson

from wwwserve.agents.knowledge import AD_STAKE, AD_TARIFF
from wwwserve.agents.protocol import PER_REQUEST, TARIFF_SIZE
from wwwserve.agents.tariff import in_micro
from wwwserve.serving.boundary import head_line, promise_of
from wwwserve.serving.config import NodeConfig
from wwwserve.serving.cooling import Cooling
from wwwserve.serving.duel.duels import JUDGE_S, Attempt, Duels
from wwwserve.serving.duel.judge import judgeable
from wwwserve.serving.duel.messages import COMMITMENT, JUDGE_PATH, JUDGED_IN, JUDGED_TOKENS, Pair
from wwwserve.serving.engine.prefix_index import Prefix, PrefixIndex
from wwwserve.serving.http.files import is_shortage
from wwwserve.serving.http.handover import WithoutUsage, for_pay, meter_of
from wwwserve.serving.http.messages import Refused
from wwwserve.serving.http.peers import PeerClient, refusal
from wwwserve.serving.http.reply import (
    EVENTS,
    MOST_ANSWER,
    CompletionRequest,
    Failed,
    Reply,
    RetryableError,
    meter_whole,
    pass_stream_on,
    retry_after,
    send_timed,
)
from wwwserve.serving.http.sse import AnswerMeter
from wwwserve.serving.http.transport import Response
from wwwserve.serving.ledger.accounts import ESCROW, Accounts, Came, Payment, hung_up
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.channel_ledger import micro
from wwwserve.serving.ledger.journal import Full
from wwwserve.serving.ledger.verdicts import Verdict
from wwwserve.serving.market import Promise, Tariff
from wwwserve.serving.metrics import Metrics
from wwwserve.serving.node_provider import Decision, NodeProvider
from wwwserve.serving.plain import in_words
from wwwserve.serving.tracing import end_exchange, promised

log = logging.getLogger("wwwserve.delegation")

PEER_PREFIX = "/peer"  # of the paths that peers ask at
PROMPT, TARIFF = "x-wwwserve-prompt", "x-wwwserve-tariff"  # tokens; INPUT CACHED OUTPUT, micro-credits per 1000 tokens
TTFT, TPOT = "x-wwwserve-ttft", "x-wwwserve-tpot"
REFUSED = "x-wwwserve-refused"  # the status of an answer by which a peer does not take a request
OFFER_TIMEOUT_S = 2.0  # for a peer to take a request or not
MOST_LINE = 4096  # bytes of the line before a peer's answer
MOST_VOTE = 4096  # bytes
EXECUTORS_FAULT = (401, 403, 404, 405, 407, 408, 425, 429)  # and from 500 on: of a peer's engine, not of the request


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

    def came(self, now_s: float, speed: float) -> Came:
        """What came of an answer that ends now. Time that the user took to read it is not the peer's."""
        took_s = now_s - self.taken_s - self.meter.waited_s * speed
        if self.cancelled:
            return hung_up(self.meter, self.stream, self.promise, took_s)
        meter = self.meter
        return Came(meter.tokens, meter.complete, took_s, meter.usage, text_bytes=meter.text_bytes)


class Delegation:
    """One node's requests that peers have."""

    def __init__(
        self, config: NodeConfig, provider: NodeProvider, client: PeerClient, metrics: Metrics,
        accounts: Accounts | None, clock: Callable[[], float], prefixes: PrefixIndex,
    ) -> None:  # fmt: skip
        self.config, self.provider, self.client, self.metrics = config, provider, client, metrics
        self.accounts, self.clock, self.prefixes = accounts, clock, prefixes
        self.cooling = Cooling(clock)
        self.under_way: set[int] = set()  # requests that are being offered to a peer, or with one
        self.handed: dict[int, Handed] = {}  # by the provider's number of the request
        self.duels = Duels(
            client.messages.identity, _DuelPeers(self), metrics, judges=config.market.judges,
            stakes=accounts.ledger.stakes if accounts is not None else None,
        )  # fmt: skip

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
    ) -> AnswerMeter:
        """Hand a request, of `prompt` tokens and for at most `most`, to the peer that was decided on, or, with the
        market's chance, to two; returns the meter of the answer that the user has.

        Raises RetryableError if the peer did not take it or nothing came of it, Failed if it broke off.
        """
        assert decision.peer is not None
        if self.accounts is not None:
            per_choice = None if self.provider.market.payment == PER_REQUEST else most // completion.choices
            completion, hidden = for_pay(completion, per_choice)
            reply = WithoutUsage(reply) if hidden else reply
        offer = Offer(decision.request, decision.peer, completion, prompt, most)
        rival = self._rival(completion, decision, reply)
        if rival is None:
            return await self._hand_over(offer, reply)

        async def hand(name: str, attempt: Attempt) -> AnswerMeter:
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

        meter: AnswerMeter = await self.duels.run(completion, (decision.peer, rival), hand, reply)
        return meter

    def _rival(self, completion: CompletionRequest, decision: Decision, reply: Reply) -> str | None:
        """Who answers a request as well; None for nobody. A stream that may be resumed has one executor at a time."""
        chance = self.config.market.duel_probability
        if chance == 0.0 or self.provider.toss() >= chance or reply.resumable or not self.duels.may_begin():
            return None
        if not judgeable(completion.path, orjson.loads(completion.body)):
            return None
        return next((name for name in self.provider.rivals(decision) if name in self.client.adverts), None)

    async def _hand_over(self, offer: Offer, reply: Reply) -> AnswerMeter:
        """Hand over a request that the provider counts as offered. Raises as `delegate`."""
        request, name, completion = offer.request, offer.peer, offer.completion
        path = PEER_PREFIX + completion.path
        tariff = self.provider.tariff_of(request)
        trace = completion.trace.child("delegate", "client")
        headers = {PROMPT: str(offer.prompt), TARIFF: " ".join(map(str, tariff)), **trace.for_peer()}
        self.under_way.add(request)
        predicted = self.prefixes.cached(completion.prefix, offer.prompt, name).tokens
        handed: Handed | None = None
        payment: Payment | None = None
        answered = False
        try:
            if name not in self.client.adverts:
                raise RetryableError("it is gone")
            if self.accounts is not None:
                payment = await self._escrow(offer, tariff)
                headers[ESCROW] = payment.header
            async with (
                asyncio.timeout(OFFER_TIMEOUT_S) as patience,
                self.client.request(
                    name, path, completion.body, headers, timeout_s=None, read_timeout_s=self.config.engine.timeout_s
                ) as (response, sealed),
            ):
                if response.status != 200:
                    if payment is not None:  # what anybody else may have said counts as an answer of nothing
                        payment.refused = self._is_refusal(name, sealed, response)
                    if response.status == 403:
                        refused = await refusal(response)
                        log.warning("a peer refuses a message", extra={"peer": name, "answer": refused.reason})
                    if response.status != 409:  # which says that it does not want this one now
                        self._failed(name, retry_after(response))
                    raise RetryableError(f"it answers {response.status}", response.status)
                self.client.messages.check_answer(name, sealed, response.raw_headers)
                promise = promise_of(response.headers[TTFT], response.headers[TPOT])
                if not self.provider.is_as_shown(request, promise):
                    raise RetryableError(f"it promises {promise}, which is later than it advertised")
                if isinstance(reply, Attempt):
                    reply.commitment = response.headers.get(COMMITMENT, "")
                patience.reschedule(None)
                handed = Handed(name, self.clock(), promise, completion.stream, response, meter_of(completion))
                self.handed[request] = handed
                self.provider.accepted(request, handed.taken_s, promise, predicted)
                self.metrics.handed(name)
                await self._fetch(completion, handed, payment, reply)
                answered = handed.meter.tokens > 0
        except Refused as error:
            self.metrics.message_refused(error.kind)
            self._failed(name)
            raise RetryableError(str(error)) from None
        except asyncio.CancelledError:
            if handed is not None:
                handed.cancelled = True
            raise
        except (TimeoutError, OSError, KeyError, ValueError) as error:
            reason = in_words(error)
            if is_shortage(error):
                raise RetryableError(reason) from None
            self._failed(name)
            if reply.started and not reply.resumable:
                raise Failed(502, f"the peer broke off: {reason}", "peer_error") from None
            raise RetryableError(reason) from None
        finally:
            if trace.span is not None:
                trace.span.note({"wwwserve.peer": name, **(promised(handed.promise) if handed is not None else {})})
                end_exchange(trace.span, 200 if handed is not None else 0, handed.meter if handed is not None else None)
            self._end_attempt(request, handed, answered)
            if answered and handed is not None:
                remember(self.prefixes, self.metrics, name, completion.prefix, offer.prompt, handed.meter, predicted)
            if payment is not None:
                if handed is None:
                    payment.end()
                else:
                    came = handed.came(self.clock(), self.config.market.speed)
                    if isinstance(reply, Attempt) and reply.complete:
                        reply.owed = partial(_pay, payment, handed.promise, came)
                    else:
                        payment.end(handed.promise, came)
        return handed.meter

    def _failed(self, peer: str, retry_after_s: int | None = None) -> None:
        """A peer did not do as it should; if that goes on, it is asked for nothing for a while."""
        if peer not in self.client.adverts:  # it is gone, and another one when it comes back
            return
        until_s = self.cooling.failed(peer, retry_after_s)
        if until_s is not None:
            self.provider.leave_alone(peer, until_s)
            self.metrics.peer_left_alone()
            log.warning("a peer fails and is left alone", extra={"peer": peer, "for_s": round(until_s - self.clock())})

    def _is_refusal(self, peer: str, sealed: str, response: Response) -> bool:
        """Whether it is the peer itself that does not take what it was asked."""
        try:
            self.client.messages.check_answer(peer, sealed, response.raw_headers)
        except Refused:
            return False
        return response.headers.get(REFUSED) == str(response.status)

    def _end_attempt(self, request: int, handed: Handed | None, answered: bool) -> None:
        """A request is no longer with a peer, which may not have taken it."""
        self.under_way.remove(request)
        if handed is None:
            self.provider.refused(request)
            return
        del self.handed[request]
        if answered:
            self.metrics.brought(handed.peer)
            self.provider.answered(request, self.clock(), handed.meter.tokens)
            if handed.meter.complete:
                self.cooling.answered(handed.peer)
                self.provider.leave_alone(handed.peer, None)
        else:
            self.provider.lost(request)

    async def _escrow(self, offer: Offer, tariff: Tariff) -> Payment:
        """Raises RetryableError if nothing can be in escrow with the peer."""
        assert self.accounts is not None
        try:
            return await self.accounts.escrow(offer.peer, tariff, offer.prompt, offer.most, offer.completion.body)
        except Full as error:
            raise RetryableError(f"the ledger cannot be written: {error}") from None
        except LedgerError as error:
            raise RetryableError(str(error)) from None

    async def _fetch(
        self, completion: CompletionRequest, handed: Handed, payment: Payment | None, reply: Reply
    ) -> None:
        """The answer of a peer: a line that says how its engine answered, and what it answered."""
        response, meter = handed.response, handed.meter
        status, kind = head_line(await response.readline(MOST_LINE))
        if status >= 500 or status in EXECUTORS_FAULT:
            self._failed(handed.peer)
            raise RetryableError(f"its engine answers {status}", status)

        def watch(passed: bytes) -> None:
            if payment is not None:
                payment.feed(passed)
                if payment.is_due(meter.tokens) and not meter.complete:
                    payment.advance(handed.promise, handed.came(self.clock(), self.config.market.speed))
                    assert self.accounts is not None
                    self.accounts.hurry()

        if completion.stream and status == 200 and kind.startswith(EVENTS):
            await pass_stream_on(response, kind, reply, meter, watch)
            return
        body = await response.read(MOST_ANSWER)
        if status == 200:
            await meter_whole(meter, body)
            watch(body)
        await send_timed(reply.whole(status, kind, body), meter)


class _DuelPeers:
    """What `serving.duel.duels` needs of a node."""

    def __init__(self, delegation: "Delegation") -> None:
        self._of = delegation

    def electors(self, model: str) -> dict[str, int]:
        """See `serving.duel.duels.Peers`. Without a ledger, the stakes are those that peers advertise."""
        accounts, found = self._of.accounts, {}
        for name, advert in self._of.client.adverts.items():
            if model in advert.serves and self._of.config.trusts(name):  # judges see the prompt
                stake = micro(advert.load[AD_STAKE]) if accounts is None else accounts.ledger.stakes.stake(name)
                found[name] = max(0, stake)
        return found

    async def request(self, peer: str, path: str, body: bytes) -> bytes:
        """See `serving.duel.duels.Peers`."""
        return await self._of.client.post(peer, path, body, timeout_s=JUDGE_S)

    async def vote(self, judge: str, pair: Pair) -> bytes:
        """See `serving.duel.duels.Peers`."""
        of, client, body = self._of, self._of.client, msgspec.json.encode(pair)
        if of.accounts is None:
            return await self.request(judge, JUDGE_PATH, body)
        advert = client.adverts.get(judge)
        if advert is None:
            raise OSError("it is gone")
        given, cached, output = (in_micro(price) for price in advert.load[AD_TARIFF : AD_TARIFF + TARIFF_SIZE])
        tariff, began_s, came = (given, cached, output), of.clock(), None
        try:
            payment = await of.accounts.escrow(judge, tariff, pair.prompt(), JUDGED_TOKENS, body)
        except (LedgerError, Full) as error:
            raise OSError(f"judging cannot be paid: {error}") from None
        headers = {TARIFF: " ".join(map(str, tariff)), ESCROW: payment.header}
        try:
            async with client.request(judge, JUDGE_PATH, body, headers, timeout_s=JUDGE_S, read_timeout_s=JUDGE_S) as (
                response,
                _,
            ):
                if response.status != 200:
                    raise await refusal(response)
                vote = await response.read(MOST_VOTE)
            payment.feed(vote)
            came = Came(JUDGED_TOKENS, True, of.clock() - began_s, None)
            return vote
        finally:
            payment.end(JUDGED_IN, came)

    def duelled(self, peer: str, won: bool) -> None:
        """See `serving.duel.duels.Peers`."""
        self._of.provider.duelled(peer, won)
        self._of.metrics.duelled(peer, won)

    def settle(self, verdict: Verdict) -> None:
        """See `serving.duel.duels.Peers`."""
        accounts = self._of.accounts
        if accounts is not None:
            accounts.ledger.heard(verdict.case.opening.origin, msgspec.json.encode(verdict))
            accounts.spread()


def remember(
    prefixes: PrefixIndex, metrics: Metrics, peer: str, prefix: Prefix, prompt: int, meter: AnswerMeter, predicted: int
) -> None:  # fmt: skip
    """A request, of `prompt` tokens as far as was known and `predicted` of them cached, was answered here or by a peer:
    what is cached there now, and whether the prediction was right."""
    usage = meter.usage
    told, output = usage is not None and usage.prompt > 0, usage.output if usage is not None else meter.tokens
    own = prefixes.is_own(peer)
    if not own:  # whose word is not taken for more than its answer and the own estimate show
        output = meter.tokens
    if usage is not None and told:
        prompt = usage.prompt if own else min(usage.prompt, 2 * prompt)
        if usage.cached is not None:
            metrics.prefix(not own, predicted, usage.cached, prompt)
    prefixes.remember(peer, prefix, prompt, output, meter.text_bytes, told)


def _pay(payment: Payment, promise: Promise, came: Came, signed: bool) -> None:
    """Pay for an answer of a duel; nothing if its executor does not put its name to it."""
    payment.end(promise, came if signed else None)
