"""The two sides of a channel, which exchange what they have to say without a network between them."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from wwwserve.agents.protocol import MICRO, QUOTED
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.channel_ledger import WHOLE, ChannelLedger, Grant
from wwwserve.serving.ledger.journal import Balance, Journal, MemoryJournal, SqliteJournal
from wwwserve.serving.ledger.statements import Served, Terms, digest
from wwwserve.serving.market import Promise

A, B, C = (Identity.generate() for _ in range(3))
CREDIT = 100 * MICRO
BODY, ANSWER = digest(b"what is asked"), digest(b"what is answered")
PROMISE = Promise(1.0, 0.01)
SLACK_MS = 300
WAIT_S = 100.0  # until a channel is closed without its peer


def terms_of(amount: int = MICRO, price: int = MICRO) -> Terms:
    """Of an answer at a price for 1000 tokens, after a prompt that costs nothing."""
    return Terms((0, 0, price), 10, amount)


def came(tokens: int, how: str = WHOLE, took_ms: int = 1) -> Served:
    return Served(ANSWER, 10, 0, tokens, took_ms, how)


class Sides:
    """The two sides of a channel, A's and B's; each can be killed and comes back from its journal."""

    def __init__(
        self, kind: str, folder: Path, payment: int = QUOTED, exposure: int = 10 * MICRO, credit: int = CREDIT
    ) -> None:  # fmt: skip
        self.kind, self.folder, self.payment, self.exposure, self.credit = kind, folder, payment, exposure, credit
        self.journals: dict[str, Journal] = {}
        self.now_s = 1e9
        self.a, self.b = self.start(A), self.start(B)

    def start(self, who: Identity, max_pages: int = 0) -> ChannelLedger:
        if self.kind == "sqlite":
            self.journals[who.name] = SqliteJournal(self.file(who), who.name, max_pages=max_pages)
        journal = self.journals.setdefault(who.name, MemoryJournal())
        other = B if who is A else A
        grants = {other.name: self.grant(who)}
        funds = {A.name: 4 * MICRO, B.name: 4 * MICRO}
        return ChannelLedger(
            who, journal, grants, funds, exposure=self.exposure, payment=self.payment, slack_ms=SLACK_MS,
            closed=self.closed(who), close_after_s=WAIT_S, wall_clock=lambda: self.now_s,
        )  # fmt: skip

    def closed(self, who: Identity) -> list[str]:
        """With whom one side is configured to have no open channel."""
        return []

    def grant(self, who: Identity) -> Grant:
        """What is configured on one side."""
        return Grant(self.credit, self.credit, "limits")

    def file(self, who: Identity) -> Path:
        return self.folder / ("a.db" if who is A else "b.db")

    def kill(self, who: Identity) -> None:
        """What was not written is lost."""
        self.journals[who.name].close()
        if who is A:
            self.a = self.start(A)
        else:
            self.b = self.start(B)

    async def exchange(self) -> None:
        """Until neither has anything to send."""
        for _ in range(10):
            sent = False
            for one, other in ((self.a, self.b), (self.b, self.a)):
                message = await written(one, one.message(other.name))
                if message is not None:
                    sent = True
                    answer = await written(other, other.received(one.name, message))
                    await written(one, one.replied(other.name, answer))
            if not sent:
                return
        raise AssertionError("the two do not come to an end")

    def ask(self, terms: Terms | None = None) -> int:
        """A request from A to B; its id."""
        id = self.a.lock(B.name, terms or terms_of(), BODY)
        self.b.take(A.name, id, terms or terms_of(), BODY, PROMISE)
        return id

    def delivered(self, id: int, served: Served) -> None:
        taken = self.b.books.channels[A.name].taken[id]
        due = self.b.due_at_least(taken.terms, taken.promise, served, 1000, served.prompt)
        self.b.delivered(A.name, id, served, due)

    def answered(self, id: int, tokens: int) -> int:
        self.delivered(id, came(tokens))
        return self.settle(id, came(tokens))

    def paid(self, *tokens: int) -> None:
        """Answers of so many tokens, one after the other."""
        for each in tokens:
            self.answered(self.ask(), each)

    def settle(self, id: int, served: Served, promise: Promise | None = PROMISE) -> int:
        return self.a.settle(B.name, id, promise, served, 1000)

    def own(self) -> tuple[Balance, Balance]:
        return self.a.balances()[0], self.b.balances()[0]


async def written(ledger: ChannelLedger, work: Awaitable[Any]) -> Any:
    """The result of work that waits until it is written."""
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.sleep(0)
        ledger.flush()
    return await task


def play(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 600.0))  # type: ignore[arg-type]


def dealt(one: ChannelLedger, other: ChannelLedger, amount: int) -> None:
    """A request goes from the one to the other, the amount in escrow, and is answered and settled. Raises LedgerError
    where that may not be; then it may have gone and not been taken."""
    id = one.lock(other.name, terms_of(amount, 6 * MICRO), BODY)
    other.take(one.name, id, terms_of(amount, 6 * MICRO), BODY, PROMISE)
    other.delivered(one.name, id, came(1000), 0)
    one.settle(other.name, id, PROMISE, came(1000), 1000)


def mirrored(sides: Sides) -> None:
    """Both own the same by either's account, and nothing is under way."""
    a, b = sides.own()
    assert a[2:] == (b.peer_free, b.peer_escrow, b.free, b.escrow) and a.escrow == b.escrow == 0


def mirrored_of(one: ChannelLedger, other: ChannelLedger) -> None:
    """The two own the same of their channel by either's account."""
    [a] = [each for each in one.balances() if each.peer == other.name]
    [b] = [each for each in other.balances() if each.peer == one.name]
    assert a[1:] == (b.opened, b.peer_free, b.peer_escrow, b.free, b.escrow)
