"""One provider in two worlds: a market and real nodes on a virtual clock make the same decisions, one by one.

Every decision on a request is compared, for every rule: when it is made and by whom, on which request, what the policy
sees, the random numbers it is given, and what it chooses; then where each request ran and how long it took. Sessions
are played by some policies, with all that engines cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from wwwserve.agents.decision import FIRST_CANDIDATE, HOLD, LOCAL, Actions
from wwwserve.agents.kernel import Bools, Floats
from wwwserve.agents.policy.bundle import DEFAULT_BUNDLE, SHIPPED
from wwwserve.agents.policy.bundle import load as load_bundle
from wwwserve.agents.protocol import MICRO
from wwwserve.agents.rules import RULES, Policy, Rule
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import CREDIT, HAS_REQUEST, REUSE_S, SELF_FEATURES, Views
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.scenario import load, parse
from wwwserve.envs.state import PROBES_REFUSED, SERVED_FOR_PEERS, MarketPlan, plan
from wwwserve.eval.live.simulation import loop as virtual
from wwwserve.eval.live.simulation.loop import VirtualLoop
from wwwserve.eval.live.simulation.nodes import NEVER_CAME, Node, Nodes, Outcome

TIME_S = 1e-6  # by which two worlds' times may differ
RELATIVE = 1e-5  # and numbers of a view


class Seen(NamedTuple):
    """One decision on a request."""

    time_s: float
    request: int
    view: np.ndarray[Any, np.dtype[np.float32]]  # nodes, request and self, flat
    routes: bytes  # that are legal
    uniforms: bytes
    route: int
    admission: bytes
    markup: int
    target: int  # provider to which the route leads; -1 for hold


class Course(NamedTuple):
    """What happened in one world."""

    decisions: list[list[Seen]]  # of each provider
    latency_s: Floats  # of each request
    executor: list[int]  # of each request
    refused: int  # offers
    served: list[int]  # peers' requests, by each provider
    credit: Floats  # [N, ACCOUNT_SIZE] of each provider in the end
    cached: int  # tokens of prompts that engines had


def _seen(time_s: float, request: int, views: Views, uniforms: Floats, actions: Actions, at: Any, target: int) -> Seen:
    view = np.concatenate([views.nodes[at].ravel(), views.request[at], views.me[at]])
    route, admission, markup = int(actions.route[at]), actions.admission[at].tobytes(), int(actions.markup[at])
    routes = views.routes[at].tobytes()
    return Seen(time_s, request, view, routes, uniforms[at].tobytes(), route, admission, markup, target)


def _target(route: int, row: int, candidates: list[int]) -> int:
    if route == HOLD:
        return -1
    return row if route == LOCAL else candidates[route - FIRST_CANDIDATE]


def in_market(planned: MarketPlan, policy: Policy) -> Course:
    """Play a plan in the market."""
    batch, count = MarketBatch([planned]), len(planned.profiles)
    actions, providers, requests = batch.actions(), batch.markets.providers[0], batch.markets.requests[0]
    seen: list[list[Seen]] = [[] for _ in range(count)]
    while not batch.over.all():
        policy.decide(batch.views, batch.active, batch.uniforms, actions)
        for i in np.flatnonzero(batch.active[0]).tolist():
            if batch.views.me[0, i, HAS_REQUEST]:
                head = int(providers[i]["head"])
                target = _target(int(actions.route[0, i]), i, requests[head]["candidates"].tolist())
                decision = _seen(float(batch.now_s[0]), head, batch.views, batch.uniforms, actions, (0, i), target)
                seen[i].append(decision)
        batch.step(actions)
    executor = np.where(requests["executor"] < 0, -1, requests["executor"])[: len(planned.traffic.time_s)].tolist()
    latency_s = np.nan_to_num((requests["answer_s"] - requests["arrival_s"])[: len(executor)], nan=np.inf)
    counts = providers["counts"]
    refused, served = int(counts[:, PROBES_REFUSED].sum()), counts[:, SERVED_FOR_PEERS].tolist()
    credit = batch.markets.accounts[0] / MICRO
    hit = int(batch.markets.engines[0]["hit_tokens"].sum())
    return Course(seen, latency_s, executor, refused, served, credit, hit)


class Recorder:
    """A node's policy that remembers what it is asked and what it answers."""

    def __init__(self, policy: Policy, loop: VirtualLoop) -> None:
        self.policy, self.name, self.loop = policy, policy.name, loop
        self.node: Node
        self.seen: list[Seen] = []

    def decide(self, views: Views, active: Bools, uniforms: Floats, actions: Actions) -> None:
        """See `Policy.decide`."""
        self.policy.decide(views, active, uniforms, actions)
        if views.me[0, HAS_REQUEST]:
            provider, nodes = self.node.provider, self.node.nodes
            request = provider.requests[int(provider.record["head"])]
            rows = [nodes.names.index(name) for name in provider.names]
            candidates = [rows[c] for c in request["candidates"][: int(request["n_candidates"])]]
            target = _target(int(actions.route[0]), self.node.row, candidates)
            number = self.node.nodes.arrived[float(request["arrival_s"])]
            self.seen.append(_seen(self.loop.time(), number, views, uniforms, actions, 0, target))


