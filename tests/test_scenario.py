"""Scenario files: what a good one means, that it survives the round trip, and how a bad one is refused."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from wwwserve.agents.hardware import MODELS, QUANTIZATIONS, profile
from wwwserve.agents.lengths import Lognormal
from wwwserve.envs import distribution, scenario
from wwwserve.envs.scenario import MmppTraffic, PoissonTraffic, ScenarioError, TimesTraffic, TraceTraffic
from wwwserve.envs.state import Reward, Shape, make_markets, plan, write_market

FILE = """
name: alternating
duration_s: 600
drain_s: 1200
decision_interval_s: 0.5
gossip_interval_s: 2.0
rtt_ms: 40
slo:
  thresholds_s: [100, 200]
  classes:
    chat: {share: 0.7, deadline_s: 20, value: 3, output: {median: 200, sigma: 0.6, max: 1024}}
    batch: {share: 0.3, deadline_s: 600}
economy: {payment: quoted, stake_rule: fixed, duel_probability: 1e-3, judges: 5}
defaults:
  gpu: rtx-4090
  max_num_seqs: 32
  lengths: {prompt: {median: 100, sigma: 0.5, max: 2048}, output: {median: 4000, sigma: 0.75, max: 8192}}
providers:
  - {name: n1, traffic: {kind: poisson, phases: [{until_s: 300, rate_per_s: 0.0667}, {until_s: 600, rate_per_s: 0}]}}
  - {name: n2, gpu: a100-80g, serves: [qwen3, qwen3-8b], strength: -0.5, lengths: {output: {median: 500}},
     traffic: {kind: mmpp, rates_per_s: [0.02, 0.2], mean_dwell_s: [120, 40]}}
  - {name: n3, online_s: [[0, 250], [400, 600]], traffic: {kind: times, times_s: [7.25, 1.5, 60.0]}}
  - {name: n4, misreport: {load: 0.3, speed: 1.5, promise: 0.7, from_s: 100, until_s: 400},
     traffic: {kind: trace, file: azure_llm_conv_2023.csv, start_s: 600, rate_scale: 0.5}}
