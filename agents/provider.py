"""The provider: its record, and every transition of it.

A market calls these kernels for each of its providers, a node for its own. Time, messages and engines come from
outside: the caller says when a request arrives, what a peer answered, how the own engine stands. In every kernel `p` is
a PROVIDER record (or one that has its fields), `a` an AGREEMENT, `q` the record array of requests that has
REQUEST_FIELDS, and `r` an index into it. Amounts are integer micro-credits, times are seconds of the caller's clock.

A request of an own user goes: `arrive` -> `choose_head` (candidates drawn) -> `decide` -> held until `reopen`, or run
here, or offered to a candidate (`offer`) -> `accepted`, or `refused` and held again -> `answered`, or `lost`.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.classes import (
    CLASS_LAST_DEADLINE_S,
    CLASS_MAX,
    CLASS_MEAN,
    CLASS_SIZE,
    MAX_CLASSES,
    worth_of,
)
from wwwserve.agents.decision import (
    ADMISSION_SIZE,
    CANDIDATES,
    FIRST_CANDIDATE,
    HOLD,
    IF_IT_PAYS,
    KEEP,
    LOCAL,
    NODES,
    WHAT_PAYS,
    accept,
    affordable,
    may_hold,
    may_offer,
)
from wwwserve.agents.estimate import context_of, expect
from wwwserve.agents.generator import GENERATOR_WORDS, uniform
from wwwserve.agents.kernel import Bools, Floats, Ints, Record, Records, kernel
from wwwserve.agents.knowledge import (
    AD_CONTEXT,
    AD_HELD,
    AD_KV_CAPACITY,
    AD_KV_TOKENS,
    AD_MEAN_OUTPUT,
    AD_MEAN_PROMPT,
    AD_MEAN_UNCACHED,
    AD_STAKE,
    AD_TARIFF,
    AD_TIME_S,
    AD_UNSHARED,
    AD_WAITING,
    ADVERT_SIZE,
    RATE_WINDOW_S,
    Peers,
    aged_rate,
    clear_progress,
    on_answer,
    on_ended,
    on_progress,
    on_refused,
    on_sent,
    silent_after_s,
)
from wwwserve.agents.protocol import (
    FREE,
    LATENESS,
    MICRO,
    NO_BOUND,
    PER_REQUEST,
    TARIFF_SIZE,
    available_credit,
    draw_by_stake,
    due_after,
    milliseconds,
    move_stake,
    price_of,
    stake_target,
)
from wwwserve.agents.tariff import (
    MARKUPS,
    cost_of,
    expected_output,
    future_loss,
    in_micro,
    payment_lost_per_s,
    price_by,
    value_lost_per_s,
    write_cost,
    write_tariff,
)

MAX_DEADLINES = 8
SHOWN_SLACK, SHOWN_SLACK_S = 1.1, 2.0  # a promise may be so much worse than what the advert showed

# What all providers of a market have agreed on.
AGREEMENT_FIELDS = [
    ("tick_s", np.float64),  # between two looks at what is held
    ("gossip_s", np.float64),  # between two adverts of a provider
    ("rtt_s", np.float64),  # round trip between two providers
    ("n_classes", np.int64),
    ("n_deadlines", np.int64),
    ("deadlines", np.float64, (MAX_CLASSES, MAX_DEADLINES)),  # s since arrival
    ("payment", np.int64),  # LATENESS, QUOTED or PER_REQUEST
    ("exposure", np.int64),  # micro-credits that may be in escrow with one peer
    ("stake_follows_load", np.int64),
]
AGREEMENT = np.dtype(AGREEMENT_FIELDS, align=True)

PROVIDER_FIELDS = [
    ("known", np.float64, (MAX_CLASSES, CLASS_SIZE)),  # of its own users' requests
    ("own", np.float64, ADVERT_SIZE),  # its state, fresh and honest
    ("admission", np.float64, ADMISSION_SIZE),  # when it takes peers' requests
    ("compute", np.float64, TARIFF_SIZE),  # credits a token of input, cached input and output
    ("cost", np.float64, TARIFF_SIZE),  # marginal cost of a token of each, credits, as of `cost_s`
    ("future", np.float64),  # of it, what a request takes from those yet to come, credits
    ("cost_s", np.float64),
    ("markup", np.float64),  # in force, see `agents.tariff.MARKUPS`
    ("tariff", np.float64, TARIFF_SIZE),  # in force, credits per 1000 tokens
    ("peer_price", np.float64),  # lowest price of peers for a usual own request, credits; inf if none is heard
    ("heard", np.int64),  # peers, when it last looked at their tariffs
    ("sold", np.float64),  # peers' requests taken, 1/s
    ("credit", np.int64),  # free micro-credits when it last looked
    ("next_gossip_s", np.float64),
    ("arrival_rate", np.float64, MAX_CLASSES),  # of its own users' requests, 1/s
    ("placed_rate", np.float64, MAX_CLASSES),  # of requests placed here, peers' by likeness, 1/s
    ("remote", np.int64),  # peers' requests that it has
    ("held_head", np.int32, MAX_CLASSES),  # its queues, one a class; -1 where there is none
    ("held_tail", np.int32, MAX_CLASSES),
    ("closed", np.int8, MAX_CLASSES),  # 1: the class is held until the next tick or answer
    ("held", np.int64),
    ("out_head", np.int32),  # first of the requests that it has with peers
    ("head", np.int32),  # the request to decide on, -1 if none
    ("opening", np.int64),  # number, from 1, of the last opening of what is held: candidates are drawn anew at each
    ("advert_due", np.int64),
    ("generator", np.int64, GENERATOR_WORDS),  # of random numbers
]
PROVIDER = np.dtype(PROVIDER_FIELDS, align=True)

# What a provider knows of a request of its own users; first what it looks at while a peer has it: one cache line.
OUT_FIELDS = [
    ("taken_s", np.float64),  # when the acceptance came; NaN while there is none
    ("promised_ttft_s", np.float64),  # from then on
    ("promised_tpot_s", np.float64),
    ("streamed", np.int64),  # tokens that came so far
    ("executor", np.int32),  # row of the peer that has it, or had it; -1 before
    ("out_next", np.int32),  # the list of what it has with peers
    ("out_prev", np.int32),
]
HELD_FIELDS = [
    ("klass", np.int32),
    ("next", np.int32),  # in the queue, -1 at its end
    ("prompt", np.int64),  # tokens
    ("prefix", np.int64, NODES),  # of them, those in the prefix cache here and, as is believed, at each candidate
    # Since it was last served there, of the own node since the answer before, s; not read where there are 0 tokens.
    ("prefix_age_s", np.float64, NODES),
    ("turn", np.int64),  # of its session, from 1
    ("last_s", np.float64),  # when its user had the answer before
    ("longest", np.int64),  # tokens of the longest answer that it may get
    ("arrival_s", np.float64),
    ("n_candidates", np.int64),
    ("refused", np.int64),  # bit k: candidate k refused it since they were drawn
    ("opening", np.int64),  # for which it has them, 0 before
    ("candidates", np.int64, CANDIDATES),  # rows of peers, in the order drawn
    ("tariff", np.int64, TARIFF_SIZE),  # by which it is paid, micro-credits per 1000 tokens
    ("cached_input", np.int64),  # tokens of its prompt that are paid as cached: that its executor said it has, then had
    ("advert_s", np.float64),  # when the advert was made by which it was offered last
    ("shown_ttft_s", np.float64),  # no promise is worse than what the advert showed by which it was offered
    ("shown_tpot_s", np.float64),
]
REQUEST_FIELDS: list[Any] = [*OUT_FIELDS, *HELD_FIELDS]
REQUEST = np.dtype(REQUEST_FIELDS, align=True)


LEAST_UNSHARED = 0.01  # of the context of a running request
CONTEXT_PRIOR = 4.0  # requests' worth of belief in the usual context, against what runs


class Appraisal(NamedTuple):
    """Sums over what runs on the own engine."""

    requests: float
    context: float  # tokens that they attend to, over their stay
    tokens: float  # the same now
    at_once: float  # what a second's delay takes, credits/s
    spread: float  # the same if it comes over the stay of a request of usual length, part of which some are gone
    token_s: float  # time per token now


class Scratch(NamedTuple):
    """Buffers for a draw of candidates."""

    stake: Floats  # [N]
    eligible: Bools  # [N]


def reset_provider(p: NDArray[Any]) -> None:
    """Make PROVIDER records those of providers that have nothing and take everything."""
    for name in ("held_head", "held_tail", "out_head", "head"):
        p[name] = -1
    p["opening"] = 1
    p["admission"] = WHAT_PAYS
    p["markup"] = 0.0
    p["cost_s"] = -np.inf
    p["peer_price"] = np.inf


def reset_requests(q: NDArray[Any]) -> None:
    """Make records that have REQUEST_FIELDS those of new requests."""
    for name, *_ in REQUEST_FIELDS:
        q[name] = 0
    for name in ("executor", "out_next", "out_prev", "next"):
        q[name] = -1
    q["taken_s"] = np.nan
    q["turn"] = 1


# The queue: own users' requests that are not decided, by class.


@kernel
def enqueue(p: Record, q: Records, r: int) -> None:
    """Hold request r, behind those of its class that arrived no later."""
    c = q[r].klass
    before, after = p.held_tail[c], np.int32(-1)
    if before >= 0 and q[before].arrival_s > q[r].arrival_s:  # it was held before
        before, after = np.int32(-1), p.held_head[c]
        while q[after].arrival_s <= q[r].arrival_s:
            before, after = after, q[after].next
    q[r].next = after
    if before < 0:
        p.held_head[c] = r
    else:
        q[before].next = r
    if after < 0:
        p.held_tail[c] = r
    p.held += 1
    p.own[AD_HELD + c] += 1.0


@kernel
def dequeue(p: Record, q: Records, c: int) -> int:
    """Take the first request out of the queue of class c; returns it."""
    r = p.held_head[c]
    if p.head == r:
        p.head = -1
    p.held_head[c] = q[r].next
    if p.held_head[c] < 0:
        p.held_tail[c] = -1
    q[r].next = -1
    p.held -= 1
    p.own[AD_HELD + c] -= 1.0
    return int(r)


@kernel
def withdraw(p: Record, q: Records, r: int) -> bool:
    """Take request r out of its queue, wherever it stands. Returns whether it was there."""
    c = q[r].klass
    before = np.int32(-1)
    here = p.held_head[c]
    while here >= 0 and here != r:
        before, here = here, q[here].next
    if here < 0:
        return False
    if before < 0:
        dequeue(p, q, c)
    else:
        q[before].next = q[r].next
        if p.held_tail[c] == r:
            p.held_tail[c] = before
        q[r].next = -1
        p.held -= 1
        p.own[AD_HELD + c] -= 1.0
        if p.head == r:
            p.head = -1
    return True


@kernel
def count_arrival(p: Record, klass: int) -> None:
    """An own user sends a request of this class, whether it is taken or not."""
    p.arrival_rate[klass] += 1.0 / RATE_WINDOW_S


@kernel
def arrive(p: Record, q: Records, r: int) -> None:
    """An own user sends request r."""
    count_arrival(p, q[r].klass)
    enqueue(p, q, r)


# The head: the request to decide on, and who could have it.


@kernel
def next_head(p: Record, a: Record, q: Records) -> int:
    """The request whose last deadline comes first, of the classes that are not closed; -1 if there is none."""
    head = -1
    soonest = np.inf
    if p.held > 0:
        for c in range(a.n_classes):
            r = p.held_head[c]
            if r >= 0 and p.closed[c] == 0:
                due_s = q[r].arrival_s + p.known[c, CLASS_LAST_DEADLINE_S]
                if due_s < soonest:
                    head, soonest = r, due_s
    return head


@kernel
def choose_head(p: Record, a: Record, q: Records) -> bool:
    """Put the most urgent request that may be decided on at the head. Returns whether it is another than before, which
    then needs random numbers, and candidates unless it `has_candidates`."""
    r = next_head(p, a, q)
    another = r >= 0 and r != p.head
    p.head = r
    return another


@kernel
def has_candidates(p: Record, q: Records, r: int) -> bool:
    """Whether request r has candidates since what is held was opened last: drawn since then, or kept, with those that
    refused it masked, when it came back from a peer."""
    return bool(q[r].opening == p.opening)


@kernel
def draw_candidates(
    p: Record, a: Record, q: Records, r: int, peers: Peers, serves: Bools, now_s: float, scratch: Scratch
) -> None:
    """Draw the candidates of request r by advertised stake: peers that were heard lately and can be afforded.

    `serves` [N]: which peers serve the model that it is for.
    """
    silent_s = silent_after_s(a.gossip_s)
    for j in range(serves.size):
        heard = now_s - peers.adverts[j, AD_TIME_S] <= silent_s
        scratch.eligible[j] = serves[j] and heard and affordable(a.payment, peers, j, q[r].prompt, q[r].longest)
        scratch.stake[j] = peers.adverts[j, AD_STAKE]
    q[r].n_candidates = draw_by_stake(scratch.stake, scratch.eligible, CANDIDATES, p.generator, q[r].candidates)
    q[r].refused = 0
    q[r].opening = p.opening


@kernel
def draw_uniforms(p: Record, uniforms: Floats) -> None:
    """Random numbers for the policy's decision on a new head; `uniforms` [UNIFORMS_PER_DECISION]."""
    for k in range(uniforms.size):
        uniforms[k] = uniform(p.generator)


