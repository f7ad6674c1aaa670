"""Every measure of a run, defined once; and how runs with different seeds become a mean with its interval.

A run is one sample: its requests share queues and depend on each other, so intervals are over seeds. Shares and values
are of all users' requests that arrived; one that never ended (its latency is infinite) was missed. Where a measure has
nothing to be taken of, such as the latency of a run in which no request ended, it is NaN, and means leave that run out.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wwwserve.envs.batch import RequestTable
from wwwserve.envs.scenario import Scenario, Slo

FloatArray = NDArray[np.float64]
MeanCi = tuple[float, float]

PERCENTILES = (50, 90, 99)
QUANTILES = tuple(range(1, 100))
CONFIDENCE = 0.95
FIRST_TOKEN_S, PER_TOKEN_S = 2.0, 0.08  # targets of an interactive request


def attainment(latency_s: FloatArray, threshold_s: float) -> float:
    """SLO attainment: requests with latency <= threshold / all requests, 0 to 1; NaN without requests."""
    return _share(latency_s <= threshold_s)


def slo_auc(latency_s: FloatArray, thresholds_s: Sequence[float]) -> float:
    """Mean of the attainment over the thresholds, 0 to 1."""
    return float(np.mean([attainment(latency_s, threshold_s) for threshold_s in thresholds_s]))


def time_stats(time_s: FloatArray) -> dict[str, float]:
    """`mean`, `p50`, `p90`, `p99` in seconds of the finite times: of what was finished, not of what was missed.

    A policy that leaves requests unfinished can look fast by these; attainment tells.
    """
    finite = time_s[np.isfinite(time_s)]
    if finite.size == 0:
        return {"mean": math.nan, **{f"p{q}": math.nan for q in PERCENTILES}}
    percentiles = np.percentile(finite, PERCENTILES)
    return {
        "mean": float(finite.mean()),
        **{f"p{q}": float(value) for q, value in zip(PERCENTILES, percentiles, strict=True)},
    }


def time_quantiles(time_s: FloatArray) -> FloatArray:
    """The 1st to 99th percentile in seconds [99] of the finite times."""
    finite = time_s[np.isfinite(time_s)]
    return np.percentile(finite, QUANTILES) if finite.size else np.full(len(QUANTILES), math.nan)


def goodput_value(requests: RequestTable, slo: Slo) -> float:
    """Value of the requests with latency <= deadline / value of all requests, 0 to 1; NaN if that is 0.

    With classes, deadline and value are those of the request's class. Without, each is worth 1 and due at the middle
    threshold, of an even number the lower of the two.
    """
    deadline_s = np.array(
        [each.deadline_s for each in slo.classes] or [slo.thresholds_s[(len(slo.thresholds_s) - 1) // 2]]
    )
    value = np.array([each.value for each in slo.classes] or [1.0])[requests.klass]
    total = value.sum()
    return float(value[requests.latency_s <= deadline_s[requests.klass]].sum() / total) if total > 0 else math.nan


def interactive(requests: RequestTable) -> float:
    """Share of requests whose first token came within 2 s and the others within 80 ms each, on average; NaN without
    requests."""
    with np.errstate(invalid="ignore"):
        per_token_s = (requests.latency_s - requests.first_token_s) / np.maximum(1, requests.output - 1)
        return _share((requests.first_token_s <= FIRST_TOKEN_S) & (per_token_s <= PER_TOKEN_S))


def prefix_hit(requests: RequestTable) -> float:
    """Prompt tokens found in a prefix cache / all prompt tokens, of the requests that were done; NaN without them."""
    done = np.isfinite(requests.latency_s)
    total = requests.prompt[done].sum()
    return float(requests.cached[done].sum() / total) if total > 0 else math.nan


def score(slo: Slo) -> str:
    """The measure that ranks policies in a scenario: `goodput_value` where requests have classes, else `slo_auc`."""
    return "goodput_value" if slo.classes else "slo_auc"


def threshold_key(threshold_s: float) -> str:
    """How a threshold is written in results: `200`, `0.5`."""
    return str(int(threshold_s)) if threshold_s == int(threshold_s) else repr(threshold_s)


def mean_ci(values: ArrayLike) -> MeanCi:
    """Mean and half-width of its 95 % interval, t s / sqrt(n), over the values [n] that are not NaN.

    s is the sample's standard deviation, t the quantile of Student's distribution with n - 1 degrees of freedom. The
    half-width is NaN for n < 2, the mean too for n = 0.
    """
    sample = np.asarray(values, np.float64)
    sample = sample[~np.isnan(sample)]
    if sample.size == 0:
        return math.nan, math.nan
    if sample.size == 1:
        return float(sample[0]), math.nan
    spread = t_quantile(sample.size - 1) * float(sample.std(ddof=1)) / math.sqrt(sample.size)
    return float(sample.mean()), spread


def paired_ci(values: ArrayLike, baseline: ArrayLike) -> MeanCi:
    """`mean_ci` of values [n] - baseline [n], paired: entry k of both is from the same arrivals."""
    return mean_ci(np.asarray(values, np.float64) - np.asarray(baseline, np.float64))


def or_none(x: float) -> float | None:
    """The number as results have it: None for one that does not exist."""
    return None if math.isnan(x) else x


def interval(values: ArrayLike) -> list[float | None]:
    """`mean_ci` as results have it."""
    return [or_none(x) for x in mean_ci(values)]


@lru_cache(maxsize=64)
def t_quantile(degrees: int) -> float:
    """t such that Student's distribution with this many degrees of freedom has 95 % of its mass in [-t, t].

    By bisection; the error is below 1e-9. Raises ValueError for less than 1 degree.
    """
    if degrees < 1:
        raise ValueError(f"Student's distribution with {degrees} degrees of freedom, expected at least 1")
    low, high = 1.0, 13.0  # 1.96 < t <= 12.71
    for _ in range(45):
        middle = (low + high) / 2
        if _t_mass(middle, degrees) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_mass(t: float, degrees: int) -> float:
    """P(|T| <= t): Abramowitz and Stegun 26.7.3 and 26.7.4, exact for whole degrees of freedom."""
    theta = math.atan(t / math.sqrt(degrees))
    sin, cos = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = total = cos if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (theta + sin * (total if degrees > 1 else 0.0))
    return sin * total


def _share(hits: NDArray[np.bool_]) -> float:
    return float(hits.mean()) if hits.size else math.nan


def measure(requests: RequestTable, scenario: Scenario) -> dict[str, float | dict[str, float]]:
    """Every measure of the requests of one run, as results name them.

    `slo` by threshold, `slo_auc`, `latency_s` (arrival to the whole answer), `first_token_s` (arrival to the first
    token), `goodput_value`, `interactive`, `prefix_hit`.
    """
    thresholds_s = scenario.slo.thresholds_s
    return {
        "slo": {threshold_key(each): attainment(requests.latency_s, each) for each in thresholds_s},
        "slo_auc": slo_auc(requests.latency_s, thresholds_s),
        "latency_s": time_stats(requests.latency_s),
        "first_token_s": time_stats(requests.first_token_s),
        "goodput_value": goodput_value(requests, scenario.slo),
        "interactive": interactive(requests),
        "prefix_hit": prefix_hit(requests),
    }
