"""Credit that is added to a channel: both sign it, it is added once, and nothing that breaks off makes or loses any."""

import contextlib
import random
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_sides import CREDIT, A, B, C, Sides, dealt, mirrored, play, terms_of, written
from test_restored import Copied

from wwwserve.agents.protocol import MICRO
from wwwserve.serving import cli
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.audit import audit, compare, settled
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.channel_ledger import ChannelLedger, Grant
from wwwserve.serving.ledger.entries import Refilled
from wwwserve.serving.ledger.exchange import Answer, Ask, Declined, Known, Message, Open, Refilling
from wwwserve.serving.ledger.journal import SqliteJournal
from wwwserve.serving.ledger.journaled_books import JournaledBooks
from wwwserve.serving.ledger.statements import Agreed, Opening, Refill, StatementError, sign


class Growing(Copied):
    """Two sides with limits that are raised: `limits` by name, what that one may come to owe and what the other may."""

    limits: Mapping[str, tuple[int, int]] = MappingProxyType({})
    later: tuple[Grant, ...] = ()

    def grant(self, who: Identity) -> Grant:
        own, other = self.limits.get(who.name, (self.credit, self.credit))
        return Grant(own, other, "limits", self.later)

    def raised(self, who: Identity, own: int, other: int) -> None:
        """The operator of one side changes its limits and starts it anew."""
        self.limits = {**self.limits, who.name: (own, other)}
        for each in (self.a, self.b):
            each.flush()
        self.kill(who)

    def both_raised(self, a: int, b: int) -> None:
        self.raised(A, a, b)
        self.raised(B, b, a)

    async def tell(self, one: ChannelLedger, other: ChannelLedger, *, heard: bool = True) -> bytes | None:
        """What one has to say is received; what that is answered is heard, or lost."""
        message: bytes | None = await written(one, one.message(other.name))
        if message is not None:
            answer = await written(other, other.received(one.name, message))
            if heard:
                await written(one, one.replied(other.name, answer))
        return message


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    return Growing("sqlite", tmp_path)


def test_a_channel_whose_one_side_has_spent_all_goes_on_when_both_raise_its_limit(growing: Growing) -> None:
    async def scene() -> None:
        sides = growing
        await sides.exchange()
        for _ in range(10):
            sides.answered(sides.ask(terms_of(10 * MICRO, 10 * MICRO)), 1000)
            await sides.exchange()
        assert sides.a.available(B.name) == 0 and sides.own()[0].free == 0
        sides.both_raised(CREDIT + 5 * MICRO, CREDIT)
        await sides.exchange()
        mirrored(sides)
        assert sides.own()[0].free == 5 * MICRO == sides.a.available(B.name)
        assert sides.own()[1].free == 2 * CREDIT
        assert [balance.opened for balance in sides.own()] == [2 * CREDIT + 5 * MICRO] * 2
        sides.answered(sides.ask(terms_of(5 * MICRO, 5 * MICRO)), 1000)
        await sides.exchange()
        mirrored(sides)
        sides.agree()

    play(scene)


def test_only_a_refill_that_was_proposed_can_be_declined_and_a_reason_is_bounded(growing: Growing) -> None:
    """Else each answer of a peer would be taken for the end of an exchange, and the next begin at once."""

    async def scene() -> None:
        sides = growing
        await sides.exchange()
        declined = [msgspec.json.encode(each) for each in (Declined("no" * 500, 1), Declined("no", closed=True))]
        for answer in declined:
            with pytest.raises(LedgerError, match="declines: no") as refused:
                await sides.a.replied(B.name, answer)
            assert len(str(refused.value)) < 400
        sides.raised(A, 2 * CREDIT, CREDIT)
        sides.a.refills.look(B.name, knows=True)
        await sides.a.replied(B.name, declined[0])
        assert len(sides.a.refills.declined[B.name]) == 256
        with pytest.raises(LedgerError, match="declines: no"):
            await sides.a.replied(B.name, declined[0])

    play(scene)


