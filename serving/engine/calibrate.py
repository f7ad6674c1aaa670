"""Measure what a running engine can do: the coefficients of `agents.hardware.Profile`, from its answers' times.

Two kinds of probe, with prompts of words drawn anew so that no prefix is cached:

- A prompt alone, of which the time to first token is one iteration with prefill, and what the way to the engine adds.
- A stream that joins others: between its first token and its last, every iteration decodes all of them. How many tokens
  it got is told at its end; dividing gives the time of an iteration. The one that computed its prompt is where the
  others' tokens were longer apart.

All loads are measured in turn, several times over, and of each the median is taken, so that what disturbs the engine
for a while disturbs one measurement of each. The coefficients are nonnegative, with the least relative errors, in which
loads far off count less than squared. Errors are those of a fit for which some loads in between were held out, and tell
how far off it is where it was not made; the profile is a fit to all loads.
"""

import asyncio
import random
import re
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import orjson
import yaml

from wwwserve.agents.hardware import BLOCK_TOKENS, CHUNK_TOKENS, KNOTS, Profile, iteration_s
from wwwserve.agents.kernel import Bools, Floats
from wwwserve.serving.config import MeasuredProfile
from wwwserve.serving.engine.adapter import NAMES, EngineError, Load, read_load

FLOOR = 1e-12  # s; a profile has no zeros
CLOSE = 0.02  # relative error from which on it counts as such, no longer squared
PLAIN = 8  # iterations of others that are timed before one joins them
MARGIN = 6  # tokens that others may get while one is timed, in its tokens
MOST_SEQS = 1024  # looked for at most
SETTLE_S = 15.0  # for an engine to be done with what it has
ANSWER_S = 120.0  # without a byte, after which an engine has failed
KEPT_S = 2.0  # that a connection is kept without a request; engines close theirs after five
WORDS = (
    "amber", "birch", "cloud", "delta", "ember", "frost", "grove", "haven", "inlet", "jewel", "knoll", "lemon",
    "maple", "north", "ocean", "pearl", "quiet", "river", "stone", "tiger", "under", "vivid", "water", "young",
)  # fmt: skip

Say = Callable[[str], None]


class CalibrationError(RuntimeError):
    """The engine cannot be measured; the message says why."""


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


class Sample(NamedTuple):
    """A measured load."""

    decoding: float  # sequences that decode all the while, or that a prompt joins
    kv_tokens: float  # their context, in total and on average
    prefill_tokens: float  # the prompt that was computed; 0 where iterations without prefill were timed
    time_s: float  # of an iteration; of a prompt alone, to the first token
    held_out: bool = False  # not fitted


class Errors(NamedTuple):
    """Relative errors of a fit, over so many loads."""

    loads: int
    mean: float
    p90: float


class Calibration(NamedTuple):
    """What was found."""

    url: str
    model: str
    profile: Profile
    overhead_s: float  # of a request, beside the engine's iterations: to the engine, tokens of its words, and back
    errors: dict[str, Errors]  # by kind of load, fitted and held out
    samples: list[Sample]

    def yaml(self) -> str:
        """The engine as node.yaml has it, with its profile."""
        engine = {"url": self.url, "profile": {"kind": "measured", **measured(self.profile)}}
        return yaml.safe_dump({"engine": engine}, sort_keys=False, width=120)

    def json(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "url": self.url, "model": self.model, "profile": measured(self.profile), "overhead_s": self.overhead_s,
            "errors": {name: each._asdict() for name, each in self.errors.items()},
            "samples": [sample._asdict() for sample in self.samples],
        }  # fmt: skip

    def report(self) -> str:
        """The errors in words."""
        lines = [f"{name:<31}{e.loads:3d} loads, relative error mean {e.mean:6.1%}, p90 {e.p90:6.1%}"
                 for name, e in self.errors.items()]  # fmt: skip
        return "\n".join(
            [*lines, f"beside iterations, a request takes {self.overhead_s * 1e3:.1f} ms; not in the profile"]
        )


