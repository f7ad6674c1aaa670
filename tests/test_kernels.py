"""Compiled kernels and the same kernels as plain Python give the same bits, and every kernel of agents/ is tried.

Run as a script, `test_kernels.py FILE`, this file writes the results of all cases and the names of the kernels that
they ran to FILE; the tests do so under `NUMBA_DISABLE_JIT=1` and compare. No kernel uses fast math, so nothing is
fused or reordered, and the comparison is to the last bit. The learned policy alone, which computes in float32, differs
in its last bits: compiled, log1p and exp of a float32 are those of float32.
"""

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numba
import numpy as np
import pytest

from wwwserve import agents
from wwwserve.agents import (
    classes,
    decision,
    estimate,
    generator,
    hardware,
    kernel,
    knowledge,
    prefix,
    protocol,
    provider,
    rules,
    tariff,
    view,
)
from wwwserve.agents.policy import architecture, forward
from wwwserve.envs import scenario
from wwwserve.envs.batch import MarketBatch

ROOT = Path(__file__).resolve().parent.parent
DRAWS = 200
Results = dict[str, Any]
Case = Callable[[np.random.Generator], Results]


PAIRS = [("a100-80g", "qwen3-8b"), ("rtx-4090", "qwen3-4b"), ("h100", "llama-3-8b"), ("a40", "llama-2-7b")]
PROFILES = [hardware.profile(*pair, max_num_seqs=slots) for pair in PAIRS for slots in (1, 9, 64)]


def adverts_of(rng: np.random.Generator, count: int) -> Any:
    """Adverts of nodes at any load, with profiles of the catalogue."""
    made = np.zeros((count, knowledge.ADVERT_SIZE))
    for row in made:
        p = PROFILES[rng.integers(len(PROFILES))]
        knowledge.write_profile(row, p.row(), rng.uniform(0.5, 2))
        knowledge.on_scrape(
            row, rng.choice([1.0, 2.0, 3.0]), rng.integers(0, 65), rng.choice([0, 0, 7]),
            rng.uniform(0, p.kv_tokens), rng.choice([0.0, 9000.0]), rng.choice([0.0, 60.0, np.inf]),
        )  # fmt: skip
        row[knowledge.AD_MEAN_PROMPT], row[knowledge.AD_MEAN_OUTPUT] = rng.uniform(1, 3000, 2)
        knowledge.on_length(row, rng.uniform(1, 3000), rng.uniform(0, 1), rng.uniform(1, 3000))
        knowledge.misreport_load(row, rng.uniform(0.3, 1.2))
        row[knowledge.AD_TARIFF : knowledge.AD_HELD] = rng.uniform(0, 5, 4)
        row[knowledge.AD_CONTEXT], row[knowledge.AD_UNSHARED] = rng.uniform(1, 3000), rng.uniform(0.1, 1)
        row[knowledge.AD_HELD : knowledge.AD_WEIGHT_S] = rng.integers(0, 9, classes.MAX_CLASSES)
    return made


def peer_stats_of(rng: np.random.Generator, adverts: Any) -> Any:
    """Statistics of peers after a few random messages with each peer."""
    made = knowledge.make_peer_stats(len(adverts))
    for row, advert in zip(made, adverts, strict=True):
        messages: list[Callable[[], None]] = [
            lambda row=row, advert=advert: knowledge.on_sent(row, advert),
            lambda row=row, advert=advert: knowledge.on_refused(row, advert[knowledge.AD_TIME_S]),
            lambda row=row: knowledge.on_ended(row),
            lambda row=row: knowledge.on_answer(row, rng.uniform(0, 100), rng.uniform(0, 100)),
            lambda row=row: knowledge.on_progress(row, rng.uniform(0, 60), 5.0, 0.03, rng.choice([0.0, 300.0])),
        ]
        for m in rng.integers(0, len(messages), 6):
            messages[m]()
        row[knowledge.DUELS_WON], row[knowledge.DUELS_LOST] = rng.integers(0, 4, 2)
    return made


