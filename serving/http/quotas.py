"""How much of a node's time and memory others may have: signatures to be checked, messages, bytes that are coming.

A signature has to be checked before it is known whose a message is. So what counts for a peer are the messages that it
has signed, which nobody else can use up; what turns out to be forged counts for the address that it came from.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable

from wwwserve.serving.http.messages import Refused

AT_ONCE = 32  # messages of peers, and as many requests of users, in one turn of the event loop
BURST = 256  # signatures at once, 30 ms
FORGED_PER_S = 100.0  # from one address
MOST_NAMES = 4096  # for which it is known what they used
SHARE = 4  # an address or a peer may have that part of the bytes that are coming


class Quota:
    """So much in a second for each name, and so much at once."""

    def __init__(self, per_s: float, burst: float, clock: Callable[[], float]) -> None:
        self.per_s, self.burst, self.clock = per_s, burst, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what there was, and when

    def left(self, name: str) -> float:
        """How much a name has, below 0 if it took more than it had."""
        if name not in self._left:
            return self.burst
        left, at_s = self._left[name]
        return min(self.burst, left + self.per_s * (self.clock() - at_s))

    def spend(self, name: str, count: float = 1.0) -> None:
        """A name took so much."""
        self._left[name] = self.left(name) - count, self.clock()
        self._left.move_to_end(name)
        if len(self._left) > MOST_NAMES:
            self._left.popitem(last=False)


class Turns:
    """So many of some work in one turn of the event loop, in the order in which it came."""

    def __init__(self, at_once: int) -> None:
        self.at_once = self._left = at_once
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._due = False  # whether the next turn is awaited

    async def take(self) -> None:
        """Wait for a turn in which there is room for one more."""
        loop = asyncio.get_running_loop()
        if not self._due:
            self._due = True
            loop.call_soon(self._next)
        if self._left:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self) -> None:
        self._left, self._due = self.at_once, False
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._left -= 1
        if self._left < self.at_once:
            self._due = True
            asyncio.get_running_loop().call_soon(self._next)


class Room:
    """So many bytes of bodies in all, and a part of them for each name."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0
        self._used: dict[str, int] = {}

    def came(self, who: str, size: int) -> bool:
        """Bytes came, to be kept until `gone`; returns whether there is room for them."""
        kept = self._used.get(who, 0) + size
        if self.used + size > self.most or kept > self.most // SHARE:
            return False
        if size:
            self._used[who] = kept
            self.used += size
        return True

    def gone(self, who: str, size: int) -> None:
        """So many of the bytes that `came` are not kept any more."""
        if size:
            self.used -= size
            left = self._used[who] - size
            if left:
                self._used[who] = left
            else:
                del self._used[who]


class Quotas:
    """Those of one node."""

    def __init__(self, peer_messages_per_s: float, receiving_bytes: int, clock: Callable[[], float]) -> None:
        self.signed = Quota(peer_messages_per_s, BURST, clock)
        self.peers, self.users = Turns(AT_ONCE), Turns(AT_ONCE)
        self.forged = Quota(FORGED_PER_S, FORGED_PER_S, clock)
        self.coming = Room(receiving_bytes)

    def admit(self, peer: str, address: str) -> None:
        """Raises Refused for a message that is not to be looked at now, of who is said to be `peer`."""
        if self.forged.left(address) < 1:
            raise Refused("crowded", "too much that was forged came from this address")
        if self.signed.left(peer) < 1:
            raise Refused("crowded", f"{peer} sends more than this node looks at")
