"""Train providers with the PPO of Stable-Baselines3; compare the result with three rules.

    python train/sb3_ppo.py --help

A second learner on the same market, by a library's code instead of our own: one policy decides for every provider, each
on its own view (parameter sharing), and its value function sees that view too. PPO knows no action masks: a route that
is not open becomes hold, in training and in the comparison, and how often that happened is logged. A market's horizon
is a truncation: PPO adds what its value function expects after the last observation. PPO discounts every step alike,
see `envs.sb3`.

The run leaves `model.zip`, for `PPO.load`, `progress.csv`, with one line an update, and `summary.json`.
"""

import contextlib
import io
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize
from tqdm import tqdm

from wwwserve.agents.decision import WHAT_PAYS, Actions
from wwwserve.agents.rules import Policy, Rule
from wwwserve.agents.view import Views
from wwwserve.envs.distribution import Kind, sample
from wwwserve.envs.oracle import Oracle
from wwwserve.envs.sb3 import MarketVecEnv, Sampler, closed_routes, observe
from wwwserve.envs.scenario import Scenario, load
from wwwserve.envs.state import Reward
from wwwserve.eval.compare import DEFAULT_BASELINE, FIRST_TEST_SEED, compare, table, write_json

NAME = "sb3_ppo"
COMPARED_RULES = ("single", DEFAULT_BASELINE, "earliest_finish")
MEASURES = ("slo_auc", "goodput_value")


