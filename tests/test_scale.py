"""`eval.scale`: markets of every size with the same load, and its command."""

import json
from pathlib import Path

import pytest

from wwwserve.agents.hardware import profile
from wwwserve.agents.rules import Rule
from wwwserve.envs.distribution import capacity_per_s
from wwwserve.eval import scale


@pytest.mark.parametrize("size", [4, 8, 64])
def test_load_is_the_same_share_of_capacity_at_every_size(size: int) -> None:
    providers = scale.market(size).providers
    assert len(providers) == size and len({p.name for p in providers}) == size
    rate = sum(phase.rate_per_s / 2 for p in providers for phase in p.traffic.phases)  # two halves of equal length
    engines = [profile(p.gpu, p.model, p.max_num_seqs) for p in providers]
    capacity = sum(capacity_per_s(each, scale._PROMPT, [(1.0, scale._OUTPUT)]) for each in engines)
    assert rate / capacity == pytest.approx(scale.LOAD, rel=1e-6)


def test_half_of_the_load_comes_early_and_half_late() -> None:
    first, second = ({phase.rate_per_s for phase in p.traffic.phases} for p in scale.market(4).providers[1:3])
    early, late = (p.traffic.phases for p in scale.market(4).providers[1:3])
    assert early[0].rate_per_s < early[1].rate_per_s and late[0].rate_per_s > late[1].rate_per_s
    assert len(first) == len(second) == 2


def test_sharing_is_worth_something_and_takes_time() -> None:
    alone, _ = scale.play(Rule("single"), scale.market(4), range(3), threads=1)
    shared, microseconds = scale.play(Rule("earliest_finish"), scale.market(4), range(3), threads=1)
    assert all(s > a for s, a in zip(shared, alone, strict=True))
    assert microseconds > 0


def test_the_command_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scale.json"
    assert scale.main(["--sizes", "4", "--requests", "300", "--threads", "1", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert f"{result['4']['rank_cap']['slo_auc'][0]:.4f}" in capsys.readouterr().out
    assert result["4"]["rank_cap"]["seeds"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sizes", "0"], "--sizes is 0"),
        (["--requests", "0"], "--requests is 0"),
        (["--policy", "no"], "'no'"),
        (["--policy", "omniscient"], "sees the whole market"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main(arguments) == 2
    assert said in capsys.readouterr().err
