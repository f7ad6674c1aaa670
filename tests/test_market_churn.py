"""What becomes of requests when providers join and leave."""

import numpy as np
from market_checker import Checker
from markets import here, hold, lengths, market, run, times, to_candidates

from wwwserve.agents.decision import (
    HOLD,
    LOCAL,
    Actions,
)
from wwwserve.agents.protocol import ESCROW, FREE, MICRO
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.state import (
    ANSWERING,
    DELEGATED,
    DONE,
    FAILED,
    FUTURE,
    HELD,
    IN_ENGINE,
    LOST,
    OFFERED,
    OWN_ARRIVED,
    OWN_DONE,
    OWN_FAILED,
    RETURNED,
)


def test_an_executor_that_leaves_gives_its_remote_requests_back_after_ten_seconds() -> None:
    """To the head of the origin's queue, before what came later; and they are answered."""
    scenario = market(
        {"traffic": times(1.5, 2.5, 31.2), "lengths": lengths(50, 6000)},
        {"online_s": [[0, 20]]},
        gossip_interval_s=1.0,
        slo={"thresholds_s": [1000]},
        economy={"stake_rule": "fixed"},
    )
    batch = MarketBatch([scenario])
    checker = Checker(batch, 0)
    returned_s = None

    def decide(batch: MarketBatch, actions: Actions) -> None:
        if batch.now_s[0] < 20:
            to_candidates(batch, actions)
        else:
            hold(batch, actions) if batch.now_s[0] < 35 else here(batch, actions)

    for _ in run(batch, decide):
        checker.check()
        m, q, now_s = batch.markets, batch.markets.requests[0], float(batch.now_s[0])
        if 20 <= now_s < 30:
            assert q["status"].tolist() == [LOST, LOST, FUTURE]
            assert m.accounts[0, 0, ESCROW] == 2 * MICRO
        elif now_s == 34:
            # The two that were lost are before the one of 31.2.
            chain = [int(m.providers[0, 0]["held_head"][0])]
            while chain[-1] >= 0:
                chain.append(int(q["next"][chain[-1]]))
            assert sorted(chain[:2]) == [0, 1] and chain[2:] == [2, -1]
        if returned_s is None and q["status"][0] == HELD and now_s > 20:
            returned_s = now_s
            assert m.accounts[0, :2, FREE].tolist() == [1000 * MICRO, 1000 * MICRO] and m.accounts[0, 0, ESCROW] == 0
    assert returned_s == 30.0
    counts = batch.markets.providers[0, 0]["counts"]
    assert (counts[DELEGATED], counts[RETURNED], counts[OWN_DONE], counts[OWN_FAILED]) == (2, 2, 3, 0)
    q = batch.markets.requests[0]
    assert q["executor"].tolist() == [0, 0, 0]
    assert (q["first_token_s"] > 35).all()  # generated anew


def test_an_origin_that_leaves_fails_its_requests_and_peers_drop_them() -> None:
    scenario = market(
        {"traffic": times(1.5, 2.5, 3.5), "lengths": lengths(50, 6000), "online_s": [[0, 20]]},
        {},
        {"traffic": times(4.5), "lengths": lengths(50, 6000)},
        slo={"thresholds_s": [1000]},
        economy={"stake_rule": "fixed"},
    )
    batch = MarketBatch([scenario])
    checker = Checker(batch, 0)

    def decide(batch: MarketBatch, actions: Actions) -> None:
        # Of the first provider's requests one stays, one goes to the second provider, one is held.
        actions.direct[...] = -1
        actions.route[...] = HOLD
        head = int(batch.markets.providers[0, 0]["head"])
        if head in (0, 1):
            actions.direct[0, 0] = head
        actions.route[0, 2] = LOCAL

    for _ in run(batch, decide):
        checker.check()
        m, q = batch.markets, batch.markets.requests[0]
        if 6 <= batch.now_s[0] < 20:
            assert q["status"].tolist() == [IN_ENGINE, IN_ENGINE, HELD, IN_ENGINE]
            assert m.engines[0]["running"].tolist() == [1, 1, 1]
            assert m.providers[0]["remote"].tolist() == [0, 1, 0]
            assert m.accounts[0, 0, ESCROW] == MICRO
        elif batch.now_s[0] == 20:
            assert q["status"].tolist() == [FAILED, FAILED, FAILED, IN_ENGINE]
            assert m.engines[0]["running"].tolist() == [0, 0, 1]
            assert m.providers[0]["remote"].tolist() == [0, 0, 0]
            assert m.accounts[0, 0].tolist() == [1000 * MICRO, 2 * MICRO, 0]
    assert batch.requests(0).latency_s[:3].tolist() == [np.inf] * 3
    assert np.isfinite(batch.requests(0).latency_s[3])
    assert batch.markets.providers[0]["counts"][:, OWN_FAILED].tolist() == [3, 0, 0]


def test_an_origin_that_leaves_with_offers_and_answers_on_their_way() -> None:
    """Whatever is on its way is forgotten; the peer, whose work it was, has nothing of it and gets nothing."""
    arrivals_s = np.arange(2.25, 20, 0.25)
    scenario = market(
        {"traffic": times(*arrivals_s), "lengths": lengths(50, 60), "online_s": [[0, 20]]},
        {},
        rtt_ms=1500,
        gossip_interval_s=1.0,
        slo={"thresholds_s": [1000]},
        economy={"stake_rule": "fixed"},
    )
    batch = MarketBatch([scenario])
    checker = Checker(batch, 0)
    before: dict[int, int] = {}
    for began_s in run(batch, to_candidates):
        checker.check()
        m, q = batch.markets, batch.markets.requests[0]
        count = {each: int((q["status"] == each).sum()) for each in (OFFERED, IN_ENGINE, ANSWERING, DONE)}
        if batch.now_s[0] == 19.75:
            before = count
        if began_s < 20 <= batch.now_s[0]:
            assert batch.now_s[0] == 20 and m.market["mail_head"][0] == -1
            assert m.engines[0]["running"].tolist() == m.providers[0]["remote"].tolist() == [0, 0]
            free = [1000 * MICRO - count[DONE] * MICRO, 1000 * MICRO + count[DONE] * MICRO]
            assert m.accounts[0, :, FREE].tolist() == free and m.accounts[0, 0, ESCROW] == 0
    assert min(before.values()) > 0
    counts = batch.markets.providers[0, 0]["counts"]
    assert counts[OWN_DONE] + counts[OWN_FAILED] == counts[OWN_ARRIVED] == arrivals_s.size
    assert counts[OWN_FAILED] >= before[OFFERED] + before[ANSWERING]


def test_a_silent_peer_is_no_candidate_after_ten_seconds() -> None:
    scenario = market({"traffic": times(20.5, 34.5), "lengths": lengths(50, 100)}, {"online_s": [[0, 20]]}, {})
    batch = MarketBatch([scenario])
    seen = {}
    for _ in run(batch, here):
        p = batch.markets.providers[0, 0]
        if p["head"] >= 0:
            q = batch.markets.requests[0][p["head"]]
            seen[int(p["head"])] = sorted(q["candidates"][: q["n_candidates"]].tolist())
    assert seen == {0: [1, 2], 1: [2]}
