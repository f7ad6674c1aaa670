"""One step of one market: decisions, probes, payment, arrivals, engines, gossip, joins and departures.

Time moves in ticks of the decision interval. At a tick, every provider with an undecided request decides on the most
urgent one; while any is left, further rounds follow at the same instant, so nothing waits for lack of decisions. A
class of requests that is held stays held until the next tick.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.decision import (
    CANDIDATES,
    FIRST_CANDIDATE,
    HOLD,
    TERMS_SIZE,
    accept,
    may_hold,
)
from wwwserve.agents.dice import uniform
from wwwserve.agents.estimate import chance_on_time, expect
from wwwserve.agents.hardware import BLOCK_TOKENS, KV_BLOCKS
from wwwserve.agents.kernel import inlined, kernel
from wwwserve.agents.knowledge import (
    AD_HELD,
    AD_KV_CAPACITY,
    AD_KV_TOKENS,
    AD_PER_KV_TOKEN_S,
    AD_PER_SEQ_S,
    AD_PRICE,
    AD_RUNNING,
    AD_STAKE,
    AD_TIME_S,
    AD_WAITING,
    AD_WEIGHT_S,
    DUELS_LOST,
    DUELS_WON,
    MAX_CLASSES,
    OFFLINE_AFTER_S,
    RATE_WINDOW_S,
    aged_rate,
    clear_progress,
    on_answer,
    on_ended,
    on_length,
    on_progress,
    on_refused,
    on_scrape,
    on_sent,
    silent_after_s,
)
from wwwserve.agents.protocol import (
    A_WINS,
    FREE,
    MICRO,
    PER_REQUEST,
    STAKED,
    TIE,
    VOTE_SILENT,
    VOTE_UNDECIDED,
    delivered_value,
    draw_by_stake,
    lock,
    move_stake,
    price_of,
    room,
    settle,
    settle_duel,
    stake_target,
    vote_of,
)
from wwwserve.agents.view import (
    CLASS_LAST_DEADLINE_S,
    CLASS_MAX,
    CLASS_VALUE,
    write_idle_view,
    write_request_view,
    write_self,
)
from wwwserve.envs.engine import NEVER, abort, advance, kv_use, submit, tokens_out
from wwwserve.envs.state import (
    CLIPPED,
    COPY,
    DELEGATED,
    DONE,
    DUELS_SETTLED,
    DUELS_STARTED,
    DUELS_VOID,
    FAILED,
    HELD,
    HOLDS,
    IN_ENGINE,
    INVALID,
    JUDGED,
    JUDGEMENT,
    LOST,
    MAX_WINDOWS,
    NO_BOUND,
    OWN_ARRIVED,
    OWN_DONE,
    OWN_FAILED,
    PROBES_REFUSED,
    PROBES_UNANSWERED,
    RETURNED,
    RUN_LOCAL,
    SERVED_FOR_PEERS,
    USER,
)
from wwwserve.envs.tape import (
    ADVERT_DUE,
    ANSWERED,
    ARRIVED,
    ASKED,
    CAME_BACK,
    DROPPED,
    DUELLED,
    ENDED,
    FINISHED,
    GUESTS,
    LEFT,
    LOOK,
    LOOKED,
    MISSED,
    NO_TAPE,
    PROBED,
    PUBLISHED,
    REFUSED,
    SCRAPED,
    SENT,
    TICKED,
    TURN,
    note,
)

PROBE_TIMEOUT_S = 2.0
JUDGE_TOKENS = 16  # a judge's answer
PREDICTION_SIGMA = 0.2  # how sure the reward's prediction is of its own estimate, in log time


class World(NamedTuple):
    """One market, and room to work in."""

    m: Any  # MARKET record
    p: NDArray[Any]  # [N] PROVIDER
    e: NDArray[Any]  # [N] ENGINE
    q: NDArray[Any]  # [R] REQUEST
    d: NDArray[Any]  # [D] DUEL
    tape: NDArray[Any]  # [L] NOTE
    adverts: NDArray[np.float64]  # [N, ADVERT_SIZE]
    dealings: NDArray[np.float64]  # [N, N, DEALINGS_SIZE]
    accounts: NDArray[np.int64]  # [N, ACCOUNT_SIZE]
    done: NDArray[np.int64]  # [R]
    stake: NDArray[np.float64]  # [N]
    eligible: NDArray[np.bool_]  # [N]
    before: NDArray[np.float64]  # [N]
    idle_token_s: NDArray[np.float64]  # [NODES]
    looser_than: NDArray[np.int64]  # [MAX_CLASSES]


@inlined
def world_of(markets, b):
    """Market `b` of a batch."""
    return World(
        markets.market[b],
        markets.providers[b],
        markets.engines[b],
        markets.requests[b],
        markets.duels[b],
        markets.tape[b],
        markets.adverts[b],
        markets.dealings[b],
        markets.accounts[b],
        markets.done[b],
        markets.stake[b],
        markets.eligible[b],
        markets.before[b],
        markets.idle_token_s[b],
        markets.looser_than[b],
    )


@kernel
def _note(w, kind, who, peer, request, a, b, c, d):
    """Write a note to the tape, where the market keeps one."""
    if w.m.noted != NO_TAPE:
        note(w.m, w.tape, kind, who, peer, request, a, b, c, d)


# The dispatcher: one queue a class.


@kernel
def _enqueue(w, r, front):
    p, q = w.p[w.q[r].origin], w.q
    c = q[r].klass
    q[r].status = HELD
    if p.held_head[c] < 0:
        q[r].next = -1
        p.held_head[c] = p.held_tail[c] = r
    elif front:
        q[r].next = p.held_head[c]
        p.held_head[c] = r
    else:
        q[r].next = -1
        q[p.held_tail[c]].next = r
        p.held_tail[c] = r
    p.held += 1
    p.own[AD_HELD + c] += 1.0


@kernel
def _dequeue(w, i, c):
    """Take the first request out of provider i's queue of class c."""
    p = w.p[i]
    r = p.held_head[c]
    p.held_head[c] = w.q[r].next
    if p.held_head[c] < 0:
        p.held_tail[c] = -1
    w.q[r].next = -1
    p.held -= 1
    p.own[AD_HELD + c] -= 1.0
    return r


