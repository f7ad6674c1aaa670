"""What went between nodes, counted as whoever sees all would: independent of what any of them writes down."""

import re
from collections import Counter, defaultdict
from typing import NamedTuple

from wwwserve.agents.protocol import MICRO, PER_REQUEST, milliseconds
from wwwserve.eval.live.world.engine import WORD_BYTES
from wwwserve.serving.ledger.channel_ledger import PROMPT_SLACK, due_of
from wwwserve.serving.ledger.statements import MOST_AMOUNT, PART, WHOLE, Closing, Served, Terms
from wwwserve.serving.market import Promise, Tariff

_CONTENT = re.compile(rb'"content":"([^"]*)"')
_MOST = re.compile(rb'"max_tokens":(\d+)')


def text_tokens(body: bytes) -> int:
    """Tokens of the texts in a request or an answer, or a part of one at the end of an event."""
    return sum(map(len, _CONTENT.findall(body))) // WORD_BYTES


def most_tokens(body: bytes) -> int:
    """Tokens that a request asks for at most, at least 1."""
    found = _MOST.search(body)
    return max(1, int(found[1])) if found else 1


class Got:
    """What came of one request at its origin, or of one to judge."""

    def __init__(self, tariff: Tariff, prompt: int, most: int, vote: bool = False) -> None:
        self.tariff, self.prompt, self.most, self.vote = tariff, prompt, most, vote
        self.tokens = 0
        self.taken = self.whole = False


class Truth:
    """Values are micro-credits, at the prices that were agreed on."""

    def __init__(self, payment: int, slack_s: float) -> None:
        """`slack_s`: by which an executor's clock may differ from its origin's."""
        self.payment, self.slack_s = payment, slack_s
        self.delivered: defaultdict[tuple[str, str], int] = defaultdict(int)  # by executor and origin
        # What each signed of one thing: as a judge cases of a duel, as an executor duels of one answer.
        self.signed: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        self.got: defaultdict[tuple[str, str], list[Got]] = defaultdict(list)  # by origin and executor

    def price(self, tariff: Tariff, prompt: int, tokens: int, most: int, whole: bool) -> int:
        """What tokens are worth."""
        if self.payment == PER_REQUEST:
            return MICRO if whole else MICRO * min(tokens, most) // max(most, 1)
        return (tariff[0] * prompt + tariff[2] * tokens) // 1000

    def deliver(
        self, executor: str, origin: str, tariff: Tariff, said: int, prompt: int, tokens: int, most: int,
        promise: Promise, took_s: float, whole: bool,
    ) -> None:  # fmt: skip
        """An executor sent so many tokens, to a prompt that was `said` to have so many: what is due of it at least,
        whatever was put in escrow."""
        if tokens == 0:
            return
        paid = min(said, prompt) if prompt <= said + said // 4 + PROMPT_SLACK else prompt
        took_ms = int(milliseconds(took_s + self.slack_s))
        served = Served("", paid, 0, tokens, took_ms, WHOLE if whole else PART)
        terms = Terms(tariff, paid, MOST_AMOUNT)
        self.delivered[executor, origin] += due_of(self.payment, terms, promise, served, most)

    def worth(self, origin: str, executor: str) -> int:
        """Of all that came to an origin."""
        return sum(
            self.price(got.tariff, got.prompt, got.tokens, got.most, got.whole)
            for got in self.got[origin, executor]
            if got.taken
        )


class Stated(NamedTuple):
    """By a closing or a reopening that an honest node took for good, and what was known before it; micro-credits."""

    node: str
    peer: str
    run: int
    closing: Closing
    signed: int  # what the node had settled in all
    vouched: int  # what it had acknowledged to be paid in all


class Ends:
    """What honest nodes signed of their channels, for good: written down by `nodes.WatchedLedger`."""

    def __init__(self) -> None:
        self.signed: defaultdict[tuple[str, str], int] = defaultdict(int)  # by payer and payee
        self.vouched: defaultdict[tuple[str, str], int] = defaultdict(int)  # by payee and payer
        self.receipts: Counter[tuple[str, str]] = Counter()  # by the node that has them, and its peer
        self.stated: list[Stated] = []

    def closed(self, node: str, peer: str, run: int, closing: Closing) -> None:
        """A node closes or opens a channel."""
        known = self.signed[node, peer], self.vouched[node, peer]
        self.stated.append(Stated(node, peer, run, closing, *known))

    def count(self, node: str, peer: str) -> int:
        """Closings and reopenings of a node with a peer, in all of its runs."""
        return sum((each.node, each.peer) == (node, peer) for each in self.stated)
