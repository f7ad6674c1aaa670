"""Sessions in a market: the closed loop, what is cached where, who believes what of it, and what is paid for it."""

from typing import Any

import numpy as np
import pytest
from market_checker import Checker
from markets import Decide, finish, market, run

from wwwserve.agents.decision import FIRST_CANDIDATE, LOCAL, Actions
from wwwserve.agents.knowledge import AD_MEAN_UNCACHED, AD_REUSE_S, LONGEST_REUSE_S
from wwwserve.agents.protocol import CACHED_INPUT, INPUT, MICRO, OUTPUT
from wwwserve.agents.view import CACHED, CACHED_AGE_S, SINCE_S, TURN, UNCACHED
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.scenario import Scenario
from wwwserve.envs.state import DONE, FUTURE

TURNS, THINK_S = 4, 5.0
LENGTHS = {"prompt": {"median": 100, "sigma": 0, "max": 100}, "output": {"median": 160, "sigma": 0, "max": 160}}


def sessions(rate_per_s: float = 0.05, **more: Any) -> dict[str, Any]:
    """Turns of 400 tokens that are answered with 160, after a system prompt of 800."""
    traffic = {
        "kind": "sessions",
        "rate_per_s": rate_per_s,
        "system_tokens": 800,
        "turns": {"median": TURNS, "sigma": 0, "max": TURNS},
        "turn": {"median": 400, "sigma": 0, "max": 400},
        "think_s": {"median": THINK_S, "sigma": 0, "max": THINK_S},
    }
    return {"gpu": "a100-80g", "lengths": LENGTHS, "traffic": traffic | more}


def play(scenario: Scenario, route: Any, seed: int = 0) -> MarketBatch:
    batch = MarketBatch([scenario], [seed])
    finish(batch, always(route))
    return batch


def always(route: int) -> Decide:
    """This route where it is legal, else the own engine."""

    def decide(batch: MarketBatch, actions: Actions) -> None:
        actions.route[...] = np.where(batch.views.routes[..., route] > 0, route, LOCAL)

    return decide


def requests(batch: MarketBatch) -> Any:
    return batch.markets.requests[0][: int(batch.markets.market["n_arrivals"][0])]


def test_a_turn_comes_a_think_time_after_the_answer_before() -> None:
    q = requests(play(market(sessions()), LOCAL))
    assert (q["next_turn"] >= 0).any()
    came = 0
    for u in np.flatnonzero(q["next_turn"] >= 0):
        after = q[q["next_turn"][u]]
        if np.isfinite(after["arrival_s"]):
            came += 1
            assert after["think_s"] == pytest.approx(THINK_S)
            assert after["arrival_s"] == q[u]["answer_s"] + after["think_s"] and after["last_s"] == q[u]["answer_s"]
            assert after["turn"] == q[u]["turn"] + 1
            assert after["status"] == DONE
        else:
            assert not q[u]["answer_s"] + after["think_s"] < 100.0 and after["status"] == FUTURE
    assert came > 3


def test_turns_that_never_come_are_not_in_the_table() -> None:
    batch = play(market(sessions(), duration_s=30), LOCAL)
    q, table = requests(batch), batch.requests(0)
    assert len(table.latency_s) == np.isfinite(q["arrival_s"]).sum() < len(q)
    assert np.isfinite(table.latency_s).all()
    assert batch.markets.market["unresolved"][0] == 0


