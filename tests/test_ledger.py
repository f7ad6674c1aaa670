"""One contract for every ledger, two nodes at a time; then what only a file has, and evidence of who cheats."""

import asyncio
import contextlib
import itertools
import random
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from duel_cases import case_of, side_of, staked, verdict_on
from hypothesis import given, settings
from hypothesis import strategies as st

from wwwserve.agents.generator import make_generators
from wwwserve.agents.protocol import LATENESS, MICRO, PER_REQUEST, QUOTED, VOTE_A, VOTE_B, draw_by_stake, price_of
from wwwserve.serving import cli
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.audit import audit, compare, evidence, settled
from wwwserve.serving.ledger.channel import LedgerError, Noted
from wwwserve.serving.ledger.channel_ledger import (
    NOTHING,
    PART,
    WHOLE,
    ChannelLedger,
    Grant,
    most_of,
)
from wwwserve.serving.ledger.exchange import Declined, Held, Vouching
from wwwserve.serving.ledger.journal import Balance, Full, Journal, JournalError, MemoryJournal, SqliteJournal
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import (
    NOTHING_CAME,
    VERSION,
    Served,
    Signed,
    State,
    StatementError,
    Terms,
    Vouch,
    digest,
    link,
    sign,
)
from wwwserve.serving.ledger.verdicts import Conflict, Stake, Staked, Twice, Verdict, decode
from wwwserve.serving.market import Promise

KINDS = ("memory", "sqlite")
A, B, C = (Identity.generate() for _ in range(3))
CREDIT = 100 * MICRO
BODY, ANSWER = digest(b"what is asked"), digest(b"what is answered")


PROMISE = Promise(1.0, 0.01)
SLACK_MS = 300


def terms_of(amount: int = MICRO, price: int = MICRO) -> Terms:
    """Of an answer at a price for 1000 tokens, after a prompt that costs nothing."""
    return Terms((0, 0, price), 10, amount)


def came(tokens: int, how: str = WHOLE, took_ms: int = 1) -> Served:
    return Served(ANSWER, 10, 0, tokens, took_ms, how)


class Sides:
    """The two sides of a channel, A's and B's; each can be killed and comes back from its journal."""

    def __init__(self, kind: str, folder: Path, payment: int = QUOTED, exposure: int = 10 * MICRO) -> None:
        self.kind, self.folder, self.payment, self.exposure = kind, folder, payment, exposure
        self.journals: dict[str, Journal] = {}
        self.a, self.b = self.start(A), self.start(B)

    def start(self, who: Identity, max_pages: int = 0) -> ChannelLedger:
        if self.kind == "sqlite":
            self.journals[who.name] = SqliteJournal(self.file(who), who.name, max_pages=max_pages)
        journal = self.journals.setdefault(who.name, MemoryJournal())
        other = B if who is A else A
        grants = {other.name: Grant(CREDIT, CREDIT, "limits")}
        funds = {A.name: 4 * MICRO, B.name: 4 * MICRO}
        return ChannelLedger(
            who, journal, grants, funds, exposure=self.exposure, payment=self.payment, slack_ms=SLACK_MS
        )

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


@pytest.fixture(params=KINDS)
def sides(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sides]:
    made = Sides(request.param, tmp_path)
    play(made.exchange)
    yield made
    for journal in made.journals.values():
        journal.close()


def play(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 180.0))  # type: ignore[arg-type]


def mirrored(sides: Sides) -> None:
    """Both own the same by either's account, and nothing is under way."""
    a, b = sides.own()
    assert a[2:] == (b.peer_free, b.peer_escrow, b.free, b.escrow) and a.escrow == b.escrow == 0


# The contract.


def test_a_request_is_escrowed_and_paid_by_its_tokens_to_the_last_micro_credit(sides: Sides) -> None:
    async def scene() -> None:
        id = sides.ask(terms_of(2 * MICRO, 1_234_567))
        a, b = sides.own()
        assert (a.free, a.escrow) == (98 * MICRO, 2 * MICRO) and (b.peer_free, b.peer_escrow) == (a.free, a.escrow)
        due = sides.answered(id, 777)
        assert due == 1_234_567 * 777 // 1000
        assert sides.a.balances()[0].free == CREDIT - due
        assert sides.b.balances()[0].free == CREDIT  # earned is what is signed
        await sides.exchange()
        assert sides.b.balances()[0].free == CREDIT + due
        mirrored(sides)

    play(scene)


