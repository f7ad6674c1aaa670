"""How requests end: answered, failed, or lost with their executor."""

import numpy as np

from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import OFFLINE_AFTER_S, clear_progress, on_answer, on_length, on_progress
from wwwserve.agents.protocol import MICRO, delivered_value, price_of, settle
from wwwserve.agents.view import CLASS_VALUE
from wwwserve.envs.engine import NEVER, abort, tokens_out
from wwwserve.envs.market.duels import hear_judge, start_judging, void_duel
from wwwserve.envs.market.queues import enqueue
from wwwserve.envs.market.reward import expect_value
from wwwserve.envs.market.settlement import end_leg
from wwwserve.envs.state import (
    DONE,
    FAILED,
    IN_ENGINE,
    JUDGEMENT,
    LOST,
    OWN_DONE,
    OWN_FAILED,
    RETURNED,
    SERVED_FOR_PEERS,
    USER,
)


@kernel
def complete(w, r):
    """Executor's engine is done with request r: pay, remember how it kept its promise, answer the user."""
    m, p, q = w.m, w.p, w.q
    i, o = q[r].executor, q[r].origin
    q[r].status = DONE
    p[i].flow -= m.compute_cost_per_ktok * q[r].output / 1000.0
    if q[r].kind == JUDGEMENT:
        hear_judge(w, r, True)
        return
    on_length(p[i].own, q[r].prompt, q[r].output)
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
        end_leg(w, r)
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
        expect_value(w, u, 0.0)
    else:  # the other leg of a duel, perhaps earlier within the same tick
        q[u].answer_s = min(q[u].answer_s, q[r].finish_s + back_s)
        q[u].first_answer_s = min(q[u].first_answer_s, q[r].first_token_s + back_s)
    k = q[r].duel
    if k >= 0:
        w.d[k].ended += 1
        if w.d[k].ended == 2 and w.d[k].void == 0:
            start_judging(w, k)


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


@kernel
def take_back(w, r):
    """The origin notices that request r was lost with its executor: it decides anew, unless another leg still runs."""
    q = w.q
    end_leg(w, r)
    q[r].status = FAILED
    u = r
    other = -1
    k = q[r].duel
    if k >= 0:
        void_duel(w, k)
        u = w.d[k].first
        other = w.d[k].second if r == u else u
    if not np.isnan(q[u].answer_s) or (other >= 0 and (q[other].status == IN_ENGINE or q[other].status == LOST)):
        return
    expect_value(w, u, w.p[q[u].origin].known[q[u].klass, CLASS_VALUE])
    q[u].duel = -1
    q[u].generated = 0
    q[u].finish_tick = NEVER
    q[u].first_token_s = np.nan
    q[u].ready_s = w.m.now_s
    w.p[q[u].origin].counts[RETURNED] += 1
    enqueue(w, u, True)


@kernel
def vacate(w, i):
    """Provider i's engine stops: its own users' work is gone, that of others will be missed by them."""
    q, e = w.q, w.e[i]
    while e.running > 0 or e.waiting > 0:
        r = e.slots[0] if e.running > 0 else e.wait_head
        abort(e, q, r)
        if q[r].kind == JUDGEMENT:
            q[r].status = FAILED
            hear_judge(w, r, False)
        elif q[r].origin == i:
            fail_user(w, r)
        else:
            q[r].status = LOST
            q[r].noticed_s = w.m.now_s + OFFLINE_AFTER_S


@kernel
def refresh_progress(w, i):
    """Provider i looks at the streams of what it has out, and takes back what is lost."""
    q = w.q
    for j in range(w.m.n_providers):
        clear_progress(w.dealings[i, j])
    r = w.p[i].out_head
    while r >= 0:
        after = q[r].out_next
        j = q[r].executor
        if q[r].status == LOST and w.m.now_s >= q[r].noticed_s:
            take_back(w, r)
        else:
            streamed = tokens_out(w.e[j], q, r) if q[r].status == IN_ENGINE else q[r].generated
            waited_s = w.m.now_s - q[r].taken_s
            on_progress(w.dealings[i, j], waited_s, q[r].promised_ttft_s, q[r].promised_tpot_s, streamed)
        r = after
