"""What a request costs its executor, what it pays, and what is due for it when it is late."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wwwserve.agents import classes, provider, tariff
from wwwserve.agents import knowledge as k
from wwwserve.agents.classes import (
    CLASS_LAST_DEADLINE_S,
    CLASS_MAX,
    CLASS_MEAN,
    CLASS_MEDIAN,
    CLASS_SIGMA,
    CLASS_SIZE,
    CLASS_VALUE,
    MAX_CLASSES,
    class_row,
)
from wwwserve.agents.decision import KEEP, WHAT_PAYS
from wwwserve.agents.estimate import LOGISTIC, expect, full_batch
from wwwserve.agents.generator import make_generators
from wwwserve.agents.hardware import profile
from wwwserve.agents.kernel import Floats, records
from wwwserve.agents.lengths import Lognormal
from wwwserve.agents.protocol import (
    CACHED_INPUT,
    INPUT,
    LATENESS,
    MICRO,
    OUTPUT,
    PER_REQUEST,
    QUOTED,
    TARIFF_SIZE,
    due_after,
    milliseconds,
)
from wwwserve.agents.tariff import MARKUPS, MAX_TARIFF, in_micro, on_time_by, payment_lost_per_s, share_paid

# The lateness clause.

PRICE, PROMISED_MS = 1_000_003, 4000


@pytest.mark.parametrize(
    ("took_ms", "due"),
    [
        (0, PRICE), (3999, PRICE), (4000, PRICE), (4001, 999_752), (5000, 750_002), (6000, 500_001), (7999, 250),
        (8000, 0), (8001, 0), (10**9, 0),
    ],
)  # fmt: skip
def test_what_is_due_falls_from_the_promise_to_twice_that(took_ms: int, due: int) -> None:
    assert due_after(LATENESS, PRICE, PROMISED_MS, took_ms) == due


@pytest.mark.parametrize("payment", [QUOTED, PER_REQUEST])
@pytest.mark.parametrize("took_ms", [1, 4000, 6000, 10**9])
def test_without_the_clause_all_is_due_however_late(payment: int, took_ms: int) -> None:
    assert due_after(payment, PRICE, PROMISED_MS, took_ms) == PRICE


@settings(max_examples=300, deadline=None)
@given(price=st.integers(0, 10**10), promised_ms=st.integers(1, 10**8), took_ms=st.integers(0, 10**9))
def test_what_is_due_is_exact_and_never_rises(price: int, promised_ms: int, took_ms: int) -> None:
    due = due_after(LATENESS, price, promised_ms, took_ms)
    exact = price if took_ms <= promised_ms else price * max(0, 2 * promised_ms - took_ms) // promised_ms
    assert due == exact and 0 <= due <= price
    assert due_after(LATENESS, price, promised_ms, took_ms + 1) <= due
    assert due_after(LATENESS, price, promised_ms + 1, took_ms) >= due


def test_durations_are_whole_milliseconds_of_at_least_one() -> None:
    seconds = 0.0, 0.0004, 0.0015001, 1.2346, math.inf
    assert [milliseconds(s) for s in seconds] == [1, 1, 2, 1235, 10**12]


def test_an_answer_is_due_by_what_it_was_promised_for_its_length() -> None:
    a, q = records(1, provider.AGREEMENT)[0], records(1, provider.REQUEST)[0]
    a["payment"] = LATENESS
    q["tariff"], q["prompt"] = (100_000, 25_000, 1_000_000), 500
    q["promised_ttft_s"], q["promised_tpot_s"] = 1.0, 0.01
    assert provider.promised_duration_s(q, 301) == pytest.approx(4.0)
    assert provider.price_for(a, q, 301) == 351_000
    assert [provider.due_for(a, q, 301, s) for s in (3.9, 4.0, 5.0, 8.0)] == [351_000, 351_000, 263_250, 0]
    assert provider.due_for(a, q, 701, 8.0) == 751_000  # of a longer answer more time was promised
    a["payment"] = PER_REQUEST
    assert provider.due_for(a, q, 301, 99.0) == MICRO


# What delay takes, by the distributions that the kernels assume.


def log_logistic_sf(x: float, scale: float, shape: float) -> float:
    """Chance to be more than x."""
    return 1.0 / (1.0 + (x / scale) ** shape)


@pytest.mark.parametrize("ratio", [0.4, 0.7, 0.95, 1.0, 1.1, 1.6, 2.7])
def test_the_chance_to_be_on_time_is_log_logistic(ratio: float) -> None:
    assert on_time_by(10.0 * ratio, 10.0) == pytest.approx(1.0 - log_logistic_sf(ratio, 1.0, 8.0), rel=1e-12)


def test_the_chance_to_be_on_time_has_no_tails() -> None:
    assert [on_time_by(s, 10.0) for s in (-1.0, 0.0, 3.33, 30.0, 99.0)] == [0.0, 0.0, 0.0, 1.0, 1.0]


RATIOS = (0.3, 0.6, 0.85, 1.0, 1.3, 1.7, 2.2, 4.0)  # expected over promised durations


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_share_that_is_paid_is_that_of_the_clause(ratio: float) -> None:
    """By a sum over quantiles of the duration, of each of which the clause itself says what is due."""
    promised_s, whole = 20.0, 10**9
    u = (np.arange(5000) + 0.5) / 5000
    took_s = ratio * promised_s * (u / (1 - u)) ** (1 / 8)
    exact = np.mean([due_after(LATENESS, whole, milliseconds(promised_s), milliseconds(s)) for s in took_s]) / whole
    assert share_paid(promised_s, ratio * promised_s) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_payment_that_a_second_takes_is_the_slope_of_the_share_paid(ratio: float) -> None:
    """If the second comes on top of what is expected, whatever the error of the expectation: a draw of durations."""
    promised_s, step_s = 20.0, 1e-3
    u = (np.arange(200_000) + 0.5) / 200_000
    took_s = ratio * promised_s * (u / (1 - u)) ** (1 / 8)

    def share(took_s: Floats) -> float:
        return float(np.clip(2.0 - took_s / promised_s, 0.0, 1.0).mean())

    slope = (share(took_s) - share(took_s + step_s)) / step_s
    assert payment_lost_per_s(3.0, promised_s, ratio * promised_s) == pytest.approx(3.0 * slope, abs=3.0 * 2e-4)


KNOWN = class_row(Lognormal(400.0, 0.75, 2048), 2.0, 60.0, 0.0)


def value_by_deadlines(known: Floats, deadlines: Floats, generated: float, elapsed_s: float, token_s: float) -> float:
    """What is to be expected of a running request of which `generated` tokens are out."""
    shape = LOGISTIC / known[CLASS_SIGMA]
    alive = log_logistic_sf(max(generated, 1e-9), known[CLASS_MEDIAN], shape)
    chances = []
    for deadline_s in deadlines:
        tokens = generated + (deadline_s - elapsed_s) / token_s
        longer = log_logistic_sf(max(tokens, generated), known[CLASS_MEDIAN], shape)
        chances.append(1.0 if tokens >= known[CLASS_MAX] else 1.0 - longer / alive)
    return float(known[CLASS_VALUE] * np.mean(chances))


@pytest.mark.parametrize("generated", [0.0, 90.0, 400.0, 1200.0])
@pytest.mark.parametrize("token_s", [0.02, 0.045])
def test_the_value_that_a_second_takes_is_the_slope_of_the_chance_given_what_is_out(
    generated: float, token_s: float
) -> None:
    deadlines = np.array([10.0, 25.0, 60.0])
    elapsed_s, step_s = 4.0 + generated * token_s, 1e-4
    before, after = (value_by_deadlines(KNOWN, deadlines, generated, elapsed_s + s, token_s) for s in (-step_s, step_s))
    slope = (before - after) / (2 * step_s)
    assert tariff.value_lost_per_s(KNOWN, deadlines, generated, elapsed_s, token_s) == pytest.approx(slope, rel=1e-5)


def test_nothing_is_lost_where_nothing_can_be() -> None:
    late = tariff.value_lost_per_s(KNOWN, np.array([10.0, 20.0]), 50.0, 20.0, 0.02)
    sure = tariff.value_lost_per_s(KNOWN, np.array([1000.0]), 50.0, 2.0, 0.02)  # the longest is out long before
    assert (late, sure) == (0.0, 0.0)


def test_an_answer_is_expected_to_go_on() -> None:
    assert tariff.expected_output(400.0, 0.0, 2048.0) == 400.0
    assert tariff.expected_output(400.0, 800.0, 2048.0) == 1000.0
    assert tariff.expected_output(400.0, 2000.0, 2048.0) == 2048.0
    assert tariff.expected_output(400.0, 3000.0, 2048.0) == 3001.0  # whatever its limit was taken for


# Tariffs.


@pytest.mark.parametrize("markup", MARKUPS)
def test_a_tariff_is_the_cost_and_a_markup_in_proportion_to_what_users_pay(markup: float) -> None:
    written = np.zeros(TARIFF_SIZE)
    tariff.write_tariff(written, np.array([2e-5, 5e-6, 4e-4]), 1.5, markup)
    by_hand = [0.03 + 0.25 * markup, 0.0075 + 0.025 * markup, 0.6 + markup]
    np.testing.assert_allclose(written, np.maximum(by_hand, 0.0), rtol=1e-12)
    worth = classes.worth_of(100.0, 200.0, 400.0)
    assert worth == pytest.approx(400 + 0.25 * 100 + 0.025 * 200)
    if markup > 0.0:
        beyond = tariff.price_by(written, 300.0, 200.0, 400.0) - 1.5 * tariff.cost_of(
            np.array([2e-5, 5e-6, 4e-4]), 300.0, 200.0, 400.0
        )
        assert beyond == pytest.approx(markup * worth / 1000.0)


def test_a_markup_below_cost_makes_nothing_cost_less_than_nothing() -> None:
    written = np.zeros(TARIFF_SIZE)
    tariff.write_tariff(written, np.zeros(TARIFF_SIZE), 1.0, MARKUPS[0])
    assert written.tolist() == [0.0, 0.0, 0.0]


def test_a_tariff_is_capped() -> None:
    written = np.zeros(TARIFF_SIZE)
    tariff.write_tariff(written, np.array([1.5, 0.1, np.inf]), 8.0, 0.0)
    assert written.tolist() == [MAX_TARIFF, 800.0, MAX_TARIFF]
    assert in_micro(written[OUTPUT]) == 10**9


@pytest.mark.parametrize(
    ("credits", "micro"), [(0.0, 0), (4.9e-7, 0), (1.0, 10**6), (0.1, 10**5), (0.3333337, 333_334)]
)
def test_credits_are_rounded_to_micro_credits(credits: float, micro: int) -> None:
    assert in_micro(credits) == micro


def test_a_price_by_credits_is_that_by_micro_credits() -> None:
    written = np.zeros(TARIFF_SIZE)
    tariff.write_tariff(written, np.array([2e-5, 4e-6, 4e-4]), 1.5, 0.0)
    assert tariff.price_by(written, 700.0, 100.0, 300.0) == pytest.approx(
        tariff.cost_of(np.array([3e-5, 6e-6, 6e-4]), 700.0, 100.0, 300.0)
    )


def node(gpu: str = "rtx-4090", running: float = 0.0) -> Floats:
    own = np.zeros(k.ADVERT_SIZE)
    card = profile(gpu, "qwen3-8b", 64)
    k.write_profile(own, card.row(), 1.0)
    own[k.AD_MEAN_PROMPT], own[k.AD_MEAN_OUTPUT], own[k.AD_CONTEXT] = 200.0, 400.0, 450.0
    own[k.AD_UNSHARED] = 1.0
    k.on_scrape(own, 0.0, running, 0.0, 450.0 * running, 0.0, np.inf)
    return own


def test_compute_of_input_is_cheaper_than_of_output() -> None:
    compute = np.zeros(TARIFF_SIZE)
    tariff.write_compute(compute, node(), 0.09)
    assert 1000 * compute[OUTPUT] == pytest.approx(0.09)
    at_once, iteration_s = full_batch(node())
    assert compute[INPUT] == pytest.approx(compute[OUTPUT] * node()[k.AD_PER_TOKEN_S] * at_once / iteration_s)
    assert 0.0 < compute[CACHED_INPUT] < compute[INPUT] < 0.5 * compute[OUTPUT]


# A provider's marginal cost.

DEADLINES = ((8.0, 12.0, 16.0, 20.0), (100.0, 200.0, 400.0, 600.0))


class Host:
    """A provider with two classes of own users, and what runs on its engine."""

    def __init__(self, payment: int = LATENESS) -> None:
        self.p, self.a = records(1, provider.PROVIDER), records(1, provider.AGREEMENT)
        provider.reset_provider(self.p)
        self.p["own"] = node()
        self.p["generator"] = make_generators(1)
        self.p["known"][0, 0] = class_row(Lognormal(200.0, 0.6, 1024), 3.0, 20.0, 0.0)
        self.p["known"][0, 1] = class_row(Lognormal(900.0, 0.7, 4096), 1.0, 600.0, 0.0)
        self.a["tick_s"], self.a["gossip_s"], self.a["rtt_s"] = 1.0, 3.0, 0.05
        self.a["n_classes"], self.a["n_deadlines"], self.a["payment"] = 2, 4, payment
        self.a["deadlines"][0, :2, :4] = DEADLINES
        tariff.write_compute(self.p["compute"][0], self.p["own"][0], 0.09)

    def appraise(self, *running: tuple[bool, dict[str, Any], float], now_s: float = 10.0) -> Floats:
        """The marginal cost [TARIFF_SIZE] with requests that run there: whether an own user's, record, tokens."""
        p, a = self.p[0], self.a[0]
        k.on_scrape(p["own"], now_s, float(len(running)), 0.0, 450.0 * len(running), 0.0, np.inf)
        found = provider.begin_appraisal(p, a)
        for own, fields, generated in running:
            request = records(1, provider.REQUEST)
            for name, value in fields.items():
                request[name] = value
            found = provider.count_running(p, a, request[0], own, generated, now_s, found)
        provider.end_appraisal(p, a, found, now_s)
        return np.array(p["cost"])


