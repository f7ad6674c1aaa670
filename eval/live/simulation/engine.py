"""An engine on virtual time: `serving.engine.adapter.Engine` as far as a node can tell, `envs.engine` underneath.

An `EngineServer` outlives the nodes that use it. It sets one timer, for the moment at which its next request finishes,
and one more for the next look at its streams while there are any; nothing is done for a token. A request says how long
its answer will be, `min_tokens` or, with `ignore_eos`, `max_tokens`, and its prompt has a token for every four bytes.
Prefixes are cached by the text that comes, as by the emulator, see `envs.prompt_blocks`.
"""

import asyncio
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from wwwserve.agents.hardware import BLOCK_TOKENS, KV_BLOCKS, Profile
from wwwserve.agents.kernel import Ints, Records, kernel, records
from wwwserve.envs.engine import (
    ENGINE,
    JOB,
    MAX_SLOTS,
    NEVER,
    abort,
    advance,
    prefill_tokens,
    reset_engine,
    reset_jobs,
    submit,
    tokens_out,
)
from wwwserve.envs.prefix_cache import CACHED, NO_CACHE, Cache, clear, reuse_s
from wwwserve.envs.prefix_tree import PrefixTree
from wwwserve.envs.prompt_blocks import block_hashes
from wwwserve.eval.live.simulation.loop import VirtualLoop, current
from wwwserve.eval.live.simulation.response import Incoming
from wwwserve.serving.engine.adapter import DOWN_WAITING, NO_HEADERS, Availability, EngineError, Load, Sent

BYTES_PER_TOKEN = 4
TEXT = "tok "  # of one token
SLACK_S = 1e-9  # far above a rounding error of the clock, far below an iteration
EVENTS = b"text/event-stream; charset=utf-8"
JSON = b"application/json"

Octets = NDArray[np.uint8]


class Held(NamedTuple):
    """An engine, its requests and its cache as bytes, to be copied."""

    engine: Octets
    jobs: Octets
    cached: Octets


@kernel
def _copy(to: Octets, of: Octets) -> None:
    for k in range(of.size):
        to[k] = of[k]


@kernel
def _copy_all(to: Held, of: Held) -> None:
    _copy(to.engine, of.engine)
    _copy(to.jobs, of.jobs)
    _copy(to.cached, of.cached)


@kernel
def _find_finish(
    e: Records, now: Held, then: Records, then_q: Records, then_cache: Cache, then_bytes: Held, done: Ints
) -> tuple[float, int]:  # fmt: skip
    """Bring `then`, a copy of the engine, to the moment at which its next request finishes.

    Returns that moment, s, and how many finish, which are in `done`; infinity and 0 if none ever does.

    The run is not split anywhere, since where an engine is stopped shows in the last bits of its clock.
    """
    span_s = 1.0
    while span_s < 1e9:
        _copy_all(then_bytes, now)
        count = advance(then[0], then_cache, then_q, e[0].clock_s + span_s, done, 0)
        if count > 0:
            at_s = np.inf
            for k in range(count):
                at_s = min(at_s, then_q[done[k]].finish_s)
            _copy_all(then_bytes, now)
            count = advance(then[0], then_cache, then_q, at_s + SLACK_S, done, 0)
            if then[0].running == 0 and then[0].clock_s > at_s:  # an idle engine waits until it is told
                then[0].clock_s = at_s
            return at_s, count
        span_s *= 4.0
    return np.inf, 0


@kernel
def _look(
    now: Held, then: Records, then_q: Records, then_cache: Cache, then_bytes: Held, now_s: float, done: Ints,
    tokens: Ints,
) -> None:  # fmt: skip
    """Bring `then`, a copy of the engine, to `now_s`, and put into `tokens` what each request has generated."""
    _copy_all(then_bytes, now)
    advance(then[0], then_cache, then_q, now_s, done, 0)
    for r in range(tokens.size):
        tokens[r] = tokens_out(then[0], then_q, r)


class _State:
    """An engine, its requests, and what it has cached of a tree of prefixes."""

    def __init__(self, capacity: int, cache: Cache) -> None:
        self.engine, self.jobs = records(1, ENGINE), records(capacity, JOB)
        reset_jobs(self.jobs)
        self.keep(cache)

    def keep(self, cache: Cache) -> None:
        """Have this record of what is cached."""
        self.cache = cache
        self.bytes = Held(_bytes(self.engine), _bytes(self.jobs), _bytes(cache.cached))

    def take(self, other: "_State") -> None:
        """Be as the other one is, which may have room for fewer requests."""
        for mine, theirs in zip(self.bytes, other.bytes, strict=True):
            mine[: theirs.size] = theirs


