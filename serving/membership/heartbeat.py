"""Who is there, and what they say of themselves.

A `Membership` tells its node of every advert of a peer, and when a peer is gone; the node tells it its own advert.
Whatever carries them, each node sends its advert when it is new and every 0.4 s, so that one who falls silent is
noticed before two seconds are over. Each time it is signed anew, `KEY SIGNATURE JSON`, with the time by the sender's
clock, which only ascends: what was heard, or is older than that, is a replay. `StaticMembership` knows its peers by a
list of keys, `serving.membership.zenoh` finds them. A peer with which there is no version of the protocol in common
(`serving.versions`) is known as such, and nothing else is read of its adverts.
"""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from wwwserve.agents.classes import MAX_CLASSES
from wwwserve.agents.knowledge import (
    AD_CONTEXT,
    AD_HELD,
    AD_KV_CAPACITY,
    AD_KV_TOKENS,
    AD_MAX_NUM_SEQS,
    AD_MEAN_OUTPUT,
    AD_MEAN_PROMPT,
    AD_MEAN_UNCACHED,
    AD_PER_PAIR_S,
    AD_PREFILL,
    AD_REUSE_S,
    AD_RUNNING,
    AD_STAKE,
    AD_TARIFF,
    AD_TIME_S,
    AD_UNSHARED,
    AD_WAITING,
    AD_WEIGHT_S,
    ADVERT_SIZE,
    LONGEST_REUSE_S,
)
from wwwserve.agents.protocol import CACHED_INPUT, INPUT, TARIFF_SIZE
from wwwserve.agents.tariff import MAX_TARIFF
from wwwserve.serving.boundary import BoundaryError, ModelName, check_url, read
from wwwserve.serving.http.keys import NAME_CHARS, SIGNATURE_BYTES, Identity, tagged, verify
from wwwserve.serving.http.messages import Refused, check_time
from wwwserve.serving.http.quotas import Quota
from wwwserve.serving.http.transport import Transport
from wwwserve.serving.market import Whole
from wwwserve.serving.versions import SPEAKS, UNSAID, Versions, advice, common

log = logging.getLogger("wwwserve.membership")

BEAT_S = 0.4  # between two signs of life
SILENT_S = 1.4  # without one, after which a peer is gone
TAKEN_S = SILENT_S - BEAT_S  # for a busy peer to take one, before it is sent anew
UNSPOKEN_S = 60.0  # for which a peer of another version is still named when it has fallen silent
BEAT_PATH = "/peer/beat"
MOST_BYTES = 16384  # of an advert
MOST_PER_S = 50.0  # adverts of one peer that are looked at, and as many at once
RESTARTS, RESTART_S = 4.0, 5.0  # of one peer that are believed at once, and one more each 5 s, as each costs its peers
LOCAL_URL = "http://localhost"
MOST_LABEL = 64  # characters
MOST_MODELS = 256  # of one node
HEAD_BYTES = NAME_CHARS + SIGNATURE_BYTES  # before the JSON of an advert


class Head(msgspec.Struct, frozen=True):
    """What an advert of every version says, so that a node which speaks another one can be named."""

    name: str
    label: str
    url: str
    sent_us: Whole = 0
    speaks: Versions = UNSAID


class Advert(msgspec.Struct, frozen=True):
    """What a node says of itself; what one of a later version adds is not read."""

    name: str  # its public key
    label: str  # what it calls itself, for people; anyone may choose any
    url: str  # of its data plane
    serves: Annotated[tuple[ModelName, ...], Meta(max_length=MOST_MODELS)]
    run: Whole  # when it started, by its own clock, µs
    number: Whole  # of its adverts in this run, ascending
    load: tuple[float, ...]  # [ADVERT_SIZE], see agents.knowledge
    age_s: float  # of the load, when this was sent
    sent_us: Whole = 0  # when this was sent, by the sender's clock; ascending
    speaks: Versions = SPEAKS


class Unspoken(NamedTuple):
    """A peer with which there is no version in common."""

    label: str
    url: str
    speaks: Versions
    heard_s: float  # last, by the clock of the membership