@kernel
def _next_head(w, i):
    """The undecided request of provider i whose last deadline comes first, -1 if there is none to decide on now."""
    p = w.p[i]
    head = -1
    soonest = np.inf
    if p.held > 0:
        for c in range(w.m.n_classes):
            r = p.held_head[c]
            if r >= 0 and p.closed[c] == 0:
                due_s = w.q[r].arrival_s + p.known[c, CLASS_LAST_DEADLINE_S]
                if due_s < soonest:
                    head, soonest = r, due_s
    return head


# What a provider has out with its peers: a doubly linked list for each origin.


@kernel
def _add_out(w, r):
    p, q = w.p[w.q[r].origin], w.q
    q[r].out_prev = -1
    q[r].out_next = p.out_head
    if p.out_head >= 0:
        q[p.out_head].out_prev = r
    p.out_head = r


@kernel
def _remove_out(w, r):
    q = w.q
    before, after = q[r].out_prev, q[r].out_next
    if before >= 0:
        q[before].out_next = after
    else:
        w.p[q[r].origin].out_head = after
    if after >= 0:
        q[after].out_prev = before
    q[r].out_next = q[r].out_prev = -1


@kernel
def _scrape(w, i):
    """Provider i reads its engine."""
    e = w.e[i]
    tokens = (e.profile[KV_BLOCKS] - e.free_blocks) * BLOCK_TOKENS
    on_scrape(w.p[i].own, w.m.now_s, e.running, e.waiting, tokens, 1.0)
    _note(w, SCRAPED, i, -1, -1, float(e.running), float(e.waiting), float(tokens), 0.0)


@kernel
def _lying(w, i):
    return w.p[i].lie_from_s <= w.m.now_s < w.p[i].lie_until_s


@kernel
def _publish(w, i):
    """Send provider i's advert to everyone, its load and speed misreported if it lies."""
    p, advert = w.p[i], w.adverts[i]
    p.own[AD_PRICE] = p.price
    p.own[AD_STAKE] = w.accounts[i, STAKED] / MICRO
    for k in range(advert.size):
        advert[k] = p.own[k]
    advert[AD_TIME_S] = w.m.now_s
    if _lying(w, i):
        advert[AD_RUNNING] *= p.lie_load
        advert[AD_WAITING] *= p.lie_load
        advert[AD_KV_TOKENS] *= p.lie_load
        for c in range(MAX_CLASSES):
            advert[AD_HELD + c] *= p.lie_load
        for k in range(AD_WEIGHT_S, AD_KV_CAPACITY):
            advert[k] /= p.lie_speed
    _note(w, PUBLISHED, i, -1, -1, w.accounts[i, STAKED] / MICRO, 0.0, 0.0, 0.0)


@kernel
def _expect_value(w, u, value):
    """Count user request u with this value in its origin's potential."""
    w.p[w.q[u].origin].potential += value - w.q[u].predicted
    w.q[u].predicted = value


# Placing a request.


@kernel
def _clip_length(w, r, j):
    """Cut a request to what executor j's model and KV cache can hold."""
    q, longest = w.q, w.p[j].max_len
    if q[r].prompt + q[r].output > longest:
        q[r].prompt = min(q[r].prompt, longest - 1)
        q[r].output = min(q[r].output, longest - q[r].prompt)
        w.p[q[r].origin].counts[CLIPPED] += 1


@kernel
def _in_time(left_s, expected_s):
    """Chance that what is expected to take `expected_s` is done within `left_s`: `chance_on_time` for one deadline and
    a known length, of log-logistic error with shape 8, the tails beyond a factor of 3 cut off."""
    if left_s >= 3.0 * expected_s:
        return 1.0
    if 3.0 * left_s <= expected_s:
        return 0.0
    ratio = expected_s / left_s
    fourth = ratio * ratio * ratio * ratio  # shape 1.702 / PREDICTION_SIGMA is 8.5; a power of two takes no logarithm
    return 1.0 / (1.0 + fourth * fourth)