def _count(node: Node, name: str, **labels: str) -> int:
    return int(node.dispatcher.metrics.registry.get_sample_value(f"wwwserve_{name}", labels) or 0)


def on_nodes(planned: MarketPlan, policy: Policy, exact: bool = True) -> Course:
    """Play a plan by real nodes, which see what is cached on their own engines or, not `exact`, keep an index of it."""

    async def main(loop: VirtualLoop) -> Course:
        recorders: list[Recorder] = []

        def recorder(row: int) -> Policy:
            recorders.append(Recorder(policy, loop))
            return recorders[-1]

        nodes = Nodes(loop, planned, recorder, exact=exact)
        for each, node in zip(recorders, nodes.nodes, strict=True):
            each.node = node
        nodes.boot()
        outcomes: list[Outcome] = await nodes.play()
        assert not nodes.network.errors
        for each, out in zip(outcomes, planned.traffic.output.tolist(), strict=True):
            assert each == NEVER_CAME or (each.status, each.tokens) == (200, out)
        executor = [-1] * len(outcomes)
        for each in recorders:
            for seen in each.seen:
                executor[seen.request] = seen.target
        latency_s = np.array([each.latency_s for each in outcomes])
        refused = sum(_count(node, "offers_refused_total") for node in nodes.nodes)
        served = [_count(node, "remote_requests_ended_total", outcome="answered") for node in nodes.nodes]
        credit = nodes.bank.accounts / MICRO
        cached = sum(node.server.cached_tokens for node in nodes.nodes)
        nodes.close()
        return Course([each.seen for each in recorders], latency_s, executor, refused, served, credit, cached)

    course: Course = virtual.run(main)
    return course


# What is played. An engine holds about twenty of these requests, for a few seconds each.

DEFAULTS = {
    "model": "llama-2-7b", "gpu": "rtx-4090", "max_num_seqs": 32,
    "lengths": {
        "prompt": {"median": 450, "sigma": 0.5, "max": 1500}, "output": {"median": 150, "sigma": 0.6, "max": 600}
    },
}  # fmt: skip


def _scenario(duration_s: float, rates_per_s: list[float], **more: Any) -> dict[str, Any]:
    def provider(k: int, rate_per_s: float) -> dict[str, Any]:
        rates = [0.5 * rate_per_s, 2.0 * rate_per_s]
        traffic = {"kind": "mmpp", "rates_per_s": rates, "mean_dwell_s": [20, 10]}
        return {"name": f"p{k}", "traffic": traffic} | ({"gpu": "rtx-3090"} if k % 3 == 2 else {})

    return {
        "name": "parity", "duration_s": duration_s, "drain_s": 100_000, "defaults": DEFAULTS,
        "providers": [provider(k, rate_per_s) for k, rate_per_s in enumerate(rates_per_s)], **more,
    }  # fmt: skip


