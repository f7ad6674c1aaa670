"""When requests are decided on, offered, refused and placed."""

import math

import numpy as np
import pytest
from market_checker import Checker
from markets import by_rule, finish, here, hold, lengths, market, run, times, to_candidates

from wwwserve.agents.decision import (
    FIRST_CANDIDATE,
    HOLD,
    LOCAL,
    MAX_WAIT_S,
    Actions,
)
from wwwserve.agents.knowledge import (
    AD_TIME_S,
    OUT,
    PROMISED,
    RECORD,
    refused_since,
    sent_since,
)
from wwwserve.agents.protocol import ESCROW, FREE, MICRO
from wwwserve.agents.view import REFUSALS
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.market.offers import OFFER_TIMEOUT_S
from wwwserve.envs.state import (
    ANSWERING,
    DONE,
    DUELS_STARTED,
    DUELS_VOID,
    HELD,
    HOLDS,
    IN_ENGINE,
    INVALID,
    OFFERED,
    PROBES_REFUSED,
    PROBES_UNANSWERED,
    RETURNED,
    RUN_LOCAL,
)


def test_a_request_is_decided_on_when_it_arrives() -> None:
    """20 requests/s at one provider, between ticks: each is in the engine at the instant of its arrival."""
    arrivals_s = [0.025 + 0.05 * k for k in range(100)]
    batch = MarketBatch([market({"traffic": times(*arrivals_s), "lengths": lengths(30, 20)}, {})])
    for _ in run(batch, by_rule("single")):
        q = batch.markets.requests[0]
        assert (q["arrival_s"][q["status"] == HELD] == batch.now_s[0]).all()
    np.testing.assert_array_equal(batch.markets.requests[0]["submit_s"], arrivals_s)
    assert batch.markets.providers[0, 0]["counts"][RUN_LOCAL] == 100
    assert np.isfinite(batch.requests(0).latency_s).all()


def test_a_hold_is_bounded() -> None:
    """Held at every chance, a request is run here at the first tick or answer at which its last deadline is over."""
    slo = {"classes": {"chat": {"share": 0.5, "deadline_s": 3}, "batch": {"share": 0.5, "deadline_s": 7.5}}}
    arrivals_s = np.arange(0.3, 9, 0.37)
    batch = MarketBatch([market({"traffic": times(*arrivals_s), "lengths": lengths(30, 20)}, {}, slo=slo)], [4])
    finish(batch, hold)
    q = batch.markets.requests[0]
    deadline_s = np.array([3.0, 7.5])[q["klass"]]
    assert set(q["klass"]) == {0, 1}
    over_s = q["arrival_s"] + deadline_s
    answers_s = np.sort(q["finish_s"])
    next_answer_s = np.append(answers_s, np.inf)[np.searchsorted(answers_s, over_s)]
    np.testing.assert_array_equal(q["submit_s"], np.minimum(np.ceil(over_s), next_answer_s))
    assert (next_answer_s < np.ceil(over_s)).any()
    counts = batch.markets.providers[0, 0]["counts"]
    assert counts[INVALID] == counts[RUN_LOCAL] == arrivals_s.size  # the last hold of each was refused
    assert counts[HOLDS] > arrivals_s.size


@pytest.mark.parametrize(("ends", "decides_again"), [("here", 0), ("elsewhere", 0), ("remote", 1)])
def test_what_is_held_is_decided_on_again_at_an_answer(ends: str, decides_again: int) -> None:
    """Between two ticks: where the answer's engine is, and where its user is."""
    busy = {"traffic": times(0.5), "lengths": lengths(30, 100)}
    if decides_again == 0:
        providers = [busy | {"traffic": times(0.5, 1.0)}, {}]
    else:
        providers = [busy, {"traffic": times(1.0), "lengths": lengths(30, 20)}]
    scenario = market(*providers, decision_interval_s=5, gossip_interval_s=100, slo={"thresholds_s": [1000]})
    batch = MarketBatch([scenario])
    decided_s = []

    def decide(batch: MarketBatch, actions: Actions) -> None:
        actions.route[...] = HOLD
        heads = batch.markets.providers[0]["head"]
        if heads[0] == 0:
            actions.route[0, 0] = LOCAL if ends == "here" else FIRST_CANDIDATE
        if heads[decides_again] == 1:
            decided_s.append(float(batch.now_s[0]))

    for _ in run(batch, decide):
        if len(decided_s) > 3:
            break
    q = batch.markets.requests[0]
    answer_s = q["finish_s"][0] + (0.025 if ends == "elsewhere" else 0.0)
    assert 1.0 < answer_s < 5.0
    assert decided_s == [1.0, answer_s, 5.0, 10.0]
    assert batch.markets.providers[0, 1 - decides_again]["head"] == -1


