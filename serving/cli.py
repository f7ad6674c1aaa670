"""The `wwwserve` command.

    wwwserve node FILE
    wwwserve up [--nodes N] [--engine emulated|vllm] [--base-port P] [--policy NAME|BUNDLE] ...
    wwwserve status [URL]
    wwwserve key new FILE
    wwwserve key show FILE
    wwwserve calibrate URL [--model NAME] [--json FILE|-] [--beside URL] ...
    wwwserve ledger show FILE
    wwwserve ledger verify FILE [FILE]
    wwwserve policy show [BUNDLE] [--json]
    wwwserve policy verify [BUNDLE]

Exit status: 0 done, 1 refused or failed, with the reason on standard error, 2 not used as it should be.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from wwwserve.agents.decision import make_actions
from wwwserve.agents.policy.bundle import DEFAULT_BUNDLE, MANIFEST, SEALED, Bundle, BundleError, read, results_table
from wwwserve.agents.policy.runtime import TOLERANCE, LearnedPolicy, from_bundle, golden_error
from wwwserve.agents.view import Views
from wwwserve.serving import config, display, node
from wwwserve.serving.config import ConfigError
from wwwserve.serving.engine import calibrate, local_vllm
from wwwserve.serving.engine.adapter import NAMES
from wwwserve.serving.engine.fit import CalibrationError
from wwwserve.serving.engine.local_vllm import PrepareError
from wwwserve.serving.engine.probe import Settings
from wwwserve.serving.http.keys import Identity, IdentityError
from wwwserve.serving.ledger import audit
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.journal import JournalError
from wwwserve.serving.ledger.statements import StatementError
from wwwserve.serving.local_nodes import NetworkError, Plan, look

DONE, FAILED = 0, 1  # argparse itself exits with 2
DECISIONS = 2000  # that `verify` times

REFUSED = (
    BundleError, CalibrationError, ConfigError, IdentityError, JournalError, LedgerError, NetworkError, PrepareError,
    StatementError, OSError,
)  # fmt: skip

Groups: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Exits by itself, with 2, if it is not used as it should be."""
    args = _parser().parse_args(argv)
    run: Run = args.run
    try:
        status = run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = FAILED
    except REFUSED as error:
        print("wwwserve: " + "\n".join(map(_printable, str(error).splitlines())), file=sys.stderr)
        status = FAILED
    except KeyboardInterrupt:
        status = DONE
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wwwserve",
        description="A provider among providers that serve each other's overflow.",
        epilog="Exit status: 0 done, 1 refused or failed, 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"wwwserve {_version()}")
    groups = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_node(groups)
    _add_up(groups)
    _add_status(groups)
    _add_key(groups)
    _add_calibrate(groups)
    _add_ledger(groups)
    _add_policy(groups)
    return parser


def _version() -> str:
    try:
        return version("wwwserve")
    except PackageNotFoundError:
        return "(not installed)"


def _add_command(groups: Groups, name: str, text: str, run: Run) -> argparse.ArgumentParser:
    """A command that is carried out by `run`, which returns the exit status."""
    command = groups.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run)
    return command


# wwwserve node, up, status


def _add_node(groups: Groups) -> None:
    node = _add_command(groups, "node", "run a node before an engine", _node)
    node.add_argument("file", type=Path, metavar="FILE", help="its configuration, see README.md")


def _node(args: argparse.Namespace) -> int:
    node.run(config.load(args.file))
    return DONE


def _add_up(groups: Groups) -> None:
    text = "run a whole network on this machine, on emulated engines or real vLLM"
    add = _add_command(groups, "up", text, _up).add_argument
    add("--nodes", type=int, default=3, metavar="N", help="nodes (default: 3)")
    add("--base-port", type=int, default=9001, metavar="P", help="port of the first node's API, the others follow; 0 "
        "for any that are free (default: 9001)")  # fmt: skip
    add("--policy", metavar="NAME|BUNDLE", help="a rule or a bundle, for every node (default: the shipped bundle)")
    add("--engine", choices=["emulated", "vllm"], default="emulated", help="vllm: real vLLM with a small model, a CPU "
        "core and 2.8 GB each; what it needs is installed at the first time (default: emulated)")  # fmt: skip
    add("--model", help=f"that they serve: if emulated, of the catalogue (default: qwen3-8b), with vllm "
        f"{' or '.join(local_vllm.PROFILES)} (default: {local_vllm.SMOLLM2})")  # fmt: skip
    add("--calibrate", action="store_true", help="measure every engine first, for minutes (default: known profiles)")
    add("--gpu", default="rtx-4090", help="that engines emulate (default: rtx-4090)")
    add("--max-num-seqs", type=int, default=64, help="requests at once in an emulated engine (default: 64)")
    add("--speed", type=float, default=1.0, help="emulated seconds in a second (default: 1)")
    add("--membership", choices=("static", "zenoh"), default="static", help="how nodes find each other "
        "(default: static)")  # fmt: skip


