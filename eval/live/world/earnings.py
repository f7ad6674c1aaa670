"""What each node of a world earns: its credit, the value of what its users got, less the work of its engine.

Credit is counted in the books of the node's honest peers, as only what they hold or will still pay is worth anything.
Work is priced by the compute of the node's marginal cost, and text that no model wrote costs nothing; a user's answer
is worth what `agents.classes.class_row` says of its tokens, times the share of the deadlines that it met. So who lets
others work for nothing is seen to gain by it, and so is who is paid for junk.
"""

from bisect import bisect_left
from collections import defaultdict
from typing import NamedTuple

from wwwserve.agents.classes import INPUT_WORTH
from wwwserve.agents.protocol import INPUT, MICRO, OUTPUT
from wwwserve.eval.live.world.nodes import Network, Node


class Earning(NamedTuple):
    """Of one node in one history, micro-credits."""

    strategy: str
    credit: int  # what honest peers paid it and owe it, less what it paid them
    value: int  # of what its own users were answered
    work: int  # of its engine
    staked: int  # what it lost of its stake; below 0: it won duels

    @property
    def total(self) -> int:
        """All of it."""
        return self.credit + self.value - self.work - self.staked


class Served:
    """What users got, by the row of their node."""

    def __init__(self, deadlines_s: tuple[float, ...]) -> None:
        self.deadlines_s = sorted(deadlines_s)
        self._value: defaultdict[int, float] = defaultdict(float)

    def answered(self, row: int, prompt: int, tokens: int, took_s: float) -> None:
        """A whole answer with so many tokens of a model, to a prompt of so many."""
        if tokens == 0:
            return
        met = 1.0 - bisect_left(self.deadlines_s, took_s) / len(self.deadlines_s)
        self._value[row] += (tokens + INPUT_WORTH * prompt) / 1000.0 * met

    def earning(self, world: Network, node: Node) -> Earning:
        """What a node has of all that happened so far."""
        credit = staked = 0
        for peer in world.nodes:
            if peer is node or not peer.honest:
                continue
            stakes = peer.ledger.stakes
            signed_twice = node.name in stakes.slashes
            staked = stakes.started.get(node.name, 0) - (0 if signed_twice else stakes.funds.get(node.name, 0))
            channel = peer.ledger.books.channels.get(node.name)
            if channel is not None:
                credit += channel.total - channel.paid_total
        compute = node.dispatcher.provider.record["compute"]
        work = compute[INPUT] * node.server.read + compute[OUTPUT] * node.server.written
        value = self._value[node.row]
        return Earning(node.strategy.name, credit, round(value * MICRO), round(float(work) * MICRO), staked)
