"""One history: a seed draws a world, its users, its faults and its adversaries, and it is played and judged."""

import asyncio
import logging
import random
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import orjson

from wwwserve.agents.protocol import LATENESS, MICRO, PER_REQUEST, QUOTED
from wwwserve.eval.live.simulation import loop as virtual
from wwwserve.eval.live.simulation.loop import Deadlock, Standstill, VirtualLoop
from wwwserve.eval.live.world.earnings import Earning, Served
from wwwserve.eval.live.world.engine import MARK, WORD_BYTES, word
from wwwserve.eval.live.world.faults import Faults, FaultyNetwork
from wwwserve.eval.live.world.invariants import Dealing, Judge
from wwwserve.eval.live.world.nodes import MODEL, Agreed, Network, Node, Strategy
from wwwserve.eval.live.world.roster import make

USERS = "users"
PATIENCE_S = 200.0  # of a user, without a byte
QUIET_S = 300.0  # after the last fault, within which all is to be over,
LATE_S = 60.0  # and for which users of adversaries are waited for
LOOK_S = 2.0  # between two looks at the invariants
POLICIES = ("shortest_queue", "power_of_two", "www_serve", "earliest_finish", "random")
MOST_BYTES = 1 << 20


class Asked(NamedTuple):
    """A request of a user."""

    number: int
    row: int
    at_s: float
    prompt: int  # tokens
    output: int
    most: int  # tokens that it may get
    stream: bool
    leaves_s: float | None  # after which it hangs up

    def body(self) -> bytes:
        """As it is sent."""
        said = word(self.number) + "p" * (WORD_BYTES * (self.prompt - 1))
        request = {
            "model": MODEL, "messages": [{"role": "user", "content": said}], "max_tokens": self.most,
            "min_tokens": self.output, "stream": self.stream,
        }  # fmt: skip
        return orjson.dumps(request)


class Drawn(NamedTuple):
    """What a seed comes to."""

    seed: int
    agreed: Agreed
    adversaries: tuple[str, ...]  # of the last nodes; "" for an honest one in that place
    places: list[int]
    policies: list[str]
    asked: list[Asked]
    faults: Faults


class Report(NamedTuple):
    """What came of a history."""

    seed: int
    adversaries: tuple[str, ...]
    violations: list[str]
    digest: str
    messages: int
    faults: Counter[str]
    ends: Counter[str]  # of users' requests
    dealings: list[Dealing]
    earnings: list[Earning]  # in the places of adversaries; none where requests cost a credit, whatever they are worth
    duels: int  # on which there is a verdict
    virtual_s: float


