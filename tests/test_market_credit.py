"""Prices, payment, escrow and stake in the market."""

from typing import Any

import numpy as np
import pytest
from market_checker import Checker
from markets import by_rule, finish, here, hold, lengths, market, randomly, run, times, to_candidates

from wwwserve.agents.classes import CLASS_VALUE
from wwwserve.agents.decision import (
    CANDIDATES,
    FIRST_CANDIDATE,
    LOCAL,
    MAX_WAIT_S,
    Actions,
)
from wwwserve.agents.hardware import PER_KV_TOKEN_S, PER_TOKEN_S, PREFILL_BASE_S
from wwwserve.agents.kernel import Floats
from wwwserve.agents.knowledge import (
    AD_PER_KV_TOKEN_S,
    AD_PER_TOKEN_S,
    AD_PREFILL_BASE_S,
    AD_TARIFF,
    AD_TIME_S,
)
from wwwserve.agents.protocol import (
    CACHED_INPUT,
    ESCROW,
    FREE,
    INPUT,
    MICRO,
    OUTPUT,
    PAYMENTS,
    PER_REQUEST,
    QUOTED,
    STAKED,
    TARIFF_SIZE,
)
from wwwserve.agents.tariff import MARKUPS, in_micro
from wwwserve.agents.view import N_CANDIDATES
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.engine import kv_use
from wwwserve.envs.state import (
    DELEGATED,
    DONE,
    HELD,
    IN_ENGINE,
    INVALID,
    PROBES_REFUSED,
    RUN_LOCAL,
)