def knowledge_case(rng: np.random.Generator) -> Results:
    adverts = adverts_of(rng, DRAWS)
    peer_stats = peer_stats_of(rng, adverts)
    read = [
        [f(d) for f in (knowledge.pace, knowledge.record, knowledge.duel_rate)]
        + [knowledge.sent_since(d, a), knowledge.refused_since(d, a)]
        for a, d in zip(adverts, peer_stats, strict=True)
    ]
    cleared = peer_stats.copy()
    for row in cleared[::2]:
        knowledge.clear_progress(row)
    kept = [prefix.is_kept(a, a[knowledge.AD_TIME_S] - rng.uniform(-30, 90)) for a in adverts]
    return {
        "kept": np.array(kept),
        "adverts": adverts,
        "peer_stats": peer_stats,
        "read": np.array(read, float),
        "cleared": cleared,
    }


def estimate_case(rng: np.random.Generator) -> Results:
    adverts = adverts_of(rng, DRAWS)
    expected = [estimate.expect(a, float(rng.integers(0, 9)), *rng.uniform([4000, 0], 4000)) for a in adverts]
    chances = [
        estimate.chance_on_time(
            np.sort(rng.uniform(1, 400, 5)), rng.uniform(0, 50), first_s, token_s, rng.uniform(1, 4000),
            rng.choice([0.0, 0.3, 1.5]), rng.uniform(100, 8192),
        )
        for first_s, token_s in expected
    ]  # fmt: skip
    slowdowns = [estimate.slowdown(a, float(rng.integers(0, 9)), *rng.uniform([4000, 0], 4000)) for a in adverts]
    iterations = [hardware.iteration_s(p.row(), *rng.uniform(0, [64, 50_000, 2048])) for p in PROFILES]
    off_line = [hardware.off_line_s(rng.uniform(-0.01, 0.01, row.shape), int(rng.integers(1, 257)))
                for row in (p.row() for p in PROFILES)]  # fmt: skip
    return {
        "expected": np.array(expected), "chances": np.array(chances), "slowdowns": np.array(slowdowns),
        "iterations": np.array(iterations), "off_line": np.array(off_line),
    }  # fmt: skip


def generator_case(rng: np.random.Generator) -> Results:
    generators = generator.make_generators(int(rng.integers(1000)), 3)
    return {
        "values": np.array([[generator.uniform(row) for _ in range(DRAWS)] for row in generators]),
        "words": generators,
    }


def protocol_case(rng: np.random.Generator) -> Results:
    numbers = generator.make_generators(5)[0]
    draws, paid, bounds, stakes, duels, other = [], [], [], [], [], []
    for _ in range(DRAWS):
        n = int(rng.integers(1, 12))
        drawn = np.full(12, -1)
        stake = rng.uniform(0, 5, n) * (rng.random(n) < 0.7)
        draws.append([protocol.draw_by_stake(stake, rng.random(n) < 0.8, 8, numbers, drawn), *drawn])
        accounts = rng.integers(0, 10**7, (9, protocol.ACCOUNT_SIZE))
        amount = int(rng.integers(0, 10**7))
        locked = protocol.lock(accounts[0], amount)
        tariff_ = rng.integers(0, 10**7, protocol.TARIFF_SIZE)
        tokens = [int(x) for x in rng.integers(0, 4000, 3)]
        cost = protocol.price_of(int(rng.integers(3)), tariff_, *tokens)
        cost = protocol.due_after(int(rng.integers(3)), cost, *(protocol.milliseconds(s) for s in rng.uniform(0, 9, 2)))
        paid.append([locked, cost, protocol.settle(accounts[0], accounts[1], amount if locked else 0, cost)])
        part = protocol.price_of_part(int(rng.integers(3)), tariff_, *tokens, int(rng.integers(4000)))
        available = protocol.available_credit(accounts[3], int(rng.integers(0, 10**7)), int(rng.integers(0, 10**7)))
        bounds.append([part, available])
        target = protocol.stake_target(rng.uniform(0, 0.8), int(rng.random() < 0.2), int(rng.random() < 0.5))
        protocol.move_stake(accounts[2], target, rng.uniform(0, 3))
        votes = rng.integers(0, 4, 5)
        judges = rng.permutation(7)[:5] + 2
        duels.append([protocol.duel_outcome(votes), protocol.settle_duel(accounts, 0, 1, judges, votes)])
        stakes.append([target, *accounts.ravel()])
        (a, b), u = rng.normal(0, rng.choice([0.3, 400.0]), 2), rng.random()
        value = protocol.delivered_value(rng.uniform(0, 5), np.sort(rng.uniform(0, 100, 5)), rng.uniform(0, 100))
        other.append([protocol.vote_of(a, b, u), value])
    named = {"draws": draws, "paid": paid, "bounds": bounds, "stakes": stakes, "duels": duels, "other": other}
    return {name: np.array(values) for name, values in named.items()}


