"""The prefix cache of an engine, in small cases by hand and against a cache of single blocks in plain Python."""

from collections import OrderedDict

import numpy as np
import pytest

from wwwserve.agents.hardware import Profile
from wwwserve.agents.kernel import records
from wwwserve.envs.engine import ENGINE, JOB, abort, advance, reset_engine, reset_jobs, submit
from wwwserve.envs.prefix_cache import (
    CACHED,
    NODE,
    Cache,
    clear,
    demand,
    evict,
    find,
    pin,
    reuse_s,
    shared,
    unpin,
)

B = 16  # tokens of a block


def profile(kv_blocks: int = 100, max_batched_tokens: int = 512) -> Profile:
    """Decode takes 1 + 0.1 n + 0.01 kv seconds; with prefill the 1 becomes max(1, 0.5 + 0.05 (prefill + n))."""
    return Profile(1.0, 0.1, 0.01, 0.5, 0.05, kv_blocks, 8, max_batched_tokens, 4096, "test", per_pair_s=1e-4)


class Node:
    """An engine with a prefix cache over a tree, each node (parent, blocks)."""

    def __init__(self, tree: list[tuple[int, int]], kv_blocks: int = 100, unit: int = 1, batched: int = 512) -> None:
        self.engine = records(1, ENGINE)
        self.e = self.engine[0]
        reset_engine(self.e, profile(kv_blocks, batched).row(), unit)
        nodes = records(len(tree), NODE)
        for v, (parent, blocks) in enumerate(tree):
            above = nodes[parent] if parent >= 0 else None
            start = 0 if above is None else int(above["start"] + above["blocks"])
            nodes[v]["parent"], nodes[v]["start"], nodes[v]["blocks"] = parent, start, blocks
        self.c = Cache(nodes, records(len(tree), CACHED))
        self.q = records(64, JOB)
        reset_jobs(self.q)
        self.done = np.zeros(64, np.int64)
        self.used = 0

    def run(self, leaf: int, prompt: int, output: int, at_s: float | None = None) -> int:
        """Hand it a request, and run until all is done; returns its number."""
        r = self.put(leaf, prompt, output, at_s)
        self.advance(1e6)
        return r

    def put(self, leaf: int, prompt: int, output: int, at_s: float | None = None) -> int:
        r = self.used
        self.used += 1
        self.q[r]["leaf"], self.q[r]["prompt"], self.q[r]["output"] = leaf, prompt, output
        submit(self.e, self.c, self.q, r, float(self.e["clock_s"]) if at_s is None else at_s)
        return r

    def advance(self, until_s: float) -> None:
        advance(self.e, self.c, self.q, min(until_s, float(self.e["clock_s"]) + 1e4), self.done, 0)
        self.check()

    def resident(self) -> list[int]:
        return self.c.cached["resident"].tolist()

    def check(self) -> None:
        """Blocks add up, and whoever has a block has those before it."""
        tree, cached = self.c.tree, self.c.cached
        users = np.zeros(len(tree), int)
        private = 0
        for k in range(int(self.e["running"])):
            job = self.q[self.e["slots"][k]]
            held = int(job["prompt"] + job["generated"])
            if job["finish_tick"] < 1 << 61:
                held = int(job["prompt"] + job["output"] - max(0, job["finish_tick"] - self.e["tick"])) - 1
            v = int(job["leaf"])
            on_path = 0 if v < 0 else min(int(job["admitted"]) // B, int(tree[v]["start"] + tree[v]["blocks"]))
            private += -(-held // B) - on_path
            while v >= 0:
                users[v] += 1
                v = int(tree[v]["parent"])
        assert cached["users"].tolist() == users.tolist()
        free = [v for v in range(len(tree)) if users[v] == 0 and cached[v]["resident"] > 0]
        assert self.e["cached_blocks"] == sum(cached[v]["resident"] for v in free)
        pinned = sum(int(cached[v]["resident"]) for v in range(len(tree)) if users[v] > 0)
        assert self.e["free_blocks"] + pinned + private == self.e["profile"][5]
        assert 0 <= self.e["cached_blocks"] <= self.e["free_blocks"]
        listed, v = [], int(self.e["evict_head"])
        while v >= 0:
            listed.append(v)
            v = int(cached[v]["after"])
        assert sorted(listed) == free
        for v in range(len(tree)):
            above = int(tree[v]["parent"])
            assert 0 <= cached[v]["resident"] <= tree[v]["blocks"]
            if cached[v]["resident"] > 0 and above >= 0:
                assert cached[above]["resident"] == tree[above]["blocks"]


CHAT = [(-1, 5), (0, 4), (1, 3)]  # three turns of a session: 80, 144 and 192 tokens in whole blocks


def test_the_next_turn_finds_all_whole_blocks_of_the_one_before() -> None:
    node = Node(CHAT)
    node.run(0, 60, 25)  # 85 tokens, of which the last is not computed: 84 are 5 whole blocks
    assert node.resident() == [5, 0, 0] and node.e["cached_blocks"] == 5
    r = node.run(1, 120, 30)
    assert node.q[r]["hit"] == 80
    assert (node.e["prompt_tokens"], node.e["hit_tokens"]) == (180, 80)
    assert node.resident() == [5, 4, 0]


def test_prefill_computes_the_rest_which_attends_to_all_before_it() -> None:
    node = Node(CHAT)
    node.run(0, 60, 25)
    start_s = float(node.e["clock_s"])
    r = node.run(1, 120, 30)
    prefill_s = 0.5 + 0.05 * 40 + 1e-4 * 40 * (80 + 20)
    assert node.q[r]["first_token_s"] - start_s == pytest.approx(prefill_s)


def test_a_prompt_that_is_cached_whole_computes_its_last_block() -> None:
    node = Node([(-1, 4), (0, 2)])
    node.run(0, 64, 1)
    r = node.run(1, 64, 33)  # the same prompt, 64 tokens: its last token is computed, with its block
    assert node.q[r]["hit"] == 48


def test_without_a_cache_or_a_path_nothing_is_found() -> None:
    node = Node(CHAT, unit=0)
    node.run(0, 60, 25)
    assert node.q[node.run(1, 120, 30)]["hit"] == 0 and node.e["free_blocks"] == 100
    node = Node(CHAT)
    node.run(-1, 60, 25)
    assert node.e["cached_blocks"] == 0 and node.q[node.run(-1, 60, 25)]["hit"] == 0


def test_units_larger_than_a_block_are_found_whole() -> None:
    node = Node([(-1, 8), (0, 4)], unit=4)
    node.run(0, 100, 29)  # 128 computed tokens are 8 blocks
    assert node.q[node.run(1, 160, 10)]["hit"] == 128
    node = Node([(-1, 8), (0, 4)], unit=4)
    node.run(0, 100, 9)  # 108 computed tokens are 6 blocks, one unit of 4
    assert node.q[node.run(1, 160, 10)]["hit"] == 64


def test_the_least_recently_used_goes_first_and_of_it_the_last_block() -> None:
    node = Node([(-1, 8), (-1, 8), (-1, 8), (-1, 12)], kv_blocks=32)
    for leaf in (0, 1, 2):
        node.run(leaf, 120, 9)
    assert node.resident() == [8, 8, 8, 0] and node.e["evictions"] == 0
    assert reuse_s(node.e, node.c, float(node.e["clock_s"])) == np.inf
    assert node.q[node.run(0, 120, 9)]["hit"] == 112  # used again: now 1 is the oldest
    node.run(3, 180, 13)  # 12 blocks, of which 8 are free
    assert node.resident() == [8, 4, 8, 12] and node.e["evictions"] == 4
    kept_s = reuse_s(node.e, node.c, float(node.e["clock_s"]))
    assert kept_s == float(node.e["clock_s"]) - float(node.c.cached[1]["used_s"]) > 0


def test_what_a_running_request_uses_is_not_evicted() -> None:
    node = Node([(-1, 4), (0, 4), (-1, 10), (-1, 10)], kv_blocks=24)
    node.run(0, 60, 5)
    first = node.put(1, 80, 49)  # pins node 0
    node.advance(float(node.e["clock_s"]) + 8)
    assert node.c.cached[0]["users"] == 1
    for leaf in (2, 3):
        node.put(leaf, 150, 10)
    node.advance(1e6)
    assert node.q[first]["hit"] == 64 and node.q[first]["finish_s"] > 0
    assert node.e["evictions"] > 0


def test_a_request_needs_what_a_running_one_has_not_filled_yet() -> None:
    """Its answer will be in node 1 and the end of node 0, of which its prompt has three blocks of five."""
    node = Node(CHAT)
    node.put(1, 60, 80)
    node.advance(float(node.e["clock_s"]) + 8)
    assert node.resident() == [3, 0, 0] and node.c.cached["users"].tolist() == [1, 1, 0]
    assert demand(node.e, node.c, 2, 192) == (5 - 3) + 4 + 3
    free = int(node.e["free_blocks"])
    pin(node.e, node.c, 2, 192)
    assert free - node.e["free_blocks"] == 9


def test_who_is_preempted_finds_its_own_blocks_again() -> None:
    node = Node([(-1, 20), (-1, 20)], kv_blocks=24)
    a, b = node.put(0, 100, 200), node.put(1, 100, 200)
    node.advance(1e6)
    assert node.e["preemptions"] > 0
    assert np.isfinite(node.q[a]["finish_s"]) and np.isfinite(node.q[b]["finish_s"])
    assert node.q[b]["cached"] > 0 and node.q[b]["hit"] == 0  # at its second admission, and at its first


def test_who_leaves_in_the_middle_of_its_prefill_has_cached_what_was_computed() -> None:
    node = Node([(-1, 20)], batched=100)
    r = node.put(0, 300, 10)
    node.advance(float(node.e["clock_s"]) + 6)  # one iteration of 100 tokens takes 0.5 + 0.05 * 100 s and its pairs
    assert node.q[r]["prefill_left"] == 200
    abort(node.e, node.c, node.q, r)
    node.check()
    assert node.resident() == [6] and node.e["free_blocks"] == 100


def test_of_two_with_one_prefix_in_one_iteration_the_second_finds_it() -> None:
    node = Node([(-1, 5), (0, 3), (0, 3)])
    a, b = node.put(1, 120, 9, 1.0), node.put(2, 120, 9, 1.0)
    node.advance(1e6)
    assert (node.q[a]["hit"], node.q[b]["hit"]) == (0, 80)
    assert shared(node.e, node.c, 1, 120, 2, 120) == 80
    assert shared(node.e, node.c, 0, 50, 2, 120) == 48


def test_a_node_that_stops_has_nothing() -> None:
    node = Node(CHAT)
    node.run(0, 60, 25)
    clear(node.e, node.c)
    node.check()
    assert node.q[node.run(1, 120, 30)]["hit"] == 0


class Blocks:
    """A prefix cache that keeps single blocks by the content up to them; free ones in the order in which they go."""

    def __init__(self, count: int) -> None:
        self.count, self.used = count, dict[tuple[int, ...], int]()
        self.cached = OrderedDict[tuple[int, ...], None]()
        self.private = 0

    @property
    def free(self) -> int:
        return self.count - len(self.used) - self.private

    def find(self, path: tuple[int, ...], most: int) -> int:
        n = 0
        while n < most and (path[: n + 1] in self.used or path[: n + 1] in self.cached):
            n += 1
        return n

    def pin(self, path: tuple[int, ...], whole: int, extra: int) -> None:
        for n in range(whole):
            self.cached.pop(path[: n + 1], None)
        for n in range(whole):
            self.used[path[: n + 1]] = self.used.get(path[: n + 1], 0) + 1
        self.private += extra
        self.evict()

    def grow(self, blocks: int) -> None:
        self.private += blocks
        self.evict()

    def evict(self) -> None:
        while len(self.cached) > self.free:
            self.cached.popitem(last=False)

    def unpin(self, path: tuple[int, ...], whole: int, now_whole: int, extra: int) -> None:
        self.private -= extra
        for n in range(now_whole, 0, -1):
            key = path[:n]
            if n <= whole:
                self.used[key] -= 1
                if self.used[key] > 0:
                    continue
                del self.used[key]
            self.cached[key] = None


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_a_cache_of_single_blocks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tree: list[tuple[int, int]] = []
    for v in range(40):
        tree.append((int(rng.integers(-1, v)) if v > 2 else -1, int(rng.integers(0, 6))))
    node = Node(tree, kv_blocks=60)
    names = iter(range(10**6))
    content: list[tuple[int, ...]] = []
    for parent, blocks in tree:
        above = content[parent] if parent >= 0 else ()
        content.append(above + tuple(next(names) for _ in range(blocks)))
    leaves = set(range(40)) - {parent for parent, _ in tree}
    reference = Blocks(60)
    running: list[tuple[int, int, int]] = []  # leaf, tokens at admission, tokens now
    hits = 0
    for _ in range(2000):
        busy = {leaf for leaf, _, _ in running}
        choice = rng.random()
        if choice < 0.45:
            leaf = int(rng.integers(40))
            tokens = len(content[leaf]) * B + int(rng.integers(0, B))
            idle = [v for v in leaves - busy]
            if choice < 0.2 and idle:  # a leaf may be left before its end, and grow
                leaf = int(rng.choice(idle))
                has = int(node.c.tree[leaf]["start"] + node.c.cached[leaf]["resident"])  # it comes back with no less
                tokens = max(int(rng.integers(1, len(content[leaf]) * B + 2)), has * B)
            if leaf in busy or tokens < 1 or demand(node.e, node.c, leaf, tokens) > node.e["free_blocks"]:
                continue
            found = int(find(node.e, node.c, leaf, tokens))
            assert found == B * reference.find(content[leaf], min((tokens - 1) // B, len(content[leaf])))
            hits += found > 0
            whole = min(tokens // B, len(content[leaf]))
            pin(node.e, node.c, leaf, tokens)
            reference.pin(content[leaf], whole, -(-tokens // B) - whole)
            running.append((leaf, tokens, tokens))
        elif choice < 0.7 and running:
            k = int(rng.integers(len(running)))
            leaf, admitted, held = running[k]
            longer = held + int(rng.integers(1, 40))
            blocks = -(-longer // B) - -(-held // B)
            if leaf in leaves and longer <= len(content[leaf]) * B + B - 1 and blocks <= node.e["free_blocks"]:
                node.e["free_blocks"] -= blocks
                evict(node.e, node.c)
                reference.grow(blocks)
                running[k] = leaf, admitted, longer
        elif running:
            leaf, admitted, held = running.pop(int(rng.integers(len(running))))
            whole, now_whole = (min(tokens // B, len(content[leaf])) for tokens in (admitted, held))
            node.e["clock_s"] += 1.0
            unpin(node.e, node.c, leaf, admitted, held, held)
            reference.unpin(content[leaf], whole, now_whole, -(-held // B) - whole)
        assert node.e["free_blocks"] == reference.free
        assert node.e["cached_blocks"] == len(reference.cached)
    assert hits > 100 and node.e["evictions"] > 100
