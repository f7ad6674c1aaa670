"""What markups a learned policy posts at what load: `wwwserve markups SCENARIO... --policy NAME|BUNDLE`.

The policy posts the most probable markup; how probable the others are shows whether training settled on it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from wwwserve.agents.arguments import Count, File, Seed, UsageError, parse_args, refuse
from wwwserve.agents.decision import ROUTES
from wwwserve.agents.policy.forward import LearnedPolicy
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import ADVERT_DUE, KV_USE, Views
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.scenario import ScenarioError
from wwwserve.envs.state import MarketPlan
from wwwserve.eval.compare import FIRST_TEST_SEED, Scenarios, check_outputs, columns, write_json
from wwwserve.eval.play import REQUESTS_AT_ONCE
from wwwserve.eval.policies import PolicyError, load_policy
from wwwserve.eval.rivals import draw_tasks

PROG = "wwwserve markups"
LOADS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # of the own KV cache in use: bounds of the rows
Tree = dict[str, Any]


def posted(policy: LearnedPolicy, plans: Sequence[MarketPlan]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each advert in markets that all play by the policy, its provider's share of KV in use [A] and the
    probabilities [A, MARKUPS.size] of the markups."""
    at_once = max(1, REQUESTS_AT_ONCE // max(each.capacity for each in plans))
    loads, logits = [np.zeros(0)], [np.zeros((0, MARKUPS.size))]
    for k in range(0, len(plans), at_once):
        batch = MarketBatch(plans[k : k + at_once])
        actions = batch.actions()
        while not batch.over.all():
            policy.decide(batch.views, batch.active, batch.uniforms, actions)
            due = batch.active & (batch.views.me[..., ADVERT_DUE] > 0.5)
            if due.any():
                nodes, request, me, routes = batch.views
                views = Views(nodes[due], request[due], me[due], routes[due])
                loads.append(views.nodes[:, 0, KV_USE].astype(np.float64))
                logits.append(policy.logits(views)[:, ROUTES:].astype(np.float64))
            batch.step(actions)
    raw = np.concatenate(logits)
    odds = np.exp(raw - raw.max(axis=1, keepdims=True))
    return np.concatenate(loads), odds / odds.sum(axis=1, keepdims=True)


def by_load(load: NDArray[np.float64], probability: NDArray[np.float64]) -> list[Tree]:
    """For each range of load that occurs: `adverts`, `posted`, the mean of the markups that are posted, `mean`, that
    of all by their probabilities, and `entropy` in nats."""
    rows = []
    entropy = -(probability * np.log(np.maximum(probability, 1e-12))).sum(axis=1)
    for low, high in pairwise(LOADS):
        here = (load >= low) & ((load < high) | (high == LOADS[-1]))
        if here.any():
            rows.append(
                {
                    "kv_use": [low, high],
                    "adverts": int(here.sum()),
                    "posted": float(MARKUPS[probability[here].argmax(axis=1)].mean()),
                    "mean": float((probability[here] @ MARKUPS).mean()),
                    "entropy": float(entropy[here].mean()),
                }
            )
    return rows


def table(rows: Sequence[Tree]) -> str:
    """Rows as text."""
    head = [["KV in use", "adverts", "markup posted", "mean of the head", "entropy, nats"]]
    return columns(
        head
        + [
            ["{:g} to {:g}".format(*row["kv_use"]), str(row["adverts"])]
            + [f"{row[key]:.3f}" for key in ("posted", "mean", "entropy")]
            for row in rows
        ]
    )


@dataclass
class Args:
    """Show what markups a learned policy posts at what load."""

    scenarios: Scenarios = ()
    """names of packaged scenarios, or files; random/KIND for another market of a kind with each seed"""
    policy: Annotated[str, tyro.conf.arg(metavar="NAME|BUNDLE")] = "competitive"
    """a learned policy, which all providers play"""
    seeds: Count = 4
    """markets of each scenario"""
    first_seed: Seed = FIRST_TEST_SEED
    """the seeds are this one and those that follow; `wwwserve train` draws its own below a million"""
    json: File = None
    """write the results to this file"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for what cannot be done as asked."""
    try:
        args = parse_args(Args, PROG, argv)
        if not args.scenarios:
            raise UsageError("no scenario is given")
        check_outputs(args.json, None)
        tasks = draw_tasks(args.scenarios, range(args.first_seed, args.first_seed + args.seeds))
        policy = load_policy(args.policy)
        if not isinstance(policy, LearnedPolicy):
            raise UsageError(f"--policy {args.policy!r} is not learned")
    except (UsageError, ScenarioError, PolicyError) as error:
        return refuse(PROG, error)
    rows = by_load(*posted(policy, [each for plans in tasks.values() for each in plans]))
    print(table(rows))
    if args.json is not None:
        write_json(args.json, {"policy": policy.name, "scenarios": list(tasks), "seeds": args.seeds, "loads": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