@kernel
def _reprice(w, i, j, token_s):
    """Predict anew the value of what runs on engine j, which decodes at `token_s` once it takes provider i's request.

    What the change of pace does to the requests that run there is credited to provider i; what happened since they were
    last predicted is not.
    """
    m, q, e = w.m, w.q, w.e[j]
    _, now_token_s = expect(w.p[j].own, -1.0, 0.0)
    for k in range(e.running):
        r = e.slots[k]
        if q[r].kind != USER:
            continue
        o, c = q[r].origin, q[r].klass
        left = max(1.0, float(q[r].output - tokens_out(e, q, r)))
        before, after = 0.0, 0.0
        for t in range(m.n_deadlines):
            left_s = q[r].arrival_s + m.deadlines[c, t] - m.now_s
            before += _in_time(left_s, left * now_token_s)
            after += _in_time(left_s, left * token_s)
        worth = w.p[o].known[c, CLASS_VALUE] / m.n_deadlines
        before, after = worth * before, worth * after
        w.p[i].effect += (1.0 if o == i else m.team_weight) * (after - before)
        _expect_value(w, r, after)


@kernel
def _place(w, r, j, at_s, first_s, token_s):
    """Submit request r to provider j's engine at `at_s`, and count its predicted value into its origin's potential.

    The prediction knows the request's true output length; it serves the reward alone, no view shows it.
    """
    q = w.q
    _clip_length(w, r, j)
    if w.m.by_decision == 1 and q[r].kind == USER:
        _reprice(w, q[r].origin, j, token_s)
    o, c = q[r].origin, q[r].klass
    q[r].executor = j
    q[r].status = IN_ENGINE
    submit(w.e[j], q, r, at_s)
    _scrape(w, j)
    if q[r].kind != JUDGEMENT:
        deadlines = w.m.deadlines[c][: w.m.n_deadlines]
        chance = chance_on_time(
            deadlines, at_s - q[r].arrival_s, first_s, token_s, float(q[r].output), PREDICTION_SIGMA, 1e9
        )
        if q[r].kind == USER:
            value = w.p[o].known[c, CLASS_VALUE] * chance
            w.p[o].effect += value - q[r].predicted
            _expect_value(w, r, value)


@kernel
def _charge_wait(w, i, r):
    """Charge provider i for what the wait of its request r made impossible.

    A held request is worth no more than if it began at once, alone on the own engine. Were only its placement charged,
    to put that off would be worth its discount.
    """
    m, q, own = w.m, w.q, w.p[i].own
    context = q[r].prompt + 0.5 * q[r].output
    token_s = own[AD_WEIGHT_S] + own[AD_PER_SEQ_S] + own[AD_PER_KV_TOKEN_S] * context
    deadlines = m.deadlines[q[r].klass][: m.n_deadlines]
    waited_s = m.now_s - q[r].arrival_s
    chance = chance_on_time(deadlines, waited_s, 0.0, token_s, float(q[r].output), PREDICTION_SIGMA, 1e9)
    best = w.p[i].known[q[r].klass, CLASS_VALUE] * chance
    if best < q[r].predicted:
        w.p[i].effect += best - q[r].predicted
        _expect_value(w, r, best)


@kernel
def _place_local(w, i, r):
    first_s, token_s = expect(w.p[i].own, 0.0, w.q[r].prompt)
    _place(w, r, i, max(w.m.now_s, w.q[r].ready_s), first_s, token_s)
    w.p[i].counts[RUN_LOCAL] += 1


@kernel
def _probe(w, r, j, directed):
    """Ask provider j to take request r; hand it over if it does. Returns whether it did.

    A directed request is taken whatever j's terms are. The probe costs a round trip, or a timeout if j is gone.
    """
    m, p, q = w.m, w.p, w.q
    i = q[r].origin
    leaves_s = max(m.now_s, q[r].ready_s)
    if p[j].online == 0:
        q[r].ready_s = leaves_s + PROBE_TIMEOUT_S
        p[i].counts[PROBES_UNANSWERED] += 1
        on_refused(w.dealings[i, j], w.adverts[j])
        _note(w, REFUSED, i, j, r, 0.0, 0.0, 0.0, 0.0)
        return False
    first_s, token_s = expect(p[j].own, 0.0, q[r].prompt)
    u = 0.0 if directed else uniform(m.dice)
    taken = directed or accept(p[j].terms, first_s, kv_use(w.e[j]), p[j].held, u)
    _note(w, PROBED, j, i, r, float(q[r].prompt), u, 1.0 if taken else 0.0, 0.0)
    price = np.int64(round(w.adverts[j, AD_PRICE] * MICRO))
    if directed and price_of(m.pricing, price, np.int64(p[i].known[q[r].klass, CLASS_MAX])) > _room(w, i, j):
        price = np.int64(0)  # a router that sees everything stands outside the economy
    amount = price_of(m.pricing, price, np.int64(p[i].known[q[r].klass, CLASS_MAX]))
    if not taken or amount > _room(w, i, j) or not lock(w.accounts[i], amount):
        q[r].ready_s = leaves_s + m.rtt_s
        p[i].counts[PROBES_REFUSED] += 1
        on_refused(w.dealings[i, j], w.adverts[j])
        _note(w, REFUSED, i, j, r, 0.0, 0.0, 0.0, 0.0)
        return False
    q[r].price, q[r].locked = price, amount
    q[r].taken_s = leaves_s + m.rtt_s
    q[r].promised_ttft_s = first_s + m.rtt_s
    q[r].promised_tpot_s = token_s
    if _lying(w, j):
        q[r].promised_ttft_s = first_s * p[j].lie_load / p[j].lie_speed + m.rtt_s
        q[r].promised_tpot_s = token_s / p[j].lie_speed
    _place(w, r, j, leaves_s + 1.5 * m.rtt_s, first_s, token_s)
    _add_out(w, r)
    on_sent(w.dealings[i, j], w.adverts[j])
    _note(w, SENT, i, j, r, 0.0, 0.0, 0.0, 0.0)
    p[j].guests += 1
    _note(w, GUESTS, j, i, r, 1.0, 0.0, 0.0, 0.0)
    p[i].counts[DELEGATED] += 1
    return True


