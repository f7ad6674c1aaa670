"""Channels as a node's journal tells them: what an entry does to what the two of a channel own.

Entries are applied in one place, `Books.apply`, when they come about and when a journal is replayed. Credit moves by
the rules of `agents.protocol` alone: what a node pays leaves its escrow when its request has ended; what it earns
leaves the peer's escrow when a voucher of the peer says so.
"""

from typing import Any, TypeAlias

import msgspec
import numpy as np

from wwwserve.agents.kernel import Ints
from wwwserve.agents.protocol import ACCOUNT_SIZE, ESCROW, FREE, lock, settle
from wwwserve.serving.ledger.journal import Balance
from wwwserve.serving.ledger.statements import (
    MOST_AMOUNT,
    NOTHING,
    Opening,
    Receipt,
    Served,
    Signed,
    State,
    StatementError,
    Struct,
    Terms,
    link,
)
from wwwserve.serving.market import Promise, Whole

OWN, PEER = 0, 1  # rows of a channel's accounts
STAKE = '{"type":"stake"'  # begins what says what a node stakes, not who lost some
VOUCHERS_KEPT = 64  # of a peer, to tell one that says otherwise from one that comes again


class LedgerError(ValueError):
    """What the rules of the ledger forbid; the message says why."""


class Opened(Struct, frozen=True, tag="open"):
    """Both have signed the channel."""

    peer: str
    opening: Opening
    own: str  # signature
    other: str  # signature of the peer


class Locked(Struct, frozen=True, tag="lock"):
    """A request goes to the peer, on terms, the amount in escrow."""

    peer: str
    id: Whole
    request: str  # digest of its body
    terms: Terms


class Freed(Struct, frozen=True, tag="free"):
    """The peer did not take the request."""

    peer: str
    id: Whole


class Settled(Struct, frozen=True, tag="settle"):
    """A request that the peer had has ended, and is paid as far as it was answered."""

    peer: str
    receipt: Receipt


class Vouched(Struct, frozen=True, tag="vouch"):
    """A voucher was signed for the peer."""

    peer: str
    number: Whole
    total: Whole
    head: str
    signature: str


class Acked(Struct, frozen=True, tag="ack"):
    """The peer has signed the state that a voucher tells."""

    peer: str
    number: Whole
    total: Whole
    head: str
    signature: str


class Taken(Struct, frozen=True, tag="take"):
    """A request of the peer was taken, with a promise."""

    peer: str
    id: Whole
    request: str
    terms: Terms
    promise: Promise


class Delivered(Struct, frozen=True, tag="deliver"):
    """A request of the peer has ended here."""

    peer: str
    id: Whole
    served: Served


class Credited(Struct, frozen=True, tag="credit"):
    """A voucher of the peer, the receipts that it brought, and the own signature under the same state."""

    peer: str
    voucher: Signed
    receipts: tuple[Receipt, ...]
    signature: str


class Noted(Struct, frozen=True, tag="note"):
    """Evidence."""

    peer: str
    kind: str
    content: str
    short: Whole = 0  # micro-credits that the peer paid less than was delivered


class Stated(Struct, frozen=True, tag="state"):
    """A signed statement about stake, see `serving.ledger.stakes`."""

    peer: str  # from whom it came
    statement: str


Event: TypeAlias = (
    Opened | Locked | Freed | Settled | Vouched | Acked | Taken | Delivered | Credited | Noted | Stated
)  # fmt: skip


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
    open: dict[int, Locked] = {}
    unacked: list[Receipt] = []
    unacked_locked: int = 0  # what was in escrow for them, which the peer cannot know to be free yet
    # What the peer pays.
    taken_id: int = 0  # highest id
    paid_number: int = 0
    paid_total: int = 0
    paid_head: str = ""
    vouchers: list[Signed] = []
    taken: dict[int, Taken] = {}
    delivered: dict[int, Delivered] = {}
    short: int = 0

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

    def balance(self, peer: str) -> Balance:
        """What the two own."""
        a = self.accounts
        opened = self.opening.amount_a + self.opening.amount_b
        own, other = (int(a[OWN, FREE]), int(a[OWN, ESCROW])), (int(a[PEER, FREE]), int(a[PEER, ESCROW]))
        return Balance(peer, opened, *own, *other)


