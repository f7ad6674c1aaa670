"""Duels: a copy of a delegated request goes to a second executor, and judges compare the two answers."""

import numpy as np

from wwwserve.agents.generator import uniform
from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import AD_TARIFF, DUELS_LOST, DUELS_WON
from wwwserve.agents.protocol import (
    A_WINS,
    MICRO,
    STAKED,
    TARIFF_SIZE,
    TIE,
    VOTE_SILENT,
    VOTE_UNDECIDED,
    draw_by_stake,
    lock,
    settle_duel,
    vote_of,
)
from wwwserve.agents.provider import end_attempt, is_out, price_for
from wwwserve.agents.tariff import in_micro
from wwwserve.envs.engine import abort
from wwwserve.envs.market.engines import place
from wwwserve.envs.market.mail import forget
from wwwserve.envs.market.settlement import pay
from wwwserve.envs.market.world import cache_of, count_remote, set_wake
from wwwserve.envs.state import (
    DUELS_SETTLED,
    DUELS_VOID,
    FAILED,
    IN_ENGINE,
    JUDGED,
    JUDGEMENT,
    LOST,
)

JUDGE_TOKENS = 16  # a judge's answer


@kernel
def new_request(w, kind, o, klass, duel):
    """A record for a request that no user made."""
    r = w.m.used
    w.m.used += 1
    w.q[r].kind = kind
    w.q[r].origin = o
    w.q[r].klass = klass
    w.q[r].duel = duel
    w.q[r].arrival_s = w.m.now_s
    return r


@kernel
def void_duel(w, k):
    """Duel k will have no verdict."""
    if w.d[k].void == 0:
        w.d[k].void = 1
        w.p[w.q[w.d[k].first].origin].counts[DUELS_VOID] += 1


@kernel
def start_judging(w, k):
    """Both answers of duel k are in: draw judges by stake and put the question to their engines."""
    m, q, p, duel = w.m, w.q, w.p, w.d[k]
    a, b = duel.first, duel.second
    o = q[a].origin
    for j in range(w.draw.stake.size):
        others = j < m.n_providers and j != o and j != q[a].executor and j != q[b].executor
        w.draw.eligible[j] = others and p[j].online == 1
        w.draw.stake[j] = w.accounts[j, STAKED]
    count = draw_by_stake(w.draw.stake, w.draw.eligible, m.judges, m.generator, duel.judges)
    judges = 0
    for s in range(count):
        j = duel.judges[s]
        r = m.used
        for t in range(TARIFF_SIZE):
            q[r].tariff[t] = in_micro(w.adverts[j, AD_TARIFF + t])
        q[r].prompt = q[a].prompt + q[a].output + q[b].output
        fee = price_for(m, q[r], JUDGE_TOKENS)
        if not lock(w.accounts[o], fee):
            break
        new_request(w, JUDGEMENT, o, judges, k)
        q[r].output = JUDGE_TOKENS
        q[r].locked = fee
        duel.judges[judges] = j
        duel.votes[judges] = VOTE_SILENT
        place(w, r, j, m.now_s + 0.5 * m.rtt_s)
        judges += 1
    duel.n_judges = duel.pending = judges
    if judges == 0:
        void_duel(w, k)


@kernel
def hear_judge(w, r, answered):
    """A judge of a duel has voted, or will not; with the last of them the duel is settled."""
    q, k = w.q, w.q[r].duel
    duel = w.d[k]
    o, j = q[r].origin, q[r].executor
    a, b = q[duel.first].executor, q[duel.second].executor
    if answered:
        duel.votes[q[r].klass] = vote_of(w.p[a].strength, w.p[b].strength, uniform(w.m.generator))
        w.p[j].counts[JUDGED] += 1
    pay(w, r, price_for(w.m, q[r], q[r].output) if answered else 0)
    duel.pending -= 1
    if duel.pending > 0:
        return
    for x in range(w.m.n_providers):
        w.p[x].transfers -= w.accounts[x, STAKED] / MICRO
    outcome = settle_duel(w.accounts, a, b, duel.judges[: duel.n_judges], duel.votes[: duel.n_judges])
    for x in range(w.m.n_providers):
        w.p[x].transfers += w.accounts[x, STAKED] / MICRO
    w.p[o].counts[DUELS_SETTLED] += 1
    if outcome != TIE:
        winner, loser = (a, b) if outcome == A_WINS else (b, a)
        w.peer_stats[o, winner, DUELS_WON] += 1.0
        w.peer_stats[o, loser, DUELS_LOST] += 1.0


@kernel
def withdraw_out(w, r):
    """The origin of request r, which is with a peer or on its way, wants it no longer, and pays nothing."""
    q = w.q
    i, j = q[r].origin, q[r].executor
    if q[r].status == IN_ENGINE:
        abort(w.e[j], cache_of(w, j), q, r)
        count_remote(w, j, -1)
        set_wake(w, j)
    elif q[r].status == LOST:
        w.m.lost -= 1
    forget(w, r)
    end_attempt(w.p[i], q, r, w.peer_stats[i, j])
    pay(w, r, 0)
    q[r].status = FAILED


@kernel
def end_duels(w):
    """The market ends: attempts whose users have an answer are withdrawn, judges still at work leave it undecided."""
    m, q = w.m, w.q
    for k in range(m.n_duels):
        duel = w.d[k]
        if duel.ended == 2:
            continue
        void_duel(w, k)
        for r in (duel.first, duel.second):
            if is_out(w.p[q[r].origin], q, r) and q[r].duel == k and not np.isnan(q[duel.first].answer_s):
                withdraw_out(w, r)
    for r in range(m.n_arrivals, m.used):
        if q[r].kind == JUDGEMENT and q[r].status == IN_ENGINE:
            abort(w.e[q[r].executor], cache_of(w, q[r].executor), q, r)
            q[r].status = FAILED
            w.d[q[r].duel].votes[q[r].klass] = VOTE_UNDECIDED
            hear_judge(w, r, False)