@kernel
def _end_leg(w, r):
    """Request r is no longer with the peer that took it; what is still in escrow for it goes back."""
    q = w.q
    i, j = q[r].origin, q[r].executor
    _remove_out(w, r)
    on_ended(w.dealings[i, j])
    _note(w, ENDED, i, j, r, 0.0, 0.0, 0.0, 0.0)
    w.p[j].guests -= 1
    _note(w, GUESTS, j, i, r, -1.0, 0.0, 0.0, 0.0)
    settle(w.accounts[i], w.accounts[j], q[r].locked, np.int64(0))
    q[r].locked = 0


# Duels: a copy of a delegated request goes to a second executor, and judges compare the two answers.


@kernel
def _new_request(w, kind, o, klass, duel):
    r = w.m.used
    w.m.used += 1
    w.q[r].kind = kind
    w.q[r].origin = o
    w.q[r].klass = klass
    w.q[r].duel = duel
    w.q[r].ready_s = w.m.now_s
    w.q[r].arrival_s = w.m.now_s
    return r


@kernel
def _maybe_duel(w, i, r, taken_by):
    """With the market's chance, send a copy of request r, just taken by candidate `taken_by`, to another candidate."""
    m, q, p = w.m, w.q, w.p[i]
    if m.duel_probability <= 0.0 or uniform(m.dice) > m.duel_probability:
        return
    if m.n_duels >= w.d.size or m.n_arrivals + (m.n_duels + 1) * (1 + m.judges) > q.size:
        return  # every duel begun may yet need records for its judges
    for k in range(p.n_candidates):
        if k == taken_by or (p.refused >> k) & 1:
            continue
        copy = _new_request(w, COPY, i, q[r].klass, m.n_duels)
        q[copy].prompt, q[copy].output = q[r].prompt, q[r].output
        q[copy].arrival_s = q[r].arrival_s
        if _probe(w, copy, p.candidates[k], False):
            q[r].duel = m.n_duels
            duel = w.d[m.n_duels]
            duel.first, duel.second = r, copy
            m.n_duels += 1
            p.counts[DUELS_STARTED] += 1
        else:
            m.used -= 1
        return


@kernel
def _void_duel(w, k):
    if w.d[k].void == 0:
        w.d[k].void = 1
        w.p[w.q[w.d[k].first].origin].counts[DUELS_VOID] += 1


@kernel
def _start_judging(w, k):
    """Both answers of duel k are in: draw judges by stake and put the question to their engines."""
    m, q, p, duel = w.m, w.q, w.p, w.d[k]
    a, b = duel.first, duel.second
    o = q[a].origin
    for j in range(w.stake.size):
        others = j < m.n_providers and j != o and j != q[a].executor and j != q[b].executor
        w.eligible[j] = others and p[j].online == 1
        w.stake[j] = w.accounts[j, STAKED]
    count = draw_by_stake(w.stake, w.eligible, m.judges, m.dice, duel.judges)
    judges = 0
    for s in range(count):
        j = duel.judges[s]
        price = np.int64(round(p[j].price * MICRO))
        fee = price_of(m.pricing, price, np.int64(JUDGE_TOKENS))
        if not lock(w.accounts[o], fee):
            break
        r = _new_request(w, JUDGEMENT, o, judges, k)
        q[r].prompt = q[a].prompt + q[a].output + q[b].output
        q[r].output = JUDGE_TOKENS
        q[r].price, q[r].locked = price, fee
        duel.judges[judges] = j
        duel.votes[judges] = VOTE_SILENT
        _place(w, r, j, m.now_s + 0.5 * m.rtt_s, 0.0, 1.0)
        judges += 1
    duel.n_judges = duel.pending = judges
    if judges == 0:
        _void_duel(w, k)


