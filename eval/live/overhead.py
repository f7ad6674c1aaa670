"""What a node adds to a request, against calling the engine directly: `wwwserve overhead --json FILE`.

A bare engine answers at once, on one core, which it shares with the client; what is measured stands between them on
another: a node with its policy, the same node where one request in twenty is traced, and each (the engine is the
collector, too), a plain FastAPI application that passes requests on with httpx, and vLLM's router, which is written in
Rust, where it is installed (`pip install -e '.[bench]'`). All are asked over kept connections. `added_p50_ms` is the
difference of median latencies, one request at a time, direct and not in turn; `requests_per_s` is with `--connections`
at once; `cpu_us_per_chunk` is the CPU time of the process for each chunk of a stream. With `--tls` the node is measured
without and with `tls`, and nothing else.
"""

import asyncio
import json
import os
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Annotated, Any, cast

import tyro
import uvloop

from wwwserve.agents.arguments import Count, File, UsageError, parse_args, refuse
from wwwserve.eval.compare import write_json
from wwwserve.serving.local_nodes import (
    Command,
    Process,
    Programs,
    cpu_s,
    free_ports,
    listens,
    local_urls,
    programs,
    write_nodes,
)

PROG = "wwwserve overhead"
MODEL = "stub"
STREAM_CHUNKS, CHUNK_EVERY_S = 400, 0.004
READY_S = 300.0
PROFILE = {"kind": "catalogue", "gpu": "h100", "model": "qwen3-8b", "max_num_seqs": 256}
ANSWER = json.dumps(
    {
        "id": "1", "object": "chat.completion", "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 50}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 50, "total_tokens": 70},
    }
).encode()  # fmt: skip
NODES: dict[str, dict[str, Any]] = {  # what is configured
    "node": {}, "node_traced_5_percent": {"tracing": {"sample": 0.05}}, "node_traced": {"tracing": {"sample": 1.0}},
}  # fmt: skip
WITH_TLS: dict[str, dict[str, Any]] = {"node": {}, "node_tls": {"tls": {}}}
CHUNK = b'data: {"id":"1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"word "}}]}\n\n'
DONE = b"data: [DONE]\n\n"
METRICS = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n"
MODELS = json.dumps({"object": "list", "data": [{"id": MODEL}]}).encode()


