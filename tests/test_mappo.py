"""The training script, run short; as a script, this file is training with few validation markets."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from wwwserve.agents.decision import AT_COST
from wwwserve.agents.policy.bundle import DEFAULT_BUNDLE, SHIPPED, load
from wwwserve.agents.policy.forward import LearnedPolicy
from wwwserve.agents.policy.network import weights_of
from wwwserve.agents.rules import Rule
from wwwserve.agents.tariff import MARKUPS
from wwwserve.envs.distribution import KINDS
from wwwserve.eval import regret
from wwwserve.eval.tuned import best_for
from wwwserve.train import mappo
from wwwserve.train.mappo import Args, Learner, Processes, ValueScale, seconds_to_beat
from wwwserve.train.rollout import Collector, Source

ROOT = Path(__file__).resolve().parent.parent
SHORT = [
    "--markets", "8", "--rollout-steps", "8", "--imitate-steps", "900", "--agent-steps", "2400",
    "--checkpoint-every", "2", "--validation-markets", "2", "--duration-s", "40", "--drain-s", "10",
    "--processes", "1", "--test-markets", "0", "--no-wandb", "--pairs", "4", "--pairs-s", "30", "--pool-every", "2",
]  # fmt: skip


def start(out: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    command = [sys.executable, *launcher, str(Path(__file__).resolve()), "--out", str(out), *SHORT, *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env, start_new_session=True
    )


def run(out: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    process = start(out, *arguments, launcher=launcher)
    try:
        stdout, stderr = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers, which are in sessions of their own
        stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def state_of(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / "resume.pt", weights_only=True)
    return state


def tensors(tree: Any) -> list[torch.Tensor]:
    """All numbers of a nested state, in order."""
    if isinstance(tree, dict):
        return [x for key in tree for x in tensors(tree[key])]
    if isinstance(tree, list | tuple):
        return [x for each in tree for x in tensors(each)]
    return [torch.as_tensor(tree)] if isinstance(tree, torch.Tensor | float | int) else []


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]


# Where there is a GPU, "cuda" is a device like any other and rightly not refused.
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
LEARNED = ("actor", "averaged", "critic", "optimiser", "scale", "best")


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit, but for what depends on the clock."""
    one, two = state_of(a), state_of(b)
    for key in LEARNED:
        left, right = tensors(one[key]), tensors(two[key])
        assert left and len(left) == len(right)
        for x, y in zip(left, right, strict=True):
            assert torch.equal(x, y), key
    for key in ("updates", "agent_steps", "lines", "checkpoint", "best"):
        assert one["progress"][key] == two["progress"][key], key
    for x, y in zip(lines_of(a), lines_of(b), strict=True):
        assert x.pop("seconds") > 0 or x["agent_steps"] == 0
        y.pop("seconds")
        assert x == y


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finished = run(out)
    assert finished.returncode == 0, finished.stderr
    assert "agent-steps in" in finished.stdout
    return out


# What a run leaves.


