"""What must hold at every step of every market, whatever providers do; and the rules of the game one by one."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wwwserve.agents.decision import (
    CANDIDATES,
    FIRST_CANDIDATE,
    HOLD,
    LOCAL,
    MAX_KV_USE,
    MAX_WAIT_S,
    ONLY_IF_NONE_HELD,
    PROBABILITY,
    Actions,
)
from wwwserve.agents.hardware import BLOCK_TOKENS, KV_BLOCKS
from wwwserve.agents.knowledge import (
    AD_HELD,
    AD_KV_TOKENS,
    AD_PER_KV_TOKEN_S,
    AD_PRICE,
    AD_RUNNING,
    AD_STAKE,
    AD_TIME_S,
    AD_WAITING,
    AD_WEIGHT_S,
    DUELS_LOST,
    DUELS_WON,
    MAX_CLASSES,
    NO_TIME,
    OUT,
    PROMISED,
    RECORD,
    STREAMED,
    sent_since,
)
from wwwserve.agents.protocol import ESCROW, FREE, MICRO, STAKED
from wwwserve.agents.rules import Rule
from wwwserve.agents.view import AGE_S, N_CANDIDATES, REFUSALS
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import KINDS, sample
from wwwserve.envs.engine import NEVER, advance, kv_use, tokens_out
from wwwserve.envs.market.offers import OFFER_TIMEOUT_S
from wwwserve.envs.scenario import Scenario, parse
from wwwserve.envs.state import (
    ANSWER,
    ANSWERING,
    COPY,
    DELEGATED,
    DONE,
    DUELS_SETTLED,
    DUELS_STARTED,
    DUELS_VOID,
    FAILED,
    FUTURE,
    HELD,
    HOLDS,
    IN_ENGINE,
    INVALID,
    JUDGED,
    JUDGEMENT,
    LOST,
    NOTHING,
    OFFER,
    OFFERED,
    OWN_ARRIVED,
    OWN_DONE,
    OWN_FAILED,
    PROBES_REFUSED,
    PROBES_UNANSWERED,
    REFUSAL,
    RETURNED,
    RUN_LOCAL,
    SERVED_FOR_PEERS,
    USER,
    Reward,
    Shape,
    plan,
)

Decide = Callable[[MarketBatch, Actions], None]


def lengths(prompt: int, output: int) -> dict[str, Any]:
    """Every request has so many tokens."""
    return {
        "prompt": {"median": prompt, "sigma": 0, "max": prompt},
        "output": {"median": output, "sigma": 0, "max": output},
    }


def times(*times_s: float) -> dict[str, Any]:
    return {"kind": "times", "times_s": [float(time_s) for time_s in times_s]}


def market(*providers: dict[str, Any], **top: Any) -> Scenario:
    """A scenario of these providers, all of whom answer for "m"; 50 ms round trip and 1 s ticks unless told."""
    named = [{"name": f"n{i}", "serves": ["m"], **provider} for i, provider in enumerate(providers)]
    return parse({"name": "test", "duration_s": 100, "drain_s": 300, "providers": named, **top})


def run(batch: MarketBatch, decide: Decide) -> Iterator[float]:
    """Step a batch to its end; after each step, the time the step began."""
    actions = batch.actions()
    while not batch.over.all():
        began_s = float(batch.now_s[0])
        decide(batch, actions)
        batch.step(actions)
        yield began_s


def finish(batch: MarketBatch, decide: Decide) -> None:
    for _ in run(batch, decide):
        pass


def by_rule(name: str) -> Decide:
    rule = Rule(name)

    def decide(batch: MarketBatch, actions: Actions) -> None:
        rule.decide(batch.views, batch.active, batch.uniforms, actions)

    return decide


def to_candidates(batch: MarketBatch, actions: Actions) -> None:
    """To the first candidate that has not refused, else here; accept always."""
    legal = batch.views.routes[..., FIRST_CANDIDATE:] == 1
    actions.route[...] = np.where(legal.any(-1), FIRST_CANDIDATE + legal.argmax(-1), LOCAL)


def here(batch: MarketBatch, actions: Actions) -> None:
    actions.route[...] = LOCAL


def hold(batch: MarketBatch, actions: Actions) -> None:
    actions.route[...] = HOLD


# Random markets with random decisions.


def random_market(rng: np.random.Generator) -> Scenario:
    """A small market with everything in it: churn, lies, classes, duels, tiny credits, small engines."""
    count, duration_s = int(rng.integers(2, 7)), 40.0
    classes = {}
    for c in range(int(rng.integers(0, 4))):
        classes[f"c{c}"] = {"deadline_s": float(rng.uniform(2, 60)), "value": float(rng.uniform(0, 5))}
    for entry in classes.values():
        entry["share"] = 1 / len(classes)
    economy = {
        "pricing": str(rng.choice(["per_request", "per_ktok"])),
        "initial_credit": float(rng.choice([0.5, 3.0, 1000.0])),
        "stake_rule": str(rng.choice(["load", "fixed"])),
        "initial_stake": float(rng.choice([0.0, 0.3, 2.0])),
        "duel_probability": float(rng.choice([0.0, 0.5, 1.0])),
        "judges": int(rng.integers(1, 6)),
        "compute_cost_per_ktok": float(rng.uniform(0, 1)),
    }
    providers: list[dict[str, Any]] = []
    for _ in range(count):
        each: dict[str, Any] = {
            "gpu": str(rng.choice(["rtx-4090", "a100-80g"])),
            "model": str(rng.choice(["qwen3-8b", "qwen3-4b", "llama-2-7b"])),
            "max_num_seqs": int(rng.integers(1, 25)),
            "serves": [["m"], ["m", "x"], ["x", "m"], ["x"]][rng.integers(4)],
            "lengths": {
                "prompt": {"median": float(rng.uniform(20, 3000)), "sigma": 0.8, "max": 6000},
                "output": {"median": float(rng.uniform(20, 800)), "sigma": 0.8, "max": 3000},
            },
            "strength": float(rng.uniform(-2, 2)),
        }
        if rng.random() < 0.8:
            rate = float(rng.uniform(0.1, 1.5))
            each["traffic"] = {"kind": "poisson", "phases": [{"until_s": duration_s, "rate_per_s": rate}]}
        if rng.random() < 0.5:
            leave, back = sorted(rng.uniform(1, duration_s - 1, 2).tolist())
            each["online_s"] = [[[0, leave]], [[back, duration_s]], [[0, leave], [back, duration_s]]][rng.integers(3)]
        if rng.random() < 0.3:
            each["misreport"] = {"load": float(rng.uniform(0, 2)), "speed": float(rng.uniform(0.3, 3)), "from_s": 5.0}
        providers.append(each)
    top: dict[str, Any] = {"slo": {"thresholds_s": [5, 20, 60]}, "economy": economy, "duration_s": duration_s}
    if classes:
        top["slo"]["classes"] = classes
    top["drain_s"] = float(rng.choice([0.0, 60.0]))
    top["decision_interval_s"] = float(rng.choice([0.5, 1.0, 2.0]))
    top["gossip_interval_s"] = float(rng.choice([1.0, 2.5, 3.0]))
    top["rtt_ms"] = float(rng.choice([0.0, 50.0, 1500.0]))
    economy["exposure"] = [None, 1.0, 4.0][rng.integers(3)]
    return market(*providers, **top)


def randomly(rng: np.random.Generator, illegal: float) -> Decide:
    """Decisions at random: a share of them from far outside what is allowed, the others as the mask has it."""

    def decide(batch: MarketBatch, actions: Actions) -> None:
        shape = actions.route.shape
        noise = rng.random((*shape, batch.views.routes.shape[-1])) * (batch.views.routes == 1)
        wild = rng.random(shape) < illegal
        actions.route[...] = np.where(wild, rng.integers(-5, 30, shape), noise.argmax(-1))
        actions.price[...] = np.where(wild, rng.integers(-9, 40, shape), rng.integers(0, 7, shape))
        actions.direct[...] = np.where(rng.random(shape) < illegal / 3, rng.integers(-2, shape[-1] + 3, shape), -1)
        actions.terms[..., MAX_WAIT_S] = rng.choice([-1.0, 1.0, 20.0, np.inf], shape)
        actions.terms[..., MAX_KV_USE] = rng.choice([0.3, 0.9, np.inf], shape)
        actions.terms[..., PROBABILITY] = rng.choice([0.5, 1.0], shape)
        actions.terms[..., ONLY_IF_NONE_HELD] = rng.integers(0, 2, shape)

    return decide


class Checker:
    """Everything that must add up in market `b` of a batch, computed anew from its requests."""

    WALKED = (
        "next", "prompt", "output", "generated", "finish_tick", "origin", "klass", "kind", "out_next", "out_prev",
        "mail", "mail_next", "mail_s", "finish_s", "status",
    )  # fmt: skip

    def __init__(self, batch: MarketBatch, b: int) -> None:
        self.batch, self.b = batch, b
        self.n = len(batch.plans[b].profiles)
        self.answered_s = np.full(batch.shape.requests, np.nan)
        self.ended: dict[int, tuple[int, int]] = {}
        self.over = False  # and checked at its end, after which nothing changes

    def check(self) -> None:
        m = self.batch.markets
        self.market, self.p, self.q = m.market[self.b], m.providers[self.b], m.requests[self.b]
        self.engines, self.accounts = m.engines[self.b], m.accounts[self.b]
        used = int(self.market["used"])
        assert used <= self.q.size
        self.status, self.kind = self.q["status"][:used], self.q["kind"][:used]
        self.origin, self.executor = self.q["origin"][:used], self.q["executor"][:used]
        self.rows = {name: self.q[name][:used].tolist() for name in self.WALKED}  # lists are quicker to walk
        held, engine = self.held(), self.engine()
        self.credits(used)
        self.peers()
        self.mail()
        self.wakes()
        self.whereabouts(held, engine)
        self.users()
        self.over = bool(self.market["over"])

    def credits(self, used: int) -> None:
        assert self.accounts.sum() == self.market["minted"]
        assert self.accounts.min() >= 0
        locked = np.bincount(self.origin, self.q["locked"][:used], self.n) if used else np.zeros(self.n)
        assert self.accounts[: self.n, ESCROW].tolist() == locked[: self.n].tolist()
        handed = (self.kind != JUDGEMENT) & (self.executor >= 0)
        with_peer = np.zeros((self.n, self.n), np.int64)
        np.add.at(with_peer, (self.origin[handed], self.executor[handed]), self.q["locked"][:used][handed])
        assert with_peer.max(initial=0) <= self.market["exposure"]
        if self.market["over"]:  # no duel waits for anything
            judging = (self.kind == JUDGEMENT) & (self.status == IN_ENGINE)
            assert not judging.any() and not self.q["locked"][:used][self.kind == JUDGEMENT].any()
            duels = self.batch.markets.duels[self.b][: self.market["n_duels"]]
            assert ((duels["void"] == 1) | ((duels["n_judges"] > 0) & (duels["pending"] == 0))).all()
            answered = duels[~np.isnan(self.q["answer_s"][duels["first"]])]
            assert not self.q["locked"][answered["first"]].any() and not self.q["locked"][answered["second"]].any()

    def held(self) -> set[int]:
        found: set[int] = set()
        for i in range(self.n):
            p = self.p[i]
            count = 0
            for c in range(MAX_CLASSES):
                r, tail, here = int(p["held_head"][c]), -1, 0
                while r >= 0:
                    assert r not in found
                    assert (self.rows["origin"][r], self.rows["klass"][r], self.rows["kind"][r]) == (i, c, USER)
                    found.add(r)
                    here += 1
                    tail, r = r, self.rows["next"][r]
                assert p["held_tail"][c] == tail
                assert p["own"][AD_HELD + c] == here
                count += here
            assert p["held"] == count
            assert p["online"] or count == 0
            tick_s = self.market["ticks"] * self.market["tick_s"]
            assert p["online"] == any(begin_s <= tick_s < end_s for begin_s, end_s in p["windows"])
            if p["head"] >= 0:
                self.head(p, i)
                assert p["head"] in found
        return found

    def engine(self) -> dict[int, int]:
        """Each engine's requests, with its index, when its blocks and tokens add up."""
        found: dict[int, int] = {}
        for i in range(self.n):
            e = self.engines[i]
            tick = int(e["tick"])
            blocks = context = decoding = 0
            phase = [0] * BLOCK_TOKENS
            for r in e["slots"][: e["running"]].tolist():
                held = self.rows["prompt"][r] + self.rows["generated"][r]
                finish_tick = self.rows["finish_tick"][r]
                if finish_tick != NEVER:
                    out = self.rows["output"][r] - (finish_tick - tick)
                    held = self.rows["prompt"][r] + out - 1
                    decoding, context = decoding + 1, context + held
                    phase[(tick - held) % BLOCK_TOKENS] += 1
                blocks += -(-held // BLOCK_TOKENS)
                assert r not in found
                found[r] = i
            assert e["free_blocks"] + blocks == e["profile"][KV_BLOCKS] and e["free_blocks"] >= 0
            assert (e["kv_tokens"], e["decoding"]) == (context, decoding)
            assert e["phase"].tolist() == phase
            tokens, count, r = 0, 0, int(e["wait_head"])
            while r >= 0:
                assert r not in found
                found[r] = i
                tokens, count = tokens + self.rows["prompt"][r] + self.rows["generated"][r], count + 1
                r = self.rows["next"][r]
            assert (e["waiting"], e["wait_tokens"]) == (count, tokens)
            assert self.p[i]["online"] or count + e["running"] == 0
        return found

    def head(self, p: Any, i: int) -> None:
        """What a provider decides on is first of its class, which is open, with candidates."""
        r, c = int(p["head"]), self.rows["klass"][int(p["head"])]
        assert p["held_head"][c] == r and p["closed"][c] == 0 and self.q["opening"][r] == p["opening"]
        drawn = self.q["candidates"][r][: self.q["n_candidates"][r]].tolist()
        assert len(set(drawn)) == len(drawn) and set(drawn) <= set(range(self.n)) - {i}
        assert int(self.q["refused"][r]) < 1 << len(drawn)

    def peers(self) -> None:
        """Lists of what is out and the peer_stats' counts tell the same; guests are those in the engine."""
        out: set[int] = set()
        counts = np.zeros((self.n, self.n))
        for i in range(self.n):
            r, before = int(self.p[i]["out_head"]), -1
            while r >= 0:
                assert r not in out
                assert self.rows["out_prev"][r] == before
                assert self.origin[r] == i != self.executor[r]
                out.add(r)
                counts[i, self.executor[r]] += 1
                before, r = r, self.rows["out_next"][r]
        away = np.isin(self.status, (OFFERED, IN_ENGINE, ANSWERING, LOST))
        away &= (self.kind != JUDGEMENT) & (self.origin != self.executor)
        assert out == set(np.flatnonzero(away).tolist())
        guests = self.executor[away & (self.status == IN_ENGINE)]
        assert self.p["remote"][: self.n].tolist() == np.bincount(guests, minlength=self.n).tolist()
        assert np.array_equal(self.batch.markets.peer_stats[self.b, : self.n, : self.n, OUT], counts)
        assert self.p["online"][self.origin[list(out)]].all() if out else True

    def mail(self) -> None:
        """What is on its way is in one list, in the order in which it will be there, and that is when it should."""
        now_s, rtt_s = float(self.market["now_s"]), float(self.market["rtt_s"])
        found: list[int] = []
        tail, r = -1, int(self.market["mail_head"])
        while r >= 0:
            found.append(r)
            assert len(found) <= self.status.size
            tail, r = r, self.rows["mail_next"][r]
        assert self.market["mail_tail"] == tail
        there_s = [self.rows["mail_s"][r] for r in found]
        assert there_s == sorted(there_s) and (not found or there_s[0] >= now_s)
        mail = np.array(self.rows["mail"], np.int64)
        assert sorted(found) == np.flatnonzero(mail != NOTHING).tolist()
        assert np.array_equal(self.status == OFFERED, (mail == OFFER) | (mail == REFUSAL))
        assert np.array_equal(self.status == ANSWERING, mail == ANSWER)
        for r, at_s in zip(found, there_s, strict=True):
            if mail[r] == ANSWER:
                assert at_s == self.rows["finish_s"][r] + 0.5 * rtt_s
            else:
                assert np.isnan(self.q["taken_s"][r])
                assert at_s <= now_s + (0.5 * rtt_s if mail[r] == OFFER else max(rtt_s, OFFER_TIMEOUT_S))
        for r in set(range(self.status.size)).difference(found):
            assert self.rows["mail_next"][r] == -1

    def wakes(self) -> None:
        """No engine that is left alone finishes anything before its `wake_s`."""
        engines, requests = self.engines[: self.n].copy(), self.q.copy()
        done = np.zeros(requests.size, np.int64)
        for e in engines:
            if e["running"] + e["waiting"] > 0:
                assert np.isfinite(e["wake_s"])
                until_s = np.nextafter(e["wake_s"], -np.inf)
                if until_s >= e["clock_s"]:
                    assert advance(e, requests, until_s, done, 0) == 0

    def whereabouts(self, held: set[int], engine: dict[int, int]) -> None:
        """Status says where a request is, and it is there and nowhere else."""
        arrived = int(self.market["next_arrival"])
        users = np.arange(self.status.size) < self.market["n_arrivals"]
        future = np.arange(self.status.size) >= arrived
        assert np.array_equal(users, self.kind == USER)
        assert np.array_equal(self.status == FUTURE, users & future)
        assert held == set(np.flatnonzero(self.status == HELD).tolist())
        assert engine.keys() == set(np.flatnonzero(self.status == IN_ENGINE).tolist())
        assert all(self.executor[r] == i for r, i in engine.items())
        ended = np.flatnonzero((self.status == DONE) | (self.status == FAILED))
        for r in ended.tolist():
            state = int(self.status[r]), int(self.executor[r])
            if not (self.kind[r] == USER and np.isnan(self.q["answer_s"][r])):
                assert self.ended.setdefault(r, state) == state, "ended twice"
        assert self.ended.keys() <= set(ended.tolist()), "had ended and is under way"

    def users(self) -> None:
        n_arrivals, now_s = int(self.market["n_arrivals"]), float(self.market["now_s"])
        answer_s, origin = self.q["answer_s"][:n_arrivals], self.origin[:n_arrivals]
        status = self.status[:n_arrivals]
        open_ = np.isnan(answer_s)
        assert self.market["unresolved"] == open_.sum()
        assert not open_[status == DONE].any()
        # A request whose first executor was lost is open while its duel's copy is under way.
        for u in np.flatnonzero(open_ & (status == FAILED)).tolist():
            copy = int(self.batch.markets.duels[self.b]["second"][self.q["duel"][u]])
            assert self.status[copy] in (OFFERED, IN_ENGINE, ANSWERING, LOST) and self.kind[copy] == COPY
        # An end is final, and comes no earlier than it is seen.
        before = self.answered_s[:n_arrivals]
        known = ~np.isnan(before)
        assert np.array_equal(answer_s[known], before[known])
        assert (answer_s[np.isfinite(answer_s)] <= now_s).all()
        self.answered_s[:n_arrivals] = answer_s
        counts = self.p["counts"]
        arrived = int(self.market["next_arrival"])
        predicted = self.q["predicted"][:n_arrivals]
        assert not predicted[~open_].any() or self.market["over"]
        for i in range(self.n):
            mine = origin == i
            assert counts[i, OWN_ARRIVED] == mine[:arrived].sum()
            assert counts[i, OWN_DONE] == np.isfinite(answer_s[mine]).sum()
            assert counts[i, OWN_FAILED] == np.isinf(answer_s[mine]).sum()
            if self.market["over"]:
                assert self.p["potential"][i] == 0
            else:
                assert math.isclose(self.p["potential"][i], predicted[mine].sum(), rel_tol=1e-9, abs_tol=1e-9)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), illegal=st.sampled_from([0.0, 0.3]))
