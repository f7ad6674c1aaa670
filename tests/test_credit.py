"""Live nodes that pay each other: on loopback, in one process, before engines that do what a test wants."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
import yaml
from aiohttp import web

from wwwserve.agents.protocol import LATENESS, MICRO, PER_REQUEST, QUOTED, price_of
from wwwserve.agents.rules import Rule
from wwwserve.serving import config, node
from wwwserve.serving.engine.adapter import NAMES
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import Messages
from wwwserve.serving.ledger.accounts import Accounts
from wwwserve.serving.ledger.audit import Audit, audit, compare, settled
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.entries import Credited
from wwwserve.serving.ledger.journal import SqliteJournal
from wwwserve.serving.ledger.statements import Terms
from wwwserve.serving.local_nodes import free_ports
from wwwserve.serving.market import Promise
from wwwserve.serving.node_provider import NodeProvider

MODEL = "stub"
PROFILE = {"kind": "catalogue", "gpu": "rtx-4090", "model": "qwen3-8b", "max_num_seqs": 8}
PRICE = 2.0  # credits for 1000 tokens of an answer: what they cost in compute, where nobody is in a hurry
MARKET = {"tick_s": 0.1, "gossip_s": 0.2, "payment": "quoted"}
WORDS = 40


@dataclass
class Engine:
    """An engine that answers so many words."""

    waiting: int = 0  # so full that whoever can goes elsewhere
    words: int = WORDS
    claims: int | None = None  # tokens that it says it generated
    prompt: int = 7  # tokens that it says the prompt has
    pause_s: float = 0.0
    mode: str = "well"
    per_event: int = 1  # words in an event of a stream
    begun: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.begun += 1
        self.asked.append(body)
        if self.mode == "silent":
            await asyncio.sleep(60)
        if not body.get("stream"):
            await asyncio.sleep(self.pause_s * self.words)
            text = "w " * self.words
            usage = {
                "prompt_tokens": self.prompt,
                "completion_tokens": self.words if self.claims is None else self.claims,
            }
            return web.json_response({"choices": [{"message": {"content": text}}], "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for k in (-1, *range(0, self.words, self.per_event)):
            words = "".join(f"w{i} " for i in range(k, min(k + self.per_event, self.words)))
            delta = {"role": "assistant", "content": ""} if k < 0 else {"content": words}
            await response.write(b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n")
            if self.mode == "breaks off" and k == self.words // 2 - 1:
                assert request.transport is not None
                request.transport.abort()
            await asyncio.sleep(self.pause_s)
        if (body.get("stream_options") or {}).get("include_usage"):
            last = {"choices": [], "usage": {"prompt_tokens": self.prompt, "completion_tokens": self.words}}
            await response.write(b"data: " + json.dumps(last).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def metrics(self, request: web.Request) -> web.Response:
        values = zip(NAMES["vllm"], (0, self.waiting, 0.0), strict=True)
        return web.Response(text="\n".join(f'{name}{{engine="0"}} {value}' for name, value in values))

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL}]})

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator["Engine"]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/v1/models", self.models)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port := free_ports(1)[0]).start()
        self.url = f"http://127.0.0.1:{port}"
        try:
            yield self
        finally:
            await runner.cleanup()


@dataclass
class Net:
    """Nodes with ledgers, all each other's peers, and a client."""

    session: aiohttp.ClientSession
    folder: Path
    configs: list[dict[str, Any]]
    keys: list[str]
    running: list[asyncio.Task[None]] = field(default_factory=list)

    def file(self, k: int) -> Path:
        return self.folder / f"n{k}.db"

    async def start(self, k: int) -> None:
        up = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(node.serve(config.parse(self.configs[k], "test"), lambda *key: up.set_result(key)))
        self.running[k:] = [task, *self.running[k + 1 :]]
        await asyncio.wait({up, task}, return_when=asyncio.FIRST_COMPLETED)
        assert up.done(), task

    async def stop(self, k: int) -> None:
        self.running[k].cancel()
        await asyncio.gather(self.running[k], return_exceptions=True)

    async def ask(self, k: int = 0, **more: Any) -> tuple[int, bytes]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 500} | more
        async with self.session.post(self.url(k) + "/v1/chat/completions", json=body) as response:
            return response.status, await response.read()

    def url(self, k: int) -> str:
        return f"http://127.0.0.1:{self.configs[k]['port']}"

    async def see(self, k: int = 0) -> dict[str, Any]:
        async with self.session.get(self.url(k) + "/network") as response:
            seen: dict[str, Any] = await response.json()
            return seen

    async def channel(self, k: int, other: int) -> dict[str, Any]:
        found = [c for c in (await self.see(k))["ledger"]["channels"] if c["peer"] == self.keys[other]]
        return found[0] if found else {}

    async def until(self, what: Callable[[], Awaitable[bool]], for_s: float = 60.0) -> None:
        until_s = asyncio.get_running_loop().time() + for_s
        while not await what():
            assert asyncio.get_running_loop().time() < until_s, f"not within {for_s} s"
            await asyncio.sleep(0.02)

    async def handed_over_more(self, than: int, **more: Any) -> bool:
        """Ask the first, and say whether a peer has answered by now."""
        assert (await self.ask(**more))[0] == 200
        return bool((await self.see())["requests"]["handed_over"] > than)

    async def paid(self, k: int = 0, other: int = 1) -> float:
        """What k paid the other, once nothing is under way."""

        async def done() -> bool:
            a, b = await self.channel(k, other), await self.channel(other, k)
            return bool(a and b) and not (a["escrow"] or b["peer_escrow"] or a["unacknowledged"])

        await self.until(done)
        a, b = await self.channel(k, other), await self.channel(other, k)
        assert a["paid"] == b["earned"] and a["free"] == b["peer_free"]
        return float(a["paid"])


