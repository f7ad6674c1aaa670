"""What must hold in a world whatever happens there: checked while a history goes on, and at its end.

Honest nodes are judged, by their books and by `eval.live.world.truth`; of adversaries only what honest ones lose to
them.
"""

import logging
from typing import NamedTuple

from wwwserve.agents.protocol import ESCROW
from wwwserve.eval.live.simulation.loop import current
from wwwserve.eval.live.world.closings import ClosingJudge
from wwwserve.eval.live.world.duels import DuelJudge
from wwwserve.eval.live.world.engine import MARK, WORD_BYTES, word
from wwwserve.eval.live.world.nodes import Network, Node
from wwwserve.serving.http.sse import LAST_EVENT
from wwwserve.serving.ledger.audit import Audit, audit_entries, compare, settled
from wwwserve.serving.ledger.channel import OWN, PEER
from wwwserve.serving.ledger.channel_ledger import MOST_UNACKED, tolerated
from wwwserve.serving.ledger.verdicts import Conflict, Twice

MOST_SAID = 20  # violations of one history
MOST_TASKS = 200  # of one node, with the requests of a history
IDLE_TASKS = 30  # of one node, when all is over


class Dealing(NamedTuple):
    """What an honest node lost to a peer, and what went between the two; micro-credits."""

    adversary: str  # the peer's strategy; "honest"
    exposure: int
    runs: int  # of the honest node, each of which may lose as much
    as_executor: int  # delivered and not paid; below 0: it was paid more
    as_origin: int  # paid for what did not come; below 0: more came than was paid
    tolerated: int  # of either
    income: int  # what the peer was paid by the honest node
    spent: int  # what the peer paid it
    closings: int  # of their channel, and reopenings

    @property
    def lost(self) -> int:
        """The most that was lost in one role."""
        return max(0, self.as_executor, self.as_origin)

    @property
    def gain(self) -> int:
        """What the peer has of it: what was paid to it and not earned, and what it got and did not pay."""
        return self.as_executor + self.as_origin


