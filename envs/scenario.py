"""A scenario: who takes part in a market, with what hardware and traffic, under which rules; read from a checked file.

The classes hold every key of a scenario file with its unit and, where it has one, its default. `load` and `parse` are
the only ways in: they refuse whatever is not exactly right with a `ScenarioError`.
"""

import difflib
import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import yaml

from wwwserve.agents import hardware, strict_yaml
from wwwserve.agents.lengths import Lognormal
from wwwserve.envs import trace
from wwwserve.envs.engine import MAX_SLOTS

SCENARIOS_DIR = Path(__file__).resolve().parent / "scenarios"
MAX_CLASSES = 4
MAX_THRESHOLDS = 8
MAX_PRICE_BINS = 8
MAX_JUDGES = 7
MAX_WINDOWS = 8  # online windows of a provider
MAX_SERVED = 62  # different names that the providers of a market serve
MAX_FILE_BYTES = 1_000_000
MAX_REQUESTS = 2_000_000


class ScenarioError(ValueError):
    """A scenario that cannot be used. The message has the file, the field, its value and what was expected."""

    def __init__(self, source: str, place: str, value: str, expected: str) -> None:
        self.source, self.place, self.value, self.expected = source, place, value, expected
        super().__init__(f"{source}: {place}: got {value}, expected {expected}")


PROMPT, OUTPUT = Lognormal(150.0, 0.5, 2048), Lognormal(4000.0, 0.75, 8192)  # of a long-reasoning workload


@dataclass(frozen=True)
class Lengths:
    """Tokens of the requests of a provider's own users."""

    prompt: Lognormal = PROMPT
    output: Lognormal = OUTPUT


@dataclass(frozen=True)
class SloClass:
    """A kind of request that users care about in its own way."""

    name: str
    share: float
    """Share of every provider's own requests, (0, 1]; all shares sum to 1."""
    deadline_s: float
    """A request is worth its value if it ends within this time of its arrival."""
    value: float = 1.0
    """Worth of a request that is in time, credits."""
    output: Lognormal | None = None
    """Its output length, in place of the provider's; a trace gives its own."""


@dataclass(frozen=True)
class Slo:
    """What counts as served in time."""

    thresholds_s: tuple[float, ...] = (200.0, 250.0, 300.0, 350.0, 400.0)
    """Latencies at which attainment is reported; increasing, at most `MAX_THRESHOLDS`."""
    classes: tuple[SloClass, ...] = ()
    """At most `MAX_CLASSES`; none means that requests are all alike."""


@dataclass(frozen=True)
class Economy:
    """Credits, stake and duels."""

    pricing: str = "per_request"
    """`per_request`: a delegated request costs 1 credit; `per_ktok`: the posted price for each 1000 output tokens."""
    initial_credit: float = 1000.0
    """Free credit of each provider at the start."""
    stake_rule: str = "load"
    """`load`: stake follows free capacity; `fixed`: it stays at its start."""
    initial_stake: float = 2.0
    """Staked credit of each provider at the start."""
    price_bins: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """Prices a provider can post, credits; increasing, at most `MAX_PRICE_BINS`."""
    duel_probability: float = 0.0
    """Chance that a delegated request becomes a duel."""
    judges: int = 3
    """Judges of a duel, 1 to `MAX_JUDGES`."""
    exposure: float | None = None
    """Credits that a provider may have in escrow with one peer; more is not handed to it. Default: no bound."""
    compute_cost_per_ktok: float = 0.02
    """What 1000 generated tokens cost the provider that runs them, credits."""


@dataclass(frozen=True)
class Phase:
    """A stretch of constant rate: from the end of the phase before (0 for the first) to `until_s`."""

    until_s: float
    rate_per_s: float


@dataclass(frozen=True)
class PoissonTraffic:
    """Poisson arrivals, the rate constant within each phase and 0 after the last."""

    kind: ClassVar[str] = "poisson"
    phases: tuple[Phase, ...]


