"""Random markets to train on: 3 to 12 providers with mixed hardware, models and load, and what can go wrong with them.

Evaluation scenarios are the packaged files; none of them is drawn here.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.hardware import Profile, iteration_s, profile
from wwwserve.agents.lengths import Lognormal
from wwwserve.envs.scenario import Lengths, LognormalSeconds, Provider, Scenario, SessionsTraffic, parse
from wwwserve.envs.traffic import arrivals, expected_prompt

Kind = Literal[
    "honest",
    "lying",
    "switching",
    "deadlines",
    "conversation",
    "alike",
    "hardware",
    "bursts",
    "code",
    "thin",
    "uneven",
    "thick",
    "sessions",
    "agents",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

FAMILY = "qwen3"
"""The name that all users request and all providers serve."""
CHAT_SHARE = 0.7
_PROMPT = Lognormal(150.0, 0.5, 2048)
_OUTPUT = Lognormal(4000.0, 0.75, 8192)  # thresholds of 200 to 400 s belong to these lengths
_CHAT_OUTPUT, _CHAT_THRESHOLDS_S = 200.0, (5.0, 10.0, 15.0, 20.0, 30.0)  # mean, and the thresholds that belong to it
_GPU_WEIGHTS = {
    "rtx-4090": 0.25, "rtx-3090": 0.25, "rtx-6000-ada": 0.2, "a100-80g": 0.15, "a40": 0.1, "h100": 0.05
}  # fmt: skip
_MODEL_WEIGHTS = {"qwen3-8b": 0.6, "qwen3-4b": 0.25, "qwen3-14b": 0.15}


def capacity_per_s(
    engine: Profile, prompt: Lognormal, outputs: Sequence[tuple[float, Lognormal]], cached: float = 0.0
) -> float:
    """Requests/s that an engine sustains: concurrency / (E[output] * iteration time). `outputs` has (share, lengths).

    Concurrency c is `max_num_seqs`, or as many as the KV cache holds at the mean context of a running request, which
    is E[prompt] + E[output^2] / (2 E[output]). An iteration at c decodes c tokens and prefills
    c * E[prompt] / E[output], the prompts of those that take the place of the finished, less the share of their tokens
    that is `cached`, [0, 1).
    """
    output_tokens = sum(share * each.mean for share, each in outputs)
    context = prompt.mean + sum(share * each.moment(2) for share, each in outputs) / (2 * output_tokens)
    concurrency = min(engine.max_num_seqs, engine.kv_tokens / context)
    prefill = concurrency * (1.0 - cached) * prompt.mean / output_tokens
    return float(concurrency / (output_tokens * iteration_s(engine.row(), concurrency, concurrency * context, prefill)))


def kind_of(scenario: Scenario) -> Kind:
    """The kind of a random market by what it came out as.

    An honest one of nodes that are all the same, or serve one model, is of the kind that has these alone.
    """
    kind: Kind = scenario.name  # type: ignore[assignment]
    if kind != "honest" or len({provider.model for provider in scenario.providers}) > 1:
        return kind
    return "hardware" if len({provider.gpu for provider in scenario.providers}) > 1 else "alike"


def sample(kind: Kind, rng: np.random.Generator, duration_s: float = 600.0) -> Scenario:
    """Draw a market.

    honest: load 0.6 to 1.1 of capacity. lying: the same, and up to a third of the providers, mostly slow ones,
    advertise less load and more speed than they have. switching: they do so for a part of the run only. deadlines: load
    0.7 to 1.3, chat and batch requests. conversation: honest, with short requests, many, and
    tight thresholds, in a sixth of the time. alike: honest, all nodes the same, load 0.6 to 1.4. hardware: honest, one
    model, any GPU. bursts: load 0.6 to 1.4, most requests in a few bursts at given times, which providers have together
    or each for itself; nodes are alike in half the markets. code: long prompts, answers of tens of tokens, thresholds
    that fit, in a sixth of the time. thin: 3 to 5 providers, one of whom has most of the spare capacity. uneven: some
    providers have 1.3 to 1.6 times the demand that they can serve, others 0.1 to 0.4. thick: 9 to 12 providers.
    sessions: chats, in some markets beside providers with single requests, load 0.6 to 1.2; in a third of the
    time, or a tenth where requests are many. agents: the same with long contexts, many turns and seconds between them.
    In the other kinds, nodes are alike in a fifth of the markets and serve one model in another. Load is uneven between
    providers, steady, alternating or bursty in time, and providers may leave or join.
    Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind in ("sessions", "agents"):
        return _with_sessions(kind, rng, duration_s)
    workload = rng.random()
    lengths = Lengths(_PROMPT, _OUTPUT if workload < 0.5 else _random_output(rng))
    thresholds_s, usual = (200.0, 250.0, 300.0, 350.0, 400.0), _OUTPUT.mean
    mapping: dict[str, Any] = {"name": kind}
    if kind in ("conversation", "code"):
        lengths = _conversation(rng) if kind == "conversation" else _code(rng)
        thresholds_s, usual = _CHAT_THRESHOLDS_S, _CHAT_OUTPUT
        mapping["decision_interval_s"] = float(rng.choice([0.25, 0.5, 1.0]))
        mapping["economy"] = {"initial_credit": 100_000}
        duration_s = duration_s / 6  # which are many requests nevertheless
    mapping["duration_s"] = duration_s
    outputs = [(1.0, lengths.output)]
    if kind == "deadlines":
        chat = Lognormal(float(rng.uniform(100, 400)), 0.6, 1024)
        outputs = [(CHAT_SHARE, chat), (1 - CHAT_SHARE, lengths.output)]
        classes = {
            "chat": {
                "share": CHAT_SHARE,
                "deadline_s": float(rng.uniform(10, 40)),
                "value": float(rng.uniform(1.5, 5)),
                "output": _lognormal(chat),
            },
            "batch": {"share": 1 - CHAT_SHARE, "deadline_s": float(rng.uniform(300, 900)), "value": 1},
        }
    else:
        classes = {}
    count = int(rng.integers(*_COUNTS.get(kind, (3, 9))))
    odds = [0.5, 0.2, 0.3] if kind == "bursts" else [0.2, 0.2, 0.6]
    common = _IN_COMMON.get(kind) or str(rng.choice(["all", "model", "nothing"], p=odds))
    providers = _fleet(count, common, rng)
    capacities = [
        capacity_per_s(profile(each["gpu"], each["model"], each["max_num_seqs"]), lengths.prompt, outputs)
        for each in providers
    ]
    scale = lengths.output.mean / usual
    if kind == "code":  # what takes long is to read the prompts of those that run beside one
        scale = float(rng.uniform(1.0, 3.0)) * _stay_s(providers, lengths, capacities) / _CHAT_THRESHOLDS_S[-1]
    mapping["slo"] = {"thresholds_s": [round(scale * seconds, 2) for seconds in thresholds_s]}
    if classes:
        mapping["slo"]["classes"] = classes
    if kind in ("thin", "uneven"):
        rates = (_thin if kind == "thin" else _uneven)(np.array(capacities), rng)
    else:
        load = rng.uniform(*_LOADS.get(kind, (0.6, 1.1)))
        uneven = rng.uniform(0.3, 1.7, count)
        rates = load * uneven * capacities * (np.sum(capacities) / np.sum(uneven * capacities))
    for i, each in enumerate(providers):
        each["name"] = f"n{i + 1}"
        each["serves"] = [FAMILY, each["model"]]
    if kind == "bursts":
        _add_bursts(providers, rates, duration_s, rng)
    else:
        _add_traffic(providers, rates, duration_s, rng)
    _add_absences(providers, duration_s, rng)
    if kind in ("lying", "switching"):
        _add_lies(providers, capacities, duration_s if kind == "switching" else None, rng)
    mapping["defaults"] = {"lengths": {"prompt": _lognormal(lengths.prompt), "output": _lognormal(lengths.output)}}
    mapping["providers"] = providers
    return parse(mapping, f"<random {kind} market>")


