"""Calibration: the fit on known times, an emulated engine of known profile, and engines that cannot be measured."""

import asyncio
import itertools
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import virtual
import yaml
from scipy.optimize import nnls
from virtual import NO_STALLS, OVERHEAD_S, VirtualEngine, VirtualProber, virtually

from wwwserve.agents.hardware import Profile
from wwwserve.agents.hardware import profile as catalogued
from wwwserve.envs.emulator import LOOK_S
from wwwserve.serving import cli
from wwwserve.serving.config import parse
from wwwserve.serving.engine import calibrate as calibration
from wwwserve.serving.engine import probe
from wwwserve.serving.engine.adapter import NAMES
from wwwserve.serving.engine.calibrate import Calibration, Measurement, calibrate
from wwwserve.serving.engine.fit import CalibrationError, Fit, Sample, errors, fit, nonnegative
from wwwserve.serving.engine.probe import Limits, Prober, Settings, Stream, find_max_num_seqs, kv_tokens_of
from wwwserve.serving.local_nodes import emulator, free_ports, served

TRUTH = Profile(0.04, 1.5e-3, 2e-6, 0.02, 4e-4, 512, 4, 1024, 1024, "made up", seq_tokens=0.4, per_pair_s=3e-7)
KNOWN = Fit((0.04, 1.5e-3, 2e-6, 0.02, 4e-4), 0.4, 3e-7, OVERHEAD_S)
LOADS = np.array(
    [(n, n * c, 0, 0) for n in (1, 2, 4, 8, 16) for c in (40, 400, 900)]
    + [(0, 0, p, 0) for p in (8, 16, 32, 64, 128, 256, 512, 900)]
    + [(n, n * p, p, 0) for n in (1, 3, 7, 15) for p in (16, 100, 700)]
    + [(0, 0, p, c) for p in (60, 200) for c in (400, 800)],
    dtype=np.float64,
)  # fmt: skip


def fitted(profile: Profile) -> Fit:
    """A profile as a fit."""
    five = profile.weight_s, profile.per_seq_s, profile.per_kv_token_s, profile.prefill_base_s, profile.per_token_s
    return Fit(five, profile.seq_tokens, profile.per_pair_s, 0.0, profile.batch_s)


def measured(noise: np.ndarray) -> list[Sample]:
    """The loads with times of the truth, each multiplied by its noise."""
    times_s = KNOWN.times_s(LOADS) * noise
    return [
        Sample(*map(float, row[:3]), float(time_s), cached=float(row[3]))
        for row, time_s in zip(LOADS, times_s, strict=True)
    ]


def test_times_are_those_of_the_formula() -> None:
    rows = np.array([(8, 3000, 0, 0), (0, 0, 20, 0), (0, 0, 200, 0), (8, 3000, 200, 0), (0, 0, 200, 500)])
    computed_s = 0.02 + 4e-4 * 200 + 3e-7 * 200 * 200 / 2
    decode_s = 8 * 1.5e-3 + 3000 * 2e-6
    expected = [0.04 + decode_s, 0.04 + 5e-3, computed_s + 5e-3, computed_s + 4e-4 * 0.4 * 8 + decode_s]
    expected.append(computed_s + 3e-7 * 200 * 500 + 5e-3)
    np.testing.assert_allclose(KNOWN.times_s(rows), expected)


def test_the_fit_finds_the_coefficients_of_exact_times() -> None:
    found = fit(measured(np.ones(len(LOADS))))
    np.testing.assert_allclose(found.coefficients, KNOWN.coefficients, rtol=1e-6)
    np.testing.assert_allclose(found[1:4], KNOWN[1:4], rtol=1e-5)
    np.testing.assert_allclose(found.batch_s, np.zeros(5), atol=1e-9)
    assert max(each.p90 for each in errors(found, measured(np.ones(len(LOADS)))).values()) < 1e-6


