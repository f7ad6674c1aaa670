"""Several engines behind one node: what they are together, which one has a request, and what is done without one."""

import asyncio
import contextlib
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from stub_nodes import GOOD, MODEL, PROFILE, Net, Stub, busy, net, play

from wwwserve.agents.estimate import expect, prefill_delay_s
from wwwserve.agents.hardware import Profile, pooled, profile
from wwwserve.agents.kernel import Floats
from wwwserve.agents.knowledge import (
    AD_CONTEXT,
    AD_MAX_NUM_SEQS,
    AD_MEAN_OUTPUT,
    AD_MEAN_PROMPT,
    AD_MEAN_UNCACHED,
    AD_UNSHARED,
    ADVERT_SIZE,
    on_scrape,
    write_profile,
)
from wwwserve.agents.rules import Rule
from wwwserve.agents.tariff import write_compute
from wwwserve.serving import cli, config
from wwwserve.serving.display import show
from wwwserve.serving.engine.adapter import Engine, Load, made_at
from wwwserve.serving.engine.pool import Pool
from wwwserve.serving.http.addresses import engine_base
from wwwserve.serving.http.upstream import DirectTransport
from wwwserve.serving.node_provider import NodeProvider
from wwwserve.serving.setup.doctor import FAILED, OK, WARNING, examine

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ONE = profile("rtx-4090", "qwen3-8b", 64)
SECOND = profile("a40", "llama-3-8b", 24)


def usual(made: Profile) -> Floats:
    advert = np.zeros(ADVERT_SIZE)
    write_profile(advert, made.row(), 1.0)
    advert[[AD_MEAN_PROMPT, AD_MEAN_UNCACHED, AD_MEAN_OUTPUT]] = 300.0, 120.0, 250.0
    advert[AD_CONTEXT], advert[AD_UNSHARED] = 450.0, 0.9
    return advert


# What they are together.


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("alone", [ONE, SECOND])
@pytest.mark.parametrize(("running", "waiting"), [(0, 0), (9, 0), (64, 8)])
def test_a_pool_under_even_load_takes_as_long_as_each_of_its_engines(
    count: int, alone: Profile, running: int, waiting: int
) -> None:
    one, all_of_them = usual(alone), usual(pooled(alone, count))
    load = np.array([running, waiting, 400.0 * running, 120.0 * waiting])
    on_scrape(one, 0.0, *load, np.inf)
    on_scrape(all_of_them, 0.0, *(count * load), np.inf)
    for prompt, cached in ((100.0, 0.0), (3000.0, 0.0), (3000.0, 2000.0)):
        own = [prefill_delay_s(each, prompt - cached, cached, prompt - cached) for each in (one, all_of_them)]
        first_s, token_s = expect(all_of_them, 0.0, prompt, cached)
        expected = expect(one, 0.0, prompt, cached)
        first_s += own[0] - own[1]  # one engine computes the prompt
        # One more is a smaller part of what a pool has, which each engine has once it has got one.
        share = (1.0 - 1.0 / count) / ((waiting or running) + 1.0)
        assert expected[1] * (1.0 - share) <= token_s <= expected[1] * (1.0 + 1e-9)
        assert expected[0] * (1.0 - share) <= first_s <= expected[0] * (1.0 + 1e-9)


@pytest.mark.parametrize("count", [1, 3])
def test_what_computing_costs_does_not_depend_on_how_many_there_are(count: int) -> None:
    costs = np.zeros((2, 3))
    for row, made in zip(costs, (ONE, pooled(ONE, count)), strict=True):
        write_compute(row, usual(made), 0.09)
    assert costs[0] == pytest.approx(costs[1], rel=0.02)
    assert pooled(ONE, 1) is ONE


