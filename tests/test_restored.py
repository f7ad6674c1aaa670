"""A journal that is put back from an old copy: its node finds out from its peers what it signed since, and goes on."""

import asyncio
import contextlib
import random
import shutil
from pathlib import Path

import msgspec
import pytest
from ledger_sides import BODY, CREDIT, PROMISE, A, B, Sides, came, mirrored, play, terms_of, written

from wwwserve.agents.protocol import MICRO
from wwwserve.serving.ledger.audit import audit, compare, settled
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.exchange import Ask, Known
from wwwserve.serving.ledger.journal import SqliteJournal
from wwwserve.serving.ledger.statements import NOTHING_CAME, PART, StatementError, digest


class Copied(Sides):
    """Two sides, of whom one can be put back to an old copy of its journal."""

    def copy(self, who: object, name: str = "old") -> None:
        self.close(who)
        for file in self.folder.glob("*.db*"):
            if file.name.startswith(self.file(who).name):  # type: ignore[arg-type]
                shutil.copy(file, self.folder / f"{name}-{file.name}")
        self.open(who)

    def put_back(self, who: object, copy: str = "old") -> None:
        self.close(who)
        name = self.file(who).name  # type: ignore[arg-type]
        for file in self.folder.glob(f"{name}*"):
            file.unlink()
        for file in self.folder.glob(f"{copy}-{name}*"):
            shutil.copy(file, self.folder / file.name.removeprefix(f"{copy}-"))
        self.open(who)

    def close(self, who: object) -> None:
        ledger = self.a if who is A else self.b
        ledger.flush()
        self.journals[ledger.name].close()

    def open(self, who: object) -> None:
        if who is A:
            self.a = self.start(A)
        else:
            self.b = self.start(B)

    def agree(self) -> None:
        for ledger in (self.a, self.b):
            ledger.flush()
            self.journals[ledger.name].close()
        found = [audit(self.file(who)) for who in (A, B)]
        assert not found[0].problems + found[1].problems + compare(*found) and settled(*found)


@pytest.mark.parametrize("empty", [False, True])
def test_a_payer_takes_over_what_it_signed_since_and_is_not_accused(tmp_path: Path, empty: bool) -> None:
    async def scene() -> None:
        sides = Copied("sqlite", tmp_path)
        if empty:
            sides.copy(A)
        await sides.exchange()
        sides.paid(100, 200)
        await sides.exchange()
        for one, other in ((sides.a, sides.b), (sides.b, sides.a)):
            staked = await written(one, one.restake(3 * MICRO))
            assert staked is not None and other.heard(one.name, msgspec.json.encode(staked))
        if not empty:
            sides.copy(A)
            await sides.exchange()
        sides.paid(300)
        await sides.exchange()
        sides.paid(400, 500)
        await sides.exchange()
        staked = await written(sides.a, sides.a.restake(2 * MICRO))
        assert staked is not None and sides.b.heard(A.name, msgspec.json.encode(staked))
        forgotten = sides.a.lock(B.name, terms_of(), BODY)  # B has it when A is put back
        sides.b.take(A.name, forgotten, terms_of(), BODY, PROMISE)
        sides.a.advance(B.name, forgotten, PROMISE, came(250, PART), 1000)
        await sides.exchange()
        sides.delivered(forgotten, NOTHING_CAME)
        sides.b.flush()
        sides.put_back(A)
        assert sides.a.available(B.name) == 0
        with pytest.raises(LedgerError, match=r"has not told yet|no channel"):
            sides.a.lock(B.name, terms_of(), BODY)
        assert await sides.a.restake(MICRO) is None
        await sides.exchange()
        mirrored(sides)
        assert sides.a.balances()[0].free == CREDIT - 1750 * MICRO // 1000 == sides.b.balances()[0].peer_free
        again = await written(sides.a, sides.a.restake(MICRO))
        assert again is not None and again.stake.number > staked.stake.number
        assert sides.b.heard(A.name, msgspec.json.encode(again)) and sides.b.stakes.stake(A.name) == MICRO
        assert sides.ask() > forgotten
        sides.delivered(forgotten + 1, came(600))
        sides.settle(forgotten + 1, came(600))
        await sides.exchange()
        mirrored(sides)
        assert not sides.b.stakes.slashes and not sides.b.books.channels[A.name].conflict
        sides.agree()

    play(scene)


