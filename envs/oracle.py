"""Routers that see what no provider can: every engine as it is now, and for one of them how long answers will be.

They stand beside the policies as baselines, and decide for all providers, request by request.
"""

import numpy as np

from wwwserve.agents.classes import CLASS_MEAN, CLASS_VALUE
from wwwserve.agents.decision import NO_DIRECTION, Actions
from wwwserve.agents.kernel import kernel, records
from wwwserve.agents.knowledge import AD_KV_CAPACITY
from wwwserve.agents.protocol import delivered_value
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.engine import ENGINE, JOB, NEVER, advance, kv_use, submit
from wwwserve.envs.prefix_cache import CACHED, Cache

ORACLES = ("centralized", "omniscient")
KEEP_BELOW_KV_USE = 0.6  # `centralized` leaves a request at its source below this (arXiv 2603.20661)
HORIZON_S = 1e5  # longer than any request takes


@kernel
def _may_run(providers, i, j):
    return providers[j].online == 1 and (providers[j].serves & providers[i].requests) != 0


@kernel
def _least_loaded(market, providers, engines, requests, i, sent):
    """The paper's centralized router: the source while it has capacity, else the least (KV use, running and queued).

    `sent` [N] requests were placed in this round already; each counts with its mean context.
    """
    if _may_run(providers, i, i) and kv_use(engines[i]) < KEEP_BELOW_KV_USE:
        return i
    r = providers[i].head
    context = requests[r].prompt + 0.5 * providers[i].known[requests[r].klass, CLASS_MEAN]
    best = i
    least_use, least_load = np.inf, np.inf
    for j in range(market.n_providers):
        if _may_run(providers, i, j):
            use = kv_use(engines[j]) + sent[j] * context / providers[j].own[AD_KV_CAPACITY]
            load = float(engines[j].running + engines[j].waiting + sent[j])
            if use < least_use or (use == least_use and load < least_load):
                best, least_use, least_load = j, use, load
    return best


@kernel
def _copy_job(job, request, at_s):
    job.prompt = request.prompt
    job.output = request.output
    job.generated = request.generated
    job.prefill_left = request.prefill_left
    job.leaf = request.leaf
    job.cached = request.cached
    job.admitted = request.admitted
    job.hit = request.hit
    job.finish_tick = request.finish_tick
    job.submit_s = at_s
    job.first_token_s = request.first_token_s
    job.finish_s = np.nan
    job.next = -1


@kernel
def _copy_cache(to, of):
    for v in range(of.size):
        to[v].resident, to[v].users = of[v].resident, of[v].users
        to[v].before, to[v].after = of[v].before, of[v].after


@kernel
def _finish_if_placed(market, providers, engines, requests, tree, cached, r, j, target, engine, jobs, done, then):
    """When request r would be done on engine j if nothing else came after it, run on a copy of the engine.

    `target` [R] is where the requests of this round were placed, -1 for the others; tree [S] and cached [N, S]: the
    prefix caches, `then` [S] a buffer for one.
    """
    e = engines[j]
    for k in range(e.profile.size):
        engine.profile[k] = e.profile[k]
    engine.clock_s, engine.tick, engine.free_blocks = e.clock_s, e.tick, e.free_blocks
    engine.kv_tokens, engine.decoding, engine.running = e.kv_tokens, e.decoding, e.running
    engine.next_finish = e.next_finish
    engine.cache_unit, engine.cached_blocks = e.cache_unit, e.cached_blocks
    engine.evict_head, engine.evict_tail = e.evict_head, e.evict_tail
    cache = Cache(tree, then)
    if e.cache_unit > 0:
        _copy_cache(then, cached[j])
    for k in range(e.phase.size):
        engine.phase[k] = e.phase[k]
    engine.waiting = engine.wait_tokens = 0
    engine.wait_head = engine.wait_tail = -1
    engine.seen_s = np.nan
    used = 0
    for k in range(e.running):
        _copy_job(jobs[used], requests[e.slots[k]], requests[e.slots[k]].submit_s)
        engine.slots[k] = used
        used += 1
    w = e.wait_head
    while w >= 0:
        _copy_job(jobs[used], requests[w], requests[w].submit_s)
        submit(engine, cache, jobs, used, requests[w].submit_s)
        used += 1
        w = requests[w].next
    for i in range(market.n_providers):
        placed = providers[i].head
        if (placed >= 0 and target[i] == j) or placed == r:
            at_s = market.now_s
            if i != j:
                at_s += 0.5 * market.rtt_s
            _copy_job(jobs[used], requests[placed], at_s)
            jobs[used].finish_tick = NEVER
            longest = providers[j].max_len
            jobs[used].prompt = min(jobs[used].prompt, longest - 1)
            jobs[used].output = min(jobs[used].output, longest - jobs[used].prompt)
            submit(engine, cache, jobs, used, at_s)
            if placed == r:
                mine = used
            used += 1
    span_s = 10.0
    until_s = market.now_s
    while np.isnan(jobs[mine].finish_s) and span_s < HORIZON_S:
        until_s += span_s
        advance(engine, cache, jobs, until_s, done, 0)
        span_s *= 1.5
    return jobs[mine].finish_s