@kernel
def _hear_judge(w, r, answered):
    """A judge of a duel has voted, or will not; with the last of them the duel is settled."""
    q, k = w.q, w.q[r].duel
    duel = w.d[k]
    o, j = q[r].origin, q[r].executor
    a, b = q[duel.first].executor, q[duel.second].executor
    due = np.int64(0)
    if answered:
        duel.votes[q[r].klass] = vote_of(w.p[a].strength, w.p[b].strength, uniform(w.m.dice))
        due = price_of(w.m.pricing, q[r].price, q[r].output)
        w.p[j].counts[JUDGED] += 1
    paid = settle(w.accounts[o], w.accounts[j], q[r].locked, due) / MICRO
    q[r].locked = 0
    w.p[o].transfers -= paid
    w.p[j].transfers += paid
    duel.pending -= 1
    if duel.pending > 0:
        return
    for x in range(w.m.n_providers):
        w.p[x].transfers -= w.accounts[x, STAKED] / MICRO
    outcome = settle_duel(w.accounts, a, b, duel.judges[: duel.n_judges], duel.votes[: duel.n_judges])
    for x in range(w.m.n_providers):
        w.p[x].transfers += w.accounts[x, STAKED] / MICRO
    w.p[o].counts[DUELS_SETTLED] += 1
    if outcome != TIE:
        winner, loser = (a, b) if outcome == A_WINS else (b, a)
        w.dealings[o, winner, DUELS_WON] += 1.0
        w.dealings[o, loser, DUELS_LOST] += 1.0
        _note(w, DUELLED, o, winner, -1, 1.0, 0.0, 0.0, 0.0)
        _note(w, DUELLED, o, loser, -1, 0.0, 0.0, 0.0, 0.0)


@kernel
def _end_duels(w):
    """The market ends: legs whose users have their answer are withdrawn, judges still at work leave it undecided."""
    m, q = w.m, w.q
    for k in range(m.n_duels):
        duel = w.d[k]
        if duel.ended == 2:
            continue
        _void_duel(w, k)
        for leg in (duel.first, duel.second):
            out = q[leg].status == IN_ENGINE or q[leg].status == LOST
            if out and q[leg].duel == k and not np.isnan(q[duel.first].answer_s):
                if q[leg].status == IN_ENGINE:
                    abort(w.e[q[leg].executor], q, leg)
                _end_leg(w, leg)
                q[leg].status = FAILED
    for r in range(m.n_arrivals, m.used):
        if q[r].kind == JUDGEMENT and q[r].status == IN_ENGINE:
            abort(w.e[q[r].executor], q, r)
            q[r].status = FAILED
            w.d[q[r].duel].votes[q[r].klass] = VOTE_UNDECIDED
            _hear_judge(w, r, False)


# How requests end.


@kernel
def _complete(w, r):
    """Executor's engine is done with request r: pay, remember how it kept its promise, answer the user."""
    m, p, q = w.m, w.p, w.q
    i, o = q[r].executor, q[r].origin
    q[r].status = DONE
    p[i].flow -= m.compute_cost_per_ktok * q[r].output / 1000.0
    if q[r].kind == JUDGEMENT:
        _hear_judge(w, r, True)
        return
    on_length(p[i].own, q[r].prompt, q[r].output)
    _note(w, FINISHED, i, -1, r, float(q[r].prompt), float(q[r].output), 0.0, 0.0)
    back_s = 0.0
    if i != o:
        back_s = 0.5 * m.rtt_s
        due = price_of(m.pricing, q[r].price, q[r].output)
        paid = settle(w.accounts[o], w.accounts[i], q[r].locked, due) / MICRO
        q[r].locked = 0
        p[o].transfers -= paid
        p[i].transfers += paid
        promised_s = q[r].promised_ttft_s + q[r].promised_tpot_s * (q[r].output - 1)
        took_s = q[r].finish_s + back_s - q[r].taken_s
        on_answer(w.dealings[o, i], took_s, promised_s)
        _note(w, ANSWERED, o, i, r, took_s, promised_s, 0.0, 0.0)
        _end_leg(w, r)
        p[i].counts[SERVED_FOR_PEERS] += 1
    u = r if q[r].kind == USER else w.d[q[r].duel].first
    if np.isnan(q[u].answer_s):
        q[u].answer_s = q[r].finish_s + back_s
        q[u].first_answer_s = q[r].first_token_s + back_s
        c = q[u].klass
        deadlines = m.deadlines[c][: m.n_deadlines]
        p[o].flow += delivered_value(p[o].known[c, CLASS_VALUE], deadlines, q[u].answer_s - q[u].arrival_s)
        p[o].counts[OWN_DONE] += 1
        m.unresolved -= 1
        _expect_value(w, u, 0.0)
    else:  # the other leg of a duel, perhaps earlier within the same tick
        q[u].answer_s = min(q[u].answer_s, q[r].finish_s + back_s)
        q[u].first_answer_s = min(q[u].first_answer_s, q[r].first_token_s + back_s)
    k = q[r].duel
    if k >= 0:
        w.d[k].ended += 1
        if w.d[k].ended == 2 and w.d[k].void == 0:
            _start_judging(w, k)


@kernel
def _fail_user(w, u):
    """The user of request u will have no answer."""
    q = w.q
    if np.isnan(q[u].answer_s):
        q[u].status = FAILED
        q[u].answer_s = np.inf
        w.p[q[u].origin].counts[OWN_FAILED] += 1
        w.m.unresolved -= 1
        _expect_value(w, u, 0.0)


@kernel
def _take_back(w, r):
    """The origin notices that request r was lost with its executor: it decides anew, unless another leg still runs."""
    q = w.q
    _end_leg(w, r)
    q[r].status = FAILED
    u = r
    other = -1
    k = q[r].duel
    if k >= 0:
        _void_duel(w, k)
        u = w.d[k].first
        other = w.d[k].second if r == u else u
    if not np.isnan(q[u].answer_s) or (other >= 0 and (q[other].status == IN_ENGINE or q[other].status == LOST)):
        return
    _expect_value(w, u, w.p[q[u].origin].known[q[u].klass, CLASS_VALUE])
    q[u].duel = -1
    q[u].generated = 0
    q[u].finish_tick = NEVER
    q[u].first_token_s = np.nan
    q[u].ready_s = w.m.now_s
    w.p[q[u].origin].counts[RETURNED] += 1
    _enqueue(w, u, True)
    _note(w, CAME_BACK, q[u].origin, -1, u, 0.0, 0.0, 0.0, 0.0)


