"""Hostile input to a node's boundary, in process and guided by coverage: `wwwserve hostile --guided`.

A real node on virtual time, without sockets, gets what users, peers and their engines may send: requests, signed as
they should be or not, messages of payment, duels and adverts, and answers. Inputs that reach a line of `serving/` that
none has reached before are kept, and further ones are made of them, as AFL does it. Lines are traced in functions that
still have some that were never reached, so that an input costs little once few are left.

A fault is an error that nobody handled: an answer of 500, a trace of a Python stack in an answer, an error that is
logged, or one that a reader raises which it does not announce. So is a turn of the event loop in which more functions
are called than take 50 ms: how long a turn takes depends on the machine and on being traced, how much is done does not.
"""

import asyncio
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple, cast

import msgspec
import orjson

import wwwserve.serving
from wwwserve.agents.protocol import LATENESS, MICRO
from wwwserve.agents.rules import Rule
from wwwserve.eval.live import hostile_inputs as inputs
from wwwserve.eval.live.simulation import loop as virtual
from wwwserve.eval.live.simulation.loop import VirtualLoop
from wwwserve.eval.live.simulation.network import MemoryNetwork
from wwwserve.eval.live.world.engine import Answer, WordEngine
from wwwserve.eval.live.world.nodes import MODEL, Agreed, Network, Node, Strategy
from wwwserve.serving.boundary import BoundaryError, head_line, promise_of
from wwwserve.serving.delegation import PEER_PREFIX, PROMPT, TARIFF
from wwwserve.serving.duel.judge import text_of
from wwwserve.serving.duel.messages import ATTEST_PATH, JUDGE_PATH
from wwwserve.serving.engine.adapter import Engine
from wwwserve.serving.engine.pool import Pool
from wwwserve.serving.http.asgi import WATCH
from wwwserve.serving.http.keys import tagged
from wwwserve.serving.http.messages import SIGNATURE, Messages
from wwwserve.serving.http.sse import AnswerMeter, StreamError
from wwwserve.serving.ledger.accounts import ESCROW, LEDGER_PATH
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.exchange import Vouching
from wwwserve.serving.ledger.statements import (
    GOING,
    NOTHING_CAME,
    PART,
    WHOLE,
    Receipt,
    Served,
    Signed,
    State,
    StatementError,
    Vouch,
    link,
    sign,
)
from wwwserve.serving.ledger.warm_up import warm_up as ledger_warm_up
from wwwserve.serving.local_nodes import rss_mb
from wwwserve.serving.membership.heartbeat import BEAT_PATH, StaticMembership
from wwwserve.serving.node import rarely_collect, warm_up

TRACED = str(Path(wwwserve.serving.__file__).resolve().parent)
TRACED_CALLS = 20_000  # of a function without news, after which what it has left is taken to be out of reach
FRESH = 0.2  # of inputs, that are made and not of others
KEPT = 4096  # inputs of which others are made
ANSWER_S = 300.0  # of virtual time
MOST_CALLS = 10_000  # of functions in one turn of the event loop, each of which takes 5 µs with what it does, or less
ADVERTISED = "http://127.0.0.1:9"  # where most adverts of `hostile_inputs` say that the peer is
TRACES = (b"Traceback", b'File "', b"site-packages")
TURN = asyncio.Handle._run.__code__  # with which each turn begins
USER, PEER, READER = "user", "peer", "reader"  # who sends it; or what a peer answers


class Input(NamedTuple):
    """Something from outside: `content` to a path, or for a reader, with headers, which a peer signs."""

    who: str
    path: str
    content: bytes
    headers: tuple[tuple[str, str], ...] = ()


