"""What is asked, where the answer goes, and how an attempt at it can end."""

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

import orjson

from wwwserve.serving.engine.prefix_index import NO_PREFIX, Prefix
from wwwserve.serving.http.sse import AnswerMeter, StreamError
from wwwserve.serving.http.trace import NO_TRACE, Trace
from wwwserve.serving.http.transport import Response

EVENTS = "text/event-stream"
MOST_ANSWER = 64 * 2**20  # bytes of an answer that is not streamed
IN_ONE_TURN = 1 << 18  # bytes of one that are read in a turn of the event loop, 1 ms
MOST_LIMITS = 16  # headers
CHAT_PATH, COMPLETION_PATH = COMPLETIONS = ("/v1/chat/completions", "/v1/completions")  # of the OpenAI API

_CUT = "its stream ends before its last event"
_LIMIT = re.compile(rb"retry-after(-ms)?|(x-)?ratelimit(-[a-z]{1,20}){0,3}")
_VALUE = re.compile(rb"[ -~]{1,256}")


class CompletionRequest(NamedTuple):
    """What a user asks."""

    path: str
    body: bytes
    model: str
    stream: bool
    klass: int = 0
    prompt_bytes: int = 0  # of text
    prompt_ids: int = 0  # tokens that are given as such
    prefix: Prefix = NO_PREFIX
    max_tokens: int = 0  # of one choice, as the user limits it; 0 without a limit
    choices: int = 1  # answers in all: choices for each prompt, times prompts
    local_only: bool = False  # whether it stays on the own engine
    trace: Trace = NO_TRACE


class Reply(ABC):
    """Where an answer goes: to `start`, then any number of times to `pass_on`; or to `whole` at once."""

    def __init__(self) -> None:
        self.started = False  # something of it is out
        self.resumable = False  # if it broke off now, another could go on
        self.asked: str | None = None  # who was, last: "local", or a peer by its name
        # What the own engine says of its limits, if it was the last that was asked.
        self.limits: list[tuple[bytes, bytes]] = []

    @abstractmethod
    async def start(self, status: int, content_type: str) -> None:
        """Begin an answer."""

    @abstractmethod
    async def pass_on(self, chunk: bytes) -> None:
        """Some of its body."""

    @abstractmethod
    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        """All of an answer at once."""


def retry_after(response: Response) -> int | None:
    """Seconds after which an answer says to come again; None if it does not say it in seconds."""
    header = response.headers.get("retry-after", "")
    return int(header) if header.isascii() and header.isdigit() and len(header) < 6 else None


def packed(response: Response) -> str:
    """What is wrong with a body that is packed, as nobody asked for that; empty for one that is not."""
    encoding = response.headers.get("content-encoding", "identity")
    return "" if encoding.lower() == "identity" else f"its answer is packed, content-encoding {encoding[:80]!r}"


def limits_said(response: Response) -> list[tuple[bytes, bytes]]:
    """What an engine's answer says of its limits: when to come again, and how much there is."""
    said = [(name.lower(), value) for name, value in response.raw_headers if _is_limit(name)]
    return [(name, value) for name, value in said if _VALUE.fullmatch(value)][:MOST_LIMITS]


@lru_cache(maxsize=256)  # an engine has few names
def _is_limit(name: bytes) -> bool:
    return _LIMIT.fullmatch(name.lower()) is not None


