"""Small markets made for a test, and decisions to play them with."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from wwwserve.agents.decision import (
    FIRST_CANDIDATE,
    HOLD,
    IF_IT_PAYS,
    KEEP,
    LOCAL,
    MAX_KV_USE,
    MAX_WAIT_S,
    ONLY_IF_NONE_HELD,
    PROBABILITY,
    Actions,
)
from wwwserve.agents.protocol import PAYMENTS
from wwwserve.agents.rules import Rule
from wwwserve.agents.tariff import MARKUPS
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.scenario import Scenario, parse

Decide = Callable[[MarketBatch, Actions], None]


def lengths(prompt: int, output: int) -> dict[str, Any]:
    """Every request has so many tokens."""
    return {
        "prompt": {"median": prompt, "sigma": 0, "max": prompt},
        "output": {"median": output, "sigma": 0, "max": output},
    }


def times(*times_s: float) -> dict[str, Any]:
    return {"kind": "times", "times_s": [float(time_s) for time_s in times_s]}


def market(*providers: dict[str, Any], **top: Any) -> Scenario:
    """A scenario of these providers, all of whom answer for "m".

    Unless `top` says otherwise there are 50 ms of round trip and 1 s ticks, and a request costs a credit.
    """
    top["economy"] = {"payment": "per_request"} | top.get("economy", {})
    named = [{"name": f"n{i}", "serves": ["m"], **provider} for i, provider in enumerate(providers)]
    return parse({"name": "test", "duration_s": 100, "drain_s": 300, "providers": named, **top})


def run(batch: MarketBatch, decide: Decide) -> Iterator[float]:
    """Step a batch to its end; after each step, the time the step began."""
    actions = batch.actions()
    while not batch.over.all():
        began_s = float(batch.now_s[0])
        decide(batch, actions)
        batch.step(actions)
        yield began_s


def finish(batch: MarketBatch, decide: Decide) -> None:
    for _ in run(batch, decide):
        pass


def by_rule(name: str) -> Decide:
    rule = Rule(name)

    def decide(batch: MarketBatch, actions: Actions) -> None:
        rule.decide(batch.views, batch.active, batch.uniforms, actions)

    return decide


TAKE_ALL = np.array([np.inf, np.inf, 1.0, 0.0, 0.0, 0.0])  # an admission policy


def to_candidates(batch: MarketBatch, actions: Actions) -> None:
    """To the first candidate that has not refused, else here; accept always."""
    legal = batch.views.routes[..., FIRST_CANDIDATE:] == 1
    actions.route[...] = np.where(legal.any(-1), FIRST_CANDIDATE + legal.argmax(-1), LOCAL)
    actions.admission[...] = TAKE_ALL


def here(batch: MarketBatch, actions: Actions) -> None:
    actions.route[...] = LOCAL
    actions.admission[...] = TAKE_ALL


def hold(batch: MarketBatch, actions: Actions) -> None:
    actions.route[...] = HOLD


def random_market(rng: np.random.Generator) -> Scenario:
    """A small market with everything in it: churn, lies, classes, duels, tiny credits, small engines."""
    count, duration_s = int(rng.integers(2, 7)), 40.0
    classes = {}
    for c in range(int(rng.integers(0, 4))):
        classes[f"c{c}"] = {"deadline_s": float(rng.uniform(2, 60)), "value": float(rng.uniform(0, 5))}
    for entry in classes.values():
        entry["share"] = 1 / len(classes)
    economy = {
        "payment": str(rng.choice(PAYMENTS)),
        "initial_credit": float(rng.choice([0.5, 3.0, 1000.0])),
        "stake_rule": str(rng.choice(["load", "fixed"])),
        "initial_stake": float(rng.choice([0.0, 0.3, 2.0])),
        "duel_probability": float(rng.choice([0.0, 0.5, 1.0])),
        "judges": int(rng.integers(1, 6)),
        "compute_cost_per_ktok": float(rng.uniform(0, 1)),
    }
    providers: list[dict[str, Any]] = []
    for _ in range(count):
        each: dict[str, Any] = {
            "gpu": str(rng.choice(["rtx-4090", "a100-80g"])),
            "model": str(rng.choice(["qwen3-8b", "qwen3-4b", "llama-2-7b"])),
            "max_num_seqs": int(rng.integers(1, 25)),
            "serves": [["m"], ["m", "x"], ["x", "m"], ["x"]][rng.integers(4)],
            "lengths": {
                "prompt": {"median": float(rng.uniform(20, 3000)), "sigma": 0.8, "max": 6000},
                "output": {"median": float(rng.uniform(20, 800)), "sigma": 0.8, "max": 3000},
            },
            "strength": float(rng.uniform(-2, 2)),
        }
        if rng.random() < 0.8:
            rate = float(rng.uniform(0.1, 1.5))
            each["traffic"] = {"kind": "poisson", "phases": [{"until_s": duration_s, "rate_per_s": rate}]}
        if rng.random() < 0.5:
            leave, back = sorted(rng.uniform(1, duration_s - 1, 2).tolist())
            each["online_s"] = [[[0, leave]], [[back, duration_s]], [[0, leave], [back, duration_s]]][rng.integers(3)]
        if rng.random() < 0.3:
            each["misreport"] = {
                "load": float(rng.uniform(0, 2)), "speed": float(rng.uniform(0.3, 3)),
                "promise": float(rng.uniform(0.3, 2)), "from_s": 5.0,
            }  # fmt: skip
        providers.append(each)
    top: dict[str, Any] = {"slo": {"thresholds_s": [5, 20, 60]}, "economy": economy, "duration_s": duration_s}
    if classes:
        top["slo"]["classes"] = classes
    top["drain_s"] = float(rng.choice([0.0, 60.0]))
    top["decision_interval_s"] = float(rng.choice([0.5, 1.0, 2.0]))
    top["gossip_interval_s"] = float(rng.choice([1.0, 2.5, 3.0]))
    top["rtt_ms"] = float(rng.choice([0.0, 50.0, 1500.0]))
    economy["exposure"] = [None, 1.0, 4.0][rng.integers(3)]
    return market(*providers, **top)


def randomly(rng: np.random.Generator, illegal: float) -> Decide:
    """Decisions at random: a share of them from far outside what is allowed, the others as the mask has it."""

    def decide(batch: MarketBatch, actions: Actions) -> None:
        shape = actions.route.shape
        noise = rng.random((*shape, batch.views.routes.shape[-1])) * (batch.views.routes == 1)
        wild = rng.random(shape) < illegal
        actions.route[...] = np.where(wild, rng.integers(-5, 30, shape), noise.argmax(-1))
        actions.markup[...] = np.where(wild, rng.integers(-9, 40, shape), rng.integers(0, MARKUPS.size, shape))
        actions.direct[...] = np.where(rng.random(shape) < illegal / 3, rng.integers(-2, shape[-1] + 3, shape), -1)
        actions.admission[..., MAX_WAIT_S] = rng.choice([-1.0, 1.0, 20.0, np.inf], shape)
        actions.admission[..., MAX_KV_USE] = rng.choice([0.3, 0.9, np.inf], shape)
        actions.admission[..., PROBABILITY] = rng.choice([0.5, 1.0], shape)
        actions.admission[..., ONLY_IF_NONE_HELD] = rng.integers(0, 2, shape)
        actions.admission[..., IF_IT_PAYS] = rng.integers(0, 2, shape)
        actions.admission[..., KEEP] = rng.choice([0.0, 1.0], shape)

    return decide
