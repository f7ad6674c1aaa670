"""The catalogue's coefficients fitted to measured iterations, and how far such fits err: `wwwserve hardware-fit`.

The tables are in `agents/data/gpu_iteration_times.csv`; `agents.hardware.FITTED` holds what `fit` makes of each. SciPy
comes with `wwwserve[train]`.
"""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from wwwserve.agents import hardware
from wwwserve.agents.arguments import UsageError, parse_args, refuse
from wwwserve.agents.hardware import CHUNK_TOKENS, COEFFICIENTS, iteration_s
from wwwserve.agents.kernel import Floats

PROG = "wwwserve hardware-fit"

# Columns of a table of iteration times.
DECODING, KV_TOKENS, PREFILL_TOKENS, TIME_S = range(4)


def predict_s(coefficients: Floats, rows: Floats) -> Floats:
    """`iteration_s` of each of the measured `rows`, shape (n,)."""
    return np.array([iteration_s(coefficients, row[DECODING], row[KV_TOKENS], row[PREFILL_TOKENS]) for row in rows])


def fit(rows: Floats) -> Floats:
    """The five coefficients with the least squared relative error over measured iterations.

    `rows` is (n, 4): sequences decoding, KV tokens, prefill tokens, seconds. Rows with more than `CHUNK_TOKENS` of
    prefill are left out. Raises ValueError if two different batch sizes and two different prefill sizes are not there.
    """
    rows = rows[rows[:, PREFILL_TOKENS] <= CHUNK_TOKENS]
    decode, prefill = rows[rows[:, PREFILL_TOKENS] == 0], rows[rows[:, PREFILL_TOKENS] > 0]
    for part, column, what in ((decode, DECODING, "decode batch"), (prefill, PREFILL_TOKENS, "prefill")):
        if np.unique(part[:, column]).size < 2:
            raise ValueError(f"a fit needs iterations of at least two {what} sizes, got {np.unique(part[:, column])}")
    if not (np.isfinite(rows).all() and (rows[:, TIME_S] > 0).all()):
        raise ValueError("measured iterations must be finite, with positive times")
    weight_s = decode[:, TIME_S].min()
    largest = prefill[prefill[:, PREFILL_TOKENS].argmax()]
    # Start where the largest prefill is bound by compute: under the weight read the compute terms have no gradient.
    scale = np.array(
        [weight_s, weight_s / 200, weight_s / 1e5, weight_s / 3, largest[TIME_S] / largest[PREFILL_TOKENS]]
    )
    solution = least_squares(
        lambda x: predict_s(x * scale, rows) / rows[:, TIME_S] - 1.0,
        np.ones(COEFFICIENTS),
        bounds=(1e-6, np.inf),
        x_scale="jac",
    )
    return np.asarray(solution.x * scale, dtype=np.float64)


def iteration_times() -> dict[tuple[str, str], Floats]:
    """Measured iterations by (gpu, model), in the columns `fit` takes."""
    gpus = {"a100": "a100-80g", "a40": "a40"}
    models = {"meta-llama/Meta-Llama-3-8B": "llama-3-8b", "meta-llama/Llama-2-7b-hf": "llama-2-7b"}
    table: dict[tuple[str, str], list[list[float]]] = {}
    with (Path(hardware.__file__).parent / "data" / "gpu_iteration_times.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            counts = [float(line[name]) for name in ("batch_decode", "kv_tokens_total", "prefill_tokens")]
            pair = gpus[line["device"]], models[line["model"]]
            table.setdefault(pair, []).append([*counts, float(line["time_ms"]) / 1e3])
    return {pair: np.array(lines) for pair, lines in table.items()}


def held_out_errors(rows: Floats, half: int) -> dict[str, float]:
    """Mean relative errors, on rows it has not seen, of a fit to half of the sizes.

    Sizes are the distinct batch sizes of decode-only rows and the distinct prefill sizes of prefill-only rows; the fit
    sees every other one, from the first (`half` 0) or the second (1). Mixed rows are never fitted.
    """
    rows = rows[rows[:, PREFILL_TOKENS] <= CHUNK_TOKENS]
    decoding, prefilling = rows[:, DECODING] > 0, rows[:, PREFILL_TOKENS] > 0
    parts = {"decode": rows[decoding & ~prefilling], "prefill": rows[~decoding & prefilling]}
    seen, unseen = [], {}
    for (name, part), column in zip(parts.items(), (DECODING, PREFILL_TOKENS), strict=True):
        fitted = np.isin(part[:, column], np.unique(part[:, column])[half::2])
        seen.append(part[fitted])
        unseen[name] = part[~fitted]
    unseen["mixed"] = rows[decoding & prefilling]
    unseen["all"] = np.concatenate(list(unseen.values()))
    coefficients = fit(np.concatenate(seen))
    return {
        name: float(np.abs(predict_s(coefficients, part) / part[:, TIME_S] - 1).mean()) for name, part in unseen.items()
    }


@dataclass
class Args:
    """Print how far the catalogue's fits are off iteration times that they were not fitted to."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    try:
        parse_args(Args, PROG, argv)
    except UsageError as error:
        return refuse(PROG, error)
    print("mean relative error on rows not fitted, %")
    for (gpu, model), rows in iteration_times().items():
        for half in (0, 1):
            errors = "  ".join(f"{name} {100 * error:.1f}" for name, error in held_out_errors(rows, half).items())
            print(f"{gpu:<13} {model:<11} half {half}: {errors}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