"""


def good() -> dict[str, Any]:
    mapping: dict[str, Any] = yaml.safe_load(FILE.replace("1e-3", "0.001"))
    return mapping


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "market.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_means_what_it_says(tmp_path: Path) -> None:
    got = scenario.load(write(tmp_path, FILE))
    assert (got.name, got.duration_s, got.drain_s, got.decision_interval_s) == ("alternating", 600.0, 1200.0, 0.5)
    assert (got.gossip_interval_s, got.rtt_ms) == (2.0, 40.0)
    assert got.slo.thresholds_s == (100.0, 200.0)
    chat, batch = got.slo.classes
    assert (chat.name, chat.share, chat.deadline_s, chat.value) == ("chat", 0.7, 20.0, 3.0)
    assert chat.output == Lognormal(200.0, 0.6, 1024)
    assert (batch.name, batch.value, batch.output) == ("batch", 1.0, None)
    assert (got.economy.payment, got.economy.stake_rule, got.economy.judges) == ("quoted", "fixed", 5)
    assert got.economy.duel_probability == 0.001
    n1, n2, n3, n4 = got.providers
    assert isinstance(n1.traffic, PoissonTraffic)
    assert [(phase.until_s, phase.rate_per_s) for phase in n1.traffic.phases] == [(300.0, 0.0667), (600.0, 0.0)]
    assert (n1.gpu, n1.model, n1.max_num_seqs, n1.serves) == ("rtx-4090", "qwen3-8b", 32, ("qwen3-8b",))
    assert (n2.gpu, n2.serves, n2.strength) == ("a100-80g", ("qwen3", "qwen3-8b"), -0.5)
    assert n2.traffic == MmppTraffic((0.02, 0.2), (120.0, 40.0))
    assert n3.traffic == TimesTraffic((1.5, 7.25, 60.0))
    assert n4.misreport is not None
    assert (n4.misreport.load, n4.misreport.speed, n4.misreport.promise) == (0.3, 1.5, 0.7)
    assert (n4.misreport.from_s, n4.misreport.until_s) == (100, 400)
    assert isinstance(n4.traffic, TraceTraffic)
    assert (n4.traffic.start_s, n4.traffic.rate_scale) == (600.0, 0.5)


def test_a_provider_completes_its_lengths_from_the_defaults() -> None:
    n1, n2 = scenario.parse(good()).providers[:2]
    assert n1.lengths.output == Lognormal(4000.0, 0.75, 8192)
    assert n2.lengths.output == Lognormal(500.0, 0.75, 8192)
    assert n2.lengths.prompt == Lognormal(100.0, 0.5, 2048)


def test_a_providers_traffic_replaces_the_default_one() -> None:
    mapping = good()
    mapping["defaults"]["traffic"] = {"kind": "times", "times_s": [5]}
    del mapping["providers"][0]["traffic"]
    mapping["providers"][2]["traffic"] = None
    got = scenario.parse(mapping).providers
    assert got[0].traffic == TimesTraffic((5.0,))
    assert isinstance(got[1].traffic, MmppTraffic)
    assert got[2].traffic is None


def test_defaults_of_what_a_file_leaves_out() -> None:
    got = scenario.parse({"name": "small", "providers": [{"name": "n1"}]})
    assert (got.duration_s, got.drain_s, got.decision_interval_s) == (600, 1800, 1)
    assert (got.gossip_interval_s, got.rtt_ms) == (3, 50)
    assert got.slo.thresholds_s == (200, 250, 300, 350, 400)
    assert (got.economy.payment, got.economy.initial_credit, got.economy.initial_stake) == ("lateness", 1000, 2)
    assert (got.economy.duel_probability, got.economy.judges, got.economy.compute_cost_per_ktok) == (0, 3, 0.09)
    (provider,) = got.providers
    assert (provider.gpu, provider.model, provider.max_num_seqs) == ("rtx-4090", "qwen3-8b", 64)
    assert (provider.traffic, provider.misreport, provider.strength) == (None, None, None)
    assert provider.online_s == ((0.0, math.inf),)


def test_a_provider_may_have_an_engine_and_credits_of_its_own() -> None:
    mapping = good()
    own = {"quantization": "int4wo-32", "attention": "sdpa", "initial_credit": 12.5, "initial_stake": 0}
    mapping["providers"][1] |= own
    del mapping["providers"][1]["strength"]
    got = scenario.parse(mapping)
    provider = got.providers[1]
    assert {key: getattr(provider, key) for key in own} == own
    assert scenario.parse(got.to_mapping()) == got
    planned = plan(got, 0)
    markets = make_markets(1, Shape.of([planned]))
    write_market(markets, 0, planned, Reward())
    assert markets.accounts[0, 1, :2].tolist() == [12_500_000, 0]
    assert markets.accounts[0, 0, :2].tolist() == [1000 * 10**6, 2 * 10**6]
    assert markets.market["minted"][0] == markets.accounts.sum()
    engine = profile(provider.gpu, provider.model, provider.max_num_seqs, quantization="int4wo-32", attention="sdpa")
    assert planned.profiles[1] == engine
    expected = MODELS[provider.model].strength + QUANTIZATIONS["int4wo-32"].strength
    assert markets.providers["strength"][0, 1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantization", "int4", "one of bf16, fp8wo, int4wo-128, int4wo-32"),
        ("attention", "flash", "one of flashinfer, triton, sdpa; did you mean 'flashinfer'"),
        ("initial_credit", -1, r"a number in \[0, 1e\+09\]"),
        ("initial_stake", "much", r"a number in \[0, 1e\+09\]"),
    ],
)
def test_bad_engines_and_credits_are_refused(key: str, value: object, message: str) -> None:
    mapping = good()
    mapping["providers"][1][key] = value
    with pytest.raises(ScenarioError, match=rf"providers\[1\].{key}: .*{message}"):
        scenario.parse(mapping)


def test_a_model_that_fits_only_when_quantized() -> None:
    mapping = good()
    mapping["providers"][1] |= {"gpu": "rtx-4090", "model": "qwen3-14b"}
    with pytest.raises(ScenarioError, match="a model that fits on rtx-4090"):
        scenario.parse(mapping)
    mapping["providers"][1]["quantization"] = "fp8wo"
    assert scenario.parse(mapping).providers[1].model == "qwen3-14b"


def test_what_lasts_until_the_end_of_arrivals_lasts_through_the_drain() -> None:
    mapping = good()
    mapping["providers"][3]["misreport"]["until_s"] = 600
    got = scenario.parse(mapping)
    assert got.providers[2].online_s == ((0.0, 250.0), (400.0, math.inf))
    assert got.providers[3].misreport is not None
    assert got.providers[3].misreport.until_s == math.inf


@pytest.mark.parametrize("name", scenario.packaged_names())
def test_packaged_scenarios_load_and_survive_the_round_trip(name: str) -> None:
    got = scenario.load(name)
    assert got.name == name
    text = yaml.safe_dump(got.to_mapping(), sort_keys=False)
    assert scenario.parse(yaml.safe_load(text)) == got


def test_packaged_names() -> None:
    names = scenario.packaged_names()
    assert {
        "paper/alternating",
        "trace/azure-conv",
        "market/deadlines",
        "liars/first",
        "scale/64",
        "competition/thin",
    } <= set(names)
    assert names == sorted(names)


def test_round_trip_keeps_every_key(tmp_path: Path) -> None:
    got = scenario.load(write(tmp_path, FILE))
    mapping = got.to_mapping()
    assert scenario.parse(mapping) == got
    assert mapping["providers"][3]["traffic"]["file"] == "azure_llm_conv_2023.csv"


def test_a_trace_beside_the_file_comes_first(tmp_path: Path) -> None:
    beside = tmp_path / "azure_llm_conv_2023.csv"
    beside.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-01-01 00:00:00.0,5,6\n2023-01-01 00:12:00.5,7,8\n")
    traffic = scenario.load(write(tmp_path, FILE)).providers[3].traffic
    assert isinstance(traffic, TraceTraffic)
    assert traffic.file == beside
    got = scenario.load(write(tmp_path, FILE))
    assert scenario.parse(got.to_mapping()) == got


@pytest.mark.parametrize("kind", distribution.KINDS)
def test_random_markets_are_valid_and_differ(kind: distribution.Kind) -> None:
    rng = np.random.default_rng(7)
    markets = [distribution.sample(kind, rng) for _ in range(60)]
    assert markets[0] != markets[1]
    assert markets[0] == distribution.sample(kind, np.random.default_rng(7))
    counts = {"thin": range(3, 6), "uneven": range(5, 9), "thick": range(9, 13)}.get(kind, range(3, 9))
    assert {len(market.providers) for market in markets} == set(counts)
    for market in markets:
        assert scenario.parse(market.to_mapping()) == market
        liars = [each.misreport for each in market.providers if each.misreport is not None]
        assert (len(liars) > 0) == (kind in ("lying", "switching"))
        assert all((liar.until_s < 600) == (kind == "switching") for liar in liars)
        assert len(market.slo.classes) == (2 if kind == "deadlines" else 0)
    assert any(each.online_s != ((0.0, math.inf),) for market in markets for each in market.providers)


@pytest.mark.parametrize("times", [2, 4])
def test_a_thick_market_is_the_thin_one_several_times(times: int) -> None:
    thin, thick = scenario.load("competition/thin"), scenario.load(f"competition/thick-{times}")
    assert len({each.name for each in thick.providers}) == times * len(thin.providers)
    for k, each in enumerate(thick.providers):
        assert replace(each, name="") == replace(thin.providers[k // times], name="")


def test_an_unknown_kind_of_random_market() -> None:
    with pytest.raises(ValueError, match="'nice'"):
        distribution.sample("nice", np.random.default_rng(0))  # type: ignore[arg-type]


# Each case: a change of the good file, then what the message must contain: field, value, expectation.
Change = Callable[[dict[str, Any]], Any]


def put(path: str, value: Any) -> Change:
    """A change that sets the value at a path such as `providers[2].traffic.kind`."""
    keys: list[Any] = [int(key) if key.isdigit() else key for key in path.replace("[", ".").replace("]", "").split(".")]

    def change(mapping: dict[str, Any]) -> None:
        inner: Any = mapping
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


POISSON = {"kind": "poisson", "phases": [{"until_s": 300, "rate_per_s": 1}, {"until_s": 200, "rate_per_s": 1}]}
FLOOD = {"kind": "poisson", "phases": [{"until_s": 600, "rate_per_s": 1e5}]}
CASES: dict[str, tuple[Change, str, str, str]] = {
    "unknown key": (put("drainage_s", 3), "drainage_s", "3", "did you mean 'drain_s'"),
    "unknown provider key": (put("providers[1].trafic", {}), "providers[1].trafic", "{}", "did you mean 'traffic'"),
    "unknown class key": (put("slo.classes.chat.prize", 1), "slo.classes.chat.prize", "1", "deadline_s"),
    "unknown phase key": (
        put("providers[0].traffic.phases[1].rate", 1), "providers[0].traffic.phases[1].rate", "1", "'rate_per_s'"
    ),
    "key of another kind": (put("providers[1].traffic.phases", []), "providers[1].traffic.phases", "[]", "rates_per_s"),
    "key that is no name": (put("economy", {3: 4}), "economy.3", "4", "known key"),
    "name in defaults": (put("defaults.name", "x"), "defaults.name", "'x'", "known key"),
    "missing key": (lambda m: m["providers"][0].pop("name"), "providers[0].name", "nothing", "a value"),
    "missing kind": (lambda m: m["providers"][0]["traffic"].pop("kind"), "providers[0].traffic.kind", "nothing", "mm"),
    "text for number": (put("rtt_ms", "fast"), "rtt_ms", "'fast'", "a number in [0, 60000]"),
    "bool for number": (put("duration_s", True), "duration_s", "True", "a number"),
    "bool for integer": (put("economy.judges", True), "economy.judges", "True", "an integer in [1, 7]"),
    "float for integer": (put("providers[0].max_num_seqs", 1.5), "providers[0].max_num_seqs", "1.5", "an integer"),
    "number for text": (put("name", 7), "name", "7", "quote it"),
    "null": (put("slo", None), "slo", "None", "a mapping"),
    "list for mapping": (put("economy", [1]), "economy", "[1]", "a mapping"),
    "mapping for list": (put("providers", {"a": 1}), "providers", "{'a': 1}", "a list"),
    "nan": (put("drain_s", math.nan), "drain_s", "nan", "a number"),
    "infinity": (put("duration_s", math.inf), "duration_s", "inf", "a number in (0, 1e+06]"),
    "huge integer": (put("drain_s", 10**400), "drain_s", "1000", "a number"),
    "negative rate": (
        put("providers[0].traffic.phases[0].rate_per_s", -0.5),
        "providers[0].traffic.phases[0].rate_per_s", "-0.5", "a number in [0,",
    ),
    "unknown gpu": (put("providers[1].gpu", "rtx-4091"), "providers[1].gpu", "'rtx-4091'", "did you mean 'rtx-4090'"),
    "unknown gpu in defaults": (put("defaults.gpu", "tpu"), "defaults.gpu", "'tpu'", "one of a100-80g"),
    "unknown model": (put("providers[1].model", "gpt"), "providers[1].model", "'gpt'", "one of qwen3-0.6b"),
    "model too large": (put("providers[0].model", "qwen3-14b"), "providers[0].model", "'qwen3-14b'", "fits on rtx"),
    "no such trace": (put("providers[3].traffic.file", "no.csv"), "providers[3].traffic.file", "'no.csv'", "a trace"),
    "trace name too long": (put("providers[3].traffic.file", "x" * 999), "providers[3].traffic.file", "xxx", "trace"),
    "trace start": (put("providers[3].traffic.start_s", 3600), "providers[3].traffic.start_s", "3600", "[0, 3501.9)"),
    "rate_scale": (put("providers[3].traffic.rate_scale", 1.5), "providers[3].traffic.rate_scale", "1.5", "(0, 1]"),
    "dwell": (put("providers[1].traffic.mean_dwell_s", [9, 0]), "providers[1].traffic.mean_dwell_s[1]", "0", "[0.1"),
    "two rates": (put("providers[1].traffic.rates_per_s", [1]), "providers[1].traffic.rates_per_s", "[1]", "2 entries"),
    "traffic kind": (put("providers[0].traffic.kind", "posson"), "providers[0].traffic.kind", "'posson'", "'poisson'"),
    "time outside": (put("providers[2].traffic.times_s", [600]), "providers[2].traffic.times_s[0]", "600", "[0, 600)"),
    "online outside": (put("providers[2].online_s", [[0, 700]]), "providers[2].online_s[0][1]", "700", "[0, 600]"),
    "online backwards": (put("providers[2].online_s", [[9, 5]]), "providers[2].online_s[0][1]", "5", "more than 9"),
    "many judges": (put("economy.judges", 8), "economy.judges", "8", "an integer in [1, 7]"),
    "many slots": (put("providers[0].max_num_seqs", 1025), "providers[0].max_num_seqs", "1025", "in [1, 1024]"),
    "many windows": (
        put("providers[2].online_s", [[k, k + 0.5] for k in range(9)]), "providers[2].online_s", "[1, 1.5]", "1 to 8"
    ),
    "many served names": (
        lambda m: [each.update(serves=[f"{i}-{k}" for k in range(32)]) for i, each in enumerate(m["providers"][:2])],
        "providers", "6", "at most 62 different names"
    ),
    "online overlaps": (put("providers[2].online_s", [[0, 9], [8, 20]]), "providers[2].online_s[1][0]", "8", "than 9"),
    "misreport outside": (put("providers[3].misreport.until_s", 601), "providers[3].misreport.until_s", "601", "600]"),
    "misreport backwards": (put("providers[3].misreport.until_s", 50), "providers[3].misreport.until_s", "50", "from"),
    "misreport promise": (put("providers[3].misreport.promise", 0), "providers[3].misreport.promise", "0", "(0, 100]"),
    "misreport speed": (put("providers[3].misreport.speed", 0), "providers[3].misreport.speed", "0", "(0, 100]"),
    "phases not increasing": (
        put("providers[0].traffic", POISSON), "providers[0].traffic.phases[1].until_s", "200", "more than 300"
    ),
    "phase beyond the run": (
        put("providers[0].traffic.phases[1].until_s", 900), "providers[0].traffic.phases[1].until_s", "900", "(0, 600]"
    ),
    "too many requests": (put("providers[0].traffic", FLOOD), "providers", "600", "at most 2000000 requests"),
    "shares": (put("slo.classes.chat.share", 0.6), "slo.classes", "share", "sum to 1, not to 0.9"),
    "too many classes": (
        put("slo.classes", {f"c{i}": {"share": 0.2, "deadline_s": 1} for i in range(5)}), "slo.classes", "c0", "1 to 4"
    ),
    "thresholds": (put("slo.thresholds_s", [200, 200]), "slo.thresholds_s[1]", "200", "more than 200"),
    "too many thresholds": (put("slo.thresholds_s", list(range(1, 10))), "slo.thresholds_s", "[1, 2", "1 to 8 entries"),
    "payment": (put("economy.payment", "free"), "economy.payment", "'free'", "lateness, quoted, per_request"),
    "probability": (put("economy.duel_probability", 1.1), "economy.duel_probability", "1.1", "[0, 1]"),
    "duplicate name": (put("providers[3].name", "n2"), "providers[3].name", "'n2'", "not that of providers[1]"),
    "no providers": (put("providers", []), "providers", "[]", "1 to 4096 entries"),
    "slow decisions": (put("decision_interval_s", 5.1), "decision_interval_s", "5.1", "(0, 5]"),
    "no decisions": (put("decision_interval_s", 0), "decision_interval_s", "0", "(0, 5]"),
    "median": (put("defaults.lengths.output.median", 0), "defaults.lengths.output.median", "0", "a number in [1,"),
    "served twice": (put("providers[1].serves", ["a", "a"]), "providers[1].serves[1]", "'a'", "not in the list"),
    "strength": (put("providers[1].strength", "high"), "providers[1].strength", "'high'", "[-20, 20]"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refusals_name_field_value_and_expectation(case: str) -> None:
    change, place, value, expected = CASES[case]
    mapping = copy.deepcopy(good())
    change(mapping)
    with pytest.raises(ScenarioError) as caught:
        scenario.parse(mapping, "some.yaml")
    assert caught.value.place == place
    assert value in caught.value.value
    assert expected in caught.value.expected
    for part in ("some.yaml", place, value, expected):
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("mapping", [None, [], "text", 3])
def test_a_scenario_must_be_a_mapping(mapping: Any) -> None:
    with pytest.raises(ScenarioError, match=r"the scenario: got .*, expected a mapping"):
        scenario.parse(mapping)


FILES: dict[str, tuple[str | bytes, str]] = {
    "syntax": ("name: [", "valid YAML"),
    "duplicate key": (FILE.replace("rtt_ms: 40", "drain_s: 40"), "key 'drain_s' twice"),
    "duplicate key inside": (FILE.replace("judges: 5", "payment: quoted"), "key 'payment' twice"),
    "merge key": (FILE.replace("rtt_ms: 40", "<<: {rtt_ms: 40}"), "valid YAML"),
    "python object": ("name: !!python/object/apply:os.getcwd []", "valid YAML"),
    "bad tag": ("name: !!timestamp soon", "valid YAML"),
    "list as key": ("? [a]\n: 1", "a key must be a name"),
    "two documents": ("name: a\n---\nname: b", "valid YAML"),
    "deep nesting": ("[" * 20_000, "valid YAML"),
    "endless alias": ("name: &a [*a]\nproviders: []", "name: got"),
    "many digits": ("duration_s: " + "9" * 5000, "valid YAML"),
    "control characters": (b"name: \x00", "valid YAML"),
    "not UTF-8": (b"name: \xff\xfe", "byte 0xff at offset 6, expected text in UTF-8"),
    "too large": (b"#" * 1_000_001, "at most 1000000 bytes"),
    "empty": ("", "expected a mapping"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files(case: str, tmp_path: Path) -> None:
    content, expected = FILES[case]
    path = write(tmp_path, content)
    with pytest.raises(ScenarioError) as caught:
        scenario.load(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["paper/alternatin", "", "../scenarios", "a\0b", "x" * 5000])
def test_no_such_scenario(name: str) -> None:
    with pytest.raises(ScenarioError, match="expected a packaged scenario or a YAML file") as caught:
        scenario.load(name)
    assert ("did you mean 'paper/alternating" in str(caught.value)) == name.startswith("paper")


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
TRACES: dict[str, tuple[str | bytes, str]] = {
    "header": ("time,in,out\n", "header"),
    "empty": ("", "header"),
    "one request": (HEADER + "2023-11-16 18:15:46.68,3,4\n", "at least two requests"),
    "time": (HEADER + "2023-11-16 18:15:46.68,3,4\nnoon,3,4\n", "line 3"),
    "tokens": (HEADER + "2023-11-16 18:15:46.68,3,many\n", "line 2"),
    "columns": (HEADER + "2023-11-16 18:15:46.68,3\n", "line 2"),
    "negative": (HEADER + "2023-11-16 18:15:46.68,3,4\n2023-11-16 18:15:47,3,-4\n", "negative"),
    "bytes": (b"\xff\x00", "can be read"),
}


@pytest.mark.parametrize("case", TRACES)
@pytest.mark.parametrize("suffix", [".csv", ".npz"])
def test_bad_traces(case: str, suffix: str, tmp_path: Path) -> None:
    content, expected = TRACES[case]
    (tmp_path / f"t{suffix}").write_bytes(content if isinstance(content, bytes) else content.encode())
    path = write(tmp_path, FILE.replace("azure_llm_conv_2023.csv", f"t{suffix}"))
    with pytest.raises(ScenarioError) as caught:
        scenario.load(path)
    assert caught.value.place == "providers[3].traffic.file"
    assert (expected if suffix == ".csv" else "not a compact trace") in str(caught.value)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.75, 1.5])
def test_moments_of_clipped_lengths(sigma: float) -> None:
    lengths = Lognormal(4000.0, sigma, 8192)
    draws = np.minimum(4000 * np.exp(sigma * np.random.default_rng(0).standard_normal(1_000_000)), 8192)
    assert lengths.mean == pytest.approx(draws.mean(), rel=3e-3)
    assert lengths.moment(2) == pytest.approx((draws**2).mean(), rel=5e-3)
