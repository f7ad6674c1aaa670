"""Signed requests: taken once, by whom they are for, from whom they are from, and about when they were signed."""

import logging
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import LOG_EVERY_S, SIGNATURE, SKEW_S, WINDOW, Messages, Refusals, Refused

PATH = "/peer/v1/completions"
TERMS = {"content-type": "application/json", "x-wwwserve-prompt": "12"}
BODY = b'{"model": "m"}'


@dataclass
class Clock:
    now_s: float = 1e9

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Pair:
    """Two nodes that know each other, on clocks of their own."""

    clock: Clock = field(default_factory=Clock)
    other: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.one = Messages(Identity.generate(), lambda name: True, self.clock)
        self.two = Messages(Identity.generate(), lambda name: name == self.one.name, self.other)

    def sealed(self, terms: dict[str, str] = TERMS, body: bytes = BODY) -> str:
        return self.one.sign(self.two.name, self.two.run, PATH, terms, body)


def raw(terms: dict[str, str], sealed: str) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in {**terms, SIGNATURE: sealed}.items()]


def refused(pair: Pair, headers: list[tuple[bytes, bytes]], path: str = PATH) -> tuple[str, str]:
    with pytest.raises(Refused) as found:
        pair.two.open(path, headers)
    return found.value.kind, str(found.value)


def test_a_request_is_taken_with_its_sender_and_body() -> None:
    pair = Pair()
    claim = pair.two.open(PATH, raw(TERMS, pair.sealed()))
    claim.check(BODY)
    assert claim.sender == pair.one.name
    with pytest.raises(Refused, match="body is not what was signed") as found:
        claim.check(BODY + b" ")
    assert found.value.kind == "altered"


def change(part: int, to: Callable[[str], str]) -> Callable[[str], str]:
    def changed(sealed: str) -> str:
        parts = sealed.split(" ")
        return " ".join([*parts[:part], to(parts[part]), *parts[part + 1 :]])

    return changed


@pytest.mark.parametrize("part", [3, 4, 5, 6, 7])
def test_whatever_is_altered_on_the_way_is_forged(part: int) -> None:
    pair = Pair()
    later: Callable[[str], str] = lambda each: str(int(each) + 1)  # noqa: E731
    other: Callable[[str], str] = lambda each: ("B" if each[0] == "A" else "A") + each[1:]  # noqa: E731
    sealed = pair.sealed()
    assert refused(pair, raw(TERMS, change(part, later if part < 6 else other)(sealed)))[0] == "forged"
    assert refused(pair, raw({**TERMS, "x-wwwserve-prompt": "13"}, sealed))[0] == "forged"
    assert refused(pair, raw({**TERMS, "x-wwwserve-more": "1"}, sealed))[0] == "forged"
    assert refused(pair, raw({}, sealed))[0] == "forged"
    assert refused(pair, raw(TERMS, sealed), "/peer/v1/chat/completions")[0] == "forged"
    pair.two.open(PATH, raw(TERMS, sealed))  # none of them used up its number


def test_a_signature_of_another_key_is_forged() -> None:
    pair = Pair()
    thief = Messages(Identity.generate(), lambda name: True, pair.clock)
    thief.name = pair.one.name
    sealed = thief.sign(pair.two.name, pair.two.run, PATH, TERMS, BODY)
    assert refused(pair, raw(TERMS, sealed)) == ("forged", "the signature does not fit what is signed and the key")


def test_strangers_and_what_is_for_others_are_refused() -> None:
    pair = Pair()
    stranger = Messages(Identity.generate(), lambda name: True, pair.clock)
    sealed = stranger.sign(pair.two.name, pair.two.run, PATH, TERMS, BODY)
    assert refused(pair, raw(TERMS, sealed)) == ("stranger", f"{stranger.name} is no peer of this node")
    sealed = pair.one.sign(stranger.name, pair.two.run, PATH, TERMS, BODY)
    assert refused(pair, raw(TERMS, sealed)) == ("misaddressed", "it is addressed to another node")


@pytest.mark.parametrize(
    ("sealed", "kind"),
    [
        ("", "malformed"),
        ("a b c", "malformed"),
        ("x" * 100_000, "malformed"),
        (" ".join(["A" * 43, "A" * 43, "1", "1", "1", "9" * 5000, "A" * 43, "A" * 88]), "malformed"),
    ],
)
def test_what_is_no_signature_is_refused(sealed: str, kind: str) -> None:
    pair = Pair()
    assert refused(pair, raw(TERMS, sealed))[0] == kind
    assert refused(pair, [(b"x-wwwserve-prompt", b"1")])[0] == "unsigned"
    assert refused(pair, raw(TERMS, pair.sealed()) * 2)[0] == "unsigned"
    whole = pair.sealed()
    assert refused(pair, raw(TERMS, whole[:-88] + "é" * 44))[0] in ("malformed", "forged")


@pytest.mark.parametrize(("off_s", "side"), [(60.0, "after"), (-60.0, "before")])
def test_a_clock_that_is_off_is_told_so(off_s: float, side: str) -> None:
    pair = Pair(Clock(1e9 + off_s))
    kind, reason = refused(pair, raw(TERMS, pair.sealed()))
    assert kind == "stale"
    assert reason.startswith(f"it was signed 60.0 s {side} the time here, at most 30 are allowed")
    assert "one of the two clocks is off" in reason
    pair.clock.now_s = 1e9 + off_s / 60 * (SKEW_S - 1)
    pair.two.open(PATH, raw(TERMS, pair.sealed()))


