"""Time: ticks, rounds of decisions, and the step of a market."""

from wwwserve.agents.decision import TERMS_SIZE
from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import RATE_WINDOW_S, aged_rate
from wwwserve.agents.protocol import move_stake, stake_target
from wwwserve.agents.view import CLASS_VALUE
from wwwserve.envs.engine import advance, kv_use
from wwwserve.envs.market.answers import complete, fail_user, refresh_progress
from wwwserve.envs.market.arrivals import go_offline, is_scheduled
from wwwserve.envs.market.decisions import ask, decide, write_view
from wwwserve.envs.market.duels import end_duels
from wwwserve.envs.market.engines import clip_length
from wwwserve.envs.market.queues import enqueue
from wwwserve.envs.market.reward import expect_value, pay
from wwwserve.envs.market.world import publish, scrape, world_of
from wwwserve.envs.state import OWN_ARRIVED


@kernel
def tick(w):
    """Move the market to its next tick: joins, departures, engines, arrivals, stake, gossip."""
    m, p, q, e = w.m, w.p, w.q, w.e
    m.now_s += m.interval_s
    now_s = m.now_s
    n = m.n_providers
    for i in range(n):
        n_done = advance(e[i], q, now_s, w.done, 0)
        for k in range(n_done):
            complete(w, w.done[k])
    for i in range(n):
        scheduled = is_scheduled(p[i], now_s)
        if p[i].online == 1 and not scheduled:
            go_offline(w, i)
        elif p[i].online == 0 and scheduled:
            p[i].online = 1
            p[i].next_gossip_s = now_s
        if p[i].online == 1:
            scrape(w, i)
        p[i].arrival_rate = aged_rate(p[i].arrival_rate, m.interval_s)
    while m.next_arrival < m.n_arrivals and q[m.next_arrival].arrival_s <= now_s:
        r = m.next_arrival
        i = q[r].origin
        m.next_arrival += 1
        p[i].counts[OWN_ARRIVED] += 1
        p[i].arrival_rate += 1.0 / RATE_WINDOW_S
        clip_length(w, r, i)
        if p[i].online == 1:
            value = p[i].known[q[r].klass, CLASS_VALUE]
            expect_value(w, r, value)
            p[i].arrived += value
            enqueue(w, r, False)
        else:  # it came in the last interval before the provider left
            fail_user(w, r)
    for i in range(n):
        for c in range(m.n_classes):
            p[i].closed[c] = 0
        if p[i].online == 1:
            if m.stake_follows_load == 1:
                target = stake_target(kv_use(e[i]), e[i].waiting, p[i].held)
                move_stake(w.accounts[i], target, m.interval_s)
            if now_s >= p[i].next_gossip_s - 1e-9:
                refresh_progress(w, i)
                p[i].advert_due = 1
                p[i].next_gossip_s += m.gossip_s


@kernel
def start(w, nodes, request, me, routes, active, dice):
    """Bring a fresh market to its first decision."""
    m, p = w.m, w.p
    for i in range(m.n_providers):
        if is_scheduled(p[i], 0.0):
            p[i].online = 1
            scrape(w, i)
            p[i].advert_due = 1  # the first step is for prices and terms
    show(w, nodes, request, me, routes, active, dice, True)


@kernel
def show(w, nodes, request, me, routes, active, dice, fresh):
    """Ask every provider that has something to decide; returns whether a request is among it."""
    undecided = False
    for i in range(active.size):
        asked_before = active[i]
        active[i] = False
        if i >= w.m.n_providers or w.p[i].online == 0:
            if fresh and i < w.m.n_providers:
                write_view(w, i, nodes[i], request[i], me[i], routes[i])
            continue
        has_request = ask(w, i, dice[i], fresh)
        undecided = undecided or has_request
        active[i] = has_request or w.p[i].advert_due == 1
        if active[i] or asked_before or fresh:  # one that has decided no longer sees its request
            write_view(w, i, nodes[i], request[i], me[i], routes[i])
    return undecided


@kernel
def step(w, route, terms, price, direct, nodes, request, me, routes, active, dice, reward, given):
    """One step of a market that is not over: decisions, then the next round at this instant or the next tick.

    route, price, direct [N], terms [N, TERMS_SIZE]; reward [N] receives what the step paid, given [N]
    what of it the arrivals brought, whatever is decided; the others the next views.
    """
    m, p = w.m, w.p
    n = m.n_providers
    before = w.before
    for i in range(n):
        before[i] = p[i].potential
        p[i].flow = 0.0
        p[i].transfers = 0.0
        p[i].arrived = 0.0
        p[i].effect = 0.0
    for k in range(n):
        i = (k + m.steps) % n
        if not active[i]:
            continue
        for t in range(TERMS_SIZE):
            p[i].terms[t] = terms[i, t]
        if p[i].advert_due == 1:
            p[i].price = m.prices[min(max(price[i], 0), m.n_prices - 1)]
        if p[i].head >= 0:
            decide(w, i, route[i], direct[i])
    for i in range(n):
        if p[i].advert_due == 1:
            p[i].advert_due = 0
            publish(w, i)
    m.steps += 1
    m.elapsed_s = 0.0
    if not show(w, nodes, request, me, routes, active, dice, False):
        m.elapsed_s = m.interval_s
        tick(w)
        show(w, nodes, request, me, routes, active, dice, True)
    if m.now_s >= m.duration_s and (m.unresolved == 0 or m.now_s >= m.duration_s + m.drain_s - 1e-9):
        end_duels(w)
        m.over = 1
        for i in range(n):
            active[i] = False
            p[i].potential = 0.0  # what is not done by now counts as missed
            p[i].arrived = 0.0

    pay(w, reward, given)


@kernel
def step_range(markets, low, high, actions, views, active, dice, reward, given):
    """Step the markets `low` to `high` that are not over. Each market is stepped in a call of its own."""
    for b in range(low, high):
        reward[b] = 0.0
        given[b] = 0.0
        if markets.market[b].over == 0:
            step(
                world_of(markets, b), actions.route[b], actions.terms[b], actions.price[b], actions.direct[b],
                views.nodes[b], views.request[b], views.me[b], views.routes[b], active[b], dice[b], reward[b],
                given[b],
            )  # fmt: skip
        else:
            markets.market[b].elapsed_s = 0.0


@kernel
def start_market(markets, b, views, active, dice):
    """Bring market `b`, just written, to its first decision."""
    start(world_of(markets, b), views.nodes[b], views.request[b], views.me[b], views.routes[b], active[b], dice[b])
