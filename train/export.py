"""From a training run's weights to the bundle that operators are handed."""

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from wwwserve.agents.policy.architecture import Weights
from wwwserve.agents.policy.bundle import Tree, results_table, save
from wwwserve.agents.policy.forward import LearnedPolicy
from wwwserve.agents.policy.network import actor_of, onnx_bytes
from wwwserve.agents.rules import Policy
from wwwserve.agents.view import HAS_REQUEST, Views
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import KINDS, sample
from wwwserve.envs.state import plan

GOLDEN_VIEWS = 16
GOLDEN_SEED = 2026
MARKET_S = 120.0  # length of a market that views are recorded in
PACKAGES = ("numpy", "torch", "numba", "wwwserve")
# Of the training run's arguments, those that say which markets it drew and what was rewarded in them.
ENVIRONMENT = ("kinds", "duration_s", "drain_s", "max_requests", "reward", "team_weight", "pays", "keep", "gamma")


def export(
    weights: Weights, folder: str | Path, about: Mapping[str, Any], results: Mapping[str, Any] | None = None
) -> None:
    """Write the bundle of a trained policy to `folder`; see `agents.policy.bundle.save`.

    `about` goes into the manifest: `training` (the run's arguments), `agent_steps` and what else there is to say;
    environment and seed are taken from the arguments, revision and package versions from here. `results` are those of
    `eval.regret.judge`, which the model card makes a table of; others are recorded as they are.
    """
    training = {key: value for key, value in about.get("training", {}).items() if key not in ("out", "resume")}
    environment = {"market": "envs.market_v1", "distribution": "envs.distribution.sample"}
    environment |= {key: training[key] for key in ENVIRONMENT if key in training}
    made = {
        "name": "learned", **about, "training": training, "seed": training.get("seed"), "environment": environment,
        "git": revision(), "packages": packages(), "results": results,
    }  # fmt: skip
    views = record(LearnedPolicy(weights, made), GOLDEN_VIEWS, GOLDEN_SEED)
    save(weights, folder, made, views, onnx_bytes(actor_of(weights), views), card)


def record(policy: Policy, count: int, seed: int) -> Views:
    """`count` views that providers with this policy see in random markets of every kind, three in four of them with a
    request to decide on."""
    rng = np.random.default_rng(seed)
    wanted = {False: count // 4, True: count - count // 4}
    seen: list[Views] = []
    have = dict.fromkeys(wanted, 0)
    while any(have[asked] < 4 * wanted[asked] for asked in wanted):
        plans = [plan(sample(kind, rng, MARKET_S), int(rng.integers(2**31))) for kind in KINDS]
        batch = MarketBatch(plans)
        actions = batch.actions()
        while not batch.over.all():
            seen.append(Views._make(array[batch.active] for array in batch.views))
            policy.decide(batch.views, batch.active, batch.uniforms, actions)
            batch.step(actions)
        asks = np.concatenate([views.me[:, HAS_REQUEST] > 0.5 for views in seen])
        have = {asked: int((asks == asked).sum()) for asked in wanted}
    rows = np.concatenate([rng.choice(np.nonzero(asks == asked)[0], n, replace=False) for asked, n in wanted.items()])
    return Views(*(np.concatenate(arrays)[rows] for arrays in zip(*seen, strict=True)))


def revision() -> dict[str, Any] | None:
    """The git revision of this checkout and whether it has uncommitted changes; None outside one."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # fails where the repository is another's
        return {"revision": _git(here, "rev-parse", "HEAD"), "dirty": bool(_git(here, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def packages() -> dict[str, str | None]:
    """Versions of Python and of what a policy's numbers depend on; None for what is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


# The model card.

_CARD = """\
# {name}: a policy for providers of `wwwserve`

LLM providers serve each other's overflow without a coordinator. For the request at the head of its queue, a provider
with this policy decides whether to hold it, run it here or hand it to one of up to {candidates} candidates; and with
each advert, what peers are to pay beyond its marginal cost. It sees only what a provider knows: its own node,
the adverts of the candidates, and its peer_stats with them.

A {architecture} network of width {width}, {parameters:,} parameters: one encoder for every node in view, pooled, and a
score for each node, so that the order of the candidates does not matter.

## Use

```sh
wwwserve policy verify FOLDER
wwwserve compare paper/mixed-hardware --policy FOLDER www_serve earliest_finish_trust
```

`wwwserve.agents.policy.bundle.load(FOLDER)` gives the policy in Python; it needs NumPy, numba and safetensors.
`policy.onnx` is the same function for other runtimes: inputs `nodes` [M, {nodes}, {node_features}],
`request` [M, {request_features}] and `me` [M, {self_features}], float32 in the physical units that
`manifest.json` lists (normalisation is in the graph), and the mask `routes` [M, {routes}], int8; outputs
the logits of `route` and `markup`. Take the most probable of each.

## Training

{training}

## Results

{results}

## Limits

- Trained and measured in the simulated market alone. Engines there are exact to the iteration, networks and users are
  models.
- It reads adverts, which may lie; it discounts them by the record of a peer, which a stranger does not have.
- Features are clipped to the ranges in the manifest; beyond them it cannot tell one load from another.
- It was trained on the markets named above; others, many more providers or other hardware may ask for another policy.
- Observation spec version {view_version}, bundle format {format}: other versions refuse it.
"""


def card(manifest: Tree) -> str:
    """The model card, in Markdown, of the policy that `manifest` describes."""
    rows = results_table(manifest)
    results = "Not measured.\n"
    if rows:
        lines = ["| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
        results = (
            "Mean score (SLO attainment, or value delivered in time where requests have values) on test markets that "
            "training\nnever saw, with 95 % intervals; the last column is paired by market.\n\n" + "\n".join(lines)
        )
    facts = []
    if isinstance(manifest.get("agent_steps"), int):
        facts.append(f"- {manifest['agent_steps']:,} agent steps, seed {manifest.get('seed')}")
    for key, value in (manifest.get("environment") or {}).items():
        facts.append(f"- {key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    git = manifest.get("git")
    if git:
        facts.append(f"- revision {git['revision']}" + (", with uncommitted changes" if git["dirty"] else ""))
    features = manifest["features"]
    return _CARD.format(
        name=manifest["name"],
        candidates=manifest["decisions"]["candidates"],
        architecture=manifest["architecture"]["name"],
        width=manifest["architecture"]["width"],
        parameters=manifest["architecture"]["parameters"],
        nodes=1 + manifest["decisions"]["candidates"],
        routes=len(manifest["decisions"]["routes"]),
        node_features=len(features["node"]),
        request_features=len(features["request"]),
        self_features=len(features["self"]),
        training="\n".join(facts) or "Not recorded.",
        results=results.rstrip(),
        view_version=manifest["view_version"],
        format=manifest["format"],
    )
