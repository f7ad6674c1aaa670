"""How fast the market runs: `wwwserve bench --json FILE [--seconds S]`.

An agent-step is one provider's view built, its decision applied and its reward paid. Only steps in which a market's
clock moves count, one for each of its providers, all of whose views are then built; further rounds at the same instant
take time and count nothing. Policies are uniform over the legal routes and the markups.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from wwwserve.agents.arguments import Positive, UsageError, parse_args, refuse
from wwwserve.agents.decision import HOLD, ROUTES
from wwwserve.agents.generator import make_generators, uniform
from wwwserve.agents.hardware import profile
from wwwserve.agents.kernel import kernel
from wwwserve.agents.tariff import MARKUPS
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import capacity_per_s
from wwwserve.envs.market_v1 import parallel_env
from wwwserve.envs.scenario import Lengths, Scenario, parse
from wwwserve.envs.state import OWN_DONE

PROG = "wwwserve bench"
LOAD = 0.85
"""Arrivals over what the nodes sustain, see `envs.distribution.capacity_per_s`."""
SMALL_CARDS = ("rtx-4090", "rtx-3090")
LARGE_CARDS = ("rtx-6000-ada", "a40")
"""Taken in turn: nodes of different speed that a random policy does not drive out of balance. The small ones run about
ten requests each, as in `paper/alternating-queue`; the large ones over forty, and so many more come to them that a step
costs nearly twice as much."""
WARM_UP_S = 600.0
"""Simulated time before measuring: several times a request's stay, so that engines are as full as they get."""
WINDOW_S = 2400.0
"""Simulated time measured before the markets start anew."""
CHUNK = 100
"""Steps timed in one go; figures are medians over chunks."""
AGENTS = 256
"""Providers in a batch, whatever the size of its markets."""
PROVIDERS = (4, 8, 64)
COMPARED = 8
"""Providers of the market that PettingZoo's loop runs too."""
LEAST_CHUNKS = 5


class Chunk(NamedTuple):
    """What `CHUNK` steps came to."""

    agent_steps: int
    requests: int  # users' requests completed
    seconds: float
    running: float  # requests of a provider, mean over providers at the end


def scenario(providers: int, gpus: tuple[str, ...] = SMALL_CARDS) -> Scenario:
    """A market of `providers` nodes with Poisson arrivals at `LOAD` of each node's capacity."""
    lengths = Lengths()
    nodes = []
    for i in range(providers):
        gpu = gpus[i % len(gpus)]
        rate = LOAD * capacity_per_s(profile(gpu, "qwen3-8b", 64), lengths.prompt, [(1.0, lengths.output)])
        phases = [{"until_s": WARM_UP_S + WINDOW_S, "rate_per_s": rate}]
        nodes.append({"name": f"n{i + 1}", "gpu": gpu, "traffic": {"kind": "poisson", "phases": phases}})
    return parse({"name": "bench", "duration_s": WARM_UP_S + WINDOW_S, "providers": nodes})


@kernel
def draw(routes, uniforms, route, markup):
    """Random legal decisions: route [A] among those legal in `routes` [A, ROUTES], markup [A]."""
    for a in range(route.size):
        legal = 0
        for k in range(routes.shape[1]):
            legal += routes[a, k]
        skip = np.int64(uniform(uniforms) * legal)
        route[a] = HOLD
        for k in range(routes.shape[1]):
            if routes[a, k] == 1:
                if skip == 0:
                    route[a] = k
                    break
                skip -= 1
        markup[a] = np.int64(uniform(uniforms) * MARKUPS.size)