def test_the_fit_bears_noise_and_loads_that_were_disturbed() -> None:
    rng = np.random.default_rng(3)
    noise = 1 + 0.01 * rng.standard_normal(len(LOADS))
    noise[[4, 11, 19, 30]] = 3.0
    found = fit(measured(noise))
    assert np.abs(found.times_s(LOADS) / KNOWN.times_s(LOADS) - 1).max() < 0.06
    assert found.overhead_s < 2 * OVERHEAD_S


def test_batches_off_the_line_are_found_as_they_are() -> None:
    uneven = KNOWN._replace(batch_s=(-2e-3, 4e-3, -3e-3, 2e-3, 0.0))
    samples = [
        sample._replace(time_s=float(time_s))
        for sample, time_s in zip(measured(np.ones(len(LOADS))), uneven.times_s(LOADS), strict=True)
    ]
    assert uneven.times_s(np.array([(6, 100, 0, 0)])) == pytest.approx(0.04 + 9e-3 + 2e-4 - 0.5e-3)
    found = fit(samples)
    assert np.abs(found.times_s(LOADS) / uneven.times_s(LOADS) - 1).max() < 0.02
    assert np.ptp(found.batch_s) > 5e-3


def test_without_prompts_that_join_others_a_sequence_computes_as_a_token() -> None:
    samples = [sample for sample in measured(np.ones(len(LOADS))) if not (sample.decoding and sample.prefill_tokens)]
    found = fit(samples)
    assert found.seq_tokens == 1.0
    np.testing.assert_allclose(found.coefficients, KNOWN.coefficients, rtol=1e-6)


def test_a_coefficient_that_the_times_deny_is_none() -> None:
    falling = [Sample(n, 100.0 * n, 0.0, 0.05 - 0.001 * n) for n in (1, 2, 4, 8)]
    prompts = [Sample(0.0, 0.0, p, 0.06 + 1e-3 * p) for p in (8, 64, 512)]
    coefficients = fit(falling + prompts).coefficients
    assert min(coefficients) > 0 and coefficients[1] < 1e-9
    with pytest.raises(CalibrationError, match="two different numbers of requests"):
        fit(falling[:1] + prompts)
    with pytest.raises(CalibrationError, match="two lengths of prompt"):
        fit(falling + prompts[:1])


@pytest.mark.parametrize("seed", range(8))
def test_nonnegative_least_squares_are_those_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns, target = rng.standard_normal((20, 8)) * 10.0 ** rng.integers(-6, 3, 8), rng.standard_normal(20)
    np.testing.assert_allclose(columns @ nonnegative(columns, target), columns @ nnls(columns, target)[0], atol=1e-8)


# An engine on a clock that jumps to whatever is waited for next: what is measured depends on nothing that runs beside.


async def measure(
    profile: Profile, settings: Settings, stalls: Iterator[float] = NO_STALLS,
    then: Callable[[Measurement], None] = lambda measurement: None, caches: bool = True,
) -> Calibration:  # fmt: skip
    """What calibration finds of an engine that has nothing else to do."""
    engine = VirtualEngine(profile, ["m"], caches=caches)
    running = asyncio.create_task(engine.run())
    prober = VirtualProber(engine, settings)
    prober.stalls = stalls
    await prober.learn_words()
    measurement = Measurement(prober, Limits(profile.kv_tokens, profile.max_num_seqs, 4096), profile.max_model_len)
    measurement.settle = settled  # type: ignore[method-assign]
    try:
        for _ in range(settings.repeats):
            await measurement.turn()
    finally:
        running.cancel()
    then(measurement)
    return measurement.found()


async def settled() -> None:
    """Nobody else asks."""


