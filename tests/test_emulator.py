"""The emulated engine: the OpenAI API's shapes, vLLM's metrics, and the times of the engine it emulates."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import aiohttp
import numpy as np
import pytest
from virtual import VirtualEngine, virtually

from wwwserve.agents.hardware import profile
from wwwserve.agents.kernel import records
from wwwserve.agents.protocol import VOTE_A, VOTE_B, VOTE_UNDECIDED
from wwwserve.envs.emulator import LOOK_S, Emulator, read_profile
from wwwserve.envs.emulator_api import Completion
from wwwserve.envs.engine import ENGINE, JOB, advance, reset_engine, reset_jobs, submit
from wwwserve.envs.prefix_cache import NO_CACHE
from wwwserve.serving.duel.judge import gain, vote_by

SPEED = 200.0
STOPPED = (0, -signal.SIGTERM)  # the server passes the signal on when it has stopped


class Server:
    """An emulator in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "wwwserve.envs.emulator", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        assert ready, "the emulator did not start"
        self.url: str = json.loads(ready)["url"]
        self.models: list[str] = json.loads(ready)["models"]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server("--speed", str(SPEED), "--max-num-seqs", "8", "--served-model-name", "qwen3", "tiny")
    yield made
    made.stop()


async def post(url: str, path: str, **body: Any) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as answer:
        return answer.status, await answer.json()


def ask(server: Server, path: str, **body: Any) -> tuple[int, Any]:
    return asyncio.run(post(server.url, path, **body))


def chat(text: str = "How do you do?", **more: Any) -> dict[str, Any]:
    return {"model": "qwen3", "messages": [{"role": "user", "content": text}], **more}


async def events(url: str, path: str, body: dict[str, Any]) -> list[Any]:
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = (await answer.read()).decode()
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_models_are_those_served(server: Server) -> None:
    async def get() -> Any:
        async with aiohttp.ClientSession() as session, session.get(server.url + "/v1/models") as answer:
            return await answer.json()

    assert server.models == ["qwen3", "tiny"]
    listed = asyncio.run(get())
    assert [each["id"] for each in listed["data"]] == ["qwen3", "tiny"]
    assert all(each["max_model_len"] > 1000 for each in listed["data"])


def test_an_answer_has_as_many_words_as_tokens(server: Server) -> None:
    status, answer = ask(server, "/v1/chat/completions", **chat(max_tokens=17, ignore_eos=True))
    assert status == 200
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant" and len(message["content"].split()) == 17
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": 4, "completion_tokens": 17, "total_tokens": 21, "prompt_tokens_details": {"cached_tokens": 0}
    }  # fmt: skip
    status, answer = ask(server, "/v1/completions", model="tiny", prompt="x" * 400, max_tokens=3, ignore_eos=True)
    assert status == 200 and len(answer["choices"][0]["text"].split()) == 3
    assert answer["usage"]["prompt_tokens"] == 100