# Decisions.


@kernel
def decide(p: Record, a: Record, q: Records, peers: Peers, route: int, now_s: float) -> int:
    """What the policy's `route` for the head comes to: HOLD, LOCAL, or from FIRST_CANDIDATE on the candidate.

    A route that is not open becomes hold, and hold becomes local once the last deadline is over. A class that is held
    is closed; any other request leaves its queue.
    """
    r = p.head
    c = q[r].klass
    if route != LOCAL and not may_offer(a.payment, q[r], peers, route - FIRST_CANDIDATE):
        route = HOLD
    if route == HOLD:
        if may_hold(now_s - q[r].arrival_s, p.known[c, CLASS_LAST_DEADLINE_S]):
            p.closed[c] = 1
            return HOLD
        route = LOCAL
    if route == LOCAL:
        p.placed_rate[c] += 1.0 / RATE_WINDOW_S
        p.cost_s = -np.inf
    dequeue(p, q, c)
    return route


@kernel
def set_admission(p: Record, admission: Floats, markup: int) -> None:
    """When peers' requests are taken from now on; `markup`, an index into MARKUPS, holds from the next advert on."""
    for k in range(ADMISSION_SIZE):
        p.admission[k] = admission[k]
    if p.advert_due == 1:
        p.markup = MARKUPS[min(max(markup, 0), MARKUPS.size - 1)]


