"""Policies by hand: one contract for all of them, then what each is for, on views made by hand."""

import pickle
from typing import Any

import numpy as np
import pytest

from wwwserve.agents import view as v
from wwwserve.agents.decision import (
    ADMISSION_SIZE,
    CANDIDATES,
    FIRST_CANDIDATE,
    HOLD,
    IF_IT_PAYS,
    KEEP,
    LOCAL,
    NO_DIRECTION,
    ROUTES,
    WHAT_PAYS,
    Actions,
    accept,
    make_actions,
)
from wwwserve.agents.kernel import Floats
from wwwserve.agents.rules import RULES, Rule
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import Views, make_views

A, B, C, D = range(FIRST_CANDIDATE, FIRST_CANDIDATE + 4)  # routes to candidates
INF = np.inf


def random_views(seed: int, *shape: int) -> Views:
    """Views anywhere in the ranges, with and without a request, refusals and leave to hold."""
    rng = np.random.default_rng(seed)
    views = make_views(*shape)
    for values, features in zip(views, (v.NODE_FEATURES, v.REQUEST_FEATURES, v.SELF_FEATURES), strict=False):
        low, high = v.bounds(features)
        # Most ranges are much longer than where decisions change.
        values[...] = np.clip(
            rng.choice([0.01, 0.1, 1.0], values.shape) * rng.uniform(low, high, values.shape), low, high
        )
    views.nodes[..., [v.KV_USE, v.CHANCE]] = rng.random((*shape, v.NODES, 2))
    views.nodes[..., v.WAITING] = rng.choice([0, 0, 3], (*shape, v.NODES))
    views.me[..., v.HAS_REQUEST] = rng.random(shape) < 0.9
    count = rng.integers(0, CANDIDATES + 1, shape)
    views.request[..., v.N_CANDIDATES] = count
    views.routes[...] = (rng.random((*shape, ROUTES)) < 0.7) & (np.arange(ROUTES) < FIRST_CANDIDATE + count[..., None])
    views.routes[..., LOCAL] = 1
    views.routes[views.me[..., v.HAS_REQUEST] == 0] = np.arange(ROUTES) == HOLD
    views.nodes[np.arange(v.NODES) > count[..., None]] = 0
    return views


def decide(rule: Rule, views: Views, uniforms: Floats, active: Any = None) -> Actions:
    shape = views.routes.shape[:-1]
    actions = make_actions(*shape)
    rule.decide(views, np.ones(shape, np.bool_) if active is None else active, uniforms, actions)
    return actions


def at(views: Views, place: tuple[int, ...]) -> Views:
    return Views(*(array[place].copy() for array in views))


# The contract.

every_rule = pytest.mark.parametrize("name", RULES)
SHAPE = (40, 5)


@every_rule
def test_routes_are_legal(name: str) -> None:
    views = random_views(1, *SHAPE)
    uniforms = np.random.default_rng(2).random((*SHAPE, 4))
    actions = decide(Rule(name), views, uniforms)
    assert np.take_along_axis(views.routes, actions.route[..., None], -1).all()
    assert (actions.route[views.me[..., v.HAS_REQUEST] == 0] == HOLD).all()
    assert (actions.direct == NO_DIRECTION).all()
    if name != "single":
        assert (actions.route >= FIRST_CANDIDATE).any()


@every_rule
def test_a_batch_and_one_by_one_agree(name: str) -> None:
    views = random_views(3, *SHAPE)
    uniforms = np.random.default_rng(4).random((*SHAPE, 4))
    rule = Rule(name)
    batch = decide(rule, views, uniforms)
    for place in np.ndindex(*SHAPE):
        one = decide(rule, at(views, place), uniforms[place])
        assert (one.route, one.markup) == (batch.route[place], batch.markup[place])
        np.testing.assert_array_equal(one.admission, batch.admission[place])


@every_rule
def test_rows_without_a_candidate_are_not_read(name: str) -> None:
    views = random_views(5, *SHAPE)
    uniforms = np.random.default_rng(6).random((*SHAPE, 4))
    before = decide(Rule(name), views, uniforms)
    empty = np.arange(v.NODES) > views.request[..., None, v.N_CANDIDATES][..., 0, None]
    assert empty.any()
    low, high = v.bounds(v.NODE_FEATURES)
    for junk in (low, high):  # the most tempting of values, for one rule or another
        views.nodes[empty] = junk
        after = decide(Rule(name), views, uniforms)
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)


