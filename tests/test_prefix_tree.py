"""What an emulated engine caches, by the text that it gets."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from wwwserve.agents.hardware import BLOCK_TOKENS, Profile
from wwwserve.agents.kernel import records
from wwwserve.envs import prefix_tree
from wwwserve.envs.emulator_api import prompt_tokens, words
from wwwserve.envs.engine import ENGINE, JOB, MAX_SLOTS, abort, advance, reset_engine, reset_jobs, submit
from wwwserve.envs.prefix_cache import CACHED, NODE, Cache
from wwwserve.envs.prefix_tree import PrefixTree
from wwwserve.envs.prompt_blocks import block_hashes

SMALL = Profile(
    weight_s=0.01, per_seq_s=1e-4, per_kv_token_s=1e-7, prefill_base_s=0.001, per_token_s=1e-4, kv_blocks=60,
    max_num_seqs=4, max_batched_tokens=256, max_model_len=2048, source="a test",
)  # fmt: skip


def requests(rng: random.Random, count: int) -> list[tuple[float, int, int, list[bytes]]]:
    """When each comes, its prompt and output, tokens, and the hashes of its blocks: chains that part anywhere."""
    chains: list[list[bytes]] = [[]]
    made, at_s = [], 0.0
    for _ in range(count):
        at_s += rng.expovariate(4.0)
        chain = rng.choice(chains[-8:])
        chain = chain[: rng.randint(0, len(chain))] + [rng.randbytes(8) for _ in range(rng.randint(0, 9))]
        chains.append(chain)
        tokens = BLOCK_TOKENS * len(chain) + rng.randint(2, BLOCK_TOKENS - 1)
        output = rng.randint(1, min(40, tokens - 1))
        made.append((at_s, tokens - output, output, chain))
    return made


def known_before(made: list[tuple[float, int, int, list[bytes]]]) -> tuple[Cache, list[int]]:
    """The same as a tree of one block a node, all of it there from the beginning, and the leaves."""
    nodes: dict[bytes, int] = {}
    rows, leaves = [], []
    for _, _, _, chain in made:
        leaf = -1
        for k, name in enumerate(chain):
            if name not in nodes:
                nodes[name] = len(rows)
                rows.append((leaf, k, 1))
            leaf = nodes[name]
        leaves.append(leaf)
    cache = Cache(records(len(rows), NODE), records(len(rows), CACHED))
    for v, row in enumerate(rows):
        cache.tree[v] = row
    return cache, leaves


@pytest.mark.parametrize("seed", range(6))
def test_a_tree_that_grows_is_as_one_that_was_there_from_the_beginning(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests, some of which are aborted, have the same hits and times, with nodes split and removed meanwhile."""
    monkeypatch.setattr(prefix_tree, "FIRST_NODES", 32)
    rng = random.Random(seed)
    made = requests(rng, 150)
    aborted = {k for k in range(150) if rng.random() < 0.15}
    static, leaves = known_before(made)
    engines, queues = [records(1, ENGINE), records(1, ENGINE)], [records(150, JOB), records(150, JOB)]
    for engine, queue in zip(engines, queues, strict=True):
        reset_engine(engine[0], SMALL.row(), 1)
        reset_jobs(queue)
        queue["prompt"], queue["output"] = [each[1] for each in made], [each[2] for each in made]
    tree = PrefixTree(engines[1][0])
    queues[0]["leaf"] = leaves
    done = [np.zeros(150 + MAX_SLOTS, np.int64) for _ in range(2)]
    live: set[int] = set()
    sizes = []
    for k, (at_s, _, _, chain) in enumerate(made):
        counts = [
            advance(engine[0], cache, queue, at_s, found, 0)
            for engine, cache, queue, found in zip(engines, (static, tree.cache), queues, done, strict=True)
        ]
        assert counts[0] == counts[1] and done[0][: counts[0]].tolist() == done[1][: counts[1]].tolist()
        for r in done[1][: counts[1]].tolist():
            live.discard(r)
            tree.leave(int(queues[1][r]["leaf"]))
        queues[1][k]["leaf"] = tree.hang(chain)
        live.add(k)
        for engine, cache, queue in zip(engines, (static, tree.cache), queues, strict=True):
            submit(engine[0], cache, queue, k, max(at_s, float(engine[0]["clock_s"])))
        if k in aborted and live:
            r = rng.choice(sorted(live))
            for engine, cache, queue in zip(engines, (static, tree.cache), queues, strict=True):
                assert abort(engine[0], cache, queue, r)
            live.discard(r)
            tree.leave(int(queues[1][r]["leaf"]))
        for name in ("free_blocks", "cached_blocks", "evictions", "hit_tokens", "prompt_tokens", "wait_tokens", "tick"):
            assert engines[0][0][name] == engines[1][0][name], (k, name)
        sizes.append(len(tree))
    for name in ("hit", "first_token_s", "finish_s"):
        assert np.array_equal(queues[0][name], queues[1][name], equal_nan=True), name
    assert engines[1][0]["evictions"] > 50 and engines[1][0]["hit_tokens"] > 1000
    assert max(sizes) < 150  # what is not cached any more is removed
    check(tree)


