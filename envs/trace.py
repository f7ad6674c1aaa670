"""Recorded traces: arrival times and token counts, and what of their prompts requests have in common.

The first line of a CSV file says its format; lines before it that begin with `#` are comments, and a name that ends in
`.gz` is a compressed file:

    TIMESTAMP,ContextTokens,GeneratedTokens            Azure: single requests
    arrival_s,input_tokens,output_tokens,blocks        prefix blocks: ids of the prompt's blocks of 512 tokens
    session,agent,t_s,input_tokens,output_tokens,shared_tokens,think_s      sessions

A file that ends in `.npz` holds one of the three in the compact form of the data shipped here, see `data/README.md`.
"""

import csv
import gzip
import zlib
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import numpy as np
from numpy.typing import NDArray

DATA_DIR = Path(__file__).resolve().parent / "data"
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
PREFIX_COLUMNS = ("arrival_s", "input_tokens", "output_tokens", "blocks")
SESSION_COLUMNS = ("session", "agent", "t_s", "input_tokens", "output_tokens", "shared_tokens", "think_s")
PREFIX_TOKENS = 512  # tokens of one block of a prefix trace
COMPACT_TICKS_PER_S = 10_000

Longs = NDArray[np.int64]
Doubles = NDArray[np.float64]


class Prefixes(NamedTuple):
    """What prompts of a prefix trace have in common: a radix tree of the blocks that several requests have.

    A node is a stretch of blocks that the same requests have; it comes after its parent.
    """

    parent: Longs  # [S] -1 for a root
    end_tokens: Longs  # [S] tokens of a prompt up to the end of the node
    node: Longs  # [n] last node on the request's path; -1 if it has nothing in common with another
    tree: Longs  # [n] number of its prefix tree: those are apart but for the prefix that all requests have


class Sessions(NamedTuple):
    """How requests of a session trace hang together.

    Requests stand session after session, agent after agent, in order of time. An agent's requests are its turns.
    """

    session: Longs  # [n] number of its session
    turn: Longs  # [n] from 1, among those of its agent
    shared: Longs  # [n] prompt tokens that it has in common with an earlier request of the session
    think_s: Doubles  # [n] after the answer to its agent's turn before


class Trace(NamedTuple):
    """Requests, shape (n,), in order of time but for a session trace's; read-only: they are shared between callers.

    `time_s` starts at 0. A trace is cyclic: after its last request and one mean gap it begins again, so `period_s` is
    n / (n - 1) times the last `time_s`. In a session trace the same holds for the first requests of sessions; where all
    sessions begin at the same time, the recording does not say when they began and `period_s` is 0. An agent's later
    turns have no time of their own there, `time_s` is infinite.
    """

    time_s: NDArray[np.float64]
    prompt: NDArray[np.int32]
    output: NDArray[np.int32]
    period_s: float
    prefixes: Prefixes | None = None
    sessions: Sessions | None = None


def find(name: str, folder: Path | None) -> Path | None:
    """The file that `name` means: beside the scenario (`folder`), then packaged, then packaged in compact form."""
    candidates = [Path(name)] if folder is None and Path(name).is_absolute() else []
    if folder is not None:
        candidates.append(folder / name)
    if Path(name).name == name:
        candidates += [DATA_DIR / name, (DATA_DIR / name.removesuffix(".gz")).with_suffix(".npz")]
    return next((path.resolve() for path in candidates if path.is_file()), None)


def name_of(path: Path) -> str:
    """What a scenario file calls `path`, the inverse of `find`: packaged data by name, other files by absolute path."""
    if path.parent == DATA_DIR:
        return path.with_suffix(".csv").name if path.suffix == ".npz" else path.name
    return str(path)


@lru_cache(maxsize=16)
def read(path: Path) -> Trace:
    """Read a trace. Raises ValueError, OSError on a bad file."""
    try:
        made = _read_compact(path) if path.suffix == ".npz" else _read_csv(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"broken compression: {error}") from None
    prompt, output = made.prompt, made.output
    if made.sessions is None:
        order = np.argsort(made.time_s, kind="stable")
        time_s, prompt, output = made.time_s[order], prompt[order], output[order]
        if len(time_s) < 2 or time_s[-1] == time_s[0]:
            raise ValueError("a trace needs at least two requests at different times")
        if made.prefixes is not None:
            made = made._replace(prefixes=_with_trees(made.prefixes, order))
        starts = time_s - time_s[0]
    else:
        time_s, starts = _of_sessions(made.time_s, made.sessions)
    if prompt.min() < 0 or output.min() < 0:
        raise ValueError("token counts must not be negative")
    limit = np.iinfo(np.int32).max
    columns = (
        time_s - time_s.min(),
        np.clip(prompt, 1, limit).astype(np.int32),
        np.clip(output, 1, limit).astype(np.int32),
    )
    for column in (*columns, *(made.prefixes or ()), *(made.sessions or ())):
        column.flags.writeable = False
    period_s = float(starts.max()) * len(starts) / max(1, len(starts) - 1)
    return Trace(*columns, period_s, made.prefixes, made.sessions)


