"""Who is there, and what they say of themselves.

A `Membership` tells its node of every advert of a peer, and when a peer is gone; the node tells it its own advert.
Whatever carries them, each node sends its advert when it is new and every 0.4 s, so that one who falls silent is
noticed before two seconds are over. `StaticMembership` knows its peers by a list, `serving.zenoh_membership` finds
them.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import aiohttp
import msgspec

from agents.knowledge import ADVERT_SIZE

BEAT_S = 0.4  # between two signs of life
SILENT_S = 1.4  # without one, after which a peer is gone
BEAT_PATH = "/peer/beat"
MOST_BYTES = 65536  # of an advert


class AdvertError(ValueError):
    """Not an advert; the message says what is wrong with it."""


class Advert(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node says of itself."""

    name: str
    url: str  # of its data plane
    serves: tuple[str, ...]  # model names
    number: int  # of its adverts, ascending
    load: tuple[float, ...]  # [ADVERT_SIZE], see agents.knowledge
    age_s: float  # of the load, when this was sent
    valid_s: float  # from now on, that its price holds


Heard = Callable[[Advert], None]
Gone = Callable[[str], None]


class Membership(Protocol):
    """What a node asks of it."""

    async def run(self, heard: Heard, gone: Gone) -> None:
        """Be a member until cancelled; `heard` is called for each new advert of a peer."""

    def publish(self, advert: Advert, now_s: float) -> None:
        """What the node says of itself from now on; its load was true at `now_s`."""

    def received(self, body: bytes) -> None:
        """A beat came over the data plane. Raises AdvertError for what is none."""


def decode(body: bytes) -> Advert:
    """Read an advert; raises AdvertError."""
    if len(body) > MOST_BYTES:
        raise AdvertError(f"it has {len(body)} bytes, expected at most {MOST_BYTES}")
    try:
        advert = msgspec.json.decode(body, type=Advert)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AdvertError(str(error)) from None
    if len(advert.load) != ADVERT_SIZE:
        raise AdvertError(f"load has {len(advert.load)} numbers, expected {ADVERT_SIZE}")
    if not (0 <= advert.age_s < 1e6 and min(advert.load[:-7]) > -1e10 and min(advert.load[-7:]) > 0):
        raise AdvertError("load, age or profile is out of its range")
    if not advert.url.startswith(("http://", "https://")):
        raise AdvertError(f"url is {advert.url!r}, expected http:// or https://")
    return advert


class Heartbeat:
    """What every membership has: the own advert as it is sent, and the peers by their signs of life."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.advert: Advert | None = None
        self.true_at_s = 0.0
        self.beaten_s: dict[str, float] = {}  # when each peer that is there was last heard
        self.numbers: dict[str, int] = {}  # of its last advert
        self._heard: Heard = lambda advert: None
        self._news = asyncio.Event()  # there is another advert
        self._gone: Gone = lambda name: None

    def publish(self, advert: Advert, now_s: float) -> None:
        """See `Membership`."""
        self.advert, self.true_at_s = advert, now_s
        self._news.set()
        self._news = asyncio.Event()

    def beat(self) -> bytes | None:
        """The own advert with the age of its load; None before there is one."""
        if self.advert is None:
            return None
        return msgspec.json.encode(msgspec.structs.replace(self.advert, age_s=self.clock() - self.true_at_s))

    def alive(self, advert: Advert) -> None:
        """A peer gave a sign of life."""
        self.beaten_s[advert.name] = self.clock()
        if self.numbers.get(advert.name) != advert.number:
            self.numbers[advert.name] = advert.number
            self._heard(advert)

    def left(self, name: str) -> None:
        """A peer is gone, if it was there."""
        if name in self.beaten_s:
            del self.beaten_s[name], self.numbers[name]
            self._gone(name)

    async def watch(self) -> None:
        """Notice who falls silent, until cancelled."""
        while True:
            await asyncio.sleep(BEAT_S / 4)
            now_s = self.clock()
            for name in [name for name, at_s in self.beaten_s.items() if now_s - at_s > SILENT_S]:
                self.left(name)


class StaticMembership(Heartbeat):
    """Peers by a list of names and URLs."""

    def __init__(
        self, peers: Sequence[tuple[str, str]], session: aiohttp.ClientSession, clock: Callable[[], float]
    ) -> None:
        super().__init__(clock)
        self.peers, self.session = dict(peers), session

    def received(self, body: bytes) -> None:
        """See `Membership`. A beat of someone who is not on the list is an error as well."""
        advert = decode(body)
        if self.peers.get(advert.name) != advert.url:
            raise AdvertError(f"{advert.name!r} at {advert.url!r} is not on the list of peers")
        self.alive(advert)

    async def run(self, heard: Heard, gone: Gone) -> None:
        """See `Membership`."""
        self._heard, self._gone = heard, gone
        async with asyncio.TaskGroup() as group:
            group.create_task(self.watch())
            for url in self.peers.values():
                group.create_task(self._send(url))

    async def _send(self, url: str) -> None:
        timeout = aiohttp.ClientTimeout(total=BEAT_S)
        while True:
            start_s, news = self.clock(), self._news
            body = self.beat()
            if body is not None:
                try:
                    async with self.session.post(url + BEAT_PATH, data=body, timeout=timeout) as response:
                        await response.read()
                except (aiohttp.ClientError, TimeoutError, OSError):
                    pass  # it will show by its own silence
            with suppress(TimeoutError):  # not by `wait_for`, which in Python 3.11 can lose that it is cancelled
                async with asyncio.timeout(max(0.0, start_s + BEAT_S - self.clock())):
                    await news.wait()