KNOWN = np.array([[80, 0.5, 400, 90, 3, 20], [800, 0.0, 4000, 900, 1, 600], [200, 0.6, 1000, 240, 2, 60.0]])
DEADLINES = np.array([[10.0, 20.0], [300.0, 600.0], [30.0, 60.0]])
PEERS = 12

# A request record as a market or a node has it, with what it has in escrow.
REQUEST = np.dtype([*provider.REQUEST_FIELDS, ("locked", np.int64)], align=True)


def provider_of(rng: np.random.Generator, requests: int) -> tuple[Any, Any, Any]:
    """A provider that has nothing, what it has agreed on, and the records of requests of three classes."""
    p, a = kernel.records(1, provider.PROVIDER), kernel.records(1, provider.AGREEMENT)
    q = kernel.records(requests, REQUEST)
    provider.reset_provider(p)
    provider.reset_requests(q)
    p["known"][0, :3], p["own"], p["generator"] = (
        KNOWN,
        adverts_of(rng, 1)[0],
        generator.make_generators(int(rng.integers(99))),
    )
    p["own"][0, knowledge.AD_HELD : knowledge.AD_WEIGHT_S] = 0
    a["tick_s"], a["gossip_s"], a["rtt_s"] = 1.0, 3.0, 0.05
    a["n_classes"], a["n_deadlines"], a["deadlines"][0, :3, :2] = 3, 2, DEADLINES
    a["payment"], p["compute"], p["cost"] = rng.integers(3), rng.uniform(0, 1e-4, 3), rng.uniform(0, 1e-3, 3)
    a["exposure"] = rng.choice([protocol.NO_BOUND, 8 * protocol.MICRO])
    q["klass"], q["prompt"], q["arrival_s"] = (rng.integers(high, size=requests) + low for low, high in
                                               ((0, 3), (1, 3000), (-100, 105)))  # fmt: skip
    q["longest"] = KNOWN[q["klass"], classes.CLASS_MAX]
    return p[0], a[0], q


def views_of(rng: np.random.Generator, count: int) -> view.Views:
    views = view.make_views(count)
    scratch = view.ViewScratch(np.empty(view.NODES), np.empty(classes.MAX_CLASSES, np.int64))
    for b in range(count):
        adverts = adverts_of(rng, PEERS)
        p, a, q = provider_of(rng, 1)
        p["head"] = -1 if b % 10 == 0 else 0
        p["advert_due"], p["held"], p["remote"] = b % 3 == 0, *rng.integers(9, size=2)
        p["arrival_rate"], p["markup"], p["credit"] = *rng.random(2), rng.integers(10**9)
        p["peer_price"], p["sold"] = rng.random(2)
        q["n_candidates"], q["refused"] = rng.integers(0, 9), rng.integers(256)
        q["candidates"] = rng.permutation(np.arange(1, PEERS))[: decision.CANDIDATES]
        peers = knowledge.Peers(adverts, peer_stats_of(rng, adverts), rng.integers(0, 10**7, PEERS))
        one = view.Views(*(array[b] for array in views))
        view.write_view(one, p, a, q, peers, 5.0, scratch)
    return views