def measured(profile: Profile) -> dict[str, Any]:
    """A profile as node.yaml has it, its times rounded to five digits."""
    values = {name: getattr(profile, name) for name in MeasuredProfile.__struct_fields__}
    rounded = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in values.items()}
    return rounded | {"batch_s": [float(f"{each:.3g}") for each in profile.batch_s]}


# The fit.


def nonnegative(columns: Floats, target: Floats) -> Floats:
    """The x of no negative element with the least |columns x - target|² (Lawson and Hanson's active sets)."""
    scale = np.maximum(np.sqrt((columns**2).sum(axis=0)), FLOOR)
    scaled = columns / scale
    found = np.zeros(scaled.shape[1])
    free = np.zeros(len(found), bool)
    for _ in range(10 * len(found)):
        gradient = np.where(free, 0.0, scaled.T @ (target - scaled @ found))
        if gradient.max() <= 1e-10 * max(1.0, float(np.abs(target).max())):
            break
        free[gradient.argmax()] = True
        while True:
            best = np.zeros(len(found))
            best[free] = np.linalg.lstsq(scaled[:, free], target, rcond=None)[0]
            below = free & (best <= 0)
            if not below.any():
                break
            step = float((found[below] / (found[below] - best[below])).min())
            found += step * (best - found)
            free &= found > 1e-15
            found[~free] = 0.0
        found = best
    made: Floats = found / scale
    return made


def robust(columns: Floats, target: Floats) -> Floats:
    """As `nonnegative`, with errors beyond `CLOSE` counted as they are: least squares, weighted anew until it is so."""
    weights = np.ones(len(target))
    for _ in range(20):
        found = nonnegative(columns * weights[:, None], target * weights)
        weights = np.maximum(np.abs(columns @ found - target), CLOSE) ** -0.5
    return found


class Fit(NamedTuple):
    """Coefficients of `agents.hardware`, and what a request takes beside iterations, s."""

    coefficients: tuple[float, float, float, float, float]  # the first five
    seq_tokens: float
    per_pair_s: float
    overhead_s: float
    batch_s: tuple[float, ...] = ()

    def times_s(self, rows: Floats) -> Floats:
        """Of iterations [n, (decoding, KV tokens, prompt, ...)]; where nothing decodes, of first tokens."""
        five = np.array(self.coefficients)
        found = []
        for decoding, kv_tokens, prompt in rows[:, :3].tolist():
            pairs_s = self.per_pair_s * prompt * prompt / 2
            time_s = iteration_s(five, decoding, kv_tokens, prompt, self.seq_tokens, pairs_s)
            if prompt == 0 and self.batch_s:
                time_s += float(np.interp(decoding, 2.0 ** np.arange(len(self.batch_s)), self.batch_s))
            found.append(time_s + self.overhead_s * (decoding == 0))
        return np.array(found)


def fit(samples: Sequence[Sample]) -> Fit:
    """The fit to the loads that are not held out.

    Which prompts are short enough to hide under the weight read is found by trying, from each length on. Raises
    CalibrationError where there are not two numbers of requests that decode at once, and two lengths of prompt.
    """
    rows = np.array([sample[:4] for sample in samples if not sample.held_out])
    decode, alone = rows[:, 2] == 0, (rows[:, 2] > 0) & (rows[:, 0] == 0)
    if np.unique(rows[decode, 0]).size < 2:
        raise CalibrationError(f"a fit needs at least two different numbers of requests at once, got {rows[decode, 0]}")
    lengths = np.unique(rows[alone, 2])
    if lengths.size < 2:
        raise CalibrationError(f"a fit needs at least two lengths of prompt, got {lengths}")
    best, least = None, np.inf
    for shortest in lengths[:-1]:
        bound = rows[:, 2] >= shortest  # by compute
        for _ in range(10):
            found = _fit(rows, bound)
            five = np.array(found.coefficients)
            computed_s = (
                five[3]
                + five[4] * (rows[:, 2] + found.seq_tokens * rows[:, 0])
                + (found.per_pair_s * rows[:, 2] ** 2 / 2)
            )
            is_bound = ~decode & (computed_s > five[0])
            if (is_bound == bound).all():
                break
            bound = is_bound
        error = float(np.abs(found.times_s(rows) / rows[:, 3] - 1.0).sum())
        if error < least:
            best, least = found, error
    assert best is not None
    return best._replace(batch_s=_off_line(best, rows[decode]))


