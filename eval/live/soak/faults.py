"""What is done to the nodes of a soak: kills and freezes, full disks, wrong clocks, a network in two halves."""

import asyncio
import random
import time
from typing import Any

from wwwserve.eval.live.soak.nodes import LARGEST, Network, Node
from wwwserve.serving.ledger.audit import Auditor
from wwwserve.serving.ledger.journal import SqliteJournal

READY_S, CALM_S = 300.0, 120.0
MOST_DOWN = 3  # nodes, killed and not back yet
MOMENT_S, KILL_S = 0.5, 3.0  # between two kills at most, where nodes are back as fast
KILLED_IN = 0.92  # of the time that there is; the rest is for faults that take longer than they should
FREEZE_S = 0.3, 6.0
OFF_S = 60.0  # of a clock
PARTED_S = 3.0
EACH = 30  # kills between two of the faults that all nodes have to be there for
FREEZE_EACH = 4  # kills between two freezes


class Faults:
    """Of one run."""

    def __init__(self, network: Network, seed: int) -> None:
        self.network = network
        self.draw = random.Random(seed + 1)
        self.kills = self.audited = 0
        self.done: dict[str, dict[str, int]] = {}
        self._auditors: dict[Node, Auditor] = {}
        self._returning: dict[Node, asyncio.Task[None]] = {}
        self._frozen: dict[Node, asyncio.Task[None]] = {}

    async def all_ready(self) -> None:
        """Until every node is back and the honest ones see each other."""
        await asyncio.gather(*self._returning.values(), *self._frozen.values())
        nodes = self.network.nodes
        await self.network.until("all nodes see each other", lambda: self.network.sees(nodes, nodes), READY_S)

    # One node at a time, while others are down.

    async def kill(self, due_s: float) -> None:
        """Kill a node at some moment, maybe a frozen one; it is back later. Some may be down at once. It is done by
        `due_s` of the monotonic clock, if nodes are back by then, or sooner."""
        while len(self._returning) >= MOST_DOWN:
            await asyncio.wait(self._returning.values(), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(self.draw.uniform(0.0, MOMENT_S) + min(KILL_S, max(0.0, due_s - time.monotonic())))
        node = self.draw.choice([each for each in self.network.nodes if each not in self._returning])
        node.kill()
        self.kills += 1
        task = self._returning[node] = asyncio.create_task(self._bring_back(node, self.kills))
        task.add_done_callback(lambda done: self._returning.pop(node, None))

    async def _bring_back(self, node: Node, kill: int) -> None:
        """Check what a node left when it was killed, and start it again."""
        if node.honest:
            problems = await asyncio.to_thread(self._audited, node)
            self.audited += 1
            self.network.problems += [f"after kill {kill}, {node.name}: {each}" for each in problems]
        node.start()
        what = f"{node.name} is back after kill {kill}"
        await self.network.until(what, lambda: self.network.is_back(node), READY_S)

    def _audited(self, node: Node) -> list[str]:
        """What is wrong with a journal: the file, and all that was written since the node was killed before."""
        journal = SqliteJournal(node.ledger, read_only=True)
        try:
            auditor = self._auditors.setdefault(node, Auditor(journal.owner))
            return journal.damage() + auditor.follow(journal).problems
        finally:
            journal.close()

    def freeze(self) -> None:
        """Hold a node that runs for some time, by SIGSTOP."""
        nodes = [each for each in self.network.nodes if each not in self._returning and each not in self._frozen]
        if nodes:
            node = self.draw.choice(nodes)
            task = self._frozen[node] = asyncio.create_task(self._thaw(node, self.draw.uniform(*FREEZE_S)))
            task.add_done_callback(lambda done: self._frozen.pop(node, None))
            self._count("freeze")

    async def _thaw(self, node: Node, after_s: float) -> None:
        node.freeze(True)
        try:
            await asyncio.sleep(after_s)
        finally:
            node.freeze(False)

    # With all nodes there.

    async def fill(self) -> None:
        """Leave a node no space for its ledger, and then some again."""
        node, see = self.draw.choice(self.network.honest), self.network.see
        await self.all_ready()
        node.limit(1)

        async def full() -> bool:
            seen = await see(node)
            return seen is not None and bool(seen["ledger"]["full"])

        await self.network.until(f"{node.name} notices that there is no space", full, CALM_S)
        before = await see(node)
        answered = 0

        async def serves() -> bool:
            nonlocal answered
            seen = await see(node)
            answered = seen["requests"]["answered"] - before["requests"]["answered"] if before and seen else 0
            return answered > 0

        await self.network.until(f"{node.name} serves somebody while there is no space for its ledger", serves, CALM_S)
        node.limit(LARGEST)

        async def writable() -> bool:
            return not await full()

        await self.network.until(f"{node.name} notices that there is space", writable, CALM_S)
        self._count("full disk", answered_meanwhile=answered)

    async def clock(self) -> None:
        """Run a node whose clock is ahead, and then with the right one."""
        await self.all_ready()
        node, see = self.draw.choice(self.network.honest), self.network.see
        node.kill()
        node.start(OFF_S)

        async def alone() -> bool:
            seen = await see(node)
            return seen is not None and bool(seen["engine"]["up"]) and not any(each["there"] for each in seen["peers"])

        await self.network.until(f"{node.name} with a clock that is off is alone", alone, READY_S)
        await asyncio.sleep(PARTED_S)
        seen = await see(node)
        answered = seen["requests"]["answered"] if seen else 0
        node.kill()
        node.start()
        await self.network.until(
            f"{node.name} is back with the right time", lambda: self.network.is_back(node), READY_S
        )
        await self.all_ready()
        self._count("clock off", answered_meanwhile=answered)

    async def part(self) -> None:
        """Cut the network in two halves, and heal it."""
        await self.all_ready()
        nodes = self.draw.sample(self.network.nodes, len(self.network.nodes))
        halves = nodes[:2], nodes[2:]
        for half, other in (halves, halves[::-1]):
            for node in half:
                node.blocked.write_text(" ".join(each.port for each in other))
        for half in halves:
            await self.network.until("each half sees itself", lambda h=half: self.network.sees(h, h), CALM_S)
        await asyncio.sleep(PARTED_S)
        for node in nodes:
            node.blocked.unlink()
        await self.all_ready()
        self._count("partition")

    def _count(self, fault: str, **more: int) -> None:
        found: dict[str, Any] = self.done.setdefault(fault, {"times": 0} | dict.fromkeys(more, 0))
        found["times"] += 1
        for name, value in more.items():
            found[name] += value
