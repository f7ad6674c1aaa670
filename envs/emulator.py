"""An engine to try a network with, without a GPU: `wwwserve emulator --gpu rtx-4090 --port 8000`.

The scheduler of `envs.engine` behind the OpenAI API and vLLM's `/metrics`, in real or scaled time. Answers are filler,
a word a token, as long as an engine's would be; a prompt counts a token for every four bytes, at least one a message.
Prefixes are cached as by vLLM, by the text that comes, see `envs.prompt_blocks`. Asked for the log-probabilities of a
chat's prompt, as judges of duels do, it finds filler likely.
A stream carries what came out since the last look, which is one token a chunk unless tokens come faster than looks.

When it is ready it prints one line of JSON: its address and the models it serves.
"""

import asyncio
import hashlib
import json
import math
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import tyro
import uvicorn

from wwwserve.agents import kernel
from wwwserve.agents.arguments import File, Range, parse_args, refuse
from wwwserve.agents.hardware import BLOCK_TOKENS, KV_BLOCKS, Profile, profile
from wwwserve.agents.lengths import Lognormal
from wwwserve.envs.emulator_api import (
    ApiError,
    Completion,
    Receive,
    Scope,
    Send,
    comes_first,
    disconnected,
    parsed,
    prompt_logprobs,
    prompt_tokens,
    read_body,
    send_answer,
    whole_number,
    words,
)
from wwwserve.envs.engine import (
    ENGINE,
    JOB,
    MAX_SLOTS,
    abort,
    advance,
    kv_use,
    reset_engine,
    reset_jobs,
    submit,
    tokens_out,
)
from wwwserve.envs.prefix_tree import PrefixTree
from wwwserve.envs.prompt_blocks import block_hashes

PROG = "wwwserve emulator"
LOOK_S = 0.002  # wall time between two looks at a busy engine


@dataclass(slots=True, eq=False)
class Job:
    """A request in the engine."""

    slot: int
    prompt: int
    output: int
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # more tokens, if it streams, or done
    streams: bool = False
    tokens: int = 0
    cached: int = 0  # tokens of the prompt, once it is done
    done: bool = False


