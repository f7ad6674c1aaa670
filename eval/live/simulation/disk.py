"""A disk in memory, which outlives the node that writes on it, and can be full, slow to sync, or torn by a crash."""

from collections.abc import Sequence
from typing import NamedTuple

from wwwserve.serving.ledger.journal import Balance, Full, JournalError, MemoryJournal


class Batch(NamedTuple):
    """What one write holds."""

    bodies: tuple[bytes, ...]
    balances: tuple[Balance, ...]
    snapshot: bytes | None


class MemoryDisk:
    """The disk of one node, with its journal."""

    def __init__(self) -> None:
        self.owner = ""
        self.free_bytes: int | None = None  # for entries; None without a bound
        self.lies = False  # whether it says that a write is durable when it is not, until `sync`
        self.batches: list[Batch] = []
        self.durable = 0  # of them
        self.life = 0  # of the node; handles of an earlier one write nothing

    def journal(self, owner: str) -> "DiskJournal":
        """Open or make the journal of `owner`. Raises JournalError if it is someone else's."""
        if self.owner and owner != self.owner:
            raise JournalError(f"it is the journal of {self.owner}, not of {owner}")
        self.owner = owner
        return DiskJournal(self)

    def sync(self) -> None:
        """Make durable what is written."""
        self.durable = len(self.batches)

    def crash(self, *, keep: int = 0, torn: bool = False) -> None:
        """The node dies. Of the writes that are not durable the first `keep` are there, the others lost; of what is
        left, if it is torn, the last write is not, durable or not: of a write that is cut anywhere SQLite finds by its
        checksums that it is not whole, and takes nothing of it."""
        self.batches = self.batches[: self.durable + keep]
        if torn and self.batches:
            self.batches.pop()
        self.sync()
        self.life += 1


class DiskJournal(MemoryJournal):
    """A `serving.ledger.journal.Journal` on such a disk."""

    def __init__(self, disk: MemoryDisk) -> None:
        super().__init__()
        for batch in disk.batches:
            super().write(*batch)
        self.owner = disk.owner
        self._disk, self._life = disk, disk.life

    def write(self, bodies: Sequence[bytes], balances: Sequence[Balance], snapshot: bytes | None = None) -> None:
        """See `serving.ledger.journal.Journal`."""
        disk = self._disk
        if self._life != disk.life:
            raise Full("the node that opened this journal is dead")
        size = sum(len(body) for body in bodies)
        if disk.free_bytes is not None and size > disk.free_bytes:
            raise Full(f"{size} bytes do not fit, {disk.free_bytes} are free")
        super().write(bodies, balances, snapshot)
        if disk.free_bytes is not None:
            disk.free_bytes -= size
        disk.batches.append(Batch(tuple(bodies), tuple(balances), snapshot))
        if not disk.lies:
            disk.sync()