class Failed(Exception):
    """A request that ends without its answer: an HTTP status, and a message for the user."""

    def __init__(
        self, status: int, message: str, kind: str = "server_error", retry_after_s: int | None = None, allow: str = ""
    ) -> None:
        """`allow`: with 405, the methods that are."""
        super().__init__(message)
        self.status, self.kind, self.retry_after_s, self.allow = status, kind, retry_after_s, allow

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the answer that says so."""
        again = [(b"retry-after", b"%d" % self.retry_after_s)] if self.retry_after_s is not None else []
        return again + ([(b"allow", self.allow.encode())] if self.allow else [])

    def body(self) -> bytes:
        """It as the OpenAI API tells of errors."""
        return orjson.dumps(
            {"error": {"message": str(self), "type": self.kind, "param": None, "code": str(self.status)}}
        )


class RetryableError(Exception):
    """Whoever had the request did not bring an answer, and another may: the user has seen nothing of one, or it can be
    resumed. `status` is what it answered, if anything, `retry_after_s` when it says to come again."""

    def __init__(self, message: str, status: int | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s

    @property
    def full(self) -> bool:
        """Whether it is only full now."""
        return self.status in (429, 503)


class TooMuch(ValueError):
    """An answer is longer than what is paid for."""


class ClientDisconnect(Exception):
    """The client hung up."""


class HeadLineReply(Reply):
    """A reply to a peer, whose HTTP status is out already: how the engine answers goes before the body, in a line of
    JSON. The body goes into `digest` too."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.status = 0  # until it has begun
        self.size = 0  # bytes of the body
        self.digest = sha256()
        self._reply = reply

    async def start(self, status: int, content_type: str) -> None:
        """See `Reply`."""
        await self._begin(status, content_type, b"")

    async def pass_on(self, chunk: bytes) -> None:
        """See `Reply`."""
        await self._reply.pass_on(chunk)
        self._sent(chunk)

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        """See `Reply`."""
        await self._begin(status, content_type, body)
        self._sent(body)

    def _sent(self, body: bytes) -> None:
        self.digest.update(body)
        self.size += len(body)

    async def _begin(self, status: int, content_type: str, body: bytes) -> None:
        self.started, self.status = True, status
        await self._reply.pass_on(orjson.dumps({"status": status, "type": content_type}) + b"\n" + body)


async def send_timed(sending: Awaitable[None], meter: AnswerMeter) -> None:
    """Send some of an answer, and count for how long its reader keeps it waiting."""
    now_s = asyncio.get_running_loop().time
    start_s = now_s()
    if meter.first_s is None and meter.begun:
        meter.first_s = start_s
    try:
        await sending
    finally:
        meter.waited_s += now_s() - start_s


async def meter_whole(meter: AnswerMeter, body: bytes) -> None:
    """Count an answer that is not streamed. A long one is read in a thread, so that others have their turns while its
    bytes are looked through. Raises StreamError."""

    def count() -> None:
        meter.whole(body)
        _ = meter.tokens  # which counts its text

    if len(body) > IN_ONE_TURN:
        counting = asyncio.ensure_future(asyncio.to_thread(count))
        try:
            await asyncio.shield(counting)
        except asyncio.CancelledError:
            await asyncio.wait((counting,))  # who is cancelled reads the meter
            raise
    else:
        meter.whole(body)


async def pass_stream_on(
    response: Response, kind: str, reply: Reply, meter: AnswerMeter, watch: Callable[[bytes], None] | None = None,
    check: Callable[[AnswerMeter], Awaitable[None]] | None = None,
) -> None:  # fmt: skip
    """Pass the stream of an engine or a peer on, up to its last event, metered; `watch` is shown all that went out.

    Raises RetryableError for one that came to an end without being whole, as far as that can be told, StreamError if
    it cannot be resumed then, and what `check` raises, which is awaited when the meter has seen more and before it is
    passed on.
    """
    async for chunk in response.iter_any():
        if not reply.started:
            await reply.start(200, kind)
        passed = meter.feed(chunk)
        if check is not None:
            await check(meter)
        if watch is not None:
            watch(passed)
        await send_timed(reply.pass_on(passed), meter)
        if meter.done:
            break
    else:
        meter.end()
    if not reply.started:
        raise RetryableError("it answers nothing")
    if reply.resumable:
        raise RetryableError(_CUT)
    if not meter.complete:
        raise StreamError(_CUT)
