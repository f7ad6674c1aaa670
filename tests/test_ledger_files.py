"""What only a ledger in a file has: it is verified, and what is damaged, or does not fit, is found."""

import asyncio
import contextlib
import random
import sqlite3
from pathlib import Path

import pytest
from ledger_sides import BODY, CREDIT, PROMISE, A, B, Sides, mirrored, play, terms_of, written

from wwwserve.agents.protocol import MICRO
from wwwserve.serving import cli
from wwwserve.serving.ledger.audit import audit, compare, evidence, settled
from wwwserve.serving.ledger.journal import Balance, Full, JournalError, SqliteJournal


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


def test_a_write_that_is_cut_anywhere_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """As after a power cut: SQLite takes no part of it, and nothing before it is lost."""
    file, copy = tmp_path / "a.db", tmp_path / "copy.db"
    wal, copied = file.with_name("a.db-wal"), copy.with_name("copy.db-wal")
    journal, ends, rows = SqliteJournal(file, A.name), [], []
    for k in range(4):
        journal.write([b"%d %d" % (k, j) * 700 for j in range(3)], [Balance(B.name, 10, k, 0, 10 - k, 0)])
        ends.append(wal.stat().st_size)
        rows.append((journal.last, journal.balances()))
    whole, main = wal.read_bytes(), file.read_bytes()
    draw = random.Random(3)
    for cut in [*ends, *(draw.randrange(ends[0], ends[-1]) for _ in range(60))]:
        torn = whole[:cut] + (b"" if cut % 2 else draw.randbytes(len(whole) - cut))  # shorter, or with old bytes after
        copy.write_bytes(main)
        copied.write_bytes(torn)
        again = SqliteJournal(copy, A.name)
        assert (again.last, again.balances()) == rows[sum(end <= cut for end in ends) - 1] and not again.damage()
        again.write([b"more"], [])
        assert [entry.number for entry in again.entries()] == list(range(1, again.last + 1))
        again.close()
    journal.close()


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