class Coverage:
    """Lines of `serving/` that were reached, and calls of Python functions in a turn of the event loop."""

    def __init__(self) -> None:
        self.lines: set[tuple[CodeType, int]] = set()
        self.news = False
        self.calls = self.most_calls = 0  # in this turn, and in the longest one since that was reset
        self._left: dict[CodeType, set[int]] = {}  # lines of each function that were not
        self._idle: Counter[CodeType] = Counter()

    def __enter__(self) -> "Coverage":
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        self.calls = 1 if code is TURN else self.calls + 1
        if self.calls > self.most_calls:
            self.most_calls = self.calls
        left = self._left.get(code)
        if left is None:
            here = os.path.realpath(code.co_filename).startswith(TRACED)
            left = self._left[code] = {line for _, _, line in code.co_lines() if line is not None} if here else set()
        if not left:
            return None
        self._idle[code] += 1
        if self._idle[code] > TRACED_CALLS:
            left.clear()
            return None
        return self._reached

    def _reached(self, frame: FrameType, event: str, arg: object) -> Any:
        code, line = frame.f_code, frame.f_lineno
        left = self._left[code]
        if line in left:
            left.remove(line)
            self.lines.add((code, line))
            self.news = True
            self._idle[code] = 0
        return self._reached


class AnyAnswer(Answer):
    """An engine's answer of one token, whatever is asked."""

    def read_request(self) -> None:
        """See `Answer`."""
        with suppress(ValueError):
            asked = orjson.loads(self.body)
            self.streams = isinstance(asked, dict) and bool(asked.get("stream"))
        self.prompt, self.output, self._word = 1, 1, "tok "


class AnyEngine(WordEngine):
    """One that answers everything."""

    def post(self, path: str, body: bytes, headers: Any = None) -> AnyAnswer:
        """See `serving.engine.adapter.Engine`."""
        return AnyAnswer(self.server, body)


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.name.startswith("asyncio"):
            self.texts.append(self.format(record))


class Seen(NamedTuple):
    """What came of all inputs."""

    inputs: int
    statuses: dict[str, Counter[str]]
    faults: list[str]
    lines: int  # of `serving/` that were reached
    kept: int
    longest_s: float  # CPU time of one input
    longest: str
    calls: int  # of functions in one turn of the event loop, at most
    busiest: str  # the input of that turn
    rss_mb: tuple[float, float]
    seconds: float


