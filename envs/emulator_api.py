"""The OpenAI API as an emulated engine speaks it: requests are read, answers are made of filler."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import orjson

LARGEST_BODY = 8 * 2**20  # bytes
BYTES_PER_TOKEN = 4
# Log-probability of a token of filler after some prompt and after none, and of any other, nats.
EXPECTED, UNASKED, UNEXPECTED = -0.5, -2.5, -8.0
WORDS = ("the", "old", "sea", "was", "far", "and", "the", "new", "sun", "was", "low", "for", "all", "who", "sat", "out")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ApiError(Exception):
    """An error response: an HTTP status, a message, and OpenAI's type of error."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Completion:
    """An answer in OpenAI's forms."""

    def __init__(self, chat: bool, model: str, prompt: int) -> None:
        self.chat, self.prompt = chat, prompt
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{time.time_ns():x}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def usage(self, output: int, cached: int | None) -> dict[str, Any]:
        """Tokens of prompt and answer, and if that is told those of the prompt that were cached."""
        counts = {"prompt_tokens": self.prompt, "completion_tokens": output, "total_tokens": self.prompt + output}
        return counts if cached is None else counts | {"prompt_tokens_details": {"cached_tokens": cached}}

    def whole(
        self, output: int, reason: str, cached: int | None = None, logprobs: Any = None
    ) -> dict[str, Any]:  # fmt: skip
        """The answer at once; `logprobs` are those of the prompt, if they were asked for."""
        text = words(0, output)
        if self.chat:
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
        else:
            choice = {"text": text}
        choice |= {"index": 0, "logprobs": None, "finish_reason": reason}
        answer = self.head | {"choices": [choice], "usage": self.usage(output, cached)}
        return answer if logprobs is None else answer | {"prompt_logprobs": logprobs}

    def _event(self, delta: dict[str, Any] | str, reason: str | None) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        choice = {"index": 0, ("delta" if self.chat else "text"): delta, "logprobs": None, "finish_reason": reason}
        return b"data: " + orjson.dumps(self.head | {"object": kind, "choices": [choice]}) + b"\n\n"

    def opening(self) -> bytes:
        """What a stream begins with."""
        return self._event({"role": "assistant", "content": ""}, None) if self.chat else b""

    def part(self, first: int, end: int) -> bytes:
        """The tokens from `first` to before `end`."""
        if end <= first:
            return b""
        text = words(first, end)
        return self._event({"content": text} if self.chat else text, None)

    def closing(self, output: int, reason: str, usage: bool, cached: int | None = None) -> bytes:
        """What a stream ends with."""
        events = self._event({} if self.chat else "", reason)
        if usage:
            kind = "chat.completion.chunk" if self.chat else "text_completion"
            last = self.head | {"object": kind, "choices": [], "usage": self.usage(output, cached)}
            events += b"data: " + orjson.dumps(last) + b"\n\n"
        return events + b"data: [DONE]\n\n"


def words(first: int, end: int) -> str:
    """The answer's tokens from `first` to before `end`: of four bytes each, as those of prompts, with the space."""
    return "".join(f"{' ' if k else ''}{WORDS[k % len(WORDS)]}" for k in range(first, end))


def prompt_tokens(request: dict[str, Any], chat: bool) -> int:
    """Tokens of a request's prompt. Raises ApiError for what is none."""
    if not chat:
        prompt = request.get("prompt")
        if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
            return len(prompt)
        if not isinstance(prompt, str):
            raise ApiError(400, f"prompt is {type(prompt).__name__}, expected a string or a list of tokens")
        return _tokens(prompt)
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise ApiError(400, "messages are missing, expected a list of at least one object")
    total = 0
    for each in messages:
        content = each.get("content")
        parts = content if isinstance(content, list) else [{"text": content or ""}]
        total += sum(_tokens(str(part.get("text", ""))) for part in parts if isinstance(part, dict))
    return max(total, len(messages))


def prompt_logprobs(request: dict[str, Any]) -> list[dict[str, Any] | None]:
    """As vLLM tells them of a chat: for each token of the prompt its log-probability, by its number; None for the
    first. What an emulated engine would answer is likely after a question, less so after none; all else is unlikely.
    Judges of duels go by it."""
    messages = request["messages"]
    last = messages[-1].get("content")
    said = last if messages[-1].get("role") == "assistant" and isinstance(last, str) else ""
    asked = any(each.get("content") for each in (messages[:-1] if said else messages))
    likely = EXPECTED if asked else UNASKED
    total, expected = prompt_tokens(request, True), words(0, _tokens(said)) if said else ""
    answer = [
        likely if said[k : k + BYTES_PER_TOKEN] == expected[k : k + BYTES_PER_TOKEN] else UNEXPECTED
        for k in range(0, len(said.encode(errors="replace")), BYTES_PER_TOKEN)
    ]
    values = [UNEXPECTED] * (total - len(answer)) + answer
    return [None, *({str(k): {"logprob": value}} for k, value in enumerate(values[1:], 1))]


def _tokens(text: str) -> int:
    return max(1, math.ceil(len(text.encode(errors="replace")) / BYTES_PER_TOKEN))


def whole_number(value: Any, name: str, least: int) -> int:
    if type(value) is not int or value < least:
        raise ApiError(400, f"{name} is {value!r}, expected an integer of at least {least}")
    return value


def parsed(body: bytes) -> dict[str, Any]:
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    if not isinstance(request, dict):
        raise ApiError(400, f"the body is a {type(request).__name__}, expected an object")
    return request


async def read_body(receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client disconnected")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST_BODY:
            raise ApiError(413, f"the body is larger than {LARGEST_BODY} bytes", "RequestEntityTooLarge")
        more = message.get("more_body", False)
    return b"".join(parts)


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def comes_first(event: asyncio.Event, disconnect: "asyncio.Future[None]") -> bool:
    """Wait for one of the two; returns whether the event came."""
    waiting = asyncio.ensure_future(event.wait())
    both: set[asyncio.Future[Any]] = {waiting, disconnect}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if not event.is_set():
        waiting.cancel()
    return event.is_set() and not disconnect.done()


async def send_answer(
    send: Send, status: int, content: Any, kind: bytes = b"application/json",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:  # fmt: skip
    body = content if isinstance(content, bytes) else orjson.dumps(content)
    head = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
