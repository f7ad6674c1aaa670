"""Peers that cheat with messages, and clients that take what they can: real nodes on loopback."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import pytest
from stub_nodes import MODEL, PROFILE, Net, Stub, busy, net, play

from wwwserve.agents.decision import FIRST_CANDIDATE, HOLD, LOCAL
from wwwserve.agents.hardware import profile as engine_profile
from wwwserve.agents.knowledge import RECORD, RECORD_WEIGHT
from wwwserve.agents.rules import Rule
from wwwserve.agents.view import Views
from wwwserve.eval.live import hostile
from wwwserve.serving import config, delegation, dispatcher
from wwwserve.serving import node as serving_node
from wwwserve.serving.delegation import PEER_PREFIX, PROMPT, TARIFF
from wwwserve.serving.duel.messages import Declined
from wwwserve.serving.fallback import WithFallback
from wwwserve.serving.http import messages as signed
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import SIGNATURE, Messages
from wwwserve.serving.node_provider import NodeProvider

CHAT = PEER_PREFIX + "/v1/chat/completions"
BODY = json.dumps({"model": MODEL, "messages": []}).encode()
Clock = Callable[[], float]


def peer_of(n: Net, k: int, clock: Clock = time.time) -> Messages:
    """Node k's key in other hands, which speak to node 0."""
    return Messages(n.keys[k], lambda name: True, clock)


async def hand_over(n: Net, by: Messages, change: dict[str, str] | None = None, body: bytes = BODY,
                    to: str | None = None, said: dict[str, str] | None = None
                    ) -> tuple[int, dict[str, Any], dict[str, str]]:  # fmt: skip
    """A request to node 0 that says what is `said`, signed by `by` and then changed: status, answer, headers that it
    had."""
    terms = {PROMPT: "12", TARIFF: "1000000 250000 1000000"} | (said or {})
    terms[SIGNATURE] = by.sign(to or n.keys[0].name, (await n.see())["run"], CHAT, terms, BODY)
    return await again(n, terms | (change or {}), body)


async def again(n: Net, terms: dict[str, str], body: bytes = BODY) -> tuple[int, dict[str, Any], dict[str, str]]:
    async with n.session.post(n.urls[0] + CHAT, data=body, headers=terms) as response:
        content = await response.read()
        return response.status, json.loads(content.partition(b"\n")[2] or content), terms


async def refusals(n: Net, kind: str) -> float:
    async with n.session.get(n.urls[0] + "/metrics") as response:
        page = await response.text()
    return sum(
        float(line.split()[-1]) for line in page.splitlines()
        if line.startswith(f'wwwserve_messages_refused_total{{kind="{kind}"}}')
    )  # fmt: skip


