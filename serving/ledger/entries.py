"""Entries of a journal: what came about in a channel, each as it is written."""

from typing import TypeAlias

from wwwserve.serving.ledger.statements import Agreed, Ended, Opening, Receipt, Served, Signed, Struct, Terms
from wwwserve.serving.market import Promise, Whole


class Opened(Struct, frozen=True, tag="open"):
    """Both have signed the channel."""

    peer: str
    opening: Opening
    own: str  # signature
    other: str  # signature of the peer


class Refilled(Struct, frozen=True, tag="refill"):
    """Both have signed that credit is added to the channel."""

    peer: str
    agreed: Agreed


class Leaving(Struct, frozen=True, tag="leave"):
    """The channel is to be closed, since then."""

    peer: str
    at_ms: Whole  # of the node's clock, since 1970; 0: it is not any more


class Closed(Struct, frozen=True, tag="close"):
    """The channel is closed, or open again: both have signed that, or the own node alone that it is closed."""

    peer: str
    ended: Ended


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
    due: Whole = 0  # micro-credits by the own count


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
    short: Whole = 0  # micro-credits that the peer paid less than was delivered,
    over: Whole = 0  # and that it was paid for tokens that its text cannot have


class Recovered(Struct, frozen=True, tag="recover", omit_defaults=True):
    """A voucher that was signed for the peer and forgotten, and its receipts."""

    peer: str
    voucher: Signed
    receipts: tuple[Receipt, ...]
    undone: Whole = 0  # of the last own receipts, in whose place the peer has these


class Reopened(Struct, frozen=True, tag="reopen"):
    """A request that went to the peer and was forgotten, on terms, the amount in escrow."""

    peer: str
    id: Whole
    request: str
    terms: Terms
    paid: Whole = 0  # of it in instalments


class Skipped(Struct, frozen=True, tag="skip"):
    """Ids of requests up to this one were used, and forgotten."""

    peer: str
    id: Whole


class Stated(Struct, frozen=True, tag="state"):
    """A signed statement about stake, see `serving.ledger.stakes`."""

    peer: str  # from whom it came
    statement: str


Event: TypeAlias = (
    Opened | Refilled | Locked | Freed | Settled | Vouched | Acked | Taken | Delivered | Credited | Noted | Recovered
    | Reopened | Skipped | Stated | Leaving | Closed
)  # fmt: skip
