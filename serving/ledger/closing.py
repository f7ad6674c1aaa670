"""How a channel is closed and opened again: by both, or by one side alone after a waiting time.

A closing states how far each of the two chains has come. Each side states its own chain, by which it pays, so that
nobody loses what it was signed; the other's as far as that has signed it. When both have signed the same, the channel
is closed with the balance that follows; a reopening is the next of these statements, and carries that balance on. The
chains go on as they were, so that no number is ever signed twice. See docs/payment.md.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection

import msgspec

from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.channel import Channel, LedgerError
from wwwserve.serving.ledger.entries import Closed, Event, Leaving
from wwwserve.serving.ledger.exchange import Close, Declined
from wwwserve.serving.ledger.journaled_books import JournaledBooks
from wwwserve.serving.ledger.refills import take_over
from wwwserve.serving.ledger.statements import Closing, Ended, State, check, sign

log = logging.getLogger("wwwserve.ledger")

MOST_CLOSINGS = 64  # and reopenings with a peer in one run, each of which is an entry
HEAD_CHARS = 64  # of a chain


class Closer:
    """Of one run of a node."""

    def __init__(
        self, ledger: JournaledBooks, identity: Identity, wanted: Collection[str], wait_s: float,
        wall_clock: Callable[[], float], add: Callable[[Event], None],
    ) -> None:  # fmt: skip
        """`wanted`: peers with whom there is to be no open channel, closed alone `wait_s` after that was wanted first;
        `add` lets an entry take effect."""
        self.wanted = frozenset(wanted)
        self.able: set[str] = set()  # peers whose release knows closings
        self.forgotten: set[str] = set()  # peers that speak of a channel that is not known here
        self._joined: set[str] = set()  # peers that close, with whose closing the own chain had to be put right
        self._counts: Counter[str] = Counter()
        self._shut: set[str] = set()  # peers that do not open a channel again
        self._ledger, self._identity, self._add = ledger, identity, add
        self._wait_s, self._wall_clock = wait_s, wall_clock

    def begin(self) -> None:
        """Write down since when a channel is to be closed, or that it is not any more."""
        for peer, channel in self._ledger.books.channels.items():
            leaves = peer in self.wanted and not channel.is_closed
            if leaves != bool(channel.leaving_ms):
                self._add(Leaving(peer, max(1, int(1000 * self._wall_clock())) if leaves else 0))

    def opens_none(self, peer: str) -> bool:
        """Whether a channel that is not known here is not to be opened, not even to learn how it is closed."""
        return peer in self.wanted and peer not in self.forgotten

    def expire(self) -> list[str]:
        """Peers of whom enough was waited for: their channels are to be closed alone."""
        channels, now_ms = self._ledger.books.channels, 1000 * self._wall_clock()
        return [
            peer for peer in sorted(self.wanted)
            if peer in channels and 0 < channels[peer].leaving_ms <= now_ms - 1000 * self._wait_s
        ]  # fmt: skip

    def close_alone(self, peer: str) -> None:
        """The peer has had its time. Nothing that the own node asked is open with it."""
        channel = self._ledger.books.channel(peer)
        closing = self._closing(peer, channel, channel.paid(peer, self._ledger.name))
        self._add(Closed(peer, self._ended(peer, closing, self._sign(closing), "")))
        log.warning("a channel is closed without its peer", extra={"peer": peer})

    def restate(self, peer: str) -> None:
        """The peer has told what it knows: of what the own node had signed and forgotten before it closed the channel
        alone, it states all now, and nothing that it signed in the place of that. Else the peer could never agree."""
        channel = self._ledger.books.channel(peer)
        if channel.ended is None or channel.is_agreed or not channel.is_closed:
            return
        if channel.ended.closing.of(self._ledger.name) != channel.state(self._ledger.name, peer):
            self.close_alone(peer)

    def refuses(self, peer: str) -> str:
        """Why nothing is handed over or taken; "" where it may be."""
        channel = self._ledger.books.channels.get(peer)
        if channel is not None and channel.is_closed:
            return f"the channel with {peer} is closed"
        return f"the channel with {peer} is being closed" if peer in self.wanted or peer in self._joined else ""

    def has_to_tell(self, peer: str) -> bool:
        """Whether there is a statement to propose to a peer that is reconciled, and told of all that it is paid."""
        channel = self._ledger.books.channel(peer)
        if channel.is_closed:
            return not channel.is_agreed or self.opens(peer)
        return peer in self._joined or (peer in self.wanted and not channel.open and not channel.taken)

    def opens(self, peer: str) -> bool:
        """Whether a channel that both closed is to be opened again."""
        channel = self._ledger.books.channels.get(peer)
        return channel is not None and channel.is_closed and channel.is_agreed and peer not in self.wanted | self._shut

    def proposal(self, peer: str) -> Close | None:
        """One that is to be told."""
        if peer not in self.able or not self.has_to_tell(peer):
            return None
        channel = self._ledger.books.channel(peer)
        if channel.is_closed and not channel.is_agreed:
            assert channel.ended is not None
            return Close(channel.ended, tuple(channel.refills))
        if channel.is_closed:
            closing = self._reopening(channel)
        else:
            closing = self._closing(peer, channel, channel.paid(peer, self._ledger.name))
        return Close(self._ended(peer, closing, self._sign(closing), ""), tuple(channel.refills))

    def received(self, peer: str, message: Close, is_reconciled: bool, is_busy: bool) -> Close | Declined:
        """A peer has signed a closing or a reopening. `is_busy`: something is under way with it. Raises StatementError
        and LedgerError."""
        channel, ended = self._ledger.books.channel(peer), message.ended
        closing = ended.closing
        if closing.number <= channel.closings and channel.ended is not None:
            return Close(channel.ended, tuple(channel.refills))  # it has forgotten that one, or was not answered
        own = ended.signature(self._ledger.name, peer)
        if closing.channel != channel.digest or not (own or closing.number == channel.closings + 1):
            raise LedgerError(f"closing {closing.number} of {peer} does not follow {channel.closings}")
        check(peer, "closing", closing, ended.signature(peer, self._ledger.name))
        if own:  # signed before, and forgotten
            check(self._ledger.name, "closing", closing, own)
        elif closing.open:
            return self._open_again(peer, channel, closing, ended)
        elif not is_reconciled and not channel.is_closed:
            return Declined("it is not known here yet what was paid")
        if is_busy:
            return Declined("something is under way")
        take_over(channel, peer, message.refills, self._add)
        theirs, mine = closing.of(peer), channel.state(self._ledger.name, peer)
        before = channel.paid(peer, self._ledger.name)
        chain = theirs.payer, theirs.payee, theirs.channel
        if chain != (peer, self._ledger.name, channel.digest) or len(theirs.head) != HEAD_CHARS:
            raise LedgerError(f"the closing of {peer} states another chain")
        if theirs != before and (theirs.number <= before.number or theirs.total < before.total):
            return Declined("it states less than was signed")
        agreed = closing if own else self._closing(peer, channel, theirs)
        if min(channel.owned(self._ledger.name, agreed.of(self._ledger.name).total, theirs.total)) < 0:
            return Declined("it states more than there is")
        if agreed != closing:
            if closing.of(self._ledger.name).number > mine.number or closing.refills > len(channel.refills):
                return Declined("it states what is not known here")
            self._joined.add(peer)  # until the peer has signed what is right
            return Close(self._ended(peer, agreed, self._sign(agreed), ""), tuple(channel.refills))
        return self._agree(peer, closing, ended)

    def replied(self, peer: str, answer: Close, is_busy: bool) -> None:
        """A peer has answered with a closing or a reopening. Raises StatementError and LedgerError."""
        said = self.received(peer, answer, True, is_busy)
        if isinstance(said, Declined):
            raise LedgerError(f"{peer} closes the channel otherwise: {said.reason}")

    def refused(self, peer: str) -> None:
        """A peer does not open the channel again, until it proposes that itself."""
        self._shut.add(peer)

    def _open_again(self, peer: str, channel: Channel, closing: Closing, ended: Ended) -> Close | Declined:
        if peer in self.wanted:
            return Declined("the channel is closed here", closed=True)
        if not channel.is_closed or not channel.is_agreed or closing != self._reopening(channel):
            raise LedgerError(f"{peer} opens a channel again that was not closed so")
        return self._agree(peer, closing, ended)

    def _agree(self, peer: str, closing: Closing, ended: Ended) -> Close:
        self._counts[peer] += 1
        if self._counts[peer] > MOST_CLOSINGS:
            raise LedgerError(f"{peer} closes and opens the channel again and again")
        both = self._ended(peer, closing, self._sign(closing), ended.signature(peer, self._ledger.name))
        self._add(Closed(peer, both))
        log.info("a channel is open again" if closing.open else "a channel is closed", extra={"peer": peer})
        self._joined.discard(peer)
        self._shut.discard(peer)
        return Close(both)

    def _closing(self, peer: str, channel: Channel, theirs: State) -> Closing:
        own = channel.state(self._ledger.name, peer)
        a, b = (own, theirs) if self._ledger.name < peer else (theirs, own)
        return Closing(channel.digest, channel.closings + 1, False, a, b, len(channel.refills))

    def _reopening(self, channel: Channel) -> Closing:
        assert channel.ended is not None
        before = channel.ended.closing
        return msgspec.structs.replace(before, number=before.number + 1, open=True)

    def _sign(self, closing: Closing) -> str:
        return sign(self._identity, "closing", closing)

    def _ended(self, peer: str, closing: Closing, own: str, other: str) -> Ended:
        return Ended(closing, *((own, other) if self._ledger.name < peer else (other, own)))
