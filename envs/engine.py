"""Continuous batching as vLLM schedules it, exact to the iteration, at a cost per event and not per token.

An engine runs iterations back to back. Each iteration decodes one token for every decoding request and spends what is
left of its token budget on prefill: first the chunk of a prompt already begun, then waiting requests in order of
arrival while slots and KV blocks last (a request is admitted when its whole prompt fits). When blocks run out, the
newest running request is preempted, goes back to the front of the queue, and later recomputes what it had.

Between two events (an admission, a finish, a preemption) nothing changes but the lengths, so a run of iterations is
taken in one step: every decoding request advances with one per-engine token clock `tick`, finishes when the clock
reaches its `finish_tick`, and needs a new KV block when the clock agrees with its length modulo the block size, which
`phase` counts. The state always stands at an iteration boundary `clock_s`; the iteration that starts there is the one
in progress. A request joins the first iteration that starts at or after its `submit_s`.

Prompts may be cached in part, see `prefix_cache`; prefill then computes the rest, which attends to all before it.

In every kernel `e` is an ENGINE record, `c` its prefix cache, `q` the record array of requests, `r` an index into it.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.hardware import (
    BLOCK_TOKENS,
    KV_BLOCKS,
    MAX_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    PER_KV_TOKEN_S,
    PER_PAIR_S,
    PER_SEQ_S,
    PROFILE_SIZE,
    SEQ_TOKENS,
    WEIGHT_S,
    iteration_s,
    off_line_s,
)
from wwwserve.agents.kernel import kernel
from wwwserve.envs.prefix_cache import demand, evict, find, pin, shared, unpin

NEVER = 1 << 62
MAX_SLOTS = 1024  # largest `max_num_seqs`, vLLM's default on an H100

ENGINE = np.dtype(
    [
        ("profile", np.float64, PROFILE_SIZE),  # see agents.hardware
        ("clock_s", np.float64),  # start of the iteration in progress
        ("wake_s", np.float64),  # no request finishes before
        ("seen_s", np.float64),  # until when it was run last; NaN if its requests have changed since
        ("tick", np.int64),  # iterations done
        ("run_tick", np.int64),  # at which the present run of like iterations began; -1 before there is one
        ("run_s", np.float64),  # when that was
        ("run_first_s", np.float64),  # what its first iteration took
        ("free_blocks", np.int64),  # that no running request holds
        ("cached_blocks", np.int64),  # of them, in the prefix cache
        ("cache_unit", np.int64),  # blocks that are cached together; 0 without a prefix cache
        ("evictions", np.int64),  # blocks
        ("evict_head", np.int32),  # the node of the prefix tree that is evicted next, -1 if none
        ("evict_tail", np.int32),
        ("prompt_tokens", np.int64),  # of the requests admitted so far
        ("hit_tokens", np.int64),  # of them, found in the prefix cache
        ("kv_tokens", np.int64),  # context of the decoding requests
        ("decoding", np.int64),  # running requests past their prefill
        ("running", np.int64),
        ("next_finish", np.int64),  # earliest `finish_tick` of the decoding requests
        ("waiting", np.int64),
        ("wait_tokens", np.int64),  # tokens that the waiting requests have to prefill, by the cache as they came
        ("preemptions", np.int64),
        ("phase", np.int64, BLOCK_TOKENS),  # decoding requests that need a block at this tick modulo the block size
        ("wait_head", np.int32),  # first waiting request, -1 if none
        ("wait_tail", np.int32),
        ("slots", np.int32, MAX_SLOTS),  # running requests, oldest first
    ],
    align=True,
)

# What an engine knows of a request. Engines work on any record array that has these fields.
JOB_FIELDS = [
    ("prompt", np.int64),  # tokens
    ("output", np.int64),  # tokens that will be generated, at least 1
    ("generated", np.int64),  # tokens generated when it last stopped decoding
    ("prefill_left", np.int64),  # tokens of a prefill begun and not done
    ("cached", np.int64),  # tokens of it that were cached when it came or, from then on, when it was admitted
    ("admitted", np.int64),  # tokens that it had when it was admitted
    ("planned", np.int64),  # tokens that are cached once the iteration begins that admits it
    ("hit", np.int64),  # tokens that were cached when it was first admitted, -1 until then
    ("leaf", np.int32),  # where its path in the prefix tree ends, -1 if it is on none
    ("finish_tick", np.int64),  # tick at which the last token is out; NEVER unless decoding
    ("submit_s", np.float64),  # when it reaches the engine
    ("first_token_s", np.float64),  # NaN until then
    ("finish_s", np.float64),  # NaN until then
    ("next", np.int32),  # the next request in whichever queue it stands, -1 at the end
]
JOB = np.dtype(JOB_FIELDS, align=True)


def reset_engine(engine: Any, profile: NDArray[np.float64], cache_unit: int = 0) -> None:
    """Make one ENGINE record idle at time 0, with `profile` [PROFILE_SIZE]; prefixes are cached in units of so many
    blocks, 0 for not at all. Raises ValueError for too many slots."""
    if profile[MAX_NUM_SEQS] > MAX_SLOTS:
        raise ValueError(f"max_num_seqs is {int(profile[MAX_NUM_SEQS])}, an engine has at most {MAX_SLOTS}")
    for name in ENGINE.names or ():
        engine[name] = 0
    engine["profile"] = profile
    engine["free_blocks"] = int(profile[KV_BLOCKS])
    engine["cache_unit"] = cache_unit
    engine["next_finish"] = NEVER
    engine["wake_s"] = np.inf
    engine["seen_s"] = np.nan
    engine["wait_head"] = engine["wait_tail"] = -1
    engine["evict_head"] = engine["evict_tail"] = -1
    engine["slots"] = engine["run_tick"] = -1


def reset_jobs(jobs: Any) -> None:
    """Clear the engine's fields of a record array of requests."""
    for name, _ in JOB_FIELDS:
        jobs[name] = 0
    jobs["prompt"] = jobs["output"] = 1
    jobs["finish_tick"] = NEVER
    jobs["first_token_s"] = jobs["finish_s"] = np.nan
    jobs["next"] = jobs["leaf"] = jobs["hit"] = -1


