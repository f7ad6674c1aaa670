"""A scenario: who takes part in a market, with what hardware and traffic, under which rules; read from a checked file.

The classes hold every key of a scenario file with its unit and, where it has one, its default. `load` and `parse` are
the only ways in: they refuse whatever is not exactly right with a `ScenarioError`.
"""

import math
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from msgspec import Meta

from wwwserve.agents import hardware, strict_yaml
from wwwserve.agents.lengths import Lognormal as Lognormal
from wwwserve.envs import trace
from wwwserve.envs.decode import At, OneOf, Text, check_increasing, did_you_mean, hints_of, scalar, split
from wwwserve.envs.decode import ScenarioError as ScenarioError
from wwwserve.envs.engine import MAX_SLOTS

SCENARIOS_DIR = Path(__file__).resolve().parent / "scenarios"
MAX_CLASSES = 4
MAX_THRESHOLDS = 8
MAX_JUDGES = 7
MAX_WINDOWS = 8  # online windows of a provider
MAX_SERVED = 62  # different names that the providers of a market serve
MAX_FILE_BYTES = 1_000_000
MAX_CACHE_BLOCK_TOKENS = 512
MAX_REQUESTS = 2_000_000
LONGEST_S = 1e6


# What values may be, beside their types; `msgspec` checks them.
Time = Annotated[float, Meta(gt=0, le=LONGEST_S)]
Credits = Annotated[float, Meta(ge=0, le=1e9)]
Share = Annotated[float, Meta(gt=0, le=1)]
Rate = Annotated[float, Meta(ge=0, le=1e6)]
Dwell = Annotated[float, Meta(ge=0.1, le=1e9)]
Scale = Annotated[float, Meta(gt=0, le=100)]

PROMPT, OUTPUT = Lognormal(150.0, 0.5, 2048), Lognormal(4000.0, 0.75, 8192)  # of a long-reasoning workload
TURNS, TURN = Lognormal(5.0, 0.8, 40), Lognormal(120.0, 0.8, 4096)  # of a chat


@dataclass(frozen=True)
class Lengths:
    """Tokens of the requests of a provider's own users."""

    prompt: Lognormal = PROMPT
    """Of prompts."""
    output: Lognormal = OUTPUT
    """Of answers."""


@dataclass(frozen=True)
class SloClass:
    """A kind of request that users care about in its own way."""

    name: str
    share: Share
    """Share of every provider's own requests; all shares sum to 1."""
    deadline_s: Time
    """A request is worth its value if it ends within this time of its arrival."""
    value: Rate = 1.0
    """Worth of a request that is in time, credits for 1000 tokens of its expected answer."""
    output: Lognormal | None = None
    """Its output length, in place of the provider's; a trace gives its own."""


@dataclass(frozen=True)
class Slo:
    """What counts as served in time."""

    thresholds_s: Annotated[tuple[Time, ...], Meta(min_length=1, max_length=MAX_THRESHOLDS)] = (
        200.0,
        250.0,
        300.0,
        350.0,
        400.0,
    )
    """Latencies at which attainment is reported, increasing."""
    classes: tuple[SloClass, ...] = ()
    """By name, at most 4; none: requests are all alike."""


