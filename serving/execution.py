"""What the own engines run, of users and of peers: which of them gets a request, what one more costs, how it ends."""

from collections.abc import Callable, Collection

from wwwserve.serving.delegation import remember
from wwwserve.serving.engine.adapter import Engine, Sent
from wwwserve.serving.engine.pool import Pool
from wwwserve.serving.engine.prefix_index import Prefix, PrefixIndex
from wwwserve.serving.http.files import is_shortage
from wwwserve.serving.http.reply import (
    EVENTS,
    MOST_ANSWER,
    CompletionRequest,
    Failed,
    Reply,
    RetryableError,
    TooMuch,
    limits_said,
    meter_whole,
    packed,
    pass_stream_on,
    retry_after,
    send_timed,
)
from wwwserve.serving.http.sse import AnswerMeter, StreamError
from wwwserve.serving.http.transport import Response
from wwwserve.serving.ledger.accounts import Accounts, Delivery
from wwwserve.serving.metrics import Metrics
from wwwserve.serving.node_provider import NodeProvider
from wwwserve.serving.plain import in_words
from wwwserve.serving.tracing import end_exchange

ENGINE_TRIES = 3  # of one request, after which failing engines are given up
ENGINES_FAULT = (401, 407, 429)  # and from 500 on: of the engine or its key, not of the request


class Execution:
    """The work of the own engines."""

    def __init__(
        self, engine: Pool, provider: NodeProvider, prefixes: PrefixIndex, metrics: Metrics, clock: Callable[[], float],
        accounts: Callable[[], Accounts | None],
    ) -> None:  # fmt: skip
        self.engine, self.provider, self.prefixes, self.metrics = engine, provider, prefixes, metrics
        self.clock, self._accounts = clock, accounts
        self.here: dict[int, Sent] = {}  # by the provider's number of the request

    # What it is like.

    def look(self, now_s: float) -> None:
        """Tell the provider how full the engines are."""
        if self.engine.count != self.provider.engines:
            self.provider.resize(self.engine.count)
            self.provider.advert_due = True
        load = self.engine.load()
        self.provider.scraped(now_s, load.running, load.waiting, load.kv_tokens, load.prefill, self.prefixes.reuse_s())

    def appraise(self, now_s: float) -> None:
        """Work out what one more request costs here, unless that was done lately; the engines were just looked at."""
        if self.provider.is_cost_old(now_s):
            running = self.engine.progress(self.here.values(), now_s)
            self.provider.appraise(((sent.request, sent.own, tokens) for sent, tokens in running), now_s)

    def choose(self, prefix: Prefix, prompt: int, tried: Collection[Engine] = ()) -> Engine:
        """The engine for a request, see `Pool.choose`."""
        return self.engine.choose(prompt, lambda place: self.prefixes.cached(prefix, prompt, place).tokens, tried)

    def cached(self, prefix: Prefix, prompt: int) -> int:
        """Tokens of a prompt that the engine which would have it is taken to have in its prefix cache."""
        return self.prefixes.cached(prefix, prompt, self.choose(prefix, prompt).place).tokens

    # What it does.

    async def run(
        self, engine: Engine, completion: CompletionRequest, prompt: int, reply: Reply, request: int,
        meter: AnswerMeter | None = None, paid: Delivery | None = None,
    ) -> AnswerMeter:  # fmt: skip
        """Run a request on an engine, a peer's with a `meter`, for which the peer pays; returns the meter of its
        answer. Raises RetryableError if nothing came of it yet, Failed if something had."""
        own, meter, place = meter is None, meter or AnswerMeter(), engine.place
        predicted = self.prefixes.cached(completion.prefix, prompt, place).tokens
        # Whoever comes next finds it computed.
        added = self.prefixes.remember(place, completion.prefix, prompt, told=False)
        trace, status = completion.trace.child("engine", "client"), 0
        exchange = engine.post(completion.path, completion.body, trace.for_engine())
        expected = self.provider.expect(prompt, predicted)
        self.here[request] = Sent(request, own, completion.stream, meter, self.clock(), expected, exchange, engine)
        self.engine.chosen(engine)
        engine.sent(prompt)
        try:
            async with exchange as response:
                reply.limits[:] = limits_said(response)
                status = response.status
                if status in ENGINES_FAULT or status >= 500:
                    raise _turned_away(engine, completion, response)
                if wrong := packed(response):
                    raise StreamError(wrong)
                if status == 200:
                    engine.answered()
                kind = response.headers.get("content-type", "application/json")
                if completion.stream and status == 200 and kind.startswith(EVENTS):
                    await pass_stream_on(response, kind, reply, meter, check=paid.check if paid is not None else None)
                else:
                    body = await response.read(MOST_ANSWER)
                    if status == 200:
                        await meter_whole(meter, body)
                        if paid is not None:
                            await paid.check(meter)
                    await send_timed(reply.whole(status, kind, body), meter)
        except (TimeoutError, OSError, StreamError, TooMuch) as error:
            reason = in_words(error)
            if is_shortage(error):
                raise RetryableError(reason, 503) from None
            if reply.started and not reply.resumable:
                raise Failed(502, f"the engine broke off: {reason}", "engine_error") from None
            if not isinstance(error, StreamError | TooMuch):
                engine.suspect(reason)
            raise RetryableError(reason) from None
        finally:
            del self.here[request]
            usage = meter.usage
            output = usage.output if usage else meter.tokens
            if trace.span is not None:
                end_exchange(trace.span, status, meter)
            engine.returned(prompt, output)
            if not output:
                self.prefixes.retract(place, added)
        if output:
            found = usage.cached if usage is not None and usage.cached is not None else predicted
            self.provider.finished(usage.prompt if usage else prompt, found, output)
            accounts = self._accounts()
            if usage is not None and accounts is not None:
                accounts.rate.counted(usage.output, meter.text_bytes)
            remember(self.prefixes, self.metrics, place, completion.prefix, prompt, meter, predicted)
        return meter

    async def run_on_one(
        self, completion: CompletionRequest, prompt: int, reply: Reply, request: int, meter: AnswerMeter,
        paid: Delivery | None,
    ) -> None:  # fmt: skip
        """Run a peer's request on an engine, on the next where one brings no answer. Raises as `run`."""
        tried: tuple[Engine, ...] = ()
        broken = 0
        while True:
            engine = self.choose(completion.prefix, prompt, tried)
            try:
                await self.run(engine, completion, prompt, reply, request, meter, paid)
                return
            except RetryableError as reason:
                tried += (engine,)
                broken += reason.status is None  # a request that breaks engines is not to break all
                if meter.tokens or broken == ENGINE_TRIES or not self.engine.spare(tried):
                    raise


def _turned_away(engine: Engine, completion: CompletionRequest, response: Response) -> RetryableError:
    """An engine does not answer: it is full, or something is wrong with it. Another is to be asked."""
    error = RetryableError(f"it answers {response.status}", response.status, retry_after(response))
    if error.full:
        engine.full(error.retry_after_s)
    else:
        engine.failed(completion.body, str(error))
    return error