def test_a_channel_opens_once_and_only_on_terms_that_both_have(sides: Sides, tmp_path: Path) -> None:
    async def scene() -> None:
        before = sides.own()
        stranger = ChannelLedger(C, MemoryJournal(), {A.name: Grant(CREDIT, 0, "limits")}, {}, exposure=1, payment=0)
        message = await stranger.message(A.name)
        assert message is not None
        assert isinstance(msgspec.json.decode(await sides.a.received(C.name, message), type=Declined), Declined)
        with pytest.raises(LedgerError, match="no channel"):
            sides.a.take(C.name, 1, terms_of(1), BODY, PROMISE)
        generous = ChannelLedger(
            A, MemoryJournal(), {B.name: Grant(2 * CREDIT, 0, "limits")}, {}, exposure=1, payment=0
        )
        message = await generous.message(B.name)
        assert message is not None
        with pytest.raises(LedgerError, match="terms of the channel are others"):
            await generous.replied(B.name, await sides.b.received(A.name, message))
        assert sides.own() == before

    play(scene)


def test_what_may_be_in_escrow_is_bounded_until_the_payee_has_signed(sides: Sides) -> None:
    async def scene() -> None:
        asked = [sides.ask() for _ in range(10)]
        assert sides.a.available(B.name) == 0
        with pytest.raises(LedgerError, match="more than may be in escrow"):
            sides.a.lock(B.name, terms_of(1), BODY)
        with pytest.raises(LedgerError, match="may have in escrow here"):
            sides.b.take(A.name, 11, terms_of(1), BODY, PROMISE)
        sides.answered(asked[0], 1000)
        assert sides.a.available(B.name) == 0  # as B does not know yet
        await sides.exchange()
        assert sides.a.available(B.name) == MICRO
        sides.ask()

    play(scene)


