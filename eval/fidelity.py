"""How far the simulated engine is from a real one, on the same arrivals: `wwwserve fidelity --json FILE`.

The engine is calibrated by set loads, as `wwwserve calibrate` does it. Then it gets many requests at once,
which tells its capacity in requests/s; then, at shares of that, come Poisson arrivals with lognormal lengths that
calibration has not seen, each as a stream of exactly the tokens drawn. The simulator plays the same arrivals on the
calibrated profile. Every load is played several times with other prompts of the same lengths, so that by how much the
engine differs from itself, the noise, stands beside by how much the simulator differs from it.

TTFT and latency count from a request's arrival to its first and last token, at the client; to the simulator's is added
what calibration found that a request takes beside iterations.

Without `--url` the engine is real vLLM with a small model, on one CPU core of this machine; the client has another.
"""

import asyncio
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import orjson
import tyro

from wwwserve.agents.arguments import Count, File, Name, Range, Seed, UsageError, parse_args, refuse
from wwwserve.agents.hardware import CHUNK_TOKENS, Profile
from wwwserve.agents.lengths import Lognormal
from wwwserve.envs.trace import Trace
from wwwserve.eval.compare import Tree, check_outputs, write_json
from wwwserve.eval.live.prompts import HIGHEST_TOKEN, LOWEST_TOKEN
from wwwserve.eval.metrics import FloatArray, time_stats
from wwwserve.eval.replay import replay
from wwwserve.serving.engine import local_vllm
from wwwserve.serving.engine.calibrate import Measurement
from wwwserve.serving.engine.fit import CalibrationError
from wwwserve.serving.engine.local_vllm import PROFILES, SMOLLM2, PrepareError
from wwwserve.serving.engine.probe import Prober, Settings, connected, find_model, settle
from wwwserve.serving.local_nodes import NetworkError, vllm

PROG = "wwwserve fidelity"
BURST = 4  # times as many requests as the engine runs at once: at once, they tell its capacity
MARGIN = 64  # tokens, of the longest request that is calibrated with beyond the longest drawn
MEASURES = ("latency_s", "ttft_s")
STATISTICS = ("mean", "p50", "p90", "p99")


class Played(NamedTuple):
    """Times of every request [R], s, from its arrival; how late the client sent one, at most."""

    ttft_s: FloatArray
    latency_s: FloatArray
    lag_s: float

    def stats(self) -> dict[str, dict[str, float]]:
        """`time_stats` by measure."""
        return {measure: time_stats(getattr(self, measure)) for measure in MEASURES}


@dataclass(frozen=True)
class Study:
    """What an engine is asked for."""

    shares: tuple[float, ...]
    """Loads, of the capacity."""
    duration_s: float
    """Of the arrivals of each load."""
    repeats: int
    """How often each load is played."""
    seed: int
    prompt: Lognormal
    output: Lognormal

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return self.prompt.max + self.output.max

    def requests(self, index: int, time_s: FloatArray) -> Trace:
        """Requests that come at `time_s` [R], from 0; lengths are those of the `index`th load."""
        rng = np.random.default_rng((self.seed, index, 1))
        prompt, output = (_draw(each, time_s.size, rng) for each in (self.prompt, self.output))
        return Trace(time_s, prompt, output, period_s=max(float(time_s[-1]), 1.0))

    def poisson(self, index: int, rate_per_s: float) -> FloatArray:
        """Arrivals of the `index`th load, s; at least two."""
        rng = np.random.default_rng((self.seed, index, 0))
        count = max(2, int(rng.poisson(rate_per_s * self.duration_s)))
        return np.sort(rng.uniform(0.0, self.duration_s, count))


def _draw(lengths: Lognormal, count: int, rng: np.random.Generator) -> Any:
    drawn = np.exp(math.log(lengths.median) + lengths.sigma * rng.standard_normal(count))
    return np.clip(np.rint(drawn), 1, lengths.max).astype(np.int32)


def simulated(requests: Trace, engine: Profile, overhead_s: float) -> Played:
    """What the simulator makes of the requests; each takes `overhead_s` beside the engine's iterations."""
    played = replay(requests, engine, len(requests.time_s) / requests.period_s)
    return Played(played.ttft_s + overhead_s, played.latency_s + overhead_s, 0.0)


