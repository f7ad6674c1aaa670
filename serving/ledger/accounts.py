"""Between the dispatcher and the ledger: what a request is escrowed for, what came of it, and messages about it.

An origin pays for what it received, counted by itself; an executor counts what it sent, and keeps it as evidence where
the two differ. Both digest the bytes of the answer as they pass.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from hashlib import sha256
from typing import Any

import msgspec
import numpy as np

from wwwserve.agents.protocol import ACCOUNT_SIZE, FREE, MICRO, PER_KTOK, STAKED, move_stake, price_of
from wwwserve.serving.ledger.channel_ledger import (
    NOTHING,
    PART,
    WHOLE,
    ChannelLedger,
    Full,
    LedgerError,
    Telling,
    Terms,
)
from wwwserve.serving.ledger.statements import StatementError, digest

log = logging.getLogger("wwwserve.accounts")

LEDGER_PATH = "/peer/ledger"
ESCROW = "x-wwwserve-escrow"  # ID AMOUNT PRICE of a request that is handed over
EXCHANGE_S = 0.2  # between two vouchers to a peer, unless its exposure runs out
SOONEST_S = 0.02
DISAGREED_S = 2.0  # until a peer that declined is told again
PRICES_KEPT = 4  # adverts back, of which the price still holds

SendTo = Callable[[str, bytes], Awaitable[bytes]]


class Payment:
    """Of one request that a peer may take; to be ended exactly once, by `end`."""

    def __init__(self, ledger: ChannelLedger, peer: str, terms: Terms, most: int) -> None:
        self.peer, self.terms, self.most = peer, terms, most
        self.refused = False  # the peer said that it does not take it
        self._ledger, self._digest, self._bytes = ledger, sha256(), 0

    @property
    def header(self) -> str:
        """ESCROW, as it goes to the peer."""
        return f"{self.terms.id} {self.terms.amount} {self.terms.price}"

    def feed(self, chunk: bytes) -> None:
        """Some of the answer's body came."""
        self._digest.update(chunk)
        self._bytes += len(chunk)

    def end(self, tokens: int = 0, whole: bool = False) -> int:
        """It is over: pay for the tokens that came, and whether that was all. Returns micro-credits."""
        if self.refused:
            self._ledger.free(self.peer, self.terms.id)
            return 0
        tokens = min(tokens, self.most)
        came = WHOLE if whole else PART if tokens > 0 else NOTHING
        answer = self._digest.hexdigest() if self._bytes else ""
        return self._ledger.settle(self.peer, self.terms.id, answer, tokens, self.most, came)


class Delivery:
    """Of one request of a peer that was taken; to be ended exactly once, by `end`."""

    def __init__(self, ledger: ChannelLedger, peer: str, terms: Terms, most: int) -> None:
        self._ledger, self._peer, self._id, self._most = ledger, peer, terms.id, most

    def end(self, answer: str, tokens: int, whole: bool) -> None:
        """It is over: `answer` is the digest of what was sent, "" for nothing, and how many tokens it has."""
        came = NOTHING if not answer else WHOLE if whole else PART
        self._ledger.delivered(self._peer, self._id, answer, min(tokens, self._most) if answer else 0, came)