class Life:
    """A provider through random transitions, in the order in which a market or a node may call them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.now_s = rng, 5.0
        self.p, self.a, self.q = provider_of(rng, 40)
        self.adverts = adverts_of(rng, PEERS)
        self.peer_stats = knowledge.make_peer_stats(PEERS)
        self.account = np.array([20 * protocol.MICRO, 2 * protocol.MICRO, 0])
        self.credit = np.zeros(PEERS, np.int64)
        self.scratch = provider.Scratch(np.zeros(PEERS), np.zeros(PEERS, np.bool_))
        self.uniforms = np.zeros(generator.UNIFORMS_PER_DECISION)
        self.arrived = 0
        self.offered: list[int] = []
        self.taken: list[int] = []
        self.log: list[float] = []

    def peers(self) -> knowledge.Peers:
        provider.write_credit(self.p, self.account, self.a, self.q, self.credit)
        return knowledge.Peers(self.adverts, self.peer_stats, self.credit)

    def arrive(self) -> None:
        if self.arrived < self.q.size:
            provider.arrive(self.p, self.q, self.arrived)
            self.arrived += 1

    def decide(self) -> None:
        p, q, rng = self.p, self.q, self.rng
        if provider.choose_head(p, self.a, q):
            if not provider.has_candidates(p, q, p["head"]):
                serves = rng.random(PEERS) < 0.8
                provider.draw_candidates(p, self.a, q, p["head"], self.peers(), serves, self.now_s, self.scratch)
            provider.draw_uniforms(p, self.uniforms)
        r = int(p["head"])
        if r < 0:
            return
        route = provider.decide(p, self.a, q, self.peers(), int(rng.integers(-2, decision.ROUTES + 2)), self.now_s)
        self.log += [r, route, q[r]["n_candidates"], *self.uniforms]
        if route >= decision.FIRST_CANDIDATE:
            j = int(q[r]["candidates"][route - decision.FIRST_CANDIDATE])
            provider.offer(p, q, r, j, self.peer_stats[j], self.adverts[j])
            q[r]["locked"] = 10**5
            self.offered.append(r)

    def hear(self) -> None:
        """Of an offer, a refusal or an acceptance."""
        if not self.offered:
            return
        r = self.offered.pop(int(self.rng.integers(len(self.offered))))
        j = int(self.q[r]["executor"])
        if self.rng.random() < 0.5:
            provider.accepted(self.q, r, self.now_s, self.rng.uniform(0.1, 5), self.rng.uniform(0.01, 0.1), 9)
            self.taken.append(r)
        else:
            provider.refused(self.p, self.q, r, self.peer_stats[j])
            self.q[r]["locked"] = 0
            provider.mask(self.q, r, int(self.rng.integers(PEERS)))
            provider.come_back(self.p, self.q, r)

    def answer(self) -> None:
        """Of what was taken one is answered, or lost."""
        if not self.taken:
            return
        r = self.taken.pop(int(self.rng.integers(len(self.taken))))
        j = int(self.q[r]["executor"])
        if self.rng.random() < 0.7:
            self.log.append(provider.due_for(self.a, self.q[r], 300, float(self.rng.uniform(0, 30))))
            provider.answered(self.p, self.q, r, self.peer_stats[j], self.now_s, int(self.rng.integers(1, 900)))
        else:
            provider.end_attempt(self.p, self.q, r, self.peer_stats[j])
            provider.come_back(self.p, self.q, r)
        self.q[r]["locked"] = 0

    def give_up(self) -> None:
        """A user leaves."""
        if self.arrived:
            r = int(self.rng.integers(self.arrived))
            self.log += [provider.is_out(self.p, self.q, r), provider.withdraw(self.p, self.q, r)]

    def tick(self) -> None:
        p = self.p
        provider.tick(p, 1.0)
        self.q["streamed"] += self.rng.integers(0, 60, self.q.size)
        provider.look_at_evidence(p, self.q, self.peer_stats, self.now_s)
        provider.move_own_stake(p, self.account, 1.0)
        if provider.gossip(p, self.a, self.now_s):
            admission = np.array([self.rng.uniform(0, 60), 1.0, 0.9, *self.rng.integers(0, 2, 2), self.rng.uniform()])
            provider.set_admission(p, admission, int(self.rng.integers(-1, 9)))
            provider.look_at_tariffs(p, self.a, self.peers(), self.now_s, 0)
            provider.advertise(p, int(self.account[protocol.STAKED]), self.now_s, self.adverts[0])
        self.appraise()
        prompt, longest = float(self.rng.uniform(1, 3000)), int(self.rng.integers(5000))
        tariff_ = self.rng.integers(0, 10**6, protocol.TARIFF_SIZE)
        self.log += provider.consider(p, self.a, prompt, 0.5 * prompt, longest, tariff_)

    def appraise(self) -> None:
        """What runs here, if the cost is old: requests of its own users and of peers."""
        self.log.append(provider.is_cost_old(self.p, self.a, self.now_s))
        found = provider.begin_appraisal(self.p, self.a)
        for r in self.rng.integers(0, self.q.size, 4):
            own, generated = bool(self.rng.integers(2)), float(self.rng.integers(900))
            taken = self.q[r : r + 1].copy()
            if np.isnan(taken["taken_s"][0]):
                taken["taken_s"], taken["promised_ttft_s"], taken["promised_tpot_s"] = self.now_s - 3.0, 1.0, 0.03
            if numba.config.DISABLE_JIT:
                taken = taken.view(np.recarray)
            found = provider.count_running(self.p, self.a, taken[0], own, generated, self.now_s, found)
        provider.end_appraisal(self.p, self.a, found, self.now_s)

    def bytes(self) -> Results:
        fields = {f"p.{name}": self.p[name].copy() for name in provider.PROVIDER.names or ()}
        fields |= {f"q.{name}": self.q[name].copy() for name in REQUEST.names or ()}
        return fields | {
            "log": self.log,
            "peer_stats": self.peer_stats,
            "adverts": self.adverts,
            "account": self.account,
        }


def provider_case(rng: np.random.Generator) -> Results:
    results: Results = {}
    for k in range(4):
        life = Life(rng)
        acts = [life.arrive, life.decide, life.decide, life.hear, life.answer, life.give_up, life.tick]
        for act in rng.choice(len(acts), 300, p=[0.14, 0.2, 0.2, 0.16, 0.16, 0.02, 0.12]):
            life.now_s += float(rng.uniform(0, 0.4))
            acts[act]()
        provider.leave(life.p)
        results |= {f"{k}.{name}": values for name, values in life.bytes().items()}
    return results


def view_and_rules_case(rng: np.random.Generator) -> Results:
    views = views_of(rng, DRAWS)
    results: Results = {f"views.{name}": array for name, array in views._asdict().items()}
    tosses = rng.random((DRAWS, 4))
    for name in rules.RULES:
        actions = decision.make_actions(DRAWS)
        rules.Rule(name).decide(views, np.ones(DRAWS, np.bool_), tosses, actions)
        results |= {f"{name}.{field}": array for field, array in actions._asdict().items()}
    policies = np.column_stack(
        [rng.uniform(0, 60, DRAWS), rng.random((DRAWS, 2)), rng.integers(0, 2, (DRAWS, 2)), np.zeros(DRAWS)]
    )
    decision.admit_what_pays(policies[0], 0.75, 2.0)
    results["what pays"] = policies[0].copy()
    held = rng.uniform(0, 400, (DRAWS, 2))
    results["may hold"] = np.array([decision.may_hold(*each) for each in held])
    results["rates"] = np.array([(knowledge.aged_rate(*each), knowledge.silent_after_s(each[0] / 40)) for each in held])
    results["accept"] = np.array(
        [decision.accept(t, *rng.uniform([0, 0, 0, -1, 0], [60, 1, 2, 1, 1])) for t in policies]
    )
    return results


def learned_case(rng: np.random.Generator) -> Results:
    """The learned policy with random weights."""
    views = views_of(rng, DRAWS)
    weights: architecture.Weights = {}
    for name, shape in architecture.shapes(12).items():
        weights[name] = np.asarray(0.3 * rng.standard_normal(shape), np.float32)
    policy = forward.LearnedPolicy(weights, {})
    actions = decision.make_actions(DRAWS)
    policy.decide(views, rng.random(DRAWS) < 0.9, rng.random((DRAWS, 4)), actions)
    normalised = view.normalise(views.nodes, view.NODE_FEATURES)
    return {"logits": policy.logits(views), "normalised": normalised} | actions._asdict()


def tariff_case(rng: np.random.Generator) -> Results:
    """What a request costs and pays, beyond what a provider's life has of it."""
    written, prices, lost = np.zeros(protocol.TARIFF_SIZE), [], []
    for own in adverts_of(rng, DRAWS):
        compute, cost = np.zeros(protocol.TARIFF_SIZE), np.zeros(protocol.TARIFF_SIZE)
        tariff.write_compute(compute, own, rng.uniform(0, 1))
        future = tariff.future_loss(own, rng.random(3), KNOWN, DEADLINES, 2)
        tariff.write_cost(cost, compute, rng.random(), rng.random(), future, own)
        tariff.write_tariff(written, cost, rng.uniform(1, 2), rng.uniform(-0.1, 0.8))
        prices.append([future, *cost, *written, tariff.cost_of(cost, 300.0, 99.0, 200.0)])
        prices[-1] += [
            tariff.price_by(written, 9.0, 3.0, 8.0),
            classes.worth_of(9.0, 3.0, 8.0),
            tariff.in_micro(written[0]),
            *estimate.full_batch(own),
            *estimate.marginal_delay(own),
        ]
        a, b, price = rng.uniform(0.1, 60, 3)
        lost.append([tariff.on_time_by(a, b), tariff.share_paid(a, b), tariff.payment_lost_per_s(price, a, b)])
        generated = rng.choice([0.0, 90.0, 700.0])
        lost[-1] += [tariff.expected_output(a, generated, 800.0), estimate.context_of(a, b, generated)]
        lost[-1].append(tariff.value_lost_per_s(KNOWN[2], DEADLINES[2], generated, a, rng.uniform(0.01, 0.1)))
    return {"prices": np.array(prices), "lost": np.array(lost)}


