"""A journal whose entries are chained by their hashes: each has the digest of the one before and of its own content.

Whatever keeps it, a batch of entries is written whole or not at all, with the balances that they lead to, and is
durable when `write` returns. `SqliteJournal` keeps a file (WAL; `synchronous` is FULL, as a voucher that is sent and
then forgotten could be signed again with other content), `MemoryJournal` keeps nothing beyond the process.
"""

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

FORMAT = 2
GENESIS = b"\0" * 32  # digest before the first entry
BUSY_S = 5.0

SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
    "CREATE TABLE entries (number INTEGER PRIMARY KEY, body BLOB NOT NULL, digest BLOB NOT NULL) STRICT",
    # What the two of a channel own together is what they were granted, and nobody owns less than nothing.
    "CREATE TABLE balances (peer TEXT PRIMARY KEY, opened INTEGER NOT NULL,"
    " free INTEGER NOT NULL CHECK (free >= 0), escrow INTEGER NOT NULL CHECK (escrow >= 0),"
    " peer_free INTEGER NOT NULL CHECK (peer_free >= 0), peer_escrow INTEGER NOT NULL CHECK (peer_escrow >= 0),"
    " CHECK (free + escrow + peer_free + peer_escrow = opened)) STRICT, WITHOUT ROWID",
    "CREATE TABLE snapshot (one INTEGER PRIMARY KEY CHECK (one = 1), number INTEGER NOT NULL, body BLOB NOT NULL)"
    " STRICT",
)


class JournalError(ValueError):
    """A file that is no journal, or not this node's; the message says why."""


class Full(Exception):
    """The disk takes no more entries; what was to be written is not, and may be tried again."""


class Balance(NamedTuple):
    """What the two of a channel own, as its owner sees it, in micro-credits."""

    peer: str
    opened: int  # what they were granted together
    free: int
    escrow: int
    peer_free: int
    peer_escrow: int


class Entry(NamedTuple):
    """One entry, as it is kept."""

    number: int
    body: bytes
    digest: bytes


class Snapshot(NamedTuple):
    """What the entries up to `number` lead to."""

    number: int
    body: bytes


class Journal(Protocol):
    """What a ledger asks of whatever keeps it."""

    last: int  # number of the last entry

    def write(self, bodies: Sequence[bytes], balances: Sequence[Balance], snapshot: bytes | None = None) -> None:
        """Append entries; durable on return. Raises Full, and then nothing of it is written."""

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """All entries after a number."""

    def balances(self) -> list[Balance]:
        """Of all channels."""

    def snapshot(self) -> Snapshot | None:
        """The last one that was written."""

    def reader(self) -> "Journal":
        """What is written so far, to read it in another thread; to be closed."""

    def close(self) -> None:
        """Use it no more."""


def chained(digest: bytes, body: bytes) -> bytes:
    """Digest of an entry after one with `digest`."""
    return hashlib.sha256(digest + body).digest()


class MemoryJournal:
    """A journal for trials."""

    def __init__(self) -> None:
        self.last, self.digest = 0, GENESIS
        self._entries: list[Entry] = []
        self._balances: dict[str, Balance] = {}
        self._snapshot: Snapshot | None = None

    def write(self, bodies: Sequence[bytes], balances: Sequence[Balance], snapshot: bytes | None = None) -> None:
        """See `Journal`."""
        for body in bodies:
            self.last, self.digest = self.last + 1, chained(self.digest, body)
            self._entries.append(Entry(self.last, body, self.digest))
        for each in balances:
            if min(each[2:]) < 0 or sum(each[2:]) != each.opened:
                raise JournalError(f"credit is not conserved: {each}")
            self._balances[each.peer] = each
        if snapshot is not None:
            self._snapshot = Snapshot(self.last, snapshot)

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """See `Journal`."""
        yield from self._entries[after:]

    def balances(self) -> list[Balance]:
        """See `Journal`."""
        return [self._balances[name] for name in sorted(self._balances)]

    def snapshot(self) -> Snapshot | None:
        """See `Journal`."""
        return self._snapshot

    def reader(self) -> "MemoryJournal":
        """See `Journal`."""
        return self

    def close(self) -> None:
        """See `Journal`."""