def test_a_refusal_is_back_after_a_round_trip_with_the_refuser_masked() -> None:
    scenario = market({"traffic": times(0.5), "lengths": lengths(30, 20)}, {}, {}, rtt_ms=80)
    batch = MarketBatch([scenario])
    actions = batch.actions()
    actions.admission[..., MAX_WAIT_S] = -1.0  # nobody takes anything
    while not (batch.active[0, 0] and batch.views.routes[0, 0, LOCAL]):
        batch.step(actions)
    assert batch.now_s[0] == 0.5
    legal = batch.views.routes[0, 0, FIRST_CANDIDATE : FIRST_CANDIDATE + 3].tolist()
    assert legal == [1, 1, 0]
    drawn = batch.markets.requests[0]["candidates"][0].tolist()
    peer_stats, adverts = batch.markets.peer_stats[0, 0], batch.markets.adverts[0]
    for k, left, now_s in ((1, [1, 0], 0.58), (0, [0, 0], 0.66)):
        actions.route[0, 0] = FIRST_CANDIDATE + k
        batch.step(actions)
        assert batch.elapsed_s[0] == pytest.approx(0.08) and batch.now_s[0] == pytest.approx(now_s)
        assert batch.views.routes[0, 0, FIRST_CANDIDATE : FIRST_CANDIDATE + 2].tolist() == left
        assert batch.markets.requests[0]["candidates"][0].tolist() == drawn
        assert batch.markets.accounts[0, 0].tolist() == [1000 * MICRO, 2 * MICRO, 0]
        assert sent_since(peer_stats[drawn[k]], adverts[drawn[k]]) == 0
    assert batch.views.request[0, 0, REFUSALS] == 2
    actions.route[0, 0] = FIRST_CANDIDATE  # refused already: an invalid action is a hold
    batch.step(actions)
    counts = batch.markets.providers[0, 0]["counts"]
    assert (counts[PROBES_REFUSED], counts[INVALID], counts[HOLDS]) == (2, 1, 1)
    assert batch.now_s[0] == 1.0  # and a hold lasts until the next tick, where there are candidates anew
    assert batch.views.routes[0, 0, FIRST_CANDIDATE : FIRST_CANDIDATE + 2].tolist() == [1, 1]
    actions.route[0, 0] = LOCAL
    batch.step(actions)
    assert batch.markets.requests[0]["submit_s"][0] == 1.0


def test_requests_that_are_refused_at_one_instant_all_keep_their_candidates() -> None:
    scenario = market({"traffic": times(*[0.5] * 3), "lengths": lengths(30, 20)}, *[{}] * 12)
    batch = MarketBatch([scenario])
    actions = batch.actions()
    actions.admission[..., MAX_WAIT_S] = -1.0
    offered: dict[int, tuple[list[int], int]] = {}
    back = 0
    while back < 3:
        head = int(batch.markets.providers[0, 0]["head"])
        if head >= 0:
            drawn = batch.markets.requests[0]["candidates"][head].tolist()
            if head not in offered:
                actions.route[0, 0] = FIRST_CANDIDATE + head
                offered[head] = drawn, drawn[head]
            else:
                assert drawn == offered[head][0]
                closed = np.flatnonzero(batch.views.routes[0, 0, FIRST_CANDIDATE:] == 0)
                assert [drawn[k] for k in closed] == [offered[head][1]]
                assert batch.now_s[0] == pytest.approx(0.55)
                actions.route[0, 0] = LOCAL
                back += 1
        batch.step(actions)