@kernel
def tokens_out(e, q, r):
    """Tokens that request r has generated on engine i so far."""
    if q[r].finish_tick == NEVER:
        return np.int64(q[r].generated)
    return q[r].output - max(np.int64(0), q[r].finish_tick - e.tick)


@kernel
def kv_use(e):
    """Share of engine i's KV blocks in use, 0 to 1."""
    return 1.0 - e.free_blocks / e.profile[KV_BLOCKS]


@kernel
def submit(e, c, q, r, at_s):
    """Hand request r to engine i at `at_s`, not before the engine's clock. Requests wait in order of `at_s`."""
    q[r].submit_s = at_s
    q[r].finish_tick = NEVER
    q[r].prefill_left = 0
    before = np.int32(-1)
    after = e.wait_head
    if after >= 0 and q[e.wait_tail].submit_s <= at_s:
        before, after = e.wait_tail, np.int32(-1)
    while after >= 0 and q[after].submit_s <= at_s:
        before, after = after, q[after].next
    q[r].next = after
    if before >= 0:
        q[before].next = r
    else:
        e.wait_head = r
    if after < 0:
        e.wait_tail = r
    _count_waiting(e, c, q, r)
    e.wake_s = min(e.wake_s, at_s)  # whatever else is there is not done earlier for it
    e.seen_s = np.nan


@kernel
def _count_waiting(e, c, q, r):
    """Request r waits."""
    tokens = np.int64(q[r].prompt + q[r].generated)
    q[r].cached = find(e, c, q[r].leaf, tokens)
    e.waiting += 1
    e.wait_tokens += tokens - q[r].cached