@pytest.mark.parametrize("more", [0, 3])
def test_a_payer_put_back_to_two_copies_takes_over_what_its_peer_has_of_either(tmp_path: Path, more: int) -> None:
    """The later copy has a voucher that never came; of its number another was signed after the earlier was put back."""

    async def scene() -> None:
        sides = Copied("sqlite", tmp_path)
        await sides.exchange()
        sides.copy(B)
        await sides.exchange()
        sides.paid(100)
        await sides.exchange()
        sides.copy(A, "early")
        await sides.exchange()
        sides.paid(200, *[50] * more)
        assert await written(sides.a, sides.a.message(B.name))
        sides.copy(A, "late")
        sides.put_back(A, "early")
        await sides.exchange()
        sides.paid(300)
        await sides.exchange()
        sides.put_back(A, "late")
        assert sides.a.books.channels[B.name].vouched[0] == 2 + more
        await sides.exchange()
        mirrored(sides)
        assert sides.a.balances()[0].free == CREDIT - 400 * MICRO // 1000
        sides.paid(500)
        await sides.exchange()
        mirrored(sides)
        assert not sides.b.stakes.slashes and not sides.b.books.channels[A.name].conflict
        sides.agree()
        sides.open(A)
        sides.put_back(B)  # and it is told again what it is paid by the chain that it has
        await sides.exchange()
        mirrored(sides)
        assert not sides.b.stakes.slashes and sides.a.balances()[0].free == CREDIT - 900 * MICRO // 1000
        sides.agree()

    play(scene)


