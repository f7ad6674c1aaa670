"""A request is one trace, however many nodes it goes through; nobody's words are in it, no collector is waited for."""

import asyncio
import contextlib
import gzip
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from stub_nodes import GOOD, Net, Stub, busy, hang_up, net, play

from wwwserve.serving import node
from wwwserve.serving.config import ConfigError, TracingConfig, parse
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.trace import trace_of
from wwwserve.serving.local_nodes import free_ports
from wwwserve.serving.setup.doctor import FAILED, examine
from wwwserve.serving.tracing import LAST_S, Tracing

TRACE_ID, USERS_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{USERS_SPAN}-00"
SLACK_NS = 1_000_000_000  # that an executor may need to end what its origin has seen the end of


class Seen(NamedTuple):
    """A span as a collector gets it."""

    name: str
    node: str
    trace_id: str
    id: str
    parent: str
    kind: int
    error: bool
    begin: int  # ns
    end: int
    attributes: dict[str, Any]


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return getattr(value, kind) if kind is not None else None


class Collector:
    """Takes spans by OTLP over HTTP."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.status, self.refused = 200, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
                if outer.status == 200:
                    outer.bodies.append(body)
                else:
                    outer.refused += 1
                self.send_response(outer.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *what: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator["Collector"]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def spans(self) -> list[Seen]:
        found = []
        for body in [*self.bodies]:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                of = {each.key: _value(each.value) for each in resource.resource.attributes}
                assert of["service.name"] == "wwwserve"
                for scope in resource.scope_spans:
                    found += [self._seen(of["wwwserve.node"], span) for span in scope.spans]
        return found

    def _seen(self, node: str, span: Span) -> Seen:
        return Seen(
            span.name, node, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.kind,
            span.status.code == Status.STATUS_CODE_ERROR, span.start_time_unix_nano, span.end_time_unix_nano,
            {each.key: _value(each.value) for each in span.attributes},
        )  # fmt: skip

    async def until(self, n: Net, count: int) -> dict[str, Seen]:
        """The spans by name once there are so many, all of different names."""

        async def there() -> bool:
            return len(self.spans()) >= count

        await n.until(there)
        found = {each.name: each for each in self.spans()}
        assert len(self.spans()) == len(found) == count, self.spans()
        return found


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # ms
    with Collector().running() as made:
        yield made


def test_a_stream_that_a_peer_answers_is_one_trace_whose_spans_nest(collector: Collector) -> None:
    async def scene() -> None:
        async with net(busy(), Stub(pause_s=0.4), tracing={"endpoint": collector.url}) as n:
            status, body, headers = await n.ask(stream=True, headers={"traceparent": PARENT})
            assert status == 200 and b"[DONE]" in body
            seen = await collector.until(n, 5)
            user, decide, delegate, serve, engine = (
                seen[name] for name in ("POST /v1/chat/completions", "decide", "delegate", "serve", "engine")
            )
            assert {each.trace_id for each in seen.values()} == {TRACE_ID}
            assert user.parent == USERS_SPAN
            assert decide.parent == delegate.parent == user.id
            assert serve.parent == delegate.id and engine.parent == serve.id
            assert [each.node for each in (user, decide, delegate, serve, engine)] == ["n0", "n0", "n0", "n1", "n1"]
            kinds = [each.kind for each in (user, decide, delegate, serve, engine)]
            assert kinds == [Span.SPAN_KIND_SERVER, Span.SPAN_KIND_INTERNAL, Span.SPAN_KIND_CLIENT,
                             Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT]  # fmt: skip
            assert not any(each.error for each in seen.values())
            for inner, outer, slack in (
                (decide, user, 0), (delegate, user, 0), (serve, delegate, SLACK_NS), (engine, serve, 0)
            ):  # fmt: skip
                assert outer.begin <= inner.begin < inner.end <= outer.end + slack, (inner, outer)
            assert decide.end <= delegate.begin
            assert engine.end - engine.begin >= 2_000_000_000, "5 pauses of the engine"
            peer = n.keys[1].name
            assert decide.attributes.items() >= {
                "wwwserve.chosen": peer, "wwwserve.candidates": 1, "wwwserve.class": "default"
            }.items()  # fmt: skip
            assert delegate.attributes["wwwserve.peer"] == peer and serve.attributes["wwwserve.peer"] == n.keys[0].name
            promises = [each.attributes["wwwserve.promise.ttft_s"] for each in (decide, delegate, serve)]
            assert promises[0] >= promises[1] == promises[2] > 0
            assert engine.attributes["gen_ai.usage.output_tokens"] == 5
            assert user.attributes["http.response.status_code"] == 200
            assert user.attributes["gen_ai.request.model"] == "stub" and user.attributes["wwwserve.executor"] == peer
            there = n.stubs[1].heads[0]
            assert there["traceparent"] == f"00-{TRACE_ID}-{engine.id}-01", "the engine's own spans are part of it"
            assert headers["traceparent"] == f"00-{TRACE_ID}-{user.id}-01"

    play(scene)


def test_without_a_traceparent_the_request_is_where_the_trace_begins(collector: Collector) -> None:
    async def scene() -> None:
        async with net(Stub(), tracing={"endpoint": collector.url + "/v1/traces"}) as n:
            _, _, headers = await n.ask()
            seen = await collector.until(n, 3)
            user, engine = seen["POST /v1/chat/completions"], seen["engine"]
            assert user.parent == "" and engine.parent == user.id
            assert headers["traceparent"] == f"00-{user.trace_id}-{user.id}-01"
            assert {name.lower(): value for name, value in headers.items()}["x-request-id"] == user.trace_id
            assert seen["decide"].attributes["wwwserve.chosen"] == "local"
            assert seen["decide"].attributes["wwwserve.candidates"] == 0

    play(scene)


@pytest.mark.parametrize("mode, kind", [("500", "500"), ("hangs up", "\\w+Error"), ("breaks off", "502")])
def test_a_failing_engine_marks_its_span_and_the_request(mode: str, kind: str, collector: Collector) -> None:
    async def scene() -> None:
        async with net(Stub(mode=mode), tracing={"endpoint": collector.url}, deadlines_s=[0.3]) as n:
            status, _, _ = await n.ask(stream=True)
            assert status in ((200,) if mode == "breaks off" else (502, 503))

            async def done() -> bool:
                return any(each.name.startswith("POST") for each in collector.spans())

            await n.until(done)
            for name in ("engine", "POST /v1/chat/completions"):
                found = [each for each in collector.spans() if each.name == name]
                assert found and all(each.error for each in found), found
            engines = [each for each in collector.spans() if each.name == "engine"]
            assert all(re.fullmatch(kind, each.attributes["error.type"]) for each in engines), engines

    play(scene)


def test_a_failing_peer_marks_the_delegation_and_not_the_request_that_another_answers(collector: Collector) -> None:
    async def scene() -> None:
        async with net(busy(), Stub(mode="500"), tracing={"endpoint": collector.url}) as n:
            n.stubs[0].waiting = 200
            asked = asyncio.create_task(n.ask())

            async def tried() -> bool:
                return any(each.name == "delegate" for each in collector.spans())

            await n.until(tried)
            n.stubs[0].waiting = 0
            status, _, _ = await asked
            assert status == 200

            async def done() -> bool:  # of both nodes, each of which sends its own
                there = {(each.name, each.node) for each in collector.spans()}
                return {("POST /v1/chat/completions", "n0"), ("serve", "n1")} <= there

            await n.until(done)
            error = {(each.name, each.node): each.error for each in collector.spans()}
            assert error["delegate", "n0"] and error["serve", "n1"] and error["engine", "n1"]
            assert not error["POST /v1/chat/completions", "n0"] and not error["engine", "n0"]

    play(scene)


def test_who_hangs_up_is_no_error(collector: Collector) -> None:
    async def scene() -> None:
        async with net(Stub(pause_s=60.0), tracing={"endpoint": collector.url}) as n:
            await hang_up(n, 0)
            seen = await collector.until(n, 3)
            for name in ("engine", "POST /v1/chat/completions"):
                assert not seen[name].error and seen[name].attributes["wwwserve.cancelled"] is True

    play(scene)


def test_nobody_s_words_are_in_a_span(collector: Collector) -> None:
    """Nor those of an engine that repeats what it was asked."""
    secret = "xyzzy"

    async def scene() -> None:
        says = {"error": {"message": f"{secret} is too long"}}
        stub = Stub(others={"/v1/embeddings": {"model": secret, "data": []}, "/v1/score": says})
        async with net(stub, tracing={"endpoint": collector.url}) as n:
            message = [{"role": "user", "content": secret}]
            headers = {"x-slo-class": secret, "x-request-id": secret, "tracestate": f"a={secret}"}
            await n.ask(messages=message)
            await n.ask(messages=message, stream=True, user=secret, headers={"traceparent": PARENT, **headers})
            await n.ask(model=secret)
            async with n.session.get(n.urls[0] + "/v1/models/" + secret) as response:
                assert response.status == 404
            async with n.session.request("PROPFIND", n.urls[0] + "/v1/completions") as response:
                assert response.status == 405
            for path in ("/v1/embeddings", "/v1/score"):
                async with n.session.post(n.urls[0] + path, json={"model": "stub", "input": secret}) as response:
                    assert secret.encode() in await response.read()
            stub.mode = "garbage"
            await n.ask(messages=message)

            async def done() -> bool:
                return sum(each.kind == Span.SPAN_KIND_SERVER for each in collector.spans()) == 8

            await n.until(done)
            assert all(secret.encode() not in body.lower() for body in collector.bodies)
            [asked] = [each for each in collector.spans() if each.name == "POST /v1/embeddings"]
            [engine] = [each for each in collector.spans() if each.parent == asked.id]
            assert (engine.name, engine.kind, engine.attributes["http.response.status_code"]) == ("engine", 3, 200)
            routes = {each.name for each in collector.spans() if each.kind == Span.SPAN_KIND_SERVER}
            assert {"GET /v1/models", "_OTHER /v1/completions", "POST /v1/embeddings"} < routes

    play(scene)


def test_a_collector_that_is_away_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    [port] = free_ports(1)

    async def scene() -> None:
        async with net(busy(), Stub(), tracing={"endpoint": f"http://127.0.0.1:{port}"}) as n:
            for _ in range(20):
                status, _, _ = await n.ask()
                assert status == 200
            await asyncio.sleep(0.3)  # it is being tried
            began_s = time.monotonic()
            n.running[1].cancel()
            await asyncio.gather(n.running[1], return_exceptions=True)
            assert time.monotonic() - began_s < LAST_S + 3.0

    play(scene)
    said = [each for each in caplog.records if each.name.startswith(("opentelemetry", "urllib3", "wwwserve.tracing"))]
    assert 1 <= len(said) <= 2 and {each.message for each in said} == {
        "the collector takes no spans, most are lost until it does"
    }, "once by each node that tried"
    assert all(each.reason == "nothing listens there" and each.exc_info is None for each in said)  # type: ignore[attr-defined]


@pytest.mark.parametrize("status", [400, 503])
def test_that_a_collector_refuses_and_takes_spans_again_is_said_once(
    status: int, collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    caplog.set_level(logging.INFO)

    async def scene() -> None:
        collector.status = status
        tracing = Tracing(TracingConfig(endpoint=collector.url), "n", "k")

        async def spans(what: Callable[[], bool]) -> None:
            async with asyncio.timeout(30.0):
                while not what():
                    tracing.start("x", "internal", None).end()
                    await asyncio.sleep(0.1)

        refused = collector.refused
        await spans(lambda: collector.refused > refused + 2)
        collector.status = 200
        await spans(lambda: bool(collector.bodies) and "again" in caplog.text)
        await tracing.close()

    play(scene)
    said = [each for each in caplog.records if each.name.startswith(("opentelemetry", "wwwserve"))]
    assert [each.levelname for each in said] == ["WARNING", "INFO"], [each.getMessage() for each in said]
    assert str(status) in said[0].reason or "Service" in said[0].reason  # type: ignore[attr-defined]
    assert said[1].lost > 0  # type: ignore[attr-defined]


def test_which_requests_are_traced_is_by_trace_id_and_the_same_on_all_nodes(collector: Collector) -> None:
    def traces(tracing: Tracing, low: int, flag: str) -> bool:
        parent = f"00-{TRACE_ID[:16]}{low:016x}-{USERS_SPAN}-{flag}"
        span = tracing.begin(trace_of({b"traceparent": parent.encode()}), "x").span
        if span is not None:
            span.end()
        return span is not None

    async def scene() -> None:
        none, quarter, all_of_them = (
            Tracing(TracingConfig(endpoint=collector.url, sample=sample), "n", "k") for sample in (0.0, 0.25, 1.0)
        )
        for low, expected in ((0, True), (2**62 - 1, True), (2**62, False), (2**64 - 1, False)):
            for flag in ("00", "01"):  # whatever who asks wants
                assert traces(quarter, low, flag) == expected
                assert traces(all_of_them, low, flag) and not traces(none, low, flag)
        for each in (none, quarter, all_of_them):
            await each.close()

    play(scene)
    assert len(collector.spans()) == 2 * 2 + 4 * 2


def test_what_is_not_traced_goes_on_as_without_tracing(collector: Collector) -> None:
    async def scene() -> None:
        async with net(Stub(), tracing={"endpoint": collector.url, "sample": 0}) as n:
            _, _, headers = await n.ask(headers={"traceparent": PARENT})
            assert headers["traceparent"] == n.stubs[0].heads[0]["traceparent"] == PARENT

    play(scene)
    assert collector.bodies == []


def test_without_tracing_opentelemetry_is_not_loaded() -> None:
    code = "import sys, wwwserve.serving.node; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_where_it_is_not_installed_that_is_said_before_a_minute_of_compiling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.setattr(node, "warm_up", lambda *given: pytest.fail("compiled"))
    Identity.generate().save(tmp_path / "n.pem")
    settings = GOOD | {"key": str(tmp_path / "n.pem"), "tracing": {"endpoint": "http://127.0.0.1:4318"}, "port": 0}
    with pytest.raises(ConfigError, match=r"tracing needs OpenTelemetry: pip install '\.\[trace\]'"):
        node.compiled(parse(settings, "node.yaml"))
    (tmp_path / "node.yaml").write_text(json.dumps(settings))  # JSON is YAML
    [found] = [each for each in examine(tmp_path / "node.yaml") if each.what == "tracing"]
    assert found.state == FAILED and "pip install '.[trace]'" in found.do


@pytest.mark.parametrize(
    "tracing, said",
    [({"endpoint": "localhost:4318"}, "tracing.endpoint must be http://"), ({"endpoint": "http://h", "sample": 2},
      "tracing.sample must be 0 to 1"), ({"endpoint": "http://h", "rate": 1}, "rate")],
)  # fmt: skip
def test_a_wrong_setting_is_refused(tracing: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(GOOD | {"tracing": tracing}, "node.yaml")