def check(tree: PrefixTree) -> None:
    """Nodes tile their chains, each block is where it is said to be, and the eviction list is whole."""
    children: Counter[int] = Counter()
    for v, hashes in tree._hashes.items():
        node = tree.cache.tree[v]
        assert node["blocks"] == len(hashes) and all(tree._where[name] == v for name in hashes)
        parent = int(node["parent"])
        if parent >= 0:
            children[parent] += 1
            assert node["start"] == tree.cache.tree[parent]["start"] + tree.cache.tree[parent]["blocks"]
        else:
            assert node["start"] == 0
    assert children == +tree._children and len(tree._where) == sum(map(len, tree._hashes.values()))
    listed, v, before = 0, int(tree.engine["evict_head"]), -1
    while v >= 0:
        here = tree.cache.cached[v]
        assert here["before"] == before and here["users"] == 0 and here["resident"] > 0
        listed, before, v = listed + int(here["resident"]), v, int(here["after"])
    assert before == tree.engine["evict_tail"] and listed == tree.engine["cached_blocks"]


# Text.


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    roles = ["system"] + ["user", "assistant"] * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]} | more


def common(one: list[bytes], other: list[bytes]) -> int:
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_the_next_turn_begins_with_the_turn_before_and_its_answer() -> None:
    first = chat("you are" * 10, "x" * 333)
    answer = words(0, 77)
    blocks = block_hashes(first, True, answer, BLOCK_TOKENS)
    tokens = prompt_tokens(first, True)
    assert len(blocks) == (tokens + 77) // BLOCK_TOKENS
    second = chat("you are" * 10, "x" * 333, answer, "go on" * 50)
    assert common(blocks, block_hashes(second, True, words(0, 5), BLOCK_TOKENS)) == len(blocks)
    assert prompt_tokens(second, True) == tokens + 77 + 63
    other = chat("you are" * 10, "x" * 333, answer[:-1] + "!", "go on" * 50)
    assert common(blocks, block_hashes(other, True, "", BLOCK_TOKENS)) == (tokens + 76) // BLOCK_TOKENS


@pytest.mark.parametrize(
    "change",
    [
        {"cache_salt": "s"}, {"model": "other"}, {"tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": "x" * 400}]},
        {"messages": [{"role": "system", "content": "x" * 400, "name": "n"}]},
        {"messages": [{"role": "system", "content": "y" + "x" * 399}]},
    ],
)  # fmt: skip
def test_what_is_rendered_or_salted_otherwise_has_no_block_in_common(change: dict[str, Any]) -> None:
    asked = chat("x" * 400)
    blocks = block_hashes(asked, True, "", BLOCK_TOKENS)
    assert common(blocks, block_hashes(asked | change, True, "", BLOCK_TOKENS)) == 0
    assert common(blocks, block_hashes(asked | {"temperature": 1, "seed": 3}, True, "", BLOCK_TOKENS)) == 6


@pytest.mark.parametrize("prompt", ["é" * 200, "word " * 90, list(range(100)), [2**31, 0, 7] * 40])
def test_plain_prompts_have_as_many_blocks_as_tokens_and_go_on_with_the_answer(prompt: str | list[int]) -> None:
    tokens = prompt_tokens({"prompt": prompt}, False)
    assert len(block_hashes({"prompt": prompt}, False, words(0, 40), BLOCK_TOKENS)) == (tokens + 40) // BLOCK_TOKENS
    half = prompt[: len(prompt) // 2]
    one, other = (block_hashes({"prompt": each}, False, "z", BLOCK_TOKENS) for each in (prompt, half))
    assert common(one, other) >= len(other) - 1 > 0


def test_parts_of_a_message_count_as_the_emulator_counts_them() -> None:
    said = {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 130}, {"type": "image_url"}]},
                         {"role": "user", "content": None}, {"role": "user"}]}  # fmt: skip
    assert len(block_hashes(said, True, words(0, 100), 1)) == prompt_tokens(said, True) + 100
