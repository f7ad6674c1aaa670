"""A provider without its wires: what it knows, holds and decides, driven by messages with their times.

Nothing here reads a clock, opens a socket or waits. The dispatcher tells a `Provider` what happened and carries out
what it decides; a test replays the messages of a simulated run through the same class and finds the simulator's views
and decisions. Knowledge, estimates and views are written by the kernels of `agents`, which the simulator calls as well.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from wwwserve.agents.decision import CANDIDATES, FIRST_CANDIDATE, HOLD, LOCAL, accept, make_actions, may_hold
from wwwserve.agents.dice import DICE_PER_DECISION, make_dice, uniform
from wwwserve.agents.estimate import expect
from wwwserve.agents.hardware import Profile
from wwwserve.agents.kernel import Floats, Ints, one_at_a_time
from wwwserve.agents.knowledge import (
    AD_HELD,
    AD_KV_CAPACITY,
    AD_KV_TOKENS,
    AD_MEAN_OUTPUT,
    AD_MEAN_PROMPT,
    AD_PRICE,
    AD_STAKE,
    AD_TIME_S,
    AD_WAITING,
    ADVERT_SIZE,
    DUELS_LOST,
    DUELS_WON,
    MAX_CLASSES,
    NO_TIME,
    RATE_WINDOW_S,
    aged_rate,
    clear_progress,
    make_dealings,
    on_answer,
    on_ended,
    on_length,
    on_progress,
    on_refused,
    on_scrape,
    on_sent,
    silent_after_s,
    write_profile,
)
from wwwserve.agents.protocol import (
    ACCOUNT_SIZE,
    FREE,
    MICRO,
    PER_KTOK,
    PER_REQUEST,
    STAKED,
    draw_by_stake,
    move_stake,
    stake_target,
)
from wwwserve.agents.rules import Policy
from wwwserve.agents.view import (
    CLASS_LAST_DEADLINE_S,
    CLASS_SIZE,
    NODES,
    Views,
    make_views,
    write_idle_view,
    write_request_view,
    write_self,
)


class Market(NamedTuple):
    """What all providers of a market have agreed on, and what one knows of its own users."""

    known: Floats  # [C, CLASS_SIZE] own requests by class
    deadlines: Floats  # [C, T] s since arrival
    prices: tuple[float, ...] = (1.0,)  # credits that may be posted
    per_ktok: bool = False  # prices are per 1000 tokens, else per request
    rtt_s: float = 0.05  # between two providers
    gossip_s: float = 3.0  # between two adverts of a provider


@dataclass(slots=True, eq=False)
class Request:
    """A user's request that is not yet placed."""

    key: Any  # whatever the caller knows it by
    klass: int
    prompt: int  # tokens
    arrival_s: float
    model: str = ""
    most: int = 0  # tokens of the longest answer that it may get
    candidates: Ints = field(default_factory=lambda: np.zeros(CANDIDATES, np.int64))  # rows of peers
    n_candidates: int = 0
    refused: int = 0  # bit k: candidate k refused it in this round


class Out(NamedTuple):
    """A request that a peer has of ours, as its origin sees it."""

    peer: str
    waited_s: float  # since the peer took it
    promised_ttft_s: float
    promised_tpot_s: float
    streamed: int  # tokens so far


class Promise(NamedTuple):
    """What a provider promises when it takes a request."""

    ttft_s: float
    tpot_s: float


class Decision(NamedTuple):
    """What to do with a request: `route` is HOLD, LOCAL, or from FIRST_CANDIDATE on a candidate, who is `peer`."""

    request: Request
    route: int
    peer: str | None


