"""What users may ask a node beside completions: models, embeddings, responses, scores, tokens; from pages of browsers,
zipped, and by other names of models."""

import asyncio
import gzip
import json
import logging
import zlib
from typing import Any

import openai
import pytest
from stub_nodes import MODEL, Net, Stub, busy, net, play

from wwwserve.serving.http.cors import Cors
from wwwserve.serving.http.passthrough import usage_in

EMBEDDED = {"object": "list", "data": [{"index": 0, "embedding": [0.5, 1e-3]}], "model": MODEL,
            "usage": {"prompt_tokens": 9, "total_tokens": 9}}  # fmt: skip
OTHERS: dict[str, Any] = {
    "/v1/embeddings": EMBEDDED, "/v1/score": {"data": [{"score": 0.5}]}, "/rerank": {"results": []},
    "/tokenize": {"count": 2, "tokens": [1, 2]},
    "/v1/responses": [
        b'event: response.created\ndata: {"type":"response.created"}\n\n',
        b'event: response.completed\ndata: {"type":"response.completed","response":{"usage":{"input_tokens":5,'
        b'"input_tokens_details":{"cached_tokens":0},"output_tokens":3,"total_tokens":8}}}\n\n',
    ],
}  # fmt: skip


async def post(n: Net, path: str, body: Any, k: int = 0, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with n.session.post(n.urls[k] + path, data=data, headers=headers) as response:
        return response.status, await response.read(), {name.lower(): value for name, value in response.headers.items()}


@pytest.mark.parametrize("path", OTHERS)
def test_what_the_engine_has_is_passed_through_as_it_is(path: str) -> None:
    async def scene() -> None:
        stub = Stub(others=OTHERS, says={"x-ratelimit-remaining-tokens": "5"})
        async with net(stub) as n:
            body = b'{"model":"stub", "input": "hello" ,"unheard_of":18446744073709551615}'
            status, got, headers = await post(n, path, body, **{"x-request-id": "mine"})
            said = OTHERS[path]
            assert status == 200 and headers["x-request-id"] == "mine"
            assert got == b"".join(said) if isinstance(said, list) else json.loads(got) == said
            assert isinstance(said, list) or headers["x-ratelimit-remaining-tokens"] == "5"
            assert stub.bodies == [body] and stub.heads[0]["x-request-id"] == "mine"
            assert (await n.see())["requests"]["accepted"] == 0  # the market does not deal in it

    play(scene)


def test_it_stays_on_the_own_engine_however_full_that_is() -> None:
    async def scene() -> None:
        here, there = busy(), Stub(others=OTHERS)
        here.others = OTHERS
        async with net(here, there) as n:
            assert (await post(n, "/v1/embeddings", {"model": MODEL, "input": "x"}))[0] == 200
            assert (here.begun, there.begun) == (1, 0)

    play(scene)


def test_it_is_in_the_engine_s_load_while_it_runs() -> None:
    async def scene() -> None:
        async with net(Stub(others=OTHERS, pause_s=0.5, says_load=False)) as n:
            asked = asyncio.create_task(post(n, "/v1/embeddings", {"model": MODEL, "input": "x" * 4000}))

            async def seen(running: int) -> bool:
                return bool((await n.see())["engine"]["running"] == running)

            await n.until(lambda: seen(1))
            assert (await n.see())["engine"]["kv_use"] > 0.005
            assert (await asked)[0] == 200
            await n.until(lambda: seen(0))

    play(scene)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/embeddings", {"model": "other", "input": "x"}, 404, "no model 'other'"),
        ("/v1/embeddings", {"model": 3}, 400, "model is not a string"),
        ("/v1/embeddings", b"{", 400, "not JSON"),
        ("/v1/embeddings", b'{"a":[' + b"{}," * 40_000 + b"{}]}", 400, "too many values"),
        ("/v1/embeddings", {"input": "x" * 200_000}, 413, "larger than"),
        ("/v2/rerank", {"query": "x"}, 404, "the engine has no /v2/rerank"),
        ("/v1/responses", {"model": MODEL, "input": "x", "background": True}, 400, "background is not offered"),
        ("/v1/audio/speech", {"model": MODEL}, 404, "there is no /v1/audio/speech"),
    ],
)  # fmt: skip
def test_what_cannot_be_passed_through_is_refused_with_the_reason(
    path: str, body: Any, status: int, message: str
) -> None:
    async def scene() -> None:
        async with net(Stub(others=OTHERS), limits={"body_bytes": 180_000}) as n:
            found, got, headers = await post(n, path, body)
            assert found == status and message in json.loads(got)["error"]["message"]
            assert n.stubs[0].begun == 0 and (path.startswith("/v1/audio") or headers["x-request-id"])
            assert (await post(n, "/v1/embeddings", {"input": "x"}))[0] == 200  # the engine's own model

    play(scene)