def test_a_request_whose_copy_is_refused_too_comes_back_without_both() -> None:
    scenario = market({"traffic": times(0.5), "lengths": lengths(30, 20)}, {}, {}, {}, economy={"duel_probability": 1})
    batch = MarketBatch([scenario])
    actions = batch.actions()
    actions.admission[..., MAX_WAIT_S] = -1.0
    while batch.markets.providers[0, 0]["head"] < 0:
        batch.step(actions)
    actions.route[0, 0] = FIRST_CANDIDATE + 1
    batch.step(actions)
    assert batch.now_s[0] == pytest.approx(0.55)
    assert batch.views.routes[0, 0, FIRST_CANDIDATE : FIRST_CANDIDATE + 3].tolist() == [0, 0, 1]
    counts = batch.markets.providers[0, 0]["counts"]
    assert counts[[PROBES_REFUSED, DUELS_STARTED, DUELS_VOID, RETURNED]].tolist() == [2, 1, 1, 0]


def test_two_refusals_delay_a_request_by_two_round_trips() -> None:
    batch = MarketBatch([market({"traffic": times(0.5), "lengths": lengths(30, 20)}, {}, {}, rtt_ms=80)])

    def decide(batch: MarketBatch, actions: Actions) -> None:
        to_candidates(batch, actions)
        actions.admission[..., MAX_WAIT_S] = -1.0

    finish(batch, decide)
    assert batch.markets.requests[0]["submit_s"][0] == pytest.approx(0.5 + 2 * 0.080)


def test_an_offer_travels_half_a_round_trip_and_the_answer_another() -> None:
    batch = MarketBatch([market({"traffic": times(0.5), "lengths": lengths(30, 20)}, {}, rtt_ms=80)])
    finish(batch, to_candidates)
    q = batch.markets.requests[0]
    assert q["submit_s"][0] == pytest.approx(0.5 + 0.5 * 0.080)
    assert q["taken_s"][0] == pytest.approx(0.5 + 0.080)
    assert q["answer_s"][0] == pytest.approx(q["finish_s"][0] + 0.5 * 0.080)
    assert q["first_answer_s"][0] == pytest.approx(q["first_token_s"][0] + 0.5 * 0.080)


def test_an_executor_decides_on_its_state_when_the_offer_is_there() -> None:
    """It takes no more than it has slots for: of two offers at one instant the second finds the first."""
    scenario = market(
        {"traffic": times(0.5), "lengths": lengths(30, 500)},
        {"max_num_seqs": 1},
        {"traffic": times(0.55), "lengths": lengths(30, 500)},
        rtt_ms=200,
    )
    batch = MarketBatch([scenario])
    checker = Checker(batch, 0)

    def decide(batch: MarketBatch, actions: Actions) -> None:
        """Both go to the second provider, which takes nothing that has to wait."""
        actions.route[...] = LOCAL
        actions.admission[0, 1, MAX_WAIT_S] = 0.3
        for i in (0, 2):
            r = int(batch.markets.providers[0, i]["head"])
            if r >= 0:
                k = batch.markets.requests[0]["candidates"][r].tolist().index(1)
                actions.route[0, i] = FIRST_CANDIDATE + k if batch.views.routes[0, i, FIRST_CANDIDATE + k] else LOCAL

    for _ in run(batch, decide):
        checker.check()
        if batch.now_s[0] == pytest.approx(0.75):  # the second is back
            assert batch.markets.providers[0, 1]["remote"] == 1
    q = batch.markets.requests[0]
    assert q["executor"][:2].tolist() == [1, 2]
    assert q["submit_s"][:2].tolist() == pytest.approx([0.6, 0.75])


