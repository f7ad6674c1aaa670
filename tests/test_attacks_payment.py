"""Peers with a valid key who want to be served or paid for nothing: what an honest node loses to each.

A cheat has the key and the channel of a real node that was stopped, and talks to the other one as it likes. Losses are
in credits: the price of what an honest node delivered less what it was paid, or what it paid less the price of what it
got.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import pytest
from test_credit import MODEL, Engine, Net, agree, busy, net, play

from wwwserve.agents.protocol import MICRO
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import Messages
from wwwserve.serving.http.peers import PeerAnswer, PeerClient
from wwwserve.serving.ledger import accounts
from wwwserve.serving.ledger.audit import audit
from wwwserve.serving.ledger.channel_ledger import STILL_OPEN, due_of
from wwwserve.serving.ledger.exchange import Vouching
from wwwserve.serving.ledger.statements import (
    NOTHING_CAME,
    PART,
    WHOLE,
    Receipt,
    Served,
    Signed,
    State,
    Terms,
    Vouch,
    digest,
    link,
    sign,
)
from wwwserve.serving.market import Promise

PATH = "/peer/v1/chat/completions"
LONG = 300  # words of an answer, 0.6 credits
UNSTREAMED = ("leaves what is not streamed", "says that nothing came", "says a short prompt")
SHORT_PROMPT = 1000  # tokens, of one that has four times as many


class Answered(NamedTuple):
    """What came of a cheat's request."""

    status: int
    body: bytes
    promise: Promise | None = None
    whole: bool = False

    @property
    def events(self) -> int:
        return self.body.count(b'"content": "w')