LENGTHS = {"prompt": {"median": 300, "sigma": 0.8, "max": 2048}, "output": {"median": 150, "sigma": 0.7, "max": 600}}
MARKETS: dict[str, dict[str, Any]] = {
    "classes": {
        "slo": {"classes": {"chat": {"share": 0.6, "deadline_s": 8, "value": 3},
                            "batch": {"share": 0.4, "deadline_s": 60, "value": 1}}},
        "economy": {"payment": "lateness", "duel_probability": 0.4, "judges": 2},
    },
    "lies": {"economy": {"payment": "per_request", "duel_probability": 0.2}},
}  # fmt: skip

PICKY = {"accept_wait_s": 0.3, "target_kv_use": 0.03}  # so that others' work is refused at times, too


def markets_case(rng: np.random.Generator) -> Results:
    """Whole short markets under every rule: bursts, a departure, a liar, duels, more work than the small nodes hold."""
    providers = [
        {"name": "a", "max_num_seqs": 6,
         "traffic": {"kind": "poisson", "phases": [{"until_s": 30, "rate_per_s": 1.1}]}},
        {"name": "b", "max_num_seqs": 8, "online_s": [[0, 10], [16, 30]],
         "traffic": {"kind": "mmpp", "rates_per_s": [0.2, 2.0], "mean_dwell_s": [10, 5]}},
        {"name": "c", "gpu": "a100-80g", "misreport": {"load": 0.3, "speed": 1.5, "from_s": 5, "until_s": 30}},
        {"name": "d", "gpu": "h100", "max_num_seqs": 5, "traffic": {"kind": "times", "times_s": [1.5, 7.25, 7.25, 20]}},
        {"name": "e", "gpu": "a40"},
    ]  # fmt: skip
    results: Results = {}
    names = list(rules.RULES)
    for title, keys in MARKETS.items():
        spans = {"duration_s": 30, "drain_s": 30, "defaults": {"lengths": LENGTHS}}
        made = scenario.parse({"name": title, "providers": providers} | spans | keys)
        batch = MarketBatch([made] * len(names), list(range(len(names))))
        policies = [
            rules.Rule(name, {key: x for key, x in PICKY.items() if key in rules.RULES[name]}) for name in names
        ]
        actions = batch.actions()
        rewards = np.zeros((len(names), len(providers)))
        while not batch.over.all():
            for b, policy in enumerate(policies):
                one = [type(x)(*(array[b] for array in x)) for x in (batch.views, actions)]
                policy.decide(one[0], batch.active[b], batch.uniforms[b], one[1])
            batch.step(actions)
            rewards += batch.reward
        state = batch.markets
        results |= {f"{title}.{field}": array for field, array in batch.views._asdict().items()}
        results |= {f"{title}.{name}": getattr(state, name) for name in ("adverts", "peer_stats", "accounts")}
        results |= {f"{title}.provider.{name}": state.providers[name] for name in ("counts", "profit", "own")}
        results |= {f"{title}.market.{name}": state.market[name] for name in ("steps", "generator", "n_duels", "now_s")}
        results[f"{title}.rewards"] = rewards
        for b in range(len(names)):
            results |= {f"{title}.{b}.{name}": array for name, array in batch.requests(b)._asdict().items()}
    return results


