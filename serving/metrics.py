"""What a node counts, for Prometheus and for its own overview."""

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from wwwserve.agents.decision import HOLD, LOCAL
from wwwserve.agents.protocol import MICRO
from wwwserve.serving.engine.prefix_index import Drift
from wwwserve.serving.ledger.journal import Balance

log = logging.getLogger("wwwserve.metrics")

LATENCY_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


@dataclass(slots=True)
class Traffic:
    """Requests between this node and one peer."""

    handed: int = 0  # that the peer took
    answered: int = 0  # of them, whole
    served: int = 0  # of the peer, taken here
    here: int = 0  # of those, in the engine now


@dataclass(slots=True)
class PromptTokens:
    """Tokens of prompts whose engine said how many it had in its prefix cache."""

    prompt: int = 0
    predicted: int = 0  # to be cached
    reported: int = 0


class Metrics:
    """The counts of one node."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._accepted = self._counter("requests_accepted", "users' requests that were taken")
        self._turned_away = self._counter("requests_turned_away", "users' requests that found too many waiting")
        self._ended = self._counter("requests_ended", "users' requests by how and where they ended", "outcome", "where")
        self._on_time = self._counter("requests_on_time", "users' requests answered by their last deadline")
        self._kept = self._counter("requests_kept", "users' requests that stay here by their class or what they ask")
        self._decisions = self._counter("decisions", "what was decided", "route")
        self._remote = self._counter("remote_ended", "peers' requests by how they ended", "outcome")
        self._offers_refused = self._counter("offers_refused", "peers' requests that were not taken")
        self._refused = self._counter("messages_refused", "peers' messages that were not taken as theirs", "kind")
        self._duels = self._counter("duels", "requests that went to two, by what came of the comparison", "outcome")
        self._duelled = self._counter("duel_answers", "peers' answers that were judged", "peer", "result")
        self._left_alone = self._counter("peers_left_alone", "times that a failing peer was asked nothing for a while")
        self._judged = self._counter("duels_judged", "peers' duels that were judged here", "outcome")
        self._latency = Histogram(
            "wwwserve_latency_seconds", "from arrival to the end of the answer", registry=self.registry,
            buckets=LATENCY_BUCKETS_S,
        )  # fmt: skip
        self._held = self._gauge("held", "users' requests that are not decided")
        self._remote_now = self._gauge("remote", "peers' requests in the engine")
        self._engine_up = self._gauge("engine_up", "whether the engine answers")
        self._peers = self._gauge("peers", "peers that are there")
        self._unspoken = self._gauge("peers_other_version", "peers with no version of the protocol in common")
        self._credits = Gauge(
            "wwwserve_credits", "credits in the channel with a peer, by whose they are and whether free or in escrow",
            ("peer", "whose", "state"), registry=self.registry,
        )  # fmt: skip
        self._tariff = Gauge(
            "wwwserve_tariff", "credits per 1000 tokens that peers are to pay", ("tokens",), registry=self.registry
        )
        self._markup = self._gauge("markup", "factor on the own marginal cost in the tariff")
        self._margin = self._gauge("margin", "price of a usual request over its marginal cost now, less 1")
        self._ledger_full = self._gauge("ledger_full", "whether the ledger cannot be written")
        self._prefix_tokens = self._counter(
            "prefix_tokens",
            "tokens of prompts in a prefix cache, as predicted and as the engine reports",
            "where",
            "by",
        )
        self._prefix_drift = Gauge(
            "wwwserve_prefix_drift", "mean difference of the two, as a share of the prompt", ("where",),
            registry=self.registry,
        )  # fmt: skip
        self._prefix_alarm = Gauge("wwwserve_prefix_alarm", "whether the two part", ("where",), registry=self.registry)
        self.drifts = {where: Drift() for where in ("local", "peer")}
        self.prompts = {where: PromptTokens() for where in self.drifts}
        self.traffic: dict[str, Traffic] = {}  # by peer
        self._routes = {HOLD: self._decisions.labels("hold"), LOCAL: self._decisions.labels("local")}
        self._to_peer = self._decisions.labels("peer")
        self._counts = {
            "accepted": 0, "answered": 0, "failed": 0, "cancelled": 0, "on_time": 0, "turned_away": 0, "handed_over": 0,
            "continued": 0,
        }  # fmt: skip
        self.duels = {"won": 0, "tie": 0, "void": 0}  # by what came of the comparison
        self.remote_now = 0
        self.total_s = 0.0

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"wwwserve_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"wwwserve_{name}", text, registry=self.registry)

    def accepted(self, turn: int = 1) -> None:
        """A user's request was taken, which is this `turn` of its session, from 1."""
        self._accepted.inc()
        self._counts["accepted"] += 1
        self._counts["continued"] += turn > 1

    def turned_away(self) -> None:
        """A user's request found too many waiting."""
        self._turned_away.inc()
        self._counts["turned_away"] += 1

    def kept(self) -> None:
        """A user's request may not leave."""
        self._kept.inc()

    def decided(self, route: int) -> None:
        """A decision was made."""
        self._routes.get(route, self._to_peer).inc()

    def ended(self, outcome: str, where: str, took_s: float, on_time: bool) -> None:
        """A user's request ended: "answered", "failed" or "cancelled", "local", at a "peer" or "nowhere"."""
        self._ended.labels(outcome, where).inc()
        self._counts[outcome] += 1
        if outcome == "answered":
            self._latency.observe(took_s)
            self.total_s += took_s
            self._counts["handed_over"] += where == "peer"
        if on_time:
            self._on_time.inc()
            self._counts["on_time"] += 1

    def prefix(self, remote: bool, predicted: int, reported: int, prompt: int) -> None:
        """Of a prompt so many tokens were predicted, and reported, to be cached, on the own engine or a peer's."""
        where = "peer" if remote else "local"
        self._prefix_tokens.labels(where, "prediction").inc(predicted)
        self._prefix_tokens.labels(where, "report").inc(reported)
        tokens = self.prompts[where]
        tokens.prompt += prompt
        tokens.predicted += predicted
        tokens.reported += reported
        drift = self.drifts[where]
        before = drift.alarm
        drift.observe(predicted, reported, prompt)
        self._prefix_drift.labels(where).set(drift.share)
        self._prefix_alarm.labels(where).set(drift.alarm)
        if drift.alarm and not before:
            log.warning("prefixes are cached otherwise than predicted", extra={"where": where, "drift": drift.share})

    def handed(self, peer: str) -> None:
        """A peer took a request."""
        self.traffic.setdefault(peer, Traffic()).handed += 1

    def brought(self, peer: str) -> None:
        """A peer's answer came whole."""
        if peer in self.traffic:  # else it was forgotten meanwhile
            self.traffic[peer].answered += 1

    def remote(self, peer: str, change: int, outcome: str = "") -> None:
        """A peer's request came, or ended with an outcome."""
        self.remote_now += change
        if outcome:
            self._remote.labels(outcome).inc()
        else:
            self.traffic.setdefault(peer, Traffic()).served += 1
        if peer in self.traffic:
            self.traffic[peer].here = max(0, self.traffic[peer].here + change)

    def offer_refused(self) -> None:
        """A peer's request was not taken."""
        self._offers_refused.inc()

    def message_refused(self, kind: str) -> None:
        """A message came that is no peer's, or not as its peer sent it; `kind` as `serving.http.messages` has it."""
        self._refused.labels(kind).inc()

    def duel(self, outcome: str) -> None:
        """A duel of the own ended: "won" by one of the two, a "tie", or "void"."""
        self._duels.labels(outcome).inc()
        self.duels[outcome] += 1

    def duelled(self, peer: str, won: bool) -> None:
        """A peer's answer won or lost."""
        self._duelled.labels(peer, "won" if won else "lost").inc()

    def peer_left_alone(self) -> None:
        """A peer that fails is asked nothing for a while."""
        self._left_alone.inc()

    def forget(self, peer: str) -> None:
        """Drop what was counted of a peer by its name."""
        self.traffic.pop(peer, None)
        for result in ("won", "lost"):
            with suppress(KeyError):
                self._duelled.remove(peer, result)

    def judged(self, outcome: str) -> None:
        """A peer's duel was judged here: "voted" or "undecided"."""
        self._judged.labels(outcome).inc()

    def totals(self) -> dict[str, float]:
        """Counts of users' requests, and the mean latency of those answered, s."""
        answered = self._counts["answered"]
        return self._counts | {"mean_latency_s": round(self.total_s / answered, 4) if answered else 0.0}

    def page(
        self, *, held: int, engine_up: bool, peers: int, balances: Sequence[Balance] = (), ledger_full: bool = False,
        tariff: Sequence[float] = (), markup: float = 1.0, margin: float | None = None, unspoken: int = 0,
    ) -> bytes:  # fmt: skip
        """The page that Prometheus reads."""
        for tokens, price in zip(("input", "cached_input", "output"), tariff, strict=False):
            self._tariff.labels(tokens).set(price)
        self._markup.set(markup)
        self._margin.set(math.nan if margin is None else margin)
        for each in balances:
            for whose, free, escrow in (("own", each.free, each.escrow), ("peer", each.peer_free, each.peer_escrow)):
                self._credits.labels(each.peer, whose, "free").set(free / MICRO)
                self._credits.labels(each.peer, whose, "escrow").set(escrow / MICRO)
        self._ledger_full.set(ledger_full)
        self._held.set(held)
        self._remote_now.set(self.remote_now)
        self._engine_up.set(engine_up)
        self._peers.set(peers)
        self._unspoken.set(unspoken)
        return generate_latest(self.registry)