def test_cheats_with_messages_are_refused_counted_and_bring_no_work(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with net(Stub(), Stub()) as n:
            n.running[1].cancel()  # its key is in other hands now
            await asyncio.gather(n.running[1], return_exceptions=True)
            peer = peer_of(n, 1)
            status, answer, terms = await hand_over(n, peer)
            assert status == 200 and answer["usage"] and n.stubs[0].begun == 1
            off = peer_of(n, 1, lambda: time.time() - 60.0)
            off.run = peer.run
            stranger = Messages(Identity.generate(), lambda name: True)
            thief = Messages(Identity.generate(), lambda name: True)
            thief.name = peer.name
            for kind, attempt in (
                ("replayed", again(n, terms)),
                ("altered", hand_over(n, peer, body=BODY + b" ")),
                ("forged", hand_over(n, peer, {PROMPT: "1"})),
                ("forged", hand_over(n, thief)),
                ("stale", hand_over(n, off)),
                ("stranger", hand_over(n, stranger)),
                ("misaddressed", hand_over(n, peer, to=n.keys[1].name)),
                ("malformed", hand_over(n, peer, {SIGNATURE: "x"})),
            ):
                before = await refusals(n, kind)
                status, answer, _ = await attempt
                assert (status, answer["error"]["type"]) == (403, kind)
                assert await refusals(n, kind) == before + 1
            assert n.stubs[0].begun == 1
            n.running[0].cancel()
            await asyncio.gather(n.running[0], return_exceptions=True)
            await n.start(0)
            status, answer, _ = await again(n, terms)  # it has forgotten what it has seen
            assert (status, answer["error"]["type"]) == (403, "misaddressed")
            assert n.stubs[0].begun == 1

    with caplog.at_level(logging.WARNING, "wwwserve.signed"):
        play(scene)
    reasons = {record.kind: record.reason for record in caplog.records if record.name == "wwwserve.signed"}  # type: ignore[attr-defined]
    assert reasons["stale"].startswith("it was signed 6") and "clocks is off" in reasons["stale"]
    assert set(reasons) == {"replayed", "altered", "forged", "stale", "stranger", "misaddressed", "malformed"}


def test_a_peer_is_served_at_a_tariff_that_pays() -> None:
    async def scene() -> None:
        async with net(Stub(), Stub(), policy="best_value") as n:
            n.running[1].cancel()
            await asyncio.gather(n.running[1], return_exceptions=True)
            peer = peer_of(n, 1)

            async def priced() -> bool:
                return bool((await n.see())["tariff"]["output"] > 0)

            await n.until(priced)
            seen = await n.see()
            assert seen["payment"] == "lateness" and seen["markup"] == 0.0
            assert seen["margin"] == pytest.approx(0.0, abs=0.5)
            page = await (await n.session.get(n.urls[0] + "/metrics")).text()
            shown = float(page.split('wwwserve_tariff_credits_per_token{tokens="output"} ')[1].split()[0])
            assert 1000 * shown == pytest.approx(seen["tariff"]["output"])
            assert "wwwserve_markup_credits_per_token 0.0" in page
            cost = [round(1e6 * seen["cost"][name]) for name in ("input", "output")]
            for factor, status in ((2.0, 200), (0.4, 409)):
                given, output = (round(factor * each) for each in cost)
                tariff = {TARIFF: f"{given} {given // 4} {output}"}
                assert (await hand_over(n, peer, said=tariff))[0] == status
            for said, message in (
                ({TARIFF: ""}, "header x-wwwserve-tariff"),
                ({TARIFF: "1 1"}, "header x-wwwserve-tariff"),
                ({TARIFF: f"1 1 {10**9 + 1}"}, "header x-wwwserve-tariff"),
                ({PROMPT: "0"}, "1 tokens or more"),
                ({PROMPT: "1e3"}, "1 tokens or more"),
            ):
                status, answer, _ = await hand_over(n, peer, said=said)
                assert status == 400 and message in answer["error"]["message"]
            assert n.stubs[0].begun == 1

    play(scene)


@pytest.mark.parametrize("asked", [
    {"messages": [{"role": "user", "content": "x" * 1600}]}, {"messages": [{"role": "user", "content": "é" * 800}]},
    {"prompt": [7] * 100}, {"prompt": [[7] * 50, [7] * 50]}, {"prompt": ["x" * 800, "y" * 800]},
])  # fmt: skip
def test_a_prompt_that_is_said_to_be_shorter_than_it_can_be_is_not_taken(asked: dict[str, Any]) -> None:
    body = json.dumps({"model": MODEL} | asked, ensure_ascii=False).encode()

    async def scene() -> None:
        async with net(Stub(), Stub()) as n:
            n.running[1].cancel()
            await asyncio.gather(n.running[1], return_exceptions=True)
            peer, run = peer_of(n, 1), (await n.see())["run"]
            for prompt, expected in (("99", 400), ("100", 200)):
                terms = {PROMPT: prompt, TARIFF: "1000000 250000 1000000"}
                terms[SIGNATURE] = peer.sign(n.keys[0].name, run, CHAT, terms, body)
                status, answer, _ = await again(n, terms, body)
                assert status == expected, answer
            assert n.stubs[0].begun == 1

    play(scene)


def test_a_promise_that_was_altered_on_the_way_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever is between two nodes: here in what the executor signs and then sends."""
    real = signed.Messages.sign_answer

    def other(self: Messages, claim: signed.Claim, terms: list[tuple[bytes, bytes]]) -> bytes:
        return real(self, claim, [(name, value + b"9") for name, value in terms])

    async def scene() -> None:
        async with net(busy(), Stub()) as n:
            assert json.loads((await n.ask())[1])["from"] == n.stubs[1].url
            monkeypatch.setattr(signed.Messages, "sign_answer", other)
            status, body, _ = await n.ask()
            assert status == 200 and json.loads(body)["from"] == n.stubs[0].url
            assert await refusals(n, "forged") == 1

    play(scene)


def test_a_node_with_a_clock_60_s_off_serves_its_users_alone_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with net(busy(), Stub()) as n:
            n.running[1].cancel()
            await asyncio.gather(n.running[1], return_exceptions=True)
            await n.start(1, lambda: time.time() + 60.0)

            async def refused() -> bool:
                return await refusals(n, "stale") >= 2

            await n.until(refused)

            async def alone() -> bool:
                return not any([peer["there"] for k in (0, 1) for peer in (await n.see(k))["peers"]])

            await n.until(alone)
            assert all([(await n.see(k))["engine"]["up"] for k in (0, 1)])
            assert (await n.ask())[0] == (await n.ask(1))[0] == 200

    with caplog.at_level(logging.WARNING):
        play(scene)
    reasons = [record.reason for record in caplog.records if record.name == "wwwserve.signed"]  # type: ignore[attr-defined]
    assert any(re.search(r"(59|60)\.\d s after the time here.* clocks is off", each) for each in reasons)
    assert any(record.getMessage() == "a peer answers otherwise" for record in caplog.records)


# Clients.


async def raw(url: str, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """What comes back for parts that are sent one after the other, until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))

    async def write() -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)

    writing = asyncio.create_task(write())
    answer = b""
    try:
        while part := await reader.read(65536):
            answer += part
    except ConnectionError:  # there was more than the node wanted to read
        pass
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        writer.transport.abort()
    return answer


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
GOOD = json.dumps({"model": MODEL, "messages": []}).encode()


