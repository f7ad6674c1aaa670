"""Write docs/reference/ from the code: `make reference`. tests/test_reference.py fails where a page is out of date.

What a key, an option or a signal means is said once, beside it in the code: in the docstring below a field, or in the
comment at the end of its line.
"""

import ast
import importlib
import inspect
import math
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints
from unittest.mock import patch

import msgspec
import tyro
from msgspec import NODEFAULT, Meta

from wwwserve.agents import view
from wwwserve.agents.arguments import Range
from wwwserve.envs import scenario
from wwwserve.envs.decode import OneOf
from wwwserve.serving import cli, config
from wwwserve.serving.http.limits import KeyCounts
from wwwserve.serving.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs/reference"
MADE = "<!-- Made by docs/generate.py: `make reference`. -->"
LENGTHS = (config.LengthsConfig, scenario.Lognormal, scenario.LognormalSeconds)
PLAIN = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "file"}

Row = tuple[str, ...]


def table(head: Row, rows: list[Row]) -> str:
    """A table of Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in each) + " |" for each in lines
    )


def said(kind: type) -> dict[str, str]:
    """What the code says of each field of a class, those of its bases included."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__[:-1]):
        if each.__module__.startswith("wwwserve."):
            found |= _said_in(textwrap.dedent(inspect.getsource(each)))
    return found


def _said_in(source: str) -> dict[str, str]:
    found = {}
    lines = source.splitlines()
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            found[node.target.id] = " ".join(after.value.value.split())
        else:
            found[node.target.id] = lines[node.end_lineno - 1][node.end_col_offset :].partition("# ")[2]
    return found


