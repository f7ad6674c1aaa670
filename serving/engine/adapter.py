"""The engine that a node stands before: its load, and the way to it.

An engine is vLLM, SGLang or the emulator, which speaks as vLLM does. Its load is read from its Prometheus page at every
tick; in between, what was sent there and what came back is counted, as the page is then no longer true.
"""

import asyncio
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson

from wwwserve.agents.hardware import BLOCK_TOKENS, Profile
from wwwserve.serving.engine.prefix_index import HERE
from wwwserve.serving.http.files import is_shortage
from wwwserve.serving.http.sse import AnswerMeter
from wwwserve.serving.http.transport import Response, Transport
from wwwserve.serving.market import MOST_INT, Promise
from wwwserve.serving.plain import in_words

log = logging.getLogger("wwwserve.engine")

SCRAPE_TIMEOUT_S = 2.0
MOST_PAGE = 16 * 2**20  # bytes
MOST_LOAD = 1e6  # requests that an engine may say it has
DOWN_WAITING = 1000.0  # requests said to wait at an engine that is down
OF_ONE_PRIORITY = re.compile(r'[{,]priority="[^"]')
# When a metric was made, by prometheus_client: to the microsecond, so that no two programs have one in common.
MADE_AT = re.compile(r"^[a-zA-Z_:][a-zA-Z0-9_:]*_created(?:\{[^\n]*\})? (\d[0-9.e+]+)$", re.MULTILINE)
FAILURES = 2  # scrapes in a row that fail before an engine counts as down
FAILED = 2  # requests, each of another body, that it answers with an error before it counts as down
SPARED = 2  # times that it is tried again as soon as its page was read, though it fails requests
FULL_S = 2.0  # for which an engine that says that it is full counts as that, if it does not say for how long
MOST_FULL_S = 30.0
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class EngineError(Exception):
    """The engine cannot be used as it is; the message says why."""


class Names(NamedTuple):
    """What an engine calls its load."""

    running: str
    waiting: str
    kv_use: str  # share of the KV cache


