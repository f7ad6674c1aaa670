"""What an engine does besides completions, passed through to it and back: embeddings, scores, tokens, responses.

The market does not deal in these. They stay on the own engine, are not held, and are in no count of users' requests;
the engine's load has them, with a prompt of as many tokens as their bytes come to, until they have ended.
"""

import re

import orjson

from wwwserve.serving.dispatcher import Dispatcher
from wwwserve.serving.engine.adapter import Engine
from wwwserve.serving.http.clients import HttpReply
from wwwserve.serving.http.files import is_shortage
from wwwserve.serving.http.reply import Failed, limits_said, packed, retry_after
from wwwserve.serving.http.sse import Usage
from wwwserve.serving.http.trace import Trace
from wwwserve.serving.http.transport import Response
from wwwserve.serving.market import MOST_TOKENS
from wwwserve.serving.plain import in_words
from wwwserve.serving.tracing import end_passed

RESPONSES = "/v1/responses"
COMPUTED = (
    "/v1/embeddings", RESPONSES, "/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank"
)  # fmt: skip
READ = ("/tokenize", "/detokenize")  # which cost an engine nothing to speak of
PASSED = frozenset((*COMPUTED, *READ))
SEEN = 4096  # bytes of an answer, at its beginning and its end, in which it may say its usage

_USAGE = re.compile(rb'"usage"\s*:\s*(\{(?:[^{}]|\{[^{}]*\})*\})')
_KIND = re.compile(r"(?:application|text)/[a-z+.-]{1,40}(?:; ?[a-z]{1,20}=[A-Za-z0-9_-]{1,40})?")


class Passthrough:
    """Of one node."""

    def __init__(self, dispatcher: Dispatcher, most: int) -> None:
        """At most `most` are under way at once."""
        self._dispatcher, self._most, self._open = dispatcher, most, 0

    async def answer(self, path: str, body: bytes, trace: Trace, reply: HttpReply) -> Usage | None:
        """Answer a request as the engine does; returns what it used, as far as that is said. Raises Failed."""
        engines = self._dispatcher.engine
        if self._open >= self._most:
            raise Failed(503, "too many requests are under way here", "overloaded", retry_after_s=1)
        if not engines.healthy:
            raise Failed(503, "the engine is down", "overloaded", retry_after_s=1)
        prompt = self.prompt(body) if path in COMPUTED else 0
        engine, usage = engines.choose(prompt, _nothing_cached), None
        self._open += 1
        trace, status = trace.child("engine", "client"), 0
        if prompt:
            engines.chosen(engine)
            engine.sent(prompt)
        try:
            async with engine.post(path, body, trace.for_engine()) as response:
                reply.limits[:] = limits_said(response)
                status = response.status
                _check(engine, path, response)
                usage = await self._pass(response, reply)
        except (TimeoutError, OSError) as error:
            reason = in_words(error)
            if is_shortage(error):
                raise Failed(503, reason, "overloaded", retry_after_s=1) from None
            if not reply.started:
                engine.suspect(reason)
            raise Failed(502, f"the engine broke off: {reason}", "engine_error") from None
        finally:
            self._open -= 1
            if trace.span is not None:
                end_passed(trace.span, status, usage)
            if prompt:
                engine.returned(prompt, usage.output if usage is not None else 0)
        return usage

    def prompt(self, body: bytes) -> int:
        """Tokens of a request, by its bytes; no more than the engine holds."""
        most = min(self._dispatcher.engine.alone.kv_tokens, MOST_TOKENS)
        return max(1, min(round(len(body) / self._dispatcher.bytes_per_token), int(most)))

    async def _pass(self, response: Response, reply: HttpReply) -> Usage | None:
        kind = response.headers.get("content-type", "application/json")
        if not _KIND.fullmatch(kind):
            raise Failed(502, f"the engine answers with the type {kind[:80]!r}", "engine_error")
        await reply.start(response.status, kind)
        first, last = b"", b""
        async for piece in response.iter_any():
            if len(first) < SEEN:
                first += piece[:SEEN]
            last = (last + piece)[-SEEN:] if len(piece) < SEEN else piece[-SEEN:]
            await reply.pass_on(piece)
        return usage_in(last) or usage_in(first)


def _nothing_cached(place: str) -> int:
    return 0


def _check(engine: Engine, path: str, response: Response) -> None:
    """Raises Failed for an answer that tells of the engine and not of the request."""
    status = response.status
    if status in (429, 503):
        engine.full(retry_after(response))
        raise Failed(status, f"the engine is full: it answers {status}", "overloaded", retry_after(response) or 1)
    if status in (401, 407) or status >= 500:
        raise Failed(502, f"the engine does not answer as it should: it answers {status}", "engine_error")
    if status == 405 or (status == 404 and "json" not in response.headers.get("content-type", "")):
        raise Failed(404, f"the engine has no {path}", "not_found_error")
    if wrong := packed(response):
        raise Failed(502, f"the engine does not answer as it should: {wrong}", "engine_error")
    if not (status == 200 or 400 <= status < 500):
        raise Failed(502, f"the engine answers {status}", "engine_error")


def usage_in(text: bytes) -> Usage | None:
    """What a part of an answer says of its tokens, at last; None for nothing."""
    said = _USAGE.findall(text)
    try:
        usage = orjson.loads(said[-1]) if said else {}
    except ValueError:
        return None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens", usage.get("total_tokens")))
    output = usage.get("completion_tokens", usage.get("output_tokens", 0)) or 0
    if type(prompt) is not int or type(output) is not int or not (0 <= prompt <= MOST_TOKENS >= output >= 0):
        return None
    return Usage(prompt, output)


def error_event(failed: Failed) -> bytes:
    """The last event of a stream that breaks off."""
    said = orjson.loads(failed.body())
    message = {"type": "error", "code": str(failed.status), "message": str(failed), "param": None} | said
    return b"event: error\ndata: " + orjson.dumps(message) + b"\n\n"
