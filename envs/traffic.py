"""Arrivals: when whose user sends a request of what length, and what it shares with others. The same scenario and seed
give the same bytes."""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.hardware import BLOCK_TOKENS
from wwwserve.envs import trace
from wwwserve.envs.scenario import (
    Lognormal,
    LognormalSeconds,
    MmppTraffic,
    Phase,
    PoissonTraffic,
    Provider,
    Scenario,
    SessionsTraffic,
    SloClass,
    TimesTraffic,
    TraceTraffic,
)
from wwwserve.envs.tree import Tree as Tree
from wwwserve.envs.tree import apart, no_tree, of_prefixes, of_sessions

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]

FITTED_SESSIONS = 256
"""Sessions drawn to see how long prompts are."""


class Arrivals(NamedTuple):
    """Requests of all providers' own users, each array of shape (n,).

    Those that come at a time of their own are first, in order of time; then those that follow another's answer, each
    after the one that it follows.
    """

    time_s: FloatArray
    """In [0, duration_s); infinite for a request that follows another."""
    provider: IntArray
    """Index into `scenario.providers`."""
    prompt: IntArray
    """Prompt tokens, at least 1."""
    output: IntArray
    """Tokens that will be generated, at least 1."""
    klass: IntArray
    """Index into `scenario.slo.classes`; 0 if there are none."""
    follows: IntArray
    """The request whose answer it follows; -1 if it comes at a time of its own. At most one follows each."""
    think_s: FloatArray
    """Time between that answer and it; 0 if it follows none."""
    leaf: IntArray
    """The node of `tree` at which its path ends."""
    turn: IntArray
    """Its place in its session, from 1; 1 if it belongs to none."""
    tree: Tree
    """What requests share; nothing with those of another provider's users."""


def arrivals(scenario: Scenario, seed: int, longest: NDArray[np.integer]) -> Arrivals:
    """Draw the arrivals of a run; `seed` is a non-negative integer.

    `longest` [providers] has the most tokens, prompt and answer, that each provider's engine can hold of a request:
    its users' sessions end before a turn of more, and the requests of a trace of prefix blocks are cut to it. Other
    requests keep their lengths.

    Each provider has a generator of its own, from the seed and its index: changing the traffic of one leaves the
    requests of the others as they are. What would come while a provider is offline does not come, and neither does a
    session that would begin then.
    """
    children = np.random.SeedSequence(seed).spawn(len(scenario.providers))
    parts = [
        _of_provider(scenario, index, int(longest[index]), np.random.default_rng(child))
        for index, child in enumerate(children)
        if scenario.providers[index].traffic is not None
    ]
    if not parts:
        none = np.zeros(0, np.int32)
        return Arrivals(np.zeros(0), none, none, none, none, none, np.zeros(0), none, none, no_tree())
    return _merged(parts)


def expected_prompt(provider: Provider, longest: int) -> Lognormal:
    """Distribution of prompt tokens that an origin expects of its own users; `longest` is that of `arrivals`.

    Of a trace or of sessions a lognormal fitted to it: of sessions, to turns drawn with the provider's output lengths.
    """
    match provider.traffic:
        case TraceTraffic(file=file, length_scale=length_scale):
            return _fit_prompts(file, length_scale, longest)
        case SessionsTraffic(system_tokens=system_tokens, turns=turns, turn=turn):
            return _fit_sessions(system_tokens, turns, turn, provider.lengths.output, longest)
        case _:
            return provider.lengths.prompt


def expected_output(provider: Provider, slo_class: SloClass | None) -> Lognormal:
    """Distribution of output tokens that an origin expects of its own users' requests of this class.

    The class's own where it has one, else the provider's; of a trace, for every class, a lognormal fitted to it.
    """
    if isinstance(provider.traffic, TraceTraffic):
        return _fit_outputs(provider.traffic.file, provider.traffic.length_scale)
    if slo_class is not None and slo_class.output is not None:
        return slo_class.output
    return provider.lengths.output


class _Turns(NamedTuple):
    """Turns of sessions, each array of shape (n,): session after session, in each one agent's after another's."""

    session: NDArray[Any]
    turn: NDArray[Any]  # from 1
    time_s: FloatArray  # when the first one of an agent comes, infinite for the others
    prompt: NDArray[Any]
    output: NDArray[Any]
    klass: NDArray[Any]
    shared: NDArray[Any]  # tokens of the prompt that the session had before
    think_s: FloatArray


