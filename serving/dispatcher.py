"""The way of a request through a node: held, run here, or handed to a peer, and answered exactly once.

The dispatcher tells a `serving.node_provider.NodeProvider` what happens, carries out what it decides, and does it again
when a peer refuses, fails before the first byte of an answer has gone to the user, or later if the answer can be
resumed. What goes to a peer is with a `serving.delegation.Delegation`, what runs here with a
`serving.execution.Execution`; what comes from a peer is here. All of it runs on one event loop; a request is one task
from arrival to its end.
"""

import asyncio
import logging
import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import orjson

from wwwserve.agents.decision import HOLD, LOCAL
from wwwserve.agents.knowledge import AD_REUSE_S, AD_STAKE, LONGEST_REUSE_S
from wwwserve.serving.config import NodeConfig, absent_aliases
from wwwserve.serving.delegation import Delegation
from wwwserve.serving.duel.attestor import Attestor
from wwwserve.serving.duel.judge import JudgeError, gain, vote_by
from wwwserve.serving.duel.judge_pool import JudgePool
from wwwserve.serving.duel.messages import Declined
from wwwserve.serving.engine.adapter import Engine, EngineError
from wwwserve.serving.engine.pool import Pool, place_of
from wwwserve.serving.engine.prefix_index import HERE, MOST_ENTRIES, NO_PREFIX, NOTHING, PrefixIndex
from wwwserve.serving.execution import ENGINE_TRIES, Execution
from wwwserve.serving.http.handover import meter_of, salted, with_keys
from wwwserve.serving.http.messages import Messages
from wwwserve.serving.http.peers import PeerClient, PeerError
from wwwserve.serving.http.reply import (
    MOST_ANSWER,
    CompletionRequest,
    Failed,
    HeadLineReply,
    Reply,
    RetryableError,
)
from wwwserve.serving.http.resume import Resumed, resumable
from wwwserve.serving.http.sse import MOST_BYTES_PER_TOKEN, AnswerMeter, Usage
from wwwserve.serving.http.transport import Transport
from wwwserve.serving.ledger.accounts import LEDGER_PATH, Accounts, Came, Delivery, NotNow, NotTaken, hung_up
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.channel_ledger import ChannelLedger, micro
from wwwserve.serving.ledger.statements import digest
from wwwserve.serving.market import MOST_TOKENS, Promise, Tariff
from wwwserve.serving.membership.heartbeat import Advert, Membership
from wwwserve.serving.metrics import Metrics
from wwwserve.serving.node_provider import Decision, NodeProvider
from wwwserve.serving.plain import in_words
from wwwserve.serving.reasons import Reasons
from wwwserve.serving.tracing import Tracing, promised

log = logging.getLogger("wwwserve.dispatcher")

LEDGER_TIMEOUT_S = 5.0
MODELS_S = 2.0  # between two looks at which models the engine serves
NOWHERE = ""  # the model of requests that no peer gets; none is named so
RECENT = 50  # decisions that are kept to look at
BYTES_PER_TOKEN = 4.0  # until answers tell better
LEARN = 0.02  # weight of one answer in that


@dataclass(slots=True, eq=False)
class Job:
    """A user's request on its way."""

    completion: CompletionRequest
    request: int  # its number with the provider
    most: int  # tokens of the longest answer that it may get
    prompt: int  # tokens
    placed: "asyncio.Future[Decision]"
    failures: int = 0  # of own engines
    broken: int = 0  # of those, without an answer: such a request may be what breaks them, and is not to break all
    turned_away: bool = False  # by an own engine, which was full
    tried: tuple[Engine, ...] = ()  # own engines that did not answer


class RemoteRequest(NamedTuple):
    """A peer's request that is taken."""

    origin: str
    completion: CompletionRequest
    prompt: int  # tokens
    longest: int  # tokens of the longest answer that it may get
    tariff: Tariff
    promise: Promise
    added: Mapping[str, object]  # to what the engine is asked
    secret: str  # to which this node committed itself, should it be asked to sign the answer


