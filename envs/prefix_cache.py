"""The prefix cache of an engine, as vLLM has it: full KV blocks stay after their request until they are needed.

Prefixes form a radix tree, one for all engines of a market: a node is a run of blocks that no request leaves halfway,
and the tokens of a request, prompt and answer, are the path from a root to its *leaf*. What an engine has of a node is
its first `resident` blocks. Those of a running request are pinned (`users`). When the last user is gone, its nodes join
the end of the eviction list, the leaf first; blocks are evicted from the front of the list, of each node the last block
first. So whoever has a block has all blocks before it, and what is cached of a path is read off its deepest node with
a resident block.

`free_blocks` of an ENGINE are those that no running request holds, `cached_blocks` those among them that are cached.
In every kernel `e` is an ENGINE record, `c` a Cache, `v` a node; lengths are in blocks of BLOCK_TOKENS tokens.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.hardware import BLOCK_TOKENS
from wwwserve.agents.kernel import kernel, records

NODE = np.dtype([("parent", np.int32), ("start", np.int32), ("blocks", np.int32)], align=True)
CACHED = np.dtype(
    [
        ("resident", np.int32),
        ("users", np.int32),  # running requests whose path it is on
        ("before", np.int32),  # in the eviction list, -1 at its front; read where there are blocks and no users
        ("after", np.int32),
        ("used_s", np.float64),  # when its last user was done
    ],
    align=True,
)


class Cache(NamedTuple):
    """What one engine has of every node."""

    tree: NDArray[Any]  # [S] NODE
    cached: NDArray[Any]  # [S] CACHED


NO_CACHE = Cache(records(1, NODE), records(1, CACHED))  # for an engine whose `cache_unit` is 0


@kernel
def blocks_for(tokens):
    """KV blocks that hold `tokens`."""
    return (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS


@kernel
def _on_path(c, leaf, tokens):
    """Whole blocks of the first `tokens` tokens that the path to `leaf` has."""
    return min(tokens // BLOCK_TOKENS, np.int64(c.tree[leaf].start + c.tree[leaf].blocks))


@kernel
def most_cached(e, tree, leaf, tokens):
    """Whole blocks of a prompt of `tokens` that may be cached; the last token is computed in any case."""
    on_path = min((tokens - 1) // BLOCK_TOKENS, np.int64(tree[leaf].start + tree[leaf].blocks))
    return on_path // e.cache_unit * e.cache_unit


@kernel
def _cover(c, v, end):
    """Blocks of node v among the first `end` of its path."""
    return min(max(end - c.tree[v].start, np.int64(0)), np.int64(c.tree[v].blocks))


@kernel
def find(e, c, leaf, tokens):
    """Tokens of a prompt of `tokens` that are cached."""
    if e.cache_unit == 0 or leaf < 0:
        return np.int64(0)
    most = most_cached(e, c.tree, leaf, tokens)
    v = leaf
    while v >= 0:
        if c.cached[v].resident > 0 and c.tree[v].start < most:
            found = min(most, np.int64(c.tree[v].start + c.cached[v].resident))
            return found // e.cache_unit * e.cache_unit * BLOCK_TOKENS
        v = c.tree[v].parent
    return np.int64(0)


@kernel
def shared(e, c, a, a_tokens, b, b_tokens):
    """Tokens that two requests have in common, of which the prompt of the second, with leaf `b`, has `b_tokens`; cached
    for it once the first is."""
    if e.cache_unit == 0 or a < 0 or b < 0:
        return np.int64(0)
    most = min(_on_path(c, a, a_tokens), _on_path(c, b, b_tokens - 1))
    while a != b and a >= 0 and b >= 0:
        if c.tree[a].start >= c.tree[b].start:
            a = c.tree[a].parent
        else:
            b = c.tree[b].parent
    if a < 0 or b < 0:
        return np.int64(0)
    common = min(most, np.int64(c.tree[a].start + c.tree[a].blocks))
    return common // e.cache_unit * e.cache_unit * BLOCK_TOKENS


@kernel
def demand(e, c, leaf, tokens):
    """Free blocks that a request of `tokens` takes when it is admitted: new ones, and cached ones that it pins."""
    if e.cache_unit == 0 or leaf < 0:
        return blocks_for(tokens)
    end = _on_path(c, leaf, tokens)
    need = blocks_for(tokens) - end
    v = leaf
    while v >= 0:
        cover = _cover(c, v, end)
        here = np.int64(c.cached[v].resident)
        need += max(cover, here) if c.cached[v].users == 0 else max(cover - here, np.int64(0))
        v = c.tree[v].parent
    return need


@kernel
def _unlink(e, c, v):
    here = c.cached[v]
    if here.before >= 0:
        c.cached[here.before].after = here.after
    else:
        e.evict_head = here.after
    if here.after >= 0:
        c.cached[here.after].before = here.before
    else:
        e.evict_tail = here.before


@kernel
def _append(e, c, v):
    here = c.cached[v]
    here.before, here.after = e.evict_tail, -1
    if e.evict_tail >= 0:
        c.cached[e.evict_tail].after = v
    else:
        e.evict_head = v
    e.evict_tail = v


@kernel
def evict(e, c):
    """Evict what is cached in blocks that have been taken."""
    while e.cached_blocks > e.free_blocks and e.evict_head >= 0:
        v = e.evict_head
        count = min(np.int64(c.cached[v].resident), e.cached_blocks - e.free_blocks)
        c.cached[v].resident -= count
        e.cached_blocks -= count
        e.evictions += count
        if c.cached[v].resident == 0:
            _unlink(e, c, v)


@kernel
def pin(e, c, leaf, tokens):
    """A request of `tokens` is admitted: take the blocks that it needs, those on its path shared with others."""
    if e.cache_unit == 0 or leaf < 0:
        e.free_blocks -= blocks_for(tokens)
    else:
        end = _on_path(c, leaf, tokens)
        new = blocks_for(tokens) - end
        v = leaf
        while v >= 0:
            here = c.cached[v]
            if here.users == 0 and here.resident > 0:
                _unlink(e, c, v)
                e.cached_blocks -= here.resident
                e.free_blocks -= here.resident
            here.users += 1
            cover = _cover(c, v, end)
            if cover > here.resident:
                new += cover - here.resident
                here.resident = cover
            v = c.tree[v].parent
        e.free_blocks -= new
    evict(e, c)


@kernel
def unpin(e, c, leaf, admitted, held, computed):
    """A request that was admitted with `admitted` tokens, and now holds `held`, leaves. What it `computed` stays cached
    until its blocks are needed; they are free."""
    if e.cache_unit == 0 or leaf < 0:
        e.free_blocks += blocks_for(held)
        return
    private = blocks_for(held) - _on_path(c, leaf, admitted)
    end = _on_path(c, leaf, computed)
    v = leaf
    while v >= 0:
        here = c.cached[v]
        here.users -= 1
        cover = _cover(c, v, end)
        if cover > here.resident:
            private -= cover - here.resident
            here.resident = cover
        if here.users == 0:
            if computed < admitted and here.resident > cover:  # it left in the middle of its prefill
                private += here.resident - cover
                here.resident = cover
            if here.resident > 0:
                here.used_s = e.clock_s
                _append(e, c, v)
                e.cached_blocks += here.resident
                e.free_blocks += here.resident
        v = c.tree[v].parent
    e.free_blocks += private


@kernel
def clear(e, c):
    """Nothing is cached. No request runs."""
    for v in range(c.cached.size if e.cache_unit > 0 else 0):
        c.cached[v].resident = 0
    e.cached_blocks = e.evictions = 0
    e.evict_head = e.evict_tail = -1


@kernel
def reuse_s(e, c, now_s):
    """How long a block that is not used is kept, s: the age of the one that goes next; inf if none has had to go."""
    if e.evictions == 0:
        return np.inf
    if e.evict_head < 0:  # all are in use
        return 0.0
    return now_s - c.cached[e.evict_head].used_s