NAMES = {
    "vllm": Names("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    "sglang": Names("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage"),
}


RENAMED = {"vllm:gpu_cache_usage_perc": "vllm:kv_cache_usage_perc"}  # by engines of an earlier version


class Load(NamedTuple):
    """What an engine is at: requests running and waiting, and tokens in its KV cache."""

    running: float
    waiting: float
    kv_tokens: float
    prefill: float | None = None  # tokens to be prefilled; None where it does not say


@dataclass(slots=True, eq=False)
class Sent:
    """A request that the engine has."""

    request: int  # its number with the provider
    own: bool  # an own user's, else a peer's
    stream: bool
    meter: AnswerMeter
    sent_s: float
    expected: Promise  # when it was sent
    exchange: AbstractAsyncContextManager[Response]  # with the engine
    engine: "Engine | None" = None  # which it is, of several

    def generated(self, now_s: float) -> float:
        """Tokens so far: those that came, or of an answer that is not streamed those that could be expected."""
        if self.stream:
            return float(self.meter.tokens)
        late_s = now_s - self.sent_s - self.expected.ttft_s
        return max(0.0, late_s / max(self.expected.tpot_s, 1e-9))


def read_load(page: str, names: Names, kv_capacity: int) -> Load:
    """The load on a Prometheus page: counts are summed over its engines, of KV use the highest is taken.

    Rows of a `priority` are parts of the one without, as SGLang writes them where it schedules by priority.
    Raises EngineError for a page that lacks one of the metrics, or has no number there.
    """
    found: dict[str, list[float]] = {name: [] for name in names}
    for line in page.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        name = RENAMED.get(name, name)
        if name in found and not OF_ONE_PRIORITY.search(line):
            try:
                found[name].append(float(line.rpartition("}")[2].split()[0 if "}" in line else 1]))
            except (ValueError, IndexError):
                raise EngineError(f"metric {name} has no number: {line[:120]!r}") from None
            if not 0 <= found[name][-1] <= MOST_LOAD:  # nor is NaN
                raise EngineError(f"metric {name} is {found[name][-1]:g}, expected 0 to {MOST_LOAD:g}")
    for name, values in found.items():
        if not values:
            raise EngineError(f"no metric {name} on the engine's page")
    return Load(sum(found[names.running]), sum(found[names.waiting]), min(max(found[names.kv_use]), 1.0) * kv_capacity)


def made_at(page: str) -> str:
    """By which the program that wrote a Prometheus page is told from all others, as far as it can be: when it made the
    first of its metrics. Empty for one that does not say, as SGLang and vLLM with several API servers."""
    found = [each for each in MADE_AT.findall(page) if float(each) % 1.0]
    return min(found, key=float, default="")


class Availability:
    """Whether an engine can be asked, by what is heard of it. `reason` says why not, or why its load is not known."""

    url: str

    def __init__(self) -> None:
        self.place = HERE  # of what it has cached, in the index of prefixes
        self.failures = FAILURES  # down until it is heard of
        self.reason = "not yet scraped"
        self.made_at = ""  # see `made_at`
        self.out = 0  # requests of this node that it has
        self.described: dict[str, dict[str, Any]] = {}  # by the names that it serves, what else it says of each
        self._full_until_s = 0.0  # by the event loop's clock
        self._requests_failed: set[int] = set()  # hashes of the requests that it failed since it answered one
        self._suspected = 0  # times for such failures since then

    @property
    def label(self) -> str:
        """What it is called among the engines of its node."""
        return self.url.partition("://")[2]

    @property
    def healthy(self) -> bool:
        """Whether it was heard of lately."""
        return self.failures < FAILURES

    @property
    def takes(self) -> bool:
        """Whether it can be asked: it was heard of lately, and did not say that it is full."""
        return self.healthy and asyncio.get_running_loop().time() >= self._full_until_s

    def suspect(self, reason: str) -> None:
        """It did not answer at all: it counts as down until it is scraped again."""
        self.failures, self.reason = FAILURES, reason

    def failed(self, request: bytes, reason: str) -> None:
        """It answered a request with an error of its own, which may be that request's fault until others fare alike."""
        if len(self._requests_failed) < FAILED:
            self._requests_failed.add(hash(request))
        if len(self._requests_failed) >= FAILED:
            # Its page of metrics may be fine all the while: it is tried again once that was read, later and later.
            if self.healthy and self._suspected >= SPARED:
                self.full(FULL_S * 2.0 ** min(self._suspected - SPARED, 10))
            self._suspected += self.healthy
            self.suspect(reason)

    def answered(self) -> None:
        """It answered a request as it should."""
        self._requests_failed.clear()
        self._suspected = 0

    def full(self, for_s: float | None) -> None:
        """It turned a request away for lack of capacity, and says for how long, or not."""
        self._full_until_s = asyncio.get_running_loop().time() + min(for_s or FULL_S, MOST_FULL_S)


class Engine(Availability):
    """One engine over HTTP."""

    def __init__(
        self, kind: str, url: str, profile: Profile, transport: Transport, *, key: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.names, self.url, self.profile, self.transport = NAMES[kind], url.rstrip("/"), profile, transport
        self.timeout_s = timeout_s  # without a byte of an answer
        self.headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._seen = Load(0.0, 0.0, 0.0)
        self._requests, self._tokens = 0.0, 0.0  # sent less returned since it was scraped
        self._prompts = 0  # tokens of the prompts that it has of this node
        self._says_load = True

    async def scrape(self) -> None:
        """Read its load; raises EngineError for an engine that does not answer. One that does not say its load, though
        it says what it serves, has what this node sent there."""
        # What is sent while the page is on its way may be on it or not; it is counted as if it were not.
        requests, tokens = self._requests, self._tokens
        try:
            page = (await self._get("/metrics")).decode(errors="replace")
            self._seen = read_load(page, self.names, self.profile.kv_tokens)
            if self.failures:  # it may have started anew
                self.made_at = made_at(page)
        except (TimeoutError, OSError) as error:
            if is_shortage(error):
                raise EngineError(in_words(error)) from None
            self._failed(f"{self.url}/metrics: {in_words(error)}")
        except EngineError as error:
            await self._do_without(f"{self.url}: {error}")
        else:
            self._requests -= requests
            self._tokens -= tokens
            self.failures, self.reason, self._says_load = 0, "", True

    async def _do_without(self, reason: str) -> None:
        """It answers, and does not say its load. Raises EngineError if it does not serve either."""
        try:
            await self.models()
        except EngineError:
            self._failed(reason)
        if self._says_load or self.failures:
            log.warning("the engine does not say its load, what is sent there is counted", extra={"reason": reason})
        self.failures, self.reason, self._says_load = 0, reason, False

    def _failed(self, reason: str) -> None:
        self.failures, self.reason = self.failures + 1, reason
        raise EngineError(reason)

    async def models(self) -> list[str]:
        """The names that it serves. Raises EngineError when it does not say."""
        try:
            listed = orjson.loads(await self._get("/v1/models"))["data"] or []  # null: Ollama has none
            self.described = {str(each["id"]): _described(each) for each in listed}
        except (TimeoutError, OSError) as error:
            raise EngineError(f"{self.url}/v1/models: {in_words(error)}") from None
        except (ValueError, KeyError, TypeError):
            raise EngineError(f"{self.url}/v1/models lists no models") from None
        return [*self.described]

    def load(self) -> Load:
        """Its load as far as it is known: as scraped, with what was sent and what returned since.

        One that is down or turns requests away is as full as can be, so that whoever decides looks elsewhere.
        """
        if not self.takes:
            return Load(float(self.profile.max_num_seqs), DOWN_WAITING, float(self.profile.kv_tokens))
        if not self._says_load:
            there = min(self.out, self.profile.max_num_seqs)
            return Load(float(there), float(self.out - there), float(min(self._prompts, self.profile.kv_tokens)))
        requests = max(0.0, self._seen.running + self._seen.waiting + self._requests)
        most = float(self.profile.max_num_seqs) if self._seen.waiting == 0 else self._seen.running
        running = min(requests, max(most, 1.0))
        kv_tokens = min(max(0.0, self._seen.kv_tokens + self._tokens), float(self.profile.kv_tokens))
        return Load(running, requests - running, kv_tokens)

    def progress(self, there: Collection[Sent], now_s: float) -> Iterator[tuple[Sent, float]]:
        """Of requests that it has, in the order sent, those that run, and the tokens of each that are generated: all
        but as many of the last ones without a token as are said to wait."""
        waiting, running = self.load().waiting if self.takes else 0.0, []
        for sent in reversed(list(there)):
            generated = sent.generated(now_s)
            if generated == 0.0 and waiting >= 1.0:
                waiting -= 1.0
            else:
                running.append((sent, generated))
        return reversed(running)

    def sent(self, prompt: int) -> None:
        """A request of so many tokens goes to it."""
        self.out += 1
        self._prompts += blocks(prompt)
        self._requests += 1
        self._tokens += blocks(prompt)

    def returned(self, prompt: int, output: int) -> None:
        """It is done with a request, or need not go on."""
        self.out -= 1
        self._prompts -= blocks(prompt)
        self._requests -= 1
        self._tokens -= blocks(prompt + output)

    async def _get(self, path: str) -> bytes:
        """A page of it. Raises OSError and TimeoutError, EngineError for another status than 200."""
        async with self.transport.request(
            "GET", self.url + path, headers=self.headers, timeout_s=SCRAPE_TIMEOUT_S, read_timeout_s=SCRAPE_TIMEOUT_S
        ) as response:
            page = await response.read(MOST_PAGE)
        if response.status != 200:
            raise EngineError(f"{self.url}{path} answers {response.status}")
        return page

    def post(
        self, path: str, body: bytes, headers: Mapping[str, str] = NO_HEADERS
    ) -> AbstractAsyncContextManager[Response]:
        """Send a request; leaving the context before its end aborts it."""
        return self.transport.request(
            "POST", self.url + path, body=body, headers={**headers, **self.headers}, timeout_s=None,
            read_timeout_s=self.timeout_s,
        )  # fmt: skip


def _described(model: Mapping[str, Any]) -> dict[str, Any]:
    """What users may know of a model, of what an engine says of it: not the folder that it was loaded from."""
    longest, base = model.get("max_model_len"), model.get("parent")
    return ({"max_model_len": longest} if type(longest) is int and 0 < longest <= MOST_INT else {}) | (
        {"parent": base} if isinstance(base, str) and base[:1] != "/" else {}
    )


def blocks(tokens: int) -> int:
    """Tokens in whole blocks of the KV cache."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
