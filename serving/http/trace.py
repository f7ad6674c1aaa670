"""By what a request is known along its way: an id for people, and the trace context of W3C for programs.

Both are the user's if it gives them, else made here, and go to the own engine and back to the user. A peer gets the
trace alone, in a header that is signed; its engine gets that, and no id that somebody else chose.
"""

import random
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from wwwserve.serving.tracing import Span

REQUEST_ID, TRACEPARENT, TRACESTATE = "x-request-id", "traceparent", "tracestate"
PEER_TRACE = "x-wwwserve-trace"  # between nodes

_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_PARENT = re.compile(rb"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_STATE = re.compile(rb"[ -~]{1,512}")


class Trace(NamedTuple):
    """What a request is known by."""

    request_id: str = ""
    parent: str = ""  # `traceparent` of https://www.w3.org/TR/trace-context/, version 00
    state: str = ""  # `tracestate`, which only the own engine gets
    span: "Span | None" = None  # that it is in, if it is traced; `parent` is of it then

    def child(self, name: str, kind: str) -> "Trace":
        """It within a span of its own, as `serving.tracing.Span.child` has it; the same where it is not traced."""
        if self.span is None:
            return self
        span = self.span.child(name, kind)
        return self._replace(parent=span.traceparent, span=span)

    def for_engine(self) -> dict[str, str]:
        """Headers for the own engine."""
        given = ((REQUEST_ID, self.request_id), (TRACEPARENT, self.parent), (TRACESTATE, self.state))
        return {name: value for name, value in given if value}

    def for_peer(self) -> dict[str, str]:
        """Headers for a peer."""
        return {PEER_TRACE: self.parent} if self.parent else {}

    def for_user(self) -> list[tuple[bytes, bytes]]:
        """Headers of the answer."""
        return [(REQUEST_ID.encode(), self.request_id.encode()), (TRACEPARENT.encode(), self.parent.encode())]


NO_TRACE = Trace()


def trace_of(headers: Mapping[bytes, bytes]) -> Trace:
    """Of a user's request. What is not well formed is left out, as the specification wants it."""
    id, parent = headers.get(b"x-request-id", b""), headers.get(b"traceparent", b"")
    known = _PARENT.fullmatch(parent)
    state = headers.get(b"tracestate", b"") if known else b""
    if known is None:
        ids = random.getrandbits(192)  # which have to differ, and are no secret
        parent = b"00-%032x-%016x-00" % (ids >> 64, ids & 0xFFFF_FFFF_FFFF_FFFF)
    return Trace(
        id.decode() if _ID.fullmatch(id) else parent[3:35].decode(),
        parent.decode(),
        state.decode() if _STATE.fullmatch(state) else "",
    )


def trace_of_peer(headers: Mapping[bytes, bytes]) -> Trace:
    """Of a peer's request: its ids, and not whether the peer wants it traced."""
    parent = headers.get(PEER_TRACE.encode(), b"")
    return Trace("", parent[:-2].decode() + "00") if _PARENT.fullmatch(parent) else NO_TRACE
