"""Train providers against each other with MAPPO (Yu et al. 2022, arXiv 2103.01955); compare the result with the rules.

    python train/mappo.py --help

One shared actor decides for every provider from its own view; a critic that sees the pooled state of the market serves
training alone. Markets are drawn from `envs.distribution`; what is reported at the end comes from scenarios and seeds
that training never saw. The file reads from top to bottom: arguments, markets, rollout, update, evaluation, the run.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from agents.checkpoint import save, weights_of
from agents.decision import HOLD, set_admit
from agents.network import Actor, Critic
from agents.rules import RULES, Policy, Rule
from agents.runtime import LearnedPolicy, load
from agents.view import CLASS_VALUE, HAS_REQUEST
from envs.batch import MarketBatch
from envs.distribution import KINDS, Kind, sample
from envs.oracle import ORACLES, Oracle
from envs.scenario import Scenario
from envs.scenario import load as load_scenario
from envs.state import MarketPlan, Reward, Shape, plan
from eval.compare import FIRST_TEST_SEED, compare, table, write_json
from eval.figures import draw
from eval.metrics import measure, score
from train.gae import estimate

FloatArray = NDArray[np.float32]


@dataclass
class Args:
    """Train a policy for providers in a simulated market, and compare it with the rules."""

    out: Path = Path("runs/default")
    """folder of the run: policy/, progress.jsonl, comparison.json, figures/"""
    seed: int = 1
    """seed of everything that is random"""
    agent_steps: int = 6_000_000
    """length of training; one step is one provider in one tick of its market"""
    markets: int = 96
    """markets in a batch"""
    rollout_steps: int = 128
    """steps of every market between updates"""
    kinds: tuple[Kind, ...] = KINDS
    """kinds of random market to train on, evenly"""
    duration_s: float = 600.0
    """length of a training market"""
    drain_s: float = 200.0
    """time that a training market then has to finish its requests"""
    max_requests: int = 6000
    """larger training markets are drawn again"""
    team_weight: float = 1.0
    """0: providers are paid their own profit; 1: the mean profit of their market"""
    transfers: bool = False
    """count payments between providers, which cancel in the mean of a market"""
    dense: bool = True
    """pay predicted value when a request is placed, not all of it when it is done"""
    gamma: float = 0.99
    """discount per second"""
    gae_lambda: float = 0.95
    """decay of the advantage estimate per second"""
    learning_rate: float = 1e-3
    """Adam's, falling linearly to zero"""
    epochs: int = 3
    """passes over each rollout"""
    minibatches: int = 8
    """parts of a rollout, each for one gradient step"""
    clip: float = 0.2
    """PPO's clip range"""
    entropy: float = 0.003
    """weight of the entropy of the route"""
    max_grad_norm: float = 10.0
    """gradients are scaled down to this norm"""
    width: int = 32
    """width of the layers"""
    prior: float = 6.0
    """initial preference for the node that is expected to be done first, as `earliest_finish_trust` expects it"""
    threads: int = 2
    """CPU threads, for markets and for torch"""
    evaluate_every: int = 16
    """updates between evaluations; the best policy on validation markets is kept"""
    validation_markets: int = 12
    """validation markets of each kind"""
    scenarios: tuple[str, ...] = (
        "paper/alternating",
        "paper/alternating-queue",
        "paper/mixed-hardware",
        "paper/mixed-models",
        "paper/bursty-churn",
        "market/deadlines",
        "liars/first",
    )
    """scenarios of the final comparison"""
    compare_seeds: int = 32
    """seeds of the final comparison; 0 leaves it out"""
    wandb: bool = True
    """log to Weights & Biases, offline unless WANDB_MODE says otherwise"""

    def __post_init__(self) -> None:
        for name in ("agent_steps", "markets", "rollout_steps", "epochs", "minibatches", "width", "threads",
                     "evaluate_every", "validation_markets", "max_requests"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        for name in ("gamma", "gae_lambda", "team_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 0 to 1")
        if self.compare_seeds == 1 or self.compare_seeds < 0:
            raise ValueError(f"--compare-seeds is {self.compare_seeds}, expected 0 or at least 2")


# Seeds of training, validation and test never meet: training draws from generators spawned from `seed`, validation
# markets have seeds from VALIDATION_SEED on, the final comparison from FIRST_TEST_SEED on.
VALIDATION_SEED = FIRST_TEST_SEED // 2


# Markets.


def training_plans(args: Args) -> Iterator[MarketPlan]:
    """Random markets without end, each with traffic of its own, the kinds in turn."""
    rng = np.random.default_rng((args.seed, 0))
    while True:
        for kind in args.kinds:
            while True:
                scenario = replace(sample(kind, rng, args.duration_s), drain_s=args.drain_s)
                planned = plan(scenario, int(rng.integers(VALIDATION_SEED)))
                if 0 < planned.capacity <= args.max_requests:
                    break
            yield planned


def validation_plans(args: Args) -> dict[str, list[MarketPlan]]:
    """Validation markets by kind, the same for every training seed."""
    plans = {}
    for kind in KINDS:
        rng = np.random.default_rng((VALIDATION_SEED, KINDS.index(kind)))
        plans[kind] = [plan(sample(kind, rng), VALIDATION_SEED + k) for k in range(args.validation_markets)]
    for name in args.scenarios:
        plans[name] = [plan(load_scenario(name), VALIDATION_SEED + k) for k in range(4)]
    return plans


def worth_per_s(planned: MarketPlan) -> float:
    """Value of the requests that arrive at a provider of this market in a second, on average, credits.

    Rewards are divided by it, so that a busy market of valuable requests does not drown the others in a batch.
    """
    value = planned.known[planned.traffic.provider, planned.traffic.klass, CLASS_VALUE].sum()
    return float(value / (planned.scenario.duration_s * len(planned.profiles)))


# Rollout.


class Decisions(NamedTuple):
    """The decisions of a rollout that offer a choice, M in all, with what is needed to judge them anew."""

    step: NDArray[np.int64]  # [M] which step, market and provider
    market: NDArray[np.int64]
    provider: NDArray[np.int64]
    nodes: Tensor  # [M, NODES, F] the view
    request: Tensor
    me: Tensor
    routes: Tensor  # [M, ROUTES] the mask, applied again in the update
    summary: Tensor  # [M, S] the pooled state of the market, for the critic
    priced: Tensor  # [M] whether the market has more than one price
    route: Tensor  # [M] what was chosen
    admit: Tensor
    price: Tensor
    log_prob: Tensor  # [M]
    value: Tensor  # [M] in seconds' worth of arrivals, as are all rewards and values here


class Rollout(NamedTuple):
    """T steps of B markets of N providers."""

    decisions: Decisions
    reward: FloatArray  # [T, B, N]
    elapsed_s: NDArray[np.float64]  # [T, B]
    cut: NDArray[np.bool_]  # [T, B] the market's horizon came at the end of this step
    cut_value: FloatArray  # [T, B, N] what would have followed it
    last_value: FloatArray  # [B, N] what follows the rollout
    agent_steps: int


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
    def update(self, returns: Tensor) -> None:
        """Take in returns [M], ageing the old ones so that some ten rollouts count."""
        mean, std = self.mean, self.std
        self.count = self.count * 0.9 + 1.0
        self.mean += (float(returns.mean()) - self.mean) / self.count
        self.square += (float((returns**2).mean()) - self.square) / self.count
        self.last.weight.mul_(std / self.std)
        self.last.bias.mul_(std).add_(mean - self.mean).div_(self.std)


def log_probs(actor: Actor, nodes: Tensor, request: Tensor, me: Tensor, routes: Tensor) -> tuple[Tensor, ...]:
    """Log-probabilities of each choice of route, admit and price, [M, choices] each."""
    logits = actor(nodes, request, me, routes)
    return tuple(torch.log_softmax(each, -1) for each in logits)


def joint(route: Tensor, admit: Tensor, price: Tensor, d: Decisions | Any) -> Tensor:
    """Log-probability [M] of the choices in `d`; a price counts only where there is more than one."""
    pairs = ((route, d.route), (admit, d.admit), (price, d.price))
    routed, admitted, priced = (p.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) for p, chosen in pairs)
    return routed + admitted + priced * d.priced


