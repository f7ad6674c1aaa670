"""A node's ledger: what it locks, pays, takes and earns, in channels with each peer and without a host.

The two of each channel hold the same accounts in journals of their own, and exchange vouchers and acknowledgements
(`serving.ledger.statements`). Entries take effect at once and are written in batches, as fast as the disk takes them:
what has to be durable before a message goes out is awaited. Requests are known by a peer and an id; amounts are integer
micro-credits.
"""

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np

from wwwserve.agents.protocol import (
    ESCROW,
    FREE,
    MICRO,
    PER_REQUEST,
    available_credit,
    due_after,
    milliseconds,
    price_of,
    price_of_part,
)
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.channel import (
    OWN,
    PEER,
    Acked,
    Channel,
    Credited,
    Delivered,
    Freed,
    LedgerError,
    Locked,
    Noted,
    Opened,
    Settled,
    Stated,
    Taken,
    Vouched,
)
from wwwserve.serving.ledger.journal import Balance, Full, Journal
from wwwserve.serving.ledger.journaled_books import JournaledBooks
from wwwserve.serving.ledger.stakes import Conflict, Slash, Stake, Staked, Stakes, Statement
from wwwserve.serving.ledger.stakes import decode as decode_stake
from wwwserve.serving.ledger.statements import (
    NOTHING,
    NOTHING_CAME,
    PART,
    VERSION,
    WHOLE,
    Opening,
    Receipt,
    Served,
    Signed,
    State,
    Struct,
    Terms,
    Vouch,
    check,
    check_version,
    decode,
    sign,
)
from wwwserve.serving.market import Promise, Whole

log = logging.getLogger("wwwserve.ledger")

MOST_UNACKED = 20_000  # receipts that a peer has not acknowledged, beyond which it gets no more requests
SHORT_SHARE = 20  # part of what a peer paid that it may be short of, beside the exposure: kills and lost links happen
UNBOUNDED = 1 << 31  # tokens
ENDED_KEPT = 1 << 16  # ids of requests that have ended, below which none is taken


class Grant(NamedTuple):
    """What a channel begins with: the own amount and the peer's, and where that is agreed."""

    own: int
    other: int
    source: str


class Open(Struct, frozen=True, tag="open"):
    """One of the two signs a channel."""

    opening: Opening
    signature: str
    version: Whole = VERSION


class Vouching(Struct, frozen=True, tag="vouch"):
    """The payer's voucher."""

    vouch: Vouch
    version: Whole = VERSION


class Telling(Struct, frozen=True, tag="stakes"):
    """Statements about stake."""

    statements: tuple[str, ...]
    version: Whole = VERSION


class Acknowledged(Struct, frozen=True, tag="ack"):
    """The payee's signature under the state of a voucher."""

    number: Whole
    signature: str


class Held(Struct, frozen=True, tag="held"):
    """The payee holds another voucher than one that the payer could follow on from; none if None."""

    voucher: Signed | None


class Declined(Struct, frozen=True, tag="declined"):
    """It is not taken."""

    reason: str


Message: TypeAlias = Open | Vouching | Telling
Answer: TypeAlias = Open | Acknowledged | Held | Declined