def request(port: int, stream: bool) -> bytes:
    """A chat request as it goes over the wire."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story. " * 5}], "stream": stream}
    body = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


class Engine(asyncio.Protocol):
    """A bare engine: canned answers."""

    def __init__(self) -> None:
        self.read = b""
        self.transport: asyncio.Transport | None = None
        self.streaming: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self.read += data
        while (end := self.read.find(b"\r\n\r\n")) >= 0:
            head = self.read[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.read) < end + 4 + size:
                return
            body, self.read = self.read[end + 4 : end + 4 + size], self.read[end + 4 + size :]
            self.answer(head.split(b" ", 2)[1], body)

    def answer(self, path: bytes, body: bytes) -> None:
        """Answer one request."""
        assert self.transport is not None
        if path == b"/v1/chat/completions" and b'"stream":true' in body.replace(b" ", b""):
            self.streaming = asyncio.ensure_future(self.stream())
            return
        content = {b"/metrics": METRICS, b"/v1/models": MODELS}.get(path, ANSWER)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content)
        self.transport.write(head + content)

    async def stream(self) -> None:
        """A stream, a chunk at a time, so that none are joined."""
        assert self.transport is not None
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        self.transport.write(head)
        for _ in range(STREAM_CHUNKS):
            self.transport.write(b"%x\r\n%s\r\n" % (len(CHUNK), CHUNK))
            await asyncio.sleep(CHUNK_EVERY_S)
        self.transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(DONE), DONE))


async def serve_engine(port: int) -> None:
    """Be a bare engine."""
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def serve_fastapi(port: int, engine: str) -> None:
    """Be a plain FastAPI application that passes requests on with httpx."""
    import fastapi
    import httpx
    import uvicorn
    from fastapi.responses import StreamingResponse

    app = fastapi.FastAPI()
    client = httpx.AsyncClient(base_url=engine, timeout=60.0, limits=httpx.Limits(max_connections=None))

    async def chat(request: fastapi.Request) -> Any:
        body = await request.body()
        sent = client.build_request("POST", "/v1/chat/completions", content=body)
        response = await client.send(sent, stream=True)
        if json.loads(body).get("stream"):
            return StreamingResponse(response.aiter_raw(), media_type="text/event-stream")
        return fastapi.Response(await response.aread(), media_type="application/json")

    app.add_api_route("/v1/chat/completions", chat, methods=["POST"])
    app.add_api_route("/health", lambda: {}, methods=["GET"])
    uvicorn.run(app, port=port, log_level="critical", access_log=False, loop="uvloop", http="httptools")


class Caller(asyncio.Protocol):
    """One kept connection that asks, and counts what comes back."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.read = b""
        self.done: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self.read += data
        end = self.read.find(b"\r\n\r\n")
        if end < 0 or self.done is None:
            return
        head = self.read[:end].lower()
        at = head.find(b"content-length:")
        if at >= 0:
            complete = len(self.read) >= end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])
        else:
            complete = self.read.endswith(b"0\r\n\r\n")
        if complete and not self.done.done():
            self.done.set_result(self.read)

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self.done is not None and not self.done.done():
            self.done.set_exception(error or ConnectionError("the connection was closed"))

    async def request(self, wire: bytes) -> bytes:
        """The whole answer, head and body."""
        assert self.transport is not None
        self.read, self.done = b"", asyncio.get_running_loop().create_future()
        self.transport.write(wire)
        answer = await self.done
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"an answer is not what was expected: {answer[:200]!r}")
        return answer


async def connect(port: int, tls: bool = False) -> Caller:
    """A connection to a port of this machine. With `tls`, to a node, whose certificate is of its own key."""
    context = ssl.create_default_context() if tls else None
    if context is not None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, caller = await asyncio.get_running_loop().create_connection(Caller, "127.0.0.1", port, ssl=context)
    return caller


async def keep_asking(callers: Sequence[Caller], wire: bytes, seconds: float) -> tuple[int, float]:
    """Have each send `wire` again and again for so long; returns how many were answered, and in how many seconds."""
    start_s = time.perf_counter()

    async def keep(caller: Caller) -> int:
        count = 0
        while time.perf_counter() < start_s + seconds:
            await caller.request(wire)
            count += 1
        return count

    asked = sum(await asyncio.gather(*(keep(caller) for caller in callers)))
    return asked, time.perf_counter() - start_s


async def measure(
    pid: int, port: int, engine_port: int, calls: int, seconds: float, connections: int, tls: bool = False
) -> dict[str, float]:
    """What stands at `port` adds to the engine; it speaks TLS, if `tls`."""
    wire, direct_wire = request(port, False), request(engine_port, False)
    through, direct = await connect(port, tls), await connect(engine_port)
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(calls + 100):
        for caller, what, kept in ((direct, direct_wire, times[0]), (through, wire, times[1])):
            start_s = time.perf_counter()
            await caller.request(what)
            if k >= 100:
                kept.append(time.perf_counter() - start_s)
    callers = [await connect(port, tls) for _ in range(connections)]
    used_s = cpu_s(pid)
    asked, took_s = await keep_asking(callers, wire, seconds)
    used_s = cpu_s(pid) - used_s
    stream_wire, streams = request(port, True), callers[: min(16, connections)]
    used_for_chunks_s = cpu_s(pid)
    answers = await asyncio.gather(*(caller.request(stream_wire) for caller in streams))
    used_for_chunks_s = cpu_s(pid) - used_for_chunks_s
    chunks = sum(answer.count(b'"delta":') for answer in answers)
    if chunks != STREAM_CHUNKS * len(streams):
        raise RuntimeError(f"{chunks} chunks came back, expected {STREAM_CHUNKS * len(streams)}")
    return {
        "added_p50_ms": round(1e3 * (median(times[1]) - median(times[0])), 4),
        "direct_p50_ms": round(1e3 * median(times[0]), 4),
        "requests_per_s": round(asked / took_s, 1),
        "cpu_us_per_request": round(1e6 * used_s / max(asked, 1), 1),
        "cpu_us_per_chunk": round(1e6 * used_for_chunks_s / chunks, 2),
    }