@kernel
def _uncount_waiting(e, q, r):
    """Request r waits no longer."""
    e.waiting -= 1
    e.wait_tokens -= q[r].prompt + q[r].generated - q[r].cached


@kernel
def prefill_tokens(e, q):
    """Tokens that are still to be prefilled, of waiting requests and of the one whose prefill has begun."""
    tokens = e.wait_tokens
    if e.running > e.decoding:
        tokens += q[e.slots[e.running - 1]].prefill_left
    return tokens


@kernel
def _find_next_finish(e, q):
    earliest = NEVER
    for k in range(e.running):
        earliest = min(earliest, q[e.slots[k]].finish_tick)
    e.next_finish = earliest


@kernel
def _release(e, c, q, k):
    """Take the request in slot k out of the running ones, free its blocks, remember what it generated; return it."""
    r = e.slots[k]
    if q[r].finish_tick == NEVER:
        held = np.int64(q[r].prompt + q[r].generated)
        computed = np.int64(held - q[r].prefill_left)
    else:
        q[r].generated = tokens_out(e, q, r)
        held = np.int64(q[r].prompt + q[r].generated - 1)
        computed = held
        e.phase[(e.tick - held) % BLOCK_TOKENS] -= 1
        e.kv_tokens -= held
        e.decoding -= 1
    unpin(e, c, q[r].leaf, np.int64(q[r].admitted), held, computed)
    q[r].prefill_left = 0
    q[r].finish_tick = NEVER
    e.run_tick = -1
    e.running -= 1
    for s in range(k, e.running):
        e.slots[s] = e.slots[s + 1]
    return r


@kernel
def _preempt_newest(e, c, q):
    r = _release(e, c, q, e.running - 1)
    q[r].next = e.wait_head
    e.wait_head = r
    if e.wait_tail < 0:
        e.wait_tail = r
    _count_waiting(e, c, q, r)
    e.preemptions += 1
    _find_next_finish(e, q)


@kernel
def abort(e, c, q, r):
    """Withdraw request r from engine i, waiting or running. Returns whether it was there."""
    e.wake_s = e.clock_s  # the others may be done earlier without it
    e.seen_s = np.nan
    for k in range(e.running):
        if e.slots[k] == r:
            _release(e, c, q, k)
            _find_next_finish(e, q)
            return True
    before = np.int32(-1)
    here = e.wait_head
    while here >= 0 and here != r:
        before, here = here, q[here].next
    if here < 0:
        return False
    if before >= 0:
        q[before].next = q[r].next
    else:
        e.wait_head = q[r].next
    if e.wait_tail == r:
        e.wait_tail = before
    _uncount_waiting(e, q, r)
    return True


@kernel
def _finish_due(e, c, q, done, n_done):
    """Move the requests whose last token is out to `done`; returns the new count there."""
    k = 0
    while k < e.running:
        r = e.slots[k]
        if q[r].finish_tick <= e.tick:
            _release(e, c, q, k)
            q[r].finish_s = e.clock_s
            done[n_done] = r
            n_done += 1
        else:
            k += 1
    _find_next_finish(e, q)
    return n_done


@kernel
def _head_fits(e, c, q):
    """Whether the first waiting request could join an iteration now, its arrival aside."""
    r = e.wait_head
    if r < 0 or e.running >= e.profile[MAX_NUM_SEQS]:
        return False
    spare = e.free_blocks - e.phase[e.tick % BLOCK_TOKENS]
    return demand(e, c, q[r].leaf, np.int64(q[r].prompt + q[r].generated)) <= spare