def test_everything_adds_up_in_random_markets(seed: int, illegal: float) -> None:
    rng = np.random.default_rng(seed)
    batch = MarketBatch([random_market(rng) for _ in range(3)], [seed, seed + 1, seed + 2])
    checkers = [Checker(batch, b) for b in range(batch.count)]
    for checker in checkers:
        checker.check()
    decide = randomly(rng, illegal)
    for _ in run(batch, decide):
        for checker in checkers:
            if not checker.over:
                checker.check()


@pytest.mark.parametrize("kind", KINDS)
def test_everything_adds_up_in_training_markets(kind: str) -> None:
    rng = np.random.default_rng(5)
    batch = MarketBatch([sample(kind, rng, 150.0), sample(kind, rng, 150.0)], [1, 2])  # type: ignore[arg-type]
    checkers = [Checker(batch, b) for b in range(batch.count)]
    for k, _ in enumerate(run(batch, by_rule("random"))):
        if k % 5 == 0:
            for checker in checkers:
                checker.check()


# Decisions.


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


@pytest.mark.parametrize(("ends", "asked_again"), [("here", 0), ("elsewhere", 0), ("guest", 1)])
def test_what_is_held_is_decided_on_again_at_an_answer(ends: str, asked_again: int) -> None:
    """Between two ticks: where the answer's engine is, and where its user is."""
    busy = {"traffic": times(0.5), "lengths": lengths(30, 100)}
    if asked_again == 0:
        providers = [busy | {"traffic": times(0.5, 1.0)}, {}]
    else:
        providers = [busy, {"traffic": times(1.0), "lengths": lengths(30, 20)}]
    scenario = market(*providers, decision_interval_s=5, gossip_interval_s=100, slo={"thresholds_s": [1000]})
    batch = MarketBatch([scenario])
    asked_s = []

    def decide(batch: MarketBatch, actions: Actions) -> None:
        actions.route[...] = HOLD
        heads = batch.markets.providers[0]["head"]
        if heads[0] == 0:
            actions.route[0, 0] = LOCAL if ends == "here" else FIRST_CANDIDATE
        if heads[asked_again] == 1:
            asked_s.append(float(batch.now_s[0]))

    for _ in run(batch, decide):
        if len(asked_s) > 3:
            break
    q = batch.markets.requests[0]
    answer_s = q["finish_s"][0] + (0.025 if ends == "elsewhere" else 0.0)
    assert 1.0 < answer_s < 5.0
    assert asked_s == [1.0, answer_s, 5.0, 10.0]
    assert batch.markets.providers[0, 1 - asked_again]["head"] == -1


