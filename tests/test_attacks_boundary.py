"""What strangers and peers with a valid key tried on a node's edge, each attack with others of its kind."""

import asyncio
import contextlib
import gc
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
from aiohttp import web
from duel_cases import case_of, staked
from stub_nodes import GOOD, MODEL, Net, Stub, busy, net, play
from test_peers import BODY, CHAT, again, error_of, peer_of, raw

from wwwserve.agents.decision import HOLD
from wwwserve.agents.hardware import profile as engine_profile
from wwwserve.agents.knowledge import (
    AD_MEAN_OUTPUT,
    AD_MEAN_PROMPT,
    AD_REUSE_S,
    AD_STAKE,
    AD_UNSHARED,
    ADVERT_SIZE,
    write_profile,
)
from wwwserve.agents.rules import Rule
from wwwserve.serving import config, node
from wwwserve.serving.cooling import Cooling
from wwwserve.serving.delegation import PROMPT, TARIFF, TPOT, TTFT
from wwwserve.serving.dispatcher import Dispatcher
from wwwserve.serving.duel.evidence import Record
from wwwserve.serving.duel.judge import text_of
from wwwserve.serving.duel.messages import JUDGE_PATH, Declined, Pair
from wwwserve.serving.http import messages as messages_module
from wwwserve.serving.http.asgi import WATCH
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import SIGNATURE, Claim, Messages, Refusals, Refused
from wwwserve.serving.http.quotas import BURST, FORGED_PER_S, Quotas
from wwwserve.serving.http.routes import App
from wwwserve.serving.http.sse import AnswerMeter
from wwwserve.serving.http.transport import AiohttpResponse, AiohttpTransport
from wwwserve.serving.http.upstream import DirectTransport
from wwwserve.serving.ledger.accounts import LEDGER_PATH, Accounts
from wwwserve.serving.ledger.exchange import Telling
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.market import Market
from wwwserve.serving.membership import zenoh
from wwwserve.serving.membership.heartbeat import BEAT_PATH, Advert, decode, signed
from wwwserve.serving.membership.zenoh import ZenohMembership
from wwwserve.serving.metrics import Metrics
from wwwserve.serving.node_provider import NodeProvider
from wwwserve.serving.reasons import Reasons

GET = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"


# Connections that do nothing.


@contextlib.asynccontextmanager
async def fresh() -> AsyncIterator[aiohttp.ClientSession]:
    """A client with connections of its own."""
    async with aiohttp.ClientSession() as session:
        yield session


def port_of(n: Net) -> int:
    return int(n.urls[0].rpartition(":")[2])


def test_many_requests_to_go_on_in_another_protocol_at_once_are_all_answered() -> None:
    """More than Python calls functions in each other, in one piece."""
    asked = b"GET /health/live HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"

    async def scene() -> None:
        async with net(Stub()) as n:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(n))
            writer.write(asked * 1500 + GET.replace(b"host: a", b"host: a\r\nconnection: close"))
            async with asyncio.timeout(60):
                came = await reader.read()
            assert came.count(b"HTTP/1.1 200 OK") == 1501
            writer.close()

    play(scene)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat", GET, b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\n{"])
@pytest.mark.parametrize("limit", ["connections", "connections_per_address"])
def test_connections_on_which_nothing_is_under_way_shut_nobody_out(sent: bytes, limit: str) -> None:
    """Without a byte, with half a head, kept after an answer, and with half a body."""

    async def scene() -> None:
        async with net(Stub(), Stub(), limits={limit: 24}) as n, contextlib.AsyncExitStack() as stack:
            writers = []
            for _ in range(60):
                _, writer = await asyncio.open_connection("127.0.0.1", port_of(n))
                stack.callback(writer.transport.abort)
                writer.write(sent)
                writers.append(writer)
            await asyncio.sleep(0.2)
            for _ in range(5):
                async with fresh() as session:
                    body = {"model": MODEL, "messages": []}
                    async with session.post(n.urls[0] + "/v1/chat/completions", json=body) as response:
                        assert response.status == 200, await response.text()
            await asyncio.sleep(1.6)  # longer than a peer may be silent
            assert all([peer["there"] for k in (0, 1) for peer in (await n.see(k))["peers"]])

    play(scene)


