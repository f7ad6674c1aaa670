"""An engine on virtual time whose answers show whose request it was: cheap, and as dishonest as it is told to be.

A prompt begins with the word of its request, of four bytes, and the answer is that word again and again, one a token.
So whoever reads an answer sees whether it is another's, and how many tokens there are whatever is said of them.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

import orjson

from wwwserve.agents.hardware import Profile
from wwwserve.eval.live.simulation.engine import VirtualEngine
from wwwserve.eval.live.simulation.loop import VirtualLoop, current
from wwwserve.eval.live.simulation.response import Incoming
from wwwserve.serving.engine.adapter import Load, Sent

WORD_BYTES = 4
MARK = b"~"  # begins a word, and is nowhere else in an answer
LOOK_S = 0.2  # between two events of a stream
PREFILL_S, PER_TOKEN_S = 0.05, 0.012
EVENTS, JSON = b"text/event-stream; charset=utf-8", b"application/json"
JUNK = "junk"  # in place of a word
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def word(request: int) -> str:
    """That of a request, up to 1296 of them."""
    return f"~{DIGITS[request // 36]}{DIGITS[request % 36]} "


class WordServer:
    """An engine that runs `places` requests at once; others wait in order. It outlives the nodes that use it."""

    def __init__(self, loop: VirtualLoop, places: int, model: str) -> None:
        self.loop, self.places, self.models = loop, places, (model,)
        self.slowness = 1.0  # of all that it does; infinite: it stands still
        self.billed = 1.0  # tokens in its usage for each that it wrote
        self.letters = False  # an event for each letter of its text
        self.junk = False  # it answers with words of nobody
        self.fair: frozenset[str] = frozenset()  # words of requests that it serves as it should all the same
        self.up = True
        self.read = self.written = 0  # tokens of prompts and answers that a model computed
        self.running: dict[Answer, None] = {}
        self.waiting: deque[Answer] = deque()

    def put(self, answer: "Answer") -> None:
        """A request arrives."""
        self.waiting.append(answer)
        self._admit()

    def withdraw(self, answer: "Answer") -> None:
        """Nobody waits for it any more, or it is done."""
        if answer in self.running:
            del self.running[answer]
        elif answer in self.waiting:
            self.waiting.remove(answer)
        self._admit()

    def crash(self) -> None:
        """It dies: what runs breaks off, and nobody is there until `up` again."""
        self.up = False
        there = [*self.running, *self.waiting]
        self.running.clear()
        self.waiting.clear()
        for answer in there:
            answer.break_off()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.places:
            answer = self.waiting.popleft()
            self.running[answer] = None
            answer.run()

    def load(self) -> Load:
        """At this instant."""
        kv = sum(each.prompt + each.shown for each in self.running)
        return Load(float(len(self.running)), float(len(self.waiting)), float(kv), 0.0)

    def post(self, path: str, body: bytes) -> "Answer":
        """A request to it."""
        return Answer(self, body)


class Answer(Incoming):
    """A request to the engine and its response: a context that gives the response."""

    def __init__(self, server: WordServer, body: bytes) -> None:
        super().__init__(server.loop)
        self.server, self.body = server, body
        self.prompt = self.output = self.shown = 0
        self.streams = self.fair = False
        self._word = ""
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> "Answer":
        """The response, once its head is there. Raises OSError."""
        process = current()
        if not self.server.up or (process is not None and not process.alive):
            raise ConnectionRefusedError("the engine is down")
        self.read_request()
        self.fair = self._word in self.server.fair
        if self.server.junk and not self.fair:
            self._word = JUNK
        if self.streams:
            self.begin(200, [(b"content-type", EVENTS)])
        self.server.put(self)
        try:
            await self.wait_for_head()
        except BaseException:
            self.close()
            raise
        return self

    def read_request(self) -> None:
        """What is asked for."""
        request = orjson.loads(self.body)
        text = "".join(each["content"] for each in request["messages"])
        most = request.get("max_completion_tokens") or request["max_tokens"]
        self.prompt, self.output = len(text) // WORD_BYTES, min(most, request["min_tokens"])
        self.streams, self._word = bool(request.get("stream")), text[:WORD_BYTES]

    def close(self) -> None:
        """Hang up."""
        self._stop()
        self.server.withdraw(self)
        self.unread.clear()
        self.ended = False
        self.fail(ConnectionAbortedError("the connection was closed"))

    def break_off(self) -> None:
        """The engine dies."""
        self._stop()
        self.fail(ConnectionResetError("the engine died"))

    def run(self) -> None:
        """It is its turn."""
        self._again(PREFILL_S + self.prompt * PER_TOKEN_S / 20)

    def _again(self, after_s: float) -> None:
        self._timer = self.loop.outside(min(after_s * (1.0 if self.fair else self.server.slowness), 1e6), self._write)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _write(self) -> None:
        """Some tokens are there."""
        first, new = self.shown == 0, min(self.output - self.shown, max(1, round(LOOK_S / PER_TOKEN_S)))
        self.shown += new
        if self._word != JUNK:  # which costs nothing to write
            self.server.read += self.prompt if first else 0
            self.server.written += new
        last = self.shown >= self.output
        if last:
            self.server.withdraw(self)
        else:
            self._again(new * PER_TOKEN_S)
        if self.streams:
            self.add(b"".join(self._events(self._word * new, last)), last)
        elif last:
            choice = {"index": 0, "message": {"role": "assistant", "content": self._word * self.output}}
            body = orjson.dumps({"choices": [choice | {"finish_reason": "length"}], "usage": self._usage()})
            self.begin(200, [(b"content-type", JSON), (b"content-length", b"%d" % len(body))])
            self.add(body, True)

    def _events(self, text: str, last: bool) -> Iterator[bytes]:
        for part in text if self.server.letters and not self.fair else (text,):
            event: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": part}, "finish_reason": None}]}
            yield b"data: " + orjson.dumps(event) + b"\n\n"
        event = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length" if last else None}]}
        yield b"data: " + orjson.dumps(event | {"usage": self._usage()}) + b"\n\n"
        if last:
            yield b"data: [DONE]\n\n"

    def _usage(self) -> dict[str, int]:
        billed = 1.0 if self.fair else self.server.billed
        tokens, prompt = int(self.shown * billed), int(self.prompt * billed)
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


class WordEngine(VirtualEngine):
    """Before a `WordServer`."""

    def __init__(self, server: WordServer, profile: Profile) -> None:
        super().__init__(server, profile)
        self.server = server

    def progress(self, there: Collection[Sent], now_s: float) -> Iterator[tuple[Sent, float]]:
        """See `serving.engine.adapter.Engine`; exact."""
        for sent in there:
            if sent.exchange in self.server.running:
                yield sent, float(sent.exchange.shown)