@pytest.mark.parametrize(("mode", "status", "again"), [("429", 429, "7"), ("503", 503, "7"), ("500", 502, None),
                                                       ("401", 502, None), ("422", 422, "7")])  # fmt: skip
def test_what_the_engine_answers_of_itself_is_told(mode: str, status: int, again: str | None) -> None:
    async def scene() -> None:
        async with net(Stub(others=OTHERS, mode=mode)) as n:
            found, got, headers = await post(n, "/v1/embeddings", {"model": MODEL, "input": "x"})
            assert (found, headers.get("retry-after")) == (status, again) and b"error" in got

    play(scene)


@pytest.mark.parametrize("rest", [b"", b'event: response.delta\ndata: {"type":"resp'])
def test_a_stream_that_breaks_off_ends_with_an_error_on_a_line_of_its_own(rest: bytes) -> None:
    async def scene() -> None:
        async with net(Stub(others={"/v1/responses": [OTHERS["/v1/responses"][0], rest, None]})) as n:
            status, got, _ = await post(n, "/v1/responses", {"model": MODEL, "input": "x", "stream": True})
            last = got.split(b"\n\n")[-2]
            assert status == 200 and last.startswith(b"event: error\ndata: ")
            assert json.loads(last.partition(b"data: ")[2])["error"]["code"] == "502"

    play(scene)


def test_no_more_than_so_many_are_passed_through_at_once_and_who_hangs_up_stops_one() -> None:
    async def scene() -> None:
        async with net(Stub(others=OTHERS, pause_s=5.0), limits={"held": 2}) as n:
            body = {"model": MODEL, "input": "x"}
            asked = [asyncio.create_task(post(n, "/v1/embeddings", body)) for _ in range(2)]

            async def begun() -> bool:
                return n.stubs[0].begun == 2

            await n.until(begun)
            status, got, headers = await post(n, "/v1/embeddings", body)
            assert status == 503 and headers["retry-after"] == "1" and b"too many requests" in got
            for each in asked:
                each.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            n.stubs[0].pause_s = 0.0
            await asyncio.sleep(0.1)
            assert (await post(n, "/v1/embeddings", body))[0] == 200

    play(scene)


def test_models_by_their_names_and_others_that_the_operator_gave_them() -> None:
    async def scene() -> None:
        names = [MODEL, "org/lora"]
        async with net(Stub(models_served=names, others=OTHERS), aliases={"gpt-4": MODEL, "gone": "nowhere"}) as n:
            async with n.session.get(n.urls[0] + "/v1/models") as response:
                models = {each["id"]: each for each in (await response.json())["data"]}
            assert set(models) == {*names, "gpt-4"} and models["gpt-4"]["root"] == MODEL
            for name in models:
                async with n.session.get(n.urls[0] + "/v1/models/" + name) as response:
                    assert response.status == 200 and await response.json() == models[name]
            for name in ("gone", "other"):
                async with n.session.get(n.urls[0] + "/v1/models/" + name) as response:
                    assert response.status == 404
            status, _, _ = await n.ask(model="gpt-4", seed=7)
            assert status == 200
            assert json.loads(n.stubs[0].bodies[0])["model"] == MODEL and json.loads(n.stubs[0].bodies[0])["seed"] == 7
            assert (await post(n, "/v1/embeddings", {"model": "gpt-4", "input": "x"}))[0] == 200
            assert json.loads(n.stubs[0].bodies[1])["model"] == MODEL
            assert (await n.ask(model="gone"))[0] == 404

    play(scene)