_COUNT, _TOKENS, _MEAN, _CREDITS, _DURATION = (0.0, 1e6), (0.0, 1e10), (0.1, 1e7), (0.0, 1e9), (1e-14, 1e4)
_RANGES: dict[int, tuple[float, float]] = {  # of each column, see agents.knowledge
    AD_TIME_S: (-1e12, 1e12), AD_RUNNING: _COUNT, AD_WAITING: _COUNT, AD_KV_TOKENS: _TOKENS,
    AD_MEAN_PROMPT: _MEAN, AD_MEAN_OUTPUT: _MEAN, AD_CONTEXT: _TOKENS, AD_UNSHARED: (1e-3, 1.0),
    AD_MEAN_UNCACHED: (0.0, 1e7), AD_PREFILL: _TOKENS, AD_REUSE_S: (0.0, LONGEST_REUSE_S), AD_STAKE: _CREDITS,
    **{AD_TARIFF + k: (0.0, MAX_TARIFF) for k in range(TARIFF_SIZE)},
    **{AD_HELD + k: _COUNT for k in range(MAX_CLASSES)},
    **{column: _DURATION for column in range(AD_WEIGHT_S, AD_KV_CAPACITY)},
    AD_WEIGHT_S: (1e-7, 1e4), AD_PER_PAIR_S: (0.0, 1e4), AD_KV_CAPACITY: (1.0, 1e10), AD_MAX_NUM_SEQS: (1.0, 1e6),
}  # fmt: skip

Heard = Callable[[Advert], None]
Gone = Callable[[str], None]


class Membership(Protocol):
    """What a node asks of it."""

    async def run(self, heard: Heard, gone: Gone) -> None:
        """Be a member until cancelled; `heard` is called for each new advert of a peer."""

    def publish(self, advert: Advert, now_s: float) -> None:
        """What the node says of itself from now on; its load was true at `now_s`."""

    def knows(self, name: str) -> bool:
        """Whether it is the key of a peer, there or not; true of a bounded number of keys."""

    def unspoken(self) -> Mapping[str, Unspoken]:
        """Peers with which there is no version in common, by name."""

    def received(self, body: bytes) -> str:
        """A beat came over the data plane; returns whose. Raises Refused for what is none."""


def head_of(body: bytes, by: str = LOCAL_URL) -> Head:
    """Read what an advert of any version says; raises Refused. `by` is the address of the node that heard it, see
    `boundary.check_url`."""
    try:
        head: Head = read(body, Head)
        check_url(head.url, by)
    except BoundaryError as error:
        raise Refused("malformed", f"it is no advert: {error}") from None
    if not (head.label.isprintable() and len(head.label) <= MOST_LABEL):
        raise Refused("malformed", f"label is not at most {MOST_LABEL} printable characters")
    if head.speaks.oldest > head.speaks.newest:
        raise Refused("malformed", f"it speaks protocol {head.speaks}, which is none")
    return head


def decode(body: bytes) -> Advert:
    """Read an advert of a version that is spoken here, whose head is good; raises Refused."""
    try:
        advert: Advert = read(body, Advert)
    except BoundaryError as error:
        raise Refused("malformed", f"it is no advert: {error}") from None
    if len(advert.load) != ADVERT_SIZE:
        raise Refused("malformed", f"load has {len(advert.load)} numbers, expected {ADVERT_SIZE}")
    if not 0 <= advert.age_s < 1e6:
        raise Refused("malformed", f"age_s is {advert.age_s}, expected 0 to 1e6")
    for column, (least, most) in _RANGES.items():
        if not least <= advert.load[column] <= most:  # nor is NaN
            raise Refused("malformed", f"load[{column}] is {advert.load[column]}, expected {least:g} to {most:g}")
    cached, given = advert.load[AD_TARIFF + CACHED_INPUT], advert.load[AD_TARIFF + INPUT]
    if cached > given:  # what is in escrow, at the price of input, would not pay it
        raise Refused("malformed", f"cached input is at {cached}, expected at most {given}, the price of input")
    return advert


def signed(identity: Identity, advert: Advert) -> bytes:
    """An advert as it is sent."""
    content = msgspec.json.encode(advert)
    return identity.name.encode() + identity.sign(tagged("advert", content)) + content


def knock(identity: Identity, label: str, url: str) -> bytes:
    """An advert of 1970, which nobody takes: a peer that lists its sender there, and to whom the signature is good,
    refuses it as stale, and says by that what time it has."""
    load = [0.0] * ADVERT_SIZE
    for column, (least, _) in _RANGES.items():
        load[column] = least
    return signed(identity, Advert(identity.name, label, url, (), 0, 0, tuple(load), 0.0, sent_us=1))


