"""A request on its way to a peer: asked, taken or refused."""

import numpy as np

from wwwserve.agents.decision import accept
from wwwserve.agents.dice import uniform
from wwwserve.agents.estimate import expect
from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import AD_PRICE, on_refused, on_sent
from wwwserve.agents.protocol import MICRO, lock, price_of
from wwwserve.agents.view import CLASS_MAX
from wwwserve.envs.engine import kv_use
from wwwserve.envs.market.engines import place
from wwwserve.envs.market.queues import add_out
from wwwserve.envs.market.settlement import credit_for
from wwwserve.envs.market.world import lying
from wwwserve.envs.state import DELEGATED, PROBES_REFUSED, PROBES_UNANSWERED

PROBE_TIMEOUT_S = 2.0


@kernel
def probe(w, r, j, directed):
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
        return False
    first_s, token_s = expect(p[j].own, 0.0, q[r].prompt)
    u = 0.0 if directed else uniform(m.dice)
    taken = directed or accept(p[j].terms, first_s, kv_use(w.e[j]), p[j].held, u)
    price = np.int64(round(w.adverts[j, AD_PRICE] * MICRO))
    if directed and price_of(m.pricing, price, np.int64(p[i].known[q[r].klass, CLASS_MAX])) > credit_for(w, i, j):
        price = np.int64(0)  # a router that sees everything stands outside the economy
    amount = price_of(m.pricing, price, np.int64(p[i].known[q[r].klass, CLASS_MAX]))
    if not taken or amount > credit_for(w, i, j) or not lock(w.accounts[i], amount):
        q[r].ready_s = leaves_s + m.rtt_s
        p[i].counts[PROBES_REFUSED] += 1
        on_refused(w.dealings[i, j], w.adverts[j])
        return False
    q[r].price, q[r].locked = price, amount
    q[r].taken_s = leaves_s + m.rtt_s
    q[r].promised_ttft_s = first_s + m.rtt_s
    q[r].promised_tpot_s = token_s
    if lying(w, j):
        q[r].promised_ttft_s = first_s * p[j].lie_load / p[j].lie_speed + m.rtt_s
        q[r].promised_tpot_s = token_s / p[j].lie_speed
    place(w, r, j, leaves_s + 1.5 * m.rtt_s, first_s, token_s)
    add_out(w, r)
    on_sent(w.dealings[i, j], w.adverts[j])
    p[j].guests += 1
    p[i].counts[DELEGATED] += 1
    return True