class Cheat:
    """Whoever has the key of the first node, which is stopped, and its channel with the second."""

    tariff = (0, 0, 0)

    def __init__(self, n: Net, run: int) -> None:
        self.n, self.run = n, run
        self.identity = Identity.load(Path(n.configs[0]["key"]))
        self.messages = Messages(self.identity, lambda name: True)
        self.channel = audit(n.file(0)).books.channels[n.keys[1]]
        self.head, self.number, self.total = self.channel.head, self.channel.number, self.channel.total
        self.id = self.channel.asked

    @classmethod
    async def of(cls, n: Net) -> "Cheat":
        await n.stop(0)
        cheat = cls(n, (await n.see(1))["run"])
        await cheat.look()
        return cheat

    async def look(self) -> None:
        """At the tariff in force."""
        tariff = (await self.n.see(1))["tariff"]
        given, cached, output = (round(MICRO * tariff[each]) for each in ("input", "cached_input", "output"))
        self.tariff = given, cached, output

    async def post(self, path: str, body: bytes, **headers: str) -> Any:
        terms = {"content-type": "application/json"}
        terms |= {f"x-wwwserve-{name}": value for name, value in headers.items()}
        terms["x-wwwserve-signature"] = self.messages.sign(self.n.keys[1], self.run, path, terms, body)
        return await self.n.session.post(self.n.url(1) + path, data=body, headers=terms)

    def terms(self, tokens: int, prompt: int) -> Terms:
        return Terms(self.tariff, prompt, (self.tariff[0] * prompt + self.tariff[2] * tokens) // 1000)

    @asynccontextmanager
    async def offer(self, terms: Terms, body: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        self.id += 1
        response = await self.post(
            PATH, body, prompt=str(terms.prompt), tariff=" ".join(map(str, terms.tariff)),
            escrow=f"v3 {self.id} {terms.amount}",
        )  # fmt: skip
        async with response:
            yield response

    async def pay(self, receipt: Receipt) -> str:
        """Sign the chain with one more receipt; what the second node answers. What it declines is no part of it."""
        head, total = link(self.head, receipt), self.total + receipt.due
        state = State(self.channel.digest, self.identity.name, self.n.keys[1], self.number + 1, total, head)
        vouch = Vouch(Signed(state, sign(self.identity, "voucher", state)), self.number + 1, (receipt,))
        async with await self.post("/peer/ledger", msgspec.json.encode(Vouching(vouch))) as response:
            answer = (await response.read()).decode()
        if '"ack"' in answer:
            self.head, self.number, self.total = head, self.number + 1, total
        return answer


def asked(stream: bool = True, text: str = "Hello", **more: Any) -> bytes:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": LONG, "stream": stream}
    return json.dumps(body | ({"stream_options": {"include_usage": True}} if stream else {}) | more).encode()


@pytest.mark.parametrize(
    ("more", "tokens", "prompt", "status"),
    [
        ({}, 0, 1, 402), ({}, LONG - 1, 1, 402), ({"max_tokens": None}, 4096, 1, 402),
        ({"max_tokens": "300"}, 10, 1, 402), ({"max_tokens": 300.0}, LONG - 1, 1, 402),
        ({"max_completion_tokens": LONG + 1}, LONG, 1, 402), ({"n": 3}, 2 * LONG, 1, 402),
        ({"n": 2.0}, LONG, 1, 402), ({"text": "x" * 64_000}, LONG, 1, 400), ({"text": "x" * 64_000}, LONG, 3999, 400),
        ({"max_tokens": 0, "max_completion_tokens": -5}, 100, 1, 402), ({}, LONG, 1, 200),
    ],
)  # fmt: skip
def test_who_puts_less_in_escrow_than_what_is_asked_costs_gets_nothing(
    tmp_path: Path, more: dict[str, Any], tokens: int, prompt: int, status: int
) -> None:
    async def scene() -> None:
        other = Engine()
        async with net(tmp_path, busy(), other) as n:
            cheat = await Cheat.of(n)
            async with cheat.offer(cheat.terms(tokens, prompt), asked(**more)) as response:
                await response.read()
                assert (response.status, other.begun) == (status, int(status == 200))

    play(scene)


@pytest.mark.parametrize(
    ("more", "limits"),
    [
        ({}, {"max_tokens": 20}), ({"max_completion_tokens": 20}, {"max_tokens": 20, "max_completion_tokens": 20}),
        ({"max_tokens": 9000, "max_completion_tokens": 20}, {"max_tokens": 20, "max_completion_tokens": 20}),
        ({"max_tokens": 20, "max_completion_tokens": None}, {"max_tokens": 20, "max_completion_tokens": 20}),
        ({"max_tokens": 20, "max_completion_tokens": 0}, {"max_tokens": 20, "max_completion_tokens": 20}),
    ],
)  # fmt: skip
def test_no_engine_reads_a_longer_limit_than_is_paid(
    tmp_path: Path, more: dict[str, Any], limits: dict[str, int]
) -> None:
    """vLLM takes the first of two keys, SGLang the other."""

    async def scene() -> None:
        other = Engine(words=10)
        async with net(tmp_path, busy(), other) as n:
            cheat = await Cheat.of(n)
            async with cheat.offer(cheat.terms(20, 1), asked(**({"max_tokens": 20} | more))) as response:
                await response.read()
            (seen,) = other.asked
            assert {name: seen[name] for name in seen if name.startswith("max_")} == limits

    play(scene)


def test_a_long_stream_is_paid_as_it_comes_and_stops_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of the exposure may be unpaid, 75 of 300 words."""
    monkeypatch.setattr(accounts, "PATIENCE_S", 1.0)

    async def scene() -> None:
        async with net(tmp_path, busy(), Engine(words=LONG, pause_s=0.003), ledger={"exposure": 1.5}) as n:
            await n.until(lambda: n.handed_over_more(0, stream=True, max_tokens=LONG))
            tariff = (await n.see(1))["tariff"]["output"]
            assert await n.paid() == pytest.approx(tariff * LONG / 1000, rel=1e-3)
            assert (await n.channel(1, 0))["short"] == 0.0
            receipts = audit(n.file(0)).books.channels[n.keys[1]].number
            assert receipts > 10  # four for each tenth, and the last
            cheat = await Cheat.of(n)
            async with cheat.offer(cheat.terms(LONG, 1), asked()) as response:
                got = b""
                with contextlib.suppress(aiohttp.ClientError):
                    async for chunk in response.content.iter_any():
                        got += chunk
            assert response.status == 200 and 70 <= got.count(b'"content": "w') <= 80

    play(scene)


async def take(cheat: Cheat, how: str) -> tuple[Answered, str]:
    """One request of a cheat, until it has what it wants; returns what it got, and what it was told of its receipt."""
    prompt = SHORT_PROMPT if how == "says a short prompt" else 1
    body = asked(how not in UNSTREAMED, "x" * 16 * prompt)
    terms, told, got, promise = cheat.terms(LONG, prompt), "", b"", None
    nothing = Receipt(cheat.id + 1, digest(body), terms, None, NOTHING_CAME, 0)
    async with cheat.offer(terms, body) as response:
        if response.status != 200:
            return Answered(response.status, await response.read()), told
        promise = Promise(*(float(response.headers[f"x-wwwserve-{each}"]) for each in ("ttft", "tpot")))
        if how == "says at once that nothing came":
            told = await cheat.pay(nothing)
        try:
            if how == "leaves what is not streamed":
                await asyncio.wait_for(response.read(), 0.6)
            async for chunk in response.content.iter_any():
                got += chunk
                if how == "leaves before the last event" and got.count(b'"content": "w') >= LONG:
                    break
        except (TimeoutError, aiohttp.ClientError):
            pass
    came = Answered(200, got, promise, b"[DONE]" in got)
    due = due_of(1, terms, promise, Served("", prompt, 0, LONG, 1, WHOLE), LONG)
    some = Served(digest(got), prompt, 0, 1, 1, PART)
    receipt = {
        "pays a tenth": Receipt(cheat.id, digest(body), terms, promise, some, due // 10),
        "says a short prompt": Receipt(
            cheat.id, digest(body), terms, promise, Served(digest(got), prompt, 0, LONG, 1, WHOLE), due
        ),
    }.get(how, nothing)  # fmt: skip
    while STILL_OPEN in (told := await cheat.pay(receipt)):
        await asyncio.sleep(0.02)
    return came, told


@pytest.mark.parametrize(
    ("how", "exposure"),
    [
        ("says at once that nothing came", 3.0), ("leaves before the last event", 3.0), ("says that nothing came", 3.0),
        ("pays a tenth", 3.0), ("leaves what is not streamed", 1.0), ("says a short prompt", 3.0),
    ],
)  # fmt: skip
def test_a_free_rider_gets_no_more_for_nothing_than_the_exposure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, exposure: float
) -> None:
    monkeypatch.setattr(accounts, "PATIENCE_S", 0.1)

    async def scene() -> None:
        slow = how in ("leaves what is not streamed", "says at once that nothing came")
        other = Engine(words=LONG, pause_s=0.004 if slow else 0.0)
        if how == "says a short prompt":
            other.prompt = 4 * SHORT_PROMPT
        async with net(tmp_path, busy(), other, ledger={"exposure": exposure}) as n:
            cheat = await Cheat.of(n)
            for _ in range(40):
                await cheat.look()
                came, told = await take(cheat, how)
                if came.status != 200:
                    break
                assert '"ack"' in told
            loss = (await n.see(1))["ledger"]["channels"][0]["short"]
            print(f"free rider, {how}: honest loss {loss:.3f} credits, exposure {exposure}")
            if how == "says at once that nothing came":
                assert came.events < LONG and not came.whole and loss < 0.5  # each is broken off
            else:
                one = 1.5 if how == "says a short prompt" else 0.7  # what one more may cost, with what it did not say
                assert came.status == 402 and exposure - one < loss <= exposure + cheat.total / MICRO / 50
            assert (await n.see(1))["ledger"]["channels"][0]["peer_escrow"] == 0.0
        assert not audit(n.file(1)).problems

    play(scene)


class Altered:
    """An answer whose status somebody on the way made a refusal."""

    status = 409

    def __init__(self, response: Any) -> None:
        self._response = response

    def __getattr__(self, name: str) -> Any:
        return getattr(self._response, name)


@pytest.mark.parametrize("kind", ["altered", "refused"])
def test_escrow_comes_back_whoever_says_that_a_request_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Where the status is altered on its way, the peer took the request, and is told that nothing came of it."""

    async def scene() -> None:
        other = Engine()
        async with net(tmp_path, busy(), other) as n:
            if kind == "altered":
                requests = PeerClient.request

                @asynccontextmanager
                async def altered(
                    self: PeerClient, peer: str, path: str, *more: Any, **named: Any
                ) -> AsyncIterator[Any]:
                    async with requests(self, peer, path, *more, **named) as (response, sealed):
                        yield PeerAnswer(Altered(response) if path == PATH else response, sealed)  # type: ignore[arg-type]

                monkeypatch.setattr(PeerClient, "request", altered)
            else:
                other.waiting = 200  # it takes nothing

                async def full() -> bool:
                    return bool((await n.see(1))["engine"]["waiting"])

                await n.until(full)
            for _ in range(4):
                assert (await n.ask())[0] == 200
            assert (other.begun > 0) == (kind == "altered")
            assert await n.paid() == 0.0
            channel = await n.channel(1, 0)
            assert channel["peer_escrow"] == 0.0 and channel["peer_free"] == 100.0
        first, _ = agree(n)
        assert (first.books.channels[n.keys[1]].number > 0) == (kind == "altered")  # receipts of nothing

    play(scene)