def test_requests_under_way_keep_their_connections_and_leave_places_for_peers() -> None:
    async def scene() -> None:
        async with net(Stub(tokens=400, pause_s=0.05), Stub(), limits={"connections": 8}) as n:
            n.running[1].cancel()
            await asyncio.gather(n.running[1], return_exceptions=True)
            peer, run = peer_of(n, 1), (await n.see())["run"]
            await n.session.close()
            async with contextlib.AsyncExitStack() as stack:
                streams = []
                for _ in range(6):
                    session = await stack.enter_async_context(aiohttp.ClientSession())
                    body = {"model": MODEL, "messages": [], "stream": True}
                    streams.append(await session.post(n.urls[0] + "/v1/chat/completions", json=body))
                assert error_of(await raw(n.urls[0], GET))[0] == 503  # a place for peers is left, not for others
                for path in (b"/peer/v1/chat/completions", b"/peer/ledger"):
                    answer = await raw(n.urls[0], b"POST " + path + b" HTTP/1.1\r\nconnection: close\r\n\r\n")
                    assert error_of(answer)[0] in (403, 404)
                n.session = await stack.enter_async_context(aiohttp.ClientSession())
                terms = {PROMPT: "12", TARIFF: "1000000 250000 1000000"}
                terms[SIGNATURE] = peer.sign(n.keys[0].name, run, CHAT, terms, BODY)
                status, answer, _ = await again(n, terms)
                assert status in (200, 409), answer  # as the policy says
                async with fresh() as n.session:  # a second connection of a peer whose share is one
                    terms.pop(SIGNATURE)
                    terms[SIGNATURE] = peer.sign(n.keys[0].name, run, CHAT, terms, BODY)
                    status, answer, _ = await again(n, terms)
                    assert status == 429 and "its share of the connections" in answer["error"]["message"]
                for stream in streams:
                    assert stream.status == 200 and await stream.content.readline()
                    stream.close()

    play(scene)


# Names that cost nothing.


def heard_of(membership: ZenohMembership, identity: Identity) -> None:
    """An advert as it comes by Zenoh."""
    load = [1.0] * ADVERT_SIZE
    advert = Advert(
        identity.name, "x", "http://127.0.0.1:1", ("m",), 1, 1, tuple(load), 0.0, round(membership.wall_clock() * 1e6)
    )
    membership._take(membership._key("advert", identity.name), signed(identity, advert))


def test_names_that_fell_silent_make_place_for_newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zenoh, "MOST_PEERS", 50)
    refused, forgotten, now = list[Refused](), list[str](), [1e9]
    told, staying, newcomer = (Identity.generate() for _ in range(3))
    clock = lambda: now[0]  # noqa: E731
    membership = ZenohMembership(
        Identity.generate(), "n", None, clock, refused.append, clock, [told.name]  # type: ignore[arg-type]
    )  # fmt: skip
    membership.forgotten = forgotten.append
    heard_of(membership, staying)
    crowd = [Identity.generate() for _ in range(49)]
    for each in crowd:
        heard_of(membership, each)
    heard_of(membership, newcomer)
    assert refused[-1].kind == "stranger" and not membership.knows(newcomer.name)
    heard_of(membership, told)  # who always has a place
    assert told.name in membership.beaten_s and len(membership.names) == 50
    for _ in range(4):
        now[0] += zenoh.FORGET_S / 3.5
        heard_of(membership, staying)
    for name in list(membership.beaten_s):
        if name not in (staying.name, told.name):
            membership.left(name)
    heard_of(membership, newcomer)
    assert membership.knows(newcomer.name) and forgotten == [crowd[0].name]
    for _ in range(200):  # and again, for ever
        heard_of(membership, Identity.generate())
    assert membership.knows(staying.name) and membership.knows(newcomer.name) and len(forgotten) == 49
    assert max(len(each) for each in (membership.names, membership._last, membership._urls)) <= 51


