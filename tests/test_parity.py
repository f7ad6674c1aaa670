"""One decision, two worlds: a simulated run's messages, replayed through the live node's provider."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from wwwserve.agents.decision import FIRST_CANDIDATE, make_actions
from wwwserve.agents.dice import WORDS
from wwwserve.agents.knowledge import AD_TIME_S
from wwwserve.agents.policy import bundle
from wwwserve.agents.protocol import PER_KTOK
from wwwserve.agents.rules import RULES, Policy, Rule
from wwwserve.agents.view import Views
from wwwserve.envs import tape
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import KINDS, sample
from wwwserve.envs.scenario import load
from wwwserve.envs.state import MarketPlan, plan
from wwwserve.serving.provider import Decision, Market, Out, Provider, Request

NOTES = 1_000_000
NEEDED = 10_000  # decisions on requests, for each policy


def markets() -> list[MarketPlan]:
    """One of every kind, one with duels, one with departures, and one with prices and classes."""
    rng = np.random.default_rng(11)
    drawn = [sample(kind, rng, 420.0) for kind in KINDS]
    packaged = [load("paper/bursty-churn"), load("market/deadlines"), load("liars/first")]
    duels = load("paper/mixed-hardware")
    economy = duels.economy.__class__(**{**vars(duels.economy), "duel_probability": 0.3})
    packaged.append(duels.__class__(**{**vars(duels), "economy": economy}))
    return [plan(scenario, 40 + k) for k, scenario in enumerate([*drawn, *packaged])]


@pytest.fixture(scope="module")
def plans() -> list[MarketPlan]:
    return markets()


class Replay:
    """The providers of one market as live ones, told what the tape says."""

    def __init__(self, planned: MarketPlan, batch: MarketBatch, b: int, policy: Policy) -> None:
        scenario = planned.scenario
        record = batch.markets.market[b]
        classes, deadlines = int(record["n_classes"]), int(record["n_deadlines"])
        self.batch, self.b = batch, b
        self.names = [provider.name for provider in scenario.providers]
        self.read = 0
        self.compared = 0
        self.pending: dict[int, Decision] = {}
        self.out: dict[int, list[Out]] = {}
        asks = [provider.serves[0] for provider in scenario.providers]
        self.serves = [[frozenset({""} if ask in peer.serves else ()) for peer in scenario.providers] for ask in asks]
        self.providers = []
        for i, profile in enumerate(planned.profiles):
            market = Market(
                known=planned.known[i, :classes],
                deadlines=planned.deadlines[:, :deadlines],
                prices=tuple(record["prices"][: int(record["n_prices"])].tolist()),
                per_ktok=int(record["pricing"]) == PER_KTOK,
                rtt_s=float(record["rtt_s"]),
                gossip_s=float(record["gossip_s"]),
            )
            live = Provider(
                policy, profile, market, seed=i, mean_prompt=planned.mean_prompt[i], mean_output=planned.mean_output[i]
            )
            for j, name in enumerate(self.names):  # in the market's order, as candidates are drawn in it
                if j != i:
                    live.gone(name)
            self.providers.append(live)

    def notes(self) -> Iterator[Any]:
        noted = int(self.batch.markets.market["noted"][self.b])
        assert noted <= NOTES, "the tape is too short"
        yield from self.batch.markets.tape[self.b, self.read : noted]
        self.read = noted

    def advance(self) -> None:
        """Take in what the last step of the market has told its providers."""
        for n in self.notes():
            self.tell(n)

    def tell(self, n: Any) -> None:
        i, kind, now_s, x = int(n["who"]), int(n["kind"]), float(n["now_s"]), n["x"].tolist()
        live = self.providers[i]
        peer = self.names[n["peer"]] if n["peer"] >= 0 else ""
        if kind == tape.SCRAPED:
            live.scraped(now_s, *x[:3])
        elif kind == tape.TICKED:
            live.ticked(x[0])
        elif kind == tape.ARRIVED:
            live.arrived(Request(int(n["request"]), int(x[0]), int(x[1]), x[2]))
        elif kind == tape.MISSED:
            live.missed()
        elif kind == tape.CAME_BACK:
            q = self.batch.markets.requests[self.b, int(n["request"])]
            live.queue(Request(int(n["request"]), int(q["klass"]), int(q["prompt"]), float(q["arrival_s"])), front=True)
        elif kind == tape.DROPPED:
            assert live.dropped(live.queues[int(x[0])][0])
        elif kind == tape.PUBLISHED:
            live.stake = x[0]
            said = live.advertise(now_s)
            heard = self.batch.markets.adverts[self.b, i]
            if self.batch.plans[self.b].scenario.providers[i].misreport is None:
                np.testing.assert_array_equal(said, heard)
            for j, other in enumerate(self.providers):
                if j != i:
                    other.heard(self.names[i], heard, float(heard[AD_TIME_S]), self.serves[j][i])
        elif kind == tape.SENT:
            live.sent(peer)
            decided = self.pending.get(i)
            if decided is not None and decided.request.key == int(n["request"]):
                assert decided.peer == peer
                del self.pending[i]
        elif kind == tape.REFUSED:
            live.refused(peer)
            decided = self.pending.get(i)
            if decided is not None and decided.request.key == int(n["request"]):
                assert decided.peer == peer
                live.come_back(self.pending.pop(i))
        elif kind == tape.ENDED:
            live.ended(peer)
        elif kind == tape.ANSWERED:
            live.answered(peer, x[0], x[1])
        elif kind == tape.FINISHED:
            live.finished(int(x[0]), int(x[1]))
        elif kind == tape.LOOK:
            live.looked([])
            self.out[i] = []
        elif kind == tape.LOOKED:
            self.out[i].append(Out(peer, x[0], x[1], x[2], int(x[3])))
            live.looked(self.out[i])
        elif kind == tape.DUELLED:
            live.duelled(peer, x[0] == 1.0)
        elif kind == tape.GUESTS:
            live.guests += int(x[0])
        elif kind == tape.PROBED:
            self.probed(live, x)
        elif kind == tape.ADVERT_DUE:
            live.advert_due = True
        elif kind == tape.LEFT:
            live.left()
        elif kind == tape.ASKED:
            live.credit = round(x[0])
            live.generator[:] = n["dice"][:WORDS]
            head = live.ask(now_s)
            assert (-1 if head is None else head.key) == int(n["request"])
        elif kind == tape.TURN:
            decision = live.choose(now_s)
            if decision is not None:
                assert decision.request.key == int(n["request"])
                if decision.route >= FIRST_CANDIDATE:
                    self.pending[i] = decision
        else:
            raise AssertionError(f"a note of kind {kind}")

    def probed(self, live: Provider, x: list[float]) -> None:
        """A provider takes what the simulated one takes."""
        promise = live.consider(int(x[0]), x[1])
        assert (promise is not None) == (x[2] == 1.0)
        assert promise is None or (promise.ttft_s > 0 and promise.tpot_s > 0)

    def compare(self, now_s: float) -> None:
        """The views of all that are asked now, here and there."""
        for i, live in enumerate(self.providers):
            if not self.batch.active[self.b, i]:
                continue
            seen = live.see(now_s)
            for mine, theirs, name in zip(seen, self.batch.views, Views._fields, strict=True):
                np.testing.assert_array_equal(mine[0], theirs[self.b, i], err_msg=f"{name} of {self.names[i]}")
            if live.head is not None:
                np.testing.assert_array_equal(live.dice[0], self.batch.dice[self.b, i])
                self.compared += 1


def policies() -> list[str]:
    return [*RULES, "learned"]


@pytest.mark.parametrize("name", policies())
def test_a_live_provider_sees_and_decides_as_the_simulated_one(name: str, plans: list[MarketPlan]) -> None:
    policy: Policy = bundle.load(bundle.DEFAULT_BUNDLE) if name == "learned" else Rule(name)
    batch = MarketBatch(plans, notes=NOTES)
    replays = [Replay(planned, batch, b, policy) for b, planned in enumerate(plans)]
    actions, mine = batch.actions(), make_actions(1)
    routes = 0
    for _ in range(100_000):
        for b, replay in enumerate(replays):
            replay.advance()
            replay.compare(float(batch.now_s[b]))
        if batch.over.all() or sum(replay.compared for replay in replays) > 2 * NEEDED:
            break
        policy.decide(batch.views, batch.active, batch.dice, actions)
        asked = batch.active & (batch.views.me[..., 0] > 0.5)
        expected = {(int(b), int(i)): int(actions.route[b, i]) for b, i in np.argwhere(asked)}
        for (b, i), route in expected.items():
            live = replays[b].providers[i]
            policy.decide(live.view, np.ones(1, np.bool_), live.dice, mine)
            assert int(mine.route[0]) == route
            np.testing.assert_array_equal(mine.terms[0], actions.terms[b, i])
            routes += 1
        batch.step(actions)
    assert routes >= NEEDED, f"only {routes} decisions"
    assert not any(replay.pending for replay in replays)
