"""Streams that break off and go on elsewhere, for nodes whose operator wants it.

What the user was sent is written down, and whoever is asked next gets it as the beginning of the answer: of a chat as
its final message, to be continued (`continue_final_message` of vLLM and SGLang), of a completion as part of the prompt.
The user sees one stream, with one id and one account of tokens.
"""

import asyncio
from typing import Any, NoReturn

import orjson

from wwwserve.serving.boundary import loads
from wwwserve.serving.http.handover import limit_of
from wwwserve.serving.http.reply import CHAT_PATH, CompletionRequest, Failed, Reply, RetryableError
from wwwserve.serving.http.sse import DONE, LAST_EVENT, Event, EventParser, StreamError, choices_of, usage_of

# What a continuation could not take up where it was: several answers, calls of tools, a grammar's state.
NOT_RESUMED = ("tools", "functions", "response_format", "structured_outputs", "prompt_logprobs", "echo", "suffix")
LIMITS = ("max_tokens", "max_completion_tokens", "min_tokens")


def resumable(completion: CompletionRequest) -> bool:
    """Whether an answer that breaks off could be continued: one text, streamed, of a prompt that is text."""
    request = orjson.loads(completion.body)
    if not completion.stream or request.get("n", 1) != 1 or any(request.get(name) for name in NOT_RESUMED):
        return False
    if completion.path.endswith("/chat/completions"):
        messages = request.get("messages")
        if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
            return False
        return not _continues(request) or isinstance(messages[-1].get("content"), str)
    return isinstance(request.get("prompt"), str)


class Resumed(Reply):
    """A reply to a user that any number of executors may make together, one after the other."""

    def __init__(self, completion: CompletionRequest, reply: Reply) -> None:
        """For a completion that is `resumable`."""
        super().__init__()  # `started` by whoever has it now
        self.limits = reply.limits
        self.resumable = True
        self.tokens = 0  # that the user has, by events with text
        self.first_s: float | None = None  # when it got the first, by the event loop's clock
        self._completion, self._reply = completion, reply
        self._request: dict[str, Any] = orjson.loads(completion.body)
        self._text = ""
        self._before = 0  # tokens of those who had it before
        self._again = False  # something of it is out
        self._first: dict[str, Any] = {}  # what names the stream, of its first event
        self._finished = False
        self._parser = EventParser()

    def rest(self) -> CompletionRequest:
        """What is to be asked for now: at first all, then the rest."""
        self.started, self._parser, self._before, self._again = False, EventParser(), self.tokens, bool(self._first)
        if not self._text:
            return self._completion
        request = continued(self._completion.path, self._request, self._text)
        for name in LIMITS:
            if isinstance(request.get(name), int):
                request[name] = max(request[name] - self.tokens, 0 if name == "min_tokens" else 1)
        return self._completion._replace(body=orjson.dumps(request))

    async def start(self, status: int, content_type: str) -> None:
        """See `Reply`."""
        self.started = True
        if not self._reply.started:
            await self._reply.start(status, content_type)

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        """See `Reply`. Raises Failed for one that is no stream, though a part of one is out."""
        if self._reply.started:
            self._give_up(f"asked to go on, an engine answers {status}")
        self.started, self.resumable = True, False
        await self._reply.whole(status, content_type, body)

    async def pass_on(self, chunk: bytes) -> None:
        """See `Reply`. Raises RetryableError for an event that tells of an error."""
        try:
            out = b"".join([self._event(event) for event in self._parser.feed(chunk)])
        except StreamError as error:
            raise RetryableError(str(error)) from None
        if out:
            await self._reply.pass_on(out)

    async def finish(self) -> bool:
        """The stream broke off; bring it to its end if only that is missing. Returns whether it was so."""
        limit = limit_of(self._completion.path, self._request)
        if not self._finished and (limit is None or self.tokens < limit):
            return False
        self.resumable = False
        if not self._finished:
            chat = self._completion.path == CHAT_PATH
            nothing: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
            choice = {"index": 0, "finish_reason": "length", **nothing}
            await self._reply.pass_on(b"data: " + orjson.dumps(self._first | {"choices": [choice]}) + b"\n\n")
        await self._reply.pass_on(LAST_EVENT)
        return True

    def _event(self, event: Event) -> bytes:
        """An event as the user gets it."""
        if event.data.strip() == DONE:
            self.resumable = False
            return event.raw
        if not event.data:
            return event.raw
        try:
            content = loads(event.data)
            choices = choices_of(content)
        except (ValueError, AttributeError):
            raise RetryableError("its stream is not what an engine streams") from None
        if content.get("error"):
            raise RetryableError(f"its stream ends with an error: {str(content['error'])[:200]}")
        names = {key: content[key] for key in ("id", "object", "created", "model") if key in content}
        self._first = self._first or names
        role_only = False
        for choice in choices:
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or ""
            self._text += text
            self.tokens += bool(text)
            if text and self.first_s is None:
                self.first_s = asyncio.get_running_loop().time()
            self._finished = self._finished or bool(choice.get("finish_reason"))
            role_only = "role" in delta and not text and not choice.get("finish_reason")
            if any(delta.get(name) for name in ("tool_calls", "reasoning", "reasoning_content", "function_call")):
                self.resumable = False
        if not self._again:
            return event.raw
        if role_only:
            return b""  # it was said already
        usage = usage_of(content)
        if usage is not None:
            prompt = max(0, usage.prompt - self._before)
            output = usage.output + self._before
            content["usage"] |= {
                "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output
            }  # fmt: skip
        return b"data: " + orjson.dumps(content | self._first) + b"\n\n"

    def _give_up(self, reason: str) -> NoReturn:
        self.resumable = False
        raise Failed(502, f"the answer broke off and cannot be resumed: {reason}", "engine_error")


def continued(path: str, request: dict[str, Any], text: str) -> dict[str, Any]:
    """A request at `path`, to be answered from where `text`, the beginning of its answer, ends."""
    request = dict(request)
    if not path.endswith("/chat/completions"):
        return request | {"prompt": request["prompt"] + text}
    messages = list(request["messages"])
    if _continues(request):
        messages[-1] = messages[-1] | {"content": messages[-1]["content"] + text}
    else:
        messages.append({"role": "assistant", "content": text})
    return request | {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}


def _continues(request: dict[str, Any]) -> bool:
    return bool(request.get("continue_final_message"))
