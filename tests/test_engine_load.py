"""The load that an engine tells on its metrics page, and what a node counts where it tells none or tells it late."""

import re
import time
from pathlib import Path

import pytest
from stub_nodes import PROFILE, Stub, net, play

from wwwserve.serving import config
from wwwserve.serving.engine import adapter as engine
from wwwserve.serving.engine.adapter import NAMES, EngineError, Sent, read_load
from wwwserve.serving.http.sse import AnswerMeter
from wwwserve.serving.http.upstream import DirectTransport
from wwwserve.serving.market import Promise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

VLLM_PAGE = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
"""
# Recorded; each file says how.
SGLANG_PAGES = {
    kind: Path(__file__).with_name("sglang").joinpath(f"0.5.23-{kind}.txt").read_text(encoding="utf-8")
    for kind in ("data-parallel", "priority")
}


def test_loads_are_summed_and_the_fullest_cache_counts() -> None:
    assert read_load(VLLM_PAGE, NAMES["vllm"], 1000)[:3] == (5.0, 4.0, 500.0)
    assert read_load(SGLANG_PAGES["data-parallel"], NAMES["sglang"], 1000)[:3] == (12.0, 4.0, 410.0)
    assert read_load(SGLANG_PAGES["priority"], NAMES["sglang"], 1000)[:3] == (12.0, 4.0, 280.0)
    assert read_load("vllm:num_requests_running 1\nvllm:num_requests_waiting 2 1700\nvllm:kv_cache_usage_perc 0.1",
                     NAMES["vllm"], 100)[:3] == (1.0, 2.0, 10.0)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "page", "name"),
    [("vllm", VLLM_PAGE, name) for name in NAMES["vllm"]]
    + [("sglang", page, name) for page in SGLANG_PAGES.values() for name in NAMES["sglang"]],
)
def test_a_missing_metric_is_named(kind: str, page: str, name: str) -> None:
    without = "\n".join(line for line in page.splitlines() if not line.startswith(f"{name}{{"))
    with pytest.raises(EngineError, match=f"no metric {name}"):
        read_load(without, NAMES[kind], 1000)
    with pytest.raises(EngineError, match=f"metric {name} has no number"):
        read_load(re.sub(rf"^({name}{{.*}}) .*$", r"\1 many", page, flags=re.MULTILINE), NAMES[kind], 1000)


@pytest.mark.parametrize("value", ["NaN", "-1", "inf", "1e300"])
def test_a_load_that_cannot_be_is_none(value: str) -> None:
    page = f"vllm:num_requests_running {value}\nvllm:num_requests_waiting 2\nvllm:kv_cache_usage_perc 0.1"
    with pytest.raises(EngineError, match=r"num_requests_running is .*, expected 0 to"):
        read_load(page, NAMES["vllm"], 100)


def test_an_engine_of_an_earlier_version_is_read_as_well() -> None:
    old = VLLM_PAGE.replace("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
    assert read_load(old, NAMES["vllm"], 1000) == read_load(VLLM_PAGE, NAMES["vllm"], 1000)


def test_an_engine_that_does_not_say_its_load_is_used_and_what_it_was_sent_is_counted() -> None:
    async def scene() -> None:
        async with net(Stub(says_load=False)) as n:
            started_s = time.monotonic()
            assert (await n.ask())[0] == 200 and time.monotonic() - started_s < 30
            seen = (await n.see())["engine"]
            assert seen["up"] and "no metric vllm:num_requests_running" in seen["reason"]
            parsed = config.parse(n.configs[0], "t")
            e = engine.Engine("vllm", n.stubs[0].url, parsed.engine_profile(), DirectTransport())
            await e.scrape()
            for _ in range(10):
                e.sent(100)
            await e.scrape()  # what is there by count is there still
            assert e.load()[:3] == (8.0, 2.0, 1120.0)
            for _ in range(10):
                e.returned(100, 20)
            assert e.load()[:3] == (0.0, 0.0, 0.0)
            n.stubs[0].says_load = True
            await e.scrape()
            assert e.reason == "" and e.load()[:3] == (0.0, 0.0, 0.0)

    play(scene)


def test_what_was_sent_since_the_scrape_is_counted() -> None:
    async def scene() -> None:
        async with Stub(waiting=0).served() as stub:
            profile = config.parse(
                {"name": "n", "key": "n.pem", "engine": {"url": stub.url, "profile": PROFILE}}, "t"
            ).engine_profile()
            e = engine.Engine("vllm", stub.url, profile, DirectTransport())
            assert not e.healthy and e.load().waiting > 100
            await e.scrape()
            assert e.healthy and e.load()[:3] == (0.0, 0.0, 0.0)
            for _ in range(10):
                e.sent(100)
            assert e.load()[:3] == (8.0, 2.0, 1120.0)
            e.returned(100, 20)
            assert e.load()[:3] == (8.0, 1.0, 1120.0 - 128.0)
            await e.scrape()
            assert e.load()[:3] == (0.0, 0.0, 0.0)

    play(scene)


def test_what_runs_is_all_but_the_last_of_those_without_a_token_as_many_as_wait() -> None:
    async def scene() -> None:
        async with Stub(waiting=3).served() as stub:
            profile = config.parse(
                {"name": "n", "key": "n.pem", "engine": {"url": stub.url, "profile": PROFILE}}, "t"
            ).engine_profile()
            e = engine.Engine("vllm", stub.url, profile, DirectTransport())
            await e.scrape()
            there = []
            for k in range(5):
                sent = Sent(k, True, k != 4, AnswerMeter(), 0.0, Promise(1.0, 0.5), e.post("/v1/completions", b""))
                there.append(sent)
            for k, words in ((0, 3), (3, 1)):
                for _ in range(words):
                    there[k].meter.feed(b'data: {"choices": [{"text": "w "}]}\n\n')
            found = [(sent.request, tokens) for sent, tokens in e.progress(there, 2.0)]
            assert found == [(0, 3.0), (3, 1.0), (4, 2.0)]  # the last is not streamed: 1 s beyond its first token
            assert [sent.request for sent, _ in e.progress(there, 0.5)] == [0, 1, 3]

    play(scene)
