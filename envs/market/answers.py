"""How requests end: answered, failed, or lost with their executor."""

import numpy as np

from wwwserve.agents.classes import CLASS_VALUE
from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import NO_TIME, OFFLINE_AFTER_S, on_length
from wwwserve.agents.protocol import delivered_value
from wwwserve.agents.provider import answered, come_back, due_for, end_attempt, look_at_evidence, mask, reopen
from wwwserve.agents.tariff import cost_of
from wwwserve.envs.engine import NEVER, abort, tokens_out
from wwwserve.envs.market.duels import hear_judge, start_judging, void_duel
from wwwserve.envs.market.mail import send
from wwwserve.envs.market.reward import expect_value
from wwwserve.envs.market.sessions import end_session, remember_prefix, set_next_turn
from wwwserve.envs.market.settlement import pay
from wwwserve.envs.market.world import cache_of, count_remote, set_wake
from wwwserve.envs.prefix_cache import clear
from wwwserve.envs.state import (
    ANSWER,
    ANSWERING,
    DONE,
    FAILED,
    HELD,
    JUDGEMENT,
    LOST,
    OFFERED,
    OWN_DONE,
    OWN_FAILED,
    RETURNED,
    SERVED_FOR_PEERS,
    USER,
)


@kernel
def finish(w, r):
    """An engine is done with request r: its user has the answer at once, a peer's after half a round trip."""
    m, p, q = w.m, w.p, w.q
    j = q[r].executor
    p[j].flow -= cost_of(p[j].compute, q[r].prompt, max(q[r].hit, 0), q[r].output)
    if q[r].kind == JUDGEMENT:
        q[r].status = DONE
        hear_judge(w, r, True)
        return
    on_length(p[j].own, q[r].prompt, max(q[r].hit, 0), q[r].output)
    if q[r].origin == j:
        q[r].status = DONE
        deliver(w, r, q[r].finish_s, q[r].first_token_s)
    else:
        count_remote(w, j, -1)
        p[j].counts[SERVED_FOR_PEERS] += 1
        q[r].status = ANSWERING
        send(w, r, ANSWER, q[r].finish_s + 0.5 * m.rtt_s)
    if p[j].held > 0:
        reopen(p[j])
        w.touched[j] = True


@kernel
def receive_answer(w, r):
    """The answer of a peer is all there: it is paid, and how it kept its promise is remembered."""
    m, p, q = w.m, w.p, w.q
    o, j = q[r].origin, q[r].executor
    q[r].status = DONE
    q[r].cached_input = max(q[r].hit, 0)  # as `usage` says; blocks may be gone that it had when it took the request
    pay(w, r, due_for(m, q[r], q[r].output, q[r].mail_s - q[r].taken_s))
    answered(p[o], q, r, w.peer_stats[o, j], q[r].mail_s, q[r].output)
    remember_prefix(w, r)
    deliver(w, r, q[r].mail_s, q[r].first_token_s + 0.5 * m.rtt_s)
    k = q[r].duel
    if k >= 0:
        w.d[k].ended += 1
        if w.d[k].ended == 2 and w.d[k].void == 0:
            start_judging(w, k)
    if p[o].held > 0:
        reopen(p[o])
        w.touched[o] = True


@kernel
def deliver(w, r, at_s, first_at_s):
    """A user has an answer; of a duel's two the first one counts."""
    m, p, q = w.m, w.p, w.q
    u = user_of(w, r)
    if not np.isnan(q[u].answer_s):
        return
    o, c = q[u].origin, q[u].klass
    q[u].answer_s, q[u].first_answer_s = at_s, first_at_s
    p[o].flow += delivered_value(
        p[o].known[c, CLASS_VALUE], m.deadlines[c][: m.n_deadlines], q[u].answer_s - q[u].arrival_s
    )
    p[o].counts[OWN_DONE] += 1
    m.unresolved -= 1
    expect_value(w, u, 0.0)
    set_next_turn(w, u)


