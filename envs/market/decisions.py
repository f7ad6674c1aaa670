"""Heads and candidates, views, and what a decision comes to."""

from wwwserve.agents.decision import CANDIDATES, FIRST_CANDIDATE, HOLD, may_hold
from wwwserve.agents.dice import uniform
from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import AD_STAKE, AD_TIME_S, silent_after_s
from wwwserve.agents.protocol import FREE, draw_by_stake
from wwwserve.agents.view import CLASS_LAST_DEADLINE_S, write_idle_view, write_request_view, write_self
from wwwserve.envs.market.duels import maybe_duel
from wwwserve.envs.market.engines import place_local
from wwwserve.envs.market.offers import probe
from wwwserve.envs.market.queues import dequeue, enqueue, next_head
from wwwserve.envs.market.reward import charge_wait
from wwwserve.envs.market.settlement import affords
from wwwserve.envs.state import HOLDS, INVALID, NO_BOUND


@kernel
def decide(w, i, route, direct):
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
            dequeue(w, i, c)
            place_local(w, i, r)
            return
        else:
            dequeue(w, i, c)
            if not probe(w, r, direct, True):
                enqueue(w, r, True)
                p.closed[c] = 1
            return
        route = HOLD
    elif route >= FIRST_CANDIDATE:
        k = route - FIRST_CANDIDATE
        if k < p.n_candidates and (p.refused >> k) & 1 == 0 and affords(w, i, p.candidates[k], c):
            dequeue(w, i, c)
            if probe(w, r, p.candidates[k], False):
                maybe_duel(w, i, r, k)
            else:
                enqueue(w, r, True)
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
            charge_wait(w, i, r)
        p.closed[c] = 1
        p.counts[HOLDS] += 1
        return
    dequeue(w, i, c)
    place_local(w, i, r)


@kernel
def draw_candidates(w, i):
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
def ask(w, i, dice, fresh):
    """Set provider i's head; a new one gets candidates and dice. Returns whether there is one."""
    p = w.p[i]
    r = next_head(w, i)
    if r >= 0 and (fresh or r != p.head):
        draw_candidates(w, i)
        for k in range(dice.size):
            dice[k] = uniform(w.m.dice)
    p.head = r
    return r >= 0


@kernel
def write_view(w, i, nodes, request, me, routes):
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
                if not affords(w, i, p.candidates[k], c):
                    routes[FIRST_CANDIDATE + k] = 0
    else:
        write_idle_view(nodes, request, routes, p.own, m.now_s)
    write_self(me, p.head >= 0, p.advert_due == 1, p.held, p.arrival_rate, p.guests, w.accounts[i, FREE], p.price)