def test_a_refusal_is_back_after_a_round_trip_with_the_refuser_masked() -> None:
    scenario = market({"traffic": times(0.5), "lengths": lengths(30, 20)}, {}, {}, rtt_ms=80)
    batch = MarketBatch([scenario])
    actions = batch.actions()
    actions.terms[..., MAX_WAIT_S] = -1.0  # nobody takes anything
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
    actions.terms[..., MAX_WAIT_S] = -1.0
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
    actions.terms[..., MAX_WAIT_S] = -1.0
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
        actions.terms[..., MAX_WAIT_S] = -1.0

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
        actions.terms[0, 1, MAX_WAIT_S] = 0.3
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
    """It is a guest while it is in the peer's engine, neither on its way there nor back."""
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
            status, guests = int(m.requests[0]["status"][0]), int(m.providers[0, 1]["remote"])
            seen.append((status, int(m.accounts[0, 0, ESCROW]), guests))
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


def test_a_router_that_sees_everything_places_at_once_whatever_the_terms() -> None:
    batch = MarketBatch([market({"traffic": times(0.5, 0.6), "lengths": lengths(30, 500)}, {}, {})])

    def decide(batch: MarketBatch, actions: Actions) -> None:
        actions.terms[..., MAX_WAIT_S] = -1.0
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


