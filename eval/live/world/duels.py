"""What must hold of duels and stakes in a world: see `eval.live.world.invariants`, which has it checked.

No honest node loses stake by a verdict, as adversaries have at most a third of it; no verdict makes or destroys any; of
one duel an honest judge votes on one case, and an honest executor puts its name to one answer in one duel; and all who
have heard of the same come to the same, whatever they heard first.
"""

from collections.abc import Callable

from wwwserve.eval.live.world.nodes import Network, Node
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.verdicts import Verdict


class DuelJudge:
    """Of one history; `say` is told of what does not hold."""

    def __init__(self, world: Network, say: Callable[[str], None]) -> None:
        self.world, self.say = world, say
        self.judged: set[str] = set()  # duels of which some node has a verdict

    def look(self, node: Node) -> None:
        """What holds at every moment at an honest node."""
        name, stakes = node.host.name, node.ledger.stakes
        if sum(stakes.funds.values()) != sum(stakes.started.values()) or min(stakes.funds.values()) < 0:
            self.say(f"{name}: stake is not conserved: {stakes.funds}")
        for loser, kind in stakes.losses():
            if kind == "verdict" and self.world.by_name[loser].honest:
                self.say(f"{name}: {self.world.by_name[loser].host.name} lost a duel, and answered as it should")
        self.judged.update(duel for duel, slash in stakes.slashes.items() if isinstance(slash, Verdict))

    def end(self, honest: list[Node]) -> None:
        """What holds when all is over."""
        for (name, what), signed in self.world.truth.signed.items():
            by = self.world.by_name[name]
            if by.honest and len(by.runs) == 1 and len(signed) > 1:  # what it kept in memory is gone with its run
                self.say(f"{by.host.name} signed {len(signed)} times, what it may once, of {what}")
        first = honest[0].ledger.stakes if honest else None
        for node in honest:
            stakes = node.ledger.stakes
            assert first is not None
            if stakes.slashes.keys() != first.slashes.keys() or sorted(stakes.losses()) != sorted(first.losses()):
                self.say(f"{node.host.name} and {honest[0].host.name} know of other verdicts")
            elif stakes.funds != first.funds:
                self.say(f"{node.host.name} and {honest[0].host.name} come to other stakes by the same verdicts")
            other = Stakes(stakes.started, agreed=True)
            for slash in reversed(stakes.slashes.values()):
                other.heard(slash)
            if other.funds != stakes.funds:
                self.say(f"{node.host.name} would come to other stakes had it heard verdicts in another order")
            for peer in honest if self.world.agreed.duels else ():
                known, own = stakes.latest.get(peer.name), peer.ledger.stakes.latest.get(peer.name)
                if known != own:
                    self.say(f"{node.host.name} does not know what {peer.host.name} has at stake")
