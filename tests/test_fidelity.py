"""The simulated engine against an engine of known profile, through the command; and how errors are counted."""

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from virtual import OVERHEAD_S, VirtualEngine, VirtualProber, virtually

from wwwserve.agents.hardware import Profile
from wwwserve.agents.lengths import Lognormal
from wwwserve.envs.emulator import LOOK_S
from wwwserve.envs.trace import Trace
from wwwserve.eval.fidelity import Played, Study, capacity_per_s, compared, main, play, simulated, table
from wwwserve.serving.engine.probe import Settings
from wwwserve.serving.local_nodes import emulator, free_ports, served

TRUTH = Profile(
    0.03, 2e-3, 4e-6, 0.02, 4e-4, 512, 4, 512, 512, "made up", seq_tokens=0.5, per_pair_s=2e-7,
    batch_s=(0.0, 4e-3, -2e-3),
)  # fmt: skip
STUDY = Study((0.5,), 20.0, 1, 7, Lognormal(60, 0.6, 200), Lognormal(20, 0.5, 60))


@pytest.fixture
def emulated(tmp_path: Path) -> Iterator[str]:
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(vars(TRUTH)))
    [port] = free_ports(1)
    with served([emulator(port, profile=file, serves=["m"])], [port]) as engines:
        yield engines.urls[0]


def test_an_emulated_engine_is_as_it_is_simulated() -> None:
    """On a virtual clock, so that nothing that runs beside is measured."""
    slower = replace(TRUTH, **{
        name: 2 * getattr(TRUTH, name) for name in ("weight_s", "per_seq_s", "prefill_base_s", "per_token_s")
    })  # fmt: skip

    async def plays(requests: list[Trace]) -> list[Played]:
        engine = VirtualEngine(TRUTH, ["m"])
        running = asyncio.create_task(engine.run())
        prober = VirtualProber(engine, Settings())
        found = [await play(prober, each, np.random.default_rng(k)) for k, each in enumerate(requests)]
        running.cancel()
        return found

    loads = [STUDY.requests(0, np.arange(16) * 1e-3), STUDY.requests(1, STUDY.poisson(1, 2.0))]
    for requests, played in zip(loads, virtually(plays(loads)), strict=True):
        error = compared(requests, simulated(requests, TRUTH, OVERHEAD_S + LOOK_S / 2), [played])["error"]
        for statistic in ("mean", "p50", "p90"):
            assert abs(error["latency_s"][statistic][0]) < 0.01 and abs(error["ttft_s"][statistic][0]) < 0.02
        # Another engine than the one that was calibrated is seen to be another.
        other = compared(requests, simulated(requests, slower, OVERHEAD_S), [played])["error"]
        assert other["latency_s"]["mean"][0] > 0.5


def test_arrivals_are_played_on_a_running_engine(
    emulated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, on a known profile; how far off it is depends on what runs beside."""
    out, calibration = tmp_path / "out.json", tmp_path / "calibration.json"
    calibration.write_text(json.dumps({"profile": vars(TRUTH), "overhead_s": 0.003}))
    arguments = ["--url", emulated, "--loads", "0.6", "--seconds", "6", "--max-num-seqs", "4", "--prompt", "60", "0.6",
                 "200", "--output", "20", "0.5", "60", "--calibration", str(calibration)]  # fmt: skip
    assert main([*arguments, "--repeats", "2", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert json.loads(calibration.read_text()) == result["calibration"]
    load, burst = result["loads"]["0.6"], result["loads"]["burst"]
    assert load["requests"] >= 2 and load["rate_per_s"] == pytest.approx(0.6 * result["capacity_per_s"])
    assert burst["requests"] == 16
    for each in (load, burst):
        assert len(each["measured"]) == len(each["error"]["latency_s"]["mean"]) == 2
        for ttft_s, latency_s in zip(each["by_request"]["ttft_s"], each["by_request"]["latency_s"], strict=True):
            assert all(0 < first <= last for first, last in zip(ttft_s, latency_s, strict=True))
    shown = capsys.readouterr().out
    assert "| 60%, " in shown and "| TTFT | " in shown


def test_arrivals_are_those_of_the_load_and_its_seed() -> None:
    time_s = STUDY.poisson(1, 40.0)
    assert time_s.size == pytest.approx(800, abs=90) and (np.diff(time_s) >= 0).all() and time_s[-1] < 20.0
    np.testing.assert_array_equal(time_s, STUDY.poisson(1, 40.0))
    assert not np.array_equal(time_s[:50], STUDY.poisson(2, 40.0)[:50])
    requests = STUDY.requests(1, time_s)
    assert np.median(requests.prompt) == pytest.approx(60, rel=0.15) and requests.prompt.max() <= 200
    assert np.median(requests.output) == pytest.approx(20, rel=0.15) and requests.output.min() >= 1
    played = simulated(requests, TRUTH, 0.25)
    at_once = simulated(requests, TRUTH, 0.0)
    np.testing.assert_allclose(played.latency_s - at_once.latency_s, 0.25)
    np.testing.assert_allclose(played.ttft_s - at_once.ttft_s, 0.25)


def test_capacity_is_that_of_a_burst() -> None:
    count = 400
    burst = simulated(STUDY.requests(0, np.zeros(count)), TRUTH, 0.0)
    assert capacity_per_s(burst) == pytest.approx(count / burst.latency_s.max(), rel=0.03)


def test_errors_are_against_each_play() -> None:
    requests = STUDY.requests(0, np.arange(4.0))
    expected = Played(np.full(4, 1.0), np.full(4, 3.0), 0.0)
    plays = [Played(np.full(4, 0.8), np.full(4, 3.0), 0.01), Played(np.full(4, 1.0), np.full(4, 2.4), 0.02)]
    found = compared(requests, expected, plays)
    assert found["error"]["ttft_s"]["p90"] == pytest.approx([0.25, 0.0])
    assert found["error"]["latency_s"]["mean"] == pytest.approx([0.0, 0.25])
    assert found["noise"]["latency_s"]["mean"] == pytest.approx(0.25) and found["lag_s"] == 0.02
    lines = table({"loads": {"0.85": found | {"rate_per_s": 1.5}}}).splitlines()
    assert lines[2].startswith("| 85%, 1.5/s | 4 | latency | 2.7 s +12.5% | ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loads", "0"], "expected more than 0"),
        (["--loads", "many"], "--loads: .*many"),
        (["--output", "10", "0.5", "4"], "--output: expected a median"),
        (["--model", "qwen3-8b"], "expected one of .* without --url"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("wwwserve fidelity: ")
    assert re.search(message, err)


def test_a_calibration_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "calibration.json"
    file.write_text('{"profile": {}}')
    assert main(["--calibration", str(file)]) == 2
    assert "not what this command writes" in capsys.readouterr().err
    assert main(["--url", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9/v1/models" in capsys.readouterr().err