def test_nothing_is_added_until_both_want_it_and_never_taken_back(growing: Growing) -> None:
    async def scene() -> None:
        sides = growing
        await sides.exchange()
        sides.raised(A, 2 * CREDIT, CREDIT)
        await sides.exchange()
        assert sides.own()[0].opened == 2 * CREDIT and "other here" in sides.a.refills.declined[B.name]
        sides.answered(sides.ask(), 1000)  # what is owed is told all the same
        await sides.exchange()
        mirrored(sides)
        sides.raised(B, CREDIT, 3 * CREDIT)
        await sides.exchange()
        assert sides.own()[0].opened == 2 * CREDIT
        sides.raised(A, 3 * CREDIT, CREDIT)
        await sides.exchange()
        mirrored(sides)
        assert sides.own()[0].free == 3 * CREDIT - MICRO
        assert not sides.a.refills.declined and not sides.b.refills.declined
        sides.both_raised(CREDIT, 2 * CREDIT)  # lower for the one: it keeps what it has
        await sides.exchange()
        mirrored(sides)
        assert sides.own()[0].opened == 5 * CREDIT
        sides.agree()

    play(scene)


def test_what_is_granted_later_is_added_one_after_the_other(tmp_path: Path) -> None:
    async def scene() -> None:
        sides = Growing("sqlite", tmp_path)
        sides.later = (Grant(2 * CREDIT, 2 * CREDIT, "first"), Grant(3 * CREDIT, 3 * CREDIT, "second"))
        sides.kill(A)
        await sides.exchange()
        assert sides.own()[0].opened == 2 * CREDIT  # B knows of none
        sides.later = sides.later[:1]
        sides.kill(B)
        await sides.exchange()
        assert [each.opened for each in sides.own()] == [4 * CREDIT] * 2
        sides.later = (*sides.later, Grant(3 * CREDIT, 3 * CREDIT, "second"))
        sides.kill(B)
        await sides.exchange()
        mirrored(sides)
        assert [each.opened for each in sides.own()] == [6 * CREDIT] * 2
        kept = sides.a.books.channels[B.name].refills
        assert [(each.refill.number, each.refill.source) for each in kept] == [(1, "first"), (2, "second")]
        sides.agree()

    play(scene)


@pytest.mark.parametrize("dies", ["neither", "proposer", "other", "both"])
@pytest.mark.parametrize("step", ["before", "told", "answered"])
def test_a_refill_that_breaks_off_anywhere_is_added_once_on_both_sides(growing: Growing, dies: str, step: str) -> None:
    async def scene() -> None:
        sides = growing
        await sides.exchange()
        sides.both_raised(CREDIT + MICRO, CREDIT + 2 * MICRO)
        for one, other in ((sides.a, sides.b), (sides.b, sides.a)):
            await sides.tell(one, other)  # they ask what each knows
        if step != "before":
            message = await sides.tell(sides.a, sides.b, heard=step == "answered")
            assert message is not None and isinstance(msgspec.json.decode(message, type=Message), Refilling)
        assert len(sides.b.books.channels[A.name].refills) == (step != "before")
        assert len(sides.a.books.channels[B.name].refills) == (step == "answered")
        if dies in ("proposer", "both"):
            sides.kill(A)
        if dies in ("other", "both"):
            sides.kill(B)
        await sides.exchange()
        mirrored(sides)
        assert [each.opened for each in sides.own()] == [2 * CREDIT + 3 * MICRO] * 2
        sides.agree()

    play(scene)


@pytest.mark.parametrize("who", [A, B])
@pytest.mark.parametrize("lowered", [False, True])
def test_one_that_is_put_back_learns_from_the_other_what_was_added_and_what_it_paid_of_it(
    growing: Growing, who: Identity, lowered: bool
) -> None:
    sides = growing

    async def pay(times: int) -> None:
        for _ in range(times):
            sides.answered(sides.ask(terms_of(10 * MICRO, 10 * MICRO)), 1000)
            await sides.exchange()

    async def scene() -> None:
        await sides.exchange()
        await pay(8)
        sides.copy(who)
        await sides.exchange()
        sides.both_raised(2 * CREDIT, CREDIT + MICRO)
        await sides.exchange()
        await pay(7)  # more than it began with
        if lowered:
            sides.limits = {}  # as of an old node.yaml
        sides.put_back(who)
        assert not (sides.a if who is A else sides.b).balances()[0].opened > 2 * CREDIT
        for _ in range(3):
            with contextlib.suppress(LedgerError):
                await sides.exchange()
        mirrored(sides)
        assert sides.own()[0].free == 2 * CREDIT - 150 * MICRO
        sides.agree()

    play(scene)


