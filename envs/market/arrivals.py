"""Users' requests, providers that join and leave, and adverts."""

import numpy as np

from wwwserve.agents.classes import CLASS_VALUE
from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import AD_KV_CAPACITY, AD_WEIGHT_S, misreport_load
from wwwserve.agents.protocol import STAKED
from wwwserve.agents.provider import advertise, arrive, count_arrival, dequeue, leave
from wwwserve.envs.market.answers import fail_user, under_way, user_of, vacate
from wwwserve.envs.market.duels import void_duel, withdraw_out
from wwwserve.envs.market.engines import clip_length, scrape
from wwwserve.envs.market.reward import expect_value
from wwwserve.envs.market.sessions import end_session, take_turn
from wwwserve.envs.market.world import lying, set_wake
from wwwserve.envs.scenario import MAX_WINDOWS
from wwwserve.envs.state import HELD, OWN_ARRIVED


@kernel
def receive_arrivals(w):
    """Hand over the users' requests that are due."""
    m, p, q = w.m, w.p, w.q
    while m.next_arrival < m.n_timed and q[m.next_arrival].arrival_s <= m.now_s:
        r = m.next_arrival
        m.next_arrival += 1
        if p[q[r].origin].online == 1:
            receive_arrival(w, r)
        else:  # it came before the tick at which the provider joins
            p[q[r].origin].counts[OWN_ARRIVED] += 1
            count_arrival(p[q[r].origin], q[r].klass)
            fail_user(w, r)
    while m.n_turns > 0 and q[w.turns[0]].arrival_s <= m.now_s:
        r = take_turn(w)
        if p[q[r].origin].online == 1:
            receive_arrival(w, r)
        else:
            q[r].arrival_s = np.inf
            end_session(w, r)


@kernel
def receive_arrival(w, r):
    """A user's request is there, and its provider online."""
    p, q = w.p, w.q
    i = q[r].origin
    p[i].counts[OWN_ARRIVED] += 1
    clip_length(w, r, i)
    value = p[i].known[q[r].klass, CLASS_VALUE]
    expect_value(w, r, value)
    p[i].arrived += value
    q[r].status = HELD
    arrive(p[i], q, r)
    w.touched[i] = True


@kernel
def publish(w, i):
    """Send provider i's advert to everyone, its load and speed misreported if it lies."""
    p, advert = w.p[i], w.sent_adverts[i]
    advertise(p, w.accounts[i, STAKED], w.m.now_s, advert)
    if lying(w, i):
        misreport_load(advert, p.lie_load)
        for k in range(AD_WEIGHT_S, AD_KV_CAPACITY):
            advert[k] /= p.lie_speed
    p.advert_lands_s = w.m.now_s + 0.5 * w.m.rtt_s
    set_wake(w, i)


@kernel
def receive_advert(w, i):
    """Provider i's advert is there, everywhere at once."""
    for k in range(w.adverts.shape[1]):
        w.adverts[i, k] = w.sent_adverts[i, k]
    w.p[i].advert_lands_s = np.inf
    set_wake(w, i)


@kernel
def is_scheduled(p, now_s):
    """Whether a provider is to be online."""
    for k in range(MAX_WINDOWS):
        if p.windows[k, 0] <= now_s < p.windows[k, 1]:
            return True
    return False


@kernel
def go_offline(w, i):
    """Provider i leaves without a word: its users' requests fail, here and with peers, where their work is dropped."""
    p, q = w.p[i], w.q
    vacate(w, i)
    for c in range(w.m.n_classes):
        while p.held_head[c] >= 0:
            fail_user(w, dequeue(p, q, c))
    while p.out_head >= 0:
        r = p.out_head
        j = q[r].executor
        withdraw_out(w, r)
        scrape(w, j)
        if q[r].duel >= 0:
            void_duel(w, q[r].duel)
        u = user_of(w, r)
        if not under_way(q[u].status):  # else it is in the list too, and still to be withdrawn
            fail_user(w, u)
    p.online = 0
    leave(p)
    scrape(w, i)
