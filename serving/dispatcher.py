"""The way of a request through a node: held, run here, or handed to a peer, and answered exactly once.

The dispatcher tells a `serving.node_provider.NodeProvider` what happens, carries out what it decides, and does it again
when a peer refuses, fails before the first byte of an answer has gone to the user, or later if the answer can be
resumed. All of it runs on one event loop; a request is one task from arrival to its end.
"""

import asyncio
import logging
import math
import re
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np
import orjson

from wwwserve.agents.decision import HOLD, LOCAL
from wwwserve.agents.knowledge import (
    AD_KV_CAPACITY,
    AD_KV_TOKENS,
    AD_PRICE,
    AD_RUNNING,
    AD_STAKE,
    AD_TIME_S,
    AD_WAITING,
    DUELS_LOST,
    DUELS_WON,
)
from wwwserve.serving.config import NodeConfig
from wwwserve.serving.duel.duels import JUDGE_S, Attestor, Bench, Declined, Duels, Leg
from wwwserve.serving.duel.judge import JudgeError, gain, judgeable, vote_by
from wwwserve.serving.engine.adapter import Engine, EngineError
from wwwserve.serving.http.handover import WithoutUsage, for_pay
from wwwserve.serving.http.messages import Messages, Refused
from wwwserve.serving.http.peers import PeerClient, PeerError, refusal
from wwwserve.serving.http.reply import CompletionRequest, Failed, HeadLineReply, Reply, RetryableError
from wwwserve.serving.http.resume import Resumed, resumable
from wwwserve.serving.http.sse import AnswerMeter, StreamError, Usage
from wwwserve.serving.http.transport import Response, Transport
from wwwserve.serving.ledger.accounts import ESCROW, LEDGER_PATH, Accounts, Delivery, Payment
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.channel_ledger import ChannelLedger, micro
from wwwserve.serving.ledger.journal import Full
from wwwserve.serving.ledger.stakes import Staked, Verdict
from wwwserve.serving.ledger.statements import digest
from wwwserve.serving.membership.heartbeat import Advert, Membership
from wwwserve.serving.metrics import Metrics
from wwwserve.serving.node_provider import Decision, NodeProvider, Promise

log = logging.getLogger("wwwserve.dispatcher")

OFFER_TIMEOUT_S = 2.0  # for a peer to take a request or not
LEDGER_TIMEOUT_S = 5.0
ENGINE_TRIES = 3  # of one request, after which a failing engine is given up
PEER_PREFIX = "/peer"
PROMPT, TTFT, TPOT = "x-wwwserve-prompt", "x-wwwserve-ttft", "x-wwwserve-tpot"
EVENTS = "text/event-stream"
MOST_ANSWER = 64 * 2**20  # bytes of an answer that is not streamed
MOST_LINE = 4096  # bytes of the line before a peer's answer
MOST_PROMISED_S = 1e6
RECENT = 50  # decisions that are kept to look at
BYTES_PER_TOKEN = 4.0  # until answers tell better
MOST_BYTES_PER_TOKEN = 16.0
LEARN = 0.02  # weight of one answer in that


_KIND = re.compile(r"[ -~]{1,200}")  # a content type


@dataclass(slots=True, eq=False)
class Job:
    """A user's request on its way."""

    ask: CompletionRequest
    request: int  # its number with the provider
    most: int  # tokens of the longest answer that it may get
    prompt: int  # tokens
    placed: "asyncio.Future[Decision]"
    failures: int = 0  # of the own engine
    turned_away: bool = False  # by the own engine, which was full


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


