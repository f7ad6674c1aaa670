"""Spans of requests for OpenTelemetry, where node.yaml has `tracing`; without it OpenTelemetry is not even imported.

Spans go to a collector by OTLP over HTTP, from a thread of their own; those that it does not take in time are lost. A
request is traced by its trace id alone, so that all nodes with the same `sample` have the same requests: of what a user
or a peer says in a `traceparent` the ids are taken, and nothing else. Attributes are numbers, keys, and names that
node.yaml or the engine has; never what a user, a model, a peer or an exception says.
"""

import asyncio
import sys
import time
from collections.abc import Mapping
from threading import Thread
from types import MappingProxyType
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from wwwserve.serving.config import ConfigError, TracingConfig
from wwwserve.serving.http.reply import ClientDisconnect, Failed, RetryableError
from wwwserve.serving.http.sse import AnswerMeter, Usage
from wwwserve.serving.http.trace import Trace
from wwwserve.serving.market import Promise
from wwwserve.serving.spans_out import SpansOut

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as OtelSpan

PATH = "/v1/traces"  # of OTLP, where `endpoint` has none
QUEUE = 8192  # spans that wait to be sent
LAST_S = 2.0  # to send what is left when a node ends
INSTALL = "pip install '.[trace]' in a clone of the repository"
REFUSED = 409  # by which a peer says "not now"

Attributes = Mapping[str, str | int | float | bool | None]
NOTHING: Attributes = MappingProxyType({})


def check_installed() -> None:
    """Raises ConfigError where OpenTelemetry is not installed."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
    except ImportError:
        raise ConfigError(f"tracing needs OpenTelemetry: {INSTALL}") from None


class Span:
    """What a request does in one place, for some time."""

    __slots__ = ("_of", "_span")

    def __init__(self, of: "Tracing", span: "OtelSpan") -> None:
        self._of, self._span = of, span

    @property
    def traceparent(self) -> str:
        """By which others are told of it."""
        ids = self._span.get_span_context()
        return f"00-{ids.trace_id:032x}-{ids.span_id:016x}-01"

    def child(self, name: str, kind: str) -> "Span":
        """One that is part of it: of kind `internal`, or `client` where somebody else is asked."""
        return self._of.start(name, kind, self._span)

    def note(self, values: Attributes) -> None:
        """What is known of it, by names of OpenTelemetry's or that begin with `wwwserve.`; None is left out."""
        self._span.set_attributes({name: value for name, value in values.items() if value is not None})

    def end(self, error: BaseException | str | None = None, values: Attributes = NOTHING) -> None:
        """It is over; with an `error`, or the type of one, it failed, but for one who hung up or was told "not now"."""
        self.note(values)
        kind = error if isinstance(error, str) else _type_of(error)
        if isinstance(error, asyncio.CancelledError | ClientDisconnect):
            self.note({"wwwserve.cancelled": True})
        elif kind == str(REFUSED):
            self.note({"wwwserve.refused": True})
        elif kind:
            self.note({"error.type": kind})
            self._span.set_status(self._of.error)
        self._span.end()


class Tracing:
    """Of one node."""

    def __init__(self, config: TracingConfig, name: str, key: str) -> None:
        """For the node of that name and public key. Raises ConfigError where OpenTelemetry is not installed."""
        check_installed()
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        class Ids(RandomIdGenerator):
            trace_id = 0  # of the next one that has no parent

            def generate_trace_id(self) -> int:
                return self.trace_id

        self._trace, self._empty, self._ids = trace, Context(), Ids()
        self._kinds = {each.name.lower(): each for each in trace.SpanKind}
        self._sampled = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        self.error = trace.Status(trace.StatusCode.ERROR)
        self._bound = round(config.sample * 2**64)
        resource = {"service.name": "wwwserve", "service.instance.id": key, "wwwserve.node": name}
        self._provider = TracerProvider(
            ALWAYS_ON, Resource.create(resource), shutdown_on_exit=False, id_generator=self._ids,
            span_limits=SpanLimits(max_attribute_length=256),
        )  # fmt: skip
        url = config.endpoint.rstrip("/")
        url = url if urlsplit(url).path else url + PATH
        self._out = SpansOut(OTLPSpanExporter(endpoint=url), url)
        self._provider.add_span_processor(BatchSpanProcessor(cast("SpanExporter", self._out), max_queue_size=QUEUE))
        self._tracer = self._provider.get_tracer("wwwserve")

    def begin(self, trace: Trace, name: str, given: bool = True) -> Trace:
        """A request that came, within a span of its own if it is one of those that are traced. `given`: its ids are of
        who asks, else they were made here."""
        if not trace.parent or int(trace.parent[19:35], 16) >= self._bound:
            return trace
        parent, self._ids.trace_id = None, int(trace.parent[3:35], 16)
        if given:
            ids = self._trace.SpanContext(self._ids.trace_id, int(trace.parent[36:52], 16), True, self._sampled)
            parent = self._trace.NonRecordingSpan(ids)
        span = self.start(name, "server", parent)
        return trace._replace(parent=span.traceparent, span=span)

    def start(self, name: str, kind: str, parent: "OtelSpan | None") -> Span:
        """A span that begins now."""
        context = self._trace.set_span_in_context(parent, self._empty) if parent is not None else self._empty
        return Span(self, self._tracer.start_span(name, context, self._kinds[kind]))

    async def close(self) -> None:
        """Send what is left, as far as that is done soon."""
        closing = Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        until_s = time.monotonic() + LAST_S
        while closing.is_alive() and time.monotonic() < until_s:
            await asyncio.sleep(0.01)
        self._out.close()


def end_exchange(span: Span, status: int, meter: AnswerMeter | None) -> None:
    """End the span of who was asked for an answer, which had that HTTP status, or 0, and was metered if it came; by
    what is being raised, if anything is."""
    if meter is not None and meter.tokens:
        span.note(_used(meter.usage, meter.tokens))
    _end_asked(span, status)


def end_passed(span: Span, status: int, usage: Usage | None) -> None:
    """The same of what is passed through, of which only its usage tells tokens."""
    if usage is not None:
        span.note(_used(usage, usage.output))
    _end_asked(span, status)


def _used(usage: Usage | None, output: int) -> Attributes:
    return {
        "gen_ai.usage.output_tokens": output,
        "gen_ai.usage.input_tokens": usage.prompt if usage is not None else None,
        "wwwserve.cached_tokens": usage.cached if usage is not None else None,
    }


def _end_asked(span: Span, status: int) -> None:
    error = sys.exception()
    if isinstance(error, RetryableError):
        status = status or error.status or 0
    failed = str(status) if error is None and status >= 400 else error
    span.end(failed, {"http.response.status_code": status or None})


def promised(promise: Promise) -> dict[str, float]:
    """A promise as attributes."""
    return {"wwwserve.promise.ttft_s": promise.ttft_s, "wwwserve.promise.tpot_s": promise.tpot_s}


def _type_of(error: BaseException | None) -> str:
    """Of what kind an error is: the status of an answer, else its class."""
    status = error.status if isinstance(error, Failed | RetryableError) else None
    return str(status) if status else type(error).__name__ if error is not None else ""