@every_rule
def test_only_the_active_are_decided_for(name: str) -> None:
    views = random_views(7, *SHAPE)
    uniforms = np.random.default_rng(8).random((*SHAPE, 4))
    active = np.random.default_rng(9).random(SHAPE) < 0.5
    everyone = decide(Rule(name), views, uniforms)
    actions = make_actions(*SHAPE)
    for array in actions:
        array[...] = 77
    Rule(name).decide(views, active, uniforms, actions)
    for some, every in zip(actions[:3], everyone[:3], strict=True):
        assert (some[~active] == 77).all()
        np.testing.assert_array_equal(some[active], every[active])
    assert (actions.direct == 77).all()


@every_rule
def test_decisions_depend_on_views_and_uniforms_alone(name: str) -> None:
    views = random_views(10, *SHAPE)
    uniforms = np.random.default_rng(11).random((*SHAPE, 4))
    given = [array.copy() for array in (*views, uniforms)]
    rule = Rule(name)
    first = decide(rule, views, uniforms)
    second = decide(rule, views, uniforms)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    for array, copy in zip((*views, uniforms), given, strict=True):
        np.testing.assert_array_equal(array, copy)
    tosses_coins = name in {"random", "power_of_two", "www_serve"}
    other = decide(rule, views, np.random.default_rng(12).random((*SHAPE, 4)))
    assert (other.route != first.route).any() == tosses_coins


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_same_arrays_with_other_contents_are_decided_anew(order: Any) -> None:
    rule, rng = Rule("random"), np.random.default_rng(12)
    views = Views(*(np.array(array, order=order) for array in random_views(13, *SHAPE)))
    uniforms, actions = np.array(rng.random((*SHAPE, 4)), order=order), make_actions(*SHAPE)
    active = np.array(rng.random(SHAPE) < 0.5, order=order)
    for seed in range(14, 18):
        for array, other in zip(views, random_views(seed, *SHAPE), strict=True):
            array[...] = other
        uniforms[...] = rng.random(uniforms.shape)
        active[...] = rng.random(SHAPE) < 0.5
        rule.decide(views, active, uniforms, actions)
        expected = decide(Rule("random"), views, uniforms).route
        np.testing.assert_array_equal(actions.route[active], expected[active])


def test_a_rule_that_has_decided_can_be_sent_to_another_process() -> None:
    rule, views, uniforms = Rule("random"), random_views(19, *SHAPE), np.random.default_rng(20).random((*SHAPE, 4))
    actions, active = make_actions(*SHAPE), np.ones(SHAPE, np.bool_)
    for _ in range(2):
        rule.decide(views, active, uniforms, actions)
    sent = pickle.loads(pickle.dumps(rule))
    np.testing.assert_array_equal(decide(sent, views, uniforms).route, actions.route)


@every_rule
def test_settings_are_checked(name: str) -> None:
    rule = Rule(name)
    assert rule.name == name
    assert rule.settings == {key: setting.default for key, setting in RULES[name].items()}
    with pytest.raises(ValueError, match=f"rule {name} has no setting 'spin', it has: "):
        Rule(name, {"spin": 1})
    for key, setting in RULES[name].items():
        assert 0 <= setting.default <= setting.high
        assert Rule(name, {key: setting.high}).settings == rule.settings | {key: setting.high}
        for bad in (-0.1, setting.high * 1.1, float("nan")):
            with pytest.raises(ValueError, match=f"rule {name}: setting {key} is {bad}, expected 0 to "):
                Rule(name, {key: bad})


@every_rule
def test_every_setting_is_read(name: str) -> None:
    """In the extreme, each changes what is decided or accepted."""
    views = random_views(13, 400)
    views.request[..., v.LAST_SLACK_S] = views.nodes[:, 0, v.FINISH_S] * np.linspace(0.5, 8, 400)
    uniforms = np.random.default_rng(14).random((400, 4))
    for key, setting in RULES[name].items():
        also = {"first_weight": 1.0} if key == "first_target_s" else {}  # read only with it
        usual = decide(Rule(name, also), views, uniforms)
        extremes = 0.0, min(setting.high, (5000 if also else 10) * max(1.0, setting.default))
        changed = [decide(Rule(name, also | {key: x}), views, uniforms) for x in extremes]
        assert any((a != b).any() for actions in changed for a, b in zip(usual, actions, strict=True)), key