def test_what_is_kept_of_names_that_were_forgotten_does_not_grow() -> None:
    clock = [1e9]
    known = set[str]()
    messages = Messages(Identity.generate(), known.__contains__, lambda: clock[0])
    provider = NodeProvider(Rule("earliest_finish"), engine_profile("rtx-4090", "qwen3-8b", 8), Market(
        known=config.parse(GOOD, "t").agreed().known, deadlines=np.array([[10.0]])
    ))  # fmt: skip
    advert = provider.advertise(0.0)
    for k in range(300):
        peer = Messages(Identity.generate(), lambda name: True, lambda: clock[0])
        known.add(peer.name)
        sealed = messages.sign(peer.name, peer.run, CHAT, {}, BODY)
        peer_sealed = peer.sign(messages.name, messages.run, CHAT, {}, BODY)
        headers = [(SIGNATURE.encode(), peer_sealed.encode())]
        messages.open(CHAT, headers)
        provider.heard(peer.name, advert, 0.0, frozenset({"m"}))
        request = provider.new(k, 0, 100, 200, 0.0, "m")
        provider.arrived(request)
        decision = provider.decide(0.0)
        assert decision is not None
        if decision.peer is not None:
            assert decision.peer == peer.name  # none that was forgotten is a candidate
            provider.refused(request)
        provider.release(request)
        known.remove(peer.name)
        messages.forget(peer.name)
        provider.forget(peer.name)
        known.add(peer.name)
        with pytest.raises(Refused, match="seen already"):  # as long as it could be a replay
            messages.open(CHAT, headers)
        again = messages.sign(peer.name, peer.run, CHAT, {}, BODY)
        assert int(again.split()[5]) > int(sealed.split()[5])
        known.remove(peer.name)
        messages.forget(peer.name)
        clock[0] += 1.0
    assert len(messages._windows) < 70 and len(messages._numbers) == 0
    assert len(provider.names) <= 3 and len(provider.peers.adverts) <= 3


def test_what_is_shown_of_names_that_were_forgotten_does_not_grow() -> None:
    """Judges and executors of duels, whose ledgers do not agree with ours, on the pages for the operator."""
    metrics, parts = Metrics(), SimpleNamespace(forget=lambda name: None)
    ledger: Any = SimpleNamespace()
    accounts, duels = Accounts(ledger, ledger), SimpleNamespace(records={})
    cooling = Cooling(lambda: 0.0)
    node: Any = SimpleNamespace(
        provider=parts, prefixes=parts, messages=parts, metrics=metrics, accounts=accounts,
        delegation=SimpleNamespace(duels=duels, cooling=cooling), labels={},
    )  # fmt: skip
    sizes = []
    for k in range(20):
        name = f"peer {k}"
        node.labels[name] = "label"
        metrics.duelled(name, k % 2 == 0)
        duels.records[name] = Record()
        cooling.failed(name)
        accounts._again_s[name], accounts._reasons[name] = 1.0, "no"
        Dispatcher.forget(node, name)
        sizes.append((len(duels.records), len(accounts._again_s), len(accounts._reasons), len(node.labels)))
    assert sizes == [(0, 0, 0, 0)] * 20 and not cooling._records
    page = metrics.page(held=0, engine_up=True, engines={}, peers=0, peers_known=0)
    assert b"peer 1" not in page and b"wwwserve_duel_answers" in page


def test_a_flood_by_zenoh_waits_in_few_places_and_all_keys_have_their_turn() -> None:
    async def scene() -> None:
        taken, dropped = list[tuple[str, bytes | None]](), list[int]()
        inbox = zenoh.Inbox(asyncio.get_running_loop(), lambda key, body: taken.append((key, body)), dropped.append)
        for k in range(10_000):
            inbox.put("loud", b"%d" % k)
        inbox.put("quiet", b"honest")
        await asyncio.sleep(0.05)
        assert dropped == [10_000 - zenoh.MOST_WAITING]
        assert taken == [("loud", b"0"), ("quiet", b"honest"), ("loud", b"1")]
        for k in range(zenoh.MOST_KEYS + 10):
            inbox.put(str(k), None)
        await asyncio.sleep(0)
        assert dropped[1:] == [10]
        assert len(taken) == 3 + zenoh.AT_ONCE  # then others have a turn
        while len(taken) < 3 + zenoh.MOST_KEYS:
            await asyncio.sleep(zenoh.PAUSE_S)
        assert [key for key, _ in taken[3:]] == [str(k) for k in range(zenoh.MOST_KEYS)]

    play(scene)