def _of_provider(scenario: Scenario, index: int, longest: int, rng: np.random.Generator) -> Arrivals:
    provider = scenario.providers[index]
    traffic = provider.traffic
    if isinstance(traffic, SessionsTraffic):
        turns, system_tokens = _drawn_sessions(scenario, provider, traffic, rng), traffic.system_tokens
    elif isinstance(traffic, TraceTraffic) and trace.read(traffic.file).sessions is not None:
        turns, system_tokens = _recorded_sessions(scenario, traffic, rng), 0
    else:
        return _single_requests(scenario, index, longest, rng)
    return _closed_loop(scenario, index, longest, turns, system_tokens)


def _single_requests(scenario: Scenario, index: int, longest: int, rng: np.random.Generator) -> Arrivals:
    """Requests that come at a time of their own."""
    provider, duration_s = scenario.providers[index], scenario.duration_s
    traffic = provider.traffic
    prompt = output = prefixes = None
    rows = np.zeros(0, np.int64)
    match traffic:
        case PoissonTraffic(phases):
            time_s = _poisson(*_rates(phases), rng)
        case MmppTraffic():
            time_s = _poisson(*_mmpp_phases(traffic, duration_s, rng), rng)
        case TimesTraffic(times_s):
            time_s = np.array(times_s)
        case _:
            assert isinstance(traffic, TraceTraffic)
            recorded = trace.read(traffic.file)
            prefixes = recorded.prefixes
            first = int(np.searchsorted(recorded.time_s, traffic.start_s))
            order = np.roll(np.arange(len(recorded.time_s)), -first)
            times = (recorded.time_s[order] - traffic.start_s) % recorded.period_s
            if prefixes is None:
                chosen = rng.random(len(times)) < traffic.rate_scale
            else:
                chosen = (rng.random(int(prefixes.tree.max()) + 1) < traffic.rate_scale)[prefixes.tree[order]]
            kept = (times < duration_s) & chosen
            time_s, rows = times[kept], order[kept]
            prompt = _scaled(recorded.prompt[rows], traffic.length_scale)
            output = _scaled(recorded.output[rows], traffic.length_scale)

    klass = _classes(scenario, len(time_s), rng)
    if prompt is None or output is None:
        prompt = _lengths((provider.lengths.prompt,), np.zeros(len(time_s), np.int32), rng)
        output = _outputs(scenario, provider, klass, rng)
    if not (online := _online(provider, time_s)).all():
        time_s, prompt, output, klass = time_s[online], prompt[online], output[online], klass[online]
        rows = rows[online] if prefixes is not None else rows
    if prefixes is not None:
        assert isinstance(traffic, TraceTraffic)
        prompt = np.minimum(prompt, longest - 1)
        output = np.minimum(output, longest - prompt)
        tree, leaf = _prefix_tree(prefixes, rows, prompt, output, traffic.length_scale, _granularity(scenario))
    else:
        tree, leaf = apart((prompt + output) // BLOCK_TOKENS), np.arange(len(prompt), dtype=np.int32)
    return _arrivals(index, time_s, prompt, output, klass, leaf, tree)


def _arrivals(
    index: int, time_s: FloatArray, prompt: IntArray, output: IntArray, klass: IntArray, leaf: IntArray, tree: Tree
) -> Arrivals:
    """Of requests that follow none."""
    count = len(time_s)
    provider, follows = np.full(count, index, np.int32), np.full(count, -1, np.int32)
    return Arrivals(
        time_s, provider, prompt, output, klass, follows, np.zeros(count), leaf, np.ones(count, np.int32), tree
    )


def _merged(parts: list[Arrivals]) -> Arrivals:
    """The requests of several providers in one order, their trees beside each other."""
    requests = np.cumsum([0, *(len(part.time_s) for part in parts)])
    nodes = np.cumsum([0, *(len(part.tree.parent) for part in parts)])
    parts = [
        part._replace(
            follows=_moved(part.follows, first),
            leaf=_moved(part.leaf, node),
            tree=part.tree._replace(parent=_moved(part.tree.parent, node)),
        )
        for part, first, node in zip(parts, requests.tolist(), nodes.tolist(), strict=False)
    ]
    tree = Tree(*(np.concatenate(column) for column in zip(*(part.tree for part in parts), strict=True)))
    columns: list[Any] = [np.concatenate(column) for column in zip(*(part[:-1] for part in parts), strict=True)]
    order = np.argsort(columns[0], kind="stable")
    place = np.empty(len(order) + 1, np.int32)  # of each request in that order, and of none
    place[order], place[-1] = np.arange(len(order)), -1
    merged = Arrivals(*([column[order] for column in columns] + [tree]))
    return merged._replace(follows=place[merged.follows])


def _moved(numbers: IntArray, by: int) -> IntArray:
    """Numbers from 0 on moved by `by`, -1 left as it is."""
    return np.where(numbers < 0, numbers, numbers + by).astype(np.int32)


def _granularity(scenario: Scenario) -> int:
    """Blocks of the tree in one of the engines': requests part at multiples of it."""
    return 1 if scenario.prefix_cache is None else scenario.prefix_cache.block_tokens // BLOCK_TOKENS


def _prefix_tree(
    prefixes: trace.Prefixes, rows: NDArray[Any], prompt: IntArray, output: IntArray, length_scale: float, times: int
) -> tuple[Tree, IntArray]:
    """The tree of the trace's requests `rows` with lengths as given, cut to the nodes that they have."""
    node = prefixes.node[rows]
    needed = np.zeros(len(prefixes.parent) + 1, bool)
    front = np.unique(node)
    while len(front := front[~needed[front]]):  # the last entry stands for none
        needed[front] = True
        front = np.unique(np.append(prefixes.parent, -1)[front])
    needed = needed[:-1]
    number = np.append(np.cumsum(needed) - 1, -1)  # of a node among those that are needed
    end = (prefixes.end_tokens[needed] * length_scale).astype(np.int64) // BLOCK_TOKENS // times * times
    parent = number[prefixes.parent[needed]]
    start = np.append(end, 0)[parent]
    known = Tree(parent.astype(np.int32), start.astype(np.int32), (end - start).astype(np.int32))
    node = number[node]
    shared = np.minimum(np.append(end, 0)[node], prompt // BLOCK_TOKENS // times * times)
    path = (prompt + output) // BLOCK_TOKENS
    return of_prefixes(known, node.astype(np.int32), shared.astype(np.int32), path.astype(np.int32))


def _drawn_sessions(
    scenario: Scenario, provider: Provider, traffic: SessionsTraffic, rng: np.random.Generator
) -> _Turns:
    if traffic.phases is None:
        start_s = _poisson(np.array([0.0, scenario.duration_s]), np.array([traffic.rate_per_s or 0.0]), rng)
    else:
        start_s = _poisson(*_rates(traffic.phases), rng)
    klass = _classes(scenario, len(start_s), rng)
    turns = _lengths((traffic.turns,), np.zeros(len(start_s), np.int32), rng)
    session = np.repeat(np.arange(len(start_s)), turns)
    first = np.repeat(np.cumsum(turns) - turns, turns)
    turn = np.arange(len(session)) - first + 1
    own = _lengths((traffic.turn,), np.zeros(len(session), np.int32), rng)
    output = _outputs(scenario, provider, klass[session], rng)
    prompt, shared = _contexts(traffic.system_tokens, own, output, first)
    think_s = _seconds(traffic.think_s, len(session), rng)
    time_s = np.where(turn == 1, start_s[session], np.inf)
    return _Turns(session, turn, time_s, prompt, output, klass[session], shared, think_s)


def _contexts(
    system_tokens: int, own: IntArray, output: IntArray, first: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompt tokens of turns, and how many of them the session had before, from the `own` tokens of each turn."""
    added = np.concatenate(([0], np.cumsum(own.astype(np.int64) + output)))
    shared = system_tokens + added[:-1] - added[first]
    return shared + own, shared


def _recorded_sessions(scenario: Scenario, traffic: TraceTraffic, rng: np.random.Generator) -> _Turns:
    """Sessions of a trace.

    Each agent of a session, the main one and those that it starts, has a closed loop of its own, which begins as long
    after the session does as recorded; all have one tree, and go or stay together when the trace is thinned. Where the
    recording does not say when sessions began, they begin at random times of the run.
    """
    recorded = trace.read(traffic.file)
    sessions = recorded.sessions
    assert sessions is not None
    count = int(sessions.session.max()) + 1
    kept = rng.random(count) < traffic.rate_scale
    recorded_s = np.full(count, np.inf)
    np.minimum.at(recorded_s, sessions.session, recorded.time_s)
    if recorded.period_s > 0:
        start_s = (recorded_s - traffic.start_s) % recorded.period_s
    else:
        start_s = rng.random(count) * scenario.duration_s
    klass = _classes(scenario, count, rng)
    rows = (kept & (start_s < scenario.duration_s))[sessions.session]
    session = sessions.session[rows]
    return _Turns(
        session=session,
        turn=sessions.turn[rows],
        time_s=recorded.time_s[rows] + (start_s - recorded_s)[session],
        prompt=_scaled(recorded.prompt[rows], traffic.length_scale),
        output=_scaled(recorded.output[rows], traffic.length_scale),
        klass=klass[session],
        shared=(sessions.shared[rows] * traffic.length_scale).astype(np.int64),
        think_s=sessions.think_s[rows],
    )


def _closed_loop(scenario: Scenario, index: int, longest: int, turns: _Turns, system_tokens: int) -> Arrivals:
    """Turns as requests, without those that cannot come: after the run, or from a context too long for the engine."""
    opening = np.maximum.accumulate(np.where(turns.turn == 1, np.arange(len(turns.turn)), 0))  # its agent's first turn
    thought_s = np.cumsum(np.where(turns.turn == 1, 0.0, turns.think_s))
    soonest_s = turns.time_s[opening] + (thought_s - thought_s[opening])
    out = (soonest_s >= scenario.duration_s) | (turns.prompt.astype(np.int64) + turns.output > longest)
    out |= ~_online(scenario.providers[index], turns.time_s[opening])
    ended = np.cumsum(out)
    turns = _Turns(*(column[ended == ended[opening] - out[opening]] for column in turns))

    count, numbers = len(turns.turn), np.arange(len(turns.turn))
    later = turns.turn > 1
    first = np.maximum.accumulate(np.where(np.diff(turns.session, prepend=-1) != 0, numbers, 0))
    times = _granularity(scenario)
    shared = np.minimum(turns.shared, turns.prompt) // BLOCK_TOKENS // times * times
    tree, leaf = of_sessions(
        shared.astype(np.int32),
        ((turns.prompt + turns.output) // BLOCK_TOKENS).astype(np.int32),
        first.astype(np.int32),
        system_tokens // BLOCK_TOKENS // times * times,
    )
    return Arrivals(
        time_s=np.where(later, np.inf, turns.time_s),
        provider=np.full(count, index, np.int32),
        prompt=turns.prompt.astype(np.int32),
        output=turns.output.astype(np.int32),
        klass=turns.klass.astype(np.int32),
        follows=np.where(later, numbers - 1, -1).astype(np.int32),
        think_s=np.where(later, turns.think_s, 0.0),
        leaf=leaf,
        turn=turns.turn.astype(np.int32),
        tree=tree,
    )


def _classes(scenario: Scenario, count: int, rng: np.random.Generator) -> IntArray:
    """A class for each of `count` requests or sessions."""
    classes = scenario.slo.classes
    if len(classes) < 2:
        return np.zeros(count, np.int32)
    bounds = np.cumsum([each.share for each in classes])[:-1]
    return np.searchsorted(bounds, rng.random(count), side="right").astype(np.int32)


def _outputs(scenario: Scenario, provider: Provider, klass: IntArray, rng: np.random.Generator) -> IntArray:
    """Output tokens for each entry of `klass`."""
    return _lengths(tuple(expected_output(provider, each) for each in scenario.slo.classes or (None,)), klass, rng)


def _online(provider: Provider, time_s: FloatArray) -> NDArray[np.bool_]:
    """Whether the provider takes part at each of these times."""
    online = np.zeros(len(time_s), bool)
    for start, end in provider.online_s:
        online |= (time_s >= start) & (time_s < end)
    return online


def _rates(phases: tuple[Phase, ...]) -> tuple[FloatArray, FloatArray]:
    """Bounds of the phases and the rate in each."""
    ends = np.array([phase.until_s for phase in phases])
    return np.concatenate(([0.0], ends)), np.array([phase.rate_per_s for phase in phases])


def _poisson(bounds_s: FloatArray, rates_per_s: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Sorted arrival times of a Poisson process with rate `rates_per_s[i]` from `bounds_s[i]` to `bounds_s[i + 1]`."""
    lengths_s = np.diff(bounds_s)
    counts = rng.poisson(rates_per_s * lengths_s)
    uniform = rng.random(int(counts.sum()))
    time_s = np.repeat(bounds_s[:-1], counts) + uniform * np.repeat(lengths_s, counts)
    time_s.sort()
    np.minimum(time_s, np.nextafter(bounds_s[-1], 0.0), out=time_s)
    return time_s


def _mmpp_phases(traffic: MmppTraffic, duration_s: float, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Bounds and rates of the states that a two-state MMPP goes through, from a stationary start to `duration_s`."""
    dwell_s, rates = np.array(traffic.mean_dwell_s), np.array(traffic.rates_per_s)
    start = int(rng.random() >= dwell_s[0] / dwell_s.sum())
    chunk = 2 * (8 + math.ceil(2 * duration_s / dwell_s.sum()))
    states = (start + np.arange(chunk)) % 2
    ends = np.zeros(0)
    last = 0.0
    while last < duration_s:
        ends = np.concatenate((ends, last + np.cumsum(rng.exponential(dwell_s[states]))))
        last = float(ends[-1])
    ends = ends[: int(np.searchsorted(ends, duration_s)) + 1]
    ends[-1] = duration_s
    return np.concatenate(([0.0], ends)), rates[(start + np.arange(len(ends))) % 2]


def _lengths(distributions: tuple[Lognormal, ...], which: IntArray, rng: np.random.Generator) -> IntArray:
    """A token count for each entry of `which`, drawn from the distribution that it points to."""
    z = rng.standard_normal(len(which))
    table = np.array([(math.log(each.median), each.sigma, each.max) for each in distributions])
    log_median, sigma, longest = table[which].T
    tokens: FloatArray = np.clip(np.rint(np.exp(log_median + sigma * z)), 1, longest)
    return tokens.astype(np.int32)


def _seconds(distribution: LognormalSeconds, count: int, rng: np.random.Generator) -> FloatArray:
    """Times drawn from a distribution."""
    drawn: FloatArray = np.exp(math.log(distribution.median) + distribution.sigma * rng.standard_normal(count))
    return np.minimum(drawn, distribution.max)


def _scaled(tokens: IntArray, scale: float) -> IntArray:
    """Token counts times `scale`, at least 1."""
    scaled: FloatArray = np.clip(np.rint(tokens * scale), 1, np.iinfo(np.int32).max)
    return scaled.astype(np.int32)


@lru_cache(maxsize=64)
def _fit_prompts(file: Path, length_scale: float, longest: int) -> Lognormal:
    """To the prompts of a trace, of sessions those that fit into `longest` tokens."""
    recorded = trace.read(file)
    prompt, output = (_scaled(tokens, length_scale) for tokens in (recorded.prompt, recorded.output))
    if recorded.sessions is not None:
        fits = prompt.astype(np.int64) + output <= longest
        prompt = prompt[fits] if fits.any() else np.array([longest])
    elif recorded.prefixes is not None:
        prompt = np.minimum(prompt, longest - 1)
    return _fit(prompt)


@lru_cache(maxsize=64)
def _fit_outputs(file: Path, length_scale: float) -> Lognormal:
    return _fit(_scaled(trace.read(file).output, length_scale))


@lru_cache(maxsize=256)
def _fit_sessions(system_tokens: int, turns: Lognormal, turn: Lognormal, output: Lognormal, longest: int) -> Lognormal:
    """To the prompts of sessions drawn from a fixed seed, of those turns that fit into `longest` tokens."""
    rng = np.random.default_rng(0)
    counts = _lengths((turns,), np.zeros(FITTED_SESSIONS, np.int32), rng)
    own, answers = (_lengths((each,), np.zeros(int(counts.sum()), np.int32), rng) for each in (turn, output))
    prompt, _ = _contexts(system_tokens, own, answers, np.repeat(np.cumsum(counts) - counts, counts))
    fits = prompt + answers <= longest
    return _fit(prompt[fits] if fits.any() else np.array([longest]))


def _fit(tokens: NDArray[Any]) -> Lognormal:
    """The lognormal with the mean and deviation of the tokens' logarithms, clipped at their maximum."""
    logs = np.log(tokens)
    return Lognormal(float(np.exp(logs.mean())), float(logs.std()), int(tokens.max()))
