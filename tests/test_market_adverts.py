"""What providers say of themselves, and when others hear it."""

import numpy as np
import pytest
from markets import finish, here, lengths, market, run, times, to_candidates

from wwwserve.agents.decision import (
    FIRST_CANDIDATE,
    HOLD,
    LOCAL,
    Actions,
)
from wwwserve.agents.knowledge import (
    AD_KV_TOKENS,
    AD_PER_KV_TOKEN_S,
    AD_RUNNING,
    AD_STAKE,
    AD_TIME_S,
    AD_WAITING,
    AD_WEIGHT_S,
    NO_TIME,
    PROMISED,
    STREAMED,
)
from wwwserve.agents.view import AGE_S
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.engine import tokens_out
from wwwserve.envs.state import (
    IN_ENGINE,
)


def test_a_liar_advertises_less_load_and_more_speed_for_as_long_as_it_lies() -> None:
    lie = {"load": 0.25, "speed": 2.0, "from_s": 20, "until_s": 40}
    busy = {"traffic": times(*(0.1 * k for k in range(1, 12))), "lengths": lengths(200, 6000), "max_num_seqs": 8}
    scenario = market({**busy, "misreport": lie}, {**busy, "gpu": "a100-80g"}, {}, slo={"thresholds_s": [1000]})
    batch = MarketBatch([scenario])
    seen = set()
    for _ in run(batch, here):
        now_s = float(batch.now_s[0])
        if not 5 <= now_s < 55:
            continue
        for i in range(3):
            advert, own = batch.markets.adverts[0, i], batch.markets.providers[0, i]["own"]
            lies = i == 0 and 20 <= advert[AD_TIME_S] < 40
            load, speed = (0.25, 2.0) if lies else (1.0, 1.0)
            assert advert[[AD_RUNNING, AD_WAITING]].tolist() == (load * own[[AD_RUNNING, AD_WAITING]]).tolist()
            times_of = slice(AD_WEIGHT_S, AD_PER_KV_TOKEN_S + 1)
            assert advert[times_of].tolist() == (own[times_of] / speed).tolist()
            assert advert[AD_STAKE] >= 0 and own[AD_TIME_S] == now_s
            if advert[AD_TIME_S] == now_s:  # KV use grows between adverts
                assert advert[AD_KV_TOKENS] == load * own[AD_KV_TOKENS]
            seen.add((i, lies, own[AD_RUNNING], own[AD_WAITING]))
    assert seen == {(0, False, 8, 3), (0, True, 8, 3), (1, False, 8, 3), (2, False, 0, 0)}


def test_a_liar_promises_what_it_advertises_or_less() -> None:
    lie = {"load": 0.5, "speed": 2.0, "promise": 0.7}
    base = {"traffic": times(1.5), "lengths": lengths(100, 50)}
    honest, lying = (MarketBatch([market(base, peer)]) for peer in ({}, {"misreport": lie}))
    for batch in (honest, lying):
        finish(batch, to_candidates)
    q, lied = honest.markets.requests[0], lying.markets.requests[0]
    assert lied["promised_tpot_s"][0] == pytest.approx(q["promised_tpot_s"][0] * 0.7 / 2)
    assert lied["promised_ttft_s"][0] == pytest.approx(q["promised_ttft_s"][0] * 0.7 * 0.5 / 2)
    assert lied["finish_s"][0] == q["finish_s"][0]


@pytest.mark.parametrize(("gossip_s", "oldest_s"), [(3.0, 3.0), (2.5, 3.0), (1.0, 1.0), (7.0, 7.0)])
def test_adverts_are_as_old_as_the_gossip_interval(gossip_s: float, oldest_s: float) -> None:
    """When the next is made, and older by their way when that is there. An interval between two ticks ends at the later
    one. Not everybody gossips at once."""
    providers = [{"traffic": times(*np.arange(0.5, 60)), "lengths": lengths(30, 20)}] + [{}] * 4
    batch = MarketBatch([market(*providers, gossip_interval_s=gossip_s)])
    ages, published_s = [], [set() for _ in range(5)]
    for began_s in run(batch, here):
        if began_s < 59:
            adverts_s = batch.markets.adverts[0, :, AD_TIME_S]
            ages.append(batch.now_s[0] - adverts_s)
            for i in range(5):
                published_s[i].add(float(adverts_s[i]))
            if batch.views.routes[0, 0, LOCAL]:  # what the policy sees is what there is
                head = batch.markets.providers[0, 0]["head"]
                candidates = batch.markets.requests[0]["candidates"][head][:4]
                shown = batch.views.nodes[0, 0, 1:5, AGE_S]
                np.testing.assert_allclose(shown, batch.now_s[0] - adverts_s[candidates])
    assert np.max(ages, axis=0).tolist() == [oldest_s] * 5
    if gossip_s == 3.0:
        assert len({frozenset(each) for each in published_s}) == 3  # one for each tick of the interval


