"""A network in memory between ASGI applications: delays, loss, duplicates, partitions, crashes, one history per seed.

A `Host` is a machine that has an address; while a process of it serves an application there, requests reach that as
they would from a real server. What is sent on one connection arrives in order, one way delay later; what arrives at one
instant, in the order of the hosts that sent it. A message that is lost, or runs into a partition, takes its connection
with it: neither side hears more of it, as if TCP gave up; each has its own timeouts. A process that is killed closes
its connections, unless its machine is cut off with it.
"""

import asyncio
import hashlib
import math
import random
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import Context
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urlsplit

from wwwserve.eval.live.simulation.disk import MemoryDisk
from wwwserve.eval.live.simulation.loop import Process, VirtualLoop
from wwwserve.eval.live.simulation.response import Header, Incoming
from wwwserve.serving.http.asgi import WATCH

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]
Delay = Callable[[str, str, random.Random], float]  # from one host to another, s

ABANDON_S = 60.0  # after which a server gives up a connection that is silently gone


class History:
    """What happened on a network, one line a message, as a digest and, if wanted, in full."""

    def __init__(self, keep: bool) -> None:
        self.lines: list[str] = []
        self.count = 0
        self._keep, self._digest = keep, hashlib.sha256()

    def add(self, line: str) -> None:
        """Something happened."""
        self.count += 1
        self._digest.update(line.encode() + b"\n")
        if self._keep:
            self.lines.append(line)

    def digest(self) -> str:
        """Of all so far, hex."""
        return self._digest.hexdigest()


class Host:
    """A machine at a URL: a disk, a clock, and one process at a time."""

    def __init__(self, network: "MemoryNetwork", name: str, url: str) -> None:
        self.network, self.name, self.url = network, name, url
        self.rank = len(network.hosts)
        self.disk = MemoryDisk()
        self.skew_s = 0.0  # of its wall clock,
        self.drift, self._drifts_since_s = 0.0, 0.0  # and by how much that grows in a second, since when
        self.process: Process | None = None
        self.app: App | None = None

    @property
    def up(self) -> bool:
        """Whether it answers."""
        return self.app is not None and self.process is not None and self.process.alive

    def wall_s(self) -> float:
        """Its wall clock, s since 1970."""
        loop = self.network.loop
        return loop.wall_s() + self.skew_s + self.drift * (loop.time() - self._drifts_since_s)

    def let_drift(self, drift: float) -> None:
        """Its wall clock goes on from where it is, faster or slower."""
        self.skew_s = self.wall_s() - self.network.loop.wall_s()
        self.drift, self._drifts_since_s = drift, self.network.loop.time()

    def boot(self) -> Process:
        """A new process, which is yet to `serve`. Raises RuntimeError while another runs."""
        if self.process is not None and self.process.alive:
            raise RuntimeError(f"{self.name} runs already")
        self.process = Process(self.network.loop, self.name)
        return self.process

    def serve(self, app: App) -> None:
        """Let the process that was booted answer requests."""
        if self.process is None or not self.process.alive:
            raise RuntimeError(f"{self.name} is not booted")
        self.app = app

    def crash(self, *, silent: bool = False, keep: int = 0, torn: bool = False) -> None:
        """Kill its process; `silent`: without a word to those it is connected to, as if its plug were pulled. For
        `keep` and `torn` see `MemoryDisk.crash`."""
        if self.process is None or not self.process.alive:
            return
        process, self.app = self.process, None
        self.network.note(self.name, "", "crash")
        self.disk.crash(keep=keep, torn=torn)
        self.network.hang_up(process, silent=silent)
        process.kill()


