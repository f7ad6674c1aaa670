"""The `wwwserve` command: a node's own commands, and the project's other tools by name.

    wwwserve --help
    wwwserve COMMAND --help

Exit status: 0 done, 1 refused or failed, with the reason on standard error, 2 not used as it should be.
"""

import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
import tyro

from wwwserve.agents import hardware
from wwwserve.agents.arguments import File, Name, Range, UsageError, parse_args, refuse
from wwwserve.agents.decision import make_actions
from wwwserve.agents.policy.architecture import KEEP, PAYS
from wwwserve.agents.policy.bundle import (
    MANIFEST,
    SEALED,
    TOLERANCE,
    Bundle,
    BundleError,
    folder_of,
    from_bundle,
    golden_error,
    read,
    results_table,
)
from wwwserve.agents.policy.forward import LearnedPolicy
from wwwserve.agents.view import Views
from wwwserve.serving import config, display, node
from wwwserve.serving.config import ConfigError
from wwwserve.serving.engine import calibrate, local_vllm
from wwwserve.serving.engine.fit import CalibrationError
from wwwserve.serving.engine.local_vllm import PrepareError
from wwwserve.serving.engine.probe import Settings
from wwwserve.serving.http.keys import Identity, IdentityError
from wwwserve.serving.ledger import audit
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.journal import JournalError
from wwwserve.serving.ledger.statements import StatementError
from wwwserve.serving.local_nodes import NetworkError, Plan, look
from wwwserve.serving.plain import in_words
from wwwserve.serving.setup.card import CardError
from wwwserve.serving.setup.commands import Doctor, Init, Join, ShowCard
from wwwserve.serving.setup.genesis_commands import GenesisAmend, GenesisShow, GenesisSign
from wwwserve.serving.setup.look import own_network
from wwwserve.serving.versions import SPEAKS

DONE, FAILED, WRONG_USAGE = 0, 1, 2
DEFAULT_URL = "http://127.0.0.1:9000"
USUAL = {
    "name": "node", "key": "none",
    "engine": {
        "url": "http://127.0.0.1:8000",
        "profile": {"kind": "catalogue", "gpu": "rtx-4090", "model": "qwen3-8b", "max_num_seqs": 64},
    },
}  # fmt: skip
DECISIONS = 2000  # that `policy verify` times

REFUSED = (
    BundleError, CalibrationError, CardError, ConfigError, IdentityError, JournalError, LedgerError, NetworkError,
    PrepareError, StatementError, OSError,
)  # fmt: skip

Policy = Annotated[str | None, tyro.conf.arg(metavar="NAME|BUNDLE")]
Given = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
GivenBundle = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]


class Command(Protocol):
    """The arguments of a command of this module."""

    def run(self) -> int:
        """Carry it out; returns the exit status."""


class Tool(NamedTuple):
    """A command of another package, imported when it is asked for: what it needs may not be installed."""

    module: str
    about: str


EMULATOR = Tool("envs.emulator", "Run an emulated engine.")


@dataclass
class Node:
    """Run a node before an engine."""

    file: Given
    """its configuration, node.yaml"""

    def run(self) -> int:
        node.run(config.load(self.file))
        return DONE


@dataclass
class Compile:
    """Compile what a node runs, so that the first start of a release takes seconds and not a minute."""

    file: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]")] = None
    """node.yaml of a node; default: one with the policy that nodes have by default"""
    emulator: bool = False
    """what an emulated engine runs, too"""

    def run(self) -> int:
        settings = config.parse(USUAL, "a usual node") if self.file is None else config.load(self.file)
        node.warm_up(settings, node.policy_of(settings.policy))
        if self.emulator:
            importlib.import_module(f"wwwserve.{EMULATOR.module}").warm_up()
        return DONE


@dataclass
class Up:
    """Run a whole network on this machine, on emulated engines or real vLLM."""

    nodes: int = 3
    """nodes"""
    base_port: int = 9001
    """port of the first node's API, the others follow; 0 for any that are free"""
    policy: Policy = None
    """a rule or a bundle, for every node; default: the shipped bundle"""
    engine: Literal["emulated", "vllm"] = "emulated"
    """vllm: real vLLM with a small model, a CPU core and 2.8 GB each; what it needs is installed at the first time"""
    engines: int = 1
    """of each node, which are alike"""
    model: Name = None
    """that they serve: if emulated, of the catalogue (qwen3-8b), with vllm one of those that can be prepared"""
    calibrate: bool = False
    """measure every engine first, for minutes, instead of taking known profiles"""
    gpu: str = "rtx-4090"
    """that engines emulate"""
    max_num_seqs: int = 64
    """requests at once in an emulated engine"""
    speed: Annotated[float, Range(*config.SPEED)] = 1.0
    """emulated seconds in a second"""
    membership: Literal["static", "zenoh"] = "static"
    """how nodes find each other"""

    def run(self) -> int:
        model = self.model or {"emulated": "qwen3-8b", "vllm": local_vllm.SMOLLM2}[self.engine]
        display.up(
            Plan(
                self.nodes, self.base_port, self.policy, self.gpu, model, self.max_num_seqs, self.speed, self.engine,
                self.calibrate, self.membership, self.engines,
            )
        )  # fmt: skip
        return DONE


