"""Expected completion against values worked out by hand, and the chance to be on time against the lognormal."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wwwserve.agents import knowledge as k
from wwwserve.agents.estimate import (
    chance_on_time,
    context_of,
    expect,
    full_batch,
    marginal_delay,
    prefill_delay_s,
    slowdown,
)
from wwwserve.agents.kernel import Floats

# A node with 8 slots, on which a request is expected to hold 100 + 0.62 * 200 = 224 tokens of context.
TYPICAL = 224.0


def node(running: float = 0, waiting: float = 0, kv_tokens: float | None = None, **columns: float) -> Floats:
    advert = np.zeros(k.ADVERT_SIZE)
    advert[k.AD_RUNNING], advert[k.AD_WAITING] = running, waiting
    advert[k.AD_KV_TOKENS] = running * TYPICAL if kv_tokens is None else kv_tokens
    advert[k.AD_MEAN_PROMPT], advert[k.AD_MEAN_OUTPUT], advert[k.AD_CONTEXT] = 100.0, 200.0, TYPICAL
    advert[k.AD_WEIGHT_S : k.ADVERT_SIZE] = 0.010, 1e-4, 1e-7, 0.004, 1e-4, 0.0, 20_000, 8
    advert[k.AD_UNSHARED] = 1.0
    advert[k.AD_MEAN_UNCACHED], advert[k.AD_PREFILL] = 100.0, waiting * 100.0
    for name, value in columns.items():
        advert[getattr(k, name)] = value
    return advert


def late_s(tokens: float) -> float:
    """What prefill of so many tokens takes longer than an iteration without."""
    return max(0.0, 0.004 + 1e-4 * tokens - 0.010)


def test_an_empty_node() -> None:
    first_s, token_s = expect(node(), 0.0, 500.0, 0.0)
    decode_s = 0.010 + 1e-4 + 1e-7 * 224
    assert token_s == pytest.approx(decode_s + 1 / 200 * 0.004, rel=1e-12)  # others will come after it
    assert first_s == pytest.approx(0.054 + decode_s, rel=1e-12)


def test_a_short_prompt_hides_under_the_weight_read() -> None:
    assert expect(node(), 0.0, 10.0, 0.0) == expect(node(), 0.0, 60.0, 0.0)
    assert expect(node(), 0.0, 61.0, 0.0)[0] > expect(node(), 0.0, 60.0, 0.0)[0]


def test_a_full_node_frees_a_slot_at_the_pace_of_completions() -> None:
    first_s, token_s = expect(node(running=8), 0.0, 100.0, 0.0)
    decode_s = 0.010 + 8e-4 + 1e-7 * 8 * 224
    assert token_s == pytest.approx(decode_s + 8 / 200 * 0.004, rel=1e-12)
    assert first_s == pytest.approx(1 * 200 * token_s / 8 + 0.014 + decode_s, rel=1e-12)


def test_one_slot_left_means_no_queue() -> None:
    assert expect(node(running=7), 0.0, 100.0, 0.0)[0] < 0.03
    assert expect(node(running=8), 0.0, 100.0, 0.0)[0] > 0.25


def test_a_queue_is_served_in_turn() -> None:
    first_s, token_s = expect(node(running=8, waiting=5), 0.0, 100.0, 0.0)
    assert token_s == expect(node(running=8), 0.0, 100.0, 0.0)[1]
    decode_s = 0.010 + 8e-4 + 1e-7 * 8 * 224
    assert first_s == pytest.approx(6 * 200 * token_s / 8 + late_s(500) + 0.014 + decode_s, rel=1e-12)


def test_what_is_cached_is_not_computed_but_attended_to() -> None:
    whole = node(AD_PER_PAIR_S=1e-7)
    decode_s = 0.010 + 1e-4 + 1e-7 * 224
    assert prefill_delay_s(whole, 500.0, 3000.0, 500.0) == pytest.approx(
        late_s(500) + 1e-7 * 500 * (3000 + 250), rel=1e-12
    )
    first_s, token_s = expect(whole, 0.0, 3500.0, 3000.0)
    assert first_s == pytest.approx(0.010 + prefill_delay_s(whole, 500.0, 3000.0, 500.0) + decode_s, rel=1e-12)
    assert token_s == expect(whole, 0.0, 3500.0, 0.0)[1] and first_s < expect(whole, 0.0, 3500.0, 0.0)[0]


def test_prompts_in_a_queue_do_not_attend_to_each_other() -> None:
    whole = node(AD_PER_PAIR_S=1e-7, AD_MEAN_PROMPT=3000.0, AD_MEAN_UNCACHED=500.0)
    queue = node(AD_PER_PAIR_S=1e-7, AD_MEAN_PROMPT=3000.0, AD_MEAN_UNCACHED=500.0, AD_PREFILL=5000.0)
    took_s = expect(queue, 0.0, 100.0, 0.0)[0] - expect(whole, 0.0, 100.0, 0.0)[0]
    chunks = 5000 / 2048
    assert took_s == pytest.approx(chunks * (0.004 - 0.010) + 5000 * 1e-4 + 1e-7 * 5000 * (2500 + 250), rel=1e-9)


def test_prompts_of_sessions_hold_up_those_beside_them_by_what_is_not_cached() -> None:
    plain, sessions = (node(running=7, AD_MEAN_PROMPT=3000.0, AD_MEAN_UNCACHED=x) for x in (3000.0, 100.0))
    assert expect(sessions, 0.0, 100.0, 0.0)[1] < expect(plain, 0.0, 100.0, 0.0)[1]
    behind = node(running=2, waiting=1, AD_PREFILL=5000.0)  # a cold prompt is waiting
    assert expect(behind, 0.0, 100.0, 0.0)[0] - expect(node(running=2, waiting=1), 0.0, 100.0, 0.0)[0] > 0.4


def test_what_was_sent_since_is_as_good_as_running() -> None:
    first_s, token_s = expect(node(running=2), 4.0, 100.0, 0.0)
    decode_s = 0.010 + 7e-4 + 1e-7 * 7 * 224
    assert token_s == pytest.approx(decode_s + 7 / 200 * 0.004, rel=1e-12)
    assert first_s == pytest.approx(late_s(400) + 0.014 + decode_s, rel=1e-12)  # it waits for their prefills alone
    assert expect(node(running=2), 6.0, 100.0, 0.0)[0] > 0.25  # one too many for the slots


def test_the_kv_cache_bounds_how_many_run_at_once() -> None:
    large, tight = node(running=4), node(running=4, AD_KV_CAPACITY=1120.0)  # which holds 5 at 224
    assert expect(tight, 0.0, 100.0, 0.0)[0] == expect(large, 0.0, 100.0, 0.0)[0]
    first_s, token_s = expect(tight, 1.0, 100.0, 0.0)
    decode_s = 0.010 + 5e-4 + 1e-7 * 1120
    assert token_s == pytest.approx(decode_s + 5 / 200 * 0.004, rel=1e-12)
    assert first_s == pytest.approx(200 * token_s / 5 + late_s(100) + 0.014 + decode_s, rel=1e-12)


def test_a_queue_shows_that_a_node_is_full_whatever_its_mean_context_says() -> None:
    context = 2800.0
    full = node(running=3, waiting=2, kv_tokens=19_900, AD_CONTEXT=context)
    token_s = expect(full, 0.0, 100.0, 0.0)[1]
    at_once = 20_000 / context
    assert 6 < at_once < 8  # so by slots and mean context all six would run
    decode_s = 0.010 + 6e-4 + 1e-7 * 6 * context
    expected_s = 3 * 200 * token_s / at_once + late_s(200) + 0.014 + decode_s
    assert expect(full, 0.0, 100.0, 0.0)[0] == pytest.approx(expected_s, rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    running=st.integers(0, 8),
    waiting=st.integers(0, 50),
    kv_tokens=st.floats(0, 20_000),
    sent=st.integers(0, 50),
    prompt=st.floats(1, 4000),
)
def test_more_work_never_means_sooner(running: int, waiting: int, kv_tokens: float, sent: int, prompt: float) -> None:
    now = expect(node(running, waiting, kv_tokens), float(sent), prompt, 0.0)
    eps = 1 + 1e-12
    for worse in (
        expect(node(running, waiting, kv_tokens), sent + 1.0, prompt, 0.0),
        expect(node(running, waiting + 1, kv_tokens), float(sent), prompt, 0.0),
        expect(node(running, waiting, kv_tokens), float(sent), prompt + 100, 0.0),
        expect(node(running, waiting, kv_tokens, AD_PER_SEQ_S=2e-4), float(sent), prompt, 0.0),
    ):
        assert worse[0] * eps >= now[0] and worse[1] * eps >= now[1]
    assert all(math.isfinite(x) and x > 0 for x in now)


def test_a_newcomer_slows_those_that_run() -> None:
    """Each has 0.62 * 200 = 124 tokens to go; the newcomer adds 0.1 ms and 224 tokens' reading to every iteration."""
    slower_s = 1e-4 + 224 * 1e-7
    assert slowdown(node(), 0.0, 60.0, 0.0) == 0.0
    assert slowdown(node(running=3), 0.0, 60.0, 0.0) == pytest.approx(3 * 124 * slower_s, rel=1e-12)
    assert slowdown(node(running=1, waiting=1), 2.0, 60.0, 0.0) == pytest.approx(4 * 124 * slower_s, rel=1e-12)
    assert slowdown(node(running=8, waiting=7), 9.0, 60.0, 0.0) == pytest.approx(
        8 * 124 * slower_s, rel=1e-12
    )  # of those at once
    long = slowdown(node(running=8, AD_CONTEXT=1000.0), 0.0, 60.0, 0.0)  # longer contexts are expected of what runs
    assert long == pytest.approx(8 * 124 * (1e-4 + 1000 * 1e-7), rel=1e-12)
    assert slowdown(node(running=8, AD_KV_CAPACITY=1120.0), 0.0, 60.0, 0.0) == pytest.approx(
        5 * 124 * slower_s, rel=1e-12
    )
    assert slowdown(node(running=3, AD_MEAN_OUTPUT=0.0), 0.0, 60.0, 0.0) == pytest.approx(
        3 * 0.62 * slower_s, rel=1e-12
    )