def _off_line(line: Fit, rows: Floats) -> tuple[float, ...]:
    """Medians of what iterations [n, (decoding, KV tokens, 0, s)] of 1, 2, 4, ... sequences take beyond the line."""
    beyond_s = rows[:, 3] - line.times_s(rows)
    found: list[float] = []
    while (at := rows[:, 0] == 2.0 ** len(found)).any() and len(found) < KNOTS:
        found.append(float(np.median(beyond_s[at])))
    return tuple(found)


def _fit(rows: Floats, bound: Bools) -> Fit:
    """The fit to `rows` of which those that are `bound` have their prompts' compute for their first term."""
    decoding, kv_tokens, prompt, time_s = rows.T
    alone, mixed = (prompt > 0) & (decoding == 0), (prompt > 0) & (decoding > 0)
    # Without a hidden prompt, and one that joins others, nothing tells the overhead from the base.
    apart = (alone & ~bound).any() or mixed.any()
    columns = [~bound, decoding, kv_tokens, bound, bound * prompt, bound * prompt**2 / 2, alone * apart]
    columns.append(bound * decoding if mixed.any() else np.zeros(len(rows)))
    x = robust(np.column_stack(columns) / time_s[:, None], np.ones(len(rows)))
    weight_s, per_seq_s, per_kv_token_s, base_s, token_s, pair_s, overhead_s, beside_s = map(float, x)
    token_s = max(token_s, FLOOR)
    seq_tokens = beside_s / token_s if mixed.any() else 1.0
    five = max(weight_s, FLOOR), max(per_seq_s, FLOOR), max(per_kv_token_s, FLOOR), max(base_s, FLOOR), token_s
    return Fit(five, seq_tokens, pair_s, overhead_s)


def errors(found: Fit, samples: Sequence[Sample]) -> dict[str, Errors]:
    """Relative errors of the times that a fit gives, by kind of load."""
    rows = np.array([sample[:4] for sample in samples])
    prefill, beside, held_out = rows[:, 2] > 0, rows[:, 0] > 0, np.array([sample.held_out for sample in samples])
    off = np.abs(found.times_s(rows) / rows[:, 3] - 1.0)
    kinds = {"decode": ~prefill, "prefill alone": prefill & ~beside, "prefill among others": prefill & beside}
    return {
        f"{name}, {which}": Errors(int(chosen.sum()), float(off[chosen].mean()), float(np.quantile(off[chosen], 0.9)))
        for name, kind in kinds.items()
        for which, chosen in (("fitted", kind & ~held_out), ("held out", kind & held_out))
        if chosen.any()
    }


# The probes.


class Stream:
    """An answer on its way."""

    def __init__(self) -> None:
        self.sent_s = time.perf_counter()
        self.first_s = self.last_s = 0.0  # when its first and last tokens came
        self.times_s: list[float] = []  # when chunks with tokens came
        self.prompt = self.tokens = 0  # as the engine says at its end
        self.begun = asyncio.Event()


def joined_s(beside: Stream, joining: Stream) -> float:
    """Time of the iteration that computed the prompt of `joining`, s, as a stream `beside` it shows: what passed
    between its tokens while the other came in, but for the iterations before that."""
    times_s = np.array(beside.times_s)
    sent = int(times_s.searchsorted(joining.sent_s)) - 1
    first = int(np.abs(times_s - joining.first_s).argmin())
    plain_s = (times_s[sent] - times_s[sent - PLAIN]) / PLAIN
    return float(times_s[first] - times_s[sent] - max(0, first - sent - 1) * plain_s)