def test_a_run_leaves_a_policy_a_log_and_a_summary(done: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    assert summary["agent_steps"] >= 2400
    assert summary["agent_steps_per_s"] == pytest.approx(summary["agent_steps"] / summary["seconds"])
    assert set(summary["split_s"]) == {"rollout", "update", "validation"}
    assert 0 < sum(summary["split_s"].values()) <= summary["seconds"] * 1.01
    lines = lines_of(done)
    assert set(summary["seconds_to_beat"]) == set(next(iter(lines[0]["rules"].values())))
    for seconds in summary["seconds_to_beat"].values():
        assert seconds is None or seconds in {line["seconds"] for line in lines}
    assert summary["seeds"]["training"] == 1
    assert summary["seeds"]["validation_first"] < summary["seeds"]["test_first"]
    assert summary["processes"] == 1 and summary["device"] == "cpu"
    assert load(done / "policy").name == "learned"


def test_every_checkpoint_is_validated_against_the_rules(done: Path) -> None:
    lines = lines_of(done)
    assert lines[0]["agent_steps"] == 0 and lines[-1]["agent_steps"] >= 2400
    assert len(lines) >= 3
    fair = [name for name in lines[0]["rules"]["random/honest"] if name != "centralized"]
    for line in lines:
        behind = [max(rules[name] for name in fair) - line["scores"][f] for f, rules in lines[0]["rules"].items()]
        assert line["worst_regret"] == pytest.approx(max(behind))
        assert line["mean_regret"] == pytest.approx(float(np.mean(behind)))
    assert len({json.dumps(line["scores"]) for line in lines}) > 1  # it learns something
    assert state_of(done)["progress"]["best"] == lines[-1]["worst_regret"] + lines[-1]["mean_regret"]  # competitive
    posted = ["markup_posted" in line["learning"] for line in lines]
    assert posted[-1] and not posted[0]  # markups are learned from pairs once imitation is over
    assert "imitation_loss" in lines[1]["learning"] and "imitation_loss" not in lines[-1]["learning"]


def test_the_policy_is_the_one_that_was_kept(done: Path) -> None:
    best = state_of(done)["best"]
    weights = load(done / "policy").weights
    assert set(best) == set(weights)
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight, best[name].numpy())