class Books:
    """All channels of a node, by peer."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.channels: dict[str, Channel] = {}
        self.statements: list[str] = []  # about stake: the last of the own, and all by which somebody lost some
        self._rules: dict[type, Any] = {
            Opened: self._opened, Locked: self._locked, Freed: self._freed, Settled: self._settled,
            Vouched: self._vouched, Acked: self._acked, Taken: self._taken, Delivered: self._delivered,
            Credited: self._credited, Noted: self._noted, Stated: self._stated,
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
        self.channels[event.peer] = Channel(opening, name, accounts, 0, 0, 0, name, paid_head=name)

    def _locked(self, event: Locked) -> None:
        channel = self.channel(event.peer)
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
        settle(channel.accounts[OWN], channel.accounts[PEER], locked.terms.amount, 0)

    def _settled(self, event: Settled) -> None:
        channel, receipt = self.channel(event.peer), event.receipt
        locked = channel.open.get(receipt.id)
        if locked is None:
            raise LedgerError(f"request {receipt.id} is not with {event.peer}")
        amount = locked.terms.amount
        if (receipt.request, receipt.terms) != (locked.request, locked.terms) or not 0 <= receipt.due <= amount:
            raise LedgerError(f"the receipt of request {receipt.id} is not of what was asked, or pays more")
        _check_receipt(receipt)
        del channel.open[receipt.id]
        settle(channel.accounts[OWN], channel.accounts[PEER], amount, receipt.due)
        channel.number, channel.total = channel.number + 1, channel.total + receipt.due
        channel.head = link(channel.head, receipt)
        channel.unacked.append(receipt)
        channel.unacked_locked += amount

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
        acked, channel.unacked = channel.unacked[:count], channel.unacked[count:]
        channel.acked = event.number
        channel.unacked_locked -= sum(receipt.terms.amount for receipt in acked)

    def _taken(self, event: Taken) -> None:
        channel = self.channel(event.peer)
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

    def _credited(self, event: Credited) -> None:
        channel, state = self.channel(event.peer), event.voucher.state
        head, total = channel.paid_head, channel.paid_total
        own, peer = channel.accounts[OWN].copy(), channel.accounts[PEER].copy()
        for receipt in event.receipts:
            _check_receipt(receipt)
            taken = channel.taken.get(receipt.id)
            locked = taken.terms.amount if taken is not None else receipt.due
            if taken is None and not lock(peer, receipt.due):  # it was sent again after we had lost it
                raise LedgerError(f"{receipt.due} micro-credits are more than {event.peer} has free")
            if taken is not None and not _is_of(receipt, taken):
                raise LedgerError(f"the receipt of request {receipt.id} is not of what was taken")
            if not 0 <= receipt.due <= locked:
                raise LedgerError(f"the receipt of request {receipt.id} pays {receipt.due} of {locked}")
            settle(peer, own, locked, receipt.due)
            head, total = link(head, receipt), total + receipt.due
        number = channel.paid_number + len(event.receipts)
        if state != State(channel.digest, event.peer, self.owner, number, total, head):
            raise LedgerError(f"voucher {state.number} of {event.peer} does not follow from its receipts")
        if len({receipt.id for receipt in event.receipts}) != len(event.receipts) or not event.receipts:
            raise LedgerError(f"voucher {state.number} of {event.peer} has a request twice, or none")
        channel.accounts[OWN], channel.accounts[PEER] = own, peer
        for receipt in event.receipts:
            channel.taken.pop(receipt.id, None)
            channel.delivered.pop(receipt.id, None)
            channel.taken_id = max(channel.taken_id, receipt.id)
        channel.paid_number, channel.paid_total, channel.paid_head = number, total, head
        channel.vouchers = [*channel.vouchers[1 - VOUCHERS_KEPT :], event.voucher]

    def _noted(self, event: Noted) -> None:
        channel = self.channels.get(event.peer)
        if channel is not None:
            channel.short += event.short

    def _stated(self, event: Stated) -> None:
        if event.statement.startswith(STAKE):
            self.statements = [each for each in self.statements if not each.startswith(STAKE)]
        self.statements.append(event.statement)


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