@kernel
def reopen(p: Record) -> None:
    """What is held is decided on again, with candidates drawn anew."""
    for c in range(MAX_CLASSES):
        p.closed[c] = 0
    p.opening += 1
    p.head = -1


# A request that is offered to a peer, and what becomes of it.


@kernel
def shown_by(advert: Floats, prompt: float) -> tuple[float, float]:
    """Time to first token and per token, s, than which no promise under this advert is worse, see `accepted`; nothing
    of the prompt is taken to be cached."""
    first_s, token_s = expect(advert, 0.0, prompt, 0.0)
    return SHOWN_SLACK * first_s + SHOWN_SLACK_S, SHOWN_SLACK * token_s


@kernel
def offer(p: Record, q: Records, r: int, j: int, peer_stats: Floats, advert: Floats) -> None:
    """Request r goes to peer j, of whom `peer_stats` and `advert` are known, to be paid by the tariff of that advert;
    whether it takes it is yet to be heard."""
    q[r].executor = j
    for k in range(TARIFF_SIZE):
        q[r].tariff[k] = in_micro(advert[AD_TARIFF + k])
    q[r].cached_input = 0
    q[r].advert_s = advert[AD_TIME_S]
    q[r].shown_ttft_s, q[r].shown_tpot_s = shown_by(advert, q[r].prompt)
    q[r].taken_s = np.nan
    q[r].streamed = 0
    q[r].out_prev = -1
    q[r].out_next = p.out_head
    if p.out_head >= 0:
        q[p.out_head].out_prev = r
    p.out_head = r
    on_sent(peer_stats, advert)


