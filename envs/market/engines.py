"""Requests on their way into engines, and engines as their providers read them."""

from wwwserve.agents.hardware import BLOCK_TOKENS, KV_BLOCKS
from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import on_scrape
from wwwserve.agents.provider import begin_appraisal, count_running, end_appraisal, is_cost_old
from wwwserve.envs.engine import advance, prefill_tokens, submit, tokens_out
from wwwserve.envs.market.world import cache_of, set_wake
from wwwserve.envs.prefix_cache import reuse_s
from wwwserve.envs.state import CLIPPED, IN_ENGINE, JUDGEMENT


@kernel
def scrape(w, i):
    """Provider i reads its engine as it is now."""
    e = w.e[i]
    if e.wake_s > w.m.now_s:  # else it is run by the clock, which sees to what is done
        advance(e, cache_of(w, i), w.q, w.m.now_s, w.done, 0)
        set_wake(w, i)
    tokens = (e.profile[KV_BLOCKS] - e.free_blocks) * BLOCK_TOKENS
    kept_s = reuse_s(e, cache_of(w, i), w.m.now_s)
    on_scrape(w.p[i].own, w.m.now_s, e.running, e.waiting, tokens, prefill_tokens(e, w.q), kept_s)


@kernel
def appraise(w, i):
    """Provider i, which has just read its engine, works out what one more request costs, unless it lately has."""
    m, p, e, q = w.m, w.p[i], w.e[i], w.q
    if not is_cost_old(p, m, m.now_s):
        return
    found = begin_appraisal(p, m)
    for k in range(e.running):
        r = e.slots[k]
        if q[r].kind != JUDGEMENT:
            found = count_running(p, m, q[r], q[r].origin == i, float(tokens_out(e, q, r)), m.now_s, found)
    end_appraisal(p, m, found, m.now_s)


@kernel
def clip_length(w, r, j):
    """Cut a request to what executor j's model and KV cache can hold."""
    q, longest = w.q, w.p[j].max_len
    if q[r].prompt + q[r].output > longest:
        q[r].prompt = min(q[r].prompt, longest - 1)
        q[r].output = min(q[r].output, longest - q[r].prompt)
        w.p[q[r].origin].counts[CLIPPED] += 1


@kernel
def place(w, r, j, at_s):
    """Submit request r to provider j's engine at `at_s`, not before now."""
    q = w.q
    clip_length(w, r, j)
    q[r].executor = j
    q[r].status = IN_ENGINE
    scrape(w, j)
    submit(w.e[j], cache_of(w, j), q, r, max(at_s, w.e[j].clock_s))
    set_wake(w, j)
    scrape(w, j)