@kernel
def _vacate(w, i):
    """Provider i's engine stops: its own users' work is gone, that of others will be missed by them."""
    q, e = w.q, w.e[i]
    while e.running > 0 or e.waiting > 0:
        r = e.slots[0] if e.running > 0 else e.wait_head
        abort(e, q, r)
        if q[r].kind == JUDGEMENT:
            q[r].status = FAILED
            _hear_judge(w, r, False)
        elif q[r].origin == i:
            _fail_user(w, r)
        else:
            q[r].status = LOST
            q[r].noticed_s = w.m.now_s + OFFLINE_AFTER_S


@kernel
def _go_offline(w, i):
    """Provider i leaves without a word: its users' requests fail, here and with peers, where their work is dropped."""
    p, q = w.p[i], w.q
    _vacate(w, i)
    for c in range(w.m.n_classes):
        while p.held_head[c] >= 0:
            _note(w, DROPPED, i, -1, p.held_head[c], float(c), 0.0, 0.0, 0.0)
            _fail_user(w, _dequeue(w, i, c))
    while p.out_head >= 0:
        r = p.out_head
        if q[r].status == IN_ENGINE:
            abort(w.e[q[r].executor], q, r)
            _scrape(w, q[r].executor)
        _end_leg(w, r)
        q[r].status = FAILED
        if q[r].duel >= 0:
            _void_duel(w, q[r].duel)
        u = r if q[r].kind == USER else w.d[q[r].duel].first
        if q[u].status != IN_ENGINE and q[u].status != LOST:  # else it is in the list too, and still to be withdrawn
            _fail_user(w, u)
    p.online = 0
    p.head = -1
    p.advert_due = 0
    p.arrival_rate = 0.0
    _note(w, LEFT, i, -1, -1, 0.0, 0.0, 0.0, 0.0)
    _scrape(w, i)


@kernel
def _is_scheduled(p, now_s):
    for k in range(MAX_WINDOWS):
        if p.windows[k, 0] <= now_s < p.windows[k, 1]:
            return True
    return False


# Decisions.


@kernel
def _decide(w, i, route, direct):
    """Carry out provider i's decision on the request at its head."""
    m, q, p = w.m, w.q, w.p[i]
    r = p.head
    c = q[r].klass
    holdable = may_hold(m.now_s - q[r].arrival_s, p.known[c, CLASS_LAST_DEADLINE_S])
    valid = True
    if direct >= 0:
        if direct >= m.n_providers or w.p[direct].online == 0 or (w.p[direct].serves & p.asks) == 0:
            valid = False
        elif direct == i:
            _dequeue(w, i, c)
            _place_local(w, i, r)
            return
        else:
            _dequeue(w, i, c)
            if not _probe(w, r, direct, True):
                _enqueue(w, r, True)
                p.closed[c] = 1
            return
        route = HOLD
    elif route >= FIRST_CANDIDATE:
        k = route - FIRST_CANDIDATE
        if k < p.n_candidates and (p.refused >> k) & 1 == 0 and _affords(w, i, p.candidates[k], c):
            _dequeue(w, i, c)
            if _probe(w, r, p.candidates[k], False):
                _maybe_duel(w, i, r, k)
            else:
                _enqueue(w, r, True)
                p.refused |= 1 << k
            return
        valid = False
        route = HOLD
    elif route < 0:
        valid = False
        route = HOLD
    if not valid or (route == HOLD and not holdable):
        p.counts[INVALID] += 1
    if route == HOLD and holdable:
        if m.by_decision == 1:
            _charge_wait(w, i, r)
        p.closed[c] = 1
        p.counts[HOLDS] += 1
        return
    _dequeue(w, i, c)
    _place_local(w, i, r)


@kernel
def _affords(w, i, j, c):
    """Whether provider i may put in escrow the most that a request of class c can cost at j."""
    longest = 1.0 if w.m.pricing == PER_REQUEST else w.p[i].known[c, CLASS_MAX] / 1000.0
    return w.adverts[j, AD_PRICE] * longest * MICRO <= _room(w, i, j)


@kernel
def _room(w, i, j):
    """What provider i may put in escrow for one more request at j, micro-credits."""
    if w.m.exposure == NO_BOUND:
        return w.accounts[i, FREE]
    exposed = np.int64(0)
    r = w.p[i].out_head
    while r >= 0:
        if w.q[r].executor == j:
            exposed += w.q[r].locked
        r = w.q[r].out_next
    return room(w.accounts[i], exposed, w.m.exposure)


