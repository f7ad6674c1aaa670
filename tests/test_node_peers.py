"""Live nodes that hand requests over: what comes back, who replaces whom, what is counted and what is logged."""

import asyncio
import itertools
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from stub_nodes import MODEL, ZENOH, Net, Stub, busy, hang_up, net, play

from wwwserve.agents.knowledge import ADVERT_SIZE
from wwwserve.serving import cooling, delegation, dispatcher, node
from wwwserve.serving.http import sse
from wwwserve.serving.http.messages import Refused
from wwwserve.serving.http.reply import IN_ONE_TURN
from wwwserve.serving.local_nodes import free_ports
from wwwserve.serving.membership.heartbeat import decode

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Long(Stub):
    """An engine whose answers have so much text."""

    async def whole(self) -> web.Response:
        message = {"role": "assistant", "content": "word " * (IN_ONE_TURN if "long" in str(self.bodies[-1]) else 1)}
        usage = {"prompt_tokens": 7, "completion_tokens": self.tokens, "total_tokens": 7 + self.tokens}
        return web.json_response({"choices": [{"index": 0, "message": message}], "usage": usage})


@pytest.mark.parametrize(("stubs", "readers"), [([Long()], 1), ([Long(waiting=200), Long()], 2)], ids=["own", "peer"])
def test_a_long_answer_is_read_beside_the_event_loop(
    stubs: list[Stub], readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a peer both who asks and who answers reads it. A short one costs no thread."""
    loop, read = threading.get_ident(), list[tuple[str, bool]]()

    def watched(name: str) -> Callable[[Any], Any]:
        work = getattr(sse, name)

        def call(what: Any) -> Any:
            read.append((name, threading.get_ident() == loop))
            return work(what)

        return call

    for name in ("answer_of", "written_bytes"):
        monkeypatch.setattr(sse, name, watched(name))

    async def scene() -> None:
        async with net(*stubs) as n:
            for word in ("long", "short"):
                read.clear()
                status, body, _ = await n.ask(messages=[{"role": "user", "content": f"a {word} one"}])
                assert status == 200 and (len(body) > IN_ONE_TURN) == (word == "long")
                assert set(read) == {(name, word == "short") for name in ("answer_of", "written_bytes")}
                assert [name for name, _ in read].count("answer_of") == readers

    play(scene)


def test_overflow_goes_to_a_peer_and_comes_back_whole() -> None:
    async def scene() -> None:
        async with net(busy(), Stub()) as n:
            status, body, _ = await n.ask()
            assert status == 200 and json.loads(body)["from"] == n.stubs[1].url
            status, body, _ = await n.ask(stream=True)
            assert status == 200 and body.count(b"data:") == 7 and n.stubs[1].url.encode() in body
            seen = await n.see()
            assert seen["requests"]["handed_over"] == 2 and n.stubs[0].begun == 0
            async with n.session.get(n.urls[1] + "/metrics") as response:
                page = await response.text()
            assert 'wwwserve_remote_requests_ended_total{outcome="answered"} 2.0' in page
            async with n.session.get(n.urls[0] + "/metrics") as response:
                ended = 'wwwserve_requests_ended_total{class="default",outcome="answered",where="peer"} 2.0'
                assert ended in await response.text()

    play(scene)


@pytest.mark.parametrize("where", ["local", "peer"])
def test_a_user_who_hangs_up_at_the_last_event_has_been_answered(where: str) -> None:
    async def scene() -> None:
        slow = Stub(linger_s=1.0)
        async with net(*([slow] if where == "local" else [busy(), slow])) as n:
            body = {"model": MODEL, "messages": [], "stream": True}
            async with n.session.post(n.urls[0] + "/v1/chat/completions", json=body) as response:
                async for line in response.content:
                    if line == b"data: [DONE]\n":
                        break
            ended = f'wwwserve_requests_ended_total{{class="default",outcome="answered",where="{where}"}} 1.0'

            async def counted() -> bool:
                async with n.session.get(n.urls[0] + "/metrics") as response:
                    return ended in await response.text()

            await n.until(counted, 0.8)
            if where == "peer":
                async with n.session.get(n.urls[1] + "/metrics") as response:
                    assert 'wwwserve_remote_requests_ended_total{outcome="answered"} 1.0' in await response.text()

    play(scene)


@pytest.mark.parametrize(
    ("mode", "stream"),
    [("full", False), ("full", True), ("garbage", False), ("hangs up", False), ("hangs up", True)],
)
def test_a_peer_that_fails_before_the_first_token_is_replaced(
    mode: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cooling, "COOL_S", cooling.MOST_COOL_S)  # it is left alone, however long a busy machine takes,
    monkeypatch.setattr(cooling, "FAILURES", 1)  # at once
    monkeypatch.setattr(delegation, "OFFER_TIMEOUT_S", 60.0)  # and no other peer is

    async def scene() -> None:
        async with net(busy(), Stub(mode=mode), Stub(waiting=20)) as n:
            status, body, _ = await n.ask(stream=stream)
            assert status == 200 and b"error" not in body
            # A kept connection to an engine that hangs up is asked once more on another; whether it was kept is open.
            assert (
                n.stubs[1].begun in ((1, 2) if mode == "hangs up" else (1,))
                and n.stubs[0].begun + n.stubs[2].begun == 1
            )

    play(scene)


def test_a_peer_cannot_send_a_request_elsewhere() -> None:
    """It answers with a redirect, which is not followed."""

    async def scene() -> None:
        async with net(busy(), Stub(), Stub(waiting=500)) as n:
            n.running[1].cancel()
            await asyncio.gather(n.running[1], return_exceptions=True)
            inner: list[str] = []

            async def redirect(request: web.Request) -> web.Response:
                await request.read()
                if request.path.startswith("/peer/v1"):
                    return web.Response(status=307, headers={"location": f"{n.urls[1]}/inner"})
                inner.extend([request.path] if request.path == "/inner" else [])
                return web.Response(status=204)

            app = web.Application()
            app.router.add_route("*", "/{tail:.*}", redirect)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", int(n.urls[1].rpartition(":")[2])).start()
            try:
                assert (await n.ask())[0] == 200
            finally:
                await runner.cleanup()
            assert not inner

    play(scene)


def test_a_peer_that_fails_later_ends_the_stream_with_an_error_and_no_replay() -> None:
    async def scene() -> None:
        async with net(busy(), Stub(mode="breaks off", pause_s=0.05), Stub(waiting=20)) as n:
            status, body, _ = await n.ask(stream=True)
            events = [line for line in body.decode().splitlines() if line]
            texts = [json.loads(each[6:])["choices"][0]["delta"]["content"] for each in events[:3]]
            assert status == 200 and texts == ["", "w0 ", "w1 "]
            assert "broke off" in json.loads(events[-1][6:])["error"]["message"]
            assert len(events) == 4 and n.stubs[2].begun == 0
            assert (await n.see())["requests"]["failed"] == 1

    play(scene)


def told_by(body: bytes) -> tuple[list[dict[str, Any]], str]:
    """Events of a stream but for the last, and the text that they make."""
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], events
    chunks = [json.loads(event[6:]) for event in events[:-2]]
    return chunks, "".join(choice["delta"].get("content", "") for event in chunks for choice in event["choices"])


@pytest.mark.parametrize("mode", ["breaks off", "ends early", "tells of an error"])
@pytest.mark.parametrize("where", ["local", "peer"])
def test_a_stream_that_breaks_off_goes_on_elsewhere_if_the_node_is_to_resume(mode: str, where: str) -> None:
    async def scene() -> None:
        broken = Stub(mode=mode, breaks=1, pause_s=0.05)
        stubs = [broken, Stub(waiting=20)] if where == "local" else [busy(), broken, Stub(waiting=20)]
        async with net(*stubs, resume=True) as n:
            status, body, _ = await n.ask(
                stream=True, max_tokens=5, min_tokens=4, stream_options={"include_usage": True}
            )
            events, text = told_by(body)
            assert status == 200 and text == "w0 w1 w2 w3 w4 "
            assert {(event["id"], event["object"]) for event in events} == {(broken.url, "chat.completion.chunk")}
            assert sum("role" in choice["delta"] for event in events for choice in event["choices"]) == 1
            assert events[-1]["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
            asked = [json.loads(each) for stub in n.stubs for each in stub.bodies]
            [rest] = [each for each in asked if "continue_final_message" in each]
            assert len(asked) == 2 and broken.begun >= 1
            assert rest["messages"][-1] == {"role": "assistant", "content": "w0 w1 "}
            assert rest["continue_final_message"] is True and rest["add_generation_prompt"] is False
            assert (rest["max_tokens"], rest["min_tokens"]) == (3, 2)
            assert (await n.see())["requests"]["answered"] == 1

    play(scene)


def test_a_stream_that_nobody_can_finish_ends_with_an_error() -> None:
    async def scene() -> None:
        async with net(Stub(mode="breaks off", tokens=50), resume=True) as n:
            _, body, _ = await n.ask(stream=True)
            last = json.loads(body.decode().strip().splitlines()[-1][6:])
            assert "does not answer as it should" in last["error"]["message"]
            assert body.count(b"w0 ") == body.count(b"w5 ") == 1 and n.stubs[0].begun == 3

    play(scene)


@pytest.mark.parametrize("more", [{"n": 2}, {"tools": [{}]}, {"response_format": {"type": "json_object"}}])
def test_what_cannot_be_resumed_is_not(more: dict[str, Any]) -> None:
    async def scene() -> None:
        async with net(Stub(mode="breaks off"), Stub(waiting=20), resume=True) as n:
            _, body, _ = await n.ask(stream=True, **more)
            assert b"broke off" in body and n.stubs[0].begun == 1 and n.stubs[1].begun == 0

    play(scene)


def test_who_sends_and_who_gets_a_large_stream_are_there_all_the_while(caplog: pytest.LogCaptureFixture) -> None:
    """36 MB that an engine writes as fast as it can, three at once, all in this process."""
    caplog.set_level(logging.INFO)
    event = b'data: {"choices": [{"index": 0, "delta": {"content": "%b"}}]}\n\n' % (b"w" * 200)
    count = 36_000_000 // 3 // len(event)

    class Flood(Stub):
        async def stream(self, request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            for _ in range(count // 1000):
                await response.write(event * 1000)
            await response.write(event * (count % 1000) + b"data: [DONE]\n\n")
            return response

    async def scene() -> None:
        async with net(busy(), Flood()) as n:
            caplog.clear()
            answers = await asyncio.gather(*(n.ask(stream=True) for _ in range(3)))
            for status, body, _ in answers:
                assert status == 200 and body.endswith(b"data: [DONE]\n\n") and body.count(event) == count
            assert n.stubs[1].begun == 3 and "a peer is gone" not in caplog.text

    play(scene)


def test_a_user_who_hangs_up_stops_the_work_at_a_peer() -> None:
    async def scene() -> None:
        async with net(busy(), Stub(pause_s=60.0)) as n:
            await hang_up(n, 1)

            async def stopped() -> bool:
                return n.stubs[1].aborted == 1 and (await n.see(1))["remote"] == 0

            await n.until(stopped)

    play(scene)


def test_a_peer_that_leaves_gets_nothing_more_and_one_that_comes_back_does() -> None:
    async def scene() -> None:
        async with net(busy(), Stub()) as n:
            n.running[1].cancel()
            await asyncio.gather(n.running[1], return_exceptions=True)

            async def gone() -> bool:
                peer = (await n.see())["peers"][0]
                assert peer["label"] == "n1"  # also when it is gone
                return not peer["there"]

            await n.until(gone)
            n.stubs[0].waiting = 0
            assert json.loads((await n.ask())[1])["from"] == n.stubs[0].url

    play(scene)


async def loaded(n: Net, users: Sequence[int], per_s: float, more: Callable[[int], bool]) -> list[Counter[str]]:
    """Ask the nodes `users` in turn, while there are to be `more` than so many requests, every second time for a
    stream; what clients saw of each."""
    seen = [Counter[str]() for _ in n.urls]

    async def one(k: int) -> None:
        stream = k // len(users) % 2 == 0
        status, body, _ = await n.ask(users[k % len(users)], stream=stream)
        text = body.decode()
        whole = text.endswith("data: [DONE]\n\n") if stream else '"usage"' in text
        if status == 200 and whole:
            outcome = "answered"
        else:  # told what went wrong, in JSON of its own or as the last event
            assert json.loads(text.strip().splitlines()[-1].removeprefix("data: "))["error"]["message"]
            outcome = "failed"
        seen[users[k % len(users)]][outcome] += 1

    async with asyncio.TaskGroup() as group:
        for k in itertools.takewhile(more, itertools.count()):
            group.create_task(one(k))
            await asyncio.sleep(1.0 / per_s)
    return seen


async def check_counts(n: Net, seen: list[Counter[str]]) -> None:
    """What `/metrics` counts is what clients saw."""
    for k, counts in enumerate(seen):
        if not counts:
            continue
        async with n.session.get(n.urls[k] + "/metrics") as response:
            page = await response.text()
        ended: Counter[str] = Counter()
        for outcome, value in re.findall(r'^wwwserve_requests_ended_total{.*outcome="(\w+)",.*} (\S+)$', page, re.M):
            ended[outcome] += int(float(value))
        assert ended == counts
        assert f"wwwserve_requests_accepted_total {float(counts.total())}" in page


@pytest.mark.parametrize("stub", [Stub(mode="garbage"), Stub(pause_s=60.0), Stub(mode="breaks off", pause_s=0.02)])
def test_every_request_ends_once_whatever_an_engine_does(stub: Stub) -> None:
    """One of five engines, which has users of its own and those of others."""

    async def scene() -> None:
        broken = replace(stub, bodies=[])
        async with net(*(Stub(pause_s=0.02, waiting=2) for _ in range(4)), broken) as n:
            seen = await loaded(n, [0, 1, 4], 60.0, lambda k: k < 180)
            assert broken.begun > 5
            assert sum(counts["answered"] for counts in seen) > 100
            await check_counts(n, seen)

    play(scene)


def test_every_request_ends_once_while_a_node_leaves_and_another_joins() -> None:
    async def scene() -> None:
        async with net(busy(), busy(), Stub(pause_s=0.02), Stub(pause_s=0.02), Stub(pause_s=0.02)) as n:
            enough = asyncio.Event()
            loading = asyncio.create_task(loaded(n, [0, 1], 60.0, lambda k: k < 300 or not enough.is_set()))

            async def begun() -> bool:
                return n.stubs[4].begun > 5

            await n.until(begun)
            n.running[4].cancel()
            await asyncio.gather(n.running[4], return_exceptions=True)
            left = n.stubs[4].begun

            async def there(wanted: bool) -> bool:
                seen = [await n.see(k) for k in (0, 1)]
                return all({p["key"]: p["there"] for p in each["peers"]}[n.keys[4].name] is wanted for each in seen)

            await n.until(lambda: there(False))
            assert n.stubs[4].begun == left
            await n.start(4)
            await n.until(lambda: there(True))

            async def begun_again() -> bool:
                return n.stubs[4].begun > left

            await n.until(begun_again)
            enough.set()
            seen = await loading
            assert sum(counts["failed"] for counts in seen) <= 0.02 * sum(counts.total() for counts in seen)
            await check_counts(n, seen)

    play(scene)


def test_logs_are_lines_of_json_without_prompts_answers_or_keys(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    key, engine_key, prompt = "sk-of-a-user", "sk-of-an-engine", "a prompt to be kept secret"
    sent: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "stream": True}

    async def scene() -> None:
        stubs = Stub(mode="breaks off"), Stub()
        async with net(*stubs, keys=[key], resume=True) as n:
            n.configs[0]["engine"]["key"] = engine_key
            n.running[0].cancel()
            await asyncio.gather(n.running[0], return_exceptions=True)
            await n.start(0)
            allowed = {"authorization": f"Bearer {key}"}
            for mode in ("breaks off", "tells of an error", "garbage", "hangs up", "well"):
                n.stubs[0].mode = mode
                await n.ask(headers=allowed, **sent)
                await n.ask(headers={"authorization": f"Bearer {key}?"}, **sent)

            async def fail(*_: Any) -> None:
                raise RuntimeError("inside")

            monkeypatch.setattr(dispatcher.Dispatcher, "answer", fail)
            assert (await n.ask(headers=allowed, **sent))[0] == 500

    play(scene)
    lines = [node.JsonLines().format(record) for record in caplog.records]
    logged = [json.loads(line) for line in lines]
    assert all({"at", "level", "logger", "message"} <= line.keys() for line in logged)
    assert {"ready", "a peer is there", "given back", "a request met an error"} <= {line["message"] for line in logged}
    page = "\n".join(lines)
    for secret in (key, engine_key, prompt, "w0 "):
        assert secret not in page


def test_strangers_and_nonsense_are_no_peers() -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            for body in (b"", b"{}", b"\xff", json.dumps({"name": "x" * 200}).encode()):
                async with n.session.post(n.urls[0] + "/peer/beat", data=body) as response:
                    assert response.status == 403
            async with n.session.post(n.urls[0] + "/peer/v1/chat/completions", data=b'{"model": "stub"}') as response:
                assert response.status == 403
                assert (await response.json())["error"]["type"] == "unsigned"
            page = await (await n.session.get(n.urls[0] + "/metrics")).text()
            assert 'wwwserve_messages_refused_total{kind="unsigned"} 1.0' in page
            assert 'wwwserve_messages_refused_total{kind="malformed"} 3.0' in page

    play(scene)
    with pytest.raises(Refused, match=f"load has 1 numbers, expected {ADVERT_SIZE}"):
        decode(b'{"name":"a","label":"","url":"u","serves":[],"run":1,"number":1,"load":[1.0],"age_s":0}')


def test_a_node_that_zenoh_tells_of_its_peers_takes_no_beats() -> None:
    async def scene() -> None:
        listen = f"tcp/127.0.0.1:{free_ports(1)[0]}"
        async with (
            net(Stub(), membership=ZENOH | {"listen": [listen]}) as n,
            n.session.post(n.urls[0] + "/peer/beat", data=b"{}") as response,
        ):
            assert response.status == 403
            assert "no beats are sent to it" in (await response.json())["error"]["message"]

    play(scene)


def test_models_that_an_engine_comes_to_serve_are_served_and_peers_hear_of_them() -> None:
    async def scene() -> None:
        async with net(Stub(), Stub()) as n:
            n.stubs[1].models_served = ["newer", MODEL]

            async def served() -> bool:
                return (await n.see(1))["serves"] == ["newer", MODEL]

            await n.until(served)
            assert (await n.ask(1, model="newer"))[0] == 200 and (await n.ask(0, model="newer"))[0] == 404
            n.stubs[1].models_served = ["newer"]
            await n.until(lambda: heard(n))
            assert (await n.ask(1))[0] == 404

    async def heard(n: Net) -> bool:
        return bool((await n.see(0))["peers"][0]["serves"] == ["newer"])

    play(scene)