def test_an_unknown_rule_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown rule 'best', expected one of single, random, .*best_value"):
        Rule("best")


def test_actions_that_would_be_lost_are_refused() -> None:
    views = random_views(15, 3)
    wide = make_actions(3, 2)
    with pytest.raises(ValueError, match="contiguous"):
        Rule("single").decide(views, np.ones(3, np.bool_), np.zeros((3, 4)), Actions(*(array[:, 0] for array in wide)))


# Each rule, by hand.

PLAIN = {
    "accept_wait_s": 30.0, "own_margin": 1.0, "slowdown": 0.0, "load": 0.0, "pace": 1.0, "record": 1.0, "overdue": 1.0,
    "urgency": 2.0, "cap_fast": 0.3, "cap_slow": 0.8, "markup": 0.0, "pays": 1.0, "keep": 0.0,
}  # fmt: skip


def by_hand(name: str, settings: dict[str, float] | None = None) -> Rule:
    """A rule whose settings do not follow the tuning."""
    return Rule(name, {key: x for key, x in PLAIN.items() if key in RULES[name]} | (settings or {}))


NODE = {"finish_s": 10.0, "chance": 0.5, "kv_use": 0.5, "duel_rate": 0.5}
REQUEST = {"value": 1.0, "last_slack_s": 100.0, "output": 200.0}
COLUMNS = [{f.name: k for k, f in enumerate(fs)} for fs in (v.NODE_FEATURES, v.REQUEST_FEATURES, v.SELF_FEATURES)]


def scene(own: dict[str, float], *peers: dict[str, float], refused: tuple[int, ...] = (), **request: float) -> Views:
    """The view of a provider with a request; `refused` are routes."""
    views = make_views()
    for row, node in zip(views.nodes, (own, *peers), strict=False):
        for name, value in (NODE | node).items():
            row[COLUMNS[0][name]] = value
    for name, value in (REQUEST | request | {"candidates": len(peers)}).items():
        views.request[COLUMNS[1][name]] = value
    views.me[v.HAS_REQUEST] = 1
    views.routes[: FIRST_CANDIDATE + len(peers)] = 1
    views.routes[list(refused)] = 0
    return views


def route(rule: Rule, views: Views, *uniforms: float) -> int:
    return int(decide(rule, views, np.array([*uniforms, 0.5, 0.5, 0.5, 0.5][:4])).route)


def admission(rule: Rule) -> Floats:
    return decide(rule, scene({}), np.full(4, 0.5)).admission


def test_single_runs_everything_here_and_is_open_to_others() -> None:
    assert route(by_hand("single"), scene({"finish_s": 9999, "kv_use": 1}, {"finish_s": 1})) == LOCAL
    assert admission(by_hand("single")).tolist() == [INF, INF, 1, 0, 0, 0]


def test_random_takes_each_legal_route_as_often() -> None:
    views = scene({}, {}, {}, {}, refused=(B,))
    got = [route(by_hand("random"), views, u) for u in np.arange(0.005, 1, 0.01)]
    routes, counts = np.unique(got, return_counts=True)
    assert routes.tolist() == [LOCAL, A, C]
    assert counts.tolist() == [33, 34, 33] or sorted(counts) == [33, 33, 34]
    assert route(by_hand("random"), views, 1 - 2**-33) == C


def test_power_of_two_takes_the_less_loaded_of_two() -> None:
    loads = {"running": 2, "waiting": 1}, {"running": 1, "waiting": 5}, {"running": 2}, {"running": 1, "sent": 3}
    views = scene(*loads)  # 3, 6, 2, 4: own, A, B, C
    first = {LOCAL: 0.1, A: 0.3, B: 0.6, C: 0.9}
    best = {(a, b): route(by_hand("power_of_two"), views, first[a], first[b]) for a in first for b in first}
    order = [B, LOCAL, C, A]
    assert best == {(a, b): min(a, b, key=order.index) for a in first for b in first}


FULL = {"kv_use": 0.9}


def test_www_serve_runs_here_below_its_target() -> None:
    rule = by_hand("www_serve")
    assert route(rule, scene({"kv_use": 0.6499}, {}), 0.01) == LOCAL
    assert route(rule, scene({"kv_use": 0.6501}, {}), 0.01) == A
    assert route(by_hand("www_serve", {"target_kv_use": 0.9}), scene({"kv_use": 0.8}, {}), 0.01) == LOCAL