def _with_sessions(kind: Literal["sessions", "agents"], rng: np.random.Generator, duration_s: float) -> Scenario:
    """A market of sessions, for as much of `duration_s` as it takes for some 2000 requests in 600 s."""
    traffic, output = _chat(rng) if kind == "sessions" else _agent(rng)
    single = _conversation(rng).prompt
    mixed = kind == "sessions" and rng.random() < 0.35
    common = str(rng.choice(["all", "model", "nothing"], p=[0.2, 0.4, 0.4]))
    providers = _fleet(int(rng.integers(3, 9)), common, rng)
    capacities, prompts = [], []
    for i, each in enumerate(providers):
        each["lengths"] = {"prompt": _lognormal(single), "output": _lognormal(output)}
        engine = profile(each["gpu"], each["model"], each["max_num_seqs"])
        plain = mixed and i > 0 and rng.random() < 0.5
        each["traffic"] = None if plain else traffic
        prompt = expected_prompt(
            Provider("n", traffic=each["traffic"], lengths=Lengths(single, output)), engine.max_model_len
        )
        cached = 0.0 if plain else max(0.0, 0.9 * (1.0 - traffic.turn.mean / prompt.mean))
        prompts.append(prompt)
        capacities.append(capacity_per_s(engine, prompt, [(1.0, output)], cached))
    usual_s = _stay_s(providers, Lengths(prompts[int(np.argmax(capacities))], output), capacities)
    scale = float(rng.uniform(0.7, 2.0)) * usual_s / _CHAT_THRESHOLDS_S[-1]
    uneven = rng.uniform(0.3, 1.7, len(providers))
    rates = uneven * capacities * (np.sum(capacities) / np.sum(uneven * capacities))
    duration_s *= float(np.clip(2000 / 600 / rates.sum(), 0.1, 1 / 3))
    shape = str(rng.choice(["steady", "alternating", "burst", "mixed"]))
    for i, (each, rate) in enumerate(zip(providers, rates.tolist(), strict=True)):
        each["name"] = f"n{i + 1}"
        each["serves"] = [FAMILY, each["model"]]
        if each["traffic"] is None:
            steady = {"until_s": duration_s, "rate_per_s": rate}
            each["traffic"] = {"kind": "poisson", "phases": [steady]}
            continue
        own = str(rng.choice(["steady", "alternating", "burst"])) if shape == "mixed" else shape
        phases = _session_phases(own, rate / traffic.turns.mean, duration_s, rng)
        keys = asdict(traffic)
        del keys["rate_per_s"]
        each["traffic"] = {"kind": traffic.kind} | keys | {"phases": phases}
    mapping = {
        "name": kind,
        "duration_s": duration_s,
        "decision_interval_s": float(rng.choice([0.25, 0.5, 1.0])),
        "slo": {"thresholds_s": [round(scale * seconds, 2) for seconds in _CHAT_THRESHOLDS_S]},
        "economy": {"initial_credit": 100_000},
        "providers": providers,
    }
    source = f"<random {kind} market>"
    load = _load(parse(mapping, source), traffic.turn.mean, usual_s / 2)
    _add_absences(providers, duration_s, rng)
    return parse(mapping, source).at_load(rng.uniform(0.6, 1.2) / load)