@dataclass(frozen=True)
class Economy:
    """Credits, stake and duels."""

    payment: Literal["lateness", "quoted", "per_request"] = "lateness"
    """What a delegated request costs. `lateness`: its price by the executor's tariff, in full up to the promised time,
    falling to nothing at twice that; `quoted`: its price; `per_request`: 1 credit."""
    initial_credit: Credits = 1000.0
    """Free credit of each provider at the start."""
    stake_rule: Literal["load", "fixed"] = "load"
    """`load`: stake follows free capacity; `fixed`: it stays at its start."""
    initial_stake: Credits = 2.0
    """Staked credit of each provider at the start."""
    duel_probability: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Chance that a delegated request becomes a duel."""
    judges: Annotated[int, Meta(ge=1, le=MAX_JUDGES)] = 3
    """Judges of a duel."""
    exposure: Credits | None = None
    """Credits that a provider may have in escrow with one peer; more is not handed to it. Default: no bound."""
    compute_cost_per_ktok: Rate = 0.09
    """What 1000 generated tokens cost the provider that runs them, credits; those of the prompt cost by the engine's
    time, see `agents.tariff.write_compute`."""


@dataclass(frozen=True)
class Phase:
    """A stretch of constant rate: from the end of the phase before (0 for the first) to `until_s`."""

    until_s: float
    """Where it ends."""
    rate_per_s: Rate
    """Requests/s."""


Phases = Annotated[tuple[Phase, ...], Meta(min_length=1, max_length=10_000)]


@dataclass(frozen=True)
class PoissonTraffic:
    """Poisson arrivals, the rate constant within each phase and 0 after the last."""

    kind: ClassVar[str] = "poisson"
    phases: Phases
    """Stretches of constant rate."""


@dataclass(frozen=True)
class MmppTraffic:
    """Poisson arrivals whose rate switches between two states with exponential dwell times; starts stationary."""

    kind: ClassVar[str] = "mmpp"
    rates_per_s: tuple[Rate, Rate]
    """Requests/s in each state."""
    mean_dwell_s: tuple[Dwell, Dwell]
    """Mean time in each state."""


@dataclass(frozen=True)
class TimesTraffic:
    """Arrivals at given times."""

    kind: ClassVar[str] = "times"
    times_s: Annotated[tuple[float, ...], Meta(max_length=MAX_REQUESTS)]
    """Sorted, within the run."""


@dataclass(frozen=True)
class LognormalSeconds:
    """A time: lognormal, at most `max`."""

    median: Time
    """Median before it is cut, s."""
    sigma: Annotated[float, Meta(ge=0, le=4)]
    """Standard deviation of the logarithm."""
    max: Time
    """Longest time, s."""


@dataclass(frozen=True)
class SessionsTraffic:
    """Sessions: users who send a turn, read the answer, think, and send the next with all that was said before.

    A turn's prompt is the system prompt, all turns and answers of the session so far, and its own tokens; answers have
    the provider's or class's output lengths. A session is of one class. It ends after its last turn, or before one that
    with its answer would not fit into its provider's engine.
    """

    kind: ClassVar[str] = "sessions"
    rate_per_s: Rate | None = None
    """Sessions that begin, Poisson, 1/s; this or `phases`."""
    phases: Phases | None = None
    """The same as a rate that is constant within each phase and 0 after the last."""
    system_tokens: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    """Tokens with which all sessions of this provider begin."""
    turns: Lognormal = TURNS
    """Turns of a session."""
    turn: Lognormal = TURN
    """Tokens that the user adds in a turn."""
    think_s: LognormalSeconds = LognormalSeconds(20.0, 1.0, 600.0)
    """Time between an answer and the next turn."""


@dataclass(frozen=True)
class TraceTraffic:
    """A replayed trace, which also gives the lengths; each of its requests comes at most once.

    The trace is cyclic: a window that reaches its end goes on at its beginning. `envs.trace` has the formats. Of a
    session trace, sessions that begin within the window come, and then each turn `think_s` after the answer before; if
    the recording does not say when sessions began, all come and begin at random times of the run.
    """

    kind: ClassVar[str] = "trace"
    file: Path
    """CSV, compressed or not, or compact form; a file gives it as a name, looked up beside it, then among the packaged
    data."""
    start_s: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    """Time of the trace at which the run begins."""
    rate_scale: Share = 1.0
    """Share of the requests, prefix trees or sessions that is kept, at random."""
    length_scale: Scale = 1.0
    """Factor on all lengths."""


Traffic = PoissonTraffic | MmppTraffic | TimesTraffic | SessionsTraffic | TraceTraffic


@dataclass(frozen=True)
class Misreport:
    """A lie: advertised load and speed, and promised times, are the true ones times these factors.

    What load and speed would be true is also what is promised.
    """

    load: Annotated[float, Meta(ge=0, le=100)] = 1.0
    """Factor on the load that it advertises."""
    speed: Annotated[float, Meta(gt=0, le=100)] = 1.0
    """Factor on the speed that it advertises."""
    promise: Annotated[float, Meta(gt=0, le=100)] = 1.0
    """Factor on the times that it promises."""
    from_s: float = 0.0
    """When the lie begins."""
    until_s: float = math.inf
    """When it ends; at the end of arrivals, it lasts through the drain."""


@dataclass(frozen=True)
class PrefixCache:
    """Engines keep the KV cache of finished requests, for prompts that begin alike."""

    block_tokens: Annotated[int, Meta(ge=16, le=MAX_CACHE_BLOCK_TOKENS, multiple_of=16)] = 16
    """Tokens of a block, of which only whole ones are found again; a multiple of 16 up to `MAX_CACHE_BLOCK_TOKENS`."""


@dataclass(frozen=True)
class Provider:
    """One provider: an engine and its own users."""

    name: Text
    """Unique."""
    gpu: Annotated[str, OneOf(tuple(hardware.GPUS))] = "rtx-4090"
    """Its GPUs; `wwwserve hardware` prints the catalogue."""
    model: Annotated[str, OneOf(tuple(hardware.MODELS))] = "qwen3-8b"
    """What they run."""
    quantization: Annotated[str, OneOf(tuple(hardware.QUANTIZATIONS))] = "bf16"
    """Of the weights."""
    attention: Annotated[str, OneOf(tuple(hardware.ATTENTIONS))] = "flashinfer"
    """Kernels of attention."""
    max_num_seqs: Annotated[int, Meta(ge=1, le=MAX_SLOTS)] = 64
    """Requests that the engine runs at once."""
    serves: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=32)] = ()
    """Names that a request may have, the first being that of its own users' requests; default: the model's name."""
    lengths: Lengths = Lengths()
    """Tokens of its own users' requests."""
    traffic: Traffic | None = None
    """Requests of its own users; none: it has no users."""
    online_s: Annotated[tuple[tuple[float, float], ...], Meta(min_length=1, max_length=MAX_WINDOWS)] = (
        (0.0, math.inf),
    )
    """Windows `[from, until]` in which it takes part. One that reaches the end of arrivals lasts through the drain."""
    misreport: Misreport | None = None
    """A lie that it tells."""
    strength: Annotated[float, Meta(ge=-20, le=20)] | None = None
    """Log-strength in duels, in place of its model's and quantization's."""
    initial_credit: Credits | None = None
    """Its free credit at the start, in place of the economy's."""
    initial_stake: Credits | None = None
    """Its staked credit at the start, in place of the economy's."""

    def __post_init__(self) -> None:
        if not self.serves:
            object.__setattr__(self, "serves", (self.model,))