@kernel
def _draw_candidates(w, i):
    """Draw, by stake as advertised, the candidates for provider i's request at the head."""
    m, p = w.m, w.p[i]
    silent_s = silent_after_s(m.gossip_s)
    for j in range(w.stake.size):
        w.eligible[j] = (
            j < m.n_providers
            and j != i
            and (w.p[j].serves & p.asks) != 0
            and m.now_s - w.adverts[j, AD_TIME_S] <= silent_s
        )
        w.stake[j] = w.adverts[j, AD_STAKE]
    p.n_candidates = draw_by_stake(w.stake, w.eligible, CANDIDATES, m.dice, p.candidates)
    p.refused = 0


@kernel
def _ask(w, i, dice, fresh):
    """Set provider i's head; a new one gets candidates and dice. Returns whether there is one."""
    p = w.p[i]
    r = _next_head(w, i)
    _note(w, ASKED, i, -1, r, float(w.accounts[i, FREE]), 0.0, 0.0, 0.0)
    if r >= 0 and (fresh or r != p.head):
        _draw_candidates(w, i)
        for k in range(dice.size):
            dice[k] = uniform(w.m.dice)
    p.head = r
    return r >= 0


@kernel
def _write_view(w, i, nodes, request, me, routes):
    m, p, q = w.m, w.p[i], w.q
    if p.head >= 0:
        r = p.head
        c = q[r].klass
        write_request_view(
            nodes, request, routes, p.own, w.adverts, w.dealings[i], p.candidates, p.n_candidates, p.refused,
            may_hold(m.now_s - q[r].arrival_s, p.known[c, CLASS_LAST_DEADLINE_S]),
            w.accounts[i, FREE], m.now_s, m.rtt_s, q[r].prompt, q[r].arrival_s, c,
            p.known[: m.n_classes], m.deadlines[:, : m.n_deadlines], m.pricing, w.idle_token_s, w.looser_than,
        )  # fmt: skip
        if m.exposure != NO_BOUND:
            for k in range(p.n_candidates):
                if not _affords(w, i, p.candidates[k], c):
                    routes[FIRST_CANDIDATE + k] = 0
    else:
        write_idle_view(nodes, request, routes, p.own, m.now_s)
    write_self(me, p.head >= 0, p.advert_due == 1, p.held, p.arrival_rate, p.guests, w.accounts[i, FREE], p.price)


# Time.


@kernel
def _refresh_progress(w, i):
    """Provider i looks at the streams of what it has out, and takes back what is lost."""
    q = w.q
    _note(w, LOOK, i, -1, -1, 0.0, 0.0, 0.0, 0.0)
    for j in range(w.m.n_providers):
        clear_progress(w.dealings[i, j])
    r = w.p[i].out_head
    while r >= 0:
        after = q[r].out_next
        j = q[r].executor
        if q[r].status == LOST and w.m.now_s >= q[r].noticed_s:
            _take_back(w, r)
        else:
            streamed = tokens_out(w.e[j], q, r) if q[r].status == IN_ENGINE else q[r].generated
            waited_s = w.m.now_s - q[r].taken_s
            on_progress(w.dealings[i, j], waited_s, q[r].promised_ttft_s, q[r].promised_tpot_s, streamed)
            _note(w, LOOKED, i, j, r, waited_s, q[r].promised_ttft_s, q[r].promised_tpot_s, float(streamed))
        r = after


@kernel
def _tick(w):
    """Move the market to its next tick: joins, departures, engines, arrivals, stake, gossip."""
    m, p, q, e = w.m, w.p, w.q, w.e
    m.now_s += m.interval_s
    now_s = m.now_s
    n = m.n_providers
    for i in range(n):
        n_done = advance(e[i], q, now_s, w.done, 0)
        for k in range(n_done):
            _complete(w, w.done[k])
    for i in range(n):
        scheduled = _is_scheduled(p[i], now_s)
        if p[i].online == 1 and not scheduled:
            _go_offline(w, i)
        elif p[i].online == 0 and scheduled:
            p[i].online = 1
            p[i].next_gossip_s = now_s
        if p[i].online == 1:
            _scrape(w, i)
        p[i].arrival_rate = aged_rate(p[i].arrival_rate, m.interval_s)
        _note(w, TICKED, i, -1, -1, m.interval_s, 0.0, 0.0, 0.0)
    while m.next_arrival < m.n_arrivals and q[m.next_arrival].arrival_s <= now_s:
        r = m.next_arrival
        i = q[r].origin
        m.next_arrival += 1
        p[i].counts[OWN_ARRIVED] += 1
        p[i].arrival_rate += 1.0 / RATE_WINDOW_S
        _clip_length(w, r, i)
        if p[i].online == 1:
            value = p[i].known[q[r].klass, CLASS_VALUE]
            _expect_value(w, r, value)
            p[i].arrived += value
            _enqueue(w, r, False)
            _note(w, ARRIVED, i, -1, r, float(q[r].klass), float(q[r].prompt), q[r].arrival_s, 0.0)
        else:  # it came in the last interval before the provider left
            _note(w, MISSED, i, -1, r, 0.0, 0.0, 0.0, 0.0)
            _fail_user(w, r)
    for i in range(n):
        for c in range(m.n_classes):
            p[i].closed[c] = 0
        if p[i].online == 1:
            if m.stake_follows_load == 1:
                target = stake_target(kv_use(e[i]), e[i].waiting, p[i].held)
                move_stake(w.accounts[i], target, m.interval_s)
            if now_s >= p[i].next_gossip_s - 1e-9:
                _refresh_progress(w, i)
                p[i].advert_due = 1
                _note(w, ADVERT_DUE, i, -1, -1, 0.0, 0.0, 0.0, 0.0)
                p[i].next_gossip_s += m.gossip_s