class ChannelLedger(JournaledBooks):
    """Channels in a journal."""

    def __init__(
        self, identity: Identity, journal: Journal, grants: Mapping[str, Grant], funds: Mapping[str, int], *,
        exposure: int, payment: int, slack_ms: int = 0,
    ) -> None:  # fmt: skip
        """`exposure` bounds what may be in escrow with a peer, and a peer's here; `slack_ms`: by how much the two sides
        may differ on how long an answer took. Raises StatementError or LedgerError for a journal that cannot be."""
        super().__init__(identity.name, journal)
        self.identity = identity
        self.grants, self.exposure, self.payment, self.slack_ms = dict(grants), exposure, payment, slack_ms
        self.stakes = Stakes(funds)
        self.news: Callable[[bytes], None] = lambda statement: None  # of evidence that was found here
        self._ended: dict[str, set[int]] = {}
        self._floor: dict[str, int] = {}
        self._replay()
        self.changed.add(self.name)  # all is news
        self.changed.update(self.books.channels)

    def _replay(self) -> None:
        """Come to what the journal says; what was under way when it ended was not answered."""
        self._read()
        for statement in self.books.statements:
            self.stakes.heard(decode_stake(statement))
        for peer, channel in self.books.channels.items():
            self._floor[peer] = channel.taken_id
            grant = self.grants.get(peer)
            if grant is not None and self._opening(peer, grant) != channel.opening:
                raise LedgerError(f"the channel with {peer} was opened on other terms than those now configured")
            for id in list(channel.open):
                self.settle(peer, id, None, NOTHING_CAME, 1)

    # What the node pays.

    def available(self, peer: str) -> int:
        """What may be put in escrow with a peer for one more request."""
        channel = self.books.channels.get(peer)
        if channel is None or self.full or len(channel.unacked) >= MOST_UNACKED:
            return 0
        return available_credit(channel.accounts[OWN], channel.exposed, self.exposure)

    def lock(self, peer: str, terms: Terms, request: str) -> int:
        """Put in escrow what a request may cost whose body has the digest `request`. Returns its id.

        Raises LedgerError or Full.
        """
        self._check_writable()
        channel = self.books.channel(peer)
        if terms.amount > available_credit(channel.accounts[OWN], channel.exposed, self.exposure):
            raise LedgerError(f"{terms.amount} micro-credits are more than may be in escrow with {peer}")
        self._add(Locked(peer, channel.asked + 1, request, terms))
        return channel.asked

    def free(self, peer: str, id: int) -> None:
        """The peer did not take it."""
        self._add(Freed(peer, id))

    def settle(self, peer: str, id: int, promise: Promise | None, served: Served, most: int) -> int:
        """The peer had it, and it has ended: with its promise, what came of at most `most` tokens. Returns what is
        paid."""
        locked = self.books.channel(peer).open.get(id)
        if locked is None:
            raise LedgerError(f"request {id} is not with {peer}")
        due = due_of(self.payment, locked.terms, promise, served, most)
        self._add(Settled(peer, Receipt(id, locked.request, locked.terms, promise, served, due)))
        return due

    # What the node earns.

    def take(self, peer: str, id: int, terms: Terms, request: str, promise: Promise) -> None:
        """Take a peer's request, with a promise. Raises LedgerError, or Full while nothing can be written."""
        self._check_writable()
        channel = self.books.channel(peer)
        if channel.short > self.exposure + channel.paid_total // SHORT_SHARE:
            raise LedgerError(f"{peer} paid {channel.short} micro-credits less than it was delivered")
        if id <= self._floor.get(peer, 0) or id in self._ended.get(peer, ()):
            raise LedgerError(f"request {id} of {peer} has ended already")
        if terms.amount > available_credit(channel.accounts[PEER], int(channel.accounts[PEER, ESCROW]), self.exposure):
            raise LedgerError(f"{terms.amount} micro-credits are more than {peer} may have in escrow here")
        self._add(Taken(peer, id, request, terms, promise))

    def delivered(self, peer: str, id: int, served: Served) -> None:
        """A peer's request has ended here. A request whose payment came before its end is left as it was paid."""
        if id in self.books.channel(peer).taken:
            self._add(Delivered(peer, id, served))

    # Messages.

    def _opening(self, peer: str, grant: Grant) -> Opening:
        a, b = sorted((self.name, peer))
        amounts = (grant.own, grant.other) if a == self.name else (grant.other, grant.own)
        return Opening(a, b, *amounts, grant.source)

    async def message(self, peer: str) -> bytes | None:
        """What there is to send to a peer, durable; None for nothing. Raises Full."""
        channel = self.books.channels.get(peer)
        if channel is None:
            grant = self.grants.get(peer)
            if grant is None:
                return None
            opening = self._opening(peer, grant)
            return msgspec.json.encode(Open(opening, sign(self.identity, "opening", opening)))
        if channel.acked == channel.number:
            return None
        if channel.voucher is None or channel.voucher.state.number < channel.number:
            state = channel.state(self.name, peer)
            signature = sign(self.identity, "voucher", state)
            self._add(Vouched(peer, state.number, state.total, state.head, signature))
        vouch = Vouch(self._voucher(channel), channel.acked + 1, tuple(channel.unacked))
        await self.durable()
        return msgspec.json.encode(Vouching(vouch))

    @staticmethod
    def _voucher(channel: Channel) -> Signed:
        assert channel.voucher is not None
        return channel.voucher

    async def received(self, peer: str, body: bytes) -> bytes:
        """A message of a peer came; returns the answer. Raises StatementError, LedgerError, Full."""
        check_version(body)
        message: Message = decode(body, Message)
        if isinstance(message, Open):
            answer = await self._on_open(peer, message)
        elif isinstance(message, Vouching):
            answer = await self._on_voucher(peer, message.vouch)
        else:
            for each in message.statements:
                self.heard(peer, each.encode())
            answer = Declined("")
        return msgspec.json.encode(answer)

    async def _on_open(self, peer: str, message: Open) -> Answer:
        grant = self.grants.get(peer)
        if grant is None:
            return Declined("nothing was granted to you")
        opening = self._opening(peer, grant)
        if message.opening != opening:
            return Declined("the terms of the channel are others here")
        check(peer, "opening", opening, message.signature)
        own = sign(self.identity, "opening", opening)
        if peer not in self.books.channels:
            self._add(Opened(peer, opening, own, message.signature))
        await self.durable()
        return Open(opening, own)

    async def _on_voucher(self, peer: str, vouch: Vouch) -> Answer:
        channel, voucher = self.books.channel(peer), vouch.voucher
        state = voucher.state
        check(peer, "voucher", state, voucher.signature)
        if (state.channel, state.payer, state.payee) != (channel.digest, peer, self.name):
            raise LedgerError("the voucher is of another channel")
        if state.number <= channel.paid_number:
            return await self._on_old_voucher(peer, channel, voucher)
        skip = channel.paid_number + 1 - vouch.first
        if skip < 0 or vouch.first + len(vouch.receipts) != state.number + 1:
            return Held(channel.vouchers[-1] if channel.vouchers else None)
        receipts = vouch.receipts[skip:]
        signature = sign(self.identity, "acknowledgement", state)
        short = self._compare(peer, channel, receipts)
        self._add(Credited(peer, voucher, receipts, signature))
        ended = self._ended.setdefault(peer, set())
        ended.update(receipt.id for receipt in receipts)
        if len(ended) > 2 * ENDED_KEPT:
            floor = self._floor[peer] = max(self._floor.get(peer, 0), channel.taken_id - ENDED_KEPT)
            self._ended[peer] = {id for id in ended if id > floor}
        for note in short:
            log.warning("a peer paid less than was delivered", extra={"peer": peer, "micro": note.short})
            self._add(note)
        await self.durable()
        return Acknowledged(state.number, signature)

    async def _on_old_voucher(self, peer: str, channel: Channel, voucher: Signed) -> Answer:
        """One that came again is acknowledged again; one that says otherwise than another is evidence."""
        for held in channel.vouchers:
            if held.state == voucher.state:
                await self.durable()
                return Acknowledged(voucher.state.number, sign(self.identity, "acknowledgement", voucher.state))
            if held.state.number == voucher.state.number:
                both = msgspec.json.encode((held, voucher)).decode()
                log.error("a peer signed two vouchers of one number", extra={"peer": peer})
                self._add(Noted(peer, "conflict", both))
                self._accuse(peer, held, voucher)
                return Declined("two vouchers have one number")
        return Held(channel.vouchers[-1] if channel.vouchers else None)

    def _accuse(self, peer: str, one: Signed, other: Signed) -> None:
        stakes = self.stakes.latest
        if peer in stakes and self.name in stakes:
            slash = msgspec.json.encode(Conflict((stakes[peer], stakes[self.name]), one, other))
            self.heard(self.name, slash)
            self.news(slash)

    def _compare(self, peer: str, channel: Channel, receipts: tuple[Receipt, ...]) -> list[Noted]:
        """Evidence of receipts that pay less than what was delivered to the end, in the time that it took at most."""
        notes = []
        for receipt in receipts:
            delivered, taken = channel.delivered.get(receipt.id), channel.taken.get(receipt.id)
            if delivered is None or taken is None or delivered.served.came != WHOLE:
                continue
            latest = msgspec.structs.replace(delivered.served, took_ms=delivered.served.took_ms + self.slack_ms)
            due = due_of(self.payment, taken.terms, taken.promise, latest, latest.tokens)
            if receipt.due < due:
                both = msgspec.json.encode((delivered, receipt)).decode()
                notes.append(Noted(peer, "short", both, due - receipt.due))
        return notes

    async def replied(self, peer: str, body: bytes) -> None:
        """A peer answered a message. Raises StatementError, LedgerError, Full."""
        answer: Answer = decode(body, Answer)
        if isinstance(answer, Open):
            self._on_opened(peer, answer)
        elif isinstance(answer, Acknowledged):
            self._on_ack(peer, answer)
        elif isinstance(answer, Held):
            raise LedgerError(f"{peer} holds another voucher than what this ledger follows on from")
        elif answer.reason:
            raise LedgerError(f"{peer} declines: {answer.reason}")
        await self.durable()

    def _on_opened(self, peer: str, answer: Open) -> None:
        grant = self.grants.get(peer)
        if grant is None or answer.opening != self._opening(peer, grant):
            raise LedgerError(f"{peer} opens a channel on other terms")
        check(peer, "opening", answer.opening, answer.signature)
        if peer not in self.books.channels:
            own = sign(self.identity, "opening", answer.opening)
            self._add(Opened(peer, answer.opening, own, answer.signature))

    def _on_ack(self, peer: str, answer: Acknowledged) -> None:
        channel = self.books.channel(peer)
        voucher = channel.voucher
        if voucher is None or answer.number <= channel.acked:
            return  # it came again
        if answer.number != voucher.state.number:
            return  # of an earlier voucher; the one that replaced it will be acknowledged as well
        check(peer, "acknowledgement", voucher.state, answer.signature)
        state = voucher.state
        self._add(Acked(peer, state.number, state.total, state.head, answer.signature))

    # Stake.

    async def restake(self, amount: int) -> Staked | None:
        """State what the node stakes from now on; None where nothing changes. Raises Full."""
        latest = self.stakes.latest.get(self.name)
        if self.name not in self.stakes.started:
            return None
        if latest is not None and amount == self.stakes.stake(self.name):
            return None
        self._check_writable()
        stake = Stake(self.name, self.stakes.next_number(self.name), amount)
        staked = Staked(stake, sign(self.identity, "stake", stake))
        self._add(Stated(self.name, msgspec.json.encode(staked).decode()))
        self.stakes.heard(staked)
        await self.durable()
        return staked

    def heard(self, peer: str, statement: bytes) -> bool:
        """A statement about stake came by a peer; returns whether it is news. Raises StatementError.

        What others stake is not written, as they say it again; who lost stake is.
        """
        stated: Statement = decode_stake(statement)
        if not self.stakes.heard(stated):
            return False
        if isinstance(stated, Slash):
            self._add(Stated(peer, statement.decode()))
        return True

    # To look at.

    def balances(self) -> list[Balance]:
        """Of all channels."""
        return [channel.balance(peer) for peer, channel in sorted(self.books.channels.items())]

    def free_credit(self) -> int:
        """Over all channels."""
        return sum(int(channel.accounts[OWN, FREE]) for channel in self.books.channels.values())


