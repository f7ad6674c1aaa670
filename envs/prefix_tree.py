"""The radix tree of `envs.prefix_cache` for an engine whose requests are not known before they come.

Requests are chains of block hashes. A new one hangs onto the longest chain that it shares with those before it, which
splits a node where it leaves it halfway; nodes of which nothing is cached or asked for any more make room for others.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from wwwserve.agents import kernel
from wwwserve.agents.hardware import BLOCK_TOKENS
from wwwserve.envs.prefix_cache import CACHED, NODE, Cache, find

FIRST_NODES = 256


class PrefixTree:
    """The prefixes of one engine's requests, with what it has of each."""

    def __init__(self, engine: Any) -> None:
        """For an ENGINE record, whose eviction list it keeps in order where a node is split."""
        self.engine = engine
        self.cache = Cache(kernel.records(FIRST_NODES, NODE), kernel.records(FIRST_NODES, CACHED))
        self._free = list(range(FIRST_NODES - 1, -1, -1))
        self._where: dict[bytes, int] = {}  # the node that has a block
        self._hashes: dict[int, list[bytes]] = {}  # of each node in use
        self._children: Counter[int] = Counter()
        self._asked: Counter[int] = Counter()  # requests in the engine, by leaf

    def __len__(self) -> int:
        return len(self._hashes)

    def hang(self, hashes: Sequence[bytes]) -> int:
        """The leaf of a new request; -1 for one without a whole block. To be released by `leave`."""
        known = self._known(hashes)
        if len(self._free) < 2:
            self._make_room(hashes[known - 1] if known else b"")
        leaf = -1
        if known:
            leaf = self._where[hashes[known - 1]]
            if self._end(leaf) > known:
                leaf = self._split(leaf, known)
        if known < len(hashes):
            leaf = self._new(leaf, known, list(hashes[known:]))
        if leaf >= 0:
            self._asked[leaf] += 1
        return leaf

    def leave(self, leaf: int) -> None:
        """A request is no longer in the engine."""
        if leaf >= 0:
            self._asked[leaf] -= 1

    def find(self, engine: Any, cache: Cache, hashes: Sequence[bytes], tokens: int) -> int:
        """Tokens of a prompt of `tokens`, which need not be in the tree, that an engine with this tree has cached."""
        known = self._known(hashes)
        if not known:
            return 0
        leaf = self._where[hashes[known - 1]]
        return int(find(engine, cache, leaf, min(tokens, known * BLOCK_TOKENS + 1)))

    def _known(self, hashes: Sequence[bytes]) -> int:
        """How many of the first blocks are in the tree; whoever is there has all before it there."""
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if hashes[middle] in self._where:
                low = middle + 1
            else:
                high = middle
        return low

    def _end(self, v: int) -> int:
        node = self.cache.tree[v]
        return int(node["start"]) + int(node["blocks"])

    def _new(self, parent: int, start: int, hashes: list[bytes]) -> int:
        v = self._free.pop()
        self.cache.tree[v] = parent, start, len(hashes)
        self.cache.cached[v] = 0, 0, -1, -1, 0.0
        self._hashes[v] = hashes
        self._where.update(dict.fromkeys(hashes, v))
        if parent >= 0:
            self._children[parent] += 1
        return v

    def _split(self, v: int, end: int) -> int:
        """Cut node v, so that a node ends after `end` blocks, which is returned. Node v stays the lower part, so that
        leaves stay what they are."""
        tree, cached = self.cache
        parent, start, blocks = (int(tree[v][name]) for name in ("parent", "start", "blocks"))
        upper = end - start
        hashes = self._hashes[v]
        u = self._new(-1, start, hashes[:upper])
        tree[u]["parent"] = parent
        self._children[u] = 1
        self._hashes[v] = hashes[upper:]
        tree[v] = u, end, blocks - upper
        resident = int(cached[v]["resident"])
        cached[u]["resident"], cached[v]["resident"] = min(resident, upper), max(0, resident - upper)
        cached[u]["users"], cached[u]["used_s"] = cached[v]["users"], cached[v]["used_s"]
        if resident and not cached[v]["users"]:
            self._list_after(v, u)
            if resident <= upper:
                self._unlist(v)
        return u

    def _list_after(self, v: int, u: int) -> None:
        """Put node u into the eviction list, behind v."""
        engine, cached = self.engine, self.cache.cached
        after = int(cached[v]["after"])
        cached[u]["before"], cached[u]["after"], cached[v]["after"] = v, after, u
        if after >= 0:
            cached[after]["before"] = u
        else:
            engine["evict_tail"] = u

    def _unlist(self, v: int) -> None:
        engine, cached = self.engine, self.cache.cached
        before, after = int(cached[v]["before"]), int(cached[v]["after"])
        if before >= 0:
            cached[before]["after"] = after
        else:
            engine["evict_head"] = after
        if after >= 0:
            cached[after]["before"] = before
        else:
            engine["evict_tail"] = before

    def _make_room(self, kept: bytes) -> None:
        """Remove nodes of which nothing is left, but for the one that has the block `kept` and those before it."""
        spared = set()
        v = self._where.get(kept, -1)
        while v >= 0:
            spared.add(v)
            v = int(self.cache.tree[v]["parent"])
        unused = [v for v in self._hashes if self._is_unused(v) and v not in spared]
        while unused:
            v = unused.pop()
            parent = int(self.cache.tree[v]["parent"])
            for name in self._hashes.pop(v):
                del self._where[name]
            self._free.append(v)
            del self._asked[v], self._children[v]
            if parent >= 0:
                self._children[parent] -= 1
                if self._is_unused(parent) and parent not in spared:
                    unused.append(parent)
        if len(self._free) < len(self.cache.tree) // 4:  # or it would have to be done again soon
            count = len(self.cache.tree)
            larger = Cache(kernel.records(2 * count, NODE), kernel.records(2 * count, CACHED))
            for new, old in zip(larger, self.cache, strict=True):
                new[:count] = old
            self.cache = larger
            self._free = [*range(2 * count - 1, count - 1, -1), *self._free]

    def _is_unused(self, v: int) -> bool:
        here = self.cache.cached[v]
        return not (self._children[v] or self._asked[v] or here["users"] or here["resident"])