def test_a_promise_has_one_engine_compute_the_prompt() -> None:
    market = config.parse(GOOD, "t").agreed()
    alone, three = (NodeProvider(Rule("single"), ONE, market, engines=count) for count in (1, 3))
    for prompt, cached in ((200, 0), (8000, 0), (8000, 6000)):
        assert [*three.expect(prompt, cached)] == pytest.approx([*alone.expect(prompt, cached)], rel=0.05)
    assert three.own[AD_MAX_NUM_SEQS] == 3 * 64
    three.resize(1)
    assert three.expect(500) == alone.expect(500) and three.own[AD_MAX_NUM_SEQS] == 64


# Which one.


def made(*loads: Load) -> Pool:
    """A pool of engines with these loads, all of which answer."""
    engines = [Engine("vllm", f"http://h:{k}", ONE, DirectTransport()) for k in range(len(loads))]
    for engine, load in zip(engines, loads, strict=True):
        engine.failures, engine.reason, engine._seen = 0, "", load
    return Pool(engines, usual(ONE))


def chosen(pool: Pool, prompt: int = 1000, cached: Mapping[str, int] | None = None, **more: Any) -> int:
    return pool.engines.index(pool.choose(prompt, lambda place: (cached or {}).get(place, 0), **more))


IDLE, SOME, MANY = Load(0.0, 0.0, 0.0), Load(10.0, 0.0, 4000.0), Load(30.0, 0.0, 12000.0)


def test_idle_engines_take_turns_and_the_least_loaded_one_is_chosen() -> None:
    async def scene() -> None:
        pool = made(IDLE, IDLE, IDLE)
        turns = []
        for _ in range(6):
            turns.append(chosen(pool))
            pool.chosen(pool.engines[turns[-1]])
        assert turns == [0, 1, 2] * 2
        assert [chosen(made(MANY, SOME, MANY)), chosen(made(MANY, MANY, IDLE))] == [1, 2]
        assert made(SOME, MANY).load() == Load(40.0, 0.0, 16000.0)

    play(scene)


def test_a_session_stays_where_its_prefix_is_until_the_queue_there_takes_longer() -> None:
    async def scene() -> None:
        here = {"1": 4000}
        assert chosen(made(SOME, MANY, SOME), 4200, here) == 1
        queues = [chosen(made(SOME, Load(64.0, waiting, 25600.0), SOME), 4200, here) for waiting in (1.0, 400.0)]
        assert queues == [1, 0]
        assert chosen(made(SOME, MANY, SOME), 4200, {"1": 16}) == 0  # hardly anything is cached

    play(scene)


def test_what_cannot_be_asked_or_was_tried_is_left_out_and_the_capacity_with_it() -> None:
    async def scene() -> None:
        pool = made(SOME, IDLE, IDLE)
        first, second, third = pool.engines
        assert chosen(pool, tried=(second,)) == 2 and chosen(pool, tried=(second, third)) == 0
        assert pool.spare((first, second)) and not pool.spare(pool.engines)
        assert (pool.count, pool.profile.max_num_seqs, pool.takes) == (3, 192, True)
        second.suspect("gone")
        third.full(30.0)
        assert chosen(pool) == 0 and chosen(pool, tried=(first,)) == 0
        assert (pool.count, pool.profile, pool.load()) == (1, ONE, SOME)
        assert pool.reason == "h:1: gone" and pool.healthy
        first.suspect("gone too")
        assert (pool.healthy, pool.takes, pool.count) == (True, False, 3)  # one is full, and will be back
        assert pool.load().running == 192 and pool.load().waiting > 100
        assert chosen(pool) == 2  # rather than one that is gone

    play(scene)


# Behind a node.


@contextlib.asynccontextmanager
async def node_of(*stubs: Stub, **more: Any) -> AsyncIterator[Net]:
    """A node before these engines; its `stubs` are they."""
    async with contextlib.AsyncExitStack() as stack:
        for each in stubs:
            await stack.enter_async_context(each.served())
        engine = {"url": [each.url for each in stubs], "profile": PROFILE, "timeout_s": 2.0}
        n = await stack.enter_async_context(net(Stub(), engine=engine, **more))
        n.stubs = list(stubs)

        async def all_up() -> bool:
            return all(each["takes"] for each in (await n.see())["engine"]["each"])

        await n.until(all_up)
        yield n


