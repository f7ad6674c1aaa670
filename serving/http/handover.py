"""What is changed of a request that is handed to a peer for pay, and what of its answer the user does not see.

A stream is asked for its usage, since its events do not tell how many tokens they have; and where tokens are paid for,
no more of them may be generated than there is credit in escrow.
"""

import re
from collections.abc import Mapping
from typing import Any

import orjson

from wwwserve.serving.boundary import MOST_CHOICES, loads
from wwwserve.serving.http.reply import CHAT_PATH, COMPLETION_PATH, CompletionRequest, Reply
from wwwserve.serving.http.sse import AnswerMeter, EventParser, choices_of, usage_of

LIMITS = {  # by path; the first that is there holds
    CHAT_PATH: ("max_completion_tokens", "max_tokens"), COMPLETION_PATH: ("max_tokens",)
}  # fmt: skip
DEFAULT_COMPLETION_TOKENS = 16  # of `/v1/completions`, by the OpenAI API

_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


def limit_of(path: str, request: dict[str, Any]) -> int | None:
    """Tokens that one choice may have at most, as the user says; None without a limit."""
    for name in LIMITS[path]:
        limit = request.get(name)
        if isinstance(limit, float) and limit.is_integer():
            limit = int(limit)
        if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
            return limit
    return None


def limit_in_force(path: str, request: dict[str, Any]) -> int | None:
    """Tokens that an engine lets one choice have at most; None if it may write as long as it can."""
    limit = limit_of(path, request)
    if limit is None and path == COMPLETION_PATH and "max_tokens" not in request:
        return DEFAULT_COMPLETION_TOKENS
    return limit


def choices_in(request: dict[str, Any]) -> int:
    """How many answers a request asks for: choices for each prompt, times prompts."""
    count, prompt = request.get("n"), request.get("prompt")
    if isinstance(count, float) and count.is_integer():
        count = int(count)
    if not isinstance(count, int) or not 1 <= count <= MOST_CHOICES:  # which the engine takes for one, or refuses
        count = 1
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return count * len(prompt)
    return count


def for_pay(completion: CompletionRequest, max_tokens: int | None) -> tuple[CompletionRequest, bool]:
    """A request as a peer gets it, with at most `max_tokens` a choice where that is to hold and there is no limit;
    and whether its answer tells of usage though the user did not ask for it."""
    request = orjson.loads(completion.body)
    change: dict[str, Any] = {}
    hidden = False
    if completion.stream:
        options = request.get("stream_options") or {}
        hidden = isinstance(options, dict) and options.get("include_usage") is not True
        if hidden:
            change["stream_options"] = options | {"include_usage": True}
    if max_tokens is not None and limit_in_force(completion.path, request) is None:
        change["max_tokens"] = max_tokens
    if not change:
        return completion, False
    try:
        return completion._replace(body=orjson.dumps(request | change)), hidden
    except TypeError:  # nested deeper than orjson writes
        return completion, False


def meter_of(completion: CompletionRequest) -> AnswerMeter:
    """Of an answer to a request."""
    return AnswerMeter(completion.choices, b'"tools"' in completion.body or b'"functions"' in completion.body)


def tells_usage(request: dict[str, Any]) -> bool:
    """Whether an answer says how many tokens it has."""
    options = request.get("stream_options")
    return not request.get("stream") or (isinstance(options, dict) and options.get("include_usage") is True)


def caps(path: str, request: dict[str, Any], limit: int | None) -> dict[str, int]:
    """What is to be added to a peer's request so that no engine lets a choice have more tokens than `limit`, which is
    in force: engines do not agree on which of two keys holds, nor on the limit where there is none."""
    if limit is None:
        return {}
    names = [name for name in LIMITS[path] if name in request] or ["max_tokens"]
    return {name: limit for name in names if request.get(name) != limit}


def with_keys(body: bytes, keys: Mapping[str, object]) -> bytes:
    """A request, an object of JSON, with more keys. Of a key that is there twice the last one counts."""
    if not keys:
        return body
    inner = body.rstrip()[:-1].rstrip()
    return inner + (b"" if inner.endswith(b"{") else b",") + orjson.dumps(keys)[1:]


def salted(body: bytes, salt: str) -> bytes:
    """A request whose prefix is cached apart from those of another salt."""
    return with_keys(body, {"cache_salt": salt})


class WithoutUsage(Reply):
    """A reply that leaves out the event which tells of nothing but usage."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self._reply = reply
        self.started, self.resumable = reply.started, reply.resumable
        self._parser = EventParser()

    async def start(self, status: int, content_type: str) -> None:
        """See `Reply`."""
        await self._reply.start(status, content_type)
        self._follow()

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        """See `Reply`."""
        try:
            await self._reply.whole(status, content_type, body)
        finally:
            self._follow()

    async def pass_on(self, chunk: bytes) -> None:
        """See `Reply`; an event that is not complete waits for its rest."""
        if self._parser.pending or not chunk.endswith((b"\n\n", b"\r\n\r\n")) or _NO_CHOICES.search(chunk):
            chunk = b"".join(event.raw for event in self._parser.feed(chunk) if not _only_usage(event.data))
        try:
            if chunk:
                await self._reply.pass_on(chunk)
        finally:
            self._follow()

    def _follow(self) -> None:
        self.started, self.resumable = self._reply.started, self._reply.resumable


def _only_usage(data: bytes) -> bool:
    if not _NO_CHOICES.search(data):
        return False
    try:
        content = loads(data)
    except ValueError:
        return False
    return isinstance(content, dict) and not choices_of(content) and usage_of(content) is not None