def _between(low: float, high: float, rng: np.random.Generator) -> float:
    """A number drawn with an even logarithm."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _chat(rng: np.random.Generator) -> tuple[SessionsTraffic, Lognormal]:
    """Chats: 2 to 10 turns of 80 to 800 tokens at the median, with or without a system prompt, and their answers."""
    traffic = SessionsTraffic(
        rate_per_s=1.0,
        system_tokens=int(_between(100, 6000, rng)) if rng.random() < 0.7 else 0,
        turns=Lognormal(_between(2, 10, rng), float(rng.uniform(0.4, 1.0)), 40),
        turn=Lognormal(_between(80, 800, rng), float(rng.uniform(0.7, 1.3)), 8000),
        think_s=LognormalSeconds(_between(5, 40, rng), float(rng.uniform(0.7, 1.2)), 120.0),
    )
    return traffic, Lognormal(_between(80, 300, rng), float(rng.uniform(0.5, 0.9)), 1024)


def _agent(rng: np.random.Generator) -> tuple[SessionsTraffic, Lognormal]:
    """Agents: 8 to 30 turns of 150 to 800 tokens at the median, seconds apart, behind a long system prompt."""
    traffic = SessionsTraffic(
        rate_per_s=1.0,
        system_tokens=int(_between(1000, 10_000, rng)),
        turns=Lognormal(_between(8, 30, rng), float(rng.uniform(0.4, 0.8)), 100),
        turn=Lognormal(_between(150, 800, rng), float(rng.uniform(0.8, 1.3)), 8000),
        think_s=LognormalSeconds(_between(1, 10, rng), float(rng.uniform(0.7, 1.2)), 60.0),
    )
    return traffic, Lognormal(_between(60, 250, rng), float(rng.uniform(0.6, 1.0)), 1024)


def _load(scenario: Scenario, turn_tokens: float, answer_s: float) -> float:
    """What comes in a draw of the scenario over what its engines sustain, if an answer takes `answer_s`.

    Of a session's prompts nine tenths of what is not new, all but `turn_tokens`, count as cached.
    """
    engines = [profile(each.gpu, each.model, each.max_num_seqs) for each in scenario.providers]
    drawn = arrivals(scenario, 0, np.array([engine.max_model_len for engine in engines]))
    came_s = drawn.time_s.copy()
    for r in np.flatnonzero(drawn.follows >= 0).tolist():
        came_s[r] = came_s[drawn.follows[r]] + answer_s + drawn.think_s[r]
    came = came_s < scenario.duration_s
    if not came.any():
        return 1.0  # a run so short does not tell
    prompt, output = drawn.prompt[came], drawn.output[came]
    old = np.where([isinstance(each.traffic, SessionsTraffic) for each in scenario.providers], 0.9, 0.0)
    cached = old[drawn.provider[came]] * np.maximum(0.0, prompt - turn_tokens)
    lengths = [Lognormal(float(each.mean()), 0.0, int(each.max())) for each in (prompt, output)]
    able = [capacity_per_s(each, lengths[0], [(1.0, lengths[1])], cached.sum() / prompt.sum()) for each in engines]
    return float(prompt.size / scenario.duration_s / sum(able))


def _session_phases(
    shape: str, rate_per_s: float, duration_s: float, rng: np.random.Generator
) -> list[dict[str, float]]:
    """Phases in which sessions begin at this mean rate: evenly, in a burst, or more and less of them by turns.

    In the first sixth of the run begin one to four times as many, so that the load needs less time to build up.
    """
    if shape == "alternating":
        count, swing, first = int(rng.integers(2, 5)), rng.uniform(0.2, 0.8), int(rng.integers(2))
        ends = (np.arange(count) + 1) / count
        rates = 1 + swing * np.where((np.arange(count) + first) % 2, 1.0, -1.0)
    elif shape == "burst":
        start, length = rng.uniform(0.2, 0.7), rng.uniform(0.05, 0.15)
        ends, rates = np.array([start, start + length, 1.0]), np.array([1.0, rng.uniform(3.0, 10.0), 1.0])
    else:
        ends, rates = np.ones(1), np.ones(1)
    early = 1 / 6
    bounds = np.unique(np.append(ends, early))
    rates = rates[np.searchsorted(ends, bounds)]
    rates[bounds <= early] *= rng.uniform(1.0, 4.0)
    rates *= rate_per_s / np.sum(rates * np.diff(bounds, prepend=0.0))
    return [
        {"until_s": min(duration_s, duration_s * end), "rate_per_s": rate}
        for end, rate in zip(bounds.tolist(), rates.tolist(), strict=True)
    ]


def _lognormal(lengths: Lognormal) -> dict[str, Any]:
    return {"median": lengths.median, "sigma": lengths.sigma, "max": lengths.max}


def _random_output(rng: np.random.Generator) -> Lognormal:
    """Output lengths of another workload: median 1500 to 4500 tokens."""
    return Lognormal(float(np.exp(rng.uniform(np.log(1500), np.log(4500)))), float(rng.uniform(0.5, 0.9)), 8192)


def _conversation(rng: np.random.Generator) -> Lengths:
    """Prompts of 200 to 1500 tokens and answers of 80 to 300 at the median."""
    prompt = Lognormal(float(np.exp(rng.uniform(np.log(200), np.log(1500)))), float(rng.uniform(0.5, 1.0)), 4096)
    return Lengths(prompt, Lognormal(float(rng.uniform(80, 300)), float(rng.uniform(0.5, 0.9)), 2048))


def _code(rng: np.random.Generator) -> Lengths:
    """Prompts of 1000 to 3000 tokens and answers of 10 to 60 at the median, as editors send."""
    prompt = Lognormal(float(np.exp(rng.uniform(np.log(1000), np.log(3000)))), float(rng.uniform(0.5, 1.0)), 8192)
    return Lengths(prompt, Lognormal(float(rng.uniform(10, 60)), float(rng.uniform(0.5, 1.0)), 1024))


def _stay_s(providers: list[dict[str, Any]], lengths: Lengths, capacities: Sequence[float]) -> float:
    """How long a request takes on the median node while it runs as many as it can, s."""
    context = lengths.prompt.mean + lengths.output.moment(2) / (2 * lengths.output.mean)
    engines = [profile(each["gpu"], each["model"], each["max_num_seqs"]) for each in providers]
    full = [min(engine.max_num_seqs, engine.kv_tokens / context) for engine in engines]
    return float(np.median(np.divide(full, capacities)))


def _fits(gpu: str, model: str) -> bool:
    try:
        profile(gpu, model)
    except ValueError:
        return False
    return True


_MODELS_OF = {gpu: [model for model in _MODEL_WEIGHTS if _fits(gpu, model)] for gpu in _GPU_WEIGHTS}


_LOADS = {"deadlines": (0.7, 1.3), "alike": (0.6, 1.4), "bursts": (0.6, 1.4)}
_IN_COMMON = {"alike": "all", "hardware": "model"}
_COUNTS = {"thin": (3, 6), "uneven": (5, 9), "thick": (9, 13)}  # providers, from and below


def _thin(capacities: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Rates of arrival, 1/s: the largest node at 0.1 to 0.4 of what it sustains, the others at 0.9 to 1.5 of it, or
    less where that would be more than 1.1 of what all sustain."""
    seller = int(np.argmax(capacities))
    rates = rng.uniform(0.9, 1.5, capacities.size) * capacities
    rates[seller] = rng.uniform(0.1, 0.4) * capacities[seller]
    others = np.arange(capacities.size) != seller
    room = 1.1 * capacities.sum() - rates[seller]
    rates[others] *= min(1.0, room / rates[others].sum())
    return rates


