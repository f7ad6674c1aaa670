"""What live users ask shares as much as the requests of the scenario do."""

import itertools

import numpy as np
import pytest

from wwwserve.agents.hardware import BLOCK_TOKENS
from wwwserve.envs.emulator_api import words
from wwwserve.envs.prompt_blocks import block_hashes
from wwwserve.envs.scenario import parse
from wwwserve.envs.state import MarketPlan, plan
from wwwserve.eval.live.prompts import HIGHEST_TOKEN, LOWEST_TOKEN, Prompts

SESSIONS = {
    "kind": "sessions", "rate_per_s": 0.3, "system_tokens": 100, "turns": {"median": 4, "sigma": 0.5, "max": 9},
    "turn": {"median": 60, "sigma": 0.8, "max": 300}, "think_s": {"median": 2, "sigma": 0.5, "max": 60},
}  # fmt: skip
POISSON = {"kind": "poisson", "phases": [{"until_s": 60, "rate_per_s": 0.5}]}


def planned(traffic: dict[str, object], seed: int = 3) -> MarketPlan:
    lengths = {"output": {"median": 60, "sigma": 0.6, "max": 200}}
    providers = [{"name": "a", "traffic": traffic}, {"name": "b", "traffic": traffic}]
    return plan(parse({"name": "s", "duration_s": 60, "defaults": {"lengths": lengths}, "providers": providers}), seed)


def shared(made: MarketPlan, a: int, b: int) -> int:
    """Blocks that the paths of two requests have in common."""
    tree = made.traffic.tree

    def path(r: int) -> dict[int, int]:
        found, v = {}, int(made.traffic.leaf[r])
        while v >= 0:
            found[v] = int(tree.start[v]) + int(tree.blocks[v])
            v = int(tree.parent[v])
        return found

    one, other = path(a), path(b)
    return max((end for v, end in one.items() if v in other), default=0)


def test_prompts_have_in_common_what_the_tree_says_and_go_on_with_the_answers() -> None:
    made = planned(SESSIONS)
    traffic, prompts = made.traffic, Prompts(made)
    count = traffic.time_s.size
    order = sorted(range(count), key=lambda r: (int(traffic.turn[r]), r))  # each after the one that it follows
    hashes: dict[int, list[bytes]] = {}
    for r in order:
        tokens = prompts.tokens(r)
        assert len(tokens) == traffic.prompt[r] > 0
        hashes[r] = block_hashes({"prompt": tokens}, False, words(0, int(traffic.output[r])), BLOCK_TOKENS)
    followed = 0
    for a, b in itertools.combinations(range(count), 2):
        common = next((k for k, (x, y) in enumerate(zip(hashes[a], hashes[b], strict=False)) if x != y), None)
        if common is None:
            common = min(len(hashes[a]), len(hashes[b]))
        assert common == min(shared(made, a, b), len(hashes[a]), len(hashes[b])), (a, b)
        followed += int(traffic.follows[b]) == a and common > traffic.prompt[a] // BLOCK_TOKENS
    assert followed > 10  # turns whose prompt has the answer before in it


def test_another_turn_asks_otherwise_and_real_engines_get_tokens_of_their_vocabulary() -> None:
    made = planned(SESSIONS)
    first = int(np.argmin(made.traffic.time_s))
    one, other = Prompts(made, 0).tokens(first), Prompts(made, 1).tokens(first)
    assert len(one) == len(other) and not set(zip(one, other, strict=True)) & {(t, t) for t in one}
    real = Prompts(made, emulated=False)
    for r in range(made.traffic.time_s.size):
        assert all(LOWEST_TOKEN <= token < HIGHEST_TOKEN for token in real.tokens(r))


def test_prompts_go_on_with_what_a_real_engine_answered() -> None:
    made = planned(SESSIONS)
    traffic, prompts = made.traffic, Prompts(made, emulated=False)
    checked = 0
    for r in sorted(range(traffic.time_s.size), key=lambda r: (int(traffic.turn[r]), r)):
        asked, u = prompts.tokens(r), int(traffic.follows[r])
        if u >= 0:
            whole = int(traffic.prompt[u] + traffic.output[u]) // BLOCK_TOKENS * BLOCK_TOKENS
            said = asked[int(traffic.prompt[u]) : whole]
            assert said == [40_000 + u] * len(said)
            checked += len(said)
        prompts.answered(r, [40_000 + r] * int(traffic.output[r]))
    assert checked > 500


@pytest.mark.parametrize("seed", [1, 2])
def test_requests_that_share_nothing_have_nothing_in_common(seed: int) -> None:
    made = planned(POISSON, seed)
    prompts = Prompts(made)
    told = [prompts.tokens(r) for r in range(made.traffic.time_s.size)]
    assert [len(each) for each in told] == made.traffic.prompt.tolist()
    assert len({tuple(each[:4]) for each in told}) == len(told)
