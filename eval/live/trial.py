"""Plays a scenario's arrivals through a live network: `wwwserve trial SCENARIO --policy NAME|BUNDLE...`.

Each run starts a network of its own, a node and an engine for every provider, with one policy on all nodes; or it uses
one that runs already, whose nodes `--network FILE` lists. Arrivals and lengths are those of `eval.compare` with the
same seed. Beside what was measured stands what the simulator predicts for the same requests and engines.

Emulated engines and their nodes can be run at `--speed` times real time; times are reported in the market's seconds.
A node has uniforms of its own, where a simulated market has one set for all, so single decisions differ.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import aiohttp
import numpy as np
import orjson
import tyro
from numpy.typing import NDArray

from wwwserve.agents.arguments import Count, File, Policies, Range, Seed, UsageError, flat, parse_args, refuse
from wwwserve.agents.hardware import Profile
from wwwserve.agents.policy.bundle import SHIPPED
from wwwserve.agents.rules import RULES, Policy
from wwwserve.envs.batch import RequestTable
from wwwserve.envs.oracle import ORACLES, Oracle
from wwwserve.envs.scenario import Scenario, ScenarioError, load
from wwwserve.envs.state import MarketPlan, plan
from wwwserve.eval.compare import FIRST_TEST_SEED, Tree, cell, check_outputs, columns, measures, over_seeds, write_json
from wwwserve.eval.live.networks import (
    Live,
    check,
    check_lengths,
    longest_request,
    own,
    remote,
    vllm_servers,
)
from wwwserve.eval.live.users import Talk, Tokens, Users
from wwwserve.eval.metrics import threshold_key
from wwwserve.eval.play import Run, run
from wwwserve.eval.policies import LEARNED, PolicyError, load_policy
from wwwserve.serving.config import ConfigError
from wwwserve.serving.engine import local_vllm
from wwwserve.serving.engine.fit import CalibrationError
from wwwserve.serving.engine.local_vllm import PrepareError
from wwwserve.serving.local_nodes import NetworkError, cpu_s

DEFAULT_POLICIES = ("single", "www_serve", LEARNED)
PROG = "wwwserve trial"
Client = Literal["tokens", "openai"]
KV_TOKENS = 2560  # of a real engine: a full batch of `live/pair` nearly fills it, as is usual on a GPU
SETTLE_S = 2.0  # between a network's being ready and the first arrival
MOST_SPEED = 100.0
LONGEST = 512  # tokens at least, of the requests that engines are measured with


class Measured(NamedTuple):
    """What one run of a live network showed."""

    run: Run
    cpu_cores: dict[str, float]  # CPU time over the time of the run, by kind of process
    lag_s: float  # of the market: longest that a request was sent after its time
    failed: int  # requests that got an error
    latency_s: NDArray[np.float64]  # of all that the plan has; infinite for those that did not come or did not end


async def play(
    network: Live, planned: MarketPlan, speed: float, stream: bool, turn: int = 0, told: bool = True,
    client: Client = "tokens",
) -> Measured:  # fmt: skip
    """Send every request at its time, turns of a session after the answer before; measure until all are answered, or
    the scenario's drain is over. See `eval.live.users` for who sends them.

    With another `turn`, prompts are other ones of the same lengths, so that no engine has them cached. Nodes are told
    the length of an answer, or else only how long it can be, which takes engines that end it at `min_tokens`.
    """
    traffic, scenario = planned.traffic, planned.scenario
    count = traffic.time_s.size
    arrival_s, latency_s, first_s = traffic.time_s.copy(), np.full(count, np.inf), np.full(count, np.inf)
    cached = np.zeros(count, np.int64)
    lag_s, failed = 0.0, 0
    follower = {int(u): r for r, u in enumerate(traffic.follows.tolist()) if u >= 0}
    prices: list[list[float]] = []

    async def come(first: int) -> None:
        """A request, and those that follow its answer."""
        r: int | None = first
        while r is not None:
            due_s = start_s + float(arrival_s[r]) / speed
            await asyncio.sleep(due_s - time.monotonic())
            await one(r, due_s)
            u, r = r, follower.get(r)
            if r is not None:
                at_s = float(arrival_s[u] + latency_s[u] + traffic.think_s[r])
                if at_s >= scenario.duration_s:  # nor does it come if there was no answer
                    return
                arrival_s[r] = at_s

    async def one(r: int, due_s: float) -> None:
        nonlocal lag_s, failed
        lag_s = max(lag_s, (time.monotonic() - due_s) * speed)
        answer = await users.ask(r)
        if answer is None or not answer.whole:
            failed += 1
            return
        latency_s[r] = (answer.ended_s - due_s) * speed
        first_s[r] = (answer.first_s - due_s) * speed if stream else np.inf
        cached[r] = answer.cached

    async def watch_prices() -> None:
        while True:
            with_prices = []
            for site in network.sites:
                async with session.get(f"{site.url}/network") as response:
                    with_prices.append(float(orjson.loads(await response.read())["tariff"]["output"]))
            prices.append(with_prices)
            await asyncio.sleep(1.0)

    used_s = {kind: sum(map(cpu_s, pids)) for kind, pids in network.pids.items()}
    own_s = time.process_time()
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, AsyncExitStack() as closing:
        users: Users = (
            await closing.enter_async_context(Talk(network, planned, stream, turn, told))
            if client == "openai"
            else Tokens(network, planned, session, stream, turn, told)
        )
        watching = asyncio.create_task(watch_prices())
        start_s = time.monotonic()
        asked = {asyncio.create_task(come(r)) for r in np.flatnonzero(traffic.follows < 0).tolist()}
        until_s = start_s + (scenario.duration_s + scenario.drain_s) / speed
        if asked:
            _, late = await asyncio.wait(asked, timeout=max(0.0, until_s - time.monotonic()))
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            for task in asked - late:
                task.result()
        took_s = time.monotonic() - start_s
        watching.cancel()
    cpu = {kind: (sum(map(cpu_s, pids)) - used_s[kind]) / took_s for kind, pids in network.pids.items()}
    cpu["client"] = (time.process_time() - own_s) / took_s
    came = np.isfinite(arrival_s)
    requests = RequestTable(
        arrival_s=arrival_s[came], origin=traffic.provider[came], executor=np.full(came.sum(), -1, np.int32),
        klass=traffic.klass[came], prompt=traffic.prompt[came].astype(np.int64), cached=cached[came],
        output=traffic.output[came].astype(np.int64), latency_s=latency_s[came], first_token_s=first_s[came],
    )  # fmt: skip
    sites = len(network.sites)
    price = np.mean(prices, axis=0) if prices else np.full(sites, np.nan)
    return Measured(Run(planned.seed, requests, np.full(sites, np.nan), price), cpu, lag_s, failed, latency_s)


def live(
    scenario: Scenario,
    policies: dict[str, str | None],
    loaded: Sequence[Policy],
    seeds: Sequence[int],
    speed: float,
    stream: bool,
    opened: Callable[[MarketPlan, str | None], Any],
    report: Callable[[str], None] = lambda line: None,
    client: Client = "tokens",
) -> Tree:
    """Run every policy with every seed, live and simulated; the mapping that `--json` writes.

    `policies` has what a node is told, by name, of the policies `loaded`; `opened` gives a network as a context.
    `scenarios` and `paired` are as in `eval.compare`, with `cpu_cores`, `lag_s` and `failed` beside each policy's
    measures (profit is None: its networks keep no ledger); `predicted` has what the simulator makes of the same
    requests, and `gap` live less predicted, paired by seed.
    """
    seen: dict[str, list[Measured]] = {name: [] for name in policies}
    plans: dict[str, list[MarketPlan]] = {name: [] for name in policies}
    profiles: list[Profile] = []
    for seed in seeds:
        drawn = plan(scenario, seed)
        for turn, (name, setting) in enumerate(policies.items()):
            with opened(drawn, setting) as network:
                profiles = [site.profile for site in network.sites]
                check_lengths(drawn, profiles)
                time.sleep(SETTLE_S)
                seen[name].append(asyncio.run(play(network, drawn, speed, stream, turn, client=client)))
            plans[name].append(drawn._replace(profiles=tuple(profiles)))
            last = seen[name][-1]
            report(
                f"{scenario.name}  {name}  seed {seed}: {last.failed} failed, sent at most {last.lag_s:.2f} s late, "
                f"cores used: {', '.join(f'{kind} {cores:.2f}' for kind, cores in last.cpu_cores.items())}"
            )
    cells, predicted, gap, trees = {}, {}, {}, {}
    for policy, (name, measured) in zip(loaded, seen.items(), strict=True):
        runs = [each.run for each in measured]
        trees[name] = measures(runs, scenario)
        cells[name] = cell(trees[name], runs) | {
            "cpu_cores": over_seeds([each.cpu_cores for each in measured]),
            "lag_s": max(each.lag_s for each in measured),
            "failed": sum(each.failed for each in measured),
        }
        simulated = run(plans[name], policy, 1)
        expected = measures(simulated, scenario)
        predicted[name] = cell(expected, simulated)
        gap[name] = over_seeds(trees[name], expected)
    baseline = next(iter(policies))
    paired = {name: over_seeds(each, trees[baseline]) for name, each in trees.items() if name != baseline}
    return {
        "scenarios": {scenario.name: cells},
        "paired": {
            "baseline": baseline, "first_seed": int(seeds[0]), "seeds": len(seeds), "scenarios": {scenario.name: paired}
        },
        "predicted": {scenario.name: predicted},
        "gap": {scenario.name: gap},
        "network": {
            "speed": speed, "stream": stream, "client": client, "profiles": [asdict(profile) for profile in profiles]
        },
    }  # fmt: skip


def table(result: Tree, scenario: Scenario) -> str:
    """Live and simulated side by side: attainment, its mean over the thresholds, mean latency, s, and the share of
    prompt tokens that were cached."""
    rows = [
        [
            "policy",
            "",
            *(f"{t:g} s" for t in scenario.slo.thresholds_s),
            "slo_auc",
            "latency s",
            "p90",
            "cached",
            "failed",
        ]
    ]
    for name, mine in result["scenarios"][scenario.name].items():
        theirs = result["predicted"][scenario.name][name]
        for kind, each in (("live", mine), ("simulated", theirs)):
            slo = [each["slo"][threshold_key(t)][0] for t in scenario.slo.thresholds_s]
            times = [each["latency_s"]["mean"][0], each["latency_s"]["p90"][0]]
            shown = [*(_number(x, 3) for x in (*slo, each["slo_auc"][0])), *(_number(x, 2) for x in times)]
            shown.append(_number(each["prefix_hit"][0], 3))
            rows.append([name, kind, *shown, str(each.get("failed", ""))])
    count = next(iter(result["scenarios"][scenario.name].values()))["requests"]
    return f"{scenario.name}: {count} requests in {result['paired']['seeds']} runs\n{columns(rows)}"


def _number(x: float | None, digits: int) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def setting_of(argument: str) -> str | None:
    """What a node is told of a policy. Raises UsageError for one that a node cannot run."""
    if argument == LEARNED:
        return None
    if argument in SHIPPED:
        return argument
    if argument in ORACLES:
        raise UsageError(f"policy {argument!r} sees what no node can")
    if argument not in RULES and not Path(argument).is_dir():
        raise UsageError(
            f"policy {argument!r} is no rule ({', '.join(RULES)}), {LEARNED}, "
            f"{', '.join(SHIPPED)} or the folder of a bundle"
        )
    return argument if argument in RULES else str(Path(argument).resolve())


@dataclass
class Args:
    """Play a scenario through a live network."""

    scenario: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SCENARIO")]
    """name of a packaged scenario, or a file"""
    policy: Policies = ()
    """on every node; differences are from the first; default: single, www_serve and learned"""
    runs: Count = 3
    """of each policy"""
    first_seed: Seed = FIRST_TEST_SEED
    """the seeds are this one and those that follow"""
    load: Annotated[tuple[float, ...], Range(0, above=True), tyro.conf.arg(metavar="LOAD...")] = (1.0,)
    """times as many requests or sessions; several are run one after the other"""
    speed: Annotated[float, Range(0.01, MOST_SPEED)] = 1.0
    """market seconds in a second"""
    stream: bool = False
    """ask for streams, so that times to first token are seen"""
    client: Client = "tokens"
    """openai: users talk by that client; tokens: they send tokens, of exactly the lengths drawn"""
    engine: Literal["emulated", "vllm"] = "emulated"
    """vllm: real vLLM with a small model in every place, measured first"""
    kv_tokens: Annotated[int, Range(local_vllm.MAX_MODEL_LEN)] = KV_TOKENS
    """with --engine vllm: of each engine's KV cache"""
    network: File = None
    """of a network that runs: YAML with nodes, URLs in the order of the providers"""
    json: File = None
    """write the results to this file"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if a network fails, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
        policies = flat(args.policy) or list(DEFAULT_POLICIES)
        scenarios = [_at_load(load(args.scenario), each, len(args.load) > 1) for each in args.load]
        check(scenarios[0])
        settings = {argument: setting_of(argument) for argument in policies}
        if len(settings) < len(policies):
            raise UsageError("a policy is given twice")
        loaded = [policy for each in policies if not isinstance(policy := load_policy(each), Oracle)]
        check_outputs(args.json, None)
        seeds = range(args.first_seed, args.first_seed + args.runs)
        if args.engine == "vllm" and (args.speed != 1 or args.network is not None):
            raise UsageError("--engine vllm goes with --speed 1 and without --network")
        if args.network is not None:
            if len(loaded) != 1:
                raise UsageError("--network takes one --policy, the one that its nodes run")
            running = remote(args.network, scenarios[0], loaded[0], args.speed)
    except (UsageError, ScenarioError, PolicyError) as error:
        return refuse(PROG, error)

    @contextmanager
    def opened(planned: MarketPlan, policy: str | None) -> Iterator[Live]:
        if args.network is not None:
            yield running
            return
        with own(planned, policy, args.speed, servers) as network:
            yield network

    try:
        with ExitStack() as stack:
            servers = None
            if args.engine == "vllm":
                longest = max(LONGEST, *(longest_request(plan(each, seed)) for each in scenarios for seed in seeds))
                servers = stack.enter_context(vllm_servers(len(scenarios[0].providers), longest, args.kv_tokens))
            results = [
                live(
                    each, settings, loaded, seeds, args.speed, args.stream, opened,
                    report=lambda line: print(line, file=sys.stderr, flush=True), client=args.client,
                )
                for each in scenarios
            ]  # fmt: skip
    except (NetworkError, ConfigError, UsageError, CalibrationError, PrepareError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(table(each, scenario) for each, scenario in zip(results, scenarios, strict=True)))
    if args.json is not None:
        result = results[0]
        for each in results[1:]:
            for part in ("scenarios", "predicted", "gap"):
                result[part] |= each[part]
            result["paired"]["scenarios"] |= each["paired"]["scenarios"]
        write_json(args.json, result)
    return 0


def _at_load(scenario: Scenario, factor: float, among_others: bool) -> Scenario:
    at_load = scenario.at_load(factor)
    return replace(at_load, name=f"{scenario.name} at {factor:g}") if among_others else at_load


if __name__ == "__main__":
    sys.exit(main())