def draw(seed: int, adversaries: Sequence[str], *, honest: bool = False, duels: float = 0.0) -> Drawn:
    """The world of a seed. `adversaries` may take part, alone and in groups up to a third of the nodes; if `honest`,
    honest nodes do in their places, and all else is the same. `duels`: the chance of one; then there are enough nodes
    for juries."""
    dice = random.Random(f"world {seed}")
    count = dice.randint(5, 9) if duels else dice.randint(3, 7)
    bad = dice.randint(0 if dice.random() < 0.1 else 1, max(1, count // 3))
    alike = dice.random() < 0.5
    names = [dice.choice(adversaries) for _ in range(bad)] if adversaries else []
    names = names[:1] * len(names) if alike else names
    names = [""] * len(names) if honest else names
    payment = dice.choice([LATENESS, LATENESS, QUOTED, PER_REQUEST])
    exposure = dice.choice([0.02, 0.1, 0.5]) if payment != PER_REQUEST else dice.choice([2.0, 5.0])
    grant = exposure * dice.choice([1.5, 5.0, 50.0])
    duration_s = dice.uniform(8.0, 25.0)
    refills = _refills(seed, round(exposure * MICRO), duration_s)
    agreed = Agreed(payment, round(exposure * MICRO), round(grant * MICRO), 5 * MICRO, duels, refills)
    agreed = agreed._replace(**_apart(seed, count, duration_s))
    asked: list[Asked] = []
    at_s = 1.0
    rate_per_s = dice.choice([1.0, 2.0, 4.0])
    weights = [dice.choice([0.2, 1.0, 4.0]) for _ in range(count)]
    while (at_s := at_s + dice.expovariate(rate_per_s)) < duration_s:
        row = dice.choices(range(count), weights)[0]
        leaves_s = dice.uniform(0.0, 4.0) if dice.random() < 0.1 else None
        output = dice.randint(1, 150)
        stream, most = dice.random() < 0.8, output * dice.choice([1, 1, 4, 20])
        asked.append(Asked(len(asked), row, at_s, dice.randint(1, 60), output, most, stream, leaves_s))
    places = [dice.randint(1, 4) for _ in range(count)]
    policies = [dice.choice(POLICIES) for _ in range(count)]
    return Drawn(seed, agreed, tuple(names), places, policies, asked, Faults.draw(dice, count, duration_s))


def _refills(seed: int, exposure: int, duration_s: float) -> tuple[tuple[float, int], ...]:
    """When credit is added and how much: in every other history never, else at times at which a node has to start
    anew to find it, so that some have it and others have not; often at once."""
    dice = random.Random(f"refills {seed}")
    if dice.random() < 0.5:
        return ()
    times = sorted(dice.choice([0.0, dice.uniform(0.0, duration_s)]) for _ in range(dice.randint(1, 3)))
    return tuple((at_s, max(1, int(exposure * dice.choice([0.1, 1.0, 5.0])))) for at_s in times)


def _apart(seed: int, count: int, duration_s: float) -> dict[str, Any]:
    """Who closes channels with whom: in two of three histories nobody, else some, from when they start anew."""
    dice = random.Random(f"apart {seed}")
    if dice.random() < 2 / 3:
        return {}
    rows, found = range(count), []
    for _ in range(dice.randint(1, 3)):
        row, peer = dice.sample(rows, 2)
        from_s = dice.uniform(0.0, duration_s / 2)
        found.append((row, peer, from_s, from_s + dice.choice([0.3, 10.0]) * duration_s))
    return {"apart": tuple(found), "close_after_s": dice.choice([0.5, 3.0, 20.0])}


def play(drawn: Drawn) -> Report:
    """Play a history; the same one gives the same report."""
    judge = Judge()
    with _logged(judge), _secrets(drawn.seed):
        try:
            report: Report = virtual.run(lambda loop: _play(loop, drawn, judge), executor_s=drawn.faults.write_s)
        except (Deadlock, Standstill) as error:
            judge.say(f"the world stands still: {error}")
            return Report(drawn.seed, drawn.adversaries, judge.found, "", 0, Counter(), Counter(), [], [], 0, 0.0)
    return report


async def _play(loop: VirtualLoop, drawn: Drawn, judge: Judge) -> Report:
    loop.set_exception_handler(lambda _, context: judge.say(f"unhandled: {context.get('exception') or context}"))
    honest = len(drawn.places) - len(drawn.adversaries)
    strategies: list[Strategy] = [Strategy() for _ in range(honest)]
    strategies += [make(name) for name in drawn.adversaries]
    network = FaultyNetwork(loop, drawn.seed, drawn.faults, [USERS])
    world = Network(loop, network, drawn.seed, drawn.agreed, strategies, drawn.places, drawn.policies)
    judge.begin(world)
    for row in range(len(world.nodes)):
        world.asked_of[row] = frozenset(word(each.number) for each in drawn.asked if each.row == row)
    for node in world.nodes:
        node.strategy.prepare(node)
        node.boot()
    injecting = loop.create_task(drawn.faults.inject(network, world))
    looking = loop.create_task(_look(loop, judge))
    served = Served(world.nodes[0].config.deadlines_s)
    users = [loop.create_task(_ask(world, each, judge, served)) for each in drawn.asked]
    await asyncio.wait([injecting])
    injecting.result()
    until_s = loop.time() + QUIET_S
    waited = [task for task, each in zip(users, drawn.asked, strict=True) if world.nodes[each.row].honest]
    late_s = loop.time() + LATE_S
    while loop.time() < until_s:
        there = waited if loop.time() > late_s else users
        if all(each.done() for each in there) and judge.is_quiet():
            break
        await asyncio.sleep(LOOK_S)
    looking.cancel()
    ends: Counter[str] = Counter()
    for task, each in zip(users, drawn.asked, strict=True):
        if not task.done():
            if world.nodes[each.row].honest:
                judge.say(f"request {each.number} never ended")
            ends["never ended"] += 1
            task.cancel()
        else:
            ends[task.result()] += 1
    judge.end()
    priced = drawn.agreed.payment != PER_REQUEST
    earnings = [served.earning(world, node) for node in world.nodes[honest:]] if priced else []
    report = Report(
        drawn.seed, drawn.adversaries, judge.found, network.history.digest(), network.history.count, network.faults,
        ends, judge.dealings(), earnings, len(judge.duels.judged), loop.time(),
    )  # fmt: skip
    for node in world.nodes:
        node.host.crash()
    await asyncio.sleep(0)
    return report


async def _look(loop: VirtualLoop, judge: Judge) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        judge.look()


async def _ask(world: Network, asked: Asked, judge: Judge, served: Served) -> str:
    """Send a request and read its answer; returns how it ended."""
    await world.loop.sleep_until(asked.at_s)
    node = world.nodes[asked.row]
    asking = _exchange(world, node, asked, judge, served)
    try:
        if asked.leaves_s is None:
            return await asking
        async with asyncio.timeout(asked.leaves_s):
            return await asking
    except TimeoutError:
        return "left"


async def _exchange(world: Network, node: Node, asked: Asked, judge: Judge, served: Served) -> str:
    got = bytearray()
    try:
        async with world.network.transport(USERS).request(
            "POST", f"{node.host.url}/v1/chat/completions", body=asked.body(),
            headers={"content-type": "application/json"}, timeout_s=None, read_timeout_s=PATIENCE_S,
        ) as response:  # fmt: skip
            async for piece in response.iter_any():
                got += piece
        end = judge.answered(asked.number, asked.output, asked.stream, response.status, bytes(got))
        if end == "answered":
            served.answered(asked.row, asked.prompt, got.count(MARK), world.loop.time() - asked.at_s)
        return end
    except TimeoutError:
        if world.loop.time() - asked.at_s < PATIENCE_S:
            raise
        if node.honest and not node.restarted_since(asked.at_s):
            judge.say(f"request {asked.number}: nothing came for {PATIENCE_S:g} s")
        return "timeout"
    except OSError:
        judge.check_words(asked.number, bytes(got))
        if node.honest and not node.restarted_since(asked.at_s):
            judge.say(f"request {asked.number}: the connection broke off, and its node did not")
        return "broke off"


class _Errors(logging.Handler):
    def __init__(self, judge: Judge) -> None:
        super().__init__(logging.ERROR)
        self.judge = judge

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what nobody handled."""
        self.judge.logged(record)


@contextmanager
def _secrets(seed: int) -> Iterator[None]:
    """Let what nodes draw for themselves be the seed's."""
    dice, before = random.Random(f"secrets {seed}"), secrets.token_hex
    secrets.token_hex = lambda nbytes=None: dice.randbytes(nbytes or 32).hex()
    try:
        yield
    finally:
        secrets.token_hex = before


@contextmanager
def _logged(judge: Judge) -> Iterator[None]:
    """Show the judge what nodes log as an error."""
    handler, loggers = _Errors(judge), [logging.getLogger("wwwserve"), logging.getLogger("asyncio")]
    before = [(each.level, each.propagate) for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
        each.propagate = False
        each.addHandler(handler)
    try:
        yield
    finally:
        for each, (level, propagate) in zip(loggers, before, strict=True):
            each.removeHandler(handler)
            each.setLevel(level)
            each.propagate = propagate