def _uneven(capacities: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Rates of arrival, 1/s: 1.3 to 1.6 of what a node sustains for as many as keep all below 1.05, in random order;
    0.1 to 0.4 for the others."""
    rates = rng.uniform(0.1, 0.4, capacities.size) * capacities
    high = rng.uniform(1.3, 1.6, capacities.size) * capacities
    for i in rng.permutation(capacities.size):
        if rates.sum() - rates[i] + high[i] <= 1.05 * capacities.sum():
            rates[i] = high[i]
    return rates


def _fleet(count: int, common: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Nodes that have "all" in common, the "model" they serve, or "nothing"."""
    first = _hardware(rng, list(_MODEL_WEIGHTS))
    if common == "all":
        return [dict(first) for _ in range(count)]
    models = [first["model"]] if common == "model" else list(_MODEL_WEIGHTS)
    return [_hardware(rng, models) for _ in range(count)]


def _hardware(rng: np.random.Generator, models: list[str]) -> dict[str, Any]:
    """A GPU of the catalogue with one of the `models` that fits it."""
    fitting = {gpu: [model for model in models if model in fits] for gpu, fits in _MODELS_OF.items()}
    weights = np.array([_GPU_WEIGHTS[gpu] if fitting[gpu] else 0.0 for gpu in _GPU_WEIGHTS])
    gpu = str(rng.choice(list(_GPU_WEIGHTS), p=weights / weights.sum()))
    weights = np.array([_MODEL_WEIGHTS[model] for model in fitting[gpu]])
    model = str(rng.choice(fitting[gpu], p=weights / weights.sum()))
    return {"gpu": gpu, "model": model, "max_num_seqs": 128 if gpu in ("a100-80g", "h100") else 64}


def _add_traffic(
    providers: list[dict[str, Any]], rates_per_s: Any, duration_s: float, rng: np.random.Generator
) -> None:
    """Give each provider its mean rate: steady, alternating with half the others, or in bursts."""
    shape = rng.choice(["steady", "alternating", "bursty", "mixed"])
    phases = int(rng.integers(2, 5))
    swing = rng.uniform(0.2, 0.8)
    first = rng.permutation(len(providers)) % 2
    for i, (provider, rate) in enumerate(zip(providers, rates_per_s.tolist(), strict=True)):
        own = rng.choice(["steady", "alternating", "bursty"]) if shape == "mixed" else shape
        if own == "steady":
            provider["traffic"] = {"kind": "poisson", "phases": [{"until_s": duration_s, "rate_per_s": rate}]}
        elif own == "alternating":
            provider["traffic"] = {
                "kind": "poisson",
                "phases": [
                    {
                        "until_s": min(duration_s, duration_s * (k + 1) / phases),  # which rounding may exceed
                        "rate_per_s": rate * float(1 + swing * (1 if (k + first[i]) % 2 else -1)),
                    }
                    for k in range(phases)
                ],
            }
        else:
            high, low = rng.uniform(1.6, 3.0), rng.uniform(0.1, 0.6)
            burst_s = rng.uniform(20, 80)
            quiet_s = burst_s * (high - 1) / (1 - low)  # so that the mean is `rate`
            provider["traffic"] = {
                "kind": "mmpp",
                "rates_per_s": [float(rate * low), float(rate * high)],
                "mean_dwell_s": [float(quiet_s), float(burst_s)],
            }


def _add_bursts(providers: list[dict[str, Any]], rates_per_s: Any, duration_s: float, rng: np.random.Generator) -> None:
    """Give each provider its mean rate: half to all of its requests come in 1 to 5 bursts of 1 to 40 s."""
    count, share, together = int(rng.integers(1, 6)), rng.uniform(0.5, 1.0), rng.random() < 0.5
    length_s = float(np.exp(rng.uniform(0.0, np.log(40.0)))) * duration_s / 600.0
    starts_s = rng.uniform(0.0, 0.9 * duration_s, count)
    for provider, rate in zip(providers, rates_per_s.tolist(), strict=True):
        own_s = starts_s if together else rng.uniform(0.0, 0.9 * duration_s, count)
        n = int(rng.poisson(rate * duration_s))
        in_burst = own_s[rng.integers(count, size=n)] + rng.uniform(0.0, length_s, n)
        times_s = np.where(rng.random(n) < share, in_burst, rng.uniform(0.0, duration_s, n))
        times_s = np.minimum(times_s.round(3), np.nextafter(duration_s, 0.0))  # which rounding may reach
        provider["traffic"] = {"kind": "times", "times_s": np.sort(times_s).tolist()}


def _add_absences(providers: list[dict[str, Any]], duration_s: float, rng: np.random.Generator) -> None:
    """In two markets of five, one provider leaves, joins, or goes away for a while; with six or more maybe another."""
    if rng.random() >= 0.4:
        return
    for i in rng.permutation(len(providers))[: 1 + (len(providers) >= 6 and rng.random() < 0.5)]:
        leave, back = sorted(rng.uniform(0.15, 0.85, 2).tolist())
        providers[i]["online_s"] = [
            [[0, leave * duration_s]],
            [[back * duration_s, duration_s]],
            [[0, leave * duration_s], [back * duration_s, duration_s]],
        ][rng.integers(3)]


def _add_lies(
    providers: list[dict[str, Any]], capacities: list[float], window_of_s: float | None, rng: np.random.Generator
) -> None:
    """Make up to a third of the providers misreport, mostly the slower half; for part of the run if `window_of_s`."""
    slow_first = np.argsort(capacities)
    weights = np.where(np.arange(len(providers)) < (len(providers) + 1) // 2, 3.0, 1.0)
    liars = int(rng.integers(1, len(providers) // 3 + 1))
    for i in rng.choice(slow_first, liars, replace=False, p=weights / weights.sum()):
        misreport = {"load": float(rng.uniform(0.1, 0.6)), "speed": float(rng.uniform(1.2, 2.5))}
        if window_of_s is not None:
            start, length = rng.uniform(0.1, 0.6), rng.uniform(0.2, 0.4)
            misreport["from_s"] = float(start * window_of_s)
            misreport["until_s"] = float((start + length) * window_of_s)
        providers[i]["misreport"] = misreport
