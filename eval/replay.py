"""Replays the Azure conversation trace on one engine: `python -m eval.replay --rates 1 3 5`.

The trace keeps its order, its lengths and the shape of its load; its times are scaled to reach each mean rate. Nothing
is routed and nothing decided, so the latencies are those of the engine and its queue alone. Latency and TTFT count from
a request's arrival.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.hardware import GPUS, MODELS, Profile, profile
from wwwserve.agents.kernel import records
from wwwserve.envs import trace
from wwwserve.envs.engine import ENGINE, JOB, MAX_SLOTS, advance, reset_engine, reset_jobs, submit

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
        finished = advance(engines[0], jobs, arrival_s[r], done, finished)
        submit(engines[0], jobs, r, arrival_s[r])
    until_s = float(arrival_s[-1])
    while finished < count:
        until_s += _SPAN_S
        finished = advance(engines[0], jobs, until_s, done, finished)
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


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate, expected a positive number of requests/s")
    return value


def _slots(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_SLOTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of slots, expected 1 to {MAX_SLOTS}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.replay", description="Replay the Azure trace on one engine.")
    parser.add_argument(
        "--rates", type=_rate, nargs="+", default=[1.0, 3.0, 5.0], metavar="R", help="mean rates, requests/s (1 3 5)"
    )
    parser.add_argument("--gpu", default="a100-80g", choices=GPUS, help="%(choices)s (%(default)s)", metavar="GPU")
    parser.add_argument(
        "--model", default="llama-3-8b", choices=MODELS, help="%(choices)s (%(default)s)", metavar="MODEL"
    )
    parser.add_argument(
        "--max-num-seqs",
        type=_slots,
        default=MAX_SLOTS,
        metavar="N",
        help="most requests running at once (%(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ends with status 2 and a line on stderr if an argument is wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        engine = profile(options.gpu, options.model, options.max_num_seqs)
    except ValueError as error:
        parser.error(str(error))
    if options.json is not None and (options.json.is_dir() or not options.json.resolve().parent.is_dir()):
        parser.error(f"argument --json: {str(options.json)!r} is not a file in an existing folder")
    path = trace.find(TRACE, None)
    assert path is not None, f"{TRACE} is packaged data"
    requests = trace.read(path)

    by_rate = {rate: summary(replay(requests, engine, rate)) for rate in sorted(set(options.rates))}
    clipped = next(iter(by_rate.values()))["clipped"]
    print(f"{TRACE}: {len(requests.time_s)} requests, {clipped} cut to {engine.max_model_len} tokens")
    print(f"{options.model} on {options.gpu}, at most {engine.max_num_seqs} at once")
    print(table(by_rate))
    if options.json is not None:
        result = {
            "trace": TRACE,
            "gpu": options.gpu,
            "model": options.model,
            "max_num_seqs": engine.max_num_seqs,
            "rates": {f"{rate:g}": numbers for rate, numbers in by_rate.items()},
        }
        try:
            options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            parser.error(f"argument --json: {error.strerror}: {str(options.json)!r}")


if __name__ == "__main__":
    main()