def test_a_prefill_holds_up_those_that_run() -> None:
    beside = slowdown(node(running=3), 0.0, 560.0, 500.0)
    assert slowdown(node(running=3), 0.0, 560.0, 0.0) == pytest.approx(beside + 3 * late_s(560), rel=1e-12)
    assert beside == slowdown(node(running=3), 0.0, 60.0, 0.0)  # 60 tokens hide under the weight read


def test_slowdown_is_what_expect_says_of_the_pace() -> None:
    """The delay to each is that of its remaining tokens at the pace with and without the newcomer."""
    for running in (1, 3, 6):
        decode_s = [expect(node(running=n), 0.0, 1.0, 0.0)[1] - (n + 1) / 200 * 0.004 for n in (running - 1, running)]
        assert slowdown(node(running), 0.0, 60.0, 0.0) == pytest.approx(
            running * 124 * (decode_s[1] - decode_s[0]), rel=1e-9
        )


def test_what_runs_is_expected_to_hold_at_least_what_is_there() -> None:
    assert context_of(100.0, 200.0, 0.0) == context_of(100.0, 200.0, 50.0) == 224.0
    assert context_of(100.0, 200.0, 700.0) == 800.0


def test_a_full_batch_is_as_many_as_slots_and_kv_cache_hold() -> None:
    assert full_batch(node(running=2)) == (8.0, pytest.approx(0.010 + 8e-4 + 1e-7 * 8 * 224, rel=1e-12))
    assert full_batch(node(AD_KV_CAPACITY=1120.0)) == (5.0, pytest.approx(0.010 + 5e-4 + 1e-7 * 1120, rel=1e-12))
    assert full_batch(node(AD_KV_CAPACITY=100.0))[0] == 1.0


