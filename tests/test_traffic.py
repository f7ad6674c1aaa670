"""Arrivals: their rates, lengths and classes, what they depend on and what they do not."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from wwwserve.agents.lengths import Lognormal
from wwwserve.envs import scenario, trace, traffic
from wwwserve.envs.scenario import Scenario, TraceTraffic
from wwwserve.envs.traffic import Arrivals

STEADY = {"kind": "poisson", "phases": [{"until_s": 600, "rate_per_s": 2.0}]}
STEPS = {"kind": "poisson", "phases": [{"until_s": 200, "rate_per_s": 9.0}, {"until_s": 500, "rate_per_s": 3.0}]}
BURSTS = {"kind": "mmpp", "rates_per_s": [1.0, 11.0], "mean_dwell_s": [30, 10]}
AZURE = {"kind": "trace", "file": "azure_llm_conv_2023.csv"}


def market(*traffics: dict[str, Any] | None, **keys: Any) -> Scenario:
    """A scenario with one provider for each traffic."""
    providers = [{"name": f"n{i}", "traffic": each} for i, each in enumerate(traffics)]
    return scenario.parse({"name": "test", "providers": providers} | keys)


def draw(made: Scenario, seed: int, longest: int = 40_960) -> Arrivals:
    return traffic.arrivals(made, seed, np.full(len(made.providers), longest))


class Requests(NamedTuple):
    """The columns of `Arrivals` that say nothing of other requests."""

    time_s: Any
    provider: Any
    prompt: Any
    output: Any
    klass: Any
    think_s: Any
    turn: Any


def of(arrivals: Arrivals, provider: int) -> Requests:
    mask = arrivals.provider == provider
    return Requests(*(getattr(arrivals, name)[mask] for name in Requests._fields))


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def mean_rate(made: Scenario, runs: int) -> float:
    """Requests/s over many seeds."""
    return sum(len(draw(made, seed).time_s) for seed in range(runs)) / runs / made.duration_s


def test_shape_types_and_order() -> None:
    got = draw(market(STEADY, STEPS, BURSTS, {"kind": "times", "times_s": [3, 3, 1]}), 1)
    assert [column.dtype for column in got[:5]] == [np.float64, np.int32, np.int32, np.int32, np.int32]
    assert [column.dtype for column in got[5:9]] == [np.int32, np.float64, np.int32, np.int32]
    assert [column.dtype for column in got.tree] == [np.int32] * 3
    assert len({len(column) for column in got[:9]}) == 1
    assert (np.diff(got.time_s) >= 0).all()
    assert got.time_s.min() >= 0 and got.time_s.max() < 600
    assert got.prompt.min() >= 1 and got.prompt.max() <= 2048
    assert got.output.min() >= 1 and got.output.max() <= 8192
    assert set(got.provider) == {0, 1, 2, 3}
    assert (got.klass == 0).all()


def test_no_users_no_requests() -> None:
    none = draw(market(None, None), 0)
    assert all(len(column) == 0 for column in (*none[:9], *none.tree))
    assert set(draw(market(None, STEADY), 0).provider) == {1}


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    made = market(STEADY, BURSTS, AZURE | {"rate_scale": 0.5})
    a, b = draw(made, 5), draw(made, 5)
    assert same(a[:9], b[:9]) and same(a.tree, b.tree)
    a, b = draw(made, 5), draw(made, 6)
    assert all(not same(of(a, i), of(b, i)) for i in range(3))


def test_a_providers_requests_do_not_depend_on_the_others() -> None:
    first = draw(market(STEADY, BURSTS, STEADY), 5)
    second = draw(market(STEADY, STEPS, STEADY, BURSTS), 5)
    third = draw(market(STEADY, None, STEADY), 5)
    for i in (0, 2):
        assert same(of(first, i), of(second, i))
        assert same(of(first, i), of(third, i))
    assert not np.array_equal(of(first, 0).time_s, of(first, 2).time_s)


def test_poisson_rate_of_each_phase() -> None:
    made = market(STEPS)
    times = np.concatenate([draw(made, seed).time_s for seed in range(50)])
    counts = np.histogram(times, [0, 200, 500, 600])[0]
    for count, expected in zip(counts, (50 * 200 * 9.0, 50 * 300 * 3.0, 0.0), strict=True):
        assert abs(count - expected) <= 4 * math.sqrt(expected)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.concatenate([np.diff(draw(market(STEADY), seed).time_s) for seed in range(50)])
    assert gaps.mean() == pytest.approx(0.5, rel=0.02)
    assert gaps.std() == pytest.approx(0.5, rel=0.03)


def test_mmpp_mean_and_burstiness() -> None:
    made = market(BURSTS)
    counts = np.array([len(draw(made, seed).time_s) for seed in range(300)])
    assert counts.mean() / 600 == pytest.approx((1.0 * 30 + 11.0 * 10) / 40, rel=0.03)
    # Fischer and Meier-Hellstern, "The MMPP cookbook" (1993): variance over mean in the long run, with q = 1 / dwell.
    q1, q2, gap, mean = 1 / 30, 1 / 10, 10.0, 3.5
    dispersion = 1 + 2 * q1 * q2 * gap**2 / ((q1 + q2) ** 3 * mean)
    assert counts.var() / counts.mean() == pytest.approx(dispersion, rel=0.3)


def test_mmpp_starts_stationary() -> None:
    made = market(BURSTS, duration_s=1.0)
    assert mean_rate(made, 3000) == pytest.approx(3.5, rel=0.1)


def test_given_times() -> None:
    got = draw(market({"kind": "times", "times_s": [60, 7.25, 1.5]}), 3)
    assert got.time_s.tolist() == [1.5, 7.25, 60.0]


def test_lengths_are_lognormal_and_clipped() -> None:
    steady = {"kind": "poisson", "phases": [{"until_s": 600, "rate_per_s": 100}]}
    output = {"median": 4000, "sigma": 0.75, "max": 8192}
    prompt = {"median": 3, "sigma": 1.5, "max": 50}
    got = draw(market(steady, defaults={"lengths": {"prompt": prompt, "output": output}}), 0)
    assert np.median(got.output) == pytest.approx(4000, rel=0.02)
    assert got.output.mean() == pytest.approx(Lognormal(4000, 0.75, 8192).mean, rel=0.01)
    assert got.output.max() == 8192
    assert (got.prompt.min(), got.prompt.max(), np.median(got.prompt)) == (1, 50, 3)


CHAT_AND_BATCH = {
    "chat": {"share": 0.7, "deadline_s": 20, "output": {"median": 200, "sigma": 0.6, "max": 1024}},
    "batch": {"share": 0.3, "deadline_s": 600},
}


def test_classes_have_their_shares_and_lengths() -> None:
    steady = {"kind": "poisson", "phases": [{"until_s": 600, "rate_per_s": 50}]}
    got = draw(market(steady, slo={"classes": CHAT_AND_BATCH}), 0)
    assert (got.klass == 0).mean() == pytest.approx(0.7, abs=0.01)
    assert set(got.klass) == {0, 1}
    assert np.median(got.output[got.klass == 0]) == pytest.approx(200, rel=0.03)
    assert got.output[got.klass == 0].max() <= 1024
    assert np.median(got.output[got.klass == 1]) == pytest.approx(4000, rel=0.03)


def test_nothing_arrives_at_an_offline_provider() -> None:
    online = market(STEADY, STEADY)
    mapping = online.to_mapping()
    mapping["providers"][1]["online_s"] = [[0, 100], [250.5, 400]]
    got, whole = draw(scenario.parse(mapping), 2), draw(online, 2)
    assert same(of(got, 0), of(whole, 0))
    everything = of(whole, 1)
    kept = (everything.time_s < 100) | ((everything.time_s >= 250.5) & (everything.time_s < 400))
    assert 0 < kept.sum() < len(kept)
    assert same(of(got, 1), Requests(*(column[kept] for column in everything)))


def azure() -> trace.Trace:
    path = trace.find("azure_llm_conv_2023.csv", None)
    assert path is not None
    return trace.read(path)


def test_the_packaged_trace() -> None:
    recorded = azure()
    assert len(recorded.time_s) == 19_366
    assert (recorded.prompt[:3].tolist(), recorded.output[:3].tolist()) == ([374, 396, 879], [44, 109, 55])
    assert recorded.time_s[:3] == pytest.approx([0, 4.3145, 4.5417], abs=1e-3)
    assert recorded.time_s[-1] == pytest.approx(3501.722, abs=1e-3)
    assert (int(recorded.prompt.sum()), int(recorded.output.sum())) == (22_361_870, 4_088_665)
    with pytest.raises(ValueError, match="read-only"):
        recorded.prompt[0] = 1


def test_a_trace_is_replayed_as_it_is() -> None:
    recorded = azure()
    got = draw(market(AZURE | {"start_s": 600}, duration_s=1200), 0)
    window = (recorded.time_s >= 600) & (recorded.time_s < 1800)
    assert np.allclose(got.time_s, recorded.time_s[window] - 600)
    assert np.array_equal(got.prompt, recorded.prompt[window])
    assert np.array_equal(got.output, recorded.output[window])


def test_a_trace_goes_on_at_its_beginning() -> None:
    recorded = azure()
    got = draw(market(AZURE | {"start_s": 3000}, duration_s=1000), 0)
    tail = recorded.time_s >= 3000
    head = recorded.time_s < 4000 - recorded.period_s
    assert len(got.time_s) == tail.sum() + head.sum()
    assert np.array_equal(got.output, np.concatenate((recorded.output[tail], recorded.output[head])))
    assert got.time_s[tail.sum()] == pytest.approx(recorded.period_s - 3000)


def test_each_request_of_a_trace_comes_once_at_most() -> None:
    got = draw(market(AZURE | {"start_s": 100}, duration_s=9000), 0)
    assert len(got.time_s) == 19_366
    assert got.time_s[-1] < azure().period_s


def test_a_trace_is_thinned_at_random() -> None:
    made = market(AZURE | {"rate_scale": 0.25}, AZURE | {"rate_scale": 0.25}, duration_s=3501)
    a, b = (of(draw(made, 0), i) for i in range(2))
    for part in (a, b):
        assert len(part.time_s) == pytest.approx(19_366 / 4, rel=0.05)
    assert len(np.intersect1d(a.time_s, b.time_s)) == pytest.approx(19_366 / 16, rel=0.15)


def test_a_trace_in_csv(tmp_path: Path) -> None:
    (tmp_path / "small.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 23:59:59.500000+00:00,10,20\n"
        "2024-05-11 00:00:01.0000000Z,12,0\n"
        "2024-05-11 00:00:00.2500000Z,11,21\n"
    )
    mapping = {"name": "t", "providers": [{"name": "n", "traffic": {"kind": "trace", "file": "small.csv"}}]}
    got = draw(scenario.parse(mapping, folder=tmp_path), 0)
    assert got.time_s.tolist() == [0.0, 0.75, 1.5]
    assert got.prompt.tolist() == [10, 11, 12]
    assert got.output.tolist() == [20, 21, 1]


def test_what_an_origin_expects_of_its_users() -> None:
    made = market(STEADY, AZURE, slo={"classes": CHAT_AND_BATCH})
    own, replaying = made.providers
    chat, batch = made.slo.classes
    assert traffic.expected_output(own, chat) == chat.output
    assert traffic.expected_output(own, batch) == own.lengths.output
    assert traffic.expected_output(own, None) == own.lengths.output
    assert traffic.expected_prompt(own, 40_960) == own.lengths.prompt
    assert isinstance(replaying.traffic, TraceTraffic)
    for fitted, tokens in (
        (traffic.expected_output(replaying, chat), azure().output),
        (traffic.expected_prompt(replaying, 40_960), azure().prompt),
    ):
        assert fitted.median == pytest.approx(np.exp(np.log(tokens).mean()))
        assert fitted.sigma == pytest.approx(np.log(tokens).std())
        assert fitted.max == tokens.max()