@kernel
def accepted(q: Records, r: int, now_s: float, ttft_s: float, tpot_s: float, cached: int) -> None:
    """The peer took request r and promises a time to first token and a time per token, s; `cached` tokens of the prompt
    are in its prefix cache, and paid as such.

    What counts is the better of that and of what its advert showed, with some slack for what came since: by the advert
    it was chosen, and a claim of load or speed that its promise does not repeat would cost it nothing.
    """
    q[r].taken_s = now_s
    q[r].promised_ttft_s = min(ttft_s, q[r].shown_ttft_s)
    q[r].promised_tpot_s = min(tpot_s, q[r].shown_tpot_s)
    q[r].cached_input = min(max(cached, 0), q[r].prompt)


@kernel
def refused(p: Record, q: Records, r: int, peer_stats: Floats) -> None:
    """The peer that r was offered to does not take it, or does not answer."""
    end_attempt(p, q, r, peer_stats)
    on_refused(peer_stats, q[r].advert_s)


@kernel
def mask(q: Records, r: int, j: int) -> None:
    """Peer j is not to be offered request r again while it has these candidates."""
    for k in range(q[r].n_candidates):
        if q[r].candidates[k] == j:
            q[r].refused |= 1 << k


@kernel
def come_back(p: Record, q: Records, r: int) -> None:
    """Request r, refused by or lost with a peer, is held again, that peer masked."""
    mask(q, r, q[r].executor)
    q[r].opening = p.opening
    enqueue(p, q, r)