class SqliteJournal:
    """A journal in a file of its own."""

    def __init__(self, path: Path, owner: str = "", *, read_only: bool = False, max_pages: int = 0) -> None:
        """Open or make the journal of `owner`. `max_pages` bounds the file, 0 does not. Raises JournalError."""
        self.path = path
        if read_only and not path.is_file():
            raise JournalError(f"{path}: no journal that can be used: there is no such file")
        try:
            where = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            self._db = sqlite3.connect(where, uri=True, isolation_level=None, timeout=BUSY_S, check_same_thread=False)
            if not read_only:
                self._prepare(owner, max_pages)
            meta = dict(self._db.execute("SELECT key, value FROM meta"))
            last = self._db.execute("SELECT number, digest FROM entries ORDER BY number DESC LIMIT 1").fetchone()
        except sqlite3.Error as error:
            raise JournalError(f"{path}: no journal that can be used: {error}") from None
        if meta.get("format") != str(FORMAT):
            raise JournalError(f"{path}: format is {meta.get('format')!r}, expected {FORMAT}")
        self.owner = meta.get("owner", "")
        if owner and self.owner != owner:
            raise JournalError(f"{path}: is the journal of {self.owner}, not of {owner}")
        self.last, self.digest = (int(last[0]), bytes(last[1])) if last else (0, GENESIS)

    def _prepare(self, owner: str, max_pages: int) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        if max_pages:
            self._db.execute(f"PRAGMA max_page_count = {max_pages:d}")
        if not self._db.execute("SELECT 1 FROM sqlite_schema").fetchone():
            with self._transaction():
                for each in SCHEMA:
                    self._db.execute(each)
                self._db.executemany("INSERT INTO meta VALUES (?, ?)", [("format", str(FORMAT)), ("owner", owner)])

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db)

    def write(self, bodies: Sequence[bytes], balances: Sequence[Balance], snapshot: bytes | None = None) -> None:
        """See `Journal`. Raises JournalError for balances that do not add up."""
        number, digest = self.last, self.digest
        rows = []
        for body in bodies:
            number, digest = number + 1, chained(digest, body)
            rows.append((number, body, digest))
        try:
            with self._transaction():
                self._db.executemany("INSERT INTO entries VALUES (?, ?, ?)", rows)
                self._db.executemany("INSERT OR REPLACE INTO balances VALUES (?, ?, ?, ?, ?, ?)", balances)
                if snapshot is not None:
                    self._db.execute("INSERT OR REPLACE INTO snapshot VALUES (1, ?, ?)", (number, snapshot))
        except sqlite3.IntegrityError as error:
            raise JournalError(f"{self.path}: credit is not conserved: {error}") from None
        except (sqlite3.Error, OSError) as error:
            raise Full(f"{self.path}: {error}") from None
        self.last, self.digest = number, digest

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """See `Journal`."""
        found = self._db.execute("SELECT number, body, digest FROM entries WHERE number > ? ORDER BY number", (after,))
        for number, body, digest in found:
            yield Entry(number, body, digest)

    def balances(self) -> list[Balance]:
        """See `Journal`."""
        return [Balance(*row) for row in self._db.execute("SELECT * FROM balances ORDER BY peer")]

    def snapshot(self) -> Snapshot | None:
        """See `Journal`."""
        row = self._db.execute("SELECT number, body FROM snapshot").fetchone()
        return Snapshot(*row) if row else None

    def reader(self) -> "SqliteJournal":
        """See `Journal`."""
        return SqliteJournal(self.path, self.owner, read_only=True)

    def damage(self) -> list[str]:
        """What SQLite itself finds wrong with the file, and whether its tables are those of a journal."""
        found = [str(row[0]) for row in self._db.execute("PRAGMA integrity_check")]
        made = [row[0] for row in self._db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")]
        if sorted(made) != sorted(SCHEMA):
            found.append("the tables are not those of a journal")
        return [each for each in found if each != "ok"]

    def close(self) -> None:
        """See `Journal`."""
        self._db.close()


class _Transaction:
    """All of what is done in it, or nothing."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._roll_back()  # what could not be before, as the disk was full
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            try:
                self._db.execute("COMMIT")
                return
            except sqlite3.Error:
                self._roll_back()
                raise
        self._roll_back()

    def _roll_back(self) -> None:
        if self._db.in_transaction:  # SQLite itself has rolled back some errors
            self._db.execute("ROLLBACK")