def test_a_provider_starts_with_its_free_credit_and_its_stake() -> None:
    batch = MarketBatch([market({}, {}, economy={"initial_credit": 0.25, "initial_stake": 3})])
    assert batch.markets.accounts[0].tolist() == [[MICRO // 4, 3 * MICRO, 0]] * 2
    assert batch.markets.market["minted"][0] == 6_500_000


def test_the_first_markups_and_admission_policies_are_chosen_too() -> None:
    """Before its first decision nobody has an advert. An idle node costs its compute."""
    batch = MarketBatch([market({}, {}, economy={"payment": "lateness", "compute_cost_per_ktok": 0.2})])
    assert batch.active[0].tolist() == [True, True] and batch.now_s[0] == 0
    actions = batch.actions()
    actions.markup[0] = 2, 5
    actions.admission[0, :, MAX_WAIT_S] = -1.0, 7.0
    batch.step(actions)
    assert batch.markets.adverts[0, :, AD_TIME_S].tolist() == [0, 0]
    assert batch.markets.adverts[0, :, AD_TARIFF + OUTPUT].tolist() == pytest.approx([0.2 + 0.05, 0.2 + 0.2])
    inputs = batch.markets.adverts[0][:, [AD_TARIFF + INPUT, AD_TARIFF + CACHED_INPUT]]
    assert (inputs[:, 0] > 4 * inputs[:, 1] - 1e-9).all() and (inputs > 0).all()  # of both parts of a price
    assert batch.markets.providers[0]["admission"][:, MAX_WAIT_S].tolist() == [-1.0, 7.0]


def micro_tariff(advert: Floats) -> list[int]:
    return [in_micro(x) for x in advert[AD_TARIFF : AD_TARIFF + TARIFF_SIZE]]


def test_the_executor_is_paid_by_the_tariff_that_the_origin_saw() -> None:
    """The executor raises its markup at every advert; what was sent under the old one is paid by the old one."""
    scenario = market(
        {"traffic": times(4.5, 8.5), "lengths": lengths(100, 700)},
        {},
        economy={"payment": "quoted", "stake_rule": "fixed", "compute_cost_per_ktok": 1.0},
        slo={"thresholds_s": [1000]},
    )
    batch = MarketBatch([scenario])

    def decide(batch: MarketBatch, actions: Actions) -> None:
        to_candidates(batch, actions)
        actions.markup[0, 1] = 3 if batch.now_s[0] < 6 else 6  # only what is chosen at an advert counts

    seen: dict[int, float] = {}
    costs: list[int] = []
    for _ in run(batch, decide):
        q = batch.markets.requests[0]
        for r in range(2):
            if q["status"][r] == IN_ENGINE and r not in seen:
                advert = batch.markets.adverts[0, 1]
                seen[r] = float(advert[AD_TARIFF + OUTPUT])
                assert q["tariff"][r].tolist() == micro_tariff(advert)
                costs.append((100 * int(q["tariff"][r, INPUT]) + 700 * int(q["tariff"][r, OUTPUT])) // 1000)
                assert batch.markets.accounts[0, 0, ESCROW] == sum(costs)
    assert seen == {0: pytest.approx(1.1), 1: pytest.approx(1.3)}
    assert batch.markets.adverts[0, 1, AD_TARIFF + OUTPUT] == pytest.approx(1.3)  # long before the first was done
    assert batch.markets.requests[0]["finish_s"][0] > 9
    free = batch.markets.accounts[0, :, FREE].tolist()
    assert free == [1000 * MICRO - sum(costs), 1000 * MICRO + sum(costs)]


def test_a_tariff_holds_until_the_next_advert() -> None:
    traffic = {"traffic": times(*np.arange(0.25, 30, 0.5)), "lengths": lengths(20, 10)}
    batch = MarketBatch([market(traffic, traffic, economy={"payment": "lateness"})])
    rng = np.random.default_rng(3)
    actions = batch.actions()
    actions.route[...] = LOCAL
    changes = 0
    while batch.now_s[0] < 30:
        actions.markup[...] = rng.integers(0, MARKUPS.size, (1, 2))
        p = batch.markets.providers[0]
        due, before, tariff = p["advert_due"].tolist(), p["markup"].tolist(), p["tariff"].copy()
        batch.step(actions)
        for i in range(2):
            if due[i]:
                assert p["markup"][i] == MARKUPS[actions.markup[0, i]]
                at_cost = 1000 * p["cost"][i, OUTPUT]
                np.testing.assert_allclose(p["tariff"][i, OUTPUT], max(0.0, at_cost + p["markup"][i]), atol=1e-12)
                changes += p["markup"][i] != before[i]
            else:
                assert p["markup"][i] == before[i] and p["tariff"][i].tolist() == tariff[i].tolist()
    assert changes > 5


def test_what_is_paid_is_for_the_tokens_that_came() -> None:
    """Escrow covers the longest answer. Without the clause it does not matter when it came."""
    output = {"median": 300, "sigma": 0.5, "max": 900}
    scenario = market(
        {"traffic": times(1.5, 2.5, 3.5), "lengths": {"prompt": lengths(50, 1)["prompt"], "output": output}},
        {"misreport": {"promise": 0.2}},
        economy={"payment": "quoted", "stake_rule": "fixed", "compute_cost_per_ktok": 0.4},
        slo={"thresholds_s": [1000]},
    )
    batch = MarketBatch([scenario])
    escrow = [int(batch.markets.accounts[0, 0, ESCROW]) for _ in run(batch, to_candidates)]
    q = batch.markets.requests[0]
    tokens, tariff = q["output"].tolist(), q["tariff"][0].tolist()
    assert (q["tariff"] == tariff).all()
    price = {each: (50 * tariff[INPUT] + each * tariff[OUTPUT]) // 1000 for each in (*tokens, 900)}
    assert len(set(tokens)) == 3 and max(escrow) == 3 * price[900]
    paid = sum(price[each] for each in tokens)
    assert batch.markets.accounts[0, :, FREE].tolist() == [1000 * MICRO - paid, 1000 * MICRO + paid]
    p = batch.markets.providers[0]
    delivered = 3 * p["known"][0, 0, CLASS_VALUE]
    compute = 150 * p["compute"][1, INPUT] + sum(tokens) * p["compute"][1, OUTPUT]
    assert p["profit"].tolist() == pytest.approx([delivered - paid / MICRO, paid / MICRO - compute])


@pytest.mark.parametrize(("promise", "least", "most"), [(1.2, 1.0, 1.0), (0.8, 0.7, 0.8), (0.6, 0.3, 0.4), (0.4, 0, 0)])
def test_who_promises_too_much_is_paid_less_and_at_twice_the_promise_nothing(
    promise: float, least: float, most: float
) -> None:
    """An idle engine takes about what it expects to, so 1 over `promise` of what it promised."""
    scenario = market(
        {"traffic": times(1.5), "lengths": lengths(100, 700)},
        {"misreport": {"promise": promise}},
        economy={"payment": "lateness", "stake_rule": "fixed", "compute_cost_per_ktok": 1.0},
        slo={"thresholds_s": [1000]},
    )
    batch = MarketBatch([scenario])
    finish(batch, to_candidates)
    q = batch.markets.requests[0]
    tariff = q["tariff"][0].tolist()
    price = (100 * tariff[INPUT] + 700 * tariff[OUTPUT]) // 1000
    paid = int(batch.markets.accounts[0, 1, FREE]) - 1000 * MICRO
    assert paid == due(batch, 0) and least * price <= paid <= most * price
    assert batch.markets.accounts[0, 0].tolist() == [1000 * MICRO - paid, 2 * MICRO, 0]


def due(batch: MarketBatch, r: int) -> int:
    """What is due for request r, which a peer has answered, in integers and by the words of the clause."""
    m, q = batch.markets.market[0], batch.markets.requests[0][r]
    if m["payment"] == PER_REQUEST:
        return MICRO
    input_, _, output = (int(x) for x in q["tariff"])
    price = (input_ * int(q["prompt"]) + output * int(q["output"])) // 1000
    if m["payment"] == QUOTED:
        return price
    promised_s = q["promised_ttft_s"] + q["promised_tpot_s"] * (int(q["output"]) - 1)
    took_s = q["finish_s"] + 0.5 * m["rtt_s"] - q["taken_s"]  # the origin's clock begins and ends at the origin
    promised_ms, took_ms = (max(1, round(1000 * float(s))) for s in (promised_s, took_s))
    if took_ms <= promised_ms:
        return price
    return price * max(0, 2 * promised_ms - took_ms) // promised_ms


@pytest.mark.parametrize("payment", PAYMENTS)
def test_payments_are_what_the_clause_says_request_by_request(payment: str) -> None:
    """In a loaded market with churn and a liar; nothing else moves credits between providers without duels."""
    load = {"traffic": times(*np.arange(0.5, 40, 0.4)), "lengths": lengths(300, 300), "max_num_seqs": 6}
    scenario = market(
        load, {}, load | {"misreport": {"promise": 0.6}}, {"gpu": "a100-80g", "online_s": [[0, 20], [30, 45]]},
        economy={"payment": payment, "compute_cost_per_ktok": 0.5},
        slo={"thresholds_s": [10, 30]}, duration_s=45,
    )  # fmt: skip
    batch = MarketBatch([scenario], [3])
    checker = Checker(batch, 0)
    decide = randomly(np.random.default_rng(4), 0.0)
    for _ in run(batch, decide):
        checker.check()
    q = batch.markets.requests[0]
    paid = np.flatnonzero((q["status"] == DONE) & (q["executor"] != q["origin"]))
    wealth = np.full(4, 1002 * MICRO)
    late = 0
    for r in paid:
        amount = due(batch, r)
        late += payment != "per_request" and amount < due_in_full(q[r])
        wealth[q["origin"][r]] -= amount
        wealth[q["executor"][r]] += amount
    assert paid.size > 30
    assert (late > 5) == (payment == "lateness")
    assert batch.markets.accounts[0].sum(-1).tolist() == wealth.tolist()


def due_in_full(q: Any) -> int:
    return (int(q["tariff"][INPUT]) * int(q["prompt"]) + int(q["tariff"][OUTPUT]) * int(q["output"])) // 1000


@pytest.mark.parametrize("rtt_ms", [0.0, 50.0, 900.0])
def test_an_honest_executor_keeps_its_promise_exactly_however_far_away_it_is(rtt_ms: float) -> None:
    """The clock runs from when the origin hears of it to when the answer is there, as long as the engine takes. That is
    idle and takes as long for every token, so what is expected is what happens, but for the iteration in progress that
    a request has to wait for where there is one."""
    scenario = market({"traffic": times(1.5, 40.5), "lengths": lengths(100, 300)}, {}, rtt_ms=rtt_ms)
    batch = MarketBatch([scenario])
    profile = batch.markets.engines[0]["profile"]
    profile[:, [PER_KV_TOKEN_S, PREFILL_BASE_S, PER_TOKEN_S]] = 1e-13
    own = batch.markets.providers[0]["own"]
    own[:, [AD_PER_KV_TOKEN_S, AD_PREFILL_BASE_S, AD_PER_TOKEN_S]] = 1e-13
    finish(batch, to_candidates)
    q = batch.markets.requests[0]
    assert q["executor"].tolist() == [1, 1]
    took_s = q["answer_s"] - q["taken_s"]
    assert took_s.tolist() == pytest.approx((q["finish_s"] - q["submit_s"]).tolist(), abs=1e-9)
    promised_s = q["promised_ttft_s"] + q["promised_tpot_s"] * (q["output"] - 1)
    assert ((took_s + q["promised_tpot_s"]) / promised_s).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    first_s = q["first_answer_s"] - q["taken_s"]
    assert first_s.tolist() == pytest.approx((q["promised_ttft_s"] - q["promised_tpot_s"]).tolist(), abs=1e-4)


def test_the_papers_rule_pays_a_credit_a_request() -> None:
    """Whatever its length, when it came, and what the executor advertises."""
    load = {"traffic": times(*np.arange(0.5, 40, 0.3)), "lengths": lengths(2000, 400)}
    batch = MarketBatch([market(load, {}, {"gpu": "a100-80g"}, economy={"payment": "per_request"})], [2])
    finish(batch, by_rule("www_serve"))
    q = batch.markets.requests[0]
    served = np.bincount(q["executor"][(q["status"] == DONE) & (q["executor"] != 0)], minlength=3)
    assert served[1:].min() > 5
    wealth = batch.markets.accounts[0].sum(-1) - 1002 * MICRO
    assert wealth.tolist() == [-served.sum() * MICRO, served[1] * MICRO, served[2] * MICRO]


def test_who_cannot_pay_has_no_candidates() -> None:
    """1.5 free credits: one request at a time is out; to send another all the same is invalid."""
    scenario = market(
        {"traffic": times(0.5, 0.6), "lengths": lengths(50, 3000)},
        {},
        economy={"initial_credit": 1.5, "initial_stake": 0.5, "stake_rule": "fixed"},
        slo={"thresholds_s": [1000]},
    )
    batch = MarketBatch([scenario])
    actions = batch.actions()
    actions.route[...] = FIRST_CANDIDATE
    while batch.markets.market["next_arrival"][0] < 2:
        batch.step(actions)
    assert batch.now_s[0] == 0.6 and batch.views.routes[0, 0, : FIRST_CANDIDATE + 1].tolist() == [1, 1, 0]
    assert batch.views.request[0, 0, N_CANDIDATES] == 0
    batch.step(actions)
    assert batch.markets.requests[0]["status"].tolist() == [IN_ENGINE, HELD]
    assert batch.markets.providers[0, 0]["counts"][[DELEGATED, INVALID]].tolist() == [1, 1]


@pytest.mark.parametrize("bound", ["credit", "exposure"])
def test_a_peer_that_cannot_be_afforded_is_never_drawn(bound: str) -> None:
    """Every second of 16 peers is dear: an answer of 1000 tokens there costs over 1.8, and 1.5 are to be had."""
    economy: dict[str, Any] = {"payment": "quoted", "compute_cost_per_ktok": 1.0, "stake_rule": "fixed"}
    economy |= {"initial_credit": 1.5} if bound == "credit" else {"exposure": 1.5}
    traffic = {"traffic": times(*np.arange(0.5, 40)), "lengths": lengths(50, 1000)}
    batch = MarketBatch([market(traffic, *[{}] * 16, economy=economy)])

    def decide(batch: MarketBatch, actions: Actions) -> None:
        here(batch, actions)
        actions.markup[0, 1::2] = MARKUPS.size - 1

    finish(batch, decide)
    drawn = batch.markets.requests[0]["candidates"]
    assert set(drawn.ravel()) == set(range(2, 17, 2))
    assert (batch.markets.requests[0]["n_candidates"] == CANDIDATES).all()


def test_stake_follows_load() -> None:
    """4, 3, 2, 1 by quarters of 65 % KV use, 0 above or with a queue, 2 less with undecided requests; 2 a second."""
    arrivals_s = np.concatenate((np.linspace(2, 40, 30), np.linspace(60, 62, 30)))
    full = {"model": "qwen3-8b", "gpu": "rtx-4090", "lengths": lengths(500, 1500), "max_num_seqs": 24}
    tick = {"decision_interval_s": 0.5, "gossip_interval_s": 0.5}  # so that somebody decides at every tick
    scenario = market({"traffic": times(*arrivals_s), **full}, {}, slo={"thresholds_s": [20]}, **tick)
    batch = MarketBatch([scenario])

    def decide(batch: MarketBatch, actions: Actions) -> None:
        hold(batch, actions) if 8 < batch.now_s[0] < 12 else here(batch, actions)

    before = batch.markets.accounts[0, :, STAKED].copy()
    assert before.tolist() == [2 * MICRO, 2 * MICRO]
    targets = set()
    ticks = 0
    for _ in run(batch, decide):
        if batch.markets.market["ticks"][0] == ticks:
            assert batch.markets.accounts[0, :, STAKED].tolist() == before.tolist()
        else:
            ticks += 1
            assert batch.now_s[0] == 0.5 * ticks
            for i in range(2):
                e, p = batch.markets.engines[0, i], batch.markets.providers[0, i]
                share = float(kv_use(e)) / 0.65
                score = next((4 - k for k, most in enumerate((0.25, 0.5, 0.75, 1.0)) if share <= most), 0)
                score = 0 if e["waiting"] else score
                target = max(0, score - (2 if p["held"] else 0)) * MICRO
                change = int(np.clip(target - before[i], -MICRO, MICRO))  # 2 a second, half a second
                assert batch.markets.accounts[0, i, STAKED] == before[i] + change
                targets.add((i, target // MICRO))
            before = batch.markets.accounts[0, :, STAKED].copy()
    assert targets == {(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 4)}


def test_no_more_is_out_with_a_peer_than_its_bound() -> None:
    """Each candidate takes two requests of 1 credit; the others are masked, so the rest runs here."""
    scenario = market(
        {"traffic": times(*[1.5] * 8), "lengths": lengths(40, 400)}, {}, {}, economy={"exposure": 2.5}
    )  # fmt: skip
    batch = MarketBatch([scenario])
    checker = Checker(batch, 0)
    masked = 0
    for _ in run(batch, to_candidates):
        checker.check()
        decides = batch.active[0, 0] and batch.markets.providers[0, 0]["head"] >= 0
        masked += int(decides and not batch.views.routes[0, 0, FIRST_CANDIDATE:].any())
    counts = batch.markets.providers[0, 0]["counts"]
    assert counts[[DELEGATED, RUN_LOCAL, PROBES_REFUSED]].tolist() == [4, 4, 0] and masked == 4
