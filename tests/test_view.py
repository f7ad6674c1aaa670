"""The observation: every feature in its range whatever the state, the mask, the order of candidates, ranks."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wwwserve.agents import knowledge as k
from wwwserve.agents import view as v
from wwwserve.agents.classes import CLASS_LAST_DEADLINE_S, CLASS_MAX, MAX_CLASSES
from wwwserve.agents.decision import CANDIDATES, FIRST_CANDIDATE, HOLD, LOCAL, NODES
from wwwserve.agents.estimate import chance_on_time, expect, slowdown
from wwwserve.agents.kernel import Floats, records
from wwwserve.agents.protocol import LATENESS, MICRO, OUTPUT, PER_REQUEST, QUOTED
from wwwserve.agents.provider import AGREEMENT, PROVIDER, REQUEST, reset_provider, reset_requests

NOW_S = 50.0
OUTPUT_PRICE = k.AD_TARIFF + OUTPUT


def advert(**columns: float) -> Floats:
    """An idle node of 20,000 KV tokens, advertised 3 s ago; of its tariff AD_OUTPUT_PRICE is the last column."""
    made = np.zeros(k.ADVERT_SIZE)
    made[[k.AD_TIME_S, k.AD_MEAN_PROMPT, k.AD_MEAN_OUTPUT, k.AD_CONTEXT, k.AD_STAKE]] = NOW_S - 3, 100, 200, 224, 1
    made[OUTPUT_PRICE] = columns.pop("AD_OUTPUT_PRICE", 2.0)
    made[k.AD_WEIGHT_S :] = 0.010, 1e-4, 1e-7, 0.004, 1e-4, 2e-8, 20_000, 8
    for name, value in columns.items():
        made[getattr(k, name)] = value
    return made


# Three classes: median, sigma, max, mean, value, last deadline; the third lies between the others.
KNOWN = np.array([[80, 0.5, 400, 90, 3, 20], [800, 0.7, 4000, 900, 1, 600], [200, 0.6, 1000, 240, 2, 60.0]])
DEADLINES = np.array([[10.0, 20.0], [300.0, 600.0], [30.0, 60.0]])


def see(**changes: Any) -> v.Views:
    """The view of node 0 of a world of four; candidates 2 and 1 unless given others."""
    world: dict[str, Any] = {
        "own": advert(AD_TIME_S=NOW_S),
        "adverts": np.array([advert(), advert(AD_RUNNING=4, AD_KV_TOKENS=900), advert(AD_RUNNING=8), advert()]),
        "peer_stats": k.make_peer_stats(4),
        "candidates": [2, 1],
        "refused": 0,
        "credit": 100 * MICRO,
        "now_s": NOW_S,
        "rtt_s": 0.05,
        "prompt": 150,
        "arrival_s": NOW_S - 5.0,
        "klass": 2,
        "known": KNOWN,
        "deadlines": DEADLINES,
        "payment": QUOTED,
        "prefix": [0],
        "prefix_age_s": [0],
        "turn": 1,
        "last_s": 0.0,
    }
    assert set(changes) <= set(world)
    w = world | changes
    views = v.make_views()
    for array in views:
        array[...] = 99  # leftovers of another view
    p, a, q = records(1, PROVIDER), records(1, AGREEMENT), records(2, REQUEST)
    reset_provider(p)
    reset_requests(q)
    (classes, deadlines), count = w["deadlines"].shape, len(w["candidates"])
    p["known"][0, :classes], p["own"], p["head"], p["cost"] = w["known"], w["own"], 1, COST
    a["rtt_s"], a["n_classes"], a["n_deadlines"], a["payment"] = w["rtt_s"], classes, deadlines, w["payment"]
    a["deadlines"][0, :classes, :deadlines] = w["deadlines"]
    request = q[1]
    request["klass"], request["prompt"], request["arrival_s"] = w["klass"], w["prompt"], w["arrival_s"]
    request["longest"] = w["known"][w["klass"], CLASS_MAX]
    request["n_candidates"], request["refused"] = count, w["refused"]
    request["prefix"][: len(w["prefix"])], request["prefix_age_s"][: len(w["prefix"])] = w["prefix"], w["prefix_age_s"]
    request["turn"], request["last_s"] = w["turn"], w["last_s"]
    request["candidates"] = -1
    request["candidates"][:count] = w["candidates"]
    peers = k.Peers(w["adverts"], w["peer_stats"], np.full(len(w["adverts"]), w["credit"]))
    v.write_view(views, p[0], a[0], q, peers, w["now_s"], SCRATCH)
    return views


COST = 1e-4, 2e-5, 5e-4  # own marginal cost of a token of input, cached input and output, credits
SCRATCH = v.ViewScratch(np.empty(NODES), np.empty(MAX_CLASSES, np.int64))


def test_columns_are_in_the_order_of_the_spec() -> None:
    renamed = {"sent": "SENT_SINCE", "out": "OUT_THERE", "overdue_s": "OVERDUE", "candidates": "N_CANDIDATES"}
    for features in (v.NODE_FEATURES, v.REQUEST_FEATURES, v.SELF_FEATURES):
        names = [renamed.get(f.name, f.name.upper()) for f in features]
        assert [getattr(v, name) for name in names] == list(range(len(features)))


def test_the_spec_is_the_version_that_policies_were_trained_on() -> None:
    """A change here changes what trained policies see: raise VIEW_VERSION with it."""
    assert v.VIEW_VERSION == 9
    assert [len(f) for f in (v.NODE_FEATURES, v.REQUEST_FEATURES, v.SELF_FEATURES)] == [31, 12, 11]


def test_the_own_node() -> None:
    own = advert(
        AD_TIME_S=NOW_S - 0.5, AD_RUNNING=3, AD_WAITING=2, AD_KV_TOKENS=5000, AD_STAKE=7, AD_PREFILL=700, AD_REUSE_S=90
    )
    own[k.AD_HELD : k.AD_HELD + 3] = 5, 6, 4
    peer_stats = k.make_peer_stats(4)
    peer_stats[0] = 123.0  # never read
    row = see(own=own, peer_stats=peer_stats, prefix=[96], prefix_age_s=[7]).nodes[0]
    first_s, token_s = expect(own, 0.0, 150.0, 96.0)
    chance = chance_on_time(DEADLINES[2], 5.0, first_s, token_s, 200.0, 0.6, 1000.0)
    cost = (54 * 1e-4 + 96 * 2e-5 + 240 * 5e-4) / 2  # of an answer worth 2
    expected = {
        v.OWN: 1, v.FIRST_TOKEN_S: first_s, v.TOKEN_S: token_s, v.FINISH_S: first_s + 240 * token_s, v.CHANCE: chance,
        v.SLOWDOWN_S: slowdown(own, 0.0, 150.0, 96.0), v.LOAD_S: 5 * token_s,
        v.KV_USE: 0.25, v.KV_TOKENS: 5000, v.CACHED: 0.64, v.UNCACHED: 54, v.CACHED_AGE_S: 7, v.REUSE_S: 90,
        v.PREFILL: 700, v.RUNNING: 3, v.WAITING: 2, v.HELD_TIGHTER: 9, v.HELD_LOOSER: 6, v.SENT_SINCE: 0,
        v.OUT_THERE: 0, v.COST: cost, v.UTILITY: chance - cost, v.STAKE: 7, v.PACE: 0, v.RECORD: 0, v.OVERDUE: 0,
        v.AGE_S: 0.5, v.DUEL_RATE: 0.5, v.REFUSED: 0,
    }  # fmt: skip
    np.testing.assert_allclose(row[list(expected)], list(expected.values()), rtol=1e-6)


def test_a_peer() -> None:
    adverts = np.array([advert(AD_STAKE=9) for _ in range(4)])
    adverts[3] = advert(AD_TIME_S=NOW_S - 2, AD_RUNNING=4, AD_WAITING=1, AD_KV_TOKENS=15_000, AD_STAKE=2.5)
    adverts[3, k.AD_TARIFF : k.AD_TARIFF + 3] = 1, 0.25, 4
    adverts[3, k.AD_HELD : k.AD_HELD + 3] = 1, 2, 4
    peer_stats = k.make_peer_stats(4)
    peer_stats[1:3] = 77.0  # of others
    for _ in range(3):
        k.on_sent(peer_stats[3], adverts[3])
    k.on_ended(peer_stats[3])
    k.on_refused(peer_stats[3], adverts[3, k.AD_TIME_S])
    k.on_answer(peer_stats[3], 9.0, 3.0)
    k.on_progress(peer_stats[3], 8.0, 2.0, 0.01, 0)
    peer_stats[3, k.DUELS_WON] = 2
    views = see(adverts=adverts, peer_stats=peer_stats, candidates=[3], prefix=[0, 64], prefix_age_s=[0, 30])
    first_s, token_s = expect(adverts[3], 2.0, 150.0, 64.0)
    first_s += 0.05  # a round trip
    delivery = 801 / 200 * math.sqrt(3)
    chance = chance_on_time(DEADLINES[2], 5.0, first_s * delivery, token_s * delivery, 200.0, 0.6, 1000.0)
    assert 0.01 < chance < 0.99
    cost = (0.086 * 1 + 0.064 * 0.25 + 0.24 * 4) / 2
    expected = {
        v.OWN: 0, v.FIRST_TOKEN_S: first_s, v.TOKEN_S: token_s, v.FINISH_S: first_s + 240 * token_s, v.CHANCE: chance,
        v.SLOWDOWN_S: slowdown(adverts[3], 2.0, 150.0, 64.0), v.LOAD_S: 7 * token_s,
        v.KV_USE: 0.75, v.KV_TOKENS: 15_000, v.CACHED: 64 / 150, v.UNCACHED: 86,
        v.CACHED_AGE_S: 30, v.RUNNING: 4, v.WAITING: 1, v.HELD_TIGHTER: 5, v.HELD_LOOSER: 2, v.SENT_SINCE: 2,
        v.OUT_THERE: 2, v.COST: cost, v.UTILITY: chance - cost, v.STAKE: 2.5, v.PACE: math.log(801 / 200),
        v.RECORD: math.log(3) / 2, v.OVERDUE: 6, v.AGE_S: 2, v.DUEL_RATE: 0.75, v.REFUSED: 1,
    }  # fmt: skip
    np.testing.assert_allclose(views.nodes[1][list(expected)], list(expected.values()), rtol=1e-6)
    assert not views.nodes[2:].any()
    per_request = see(adverts=adverts, peer_stats=peer_stats, candidates=[3], payment=PER_REQUEST)
    assert per_request.nodes[1, v.COST] == 0.5


@pytest.mark.parametrize(
    ("klass", "held_tighter", "held_looser", "looseness"), [(0, 1, 6, 0), (1, 7, 0, 1), (2, 5, 2, 0.5)]
)
def test_tighter_and_looser_go_by_deadline(klass: int, held_tighter: int, held_looser: int, looseness: float) -> None:
    own = advert()
    own[k.AD_HELD : k.AD_HELD + 3] = 1, 2, 4
    views = see(own=own, klass=klass)
    assert views.nodes[0, [v.HELD_TIGHTER, v.HELD_LOOSER]].tolist() == [held_tighter, held_looser]
    assert views.request[v.LOOSENESS] == looseness


def test_the_request() -> None:
    request = see(candidates=[1, 2, 3], refused=0b101, turn=4, last_s=NOW_S - 17).request
    np.testing.assert_allclose(request, [150, 4, 12, 240, 0.6, 2, 5, 25, 55, 0.5, 2, 3], rtol=1e-6)
    late = see(arrival_s=NOW_S - 70, klass=0).request
    assert late[[v.WAITED_S, v.FIRST_SLACK_S, v.LAST_SLACK_S]].tolist() == [70, -60, -50]


def test_one_class_has_no_looseness() -> None:
    views = see(known=KNOWN[:1], deadlines=DEADLINES[:1], klass=0)
    assert views.request[v.LOOSENESS] == 0


@pytest.mark.parametrize(
    ("changes", "legal"),
    [
        ({}, [HOLD, LOCAL, 2, 3]),
        ({"arrival_s": NOW_S - 59.9}, [HOLD, LOCAL, 2, 3]),
        ({"arrival_s": NOW_S - 60.0}, [LOCAL, 2, 3]),
        ({"arrival_s": NOW_S - 60.0, "klass": 1}, [HOLD, LOCAL, 2, 3]),
        ({"candidates": []}, [HOLD, LOCAL]),
        ({"candidates": [1, 2, 3]}, [HOLD, LOCAL, 2, 3, 4]),
        ({"candidates": [1, 2, 3], "refused": 0b010}, [HOLD, LOCAL, 2, 4]),
        ({"candidates": [1, 2, 3], "refused": 0b111, "arrival_s": NOW_S - 99}, [LOCAL]),
        # The price is 2 a thousand tokens of output, the longest output of the class 1000 tokens.
        ({"credit": 2 * MICRO}, [HOLD, LOCAL, 2, 3]),
        ({"credit": 2 * MICRO - 1}, [HOLD, LOCAL]),
        ({"credit": 2 * MICRO, "klass": 1}, [HOLD, LOCAL]),
        ({"credit": 2 * MICRO, "klass": 1, "payment": PER_REQUEST}, [HOLD, LOCAL, 2, 3]),
    ],
)
def test_legal_routes(changes: dict[str, Any], legal: list[int]) -> None:
    assert np.flatnonzero(see(**changes).routes).tolist() == legal


def test_a_candidate_too_dear_is_masked_alone() -> None:
    adverts = np.array([advert(AD_OUTPUT_PRICE=price) for price in (0.0, 3.0, 1.0, 5.0)])
    routes = see(adverts=adverts, candidates=[1, 2, 3], credit=4 * MICRO).routes
    assert np.flatnonzero(routes).tolist() == [HOLD, LOCAL, 2, 3]


def test_ranks_by_hand() -> None:
    # Idle speeds: own 10 ms, peers 5, 20 and 10. The fastest is full with a queue and finishes last.
    adverts = np.array([advert(AD_WEIGHT_S=w) for w in (0.010, 0.005, 0.020, 0.010)])
    adverts[1, [k.AD_RUNNING, k.AD_WAITING]] = 8, 40
    nodes = see(adverts=adverts, candidates=[1, 2, 3]).nodes
    third = np.float32(1 / 3)
    assert nodes[:4, v.SPEED_RANK].tolist() == [third, 0, 1, third]
    # The other equal node is a round trip away.
    assert nodes[:4, v.FINISH_RANK].tolist() == [0, 1, np.float32(2 / 3), third]
    alone = see(candidates=[]).nodes[0]
    assert (alone[v.SPEED_RANK], alone[v.FINISH_RANK]) == (0, 0)


def random_world(seed: int, size: int, reckless: bool) -> dict[str, Any]:
    """Distinct nodes; `reckless` goes far beyond every range, as liars and long waits do."""
    rng = np.random.default_rng(seed)
    far = 1000.0 if reckless else 1.0
    adverts = np.array([advert() for _ in range(size)])
    adverts[:, k.AD_TIME_S] = NOW_S - rng.uniform(0, 10 * far, size)
    adverts[:, k.AD_RUNNING] = rng.integers(0, 9, size) * far
    adverts[:, k.AD_WAITING] = rng.choice([0, 0, 1, 5, 100], size) * far
    adverts[:, k.AD_KV_TOKENS] = rng.uniform(0, 20_000 * far, size)
    adverts[:, k.AD_TARIFF : k.AD_TARIFF + 3] = rng.uniform(0, 5 * far, (size, 3))
    adverts[:, k.AD_STAKE] = rng.choice([0.0, 1.0, 4.0], size) * far
    adverts[:, k.AD_HELD : k.AD_HELD + 3] = rng.integers(0, 9, (size, 3)) * far
    adverts[:, k.AD_WEIGHT_S] = rng.uniform(0.001, 0.05, size) * far
    peer_stats = k.make_peer_stats(size)
    peer_stats[:, k.SENT] = rng.integers(0, 5, size) * far
    peer_stats[:, k.SENT_AD_S] = np.where(rng.random(size) < 0.5, adverts[:, k.AD_TIME_S], k.NO_TIME)
    peer_stats[:, k.OUT] = rng.integers(0, 9, size) * far
    peer_stats[:, k.STREAMED] = rng.uniform(0, 1e4 * far, size)
    peer_stats[:, k.PROMISED] = peer_stats[:, k.STREAMED] * rng.uniform(0, 2 * far, size)
    peer_stats[:, k.OVERDUE_S] = rng.uniform(0, 100 * far, size)
    peer_stats[:, k.RECORD] = rng.uniform(-5, 5, size) * far
    peer_stats[:, k.RECORD_WEIGHT] = rng.uniform(0, 10, size)
    peer_stats[:, k.DUELS_WON : k.PEER_STATS_SIZE] = rng.integers(0, 5, (size, 2))
    return {
        "own": adverts[0].copy(),
        "adverts": adverts,
        "peer_stats": peer_stats,
        "candidates": rng.permutation(np.arange(1, size))[: rng.integers(0, min(size, CANDIDATES + 1))],
        "refused": int(rng.integers(0, 2**CANDIDATES)),
        "credit": int(rng.uniform(0, 5 * far) * MICRO),
        "rtt_s": rng.uniform(0, 0.3) * far,
        "prompt": int(rng.uniform(1, 4000 * far)),
        "arrival_s": NOW_S - rng.uniform(0, 100 * far),
        "klass": int(rng.integers(0, 3)),
        "payment": int(rng.choice([LATENESS, QUOTED, PER_REQUEST])),
    }


worlds = st.builds(random_world, st.integers(0, 2**32), st.integers(1, 14), st.booleans())


@settings(max_examples=300, deadline=None)
@given(world=worlds)
def test_every_feature_is_in_its_range(world: dict[str, Any]) -> None:
    views = see(**world)
    for values, features in ((views.nodes, v.NODE_FEATURES), (views.request, v.REQUEST_FEATURES)):
        low, high = v.bounds(features)
        assert np.isfinite(values).all() and (values >= low).all() and (values <= high).all()
        normal = v.normalise(values, features)
        assert normal.dtype == np.float32 and normal.max() <= 1 + 1e-6
        lowest = np.array([-4 / 3 if f.name == "utility" else -1.0 for f in features])  # its range is longer below 0
        assert (normal >= lowest - 1e-3).all()
    count = len(world["candidates"])
    last_deadline_s = KNOWN[world["klass"], CLASS_LAST_DEADLINE_S]
    assert views.routes[LOCAL] == 1 and views.routes[HOLD] == (NOW_S - world["arrival_s"] < last_deadline_s)
    assert set(views.routes.tolist()) <= {0, 1} and not views.routes[FIRST_CANDIDATE + count :].any()
    assert not views.nodes[1 + count :].any()
    assert views.nodes[: 1 + count, v.OWN].tolist() == [1] + [0] * count
    finish_s = views.nodes[: 1 + count, v.FINISH_S]
    earlier = (finish_s[None, :] < finish_s[:, None]).sum(axis=1)
    np.testing.assert_allclose(views.nodes[: 1 + count, v.FINISH_RANK], earlier / max(1, count), rtol=1e-6)


@settings(max_examples=150, deadline=None)
@given(world=worlds, data=st.data())
def test_the_order_of_candidates_is_the_order_of_rows(world: dict[str, Any], data: st.DataObject) -> None:
    count = len(world["candidates"])
    order = list(data.draw(st.permutations(range(count))))
    refused = sum(1 << new for new, old in enumerate(order) if world["refused"] >> old & 1)
    first = see(**world)
    second = see(**world | {"candidates": world["candidates"][order], "refused": refused})
    np.testing.assert_array_equal(second.nodes[0], first.nodes[0])
    np.testing.assert_array_equal(second.nodes[1 : 1 + count], first.nodes[1 : 1 + count][order])
    ends = slice(FIRST_CANDIDATE, FIRST_CANDIDATE + count)
    np.testing.assert_array_equal(second.routes[ends], first.routes[ends][order])
    np.testing.assert_array_equal(second.request, first.request)


@settings(max_examples=150, deadline=None)
@given(world=worlds)
def test_candidates_do_not_change_each_other_but_for_ranks(world: dict[str, Any]) -> None:
    whole = see(**world)
    kept = [f for f in range(len(v.NODE_FEATURES)) if f not in (v.FINISH_RANK, v.SPEED_RANK)]
    for slot, peer in enumerate(world["candidates"]):
        alone = see(**world | {"candidates": [peer], "refused": world["refused"] >> slot & 1})
        np.testing.assert_array_equal(alone.nodes[1, kept], whole.nodes[1 + slot, kept])
        assert alone.routes[FIRST_CANDIDATE] == whole.routes[FIRST_CANDIDATE + slot]


def test_a_view_without_a_request() -> None:
    views = v.make_views()
    for array in views:
        array[...] = 99
    own = advert(
        AD_TIME_S=NOW_S - 0.5, AD_RUNNING=3, AD_WAITING=2, AD_KV_TOKENS=5000, AD_STAKE=7, AD_PREFILL=700, AD_REUSE_S=90
    )
    p, a, q = records(1, PROVIDER), records(1, AGREEMENT), records(1, REQUEST)
    reset_provider(p)
    p["own"], p["known"][0, 0] = own, KNOWN[0]
    peers = k.Peers(np.zeros((1, k.ADVERT_SIZE)), k.make_peer_stats(1), np.zeros(1, np.int64))
    v.write_view(views, p[0], a[0], q, peers, NOW_S, SCRATCH)
    assert np.flatnonzero(views.me).tolist() == [v.PEER_PRICE]
    expected = np.zeros(len(v.NODE_FEATURES))
    expected[[v.OWN, v.KV_USE, v.RUNNING, v.WAITING, v.STAKE, v.AGE_S, v.DUEL_RATE]] = 1, 0.25, 3, 2, 7, 0.5, 0.5
    expected[[v.KV_TOKENS, v.PREFILL, v.REUSE_S]] = 5000, 700, 90
    np.testing.assert_allclose(views.nodes[0], expected)
    assert not views.nodes[1:].any() and not views.request.any()
    assert np.flatnonzero(views.routes).tolist() == [HOLD]


def test_the_provider_itself() -> None:
    p, a, q = records(1, PROVIDER), records(1, AGREEMENT), records(1, REQUEST)
    reset_requests(q)
    p["own"], p["known"][0, :3] = advert(), KNOWN
    a["n_classes"], a["n_deadlines"], a["deadlines"][0, :3, :2] = 3, 2, DEADLINES
    peers = k.Peers(np.zeros((1, k.ADVERT_SIZE)), k.make_peer_stats(1), np.zeros(1, np.int64))
    names = ["head", "advert_due", "held", "arrival_rate", "remote", "credit", "markup", "cost", "peer_price",
             "heard", "sold"]  # fmt: skip
    seen = []
    for values in (
        (0, 0, 3, (0.25, 0, 0, 0), 5, 7_500_000, 0.3, COST, 0.3, 7, 0.125),
        (-1, 1, 10**6, 1e9, 10**6, 10**18, 1e9, 1e9, np.inf, 10**6, 1e9),
    ):
        for name, value in zip(names, values, strict=True):
            p[name] = value
        views = v.make_views()
        v.write_view(views, p[0], a[0], q, peers, NOW_S, SCRATCH)
        seen.append(views.me)
    usual = 200 * 3 / 90  # value of 200 tokens of the first class
    np.testing.assert_allclose(seen[0], [1, 0, 3, 0.25, 5, 7.5, 0.3, 0.11 / usual, 0.3 / usual, 7, 0.125], rtol=1e-6)
    np.testing.assert_array_equal(seen[1], v.bounds(v.SELF_FEATURES)[1] * [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    assert np.abs(v.normalise(np.array(seen), v.SELF_FEATURES)).max() <= 1 + 1e-6


@pytest.mark.parametrize("features", [v.NODE_FEATURES, v.REQUEST_FEATURES, v.SELF_FEATURES])
def test_normalise_maps_ranges_to_one_and_keeps_order_and_sign(features: tuple[v.Feature, ...]) -> None:
    low, high = v.bounds(features)
    np.testing.assert_allclose(v.normalise(high, features), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(np.sign(v.normalise(low, features)), np.sign(low))
    assert not v.normalise(np.zeros_like(low), features).any()
    steps = v.normalise(np.linspace(low, high, 50).astype(np.float32), features)
    assert (np.diff(steps, axis=0) > 0).all()


def test_normalise_by_hand() -> None:
    row = np.zeros(len(v.NODE_FEATURES), np.float32)
    row[[v.FINISH_S, v.TOKEN_S, v.RECORD, v.KV_USE]] = 99, 0.03, -2.5, 0.4
    out = v.normalise(row[None], v.NODE_FEATURES)[0]
    expected = math.log(100) / math.log(10_001), math.log(31) / math.log(1001), -0.5, 0.4
    np.testing.assert_allclose(out[[v.FINISH_S, v.TOKEN_S, v.RECORD, v.KV_USE]], expected, rtol=1e-6)