def test_a_token_of_a_newcomer_delays_the_others() -> None:
    """By what its prefill takes beyond the iteration that it joins, and what it adds to every one while it decodes."""
    computed_s, read_s, output_s = marginal_delay(node())
    assert computed_s == pytest.approx((0.004 + 100 * 1e-4 - 0.010) / 100, rel=1e-12)
    assert read_s == pytest.approx(200 * 1e-7, rel=1e-12)  # by every token of a usual answer
    assert output_s == pytest.approx(1e-4 + 124 * 1e-7, rel=1e-12)
    assert 100 * read_s + 200 * output_s == pytest.approx(200 * (1e-4 + TYPICAL * 1e-7))
    assert marginal_delay(node(AD_MEAN_PROMPT=60.0))[0] == 0.0  # it hides under the weight read
    assert marginal_delay(node(AD_MEAN_PROMPT=0.0))[0] == 0.0


def chance(deadlines: list[float], tokens: float, median: float, sigma: float, longest: float = 1e9) -> float:
    """The chance if `tokens` tokens fit before the last deadline: 2 s elapsed, 3 s to the first, 0.05 s each."""
    token_s = (deadlines[-1] - 5.0) / tokens
    return chance_on_time(np.array(deadlines), 2.0, 3.0, token_s, median, sigma, longest)