def test_who_lost_its_journal_and_has_other_limits_now_finds_the_channel_that_there_is(growing: Growing) -> None:
    async def scene() -> None:
        sides = growing
        sides.copy(B)  # with nothing in it
        await sides.exchange()
        sides.answered(sides.ask(), 1000)
        await sides.exchange()
        sides.limits = {A.name: (2 * CREDIT, CREDIT), B.name: (CREDIT, 2 * CREDIT)}
        sides.put_back(B)
        for least in (Opening(*names(), *amounts(3 * CREDIT, CREDIT), "s"), Opening(*names(), 0, 0, "s" * 999)):
            answer = msgspec.json.encode(Open(least, sign(A, "opening", least)))
            with pytest.raises(LedgerError, match="other terms"):
                await written(sides.b, sides.b.replied(A.name, answer))
        await sides.exchange()
        sides.kill(A)
        await sides.exchange()
        mirrored(sides)
        assert sides.own()[0].free == 2 * CREDIT - MICRO
        sides.agree()

    play(scene)


def names() -> tuple[str, str]:
    return min(A.name, B.name), max(A.name, B.name)


def test_a_refill_that_is_replayed_changed_or_of_another_channel_adds_nothing(growing: Growing) -> None:
    async def scene() -> None:
        sides = growing
        await sides.exchange()
        sides.both_raised(2 * CREDIT, CREDIT)
        for one, other in ((sides.a, sides.b), (sides.b, sides.a)):
            await sides.tell(one, other)
        body = await sides.tell(sides.a, sides.b, heard=False)
        assert body is not None
        sent = msgspec.json.decode(body, type=Message)
        assert isinstance(sent, Refilling)
        first = await written(sides.b, sides.b.received(A.name, body))
        assert first == await written(sides.b, sides.b.received(A.name, body))
        assert sides.own()[1].opened == 3 * CREDIT
        sides.limits = {A.name: (3 * CREDIT, CREDIT), B.name: (CREDIT, 3 * CREDIT)}
        sides.kill(B)
        await sides.tell(sides.b, sides.a)
        digest = sides.b.books.channels[A.name].digest
        for refill, said in (
            (Refill(digest, 1, 3 * CREDIT, CREDIT, "limits"), "other credit was added"),
            (Refill(digest, 3, *amounts(3 * CREDIT, CREDIT), "limits"), "other here"),
            (Refill(digest, 0, *amounts(3 * CREDIT, CREDIT), "limits"), "other credit was added"),
            (Refill("0" * 64, 2, *amounts(3 * CREDIT, CREDIT), "limits"), "other here"),
            (Refill(digest, 2, *amounts(CREDIT, CREDIT), "limits"), "other here"),
            (Refill(digest, 2, *amounts(9 * CREDIT, CREDIT), "limits"), "other here"),
            (Refill(digest, 2, *amounts(3 * CREDIT, CREDIT), "genesis"), "other here"),
        ):
            answer = msgspec.json.decode(await told(sides, refill, A), type=Answer)
            assert isinstance(answer, Declined) and said in answer.reason, refill
        good = Refill(digest, 2, *amounts(3 * CREDIT, CREDIT), "limits")
        for who in (B, C):
            with pytest.raises(StatementError, match="signed"):
                await told(sides, good, who)
        assert sides.own()[1].opened == 3 * CREDIT
        # An answer that adds something else than what was proposed.
        for answer in (Refilling(good, ""), Refilling(msgspec.structs.replace(good, number=7), "")):
            with pytest.raises((LedgerError, StatementError)):
                await written(sides.a, sides.a.replied(B.name, msgspec.json.encode(answer)))
        with pytest.raises(LedgerError, match="no channel"):
            await sides.b.received(C.name, msgspec.json.encode(Refilling(good, "")))

    play(scene)


