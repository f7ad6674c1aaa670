"""Replays the Azure conversation trace on one engine: `wwwserve replay --rates 1 3 5`.

The trace keeps its order, its lengths and the shape of its load; its times are scaled to reach each mean rate. Nothing
is routed and nothing decided, so the latencies are those of the engine and its queue alone. Latency and TTFT count from
a request's arrival.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.arguments import File, Range, parse_args, refuse
from wwwserve.agents.hardware import Profile, profile
from wwwserve.agents.kernel import records
from wwwserve.envs import trace
from wwwserve.envs.engine import ENGINE, JOB, MAX_SLOTS, advance, reset_engine, reset_jobs, submit
from wwwserve.envs.prefix_cache import NO_CACHE
from wwwserve.eval.compare import check_outputs, write_json

PROG = "wwwserve replay"
TRACE = "azure_llm_conv_2023.csv"
PERCENTILES = (50, 90, 99)
_SPAN_S = 60.0  # how far the engine runs at a time once all requests are in


class Replay(NamedTuple):
    """What became of the requests of a trace, [R] each but the last two."""

    arrival_s: NDArray[np.float64]
    ttft_s: NDArray[np.float64]
    latency_s: NDArray[np.float64]
    clipped: int
    """Requests cut to the length that the engine can hold."""
    preemptions: int


def replay(requests: trace.Trace, engine: Profile, rate_per_s: float) -> Replay:
    """Run a trace through one engine at a mean rate of `rate_per_s` requests/s, until every request is done.

    The mean is over the trace's period. A request too long for the model or the KV cache is cut as in a market:
    the prompt where it fills everything, else the output. Raises ValueError for a rate that is not positive and finite.
    """
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise ValueError(f"the rate must be positive and finite, got {rate_per_s!r}")
    count = len(requests.time_s)
    arrival_s = requests.time_s * (count / requests.period_s / rate_per_s)
    longest = min(engine.max_model_len, engine.kv_tokens)
    jobs = records(count, JOB)
    reset_jobs(jobs)
    jobs["prompt"] = np.minimum(requests.prompt, longest - 1)
    jobs["output"] = np.minimum(requests.output, longest - jobs["prompt"])
    clipped = (jobs["prompt"] < requests.prompt) | (jobs["output"] < requests.output)

    engines = records(1, ENGINE)
    reset_engine(engines[0], engine.row())
    done = np.zeros(count, np.int64)
    finished = 0
    for r in range(count):
        finished = advance(engines[0], NO_CACHE, jobs, arrival_s[r], done, finished)
        submit(engines[0], NO_CACHE, jobs, r, arrival_s[r])
    until_s = float(arrival_s[-1])
    while finished < count:
        until_s += _SPAN_S
        finished = advance(engines[0], NO_CACHE, jobs, until_s, done, finished)
    return Replay(
        arrival_s=arrival_s,
        ttft_s=jobs["first_token_s"] - arrival_s,
        latency_s=jobs["finish_s"] - arrival_s,
        clipped=int(clipped.sum()),
        preemptions=int(engines["preemptions"][0]),
    )


def summary(result: Replay) -> dict[str, Any]:
    """Percentiles of a replay, seconds, by measure; and how many requests there were, clipped, preempted."""
    numbers: dict[str, Any] = {
        measure: {
            f"p{q}": float(value) for q, value in zip(PERCENTILES, np.percentile(times, PERCENTILES), strict=True)
        }
        for measure, times in (("latency_s", result.latency_s), ("ttft_s", result.ttft_s))
    }
    counts = {"requests": result.latency_s.size, "clipped": result.clipped, "preemptions": result.preemptions}
    return numbers | counts


def table(by_rate: dict[float, dict[str, Any]]) -> str:
    """The summaries as text, a line a rate."""
    columns = [(measure, f"p{q}") for measure in ("latency_s", "ttft_s") for q in PERCENTILES]
    names = [f"{measure.removesuffix('_s')} {percentile}" for measure, percentile in columns]
    lines = ["rate /s" + "".join(f"{name:>14}" for name in names) + f"{'preemptions':>14}"]
    for rate, numbers in by_rate.items():
        cells = "".join(f"{numbers[measure][percentile]:>12.3f} s" for measure, percentile in columns)
        lines.append(f"{rate:>7g}{cells}{numbers['preemptions']:>14}")
    return "\n".join(lines)


@dataclass
class Args:
    """Replay the Azure trace on one engine."""

    rates: Annotated[tuple[float, ...], Range(0, above=True)] = (1.0, 3.0, 5.0)
    """mean rates, requests/s"""
    gpu: str = "a100-80g"
    """of the catalogue in agents.hardware"""
    model: str = "llama-3-8b"
    """of the same catalogue"""
    max_num_seqs: Annotated[int, Range(1, MAX_SLOTS)] = 256
    """most requests running at once"""
    json: File = None
    """also write the numbers to this file"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
        check_outputs(args.json, None)
        engine = profile(args.gpu, args.model, args.max_num_seqs)
    except ValueError as error:
        return refuse(PROG, error)
    path = trace.find(TRACE, None)
    assert path is not None, f"{TRACE} is packaged data"
    requests = trace.read(path)

    by_rate = {rate: summary(replay(requests, engine, rate)) for rate in sorted(set(args.rates))}
    clipped = next(iter(by_rate.values()))["clipped"]
    print(f"{TRACE}: {len(requests.time_s)} requests, {clipped} cut to {engine.max_model_len} tokens")
    print(f"{args.model} on {args.gpu}, at most {engine.max_num_seqs} at once")
    print(table(by_rate))
    if args.json is not None:
        result = {
            "trace": TRACE,
            "gpu": args.gpu,
            "model": args.model,
            "max_num_seqs": engine.max_num_seqs,
            "rates": {f"{rate:g}": numbers for rate, numbers in by_rate.items()},
        }
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