CHAT = (True, {"klass": 0, "prompt": 200, "arrival_s": 6.0, "longest": 1024}, 100.0)
BATCH = (True, {"klass": 1, "prompt": 200, "arrival_s": 6.0, "longest": 4096}, 100.0)
PEERS = {
    "prompt": 200, "longest": 1024, "taken_s": 6.0, "tariff": (10_000, 2500, 300_000), "promised_ttft_s": 0.2,
    "promised_tpot_s": 0.03,
}  # fmt: skip
REMOTE = (False, PEERS, 100.0)


def test_an_idle_node_to_which_nobody_comes_costs_its_compute_alone() -> None:
    host = Host()
    np.testing.assert_array_equal(host.appraise(), host.p["compute"][0])
    assert host.p["future"][0] == 0.0 and host.p["cost_s"][0] == 10.0


def test_cost_rises_with_those_who_are_yet_to_come() -> None:
    host = Host()
    costs = []
    for per_s in (0.0, 0.3, 1.0, 2.0):
        host.p["placed_rate"][0, 0] = per_s
        costs.append(host.appraise())
    assert (np.diff([cost[OUTPUT] for cost in costs]) > 0).all()
    assert {cost[INPUT] for cost in costs} == {costs[0][INPUT]}
    assert costs[-1][OUTPUT] - host.p["compute"][0, OUTPUT] == pytest.approx(host.p["future"][0] / 400.0)


