"""Networks to play a scenario on: a node and an engine for each provider, started here, or such as run already."""

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import yaml

from wwwserve.agents import strict_yaml
from wwwserve.agents.arguments import UsageError
from wwwserve.agents.hardware import BLOCK_TOKENS, Profile
from wwwserve.agents.lengths import Lognormal
from wwwserve.agents.policy.bundle import SHIPPED
from wwwserve.agents.rules import Policy
from wwwserve.envs.scenario import Scenario
from wwwserve.envs.state import MarketPlan
from wwwserve.envs.traffic import expected_output
from wwwserve.eval.policies import LEARNED
from wwwserve.serving.config import parse
from wwwserve.serving.engine import local_vllm
from wwwserve.serving.engine.calibrate import calibrate
from wwwserve.serving.engine.local_vllm import SMOLLM2
from wwwserve.serving.engine.probe import Settings
from wwwserve.serving.local_nodes import (
    Accounts,
    NetworkError,
    NodeFiles,
    Process,
    emulator,
    free_ports,
    local_urls,
    look,
    started,
    vllm,
)

SHORTEST = Lognormal(1.0, 0.0, 1)  # answers of emulated engines, which are then as long as `min_tokens` says
TOKENS, REPEATS = 16, 2  # of an answer that is timed, and of each load, when engines are measured


class Site(NamedTuple):
    """One node of a network: where users reach it, the model they ask for, and its engine's profile."""

    url: str
    model: str
    profile: Profile


class Live(NamedTuple):
    """A network that runs: a site for each provider; of its own, the processes of nodes and engines, what the nodes
    have on disk, and where the engines are."""

    sites: list[Site]
    pids: dict[str, list[int]]
    nodes: Sequence[Process] = ()
    files: Sequence[NodeFiles] = ()
    engine_urls: Sequence[str] = ()
    emulated: bool = True  # its engines


class Servers(NamedTuple):
    """Engines that run already, one for each provider."""

    urls: list[str]
    profiles: list[Profile]
    pids: list[int]


def check(scenario: Scenario) -> None:
    """Raises UsageError for a scenario that asks for what a live network does not play."""
    for provider in scenario.providers:
        if provider.misreport is not None:
            raise UsageError(f"{scenario.name}: provider {provider.name} misreports, live nodes are honest")
        if any(start > 0 or end < scenario.duration_s for start, end in provider.online_s):
            raise UsageError(f"{scenario.name}: provider {provider.name} is offline for a time, live nodes stay")
    if scenario.economy.duel_probability > 0:
        raise UsageError(f"{scenario.name}: it has duels, live nodes hold none")


def node(scenario: Scenario, planned: MarketPlan, i: int, policy: str | None, speed: float) -> dict[str, Any]:
    """The configuration of provider i's node, but for addresses and peers."""
    provider, economy = scenario.providers[i], scenario.economy
    lengths = asdict(expected_output(provider, None))
    classes = {
        each.name: {
            "deadline_s": each.deadline_s, "value": each.value, "output": asdict(expected_output(provider, each))
        }
        for each in scenario.slo.classes
    }  # fmt: skip
    market = {
        "payment": economy.payment, "rtt_s": scenario.rtt_ms / 1000, "gossip_s": scenario.gossip_interval_s,
        "tick_s": scenario.decision_interval_s, "stake_rule": economy.stake_rule, "speed": speed,
        "prefix_cache": planned.shares_prefixes,
    }  # fmt: skip
    return {
        "name": provider.name, "seed": planned.seed * len(scenario.providers) + i, "policy": policy,
        "serves": list(provider.serves), "stake": economy.initial_stake, "credit": economy.initial_credit,
        "compute_cost_per_ktok": economy.compute_cost_per_ktok,
        "prompt_tokens": float(planned.mean_prompt[i]), "uncached_tokens": float(planned.mean_uncached[i]),
        "output": lengths, "classes": classes, "deadlines_s": list(scenario.slo.thresholds_s), "market": market,
        "log": "warning",
        "limits": {"held": 100_000},  # the simulator's nodes have no bound
    }  # fmt: skip


