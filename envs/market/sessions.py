"""Sessions: the next turn of a user comes some time after the answer to the one before; and what providers know of the
prefixes that turns share."""

from wwwserve.agents.hardware import BLOCK_TOKENS
from wwwserve.agents.kernel import kernel
from wwwserve.agents.knowledge import NO_TIME
from wwwserve.agents.prefix import is_kept
from wwwserve.envs.market.world import cache_of
from wwwserve.envs.prefix_cache import find, most_cached


@kernel
def _is_sooner(w, r, s):
    if w.q[r].arrival_s != w.q[s].arrival_s:
        return w.q[r].arrival_s < w.q[s].arrival_s
    return r < s


@kernel
def _set_turn(w, r):
    """Put request r, whose time is set, on the heap."""
    at = w.m.n_turns
    w.m.n_turns += 1
    while at > 0 and _is_sooner(w, r, w.turns[(at - 1) // 2]):
        w.turns[at] = w.turns[(at - 1) // 2]
        at = (at - 1) // 2
    w.turns[at] = r


@kernel
def take_turn(w):
    """Take the next turn off the heap, which is not empty."""
    first = w.turns[0]
    w.m.n_turns -= 1
    last = w.turns[w.m.n_turns]
    at = 0
    while 2 * at + 1 < w.m.n_turns:
        below = 2 * at + 1
        if below + 1 < w.m.n_turns and _is_sooner(w, w.turns[below + 1], w.turns[below]):
            below += 1
        if not _is_sooner(w, w.turns[below], last):
            break
        w.turns[at] = w.turns[below]
        at = below
    w.turns[at] = last
    return first


@kernel
def end_session(w, r):
    """Request r and the turns after it never come."""
    while r >= 0:
        w.m.unresolved -= 1
        r = w.q[r].next_turn


@kernel
def set_next_turn(w, u):
    """The user of request u, which has been answered, thinks about the next turn."""
    r = w.q[u].next_turn
    if r < 0:
        return
    at_s = w.q[u].answer_s + w.q[r].think_s
    if at_s >= w.m.duration_s:
        end_session(w, r)
    else:
        w.q[r].arrival_s = at_s
        w.q[r].last_s = w.q[u].answer_s
        _set_turn(w, r)


@kernel
def cached_at(w, j, r):
    """Tokens of request r's prompt that provider j's engine has in its prefix cache."""
    return find(w.e[j], cache_of(w, j), w.q[r].leaf, w.q[r].prompt)


@kernel
def remember_prefix(w, r):
    """The origin of request r has had the answer of its executor, which now has its tokens."""
    v = w.q[r].leaf
    if w.e[0].cache_unit > 0:
        while v >= 0:
            w.heard_s[w.q[r].executor, v] = w.m.now_s
            v = w.tree[v].parent


@kernel
def look_for_prefixes(w, i, r):
    """What provider i knows of its request r's prefix: here exactly, of each candidate by what it served and says."""
    q, e = w.q[r], w.e[i]
    if e.cache_unit == 0:
        return
    q.prefix[0] = cached_at(w, i, r)
    q.prefix_age_s[0] = w.m.now_s - q.last_s if q.turn > 1 else 0.0
    most = most_cached(e, w.tree, q.leaf, q.prompt)
    for k in range(q.n_candidates):
        j = q.candidates[k]
        q.prefix[1 + k] = 0
        v = q.leaf
        while v >= 0:
            used_s = w.heard_s[j, v]
            served = used_s > NO_TIME and w.tree[v].start < most and w.tree[v].blocks > 0
            if served and is_kept(w.adverts[j], used_s):
                end = min(most, w.tree[v].start + w.tree[v].blocks)
                q.prefix[1 + k] = end // e.cache_unit * e.cache_unit * BLOCK_TOKENS
                q.prefix_age_s[1 + k] = w.m.now_s - used_s
                break
            v = w.tree[v].parent