@pytest.mark.parametrize(
    ("parts", "status", "expected"),
    [
        ([POST + b"content-length: 5000\r\n\r\n"], 413, "larger than 2000 bytes"),
        ([POST + b"content-length: 99999999999999999999\r\n\r\n"], 400, "not HTTP"),
        ([POST + b"transfer-encoding: chunked\r\n\r\n", *[b"100\r\n" + b"x" * 256 + b"\r\n"] * 30], 413, "larger than"),
        ([POST + b"x-pad: " + b"y" * 3000 + b"\r\n\r\n"], 431, "headers are too large"),
        ([POST + b"x-pad: ", *[b"y" * 65536] * 40], 431, "headers are too large"),
        ([POST + b"x: y\r\n" * 1000 + b"\r\n"], 431, "headers are too large"),
        ([POST + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 1000], 431, "headers are too large"),
        ([b"\x16\x03\x01 hello"], 400, "not HTTP"),
        ([b"GET /\xff HTTP/1.1\r\n\r\n"], 400, "not HTTP"),
        ([POST + b"content-length: 1800\r\n\r\n" + b"[" * 1800], 400, "not JSON"),
        ([POST + b"content-length: 6\r\n\r\n{\"\xff\":1"], 400, "not JSON"),
    ],
)  # fmt: skip
def test_what_is_too_much_is_refused(parts: list[bytes], status: int, expected: str) -> None:
    async def scene() -> None:
        async with net(Stub(), limits={"body_bytes": 2000, "header_bytes": 2000}) as n:
            found, message = error_of(await raw(n.urls[0], *parts, pause_s=0.01))
            assert found == status and expected in message
            assert (await n.ask())[0] == 200

    play(scene)


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([], 408),
        ([b"GET /"] + [b"x"] * 1000, 408),
        ([POST + b"x-a: "] + [b"y"] * 1000, 408),
        ([POST + b"content-length: 1000\r\n\r\n"] + [b"["] * 1000, 408),
        ([POST + b"transfer-encoding: chunked\r\n\r\n"] + [b"1\r\n[\r\n"] * 1000, 408),
    ],
)
def test_who_dribbles_is_cut_off(parts: list[bytes], status: int) -> None:
    async def scene() -> None:
        async with net(Stub(), limits={"receive_s": 0.4}) as n:
            found, message = error_of(await raw(n.urls[0], *parts, pause_s=0.05))
            assert found == status and "did not come within 0.4 s" in message
            assert (await n.ask())[0] == 200

    play(scene)


