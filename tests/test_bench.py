"""The benchmark of the market: what it reports, and that its load is what it says."""

import json
from pathlib import Path

import numpy as np
import pytest

from wwwserve.agents.tariff import MARKUPS
from wwwserve.envs import bench
from wwwserve.envs.state import plan


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "AGENTS", 16)
    monkeypatch.setattr(bench, "WARM_UP_S", 30.0)
    monkeypatch.setattr(bench, "WINDOW_S", 200.0)
    monkeypatch.setattr(bench, "PROVIDERS", (4, 8))
    bench.main(["--json", str(tmp_path / "bench.json"), "--seconds", "0.01"])
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report.keys() == {"load", "runs", "large_cards", "pettingzoo"} and report["load"] == 0.85
    assert {run["providers"] for run in report["runs"]} == {4, 8}
    for run in report["runs"]:
        assert run.keys() == {
            "providers", "threads", "markets", "agent_steps_per_s", "best", "requests_per_s", "mean_running"
        }  # fmt: skip
        assert run["markets"] * run["providers"] == 16
        assert 0 < run["agent_steps_per_s"] <= run["best"]
        assert run["mean_running"] > 0 and run["requests_per_s"] >= 0
    zoo = report["pettingzoo"]
    assert zoo.keys() == {"providers", "agent_steps_per_s", "best", "ratio"} and zoo["providers"] == 8
    alone = next(run for run in report["runs"] if run["providers"] == 8 and run["threads"] == 1)
    assert zoo["ratio"] == pytest.approx(alone["agent_steps_per_s"] / zoo["agent_steps_per_s"], abs=0.06)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(report["runs"]) + 2 and "PettingZoo" in printed[-1]


def test_steps_that_take_no_time_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "AGENTS", 32)
    monkeypatch.setattr(bench, "WARM_UP_S", 20.0)
    loop = bench.Loop(8, 1)
    twin = bench.Loop(8, 1)
    moved = 0
    for _ in range(bench.CHUNK):
        before_s = twin.batch.now_s.copy()
        twin.step()
        moved += int((twin.batch.now_s > before_s).sum())
    chunk = loop.measure()
    assert chunk.agent_steps == moved * 8
    assert 0 < chunk.agent_steps <= bench.CHUNK * 32


def test_the_load_is_85_percent_and_engines_are_full() -> None:
    traffic = plan(bench.scenario(8, bench.LARGE_CARDS), 0).traffic
    rates = np.bincount(traffic.provider, minlength=8) / (bench.WARM_UP_S + bench.WINDOW_S)
    assert rates == pytest.approx(0.85 * np.array([0.2159, 0.1557] * 4), rel=0.25)
    for cards, low, high in ((bench.SMALL_CARDS, 6, 12), (bench.LARGE_CARDS, 30, 60)):
        loop = bench.Loop(8, 1, cards)
        assert low < loop.measure().running < high
        assert loop.batch.markets.engines["waiting"].mean() < 10


def test_actions_are_uniform_over_what_is_legal() -> None:
    routes = np.zeros((30_000, 10), np.int8)
    routes[:, [0, 3, 9]] = 1
    route, markup = np.zeros(30_000, np.int32), np.zeros(30_000, np.int32)
    bench.draw(routes, bench.make_generators(1)[0], route, markup)
    assert np.bincount(route, minlength=10)[[0, 3, 9]] == pytest.approx([10_000] * 3, rel=0.05)
    each = 30_000 / MARKUPS.size
    assert np.bincount(markup, minlength=MARKUPS.size) == pytest.approx([each] * MARKUPS.size, rel=0.07)


def test_no_time_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--json", str(tmp_path / "bench.json"), "--seconds", "0"]) == 2
    assert "--seconds is 0.0, expected more than 0" in capsys.readouterr().err