def test_those_who_come_are_all_that_run_there() -> None:
    """Own users' requests that run elsewhere are in nobody's way here, and peers' that run here are."""
    host = Host()
    host.p["arrival_rate"][0, :2] = 5.0
    np.testing.assert_array_equal(host.appraise(), host.p["compute"][0])
    host.p["admission"] = WHAT_PAYS
    for longest in (4096, *[1024] * 60):
        assert provider.consider(host.p[0], host.a[0], 200.0, 0.0, longest, np.array([MICRO, MICRO, MICRO]))[0]
    each = 1 / k.RATE_WINDOW_S
    assert host.p["placed_rate"][0].tolist() == pytest.approx([60 * each, each, *[0.0] * (MAX_CLASSES - 2)])
    provider.tick(host.p[0], 6.0)
    assert host.p["placed_rate"][0, 1] == pytest.approx(0.9 * each)
    host.appraise()
    assert host.p["future"][0] > 0.0


def test_cached_input_costs_its_compute_and_that_it_is_read_for_every_token() -> None:
    """What is not computed does not hold up others at once; each token of a usual answer reads it."""
    host = Host()
    own, compute = host.p["own"][0], host.p["compute"][0]
    for runs in ([CHAT], [CHAT] * 8):
        cost = host.appraise(*runs)
        delay = cost - compute
        read_s = 400.0 * own[k.AD_PER_KV_TOKEN_S]
        output_s = own[k.AD_PER_SEQ_S] + 0.62 * read_s  # of which a token of output is read for the rest of it
        assert delay[CACHED_INPUT] / delay[OUTPUT] == pytest.approx(read_s / output_s)
        assert 0.0 < delay[CACHED_INPUT] < delay[INPUT]


