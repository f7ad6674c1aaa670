"""The step of a market, and its time.

A step carries out one decision of every active provider, then moves time on to the next instant at which there
is something to decide: a request arrives, a refusal or an answer comes back, a tick opens what is held, an advert is
due. Events of one instant happen in this order: engines, what was on its way, arrivals, the tick.
"""

import numpy as np

from wwwserve.agents.decision import Actions
from wwwserve.agents.kernel import kernel
from wwwserve.agents.provider import gossip, move_own_stake, set_admission, tick
from wwwserve.agents.view import Views
from wwwserve.envs.engine import advance
from wwwserve.envs.market.answers import finish, look_at_streams, receive_answer, send_streams
from wwwserve.envs.market.arrivals import go_offline, is_scheduled, publish, receive_advert, receive_arrivals
from wwwserve.envs.market.decisions import act, request_decisions, show
from wwwserve.envs.market.duels import end_duels
from wwwserve.envs.market.engines import scrape
from wwwserve.envs.market.mail import take
from wwwserve.envs.market.offers import receive_offer, receive_refusal
from wwwserve.envs.market.reward import pay_step
from wwwserve.envs.market.world import cache_of, set_wake, world_of
from wwwserve.envs.state import ANSWER, NOTHING, OFFER, REFUSAL


@kernel
def start(w, views, active, uniforms):
    """Bring a fresh market to its first decision, on markups."""
    for i in range(w.m.n_providers):
        if is_scheduled(w.p[i], 0.0):
            w.p[i].online = 1
            scrape(w, i)
            w.p[i].advert_due = 1
        w.touched[i] = True
        set_wake(w, i)
    request_decisions(w, active, uniforms)
    show(w, views, active, True)


@kernel
def step(w, actions, views, active, uniforms, reward, given):
    """One step of a market that is not over, all arrays those of its providers [N, ...]. `reward` receives what the
    step paid, `given` what of it the arrivals brought, whatever was decided; `views`, `active`, `uniforms` what is
    next."""
    m, p = w.m, w.p
    for i in range(m.n_providers):
        w.before[i] = p[i].potential
        p[i].flow = p[i].transfers = p[i].arrived = p[i].effect = 0.0
    for i in range(m.n_providers):
        w.acted[i] = active[i]
        if active[i]:
            set_admission(p[i], actions.admission[i], actions.markup[i])
            if p[i].head >= 0:
                act(w, i, actions.route[i], actions.direct[i])
            if p[i].advert_due == 1:
                publish(w, i)
    m.steps += 1
    began_s, ticks = m.now_s, m.ticks
    while not request_decisions(w, active, uniforms) and m.over == 0:
        pass_time(w)
    if m.over == 1:
        active[:] = False
    m.elapsed_s = m.now_s - began_s
    show(w, views, active, m.ticks > ticks)  # who has nothing to decide is shown its node at ticks
    pay_step(w, reward, given)


@kernel
def pass_time(w):
    """Move to the next event, and through all that happens at that instant."""
    m, p, q = w.m, w.p, w.q
    tick_s = (m.ticks + 1) * m.tick_s
    now_s = tick_s
    if m.next_arrival < m.n_timed:
        now_s = min(now_s, q[m.next_arrival].arrival_s)
    if m.n_turns > 0:
        now_s = min(now_s, q[w.turns[0]].arrival_s)
    if m.mail_head >= 0:
        now_s = min(now_s, q[m.mail_head].mail_s)
    for i in range(m.n_providers):
        now_s = min(now_s, w.wake_s[i])
    if m.streams_sent == m.ticks and m.remote > 0:  # what is out half a round trip before the tick is there by then
        now_s = min(now_s, tick_s - 0.5 * m.rtt_s)
    m.now_s = now_s = max(now_s, m.now_s)
    for i in range(m.n_providers):
        if w.wake_s[i] <= now_s:
            if w.e[i].wake_s <= now_s:
                run_engine(w, i)
            if p[i].advert_lands_s <= now_s:
                receive_advert(w, i)
    if m.streams_sent == m.ticks and now_s >= tick_s - 0.5 * m.rtt_s:
        m.streams_sent += 1
        for i in range(m.n_providers):
            if p[i].remote > 0:
                scrape(w, i)
                send_streams(w, i)
    while m.mail_head >= 0 and q[m.mail_head].mail_s <= now_s:
        r = take(w)
        mail = q[r].mail
        q[r].mail = NOTHING
        if mail == OFFER:
            receive_offer(w, r)
        elif mail == ANSWER:
            receive_answer(w, r)
        else:
            receive_refusal(w, r, mail == REFUSAL)
    receive_arrivals(w)
    if now_s >= tick_s:
        pass_tick(w)
        if now_s >= m.duration_s and (m.unresolved == 0 or now_s >= m.duration_s + m.drain_s - 1e-9):
            end(w)


@kernel
def run_engine(w, i):
    """Run provider i's engine up to now."""
    e = w.e[i]
    n_done = advance(e, cache_of(w, i), w.q, w.m.now_s, w.done, 0)
    set_wake(w, i)
    for k in range(n_done):
        finish(w, w.done[k])


@kernel
def pass_tick(w):
    """Providers join and leave, look at their engines and at what is out, move their stake; what is held is open."""
    m, p = w.m, w.p
    m.ticks += 1
    for i in range(m.n_providers):
        scheduled = is_scheduled(p[i], m.now_s)
        if p[i].online == 1 and not scheduled:
            go_offline(w, i)
        elif p[i].online == 0 and scheduled:
            p[i].online = 1
            p[i].next_gossip_s = m.now_s
        if p[i].online == 1:
            scrape(w, i)
    for i in range(m.n_providers):
        if p[i].online == 1:
            look_at_streams(w, i)
            if m.stake_follows_load == 1:
                move_own_stake(p[i], w.accounts[i], m.tick_s)
            if p[i].advert_lands_s == np.inf:  # of a provider one advert at a time is on its way
                gossip(p[i], m, m.now_s)
        tick(p[i], m.tick_s)
        w.touched[i] = True


@kernel
def end(w):
    """The market is over; what is not done by now counts as missed."""
    end_duels(w)
    w.m.over = 1
    for i in range(w.m.n_providers):
        w.p[i].potential = 0.0
        w.p[i].arrived = 0.0


@kernel
def step_range(markets, low, high, actions, views, active, uniforms, reward, given):
    """Step the markets `low` to `high` that are not over. Each market is stepped in a call of its own."""
    for b in range(low, high):
        reward[b] = 0.0
        given[b] = 0.0
        if markets.market[b].over == 0:
            step(
                world_of(markets, b),
                Actions(actions.route[b], actions.admission[b], actions.markup[b], actions.direct[b]),
                Views(views.nodes[b], views.request[b], views.me[b], views.routes[b]),
                active[b], uniforms[b], reward[b], given[b],
            )  # fmt: skip
        else:
            markets.market[b].elapsed_s = 0.0


@kernel
def start_market(markets, b, views, active, uniforms):
    """Bring market `b`, just written, to its first decision."""
    start(
        world_of(markets, b), Views(views.nodes[b], views.request[b], views.me[b], views.routes[b]), active[b],
        uniforms[b],
    )  # fmt: skip
