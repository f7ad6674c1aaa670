"""Users' requests, and providers that join and leave."""

from wwwserve.agents.kernel import kernel
from wwwserve.envs.engine import abort
from wwwserve.envs.market.answers import fail_user, vacate
from wwwserve.envs.market.duels import void_duel
from wwwserve.envs.market.queues import dequeue
from wwwserve.envs.market.settlement import end_leg
from wwwserve.envs.market.world import scrape
from wwwserve.envs.state import FAILED, IN_ENGINE, LOST, MAX_WINDOWS, USER


@kernel
def go_offline(w, i):
    """Provider i leaves without a word: its users' requests fail, here and with peers, where their work is dropped."""
    p, q = w.p[i], w.q
    vacate(w, i)
    for c in range(w.m.n_classes):
        while p.held_head[c] >= 0:
            fail_user(w, dequeue(w, i, c))
    while p.out_head >= 0:
        r = p.out_head
        if q[r].status == IN_ENGINE:
            abort(w.e[q[r].executor], q, r)
            scrape(w, q[r].executor)
        end_leg(w, r)
        q[r].status = FAILED
        if q[r].duel >= 0:
            void_duel(w, q[r].duel)
        u = r if q[r].kind == USER else w.d[q[r].duel].first
        if q[u].status != IN_ENGINE and q[u].status != LOST:  # else it is in the list too, and still to be withdrawn
            fail_user(w, u)
    p.online = 0
    p.head = -1
    p.advert_due = 0
    p.arrival_rate = 0.0
    scrape(w, i)


@kernel
def is_scheduled(p, now_s):
    for k in range(MAX_WINDOWS):
        if p.windows[k, 0] <= now_s < p.windows[k, 1]:
            return True
    return False