def test_what_running_requests_share_is_in_the_cache_once() -> None:
    host = Host()
    host.appraise(CHAT, CHAT)  # 300 tokens each, and 900 in the cache
    assert host.p["own"][0, k.AD_UNSHARED] == 1.0
    apart, _ = full_batch(host.p["own"][0])
    own, a = host.p["own"][0], host.a[0]
    for tokens, share in ((150.0, 0.25), (1e-9, provider.LEAST_UNSHARED)):
        host.appraise(CHAT, CHAT)
        k.on_scrape(own, 10.0, 2.0, 0.0, tokens, 0.0, np.inf)
        found = provider.Appraisal(2.0, 900.0, 600.0, 0.0, 0.0, 0.02)
        provider.end_appraisal(host.p[0], a, found, 10.0)
        assert own[k.AD_UNSHARED] == pytest.approx(share)
    host.appraise()
    assert own[k.AD_UNSHARED] == provider.LEAST_UNSHARED  # nothing runs: as before
    own[k.AD_UNSHARED], own[k.AD_MAX_NUM_SEQS] = 0.5, 1e6
    shared, _ = full_batch(own)
    own[k.AD_UNSHARED] = 1.0
    apart, _ = full_batch(own)
    assert shared == pytest.approx(2 * apart)


@pytest.mark.parametrize("runs", [CHAT, REMOTE])
def test_cost_rises_with_what_runs_and_has_something_to_lose(runs: tuple[bool, dict[str, Any], float]) -> None:
    costs = [Host().appraise(*[runs] * count) for count in (0, 1, 4, 16)]
    for column in range(TARIFF_SIZE):
        assert (np.diff([cost[column] for cost in costs]) > 0).all()