# What a peer makes of a node's engine, of its users' prompts and of their answers.


class Evil:
    """A peer with a valid key that answers as it likes."""

    def __init__(self, identity: Identity) -> None:
        self.identity, self.messages = identity, Messages(identity, lambda name: True)
        self.seen: list[tuple[str, str, bytes]] = []
        self.answer: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None
        self.change: dict[int, float] = {}  # columns of its adverts
        self.url = ""

    async def any(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.path == BEAT_PATH:
            return web.Response(status=204)
        self.seen.append((request.method, request.path, body))
        return await self.answer(request) if self.answer is not None else web.Response(status=409)

    def head(self, request: web.Request) -> dict[str, str]:
        """Of an answer, with a promise."""
        sender, _, signature = request.headers[SIGNATURE].partition(" ")
        claim = Claim(sender, b"", signature.rpartition(" ")[2].encode())
        promise = [(TTFT.encode(), b"0.1"), (TPOT.encode(), b"0.01")]
        code = self.messages.sign_answer(claim, promise)
        return {TTFT: "0.1", TPOT: "0.01", SIGNATURE: code.decode(), "content-type": "application/octet-stream"}

    def advert(self, number: int) -> bytes:
        load = np.zeros(ADVERT_SIZE)
        write_profile(load, engine_profile("rtx-4090", "qwen3-8b", 8).row(), 1.0)
        load[[AD_MEAN_PROMPT, AD_MEAN_OUTPUT, AD_UNSHARED, AD_STAKE, AD_REUSE_S]] = 10, 40, 1, 4, 1e5
        for column, value in self.change.items():
            load[column] = value
        run, sent_us = self.messages.run, round(time.time() * 1e6)
        advert = Advert(
            self.identity.name, "evil", self.url, (MODEL,), run, number, tuple(load.tolist()), 0.0, sent_us
        )  # fmt: skip
        return signed(self.identity, advert)

    async def beat(self, url: str) -> None:
        async with aiohttp.ClientSession() as session:
            for number in itertools.count(1):
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.post(url + BEAT_PATH, data=self.advert(number)) as response:
                        await response.read()
                await asyncio.sleep(0.2)

    @contextlib.asynccontextmanager
    async def served(self, port: int) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self.any)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
        try:
            yield
        finally:
            await runner.cleanup()


@contextlib.asynccontextmanager
async def beside_evil(stub: Stub, **more: Any) -> AsyncIterator[tuple[Net, Evil]]:
    """A node, and a peer of it whose key is in evil hands."""
    async with net(stub, Stub(), **more) as n:
        n.running[1].cancel()
        await asyncio.gather(n.running[1], return_exceptions=True)
        evil = Evil(n.keys[1])
        evil.url = n.urls[1]
        async with evil.served(int(n.urls[1].rpartition(":")[2])):
            beating = asyncio.create_task(evil.beat(n.urls[0]))
            try:

                async def there() -> bool:
                    return any([peer["label"] == "evil" and peer["there"] for peer in (await n.see())["peers"]])

                await n.until(there)
                yield n, evil
            finally:
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)


def pair_for(origin: Identity, path: str, request: str) -> bytes:
    """Two answers of executors that nobody knows, for a judge."""
    one, other = Identity.generate(), Identity.generate()
    case = case_of(Stakes({}), origin, one, other, request=request.encode())
    return msgspec.json.encode(Pair(case, path, False, request, case.a.executor, case.b.executor))