class Dispatcher:
    """One node's requests."""

    def __init__(
        self, config: NodeConfig, provider: NodeProvider, engine: Engine, membership: Membership,
        messages: Messages, transport: Transport, metrics: Metrics, url: str,
        ledger: ChannelLedger | None = None,
    ) -> None:  # fmt: skip
        self.config, self.provider, self.engine, self.membership = config, provider, engine, membership
        self.messages, self.metrics, self.url = messages, metrics, url
        self.accounts = Accounts(ledger, provider.market.pricing, self._tell_ledger) if ledger is not None else None
        self.speed = config.market.speed
        self.serves = list(config.serves)
        self.peers: dict[str, Advert] = {}  # by name, those that are there
        self.client = PeerClient(messages, transport, self.peers)
        self.handed: dict[int, Handed] = {}  # by the provider's number of the request
        self.decisions: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.bytes_per_token = BYTES_PER_TOKEN
        self.last_deadlines_s = [max(row) for row in provider.market.deadlines.tolist()]
        self.number = 0
        self.restaked_s = -np.inf  # when the stake was last stated
        self._ticked_s: float | None = None  # when the last tick was
        self._round_due = False  # of decisions
        self._priced = False  # whether the price of an advert that is due has been decided
        self.attestor = Attestor(messages.identity)
        self.bench = Bench(messages.identity, self._judge, metrics)
        self.duels = Duels(messages.identity, _DuelPeers(self), metrics, judges=config.market.judges)
        if ledger is not None:
            provider.pay(ledger.free_credit())

    # Time.

    def clock(self) -> float:
        """Seconds of the market, by the event loop's clock."""
        return asyncio.get_running_loop().time() * self.speed

    async def run(self) -> None:
        """Look, think and tell until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.membership.run(self.heard, self.gone))
                if self.accounts is not None:
                    group.create_task(self.accounts.run())
                group.create_task(self._keep_ticking())
        finally:
            await self.duels.stop()

    async def _keep_ticking(self) -> None:
        """Tick at every multiple of the interval, leaving out those that cannot be kept."""
        loop, interval_s = asyncio.get_running_loop(), self.config.market.tick_s
        began_s, ticks = self.clock(), 0
        while True:
            try:
                await self.tick()
            except Exception:  # whatever one round met, the next one comes
                log.exception("a round failed")
            ticks = max(ticks + 1, math.ceil((self.clock() - began_s) / interval_s))
            due = loop.create_future()
            timer = loop.call_at((began_s + ticks * interval_s) / self.speed, due.set_result, None)
            try:
                await due
            finally:
                timer.cancel()

    async def tick(self) -> None:
        """Look at the engine and at what peers have of ours; decide anew on what is held; say how things are here."""
        up, market = self.engine.healthy, self.config.market
        try:
            await self.engine.scrape()
            if not self.serves:
                self.serves = await self.engine.models()
        except EngineError as error:
            if up and not self.engine.healthy:
                log.warning("the engine is down", extra={"reason": str(error)})
        if self.engine.healthy and not up:
            log.info("the engine is up", extra={"serves": self.serves})
        now_s = self.clock()
        elapsed_s = now_s - self._ticked_s if self._ticked_s is not None else 0.0
        self._ticked_s = now_s
        for r, handed in self.handed.items():
            self.provider.streamed(r, handed.tokens(now_s))
        self.provider.looked(now_s)
        self._look_at_engine(now_s)
        if self.accounts is None and market.stake_rule == "load":
            self.provider.restake(elapsed_s)
        elif self.accounts is not None and now_s >= self.restaked_s + market.gossip_s:
            self.restaked_s = now_s
            await self._restake(self.accounts)
        self.provider.ticked(elapsed_s, now_s)
        self.pump()

    def _publish(self, now_s: float) -> None:
        """Say how things are here; a node that cannot serve says nothing, and is taken for offline."""
        self.provider.advert_due = False
        if not self.serves or not self.engine.healthy:
            return
        self.number += 1
        advert = Advert(
            name=self.messages.name, label=self.config.name, url=self.url, serves=tuple(self.serves),
            run=self.messages.run, number=self.number,
            load=tuple(self.provider.advertise(now_s).tolist()), age_s=0.0,
        )  # fmt: skip
        if self.accounts is not None:
            self.accounts.posted(self.provider.price)
        self.membership.publish(advert, asyncio.get_running_loop().time())

    async def _restake(self, accounts: Accounts) -> None:
        """State the stake that the load calls for, or the configured one."""
        target = self.provider.stake_target() if self.config.market.stake_rule == "load" else micro(self.config.stake)
        self.provider.stake = await accounts.restake(target, self.config.market.gossip_s)

    async def _tell_ledger(self, peer: str, body: bytes) -> bytes:
        """What a peer's ledger answers to a message. Raises OSError, TimeoutError, and LedgerError for a refusal."""
        try:
            return await self.client.post(peer, LEDGER_PATH, body, timeout_s=LEDGER_TIMEOUT_S)
        except PeerError as error:
            raise LedgerError(str(error)) from None

    def heard(self, advert: Advert) -> None:
        """A peer says how things are there."""
        if advert.name not in self.peers:
            log.info("a peer is there", extra={"peer": advert.name, "label": advert.label, "url": advert.url})
        self.peers[advert.name] = advert
        load = np.array(advert.load)
        if self.accounts is not None:  # a stake is what is signed, and granted
            self.accounts.heard(advert.name)
            load[AD_STAKE] = self.accounts.stake(advert.name)
        true_at_s = self.clock() - advert.age_s * self.speed
        self.provider.heard(advert.name, load, true_at_s, frozenset(advert.serves))

    def gone(self, name: str) -> None:
        """A peer fell silent: it gets nothing more, and what it has is asked for elsewhere."""
        log.info("a peer is gone", extra={"peer": name})
        self.peers.pop(name, None)
        self.provider.gone(name)
        if self.accounts is not None:
            self.accounts.gone(name)
        for handed in [each for each in self.handed.values() if each.peer == name]:
            handed.response.close()

    def pump(self) -> None:
        """Decide, at the end of this instant, on all that can be decided on: what else happens now comes first."""
        if not self._round_due:
            self._round_due = True
            asyncio.get_running_loop().call_later(0.0, self._play_round)

    def _play_round(self) -> None:
        """One decision; the next one is made when what follows from it has been sent, so that it is counted."""
        self._round_due = False
        now_s, provider = self.clock(), self.provider
        self._look_at_engine(now_s)
        if self.accounts is not None:
            self._look_at_ledger(self.accounts.ledger)
        if self._priced:
            self._priced = False
            self._publish(now_s)
        decision = provider.decide(now_s, self.metrics.guests_now)
        self._priced = provider.advert_due
        if decision is not None or self._priced:
            self.pump()
        if decision is None:
            return
        job: Job = provider.keys[decision.request]
        where = "hold" if decision.route == HOLD else decision.peer or "local"
        self.metrics.decided(decision.route)
        self.decisions.append({"at_s": round(now_s, 3), "class": self.config.class_names[job.ask.klass], "to": where})
        if decision.route != HOLD and not job.placed.done():
            job.placed.set_result(decision)

    def _look_at_ledger(self, ledger: ChannelLedger) -> None:
        """A peer with whom nothing more may be in escrow is no candidate."""
        if ledger.changed:
            self.provider.pay(ledger.free_credit())
        while ledger.changed:
            peer = ledger.changed.pop()
            if peer in ledger.books.channels:
                self.provider.may_escrow(peer, ledger.room(peer))

    def _look_at_engine(self, now_s: float) -> None:
        load = self.engine.load()
        self.provider.scraped(now_s, load.running, load.waiting, load.kv_tokens)

    # Users' requests.

    async def answer(self, ask: CompletionRequest, reply: Reply) -> None:
        """Answer a user's request. Raises Failed when that cannot be, and what `reply` raises."""
        provider, arrival_s = self.provider, self.clock()
        if provider.held >= self.config.limits.held:
            provider.missed()
            self.metrics.turned_away()
            raise Failed(503, "too many requests wait here", "overloaded", retry_after_s=1)
        prompt = max(1, round(ask.prompt_bytes / self.bytes_per_token))
        most = (ask.max_tokens or self.config.output.max) * ask.choices
        request = provider.new(None, ask.klass, prompt, most, arrival_s, ask.model)
        job = Job(ask, request, most, prompt, asyncio.get_running_loop().create_future())
        provider.keys[request] = job
        self.metrics.accepted()
        outcome, where = "failed", "nowhere"
        again = Resumed(ask, reply) if self.config.resume and resumable(ask) else None
        provider.arrived(request)
        try:
            while True:
                self.pump()
                decision = await job.placed
                where = "local" if decision.route == LOCAL else "peer"
                if again is not None:
                    job.ask, reply = again.ask(), again
                try:
                    if decision.route == LOCAL:
                        usage = await self._run_here(job.ask, job.prompt, reply)
                    else:
                        usage = await self._delegate(job, decision, reply)
                    break
                except RetryableError as reason:
                    log.debug("given back", extra={"by": decision.peer or "the engine", "reason": str(reason)})
                    if again is not None and await again.finish():
                        usage = None
                        break
                    job.prompt = prompt + (again.tokens if again is not None else 0)
                    provider.reprompt(request, job.prompt)
                    self._take_back(job, decision, reason)
            outcome = "answered"
            self._learn(ask, usage)
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            provider.release(request)
            took_s = self.clock() - arrival_s
            on_time = outcome == "answered" and took_s <= self.last_deadlines_s[ask.klass]
            self.metrics.ended(outcome, where, took_s, on_time)
            self._room_again()

    def _room_again(self) -> None:
        """An answer is done, so what is held may be decided on."""
        if self.provider.held:
            self.provider.reopen()
            self.pump()

    def _take_back(self, job: Job, decision: Decision, reason: RetryableError) -> None:
        """Hold a request that came back. Raises Failed where there is nobody left to ask."""
        job.placed = asyncio.get_running_loop().create_future()
        if decision.peer is not None:
            self.provider.come_back(job.request)
            return
        job.failures += not reason.full
        if job.failures >= ENGINE_TRIES:
            raise Failed(502, f"the engine does not answer as it should: {reason}", "engine_error")
        if not self.provider.may_hold(job.request, self.clock()):
            told = reason.status if reason.full and reason.status else 503
            raise Failed(told, f"the engine has no room: {reason}", "overloaded", reason.retry_after_s or 1)
        self.provider.come_back(job.request)
        if not self.peers or job.turned_away:  # nothing has changed before the next tick
            self.provider.close(job.ask.klass)
        job.turned_away = job.turned_away or reason.full

    def _learn(self, ask: CompletionRequest, usage: Usage | None) -> None:
        """Take the length of a prompt into the mean, unless it has images, or a peer says what cannot be."""
        if usage is not None and 0 < usage.prompt <= ask.prompt_bytes <= usage.prompt * MOST_BYTES_PER_TOKEN:
            self.bytes_per_token += LEARN * (ask.prompt_bytes / usage.prompt - self.bytes_per_token)

    async def _run_here(
        self, ask: CompletionRequest, prompt: int, reply: Reply, meter: AnswerMeter | None = None
    ) -> Usage | None:
        """Run a request on the own engine. Raises RetryableError if nothing came of it yet, Failed if something had."""
        meter = meter or AnswerMeter()
        self.engine.sent(prompt)
        try:
            async with self.engine.post(ask.path, ask.body) as response:
                if response.status == 429 or response.status >= 500:
                    raise self._turned_away(response)
                kind = response.headers.get("content-type", "application/json")
                if ask.stream and response.status == 200 and kind.startswith(EVENTS):
                    await _stream(response, kind, reply, meter)
                else:
                    body = await response.read(MOST_ANSWER)
                    if response.status == 200:
                        meter.whole(body)
                    await reply.whole(response.status, kind, body)
        except (TimeoutError, OSError, StreamError) as error:
            reason = f"{type(error).__name__}: {error}"
            if reply.started and not reply.resumable:
                raise Failed(502, f"the engine broke off: {reason}", "engine_error") from None
            if not isinstance(error, StreamError):
                self.engine.suspect(reason)
            raise RetryableError(reason) from None
        finally:
            usage = meter.usage
            output = usage.output if usage else meter.tokens
            self.engine.returned(prompt, output)
        if output:
            self.provider.finished(usage.prompt if usage else prompt, output)
        return usage

    def _turned_away(self, response: Response) -> RetryableError:
        """The own engine does not answer: it is full, or something is wrong with it. Another is to be asked."""
        told = response.headers.get("retry-after", "")
        retry_after_s = int(told) if told.isascii() and told.isdigit() and len(told) < 6 else None
        error = RetryableError(f"it answers {response.status}", response.status, retry_after_s)
        if error.full:
            self.engine.full(retry_after_s)
        else:
            self.engine.suspect(str(error))
        return error

    async def _delegate(self, job: Job, decision: Decision, reply: Reply) -> Usage | None:
        """Hand a request to a peer, or, with the market's chance, to two. Raises as `_hand_over`."""
        ask = job.ask
        if self.accounts is not None:
            per_choice = job.most // ask.choices
            ask, hidden = for_pay(ask, per_choice if self.provider.market.per_ktok else None)
            reply = WithoutUsage(reply) if hidden else reply
        rival = self._rival(ask, decision, reply)
        if rival is None or decision.peer is None:
            return await self._hand_over(ask, job, job.request, decision.peer, reply)

        async def hand(name: str, leg: Leg) -> Usage | None:
            if name != rival:
                return await self._hand_over(ask, job, job.request, name, leg)
            copy = self.provider.new(None, ask.klass, job.prompt, job.most, self.clock(), ask.model)
            self.provider.offer(copy, rival)
            try:
                return await self._hand_over(ask, job, copy, name, leg)
            except RetryableError:
                self.provider.mask(job.request, rival)
                raise
            finally:
                self.provider.release(copy)

        usage: Usage | None = await self.duels.run(ask, (decision.peer, rival), hand, reply)
        return usage

    def _rival(self, ask: CompletionRequest, decision: Decision, reply: Reply) -> str | None:
        """Who answers a request as well; None for nobody. A stream that may be resumed has one executor at a time."""
        chance = self.config.market.duel_probability
        if chance == 0.0 or self.provider.toss() >= chance or reply.resumable or not self.duels.may_begin():
            return None
        if not judgeable(ask.path, orjson.loads(ask.body)):
            return None
        return next((name for name in self.provider.rivals(decision) if name in self.peers), None)

    async def _hand_over(
        self, ask: CompletionRequest, job: Job, request: int, name: str | None, reply: Reply
    ) -> Usage | None:
        """Hand a request, offered to a peer by its number, over to it. Raises RetryableError if the peer did not take
        it or nothing came of it, Failed if it broke off."""
        path = PEER_PREFIX + ask.path
        headers = {PROMPT: str(job.prompt)}
        handed: Handed | None = None
        payment: Payment | None = None
        answered = False
        try:
            if name is None or name not in self.peers:
                raise RetryableError("it is gone")
            if self.accounts is not None:
                payment = await self._escrow(name, job.most, ask.body)
                headers[ESCROW] = payment.header
            async with (
                asyncio.timeout(OFFER_TIMEOUT_S) as patience,
                self.client.request(
                    name, path, ask.body, headers, timeout_s=None, read_timeout_s=self.config.engine.timeout_s
                ) as (response, sealed),
            ):
                if response.status != 200:
                    if payment is not None:
                        payment.refused = True
                    if response.status == 403:
                        refused = await refusal(response)
                        log.warning("a peer refuses a message", extra={"peer": name, "answer": refused.reason})
                    raise RetryableError(f"it answers {response.status}", response.status)
                self.messages.check_answer(name, sealed, response.raw_headers)
                promise = _promise(response)
                patience.reschedule(None)
                handed = Handed(name, self.clock(), promise, ask.stream, response, AnswerMeter())
                self.handed[request] = handed
                self.provider.accepted(request, handed.taken_s, promise)
                await self._fetch(ask, handed, payment, reply)
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
            self._end_leg(request, handed, answered)
            if payment is not None:
                if handed is not None:
                    payment.end(self._came(handed), handed.meter.complete)
                else:
                    payment.end()
        return handed.meter.usage

    def _end_leg(self, request: int, handed: Handed | None, answered: bool) -> None:
        """A request is no longer with a peer, which may not have taken it."""
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
            raise RetryableError(f"there is no room for the ledger: {error}") from None
        except LedgerError as error:
            raise RetryableError(str(error)) from None

    def _came(self, handed: Handed) -> int:
        """Tokens that are due of an answer: those that came; of one that is not streamed and that the user did not wait
        for, what was generated by then, as promised."""
        if handed.cancelled and not handed.stream and not handed.meter.complete:
            return handed.tokens(self.clock())
        return handed.meter.tokens

    async def _fetch(self, ask: CompletionRequest, handed: Handed, payment: Payment | None, reply: Reply) -> None:
        """The answer of a peer: a line that says how its engine answered, and what it answered."""
        response, meter = handed.response, handed.meter
        status, kind = _head_line(await response.readline(MOST_LINE))
        if status == 429 or status >= 500:
            raise RetryableError(f"its engine answers {status}", status)
        watch = payment.feed if payment is not None else None
        if ask.stream and status == 200 and kind.startswith(EVENTS):
            await _stream(response, kind, reply, meter, watch)
            return
        body = await response.read(MOST_ANSWER)
        if status == 200:
            meter.whole(body)
            if watch is not None:
                watch(body)
        await reply.whole(status, kind, body)

    # Peers' requests.

    def consider(self, prompt: int) -> Promise | None:
        """Whether a peer's request of `prompt` tokens is taken; what is promised if so."""
        if not self.engine.takes:
            return None
        self._look_at_engine(self.clock())
        return self.provider.consider(prompt)

    async def run_for(
        self, origin: str, ask: CompletionRequest, prompt: int, reply: Reply, paid: Delivery | None = None
    ) -> bool:
        """Run a peer's request, whose answer begins with a line that says how the engine answers. Returns whether it
        came to its end; if not, the connection is to be broken off."""
        line, meter = HeadLineReply(reply), AnswerMeter()
        self.metrics.guest(1)
        outcome = "failed"
        try:
            await self._run_here(ask, prompt, line, meter)
            outcome = "answered"
            if self.config.market.duel_probability:
                self.attestor.answered(origin, digest(ask.body), line.digest.hexdigest())
        except RetryableError as reason:
            await line.whole(503, "application/json", b"")
            log.debug("cannot run a peer's request", extra={"reason": str(reason)})
        except Failed:
            return False
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            if paid is not None:
                served = line.status == 200 and line.size > 0
                whole = outcome == "answered" and meter.complete
                paid.end(line.digest.hexdigest() if served else "", meter.tokens, whole)
            self.metrics.guest(-1, outcome)
            self._room_again()
        return True

    # Peers' duels.

    async def _judge(self, path: str, request: dict[str, Any], answers: tuple[str, str]) -> int:
        """The vote of the own engine on two answers. Raises JudgeError, and Declined for a model not served here."""
        if request.get("model") not in self.serves:
            raise Declined("that model is not served here")
        return vote_by(*await gain(self._ask_engine, path, request, answers))

    async def _ask_engine(self, path: str, body: bytes) -> Any:
        """What the engine answers, from JSON. Raises JudgeError."""
        prompt = max(1, round(len(body) / self.bytes_per_token))
        self.engine.sent(prompt)
        try:
            async with self.engine.post(path, body) as response:
                told = await response.read(MOST_ANSWER)
            if response.status != 200:
                raise JudgeError(f"the engine answers {response.status}: {told[:500]!r}")
            return orjson.loads(told)
        except (TimeoutError, OSError, ValueError) as error:
            raise JudgeError(f"{type(error).__name__}: {error}") from None
        finally:
            self.engine.returned(prompt, 0)

    # To look at.

    def overview(self) -> dict[str, Any]:
        """The node as it is, for people and programs."""
        now_s, load, provider = self.clock(), self.engine.load(), self.provider
        peers = []
        for row, name in enumerate(provider.names):
            advert, vector = self.peers.get(name), provider.peers.adverts[row]
            there = advert is not None
            peers.append(
                {
                    "key": name, "label": advert.label if advert else None,
                    "url": advert.url if advert else None, "there": there,
                    "age_s": round(now_s - vector[AD_TIME_S], 3) if there else None,
                    "running": vector[AD_RUNNING], "waiting": vector[AD_WAITING],
                    "kv_use": vector[AD_KV_TOKENS] / vector[AD_KV_CAPACITY] if vector[AD_KV_CAPACITY] else None,
                    "price": vector[AD_PRICE], "stake": vector[AD_STAKE],
                    "out": sum(each.peer == name for each in self.handed.values()),
                    "duels_won": int(provider.peers.dealings[row, DUELS_WON]),
                    "duels_lost": int(provider.peers.dealings[row, DUELS_LOST]),
                    "judged": asdict(self.duels.records[name]) if name in self.duels.records else None,
                }
            )  # fmt: skip
        return {
            "name": self.config.name, "key": self.messages.name, "run": self.messages.run, "url": self.url,
            "policy": provider.policy.name,
            "serves": self.serves,
            "engine": {
                "url": self.engine.url, "up": self.engine.healthy, "reason": self.engine.reason,
                "running": load.running, "waiting": load.waiting,
                "kv_use": load.kv_tokens / self.engine.profile.kv_tokens, "profile": asdict(self.engine.profile),
            },
            "held": provider.held, "guests": self.metrics.guests_now, "price": provider.price, "speed": self.speed,
            "requests": self.metrics.totals(), "peers": peers, "decisions": list(self.decisions),
            "ledger": self.accounts.overview() if self.accounts is not None else None,
        }  # fmt: skip


