"""Events are read as the standard has them, however their bytes come, and tokens counted alike by all."""

import asyncio
import json
from typing import Any

import orjson
import pytest

from wwwserve.serving.http.handover import WithoutUsage, choices_in, for_pay, limit_in_force, salted
from wwwserve.serving.http.reply import CompletionRequest, Reply, send_timed
from wwwserve.serving.http.sse import (
    MOST_EVENT_BYTES,
    AnswerMeter,
    EventParser,
    StreamError,
    Usage,
    usage_of,
)

N = 100
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
Choice = dict[str, Any]


def event(choices: list[Choice], end: bytes = b"\n\n", **more: Any) -> bytes:
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: " + orjson.dumps(head | {"choices": choices} | more) + end


def delta(text: str, reason: str | None = None, index: int = 0, key: str = "content") -> Choice:
    return {"index": index, "delta": {key: text}, "logprobs": None, "finish_reason": reason}


def usage(tokens: int) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens}}


def chat(words: list[str], end: bytes = b"\n\n", choices: int = 1, key: str = "content", last: bool = True) -> bytes:
    parts = [event([delta("", index=i)], end) for i in range(choices)]
    for k, word in enumerate(words):
        reason = "stop" if k == len(words) - 1 else None
        parts += [event([delta(word, reason, i, key)], end) for i in range(choices)]
    return b"".join(parts) + (b"data: [DONE]" + end if last else b"")