# Joins and departures.


def test_an_executor_that_leaves_gives_its_guests_back_after_ten_seconds() -> None:
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


def test_both_executors_of_a_duel_stop_when_the_origin_leaves() -> None:
    scenario = market(
        {"traffic": times(1.5, 2.5), "lengths": lengths(50, 6000), "online_s": [[0, 20]]},
        {},
        {},
        economy={"duel_probability": 1, "stake_rule": "fixed"},
        slo={"thresholds_s": [1000]},
    )
    batch = MarketBatch([scenario])
    checker = Checker(batch, 0)
    for _ in run(batch, to_candidates):
        checker.check()
        if 4 <= batch.now_s[0] < 20:
            assert batch.markets.engines[0]["running"].tolist() == [0, 2, 2]
        elif batch.now_s[0] == 20:
            assert batch.markets.engines[0]["running"].tolist() == [0, 0, 0]
    counts = batch.markets.providers[0, 0]["counts"]
    assert (counts[DUELS_STARTED], counts[DUELS_VOID], counts[OWN_FAILED], counts[OWN_DONE]) == (2, 2, 2, 0)


def test_one_leg_of_a_duel_is_enough() -> None:
    """The user's executor leaves: the copy answers, nothing returns, and there is nothing to judge."""
    scenario = market(
        {"traffic": times(1.5), "lengths": lengths(50, 2000)},
        {"online_s": [[0, 5]]},
        {"online_s": [[0, 99]]},
        economy={"duel_probability": 1, "stake_rule": "fixed"},
        slo={"thresholds_s": [1000]},
    )
    batch = MarketBatch([scenario])
    checker = Checker(batch, 0)
    for _ in run(batch, to_candidates):
        checker.check()
    counts = batch.markets.providers[0, 0]["counts"]
    assert (counts[RETURNED], counts[DUELS_VOID], counts[DUELS_SETTLED], counts[OWN_DONE]) == (0, 1, 0, 1)
    assert batch.markets.accounts[0, :, FREE].tolist() == [999 * MICRO, 1000 * MICRO, 1001 * MICRO]


