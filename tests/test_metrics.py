"""Measures of a run against values worked out by hand, intervals against SciPy."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from wwwserve.envs.batch import RequestTable
from wwwserve.envs.scenario import Slo, SloClass, parse
from wwwserve.eval.metrics import (
    attainment,
    goodput_value,
    mean_ci,
    measure,
    paired_ci,
    score,
    slo_auc,
    t_quantile,
    threshold_key,
    time_quantiles,
    time_stats,
)

INF = math.inf


def requests(latency_s: list[float], klass: list[int] | None = None, first_token_s: list[float] | None = None) -> Any:
    count = len(latency_s)
    ints = np.zeros(count, np.int32)
    return RequestTable(
        arrival_s=np.arange(count, dtype=float),
        origin=ints,
        executor=ints,
        klass=np.array(klass or [0] * count, np.int32),
        prompt=ints.astype(np.int64),
        cached=ints.astype(np.int64),
        output=ints.astype(np.int64),
        latency_s=np.array(latency_s, dtype=float),
        first_token_s=np.array(first_token_s or latency_s, dtype=float),
    )


def test_attainment_counts_unfinished_requests_as_missed_and_the_threshold_as_met() -> None:
    latency_s = np.array([1.0, 2.0, 3.0, INF])
    assert attainment(latency_s, 2.0) == 0.5
    assert attainment(latency_s, 1e9) == 0.75
    assert slo_auc(latency_s, (1.0, 2.0, 100.0)) == pytest.approx((0.25 + 0.5 + 0.75) / 3)


def test_latency_is_of_finished_requests() -> None:
    assert time_stats(np.array([4.0, INF, 1.0, 2.0, INF])) == pytest.approx(
        {"mean": 7 / 3, "p50": 2.0, "p90": 3.6, "p99": 3.96}
    )
    assert all(math.isnan(x) for x in time_stats(np.array([INF])).values())


def test_quantiles_are_percentiles_of_finished_requests() -> None:
    quantiles = time_quantiles(np.array([*range(101), INF], dtype=float))
    assert quantiles.tolist() == pytest.approx(list(range(1, 100)))


def test_goodput_without_classes_is_attainment_at_the_middle_threshold() -> None:
    table = requests([5.0, 15.0, 25.0, INF])
    assert goodput_value(table, Slo((10.0, 20.0, 30.0))) == 0.5
    assert goodput_value(table, Slo((10.0, 30.0))) == 0.25  # of an even number the lower


def test_goodput_with_classes_weighs_by_value_and_takes_each_deadline() -> None:
    slo = Slo(classes=(SloClass("chat", 0.5, deadline_s=10.0, value=3.0), SloClass("batch", 0.5, 100.0, value=1.0)))
    table = requests([10.0, 50.0, 50.0, 101.0, INF], klass=[0, 0, 1, 1, 0])
    assert goodput_value(table, slo) == pytest.approx((3 + 1) / (3 * 3 + 2 * 1))
    assert (score(slo), score(Slo())) == ("goodput_value", "slo_auc")


def test_worthless_requests_have_no_goodput() -> None:
    slo = Slo(classes=(SloClass("free", 1.0, deadline_s=10.0, value=0.0),))
    assert math.isnan(goodput_value(requests([1.0]), slo))


def test_measure_keeps_latency_and_first_token_apart() -> None:
    scenario = parse({"name": "m", "slo": {"thresholds_s": [0.5, 30]}, "providers": [{"name": "n1"}]})
    got = measure(requests([20.0, 40.0], first_token_s=[1.0, 3.0]), scenario)
    assert got["slo"] == {"0.5": 0.0, "30": 0.5}
    assert got["slo_auc"] == 0.25
    assert got["latency_s"]["mean"] == 30.0
    assert got["first_token_s"]["mean"] == 2.0


def test_no_requests_means_no_measure() -> None:
    scenario = parse({"name": "m", "providers": [{"name": "n1"}]})
    got = measure(requests([]), scenario)
    assert math.isnan(got["slo_auc"]) and math.isnan(got["goodput_value"]) and math.isnan(got["latency_s"]["p50"])


@pytest.mark.parametrize("threshold_s, key", [(200.0, "200"), (0.5, "0.5"), (1_000_000.0, "1000000")])
def test_threshold_keys(threshold_s: float, key: str) -> None:
    assert threshold_key(threshold_s) == key


@pytest.mark.parametrize("degrees", [*range(1, 31), 63, 100, 999])
def test_t_quantile_is_scipys(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-8)


@pytest.mark.parametrize("count", [2, 3, 8, 33])
def test_interval_is_scipys(count: int) -> None:
    values = np.random.default_rng(count).normal(5.0, 2.0, count)
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    mean, half = mean_ci(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_interval_leaves_out_what_is_missing_and_is_unknown_for_one() -> None:
    assert mean_ci([1.0, math.nan, 3.0]) == mean_ci([1.0, 3.0])
    mean, half = mean_ci([2.0])
    assert mean == 2.0 and math.isnan(half)
    assert all(math.isnan(x) for x in mean_ci([math.nan]))


def test_pairing_removes_what_runs_have_in_common() -> None:
    shared = np.array([0.0, 100.0, 200.0, 300.0])
    mean, half = paired_ci(shared + np.array([1.0, 1.1, 0.9, 1.0]), shared)
    assert mean == pytest.approx(1.0) and half < 0.2
    assert paired_ci([1.0, math.nan, 5.0], [0.0, 2.0, 2.0]) == mean_ci([1.0, 3.0])
