"""What a provider holds, and what it has out with peers, as linked lists through the request records."""

import numpy as np

from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import AD_HELD
from wwwserve.agents.view import CLASS_LAST_DEADLINE_S
from wwwserve.envs.state import HELD


@kernel
def enqueue(w, r, front):
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
def dequeue(w, i, c):
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
def next_head(w, i):
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


@kernel
def add_out(w, r):
    p, q = w.p[w.q[r].origin], w.q
    q[r].out_prev = -1
    q[r].out_next = p.out_head
    if p.out_head >= 0:
        q[p.out_head].out_prev = r
    p.out_head = r


@kernel
def remove_out(w, r):
    q = w.q
    before, after = q[r].out_prev, q[r].out_next
    if before >= 0:
        q[before].out_next = after
    else:
        w.p[q[r].origin].out_head = after
    if after >= 0:
        q[after].out_prev = before
    q[r].out_next = q[r].out_prev = -1