def test_a_request_that_is_open_in_one_copy_is_not_the_one_of_its_id_that_was_paid_in_another(tmp_path: Path) -> None:
    async def scene() -> None:
        sides = Copied("sqlite", tmp_path)
        await sides.exchange()
        sides.copy(A, "early")
        await sides.exchange()
        lost = sides.a.lock(B.name, terms_of(MICRO // 4), digest(b"one that did not come"))
        sides.copy(A, "late")
        sides.put_back(A, "early")
        await sides.exchange()
        id = sides.ask()
        sides.answered(id, 900)
        await sides.exchange()
        sides.put_back(A, "late")
        await sides.exchange()
        mirrored(sides)
        assert id == lost and sides.a.balances()[0].free == CREDIT - 900 * MICRO // 1000
        sides.agree()

    play(scene)


@pytest.mark.parametrize("seed", [*range(8), 63, 84])
def test_a_payer_put_back_to_any_copy_at_any_time_signs_no_number_twice(tmp_path: Path, seed: int) -> None:
    """Copies are taken and put back as the dice have it; requests of the one copy and of another share their ids."""

    async def scene() -> None:
        dice, sides, copies = random.Random(seed), Copied("sqlite", tmp_path), list[str]()
        await sides.exchange()
        for step in range(80):
            what = dice.choice(("answer", "refuse", "open", "lose", "sign", "exchange", "exchange", "copy", "put back"))
            if what in ("answer", "refuse", "open", "lose") and sides.a.available(B.name) >= MICRO:
                body, terms = digest(bytes([step])), terms_of(MICRO // dice.choice((1, 2, 4)))
                id = sides.a.lock(B.name, terms, body)
                if what == "refuse":
                    sides.a.free(B.name, id)
                if what in ("refuse", "lose"):  # it did not come, or was not taken
                    continue
                sides.b.take(A.name, id, terms, body, PROMISE)
                if dice.random() < 0.3:
                    sides.a.advance(B.name, id, PROMISE, came(20, PART), 1000)
                sides.delivered(id, NOTHING_CAME)
                if what == "answer":
                    sides.settle(id, came(dice.randrange(20, 1000)))
            elif what == "sign":
                await written(sides.a, sides.a.message(B.name))
            elif what == "exchange":
                sides.b._reconciler._recalled_s.clear()  # as if half a minute had gone by
                await sides.exchange()
            elif what == "copy":
                copies.append(f"copy-{step}")
                if dice.random() < 0.5:
                    await written(sides.a, sides.a.message(B.name))
                sides.copy(A, copies[-1])
            elif what == "put back" and copies:
                sides.put_back(A, dice.choice(copies))
        sides.close(A)
        sides.open(A)
        sides.b._reconciler._recalled_s.clear()
        await sides.exchange()
        mirrored(sides)
        assert not sides.b.books.channels[A.name].taken and not sides.a.books.channels[B.name].open
        assert not sides.b.stakes.slashes and not sides.b.books.channels[A.name].conflict
        sides.agree()

    play(scene)


def test_a_payee_is_told_again_what_it_earned(tmp_path: Path) -> None:
    async def scene() -> None:
        sides = Copied("sqlite", tmp_path)
        await sides.exchange()
        sides.paid(100)
        await sides.exchange()
        sides.copy(B)
        await sides.exchange()
        sides.paid(200)
        await sides.exchange()
        sides.paid(300)
        await sides.exchange()
        earned = sides.b.balances()[0].free
        sides.put_back(B)
        assert sides.b.balances()[0].free == earned - MICRO // 2
        with pytest.raises(LedgerError, match="has not told yet"):
            sides.ask()
        for id in list(sides.a.books.channels[B.name].open):
            sides.settle(id, NOTHING_CAME, None)
        await sides.exchange()
        assert sides.b.balances()[0].free == earned
        mirrored(sides)
        sides.paid(400)
        await sides.exchange()
        mirrored(sides)
        sides.agree()

    play(scene)


def test_each_forgets_a_part_and_both_come_to_the_same(tmp_path: Path) -> None:
    async def scene() -> None:
        sides = Copied("sqlite", tmp_path)
        await sides.exchange()
        sides.paid(100)
        await sides.exchange()
        sides.copy(A)
        await sides.exchange()
        sides.paid(200)
        await sides.exchange()
        id = sides.b.lock(A.name, terms_of(), BODY)
        sides.a.take(B.name, id, terms_of(), BODY, PROMISE)
        sides.a.delivered(B.name, id, came(700), 0)
        sides.b.settle(A.name, id, PROMISE, came(700), 1000)
        await sides.exchange()
        sides.put_back(A)
        await sides.exchange()
        mirrored(sides)
        assert sides.a.balances()[0].free == CREDIT - 3 * MICRO // 10 + 7 * MICRO // 10
        sides.agree()

    play(scene)


def test_what_a_peer_says_it_knows_is_believed_only_as_far_as_it_was_signed(tmp_path: Path) -> None:
    async def scene() -> None:
        sides = Copied("sqlite", tmp_path)
        await sides.exchange()
        sides.copy(A)
        await sides.exchange()
        sides.paid(100, 200)
        await sides.exchange()
        sides.put_back(A)
        ask = await sides.a.message(B.name)
        assert ask is not None and msgspec.json.decode(ask, type=Ask).number == 0
        known = msgspec.json.decode(await written(sides.b, sides.b.received(A.name, ask)), type=Known)
        with pytest.raises(LedgerError, match="not looked for now"):  # as all of a journal is read
            await written(sides.b, sides.b.received(A.name, ask))
        vouch = known.vouches[0]
        dearer = msgspec.structs.replace(vouch.receipts[0], due=vouch.receipts[0].due + 1)
        forged = msgspec.structs.replace(vouch.voucher.state, total=vouch.voucher.state.total + 1)
        for bad, error in (
            (msgspec.structs.replace(vouch, receipts=(dearer, *vouch.receipts[1:])), LedgerError),
            (msgspec.structs.replace(vouch, receipts=vouch.receipts[1:]), LedgerError),
            (
                msgspec.structs.replace(vouch, voucher=msgspec.structs.replace(vouch.voucher, state=forged)),
                StatementError,
            ),
        ):
            told = msgspec.json.encode(msgspec.structs.replace(known, vouches=(bad,)))
            with pytest.raises(error):
                await written(sides.a, sides.a.replied(B.name, told))
        with pytest.raises(LedgerError, match="were asked"):
            told = msgspec.json.encode(msgspec.structs.replace(known, vouches=(), asked=1 << 62))
            await written(sides.a, sides.a.replied(B.name, told))
        assert not sides.a.is_reconciled(B.name)
        await written(sides.a, sides.a.replied(B.name, msgspec.json.encode(known)))
        assert sides.a.is_reconciled(B.name)
        await sides.exchange()
        mirrored(sides)
        sides.agree()

    play(scene)


def test_a_payer_that_starts_anew_pays_nothing_again_that_its_peer_forgot(tmp_path: Path) -> None:
    async def scene() -> None:
        sides = Copied("sqlite", tmp_path)
        await sides.exchange()
        id = sides.ask()
        sides.delivered(id, came(100))
        sides.copy(B)
        await sides.exchange()
        sides.settle(id, came(100))
        sides.paid(200)
        await sides.exchange()
        sides.put_back(B)
        sides.close(A)
        sides.open(A)
        for _ in range(2):
            await sides.exchange()
        mirrored(sides)
        assert not sides.b.books.channels[A.name].taken and sides.b.balances()[0].free == CREDIT + 300 * MICRO // 1000
        sides.agree()

    play(scene)


def test_a_payer_that_starts_anew_tells_again_what_it_was_about_to(tmp_path: Path) -> None:
    """Its peer asks but once in a run what it forgot."""

    async def scene() -> None:
        sides = Copied("sqlite", tmp_path)
        await sides.exchange()
        id = sides.ask()
        sides.delivered(id, came(100))
        sides.copy(B)
        await sides.exchange()
        sides.settle(id, came(100))
        await sides.exchange()
        sides.put_back(B)
        ask = await written(sides.b, sides.b.message(A.name))
        await written(sides.b, sides.b.replied(A.name, await written(sides.a, sides.a.received(B.name, ask))))
        assert sides.b.is_reconciled(A.name) and sides.b.books.channels[A.name].taken
        sides.close(A)
        sides.open(A)
        await sides.exchange()
        mirrored(sides)
        assert sides.b.balances()[0].free == CREDIT + 100 * MICRO // 1000
        assert await sides.a.message(B.name) is None and await sides.b.message(A.name) is None
        sides.agree()

    play(scene)


def test_what_one_paid_out_of_what_the_other_paid_is_told_again_in_that_order(tmp_path: Path) -> None:
    """Each has only what it was given, and gives it back, again and again; then one of them forgets all of it."""

    async def scene() -> None:
        sides = Copied("sqlite", tmp_path, credit=2 * MICRO)
        await sides.exchange()
        sides.copy(A)
        await sides.exchange()
        for k in range(6):
            payer, payee = (sides.a, sides.b) if k % 2 == 0 else (sides.b, sides.a)
            terms = terms_of(price=2 * MICRO if k == 0 else 4 * MICRO, amount=2 * MICRO if k == 0 else 4 * MICRO)
            id = payer.lock(payee.name, terms, BODY)
            payee.take(payer.name, id, terms, BODY, PROMISE)
            payee.delivered(payer.name, id, came(1000), 0)
            assert payer.settle(payee.name, id, PROMISE, came(1000), 1000) == terms.amount
            await sides.exchange()
        sides.put_back(A)
        for _ in range(10):
            sides.b._reconciler._recalled_s.clear()  # as if half a minute had gone by
            for one, other in ((sides.a, sides.b), (sides.b, sides.a)):
                message = await written(one, one.message(other.name))
                if message is not None:
                    with contextlib.suppress(LedgerError):
                        await written(
                            one, one.replied(other.name, await written(other, other.received(one.name, message)))
                        )
        mirrored(sides)
        assert sides.a.balances()[0].free == 4 * MICRO and sides.a.is_reconciled(B.name)
        sides.agree()

    play(scene)


def test_a_request_that_was_forgotten_is_paid_of_what_others_leave_in_escrow(tmp_path: Path) -> None:
    async def scene() -> None:
        sides = Copied("sqlite", tmp_path, exposure=20 * MICRO, credit=12 * MICRO)
        await sides.exchange()
        terms = terms_of(price=6 * MICRO, amount=6 * MICRO)
        kept = sides.ask(terms)
        sides.copy(B)
        await sides.exchange()
        forgotten = sides.ask(terms)
        sides.put_back(B)
        await sides.exchange()
        assert sides.settle(forgotten, came(1000)) == 6 * MICRO
        sides.settle(kept, NOTHING_CAME, None)
        more = sides.ask(terms)  # of what the one that came to nothing has left
        await sides.exchange()
        sides.answered(more, 1000)
        await sides.exchange()
        mirrored(sides)
        assert sides.b.balances()[0].free == 24 * MICRO
        sides.agree()

    play(scene)


def test_a_stake_that_none_but_an_absent_peer_remembers_is_not_contradicted(tmp_path: Path) -> None:
    async def scene() -> None:
        sides = Copied("sqlite", tmp_path)
        await sides.exchange()
        sides.copy(A)
        await sides.exchange()
        forgotten = await written(sides.a, sides.a.restake(3 * MICRO))
        assert sides.b.heard(A.name, msgspec.json.encode(forgotten))
        sides.put_back(A)
        sides.a._reconciler.done.add("another peer")
        for amount in (2 * MICRO, MICRO):
            again = await written(sides.a, sides.a.restake(amount))
            sides.b.heard(A.name, msgspec.json.encode(again))
        assert not sides.b.stakes.slashes and sides.b.stakes.stake(A.name) == MICRO
        sides.agree()

    play(scene)


def test_a_conflict_is_noted_once_however_often_it_comes(tmp_path: Path) -> None:
    """As where a node goes on from a copy beside the one that it is of."""

    async def scene() -> None:
        sides = Copied("sqlite", tmp_path)
        await sides.exchange()
        sides.copy(A)
        await sides.exchange()
        sides.paid(100)
        first = await written(sides.a, sides.a.message(B.name))
        twin = SqliteJournal(sides.file(A).with_name("old-a.db"), A.name)
        sides.journals["twin"] = twin
        other = type(sides.a)(A, twin, sides.a.grants, {}, exposure=sides.exposure, payment=sides.payment)
        other._reconciler.done.add(B.name)
        id = other.lock(B.name, terms_of(), BODY)
        other.settle(B.name, id, PROMISE, came(1), 1000)
        second = await written(other, other.message(B.name))
        assert first is not None and second is not None
        await written(sides.b, sides.b.received(A.name, first))
        entries = []
        for _ in range(20):
            await written(sides.b, sides.b.received(A.name, second))
            entries.append(sides.journals[B.name].last)
        assert entries[0] == entries[-1] and sides.b.books.channels[A.name].conflict
        await asyncio.sleep(0)
        for journal in sides.journals.values():
            journal.close()

    play(scene)