@kernel
def answered(p: Record, q: Records, r: int, peer_stats: Floats, now_s: float, output: int) -> None:
    """The peer's answer to request r, of `output` tokens, is all there."""
    on_answer(peer_stats, now_s - q[r].taken_s, promised_duration_s(q[r], output))
    end_attempt(p, q, r, peer_stats)


@kernel
def end_attempt(p: Record, q: Records, r: int, peer_stats: Floats) -> None:
    """Request r is no longer with a peer, whatever became of it."""
    before, after = q[r].out_prev, q[r].out_next
    if before >= 0:
        q[before].out_next = after
    else:
        p.out_head = after
    if after >= 0:
        q[after].out_prev = before
    q[r].out_next = q[r].out_prev = -1
    on_ended(peer_stats)


@kernel
def is_out(p: Record, q: Records, r: int) -> bool:
    """Whether request r is with a peer, or on its way there or back."""
    return bool(q[r].out_next >= 0 or q[r].out_prev >= 0 or p.out_head == r)


@kernel
def look_at_evidence(p: Record, q: Records, peer_stats: Floats, now_s: float) -> None:
    """Compare what every peer has streamed with what it promised. `peer_stats` [N, PEER_STATS_SIZE]."""
    for j in range(peer_stats.shape[0]):
        clear_progress(peer_stats[j])
    r = p.out_head
    while r >= 0:
        if not np.isnan(q[r].taken_s):
            waited_s = now_s - q[r].taken_s
            on_progress(peer_stats[q[r].executor], waited_s, q[r].promised_ttft_s, q[r].promised_tpot_s, q[r].streamed)
        r = q[r].out_next


# Peers' requests.


@kernel
def promised_duration_s(request: Record, output: int) -> float:
    """By when, after it heard that the request is taken, an origin was promised an answer of `output` tokens."""
    return float(request.promised_ttft_s + request.promised_tpot_s * (output - 1))


@kernel
def price_for(a: Record, request: Record, output: int) -> int:
    """What a peer's answer of `output` tokens costs before the lateness clause, micro-credits."""
    return int(price_of(a.payment, request.tariff, request.prompt, request.cached_input, output))


@kernel
def due_for(a: Record, request: Record, output: int, took_s: float) -> int:
    """What is due for a peer's whole answer that was there `took_s` after its origin heard the acceptance."""
    promised_ms = milliseconds(promised_duration_s(request, output))
    return int(due_after(a.payment, price_for(a, request, output), promised_ms, milliseconds(took_s)))


@kernel
def consider(
    p: Record, a: Record, prompt: float, cached: float, longest: int, tariff: Ints
) -> tuple[bool, float, float]:
    """Whether it takes a peer's request at the tariff that the origin goes by, on its fresh own state; and the time to
    first token and per token, s, that it expects, as it promises them.

    The request has `prompt` tokens, `cached` of them in the prefix cache here, and at most `longest` of output. The
    clock of a promise starts when the origin hears it, half a round trip after the engine has the request and as long
    before the first token's way back."""
    first_s, token_s = expect(p.own, 0.0, prompt, cached)
    klass = class_like(p, a, longest)
    output = p.known[klass, CLASS_MEAN]
    price = 1.0
    if a.payment != PER_REQUEST:
        price = price_by(tariff, prompt, cached, output) / MICRO
    use = p.own[AD_KV_TOKENS] / p.own[AD_KV_CAPACITY]
    profit = price - p.admission[IF_IT_PAYS] * cost_of(p.cost, prompt, cached, output)
    profit -= min(0.0, p.markup) * worth_of(prompt - cached, cached, output) / 1000.0  # below cost it sells on purpose
    profit += (prompt + output) / 1000.0 / MICRO  # what is lost to the rounding of a tariff is no reason to refuse
    taken = accept(p.admission, first_s, use, p.held, profit, uniform(p.generator))
    if taken:
        p.sold += 1.0 / RATE_WINDOW_S
        p.placed_rate[klass] += 1.0 / RATE_WINDOW_S
        p.cost_s = -np.inf  # with this one, the next costs more
    return taken, first_s, token_s


