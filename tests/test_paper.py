"""`eval.paper`: the same numbers twice, a report that needs nothing else, figures that say what the data say."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from wwwserve.agents.decision import PROBABILITY
from wwwserve.agents.rules import Rule
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.scenario import load
from wwwserve.eval import regret
from wwwserve.eval.paper import credits
from wwwserve.eval.paper.command import EXPERIMENTS, NAMES, main, make, policy_digest
from wwwserve.eval.paper.experiment import load_between
from wwwserve.eval.paper.flexible import ACCEPT, Mixed
from wwwserve.eval.paper.settings import SCENARIOS, headline

CHEAP = "attention"
SEEDS = range(1_000_000, 1_000_002)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves for one figure and two seeds."""
    out = tmp_path_factory.mktemp("paper")
    assert main([CHEAP, "--seeds", "2", "--processes", "1", "--out", str(out)]) == 0
    return out


def test_one_command_gives_the_same_bytes_twice(made: Path, tmp_path: Path) -> None:
    make([CHEAP], SEEDS, tmp_path, processes=2)
    for name in ("paper.json", "report.html", f"figures/{CHEAP}.svg"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


def test_the_numbers_are_those_of_the_seeds(made: Path) -> None:
    data = json.loads((made / "paper.json").read_text())["figures"][CHEAP]
    assert data["classes"] == ["flashinfer", "triton", "sdpa"]
    again = credits.measure(load("paper/attention"), Rule("www_serve"), SEEDS)
    assert data["policies"]["www_serve"]["served"] == again["served"]
    other = credits.measure(load("paper/attention"), Rule("www_serve"), range(5, 7))
    assert data["policies"]["www_serve"]["served"] != other["served"]
    for found in data["policies"].values():
        assert sum(share for share, _ in found["share"]) == pytest.approx(1)
        # One credit a request, and no duels.
        assert [x[0] for x in found["grown"]] == pytest.approx([x[0] for x in found["served"]])


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_report_asks_for_nothing_from_elsewhere(made: Path) -> None:
    text = (made / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(tags)
    assert tags.count("table") >= 2
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert images and all(src.startswith("data:image/png;base64,iVBOR") for src in images)
    for _, attributes in page.tags:
        assert not {"href", "srcset", "data", "poster", "background"} & set(attributes)
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert "http:" not in text and "https:" not in text


def test_every_row_of_the_papers_experiments_is_a_figure() -> None:
    assert NAMES == (
        "slo", "latency", "participation", "policy", "duel", "model-size", "quantization", "attention", "hardware",
    )  # fmt: skip
    for experiment in EXPERIMENTS:
        for name in experiment.scenarios:
            assert load(name).name == name


def test_policies_are_still_judged_where_they_were() -> None:
    new = {name for experiment in EXPERIMENTS for name in experiment.scenarios} - set(SCENARIOS)
    assert len(new) == 8
    assert not new & set(regret.SCENARIOS)
    assert len(regret.SCENARIOS) == 8


def test_random_responders_lose_their_stake_and_growth_follows_quality() -> None:
    found = credits.measure(load("paper/duel"), Rule("www_serve"), range(9, 13))
    high, mid, low, random = (x[0] for x in found["grown"])
    assert min(high, mid) > low > 0 > random
    assert found["last_stake"][3][0] < 0.2 < 3 < found["last_stake"][0][0]
    assert found["won_less_lost"][3][0] < -100


def test_a_faster_load_brings_the_same_number_of_requests() -> None:
    scenario = load("paper/hardware")
    fast = credits.at_load(scenario, 4.0)
    counts = [MarketBatch([each], [3]).markets.market["n_arrivals"][0] for each in (scenario, fast)]
    assert counts[0] == pytest.approx(counts[1], rel=0.1)
    assert fast.duration_s == scenario.duration_s / 4


def test_each_provider_of_a_mixture_follows_its_own_policy() -> None:
    scenario = load("paper/acceptance")
    batch = MarketBatch([scenario, scenario], [1, 2])
    mixed = Mixed("www_serve", [Rule("www_serve"), *(Rule("www_serve", {"accept": each}) for each in ACCEPT)])
    actions = batch.actions()
    batch.active[:] = True
    batch.active[1, 2] = False
    before = actions.admission[1, 2].copy()
    mixed.decide(batch.views, batch.active, batch.uniforms, actions)
    np.testing.assert_allclose(actions.admission[0, 1:, PROBABILITY], ACCEPT)
    np.testing.assert_array_equal(actions.admission[1, 2], before)


def test_load_is_what_comes_over_what_can_be_served() -> None:
    scenario = load("paper/participation")
    whole, gone = load_between(scenario, 0, 400), load_between(scenario, 400, 700)
    assert gone.market == pytest.approx(1.5 * whole.market)  # three equal nodes, then two
    assert gone.least == gone.most == pytest.approx(gone.market)
    swing = load_between(load("paper/alternating"), 0, 300)
    assert swing.most == pytest.approx(4 * swing.least)
    assert swing.market == pytest.approx((swing.most + swing.least) / 2)


def cells(single: float, www_serve: float) -> dict:
    return {
        name: {"slo": {"300": [x, None]}, "latency_s": {"mean": [200.0 - 100 * x, None]}}
        for name, x in (("single", single), ("www_serve", www_serve), ("learned", 1.0))
    }


def test_the_headline_leaves_out_settings_in_which_single_is_hopeless() -> None:
    found = headline({"scenarios": {"a": cells(0.1, 0.9), "b": cells(0.5, 0.8), "c": cells(0.6, 0.7)}})
    assert found["scenario"] == "b"
    assert found["ratio"] == pytest.approx(1.6)
    assert found["saving"] == pytest.approx(1 - 120 / 150)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], r"nothing.*slo"),
        (["slo", "--docs", "x"], r"--docs needs every figure"),
        (["--seeds", "1"], r"--seeds is 1, expected at least 2"),
        (["slo", "--out", "/dev/null/x"], r"--out /dev/null/x: Not a directory"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_the_documentation_is_what_the_command_wrote_with_the_shipped_policy() -> None:
    docs = Path(__file__).parent.parent / "docs"
    text, tables = ((docs / name).read_text(encoding="utf-8") for name in ("paper.md", "paper/tables.md"))
    for experiment in EXPERIMENTS:
        assert f"## {experiment.title}\n" in text and f"## {experiment.title}\n" in tables
    assert f"`{policy_digest()}`" in tables  # else run it again: wwwserve paper --docs docs
    images = re.findall(r"!\[[^\]]*\]\((paper/[^)]+)\)", text)
    assert len(images) == 10 and all((docs / name).is_file() for name in images)
