"""Requests on their way into engines."""

from wwwserve.agents.estimate import chance_on_time, expect
from wwwserve.agents.kernel import kernel
from wwwserve.agents.view import CLASS_VALUE
from wwwserve.envs.engine import submit
from wwwserve.envs.market.reward import PREDICTION_SIGMA, expect_value, reprice
from wwwserve.envs.market.world import scrape
from wwwserve.envs.state import CLIPPED, IN_ENGINE, JUDGEMENT, RUN_LOCAL, USER


@kernel
def clip_length(w, r, j):
    """Cut a request to what executor j's model and KV cache can hold."""
    q, longest = w.q, w.p[j].max_len
    if q[r].prompt + q[r].output > longest:
        q[r].prompt = min(q[r].prompt, longest - 1)
        q[r].output = min(q[r].output, longest - q[r].prompt)
        w.p[q[r].origin].counts[CLIPPED] += 1


@kernel
def place(w, r, j, at_s, first_s, token_s):
    """Submit request r to provider j's engine at `at_s`, and count its predicted value into its origin's potential.

    The prediction knows the request's true output length; it serves the reward alone, no view shows it.
    """
    q = w.q
    clip_length(w, r, j)
    if w.m.by_decision == 1 and q[r].kind == USER:
        reprice(w, q[r].origin, j, token_s)
    o, c = q[r].origin, q[r].klass
    q[r].executor = j
    q[r].status = IN_ENGINE
    submit(w.e[j], q, r, at_s)
    scrape(w, j)
    if q[r].kind != JUDGEMENT:
        deadlines = w.m.deadlines[c][: w.m.n_deadlines]
        chance = chance_on_time(
            deadlines, at_s - q[r].arrival_s, first_s, token_s, float(q[r].output), PREDICTION_SIGMA, 1e9
        )
        if q[r].kind == USER:
            value = w.p[o].known[c, CLASS_VALUE] * chance
            w.p[o].effect += value - q[r].predicted
            expect_value(w, r, value)


@kernel
def place_local(w, i, r):
    first_s, token_s = expect(w.p[i].own, 0.0, w.q[r].prompt)
    place(w, r, i, max(w.m.now_s, w.q[r].ready_s), first_s, token_s)
    w.p[i].counts[RUN_LOCAL] += 1