def _up(args: argparse.Namespace) -> int:
    model = args.model or {"emulated": "qwen3-8b", "vllm": local_vllm.SMOLLM2}[args.engine]
    display.up(
        Plan(
            args.nodes, args.base_port, args.policy, args.gpu, model, args.max_num_seqs, args.speed, args.engine,
            args.calibrate, args.membership,
        )
    )  # fmt: skip
    return DONE


def _add_status(groups: Groups) -> None:
    status = _add_command(groups, "status", "show how a node is and what it sees of its peers", _status)
    status.add_argument("url", nargs="?", default="http://127.0.0.1:9000", help="(default: http://127.0.0.1:9000)")
    status.add_argument("--json", action="store_true", help="print what the node says as it is")


def _status(args: argparse.Namespace) -> int:
    seen = look(args.url)
    if args.json:
        print(json.dumps(seen, indent=2))
    else:
        display.show(seen)
    return DONE


# wwwserve key


def _add_key(groups: Groups) -> None:
    text = "make a node's key, or show its public half"
    key = groups.add_parser("key", help=text, description=text[0].upper() + text[1:] + ".")
    commands = key.add_subparsers(metavar="COMMAND", required=True)
    new = _add_command(commands, "new", "make a key in a new file, and print its public half", _key_new)
    show = _add_command(commands, "show", "print the public half of a key, by which peers name the node", _key_show)
    for command in (new, show):
        command.add_argument("file", type=Path, metavar="FILE", help="where the key is kept")


def _key_new(args: argparse.Namespace) -> int:
    identity = Identity.generate()
    identity.save(args.file)
    print(identity.name)
    return DONE


def _key_show(args: argparse.Namespace) -> int:
    print(Identity.load(args.file).name)
    return DONE


# wwwserve calibrate


def _add_calibrate(groups: Groups) -> None:
    default = Settings()
    add = _add_command(
        groups, "calibrate", "measure what a running engine can do, for node.yaml", _calibrate
    ).add_argument
    add("url", metavar="URL", help="of the engine, without /v1; it should have nothing else to do")
    add("--model", metavar="NAME", help="as the engine calls it (default: its first)")
    add("--json", metavar="FILE|-", help="write everything that was measured there as well; - prints only that")
    add("--key", help="API key that the engine wants")
    add("--kind", default=default.kind, choices=list(NAMES), help=f"names of its metrics (default: {default.kind})")
    add("--max-num-seqs", type=int, metavar="N", help="requests that it runs at once (default: found by trying)")
    add("--kv-tokens", type=int, metavar="N", help="tokens of its KV cache (default: as vLLM says)")
    add("--max-batched-tokens", type=int, default=default.max_batched_tokens, metavar="N",
        help=f"that it computes in one iteration (default: {default.max_batched_tokens})")  # fmt: skip
    add("--tokens", type=int, default=default.tokens, metavar="N",
        help=f"of an answer that is timed (default: {default.tokens})")  # fmt: skip
    add("--longest", type=int, metavar="N",
        help="tokens of the longest request that is measured (default: what the engine takes)")  # fmt: skip
    add("--repeats", type=int, default=default.repeats, metavar="N",
        help=f"measurements of each load (default: {default.repeats})")  # fmt: skip
    add("--beside", action="append", default=[], metavar="URL", help="keep this engine busy meanwhile; may be repeated")
    add("--beside-requests", type=int, default=default.beside_requests, metavar="N",
        help=f"requests that it has all the time (default: {default.beside_requests})")  # fmt: skip


def _calibrate(args: argparse.Namespace) -> int:
    try:
        settings = Settings(
            model=args.model, key=args.key, kind=args.kind, max_num_seqs=args.max_num_seqs, kv_tokens=args.kv_tokens,
            max_batched_tokens=args.max_batched_tokens, tokens=args.tokens, repeats=args.repeats,
            longest=args.longest,
            beside=tuple(args.beside), beside_requests=args.beside_requests,
        )  # fmt: skip
    except ValueError as error:
        raise CalibrationError(str(error)) from None
    found = asyncio.run(calibrate.calibrate(args.url, settings, lambda line: print(line, file=sys.stderr)))
    told = json.dumps(found.json(), indent=2) + "\n"
    if args.json == "-":
        sys.stdout.write(told)
        return DONE
    if args.json:
        Path(args.json).write_text(told)
    print("\n".join(f"# {line}" for line in found.report().splitlines()))
    print(found.yaml(), end="")
    return DONE