class MemoryNetwork:
    """See the module. All chances come from one generator, in the order of events."""

    def __init__(
        self, loop: VirtualLoop, *, seed: int = 0, delay_s: float | Delay = 0.0, loss: float = 0.0,
        duplication: float = 0.0, reliable: Sequence[str] = (), keep_history: bool = False,
    ) -> None:  # fmt: skip
        """`delay_s` one way; `loss` of a message and `duplication` of a request are chances. Each may be changed. What
        those that are `reliable` send or get is never lost by chance."""
        self.loop, self.delay_s, self.loss, self.duplication = loop, delay_s, loss, duplication
        self.reliable = frozenset(reliable)
        self.random = random.Random(f"network {seed}")
        self.hosts: dict[str, Host] = {}  # by name
        self.history = History(keep_history)
        self.errors: list[Exception] = []  # that applications raised
        self._by_url: dict[str, Host] = {}
        self._cut: set[tuple[str, str]] = set()
        self._requests = 0
        self._on_the_way: dict[tuple[str, float], list[tuple[int, Callable[..., None], tuple[Any, ...]]]] = {}
        self._asking: dict[Process, dict[Exchange, None]] = {}
        self._serving: dict[Process, dict[_Call, None]] = {}

    def host(self, name: str, url: str) -> Host:
        """A new machine at the origin `url`."""
        host = self.hosts[name] = self._by_url[url] = Host(self, name, url)
        return host

    def transport(self, name: str) -> "MemoryTransport":
        """How the host `name`, or a user of that name, sends requests; it dies with the host's process of now."""
        host = self.hosts.get(name)
        return MemoryTransport(self, name, host.process if host is not None else None)

    def cut(self, sources: Iterable[str], destinations: Iterable[str]) -> None:
        """Let nothing through from one group to the other; the way back stays open."""
        self._cut.update((source, destination) for source in sources for destination in destinations)

    def part(self, one: Sequence[str], other: Sequence[str]) -> None:
        """Let nothing through between two groups."""
        self.cut(one, other)
        self.cut(other, one)

    def heal(self) -> None:
        """End all partitions."""
        self._cut.clear()

    # For those who make use of it.

    def note(self, source: str, destination: str, what: str) -> None:
        """Add to the history."""
        self.history.add(f"{self.loop.time()!r} {source} {destination} {what}")

    def at(self, url: str) -> Host | None:
        """The host at an origin."""
        return self._by_url.get(url)

    def open(self, exchange: "Exchange") -> int:
        """Remember a request of a process; its number."""
        if exchange.process is not None:
            self._asking.setdefault(exchange.process, {})[exchange] = None
        self._requests += 1
        return self._requests

    def closed(self, exchange: "Exchange") -> None:
        """The client is done with it."""
        if exchange.process is not None:
            self._asking.get(exchange.process, {}).pop(exchange, None)

    def call(self, host: Host, app: App, call: "_Call") -> None:
        """Run an application in its process."""
        process = host.process
        assert process is not None
        calls = self._serving.setdefault(process, {})
        calls[call] = None
        task = process.spawn(call.run(app), name=f"{host.name} answers {call.exchange.number}")
        task.add_done_callback(lambda _: calls.pop(call, None))

    def hang_up(self, process: Process, *, silent: bool) -> None:
        """A process dies, and its connections with it."""
        for exchange in list(self._asking.pop(process, {})):
            if silent:
                exchange.lose()
            exchange.close()
        for call in list(self._serving.pop(process, {})):
            if silent:
                call.exchange.lose()
            call.reset("the connection was reset")

    def send(
        self, exchange: "Exchange", source: str, destination: str, not_before_s: float, deliver: Callable[..., None],
        *content: Any,
    ) -> float:  # fmt: skip
        """Bring `content` to `deliver` after the delay, or lose it. Returns when it arrives."""
        at_s = max(self.loop.time() + self._delay(source, destination), not_before_s)
        if exchange.lost or self._loses(source, destination):
            exchange.lose()
        else:
            self._bring(source, destination, at_s, self._arrive, exchange, source, destination, deliver, content)
        return at_s

    def tell(self, source: str, destination: str, deliver: Callable[..., None], *content: Any) -> None:
        """Bring `content` to `deliver` after the delay, or lose it, without a connection: nobody hears which."""
        self.note(source, destination, "tells")
        at_s = self.loop.time() + self._delay(source, destination)
        if not self._loses(source, destination):
            self._bring(source, destination, at_s, deliver, *content)

    def _bring(self, source: str, destination: str, at_s: float, deliver: Callable[..., None], *content: Any) -> None:
        there = self._on_the_way.setdefault((destination, at_s), [])
        if not there:
            self.loop.call_at(at_s, self._deliver, destination, at_s, context=Context())
        host = self.hosts.get(source)
        there.append((host.rank if host is not None else len(self.hosts), deliver, content))

    def _deliver(self, destination: str, at_s: float) -> None:
        for _, deliver, content in sorted(self._on_the_way.pop((destination, at_s)), key=lambda each: each[0]):
            deliver(*content)

    def _delay(self, source: str, destination: str) -> float:
        delay_s = self.delay_s
        return float(delay_s) if isinstance(delay_s, float | int) else delay_s(source, destination, self.random)

    def _loses(self, source: str, destination: str) -> bool:
        if (source, destination) in self._cut:
            return True
        if not self.loss or source in self.reliable or destination in self.reliable:
            return False
        return self.random.random() < self.loss

    def _arrive(
        self, exchange: "Exchange", source: str, destination: str, deliver: Callable[..., None], content: Any
    ) -> None:
        if exchange.lost or (source, destination) in self._cut:
            exchange.lose()
        else:
            deliver(*content)


