"""What providers gain by themselves: deviations whose gain is known, pairing, copies, the mapping that is written."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wwwserve.agents.rules import Rule
from wwwserve.agents.tariff import MARKUPS
from wwwserve.envs.distribution import KINDS, sample
from wwwserve.envs.scenario import Misreport, Scenario, load, parse
from wwwserve.envs.state import plan
from wwwserve.eval import game as command
from wwwserve.eval.collusion import Players, balance_of, best_responses, coalition, price_cut, tacit
from wwwserve.eval.course import courses
from wwwserve.eval.deviations import CHEAPEST, DEVIATIONS, Deviation, Lane, constant_markups, copied, play, profits
from wwwserve.eval.game import Found, Study, best_of, exploited, gains_of, game
from wwwserve.eval.play import rollout

SEEDS = range(1_000_000, 1_000_003)
NAMED = {each.name: each for each in DEVIATIONS}
BUYER, SELLER, APART = 0, 1, 2


def busy(rate_per_s: float) -> dict[str, Any]:
    return {"kind": "poisson", "phases": [{"until_s": 120, "rate_per_s": rate_per_s}]}


def toy(**economy: Any) -> Scenario:
    """One provider with too many requests, one with none, and one whose model nobody else serves or asks for."""
    return parse(
        {
            "name": "toy",
            "duration_s": 120,
            "drain_s": 300,
            "slo": {"thresholds_s": [20, 40]},
            "economy": economy,
            "defaults": {
                "serves": ["m"],
                "lengths": {
                    "prompt": {"median": 200, "sigma": 0.3, "max": 512},
                    "output": {"median": 300, "sigma": 0.4, "max": 1024},
                },
            },
            "providers": [
                {"name": "buyer", "gpu": "rtx-3090", "max_num_seqs": 8, "traffic": busy(1.4)},
                {"name": "seller", "gpu": "a100-80g", "max_num_seqs": 32},
                {"name": "apart", "serves": ["other"], "traffic": busy(0.3)},
            ],
        }
    )


POLICY = Rule("best_value", {"markup": 0.2})


@pytest.fixture(scope="module")
def plans() -> list[Any]:
    return [plan(toy(), seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def base(plans: list[Any]) -> Any:
    return profits(play(POLICY, [Lane(each) for each in plans], 1))


def gains(name: str, plans: list[Any], base: Any, policy: Rule = POLICY) -> Any:
    return gains_of(policy, NAMED[name], [BUYER, SELLER, APART], plans, base, 1)


def test_without_deviators_the_market_is_as_the_policy_alone_plays_it(base: Any) -> None:
    expected = np.array([run.profit for run in rollout(toy(), POLICY, SEEDS)])
    assert np.array_equal(base, expected)
    assert base[:, SELLER].min() > 0.0


@pytest.mark.parametrize("name", list(NAMED))
def test_who_neither_sells_nor_buys_gains_exactly_nothing_and_loses_nothing(
    name: str, plans: list[Any], base: Any
) -> None:
    assert (gains(name, plans, base)[APART] == 0.0).all()


def test_the_policys_own_markup_is_no_deviation(plans: list[Any], base: Any) -> None:
    assert (gains("markup 0.2", plans, base) == 0.0).all()
    assert (gains("markup 0", plans, base)[SELLER] != 0.0).all()


def test_never_sharing_costs_a_seller_all_that_it_has(plans: list[Any], base: Any) -> None:
    shares = gains("never sharing", plans, base)
    assert shares[SELLER].mean() == pytest.approx(-1.0)
    assert shares[BUYER].mean() < 0.0
    only = gains("no buying", plans, base)
    assert (only[SELLER] == 0.0).all()
    assert np.array_equal(only[BUYER], shares[BUYER])  # nobody buys of it


def test_selling_below_cost_earns_less(plans: list[Any], base: Any) -> None:
    assert gains("dumping", plans, base)[SELLER].mean() < gains("markup 0", plans, base)[SELLER].mean() < 0.0


def test_a_false_promise_is_paid_for_by_the_clause_alone(plans: list[Any], base: Any) -> None:
    quoted = [plan(toy(payment="quoted"), seed) for seed in SEEDS]
    at_quoted = profits(play(POLICY, [Lane(each) for each in quoted], 1))
    with_clause = gains("promise 0.5", plans, base)[SELLER].mean()
    without = gains("promise 0.5", quoted, at_quoted)[SELLER].mean()
    assert with_clause < -0.3
    assert without > with_clause + 0.2


def test_a_deviator_with_another_policy_decides_as_that_policy_does(plans: list[Any], base: Any) -> None:
    same = Deviation("learned", policy=Rule("best_value", {"markup": 0.2}))
    other = Deviation("learned", policy=Rule("best_value", {"markup": 0.0}))
    alone = Deviation("learned", policy=Rule("single"))
    who = [BUYER, SELLER]
    assert (gains_of(POLICY, same, who, plans, base, 1) == 0.0).all()
    assert np.array_equal(gains_of(POLICY, other, who, plans, base, 1), gains("markup 0", plans, base)[who])
    assert np.array_equal(gains_of(POLICY, alone, [BUYER], plans, base, 1), gains("no buying", plans, base)[[BUYER]])


def test_markets_with_different_deviators_do_not_mix(plans: list[Any]) -> None:
    lanes = [
        Lane(plans[0]),
        Lane(plans[1], (SELLER,), (NAMED["markup 0.8"],)),
        Lane(plans[0], (BUYER, SELLER), (NAMED["no buying"], NAMED["promise 0.7"])),
        Lane(plans[2], (SELLER,), (Deviation("x", policy=Rule("single")),)),
    ]
    together = profits(play(POLICY, lanes, 1))
    apart = np.concatenate([profits(play(POLICY, [lane], 1)) for lane in lanes])
    assert np.array_equal(together, apart)


def test_a_scale_of_next_to_nothing_is_not_divided_by(plans: list[Any], base: Any) -> None:
    tiny = base.copy()
    tiny[:, SELLER] = 0.0
    shares = gains("markup 0.2", plans, tiny)[SELLER]
    assert np.isfinite(shares).all()
    assert shares == pytest.approx(base[:, SELLER] / (0.01 * np.abs(tiny.mean(axis=0)).mean()))


# Copies.


@pytest.mark.parametrize("times", [2, 4])
def test_copies_of_the_thin_market_are_the_thick_ones(times: int) -> None:
    made, packaged = copied(load("competition/thin"), times), load(f"competition/thick-{times}")
    assert made.providers == packaged.providers
    assert made.name == f"competition/thin x{times}"


def test_copies_have_users_of_their_own() -> None:
    traffic = plan(copied(toy(), 2), 5).traffic
    first, second = (traffic.time_s[traffic.provider == i] for i in (0, 1))
    assert first.size > 0 and second.size > 0
    assert not np.isin(first, second).any()


# What is written.


@pytest.fixture(scope="module")
def cell() -> dict[str, Any]:
    chosen = tuple(NAMED[name] for name in ("markup 0", "markup 0.2", "never sharing"))
    learned = (Rule("single"), Rule("best_value", {"markup": 0.1}))
    study = Study(POLICY, Rule("trust_cap"), chosen, learned, collusion=True, coalition=("seller", "apart"))
    return game(toy(), study, SEEDS, copies=2)


def test_a_cell_has_what_the_contract_says(cell: dict[str, Any]) -> None:
    assert (cell["copies"], cell["policy"], cell["payment"]) == (2, "best_value", "lateness")
    names = ["buyer", "buyer-2", "seller", "seller-2", "apart", "apart-2"]
    assert list(cell["providers"]) == names
    for each in cell["providers"].values():
        assert set(each) == {"profit", "alone", "over_alone", "markup"}
        assert each["markup"] == pytest.approx([0.2, 0.0])
        assert each["over_alone"][0] == pytest.approx(each["profit"][0] - each["alone"][0])
    assert cell["welfare"][0] == pytest.approx(sum(each["profit"][0] for each in cell["providers"].values()))
    assert cell["loss"][0] == pytest.approx(1 - cell["welfare"][0] / cell["cooperative"][0])
    assert cell["omniscient"][0] > 0
    assert list(cell["deviations"]) == ["markup 0", "markup 0.2", "never sharing", "learned"]
    for each in cell["deviations"].values():
        assert list(each["gains"]) == ["buyer", "seller", "apart"]  # of copies the first
        means = [mean for mean, _ in each["gains"].values()]
        assert each["mean_gain"][0] == pytest.approx(np.mean(means))
        assert each["worst_gain"][0] == max(means)
    highest = max(each["worst_gain"][0] for name, each in cell["deviations"].items() if name != "learned")
    assert cell["exploitability_upper"][0] > 0.05 > highest > 0.0  # by a learned one, of which it counts all seeds
    assert cell["exploiter"]["provider"] in ("buyer", "seller")
    assert cell["exploiter"]["deviation"] in cell["deviations"]
    json.dumps(cell, allow_nan=False)


def test_the_best_of_the_learned_deviators_counts_for_each_provider(cell: dict[str, Any]) -> None:
    learned = {name: mean for name, (mean, _) in cell["deviations"]["learned"]["gains"].items()}
    assert learned["seller"] > -0.9  # markup 0.1, not `single`, with which it would take what it is offered at cost
    assert learned["buyer"] == pytest.approx(0.0, abs=0.05)  # it buys in both the same way as in the profile
    assert learned["apart"] == pytest.approx(0.0, abs=1e-3)  # it trades with nobody, and may hold otherwise


def test_a_learned_deviator_is_chosen_by_other_seeds_than_show_what_it_gains() -> None:
    by_luck, better = np.array([[9.0, 0.0, 9.0, 0.0]]), np.array([[1.0, 5.0, 1.0, 5.0]])
    assert best_of([by_luck, better]).tolist() == [[0.0, 0.0]]
    assert best_of([better]).tolist() == better.tolist()
    assert best_of([better[:, :1], by_luck[:, :1]]).tolist() == [[1.0]]  # one seed cannot be divided


def test_the_course_shows_markups_and_prices(cell: dict[str, Any]) -> None:
    course = cell["course"]
    assert course["time_s"][:2] == [0.0, 5.0] and course["time_s"][-1] < 120.0
    assert set(course["markup"]["seller"][1:]) == {0.2}
    assert min(course["price"]["buyer"]) > 0.09  # compute alone costs that much


def test_where_a_provider_is_offline_it_has_no_markup() -> None:
    away = parse(
        {"name": "away", "duration_s": 30, "providers": [{"name": "a", "online_s": [[10, 20]]}, {"name": "b"}]}
    )
    _, course = courses(POLICY, [Lane(plan(away, 1))], 1)
    assert np.isnan(course.markup[0, :, 0]).tolist() == [True, True, False, False, True, True]
    assert not np.isnan(course.markup[0, :, 1]).any()


def test_a_liar_is_asked_what_honesty_would_bring() -> None:
    scenario = toy()
    liar = [
        provider if i != SELLER else replace(provider, misreport=Misreport(promise=0.5))
        for i, provider in enumerate(scenario.providers)
    ]
    found = game(replace(scenario, providers=tuple(liar)), Study(POLICY, POLICY, ()), SEEDS)
    assert list(found["deviations"]) == ["honest"]
    assert list(found["deviations"]["honest"]["gains"]) == ["seller"]
    assert found["deviations"]["honest"]["worst_gain"][0] > 0.3
    assert found["loss"] == [0.0, 0.0]


def test_nobody_has_to_deviate_or_to_be_online() -> None:
    providers = [*toy().providers, replace(toy().providers[SELLER], name="late", online_s=((119.9, 120.0),))]
    found = game(replace(toy(), providers=tuple(providers)), Study(POLICY, POLICY, (NAMED["never sharing"],)), SEEDS)
    assert found["providers"]["late"]["markup"] == [None, None]
    assert found["exploitability"] == [0.0, 0.0] != found["deviations"]["never sharing"]["gains"]["seller"]
    assert found["exploitability_upper"] == [0.0, 0.0] and found["exploiter"] is None
    json.dumps(found, allow_nan=False)


def test_of_deviations_that_gain_nothing_the_luckiest_is_not_taken_for_a_gain() -> None:
    """40 providers and deviations, 16 seeds, gains of mean zero: the highest mean is 0.5 by chance alone."""
    rng = np.random.default_rng(1)
    results = [exploited([Found(str(c), "a", rng.normal(0.0, 1.0, 16)) for c in range(40)]) for _ in range(200)]
    gains, uppers = (np.array([each[key][0] for each in results]) for key in ("exploitability", "exploitability_upper"))
    assert abs(gains.mean()) < 3 * gains.std() / math.sqrt(len(gains))
    assert uppers.mean() > 0.4


def test_who_gains_for_sure_is_found_and_its_gain_is_that_of_the_other_seeds() -> None:
    noise = np.random.default_rng(2).normal(0.0, 0.1, (3, 8))
    noise[1] += 0.5
    found = [Found("markup 0.5", "a", noise[0]), Found("markup 0.8", "b", noise[1]), Found("markup 0.8", "c", noise[2])]
    result = exploited(found)
    assert result["exploiter"] == {"provider": "b", "deviation": "markup 0.8"}
    assert result["exploitability"][0] == pytest.approx(noise[1, 1::2].mean())
    assert result["exploitability_upper"][0] == pytest.approx(noise[1].mean())
    assert exploited([Found("markup 0.5", "a", np.ones(1))])["exploitability"] == [None, None]
    assert exploited([])["exploiter"] is None


# Collusion.


def test_best_responses_of_one_seller_are_no_worse_than_any_other_markup(plans: list[Any]) -> None:
    players = Players(POLICY, plans, 1)
    markups = best_responses(players)
    profiles = [[*markups[:SELLER], k, *markups[SELLER + 1 :]] for k in range(MARKUPS.size)]
    mean = players.profits(profiles)[:, :, SELLER].mean(axis=1)
    assert mean[markups[SELLER]] > mean[1]
    assert mean[markups[SELLER]] >= 0.9 * mean.max()
    assert markups[BUYER] == markups[APART] == 1  # who sells nothing has no reason to leave where it began


def test_a_monopolist_has_the_whole_profit_of_its_best_markup(plans: list[Any]) -> None:
    """With one seller the best common markup is its best response: nothing is left to collude on."""
    runs = play(POLICY, [Lane(each) for each in plans], 1)
    assert (balance_of(runs) > 0).tolist() == [False, True, False]
    found = tacit(Players(POLICY, plans, 1), runs)
    assert found["sellers"] == ["seller"]
    assert found["delta"] is None
    assert found["best_response_profit"][0] >= 0.9 * found["joint_profit"][0]


def test_two_sellers_have_a_delta_and_a_response_to_a_cut(cell: dict[str, Any]) -> None:
    found = cell["collusion"]
    assert found["sellers"] == ["seller", "seller-2"]
    played, competing, joint = (found[key][0] for key in ("profit", "best_response_profit", "joint_profit"))
    assert found["delta"] is None or found["delta"][0] == pytest.approx((played - competing) / (joint - competing))
    cut = found["cut"]
    assert cut["response"] == cut["response_after"] == [0.0, 0.0]  # the rule's markup is what it is
    assert cut["others"] == [each for each in ("seller", "seller-2") if each != cut["seller"]]


def test_a_cut_is_made_and_ends(plans: list[Any]) -> None:
    cut = price_cut(Players(POLICY, plans, 1), SELLER, [SELLER])
    assert (cut["from_s"], cut["until_s"], cut["others"]) == (60.0, 84.0, ["buyer", "apart"])
    forced = dict(zip(cut["time_s"], cut["forced"], strict=True))
    assert forced[50.0] == forced[90.0] == pytest.approx(0.2)
    assert forced[65.0] == forced[80.0] == pytest.approx(MARKUPS[CHEAPEST])
    window = Deviation("cut", markup=CHEAPEST, from_s=30.0, until_s=60.0)
    _, course = courses(POLICY, [Lane(plans[0], (SELLER,), (window,))], 1)
    markup = dict(zip(course.time_s.tolist(), course.markup[0, :, SELLER].tolist(), strict=True))
    assert (markup[25.0], markup[35.0], markup[55.0], markup[65.0]) == (0.2, -0.1, -0.1, 0.2)


def test_a_coalition_of_one_gains_what_it_gains_alone(plans: list[Any], base: Any) -> None:
    together = coalition(Players(POLICY, plans, 1), [SELLER], base)
    assert together["members"] == ["seller"]
    for each in constant_markups():
        alone = gains_of(POLICY, each, [SELLER], plans, base, 1)[0]
        assert together["gains"][each.name][0] == pytest.approx(alone.mean())


def test_who_advertises_less_load_than_it_has_is_held_to_it() -> None:
    market = load("competition/unequal")
    plans = [plan(market, seed) for seed in range(8)]
    policy = Rule("best_value", {"markup": 0.2})
    base = profits(play(policy, [Lane(each) for each in plans], 1))
    lying = gains_of(policy, NAMED["misreport 0.3"], [3, 4, 5], plans, base, 1)  # the sellers
    assert lying.mean() < -0.02
    assert lying.mean(axis=1).max() < 0.05


# Random markets.


def test_in_random_markets_gains_are_sums_over_providers() -> None:
    chosen = (NAMED["markup 0.2"], NAMED["never sharing"])
    found = command.family("thin", Study(POLICY, Rule("best_value", {"markup": 0.2}), chosen), [7, 8])
    assert found["markets"] == 2 and found["loss"] == [0.0, 0.0]
    assert found["deviations"]["markup 0.2"]["mean_gain"] == [0.0, 0.0]
    rng = np.random.default_rng((7, KINDS.index("thin")))
    plans = [plan(sample("thin", rng), seed) for seed in (7, 8)]
    gain = total = 0.0
    for each in plans:
        (base,) = play(POLICY, [Lane(each)], 1)
        total += base.profit.sum()
        for i in range(base.profit.size):
            (run,) = play(POLICY, [Lane(each, (i,), (NAMED["never sharing"],))], 1)
            gain += run.profit[i] - base.profit[i]
    assert found["deviations"]["never sharing"]["mean_gain"][0] == pytest.approx(gain / total)
    assert found["welfare"][0] == pytest.approx(total / 2)


# The command.


@pytest.fixture
def toy_file(tmp_path: Path) -> str:
    path = tmp_path / "toy.yaml"
    mapping = toy().to_mapping()
    path.write_text(json.dumps(mapping))
    return str(path)


def test_command_writes_and_shows_the_same(toy_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "game.json"
    argv = [toy_file, "--seeds", "2", "--deviations", "promise 0.5", "--payment", "quoted", "--copies", "1", "2"]
    assert command.main([*argv, "--coalition", "seller", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result["scenarios"]) == ["toy", "toy x2"]
    assert (result["first_seed"], result["seeds"]) == (1_000_000, 2)
    shown = capsys.readouterr().out
    for name, each in result["scenarios"].items():
        assert each["payment"] == "quoted"
        assert f"{name}: best_value, paid by quoted; welfare {each['welfare'][0]:.1f}" in shown
        assert f"{100 * each['exploitability'][0]:+.1f}" in shown
    assert all(math.isfinite(mean) for mean, _ in result["scenarios"]["toy"]["coalition"]["gains"].values())


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], "no scenario is given"),
        (["FILE", "FILE"], "a scenario is given twice"),
        (["random/nice"], "random/nice: expected random/KIND with a kind of: honest,"),
        (["FILE", "--policy", "omniscient"], "'omniscient' sees everything"),
        (["FILE", "--policy", "best"], "unknown policy 'best'"),
        (["FILE", "--deviations", "markup 0.7"], "--deviations 'markup 0.7', expected of: markup -0.1,"),
        (["FILE", "--coalition", "nobody"], "--coalition 'nobody' is no provider of toy"),
        (["FILE", "--copies", "0"], "--copies is 0, expected at least 1"),
        (["FILE", "--payment", "free"], "--payment"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    argv: list[str], expected: str, toy_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([toy_file if each == "FILE" else each for each in argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1 and expected in shown.err