@pytest.mark.parametrize("gossip_s", [3.0, 0.5])
def test_an_advert_is_there_half_a_round_trip_after_it_was_made(gossip_s: float) -> None:
    """Not before. Where that takes longer than the gossip interval, the next is made when it is there."""
    traffic = {"traffic": times(*np.arange(0.1, 30, 0.17)), "lengths": lengths(30, 20)}
    scenario = market(traffic, {}, {}, rtt_ms=1300, gossip_interval_s=gossip_s, decision_interval_s=0.5, duration_s=30)
    batch = MarketBatch([scenario])
    made_s: list[set[float]] = [set() for _ in range(3)]
    for _ in run(batch, here):
        now_s = float(batch.now_s[0])
        for i in range(3):
            made_s[i].add(float(batch.markets.sent_adverts[0, i, AD_TIME_S]))
            there = [each for each in made_s[i] if each + 0.65 <= now_s]
            assert batch.markets.adverts[0, i, AD_TIME_S] == max(there, default=NO_TIME)
    for each in made_s:
        assert set(np.diff(sorted(each))[1:].tolist()) == {gossip_s if gossip_s == 3.0 else 1.0}


def test_evidence_of_what_is_out_is_looked_at_each_tick() -> None:
    """The promised tokens grow from tick to tick, while no advert is sent at all."""
    scenario = market(
        {"traffic": times(0.5, 1.5), "lengths": lengths(50, 3000)},
        {"misreport": {"load": 1.0, "speed": 4.0}},
        gossip_interval_s=100,
        slo={"thresholds_s": [1000]},
    )
    batch = MarketBatch([scenario])
    looked = 0

    def decide(batch: MarketBatch, actions: Actions) -> None:
        """The second request is held, so that the first provider decides at each tick."""
        actions.route[...] = HOLD
        if batch.markets.providers[0, 0]["head"] == 0:
            actions.route[0, 0] = FIRST_CANDIDATE

    for _ in run(batch, decide):
        q, now_s = batch.markets.requests[0][0], float(batch.now_s[0])
        if q["status"] == IN_ENGINE and now_s >= 2:
            assert now_s == batch.markets.market["ticks"][0]
            late_s = now_s - q["taken_s"] - q["promised_ttft_s"]
            peer_stats = batch.markets.peer_stats[0, 0, 1]
            assert peer_stats[PROMISED] == pytest.approx(1 + late_s / q["promised_tpot_s"])
            out = tokens_out(batch.markets.engines[0, 1], batch.markets.requests[0], 0)
            on_the_way = 0.5 * batch.markets.market["rtt_s"][0] * (out / (now_s - q["first_token_s"]))
            assert 0 < peer_stats[STREAMED] <= out <= peer_stats[STREAMED] + on_the_way + 2
            assert peer_stats[PROMISED] > 2 * peer_stats[STREAMED]
            looked += 1
    assert looked > 20


def test_streams_of_remote_requests_are_what_the_engine_has_generated() -> None:
    batch = MarketBatch([market({"traffic": times(0.5), "lengths": lengths(50, 3000)}, {})])
    grew = 0
    for _ in run(batch, to_candidates):
        q = batch.markets.requests[0]
        if q["status"][0] == IN_ENGINE:
            out = int(tokens_out(batch.markets.engines[0, 1], q, 0))
            assert grew <= out <= 3000
            grew = out
    assert grew > 2000
