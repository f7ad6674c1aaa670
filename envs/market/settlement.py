"""Escrow and payment between an origin and an executor."""

from wwwserve.agents.kernel import kernel
from wwwserve.agents.protocol import MICRO, lock, settle
from wwwserve.agents.provider import price_for


@kernel
def escrow(w, r):
    """Put in escrow what request r, offered to one whom its origin can afford, can cost there."""
    q = w.q
    q[r].locked = price_for(w.m, q[r], q[r].longest)
    lock(w.accounts[q[r].origin], q[r].locked)


@kernel
def pay(w, r, due):
    """Pay the executor of request r what is due, micro-credits, out of the escrow; the rest of it returns to the
    origin."""
    q, p = w.q, w.p
    o, j = q[r].origin, q[r].executor
    paid = settle(w.accounts[o], w.accounts[j], q[r].locked, due) / MICRO
    q[r].locked = 0
    p[o].transfers -= paid
    p[j].transfers += paid