class MemoryTransport:
    """A `serving.http.transport.Transport` of one process."""

    def __init__(self, network: MemoryNetwork, name: str, process: Process | None) -> None:
        self.network, self.name, self.process = network, name, process

    def request(
        self, method: str, url: str, *, body: bytes = b"", headers: Mapping[str, str], timeout_s: float | None,
        read_timeout_s: float, peer: str = "",
    ) -> AbstractAsyncContextManager["Exchange"]:  # fmt: skip
        """See `serving.http.transport.Transport`."""
        return Exchange(self, method, url, body, headers, timeout_s, read_timeout_s)


class Exchange(Incoming):
    """A request and its response, as its client sees it: a context that gives the response.

    Leaving it before the response's end tells the server. Reading raises TimeoutError where nothing comes in time, and
    other OSErrors where the connection breaks off.
    """

    def __init__(
        self, transport: MemoryTransport, method: str, url: str, body: bytes, headers: Mapping[str, str],
        timeout_s: float | None, read_timeout_s: float,
    ) -> None:  # fmt: skip
        super().__init__(transport.network.loop)
        self.network, self.source, self.process = transport.network, transport.name, transport.process
        self.method, self.url, self.body, self.sent_headers = method, url, body, headers
        self.timeout_s, self.read_timeout_s = timeout_s, read_timeout_s
        self.number = 0
        self.destination = ""
        self.lost = False  # silently
        self._call: _Call | None = None
        self._arrives_s = 0.0  # when the request does
        self._closed = False
        self._heard_s = 0.0
        self._total_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> "Exchange":
        """The response, once its head is there. Raises OSError."""
        network = self.network
        if self.process is not None and not self.process.alive:
            raise ConnectionAbortedError(f"{self.source} is dead")
        self.number = network.open(self)
        origin, path, query = _split(self.url)
        host = network.at(origin)
        self.destination = host.name if host is not None else origin
        self._heard_s = self.loop.time()
        if self.timeout_s is not None:
            late = TimeoutError(f"it took more than {self.timeout_s:g} s")
            self._total_timer = self.loop.call_later(self.timeout_s, self._hang_up, late)
        self._watch()
        network.note(self.source, self.destination, f"{self.number} {self.method} {path} {zlib.crc32(self.body):08x}")
        self._arrives_s = network.send(self, self.source, self.destination, 0.0, self._arrive, host, path, query, False)
        if network.duplication and network.random.random() < network.duplication:
            network.send(self, self.source, self.destination, 0.0, self._arrive, host, path, query, True)
        try:
            await self.wait_for_head()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Hang up. Who reads gets an error."""
        self._hang_up(ConnectionAbortedError("the connection was closed"))

    def _hang_up(self, error: OSError) -> None:
        if self._closed:
            return
        self._closed = True
        for timer in (self._total_timer, self._read_timer):
            if timer is not None:
                timer.cancel()
        self.network.closed(self)
        if not self.ended and self.error is None:
            self.network.note(self.source, self.destination, f"{self.number} hangs up")
            self.network.send(self, self.source, self.destination, self._arrives_s, self._tell_gone)
        self.unread.clear()
        self.ended = False
        self.fail(error)

    def _watch(self) -> None:
        """Whether something came within the time allowed; what its reader left unread does not count."""
        now_s = self.loop.time()
        if self.unread or self.ended:
            self._heard_s = now_s
        due_s = self._heard_s + self.read_timeout_s
        if due_s <= now_s:
            self._hang_up(TimeoutError(f"nothing came for {self.read_timeout_s:g} s"))
        elif due_s < math.inf:
            self._read_timer = self.loop.call_at(due_s, self._watch)

    # What the network does with it.

    def lose(self) -> None:
        """It is silently gone."""
        if not self.lost:
            self.lost = True
            self.network.note(self.source, self.destination, f"{self.number} is lost")
            self.loop.outside(ABANDON_S, self._tell_gone)

    def _tell_gone(self) -> None:
        if self._call is not None:
            self._call.disconnect()

    def _arrive(self, host: Host | None, path: str, query: str, again: bool) -> None:
        """The request is there; `again`: as a duplicate, whose response nobody awaits."""
        if host is None or host.app is None or not host.up:
            if not again:
                refused = ConnectionRefusedError(f"nobody listens at {self.url}")
                self.network.send(self, self.destination, self.source, 0.0, self.broke, refused)
            return
        call = _Call(self, muted=again)
        call.scope = _scope(host.url, self.method, path, query, self.sent_headers, self.body)
        call.scope[WATCH] = call.watch
        if not again:
            self._call = call
        self.network.call(host, host.app, call)

    def began(self, status: int, headers: Sequence[Header]) -> None:
        """The head of the response is there."""
        if self.error is None:
            self._heard_s = self.loop.time()
            self.begin(status, headers)

    def came(self, piece: bytes, last: bool) -> None:
        """Some of its body is there."""
        if self.error is None:
            self._heard_s = self.loop.time()
            self.add(piece, last)

    def broke(self, error: OSError) -> None:
        """The connection was refused or reset."""
        if not self.ended:
            self.fail(error)


class _Call:
    """One call of an application, as a server makes it."""

    def __init__(self, exchange: Exchange, *, muted: bool) -> None:
        self.exchange, self.muted = exchange, muted
        self.scope: Scope = {}
        self._source, self._destination = exchange.destination, exchange.source
        self._begun = self._ended = self._gone = self._read = False
        self._news = asyncio.Event()
        self._hung_up: Callable[[], None] | None = None  # what waits for that
        self._last_s = 0.0  # when what was sent last arrives

    async def run(self, app: App) -> None:
        """Call it."""
        try:
            await app(self.scope, self.receive, self.send)
        except Exception as error:
            self.exchange.network.errors.append(error)
            if not self._begun:
                await self.send({"type": "http.response.start", "status": 500, "headers": []})
                await self.send({"type": "http.response.body", "body": b"Internal Server Error"})
        if not self._ended:
            self.reset("the server closed the connection")

    async def receive(self) -> Message:
        """See ASGI."""
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self.exchange.body, "more_body": False}
        await self._news.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """See ASGI. What goes to one who is gone is dropped."""
        if self._gone:
            return
        if self._ended:
            raise RuntimeError(f"the response is complete, got {message['type']}")
        if message["type"] == "http.response.start":
            self._begun = True
            headers = [(bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())]
            self._tell(f"answers {message['status']}", self.exchange.began, message["status"], headers)
        elif not self._begun:
            raise RuntimeError(f"the response has not begun, got {message['type']}")
        else:
            body, last = bytes(message.get("body", b"")), not message.get("more_body", False)
            if body or last:
                what = f"sends {len(body)} {zlib.crc32(body):08x}{' and ends' if last else ''}"
                self._tell(what, self.exchange.came, body, last)
            if last:
                self._end()

    def reset(self, reason: str) -> None:
        """Break the connection off."""
        if not (self._ended or self._gone):
            self._tell("breaks off", self.exchange.broke, ConnectionResetError(reason))
            self._end()

    def disconnect(self) -> None:
        """The client is gone."""
        self._gone = True
        self._news.set()
        if self._hung_up is not None:
            self._hung_up()

    def watch(self, hung_up: Callable[[], None] | None) -> None:
        """See `serving.http.asgi.WATCH`."""
        self._hung_up = hung_up
        if hung_up is not None and self._gone:
            hung_up()

    def _end(self) -> None:
        self._ended = True
        self._news.set()

    def _tell(self, what: str, deliver: Callable[..., None], *content: Any) -> None:
        if not self.muted:
            exchange = self.exchange
            exchange.network.note(self._source, self._destination, f"{exchange.number} {what}")
            self._last_s = exchange.network.send(
                exchange, self._source, self._destination, self._last_s, deliver, *content
            )


@lru_cache(maxsize=4096)
def _split(url: str) -> tuple[str, str, str]:
    """Origin, path and query of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}", parts.path or "/", parts.query


def _scope(url: str, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes) -> Scope:
    sent = [(b"host", url.partition("://")[2].encode()), (b"content-length", b"%d" % len(body))]
    sent += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "scheme": url.partition("://")[0], "path": unquote(path), "raw_path": path.encode(),
        "query_string": query.encode(), "root_path": "", "headers": sent, "client": None, "server": None,
    }  # fmt: skip