@dataclass(frozen=True)
class Scenario:
    """A market to simulate or to run live."""

    name: Text
    """Of the scenario, in results."""
    providers: Annotated[tuple[Provider, ...], Meta(min_length=1, max_length=4096)]
    """Who takes part."""
    duration_s: Time = 600.0
    """Arrivals stop here."""
    drain_s: Rate = 1800.0
    """Then the market runs until all requests end, at most this long."""
    decision_interval_s: Annotated[float, Meta(gt=0, le=5)] = 1.0
    """Time between ticks, at which what is held is decided on again."""
    gossip_interval_s: Annotated[float, Meta(gt=0, le=3600)] = 3.0
    """Time between the adverts of a provider."""
    rtt_ms: Annotated[float, Meta(ge=0, le=60_000)] = 50.0
    """Round trip between any two providers."""
    slo: Slo = Slo()
    """What counts as served in time."""
    economy: Economy = Economy()
    """Credits, stake and duels."""
    prefix_cache: PrefixCache | None = PrefixCache()
    """What engines keep of finished requests; `null`: nothing."""

    def at_load(self, factor: float) -> "Scenario":
        """The same with `factor`, above 0, times as many requests or sessions.

        Raises ScenarioError where a trace has not so many, and for arrivals at given times.
        """
        if factor == 1.0:
            return self
        providers = [
            replace(
                each, traffic=_at_load(each.traffic, factor, At(self.name, f"providers[{i}].traffic", each.traffic))
            )
            for i, each in enumerate(self.providers)
        ]
        return replace(self, providers=tuple(providers))

    def longer(self, factor: float) -> "Scenario":
        """The same with arrivals for `factor`, at least 1, times as long: the last phase of each traffic goes on.

        Raises ScenarioError for traces and arrivals at given times.
        """
        if factor == 1.0:
            return self
        more_s = (factor - 1.0) * self.duration_s
        providers = [
            replace(each, traffic=_longer(each.traffic, more_s, At(self.name, f"providers[{i}].traffic", each.traffic)))
            for i, each in enumerate(self.providers)
        ]
        if self.duration_s + more_s > LONGEST_S:
            At(self.name, "duration_s", self.duration_s + more_s).fail(f"at most {LONGEST_S:g} s")
        longer = replace(self, duration_s=self.duration_s + more_s, providers=tuple(providers))
        _check_providers(At(self.name, "providers", None), longer)
        return longer

    def to_mapping(self) -> dict[str, Any]:
        """The scenario in the format of its file, every key written out: plain data, `parse` gives it back."""
        mapping: dict[str, Any] = _plain(self)
        mapping.setdefault("prefix_cache", None)
        classes = {entry.pop("name"): entry for entry in mapping["slo"].pop("classes")}
        if classes:
            mapping["slo"]["classes"] = classes
        for entry in mapping["providers"]:
            entry["online_s"] = [[start, min(end, self.duration_s)] for start, end in entry["online_s"]]
            if entry.get("misreport", {}).get("until_s") == math.inf:
                del entry["misreport"]["until_s"]
        return mapping


