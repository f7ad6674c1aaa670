"""What must hold in a market at every moment."""

import math
from typing import Any

import numpy as np

from wwwserve.agents.classes import MAX_CLASSES
from wwwserve.agents.hardware import BLOCK_TOKENS, KV_BLOCKS
from wwwserve.agents.knowledge import AD_HELD, OUT
from wwwserve.agents.protocol import ESCROW
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.engine import NEVER, advance
from wwwserve.envs.market.offers import OFFER_TIMEOUT_S
from wwwserve.envs.prefix_cache import Cache
from wwwserve.envs.state import (
    ANSWER,
    ANSWERING,
    COPY,
    DONE,
    FAILED,
    FUTURE,
    HELD,
    IN_ENGINE,
    JUDGEMENT,
    LOST,
    NOTHING,
    OFFER,
    OFFERED,
    OWN_ARRIVED,
    OWN_DONE,
    OWN_FAILED,
    REFUSAL,
    TIMEOUT,
    USER,
)


class Checker:
    """Everything that must add up in market `b` of a batch, computed anew from its requests."""

    WALKED = (
        "next", "prompt", "output", "generated", "finish_tick", "origin", "klass", "kind", "out_next", "out_prev",
        "mail", "mail_next", "mail_s", "finish_s", "status", "cached", "admitted", "leaf",
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
        self.tree, self.cached = m.tree[self.b], m.cached[self.b]
        self.turns = m.turns[self.b, : self.market["n_turns"]]
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
                    assert tail < 0 or self.q["arrival_s"][tail] <= self.q["arrival_s"][r]
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
            users = np.zeros(len(self.tree), int)
            for r in e["slots"][: e["running"]].tolist():
                held = self.rows["prompt"][r] + self.rows["generated"][r]
                finish_tick = self.rows["finish_tick"][r]
                if finish_tick != NEVER:
                    out = self.rows["output"][r] - (finish_tick - tick)
                    held = self.rows["prompt"][r] + out - 1
                    decoding, context = decoding + 1, context + held
                    phase[(tick - held) % BLOCK_TOKENS] += 1
                blocks += -(-held // BLOCK_TOKENS)
                v = self.rows["leaf"][r] if e["cache_unit"] > 0 else -1
                if v >= 0:  # whole blocks of its prompt may be others' as well
                    path = int(self.tree["start"][v] + self.tree["blocks"][v])
                    blocks -= min(self.rows["admitted"][r] // BLOCK_TOKENS, path)
                while v >= 0:
                    users[v] += 1
                    v = int(self.tree["parent"][v])
                assert r not in found
                found[r] = i
            if e["cache_unit"] > 0:
                blocks += self.prefixes(e, self.cached[i], users)
            assert e["free_blocks"] + blocks == e["profile"][KV_BLOCKS] and e["free_blocks"] >= 0
            assert (e["kv_tokens"], e["decoding"]) == (context, decoding)
            assert e["phase"].tolist() == phase
            tokens, count, r = 0, 0, int(e["wait_head"])
            while r >= 0:
                assert r not in found
                found[r] = i
                tokens, count = tokens + self.rows["prompt"][r] + self.rows["generated"][r], count + 1
                tokens -= self.rows["cached"][r]
                r = self.rows["next"][r]
            assert (e["waiting"], e["wait_tokens"]) == (count, tokens)
            assert self.p[i]["online"] or count + e["running"] == 0
        return found

    def prefixes(self, e: Any, cached: Any, users: Any) -> int:
        """Blocks of the prefix cache that running requests use; all are in the tree, and listed if they may go."""
        tree, resident = self.tree, cached["resident"]
        assert cached["users"].tolist() == users.tolist()
        assert ((resident >= 0) & (resident <= tree["blocks"])).all()
        below = np.flatnonzero((resident > 0) & (tree["parent"] >= 0))
        assert (resident[tree["parent"][below]] == tree["blocks"][tree["parent"][below]]).all()
        listed, v = [], int(e["evict_head"])
        while v >= 0:
            listed.append(v)
            v = int(cached["after"][v])
        assert sorted(listed) == np.flatnonzero((resident > 0) & (users == 0)).tolist()
        assert (np.diff(cached["used_s"][listed]) >= 0).all()
        assert 0 <= e["cached_blocks"] == resident[listed].sum() <= e["free_blocks"]
        return int(resident[users > 0].sum())

    def head(self, p: Any, i: int) -> None:
        """What a provider decides on is first of its class, which is open, with candidates."""
        r, c = int(p["head"]), self.rows["klass"][int(p["head"])]
        assert p["held_head"][c] == r and p["closed"][c] == 0 and self.q["opening"][r] == p["opening"]
        drawn = self.q["candidates"][r][: self.q["n_candidates"][r]].tolist()
        assert len(set(drawn)) == len(drawn) and set(drawn) <= set(range(self.n)) - {i}
        assert int(self.q["refused"][r]) < 1 << len(drawn)

    def peers(self) -> None:
        """Lists of what is out and the peer_stats' counts tell the same; remote requests are those in the engine."""
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
        remote = self.executor[away & (self.status == IN_ENGINE)]
        assert self.p["remote"][: self.n].tolist() == np.bincount(remote, minlength=self.n).tolist()
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
        assert np.array_equal(self.status == OFFERED, np.isin(mail, (OFFER, REFUSAL, TIMEOUT)))
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
        engines, requests, cached = self.engines[: self.n].copy(), self.q.copy(), self.cached.copy()
        done = np.zeros(requests.size, np.int64)
        for i, e in enumerate(engines):
            if e["running"] + e["waiting"] > 0:
                assert np.isfinite(e["wake_s"])
                until_s = np.nextafter(e["wake_s"], -np.inf)
                if until_s >= e["clock_s"]:
                    assert advance(e, Cache(self.tree, cached[i]), requests, until_s, done, 0) == 0

    def whereabouts(self, held: set[int], engine: dict[int, int]) -> None:
        """Status says where a request is, and it is there and nowhere else."""
        users = np.arange(self.status.size) < self.market["n_arrivals"]
        future = ~self.arrived()
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

    def arrived(self) -> Any:
        """Which requests have come: of sessions' later turns those whose time was set and is over."""
        numbers = np.arange(self.status.size)
        later = (self.market["n_timed"] <= numbers) & (numbers < self.market["n_arrivals"])
        coming = np.isin(numbers, self.turns)
        assert (self.q["arrival_s"][self.turns] >= self.market["now_s"]).all() or self.market["over"]
        here = np.isfinite(self.q["arrival_s"][: numbers.size]) & ~coming
        return np.where(later, here, (numbers < self.market["next_arrival"]) | (numbers >= self.market["n_arrivals"]))

    def follow(self, u: int, waits: Any) -> None:
        """Strike out the turns after request u, which has ended, unless the next one is to come or has come."""
        r = int(self.q["next_turn"][u])
        if r < 0 or np.isfinite(self.q["arrival_s"][r]):
            return
        while r >= 0:
            waits[r] = False
            r = int(self.q["next_turn"][r])

    def users(self) -> None:
        n_arrivals, now_s = int(self.market["n_arrivals"]), float(self.market["now_s"])
        answer_s, origin = self.q["answer_s"][:n_arrivals], self.origin[:n_arrivals]
        status = self.status[:n_arrivals]
        arrived = self.arrived()[:n_arrivals]
        open_ = np.isnan(answer_s)
        waits = open_.copy()  # for its end: later turns of a session that has ended never come
        for u in np.flatnonzero(arrived & ~open_).tolist():
            self.follow(u, waits)
        assert self.market["unresolved"] == waits.sum()
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
        predicted = self.q["predicted"][:n_arrivals]
        assert not predicted[~open_ | ~arrived].any() or self.market["over"]
        for i in range(self.n):
            mine = origin == i
            assert counts[i, OWN_ARRIVED] == (mine & arrived).sum()
            assert counts[i, OWN_DONE] == np.isfinite(answer_s[mine]).sum()
            assert counts[i, OWN_FAILED] == np.isinf(answer_s[mine]).sum()
            if self.market["over"]:
                assert self.p["potential"][i] == 0
            else:
                assert math.isclose(self.p["potential"][i], predicted[mine].sum(), rel_tol=1e-9, abs_tol=1e-9)