class Prober:
    """One engine that answers probes."""

    def __init__(self, url: str, model: str, settings: Settings, session: aiohttp.ClientSession) -> None:
        self.url, self.model, self.settings, self.session = url.rstrip("/"), model, settings, session
        self.random = random.Random()  # from the system: a second run must not find the prompts of the first cached
        self.words_per_token = 1.0
        self.iteration_s = 0.0  # the last that was timed

    def words(self, tokens: int) -> str:
        """A prompt of about so many tokens that has not been seen before."""
        count = max(1, round(tokens * self.words_per_token))
        return " ".join(self.random.choice(WORDS) for _ in range(count))

    async def ask(self, prompt: str | list[int], tokens: int, stream: Stream | None = None) -> Stream:
        """One answer of exactly so many tokens. Raises CalibrationError when it is none."""
        seen = stream or Stream()
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True,
            "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        seen.sent_s = time.perf_counter()
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
            raise CalibrationError(f"{self.url}/v1/completions: {error or type(error).__name__}") from None
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
            seen.last_s = time.perf_counter()
            if choice["text"] or not choice.get("finish_reason"):  # a token need not make text yet
                seen.times_s.append(seen.last_s)
                if not seen.begun.is_set():
                    seen.first_s = seen.last_s
                    seen.begun.set()
        if event.get("usage"):
            seen.prompt, seen.tokens = event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]

    async def learn_words(self) -> None:
        """How many words make a token; the engine's first answers, which may be slow, are not timed."""
        words = self.words(128).split()
        seen = await self.ask(" ".join(words), 8)
        self.words_per_token = len(words) / seen.prompt

    async def prefill(self, prompt: int) -> Sample:
        """Time to first token of a prompt alone."""
        seen = await self.ask(self.words(prompt), 1)
        return Sample(0.0, 0.0, seen.prompt, seen.first_s - seen.sent_s)

    @asynccontextmanager
    async def others(self, count: int, prompt: int, tokens: int) -> AsyncIterator[list[Stream]]:
        """So many streams that all decode; they are given up at the end."""
        streams = [Stream() for _ in range(count)]
        # Always the same prompts, and their beginnings: the engine may have them cached, as they are not timed.
        count_words = max(1, round(prompt * self.words_per_token))
        texts = [" ".join(random.Random(k).choices(WORDS, k=count_words)) for k in range(count)]
        tasks = [
            asyncio.create_task(self.ask(text, tokens, stream)) for text, stream in zip(texts, streams, strict=True)
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
            while streams and len(streams[0].times_s) < PLAIN + 1:
                await asyncio.sleep(0.005)
            # Somewhere within an iteration of theirs, as a user's request would come.
            await asyncio.sleep(self.random.random() * self.iteration_s)
            before = [len(stream.times_s) for stream in streams]
            seen = await self.ask(self.words(prompt), tokens)
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
                await self.ask(self.words(64), tokens)

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


async def _get(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(url) as response:
            if response.status != 200:
                raise CalibrationError(f"{url} answers {response.status}")
            return await response.text(errors="replace")
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise CalibrationError(f"{url}: {error or type(error).__name__}") from None


async def find_model(session: aiohttp.ClientSession, url: str, name: str | None) -> tuple[str, int]:
    """Name and length of the model, the first where none is named. Raises CalibrationError."""
    if not url.startswith(("http://", "https://")):
        raise CalibrationError(f"{url}/v1/models is no URL, expected http://HOST:PORT of an engine")
    page = await _get(session, f"{url}/v1/models")
    try:
        listed = {str(each["id"]): each for each in orjson.loads(page)["data"]}
        found = name or next(iter(listed))
        if found not in listed:
            raise CalibrationError(f"{url} has no model {found!r}, it has {', '.join(listed)}")
        return found, int(listed[found]["max_model_len"])
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise CalibrationError(f"{url}/v1/models does not list models with max_model_len: {error!r}") from None


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
    page = await _get(prober.session, f"{prober.url}/metrics")
    try:
        return read_load(page, NAMES[prober.settings.kind], 1)
    except EngineError as error:
        raise CalibrationError(f"{prober.url}/metrics: {error}") from None


async def settle(prober: Prober) -> None:
    """Until the engine has nothing to do. Raises CalibrationError if that takes longer than `SETTLE_S`."""
    until_s = time.monotonic() + SETTLE_S
    while (load := await _load(prober)).running + load.waiting > 0:
        if time.monotonic() > until_s:
            count = load.running + load.waiting
            raise CalibrationError(
                f"{prober.url} has {count:.0f} requests of others; it should have nothing else to do"
            )
        await asyncio.sleep(0.1)


async def find_max_num_seqs(prober: Prober, max_model_len: int) -> int:
    """How many requests the engine runs at once: ever more are asked for until some wait. Raises CalibrationError."""
    count = 8
    while count <= MOST_SEQS:
        tasks = [asyncio.create_task(prober.ask(prober.words(8), min(1024, max_model_len - 32))) for _ in range(count)]
        try:
            seen = None
            while True:
                await asyncio.sleep(0.25)
                for task in tasks:
                    if task.done():
                        task.result()
                load = await _load(prober)
                if load.running + load.waiting >= count and load == seen:
                    break
                seen = load
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if load.waiting:
            return int(load.running)
        count *= 2
    raise CalibrationError(f"{prober.url} runs {MOST_SEQS} requests at once and more; say --max-num-seqs")


def decode_loads(limits: Limits, tokens: int) -> list[tuple[int, int, bool]]:
    """Streams at once, context of each, and whether it is held out: a grid within the limits, every second held out."""
    most = max(2, limits.max_num_seqs)
    counts = sorted({1, *(n for n in (2, 4, 8, 16, 32, 64, 128, 256) if n < most), most})
    loads = []
    for row, count in enumerate(counts):
        longest = min(limits.max_model_len, limits.kv_tokens // count) - MARGIN * tokens - 32
        if longest < 32:
            break
        contexts = sorted({32, max(32, longest // 4), max(32, longest // 2)})
        loads += [(count, each, (row + column) % 2 == 1) for column, each in enumerate(contexts)]
    return loads


def prefill_loads(limits: Limits, max_batched_tokens: int) -> list[tuple[int, bool]]:
    """Lengths of prompts, and whether it is held out: from a few tokens to one iteration's, every third held out."""
    longest = min(limits.max_model_len - 64, max_batched_tokens, CHUNK_TOKENS)
    lengths = sorted({max(4, round(8 * (longest * 0.9 / 8) ** (k / 12))) for k in range(13)})
    return [(each, k % 3 == 1) for k, each in enumerate(lengths)]


async def calibrate(url: str, settings: Settings, say: Say = lambda line: None) -> Calibration:
    """Measure the engine at `url`, which should have nothing else to do. Raises CalibrationError."""
    async with connected(settings) as session:
        url = url.rstrip("/")
        model, max_model_len = await find_model(session, url, settings.model)
        prober = Prober(url, model, settings, session)
        busy = []
        try:
            for each in settings.beside:
                named, _ = await find_model(session, each.rstrip("/"), None)
                neighbour = Prober(each, named, settings, session)
                busy.append(asyncio.create_task(neighbour.load(settings.beside_requests, 256)))
            measuring = asyncio.create_task(_measure(prober, max_model_len, say))
            await asyncio.wait({measuring, *busy}, return_when=asyncio.FIRST_COMPLETED)
            for task in busy:
                if task.done():
                    measuring.cancel()
                    task.result()
            return await measuring
        except ExceptionGroup as group:
            raise CalibrationError(str(group.exceptions[0])) from None
        finally:
            for task in busy:
                task.cancel()
            await asyncio.gather(*busy, return_exceptions=True)


class Measurement:
    """An engine that is measured in turns, each of which measures every load once."""

    def __init__(self, prober: Prober, limits: Limits, max_model_len: int, say: Say = lambda line: None) -> None:
        self.prober, self.limits, self.max_model_len, self.say = prober, limits, max_model_len, say
        self.alone = prefill_loads(limits, prober.settings.max_batched_tokens)
        self.together = decode_loads(limits, prober.settings.tokens)
        self.prefills: list[list[Sample]] = [[] for _ in self.alone]
        self.decodes: list[list[Sample]] = [[] for _ in self.together]
        self.joining: list[list[Sample]] = [[] for _ in self.together]

    @classmethod
    async def begin(cls, prober: Prober, max_model_len: int, say: Say = lambda line: None) -> "Measurement":
        """Find the engine's limits. Raises CalibrationError."""
        settings, url = prober.settings, prober.url
        kv_tokens = settings.kv_tokens or kv_tokens_of(await _get(prober.session, f"{url}/metrics"), url)
        await prober.learn_words()
        max_num_seqs = settings.max_num_seqs or await find_max_num_seqs(prober, max_model_len)
        limits = Limits(kv_tokens, max_num_seqs, min(max_model_len, settings.longest or max_model_len))
        say(f"{prober.model}: {kv_tokens} KV tokens, {max_num_seqs} requests at once, length {max_model_len}")
        return cls(prober, limits, max_model_len, say)

    async def turn(self) -> None:
        """Measure every load. Raises CalibrationError."""
        await settle(self.prober)
        for k, (prompt, _) in enumerate(self.alone):
            self.prefills[k].append(await self.prober.prefill(prompt))
        self.say(f"{len(self.alone)} prompts alone are measured")
        for k, (decoding, context, _) in enumerate(self.together):
            decode, join = await self.prober.decode(decoding, context)
            self.decodes[k].append(decode)
            self.joining[k].append(join)
            self.say(f"{decoding} at once, {decode.kv_tokens:.0f} KV tokens: {decode.time_s * 1e3:.2f} ms an iteration")

    def found(self) -> Calibration:
        """What the turns so far, of which there is one at least, show. Raises CalibrationError."""
        settings, prober = self.prober.settings, self.prober
        samples = [_median(taken, held_out) for taken, (_, held_out) in zip(self.prefills, self.alone, strict=True)]
        samples += [
            _median(taken, held_out) for taken, (_, _, held_out) in zip(self.decodes, self.together, strict=True)
        ]
        # Prompts that join others, where both fit into an iteration; every third is held out.
        fitting = [
            taken
            for taken in self.joining
            if 0 < taken[0].decoding <= settings.max_batched_tokens - taken[0].prefill_tokens
        ]
        samples += [_median(taken, k % 3 == 1) for k, taken in enumerate(fitting)]
        checked = errors(fit(samples), samples)
        found = fit([sample._replace(held_out=False) for sample in samples])
        profile = Profile(
            *found.coefficients, self.limits.kv_tokens // BLOCK_TOKENS, self.limits.max_num_seqs,
            settings.max_batched_tokens, self.max_model_len, f"measured: {prober.model}, {len(samples)} loads",
            found.seq_tokens, found.per_pair_s, found.batch_s,
        )  # fmt: skip
        return Calibration(prober.url, prober.model, profile, found.overhead_s, checked, samples)


async def _measure(prober: Prober, max_model_len: int, say: Say) -> Calibration:
    measurement = await Measurement.begin(prober, max_model_len, say)
    for turn in range(prober.settings.repeats):
        say(f"turn {turn + 1} of {prober.settings.repeats}")
        await measurement.turn()
    return measurement.found()


def _median(taken: Sequence[Sample], held_out: bool) -> Sample:
    """One sample of several of the same load: its mean, and the median of its time."""
    return Sample(
        taken[0].decoding,
        statistics.mean(sample.kv_tokens for sample in taken),
        statistics.mean(sample.prefill_tokens for sample in taken),
        statistics.median(sample.time_s for sample in taken),
        held_out,
    )
