"""Channels as a node's journal tells them: what an entry does to what the two of a channel own.

Entries are applied in one place, `Books.apply`, when they come about and when a journal is replayed. Credit moves by
the rules of `agents.protocol` alone: what a node pays leaves its escrow when its request has ended; what it earns
leaves the peer's escrow when a voucher of the peer says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from wwwserve.agents.kernel import Ints
from wwwserve.agents.protocol import ACCOUNT_SIZE, ESCROW, FREE, lock, settle
from wwwserve.serving.ledger.entries import (
    Acked,
    Closed,
    Credited,
    Delivered,
    Event,
    Freed,
    Leaving,
    Locked,
    Noted,
    Opened,
    Recovered,
    Refilled,
    Reopened,
    Settled,
    Skipped,
    Stated,
    Taken,
    Vouched,
)
from wwwserve.serving.ledger.journal import Balance
from wwwserve.serving.ledger.statements import (
    GOING,
    MOST_AMOUNT,
    NOTHING,
    Agreed,
    Ended,
    Opening,
    Receipt,
    Signed,
    State,
    StatementError,
    link,
)

OWN, PEER = 0, 1  # rows of a channel's accounts
CONFLICT = "conflict"  # kind of a note
STAKE = '{"type":"stake"'  # begins what says what a node stakes, not who lost some
VOUCHERS_KEPT = 64  # of a peer, to tell one that says otherwise from one that comes again


class LedgerError(ValueError):
    """What the rules of the ledger forbid; the message says why."""


class Channel(msgspec.Struct):
    """One channel, as its owner sees it."""

    opening: Opening
    digest: str
    accounts: Ints  # [2, ACCOUNT_SIZE], the own and the peer's
    # What the owner pays.
    asked: int  # id of its last request
    number: int  # of receipts, ...
    total: int
    head: str
    voucher: Signed | None = None
    acked: int = 0
    acked_head: str = ""  # of the chain at `acked`
    open: dict[int, Locked] = {}
    advanced: dict[int, int] = {}  # what was paid in instalments for those that are open
    unacked: list[Receipt] = []
    unacked_amounts: list[int] = []  # what was in escrow for each of them
    unacked_locked: int = 0  # for all of them, which the peer cannot know to be free yet
    unseen: int = 0  # what was paid for work of which nothing came, as the user did not wait for it
    # What the peer pays.
    taken_id: int = 0  # highest id
    paid_number: int = 0
    paid_total: int = 0
    paid_head: str = ""
    vouchers: list[Signed] = []
    taken: dict[int, Taken] = {}
    earned: dict[int, int] = {}  # what was paid in instalments for those that are taken
    delivered: dict[int, Delivered] = {}
    beyond: dict[int, int] = {}  # what is due of those that were delivered beyond what was in escrow for them
    short: int = 0
    unpaid: int = 0  # what it was delivered, and had not paid when the owner closed the channel alone
    over: int = 0
    conflict: bool = False  # it signed two vouchers of one number
    refills: list[Agreed] = []
    leaving_ms: int = 0  # since when it is to be closed; 0: it is not
    ended: Ended | None = None  # how it was closed or opened again last,
    ended_before: Ended | None = None  # and by both, where the owner has closed it alone since

    @property
    def is_closed(self) -> bool:
        """Whether it is, by both or by the owner alone."""
        return self.ended is not None and not self.ended.closing.open

    @property
    def is_agreed(self) -> bool:
        """Whether both have signed what was said last about its end."""
        return self.ended is None or self.ended.is_agreed

    @property
    def ended_by_both(self) -> Ended | None:
        """How both closed or opened it again last."""
        return self.ended if self.is_agreed else self.ended_before

    @property
    def closings(self) -> int:
        """Closings and reopenings that both have signed."""
        return 0 if self.ended is None else self.ended.closing.number - (not self.ended.is_agreed)

    def owned(self, owner: str, paid: int, earned: int) -> tuple[int, int]:
        """What the owner and the peer have after so much was paid between them in all."""
        own, other = self.granted if self.opening.a == owner else self.granted[::-1]
        return own - paid + earned, other + paid - earned

    @property
    def granted(self) -> tuple[int, int]:
        """What the two of the opening, `a` and `b`, were granted in all."""
        last = self.refills[-1].refill if self.refills else self.opening
        return last.amount_a, last.amount_b

    @property
    def vouched(self) -> tuple[int, str]:
        """Of how many receipts by which the owner pays it has signed a voucher, and the head of the chain there."""
        if self.voucher is not None and self.voucher.state.number > self.acked:
            return self.voucher.state.number, self.voucher.state.head
        return self.acked, self.acked_head

    @property
    def exposed(self) -> int:
        """What the peer has of the owner's credit in escrow, for all that the peer knows."""
        return int(self.accounts[OWN, ESCROW]) + self.unacked_locked

    def state(self, payer: str, payee: str) -> State:
        """Of the chain that the owner, `payer`, pays by."""
        return State(self.digest, payer, payee, self.number, self.total, self.head)

    def paid(self, payer: str, payee: str) -> State:
        """Of the chain that the peer, `payer`, pays by."""
        return State(self.digest, payer, payee, self.paid_number, self.paid_total, self.paid_head)

    def without(self, count: int) -> tuple[str, list[Receipt]]:
        """The head of the chain by which the owner pays before its last `count` receipts, and these. Raises LedgerError
        where the peer has signed some of them."""
        if not count:
            return self.head, []
        if count > len(self.unacked) or not self.acked_head:
            raise LedgerError(f"{count} receipts are more than the peer has not signed")
        head = self.acked_head
        for receipt in self.unacked[:-count]:
            head = link(head, receipt)
        return head, self.unacked[-count:]

    def balance(self, peer: str) -> Balance:
        """What the two own."""
        a = self.accounts
        own, other = (int(a[OWN, FREE]), int(a[OWN, ESCROW])), (int(a[PEER, FREE]), int(a[PEER, ESCROW]))
        return Balance(peer, sum(self.granted), *own, *other)