@pytest.mark.parametrize("truth", [TRUTH, catalogued("rtx-4090", "qwen3-8b", 64)], ids=["cpu", "gpu"])
def test_the_profile_of_an_engine_is_found(truth: Profile) -> None:
    found = virtually(measure(truth, Settings(repeats=1)))
    profile = found.profile
    limits = ("kv_blocks", "max_num_seqs", "max_model_len")
    assert [getattr(profile, name) for name in limits] == [getattr(truth, name) for name in limits]
    for name in ("weight_s", "per_seq_s", "per_kv_token_s", "prefill_base_s", "per_token_s"):
        assert getattr(profile, name) == pytest.approx(getattr(truth, name), rel=0.1), name
    counts = (1, 2, 4) if truth is TRUTH else (1, 8, 40)
    rows = np.array(
        [(n, n * c, p, before) for n in counts for c in (50, 400, 700) for p in (0, 200, 900) for before in (0, 600)],
        dtype=float,
    )
    assert np.abs(fitted(profile).times_s(rows) / fitted(truth).times_s(rows) - 1).max() < 0.05
    assert all(sample.time_s > 0 for sample in found.samples)
    kinds = [f"{kind}, {which}" for kind in ("decode", "prefill alone", "prefill after cached", "prefill among others")
             for which in ("fitted", "held out")]  # fmt: skip
    assert list(found.errors) == kinds
    assert all(error.loads >= 2 and error.mean < 0.05 for error in found.errors.values())
    assert found.overhead_s == pytest.approx(OVERHEAD_S + LOOK_S / 2, abs=1e-3)


@pytest.mark.parametrize("caches", [True, False])
def test_where_nothing_is_cached_or_told_the_profile_is_found_without(
    caches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtual, "TELLS_CACHED", False)
    found = virtually(measure(TRUTH, Settings(repeats=1), caches=caches))
    assert "prefill after cached, held out" not in found.errors and not any(each.cached for each in found.samples)
    assert found.profile.per_token_s == pytest.approx(TRUTH.per_token_s, rel=0.1)


def test_times_that_are_none_are_refused() -> None:
    """Tokens that are seen in bursts, long after they came."""
    bursts = itertools.cycle([0.0] * 40 + [2.0])
    with pytest.raises(CalibrationError, match=r"(an iteration, 3 times: .*larger --tokens|cannot be relied on)"):
        virtually(measure(TRUTH, Settings(repeats=1), bursts))


def test_a_fit_that_is_far_off_what_was_held_out_is_refused() -> None:
    """An engine that takes twice as long for the loads that the fit does not see."""

    def slower(measurement: Measurement) -> None:
        for taken, (_, held_out) in zip(measurement.prefills, measurement.alone, strict=True):
            taken[:] = [each._replace(time_s=each.time_s * (2 if held_out else 1)) for each in taken]

    message = r"prefill alone, held out: mean \d+%, p90 \d+% of 4 loads\)\. Let nothing else use .* more --repeats"
    with pytest.raises(CalibrationError, match=message):
        virtually(measure(TRUTH, Settings(repeats=1), then=slower))


