"""What a node adds is measured on real processes, and what comes out is what was asked."""

import json
from pathlib import Path

import pytest

from wwwserve.eval.live import overhead


def test_a_node_and_what_stands_beside_it_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    assert overhead.main(["--calls", "20", "--seconds", "1", "--connections", "4", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found) - {"vllm_router"} == {"node", "node_traced_5_percent", "node_traced", "fastapi_httpx"}
    for each in found.values():
        assert each["added_p50_ms"] > 0 and each["direct_p50_ms"] > 0
        assert each["requests_per_s"] > 0 and each["cpu_us_per_request"] > 0 and each["cpu_us_per_chunk"] > 0


def test_a_node_is_measured_without_and_with_tls(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    assert overhead.main(["--tls", "--calls", "20", "--seconds", "1", "--connections", "4", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found) == {"node", "node_tls"}
    assert all(each["requests_per_s"] > 0 and each["cpu_us_per_chunk"] > 0 for each in found.values())


def test_a_bad_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--calls", "0"]) == 2
    assert "--calls is 0, expected at least 1" in capsys.readouterr().err