@dataclass
class Status:
    """Show how a node is and what it sees of its peers."""

    url: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[URL]")] = None
    """of the node, or of its `admin` listener; default: http://127.0.0.1:9000"""
    config: File = None
    """its node.yaml, which says where it is; needed with `tls` and no `admin`"""
    key: str | None = None
    """`admin.key` of the node, if it has one; with --config it is known"""
    json: bool = False
    """print what the node says as it is"""

    def run(self) -> int:
        if self.config is not None:
            if self.url is not None or self.key is not None:
                raise UsageError("--config says URL and key, give it alone")
            seen = own_network(config.load(self.config))
        else:
            seen = look(self.url or DEFAULT_URL, self.key)
        if self.json:
            print(json.dumps(seen, indent=2))
        else:
            display.show(seen)
        return DONE


@dataclass
class Hardware:
    """Print the catalogue of GPUs and models."""

    def run(self) -> int:
        hardware.main()
        return DONE


@dataclass
class KeyNew:
    """Make a key in a new file, and print its public half."""

    file: Given
    """where the key is kept"""

    def run(self) -> int:
        identity = Identity.generate()
        identity.save(self.file)
        print(identity.name)
        return DONE


@dataclass
class KeyShow:
    """Print the public half of a key, by which peers name the node."""

    file: Given
    """where the key is kept"""

    def run(self) -> int:
        print(Identity.load(self.file).name)
        return DONE


