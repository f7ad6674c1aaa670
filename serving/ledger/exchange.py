"""Messages between the ledgers of two nodes, and what they are answered with."""

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from wwwserve.serving.ledger.statements import VERSION, Agreed, Ended, Opening, Refill, Signed, Struct, Terms, Vouch
from wwwserve.serving.market import Whole

MOST_STATEMENTS = 1_000  # about stake in one message


class Envelope(msgspec.Struct, frozen=True):
    """A message, which may have more than is read here: signatures are under the statements in it."""


class Open(Envelope, frozen=True, tag="open"):
    """One of the two signs a channel."""

    opening: Opening
    signature: str
    version: Whole = VERSION


class Refilling(Envelope, frozen=True, tag="refill"):
    """One of the two signs a refill. Only peers get it that say in `Ask` or `Known` how many they have."""

    refill: Refill
    signature: str
    version: Whole = VERSION


class Close(Envelope, frozen=True, tag="close"):
    """One of the two signs, or both have signed, that the channel is closed, or open again."""

    ended: Ended
    refills: tuple[Agreed, ...] = ()  # all of the channel
    version: Whole = VERSION


class Vouching(Envelope, frozen=True, tag="vouch"):
    """The payer's voucher."""

    vouch: Vouch
    version: Whole = VERSION


class Telling(Envelope, frozen=True, tag="stakes"):
    """Statements about stake."""

    statements: Annotated[tuple[str, ...], Meta(max_length=MOST_STATEMENTS)]
    version: Whole = VERSION


class Acknowledged(Envelope, frozen=True, tag="ack"):
    """The payee's signature under the state of a voucher."""

    number: Whole
    signature: str


class Held(Envelope, frozen=True, tag="held"):
    """The payee holds another voucher than one that the payer could follow on from; none if None."""

    voucher: Signed | None


class Declined(Envelope, frozen=True, tag="declined"):
    """It is not taken."""

    reason: str
    refill: Whole = 0  # number of the refill that is not
    closed: bool = False  # the channel stays closed


class Ask(Envelope, frozen=True, tag="ask"):
    """A node has started, and knows so much of the channel."""

    number: Whole  # of receipts in the chain by which it pays, of which it has signed a voucher
    paid_number: Whole  # and in that by which it is paid
    version: Whole = VERSION
    refills: Whole | None = None  # how many it has; None: it is of a release that knows none
    epoch: str = ""  # of the genesis that it has, see `serving.ledger.stakes`
    closings: Whole = 0  # how many closings and reopenings both have signed, by what it has
    head: str = ""  # of its chain at `number`; "": it is of a release that does not say
    acked: Whole = 0  # how many of them the peer has signed, by what it has


class Unpaid(Struct, frozen=True):
    """A request of the asker that has come, and of which no receipt has."""

    id: Whole
    request: str  # digest of its body
    terms: Terms
    paid: Whole  # of it in instalments


class Known(Envelope, frozen=True, tag="known"):
    """What a peer has of the asker's."""

    vouches: tuple[Vouch, ...]  # its vouchers after the number that it knows, in order, with their receipts
    asked: Whole  # the highest id of its requests
    unpaid: tuple[Unpaid, ...]
    stake: str  # its last statement of stake, "" for none
    refills: tuple[Agreed, ...] | None = None  # after those that it has; None: the peer's release knows none
    epoch: str = ""  # of the genesis that the peer has
    ended: Ended | None = None  # the last closing or reopening, if the asker does not have it
    number: Whole | None = None  # of the asker's receipts that the peer has; None: its release does not say


Message: TypeAlias = Open | Ask | Vouching | Telling | Refilling | Close
Answer: TypeAlias = Open | Known | Acknowledged | Held | Declined | Refilling | Close