@dataclass(frozen=True)
class MmppTraffic:
    """Poisson arrivals whose rate switches between two states with exponential dwell times; starts stationary."""

    kind: ClassVar[str] = "mmpp"
    rates_per_s: tuple[float, float]
    mean_dwell_s: tuple[float, float]


@dataclass(frozen=True)
class TimesTraffic:
    """Arrivals at given times."""

    kind: ClassVar[str] = "times"
    times_s: tuple[float, ...]
    """Sorted, within the run."""


@dataclass(frozen=True)
class TraceTraffic:
    """A replayed trace, which also gives the lengths; each of its requests comes at most once.

    The trace is cyclic: a window that reaches its end goes on at its beginning.
    """

    kind: ClassVar[str] = "trace"
    file: Path
    """Azure CSV or compact form; a file gives it as a name, looked up beside it, then among the packaged data."""
    start_s: float = 0.0
    """Time of the trace at which the run begins."""
    rate_scale: float = 1.0
    """Share of the requests that is kept, at random; (0, 1]."""


Traffic = PoissonTraffic | MmppTraffic | TimesTraffic | TraceTraffic


@dataclass(frozen=True)
class Misreport:
    """A lie in the gossip: advertised load and speed are the true ones times these factors."""

    load: float = 1.0
    speed: float = 1.0
    from_s: float = 0.0
    until_s: float = math.inf
    """Infinite if the file gives none or the end of arrivals: the lie lasts through the drain."""


@dataclass(frozen=True)
class Provider:
    """One provider: an engine and its own users."""

    name: str
    gpu: str = "rtx-4090"
    """A name in `agents.hardware.GPUS`."""
    model: str = "qwen3-8b"
    """A name in `agents.hardware.MODELS`."""
    quantization: str = "bf16"
    """A name in `agents.hardware.QUANTIZATIONS`."""
    attention: str = "flashinfer"
    """A name in `agents.hardware.ATTENTIONS`."""
    max_num_seqs: int = 64
    """Most requests that the engine runs at once, 1 to `MAX_SLOTS`."""
    serves: tuple[str, ...] = ()
    """Names that a request may ask for, the first being what its own users ask for; none means the model's name."""
    lengths: Lengths = Lengths()
    traffic: Traffic | None = None
    """Requests of its own users; None means that it has no users."""
    online_s: tuple[tuple[float, float], ...] = ((0.0, math.inf),)
    """Windows in which it takes part. One that reaches the end of arrivals has an infinite end: through the drain."""
    misreport: Misreport | None = None
    strength: float | None = None
    """Log-strength in duels, in place of its model's and quantization's; -20 to 20."""
    initial_credit: float | None = None
    """Its free credit at the start, in place of the economy's."""
    initial_stake: float | None = None
    """Its staked credit at the start, in place of the economy's."""

    def __post_init__(self) -> None:
        if not self.serves:
            object.__setattr__(self, "serves", (self.model,))


@dataclass(frozen=True)
class Scenario:
    """A market to simulate or to run live."""

    name: str
    providers: tuple[Provider, ...]
    duration_s: float = 600.0
    """Arrivals stop here; up to 1e6."""
    drain_s: float = 1800.0
    """Then the market runs until all requests end, at most this long."""
    decision_interval_s: float = 1.0
    """Time between decisions, (0, 5]."""
    gossip_interval_s: float = 3.0
    """Time between the adverts of a provider."""
    rtt_ms: float = 50.0
    """Round trip between any two providers."""
    slo: Slo = Slo()
    economy: Economy = Economy()

    def to_mapping(self) -> dict[str, Any]:
        """The scenario in the format of its file, every key written out: plain data, `parse` gives it back."""
        mapping: dict[str, Any] = _plain(self)
        classes = {entry.pop("name"): entry for entry in mapping["slo"].pop("classes")}
        if classes:
            mapping["slo"]["classes"] = classes
        for entry in mapping["providers"]:
            entry["online_s"] = [[start, min(end, self.duration_s)] for start, end in entry["online_s"]]
            if entry.get("misreport", {}).get("until_s") == math.inf:
                del entry["misreport"]["until_s"]
        return mapping