class Emulator:
    """One engine whose clock is `speed` times as fast as the wall's."""

    def __init__(
        self, engine_profile: Profile, models: Sequence[str], *, speed: float = 1.0, max_queued: int | None = None,
        lengths: Lognormal | None = None, seed: int = 0, block_tokens: int = BLOCK_TOKENS, caches: bool = True,
        reports: bool = True,
    ) -> None:  # fmt: skip
        """`lengths` are those of answers whose end is up to the model. If it `caches` prefixes, it does so in blocks of
        `block_tokens`, a multiple of BLOCK_TOKENS, and `reports` of each answer how many tokens were cached."""
        self.profile, self.models, self.speed, self.max_queued = engine_profile, list(models), speed, max_queued
        self.lengths = lengths or Lognormal(200.0, 0.6, 1024)
        self.seed = seed
        self.engine = kernel.records(1, ENGINE)
        self.block_tokens, self.reports = block_tokens, reports
        reset_engine(self.engine[0], engine_profile.row(), block_tokens // BLOCK_TOKENS if caches else 0)
        self.prefixes = PrefixTree(self.engine[0])
        self.jobs = kernel.records(256, JOB)
        reset_jobs(self.jobs)
        self.finished = np.zeros(MAX_SLOTS + 256, np.int64)
        self.free = list(range(len(self.jobs)))
        self.running: dict[int, Job] = {}
        self.counts = {"stop": 0, "length": 0, "abort": 0}
        self.prompt_tokens = self.generation_tokens = 0
        self.started_s = time.monotonic()
        self.busy = asyncio.Event()

    @property
    def now_s(self) -> float:
        """The engine's clock, s."""
        return (time.monotonic() - self.started_s) * self.speed

    def put(self, prompt: int, output: int, streams: bool, hashes: Sequence[bytes] = ()) -> Job:
        """Hand the engine a request, whose prompt and answer have blocks of these hashes. Raises ApiError where the
        queue is full."""
        self.look()
        if self.max_queued is not None and int(self.engine[0]["waiting"]) >= self.max_queued:
            raise ApiError(
                503, f"{self.max_queued} requests are waiting already, try again later", "ServiceUnavailable"
            )
        if not self.free:
            larger = kernel.records(2 * len(self.jobs), JOB)
            reset_jobs(larger)
            larger[: len(self.jobs)] = self.jobs
            self.free = list(range(len(self.jobs), len(larger)))
            self.jobs, self.finished = larger, np.zeros(len(larger) + MAX_SLOTS, np.int64)
        slot = self.free.pop()
        reset_jobs(self.jobs[slot : slot + 1])
        self.jobs[slot]["prompt"], self.jobs[slot]["output"] = prompt, output
        self.jobs[slot]["leaf"] = self.prefixes.hang(hashes)
        submit(self.engine[0], self.prefixes.cache, self.jobs, slot, max(self.now_s, float(self.engine[0]["clock_s"])))
        job = self.running[slot] = Job(slot, prompt, output, streams=streams)
        self.busy.set()
        return job

    def withdraw(self, job: Job) -> None:
        """Nobody waits for this request any more."""
        if not job.done:
            self.look()
        if not job.done:
            abort(self.engine[0], self.prefixes.cache, self.jobs, job.slot)
            self.counts["abort"] += 1
            self._end(job)

    def look(self) -> None:
        """Bring the engine to now, and say what came out."""
        count = advance(self.engine[0], self.prefixes.cache, self.jobs, self.now_s, self.finished, 0)
        for slot in self.finished[:count].tolist():
            job = self.running[slot]
            job.tokens = job.output
            self.prompt_tokens += job.prompt
            self.generation_tokens += job.output
            self._end(job)
        for job in self.running.values():
            if job.streams:
                tokens = int(tokens_out(self.engine[0], self.jobs, job.slot))
                if tokens > job.tokens:
                    job.tokens = tokens
                    job.changed.set()

    def _end(self, job: Job) -> None:
        job.done = True
        job.cached = max(0, int(self.jobs[job.slot]["hit"]))
        self.prefixes.leave(int(self.jobs[job.slot]["leaf"]))
        job.changed.set()
        del self.running[job.slot]
        self.free.append(job.slot)

    def warm_up(self) -> None:
        """Run a request, as the first may have to be compiled. For a new emulator, which is not the same afterwards."""
        with kernel.one_at_a_time("emulator"):
            self.withdraw(self.put(1, 1000, True))
            self.metrics()

    async def run(self) -> None:
        """Look at the engine for as long as it has work."""
        while True:
            if not self.running:
                self.busy.clear()
                await self.busy.wait()
            await asyncio.sleep(LOOK_S)
            self.look()

    def metrics(self) -> str:
        """Load and totals in vLLM's names."""
        self.look()
        e = self.engine[0]
        label = f'engine="0",model_name="{self.models[0]}"'
        blocks = int(self.profile.row()[KV_BLOCKS])
        shown = [
            ("vllm:num_requests_running", "gauge", label, float(e["running"])),
            ("vllm:num_requests_waiting", "gauge", label, float(e["waiting"])),
            ("vllm:kv_cache_usage_perc", "gauge", label, float(kv_use(e))),
            ("vllm:num_preemptions_total", "counter", label, float(e["preemptions"])),
            ("vllm:prefix_cache_queries_total", "counter", label, float(e["prompt_tokens"])),
            ("vllm:prefix_cache_hits_total", "counter", label, float(e["hit_tokens"])),
            ("vllm:prompt_tokens_total", "counter", label, float(self.prompt_tokens)),
            ("vllm:generation_tokens_total", "counter", label, float(self.generation_tokens)),
            (
                "vllm:cache_config_info",
                "gauge",
                f'block_size="{self.block_tokens}",enable_prefix_caching="{bool(e["cache_unit"])}",engine="0",'
                f'num_gpu_blocks="{blocks * BLOCK_TOKENS // self.block_tokens}"',
                1.0,
            ),
        ]
        lines = []
        for name, kind, labels, value in shown:
            lines += [f"# HELP {name} of the emulated engine", f"# TYPE {name} {kind}", f"{name}{{{labels}}} {value}"]
        lines += ["# HELP vllm:request_success_total by reason", "# TYPE vllm:request_success_total counter"]
        lines += [
            f'vllm:request_success_total{{{label},finished_reason="{reason}"}} {float(count)}'
            for reason, count in self.counts.items()
        ]
        return "\n".join(lines) + "\n"

    # The API.

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            return
        route = scope["method"], scope["path"]
        try:
            if route in (("POST", "/v1/chat/completions"), ("POST", "/v1/completions")):
                await self._complete(route[1].startswith("/v1/chat"), await read_body(receive), receive, send)
            elif route == ("GET", "/v1/models"):
                await send_answer(send, 200, {"object": "list", "data": [self._model(name) for name in self.models]})
            elif route == ("GET", "/metrics"):
                await send_answer(send, 200, self.metrics().encode(), b"text/plain; version=0.0.4; charset=utf-8")
            elif route == ("GET", "/health"):
                await send_answer(send, 200, b"", b"text/plain")
            elif route == ("POST", "/tokenize"):
                request = parsed(await read_body(receive))
                count = prompt_tokens(request, "messages" in request)
                limit = self.profile.max_model_len
                await send_answer(send, 200, {"count": count, "max_model_len": limit, "tokens": list(range(count))})
            else:
                raise ApiError(404, f"no {scope['method']} {scope['path']} here", "NotFoundError")
        except ApiError as error:
            headers = [(b"retry-after", b"1")] if error.status == 503 else []
            content = {"message": str(error), "type": error.kind, "param": None, "code": error.status}
            await send_answer(send, error.status, {"error": content}, headers=headers)

    def _model(self, name: str) -> dict[str, Any]:
        made = {"id": name, "object": "model", "created": 0, "owned_by": "wwwserve"}
        return made | {"root": name, "parent": None, "max_model_len": self.profile.max_model_len}

    def _output(self, request: dict[str, Any], body: bytes, longest: int) -> int:
        """How many tokens the answer will have."""
        limit = request.get("max_completion_tokens", request.get("max_tokens"))
        most = longest if limit is None else min(whole_number(limit, "max_tokens", 1), longest)
        least = whole_number(request.get("min_tokens") or 0, "min_tokens", 0)
        if request.get("ignore_eos"):
            return most
        try:  # of what is asked alone, so that it is the same wherever a request is run
            said = orjson.dumps([request.get(name) for name in ("messages", "prompt", "seed")])
        except TypeError:  # nested deeper than orjson writes
            said = body
        digest = hashlib.sha256(self.seed.to_bytes(8, "little") + said).digest()
        z = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal()
        drawn = round(math.exp(math.log(self.lengths.median) + self.lengths.sigma * z))
        return max(1, min(max(min(drawn, self.lengths.max), least), most))

    async def _complete(self, chat: bool, body: bytes, receive: Receive, send: Send) -> None:
        request = parsed(body)
        model = request.get("model", self.models[0])
        if model not in self.models:
            raise ApiError(404, f"the model {model!r} is not served here", "NotFoundError")
        if request.get("n") not in (None, 1):
            raise ApiError(400, f"n is {request['n']!r}, expected 1")
        prompt = prompt_tokens(request, chat)
        longest = self.profile.max_model_len - prompt
        if longest < 1:
            limit = self.profile.max_model_len
            raise ApiError(400, f"the prompt has {prompt} tokens, expected fewer than {limit}, the model's length")
        output = self._output(request, body, longest)
        streams = bool(request.get("stream"))
        options = request.get("stream_options") or {}
        if not isinstance(options, dict):
            raise ApiError(400, "stream_options is not an object")
        salt = request.get("cache_salt")
        if salt is not None and not (isinstance(salt, str) and salt):
            raise ApiError(400, "cache_salt is not a non-empty string")
        hashes = block_hashes(request, chat, words(0, output), BLOCK_TOKENS) if self.engine[0]["cache_unit"] else ()
        job = self.put(prompt, output, streams, hashes)
        reason = (
            "length" if output in (request.get("max_tokens"), request.get("max_completion_tokens"), longest) else "stop"
        )
        disconnect = asyncio.ensure_future(disconnected(receive))
        reply = Completion(chat, str(model), prompt)
        try:
            if streams:
                usage = bool(options.get("include_usage"))
                await self._stream(job, reply, reason, usage, disconnect, send)
            elif await comes_first(job.changed, disconnect):
                logprobs = prompt_logprobs(request) if chat and request.get("prompt_logprobs") is not None else None
                cached = job.cached if self.reports else None
                await send_answer(send, 200, reply.whole(output, reason, cached, logprobs))
            if job.done:
                self.counts[reason] += 1
        finally:
            disconnect.cancel()
            self.withdraw(job)

    async def _stream(
        self, job: Job, reply: "Completion", reason: str, usage: bool, disconnect: "asyncio.Future[None]", send: Send
    ) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        begun, sent = False, 0
        while await comes_first(job.changed, disconnect):
            job.changed.clear()
            if not begun:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                chunks = reply.opening()
                begun = True
            else:
                chunks = b""
            chunks += reply.part(sent, job.tokens)
            sent = job.tokens
            if job.done:
                chunks += reply.closing(sent, reason, usage, job.cached if self.reports else None)
            await send({"type": "http.response.body", "body": chunks, "more_body": not job.done})
            if job.done:
                return


async def serve(emulator: Emulator, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; prints one line of JSON when ready."""
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    config = uvicorn.Config(
        emulator, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    looks = asyncio.create_task(emulator.run())
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.005)
    url = f"http://{host}:{listener.getsockname()[1]}"
    print(json.dumps({"url": url, "models": emulator.models}), flush=True)
    await serving
    looks.cancel()


def read_profile(path: Path) -> Profile:
    """A profile by field name from a JSON file. Raises ValueError for another content."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    names = {each.name for each in fields(Profile)}
    needed = {each.name for each in fields(Profile) if each.default is MISSING} - {"source"}
    if not isinstance(table, dict) or not needed <= set(table) <= names:
        raise ValueError(f"{path}: expected an object with {', '.join(sorted(needed))}")
    given: dict[str, Any] = {"source": str(path)} | table
    return Profile(**given)


@dataclass
class Args:
    """An emulated engine."""

    host: str = "127.0.0.1"
    """address to listen at"""
    port: Annotated[int, Range(0, 65535)] = 8000
    """port, 0 for any that is free"""
    gpu: str = "rtx-4090"
    """of the catalogue in agents.hardware"""
    model: str = "qwen3-8b"
    """of the same catalogue"""
    max_num_seqs: Annotated[int, Range(1, MAX_SLOTS)] = 64
    """requests at once, at most"""
    profile: File = None
    """JSON of a calibrated profile, instead of gpu and model"""
    served_model_name: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """names to answer to; default: the model's"""
    speed: Annotated[float, Range(0, 1e4, above=True)] = 1.0
    """engine seconds in a second"""
    max_num_queued_reqs: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """answer 503 beyond so many waiting; default: never"""
    output_median: float = 200.0
    """tokens of an answer"""
    output_sigma: float = 0.6
    """spread of their logarithm"""
    output_max: int = 1024
    """longest answer, tokens"""
    seed: int = 0
    """of the lengths of answers"""
    block_tokens: Annotated[int, Range(BLOCK_TOKENS, 1024)] = BLOCK_TOKENS
    """of a block of the prefix cache, a multiple of 16"""
    no_prefix_caching: bool = False
    """do not keep what was computed of prompts for others that begin alike"""
    no_prompt_tokens_details: bool = False
    """do not say in each answer how many tokens of its prompt were cached"""


def warm_up() -> None:
    """Have all compiled that an emulated engine runs."""
    Emulator(profile("rtx-4090", "qwen3-8b", 1), ("m",)).warm_up()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done."""
    try:
        args = parse_args(Args, PROG, argv)
        chosen = read_profile(args.profile) if args.profile else profile(args.gpu, args.model, args.max_num_seqs)
        if chosen.max_num_seqs > MAX_SLOTS:
            raise ValueError(f"max_num_seqs is {chosen.max_num_seqs}, expected at most {MAX_SLOTS}")
        if args.block_tokens % BLOCK_TOKENS:
            raise ValueError(f"block_tokens is {args.block_tokens}, expected a multiple of {BLOCK_TOKENS}")
        lengths = Lognormal(args.output_median, args.output_sigma, args.output_max)

        emulator, rehearsal = (
            Emulator(
                chosen, args.served_model_name or (args.model,), speed=args.speed, lengths=lengths, seed=args.seed,
                max_queued=args.max_num_queued_reqs, block_tokens=args.block_tokens, caches=not args.no_prefix_caching,
                reports=not args.no_prompt_tokens_details,
            )
            for _ in range(2)
        )  # fmt: skip
        rehearsal.warm_up()

        async def run() -> None:
            await serve(emulator, args.host, args.port)

        with asyncio.Runner(loop_factory=_loop) as runner:
            runner.run(run())
    except (ValueError, OSError) as error:
        return refuse(PROG, error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


if __name__ == "__main__":
    sys.exit(main())
