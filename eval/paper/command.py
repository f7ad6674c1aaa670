"""The command `wwwserve paper [FIGURE...]`: run and draw the paper's experiments."""

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from wwwserve.agents.arguments import Count, Folder, Range, UsageError, parse_args, refuse
from wwwserve.agents.policy.bundle import DEFAULT_BUNDLE, WEIGHTS
from wwwserve.eval.compare import FIRST_TEST_SEED, columns, write_json
from wwwserve.eval.paper import credits, flexible, participation, report, settings
from wwwserve.eval.paper.experiment import Experiment, Tree
from wwwserve.eval.policies import LEARNED, PolicyError, load_policy
from wwwserve.eval.workers import each

PROG = "wwwserve paper"
EXPERIMENTS: tuple[Experiment, ...] = (
    settings.SLO,
    settings.LATENCY,
    participation.PARTICIPATION,
    flexible.POLICY,
    credits.DUEL,
    credits.MODEL_SIZE_EXPERIMENT,
    credits.QUANTIZATION_EXPERIMENT,
    credits.ATTENTION,
    credits.HARDWARE,
)
NAMES = tuple(experiment.name for experiment in EXPERIMENTS)
Figure = Literal[
    "slo", "latency", "participation", "policy", "duel", "model-size", "quantization", "attention", "hardware"
]


def _data(seeds: Sequence[int], name: str) -> Tree:
    """The data of the experiments whose runs go by this name; by name, so that a process can be asked for it."""
    return next(x for x in EXPERIMENTS if x.data == name).run(seeds)


def policy_digest() -> str:
    """Beginning of the SHA-256 of the shipped policy's weights."""
    return hashlib.sha256((DEFAULT_BUNDLE / WEIGHTS).read_bytes()).hexdigest()[:12]


def make(
    names: Sequence[str], seeds: Sequence[int], out: Path, *, processes: int = 1, docs: Path | None = None
) -> dict[str, Tree]:
    """Run and draw these figures into the folder `out`, with `paper.json` and `report.html`; the data.

    `docs` is a folder in which `paper/` gets the tables and images.
    """
    experiments = [x for x in EXPERIMENTS if x.name in names]
    keys = list(dict.fromkeys(x.data for x in experiments))
    data = dict(zip(keys, each(partial(_data, seeds), keys, processes), strict=True))
    options = {
        "seeds": len(seeds),
        "first_seed": seeds[0],
        "all": len(experiments) == len(EXPERIMENTS),
        "policy": policy_digest(),
        "docs": None if docs is None else docs.as_posix(),
    }
    out.mkdir(parents=True, exist_ok=True)
    files = {x.name: x.draw(data[x.data], out / "figures") for x in experiments}
    write_json(out / "paper.json", {"options": options, "figures": data})
    (out / "report.html").write_text(report.as_html(experiments, data, options, files), encoding="utf-8")
    if docs is not None:
        folder = docs / "paper"
        folder.mkdir(parents=True, exist_ok=True)
        for file in (file for found in files.values() for file in found if file.suffix == ".png"):
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "tables.md").write_text(report.as_markdown(experiments, data, options), encoding="utf-8")
    return data


@dataclass
class Args:
    """Reproduce the experiments of WWW.Serve."""

    figures: Annotated[tuple[Figure, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FIGURE...")] = ()
    """of the paper; default: all"""
    seeds: Annotated[int, Range(2)] = 64
    """runs of each policy in each scenario"""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/paper")
    """folder for data, figures and report"""
    processes: Count = 2
    """experiments run at a time"""
    docs: Folder = None
    """write figures and tables into this folder's paper/ as well"""


def check(args: Args) -> None:
    """Raises UsageError for what could not be written at the end."""
    if args.docs is not None and args.figures:
        raise UsageError("--docs needs every figure")
    for option, folder in (("--out", args.out), ("--docs", args.docs)):
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{option} {folder}: {error.strerror}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
        check(args)
        load_policy(LEARNED)
    except (UsageError, PolicyError) as error:
        return refuse(PROG, error)
    start_s = time.perf_counter()
    seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + args.seeds)
    names = args.figures or NAMES
    data = make(names, seeds, args.out, processes=args.processes, docs=args.docs)
    experiments = [experiment for experiment in EXPERIMENTS if experiment.name in names]
    print(columns([["figure", "what", "published", "here"], *report.summary(experiments, data).rows]))
    print(f"{args.out / 'report.html'}: {time.perf_counter() - start_s:.0f} s", file=sys.stderr)
    return 0
