"""What nodes state to each other about credit, each statement signed by whom it binds.

A channel is between two nodes, and each pays the other through a chain of its own: it orders the receipts of what it
was answered, hashes each onto the head of the chain, and signs the chain's state now and then. That is a voucher,
cumulative, so a later one replaces the earlier. The payee, once it holds a voucher, signs the same state, and with it
every receipt under the head. Digests are SHA-256 in hexadecimal, signatures base64url, amounts micro-credits.
"""

import hashlib
from base64 import urlsafe_b64encode
from typing import Any

import msgspec

from wwwserve.serving.http.keys import Identity, SignatureError, signature_of, tagged, verify
from wwwserve.serving.market import MOST_PRICE, MOST_TOKENS, Promise, Tariff, Whole

VERSION = 3  # of what is stated; another one is not taken
WHOLE, PART, NOTHING = "whole", "part", "nothing"  # how much of an answer came
GOING = "going"  # more of it is to come: an instalment
MOST_MS = 1 << 40
MOST_AMOUNT = 10**18  # micro-credits


class StatementError(ValueError):
    """A statement that does not hold; the message says why."""


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that is stated; its one encoding is JSON with the fields in order."""


class Opening(Struct, frozen=True):
    """A channel: what each of the two begins with. `a` < `b`, so that both say the same."""

    a: str
    b: str
    amount_a: Whole
    amount_b: Whole
    source: str  # "limits", or "genesis " and the digest of the agreed file

    def digest(self) -> str:
        """Names the channel, and is the head of both chains before any receipt."""
        return digest(msgspec.json.encode(self))

    def amounts(self, name: str) -> tuple[int, int]:
        """What `name` begins with, and what the other does."""
        return (self.amount_a, self.amount_b) if name == self.a else (self.amount_b, self.amount_a)


class Refill(Struct, frozen=True):
    """Credit that is added to a channel: what each of the two was granted in all, from the opening on."""

    channel: str  # digest of the opening
    number: Whole  # of its refills, from 1
    amount_a: Whole
    amount_b: Whole
    source: str  # as of an opening


class Agreed(Struct, frozen=True):
    """A refill that both have signed."""

    refill: Refill
    a: str  # signature of the one,
    b: str  # and of the other

    def verify(self, opening: Opening) -> None:
        """Raises StatementError unless it is signed by both of the channel that began so."""
        check(opening.a, "refill", self.refill, self.a)
        check(opening.b, "refill", self.refill, self.b)


class Terms(Struct, frozen=True):
    """What a request is handed over for, as its origin signs it."""

    tariff: Tariff  # of the payee's advert
    prompt: Whole  # tokens, beyond which none are paid
    amount: Whole  # in escrow

    def possible(self) -> bool:
        """Whether it can be one."""
        amounts = 0 <= self.prompt <= MOST_TOKENS and 0 <= self.amount <= MOST_AMOUNT
        return amounts and all(0 <= price <= MOST_PRICE for price in self.tariff)


class Served(Struct, frozen=True):
    """What came of a request, as one of the two saw it."""

    answer: str  # digest of what came of the answer; "" for nothing
    prompt: Whole  # tokens that are paid,
    cached: Whole  # and of them those that the payee's engine had in its prefix cache
    tokens: Whole  # of the answer that came
    took_ms: Whole  # from the acceptance to the end of the answer
    came: str  # WHOLE, PART, NOTHING or GOING

    def possible(self) -> bool:
        """Whether it can be what came."""
        counts = (self.prompt, self.cached, self.tokens)
        return (
            self.came in (WHOLE, PART, NOTHING, GOING) and all(0 <= each <= MOST_TOKENS for each in counts)
            and self.cached <= self.prompt and 0 <= self.took_ms <= MOST_MS
        )  # fmt: skip


NOTHING_CAME = Served("", 0, 0, 0, 0, NOTHING)


class Receipt(Struct, frozen=True):
    """One request of a payer that has ended."""

    id: Whole  # of the request, ascending in a chain's channel
    request: str  # digest of its body
    terms: Terms
    promise: Promise | None  # of the payee, from when the payer heard it; None if none came
    served: Served
    due: Whole  # is paid, beside the instalments before; together at most what was in escrow


class State(Struct, frozen=True):
    """State of one payer's chain: signed by the payer a voucher, by the payee an acknowledgement."""

    channel: str  # digest of the opening
    payer: str
    payee: str
    number: Whole  # of receipts
    total: Whole  # that they pay
    head: str  # of the chain


class Closing(Struct, frozen=True):
    """A channel is closed, or open again after it was, with this state."""

    channel: str  # digest of the opening
    number: Whole  # of closings and reopenings, from 1
    open: bool  # it is a reopening
    a: State  # of the chain by which the one pays
    b: State
    refills: Whole  # how many there are

    def of(self, payer: str) -> State:
        """Of the chain by which one of the two pays."""
        return self.a if self.a.payer == payer else self.b


class Ended(Struct, frozen=True):
    """A closing, and who has signed it."""

    closing: Closing
    a: str  # signature of the one, "" for none,
    b: str  # and of the other

    @property
    def is_agreed(self) -> bool:
        """Whether both have."""
        return bool(self.a and self.b)

    def signature(self, name: str, other: str) -> str:
        """Of `name`, in the channel of the two."""
        return self.a if name < other else self.b


class Signed(Struct, frozen=True):
    """A statement and its signature."""

    state: State
    signature: str


class Vouch(Struct, frozen=True):
    """What a payer sends: a voucher, and the receipts that the payee has not acknowledged, the first of which is number
    `first` of the chain."""

    voucher: Signed
    first: Whole
    receipts: tuple[Receipt, ...]


class _Versioned(msgspec.Struct):
    version: Whole = 1


def check_version(content: bytes) -> None:
    """Raises StatementError for a message of another version of what is stated."""
    try:
        version = msgspec.json.decode(content, type=_Versioned).version
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StatementError(f"not what it should be: {error}") from None
    if version != VERSION:
        raise StatementError(f"it is of version {version} of the ledger's statements, expected {VERSION}")


def digest(content: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(content).hexdigest()


def link(head: str, receipt: Receipt) -> str:
    """Head of a chain after one more receipt."""
    return hashlib.sha256(head.encode() + msgspec.json.encode(receipt)).hexdigest()


def sign(identity: Identity, kind: str, stated: msgspec.Struct) -> str:
    """Sign a statement of a kind."""
    return urlsafe_b64encode(identity.sign(tagged(kind, msgspec.json.encode(stated)))).decode()


def check(name: str, kind: str, stated: msgspec.Struct, signature: str) -> None:
    """Raises StatementError unless `name` signed a statement of that kind. A signature is spelled in one way, or who
    passes a statement on could make others of it."""
    try:
        verify(name, tagged(kind, msgspec.json.encode(stated)), signature_of(signature))
    except (SignatureError, ValueError) as error:
        raise StatementError(f"a {kind} that {name} is said to have signed: {error}") from None


def decode(content: bytes | str, kind: Any) -> Any:
    """Read what is of a type, or of one of several. Raises StatementError."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StatementError(f"not what it should be: {error}") from None
