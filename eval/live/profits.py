"""What providers earn on real nodes and in the simulated market: `wwwserve profits SCENARIO --policy NAME`.

The nodes are the real ones, with dispatchers, signed messages and ledgers: on a virtual clock before simulated engines,
or with `--speed` as processes before emulated ones. The requests are the same. In the end all journals are audited, and
what nodes paid each other has to come to zero.
"""

import asyncio
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from wwwserve.agents.arguments import Count, File, Positive, Range, Seed, UsageError, parse_args, refuse
from wwwserve.agents.classes import CLASS_VALUE
from wwwserve.agents.kernel import Floats
from wwwserve.agents.knowledge import AD_MEAN_OUTPUT, AD_MEAN_PROMPT, ADVERT_SIZE, write_profile
from wwwserve.agents.protocol import MICRO, TARIFF_SIZE, delivered_value
from wwwserve.agents.rules import Policy
from wwwserve.agents.tariff import cost_of, write_compute
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.oracle import Oracle
from wwwserve.envs.scenario import ScenarioError, load
from wwwserve.envs.state import MarketPlan, plan
from wwwserve.eval.compare import FIRST_TEST_SEED, columns, write_json
from wwwserve.eval.live.networks import Live, Site, check, own
from wwwserve.eval.live.simulation import loop as virtual
from wwwserve.eval.live.simulation.loop import VirtualLoop
from wwwserve.eval.live.simulation.nodes import Nodes
from wwwserve.eval.live.trial import MOST_SPEED, play, setting_of
from wwwserve.eval.policies import PolicyError, load_policy
from wwwserve.serving.config import MOST_CREDITS, ConfigError
from wwwserve.serving.ledger.audit import Audit, audit, audit_entries, compare, settled
from wwwserve.serving.ledger.journal import JournalError
from wwwserve.serving.local_nodes import DIRECT, Accounts, NetworkError, look

PROG = "wwwserve profits"
SETTLE_S = 30.0  # after the last answer, until all that is owed is signed; on the virtual clock
MOST_SHORT = 0.05  # of what is paid, by which the two sides of a channel may differ
READY_S = 60.0  # for channels to be opened, and for all that is owed to be signed, by processes
STOP_S = 15.0  # for a process to end
LOOK_S, LOOK_TIMEOUT_S = 0.2, 5.0


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


class Played(NamedTuple):
    """What real nodes earned, and what of it does not hold."""

    profit: Floats  # [N] credits
    payments: Floats  # [N] credits, received less made
    receipts: int
    handed_over: int  # requests
    problems: list[str]


def simulated_nodes(planned: MarketPlan, policy: Policy) -> Played:
    """Play it by nodes in this process, on a virtual clock before simulated engines."""

    async def main(loop: VirtualLoop) -> Played:
        nodes = Nodes(loop, planned, lambda row: policy, ledgers=True)
        nodes.boot()
        outcomes = await nodes.play()
        await loop.sleep_until(loop.time() + SETTLE_S)
        latency_s = [outcome.latency_s if outcome.tokens > 0 else np.inf for outcome in outcomes]
        audits = [audit_entries(n.disk.journal(n.identity.name), n.identity.name, []) for n in nodes.nodes]
        compute = [
            cost_of(n.provider.record["compute"], float(n.server.prompt_tokens), 0.0, float(n.server.output_tokens))
            for n in nodes.nodes
        ]
        handed_over = sum(int(n.dispatcher.metrics.totals()["handed_over"]) for n in nodes.nodes)
        errors = [str(error) for error in nodes.network.errors]
        nodes.close()
        return _earned(planned, np.array(latency_s), audits, np.array(compute), handed_over, errors)

    return virtual.run(main)


def processes(planned: MarketPlan, setting: str | None, speed: float) -> Played:
    """Play it by nodes that are processes, before emulated engines, at `speed` market seconds in a second; `setting` is
    what a node is told of its policy. Raises NetworkError."""
    economy = planned.scenario.economy
    exposure = MOST_CREDITS if economy.exposure is None else economy.exposure
    accounts = Accounts(economy.initial_credit, economy.initial_stake, exposure)
    with own(planned, setting, speed, accounts=accounts) as network:
        _wait(network, lambda channels: sum(each["reconciled"] for each in channels) == len(network.sites) - 1)
        measured = asyncio.run(play(network, planned, speed, stream=False, told=False))
        _wait(network, lambda channels: not any(each["exposed"] or each["unacknowledged"] for each in channels))
        handed_over = sum(int(look(site.url)["requests"]["handed_over"]) for site in network.sites)
        usual = zip(planned.mean_prompt.tolist(), planned.mean_output.tolist(), strict=True)
        compute = np.array([
            _computed(url, site, economy.compute_cost_per_ktok, *lengths)
            for url, site, lengths in zip(network.engine_urls, network.sites, usual, strict=True)
        ])  # fmt: skip
        for process in network.nodes:
            process.terminate()
        for process in network.nodes:
            process.wait(STOP_S)
        audits = [audit(each.ledger) for each in network.files]
    problems = [f"{measured.failed} requests failed"] if measured.failed else []
    print(f"sent at most {measured.lag_s:.2f} s late", file=sys.stderr)
    # Where processes wait for a core, the two sides differ on how long an answer took.
    return _earned(planned, measured.latency_s, audits, compute, handed_over, problems, MOST_SHORT)


def _wait(network: Live, ready: Callable[[list[dict[str, Any]]], bool]) -> None:
    """Wait until it is so of the channels of each node. Raises NetworkError."""
    until_s = time.monotonic() + READY_S
    for site in network.sites:
        while not ready(look(site.url)["ledger"]["channels"]):
            if time.monotonic() > until_s:
                raise NetworkError(f"the channels of {site.url} are not as they should be after {READY_S:g} s")
            time.sleep(LOOK_S)


