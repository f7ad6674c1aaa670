"""Probes of a running engine: streams of set lengths whose tokens are timed, and what the engine says of its limits."""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import orjson

from wwwserve.agents.hardware import BLOCK_TOKENS, CHUNK_TOKENS
from wwwserve.agents.kernel import Floats
from wwwserve.serving.engine.adapter import NAMES, EngineError, Load, read_load
from wwwserve.serving.engine.fit import CalibrationError, Sample
from wwwserve.serving.http.sse import usage_of
from wwwserve.serving.plain import in_words

PLAIN = 12  # iterations of others that are timed before one joins them, and as many after that
MARGIN = 6  # tokens that others may get while one is timed, in its tokens
MOST_SEQS = 1024  # looked for at most
SETTLE_S = 15.0  # for an engine to be done with what it has
ANSWER_S = 120.0  # without a byte, after which an engine has failed
KEPT_S = 2.0  # that a connection is kept without a request; engines close theirs after five
WORDS = (
    "amber", "birch", "cloud", "delta", "ember", "frost", "grove", "haven", "inlet", "jewel", "knoll", "lemon",
    "maple", "north", "ocean", "pearl", "quiet", "river", "stone", "tiger", "under", "vivid", "water", "young",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How to measure. Raises ValueError for what cannot be."""

    model: str | None = None
    """As the engine calls it; default: its first."""
    key: str | None = None
    """API key that the engine wants."""
    kind: str = "vllm"
    """Names of its metrics, see `serving.engine.adapter.NAMES`."""
    max_num_seqs: int | None = None
    """Requests that the engine runs at once; default: found by asking for ever more at once."""
    kv_tokens: int | None = None
    """Tokens that its KV cache holds; default: as vLLM says in `vllm:cache_config_info`."""
    max_batched_tokens: int = CHUNK_TOKENS
    """Tokens that the engine computes in one iteration at most; it does not say."""
    longest: int | None = None
    """Tokens of the longest request that is measured; default: what the engine takes. Shorter ones take less time."""
    tokens: int = 48
    """Tokens of an answer that is timed."""
    repeats: int = 3
    """Measurements of each load, of which the median is taken."""
    beside: tuple[str, ...] = ()
    """Engines that are kept busy meanwhile, as neighbours on the same machine would be."""
    beside_requests: int = 4
    """Requests that each of those has all the time."""

    def __post_init__(self) -> None:
        if self.kind not in NAMES:
            raise ValueError(f"kind is {self.kind!r}, expected one of {', '.join(NAMES)}")
        least = {
            "max_num_seqs": 2, "kv_tokens": 1024, "max_batched_tokens": 64, "longest": 256, "tokens": 8, "repeats": 1,
            "beside_requests": 1,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} is {value}, expected at least {bound}")


class Stream:
    """An answer on its way. Times are those of the prober's clock."""

    def __init__(self) -> None:
        self.sent_s = 0.0
        self.first_s = self.last_s = 0.0  # when its first and last tokens came
        self.times_s: list[float] = []  # when chunks with tokens came
        self.prompt = self.tokens = 0  # as the engine says at its end
        self.cached = 0  # of the prompt, as far as it says
        self.begun = asyncio.Event()


def joined_s(beside: Stream, joining: Stream) -> float:
    """Time of the iteration that computed the prompt of `joining`, s, as a stream `beside` it shows; NaN where that one
    shows too little.

    The tokens of `beside` lie on a line before the other came and on one after; what is between the two, less the plain
    iterations that ended there, is that of the prompt. Lines average over the moments at which tokens are seen.
    """
    times_s = np.array(beside.times_s)
    sent = int(times_s.searchsorted(joining.sent_s)) - 1
    first = int(np.abs(times_s - joining.first_s).argmin())
    if sent < PLAIN or first <= sent or times_s.size < first + 3:
        return float("nan")
    plain_s, last_s = _line(times_s[sent - PLAIN : sent + 1])
    after_s = times_s[first : first + PLAIN + 1][::-1]
    return float(_line(after_s)[1] - last_s - (first - sent - 1) * plain_s)


def _line(times_s: Floats) -> tuple[float, float]:
    """Slope of a line through times [n], s, and its value at the last."""
    slope, value = np.polyfit(np.arange(1.0 - times_s.size, 1.0), times_s, 1)
    return float(slope), float(value)


class Prober:
    """One engine that answers probes."""

    def __init__(
        self, url: str, model: str, settings: Settings, session: aiohttp.ClientSession,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.url, self.model, self.settings, self.session = url.rstrip("/"), model, settings, session
        self.clock = clock
        self.random = random.Random()  # from the system: a second run must not find the prompts of the first cached
        self.words_per_token = 1.0
        self.iteration_s = 0.0  # the last that was timed

    def words(self, tokens: int) -> str:
        """A prompt of about so many tokens that has not been seen before."""
        count = max(1, round(tokens * self.words_per_token))
        return " ".join(self.random.choice(WORDS) for _ in range(count))

    async def complete(self, prompt: str | list[int], tokens: int, stream: Stream | None = None) -> Stream:
        """One answer of exactly so many tokens. Raises CalibrationError when it is none."""
        seen = stream or Stream()
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True,
            "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        seen.sent_s = self.clock()
        try:
            async with self.session.post(f"{self.url}/v1/completions", data=orjson.dumps(body)) as response:
                if response.status != 200:
                    said = (await response.text(errors="replace"))[:300]
                    raise CalibrationError(
                        f"{self.url}/v1/completions answers {response.status} to a probe with ignore_eos, min_tokens "
                        f"and stream_options: {said}"
                    )
                async for line in response.content:
                    if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                        self._take(orjson.loads(line[6:]), seen)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise CalibrationError(f"{self.url}/v1/completions: {in_words(error)}") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CalibrationError(f"{self.url} does not stream as the OpenAI API does: {error!r}") from None
        if not seen.tokens or not len(seen.times_s):
            raise CalibrationError(f"{self.url} ends a stream without tokens, or does not say how many there were")
        if seen.tokens != tokens:
            raise CalibrationError(
                f"{self.url} gives {seen.tokens} tokens for {tokens}: it ignores ignore_eos or min_tokens"
            )
        return seen

    def _take(self, event: Any, seen: Stream) -> None:
        if event.get("error"):
            raise CalibrationError(f"{self.url} ends a stream with an error: {str(event['error'])[:300]}")
        if event["choices"]:
            choice = event["choices"][0]
            seen.last_s = self.clock()
            if choice["text"] or not choice.get("finish_reason"):  # a token need not make text yet
                seen.times_s.append(seen.last_s)
                if not seen.begun.is_set():
                    seen.first_s = seen.last_s
                    seen.begun.set()
        if event.get("usage"):
            usage = usage_of(event)
            if usage is None:
                raise CalibrationError(f"{self.url} tells of a usage that cannot be: {event['usage']!r}")
            seen.prompt, seen.tokens, seen.cached = usage.prompt, usage.output, usage.cached or 0

    async def learn_words(self) -> None:
        """How many words make a token; the engine's first answers, which may be slow, are not timed."""
        words = self.words(128).split()
        seen = await self.complete(" ".join(words), 8)
        self.words_per_token = len(words) / seen.prompt

    async def prefill(self, prompt: int, cached: int = 0) -> Sample:
        """Time to first token of a prompt alone, of which `cached` tokens were computed just before."""
        text = self.words(prompt)
        if cached:
            before = self.words(cached)
            await self.complete(before, 1)
            text = f"{before} {text}"
        seen = await self.complete(text, 1)
        return Sample(0.0, 0.0, seen.prompt - seen.cached, seen.first_s - seen.sent_s, cached=seen.cached)

    @asynccontextmanager
    async def others(self, count: int, prompt: int, tokens: int) -> AsyncIterator[list[Stream]]:
        """So many streams that all decode; they are given up at the end."""
        streams = [Stream() for _ in range(count)]
        # Always the same prompts, and their beginnings: the engine may have them cached, as they are not timed.
        count_words = max(1, round(prompt * self.words_per_token))
        texts = [" ".join(random.Random(k).choices(WORDS, k=count_words)) for k in range(count)]
        tasks = [
            asyncio.create_task(self.complete(text, tokens, stream))
            for text, stream in zip(texts, streams, strict=True)
        ]
        try:
            while not all(stream.begun.is_set() for stream in streams):
                await asyncio.sleep(0.005)
                for task in tasks:
                    if task.done():
                        task.result()
            yield streams
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def decode(self, decoding: int, prompt: int) -> tuple[Sample, Sample]:
        """Time of an iteration that decodes so many streams, each of about `prompt` tokens of context, and the time to
        the first token of the last that came."""
        tokens = self.settings.tokens
        async with self.others(decoding - 1, prompt, MARGIN * tokens) as streams:
            # Only now that all have begun: before, iterations computed the prompts of some of them.
            enough = len(streams[0].times_s) + PLAIN + 1 if streams else 0
            while streams and len(streams[0].times_s) < enough:
                await asyncio.sleep(0.005)
            # Somewhere within an iteration of theirs, as a user's request would come.
            await asyncio.sleep(self.random.random() * self.iteration_s)
            before = [len(stream.times_s) for stream in streams]
            seen = await self.complete(self.words(prompt), tokens)
            after = [len(stream.times_s) for stream in streams]
            if any(stream.tokens for stream in streams):
                raise CalibrationError(f"{self.url}: a stream ended while another was timed")
        self.iteration_s = (seen.last_s - seen.first_s) / (tokens - 1)
        per_chunk = tokens / len(seen.times_s)
        then = [seen.prompt + per_chunk * chunks for chunks in before]  # their contexts
        context = sum(then) + per_chunk * (sum(after) - sum(before)) / 2 + seen.prompt + tokens / 2
        return (
            Sample(decoding, context, 0.0, self.iteration_s),
            Sample(decoding - 1, sum(then) + decoding - 1, seen.prompt, joined_s(streams[0], seen) if streams else 0.0),
        )

    async def load(self, count: int, tokens: int) -> None:
        """Keep the engine busy with so many requests until cancelled."""

        async def one() -> None:
            while True:
                await self.complete(self.words(64), tokens)

        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(one())


class Limits(NamedTuple):
    """What an engine takes."""

    kv_tokens: int
    max_num_seqs: int
    max_model_len: int


def connected(settings: Settings) -> aiohttp.ClientSession:
    """A session for probes."""
    headers = {"content-type": "application/json"}
    headers |= {"authorization": f"Bearer {settings.key}"} if settings.key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=ANSWER_S)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_S)
    return aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout)


