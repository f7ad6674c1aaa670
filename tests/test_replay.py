"""The replay of a trace on one engine: against an independent engine, against its own rate, and its command line."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from reference_engine import Job, ReferenceEngine

from wwwserve.agents.hardware import Profile, profile
from wwwserve.envs import trace
from wwwserve.eval.replay import PERCENTILES, TRACE, main, replay, summary

SMALL = Profile(0.0103, 4.4e-05, 8.6e-08, 0.0034, 7.8e-05, 300, 6, 512, 4096, "test")


def part(first: int, count: int) -> trace.Trace:
    """Some requests of the packaged trace, as a trace of their own."""
    path = trace.find(TRACE, None)
    assert path is not None
    whole = trace.read(path)
    rows = slice(first, first + count)
    time_s = whole.time_s[rows] - whole.time_s[first]
    return trace.Trace(time_s, whole.prompt[rows], whole.output[rows], float(time_s[-1]) * count / (count - 1))


@pytest.mark.parametrize("rate_per_s", [0.7, 4.0])
def test_numbers_are_those_of_an_independent_engine(rate_per_s: float) -> None:
    requests = part(1000, 60)
    result = replay(requests, SMALL, rate_per_s)
    mean_gap_s = requests.time_s[-1] / 59
    reference = ReferenceEngine(SMALL)
    jobs = []
    for r in range(60):
        prompt, output = int(requests.prompt[r]), int(requests.output[r])
        if prompt + output > 4096:
            prompt = min(prompt, 4095)
            output = 4096 - prompt
        jobs.append(Job(r, prompt, output, float(requests.time_s[r]) / mean_gap_s / rate_per_s))
        reference.submit(jobs[-1])
    reference.advance(1e5)
    arrival_s = np.array([job.submit_s for job in jobs])
    latency_s = np.array([job.finish_s for job in jobs]) - arrival_s
    ttft_s = np.array([job.first_token_s for job in jobs]) - arrival_s
    np.testing.assert_allclose(result.arrival_s, arrival_s, rtol=1e-12)
    np.testing.assert_allclose(result.latency_s, latency_s, rtol=1e-7)
    np.testing.assert_allclose(result.ttft_s, ttft_s, rtol=1e-7)
    assert result.preemptions == reference.preemptions
    assert result.clipped == (requests.prompt + requests.output > 4096).sum()
    numbers = summary(result)
    assert numbers["requests"] == 60
    for q in PERCENTILES:
        assert numbers["latency_s"][f"p{q}"] == pytest.approx(np.percentile(latency_s, q))
        assert numbers["ttft_s"][f"p{q}"] == pytest.approx(np.percentile(ttft_s, q))


def test_a_request_too_long_is_cut_and_counted() -> None:
    tokens = np.array([[5000, 100, 4000, 100], [10, 10, 200, 3996]], np.int32)
    requests = trace.Trace(np.array([0.0, 100.0, 200.0, 300.0]), *tokens, 400.0)
    result = replay(requests, SMALL, 0.01)
    assert result.clipped == 2  # 5000 + 10 becomes 4095 + 1, 4000 + 200 becomes 4000 + 96
    assert result.latency_s[0] == result.ttft_s[0]
    decode_s = SMALL.weight_s + SMALL.per_seq_s + SMALL.per_kv_token_s * (4000 + 47)  # mean context of 95 decodes
    assert result.latency_s[2] - result.ttft_s[2] == pytest.approx(95 * decode_s)


def test_more_load_takes_longer() -> None:
    requests, engine = part(0, 2000), profile("a100-80g", "llama-3-8b")
    by_rate = [summary(replay(requests, engine, rate)) for rate in (0.5, 2.0, 8.0, 32.0)]
    for slower, faster in pairwise(by_rate):
        for measure in ("latency_s", "ttft_s"):
            for q in PERCENTILES:
                assert slower[measure][f"p{q}"] < faster[measure][f"p{q}"]


@pytest.mark.parametrize("rate_per_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_must_be_positive_and_finite(rate_per_s: float) -> None:
    with pytest.raises(ValueError, match="the rate must be positive and finite, got"):
        replay(part(0, 2), SMALL, rate_per_s)


def test_the_command_prints_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "replay.json"
    main(["--rates", "2", "0.5", "--gpu", "h100", "--model", "qwen3-4b", "--max-num-seqs", "40", "--json", str(file)])
    written = json.loads(file.read_text())
    assert (written["gpu"], written["model"], written["max_num_seqs"]) == ("h100", "qwen3-4b", 40)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{TRACE}: 19366 requests")
    for line, rate in zip(lines[3:], ("0.5", "2"), strict=True):
        cells = line.replace(" s", "").split()
        numbers = written["rates"][rate]
        expected = [numbers[measure][f"p{q}"] for measure in ("latency_s", "ttft_s") for q in PERCENTILES]
        assert cells[0] == rate
        assert [float(cell) for cell in cells[1:7]] == pytest.approx(expected, abs=6e-4)
        assert int(cells[7]) == numbers["preemptions"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "0"], "--rates is 0.0, expected more than 0"),
        (["--rates", "1", "fast"], "--rates: Could not find valid parse for arguments: ['1', 'fast']"),
        (["--rates", "inf"], "--rates is inf, expected more than 0"),
        (["--gpu", "tpu"], "unknown gpu 'tpu'"),
        (["--model", "gpt"], "unknown model 'gpt'"),
        (["--gpu", "rtx-4090", "--model", "qwen3-14b"], "qwen3-14b does not fit on rtx-4090"),
        (["--max-num-seqs", "0"], "--max-num-seqs is 0, expected 1 to 1024"),
        (["--max-num-seqs", "1025"], "--max-num-seqs is 1025, expected 1 to 1024"),
        (["--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json: /nowhere/at is not a folder"),
    ],
)
def test_a_bad_argument_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