async def play(prober: Prober, requests: Trace, rng: np.random.Generator) -> Played:
    """Send every request at its time, with a prompt drawn anew. Raises CalibrationError for an answer that is none."""
    count = len(requests.time_s)
    ttft_s, latency_s, late_s = np.zeros(count), np.zeros(count), np.zeros(count)
    prompts = [rng.integers(LOWEST_TOKEN, HIGHEST_TOKEN, int(n)).tolist() for n in requests.prompt]
    start_s = prober.clock()

    async def one(r: int) -> None:
        due_s = start_s + float(requests.time_s[r])
        await asyncio.sleep(due_s - prober.clock())
        late_s[r] = prober.clock() - due_s
        seen = await prober.complete(prompts[r], int(requests.output[r]))
        ttft_s[r], latency_s[r] = seen.first_s - due_s, seen.last_s - due_s

    try:
        async with asyncio.TaskGroup() as group:
            for r in range(count):
                group.create_task(one(r))
    except ExceptionGroup as failed:
        raise CalibrationError(str(failed.exceptions[0])) from None
    return Played(ttft_s, latency_s, float(late_s.max()))


def capacity_per_s(burst: Played) -> float:
    """Requests/s of an engine that has more than it can run: what it has done, in parts of requests, when the last of a
    burst begins, over the time until then."""
    until_s = float(burst.ttft_s.max())
    part = (until_s - burst.ttft_s) / np.maximum(burst.latency_s - burst.ttft_s, 1e-9)
    return float(np.clip(part, 0.0, 1.0).sum() / until_s)


def compared(requests: Trace, expected: Played, seen: Sequence[Played]) -> Tree:
    """Simulated and measured times, the error of the simulated against each play, and what plays differ, relative."""
    predicted, plays = expected.stats(), [each.stats() for each in seen]
    error: Tree = {}
    noise: Tree = {}
    for measure in MEASURES:
        error[measure], noise[measure] = {}, {}
        for name in STATISTICS:
            values = [each[measure][name] for each in plays]
            error[measure][name] = [predicted[measure][name] / value - 1.0 for value in values]
            noise[measure][name] = max(values) / min(values) - 1.0
    return {
        "requests": len(requests.time_s), "simulated": predicted, "measured": plays, "error": error, "noise": noise,
        "lag_s": max(each.lag_s for each in seen),
        "by_request": {
            "time_s": requests.time_s.tolist(), "prompt": requests.prompt.tolist(), "output": requests.output.tolist(),
            **{measure: [getattr(each, measure).tolist() for each in seen] for measure in MEASURES},
        },
    }  # fmt: skip


async def study(url: str, settings: Settings, wanted: Study, known: Tree | None) -> Tree:
    """Calibrate the engine at `url`, unless what was found is `known`, and play; the mapping that `--json` writes.

    A turn of calibration goes before each play of all loads, so that both see the machine in the same moods. Raises
    CalibrationError for an engine that cannot be measured, UsageError for lengths that it does not take.
    """
    async with connected(settings) as session:
        model, max_model_len = await find_model(session, url, settings.model)
        prober = Prober(url, model, settings, session)
        measurement = await Measurement.begin(prober, max_model_len)
        limits = measurement.limits
        limit = min(max_model_len, limits.kv_tokens)
        if wanted.longest > limit:
            raise UsageError(
                f"--prompt, --output: requests have up to {wanted.longest} tokens, the engine takes {limit}"
            )
        loads: dict[str, Trace] = {"burst": wanted.requests(0, np.zeros(BURST * limits.max_num_seqs))}
        seen: dict[str, list[Played]] = {}
        capacity = 0.0
        for turn in range(wanted.repeats):
            if known is None:
                await measurement.turn()
            for index, name in enumerate(["burst", *map(str, wanted.shares)]):
                if name not in loads:
                    loads[name] = wanted.requests(index, wanted.poisson(index, float(name) * capacity))
                await settle(prober)
                rng = np.random.default_rng((wanted.seed, index, 2 + turn))
                played = await play(prober, loads[name], rng)
                seen.setdefault(name, []).append(played)
                capacity = capacity or capacity_per_s(played)
                mean_s = played.latency_s.mean()
                _say(f"turn {turn + 1}, load {name}: {len(played.latency_s)} requests, mean latency {mean_s:.3f} s")
        if known is None:
            found = measurement.found()
            _say(found.report())
            known = found.json()
    engine, overhead_s = Profile(**known["profile"]), float(known["overhead_s"])
    results: Tree = {}
    for name, requests in loads.items():
        results[name] = compared(requests, simulated(requests, engine, overhead_s), seen[name])
        results[name]["rate_per_s"] = None if name == "burst" else float(name) * capacity
    return {
        "engine": {"url": url, "model": model}, "calibration": known, "study": asdict(wanted),
        "capacity_per_s": capacity, "loads": results,
    }  # fmt: skip


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(result: Tree) -> str:
    """The result in Markdown: of each load the measured times, medians over its plays, and the simulator's errors."""
    lines = ["| load | requests | | mean | p50 | p90 | p99 | noise of mean, p90 |", "|---|---|---|---|---|---|---|---|"]
    for name, load in result["loads"].items():
        title = "at once" if name == "burst" else f"{float(name):.0%}, {load['rate_per_s']:.3g}/s"
        first = [title, str(load["requests"])]
        for measure, title in zip(MEASURES, ("latency", "TTFT"), strict=True):
            cells = []
            for each in STATISTICS:
                time_s = statistics.median(play[measure][each] for play in load["measured"])
                cells.append(f"{time_s:.3g} s {statistics.median(load['error'][measure][each]):+.1%}")
            noise = ", ".join(f"{load['noise'][measure][each]:.1%}" for each in ("mean", "p90"))
            lines.append(f"| {' | '.join([*first, title, *cells, noise])} |")
            first = ["", ""]
    return "\n".join(lines)


