"""How a judge compares two answers: by how much likelier its own engine finds each to the question than to none.

The engine must tell the log-probabilities of a prompt (`prompt_logprobs` of vLLM). `eval.live.judges` measures
how often a judge errs on pairs of known quality, by this rule, by the likelihood alone and by asking the model.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from wwwserve.agents.protocol import VOTE_A, VOTE_B, VOTE_UNDECIDED
from wwwserve.serving.boundary import answer_of, loads
from wwwserve.serving.http.resume import continued
from wwwserve.serving.http.sse import EventParser, StreamError

# What a judge leaves out of a question: it would change what the engine answers, not what it thinks of an answer.
NOT_JUDGED = (
    "stream", "stream_options", "n", "stop", "logprobs", "top_logprobs", "tools", "tool_choice", "response_format",
    "max_completion_tokens", "min_tokens", "ignore_eos", "echo", "best_of",
)  # fmt: skip

# Mean log-probability, nats a token, that an answer of worth gains from its question at least. With SmolLM2, 48 answers
# of its own gained 0.28 to 1.42, of 24 by random weights one more than 0.1, and of 24 to other questions none.
WORTHLESS = 0.1

READ_BYTES = 1 << 14  # of a stream in one turn of the event loop

Post = Callable[[str, bytes], Awaitable[Any]]  # path and body of a request to the engine, to what it answers, from JSON


class JudgeError(Exception):
    """The engine cannot judge this; the message says why."""


async def text_of(path: str, stream: bool, body: bytes) -> str:
    """The text of an answer, as far as it has one; others have the event loop between its parts."""
    chat = path.endswith("/chat/completions")
    if not stream:
        return "".join(_said(chat, body, answer_of))
    parser, parts = EventParser(), list[str]()
    try:
        for start in range(0, len(body), READ_BYTES):
            for event in parser.feed(body[start : start + READ_BYTES]):
                if event.data:
                    parts += _said(chat, event.data, loads)
            await asyncio.sleep(0)
        for event in parser.end():
            parts += _said(chat, event.data, loads)
    except StreamError:
        return ""
    return "".join(parts)


def _said(chat: bool, content: bytes, read: Callable[[bytes], Any]) -> list[str]:
    """What the first choice says in an answer or an event."""
    parts = []
    try:
        for choice in read(content).get("choices") or []:
            said = (choice.get("delta") or choice.get("message") or {}).get("content") if chat else choice["text"]
            if choice.get("index", 0) == 0 and isinstance(said, str):
                parts.append(said)
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    return parts


def judgeable(path: str, request: dict[str, Any]) -> bool:
    """Whether an answer to a request is text after a text."""
    if path.endswith("/chat/completions"):
        messages = request.get("messages")
        return isinstance(messages, list) and bool(messages) and all(isinstance(each, dict) for each in messages)
    return isinstance(request.get("prompt"), str)


async def likelihood(post: Post, path: str, request: dict[str, Any], answers: tuple[str, ...]) -> list[float]:
    """Mean log-probability of a token of each answer, given the question; that of an empty one is minus infinity.

    Raises JudgeError.
    """
    question = {key: value for key, value in request.items() if key not in NOT_JUDGED} | {"max_tokens": 1}
    before = _usage(await post(path, orjson.dumps(question)))
    means = []
    for answer in answers:
        if not answer:
            means.append(-math.inf)
            continue
        asked = continued(path, question, answer) | {"prompt_logprobs": 0}
        logprobs = _prompt_logprobs(await post(path, orjson.dumps(asked)))[before:]
        means.append(sum(logprobs) / len(logprobs) if logprobs else -math.inf)
    return means


async def gain(post: Post, path: str, request: dict[str, Any], answers: tuple[str, ...]) -> list[float]:
    """How much likelier a token of each answer is, in mean log-probability, to the question than to none; that of an
    empty answer is minus infinity. Raises JudgeError."""
    nothing: dict[str, Any] = {"prompt": "\n"}
    if path.endswith("/chat/completions"):
        nothing = {"messages": [{"role": "user", "content": ""}]}
    asked = await likelihood(post, path, request, answers)
    unasked = await likelihood(post, path, {"model": request.get("model"), **nothing}, answers)
    return [a - b if answer else a for answer, a, b in zip(answers, asked, unasked, strict=True)]


def vote_by(a: float, b: float) -> int:
    """A judge's vote, by how much likelier A and B are to the question: for one that the question explains against one
    that it does not. Between two good answers, or two bad ones, it is undecided, so that who answers well has nothing
    to lose to a rival who answers better, or in whatever way judges like best."""
    if (a > WORTHLESS) == (b > WORTHLESS):
        return VOTE_UNDECIDED
    return VOTE_A if a > WORTHLESS else VOTE_B


def _usage(answer: Any) -> int:
    try:
        return int(answer["usage"]["prompt_tokens"])
    except (KeyError, TypeError, ValueError):
        raise JudgeError("the engine does not say how many tokens a prompt has") from None


def _prompt_logprobs(answer: Any) -> list[float]:
    """Of every token of a prompt; the first, before which there is nothing, has 0."""
    try:
        tokens = answer.get("prompt_logprobs") or answer["choices"][0]["prompt_logprobs"]
        return [float(next(iter(token.values()))["logprob"]) if token else 0.0 for token in tokens]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise JudgeError("the engine does not tell the log-probabilities of a prompt") from None
