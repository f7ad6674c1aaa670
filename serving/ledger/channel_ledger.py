"""A node's ledger: what it locks, pays, takes and earns, in channels with each peer and without a host.

The two of each channel hold the same accounts in journals of their own, and exchange vouchers and acknowledgements
(`serving.ledger.statements`). Entries take effect at once and are written in batches, as fast as the disk takes them:
what has to be durable before a message goes out is awaited. Requests are known by a peer and an id; amounts are integer
micro-credits.

Credit that is added, the end of a channel, and what a node has forgotten have files of their own; requests and the
messages about them stand here together, which makes it long, as each message moves what a request has locked.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec
import numpy as np

from wwwserve.agents.protocol import (
    ESCROW,
    FREE,
    INPUT,
    MICRO,
    OUTPUT,
    PER_REQUEST,
    available_credit,
    due_after,
    milliseconds,
    price_of,
    price_of_part,
)
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.channel import CONFLICT, OWN, PEER, Channel, LedgerError
from wwwserve.serving.ledger.closing import Closer
from wwwserve.serving.ledger.entries import (
    Acked,
    Closed,
    Credited,
    Delivered,
    Event,
    Freed,
    Locked,
    Noted,
    Opened,
    Settled,
    Stated,
    Taken,
    Vouched,
)
from wwwserve.serving.ledger.exchange import (
    Acknowledged,
    Answer,
    Ask,
    Close,
    Declined,
    Held,
    Known,
    Message,
    Open,
    Refilling,
    Vouching,
)
from wwwserve.serving.ledger.journal import Balance, Full, Journal
from wwwserve.serving.ledger.journaled_books import JournaledBooks
from wwwserve.serving.ledger.reconcile import Reconciler
from wwwserve.serving.ledger.refills import Grant, Refiller, terms
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import (
    GOING,
    NOTHING,
    NOTHING_CAME,
    PART,
    WHOLE,
    Receipt,
    Served,
    Signed,
    State,
    Terms,
    Vouch,
    check,
    check_version,
    decode,
    sign,
)
from wwwserve.serving.ledger.verdicts import Conflict, Stake, Staked, Statement, parse, verify
from wwwserve.serving.ledger.verdicts import decode as decode_stake
from wwwserve.serving.market import Promise

log = logging.getLogger("wwwserve.ledger")

MOST_REASON = 256  # characters of why a peer declines, that are kept
MOST_UNACKED = 2_000  # receipts that a peer has not acknowledged, beyond which it gets no more requests
# Part of all that was paid by which the two sides may differ beside the exposure, as kills and lost links happen.
DIFFER_SHARE = 50
UNBOUNDED = 1 << 31  # tokens
PROMPT_SLACK = 32  # tokens by which a prompt may be longer than was said, beside a quarter, as who asks estimates
STILL_OPEN = "a request that is said to have ended is still open here"
ENDED_KEPT = 1 << 16  # ids of requests that have ended, below which none is taken


class ChannelLedger(JournaledBooks):
    """Channels in a journal."""

    def __init__(
        self, identity: Identity, journal: Journal, grants: Mapping[str, Grant], funds: Mapping[str, int], *,
        exposure: int, payment: int, slack_ms: int = 0, agreed: bool = False, earlier: Sequence[Mapping[str, int]] = (),
        closed: Collection[str] = (), close_after_s: float = 0.0, wall_clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """`exposure` bounds what may be in escrow with a peer, and a peer's here; `slack_ms`: by how much the two sides
        may differ on how long an answer took; `agreed`: all nodes have the same `funds`, so that verdicts move stake;
        `earlier`: those before each amendment; `closed`: peers with whom there is to be no open channel, closed without
        them after `close_after_s`. Raises StatementError or LedgerError for a journal that cannot be."""
        super().__init__(identity.name, journal)
        self.identity = identity
        self.grants, self.exposure, self.payment, self.slack_ms = dict(grants), exposure, payment, slack_ms
        self.stakes = Stakes(funds, agreed=agreed, earlier=earlier)
        self.stakes.said[self.name] = self.stakes.epoch
        # By what evidence somebody lost stake, and what this node staked and forgot, for whoever passes it on.
        self.news: list[Statement] = []
        self.doubted: Callable[[str], int] = lambda peer: 0  # of what a peer was paid, micro-credits
        # How often each peer of a channel has started, and asked what is known of it.
        self.asked: Counter[str] = Counter()
        self._ended: dict[str, set[int]] = {}
        self._running: dict[tuple[str, int], Callable[[], None]] = {}  # requests of peers, and what stops each
        # What such a request may cost beyond what is in escrow for it, where its prompt seems longer than was said.
        self._may_exceed: dict[tuple[str, int], int] = {}
        self._floor: dict[str, int] = {}
        self._unsure: set[str] = set()  # peers who asked for a channel, and may not have heard yet that it is open
        self._reconciler = Reconciler(self, self._add)
        self.refills = Refiller(self, identity, self.grants, self._add)
        self.closer = Closer(self, identity, closed, close_after_s, wall_clock, self._add)
        self._staked = 0  # number of the last own statement of stake that was signed in this run
        self._replay()
        self.closer.begin()
        self.changed.add(self.name)  # all is news
        self.changed.update(self.books.channels)

    def _replay(self) -> None:
        """Come to what the journal says."""
        self._read()
        for statement in self.books.statements:
            self.stakes.heard(decode_stake(statement))
        self.stakes.fresh.clear()
        for peer, channel in self.books.channels.items():
            self._floor[peer] = channel.taken_id
            if self.refills.is_less(peer):
                log.warning("a channel keeps the credit that was agreed, more than is configured", extra={"peer": peer})

    def _add(self, event: Event) -> None:
        before = self.books.channel(event.peer).short if isinstance(event, Closed) else 0
        super()._add(event)
        if isinstance(event, Closed | Opened):
            self.closer.begin()  # it may be open again, and is to be closed
        if isinstance(event, Closed):
            _warn_of(event.peer, self.books.channel(event.peer).short - before)
            self._reconciler.closed(event.peer)
            self.refills.look(event.peer, event.peer in self.closer.able)

    def is_reconciled(self, peer: str) -> bool:
        """Whether the peer has told in this run what it knows of the channel."""
        return peer in self._reconciler.done

    def _usable(self, peer: str) -> Channel:
        """The channel with a peer. Raises LedgerError for none, or one that is not reconciled, and Full."""
        self._check_writable()
        channel = self.books.channel(peer)
        if refused := self.closer.refuses(peer):
            raise LedgerError(refused)
        if not self.is_reconciled(peer):
            raise LedgerError(f"{peer} has not told yet what it knows of the channel")
        return channel

    # What the node pays.

    def available(self, peer: str) -> int:
        """What may be put in escrow with a peer for one more request."""
        channel = self.books.channels.get(peer)
        if channel is None or self.full or len(channel.unacked) >= MOST_UNACKED or not self.is_reconciled(peer):
            return 0
        if self.closer.refuses(peer):
            return 0
        over = channel.over + self.doubted(peer)
        bound = min(self.exposure, tolerated(self.exposure, channel.total) - over)
        return int(available_credit(channel.accounts[OWN], channel.exposed, bound))

    def lock(self, peer: str, terms: Terms, request: str) -> int:
        """Put in escrow what a request may cost whose body has the digest `request`. Returns its id.

        Raises LedgerError or Full.
        """
        channel = self._usable(peer)
        if terms.amount > self.available(peer):
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
        due = self._beside_instalments(peer, id, due_of(self.payment, locked.terms, promise, served, most))
        if served.answer == "":  # on nothing but the peer's promise
            channel = self.books.channel(peer)
            due = min(due, max(0, tolerated(self.exposure, channel.total) - channel.unseen))
        self._add(Settled(peer, Receipt(id, locked.request, locked.terms, promise, served, due)))
        return due

    def advance(self, peer: str, id: int, promise: Promise, served: Served, most: int) -> None:
        """Pay for what has come so far of a request that goes on."""
        locked = self.books.channel(peer).open[id]
        due = self._beside_instalments(peer, id, due_of(self.payment, locked.terms, promise, served, most))
        if due > 0:
            so_far = msgspec.structs.replace(served, came=GOING)
            self._add(Settled(peer, Receipt(id, locked.request, locked.terms, promise, so_far, due)))

    def _beside_instalments(self, peer: str, id: int, due: int) -> int:
        return max(0, due - self.books.channel(peer).advanced.get(id, 0))

    def earned(self, peer: str, id: int) -> int:
        """What was paid in instalments for a request of the peer."""
        return self.books.channel(peer).earned.get(id, 0)

    def overbilled(self, peer: str, id: int, tokens: int, terms: Terms) -> None:
        """With a request the peer has billed so many tokens too many: it gets less credit in escrow from now on, and
        none once that comes to the exposure."""
        over = terms.tariff[OUTPUT] * tokens // 1000
        log.warning("a peer bills more tokens than its text has", extra={"peer": peer, "micro": over})
        self._add(Noted(peer, "over", f"request {id}: {tokens} tokens", over=over))

    # What the node earns.

    def take(
        self, peer: str, id: int, terms: Terms, request: str, promise: Promise, stop: Callable[[], None] = lambda: None,
        prompt: int = 0,
    ) -> None:  # fmt: skip
        """Take a peer's request, with a promise; `stop` is called if the peer says that it has ended while it is open
        here. Its prompt is thought to have `prompt` tokens here; what that may cost beyond what is in escrow for it is
        within the exposure as well. Raises LedgerError, or Full while nothing can be written."""
        channel = self._usable(peer)
        # What is short and what may become so, in escrow or beyond it, are within the exposure together.
        left = tolerated(self.exposure, channel.paid_total) - channel.short
        if left <= 0:
            raise LedgerError(f"{peer} paid {channel.short} micro-credits less than it was delivered")
        if id <= self._floor.get(peer, 0) or id in self._ended.get(peer, ()):
            raise LedgerError(f"request {id} of {peer} has ended already")
        beyond = self._beyond(terms, prompt)
        at_risk = int(channel.accounts[PEER, ESCROW]) + self._beyond_escrow(peer, channel) + beyond
        bound = min(self.exposure, left)
        if terms.amount > available_credit(channel.accounts[PEER], at_risk, bound):
            raise LedgerError(f"{terms.amount} micro-credits are more than {peer} may have in escrow here")
        self._add(Taken(peer, id, request, terms, promise))
        self._running[peer, id] = stop
        if beyond:
            self._may_exceed[peer, id] = beyond

    def _beyond_escrow(self, peer: str, channel: Channel) -> int:
        """What a peer owes for prompts that are longer than it said, or may come to owe for what runs."""
        running = sum(each for (other, _), each in self._may_exceed.items() if other == peer)
        return running + sum(channel.beyond.values())

    def delivered(self, peer: str, id: int, served: Served, due: int) -> None:
        """A peer's request has ended here, and `due` micro-credits are to be paid for it by the own count."""
        self._running.pop((peer, id), None)
        self._may_exceed.pop((peer, id), None)
        if id in self.books.channel(peer).taken:
            self._add(Delivered(peer, id, served, due))

    def due_at_least(self, terms: Terms, promise: Promise, served: Served, most: int, prompt: int) -> int:
        """What is due at least for a peer's request that was `served`, of at most `most` tokens and a prompt of
        `prompt` as they were counted here, however the two clocks differ. A prompt that is much longer than was said is
        to be paid as it is."""
        latest = msgspec.structs.replace(served, took_ms=served.took_ms + self.slack_ms)
        due = due_of(self.payment, terms, promise, latest, most)
        return due + (self._beyond(terms, prompt) if served.came != NOTHING else 0)

    def _beyond(self, terms: Terms, prompt: int) -> int:
        """What a prompt of so many tokens costs more than as long as it was said to be, if it is much longer."""
        if self.payment == PER_REQUEST or prompt <= terms.prompt + terms.prompt // 4 + PROMPT_SLACK:
            return 0
        return -(-terms.tariff[INPUT] * (prompt - terms.prompt) // 1000)  # up, as the rest is rounded down

    # Messages.

    def _ask(self, channel: Channel) -> Ask:
        number, head = channel.vouched
        return Ask(
            number, channel.paid_number, refills=len(channel.refills), epoch=self.stakes.epoch,
            closings=channel.closings, head=head, acked=channel.acked,
        )  # fmt: skip

    def has_to_tell(self, peer: str) -> bool:
        """Whether there is something to send to a peer."""
        channel = self.books.channels.get(peer)
        if channel is None:
            return peer in self.grants and not self.closer.opens_none(peer)
        if not self.is_reconciled(peer) or peer in self._reconciler.again or peer in self.refills.due:
            return True
        return self._has_to_vouch(peer, channel) or (peer in self.closer.able and self.closer.has_to_tell(peer))

    def _has_to_vouch(self, peer: str, channel: Channel) -> bool:
        unconfirmed = channel.number > 0 and peer not in self._reconciler.confirmed
        return not channel.is_closed and (channel.acked < channel.number or unconfirmed)

    async def message(self, peer: str) -> bytes | None:
        """What there is to send to a peer, durable; None for nothing. Raises Full."""
        channel = self.books.channels.get(peer)
        if channel is None:
            grant = self.grants.get(peer)
            if grant is None or self.closer.opens_none(peer):
                return None
            opening = grant.opening(self.name, peer)
            return msgspec.json.encode(Open(opening, sign(self.identity, "opening", opening)))
        if peer in self._unsure:  # an answer that is still on its way may come after this
            await self.durable()
            return msgspec.json.encode(self._opened(channel))
        if not self.is_reconciled(peer):
            return msgspec.json.encode(self._ask(channel))
        again = self._reconciler.again.get(peer)
        if again:  # before the peer knows these it agrees to nothing
            return msgspec.json.encode(Vouching(again[0]))
        proposal = self.refills.proposal(peer)
        if proposal is not None:
            await self.durable()
            return msgspec.json.encode(proposal)
        if not self._has_to_vouch(peer, channel):
            close = self.closer.proposal(peer)
            await self.durable()
            return msgspec.json.encode(close) if close is not None else None
        if channel.voucher is None or channel.voucher.state.number < channel.number:
            state = channel.state(self.name, peer)
            signature = sign(self.identity, "voucher", state)
            self._add(Vouched(peer, state.number, state.total, state.head, signature))
        vouch = Vouch(self._voucher(channel), channel.acked + 1, tuple(channel.unacked))
        await self.durable()
        return msgspec.json.encode(Vouching(vouch))

    def forgotten(self, peer: str) -> int:
        """Vouchers that a peer had acknowledged, and is to be told again."""
        return len(self._reconciler.again.get(peer, ()))

    @staticmethod
    def _voucher(channel: Channel) -> Signed:
        assert channel.voucher is not None
        return channel.voucher

    async def received(self, peer: str, body: bytes) -> bytes:
        """A message of a peer came; returns the answer. Raises StatementError, LedgerError, Full."""
        check_version(body)
        message: Message = decode(body, Message)
        if (
            isinstance(message, Ask | Vouching | Refilling | Close)
            and peer in self.grants
            and peer not in self.books.channels
        ):
            self.closer.forgotten.add(peer)
            self.changed.add(peer)
        if isinstance(message, Open):
            answer = await self._on_open(peer, message)
        elif isinstance(message, Ask):
            answer = await self._on_ask(peer, message)
        elif isinstance(message, Vouching):
            answer = await self._on_voucher(peer, message.vouch)
        elif isinstance(message, Refilling):
            answer = self.refills.received(peer, message, self.is_reconciled(peer))
            await self.durable()
        elif isinstance(message, Close):
            answer = self.closer.received(peer, message, self.is_reconciled(peer), self._is_busy(peer))
            await self.durable()
        else:
            for each in message.statements:
                if self.heard(peer, each.encode()):
                    await asyncio.sleep(0)  # its signatures took long enough
            answer = Declined("")
        return msgspec.json.encode(answer)

    async def _on_open(self, peer: str, message: Open) -> Answer:
        grant, channel = self.grants.get(peer), self.books.channels.get(peer)
        if channel is not None:  # which a peer has forgotten that lost its journal
            await self.durable()
            return self._opened(channel)
        if grant is None or peer in self.closer.wanted:
            return Declined("nothing was granted to you")
        opening = grant.opening(self.name, peer)
        if message.opening != opening:
            begins = f"it begins with {terms(*opening.amounts(peer))}, by {opening.source}"
            return Declined(f"the terms of the channel are others here: {begins}")
        check(peer, "opening", opening, message.signature)
        own = sign(self.identity, "opening", opening)
        self._add(Opened(peer, opening, own, message.signature))
        self._unsure.add(peer)
        await self.durable()
        return Open(opening, own)

    def _opened(self, channel: Channel) -> Open:
        return Open(channel.opening, sign(self.identity, "opening", channel.opening))

    def _knows(self, peer: str, refills: bool) -> None:
        """Whether a peer's release knows refills and closings."""
        (self.closer.able.add if refills else self.closer.able.discard)(peer)
        self.refills.look(peer, refills)

    def _is_busy(self, peer: str) -> bool:
        """Whether a request of one of the two is under way."""
        return bool(self.books.channel(peer).open) or any(other == peer for other, _ in self._running)

    def gone(self, peer: str) -> None:
        """A peer fell silent, or started anew: what it has not heard it asks for."""
        self._unsure.discard(peer)

    def close_silent(self) -> None:
        """Close channels with peers that were waited for long enough."""
        for peer in self.closer.expire() if not self.full else ():
            for id in sorted(self.books.channel(peer).open):
                self.settle(peer, id, None, NOTHING_CAME, 1)
            self.closer.close_alone(peer)

    async def _on_ask(self, peer: str, ask: Ask) -> Answer:
        """A peer has started: what is known here of what it signed, of which it may have forgotten some."""
        self.books.channel(peer)  # of who has none nothing else is kept
        self.asked[peer] += 1
        self._unsure.discard(peer)
        self._knows(peer, ask.refills is not None)
        self.stakes.said[peer] = ask.epoch
        latest = self.stakes.latest.get(peer)
        stake = msgspec.json.encode(latest).decode() if latest is not None else ""
        return await self._reconciler.tell(peer, ask, stake, self.stakes.epoch)

    def _on_known(self, peer: str, known: Known) -> None:
        """What a peer knows of this node. What is under way with it was asked in another run, and is not answered any
        more. Raises LedgerError and StatementError for what cannot be."""
        if known.stake and self.heard(peer, known.stake.encode()) and self.name in self.stakes.latest:
            self.news.append(self.stakes.latest[self.name])  # others may have heard of an earlier one alone
        self._reconciler.take_over(peer, known)
        self.closer.restate(peer)
        self.stakes.said[peer] = known.epoch
        self._knows(peer, known.refills is not None)
        for id in sorted(self.books.channel(peer).open):
            self.settle(peer, id, None, NOTHING_CAME, 1)
        self.changed.add(peer)

    async def _on_voucher(self, peer: str, vouch: Vouch) -> Answer:
        channel, voucher = self.books.channel(peer), vouch.voucher
        state = voucher.state
        check(peer, "voucher", state, voucher.signature)
        if (state.channel, state.payer, state.payee) != (channel.digest, peer, self.name):
            raise LedgerError("the voucher is of another channel")
        if state.number <= channel.paid_number:
            return await self._on_old_voucher(peer, channel, voucher)
        if channel.is_closed:
            raise LedgerError("the channel is closed here")
        skip = channel.paid_number + 1 - vouch.first
        if skip < 0 or vouch.first + len(vouch.receipts) != state.number + 1:
            return Held(channel.vouchers[-1] if channel.vouchers else None)
        receipts = vouch.receipts[skip:]
        ended = [each.id for each in receipts if each.served.came != GOING]
        still = [self._running[peer, id] for id in ended if (peer, id) in self._running]
        for stop in still:  # whoever asked has it no more
            stop()
        if still:
            return Declined(STILL_OPEN)
        signature = sign(self.identity, "acknowledgement", state)
        short = self._compare(peer, channel, receipts)
        self._add(Credited(peer, voucher, receipts, signature))
        kept = self._ended.setdefault(peer, set())
        kept.update(ended)
        if len(kept) > 2 * ENDED_KEPT:
            floor = self._floor[peer] = max(self._floor.get(peer, 0), channel.taken_id - ENDED_KEPT)
            self._ended[peer] = {id for id in kept if id > floor}
        for note in short:
            _warn_of(peer, note.short)
            self._add(note)
        await self.durable()
        return Acknowledged(state.number, signature)

    async def _on_old_voucher(self, peer: str, channel: Channel, voucher: Signed) -> Answer:
        """One that came again is acknowledged again; one that says otherwise than another is evidence."""
        if channel.ended is not None and channel.ended.closing.of(peer) == voucher.state:
            await self.durable()
            return Acknowledged(voucher.state.number, sign(self.identity, "acknowledgement", voucher.state))
        for held in channel.vouchers:
            if held.state == voucher.state:
                await self.durable()
                return Acknowledged(voucher.state.number, sign(self.identity, "acknowledgement", voucher.state))
            if held.state.number == voucher.state.number:
                if not channel.conflict:  # one is enough
                    evidence = msgspec.json.encode((held, voucher)).decode()
                    log.error("a peer signed two vouchers of one number", extra={"peer": peer})
                    self._add(Noted(peer, CONFLICT, evidence))
                    self._accuse(peer, held, voucher)
                return Declined("two vouchers have one number")
        both = channel.ended_by_both
        if both is not None and voucher.state.number < both.closing.of(peer).number:  # it has not heard of this closing
            await self.durable()
            return Close(both, tuple(channel.refills))
        return Held(channel.vouchers[-1] if channel.vouchers else None)

    def _accuse(self, peer: str, one: Signed, other: Signed) -> None:
        self.heard(self.name, msgspec.json.encode(Conflict(one, other)))

    def _compare(self, peer: str, channel: Channel, receipts: tuple[Receipt, ...]) -> list[Noted]:
        """Evidence of receipts that pay less than what is due by the own count."""
        notes = []
        paid = dict(channel.earned)
        for receipt in receipts:
            paid[receipt.id] = paid.get(receipt.id, 0) + receipt.due
            delivered = channel.delivered.get(receipt.id)
            if delivered is None or receipt.served.came == GOING or paid[receipt.id] >= delivered.due:
                continue
            both = msgspec.json.encode((delivered, receipt)).decode()
            notes.append(Noted(peer, "short", both, delivered.due - paid[receipt.id]))
        return notes

    async def replied(self, peer: str, body: bytes, asked: int | None = None) -> None:
        """A peer answered a message, which was sent when it had `asked` so often. Raises StatementError, LedgerError,
        Full."""
        answer: Answer = decode(body, Answer)
        if isinstance(answer, Open):
            self._on_opened(peer, answer)
        elif isinstance(answer, Known):
            if not self.is_reconciled(peer):
                self._on_known(peer, answer)
        elif isinstance(answer, Acknowledged):
            if asked in (None, self.asked[peer]):  # else an earlier run said it, and may have forgotten it
                self._on_ack(peer, answer)
        elif isinstance(answer, Held):
            held = answer.voucher.state.number if answer.voucher is not None else 0
            if held >= self.books.channel(peer).acked:
                raise LedgerError(f"{peer} holds another voucher than what this ledger follows on from")
            await self._reconciler.recall(peer, self.books.channel(peer).paid_number, held)
        elif isinstance(answer, Refilling):
            self.refills.replied(peer, answer)
        elif isinstance(answer, Close):
            self.closer.replied(peer, answer, self._is_busy(peer))
        elif answer.closed and self.closer.opens(peer):
            self.closer.refused(peer)
        elif answer.refill and peer in self.refills.due:
            self.refills.refused(peer, answer.reason[:MOST_REASON])
        elif answer.reason:
            raise LedgerError(f"{peer} declines: {answer.reason[:MOST_REASON]}")
        await self.durable()

    def _on_opened(self, peer: str, answer: Open) -> None:
        """A channel is opened as was proposed, or as the peer has it since this node lost its journal, with less credit
        than is granted now: then the rest is added."""
        self._unsure.discard(peer)
        if peer in self.books.channels:
            return
        grant, opening = self.grants.get(peer), answer.opening
        if grant is None or not grant.allows(opening, self.name, peer):
            raise LedgerError(f"{peer} opens a channel on other terms")
        check(peer, "opening", opening, answer.signature)
        self._add(Opened(peer, opening, sign(self.identity, "opening", opening), answer.signature))

    def _on_ack(self, peer: str, answer: Acknowledged) -> None:
        channel = self.books.channel(peer)
        again = self._reconciler.again.get(peer)
        voucher = again[0].voucher if again else channel.voucher
        if voucher is None or answer.number != voucher.state.number:
            return  # of an earlier voucher; the one that replaced it will be acknowledged as well
        state = voucher.state
        if state.number > channel.acked:
            check(peer, "acknowledgement", state, answer.signature)
            self._add(Acked(peer, state.number, state.total, state.head, answer.signature))
        self._reconciler.acknowledged(peer, state.number)

    # Stake.

    async def restake(self, amount: int) -> Staked | None:
        """State what the node stakes from now on; None where nothing changes, or nothing can. Raises Full."""
        latest = self.stakes.latest.get(self.name)
        if self.name not in self.stakes.started or self.name in self.stakes.slashes:
            return None
        if self.grants and not self._reconciler.done:
            return None  # peers know which number comes next
        if latest is not None and amount == self.stakes.stake(self.name):
            return None
        self._check_writable()
        self._staked = self.stakes.next_number(self.name, amount, self._staked)
        stake = Stake(self.name, self._staked, amount)
        staked = Staked(stake, sign(self.identity, "stake", stake))
        self._add(Stated(self.name, msgspec.json.encode(staked).decode()))
        await self.durable()
        self.stakes.heard(staked)  # and told, as it can be forgotten no more
        return staked

    def heard(self, peer: str, statement: bytes) -> bool:
        """A statement about stake came by a peer; returns whether it is news. Raises StatementError.

        What others stake is not written, as they say it again; who lost stake is. What is known already is told so
        before its signatures are checked.
        """
        stated = parse(statement)
        if not self.stakes.is_news(stated):
            return False  # before its signatures are checked
        verify(stated)
        news = self.stakes.heard(stated)
        for slash in self.stakes.fresh:
            self._add(Stated(peer, msgspec.json.encode(slash).decode()))
        self.news += self.stakes.fresh
        self.stakes.fresh.clear()
        return news

    # To look at.

    def balances(self) -> list[Balance]:
        """Of all channels."""
        return [channel.balance(peer) for peer, channel in sorted(self.books.channels.items())]

    def free_credit(self) -> int:
        """Over all channels."""
        return sum(int(channel.accounts[OWN, FREE]) for channel in self.books.channels.values())


def _warn_of(peer: str, short: int) -> None:
    if short:
        log.warning("a peer paid less than was delivered", extra={"peer": peer, "micro": short})


# In Python's integers, as no bound on price and promise holds for the product of the two.
_due_after = getattr(due_after, "py_func", due_after)


def due_of(payment: int, terms: Terms, promise: Promise | None, served: Served, most: int) -> int:
    """What is due for what came of an answer of at most `most` tokens, micro-credits."""
    if served.came == NOTHING or promise is None:
        return 0
    what = payment, np.array(terms.tariff), served.prompt, served.cached, served.tokens
    price = int(price_of(*what) if served.came == WHOLE else price_of_part(*what, most))
    promised_ms = int(milliseconds(promise.ttft_s + promise.tpot_s * max(0, served.tokens - 1)))
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


def tolerated(exposure: int, paid: int) -> int:
    """Up to how many micro-credits the two sides may differ in their counts, after `paid` were paid."""
    return exposure + paid // DIFFER_SHARE


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