def test_cost_rises_with_the_value_at_stake() -> None:
    costs = []
    for multiplier in (1.0, 3.0, 9.0):
        host = Host()
        host.p["known"][0, 0] = class_row(Lognormal(200.0, 0.6, 1024), multiplier, 20.0, 0.0)
        costs.append(host.appraise(CHAT, CHAT) - host.p["compute"][0])
    np.testing.assert_allclose(costs[1], 3 * costs[0], rtol=1e-9)
    np.testing.assert_allclose(costs[2], 9 * costs[0], rtol=1e-9)


def test_what_has_time_enough_costs_little() -> None:
    """Of a batch with minutes to go hardly anything is at stake, of what is late already nothing."""
    host = Host()
    chat, batch, late = (
        host.appraise(runs)[OUTPUT] - host.p["compute"][0, OUTPUT]
        for runs in (CHAT, BATCH, (True, CHAT[1] | {"arrival_s": -20.0}, 100.0))
    )
    assert 0.0 <= batch < 0.1 * chat and late == 0.0


@pytest.mark.parametrize("payment", [QUOTED, PER_REQUEST])
def test_peers_work_costs_nothing_to_delay_without_the_clause(payment: int) -> None:
    host = Host(payment)
    np.testing.assert_array_equal(host.appraise(REMOTE, REMOTE), host.p["compute"][0])


