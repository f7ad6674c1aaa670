"""The provider of a node: one PROVIDER record, the tables that it grows, and the names behind their rows.

What happens to a provider, and what it decides, is in the kernels of `agents.provider`; here stands only what a node
needs to call them for itself alone. Nothing here reads a clock, opens a socket or waits.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents import provider as transitions
from wwwserve.agents.classes import CLASS_LAST_DEADLINE_S, MAX_CLASSES
from wwwserve.agents.decision import FIRST_CANDIDATE, NODES, make_actions, may_hold, may_offer
from wwwserve.agents.estimate import expect, prefill_delay_s
from wwwserve.agents.generator import UNIFORMS_PER_DECISION, make_generators, uniform
from wwwserve.agents.hardware import Profile, pooled
from wwwserve.agents.kernel import Bools, Floats, Ints, Records, compiled_before, kernel, one_at_a_time, records
from wwwserve.agents.knowledge import (
    AD_CONTEXT,
    AD_MEAN_OUTPUT,
    AD_MEAN_PROMPT,
    AD_MEAN_UNCACHED,
    AD_REUSE_S,
    AD_TARIFF,
    AD_TIME_S,
    AD_UNSHARED,
    ADVERT_SIZE,
    DUELS_LOST,
    DUELS_WON,
    LONGEST_REUSE_S,
    NO_TIME,
    Peers,
    make_peer_stats,
    on_length,
    on_scrape,
    write_profile,
)
from wwwserve.agents.prefix import kept_since_s
from wwwserve.agents.protocol import (
    ACCOUNT_SIZE,
    FREE,
    MICRO,
    NO_BOUND,
    PER_REQUEST,
    STAKED,
    TARIFF_SIZE,
)
from wwwserve.agents.provider import (
    PROVIDER,
    REQUEST,
    Scratch,
    begin_appraisal,
    count_running,
    end_appraisal,
)
from wwwserve.agents.rules import Policy
from wwwserve.agents.tariff import cost_of, in_micro, price_by, write_compute
from wwwserve.agents.view import Views, ViewScratch, make_views, write_view
from wwwserve.serving.market import Market, Promise, Tariff

_RUNNING = np.dtype([("request", np.int64), ("own", np.bool_), ("generated", np.float64)])


Lookup = Callable[[Any, int, str, float], tuple[int, float]]
"""Of a request, by its key and its prompt tokens: how many of them are cached at a peer, here for "", by what was used
there since a time, and when they were last used there, in seconds of the caller's clock."""

LATER, LATER_S = 2.0, 0.1  # by which a promise may be later than the advert showed as far as is known
ADVERTS_KEPT = 4  # own ones, by which peers may still make offers


class Decision(NamedTuple):
    """What to do with a request: `route` is HOLD, LOCAL, or from FIRST_CANDIDATE on a candidate, who is `peer`."""

    request: int
    route: int
    peer: str | None


# What every request goes through is called with arrays of one record: a call with a record itself takes 2 µs, as numba
# finds out its type each time, and one with an array a tenth of that.

KEPT, NEW_HEAD, NEW_DRAW = range(3)  # the head is as before; it is another; and it has no candidates


@kernel
def _is_cost_old(p: Records, a: Records, now_s: float) -> bool:
    return transitions.is_cost_old(p[0], a[0], now_s)


@kernel
def _appraise(
    p: Records, a: Records, q: Records, requests: Ints, own: Bools, generated: Floats, now_s: float
) -> None:  # fmt: skip
    """The marginal cost by what runs: `requests` [M] are rows of `q`, see `count_running` for the rest."""
    found = begin_appraisal(p[0], a[0])
    for k in range(requests.size):
        found = count_running(p[0], a[0], q[requests[k]], own[k], generated[k], now_s, found)
    end_appraisal(p[0], a[0], found, now_s)


@kernel
def _arrive(p: Records, q: Records, r: int) -> None:
    transitions.arrive(p[0], q, r)