class Heartbeat(ABC):
    """What every membership has: the own advert as it is sent, and the peers by their signs of life."""

    def __init__(
        self, identity: Identity, clock: Callable[[], float], wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.identity, self.name, self.clock, self.wall_clock = identity, identity.name, clock, wall_clock
        self.advert: Advert | None = None
        self.true_at_s = 0.0
        self.beaten_s: dict[str, float] = {}  # when each peer that is there was last heard
        self.numbers: dict[str, tuple[int, int]] = {}  # run and number of its last advert
        self._unspoken: dict[str, Unspoken] = {}
        self._quota = Quota(MOST_PER_S, MOST_PER_S, clock)
        self._restarts = Quota(1.0 / RESTART_S, RESTARTS, clock)
        self.runs: dict[str, int] = {}  # of each that was ever heard, its last
        self._last: dict[str, tuple[int, bytes]] = {}  # of each that was ever heard: when it sent that, and signed how
        self._beat: tuple[float, bytes] | None = None  # when it was made
        self._sent_us = 0
        self._heard: Heard = lambda advert: None
        self._news = asyncio.Event()  # there is another advert
        self._gone: Gone = lambda name: None
        self.only_tls = False  # whether peers have to be at https://
        self.reached_by = LOCAL_URL  # the address of this node, see `boundary.check_url`

    def publish(self, advert: Advert, now_s: float) -> None:
        """See `Membership`."""
        self.advert, self.true_at_s, self._beat = advert, now_s, None
        self._news.set()
        self._news = asyncio.Event()

    def beat(self) -> bytes | None:
        """The own advert with the age of its load, signed, for all peers of one round; None before there is one."""
        if self.advert is None:
            return None
        now_s = self.clock()
        if self._beat is None or now_s - self._beat[0] > BEAT_S / 2:
            self._sent_us = max(self._sent_us + 1, round(self.wall_clock() * 1e6))
            advert = msgspec.structs.replace(self.advert, age_s=now_s - self.true_at_s, sent_us=self._sent_us)
            self._beat = now_s, signed(self.identity, advert)
        return self._beat[1]

    @abstractmethod
    def may_be(self, name: str) -> bool:
        """Whether an advert of that key is wanted."""

    def take(self, body: bytes) -> Advert:
        """The advert that a peer sent, once it is known to be its own and new. Raises Refused."""
        if not HEAD_BYTES < len(body) <= MOST_BYTES:
            raise Refused("malformed", f"it has {len(body)} bytes, expected {HEAD_BYTES + 1} to {MOST_BYTES}")
        name, signature, content = body[:NAME_CHARS].decode("latin-1"), body[NAME_CHARS:HEAD_BYTES], body[HEAD_BYTES:]
        if name == self.name:
            raise Refused("stranger", "it has the key of this node")
        if not self.may_be(name):
            raise Refused("stranger", f"{name!r} is no peer of this node")
        last_us, last = self._last.get(name, (0, b""))
        if signature == last:
            raise Refused("replayed", "it was heard already")
        if self._quota.left(name) < 1:
            raise Refused("crowded", f"{name} sends more adverts than are looked at")
        try:
            verify(name, tagged("advert", content), signature)
        except ValueError as error:
            raise Refused("forged", str(error)) from None
        self._quota.spend(name)
        head = head_of(content, self.reached_by)
        advert = decode(content) if common(head.speaks) is not None else None
        if head.name != name:
            raise Refused("forged", f"it speaks for {head.name!r}, but {name} signed it")
        if self.only_tls and not head.url.startswith("https://"):
            raise Refused("malformed", f"it is at {head.url!r}, expected https://")
        self.check_address(name, head.url)
        check_time(head.sent_us / 1e6, self.wall_clock())
        if head.sent_us <= last_us:
            raise Refused("replayed", "it is older than what was heard already")
        if advert is not None:
            self._check_run(advert)
        self._last[name] = head.sent_us, signature
        if advert is None:
            self.heard_unspoken(head)
            raise Refused("version", f"{name} {advice(head.speaks)}")
        return advert

    def _check_run(self, advert: Advert) -> None:
        """Raises Refused for a peer that starts anew more often than a node does: all that is known of its caches is
        forgotten then, and it is told all again that was ever staked and lost."""
        if self.runs.get(advert.name, advert.run) != advert.run:
            if self._restarts.left(advert.name) < 1:
                raise Refused("crowded", f"{advert.name} says that it has started again, too often to be believed")
            self._restarts.spend(advert.name)
        self.runs[advert.name] = advert.run

    def check_address(self, name: str, url: str) -> None:  # noqa: B027 - most have nothing to compare it with
        """Raises Refused for a peer that is not where it is expected."""

    def heard_unspoken(self, head: Head) -> None:
        """A peer is there with which there is no version in common."""
        name = head.name
        if name not in self._unspoken:
            said = f"a peer {advice(head.speaks)}"
            log.warning(said, extra={"peer": name, "label": head.label, "url": head.url})
        self._unspoken[name] = Unspoken(head.label, head.url, head.speaks, self.clock())
        self.left(name)

    def unspoken(self) -> Mapping[str, Unspoken]:
        """See `Membership`."""
        return self._unspoken

    def alive(self, advert: Advert) -> None:
        """A peer gave a sign of life. One that spoke another version just now is not believed yet: it would come and go
        as often as it says now this and now that."""
        unspoken = self._unspoken.get(advert.name)
        if unspoken is not None:
            if self.clock() < unspoken.heard_s + SILENT_S:
                return
            del self._unspoken[advert.name]
        self.beaten_s[advert.name] = self.clock()
        if self.numbers.get(advert.name) != (advert.run, advert.number):
            self.numbers[advert.name] = advert.run, advert.number
            self._heard(advert)

    def left(self, name: str) -> None:
        """A peer is gone, if it was there."""
        if name in self.beaten_s:
            del self.beaten_s[name], self.numbers[name]
            self._gone(name)

    async def watch(self) -> None:
        """Notice who falls silent, until cancelled. For as long as this process had no time it heard nobody, whether
        they spoke or not: that is not their silence."""
        now_s = self.clock()
        while True:
            due_s = now_s + BEAT_S / 4
            await asyncio.sleep(BEAT_S / 4)
            now_s = self.clock()
            late_s = now_s - due_s
            if late_s > BEAT_S / 4:
                self.beaten_s = {name: min(at_s + late_s, now_s) for name, at_s in self.beaten_s.items()}
            for name in [name for name, at_s in self.beaten_s.items() if now_s - at_s > SILENT_S]:
                self.left(name)
            for name in [name for name, each in self._unspoken.items() if now_s - each.heard_s > UNSPOKEN_S]:
                del self._unspoken[name]


class StaticMembership(Heartbeat):
    """Peers by a list: the URL of each key."""

    def __init__(
        self, peers: Mapping[str, str], identity: Identity, transport: Transport,
        clock: Callable[[], float], wall_clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        super().__init__(identity, clock, wall_clock)
        self.peers, self.transport = dict(peers), transport

    def knows(self, name: str) -> bool:
        """See `Membership`."""
        return name in self.peers

    def may_be(self, name: str) -> bool:
        """See `Heartbeat`."""
        return name in self.peers

    def check_address(self, name: str, url: str) -> None:
        """See `Heartbeat`."""
        if self.peers[name] != url:
            raise Refused("stranger", f"it is at {url!r}, the list of peers says {self.peers[name]!r}")

    def received(self, body: bytes) -> str:
        """See `Membership`. A beat of someone who is not on the list is refused as well."""
        advert = self.take(body)
        self.alive(advert)
        return advert.name

    async def run(self, heard: Heard, gone: Gone) -> None:
        """See `Membership`."""
        self._heard, self._gone = heard, gone
        async with asyncio.TaskGroup() as group:
            group.create_task(self.watch())
            for name, url in self.peers.items():
                group.create_task(self._send(name, url))

    async def _send(self, name: str, url: str) -> None:
        headers = {"content-type": "application/octet-stream"}
        taken = 204
        while True:
            start_s, news = self.clock(), self._news
            body = self.beat()
            if body is not None:
                try:
                    async with self.transport.request(
                        "POST",
                        url + BEAT_PATH,
                        body=body,
                        headers=headers,
                        timeout_s=TAKEN_S,
                        read_timeout_s=TAKEN_S,
                        peer=name,
                    ) as response:
                        answer = await response.read(MOST_BYTES)
                        if response.status != taken:
                            taken = response.status
                            log.log(
                                logging.INFO if taken == 204 else logging.WARNING, "a peer answers otherwise",
                                extra={"url": url, "status": taken, "answer": answer[:500].decode(errors="replace")},
                            )  # fmt: skip
                except (TimeoutError, OSError):
                    pass  # it will show by its own silence
            with suppress(TimeoutError):  # not by `wait_for`, which in Python 3.11 can lose that it is cancelled
                async with asyncio.timeout(max(0.0, start_s + BEAT_S - self.clock())):
                    await news.wait()