@kernel
def start(w, nodes, request, me, routes, active, dice):
    """Bring a fresh market to its first decision."""
    m, p = w.m, w.p
    for i in range(m.n_providers):
        if _is_scheduled(p[i], 0.0):
            p[i].online = 1
            _scrape(w, i)
            p[i].advert_due = 1  # the first step is for prices and terms
    _show(w, nodes, request, me, routes, active, dice, True)


@kernel
def _show(w, nodes, request, me, routes, active, dice, fresh):
    """Ask every provider that has something to decide; returns whether a request is among it."""
    undecided = False
    for i in range(active.size):
        asked_before = active[i]
        active[i] = False
        if i >= w.m.n_providers or w.p[i].online == 0:
            if fresh and i < w.m.n_providers:
                _write_view(w, i, nodes[i], request[i], me[i], routes[i])
            continue
        has_request = _ask(w, i, dice[i], fresh)
        undecided = undecided or has_request
        active[i] = has_request or w.p[i].advert_due == 1
        if active[i] or asked_before or fresh:  # one that has decided no longer sees its request
            _write_view(w, i, nodes[i], request[i], me[i], routes[i])
    return undecided


@kernel
def step(w, route, terms, price, direct, nodes, request, me, routes, active, dice, reward, given):
    """One step of a market that is not over: decisions, then the next round at this instant or the next tick.

    route, price, direct [N], terms [N, TERMS_SIZE]; reward [N] receives what the step paid, given [N]
    what of it the arrivals brought, whatever is decided; the others the next views.
    """
    m, p = w.m, w.p
    n = m.n_providers
    before = w.before
    for i in range(n):
        before[i] = p[i].potential
        p[i].flow = 0.0
        p[i].transfers = 0.0
        p[i].arrived = 0.0
        p[i].effect = 0.0
    for k in range(n):
        i = (k + m.steps) % n
        if not active[i]:
            continue
        _note(w, TURN, i, -1, p[i].head, 0.0, 0.0, 0.0, 0.0)
        for t in range(TERMS_SIZE):
            p[i].terms[t] = terms[i, t]
        if p[i].advert_due == 1:
            p[i].price = m.prices[min(max(price[i], 0), m.n_prices - 1)]
        if p[i].head >= 0:
            _decide(w, i, route[i], direct[i])
    for i in range(n):
        if p[i].advert_due == 1:
            p[i].advert_due = 0
            _publish(w, i)
    m.steps += 1
    m.elapsed_s = 0.0
    if not _show(w, nodes, request, me, routes, active, dice, False):
        m.elapsed_s = m.interval_s
        _tick(w)
        _show(w, nodes, request, me, routes, active, dice, True)
    if m.now_s >= m.duration_s and (m.unresolved == 0 or m.now_s >= m.duration_s + m.drain_s - 1e-9):
        _end_duels(w)
        m.over = 1
        for i in range(n):
            active[i] = False
            p[i].potential = 0.0  # what is not done by now counts as missed
            p[i].arrived = 0.0

    _pay(w, reward, given)


@kernel
def _pay(w, reward, given):
    """What the step paid to each provider, and what of it the arrivals brought; see `envs.state.Reward`."""
    m, p, before = w.m, w.p, w.before
    n = m.n_providers
    discount = m.gamma**m.elapsed_s if m.dense == 1 else 0.0
    mean = 0.0
    mean_given = 0.0
    for i in range(n):
        p[i].profit += p[i].flow + p[i].transfers
        transfers = p[i].transfers if m.count_transfers == 1 else 0.0
        if m.by_decision == 1:
            reward[i] = p[i].effect + (1.0 - m.team_weight) * transfers
            continue
        before[i] = p[i].flow + transfers + (discount * p[i].potential - before[i] if m.dense == 1 else 0.0)
        mean += before[i] / n
        mean_given += discount * p[i].arrived / n
    if m.by_decision == 0:
        for i in range(n):
            reward[i] = (1.0 - m.team_weight) * before[i] + m.team_weight * mean
            given[i] = (1.0 - m.team_weight) * discount * p[i].arrived + m.team_weight * mean_given


@kernel
def step_range(markets, low, high, actions, views, active, dice, reward, given):
    """Step the markets `low` to `high` that are not over. Each market is stepped in a call of its own."""
    for b in range(low, high):
        reward[b] = 0.0
        given[b] = 0.0
        if markets.market[b].over == 0:
            step(
                world_of(markets, b), actions.route[b], actions.terms[b], actions.price[b], actions.direct[b],
                views.nodes[b], views.request[b], views.me[b], views.routes[b], active[b], dice[b], reward[b],
                given[b],
            )  # fmt: skip
        else:
            markets.market[b].elapsed_s = 0.0


@kernel
def start_market(markets, b, views, active, dice):
    """Bring market `b`, just written, to its first decision."""
    start(world_of(markets, b), views.nodes[b], views.request[b], views.me[b], views.routes[b], active[b], dice[b])