def test_the_own_engine_has_what_it_answered() -> None:
    """Whole blocks of the turn before, its last token aside, which was not computed."""
    batch = play(market(sessions(0.02)), LOCAL)
    q = requests(batch)
    later = q[(q["turn"] > 1) & (q["status"] == DONE)]
    context = later["prompt"] - 400 - 1
    assert later["hit"].tolist() == (context // 16 * 16).tolist()
    first = q[(q["turn"] == 1) & (q["status"] == DONE)]
    assert first["hit"].tolist() == [0] + [800] * (len(first) - 1)
    table = batch.requests(0)
    assert table.cached.sum() == later["hit"].sum() + first["hit"].sum()


def test_without_a_prefix_cache_all_is_computed() -> None:
    plain = play(market(sessions(), prefix_cache=None), LOCAL)
    cached = play(market(sessions()), LOCAL)
    assert plain.requests(0).cached.sum() == 0 < cached.requests(0).cached.sum()
    first = [float(each.requests(0).first_token_s.mean()) for each in (plain, cached)]
    assert first[1] < first[0]
    assert plain.markets.tree.shape[1] == 1  # and takes no room


def test_a_session_is_believed_where_it_was_served() -> None:
    """The origin remembers which prefix a peer answered; the view says how much of it and how long ago."""
    batch = MarketBatch([market(sessions(0.03), {})], [0])
    checker = Checker(batch, 0)
    seen = 0
    for _ in run(batch, always(FIRST_CANDIDATE)):
        checker.check()
        request, nodes = batch.views.request[0, 0], batch.views.nodes[0, 0]
        head = int(batch.markets.providers["head"][0, 0])
        if batch.active[0, 0] and head >= 0 and request[TURN] > 1:
            r = batch.markets.requests[0, head]
            before = int(r["prompt"]) - 400
            assert r["prefix"][1] == before // 16 * 16 and r["prefix"][0] == 0
            assert nodes[1, CACHED] == pytest.approx(r["prefix"][1] / r["prompt"])
            assert nodes[1, UNCACHED] == r["prompt"] - r["prefix"][1] and nodes[0, CACHED] == 0
            assert nodes[1, CACHED_AGE_S] == pytest.approx(THINK_S, abs=0.1) and request[SINCE_S] == pytest.approx(
                THINK_S
            )
            seen += 1
    assert seen >= 3
    q = requests(batch)
    done = q[q["status"] == DONE]
    assert (done["executor"] == 1).all() and (done["hit"][done["turn"] > 1] > 0).all()


def test_what_a_peer_says_it_keeps_no_longer_is_not_believed() -> None:
    batch = MarketBatch([market(sessions(0.03), {})], [0])
    decide = always(FIRST_CANDIDATE)
    for _ in run(batch, decide):
        batch.markets.adverts[0, 1, AD_REUSE_S] = 1.0  # shorter than the think time
        batch.markets.sent_adverts[0, 1, AD_REUSE_S] = 1.0
        head = int(batch.markets.providers["head"][0, 0])
        if batch.active[0, 0] and head >= 0 and batch.views.request[0, 0, TURN] > 1:
            age_s = float(batch.markets.requests[0, head]["prefix_age_s"][1])
            assert batch.views.nodes[0, 0, 1, CACHED] == 0 or age_s <= 4.0 + 1.0  # heard since the advert


def test_cached_input_is_paid_as_such() -> None:
    """What the executor says that it has, at the tariff's price of cached input."""
    batch = MarketBatch([market(sessions(0.03), {}, economy={"payment": "quoted"})], [3])
    for _ in run(batch, always(FIRST_CANDIDATE)):
        pass
    q = requests(batch)
    sold = q[(q["status"] == DONE) & (q["executor"] == 1)]
    assert len(sold) > 3 and (sold["cached_input"] == sold["hit"]).all() and sold["cached_input"].any()
    given = sold["tariff"][:, INPUT] * (sold["prompt"] - sold["cached_input"])
    given += sold["tariff"][:, CACHED_INPUT] * sold["cached_input"]
    paid = int(((given + sold["tariff"][:, OUTPUT] * sold["output"]) // 1000).sum())
    assert 1002 * MICRO - int(batch.markets.accounts[0, 0].sum()) == paid > 0


def test_who_leaves_loses_its_cache_and_its_users_their_sessions() -> None:
    batch = MarketBatch([market(sessions(0.2) | {"online_s": [[0, 40], [60, 100]]})], [1])
    checker = Checker(batch, 0)
    for _ in run(batch, always(LOCAL)):
        checker.check()
    q = requests(batch)
    for u in np.flatnonzero(np.isinf(q["answer_s"])):
        r = int(q["next_turn"][u])
        while r >= 0:  # whose answer never came asks no more
            assert not np.isfinite(q["arrival_s"][r])
            r = int(q["next_turn"][r])
    back = q[(q["arrival_s"] >= 60) & (q["status"] == DONE)]
    assert len(back) and back["hit"][np.argmin(back["submit_s"])] == 0
    assert not ((q["arrival_s"] >= 40) & (q["arrival_s"] < 60) & np.isfinite(q["answer_s"])).any()


def test_adverts_show_what_has_to_be_computed_and_how_long_it_is_kept() -> None:
    batch = play(market(sessions(0.1)), LOCAL)
    own = batch.markets.providers["own"][0, 0]
    assert 0 < own[AD_MEAN_UNCACHED] < 800 and own[AD_REUSE_S] == LONGEST_REUSE_S  # nothing has had to go
