"""Prices, payment, escrow and stake in the market."""

from typing import Any

import numpy as np
import pytest
from market_checker import Checker
from markets import finish, here, hold, lengths, market, run, times, to_candidates

from wwwserve.agents.decision import (
    CANDIDATES,
    FIRST_CANDIDATE,
    LOCAL,
    MAX_WAIT_S,
    Actions,
)
from wwwserve.agents.knowledge import (
    AD_PRICE,
    AD_TIME_S,
)
from wwwserve.agents.protocol import ESCROW, FREE, MICRO, STAKED
from wwwserve.agents.view import N_CANDIDATES
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.engine import kv_use
from wwwserve.envs.state import (
    DELEGATED,
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


def test_the_first_prices_and_terms_are_chosen_too() -> None:
    """Before its first decision nobody has an advert or takes others' work."""
    scenario = market({}, {}, economy={"pricing": "per_ktok", "price_bins": [0.5, 1.5, 4]})
    batch = MarketBatch([scenario])
    assert batch.active[0].tolist() == [True, True] and batch.now_s[0] == 0
    actions = batch.actions()
    actions.price[0] = 1, 2
    actions.terms[0, :, MAX_WAIT_S] = -1.0, 7.0
    batch.step(actions)
    assert batch.markets.adverts[0, :, AD_TIME_S].tolist() == [0, 0]
    assert batch.markets.adverts[0, :, AD_PRICE].tolist() == [1.5, 4.0]
    assert batch.markets.providers[0]["terms"][:, MAX_WAIT_S].tolist() == [-1.0, 7.0]


def test_the_executor_is_paid_the_price_that_the_origin_saw() -> None:
    """The executor raises its price at every advert; what was sent under the old one is paid at the old one."""
    scenario = market(
        {"traffic": times(4.5, 8.5), "lengths": lengths(100, 700)},
        {},
        economy={"pricing": "per_ktok", "price_bins": [0.5, 1.5, 4, 6], "stake_rule": "fixed"},
        slo={"thresholds_s": [1000]},
    )
    batch = MarketBatch([scenario])

    def decide(batch: MarketBatch, actions: Actions) -> None:
        to_candidates(batch, actions)
        actions.price[0, 1] = 1 if batch.now_s[0] < 6 else 3  # only what is chosen at an advert counts

    seen = {}
    for _ in run(batch, decide):
        q = batch.markets.requests[0]
        for r in range(2):
            if q["status"][r] == IN_ENGINE and r not in seen:
                seen[r] = float(batch.markets.adverts[0, 1, AD_PRICE])
                assert q["price"][r] == seen[r] * MICRO
                assert batch.markets.accounts[0, 0, ESCROW] == sum(q["price"][: r + 1]) * 700 // 1000
    assert seen == {0: 1.5, 1: 6.0}
    assert batch.markets.adverts[0, 1, AD_PRICE] == 6.0  # long before the first was done
    assert batch.markets.requests[0]["finish_s"][0] > 9
    paid = int((1.5 + 6.0) * 0.7 * MICRO)
    assert batch.markets.accounts[0, :, FREE].tolist() == [1000 * MICRO - paid, 1000 * MICRO + paid]


def test_a_price_holds_until_the_next_advert() -> None:
    bins = [0.5, 1, 2, 4]
    traffic = {"traffic": times(*np.arange(0.25, 30, 0.5)), "lengths": lengths(20, 10)}
    scenario = market(traffic, traffic, economy={"pricing": "per_ktok", "price_bins": bins})
    batch = MarketBatch([scenario])
    rng = np.random.default_rng(3)
    actions = batch.actions()
    actions.route[...] = LOCAL
    changes = 0
    while batch.now_s[0] < 30:
        actions.price[...] = rng.integers(0, 4, (1, 2))
        p = batch.markets.providers[0]
        due, before = p["advert_due"].tolist(), p["price"].tolist()
        batch.step(actions)
        for i in range(2):
            if due[i]:
                assert p["price"][i] == bins[actions.price[0, i]] == batch.markets.adverts[0, i, AD_PRICE]
                changes += p["price"][i] != before[i]
            else:
                assert p["price"][i] == before[i]
    assert changes > 5


def test_usage_prices_pay_what_was_delivered() -> None:
    """Escrow covers the longest answer; what is paid is the price of the tokens that came."""
    output = {"median": 300, "sigma": 0.5, "max": 900}
    scenario = market(
        {"traffic": times(1.5, 2.5, 3.5), "lengths": {"prompt": lengths(50, 1)["prompt"], "output": output}},
        {},
        economy={"pricing": "per_ktok", "price_bins": [2.5], "stake_rule": "fixed", "compute_cost_per_ktok": 0.4},
        slo={"thresholds_s": [1000]},
    )
    batch = MarketBatch([scenario])
    escrow = [int(batch.markets.accounts[0, 0, ESCROW]) for _ in run(batch, to_candidates)]
    tokens = batch.markets.requests[0]["output"]
    assert len(set(tokens)) == 3 and max(escrow) == 3 * 2_250_000
    paid = sum(2_500_000 * int(each) // 1000 for each in tokens)
    assert batch.markets.accounts[0, :, FREE].tolist() == [1000 * MICRO - paid, 1000 * MICRO + paid]
    profit = batch.markets.providers[0]["profit"]
    assert profit.tolist() == pytest.approx([3 - paid / MICRO, paid / MICRO - 0.4 * tokens.sum() / 1000])


def test_who_cannot_pay_has_no_candidates() -> None:
    """1.5 free credits: one request at a time is out; asking all the same is invalid."""
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
    """Every second of 16 peers is dear: an answer of 1000 tokens there costs 6, and 5 are to be had."""
    economy: dict[str, Any] = {"pricing": "per_ktok", "price_bins": [1, 6], "stake_rule": "fixed"}
    economy |= {"initial_credit": 5} if bound == "credit" else {"exposure": 5}
    traffic = {"traffic": times(*np.arange(0.5, 40)), "lengths": lengths(50, 1000)}
    batch = MarketBatch([market(traffic, *[{}] * 16, economy=economy)])

    def decide(batch: MarketBatch, actions: Actions) -> None:
        here(batch, actions)
        actions.price[0, 1::2] = 1

    finish(batch, decide)
    drawn = batch.markets.requests[0]["candidates"]
    assert set(drawn.ravel()) == set(range(2, 17, 2))
    assert (batch.markets.requests[0]["n_candidates"] == CANDIDATES).all()


def test_stake_follows_load() -> None:
    """4, 3, 2, 1 by quarters of 65 % KV use, 0 above or with a queue, 2 less with undecided requests; 2 a second."""
    arrivals_s = np.concatenate((np.linspace(2, 40, 30), np.linspace(60, 62, 30)))
    full = {"model": "qwen3-8b", "gpu": "rtx-4090", "lengths": lengths(500, 1500), "max_num_seqs": 24}
    tick = {"decision_interval_s": 0.5, "gossip_interval_s": 0.5}  # so that somebody is asked at every tick
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
        asked = batch.active[0, 0] and batch.markets.providers[0, 0]["head"] >= 0
        masked += int(asked and not batch.views.routes[0, 0, FIRST_CANDIDATE:].any())
    counts = batch.markets.providers[0, 0]["counts"]
    assert counts[[DELEGATED, RUN_LOCAL, PROBES_REFUSED]].tolist() == [4, 4, 0] and masked == 4
