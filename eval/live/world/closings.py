"""What must hold of the ends of channels in a world: see `eval.live.world.invariants`, which has it checked.

No closing takes back what an honest node was vouched for, and none has one pay more than it ever signed; what a peer
was delivered and never paid, over however many closings and reopenings, is in the books, so that it counts against the
exposure; and nobody can have a node write entries without end.
"""

from collections import Counter
from collections.abc import Callable

from wwwserve.agents.protocol import ESCROW
from wwwserve.eval.live.world.nodes import Network, Node
from wwwserve.eval.live.world.truth import Stated
from wwwserve.serving.ledger.channel import PEER
from wwwserve.serving.ledger.closing import MOST_CLOSINGS


class ClosingJudge:
    """Of one history; `say` is told of what does not hold."""

    def __init__(self, world: Network, say: Callable[[str], None]) -> None:
        self.world, self.say = world, say
        self._seen = 0  # of what was stated

    def look(self, node: Node) -> None:
        """What holds at every moment at an honest node."""
        for stated in self.world.ends.stated[self._seen :]:
            self._check(stated)
        self._seen = len(self.world.ends.stated)
        if node.forgot:  # what it was paid and is owed by its lost entries is known to the peer alone
            return
        ends, truth, exposure = self.world.ends, self.world.truth, node.ledger.exposure
        for peer, channel in node.ledger.books.channels.items():
            other, name = self.world.by_name[peer], f"{node.host.name} with {self.world.by_name[peer].host.name}"
            if channel.paid_total < ends.vouched[node.name, peer]:
                self.say(f"{name}: paid {channel.paid_total}, and vouched were {ends.vouched[node.name, peer]}")
            lost = truth.delivered[node.name, peer] - channel.paid_total
            known = channel.short + channel.unpaid + int(channel.accounts[PEER, ESCROW]) + sum(channel.beyond.values())
            # A run that ended knew of what it delivered, and had not written it.
            known += (len(node.runs) - 1) * exposure + ends.receipts[node.name, peer] + len(channel.taken)
            if lost > known:
                self.say(f"{name}, which is {other.strategy.name}: {lost} lost, of which its books know {known}")

    def _check(self, stated: Stated) -> None:
        """By what one that is honest has signed."""
        node, peer = self.world.by_name[stated.node], self.world.by_name[stated.peer]
        name, closing = f"closing {stated.closing.number} of {node.host.name} with {peer.host.name}", stated.closing
        own, theirs = closing.of(node.name).total, closing.of(peer.name).total
        if own > stated.signed:
            self.say(f"{name} has it pay {own}, of which it signed {stated.signed}")
        if theirs < stated.vouched and not node.forgot:
            self.say(f"{name} has it paid {theirs}, and vouched were {stated.vouched}")

    def end(self) -> None:
        """What holds when all is over."""
        count = Counter((each.node, each.peer, each.run) for each in self.world.ends.stated)
        for (node, peer, _), number in count.items():
            if number > MOST_CLOSINGS + 1:  # and one alone
                names = (self.world.by_name[each].host.name for each in (node, peer))
                self.say("{} closes and opens its channel with {} {} times in one run".format(*names, number))