@dataclass(frozen=True, kw_only=True)
class Calibrate(Settings):
    """Measure what a running engine can do, for node.yaml."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """of the engine, without /v1; it should have nothing else to do"""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """write everything that was measured there as well; - prints only that"""
    beside: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="URL")] = ()
    """keep this engine busy meanwhile, as a neighbour on the same machine would be"""

    def run(self) -> int:
        found = asyncio.run(calibrate.calibrate(self.url, self, lambda line: print(line, file=sys.stderr)))
        written = json.dumps(found.json(), indent=2) + "\n"
        if self.json == "-":
            sys.stdout.write(written)
            return DONE
        if self.json:
            Path(self.json).write_text(written)
        print("\n".join(f"# {line}" for line in found.report().splitlines()))
        print(found.yaml(), end="")
        return DONE


@dataclass
class LedgerShow:
    """Say what a node owns, owes and has in escrow."""

    file: Given
    """of the ledger"""

    def run(self) -> int:
        print(audit.describe(audit.audit(self.file)))
        return DONE


@dataclass
class LedgerVerify:
    """Check chain, signatures and sums of ledgers."""

    file: Given
    """of the ledger"""
    other: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]")] = None
    """of a peer: whether both sides of the channel agree"""

    def run(self) -> int:
        files = [self.file] if self.other is None else [self.file, self.other]
        found = [audit.audit(file) for file in files]
        problems = [f"{file}: {each}" for file, one in zip(files, found, strict=True) for each in one.problems]
        if len(found) == 2:
            problems += audit.compare(*found)
        if problems:
            print("\n".join(f"wwwserve: {_printable(each)}" for each in problems), file=sys.stderr)
            return FAILED
        for file, one in zip(files, found, strict=True):
            print(f"ok: {_printable(str(file))}")
            print(f"    {one.entries:,} entries of {one.owner}: chain, signatures, sums and balances as they should be")
        if len(found) == 2:
            settled = ", and nothing is under way" if audit.settled(*found) else ""
            print(f"    the two agree on what both signed{settled}")
        return DONE


@dataclass
class PolicyShow:
    """Say what a bundle holds and how it was made."""

    bundle: GivenBundle = None
    """folder of the bundle, or `competitive` or `cooperative`, which are shipped; the first is the default"""
    json: bool = False
    """print the manifest as it is"""

    def run(self) -> int:
        bundle = read(folder_of(self.bundle))
        if self.json:
            sys.stdout.write((bundle.folder / MANIFEST).read_text(encoding="utf-8"))
        else:
            print(describe(bundle))
        return DONE


@dataclass
class PolicyVerify:
    """Load a bundle with every check, and time its decisions."""

    bundle: GivenBundle = None
    """folder of the bundle, or `competitive` or `cooperative`, which are shipped; the first is the default"""

    def run(self) -> int:
        bundle = read(folder_of(self.bundle))
        policy = from_bundle(bundle)
        error, spent_us = golden_error(policy, bundle), decision_us(policy, bundle.views)
        print(f"ok: {_printable(str(folder_of(self.bundle)))}")
        size = f"{1 + len(SEALED)}, {_bundle_bytes(bundle):,} bytes"
        print(f"files    {size}; digests, shapes and numbers as they should be")
        print(f"golden   {len(bundle.logits)} views, logits within {error:.1e} (at most {TOLERANCE:g})")
        print(f"speed    {spent_us:.1f} µs a decision, median of {DECISIONS}")
        return DONE


COMMANDS: dict[str, type[Command] | Tool] = {
    "init": Init,
    "join": Join,
    "node": Node,
    "doctor": Doctor,
    "card": ShowCard,
    "compile": Compile,
    "up": Up,
    "status": Status,
    "calibrate": Calibrate,
    "hardware": Hardware,
    "key new": KeyNew,
    "key show": KeyShow,
    "ledger show": LedgerShow,
    "ledger verify": LedgerVerify,
    "genesis show": GenesisShow,
    "genesis amend": GenesisAmend,
    "genesis sign": GenesisSign,
    "policy show": PolicyShow,
    "policy verify": PolicyVerify,
    "emulator": EMULATOR,
    "train": Tool("train.mappo", "Train a policy with MAPPO, and compare it with the rules."),
    "sb3": Tool("train.sb3_ppo", "Train a policy with the PPO of Stable-Baselines3."),
    "compare": Tool("eval.compare", "Compare policies on the same arrivals."),
    "game": Tool("eval.game", "Measure what a provider gains by itself."),
    "rivals": Tool("eval.rivals", "Let one provider play another policy than the others."),
    "markups": Tool("eval.markups", "Show what markups a policy posts at what load."),
    "regret": Tool("eval.regret", "Judge policies by their worst regret."),
    "tune": Tool("eval.tune", "Tune the rules on training markets."),
    "scale": Tool("eval.scale", "Judge policies by the market's size."),
    "figures": Tool("eval.figures", "Draw results of a comparison."),
    "paper": Tool("eval.paper.command", "Reproduce the experiments of WWW.Serve."),
    "replay": Tool("eval.replay", "Replay the Azure trace on one engine."),
    "fidelity": Tool("eval.fidelity", "Play arrivals on an engine and in the simulator."),
    "hardware-fit": Tool("eval.hardware_fit", "Say how far the catalogue's engine profiles are off measurements."),
    "strength": Tool("eval.strength", "Fit the quality of models' answers to published win rates."),
    "bench": Tool("envs.bench", "Measure how fast the market runs."),
    "trial": Tool("eval.live.trial", "Play a scenario through a live network."),
    "profits": Tool("eval.live.profits", "Compare what providers earn on real nodes with the simulated market."),
    "overhead": Tool("eval.live.overhead", "Measure what a node adds to a request."),
    "delegated": Tool("eval.live.delegated", "Measure what it costs to hand a request over."),
    "judges": Tool("eval.live.judges", "Measure how often judges err, on real vLLM."),
    "duels": Tool("eval.live.duels", "Hold duels on real vLLM."),
    "coalition": Tool("eval.live.coalition", "See what a coalition can buy by duels."),
    "world": Tool("eval.live.world.command", "Play nodes among faults and adversaries on virtual time."),
    "hostile": Tool("eval.live.hostile", "Send hostile input to a live node."),
    "soak": Tool("eval.live.soak.command", "Kill nodes under load, see that all is accounted for."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    name = next((each for each in COMMANDS if given[: len(each.split())] == each.split()), None)
    try:
        if name is None:
            return _help(given)
        prog, rest = f"wwwserve {name}", given[len(name.split()) :]
        command = COMMANDS[name]
        status = _run_tool(command, prog, rest) if isinstance(command, Tool) else parse_args(command, prog, rest).run()
        sys.stdout.flush()
    except UsageError as error:
        status = refuse(prog, error)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = FAILED
    except REFUSED as error:
        print("wwwserve: " + "\n".join(map(_printable, in_words(error).splitlines())), file=sys.stderr)
        status = FAILED
    except KeyboardInterrupt:
        status = DONE
    return status


def _run_tool(tool: Tool, prog: str, rest: Sequence[str]) -> int:
    try:
        module = importlib.import_module(f"wwwserve.{tool.module}")
    except ModuleNotFoundError as error:
        if (error.name or "wwwserve").partition(".")[0] == "wwwserve":
            raise
        print(f"{prog}: needs {error.name}: pip install '.[train]' in a clone of the repository", file=sys.stderr)
        return FAILED
    sys.argv = [prog, *rest]
    return int(module.main() or DONE)


def _help(given: Sequence[str]) -> int:
    """The list of commands, after `--help`; for a command that is none, on standard error."""
    if given == ["--version"]:
        print(f"wwwserve {_version()}, speaks protocol {SPEAKS}")
        return DONE
    asked = bool({"-h", "--help"} & set(given))
    listed = {name: command for name, command in COMMANDS.items() if name.split()[0] == given[0]} if given else {}
    lines = ["usage: wwwserve COMMAND [-h] ...", ""]
    for name, each in (listed or COMMANDS).items():
        lines.append(f"  {name:<15} {each.about if isinstance(each, Tool) else (each.__doc__ or '').splitlines()[0]}")
    if given and not asked and not listed:
        lines = [f"wwwserve: unknown command {_printable(given[0])!r}", *lines]
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return DONE if asked else WRONG_USAGE


def _version() -> str:
    try:
        return version("wwwserve")
    except PackageNotFoundError:
        return "(not installed)"


def decision_us(policy: LearnedPolicy, views: Views) -> float:
    """Median time that `policy` takes to decide on one of the `views` [G], µs."""
    nodes, request, me, routes = views
    single = [Views(nodes[i], request[i], me[i], routes[i]) for i in (slice(k, k + 1) for k in range(len(me)))]
    active, uniforms, actions = np.ones(1, np.bool_), np.zeros((1, 4)), make_actions(1)
    spent_ns = []
    for k in range(DECISIONS + len(single)):
        view = single[k % len(single)]
        start_ns = time.perf_counter_ns()
        policy.decide(view, active, uniforms, actions)
        spent_ns.append(time.perf_counter_ns() - start_ns)
    return float(np.median(spent_ns[len(single) :])) / 1e3


def describe(bundle: Bundle) -> str:
    """What a bundle holds, for people."""
    m = bundle.manifest
    net, decisions = m["architecture"], m["decisions"]
    facts = [
        ("bundle", str(bundle.folder)),
        ("name", m.get("name")),
        ("versions", f"bundle format {m['format']}, observation spec {m['view_version']}"),
        ("network", f"{net['name']}, width {net['width']}, {net['parameters']:,} parameters"),
        ("sees", ", ".join(f"{len(each)} features of {part}" for part, each in m["features"].items())),
        ("decides", f"{len(decisions['routes'])} routes, {len(decisions['markups'])} markups"),
        ("takes", f"work of others that brings {_weight(bundle, PAYS)} of what it costs by now"),
        ("asks", f"its cost times 1 + {_weight(bundle, KEEP)} for the share of prompts that is cached, and its markup"),
        ("trained", f"{_told(m.get('agent_steps'))} agent steps, seed {_told(m.get('seed'))}"),
        ("markets", m.get("environment")),
        ("git", _revision(m.get("git"))),
        ("packages", m.get("packages")),
        ("golden", f"{len(bundle.logits)} views"),
    ]  # fmt: skip
    lines = [f"{name:<9} {_told(value)}" for name, value in facts]
    rows = results_table(m)
    lines += ["", "results   score, 95 % interval", *_columns(rows)] if rows else ["results   none in tabular form"]
    lines += ["", "files"]
    for name in (MANIFEST, *SEALED):
        lines.append(f"{m['sha256'][name]}  {(bundle.folder / name).stat().st_size:>9,} bytes  {name}")
    return "\n".join(_printable(line) for line in lines)


def _bundle_bytes(bundle: Bundle) -> int:
    return sum((bundle.folder / name).stat().st_size for name in (MANIFEST, *SEALED))


def _told(value: Any) -> str:
    """A value of the manifest in words."""
    if value is None:
        return "not recorded"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_told(each)}" for key, each in value.items())
    if isinstance(value, list):
        return "/".join(_told(each) for each in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _weight(bundle: Bundle, name: str) -> str:
    return _told(round(float(bundle.weights[name]), 4))


def _revision(git: Any) -> Any:
    """What a bundle was made from, in words; as it is where it says something else."""
    if not isinstance(git, dict) or git.keys() != {"revision", "dirty"}:
        return git
    return f"{_told(git['revision'])}, {'with' if git['dirty'] else 'without'} uncommitted changes"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]


def _printable(text: str) -> str:
    """`text` without what could command a terminal: a bundle may come from anyone."""
    return "".join(c if c.isprintable() else "�" for c in text)


if __name__ == "__main__":
    sys.exit(main())
