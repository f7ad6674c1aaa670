"""Arrivals: when whose user sends a request of what length. The same scenario and seed give the same bytes."""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.envs import trace
from wwwserve.envs.scenario import (
    Lognormal,
    MmppTraffic,
    PoissonTraffic,
    Provider,
    Scenario,
    SloClass,
    TimesTraffic,
    TraceTraffic,
)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]


class Arrivals(NamedTuple):
    """Requests of all providers' own users in order of time, each array of shape (n,)."""

    time_s: FloatArray
    """In [0, duration_s)."""
    provider: IntArray
    """Index into `scenario.providers`."""
    prompt: IntArray
    """Prompt tokens, at least 1."""
    output: IntArray
    """Tokens that will be generated, at least 1."""
    klass: IntArray
    """Index into `scenario.slo.classes`; 0 if there are none."""


def arrivals(scenario: Scenario, seed: int) -> Arrivals:
    """Draw the arrivals of a run; `seed` is a non-negative integer.

    Each provider has a generator of its own, from the seed and its index: changing the traffic of one leaves the
    requests of the others as they are. What would come while a provider is offline does not come.
    """
    children = np.random.SeedSequence(seed).spawn(len(scenario.providers))
    parts = [
        _of_provider(scenario, index, np.random.default_rng(child))
        for index, child in enumerate(children)
        if scenario.providers[index].traffic is not None
    ]
    if not parts:
        none = np.zeros(0, np.int32)
        return Arrivals(np.zeros(0), none, none, none, none)
    merged = Arrivals(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return _take(merged, np.argsort(merged.time_s, kind="stable"))


def expected_prompt(provider: Provider) -> Lognormal:
    """Distribution of prompt tokens that an origin expects of its own users; of a trace, a lognormal fitted to it."""
    fitted = _fit_to_trace(provider)
    return provider.lengths.prompt if fitted is None else fitted[0]


def expected_output(provider: Provider, slo_class: SloClass | None) -> Lognormal:
    """Distribution of output tokens that an origin expects of its own users' requests of this class.

    The class's own where it has one, else the provider's; of a trace, for every class, a lognormal fitted to it.
    """
    fitted = _fit_to_trace(provider)
    if fitted is not None:
        return fitted[1]
    if slo_class is not None and slo_class.output is not None:
        return slo_class.output
    return provider.lengths.output


def _of_provider(scenario: Scenario, index: int, rng: np.random.Generator) -> Arrivals:
    provider, duration_s = scenario.providers[index], scenario.duration_s
    traffic, classes = provider.traffic, scenario.slo.classes
    prompt = output = None
    match traffic:
        case PoissonTraffic(phases):
            ends = np.array([phase.until_s for phase in phases])
            rates = np.array([phase.rate_per_s for phase in phases])
            time_s = _poisson(np.concatenate(([0.0], ends)), rates, rng)
        case MmppTraffic():
            time_s = _poisson(*_mmpp_phases(traffic, duration_s, rng), rng)
        case TimesTraffic(times_s):
            time_s = np.array(times_s)
        case _:
            assert traffic is not None
            recorded = trace.read(traffic.file)
            first = int(np.searchsorted(recorded.time_s, traffic.start_s))
            order = np.roll(np.arange(len(recorded.time_s)), -first)
            times = (recorded.time_s[order] - traffic.start_s) % recorded.period_s
            kept = (times < duration_s) & (rng.random(len(times)) < traffic.rate_scale)
            time_s, prompt, output = times[kept], recorded.prompt[order[kept]], recorded.output[order[kept]]

    count = len(time_s)
    klass = np.zeros(count, np.int32)
    if len(classes) > 1:
        bounds = np.cumsum([each.share for each in classes])[:-1]
        klass = np.searchsorted(bounds, rng.random(count), side="right").astype(np.int32)
    if prompt is None or output is None:
        prompt = _lengths((provider.lengths.prompt,), np.zeros(count, np.int32), rng)
        output = _lengths(tuple(expected_output(provider, each) for each in classes or (None,)), klass, rng)
    drawn = Arrivals(time_s, np.full(count, index, np.int32), prompt, output, klass)
    online = np.zeros(count, bool)
    for start, end in provider.online_s:
        online |= (time_s >= start) & (time_s < end)
    return drawn if online.all() else _take(drawn, online)


def _take(requests: Arrivals, which: NDArray[Any]) -> Arrivals:
    """The requests that an index or a mask selects."""
    time_s, provider, prompt, output, klass = requests
    return Arrivals(time_s[which], provider[which], prompt[which], output[which], klass[which])


def _poisson(bounds_s: FloatArray, rates_per_s: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Sorted arrival times of a Poisson process with rate `rates_per_s[i]` from `bounds_s[i]` to `bounds_s[i + 1]`."""
    lengths_s = np.diff(bounds_s)
    counts = rng.poisson(rates_per_s * lengths_s)
    uniform = rng.random(int(counts.sum()))
    time_s = np.repeat(bounds_s[:-1], counts) + uniform * np.repeat(lengths_s, counts)
    time_s.sort()
    np.minimum(time_s, np.nextafter(bounds_s[-1], 0.0), out=time_s)
    return time_s


def _mmpp_phases(traffic: MmppTraffic, duration_s: float, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Bounds and rates of the states that a two-state MMPP goes through, from a stationary start to `duration_s`."""
    dwell_s, rates = np.array(traffic.mean_dwell_s), np.array(traffic.rates_per_s)
    start = int(rng.random() >= dwell_s[0] / dwell_s.sum())
    chunk = 2 * (8 + math.ceil(2 * duration_s / dwell_s.sum()))
    states = (start + np.arange(chunk)) % 2
    ends = np.zeros(0)
    last = 0.0
    while last < duration_s:
        ends = np.concatenate((ends, last + np.cumsum(rng.exponential(dwell_s[states]))))
        last = float(ends[-1])
    ends = ends[: int(np.searchsorted(ends, duration_s)) + 1]
    ends[-1] = duration_s
    return np.concatenate(([0.0], ends)), rates[(start + np.arange(len(ends))) % 2]


def _lengths(distributions: tuple[Lognormal, ...], which: IntArray, rng: np.random.Generator) -> IntArray:
    """A token count for each entry of `which`, drawn from the distribution that it points to."""
    z = rng.standard_normal(len(which))
    table = np.array([(math.log(each.median), each.sigma, each.max) for each in distributions])
    log_median, sigma, longest = table[which].T
    tokens: FloatArray = np.clip(np.rint(np.exp(log_median + sigma * z)), 1, longest)
    return tokens.astype(np.int32)


def _fit_to_trace(provider: Provider) -> tuple[Lognormal, Lognormal] | None:
    """Prompt and output lengths fitted to the trace that `provider` replays; None if it replays none."""
    return _fit_file(provider.traffic.file) if isinstance(provider.traffic, TraceTraffic) else None


@lru_cache(maxsize=16)
def _fit_file(file: Path) -> tuple[Lognormal, Lognormal]:
    recorded = trace.read(file)
    return _fit(recorded.prompt), _fit(recorded.output)


def _fit(tokens: IntArray) -> Lognormal:
    """The lognormal with the mean and deviation of the tokens' logarithms, clipped at their maximum."""
    logs = np.log(tokens)
    return Lognormal(float(np.exp(logs.mean())), float(logs.std()), int(tokens.max()))
