"""Between the dispatcher and the ledger: what a request is escrowed for, what came of it, and messages about it.

An origin pays for what it received, counted and timed by itself; an executor counts and times what it sent, and keeps
it as evidence where the two differ by more than a round trip and a tolerance. Both digest the bytes of the answer as
they pass. Both sides of a request stand here, which makes it long, as each has to count as the other does.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any, NamedTuple

import msgspec
import numpy as np

from wwwserve.agents.protocol import (
    ACCOUNT_SIZE,
    FREE,
    MICRO,
    OUTPUT,
    PER_REQUEST,
    STAKED,
    milliseconds,
    move_stake,
    price_of,
)
from wwwserve.serving.http.reply import TooMuch
from wwwserve.serving.http.sse import AnswerMeter, Usage
from wwwserve.serving.ledger.channel import Channel
from wwwserve.serving.ledger.channel_ledger import ChannelLedger, Full, LedgerError, most_of
from wwwserve.serving.ledger.exchange import Telling
from wwwserve.serving.ledger.statements import (
    NOTHING,
    NOTHING_CAME,
    PART,
    VERSION,
    WHOLE,
    Served,
    StatementError,
    Terms,
    digest,
)
from wwwserve.serving.ledger.token_rate import TokenRate
from wwwserve.serving.market import MOST_TOKENS, Promise, Tariff

log = logging.getLogger("wwwserve.accounts")

LEDGER_PATH = "/peer/ledger"
ESCROW = "x-wwwserve-escrow"  # vVERSION ID AMOUNT of a request that is handed over
EXCHANGE_S = 0.2  # between two vouchers to a peer, unless its exposure runs out
SOONEST_S = 0.02
MOST_AT_ONCE = 3  # messages to a peer: a channel is opened, reconciled, and what is owed told
DISAGREED_S = 2.0  # until a peer that declined is told again
SHOWN_S = 10.0  # for which it is shown that it did
TARIFFS_KEPT = 4  # adverts back, of which the tariff still holds
TOLERANCE_S = 0.25  # by which two sides may differ, beside the round trip, on how long an answer took

# A stream goes on while at most this part of the exposure is not paid; it is paid in so many instalments.
UNPAID_SHARE, INSTALMENTS = 10, 4
PATIENCE_S = 2.0  # for an instalment that is late

MOST_TOLD = 1 << 17  # bytes of statements about stake in one message, which a peer verifies at one go

SendTo = Callable[[str, bytes], Awaitable[bytes]]


def slack_ms(rtt_s: float, speed: float = 1.0) -> int:
    """By how much two sides may differ on how long an answer took, ms of the market's clock, which has this speed."""
    return int(milliseconds(rtt_s + TOLERANCE_S * speed))


class NotTaken(LedgerError):
    """A peer does not take what a message says, or its size, and would not if it came again."""


class NotNow(LedgerError):
    """A peer takes no message now, whatever it says: it starts, or ends, or cannot write."""


def _first_of(statements: Sequence[str]) -> tuple[str, ...]:
    """As many of the first as go into one message."""
    size, count = 0, 0
    for each in statements:
        size += len(each)
        if count and size > MOST_TOLD:
            break
        count += 1
    return tuple(statements[:count])


class Came(NamedTuple):
    """What came of an answer, as it was measured."""

    tokens: int
    whole: bool
    took_s: float  # from the acceptance on
    usage: Usage | None
    prefilled: float = 0.0  # share of the prompt that was done, where nothing came as who asked hung up
    text_bytes: int = 0  # 0 where calls of tools came

    def served(self, answer: str, terms: Terms, most: int) -> Served:
        """It as it is paid: an `answer` of at most `most` tokens, to a prompt of at most as many as was agreed."""
        tokens = min(self.tokens, most)
        if tokens == 0 and self.prefilled > 0.0:
            return Served(answer, int(terms.prompt * self.prefilled), 0, 0, self._took_ms(), PART)
        came = NOTHING if tokens == 0 else WHOLE if self.whole else PART
        prompt = min(self.usage.prompt, terms.prompt) if self.usage is not None and self.usage.prompt else terms.prompt
        cached = min(self.usage.cached or 0, prompt) if self.usage is not None else 0
        return Served(answer, prompt, cached, tokens, self._took_ms(), came)

    def _took_ms(self) -> int:
        return int(milliseconds(max(0.0, self.took_s)))