def _at_load(traffic: Traffic | None, factor: float, at: At) -> Traffic | None:
    match traffic:
        case PoissonTraffic(phases):
            return PoissonTraffic(_times(phases, factor))
        case MmppTraffic(rates_per_s=(low, high)):
            return replace(traffic, rates_per_s=(low * factor, high * factor))
        case SessionsTraffic(rate_per_s=None, phases=phases):
            return replace(traffic, phases=_times(phases or (), factor))
        case SessionsTraffic(rate_per_s=rate_per_s):
            return replace(traffic, rate_per_s=(rate_per_s or 0.0) * factor)
        case TraceTraffic(rate_scale=rate_scale) if rate_scale * factor <= 1:
            return replace(traffic, rate_scale=rate_scale * factor)
        case TraceTraffic(rate_scale=rate_scale):
            replace(at, path=f"{at.path}.rate_scale", value=rate_scale).fail(
                f"at most {1 / factor:g} for {factor:g} times the load"
            )
        case TimesTraffic():
            replace(at, path=f"{at.path}.kind", value=traffic.kind).fail(
                f"traffic of which there can be {factor:g} times as much"
            )
    return None


def _longer(traffic: Traffic | None, more_s: float, at: At) -> Traffic | None:
    match traffic:
        case PoissonTraffic(phases) | SessionsTraffic(phases=tuple(phases)):
            *before, last = phases
            return replace(traffic, phases=(*before, replace(last, until_s=last.until_s + more_s)))
        case TraceTraffic() | TimesTraffic():
            replace(at, path=f"{at.path}.kind", value=traffic.kind).fail("traffic that goes on for longer")
    return traffic


def _times(phases: tuple[Phase, ...], factor: float) -> tuple[Phase, ...]:
    return tuple(Phase(each.until_s, each.rate_per_s * factor) for each in phases)