def about(thing: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def bare(hint: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """A type without None and what is said beside it, that, and whether None is one of its values."""
    beside: tuple[Any, ...] = ()
    optional = False
    while True:
        if get_origin(hint) is Annotated:
            beside, hint = (*beside, *hint.__metadata__), get_args(hint)[0]
        elif get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint):
            rest = [each for each in get_args(hint) if each is not NoneType]
            hint, optional = (rest[0] if len(rest) == 1 else Union[tuple(rest)]), True  # noqa: UP007 - of a list
        else:
            return hint, beside, optional


def type_name(hint: Any) -> str:
    """A type as people say it, with its range."""
    hint, beside, _ = bare(hint)
    meta = next((each for each in beside if isinstance(each, Meta)), None)
    names = next((each.names for each in beside if isinstance(each, OneOf)), ())
    allowed = next((each for each in beside if isinstance(each, Range)), None)
    if names:
        return ", ".join(f"`{each}`" for each in names)
    if get_origin(hint) is Literal:
        return ", ".join(f"`{each}`" for each in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(type_name(each) for each in get_args(hint)))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if inner[-1] is Ellipsis:
            return f"list of {type_name(inner[0])}" + (f"; {bounds(meta)}" if meta else "")
        return f"pair of {type_name(inner[0])}"
    if get_origin(hint) is dict:
        return f"by name, {type_name(get_args(hint)[1])}"
    if hint in LENGTHS:
        return "`median`, `sigma`, `max`"
    name = PLAIN.get(hint, "mapping")
    told = str(allowed) if allowed else bounds(meta) if meta and hint is not str else ""
    return f"{name}, {told}" if told else name


def bounds(meta: Meta) -> str:
    """What `meta` allows."""
    told = []
    if meta.multiple_of is not None:
        told.append(f"a multiple of {meta.multiple_of:g}")
    if meta.ge is not None and meta.le is not None:
        told.append(f"{meta.ge:g} to {_number(meta.le)}")
    elif meta.gt is not None and meta.le is not None:
        told.append(f"more than {meta.gt:g}, at most {_number(meta.le)}")
    if meta.max_length is not None:
        told.append(f"{meta.min_length or 0} to {meta.max_length:,}")
    return ", ".join(told)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10_000 else f"{value:g}"


def default_text(value: Any) -> str:
    """A default as a file or a command line has it."""
    if value is None or value == () or value == {}:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(f"[{default_text(each)}]" if isinstance(each, tuple) else default_text(each) for each in value)
    if value == math.inf:
        return "end"
    if isinstance(value, Path) and value.is_absolute():  # in the clone, which is elsewhere for others
        return str(value.resolve().relative_to(ROOT))
    if isinstance(value, int | float):
        return f"{value // 2**20} MiB" if value >= 2**20 and value % 2**20 == 0 else f"{value:.12g}"
    if isinstance(value, LENGTHS):
        return ", ".join(default_text(getattr(value, name)) for name in ("median", "sigma", "max"))
    return "" if is_dataclass(value) or isinstance(value, msgspec.Struct) else str(value)  # it has a table of its own


# The command line


def arguments_of(name: str) -> type:
    """The dataclass of a command's arguments."""
    command = cli.COMMANDS[name]
    if not isinstance(command, cli.Tool):
        return command
    found: list[type] = []

    def capture(kind: type, **_: object) -> None:
        found.append(kind)
        raise SystemExit

    module = importlib.import_module(f"wwwserve.{command.module}")
    with patch("tyro.cli", capture), patch.object(sys, "argv", [name]):
        try:
            module.main()
        except SystemExit:
            return found[0]
    raise AssertionError(f"{name} parses no arguments")


def cli_page() -> str:
    parts = [
        MADE,
        "# Command line",
        "`wwwserve --help` lists the commands, `wwwserve COMMAND --help` the arguments of one. A command that needs "
        "what only `[train]` installs says so. Exit status: 0 done, 1 refused or failed, with the reason on standard "
        "error, 2 wrong usage.",
    ]
    for name in cli.COMMANDS:
        kind = arguments_of(name)
        described, hints = said(kind), get_type_hints(kind, include_extras=True)
        rows = [_argument(each, hints[each.name], described[each.name]) for each in fields(kind)]
        parts.append(f"## wwwserve {name}\n\n{about(kind)}")
        if rows:
            parts.append(table(("argument", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _argument(field: Any, hint: Any, meaning: str) -> Row:
    hint, beside, _ = bare(hint)
    metavar = next((each.metavar for each in beside if getattr(each, "metavar", None)), None)
    positional = any(each is tyro.conf.Positional for each in beside)
    default = field.default if field.default is not MISSING else ""
    flag = f"--{field.name.replace('_', '-')}"
    if hint is bool:
        shown, default = (f"`--no-{flag[2:]}`" if default else f"`{flag}`"), ""
    elif positional:
        shown = f"`{metavar or field.name.upper()}`"
    else:
        shown = f"`{flag} {metavar or _metavar(hint)}`"
    notes = [str(each) for each in beside if isinstance(each, Range)]
    notes += ["may be repeated"] if any(each is tyro.conf.UseAppendAction for each in beside) else []
    meaning += f" ({', '.join(notes)})" if notes else ""
    return shown, f"`{default_text(default)}`" if default_text(default) else "", meaning


def _metavar(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return _metavar(bare(get_args(hint)[0])[0]) + "..."
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    return {int: "N", float: "X", Path: "FILE"}.get(hint, "TEXT")


# node.yaml

KEY = "A" * 43
EVERYTHING = {
    "name": "n", "key": "n.pem", "url": "https://h:1", "cors": {"origins": ["*"]}, "tls": {}, "admin": {},
    "keys": [{"name": "k", "key": "k"}], "trust": [], "peers": [{"key": KEY, "url": "https://h:2"}],
    "engine": {"url": "http://h", "profile": {"kind": "catalogue", "gpu": "rtx-4090", "model": "qwen3-8b"}},
    "classes": {"c": {"deadline_s": 1.0}}, "ledger": {"file": "l.db", "limits": {KEY: {"ours": 1.0, "theirs": 1.0}}},
}  # fmt: skip
# Names of fields in messages, where they are not their place.
CALLED = {
    "every class's deadline_s": "classes.NAME.deadline_s",
    "every key's name": "keys.name",
    "ledger.limits": "ledger.limits.NAME.ours",
}


def node_page() -> str:
    """Every key of node.yaml; what may be given is what `serving.config` refuses everything else by."""
    checks = config._checks(msgspec.convert(EVERYTHING, config.NodeConfig))
    allowed = {CALLED.get(field, field): expected.partition(", got")[0] for field, _, expected in checks}
    allowed = {
        field: expected for field, expected in allowed.items() if re.match(r"\d|above|at (least|most)", expected)
    }
    parts = [
        MADE,
        "# node.yaml",
        "Every key. What a section is for is in [the guide of the node](../node.md). Files are looked up from the "
        "folder of `node.yaml`; an unknown key or a wrong value is refused with its place.",
    ]
    for path, kind in _structs("", config.NodeConfig):
        described, hints = said(kind), get_type_hints(kind, include_extras=True)
        rows = []
        tag = kind.__struct_config__.tag
        if tag:
            rows.append((f"`{path}.kind`", f"`{tag}`", "", ""))
        for each in msgspec.structs.fields(kind):
            place = f"{path}.{each.name}" if path else each.name
            default = each.default if each.default is not NODEFAULT else ""
            if each.default_factory is not NODEFAULT:
                default = each.default_factory()
            shown = default_text(default)
            needed = (
                "required"
                if each.required
                else f"`{shown}`"
                if shown
                else ""
                if each.default_factory is not NODEFAULT
                else "none"
            )
            told = [type_name(hints[each.name]), allowed.get(place, "")]
            rows.append((f"`{place}`", ", ".join(filter(None, told)), needed, described[each.name]))
        title = "A node" if not path else f"`{path}`" + (f", kind `{tag}`" if tag else "")
        parts.append(f"## {title}\n\n{about(kind)}\n\n" + table(("key", "what it may be", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _structs(path: str, kind: type) -> Iterator[tuple[str, type]]:
    """The mappings of a configuration by their place, each before those that it has."""
    yield path, kind
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for inner, entry in _inner(hint):
            place = f"{path}.{name}{entry}" if path else f"{name}{entry}"
            if inner is not config.LengthsConfig or not path:  # that of a class is like the node's
                yield from _structs(place, inner)


def _inner(hint: Any, entry: str = "") -> Iterator[tuple[type, str]]:
    hint = bare(hint)[0]
    if isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, msgspec.Struct)):
        yield hint, entry
    for each in get_args(hint):
        yield from _inner(each, ".NAME" if get_origin(hint) is dict else entry)


# A scenario


def scenario_page() -> str:
    """Every key of a scenario file."""
    parts = [
        MADE,
        "# Scenario files",
        "Every key. [The guide](../scenarios.md) says how to write one. An unknown key or a value out of range is "
        "refused with file, place, value and what was expected.",
    ]
    seen: set[type] = set()
    for path, kind in _kinds("", scenario.Scenario):
        if kind in seen:
            continue
        seen.add(kind)
        described, hints = said(kind), get_type_hints(kind, include_extras=True)
        rows = [(f"`{path}.kind`" if path else "`kind`", f"`{kind.kind}`", "", "")] if hasattr(kind, "kind") else []
        for each in fields(kind):
            if kind is scenario.SloClass and each.name == "name":  # it is the key in the file
                continue
            place = f"{path}.{each.name}" if path else each.name
            default = "required" if each.default is MISSING else default_text(each.default)
            shown = default if default in ("", "required") else f"`{default}`"
            rows.append((f"`{place}`", type_name(hints[each.name]), shown, described.get(each.name, "")))
        title = "The scenario" if not path else f"`{path}`" + (f", kind `{kind.kind}`" if hasattr(kind, "kind") else "")
        parts.append(f"## {title}\n\n{about(kind)}\n\n" + table(("key", "what it may be", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _kinds(path: str, kind: type) -> Iterator[tuple[str, type]]:
    yield path, kind
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for inner, _ in _inner(hint):
            place = f"{path}.{name}" if path else name
            yield from _kinds(f"{place}.NAME" if inner is scenario.SloClass else place, inner)


# Metrics and the observation


def metrics_page() -> str:
    """Every metric of a node."""
    registry = Metrics().registry
    KeyCounts(registry)
    rows = []
    for each in registry.collect():
        collector = registry._names_to_collectors.get(each.name)
        labels = ", ".join(f"`{name}`" for name in getattr(collector, "_labelnames", ()))
        name = f"{each.name}_total" if each.type == "counter" else each.name
        rows.append((f"`{name}`", each.type, labels, each.documentation))
    head = "# Metrics\n\nWhat `GET /metrics` of a node has, for Prometheus."
    return "\n\n".join([MADE, head, table(("metric", "type", "labels", "meaning"), sorted(rows))]) + "\n"


def observation_page() -> str:
    """Every signal of the observation."""
    again = f"{view.NODES} times: the own node, then the candidates in the order drawn, zeros where there is none."
    blocks = (
        ("Nodes", again, view.NODE_FEATURES),
        ("The request", "The one at the head; zeros without one.", view.REQUEST_FEATURES),
        ("The provider itself", "", view.SELF_FEATURES),
    )
    parts = [
        MADE,
        "# Observation",
        f"Version {view.VIEW_VERSION}. What a provider sees when it decides: three blocks of float32, in physical "
        "units, clipped to the ranges given; `agents.view.normalise` brings them to [-1, 1] for networks. A change of "
        "order, unit or meaning raises the version, and a policy of another version is refused. "
        "[The game](../environment.md) says what providers know, and when.",
    ]
    for title, text, features in blocks:
        rows = [(f"`{f.name}`", f.unit, f"{f.low:g} to {f.high:g}", f.meaning) for f in features]
        parts.append(
            "\n\n".join(filter(None, [f"## {title}", text, table(("signal", "unit", "range", "meaning"), rows)]))
        )
    return "\n\n".join(parts) + "\n"


PAGES = {
    "cli.md": cli_page,
    "node-yaml.md": node_page,
    "scenario.md": scenario_page,
    "metrics.md": metrics_page,
    "observation.md": observation_page,
}


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for file, page in PAGES.items():
        (OUT / file).write_text(page(), encoding="utf-8")
