"""One contract for every ledger, two nodes at a time."""

import contextlib
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_sides import (
    ANSWER,
    BODY,
    CREDIT,
    PROMISE,
    SLACK_MS,
    A,
    B,
    C,
    Sides,
    came,
    mirrored,
    play,
    terms_of,
    written,
)

from wwwserve.agents.protocol import LATENESS, MICRO, PER_REQUEST, QUOTED, price_of
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.channel_ledger import NOTHING, PART, WHOLE, ChannelLedger, Grant, most_of
from wwwserve.serving.ledger.exchange import Ask, Declined, Message, Open
from wwwserve.serving.ledger.journal import MemoryJournal
from wwwserve.serving.ledger.statements import NOTHING_CAME, Served, Terms


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
        with pytest.raises(LedgerError, match="opens a channel on other terms"):
            await generous.replied(B.name, await sides.b.received(A.name, message))
        assert sides.own() == before

    play(scene)


def test_who_is_declined_a_channel_is_told_the_terms_of_the_other() -> None:
    async def scene() -> None:
        a = ChannelLedger(
            A, MemoryJournal(), {B.name: Grant(6 * MICRO, 7 * MICRO, "limits")}, {}, exposure=1, payment=0
        )
        b = ChannelLedger(
            B, MemoryJournal(), {A.name: Grant(8_500_000, 6 * MICRO, "limits")}, {}, exposure=1, payment=0
        )
        message = await a.message(B.name)
        assert message is not None
        with pytest.raises(LedgerError, match=r"it begins with 6 credits for you and 8\.5 for this node, by limits"):
            await a.replied(B.name, await b.received(A.name, message))
        assert not a.balances() and not b.balances()

    play(scene)


def test_who_opens_a_channel_as_it_was_asked_to_asks_nothing_before_the_other_has_it(tmp_path: Path) -> None:
    """Else the other, to whom the answer is on its way, declines, and is not told anything for two seconds."""

    async def scene() -> None:
        async def said(one: ChannelLedger, other: ChannelLedger) -> bytes:
            message = await written(one, one.message(other.name))
            assert message is not None
            kinds.append(type(msgspec.json.decode(message, type=Message)))
            answer: bytes = await written(other, other.received(one.name, message))
            return answer

        for comes_first in (False, True):
            sides, kinds = Sides("memory", tmp_path), list[type]()
            on_its_way = await said(sides.a, sides.b)
            if comes_first:
                await written(sides.a, sides.a.replied(B.name, on_its_way))
                await written(sides.a, sides.a.replied(B.name, await said(sides.a, sides.b)))
            else:
                await written(sides.b, sides.b.replied(A.name, await said(sides.b, sides.a)))
            await written(sides.b, sides.b.replied(A.name, await said(sides.b, sides.a)))
            if not comes_first:
                await written(sides.a, sides.a.replied(B.name, on_its_way))
            assert kinds == ([Open, Ask, Ask] if comes_first else [Open, Open, Ask])
            await sides.exchange()
            assert sides.a.is_reconciled(B.name) and sides.b.is_reconciled(A.name)
            mirrored(sides)

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


def test_nothing_is_kept_of_strangers_that_ask_what_is_known_of_them(sides: Sides) -> None:
    async def scene() -> None:
        asked = msgspec.json.encode(Ask(0, 0))
        for k in range(50):
            with pytest.raises(LedgerError):
                await sides.a.received(f"{k:043d}", asked)
        before = sides.a.asked[B.name]
        await sides.a.received(B.name, asked)
        assert sides.a.asked == {B.name: before + 1}

    play(scene)