class _DuelPeers:
    """What `serving.duel.duels` needs of a node."""

    def __init__(self, node: Dispatcher) -> None:
        self._node = node

    def electors(self, model: str) -> dict[str, int]:
        """See `serving.duel.duels.Peers`. Without a ledger, the stakes are those that peers advertise."""
        accounts, found = self._node.accounts, {}
        for name, advert in self._node.peers.items():
            if model in advert.serves:
                stake = micro(advert.load[AD_STAKE]) if accounts is None else accounts.ledger.stakes.stake(name)
                found[name] = max(0, stake)
        return found

    async def ask(self, peer: str, path: str, body: bytes) -> bytes:
        """See `serving.duel.duels.Peers`."""
        return await self._node.client.post(peer, path, body, timeout_s=JUDGE_S)

    def duelled(self, peer: str, won: bool) -> None:
        """See `serving.duel.duels.Peers`."""
        self._node.provider.duelled(peer, won)
        self._node.metrics.duelled(peer, won)

    def staked(self, peer: str) -> Staked | None:
        """See `serving.duel.duels.Peers`."""
        accounts = self._node.accounts
        return accounts.ledger.stakes.latest.get(peer) if accounts is not None else None

    def settle(self, verdict: Verdict) -> None:
        """See `serving.duel.duels.Peers`."""
        accounts = self._node.accounts
        if accounts is not None:
            stated = msgspec.json.encode(verdict)
            if accounts.ledger.heard(verdict.a.executor, stated):
                accounts.tell_all(stated)


async def _stream(
    response: Response, kind: str, reply: Reply, meter: AnswerMeter, watch: Callable[[bytes], None] | None = None
) -> None:
    """Pass a stream on, up to its last event. Raises RetryableError for one that came to an end without being whole, as
    far as that can be told, and StreamError."""
    async for chunk in response.iter_any():
        if not reply.started:
            await reply.start(200, kind)
        passed = meter.feed(chunk)
        if watch is not None:
            watch(passed)
        await reply.pass_on(passed)
        if meter.done:
            break
    else:
        meter.end()
    if not reply.started:
        raise RetryableError("it answers nothing")
    if reply.resumable:
        raise RetryableError("its stream ends before its last event")


def _head_line(line: bytes) -> tuple[int, str]:
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