def test_requests_of_lost_duels_never_outgrow_the_room_for_them() -> None:
    """The executors of both duels leave. More duels could outgrow the requests' records in a batch wide in duels."""
    scenario = market(
        {"traffic": times(0.5, 1.5), "lengths": lengths(50, 2000)},
        *[{"online_s": [[0, 4]]}] * 2,
        *[{"online_s": [[5, 100]]}] * 5,
        gossip_interval_s=1.0,
        economy={"duel_probability": 1, "judges": 3},
        slo={"thresholds_s": [1000]},
    )
    planned = plan(scenario, 3)
    assert planned.capacity == 2 * 5
    batch = MarketBatch([planned], shape=Shape(8, planned.capacity, 50))
    checker = Checker(batch, 0)

    for _ in run(batch, to_candidates):
        checker.check()
    counts = batch.markets.providers[0, 0]["counts"]
    assert counts[[RETURNED, DUELS_STARTED, DUELS_VOID, OWN_DONE]].tolist() == [2, 2, 2, 2]


# What providers say of themselves.


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


def test_a_liar_promises_what_it_advertises() -> None:
    lie = {"load": 0.5, "speed": 2.0}
    base = {"traffic": times(1.5), "lengths": lengths(100, 50)}
    honest, lying = (MarketBatch([market(base, peer)]) for peer in ({}, {"misreport": lie}))
    for batch in (honest, lying):
        finish(batch, to_candidates)
    q, told = honest.markets.requests[0], lying.markets.requests[0]
    assert told["promised_tpot_s"][0] == pytest.approx(q["promised_tpot_s"][0] / 2)
    assert told["promised_ttft_s"][0] - 0.05 == pytest.approx((q["promised_ttft_s"][0] - 0.05) * 0.5 / 2)
    assert told["finish_s"][0] == q["finish_s"][0]


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
        """The second request is held, so that the first provider is asked at each tick."""
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