class Loop:
    """Markets in lockstep under the random policy, always loaded and within their arrival window."""

    def __init__(self, providers: int, threads: int, gpus: tuple[str, ...] = SMALL_CARDS) -> None:
        self.scenario = scenario(providers, gpus)
        self.markets = max(1, AGENTS // providers)
        self.batch = MarketBatch([self.scenario] * self.markets, list(range(self.markets)), threads=threads)
        self.actions = self.batch.actions()
        self._draw_args = (
            self.batch.views.routes.reshape(-1, ROUTES),
            make_generators(0)[0],
            self.actions.route.reshape(-1),
            self.actions.markup.reshape(-1),
        )
        self._warm_up()

    def step(self) -> None:
        """One decision of every provider."""
        draw(*self._draw_args)
        self.batch.step(self.actions)

    def measure(self) -> Chunk:
        """`CHUNK` steps; the markets start anew first if they would run past their arrivals."""
        if self.batch.now_s.max() + CHUNK * self.scenario.decision_interval_s > self.scenario.duration_s:
            for b, planned in enumerate(self.batch.plans):
                self.batch.reset(b, planned)
            self._warm_up()
        done, moved = self._done(), 0
        start = time.perf_counter()
        for _ in range(CHUNK):
            self.step()
            moved += int(np.count_nonzero(self.batch.elapsed_s))
        seconds = time.perf_counter() - start
        running = float(self.batch.markets.engines["running"].mean())
        return Chunk(moved * self.batch.providers, self._done() - done, seconds, running)

    def _warm_up(self) -> None:
        while self.batch.now_s.min() < WARM_UP_S:
            self.step()

    def _done(self) -> int:
        return int(self.batch.markets.providers["counts"][..., OWN_DONE].sum())


def measure(providers: int, threads: int, seconds: float, gpus: tuple[str, ...] = SMALL_CARDS) -> dict[str, Any]:
    """One line of the report; rates are medians over chunks, `best` the fastest chunk."""
    loop = Loop(providers, threads, gpus)
    loop.measure()
    chunks: list[Chunk] = []
    while len(chunks) < LEAST_CHUNKS or sum(chunk.seconds for chunk in chunks) < seconds:
        chunks.append(loop.measure())
    rates = [chunk.agent_steps / chunk.seconds for chunk in chunks]
    return {
        "providers": providers,
        "threads": threads,
        "markets": loop.markets,
        "agent_steps_per_s": round(statistics.median(rates)),
        "best": round(max(rates)),
        "requests_per_s": round(sum(chunk.requests for chunk in chunks) / sum(chunk.seconds for chunk in chunks)),
        "mean_running": round(statistics.fmean(chunk.running for chunk in chunks), 2),
    }


def measure_pettingzoo(providers: int, seconds: float) -> dict[str, Any]:
    """The same market and policy through PettingZoo's own loop, actions sampled from the spaces with the masks."""
    env = parallel_env(scenario(providers))
    for k, agent in enumerate(env.possible_agents):
        env.action_space(agent).seed(k)
    observations, infos = env.reset(seed=0)
    rates: list[float] = []
    spent_s = 0.0
    while len(rates) < LEAST_CHUNKS or spent_s < seconds:
        moved = 0
        start = time.perf_counter()
        for _ in range(CHUNK):
            actions = {a: env.action_space(a).sample(observations[a]["action_mask"]) for a in env.agents}
            observations, _, _, _, infos = env.step(actions)
            moved += infos[env.possible_agents[0]]["elapsed_s"] > 0
        took_s = time.perf_counter() - start
        if infos[env.possible_agents[0]]["now_s"] > WARM_UP_S:
            rates.append(moved * providers / took_s)
            spent_s += took_s
        if infos[env.possible_agents[0]]["now_s"] + CHUNK * env.scenario.decision_interval_s > env.scenario.duration_s:
            observations, infos = env.reset()
    return {"providers": providers, "agent_steps_per_s": round(statistics.median(rates)), "best": round(max(rates))}


def report(seconds: float) -> dict[str, Any]:
    """All figures, each measured for `seconds`."""
    threads = sorted({1, os.cpu_count() or 1})
    runs = [measure(providers, each, seconds) for providers in PROVIDERS for each in threads]
    zoo = measure_pettingzoo(COMPARED, seconds)
    batch = next(run for run in runs if run["providers"] == COMPARED and run["threads"] == 1)
    zoo["ratio"] = round(batch["agent_steps_per_s"] / zoo["agent_steps_per_s"], 1)
    large = measure(COMPARED, 1, seconds, LARGE_CARDS)
    return {"load": LOAD, "runs": runs, "large_cards": large, "pettingzoo": zoo}


@dataclass
class Args:
    """Agent-steps per second of the market."""

    json: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """where to write the report"""
    seconds: Positive = 5.0
    """time for each figure, warm-up aside"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the report; returns the exit status, 2 for what cannot be done."""
    try:
        args = parse_args(Args, PROG, argv)
    except UsageError as error:
        return refuse(PROG, error)
    figures = report(args.seconds)
    for run in figures["runs"]:
        print(
            f"{run['providers']:>3} providers, {run['threads']} thread{'s' if run['threads'] > 1 else ''}: "
            f"{run['agent_steps_per_s']:>9,} agent-steps/s (best {run['best']:,}), "
            f"{run['requests_per_s']:,} requests/s, {run['mean_running']:.1f} running"
        )
    large = figures["large_cards"]
    print(
        f"  8 providers, 1 thread, large cards: {large['agent_steps_per_s']:,} agent-steps/s "
        f"(best {large['best']:,}), {large['requests_per_s']:,} requests/s, {large['mean_running']:.1f} running"
    )
    zoo = figures["pettingzoo"]
    print(
        f"{zoo['providers']:>3} providers through PettingZoo: {zoo['agent_steps_per_s']:,} agent-steps/s; "
        f"the batch is {zoo['ratio']} times faster"
    )
    args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