# In Python's integers, as no bound on price and promise holds for the product of the two.
_due_after = getattr(due_after, "py_func", due_after)


def due_of(payment: int, terms: Terms, promise: Promise | None, served: Served, most: int) -> int:
    """What is due for what came of an answer of at most `most` tokens, micro-credits."""
    if served.came == NOTHING or promise is None:
        return 0
    what = payment, np.array(terms.tariff), served.prompt, served.cached, served.tokens
    price = int(price_of(*what) if served.came == WHOLE else price_of_part(*what, most))
    promised_ms = int(milliseconds(promise.ttft_s + promise.tpot_s * (served.tokens - 1)))
    return min(terms.amount, _due_after(payment, price, promised_ms, served.took_ms))


def most_of(payment: int, terms: Terms) -> int:
    """The longest answer that what is in escrow pays after the prompt, tokens; -1 if it does not even pay that."""
    if payment == PER_REQUEST:
        return UNBOUNDED if terms.amount >= MICRO else -1
    given, _, output = terms.tariff
    left = 1000 * (terms.amount + 1) - 1 - given * terms.prompt  # prices are rounded down
    if left < 0:
        return -1
    return left // output if output else UNBOUNDED


def micro(credits: float) -> int:
    """Credits in micro-credits."""
    return round(credits * MICRO)


__all__ = [
    "NOTHING",
    "PART",
    "WHOLE",
    "ChannelLedger",
    "Full",
    "Grant",
    "LedgerError",
    "Promise",
    "Served",
    "State",
    "Terms",
]  # fmt: skip