# Money.


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


# Duels.


def duel_market(arrivals_s: Any, strengths: tuple[float, float], output: int = 30, **economy: Any) -> Scenario:
    """n0 asks, n1 and n2 can answer, n3 to n5 can only judge."""
    judge = {"serves": ["x"], "model": "qwen3-4b"}
    return market(
        {"traffic": times(*arrivals_s), "lengths": lengths(40, output)},
        {"strength": strengths[0]},
        {"strength": strengths[1]},
        *[judge] * 3,
        economy={"duel_probability": 1, "stake_rule": "fixed", "initial_stake": 4, "initial_credit": 5000, **economy},
    )


def test_a_duel_pays_executors_and_judges_and_the_winner_takes_the_stake() -> None:
    batch = MarketBatch([duel_market([1.5], (-20, 20))])
    finish(batch, to_candidates)
    accounts = batch.markets.accounts[0] // MICRO
    assert accounts[:, FREE].tolist() == [5000 - 5, 5001, 5001, 5001, 5001, 5001]
    assert accounts[:, STAKED].tolist() == [4, 0, 8, 4, 4, 4]
    assert accounts[:, ESCROW].tolist() == [0] * 6
    counts = batch.markets.providers[0]["counts"]
    assert counts[:, JUDGED].tolist() == [0, 0, 0, 1, 1, 1]
    assert counts[:, SERVED_FOR_PEERS].tolist() == [0, 1, 1, 0, 0, 0]
    assert counts[0, [DUELS_STARTED, DUELS_SETTLED, DUELS_VOID]].tolist() == [1, 1, 0]
    peer_stats = batch.markets.peer_stats[0, 0]
    assert peer_stats[:, DUELS_WON].tolist() == [0, 0, 1, 0, 0, 0]
    assert peer_stats[:, DUELS_LOST].tolist() == [0, 1, 0, 0, 0, 0]
    q = batch.markets.requests[0]
    back_s = q["finish_s"][:2] + 0.025  # the user has whichever answer comes first
    assert q["kind"][:5].tolist() == [USER, COPY, JUDGEMENT, JUDGEMENT, JUDGEMENT]
    assert q["answer_s"][0] == pytest.approx(back_s.min())


