"""Train providers against each other with MAPPO (Yu et al. 2022, arXiv 2103.01955); compare the result with the rules.

    python train/mappo.py --help

One shared actor decides for every provider from its own view, and each earns for itself (`--team-weight 0`); a critic
that sees the pooled state of the market serves training alone. The actor first imitates a rule, then improves on it by
PPO: routes are credited with what they change, markups with what they earn in pairs of markets (`train.pricing`). In
half of the markets it plays alone against its own past. What is kept is the average of its last updates. Markets are
drawn from `envs.distribution`. A cooperative policy (`--team-weight 1`) is chosen on random validation markets, a
competitive one is the last; test markets, and packaged scenarios, are for the report at the end alone. The file reads
from top to bottom: arguments, the update, validation, the run; `train.rollout` plays the markets. Under `torchrun` each
process has its share of the markets and gradients are summed over them.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, cast

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads else spin, which starves the markets' threads

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from wwwserve.agents.policy.architecture import MOST_KEEP, MOST_PAYS, Weights, width_of
from wwwserve.agents.policy.bundle import load as load_bundle
from wwwserve.agents.policy.forward import LearnedPolicy, net_of
from wwwserve.agents.policy.network import Actor, Critic, Inputs, weights_of
from wwwserve.agents.rules import RULES, Policy, Rule
from wwwserve.agents.tariff import MARKUPS
from wwwserve.envs.distribution import KINDS, Kind
from wwwserve.envs.oracle import ORACLES, Oracle
from wwwserve.envs.scenario import load as load_scenario
from wwwserve.envs.state import Reward
from wwwserve.eval import regret
from wwwserve.eval.compare import FIRST_TEST_SEED, compare, table, write_json
from wwwserve.eval.figures import draw
from wwwserve.eval.tuned import best_for
from wwwserve.train.export import export
from wwwserve.train.pricing import Notches, play_pairs
from wwwserve.train.processes import Processes
from wwwserve.train.rollout import Collector, Rollout, Situation, Source, advantages


@dataclass
class Args:
    """Train a policy for providers in a simulated market, and compare it with the rules."""

    out: Path = Path("runs/default")
    """folder of the run: policy/, resume.pt, progress.jsonl, summary.json, comparison.json, figures/"""
    seed: int = 1
    """seed of everything that is random"""
    agent_steps: int = 12_000_000
    """length of training; one step is one provider in one step of its market in which time passes"""
    imitate_steps: int = 1_500_000
    """of these, the first to imitate `best_value`; a team, where to hold is better, the rule tuned for that; 0: none"""
    critic_steps: int = 800_000
    """of the imitation's steps, the last ones in which the critic learns as well; before, nothing is rewarded"""
    imitation: float = 0.3
    """weight of imitation after that, beside the policy's own loss; 0 for none"""
    markets: int = 192
    """markets in a batch, over all processes"""
    rollout_steps: int = 128
    """steps of every market between updates"""
    against: Path | None = None
    """bundle that all providers but one play in every market, frozen; the one begins as they are, without
    imitation, and learns to do better: a learned deviator, for `eval.game`"""
    warm_start: Path | None = None
    """bundle whose policy training begins with, for `--imitate-steps 0`"""
    scenario: tuple[str, ...] = ()
    """scenarios to train on, packaged names or files, instead of random markets"""
    kinds: tuple[Kind, ...] = KINDS
    """kinds of random market to train on, in turn; one that is named twice comes twice as often"""
    duration_s: float = 600.0
    """length of a training market"""
    drain_s: float = 200.0
    """time that a training market then has to finish its requests"""
    max_requests: int = 6000
    """larger training markets are drawn again"""
    reward: Literal["decision", "mean"] = "decision"
    """what a provider is paid: what its own decisions changed in predicted values, or what became of requests"""
    team_weight: float = 0.0
    """0: own profit alone; 1: team, the welfare of the market, in which payments cancel; between: a mixture"""
    pays: float | None = None
    """share of its cost by now that others' work has to bring to be taken; set, not learned; as `best_value` has it in
    a team, else 1. With --warm-start and --against it is the bundle's"""
    keep: float | None = None
    """how much dearer a provider takes its cost to be as it sells: times 1 + so much for the share of its prompts that
    is found in its cache; set as --pays is: as `best_value` has it in a team, else 0"""
    markups: bool = True
    """learn the markup as well, unless in a team; else it stays as imitated, at cost"""
    pairs: int = 96
    """pairs of markets, over all processes, that show what a notch of markup earns by itself, see `train.pricing`; 0: a
    markup is credited as a route is, with all that its provider gains from then on"""
    pairs_every: int = 1
    """updates between two such"""
    pairs_s: float = 300.0
    """length of those markets"""
    future: bool = True
    """count what a placement takes from own users who have not arrived yet"""
    adverts: float = 0.1
    """of the adverts that come without a request to decide on, so many are learned from beside: by the critic, and
    without --pairs by the markup"""
    pool: int = 4
    """past policies among the opponents in half of the markets; 0 for none"""
    pool_every: int = 40
    """updates between two that join the pool, the oldest leaving it"""
    central: bool = True
    """a critic that sees the whole market; --no-central is independent PPO"""
    gamma: float = 0.99
    """discount per second"""
    gae_lambda: float = 0.9
    """decay of the advantage estimate per second"""
    learning_rate: float = 1e-3
    """Adam's, falling linearly to zero"""
    epochs: int = 1
    """passes over each rollout"""
    share: float = 0.15
    """of the providers, so many are learned from, others in each rollout; playing is cheaper than learning"""
    minibatches: int = 8
    """parts of a rollout, each for one gradient step"""
    average: float = 0.97
    """share of itself that the averaged policy, which is validated and kept, keeps at each update; 0: the last alone"""
    clip: float = 0.2
    """PPO's clip range"""
    most_advantage: float = 3.0
    """advantages are cut at so many of their standard deviations: a few decisions change a hundred times as much as
    most; 0 for not at all"""
    entropy: float = 0.003
    """weight of the entropy of the route"""
    markup_rate: float = 0.3
    """rate at which markups are learned from pairs, falling linearly to zero"""
    markup_entropy: float = 0.02
    """weight of the entropy of the markup, falling linearly to zero; what a markup earns is seen through much noise"""
    max_grad_norm: float = 10.0
    """gradients are scaled down to this norm"""
    width: int = 32
    """width of the actor's layers"""
    prior: float = 6.0
    """initial preference for the node that is expected to be done first; 0 for none"""
    prior_rate: float = 1.0
    """how many times faster than the rest that is learned: one number, which Adam moves by the learning rate at most"""
    settings_rate: float = 1.0
    """how many times faster the settings of the rule within are learned"""
    processes: int = 2
    """processes that share markets and gradients, started here unless torchrun did it"""
    device: str = "cpu"
    """where the networks learn, as torch names it: cpu, cuda, cuda:1; markets are always on the CPU"""
    checkpoint_every: int = 25
    """updates between checkpoints: the policy is validated, the run can be resumed from there, markets begin anew"""
    validation_markets: int = 8
    """random validation markets of each kind"""
    test_markets: int = 8
    """random test markets of each kind that the policy is compared with the rules on at the end; 0 for no comparison"""
    test_seeds: int = 4
    """seeds of every packaged scenario in that comparison"""
    resume: bool = False
    """go on from the last checkpoint in --out, if there is one"""
    wandb: bool = True
    """log to Weights & Biases, offline unless WANDB_MODE says otherwise"""

    def sold_by(self) -> tuple[float, float]:
        """`pays` and `keep` as given, else those of `best_value` for a team, and 1 and 0 for one after its own profit,
        which earns more so."""
        best = (RULES["best_value"][name].default for name in ("pays", "keep")) if self.team_weight == 1 else (1.0, 0.0)
        pays, keep = (x if given is None else given for x, given in zip(best, (self.pays, self.keep), strict=True))
        return pays, keep

    def check(self) -> None:
        """Raises ValueError for a value out of its range."""
        for name in ("agent_steps", "markets", "rollout_steps", "epochs", "minibatches", "width",
                     "processes", "checkpoint_every", "validation_markets", "max_requests", "pool_every",
                     "pairs_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        for name in ("duration_s", "pairs_s", "learning_rate", "prior_rate", "settings_rate", "markup_rate", "clip",
                     "max_grad_norm"):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected more than 0")
        for name in ("seed", "imitate_steps", "critic_steps", "drain_s", "imitation", "most_advantage", "entropy",
                     "markup_entropy", "prior", "pool", "pairs", "test_markets"):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 0")
        for name in ("gamma", "gae_lambda", "team_weight", "average", "adverts"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 0 to 1")
        for name, most in (("pays", MOST_PAYS), ("keep", MOST_KEEP)):
            if not 0 <= (getattr(self, name) or 0) <= most:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected 0 to {most:g}")
        if not 0 < self.share <= 1:
            raise ValueError(f"--share is {self.share}, expected more than 0, at most 1")
        if self.minibatches > self.markets:
            raise ValueError(f"--minibatches is {self.minibatches}, expected at most --markets, {self.markets}")
        for name in ("test_markets", "test_seeds"):
            if getattr(self, name) == 1:
                raise ValueError(f"--{name.replace('_', '-')} is 1, expected at least 2, for an interval")
        world = int(os.environ.get("WORLD_SIZE", self.processes))
        if world > self.markets:
            raise ValueError(f"--markets is {self.markets}, expected one for each of {world} processes at least")
        if 0 < self.pairs < world:
            raise ValueError(f"--pairs is {self.pairs}, expected 0, or one for each of {world} processes at least")
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without this device
            raise ValueError(f"--device is {self.device}: {str(error).splitlines()[0]}") from None


# Seeds of training, validation and test never meet: training draws market seeds below `eval.tune.SEED`, rules are tuned
# from there on, validation markets have seeds from VALIDATION_SEED on, reports from FIRST_TEST_SEED on.
TRAINING_SEEDS = FIRST_TEST_SEED // 4
MOST_AGAINST = 3.0  # nats by which another markup than the one that is posted is avoided, by pairs of markets
TO_HOLD: tuple[Kind, ...] = ("bursts", "deadlines")  # where tuned rules that hold were ahead of `best_value`
MOST_LOG_RATIO = 20.0  # far beyond the clip; where the ratio overflows, its gradient is no number
VALIDATION_SEED = FIRST_TEST_SEED // 2


# The update.


class ValueScale:
    """Running mean and standard deviation of returns, with which the critic's values are normalised.

    When they move, the critic's last layer is rescaled so that its values stay what they were (PopArt, van
    Hasselt et al. 2016, arXiv 1602.07714); otherwise the values, and with them the returns, run away.
    """

    def __init__(self, last: nn.Linear) -> None:
        self.last = last
        self.count, self.mean, self.square = 0.0, 0.0, 1.0

    @property
    def std(self) -> float:
        """Standard deviation of the returns seen, never zero."""
        return math.sqrt(max(self.square - self.mean**2, 1e-6))

    def unscaled(self, value: Tensor) -> Tensor:
        """Values from the critic's normalised ones."""
        return value * self.std + self.mean

    @torch.no_grad()
    def update(self, mean: float, square: float) -> None:
        """Take in the mean and mean square of a rollout's returns, ageing the old so that some ten rollouts count."""
        old_mean, old_std = self.mean, self.std
        self.count = self.count * 0.9 + 1.0
        self.mean += (mean - self.mean) / self.count
        self.square += (square - self.square) / self.count
        self.last.weight.mul_(old_std / self.std)
        self.last.bias.mul_(old_std).add_(old_mean - self.mean).div_(self.std)


class Batch(NamedTuple):
    """Decisions as tensors, [M, ...] each."""

    view: Inputs
    summary: Tensor  # [M, SUMMARY]
    loss_mask: Tensor  # [M, 2] 1 for what is learned of route and markup
    advertised: Tensor  # [M] 1 where the markup matters
    choice: Tensor  # [M, 2]
    log_prob: Tensor  # [M, 2]
    expert: Tensor  # [M, 2]
    advantage: Tensor  # [M] normalised and cut
    value_target: Tensor  # [M] normalised return

    def pick(self, rows: Tensor) -> "Batch":
        """Some of the decisions."""
        return Batch(Inputs(*(x[rows] for x in self.view)), *(x[rows] for x in self[1:]))


class Learner:
    """Adam over actor and critic."""

    def __init__(self, args: Args, processes: Processes) -> None:
        torch.manual_seed(args.seed)
        self.args, self.processes = args, processes
        self.actor = Actor(args.width, args.prior, *args.sold_by()).to(args.device)
        if args.team_weight == 1:  # which begins at cost, whatever it sees
            nn.init.zeros_(self.actor.layers().markup.weight)
        self.averaged = AveragedModel(self.actor, multi_avg_fn=get_ema_multi_avg_fn(args.average))
        self.critic = Critic(central=args.central).to(args.device)
        self.scale = ValueScale(self.critic.last)
        self.gain_square = 1e-4  # running mean square of what a notch of markup gains
        self.markups = torch.from_numpy(MARKUPS).float().to(args.device)
        self.learns_markup = args.markups and args.team_weight < 1
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.left = 1.0  # share of the run
        # What markups earn is mostly noise, which Adam would scale up to full steps; plain steps average it out.
        self.markup_optimiser = torch.optim.SGD(self.actor.parameters(), lr=args.markup_rate)
        prior, settings = [self.actor.prior], [*self.actor.layers().setting.parameters()]
        rest = [p for p in self.parameters if not any(p is of_rule for of_rule in (*prior, *settings))]
        groups: list[dict[str, Any]] = [
            {"params": rest, "faster": 1.0},
            {"params": prior, "faster": args.prior_rate},
            {"params": settings, "faster": args.settings_rate},
        ]
        self.optimiser = torch.optim.Adam(groups, lr=args.learning_rate, eps=1e-5)

    @torch.no_grad()
    def values(self, at: Situation) -> NDArray[np.float32]:
        """The critic's values [...] of situations."""
        on_device = (torch.from_numpy(x).to(self.args.device) for x in at)
        return self.scale.unscaled(self.critic(*on_device)).cpu().numpy()

    def compute_advantages(self, rollout: Rollout) -> tuple[NDArray[np.float32], NDArray[np.float32], dict[str, float]]:
        """Normalised advantages and returns [M] of a rollout's decisions, and what is logged of them."""
        args, d = self.args, rollout.decisions
        at = (d.step, d.market, d.provider)
        seen = Situation(np.ascontiguousarray(d.nodes[:, 0]), d.about, rollout.summary[d.step, d.market])
        own_value = self.values(seen)
        decided, value = np.zeros(rollout.reward.shape, np.bool_), np.zeros(rollout.reward.shape, np.float32)
        decided[at], value[at] = True, own_value
        final_value = np.zeros(rollout.reward.shape, np.float32)
        final_value[rollout.truncated] = self.values(rollout.final)
        advantage = advantages(
            rollout.reward, rollout.elapsed_s, decided, value, rollout.truncated, final_value,
            self.values(rollout.last), args.gamma, args.gae_lambda,
        )[at]  # fmt: skip
        returns = advantage + own_value
        moments = np.array([len(returns), returns.sum(), (returns**2).sum(), advantage.sum(), (advantage**2).sum()])
        count, *sums = self.processes.sum(torch.from_numpy(moments)).tolist()
        mean, square, advantage_mean, advantage_square = (x / max(count, 1) for x in sums)
        unexplained = float(advantage_square / max(square - mean**2, 1e-9))
        self.scale.update(mean, square)
        spread = math.sqrt(max(advantage_square - advantage_mean**2, 0.0)) + 1e-8
        logged = {"return": mean, "advantage_std": spread, "value_unexplained": unexplained}
        most = args.most_advantage or math.inf
        normalised = np.clip((advantage - advantage_mean) / spread, -most, most)
        return normalised, (returns - self.scale.mean) / self.scale.std, logged

    def batch(self, rollout: Rollout, paid: bool = True) -> tuple[Batch, dict[str, float]]:
        """The decisions of a rollout, with their advantages if they are `paid`; and what is logged of them."""
        args, d = self.args, rollout.decisions
        count = len(d.step)
        advantage = value_target = np.zeros(count, np.float32)
        logged: dict[str, float] = {}
        summary = rollout.summary[d.step, d.market]
        if paid:
            advantage, value_target, logged = self.compute_advantages(rollout)
        loss_mask = np.ones((count, 2), np.float32)
        loss_mask[:, 1] = d.advertised if self.learns_markup and not args.pairs else 0.0
        columns = [summary, loss_mask, d.advertised.astype(np.float32), d.choice, d.log_prob, d.expert, advantage,
                   value_target]  # fmt: skip
        tensors = [torch.from_numpy(np.asarray(x)).to(args.device) for x in columns]
        view = Inputs(
            *(torch.from_numpy(x).to(args.device) for x in (d.nodes, d.about, d.evidence, d.present, d.routes))
        )
        float_tensors = [x.float() if x.is_floating_point() else x for x in tensors]
        return Batch(view, *float_tensors), logged

    def update(self, rollout: Rollout, number: int, imitate: bool, paid: bool = True) -> dict[str, float]:
        """Learn from rollout `number` of the run; returns the means of what is logged.

        The critic learns if the rollout was `paid`, and so does the policy unless it is to `imitate`. A minibatch is
        made of whole markets, so it is the same however they are spread over processes.
        """
        args = self.args
        torch.set_num_threads(1)
        batch, logged = self.batch(rollout, paid)
        rng = np.random.default_rng((args.seed, 2, number))
        place = rollout.numbers[rollout.decisions.market]
        totals: dict[str, float] = {}
        for _ in range(args.epochs):
            part = (rng.permutation(args.markets) % args.minibatches)[place]
            counts = self.processes.sum(torch.from_numpy(np.bincount(part, minlength=args.minibatches))).tolist()
            for k in range(args.minibatches):
                if counts[k]:
                    rows = torch.from_numpy(np.nonzero(part == k)[0]).to(args.device)
                    for name, x in self.descend(batch.pick(rows), counts[k], imitate, paid).items():
                        totals[name] = totals.get(name, 0.0) + x / (args.epochs * args.minibatches)
        self.averaged.update_parameters(self.actor)
        return logged | totals

    def descend(self, d: Batch, count: int, imitate: bool, paid: bool = True) -> dict[str, float]:
        """One gradient step on a minibatch of `count` decisions, of which `d` are this process's."""
        args = self.args
        heads = [torch.log_softmax(logits, -1) for logits in self.actor(d.view)]
        matters = [torch.ones_like(d.advertised), d.advertised]  # of route and markup
        adverts = d.advertised.sum().clamp_min(1.0)
        spread = [-(p.exp() * p.clamp_min(-50.0)).sum(-1) * each for p, each in zip(heads, matters, strict=True)]
        each = len(d.advertised) / adverts  # so that a mean over decisions is one over adverts
        named = {"entropy": spread[0].sum(), "markup_entropy": spread[1].sum() * each}
        named["markup"] = (self.markups[d.choice[:, 1]] * d.advertised).sum() * each
        # An expert that was at odds with the mask held, which becomes running here.
        taught = [
            p.gather(-1, d.expert[:, k : k + 1]).squeeze(-1).clamp_min(-30.0) * matters[k]
            for k, p in enumerate(heads[:1] if self.learns_markup else heads)
            if imitate or args.imitation  # else no expert was asked
        ]
        if imitate:
            loss = -sum((p.sum() for p in taught), start=torch.zeros(()))
            named["imitation_loss"] = -taught[0].sum()
            named["agreement"] = (heads[0].argmax(-1) == d.expert[:, 0]).sum()
        else:
            chosen = torch.stack([p.gather(-1, d.choice[:, k : k + 1]).squeeze(-1) for k, p in enumerate(heads)], -1)
            log_ratio = (chosen - d.log_prob) * d.loss_mask
            ratio = log_ratio.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()
            clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
            advantage = d.advantage.unsqueeze(-1)
            gained = torch.min(ratio * advantage, clipped * advantage) * d.loss_mask
            loss = -gained.sum() - args.entropy * spread[0].sum()
            if self.learns_markup and not args.pairs:
                loss = loss - args.markup_entropy * self.left * spread[1].sum()
            if args.imitation:  # which is all that the markup learns from where it is not learned
                loss = loss - args.imitation * sum(p.sum() for p in taught)
            named |= {"policy_loss": -gained.sum(), "kl": (ratio - 1 - log_ratio).sum(),
                      "clipped": ((ratio - 1).abs() > args.clip).sum()}  # fmt: skip
        if paid:
            value = self.critic(d.view.nodes[:, 0], d.view.about, d.summary)
            named["value_loss"] = nn.functional.huber_loss(value, d.value_target, delta=10.0, reduction="sum")
            loss = loss + named["value_loss"]
        norm = self.step(loss / count, self.optimiser)
        sums = self.processes.sum(torch.stack([x.detach().float() for x in named.values()])) / count
        return dict(zip(named, sums.tolist(), strict=True)) | {"grad_norm": float(norm)}

    def learn_markups(self, notches: Notches) -> dict[str, float]:
        """Make the markups that gained more probable, against those that the policy chose; returns what is logged."""
        args = self.args
        gain = notches.gain.astype(np.float64)
        moments = self.processes.sum(torch.tensor([len(gain), (gain**2).sum(), np.abs(gain).sum(), gain.sum()]))
        count, square, size, mean = moments.tolist()
        if count == 0:
            return {}
        self.gain_square += 0.1 * (square / count - self.gain_square)
        pull = torch.from_numpy(np.clip(gain / math.sqrt(self.gain_square + 1e-12), -3.0, 3.0)).float().to(args.device)
        moved, chosen = (torch.from_numpy(x).to(args.device) for x in (notches.moved, notches.markup))
        views = [torch.from_numpy(array).to(args.device) for array in notches.views]
        with torch.no_grad():
            view = self.actor.inputs(*views)
        log_p = torch.log_softmax(self.actor(view)[1], -1)
        rather = (log_p.gather(-1, moved[:, None]) - log_p.gather(-1, chosen[:, None])).squeeze(-1)
        spread = -(log_p.exp() * log_p).sum()
        rather = torch.where(pull > 0, rather, rather.clamp_min(-MOST_AGAINST))
        loss = -(pull * rather).sum() - args.markup_entropy * self.left * spread
        self.step(loss / count, self.markup_optimiser)
        posted = self.processes.sum(torch.tensor([MARKUPS[notches.markup].sum()])).item()
        return {"markup_posted": posted / count, "notch_gain": mean / count, "notch_size": size / count,
                "entropy_posted": spread.item() / max(len(gain), 1)}  # fmt: skip

    def step(self, loss: Tensor, optimiser: torch.optim.Optimizer) -> float:
        """One step of an optimiser on this process's part of a loss; returns the norm of the gradient."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for p in self.parameters:
            if p.grad is None:  # of a head that is not learned
                p.grad = torch.zeros_like(p)
        self.processes.add_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
        optimiser.step()
        return float(norm)

    def start_from(self, weights: Weights) -> None:
        """Begin with a policy's weights. Raises ValueError if they are of another width."""
        if width_of(weights) != self.args.width:
            raise ValueError(f"--width is {self.args.width}, the policy to begin with has {width_of(weights)}")
        state = {name: torch.from_numpy(weight) for name, weight in weights.items()}
        self.actor.load_state_dict(state)
        cast(Actor, self.averaged.module).load_state_dict(state)

    def policy(self) -> Weights:
        """The policy as it would be kept now: an average of the last updates, which are noisy each."""
        return weights_of(cast(Actor, self.averaged.module))

    def anneal(self, progress: float) -> None:
        """Set what falls over the run, for this share of it that is past."""
        self.left = max(0.0, 1.0 - progress)
        for group in self.optimiser.param_groups:
            group["lr"] = self.args.learning_rate * group["faster"] * self.left
        for group in self.markup_optimiser.param_groups:
            group["lr"] = self.args.markup_rate * self.left


# Validation.


def validation_families(args: Args) -> regret.Families:
    """Random validation markets, the same for every training seed."""
    return regret.families(VALIDATION_SEED, args.validation_markets, 0, scenarios=())


def means(policy: Policy | Oracle, among: regret.Families) -> dict[str, float]:
    """Mean score of a policy in each family."""
    return {name: float(np.nanmean(found)) for name, found in regret.everywhere(among, policy).items()}


# The run.


class Progress(NamedTuple):
    """Where a run stands; with the networks and the optimiser, all that it takes to go on."""

    updates: int = 0
    agent_steps: int = 0
    lines: int = 0  # of progress.jsonl
    checkpoint: int = -1  # updates at the last one
    best: float = math.inf
    seconds: float = 0.0
    rollout_s: float = 0.0
    update_s: float = 0.0
    validation_s: float = 0.0


def identity(args: Args) -> dict[str, Any]:
    """What two runs must share for one to go on where the other stopped."""
    free = ("out", "resume", "wandb", "processes", "test_markets", "test_seeds")
    return {key: str(value) for key, value in asdict(args).items() if key not in free}


class Run:
    """A training run: its networks, its files, its standing."""

    def __init__(self, args: Args) -> None:
        pays, keep = args.sold_by()
        args = replace(args, pays=pays, keep=keep)
        if args.against is not None:
            args = replace(args, imitate_steps=0, imitation=0.0)
        self.args, self.processes = args, Processes()
        self.learner = Learner(args, self.processes)
        reward = Reward(args.team_weight, gamma=1.0, transfers=args.team_weight < 1,
                        by_decision=args.reward == "decision", future=args.future)  # fmt: skip
        # The potential is not discounted: a late answer within its deadline is worth as much as an early one. Gamma
        # below 1 only limits how far ahead a decision is held to account, which keeps the variance down.
        scenarios = tuple(load_scenario(name) for name in args.scenario)
        source = Source(
            args.seed, args.kinds, args.duration_s, args.drain_s, args.max_requests, TRAINING_SEEDS, scenarios
        )
        self.experts: dict[Kind, Policy] = {
            kind: best_for(kind) if args.team_weight == 1 and kind in TO_HOLD else Rule("best_value") for kind in KINDS
        }
        self.pool: list[Weights] = []
        if args.against is not None:
            self.pool = [load_bundle(args.against).weights]
            self.learner.start_from(self.pool[0])
        if args.warm_start is not None:
            self.learner.start_from(load_bundle(args.warm_start).weights)
        self.collector = Collector(source, reward, args.markets, rank=self.processes.rank,
                                   world=self.processes.world, share=args.share,
                                   alone=1.0 if args.against else 0.5)  # fmt: skip
        self.progress = Progress()
        self.logged: dict[str, float] = {}
        self.best = self.learner.policy()
        self.log = start_log(args) if self.processes.rank == 0 else lambda numbers: None

    def save(self) -> None:
        """Write resume.pt, whole or not at all."""
        learner = self.learner
        state = {
            "args": identity(self.args), "progress": self.progress._asdict(),
            "actor": learner.actor.state_dict(), "averaged": learner.averaged.state_dict(),
            "critic": learner.critic.state_dict(), "optimiser": learner.optimiser.state_dict(),
            "scale": [learner.scale.count, learner.scale.mean, learner.scale.square],
            "gain_square": learner.gain_square,
            "pool": [{name: torch.from_numpy(weight) for name, weight in each.items()} for each in self.pool],
            "best": {name: torch.from_numpy(weight) for name, weight in self.best.items()},
        }  # fmt: skip
        draft = self.args.out / ".resume.pt"
        torch.save(state, draft)
        os.replace(draft, self.args.out / "resume.pt")

    def restore(self) -> None:
        """Go on where resume.pt stands. Raises ValueError if it is another run's."""
        path = self.args.out / "resume.pt"
        state = torch.load(path, weights_only=True, map_location=self.args.device)
        for key, mine in identity(self.args).items():
            if state["args"].get(key) != mine:
                there = state["args"].get(key)
                raise ValueError(f"{path} is of a run with {key} {there}, expected {mine}; give that or another --out")
        learner = self.learner
        learner.actor.load_state_dict(state["actor"])
        learner.averaged.load_state_dict(state["averaged"])
        learner.critic.load_state_dict(state["critic"])
        learner.optimiser.load_state_dict(state["optimiser"])
        learner.scale.count, learner.scale.mean, learner.scale.square = state["scale"]
        learner.gain_square = state["gain_square"]
        self.pool = [{name: weight.cpu().numpy() for name, weight in each.items()} for each in state["pool"]]
        self.best = {name: weight.cpu().numpy() for name, weight in state["best"].items()}
        self.progress = Progress(**state["progress"])

    def checkpoint(self, among: regret.Families, rules: dict[str, dict[str, float]]) -> None:
        """Validate the policy, keep it if it is the best, write down where the run stands, begin new markets."""
        began_s = time.perf_counter()
        policy = self.learner.policy()
        achieved = self.processes.shared(among, partial(means, LearnedPolicy(policy, {})))
        if self.processes.rank == 0:
            fair = [name for name in rules if name != "centralized"]
            behind = {name: max(rules[rule][name] for rule in fair) - x for name, x in achieved.items()}
            worst, mean = max(behind.values()), float(np.mean(list(behind.values())))
            if worst + mean < self.progress.best or self.args.team_weight < 1:
                self.best = policy
                self.progress = self.progress._replace(best=worst + mean)
            line = {"seconds": self.progress.seconds, "agent_steps": self.progress.agent_steps, "scores": achieved,
                    "worst_regret": worst, "mean_regret": mean, "learning": self.logged}  # fmt: skip
            if self.progress.lines == 0:
                line["rules"] = {name: {rule: each[name] for rule, each in rules.items()} for name in among}
            with open(self.args.out / "progress.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            self.log({"worst_regret": worst, "mean_regret": mean} | {f"score/{k}": v for k, v in achieved.items()})
            tqdm.write(f"{self.progress.agent_steps / 1e6:6.1f} M steps  {self.progress.seconds:5.0f} s  "
                       f"worst regret {worst:+.4f}  mean {mean:+.4f}", file=sys.stderr)  # fmt: skip
        spent_s = time.perf_counter() - began_s
        self.progress = self.progress._replace(
            lines=self.progress.lines + 1, checkpoint=self.progress.updates,
            validation_s=self.progress.validation_s + spent_s, seconds=self.progress.seconds + spent_s,
        )  # fmt: skip
        self.logged = {}  # a run that is resumed from here knows of nothing earlier either
        if self.processes.rank == 0:
            self.save()
        self.processes.wait()

    def notches(self) -> Notches:
        """What a notch of markup earns now, in this process's pairs of markets."""
        args, rank, world = self.args, self.processes.rank, self.processes.world
        number = self.progress.updates
        pairs = len(range(rank, args.pairs, world))
        rng = np.random.default_rng((args.seed, 4, number, rank))
        source = self.collector.source._replace(duration_s=args.pairs_s)
        plans = source.plans(number, TRAINING_SEEDS + rank, begun=False)
        others = LearnedPolicy(self.pool[0], {}) if args.against is not None else None
        return play_pairs(LearnedPolicy(weights_of(self.learner.actor), {}), plans, pairs, rng, others)

    def train(self) -> dict[str, Any]:
        """Train; returns the summary of the run, and leaves in `self.best` the policy that is kept."""
        args, collector, learner = self.args, self.collector, self.learner
        if args.resume and (args.out / "resume.pt").exists():
            self.restore()
            if self.processes.rank == 0:
                keep = (args.out / "progress.jsonl").read_text().splitlines(keepends=True)[: self.progress.lines]
                (args.out / "progress.jsonl").write_text("".join(keep))
        elif self.processes.rank == 0:
            for name in ("progress.jsonl", "resume.pt"):
                (args.out / name).unlink(missing_ok=True)
        among = validation_families(args)
        baselines: list[Policy | Oracle] = [*regret.baselines(), Oracle("centralized")]
        rules = {policy.name: self.processes.shared(among, partial(means, policy)) for policy in baselines}
        with tqdm(total=args.agent_steps, initial=self.progress.agent_steps, unit="step", unit_scale=True,
                  dynamic_ncols=True, disable=self.processes.rank != 0) as bar:  # fmt: skip
            while True:
                over = self.progress.agent_steps >= args.agent_steps
                due = self.progress.updates % args.checkpoint_every == 0 or over
                if due and self.progress.checkpoint != self.progress.updates:
                    self.checkpoint(among, rules)
                if over:
                    break
                start_s = time.perf_counter()
                if due:
                    collector.renew(self.progress.updates)
                imitate = self.progress.agent_steps < args.imitate_steps
                paid = self.progress.agent_steps >= args.imitate_steps - args.critic_steps
                experts = self.experts if imitate or args.imitation else {}
                learner.anneal(self.progress.agent_steps / args.agent_steps)
                weights = weights_of(learner.actor)
                if args.pool and args.against is None and not imitate and self.progress.updates % args.pool_every == 0:
                    self.pool = [*self.pool, weights][-args.pool :]
                rollout = collector.collect(
                    net_of(weights), self.progress.updates, args.rollout_steps, experts, paid=paid,
                    markups=learner.learns_markup, draws_markups=learner.learns_markup and not args.pairs,
                    adverts=args.adverts,
                    opponents=[] if imitate else [net_of(each) for each in self.pool],
                )  # fmt: skip
                middle_s = time.perf_counter()
                logged = learner.update(rollout, self.progress.updates, imitate, paid)
                if (
                    learner.learns_markup
                    and args.pairs
                    and not imitate
                    and self.progress.updates % args.pairs_every == 0
                ):
                    logged |= learner.learn_markups(self.notches())
                self.logged |= logged
                taken = int(self.processes.sum(torch.tensor(rollout.agent_steps)))
                end_s = time.perf_counter()
                was = self.progress
                self.progress = was._replace(
                    updates=was.updates + 1, agent_steps=was.agent_steps + taken, seconds=was.seconds + end_s - start_s,
                    rollout_s=was.rollout_s + middle_s - start_s, update_s=was.update_s + end_s - middle_s,
                )  # fmt: skip
                rate = self.progress.agent_steps / self.progress.seconds
                self.log(logged | {"agent_steps": self.progress.agent_steps, "agent_steps_per_s": rate})
                bar.update(min(taken, bar.total - bar.n))
                shown = f"agreement {logged['agreement']:.3f}" if imitate else f"kl {logged['kl']:.4f}"
                bar.set_postfix_str(f"{shown}  {rate / 1e3:.0f}k/s")
        return self.summary(rules)

    def summary(self, rules: dict[str, dict[str, float]]) -> dict[str, Any]:
        """What summary.json says of the training itself."""
        now, lines = self.progress, []
        if self.processes.rank == 0:
            lines = [json.loads(line) for line in (self.args.out / "progress.jsonl").read_text().splitlines()]
        return {
            "agent_steps": now.agent_steps,
            "seconds": now.seconds,
            "agent_steps_per_s": now.agent_steps / now.seconds,
            "split_s": {"rollout": now.rollout_s, "update": now.update_s, "validation": now.validation_s},
            "seconds_to_beat": {rule: seconds_to_beat(lines, each) for rule, each in rules.items()},
            "seeds": {"training": self.args.seed, "validation_first": VALIDATION_SEED, "test_first": FIRST_TEST_SEED},
            "processes": self.processes.world,
            "device": device_name(self.args.device),
        }


def seconds_to_beat(lines: list[dict[str, Any]], rule: dict[str, float]) -> float | None:
    """Seconds of training until a validation found the policy's mean score over the families above that of `rule`."""
    mean = float(np.mean(list(rule.values())))
    return next((line["seconds"] for line in lines if np.mean(list(line["scores"].values())) > mean), None)


def device_name(device: str) -> str:
    """The device's name as its driver tells it."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def start_log(args: Args) -> Any:
    """A function that logs a mapping of numbers."""
    if not args.wandb:
        return lambda numbers: None
    import wandb

    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    return wandb.init(project="wwwserve", dir=args.out, config=json.loads(json.dumps(asdict(args), default=str))).log


def refuse(reason: str) -> int:
    """Say why a run is not started; returns the exit status."""
    print(f"mappo: {reason}", file=sys.stderr)
    return 2


def report(args: Args, policy: Policy) -> dict[str, Any]:
    """Measure the policy on test markets and packaged scenarios; print the tables, draw the figures.

    Returns `eval.regret.judge`'s result.
    """
    rules = regret.baselines()
    measured = regret.measure(
        [policy, *rules],
        regret.families(FIRST_TEST_SEED, args.test_markets, args.test_seeds),
        processes=args.processes,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    judged = regret.judge(measured, [rule.name for rule in rules])
    scenarios = [load_scenario(name) for name in regret.SCENARIOS if not name.startswith("trace/")]
    policies: list[Policy | Oracle] = [policy, *(Rule(name) for name in RULES), *(Oracle(name) for name in ORACLES)]
    result = compare(scenarios, policies, range(FIRST_TEST_SEED, FIRST_TEST_SEED + args.test_seeds))
    write_json(args.out / "comparison.json", result)
    for scenario in scenarios:
        print(table(result, scenario), end="\n\n")
    print(regret.table(judged))
    draw(args.out / "comparison.json", args.out / "figures", args.out / "progress.jsonl")
    return judged


def launch(processes: int) -> NoReturn:
    """Become torchrun, which starts this script in so many processes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    os.execv(sys.executable, [*torchrun, str(Path(__file__).resolve()), *sys.argv[1:]])


def main() -> None:
    """Command line; a bad argument is refused before anything runs."""
    try:
        args = tyro.cli(Args)
        args.check()
        args.out.mkdir(parents=True, exist_ok=True)
        if args.processes > 1 and "WORLD_SIZE" not in os.environ:
            launch(args.processes)
        run = Run(args)
        summary = run.train()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(refuse(str(error)))
    if run.processes.rank == 0:
        about = {
            "training": json.loads(json.dumps(asdict(run.args), default=str)),
            "agent_steps": summary["agent_steps"],
        }
        if args.test_markets:
            summary["table"] = report(args, LearnedPolicy(run.best, {}))
        write_json(args.out / "summary.json", summary)
        export(run.best, args.out / "policy", about, summary.get("table"))
        spent = ", ".join(f"{name} {each:.0f} s" for name, each in summary["split_s"].items())
        print(f"trained {summary['agent_steps']:,} agent-steps in {summary['seconds']:.0f} s "
              f"({summary['agent_steps_per_s']:,.0f}/s): {spent}")  # fmt: skip
        print(f"policy: {args.out / 'policy'}   summary: {args.out / 'summary.json'}   figures: {args.out / 'figures'}")


if __name__ == "__main__":
    main()
