"""Heads and their candidates, views, and what comes of a decision."""

from wwwserve.agents.decision import FIRST_CANDIDATE, HOLD, LOCAL, may_offer
from wwwserve.agents.estimate import expect
from wwwserve.agents.generator import uniform
from wwwserve.agents.kernel import kernel
from wwwserve.agents.provider import (
    choose_head,
    decide,
    dequeue,
    draw_candidates,
    draw_uniforms,
    has_candidates,
    look_at_tariffs,
)
from wwwserve.agents.view import Views, write_view
from wwwserve.envs.market.duels import new_request
from wwwserve.envs.market.engines import appraise, place, scrape
from wwwserve.envs.market.offers import direct_to, send_offer
from wwwserve.envs.market.reward import charge_wait, predict
from wwwserve.envs.market.sessions import cached_at, look_for_prefixes
from wwwserve.envs.market.world import peers_of, unpaid
from wwwserve.envs.state import COPY, DUELS_STARTED, HOLDS, INVALID, RUN_LOCAL


@kernel
def look(w, i, uniforms):
    """Provider i reads its engine and turns to its head; a new one gets random numbers, and candidates if it has none.
    Returns whether there is something to decide."""
    m, p = w.m, w.p[i]
    if p.held > 0 or p.advert_due == 1:
        scrape(w, i)
        appraise(w, i)
        if p.advert_due == 1:
            look_at_tariffs(p, m, peers_of(w, i), m.now_s, i)
    if choose_head(p, m, w.q):
        if not has_candidates(p, w.q, p.head):
            for j in range(w.serves.size):
                w.serves[j] = j < m.n_providers and j != i and (w.p[j].serves & p.requests) != 0
            draw_candidates(p, m, w.q, p.head, peers_of(w, i), w.serves, m.now_s, w.draw)
        draw_uniforms(p, uniforms)
    return p.head >= 0 or p.advert_due == 1


@kernel
def request_decisions(w, active, uniforms):
    """Mark every provider that has something to decide as active; returns whether there is any."""
    waiting = False
    for i in range(w.m.n_providers):
        if w.touched[i]:
            w.touched[i] = w.p[i].online == 1 and look(w, i, uniforms[i])
        active[i] = w.touched[i]
        waiting = waiting or active[i]
    return waiting


@kernel
def show(w, views, active, everyone):
    """Write what providers see: of everyone, else of those that are active, or have just decided."""
    for i in range(w.m.n_providers):
        if active[i] or w.acted[i] or everyone:
            view = Views(views.nodes[i], views.request[i], views.me[i], views.routes[i])
            if not active[i]:
                scrape(w, i)
            if w.p[i].head >= 0:
                look_for_prefixes(w, i, w.p[i].head)
            peers = peers_of(w, i) if w.p[i].head >= 0 else unpaid(w, i)
            write_view(view, w.p[i], w.m, w.q, peers, w.m.now_s, w.viewing)


@kernel
def act(w, i, route, direct):
    """Carry out provider i's decision on the request at its head."""
    m, q, p = w.m, w.q, w.p[i]
    r = p.head
    if direct >= 0:
        if direct < m.n_providers and w.p[direct].online == 1 and (w.p[direct].serves & p.requests) != 0:
            dequeue(p, q, q[r].klass)
            if direct == i:
                run_here(w, i, r)
            else:
                direct_to(w, r, direct)
            return
        route = -1
    peers = peers_of(w, i)
    done = decide(p, m, q, peers, route, m.now_s)
    if done != route:
        p.counts[INVALID] += 1
    if done == HOLD:
        p.counts[HOLDS] += 1
        if m.by_decision == 1:
            charge_wait(w, i, r)
    elif done == LOCAL:
        run_here(w, i, r)
    else:
        k = done - FIRST_CANDIDATE
        send_offer(w, r, q[r].candidates[k])
        maybe_duel(w, i, r, k)


@kernel
def run_here(w, i, r):
    """Provider i runs request r, taken out of its queue, on its own engine."""
    cached = cached_at(w, i, r)
    first_s, token_s = expect(w.p[i].own, 0.0, w.q[r].prompt, cached)
    predict(w, r, i, w.m.now_s, first_s, token_s, cached)
    place(w, r, i, w.m.now_s)
    w.p[i].counts[RUN_LOCAL] += 1


@kernel
def maybe_duel(w, i, r, chosen):
    """With the market's chance, offer a copy of request r, just offered to candidate `chosen`, to the next one."""
    m, q, p = w.m, w.q, w.p[i]
    if m.duel_probability <= 0.0 or uniform(p.generator) >= m.duel_probability:
        return
    if m.n_duels >= w.d.size or m.n_arrivals + (m.n_duels + 1) * (1 + m.judges) > q.size:
        return  # every duel begun may yet need records for its judges
    peers = peers_of(w, i)
    for k in range(q[r].n_candidates):
        if k == chosen or not may_offer(m.payment, q[r], peers, k):
            continue
        copy = new_request(w, COPY, i, q[r].klass, m.n_duels)
        q[copy].prompt, q[copy].output, q[copy].longest = q[r].prompt, q[r].output, q[r].longest
        q[copy].arrival_s = q[r].arrival_s
        q[copy].leaf = q[r].leaf
        q[r].duel = m.n_duels
        w.d[m.n_duels].first, w.d[m.n_duels].second = r, copy
        m.n_duels += 1
        p.counts[DUELS_STARTED] += 1
        send_offer(w, copy, q[r].candidates[k])
        return