def test_peers_work_costs_by_what_the_clause_takes() -> None:
    """100 of its expected tokens are out after 4 s; the others come at the engine's pace."""
    host = Host()
    cost = host.appraise(REMOTE)
    _, token_s = expect(node(running=1), 0.0, 200.0, 0.0)
    mean = host.p["known"][0, 0, CLASS_MEAN]
    price = (200 * 10_000 + mean * 300_000) / 1000 / MICRO
    lost = payment_lost_per_s(price, 0.2 + 0.03 * (mean - 1), 4.0 + (mean - 100) * token_s)
    delay_s = host.p["own"][0, k.AD_PER_SEQ_S] + host.p["own"][0, k.AD_PER_KV_TOKEN_S] * 0.62 * 400.0
    share = (mean - 100) / 400  # of a usual stay it sees
    assert cost[OUTPUT] - host.p["compute"][0, OUTPUT] == pytest.approx(
        tariff.FOLLOWING * lost * share * delay_s, rel=1e-9
    )


def test_the_expected_context_is_usual_until_something_runs() -> None:
    host = Host()
    host.p["arrival_rate"][0, :2] = 0.3, 0.1
    usual = provider.usual_context(host.p[0], host.a[0])
    means = host.p["known"][0, :2, CLASS_MEAN]
    each = 200 + 0.62 * means
    weights = np.array([0.3, 0.1]) * means  # who generates longer is there for longer
    assert usual == pytest.approx((weights * each).sum() / weights.sum(), rel=1e-4)
    host.appraise()
    assert host.p["own"][0, k.AD_CONTEXT] == usual
    long = (True, {"klass": 1, "prompt": 3000, "arrival_s": 6.0, "longest": 4096}, 2000.0)
    host.appraise(*[long] * 12)
    assert host.p["own"][0, k.AD_CONTEXT] == pytest.approx((12 * 5000 + 4 * usual) / 16)


def test_the_usual_context_without_arrivals_is_that_of_all_classes() -> None:
    host = Host()
    means = host.p["known"][0, :2, CLASS_MEAN]
    each = 200 + 0.62 * means
    assert provider.usual_context(host.p[0], host.a[0]) == pytest.approx((means * each).sum() / means.sum())


@pytest.mark.parametrize(("longest", "like"), [(1024, 0), (4096, 1), (1, 0), (10**6, 1), (2559, 0), (2561, 1)])
def test_a_peers_request_is_like_the_own_class_of_the_nearest_length(longest: int, like: int) -> None:
    host = Host()
    assert provider.class_like(host.p[0], host.a[0], longest) == like


def test_a_class_beyond_those_in_use_is_like_none() -> None:
    host = Host()
    host.p["known"][0, 2] = np.zeros(CLASS_SIZE)
    host.p["known"][0, 2, CLASS_MAX] = 512
    assert provider.class_like(host.p[0], host.a[0], 512) == 0


def consider(host: Host, at: float, longest: int = 1024) -> bool:
    """Whether it takes a request at `at` times its own cost, credits by the tariff."""
    written = np.zeros(TARIFF_SIZE)
    tariff.write_tariff(written, host.p["cost"][0], at, 0.0)
    micro = np.array([in_micro(x) for x in written])
    taken, _, _ = provider.consider(host.p[0], host.a[0], 300.0, 0.0, longest, micro)
    return bool(taken)


