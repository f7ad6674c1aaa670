"""Escrow and payment between an origin and an executor."""

import numpy as np

from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import AD_PRICE
from wwwserve.agents.protocol import MICRO, lock, price_of, settle


@kernel
def escrow(w, r, j, free_of_charge):
    """Put in escrow what request r can cost at provider j, whom its origin can afford."""
    q = w.q
    price = np.int64(0) if free_of_charge else np.int64(round(w.adverts[j, AD_PRICE] * MICRO))
    amount = price_of(w.m.pricing, price, np.int64(q[r].longest))
    lock(w.accounts[q[r].origin], amount)
    q[r].price, q[r].locked = price, amount


@kernel
def pay(w, r, tokens):
    """Pay the executor of request r for so many tokens, out of the escrow; the rest of it returns to the origin."""
    q, p = w.q, w.p
    o, j = q[r].origin, q[r].executor
    due = price_of(w.m.pricing, q[r].price, tokens) if tokens > 0 else np.int64(0)
    paid = settle(w.accounts[o], w.accounts[j], q[r].locked, due) / MICRO
    q[r].locked = 0
    p[o].transfers -= paid
    p[j].transfers += paid