# What runs here, and what one more request costs.


@kernel
def is_cost_old(p: Record, a: Record, now_s: float) -> bool:
    """Whether the marginal cost is to be worked out again before it is used."""
    return bool(now_s - p.cost_s >= a.tick_s - 1e-9)


@kernel
def class_like(p: Record, a: Record, longest: int) -> int:
    """The own class whose answers are at most as long as a peer's request, or else nearest to that: what is expected of
    its length."""
    like = 0
    for c in range(1, a.n_classes):
        if abs(p.known[c, CLASS_MAX] - longest) < abs(p.known[like, CLASS_MAX] - longest):
            like = c
    return like


@kernel
def begin_appraisal(p: Record, a: Record) -> Appraisal:
    """Nothing runs here."""
    _, token_s = expect(p.own, 0.0, p.own[AD_MEAN_PROMPT], 0.0)
    return Appraisal(0.0, 0.0, 0.0, 0.0, 0.0, token_s)


@kernel
def count_running(
    p: Record, a: Record, request: Record, own: bool, generated: float, now_s: float, so_far: Appraisal
) -> Appraisal:
    """Add a request that runs here to an appraisal.

    `own`: it is an own user's, else a peer's, whose fields of promise and tariff are read; `generated` tokens are out.
    """
    usual, token_s = max(1.0, p.own[AD_MEAN_OUTPUT]), so_far.token_s
    c = request.klass if own else class_like(p, a, request.longest)
    total = expected_output(p.known[c, CLASS_MEAN], generated, p.known[c, CLASS_MAX])
    if own:
        due_s = a.deadlines[c][: a.n_deadlines]
        lost = value_lost_per_s(p.known[c], due_s, generated, now_s - request.arrival_s, token_s)
    else:
        lost = 0.0
        if a.payment == LATENESS:
            price = price_by(request.tariff, request.prompt, request.cached_input, total) / MICRO
            promised_s = request.promised_ttft_s + request.promised_tpot_s * (total - 1.0)
            expected_s = now_s - request.taken_s + (total - generated) * token_s
            lost = payment_lost_per_s(price, max(promised_s, 1e-3), max(expected_s, 1e-3))
    return Appraisal(
        so_far.requests + 1.0,
        so_far.context + context_of(request.prompt, p.known[c, CLASS_MEAN], generated),
        so_far.tokens + request.prompt + generated,
        so_far.at_once + lost,
        so_far.spread + lost * min(1.0, (total - generated) / usual),
        token_s,
    )


@kernel
def usual_context(p: Record, a: Record) -> float:
    """Context of a running request of own users, by the classes that arrive, tokens; longer ones run for longer."""
    weight, context = 0.0, 0.0
    for c in range(a.n_classes):
        mean = p.known[c, CLASS_MEAN]
        share = (p.arrival_rate[c] + 1e-6) * mean
        weight += share
        context += share * context_of(p.own[AD_MEAN_PROMPT], mean, 0.0)
    return context / weight


@kernel
def end_appraisal(p: Record, a: Record, found: Appraisal, now_s: float) -> None:
    """The marginal cost as of now, and the context that a request is expected to have, by all that runs here.

    How much of it they share is seen where some run, and kept where none does.
    """
    context = found.context + CONTEXT_PRIOR * usual_context(p, a)
    p.own[AD_CONTEXT] = context / (found.requests + CONTEXT_PRIOR)
    if found.tokens > 0.0:
        p.own[AD_UNSHARED] = min(max(p.own[AD_KV_TOKENS] / found.tokens, LEAST_UNSHARED), 1.0)
    rates, known = p.placed_rate[: a.n_classes], p.known[: a.n_classes]
    p.future = future_loss(p.own, rates, known, a.deadlines, a.n_deadlines)
    write_cost(p.cost, p.compute, found.at_once, found.spread, p.future, p.own)
    p.cost_s = now_s