@pytest.mark.parametrize(
    ("payment", "how", "tokens", "due"),
    [
        (QUOTED, PART, 200, MICRO // 5), (QUOTED, NOTHING, 0, 0), (LATENESS, PART, 200, MICRO // 5),
        (PER_REQUEST, WHOLE, 3, MICRO), (PER_REQUEST, PART, 250, MICRO // 4), (PER_REQUEST, PART, 5000, MICRO),
        (PER_REQUEST, NOTHING, 0, 0),
    ],
)  # fmt: skip
def test_a_cancelled_request_pays_for_what_was_generated(
    payment: int, how: str, tokens: int, due: int, tmp_path: Path
) -> None:
    async def scene() -> None:
        sides = Sides("memory", tmp_path, payment)
        await sides.exchange()
        id = sides.ask()
        sides.delivered(id, came(tokens, how))
        assert sides.settle(id, came(tokens, how)) == due
        await sides.exchange()
        assert sides.b.balances()[0].free == CREDIT + due
        mirrored(sides)

    play(scene)


@pytest.mark.parametrize(
    ("took_ms", "share"), [(1, 1.0), (5990, 1.0), (8985, 0.5), (11_980, 0.0), (10**9, 0.0)]
)  # fmt: skip
def test_a_late_answer_pays_less_by_the_time_that_was_promised(took_ms: int, share: float, tmp_path: Path) -> None:
    """500 tokens were promised within 1 + 499 x 0.01 s."""

    async def scene() -> None:
        sides = Sides("memory", tmp_path, LATENESS)
        await sides.exchange()
        id = sides.ask(Terms((20_000, 5_000, MICRO), 100, 2 * MICRO))
        served = Served(ANSWER, 50, 40, 500, took_ms, WHOLE)
        sides.delivered(id, served)
        price = (20_000 * 10 + 5_000 * 40 + MICRO * 500) // 1000
        assert sides.settle(id, served) == int(price * share)
        await sides.exchange()
        assert sides.b.balances()[0].free == CREDIT + int(price * share)
        assert sides.b.books.channels[A.name].short == 0
        mirrored(sides)

    play(scene)


def test_a_payer_whose_clock_takes_more_than_the_slack_is_noted(tmp_path: Path) -> None:
    async def scene() -> None:
        sides = Sides("memory", tmp_path, LATENESS)
        await sides.exchange()
        for claimed_ms, short in ((6_000 + SLACK_MS, 0), (12_000, MICRO // 2)):
            id = sides.ask()
            sides.delivered(id, came(500, took_ms=6_000))
            sides.settle(id, came(500, took_ms=claimed_ms))
            await sides.exchange()
            noted = sides.b.books.channels[A.name].short
            assert noted == pytest.approx(short, rel=0.06) and (noted == 0) == (short == 0)

    play(scene)


@pytest.mark.parametrize(
    ("payment", "terms", "most"),
    [
        (QUOTED, Terms((0, 0, 2 * MICRO), 10, MICRO), 500), (QUOTED, Terms((10**5, 0, MICRO), 1000, MICRO), 900),
        (LATENESS, Terms((10**6, 0, MICRO), 1000, MICRO - 1), -1), (LATENESS, Terms((10**6, 0, 7), 1000, MICRO), 142),
        (LATENESS, Terms((0, 0, 0), 10, 0), 1 << 31), (PER_REQUEST, Terms((0, 0, 0), 10, MICRO), 1 << 31),
        (PER_REQUEST, Terms((0, 0, 0), 10, MICRO - 1), -1),
    ],
)  # fmt: skip
def test_the_longest_answer_is_what_the_escrow_pays_after_the_prompt(payment: int, terms: Terms, most: int) -> None:
    assert most_of(payment, terms) == most
    if 0 <= most < 1 << 31:
        paid = [
            price_of(payment, np.array(terms.tariff), terms.prompt, 0, tokens) <= terms.amount
            for tokens in (most, most + 1)
        ]
        assert paid == [True, False]


def test_a_long_answer_is_paid_in_instalments(sides: Sides) -> None:
    async def scene() -> None:
        id = sides.ask(terms_of(2 * MICRO))
        for tokens in (100, 100, 50, 400):  # nothing is paid back
            sides.a.advance(B.name, id, PROMISE, came(tokens, PART), 2000)
            await sides.exchange()
            a, b = sides.own()
            paid = max(100, tokens) * MICRO // 1000
            assert (a.free, a.escrow) == (b.peer_free, b.peer_escrow) == (98 * MICRO, 2 * MICRO - paid)
            assert b.free == CREDIT + paid and sides.b.earned(A.name, id) == paid
            assert sides.a.books.channels[B.name].exposed == 2 * MICRO - paid
        sides.a.flush()
        sides.b.flush()
        assert sides.answered(id, 1500) == 1100 * MICRO // 1000  # the rest
        await sides.exchange()
        mirrored(sides)
        channel = sides.b.books.channels[A.name]
        assert sides.b.balances()[0].free == CREDIT + 1500 * MICRO // 1000 and channel.short == 0 == len(channel.earned)
        short = sides.ask()
        sides.a.advance(B.name, short, PROMISE, came(300, PART), 1000)
        sides.delivered(short, came(1000))
        sides.settle(short, NOTHING_CAME, None)
        await sides.exchange()
        assert channel.short == 700 * MICRO // 1000
        mirrored(sides)

    play(scene)


def test_messages_that_come_twice_or_late_pay_once(sides: Sides) -> None:
    async def scene() -> None:
        sides.answered(sides.ask(), 1000)
        first = await written(sides.a, sides.a.message(B.name))
        assert first is not None
        answers = [await written(sides.b, sides.b.received(A.name, first)) for _ in range(3)]
        assert answers[0] == answers[1] == answers[2]
        sides.answered(sides.ask(), 1000)
        second = await written(sides.a, sides.a.message(B.name))  # the first was not acknowledged as far as A knows
        assert second is not None
        last = await written(sides.b, sides.b.received(A.name, second))
        again = await written(sides.b, sides.b.received(A.name, first))
        assert sides.b.balances()[0].free == CREDIT + 2 * MICRO
        for answer in (answers[0], again, last, last):
            await written(sides.a, sides.a.replied(B.name, answer))
        mirrored(sides)
        with pytest.raises(LedgerError, match="ended already"):
            sides.b.take(A.name, 1, terms_of(), BODY, PROMISE)

    play(scene)


def test_a_request_that_was_refused_or_never_came_frees_its_escrow(sides: Sides) -> None:
    async def scene() -> None:
        refused = sides.a.lock(B.name, terms_of(), BODY)
        sides.a.free(B.name, refused)
        lost = sides.a.lock(B.name, terms_of(), BODY)
        sides.settle(lost, NOTHING_CAME, None)
        await sides.exchange()
        mirrored(sides)
        assert sides.a.balances()[0].free == CREDIT
        with pytest.raises(LedgerError, match="ended already"):  # though it comes now
            sides.b.take(A.name, lost, terms_of(), BODY, PROMISE)

    play(scene)


def test_nothing_is_settled_twice_or_beyond_its_escrow(sides: Sides) -> None:
    id = sides.ask()
    assert sides.settle(id, came(10**9)) == MICRO
    with pytest.raises(LedgerError, match="is not with"):
        sides.settle(id, came(1))
    with pytest.raises(LedgerError, match="is not with"):
        sides.a.free(B.name, id)
    with pytest.raises(LedgerError, match="is not with"):
        sides.settle(99, came(1))
    with pytest.raises(LedgerError, match="is here already"):
        sides.b.take(A.name, id, terms_of(), BODY, PROMISE)


def test_who_is_killed_comes_back_to_what_was_written_and_the_two_agree(sides: Sides) -> None:
    async def scene() -> None:
        done, under_way = sides.ask(), sides.ask()
        sides.answered(done, 500)
        sides.a.flush()
        sides.b.flush()
        sides.kill(A)
        sides.delivered(under_way, came(0, NOTHING))
        await sides.exchange()
        mirrored(sides)  # what A had asked was not answered, as far as it knows
        assert sides.a.balances()[0].free == CREDIT - MICRO // 2
        third = sides.ask()
        sides.b.flush()
        sides.kill(B)
        sides.settle(third, came(100, PART))
        await sides.exchange()
        mirrored(sides)
        fourth = sides.ask()  # B is killed before it has written that it took it
        sides.kill(B)
        sides.settle(fourth, came(1000))
        await sides.exchange()
        mirrored(sides)
        assert sides.b.balances()[0].free == CREDIT + MICRO // 2 + MICRO // 10 + MICRO

    play(scene)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_happens_in_whatever_order_credit_is_conserved_and_the_two_agree(seed: int) -> None:
    async def scene() -> None:
        draw = random.Random(seed)
        sides = Sides("memory", Path(), exposure=30 * MICRO)
        await sides.exchange()
        under_way: list[tuple[ChannelLedger, ChannelLedger, int]] = []
        for _ in range(60):
            one, other = (sides.a, sides.b) if draw.random() < 0.5 else (sides.b, sides.a)
            act = draw.random()
            if act < 0.45:
                amount = draw.randrange(3 * MICRO)
                if amount <= one.available(other.name):
                    terms = Terms((draw.randrange(MICRO), 0, draw.randrange(3 * MICRO)), 100, amount)
                    id = one.lock(other.name, terms, BODY)
                    with contextlib.suppress(LedgerError):
                        if draw.random() < 0.9:
                            other.take(one.name, id, terms, BODY, PROMISE)
                    under_way.append((one, other, id))
            elif act < 0.5 and under_way:
                one, other, id = under_way[draw.randrange(len(under_way))]
                one.advance(other.name, id, PROMISE, came(draw.randrange(2000), PART), 1000)
            elif act < 0.8 and under_way:
                one, other, id = under_way.pop(draw.randrange(len(under_way)))
                tokens, how = draw.randrange(2000), draw.choice((WHOLE, PART, NOTHING))
                took_ms = draw.randrange(60_000)
                if other.books.channels[one.name].taken.get(id) is not None:
                    other.delivered(one.name, id, came(tokens, WHOLE, took_ms), draw.randrange(MICRO))
                one.settle(other.name, id, PROMISE, came(tokens, how, took_ms), 1000)
            elif act < 0.95:
                message = await written(one, one.message(other.name))
                if message is not None:
                    answer = await written(other, other.received(one.name, message))
                    if draw.random() < 0.6:
                        await written(one, one.replied(other.name, answer))
            else:
                for each in (sides.a, sides.b):
                    each.flush()
                sides.kill(A if one is sides.a else B)
                under_way = []
                for each in (sides.a, sides.b):  # what the other had with it broke off
                    peer = (B if each is sides.a else A).name
                    for id in list(each.books.channels[peer].open):
                        each.settle(peer, id, None, NOTHING_CAME, 1)
                    for id in each.books.channels[peer].taken.keys() - each.books.channels[peer].delivered.keys():
                        each.delivered(peer, id, NOTHING_CAME, 0)
            for balance in sides.own():
                assert sum(balance[2:]) == balance.opened and min(balance[2:]) >= 0
        for one, other, id in under_way:
            one.settle(other.name, id, None, NOTHING_CAME, 1000)
            other.delivered(one.name, id, NOTHING_CAME, 0)
        await sides.exchange()
        mirrored(sides)
        assert sum(each.free for each in sides.own()) == 2 * CREDIT

    play(scene)


# Cheats, each with its evidence.


async def cheated(sides: Sides, **changes: object) -> bytes:
    """A's next message, whose last receipt is changed, with all that follows from it signed anew."""
    vouch = msgspec.json.decode(await written(sides.a, sides.a.message(B.name)) or b"", type=Vouching).vouch
    receipt = msgspec.structs.replace(vouch.receipts[-1], **changes)
    channel = sides.b.books.channels[A.name]
    state = vouch.voucher.state
    total = state.total - vouch.receipts[-1].due + receipt.due
    head = channel.paid_head
    for each in (*vouch.receipts[:-1], receipt):
        head = link(head, each)
    state = msgspec.structs.replace(state, total=total, head=head)
    voucher = Signed(state, sign(A, "voucher", state))
    return msgspec.json.encode(Vouching(Vouch(voucher, vouch.first, (*vouch.receipts[:-1], receipt))))


def test_two_vouchers_of_one_number_are_evidence_that_costs_the_stake(sides: Sides) -> None:
    async def scene() -> None:
        for one, other in ((sides.a, sides.b), (sides.b, sides.a)):
            stake = await written(one, one.restake(3 * MICRO))
            assert stake is not None and other.heard(one.name, msgspec.json.encode(stake))
        sides.answered(sides.ask(), 1000)
        other = await cheated(sides, due=0)
        honest = await written(sides.a, sides.a.message(B.name))
        assert honest is not None
        await written(sides.b, sides.b.received(A.name, honest))
        answer = await written(sides.b, sides.b.received(A.name, other))
        assert "two vouchers" in msgspec.json.decode(answer, type=Declined).reason
        assert sides.b.balances()[0].free == CREDIT + MICRO  # the first counts
        assert (sides.b.stakes.stake(A.name), sides.b.stakes.stake(B.name)) == (0, 3 * MICRO)  # and nobody has it
        [stated] = sides.b.news
        assert isinstance(stated, Conflict)
        stranger = Stakes({A.name: 4 * MICRO, B.name: 4 * MICRO, C.name: MICRO})
        stranger.heard(staked(A, MICRO))
        assert stranger.stake(A.name) == MICRO
        accused = decode(msgspec.json.encode(stated))
        assert stranger.heard(accused) and stranger.stake(A.name) == 0  # whoever sees it can tell
        assert not stranger.heard(accused) and not stranger.is_news(accused)
        for forged in (
            msgspec.structs.replace(stated, other=stated.one),
            msgspec.structs.replace(stated, other=Signed(stated.other.state, sign(B, "voucher", stated.other.state))),
            msgspec.structs.replace(stated, one=Signed(stated.one.state, stated.other.signature)),
        ):
            with pytest.raises(StatementError):
                decode(msgspec.json.encode(forged))
        sides.kill(B)
        assert sides.b.stakes.stake(A.name) == 0  # it is kept

    play(scene)


def test_a_payer_who_says_that_less_came_than_was_delivered_is_noted_and_gets_no_more(sides: Sides) -> None:
    async def scene() -> None:
        for k in range(10):  # the exposure
            id = sides.ask()
            sides.delivered(id, came(1000))
            sides.settle(id, NOTHING_CAME)
            await sides.exchange()
            assert sides.b.books.channels[A.name].short == (k + 1) * MICRO
        id = sides.a.lock(B.name, terms_of(), BODY)
        with pytest.raises(LedgerError, match="paid 10000000 micro-credits less than it was delivered"):
            sides.b.take(A.name, id, terms_of(), BODY, PROMISE)
        notes = [
            msgspec.json.decode(e.body, type=Noted) for e in sides.journals[B.name].entries() if b'"note"' in e.body
        ]
        assert len(notes) == 10 and all(note.kind == "short" and note.short == MICRO for note in notes)

    play(scene)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"due": 2 * MICRO}, "pays 2000000 of 1000000"), ({"request": digest(b"another")}, "not of what was taken"),
        ({"terms": terms_of(price=1)}, "not of what was taken"), ({"promise": None}, "not of what was taken"),
        ({"promise": Promise(0.5, 0.01)}, "not of what was taken"), ({"due": 10**30}, "Expected `int` <= "),
        ({"due": 10**18 + 1}, "is none"),
        ({"served": came(1, NOTHING)}, "for nothing"), ({"served": came(-1)}, "Expected `int` >= 0"),
        ({"served": came(1, took_ms=-1)}, "Expected `int` >= 0"),
        ({"served": Served(ANSWER, 10, 11, 1, 1, WHOLE)}, "is none"),
        ({"served": Served(ANSWER, 11, 0, 1, 1, WHOLE)}, "longer prompt than was agreed"),
    ],
)  # fmt: skip
def test_receipts_that_are_not_of_what_was_done_are_refused(
    sides: Sides, changes: dict[str, object], message: str
) -> None:
    async def scene() -> None:
        sides.answered(sides.ask(), 1000)
        before = sides.b.balances()
        with pytest.raises((LedgerError, StatementError), match=message):
            await written(sides.b, sides.b.received(A.name, await cheated(sides, **changes)))
        assert sides.b.balances() == before
        await sides.exchange()
        mirrored(sides)

    play(scene)