def _of_sessions(time_s: Doubles, sessions: Sessions) -> tuple[Doubles, Doubles]:
    """Times of requests, and of the first request of each session from the first of all; checks the other columns."""
    if sessions.think_s.min() < 0:
        raise ValueError("think_s must not be negative")
    if sessions.shared.min() < 0:
        raise ValueError("shared_tokens must not be negative")
    time_s = np.where(sessions.turn == 1, time_s, np.inf)
    starts = np.full(int(sessions.session.max()) + 1, np.inf)
    np.minimum.at(starts, sessions.session, time_s)
    return time_s, starts - starts.min()


def _read_csv(path: Path) -> Trace:
    with _open(path) as file:
        before, line = 1, file.readline()
        while line.startswith("#"):
            before, line = before + 1, file.readline()
        header = tuple(line.strip().split(","))
        rows = csv.reader(file)
        try:
            for columns, reader in (
                (COLUMNS, _read_azure), (PREFIX_COLUMNS, _read_prefixes), (SESSION_COLUMNS, _read_sessions)
            ):  # fmt: skip
                if header[: len(columns)] == columns:
                    return reader(row for row in rows if row)
            known = " nor ".join(str(list(columns)) for columns in (COLUMNS, PREFIX_COLUMNS, SESSION_COLUMNS))
            raise ValueError(f"the header is {list(header[:7])}, neither {known}")
        except (ValueError, IndexError, TypeError, OverflowError, csv.Error) as error:
            raise ValueError(f"line {before + rows.line_num}: {error}") from None


def _open(path: Path) -> TextIO:
    opened = gzip.open if path.suffix == ".gz" else open
    return cast(TextIO, opened(path, "rt", encoding="utf-8-sig", newline=""))


def _read_azure(rows: Iterator[list[str]]) -> Trace:
    times: list[datetime] = []
    tokens: list[tuple[int, int]] = []
    for row in rows:
        times.append(datetime.fromisoformat(row[0]))
        tokens.append((int(row[1]), int(row[2])))
    seconds = np.array([(time - times[0]).total_seconds() for time in times], dtype=np.float64)
    return _trace(seconds, *np.array(tokens, dtype=np.int64).reshape(-1, 2).T)