def test_a_model_ends_by_itself_and_always_in_the_same_way(server: Server) -> None:
    answers = [ask(server, "/v1/chat/completions", **chat(f"number {k % 20}"))[1] for k in range(40)]
    lengths = np.array([answer["usage"]["completion_tokens"] for answer in answers])
    assert {answer["choices"][0]["finish_reason"] for answer in answers} == {"stop"}
    assert lengths[:20].tolist() == lengths[20:].tolist()
    assert lengths.std() > 20 and 100 < np.median(lengths) < 400
    bounded = ask(server, "/v1/chat/completions", **chat("number 1", max_tokens=5, min_tokens=5))[1]
    assert bounded["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_brings_the_same_answer_in_parts(server: Server, path: str) -> None:
    prompt = chat("tell me") if "chat" in path else {"model": "qwen3", "prompt": "tell me"}
    more = {"max_tokens": 300, "ignore_eos": True}
    status, whole = ask(server, path, **prompt, **more)
    assert status == 200
    parts = asyncio.run(
        events(server.url, path, {**prompt, **more, "stream": True, "stream_options": {"include_usage": True}})
    )
    choices = [part["choices"][0] for part in parts if part["choices"]]
    if "chat" in path:
        assert choices[0]["delta"]["role"] == "assistant"
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == whole["choices"][0]["message"]["content"]
    else:
        text = "".join(choice["text"] for choice in choices)
        assert text == whole["choices"][0]["text"]
    assert len(choices) >= 3 and choices[-1]["finish_reason"] == "length"
    assert parts[-1]["choices"] == [] and parts[-1]["usage"] == whole["usage"]


def test_a_stream_without_usage_does_not_tell_it(server: Server) -> None:
    parts = asyncio.run(events(server.url, "/v1/chat/completions", chat(max_tokens=4, stream=True)))
    assert all("usage" not in part for part in parts)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/chat/completions", chat(model="gpt"), 404, "the model 'gpt' is not served here"),
        ("/v1/chat/completions", {"model": "qwen3"}, 400, "messages are missing"),
        ("/v1/completions", {"model": "qwen3", "prompt": {}}, 400, "prompt is dict"),
        ("/v1/chat/completions", chat(n=2), 400, "n is 2, expected 1"),
        ("/v1/chat/completions", chat(max_tokens=0), 400, "max_tokens is 0"),
        ("/v1/chat/completions", chat(stream=True, stream_options=3), 400, "stream_options is not an object"),
        ("/v1/completions", {"model": "qwen3", "prompt": "x" * 400_000}, 400, "the prompt has 100000 tokens"),
        ("/v1/embeddings", {}, 404, "no POST /v1/embeddings here"),
    ],
)
def test_what_cannot_be_done_is_refused_as_openai_does(
    server: Server, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    found, answer = ask(server, path, **body)
    assert found == status
    assert message in answer["error"]["message"] and answer["error"]["code"] == status


def test_a_body_that_is_no_json_is_refused(server: Server) -> None:
    async def send() -> tuple[int, Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(server.url + "/v1/completions", data=b"{nope") as answer,
        ):
            return answer.status, await answer.json()

    status, answer = asyncio.run(send())
    assert status == 400 and "no JSON" in answer["error"]["message"]


def gauge(page: str, name: str) -> float:
    found = re.search(rf"^{name}\{{[^}}]*\}} (\S+)$", page, re.MULTILINE)
    assert found, name
    return float(found[1])


def test_metrics_show_the_load_and_a_hang_up_frees_it() -> None:
    server = Server("--speed", "1", "--max-num-seqs", "2", "--max-num-queued-reqs", "3")

    async def run() -> None:
        async with aiohttp.ClientSession() as session:
            body = {"prompt": "x" * 2000, "max_tokens": 3000, "ignore_eos": True}
            posted: list[asyncio.Task[Any]] = []

            def send(count: int) -> None:
                url = server.url + "/v1/completions"
                posted.extend(asyncio.create_task(session.post(url, json=body)) for _ in range(count))

            async def page() -> str:
                async with session.get(server.url + "/metrics") as answer:
                    return await answer.text()

            async def until(running: float, waiting: float) -> str:
                for _ in range(500):
                    text = await page()
                    if (gauge(text, "vllm:num_requests_running"), gauge(text, "vllm:num_requests_waiting")) == (
                        running, waiting,
                    ):  # fmt: skip
                        return text
                    await asyncio.sleep(0.01)
                raise AssertionError(text)

            send(2)
            await until(2, 0)
            send(3)
            text = await until(2, 3)
            assert 'num_gpu_blocks="' in text and gauge(text, "vllm:kv_cache_usage_perc") > 0.01
            async with session.post(server.url + "/v1/completions", json=body) as refused:
                assert refused.status == 503 and refused.headers["retry-after"] == "1"
            for task in posted:
                task.cancel()
            await asyncio.gather(*posted, return_exceptions=True)
            text = await until(0, 0)
            assert gauge(text, "vllm:kv_cache_usage_perc") == 0.0

    try:
        asyncio.run(run())
    finally:
        assert server.stop() in STOPPED


def test_times_are_those_of_the_engine() -> None:
    """The same arrivals in the engine alone: latencies agree but for the looks."""
    card = profile("rtx-4090", "qwen3-8b", 8)
    rng = np.random.default_rng(4)
    at_s, output = np.sort(rng.uniform(0, 60, 40)), rng.integers(50, 600, 40)

    engine, jobs, done = records(1, ENGINE), records(40, JOB), np.zeros(400, np.int64)
    reset_engine(engine[0], card.row())
    reset_jobs(jobs)
    jobs["prompt"], jobs["output"] = 50, output
    for k in range(40):
        advance(engine[0], NO_CACHE, jobs, at_s[k], done, 0)
        submit(engine[0], NO_CACHE, jobs, k, at_s[k])
    advance(engine[0], NO_CACHE, jobs, 1e6, done, 0)
    expected_s = jobs["finish_s"] - at_s

    async def run() -> list[float]:
        emulator = VirtualEngine(card, ["m"])
        looks = asyncio.create_task(emulator.run())
        start = emulator.now_s

        async def one(k: int) -> float:
            await asyncio.sleep(start + at_s[k] - emulator.now_s)
            began = emulator.now_s
            job = emulator.put(50, int(output[k]), False)
            await job.changed.wait()
            return emulator.now_s - began

        latencies = await asyncio.gather(*(one(k) for k in range(40)))
        looks.cancel()
        return list(latencies)

    found_s = np.array(virtually(run()))
    assert ((found_s - expected_s + 1e-6 >= 0) & (found_s - expected_s < LOOK_S + 1e-3)).all()


def cached(usage: dict[str, Any]) -> int:
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_a_session_finds_what_was_computed_of_it_and_nobody_else_does(server: Server) -> None:
    messages = [{"role": "user", "content": "What is new? " * 40}]
    before = cache_counts(server)
    prompts, hits = 0, []
    for turn in range(3):
        if turn % 2:
            asked = chat(messages=messages, stream=True, stream_options={"include_usage": True}, max_tokens=50)
            parts = asyncio.run(events(server.url, "/v1/chat/completions", asked))
            answer, usage = "".join(p["choices"][0]["delta"].get("content", "") for p in parts[:-1]), parts[-1]["usage"]
        else:
            told = ask(server, "/v1/chat/completions", **chat(messages=messages, max_tokens=50))[1]
            answer, usage = told["choices"][0]["message"]["content"], told["usage"]
        hits.append(cached(usage))
        known = prompts
        prompts = usage["prompt_tokens"] + usage["completion_tokens"]
        assert hits[-1] == max(0, known - 1) // 16 * 16  # the last token of an answer is not computed
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": f"And {turn}? " * 20}]
    queries, found = (b - a for a, b in zip(before, cache_counts(server), strict=True))
    assert found == sum(hits) > 0 and queries > found
    again = ask(server, "/v1/chat/completions", **chat(messages=messages[:-2], max_tokens=5))[1]["usage"]
    assert cached(again) == (again["prompt_tokens"] - 1) // 16 * 16  # of a whole prompt all but the last token
    for change in ({"cache_salt": "another's"}, {"tools": []}, {"model": "tiny"}):
        other = ask(server, "/v1/chat/completions", **chat(messages=messages[:-2], max_tokens=5) | change)[1]["usage"]
        assert cached(other) == 0, change
    salted = ask(server, "/v1/chat/completions", **chat(messages=messages[:-2], max_tokens=5, cache_salt="another's"))
    assert cached(salted[1]["usage"]) == cached(again)
    for wrong in ("", 3, ["a"]):
        assert ask(server, "/v1/chat/completions", **chat(cache_salt=wrong))[0] == 400


def cache_counts(server: Server) -> tuple[float, float]:
    """Tokens of prompts that were looked for and found in the prefix cache."""

    async def get() -> str:
        async with aiohttp.ClientSession() as session, session.get(server.url + "/metrics") as answer:
            return await answer.text()

    page = asyncio.run(get())
    queries, hits = (
        float(re.search(rf"^vllm:prefix_cache_{name}_total{{.*}} (.*)$", page, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("queries", "hits")
    )
    return queries, hits


@pytest.mark.parametrize(
    ("arguments", "hit", "told"),
    [
        (("--no-prefix-caching",), 0, True), (("--no-prompt-tokens-details",), 496, False),
        (("--block-tokens", "128"), 384, True),
    ],
)  # fmt: skip
def test_what_is_cached_and_told_is_as_it_is_asked_for(arguments: tuple[str, ...], hit: int, told: bool) -> None:
    server = Server("--speed", str(SPEED), *arguments)
    try:
        body = {"model": server.models[0], "prompt": "x" * 2000, "max_tokens": 5}
        usages = [ask(server, "/v1/completions", **body)[1]["usage"] for _ in range(2)]
        assert [("prompt_tokens_details" in usage) for usage in usages] == [told, told]
        assert cache_counts(server) == ((1000.0, hit) if hit else (1000.0, 0.0))
        if told:
            assert [cached(usage) for usage in usages] == [0, hit]
    finally:
        server.stop()


def test_a_block_that_no_engine_has_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wwwserve.envs.emulator", "--block-tokens", "24"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "expected a multiple of 16" in done.stderr


def test_a_cached_prompt_is_answered_sooner() -> None:
    async def run() -> list[float]:
        emulator = VirtualEngine(profile("rtx-4090", "qwen3-8b", 8), ["m"])
        looks = asyncio.create_task(emulator.run())
        took_s = []
        for hashes in ([b"%d" % k for k in range(256)], [b"%d" % k for k in range(256)], [b"other"] * 0):
            job, began = emulator.put(4096, 2, True, hashes), emulator.now_s
            await job.changed.wait()
            took_s.append(emulator.now_s - began)
            await asyncio.sleep(5.0)
        looks.cancel()
        return took_s

    first, again, other = virtually(run())
    assert again < 0.2 * first and other == pytest.approx(first, abs=2 * LOOK_S)


def test_slots_are_used_again() -> None:
    async def run() -> Emulator:
        emulator = Emulator(profile("rtx-4090", "qwen3-8b", 64), ["m"], speed=1e4)
        looks = asyncio.create_task(emulator.run())
        for _ in range(6):
            jobs = [emulator.put(10, 20, False) for _ in range(200)]
            await asyncio.gather(*(job.changed.wait() for job in jobs))
        looks.cancel()
        return emulator

    emulator = asyncio.run(run())
    assert len(emulator.jobs) == 256 and sorted(emulator.free) == list(range(256))
    assert emulator.generation_tokens == 6 * 200 * 20


def test_more_than_the_room_at_once_finds_room() -> None:
    async def run() -> None:
        emulator = Emulator(profile("rtx-4090", "qwen3-8b", 64), ["m"], speed=1e-3)
        jobs = [emulator.put(10 + k, 20, False) for k in range(1000)]
        assert len({job.slot for job in jobs}) == 1000 <= len(emulator.jobs)
        assert all(int(emulator.jobs[job.slot]["prompt"]) == job.prompt for job in jobs)
        for job in jobs:
            emulator.withdraw(job)
        assert len(emulator.free) == len(emulator.jobs) and not emulator.running
        assert 'num_requests_waiting{engine="0",model_name="m"} 0.0' in emulator.metrics()

    asyncio.run(run())


def test_a_profile_comes_from_a_file(tmp_path: Any) -> None:
    card = profile("a100-80g", "qwen3-8b", 32)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(vars(card)))
    assert read_profile(path) == card
    path.write_text('{"weight_s": 1}')
    with pytest.raises(ValueError, match="expected an object with"):
        read_profile(path)


def test_words_of_parts_are_words_of_the_whole() -> None:
    reply = Completion(True, "m", 3)
    whole = reply.whole(20, "stop")["choices"][0]["message"]["content"]
    parts = [json.loads(reply.part(k, k + 4).removeprefix(b"data: ")) for k in range(0, 20, 4)]
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speed", "0"], "--speed is 0.0, expected more than 0"),
        (["--port", "70000"], "--port is 70000, expected 0 to 65535"),
        (["--gpu", "abacus"], "unknown gpu 'abacus'"),
        (["--max-num-seqs", "2000"], "--max-num-seqs is 2000, expected 1 to 1024"),
        (["--profile", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wwwserve.envs.emulator", "--port", "0", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.startswith("wwwserve emulator: ") and message in done.stderr
    assert done.stdout == ""


def test_it_stops_when_told(server: Server) -> None:
    other = Server("--speed", "1000")
    assert other.stop() in STOPPED


def test_a_judge_before_an_emulated_engine_tells_its_filler_from_other_text(server: Server) -> None:
    async def post_one(path: str, body: bytes) -> Any:
        return (await post(server.url, path, **json.loads(body)))[1]

    path, question = "/v1/chat/completions", chat("Which way to the sea?", max_tokens=9)
    good = ask(server, path, **question)[1]["choices"][0]["message"]["content"]
    better = ask(server, path, **(question | {"max_tokens": 40, "ignore_eos": True}))[1]["choices"][0]["message"]
    junk = good.translate(str.maketrans("aehorstuw", "1234567890"[:9]))
    a, b, c = asyncio.run(gain(post_one, path, question, (good, junk, better["content"])))
    assert vote_by(a, b) == VOTE_A and vote_by(b, a) == VOTE_B and vote_by(a, c) == VOTE_UNDECIDED
