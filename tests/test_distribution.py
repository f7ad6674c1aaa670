"""Random markets: what distinguishes their kinds."""

from collections.abc import Iterator

import numpy as np
import pytest

from wwwserve.agents.hardware import profile
from wwwserve.agents.lengths import Lognormal
from wwwserve.envs.distribution import KINDS, Kind, capacity_per_s, sample
from wwwserve.envs.scenario import PoissonTraffic, Scenario, SessionsTraffic, TimesTraffic
from wwwserve.envs.state import plan


def drawn(kind: Kind, count: int = 24) -> Iterator[Scenario]:
    rng = np.random.default_rng((7, KINDS.index(kind)))
    return (sample(kind, rng) for _ in range(count))


def load_of(scenario: Scenario) -> float:
    """Requests that arrive over those that the nodes sustain while requests arrive, with one class of requests."""
    able = 0.0
    for each in scenario.providers:
        lengths = each.lengths
        engine = profile(each.gpu, each.model, each.max_num_seqs)
        able += capacity_per_s(engine, lengths.prompt, [(1.0, lengths.output)]) * scenario.duration_s
    return plan(scenario, 1).traffic.time_s.size / able


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_market(kind: Kind) -> None:
    assert list(drawn(kind, 3)) == list(drawn(kind, 3))
    least, most = (9, 12) if kind == "thick" else (3, 8)
    assert all(least <= len(scenario.providers) <= most for scenario in drawn(kind, 8))


def test_code_has_long_prompts_and_answers_of_tens_of_tokens() -> None:
    for scenario in drawn("code"):
        for each in scenario.providers:
            assert each.lengths.prompt.mean > 900
            assert 8 < each.lengths.output.mean < 120
        assert 0.2 < scenario.slo.thresholds_s[0] < scenario.slo.thresholds_s[-1] < 120
        assert scenario.duration_s == 100


def test_bursts_come_at_given_times_many_at_once() -> None:
    shares, alike = [], 0
    for scenario in drawn("bursts"):
        for each in scenario.providers:
            assert isinstance(each.traffic, TimesTraffic)
            if len(each.traffic.times_s) >= 50:
                counts, _ = np.histogram(each.traffic.times_s, bins=60, range=(0, scenario.duration_s))
                shares.append(np.sort(counts)[-20:].sum() / counts.sum())
        alike += len({(each.gpu, each.model) for each in scenario.providers}) == 1
    assert min(shares) > 0.5  # of an even stream a third would come in a third of the time
    assert 6 <= alike <= 20


@pytest.mark.parametrize("kind", ["alike", "bursts"])
def test_equal_nodes_are_met_below_near_and_above_capacity(kind: Kind) -> None:
    loads = []
    for scenario in drawn(kind, 48):
        equal = len({each.gpu for each in scenario.providers}) == 1
        if equal and all(len(each.online_s) == 1 for each in scenario.providers):
            loads.append(load_of(scenario))
    assert min(loads) < 0.8 and max(loads) > 1.2 and any(0.85 < load < 1.15 for load in loads)


def utilisation(scenario: Scenario) -> np.ndarray:
    """Mean rate of own users over what each node sustains, [N], where nobody is away and arrivals are Poisson."""
    loads = []
    for each in scenario.providers:
        assert isinstance(each.traffic, PoissonTraffic)
        starts = (0.0, *(phase.until_s for phase in each.traffic.phases))
        count = sum(p.rate_per_s * (p.until_s - s) for p, s in zip(each.traffic.phases, starts, strict=False))
        engine = profile(each.gpu, each.model, each.max_num_seqs)
        able = capacity_per_s(engine, each.lengths.prompt, [(1.0, each.lengths.output)]) * scenario.duration_s
        loads.append(count / able)
    return np.array(loads)


def with_steady_traffic(kind: Kind) -> list[Scenario]:
    steady = [s for s in drawn(kind, 60) if all(isinstance(each.traffic, PoissonTraffic) for each in s.providers)]
    assert len(steady) >= 15
    return steady


def test_in_a_thin_market_one_has_most_of_the_spare_capacity() -> None:
    for scenario in with_steady_traffic("thin"):
        able = [
            capacity_per_s(profile(e.gpu, e.model, e.max_num_seqs), e.lengths.prompt, [(1.0, e.lengths.output)])
            for e in scenario.providers
        ]
        spare = np.sort(np.maximum(0.0, 1.0 - utilisation(scenario)) * able)
        assert spare[-1] > 0.5 * spare.sum()


def test_in_an_uneven_market_some_have_too_much_and_others_little() -> None:
    for scenario in with_steady_traffic("uneven"):
        load = utilisation(scenario)  # of three phases that alternate, two may be the high or the low ones
        assert ((load > 0.9) | (load < 0.6)).all()
        assert (load > 0.9).any() and (load < 0.6).any()


@pytest.mark.parametrize("kind", ["sessions", "agents"])
def test_sessions_of_a_market_are_alike_and_come_at_a_load_that_varies(kind: Kind) -> None:
    loads, prompts, mixed = [], [], 0
    for k, scenario in enumerate(drawn(kind, 40)):
        own = [each.traffic for each in scenario.providers if isinstance(each.traffic, SessionsTraffic)]
        assert len({(each.system_tokens, each.turns, each.turn, each.think_s) for each in own}) == 1
        mixed += len(own) < len(scenario.providers)
        if any(each.online_s != ((0.0, np.inf),) for each in scenario.providers):
            continue
        planned = plan(scenario, k)
        requests = planned.traffic
        came_s = requests.time_s.copy()
        for r in np.flatnonzero(requests.follows >= 0).tolist():
            came_s[r] = came_s[requests.follows[r]] + scenario.slo.thresholds_s[2] + requests.think_s[r]
        came = came_s < scenario.duration_s
        prompt, output = (float(x[came].mean()) for x in (requests.prompt, requests.output))
        prompts.append(prompt)
        if len(own) == len(scenario.providers):
            cached = max(0.0, 0.9 * (1 - own[0].turn.mean / prompt))
            lengths = Lognormal(prompt, 0.0, 10**6), [(1.0, Lognormal(output, 0.0, 10**6))]
            able = sum(capacity_per_s(engine, *lengths, cached) for engine in planned.profiles)
            loads.append(came.sum() / scenario.duration_s / able)
    assert min(loads) < 0.75 and max(loads) > 1.1 and 0.75 < np.mean(loads) < 1.15
    assert (np.median(prompts) > 4000) == (kind == "agents") == (mixed == 0)


def test_what_is_cached_needs_no_prefill() -> None:
    engine = profile("a40", "qwen3-8b", 64)
    long, none, output = Lognormal(6000, 0, 8192), Lognormal(1, 0, 1), [(1.0, Lognormal(200, 0, 1024))]
    rates = [capacity_per_s(engine, long, output, cached) for cached in (0.0, 0.5, 0.9)]
    assert rates[0] < rates[1] < rates[2] < capacity_per_s(engine, none, output)
    saved_s = 1 / rates[0] - 1 / rates[1]
    assert saved_s == pytest.approx(3000 * engine.per_token_s, rel=0.05)
