"""Live against simulated: the same requests, through real processes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import yaml

from wwwserve.agents.arguments import UsageError
from wwwserve.agents.hardware import profile
from wwwserve.envs.scenario import Misreport, Scenario, load, parse
from wwwserve.envs.state import plan
from wwwserve.eval.live import networks
from wwwserve.eval.live import trial as command
from wwwserve.eval.live.networks import check, check_lengths, node, remote
from wwwserve.eval.policies import load_policy
from wwwserve.serving.config import parse as parse_node
from wwwserve.serving.local_nodes import Engines, Plan, running


def busy(rate_per_s: float) -> dict[str, Any]:
    return {"kind": "poisson", "phases": [{"until_s": 60, "rate_per_s": rate_per_s}]}


LENGTHS = {"prompt": {"median": 200, "sigma": 0.3, "max": 500}, "output": {"median": 300, "sigma": 0.3, "max": 600}}
MAPPING: dict[str, Any] = {
    "name": "short",
    "duration_s": 60,
    "drain_s": 60,
    "slo": {"thresholds_s": [10, 20, 40]},
    "defaults": {"lengths": LENGTHS, "max_num_seqs": 4, "serves": ["qwen3"]},
    "providers": [
        {"name": "full", "gpu": "rtx-3090", "traffic": busy(1.2)},
        {"name": "idle", "gpu": "rtx-3090", "traffic": busy(0.1)},
    ],
}


def test_what_is_measured_stands_beside_what_is_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = tmp_path / "short.yaml"
    scenario.write_text(yaml.safe_dump(MAPPING))
    out = tmp_path / "out.json"
    arguments = [str(scenario), "--policy", "single", "earliest_finish", "--runs", "1", "--speed", "8", "--stream"]
    assert command.main([*arguments, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    cells, predicted = result["scenarios"]["short"], result["predicted"]["short"]
    arrivals = plan(load(scenario), command.FIRST_TEST_SEED).traffic.time_s.size
    for name in ("single", "earliest_finish"):
        mine, theirs = cells[name], predicted[name]
        assert mine["requests"] == theirs["requests"] == arrivals and mine["failed"] == 0
        assert set(theirs) <= set(mine)
        assert 0 < mine["first_token_s"]["mean"][0] < mine["latency_s"]["mean"][0]
        assert mine["lag_s"] >= 0 and mine["cpu_cores"]["nodes"][0] > 0 and mine["cpu_cores"]["engines"][0] > 0
        gap = mine["slo_auc"][0] - theirs["slo_auc"][0]
        assert result["gap"]["short"][name]["slo_auc"][0] == pytest.approx(gap)
    # One node alone has three times the load that it sustains; two have room.
    assert predicted["earliest_finish"]["slo_auc"][0] > predicted["single"]["slo_auc"][0] + 0.2
    paired = cells["earliest_finish"]["slo_auc"][0] - cells["single"]["slo_auc"][0]
    assert result["paired"]["scenarios"]["short"]["earliest_finish"]["slo_auc"][0] == pytest.approx(paired)
    shown = capsys.readouterr().out
    assert "live" in shown and "simulated" in shown


def test_a_network_that_runs_is_used_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = tmp_path / "short.yaml"
    short: dict[str, Any] = {"kind": "poisson", "phases": [{"until_s": 10, "rate_per_s": 0.5}]}
    providers = [each | {"traffic": short} for each in MAPPING["providers"]]
    scenario.write_text(yaml.safe_dump({**MAPPING, "duration_s": 10, "providers": providers}))
    file, out = tmp_path / "network.yaml", tmp_path / "out.json"
    plan_ = Plan(nodes=2, base_port=0, policy="single", gpu="rtx-4090", model="qwen3-8b", max_num_seqs=8, speed=10.0)
    with running(plan_) as network:
        file.write_text(yaml.safe_dump({"nodes": network.urls}))
        arguments = [str(scenario), "--network", str(file), "--runs", "1", "--speed", "10", "--json", str(out)]
        assert command.main([*arguments, "--policy", "single"]) == 0
        assert command.main([*arguments, "--policy", "www_serve"]) == 2
        assert "runs the policy single, expected www_serve" in capsys.readouterr().err
        assert command.main([*arguments, "--speed", "1", "--policy", "single"]) == 2
        assert "runs at speed 10" in capsys.readouterr().err
    result = json.loads(out.read_text())
    assert result["scenarios"]["short"]["single"]["unfinished"] == 0
    assert [each["max_num_seqs"] for each in result["network"]["profiles"]] == [8, 8]
    assert command.main([*arguments, "--policy", "single"]) == 2
    assert "does not answer as a node" in capsys.readouterr().err


def test_a_node_knows_of_its_users_what_its_simulated_self_knows() -> None:
    for name in ("market/deadlines", "paper/mixed-models", "trace/azure-conv"):
        scenario = load(name)
        planned = plan(scenario, 3)
        for i, profile_ in enumerate(planned.profiles):
            written = node(scenario, planned, i, "single", 4.0)
            written["key"] = "made when it starts"
            written["engine"] = {"url": "http://127.0.0.1:1", "profile": {"kind": "measured", **vars(profile_)}}
            config = parse_node(json.loads(json.dumps(written)), name)
            agreed = config.agreed()
            count = max(1, len(scenario.slo.classes))
            np.testing.assert_allclose(agreed.known, planned.known[i, :count])
            np.testing.assert_array_equal(agreed.deadlines, planned.deadlines)
            assert config.engine_profile() == profile_ and agreed.gossip_s == scenario.gossip_interval_s


def changed(scenario: Scenario, **change: Any) -> Scenario:
    first, *others = scenario.providers
    return replace(scenario, providers=(replace(first, **change), *others))


def test_what_cannot_be_played_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = parse(MAPPING)
    check(scenario)
    with pytest.raises(UsageError, match="full misreports"):
        check(changed(scenario, misreport=Misreport(0.5, 1.0)))
    with pytest.raises(UsageError, match="full is offline"):
        check(changed(scenario, online_s=((0.0, 30.0),)))
    with pytest.raises(UsageError, match="duels"):
        check(replace(scenario, economy=replace(scenario.economy, duel_probability=0.5)))
    planned = plan(scenario, 0)
    small = replace(profile("rtx-3090", "qwen3-8b", 4), max_model_len=300)
    with pytest.raises(UsageError, match=r"a request has \d+ tokens with its answer, the smallest engine takes 300"):
        check_lengths(planned, [*planned.profiles, small])
    file = tmp_path / "network.yaml"
    for text, message in (
        ("nodes: [http://127.0.0.1:1]", "has 1 nodes, expected 2"),
        ("- a", "expected a mapping with nodes"),
        ("nodes: {", "network.yaml"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            remote(file, scenario, load_policy("single"), 1.0)  # type: ignore[arg-type]
    for arguments, message in (
        (["--policy", "omniscient"], "sees what no node can"),
        (["--policy", "nobody"], "no rule"),
        (["--policy", "single", "single"], "given twice"),
        (["--speed", "0"], "expected 0.01 to 100"),
        (["--json", str(tmp_path / "no" / "where.json")], "not a folder"),
        (["--network", str(file)], "takes one --policy"),
        (["--engine", "vllm", "--speed", "2"], "goes with --speed 1"),
        (["--client", "curl"], "--client"),
    ):
        assert command.main(["paper/alternating", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_sessions_are_played_turn_by_turn_and_hit_what_simulated_ones_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sessions = {
        "kind": "sessions", "rate_per_s": 0.2, "system_tokens": 200, "turns": {"median": 4, "sigma": 0.4, "max": 8},
        "turn": {"median": 80, "sigma": 0.6, "max": 400}, "think_s": {"median": 3, "sigma": 0.5, "max": 10},
    }  # fmt: skip
    mapping = MAPPING | {
        "defaults": {"lengths": {"output": {"median": 60, "sigma": 0.4, "max": 200}}, "serves": ["qwen3"]},
        "providers": [{"name": name, "gpu": "rtx-3090", "traffic": sessions} for name in ("a", "b")],
    }
    scenario, out = tmp_path / "sessions.yaml", tmp_path / "out.json"
    scenario.write_text(yaml.safe_dump(mapping))
    arguments = [str(scenario), "--policy", "single", "--runs", "1", "--speed", "8", "--stream"]
    assert command.main([*arguments, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    mine, theirs = result["scenarios"]["short"]["single"], result["predicted"]["short"]["single"]
    planned = plan(load(scenario), command.FIRST_TEST_SEED).traffic
    assert mine["failed"] == 0 and (planned.follows < 0).sum() < mine["requests"] <= planned.time_s.size
    assert abs(mine["requests"] - theirs["requests"]) <= 0.2 * theirs["requests"]  # by when the last ones think
    assert mine["prefix_hit"][0] == pytest.approx(theirs["prefix_hit"][0], abs=0.05) and mine["prefix_hit"][0] > 0.3
    assert "cached" in capsys.readouterr().out


def test_agents_of_the_openai_client_hit_what_simulated_ones_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short form of `wwwserve trial sessions/agents --client openai`; all sessions come to their end, and all clients
    are closed: one that is collected later closes itself, on whichever loop runs then."""
    made, client = list[openai.AsyncOpenAI](), openai.AsyncOpenAI
    monkeypatch.setattr(openai, "AsyncOpenAI", lambda **options: made.append(client(**options)) or made[-1])
    agents = {
        "kind": "sessions", "system_tokens": 600, "turns": {"median": 5, "sigma": 0.4, "max": 8},
        "turn": {"median": 150, "sigma": 0.8, "max": 1000}, "think_s": {"median": 1.5, "sigma": 0.5, "max": 5},
    }  # fmt: skip
    mapping = MAPPING | {
        "defaults": {"lengths": {"output": {"median": 60, "sigma": 0.5, "max": 200}}, "serves": ["qwen3"]},
        "providers": [
            {"name": n, "gpu": "rtx-3090", "traffic": agents | {"phases": [{"until_s": 8, "rate_per_s": rate}]}}
            for n, rate in (("a", 2.0), ("b", 0.8), ("c", 0.4), ("d", 0.3))
        ],
    }
    scenario, out = tmp_path / "agents.yaml", tmp_path / "out.json"
    scenario.write_text(yaml.safe_dump(mapping))
    arguments = [str(scenario), "--policy", "cooperative", "--runs", "1", "--speed", "2", "--client", "openai"]
    assert command.main([*arguments, "--stream", "--json", str(out)]) == 0
    assert len(made) == 4 and all(each.is_closed() for each in made)
    result = json.loads(out.read_text())
    mine, theirs = result["scenarios"]["short"]["cooperative"], result["predicted"]["short"]["cooperative"]
    assert mine["failed"] == 0 and mine["requests"] == theirs["requests"] > 60
    assert 0 < mine["first_token_s"]["mean"][0] < mine["latency_s"]["mean"][0]
    within = 0.03 if mine["lag_s"] < 0.2 else 0.1  # where users are late, loads are others, and sessions move
    assert mine["prefix_hit"][0] == pytest.approx(theirs["prefix_hit"][0], abs=within) and mine["prefix_hit"][0] > 0.6


def test_engines_have_one_measured_profile_with_what_their_kv_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def no_engines(models: list[str], kv_tokens: int) -> Iterator[Engines]:
        yield Engines([f"http://e{k}" for k in range(len(models))], [])

    known = profile("rtx-3090", "qwen3-8b", 4)
    monkeypatch.setattr(networks, "vllm", no_engines)
    monkeypatch.setattr(networks, "_measured", lambda urls, longest: known)
    with networks.vllm_servers(2, 512, 2560) as servers:
        # 80 blocks of 32 tokens, one of which is not used; a last block is half empty: 16 tokens, not 8, of 16 requests
        assert servers.profiles == [replace(known, kv_blocks=(79 * 32 - 16 * 8) // 16)] * 2
        assert servers.urls == ["http://e0", "http://e1"]