SPLIT = "/nothing HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\nDELETE /any HTTP/1.1\r\nhost: a\r\n\r\nPOST /tail"
WANTED = {
    "another path": ("/v1/load_lora_adapter", {"lora_name": "x"}),
    "two requests": (SPLIT, {}),
    "a path that goes up": ("/v1/chat/completions/../../metrics", {}),
    "a transfer of its cache": ("/v1/chat/completions", {"kv_transfer_params": {"remote_host": "10.0.0.1"}}),
    "an image from elsewhere": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://10.0.0.1/x"}}]}]}),
    "to be first": ("/v1/chat/completions", {"priority": -9}),
}  # fmt: skip


@pytest.mark.parametrize("wanted", WANTED)
def test_a_peer_makes_an_engine_do_nothing_but_answer_prompts(wanted: str) -> None:
    path, more = WANTED[wanted]

    async def scene() -> None:
        async with beside_evil(Stub(), keys=["user"]) as (n, evil):
            run = (await n.see())["run"]
            request = json.dumps({"model": MODEL, "messages": []} | more)
            asks = [(JUDGE_PATH, pair_for(evil.identity, path, request))]
            if path == "/v1/chat/completions":
                asks.append((CHAT, request.encode()))
            for where, sent in asks:
                terms = {PROMPT: "12", TARIFF: "1000000 250000 1000000"}
                terms[SIGNATURE] = evil.messages.sign(n.keys[0].name, run, where, terms, sent)
                async with n.session.post(n.urls[0] + where, data=sent, headers=terms) as response:
                    assert response.status in (400, 404, 409), await response.text()
            assert n.stubs[0].bodies == [] and n.stubs[0].begun == 0
            assert (await n.ask(headers={"authorization": "Bearer user"}))[0] == 200

    play(scene)


def test_what_is_more_than_a_prompt_is_answered_at_home_and_goes_to_no_peer() -> None:
    async def scene() -> None:
        async with net(busy(), Stub()) as n:
            assert json.loads((await n.ask())[1])["from"] == n.stubs[1].url
            status, body, _ = await n.ask(priority=5)
            assert status == 200 and json.loads(body)["from"] == n.stubs[0].url
            assert len(n.stubs[1].bodies) == 1

    play(scene)


LINES = {
    "no content": b'{"status": 204, "type": "text/plain"}',
    "not modified": b'{"status": 304, "type": "application/json"}',
    "a page": b'{"status": 200, "type": "text/html"}',
    "two heads": b'{"status": 200, "type": "text/plain\\r\\nset-cookie: a=b"}',
    "a redirect": b'{"status": 302, "type": "text/plain"}',
}


@pytest.mark.parametrize("line", LINES)
def test_users_get_no_answer_that_their_client_would_read_as_two_or_as_a_page(line: str) -> None:
    """After 204 and 304 no body follows: what a peer sent as one would be the next user's answer."""
    poison = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison"

    async def scene() -> None:
        async with beside_evil(busy()) as (n, evil):

            async def answer(request: web.Request) -> web.StreamResponse:
                return web.Response(body=LINES[line] + b"\n" + poison, headers=evil.head(request))

            evil.answer = answer
            body = json.dumps({"model": MODEL, "messages": []}).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n" % len(body)
            seen = await raw(n.urls[0], head + b"\r\n" + body, head + b"connection: close\r\n\r\n" + body, pause_s=0.5)
            assert any(path == CHAT for _, path, _ in evil.seen)
            assert b"poison" not in seen and b"set-cookie" not in seen.lower() and b"text/html" not in seen
            assert seen.count(b"HTTP/1.1 200") == 2 and seen.count(n.stubs[0].url.encode()) == 2

    play(scene)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_of_a_peer_is_followed_and_no_cookie_kept(status: int) -> None:
    async def scene() -> None:
        async with beside_evil(busy()) as (n, evil), Stub().served() as inner:

            async def answer(request: web.Request) -> web.StreamResponse:
                where = inner.url + "/v1/chat/completions"
                return web.Response(status=status, headers={"location": where, "set-cookie": "a=b; path=/"})

            evil.answer = answer
            for _ in range(2):
                status_, body, _ = await n.ask()
                assert status_ == 200 and json.loads(body)["from"] == n.stubs[0].url
                await asyncio.sleep(0.3)  # until the next advert
            assert inner.begun == 0 and any(path == CHAT for _, path, _ in evil.seen)

    play(scene)


