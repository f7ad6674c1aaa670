"""Sessions and shared prefixes: what follows what, what requests have in common, what of a trace is kept."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wwwserve.envs import scenario, trace, traffic
from wwwserve.envs.scenario import Scenario, ScenarioError
from wwwserve.envs.state import plan
from wwwserve.envs.traffic import Arrivals

LONGEST = 40_960
CHAT = {
    "kind": "sessions", "rate_per_s": 0.15, "system_tokens": 830,
    "turns": {"median": 4, "sigma": 0.7, "max": 30}, "turn": {"median": 90, "sigma": 0.9, "max": 2000},
    "think_s": {"median": 12, "sigma": 1.0, "max": 120},
}  # fmt: skip
MOONCAKE = {"kind": "trace", "file": "mooncake_conversation.csv"}
AGENTS = {"kind": "trace", "file": "agent_sessions.csv.gz", "rate_scale": 0.1, "length_scale": 0.25}
OUTPUT = {"median": 200, "sigma": 0.6, "max": 1024}


def market(*traffics: dict[str, Any] | None, **keys: Any) -> Scenario:
    """A scenario with one provider for each traffic."""
    lengths = {"prompt": {"median": 150, "sigma": 0.5, "max": 2048}, "output": OUTPUT}
    providers = [{"name": f"n{i}", "traffic": each, "lengths": lengths} for i, each in enumerate(traffics)]
    return scenario.parse({"name": "test", "providers": providers} | keys)


def draw(made: Scenario, seed: int = 1, longest: int = LONGEST) -> Arrivals:
    return traffic.arrivals(made, seed, np.full(len(made.providers), longest))


def path(got: Arrivals, r: int) -> list[int]:
    """Nodes on the path of a request, from its leaf up."""
    nodes = [int(got.leaf[r])]
    while got.tree.parent[nodes[-1]] >= 0:
        nodes.append(int(got.tree.parent[nodes[-1]]))
    return nodes


def common_blocks(got: Arrivals, a: int, b: int) -> int:
    """Blocks that two requests have in common."""
    return int(got.tree.blocks[list(set(path(got, a)) & set(path(got, b)))].sum())


def time_of(got: Arrivals, r: int) -> float:
    """When it comes at the soonest: if answers took no time."""
    total = 0.0
    while got.follows[r] >= 0:
        total, r = total + got.think_s[r], int(got.follows[r])
    return total + float(got.time_s[r])


KINDS = {
    "chat": CHAT,
    "no system prompt": CHAT | {"system_tokens": 0},
    "prefix blocks": MOONCAKE | {"rate_scale": 0.1, "length_scale": 0.7},
    "agents": AGENTS,
    "plain": {"kind": "poisson", "phases": [{"until_s": 600, "rate_per_s": 0.5}]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_tokens", [16, 48, 512])
def test_paths_are_whole_nodes_of_trees_that_providers_do_not_share(kind: str, block_tokens: int) -> None:
    got = draw(market(KINDS[kind], KINDS[kind], prefix_cache={"block_tokens": block_tokens}))
    parent, start, blocks = got.tree
    ends = start + blocks
    child = parent >= 0
    assert (start[child] == ends[parent[child]]).all() and (start[~child] == 0).all() and (blocks >= 0).all()
    assert (ends[got.leaf] == (got.prompt + got.output) // 16).all()
    assert (ends[parent[child]] % (block_tokens // 16) == 0).all()
    owners: dict[int, int] = {}
    for r in range(len(got.time_s)):
        assert sum(blocks[path(got, r)]) == ends[got.leaf[r]]
        for node in path(got, r):
            assert owners.setdefault(node, got.provider[r]) == got.provider[r]
    assert len(owners) == len(parent) or kind == "prefix blocks"  # of a cut one, what nobody reads any more


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_comes_after_what_it_follows(kind: str) -> None:
    got = draw(market(KINDS[kind], KINDS["plain"], KINDS[kind]))
    follows, count = got.follows, int((got.follows < 0).sum())
    assert (follows[:count] < 0).all() and (got.turn[:count] == 1).all() and (got.think_s[:count] == 0).all()
    assert (np.diff(got.time_s[:count]) >= 0).all() and got.time_s[:count].max() < 600
    later = np.arange(count, len(follows))
    assert (len(later) > 100) == (kind not in ("plain", "prefix blocks"))
    assert np.isinf(got.time_s[later]).all() and (follows[later] < later).all()
    assert len(set(follows[later])) == len(later)
    assert (got.provider[later] == got.provider[follows[later]]).all()
    assert (got.klass[later] == got.klass[follows[later]]).all()
    assert (got.turn[later] == got.turn[follows[later]] + 1).all()
    assert all(time_of(got, r) < 600 for r in later)


def test_a_turn_has_all_that_was_said_before() -> None:
    got = draw(market(CHAT))
    later = np.flatnonzero(got.follows >= 0)
    before = got.prompt[got.follows[later]] + got.output[got.follows[later]]
    own = got.prompt[later] - before
    assert own.min() >= 1 and np.median(own) == pytest.approx(90, rel=0.1)
    assert np.median(got.think_s[later]) == pytest.approx(12, rel=0.15) and got.think_s.max() <= 120
    for r, tokens in zip(later.tolist(), before.tolist(), strict=True):
        assert common_blocks(got, r, int(got.follows[r])) == tokens // 16
    first = np.flatnonzero(got.turn == 1)
    assert {common_blocks(got, int(first[0]), r) for r in first[1:].tolist()} == {830 // 16}
    assert np.median(got.prompt[first]) == pytest.approx(830 + 90, rel=0.1)


def test_requests_part_at_whole_blocks_of_the_engine() -> None:
    got = draw(market(CHAT, prefix_cache={"block_tokens": 128}))
    for r in np.flatnonzero(got.follows >= 0).tolist():
        before = int(got.prompt[got.follows[r]] + got.output[got.follows[r]])
        assert common_blocks(got, r, int(got.follows[r])) == before // 128 * 8


def test_as_many_sessions_begin_as_the_rate_says() -> None:
    burst = {"phases": [{"until_s": 100, "rate_per_s": 0.2}, {"until_s": 110, "rate_per_s": 4}]}
    both = market(CHAT, {key: value for key, value in CHAT.items() if key != "rate_per_s"} | burst)
    counts = np.zeros((2, 2))
    for seed in range(20):
        got = draw(both, seed)
        first = got.turn == 1
        early = got.time_s[first] < 100
        for i in (0, 1):
            own = got.provider[first] == i
            counts[i] += (own & early).sum() / 20, (own & ~early).sum() / 20
            assert i == 0 or got.time_s[first][own].max() < 110
    assert counts == pytest.approx(np.array([[15, 75], [20, 40]]), rel=0.15)


def test_a_session_ends_before_the_turn_that_its_engine_cannot_hold() -> None:
    short, long = draw(market(CHAT), longest=2000), draw(market(CHAT))
    assert (short.prompt + short.output).max() <= 2000 < (long.prompt + long.output).max()
    fits = np.flatnonzero(long.prompt + long.output <= 2000)  # contexts only grow
    assert sorted(short.prompt.tolist()) == sorted(long.prompt[fits].tolist())


def test_no_session_begins_while_its_provider_is_offline() -> None:
    mapping = market(CHAT, CHAT).to_mapping()
    mapping["providers"][1]["online_s"] = [[100, 300]]
    got, whole = draw(scenario.parse(mapping)), draw(market(CHAT, CHAT))
    assert (got.provider == 0).sum() == (whole.provider == 0).sum()
    own = (got.provider == 1) & (got.turn == 1)
    expected = whole.time_s[(whole.provider == 1) & (whole.turn == 1)]
    assert np.array_equal(got.time_s[own], expected[(expected >= 100) & (expected < 300)])


def test_a_session_is_of_one_class_with_its_output_lengths() -> None:
    classes = {"slow": {"share": 0.6, "deadline_s": 60, "output": {"median": 30, "sigma": 0.3, "max": 100}}}
    got = draw(market(CHAT, CHAT, slo={"classes": classes | {"fast": {"share": 0.4, "deadline_s": 10}}}))
    first = got.turn == 1
    assert got.klass[first].mean() == pytest.approx(0.4, abs=0.1)
    assert got.output[got.klass == 0].max() <= 100 < np.median(got.output[got.klass == 1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes(kind: str) -> None:
    made = market(KINDS[kind], KINDS["plain"], KINDS[kind])
    a, b, other = draw(made, 5), draw(made, 5), draw(made, 6)
    for x, y in zip((*a[:-1], *a.tree), (*b[:-1], *b.tree), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)
    assert not np.array_equal(a.prompt, other.prompt)


def packaged(name: str) -> trace.Trace:
    file = trace.find(name, None)
    assert file is not None
    return trace.read(file)


def repeated(got: Arrivals) -> float:
    """Share of the prompts' tokens that an earlier prompt began with; nodes that only answers have are no prompt's."""
    known: set[int] = set()
    hit = 0
    for r in range(len(got.time_s)):
        nodes = path(got, r)
        hit += 16 * int(got.tree.blocks[[node for node in nodes if node in known]].sum())
        known.update(nodes)
    return hit / float(got.prompt.sum())


def test_thinning_a_prefix_trace_keeps_its_reuse() -> None:
    whole = draw(market(MOONCAKE, duration_s=3600), longest=200_000)
    assert len(whole.time_s) == 12_031
    assert repeated(whole) == pytest.approx(0.37, abs=0.005)
    thin = [draw(market(MOONCAKE | {"rate_scale": 0.2}, duration_s=3600), seed, 200_000) for seed in range(3)]
    assert np.mean([len(each.time_s) for each in thin]) == pytest.approx(12_031 / 5, rel=0.1)
    assert np.mean([repeated(each) for each in thin]) == pytest.approx(0.37, abs=0.05)


def test_requests_of_a_prefix_trace_are_cut_to_what_the_engine_holds() -> None:
    whole, cut = draw(market(MOONCAKE), longest=200_000), draw(market(MOONCAKE), longest=8192)
    assert (cut.prompt + cut.output).max() == 8192 < (whole.prompt + whole.output).max()
    assert np.array_equal(cut.prompt, np.minimum(whole.prompt, 8191))
    pairs = np.random.default_rng(0).integers(len(cut.prompt), size=(3000, 2))
    alike = [(a, b) for a, b in pairs.tolist() if a != b and (whole.prompt[[a, b]] > 9000).all()]
    for a, b in alike[:100]:
        most = min(common_blocks(whole, a, b), int(cut.prompt[[a, b]].min()) // 16)
        assert common_blocks(cut, a, b) == most


def test_lengths_are_scaled_shared_ones_too() -> None:
    whole, half = (draw(market(MOONCAKE | {"length_scale": scale}), longest=200_000) for scale in (1.0, 0.5))
    assert half.prompt == pytest.approx(whole.prompt / 2, abs=0.51)
    assert half.output == pytest.approx(np.maximum(whole.output / 2, 1), abs=0.51)
    for a, b in np.random.default_rng(0).integers(500, size=(500, 2)).tolist():
        if a != b:
            assert common_blocks(half, a, b) == common_blocks(whole, a, b) // 2


def test_sessions_of_a_trace_come_as_recorded() -> None:
    recorded = packaged("agent_sessions.csv.gz")
    sessions = recorded.sessions
    assert sessions is not None
    assert (len(recorded.time_s), int(sessions.session.max()) + 1, recorded.period_s) == (20_598, 355, 0)
    assert sessions.shared.sum() / recorded.prompt.sum() == pytest.approx(0.956, abs=0.001)
    got = draw(market(AGENTS | {"rate_scale": 1, "length_scale": 1}, duration_s=1e6), longest=2_000_000)
    assert 0.98 * 20_598 < len(got.time_s) <= 20_598  # some begin late
    assert 410 < int((got.turn == 1).sum()) <= 355 + 63  # agents that the main ones start
    for k in np.flatnonzero(sessions.session == 2)[:40].tolist():
        (r,) = np.flatnonzero((got.prompt == recorded.prompt[k]) & (got.output == recorded.output[k]))
        assert got.turn[r] == sessions.turn[k]
        if got.follows[r] >= 0:
            assert got.think_s[r] == sessions.think_s[k]
            assert common_blocks(got, int(r), int(got.follows[r])) == sessions.shared[k] // 16


def test_sessions_that_the_recording_does_not_date_begin_throughout_the_run() -> None:
    got = draw(market(*[AGENTS] * 4))
    first = np.sort(got.time_s[got.turn == 1])
    assert 100 < len(first) < 200
    assert np.histogram(first, bins=4, range=(0, 600))[0] == pytest.approx(len(first) / 4, rel=0.5)
    a, b = (set(got.prompt[(got.provider == i) & (got.turn == 1)].tolist()) for i in (0, 1))
    assert len(a & b) < 0.5 * min(len(a), len(b))  # each takes a draw of its own


DATED = (
    "# a comment\n"
    "session,agent,t_s,input_tokens,output_tokens,shared_tokens,think_s\n"
    "a,main,100,320,16,0,0\na,main,130,400,10,320,7\na,sub,110,64,8,0,0\na,main,150,200,10,160,\nb,main,400,90,5,0,0\n"
    "a,sub,120,160,8,64,1\nb,main,500,97,5,90,3\n"
)


def dated(folder: Path, start_s: float, duration_s: float = 600) -> Arrivals:
    (folder / "dated.csv").write_text(DATED)
    own = {"kind": "trace", "file": "dated.csv", "start_s": start_s}
    mapping = {"name": "t", "duration_s": duration_s, "providers": [{"name": "n", "traffic": own}]}
    return draw(scenario.parse(mapping, folder=folder))


def test_dated_sessions_begin_when_they_did(tmp_path: Path) -> None:
    got = dated(tmp_path, 0)
    assert got.time_s.tolist() == [0, 10, 300, *[np.inf] * 4]
    assert got.prompt.tolist() == [320, 64, 90, 400, 200, 160, 97]
    assert got.follows.tolist() == [-1, -1, -1, 0, 3, 1, 2]
    assert got.think_s.tolist() == [0, 0, 0, 7, 0, 1, 3]
    assert got.turn.tolist() == [1, 1, 1, 2, 3, 2, 2]
    shared = [common_blocks(got, *pair) for pair in ((0, 3), (3, 4), (0, 4), (1, 5), (0, 1), (2, 6), (0, 2))]
    assert shared == [20, 10, 10, 4, 0, 5, 0]
    assert dated(tmp_path, 250, duration_s=100).time_s.tolist() == [50, np.inf]  # of two, 600 s apart with the gap
    assert dated(tmp_path, 250).time_s[:3].tolist() == [50, 350, 360]


@pytest.mark.parametrize(
    ("keys", "place", "message"),
    [
        (CHAT | {"phases": [{"until_s": 9, "rate_per_s": 1}]}, "rate_per_s", "got 0.15, expected either this key or"),
        ({"kind": "sessions"}, "rate_per_s", "got nothing, expected either this key or phases"),
        (CHAT | {"think_s": {"median": 0, "sigma": 1, "max": 9}}, "think_s.median", "got 0, expected a number in (0, "),
        (CHAT | {"think_s": {"median": 5, "sigma": 1}}, "think_s.max", "got nothing, expected a value"),
        (CHAT | {"system_tokens": -1}, "system_tokens", "got -1, expected an integer in [0, 1000000]"),
        (CHAT | {"turns": {"median": 0.5, "sigma": 0, "max": 3}}, "turns.median", "got 0.5, expected a number in [1,"),
        (CHAT | {"rate_per_s": 1e5}, "", "expected at most 2000000 requests"),
        (MOONCAKE | {"length_scale": 0}, "length_scale", "got 0, expected a number in (0, 100]"),
        (MOONCAKE | {"start_s": 3600}, "start_s", "got 3600, expected a time within the trace, [0, 3537.29)"),
        (AGENTS | {"start_s": 10}, "start_s", "got 10, expected 0, as the trace does not say when its sessions began"),
    ],
)  # fmt: skip
def test_refusals_name_field_value_and_expectation(keys: dict[str, Any], place: str, message: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        market(keys)
    assert message in str(caught.value)
    assert caught.value.place == (f"providers[0].traffic.{place}" if place else "providers")


@pytest.mark.parametrize("tokens", [0, 24, 528, 16.5, True])
def test_blocks_of_a_cache_are_multiples_of_16(tokens: Any) -> None:
    with pytest.raises(ScenarioError, match=rf"prefix_cache.block_tokens: got {tokens}, expected a multiple of 16 in"):
        market(CHAT, prefix_cache={"block_tokens": tokens})


@pytest.mark.parametrize("cache", [None, {}, {"block_tokens": 64}])
def test_sessions_and_caches_survive_the_round_trip(cache: dict[str, int] | None) -> None:
    burst = {"kind": "sessions", "phases": [{"until_s": 60.0, "rate_per_s": 3.0}]}
    made = market(CHAT, burst, MOONCAKE, AGENTS, prefix_cache=cache)
    mapping = made.to_mapping()
    assert mapping["prefix_cache"] == (cache if cache is None else {"block_tokens": 16} | cache)
    assert mapping["providers"][1]["traffic"]["turns"] == {"median": 5.0, "sigma": 0.8, "max": 40}
    assert scenario.parse(mapping) == made


def test_caches_are_on_unless_a_scenario_says_otherwise() -> None:
    cache = market(CHAT).prefix_cache
    assert cache is not None and cache.block_tokens == 16
    assert market(CHAT, prefix_cache=None).prefix_cache is None


BLOCKS = "arrival_s,input_tokens,output_tokens,blocks\n"
SESSIONS = "session,agent,t_s,input_tokens,output_tokens,shared_tokens,think_s\n"
BAD = {
    "blocks missing": (BLOCKS + "0,2000,5,1 2\n1,9,5,\n", "line 2: 2 blocks of 512 tokens are not 2000 tokens"),
    "another prefix": (BLOCKS + "0,1024,5,1 2\n1,1024,5,3 2\n", "line 3: block 2 stands for a prefix"),
    "no block": (BLOCKS + "0,512,5,x\n1,9,5,\n", "line 2"),
    "endless": (BLOCKS + "inf,512,5,1\n1,9,5,\n", "line 2: inf is not a time"),
    "no session": (SESSIONS, "at least one session"),
    "thinking backwards": (SESSIONS + "a,m,0,5,5,0,0\na,m,1,15,5,0,-1\n", "think_s must not be negative"),
    "shared": (SESSIONS + "a,m,0,5,5,-3,0\n", "shared_tokens must not be negative"),
    "columns": (SESSIONS + "a,m,0,5,5\n", "line 2"),
    "header": ("session,agent\n", "neither"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_traces(case: str, tmp_path: Path) -> None:
    text, expected = BAD[case]
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=expected):
        trace.read(file)


def same_trace(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two traces, or their parts, are equal."""
    return all(same_trace(x, y) if isinstance(x, tuple) else np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_compact_forms_are_read_as_the_csv_that_they_stand_for(tmp_path: Path) -> None:
    (tmp_path / "sessions.csv").write_text(DATED)
    np.savez_compressed(
        tmp_path / "sessions.npz", session=[0, 0, 1], turns=[3, 2, 2], start_ticks=[1000_000, 1100_000, 4000_000],
        think_ticks=[0, 70_000, 0, 0, 10_000, 0, 30_000], prompt=[320, 400, 200, 64, 160, 90, 97],
        output=[16, 10, 10, 8, 8, 5, 5], shared=[0, 320, 160, 0, 64, 0, 90],
    )  # fmt: skip
    rows = "0.5,1600,7,7 8 9 10\n0,1024,6,7 8\n2,600,5,7 12\n3,1500,4,7 8 11\n4,90,3,13\n6,1025,2,20 21 22\n"
    with gzip.open(tmp_path / "blocks.csv.gz", "wt") as file:
        file.write(f"# a comment\n{BLOCKS}{rows}")
    np.savez_compressed(
        tmp_path / "blocks.npz", gap_ticks=[0, 5000, 15_000, 10_000, 10_000, 20_000],
        prompt=[1024, 1600, 600, 1500, 90, 1025], output=[6, 7, 5, 4, 3, 2],
        node=[1, 1, 0, 1, -1, -1], parent=[-1, 0], end_blocks=[1, 2],
    )  # fmt: skip
    for name, other in (("sessions.csv", "sessions.npz"), ("blocks.csv.gz", "blocks.npz")):
        a, b = trace.read(tmp_path / name), trace.read(tmp_path / other)
        assert same_trace(a, b), name
    prefixes = trace.read(tmp_path / "blocks.csv.gz").prefixes
    assert prefixes is not None and prefixes.tree.tolist() == [0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("content", [b"no gzip", b"\x1f\x8b\x08\x00broken", b""])
def test_broken_compression(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.csv.gz"
    file.write_bytes(content)
    with pytest.raises(ValueError):
        trace.read(file)


def test_prompts_that_an_origin_expects_of_its_sessions() -> None:
    made = market(CHAT, AGENTS, duration_s=5000)
    planned = plan(made, 3)
    for i, rel in ((0, 0.25), (1, 0.5)):
        own = planned.traffic.prompt[planned.traffic.provider == i]
        assert planned.mean_prompt[i] == pytest.approx(own.mean(), rel=rel)
        expected = traffic.expected_prompt(made.providers[i], planned.profiles[i].max_model_len)
        assert expected.max <= planned.profiles[i].max_model_len
    assert traffic.expected_output(made.providers[0], None).median == 200


def test_the_load_is_scaled_by_a_factor() -> None:
    flow = {"kind": "mmpp", "rates_per_s": [0.1, 0.4], "mean_dwell_s": [9, 9]}
    burst = {"kind": "sessions", "phases": [{"until_s": 60, "rate_per_s": 3}, {"until_s": 70, "rate_per_s": 1}]}
    base = market(CHAT, burst, flow, KINDS["plain"], MOONCAKE | {"rate_scale": 0.4}, None)
    chat, burst, flow, plain, trace_of = (each["traffic"] for each in base.at_load(1.5).to_mapping()["providers"][:5])
    assert chat["rate_per_s"] == pytest.approx(0.225)
    assert [phase["rate_per_s"] for phase in burst["phases"]] == [4.5, 1.5]
    assert flow["rates_per_s"] == pytest.approx([0.15, 0.6])
    assert [phase["rate_per_s"] for phase in plain["phases"]] == [0.75]
    assert trace_of["rate_scale"] == pytest.approx(0.6)
    assert base.at_load(1.5).providers[5].traffic is None
    with pytest.raises(ScenarioError, match=r"providers\[4\].traffic.rate_scale: got 0.4, expected at most 0.333"):
        base.at_load(3)
    with pytest.raises(ScenarioError, match=r"providers\[0\].traffic.kind: got 'times', expected traffic of which"):
        market({"kind": "times", "times_s": [1.0]}).at_load(2)


def test_a_longer_scenario_goes_on_at_its_last_rates() -> None:
    burst = {"kind": "sessions", "phases": [{"until_s": 60, "rate_per_s": 3}, {"until_s": 70, "rate_per_s": 1}]}
    flow = {"kind": "mmpp", "rates_per_s": [0.1, 0.4], "mean_dwell_s": [9, 9]}
    base = market(CHAT, burst, flow, KINDS["plain"], None)
    longer = base.longer(3)
    assert (base.duration_s, longer.duration_s, longer.drain_s) == (600, 1800, base.drain_s)
    chat, burst, _, plain, none = (each.traffic for each in longer.providers)
    assert [phase.until_s for phase in burst.phases] == [60, 1270]
    assert plain.phases[-1].until_s == base.providers[3].traffic.phases[-1].until_s + 1200
    assert (chat, none, base.longer(1)) == (base.providers[0].traffic, None, base)
    before, after = ((t.provider == 3, t.time_s) for t in (plan(base, 7).traffic, plan(longer, 7).traffic))
    assert after[1][after[0]].max() > 1700
    assert after[0].sum() == pytest.approx(3 * before[0].sum(), rel=0.2)
    for kind, traffic_of in (("trace", MOONCAKE), ("times", {"kind": "times", "times_s": [1.0]})):
        with pytest.raises(ScenarioError, match=rf"providers\[0\].traffic.kind: got '{kind}', expected traffic that"):
            market(traffic_of).longer(2)
    with pytest.raises(ScenarioError, match="expected at most 2000000 requests in all"):
        base.longer(1600)
    with pytest.raises(ScenarioError, match=r"duration_s: got 6000000.*, expected at most 1e\+06 s"):
        base.longer(1e4)


@pytest.mark.parametrize("name", [n for n in scenario.packaged_names() if n.startswith("sessions/")] + ["trace/agents"])
def test_packaged_sessions_come_and_can_come_more_often(name: str) -> None:
    made = scenario.load(name)
    planned, more = (plan(each, 1_000_000).traffic for each in (made, made.at_load(1.3)))
    assert 800 < len(planned.time_s) < 4000
    assert (planned.follows >= 0).mean() > 0.3
    first, first_more = ((each.follows < 0).sum() for each in (planned, more))
    assert first_more == pytest.approx(1.3 * first, rel=0.2)