def paid(duration_s: float) -> dict[str, Any]:
    """Six providers, two classes, tariffs and the lateness clause, and so little credit that it decides."""
    return _scenario(
        duration_s, [7.0, 4.0, 2.0, 1.0, 1.0, 0.5], rtt_ms=50,
        slo={
            "classes": {
                "chat": {"share": 0.6, "deadline_s": 8, "value": 3}, "batch": {"share": 0.4, "deadline_s": 45}
            }
        },
        economy={
            "payment": "lateness", "initial_credit": 2, "exposure": 0.7, "stake_rule": "fixed",
        },
    )  # fmt: skip


def crowded(duration_s: float) -> dict[str, Any]:
    """Four providers far apart, more work than they can do, stakes that follow the load."""
    return _scenario(
        duration_s, [9.0, 6.0, 2.0, 1.0], rtt_ms=400, slo={"thresholds_s": [5, 10, 20, 40]},
        economy={"payment": "per_request", "initial_credit": 40, "stake_rule": "load", "initial_stake": 3},
    )  # fmt: skip


def wide(duration_s: float) -> dict[str, Any]:
    """Eight providers, of which two have most of the users; ticks of half a second, adverts every two."""
    return _scenario(
        duration_s, [9.0, 8.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.0], rtt_ms=50, decision_interval_s=0.5,
        gossip_interval_s=2.0, slo={"thresholds_s": [4, 8, 16]},
        economy={"payment": "quoted", "initial_credit": 500, "stake_rule": "load"},
    )  # fmt: skip


SCENARIOS: list[Callable[[float], dict[str, Any]]] = [paid, crowded, wide]

SHORT_S = 40.0  # of arrivals
LONG_S = {"www_serve": 110.0, "earliest_finish": 130.0, "learned": 178.0}  # by which there are 10,000 decisions


class VariedMarkups:
    """A rule that knows prices, with another markup at each advert."""

    name = "varied markups"

    def __init__(self) -> None:
        self.rule = Rule("best_value")

    def decide(self, views: Views, active: Bools, uniforms: Floats, actions: Actions) -> None:
        """See `Policy.decide`."""
        self.rule.decide(views, active, uniforms, actions)
        actions.markup[active] = (uniforms[active][:, -1] * MARKUPS.size).astype(np.int32)


def _policies() -> dict[str, tuple[float, Callable[[], Policy]]]:
    """Every policy: how long its scenarios are played, and how it is made."""
    rules: dict[str, tuple[float, Callable[[], Policy]]] = {
        name: (LONG_S.get(name, SHORT_S), _rule(name)) for name in RULES
    }
    rules["varied markups"] = (SHORT_S, VariedMarkups)
    return rules | {"learned": (LONG_S["learned"], lambda: load_bundle(DEFAULT_BUNDLE))}


def _rule(name: str) -> Callable[[], Policy]:
    return lambda: Rule(name)


POLICIES = _policies()


def _assert_alike(market: Seen, node: Seen, what: str) -> None:
    assert node.request == market.request, what
    assert node.time_s == pytest.approx(market.time_s, abs=TIME_S), what
    np.testing.assert_allclose(node.view, market.view, RELATIVE, RELATIVE, err_msg=what)
    assert node.routes == market.routes, what
    assert node.uniforms == market.uniforms, what
    chosen, expected = ((s.route, s.target, s.admission, s.markup) for s in (node, market))
    assert chosen == expected, what


@pytest.mark.parametrize("name", POLICIES)
def test_nodes_decide_as_a_market_does(name: str) -> None:
    duration_s, make = POLICIES[name]
    policy = make()
    decisions = 0
    for k, scenario in enumerate(SCENARIOS):
        planned = plan(parse(scenario(duration_s)), 7 + k)
        market, nodes = in_market(planned, policy), on_nodes(planned, policy)
        for row, (ours, theirs) in enumerate(zip(market.decisions, nodes.decisions, strict=True)):
            for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
                _assert_alike(a, b, f"{scenario.__name__}, provider {row}, decision {number} at {a.time_s} s")
            assert len(ours) == len(theirs)
            decisions += len(ours)
        assert nodes.executor == market.executor
        assert nodes.refused == market.refused
        assert nodes.served == market.served
        np.testing.assert_allclose(nodes.latency_s, market.latency_s, 0, TIME_S)
        # What is at stake moves with the load at the last tick, on which the two need not end alike.
        np.testing.assert_allclose(nodes.credit.sum(1), market.credit.sum(1), 0, 1e-5)
    assert decisions >= (10_000 if name in LONG_S else 1_000)


