"""Real nodes under faults: whatever is lost and whoever dies, each request ends once and no credit is made or kept."""

from typing import Any

import numpy as np
import pytest

from wwwserve.agents.rules import Rule
from wwwserve.envs.scenario import parse
from wwwserve.envs.state import MarketPlan, plan
from wwwserve.envs.traffic import Arrivals
from wwwserve.eval.live.simulation.runner import Crash, Faults, Report, play

REQUESTS = 200
FAULTS = Faults(jitter_s=0.02, loss=0.02, crashes=(Crash(row=1, at_s=12.0, down_s=9.0),))
MINTED = 4 * (50 + 2) * 1_000_000


def planned() -> MarketPlan:
    def provider(name: str, rate_per_s: float) -> dict[str, Any]:
        return {
            "name": name, "model": "llama-2-7b", "max_num_seqs": 32,
            "lengths": {
                "prompt": {"median": 450, "sigma": 0.5, "max": 1500},
                "output": {"median": 150, "sigma": 0.6, "max": 600},
            },
            "traffic": {"kind": "poisson", "phases": [{"until_s": 60, "rate_per_s": rate_per_s}]},
        }  # fmt: skip

    scenario = parse(
        {
            "name": "faults", "duration_s": 60, "slo": {"thresholds_s": [5, 10, 20]},
            "economy": {"payment": "lateness", "initial_credit": 50, "exposure": 10},
            "providers": [provider(f"p{k}", rate_per_s) for k, rate_per_s in enumerate((8.0, 4.0, 0.5, 0.5))],
        }
    )  # fmt: skip
    made = plan(scenario, 3)
    *columns, tree = made.traffic
    return made._replace(traffic=Arrivals(*(column[:REQUESTS] for column in columns), tree))


def run(seed: int, faults: Faults = FAULTS) -> Report:
    return play(planned(), lambda: Rule("shortest_queue"), faults, seed)


@pytest.fixture(scope="module")
def report() -> Report:
    return run(1)


def test_every_accepted_request_ends_exactly_once(report: Report) -> None:
    totals = report.totals
    assert totals["accepted"] == totals["answered"] + totals["failed"] + totals["cancelled"]
    whole = [each.status == 200 and each.tokens > 0 for each in report.outcomes]
    assert len(whole) == REQUESTS
    assert sum(whole) == totals["answered"]
    output = planned().traffic.output
    assert all(each.tokens == asked for each, asked, good in zip(report.outcomes, output, whole, strict=True) if good)
    refused = sum(each.status == 0 and each.latency_s == 0 for each in report.outcomes)  # nobody was there
    assert totals["accepted"] == REQUESTS - refused


def test_faults_are_met_and_most_requests_are_answered(report: Report) -> None:
    bad = [each for each in report.outcomes if each.status != 200 or each.tokens == 0]
    assert 0 < len(bad) < REQUESTS / 2
    assert report.totals["handed_over"] > 20


def test_nothing_is_left_over(report: Report) -> None:
    assert (report.still_held, report.still_remote, report.still_in_engines) == (0, 0, 0)
    assert (report.in_escrow, report.minted) == (0, MINTED)
    assert report.errors == []


def test_the_same_seed_gives_the_same_history(report: Report) -> None:
    again, other = run(1), run(2)
    assert (again.digest, again.messages) == (report.digest, report.messages)
    assert again.outcomes == report.outcomes
    assert other.digest != report.digest


def test_without_faults_everything_is_answered() -> None:
    report = run(1, Faults())
    np.testing.assert_array_equal([each.tokens for each in report.outcomes], planned().traffic.output)
    assert report.totals["answered"] == report.totals["accepted"] == REQUESTS