@kernel
def _mixed_iteration(e, c, q, until_s, done, n_done):
    """One iteration with prefill in it, if it ends by `until_s`. Returns the count in `done`, or -1 if it does not end.

    The composition is fixed by the state at the iteration's start, so an iteration that is still in progress is simply
    planned again by the next call, with the same outcome.
    """
    decoding = e.decoding
    budget = np.int64(e.profile[MAX_BATCHED_TOKENS]) - decoding
    first_new = e.running
    prefill = np.int64(0)
    chunk = np.int64(0)
    pairs = 0.0  # of prompt tokens with those before them
    if first_new > decoding:  # at most one prompt is begun and not done: the newest
        r = e.slots[first_new - 1]
        chunk = min(np.int64(q[r].prefill_left), budget)
        pairs += chunk * (q[r].prompt + q[r].generated - q[r].prefill_left + 0.5 * chunk)
        budget -= chunk
        prefill += chunk
    need = e.phase[e.tick % BLOCK_TOKENS]
    spare = e.free_blocks - need
    admitted = 0
    r = e.wait_head
    while r >= 0 and budget > 0 and q[r].submit_s <= e.clock_s:
        tokens = np.int64(q[r].prompt + q[r].generated)
        blocks = demand(e, c, q[r].leaf, tokens)
        if first_new + admitted >= e.profile[MAX_NUM_SEQS] or blocks > spare:
            break
        spare -= blocks
        cached = find(e, c, q[r].leaf, tokens)
        s = e.wait_head
        for _ in range(admitted):  # what is admitted before it in this iteration is cached for it
            cached = max(cached, shared(e, c, q[s].leaf, q[s].prompt + q[s].generated, q[r].leaf, tokens))
            s = q[s].next
        q[r].planned = cached
        part = min(tokens - cached, budget)
        prefill += part
        pairs += part * (cached + 0.5 * part)
        budget -= part
        admitted += 1
        r = q[r].next
    pairs_s = e.profile[PER_PAIR_S] * pairs
    end_s = e.clock_s + iteration_s(e.profile, decoding, e.kv_tokens, prefill, e.profile[SEQ_TOKENS], pairs_s)
    if end_s > until_s:
        e.wake_s = end_s
        return -1

    e.clock_s = end_s
    e.tick += 1
    e.run_tick = -1
    e.kv_tokens += decoding
    e.free_blocks -= need
    evict(e, c)
    if first_new > decoding:
        q[e.slots[first_new - 1]].prefill_left -= chunk
        prefill -= chunk
    for k in range(admitted):
        r = e.wait_head
        tokens = np.int64(q[r].prompt + q[r].generated)
        _uncount_waiting(e, q, r)
        q[r].cached = q[r].planned
        q[r].admitted = tokens
        if q[r].hit < 0:
            q[r].hit = q[r].cached
            e.prompt_tokens += q[r].prompt
            e.hit_tokens += q[r].cached
        pin(e, c, q[r].leaf, tokens)
        e.wait_head = q[r].next
        if e.wait_head < 0:
            e.wait_tail = -1
        e.slots[first_new + k] = r
        part = min(tokens - q[r].cached, prefill)
        prefill -= part
        q[r].prefill_left = tokens - q[r].cached - part
    e.running += admitted

    for k in range(max(0, first_new - 1), e.running):  # prompts done in this iteration give their first token
        r = e.slots[k]
        if q[r].finish_tick == NEVER and q[r].prefill_left == 0:
            context = np.int64(q[r].prompt + q[r].generated)
            q[r].generated += 1
            q[r].finish_tick = e.tick + q[r].output - q[r].generated
            e.kv_tokens += context
            e.decoding += 1
            e.phase[(e.tick - context) % BLOCK_TOKENS] += 1
            e.next_finish = min(e.next_finish, q[r].finish_tick)
            if np.isnan(q[r].first_token_s):
                q[r].first_token_s = end_s
    if e.next_finish <= e.tick:
        n_done = _finish_due(e, c, q, done, n_done)
    return n_done


@kernel
def _run_end_s(e, growth_s, ticks):
    """When the first `ticks` iterations of the present run are over."""
    return e.run_s + ticks * (e.run_first_s + 0.5 * growth_s * (ticks - 1))