@contextlib.asynccontextmanager
async def net(folder: Path, *engines: Engine, **more: Any) -> AsyncIterator[Net]:
    """A network of one node for each engine; `more` goes into the nodes' configurations, `ledger` into that."""
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(engine.served())
        ports, keys = free_ports(len(engines)), []
        for k in range(len(engines)):
            identity = Identity.generate()
            identity.save(folder / f"n{k}.pem")
            keys.append(identity.name)
        accounts = {key: {"credit": 100.0 * (len(keys) - 1), "stake": 4.0} for key in keys}
        (folder / "genesis.yaml").write_text(yaml.safe_dump({"accounts": accounts}))
        ledger = more.pop("ledger", {})
        configs = [
            {
                "name": f"n{k}", "key": str(folder / f"n{k}.pem"), "port": ports[k], "policy": "earliest_finish",
                "peers": [{"key": keys[i], "url": f"http://127.0.0.1:{ports[i]}"} for i in range(len(keys)) if i != k],
                "engine": {"url": engines[k].url, "profile": PROFILE, "timeout_s": 1.0},
                "market": MARKET, "compute_cost_per_ktok": PRICE, "deadlines_s": [1e4],
                "ledger": {"file": str(folder / f"n{k}.db"), "genesis": str(folder / "genesis.yaml"), **ledger},
            } | more for k in range(len(engines))
        ]  # fmt: skip
        made = Net(await stack.enter_async_context(aiohttp.ClientSession()), folder, configs, keys)
        try:
            for k in range(len(engines)):
                await made.start(k)

            async def all_there() -> bool:
                seen = [await made.see(k) for k in range(len(engines))]
                return all(
                    each["engine"]["up"] and sum(p["there"] for p in each["peers"]) == len(engines) - 1
                    and sum(c["reconciled"] for c in each["ledger"]["channels"]) == len(engines) - 1 for each in seen
                )  # fmt: skip

            await made.until(all_there)
            yield made
        finally:
            for task in made.running:
                task.cancel()
            await asyncio.gather(*made.running, return_exceptions=True)


def play(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 600.0))  # type: ignore[arg-type]


def agree(n: Net, one: int = 0, other: int = 1) -> tuple[Audit, Audit]:
    found = audit(n.file(one)), audit(n.file(other))
    assert not found[0].problems and not found[1].problems and not compare(*found)
    return found


def busy() -> Engine:
    return Engine(waiting=200)