def draw_from(log_p: Tensor, generator: torch.Generator) -> Tensor:
    """Sample one index per row by the Gumbel trick."""
    noise = torch.rand(log_p.shape, generator=generator).clamp_(1e-7, 1 - 1e-7)
    return (log_p - torch.log(-torch.log(noise))).argmax(-1)


class Collector:
    """Steps a batch of training markets with the current policy."""

    def __init__(self, args: Args, actor: Actor, critic: Critic, scale: ValueScale) -> None:
        self.args, self.actor, self.critic, self.scale = args, actor, critic, scale
        self.plans = training_plans(args)
        first = [next(self.plans) for _ in range(args.markets)]
        widest = max(8, Shape.of(first).providers)
        shape = Shape(widest, args.max_requests, 1)
        # The potential is not discounted: a late answer within its deadline is worth as much as an early one. Gamma
        # below 1 only limits how far ahead a decision is held to account, which keeps the variance down.
        rule = Reward(args.team_weight, transfers=args.transfers, gamma=1.0, dense=args.dense)
        self.batch = MarketBatch(first, threads=args.threads, reward=rule, shape=shape)
        self.actions = self.batch.actions()
        self.generator = torch.Generator().manual_seed(args.seed)
        self.worth = np.array([worth_per_s(planned) for planned in first], np.float32)
        self.stagger()

    def stagger(self) -> None:
        """Bring the markets to different times, so that a rollout sees beginnings, middles and ends alike."""
        rule = Rule("earliest_finish")
        start_s = np.arange(self.args.markets) / self.args.markets * self.args.duration_s
        views, batch = self.batch.views, self.batch
        while (waiting := (batch.now_s < start_s) & ~batch.over).any():
            held = batch.markets.market["over"].copy()
            batch.markets.market["over"] = ~waiting
            rule.decide(views, batch.active & waiting[:, None], batch.dice, self.actions)
            batch.step(self.actions)
            batch.markets.market["over"] |= held

    def values(self, summary: Tensor) -> FloatArray:
        """The critic's values [B, N] of all present situations."""
        nodes, request, me, _ = (torch.from_numpy(a) for a in self.batch.views)
        pooled = summary.unsqueeze(1).expand(-1, me.shape[1], -1)
        return self.scale.unscaled(self.critic(nodes, request, me, pooled)).numpy()

    def summary(self) -> Tensor:
        """The pooled state [B, S] of every market."""
        views = self.batch.views
        return self.critic.summary(torch.from_numpy(views.nodes), torch.from_numpy(views.me), self.present())

    def present(self) -> Tensor:
        """Which provider slots [B, N] hold a provider."""
        count = self.batch.markets.market["n_providers"]
        return torch.from_numpy((np.arange(self.batch.providers) < count[:, None]).astype(np.float32))

    @torch.no_grad()
    def collect(self) -> Rollout:
        """Play `rollout_steps` steps."""
        args, batch = self.args, self.batch
        torch.set_num_threads(1)  # a step's tensors are small: more threads would spend their time meeting
        steps, shape = args.rollout_steps, (args.rollout_steps, batch.count, batch.providers)
        reward, cut_value = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        elapsed_s, cut = np.zeros(shape[:2]), np.zeros(shape[:2], np.bool_)
        taken: list[tuple[Any, ...]] = []
        agent_steps = 0
        for t in range(steps):
            summary = self.summary()
            priced = batch.markets.market["n_prices"] > 1
            choice = batch.active & ((batch.views.me[..., HAS_REQUEST] > 0.5) | priced[:, None])
            rows = np.nonzero(choice)
            view = [torch.from_numpy(a[rows]) for a in batch.views]
            pooled = summary[rows[0]]
            probs = log_probs(self.actor, *view)
            route, admit, price = (draw_from(p, self.generator) for p in probs)
            one = Decisions(np.full(rows[0].size, t), *rows, *view, pooled, torch.from_numpy(priced[rows[0]]).float(),
                            route, admit, price, route, route)  # fmt: skip
            value = self.scale.unscaled(self.critic(view[0], view[1], view[2], pooled))
            taken.append(one._replace(log_prob=joint(*probs, one), value=value))

            self.actions.route[...] = HOLD
            self.actions.route[rows] = route.numpy()
            terms = self.actions.terms[rows]
            set_admit(self.actions._replace(terms=terms), admit.numpy())
            self.actions.terms[rows] = terms
            self.actions.price[rows] = price.numpy()
            batch.step(self.actions)
            # What arrivals bring does not depend on decisions, and is only noise here.
            reward[t] = (batch.reward - batch.given) / self.worth[:, None]
            elapsed_s[t], cut[t] = batch.elapsed_s, batch.over
            agent_steps += int(batch.markets.market["n_providers"][batch.elapsed_s > 0].sum())
            if cut[t].any():
                cut_value[t] = self.values(self.summary())
                for b in np.nonzero(cut[t])[0]:
                    planned = next(self.plans)
                    batch.reset(int(b), planned)
                    self.worth[b] = worth_per_s(planned)
        columns = zip(*taken, strict=True)
        decisions = Decisions(*(np.concatenate(c) if isinstance(c[0], np.ndarray) else torch.cat(c) for c in columns))
        last_value = self.values(self.summary())
        return Rollout(decisions, reward, elapsed_s, cut, cut_value, last_value, agent_steps)