def test_an_alias_of_a_model_that_is_not_there_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with net(Stub(), aliases={"gpt-4": MODEL, "gone": "nowhere"}):
            [said] = [each for each in caplog.records if "aliases" in each.message]
            assert said.levelname == "WARNING" and vars(said)["aliases"] == {"gone": "nowhere"}

    play(scene)


def test_a_peer_is_asked_for_a_model_by_the_name_that_it_has() -> None:
    async def scene() -> None:
        async with net(busy(), Stub(), aliases={"gpt-4": MODEL}) as n:
            assert (await n.ask(model="gpt-4"))[0] == 200
            assert json.loads(n.stubs[1].bodies[0])["model"] == MODEL

    play(scene)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/stub", "/health", "/metrics"])
def test_head_answers_as_get_does_without_a_body(path: str) -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            async with n.session.get(n.urls[0] + path) as response:
                kind = response.content_type
            async with n.session.head(n.urls[0] + path) as response:
                assert (response.status, response.content_type, await response.read()) == (200, kind, b"")
            async with n.session.put(n.urls[0] + path) as response:
                assert (response.status, response.headers["allow"]) == (405, "GET, HEAD")

    play(scene)


BOMB = gzip.compress(b'{"model": "stub", "messages": [], "pad": "' + b" " * (64 << 20) + b'"}')


@pytest.mark.parametrize(
    ("body", "encoding", "status", "message"),
    [
        (gzip.compress(b'{"model": "stub", "messages": [{"role": "user", "content": "x"}]}'), "gzip", 200, b"choices"),
        (b'{"model": "stub", "messages": []}', "identity", 200, b"choices"),
        (BOMB, "gzip", 413, b"too large when it is unpacked"),
        (gzip.compress(BOMB), "gzip", 400, b"not JSON"),
        (gzip.compress(b"{}") + gzip.compress(b"{}"), "gzip", 400, b"goes on after its gzip"),
        (gzip.compress(b'{"model": "stub"}')[:-3], "gzip", 400, b"not gzip to its end"),
        (b"no zip", "gzip", 400, b"not gzip"),
        (b"", "gzip", 400, b"not gzip to its end"),
        (zlib.compress(b"{}"), "deflate", 415, b"expected gzip"),
        (b"{}", "gzip, gzip", 415, b"expected gzip"),
    ],
    ids=["zipped", "plain", "bomb", "bomb in a bomb", "two", "cut", "none", "empty", "deflate", "twice"],
)  # fmt: skip
def test_bodies_may_be_zipped_and_are_bounded_when_they_are_unpacked(
    body: bytes, encoding: str, status: int, message: bytes
) -> None:
    async def scene() -> None:
        async with net(Stub(), limits={"body_bytes": 1 << 20}) as n:
            found, got, _ = await post(n, "/v1/chat/completions", body, **{"content-encoding": encoding})
            assert found == status and message in got
            for sent in n.stubs[0].bodies:
                assert sent.startswith(b'{"model"')
            assert all("content-encoding" not in head for head in n.stubs[0].heads)

    play(scene)


def test_large_bodies_that_are_open_have_bounded_room() -> None:
    async def scene() -> None:
        limits = {"held_bytes": 1 << 20}  # of which one address has a quarter
        async with net(Stub(others=OTHERS, pause_s=1.0), limits=limits) as n:
            large = {"model": MODEL, "input": "x" * 200_000}
            first = asyncio.create_task(post(n, "/v1/embeddings", large))

            async def begun() -> bool:
                return n.stubs[0].begun == 1

            await n.until(begun)
            status, got, headers = await post(n, "/v1/embeddings", large)
            assert status == 503 and headers["retry-after"] == "1" and b"large requests are open" in got
            assert (await post(n, "/tokenize", {"prompt": "x"}))[0] == 200
            assert (await first)[0] == 200
            assert (await post(n, "/v1/embeddings", large))[0] == 200

    play(scene)


ORIGIN = "https://app.example"