@pytest.mark.parametrize("markup", [0.0, 0.05, 0.8])
def test_what_pays_is_taken_and_what_does_not_is_refused(markup: float) -> None:
    host = Host()
    host.appraise(CHAT, CHAT)
    host.p["markup"] = markup
    assert [consider(host, at) for at in (0.5, 0.95, 1.05, 8.0)] == [False, False, True, True]
    host.p["admission"] = [np.inf, np.inf, 1.0, 0.0, 0.0, 0.0]
    assert consider(host, 0.1)  # who does not look at prices
    host.p["admission"] = [np.inf, np.inf, 1.0, 0.0, 0.5, 0.0]
    assert [consider(host, at) for at in (0.48, 0.52, 1.05)] == [False, True, True]  # who is content with half


def test_who_sells_below_cost_takes_what_it_offered_to_take() -> None:
    host = Host()
    host.appraise(CHAT, CHAT)
    host.p["markup"] = MARKUPS[0]
    assert not consider(host, 0.05)
    offer = np.zeros(TARIFF_SIZE)
    tariff.write_tariff(offer, host.p["cost"][0], 1.0, MARKUPS[0])
    for less, taken in ((0.02, False), (0.0, True)):
        micro = np.array([in_micro(max(0.0, x - less)) for x in offer])
        assert provider.consider(host.p[0], host.a[0], 300.0, 0.0, 1000, micro)[0] == taken


def test_what_pays_its_cost_exactly_is_taken_however_the_tariff_is_rounded() -> None:
    host = Host()
    for per_ktok in np.linspace(0.01, 0.5, 101):
        tariff.write_compute(host.p["compute"][0], host.p["own"][0], float(per_ktok))
        host.appraise()
        assert consider(host, 1.0)
        assert not consider(host, 0.999)


def test_an_offer_by_an_old_tariff_pays_if_the_cost_has_not_risen_beyond_it() -> None:
    host = Host()
    host.appraise(CHAT)
    old = np.zeros(TARIFF_SIZE)
    tariff.write_tariff(old, host.p["cost"][0], 1.25, 0.0)
    micro = np.array([in_micro(x) for x in old])
    assert provider.consider(host.p[0], host.a[0], 300.0, 0.0, 1024, micro)[0]
    host.appraise(*[CHAT] * 40)
    assert not provider.consider(host.p[0], host.a[0], 300.0, 0.0, 1024, micro)[0]


def test_a_credit_a_request_pays_up_to_a_credit_of_cost() -> None:
    host = Host(PER_REQUEST)
    nothing = np.zeros(TARIFF_SIZE, np.int64)
    taken = []
    for output in (0.9, 1.1):
        host.p["cost"][0] = 0.0, 0.0, output / host.p["known"][0, 0, CLASS_MEAN]
        taken.append(bool(provider.consider(host.p[0], host.a[0], 300.0, 0.0, 1024, nothing)[0]))
    assert taken == [True, False]


def test_what_is_taken_counts_as_sold_and_promises_what_is_expected() -> None:
    host = Host()
    host.appraise()
    host.p["admission"] = WHAT_PAYS
    free = np.zeros(TARIFF_SIZE, np.int64)
    taken, first_s, token_s = provider.consider(host.p[0], host.a[0], 300.0, 0.0, 1024, free)
    assert not taken and host.p["sold"][0] == 0.0
    assert (first_s, token_s) == expect(host.p["own"][0], 0.0, 300.0, 0.0)
    assert consider(host, 2.0) and host.p["sold"][0] == pytest.approx(1 / k.RATE_WINDOW_S)


def test_costs_are_worked_out_once_a_tick() -> None:
    host = Host()
    assert provider.is_cost_old(host.p[0], host.a[0], 0.0)
    host.appraise(now_s=10.0)
    assert [provider.is_cost_old(host.p[0], host.a[0], s) for s in (10.0, 10.9, 11.0, 12.0)] == [
        False,
        False,
        True,
        True,
    ]