def test_the_stronger_model_wins_more_duels() -> None:
    """Three judges, each for the stronger with chance 3/4: it wins with 27/64 + 27/64."""
    batch = MarketBatch([duel_market(np.linspace(1, 95, 600), (math.log(3), 0.0))], [11])
    finish(batch, to_candidates)
    won, lost = batch.markets.peer_stats[0, 0, 1, [DUELS_WON, DUELS_LOST]]
    settled = won + lost
    assert batch.markets.peer_stats[0, 0, 2, [DUELS_WON, DUELS_LOST]].tolist() == [lost, won]
    assert settled == batch.markets.providers[0, 0]["counts"][DUELS_SETTLED] > 500
    chance = 54 / 64
    assert abs(won / settled - chance) < 4 * math.sqrt(chance * (1 - chance) / settled)
    assert batch.markets.accounts[0, :, STAKED].sum() == 24 * MICRO


def test_duels_do_not_depend_on_the_width_of_the_batch() -> None:
    """Two judges for three seats: nobody else sits there, however many providers another market has."""
    wide = market({"traffic": times(*np.linspace(1, 95, 200)), "lengths": lengths(40, 30)}, *[{}] * 40)
    narrow = duel_market(np.linspace(1, 95, 200), (0.4, 0.0))
    narrow = replace(narrow, providers=narrow.providers[:-1])
    alone, beside = MarketBatch([narrow], [5]), MarketBatch([wide, narrow], [6, 5])
    checker = Checker(beside, 1)
    for _ in run(beside, to_candidates):
        checker.check()
    finish(alone, to_candidates)
    assert beside.markets.accounts[1, :5].tolist() == alone.markets.accounts[0].tolist()
    counts = alone.markets.providers[0]["counts"]
    assert counts[:, JUDGED].sum() == 2 * counts[0, DUELS_STARTED] == 400
    np.testing.assert_array_equal(beside.requests(1).latency_s, alone.requests(0).latency_s)


def test_about_the_set_share_of_delegated_requests_duels() -> None:
    batch = MarketBatch([duel_market(np.linspace(1, 95, 600), (0.0, 0.0), duel_probability=0.3)], [2])
    finish(batch, to_candidates)
    counts = batch.markets.providers[0, 0]["counts"]
    assert counts[DELEGATED] == 600 + counts[DUELS_STARTED]
    assert abs(counts[DUELS_STARTED] / 600 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 600)


@pytest.mark.parametrize("judging", [True, False])
def test_a_market_ends_with_its_duels(judging: bool) -> None:
    """Whoever works on one when the market ends, a judge or the second executor, is paid and fined nothing."""
    scenario = duel_market([1.5], (-20, 20), 400)
    if not judging:  # one is far faster than the other
        fast = replace(scenario.providers[2], gpu="h100")
        scenario = replace(scenario, providers=(*scenario.providers[:2], fast, *scenario.providers[3:]))
    scenario = replace(scenario, decision_interval_s=0.05, gossip_interval_s=0.05)  # judges take less than a second
    end_s = 0.0
    batch = MarketBatch([scenario])
    for _ in run(batch, to_candidates):
        q = batch.markets.requests[0]
        at_work = ((q["kind"] == JUDGEMENT) & (q["status"] == IN_ENGINE)).any()
        out = (q["status"][:2] == IN_ENGINE).any() and not np.isnan(q["answer_s"][0])
        if end_s == 0.0 and (at_work if judging else out):
            end_s = float(batch.now_s[0])
    assert end_s > 0.0
    batch = MarketBatch([scenario])
    batch.markets.market[0]["duration_s"] = end_s
    checker = Checker(batch, 0)
    for _ in run(batch, to_candidates):
        checker.check()
    counts = batch.markets.providers[0, 0]["counts"]
    assert counts[[DUELS_STARTED, DUELS_VOID, DUELS_SETTLED]].tolist() == [1, not judging, judging]
    accounts = batch.markets.accounts[0]
    assert accounts[:, ESCROW].sum() == 0 and accounts[:, STAKED].tolist() == [4 * MICRO] * 6
    assert batch.markets.providers[0]["counts"][:, JUDGED].sum() == 0


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


