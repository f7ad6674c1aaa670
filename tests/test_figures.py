"""Figures: what is drawn is what the result says, in a form that reads without colour."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from wwwserve.agents.rules import RULES
from wwwserve.envs.distribution import KINDS
from wwwserve.eval import figures
from wwwserve.eval.figures import FigureError, draw

PNG, SVG = b"\x89PNG\r\n\x1a\n", "<svg"
NAMES = [*RULES, "centralized", "omniscient", "learned", "rank_cap:urgency=3", *(f"trust_cap@{k}" for k in KINDS)]


def cell(k: int) -> dict[str, Any]:
    return {
        "slo": {"200": [0.5 + 0.01 * k, 0.02], "300": [0.7 + 0.01 * k, None]},
        "slo_auc": [0.6, 0.02],
        "latency_s": {key: [100.0 * (place + 1) + k, 3.0] for place, key in enumerate(("p50", "mean", "p90", "p99"))}
        | {"quantiles": [5.0 * q + k for q in range(1, 100)]},
        "requests": 100,
        "unfinished": 20,
    }


def empty_cell() -> dict[str, Any]:
    nothing = [None, None]
    latency_s: dict[str, Any] = dict.fromkeys(("p50", "mean", "p90", "p99"), nothing)
    return cell(0) | {"slo": {"200": nothing}, "latency_s": latency_s | {"quantiles": [None] * 99}, "requests": 20}


RESULT = {"scenarios": {name: {p: cell(k) for k, p in enumerate(NAMES)} for name in ("one", "two", "three", "four")}}
LOG = [
    {"seconds": 0.0, "agent_steps": 0, "scores": {"one": 0.5, "two": 0.6}, "rules": {"one": {"single": 0.55}}},
    {"seconds": 90.0, "agent_steps": 2_000_000, "scores": {"one": 0.7, "two": 0.8}},
]


def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures by name as they are drawn, in place of being saved."""
    found: dict[str, Figure] = {}

    def keep(figure: Figure, out: Path, name: str) -> list[Path]:
        found[name] = figure
        plt.close(figure)
        return []

    monkeypatch.setattr(figures, "save", keep)
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Figure]:
    found = kept(monkeypatch)
    figures.draw_comparison(RESULT, tmp_path)
    figures.draw_learning(LOG, tmp_path)
    return found


def write(folder: Path, result: Any = RESULT, log: Any = LOG) -> tuple[Path, Path]:
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder / "result.json", folder / "progress.jsonl"


def test_slo_curves_are_the_results(drawn: dict[str, Figure]) -> None:
    axes = drawn["slo"].axes
    assert [each.get_title() for each in axes] == ["one", "two", "three", "four"]
    curves = {line.get_label(): line for line in axes[1].get_lines()}
    assert list(curves) == NAMES
    assert curves["random"].get_xdata().tolist() == [200.0, 300.0]
    assert curves["random"].get_ydata().tolist() == pytest.approx([0.51, 0.71])
    assert "(s)" in axes[0].get_xlabel()


def test_latency_curves_stop_short_by_the_unfinished(drawn: dict[str, Figure]) -> None:
    line = drawn["latency"].axes[0].get_lines()[2]
    assert line.get_xdata()[49] == 252.0
    assert line.get_ydata()[49] == pytest.approx(0.8 * 0.5)


def test_policies_differ_by_more_than_colour(drawn: dict[str, Figure]) -> None:
    looks = {(str(line.get_linestyle()), line._dash_pattern[1] and tuple(line._dash_pattern[1]), line.get_marker())
             for line in drawn["slo"].axes[0].get_lines()}  # fmt: skip
    assert len(looks) == len(NAMES)


def test_learning_curve_has_steps_in_millions_and_the_rules_as_levels(drawn: dict[str, Figure]) -> None:
    one, two = drawn["learning"].axes
    single, learned = one.get_lines()
    assert set(single.get_ydata()) == {0.55}
    assert list(learned.get_xdata()) == [0.0, 2.0] and list(learned.get_ydata()) == [0.5, 0.7]
    assert len(two.get_lines()) == 1


def test_command_writes_every_figure_twice_and_the_same_again(tmp_path: Path) -> None:
    result, log = write(tmp_path, {"scenarios": {"one": {name: cell(k) for k, name in enumerate(NAMES[:3])}}})
    contents = []
    for out in (tmp_path / "a", tmp_path / "b"):
        assert figures.main([str(result), "--out", str(out), "--training", str(log)]) == 0
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1]
    names = {"slo", "latency", "latency-summary", "learning"}
    assert set(contents[0]) == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name in names:
        assert contents[0][f"{name}.png"].startswith(PNG)
        assert SVG in contents[0][f"{name}.svg"].decode()


