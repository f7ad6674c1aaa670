"""What each API key may have, where keys come from, and what is counted and logged of their use."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from stub_nodes import GOOD, MODEL, Net, Stub, net, play

from wwwserve.serving import config, node
from wwwserve.serving.config import ConfigError, KeyConfig
from wwwserve.serving.http.limits import Bucket, Users


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def ask(n: Net, key: str, path: str = "/v1/chat/completions", **more: Any) -> tuple[int, bytes, dict[str, str]]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 40}]} | more
    headers = {"authorization": f"Bearer {key}"}
    async with n.session.post(n.urls[0] + path, json=body, headers=headers) as response:
        return response.status, await response.read(), {name.lower(): value for name, value in response.headers.items()}


async def counted(n: Net, name: str) -> dict[str, float]:
    """Metrics that begin so, by their labels."""
    async with n.session.get(n.urls[0] + "/metrics") as response:
        lines = (await response.text()).splitlines()
    return {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if line.startswith(name)}


def test_a_bucket_fills_evenly_and_holds_a_minute_s_worth() -> None:
    clock = Clock()
    bucket = Bucket(60.0, clock)
    assert bucket.left() == 60.0 and bucket.wait_s(1.0) == 0.0
    bucket.take(90.0)
    assert bucket.left() == -30.0 and bucket.wait_s(1.0) == 31.0
    clock.now_s += 31.0
    assert bucket.left() == 1.0
    assert bucket.headers(b"tokens") == [
        (b"x-ratelimit-limit-tokens", b"60"), (b"x-ratelimit-remaining-tokens", b"1"),
        (b"x-ratelimit-reset-tokens", b"59.000s"),
    ]  # fmt: skip
    clock.now_s += 1e6
    assert bucket.left() == 60.0


def test_keys_come_from_the_configuration_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text("sk-file\n")
    monkeypatch.setenv("TEAM_KEY", "sk-env")
    keys: list[Any] = ["sk-plain", {"name": "ci", "file": "key"}, {"name": "team", "env": "TEAM_KEY"}]
    parsed = config.parse(GOOD | {"keys": keys}, "t", tmp_path)
    users = Users(parsed.user_keys, None, Clock())
    for key, name in (("sk-plain", "key-1"), ("sk-file", "ci"), ("sk-env", "team")):
        for sent in (f"Bearer {key}", f"bearer  {key} "):
            assert users.user_of({b"authorization": sent.encode()}).name == name
    assert (
        users.user_of({b"authorization": b"Bearer sk-plain"}).headers() == []
    )  # without limits nothing is said of any


def test_a_key_is_of_one_user() -> None:
    """Else the limits of one of the two would count for nothing."""
    with pytest.raises(ConfigError, match="a and b are the same key"):
        Users([KeyConfig(name="a", key="x", requests_per_minute=1), KeyConfig(name="b", key="x")], None, Clock())


@pytest.mark.parametrize("given", [{"env": "NO_SUCH_VARIABLE"}, {"file": "/no/such/file"}, {"key": "two words"}])
def test_a_key_that_is_not_there_ends_the_start(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"key.* team"):
        Users([KeyConfig(name="team", **given)], None, Clock())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([{"name": "a"}], "key a must be given by one of key, file and env"),
        ([{"name": "a", "key": "x", "env": "Y"}], "key a must be given by one"),
        ([{"name": "a", "key": "x"}, {"name": "a", "key": "y"}], "keys must be of different names"),
        ([{"name": "a b", "key": "x"}], "every key's name must be 1 to 64 letters"),
        ([{"name": "a", "key": "x", "requests_per_minute": 0}], "requests_per_minute of key a must be above 0"),
        ([{"name": "a", "key": "x", "concurrent": -1}], "concurrent of key a must be above 0"),
        ([{"key": "x"}], "missing required field `name`"),
    ],
)
def test_keys_that_cannot_be_are_refused(keys: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse(GOOD | {"keys": keys}, "t")


def test_requests_in_a_minute_are_bounded_for_each_key() -> None:
    async def scene() -> None:
        keys = [{"name": "small", "key": "s", "requests_per_minute": 2}, {"name": "large", "key": "l"}]
        async with net(Stub(says={"x-ratelimit-limit-requests": "999"}), keys=keys) as n:
            for left in (1, 0):
                status, _, headers = await ask(n, "s")
                assert status == 200 and headers["x-ratelimit-remaining-requests"] == str(left)
                assert headers["x-ratelimit-limit-requests"] == "2"  # the node's own, not the engine's
            status, body, headers = await ask(n, "s")
            assert status == 429 and 20 <= int(headers["retry-after"]) <= 30
            assert headers["x-ratelimit-remaining-requests"] == "0" and headers["x-request-id"]
            assert json.loads(body)["error"]["type"] == "rate_limit_exceeded"
            for _ in range(4):
                assert (await ask(n, "l"))[0] == 200
            assert n.stubs[0].begun == 6
            assert (await ask(n, "wrong"))[0] == 401
            async with n.session.get(n.urls[0] + "/v1/models", headers={"authorization": "Bearer s"}) as response:
                assert response.status == 200  # to look at the models is no such request
            assert await counted(n, "wwwserve_key_requests_total") == {
                'wwwserve_key_requests_total{key="small",status="200"}': 3.0,
                'wwwserve_key_requests_total{key="small",status="429"}': 1.0,
                'wwwserve_key_requests_total{key="large",status="200"}': 4.0,
            }
            assert await counted(n, "wwwserve_key_limited_total") == {
                'wwwserve_key_limited_total{key="small",limit="requests"}': 1.0
            }

    play(scene)


@pytest.mark.parametrize("streamed", [False, True])
def test_tokens_in_a_minute_are_bounded_by_what_was_used(streamed: bool) -> None:
    others = {"/v1/embeddings": {"data": [], "usage": {"prompt_tokens": 30, "total_tokens": 30}}}

    async def scene() -> None:
        keys = [{"name": "a", "key": "a", "tokens_per_minute": 20.0}]
        async with net(Stub(others=others), keys=keys) as n:
            more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if streamed else {}
            assert (await ask(n, "a", **more))[0] == 200  # 7 and 5 tokens
            used = {'wwwserve_key_tokens_total{key="a",kind="prompt"}': 7.0,
                    'wwwserve_key_tokens_total{key="a",kind="output"}': 5.0}  # fmt: skip
            assert await counted(n, "wwwserve_key_tokens_total") == used
            assert (await ask(n, "a", "/v1/embeddings", input="x"))[0] == 200
            status, _, headers = await ask(n, "a", **more)
            assert status == 429 and 50 <= int(headers["retry-after"]) <= 70  # 22 in debt, a third each second
            assert headers["x-ratelimit-remaining-tokens"] == "0"
            assert n.stubs[0].begun == 2

    play(scene)


def test_a_stream_without_usage_counts_by_its_events_and_one_that_is_left_by_what_came() -> None:
    async def scene() -> None:
        keys = [{"name": "a", "key": "a", "tokens_per_minute": 1e6}]
        async with net(Stub(tokens=8, pause_s=0.05), keys=keys) as n:
            assert (await ask(n, "a", stream=True))[0] == 200
            used = await counted(n, "wwwserve_key_tokens_total")
            assert used['wwwserve_key_tokens_total{key="a",kind="prompt"}'] == 10.0  # 40 bytes
            assert 8 <= used['wwwserve_key_tokens_total{key="a",kind="output"}'] <= 10
            n.stubs[0].tokens = 10_000
            body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 40}], "stream": True}
            headers = {"authorization": "Bearer a"}
            async with n.session.post(n.urls[0] + "/v1/chat/completions", json=body, headers=headers) as response:
                for _ in range(6):
                    await response.content.readuntil(b"\n\n")

            async def more() -> bool:
                now = await counted(n, "wwwserve_key_tokens_total")
                return now['wwwserve_key_tokens_total{key="a",kind="prompt"}'] == 20.0

            await n.until(more)
            now = await counted(n, "wwwserve_key_tokens_total")
            came = (
                now['wwwserve_key_tokens_total{key="a",kind="output"}']
                - used['wwwserve_key_tokens_total{key="a",kind="output"}']
            )
            assert 5 <= came <= 100
            assert (await counted(n, "wwwserve_key_requests_total"))[
                'wwwserve_key_requests_total{key="a",status="499"}'
            ] == 1.0

    play(scene)


def test_requests_at_once_are_bounded_for_each_key() -> None:
    async def scene() -> None:
        keys = [{"name": "a", "key": "a", "concurrent": 2}, "b"]
        async with net(Stub(pause_s=0.2), keys=keys) as n:
            first = [asyncio.create_task(ask(n, "a")) for _ in range(2)]

            async def begun() -> bool:
                return n.stubs[0].begun == 2

            await n.until(begun)
            assert (await counted(n, "wwwserve_key_requests_open"))['wwwserve_key_requests_open{key="a"}'] == 2.0
            status, _, headers = await ask(n, "a")
            assert (status, headers["retry-after"]) == (429, "1")
            assert (await ask(n, "b"))[0] == 200
            assert [each[0] for each in await asyncio.gather(*first)] == [200, 200]
            assert (await ask(n, "a"))[0] == 200
            assert (await counted(n, "wwwserve_key_requests_open"))['wwwserve_key_requests_open{key="a"}'] == 0.0

    play(scene)


def test_the_access_log_says_who_asked_what_and_not_what_was_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wwwserve.access")

    async def scene() -> None:
        async with net(Stub(), keys=[{"name": "team", "key": "sk-secret"}], access_log=True) as n:
            assert (await ask(n, "sk-secret"))[0] == 200
            assert (await ask(n, "sk-wrong", model="x" * 100))[0] == 401
            assert (await ask(n, "sk-secret", model="a model by another name"))[0] == 404

    play(scene)
    records = [record for record in caplog.records if record.name == "wwwserve.access"]
    lines = [json.loads(node.JsonLines().format(record)) for record in records]
    assert [(line["status"], line["key"], line["model"]) for line in lines] == [
        (200, "team", MODEL), (401, None, None), (404, "team", None)
    ]  # fmt: skip
    first = lines[0]
    assert (first["prompt_tokens"], first["output_tokens"], first["executor"]) == (7, 5, "local")
    assert first["path"] == "/v1/chat/completions" and 0 < first["first_s"] <= first["took_s"] < 60
    assert first["address"] == "127.0.0.1" and first["trace"] == first["request_id"] and first["sent"] > 50
    for secret in ("sk-secret", "sk-wrong", "xxxx", "by another name"):
        assert secret not in "\n".join(map(json.dumps, lines))


def test_without_it_nothing_is_logged_of_a_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "wwwserve.access")

    async def scene() -> None:
        async with net(Stub()) as n:
            assert (await ask(n, "any"))[0] == 200

    play(scene)
    assert not [record for record in caplog.records if record.name == "wwwserve.access"]
