"""Recorded request traces: arrival times and token counts, in the Azure CSV format or the compact form shipped here."""

import csv
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DATA_DIR = Path(__file__).resolve().parent / "data"
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
COMPACT_TICKS_PER_S = 10_000


class Trace(NamedTuple):
    """Requests in time order, shape (n,), read-only: they are shared between callers.

    `time_s` starts at 0. A trace is cyclic: after its last request and one mean gap it begins again, so `period_s` is
    n / (n - 1) times the last `time_s`.
    """

    time_s: NDArray[np.float64]
    prompt: NDArray[np.int32]
    output: NDArray[np.int32]
    period_s: float


def find(name: str, folder: Path | None) -> Path | None:
    """The file that `name` means: beside the scenario (`folder`), then packaged, then packaged in compact form."""
    candidates = [Path(name)] if folder is None and Path(name).is_absolute() else []
    if folder is not None:
        candidates.append(folder / name)
    if Path(name).name == name:
        candidates += [DATA_DIR / name, (DATA_DIR / name).with_suffix(".npz")]
    return next((path.resolve() for path in candidates if path.is_file()), None)


def name_of(path: Path) -> str:
    """What a scenario file calls `path`, the inverse of `find`: packaged data by name, other files by absolute path."""
    if path.parent == DATA_DIR:
        return path.with_suffix(".csv").name if path.suffix == ".npz" else path.name
    return str(path)


@lru_cache(maxsize=16)
def read(path: Path) -> Trace:
    """Read a trace: compact if the name ends in `.npz`, else Azure CSV. Raises ValueError, OSError on a bad file."""
    time_s, prompt, output = _read_compact(path) if path.suffix == ".npz" else _read_csv(path)
    order = np.argsort(time_s, kind="stable")
    time_s, prompt, output = time_s[order], prompt[order], output[order]
    if len(time_s) < 2 or time_s[-1] == time_s[0]:
        raise ValueError("a trace needs at least two requests at different times")
    if prompt.min() < 0 or output.min() < 0:
        raise ValueError("token counts must not be negative")
    time_s = time_s - time_s[0]
    limit = np.iinfo(np.int32).max
    columns = (time_s, np.clip(prompt, 1, limit).astype(np.int32), np.clip(output, 1, limit).astype(np.int32))
    for column in columns:
        column.flags.writeable = False
    return Trace(*columns, period_s=float(time_s[-1]) * len(time_s) / (len(time_s) - 1))


def _read_csv(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    times: list[datetime] = []
    tokens: list[tuple[int, int]] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        try:
            header = next(rows, [])
            if tuple(header[:3]) != COLUMNS:
                raise ValueError(f"the header is {header[:3]}, not {list(COLUMNS)}")
            for row in rows:
                if row:
                    times.append(datetime.fromisoformat(row[0]))
                    tokens.append((int(row[1]), int(row[2])))
            seconds = [(time - times[0]).total_seconds() for time in times]
            prompt, output = np.array(tokens, dtype=np.int64).reshape(-1, 2).T
        except (ValueError, IndexError, TypeError, OverflowError, csv.Error) as error:
            raise ValueError(f"line {rows.line_num}: {error}") from None
    return np.array(seconds, dtype=np.float64), prompt, output


def _read_compact(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Arrays `gap_ticks` (time since the request before, in 1e-4 s), `prompt` and `output`, all of shape (n,)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            gaps, prompt, output = (arrays[key].astype(np.int64) for key in ("gap_ticks", "prompt", "output"))
    except Exception as error:  # a broken archive fails in many ways (zip, zlib, header), all meaning the same
        raise ValueError(f"not a compact trace: {error}") from None
    if not gaps.ndim == 1 or not gaps.shape == prompt.shape == output.shape:
        raise ValueError(f"columns differ in shape: {gaps.shape}, {prompt.shape}, {output.shape}")
    return np.cumsum(gaps) / COMPACT_TICKS_PER_S, prompt, output