async def get(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(url) as response:
            if response.status != 200:
                raise CalibrationError(f"{url} answers {response.status}")
            return await response.text(errors="replace")
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise CalibrationError(f"{url}: {in_words(error)}") from None


async def find_model(session: aiohttp.ClientSession, url: str, name: str | None) -> tuple[str, int]:
    """Name and length of the model, the first where none is named. Raises CalibrationError."""
    if not url.startswith(("http://", "https://")):
        raise CalibrationError(f"{url}/v1/models is no URL, expected http://HOST:PORT of an engine")
    page = await get(session, f"{url}/v1/models")
    try:
        listed = {str(each["id"]): each for each in orjson.loads(page)["data"]}
        found = name or next(iter(listed))
    except (ValueError, KeyError, TypeError, StopIteration):
        raise CalibrationError(f"{url}/v1/models does not list models: expected the URL of an engine") from None
    if found not in listed:
        raise CalibrationError(f"{url} has no model {found!r}, it has {', '.join(listed)}")
    try:
        return found, int(listed[found]["max_model_len"])
    except (ValueError, KeyError, TypeError):
        raise CalibrationError(
            f"{url}/v1/models says of {found!r} no max_model_len, as vLLM and SGLang do: expected the URL of an engine "
            "itself, not that of a node or a router"
        ) from None


def kv_tokens_of(page: str, url: str) -> int:
    """Tokens of KV cache by `vllm:cache_config_info` on a page of metrics, summed over its engines. Raises
    CalibrationError for a page without it."""
    total = 0
    for line in page.splitlines():
        if line.startswith("vllm:cache_config_info{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            try:
                total += int(labels["num_gpu_blocks"]) * int(labels["block_size"])
            except (KeyError, ValueError):
                raise CalibrationError(f"{url}/metrics has a vllm:cache_config_info without num_gpu_blocks") from None
    if total < BLOCK_TOKENS:
        raise CalibrationError(f"{url}/metrics says nothing of the KV cache in vllm:cache_config_info; say --kv-tokens")
    return total


async def _load(prober: Prober) -> Load:
    """Its requests that run and wait. Raises CalibrationError."""
    page = await get(prober.session, f"{prober.url}/metrics")
    try:
        return read_load(page, NAMES[prober.settings.kind], 1)
    except EngineError as error:
        raise CalibrationError(f"{prober.url}/metrics: {error}") from None


async def settle(prober: Prober) -> None:
    """Until the engine has nothing to do. Raises CalibrationError if that takes longer than `SETTLE_S`."""
    until_s = prober.clock() + SETTLE_S
    while (load := await _load(prober)).running + load.waiting > 0:
        if prober.clock() > until_s:
            count = load.running + load.waiting
            raise CalibrationError(
                f"{prober.url} has {count:.0f} requests of others; it should have nothing else to do"
            )
        await asyncio.sleep(0.1)


async def find_max_num_seqs(prober: Prober, max_model_len: int) -> int:
    """How many requests the engine runs at once: ever more are asked for until some wait. Raises CalibrationError."""
    count = 8
    while count <= MOST_SEQS:
        tokens = min(1024, max_model_len - 32)
        tasks = [asyncio.create_task(prober.complete(prober.words(8), tokens)) for _ in range(count)]
        try:
            seen: tuple[float, float] | None = None
            while True:
                await asyncio.sleep(0.25)
                for task in tasks:
                    if task.done():
                        task.result()
                load = await _load(prober)
                # The share of its KV cache differs from one iteration to the next.
                if load.running + load.waiting >= count and (load.running, load.waiting) == seen:
                    break
                if all(task.done() for task in tasks):
                    raise CalibrationError(
                        f"{prober.url} has answered {count} requests before {prober.url}/metrics showed twice that it "
                        "had them all; say --max-num-seqs"
                    )
                seen = load.running, load.waiting
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if load.waiting:
            return int(load.running)
        count *= 2
    raise CalibrationError(f"{prober.url} runs {MOST_SEQS} requests at once and more; say --max-num-seqs")