def test_engines_share_the_requests_of_a_node() -> None:
    async def scene() -> None:
        async with node_of(Stub(pause_s=0.02), Stub(pause_s=0.02), Stub(pause_s=0.02)) as n:
            seen = (await n.see())["engine"]
            assert (seen["up"], seen["reason"], seen["profile"]["max_num_seqs"]) == (True, "", 24)
            assert [each["url"] for each in seen["each"]] == [each.url for each in n.stubs]
            asked = await asyncio.gather(*(n.ask(messages=[{"role": "user", "content": f"{k}"}]) for k in range(18)))
            assert Counter(status for status, *_ in asked) == {200: 18}
            assert all(4 <= each.begun <= 8 for each in n.stubs)
            async with n.session.get(n.urls[0] + "/metrics") as response:
                page = await response.text()
            for each in n.stubs:
                assert f'wwwserve_engine_takes_requests{{engine="{each.url[7:]}"}} 1.0' in page
            assert page.count("wwwserve_engine_kv_cache_usage_ratio{") == 3

    play(scene)


@pytest.mark.parametrize("mode", ["500", "hangs up", "full"])
def test_what_one_engine_does_not_answer_another_does(mode: str) -> None:
    async def scene() -> None:
        async with node_of(Stub(mode=mode), Stub()) as n:
            asked = [await n.ask(messages=[{"role": "user", "content": f"{k}"}]) for k in range(12)]
            assert Counter(status for status, *_ in asked) == {200: 12}
            assert n.stubs[0].begun >= 1 and n.stubs[1].begun == 12
            n.stubs[0].mode = "well"

            async def back() -> bool:
                await n.ask()
                seen = (await n.see())["engine"]
                return bool(seen["profile"]["max_num_seqs"] == 16 and n.stubs[0].begun > 12)

            await n.until(back)

    play(scene)


@pytest.mark.parametrize("deadline_s", [10.0, 0.1])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_breaks_off_goes_on_at_another_engine_though_it_is_late(stream: bool, deadline_s: float) -> None:
    async def scene() -> None:
        first, second = Stub(mode="breaks off", breaks=1, pause_s=0.1), Stub(pause_s=0.1)
        async with node_of(first, second, resume=True, deadlines_s=[deadline_s]) as n:
            if not stream:
                first.mode = "500"
            status, body, _ = await n.ask(stream=stream)
            assert status == 200 and b"error" not in body
            if stream:
                assert [body.count(f'"w{k} '.encode()) for k in range(5)] == [1] * 5
            assert (first.begun, second.begun) == (1, 1)

    play(scene)


def test_while_one_is_down_the_node_is_smaller_and_with_none_it_answers_503(capsys: pytest.CaptureFixture[str]) -> None:
    async def scene() -> None:
        async with node_of(Stub(), Stub()) as n:

            async def seqs(count: int) -> bool:
                return bool((await n.see())["engine"]["profile"]["max_num_seqs"] == count)

            async def health() -> int:
                async with n.session.get(n.urls[0] + "/health") as response:
                    return response.status

            n.configs[0]["engine"]["url"][0] = "http://127.0.0.1:9"
            n.running[0].cancel()
            await asyncio.gather(*n.running, return_exceptions=True)
            await n.start(0)
            await n.until(lambda: seqs(8))
            seen = (await n.see())["engine"]
            assert seen["up"] and seen["reason"].startswith("127.0.0.1:9: ") and await health() == 200
            assert [each["up"] for each in seen["each"]] == [False, True]
            show(await n.see())
            assert "1 of 2 up" in (shown := capsys.readouterr().out) and "down" in shown
            assert (await n.ask())[0] == 200
            n.configs[0]["engine"]["url"][1] = "http://127.0.0.1:10"
            n.running[0].cancel()
            await asyncio.gather(*n.running, return_exceptions=True)
            await n.start(0)
            assert await health() == 503 and (await n.ask())[0] == 503

    play(scene)


