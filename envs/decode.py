"""Values of a scenario file, each with its place: read by its type, or refused with what was expected."""

import difflib
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Annotated, Any, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

# What a text of people may be; `msgspec` checks the length, `scalar` the rest.
Text = Annotated[str, Meta(min_length=1, max_length=100)]


class ScenarioError(ValueError):
    """A scenario that cannot be used. The message has the file, the field, its value and what was expected."""

    def __init__(self, source: str, place: str, value: str, expected: str) -> None:
        self.source, self.place, self.value, self.expected = source, place, value, expected
        super().__init__(f"{source}: {place}: got {value}, expected {expected}")


class OneOf(NamedTuple):
    """What a text may be: annotates a field."""

    names: tuple[str, ...]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class Missing:
    def __repr__(self) -> str:
        return "nothing"


@dataclass(frozen=True)
class At:
    """A value of the file and its place; `below` is the mapping among the `defaults` that fills in missing keys."""

    source: str
    path: str
    value: Any
    below: "At | None" = None

    def fail(self, expected: str) -> NoReturn:
        raise ScenarioError(self.source, self.path or "the scenario", _SHORT.repr(self.value), expected)

    def at(self, key: str) -> "At":
        """The value under `key` of this mapping, or nothing."""
        return At(self.source, f"{self.path}.{key}" if self.path else key, self.value.get(key, Missing()))

    def entries(self, known: Collection[str] | None = None) -> "dict[str, At]":
        """The values of this mapping, completed from `below`; fails on a key that is not `known`."""
        if not isinstance(self.value, Mapping):
            self.fail("a mapping" + (f" with keys among {', '.join(known)}" if known else ""))
        below = self.below.entries(known) if self.below and isinstance(self.below.value, Mapping) else {}
        found = dict(below)
        for key in self.value:
            entry = self.at(key if isinstance(key, str) else _SHORT.repr(key))
            if not isinstance(key, str) or (known is not None and key not in known):
                names = known or ()
                one_of = f"a known key ({', '.join(names)})" if names else "a name as key"
                replace(entry, value=self.value[key]).fail(one_of + did_you_mean(str(key), names))
            found[key] = At(entry.source, entry.path, entry.value, below[key]) if key in below else entry
        return found

    def items(self, least: int, most: int) -> "list[At]":
        """The values of this list; fails if there are not `least` to `most` of them."""
        if not isinstance(self.value, list | tuple) or not least <= len(self.value) <= most:
            count = f"{least}" if least == most else f"{least} to {most}"
            self.fail(f"a list of {count} entries")
        return [At(self.source, f"{self.path}[{i}]", value) for i, value in enumerate(self.value)]


def did_you_mean(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name[:100], names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """Types of the fields of a dataclass, with what is said beside them."""
    hints = get_type_hints(kind, include_extras=True)
    return {each.name: hints[each.name] for each in fields(kind)}


@cache
def split(hint: Any) -> tuple[Any, Meta, Collection[str]]:
    """A type, its bounds, and the names that it may be."""
    base, metadata = (get_args(hint)[0], hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())
    meta = next((each for each in metadata if isinstance(each, Meta)), Meta())
    return base, meta, next((each.names for each in metadata if isinstance(each, OneOf)), ())


def scalar(at: At, hint: Any) -> Any:
    """A number or a text."""
    base, meta, names = split(hint)
    try:
        value = msgspec.convert(at.value, hint)
        good = base is not str or (value in names if names else bool(value.strip()) and value.isprintable())
    except msgspec.ValidationError:
        good = False
    if good:
        return value
    names = names or get_args(base)
    if names:
        at.fail(f"one of {', '.join(names)}" + did_you_mean(str(at.value)[:100], names))
    if base is str:
        at.fail("text of 1 to 100 printable characters" + ("" if isinstance(at.value, str) else " (quote it)"))
    if base is int:
        what = "an integer" if meta.multiple_of is None else f"a multiple of {meta.multiple_of:g}"
        at.fail(f"{what} in [{meta.ge}, {meta.le}]")
    low, high = meta.ge if meta.gt is None else meta.gt, meta.le if meta.lt is None else meta.lt
    at.fail(f"a number in {'[' if meta.gt is None else '('}{low:g}, {high:g}{']' if meta.lt is None else ')'}")


def check_increasing(places: Sequence[At], values: Sequence[float]) -> None:
    for place, before, value in zip(places[1:], values, values[1:], strict=False):
        if value <= before:
            place.fail(f"more than {before:g}, the one before")
