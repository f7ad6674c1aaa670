"""What must hold at the end of a soak: by the honest nodes' journals and logs, and by what their witnesses saw."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from wwwserve.agents.protocol import MICRO
from wwwserve.eval.live.soak import witness
from wwwserve.eval.live.soak.nodes import SPEED, Node
from wwwserve.serving.config import MarketConfig
from wwwserve.serving.duel.messages import JUDGED_IN
from wwwserve.serving.ledger.accounts import slack_ms
from wwwserve.serving.ledger.audit import Audit, audit, compare, evidence, settled
from wwwserve.serving.ledger.channel_ledger import micro, tolerated
from wwwserve.serving.ledger.entries import Noted, Settled
from wwwserve.serving.ledger.genesis import load
from wwwserve.serving.ledger.journal import SqliteJournal
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import WHOLE, Receipt
from wwwserve.serving.ledger.verdicts import Verdict
from wwwserve.serving.ledger.verdicts import decode as decode_stake

MOST_MB = 400.0  # resident memory of a node
TRACES = (b"Traceback (most recent call last)", b'"exception":')
MOST_SAID = 5  # stack traces
SLACK_MS = slack_ms(MarketConfig().rtt_s, SPEED)


class Checks:
    """Of one run, whose nodes have ended."""

    def __init__(self, nodes: Sequence[Node], exposure: float, genesis: Path) -> None:
        self.honest = [node for node in nodes if node.honest]
        self.others = [node for node in nodes if not node.honest]
        self.exposure, self.genesis = micro(exposure), genesis
        self.names = {node.key: node.name for node in nodes}
        self.problems: list[str] = []
        self.audits: dict[str, Audit] = {}
        self.seen = {node.key: witness.read(node.seen) for node in self.honest}

    def all(self) -> dict[str, Any]:
        """What was found."""
        for node in self.honest:
            found = self.audits[node.key] = audit(node.ledger)
            self.problems += [f"{node.name}: {problem}" for problem in found.problems]
        channels = [channel for each in self.audits.values() for channel in each.books.channels.values()]
        return {
            "channels_that_agree": self._agreed(),
            "billed_twice": self._billed_twice(),
            "receipts": sum(channel.number for channel in channels),
            "paid_credits": sum(channel.total for channel in channels) / MICRO,
            "entries": sum(each.entries for each in self.audits.values()),
            "to_the_malicious": [self._lost(node, other) for node in self.honest for other in self.others],
            "evidence": self._evidence(),
            "duels": sum(len(each.duels) for each in self.seen.values()),
            "verdicts": self._verdicts(),
            "memory_mb": self._memory(),
            "stack_traces": self._traces(),
        }

    def _agreed(self) -> int:
        agreed = 0
        for k, node in enumerate(self.honest):
            for peer in self.honest[k + 1 :]:
                one, other = self.audits[node.key], self.audits[peer.key]
                differ = compare(one, other)
                if not differ and not settled(one, other):
                    differ = ["the two do not own the same by either's account"]
                self.problems += [f"{node.name} and {peer.name}: {each}" for each in differ]
                agreed += not differ
        return agreed

    def _billed_twice(self) -> int:
        """Of requests, no two of which are alike, those that have more receipts for a whole answer than they may: one,
        in a duel one of each executor, of a judge one for its vote."""
        duels = {request for each in self.seen.values() for request in each.duels}
        paid: Counter[tuple[str, str]] = Counter()
        executors: dict[str, set[str]] = {}
        for node in self.honest:
            for peer, receipt in settled_in(node.ledger):
                if receipt.served.came == WHOLE:
                    paid[receipt.request, peer] += 1
                    if receipt.promise != JUDGED_IN:
                        executors.setdefault(receipt.request, set()).add(peer)
        twice = [f"{request} by {self.names[peer]}" for (request, peer), times in paid.items() if times > 1]
        twice += [
            f"{request} by {len(peers)} peers"
            for request, peers in executors.items()
            if len(peers) > 1 + (request in duels)
        ]
        self.problems += [f"a request was paid for twice: {each}" for each in twice]
        return len(twice)

    def _lost(self, node: Node, other: Node) -> dict[str, Any]:
        """What an honest node lost to the malicious one, credits: by its witness in either role, and by its own books,
        which have it trade no more once that comes to the exposure and a fiftieth of what was paid."""
        channel = self.audits[node.key].books.channels.get(other.key)
        if channel is None:
            return {"node": node.name}
        seen = self.seen[node.key]
        lost = {
            "as_executor": seen.delivered[other.key] - channel.paid_total,
            "as_origin": channel.total - seen.came[other.key],
        }
        for role, amount in lost.items():
            paid = channel.paid_total if role == "as_executor" else channel.total
            if amount > node.lives * self.exposure + tolerated(0, paid):
                self.problems.append(f"{node.name} lost {amount} {role.replace('_', ' ')} in {node.lives} runs")
        # What goes on when the bound is reached is within the exposure as well, so the books may show twice as much.
        if channel.short > tolerated(2 * self.exposure, channel.paid_total):
            self.problems.append(f"{node.name} went on with {channel.short} that it was not paid")
        return {
            "node": node.name, "runs": node.lives, "exposure": self.exposure / MICRO,
            **{role: amount / MICRO for role, amount in lost.items()}, "paid": channel.total / MICRO,
            "earned": channel.paid_total / MICRO, "short": channel.short / MICRO, "over": channel.over / MICRO,
        }  # fmt: skip

    def _evidence(self) -> dict[str, int]:
        """Evidence between honest nodes, by kind. A fault explains a payment that is short where the payer did not see
        the end of an answer, or measured a longer time: it died, was frozen or cut off. Nothing explains another."""
        found: Counter[str] = Counter()
        for node in self.honest:
            for note in evidence(node.ledger):
                if note.peer not in self.audits:
                    continue
                explained = note.kind == "short" and self._explained(note)
                found[f"{note.kind}, {'explained' if explained else 'not explained'}"] += 1
                if not explained:
                    peer = self.names[note.peer]
                    self.problems.append(f"{node.name} has evidence against {peer}: {note.kind} {note.content[:600]}")
        return dict(found)

    @staticmethod
    def _explained(note: Noted) -> bool:
        delivered, receipt = msgspec.json.decode(note.content)
        mine, its = delivered["served"], receipt["served"]
        return bool(its["came"] != WHOLE or its["took_ms"] > mine["took_ms"] + SLACK_MS)

    def _verdicts(self) -> dict[str, Any]:
        """What the honest nodes hold of who lost stake."""
        known: list[list[tuple[str, str]]] = []
        for node in self.honest:
            *earlier, funds = load(self.genesis).funds()
            stakes = Stakes(funds, agreed=True, earlier=earlier)
            for statement in self.audits[node.key].books.statements:
                stakes.heard(decode_stake(statement))
            known.append(sorted(stakes.losses()))
            for loser, kind in stakes.losses():
                if loser in self.audits:
                    self.problems.append(f"{node.name} has {self.names[loser]} convicted by {kind}")
            count = sum(isinstance(slash, Verdict) for slash in stakes.slashes.values())
            left = {self.names[other.key]: stakes.funds[other.key] / MICRO for other in self.others}
        if any(each != known[0] for each in known):
            self.problems.append(f"the honest nodes know of other losses: {known}")
        return {"count": count, "lost": [(self.names[who], kind) for who, kind in known[0]], "funds_left": left}

    def _memory(self) -> dict[str, float]:
        found = {node.name: round(node.most_mb, 1) for node in (*self.honest, *self.others)}
        self.problems += [f"{node.name} had {node.most_mb:.0f} MB" for node in self.honest if node.most_mb > MOST_MB]
        return found

    def _traces(self) -> int:
        count = 0
        for node in self.honest:
            for line in node.programs.log(node.name).read_bytes().splitlines():
                if any(trace in line for trace in TRACES):
                    count += 1
                    if count <= MOST_SAID:
                        self.problems.append(f"the log of {node.name} has a stack trace: {line[:2000].decode()}")
        return count


def settled_in(ledger: Path) -> Iterable[tuple[str, Receipt]]:
    """All receipts that a node gave, and to whom."""
    journal = SqliteJournal(ledger, read_only=True)
    try:
        for entry in journal.entries():
            if b'"type":"settle"' in entry.body[:20]:
                settle = msgspec.json.decode(entry.body, type=Settled)
                yield settle.peer, settle.receipt
    finally:
        journal.close()
