"""The training script, run short."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.network import Actor, Critic
from agents.runtime import load
from train.mappo import Args, Collector, Learner, ValueScale, joint, log_probs, training_plans, validation_plans

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--agent-steps", "6000", "--markets", "8", "--rollout-steps", "64", "--validation-markets", "1", "--no-wandb",
         "--scenarios", "paper/alternating-queue", "--threads", "1", "--kinds", "honest", "deadlines"]  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train" / "mappo.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)


def small(**changes) -> tuple[Collector, Learner]:
    args = Args(markets=6, rollout_steps=48, threads=1, wandb=False, **changes)
    torch.manual_seed(args.seed)
    actor, critic = Actor(args.width), Critic(args.width)
    scale = ValueScale(critic.last)
    return Collector(args, actor, critic, scale), Learner(args, actor, critic, scale)


def test_a_short_run_leaves_a_policy_a_log_a_comparison_and_figures(tmp_path):
    done = run("--out", str(tmp_path / "run"), *SHORT, "--compare-seeds", "2")
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "run" / "policy").manifest["training"]["agent_steps"] == 6000
    lines = [json.loads(line) for line in (tmp_path / "run" / "progress.jsonl").read_text().splitlines()]
    assert lines[0]["agent_steps"] == 0 and lines[-1]["agent_steps"] >= 6000
    assert "www_serve" in lines[0]["rules"]["honest"]
    cells = json.loads((tmp_path / "run" / "comparison.json").read_text())["scenarios"]["paper/alternating-queue"]
    assert {"learned", "www_serve", "centralized", "omniscient"} < set(cells)
    assert list((tmp_path / "run" / "figures").glob("*.png"))
    for name in cells:
        assert name in done.stdout


def test_one_seed_gives_one_policy_and_another_seed_another(tmp_path):
    policies = []
    for k, seed in enumerate(("5", "5", "6")):
        done = run("--out", str(tmp_path / str(k)), *SHORT, "--compare-seeds", "0", "--seed", seed)
        assert done.returncode == 0, done.stderr
        policies.append((tmp_path / str(k) / "progress.jsonl").read_text())
    scores = [[json.loads(line)["scores"] for line in text.splitlines()] for text in policies]
    assert scores[0] == scores[1]
    assert scores[0] != scores[2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--markets", "0"], "--markets is 0"), (["--gamma", "1.5"], "--gamma is 1.5"),
     (["--compare-seeds", "1"], "--compare-seeds is 1"), (["--scenarios", "paper/nothing"], "paper/nothing"),
     (["--kinds", "odd"], "odd")],
)  # fmt: skip
def test_a_bad_argument_is_refused_by_name_before_anything_runs(arguments, named, tmp_path):
    done = run("--out", str(tmp_path / "run"), "--no-wandb", *arguments)
    assert done.returncode == 2
    assert named in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_training_markets_are_never_those_of_validation():
    args = Args()
    seeds = {next(plans).seed for plans in [training_plans(args)] for _ in range(50)}
    assert not seeds & {p.seed for group in validation_plans(args).values() for p in group}


def test_what_is_stored_is_what_was_decided():
    collector, _ = small()
    rollout = collector.collect()
    d = rollout.decisions
    assert (d.routes.gather(1, d.route.unsqueeze(1)) == 1).all()
    with torch.no_grad():
        again = joint(*log_probs(collector.actor, d.nodes, d.request, d.me, d.routes), d)
    torch.testing.assert_close(again, d.log_prob, rtol=1e-4, atol=1e-4)
    assert len(torch.unique(d.route)) > 3
    assert rollout.agent_steps > 48 * 6


def test_markets_end_and_begin_anew_within_a_rollout():
    collector, _ = small(duration_s=60.0, drain_s=5.0)
    rollout = collector.collect()
    rollout_2 = collector.collect()
    assert rollout.cut.sum() + rollout_2.cut.sum() >= 3
    for each in (rollout, rollout_2):
        steps, markets = np.nonzero(each.cut)
        assert np.abs(each.cut_value[steps, markets]).max(initial=1e-9) > 0


def test_an_update_makes_better_decisions_likelier():
    collector, learner = small()
    rollout = collector.collect()
    d = rollout.decisions
    # Pay for running the request at home, and for nothing else.
    flat = torch.where(d.route == 1, 1.0, -1.0)
    before = log_probs(learner.actor, d.nodes, d.request, d.me, d.routes)[0][:, 1].detach()
    for _ in range(60):
        learner.descend(d, flat, torch.zeros_like(flat))
    after = log_probs(learner.actor, d.nodes, d.request, d.me, d.routes)[0][:, 1].detach()
    choice = d.routes.sum(1) > 1
    assert after[choice].exp().mean() > before[choice].exp().mean() + 0.1


def test_value_scale_follows_the_returns_and_leaves_the_values_as_they_were():
    critic = Critic(16)
    scale = ValueScale(critic.last)
    rng = np.random.default_rng(2)
    hidden = torch.randn(50, 16)
    before = scale.unscaled(critic.last(hidden))
    for _ in range(40):
        scale.update(torch.from_numpy(rng.normal(5.0, 2.0, 4000)))
    torch.testing.assert_close(scale.unscaled(critic.last(hidden)), before, rtol=1e-4, atol=1e-4)
    assert scale.mean == pytest.approx(5.0, abs=0.1) and scale.std == pytest.approx(2.0, rel=0.05)