def packaged_names() -> list[str]:
    """Names of the scenarios that come with the package, sorted."""
    return sorted(path.relative_to(SCENARIOS_DIR).with_suffix("").as_posix() for path in SCENARIOS_DIR.rglob("*.yaml"))


def load(name_or_path: str | Path) -> Scenario:
    """Read a packaged scenario by name (`paper/alternating`), else a YAML file. Raises ScenarioError."""
    name = str(name_or_path)
    names = packaged_names()
    path = SCENARIOS_DIR / f"{name}.yaml" if name in names else Path(name_or_path)
    expected = "a packaged scenario or a YAML file" + did_you_mean(name, names)
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
    top = At(source, "", mapping)
    entries = top.entries((*hints_of(Scenario), "defaults"))
    duration_s = scalar(entries["duration_s"], Time) if "duration_s" in entries else Scenario.duration_s
    decoder = _Decoder(duration_s, folder, entries.get("defaults"))
    decoder.check_defaults()
    scenario: Scenario = decoder.record(top, Scenario)
    _check_providers(top.at("providers"), scenario)
    return scenario


class _Decoder:
    """Reads the values of a run of `duration_s`; trace files are looked up in `folder` first."""

    def __init__(self, duration_s: float, folder: Path | None, defaults: At | None) -> None:
        self.duration_s, self.folder, self.defaults = duration_s, folder, defaults
        self._phase_end = Annotated[float, Meta(gt=0, le=duration_s)]
        within = Annotated[float, Meta(ge=0, le=duration_s)]
        window = tuple[within, within]
        self._within: dict[str, Any] = {
            "until_s": within,
            "from_s": within,
            "online_s": Annotated[tuple[window, ...], Meta(min_length=1, max_length=MAX_WINDOWS)],
            "times_s": Annotated[
                tuple[Annotated[float, Meta(ge=0, lt=duration_s)], ...], Meta(max_length=MAX_REQUESTS)
            ],
        }

    def check_defaults(self) -> None:
        """The defaults of providers, whether or not a provider takes them."""
        if self.defaults is not None:
            hints = {key: hint for key, hint in hints_of(Provider).items() if key != "name"}
            for key, entry in self.defaults.entries(hints).items():
                self._field(Provider, key, entry)

    def record(self, at: At, kind: type, **known: Any) -> Any:
        """A dataclass from the mapping of its fields, but for those that are `known`."""
        hints = {key: hint for key, hint in hints_of(kind).items() if key not in known}
        if kind is Scenario:
            hints["defaults"] = None
        elif kind is Provider:
            at = replace(at, below=self.defaults)
        entries = at.entries(hints)
        for each in fields(kind):
            if each.name in hints and each.name not in entries and each.default is MISSING:
                at.at(each.name).fail("a value for this key")
        values = {key: self._field(kind, key, entry) for key, entry in entries.items() if key != "defaults"}
        if kind is Misreport and values.get("until_s", math.inf) <= values.get("from_s", 0.0):
            entries["until_s"].fail(f"more than from_s, {values.get('from_s', 0.0):g}")
        if kind is Misreport and "until_s" in values:
            values["until_s"] = self._through_drain(values["until_s"])
        return kind(**known, **values)

    def _field(self, kind: type, key: str, at: At) -> Any:
        if key == "classes":
            return self._classes(at)
        if key == "file":
            return self._trace(at)
        hint = self._phase_end if kind is Phase and key == "until_s" else self._within.get(key, hints_of(kind)[key])
        value = self._decode(at, hint)
        if key == "thresholds_s":
            check_increasing(at.items(1, len(value)), value)
        elif key == "phases" and value is not None:
            check_increasing([item.at("until_s") for item in at.items(1, len(value))], [x.until_s for x in value])
        elif key == "online_s":
            ends = [end for item in at.items(1, len(value)) for end in item.items(2, 2)]
            check_increasing(ends, [end for window in value for end in window])
            value = tuple((start, self._through_drain(end)) for start, end in value)
        elif key == "serves":
            for k, item in enumerate(at.items(1, len(value))):
                if item.value in value[:k]:
                    item.fail("a name that is not in the list already")
        elif key == "times_s":
            value = tuple(sorted(value))
        return value

    def _decode(self, at: At, hint: Any) -> Any:
        base, meta, _ = split(hint)
        options = [each for each in get_args(base) if each is not NoneType]
        if isinstance(base, UnionType) or get_origin(base) is Union:
            if at.value is None:
                return None
            return self._decode(at, options[0]) if len(options) == 1 else self._traffic(at)
        if get_origin(base) is tuple:
            length = None if options[-1] is Ellipsis else len(options)
            least, most = (meta.min_length or 0, meta.max_length or 0) if length is None else (length, length)
            items = at.items(least, most)
            return tuple(self._decode(item, options[k if length else 0]) for k, item in enumerate(items))
        return self.record(at, base) if isinstance(base, type) and is_dataclass(base) else scalar(at, hint)

    def _classes(self, at: At) -> tuple[SloClass, ...]:
        entries = at.entries()
        if not 1 <= len(entries) <= MAX_CLASSES:
            at.fail(f"1 to {MAX_CLASSES} classes")
        for key, entry in entries.items():
            scalar(replace(entry, value=key), Text)
        classes = tuple(self.record(entry, SloClass, name=key) for key, entry in entries.items())
        total = sum(each.share for each in classes)
        if abs(total - 1) > 1e-6:
            at.fail(f"shares that sum to 1, not to {total:g}")
        return classes

    def _traffic(self, at: At) -> Traffic:
        at = replace(at, below=None)  # a provider's traffic replaces the default one
        entries = at.entries()
        kinds = {kind.kind: kind for kind in get_args(Traffic)}
        kind = kinds[scalar(entries.get("kind", at.at("kind")), Annotated[str, OneOf(tuple(kinds))])]
        rest = {key: value for key, value in at.value.items() if key != "kind"}
        traffic: Traffic = self.record(replace(at, value=rest), kind)
        if isinstance(traffic, SessionsTraffic) and (traffic.rate_per_s is None) == (traffic.phases is None):
            at.at("rate_per_s").fail("either this key or phases")
        if isinstance(traffic, TraceTraffic) and traffic.start_s > 0:
            period_s = trace.read(traffic.file).period_s
            if period_s == 0:
                at.at("start_s").fail("0, as the trace does not say when its sessions began")
            if traffic.start_s >= period_s:
                at.at("start_s").fail(f"a time within the trace, [0, {period_s:g})")
        return traffic

    def _trace(self, at: At) -> Path:
        if not isinstance(at.value, str) or not at.value:
            at.fail("the name of a trace file")
        try:
            path = trace.find(at.value, self.folder)
            if path is None:
                at.fail("a trace file beside the scenario or among the packaged data")
            trace.read(path)
        except ScenarioError:
            raise
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            at.fail(f"a trace file that can be read ({reason})")
        return path

    def _through_drain(self, end_s: float) -> float:
        """What lasts until the end of arrivals lasts through the drain."""
        return math.inf if end_s == self.duration_s else end_s


def _check_providers(at: At, scenario: Scenario) -> None:
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
            return _expected(phases)
        case SessionsTraffic(rate_per_s, None, turns=turns):
            return (rate_per_s or 0.0) * duration_s * turns.mean
        case SessionsTraffic(_, phases, turns=turns):
            return _expected(phases or ()) * turns.mean
        case MmppTraffic(rates_per_s, _):
            return max(rates_per_s) * duration_s
        case TimesTraffic(times_s):
            return len(times_s)
        case TraceTraffic(file):
            return len(trace.read(file).time_s)
        case _:
            return 0.0


def _expected(phases: tuple[Phase, ...]) -> float:
    """Arrivals that are expected in these phases."""
    starts = (0.0, *(phase.until_s for phase in phases))
    return sum(phase.rate_per_s * (phase.until_s - start) for phase, start in zip(phases, starts, strict=False))


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
