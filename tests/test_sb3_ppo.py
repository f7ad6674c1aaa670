"""Training with Stable-Baselines3: what a run leaves, its seeds, horizons, closed routes, and that it learns."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from wwwserve.agents.decision import WHAT_PAYS
from wwwserve.agents.view import HAS_REQUEST, Views
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.sb3 import observe
from wwwserve.envs.scenario import Scenario, load
from wwwserve.envs.state import INVALID, plan
from wwwserve.eval.metrics import measure
from wwwserve.eval.play import rollout
from wwwserve.train import sb3_ppo
from wwwserve.train.sb3_ppo import Args, SB3Policy, draw, make_env, make_model, parse, random_markets, train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def overload(tmp_path_factory) -> Path:
    """All users at a node that runs one request at a time and takes 2 s for it; beside it a fast and idle one."""
    lengths = {"prompt": {"median": 50, "sigma": 0.1, "max": 100}, "output": {"median": 100, "sigma": 0.1, "max": 150}}
    busy = {"kind": "poisson", "phases": [{"until_s": 60, "rate_per_s": 0.7}]}
    file = tmp_path_factory.mktemp("scenario") / "overload.yaml"
    providers = [{"name": "busy", "max_num_seqs": 1, "traffic": busy}, {"name": "idle", "gpu": "h100"}]
    scenario = {"name": "overload", "duration_s": 60, "drain_s": 5, "slo": {"thresholds_s": [4]},
                "defaults": {"lengths": lengths}, "providers": providers}  # fmt: skip
    file.write_text(yaml.safe_dump(scenario))
    return file


def short(tmp_path: Path, **changes: Any) -> Args:
    settings = {"agent_steps": 1, "markets": 2, "rollout_steps": 32, "minibatch": 64, "epochs": 2, "width": 16,
                "duration_s": 60.0, "drain_s": 10.0, "threads": 1}  # fmt: skip
    tmp_path.mkdir(exist_ok=True)
    return Args(out=tmp_path, **settings | changes)  # type: ignore[arg-type]


def weights(args: Args) -> dict[str, torch.Tensor]:
    return train(args, make_env(args))[0].policy.state_dict()


def slo_auc(policy: SB3Policy, scenario: Scenario) -> float:
    runs = rollout(scenario, policy, range(500, 508))
    return float(np.mean([measure(run.requests, scenario)["slo_auc"] for run in runs]))


def test_a_short_run_leaves_a_model_its_course_and_a_summary(overload, tmp_path):
    out = tmp_path / "new" / "run"
    done = subprocess.run(
        [sys.executable, str(ROOT / "train" / "sb3_ppo.py"), "--out", str(out), "--seed", "3", "--threads", "1",
         "--agent-steps", "500", "--markets", "2", "--rollout-steps", "32", "--providers", "5", "--kinds", "deadlines",
         "--learning-rate", "0.02", "--test-scenarios", str(overload), "--test-seeds", "2"],
        capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {file.name for file in out.iterdir()} == {"model.zip", "progress.csv", "summary.json"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seed"] == 3 and summary["arguments"]["kinds"] == ["deadlines"]
    assert summary["agent_steps"] == 640  # two rollouts of 32 steps of 2 markets of 5 providers
    assert summary["agent_steps_per_s"] == pytest.approx(640 / summary["seconds"])
    assert summary["test_seeds"] == [1_000_000, 1_000_001]
    cells = summary["table"]["overload"]
    assert list(cells) == ["sb3_ppo", "single", "www_serve", "earliest_finish"]
    assert cells["earliest_finish"]["slo_auc"][0] > cells["single"]["slo_auc"][0]
    difference = cells["single"]["slo_auc"][0] - cells["www_serve"]["slo_auc"][0]
    assert summary["paired"]["overload"]["single"]["slo_auc"][0] == pytest.approx(difference)
    for name in cells:
        assert name in done.stdout
    with open(out / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["time/total_timesteps"] for row in rows] == ["320", "640"]
    shares = summary["invalid_share"]
    assert shares["last_rollout"] == pytest.approx(float(rows[-1]["rollout/invalid_share"]))
    assert 0.3 < shares["training"] < 0.9 and 0 < shares["test"] < 1  # nothing is learned yet
    model = PPO.load(out / "model.zip", device="cpu")
    policy = SB3Policy(model, np.random.default_rng(3))
    tested = [measure(run.requests, load(str(overload)))["slo_auc"]
              for run in rollout(load(str(overload)), policy, summary["test_seeds"])]  # fmt: skip
    assert np.mean(tested) == pytest.approx(cells["sb3_ppo"]["slo_auc"][0])  # what was saved is what was tested
    assert policy.invalid / policy.decisions == pytest.approx(shares["test"])


def test_one_seed_gives_one_model_and_another_seed_another(tmp_path):
    one, two, other = (weights(short(tmp_path / str(k), seed=seed)) for k, seed in enumerate((4, 4, 5)))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith("weight"))


@pytest.mark.parametrize("rollouts", [1, 4])
def test_the_learning_rate_falls_to_zero_after_the_last_update(rollouts, tmp_path):
    """A run's length is rounded up; nothing of it is trained with a rate below zero."""
    args = short(tmp_path, agent_steps=rollouts * 32 * 2 * 4 - 5)  # steps of 2 markets of 4 providers, less a few
    model, trained = train(args, make_env(args))
    assert trained["agent_steps"] == rollouts * 256
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(args.learning_rate / rollouts)