class Accounts:
    """A node's peer_stats in credit."""

    def __init__(self, ledger: ChannelLedger, pricing: int, send: SendTo) -> None:
        self.ledger, self.pricing, self.send = ledger, pricing, send
        self.prices: deque[int] = deque(maxlen=PRICES_KEPT)
        self.rejected = 0  # messages and requests that the ledger did not take
        self._urgent = asyncio.Event()
        self._busy: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._untold: dict[str, list[str]] = {}  # statements about stake for each peer
        self._there: set[str] = set()
        self._again_s: dict[str, float] = {}  # when a peer that declined is told again
        self._reasons: dict[str, str] = {}  # why it did
        ledger.news = self.tell_all

    # Requests of own users.

    def needs(self, price: int, most: int) -> int:
        """What is escrowed for a request of at most `most` tokens, micro-credits."""
        return price_of(self.pricing, price, most)

    async def escrow(self, peer: str, price: int, most: int, body: bytes) -> Payment:
        """Put credit in escrow for a request, durably. Raises LedgerError or Full."""
        terms = self.ledger.lock(peer, self.needs(price, most), digest(body), price)
        payment = Payment(self.ledger, peer, terms, most)
        if self.ledger.available(peer) < self.ledger.exposure // 2:
            self._urgent.set()
        try:
            await self.ledger.durable()
        except BaseException:
            payment.refused = True
            payment.end()
            raise
        return payment

    # Requests of peers.

    def posted(self, price: float) -> None:
        """The price in force from now on, credits."""
        self.prices.append(round(price * MICRO))

    def take(self, peer: str, header: bytes, body: bytes, most: int | None) -> Terms:
        """Take a peer's request, by its header ESCROW, that may get `most` tokens (None: as many as the model writes).

        Raises LedgerError or Full.
        """
        words = header.split()
        if len(words) != 3 or not all(each.isdigit() and len(each) < 18 for each in words):
            raise LedgerError(f"the header {ESCROW} is not ID AMOUNT PRICE")
        terms = Terms(*map(int, words))
        if self.prices and terms.price < min(self.prices):
            raise LedgerError(f"{terms.price} micro-credits are less than the price, {min(self.prices)}")
        if self.pricing == PER_KTOK and (most is None or most > most_of(self.pricing, terms)):
            wanted = "any number of" if most is None else most
            raise LedgerError(f"{terms.amount} micro-credits in escrow do not pay {wanted} tokens")
        self.ledger.take(peer, terms, digest(body))
        return terms

    def delivery(self, peer: str, terms: Terms) -> Delivery:
        """Of a request that was taken."""
        return Delivery(self.ledger, peer, terms, most_of(self.pricing, terms))

    # Messages.

    async def run(self) -> None:
        """Write, and tell peers what is owed, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.ledger.run())
                group.create_task(self._keep_telling())
        finally:
            for task in self._tasks:
                task.cancel()

    async def _keep_telling(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for peer in self._there - self._busy:
                if loop.time() < self._again_s.get(peer, 0.0):
                    continue
                self._busy.add(peer)
                task = loop.create_task(self._exchange(peer))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(SOONEST_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._urgent.wait(), EXCHANGE_S - SOONEST_S)
            self._urgent.clear()

    async def _exchange(self, peer: str) -> None:
        """Tell a peer all that there is to tell."""
        try:
            if statements := self._untold.pop(peer, []):
                try:
                    await self.send(peer, msgspec.json.encode(Telling(tuple(statements))))
                except (TimeoutError, OSError):
                    self._untold[peer] = statements + self._untold.get(peer, [])
                    return
            message = await self.ledger.message(peer)
            if message is not None:
                await self.ledger.replied(peer, await self.send(peer, message))
        except (TimeoutError, OSError, Full):
            pass  # it is told again
        except (LedgerError, StatementError) as error:
            self.rejected += 1
            self._again_s[peer] = asyncio.get_running_loop().time() + DISAGREED_S
            if self._reasons.get(peer) != str(error):
                self._reasons[peer] = str(error)
                log.warning("a peer's ledger and ours do not agree", extra={"peer": peer, "reason": str(error)})
        finally:
            self._busy.discard(peer)

    async def received(self, peer: str, body: bytes) -> bytes:
        """A message of a peer. Raises LedgerError, StatementError or Full."""
        news = self.ledger.stakes.slashes.keys() - ()
        try:
            return await self.ledger.received(peer, body)
        except (LedgerError, StatementError):
            self.rejected += 1
            raise
        finally:
            for name in self.ledger.stakes.slashes.keys() - news:
                self.tell_all(msgspec.json.encode(self.ledger.stakes.slashes[name]))

    def heard(self, peer: str) -> None:
        """A peer is there."""
        if peer not in self._there:
            self._there.add(peer)
            stakes = self.ledger.stakes
            own = [stakes.latest[self.ledger.name]] if self.ledger.name in stakes.latest else []
            self._untold[peer] = [msgspec.json.encode(each).decode() for each in (*own, *stakes.slashes.values())]

    def gone(self, peer: str) -> None:
        """A peer fell silent."""
        self._there.discard(peer)
        self._untold.pop(peer, None)

    def tell_all(self, statement: bytes) -> None:
        """Pass a statement about stake on."""
        for peer in self._there:
            self._untold.setdefault(peer, []).append(statement.decode())

    # Stake.

    async def restake(self, target: int, interval_s: float) -> float:
        """Move the stake toward `target` micro-credits, as fast as permitted; returns it, credits."""
        ledger, stakes = self.ledger, self.ledger.stakes
        account = np.zeros(ACCOUNT_SIZE, np.int64)
        account[STAKED] = stakes.stake(ledger.name)
        account[FREE] = max(0, stakes.funds.get(ledger.name, 0) - int(account[STAKED]))
        move_stake(account, target, interval_s)
        try:
            staked = await ledger.restake(int(account[STAKED]))
        except Full:
            staked = None
        if staked is not None:
            self.tell_all(msgspec.json.encode(staked))
        return stakes.stake(ledger.name) / MICRO

    def stake(self, peer: str) -> float:
        """What a peer has at stake by what it signed, credits."""
        return self.ledger.stakes.stake(peer) / MICRO

    # To look at.

    def overview(self) -> dict[str, Any]:
        """Balances and exposure in credits, by peer."""
        return {
            "full": self.ledger.full, "rejected": self.rejected,
            "channels": [self._channel(balance) for balance in self.ledger.balances()],
        }  # fmt: skip

    def _channel(self, balance: Any) -> dict[str, Any]:
        channel = self.ledger.books.channels[balance.peer]
        return {
            "peer": balance.peer, "free": balance.free / MICRO, "escrow": balance.escrow / MICRO,
            "peer_free": balance.peer_free / MICRO, "peer_escrow": balance.peer_escrow / MICRO,
            "exposed": channel.exposed / MICRO, "paid": channel.total / MICRO, "earned": channel.paid_total / MICRO,
            "unacknowledged": channel.number - channel.acked, "short": channel.short / MICRO,
        }  # fmt: skip


def most_of(pricing: int, terms: Terms) -> int:
    """The longest answer that what is in escrow could pay, tokens."""
    return terms.amount * 1000 // max(terms.price, 1) if pricing else 1 << 31
