"""Server-sent events, and how many tokens the answers in them have.

Whoever meters an answer does it here, so that origin and executor count the same: users' streams, handed-over ones,
those that are resumed, payments. Tokens are what the engine's `usage` says, at most the bytes of text that came, as no
token is less; without it, one for each choice of an event that has text, or as many as its bytes have at least.
"""

import re
from typing import Any, NamedTuple

import orjson

from wwwserve.serving.boundary import answer_of, loads
from wwwserve.serving.market import MOST_TOKENS

DONE = b"[DONE]"  # data of the last event
LAST_EVENT = b"data: [DONE]\n\n"
MOST_EVENT_BYTES = 4 * 2**20
MOST_BYTES_PER_TOKEN = 16  # of text, on the average
LONGEST_TOKEN_BYTES = 256  # of one; vocabularies have some of many spaces
TEXTS = ("content", "reasoning", "reasoning_content", "refusal")  # of a message or its delta
PLAIN_TEXT = "text"  # of a choice without either
CALLS = ("tool_calls", "function_call")

_END = re.compile(rb"(?>\r\n|\r|\n)(?>\r\n|\r|\n)")
_LINE = re.compile(rb"\r\n|\r|\n")
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]*')  # JSON strings of these are their own text, if it is UTF-8
_TEXT_KEYS = tuple(b'"%b":' % name.encode() for name in (*TEXTS, PLAIN_TEXT))


class StreamError(ValueError):
    """Not a stream of events; the message says why."""


class Event(NamedTuple):
    """One event, or comments between events."""

    raw: bytes  # with its end
    data: bytes


class EventParser:
    """Cuts a stream into events, however its bytes come."""

    def __init__(self) -> None:
        self._rest = bytearray()  # of an event that is not complete

    @property
    def pending(self) -> int:
        """Bytes of an event that is not complete."""
        return len(self._rest)

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that are complete now. Raises StreamError for one that is too long."""
        rest, events, start = self._rest, [], 0
        if not rest and b"\r" not in chunk:  # as nearly all are
            *blocks, left = chunk.split(b"\n\n")
            rest += left
            self._check_size()
            return [Event(block + b"\n\n", _data(block)) for block in blocks]
        at = max(0, len(rest) - 3)
        rest += chunk
        while (match := _END.search(rest, at)) is not None:
            end = at = match.end()
            if end == len(rest) and rest.endswith(b"\r"):  # a line feed may belong to it
                break
            events.append(Event(bytes(rest[start:end]), _data(bytes(rest[start : match.start()]))))
            start = end
        del rest[:start]
        self._check_size()
        return events

    def _check_size(self) -> None:
        if len(self._rest) > MOST_EVENT_BYTES:
            raise StreamError(f"an event has more than {MOST_EVENT_BYTES} bytes")

    def end(self) -> list[Event]:
        """The stream is over: what is left, as an event."""
        rest = bytes(self._rest)
        self._rest.clear()
        return [Event(rest, _data(rest))] if rest else []


class Usage(NamedTuple):
    """Tokens as an engine tells them."""

    prompt: int
    output: int
    cached: int | None = None  # tokens of the prompt that were in the engine's prefix cache; None: it does not say


class AnswerMeter:
    """Meters one answer: `feed` and `end` for a stream, or `whole`."""

    def __init__(self, choices: int = MOST_TOKENS, calls: bool = True) -> None:
        """`choices` were asked for, and others do not count, nor do calls of tools unless `calls`: no client shows
        them."""
        self._choices, self._calls = choices, calls
        self.done = False  # the last event came
        self.complete = False  # nothing is missing: the last event came, or the end, after all choices were finished
        self.usage: Usage | None = None
        self.waited_s = 0.0  # for whoever reads it, which is not the time of who answers
        self.first_s: float | None = None  # when the first token of a stream went on, by the event loop's clock
        self._parser = EventParser()
        self._answer: dict[str, Any] | None = None
        self._pieces, self._text_bytes, self._call_bytes = 0, 0, 0
        self._open: set[object] = set()  # choices that began
        self._finished: set[object] = set()
        self._before, self._after = b"", b""  # of the text in an event like the last; empty: there is none

    @property
    def tokens(self) -> int:
        """Output tokens so far."""
        return self._at_least(MOST_BYTES_PER_TOKEN)

    @property
    def begun(self) -> bool:
        """Whether a stream has brought a token."""
        return self._pieces > 0

    @property
    def text_bytes(self) -> int:
        """Bytes of text so far, without calls of tools; 0 if there are any."""
        self._at_least(1)
        return 0 if self._call_bytes else self._text_bytes

    def exceeds(self, most: int) -> bool:
        """Whether it has more than so many tokens, beyond doubt."""
        return self._at_least(LONGEST_TOKEN_BYTES) > most

    def _at_least(self, bytes_per_token: int) -> int:
        """Output tokens so far; where no usage tells them, of at most so many bytes."""
        if self._answer is not None:  # counted when it is asked, as few do
            for choice in choices_of(self._answer):
                self._add(choice)
            self._answer = None
        if self.usage is None:
            return max(self._pieces, self._text_bytes // bytes_per_token)
        return min(self.usage.output, self._text_bytes + self._call_bytes)

    def _add(self, choice: dict[str, Any]) -> None:
        text, calls = written_bytes(choice) if self._counts(choice) else (0, 0)
        calls = calls if self._calls else 0
        self._text_bytes += text
        self._call_bytes += calls
        self._pieces += text + calls > 0

    def _counts(self, choice: dict[str, Any]) -> bool:
        index = choice.get("index", 0)
        return isinstance(index, int) and 0 <= index < self._choices

    def feed(self, chunk: bytes) -> bytes:
        """Count some of a stream; returns it up to the end of the last event. Raises StreamError."""
        if self.done:
            return b""
        if not self._parser.pending and self._count_alike(chunk):
            return chunk
        size = -self._parser.pending
        for event in self._parser.feed(chunk):
            size += len(event.raw)
            if self._count(event):
                return chunk[:size]
        return chunk

    def end(self) -> None:
        """The stream came to its end."""
        for event in self._parser.end():
            self._count(event)
        self.complete = self.done or (bool(self._open) and self._open == self._finished)

    def whole(self, body: bytes) -> None:
        """Count an answer that is not streamed. Raises StreamError for what is no object of JSON."""
        try:
            answer = answer_of(body)
        except ValueError as error:
            raise StreamError(f"the answer is no object of JSON: {error}") from None
        if answer.get("error") and not choices_of(answer):  # as what stands before an engine tells of its errors
            raise StreamError(f"it answers 200 with an error: {str(answer['error'])[:200]}")
        self.usage, self._answer, self.complete = usage_of(answer), answer, True  # its usage alone tells of tokens

    def _count(self, event: Event) -> bool:
        """Count an event; returns whether it was the last."""
        if not event.data or self._count_alike(event.raw):
            return False
        if event.data.strip() == DONE:
            self.done = self.complete = True
            return True
        told = _object(event.data)
        if told is not None:
            self._read(told)
            self._learn(event, told)
        return False

    def _read(self, told: dict[str, Any]) -> None:
        self.usage = usage_of(told) or self.usage
        for choice in choices_of(told):
            self._add(choice)
            index = choice.get("index", 0)
            if isinstance(index, int):
                self._open.add(index)
                if choice.get("finish_reason"):
                    self._finished.add(index)

    def _count_alike(self, raw: bytes) -> bool:
        """Count an event that differs from an earlier one in its text alone, as nearly all of a stream do."""
        before, after = self._before, self._after
        if not before or not (raw.startswith(before) and raw.endswith(after)):
            return False
        start, end = len(before), len(raw) - len(after)
        size = end - start
        if size < 0 or _PLAIN.fullmatch(raw, start, end) is None:
            return False
        if not raw.isascii():
            try:
                raw[start:end].decode()
            except UnicodeDecodeError:
                return False
        self._text_bytes += size
        self._pieces += size > 0
        return True

    def _learn(self, event: Event, told: dict[str, Any]) -> None:
        """Remember what is around the text of an event, where that is beyond doubt."""
        raw, choices = event.raw, choices_of(told)
        if len(choices) != 1 or told.get("usage") or b"\\" in raw:
            return
        choice = choices[0]
        part = choice.get("delta") or choice
        if choice.get("finish_reason") or not isinstance(part, dict) or any(part.get(name) for name in CALLS):
            return
        if not self._counts(choice):
            return
        keys = [key for key in _TEXT_KEYS if key in raw]
        one_line = raw.startswith(b"data:") and len(_LINE.findall(raw)) == 2
        if not one_line or len(keys) != 1 or raw.count(keys[0]) != 1:
            return
        key_end = raw.find(keys[0]) + len(keys[0])
        start = raw.find(b'"', key_end) + 1
        end = raw.find(b'"', start)
        if 0 < start < end and not raw[key_end : start - 1].strip() and end - start == sum(written_bytes(choice)):
            self._before, self._after = raw[:start], raw[end:]


def choices_of(told: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of an answer or an event."""
    choices = told.get("choices")
    return [each for each in choices if isinstance(each, dict)] if isinstance(choices, list) else []