# wwwserve ledger


def _add_ledger(groups: Groups) -> None:
    text = "look at a node's ledger, or check it"
    ledger = groups.add_parser("ledger", help=text, description=text[0].upper() + text[1:] + ".")
    commands = ledger.add_subparsers(metavar="COMMAND", required=True)
    show = _add_command(commands, "show", "say what a node owns, owes and has in escrow", _show_ledger)
    show.add_argument("file", type=Path, metavar="FILE", help="of the ledger")
    verify = _add_command(commands, "verify", "check chain, signatures and sums of ledgers", _verify_ledger)
    verify.add_argument("file", type=Path, metavar="FILE", help="of the ledger")
    verify.add_argument(
        "other", type=Path, nargs="?", metavar="FILE", help="of a peer: whether both sides of the channel agree"
    )


def _show_ledger(args: argparse.Namespace) -> int:
    print(audit.describe(audit.audit(args.file)))
    return DONE


def _verify_ledger(args: argparse.Namespace) -> int:
    files = [args.file] if args.other is None else [args.file, args.other]
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
        print("    the two agree on what both signed" + (", and nothing is under way" if audit.settled(*found) else ""))
    return DONE


# wwwserve policy


def _add_policy(groups: Groups) -> None:
    text = "look at a policy's bundle, or check it"
    policy = groups.add_parser("policy", help=text, description=text[0].upper() + text[1:] + ".")
    commands = policy.add_subparsers(metavar="COMMAND", required=True)
    show = _add_command(commands, "show", "say what a bundle holds and how it was made", _show)
    show.add_argument("--json", action="store_true", help="print the manifest as it is")
    verify = _add_command(commands, "verify", "load a bundle with every check, and time its decisions", _verify)
    for command in (show, verify):
        command.add_argument(
            "bundle", nargs="?", type=Path, default=DEFAULT_BUNDLE, metavar="BUNDLE",
            help="folder of the bundle (default: the policy that is shipped)",
        )  # fmt: skip


def _show(args: argparse.Namespace) -> int:
    bundle = read(args.bundle)
    if args.json:
        sys.stdout.write((bundle.folder / MANIFEST).read_text(encoding="utf-8"))
    else:
        print(describe(bundle))
    return DONE


def _verify(args: argparse.Namespace) -> int:
    bundle = read(args.bundle)
    policy = from_bundle(bundle)
    error, spent_us = golden_error(policy, bundle), decision_us(policy, bundle.views)
    print(f"ok: {_printable(str(args.bundle))}")
    print(f"files    {1 + len(SEALED)}, {_bundle_bytes(bundle):,} bytes; digests, shapes and numbers as they should be")
    print(f"golden   {len(bundle.logits)} views, logits within {error:.1e} (at most {TOLERANCE:g})")
    print(f"speed    {spent_us:.1f} µs a decision, median of {DECISIONS}")
    return DONE


def decision_us(policy: LearnedPolicy, views: Views) -> float:
    """Median time that `policy` takes to decide on one of the `views` [G], µs."""
    nodes, request, me, routes = views
    single = [Views(nodes[i], request[i], me[i], routes[i]) for i in (slice(k, k + 1) for k in range(len(me)))]
    active, dice, actions = np.ones(1, np.bool_), np.zeros((1, 4)), make_actions(1)
    spent_ns = []
    for k in range(DECISIONS + len(single)):
        view = single[k % len(single)]
        start_ns = time.perf_counter_ns()
        policy.decide(view, active, dice, actions)
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
        ("decides", f"{len(decisions['routes'])} routes, {len(decisions['admit_wait_s'])} admission waits, "
                    f"{decisions['prices']} prices"),
        ("trained", f"{_told(m.get('agent_steps'))} agent steps, seed {_told(m.get('seed'))}"),
        ("markets", m.get("environment")),
        ("git", m.get("git")),
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


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]


def _printable(text: str) -> str:
    """`text` without what could command a terminal: a bundle may come from anyone."""
    return "".join(c if c.isprintable() else "�" for c in text)


if __name__ == "__main__":
    sys.exit(main())
