"""Prefixes that requests share, as a radix tree of blocks of the KV cache."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.kernel import Ints32, kernel

IntArray = NDArray[np.int32]


class Tree(NamedTuple):
    """Prefixes that requests share: a radix tree.

    Every request's tokens, prompt and answer, in whole blocks of `agents.hardware.BLOCK_TOKENS`, are a path of whole
    nodes from a root to its leaf.
    """

    parent: IntArray
    """Shape (S,); -1 for a root."""
    start: IntArray
    """Shape (S,): blocks on the path before it."""
    blocks: IntArray
    """Shape (S,): blocks in it, may be 0."""


def no_tree() -> Tree:
    """A tree of no nodes."""
    return Tree(*(np.zeros(0, np.int32) for _ in Tree._fields))


def apart(path: IntArray) -> Tree:
    """A root for each request, whose tokens are `path` blocks."""
    return Tree(np.full(len(path), -1, np.int32), np.zeros(len(path), np.int32), path)


def of_sessions(shared: IntArray, path: IntArray, first: IntArray, system: int) -> tuple[Tree, IntArray]:
    """The tree of requests of sessions, and the leaf of each request, shape (n,).

    A session's requests follow each other from index `first` on. A request has the first `shared` of its `path` blocks
    in common with the last one before it in its session that has so many; with none if none has. If `system` is not 0,
    all sessions begin with that many blocks in common, and so do their first requests.
    """
    tree, leaf = _room(2 * len(path) + 1), np.zeros(len(path), np.int32)
    count = 0
    if system > 0:
        tree.parent[0], tree.blocks[0] = -1, system
        count = 1
    count = _grow_sessions(shared, path, first, system, *tree, leaf, count)
    return Tree(*(column[:count] for column in tree)), leaf


def of_prefixes(known: Tree, node: IntArray, shared: IntArray, path: IntArray) -> tuple[Tree, IntArray]:
    """The tree `known` with a leaf for each request, and those, shape (n,).

    A request has the first `shared` of its `path` blocks in common with the path to its `node` of the tree; none if
    that is -1.
    """
    before = len(known.parent)
    tree, leaf = _room(before + 2 * len(path)), np.zeros(len(path), np.int32)
    for column, found in zip(tree, known, strict=True):
        column[:before] = found
    count = _grow_prefixes(node, shared, path, *tree, leaf, before)
    return Tree(*(column[:count] for column in tree)), leaf


def _room(size: int) -> Tree:
    return Tree(*(np.zeros(size, np.int32) for _ in Tree._fields))


@kernel
def _hang(parent: Ints32, start: Ints32, blocks: Ints32, count: int, v: int, shared: int, path: int) -> int:
    """Add a leaf to a tree of `count` nodes: `path` blocks of which the first `shared` are on the path to node v.

    Splits the node in which they end. The leaf is the last node of the tree after it, of the number returned.
    """
    while v >= 0 and start[v] >= shared:
        v = parent[v]
    if v >= 0 and start[v] + blocks[v] > shared:  # node v stays the lower part, so that leaves stay what they are
        parent[count], start[count], blocks[count] = parent[v], start[v], shared - start[v]
        parent[v], start[v], blocks[v] = count, shared, start[v] + blocks[v] - shared
        v = count
        count += 1
    parent[count], start[count], blocks[count] = v, shared, path - shared
    return count + 1


@kernel
def _grow_sessions(
    shared: Ints32,
    path: Ints32,
    first: Ints32,
    system: int,
    parent: Ints32,
    start: Ints32,
    blocks: Ints32,
    leaf: Ints32,
    count: int,
) -> int:
    for k in range(len(path)):
        j = k - 1
        while j >= first[k] and path[j] < shared[k]:
            j -= 1
        if j >= first[k]:
            count = _hang(parent, start, blocks, count, leaf[j], shared[k], path[k])
        elif system > 0:
            count = _hang(parent, start, blocks, count, 0, min(shared[k], system), path[k])
        else:
            count = _hang(parent, start, blocks, count, -1, 0, path[k])
        leaf[k] = count - 1
    return count


@kernel
def _grow_prefixes(
    node: Ints32, shared: Ints32, path: Ints32, parent: Ints32, start: Ints32, blocks: Ints32, leaf: Ints32, count: int
) -> int:
    for k in range(len(path)):
        count = _hang(parent, start, blocks, count, node[k], shared[k], path[k])
        leaf[k] = count - 1
    return count