@settings(max_examples=300, deadline=None)
@given(
    median=st.floats(10, 5000),
    sigma=st.floats(0.05, 2.5),
    z=st.floats(-5, 5),
)
def test_the_chance_is_that_of_the_lognormal(median: float, sigma: float, z: float) -> None:
    tokens = median * math.exp(sigma * z)
    if tokens >= 1.001:
        exact = stats.lognorm.cdf(tokens, s=sigma, scale=median)
        assert chance([100.0], tokens, median, sigma) == pytest.approx(exact, abs=0.02)


def test_the_chance_is_a_mean_over_deadlines() -> None:
    args = (2.0, 3.0, 0.05, 200.0, 0.6, 1e9)
    each = [chance_on_time(np.array([d]), *args) for d in (4.0, 12.0, 30.0)]
    assert each[0] == 0.0 and each[1] < 0.5 < each[2]
    assert chance_on_time(np.array([4.0, 12.0, 30.0]), *args) == pytest.approx(sum(each) / 3)


def test_an_output_is_never_longer_than_its_limit() -> None:
    assert chance([100.0], 500.0, 1000.0, 0.5) < 0.1
    assert chance([100.0], 500.0, 1000.0, 0.5, longest=500.0) == 1.0
    assert chance([100.0], 499.0, 1000.0, 0.5, longest=500.0) < 0.1


@pytest.mark.parametrize(("tokens", "expected"), [(1.001, 0.0), (3950.0, 0.0), (4050.0, 1.0)])
def test_equal_lengths_are_certain(tokens: float, expected: float) -> None:
    assert chance([100.0], tokens, 4000.0, 0.0) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    deadline_s=st.floats(1, 500),
    elapsed_s=st.floats(0, 500),
    first_s=st.floats(0.01, 100),
    token_s=st.floats(1e-3, 1),
    median=st.floats(1, 5000),
    sigma=st.floats(0, 2),
    step=st.floats(0.01, 50),
)
def test_more_time_never_lowers_the_chance(
    deadline_s: float, elapsed_s: float, first_s: float, token_s: float, median: float, sigma: float, step: float
) -> None:
    def at(deadline_s: float, elapsed_s: float, first_s: float, token_s: float) -> float:
        return chance_on_time(np.array([deadline_s]), elapsed_s, first_s, token_s, median, sigma, 8192.0)

    now = at(deadline_s, elapsed_s, first_s, token_s)
    assert 0.0 <= now <= 1.0
    assert at(deadline_s + step, elapsed_s, first_s, token_s) >= now - 1e-12
    assert at(deadline_s, elapsed_s + step, first_s, token_s) <= now + 1e-12
    assert at(deadline_s, elapsed_s, first_s + step, token_s) <= now + 1e-12
    assert at(deadline_s, elapsed_s, first_s, token_s + step) <= now + 1e-12
