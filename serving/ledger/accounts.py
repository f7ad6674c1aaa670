"""Between the dispatcher and the ledger: what a request is escrowed for, what came of it, and messages about it.

An origin pays for what it received, counted by itself; an executor counts what it sent, and keeps it as evidence where
the two differ. Both digest the bytes of the answer as they pass.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from hashlib import sha256
from typing import Any

import aiohttp
import msgspec
import numpy as np

from wwwserve.agents.protocol import ACCOUNT_SIZE, FREE, MICRO, STAKED, move_stake, price_of
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
        self.whole = False
        self.tokens = 0
        self._ledger, self._digest, self._bytes = ledger, sha256(), 0

    @property
    def header(self) -> str:
        """ESCROW, as it goes to the peer."""
        return f"{self.terms.id} {self.terms.amount} {self.terms.price}"

    def feed(self, chunk: bytes) -> None:
        """Some of the answer's body came."""
        self._digest.update(chunk)
        self._bytes += len(chunk)

    def end(self) -> int:
        """It is over: pay for what came. Returns micro-credits."""
        if self.refused:
            self._ledger.free(self.peer, self.terms.id)
            return 0
        tokens = min(self.tokens, self.most)
        came = WHOLE if self.whole else PART if tokens > 0 else NOTHING
        answer = self._digest.hexdigest() if self._bytes else ""
        return self._ledger.settle(self.peer, self.terms.id, answer, tokens, self.most, came)


class Delivery:
    """Of one request of a peer that was taken; to be ended exactly once, by `end`."""

    def __init__(self, ledger: ChannelLedger, peer: str, terms: Terms, most: int) -> None:
        self._ledger, self._peer, self._id, self._most = ledger, peer, terms.id, most
        self._digest, self._bytes, self._events, self._tokens = sha256(), 0, 0, 0
        self._status = 200

    def begin(self, status: int) -> None:
        """How the engine answers."""
        self._status = status

    def feed(self, chunk: bytes) -> None:
        """Some of a stream was sent."""
        self._digest.update(chunk)
        self._bytes += len(chunk)
        self._events += chunk.count(b"data:")

    def feed_whole(self, body: bytes) -> None:
        """All of an answer was sent."""
        self._digest.update(body)
        self._bytes += len(body)
        self._tokens = tokens_of(body) if self._status == 200 else 0

    def end(self, whole: bool) -> None:
        """It is over, and all of it was sent, or not."""
        tokens = min(self._tokens or stream_tokens(self._events), self._most)
        served = self._status == 200 and self._bytes > 0
        came = NOTHING if not served else WHOLE if whole else PART
        answer = self._digest.hexdigest() if served else ""
        self._ledger.delivered(self._peer, self._id, answer, tokens if served else 0, came)


class Accounts:
    """A node's dealings in credit."""

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
        if self.ledger.room(peer) < self.ledger.exposure // 2:
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

    def take(self, peer: str, header: bytes, body: bytes) -> Terms:
        """Take a peer's request, by its header ESCROW. Raises LedgerError or Full."""
        told = header.split()
        if len(told) != 3 or not all(each.isdigit() and len(each) < 18 for each in told):
            raise LedgerError(f"the header {ESCROW} is not ID AMOUNT PRICE")
        terms = Terms(*map(int, told))
        if self.prices and terms.price < min(self.prices):
            raise LedgerError(f"{terms.price} micro-credits are less than the price, {min(self.prices)}")
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
            if told := self._untold.pop(peer, []):
                try:
                    await self.send(peer, msgspec.json.encode(Telling(tuple(told))))
                except (aiohttp.ClientError, TimeoutError, OSError):
                    self._untold[peer] = told + self._untold.get(peer, [])
                    return
            message = await self.ledger.message(peer)
            if message is not None:
                await self.ledger.replied(peer, await self.send(peer, message))
        except (aiohttp.ClientError, TimeoutError, OSError, Full):
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


def stream_tokens(events: int) -> int:
    """Tokens of a stream by its events: all but the one that tells the role and the last."""
    return max(0, events - 2)


def tokens_of(body: bytes) -> int:
    """Tokens of a whole answer as it says, at most the bytes of the texts that came: no token is less."""
    try:
        told = msgspec.json.decode(body, type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0
    return min(told.usage.completion_tokens, sum(map(_text_bytes, told.choices)))


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw()


class _Choice(msgspec.Struct):
    text: str | None = None
    message: _Message | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Answer(msgspec.Struct):
    usage: _Usage
    choices: list[_Choice]


def _text_bytes(choice: _Choice) -> int:
    message = choice.message or _Message()
    texts: Iterable[str | None] = (choice.text, message.content, message.reasoning_content)
    return sum(len((text or "").encode()) for text in texts) + len(bytes(message.tool_calls))