# Sessions.


def sessions(name: str, duration_s: float) -> MarketPlan:
    """A packaged scenario, without what comes later than that."""
    mapping = load(name).to_mapping()
    for provider in mapping["providers"]:
        phases = provider["traffic"]["phases"]
        del provider["online_s"]
        while phases[-1]["until_s"] > duration_s:
            last = phases.pop()
        provider["traffic"]["phases"] = [*phases, last | {"until_s": duration_s}]
    return plan(parse(mapping | {"duration_s": duration_s, "drain_s": 100_000}), 7)


SHARING = [
    *((name, "sessions/chat", 150.0) for name in ("best_value", "sticky", "lmetric", "www_serve", *SHIPPED)),
    ("best_value", "sessions/agents", 100.0), ("competitive", "sessions/agents", 100.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "scenario", "duration_s"), SHARING)
def test_nodes_decide_on_sessions_as_a_market_does(name: str, scenario: str, duration_s: float) -> None:
    planned = sessions(scenario, duration_s)
    policy = load_bundle(SHIPPED[name]) if name in SHIPPED else Rule(name)
    market, nodes = in_market(planned, policy), on_nodes(planned, policy)
    for row, (ours, theirs) in enumerate(zip(market.decisions, nodes.decisions, strict=True)):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            _assert_alike(a, b, f"provider {row}, decision {number} at {a.time_s} s")
        assert len(ours) == len(theirs)
    decisions = [each for row in market.decisions for each in row]
    assert len(decisions) > 300
    if scenario == "sessions/chat":  # caches are too small for all of them
        assert min(each.view[REUSE_S] for each in decisions) < 100
    assert (nodes.executor, nodes.refused, nodes.served) == (market.executor, market.refused, market.served)
    assert nodes.cached == market.cached > 0
    np.testing.assert_allclose(nodes.latency_s, market.latency_s, 0, TIME_S)


def test_what_an_index_believes_of_the_own_cache_changes_little() -> None:
    """A real engine does not say what it has: a node that keeps an index of it serves its users as well."""
    planned = sessions("sessions/chat", 150)
    exact, index = (on_nodes(planned, Rule("best_value"), exact) for exact in (True, False))
    took_s = [np.mean(each.latency_s[np.isfinite(each.latency_s)]) for each in (exact, index)]
    assert index.cached == pytest.approx(exact.cached, rel=0.05)
    assert took_s[1] == pytest.approx(took_s[0], rel=0.05)


def test_what_is_played_decides_in_all_ways() -> None:
    """Else parity would say little: requests are held, refused and offered, credit is short, and what is late is paid
    less."""
    plans = [plan(parse(scenario(SHORT_S)), 7 + k) for k, scenario in enumerate(SCENARIOS)]
    courses = [in_market(planned, Rule("www_serve")) for planned in plans]
    quoted = paid(SHORT_S)
    quoted["economy"]["payment"] = "quoted"
    other = in_market(plan(parse(quoted), 7), Rule("www_serve"))
    assert np.abs(other.credit - courses[0].credit).max() > 0.01
    routes = [{seen.route for row in course.decisions for seen in row} for course in courses]
    assert all({HOLD, LOCAL, FIRST_CANDIDATE} < found for found in routes)
    assert all(course.refused > 0 for course in courses)
    seen = [each for row in courses[0].decisions for each in row]
    assert any(each.view[-len(SELF_FEATURES) :][CREDIT] < 1.0 for each in seen)
