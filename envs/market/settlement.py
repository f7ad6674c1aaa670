"""Escrow and payment between an origin and an executor."""

import numpy as np

from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import AD_PRICE, on_ended
from wwwserve.agents.protocol import FREE, MICRO, PER_REQUEST, room, settle
from wwwserve.agents.view import CLASS_MAX
from wwwserve.envs.market.queues import remove_out
from wwwserve.envs.state import NO_BOUND


@kernel
def affords(w, i, j, c):
    """Whether provider i may put in escrow the most that a request of class c can cost at j."""
    longest = 1.0 if w.m.pricing == PER_REQUEST else w.p[i].known[c, CLASS_MAX] / 1000.0
    return w.adverts[j, AD_PRICE] * longest * MICRO <= credit_for(w, i, j)


@kernel
def credit_for(w, i, j):
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
def end_leg(w, r):
    """Request r is no longer with the peer that took it; what is still in escrow for it goes back."""
    q = w.q
    i, j = q[r].origin, q[r].executor
    remove_out(w, r)
    on_ended(w.dealings[i, j])
    w.p[j].guests -= 1
    settle(w.accounts[i], w.accounts[j], q[r].locked, np.int64(0))
    q[r].locked = 0