@kernel
def look_at_tariffs(p: Record, a: Record, peers: Peers, now_s: float, me: int) -> None:
    """Count the peers that were heard lately, and remember the lowest price among them of a request such as the own
    users'. `me`: the row to leave out, -1 if there is none."""
    silent_s = silent_after_s(a.gossip_s)
    p.peer_price, p.heard = np.inf, 0
    for j in range(peers.adverts.shape[0]):
        if j != me and now_s - peers.adverts[j, AD_TIME_S] <= silent_s:
            p.heard += 1
            tariff = peers.adverts[j, AD_TARIFF : AD_TARIFF + TARIFF_SIZE]
            p.peer_price = min(p.peer_price, price_by(tariff, p.own[AD_MEAN_PROMPT], 0.0, p.own[AD_MEAN_OUTPUT]))


# Time.


@kernel
def tick(p: Record, elapsed_s: float) -> None:
    """A tick went by, `elapsed_s` after the one before."""
    for c in range(MAX_CLASSES):
        p.arrival_rate[c] = aged_rate(p.arrival_rate[c], elapsed_s)
        p.placed_rate[c] = aged_rate(p.placed_rate[c], elapsed_s)
    p.sold = aged_rate(p.sold, elapsed_s)
    reopen(p)


@kernel
def own_stake_target(p: Record) -> int:
    """The stake that the own load calls for, in micro-credits."""
    return stake_target(p.own[AD_KV_TOKENS] / p.own[AD_KV_CAPACITY], p.own[AD_WAITING], p.held)


@kernel
def move_own_stake(p: Record, account: Ints, elapsed_s: float) -> None:
    """Move the stake, for `elapsed_s`, toward what the own load calls for. `account` [ACCOUNT_SIZE]."""
    move_stake(account, own_stake_target(p), elapsed_s)


@kernel
def gossip(p: Record, a: Record, now_s: float) -> bool:
    """Make an advert due if it is time for one; returns whether it is."""
    if now_s < p.next_gossip_s - 1e-9:
        return False
    p.advert_due = 1
    p.next_gossip_s += a.gossip_s
    if p.next_gossip_s < now_s:  # nobody called for long
        p.next_gossip_s = now_s + a.gossip_s
    return True


@kernel
def advertise(p: Record, staked: int, now_s: float, advert: Floats) -> None:
    """Write the own advert [ADVERT_SIZE], which is then no longer due; `staked` micro-credits. The tariff in it is made
    of the marginal cost, and in force from now on. Room in a cache is worth more than that."""
    p.advert_due = 0
    found = 1.0 - min(1.0, p.own[AD_MEAN_UNCACHED] / max(1.0, p.own[AD_MEAN_PROMPT]))
    write_tariff(p.tariff, p.cost, 1.0 + p.admission[KEEP] * found, p.markup)
    for k in range(TARIFF_SIZE):
        p.own[AD_TARIFF + k] = p.tariff[k]
    p.own[AD_STAKE] = staked / MICRO
    for k in range(advert.size):
        advert[k] = p.own[k]
    advert[AD_TIME_S] = now_s


@kernel
def leave(p: Record) -> None:
    """It goes offline, with nothing to decide and no advert due. What it held is the caller's to give up first."""
    p.head = -1
    p.advert_due = 0
    p.sold = 0.0
    for c in range(MAX_CLASSES):
        p.arrival_rate[c] = p.placed_rate[c] = 0.0


@kernel
def write_credit(p: Record, account: Ints, a: Record, q: Records, credit: Ints) -> None:
    """Micro-credits [N] that may be put in escrow with each peer, of one account, within the market's exposure."""
    p.credit = account[FREE]
    for j in range(credit.size):
        credit[j] = account[FREE]
    if a.exposure == NO_BOUND:
        return
    for j in range(credit.size):
        credit[j] = a.exposure
    r = p.out_head
    while r >= 0:
        credit[q[r].executor] -= q[r].locked
        r = q[r].out_next
    for j in range(credit.size):
        credit[j] = available_credit(account, a.exposure - credit[j], a.exposure)