@kernel
def _ticks_within(e, growth_s, until_s):
    """How many iterations of the present run end by `until_s` when each takes `growth_s` more than the one before."""
    half = 0.5 * growth_s
    linear = e.run_first_s - half
    span_s = max(0.0, until_s - e.run_s)
    n = np.int64((math.sqrt(linear * linear + 4.0 * half * span_s) - linear) / growth_s)
    while n > 0 and _run_end_s(e, growth_s, n) > until_s:
        n -= 1
    while _run_end_s(e, growth_s, n + 1) <= until_s:
        n += 1
    return n


@kernel
def _blocks_over(e, ticks):
    """KV blocks that the decoding requests take over the next `ticks` iterations."""
    need = (ticks // BLOCK_TOKENS) * e.decoding
    for k in range(ticks % BLOCK_TOKENS):
        need += e.phase[(e.tick + k) % BLOCK_TOKENS]
    return need


@kernel
def _ticks_affordable(e):
    """Iterations until the free KV blocks no longer suffice for the decoding requests."""
    cycles = e.free_blocks // e.decoding
    ticks = cycles * BLOCK_TOKENS
    spare = e.free_blocks - cycles * e.decoding
    while True:
        spare -= e.phase[(e.tick + ticks) % BLOCK_TOKENS]
        if spare < 0:
            return ticks
        ticks += 1


@kernel
def advance(e, c, q, until_s, done, n_done):
    """Run engine i through every iteration that ends by `until_s`.

    Finished requests are appended to `done` [R] from position `n_done` on; returns the new count. Then `wake_s`
    is a time up to which it may be advanced without a request being finished.
    """
    if e.seen_s == until_s:
        return n_done
    e.seen_s = until_s
    while True:
        if e.running == 0:
            r = e.wait_head
            if r < 0 or q[r].submit_s > until_s:
                e.clock_s = max(e.clock_s, until_s)
                e.wake_s = q[r].submit_s if r >= 0 else np.inf
                return n_done
            e.clock_s = max(e.clock_s, q[r].submit_s)
        fits = _head_fits(e, c, q)
        arrived = fits and q[e.wait_head].submit_s <= e.clock_s
        if e.phase[e.tick % BLOCK_TOKENS] > e.free_blocks:
            _preempt_newest(e, c, q)
            continue
        if arrived or e.running > e.decoding:
            count = _mixed_iteration(e, c, q, until_s, done, n_done)
            if count < 0:
                return n_done
            n_done = count
            continue
        decoding = e.decoding
        growth_s = e.profile[PER_KV_TOKEN_S] * decoding
        if e.run_tick < 0:
            e.run_tick, e.run_s = e.tick, e.clock_s
            e.run_first_s = e.profile[WEIGHT_S] + e.profile[PER_SEQ_S] * decoding
            e.run_first_s += e.profile[PER_KV_TOKEN_S] * e.kv_tokens + off_line_s(e.profile, decoding)
        gone = e.tick - e.run_tick
        ticks = min(e.next_finish - e.tick, _ticks_within(e, growth_s, until_s) - gone)
        if fits:  # the head is still on its way and joins at the next boundary after it comes
            ticks = min(ticks, np.int64(1))
        if ticks <= 0:
            ticks = np.int64(1) if fits else e.next_finish - e.tick
            if _blocks_over(e, ticks) > e.free_blocks:
                ticks = _ticks_affordable(e)
            e.wake_s = _run_end_s(e, growth_s, gone + ticks)
            return n_done
        need = _blocks_over(e, ticks)
        if need > e.free_blocks:
            ticks = _ticks_affordable(e)
            need = _blocks_over(e, ticks)
        e.tick += ticks
        e.clock_s = _run_end_s(e, growth_s, gone + ticks)  # from the run's start: wherever it is stopped, bit for bit
        e.kv_tokens += ticks * decoding
        e.free_blocks -= need
        evict(e, c)
        if e.tick >= e.next_finish:
            n_done = _finish_due(e, c, q, done, n_done)