def test_a_request_is_taken_once_at_most() -> None:
    pair = Pair()
    all_of_them = [raw(TERMS, pair.sealed()) for _ in range(5)]
    for k in (1, 0, 4, 2, 3):  # connections may overtake each other
        pair.two.open(PATH, all_of_them[k])
    for headers in all_of_them:
        assert refused(pair, headers) == ("replayed", refused(pair, headers)[1])
    pair.other.now_s += SKEW_S + 1
    assert {refused(pair, headers)[0] for headers in all_of_them} == {"stale"}


def test_what_a_peer_sends_takes_no_memory_and_does_not_push_out_what_another_sent() -> None:
    pair = Pair()
    loud = Messages(Identity.generate(), lambda name: True, pair.clock)
    pair.two.knows = lambda name: True
    first, quiet = (raw(TERMS, each.sign(pair.two.name, pair.two.run, PATH, TERMS, BODY)) for each in (loud, pair.one))
    pair.two.open(PATH, first)
    pair.two.open(PATH, quiet)
    for _ in range(100):
        pair.two.open(PATH, raw(TERMS, loud.sign(pair.two.name, pair.two.run, PATH, TERMS, BODY)))
    tracemalloc.start()
    for _ in range(200):
        loud._numbers[pair.two.name] += 97  # as if it had sent those too
        pair.two.open(PATH, raw(TERMS, loud.sign(pair.two.name, pair.two.run, PATH, TERMS, BODY)))
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loud._numbers[pair.two.name] > WINDOW and grown < 3 * WINDOW
    assert refused(pair, quiet)[0] == "replayed"
    assert refused(pair, first)[0] == "replayed"  # though its number is out of the window


def test_numbers_that_were_skipped_are_taken_later_and_those_far_behind_are_not() -> None:
    pair = Pair()
    for ahead in (1, WINDOW // 2, WINDOW - 1, WINDOW, 3 * WINDOW):
        behind = raw(TERMS, pair.sealed())
        pair.one._numbers[pair.two.name] += ahead - 1
        pair.two.open(PATH, raw(TERMS, pair.sealed()))
        if ahead < WINDOW:
            pair.two.open(PATH, behind)
        assert refused(pair, behind)[0] == "replayed"


def test_nothing_from_before_a_start_is_taken() -> None:
    pair = Pair()
    early = raw(TERMS, pair.sealed())
    pair.two.open(PATH, early)
    pair.other.now_s += 5
    pair.two = Messages(pair.two.identity, pair.two.knows, pair.other)  # it has forgotten what it saw
    assert refused(pair, early) == ("misaddressed", "it is addressed to an earlier run of this node")
    pair.two.open(PATH, raw(TERMS, pair.sealed()))


def test_a_sender_that_starts_again_is_heard_and_its_earlier_run_is_not() -> None:
    pair = Pair()
    early = raw(TERMS, pair.sealed())
    pair.two.open(PATH, raw(TERMS, pair.sealed()))
    again = Messages(pair.one.identity, pair.one.knows, Clock(1e9 + 1))
    pair.two.open(PATH, raw(TERMS, again.sign(pair.two.name, pair.two.run, PATH, TERMS, BODY)))
    assert refused(pair, early) == ("replayed", "it is of an earlier run of its sender")
    # A clock that was set back: refused as long as that could be a replay, and no longer.
    back = Messages(pair.one.identity, pair.one.knows, pair.clock)
    back.run -= 20_000_000
    assert refused(pair, raw(TERMS, back.sign(pair.two.name, pair.two.run, PATH, TERMS, BODY)))[0] == "replayed"
    pair.clock.now_s = pair.other.now_s = 1e9 + SKEW_S + 2
    pair.two.open(PATH, raw(TERMS, back.sign(pair.two.name, pair.two.run, PATH, TERMS, BODY)))
    assert refused(pair, early)[0] == "stale"


def test_the_head_of_an_answer_is_bound_to_its_request() -> None:
    pair = Pair()
    sealed, other = pair.sealed(), pair.sealed()
    claim = pair.two.open(PATH, raw(TERMS, sealed))
    terms = [(b"x-wwwserve-ttft", b"0.5"), (b"x-wwwserve-tpot", b"0.01")]
    code = (b"X-WWWserve-Signature", pair.two.sign_answer(claim, terms))
    good = [(b"Content-Type", b"a"), *terms, code]
    pair.one.check_answer(pair.two.name, sealed, good)
    for request, headers in (
        (other, good),
        (sealed, [*terms]),
        (sealed, [terms[0], (b"x-wwwserve-tpot", b"0.02"), code]),
        (sealed, [*terms, (b"x-wwwserve-more", b"1"), code]),
        (sealed, [*good, code]),
        (sealed, [*terms, (code[0], Messages(Identity.generate(), bool, pair.clock).sign_answer(claim, terms))]),
    ):
        with pytest.raises(Refused, match="not signed by whom was asked"):
            pair.one.check_answer(pair.two.name, request, headers)


def test_refusals_are_counted_each_and_logged_now_and_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, counted = Clock(), list[str]()
    refusals = Refusals(counted.append, clock)
    with caplog.at_level(logging.WARNING, "wwwserve.signed"):
        for _ in range(1000):
            refusals(Refused("stale", "late"))
        refusals(Refused("forged", "wrong"))
        clock.now_s += LOG_EVERY_S
        refusals(Refused("stale", "late again"))
    assert len(counted) == 1002 and counted.count("forged") == 1
    assert [record.reason for record in caplog.records] == ["late", "wrong", "late again"]  # type: ignore[attr-defined]
