"""Requests between nodes, signed: who sends it, to whom, when, under which number, and of what bytes.

A request carries in one header `FROM TO TO_RUN TIME RUN NUMBER DIGEST SIGNATURE`. The signature, Ed25519, is over all
of it, the path, and every other header `x-wwwserve-...`. It is checked before any of the body is read, and the body
against its digest. The head of an answer is bound to its request by a code under a key that only the two nodes can
make, which costs a thirtieth of a signature and its check.

A node numbers what it sends to each other one, from its start on, its run. The other remembers which of the last
`WINDOW` numbers of that run it has seen: so much memory for each peer, whatever a peer sends. It is told to which of
its own runs a request is addressed, so that nothing that was sent before it started is taken.
"""

import hmac
import logging
import re
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

from wwwserve.serving.http.keys import KEYS_KEPT, Identity, signature_of, tagged, verify

log = logging.getLogger("wwwserve.signed")

SIGNATURE = "x-wwwserve-signature"
PREFIX = b"x-wwwserve-"  # of the headers that are signed
SKEW_S = 30.0  # that a message may be from before or after the time here
WINDOW = 1 << 14  # numbers, back from the highest seen, of which it is known whether they were
LOG_EVERY_S = 10.0  # at most, of refusals of one kind

_SIGNATURE = SIGNATURE.encode()
_DIGITS = rb"(0|[1-9]\d{0,15})"
_CLAIM = re.compile(rb"([\w-]{43}) ([\w-]{43}) %b %b %b %b ([\w-]{43})" % ((_DIGITS,) * 4))


