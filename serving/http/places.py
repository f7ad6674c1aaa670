"""Who may have a connection: so many in all, so many from one address, and some that are kept for peers.

Where there is no room, a connection on which nothing is under way makes place for a new one: first the one that has
been idle for longest, of the address that has most of them. So idle connections shut nobody out. Of the connections by
which peers have sent what they signed, as many as there are places for peers are never closed for others.
"""

import math
from collections import Counter
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Generic, Protocol, TypeVar

NEWS_S = 60.0
PEER_SHARE = 16  # part of the places for peers that one peer may have


class Closable(Protocol):
    """A connection, as `Places` sees it."""

    def make_room(self) -> None:
        """Close it, on which nothing is under way."""


C = TypeVar("C", bound=Closable)


class Places(Generic[C]):
    """Connections that are open."""

    def __init__(self, most: int, per_address: int, for_peers: int) -> None:
        """At most `most` in all, `per_address` from one; only peers have the last `for_peers`, at most a quarter."""
        self.most, self.per_address, self.for_peers = most, per_address, min(for_peers, most // 4)
        self.turned_away: dict[C, str] = {}  # which have no place, and their addresses
        self._squeezed_s = -math.inf  # when that was last news
        self._address: dict[C, str] = {}
        self._count: dict[str, int] = {}  # by address
        self._idle: dict[str, dict[C, None]] = {}  # by address, the one that is so for longest first
        self._kept: dict[C, str] = {}  # of peers, by their names
        # Those that have a place for peers and have to show that they are, by address, the first to come first.
        self._reserve: dict[str, dict[C, None]] = {}

    def enter(self, connection: C, address: str) -> bool:
        """Whether there is a place for a new connection, on which nothing is under way yet."""
        if self.is_crowded(address) and not any(_make_room(each, address, self) for each in self._waiting):
            return False
        waiting = self._idle
        if len(self._address) - len(self._kept) >= self.most - self.for_peers and not _make_room(
            self._idle, None, self
        ):
            if len(self._address) >= self.most and not _make_room(self._reserve, None, self):
                return False
            waiting = self._reserve
        self._address[connection] = address
        self._count[address] = self._count.get(address, 0) + 1
        waiting.setdefault(address, {})[connection] = None
        return True

    def squeeze(self, now_s: float) -> bool:
        """Something else is short that connections take: one on which nothing is under way is closed. Returns whether
        that is news, which it is once a minute."""
        _make_room(self._idle, None, self)
        is_news = now_s >= self._squeezed_s + NEWS_S
        if is_news:
            self._squeezed_s = now_s
        return is_news

    def turn_away(self, connection: C, address: str, most: int) -> bool:
        """Whether a connection that has no place may stay until it has heard so. Where `most` do, the first of the
        address that has most of them goes, so that who comes again and again leaves time for others to hear it."""
        if len(self.turned_away) >= most:
            count = Counter(self.turned_away.values())
            [(crowd, most_of_one)] = count.most_common(1)
            if count[address] + 1 >= most_of_one:
                return False
            first = next(each for each, its in self.turned_away.items() if its == crowd)
            del self.turned_away[first]
            first.make_room()
        self.turned_away[connection] = address
        return True

    def leave(self, connection: C) -> None:
        """It is closed, if it had a place."""
        address = self._address.pop(connection, None)
        if address is None:
            return
        for waiting in self._waiting:
            _remove(waiting, address, connection)
        self._kept.pop(connection, None)
        self._count[address] -= 1
        if not self._count[address]:
            del self._count[address]

    def busy(self, connection: C) -> None:
        """Something is under way on it."""
        _remove(self._idle, self._address.get(connection, ""), connection)

    def idle(self, connection: C) -> None:
        """Nothing is under way on it any more."""
        address = self._address.get(connection)
        if address is not None and connection not in self._kept and not self.is_for_peers(connection):
            self._idle.setdefault(address, {})[connection] = None

    def keep_for(self, connection: C, peer: str) -> bool:
        """It is a peer's, which has shown that: it keeps its place, as far as there are places for peers and that peer
        has not its share of them. Returns False if it has neither such a place nor another one."""
        address = self._address.get(connection)
        if address is None:
            return True
        share = max(1, self.for_peers // PEER_SHARE)
        if len(self._kept) < self.for_peers and sum(each == peer for each in self._kept.values()) < share:
            self._kept[connection] = peer
            _remove(self._reserve, address, connection)
            _remove(self._idle, address, connection)
        return not self.is_for_peers(connection)

    def is_for_peers(self, connection: C) -> bool:
        """Whether its place is one that only a peer may have, and it has not shown yet that it is one's."""
        return connection in self._reserve.get(self._address.get(connection, ""), ())

    def is_crowded(self, address: str) -> bool:
        """Whether an address has as many connections as it may."""
        return self._count.get(address, 0) >= self.per_address

    @property
    def _waiting(self) -> tuple[dict[str, dict[C, None]], dict[str, dict[C, None]]]:
        return self._idle, self._reserve


def _remove(waiting: dict[str, dict[C, None]], address: str, connection: C) -> None:
    there = waiting.get(address)
    if there is not None and connection in there:
        del there[connection]
        if not there:
            del waiting[address]


def _make_room(waiting: dict[str, dict[C, None]], address: str | None, places: Places[C]) -> bool:
    """Close the first that waits, of that address or of the one of which most do; returns whether there was one."""
    if address is None and waiting:
        address = max(waiting, key=lambda each: len(waiting[each]))
    there = waiting.get(address) if address is not None else None
    if not there:
        return False
    connection = next(iter(there))
    places.leave(connection)
    connection.make_room()
    return True


@lru_cache(maxsize=4096)
def address_of(host: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 of an IPv6 address; what is neither stays."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) >> 64 << 64))