def game_cell(copies: int, names: list[str]) -> dict[str, Any]:
    course = {key: {name: [1.0 + k, None, 2.0 + k] for k, name in enumerate(names)} for key in ("markup", "price")}
    gain = {"mean_gain": [-0.1, 0.02], "worst_gain": [0.03, None], "gains": {}}
    cut = {
        "seller": names[0], "from_s": 60.0, "until_s": 90.0, "time_s": [50.0, 70.0, 100.0], "forced": [2.0, 0.75, 2.0],
        "others_markup": [2.0, 1.5, 1.75], "others_without": [2.0, 2.0, 2.0],
    }  # fmt: skip
    return {
        "copies": copies,
        "loss": [0.06 / copies, 0.01],
        "providers": {
            name: {"profit": [10.0 + k, 1.0], "alone": [8.0, None], "markup": [2.0, 0.0]}
            for k, name in enumerate(names)
        },
        "deviations": {"markup 2": gain, "promise 0.5": gain},
        "course": {"time_s": [0.0, 5.0, 10.0]} | course,
        "collusion": {"sellers": names[:1], "cut": cut},
    }


GAME = {
    "first_seed": 1,
    "seeds": 3,
    "scenarios": {
        "thin": game_cell(1, ["a", "b"]),
        "thin x2": game_cell(2, ["a", "a-2", "b", "b-2"]),
        "unequal": game_cell(1, [f"n{k}" for k in range(12)]),
    },
}


@pytest.fixture
def game(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Figure]:
    found = kept(monkeypatch)
    figures.draw_game(GAME, tmp_path)
    return found


def test_a_games_figures_show_its_numbers(game: dict[str, Figure]) -> None:
    assert list(game) == ["markups", "prices", "profit", "deviations", "welfare", "price-cut"]
    thin, copied, unequal = game["markups"].axes
    styles = [{line.get_label(): line.get_marker() for line in each.get_lines()} for each in (thin, copied)]
    assert styles[0].items() <= styles[1].items()  # one legend stands for all panels
    assert thin.get_lines()[1].get_ydata()[[0, 2]].tolist() == [2.0, 3.0]
    assert len(unequal.get_lines()) == 12 and not unequal.get_legend_handles_labels()[1]  # too many to tell apart
    (welfare,) = game["welfare"].axes
    curve = welfare.get_lines()[0]
    assert (curve.get_xdata().tolist(), curve.get_ydata().tolist()) == ([2, 4], pytest.approx([6.0, 3.0]))
    gains = game["deviations"].axes[0]
    assert [label.get_text() for label in gains.get_yticklabels()] == ["markup 2", "promise 0.5"]
    assert gains.get_lines()[0].get_xdata().tolist() == [-10.0]
    cut = {line.get_label(): list(line.get_ydata()) for line in game["price-cut"].axes[0].get_lines()}
    assert cut["others"] == [2.0, 1.5, 1.75]


def test_a_game_without_copies_or_collusion_has_fewer_figures(tmp_path: Path) -> None:
    single = game_cell(1, ["a", "b"]) | {"deviations": {}}
    del single["collusion"]
    path = tmp_path / "game.json"
    path.write_text(json.dumps({"first_seed": 1, "seeds": 3, "scenarios": {"thin": single}}))
    assert figures.main([str(path), "--out", str(tmp_path / "out")]) == 0
    names = {path.stem for path in (tmp_path / "out").iterdir()}
    assert names == {"markups", "prices", "profit"}
    path.write_text(json.dumps({"first_seed": 1, "scenarios": {"thin": {"copies": 1}}}))
    assert figures.main([str(path), "--out", str(tmp_path / "out")]) == 2


def test_a_policy_that_finished_nothing_is_drawn_as_nothing(tmp_path: Path) -> None:
    result, _ = write(tmp_path, {"scenarios": {"one": {"single": empty_cell(), "random": cell(1)}}})
    assert len(draw(result, tmp_path / "out")) == 6


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"scenarios": {"one": {"single": {}}}}', '{"scenarios": {}}', '{"scenarios": {"one": {}}}']
)
def test_a_file_that_is_no_result_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    assert figures.main([str(path), "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and str(path) in shown


def test_an_empty_training_log_is_refused(tmp_path: Path) -> None:
    result, log = write(tmp_path, {"scenarios": {"one": {"single": cell(0)}}}, log=[])
    with pytest.raises(FigureError, match=r"progress\.jsonl: not the log of a training run"):
        draw(result, tmp_path / "out", log)


def test_comparing_needs_no_matplotlib() -> None:
    code = "import eval.compare, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_best_rule_of_each_scenario_stands_for_all() -> None:
    def cell(auc: float) -> dict[str, Any]:
        return {"slo_auc": [auc, 0.0]}

    result = {
        "scenarios": {
            "a": {"single": cell(0.1), "rank_cap": cell(0.5), "trust_cap@lying": cell(0.4), "learned": cell(0.9)},
            "b": {"single": cell(0.1), "rank_cap": cell(0.3), "trust_cap@lying": cell(0.4), "centralized": cell(0.9)},
        }
    }
    shown = figures.with_best_rule(result)["scenarios"]
    assert shown["a"] == {"single": cell(0.1), "learned": cell(0.9), "best rule": cell(0.5)}
    assert shown["b"] == {"single": cell(0.1), "centralized": cell(0.9), "best rule": cell(0.4)}