class Judge:
    """Of one history."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.world: Network
        self.duels: DuelJudge
        self.closings: ClosingJudge

    def begin(self, world: Network) -> None:
        """Judge this one."""
        self.world, self.duels, self.closings = world, DuelJudge(world, self.say), ClosingJudge(world, self.say)

    def say(self, violation: str) -> None:
        """Something does not hold."""
        if violation not in self.found and len(self.found) < MOST_SAID:
            self.found.append(violation)

    def logged(self, record: logging.LogRecord) -> None:
        """A node met an error that nobody handled."""
        process = current()
        guilty = process is not None and not self._node(process.name).honest
        if (record.exc_info or record.name.startswith("asyncio")) and not guilty:
            what = repr(record.exc_info[1]) if record.exc_info else record.getMessage()
            self.say(f"{process.name if process else 'the loop'} logs: {record.getMessage()}: {what}")

    def _node(self, host: str) -> Node:
        return next(node for node in self.world.nodes if node.host.name == host)

    @property
    def honest(self) -> list[Node]:
        """The nodes that are judged."""
        return [node for node in self.world.nodes if node.honest]

    # Answers.

    def answered(self, number: int, output: int, stream: bool, status: int, body: bytes) -> str:
        """A user got a response; returns what it is."""
        self.check_words(number, body)
        if status != 200:
            return f"status {status}"
        if stream and b'"error"' in body:
            return "error in the stream"
        if stream and not body.endswith(LAST_EVENT):
            self.say(f"request {number}: the stream ends without its last event: {body[-80:]!r}")
        words = body.count(MARK)
        if all(node.honest for node in self.world.nodes) and words != output:
            self.say(f"request {number}: {words} of {output} tokens came")
        return "answered"

    def check_words(self, number: int, body: bytes) -> None:
        """Whether an answer has words of another request."""
        own = word(number).encode()
        if body.count(own) != body.count(MARK):
            at = next(
                k for k in range(len(body)) if body[k : k + 1] == MARK and body[k : k + WORD_BYTES] != own
            )  # fmt: skip
            self.say(f"request {number} got a word of another one: {body[at : at + WORD_BYTES]!r}")

    # While it goes on.

    def look(self) -> None:
        """What holds at every moment."""
        for node in self.honest:
            if not node.host.up:
                continue
            process = node.host.process
            if process is not None and process.tasks > MOST_TASKS:
                self.say(f"{node.host.name} has {process.tasks} tasks")
            for peer, channel in node.ledger.books.channels.items():
                balance, name = channel.balance(peer), f"{node.host.name} with {self.world.by_name[peer].host.name}"
                if min(balance[2:]) < 0 or sum(balance[2:]) != balance.opened:
                    self.say(f"{name}: credit is not conserved: {balance}")
                most = node.ledger.exposure
                if channel.accounts[OWN, ESCROW] > most or channel.accounts[PEER, ESCROW] > most:
                    self.say(f"{name}: more is in escrow than {most}: {balance}")
            self.duels.look(node)
            self.closings.look(node)
        for node, dealing in self._dealings():
            self._check_loss(node, dealing)

    def _check_loss(self, node: Node, dealing: Dealing) -> None:
        if node.forgot:  # what it earned by its lost entries is known to the peer alone
            return
        most = dealing.runs * dealing.exposure + dealing.tolerated
        for lost, role in ((dealing.as_executor, "executor"), (dealing.as_origin, "origin")):
            if lost > most:
                self.say(
                    f"{node.host.name} lost {lost} as {role} to one that is {dealing.adversary}, its exposure is "
                    f"{dealing.exposure} in each of {dealing.runs} runs, and {dealing.tolerated}"
                )

    def _dealings(self) -> list[tuple[Node, Dealing]]:
        found, truth = [], self.world.truth
        for node in self.honest:
            for peer, channel in node.ledger.books.channels.items():
                other, exposure = self.world.by_name[peer], node.ledger.exposure
                found.append(
                    (
                        node,
                        Dealing(
                            other.strategy.name, exposure, len(node.runs),
                            truth.delivered[node.name, peer] - channel.paid_total,
                            channel.total - truth.worth(node.name, peer),
                            max(tolerated(0, channel.paid_total), tolerated(0, channel.total)) + len(channel.taken)
                            + self.world.ends.receipts[node.name, peer],
                            channel.total, channel.paid_total, self.world.ends.count(node.name, peer),
                        ),
                    )
                )  # fmt: skip
        return found

    def dealings(self) -> list[Dealing]:
        """Of all honest nodes with all of their peers."""
        return [dealing for node, dealing in self._dealings() if not node.forgot]

    # In the end.

    def is_quiet(self) -> bool:
        """Whether nothing is under way between honest nodes."""
        return all(node.host.up for node in self.honest) and not any(self._busy(node) for node in self.honest)

    def _busy(self, node: Node) -> str:
        """What a node is still at; "" for nothing."""
        of, ledger = node.dispatcher, node.ledger
        counts = {
            "held": of.provider.held, "in the engine": len(of.execution.here), "handed over": len(of.delegation.handed),
            "offered": len(of.delegation.under_way), "of peers": of.metrics.remote_now,
            "in its ledger": len(ledger._running), "not written": ledger._added - ledger._written,
            "duels": of.delegation.duels.open,
        }  # fmt: skip
        honest = {each.name for each in self.honest}
        counts["told again"] = len(honest & ledger._reconciler.again.keys())
        if of.accounts is not None:
            counts["not heard again"] = len(honest - of.accounts._there - {node.name})  # they are told once they are
            counts["untold"] = sum(len(of.accounts._untold.get(name, ())) for name in honest)
        for peer, channel in ledger.books.channels.items():
            counts["in escrow"] = counts.get("in escrow", 0) + len(channel.open)
            if peer in honest:
                counts["to close"] = counts.get("to close", 0) + bool(channel.leaving_ms or not channel.is_agreed)
                counts["to refill"] = counts.get("to refill", 0) + (peer in ledger.refills.due)
                counts["taken"] = counts.get("taken", 0) + len(channel.taken)
                counts["not acknowledged"] = counts.get("not acknowledged", 0) + len(channel.unacked)
                counts["not reconciled"] = counts.get("not reconciled", 0) + (not ledger.is_reconciled(peer))
                unconfirmed = channel.number > 0 and peer not in ledger._reconciler.confirmed and not channel.is_closed
                counts["not confirmed"] = counts.get("not confirmed", 0) + unconfirmed
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)

    def end(self) -> None:
        """What holds when all is over."""
        self.look()
        for error in self.world.network.errors:
            self.say(f"an application raised {error!r}")
        audits: list[Audit] = []
        for node in self.honest:
            self._end_node(node)
            journal = node.host.disk.journal(node.name)
            found = audit_entries(journal, node.name, [])
            audits.append(found)
            for problem in found.problems:
                self.say(f"journal of {node.host.name}: {problem}")
            if (found.books.encode() != node.ledger.books.encode()) and node.host.up:
                self.say(f"{node.host.name} believes other than its journal says")
        for k, one in enumerate(audits):
            for other in audits[:k]:
                pair = f"{self.honest[k].host.name} and {self.world.by_name[other.owner].host.name}"
                if self._have_no_channel(one.owner, other.owner):
                    continue
                for problem in compare(one, other):
                    self.say(f"{pair}: {problem}")
                if not settled(one, other) and not self._wants_to_know_nothing(one.owner, other.owner):
                    self.say(f"{pair}: they own different amounts, or something is under way")
        self.closings.end()
        self.duels.end([node for node in self.honest if node.host.up])

    def _have_no_channel(self, *pair: str) -> bool:
        """Whether two never opened a channel, and one of them wants none."""
        names = (pair, pair[::-1])
        ledgers = [(self.world.by_name[name].ledger, peer) for name, peer in names]
        none = all(peer not in ledger.books.channels for ledger, peer in ledgers)
        return none and any(peer in ledger.closer.wanted for ledger, peer in ledgers)

    def _wants_to_know_nothing(self, one: str, other: str) -> bool:
        """Whether one of two that are to have no channel has forgotten that it was closed: nobody tells it again."""
        for node, peer in ((self.world.by_name[one], other), (self.world.by_name[other], one)):
            there = self.world.by_name[peer].ledger.books.channels.get(node.name)
            over = there is None or (there.is_closed and there.is_agreed)
            if node.forgot and peer not in node.ledger.books.channels and peer in node.ledger.closer.wanted and over:
                return True
        return False

    def _end_node(self, node: Node) -> None:
        name = node.host.name
        for error in node.errors:
            self.say(f"{name}: a task ended with {error!r}")
        if not node.host.up:
            self.say(f"{name} is not there")
        elif busy := self._busy(node):
            self.say(f"{name} is not done: {busy}")
        elif node.host.process is not None and node.host.process.tasks > IDLE_TASKS:
            self.say(f"{name} has {node.host.process.tasks} tasks, and nothing to do")
        if node.server.running or node.server.waiting:
            self.say(f"{name}: its engine is at {len(node.server.running)} requests that nobody waits for")
        for run in node.runs:
            totals = run.metrics.totals()
            ended = totals["answered"] + totals["failed"] + totals["cancelled"]
            if totals["accepted"] != ended:
                self.say(f"{name} accepted {totals['accepted']} requests, and {ended} ended")
        for peer, channel in node.ledger.books.channels.items():
            other = self.world.by_name[peer]
            if channel.conflict and other.honest:
                self.say(f"{name} has {other.host.name} signed two vouchers of one number")
            if len(channel.unacked) > MOST_UNACKED:
                self.say(f"{name} has {len(channel.unacked)} receipts that {other.host.name} does not acknowledge")
        withheld = any(each.withholds for each in self.world.strategies)
        for guilty in self._accused(node):
            if guilty.honest and not (guilty.forgot and withheld):
                self.say(f"{name} has evidence against {guilty.host.name}, which did nothing")

    def _accused(self, node: Node) -> list[Node]:
        """Of whom a node knows that they signed what contradicts itself."""
        slashes = node.ledger.stakes.slashes.values()
        return [self.world.by_name[each.culprit] for each in slashes if isinstance(each, Conflict | Twice)]
