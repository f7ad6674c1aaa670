"""Those who cheat in a channel, and the evidence of it."""

import msgspec
import numpy as np
import pytest
from duel_cases import staked
from ledger_sides import ANSWER, BODY, CREDIT, PROMISE, A, B, C, Sides, came, mirrored, play, terms_of, written

from wwwserve.agents.generator import make_generators
from wwwserve.agents.protocol import MICRO, draw_by_stake
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.channel_ledger import NOTHING, WHOLE
from wwwserve.serving.ledger.entries import Noted
from wwwserve.serving.ledger.exchange import Declined, Held, Vouching
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
from wwwserve.serving.ledger.verdicts import Conflict, Stake, Staked, decode
from wwwserve.serving.market import Promise


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


def test_a_prompt_that_is_much_longer_than_was_said_is_within_the_exposure(sides: Sides) -> None:
    tariff, said, long = (1000, 1000, 1000), 1000, 8_001_000  # tokens; 8 of 10 credits that are the exposure
    terms = Terms(tariff, said, 2 * MICRO // 1000)

    def take(prompt: int) -> int:
        id = sides.a.lock(B.name, terms, BODY)
        sides.b.take(A.name, id, terms, BODY, PROMISE, prompt=prompt)
        return id

    async def scene() -> None:
        sides.b.delivered(A.name, take(1282), served := Served(ANSWER, said, 0, 1, 1, WHOLE), 1001)  # a quarter, and 32
        assert sides.b.due_at_least(terms, PROMISE, served, 1, 1282) == 1001
        assert sides.b.due_at_least(terms, PROMISE, served, 1, 1283) == 1284  # all of it, from there on
        id = take(long)  # as it seems, while it runs
        with pytest.raises(LedgerError, match="more than"):
            take(2_000_000)
        sides.b.delivered(A.name, id, served, 1001)  # and was not
        id = take(said)
        sides.b.delivered(A.name, id, served, sides.b.due_at_least(terms, PROMISE, served, 1, 9_999_000))
        sides.b.flush()
        sides.kill(B)
        await sides.exchange()
        with pytest.raises(LedgerError, match="more than"):
            take(said)
        for id in sorted(sides.a.books.channels[B.name].open):
            sides.settle(id, served)
        await sides.exchange()
        channel = sides.b.books.channels[A.name]
        assert not channel.beyond and channel.short == 9_999_001 - 1001

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