def written_bytes(choice: dict[str, Any]) -> tuple[int, int]:
    """Bytes of all that a model wrote in a choice: of text, reasoning and parts; and of calls of tools at most, with
    what an API puts around them."""
    part = choice.get("delta") or choice.get("message") or choice
    if not isinstance(part, dict):
        return 0, 0
    size = calls = 0
    for name in (PLAIN_TEXT,) if part is choice else TEXTS:
        said = part.get(name)
        if isinstance(said, str):
            size += _size(said)
        elif isinstance(said, list):
            texts = (each.get("text") for each in said if isinstance(each, dict))
            size += sum(_size(text) for text in texts if isinstance(text, str))
    for name in CALLS:
        if part.get(name):
            try:
                calls += len(orjson.dumps(part[name]))
            except TypeError:  # nested deeper than orjson writes
                continue
    return size, calls


def _size(text: str) -> int:
    """Bytes of a text, of which most are ASCII and need no copy."""
    return len(text) if text.isascii() else len(text.encode())


def usage_of(told: dict[str, Any]) -> Usage | None:
    """What an answer or an event says of its tokens; None for nothing, or nonsense."""
    usage = told.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, output = usage.get("prompt_tokens", 0), usage.get("completion_tokens")
    if type(prompt) is not int or type(output) is not int or not (0 <= prompt <= MOST_TOKENS >= output >= 0):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(prompt, output, cached if type(cached) is int and 0 <= cached <= prompt else None)


def _object(told: bytes) -> dict[str, Any] | None:
    try:
        found = loads(told)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _data(block: bytes) -> bytes:
    """The data of an event, its lines without their end."""
    if block.startswith(b"data:") and b"\n" not in block and b"\r" not in block:
        return block[6:] if block[5:6] == b" " else block[5:]
    found = []
    for line in _LINE.split(block):
        name, _, value = line.partition(b":")
        if name == b"data":
            found.append(value[1:] if value.startswith(b" ") else value)
    return b"\n".join(found)