def _read_prefixes(rows: Iterator[list[str]]) -> Trace:
    times: list[float] = []
    tokens: list[tuple[int, int]] = []
    paths: list[list[int]] = []
    before: dict[int, int] = {}
    for row in rows:
        times.append(_finite(row[0]))
        prompt, output = int(row[1]), int(row[2])
        blocks = [int(each) for each in row[3].split()]
        full = prompt // PREFIX_TOKENS
        if not full <= len(blocks) <= -(-prompt // PREFIX_TOKENS):
            raise ValueError(f"{len(blocks)} blocks of {PREFIX_TOKENS} tokens are not {prompt} tokens")
        del blocks[full:]  # the last one may be a partial block, which nobody reuses
        last = -1
        for block in blocks:
            if before.setdefault(block, last) != last:
                raise ValueError(f"block {block} stands for a prefix, and here comes after another block than before")
            last = block
        tokens.append((prompt, output))
        paths.append(blocks)
    return _trace(np.array(times), *np.array(tokens, dtype=np.int64).reshape(-1, 2).T)._replace(
        prefixes=_in_common(paths, before)
    )


def _in_common(paths: list[list[int]], before: dict[int, int]) -> Prefixes:
    """The blocks that several paths have, in nodes; `before` gives the block before each. `tree` is left empty."""
    count = dict.fromkeys(before, 0)
    for blocks in paths:
        for block in blocks:
            count[block] += 1
    node_of: dict[int, int] = {-1: -1}
    parent: list[int] = []
    end_tokens: list[int] = []
    node = np.full(len(paths), -1, np.int64)
    for r, blocks in enumerate(paths):
        for depth, block in enumerate(blocks, 1):
            if count[block] < 2:
                break
            if block not in node_of:
                above = before[block]
                if above != -1 and count[above] == count[block]:
                    node_of[block] = node_of[above]
                    end_tokens[node_of[block]] = depth * PREFIX_TOKENS
                else:
                    node_of[block] = len(parent)
                    parent.append(node_of[above])
                    end_tokens.append(depth * PREFIX_TOKENS)
            node[r] = node_of[block]
    return Prefixes(np.array(parent, np.int64), np.array(end_tokens, np.int64), node, np.zeros(0, np.int64))


def _with_trees(prefixes: Prefixes, order: Longs) -> Prefixes:
    """The same with requests in this order and their trees numbered."""
    parent, node = prefixes.parent, prefixes.node[order]
    requests = np.bincount(node[node >= 0], minlength=len(parent))
    for i in range(len(parent) - 1, -1, -1):
        if parent[i] >= 0:
            requests[parent[i]] += requests[i]
    top = np.arange(len(parent))
    for i in range(len(parent)):
        if parent[i] >= 0 and requests[parent[i]] < len(node):
            top[i] = top[parent[i]]
    tree = len(parent) + np.arange(len(node))
    own = (node >= 0) & (requests[node] < len(node)) if len(parent) else np.zeros(len(node), bool)
    tree[own] = top[node[own]]
    return prefixes._replace(node=node, tree=np.unique(tree, return_inverse=True)[1].astype(np.int64))


def _read_sessions(rows: Iterator[list[str]]) -> Trace:
    agents: dict[tuple[str, str], list[tuple[float, int, int, int, float]]] = {}
    for row in rows:
        request = (_finite(row[2]), int(row[3]), int(row[4]), int(row[5]), _finite(row[6]) if row[6] else 0.0)
        agents.setdefault((row[0], row[1]), []).append(request)
    numbers = {name: k for k, name in enumerate(dict.fromkeys(session for session, _ in agents))}
    ordered = sorted(agents.items(), key=lambda each: numbers[each[0][0]])
    for _, requests in ordered:
        requests.sort(key=lambda each: each[0])
    if not ordered:
        raise ValueError("a trace needs at least one session")
    columns = [np.array(column) for column in zip(*(each for _, requests in ordered for each in requests), strict=True)]
    time_s, prompt, output, shared, think_s = columns
    counts = np.array([len(requests) for _, requests in ordered])
    session = np.array([numbers[name] for (name, _), _ in ordered])
    return _trace(time_s, prompt, output)._replace(sessions=_sessions(session, counts, shared, think_s))


def _sessions(session: Longs, turns: Longs, shared: Longs, think_s: Doubles) -> Sessions:
    """From the session of each agent and how many turns it has."""
    first = np.repeat(np.cumsum(turns) - turns, turns)
    return Sessions(np.repeat(session, turns), np.arange(len(shared)) - first + 1, shared, think_s)


def _finite(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(f"{text} is not a time")
    return value


def _trace(time_s: Doubles, prompt: Any, output: Any) -> Trace:
    return Trace(time_s, prompt, output, 0.0)


def _read_compact(path: Path) -> Trace:
    """Arrays of `data/README.md`, of which the keys tell the format."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key].astype(np.int64) for key in arrays.files}
        prompt, output = found["prompt"], found["output"]
        sessions = prefixes = None
        if "turns" in found:
            turns = found["turns"]
            time_s = np.repeat(found["start_ticks"] / COMPACT_TICKS_PER_S, turns)
            sessions = _sessions(found["session"], turns, found["shared"], found["think_ticks"] / COMPACT_TICKS_PER_S)
        else:
            time_s = np.cumsum(found["gap_ticks"]) / COMPACT_TICKS_PER_S
        if "node" in found:
            parent, end_tokens = found["parent"], PREFIX_TOKENS * found["end_blocks"]
            prefixes = Prefixes(parent, end_tokens, found["node"], np.zeros(0, np.int64))
    except Exception as error:  # a broken archive fails in many ways (zip, zlib, header), all meaning the same
        raise ValueError(f"not a compact trace: {error}") from None
    columns = (time_s, prompt, output, *(sessions or ()), *((prefixes.node,) if prefixes else ()))
    if not time_s.ndim == 1 or len({column.shape for column in columns}) > 1:
        raise ValueError(f"columns differ in shape: {', '.join(str(column.shape) for column in columns)}")
    return _trace(time_s, prompt, output)._replace(prefixes=prefixes, sessions=sessions)