def test_a_running_engine_is_measured_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How well, depends on what runs beside, so that it may be off as far as it likes."""
    monkeypatch.setattr(calibration, "MOST_ERROR", math.inf)
    profile, ports = tmp_path / "profile.json", free_ports(2)
    profile.write_text(json.dumps(vars(TRUTH)))
    engines = [emulator(port, profile=profile, serves=["m"]) for port in ports]
    with served(engines, ports) as ((url, neighbour), _):
        file = tmp_path / "found.json"
        arguments = ["--json", str(file), "--tokens", "16", "--repeats", "1", "--beside", neighbour,
                     "--beside-requests", "2"]  # fmt: skip
        assert cli.main(["calibrate", url, *arguments]) == 0
    out = capsys.readouterr().out
    node = {"name": "n", "key": "n.pem", **yaml.safe_load(out)}  # as it is pasted
    found = parse(node, "what was printed").engine_profile()
    assert (found.kv_blocks, found.max_num_seqs, found.max_model_len) == (512, 4, 1024)
    written = json.loads(file.read_text())
    for kind in ("decode", "prefill alone", "prefill among others"):
        for which in ("fitted", "held out"):
            assert written["errors"][f"{kind}, {which}"]["loads"] >= 2
            assert f"# {kind}, {which}" in out
    assert len(written["samples"]) > 20 and written["model"] == "m"
    assert all(sample["time_s"] > 0 for sample in written["samples"])
    alone = [s["prefill_tokens"] for s in written["samples"] if not s["decoding"] and not s["cached"]]
    assert alone[0] < 20 and alone[-1] > 800 and alone == sorted(set(alone))


class Counted(Prober):
    """Of an engine that runs six requests, each for so long; the share of its KV cache is never twice the same."""

    def __init__(self, answer_s: float) -> None:
        super().__init__("http://engine", "m", Settings(), None)  # type: ignore[arg-type]
        self.answer_s, self.asked, self.share = answer_s, 0, 0.0

    async def complete(self, prompt: str | list[int], tokens: int, stream: Stream | None = None) -> Stream:
        self.asked += 1
        await asyncio.sleep(self.answer_s)
        self.asked -= 1
        return Stream()

    async def page(self, session: object, url: str) -> str:
        self.share += 1e-3
        values = min(6, self.asked), max(0, self.asked - 6), self.share
        return "\n".join(f"{name} {value}" for name, value in zip(NAMES["vllm"], values, strict=True))


@pytest.mark.parametrize("answer_s", [10.0, 0.1])
def test_how_many_run_at_once_is_found_by_those_that_run_and_wait(
    answer_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    prober = Counted(answer_s)
    monkeypatch.setattr(probe, "get", prober.page)
    found = asyncio.wait_for(find_max_num_seqs(prober, 1024), 60.0)
    if answer_s > 1:
        assert virtually(found) == 6
    else:
        with pytest.raises(CalibrationError, match=r"has answered 8 requests before .* say --max-num-seqs"):
            virtually(found)


def complete(n: int) -> bytes:
    events: list[dict[str, Any]] = [{"choices": [{"text": " a", "finish_reason": None}]} for _ in range(n)]
    events.append({"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": n}})
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def test_what_is_no_url_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "127.0.0.1:8000"]) == 1
    assert "127.0.0.1:8000/v1/models is no URL, expected http://HOST:PORT of an engine" in capsys.readouterr().err


MODELS = json.dumps({"data": [{"id": "m", "max_model_len": 512}]}).encode()
METRICS = b'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n'
REFUSED = b'{"error": {"message": "unknown field ignore_eos"}}'


@pytest.mark.parametrize(
    ("models", "metrics", "status", "answer", "message"),
    [
        (b"<html>", METRICS, 200, complete(1), "does not list models"),
        (b'{"data": []}', METRICS, 200, complete(1), "does not list models"),
        (b'{"data": [{"id": "m"}]}', METRICS, 200, complete(1), "says of 'm' no max_model_len.*not that of a node"),
        (MODELS, b"", 200, complete(1), "say --kv-tokens"),
        (MODELS, b'vllm:cache_config_info{num_gpu_blocks="None"} 1.0', 200, complete(1), "without num_gpu_blocks"),
        (MODELS, METRICS, 400, REFUSED, "answers 400 to a probe with ignore_eos.*unknown field ignore_eos"),
        (MODELS, METRICS, 200, complete(3), "gives 3 tokens for 8: it ignores ignore_eos or min_tokens"),
        (MODELS, METRICS, 200, b"<html>", "without tokens"),
        (MODELS, METRICS, 200, b"data: nothing\n\n", "does not stream as the OpenAI API does"),
        (MODELS, METRICS, 200, b'data: {"error": {"message": "broken"}}\n\n', "ends a stream with an error: .*broken"),
    ],
)
def test_an_engine_that_cannot_be_measured_says_why(
    models: bytes, metrics: bytes, status: int, answer: bytes, message: str
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, models if self.path == "/v1/models" else metrics)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.reply(status, answer)

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with pytest.raises(CalibrationError, match=message):
            asyncio.run(calibrate(f"http://127.0.0.1:{server.server_port}", Settings()))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:9"], r"http://127.0.0.1:9/v1/models: nothing listens there"),
        (["nowhere"], "nowhere/v1/models"),
    ],
)
def test_wrong_use_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", *arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("wwwserve: ")
    assert re.search(message, err)


def test_kv_caches_of_several_engines_are_added() -> None:
    page = "".join(f'vllm:cache_config_info{{block_size="128",engine="{k}",num_gpu_blocks="10"}} 1.0\n' for k in (0, 1))
    assert kv_tokens_of(page, "u") == 2560