NOTHING_OF_IT = Came(0, False, 0.0, None)


def hung_up(meter: AnswerMeter, stream: bool, promise: Promise, took_s: float) -> Came:
    """What is due of an answer whose reader hung up `took_s` after it was promised: what came; of one that is not
    streamed, and of the prompt before its first token, what was done by then as promised. Both sides count so."""
    tokens, prefilled = meter.tokens, 0.0
    if tokens == 0:
        after_s = took_s - promise.ttft_s
        prefilled = 1.0 if after_s >= 0.0 else max(0.0, took_s / promise.ttft_s)
        if after_s >= 0.0 and not stream:
            tokens = int(min(after_s / max(promise.tpot_s, 1e-9), MOST_TOKENS)) + 1
    return Came(tokens, meter.complete, took_s, meter.usage, prefilled, meter.text_bytes)


class Payment:
    """Of one request that a peer may take; to be ended exactly once, by `end`."""

    def __init__(
        self, ledger: ChannelLedger, peer: str, id: int, terms: Terms, most: int, rate: TokenRate
    ) -> None:  # fmt: skip
        self.peer, self.id, self.terms, self.most = peer, id, terms, most
        self.refused = False  # the peer said that it does not take it
        self._ledger, self._digest, self._bytes, self._rate = ledger, sha256(), 0, rate
        self._compared = (0, 0)  # tokens and bytes of text
        per_token = terms.tariff[OUTPUT] if ledger.payment != PER_REQUEST else 0
        self._step = 1000 * (ledger.exposure // UNPAID_SHARE // INSTALMENTS) // per_token + 1 if per_token else 1 << 62
        self._next = self._step

    @property
    def header(self) -> str:
        """ESCROW, as it goes to the peer."""
        return f"v{VERSION} {self.id} {self.terms.amount}"

    def feed(self, chunk: bytes) -> None:
        """Some of the answer's body came."""
        self._digest.update(chunk)
        self._bytes += len(chunk)

    def is_due(self, tokens: int) -> bool:
        """Whether an instalment is to be paid once so many tokens have come."""
        return tokens >= self._next

    def advance(self, promise: Promise, came: Came) -> None:
        """Pay for the tokens that have come so far."""
        self._next = came.tokens + self._step
        self._compare(came)
        served = came.served(self._digest.hexdigest(), self.terms, self.most)
        so_far = msgspec.structs.replace(served, prompt=0, cached=0)  # which the engine tells in the end
        self._ledger.advance(self.peer, self.id, promise, so_far, self.most)

    def end(self, promise: Promise | None = None, came: Came | None = None) -> int:
        """It is over: pay for what came, by the peer's promise; None if it made none. Returns micro-credits."""
        if self.refused:
            self._ledger.free(self.peer, self.id)
            return 0
        answer = self._digest.hexdigest() if self._bytes else ""
        served = came.served(answer, self.terms, self.most) if came is not None else NOTHING_CAME
        if came is not None and served.came != NOTHING:
            self._compare(came)
        return self._ledger.settle(self.peer, self.id, promise, served, self.most)

    def _compare(self, came: Came) -> None:
        """Whether its text can have so many tokens as are billed, since the last time."""
        if came.text_bytes == 0 or self._ledger.payment == PER_REQUEST:
            return
        now, before = (min(came.tokens, self.most), came.text_bytes), self._compared
        self._compared = now
        more = self._rate.billed(
            self.peer, now[0] - before[0], now[1] - before[1], self.terms.tariff[OUTPUT], before[1]
        )  # fmt: skip
        if more:
            self._ledger.overbilled(self.peer, self.id, more, self.terms)


class Delivery:
    """Of one request of a peer that was taken; to be ended once, by `end`, or by `close` if it never began."""

    def __init__(
        self, ledger: ChannelLedger, peer: str, id: int, terms: Terms, promise: Promise, longest: int, agreed: int
    ) -> None:  # fmt: skip
        self.stopped = False  # the peer said that it has ended
        self.agreed = agreed  # tokens that it has at most
        self.passed: int | None = None  # tokens that went on, where what came after them did not
        self._ended, self._checked = False, 0
        self._ledger, self._peer, self._id, self._terms = ledger, peer, id, terms
        self._promise, self._longest, self._most = promise, longest, most_of(ledger.payment, terms)

    def stop(self) -> None:
        """The peer says that it has ended, so no more of it is paid."""
        self.stopped = True

    async def check(self, meter: AnswerMeter) -> None:
        """Some of it came from the engine. Waits where too much of it is not paid yet; raises TooMuch where it is not
        to go on: it is longer than agreed, the peer says that it has ended, or does not pay."""
        try:
            await self._wait_for_pay(meter)
            if self.stopped:
                raise TooMuch("its origin says that it has ended")
            if meter.exceeds(self.agreed):
                raise TooMuch(f"it has more than {self.agreed} tokens, for which it is paid")
        except TooMuch:
            self.passed = self._checked
            raise
        self._checked = meter.tokens

    async def _wait_for_pay(self, meter: AnswerMeter) -> None:
        per_token = self._terms.tariff[OUTPUT]
        if meter.complete or self._ledger.payment == PER_REQUEST:
            return
        now_s = asyncio.get_running_loop().time
        start_s = now_s()
        while not self.stopped:
            unpaid = per_token * meter.tokens // 1000 - self._ledger.earned(self._peer, self._id)
            if unpaid <= self._ledger.exposure // UNPAID_SHARE:
                break
            if now_s() - start_s > PATIENCE_S:
                raise TooMuch(f"{unpaid} micro-credits of it are not paid")
            await asyncio.sleep(SOONEST_S)
        meter.waited_s += now_s() - start_s

    def end(self, answer: str, came: Came) -> None:
        """It is over: `answer` is the digest of what was sent, "" for nothing."""
        self._ended = True
        served = came.served(answer, self._terms, self._most)
        prompt = came.usage.prompt if came.usage is not None else 0
        due = self._ledger.due_at_least(self._terms, self._promise, served, self._longest, prompt)
        self._ledger.delivered(self._peer, self._id, served, due)

    def close(self) -> None:
        """It is over, whether it began or not."""
        if not self._ended:
            self.end("", NOTHING_OF_IT)


class Accounts:
    """What a node pays, and is paid."""

    def __init__(self, ledger: ChannelLedger, send: SendTo) -> None:
        self.ledger, self.send = ledger, send
        self.tariffs: deque[Tariff] = deque(maxlen=TARIFFS_KEPT)
        self.rate = TokenRate()
        ledger.doubted = self.rate.doubted
        self.rejected = 0  # messages and requests that the ledger did not take
        self._urgent = asyncio.Event()
        self._busy: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._untold: dict[str, list[str]] = {}  # statements about stake for each peer
        self._there: set[str] = set()
        self._again_s: dict[str, float] = {}  # when a peer that declined is told again
        self._reasons: dict[str, str] = {}  # why it did
        self._disagreed_s: dict[str, float] = {}  # when it last did
        self._not_now: set[str] = set()  # peers who last took no message

    # Requests of own users.

    async def escrow(self, peer: str, tariff: Tariff, prompt: int, most: int, body: bytes) -> Payment:
        """Put credit in escrow for a request of `prompt` tokens and at most `most` of an answer, durably. Raises
        LedgerError or Full."""
        terms = Terms(tariff, prompt, int(price_of(self.ledger.payment, np.array(tariff), prompt, 0, most)))
        payment = Payment(self.ledger, peer, self.ledger.lock(peer, terms, digest(body)), terms, most, self.rate)
        if self.ledger.available(peer) < self.ledger.exposure // 2:
            self._urgent.set()
        try:
            await self.ledger.durable()
        except BaseException:
            payment.refused = True
            payment.end()
            raise
        return payment

    def hurry(self) -> None:
        """Tell peers soon what is owed."""
        self._urgent.set()

    # Requests of peers.

    def advertised(self, tariff: Tariff) -> None:
        """The tariff in force from now on."""
        self.tariffs.append(tariff)

    def offered(self, header: bytes, tariff: Tariff, prompt: int, most: int | None) -> tuple[int, Terms]:
        """Id and terms of a request that a peer offers, by its header ESCROW: for at most `most` tokens (None: as many
        as the model writes) after a prompt, at a tariff that was advertised lately. Raises LedgerError."""
        words = header.split()
        numbers = words[1:]
        if len(words) != 3 or not all(each.isdigit() and len(each) < 18 for each in numbers):
            raise LedgerError(f"the header {ESCROW} is not v{VERSION} ID AMOUNT")
        if words[0] != b"v%d" % VERSION:
            other = words[0].decode("latin-1") if words[0].startswith(b"v") else "v1"
            raise LedgerError(f"it is of version {other} of the ledger's statements, expected v{VERSION}")
        id, amount = map(int, numbers)
        terms, per_request = Terms(tariff, prompt, amount), self.ledger.payment == PER_REQUEST
        if not per_request and tariff not in self.tariffs:
            raise LedgerError(f"the tariff {tariff} is none that was advertised lately")
        if (most is None and not per_request) or (most or 0) > most_of(self.ledger.payment, terms):
            wanted = "any number of" if most is None else most
            raise LedgerError(f"{amount} micro-credits in escrow do not pay {wanted} tokens")
        return id, terms

    def take(
        self, peer: str, id: int, terms: Terms, body: bytes, promise: Promise, longest: int, most: int | None,
        prompt: int = 0,
    ) -> Delivery:  # fmt: skip
        """Take a request that was `offered`, with a promise; its answer is expected to have at most `longest` tokens,
        and agreed to have `most`; its prompt is thought to have `prompt` here. Raises LedgerError or Full."""
        delivery = Delivery(self.ledger, peer, id, terms, promise, longest, MOST_TOKENS if most is None else most)
        self.ledger.take(peer, id, terms, digest(body), promise, delivery.stop, prompt)
        return delivery

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
            self.ledger.close_silent()
            for peer in sorted(self._there - self._busy):
                if loop.time() < self._again_s.get(peer, 0.0):
                    continue
                if not self._untold.get(peer) and not self.ledger.has_to_tell(peer):
                    continue
                self._busy.add(peer)
                task = loop.create_task(self._exchange(peer))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(SOONEST_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(EXCHANGE_S - SOONEST_S):
                    await self._urgent.wait()
            self._urgent.clear()

    async def _exchange(self, peer: str) -> None:
        """Tell a peer all that there is to tell."""
        try:
            while told := _first_of(untold := self._untold.get(peer, [])):
                await self._tell(peer, told)
                untold[:] = [each for each in untold if each not in told]  # of what this run of the peer is told
            left = MOST_AT_ONCE
            while left and (message := await self.ledger.message(peer)) is not None:
                again, asked = self.ledger.forgotten(peer), self.ledger.asked[peer]
                await self.ledger.replied(peer, await self.send(peer, message), asked)
                left -= self.ledger.forgotten(peer) >= again  # what a peer forgot is told it at one go
                self.spread()
        except (TimeoutError, OSError, Full):
            pass  # it is told again
        except NotNow as error:
            if peer in self._not_now:
                self._disagreed(peer, error)
            self._not_now.add(peer)
            self._again_s[peer] = asyncio.get_running_loop().time() + DISAGREED_S
        except (LedgerError, StatementError) as error:
            self._disagreed(peer, error)
        else:
            self._not_now.discard(peer)
        finally:
            self._busy.discard(peer)

    def _disagreed(self, peer: str, error: Exception) -> None:
        self.rejected += 1
        self._disagreed_s[peer] = asyncio.get_running_loop().time()
        self._again_s[peer] = self._disagreed_s[peer] + DISAGREED_S
        if self._reasons.get(peer) != str(error):
            self._reasons[peer] = str(error)
            log.warning("a peer's ledger and ours do not agree", extra={"peer": peer, "reason": str(error)})

    async def _tell(self, peer: str, statements: tuple[str, ...]) -> None:
        """Tell a peer statements, each alone where it does not take all of them, and not again what it does not take
        alone. Raises OSError, TimeoutError, and LedgerError where it takes nothing now."""
        try:
            await self.send(peer, msgspec.json.encode(Telling(statements)))
        except NotTaken as error:
            if len(statements) > 1:
                for each in statements:
                    await self._tell(peer, (each,))
            else:
                self.rejected += 1
                log.warning("a peer does not take a statement", extra={"peer": peer, "reason": str(error)})

    async def received(self, peer: str, body: bytes) -> bytes:
        """A message of a peer. Raises LedgerError, StatementError or Full."""
        try:
            return await self.ledger.received(peer, body)
        except (LedgerError, StatementError):
            self.rejected += 1
            raise
        finally:
            self.spread()

    def heard(self, peer: str) -> None:
        """A peer is there."""
        if peer not in self._there:
            self._there.add(peer)
            stakes = self.ledger.stakes
            own = [stakes.latest[self.ledger.name]] if self.ledger.name in stakes.latest else []
            self._untold[peer] = [msgspec.json.encode(each).decode() for each in (*own, *stakes.slashes.values())]

    def gone(self, peer: str) -> None:
        """A peer fell silent, or started anew."""
        self._there.discard(peer)
        self._untold.pop(peer, None)
        self._not_now.discard(peer)
        self._again_s.pop(peer, None)
        self.ledger.gone(peer)

    def forget(self, peer: str) -> None:
        """A peer that is gone is not worth remembering: the ledger has what it owes and is owed."""
        self._again_s.pop(peer, None)
        self._reasons.pop(peer, None)
        self._disagreed_s.pop(peer, None)
        self._not_now.discard(peer)

    def spread(self) -> None:
        """Pass on what is news of stakes."""
        news, self.ledger.news = self.ledger.news, []
        for stated in news:
            self.tell_all(msgspec.json.encode(stated))

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
            "no_channel": self._without_channel(),
            "stake_lost": [{"peer": name, "by": kind} for name, kind in self.ledger.stakes.losses()],
        }  # fmt: skip

    def _granted(self, peer: str, amounts: tuple[int, int]) -> float:
        """To this node, of what the two of a channel were granted."""
        return amounts[self.ledger.name > peer] / MICRO

    @staticmethod
    def _closed(channel: Channel) -> str:
        if channel.is_closed:
            return "by both" if channel.is_agreed else "alone"
        return "to be" if channel.leaving_ms else ""

    def _disagrees(self, peer: str) -> bool:
        """Whether a peer has lately declined what it was told."""
        until_s = self._disagreed_s.get(peer, -math.inf) + DISAGREED_S + SHOWN_S
        return asyncio.get_running_loop().time() < until_s

    def _reason(self, peer: str) -> str:
        """Why a peer has lately declined what it was told, "" if it has not."""
        return self._reasons.get(peer, "") if self._disagrees(peer) else ""

    def _without_channel(self) -> list[dict[str, str]]:
        """Peers that are there and decline a channel, and why."""
        without = sorted(self._there - set(self.ledger.books.channels))
        return [{"peer": peer, "reason": self._reason(peer)} for peer in without if self._reason(peer)]

    def _channel(self, balance: Any) -> dict[str, Any]:
        channel = self.ledger.books.channels[balance.peer]
        return {
            "peer": balance.peer, "free": balance.free / MICRO, "escrow": balance.escrow / MICRO,
            "peer_free": balance.peer_free / MICRO, "peer_escrow": balance.peer_escrow / MICRO,
            "exposed": channel.exposed / MICRO, "paid": channel.total / MICRO, "earned": channel.paid_total / MICRO,
            "unacknowledged": channel.number - channel.acked, "short": channel.short / MICRO,
            "over": channel.over / MICRO, "granted": self._granted(balance.peer, channel.granted),
            "closed": self._closed(channel), "refills": len(channel.refills),
            "refill_declined": self.ledger.refills.declined.get(balance.peer, ""),
            "reconciled": self.ledger.is_reconciled(balance.peer),
            "disagreement": self._reason(balance.peer),
        }  # fmt: skip