@contextmanager
def own(
    planned: MarketPlan, policy: str | None, speed: float, servers: Servers | None = None,
    accounts: Accounts | None = None,
) -> Iterator[Live]:  # fmt: skip
    """A network of the plan's providers, on emulated engines of its own or before `servers`; with `accounts`, nodes
    keep ledgers. Raises NetworkError."""
    scenario = planned.scenario
    count = len(scenario.providers)
    ports = free_ports(2 * count)
    block_tokens = scenario.prefix_cache.block_tokens if scenario.prefix_cache is not None else None
    engines = [] if servers else [
        emulator(port, gpu=each.gpu, model=each.model, max_num_seqs=each.max_num_seqs, speed=speed, seed=i,
                 serves=each.serves, lengths=SHORTEST, block_tokens=block_tokens)
        for i, (port, each) in enumerate(zip(ports[count:], scenario.providers, strict=True))
    ]  # fmt: skip
    engine_urls = servers.urls if servers else local_urls(ports[count:])
    models = [SMOLLM2 if servers else provider.serves[0] for provider in scenario.providers]
    profiles = servers.profiles if servers else list(planned.profiles)
    nodes = []
    for i, (provider, profile) in enumerate(zip(scenario.providers, profiles, strict=True)):
        settings = node(scenario, planned, i, policy, speed)
        settings["serves"] = [SMOLLM2] if servers else settings["serves"]
        settings["port"] = ports[i]
        settings["engine"] = {"url": engine_urls[i], "profile": {"kind": "measured", **asdict(profile)}}
        plain = orjson.loads(orjson.dumps(settings))
        parse(plain | {"key": "made when it starts"}, f"node {provider.name}")
        nodes.append(plain)
    with started(nodes, engines, accounts=accounts) as network:
        sites = [Site(*each) for each in zip(network.urls, models, profiles, strict=True)]
        pids = servers.pids if servers else [p.pid for p in network.engines]
        processes = {"nodes": [p.pid for p in network.nodes], "engines": pids}
        yield Live(sites, processes, network.nodes, network.files, network.engine_urls, servers is None)


@contextmanager
def vllm_servers(count: int, longest: int, kv_tokens: int) -> Iterator[Servers]:
    """Real vLLM with a small model, each on a core, with a KV cache of `kv_tokens`.

    All have the profile of the first, measured while the others are busy, with requests of up to `longest` tokens; each
    time, as a machine is not always as fast. Raises NetworkError, serving.engine.local_vllm.PrepareError and
    serving.engine.fit.CalibrationError.
    """
    with vllm([SMOLLM2] * count, kv_tokens=kv_tokens) as (urls, processes):
        profile = replace(_measured(urls, longest), kv_blocks=kv_blocks(kv_tokens))
        yield Servers(urls, [profile] * count, [process.pid for process in processes])


def _measured(urls: Sequence[str], longest: int) -> Profile:
    settings = Settings(
        beside=tuple(urls[1:]), longest=longest, tokens=TOKENS, repeats=REPEATS, max_num_seqs=local_vllm.MAX_NUM_SEQS
    )
    start_s = time.monotonic()
    found = asyncio.run(calibrate(urls[0], settings))
    print(f"{urls[0]}, measured in {time.monotonic() - start_s:.0f} s:\n{found.report()}", file=sys.stderr)
    return found.profile


def kv_blocks(kv_tokens: int) -> int:
    """Blocks of a profile for vLLM with a KV cache of so many tokens, whose blocks are larger.

    Each sequence leaves more of its last one empty, and one is never used.
    """
    unused = local_vllm.MAX_NUM_SEQS * (local_vllm.KV_BLOCK - BLOCK_TOKENS) // 2 + local_vllm.KV_BLOCK
    return (kv_tokens - unused) // BLOCK_TOKENS


def remote(file: Path, scenario: Scenario, policy: Policy, speed: float) -> Live:
    """A network that runs already: FILE has the `nodes`, URLs in the order of the scenario's providers.

    Users ask for what a node serves first. Raises UsageError for another file, or nodes that do not answer, or run
    another policy or at another speed.
    """
    try:
        content = strict_yaml.load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--network {file}: {' '.join(str(error).split())}") from None
    urls = content.get("nodes") if isinstance(content, dict) and set(content) == {"nodes"} else None
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise UsageError(f"--network {file}: expected a mapping with nodes, a list of URLs")
    if len(urls) != len(scenario.providers):
        expected = len(scenario.providers)
        raise UsageError(f"--network {file}: has {len(urls)} nodes, expected {expected}, as {scenario.name} has")
    sites = []
    for url in urls:
        try:
            seen = look(url)
        except NetworkError as error:
            raise UsageError(f"--network {file}: {error}") from None
        if seen["policy"] not in {policy.name, *(SHIPPED if policy.name == LEARNED else ())}:
            raise UsageError(f"--network {file}: {url} runs the policy {seen['policy']}, expected {policy.name}")
        if seen["speed"] != speed:
            raise UsageError(f"--network {file}: {url} runs at speed {seen['speed']:g}, --speed is {speed:g}")
        if not seen["serves"]:
            raise UsageError(f"--network {file}: {url} serves no model")
        sites.append(Site(url.rstrip("/"), seen["serves"][0], Profile(**seen["engine"]["profile"])))
    return Live(sites, {})


def check_lengths(planned: MarketPlan, profiles: Sequence[Profile]) -> None:
    """Raises UsageError for a request that one of the engines could not run whole."""
    longest = longest_request(planned)
    limit = min(min(profile.max_model_len, profile.kv_tokens) for profile in profiles)
    if longest > limit:
        raise UsageError(
            f"{planned.scenario.name}: a request has {longest} tokens with its answer, the smallest engine "
            f"takes {limit}"
        )


def longest_request(planned: MarketPlan) -> int:
    """Tokens of the longest request with its answer."""
    return int((planned.traffic.prompt + planned.traffic.output).max(initial=0))
