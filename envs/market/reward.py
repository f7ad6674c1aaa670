"""What providers are paid by, see `envs.state.Reward`: value predicted when a request is placed, and delivered."""

from wwwserve.agents.estimate import chance_on_time, expect
from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import AD_PER_KV_TOKEN_S, AD_PER_SEQ_S, AD_WEIGHT_S
from wwwserve.agents.view import CLASS_VALUE
from wwwserve.envs.engine import tokens_out
from wwwserve.envs.state import USER

PREDICTION_SIGMA = 0.2  # how sure the reward's prediction is of its own estimate, in log time


@kernel
def expect_value(w, u, value):
    """Count user request u with this value in its origin's potential."""
    w.p[w.q[u].origin].potential += value - w.q[u].predicted
    w.q[u].predicted = value


@kernel
def in_time(left_s, expected_s):
    """Chance that what is expected to take `expected_s` is done within `left_s`: `chance_on_time` for one deadline and
    a known length, of log-logistic error with shape 8, the tails beyond a factor of 3 cut off."""
    if left_s >= 3.0 * expected_s:
        return 1.0
    if 3.0 * left_s <= expected_s:
        return 0.0
    ratio = expected_s / left_s
    fourth = ratio * ratio * ratio * ratio  # shape 1.702 / PREDICTION_SIGMA is 8.5; a power of two takes no logarithm
    return 1.0 / (1.0 + fourth * fourth)


@kernel
def reprice(w, i, j, token_s):
    """Predict anew the value of what runs on engine j, which decodes at `token_s` once it takes provider i's request.

    What the change of pace does to the requests that run there is credited to provider i; what happened since they were
    last predicted is not.
    """
    m, q, e = w.m, w.q, w.e[j]
    _, now_token_s = expect(w.p[j].own, -1.0, 0.0)
    for k in range(e.running):
        r = e.slots[k]
        if q[r].kind != USER:
            continue
        o, c = q[r].origin, q[r].klass
        left = max(1.0, float(q[r].output - tokens_out(e, q, r)))
        before, after = 0.0, 0.0
        for t in range(m.n_deadlines):
            left_s = q[r].arrival_s + m.deadlines[c, t] - m.now_s
            before += in_time(left_s, left * now_token_s)
            after += in_time(left_s, left * token_s)
        worth = w.p[o].known[c, CLASS_VALUE] / m.n_deadlines
        before, after = worth * before, worth * after
        w.p[i].effect += (1.0 if o == i else m.team_weight) * (after - before)
        expect_value(w, r, after)


@kernel
def predict(w, r, j, at_s, first_s, token_s):
    """Count user request r, which starts at `at_s` on engine j, with its predicted value in its origin's potential.

    The prediction knows the request's true output length; it serves the reward alone, no view shows it.
    """
    m, q = w.m, w.q
    o, c = q[r].origin, q[r].klass
    if m.by_decision == 1:
        q[r].beside = w.p[o].effect
        reprice(w, o, j, token_s)
        q[r].beside -= w.p[o].effect
    deadlines = m.deadlines[c][: m.n_deadlines]
    chance = chance_on_time(
        deadlines, at_s - q[r].arrival_s, first_s, token_s, float(q[r].output), PREDICTION_SIGMA, 1e9
    )
    value = w.p[o].known[c, CLASS_VALUE] * chance
    w.p[o].effect += value - q[r].predicted
    expect_value(w, r, value)


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
        transfers = p[i].transfers if m.count_transfers == 1 else 0.0
        if m.by_decision == 1:
            reward[i] = p[i].effect + (1.0 - m.team_weight) * transfers
            continue
        before[i] = p[i].flow + transfers + (discount * p[i].potential - before[i] if m.dense == 1 else 0.0)
        mean += before[i] / n
        mean_given += discount * p[i].arrived / n
    if m.by_decision == 0:
        for i in range(n):
            reward[i] = (1.0 - m.team_weight) * before[i] + m.team_weight * mean
            given[i] = (1.0 - m.team_weight) * discount * p[i].arrived + m.team_weight * mean_given
