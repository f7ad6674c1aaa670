"""A request on its way to a peer, which takes it or does not."""

from wwwserve.agents.decision import affordable
from wwwserve.agents.estimate import expect
from wwwserve.agents.kernel import kernel
from wwwserve.agents.provider import accepted, consider, offer, refused
from wwwserve.envs.market.answers import attempt_failed
from wwwserve.envs.market.engines import appraise, place, scrape
from wwwserve.envs.market.mail import send
from wwwserve.envs.market.reward import expect_value, predict
from wwwserve.envs.market.sessions import cached_at
from wwwserve.envs.market.settlement import escrow
from wwwserve.envs.market.world import claimed_by, count_remote, peers_of
from wwwserve.envs.state import DELEGATED, OFFER, OFFERED, PROBES_REFUSED, PROBES_UNANSWERED, REFUSAL, TIMEOUT, USER

OFFER_TIMEOUT_S = 2.0  # after which a peer that does not answer is given up


@kernel
def send_offer(w, r, j):
    """Offer request r to provider j, which is affordable, with what it can cost in escrow."""
    m, p, q = w.m, w.p, w.q
    i = q[r].origin
    offer(p[i], q, r, j, w.peer_stats[i, j], w.adverts[j])
    escrow(w, r)
    q[r].status = OFFERED
    if q[r].kind == USER:
        q[r].predicted_held = q[r].predicted
        scrape(w, j)
        cached = cached_at(w, j, r)
        first_s, token_s = expect(p[j].own, 0.0, q[r].prompt, cached)
        predict(w, r, j, m.now_s + 0.5 * m.rtt_s, first_s, token_s, cached)
    send(w, r, OFFER, m.now_s + 0.5 * m.rtt_s)


@kernel
def receive_offer(w, r):
    """A provider is offered request r: it takes it, at once and with a promise, or refuses."""
    m, p, q = w.m, w.p, w.q
    j = q[r].executor
    if p[j].online == 0:
        send(w, r, TIMEOUT, q[r].mail_s - 0.5 * m.rtt_s + OFFER_TIMEOUT_S)
        return
    scrape(w, j)
    appraise(w, j)
    cached = cached_at(w, j, r)
    taken, first_s, token_s = consider(p[j], m, q[r].prompt, cached, q[r].longest, q[r].tariff)
    if taken:
        run_for_peer(w, r, first_s, token_s, cached)
    else:
        send(w, r, REFUSAL, q[r].mail_s + 0.5 * m.rtt_s)


@kernel
def run_for_peer(w, r, first_s, token_s, cached):
    """The provider that request r went to runs it, and promises what it expects, or says that it does."""
    m, p, q = w.m, w.p, w.q
    i, j = q[r].origin, q[r].executor
    promise(w, r, j, m.now_s + 0.5 * m.rtt_s, first_s, token_s, cached)
    count_remote(w, j, 1)
    p[i].counts[DELEGATED] += 1
    place(w, r, j, m.now_s)


@kernel
def promise(w, r, j, heard_s, first_s, token_s, cached):
    """The origin of request r hears at `heard_s` what provider j, which expects these times and has `cached` tokens of
    its prompt, promises."""
    first_s, token_s = claimed_by(w, j, first_s, token_s)
    accepted(w.q, r, heard_s, first_s, token_s, cached)


@kernel
def receive_refusal(w, r, answered):
    """The origin of request r hears that it is not taken or, not `answered`, gives up to wait for that."""
    p, q = w.p, w.q
    i, j = q[r].origin, q[r].executor
    p[i].counts[PROBES_REFUSED if answered else PROBES_UNANSWERED] += 1
    refused(p[i], q, r, w.peer_stats[i, j])
    if q[r].kind == USER and w.m.by_decision == 1:
        p[i].effect += q[r].predicted_held - q[r].predicted - q[r].beside
        expect_value(w, r, q[r].predicted_held)
    attempt_failed(w, r)


@kernel
def direct_to(w, r, j):
    """A router that sees everything gives request r to provider j, whether j would take it or not; outside of the
    economy where its origin could not pay."""
    m, p, q = w.m, w.p, w.q
    i = q[r].origin
    scrape(w, j)
    cached = cached_at(w, j, r)
    first_s, token_s = expect(p[j].own, 0.0, q[r].prompt, cached)
    if affordable(m.payment, peers_of(w, i), j, q[r].prompt, q[r].longest):
        offer(p[i], q, r, j, w.peer_stats[i, j], w.adverts[j])
        escrow(w, r)
    else:
        offer(p[i], q, r, j, w.peer_stats[i, j], w.adverts[j])
    if q[r].kind == USER:
        predict(w, r, j, m.now_s + 0.5 * m.rtt_s, first_s, token_s, cached)
    at_s = m.now_s + 0.5 * m.rtt_s
    promise(w, r, j, at_s + 0.5 * m.rtt_s, first_s, token_s, cached)
    count_remote(w, j, 1)
    p[i].counts[DELEGATED] += 1
    place(w, r, j, at_s)