class Provider:
    """One provider's side of the market.

    Times are seconds of one clock, the caller's. Peers are known by name; an advert of theirs is the vector of
    `agents.knowledge`, stamped with the time at which its load was true by that clock.
    """

    def __init__(
        self, policy: Policy, profile: Profile, market: Market, *, seed: int = 0, credit: float = 0.0,
        stake: float = 0.0, mean_prompt: float = 256.0, mean_output: float = 512.0,
    ) -> None:  # fmt: skip
        """Raises ValueError for tables of another shape, or more classes than a view shows."""
        classes = len(market.known)
        if market.known.shape != (classes, CLASS_SIZE) or not 1 <= classes <= MAX_CLASSES:
            raise ValueError(
                f"classes have shape {market.known.shape}, expected 1 to {MAX_CLASSES} rows of {CLASS_SIZE}"
            )
        if market.deadlines.ndim != 2 or len(market.deadlines) != classes:
            raise ValueError(f"deadlines have shape {market.deadlines.shape}, expected one row for each class")
        self.policy, self.market = policy, market
        self.own = np.zeros(ADVERT_SIZE)
        write_profile(self.own, profile.row(), 1.0)
        self.own[AD_MEAN_PROMPT], self.own[AD_MEAN_OUTPUT] = mean_prompt, mean_output
        self.stake = stake  # credits
        self.credit = round(credit * MICRO)  # free, in micro-credits
        self.price = market.prices[0]
        self.advert_due = True
        self.guests = 0
        self.arrivals_per_s = 0.0
        self.names: list[str] = []
        self.serves: list[frozenset[str]] = []  # model names of each peer
        self.adverts = np.zeros((0, ADVERT_SIZE))
        self.room: Floats | None = None  # [N] micro-credits that may be escrowed with each peer; None: nothing is paid
        self.dealings = make_dealings(1)  # the last row is for the own node, of whom nothing is known by dealing
        self.queues: list[deque[Request]] = [deque() for _ in range(classes)]
        self.closed = [False] * classes
        self.head: Request | None = None
        self.generator = make_dice(seed)[0]
        self.dice = np.zeros((1, DICE_PER_DECISION))
        self.view = make_views(1)
        self.actions = make_actions(1)
        self._row: dict[str, int] = {}
        self._asked = np.ones(1, np.bool_)
        self._idle_token_s, self._looser_than = np.zeros(NODES), np.zeros(MAX_CLASSES, np.int64)

    # What happened.

    def scraped(self, now_s: float, running: float, waiting: float, kv_tokens: float) -> None:
        """The own engine's load."""
        on_scrape(self.own, now_s, running, waiting, kv_tokens, 1.0)

    def ticked(self, interval_s: float) -> None:
        """A tick went by: what was held may be decided anew, with candidates drawn anew."""
        self.arrivals_per_s = aged_rate(self.arrivals_per_s, interval_s)
        self.closed = [False] * len(self.closed)
        self.head = None

    def restake(self, interval_s: float) -> None:
        """Move the stake for `interval_s` toward what the own load calls for, within the free credit."""
        account = np.zeros(ACCOUNT_SIZE, np.int64)
        account[FREE], account[STAKED] = self.credit, round(self.stake * MICRO)
        move_stake(account, self.stake_target(), interval_s)
        self.credit, self.stake = int(account[FREE]), float(account[STAKED]) / MICRO

    def stake_target(self) -> int:
        """The stake that the own load calls for, micro-credits."""
        kv_use = self.own[AD_KV_TOKENS] / self.own[AD_KV_CAPACITY]
        return stake_target(kv_use, int(self.own[AD_WAITING]), self.held)

    def arrived(self, request: Request) -> None:
        """A user asks."""
        self.missed()
        self.queue(request)

    def missed(self) -> None:
        """A user asks and is turned away."""
        self.arrivals_per_s += 1.0 / RATE_WINDOW_S

    def queue(self, request: Request, *, front: bool = False) -> None:
        """Hold a request to be decided on, `front` if it was before and came back."""
        line = self.queues[request.klass]
        if front:
            line.appendleft(request)
        else:
            line.append(request)
        self.own[AD_HELD + request.klass] += 1.0

    def dropped(self, request: Request) -> bool:
        """The request is no longer wanted. Returns whether it was held here."""
        line = self.queues[request.klass]
        if request not in line:  # asked first, as what `remove` raises holds a text of all that there is
            return False
        line.remove(request)
        self.own[AD_HELD + request.klass] -= 1.0
        return True

    def heard(self, name: str, advert: Floats, at_s: float, serves: frozenset[str]) -> None:
        """A peer's advert [ADVERT_SIZE], whose load was true at `at_s`, and the model names that it serves."""
        row = self._row_of(name)
        self.adverts[row] = advert
        self.adverts[row, AD_TIME_S] = at_s
        self.serves[row] = serves

    def may_escrow(self, name: str, amount: int) -> None:
        """So many micro-credits may be put in escrow with a peer."""
        if self.room is None:
            self.room = np.zeros(len(self.names))
        row = self._row_of(name)
        self.room[row] = amount

    def posted(self, name: str) -> float:
        """The price of a peer, credits."""
        return float(self.adverts[self._row_of(name), AD_PRICE])

    def gone(self, name: str) -> None:
        """A peer left or fell silent."""
        row = self._row_of(name)
        self.adverts[row, AD_TIME_S] = NO_TIME
        for line in self.queues:
            for request in line:
                self._mask_gone(request)

    def sent(self, name: str) -> None:
        """A peer took a request of ours."""
        row = self._row_of(name)
        on_sent(self.dealings[row], self.adverts[row])

    def refused(self, name: str) -> None:
        """A peer refused a request of ours, or did not answer."""
        row = self._row_of(name)
        on_refused(self.dealings[row], self.adverts[row])

    def answered(self, name: str, took_s: float, promised_s: float) -> None:
        """A peer completed a request `took_s` after it took it, having promised `promised_s` for so many tokens."""
        row = self._row_of(name)
        on_answer(self.dealings[row], took_s, promised_s)

    def ended(self, name: str) -> None:
        """A request of ours is no longer with a peer."""
        row = self._row_of(name)
        on_ended(self.dealings[row])

    def finished(self, prompt: int, output: int) -> None:
        """The own engine completed a request of so many tokens."""
        on_length(self.own, prompt, output)

    def left(self) -> None:
        """It goes offline: nothing is asked of it, and nothing due."""
        self.advert_due = False
        self.arrivals_per_s = 0.0
        self.head = None

    def duelled(self, name: str, won: bool) -> None:
        """A peer's answer won or lost a duel that was ours to judge."""
        row = self._row_of(name)
        self.dealings[row, DUELS_WON if won else DUELS_LOST] += 1.0

    def looked(self, out: Iterable[Out]) -> None:
        """All that peers have of ours, as it stands."""
        for row in range(len(self.names)):
            clear_progress(self.dealings[row])
        for peer, *progress in out:
            row = self._row_of(peer)
            on_progress(self.dealings[row], *progress)

    # What it decides.

    def ask(self, now_s: float) -> Request | None:
        """The undecided request whose last deadline comes first, with candidates drawn by stake; None if none is."""
        head, soonest_s = None, np.inf
        for klass, line in enumerate(self.queues):
            if line and not self.closed[klass]:
                due_s = line[0].arrival_s + self.market.known[klass, CLASS_LAST_DEADLINE_S]
                if due_s < soonest_s:
                    head, soonest_s = line[0], due_s
        if head is not None and head is not self.head:
            eligible = now_s - self.adverts[:, AD_TIME_S] <= silent_after_s(self.market.gossip_s)
            eligible &= np.array([head.model in each for each in self.serves], np.bool_)
            if self.room is not None:
                units = head.most / 1000.0 if self.market.per_ktok else 1.0
                eligible &= self.room >= self.adverts[:, AD_PRICE] * (MICRO * units)
            head.n_candidates = draw_by_stake(
                np.ascontiguousarray(self.adverts[:, AD_STAKE]), eligible, CANDIDATES, self.generator, head.candidates
            )
            head.refused = 0
            for k in range(DICE_PER_DECISION):
                self.dice[0, k] = uniform(self.generator)
        self.head = head
        return head

    def see(self, now_s: float) -> Views:
        """The view [1] of the request at the head, or of nothing."""
        nodes, request, me, routes = (array[0] for array in self.view)
        head, market = self.head, self.market
        if head is None:
            write_idle_view(nodes, request, routes, self.own, now_s)
        else:
            write_request_view(
                nodes, request, routes, self.own, self.adverts, self.dealings, head.candidates, head.n_candidates,
                head.refused, self.may_hold(head, now_s), self.credit, now_s, market.rtt_s, head.prompt, head.arrival_s,
                head.klass, market.known, market.deadlines, self.pricing, self._idle_token_s, self._looser_than,
            )  # fmt: skip
        write_self(
            me, head is not None, self.advert_due, self.held, self.arrivals_per_s, self.guests, self.credit, self.price
        )
        return self.view

    def decide(self, now_s: float) -> Decision | None:
        """Decide on the undecided request whose last deadline comes first. None if there is none.

        A request that is held stays in its queue, which is closed until the next tick; any other is taken out.
        """
        if self.ask(now_s) is None and not self.advert_due:
            return None
        self.see(now_s)
        return self.choose(now_s)

    def choose(self, now_s: float) -> Decision | None:
        """What the policy makes of the view last seen: price, terms, and a decision where there is a request."""
        self.policy.decide(self.view, self._asked, self.dice, self.actions)
        if self.advert_due:
            self.price = self.market.prices[min(max(int(self.actions.price[0]), 0), len(self.market.prices) - 1)]
        return None if self.head is None else self.carry_out(self.head, int(self.actions.route[0]), now_s)

    def carry_out(self, head: Request, route: int, now_s: float) -> Decision:
        """The decision that `route` comes to: what the mask forbids is held, or runs here when it is too late."""
        k = route - FIRST_CANDIDATE
        if not (0 <= route < FIRST_CANDIDATE + CANDIDATES and self.view.routes[0, route]):
            route = HOLD
        if route == HOLD and self.may_hold(head, now_s):
            self.closed[head.klass] = True
            return Decision(head, HOLD, None)
        self.queues[head.klass].popleft()
        self.own[AD_HELD + head.klass] -= 1.0
        if route >= FIRST_CANDIDATE:
            return Decision(head, route, self.names[head.candidates[k]])
        return Decision(head, LOCAL, None)

    def come_back(self, decision: Decision) -> None:
        """The candidate of a decision refused: the request is at the head of its queue again, the refuser masked."""
        decision.request.refused |= 1 << (decision.route - FIRST_CANDIDATE)
        self._mask_gone(decision.request)
        self.queue(decision.request, front=True)
        self.head = decision.request  # whatever else was decided on meanwhile, its candidates are not drawn anew

    def rivals(self, decision: Decision) -> list[str]:
        """The other candidates of a decision that have not refused the request, in the order drawn."""
        request, chosen = decision.request, decision.route - FIRST_CANDIDATE
        return [
            self.names[request.candidates[k]]
            for k in range(request.n_candidates)
            if k != chosen and not (request.refused >> k) & 1
        ]

    # What it says to others.

    def advertise(self, now_s: float) -> Floats:
        """The own advert [ADVERT_SIZE], which is then no longer due."""
        self.advert_due = False
        self.own[AD_PRICE], self.own[AD_STAKE] = self.price, self.stake
        advert = self.own.copy()
        advert[AD_TIME_S] = now_s
        return advert

    def consider(self, prompt: int, u: float) -> Promise | None:
        """Whether it takes a peer's request of `prompt` tokens, on its terms in force; `u` uniform in (0, 1)."""
        first_s, token_s = expect(self.own, 0.0, float(prompt))
        kv_use = self.own[AD_KV_TOKENS] / self.own[AD_KV_CAPACITY]
        if not accept(self.actions.terms[0], first_s, kv_use, self.held, u):
            return None
        return Promise(first_s + self.market.rtt_s, token_s)

    @property
    def held(self) -> int:
        """Own users' requests that are not decided."""
        return sum(map(len, self.queues))

    @property
    def pricing(self) -> int:
        """How prices count, as `agents.protocol` numbers it."""
        return PER_KTOK if self.market.per_ktok else PER_REQUEST

    def may_hold(self, request: Request, now_s: float) -> bool:
        """Whether its last deadline is still to come."""
        return may_hold(now_s - request.arrival_s, float(self.market.known[request.klass, CLASS_LAST_DEADLINE_S]))

    def rehearse(self) -> None:
        """Go through all that can happen once, as the first of each may have to be compiled. For a new provider, which
        is not the same afterwards."""
        with one_at_a_time():
            self.restake(0.0)
            self.heard("peer", self.advertise(0.0), 0.0, frozenset({""}))
            self.scraped(0.0, 0.0, 0.0, 0.0)
            self.arrived(Request(None, 0, 1, 0.0))
            decision = self.decide(0.0)
            if decision is not None and decision.peer is not None:
                self.come_back(decision)
            self.sent("peer")
            self.looked([Out("peer", 1.0, 1.0, 1.0, 1)])
            self.answered("peer", 1.0, 1.0)
            self.ended("peer")
            self.refused("peer")
            self.finished(1, 1)
            self.consider(1, 0.5)
            self.ticked(1.0)

    def _mask_gone(self, request: Request) -> None:
        """Candidates that are gone since they were drawn take no request."""
        for k in range(request.n_candidates):
            if self.adverts[request.candidates[k], AD_TIME_S] == NO_TIME:
                request.refused |= 1 << k

    def _row_of(self, name: str) -> int:
        row = self._row.get(name)
        if row is None:
            row = self._row[name] = len(self.names)
            self.names.append(name)
            self.serves.append(frozenset())
            advert = np.zeros((1, ADVERT_SIZE))
            advert[0, AD_TIME_S] = NO_TIME
            self.adverts = np.concatenate([self.adverts, advert])
            self.dealings = np.concatenate([self.dealings, make_dealings(1)])
            if self.room is not None:
                self.room = np.concatenate([self.room, np.zeros(1)])
        return row