# Update.


def targets(rollout: Rollout, args: Args) -> tuple[Tensor, Tensor]:
    """Advantage and return [M] of each decision."""
    d = rollout.decisions
    at = (d.step, d.market, d.provider)
    decided = np.zeros(rollout.reward.shape, np.bool_)
    value = np.zeros(rollout.reward.shape, np.float32)
    decided[at] = True
    value[at] = d.value.numpy()
    advantage = estimate(
        rollout.reward, rollout.elapsed_s, decided, value, rollout.cut, rollout.cut_value, rollout.last_value,
        args.gamma, args.gae_lambda,
    )  # fmt: skip
    picked = torch.from_numpy(advantage[at])
    return picked, picked + d.value


class Learner:
    """Adam over actor and critic."""

    def __init__(self, args: Args, actor: Actor, critic: Critic, scale: ValueScale) -> None:
        self.args, self.actor, self.critic, self.scale = args, actor, critic, scale
        self.parameters = [*actor.parameters(), *critic.parameters()]
        self.optimiser = torch.optim.Adam(self.parameters, lr=args.learning_rate, eps=1e-5)
        self.generator = torch.Generator().manual_seed(args.seed + 1)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """PPO on one rollout; returns the means of what is logged."""
        args, d = self.args, rollout.decisions
        torch.set_num_threads(args.threads)
        advantage, returns = targets(rollout, args)
        self.scale.update(returns)
        goal = (returns - self.scale.mean) / self.scale.std
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        sums: dict[str, float] = {}
        for _ in range(args.epochs):
            order = torch.randperm(len(goal), generator=self.generator)
            for part in order.chunk(args.minibatches):
                batch = Decisions(d.step, d.market, d.provider, *(column[part] for column in d[3:]))
                for name, x in self.descend(batch, advantage[part], goal[part]).items():
                    sums[name] = sums.get(name, 0.0) + x / (args.epochs * args.minibatches)
        return sums | {"return": float(returns.mean()), "decisions": float(len(goal))}

    def descend(self, d: Decisions, advantage: Tensor, goal: Tensor) -> dict[str, float]:
        """One gradient step on a minibatch."""
        args = self.args
        probs = log_probs(self.actor, d.nodes, d.request, d.me, d.routes)
        log_ratio = joint(*probs, d) - d.log_prob
        ratio = log_ratio.exp()
        policy_loss = -torch.min(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage).mean()
        value_loss = nn.functional.huber_loss(self.critic(d.nodes, d.request, d.me, d.summary), goal, delta=10.0)
        entropy = -(probs[0].exp() * probs[0].clamp_min(-50.0)).sum(-1).mean()
        loss = policy_loss + value_loss - args.entropy * entropy
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm)
        self.optimiser.step()
        with torch.no_grad():
            kl = ((ratio - 1) - log_ratio).mean()
            clipped = ((ratio - 1).abs() > args.clip).float().mean()
        named = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "kl": kl, "clipped": clipped,
                 "grad_norm": norm}  # fmt: skip
        return {name: float(x.detach()) for name, x in named.items()}

    def anneal(self, progress: float) -> None:
        """Set the learning rate for this share of the run."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.args.learning_rate * max(0.0, 1.0 - progress)


# Evaluation.


def validate(policy: Policy, plans: dict[str, list[MarketPlan]], threads: int) -> dict[str, float]:
    """Mean score of a policy in each family of validation markets: SLO AUC, or goodput value with classes."""
    every = [(name, planned) for name, group in plans.items() for planned in group]
    batch = MarketBatch([planned for _, planned in every], threads=threads)
    actions = batch.actions()
    while not batch.over.all():
        policy.decide(batch.views, batch.active, batch.dice, actions)
        batch.step(actions)
    scores: dict[str, list[float]] = {}
    for b, (name, planned) in enumerate(every):
        measured = measure(batch.requests(b), planned.scenario)
        scores.setdefault(name, []).append(float(measured[score(planned.scenario.slo)]))  # type: ignore[arg-type]
    return {name: float(np.mean(each)) for name, each in scores.items()}


def regrets(scores: dict[str, float], rules: dict[str, dict[str, float]]) -> dict[str, float]:
    """How far a policy is below the best rule in each family; negative where it is above."""
    return {name: max(rule[name] for rule in rules.values()) - x for name, x in scores.items()}


def policy_of(actor: Actor) -> LearnedPolicy:
    """The actor as operators will run it."""
    return LearnedPolicy(weights_of(actor), {"name": "learned"})


# The run.


def train(args: Args) -> Actor:
    """Train, keep the policy that is best on validation markets, and return it."""
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    actor, critic = Actor(args.width, args.prior), Critic(args.width)
    scale = ValueScale(critic.last)
    collector, learner = Collector(args, actor, critic, scale), Learner(args, actor, critic, scale)
    plans = validation_plans(args)
    rules = {name: validate(Rule(name), plans, args.threads) for name in RULES}
    log = start_log(args)
    best, best_weights = math.inf, {k: v.clone() for k, v in actor.state_dict().items()}
    agent_steps, update, start_s = 0, 0, time.perf_counter()
    spent = {"rollout": 0.0, "update": 0.0, "evaluation": 0.0}
    with open(args.out / "progress.jsonl", "w") as progress, tqdm(total=args.agent_steps, unit="step", unit_scale=True,
                                                                   dynamic_ncols=True) as bar:  # fmt: skip
        while True:
            last = agent_steps >= args.agent_steps
            if update % args.evaluate_every == 0 or last:
                began_s = time.perf_counter()
                scores = validate(policy_of(actor), plans, args.threads)
                behind = regrets(scores, rules)
                worst, mean = max(behind.values()), float(np.mean(list(behind.values())))
                if worst + mean < best:
                    best, best_weights = worst + mean, {k: v.clone() for k, v in actor.state_dict().items()}
                line = {"seconds": time.perf_counter() - start_s, "agent_steps": agent_steps, "scores": scores}
                progress.write(json.dumps(line | ({"rules": by_family(rules)} if update == 0 else {})) + "\n")
                progress.flush()
                log({"worst_regret": worst, "mean_regret": mean} | {f"score/{k}": v for k, v in scores.items()})
                spent["evaluation"] += time.perf_counter() - began_s
            if last:
                break
            learner.anneal(agent_steps / args.agent_steps)
            began_s = time.perf_counter()
            rollout = collector.collect()
            middle_s = time.perf_counter()
            logged = learner.update(rollout)
            spent["rollout"] += middle_s - began_s
            spent["update"] += time.perf_counter() - middle_s
            agent_steps += rollout.agent_steps
            update += 1
            rate = agent_steps / (spent["rollout"] + spent["update"])
            log(logged | {"agent_steps": agent_steps, "agent_steps_per_s": rate})
            bar.update(min(rollout.agent_steps, bar.total - bar.n))
            bar.set_postfix_str(f"worst regret {worst:+.4f} mean {mean:+.4f} kl {logged['kl']:.3f} {rate / 1e3:.0f}k/s")
    actor.load_state_dict(best_weights)
    seconds = time.perf_counter() - start_s
    print(f"trained {agent_steps:,} agent-steps in {seconds:.0f} s ({agent_steps / seconds:,.0f}/s): "
          + ", ".join(f"{k} {v:.0f} s" for k, v in spent.items()))  # fmt: skip
    return actor


def by_family(rules: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Scores by family, then rule."""
    return {family: {rule: scores[family] for rule, scores in rules.items()} for family in next(iter(rules.values()))}