def test_pages_of_browsers_may_ask_where_the_operator_says_so() -> None:
    async def scene() -> None:
        preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        async with net(Stub(), cors={"origins": [ORIGIN]}, keys=["good"]) as n:
            chat = n.urls[0] + "/v1/chat/completions"
            async with n.session.options(chat, headers={"origin": ORIGIN} | preflight) as response:
                assert response.status == 204 and response.headers["access-control-allow-origin"] == ORIGIN
                assert "authorization" in response.headers["access-control-allow-headers"]
                assert "POST" in response.headers["access-control-allow-methods"]
            async with n.session.options(chat, headers={"origin": "https://evil.example"} | preflight) as response:
                assert "access-control-allow-origin" not in response.headers and response.headers["vary"] == "origin"
            for key, status in (("good", 200), ("bad", 401)):
                sent = {"origin": ORIGIN, "authorization": f"Bearer {key}"}
                found, _, headers = await post(n, "/v1/chat/completions", {"model": MODEL, "messages": []}, **sent)
                assert found == status and headers["access-control-allow-origin"] == ORIGIN
                assert "x-request-id" in headers["access-control-expose-headers"]
            for path in ("/network", "/metrics", "/peer/beat"):  # the operator's pages, and what is between nodes
                async with n.session.get(n.urls[0] + path, headers={"origin": ORIGIN}) as response:
                    assert "access-control-allow-origin" not in response.headers

    play(scene)


def test_without_cors_no_page_may_ask() -> None:
    async def scene() -> None:
        async with net(Stub()) as n:
            _, _, headers = await n.ask(headers={"origin": ORIGIN})
            assert not any(name.lower().startswith("access-control") for name in headers)
            async with n.session.options(n.urls[0] + "/v1/chat/completions", headers={"origin": ORIGIN}) as response:
                assert (response.status, response.headers["allow"]) == (405, "POST")
            for path in ("/peer/v1/chat/completions", "/peer/beat", "/peer/ledger", "/peer/judge"):
                async with n.session.get(n.urls[0] + path) as response:
                    assert (response.status, response.headers["allow"]) == (405, "POST")

    play(scene)


def test_all_origins_are_granted_without_credentials() -> None:
    assert dict(Cors(["*"]).granted({b"origin": b"https://x"}))[b"access-control-allow-origin"] == b"*"
    assert Cors(["*"]).granted({}) == [] and Cors([ORIGIN]).granted({b"origin": b"null"}) == [(b"vary", b"origin")]


@pytest.mark.parametrize(
    ("text", "used"),
    [
        (json.dumps(EMBEDDED).encode(), (9, 0)),
        (b'"usage":{"input_tokens":5,"output_tokens":3,"details":{"a":1}}', (5, 3)),
        (b'"usage": {"prompt_tokens": 1, "completion_tokens": null}', (1, 0)),
        (b'{"text": "\\"usage\\": {\\"prompt_tokens\\": 1}"}', None),
        (b'"usage": {"prompt_tokens": -1}', None), (b'"usage": {"prompt_tokens": 1', None), (b'"usage": {}', None),
        (b'"usage": {"prompt_tokens": 1e9}', None),
    ],
)  # fmt: skip
def test_usage_is_found_in_what_an_engine_answers(text: bytes, used: tuple[int, int] | None) -> None:
    found = usage_in(text)
    assert (found[:2] if found is not None else None) == used


def test_the_official_client_works_unmodified() -> None:
    async def scene() -> None:
        async with net(Stub(others=OTHERS), keys=["good"]) as n, openai.AsyncOpenAI(
            base_url=n.urls[0] + "/v1", api_key="good", max_retries=0
        ) as client:  # fmt: skip
            assert [each.id async for each in client.models.list()] == [MODEL]
            assert (await client.models.retrieve(MODEL)).id == MODEL
            made = await client.embeddings.create(model=MODEL, input="hi", encoding_format="float")
            assert made.data[0].embedding == [0.5, 1e-3]
            stream = await client.responses.create(model=MODEL, input="hi", stream=True)
            assert [event.type async for event in stream] == ["response.created", "response.completed"]
            with pytest.raises(openai.NotFoundError):
                await client.embeddings.create(model="other", input="hi")

    logging.getLogger("openai").setLevel(logging.WARNING)
    play(scene)