def test_a_request_that_takes_long_to_answer_is_not_cut_off() -> None:
    async def scene() -> None:
        async with net(Stub(pause_s=0.2), limits={"receive_s": 0.2}) as n:
            assert (await n.ask())[0] == 200
            await asyncio.sleep(0.5)  # a connection that is kept has nothing to send
            assert (await n.ask())[0] == 200

    play(scene)


def test_beyond_the_bound_of_connections_a_client_is_told_so() -> None:
    async def scene() -> None:
        async with net(Stub(tokens=100, pause_s=0.05), limits={"connections": 8, "peer_connections": 2}) as n:
            await n.session.close()
            n.session = aiohttp.ClientSession()
            streams = [asyncio.create_task(n.ask(stream=True)) for _ in range(6)]
            await n.until(lambda: asyncio.sleep(0, n.stubs[0].begun == 6))
            get = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
            assert error_of(await raw(n.urls[0], get)) == (503, "too many connections are open here")
            assert [status for status, _, _ in await asyncio.gather(*streams)] == [200] * 6
            assert (await n.ask(stream=True))[0] == 200
            await n.session.close()

    play(scene)


def test_a_node_stands_hostile_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert hostile.main(["--inputs", "1200", "--seed", "7", "--json", str(out)]) == 0, capsys.readouterr()
    seen = json.loads(out.read_text())
    assert seen["inputs"] == 1200 and seen["faults"] == []
    statuses = seen["statuses"]
    assert statuses["signed_requests"]["402"] >= 1 and statuses["bodies_of_users"]["200"] > 2
    assert statuses["payment_and_duels"]["409"] > 100
    assert statuses["signatures_that_nearly_are"]["403"] > 100
    refused, early = statuses["adverts"]["403"], statuses["adverts"].get("429", 0)  # on a fast machine more are early
    assert refused > 40 and refused + early > 100
    assert statuses["bytes_that_are_no_http"]["400"] > 20
    assert "1200 inputs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (b"", None),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", None),
        (b'HTTP/1.1 404 \r\ncontent-length: 28\r\n\r\n{"error": {"message": "no"}}', None),
        (b"HTTP/1.1 404 \r\ncontent-length: 2\r\n\r\nno", "an error that is not JSON"),
        (b'HTTP/1.1 404 \r\ncontent-length: 15\r\n\r\n{"error": null}', "no message"),
        (b'HTTP/1.1 500 \r\ncontent-length: 28\r\n\r\n{"error": {"message": "no"}}', "500"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nTraceback", "a trace of the stack"),
        (b"hello", "not HTTP"),
    ],
)
def test_faults_are_seen(answer: bytes, fault: str | None) -> None:
    assert hostile.fault_of(answer) == fault


# What a peer says of its answers.