class Boundary:
    """A node, and a peer of it that is gone but for its key."""

    def __init__(self, loop: VirtualLoop, seed: int) -> None:
        self.loop, self.random = loop, random.Random(f"hostile {seed}")
        agreed = Agreed(LATENESS, 1000 * MICRO, 10_000 * MICRO, 5 * MICRO, duels=0.5)  # for many that are taken
        network = MemoryNetwork(loop, seed=seed)
        self.world = Network(loop, network, seed, agreed, [Strategy(), Strategy()], [4, 4], ["single", "single"])
        self.node, self.peer = self.world.nodes

    async def begin(self) -> None:
        """Both start, open their channel, and the peer goes."""
        for each in self.world.nodes:
            each.boot()
        await asyncio.sleep(5.0)
        node, peer = self.node, self.peer
        assert node.ledger.is_reconciled(peer.name)
        peer.host.crash()
        dispatcher = node.dispatcher
        engine = cast(Engine, AnyEngine(node.server, node.config.engine_profile()))
        dispatcher.engine = dispatcher.execution.engine = Pool([engine], dispatcher.provider.own)
        listed = StaticMembership(
            {peer.name: ADVERTISED}, node.identity, dispatcher.client.transport, self.loop.time, time.time
        )  # fmt: skip
        listed._heard, listed._gone = dispatcher.heard, lambda name: None
        dispatcher.membership.received = listed.received  # type: ignore[method-assign]
        messages, stranger = (
            Messages(identity, lambda name: True, self.loop.wall_s)
            for identity in (peer.identity, inputs.DUELISTS[0])
        )  # fmt: skip
        self.made = inputs.Made(self.random, messages, stranger, node.name, dispatcher.messages.run)
        channel = node.ledger.books.channels[peer.name]
        self.tokens = [channel.digest.encode(), node.name.encode(), peer.name.encode(), MODEL.encode()]

    async def take(self, given: Input) -> str:
        """What comes of an input: a status, or what a reader finds. Raises what nobody handled."""
        if given.who == READER:
            read = READERS[given.path]
            return await read(self.node, self.peer, given.content)
        headers = dict(given.headers)
        if given.who == PEER:
            await asyncio.sleep(0.001)  # as many as are looked at
            sealed = self.made.messages.sign(self.node.name, self.made.run, given.path, headers, given.content)
            headers[SIGNATURE] = sealed
        elif given.path == BEAT_PATH:
            await asyncio.sleep(0.2)
        said: list[dict[str, Any]] = []
        asked = [{"type": "http.request", "body": given.content, "more_body": False}]
        gone = self.loop.create_future()

        async def receive() -> Any:
            return asked.pop() if asked else await gone

        async def send(message: Any) -> None:
            said.append(message)

        raw = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]
        address = f"10.{self.random.randrange(256)}.{self.random.randrange(256)}.{self.random.randrange(256)}"
        scope = {
            "type": "http", "method": "POST", "path": given.path, "raw_path": given.path.encode(), "query_string": b"",
            "headers": raw, "client": (address, 1), "http_version": "1.1", WATCH: lambda hung_up: None,
        }  # fmt: skip
        async with asyncio.timeout(ANSWER_S):
            await self.node.app(scope, receive, send)
        body = b"".join(each.get("body", b"") for each in said[1:])
        status = str(said[0]["status"]) if said else "none"
        if status == "500" or any(trace in body for trace in TRACES):
            raise AssertionError(f"it answers {status}: {body[:300]!r}")
        return status

    # Inputs.

    def fresh(self) -> Input:
        """One that is made, not of another."""
        r, m = self.random, self.made
        match r.randrange(8):
            case 0:
                path = r.choice([inputs.CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/tokenize"])
                return Input(USER, path, inputs.body(r).replace(inputs.MODEL.encode(), MODEL.encode()))
            case 1 | 2:
                terms = [(PROMPT, r.choice(["12", "1", "0"])), (TARIFF, self._tariff()), (ESCROW, self._escrow())]
                asked = inputs.asking() | {"model": MODEL, "stream": r.random() < 0.5}
                if asked["stream"]:
                    asked["stream_options"] = {"include_usage": True}
                if r.random() < 0.5:
                    inputs.spoil(r, asked)
                path = PEER_PREFIX + r.choice([inputs.CHAT, "/v1/completions"])
                return Input(PEER, path, orjson.dumps(asked), tuple(terms))
            case 3 | 4:
                message = inputs.payment(m) if r.random() < 0.5 else msgspec.to_builtins(self._vouching())
                for _ in range(r.choice([0, 0, 1])):
                    inputs.spoil(r, message)
                return Input(PEER, LEDGER_PATH, orjson.dumps(message))
            case 5:
                path = r.choice([JUDGE_PATH, ATTEST_PATH])
                message = inputs.duel(m, path)
                for _ in range(r.choice([0, 0, 1])):
                    inputs.spoil(r, message)
                terms = [(TARIFF, self._tariff()), (ESCROW, self._escrow())]
                return Input(PEER, path, orjson.dumps(message), tuple(terms))
            case 6:
                return Input(USER, BEAT_PATH, inputs.adverts(m).partition(b"\r\n\r\n")[2])
            case _:
                return Input(READER, r.choice(list(READERS)), r.choice(ANSWERS))

    def _vouching(self) -> Vouching:
        """A voucher of receipts of what was taken, one of which may pay more, or be of something else."""
        r, me, channel = self.random, self.peer.identity, self.node.ledger.books.channels[self.peer.name]
        head, receipts = channel.paid_head, list[Receipt]()
        for id in r.sample(sorted(channel.taken), min(len(channel.taken), r.randrange(3))):
            taken = channel.taken[id]
            came = r.choice([NOTHING_CAME, Served("", 0, 0, 1, 1, r.choice([WHOLE, PART, GOING]))])
            due = r.choice([0, 0, 1, taken.terms.amount + 1])
            receipts.append(Receipt(id, taken.request, taken.terms, r.choice([None, taken.promise]), came, due))
            head = link(head, receipts[-1])
        total = channel.paid_total + sum(each.due for each in receipts)
        number = channel.paid_number + len(receipts)
        state = State(channel.digest, me.name, self.node.name, number, total, head)
        return Vouching(Vouch(Signed(state, sign(me, "voucher", state)), channel.paid_number + 1, tuple(receipts)))

    def _tariff(self) -> str:
        tariffs = self.node.dispatcher.accounts.tariffs if self.node.dispatcher.accounts is not None else ()
        right = " ".join(map(str, tariffs[-1])) if tariffs else "1 1 1"
        return self.random.choice([right, right, right, "1 1 1", "-1 1 1", "", "1 1 " + "9" * 20])

    def _escrow(self) -> str:
        id, r = self.node.ledger.books.channels[self.peer.name].taken_id + 1, self.random
        return r.choice([f"v3 {id} 5000", f"v3 {id} 5000", f"v3 {id} 5000", f"v3 {id} 1", "v3 0 -1", "v9 1 1", "x"])

    def child(self, of: Input) -> Input:
        """One that differs a little from another."""
        r, content = self.random, of.content
        try:
            tree = orjson.loads(content) if r.random() < 0.6 else None
        except ValueError:
            tree = None
        if isinstance(tree, dict | list) and tree:
            for _ in range(r.choice([1, 1, 2, 4])):
                inputs.spoil(r, tree)
            with suppress(TypeError):  # whole numbers of more than 64 bits, which orjson reads and does not write
                content = orjson.dumps(tree)
        elif r.random() < 0.2:
            at = r.randrange(len(content) + 1)
            content = content[:at] + r.choice(self.tokens) + content[at:]
        else:
            content = inputs.mutated(r, content)
        headers = of.headers
        if headers and r.random() < 0.3:
            k = r.randrange(len(headers))
            value = inputs.mutated(r, headers[k][1].encode("latin-1", "replace")).decode("latin-1")
            headers = (*headers[:k], (headers[k][0], "".join(c for c in value if c not in "\r\n\0")), *headers[k + 1 :])
        if of.path == BEAT_PATH and of.who == USER and r.random() < 0.8:  # signed, as far as it can be
            me = self.peer.identity
            advert = content[107:] if content[:43].decode("latin-1") == me.name else content
            content = me.name.encode() + me.sign(tagged("advert", advert)) + advert
        return Input(of.who, of.path, content, headers)


# What a peer's answers, and its engine's, are read by: each may raise what it announces.


async def _stream(node: Node, peer: Node, content: bytes) -> str:
    meter = AnswerMeter(choices=2)
    with suppress(StreamError):
        for k in range(0, len(content), 7):
            meter.feed(content[k : k + 7])
        meter.end()
    return f"{meter.complete}"


async def _whole(node: Node, peer: Node, content: bytes) -> str:
    meter = AnswerMeter()
    try:
        meter.whole(content)
    except StreamError:
        return "refused"
    return f"{meter.tokens >= 0} {meter.text_bytes >= 0}"


async def _head(node: Node, peer: Node, content: bytes) -> str:
    first, _, second = content.partition(b" ")
    with suppress(BoundaryError):
        promise_of(first.decode("latin-1"), second.decode("latin-1"))
    try:
        head_line(content)
    except BoundaryError:
        return "refused"
    return "read"


async def _reply(node: Node, peer: Node, content: bytes) -> str:
    try:
        await node.ledger.replied(peer.name, content)
    except (StatementError, LedgerError):
        return "refused"
    return "read"


async def _judged(node: Node, peer: Node, content: bytes) -> str:
    return str(bool(await text_of(inputs.CHAT, content[:1] == b"d", content)))


READERS: dict[str, Callable[[Node, Node, bytes], Awaitable[str]]] = {
    "stream": _stream, "answer": _whole, "head": _head, "ledger": _reply, "judged": _judged,
}  # fmt: skip
ANSWERS = (
    b'data: {"choices": [{"index": 0, "delta": {"content": "tok"}, "finish_reason": null}]}\n\n' * 2
    + b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\ndata: [DONE]\n\n',
    b'{"choices": [{"index": 0, "message": {"content": "tok", "tool_calls": [{"a": 1}]}}], "usage": '
    b'{"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}}',
    b'{"status": 200, "type": "application/json"}\n', b"1.5 0.02",
    b'{"type":"acknowledged","number":1,"signature":"AA=="}', b'{"type":"held","voucher":null}',
    b'{"type":"declined","reason":"no"}',
    b'{"type":"known","receipts":[],"number":0,"requests":[],"stake":""}',
)  # fmt: skip


async def _attack(loop: VirtualLoop, count: int, seed: int) -> Seen:
    boundary, coverage, errors = Boundary(loop, seed), Coverage(), _Errors()
    warm_up(boundary.node.config, Rule(boundary.node.policy))  # as before a node serves
    ledger_warm_up()
    await boundary.begin()
    loggers = [logging.getLogger("wwwserve"), logging.getLogger("asyncio")]
    for each in loggers:
        each.setLevel(logging.ERROR)
        each.addHandler(errors)
        each.propagate = False
    statuses: dict[str, Counter[str]] = {}
    faults, kept, r = list[str](), list[Input](), boundary.random
    longest, longest_s, first_mb, start_s = "", 0.0, 0.0, time.monotonic()
    busiest, calls, due = "", 0, max(1, count // 100)  # before that much is done once
    rarely_collect()
    for k in range(count):
        if k == max(1, count // 10):
            first_mb = rss_mb(os.getpid())
        given = boundary.fresh() if not kept or r.random() < FRESH else boundary.child(r.choice(kept))
        coverage.news, coverage.calls, coverage.most_calls, began_s = False, 0, 0, time.thread_time()
        try:
            with coverage:
                came = await boundary.take(given)
        except Exception as error:
            came = "fault"
            faults.append(f"{given.who} {given.path}: {error!r}: {given.content[:300]!r} {given.headers}")
        took_s = time.thread_time() - began_s
        what = f"{given.who} {given.path}: {given.content[:100]!r}"
        if took_s > longest_s and k > due:
            longest, longest_s = what, took_s
        if coverage.most_calls > calls and k > due:
            busiest, calls = what, coverage.most_calls
        if coverage.most_calls > MOST_CALLS and k > due:
            faults.append(f"{given.who} {given.path}: {coverage.most_calls} calls in a turn: {given.content[:300]!r}")
        faults += [f"{given.who} {given.path} logs {text}: {given.content[:300]!r}" for text in errors.texts]
        errors.texts.clear()
        statuses.setdefault(f"{given.who} {given.path}", Counter())[came] += 1
        if coverage.news:
            kept.append(given)
            if len(kept) > KEPT:
                kept.pop(r.randrange(len(kept)))
    for each in loggers:
        each.removeHandler(errors)
    boundary.node.host.crash()
    await asyncio.sleep(0)
    return Seen(
        count, statuses, faults, len(coverage.lines), len(kept), longest_s, longest, calls, busiest,
        (first_mb, rss_mb(os.getpid())),
        time.monotonic() - start_s,
    )  # fmt: skip


def run(count: int, seed: int) -> Seen:
    """Attack a node with so many inputs."""
    return virtual.run(lambda loop: _attack(loop, count, seed))