def test_escrow_is_locked_and_the_request_counts_as_sent_when_the_offer_leaves() -> None:
    """It is a remote request while it is in the peer's engine, neither on its way there nor back."""
    looks_s = [1.1, 1.8, 2.5, 4.0]
    scenario = market({"traffic": times(1.0, *looks_s), "lengths": lengths(30, 10)}, {}, rtt_ms=1500)
    batch = MarketBatch([scenario])
    checker = Checker(batch, 0)
    seen = []

    def decide(batch: MarketBatch, actions: Actions) -> None:
        actions.route[...] = FIRST_CANDIDATE if batch.markets.providers[0, 0]["head"] == 0 else LOCAL

    for _ in run(batch, decide):
        checker.check()
        m = batch.markets
        if batch.now_s[0] in looks_s:
            status, remote = int(m.requests[0]["status"][0]), int(m.providers[0, 1]["remote"])
            seen.append((status, int(m.accounts[0, 0, ESCROW]), remote))
            assert sent_since(m.peer_stats[0, 0, 1], m.adverts[0, 1]) == (1 if m.adverts[0, 1, AD_TIME_S] == 0 else 0)
            assert m.peer_stats[0, 0, 1, OUT] == (status != DONE)
    assert seen == [(OFFERED, MICRO, 0), (IN_ENGINE, MICRO, 1), (ANSWERING, MICRO, 0), (DONE, 0, 0)]


def test_an_answer_faster_than_the_acceptance() -> None:
    """1.5 s of round trip and five tokens: done before the origin hears that it was taken."""
    scenario = market(
        {"traffic": times(0.9), "lengths": lengths(30, 5)}, {}, rtt_ms=1500, decision_interval_s=0.5,
        gossip_interval_s=1.0, economy={"stake_rule": "fixed"},
    )  # fmt: skip
    batch = MarketBatch([scenario])
    checker = Checker(batch, 0)
    in_flight = 0
    for _ in run(batch, to_candidates):
        checker.check()
        q = batch.markets.requests[0]
        if q["status"][0] == ANSWERING and batch.now_s[0] < q["taken_s"][0]:
            in_flight += 1
            assert batch.markets.peer_stats[0, 0, 1, PROMISED] == 0
    q = batch.markets.requests[0]
    assert in_flight > 0
    assert q["finish_s"][0] < q["taken_s"][0] < q["answer_s"][0]
    assert q["taken_s"][0] == pytest.approx(0.9 + 1.5)
    took_s = q["answer_s"][0] - q["taken_s"][0]
    assert took_s == pytest.approx(q["finish_s"][0] - q["submit_s"][0])
    promised_s = q["promised_ttft_s"][0] + 4 * q["promised_tpot_s"][0]
    assert batch.markets.peer_stats[0, 0, 1, RECORD] == pytest.approx(math.log(took_s / promised_s))
    assert batch.markets.accounts[0, :, FREE].tolist() == [999 * MICRO, 1001 * MICRO]


def test_a_router_that_sees_everything_places_at_once_whatever_the_admission_policy() -> None:
    batch = MarketBatch([market({"traffic": times(0.5, 0.6), "lengths": lengths(30, 500)}, {}, {})])

    def decide(batch: MarketBatch, actions: Actions) -> None:
        actions.admission[..., MAX_WAIT_S] = -1.0
        actions.direct[0, 0] = 2 - batch.markets.providers[0, 0]["head"]

    for _ in run(batch, decide):
        if batch.now_s[0] == 0.6:
            q = batch.markets.requests[0]
            assert (q["status"][0], q["executor"][0]) == (IN_ENGINE, 2)
            assert (q["submit_s"][0], q["taken_s"][0]) == (0.525, pytest.approx(0.55))
    assert batch.markets.requests[0]["executor"].tolist() == [2, 1]


def test_what_one_provider_draws_does_not_depend_on_what_others_do() -> None:
    drawn = []
    for busy in (True, False):
        other = {"traffic": times(*np.arange(0.6, 50, 0.7)), "lengths": lengths(30, 20)} if busy else {}
        scenario = market(
            {"traffic": times(*np.arange(0.5, 50)), "lengths": lengths(30, 20)}, other, *[{}] * 12,
            economy={"stake_rule": "fixed"},
        )  # fmt: skip
        batch = MarketBatch([scenario])
        finish(batch, here)
        q = batch.markets.requests[0]
        drawn.append(q["candidates"][q["origin"] == 0].tolist())
    assert drawn[0] == drawn[1]
    assert len({tuple(each) for each in drawn[0]}) > 40


