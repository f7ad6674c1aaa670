"""Spans on their way to the collector. That it takes none is said once, in words, and that it takes them again.

What OpenTelemetry itself logs of it, again and again and as libraries put it, goes nowhere.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from wwwserve.serving.plain import in_words

log = logging.getLogger("wwwserve.tracing")
PROCESSOR = "opentelemetry.sdk._shared_internal"  # the log of what calls an exporter


class SpansOut:
    """An exporter of OpenTelemetry's, which is called on a thread of its own."""

    def __init__(self, exporter: Any, endpoint: str) -> None:
        self._exporter, self._endpoint = exporter, endpoint
        self._away, self._lost = False, 0  # whether the collector takes none, and spans since then
        self._thread = 0
        self._logs = [logging.getLogger(name) for name in (type(exporter).__module__, PROCESSOR)]
        for each in self._logs:
            each.addFilter(self._keep)

    def export(self, spans: Sequence[Any]) -> Any:
        """Send them; returns how it went, as OpenTelemetry has it."""
        self._thread = threading.get_ident()
        result = self._exporter.export(spans)
        if result.name != "SUCCESS":
            self._trouble("it does not say why")
            self._lost += len(spans)
        elif self._away:
            log.info("the collector takes spans again", extra={"endpoint": self._endpoint, "lost": self._lost})
            self._away, self._lost = False, 0
        return result

    def _trouble(self, reason: str) -> None:
        if not self._away:
            self._away = True
            said = "the collector takes no spans, most are lost until it does"
            log.warning(said, extra={"endpoint": self._endpoint, "reason": reason})

    def shutdown(self) -> None:
        """Send nothing more; called when the thread has ended."""
        self._exporter.shutdown()
        for each in self._logs:
            each.removeFilter(self._keep)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing waits here."""
        return True

    def close(self) -> None:
        """Say nothing more."""
        self._away = True

    def _keep(self, record: logging.LogRecord) -> bool:
        """Whether what OpenTelemetry logs is to be seen: nothing of this exporter, as that is said here."""
        if record.levelno < logging.WARNING or record.thread != self._thread:
            return record.name != PROCESSOR or not self._away  # which says again and again that its queue is full
        args = record.args if isinstance(record.args, tuple) else ()
        errors = [each for each in args if isinstance(each, BaseException)]
        codes = [each for each in args if type(each) is int]
        if errors:
            self._trouble(in_words([*_causes(errors[0])][-1]))
        elif codes:
            self._trouble(f"it answers {codes[0]}")
        elif record.msg.startswith("Transient error %s") and args:
            self._trouble(f"it answers {args[0]!r}")
        else:
            self._trouble(record.getMessage())
        return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it came of: libraries put one into another."""
    found: Any = error
    for _ in range(8):
        yield found
        inner = [each for each in found.args if isinstance(each, BaseException)]
        found = getattr(found, "reason", None) or found.__cause__ or (inner[0] if inner else None)
        if not isinstance(found, BaseException):
            return