# Rewards.


def episode(reward: Reward, seed: int, decide_seed: int | None = None) -> tuple[np.ndarray, np.ndarray, MarketBatch]:
    """Rewards [steps, N] and the time at which each step began, of a market with churn, duels and an early horizon."""
    scenario = market(
        {"traffic": times(*np.arange(0.5, 50, 0.7)), "lengths": lengths(100, 900)},
        {"traffic": times(*np.arange(0.3, 50, 2.3)), "lengths": lengths(50, 300), "online_s": [[0, 35]]},
        {"gpu": "a100-80g", "online_s": [[10, 60]]},
        {"max_num_seqs": 2, "traffic": times(*np.arange(1.1, 40, 1.9)), "lengths": lengths(60, 400)},
        economy={"pricing": "per_ktok", "duel_probability": 0.4, "compute_cost_per_ktok": 0.7},
        slo={"thresholds_s": [5, 10, 20]},
        duration_s=60,
        drain_s=2,
    )
    batch = MarketBatch([scenario], [seed], reward=reward)
    decide = by_rule("power_of_two") if decide_seed is None else randomly(np.random.default_rng(decide_seed), 0.2)
    rewards, began = [], []
    for began_s in run(batch, decide):
        rewards.append(batch.reward[0].astype(np.float64))
        began.append(began_s)
    return np.array(rewards), np.array(began), batch


@pytest.mark.parametrize("decide_seed", [None, 8])
@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.8])
@pytest.mark.parametrize("team_weight", [0.0, 0.5])
def test_dense_rewards_sum_to_the_sparse_ones(gamma: float, team_weight: float, decide_seed: int | None) -> None:
    """Potential is 0 at the start and at the end, so the discounted sums agree, whatever is unfinished."""
    sums = []
    for dense in (False, True):
        rewards, began_s, batch = episode(Reward(team_weight, gamma, dense), 6, decide_seed)
        sums.append((gamma**began_s) @ rewards)
        assert batch.markets.market["unresolved"][0] > 0
        if gamma == 1.0 and team_weight == 0.0 and not dense:
            np.testing.assert_allclose(rewards.sum(0), batch.markets.providers[0]["profit"], rtol=1e-5, atol=1e-5)
    sparse, dense_sum = sums
    assert len(set(sparse.round(3))) == 4
    np.testing.assert_allclose(dense_sum, sparse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("team_weight", [0.0, 1.0])
def test_the_dense_reward_comes_with_the_arrival_and_is_told_apart(team_weight: float) -> None:
    """One request, worth 3 and certain to be in time: 3 are expected from its arrival at 0.5 s on until it is done."""
    slo = {"classes": {"chat": {"share": 1, "deadline_s": 90, "value": 3}}}
    scenario = market({"traffic": times(0.5), "lengths": lengths(100, 900)}, {}, slo=slo, duration_s=10)
    share = 1 - team_weight / 2
    batch = MarketBatch([scenario], reward=Reward(team_weight, 0.9, True))
    steps = run(batch, here)
    seen = [(float(batch.reward[0, 0]), float(batch.given[0, 0]), float(batch.elapsed_s[0])) for _ in steps]
    arrived = 0.9**0.5 * 3 * share
    assert seen[0] == pytest.approx((arrived, arrived, 0.5))
    for paid, given_, elapsed_s in seen[1:3]:  # placed, and on its way
        assert paid == pytest.approx((0.9**elapsed_s - 1) * 3 * share, rel=1e-3) and given_ == 0 < elapsed_s
    sparse = MarketBatch([scenario], reward=Reward(team_weight, 0.9, False))
    seen = [(float(sparse.reward[0, 0]), float(sparse.given[0, 0])) for _ in run(sparse, here)]
    assert seen[0] == seen[1] == (0, 0)
    assert max(seen) == (pytest.approx((3 - 0.02 * 0.9) * share), 0)  # less the cost of 900 tokens


def test_team_weight_mixes_own_profit_with_the_mean() -> None:
    own = episode(Reward(0.0, 0.99, True), 6)[0]
    team = episode(Reward(1.0, 0.99, True), 6)[0]
    half = episode(Reward(0.5, 0.99, True), 6)[0]
    mean = own.mean(1, keepdims=True)
    assert np.abs(own - mean).max() > 0.5
    np.testing.assert_allclose(team, np.broadcast_to(mean, own.shape), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(half, 0.5 * own + 0.5 * mean, rtol=1e-5, atol=1e-5)


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


def test_streams_of_guests_are_what_the_engine_has_generated() -> None:
    batch = MarketBatch([market({"traffic": times(0.5), "lengths": lengths(50, 3000)}, {})])
    grew = 0
    for _ in run(batch, to_candidates):
        q = batch.markets.requests[0]
        if q["status"][0] == IN_ENGINE:
            out = int(tokens_out(batch.markets.engines[0, 1], q, 0))
            assert grew <= out <= 3000
            grew = out
    assert grew > 2000