@pytest.mark.parametrize(("arrival_s", "rtt_ms"), [(21.5, 50), (19.5, 1500)])
def test_an_offer_to_a_peer_that_is_offline_costs_its_timeout(arrival_s: float, rtt_ms: float) -> None:
    """It has left, and its advert is still fresh; or it leaves while the offer is on its way."""
    scenario = market(
        {"traffic": times(arrival_s), "lengths": lengths(50, 100)}, {"online_s": [[0, 20]]}, rtt_ms=rtt_ms
    )
    batch = MarketBatch([scenario])
    checker = Checker(batch, 0)
    for _ in run(batch, to_candidates):
        checker.check()
    counts = batch.markets.providers[0, 0]["counts"]
    assert counts[[PROBES_UNANSWERED, PROBES_REFUSED, RUN_LOCAL, RETURNED]].tolist() == [1, 0, 1, 0]
    assert batch.markets.requests[0]["submit_s"][0] == pytest.approx(arrival_s + OFFER_TIMEOUT_S)
    assert batch.markets.accounts[0, 0, ESCROW] == 0


@pytest.mark.parametrize(
    ("arrival_s", "rtt_ms", "online_s", "counted"),
    [(18.9, 1500, [[0, 20]], PROBES_REFUSED), (20.1, 50, [[0, 20], [21, 100]], PROBES_UNANSWERED)],
)
def test_an_offer_counts_by_how_the_peer_was_when_it_came(
    arrival_s: float, rtt_ms: float, online_s: list[list[float]], counted: int
) -> None:
    """It refuses and leaves before that is heard; or it is back before the offer is given up."""
    batch = MarketBatch(
        [market({"traffic": times(arrival_s), "lengths": lengths(50, 100)}, {"online_s": online_s}, rtt_ms=rtt_ms)]
    )

    def decide(batch: MarketBatch, actions: Actions) -> None:
        to_candidates(batch, actions)
        actions.admission[..., MAX_WAIT_S] = -1.0

    finish(batch, decide)
    counts = batch.markets.providers[0, 0]["counts"]
    assert counts[counted] == counts[[PROBES_REFUSED, PROBES_UNANSWERED]].sum() == 1


def test_requests_refused_at_one_instant_come_back_in_the_order_of_their_arrival() -> None:
    """Held until the tick, all are offered then, and refused by three peers at once; and so whichever refuses first."""
    scenario = market({"traffic": times(0.5, 0.6, 0.7), "lengths": lengths(30, 20)}, {}, {}, {})
    orders = set()
    for seed in range(6):
        batch = MarketBatch([scenario], [seed])
        actions = batch.actions()
        actions.admission[..., MAX_WAIT_S] = -1.0
        offered: dict[int, int] = {}
        back = []
        while len(back) < 3:
            head, now_s = int(batch.markets.providers[0, 0]["head"]), float(batch.now_s[0])
            actions.route[0, 0] = HOLD
            if head >= 0 and now_s == 1.0:
                actions.route[0, 0] = FIRST_CANDIDATE + head
                offered[head] = int(batch.markets.requests[0]["candidates"][head][head])
            elif head >= 0 and now_s > 1.0:
                assert now_s == pytest.approx(1.05)
                actions.route[0, 0] = LOCAL
                back.append(head)
            batch.step(actions)
        assert back == [0, 1, 2]
        orders.add(tuple(offered.values()))
    assert len(orders) > 1


def test_a_refusal_says_nothing_of_an_advert_that_came_since_the_offer() -> None:
    traffic = {"traffic": times(*np.arange(0.9, 30, 0.7)), "lengths": lengths(30, 20)}
    batch = MarketBatch([market(traffic, {}, rtt_ms=1500, duration_s=30)])
    checker = Checker(batch, 0)
    seen = set()

    def decide(batch: MarketBatch, actions: Actions) -> None:
        to_candidates(batch, actions)
        actions.admission[..., MAX_WAIT_S] = -1.0

    before = 0
    for _ in run(batch, decide):
        checker.check()
        m, q = batch.markets, batch.markets.requests[0]
        refused = int(m.providers[0, 0]["counts"][PROBES_REFUSED])
        if refused == before + 1:
            r = int(m.providers[0, 0]["head"])
            advert = m.adverts[0, 1]
            newer = q["advert_s"][r] < advert[AD_TIME_S]
            assert refused_since(m.peer_stats[0, 0, 1], advert) == (not newer)
            seen.add(bool(newer))
        before = refused
    assert seen == {True, False}