class Books:
    """All channels of a node, by peer."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.channels: dict[str, Channel] = {}
        self.statements: list[str] = []  # about stake: the last of the own, and all by which somebody lost some
        self._rules: dict[type, Any] = {
            Opened: self._opened, Refilled: self._refilled,
            Locked: self._locked, Freed: self._freed, Settled: self._settled,
            Vouched: self._vouched, Acked: self._acked, Taken: self._taken, Delivered: self._delivered,
            Credited: self._credited, Noted: self._noted, Recovered: self._recovered, Reopened: self._reopened,
            Skipped: self._skipped, Stated: self._stated, Leaving: self._leaving, Closed: self._closed,
        }  # fmt: skip

    def apply(self, event: Event) -> None:
        """Let an entry take effect. Raises LedgerError, and then nothing has changed, for one that the rules forbid."""
        self._rules[type(event)](event)

    def channel(self, peer: str) -> Channel:
        """The channel with a peer. Raises LedgerError where there is none."""
        found = self.channels.get(peer)
        if found is None:
            raise LedgerError(f"there is no channel with {peer}")
        return found

    def encode(self) -> bytes:
        """All of it, as `load` reads it."""
        return msgspec.json.encode((self.channels, self.statements), enc_hook=lambda array: array.tolist())

    def load(self, body: bytes) -> None:
        """Take over what `encode` wrote. Raises StatementError."""
        try:
            kept = msgspec.json.Decoder(
                tuple[dict[str, Channel], list[str]], dec_hook=lambda kind, rows: np.array(rows, np.int64)
            )
            self.channels, self.statements = kept.decode(body)
        except (msgspec.DecodeError, ValueError) as error:
            raise StatementError(f"not a snapshot: {error}") from None
        for channel in self.channels.values():  # of a release that did not keep it
            if not channel.acked_head and channel.acked in (0, channel.number):
                channel.acked_head = channel.head if channel.acked else channel.digest

    def _opened(self, event: Opened) -> None:
        opening = event.opening
        if event.peer in self.channels:
            raise LedgerError(f"the channel with {event.peer} is open already")
        if (opening.a, opening.b) != tuple(sorted((self.owner, event.peer))) or opening.a == opening.b:
            raise LedgerError(f"a channel of {opening.a} and {opening.b} is none of {self.owner} and {event.peer}")
        if min(opening.amount_a, opening.amount_b) < 0:
            raise LedgerError("a channel cannot be opened with less than nothing")
        accounts = np.zeros((2, ACCOUNT_SIZE), np.int64)
        accounts[:, FREE] = opening.amounts(self.owner)
        name = opening.digest()
        self.channels[event.peer] = Channel(opening, name, accounts, 0, 0, 0, name, acked_head=name, paid_head=name)

    def _refilled(self, event: Refilled) -> None:
        channel, refill = self.channel(event.peer), event.agreed.refill
        if channel.is_closed and channel.is_agreed:
            raise LedgerError(f"the channel with {event.peer} is closed")
        if (refill.channel, refill.number) != (channel.digest, len(channel.refills) + 1):
            raise LedgerError(f"refill {refill.number} is not the next of the channel with {event.peer}")
        after = (refill.amount_a, refill.amount_b)
        more = [now - before for now, before in zip(after, channel.granted, strict=True)]
        if min(more) < 0 or not any(more) or max(after) > MOST_AMOUNT:
            raise LedgerError(f"refill {refill.number} of the channel with {event.peer} adds {more} micro-credits")
        channel.accounts[:, FREE] += more if channel.opening.a == self.owner else more[::-1]
        channel.refills = [*channel.refills, event.agreed]

    def _locked(self, event: Locked) -> None:
        channel = self.channel(event.peer)
        _check_open(channel, event.peer)
        if event.id != channel.asked + 1 or not event.terms.possible():
            raise LedgerError(f"request {event.id} does not follow {channel.asked}, or its terms cannot be")
        if not lock(channel.accounts[OWN], event.terms.amount):
            raise LedgerError(f"{event.terms.amount} micro-credits are more than is free with {event.peer}")
        channel.asked = event.id
        channel.open[event.id] = event

    def _freed(self, event: Freed) -> None:
        channel = self.channel(event.peer)
        locked = channel.open.pop(event.id, None)
        if locked is None:
            raise LedgerError(f"request {event.id} is not with {event.peer}")
        amount = locked.terms.amount - channel.advanced.pop(event.id, 0)
        settle(channel.accounts[OWN], channel.accounts[PEER], amount, 0)

    def _settled(self, event: Settled) -> None:
        channel, receipt = self.channel(event.peer), event.receipt
        locked = channel.open.get(receipt.id)
        if locked is None:
            raise LedgerError(f"request {receipt.id} is not with {event.peer}")
        amount = locked.terms.amount - channel.advanced.get(receipt.id, 0)
        if (receipt.request, receipt.terms) != (locked.request, locked.terms) or not 0 <= receipt.due <= amount:
            raise LedgerError(f"the receipt of request {receipt.id} is not of what was asked, or pays more")
        _check_receipt(receipt)
        if receipt.served.came == GOING:
            amount = receipt.due
            channel.advanced[receipt.id] = channel.advanced.get(receipt.id, 0) + amount
        else:
            del channel.open[receipt.id]
            channel.advanced.pop(receipt.id, None)
        settle(channel.accounts[OWN], channel.accounts[PEER], amount, receipt.due)
        channel.number, channel.total = channel.number + 1, channel.total + receipt.due
        channel.unseen += _unseen([receipt])
        channel.head = link(channel.head, receipt)
        channel.unacked.append(receipt)
        channel.unacked_locked += amount
        channel.unacked_amounts.append(amount)

    def _vouched(self, event: Vouched) -> None:
        channel = self.channel(event.peer)
        state = State(channel.digest, self.owner, event.peer, event.number, event.total, event.head)
        if state != channel.state(self.owner, event.peer):
            raise LedgerError(f"voucher {event.number} is not of the chain as it stands")
        channel.voucher = Signed(state, event.signature)

    def _acked(self, event: Acked) -> None:
        channel = self.channel(event.peer)
        count = event.number - channel.acked
        if not 0 < count <= len(channel.unacked):
            raise LedgerError(f"{event.peer} acknowledges receipt {event.number} of {channel.number}")
        channel.unacked = channel.unacked[count:]
        amounts, channel.unacked_amounts = channel.unacked_amounts[:count], channel.unacked_amounts[count:]
        channel.acked, channel.acked_head = event.number, event.head
        channel.unacked_locked -= sum(amounts)

    def _recovered(self, event: Recovered) -> None:
        channel, state = self.channel(event.peer), event.voucher.state
        own, peer = channel.accounts[OWN].copy(), channel.accounts[PEER].copy()
        requests: dict[int, Locked | Taken] = {**channel.open}
        paid = dict(channel.advanced)
        head, undone = channel.without(event.undone)
        _pay_back(own, peer, requests, paid, undone)
        _free_others(own, requests, paid, event.receipts)
        total = channel.total - sum(receipt.due for receipt in undone)
        for receipt in event.receipts:
            head, total = link(head, receipt), total + receipt.due
        _pay(own, peer, requests, paid, event.receipts)
        if peer[FREE] < 0:
            raise LedgerError(f"voucher {state.number} pays {event.peer} less than it has spent")
        number = channel.number - event.undone + len(event.receipts)
        if not event.receipts or state != State(channel.digest, self.owner, event.peer, number, total, head):
            raise LedgerError(f"voucher {state.number} does not follow from what is known here and its receipts")
        channel.accounts[OWN], channel.accounts[PEER] = own, peer
        channel.unseen += _unseen(event.receipts) - _unseen(undone)
        channel.asked = max(channel.asked, *(receipt.id for receipt in event.receipts))
        channel.open = {id: each for id, each in channel.open.items() if id in requests}
        channel.advanced = {id: each for id, each in paid.items() if id in requests}
        channel.number, channel.total, channel.head, channel.voucher = number, total, head, event.voucher
        # The peer has it.
        channel.acked, channel.unacked, channel.unacked_amounts, channel.unacked_locked = number, [], [], 0
        channel.acked_head = head

    def _reopened(self, event: Reopened) -> None:
        channel, left = self.channel(event.peer), event.terms.amount - event.paid
        _check_open(channel, event.peer)
        if event.id in channel.open or not event.terms.possible() or left < 0 or not lock(channel.accounts[OWN], left):
            raise LedgerError(f"request {event.id} cannot have gone to {event.peer}")
        channel.asked = max(channel.asked, event.id)
        if event.paid:
            channel.advanced[event.id] = event.paid
        channel.open[event.id] = Locked(event.peer, event.id, event.request, event.terms)

    def _skipped(self, event: Skipped) -> None:
        channel = self.channel(event.peer)
        channel.asked = max(channel.asked, event.id)

    def _taken(self, event: Taken) -> None:
        channel = self.channel(event.peer)
        _check_open(channel, event.peer)
        if event.id in channel.taken or event.id <= 0 or not event.terms.possible():
            raise LedgerError(f"request {event.id} of {event.peer} is here already, or its terms cannot be")
        if not lock(channel.accounts[PEER], event.terms.amount):
            raise LedgerError(f"{event.terms.amount} micro-credits are more than {event.peer} has free")
        channel.taken_id = max(channel.taken_id, event.id)
        channel.taken[event.id] = event

    def _delivered(self, event: Delivered) -> None:
        channel = self.channel(event.peer)
        if event.id not in channel.taken:
            raise LedgerError(f"request {event.id} of {event.peer} is not here")
        channel.delivered[event.id] = event
        beyond = event.due - channel.taken[event.id].terms.amount
        if beyond > 0:
            channel.beyond[event.id] = beyond

    def _credited(self, event: Credited) -> None:
        channel, state = self.channel(event.peer), event.voucher.state
        _check_open(channel, event.peer)
        head, total = channel.paid_head, channel.paid_total
        own, peer = channel.accounts[OWN].copy(), channel.accounts[PEER].copy()
        requests: dict[int, Locked | Taken] = {**channel.taken}
        earned, ended = dict(channel.earned), set[int]()
        for receipt in event.receipts:
            taken = channel.taken.get(receipt.id)
            if taken is not None and not _is_of(receipt, taken):
                raise LedgerError(f"the receipt of request {receipt.id} is not of what was taken")
            if receipt.id in ended:
                raise LedgerError(f"voucher {state.number} of {event.peer} has request {receipt.id} twice")
            if receipt.served.came != GOING:
                ended.add(receipt.id)
            head, total = link(head, receipt), total + receipt.due
        _pay(peer, own, requests, earned, event.receipts)
        number = channel.paid_number + len(event.receipts)
        if state != State(channel.digest, event.peer, self.owner, number, total, head):
            raise LedgerError(f"voucher {state.number} of {event.peer} does not follow from its receipts")
        if not event.receipts:
            raise LedgerError(f"voucher {state.number} of {event.peer} has no receipt")
        channel.accounts[OWN], channel.accounts[PEER] = own, peer
        channel.taken_id = max(channel.taken_id, *(receipt.id for receipt in event.receipts))
        for id in ended:
            channel.taken.pop(id, None)
            channel.delivered.pop(id, None)
            channel.beyond.pop(id, None)
        channel.earned = {id: each for id, each in earned.items() if id in channel.taken}
        channel.paid_number, channel.paid_total, channel.paid_head = number, total, head
        channel.vouchers = [*channel.vouchers[1 - VOUCHERS_KEPT :], event.voucher]

    def _leaving(self, event: Leaving) -> None:
        self.channel(event.peer).leaving_ms = event.at_ms

    def _closed(self, event: Closed) -> None:
        """Both chains come to what is stated, without the receipts that are not known, and nothing is in escrow. What
        the peer was delivered and does not state to have paid is short once both have signed."""
        channel, closing = self.channel(event.peer), event.ended.closing
        if closing.channel != channel.digest or closing.number <= channel.closings:
            raise LedgerError(f"closing {closing.number} is none of the channel with {event.peer}")
        if closing.open and not event.ended.is_agreed:
            raise LedgerError(f"{event.peer} has not agreed to open the channel again")
        own, other = closing.of(self.owner), closing.of(event.peer)
        if closing.open and other.number < channel.paid_number:  # which the peer has signed since it was opened again
            other = channel.paid(event.peer, self.owner)
        # What both have signed stands in the place of own receipts that the peer has not signed.
        signed = channel.acked if event.ended.is_agreed else channel.number
        if own.number < signed or other.number < channel.paid_number:
            raise LedgerError(f"closing {closing.number} states less than was signed")
        amounts = channel.owned(self.owner, own.total, other.total)
        if min(amounts) < 0:
            raise LedgerError(f"closing {closing.number} states more than there is")
        owed = sum(max(0, each.due - channel.earned.get(id, 0)) for id, each in channel.delivered.items())
        channel.unpaid = max(0, channel.unpaid + owed - (other.total - channel.paid_total))
        if event.ended.is_agreed:
            channel.short, channel.unpaid = channel.short + channel.unpaid, 0
        channel.accounts[:, FREE], channel.accounts[:, ESCROW] = amounts, 0
        channel.number, channel.total, channel.head, channel.voucher = own.number, own.total, own.head, None
        channel.paid_number, channel.paid_total, channel.paid_head = other.number, other.total, other.head
        if event.ended.is_agreed:
            channel.acked, channel.acked_head, channel.unacked = own.number, own.head, []
        # Else the peer has yet to sign these, and may have others in their place.
        channel.unacked_amounts, channel.unacked_locked = [0] * len(channel.unacked), 0
        channel.open, channel.advanced = {}, {}
        channel.taken, channel.earned, channel.delivered, channel.beyond = {}, {}, {}, {}
        channel.ended_before = None if event.ended.is_agreed else channel.ended_by_both
        channel.ended, channel.leaving_ms = event.ended, 0

    def _noted(self, event: Noted) -> None:
        channel = self.channels.get(event.peer)
        if channel is not None:
            channel.short += event.short
            channel.over += event.over
            channel.conflict = channel.conflict or event.kind == CONFLICT

    def _stated(self, event: Stated) -> None:
        if event.statement.startswith(STAKE):
            self.statements = [each for each in self.statements if not each.startswith(STAKE)]
        self.statements.append(event.statement)


def _pay(
    payer: Ints, payee: Ints, requests: dict[int, Locked | Taken], paid: dict[int, int], receipts: Sequence[Receipt]
) -> None:  # fmt: skip
    """Let receipts move credit between two accounts: out of what is in escrow for `requests`, of which so much is
    `paid`, or, of those that are not known any more, out of what is free. Takes out of both the requests that have
    ended. Raises LedgerError."""
    unknown = 0  # to be paid last, as what it is paid of may be what others leave in escrow
    for receipt in receipts:
        _check_receipt(receipt)
        request = requests.get(receipt.id)
        if request is None:
            unknown += receipt.due
            continue
        before = paid.get(receipt.id, 0)
        left = request.terms.amount - before
        if receipt.due > left:
            raise LedgerError(f"the receipt of request {receipt.id} pays {receipt.due} of {left}")
        going = receipt.served.came == GOING
        settle(payer, payee, receipt.due if going else left, receipt.due)
        if going:
            paid[receipt.id] = before + receipt.due
        else:
            del requests[receipt.id]
            paid.pop(receipt.id, None)
    if unknown > payer[FREE]:
        raise LedgerError(f"{unknown} micro-credits are more than is free")
    lock(payer, unknown)
    settle(payer, payee, unknown, unknown)


def _pay_back(
    payer: Ints, payee: Ints, requests: Mapping[int, Locked | Taken], paid: dict[int, int], receipts: Sequence[Receipt]
) -> None:  # fmt: skip
    """Undo what receipts paid: instalments of requests that are open go back in escrow, all else is free."""
    for receipt in receipts:
        payee[FREE] -= receipt.due
        payer[ESCROW if receipt.id in requests else FREE] += receipt.due
        if receipt.id in requests:
            paid[receipt.id] -= receipt.due


def _free_others(
    payer: Ints, requests: dict[int, Locked | Taken], paid: dict[int, int], receipts: Sequence[Receipt]
) -> None:  # fmt: skip
    """Take out of `requests` those that share no more than their id with what a receipt is of."""
    for receipt in receipts:
        other = requests.get(receipt.id)
        if other is not None and (other.request, other.terms) != (receipt.request, receipt.terms):
            settle(payer, payer, other.terms.amount - paid.pop(receipt.id, 0), 0)
            del requests[receipt.id]


def _unseen(receipts: Sequence[Receipt]) -> int:
    """What was paid for work of which nothing came."""
    return sum(receipt.due for receipt in receipts if receipt.served.answer == "")


def _check_open(channel: Channel, peer: str) -> None:
    if channel.is_closed:
        raise LedgerError(f"the channel with {peer} is closed")


def _is_of(receipt: Receipt, taken: Taken) -> bool:
    """Whether a receipt is of what was taken: the same terms, and if anything is paid or came, the promise made."""
    if (receipt.request, receipt.terms) != (taken.request, taken.terms):
        return False
    return receipt.promise == taken.promise or (receipt.promise is None and receipt.served.came == NOTHING)


def _check_receipt(receipt: Receipt) -> None:
    served = receipt.served
    if not (served.possible() and receipt.terms.possible() and 0 <= receipt.due <= MOST_AMOUNT):
        raise LedgerError(f"the receipt of request {receipt.id} is none")
    if served.prompt > receipt.terms.prompt:
        raise LedgerError(f"the receipt of request {receipt.id} has a longer prompt than was agreed")
    if served.came == NOTHING and receipt.due:
        raise LedgerError(f"the receipt of request {receipt.id} pays {receipt.due} for nothing")