@pytest.mark.parametrize(("team_weight", "kept"), [(1.0, 1), (0.0, 2)])
def test_a_team_keeps_the_best_on_validation_and_competitors_the_last(
    team_weight: float, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = mappo.Run(Args(out=tmp_path, team_weight=team_weight, wandb=False))
    scores = iter([0.2, 0.6, 0.4])
    monkeypatch.setattr(started.processes, "shared", lambda among, measure: {"random/honest": next(scores)})
    policies = []
    for k in range(3):
        with torch.no_grad():
            cast(Any, started.learner.averaged.module).prior.fill_(float(k))
        policies.append(started.learner.policy())
        started.checkpoint({}, {"single": {"random/honest": 0.5}})
    assert started.best["prior"] == policies[kept]["prior"] == kept


# Killed and resumed.


def test_a_run_killed_at_any_moment_and_resumed_ends_as_one_never_killed(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    rng = random.Random(os.getpid())
    process = start(out, "--resume")  # where nothing is, that is to begin
    try:
        deadline_s = time.monotonic() + 120
        while not (out / "resume.pt").exists() or len((out / "progress.jsonl").read_bytes().splitlines()) < 2:
            assert process.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.01)
        delay_s = rng.uniform(0.0, 0.5)
        time.sleep(delay_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, f"it was over after {delay_s} s"
    before = state_of(out)["progress"]
    assert before["agent_steps"] < 2400
    with open(out / "progress.jsonl", "a") as file:  # killed between the log and the checkpoint, in the midst of a line
        file.write('{"seconds": 9.0, "agent')
    (out / ".resume.pt").write_bytes(b"half")
    finished = run(out, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert_same_run(done, out)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["agent_steps"] == json.loads((done / "summary.json").read_text())["agent_steps"]
    assert summary["seconds"] > before["seconds"]


def test_another_runs_checkpoint_is_refused(done: Path) -> None:
    before = (done / "resume.pt").read_bytes(), (done / "progress.jsonl").read_bytes()
    finished = run(done, "--resume", "--gamma", "0.5")
    assert finished.returncode == 2
    refused = [line for line in finished.stderr.splitlines() if line.startswith("mappo: ")]
    assert len(refused) == 1 and "gamma 0.99, expected 0.5" in refused[0]
    assert "Traceback" not in finished.stderr
    assert ((done / "resume.pt").read_bytes(), (done / "progress.jsonl").read_bytes()) == before


# Two processes.


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    arguments = ("--agent-steps", "600", "--imitate-steps", "300", "--markets", "7", "--minibatches", "2",
                 "--pairs", "0")  # fmt: skip  # each process draws its pairs by itself
    one = run(tmp_path / "one", *arguments)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = run(tmp_path / "two", *arguments, launcher=launcher)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    states = [state_of(tmp_path / name) for name in ("one", "two")]
    assert states[0]["progress"]["agent_steps"] == states[1]["progress"]["agent_steps"]
    for key in ("actor", "critic", "scale"):
        for x, y in zip(*(tensors(state[key]) for state in states), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2


# Refusals.


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the script says when it refuses these arguments."""
    monkeypatch.setattr(sys, "argv", ["mappo.py", *arguments])
    monkeypatch.setattr(mappo, "launch", lambda processes: pytest.fail("it was not refused"))
    with pytest.raises(SystemExit) as stopped:
        mappo.main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--markets", "0"], "--markets is 0, expected at least 1"),
        (["--gamma", "1.5"], "--gamma is 1.5, expected 0 to 1"),
        (["--gae-lambda", "-0.1"], "--gae-lambda is -0.1, expected 0 to 1"),
        (["--team-weight", "2"], "--team-weight is 2"),
        (["--checkpoint-every", "0"], "--checkpoint-every is 0, expected at least 1"),
        (["--minibatches", "9", "--markets", "8"], "--minibatches is 9, expected at most --markets, 8"),
        (["--imitate-steps", "-1"], "--imitate-steps is -1, expected at least 0"),
        (["--learning-rate", "0"], "--learning-rate is 0.0, expected more than 0"),
        (["--clip", "nan"], "--clip is nan, expected more than 0"),
        (["--seed", "-3"], "--seed is -3, expected at least 0"),
        (["--share", "0"], "--share is 0.0, expected more than 0, at most 1"),
        (["--share", "1.5"], "--share is 1.5, expected more than 0, at most 1"),
        (["--critic-steps", "-1"], "--critic-steps is -1, expected at least 0"),
        (["--markets", "2", "--processes", "3", "--minibatches", "1"], "expected one for each of 3 processes"),
        (["--pairs", "1"], "--pairs is 1, expected 0, or one for each of 2 processes"),
        (["--markup-rate", "0"], "--markup-rate is 0.0, expected more than 0"),
        (["--adverts", "2"], "--adverts is 2.0, expected 0 to 1"),
        (["--prior-rate", "0"], "--prior-rate is 0.0, expected more than 0"),
        (["--settings-rate", "inf"], "--settings-rate is inf, expected more than 0"),
        (["--most-advantage", "inf"], "--most-advantage is inf, expected at least 0"),
        (["--pool-every", "0"], "--pool-every is 0, expected at least 1"),
        (["--test-seeds", "1"], "--test-seeds is 1, expected at least 2"),
        (["--device", "nothing"], "--device is nothing: "),
        pytest.param(
            ["--device", "cuda"],
            "--device is cuda: ",
            marks=WITHOUT_CUDA,
        ),
    ],
)
def test_a_bad_argument_is_refused_in_one_line_before_anything_runs(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shown = refused(monkeypatch, capsys, "--out", str(tmp_path / "run"), "--no-wandb", *arguments)
    assert named in shown and shown.startswith("mappo: ") and shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--kinds", "odd"], ["--reward", "odd"], ["--speed", "9"], ["--markets", "x"]])
def test_what_is_no_argument_is_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = refused(monkeypatch, capsys, "--out", str(tmp_path / "run"), "--no-wandb", *arguments)
    assert arguments[-1].lstrip("-") in shown and "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    shown = refused(monkeypatch, capsys, "--out", str(tmp_path / "file"), "--no-wandb")
    assert shown.startswith("mappo: ") and "file" in shown and shown.count("\n") == 1


# The parts.


def small(**changes: Any) -> tuple[Learner, Any]:
    """A learner, and a rollout of its untrained policy."""
    changes = {
        "markets": 6,
        "rollout_steps": 24,
        "wandb": False,
        "kinds": ("honest", "deadlines"),
    } | changes
    args = Args(**changes)
    learner = Learner(args, Processes())
    source = Source(1, args.kinds, 60.0, 10.0, 4000, 1000)
    reward = mappo.Reward(1.0, gamma=1.0, transfers=False, by_decision=True)
    collector = Collector(source, reward, args.markets)
    collector.renew(0)
    net = mappo.net_of(mappo.weights_of(learner.actor))
    experts = {kind: best_for(kind) for kind in KINDS}
    return learner, collector.collect(net, 0, args.rollout_steps, experts, draws_markups=True)


def test_imitation_comes_to_agree_with_the_expert() -> None:
    learner, rollout = small(learning_rate=3e-3)
    first = learner.update(rollout, 0, True)["imitation_loss"]
    for k in range(1, 8):
        last = learner.update(rollout, k, True)["imitation_loss"]
    assert last < 0.9 * first


def test_an_update_makes_better_decisions_likelier() -> None:
    """Pay for running a request at home, and for nothing else."""
    learner, rollout = small(imitation=0.0, entropy=0.0)
    batch, _ = learner.batch(rollout)
    at_home = batch.choice[:, 0] == 1
    batch = batch._replace(advantage=torch.where(at_home, 1.0, -1.0))
    free = batch.view.routes.sum(1) > 1
    assert at_home[free].any() and (~at_home[free]).any()

    def chance() -> float:
        with torch.no_grad():
            return float(torch.softmax(learner.actor(batch.view)[0], -1)[free, 1].mean())

    before = chance()
    for _ in range(40):
        learner.descend(batch, len(at_home), False)
    assert chance() > before + 0.03


def test_prior_and_settings_are_learned_as_much_faster_as_they_are_told() -> None:
    def moved(**faster: float) -> list[float]:
        learner, rollout = small(imitation=0.0, prior=0.1, learning_rate=1e-3, minibatches=1, **faster)
        at = [learner.actor.prior, learner.actor.setting.bias, learner.actor.hold.bias]
        before = [x.detach().clone() for x in at]
        learner.anneal(0.5)
        learner.update(rollout, 0, False)
        return [float((x.detach() - old).abs().max()) for x, old in zip(at, before, strict=True)]

    usual = 0.5e-3
    assert moved() == pytest.approx([usual] * 3, rel=0.05)
    assert moved(prior_rate=50.0, settings_rate=10.0) == pytest.approx([50 * usual, 10 * usual, usual], rel=0.05)


def test_advantages_are_cut_at_so_many_deviations() -> None:
    whole, cut = (small(most_advantage=most) for most in (0.0, 0.5))
    free, bounded = (learner.batch(rollout)[0].advantage for learner, rollout in (whole, cut))
    assert float(free.std()) == pytest.approx(1.0, abs=0.1) and float(free.abs().max()) > 1.0
    assert torch.equal(bounded, free.clamp(-0.5, 0.5))


def markup_weights(learner: Learner) -> list[torch.Tensor]:
    layer = learner.actor.layers().markup
    return [layer.weight.detach().clone(), layer.bias.detach().clone()]


@pytest.mark.parametrize(
    ("changes", "learned"),
    [({"pairs": 0}, True), ({}, False), ({"markups": False}, False), ({"team_weight": 1.0}, False)],
)
def test_markups_are_credited_like_routes_only_without_pairs(changes: dict[str, Any], learned: bool) -> None:
    learner, rollout = small(imitation=0.0, markup_entropy=0.0, **changes)
    before = markup_weights(learner)
    learner.update(rollout, 0, False)
    same = [torch.equal(old, now) for old, now in zip(before, markup_weights(learner), strict=True)]
    assert same == [not learned] * 2


def test_without_imitation_no_expert_is_needed() -> None:
    learner, rollout = small(imitation=0.0)
    rollout = rollout._replace(decisions=rollout.decisions._replace(expert=np.full_like(rollout.decisions.expert, -1)))
    assert np.isfinite(learner.update(rollout, 0, False)["policy_loss"])


@pytest.mark.parametrize("team_weight", [1.0, 0.5])
def test_a_markup_that_is_not_learned_is_imitated_to_the_end(team_weight: float) -> None:
    """PPO moves the layers below it, so it would drift."""
    learner, rollout = small(imitation=0.3, entropy=0.0, learning_rate=3e-3, team_weight=team_weight, markups=False)
    batch, _ = learner.batch(rollout)
    batch = batch._replace(advantage=torch.zeros_like(batch.advantage))
    assert (batch.expert[:, 1] == AT_COST).all()
    due = batch.advertised > 0
    assert due.any()

    def agreed() -> float:
        with torch.no_grad():
            chances = torch.softmax(learner.actor(batch.view)[1], -1)
        return float(chances.gather(-1, batch.expert[:, 1:2])[due].mean())

    before = agreed()
    for _ in range(20):
        learner.descend(batch, len(batch.expert), False)
    assert agreed() > before + 0.1


def test_a_markup_is_learned_only_where_it_is_advertised() -> None:
    learner, rollout = small(imitation=0.0, entropy=0.0, markup_entropy=0.0, pairs=0)
    batch, _ = learner.batch(rollout)
    rows = torch.nonzero(batch.advertised == 0)[:, 0]
    assert 0 < len(rows) < len(batch.advertised)
    before = markup_weights(learner)
    learner.descend(batch.pick(rows), len(rows), False)
    assert all(torch.equal(old, now) for old, now in zip(before, markup_weights(learner), strict=True))


def test_what_was_all_but_impossible_and_is_likely_now_leaves_weights_numbers() -> None:
    """The ratio of the chances is more than a float holds."""
    learner, rollout = small(imitation=0.0, entropy=0.0, learning_rate=1e-3)
    batch, _ = learner.batch(rollout)
    batch = batch._replace(log_prob=torch.full_like(batch.log_prob, -200.0), advantage=torch.ones_like(batch.advantage))
    learner.descend(batch, len(batch.expert), False)
    assert all(bool(torch.isfinite(p).all()) for p in learner.actor.parameters())


def test_experts_are_best_value_and_where_to_hold_is_better_the_rule_tuned_for_that(tmp_path: Path) -> None:
    team, own = (mappo.Run(Args(out=tmp_path, team_weight=x, wandb=False)).experts for x in (1.0, 0.0))
    held = {kind: each.name for kind, each in team.items() if each.name != "best_value"}
    assert held == {kind: best_for(kind).name for kind in ("bursts", "deadlines")} and set(team) == set(KINDS)
    assert {each.name for each in own.values()} == {"best_value"} and set(own) == set(KINDS)


def test_training_can_begin_with_a_policy(tmp_path: Path) -> None:
    run = mappo.Run(Args(out=tmp_path, warm_start=SHIPPED["cooperative"], wandb=False))
    weights = load(SHIPPED["cooperative"]).weights
    assert all(np.array_equal(weights[name], weight) for name, weight in weights_of(run.learner.actor).items())


def test_a_deviator_begins_as_the_others_and_plays_alone_among_them(tmp_path: Path) -> None:
    args = Args(out=tmp_path, wandb=False, against=DEFAULT_BUNDLE, markets=5, minibatches=1, duration_s=60.0,
                drain_s=10.0, kinds=("honest",))  # fmt: skip
    started = mappo.Run(args)
    frozen = load(DEFAULT_BUNDLE).weights
    for weights in (mappo.weights_of(started.learner.actor), started.learner.policy(), started.pool[0]):
        for name, weight in frozen.items():
            np.testing.assert_array_equal(weights[name], weight)
    started.collector.renew(0)
    opponents = [mappo.net_of(each) for each in started.pool]
    d = started.collector.collect(
        opponents[0], 0, 60, {}, draws_markups=True, markups=True, adverts=1.0, opponents=opponents
    ).decisions
    learned = set(zip(d.market.tolist(), d.provider.tolist(), strict=True))
    assert len(learned) == len({market for market, _ in learned}) >= 4
    with pytest.raises(ValueError, match="--width is 16, the policy to begin with has 32"):
        mappo.Run(replace(args, width=16))


def test_a_deviators_markups_are_tried_against_the_frozen_others_and_it_imitates_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = mappo.Run(Args(out=tmp_path, wandb=False, against=DEFAULT_BUNDLE, pairs=1, processes=1))
    assert run.args.imitation == run.learner.args.imitation == 0.0 and run.args.imitate_steps == 0
    tried: list[tuple[LearnedPolicy, LearnedPolicy | None]] = []
    monkeypatch.setattr(mappo, "play_pairs", lambda policy, plans, pairs, rng, others: tried.append((policy, others)))
    with torch.no_grad():
        run.learner.actor.layers().markup.bias[3] = 7.0
    run.notches()
    [(policy, others)] = tried
    assert others is not None and policy.weights["markup.bias"][3] == 7.0
    for name, weight in load(DEFAULT_BUNDLE).weights.items():
        np.testing.assert_array_equal(others.weights[name], weight)
    mappo.Run(Args(out=tmp_path, wandb=False, pairs=1, processes=1)).notches()
    assert tried[1][1] is None  # else all play the policy


def test_with_pairs_nothing_else_moves_the_markup() -> None:
    """Its entropy as a part of the policy's loss would be scaled up to full steps by Adam."""
    learner, rollout = small(team_weight=0.0, pairs=8, markup_entropy=0.5)
    before = weights_of(learner.actor)
    learner.update(rollout, 0, False)
    after = weights_of(learner.actor)
    assert all(np.array_equal(before[name], after[name]) for name in ("markup.weight", "markup.bias"))
    assert not np.array_equal(before["score.weight"], after["score.weight"])


def test_a_policy_begins_at_cost_and_a_team_whatever_it_sees() -> None:
    for team_weight, pays in ((1.0, 1.0), (1.0, 0.5), (0.0, 1.0)):
        learner = Learner(Args(team_weight=team_weight, pays=pays, keep=pays / 2, processes=1), Processes())
        weights = weights_of(learner.actor)
        assert weights["pays"] == pays and weights["keep"] == pays / 2
        at = learner.actor.layers().markup
        assert int(at.bias.argmax()) == AT_COST and bool((at.weight == 0.0).all()) == (team_weight == 1.0)


def test_a_team_sells_as_the_best_rule_does_and_who_is_after_its_own_profit_at_all_of_its_cost(tmp_path: Path) -> None:
    best = Rule("best_value").settings
    assert best["markup"] == MARKUPS[AT_COST]
    for team_weight, pays, keep in ((1.0, best["pays"], best["keep"]), (0.5, 1.0, 0.0), (0.0, 1.0, 0.0)):
        run = mappo.Run(Args(out=tmp_path, team_weight=team_weight, wandb=False))
        weights = weights_of(run.learner.actor)
        assert (run.args.pays, run.args.keep) == (weights["pays"], weights["keep"]) == (pays, keep)
    given = mappo.Run(Args(out=tmp_path, team_weight=1.0, pays=0.0, keep=0.0, wandb=False))
    assert (given.args.pays, given.args.keep) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "drawn"),
    [({}, False), ({"pairs": 0}, True), ({"team_weight": 1.0}, False), ({"markups": False}, False)],
)
def test_markups_are_drawn_only_where_they_are_credited_like_routes(
    changes: dict[str, Any], drawn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def collect(*_: Any, **options: Any) -> None:
        assert options["draws_markups"] is drawn and options["adverts"] == 0.25
        raise Stop

    run = mappo.Run(
        Args(out=tmp_path, wandb=False, processes=1, markets=2, minibatches=1, adverts=0.25, duration_s=30.0, **changes)
    )
    monkeypatch.setattr(mappo, "validation_families", lambda args: {})
    monkeypatch.setattr(run, "checkpoint", lambda *_: None)
    monkeypatch.setattr(run.collector, "collect", collect)
    with pytest.raises(Stop):
        run.train()


@pytest.mark.parametrize("average", [0.0, 0.75])
def test_what_is_kept_is_an_average_of_the_last_updates(average: float) -> None:
    learner, rollout = small(average=average)
    expected = None
    for k in range(3):
        learner.update(rollout, k, True)
        now = {name: np.array(weight) for name, weight in mappo.weights_of(learner.actor).items()}
        if expected is None:
            expected = now  # there is nothing to average with at the first
        expected = {name: average * expected[name] + (1 - average) * now[name] for name in now}
    kept = learner.policy()
    assert expected is not None and set(kept) == set(expected)
    assert any(not np.array_equal(kept[name], now[name]) for name in now) == (average > 0)
    for name, weight in kept.items():
        np.testing.assert_allclose(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_a_minibatch_is_made_of_whole_markets_and_all_are_learned_from() -> None:
    learner, rollout = small(epochs=1, minibatches=2)
    seen: list[int] = []
    descend = learner.descend

    def count(d: Any, total: int, imitate: bool, paid: bool) -> dict[str, float]:
        assert len(d.choice) == total
        seen.append(total)
        return descend(d, total, imitate, paid)

    learner.descend = count  # type: ignore[method-assign]
    learner.update(rollout, 0, True)
    at = rollout.decisions
    of_each = np.bincount(at.market, minlength=6)
    assert len(seen) == 2 and sum(seen) == len(at.step)
    assert any(sum(of_each[list(three)]) == seen[0] for three in itertools.combinations(range(6), 3))


def test_the_critic_learns_only_from_what_is_paid() -> None:
    learner, rollout = small()

    def critic() -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in learner.critic.parameters()]

    before = critic()
    assert "value_loss" not in learner.update(rollout, 0, True, paid=False)
    assert all(torch.equal(old, now) for old, now in zip(before, critic(), strict=True))
    assert "value_loss" in learner.update(rollout, 1, True, paid=True)
    assert not any(torch.equal(old, now) for old, now in zip(before, critic(), strict=True))


def test_value_scale_follows_the_returns_and_leaves_the_values_as_they_were() -> None:
    last = torch.nn.Linear(16, 1)
    scale = ValueScale(last)
    rng = np.random.default_rng(2)
    hidden = torch.randn(50, 16)
    before = scale.unscaled(last(hidden))
    for _ in range(40):
        returns = rng.normal(5.0, 2.0, 4000)
        scale.update(float(returns.mean()), float((returns**2).mean()))
    torch.testing.assert_close(scale.unscaled(last(hidden)), before, rtol=1e-4, atol=1e-4)
    assert scale.mean == pytest.approx(5.0, abs=0.1) and scale.std == pytest.approx(2.0, rel=0.05)


def test_seconds_to_beat_a_rule_are_those_to_a_higher_mean_score() -> None:
    rule = {"random/honest": 0.5, "random/code": 0.7}
    scores = [(0.4, 0.75), (0.5, 0.7), (0.45, 0.78), (0.9, 0.9)]
    lines = [{"seconds": 10.0 * k, "scores": dict(zip(rule, each, strict=True))} for k, each in enumerate(scores)]
    assert seconds_to_beat(lines, rule) == 20.0
    assert seconds_to_beat(lines[:2], rule) is None


def test_policies_are_chosen_on_random_markets_alone() -> None:
    families = mappo.validation_families(Args(validation_markets=1))
    assert set(families) == {f"random/{kind}" for kind in KINDS}
    seeds = {planned.seed for plans in families.values() for planned in plans}
    assert seeds == {mappo.VALIDATION_SEED}


def few_families(*arguments: Any, **named: Any) -> regret.Families:
    """Of each family its first market."""
    return {name: plans[:1] for name, plans in FAMILIES(*arguments, **named).items()}


FAMILIES = regret.families

if __name__ == "__main__":
    regret.families = few_families
    regret.baselines = lambda: [Rule("single"), best_for("honest")]
    mappo.main()