def pinned(programs: Programs, name: str, argv: Sequence[str], core: int, port: int) -> Process:
    """A program on one core, when it listens at `port` and has warmed up. Raises NetworkError."""
    process = programs.start(name, Command(list(argv), core=core))
    programs.wait(local_urls([port]), listens, READY_S)
    time.sleep(2.0)  # until it has looked at its engine, and compiled what it needs
    return process


@contextmanager
def only_core(core: int) -> Iterator[None]:
    """This process keeps to one core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def run(calls: int, seconds: float, connections: int, policy: str | None, tls: bool = False) -> dict[str, Any]:
    """Measure the node and what stands beside it, or the node without and with `tls`. Raises NetworkError for what does
    not start."""
    cores = sorted(os.sched_getaffinity(0))
    engine_port, node_port, other_port, router_port = free_ports(4)
    me = [sys.executable, "-m", "wwwserve.eval.live.overhead"]
    results: dict[str, Any] = {}
    with programs() as made:
        pinned(made, "engine", [*me, "--serve-engine", str(engine_port)], cores[-1], engine_port)
        [engine] = local_urls([engine_port])
        measured = []
        for name, more in (WITH_TLS if tls else NODES).items():
            config = {"name": "n", "port": node_port, "policy": policy, "engine": {"url": engine, "profile": PROFILE}}
            config |= more
            if "tracing" in more:
                config["tracing"] = {"endpoint": engine, **more["tracing"]}
            (folder := made.folder / name).mkdir()
            [node] = write_nodes(folder, [config])
            measured.append((name, node.command().argv, node_port))
        if not tls:
            measured.append(("fastapi_httpx", [*me, "--serve-fastapi", str(other_port), engine], other_port))
        if not tls and find_spec("vllm_router"):
            router = [sys.executable, "-m", "vllm_router.launch_router", "--worker-urls", engine, "--host", "127.0.0.1",
                      "--port", str(router_port), "--prometheus-port", str(free_ports(1)[0]), "--policy", "round_robin",
                      "--log-level", "error"]  # fmt: skip
            measured.append(("vllm_router", router, router_port))
        for name, argv, port in measured:
            process = pinned(made, name, argv, cores[0], port)
            with only_core(cores[-1]):
                asked = measure(process.pid, port, engine_port, calls, seconds, connections, name == "node_tls")
                results[name] = uvloop.run(asked)
            made.stop(process)
            print(f"{name}: {results[name]}", flush=True)
    return results


@dataclass
class Args:
    """Measure what a node adds to a request."""

    calls: Count = 2000
    """requests one at a time"""
    seconds: Count = 5
    """of requests at once"""
    connections: Count = 32
    """requests at once"""
    policy: Annotated[str | None, tyro.conf.arg(metavar="NAME|BUNDLE")] = None
    """default: the shipped bundle"""
    tls: bool = False
    """measure the node without and with TLS, and nothing else"""
    json: File = None
    """write the figures to this file"""
    serve_engine: int | None = None
    """for its own processes: be the bare engine at this port"""
    serve_fastapi: Annotated[tuple[int, str] | None, tyro.conf.arg(metavar="PORT URL")] = None
    """for its own processes: be the plain application at this port, before that engine"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
    except UsageError as error:
        return refuse(PROG, error)
    if args.serve_engine:
        uvloop.run(serve_engine(args.serve_engine))
    elif args.serve_fastapi:
        serve_fastapi(int(args.serve_fastapi[0]), args.serve_fastapi[1])
    else:
        results = run(args.calls, args.seconds, args.connections, args.policy, args.tls)
        if args.json:
            write_json(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
