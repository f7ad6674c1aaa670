"""Books that are kept in a journal: entries take effect at once, and are written in batches by another thread."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import msgspec

from wwwserve.serving.ledger.channel import Books
from wwwserve.serving.ledger.entries import Event
from wwwserve.serving.ledger.journal import Balance, Full, Journal
from wwwserve.serving.ledger.statements import (
    decode,
)

log = logging.getLogger("wwwserve.ledger")

RETRY_S = 0.5  # between two tries to write to a disk that is full
SNAPSHOT_EVERY = 20_000  # entries


class JournaledBooks:
    """The books of a node, and the entries of them that are not written yet."""

    def __init__(self, name: str, journal: Journal) -> None:
        self.name, self.journal = name, journal
        self.books = Books(name)
        self.changed: set[str] = set()  # peers with whom something changed, for whoever looks and takes them out
        self.full = ""  # why nothing can be written now
        self._batch: list[Event] = []
        self._touched: set[str] = set()
        self._added = self._written = journal.last
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._work = asyncio.Event()
        self._snapshot_at = 0

    def _read(self) -> None:
        """Come to what the journal says. Raises StatementError and LedgerError for one that cannot be."""
        snapshot = self.journal.snapshot()
        if snapshot is not None:
            self.books.load(snapshot.body)
            self._snapshot_at = snapshot.number
        for entry in self.journal.entries(self._snapshot_at):
            self.books.apply(decode(entry.body, Event))

    def _add(self, event: Event) -> None:
        self.books.apply(event)
        self._batch.append(event)
        self._touched.add(event.peer)
        self.changed.add(event.peer)
        self._added += 1
        self._work.set()

    def flush(self) -> None:
        """Write all that was done, at once. Raises Full."""
        batch = self._take_batch()
        try:
            self._write(*batch)
        except Full as reason:
            self._put_back(*batch, reason)
            raise
        self._wrote(len(batch[0]))

    async def run(self) -> None:
        """Write what is done, until cancelled; then what is left."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "ledger") as thread:
            while True:
                try:
                    await self._work.wait()
                except asyncio.CancelledError:
                    self._put_back([], [], None, Full("the node stops"))
                    raise
                batch = self._take_batch()
                writing = loop.run_in_executor(thread, self._write, *batch)
                try:
                    await asyncio.shield(writing)
                except asyncio.CancelledError:
                    await self._finish(writing, batch)
                    raise
                except Full as reason:
                    self._put_back(*batch, reason)
                    await asyncio.sleep(RETRY_S)
                else:
                    self._wrote(len(batch[0]))

    def close(self) -> None:
        """Write what is left, and the journal is done."""
        try:
            self.flush()
        except Full as reason:
            log.error("the ledger ends and its last entries cannot be written", extra={"reason": str(reason)})
        self.journal.close()

    async def _finish(
        self, writing: "asyncio.Future[None]", batch: tuple[list[Event], list[Balance], bytes | None]
    ) -> None:
        """What is being written when the node stops; nothing is durable after, until `close`."""
        try:
            await writing
            self._wrote(len(batch[0]))
        except Full as reason:
            self._put_back(*batch, reason)
        self.full = self.full or "the node stops"
        self._put_back([], [], None, Full(self.full))

    def _take_batch(self) -> tuple[list[Event], list[Balance], bytes | None]:
        self._work.clear()
        batch, self._batch = self._batch, []
        balances = [c.balance(peer) for peer, c in self.books.channels.items() if peer in self._touched]
        self._touched = set()
        snapshot = None
        if self._added - self._snapshot_at >= SNAPSHOT_EVERY:
            self._snapshot_at, snapshot = self._added, self.books.encode()
        return batch, balances, snapshot

    def _write(self, batch: list[Event], balances: list[Balance], snapshot: bytes | None) -> None:
        if batch:
            self.journal.write([msgspec.json.encode(event) for event in batch], balances, snapshot)

    def _put_back(self, batch: list[Event], balances: list[Balance], snapshot: bytes | None, reason: Full) -> None:
        if not self.full and batch:
            log.error("the ledger cannot be written, so nothing is delegated", extra={"reason": str(reason)})
        self.full = str(reason)
        self.changed.update(self.books.channels)
        self._batch = batch + self._batch
        self._touched |= {each.peer for each in balances}
        if snapshot is not None:
            self._snapshot_at -= SNAPSHOT_EVERY
        self._work.set()
        waiting, self._waiting = self._waiting, []
        for _, future in waiting:
            if not future.done():
                future.set_exception(Full(self.full))

    def _wrote(self, count: int) -> None:
        if self.full and count:
            log.info("the ledger can be written again")
            self.full = ""
            self.changed.update(self.books.channels)
        self._written += count
        still = []
        for number, future in self._waiting:
            if number > self._written:
                still.append((number, future))
            elif not future.done():
                future.set_result(None)
        self._waiting = still

    async def durable(self) -> None:
        """Until all that was done is written. Raises Full where it cannot be."""
        if self._written >= self._added:
            return
        if self.full:
            raise Full(self.full)
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((self._added, future))
        await future

    def _check_writable(self) -> None:
        if self.full:
            raise Full(self.full)