@kernel
def user_of(w, r):
    """The user's request that r is, or is a copy of."""
    return r if w.q[r].kind == USER else w.d[w.q[r].duel].first


@kernel
def under_way(status):
    """Whether a request in this status may still be answered by who has it."""
    return OFFERED <= status <= LOST


@kernel
def fail_user(w, u):
    """The user of request u will have no answer."""
    q = w.q
    if np.isnan(q[u].answer_s):
        q[u].status = FAILED
        q[u].answer_s = np.inf
        w.p[q[u].origin].counts[OWN_FAILED] += 1
        w.m.unresolved -= 1
        expect_value(w, u, 0.0)
        end_session(w, q[u].next_turn)


@kernel
def attempt_failed(w, r):
    """A peer does not take request r, or was lost with it, and it is no longer out: it is held again, unless it is
    answered, or the other attempt of its duel is under way."""
    q = w.q
    q[r].status = FAILED
    pay(w, r, 0)
    u, other = r, -1
    k = q[r].duel
    if k >= 0:
        void_duel(w, k)
        u = w.d[k].first
        other = w.d[k].second if r == u else u
    if not np.isnan(q[u].answer_s) or (other >= 0 and under_way(q[other].status)):
        return
    if np.isnan(q[u].taken_s):
        expect_value(w, u, q[u].predicted_held)
    else:
        expect_value(w, u, w.p[q[u].origin].known[q[u].klass, CLASS_VALUE])
    if not (np.isnan(q[u].taken_s) and np.isnan(q[r].taken_s)):
        w.p[q[u].origin].counts[RETURNED] += 1
    if other >= 0:
        mask(q, u, q[w.d[k].second].executor)
    q[u].duel = -1
    q[u].generated = 0
    q[u].hit = -1
    q[u].finish_tick = NEVER
    q[u].first_token_s = np.nan
    q[u].status = HELD
    come_back(w.p[q[u].origin], q, u)
    w.touched[q[u].origin] = True


@kernel
def vacate(w, i):
    """Provider i's engine stops: its own users' work is gone, that of others will be missed by them."""
    q, e = w.q, w.e[i]
    while e.running > 0 or e.waiting > 0:
        r = e.slots[0] if e.running > 0 else e.wait_head
        abort(e, cache_of(w, i), q, r)
        if q[r].kind == JUDGEMENT:
            q[r].status = FAILED
            hear_judge(w, r, False)
        elif q[r].origin == i:
            fail_user(w, r)
        else:
            q[r].status = LOST
            q[r].noticed_s = w.m.now_s + OFFLINE_AFTER_S
            w.m.lost += 1
    clear(e, cache_of(w, i))
    if e.cache_unit > 0:
        w.heard_s[i, :] = NO_TIME
    count_remote(w, i, -w.p[i].remote)
    set_wake(w, i)


@kernel
def send_streams(w, j):
    """What provider j's engine has generated by now for peers will be with them at the next tick."""
    q, e = w.q, w.e[j]
    for k in range(e.running):
        r = e.slots[k]
        q[r].streamed = tokens_out(e, q, r)
    r = e.wait_head
    while r >= 0 and q[r].generated > 0:  # preempted
        q[r].streamed = q[r].generated
        r = q[r].next


@kernel
def look_at_streams(w, i):
    """Provider i looks at the streams of what it has out, and takes back what is lost."""
    p, q = w.p[i], w.q
    r = p.out_head if w.m.lost > 0 else -1
    while r >= 0:
        after = q[r].out_next
        if q[r].status == LOST and w.m.now_s >= q[r].noticed_s:
            w.m.lost -= 1
            end_attempt(p, q, r, w.peer_stats[i, q[r].executor])
            attempt_failed(w, r)
        r = after
    look_at_evidence(p, q, w.peer_stats[i], w.m.now_s)
