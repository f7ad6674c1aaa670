"""From a training run's weights to the bundle that operators are handed."""

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from wwwserve.agents.policy.checkpoint import save
from wwwserve.agents.policy.forward import Weights
from wwwserve.agents.policy.runtime import LearnedPolicy
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
ENVIRONMENT = ("kinds", "duration_s", "drain_s", "max_requests", "reward", "team_weight", "gamma")


def export(
    weights: Weights, folder: str | Path, about: Mapping[str, Any], results: Mapping[str, Any] | None = None
) -> None:
    """Write the bundle of a trained policy to `folder`; see `agents.policy.checkpoint.save`.

    `about` goes into the manifest: `training` (the run's arguments), `agent_steps` and what else there is to say;
    environment and seed are taken from the arguments, revision and package versions from here. `results` are those of
    `eval.regret.judge`, which the model card makes a table of; others are recorded as they are.
    """
    training = {key: value for key, value in about.get("training", {}).items() if key not in ("out", "resume")}
    environment = {"market": "envs.market_v0", "distribution": "envs.distribution.sample"}
    environment |= {key: training[key] for key in ENVIRONMENT if key in training}
    made = {
        "name": "learned", **about, "training": training, "seed": training.get("seed"), "environment": environment,
        "git": revision(), "packages": packages(), "results": results,
    }  # fmt: skip
    save(weights, folder, made, record(LearnedPolicy(weights, made), GOLDEN_VIEWS, GOLDEN_SEED))


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
            seen.append(Views(*(array[batch.active] for array in batch.views)))
            policy.decide(batch.views, batch.active, batch.dice, actions)
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
