"""Real nodes that keep ledgers earn what the simulated market says; see `eval.live.profits`."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from wwwserve.eval.live import profits

RATES_PER_S = (7.0, 5.0, 3.0, 1.0, 1.0, 0.5, 0.5, 0.2)


def scenario(duration_s: float) -> dict[str, Any]:
    """Eight providers, of which some have more users than they can serve and others hardly any."""
    return {
        "name": "eight", "duration_s": duration_s, "drain_s": 2000, "rtt_ms": 50,
        "slo": {
            "classes": {
                "chat": {"share": 0.6, "deadline_s": 8, "value": 3}, "batch": {"share": 0.4, "deadline_s": 45}
            }
        },
        "economy": {"payment": "lateness", "initial_credit": 1000},
        "defaults": {
            "model": "llama-2-7b", "gpu": "rtx-4090", "max_num_seqs": 32,
            "lengths": {
                "prompt": {"median": 450, "sigma": 0.5, "max": 1500},
                "output": {"median": 150, "sigma": 0.6, "max": 600},
            },
        },
        "providers": [
            {"name": f"p{k}", "traffic": {"kind": "poisson", "phases": [{"until_s": duration_s, "rate_per_s": per_s}]}}
            for k, per_s in enumerate(RATES_PER_S)
        ],
    }  # fmt: skip


def test_eight_nodes_with_ledgers_earn_what_the_market_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "eight.yaml", tmp_path / "out.json"
    file.write_text(yaml.safe_dump(scenario(60.0)))
    # The mean of four: one request decided otherwise soon moves a tenth of the smallest provider's profit.
    arguments = ["--policy", "best_value", "--runs", "4"]
    assert profits.main([str(file), *arguments, "--json", str(out)]) == 0, capsys.readouterr()
    found = json.loads(out.read_text())
    providers = found["providers"].values()
    assert len(providers) == 8 and found["problems"] == [] and all(each["gap"] <= 0.1 for each in providers)
    assert sum(each["payments"] for each in providers) == pytest.approx(0.0, abs=1e-9)
    assert min(each["payments"] for each in providers) < -0.1 and max(each["payments"] for each in providers) > 0.1
    assert found["receipts"] >= found["handed_over"]["live"] > 100


def test_nodes_that_are_processes_pay_each_other_and_agree_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = scenario(40.0)
    few["providers"] = [few["providers"][0], few["providers"][1], few["providers"][7]]
    file, out = tmp_path / "few.yaml", tmp_path / "out.json"
    file.write_text(yaml.safe_dump(few))
    # How near to the market they come takes a calm machine; what they pay adds up on any.
    arguments = ["--policy", "best_value", "--speed", "4", "--most-gap", "1000"]
    assert profits.main([str(file), *arguments, "--json", str(out)]) == 0, capsys.readouterr()
    found = json.loads(out.read_text())
    payments = [each["payments"] for each in found["providers"].values()]
    assert found["problems"] == [] and sum(payments) == pytest.approx(0.0, abs=1e-9) and max(payments) > 0.0
    assert found["receipts"] >= found["handed_over"]["live"] > 0
    assert all(each["live"] > 0.0 for each in found["providers"].values())


def test_a_gap_that_is_too_wide_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "eight.yaml"
    file.write_text(yaml.safe_dump(scenario(5.0)))
    assert profits.main([str(file), "--policy", "www_serve", "--runs", "2", "--most-gap", "1e-12"]) == 1
    assert "off" in capsys.readouterr().err
    assert profits.main([str(file), "--policy", "omniscient"]) == 2