def test_www_serve_offloads_queues_and_waits_with_its_chances() -> None:
    rule, views = by_hand("www_serve"), scene(FULL, {"finish_s": 999}, {"finish_s": 1})
    assert route(rule, views, 0.79, 0.01) == A  # in the order drawn, whatever is expected of it
    assert route(rule, views, 0.81, 0.19) == LOCAL
    assert route(rule, views, 0.81, 0.21) == HOLD
    rule = by_hand("www_serve", {"offload": 0.3, "queue": 0.6})
    assert route(rule, views, 0.29) == A
    assert [route(rule, views, 0.31, u) for u in (0.59, 0.61)] == [LOCAL, HOLD]


def test_www_serve_probes_three_at_most() -> None:
    rule, peers = by_hand("www_serve"), [{}, {}, {}, {}]
    assert route(rule, scene(FULL, *peers, refused=(A,)), 0.5, 0.9) == B
    assert route(rule, scene(FULL, *peers, refused=(A, B)), 0.5, 0.9) == C
    assert route(rule, scene(FULL, *peers, refused=(A, B, C)), 0.5, 0.9) == HOLD
    assert route(rule, scene(FULL, *peers, refused=(A, B, C)), 0.5, 0.1) == LOCAL
    assert route(by_hand("www_serve", {"probes": 4}), scene(FULL, *peers, refused=(A, B, C)), 0.5, 0.9) == D
    assert route(by_hand("www_serve", {"probes": 0}), scene(FULL, *peers), 0.5, 0.9) == HOLD
    assert route(rule, scene(FULL), 0.5, 0.9) == HOLD


def test_www_serve_runs_here_what_may_wait_no_longer() -> None:
    assert route(by_hand("www_serve"), scene(FULL, {}, refused=(HOLD,)), 0.9, 0.9) == LOCAL


def test_www_serve_accepts_below_its_target_with_nothing_held_by_chance() -> None:
    own = admission(by_hand("www_serve"))
    assert own.size == ADMISSION_SIZE
    assert accept(own, 500.0, 0.64, 0, -1.0, 0.79)  # however long the wait
    assert not accept(own, 0.0, 0.66, 0, -1.0, 0.1)
    assert not accept(own, 0.0, 0.1, 1, -1.0, 0.1)
    assert not accept(own, 0.0, 0.1, 0, -1.0, 0.81)
    other = admission(by_hand("www_serve", {"target_kv_use": 0.3, "accept": 0.5}))
    assert not accept(other, 0.0, 0.31, 0, -1.0, 0.1) and not accept(other, 0.0, 0.1, 0, -1.0, 0.51)


def test_earliest_finish_takes_the_minimum() -> None:
    rule = by_hand("earliest_finish")
    views = scene({"finish_s": 30}, {"finish_s": 20}, {"finish_s": 12}, {"finish_s": 15})
    assert route(rule, views) == B
    assert route(rule, scene({"finish_s": 11}, {"finish_s": 20}, {"finish_s": 12})) == LOCAL
    views.routes[B] = 0
    assert route(rule, views) == C
    assert route(by_hand("earliest_finish", {"own_margin": 0.35}), views) == LOCAL  # 10.5 s here
    assert route(rule, scene({"finish_s": 20}, {"finish_s": 20})) == LOCAL  # a tie stays


@pytest.mark.parametrize(
    "name", ["earliest_finish", "earliest_finish_trust", "deadline_first", "rank_cap", "trust_cap"]
)
def test_rules_by_estimate_accept_up_to_a_wait(name: str) -> None:
    assert admission(by_hand(name, {"accept_wait_s": 7})).tolist() == [7, INF, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "name", ["earliest_finish", "earliest_finish_trust", "deadline_first", "rank_cap", "trust_cap"]
)
def test_slowdown_counts_the_delay_to_those_beside(name: str) -> None:
    views = scene({"finish_s": 30}, {"finish_s": 10, "slowdown_s": 12}, {"finish_s": 15, "slowdown_s": 4})
    assert route(by_hand(name), views) == A
    assert route(by_hand(name, {"slowdown": 0.5}), views) == A  # 16 and 17
    assert route(by_hand(name, {"slowdown": 1}), views) == B  # 22 and 19
    assert route(by_hand(name, {"slowdown": 10}), views) == LOCAL  # 130 and 55


