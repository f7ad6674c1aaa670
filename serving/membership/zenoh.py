"""Membership on Eclipse Zenoh: a node that knows one of the others finds them all, by gossip.

In peer mode every node has a session with every other. Under `wwwserve/NETWORK` each has a liveliness token,
`alive/KEY`, and publishes its advert as `advert/KEY`. Who is killed loses the token as its connections break, within
milliseconds; who hangs keeps it and shows by silence. A token is not signed, and anyone can take one back in the name
of another: a peer that lost its token is gone only if it takes no connection either, or falls silent.

Names cost nothing. A node remembers so many, those in its configuration always, and forgets the one that has been
silent for longest when there is another. What comes waits in a queue in which every key has the same few places.
"""

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from urllib.parse import quote, urlsplit

import zenoh

from wwwserve.serving.config import ZenohConfig
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import SKEW_S, Refused
from wwwserve.serving.membership.heartbeat import BEAT_S, SILENT_S, Gone, Head, Heard, Heartbeat

MOST_PEERS = 1024  # names that are known, beside those in the configuration
FORGET_S = 2 * SKEW_S  # of silence, after which a name may be forgotten: nothing that it signed before is taken then
MOST_WAITING = 2  # messages of one key
MOST_KEYS = 2 * MOST_PEERS  # that have messages waiting
AT_ONCE, PAUSE_S = 32, 0.005  # messages that are looked at in one go, and the time until the next ones
MOST_MESSAGE_BYTES = 2**20  # larger ones are dropped by Zenoh


def open_session(options: ZenohConfig) -> zenoh.Session:
    """A session that listens, and connects in the background. Raises OSError for an address or file that cannot be
    used."""
    settings = {
        "mode": "peer",
        "listen/endpoints": options.listen,
        "connect/endpoints": options.connect,
        "connect/retry": {"period_init_ms": 100, "period_max_ms": 500, "period_increase_factor": 2},
        "open/return_conditions/connect_scouted": False,
        "scouting/gossip/enabled": True,  # not multihop, with which 40 nodes that start together take half a minute
        "scouting/multicast/enabled": False,
        "transport/shared_memory/enabled": False,
        "transport/link/protocols": ["tls" if options.tls else "tcp"],
        "transport/link/rx/max_message_size": MOST_MESSAGE_BYTES,
    }
    if options.tls:
        tls = "transport/link/tls/"
        settings |= {tls + "enable_mtls": True, tls + "root_ca_certificate": options.tls.ca}
        for side in ("listen", "connect"):
            settings[tls + side + "_certificate"] = options.tls.certificate
            settings[tls + side + "_private_key"] = options.tls.key
    config = zenoh.Config()
    for key, value in settings.items():
        config.insert_json5(key, json.dumps(value))
    try:
        return zenoh.open(config)
    except zenoh.ZError as error:
        raise OSError(f"membership: {str(error).partition(' at /')[0]}") from None  # without where in its source