def test_the_lowest_price_of_those_heard_lately() -> None:
    host = Host()
    adverts = np.array([node() for _ in range(4)])
    adverts[:, k.AD_TIME_S] = 100.0, 99.0, 100.0, 50.0
    adverts[:, k.AD_TARIFF + OUTPUT] = 0.1, 2.0, 3.0, 0.2
    peers = k.Peers(adverts, k.make_peer_stats(4), np.zeros(4, np.int64))
    provider.look_at_tariffs(host.p[0], host.a[0], peers, 101.0, 0)  # the last is silent, the first is itself
    assert host.p["peer_price"][0] == pytest.approx(2.0 * 0.4)
    provider.look_at_tariffs(host.p[0], host.a[0], peers, 500.0, 0)
    assert host.p["peer_price"][0] == np.inf


def test_a_markup_holds_from_the_advert_that_it_was_chosen_for() -> None:
    host = Host()
    host.appraise(CHAT)
    advert = np.zeros(k.ADVERT_SIZE)
    provider.set_admission(host.p[0], WHAT_PAYS, 5)
    assert host.p["markup"][0] == 0.0  # no advert is due
    host.p["advert_due"] = 1
    for index, markup in ((5, 0.2), (-4, -0.1), (99, 0.8)):
        host.p["advert_due"] = 1
        provider.set_admission(host.p[0], WHAT_PAYS, index)
        provider.advertise(host.p[0], 2 * MICRO, 12.0, advert)
        assert host.p["markup"][0] == markup and host.p["advert_due"][0] == 0
        np.testing.assert_allclose(advert[k.AD_TARIFF + OUTPUT], max(0.0, 1000 * host.p["cost"][0, OUTPUT] + markup))
        np.testing.assert_array_equal(advert[k.AD_TARIFF : k.AD_TARIFF + TARIFF_SIZE], host.p["tariff"][0])
        assert advert[k.AD_CONTEXT] == host.p["own"][0, k.AD_CONTEXT] and advert[k.AD_TIME_S] == 12.0


@pytest.mark.parametrize(("keep", "found"), [(0.0, 0.75), (1.0, 0.0), (1.0, 0.75), (2.0, 0.5)])
def test_others_pay_more_for_room_in_a_cache_in_which_prompts_are_found(keep: float, found: float) -> None:
    host = Host()
    host.p["own"][0, [k.AD_MEAN_PROMPT, k.AD_MEAN_UNCACHED]] = 800.0, 800.0 * (1.0 - found)
    host.appraise(CHAT)
    cost = host.p["cost"][0].copy()
    host.p["advert_due"] = 1
    admission = WHAT_PAYS.copy()
    admission[KEEP] = keep
    provider.set_admission(host.p[0], admission, 2)
    provider.advertise(host.p[0], MICRO, 12.0, np.zeros(k.ADVERT_SIZE))
    expected = 1000 * (1.0 + keep * found) * cost
    expected[[INPUT, CACHED_INPUT, OUTPUT]] += 0.05 * np.array([0.25, 0.025, 1.0])
    np.testing.assert_allclose(host.p["tariff"][0], expected)
    np.testing.assert_array_equal(host.p["cost"][0], cost)  # what its own users are run by


def test_a_class_says_what_its_answers_are_worth() -> None:
    """A credit is what a user pays for 1000 tokens of output; input is a quarter of that, cached a tenth of input."""
    row = class_row(Lognormal(400.0, 0.0, 2048), 2.5, 60.0, 0.0)
    assert row[[CLASS_MEAN, CLASS_VALUE, CLASS_LAST_DEADLINE_S]].tolist() == pytest.approx([400.0, 1.0, 60.0])
    assert class_row(Lognormal(400.0, 0.0, 2048), 2.0, 60.0, 1600.0)[CLASS_VALUE] == pytest.approx(1.6)
    assert class_row(Lognormal(400.0, 0.0, 2048), 2.0, 60.0, 1600.0, 800.0)[CLASS_VALUE] == pytest.approx(1.24)


def test_what_was_just_taken_makes_the_next_cost_anew() -> None:
    host = Host()
    host.appraise(now_s=10.0)
    assert not consider(host, 0.5) and not provider.is_cost_old(host.p[0], host.a[0], 10.0)
    assert consider(host, 2.0) and provider.is_cost_old(host.p[0], host.a[0], 10.0)