class Dispatcher:
    """One node's requests."""

    def __init__(
        self, config: NodeConfig, provider: NodeProvider, engines: Sequence[Engine], membership: Membership,
        messages: Messages, transport: Transport, metrics: Metrics, url: str,
        ledger: ChannelLedger | None = None, tracing: Tracing | None = None,
    ) -> None:  # fmt: skip
        self.tracing = tracing
        self.config, self.provider, self.membership = config, provider, membership
        self.engine = Pool(engines, provider.own)
        self._down: set[Engine] = set()  # of which the log says so; they may begin anew
        self.messages, self.metrics, self.url = messages, metrics, url
        self.speed = config.market.speed
        self.serves = list(config.serves)
        self.leaving = False  # it takes nothing more, and says that it serves nothing
        self._listed_s = -math.inf  # when the engine last said which models it serves, by the event loop's clock
        self.peers: dict[str, Advert] = {}  # by name, those that are there
        self.labels: dict[str, str] = {}  # by name, also of those that are gone
        self.client = PeerClient(messages, transport, self.peers)
        accounts = Accounts(ledger, self._tell_ledger) if ledger is not None else None
        entries = MOST_ENTRIES if config.market.prefix_cache else 0
        places = [place_of(k) for k in range(len(engines))]
        self.prefixes = PrefixIndex(self.clock, self.engine.alone.kv_tokens, own=places, entries=entries)
        provider.lookup = self._look_up
        self.delegation = Delegation(config, provider, self.client, metrics, accounts, self.clock, self.prefixes)
        self.execution = Execution(self.engine, provider, self.prefixes, metrics, self.clock, lambda: self.accounts)
        self.decisions: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.reasons = Reasons()
        self.bytes_per_token = BYTES_PER_TOKEN
        self.last_deadlines_s = [max(row) for row in provider.market.deadlines.tolist()]
        self.number = 0
        self.restaked_s = -np.inf  # when the stake was last stated
        self._ticked_s: float | None = None  # when the last tick was
        self._round_due = False  # of decisions
        self._marked_up = False  # whether the markup of an advert that is due has been decided
        stakes = ledger.stakes if ledger is not None else None
        self.attestor = Attestor(messages.identity, stakes)
        self.judge_pool = JudgePool(messages.identity, self._judge, metrics, stakes)
        if ledger is not None:
            provider.pay(ledger.free_credit())

    @property
    def accounts(self) -> Accounts | None:
        """What is paid for requests, where there is a ledger."""
        return self.delegation.accounts

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
            self.engine.close()
            await self.delegation.duels.stop()

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
            timer = loop.call_at((began_s + ticks * interval_s) / self.speed, _end, due)
            try:
                await due
            finally:
                timer.cancel()

    async def tick(self) -> None:
        """Look at the engine and at what peers have of ours; decide anew on what is held; say how things are here."""
        market, engines = self.config.market, self.engine.engines
        failed = {each for each in engines if not each.healthy}  # some since the last look, by a request
        with suppress(EngineError):  # it is in the engine's reason
            await self.engine.scrape()
            await self.list_models()
        for engine in [each for each in engines if not each.healthy and each not in self._down]:
            self._down.add(engine)
            log.warning("the engine is down", extra={"engine": engine.label, "reason": engine.reason})
        for engine in [each for each in engines if each.healthy and each in self._down | failed]:
            self._down.discard(engine)
            self.prefixes.forget(engine.place)  # it may have started anew
            log.info("the engine is up", extra={"engine": engine.label, "serves": self.serves})
        now_s = self.clock()
        elapsed_s = now_s - self._ticked_s if self._ticked_s is not None else 0.0
        self._ticked_s = now_s
        self.delegation.look(now_s)
        self.provider.looked(now_s)
        self.execution.look(now_s)
        if self.accounts is None and market.stake_rule == "load":
            self.provider.restake(elapsed_s)
        elif self.accounts is not None and now_s >= self.restaked_s + market.gossip_s:
            self.restaked_s = now_s
            await self._restake(self.accounts)
        self.provider.ticked(elapsed_s, now_s)
        self.dispatch()

    async def list_models(self) -> None:
        """Ask the engine which models it serves, unless the configuration says so or it was asked lately. Raises
        EngineError."""
        now_s = asyncio.get_running_loop().time()
        if self.config.serves or (self.serves and now_s < self._listed_s + MODELS_S):
            return
        self._listed_s = now_s
        serves = await self.engine.models()
        if serves != self.serves:
            if self.serves:
                log.info("the engine serves other models", extra={"before": self.serves, "serves": serves})
            self.serves, self.provider.advert_due = serves, True
            absent = absent_aliases(self.config.aliases, serves)
            if absent:
                log.warning("there are aliases of models that the engine does not serve", extra={"aliases": absent})

    def leave(self) -> None:
        """Tell peers that nothing more is taken here."""
        self.leaving = self.provider.advert_due = True
        self.dispatch()

    def _publish(self, now_s: float) -> None:
        """Say how things are here; a node that cannot serve says nothing, and is taken for offline."""
        self.provider.advert_due = False
        if not (self.serves or self.number) or not self.engine.healthy:
            return
        self.number += 1
        advert = Advert(
            name=self.messages.name, label=self.config.name, url=self.url,
            serves=() if self.leaving else tuple(self.serves),
            run=self.messages.run, number=self.number,
            load=tuple(self.provider.advertise(now_s).tolist()), age_s=0.0,
        )  # fmt: skip
        if self.accounts is not None:
            self.accounts.advertised(self.provider.tariff_micro)
        self.membership.publish(advert, asyncio.get_running_loop().time())

    async def _restake(self, accounts: Accounts) -> None:
        """State the stake that the load calls for, or the configured one."""
        target = self.provider.stake_target() if self.config.market.stake_rule == "load" else micro(self.config.stake)
        self.provider.stake = await accounts.restake(target, self.config.market.gossip_s)

    async def _tell_ledger(self, peer: str, body: bytes) -> bytes:
        """What a peer's ledger answers to a message. Raises OSError, TimeoutError, and for a refusal NotTaken where it
        is of that very message, NotNow where it takes none, LedgerError where it keeps no ledger."""
        try:
            return await self.client.post(peer, LEDGER_PATH, body, timeout_s=LEDGER_TIMEOUT_S)
        except PeerError as error:
            kind = {404: LedgerError, 409: NotTaken, 413: NotTaken}.get(error.status, NotNow)
            raise kind(str(error)) from None

    def heard(self, advert: Advert) -> None:
        """A peer says how things are there."""
        known = self.peers.get(advert.name)
        if known is not None and known.run != advert.run:
            self.prefixes.forget(advert.name)
            if self.accounts is not None:  # it may have forgotten what was staked and lost, and is told again
                self.accounts.gone(advert.name)
        if known is None:
            log.info("a peer is there", extra={"peer": advert.name, "label": advert.label, "url": advert.url})
        self.peers[advert.name] = advert
        self.labels[advert.name] = advert.label
        load = np.array(advert.load)
        self.prefixes.shared |= advert.load[AD_REUSE_S] < LONGEST_REUSE_S
        if self.accounts is not None:  # a stake is what is signed, and granted
            self.accounts.heard(advert.name)
            load[AD_STAKE] = self.accounts.stake(advert.name)
        true_at_s = self.clock() - advert.age_s * self.speed
        serves = frozenset(advert.serves) if self.config.trusts(advert.name) else frozenset[str]()
        self.provider.heard(advert.name, load, true_at_s, serves)

    def gone(self, name: str) -> None:
        """A peer fell silent: it gets nothing more, and what it has is asked for elsewhere."""
        log.info("a peer is gone", extra={"peer": name, "label": self.labels.get(name)})
        self.peers.pop(name, None)
        self.provider.gone(name)
        if self.accounts is not None:
            self.accounts.gone(name)
        self.delegation.gone(name)

    def forget(self, name: str) -> None:
        """A peer that is gone made place for another: nothing is kept of it but what the ledger has."""
        self.labels.pop(name, None)
        self.provider.forget(name)
        self.prefixes.forget(name)
        self.messages.forget(name)
        self.metrics.forget(name)
        self.delegation.duels.records.pop(name, None)
        self.delegation.cooling.forget(name)
        if self.accounts is not None:
            self.accounts.forget(name)

    def dispatch(self) -> None:
        """Decide, at the end of this instant, on all that can be decided on: what else happens now comes first."""
        if not self._round_due:
            self._round_due = True
            asyncio.get_running_loop().call_later(0.0, self._play_round)

    def _play_round(self) -> None:
        """One decision; the next one is made when what follows from it has been sent, so that it is counted."""
        self._round_due = False
        try:
            self._decide()
        except Exception:  # what is not decided is so by the next round, after the next tick at the latest
            log.exception("a round of decisions failed")

    def _decide(self) -> None:
        now_s, provider = self.clock(), self.provider
        self.execution.look(now_s)
        if self.accounts is not None:
            self._look_at_ledger(self.accounts.ledger)
        if self._marked_up:
            self._marked_up = False
            self._publish(now_s)
        if provider.held or provider.advert_due:
            self.execution.appraise(now_s)
        decision = provider.decide(now_s, self.metrics.remote_now)
        self._marked_up = provider.advert_due
        if self._marked_up or (decision is not None and provider.held):
            self.dispatch()
        if decision is None:
            return
        job: Job = provider.keys[decision.request]
        if decision.route == LOCAL and job.failures and not self.engine.spare(job.tried):
            decision = provider.divert(decision)  # what own engines failed goes elsewhere if it can
        where = "hold" if decision.route == HOLD else decision.peer or "local"
        self.metrics.decided(decision.route)
        klass = self.config.class_names[job.completion.klass]
        self.decisions.append({"at_s": round(now_s, 3), "class": klass, "to": where})
        self.reasons.keep(provider, decision, klass)
        if decision.route != HOLD and not job.placed.done():
            job.placed.set_result(decision)

    def _look_at_ledger(self, ledger: ChannelLedger) -> None:
        """A peer with whom nothing more may be in escrow is no candidate."""
        if ledger.changed:
            self.provider.pay(ledger.free_credit())
        changed, ledger.changed = sorted(ledger.changed), set()
        for peer in changed:
            if peer in ledger.books.channels:
                self.provider.may_escrow(peer, ledger.available(peer))

    # Users' requests.

    async def answer(self, completion: CompletionRequest, reply: Reply) -> Usage | None:
        """Answer a user's request; returns what it used, if that was said. Raises Failed when that cannot be, and what
        `reply` raises."""
        provider, arrival_s, prefix, user = self.provider, self.clock(), completion.prefix, reply
        if provider.held >= self.config.limits.held:
            provider.missed(completion.klass)
            self.metrics.turned_away()
            raise Failed(503, "too many requests wait here", "overloaded", retry_after_s=1)
        prompt = self.estimate_prompt(completion.prompt_bytes, completion.prompt_ids)
        most = min((completion.max_tokens or self.config.output.max) * completion.choices, MOST_TOKENS)
        request = provider.new(
            None, completion.klass, prompt, most, arrival_s,
            NOWHERE if completion.local_only else completion.model, prefix.turn,
            self.prefixes.answered_s(prefix, arrival_s),
        )  # fmt: skip
        job = Job(completion, request, most, prompt, asyncio.get_running_loop().create_future())
        provider.keys[request] = job
        self.metrics.accepted(prefix.turn)
        if completion.local_only:
            self.metrics.kept()
        outcome, where = "failed", "nowhere"
        engine: Engine | None = None
        again = Resumed(completion, reply) if self.config.resume and resumable(completion) else None
        provider.arrived(request)
        try:
            while True:
                self.dispatch()
                decision = await (job.placed if completion.trace.span is None else self._placed(job))
                where = "local" if decision.route == LOCAL else "peer"
                user.asked = decision.peer or "local"
                if again is not None:
                    job.completion, reply = again.rest(), again
                try:
                    if decision.route == LOCAL:
                        engine = self.execution.choose(job.completion.prefix, job.prompt, job.tried)
                        meter = await self.execution.run(engine, job.completion, job.prompt, reply, request)
                    else:
                        reply.limits.clear()
                        meter = await self.delegation.delegate(decision, job.completion, job.prompt, job.most, reply)
                    usage = meter.usage
                    break
                except RetryableError as reason:
                    log.debug("given back", extra={"by": decision.peer or "the engine", "reason": str(reason)})
                    if again is not None and await again.finish():
                        usage = None
                        break
                    job.prompt = prompt + (again.tokens if again is not None else 0)
                    provider.reprompt(request, job.prompt)
                    self._take_back(job, engine if decision.route == LOCAL else None, reason)
            outcome = "answered"
            if completion.stream:
                self._measure(completion.klass, where, again or meter, arrival_s)
            self._learn(completion, usage)
            self.prefixes.answered(prefix)
            return usage
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            if provider.is_out(request) and request not in self.delegation.under_way:
                provider.lost(request)  # cancelled before it went anywhere
            provider.release(request)
            took_s = self.clock() - arrival_s
            on_time = outcome == "answered" and took_s <= self.last_deadlines_s[completion.klass]
            self.metrics.ended(completion.klass, outcome, where, took_s, on_time)
            self._reopen()

    async def _placed(self, job: Job) -> Decision:
        """The decision on a request that is traced."""
        completion, provider = job.completion, self.provider
        span = completion.trace.child("decide", "internal").span
        assert span is not None
        span.note({"wwwserve.class": self.config.class_names[completion.klass]})
        try:
            decision = await job.placed
            if decision.peer is None:
                cached = self.execution.cached(completion.prefix, job.prompt)
                promise = provider.expect(job.prompt, cached)
            else:
                promise = provider.shown(job.request)
            chosen, candidates = decision.peer or "local", len(provider.candidates(job.request))
            span.note({"wwwserve.chosen": chosen, "wwwserve.candidates": candidates, **promised(promise)})
            return decision
        finally:
            span.end(sys.exception())

    def _measure(self, klass: int, where: str, stream: AnswerMeter | Resumed, arrival_s: float) -> None:
        """A user's stream, of which the meter is given or what was resumed, has just come to its end."""
        if stream.first_s is not None:
            first_s = stream.first_s * self.speed
            self.metrics.streamed(klass, where, first_s - arrival_s, self.clock() - first_s, stream.tokens)

    def _reopen(self) -> None:
        """An answer is done, so what is held may be decided on."""
        if self.provider.held:
            self.provider.reopen()
            self.dispatch()

    def _take_back(self, job: Job, engine: Engine | None, reason: RetryableError) -> None:
        """Hold a request that came back from an own engine, or else from a peer. Raises Failed where there is nobody
        left to ask."""
        job.placed = asyncio.get_running_loop().create_future()
        if engine is None:
            self.provider.come_back(job.request)
            return
        job.failures += not reason.full
        job.broken += reason.status is None
        job.tried += (engine,)
        if job.broken < ENGINE_TRIES and self.engine.spare(job.tried):
            self.provider.come_back(job.request)
            return
        if job.failures >= ENGINE_TRIES:
            raise Failed(502, f"the engine does not answer as it should: {reason}", "engine_error")
        if not self.provider.may_hold(job.request, self.clock()):
            status = reason.status if reason.full and reason.status else 503
            raise Failed(status, f"the engine is full: {reason}", "overloaded", reason.retry_after_s or 1)
        self.provider.come_back(job.request)
        if (
            not self.peers or job.completion.local_only or job.turned_away or job.failures > 1
        ):  # nothing has changed before the next tick
            self.provider.close(job.completion.klass)
        job.turned_away = job.turned_away or reason.full

    def estimate_prompt(self, size: int, ids: int) -> int:
        """Tokens that a prompt of so many bytes and token ids seems to have, at least 1."""
        return max(1, ids + round(size / self.bytes_per_token))

    def _learn(self, completion: CompletionRequest, usage: Usage | None) -> None:
        """Take the length of a prompt into the mean, unless it has images or tokens, or a peer says what cannot be."""
        if usage is None or completion.prompt_ids:
            return
        if 0 < usage.prompt <= completion.prompt_bytes <= usage.prompt * MOST_BYTES_PER_TOKEN:
            self.bytes_per_token += LEARN * (completion.prompt_bytes / usage.prompt - self.bytes_per_token)

    # Peers' requests.

    def salt_of(self, origin: str, request: Mapping[str, Any]) -> str:
        """Under which a peer's request is cached, so that how long it takes does not tell whether somebody else asked
        the like. "" where the engine knows no salts."""
        return self.messages.salt(origin, request.get("cache_salt")) if self.config.engine.kind == "vllm" else ""

    def _look_up(self, job: Job | None, prompt: int, place: str, since_s: float) -> tuple[int, float]:
        if job is None:
            return NOTHING
        if place == HERE:
            place = self.execution.choose(job.completion.prefix, prompt, job.tried).place
        return self.prefixes.cached(job.completion.prefix, prompt, place, since_s)

    def consider(self, prompt: int, cached: int, longest: int, tariff: Tariff) -> Promise | None:
        """Whether a peer's request of `prompt` tokens, `cached` of them here, to be answered with at most `longest`, is
        taken at a tariff; what is promised if so."""
        if not self.engine.takes:
            return None
        now_s = self.clock()
        self.execution.look(now_s)
        self.execution.appraise(now_s)
        return self.provider.consider(prompt, cached, longest, tariff)

    async def run_for(self, remote: RemoteRequest, reply: Reply, paid: Delivery | None = None) -> bool:
        """Run a peer's request, just promised, whose answer begins with a line that says how the engine answers.
        Returns whether it came to its end; if not, the connection is to be broken off."""
        origin, completion, prompt, longest, tariff, promise, added, secret = remote
        line, meter, taken_s = HeadLineReply(reply), meter_of(completion), self.clock()
        request = self.provider.serve(
            prompt, longest, tariff, promise, taken_s, self.execution.cached(completion.prefix, prompt)
        )
        self.metrics.remote(origin, 1)
        if self.tracing is not None:
            completion = completion._replace(trace=self.tracing.begin(completion.trace, "serve"))
        outcome = "failed"
        try:
            asked = completion._replace(body=with_keys(completion.body, added))
            await self.execution.run_on_one(asked, prompt, line, request, meter, paid)
            outcome = "answered"
            if secret:
                self.attestor.answered(origin, digest(completion.body), line.digest.hexdigest(), secret)
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
                took_s = self.clock() - taken_s - meter.waited_s * self.speed
                served = line.status == 200 and line.size > 0
                if outcome == "cancelled" and line.status in (0, 200):
                    came = hung_up(meter, completion.stream, promise, took_s)
                else:
                    whole = outcome == "answered" and meter.complete
                    tokens = meter.tokens if paid.passed is None else paid.passed
                    came = Came(tokens if served else 0, whole, took_s, meter.usage)
                paid.end(line.digest.hexdigest() if served else "", came)
            self.provider.served(request)
            self.metrics.remote(origin, -1, outcome)
            if (span := completion.trace.span) is not None:
                error = sys.exception() or (str(line.status or 502) if outcome == "failed" else None)
                span.end(error, {"wwwserve.peer": origin, "wwwserve.stream": completion.stream, **promised(promise)})
            self._reopen()
        return True

    # Peers' duels.

    async def _judge(self, path: str, request: dict[str, Any], answers: tuple[str, str]) -> int:
        """The vote of the own engine on two answers. Raises JudgeError, and Declined for a model not served here."""
        if request.get("model") not in self.serves:
            raise Declined("that model is not served here")
        return vote_by(*await gain(self._ask_engine, path, request, answers))

    async def _ask_engine(self, path: str, body: bytes) -> Any:
        """What the engine answers, from JSON. Raises JudgeError."""
        prompt = self.estimate_prompt(len(body), 0)
        if salt := self.salt_of(self.messages.name, {}):  # not to tell a peer what own users asked
            body = salted(body, salt)
        engine = self.execution.choose(NO_PREFIX, prompt)
        engine.sent(prompt)
        try:
            async with engine.post(path, body) as response:
                answer = await response.read(MOST_ANSWER)
            if response.status != 200:
                raise JudgeError(f"the engine answers {response.status}: {answer[:500]!r}")
            return orjson.loads(answer)
        except (TimeoutError, OSError, ValueError) as error:
            raise JudgeError(in_words(error)) from None
        finally:
            engine.returned(prompt, 0)


def _end(waited: "asyncio.Future[None]") -> None:
    if not waited.done():  # whoever waits may be told to stop in the same turn
        waited.set_result(None)