def named_down(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.engine for each in caplog.records if each.message == "the engine is down"]  # type: ignore[attr-defined]


def test_the_log_names_an_engine_that_is_down_at_the_start_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with Stub().served() as well, net(Stub()) as n:
            n.configs[0]["engine"] = n.configs[0]["engine"] | {"url": ["http://127.0.0.1:9", well.url]}
            n.running[0].cancel()
            await asyncio.gather(*n.running, return_exceptions=True)
            await n.start(0)

            async def named() -> bool:
                return bool(named_down(caplog))

            await n.until(named)
            await asyncio.sleep(0.3)  # three looks more
            assert named_down(caplog) == ["127.0.0.1:9"]

    play(scene)


def test_the_log_names_an_engine_that_a_request_finds_down(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with contextlib.AsyncExitStack() as life, Stub().served() as well:
            first = await life.enter_async_context(Stub().served())
            engine = {"url": [first.url, well.url], "profile": PROFILE}
            async with net(Stub(), engine=engine, market={"tick_s": 10.0}) as n:

                async def both() -> bool:
                    return all(each["takes"] for each in (await n.see())["engine"]["each"])

                async def named() -> bool:
                    return bool(named_down(caplog))

                await n.until(both)
                await life.aclose()
                assert [(await n.ask())[0] for _ in range(2)] == [200, 200]  # long before it is scraped twice in vain
                assert not (await n.see())["engine"]["each"][0]["up"] and not named_down(caplog)
                await n.until(named, 60.0)
                assert named_down(caplog) == [first.url.removeprefix("http://")]

    play(scene)


def test_a_peers_request_is_answered_by_another_engine_where_one_does_not() -> None:
    async def scene() -> None:
        async with Stub(mode="500").served() as broken, Stub().served() as well, net(busy(), Stub()) as n:
            n.configs[1]["engine"] = n.configs[1]["engine"] | {"url": [broken.url, well.url]}
            n.running[1].cancel()
            await asyncio.gather(n.running[1], return_exceptions=True)
            await n.start(1)

            async def there() -> bool:
                up = all(each["takes"] for each in (await n.see(1))["engine"]["each"])
                return up and bool((await n.see(0))["peers"][0]["there"])

            await n.until(there)
            status, body, _ = await n.ask()
            assert status == 200 and well.url.encode() in body and (broken.begun, well.begun) == (1, 1)

    play(scene)


def test_models_are_those_that_all_engines_serve() -> None:
    async def scene() -> None:
        first, second = Stub(models_served=[MODEL, "lora-a", "lora-b"]), Stub(models_served=["lora-b", MODEL])
        async with node_of(first, second) as n:
            assert (await n.see())["serves"] == [MODEL, "lora-b"]
            second.models_served = ["other"]

            async def told() -> bool:
                return "serves other" in str((await n.see())["engine"]["reason"])

            await n.until(told)
            reason = (await n.see())["engine"]["reason"]
            assert f"{first.url} serves stub, lora-a, lora-b, while {second.url} serves other" in reason
            before = second.begun
            assert [(await n.ask())[0] for _ in range(4)] == [200] * 4
            assert second.begun == before, "one that serves something else now is left out"
            assert [each["takes"] for each in (await n.see())["engine"]["each"]] == [True, False]
            second.models_served = [MODEL]

            async def well() -> bool:
                seen = await n.see()
                return bool(seen["engine"]["reason"] == "" and seen["serves"] == [MODEL])

            await n.until(well)

    play(scene)


def test_what_is_passed_through_goes_to_one_that_can_be_asked() -> None:
    async def scene() -> None:
        vectors = {"/v1/embeddings": {"data": [], "usage": {"prompt_tokens": 3, "total_tokens": 3}}}
        first, second = Stub(others=vectors), Stub(others=vectors)
        async with node_of(first, second) as n:
            for _ in range(4):
                body = {"model": MODEL, "input": "x"}
                async with n.session.post(n.urls[0] + "/v1/embeddings", json=body) as response:
                    assert response.status == 200
            assert (first.begun, second.begun) == (2, 2)

    play(scene)


def test_as_many_are_tried_as_there_are() -> None:
    async def scene() -> None:
        async with node_of(Stub(mode="500"), Stub(mode="500"), Stub(mode="500"), Stub(mode="500"), Stub()) as n:
            assert (await n.ask())[0] == 200
            assert [each.begun for each in n.stubs] == [1] * 5

    play(scene)


def test_a_request_that_breaks_engines_breaks_no_more_than_three() -> None:
    async def scene() -> None:
        async with node_of(*(Stub(mode="hangs up") for _ in range(5))) as n:
            status, *_ = await n.ask()
            assert status == 502 and sum(each.begun > 0 for each in n.stubs) == 3

    play(scene)


# Setting up.


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ([], "engine.url must be of one engine or a list"),
        *[
            (
                [one, other],
                f"engine.url must be a list of different .* got {re.escape(engine_base(one))} and .* the same",
            )
            for one, other in (
                ("http://h:1", "http://h:1/v1"),
                ("http://localhost:1", "http://127.0.0.1:1/"),
                ("http://h", "http://H:80"),
                ("https://h:443/v1/", "https://h."),
                ("http://0.0.0.0:1", "http://127.0.0.1:1"),
                ("http://10.0.0.1:1", "http://[::ffff:a00:1]:1"),
                ("http://127.0.0.1:1", "http://[::1]:1"),
            )
        ],
        ([f"http://h:{k}" for k in range(65)], "engine.url must be"),
        (["http://h:1", "h:2"], "every url must be http"),
        (["http://h:1", 2], r"Expected `str`, got `int` - at `\$.engine.url\[1\]`"),
    ],
)
def test_lists_of_engines_that_cannot_be(url: list[Any], message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        config.parse(GOOD | {"engine": {"url": url, "profile": PROFILE}}, "t")


def test_engines_that_differ_in_host_port_or_path_are_several() -> None:
    urls = ["http://h:1", "http://h:2", "http://g:1", "http://h:1/a", "http://127.0.0.1:1", "http://127.0.0.2:1"]
    assert config.parse(GOOD | {"engine": {"url": urls, "profile": PROFILE}}, "t").engine.urls == tuple(urls)


def test_one_engine_by_two_names_counts_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Told by when it made its metrics, as prometheus_client writes it; the name that is left out takes over where the
    first does not answer."""

    async def scene() -> None:
        at, mute = "1.7769301736864555e+09", Stub()
        stubs = [Stub(made_at=at), Stub(made_at=at), Stub(made_at="1.7769301736864586e+09"), mute]
        async with contextlib.AsyncExitStack() as stack:
            for each in stubs:
                await stack.enter_async_context(each.served())
            urls = [each.url for each in stubs]
            gpu = ["--gpu", "rtx-4090", "--model", "qwen3-8b"]
            argv = ["init", str(tmp_path / "node.yaml"), "--name", "n", *gpu, "--engine", urls[0], "--engine"]
            assert await asyncio.to_thread(cli.main, [*argv, urls[1]]) == 2
            assert await asyncio.to_thread(cli.main, [*argv, urls[2]]) == 0
            n = await stack.enter_async_context(net(Stub(), engine={"url": urls}))

            async def taking(*expected: bool) -> bool:
                return [each["takes"] for each in (await n.see())["engine"]["each"]] == [*expected]

            await n.until(lambda: taking(True, False, True, True))
            seen = (await n.see())["engine"]
            assert seen["profile"]["max_num_seqs"] == 24 and seen["up"]
            names = [url.partition("://")[2] for url in urls]
            assert seen["reason"] == f"{names[1]} is {names[0]} by another name"
            assert caplog.text.count("an engine is named twice and counts once") == 1
            for k in range(8):
                await n.ask(messages=[{"role": "user", "content": f"{k}"}])
            assert [each.begun > 0 for each in stubs] == [True, False, True, True]
            stubs[0].mode = "gone"
            await n.until(lambda: taking(False, True, True, True))
            stubs[0].mode = "well"
            await n.until(lambda: taking(True, False, True, True))

    play(scene)


def test_a_page_says_when_its_program_made_its_metrics() -> None:
    labels = 'model_name="a, b_created{} 5.5",engine="0"'
    page = "\n".join([
        "# TYPE vllm:prompt_tokens_created gauge", f"vllm:prompt_tokens_created{{{labels}}} 1.7769301736864786e+09",
        f"vllm:num_preemptions_created{{{labels}}} 1.7769301736864555e+09", "process_start_time_seconds 1776930170.5",
        f"vllm:requests_created_total{{{labels}}} 0.5", "vllm:e2e_created 1.7e+09",
    ])  # fmt: skip
    assert made_at(page) == "1.7769301736864555e+09"
    assert made_at("process_start_time_seconds 1776930170.5\nvllm:prompt_tokens_created 1.7e+09\n") == ""


def test_a_list_of_engines_is_read_as_one_url_is() -> None:
    parsed = config.parse(GOOD | {"engine": {"url": ["http://h:1/v1/", "http://h:2"], "profile": PROFILE}}, "t")
    assert parsed.engine.urls == ("http://h:1", "http://h:2")
    assert config.parse(GOOD, "t").engine.urls == ("http://h:1",)


def test_init_and_doctor_look_at_each_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, resolved = tmp_path / "node.yaml", socket.getaddrinfo

    async def scene() -> None:
        async with Stub().served() as first, Stub().served() as second:
            gpu = ["--gpu", "rtx-4090", "--model", "qwen3-8b"]
            argv = ["init", str(file), "--name", "n", "--engine", first.url, "--engine", second.url + "/v1", *gpu]
            assert await asyncio.to_thread(cli.main, argv) == 0
            assert yaml.safe_load(file.read_text())["engine"]["url"] == [first.url, second.url]
            found = [each for each in await asyncio.to_thread(examine, file) if each.what in ("engine", "engines")]
            assert [each.state for each in found] == [OK, OK]
            assert all(url in each.found for each, url in zip(found, (first.url, second.url), strict=True))
            second.models_served = ["other"]
            odd = [each for each in await asyncio.to_thread(examine, file) if each.what == "engines"]
            assert [each.state for each in odd] == [FAILED]
            assert f"{first.url} serves stub, {second.url} other" in odd[0].found
            second.models_served, other = first.models_served, first.url.replace("127.0.0.1", "localhost.localdomain")
            monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **also: resolved("127.0.0.1", *more, **also))
            content = yaml.safe_load(file.read_text())
            for urls, made_at, states in (
                ([first.url, other], "", [WARNING]), ([first.url, other], "1.7769301736864555e+09", [FAILED]),
                ([first.url, second.url], "", []),
            ):  # fmt: skip
                first.made_at, content["engine"]["url"] = made_at, urls
                file.write_text(yaml.safe_dump(content))
                odd = [each for each in await asyncio.to_thread(examine, file) if each.what == "engines"]
                assert [each.state for each in odd] == states and all(other in each.found for each in odd)
            second.models_served = ["other"]
            argv[1] = str(tmp_path / "second.yaml")
            capsys.readouterr()
            assert await asyncio.to_thread(cli.main, argv) == 2
            assert f"ones that are alike: {first.url} serves stub" in capsys.readouterr().err

    play(scene)
