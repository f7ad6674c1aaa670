"""What goes wrong in a world without anybody's will: links, machines, disks, engines and clocks; each is counted."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import Context
from typing import Any, NamedTuple

from wwwserve.eval.live.simulation.disk import Batch
from wwwserve.eval.live.simulation.loop import VirtualLoop
from wwwserve.eval.live.simulation.network import MemoryNetwork
from wwwserve.eval.live.world.nodes import Network, Node
from wwwserve.serving.ledger.accounts import LEDGER_PATH

LATE_S = (0.2, 3.0)  # by which a message comes that is late
MOST_ROUNDS = 12  # of the event loop, after a message, at which a node may die


class Event(NamedTuple):
    """Something goes wrong at a time, for a while."""

    kind: str
    at_s: float
    for_s: float
    row: int
    how: float  # in [0, 1)


class Faults(NamedTuple):
    """What goes wrong in one history."""

    near_s: float  # one way delay between two nodes, least,
    far_s: float  # and most
    jitter_s: float
    loss: float
    duplication: float
    late: float  # chance of a message to come long after those sent later on other connections
    write_s: float  # of a disk
    events: tuple[Event, ...]
    end_s: float

    @classmethod
    def draw(cls, dice: random.Random, count: int, duration_s: float) -> "Faults":
        """Those of a seed, for so many nodes."""
        events = _draw(dice, dice.choice([0, 4, 10, 20]), list(KINDS), count, duration_s)
        given = cls(
            near_s=0.001, far_s=dice.choice([0.005, 0.05, 0.2]), jitter_s=dice.choice([0.0, 0.02, 0.2]),
            loss=dice.choice([0.0, 0.005, 0.03]), duplication=dice.choice([0.0, 0.03, 0.2]),
            late=dice.choice([0.0, 0.01, 0.05]), write_s=dice.choice([0.0, 0.002, 0.05]),
            events=(), end_s=duration_s,
        )  # fmt: skip
        events += _draw(dice, dice.choice([0, 2, 6]), list(OF_PROCESSES), count, duration_s)
        events.sort(key=lambda each: each.at_s)
        end_s = max([duration_s, *(each.at_s + each.for_s for each in events)])
        return given._replace(events=tuple(events), end_s=end_s)

    async def inject(self, network: "FaultyNetwork", world: Network) -> None:
        """Let it all happen; afterwards nothing more goes wrong."""
        loop = world.loop
        for event in self.events:
            await loop.sleep_until(max(loop.time(), event.at_s))
            network.faults[event.kind] += 1
            ALL_KINDS[event.kind](network, world, world.nodes[event.row], event)
        await loop.sleep_until(self.end_s)
        network.calm, network.duplication = True, 0.0
        network.heal()
        for node in world.nodes:
            if node.host.process is not None:
                node.host.process.thaw()
            node.host.disk.free_bytes = None
            node.host.disk.sync()
            node.host.disk.lies = False


def _draw(dice: random.Random, number: int, kinds: Sequence[str], count: int, duration_s: float) -> list[Event]:
    """So many events of some kinds, in order."""
    events = sorted(
        Event(
            dice.choice(kinds), dice.uniform(1.0, duration_s), dice.choice([0.3, 2.0, 6.0]) * dice.random(),
            dice.randrange(count), dice.random(),
        )
        for _ in range(number)
    )  # fmt: skip
    return sorted(events, key=lambda each: each.at_s)


class FaultyNetwork(MemoryNetwork):
    """One that counts what it does to messages."""

    def __init__(self, loop: VirtualLoop, seed: int, faults: Faults, reliable: Sequence[str]) -> None:
        dice = random.Random(f"distances {seed}")
        self.calm = False  # nothing more goes wrong by chance
        self.faults: Counter[str] = Counter()
        self.slow_s: dict[str, float] = {}  # by which messages from and to a host take longer
        self.dying: dict[str, Callable[[], None]] = {}  # by host, called at its next message,
        self.dying_sender: dict[str, Callable[[], None]] = {}  # and at the next one that it sends to a ledger
        self._given, self._far_s = faults, {}
        for one in range(16):
            for other in range(one):
                self._far_s[f"n{one}", f"n{other}"] = self._far_s[f"n{other}", f"n{one}"] = dice.uniform(
                    faults.near_s, faults.far_s
                )
        super().__init__(
            loop, seed=seed, delay_s=self._delay_between, loss=faults.loss, duplication=faults.duplication,
            reliable=reliable,
        )  # fmt: skip

    def _delay_between(self, source: str, destination: str, dice: random.Random) -> float:
        delay_s = self._far_s.get((source, destination))
        if delay_s is None:
            return 0.0  # users are near
        delay_s += self.slow_s.get(source, 0.0) + self.slow_s.get(destination, 0.0)
        if self.calm:
            return delay_s
        if self._given.late and dice.random() < self._given.late:
            self.faults["late"] += 1
            delay_s += dice.uniform(*LATE_S)
        return delay_s + self._given.jitter_s * dice.random()

    def _loses(self, source: str, destination: str) -> bool:
        if self.calm:
            return False
        lost = super()._loses(source, destination)
        self.faults["cut off" if (source, destination) in self._cut else "lost"] += lost
        return lost

    def send(
        self, exchange: Any, source: str, destination: str, not_before_s: float, deliver: Callable[..., None],
        *content: Any,
    ) -> float:  # fmt: skip
        """See `MemoryNetwork`."""
        if len(content) == 4 and content[3] is True:
            self.faults["duplicated"] += 1
        return super().send(exchange, source, destination, not_before_s, deliver, *content)

    def note(self, source: str, destination: str, what: str) -> None:
        """See `MemoryNetwork`."""
        super().note(source, destination, what)
        for host in (source, destination):
            die = self.dying.pop(host, None)
            if die is not None:
                die()
        if LEDGER_PATH in what and source in self.dying_sender:
            self.dying_sender.pop(source)()


def _in_rounds(loop: VirtualLoop, rounds: int, act: Callable[[], None]) -> None:
    """Call it after so many turns of the event loop, between whatever awaits happen meanwhile."""
    if rounds:
        loop.call_soon(_in_rounds, loop, rounds - 1, act, context=Context())
    else:
        act()


def _crash(
    network: FaultyNetwork, world: Network, node: Node, event: Event, restore: Sequence[Batch] | None,
    torn: bool = False, telling: bool = False,
) -> None:  # fmt: skip
    """At its next message, or if `telling` the next that it sends to a ledger, or soon after, at any await."""

    def die() -> None:
        disk = node.host.disk
        if not node.host.up:
            return
        left = len(disk.batches) - disk.durable
        node.crash(silent=event.how < 0.5 and not telling, keep=int(event.how * (left + 1)), torn=torn)
        if restore is not None and len(restore) < len(disk.batches):
            disk.batches = list(restore)
            disk.sync()
            node.forgot = True
            network.faults["old copy"] += 1
        world.loop.outside(0.05 + event.for_s, boot)

    def boot() -> None:
        if not node.host.up:
            node.boot()

    if node.host.up:
        dying = network.dying_sender if telling else network.dying
        dying[node.host.name] = lambda: _in_rounds(world.loop, 1 + int(event.how * MOST_ROUNDS), die)


def _die(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    _crash(network, world, node, event, None)


def _restore(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    """A copy is made, and some time later the node starts from it."""
    copy = list(node.host.disk.batches)
    world.loop.call_later(event.for_s, _crash, network, world, node, event._replace(for_s=0.5), copy)


def _lose_writes(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    """The disk says that writes are durable that are not, and then the node dies."""
    node.host.disk.lies = True
    world.loop.call_later(event.for_s, _crash, network, world, node, event._replace(for_s=0.5), None)


def _tear(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    """The node dies, and the last write that its disk called durable is cut in the middle."""
    _crash(network, world, node, event, None, torn=True)


def _die_telling(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    """The node dies just after it has told what its disk should have."""
    _crash(network, world, node, event, None, telling=True)


def _freeze(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    """As SIGSTOP and SIGCONT do."""
    process = node.host.process
    if process is not None:
        process.freeze()
        world.loop.outside(event.for_s, process.thaw)


def _drift(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    """Its clock goes up to twice as fast, or stands still; then it is set right."""

    def set_right() -> None:
        node.host.let_drift(0.0)
        node.host.skew_s = 0.0

    node.host.let_drift(2.0 * event.how - 1.0)
    world.loop.call_later(event.for_s, set_right)


def _fill_disk(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    node.host.disk.free_bytes = int(2000 * event.how)
    world.loop.call_later(event.for_s, setattr, node.host.disk, "free_bytes", None)


def _part(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    names = [each.host.name for each in world.nodes]
    rest = [name for name in names if name != node.host.name]
    few = rest[: int(event.how * len(rest))]
    network.part([node.host.name, *few], [name for name in rest if name not in few])
    world.loop.call_later(event.for_s, network.heal)


def _cut(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    """One way alone."""
    others = [each.host.name for each in world.nodes if each is not node]
    network.cut([node.host.name], others) if event.how < 0.5 else network.cut(others, [node.host.name])
    world.loop.call_later(event.for_s, network.heal)


def _slow_links(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    network.slow_s[node.host.name] = 2.0 * event.how
    world.loop.call_later(event.for_s, network.slow_s.pop, node.host.name, None)


def _slow_engine(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    before, node.server.slowness = node.server.slowness, 1.0 + 20.0 * event.how
    world.loop.call_later(event.for_s, setattr, node.server, "slowness", before if node.honest is False else 1.0)


def _crash_engine(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    node.server.crash()
    world.loop.call_later(event.for_s, setattr, node.server, "up", True)


def _move_clock(network: FaultyNetwork, world: Network, node: Node, event: Event) -> None:
    """It jumps, and stays so; now and then further than messages may be off."""
    node.host.skew_s += (event.how - 0.5) * (100.0 if event.for_s > 4.0 else 20.0)
    world.loop.call_later(event.for_s, setattr, node.host, "skew_s", 0.0)


KINDS: dict[str, Callable[[FaultyNetwork, Network, Node, Event], None]] = {
    "crash": _die, "restored": _restore, "lost writes": _lose_writes, "full disk": _fill_disk, "parted": _part,
    "one way": _cut, "slow links": _slow_links, "slow engine": _slow_engine, "engine died": _crash_engine,
    "clock": _move_clock,
}  # fmt: skip
OF_PROCESSES: dict[str, Callable[[FaultyNetwork, Network, Node, Event], None]] = {
    "torn write": _tear, "crash telling": _die_telling, "frozen": _freeze, "drift": _drift,
}  # fmt: skip
ALL_KINDS = KINDS | OF_PROCESSES