CASES: tuple[Case, ...] = (
    knowledge_case, estimate_case, generator_case, protocol_case, provider_case, view_and_rules_case, learned_case,
    tariff_case, markets_case,
)  # fmt: skip


def outputs(cases: Iterable[Case]) -> Results:
    """Results by case and name."""
    return {
        f"{case.__name__}.{name}": np.array(values)
        for case in cases
        for name, values in case(np.random.default_rng(CASES.index(case))).items()
    }


def kernels() -> Iterator[str]:
    """Every kernel that agents/ defines, "module.name"."""
    for found in pkgutil.walk_packages(agents.__path__, "wwwserve.agents."):
        if found.name.endswith((".network", ".checkpoint")):  # these need torch, and hold no kernel
            continue
        module = importlib.import_module(found.name)
        for name, value in vars(module).items():
            if hasattr(value, "py_func") and value.py_func.__module__ == module.__name__:
                yield f"{module.__name__}.{name}"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    """Compiled and plain results."""
    if numba.config.DISABLE_JIT:
        # There is nothing compiled to compare with; `make test` runs without the variable.
        pytest.skip("kernels are not compiled under NUMBA_DISABLE_JIT=1")
    path = tmp_path_factory.mktemp("plain") / "results.npz"
    plain = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), str(path)],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
    )
    compiled = outputs(CASES)
    assert plain.wait(timeout=300) == 0
    with np.load(path) as archive:
        return compiled, dict(archive)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_compiled_and_plain_give_the_same_bits(both: tuple[Results, Results], case: Case) -> None:
    compiled, plain = both
    names = [name for name in compiled if name.startswith(case.__name__)]
    assert names
    for name in names:
        assert compiled[name].dtype == plain[name].dtype, name
        if name in ("learned_case.logits", "learned_case.normalised"):  # float32 logarithms differ in the last bit
            np.testing.assert_allclose(compiled[name], plain[name], rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(compiled[name], plain[name], err_msg=name)


def test_the_cases_run_every_kernel(both: tuple[Results, Results]) -> None:
    compiled = set(kernels())
    assert len(compiled) > 40
    assert compiled - set(both[1]["ran"].tolist()) == set()


def test_the_markets_are_lively(both: tuple[Results, Results]) -> None:
    """Otherwise the comparison of whole markets would say little."""
    from wwwserve.envs import state

    for title in MARKETS:
        counts = both[0][f"markets_case.{title}.provider.counts"].sum(axis=(0, 1))
        rare = {state.OWN_FAILED, state.RETURNED, state.DUELS_VOID, state.CLIPPED, state.INVALID}
        assert (counts[[k for k in range(state.COUNTS) if k not in rare]] > 0).all(), title


def main(path: str) -> None:
    """Write all results and the names of the kernels that ran."""
    ran = set()

    def profiler(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            ran.add(f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}")

    sys.setprofile(profiler)
    results = outputs(CASES[:-1])
    sys.setprofile(None)  # it is slow, and whole markets need not be the only place where a kernel is tried
    np.savez(path, ran=np.array(sorted(ran)), **results, **outputs(CASES[-1:]))


if __name__ == "__main__":
    main(sys.argv[1])


def test_kernels_are_loaded_without_a_blas() -> None:
    """numba would import that of SciPy, and still does for who needs it later."""
    script = """
import sys
import numba
import numpy as np
from wwwserve.agents.kernel import leave_blas_out
leave_blas_out()
assert numba.njit(lambda x: 2.0 * x.sum())(np.ones(3)) == 6.0
from numba.np import linalg
print("scipy.linalg" in sys.modules, linalg.ensure_blas.__module__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "numba.np.linalg"], done.stdout