def amounts(of_a: int, of_b: int) -> tuple[int, int]:
    return (of_a, of_b) if A.name < B.name else (of_b, of_a)


def granted_at_most(sides: Sides, of_a: int, of_b: int) -> None:
    """By either's account all that was granted is with one of the two, and it is no more than that."""
    for ledger in (sides.a, sides.b):
        for balance in ledger.balances():
            [channel] = ledger.books.channels.values()
            assert sum(balance[2:]) == balance.opened == sum(channel.granted) and min(balance[2:]) >= 0
            assert all(got <= wanted for got, wanted in zip(channel.granted, amounts(of_a, of_b), strict=True))


async def told(sides: Sides, refill: Refill, signer: Identity) -> bytes:
    message = msgspec.json.encode(Refilling(refill, sign(signer, "refill", refill)))
    answer: bytes = await written(sides.b, sides.b.received(A.name, message))
    return answer


def test_what_a_peer_says_was_added_is_believed_if_both_signed_it(growing: Growing) -> None:
    async def scene() -> None:
        sides = growing
        await sides.exchange()
        sides.raised(A, CREDIT, CREDIT)
        digest = sides.b.books.channels[A.name].digest
        refill = Refill(digest, 1, CREDIT, 9 * CREDIT, "limits")
        alone = sign(B, "refill", refill)
        for one, other in ((alone, alone), ("", alone), (sign(A, "opening", refill), alone)):
            agreed = Agreed(refill, *((one, other) if A.name < B.name else (other, one)))
            known = Known((), 0, (), "", (agreed,))
            with pytest.raises(StatementError, match="a refill that"):
                await written(sides.a, sides.a.replied(B.name, msgspec.json.encode(known)))
        assert not sides.a.is_reconciled(B.name) and sides.own()[0].opened == 2 * CREDIT

    play(scene)


def test_a_peer_of_the_release_before_is_sent_no_refill(growing: Growing) -> None:
    """Whose messages and answers do not say how many it has, and which does not know that one."""

    async def scene() -> None:
        sides = growing
        await sides.exchange()
        sides.both_raised(2 * CREDIT, CREDIT)
        ask = msgspec.json.decode(await written(sides.b, sides.b.message(A.name)))
        assert ask["type"] == "ask"
        del ask["refills"]
        answer = await written(sides.a, sides.a.received(B.name, msgspec.json.encode(ask)))
        known = msgspec.json.decode(answer)
        await written(sides.b, sides.b.replied(A.name, answer))
        del known["refills"]
        await written(sides.a, sides.a.message(B.name))
        await written(sides.a, sides.a.replied(B.name, msgspec.json.encode(known)))
        assert sides.a.is_reconciled(B.name) and not sides.a.has_to_tell(B.name)
        assert await sides.a.message(B.name) is None
        sides.answered(sides.ask(), 1000)
        await sides.tell(sides.a, sides.b)
        assert sides.own()[1].opened == 2 * CREDIT and sides.a.books.channels[B.name].acked == 1

    play(scene)


def test_an_ask_of_the_release_before_is_read() -> None:
    assert msgspec.json.decode(b'{"type":"ask","number":1,"paid_number":2,"version":3}', type=Ask).refills is None