WORDS = [f"w{k} " for k in range(N)]
FOURS = ["".join(WORDS[k : k + 4]) for k in range(0, N, 4)]
STREAMS: dict[str, tuple[bytes, int]] = {
    "one token an event": (chat(WORDS), N),
    "usage at the end": (chat(WORDS, last=False) + event([], **usage(N)) + b"data: [DONE]\n\n", N),
    "several tokens an event, with usage": (chat(FOURS, last=False) + event([], **usage(N)) + b"data: [DONE]\n\n", N),
    "several tokens an event, usage in each": (
        b"".join(event([delta(four)], **usage(4 * k + 4)) for k, four in enumerate(FOURS)) + b"data: [DONE]\n\n", N
    ),
    "completions": (
        b"".join(event([{"index": 0, "text": word, "finish_reason": None}]) for word in WORDS) + b"data: [DONE]\n\n", N
    ),
    "text has 'data:'": (chat(["data: "] * N), N),
    "text has a last event": (chat(["data: [DONE]\n\n"] * N), N),
    "comments that hold 'data:'": (b": ping data:data: {}\n\n".join([b"", *[event([delta(w)]) for w in WORDS]])
                                   + b"data: [DONE]\n\n", N),
    "CRLF": (chat(WORDS, b"\r\n\r\n"), N),
    "CR": (chat(WORDS, b"\r\r"), N),
    "no last event": (chat(WORDS, last=False), N),
    "four choices": (chat(WORDS, choices=4), 4 * N),
    "20 prompts": (chat(WORDS, choices=20), 20 * N),
    "two choices in each event": (
        b"".join(event([delta(word), delta(word, index=1)]) for word in WORDS) + b"data: [DONE]\n\n", 2 * N
    ),
    "reasoning": (chat(WORDS, key="reasoning"), N),
    "reasoning_content": (chat(WORDS, key="reasoning_content"), N),
    "calls of tools": (
        b"".join(event([{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": "x"}}]}}])
                 for _ in range(N)) + b"data: [DONE]\n\n", N
    ),
    "escapes, other scripts": (chat(['"\\\n', "日本", "🚀"] * 30), 90),
    "a usage that claims more than was written": (
        event([delta("a word")]) + event([], **usage(4000)) + b"data: [DONE]\n\n", 6
    ),
    "one word and a comment of 4000 'data:'": (
        event([delta("word")]) + b": " + b"data:" * 4000 + b"\n\ndata: [DONE]\n\n", 1
    ),
    "a usage that is nonsense": (
        event([delta("word")]) + event([], usage={"completion_tokens": -5}) + b"data: [DONE]\n\n", 1
    ),
    "a call of a tool that is nested too deep": (
        b'data: {"choices": [{"delta": {"content": "a", "tool_calls": ' + b"[" * 500 + b"]" * 500 + b"}}]}\n\n"
        + b"data: [DONE]\n\n", 1
    ),
    "events that are nothing": (b"data: 1\n\ndata: {\"choices\": 3}\n\ndata: \xff\n\n" + chat(WORDS), N),
    "data in two lines": (b'data: {"choices": [{"delta":\ndata: {"content": "a"}}]}\n\ndata: [DONE]\n\n', 1),
}  # fmt: skip


def pieces(body: bytes, size: int) -> list[bytes]:
    return [body[k : k + size] for k in range(0, len(body), size)]


def metered(chunks: list[bytes]) -> AnswerMeter:
    meter = AnswerMeter()
    for chunk in chunks:
        meter.feed(chunk)
    meter.end()
    return meter


def by_event(body: bytes) -> list[bytes]:
    parser = EventParser()
    return [each.raw for each in parser.feed(body) + parser.end()]


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 30, 0])
def test_a_stream_has_as_many_tokens_as_were_generated_however_it_comes(name: str, size: int) -> None:
    body, tokens = STREAMS[name]
    meter = metered(pieces(body, size) if size else by_event(body))
    assert meter.tokens == tokens
    assert meter.complete


@pytest.mark.parametrize("name", STREAMS)
def test_the_short_way_of_counting_counts_as_the_long_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = by_event(STREAMS[name][0])
    short = metered(chunks)
    monkeypatch.setattr(AnswerMeter, "_learn", lambda *arguments: None)
    long = metered(chunks)
    assert (short.tokens, short._text_bytes, short.done) == (long.tokens, long._text_bytes, long.done)


@pytest.mark.parametrize(
    "event_like",
    [
        event([delta('a","role":"b')]).replace(b'\\"', b'"'),
        event([delta("one")]) + event([delta("two")]),
        event([delta("a\nb")]),
        event([delta("x")]).replace(b'"x"', b'"x\xff"'),
        event([delta("x")]).replace(b'"x"', b'"x\x01"'),
        event([delta("x", "stop")]),
        event([delta("x"), delta("y", index=1)]),
    ],
)
def test_events_that_only_look_alike_are_read(event_like: bytes) -> None:
    chunks = [event([delta("first")]), event_like]
    alike, apart = metered(chunks), AnswerMeter()
    for chunk in chunks:
        apart._before = b""
        apart.feed(chunk)
    assert (alike.tokens, alike._text_bytes) == (apart.tokens, apart._text_bytes)


def test_a_stream_that_stops_in_the_middle_is_not_complete() -> None:
    meter = metered([event([delta("a")]), event([delta("b")])])
    assert meter.tokens == 2 and not meter.complete
    assert not metered([]).complete
    assert not metered([event([delta("a", "stop"), delta("b", index=1)])]).complete


def test_nothing_counts_after_the_last_event() -> None:
    meter = AnswerMeter()
    body = event([delta("a")]) + b"data: [DONE]\n\n"
    assert meter.feed(body + event([delta("b")])) == body
    assert meter.done and meter.tokens == 1
    assert meter.feed(event([delta("b")])) == b"" and meter.tokens == 1


def test_the_last_event_may_come_in_pieces() -> None:
    meter = AnswerMeter()
    assert [meter.feed(each) for each in (b"data: [DO", b"NE]\n", b"\nmore")] == [b"data: [DO", b"NE]\n", b"\n"]
    assert meter.done


def test_what_is_surely_longer_than_was_paid_for_is_told() -> None:
    meter = AnswerMeter()
    meter.feed(event([delta(" " * 200)]))
    assert meter.tokens == 12 and not meter.exceeds(1)  # it may be one token
    meter.feed(event([delta("x" * 100)]) + event([delta("y")]))
    assert meter.exceeds(2) and not meter.exceeds(3)
    meter.feed(event([], **usage(2)))
    assert meter.tokens == 2 and not meter.exceeds(2)


def test_an_event_without_end_is_an_error() -> None:
    meter, piece = AnswerMeter(), b"x" * 65536
    for _ in range(MOST_EVENT_BYTES // len(piece)):
        meter.feed(piece)
    with pytest.raises(StreamError, match="has more than"):
        meter.feed(b"x")


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b"data: a\n\ndata:b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\ndata: b\r\n\r\n", [b"a\nb"]),
        (b"event: x\ndata: a\nid: 1\n\n", [b"a"]),
        (b"\n\n: note\n\ndata\n\ndata: a", [b"a"]),
        (b"data: a\r\rdata: b\n\r\n", [b"a", b"b"]),
    ],
)
def test_events_are_cut_as_the_standard_says(body: bytes, events: list[bytes]) -> None:
    for size in (1, 2, 3, 100):
        parser = EventParser()
        found = [each for piece in pieces(body, size) for each in parser.feed(piece)] + parser.end()
        assert [each.data for each in found if each.data] == events
        assert b"".join(each.raw for each in found) == body


MESSAGE = {"role": "assistant", "content": "".join(WORDS)}


@pytest.mark.parametrize(
    ("choices", "counted", "tokens"),
    [
        ([{"index": 0, "message": MESSAGE}], N, N),
        ([{"index": 0, "text": "".join(WORDS)}], N, N),
        ([{"message": {"content": "42", "reasoning": "".join(WORDS)}}], N, N),
        ([{"message": {"content": "42", "reasoning_content": "".join(WORDS)}}], N, N),
        ([{"message": {"content": [{"type": "text", "text": "".join(WORDS)}]}}], N, N),
        ([{"message": {"content": None, "tool_calls": [{"function": {"arguments": "".join(WORDS)}}]}}], N, N),
        ([{"index": k, "text": "".join(WORDS)} for k in range(20)], 20 * N, 20 * N),
        ([{"message": {"content": "word"}}], 4000, 4),
        ([{"message": {"content": "word"}}], -1, 1),
        ([{"message": {"content": "word"}}], None, 1),
        ([{"message": {"content": "word" * 40}}], None, 10),
    ],
)
def test_a_whole_answer_has_as_many_tokens_as_it_says_and_can_have(
    choices: list[Choice], counted: int | None, tokens: int
) -> None:
    meter = AnswerMeter()
    meter.whole(orjson.dumps({"choices": choices} | ({} if counted is None else usage(counted))))
    assert meter.tokens == tokens and meter.complete


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b"1"])
def test_what_is_no_answer_is_an_error(body: bytes) -> None:
    with pytest.raises(StreamError):
        AnswerMeter().whole(body)