async def cost(n: Net, tokens: int, answers: int = 1) -> float:
    """Of answers of so many tokens by the second node, each to a prompt of one token."""
    tariff = (await n.see(1))["tariff"]
    assert tariff["output"] == pytest.approx(PRICE)
    given, output = (round(MICRO * tariff[name]) for name in ("input", "output"))
    return answers * ((given + output * tokens) // 1000) / MICRO


def test_an_answer_is_paid_by_its_tokens_whole_or_streamed(tmp_path: Path) -> None:
    async def scene() -> None:
        async with net(tmp_path, busy(), Engine()) as n:
            for stream in (False, True):
                before = (await n.see(0))["requests"]["handed_over"]
                await n.until(lambda s=stream, b=before: n.handed_over_more(b, stream=s))  # type: ignore[misc]
            statuses = await asyncio.gather(*(n.ask(stream=bool(k % 2)) for k in range(12)))
            assert [status for status, _ in statuses] == [200] * 12
            handed_over = (await n.see(0))["requests"]["handed_over"]
            paid = await n.paid()
            assert handed_over > 2 and paid == pytest.approx(await cost(n, WORDS, handed_over))
            page = await (await n.session.get(n.url(0) + "/metrics")).text()
            free = page.split(f'wwwserve_channel_credits{{peer="{n.keys[1]}",state="free",whose="own"}} ')[1].split()[0]
            assert float(free) == pytest.approx(100 - paid)
        assert settled(*agree(n))

    play(scene)


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_is_paid_by_its_usage_which_its_user_sees_only_if_it_was_asked_for(
    tmp_path: Path, usage: bool
) -> None:
    async def scene() -> None:
        other = Engine(per_event=4)
        async with net(tmp_path, busy(), other) as n:
            more = {"stream_options": {"include_usage": True}} if usage else {}
            body = {"model": MODEL, "messages": [], "stream": True} | more
            while not other.begun:
                async with n.session.post(n.url(0) + "/v1/chat/completions", json=body) as response:
                    answer = (await response.read()).decode()
            assert [each["max_tokens"] for each in other.asked] == [4096]  # as many as are in escrow
            events = [json.loads(each[6:]) for each in answer.split("\n\n") if each[6:].startswith("{")]
            assert len(events) == 1 + WORDS // 4 + usage and answer.endswith("data: [DONE]\n\n")
            assert [event["usage"] for event in events if "usage" in event] == (
                [{"prompt_tokens": 7, "completion_tokens": WORDS}] if usage else []
            )
            assert await n.paid() == pytest.approx(await cost(n, WORDS))
        assert settled(*agree(n))

    play(scene)


def test_who_hangs_up_pays_for_what_was_generated(tmp_path: Path) -> None:
    async def scene() -> None:
        async with net(tmp_path, busy(), Engine(pause_s=0.05, words=200)) as n:
            body = {"model": MODEL, "messages": [], "stream": True, "max_tokens": 500}
            read = b""
            async with n.session.post(n.url(0) + "/v1/chat/completions", json=body) as response:
                while read.count(b"data:") < 12:
                    read += await response.content.readany()
            tokens = round(await n.paid() * 1000 / PRICE)
            assert 10 <= tokens <= 20
            assert audit(n.file(1)).books.channels[n.keys[0]].short == 0
        agree(n)

    play(scene)


def test_who_takes_the_escrow_and_stays_silent_is_paid_nothing(tmp_path: Path) -> None:
    async def scene() -> None:
        quiet = Engine(mode="silent")
        async with net(tmp_path, busy(), quiet) as n:
            status, _ = await n.ask()  # the own engine answers in the end
            assert status == 200 and quiet.begun >= 1 and await n.paid() == 0
            receipts = audit(n.file(0)).books.channels[n.keys[1]].number
            assert receipts >= 1
        agree(n)

    play(scene)


def test_a_stream_that_breaks_off_pays_what_came(tmp_path: Path) -> None:
    async def scene() -> None:
        async with net(tmp_path, busy(), Engine(mode="breaks off")) as n:
            status, body = await n.ask(stream=True)
            assert status == 200 and b"error" in body
            assert 0 < await n.paid() <= await cost(n, WORDS // 2)
        agree(n)

    play(scene)


@pytest.mark.parametrize(("claims", "tokens"), [(100_000, 80), (0, 0)])
def test_an_executor_that_overclaims_is_paid_what_came(tmp_path: Path, claims: int, tokens: int) -> None:
    """Whatever it says, no more tokens than bytes of text came."""

    async def scene() -> None:
        async with net(tmp_path, busy(), Engine(claims=claims)) as n:
            assert (await n.ask())[0] == 200
            assert await n.paid() == (await cost(n, tokens) if tokens else 0)
        agree(n)

    play(scene)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_longer_than_agreed_is_broken_off_and_what_came_is_paid(tmp_path: Path, stream: bool) -> None:
    """As where an engine reads limits in another way than nodes do."""

    async def scene() -> None:
        own, other = busy(), Engine(words=200, pause_s=0.001)
        async with net(tmp_path, own, other) as n:
            while not other.begun:
                status, body = await n.ask(stream=stream, max_tokens=20)
            came = body.count(b'"content": "w') if stream and b"error" in body else 0
            assert status == 200 and came <= 20 and own.begun == (came == 0)
            assert await n.paid() == pytest.approx(await cost(n, came) if came else 0.0)
        agree(n)

    play(scene)


def test_a_stream_that_does_not_tell_its_usage_is_not_taken_for_pay(tmp_path: Path) -> None:
    async def scene() -> None:
        async with net(tmp_path, Engine(), Engine()) as n:
            await n.stop(0)
            peer = Messages(Identity.load(Path(n.configs[0]["key"])), lambda name: True)
            body = {"model": MODEL, "messages": [], "stream": True, "max_tokens": 100}
            statuses = []
            for more in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": {"include_usage": True}}):
                content = json.dumps(body | more).encode()
                seen = await n.see(1)
                tariff = [round(MICRO * seen["tariff"][each]) for each in ("input", "cached_input", "output")]
                terms = {
                    "x-wwwserve-prompt": "1", "x-wwwserve-tariff": " ".join(map(str, tariff)),
                    "x-wwwserve-escrow": f"v3 1 {MICRO}",
                }  # fmt: skip
                path = "/peer/v1/chat/completions"
                terms["x-wwwserve-signature"] = peer.sign(n.keys[1], seen["run"], path, terms, content)
                async with n.session.post(n.url(1) + path, data=content, headers=terms) as response:
                    statuses.append((response.status, b"include_usage" in await response.read()))
            assert statuses == [(402, True), (402, True), (200, False)]

    play(scene)


def test_a_peer_with_whom_no_more_may_be_in_escrow_is_no_candidate(tmp_path: Path) -> None:
    async def scene() -> None:
        origin, other = busy(), Engine(pause_s=0.01)
        async with net(tmp_path, origin, other, ledger={"exposure": 2.5}) as n:  # a request takes 1
            answers = await asyncio.gather(*(n.ask() for _ in range(6)))
            assert [status for status, _ in answers] == [200] * 6
            assert other.begun == 2 and origin.begun == 4
            assert await n.paid() == pytest.approx(await cost(n, WORDS, 2))
            assert (await n.ask())[0] == 200 and other.begun == 3  # it may again
        agree(n)

    play(scene)


class Longer(Engine):
    """One that writes a few words, and then more at once than it was asked for."""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        self.begun += 1
        for count in (3, 200):
            await response.write(b'data: {"choices": [{"delta": {"content": "word "}}]}\n\n' * count)
            await asyncio.sleep(0.1)
        await response.write(b"data: [DONE]\n\n")
        return response


def test_what_an_engine_writes_beyond_what_is_paid_is_not_sent_and_not_missed(tmp_path: Path) -> None:
    """Its origin did not get it, and owes nothing of it."""

    async def scene() -> None:
        other = Longer()
        async with net(tmp_path, busy(), other) as n:
            await n.ask(stream=True, max_tokens=20)
            assert other.begun == 1

            async def told() -> bool:
                return bool((await n.channel(1, 0))["earned"])

            await n.until(told)
            assert await n.paid() == pytest.approx(await cost(n, 3))
            assert (await n.channel(1, 0))["short"] == 0.0
        agree(n)

    play(scene)


def test_a_node_that_is_stopped_goes_on_where_it_was_and_nothing_is_paid_twice(tmp_path: Path) -> None:
    async def scene() -> None:
        async with net(tmp_path, busy(), Engine()) as n:
            await asyncio.gather(*(n.ask() for _ in range(5)))
            handed_over = (await n.see(0))["requests"]["handed_over"]
            await n.stop(0)
            agree(n)
            await n.start(0)
            await n.until(lambda: n.handed_over_more(0))
            handed_over += (await n.see(0))["requests"]["handed_over"]
            channel = audit(n.file(0)).books.channels[n.keys[1]]
            assert await n.paid() == channel.total / MICRO == pytest.approx(await cost(n, WORDS, handed_over))
        assert settled(*agree(n))

    play(scene)


def test_nobody_takes_work_that_is_not_paid(tmp_path: Path) -> None:
    async def scene() -> None:
        other = Engine()
        async with net(tmp_path, busy(), other) as n:
            await n.stop(0)
            del n.configs[0]["ledger"]
            await n.start(0)

            async def there() -> bool:
                return any(peer["there"] for peer in (await n.see(0))["peers"])

            await n.until(there)

            async def refused() -> bool:  # a peer that was just heard may not be a candidate yet
                assert (await n.ask())[0] == 200
                page = await (await n.session.get(n.url(1) + "/metrics")).text()
                return "wwwserve_offers_refused_total 0.0" not in page

            await n.until(refused)
            assert other.begun == 0

    play(scene)


def test_stake_counts_as_it_is_signed_not_as_it_is_advertised(tmp_path: Path) -> None:
    async def scene() -> None:
        async with net(tmp_path, Engine(), Engine(), stake=1000.0, market=MARKET | {"stake_rule": "fixed"}) as n:

            async def staked() -> bool:
                return bool((await n.see(0))["peers"][0]["stake"] == 4.0)

            await n.until(staked)  # all that the genesis lets it stake, of a thousand

    play(scene)


def test_two_with_limits_of_each_other_pay_within_them(tmp_path: Path) -> None:
    async def scene() -> None:
        async with net(tmp_path, busy(), Engine()) as n:
            for k in range(2):
                await n.stop(k)
                n.file(k).unlink()
                n.configs[k]["ledger"] = {
                    "file": str(n.file(k)),
                    "limits": {n.keys[1 - k]: {"ours": 30.0 - 10 * k, "theirs": 20.0 + 10 * k}},
                }
            for k in range(2):
                await n.start(k)

            async def opened() -> bool:
                return bool(await n.channel(0, 1)) and bool(await n.channel(1, 0))

            await n.until(opened)
            await n.until(lambda: n.handed_over_more(0))
            found = await n.channel(0, 1)
            total = sum(found[name] for name in ("free", "escrow", "peer_free", "peer_escrow"))
            assert total == pytest.approx(50.0)

    play(scene)


def test_limits_that_both_raise_are_added_and_a_channel_is_closed_and_opened_again_by_node_yaml(tmp_path: Path) -> None:
    async def scene() -> None:
        async with net(tmp_path, busy(), Engine()) as n:

            async def started(*given: dict[str, Any]) -> None:
                for k, ledger in enumerate(given):
                    await n.stop(k)
                    n.configs[k]["ledger"] = {"file": str(n.file(k)), **ledger}
                    await n.start(k)

            async def seen(**wanted: Any) -> bool:
                both = await n.channel(0, 1), await n.channel(1, 0)
                return all(each and {name: each[name] for name in wanted} == wanted for each in both)

            def limits(k: int, credits: float) -> dict[str, Any]:
                return {"limits": {n.keys[1 - k]: {"ours": credits, "theirs": credits}}}

            await n.until(lambda: n.handed_over_more(0))
            raised = [limits(k, 150.0) for k in range(2)]
            await started(*raised)
            await n.until(lambda: seen(granted=150.0, refills=1, closed=""))
            await started(raised[0] | {"closed": [n.keys[1]]}, raised[1])
            await n.until(lambda: seen(granted=150.0, closed="by both"))
            before = (await n.see(0))["requests"]["handed_over"]
            assert [status for status, _ in await asyncio.gather(*(n.ask() for _ in range(4)))] == [200] * 4
            assert (await n.see(0))["requests"]["handed_over"] == before  # it serves its users on its own engine
            await started(*raised)
            await n.until(lambda: seen(closed=""))
            await n.until(lambda: n.handed_over_more(before))
            paid = await n.paid()
            assert paid > 0.0 and (await n.channel(0, 1))["free"] == pytest.approx(150.0 - paid)
        assert settled(*agree(n))

    play(scene)


@pytest.mark.parametrize(
    ("ledger", "message"),
    [
        ({"file": "f"}, "either a genesis or limits"), ({"file": "f", "genesis": "none"}, "must be a file, got 'none'"),
        ({"file": "", "limits": {"x": {"ours": 1, "theirs": 1}}}, "ledger.file must be a file"),
        ({"file": "f", "limits": {"x": {"ours": 1, "theirs": 1}}}, "by public keys, got 'x'"),
        ({"file": "f", "limits": {Identity.generate().name: {"ours": -1, "theirs": 1}}}, "0 to 1,000,000,000"),
        ({"file": "f", "limits": {Identity.generate().name: {"ours": 1, "theirs": 1}}, "exposure": 0}, "above 0"),
        ({"file": "f", "genesis": __file__, "closed": ["x"]}, "got 'x'"),
        ({"file": "f", "genesis": __file__, "close_after_s": -1}, "at least 0"),
        ({"file": "f", "limits": {"x": {"ours": 1}}}, "missing required field `theirs`"),
    ],
)  # fmt: skip
def test_a_ledger_that_cannot_be_is_refused(ledger: dict[str, Any], message: str) -> None:
    whole = {"name": "n", "key": "k", "engine": {"url": "http://e", "profile": PROFILE}, "ledger": ledger}
    with pytest.raises(config.ConfigError, match=message):
        config.parse(whole, "test")


def test_a_peer_that_advertises_load_it_does_not_have_is_found_out_by_what_it_delivers() -> None:
    parsed = config.parse({"name": "n", "key": "k", "engine": {"url": "http://e", "profile": PROFILE}}, "test")

    def provider(rule: str) -> NodeProvider:
        made = NodeProvider(Rule(rule), parsed.engine_profile(), parsed.agreed(), credit=1e6)
        made.scraped(0.0, 8.0, 200.0, 0.0)
        idle = NodeProvider(Rule(rule), parsed.engine_profile(), parsed.agreed(), stake=1.0)
        for name in ("honest", "liar"):  # both say that they are idle
            made.heard(name, idle.advertise(0.0), 0.0, frozenset({MODEL}))
        return made

    def chosen(made: NodeProvider, took_s: float) -> Counter[str | None]:
        for _ in range(20):
            for name, seconds in (("honest", 3.0), ("liar", took_s)):
                made.offer(one := made.new(None, 0, 100, 100, 0.0, MODEL), name)
                made.accepted(one, 0.0, Promise(3.0, 0.0))
                made.answered(one, seconds, 1)
                made.release(one)
        found: Counter[str | None] = Counter()
        for _ in range(20):
            made.arrived(made.new(None, 0, 100, 100, 0.0, MODEL))
            decision = made.decide(0.0)
            assert decision is not None
            found[decision.peer] += 1
            made.lost(decision.request)
            made.release(decision.request)
        return found

    assert chosen(provider("earliest_finish_trust"), took_s=60.0) == {"honest": 20}
    assert chosen(provider("earliest_finish_trust"), took_s=3.0)["liar"] > 0  # who keeps its promises is asked


@pytest.mark.parametrize(
    ("payment", "header", "tariff", "most", "reason"),
    [
        (QUOTED, b"v3 1 1000000", (0, 0, 2 * MICRO), 500, ""),
        (QUOTED, b"v3 1 1000000", (0, 0, 2 * MICRO), 501, "do not pay 501 tokens"),
        (LATENESS, b"v3 1 1000000", (0, 0, 2 * MICRO), None, "do not pay any number of tokens"),
        (LATENESS, b"v3 1 1000000", (10_000, 0, 2 * MICRO), 500, "do not pay 500 tokens"),
        (LATENESS, b"v3 1 1000000", (10_000, 0, 2 * MICRO), 499, ""),
        (LATENESS, b"v3 1 1000000", (0, 0, MICRO), 5, "none that was advertised lately"),
        (PER_REQUEST, b"v3 1 1000000", (0, 0, 0), None, ""),
        (PER_REQUEST, b"v3 1 999999", (0, 0, 0), None, "do not pay"),
        (QUOTED, b"1 1000000 2000000", (0, 0, 2 * MICRO), 1, "version v1 of the ledger's statements, expected v3"),
        (QUOTED, b"v4 1 1000000", (0, 0, 2 * MICRO), 1, "version v4 of the ledger's statements, expected v3"),
        (QUOTED, b"v3 -1 1", (0, 0, 2 * MICRO), 1, "is not v3 ID AMOUNT"),
        (QUOTED, b"", (0, 0, 2 * MICRO), 1, "is not v3 ID AMOUNT"),
    ],
)
def test_offers_are_taken_at_tariffs_of_late_for_no_more_tokens_than_the_escrow_pays(
    payment: int, header: bytes, tariff: tuple[int, int, int], most: int | None, reason: str
) -> None:
    """What is not bounded would be paid for in part alone."""
    accounts = Accounts(SimpleNamespace(payment=payment), None)  # type: ignore[arg-type]
    for advertised in ((9, 9, 9), (0, 0, 2 * MICRO), (10_000, 0, 2 * MICRO), (7, 7, 7)):
        accounts.advertised(advertised)
    if reason:
        with pytest.raises(LedgerError, match=reason):
            accounts.offered(header, tariff, 100, most)
    else:
        assert accounts.offered(header, tariff, 100, most) == (1, Terms(tariff, 100, MICRO))
    for _ in range(4):
        accounts.advertised((7, 7, 7))
    if payment != PER_REQUEST:
        with pytest.raises(LedgerError):
            accounts.offered(header, tariff, 100, most)


def test_who_is_later_than_promised_is_paid_less_and_both_agree(tmp_path: Path) -> None:
    async def scene() -> None:
        market = MARKET | {"payment": "lateness"}
        async with net(tmp_path, busy(), Engine(pause_s=0.04), market=market, compute_cost_per_ktok=PRICE) as n:
            await n.until(lambda: n.handed_over_more(0, stream=True))
            await n.paid()
        _, executor = agree(n)
        channel = executor.books.channels[n.keys[0]]
        assert channel.short == 0
        late = 0
        for entry in SqliteJournal(n.file(1), read_only=True).entries():
            if b'"type":"credit"' in entry.body[:20]:
                for receipt in msgspec.json.decode(entry.body, type=Credited).receipts:
                    promised_s = receipt.promise.ttft_s + receipt.promise.tpot_s * (receipt.served.tokens - 1)
                    price = price_of(
                        LATENESS, np.array(receipt.terms.tariff), receipt.served.prompt, 0, receipt.served.tokens
                    )
                    took = receipt.served.took_ms / 1000 / promised_s
                    assert took > 1.2 and receipt.due == pytest.approx(price * max(0.0, 2.0 - took), rel=0.01, abs=2)
                    late += 1
        assert late

    play(scene)


def test_the_number_of_a_request_that_a_peer_still_has_is_not_given_away() -> None:
    """The slower one of a duel ends when the user has long had an answer; then other requests are with peers."""
    parsed = config.parse({"name": "n", "key": "k", "engine": {"url": "http://e", "profile": PROFILE}}, "test")
    made = NodeProvider(Rule("single"), parsed.engine_profile(), parsed.agreed(), credit=1e6)
    made.heard("peer", made.advertise(0.0), 0.0, frozenset({MODEL}))
    slow = made.new(None, 0, 100, 100, 0.0, MODEL)
    made.offer(slow, "peer")
    made.release(slow)
    later = [made.new(None, 0, 100, 100, 0.0, MODEL) for _ in range(40)]
    assert slow not in later
    for each in later:
        made.offer(each, "peer")
    made.lost(slow)
    assert all(made.is_out(each) for each in later) and not made.is_out(slow)
    assert made.new(None, 0, 100, 100, 0.0, MODEL) == slow
