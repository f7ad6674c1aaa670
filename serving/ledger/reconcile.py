"""What the two of a channel tell each other when one of them starts, before it signs anything for the other.

A journal may be an old copy, as of a disk that was restored: what its node signed since is known to its peers alone.
So each run of a node asks each peer once, and takes over what it has forgotten: the vouchers that it signed, the
numbers of its requests, its last statement of stake. A node that signed a number again with other content would lose
its stake. What the peer forgot is told again, voucher by voucher as they were signed, as what the one pays may have
come from what the other paid. Each run also tells each peer its last voucher once, acknowledged or not: the run before
may have ended while it told again.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator

from wwwserve.serving.ledger.channel import Channel, LedgerError
from wwwserve.serving.ledger.entries import (
    Acked,
    Closed,
    Credited,
    Event,
    Freed,
    Recovered,
    Reopened,
    Settled,
    Skipped,
    Vouched,
)
from wwwserve.serving.ledger.exchange import Ask, Known, Unpaid
from wwwserve.serving.ledger.journal import Journal
from wwwserve.serving.ledger.journaled_books import JournaledBooks
from wwwserve.serving.ledger.refills import take_over
from wwwserve.serving.ledger.statements import Receipt, Signed, State, Vouch, check, decode

log = logging.getLogger("wwwserve.ledger")

MOST_RECEIPTS = 50_000  # by which a peer may be behind that goes on from an old copy of its journal
MOST_UNPAID = 4096  # of its requests of which it is told
MOST_REFILLS = 1_000  # that a node may have forgotten
MOST_AHEAD = 1 << 32  # ids that a node may have forgotten
RECALL_S = 30.0  # between two looks for what a peer forgot


class Reconciler:
    """Of one run of a node."""

    def __init__(self, ledger: JournaledBooks, add: Callable[[Event], None]) -> None:
        """`add` lets an entry take effect."""
        self.done: set[str] = set()  # peers that have told in this run what they know
        self.again: dict[str, deque[Vouch]] = {}  # for peers that forgot, what they had acknowledged
        self.confirmed: set[str] = set()  # peers that have acknowledged the last voucher in this run
        self._ledger, self._add = ledger, add
        self._recalled_s: dict[str, float] = {}  # when what a peer forgot was last looked for

    async def tell(self, peer: str, ask: Ask, stake: str, epoch: str) -> Known:
        """What is known here of a peer, which has started. Raises LedgerError where it forgot too much."""
        channel = self._ledger.books.channel(peer)
        vouches = await self.recall(peer, _common(channel, ask), ask.paid_number)
        unpaid = [
            Unpaid(id, taken.request, taken.terms, channel.earned.get(id, 0))
            for id, taken in sorted(channel.taken.items())
        ]
        ended = channel.ended_by_both  # one that the own node signed alone is proposed
        if ended is not None and ended.closing.number <= ask.closings:
            ended = None
        refills = tuple(channel.refills[ask.refills :]) if ask.refills is not None else ()
        return Known(
            vouches, channel.taken_id, tuple(unpaid[:MOST_UNPAID]), stake, refills, epoch, ended, channel.paid_number
        )

    async def recall(self, peer: str, number: int, paid_number: int) -> tuple[Vouch, ...]:
        """Where a peer knows only `number` receipts of what it pays, and `paid_number` of what it is paid: its vouchers
        since, from the journal; the others are to be told again. Raises LedgerError where that is not done now."""
        channel = self._ledger.books.channel(peer)
        again = self.again.get(peer)
        acked = again[0].first - 1 if again else channel.acked

        def known() -> int:  # of what is stated in a closing, nothing is told again by its vouchers
            stated = channel.ended.closing.of(self._ledger.name).number if channel.ended is not None else 0
            return max(paid_number, stated)

        behind = max(channel.paid_number - number, acked - known())
        if behind <= 0:
            return ()
        now_s = asyncio.get_running_loop().time()
        if behind > MOST_RECEIPTS or now_s < self._recalled_s.get(peer, -RECALL_S) + RECALL_S:
            raise LedgerError(f"{behind} receipts that {peer} forgot are not looked for now")
        self._recalled_s[peer] = now_s
        log.warning("a peer goes on from an old copy of its journal", extra={"peer": peer, "receipts": behind})
        await self._ledger.durable()
        name, digest = self._ledger.name, channel.digest

        def look() -> tuple[tuple[Vouch, ...], list[Vouch]]:
            with contextlib.closing(self._ledger.journal.reader()) as journal:
                own = acknowledged(journal, name, peer, digest)
                return vouched_since(journal, peer, number), [each for each in own if _last(each) > known()]

        vouches, again_ = await asyncio.to_thread(look)
        again_ = [each for each in again_ if _last(each) > known()]  # it may have been closed meanwhile
        if again_:
            self.again[peer] = deque(again_)
            self._ledger.changed.add(peer)
        return vouches

    def acknowledged(self, peer: str, number: int) -> None:
        """The peer has signed a voucher in this run."""
        again = self.again.get(peer)
        while again and _last(again[0]) <= number:
            again.popleft()
        if not again:
            self.again.pop(peer, None)
        if number == self._ledger.books.channel(peer).number:
            self.confirmed.add(peer)

    def closed(self, peer: str) -> None:
        """A channel was closed or opened again: what was paid before is stated, and not told any more."""
        self.again.pop(peer, None)
        self.confirmed.add(peer)

    def take_over(self, peer: str, known: Known) -> None:
        """Take over what a peer knows of this node and was forgotten here. Raises LedgerError and StatementError for
        what cannot be."""
        channel = self._ledger.books.channel(peer)
        asked, name = channel.asked, self._ledger.name
        refills = (known.refills or ())[:MOST_REFILLS]  # of which what was signed since may be paid
        take_over(channel, peer, refills, self._add)
        if known.ended is not None and known.ended.closing.number > channel.closings and known.ended.is_agreed:
            check(name, "closing", known.ended.closing, known.ended.signature(name, peer))
            check(peer, "closing", known.ended.closing, known.ended.signature(peer, name))
            self._add(Closed(peer, known.ended))
        # What both have closed has nothing to add; what the own node closed alone may have stated too little.
        for vouch in () if channel.is_closed and channel.is_agreed else known.vouches:
            check(self._ledger.name, "voucher", vouch.voucher.state, vouch.voucher.signature)
            self._recover(peer, channel, vouch)
        if known.asked > channel.asked + MOST_AHEAD or len(known.unpaid) > MOST_UNPAID:
            raise LedgerError(f"{peer} has request {known.asked}, and {channel.asked} were asked")
        for lost in known.unpaid:
            if lost.id > known.asked or channel.is_closed:
                continue
            own = channel.open.get(lost.id)
            if own is not None and (own.request, own.terms) != (lost.request, lost.terms):
                self._add(Freed(peer, lost.id))  # it never had that one
                own = None
            if own is None and (lost.id > asked or _is_lost(channel, lost.id, known)):
                self._add(Reopened(peer, lost.id, lost.request, lost.terms, lost.paid))
        if known.asked > channel.asked:  # the receipt of the last one is with the peer
            self._add(Skipped(peer, known.asked))
        self.done.add(peer)

    def _recover(self, peer: str, channel: Channel, vouch: Vouch) -> None:
        """Take over an own voucher that the peer has, unless its receipts are known. Own receipts that the peer does
        not have, and has others in the place of, are undone: they are of another copy of the journal."""
        skip = vouch.first - channel.acked - 1  # of own receipts, before the first of the voucher's
        theirs, own = vouch.receipts[max(0, -skip) :], channel.unacked[max(0, skip) :]
        same = 0
        while same < min(len(theirs), len(own)) and theirs[same] == own[same]:
            same += 1
        if same < len(theirs):
            log.error("the journal is an old copy: taking over what was signed since", extra={"peer": peer})
            self._add(Recovered(peer, vouch.voucher, theirs[same:], len(own) - same))


def _common(channel: Channel, ask: Ask) -> int:
    """Up to which receipt of a peer's chain what it asks about is what is here, as far as its heads say: one that went
    on from one copy of its journal, and is put back to another, has signed others than its peer has."""
    heads = {each.state.number: each.state.head for each in channel.vouchers} | {channel.paid_number: channel.paid_head}
    same = not ask.head or heads.get(ask.number) == ask.head
    return ask.number if same else min(ask.number, ask.acked)


def _is_lost(channel: Channel, id: int, known: Known) -> bool:
    """Whether a request that a peer has as unpaid has no receipt that it has yet to be told, though its id was used."""
    has_all = known.number is not None and known.number >= channel.acked
    return has_all and all(receipt.id != id for receipt in channel.unacked)


def vouched_since(journal: Journal, peer: str, number: int) -> tuple[Vouch, ...]:
    """The vouchers of a peer after that of `number`, with their receipts."""
    return tuple(
        Vouch(event.voucher, event.voucher.state.number + 1 - len(event.receipts), event.receipts)
        for event in _events(journal, peer, "credit")
        if isinstance(event, Credited) and event.voucher.state.number > number
    )


def acknowledged(journal: Journal, name: str, peer: str, channel: str) -> Iterator[Vouch]:
    """The vouchers of `name` that a peer has acknowledged, in order, each with the receipts since the one before or
    since a closing of both."""
    first, receipts = 1, list[Receipt]()  # that are not acknowledged, and the number of the first of them
    signature = ""
    for event in _events(journal, peer, "settle", "vouch", "ack", "recover", "close"):
        if isinstance(event, Settled):
            receipts.append(event.receipt)
            continue
        if isinstance(event, Vouched):
            signature = event.signature  # only the last voucher can be acknowledged
            continue
        if isinstance(event, Closed):
            if event.ended.is_agreed:
                receipts, first = [], event.ended.closing.of(name).number + 1
            continue
        if isinstance(event, Acked):
            state = State(channel, name, peer, event.number, event.total, event.head)
            voucher = Signed(state, signature)
        else:
            assert isinstance(event, Recovered)
            receipts[len(receipts) - event.undone :] = event.receipts
            voucher = event.voucher
        count = voucher.state.number + 1 - first
        yield Vouch(voucher, first, tuple(receipts[:count]))
        first, receipts = first + count, receipts[count:]


def _last(vouch: Vouch) -> int:
    return vouch.voucher.state.number


def _events(journal: Journal, peer: str, *kinds: str) -> Iterator[Event]:
    begins = tuple(f'{{"type":"{kind}","peer":"{peer}"'.encode() for kind in kinds)
    for entry in journal.entries():
        if bytes(entry.body).startswith(begins):
            yield decode(entry.body, Event)