@pytest.mark.parametrize(
    "name", ["earliest_finish", "earliest_finish_trust", "deadline_first", "rank_cap", "trust_cap"]
)
def test_load_counts_those_who_are_there(name: str) -> None:
    views = scene({"finish_s": 30}, {"finish_s": 10, "load_s": 3}, {"finish_s": 15, "load_s": 1})
    assert route(by_hand(name, {"load": 2}), views) == A  # 16 and 17
    assert route(by_hand(name, {"load": 3}), views) == B  # 19 and 18
    assert route(by_hand(name, {"load": 20}), views) == LOCAL  # 70 and 35


def test_slowdown_counts_under_a_cap_as_well() -> None:
    nodes = {"finish_s": 99, "kv_use": 0.9}, {"finish_s": 10, "slowdown_s": 12}, {"finish_s": 15, "slowdown_s": 4}
    views = scene(*({"kv_use": 0.2} | node for node in nodes), looseness=1, last_slack_s=1000)
    assert route(by_hand("rank_cap"), views) == A
    assert route(by_hand("rank_cap", {"slowdown": 1}), views) == B


@pytest.mark.parametrize("name", ["earliest_finish_trust", "trust_cap"])
def test_trust_discounts_each_kind_of_evidence(name: str) -> None:
    rule, plain = by_hand(name), by_hand("earliest_finish")
    own, honest = {"finish_s": 30}, {"finish_s": 20}
    for bad in ({"pace": 1.0}, {"record": 1.0}, {"overdue_s": 15.0}):
        views = scene(own, {"finish_s": 10} | bad, honest)
        assert route(plain, views) == A
        assert route(rule, views) == B  # 10 e = 27, or 10 + 15 = 25, is more than 20
        (key,) = bad
        ignored = by_hand(name, {key.removesuffix("_s"): 0})
        assert route(ignored, views) == A
    # Together they multiply, and being early earns nothing.
    assert route(rule, scene(own, {"finish_s": 10, "pace": 0.4, "record": 0.4}, honest)) == B
    assert route(rule, scene(own, {"finish_s": 10, "pace": 0.3, "record": 0.3}, honest)) == A
    assert route(rule, scene(own, {"finish_s": 21, "pace": -1, "record": -3}, honest)) == B
    assert route(rule, scene(own, {"finish_s": 10, "pace": 2}, {"finish_s": 12, "record": 2})) == LOCAL


def test_deadline_first_places_tight_work_at_once_and_loose_work_where_there_is_room() -> None:
    rule = by_hand("deadline_first")
    busy = scene({"finish_s": 50, "kv_use": 0.9}, {"finish_s": 20, "kv_use": 0.8})
    assert route(rule, busy) == A  # the tightest class
    busy.request[v.LOOSENESS] = 1
    assert route(rule, busy) == HOLD
    busy.request[v.LAST_SLACK_S] = 39  # less than twice 20 s
    assert route(rule, busy) == A
    loose = scene({"finish_s": 50}, {"finish_s": 20, "kv_use": 0.6}, looseness=1)
    assert route(rule, loose) == A
    loose.nodes[1, v.WAITING] = 1
    assert route(rule, loose) == HOLD


def test_rank_cap_keeps_fast_nodes_free_of_loose_work() -> None:
    rule = by_hand("rank_cap")
    fast, middle, slow = ({"speed_rank": rank} for rank in (0.0, 0.5, 1.0))  # caps 0.3, 0.55, 0.8

    def at_use(use: float, **request: float) -> Views:
        nodes = ({"finish_s": s, "kv_use": use} | node for s, node in ((15, middle), (10, fast), (40, slow)))
        return scene(*nodes, **request)

    assert [route(rule, at_use(use, looseness=0)) for use in (0.2, 0.5, 0.7, 0.9)] == [A] * 4
    assert [route(rule, at_use(use, looseness=1)) for use in (0.2, 0.5, 0.7, 0.9)] == [A, LOCAL, B, HOLD]
    assert route(rule, at_use(0.9, looseness=1, last_slack_s=19)) == A  # now or too late
    waiting = at_use(0.2, looseness=1)
    waiting.nodes[1, v.WAITING] = 1
    assert route(rule, waiting) == LOCAL
    assert route(by_hand("rank_cap", {"cap_fast": 0.8}), at_use(0.7, looseness=1)) == A


def test_rank_cap_never_holds_what_may_not_be_held() -> None:
    views = scene({"finish_s": 10, "kv_use": 0.9}, refused=(HOLD,), looseness=1)
    assert route(by_hand("rank_cap"), views) == route(by_hand("deadline_first"), views) == LOCAL


