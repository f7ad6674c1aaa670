"""Credit that is added to a channel: what is granted, and how the two sides come to have it.

Each side works out by itself what is to be added next, from what it has configured and what the channel has, and signs
nothing else. So both sign the same or none does; whoever has both signatures can tell the other. See docs/payment.md.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from wwwserve.agents.protocol import MICRO
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.channel import Channel, LedgerError
from wwwserve.serving.ledger.entries import Event, Refilled
from wwwserve.serving.ledger.exchange import Declined, Refilling
from wwwserve.serving.ledger.journaled_books import JournaledBooks
from wwwserve.serving.ledger.statements import Agreed, Opening, Refill, check, sign

log = logging.getLogger("wwwserve.ledger")

MOST_SOURCE = 256  # characters


class Grant(NamedTuple):
    """What a channel begins with: the own amount and the peer's, and where that is agreed; and what the two are granted
    in all, `later`, one refill after the other."""

    own: int
    other: int
    source: str
    later: tuple["Grant", ...] = ()

    def amounts(self, own: str, peer: str) -> tuple[int, int]:
        """In the order of the two names."""
        return (self.own, self.other) if own < peer else (self.other, self.own)

    def opening(self, own: str, peer: str) -> Opening:
        """Of the channel of the two."""
        a, b = sorted((own, peer))
        return Opening(a, b, *self.amounts(own, peer), self.source)

    def allows(self, opening: Opening, own: str, peer: str) -> bool:
        """Whether the channel of the two may have begun so: with no more for either."""
        least = opening.amount_a >= 0 and opening.amount_b >= 0
        most = all(map(int.__le__, (opening.amount_a, opening.amount_b), self.amounts(own, peer)))
        names = [opening.a, opening.b] == sorted((own, peer))
        return least and most and names and len(opening.source) <= MOST_SOURCE


def terms(yours: int, ours: int) -> str:
    """What a channel has, micro-credits, as a peer is told."""
    return f"{yours / MICRO:g} credits for you and {ours / MICRO:g} for this node"


def take_over(channel: Channel, peer: str, refills: Iterable[Agreed], add: Callable[[Event], None]) -> None:
    """Add those that the peer has and that were not heard of here, or were forgotten. Raises StatementError and
    LedgerError."""
    for agreed in refills:
        if agreed.refill.number > len(channel.refills):
            agreed.verify(channel.opening)
            add(Refilled(peer, agreed))


class Refiller:
    """Of one run of a node."""

    def __init__(
        self, ledger: JournaledBooks, identity: Identity, grants: Mapping[str, Grant], add: Callable[[Event], None]
    ) -> None:  # fmt: skip
        """`add` lets an entry take effect."""
        self.due: set[str] = set()  # peers to whom a refill is to be proposed
        self.declined: dict[str, str] = {}  # why a peer does not agree to one, or what it asks for that is not granted
        self._ledger, self._identity, self._grants, self._add = ledger, identity, grants, add

    def next(self, peer: str) -> Refill | None:
        """What is to be added to a channel next by what is configured; None for nothing. Credit that was agreed is not
        taken back."""
        channel, grant = self._ledger.books.channels.get(peer), self._grants.get(peer)
        if channel is None or grant is None or channel.is_closed or channel.leaving_ms:
            return None
        before = channel.granted
        for each in (grant, *grant.later):
            a, b = map(max, before, each.amounts(self._ledger.name, peer))
            if (a, b) != before:
                return Refill(channel.digest, len(channel.refills) + 1, a, b, each.source)
        return None

    def _of(self, peer: str, amounts: tuple[int, int]) -> tuple[int, int]:
        """The peer's and the own, of amounts in the order of the two names."""
        return amounts if peer < self._ledger.name else amounts[::-1]

    def is_less(self, peer: str) -> bool:
        """Whether less is configured than the channel has."""
        grant, channel = self._grants.get(peer), self._ledger.books.channel(peer)
        if grant is None:
            return False
        last = (grant, *grant.later)[-1].amounts(self._ledger.name, peer)
        return any(now < before for now, before in zip(last, channel.granted, strict=True))

    def look(self, peer: str, knows: bool) -> None:
        """Whether one is to be proposed to a peer, which `knows` what it is."""
        self.declined.pop(peer, None)
        if knows and self.next(peer) is not None:
            self.due.add(peer)
        else:
            self.due.discard(peer)

    def proposal(self, peer: str) -> Refilling | None:
        """One that is due."""
        refill = self.next(peer) if peer in self.due else None
        return Refilling(refill, sign(self._identity, "refill", refill)) if refill is not None else None

    def received(self, peer: str, message: Refilling, knows_all: bool) -> Refilling | Declined:
        """A peer has signed a refill; `knows_all`: what was added before is known here. One that came before is
        answered again. Raises StatementError and LedgerError."""
        channel, refill = self._ledger.books.channel(peer), message.refill
        if refill.number > len(channel.refills):
            if not knows_all:
                return Declined("it is not known here yet what was added to the channel", refill.number)
            due = self.next(peer)
            if refill != due:
                asked = self._of(peer, (refill.amount_a, refill.amount_b))
                here = self._of(peer, (due.amount_a, due.amount_b) if due is not None else channel.granted)
                self.declined[peer] = (
                    f"it asks for {asked[1] / MICRO:g} credits in all for this node and {asked[0] / MICRO:g} for itself"
                )
                return Declined(f"the credit to be added is other here: {terms(*here)} in all", refill.number)
            self._sign(peer, refill, message.signature)
        elif refill.number < 1 or refill != channel.refills[refill.number - 1].refill:
            return Declined("other credit was added to the channel", refill.number)
        return Refilling(refill, sign(self._identity, "refill", refill))

    def replied(self, peer: str, answer: Refilling) -> None:
        """A peer has signed what was proposed to it. Raises StatementError and LedgerError."""
        if answer.refill.number <= len(self._ledger.books.channel(peer).refills):
            return  # both proposed it
        if answer.refill != self.next(peer):
            raise LedgerError(f"{peer} adds other credit to the channel")
        self._sign(peer, answer.refill, answer.signature)

    def refused(self, peer: str, reason: str) -> None:
        """A peer does not agree; it is asked again once it has started anew, or proposes one itself."""
        log.info("a peer does not agree to add credit", extra={"peer": peer, "reason": reason})
        self.due.discard(peer)
        self.declined[peer] = reason

    def _sign(self, peer: str, refill: Refill, signature: str) -> None:
        check(peer, "refill", refill, signature)
        own = sign(self._identity, "refill", refill)
        one, other = (own, signature) if self._ledger.name < peer else (signature, own)
        self._add(Refilled(peer, Agreed(refill, one, other)))
        log.info("credit is added to a channel", extra={"peer": peer, "number": refill.number})
        self.look(peer, knows=True)
