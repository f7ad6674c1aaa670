"""One live node before engines that behave and engines that do not."""

import asyncio
import json
import time

import pytest
from stub_nodes import MODEL, Net, Stub, hang_up, net, play

from wwwserve.serving.engine import adapter as engine
from wwwserve.serving.local_nodes import free_ports

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_a_body_goes_to_the_engine_as_it_is_and_its_answer_comes_back_as_it_is() -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            body = b'{"model":"stub", "messages":[], "unheard_of": {"a":[1,2]} ,"seed":18446744073709551615}'
            async with n.session.post(n.urls[0] + "/v1/chat/completions", data=body) as response:
                answer = await response.read()
                assert response.status == 200 and response.content_type == "application/json"
            assert n.stubs[0].bodies == [body]
            assert json.loads(answer)["usage"]["completion_tokens"] == 5
            async with n.session.get(n.urls[0] + "/v1/models") as response:
                assert [each["id"] for each in (await response.json())["data"]] == [MODEL]

    play(scene)


def test_a_stream_comes_chunk_by_chunk() -> None:
    async def scene() -> None:
        async with net(Stub(pause_s=0.1)) as n:
            body = {"model": MODEL, "messages": [], "stream": True}
            loop, times, parts = asyncio.get_running_loop(), [], []
            async with n.session.post(n.urls[0] + "/v1/chat/completions", json=body) as response:
                assert response.content_type == "text/event-stream"
                async for chunk in response.content.iter_any():
                    times.append(loop.time())
                    parts.append(chunk)
            assert b"".join(parts).count(b"data:") == 7 and b"".join(parts).endswith(b"data: [DONE]\n\n")
            assert times[-1] - times[0] > 0.3

    play(scene)


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"[1]", {}, 400, "is a list, expected an object"),
        (b"null", {}, 400, "is null, expected an object"),
        (b"{}", {}, 400, "model is missing"),
        (b'{"model": "other"}', {}, 404, "no model 'other'"),
        (b'{"model": "stub", "stream": 3}', {}, 400, "stream is not"),
        (b'{"model": "stub"}', {"x-slo-class": "gold"}, 400, "expected one of default"),
        (b'{"model": "stub", "pad": "' + b"x" * 3000 + b'"}', {}, 413, "larger than 2000 bytes"),
        (b'{"model": "stub"}', {"x-pad": "y" * 3000}, 431, "headers are too large"),
        (b'{"model": "stub"}', {"authorization": "Bearer wrong"}, 401, "API key is not known"),
        (b'{"model": "stub"}', {"authorization": ""}, 401, "no API key is shown"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_the_reason(
    body: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    async def scene() -> None:
        async with net(Stub(), keys=["good"], limits={"body_bytes": 2000, "header_bytes": 2000}) as n:
            sent = {"authorization": "Bearer good"} | headers
            async with n.session.post(n.urls[0] + "/v1/chat/completions", data=body, headers=sent) as response:
                assert response.status == status
                assert message in (await response.json())["error"]["message"]
            assert n.stubs[0].bodies == []
            assert (await n.ask(headers={"authorization": "Bearer good"}))[0] == 200

    play(scene)


def test_beyond_the_bound_of_its_queue_a_node_says_when_to_come_again() -> None:
    async def scene() -> None:
        async with net(Stub(mode="full"), limits={"held": 3}, market={"tick_s": 5.0}) as n:
            first = [asyncio.create_task(n.ask()) for _ in range(3)]

            async def all_held() -> bool:
                return bool((await n.see())["held"] == 3)

            await n.until(all_held)
            status, _, headers = await n.ask()
            assert (status, headers["Retry-After"]) == (503, "1")
            n.stubs[0].mode = "well"
            assert [each[0] for each in await asyncio.gather(*first)] == [200] * 3
            totals = (await n.see())["requests"]
            assert (totals["accepted"], totals["answered"], totals["turned_away"]) == (3, 3, 1)

    play(scene)


def test_what_is_held_goes_by_deadline_and_is_held_no_longer_than_that() -> None:
    output = {"median": 5.0, "sigma": 0.1, "max": 20}
    classes = {
        name: {"deadline_s": deadline_s, "value": 1.0, "output": output}
        for name, deadline_s in (("batch", 60.0), ("chat", 30.0), ("now", 0.5))
    }

    async def scene() -> None:
        async with net(Stub(mode="full"), classes=classes) as n:

            async def ask(klass: str) -> tuple[str, int, float, dict[str, str]]:
                start_s = time.monotonic()
                status, _, headers = await n.ask(headers={"x-slo-class": klass})
                return klass, status, time.monotonic() - start_s, headers

            late = [asyncio.create_task(ask(klass)) for klass in ("batch", "chat")]
            _, status, took_s, headers = await ask("now")
            assert (status, headers["Retry-After"]) == (503, "1") and took_s >= 0.5
            assert (await n.see())["held"] == 2 and not any(task.done() for task in late)
            n.stubs[0].mode = "well"
            assert [each[1] for each in await asyncio.gather(*late)] == [200, 200]
            decided = "".join(each["class"][0] for each in (await n.see())["decisions"])
            assert "ncb" in decided  # when all three were held, by their deadlines
            totals = (await n.see())["requests"]
            assert (totals["answered"], totals["failed"], totals["on_time"]) == (2, 1, 2)

    play(scene)


@pytest.mark.parametrize("mode", ["garbage", "hangs up"])
def test_an_engine_that_fails_ends_a_request_with_an_error(mode: str) -> None:
    async def scene() -> None:
        async with net(Stub(mode=mode)) as n:
            status, body, _ = await n.ask()
            assert status == 502 and "does not answer as it should" in json.loads(body)["error"]["message"]
            assert (await n.see())["requests"]["failed"] == 1

    play(scene)


@pytest.mark.parametrize(("code", "status"), [(500, 502), (502, 502), (401, 502), (429, 429), (503, 503), (400, 400)])
def test_what_an_engine_answers_reaches_the_user_where_nobody_else_can_serve(code: int, status: int) -> None:
    async def scene() -> None:
        async with net(Stub(mode=str(code)), deadlines_s=[1.0]) as n:
            found, _, headers = await n.ask()
            assert found == status
            assert headers.get("Retry-After") == ("7" if code in (429, 503, 400) else None)
            totals = (await n.see())["requests"]
            assert (totals["answered"], totals["failed"]) == ((1, 0) if code == 400 else (0, 1))
            assert n.stubs[0].begun == {500: 3, 502: 3, 401: 3, 400: 1}.get(code, n.stubs[0].begun)

    play(scene)


@pytest.mark.parametrize("code", [500, 502, 429, 503])
@pytest.mark.parametrize("policy", ["earliest_finish", None])
def test_what_an_idle_engine_turns_away_goes_to_a_peer_at_once(code: int, policy: str | None) -> None:
    async def scene() -> None:
        async with net(Stub(mode=str(code)), Stub(), policy=policy) as n:
            begun_s = time.monotonic()
            answers = await asyncio.gather(*(n.ask() for _ in range(4)))
            assert [status for status, _, _ in answers] == [200] * 4
            assert time.monotonic() - begun_s < 10.0  # far from the last deadline, 120 s
            assert n.stubs[1].begun == 4

    play(scene)


@pytest.mark.parametrize("different", [False, True])
def test_an_engine_is_suspected_once_it_fails_requests_of_different_content(
    different: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that makes an engine fail does not take its node off the network, however often it comes."""
    reasons: list[str] = []
    suspect = engine.Engine.suspect
    monkeypatch.setattr(engine.Engine, "suspect", lambda e, reason: (reasons.append(reason), suspect(e, reason)))

    async def scene() -> None:
        async with net(Stub(mode="500"), Stub()) as n:
            for k in range(3):
                text = f"number {k * different}"
                assert (await n.ask(messages=[{"role": "user", "content": text}]))[0] == 200
            assert n.stubs[1].begun == 3 and n.stubs[0].begun >= 2
            assert set(reasons) == ({"it answers 500"} if different else set())
            n.stubs[0].mode = "well"
            await n.until(lambda: up(n))
            status, body, _ = await n.ask()
            assert status == 200 and json.loads(body)["from"] == n.stubs[0].url

    async def up(n: Net) -> bool:
        return bool((await n.see())["engine"]["up"])

    play(scene)


def test_an_engine_that_never_answers_is_given_up() -> None:
    async def scene() -> None:
        stub = Stub(pause_s=100.0)
        async with net(stub) as n:
            status, _, _ = await n.ask()
            assert status == 502
            assert stub.begun >= 1

    play(scene)


def test_a_user_who_hangs_up_stops_the_work() -> None:
    async def scene() -> None:
        async with net(Stub(pause_s=60.0)) as n:
            await hang_up(n, 0)

            async def stopped() -> bool:
                return n.stubs[0].aborted == 1 and (await n.see())["requests"]["cancelled"] == 1

            await n.until(stopped)

    play(scene)


def test_before_its_engine_is_there_a_node_says_to_come_again() -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            n.running[0].cancel()
            await asyncio.gather(n.running[0], return_exceptions=True)
            n.configs[0]["engine"] |= {"url": f"http://127.0.0.1:{free_ports(1)[0]}"}
            await n.start(0)
            status, _, headers = await n.ask()
            assert (status, headers["Retry-After"]) == (503, "1")

    play(scene)