def test_trust_cap_without_trust_is_rank_cap() -> None:
    views, uniforms = random_views(21, 400), np.full((400, 4), 0.5)
    views.request[..., v.LAST_SLACK_S] = views.nodes[:, 0, v.FINISH_S] * np.linspace(0.5, 8, 400)
    views.nodes[..., v.WAITING] = 0
    blind = decide(by_hand("trust_cap", {"pace": 0, "record": 0, "overdue": 0}), views, uniforms)
    capped = decide(by_hand("rank_cap"), views, uniforms)
    for a, b in zip(blind, capped, strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(np.unique(capped.route)) >= {HOLD, LOCAL, A, B, C, D}
    assert (decide(by_hand("trust_cap"), views, uniforms).route != capped.route).mean() > 0.1


def test_trust_cap_without_classes_is_earliest_finish_trust() -> None:
    views, uniforms = random_views(22, 400), np.full((400, 4), 0.5)
    views.request[..., v.LOOSENESS] = 0
    settings = {"pace": 0.7, "record": 1.3, "overdue": 0.4, "own_margin": 0.8, "slowdown": 0.6, "load": 2.0}
    for a, b in zip(
        decide(by_hand("trust_cap", settings), views, uniforms),
        decide(by_hand("earliest_finish_trust", settings), views, uniforms),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    views.request[..., v.LOOSENESS] = 1
    routes = [decide(by_hand(name), views, uniforms).route for name in ("trust_cap", "earliest_finish_trust")]
    assert (routes[0] != routes[1]).any()


def test_trust_cap_holds_loose_work_back_from_a_peer_that_delivers_late() -> None:
    """Loose work goes to nodes under their cap, by times that evidence discounts."""
    nodes = {"finish_s": 60}, {"finish_s": 10, "pace": 1.0}, {"finish_s": 20}
    views = scene(*({"kv_use": 0.2, "speed_rank": 0.5} | node for node in nodes), looseness=1, last_slack_s=1000)
    assert route(by_hand("rank_cap"), views) == A
    assert route(by_hand("trust_cap"), views) == B  # 27 s, and 20 s
    views.request[v.LAST_SLACK_S] = 39  # less than twice 20 s: at once, to the earliest
    assert route(by_hand("trust_cap", {"cap_fast": 0, "cap_slow": 0}), views) == B
    views.request[v.LAST_SLACK_S] = 41
    assert route(by_hand("trust_cap", {"cap_fast": 0, "cap_slow": 0}), views) == HOLD


def test_best_value_weighs_cost_against_the_chance() -> None:
    rule = by_hand("best_value")
    views = scene({"utility": 0.2}, {"utility": -0.6, "finish_s": 1}, {"utility": 0.3})
    assert route(rule, views) == B
    views.routes[B] = 0
    assert route(rule, views) == LOCAL
    views.nodes[0, v.UTILITY] = -0.7
    assert route(rule, views) == A  # of what is lost, the least
    equal = scene({"finish_s": 30}, {"finish_s": 20}, {"finish_s": 10})
    assert route(rule, equal) == B


def test_best_value_takes_what_pays() -> None:
    np.testing.assert_array_equal(admission(by_hand("best_value")), WHAT_PAYS)
    assert admission(by_hand("best_value", {"pays": 0.25}))[IF_IT_PAYS] == 0.25
    assert all(admission(by_hand(name))[IF_IT_PAYS] == 0.0 for name in RULES if name != "best_value")


def test_only_best_value_sells_dearer_where_prompts_are_cached() -> None:
    assert admission(by_hand("best_value", {"keep": 0.5}))[KEEP] == 0.5
    assert all(admission(by_hand(name))[KEEP] == 0.0 for name in RULES)


@pytest.mark.parametrize(("markup", "chosen"), [(0.0, 0.0), (0.02, 0.0), (0.03, 0.05), (0.39, 0.3), (0.8, 0.8)])
def test_best_value_sells_at_the_nearest_markup(markup: float, chosen: float) -> None:
    actions = decide(by_hand("best_value", {"markup": markup}), scene({}), np.full(4, 0.5))
    assert MARKUPS[actions.markup] == chosen


@every_rule
def test_rules_sell_at_cost(name: str) -> None:
    markup = decide(Rule(name), random_views(16, 20), np.full((20, 4), 0.5)).markup
    assert (MARKUPS[markup] == 0.0).all()