@kernel
def _best_finish(market, providers, engines, requests, tree, cached, i, target, engine, jobs, done, then):
    """The node on which the request earns most, among equals the one where it is done first."""
    r = providers[i].head
    c = requests[r].klass
    best = i
    most, soonest_s = -1.0, np.inf
    for j in range(market.n_providers):
        if _may_run(providers, i, j):
            finish_s = _finish_if_placed(
                market, providers, engines, requests, tree, cached, r, j, target, engine, jobs, done, then
            )
            if i != j:
                finish_s += 0.5 * market.rtt_s
            latency_s = finish_s - requests[r].arrival_s
            value = delivered_value(
                providers[i].known[c, CLASS_VALUE], market.deadlines[c][: market.n_deadlines], latency_s
            )
            if value > most or (value == most and finish_s < soonest_s):
                best, most, soonest_s = j, value, finish_s
    return best


@kernel
def _direct(markets, omniscient, active, direct, engine, jobs, done, then, sent, target):
    for b in range(active.shape[0]):
        market, providers = markets.market[b], markets.providers[b]
        sent[:] = 0.0
        target[:] = -1
        for k in range(market.n_providers):
            i = (k + market.steps) % market.n_providers
            direct[b, i] = NO_DIRECTION
            if active[b, i] and providers[i].head >= 0:
                if omniscient:
                    j = _best_finish(
                        market, providers, markets.engines[b], markets.requests[b], markets.tree[b],
                        markets.cached[b], i, target, engine[0], jobs, done, then,
                    )  # fmt: skip
                else:
                    j = _least_loaded(market, providers, markets.engines[b], markets.requests[b], i, sent)
                sent[j] += 1.0
                target[i] = j
                direct[b, i] = j


class Oracle:
    """`centralized`, the paper's router on fresh loads, or `omniscient`, greedy on exact finish times (no bound)."""

    def __init__(self, name: str) -> None:
        """Raises ValueError for an unknown name."""
        if name not in ORACLES:
            raise ValueError(f"unknown router {name!r}, expected one of {', '.join(ORACLES)}")
        self.name = name
        self._engine = records(1, ENGINE)
        self._jobs = records(0, JOB)
        self._done = np.zeros(0, np.int64)
        self._cached = records(0, CACHED)

    def decide(self, batch: MarketBatch, actions: Actions) -> None:
        """Write where each request at a head goes into `actions.direct`."""
        requests = batch.shape.requests + 1
        if self._jobs.size < requests:
            self._jobs = records(requests, JOB)
            self._done = np.zeros(requests, np.int64)
        if self._cached.size < batch.shape.nodes:
            self._cached = records(batch.shape.nodes, CACHED)
        n, omniscient = batch.providers, self.name == "omniscient"
        scratch = self._engine, self._jobs, self._done, self._cached, np.empty(n), np.empty(n, np.int64)
        _direct(batch.markets, omniscient, batch.active, actions.direct, *scratch)
