"""Hostile input in process: what is reached is kept, and what goes wrong is seen."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from wwwserve.eval.live import hostile, hostile_guided
from wwwserve.eval.live.hostile_guided import Coverage
from wwwserve.serving import boundary
from wwwserve.serving.http import routes
from wwwserve.serving.http.sse import AnswerMeter


def test_a_node_stands_guided_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert hostile.main(["--guided", "--inputs", "1500", "--seed", "7", "--json", str(out)]) == 0, capsys.readouterr()
    seen = json.loads(out.read_text())
    assert seen["inputs"] == 1500 and seen["faults"] == []
    assert seen["lines"] > 1500 and seen["kept"] > 50 and 100 < seen["calls"] < 3000, seen["busiest"]
    statuses = seen["statuses"]
    assert statuses["peer /peer/ledger"]["200"] >= 1
    for who in ("user /v1", "peer /peer/v1"):
        assert sum(statuses[f"{who}/{kind}"].get("200", 0) for kind in ("chat/completions", "completions")) >= 1
    assert "1500 inputs" in capsys.readouterr().out


def test_what_a_node_or_a_reader_does_not_stand_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(routes.boundary, "tariff_of", fail)
    monkeypatch.setattr(AnswerMeter, "whole", fail)
    faults = hostile_guided.run(300, 1).faults
    assert any("it answers 500" in each for each in faults)
    assert any(each.startswith("reader answer: RuntimeError('a mistake')") for each in faults)


def test_coverage_tells_of_lines_that_were_not_reached_before() -> None:
    coverage, news = Coverage(), []
    for content in (b'{"status": 200, "type": "text/plain"}', b'{"status": 404, "type": "text/plain"}', b"[]"):
        coverage.news = False
        with coverage, suppress(boundary.BoundaryError):
            boundary.head_line(content)
        news.append(coverage.news)
    assert news == [True, False, True]


def test_a_turn_of_the_event_loop_in_which_too_much_is_done_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    head_line = hostile_guided.head_line

    def much(content: bytes) -> object:
        for _ in range(hostile_guided.MOST_CALLS):
            bool_of(content)
        return head_line(content)

    def bool_of(content: bytes) -> bool:
        return bool(content)

    head = hostile_guided.Input(hostile_guided.READER, "head", b"1.5 0.02")
    monkeypatch.setattr(hostile_guided, "head_line", much)
    monkeypatch.setattr(hostile_guided.Boundary, "fresh", lambda boundary: head)
    seen = hostile_guided.run(20, 1)
    assert seen.calls > hostile_guided.MOST_CALLS and seen.busiest.startswith("reader head")
    assert seen.faults and all("calls in a turn" in each for each in seen.faults)