def _computed(engine_url: str, site: Site, per_ktok: float, mean_prompt: float, mean_output: float) -> float:
    """What the answers of an emulated engine cost in compute, credits."""
    with DIRECT.open(f"{engine_url}/metrics", timeout=LOOK_TIMEOUT_S) as response:
        page = response.read().decode()
    prompt, cached, output = (
        sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(f"vllm:{name}_total"))
        for name in ("prompt_tokens", "prefix_cache_hits", "generation_tokens")
    )
    own_advert, compute = np.zeros(ADVERT_SIZE), np.zeros(TARIFF_SIZE)
    own_advert[[AD_MEAN_PROMPT, AD_MEAN_OUTPUT]] = mean_prompt, mean_output
    write_profile(own_advert, site.profile.row(), 1.0)
    write_compute(compute, own_advert, per_ktok)
    return cost_of(compute, prompt, cached, output)


def _earned(
    planned: MarketPlan, latency_s: Floats, audits: Sequence[Audit], compute: Floats, handed_over: int,
    problems: list[str], short_share: float = 0.0,
) -> Played:  # fmt: skip
    """Profits of nodes at rest, by the `latency_s` of all requests (infinite where there was no answer), the journals
    and the cost of compute [N]; see `_problems` for `short_share`."""
    value, traffic = np.zeros(len(audits)), planned.traffic
    for took_s, row, klass in zip(latency_s.tolist(), traffic.provider.tolist(), traffic.klass.tolist(), strict=True):
        value[row] += delivered_value(planned.known[row, klass, CLASS_VALUE], planned.deadlines[klass], took_s)
    channels = [found.books.channels.values() for found in audits]
    payments = np.array([sum(c.paid_total - c.total for c in each) for each in channels])
    problems = problems + _problems([each.name for each in planned.scenario.providers], audits, short_share)
    if payments.sum():
        problems.append(f"what nodes paid each other comes to {payments.sum()} micro-credits")
    receipts = sum(c.number for each in channels for c in each)
    return Played(value + payments / MICRO - compute, payments / MICRO, receipts, handed_over, problems)


def _problems(names: Sequence[str], audits: Sequence[Audit], short_share: float) -> list[str]:
    """What does not hold in the journals of nodes at rest, which may be paid too little by `short_share` of it all."""
    problems = []
    for name, found in zip(names, audits, strict=True):
        problems += [f"{name}: {problem}" for problem in found.problems]
        short = sum(channel.short for channel in found.books.channels.values())
        if short > short_share * sum(channel.paid_total for channel in found.books.channels.values()):
            problems.append(f"{name}: peers paid {short} micro-credits less than it delivered")
    for (one, a), (other, b) in itertools.combinations(zip(names, audits, strict=True), 2):
        problems += [f"{one} and {other}: {problem}" for problem in compare(a, b)]
        if not settled(a, b):
            problems.append(f"{one} and {other} do not own the same by either's account")
    return problems


def beside(plans: Sequence[MarketPlan], policy: Policy, played: Sequence[Played]) -> dict[str, Any]:
    """What real nodes earned in each run and what the simulated market says, as JSON; profit and payments by provider,
    means over the runs."""
    names = [provider.name for provider in plans[0].scenario.providers]
    market = [simulated(planned, policy) for planned in plans]
    expected = np.mean([profit[: len(names)] for profit, _ in market], axis=0)
    live = np.mean([found.profit for found in played], axis=0)
    payments = np.mean([found.payments for found in played], axis=0)
    gap = np.abs(live - expected) / np.maximum(np.abs(expected), 1e-9)
    providers = {
        name: {
            "live": float(live[i]), "simulated": float(expected[i]), "gap": float(gap[i]),
            "payments": float(payments[i]),
        }
        for i, name in enumerate(names)
    }  # fmt: skip
    handed_over = {
        "live": sum(found.handed_over for found in played), "simulated": sum(count for _, count in market)
    }  # fmt: skip
    return {
        "policy": policy.name, "seed": plans[0].seed, "runs": len(plans), "providers": providers,
        "receipts": sum(found.receipts for found in played), "handed_over": handed_over,
        "problems": [
            f"seed {planned.seed}: {each}"
            for planned, found in zip(plans, played, strict=True) for each in found.problems
        ],
    }  # fmt: skip


@dataclass
class Args:
    """Compare what providers earn on real nodes, on a virtual clock and with ledgers, with the simulated market."""

    scenario: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SCENARIO")]
    """name of a packaged scenario, or a file"""
    policy: str = "best_value"
    """on every node: a rule, or the folder of a bundle"""
    runs: Count = 1
    """of which profits are the means; those of small providers differ much from one to the next"""
    seed: Seed = FIRST_TEST_SEED
    """of the traffic of the first run; those that follow have the next"""
    speed: Annotated[float | None, Range(0.01, MOST_SPEED)] = None
    """play it by processes before emulated engines, at so many market seconds in a second; default: in one process, on
    a virtual clock"""
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
        setting = setting_of(args.policy)
    except (UsageError, ScenarioError, PolicyError) as error:
        return refuse(PROG, error)
    plans = [plan(scenario, seed) for seed in range(args.seed, args.seed + args.runs)]
    try:
        played = [
            simulated_nodes(each, policy) if args.speed is None else processes(each, setting, args.speed)
            for each in plans
        ]
    except (NetworkError, ConfigError, JournalError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    result = beside(plans, policy, played)
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