def test_it_learns_to_hand_over(overload, tmp_path):
    """From answering hardly any request within 4 s to answering most."""
    args = short(tmp_path, scenario=str(overload), agent_steps=24_000, markets=16, minibatch=256, epochs=5,
                 learning_rate=3e-3, team_weight=1.0)  # fmt: skip
    env = make_env(args)
    before = slo_auc(SB3Policy(make_model(args, env), np.random.default_rng(0)), load(str(overload)))
    model, trained = train(args, make_env(args))
    policy = SB3Policy(model, np.random.default_rng(0))
    after = slo_auc(policy, load(str(overload)))
    assert before < 0.2 and after > 0.7
    assert policy.invalid / policy.decisions < trained["invalid_share"]["training"]


class Seen(BaseCallback):
    """Rewards and infos of every step, as they were before PPO added anything."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[np.ndarray] = []
        self.infos: list[list[dict[str, Any]]] = []

    def _on_step(self) -> bool:
        self.rewards.append(self.locals["rewards"].copy())
        self.infos.append(self.locals["infos"])
        return True


def test_a_horizon_is_bootstrapped_from_the_last_observation(overload, tmp_path):
    args = short(tmp_path, scenario=str(overload), rollout_steps=256, gamma=0.9)
    model, seen = make_model(args, make_env(args)), Seen()
    _, callback = model._setup_learn(1, seen)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, args.rollout_steps)
    added = model.rollout_buffer.rewards - np.array(seen.rewards)
    horizons = 0
    for t, infos in enumerate(seen.infos):
        for i, info in enumerate(infos):
            expected = 0.0
            if "terminal_observation" in info:
                horizons += 1
                with torch.no_grad():
                    last = torch.from_numpy(info["terminal_observation"][None])
                    expected = 0.9 * model.policy.predict_values(last).item()
                assert abs(expected) > 1e-4
            assert added[t, i] == pytest.approx(expected, abs=1e-5)
            starts = t + 1 < args.rollout_steps and model.rollout_buffer.episode_starts[t + 1, i]
            assert not starts or "terminal_observation" in info  # what follows belongs to another market
    assert horizons >= 4


def test_a_policy_plays_its_probabilities_and_counts_what_was_closed(overload, tmp_path):
    scenario = load("paper/mixed-hardware")
    args = short(tmp_path)
    policy = SB3Policy(make_model(args, make_env(args)), np.random.default_rng(0), "untrained")
    batch = MarketBatch([plan(scenario, seed) for seed in range(3)])
    actions, decided = batch.actions(), 0
    for _ in range(200):
        before = actions.route.copy()
        decided += int((batch.active & (batch.views.me[..., HAS_REQUEST] > 0.5)).sum())
        policy.decide(batch.views, batch.active, batch.uniforms, actions)
        np.testing.assert_array_equal(actions.route[~batch.active], before[~batch.active])
        batch.step(actions)
    assert policy.name == "untrained"
    assert policy.decisions == decided > 50
    assert policy.invalid == batch.markets.providers["counts"][..., INVALID].sum() > 10


def test_each_provider_gets_the_choice_for_its_own_view(tmp_path):
    args = short(tmp_path)
    model = make_model(args, make_env(args))
    with torch.no_grad():
        for layer in model.policy.mlp_extractor.policy_net[::2]:
            layer.weight.normal_()  # so that the view has much to say
        model.policy.action_net.weight.normal_(std=1e5)  # and chance nothing
    batch = MarketBatch([plan(load("paper/mixed-hardware"), seed) for seed in range(3)])
    actions, policy, seen = batch.actions(), SB3Policy(model, np.random.default_rng(0)), set()
    for _ in range(60):
        policy.decide(batch.views, batch.active, batch.uniforms, actions)
        for b, p in np.argwhere(batch.active):
            alone = observe(Views(*(array[b, p] for array in batch.views)))
            route, markup = model.predict(alone, deterministic=True)[0]
            assert (actions.route[b, p], actions.markup[b, p]) == (route, markup)
            np.testing.assert_array_equal(actions.admission[b, p], WHAT_PAYS)
            seen.add((route, markup))
        batch.step(actions)
    assert len(seen) > 3


def test_draw_gives_each_index_its_share_of_the_uniforms():
    shares = np.array([0.1, 0.0, 0.6, 0.3], np.float32)
    u = (np.arange(1000) + 0.5) / 1000
    drawn = draw(np.tile(shares, (1000, 1)), u)
    assert np.bincount(drawn, minlength=4).tolist() == [100, 0, 600, 300]
    assert draw(np.array([[0.0, 1.0]], np.float32), np.zeros(1)).tolist() == [1]
    short_of_one = np.array([[0.5, 0.4999999]], np.float32)  # rounding never leads past the last
    assert draw(short_of_one, np.array([1 - 1e-12])).tolist() == [1]


def test_training_pays_for_decisions_only(tmp_path):
    env = make_env(short(tmp_path, markets=4, team_weight=0.3))
    env.reset()
    given = 0.0
    for _ in range(30):
        _, rewards, _, _ = env.step(np.ones((env.num_envs, 2), np.int64))
        np.testing.assert_array_equal(rewards, (env.batch.reward - env.batch.given).reshape(-1))
        given += float(env.batch.given.sum())
    assert given > 0.1


def test_random_markets_have_the_set_providers_and_every_kind(tmp_path):
    draw_one = random_markets(short(tmp_path, kinds=("honest", "deadlines"), providers=6, duration_s=50.0))
    rng = np.random.default_rng(0)
    drawn = [draw_one(rng) for _ in range(12)]
    assert {len(each.providers) for each in drawn} == {6}
    assert {each.name for each in drawn} == {"honest", "deadlines"}
    assert {(each.duration_s, each.drain_s) for each in drawn} == {(50.0, 10.0)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--markets 0", "--markets is 0, expected at least 1"),
        ("--seed -1", "--seed is -1, expected at least 0"),
        ("--seed 4294967296", "--seed is 4294967296, expected less than 2^32"),
        ("--seed x", "--seed: invalid literal for int"),
        ("--gamma nan", "--gamma is nan, expected above 0 and at most 1"),
        ("--team-weight 1.5", "--team-weight is 1.5, expected 0 to 1"),
        ("--learning-rate 0", "--learning-rate is 0.0, expected a number above 0"),
        ("--entropy inf", "--entropy is inf, expected a number of at least 0"),
        ("--providers 9", "--providers is 9, expected 3 to 8"),
        ("--kinds", "--kinds is empty, expected at least one"),
        ("--kinds odd", "--kinds"),
        ("--scenario paper/nothing", "paper/nothing: file: got none of this name, expected a packaged scenario"),
        ("--test-scenarios paper/nothing", "paper/nothing: file: got none"),
        ("--test-scenarios paper/alternating paper/alternating", "--test-scenarios has one twice"),
        ("--test-seeds 1", "--test-seeds is 1, expected at least 2"),
        ("--nope 3", "Unrecognized options: --nope"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line_before_anything_is_written(
    arguments, said, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["sb3_ppo.py", "--out", str(out), *arguments.split()])
    with pytest.raises(SystemExit) as end:
        sb3_ppo.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("sb3_ppo: ") and error.count("\n") == 1
    assert said in error
    assert not out.exists()


def test_a_folder_that_cannot_be_is_refused(tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for out, said in ((file, "is a file, expected a folder"), (file / "run", "Not a directory")):
        monkeypatch.setattr(sys, "argv", ["sb3_ppo.py", "--out", str(out)])
        with pytest.raises(SystemExit) as end:
            sb3_ppo.main()
        assert end.value.code == 2
        assert f"--out {out}" in (error := capsys.readouterr().err) and said in error and error.count("\n") == 1
    assert file.read_text() == "mine"


def test_help_names_every_argument(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert not end.value.code
    shown = capsys.readouterr().out
    for name in Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown
