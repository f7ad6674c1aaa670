"""Bug reports of other routers, gateways and engines, each tried on a node: alone, and where it hands requests over.

docs/bug_reports.md says for each what was sent, what should come of it, and what came before and after.
"""

import asyncio
import contextlib
import gzip
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from stub_nodes import MODEL, Net, Stub, busy, net, play

PATIENCE_S = 20.0
PAGE = Path(__file__).parents[1] / "docs" / "bug_reports.md"
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "Hello there"}]}
BODY = json.dumps(ASKED).encode()
KEY = {"name": "user", "key": "k"}
PATIENT = {"timeout_s": 60.0}  # longer than a test waits


# What clients send.


class Sent(NamedTuple):
    """What a client sends, byte by byte, and what should come back."""

    source: str
    wire: bytes
    status: int
    says: tuple[bytes, ...] = ()  # what is in the response
    lacks: tuple[bytes, ...] = ()
    asked: dict[str, Any] | None = None  # what the engine gets; None: nothing


def post(body: bytes, *head: str, path: str = "/v1/chat/completions", version: str = "1.1") -> bytes:
    """A request; its length is said unless `head` says how it comes."""
    sized = any(line.lower().startswith("transfer-encoding") for line in head)
    lines = [f"POST {path} HTTP/{version}", "host: n", "content-type: application/json", *head]
    lines += [] if sized else [f"content-length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(body: bytes) -> bytes:
    return b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: n\r\nconnection: close\r\n\r\n".encode()


UPGRADE = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAU")
CLOSE = "connection: close"
STREAM = ASKED | {"stream": True}
SENT = {
    "a byte order mark before the body": Sent(
        "mindroom-ai/mindroom#1257", post(b"\xef\xbb\xbf" + BODY, CLOSE), 200, asked=ASKED
    ),
    "Java asks to go on in HTTP/2, with a length": Sent(
        "reactor/reactor-netty#1071", post(BODY, *UPGRADE), 200, asked=ASKED
    ),
    "Java asks to go on in HTTP/2, in chunks": Sent(
        "Kludex/uvicorn#2722", post(chunked(BODY), "transfer-encoding: chunked", *UPGRADE), 200, asked=ASKED
    ),
    "a body in chunks of one byte": Sent(
        "benoitc/gunicorn#2031", post(chunked(BODY), "transfer-encoding: chunked", CLOSE), 200, asked=ASKED
    ),
    "a stream over HTTP/1.0": Sent(
        "Kludex/uvicorn#1360", post(json.dumps(STREAM).encode(), version="1.0"), 200,
        says=(b"\r\n\r\ndata: {", b"data: [DONE]\n\n"), lacks=(b"transfer-encoding",), asked=STREAM,
    ),
    "a stream behind nginx": Sent(
        "ggml-org/llama.cpp#24774", post(json.dumps(STREAM).encode(), CLOSE), 200,
        says=(b"x-accel-buffering: no\r\n", b"cache-control: no-cache\r\n"), asked=STREAM,
    ),
    "a base URL without /v1": Sent(
        "abetlen/llama-cpp-python#1032", post(BODY, CLOSE, path="/chat/completions"), 404,
        says=(b"there is no /chat/completions here, expected /v1/chat/completions",),
    ),
    "a base URL that ends with a slash": Sent(
        "sigoden/aichat#767", post(BODY, CLOSE, path="/v1//chat/completions"), 404,
        says=(b"there is no /v1//chat/completions here, expected /v1/chat/completions",),
    ),
    "a path twice": Sent(
        "harry0703/MoneyPrinterTurbo#57", post(BODY, CLOSE, path="/v1/chat/completions/chat/completions"), 404,
        says=(b"here, expected /v1/chat/completions",),
    ),
    "a model with a slash in its name": Sent(
        "ollama/ollama#10139", get("/v1/models/org/lora:13b"), 200, says=(b'"id":"org/lora:13b"',)
    ),
    "a model whose slash is encoded": Sent(
        "ollama/ollama#10139", get("/v1/models/org%2Flora%3A13b"), 200, says=(b'"id":"org/lora:13b"',)
    ),
    "requests that do not wait for answers": Sent(
        "Mesh-LLM/mesh-llm#71", post(BODY) + get("/v1/models"), 200, says=(b'"choices"', b'"owned_by"'), asked=ASKED
    ),
    "a body that waits to be asked for": Sent(
        "abhinavsingh/proxy.py#124", post(BODY, "expect: 100-continue", CLOSE), 100, says=(b"HTTP/1.1 200",),
        asked=ASKED,
    ),
    "a client that takes an error's code for a string": Sent(
        "BerriAI/litellm#4970", post(json.dumps(ASKED | {"model": "gpt"}).encode(), CLOSE), 404,
        says=(b'"code":"404"', b'"type":"not_found_error"'),
    ),
}  # fmt: skip


async def raw(url: str, wire: bytes) -> bytes:
    """All that comes back on a connection, until it is closed or quiet."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(wire)
    came = b""
    with contextlib.suppress(TimeoutError):
        while piece := await asyncio.wait_for(reader.read(1 << 16), PATIENCE_S if not came else 0.5):
            came += piece
    writer.close()
    return came


@pytest.mark.parametrize("name", SENT)
def test_what_clients_send(name: str) -> None:
    sent = SENT[name]

    async def scene() -> None:
        stub = Stub(models_served=[MODEL, "org/lora:13b"])
        async with net(stub, limits={"body_bytes": 100_000}) as n:
            came = await raw(n.urls[0], sent.wire)
            assert came.startswith(b"HTTP/1.1 %d " % sent.status), came
            for each in sent.says:
                assert each in came, came
            for each in sent.lacks:
                assert each not in came, came
            assert [json.loads(body) for body in stub.bodies] == ([sent.asked] if sent.asked is not None else [])

    play(scene)


async def counted(n: Net, tokens: int) -> None:
    """Wait until the user has used so many of output."""

    async def said() -> bool:
        async with n.session.get(n.urls[0] + "/metrics") as response:
            line = f'wwwserve_key_tokens_total{{key="user",kind="output"}} {tokens:.1f}'
            return line in (await response.text()).splitlines()

    await n.until(said, PATIENCE_S)


# What engines answer.


@dataclass
class Says(Stub):
    """An engine that answers byte by byte."""

    status: int = 200
    kind: str = "text/event-stream"
    head: dict[str, str] = field(default_factory=dict)
    pieces: tuple[bytes, ...] = ()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.read())
        self.begun += 1
        response = web.StreamResponse(status=self.status, headers={"content-type": self.kind} | self.head)
        await response.prepare(request)
        for piece in self.pieces:
            await response.write(piece)
            await asyncio.sleep(0.01)
        return response


class Answered(NamedTuple):
    """What an engine answers, and what the user should get: the same, unless it says otherwise."""

    source: str
    pieces: tuple[bytes, ...]
    status: int = 200
    kind: str = "text/event-stream"
    head: dict[str, str] | None = None
    gets: int = 200
    got: bytes | None = None  # None: what the engine said
    tokens: int | None = None  # counted


def event(text: str = "", index: int = 0, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    said = {"id": "c", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice]} | more
    return b"data: " + json.dumps(said, ensure_ascii=False).encode() + b"\n\n"


def usage(output: int, **more: Any) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": 3, "completion_tokens": output, "total_tokens": 3 + output}} | more


DONE = b"data: [DONE]\n\n"
END = event(finish="stop")
COMMENT = b": OPENROUTER PROCESSING\n\n"
EMOJI = event("你好 🎉")
BYTES = tuple(bytes([byte]) for byte in EMOJI)
ERROR = b'{"error": {"message": "repetition_penalty must be positive", "code": 400}}'
ANSWERED = {
    "characters that are cut in two": Answered("api7/aisix#111", (*BYTES, END, DONE)),
    "comments that keep a connection alive": Answered(
        "mnfst/llm-gateway#2053", (COMMENT, event("a"), COMMENT, END, DONE),
    ),
    "line separators of Unicode in a text": Answered(
        "Soju06/codex-lb#1010", (event("a\u2028b\u2029c\u0085d"), END, DONE)
    ),
    "an event of a megabyte": Answered("open-webui/open-webui#24928", (event("x" * (1 << 20)), END, DONE)),
    "lines that end with CR LF": Answered(
        "miruamel/xuan#194", tuple(each.replace(b"\n", b"\r\n") for each in (event("a"), END, DONE))
    ),
    "usage in the event of the last choice": Answered(
        "BerriAI/litellm#36168", (event("hello you"), event(finish="stop", **usage(2)), DONE), tokens=2
    ),
    "usage after all choices": Answered(
        "BerriAI/litellm#28735", (event("hello you"), END, event(**usage(2, choices=[])), DONE), tokens=2
    ),
    "usage in every event": Answered(
        "envoyproxy/ai-gateway#1195",
        (event("hello", **usage(1)), event(" you", **usage(2)), event(finish="stop", **usage(2)), DONE), tokens=2,
    ),
    "two answers at once": Answered(
        "BerriAI/litellm#3276",
        (event("a", 1), event("b"), event(index=1, finish="stop"), event("c"), event(finish="length"), DONE),
    ),
    "a stream without its last event": Answered("waybarrios/vllm-mlx#101", (event("a"), END)),
    "an error instead of a stream": Answered(
        "smg-project/smg#2403", (ERROR,), 400, "application/json", gets=400,
    ),
    "an error with status 200": Answered(
        "BerriAI/litellm#21755", (b'{"error": {"code": 429, "message": "slow down"}}',), 200, "application/json",
        gets=502, got=b"slow down",
    ),
    "an answer that is packed": Answered(
        "gadievron/raptor#547", (gzip.compress(b'{"choices": []}'),), 200, "application/json",
        {"content-encoding": "gzip"}, gets=502, got=b"its answer is packed",
    ),
    "a stream that is packed": Answered(
        "gadievron/raptor#547", (gzip.compress(event("a") + END + DONE),), head={"content-encoding": "gzip"},
        gets=502, got=b"its answer is packed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("by", ["the own engine", "a peer"])
@pytest.mark.parametrize("name", ANSWERED)
def test_what_engines_answer(name: str, by: str) -> None:
    said = ANSWERED[name]

    async def scene() -> None:
        stub = Says(status=said.status, kind=said.kind, head=said.head or {}, pieces=said.pieces)
        stubs: list[Stub] = [stub] if by == "the own engine" else [busy(), stub]
        fails = said.gets >= 500
        if by == "a peer" and not fails:
            stubs[0].mode = "full"
        async with net(*stubs, keys=[KEY]) as n:
            stream = said.kind == "text/event-stream" or said.status == 400
            status, got, head = await n.ask(headers={"authorization": "Bearer k"}, stream=stream, n=2)
            assert stub.begun
            if fails and by == "a peer":  # then somebody else answers
                assert status == 200 and stubs[0].begun == 1 and stubs[0].url.encode() in got
                return
            assert status == said.gets
            kind = {name.lower(): value for name, value in head.items()}["content-type"]
            assert kind == (said.kind if not fails else "application/json")
            assert got == b"".join(said.pieces) if said.got is None else said.got in got
            if said.tokens is not None:
                await counted(n, said.tokens)

    play(scene)


# What takes more than one request or answer.


async def begun(n: Net, k: int = 0, times: int = 1) -> None:
    async def there() -> bool:
        return n.stubs[k].begun == times

    await n.until(there)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by", ["the own engine", "a peer"])
def test_who_hangs_up_stops_the_engine(by: str, stream: bool) -> None:
    """vllm-project/production-stack#634"""

    async def scene() -> None:
        stubs = [Stub(pause_s=1.0, tokens=50)] if by == "the own engine" else [busy(), Stub(pause_s=1.0, tokens=50)]
        async with net(*stubs, engine=PATIENT) as n:
            asked = asyncio.create_task(n.ask(stream=stream))
            await begun(n, len(stubs) - 1)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

            async def aborted() -> bool:
                return stubs[-1].aborted == 1

            await n.until(aborted, PATIENCE_S)

    play(scene)


def test_who_hangs_up_after_a_large_body_that_came_late_stops_the_engine() -> None:
    async def scene() -> None:
        async with net(Stub(pause_s=1.0, tokens=50), engine=PATIENT) as n:
            parts, writers = urlsplit(n.urls[0]), []
            for size in range(80_000, 240_000, 20_000):  # which come in one piece or several
                body = json.dumps(ASKED | {"user": "x" * size}).encode()
                _, writer = await asyncio.open_connection(parts.hostname, parts.port)
                writer.write(post(body).removesuffix(body))
                writers.append((writer, body))
            await asyncio.sleep(0.2)  # the node waits for bodies
            for writer, body in writers:
                writer.write(body)
            await begun(n, 0, len(writers))
            for writer, _ in writers:
                writer.close()

            async def aborted() -> bool:
                return n.stubs[0].aborted == len(writers)

            await n.until(aborted, PATIENCE_S)

    play(scene)


def test_an_engine_that_hangs_holds_up_nobody_else() -> None:
    """vllm-project/production-stack#749"""

    async def scene() -> None:
        async with net(Stub(pause_s=60.0), Stub()) as n:  # `engine.timeout_s` is 2 there
            answers = await asyncio.wait_for(asyncio.gather(*(n.ask() for _ in range(4))), PATIENCE_S)
            assert [status for status, _, _ in answers] == [200] * 4
            assert all(n.stubs[1].url.encode() in got for _, got, _ in answers)

    play(scene)


def test_what_is_used_counts_though_the_client_leaves_after_the_last_event() -> None:
    """envoyproxy/ai-gateway#2563"""

    async def scene() -> None:
        async with net(Stub(linger_s=3.0), keys=[KEY]) as n:
            body = ASKED | {"stream": True, "stream_options": {"include_usage": True}}
            head = {"authorization": "Bearer k"}
            async with n.session.post(n.urls[0] + "/v1/chat/completions", json=body, headers=head) as response:
                async for line in response.content:
                    if line.startswith(b"data: [DONE]"):
                        break
            await counted(n, 5)

    play(scene)


def test_an_engine_that_lists_null_serves_nothing_and_is_up() -> None:
    """tinyhumansai/openhuman#4121, of Ollama"""

    @dataclass
    class Empty(Stub):
        async def models(self, request: web.Request) -> web.Response:
            return web.json_response({"object": "list", "data": None if not self.models_served else [{"id": MODEL}]})

    async def scene() -> None:
        stub = Empty(models_served=[], says_load=False)
        async with net(stub) as n:
            status, got, _ = await n.ask()
            assert status == 503 and b"has not said yet which models it serves" in got
            async with n.session.get(n.urls[0] + "/v1/models") as response:
                assert await response.json() == {"object": "list", "data": []}
            stub.models_served = [MODEL]

            async def answers() -> bool:
                return (await n.ask())[0] == 200

            await n.until(answers, PATIENCE_S)

    play(scene)


def test_a_failure_in_the_middle_is_told_in_the_stream_which_ends() -> None:
    """BerriAI/litellm#39748"""

    async def scene() -> None:
        async with net(Stub(mode="breaks off"), resume=False) as n:
            status, got, _ = await n.ask(stream=True)  # raises if the response has no end
            *_, last, nothing = got.split(b"\n\n")
            assert status == 200 and nothing == b""
            assert json.loads(last.removeprefix(b"data: "))["error"]["type"] == "engine_error"

    play(scene)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("mode", ["ends early", "breaks off", "tells of an error"])
@pytest.mark.parametrize("by", ["the own engine", "a peer"])
def test_a_stream_without_its_end_is_gone_on_with_or_ends_with_an_error(by: str, mode: str, resume: bool) -> None:
    """vllm-project/vllm#52852"""

    async def scene() -> None:
        stubs = [Stub(mode=mode, breaks=1)] if by == "the own engine" else [busy(), Stub(mode=mode, breaks=1)]
        async with net(*stubs, resume=resume) as n:
            _, got, _ = await n.ask(stream=True)
            *events, last, nothing = got.split(b"\n\n")
            told = [json.loads(each.removeprefix(b"data: ")) for each in events]
            texts = [each["choices"][0]["delta"].get("content") for each in told if each.get("choices")]
            assert nothing == b"" and stubs[-1].begun >= 1
            if resume:
                assert last == b"data: [DONE]" and "".join(filter(None, texts)) == "w0 w1 w2 w3 w4 "
            else:
                assert "error" in json.loads(last.removeprefix(b"data: ")) and texts == ["", "w0 ", "w1 "]

    play(scene)


def test_kept_connections_that_an_engine_closed_fail_no_request() -> None:
    """headroomlabs-ai/headroom#1513"""

    @dataclass
    class Closes(Stub):
        async def complete(self, request: web.Request) -> web.StreamResponse:
            response = await super().complete(request)
            assert request.transport is not None
            asyncio.get_running_loop().call_later(0.02, request.transport.abort)
            return response

    async def scene() -> None:
        async with net(Closes()) as n:
            for _ in range(20):
                assert (await n.ask())[0] == 200
                await asyncio.sleep(0.02)

    play(scene)


def test_the_page_has_every_report() -> None:
    here = {each.source for each in (*SENT.values(), *ANSWERED.values())}
    here |= set(re.findall(r'^    """([\w.-]+/[\w.-]+#\d+)', Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    said = re.findall(r"\[([^]]+#\d+)\]\(https://github.com/([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert {name for name, _ in said} == here and len(here) >= 20
    assert all(re.sub("/(issues|pull)/", "#", path) == name for name, path in said)
