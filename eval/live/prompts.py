"""What users of a live network ask: prompts of made-up tokens, that share what the scenario's requests share."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.hardware import BLOCK_TOKENS
from wwwserve.envs.emulator_api import words
from wwwserve.envs.prompt_blocks import TOKEN_BYTES
from wwwserve.envs.state import MarketPlan

LOWEST_TOKEN, HIGHEST_TOKEN = 1000, 30_000  # of made-up prompts: in every vocabulary, and none of them special

Tokens = NDArray[np.uint32]


class Prompts:
    """The prompts of a plan's requests, to be asked for in the order in which the requests come.

    Each node of the tree of prefixes has tokens of its own. Where a prompt goes on with the answer to another, it has
    the words that an emulated engine answers, or what a real one `answered`.
    """

    def __init__(self, planned: MarketPlan, turn: int = 0, emulated: bool = True) -> None:
        """With another `turn`, prompts are other ones of the same lengths."""
        self.traffic, self.emulated = planned.traffic, emulated
        self._random = np.random.default_rng((planned.seed, 2, turn))
        self._nodes: dict[int, Tokens] = {}

    def tokens(self, r: int) -> list[int]:
        """The tokens of request r's prompt."""
        tree, prompt, output = self.traffic.tree, int(self.traffic.prompt[r]), int(self.traffic.output[r])
        path, v = [], int(self.traffic.leaf[r])
        while v >= 0:
            path.append(v)
            v = int(tree.parent[v])
        parts = []
        for v in reversed(path):
            if v not in self._nodes:
                start, blocks = BLOCK_TOKENS * int(tree.start[v]), BLOCK_TOKENS * int(tree.blocks[v])
                self._nodes[v] = self._made(start, start + blocks, prompt, output)
            parts.append(self._nodes[v])
        known: Tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
        made: list[int] = np.concatenate([known, self._made(len(known), prompt, prompt, output)])[:prompt].tolist()
        return made

    def answered(self, r: int, said: Sequence[int]) -> None:
        """Request r, whose prompt was asked for, was answered with these tokens."""
        tree, prompt, v = self.traffic.tree, int(self.traffic.prompt[r]), int(self.traffic.leaf[r])
        while v >= 0 and BLOCK_TOKENS * int(tree.start[v] + tree.blocks[v]) > prompt:
            first = BLOCK_TOKENS * int(tree.start[v])
            low, high = max(first, prompt), min(first + len(self._nodes[v]), prompt + len(said))
            if low < high:
                self._nodes[v][low - first : high - first] = said[low - prompt : high - prompt]
            v = int(tree.parent[v])

    def _made(self, start: int, end: int, prompt: int, output: int) -> Tokens:
        """Tokens from `start` to before `end` of a request whose answer of `output` begins after `prompt`."""
        asked = max(0, min(end, prompt) - start)
        drawn = self._random.integers(LOWEST_TOKEN, HIGHEST_TOKEN, max(0, end - start)).astype(np.uint32)
        if self.emulated and end > prompt:
            first = max(0, start - prompt)
            said = words(0, end - prompt).encode() + (b"\0" if end - prompt == output else b" ")
            drawn[asked:] = np.frombuffer(said, "<u4")[first:]
        return drawn


assert np.dtype(np.uint32).itemsize == TOKEN_BYTES