def test_vouchers_of_others_for_others_and_without_their_receipts_are_refused(sides: Sides) -> None:
    async def scene() -> None:
        sides.answered(sides.ask(), 1000)
        sent = await written(sides.a, sides.a.message(B.name))
        first = msgspec.json.decode(sent or b"", type=Vouching).vouch
        state = first.voucher.state

        def vouch(state: State, by: Identity, **changes: object) -> bytes:
            signed = Signed(state, sign(by, "voucher", state))
            return msgspec.json.encode(Vouching(msgspec.structs.replace(first, voucher=signed, **changes)))

        higher = msgspec.structs.replace(state, total=state.total + 1)
        elsewhere = msgspec.structs.replace(state, channel=digest(b"another"))
        for body, expected in (
            (vouch(state, B), "said to have signed"), (vouch(elsewhere, A), "another channel"),
            (vouch(higher, A), "does not follow from its receipts"), (b"{", "not what it should be"),
            (b'{"type":"vouch","version":%d}' % VERSION, "not what it should be"),
            (b'{"type":"vouch"}', f"version 1 of the ledger's statements, expected {VERSION}"),
        ):  # fmt: skip
            with pytest.raises((StatementError, LedgerError), match=expected):
                await written(sides.b, sides.b.received(A.name, body))
        answer = await written(sides.b, sides.b.received(A.name, vouch(state, A, receipts=())))
        assert isinstance(msgspec.json.decode(answer, type=Held), Held)
        with pytest.raises(StatementError, match="said to have signed"):
            forged = b'{"type":"ack","number":1,"signature":"%b"}' % sign(A, "acknowledgement", state).encode()
            await sides.a.replied(B.name, forged)
        assert sides.b.balances()[0].free == CREDIT

    play(scene)