def _bytes(array: Records) -> Octets:
    return array.view(np.ndarray).view(np.uint8).reshape(-1)


class Finish(NamedTuple):
    """The next moment at which requests finish."""

    at_s: float
    slots: tuple[int, ...]


class EngineServer:
    """The engine behind its API: what is posted starts at once."""

    def __init__(
        self, loop: VirtualLoop, profile: Profile, models: Sequence[str], *, look_s: float = 1.0, lag_s: float = 0.0,
        ahead_s: float = 0.0, max_queued: int | None = None, look_at_all: bool = True, block_tokens: int = 0,
    ) -> None:  # fmt: skip
        """A stream's events come with its end and at looks. The kth look shows what is out at `k look_s - lag_s`, and
        is sent `ahead_s` before that; unless `look_at_all`, only a stream that asks for usage, as one that is handed
        over for pay does, is looked at. Beyond `max_queued` waiting requests the engine answers 503. Prefixes are
        cached in blocks of `block_tokens`, a multiple of BLOCK_TOKENS; 0 for not at all."""
        self.loop, self.profile, self.models = loop, profile, list(models)
        self.look_s, self.lag_s, self.ahead_s, self.max_queued = look_s, lag_s, ahead_s, max_queued
        self.look_at_all = look_at_all
        self.longest = min(profile.max_model_len, profile.kv_tokens)  # prompt and answer, tokens
        self.up = True
        self.answers = 200  # the status of every response; one that is no 200 is an engine's error
        self.finished = self.aborted = 0
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0  # of those finished
        self.caches = block_tokens > 0
        self._capacity = 64
        self._now, self._then, self._seen = (_State(self._capacity, NO_CACHE) for _ in range(3))
        reset_engine(self._now.engine[0], profile.row(), block_tokens // BLOCK_TOKENS)
        self._prefixes = PrefixTree(self._now.engine[0])
        self._hold(self._capacity)
        if self.caches:
            self._share_tree()
        self._running: dict[int, Answer] = {}
        self._streams = 0  # of them
        self._finish = Finish(math.inf, ())
        self._finish_timer: asyncio.TimerHandle | None = None
        self._look_timer: asyncio.TimerHandle | None = None
        self._looks = 0  # number of the last one
        self._looked: tuple[float, Load] | None = None  # at what time, and what was seen

    def _hold(self, capacity: int) -> None:
        self._free = list(range(capacity - 1, -1, -1))
        self._tokens, self._done = np.zeros(capacity, np.int64), np.zeros(capacity + MAX_SLOTS, np.int64)
        self._shown = np.full(capacity, NEVER)  # tokens of each stream; of all else, more than there will be

    def _share_tree(self) -> None:
        """Let all three states have the tree of prefixes as it is now, the present one with what is cached."""
        cache = self._prefixes.cache
        self._now.keep(cache)
        for state in (self._then, self._seen):
            state.keep(Cache(cache.tree, records(cache.cached.size, CACHED)))

    # What it is at.

    def load(self) -> Load:
        """At this instant, exactly."""
        now_s = self.loop.time()
        if self._looked is None or self._looked[0] != now_s:
            self._see(now_s)
            e = self._seen.engine[0]
            used = (int(e["profile"][KV_BLOCKS]) - int(e["free_blocks"])) * BLOCK_TOKENS
            self._looked = (
                now_s,
                Load(float(e["running"]), float(e["waiting"]), float(used), float(prefill_tokens(e, self._seen.jobs))),
            )
        return self._looked[1]

    def progress(self) -> list[tuple["Answer", int]]:
        """The requests that run at this instant, and how many tokens of each are generated."""
        self.load()
        engine = self._seen.engine[0]
        slots = engine["slots"][: int(engine["running"])].tolist()
        return [(self._running[slot], int(self._tokens[slot])) for slot in slots]

    @property
    def running(self) -> int:
        """Requests that it has, waiting ones as well."""
        return len(self._running)

    def _see(self, now_s: float) -> None:
        of, to = (self._then if self._finish.at_s <= now_s else self._now), self._seen
        _look(of.bytes, to.engine, to.jobs, to.cache, to.bytes, now_s, self._done, self._tokens)

    def cached(self, hashes: Sequence[bytes], prompt: int) -> int:
        """Tokens that are cached at this instant of a prompt of `prompt` tokens, whose blocks have these hashes."""
        self.load()
        return self._prefixes.find(self._seen.engine[0], self._seen.cache, hashes, prompt) if self.caches else 0

    def reuse_s(self) -> float:
        """How long a block that is not used is kept, s."""
        self.load()
        return float(reuse_s(self._seen.engine[0], self._seen.cache, self.loop.time()))

    def hit(self, slot: int) -> int:
        """Tokens of a prompt that were found in the cache."""
        return max(0, int(self._now.jobs[slot]["hit"]))

    # What comes and goes.

    def post(self, path: str, body: bytes) -> "Answer":
        """A request, and its response."""
        return Answer(self, path, body)

    def put(self, answer: "Answer") -> None:
        """A request arrives. Its time is now."""
        self._catch_up()
        if not self._free:
            old, shown, self._capacity = self._now, self._shown, 2 * self._capacity
            self._now, self._then, self._seen = (
                _State(self._capacity, each.cache) for each in (old, self._then, self._seen)
            )
            self._hold(self._capacity)
            self._now.take(old)
            self._prefixes.engine = self._now.engine[0]
            self._shown[: shown.size] = shown
            self._free = list(range(self._capacity - 1, self._capacity // 2 - 1, -1))
        slot = answer.slot = self._free.pop()
        jobs, now_s = self._now.jobs, self.loop.time()
        reset_jobs(jobs[slot : slot + 1])
        jobs[slot]["prompt"], jobs[slot]["output"] = answer.prompt, answer.output
        if self.caches:
            # What of it is cached, as it comes, is counted by the cache as it is now.
            count = advance(self._now.engine[0], self._now.cache, jobs, now_s, self._done, 0)
            self._end(self._done[:count].tolist())  # in the last bit
            jobs[slot]["leaf"] = self._prefixes.hang(answer.hashes)
            if self._prefixes.cache is not self._now.cache:
                self._share_tree()
        submit(self._now.engine[0], self._now.cache, jobs, slot, now_s)
        self._running[slot] = answer
        if answer.looked_at:
            self._streams += 1
            self._shown[slot] = 0
            if self._look_timer is None:
                self._set_look()
        self._plan()

    def withdraw(self, answer: "Answer") -> None:
        """Nobody waits for it any more."""
        self._catch_up()
        if self._running.get(answer.slot) is not answer:
            return
        engine, cache, jobs = self._now.engine[0], self._now.cache, self._now.jobs
        count = advance(engine, cache, jobs, self.loop.time(), self._done, 0)
        self._end(self._done[:count].tolist())  # in the last bit
        if abort(engine, cache, jobs, answer.slot):
            self.aborted += 1
            self._forget(answer)
        self._plan()

    def crash(self) -> None:
        """It dies: what runs breaks off, and nobody is there until `restart`."""
        self._catch_up()
        self.up = False
        for answer in list(self._running.values()):
            abort(self._now.engine[0], self._now.cache, self._now.jobs, answer.slot)
            self._forget(answer)
            answer.fail(ConnectionResetError("the engine died"))
        clear(self._now.engine[0], self._now.cache)
        self._plan()

    def restart(self) -> None:
        """It is there again, empty."""
        self.up = True

    def _forget(self, answer: "Answer") -> None:
        del self._running[answer.slot]
        answer.cached = self.hit(answer.slot)
        self._prefixes.leave(int(self._now.jobs[answer.slot]["leaf"]))
        if answer.looked_at:
            self._streams -= 1
            self._shown[answer.slot] = NEVER
        self._free.append(answer.slot)

    def _plan(self) -> None:
        """Find the next finish from how things are now, and set the timer for it."""
        self._looked = None
        if self._finish_timer is not None:
            self._finish_timer.cancel()
            self._finish_timer = None
        self._finish = Finish(math.inf, ())
        if self._running:
            now, then = self._now, self._then
            at_s, count = _find_finish(
                now.engine, now.bytes, then.engine, then.jobs, then.cache, then.bytes, self._done
            )
            if count == 0:
                raise RuntimeError(f"none of {len(self._running)} requests ever finishes")
            self._finish = Finish(float(at_s), tuple(self._done[:count].tolist()))
            self._finish_timer = self.loop.call_at(self._finish.at_s, self._catch_up)

    def _catch_up(self) -> None:
        """Let happen what is due."""
        while self._finish.at_s <= self.loop.time():
            finish = self._finish
            self._now, self._then = self._then, self._now
            self._prefixes.engine = self._now.engine[0]
            if self.caches:
                self._prefixes.cache = self._now.cache
            self._end(finish.slots)
            self._plan()

    def _end(self, slots: Sequence[int]) -> None:
        """These requests have all of their tokens."""
        for slot in slots:
            answer = self._running[slot]
            self._forget(answer)
            self.finished += 1
            self.prompt_tokens += answer.prompt
            self.cached_tokens += answer.cached
            self.output_tokens += answer.output
            answer.show(answer.output, last=True)

    def _set_look(self) -> None:
        """Look at the next instant that is not yet due, and at none twice."""
        due = math.floor((self.loop.time() + self.lag_s + self.ahead_s) / self.look_s) + 1
        self._looks = max(due, self._looks + 1)
        at_s = self._looks * self.look_s - self.lag_s
        self._look_timer = self.loop.call_at(at_s - self.ahead_s, self._look_at_streams, at_s)

    def _look_at_streams(self, at_s: float) -> None:
        self._look_timer = None
        self._catch_up()
        if self._streams:
            self._see(at_s)
            for slot in np.flatnonzero(self._tokens > self._shown).tolist():
                self._shown[slot] = self._tokens[slot]
                self._running[slot].show(int(self._tokens[slot]), last=False)
            self._set_look()


class Answer(Incoming):
    """A request to an engine and its response: a context that gives the response.

    The head of a stream is there at once, that of another response with its body. Leaving it early aborts.
    """

    def __init__(self, server: EngineServer, path: str, body: bytes) -> None:
        super().__init__(server.loop)
        self.server, self.path, self.body = server, path, body
        self.slot = -1
        self.prompt = self.output = 0
        self.cached = 0  # of the prompt, once it is done
        self.hashes: Sequence[bytes] = ()  # of the blocks of prompt and answer
        self.streams = self.looked_at = False
        self._shown = 0  # tokens

    async def __aenter__(self) -> "Answer":
        """The response. Raises OSError."""
        server, process = self.server, current()
        if not server.up or (process is not None and not process.alive):
            raise ConnectionRefusedError("the engine is down")
        if server.answers != 200:
            self._whole(server.answers, _error("so it was told", server.answers))
        elif server.max_queued is not None and server.load().waiting >= server.max_queued:
            self._whole(503, _error(f"{server.max_queued} requests are waiting already", 503))
        else:
            self._begin()
        try:
            await self.wait_for_head()
        except BaseException:
            self.close()
            raise
        return self

    def _begin(self) -> None:
        server = self.server
        try:
            request = orjson.loads(self.body)
            self.prompt, self.output, self.streams = _read(request, server.longest)
        except (ValueError, KeyError, TypeError) as error:
            self._whole(400, _error(f"{type(error).__name__}: {error}", 400))
            return
        if server.caches:
            chat = self.path.endswith("/chat/completions")
            self.hashes = block_hashes(request, chat, TEXT * self.output, BLOCK_TOKENS)
        if self.streams:
            options = request.get("stream_options") or {}
            self.looked_at = server.look_at_all or bool(options.get("include_usage"))
            self.begin(200, [(b"content-type", EVENTS)])
        server.put(self)

    def close(self) -> None:
        """Hang up."""
        if not self.ended and self.error is None and self.slot >= 0:
            self.server.withdraw(self)
        self.unread.clear()
        self.ended = False
        self.fail(ConnectionAbortedError("the connection was closed"))

    def show(self, tokens: int, *, last: bool) -> None:
        """So many tokens are out."""
        if not self.streams:
            if last:
                self._whole(200, orjson.dumps(self._answer(TEXT * tokens, "length") | {"usage": self._usage(tokens)}))
        elif tokens > self._shown or last:
            event = self._answer(TEXT * (tokens - self._shown), "length" if last else None)
            end = b"\n\ndata: [DONE]\n\n" if last else b"\n\n"
            self._shown = tokens
            self.add(b"data: " + orjson.dumps(event | {"usage": self._usage(tokens)}) + end, last)

    def _answer(self, text: str, reason: str | None) -> dict[str, Any]:
        if not self.path.endswith("/chat/completions"):
            content: dict[str, Any] = {"text": text}
        elif self.streams:
            content = {"delta": {"content": text}}
        else:
            content = {"message": {"role": "assistant", "content": text}}
        return {"id": "simulated", "choices": [content | {"index": 0, "finish_reason": reason}]}

    def _usage(self, tokens: int) -> dict[str, Any]:
        counts = {"prompt_tokens": self.prompt, "completion_tokens": tokens, "total_tokens": self.prompt + tokens}
        return counts | ({"prompt_tokens_details": {"cached_tokens": self.cached}} if self.server.caches else {})

    def _whole(self, status: int, body: bytes) -> None:
        self.begin(status, [(b"content-type", JSON), (b"content-length", b"%d" % len(body))])
        self.add(body, True)


class Server(Protocol):
    """An engine on virtual time, which outlives the nodes that use it."""

    up: bool

    @property
    def models(self) -> Sequence[str]:
        """What it serves."""

    def load(self) -> Load:
        """What it has to do."""

    def post(self, path: str, body: bytes, /) -> AbstractAsyncContextManager[Any]:
        """Send it a request."""


class VirtualEngine(Availability):
    """The `serving.engine.adapter.Engine` of one run of a node, whose load is always exact; all but `progress`."""

    URL = "http://engine.simulated"

    def __init__(self, server: Server, profile: Profile, url: str = URL) -> None:
        super().__init__()
        self._server, self.profile, self.url = server, profile, url

    async def scrape(self) -> None:
        """See `serving.engine.adapter.Engine`."""
        self._reach()
        self.failures, self.reason = 0, ""

    async def models(self) -> list[str]:
        """See `serving.engine.adapter.Engine`."""
        self._reach()
        return list(self._server.models)

    def _reach(self) -> None:
        if not self._server.up:
            self.failures, self.reason = self.failures + 1, "the engine is down"
            raise EngineError(self.reason)

    def load(self) -> Load:
        """See `serving.engine.adapter.Engine`."""
        if not self.takes:
            return Load(float(self.profile.max_num_seqs), DOWN_WAITING, float(self.profile.kv_tokens))
        return self._server.load()

    def sent(self, prompt: int) -> None:
        """See `serving.engine.adapter.Engine`."""
        self.out += 1

    def returned(self, prompt: int, output: int) -> None:
        """See `serving.engine.adapter.Engine`."""
        self.out -= 1

    def post(self, path: str, body: bytes, headers: Mapping[str, str] = NO_HEADERS) -> AbstractAsyncContextManager[Any]:
        """See `serving.engine.adapter.Engine`."""
        return self._server.post(path, body)


class SimulatedEngine(VirtualEngine):
    """Before an `EngineServer`."""

    def __init__(self, server: EngineServer, url: str = VirtualEngine.URL) -> None:
        super().__init__(server, server.profile, url)
        self.server = server

    def progress(self, there: Collection[Sent], now_s: float) -> Iterator[tuple[Sent, float]]:
        """See `serving.engine.adapter.Engine`; exact, whether an answer is streamed or not."""
        by_answer = {id(sent.exchange): sent for sent in there}
        for answer, tokens in self.server.progress():
            sent = by_answer.get(id(answer))
            if sent is not None:
                yield sent, float(tokens)


def _read(request: Mapping[str, Any], longest: int) -> tuple[int, int, bool]:
    """Prompt and output tokens of a request, cut to what the engine can hold, and whether it streams.

    Raises ValueError, KeyError and TypeError for what is no such request.
    """
    most = request["max_completion_tokens"] if "max_completion_tokens" in request else request["max_tokens"]
    if not isinstance(most, int) or most < 1:
        raise ValueError(f"max_tokens is {most!r}, expected a positive integer")
    output = most if request.get("ignore_eos") is True else request.get("min_tokens")
    if not isinstance(output, int) or not 1 <= output <= most:
        raise ValueError("neither ignore_eos nor min_tokens says how long the answer will be")
    if "messages" in request:
        size = sum(len(message["content"].encode()) for message in request["messages"])
    else:
        size = len(request["prompt"].encode())
    prompt = min(max(1, math.ceil(size / BYTES_PER_TOKEN)), longest - 1)
    return prompt, min(output, longest - prompt), bool(request.get("stream"))


def _error(message: str, status: int) -> bytes:
    return orjson.dumps({"error": {"message": message, "type": "engine_error", "param": None, "code": status}})
