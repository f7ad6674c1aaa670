"""Membership on Eclipse Zenoh: a node that knows one of the others finds them all, by gossip.

In peer mode every node has a session with every other. Under `wwwserve/NETWORK` each has a liveliness token,
`alive/KEY`, and publishes its advert as `advert/KEY`. Who is killed loses the token as its connections break, within
milliseconds; who hangs keeps it and shows by silence. A token is not signed, and anyone can take one back in the name
of another: a peer that lost its token is gone only if it takes no connection either, or falls silent.
"""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import quote, urlsplit

import zenoh

from wwwserve.serving.config import ZenohConfig
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import Refused
from wwwserve.serving.membership.heartbeat import BEAT_S, SILENT_S, Gone, Heard, Heartbeat

MOST_PEERS = 1024  # names that are ever heard, as a node keeps what it knows of each
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


class ZenohMembership(Heartbeat):
    """Peers that are found by a Zenoh session."""

    def __init__(
        self, identity: Identity, network: str, session: zenoh.Session, clock: Callable[[], float],
        refused: Callable[[Refused], None], wall_clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        super().__init__(identity, clock, wall_clock)
        self.network, self.session, self.refused = network, session, refused
        self.names: set[str] = set()  # of all peers that were ever heard
        self._urls: dict[str, str] = {}
        self._doubted: dict[str, asyncio.Task[None]] = {}

    def knows(self, name: str) -> bool:
        """See `Membership`."""
        return name in self.names

    def may_be(self, name: str) -> bool:
        """See `Heartbeat`."""
        return name in self.names or len(self.names) < MOST_PEERS

    def received(self, body: bytes) -> None:
        """See `Membership`. All that comes this way is refused."""
        raise Refused("malformed", "the membership of this node is zenoh, no beats are sent to it")

    async def run(self, heard: Heard, gone: Gone) -> None:
        """See `Membership`."""
        self._heard, self._gone = heard, gone
        loop = asyncio.get_running_loop()

        # Zenoh calls these two on its own threads.
        def on_advert(sample: zenoh.Sample) -> None:
            loop.call_soon_threadsafe(self._take, str(sample.key_expr), sample.payload.to_bytes())

        def on_token(sample: zenoh.Sample) -> None:
            if sample.kind == zenoh.SampleKind.DELETE:
                loop.call_soon_threadsafe(self._doubt, str(sample.key_expr).rpartition("/")[2])

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

    def _take(self, key: str, body: bytes) -> None:
        try:
            advert = self.take(body)
            if key != self._key("advert", advert.name):
                raise Refused("forged", f"it came as {key!r}, which is another's")
        except Refused as refused:
            self.refused(refused)
            return
        self.names.add(advert.name)
        self._urls[advert.name] = advert.url
        self.alive(advert)

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
