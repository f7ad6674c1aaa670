"""How many tokens the text of answers has, and whether a peer bills more than that."""

import math

import numpy as np

# The peer may bill so many more tokens for its text than the own engine counts as texts differ by chance, a quarter at
# most, and a few more. Chance has no side: the more text, the less of it is left of their sum.
RATE_SLACK, RATE_TOKENS = 1.25, 64
RATE_DEVIATIONS = 4.0
RATE_SPREAD = 0.1  # least standard deviation of the tokens of a text, as a share of those expected
RATE_BYTES = 20_000  # of text of the own engine, before which peers are not compared with it, and of a peer, with peers
RATE_AGEING = 0.999  # for each answer
USUAL_BYTES = 4  # of text for a token; of what is billed beyond it no more than the exposure is paid before that


class Billed:
    """What a peer billed."""

    def __init__(self) -> None:
        self.tokens = self.text_bytes = 0
        self.expected = self.expected_here = 0.0  # tokens, of the latter by the own engine alone
        self.squares = 0.0  # of the bytes of each answer, summed
        self.over = 0  # tokens too many so far
        self.early_bytes = 0  # before it was known how many tokens were to be expected,
        self.early_more = 0  # and what they cost more than usual text, in thousandths of a micro-credit


class TokenRate:
    """Tokens of answers for the bytes of their text: as the own engine counts them, and as each peer bills them.

    A peer's sum is held against the own engine's ratio, with the error of a ratio estimate (Cochran, Sampling
    Techniques, 6.4), the deviation of a text being proportional to its length. Where most other peers bill more for
    what goes out than the own engine does for what stays, as those may be other texts, they are the measure.
    """

    def __init__(self) -> None:
        self._own = np.zeros(2)  # tokens and bytes,
        self._products = np.zeros((2, 2))  # and the products of the two of each answer, summed
        self._billed: dict[str, Billed] = {}

    @property
    def known(self) -> bool:
        """Whether the own engine has shown how many tokens text has."""
        return float(self._own[1]) >= RATE_BYTES

    def counted(self, tokens: int, text_bytes: int) -> None:
        """Of an answer of the own engine."""
        if text_bytes:
            answer = np.array([tokens, text_bytes], np.float64)
            self._own = RATE_AGEING * self._own + answer
            self._products = RATE_AGEING**2 * self._products + np.outer(answer, answer)

    def billed(self, peer: str, tokens: int, text_bytes: int, price: int, before: int = 0) -> int:
        """Of an answer of a peer, or a part of one after `before` bytes, at a price for 1000 tokens; returns by how
        many tokens more it has billed too many in all, beyond what differs from text to text."""
        if text_bytes == 0:
            return 0
        of = self._billed.setdefault(peer, Billed())
        of.tokens += tokens
        of.text_bytes += text_bytes
        of.squares += float((before + text_bytes) ** 2 - before**2)
        of.early_bytes += text_bytes
        if not self.known:
            of.early_more += price * (USUAL_BYTES * tokens - text_bytes) // USUAL_BYTES
            return 0
        here = of.early_bytes * float(self._own[0] / self._own[1])
        of.expected_here += here
        of.expected += here * self._usual(peer)
        of.early_bytes = of.early_more = 0
        slack = min((RATE_SLACK - 1.0) * of.expected, self._chance(of))
        more = max(0, math.ceil(of.tokens - of.expected - slack - RATE_TOKENS - of.over))
        of.over += more
        return more

    def _usual(self, peer: str) -> float:
        """How many times as many tokens as here most of the other peers bill, with this node among them: 1 at least,
        and no more than one text may differ, as most of them may be of one hand."""
        ratios = [
            each.tokens / each.expected_here
            for name, each in self._billed.items()
            if name != peer and each.text_bytes >= RATE_BYTES and each.expected_here > 0.0
        ]
        ordered = sorted([1.0, *ratios])
        return min(max(1.0, ordered[(len(ordered) - 1) // 2]), RATE_SLACK)

    def _chance(self, of: Billed) -> float:
        """By how many tokens a peer's sum may be off by chance, and that of the own engine by which it is measured."""
        rate, squares = float(self._own[0] / self._own[1]), float(self._products[1, 1])
        turn = np.array([1.0, -rate])
        spread = math.sqrt(max(0.0, float(turn @ self._products @ turn)) / squares)  # tokens a byte
        of_own = squares * (of.text_bytes / float(self._own[1])) ** 2
        return RATE_DEVIATIONS * max(spread, RATE_SPREAD * rate) * math.sqrt(of.squares + of_own)

    def doubted(self, peer: str) -> int:
        """What a peer was paid for more tokens than usual text has, micro-credits, while it is not known how many this
        text has."""
        of = self._billed.get(peer)
        return max(0, of.early_more // 1000) if of is not None and not self.known else 0
