"""What a node counts, for Prometheus and for its own overview.

Times are the market's, which are the wall clock's but in trials. Labels are few and known: classes are those of
node.yaml, keys and peers those that this node was told or remembers.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from wwwserve.agents.decision import HOLD, LOCAL
from wwwserve.agents.protocol import MICRO
from wwwserve.serving.engine.prefix_index import Drift
from wwwserve.serving.ledger.journal import Balance

log = logging.getLogger("wwwserve.metrics")

LATENCY_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60)
TPOT_BUCKETS_S = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
PLACES = ("local", "peer", "nowhere")  # where a request ended
OUTCOMES = ("answered", "failed", "cancelled")
NOTHING: Mapping[str, int] = MappingProxyType({})
KTOK = 1000.0  # tokens, of which tariffs are told elsewhere

# When each series began: nobody looks at it, and it is as many series again.
disable_created_metrics()  # type: ignore[no-untyped-call]


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

    def __init__(self, classes: Sequence[str] = ("default",)) -> None:
        """`classes` of users' requests, in the order in which they are numbered."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._accepted = self._counter("requests_accepted", "Users' requests that were taken.")
        self._turned_away = self._counter("requests_turned_away", "Users' requests that found too many waiting.")
        self._ended = self._counter(
            "requests_ended", "Users' requests by class, and how and where they ended.", "class", "outcome", "where"
        )
        self._on_time = self._counter("requests_on_time", "Users' requests answered by their last deadline.", "class")
        self._kept = self._counter("requests_kept", "Users' requests that stay here by their class or what they ask.")
        self._decisions = self._counter("decisions", "Decisions by where a request was to go.", "route")
        self._remote = self._counter("remote_requests_ended", "Peers' requests by how they ended.", "outcome")
        self._offers_refused = self._counter("offers_refused", "Peers' requests that were not taken.")
        self._refused = self._counter("messages_refused", "Peers' messages that were not taken as theirs.", "kind")
        self._duels = self._counter("duels", "Requests that went to two, by what came of the comparison.", "outcome")
        self._duelled = self._counter("duel_answers", "Peers' answers that were judged.", "peer", "result")
        self._left_alone = self._counter("peers_left_alone", "Times that a failing peer was asked nothing for a while.")
        self._judged = self._counter("duels_judged", "Peers' duels that were judged here.", "outcome")
        times = {
            "request_latency": ("Time from a user's request to the end of its answer.", LATENCY_BUCKETS_S),
            "time_to_first_token": ("Time from a user's request to the first of its stream.", TTFT_BUCKETS_S),
            "time_per_output_token": ("Time for each token of a user's stream but its first.", TPOT_BUCKETS_S),
        }
        self._latency, self._ttft, self._tpot = (
            Histogram(
                f"wwwserve_{name}_seconds", text, ("class", "where"), registry=self.registry, buckets=buckets
            ) for name, (text, buckets) in times.items()
        )  # fmt: skip
        self._held = self._gauge("requests_held", "Users' requests that are not decided.")
        self._remote_now = self._gauge("remote_requests", "Peers' requests in the engine.")
        self._engine_up = self._gauge("engine_up", "Whether an engine answers.")
        self._engine_takes = self._gauge(
            "engine_takes_requests", "Whether an engine answers and is not full.", "engine"
        )
        self._engine_requests = self._gauge("engine_requests", "Requests that an engine has.", "engine", "state")
        self._kv_usage = self._gauge(
            "engine_kv_cache_usage_ratio", "Share of an engine's KV cache that is in use.", "engine"
        )
        self._peers = self._gauge("peers", "Peers that are there.")
        self._peers_known = self._gauge("peers_known", "Peers that are there, or are configured or remembered.")
        self._unspoken = self._gauge("peers_other_version", "Peers with no version of the protocol in common.")
        self._credits = self._gauge(
            "channel_credits", "Credits in the channel with a peer, by whose they are and whether free or in escrow.",
            "peer", "whose", "state",
        )  # fmt: skip
        self._disputed = self._gauge(
            "channel_disputed_credits", "Credits that a peer and this node count differently.", "peer"
        )
        self._tariff = self._gauge("tariff_credits_per_token", "What peers are to pay.", "tokens")
        self._markup = self._gauge("markup_credits_per_token", "What peers are to pay for output beyond its own cost.")
        self._margin = self._gauge("margin_ratio", "Price of a usual request over its marginal cost now, less 1.")
        self._ledger_full = self._gauge("ledger_full", "Whether the ledger cannot be written.")
        self._prefix_tokens = self._counter(
            "prefix_tokens", "Tokens of prompts in a prefix cache, as predicted and as the engine reports.",
            "where", "by",
        )  # fmt: skip
        self._prefix_drift = self._gauge(
            "prefix_drift_ratio", "Mean difference of the two, as a share of the prompt.", "where"
        )
        self._prefix_alarm = self._gauge("prefix_alarm", "Whether prediction and report part.", "where")
        self.drifts = {where: Drift() for where in ("local", "peer")}
        self.prompts = {where: PromptTokens() for where in self.drifts}
        self.traffic: dict[str, Traffic] = {}  # by peer
        ends = [each for each in product(OUTCOMES, PLACES) if each != ("answered", "nowhere")]
        self._ends = [{each: self._ended.labels(name, *each) for each in ends} for name in classes]
        self._in_time = [self._on_time.labels(name) for name in classes]
        self._times = [
            {
                where: tuple(each.labels(name, where) for each in (self._latency, self._ttft, self._tpot))
                for where in PLACES[:2]
            } for name in classes
        ]  # fmt: skip
        for outcome in OUTCOMES:
            self._remote.labels(outcome)
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

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"wwwserve_{name}", text, labels, registry=self.registry)

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

    def ended(self, klass: int, outcome: str, where: str, took_s: float, on_time: bool) -> None:
        """A user's request ended: "answered", "failed" or "cancelled", "local", at a "peer" or "nowhere"."""
        self._ends[klass][outcome, where].inc()
        self._counts[outcome] += 1
        if outcome == "answered":
            self._times[klass][where][0].observe(took_s)
            self.total_s += took_s
            self._counts["handed_over"] += where == "peer"
        if on_time:
            self._in_time[klass].inc()
            self._counts["on_time"] += 1

    def streamed(self, klass: int, where: str, ttft_s: float, rest_s: float, tokens: int) -> None:
        """A user has a stream of so many `tokens`: the first one came after `ttft_s`, the others in `rest_s`."""
        _, ttft, tpot = self._times[klass][where]
        ttft.observe(ttft_s)
        if tokens > 1:
            tpot.observe(rest_s / (tokens - 1))

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
        """A peer's duel was judged here: "voted", or "failed" where the engine could not."""
        self._judged.labels(outcome).inc()

    def totals(self) -> dict[str, float]:
        """Counts of users' requests, and the mean latency of those answered, s."""
        answered = self._counts["answered"]
        return self._counts | {"mean_latency_s": round(self.total_s / answered, 4) if answered else 0.0}

    def page(
        self, *, held: int, engine_up: bool, engines: Mapping[str, Sequence[float]], peers: int, peers_known: int,
        unspoken: int = 0, balances: Sequence[Balance] = (), disputed: Mapping[str, int] = NOTHING,
        ledger_full: bool = False, tariff: Sequence[float] = (), markup: float = 0.0, margin: float | None = None,
    ) -> bytes:  # fmt: skip
        """The page that Prometheus reads. `engines`: of each by what it is called whether it takes requests, those that
        run and wait there, and the share of its KV cache in use; `disputed` has micro-credits by peer, `tariff` is for
        1000 tokens."""
        for tokens, price in zip(("input", "cached_input", "output"), tariff, strict=False):
            self._tariff.labels(tokens).set(price / KTOK)
        self._markup.set(markup / KTOK)
        self._margin.set(math.nan if margin is None else margin)
        for each in balances:
            for whose, free, escrow in (("own", each.free, each.escrow), ("peer", each.peer_free, each.peer_escrow)):
                self._credits.labels(each.peer, whose, "free").set(free / MICRO)
                self._credits.labels(each.peer, whose, "escrow").set(escrow / MICRO)
        for peer, amount in disputed.items():
            self._disputed.labels(peer).set(amount / MICRO)
        self._ledger_full.set(ledger_full)
        self._held.set(held)
        self._remote_now.set(self.remote_now)
        self._engine_up.set(engine_up)
        self._engine_requests.clear()
        self._kv_usage.clear()
        for engine, (takes, running, waiting, kv_use) in engines.items():
            self._engine_takes.labels(engine).set(takes)
            if takes:  # else its load is made up
                self._engine_requests.labels(engine, "running").set(running)
                self._engine_requests.labels(engine, "waiting").set(waiting)
                self._kv_usage.labels(engine).set(kv_use)
        self._peers.set(peers)
        self._peers_known.set(peers_known)
        self._unspoken.set(unspoken)
        return generate_latest(self.registry)
