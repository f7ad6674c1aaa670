"""Peers that fail are left alone for a while, longer each time in a row, and then tried again."""

from collections.abc import Callable
from dataclasses import dataclass

FAILURES = 3  # in a row, after which a peer is left alone
COOL_S = 2.0  # for the first time; twice as long each further time in a row
MOST_COOL_S = 60.0


@dataclass(slots=True)
class _Record:
    failures: int = 0  # since it answered last
    times: int = 0  # that it was left alone since then
    until_s: float = 0.0


class Cooling:
    """The peers of one node, by name."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: dict[str, _Record] = {}

    def failed(self, name: str, retry_after_s: float | None = None) -> float | None:
        """A request was not answered as it should have been; `retry_after_s` if the peer said when to come again.

        Returns until when it is to be left alone if that begins now. What was asked before counts once.
        """
        record, now_s = self._records.setdefault(name, _Record()), self._clock()
        if now_s < record.until_s:
            return None
        record.failures += 1
        if record.failures < FAILURES and retry_after_s is None:
            return None
        for_s = COOL_S * 2.0 ** min(record.times, 10)
        record.times += 1
        record.until_s = now_s + min(max(for_s, retry_after_s or 0.0), MOST_COOL_S)
        return record.until_s

    def answered(self, name: str) -> None:
        """It did what it was asked to."""
        self._records.pop(name, None)

    def forget(self, name: str) -> None:
        """Nothing is kept of a peer."""
        self._records.pop(name, None)

    def left_s(self, name: str) -> float:
        """For how long it is still left alone; 0 if it is not."""
        record = self._records.get(name)
        return max(0.0, record.until_s - self._clock()) if record is not None else 0.0