def test_an_address_in_an_advert_cannot_make_other_requests_of_what_goes_there() -> None:
    clock = lambda: 1e9  # noqa: E731
    refused = list[Refused]()
    membership = ZenohMembership(Identity.generate(), "n", None, clock, refused.append, clock)  # type: ignore[arg-type]
    membership.reached_by = "http://10.0.0.1:9000"
    for url in (
        "http://inner/admin?x=",
        "http://inner/admin#",
        "http://169.254.169.254/latest",
        "http://localhost:8000",
    ):
        liar = Evil(Identity.generate())
        load = (1.0,) * ADVERT_SIZE
        advert = Advert(liar.identity.name, "x", url, ("m",), 1, 1, load, 0.0, round(clock() * 1e6))
        membership._take(membership._key("advert", liar.identity.name), signed(liar.identity, advert))
        assert refused[-1].kind == "malformed" and "url is" in str(refused[-1])
    assert not membership.names and len(refused) == 4


@pytest.mark.parametrize("make", [AiohttpTransport, DirectTransport])
@pytest.mark.parametrize("headed", [True, False])
def test_an_answer_is_read_to_its_end_whatever_pieces_it_comes_in(make: Callable[[], Any], headed: bool) -> None:
    whole = json.dumps({"duel": "a" * 50, "vote": 1}).encode() + b" " * 500_000

    async def scene() -> None:
        async def slow(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            if headed:
                response.content_length = len(whole)
            await response.prepare(request)
            for start in (0, 7, 30, 100_000):
                end = {0: 7, 7: 30, 30: 100_000}.get(start, len(whole))
                await response.write(whole[start:end])
                await asyncio.sleep(0.02)
            return response

        app = web.Application()
        app.router.add_post("/", slow)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        transport = make()
        try:
            async with transport.request(
                "POST", f"http://127.0.0.1:{runner.addresses[0][1]}/", headers={}, timeout_s=9.0, read_timeout_s=9.0
            ) as response:
                assert await response.read(1 << 20) == whole
        finally:
            closing = transport.close()
            if closing is not None:
                await closing
            await runner.cleanup()

    play(scene)


# Numbers in adverts.

EXTREMES = (1e308, -1e308, 1e30, 1e15, 1e10, 1e7, 1e6, 0.0, -0.0, -1.0, 1e-7, 1e-14, 1e-308, 5e-324)


@pytest.mark.parametrize("policy", ["competitive", "cooperative", "earliest_finish", "best_value"])
@pytest.mark.parametrize("waiting", [0.0, 200.0])
def test_no_number_in_an_advert_keeps_a_node_from_serving(policy: str, waiting: float) -> None:
    """Each column by itself, and all of them: views stay finite, and what is asked goes somewhere."""
    chosen, settings = node.policy_of(policy), config.parse(GOOD, "t")

    def played(load: Sequence[float]) -> bool:
        try:
            said = tuple(map(float, load))
            advert = decode(msgspec.json.encode(Advert("x" * 43, "l", "http://x", ("m",), 1, 1, said, 0.0, 1)))
        except Refused:
            return False
        provider = NodeProvider(chosen, settings.engine_profile(), settings.agreed(), credit=1e6, stake=1.0)
        provider.scraped(0.0, min(waiting, 8.0), waiting, 20 * waiting, 9 * waiting, 1e6)
        provider.heard("evil", np.array(advert.load), 0.0, frozenset({"m"}))
        provider.heard("good", honest, 0.0, frozenset({"m"}))
        held = 0
        for k in range(4):
            request = provider.new(k, 0, 100, 200, 0.0, "m")
            provider.arrived(request)
            decision = provider.decide(0.0)
            held += decision is None or decision.route == HOLD
            assert all(np.isfinite(array).all() for array in provider.view[:3]), load
            if decision is not None and decision.peer is not None:
                provider.refused(request)
            provider.release(request)
            provider.reopen()
        assert held < 4, load
        return True

    honest = NodeProvider(chosen, settings.engine_profile(), settings.agreed(), stake=1.0).advertise(0.0)
    taken = [played(honest)]
    for value in EXTREMES:
        for column in range(1, ADVERT_SIZE):
            load = honest.copy()
            load[column] = value
            taken.append(played(load))
        taken.append(played(np.full(ADVERT_SIZE, value)))
    assert taken[0] and 0.1 < np.mean(taken) < 0.9  # some are possible, some are not


def test_no_name_of_a_model_says_more_than_a_name() -> None:
    for name in ("", "x" * 300, "\x1b[2J", "a\nb", "é"):
        advert = Advert("x" * 43, "l", "http://x", (name,), 1, 1, (1.0,) * ADVERT_SIZE, 0.0, 1)
        with pytest.raises(Refused, match="serves"):
            decode(msgspec.json.encode(advert))
    advert = Advert("x" * 43, "l", "http://x", ("m",) * 257, 1, 1, (1.0,) * ADVERT_SIZE, 0.0, 1)
    with pytest.raises(Refused, match="serves"):
        decode(msgspec.json.encode(advert))


# Floods.


async def longest_turn_s(of: Awaitable[Any]) -> float:
    """The longest time of this thread's that one turn of the event loop took while something went on."""
    gc.collect()
    gc.freeze()  # as a node does, after its start
    worst, ended = 0.0, asyncio.ensure_future(of)
    try:
        while not ended.done():
            before_s = time.thread_time()
            await asyncio.sleep(0)
            worst = max(worst, time.thread_time() - before_s)
    finally:
        gc.unfreeze()
    await ended
    return worst


def app_of(known: Callable[[str], bool], clock: Callable[[], float]) -> tuple[App, Messages, list[str]]:
    """An application that knows some peers, and the kinds of what it refused."""
    refused = list[str]()
    messages = Messages(Identity.generate(), known)

    async def vote(origin: str, body: bytes, charge: object) -> bytes:
        raise Declined("not now")

    pool = SimpleNamespace(vote=vote)
    dispatcher: Any = SimpleNamespace(
        messages=messages, accounts=None, serves=[MODEL], judge_pool=pool, reasons=Reasons()
    )  # fmt: skip
    app = App(dispatcher, config.parse(GOOD, "t"), Refusals(refused.append, clock))
    app.quotas = Quotas(1000.0, 1 << 20, clock)
    return app, messages, refused


async def post(app: App, path: str, headers: dict[str, str], body: bytes, address: str = "6.6.6.6") -> int:
    """Status of an answer of an application to a request that is all there."""
    statuses = list[int]()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http", "path": path, "method": "POST", "headers": raw_headers, "client": (address, 9),
        WATCH: lambda hung_up: None,
    }  # fmt: skip
    await app(scope, receive, send)
    return statuses[0]


