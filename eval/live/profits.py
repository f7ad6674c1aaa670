"""What providers earn on real nodes and in the simulated market: `python -m eval.live.profits SCENARIO --policy NAME`.

The nodes are the real ones, with dispatchers, signed messages and ledgers, on a virtual clock before simulated engines;
the requests are the same. In the end all journals are audited, and what nodes paid each other has to come to zero.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro

from wwwserve.agents.arguments import File, Positive, Seed, UsageError, parse_args, refuse
from wwwserve.agents.classes import CLASS_VALUE
from wwwserve.agents.kernel import Floats
from wwwserve.agents.protocol import MICRO, delivered_value
from wwwserve.agents.rules import Policy
from wwwserve.agents.tariff import cost_of
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.oracle import Oracle
from wwwserve.envs.scenario import ScenarioError, load
from wwwserve.envs.state import MarketPlan, plan
from wwwserve.eval.compare import FIRST_TEST_SEED, columns, write_json
from wwwserve.eval.live.networks import check
from wwwserve.eval.live.simulation import loop as virtual
from wwwserve.eval.live.simulation.loop import VirtualLoop
from wwwserve.eval.live.simulation.nodes import Node, Nodes
from wwwserve.eval.policies import PolicyError, load_policy
from wwwserve.serving.ledger.audit import audit_entries, compare, settled

PROG = "wwwserve profits"
SETTLE_S = 30.0  # after the last answer, until all that is owed is signed


def simulated(planned: MarketPlan, policy: Policy) -> tuple[Floats, int]:
    """Profit [N] of each provider in the simulated market, credits, and how many requests were handed over."""
    batch = MarketBatch([planned])
    actions = batch.actions()
    while not batch.over.all():
        policy.decide(batch.views, batch.active, batch.uniforms, actions)
        batch.step(actions)
    table = batch.requests(0)
    handed_over = int(((table.executor >= 0) & (table.executor != table.origin)).sum())
    return batch.markets.providers["profit"][0].copy(), handed_over


def live(planned: MarketPlan, policy: Policy) -> dict[str, Any]:
    """What real nodes earned: `profit` and `payments` [N] in credits, `handed_over` and `receipts`, and `problems`, a
    list of what does not hold."""

    async def main(loop: VirtualLoop) -> dict[str, Any]:
        nodes = Nodes(loop, planned, lambda row: policy, ledgers=True)
        nodes.boot()
        outcomes = await nodes.play()
        await loop.sleep_until(loop.time() + SETTLE_S)
        value = np.zeros(len(nodes.nodes))
        traffic = planned.traffic
        for outcome, row, klass in zip(outcomes, traffic.provider.tolist(), traffic.klass.tolist(), strict=True):
            if outcome.tokens > 0:
                worth = planned.known[row, klass, CLASS_VALUE]
                value[row] += delivered_value(worth, planned.deadlines[klass], outcome.latency_s)
        payments = np.array([_earned(node) for node in nodes.nodes])
        compute = np.array([_computed(node) for node in nodes.nodes])
        problems = [str(error) for error in nodes.network.errors] + _audited(nodes)
        if payments.sum():
            problems.append(f"what nodes paid each other comes to {payments.sum()} micro-credits")
        receipts = sum(c.number for node in nodes.nodes if node.ledger for c in node.ledger.books.channels.values())
        handed_over = sum(int(node.dispatcher.metrics.totals()["handed_over"]) for node in nodes.nodes)
        nodes.close()
        return {
            "profit": value + payments / MICRO - compute, "payments": payments / MICRO, "handed_over": handed_over,
            "receipts": receipts, "problems": problems,
        }  # fmt: skip

    played: dict[str, Any] = virtual.run(main)
    return played


def _earned(node: Node) -> int:
    """What peers paid a node less what it paid them, micro-credits."""
    assert node.ledger is not None
    return sum(c.paid_total - c.total for c in node.ledger.books.channels.values())


def _computed(node: Node) -> float:
    """What the answers of a node's engine cost in compute, credits."""
    return cost_of(node.provider.record["compute"], float(node.server.prompt_tokens), float(node.server.output_tokens))


def _audited(nodes: Nodes) -> list[str]:
    """What does not hold in the journals of nodes at rest."""
    audits, problems = [], []
    for node in nodes.nodes:
        assert node.ledger is not None
        audits.append(audit_entries(node.disk.journal(node.identity.name), node.identity.name, []))
        problems += [f"{node.plan.name}: {problem}" for problem in audits[-1].problems]
        short = sum(channel.short for channel in node.ledger.books.channels.values())
        if short:
            problems.append(f"{node.plan.name}: peers paid {short} micro-credits less than it delivered")
    for (one, a), (other, b) in itertools.combinations(zip(nodes.nodes, audits, strict=True), 2):
        problems += [f"{one.plan.name} and {other.plan.name}: {problem}" for problem in compare(a, b)]
        if not settled(a, b):
            problems.append(f"{one.plan.name} and {other.plan.name} do not own the same by either's account")
    return problems


def beside(planned: MarketPlan, policy: Policy) -> dict[str, Any]:
    """Both worlds, as JSON: see `live`; profit and payments by provider."""
    profit, handed_over = simulated(planned, policy)
    found = live(planned, policy)
    names = [provider.name for provider in planned.scenario.providers]
    gap = np.abs(found["profit"] - profit[: len(names)]) / np.maximum(np.abs(profit[: len(names)]), 1e-9)
    providers = {
        name: {
            "live": float(found["profit"][i]), "simulated": float(profit[i]), "gap": float(gap[i]),
            "payments": float(found["payments"][i]),
        }
        for i, name in enumerate(names)
    }  # fmt: skip
    return {
        "policy": policy.name, "seed": planned.seed, "providers": providers, "receipts": found["receipts"],
        "handed_over": {"live": found["handed_over"], "simulated": handed_over}, "problems": found["problems"],
    }  # fmt: skip


@dataclass
class Args:
    """Compare what providers earn on real nodes, on a virtual clock and with ledgers, with the simulated market."""

    scenario: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SCENARIO")]
    """name of a packaged scenario, or a file"""
    policy: str = "best_value"
    """on every node: a rule, or the folder of a bundle"""
    seed: Seed = FIRST_TEST_SEED
    """of the traffic"""
    most_gap: Positive = 0.1
    """between the two, as a share of the simulated profit, beyond which the command fails"""
    json: File = None
    """write the results to this file"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 where something does not hold, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
        scenario = load(args.scenario)
        check(scenario)
        policy = load_policy(args.policy)
        if isinstance(policy, Oracle):
            raise UsageError(f"policy {args.policy!r} sees what no node can")
    except (UsageError, ScenarioError, PolicyError) as error:
        return refuse(PROG, error)
    result = beside(plan(scenario, args.seed), policy)
    if args.json is not None:
        write_json(args.json, result)
    rows = [["provider", "live", "simulated", "gap", "payments"]]
    for name, each in result["providers"].items():
        profits = [f"{each['live']:.3f}", f"{each['simulated']:.3f}"]
        rows.append([name, *profits, f"{each['gap']:.1%}", f"{each['payments']:+.3f}"])
    print(f"{scenario.name}, {policy.name}: {result['receipts']} receipts\n{columns(rows)}")
    far = [name for name, each in result["providers"].items() if each["gap"] > args.most_gap]
    for problem in result["problems"] + [f"{name} is more than {args.most_gap:.0%} off" for name in far]:
        print(f"{PROG}: {problem}", file=sys.stderr)
    return 1 if far or result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