class Refused(ValueError):
    """A message that is not taken: of a kind, for counts, and a message that says why."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Refusals:
    """Refused messages: counted each, logged so that nobody can fill a disk with them."""

    def __init__(self, count: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._count, self._clock = count, clock
        self._logged_s: dict[str, float] = {}  # by kind

    def __call__(self, refused: Refused) -> None:
        """A message was refused."""
        self._count(refused.kind)
        now_s = self._clock()
        if now_s - self._logged_s.get(refused.kind, -LOG_EVERY_S) >= LOG_EVERY_S:
            self._logged_s[refused.kind] = now_s
            log.warning("a message is refused", extra={"kind": refused.kind, "reason": str(refused)})


def check_time(sent_s: float, now_s: float) -> None:
    """Raises Refused for what was not signed about now."""
    late_s = now_s - sent_s
    if abs(late_s) > SKEW_S:
        side = "before" if late_s > 0 else "after"
        raise Refused(
            "stale",
            f"it was signed {abs(late_s):.1f} s {side} the time here, at most {SKEW_S:g} are allowed: "
            "it was kept back, or one of the two clocks is off",
        )


class Claim(NamedTuple):
    """A request whose signature is good, of bytes that are still to come."""

    sender: str
    digest: bytes
    signature: bytes

    def check(self, body: bytes) -> None:
        """Raises Refused for another body than what was signed."""
        if digest(body) != self.digest:
            raise Refused("altered", "the body is not what was signed")


class _Window:
    """Numbers of one run of a peer."""

    def __init__(self, run: int) -> None:
        self.run, self.highest, self.last_s = run, -1, 0.0
        self._seen = bytearray(WINDOW)

    def new(self, number: int) -> bool:
        """Whether this one was not seen yet, as far as that is known."""
        return number > self.highest or (number > self.highest - WINDOW and not self._seen[number % WINDOW])

    def see(self, number: int, sent_s: float) -> None:
        """It was."""
        if number - self.highest >= WINDOW:
            self._seen = bytearray(WINDOW)
        else:
            for skipped in range(self.highest + 1, number):
                self._seen[skipped % WINDOW] = 0
        self._seen[number % WINDOW] = 1
        self.highest, self.last_s = max(self.highest, number), max(self.last_s, sent_s)


class Messages:
    """What one run of a node sends to its peers and gets from them.

    `knows` says who is a peer, so that a stranger costs nothing; it is to be true of a bounded number of names.
    """

    def __init__(
        self, identity: Identity, knows: Callable[[str], bool], clock: Callable[[], float] = time.time
    ) -> None:
        self.identity, self.name, self.knows, self.clock = identity, identity.name, knows, clock
        self.run = round(clock() * 1e6)
        self._numbers: dict[str, int] = {}  # of the next message to each,
        self._first = 0  # and of the first one to others: above all that were forgotten
        self._windows: dict[str, _Window] = {}
        self._forgotten: set[str] = set()  # whose windows are still needed

    def sign(self, to: str, to_run: int, path: str, terms: Mapping[str, str], body: bytes) -> str:
        """The header SIGNATURE of a request with the other headers `terms`, all in lower case."""
        number = self._numbers.get(to, self._first)
        self._numbers[to] = number + 1
        claim = f"{self.name} {to} {to_run} {round(self.clock() * 1e3)} {self.run} {number} {digest(body).decode()}"
        terms_ = [(name.encode(), value.encode()) for name, value in terms.items() if name.startswith("x-wwwserve-")]
        signature = self.identity.sign(tagged("request", _content(claim.encode(), path, terms_)))
        return f"{claim} {urlsafe_b64encode(signature).decode()}"

    def forget(self, name: str) -> None:
        """A name is no peer's any more; its numbers are kept as long as what it signed could be sent again."""
        self._first = max(self._first, self._numbers.pop(name, 0))
        self._forgotten.add(name)
        now_s = self.clock()
        for each in list(self._forgotten):
            window = self._windows.get(each)
            if self.knows(each) or window is None or now_s - window.last_s > 2 * SKEW_S:
                self._forgotten.remove(each)
                if not self.knows(each):
                    self._windows.pop(each, None)

    def open(
        self, path: str, headers: Iterable[tuple[bytes, bytes]], admit: Callable[[str], None] = lambda sender: None
    ) -> Claim:  # fmt: skip
        """A request that came, once its signature is found good; `admit` may refuse before to check one of a sender.
        Raises Refused."""
        terms = [(name, value) for name, value in headers if name.startswith(PREFIX)]
        sealed = [value for name, value in terms if name == _SIGNATURE]
        if len(sealed) != 1:
            raise Refused("unsigned", f"expected one header {SIGNATURE}, got {len(sealed)}")
        claim, _, signature = sealed[0].rpartition(b" ")
        claimed = _CLAIM.fullmatch(claim)
        if claimed is None or len(signature) != 88:
            raise Refused("malformed", f"{SIGNATURE} is not FROM TO TO_RUN TIME RUN NUMBER DIGEST SIGNATURE")
        sender, to = claimed[1].decode(), claimed[2].decode()
        to_run, time_ms, run, number = (int(each) for each in claimed.group(3, 4, 5, 6))
        if to != self.name:
            raise Refused("misaddressed", "it is addressed to another node")
        if not self.knows(sender):
            raise Refused("stranger", f"{sender} is no peer of this node")
        now_s, sent_s = self.clock(), time_ms / 1e3
        check_time(sent_s, now_s)
        if to_run != self.run:
            raise Refused("misaddressed", "it is addressed to an earlier run of this node")
        window = self._window(sender, run, number, now_s)
        admit(sender)
        try:
            verify(
                sender,
                tagged("request", _content(claim, path, [each for each in terms if each[0] != _SIGNATURE])),
                signature_of(signature),
            )
        except ValueError as error:
            raise Refused("forged", str(error)) from None
        window.see(number, sent_s)
        self._windows[sender] = window
        return Claim(sender, claimed[7], signature)

    def _window(self, sender: str, run: int, number: int, now_s: float) -> _Window:
        """Where the number belongs. Raises Refused if it was there already."""
        window = self._windows.get(sender)
        if window is None or run > window.run:
            return _Window(run)
        if run < window.run:
            # All of an earlier run is stale by then, so this is a later one by a clock that was set back.
            if now_s - window.last_s > SKEW_S:
                return _Window(run)
            raise Refused("replayed", "it is of an earlier run of its sender")
        if not window.new(number):
            raise Refused("replayed", f"its number {number} was seen already, or it is far behind")
        return window

    def sign_answer(self, claim: Claim, terms: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The header SIGNATURE of an answer with the headers `terms`."""
        return _code(self.identity, claim.sender, claim.signature, terms)

    def salt(self, origin: str, asked: object) -> str:
        """For what `origin` asks under a salt of its own, or none: a name that nobody but the two nodes can make."""
        own = asked if isinstance(asked, str) else ""
        return sha256(tagged("cache-salt", _key(self.identity, origin) + own.encode(errors="replace"))).hexdigest()[:32]

    def check_answer(self, sender: str, sealed: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises Refused unless `sender` answers with these headers to the request that had the header `sealed`."""
        terms = [(name.lower(), value) for name, value in headers if name.lower().startswith(PREFIX)]
        codes = [value for name, value in terms if name == _SIGNATURE]
        due = _code(
            self.identity, sender, sealed.rpartition(" ")[2].encode(),
            [each for each in terms if each[0] != _SIGNATURE],
        )  # fmt: skip
        if len(codes) != 1 or not hmac.compare_digest(codes[0], due):
            raise Refused("forged", "the head of the answer is not signed by whom was asked")


def digest(body: bytes) -> bytes:
    """SHA-256, base64url without padding."""
    return urlsafe_b64encode(sha256(body).digest())[:43]


def _content(claim: bytes, path: str, terms: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"\n".join([path.encode(), claim, *(b"%b:%b" % each for each in sorted(terms))])


def _code(identity: Identity, other: str, request: bytes, terms: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Of the head of an answer, for the signature of a request."""
    content = b"\n".join([request, *(b"%b:%b" % each for each in sorted(terms))])
    return urlsafe_b64encode(hmac.digest(_key(identity, other), tagged("answer", content), "sha256"))


@lru_cache(maxsize=KEYS_KEPT)
def _key(identity: Identity, other: str) -> bytes:
    return sha256(tagged("answer-key", identity.shared(other))).digest()