def start_log(args: Args) -> Any:
    """A function that logs a mapping of numbers."""
    if not args.wandb:
        return lambda numbers: None
    import wandb

    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    run = wandb.init(project="wwwserve", dir=args.out, config=json.loads(json.dumps(asdict(args), default=str)))
    return run.log


def refuse(reason: str) -> int:
    """Say why a run is not started; returns the exit status."""
    print(f"mappo: {reason}", file=sys.stderr)
    return 2


def report(args: Args) -> None:
    """Compare the saved policy with every rule and router on the test seeds; print the tables, draw the figures."""
    scenarios: list[Scenario] = [load_scenario(name) for name in args.scenarios]

    policies = [load(args.out / "policy"), *(Rule(name) for name in RULES), *(Oracle(name) for name in ORACLES)]
    seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + args.compare_seeds)
    result = compare(scenarios, policies, seeds, threads=args.threads)
    write_json(args.out / "comparison.json", result)
    for scenario in scenarios:
        print(table(result, scenario), end="\n\n")
    draw(args.out / "comparison.json", args.out / "figures", args.out / "progress.jsonl")
    print(f"policy: {args.out / 'policy'}   figures: {args.out / 'figures'}   numbers: {args.out / 'comparison.json'}")


def main() -> None:
    """Command line; a bad argument is refused before anything runs."""
    try:
        args = tyro.cli(Args)
        for name in args.scenarios:
            load_scenario(name)
    except ValueError as error:
        sys.exit(refuse(str(error)))
    actor = train(args)
    save(actor, args.out / "policy", {"name": "learned", "training": json.loads(json.dumps(asdict(args), default=str))})
    if args.compare_seeds:
        report(args)


if __name__ == "__main__":
    main()
