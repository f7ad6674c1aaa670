"""What providers are paid by, see `envs.state.Reward`: value predicted when a request is placed, and delivered."""

from wwwserve.agents.classes import CLASS_VALUE
from wwwserve.agents.estimate import chance_on_time, expect, prefill_delay_s
from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import AD_MEAN_OUTPUT, AD_PER_KV_TOKEN_S, AD_PER_SEQ_S, AD_WEIGHT_S
from wwwserve.agents.protocol import LATENESS, MICRO, price_of
from wwwserve.agents.provider import price_for, promised_duration_s
from wwwserve.agents.tariff import cost_of, on_time_by, payment_lost_per_s, share_paid
from wwwserve.envs.engine import tokens_out
from wwwserve.envs.market.world import claimed_by
from wwwserve.envs.state import USER

PREDICTION_SIGMA = 0.2  # how sure the reward's prediction is of its own estimate, in log time


@kernel
def expect_value(w, u, value):
    """Count user request u with this value in its origin's potential."""
    w.p[w.q[u].origin].potential += value - w.q[u].predicted
    w.q[u].predicted = value


@kernel
def reprice(w, i, j, token_s, delay_s):
    """Predict anew the value of what runs on engine j, which is held up for `delay_s` and then decodes at `token_s`
    once it takes provider i's request.

    Returns what that does, in credits: to the value of provider i's own requests there, of provider j's own, of
    others', and to what is paid to j. What happened since they were last predicted is not counted.
    """
    m, q, e = w.m, w.q, w.e[j]
    _, now_token_s = expect(w.p[j].own, -1.0, 0.0, 0.0)
    mine, host, others, paid = 0.0, 0.0, 0.0, 0.0
    for k in range(e.running):
        r = e.slots[k]
        if q[r].kind != USER:
            continue
        o, c = q[r].origin, q[r].klass
        left = max(1.0, float(q[r].output - tokens_out(e, q, r)))
        left_now_s, left_then_s = left * now_token_s, delay_s + left * token_s
        before, after = 0.0, 0.0
        for t in range(m.n_deadlines):
            due_s = q[r].arrival_s + m.deadlines[c, t] - m.now_s
            before += on_time_by(due_s, left_now_s)
            after += on_time_by(due_s, left_then_s)
        worth = w.p[o].known[c, CLASS_VALUE] / m.n_deadlines
        before, after = worth * before, worth * after
        if o == i:
            mine += after - before
        elif o == j:
            host += after - before
        else:
            others += after - before
        if o != j and m.payment == LATENESS:
            price = price_for(m, q[r], q[r].output) / MICRO
            promised_s = promised_duration_s(q[r], q[r].output)
            expected_s = m.now_s - q[r].taken_s + left_now_s
            paid -= payment_lost_per_s(price, promised_s, max(expected_s, 1e-3)) * (left_then_s - left_now_s)
        expect_value(w, r, after)
    return mine, host, others, paid


@kernel
def predict(w, r, j, at_s, first_s, token_s, cached):
    """Count user request r, which starts at `at_s` on engine j, with its predicted value in its origin's potential;
    `cached` tokens of its prompt are in the prefix cache there.

    By decision, its origin is credited with that, and with what the placement does otherwise: to all that runs there,
    to own users who are yet to come there, in compute and in payment; what is not its own counts with `team_weight`.
    The prediction knows the request's true output length; it serves the reward alone, no view shows it.
    """
    m, q = w.m, w.q
    o, c = q[r].origin, q[r].klass
    deadlines = m.deadlines[c][: m.n_deadlines]
    chance = chance_on_time(
        deadlines, at_s - q[r].arrival_s, first_s, token_s, float(q[r].output), PREDICTION_SIGMA, 1e9
    )
    value = w.p[o].known[c, CLASS_VALUE] * chance
    w.p[o].effect += value - q[r].predicted
    expect_value(w, r, value)
    if m.by_decision == 0:
        return
    host = w.p[j]
    uncached = float(q[r].prompt) - cached
    delay_s = prefill_delay_s(host.own, uncached, float(cached), uncached)
    mine, hosts, others, paid = reprice(w, o, j, token_s, delay_s)
    here = cost_of(host.compute, q[r].prompt, cached, q[r].output)
    if m.count_future == 1:
        here += host.future * q[r].output / max(1.0, host.own[AD_MEAN_OUTPUT])
    team = m.team_weight
    if j == o:
        q[r].beside = mine - here + team * others + (1.0 - team) * paid
    else:
        promised_first_s, promised_token_s = claimed_by(w, j, first_s, token_s)
        price = price_of(m.payment, q[r].tariff, q[r].prompt, cached, q[r].output) / MICRO
        if m.payment == LATENESS:
            promised_s = min(promised_first_s, q[r].shown_ttft_s)
            promised_s += min(promised_token_s, q[r].shown_tpot_s) * (q[r].output - 1)
            price *= share_paid(promised_s, first_s + token_s * (q[r].output - 1))
        q[r].beside = mine + team * (hosts + others - here) - (1.0 - team) * price
    w.p[o].effect += q[r].beside


@kernel
def charge_wait(w, i, r):
    """Charge provider i for what the wait of its request r made impossible.

    A held request is worth no more than if it began at once, alone on the own engine. Were only its placement charged,
    to put that off would be worth its discount.
    """
    m, q, own = w.m, w.q, w.p[i].own
    context = q[r].prompt + 0.5 * q[r].output
    token_s = own[AD_WEIGHT_S] + own[AD_PER_SEQ_S] + own[AD_PER_KV_TOKEN_S] * context
    deadlines = m.deadlines[q[r].klass][: m.n_deadlines]
    waited_s = m.now_s - q[r].arrival_s
    chance = chance_on_time(deadlines, waited_s, 0.0, token_s, float(q[r].output), PREDICTION_SIGMA, 1e9)
    best = w.p[i].known[q[r].klass, CLASS_VALUE] * chance
    if best < q[r].predicted:
        w.p[i].effect += best - q[r].predicted
        expect_value(w, r, best)


@kernel
def pay_step(w, reward, given):
    """What the step paid to each provider, and what of it the arrivals brought; see `envs.state.Reward`."""
    m, p, before = w.m, w.p, w.before
    n = m.n_providers
    discount = m.gamma**m.elapsed_s if m.dense == 1 else 0.0
    mean = 0.0
    mean_given = 0.0
    for i in range(n):
        p[i].profit += p[i].flow + p[i].transfers
        if m.by_decision == 1:
            reward[i] = p[i].effect
            continue
        transfers = p[i].transfers if m.count_transfers == 1 else 0.0
        before[i] = p[i].flow + transfers + (discount * p[i].potential - before[i] if m.dense == 1 else 0.0)
        mean += before[i] / n
        mean_given += discount * p[i].arrived / n
    if m.by_decision == 0:
        for i in range(n):
            reward[i] = (1.0 - m.team_weight) * before[i] + m.team_weight * mean
            given[i] = (1.0 - m.team_weight) * discount * p[i].arrived + m.team_weight * mean_given