def test_a_refill_in_a_journal_is_shown_verified_and_not_forged(
    growing: Growing, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wwwserve.serving.ledger.journaled_books.SNAPSHOT_EVERY", 3)

    async def scene() -> None:
        await growing.exchange()
        growing.both_raised(2 * CREDIT, CREDIT)
        await growing.exchange()
        for _ in range(3):
            growing.answered(growing.ask(), 1000)
            await growing.exchange()
        growing.agree()

    play(scene)
    files = [str(growing.file(who)) for who in (A, B)]
    assert cli.main(["ledger", "verify", *files]) == 0
    assert cli.main(["ledger", "show", files[0]]) == 0
    assert "granted  200.000000, the peer 100.000000, with 1 refills" in capsys.readouterr().out
    journal = SqliteJournal(growing.file(A), A.name)
    channel = audit(growing.file(A)).books.channels[B.name]
    assert journal.snapshot() is not None
    good = Refill(channel.digest, 2, *amounts(3 * CREDIT, CREDIT), "limits")
    signed = [sign(who, "refill", good) for who in sorted((A, B), key=lambda each: each.name)]
    for bad in (Agreed(good, signed[0], signed[0]), Agreed(msgspec.structs.replace(good, number=3), *signed)):
        journal.write([msgspec.json.encode(Refilled(B.name, bad))], [])
    journal.close()
    problems = audit(growing.file(A)).problems
    assert len(problems) == 2 and all("is said to have signed" in each for each in problems)


def test_a_snapshot_that_the_release_before_wrote_is_what_the_entries_come_to(growing: Growing) -> None:
    async def scene() -> None:
        await growing.exchange()
        growing.answered(growing.ask(), 1000)
        await growing.exchange()
        growing.a.flush()
        channels, statements = msgspec.json.decode(growing.a.books.encode())
        for each in channels.values():
            assert [each.pop(name) for name in ("refills", "leaving_ms", "ended", "unpaid")] == [[], 0, None, 0]
        growing.journals[A.name].write([], [], msgspec.json.encode((channels, statements)))
        growing.kill(A)
        await growing.exchange()
        mirrored(growing)
        growing.agree()
        growing.open(A)
        for damaged in (b"[{}, 5]", msgspec.json.encode(({}, statements))):
            growing.journals[A.name].write([], [], damaged)
            problems = audit(growing.file(A)).problems
            assert len(problems) == 1 and "is not what the entries come to" in problems[0]

    play(scene)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_credit_is_what_was_granted_through_whatever_is_paid_added_lost_and_forgotten(seed: int) -> None:
    async def scene() -> None:
        dice, sides = random.Random(seed), Growing("memory", Path(), exposure=30 * MICRO, credit=20 * MICRO)
        most = [20 * MICRO, 20 * MICRO]
        for _ in range(60):
            one, other = (sides.a, sides.b) if dice.random() < 0.5 else (sides.b, sides.a)
            act = dice.random()
            if act < 0.3 and other.is_reconciled(one.name) and other.name in one.books.channels:
                amount = min(dice.randrange(6 * MICRO), one.available(other.name))
                with contextlib.suppress(LedgerError):
                    dealt(one, other, amount)
                for id in list(one.books.channels[other.name].open):
                    one.free(other.name, id)  # it was not taken
            elif act < 0.75:
                with contextlib.suppress(LedgerError):
                    await sides.tell(one, other, heard=dice.random() < 0.7)
            elif act < 0.85:
                most = [each + dice.randrange(10 * MICRO) for each in most]
                who = dice.choice((A, B))
                sides.raised(who, *(most if who is A else most[::-1]))
            else:
                if dice.random() < 0.5:  # else what was done last is lost
                    one.flush()
                sides.kill(A if one is sides.a else B)
            granted_at_most(sides, *most)
        sides.both_raised(*most)
        for _ in range(40):
            for one, other in ((sides.a, sides.b), (sides.b, sides.a)):
                one._reconciler._recalled_s.clear()  # as if half a minute had gone by
                with contextlib.suppress(LedgerError):
                    await sides.tell(one, other)
        mirrored(sides)
        assert sum(each.free for each in sides.own()) == sum(most)
        for peer, ledger in ((B, sides.a), (A, sides.b)):
            assert isinstance(ledger, JournaledBooks) and ledger.books.channels[peer.name].granted == amounts(*most)

    play(scene)


def test_two_journals_with_different_refills_are_told_apart(tmp_path: Path) -> None:
    async def scene(folder: Path, raised: int) -> None:
        folder.mkdir()
        sides = Growing("sqlite", folder)
        await sides.exchange()
        sides.both_raised(raised, CREDIT)
        await sides.exchange()
        sides.agree()

    for name, raised in (("one", 2 * CREDIT), ("other", 3 * CREDIT)):
        play(lambda name=name, raised=raised: scene(tmp_path / name, raised))  # type: ignore[misc]
    found = audit(tmp_path / "one" / "a.db"), audit(tmp_path / "other" / "b.db")
    assert "added different credit" in compare(*found)[0] and not settled(*found)