@dataclass
class Args:
    """Train a policy for providers with Stable-Baselines3's PPO, and compare it with three rules."""

    out: Path = Path("runs/sb3_ppo")
    """folder of the run: model.zip, progress.csv, summary.json"""
    seed: int = 1
    """seed of everything that is random"""
    agent_steps: int = 2_000_000
    """length of training, rounded up to whole rollouts; one step is one provider in one step of its market"""
    markets: int = 64
    """markets in a batch"""
    rollout_steps: int = 128
    """steps of every market between updates"""
    scenario: str | None = None
    """scenario to train on, packaged or a file; without one, random markets"""
    kinds: tuple[Kind, ...] = ("honest",)
    """kinds of random market, evenly"""
    providers: int = 4
    """providers of a random market, 3 to 8; others are drawn again"""
    duration_s: float = 300.0
    """length of a random market"""
    drain_s: float = 100.0
    """time that a random market then has to finish its requests"""
    team_weight: float = 0.0
    """0: providers are paid their own profit; 1: the mean profit of their market, which hides whose decision it was"""
    gamma: float = 0.995
    """discount, per step in PPO and per second in the reward"""
    gae_lambda: float = 0.98
    """decay of the advantage estimate per step"""
    learning_rate: float = 5e-4
    """Adam's at the first update, falling linearly, to zero after the last"""
    epochs: int = 4
    """passes over each rollout"""
    minibatch: int = 2048
    """steps in a gradient step"""
    entropy: float = 0.003
    """weight of the entropy"""
    width: int = 64
    """width of the two hidden layers, of the policy and of the value function alike"""
    threads: int = 2
    """CPU threads, for markets; torch has one"""
    test_scenarios: tuple[str, ...] = ("paper/alternating-queue", "paper/mixed-hardware")
    """scenarios of the final comparison, packaged or files"""
    test_seeds: int = 8
    """seeds of the final comparison, at least 2"""

    def __post_init__(self) -> None:
        for name, low in (("seed", 0), ("agent_steps", 1), ("markets", 1), ("rollout_steps", 2), ("epochs", 1),
                          ("minibatch", 2), ("width", 1), ("threads", 1), ("test_seeds", 2)):  # fmt: skip
            if getattr(self, name) < low:
                raise ValueError(f"{_option(name)} is {getattr(self, name)}, expected at least {low}")
        if not 3 <= self.providers <= 8:
            raise ValueError(f"--providers is {self.providers}, expected 3 to 8")
        if self.seed >= 2**32:
            raise ValueError(f"--seed is {self.seed}, expected less than 2^32")
        for name in ("gae_lambda", "team_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{_option(name)} is {getattr(self, name)}, expected 0 to 1")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"--gamma is {self.gamma}, expected above 0 and at most 1")
        for name in ("duration_s", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{_option(name)} is {getattr(self, name)}, expected a number above 0")
        for name in ("drain_s", "entropy"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{_option(name)} is {getattr(self, name)}, expected a number of at least 0")
        for name in ("kinds", "test_scenarios"):
            if not getattr(self, name):
                raise ValueError(f"{_option(name)} is empty, expected at least one")
        if len(set(self.test_scenarios)) < len(self.test_scenarios):
            raise ValueError("--test-scenarios has one twice, expected different ones")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file, expected a folder")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# Training.


def random_markets(args: Args) -> Sampler:
    """Draws markets of `kinds`, each as likely, until one has as many providers as are to be trained."""

    def draw(rng: np.random.Generator) -> Scenario:
        kind = args.kinds[rng.integers(len(args.kinds))]
        while len((drawn := sample(kind, rng, args.duration_s)).providers) != args.providers:
            pass
        return replace(drawn, drain_s=args.drain_s)

    return draw


def make_env(args: Args) -> MarketVecEnv:
    """The training markets. Raises ScenarioError."""
    markets = load(args.scenario) if args.scenario else random_markets(args)
    rule = Reward(args.team_weight, gamma=args.gamma)
    return MarketVecEnv(markets, args.markets, seed=args.seed, threads=args.threads, reward=rule, arrivals=False)


def count_rollouts(args: Args, env: MarketVecEnv) -> int:
    """How many rollouts, each with an update, the training has."""
    return math.ceil(args.agent_steps / (args.rollout_steps * env.num_envs))


def make_model(args: Args, env: MarketVecEnv) -> PPO:
    """PPO, untrained. Rewards are scaled by the spread of their discounted sum; observations are normalised already."""
    steps = args.rollout_steps * env.num_envs
    rollouts = count_rollouts(args, env)
    return PPO(
        "MlpPolicy",
        VecNormalize(VecMonitor(env), norm_obs=False, gamma=args.gamma),
        # What is left is read after a rollout and before the update by it: 0 at the last one.
        learning_rate=lambda left: args.learning_rate * (left + 1 / rollouts),
        n_steps=args.rollout_steps,
        batch_size=min(args.minibatch, steps),
        n_epochs=args.epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        ent_coef=args.entropy,
        policy_kwargs={"net_arch": [args.width, args.width]},
        seed=args.seed,
        device="cpu",
    )


class Progress(BaseCallback):
    """Logs what share of the routes chosen in a rollout was not open, and moves the bar."""

    def __init__(self, env: MarketVecEnv, bar: Any) -> None:
        super().__init__()
        self.env, self.bar = env, bar
        self.share = math.nan
        """of the last rollout; NaN if nothing was decided in it"""

    def _on_rollout_start(self) -> None:
        self._before = self.env.decisions, self.env.invalid

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        decisions, invalid = self.env.decisions - self._before[0], self.env.invalid - self._before[1]
        self.share = invalid / decisions if decisions else math.nan
        self.logger.record("rollout/invalid_share", self.share)
        self.bar.update(self.num_timesteps - self.bar.n)
        self.bar.set_postfix_str(f"invalid {self.share:.3f}")


def train(args: Args, env: MarketVecEnv) -> tuple[PPO, dict[str, Any]]:
    """Train; returns the model and what the summary says of the training."""
    model = make_model(args, env)
    model.set_logger(configure(str(args.out), ["csv"]))
    start_s = time.perf_counter()
    length = count_rollouts(args, env) * args.rollout_steps * env.num_envs
    with tqdm(total=length, unit="step", unit_scale=True, dynamic_ncols=True) as bar:
        progress = Progress(env, bar)
        model.learn(length, callback=progress)
    seconds = time.perf_counter() - start_s
    steps = model.num_timesteps
    model.logger.close()
    print(f"trained {steps:,} agent-steps in {seconds:.0f} s ({steps / seconds:,.0f}/s), "
          f"routes not open: {env.invalid} of {env.decisions} chosen")  # fmt: skip
    return model, {
        "agent_steps": steps,
        "seconds": seconds,
        "agent_steps_per_s": steps / seconds,
        "invalid_share": {"training": _share(env.invalid, env.decisions), "last_rollout": _finite(progress.share)},
    }


# Comparison.


def draw(probabilities: NDArray[np.float32], u: NDArray[np.float64]) -> NDArray[np.int64]:
    """One index [M] for each row of [M, choices], from uniforms [M] in [0, 1)."""
    below = np.cumsum(probabilities, axis=-1, dtype=np.float64)
    return np.asarray((u[:, None] * below[:, -1:] >= below).sum(-1), np.int64)


class SB3Policy:
    """A model as a policy of `agents.rules.Policy`. It draws its choices as in training, open or not.

    The most probable choice would do worse: where that is a closed route, the request is held until the view changes.
    Chance comes from `rng`, as a market draws uniforms for requests only, while a markup is chosen without one
    too; so what a seed gives depends on what is run before and beside it. `decisions` counts the requests decided
    on, `invalid` those whose route was not open.
    """

    def __init__(self, model: PPO, rng: np.random.Generator, name: str = NAME) -> None:
        self.model, self.rng, self.name = model, rng, name
        self.decisions = self.invalid = 0

    def decide(self, views: Views, active: NDArray[np.bool_], uniforms: NDArray[np.float64], actions: Actions) -> None:
        """See `agents.rules.Policy.decide`; the uniforms are not used."""
        rows = np.nonzero(active)
        if rows[0].size == 0:
            return
        seen = Views._make(array[rows] for array in views)
        with torch.no_grad():
            joint: Any = self.model.policy.get_distribution(torch.from_numpy(observe(seen))).distribution
        route, markup = (draw(each.probs.numpy(), self.rng.random(rows[0].size)) for each in joint)
        decisions, invalid = closed_routes(seen, active[rows], route)
        self.decisions += decisions
        self.invalid += invalid
        actions.route[rows] = route
        actions.markup[rows] = markup
        actions.admission[rows] = WHAT_PAYS


def evaluate(args: Args, model: PPO, scenarios: list[Scenario]) -> dict[str, Any]:
    """Compare the model with the rules on the test seeds, print the tables; returns what the summary says of it."""
    policy = SB3Policy(model, np.random.default_rng(args.seed))
    policies: list[Policy | Oracle] = [policy, *(Rule(name) for name in COMPARED_RULES)]
    seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + args.test_seeds)
    result = compare(scenarios, policies, seeds, threads=args.threads)
    for scenario in scenarios:
        print(table(result, scenario), end="\n\n")
    share = _share(policy.invalid, policy.decisions)
    print(f"routes not open: {policy.invalid} of {policy.decisions} chosen by {NAME}")
    return {
        "invalid_share": {"test": share},
        "test_seeds": list(seeds),
        "table": {
            name: {each: {key: cell[key] for key in MEASURES} for each, cell in cells.items()}
            for name, cells in result["scenarios"].items()
        },
        "baseline": DEFAULT_BASELINE,
        "paired": {
            name: {each: {key: cell[key] for key in MEASURES} for each, cell in cells.items()}
            for name, cells in result["paired"]["scenarios"].items()
        },
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


# The run.


def parse(arguments: list[str]) -> Args:
    """The command line. Raises ValueError, one line, for what it does not say well; SystemExit after `--help`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Args, args=arguments)
    except SystemExit as end:
        if not end.code:
            raise
        # tyro draws a box: its title, what is wrong, a rule, and then help.
        lines = [line.strip("│ ") for line in said.getvalue().splitlines() if line.startswith("│")]
        wrong = lines[: next((k for k, line in enumerate(lines) if line.startswith("──")), len(lines))]
        reason = " ".join(wrong) or " ".join(said.getvalue().split())
        raise ValueError(reason.removeprefix("Error parsing Args: ")) from None


def refuse(reason: str) -> int:
    """Say why a run is not started; returns the exit status."""
    print(f"{NAME}: {reason}", file=sys.stderr)
    return 2


def main() -> None:
    """Command line; a bad argument is refused before anything runs or is written."""
    try:
        args = parse(sys.argv[1:])
        scenarios = [load(name) for name in args.test_scenarios]
        env = make_env(args)
        args.out.mkdir(parents=True, exist_ok=True)
        if not os.access(args.out, os.W_OK):
            raise ValueError(f"--out {args.out} cannot be written to")
    except ValueError as error:
        sys.exit(refuse(str(error)))
    except OSError as error:
        sys.exit(refuse(f"--out {args.out}: {error.strerror}"))
    torch.set_num_threads(1)  # its tensors are small: more threads would spend their time meeting
    model, trained = train(args, env)
    unfinished = args.out / ".model.zip"
    model.save(unfinished)
    unfinished.replace(args.out / "model.zip")
    tested = evaluate(args, model, scenarios)
    shares = trained.pop("invalid_share") | tested.pop("invalid_share")
    summary = {"seed": args.seed} | trained | {"invalid_share": shares} | tested
    summary["arguments"] = json.loads(json.dumps(asdict(args), default=str))
    write_json(args.out / "summary.json", summary)
    print(f"model: {args.out / 'model.zip'}   numbers: {args.out / 'summary.json'}")


if __name__ == "__main__":
    main()