# What is changed of a request that is paid for.


@pytest.mark.parametrize(
    ("path", "request_", "limit"),
    [
        (CHAT, {}, None), (COMPLETION, {}, 16), (COMPLETION, {"max_tokens": None}, None), (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_tokens": 100.0}, 100), (CHAT, {"max_tokens": 9, "max_completion_tokens": 4}, 4),
        (COMPLETION, {"max_tokens": 9, "max_completion_tokens": 4}, 9), (COMPLETION, {"max_completion_tokens": 4}, 16),
        (CHAT, {"max_tokens": True}, None), (CHAT, {"max_tokens": 0}, None), (CHAT, {"max_tokens": 1.5}, None),
    ],
)  # fmt: skip
def test_limits_are_read_as_engines_read_them(path: str, request_: dict[str, Any], limit: int | None) -> None:
    assert limit_in_force(path, request_) == limit


@pytest.mark.parametrize(
    ("request_", "choices"),
    [
        ({}, 1), ({"n": 4}, 4), ({"n": None}, 1), ({"n": 3.0}, 3), ({"n": "x"}, 1), ({"prompt": ["a"] * 20}, 20),
        ({"prompt": ["a"] * 20, "n": 2}, 40), ({"prompt": [1, 2, 3]}, 1), ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": []}, 1), ({"prompt": "a", "n": 10**9}, 1),
    ],
)  # fmt: skip
def test_choices_are_those_of_all_prompts(request_: dict[str, Any], choices: int) -> None:
    assert choices_in(request_) == choices


@pytest.mark.parametrize("body", [b"{}", b' { "a": 1 } \n', b'{"a":{},"cache_salt":"mine"}', b'{"cache_salt":null}'])
def test_a_request_is_salted_whatever_it_has(body: bytes) -> None:
    changed = salted(body, "s")
    assert orjson.loads(changed) == orjson.loads(body) | {"cache_salt": "s"} == json.loads(changed)


def test_a_stream_that_is_paid_for_tells_its_usage_and_has_a_limit() -> None:
    completion = CompletionRequest(CHAT, b'{"model":"m"}', "m", True)
    changed, hidden = for_pay(completion, 50)
    assert hidden and orjson.loads(changed.body) == {
        "model": "m", "stream_options": {"include_usage": True}, "max_tokens": 50
    }  # fmt: skip
    same = completion._replace(body=b'{"stream_options": {"include_usage": true}, "max_tokens": 3}')
    assert for_pay(same, 50) == (same, False)
    deep = completion._replace(body=b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}")
    assert for_pay(deep, 50) == (deep, False)
    assert for_pay(completion._replace(stream=False), None) == (completion._replace(stream=False), False)


class Kept(Reply):
    """What a user gets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = b""

    async def start(self, status: int, content_type: str) -> None:
        self.started = True

    async def pass_on(self, chunk: bytes) -> None:
        self.body += chunk

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        self.started, self.body = True, body


@pytest.mark.parametrize("size", [1, 9, 1000, 1 << 30])
def test_a_user_does_not_see_the_usage_that_was_not_asked_for(size: int) -> None:
    async def scene() -> bytes:
        kept = Kept()
        reply = WithoutUsage(kept)
        await reply.start(200, "text/event-stream")
        assert reply.started
        for piece in pieces(before + event([], **usage(3)) + b"data: [DONE]\n\n", size):
            await reply.pass_on(piece)
        return kept.body

    before = event([delta('"choices":[]')]) + event([delta("x")], usage=None) + event([], error={"message": "no"})
    assert asyncio.run(scene()) == before + b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("details", "cached"),
    [({"cached_tokens": 5}, 5), ({"cached_tokens": 8}, None), ({"cached_tokens": -1}, None),
     ({"cached_tokens": True}, None),
     ({"cached_tokens": None}, None), ({}, None), (None, None), ([5], None)],
)  # fmt: skip
def test_cached_tokens_are_read_where_they_can_be(details: object, cached: int | None) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": details}
    assert usage_of({"usage": usage}) == Usage(7, 3, cached)


def test_the_time_for_which_a_reader_keeps_an_answer_waiting_is_counted() -> None:
    async def scene() -> float:
        meter = AnswerMeter()
        for _ in range(2):
            await send_timed(asyncio.sleep(0.05), meter)
        return meter.waited_s

    assert 0.1 <= asyncio.run(scene()) < 1.0