def packaged_names() -> list[str]:
    """Names of the scenarios that come with the package, sorted."""
    return sorted(path.relative_to(SCENARIOS_DIR).with_suffix("").as_posix() for path in SCENARIOS_DIR.rglob("*.yaml"))


def load(name_or_path: str | Path) -> Scenario:
    """Read a packaged scenario by name (`paper/alternating`), else a YAML file. Raises ScenarioError."""
    name = str(name_or_path)
    names = packaged_names()
    path = SCENARIOS_DIR / f"{name}.yaml" if name in names else Path(name_or_path)
    expected = "a packaged scenario or a YAML file" + _did_you_mean(name, names)
    try:
        if not path.is_file():
            raise ScenarioError(name, "file", "none of this name", expected)
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ScenarioError(name, "file", error.strerror or str(error), expected) from None
    if len(data) > MAX_FILE_BYTES:
        raise ScenarioError(name, "file", f"more than {MAX_FILE_BYTES} bytes", f"at most {MAX_FILE_BYTES} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise ScenarioError(name, "file", found, "text in UTF-8") from None
    try:
        mapping = strict_yaml.load(text)
    except yaml.YAMLError as error:
        raise ScenarioError(name, "file", " ".join(str(error).split()), "valid YAML") from None
    return parse(mapping, name, path.parent)


def parse(mapping: Any, source: str = "<memory>", folder: Path | None = None) -> Scenario:
    """Check a scenario given as plain data and build it.

    `source` names it in errors; trace files are looked up in `folder` first. Raises ScenarioError.
    """
    top = _At(source, "", mapping)
    entries = top.entries((*(each.name for each in fields(Scenario)), "defaults"))
    duration = _number(0, 1e6, above=True)
    duration_s = duration(entries["duration_s"]) if "duration_s" in entries else Scenario.duration_s

    provider = _provider_checks(duration_s, folder)
    defaults = entries.pop("defaults", None)
    if defaults is not None:
        for key, entry in defaults.entries([key for key in provider if key != "name"]).items():
            provider[key](entry)

    def providers(at: _At) -> tuple[Provider, ...]:
        return tuple(_record(Provider, provider)(replace(item, below=defaults)) for item in at.items(1, 4096))

    checks: Checks = {
        "name": _text,
        "duration_s": duration,
        "drain_s": _number(0, 1e6),
        "decision_interval_s": _number(0, 5, above=True),
        "gossip_interval_s": _number(0, 3600, above=True),
        "rtt_ms": _number(0, 60_000),
        "slo": _record(Slo, {"thresholds_s": _increasing(MAX_THRESHOLDS), "classes": _classes}),
        "economy": _record(Economy, _ECONOMY),
        "providers": providers,
    }
    scenario: Scenario = _record(Scenario, checks)(replace(top, value={k: e.value for k, e in entries.items()}))
    _check_providers(top.at("providers"), scenario)
    return scenario


# Below, one value is read at a time: an `_At` knows where the value stands, a check turns it into its meaning or fails.

T = TypeVar("T")
Check = Callable[["_At"], T]
Checks = dict[str, Check[Any]]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


@dataclass(frozen=True)
class _At:
    """A value of the file and its place; `below` is the mapping among the `defaults` that fills in missing keys."""

    source: str
    path: str
    value: Any
    below: "_At | None" = None

    def fail(self, expected: str) -> NoReturn:
        raise ScenarioError(self.source, self.path or "the scenario", _SHORT.repr(self.value), expected)

    def at(self, key: str) -> "_At":
        """The value under `key` of this mapping, or nothing."""
        return _At(self.source, f"{self.path}.{key}" if self.path else key, self.value.get(key, _Missing()))

    def entries(self, known: Collection[str] | None = None) -> "dict[str, _At]":
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
                replace(entry, value=self.value[key]).fail(one_of + _did_you_mean(str(key), names))
            found[key] = _At(entry.source, entry.path, entry.value, below[key]) if key in below else entry
        return found

    def items(self, least: int, most: int) -> "list[_At]":
        """The values of this list; fails if there are not `least` to `most` of them."""
        if not isinstance(self.value, list | tuple) or not least <= len(self.value) <= most:
            count = f"{least}" if least == most else f"{least} to {most}"
            self.fail(f"a list of {count} entries")
        return [_At(self.source, f"{self.path}[{i}]", value) for i, value in enumerate(self.value)]


def _did_you_mean(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name[:100], names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _number(low: float, high: float, *, above: bool = False, below: bool = False) -> Check[float]:
    """A float in [low, high], without `low` itself if `above` and without `high` itself if `below`."""
    expected = f"a number in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"

    def check(at: _At) -> float:
        value = at.value
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            at.fail(expected)
        if (above and value == low) or (below and value == high):
            at.fail(expected)
        return float(value)

    return check


def _integer(low: int, high: int) -> Check[int]:
    def check(at: _At) -> int:
        if isinstance(at.value, bool) or not isinstance(at.value, int) or not low <= at.value <= high:
            at.fail(f"an integer in [{low}, {high}]")
        return at.value

    return check


def _text(at: _At) -> str:
    if not isinstance(at.value, str) or not at.value.strip() or not at.value.isprintable() or len(at.value) > 100:
        at.fail("text of 1 to 100 printable characters" + ("" if isinstance(at.value, str) else " (quote it)"))
    return at.value


def _choice(names: Collection[str]) -> Check[str]:
    def check(at: _At) -> str:
        if not isinstance(at.value, str) or at.value not in names:
            at.fail(f"one of {', '.join(names)}" + _did_you_mean(str(at.value)[:100], names))
        return at.value

    return check


def _list(check: Check[T], least: int, most: int) -> Check[tuple[T, ...]]:
    return lambda at: tuple(check(item) for item in at.items(least, most))


def _optional(check: Check[T]) -> Check[T | None]:
    return lambda at: None if at.value is None else check(at)


def _increasing(most: int) -> Check[tuple[float, ...]]:
    """1 to `most` positive numbers, each larger than the one before."""
    numbers = _list(_number(0, 1e6, above=True), 1, most)

    def check(at: _At) -> tuple[float, ...]:
        values = numbers(at)
        _check_increasing(at.items(1, most), values)
        return values

    return check


def _check_increasing(places: list[_At], values: tuple[float, ...]) -> None:
    for place, before, value in zip(places[1:], values, values[1:], strict=False):
        if value <= before:
            place.fail(f"more than {before:g}, the one before")


def _values(at: _At, kind: type, checks: Checks) -> dict[str, Any]:
    """Checked values of a mapping, by key; fails if one is missing that `kind` has no default for."""
    entries = at.entries(checks)
    for each in fields(kind):
        if each.name in checks and each.name not in entries and each.default is MISSING:
            at.at(each.name).fail("a value for this key")
    return {key: checks[key](entry) for key, entry in entries.items()}


def _record(kind: type[T], checks: Checks) -> Check[T]:
    return lambda at: kind(**_values(at, kind, checks))


_lognormal = _record(
    Lognormal, {"median": _number(1, 1e6), "sigma": _number(0, 4), "max": _integer(1, 1_000_000)}
)  # fmt: skip
_CLASS: Checks = {
    "share": _number(0, 1, above=True),
    "deadline_s": _number(0, 1e6, above=True),
    "value": _number(0, 1e6),
    "output": _optional(_lognormal),
}
_ECONOMY: Checks = {
    "pricing": _choice(("per_request", "per_ktok")),
    "initial_credit": _number(0, 1e9),
    "stake_rule": _choice(("load", "fixed")),
    "initial_stake": _number(0, 1e9),
    "price_bins": _increasing(MAX_PRICE_BINS),
    "duel_probability": _number(0, 1),
    "judges": _integer(1, MAX_JUDGES),
    "exposure": _optional(_number(0, 1e9)),
    "compute_cost_per_ktok": _number(0, 1e6),
}


def _classes(at: _At) -> tuple[SloClass, ...]:
    entries = at.entries()
    if not 1 <= len(entries) <= MAX_CLASSES:
        at.fail(f"1 to {MAX_CLASSES} classes")
    for key, entry in entries.items():
        _text(replace(entry, value=key))
    classes = tuple(SloClass(name=key, **_values(entry, SloClass, _CLASS)) for key, entry in entries.items())
    total = sum(each.share for each in classes)
    if abs(total - 1) > 1e-6:
        at.fail(f"shares that sum to 1, not to {total:g}")
    return classes


def _provider_checks(duration_s: float, folder: Path | None) -> Checks:
    return {
        "name": _text,
        "gpu": _choice(hardware.GPUS),
        "model": _choice(hardware.MODELS),
        "quantization": _choice(hardware.QUANTIZATIONS),
        "attention": _choice(hardware.ATTENTIONS),
        "max_num_seqs": _integer(1, MAX_SLOTS),
        "serves": _serves,
        "lengths": _record(Lengths, {"prompt": _lognormal, "output": _lognormal}),
        "traffic": _optional(_traffic(duration_s, folder)),
        "online_s": _online(duration_s),
        "misreport": _optional(_misreport(duration_s)),
        "strength": _optional(_number(-20, 20)),
        "initial_credit": _optional(_number(0, 1e9)),
        "initial_stake": _optional(_number(0, 1e9)),
    }


def _serves(at: _At) -> tuple[str, ...]:
    names = _list(_text, 1, 32)(at)
    for i, item in enumerate(at.items(1, 32)):
        if item.value in names[:i]:
            item.fail("a name that is not in the list already")
    return names


def _online(duration_s: float) -> Check[tuple[tuple[float, float], ...]]:
    windows = _list(_list(_number(0, duration_s), 2, 2), 1, MAX_WINDOWS)

    def check(at: _At) -> tuple[tuple[float, float], ...]:
        values = windows(at)
        ends = [end for window in at.items(1, MAX_WINDOWS) for end in window.items(2, 2)]
        _check_increasing(ends, tuple(end for window in values for end in window))
        return tuple((start, _through_drain(end, duration_s)) for start, end in values)

    return check


def _misreport(duration_s: float) -> Check[Misreport]:
    factor, time = _number(0, 100), _number(0, duration_s)
    checks = {"load": factor, "speed": _number(0, 100, above=True), "from_s": time, "until_s": time}

    def check(at: _At) -> Misreport:
        misreport = _record(Misreport, checks)(at)
        if misreport.until_s <= misreport.from_s:
            at.entries()["until_s"].fail(f"more than from_s, {misreport.from_s:g}")
        return replace(misreport, until_s=_through_drain(misreport.until_s, duration_s))

    return check


def _through_drain(end_s: float, duration_s: float) -> float:
    """What lasts until the end of arrivals lasts through the drain."""
    return math.inf if end_s == duration_s else end_s


def _traffic(duration_s: float, folder: Path | None) -> Check[Traffic]:
    rate, dwell = _number(0, 1e6), _number(0.1, 1e9)
    phase = _record(Phase, {"until_s": _number(0, duration_s, above=True), "rate_per_s": rate})
    kinds: dict[str, Check[Traffic]] = {
        "poisson": _record(PoissonTraffic, {"phases": _list(phase, 1, 10_000)}),
        "mmpp": _record(MmppTraffic, {"rates_per_s": _list(rate, 2, 2), "mean_dwell_s": _list(dwell, 2, 2)}),
        "times": _record(TimesTraffic, {"times_s": _list(_number(0, duration_s, below=True), 0, MAX_REQUESTS)}),
        "trace": _trace(folder),
    }

    def check(at: _At) -> Traffic:
        entries = replace(at, below=None).entries()
        if "kind" not in entries:
            at.at("kind").fail(f"one of {', '.join(kinds)}")
        kind = _choice(kinds)(entries["kind"])
        rest = {key: value for key, value in at.value.items() if key != "kind"}
        traffic = kinds[kind](_At(at.source, at.path, rest))
        if isinstance(traffic, PoissonTraffic):
            places = [item.at("until_s") for item in at.at("phases").items(1, 10_000)]
            _check_increasing(places, tuple(each.until_s for each in traffic.phases))
        elif isinstance(traffic, TimesTraffic):
            return TimesTraffic(tuple(sorted(traffic.times_s)))
        return traffic

    return check


def _trace(folder: Path | None) -> Check[Traffic]:
    def file(at: _At) -> Path:
        if not isinstance(at.value, str) or not at.value:
            at.fail("the name of a trace file")
        try:
            path = trace.find(at.value, folder)
            if path is None:
                at.fail("a trace file beside the scenario or among the packaged data")
            trace.read(path)
        except ScenarioError:
            raise
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            at.fail(f"a trace file that can be read ({reason})")
        return path

    def check(at: _At) -> TraceTraffic:
        checks = {"file": file, "start_s": _number(0, 1e9), "rate_scale": _number(0, 1, above=True)}
        traffic = _record(TraceTraffic, checks)(at)
        period_s = trace.read(traffic.file).period_s
        if traffic.start_s >= period_s:
            at.at("start_s").fail(f"a time within the trace, [0, {period_s:g})")
        return traffic

    return check


def _check_providers(at: _At, scenario: Scenario) -> None:
    """What no provider shows alone: names differ, models fit their GPUs, the requests are not too many."""
    seen: dict[str, int] = {}
    requests = 0.0
    for i, provider in enumerate(scenario.providers):
        place = replace(at, path=f"providers[{i}]")
        if provider.name in seen:
            replace(place, path=f"{place.path}.name", value=provider.name).fail(
                f"a name of its own, not that of providers[{seen[provider.name]}]"
            )
        seen[provider.name] = i
        try:
            hardware.profile(
                provider.gpu,
                provider.model,
                provider.max_num_seqs,
                quantization=provider.quantization,
                attention=provider.attention,
            )
        except ValueError as error:
            replace(place, path=f"{place.path}.model", value=provider.model).fail(
                f"a model that fits on {provider.gpu} ({error})"
            )
        requests += _most_requests(provider.traffic, scenario.duration_s)
    if requests > MAX_REQUESTS:
        replace(at, value=round(requests)).fail(f"at most {MAX_REQUESTS} requests in all")
    served = {name for provider in scenario.providers for name in provider.serves}
    if len(served) > MAX_SERVED:
        replace(at, value=len(served)).fail(f"at most {MAX_SERVED} different names in all that providers serve")


def _most_requests(traffic: Traffic | None, duration_s: float) -> float:
    """Requests of a provider in a run: expected, for MMPP at its higher rate, for a trace all that it has."""
    match traffic:
        case PoissonTraffic(phases):
            starts = (0.0, *(phase.until_s for phase in phases))
            return sum(phase.rate_per_s * (phase.until_s - start) for phase, start in zip(phases, starts, strict=False))
        case MmppTraffic(rates_per_s, _):
            return max(rates_per_s) * duration_s
        case TimesTraffic(times_s):
            return len(times_s)
        case TraceTraffic(file):
            return len(trace.read(file).time_s)
        case _:
            return 0.0


def _plain(value: Any) -> Any:
    """Dataclasses as mappings without their Nones, tuples as lists, trace files by name."""
    if isinstance(value, Path):
        return trace.name_of(value)
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if not is_dataclass(value):
        return value
    entries = {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    kind = {"kind": value.kind} if isinstance(value, Traffic) else {}
    return kind | {key: entry for key, entry in entries.items() if entry is not None}
