"""Command-line arguments: a dataclass for each command, a field with a one-line docstring for each argument.

tyro makes the command line of it. What is wrong with an argument is said in one line, with the value and what was
expected.
"""

import contextlib
import io
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

T = TypeVar("T")

SEEDS_FROM = 0  # the least seed


class UsageError(ValueError):
    """The command cannot do what its arguments request; the message names the argument."""


@dataclass(frozen=True)
class Range:
    """What a number may be, or each of several: annotates a field of a command's dataclass."""

    low: float
    high: float = math.inf
    above: bool = False
    """Whether it must be more than `low`."""

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'more than' if self.above else 'at least'} {self.low:g}"
        return f"more than {self.low:g}, at most {self.high:g}" if self.above else f"{self.low:g} to {self.high:g}"

    def holds(self, value: float) -> bool:
        """Whether `value` is in the range; NaN and infinities are not."""
        return math.isfinite(value) and (value > self.low if self.above else value >= self.low) and value <= self.high


Count = Annotated[int, Range(1)]
Seed = Annotated[int, Range(SEEDS_FROM)]
Positive = Annotated[float, Range(0, above=True)]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME")]
Policies = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME|BUNDLE...")]
"""Names after one `--policy` or several: `flat` makes one list of them."""


def flat(named: tuple[tuple[str, ...], ...]) -> list[str]:
    """What was given to an argument that may be repeated, in order."""
    return [each for several in named for each in several]


def parse_args(kind: type[T], prog: str, argv: Sequence[str] | None = None) -> T:
    """The arguments of the command `prog`, by default those of this process. Raises UsageError.

    SystemExit after `--help`, which prints the docstrings of `kind` and of its fields.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = tyro.cli(
                kind, prog=prog, args=None if argv is None else list(argv), config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(_reason(said.getvalue(), kind)) from None
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):  # type: ignore[arg-type]
        for allowed in getattr(hints[field.name], "__metadata__", ()):
            if isinstance(allowed, Range):
                _check(field.name, getattr(args, field.name), allowed)
    return args


def refuse(prog: str, error: Exception) -> int:
    """Say why the command cannot do what its arguments request; returns its exit status."""
    print(f"{prog}: {error}", file=sys.stderr)
    return 2


def _check(name: str, value: Any, allowed: Range) -> None:
    for each in value if isinstance(value, tuple) else (value,):
        if each is not None and not allowed.holds(each):
            raise UsageError(f"--{name.replace('_', '-')} is {each!r}, expected {allowed}")


def _reason(box: str, kind: type) -> str:
    """What is wrong: in tyro's box it stands below the title and above a rule."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    below_title = dropwhile(_is_rule, lines)  # a box of ASCII has a rule there too
    reason = " ".join(takewhile(lambda line: not _is_rule(line), below_title))
    reason = reason.removeprefix("Error parsing ").removeprefix(f"{kind.__name__}: ")
    not_a_number = r"(invalid literal for int\(\) with base 10|could not convert string to float): ('.*')"
    return re.sub(not_a_number, r"got \2, expected a number", reason)


def _is_rule(line: str) -> bool:
    return not set(line) - set("─-╰╯")