@pytest.mark.parametrize("promised", ["nan", "inf", "-1", "1e308", "x"])
@pytest.mark.parametrize("name", ["TTFT", "TPOT"])
def test_a_promise_that_cannot_be_is_not_believed(name: str, promised: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = signed.Messages.sign_answer
    header = getattr(delegation, name).encode()

    def promise(self: Messages, claim: signed.Claim, terms: list[tuple[bytes, bytes]]) -> bytes:
        terms[:] = [(each, promised.encode() if each == header else value) for each, value in terms]
        return real(self, claim, terms)

    async def scene() -> None:
        async with net(busy(), Stub()) as n:
            monkeypatch.setattr(signed.Messages, "sign_answer", promise)
            status, body, _ = await n.ask()
            assert status == 200 and json.loads(body)["from"] == n.stubs[0].url

    play(scene)


@pytest.mark.parametrize(
    "line",
    [
        b"", b"[]", b"{}", b'{"status": 99, "type": "a"}', b'{"status": 700, "type": "a"}',
        b'{"status": true, "type": "a"}', b'{"status": 200, "type": "a\\r\\nb"}', b'{"status": 200, "type": "\\u0130"}',
        b'{"status": 200, "type": 3}',
    ],
)  # fmt: skip
def test_a_line_before_an_answer_that_cannot_be_is_an_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        delegation.head_line(line)


def test_a_judge_asks_its_engine_for_no_model_that_is_not_served() -> None:
    node: Any = SimpleNamespace(serves=["m"])
    with pytest.raises(Declined, match="not served"):
        asyncio.run(dispatcher.Dispatcher._judge(node, "/v1/completions", {"model": "other"}, ("a", "b")))


@pytest.mark.parametrize("route", [LOCAL, FIRST_CANDIDATE])
def test_where_a_view_is_not_finite_a_rule_decides(route: int) -> None:
    class Learned:
        name = "learned"

        def decide(self, views: Views, active: Any, uniforms: Any, actions: Any) -> None:
            assert all(np.isfinite(each).all() for each in views)
            actions.route[:] = HOLD

    profile = engine_profile("rtx-4090", "qwen3-8b", 8)
    parsed = config.parse({"name": "n", "key": "k", "engine": {"url": "http://e", "profile": PROFILE}}, "t")
    one = NodeProvider(WithFallback(Learned()), profile, parsed.agreed(), credit=1e6)
    one.scraped(0.0, *((0.0, 0.0, 0.0) if route == LOCAL else (8.0, 200.0, 20000.0)))
    peer = NodeProvider(Rule("single"), profile, parsed.agreed(), stake=1.0)
    one.heard("peer", peer.advertise(0.0), 0.0, frozenset({"m"}))
    for finite in (True, False):
        if not finite:
            one.peers.peer_stats[0, RECORD] = np.nan
            one.peers.peer_stats[0, RECORD_WEIGHT] = 1.0
        one.arrived(one.new(finite, 0, 100, 100, 0.0, "m"))
        decision = one.decide(0.0)
        assert decision is not None and decision.route == (HOLD if finite else route)
        one.release(decision.request)
        one.reopen()


def test_where_a_policy_raises_an_error_a_rule_decides_and_the_request_is_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError("as policies may")

    monkeypatch.setattr(serving_node, "load_bundle", lambda folder: SimpleNamespace(name="faulty", decide=fail))

    async def scene() -> None:
        async with net(Stub(), policy=None) as n:
            assert [(await n.ask())[0] for _ in range(3)] == [200] * 3
            assert (await n.see())["policy"] == "competitive"  # the one that is shipped under that name

    play(scene)
    [logged] = [record for record in caplog.records if record.name == "wwwserve.policy"]
    assert logged.levelname == "ERROR" and logged.exc_info is not None


def test_a_round_that_fails_loses_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            decide, left = NodeProvider.decide, [1]

            def sometimes(*arguments: Any) -> Any:
                if left:
                    left.pop()
                    raise ZeroDivisionError("as anything may")
                return decide(*arguments)

            monkeypatch.setattr(NodeProvider, "decide", sometimes)
            assert (await n.ask())[0] == 200 and not left

    play(scene)