@kernel
def _choose_head(p: Records, a: Records, q: Records) -> int:
    if not transitions.choose_head(p[0], a[0], q):
        return KEPT
    return NEW_HEAD if transitions.has_candidates(p[0], q, p[0].head) else NEW_DRAW


@kernel
def _draw(
    p: Records, a: Records, q: Records, peers: Peers, chosen: int, serves: Bools, now_s: float, scratch: Scratch,
    uniforms: Floats,
) -> None:  # fmt: skip
    if chosen == NEW_DRAW:
        transitions.draw_candidates(p[0], a[0], q, p[0].head, peers, serves, now_s, scratch)
    if chosen != KEPT:
        transitions.draw_uniforms(p[0], uniforms)


@kernel
def _see(
    p: Records, a: Records, q: Records, peers: Peers, remote: int, now_s: float, view: Views, view_scratch: ViewScratch
) -> None:
    p[0].remote = remote
    write_view(view, p[0], a[0], q, peers, now_s, view_scratch)


@kernel
def _carry_out(
    p: Records, a: Records, q: Records, peers: Peers, route: int, admission: Floats, markup: int, now_s: float
) -> int:
    transitions.set_admission(p[0], admission, markup)
    return transitions.decide(p[0], a[0], q, peers, route, now_s) if p[0].head >= 0 else -1


@kernel
def _is_out(p: Records, q: Records, r: int) -> bool:
    return transitions.is_out(p[0], q, r)


@kernel
def _release(p: Records, q: Records, r: int) -> bool:
    transitions.withdraw(p[0], q, r)
    return _is_out(p, q, r)


@kernel
def _reopen(p: Records) -> None:
    transitions.reopen(p[0])


