"""Executors who bill what nobody got, and ones who stall: what an honest origin loses to each, in credits."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ledger_sides import B, Sides, play

from wwwserve.agents.protocol import LATENESS, MICRO, QUOTED
from wwwserve.agents.rules import Rule
from wwwserve.serving import config
from wwwserve.serving.http.sse import AnswerMeter, Usage
from wwwserve.serving.ledger.accounts import Came, Payment, hung_up
from wwwserve.serving.ledger.statements import Terms
from wwwserve.serving.ledger.token_rate import RATE_BYTES, RATE_SLACK, RATE_TOKENS, TokenRate
from wwwserve.serving.market import Promise
from wwwserve.serving.node_provider import NodeProvider

PRICE = 2 * MICRO  # of 1000 tokens
MOST = 1000  # tokens
TERMS = Terms((0, 0, PRICE), 10, MOST * PRICE // 1000)
PROMISE = Promise(1.0, 0.02)


def event(**choice: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0} | choice]}).encode() + b"\n\n"


JUNK = "junk " * 400
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 900}}\n\n'
END = USAGE + b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "body",
    [
        event(delta={"content": "no", "text": JUNK}), event(delta={"content": "no"}, text=JUNK),
        event(delta={"content": "no"}) + event(index=1, delta={"content": JUNK}),
        event(delta={"content": "no"}) + event(index=-1, delta={"content": JUNK}),
        event(delta={"content": "no"}) + event(index="0", delta={"content": JUNK}),
        event(delta={"content": "no", "tool_calls": [{"function": {"arguments": JUNK}}]}),
        event(delta={"content": "no"}, message={"content": JUNK}), event(delta={"content": "no", "audio": JUNK}),
        event(delta={"content": "no"}) + b": " + JUNK.encode() + b"\n\n",
        event(delta={"content": "no"}) + b"event: note\nid: " + JUNK.encode().strip() + b"\n\n",
    ],
)  # fmt: skip
def test_what_no_client_shows_is_not_paid(body: bytes) -> None:
    for size in (1, 1 << 20):
        meter = AnswerMeter(choices=1, calls=False)
        for k in range(0, len(body + END), size):
            meter.feed((body + END)[k : k + size])
        assert meter.complete and meter.tokens == len("no")  # of 900 that it says


def test_events_of_another_choice_that_look_alike_are_not_paid() -> None:
    meter = AnswerMeter(choices=1, calls=False)
    for _ in range(50):
        meter.feed(event(index=1, delta={"content": "junk"}))
    meter.feed(END)
    assert meter.tokens == 0


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("parts", [1, 8])
def test_an_executor_that_bills_more_tokens_than_its_text_has_gains_no_more_than_the_exposure(
    tmp_path: Path, known: bool, parts: int
) -> None:
    """Four times as many, as its bytes allow; it is found out by what the own engine counts of such text, and before
    it has counted any, as usual text has fewer. Each answer is paid at once or in instalments."""

    async def scene() -> None:
        sides = Sides("memory", tmp_path, QUOTED, exposure=10 * MICRO)
        await sides.exchange()
        rate, tokens = TokenRate(), 200
        sides.a.doubted = rate.doubted
        for _ in range((RATE_BYTES // 800 + 1) * known):
            rate.counted(200, 800)
        answers = loss = 0
        while answers < 100 and sides.a.available(B.name) >= TERMS.amount:
            answers += 1
            id = sides.a.lock(B.name, TERMS, "r")
            payment = Payment(sides.a, B.name, id, TERMS, MOST, rate)
            payment.feed(b"a")
            before = sides.a.books.channels[B.name].total
            for part in range(1, parts + 1):
                billed = 4 * tokens * part // parts
                came = Came(billed, part == parts, 0.1, Usage(10, billed), text_bytes=billed)
                payment.end(PROMISE, came) if part == parts else payment.advance(PROMISE, came)
            loss += sides.a.books.channels[B.name].total - before - tokens * PRICE // 1000
            await sides.exchange()
        fair = round(tokens * (answers * (RATE_SLACK - 1.0))) * PRICE // 1000 if known else 0
        print(f"inflater: honest loss {loss / MICRO:.3f} credits, exposure 10, {answers} answers")
        assert 5 < answers < 30 and loss <= 10 * MICRO + fair + sides.a.books.channels[B.name].total // 50

    play(scene)


def test_a_peer_that_bills_a_little_too_much_for_ever_gains_no_more_than_the_exposure(tmp_path: Path) -> None:
    """A fifth more than the text has, which is within what one text may differ from another."""

    async def scene() -> None:
        sides = Sides("memory", tmp_path, QUOTED, exposure=10 * MICRO)
        await sides.exchange()
        rate, loss, answers, dice = TokenRate(), 0, 0, random.Random(3)
        sides.a.doubted = rate.doubted
        while answers < 1000 and sides.a.available(B.name) >= TERMS.amount:
            answers += 1
            rate.counted(200, round(800 * dice.uniform(0.8, 1.2)))
            id = sides.a.lock(B.name, TERMS, "r")
            payment = Payment(sides.a, B.name, id, TERMS, MOST, rate)
            payment.feed(b"a")
            paid = payment.end(PROMISE, Came(480, True, 0.1, Usage(10, 480), text_bytes=1600))
            loss += paid - 400 * PRICE // 1000
            await sides.exchange()
        print(f"a fifth too many: honest loss {loss / MICRO:.3f} credits, exposure 10, {answers} answers")
        assert answers < 300 and loss < 20 * MICRO

    play(scene)


@pytest.mark.parametrize("seed", range(5))
def test_honest_peers_are_not_blamed_for_texts_and_tokenizers_that_differ(seed: int) -> None:
    """Each text by a third of it at random, all that go out have a tenth more tokens, some in instalments."""
    rate, dice = TokenRate(), random.Random(seed)
    over = dict.fromkeys("abc", 0)
    for k in range(6000):
        rate.counted(200, round(800 * dice.lognormvariate(0.0, 0.3)))
        peer, length = "abc"[k % 3], dice.choice([100, 400, 1600])
        tokens, parts = round(1.1 * length / 4 * dice.lognormvariate(0.0, 0.3)), dice.choice([1, 4])
        for part in range(parts):
            over[peer] += rate.billed(peer, tokens // parts, length // parts, PRICE, part * length // parts)
    most = max(over.values())
    print(f"honest peers: at most {most} tokens too many of {rate._billed['a'].tokens}")
    assert most < 0.02 * rate._billed["a"].tokens


def test_who_bills_more_than_most_is_found_out_where_most_bill_more_than_the_own_engine() -> None:
    rate, over = TokenRate(), dict.fromkeys("abc", 0)
    for _ in range(3000):
        rate.counted(200, 800)
        for peer, tokens in (("a", 220), ("b", 220), ("c", 264)):
            over[peer] += rate.billed(peer, tokens, 800, PRICE)
    assert over["a"] == over["b"] < 3000 < over["c"]


def test_two_that_give_themselves_up_do_not_let_a_third_bill_as_it_likes() -> None:
    rate = TokenRate()
    for _ in range(60):
        rate.counted(200, 800)
        for peer in "ab":
            rate.billed(peer, 600, 800, PRICE)
    over = sum(rate.billed("c", 600, 800, PRICE) for _ in range(1000))
    assert over > 1000 * (600 - RATE_SLACK**2 * 200) - 2 * RATE_TOKENS


def test_texts_that_differ_are_no_evidence() -> None:
    rate = TokenRate()
    for _ in range(100):
        rate.counted(200, 800)
    assert sum(rate.billed("p", 100 + 200 * (k % 2), 800, PRICE) for k in range(1000)) <= 100


def test_a_doubt_is_dropped_once_the_own_engine_has_as_many_tokens_for_such_text() -> None:
    rate = TokenRate()
    assert rate.billed("p", 500, 1000, 2000) == 0 and rate.doubted("p") == 500
    assert rate.billed("p", 100, 1000, 2000) == 0 and rate.doubted("p") == 200
    for _ in range(RATE_BYTES // 1000 + 1):
        rate.counted(500, 1000)
    assert rate.doubted("p") == 0 and rate.billed("p", 500, 1000, 2000) == 0


def stalled(stream: bool, took_s: float) -> Came:
    return hung_up(AnswerMeter(), stream, PROMISE, took_s)


@pytest.mark.parametrize(
    ("how", "came"),
    [
        ("stream, user leaves", lambda: stalled(True, 0.9)), ("whole, user leaves", lambda: stalled(False, 8.0)),
        ("whole, user leaves late", lambda: stalled(False, 1e6)),
        ("nobody leaves", lambda: Came(0, False, 600.0, None)),
    ],
)  # fmt: skip
def test_an_executor_that_stalls_is_paid_for_what_nobody_saw_within_the_exposure(
    tmp_path: Path, how: str, came: Callable[[], Came]
) -> None:
    async def scene() -> None:
        for exposure in (3 * MICRO, 10 * MICRO):
            (tmp_path / str(exposure)).mkdir()
            sides = Sides("memory", tmp_path / str(exposure), LATENESS, exposure=exposure)
            await sides.exchange()
            terms, paid = Terms((MICRO, 0, PRICE), 100, TERMS.amount + MICRO // 10), []
            for _ in range(500):
                id = sides.a.lock(B.name, terms, "r")
                paid.append(Payment(sides.a, B.name, id, terms, MOST, TokenRate()).end(PROMISE, came()))
                await sides.exchange()
            print(f"staller, {how}: honest loss {sum(paid) / MICRO:.3f} credits, exposure {exposure // MICRO}")
            assert sum(paid) <= exposure * 50 // 49 and not any(paid[450:])
            assert (sum(paid) > exposure // 2) == (how in ("stream, user leaves", "whole, user leaves"))

    play(scene)


def test_what_a_peer_promises_is_no_later_than_what_it_advertised() -> None:
    parsed = config.parse(
        {
            "name": "n", "key": "k",
            "engine": {
                "url": "http://e",
                "profile": {"kind": "catalogue", "gpu": "rtx-4090", "model": "qwen3-8b", "max_num_seqs": 8},
            },
        },
        "test",
    )  # fmt: skip
    made = NodeProvider(Rule("single"), parsed.engine_profile(), parsed.agreed(), credit=1e6)
    made.heard("peer", made.advertise(0.0), 0.0, frozenset({"m"}))
    request = made.new(None, 0, 100, 100, 0.0, "m")
    made.offer(request, "peer")
    shown = Promise(*(float(made.requests[request][name]) for name in ("shown_ttft_s", "shown_tpot_s")))
    assert made.is_as_shown(request, shown) and made.is_as_shown(request, Promise(0.0, 0.0))
    assert not made.is_as_shown(request, Promise(1e5, shown.tpot_s))
    assert not made.is_as_shown(request, Promise(shown.ttft_s, 1.0))
