"""Play a scenario by real nodes under faults that a seed decides, and say what came of it."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from wwwserve.agents.rules import Policy
from wwwserve.envs.state import MarketPlan
from wwwserve.eval.live.simulation import loop as virtual
from wwwserve.eval.live.simulation.loop import VirtualLoop
from wwwserve.eval.live.simulation.nodes import Nodes, Outcome
from wwwserve.serving.dispatcher import Dispatcher

SETTLE_S = 1000.0  # after the last user's end: longer than any timeout of a node


class Crash(NamedTuple):
    """A node dies and starts again."""

    row: int
    at_s: float
    down_s: float
    silent: bool = False  # without a word to those it is connected to


class Faults(NamedTuple):
    """What goes wrong between nodes."""

    jitter_s: float = 0.0  # most that is added to the delay of a message
    loss: float = 0.0  # chance of a message
    crashes: tuple[Crash, ...] = ()


class Report(NamedTuple):
    """What came of it."""

    outcomes: list[Outcome]  # of each user's request
    totals: dict[str, int]  # of all runs of all nodes, see `serving.metrics`
    still_held: int  # requests, and what else is left over when all is quiet
    still_remote: int
    still_in_engines: int
    in_escrow: int  # micro-credits
    minted: int  # micro-credits, in all accounts
    errors: list[BaseException]  # that no node should meet
    messages: int
    digest: str  # of the whole history


def play(planned: MarketPlan, policy: Callable[[], Policy], faults: Faults, seed: int) -> Report:
    """Play a plan; the same arguments give the same report."""

    async def main(loop: VirtualLoop) -> Report:
        half_s = planned.scenario.rtt_ms / 2000

        def delay(source: str, destination: str, generator: random.Random) -> float:
            return half_s + faults.jitter_s * generator.random()

        nodes = Nodes(loop, planned, lambda row: policy(), seed=seed, delay_s=delay, loss=faults.loss)
        runs: list[Dispatcher] = []

        def boot(row: int) -> None:
            nodes.nodes[row].boot()
            runs.append(nodes.nodes[row].dispatcher)

        for row in range(len(nodes.nodes)):
            boot(row)
        for crash in faults.crashes:
            host = nodes.nodes[crash.row].host
            loop.call_at(crash.at_s, lambda host=host, silent=crash.silent: host.crash(silent=silent))
            loop.call_at(crash.at_s + crash.down_s, boot, crash.row)
        outcomes = await nodes.play()
        await loop.sleep_until(loop.time() + SETTLE_S)
        there = [node.dispatcher for node in nodes.nodes]
        totals: dict[str, int] = {}
        for run in runs:
            for name, count in _counts(run).items():
                totals[name] = totals.get(name, 0) + count
        report = Report(
            outcomes, totals, sum(each.provider.held for each in there), sum(each.metrics.remote_now for each in there),
            sum(node.server.running for node in nodes.nodes), int(nodes.bank.locked.sum()),
            int(nodes.bank.accounts.sum()),
            [*nodes.network.errors, *(error for node in nodes.nodes for error in node.errors)],
            nodes.network.history.count, nodes.network.history.digest(),
        )  # fmt: skip
        nodes.close()
        return report

    report: Report = virtual.run(main)
    return report


def _counts(run: Dispatcher) -> dict[str, Any]:
    return {name: count for name, count in run.metrics.totals().items() if isinstance(count, int)}