class NodeProvider:
    """One provider's side of the market.

    Times are seconds of one clock, the caller's. A request is known by its number, from `new` to `release`; `keys` has
    what the caller knows it by. Peers are known by name, and have a row from when they were heard of until they are
    forgotten.
    """

    def __init__(
        self, policy: Policy, profile: Profile, market: Market, *, seed: int = 0, credit: float = 0.0,
        stake: float = 0.0, mean_prompt: float = 256.0, mean_uncached: float | None = None, mean_output: float = 512.0,
        compute_per_ktok: float = 0.09, engines: int = 1,
    ) -> None:  # fmt: skip
        """`profile`: of each of its `engines`. `mean_uncached`: tokens of a usual prompt that are to be computed, by
        default all. `compute_per_ktok`: what computing 1000 output tokens costs here, credits. Raises ValueError as
        `Market.agreement` does."""
        self.policy, self.market = policy, market
        self._agreement = market.agreement()
        self._provider = records(1, PROVIDER)
        transitions.reset_provider(self._provider)
        record = self._provider[0]
        record["known"][: len(market.known)] = market.known
        uncached = mean_prompt if mean_uncached is None else mean_uncached
        record["own"][[AD_MEAN_PROMPT, AD_MEAN_UNCACHED, AD_MEAN_OUTPUT]] = mean_prompt, uncached, mean_output
        record["own"][AD_REUSE_S] = LONGEST_REUSE_S
        self._profile, self._alone = profile, np.zeros(ADVERT_SIZE)
        write_profile(self._alone, profile.row(), 1.0)
        self.resize(engines)
        record["own"][AD_CONTEXT], record["own"][AD_UNSHARED] = transitions.usual_context(record, self.agreement), 1.0
        write_compute(record["compute"], record["own"], compute_per_ktok)
        record["credit"] = round(credit * MICRO)
        record["generator"] = make_generators(seed)[0]
        record["next_gossip_s"] = -np.inf  # at once
        self.account = np.zeros(ACCOUNT_SIZE, np.int64)
        self.account[FREE], self.account[STAKED] = round(credit * MICRO), round(stake * MICRO)
        self.lookup: Lookup | None = None  # where prefixes are known
        self._left_alone: dict[str, float] = {}  # peers that are no candidates, until a time
        self.pays = False  # whether credit that may be in escrow bounds what is handed over
        self._advertised: deque[Floats] = deque(maxlen=ADVERTS_KEPT)
        self.names: list[str] = []
        self.serves: list[frozenset[str]] = []  # model names of each peer
        self._row: dict[str, int] = {}
        self._vacant: set[str] = set()  # of peers that were forgotten, whose rows others may have
        self._peers = Peers(np.zeros((0, ADVERT_SIZE)), make_peer_stats(1), np.zeros(0, np.int64))
        self._scratch = Scratch(np.zeros(0), np.zeros(0, np.bool_))
        self._serving = np.zeros(0, np.bool_)
        self.keys: list[Any] = []
        self._models: list[str] = []
        self._free: list[int] = []
        self._leaving: set[int] = set()  # released while a peer has them
        self._requests = records(0, REQUEST)
        blank = records(1, REQUEST)
        transitions.reset_requests(blank)
        self._blank = blank[0]
        self.uniforms = np.zeros((1, UNIFORMS_PER_DECISION))
        self.view = make_views(1)
        self._own_view = Views(*(array[0] for array in self.view))
        self.actions = make_actions(1)
        self._asked = np.ones(1, np.bool_)
        self._view_scratch = ViewScratch(np.zeros(NODES), np.zeros(MAX_CLASSES, np.int64))

    # Records as kernels take them: views, so that a write changes the arrays.

    @property
    def record(self) -> Any:
        """The PROVIDER record."""
        return self._provider[0]

    @property
    def own(self) -> Any:
        """Its own state, an advert [ADVERT_SIZE]."""
        return self._provider["own"][0]

    @property
    def agreement(self) -> Any:
        """The AGREEMENT record."""
        return self._agreement[0]

    @property
    def requests(self) -> NDArray[Any]:
        """The REQUEST records."""
        return self._requests

    @property
    def peers(self) -> Peers:
        """Adverts, history and credit of each peer, in the order of `names`."""
        return self._peers

    # Requests.

    def new(
        self, key: Any, klass: int, prompt: int, longest: int, arrival_s: float, model: str, turn: int = 1,
        last_s: float = 0.0,
    ) -> int:  # fmt: skip
        """A number for a request of `prompt` tokens, to be answered with at most `longest`; it is this `turn` of its
        session, whose answer before was there at `last_s`."""
        if not self._free:
            count = len(self._requests)
            larger = records(max(16, 2 * count), REQUEST)
            larger[:count] = self._requests
            self._requests = larger
            self._free = list(range(len(larger) - 1, count - 1, -1))
            self.keys += [None] * (len(larger) - count)
            self._models += [""] * (len(larger) - count)
        r = self._free.pop()
        self._requests[r] = self._blank
        request = self._requests[r]
        request["klass"], request["arrival_s"] = klass, arrival_s
        request["prompt"], request["longest"] = prompt, longest
        request["turn"], request["last_s"] = turn, min(last_s, arrival_s)
        self.keys[r], self._models[r] = key, model
        return r

    def release(self, r: int) -> None:
        """The request has come to its end, and is held no longer if it was. While a peer still has it, as the slower
        one of a duel, its number stays taken."""
        self.keys[r] = None
        if _release(self._provider, self._requests, r):
            self._leaving.add(r)
        else:
            self._free.append(r)

    def is_out(self, r: int) -> bool:
        """Whether the request is with a peer, or offered to one."""
        return _is_out(self._provider, self._requests, r)

    def arrived(self, r: int) -> None:
        """A user asks."""
        _arrive(self._provider, self._requests, r)

    def missed(self, klass: int) -> None:
        """A user asks and is turned away."""
        transitions.count_arrival(self.record, klass)

    def come_back(self, r: int) -> None:
        """The request is at the head of its queue again; who refused it or was lost with it is masked."""
        transitions.come_back(self.record, self._requests, r)

    def mask(self, r: int, name: str) -> None:
        """A peer does not bring an answer: it is offered the request no more until candidates are drawn anew."""
        transitions.mask(self._requests, r, self._row_of(name))

    def close(self, klass: int) -> None:
        """Requests of a class wait for the next tick or answer."""
        self.record["closed"][klass] = 1

    def may_hold(self, r: int, now_s: float) -> bool:
        """Whether the last deadline of a request is still to come."""
        request = self._requests[r]
        last_s = float(self.record["known"][request["klass"], CLASS_LAST_DEADLINE_S])
        return may_hold(now_s - float(request["arrival_s"]), last_s)

    def reprompt(self, r: int, prompt: int) -> None:
        """The request's prompt has so many tokens from now on, as what was answered is part of it."""
        self._requests[r]["prompt"] = prompt

    def toss(self) -> float:
        """A random number in (0, 1)."""
        return uniform(self.record["generator"])

    # Requests that are offered to a peer, or with one.

    def offer(self, r: int, name: str) -> None:
        """A request goes to a peer."""
        j = self._row_of(name)
        transitions.offer(self.record, self._requests, r, j, self._peers.peer_stats[j], self._peers.adverts[j])

    def accepted(self, r: int, now_s: float, promise: Promise, cached: int = 0) -> None:
        """The peer takes the request that it was offered; `cached` of its prompt's tokens are taken to be paid so."""
        transitions.accepted(self._requests, r, now_s, *promise, cached)

    def is_as_shown(self, r: int, promise: Promise) -> bool:
        """Whether a peer promises about what its advert showed by which it was offered the request: a later one of the
        same tariff may show more, and what is promised as late as one likes is never late."""
        shown = self.shown(r)
        return promise.ttft_s <= LATER * shown.ttft_s + LATER_S and promise.tpot_s <= LATER * shown.tpot_s + LATER_S

    def shown(self, r: int) -> Promise:
        """What the peer's advert promised by which it was offered a request."""
        return Promise(*(float(self._requests[r][name]) for name in ("shown_ttft_s", "shown_tpot_s")))

    def refused(self, r: int) -> None:
        """The peer does not take the request that it was offered, or does not answer."""
        j = int(self._requests[r]["executor"])
        transitions.refused(self.record, self._requests, r, self._peers.peer_stats[j])
        self._attempt_ended(r)

    def lost(self, r: int) -> None:
        """The request is no longer with the peer that took it, and not answered whole."""
        transitions.end_attempt(
            self.record, self._requests, r, self._peers.peer_stats[int(self._requests[r]["executor"])]
        )
        self._attempt_ended(r)

    def answered(self, r: int, now_s: float, output: int) -> None:
        """The peer's answer of `output` tokens is all there."""
        peer_stats = self._peers.peer_stats[int(self._requests[r]["executor"])]
        transitions.answered(self.record, self._requests, r, peer_stats, now_s, output)
        self._attempt_ended(r)

    def _attempt_ended(self, r: int) -> None:
        if r in self._leaving:
            self._leaving.remove(r)
            self._free.append(r)

    def streamed(self, r: int, tokens: int) -> None:
        """So many tokens of an answer came from the peer so far."""
        self._requests[r]["streamed"] = tokens

    def looked(self, now_s: float) -> None:
        """What peers have streamed is compared with what they promised."""
        transitions.look_at_evidence(self.record, self._requests, self._peers.peer_stats, now_s)

    def candidates(self, r: int) -> list[str]:
        """The peers that could have a request, in the order drawn, as the view has them."""
        request = self._requests[r]
        return [self.names[j] for j in request["candidates"][: int(request["n_candidates"])].tolist()]

    def rivals(self, decision: Decision) -> list[str]:
        """The other candidates of a decision to whom the request may be offered, in the order drawn."""
        request, chosen = self._requests[decision.request], decision.route - FIRST_CANDIDATE
        return [
            self.names[request["candidates"][k]]
            for k in range(int(request["n_candidates"]))
            if k != chosen and may_offer(self.market.payment, request, self._peers, k)
        ]

    def divert(self, decision: Decision) -> Decision:
        """Instead of the own engine, the first candidate to whom the request may be offered; the same if there is none.

        It is then counted as offered.
        """
        rivals = self.rivals(decision)
        if not rivals:
            return decision
        name, r = rivals[0], decision.request
        candidates = self._requests[r]["candidates"].tolist()
        self.offer(r, name)
        return Decision(r, FIRST_CANDIDATE + candidates.index(self._row[name]), name)

    # Peers.

    def heard(self, name: str, advert: Floats, at_s: float, serves: frozenset[str]) -> None:
        """A peer's advert [ADVERT_SIZE], whose load was true at `at_s`, and the model names that it serves."""
        row = self._row_of(name)
        self._peers.adverts[row] = advert
        self._peers.adverts[row, AD_TIME_S] = at_s
        self.serves[row] = serves

    def gone(self, name: str) -> None:
        """A peer left or fell silent."""
        row = self._row_of(name)
        self._peers.adverts[row, AD_TIME_S] = NO_TIME

    def forget(self, name: str) -> None:
        """A peer is not worth remembering: what was seen of it makes room for the next one that is heard of."""
        if name in self._row:
            self.gone(name)
            self._vacant.add(name)
            self._left_alone.pop(name, None)

    def leave_alone(self, name: str, until_s: float | None) -> None:
        """A peer is no candidate until a time; None: it is one."""
        self._left_alone.pop(name, None)
        if until_s is not None and name in self._row:
            self._left_alone[name] = until_s

    def pay(self, free: int) -> None:
        """What is handed over is paid from now on: `free` micro-credits are, with each peer as `may_escrow` says."""
        if not self.pays:
            self.pays = True
            self._peers.credit[:] = 0
        self.record["credit"] = free

    def may_escrow(self, name: str, amount: int) -> None:
        """So many micro-credits may be put in escrow with a peer."""
        row = self._row_of(name)
        self._peers.credit[row] = amount

    def tariff_of(self, r: int) -> Tariff:
        """By which a peer that has the request, or is offered it, is paid."""
        given, cached, output = self._requests[r]["tariff"].tolist()
        return given, cached, output

    def duelled(self, name: str, won: bool) -> None:
        """A peer's answer won or lost a duel that was ours to judge."""
        row = self._row_of(name)
        self._peers.peer_stats[row, DUELS_WON if won else DUELS_LOST] += 1.0

    # Peers' requests.

    def consider(self, prompt: int, cached: int, longest: int, tariff: Tariff) -> Promise | None:
        """Whether it takes a peer's request of `prompt` tokens, `cached` of which are in the prefix cache, to be
        answered with at most `longest`, at a tariff.

        The engine has been looked at, and the cost appraised, just before.
        """
        paid = np.array(tariff, np.int64)
        taken, *expected = transitions.consider(
            self.record, self.agreement, float(prompt), float(cached), longest, paid
        )
        if not taken or not all(map(math.isfinite, expected)):
            return None
        if self.engines > 1:
            expected = [*self.expect(prompt, cached)]
        shown = (np.inf, np.inf)
        for advert in self._advertised:  # by which it was offered, or one of the same tariff that came later
            if [in_micro(each) for each in advert[AD_TARIFF : AD_TARIFF + TARIFF_SIZE]] == [*tariff]:
                shown = transitions.shown_by(advert, float(prompt))
        promise = Promise(*map(min, expected, shown))
        return Promise(*(float(text) for text in promise.text()))

    def serve(self, prompt: int, longest: int, tariff: Tariff, promise: Promise, now_s: float, cached: int = 0) -> int:
        """A number for a peer's request that is taken, until `served`."""
        r = self.new(None, 0, prompt, longest, now_s, "")
        request = self._requests[r]
        request["tariff"] = tariff
        request["shown_ttft_s"] = request["shown_tpot_s"] = np.inf  # the promise is made
        transitions.accepted(self._requests, r, now_s + 0.5 * self.market.rtt_s, *promise, cached)
        return r

    def served(self, r: int) -> None:
        """A peer's request has come to its end."""
        self._free.append(r)

    # The own node.

    def resize(self, engines: int) -> None:
        """So many engines of its profile are there from now on, which are one in its adverts, see
        `agents.hardware.pooled`."""
        self.engines = engines
        write_profile(self.own, pooled(self._profile, engines).row(), 1.0)

    def expect(self, prompt: int, cached: int = 0) -> Promise:
        """What the own engine, as it is now, would take for a request, `cached` of whose tokens it has. Of several, one
        computes the prompt."""
        ttft_s, tpot_s = expect(self.own, 0.0, float(prompt), float(cached))
        if self.engines > 1:
            alone_s, pooled_s = (
                prefill_delay_s(each, float(prompt - cached), float(cached), float(prompt - cached))
                for each in (self._alone, self.own)
            )
            ttft_s += alone_s - pooled_s
        return Promise(ttft_s, tpot_s)

    def is_cost_old(self, now_s: float) -> bool:
        """Whether the marginal cost is to be worked out again before it is used."""
        return bool(_is_cost_old(self._provider, self._agreement, now_s))

    def appraise(self, running: Iterable[tuple[int, bool, float]], now_s: float) -> None:
        """Work out what one more request costs: `running` are the numbers of requests that the engine runs, whether
        they are of own users, and the tokens of each that are generated."""
        table = np.array([*running], _RUNNING)
        _appraise(
            self._provider, self._agreement, self._requests, table["request"], table["own"], table["generated"], now_s
        )

    def scraped(
        self, now_s: float, running: float, waiting: float, kv_tokens: float, prefill: float | None = None,
        reuse_s: float = np.inf,
    ) -> None:  # fmt: skip
        """The own engine's load, and how long it keeps what is not used. Where it does not say how many tokens are to
        be prefilled, those that wait are taken for usual ones."""
        own = self._provider["own"][0]
        if prefill is None:
            prefill = waiting * float(own[AD_MEAN_UNCACHED])
        on_scrape(own, now_s, running, waiting, kv_tokens, prefill, reuse_s)

    def finished(self, prompt: int, cached: int, output: int) -> None:
        """The own engine completed a request of so many tokens, `cached` of whose prompt it had."""
        on_length(self._provider["own"][0], float(prompt), float(min(cached, prompt)), float(output))

    def ticked(self, elapsed_s: float, now_s: float) -> None:
        """A tick went by: what was held may be decided on anew, and an advert may be due."""
        transitions.gossip(self.record, self.agreement, now_s)
        transitions.tick(self.record, elapsed_s)

    def reopen(self) -> None:
        """An answer is done, so what is held may be decided on."""
        _reopen(self._provider)

    def restake(self, elapsed_s: float) -> None:
        """Move the stake for `elapsed_s` toward what the own load calls for, within the free credit."""
        transitions.move_own_stake(self.record, self.account, elapsed_s)
        self.record["credit"] = self.account[FREE]

    def stake_target(self) -> int:
        """The stake that the own load calls for, micro-credits."""
        return int(transitions.own_stake_target(self.record))

    def advertise(self, now_s: float) -> Floats:
        """The own advert [ADVERT_SIZE], which is then no longer due."""
        advert = np.zeros(ADVERT_SIZE)
        transitions.advertise(self.record, int(self.account[STAKED]), now_s, advert)
        self._advertised.append(advert)
        return advert

    @property
    def advert_due(self) -> bool:
        """Whether an advert is due."""
        return bool(self.record["advert_due"])

    @advert_due.setter
    def advert_due(self, due: bool) -> None:
        self.record["advert_due"] = due

    @property
    def stake(self) -> float:
        """What is at stake, credits."""
        return float(self.account[STAKED]) / MICRO

    @stake.setter
    def stake(self, credits: float) -> None:
        self.account[STAKED] = round(credits * MICRO)

    @property
    def held(self) -> int:
        """Own users' requests that are not decided."""
        return int(self._provider["held"][0])

    @property
    def tariff(self) -> list[float]:
        """The tariff in force, credits per 1000 tokens of input, cached input and output."""
        in_force: list[float] = self.record["tariff"].tolist()
        return in_force

    @property
    def tariff_micro(self) -> Tariff:
        """The tariff in force as it is paid, micro-credits."""
        given, cached, output = (in_micro(each) for each in self.tariff)
        return given, cached, output

    @property
    def markup(self) -> float:
        """Beyond the own marginal cost, credits for 1000 tokens of output; in force with the next advert, at latest."""
        return float(self.record["markup"])

    @property
    def cost(self) -> list[float]:
        """Marginal cost of 1000 tokens of input, of cached input and of output, credits."""
        per_token: list[float] = self.record["cost"].tolist()
        return [1000.0 * each for each in per_token]

    @property
    def margin(self) -> float | None:
        """Price over marginal cost of a request of usual lengths, less 1; None while there is no cost."""
        own = self.record["own"]
        prompt, output = float(own[AD_MEAN_PROMPT]), float(own[AD_MEAN_OUTPUT])
        cost = cost_of(self.record["cost"], prompt, 0.0, output)
        if cost <= 0.0:
            return None
        price = 1.0 if self.market.payment == PER_REQUEST else price_by(self.record["tariff"], prompt, 0.0, output)
        return price / cost - 1.0

    # What it decides.

    def decide(self, now_s: float, remote: int = 0) -> Decision | None:
        """Decide on the undecided request whose last deadline comes first, while the own engine has `remote` of peers.

        Admission and markup are set as well. The engine has been looked at just before, and the cost appraised if
        anything is held or an advert is due. A request that is held stays in its queue, which is closed until the next
        tick or answer; one that is to be handed over is then counted as offered. None if there is nothing to decide on.
        """
        own, agreement, requests, peers = self._provider, self._agreement, self._requests, self._peers
        if own["advert_due"][0]:
            transitions.look_at_tariffs(self.record, self.agreement, peers, now_s, -1)
        chosen = _choose_head(own, agreement, requests)
        r = int(own["head"][0])
        if r < 0 and not own["advert_due"][0]:
            return None
        if chosen == NEW_DRAW:
            for row, serves in enumerate(self.serves):
                self._serving[row] = self._models[r] in serves
            for name, until_s in self._left_alone.items():
                self._serving[self._row[name]] &= now_s >= until_s
        if chosen != KEPT:
            _draw(own, agreement, requests, peers, chosen, self._serving, now_s, self._scratch, self.uniforms[0])
        if r >= 0 and self.lookup is not None:
            self._look_for_prefixes(r, self.lookup, now_s)
        _see(own, agreement, requests, peers, remote, now_s, self._own_view, self._view_scratch)
        self.policy.decide(self.view, self._asked, self.uniforms, self.actions)
        actions = self.actions
        route = _carry_out(
            own, agreement, requests, peers, int(actions.route[0]), actions.admission[0], int(actions.markup[0]), now_s
        )
        if r < 0:
            return None
        if route < FIRST_CANDIDATE:
            return Decision(r, route, None)
        name = self.names[requests[r]["candidates"][route - FIRST_CANDIDATE]]
        self.offer(r, name)
        return Decision(r, route, name)

    def _look_for_prefixes(self, r: int, lookup: Lookup, now_s: float) -> None:
        """What is cached of the request at the head, here and at each candidate that is taken to have it still."""
        request, key = self._requests[r], self.keys[r]
        prompt = int(request["prompt"])
        request["prefix"][0], _ = lookup(key, prompt, "", -math.inf)
        request["prefix_age_s"][0] = now_s - request["last_s"] if request["turn"] > 1 else 0.0
        for k in range(int(request["n_candidates"])):
            row = int(request["candidates"][k])
            tokens, used_s = lookup(key, prompt, self.names[row], kept_since_s(self._peers.adverts[row]))
            request["prefix"][1 + k] = tokens
            request["prefix_age_s"][1 + k] = max(0.0, now_s - used_s)

    def warm_up(self) -> None:
        """Go through all that can happen once, as the first of each may have to be compiled. For a new provider, which
        is not the same afterwards."""
        with nullcontext() if compiled_before("node") else one_at_a_time():  # else nodes that start wait for each other
            self.restake(0.0)
            self.stake_target()
            self.advert_due = True
            self.decide(0.0)
            self.heard("peer", self.advertise(0.0), 0.0, frozenset({""}))
            self.scraped(0.0, 0.0, 0.0, 0.0)
            first, second = (self.new(None, 0, 1, 1, 0.0, "") for _ in range(2))
            self.arrived(first)
            self.lookup = lambda key, prompt, place, since_s: (0, -math.inf)
            self.decide(0.0)
            self.lookup = None
            kept_since_s(self._peers.adverts[0])
            self.offer(second, "peer")
            self.is_out(second)
            self.accepted(second, 0.0, Promise(1.0, 1.0))
            self.streamed(second, 1)
            self.looked(2.0)
            self.answered(second, 2.0, 1)
            self.offer(second, "peer")
            self.refused(second)
            self.come_back(second)
            self.offer(second, "peer")
            self.lost(second)
            self.release(second)
            self.finished(1, 0, 1)
            self.missed(0)
            self.expect(1)
            self.consider(1, 0, 1, (0, 0, 0))
            remote = self.serve(1, 1, (0, 0, 0), Promise(1.0, 1.0), 0.0)
            self.is_cost_old(0.0)
            self.appraise([(first, True, 1.0), (remote, False, 1.0)], 0.0)
            self.appraise((), 0.0)  # columns of no row, or of one, are of another type: they are contiguous
            self.served(remote)
            self.margin  # noqa: B018
            self.may_hold(first, 0.0)
            self.ticked(1.0, 0.0)
            self.reopen()

    def _row_of(self, name: str) -> int:
        row = self._row.get(name)
        if row is not None:
            self._vacant.discard(name)
            return row
        advert = np.zeros((1, ADVERT_SIZE))
        advert[0, AD_TIME_S] = NO_TIME
        credit: Ints = np.array([0 if self.pays else NO_BOUND])
        row = self._vacated()
        if row is not None:
            self.names[row], self.serves[row] = name, frozenset()
            self._peers.adverts[row], self._peers.credit[row] = advert[0], credit[0]
            self._peers.peer_stats[row] = make_peer_stats(1)[0]
        else:
            row = len(self.names)
            self.names.append(name)
            self.serves.append(frozenset())
            adverts, peer_stats, credits = self._peers
            self._peers = Peers(
                np.concatenate([adverts, advert]), np.concatenate([peer_stats, make_peer_stats(1)]),
                np.concatenate([credits, credit]),
            )  # fmt: skip
            self._scratch = Scratch(np.zeros(row + 1), np.zeros(row + 1, np.bool_))
            self._serving = np.zeros(row + 1, np.bool_)
        self._row[name] = row
        return row

    def _vacated(self) -> int | None:
        """The row of a peer that was forgotten and that no request may go to, if there is one."""
        if not self._vacant:
            return None
        free, named = set(self._free), set[int]()
        for r in range(len(self._requests)):
            if r not in free:
                named.update(self._requests[r]["candidates"][: self._requests[r]["n_candidates"]].tolist())
        for name in sorted(self._vacant):
            if self._row[name] not in named:
                self._vacant.remove(name)
                return self._row.pop(name)
        return None