class Inbox:
    """What came on threads of Zenoh's and waits for the event loop: little of each key, a little at a time."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, take: Callable[[str, bytes | None], None],
        dropped: Callable[[int], None],
    ) -> None:  # fmt: skip
        """On the loop, `take` is called with a key and what came under it, None for a token that was taken back, and
        `dropped` with how many messages found no place since it was called last."""
        self._loop, self._take, self._tell_dropped = loop, take, dropped
        self._dropped = 0
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[bytes | None]] = {}
        self._due = False  # whether the loop is going to look

    def put(self, key: str, body: bytes | None) -> None:
        """Something came; called on any thread."""
        with self._lock:
            waiting = self._waiting.get(key)
            if waiting is None and len(self._waiting) < MOST_KEYS:
                waiting = self._waiting[key] = deque()
            if waiting is None or len(waiting) >= MOST_WAITING:
                self._dropped += 1
                return
            waiting.append(body)
            due, self._due = self._due, True
        if not due:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self._tell_dropped(dropped)
        for _ in range(AT_ONCE):
            with self._lock:
                key = next(iter(self._waiting), None)
                if key is None:
                    self._due = False
                    return
                waiting = self._waiting.pop(key)
                body = waiting.popleft()
                if waiting:
                    self._waiting[key] = waiting  # after all others
            self._take(key, body)
        self._loop.call_later(PAUSE_S, self._look)


class ZenohMembership(Heartbeat):
    """Peers that are found by a Zenoh session."""

    def __init__(
        self, identity: Identity, network: str, session: zenoh.Session, clock: Callable[[], float],
        refused: Callable[[Refused], None], wall_clock: Callable[[], float] = time.time, configured: Iterable[str] = (),
    ) -> None:  # fmt: skip
        """`configured`: keys in the node's configuration, which always have a place."""
        super().__init__(identity, clock, wall_clock)
        self.network, self.session, self.refused = network, session, refused
        self.configured = frozenset(configured)
        self.names: dict[str, float] = {}  # others that are known, and when they were last heard; that first first
        self.forgotten: Gone = lambda name: None  # called with a name that makes place for another
        self._urls: dict[str, str] = {}
        self._doubted: dict[str, asyncio.Task[None]] = {}

    def knows(self, name: str) -> bool:
        """See `Membership`."""
        return name in self.names or name in self.configured

    def may_be(self, name: str) -> bool:
        """See `Heartbeat`."""
        return self.knows(name) or len(self.names) < MOST_PEERS or self._silent() is not None

    def received(self, body: bytes) -> str:
        """See `Membership`. All that comes this way is refused."""
        raise Refused("malformed", "the membership of this node is zenoh, no beats are sent to it")

    async def run(self, heard: Heard, gone: Gone) -> None:
        """See `Membership`."""
        self._heard, self._gone = heard, gone
        inbox = Inbox(
            asyncio.get_running_loop(), self._take,
            lambda count: self.refused(Refused("crowded", f"{count} messages came by Zenoh faster than they are read")),
        )  # fmt: skip

        # Zenoh calls these two on its own threads.
        def on_advert(sample: zenoh.Sample) -> None:
            inbox.put(str(sample.key_expr), sample.payload.to_bytes())

        def on_token(sample: zenoh.Sample) -> None:
            if sample.kind == zenoh.SampleKind.DELETE:
                inbox.put(str(sample.key_expr), None)

        call = zenoh.handlers.Callback
        liveliness = self.session.liveliness()
        with (
            self.session.declare_subscriber(
                self._key("advert"), call(on_advert, indirect=False), allowed_origin=zenoh.Locality.REMOTE
            ),
            liveliness.declare_subscriber(self._key("alive"), call(on_token, indirect=False), history=True),
            liveliness.declare_token(self._key("alive", self.name)),
        ):
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self.watch())
                    group.create_task(self._send())
            finally:
                for looking in self._doubted.values():
                    looking.cancel()

    def _key(self, what: str, name: str = "*") -> str:
        """A node's key, or all nodes'. The network's name is quoted, as some characters mean something in a key."""
        return f"wwwserve/{quote(self.network, safe='')}/{what}/{name}"

    def _take(self, key: str, body: bytes | None) -> None:
        if body is None:
            self._doubt(key.rpartition("/")[2])
            return
        try:
            advert = self.take(body)
            if key != self._key("advert", advert.name):
                raise Refused("forged", f"it came as {key!r}, which is another's")
        except Refused as refused:
            self.refused(refused)
            return
        self._place(advert.name)
        self._urls[advert.name] = advert.url
        self.alive(advert)

    def heard_unspoken(self, head: Head) -> None:
        """See `Heartbeat`."""
        self._place(head.name)
        super().heard_unspoken(head)

    def _place(self, name: str) -> None:
        """A name was heard, and is known from now on."""
        if name not in self.configured:
            if name not in self.names and len(self.names) >= MOST_PEERS:
                self._forget(self._silent())
            self.names.pop(name, None)
            self.names[name] = self.clock()

    def _silent(self) -> str | None:
        """The name that was not heard for longest, if for so long that it may be forgotten."""
        name = next(iter(self.names), None)
        return name if name is not None and self.clock() - self.names[name] > FORGET_S else None

    def _forget(self, name: str | None) -> None:
        if name is not None:
            self.left(name)
            del self.names[name]
            self._urls.pop(name, None)
            self._last.pop(name, None)
            self.runs.pop(name, None)
            self._unspoken.pop(name, None)
            self.forgotten(name)

    def _doubt(self, name: str) -> None:
        """A peer lost its token: see whether it is still there."""
        if name in self.beaten_s and name not in self._doubted:
            self._doubted[name] = asyncio.create_task(self._look_for(name))
            self._doubted[name].add_done_callback(lambda task: self._doubted.pop(name, None))

    async def _look_for(self, name: str) -> None:
        """One that takes no connection is gone; of one that does its silence will tell."""
        try:
            url = urlsplit(self._urls[name])
            port = url.port or {"http": 80, "https": 443}[url.scheme]
            async with asyncio.timeout(SILENT_S):
                _, writer = await asyncio.open_connection(url.hostname, port)
            writer.close()
        except (OSError, ValueError):
            self.left(name)

    async def _send(self) -> None:
        while True:
            news, body = self._news, self.beat()
            if body is not None:
                self.session.put(self._key("advert", self.name), body)
            with suppress(TimeoutError):  # not by `wait_for`, which in Python 3.11 can lose that it is cancelled
                async with asyncio.timeout(BEAT_S):
                    await news.wait()