@contextmanager
def own_vllm(model: str) -> Iterator[str]:
    """vLLM with a small model on a core of its own, while this process keeps to another; its URL.

    Raises NetworkError and serving.engine.local_vllm.PrepareError.
    """
    cores = local_vllm.cores()
    with vllm([model]) as ([url], _):
        os.sched_setaffinity(0, {cores[-1]})
        try:
            yield url
        finally:
            os.sched_setaffinity(0, cores)


def _lengths(argument: str, values: Sequence[float]) -> Lognormal:
    median, sigma, longest = values
    if not (median >= 1 and 0 <= sigma <= 4 and longest >= median):
        raise UsageError(f"{argument}: expected a median of at least 1, a sigma of 0 to 4, and a maximum above")
    return Lognormal(median, sigma, int(longest))


Spread = Annotated[tuple[float, float, float], tyro.conf.arg(metavar="MEDIAN SIGMA MAX")]


@dataclass
class Args:
    """Play arrivals on an engine and in the simulator."""

    url: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """of a vLLM or SGLang engine that has nothing else to do; default: vLLM on a CPU core"""
    model: Name = None
    """that the engine serves, by default its first; without --url one of those that can be prepared"""
    loads: Annotated[tuple[float, ...], Range(0, 2, above=True)] = (0.3, 0.5, 0.7, 0.85)
    """arrivals/s, in parts of the capacity"""
    seconds: Count = 40
    """of arrivals at each load"""
    repeats: Count = 3
    """turns of calibration, and plays of each load"""
    seed: Seed = 0
    """of arrivals and lengths"""
    prompt: Spread = (120.0, 0.8, 700.0)
    """tokens of prompts, lognormal"""
    output: Spread = (48.0, 0.7, 256.0)
    """tokens of answers, lognormal"""
    calibration: File = None
    """what calibration found; measured, and written there, if there is no such file"""
    kind: str = "vllm"
    """of the engine's metrics"""
    key: Annotated[str | None, tyro.conf.arg(metavar="KEY")] = None
    """API key that the engine wants"""
    max_num_seqs: Annotated[int | None, Range(2), tyro.conf.arg(metavar="N")] = None
    """that the engine runs at once; default: found"""
    max_batched_tokens: Annotated[int, Range(64)] = CHUNK_TOKENS
    """that it computes in an iteration"""
    kv_tokens: Annotated[int | None, Range(1024), tyro.conf.arg(metavar="N")] = None
    """of its KV cache; default: as vLLM says"""
    json: File = None
    """write the results to this file"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if an engine fails, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
        check_outputs(args.json, None)
        wanted = Study(
            tuple(args.loads), args.seconds, args.repeats, args.seed, _lengths("--prompt", args.prompt),
            _lengths("--output", args.output),
        )  # fmt: skip
        settings = Settings(
            args.model, args.key, args.kind, args.max_num_seqs, args.kv_tokens, args.max_batched_tokens,
            longest=wanted.longest + MARGIN,
        )  # fmt: skip
        if args.url is None and args.model not in (None, *PROFILES):
            raise UsageError(f"--model is {args.model!r}, expected one of {', '.join(PROFILES)} without --url")
        known = _read(args.calibration)
    except (UsageError, ValueError) as error:
        return refuse(PROG, error)
    try:
        if args.url is not None:
            result = asyncio.run(study(args.url.rstrip("/"), settings, wanted, known))
        else:
            with own_vllm(args.model or SMOLLM2) as url:
                result = asyncio.run(study(url, settings, wanted, known))
    except (NetworkError, UsageError, CalibrationError, PrepareError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if args.calibration is not None and known is None:
        write_json(args.calibration, result["calibration"])
    print(f"{result['engine']['model']}: {result['capacity_per_s']:.3g} requests/s at most\n\n{table(result)}")
    if args.json is not None:
        write_json(args.json, result)
    return 0


def _read(file: Path | None) -> Tree | None:
    """What calibration wrote; None without a file. Raises UsageError for another content."""
    if file is None or not file.exists():
        return None
    try:
        known: Tree = orjson.loads(file.read_bytes())
        Profile(**known["profile"])
        float(known["overhead_s"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"--calibration {file}: not what this command writes: {error!r}") from None
    return known


if __name__ == "__main__":
    sys.exit(main())