def test_a_thousand_new_names_buy_no_place_among_candidates() -> None:
    known = [Identity.generate() for _ in range(4)]
    names = [Identity.generate() for _ in range(1000)]
    stakes = Stakes({each.name: MICRO for each in known})
    for each in (*known, *names):
        stake = Stake(each.name, 1, 10**12)
        stakes.heard(decode(msgspec.json.encode(Staked(stake, sign(each, "stake", stake)))))
    weights = np.array([float(stakes.stake(each.name)) for each in (*names, *known)])
    assert weights[-4:].tolist() == [MICRO] * 4 and not weights[:-4].any()
    assert len(stakes.latest) == 4  # nor memory
    generator, drawn = make_generators(1)[0], np.zeros(8, np.int64)
    for _ in range(50):
        draw_by_stake(weights, np.ones(len(weights), np.bool_), 4, generator, drawn)
        assert set(drawn[:4]) == {1000, 1001, 1002, 1003}


# Stake.


def test_a_verdict_moves_stake_as_the_rules_say_in_whatever_order_it_is_heard() -> None:
    judges = sorted((Identity.generate() for _ in range(4)), key=lambda each: each.name)
    funds = {who.name: 4 * MICRO for who in (A, B, C, *judges)}
    alone = Stakes(funds, agreed=True)
    cases = [case_of(alone, C, A, B, nonce=str(k), height=1 + k) for k in range(3)]
    heard = [
        verdict_on(cases[0], dict.fromkeys(judges[:3], side_of(cases[0], A)) | {judges[3]: side_of(cases[0], B)}),
        verdict_on(cases[1], dict.fromkeys(judges[:3], side_of(cases[1], B))),
        verdict_on(cases[2], {judge: side_of(cases[2], A if k % 2 else B) for k, judge in enumerate(judges)}),
    ]
    heard = [decode(msgspec.json.encode(each)) for each in heard]
    assert alone.heard(heard[0]) and not alone.heard(heard[0])
    assert [alone.stake(who.name) for who in (A, B)] == [4 * MICRO, 0]
    fine = 2 * MICRO // 5
    assert [alone.funds[who.name] - 4 * MICRO for who in judges] == [
        fine - 2 * (fine // 3),
        fine // 3,
        fine // 3,
        -fine,
    ]
    assert alone.height(A.name) == 1 and not alone.heard(heard[2])  # a tie
    results = set()
    for order in itertools.permutations(range(3)):
        stakes = Stakes(funds, agreed=True)
        for k in order:
            stakes.heard(heard[k])
        assert sum(stakes.funds.values()) == sum(funds.values()) and min(stakes.funds.values()) >= 0
        results.add(tuple(stakes.funds.items()))
    moved = {A.name: 2 * MICRO, B.name: 6 * MICRO, C.name: 4 * MICRO}
    assert results == {tuple((alone.funds | moved).items())}
    alone.heard(staked(B, MICRO, 2))
    assert alone.stake(B.name) == MICRO  # it stakes anew out of what it has left


def test_verdicts_without_evidence_are_refused() -> None:
    judge, other = Identity.generate(), Identity.generate()
    stakes = Stakes({who.name: 4 * MICRO for who in (A, B, C, judge, other)}, agreed=True)
    case = case_of(stakes, C, A, B)
    good = verdict_on(case, {judge: VOTE_A, other: VOTE_A})
    decode(msgspec.json.encode(good))
    one, two = good.votes
    a, b, opening = case.a, case.b, case.opening

    def changed(**changes: object) -> Verdict:
        return verdict_on(msgspec.structs.replace(case, **changes), {judge: VOTE_A})

    for bad in (
        changed(a=msgspec.structs.replace(a, answer=digest(b"other"))),
        changed(a=b),
        changed(a=b, b=a),
        changed(secret="another"),
        changed(opening=msgspec.structs.replace(opening, request=digest(b"other"))),
        changed(opening=msgspec.structs.replace(opening, origin=A.name).signed(A)),
        changed(opening=msgspec.structs.replace(opening, bond=None).signed(C)),
        changed(opening=msgspec.structs.replace(opening, bond=staked(C, 1)).signed(C)),
        changed(a=msgspec.structs.replace(a, stake=staked(other, MICRO)).signed(A if a.executor == A.name else B)),
        msgspec.structs.replace(good, votes=(msgspec.structs.replace(one, vote=VOTE_B), two)),
        msgspec.structs.replace(good, votes=(one, one)),
        msgspec.structs.replace(good, votes=(msgspec.structs.replace(one, judge=other.name),)),
        msgspec.structs.replace(good, votes=(msgspec.structs.replace(one, vote=7).signed(judge),)),
        Verdict(case_of(stakes, C, A, B, nonce="m"), good.votes),
    ):
        with pytest.raises(StatementError):
            decode(msgspec.json.encode(bad))


def test_who_signs_two_stakes_of_one_number_has_none() -> None:
    stakes = Stakes({A.name: 4 * MICRO})
    assert stakes.heard(staked(A, MICRO)) and not stakes.heard(staked(A, MICRO))
    assert stakes.stake(A.name) == MICRO
    stakes.heard(staked(A, 2 * MICRO))
    assert stakes.stake(A.name) == 0
    [proof] = stakes.fresh
    other = Stakes({A.name: 4 * MICRO})
    other.heard(staked(A, MICRO, 2))
    assert other.heard(decode(msgspec.json.encode(proof))) and other.stake(A.name) == 0  # whoever hears of it can tell
    for forged in (
        Twice(staked(A, 1), staked(A, 1)),
        Twice(staked(A, 1), staked(A, 2, 2)),
        Twice(staked(A, 1), staked(B, 2)),
    ):
        with pytest.raises(StatementError):
            decode(msgspec.json.encode(forged))


def test_what_is_staked_is_at_most_what_was_granted_and_numbers_go_on_after_a_restart(sides: Sides) -> None:
    async def scene() -> None:
        assert await written(sides.a, sides.a.restake(10 * MICRO)) == staked(A, 10 * MICRO)
        assert sides.a.stakes.stake(A.name) == 4 * MICRO
        sides.kill(A)
        assert await sides.a.restake(MICRO) is None  # before a peer has told what it knows
        await sides.exchange()
        again = await written(sides.a, sides.a.restake(MICRO))
        assert again == staked(A, MICRO, 2) and await sides.a.restake(MICRO) is None
        sides.a.heard(B.name, msgspec.json.encode(staked(A, 2 * MICRO, 2)))
        assert await sides.a.restake(2 * MICRO) is None  # it would count for nothing

    play(scene)


# Files.


def used(tmp_path: Path) -> Sides:
    sides = Sides("sqlite", tmp_path)

    async def scene() -> None:
        await sides.exchange()
        for k in range(20):
            sides.answered(sides.ask(), 50 * k)
            if k % 3 == 0:
                await sides.exchange()
        await sides.exchange()
        await written(sides.a, sides.a.restake(MICRO))

    play(scene)
    for journal in sides.journals.values():
        journal.close()
    return sides


def content(path: Path) -> list[list[tuple[object, ...]]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [
            db.execute(f"SELECT * FROM {table}").fetchall() for table in ("entries", "balances", "meta", "snapshot")
        ]


def test_a_good_pair_of_journals_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = used(tmp_path)
    files = [str(sides.file(who)) for who in (A, B)]
    assert cli.main(["ledger", "verify", *files]) == 0
    printed = capsys.readouterr().out
    assert printed.count("ok: ") == 2 and "agree" in printed
    assert cli.main(["ledger", "show", files[0]]) == 0
    shown = capsys.readouterr().out
    assert f"node     {A.name}" in shown and "20 receipts, 20 of them signed by the peer" in shown
    assert settled(*(audit(sides.file(who)) for who in (A, B)))
    assert cli.main(["ledger", "verify", str(tmp_path / "none.db")]) == 1
    assert "no journal that can be used" in capsys.readouterr().err


def test_a_changed_byte_is_found_and_named(tmp_path: Path) -> None:
    sides = used(tmp_path)
    file, original = sides.file(A), content(sides.file(A))
    whole = file.read_bytes()
    draw, found = random.Random(5), 0
    for _ in range(120):
        at = draw.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
        try:
            problems = audit(file).problems
        except (JournalError, sqlite3.Error) as error:
            problems = [str(error)]
        if problems:
            found += 1
        else:
            assert content(file) == original, at  # a byte that nothing is made of
    assert found > 40


def test_every_entry_counts(tmp_path: Path) -> None:
    sides = used(tmp_path)
    file = sides.file(B)
    rows = content(file)[0]
    whole = file.read_bytes()
    for number, body, _ in rows[::4]:
        for change in (
            ("UPDATE entries SET body = ? WHERE number = ?", (bytes(body)[:-2] + b" }", number)),
            ("UPDATE entries SET digest = zeroblob(32) WHERE number = ?", (number,)),
            ("DELETE FROM entries WHERE number = ?", (number,)),
        ):
            file.write_bytes(whole)
            with contextlib.closing(sqlite3.connect(file)) as db, db:
                db.execute(*change)
            problems = audit(file).problems
            assert problems, (number, change)
            if "DELETE" not in change[0]:
                assert problems[0].startswith(f"entry {number}:")
    for change in ("UPDATE balances SET free = free - 1, escrow = escrow + 1", "DELETE FROM balances"):
        file.write_bytes(whole)
        with contextlib.closing(sqlite3.connect(file)) as db, db:
            db.execute(change)
        assert any(A.name in each for each in audit(file).problems)


def test_two_sides_that_do_not_agree_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = used(tmp_path)
    (tmp_path / "third").mkdir()
    third = Sides("sqlite", tmp_path / "third")  # another history of the same two

    async def scene() -> None:
        await third.exchange()
        third.answered(third.ask(), 1000)
        await third.exchange()

    play(scene)
    for journal in third.journals.values():
        journal.close()
    capsys.readouterr()
    assert cli.main(["ledger", "verify", str(sides.file(A)), str(third.file(B))]) == 1
    assert "holds a voucher 1" in capsys.readouterr().err


def test_credit_that_does_not_add_up_is_not_written(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.db", "n")
    with contextlib.closing(journal):
        journal.write([b"{}"], [Balance("p", 10, 4, 1, 5, 0)])
        for bad in (Balance("p", 10, 4, 1, 5, 1), Balance("p", 10, -1, 1, 10, 0)):
            with pytest.raises(JournalError, match="not conserved"):
                journal.write([b"{}"], [bad])
        assert journal.last == 1 and journal.balances() == [Balance("p", 10, 4, 1, 5, 0)]
    with pytest.raises(JournalError, match="is the journal of n, not of m"):
        SqliteJournal(tmp_path / "j.db", "m")


def test_a_full_disk_stops_new_requests_and_loses_nothing(tmp_path: Path) -> None:
    sides = Sides("sqlite", tmp_path)

    async def scene() -> None:
        await sides.exchange()
        before = sides.ask()
        sides.a.flush()
        db = sides.journals[A.name]._db  # type: ignore[attr-defined]
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
        running = asyncio.create_task(sides.a.run())
        with pytest.raises(Full, match="full"):
            while True:
                id = sides.a.lock(B.name, terms_of(0), BODY)
                await sides.a.durable()
                sides.a.free(B.name, id)
        assert sides.a.available(B.name) == 0
        with pytest.raises(Full):
            sides.a.lock(B.name, terms_of(1), BODY)
        with pytest.raises(Full):
            sides.a.take(B.name, 1, terms_of(1), BODY, PROMISE)
        due = sides.answered(before, 1000)  # what is under way ends
        with pytest.raises(Full):
            await sides.a.message(B.name)
        db.execute("PRAGMA max_page_count = 1000000")
        while sides.a.full:
            await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        sides.kill(A)
        sides.b.flush()
        await sides.exchange()
        mirrored(sides)
        assert due == MICRO and sides.b.balances()[0].free == CREDIT + MICRO

    play(scene)
    for journal in sides.journals.values():
        journal.close()
    assert not audit(sides.file(A)).problems and not audit(sides.file(B)).problems


def test_many_entries_share_a_transaction_and_a_snapshot_shortens_the_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wwwserve.serving.ledger.journaled_books.SNAPSHOT_EVERY", 500)
    sides = Sides("sqlite", tmp_path, exposure=CREDIT)
    writes: list[int] = []
    write = SqliteJournal.write

    def counted(self: SqliteJournal, bodies: list[bytes], *more: object) -> None:
        writes.append(len(bodies))
        write(self, bodies, *more)  # type: ignore[arg-type]

    async def scene() -> None:
        await sides.exchange()
        monkeypatch.setattr(SqliteJournal, "write", counted)
        running = [asyncio.create_task(each.run()) for each in (sides.a, sides.b)]

        async def one() -> None:
            id = sides.a.lock(B.name, terms_of(100), BODY)
            await sides.a.durable()
            sides.b.take(A.name, id, terms_of(100), BODY, PROMISE)
            sides.answered(id, 10)

        for _ in range(4):
            await asyncio.gather(*(one() for _ in range(250)))
        message = await sides.a.message(B.name)
        assert message is not None
        await sides.a.replied(B.name, await sides.b.received(A.name, message))
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    play(scene)
    assert sum(writes) > 4000 and len(writes) < 100
    mirrored(sides)
    for journal in sides.journals.values():
        journal.close()
    again = [SqliteJournal(sides.file(who), read_only=True) for who in (A, B)]
    for journal in again:
        snapshot = journal.snapshot()
        assert snapshot is not None and snapshot.number > 500
        journal.close()
    found = [audit(sides.file(who)) for who in (A, B)]
    assert not found[0].problems + found[1].problems + compare(*found) and settled(*found)
    sides.kill(A)
    sides.kill(B)
    mirrored(sides)
    for journal in sides.journals.values():
        journal.close()
    assert evidence(sides.file(B)) == []