@pytest.mark.parametrize("kind", ["signed", "forged", "again"])
def test_a_flood_from_one_peer_costs_few_signatures_and_takes_nothing_from_others(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages that it signed, in its name but forged, and the same one again and again."""
    checked = list[str]()
    real = messages_module.verify
    monkeypatch.setattr(messages_module, "verify", lambda *given: (checked.append(given[0]), real(*given))[1])
    loud, quiet, thief = (Messages(Identity.generate(), lambda name: True) for _ in range(3))
    thief.name = loud.name

    async def scene() -> None:
        app, messages, refused = app_of(lambda name: name in (loud.name, quiet.name), lambda: 0.0)

        def sealed(by: Messages) -> dict[str, str]:
            return {SIGNATURE: by.sign(messages.name, messages.run, JUDGE_PATH, {}, b"{}")}

        count, one = 1500, sealed(loud)
        headers = [one if kind == "again" else sealed(loud if kind == "signed" else thief) for _ in range(count)]
        sent = asyncio.gather(*(post(app, JUDGE_PATH, each, b"{}") for each in headers))
        worst_s = await longest_turn_s(sent)
        print(f"{kind}: {worst_s * 1e3:.0f} ms for all {count} at one go")
        most = {"signed": BURST, "forged": FORGED_PER_S, "again": 1}[kind]
        assert len(checked) == most and len(refused) >= count - most
        assert set(refused) == {"signed": {"crowded"}, "forged": {"forged", "crowded"}, "again": {"replayed"}}[kind]
        for other, address in ((quiet, "1.1.1.1"), *([(loud, "1.1.1.1")] if kind != "signed" else [])):
            before = len(checked)
            await post(app, JUDGE_PATH, sealed(other), b"{}", address)
            assert len(checked) == before + 1

    play(scene)


@pytest.mark.parametrize("path", [JUDGE_PATH, LEDGER_PATH])
def test_what_a_peer_states_counts_by_its_signatures(path: str) -> None:
    peer = Messages(Identity.generate(), lambda name: True)

    async def received(sender: str, body: bytes) -> bytes:
        return b"{}"

    async def scene() -> None:
        app, messages, refused = app_of(lambda name: True, lambda: 0.0)
        app.dispatcher.accounts = SimpleNamespace(received=received, ledger=SimpleNamespace(grants={}))  # type: ignore[assignment]
        stake = staked(peer.identity, 1)
        body = msgspec.json.encode(
            Telling((msgspec.json.encode(stake).decode(),) * 400) if path == LEDGER_PATH else [stake] * 400
        )
        statuses = []
        for _ in range(3):
            headers = {SIGNATURE: peer.sign(messages.name, messages.run, path, {}, body)}
            statuses.append(await post(app, path, headers, body))
        assert statuses[0] != 429 and statuses[1:] == [429, 429] and refused == ["crowded"] * 2

    play(scene)


@pytest.mark.parametrize(
    "part", [b"\n\n", b'data: {"choices": [' + b"[]," * 20_000 + b"[]]}\n\n", b"data: " + b"[" * 2**20]
)  # fmt: skip
def test_an_answer_that_is_judged_keeps_no_judge_from_all_else(part: bytes) -> None:
    said = b'data: {"choices": [{"delta": {"content": "%b"}}]}\n\n'
    body = said % b"so" + part * (2**20 // len(part)) + b"\n\n" + said % b"on"

    async def scene() -> None:
        texts, worst_s = list[str](), list[float]()

        async def read() -> None:
            texts.append(await text_of("/v1/chat/completions", True, body))

        for _ in range(3):
            worst_s.append(await longest_turn_s(read()))
        assert min(worst_s) < 0.05 and texts == ["soon"] * 3

    play(scene)


def test_a_peers_stream_of_many_events_comes_a_little_at_a_time() -> None:
    body = b"\n\n" * 2**17

    async def all_at_once() -> AsyncIterator[bytes]:
        yield body

    response: Any = SimpleNamespace(
        status=200, headers={}, raw_headers=(), content=SimpleNamespace(iter_any=all_at_once)
    )

    async def scene() -> None:
        meter, pieces = AnswerMeter(), list[bytes]()

        async def read() -> None:
            async for piece in AiohttpResponse(response).iter_any():
                pieces.append(meter.feed(piece))

        assert min([await longest_turn_s(read()) for _ in range(3)]) < 0.05
        assert b"".join(pieces) == body * 3

    play(scene)


def test_bodies_that_never_end_leave_room_for_others() -> None:
    async def scene() -> None:
        async with net(Stub(), limits={"receiving_bytes": 4 * 2**20, "receive_s": 30.0}) as n:
            part = b"x" * 600_000
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 5000000\r\n\r\n"
            async with contextlib.AsyncExitStack() as stack:
                opened = []
                for _ in range(3):
                    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(n))
                    stack.callback(writer.transport.abort)
                    writer.write(head + part)
                    opened.append((reader, writer))
                answered = [asyncio.create_task(reader.readuntil(b"\r\n")) for reader, _ in opened]
                done, pending = await asyncio.wait(answered, timeout=2.0)
                assert [task.result() for task in done] == [b"HTTP/1.1 503 Service Unavailable\r\n"] * len(done)
                assert len(done) == 2 and len(pending) == 1  # this address has its quarter
                for task in pending:
                    task.cancel()
                assert (await n.ask())[0] == 200  # one that comes at one go

    play(scene)
