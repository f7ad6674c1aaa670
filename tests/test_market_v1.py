"""The PettingZoo environment: conformance, spaces, masks, seeds, and the end of a market."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from pettingzoo.test import api_test, parallel_api_test, parallel_seed_test

from wwwserve.agents.decision import AT_COST, FLAT_ACTIONS, HOLD, LOCAL, NODES, ROUTES, decode, encode
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import (
    FINISH_S,
    FIRST_SLACK_S,
    HAS_REQUEST,
    KV_USE,
    NODE_FEATURES,
    REQUEST_FEATURES,
    SELF_FEATURES,
)
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.market_v1 import OBSERVATION_SIZE, MarketEnv, MaskedDiscrete, env, parallel_env
from wwwserve.envs.scenario import Scenario, ScenarioError, load, parse
from wwwserve.envs.state import INVALID, Reward, plan


def market(name: str = "short", **changes: Any) -> Scenario:
    """A minute of four unlike providers: one leaves and returns, one lies; requests of two classes, paid by tariff."""
    rates = {"n1": 0.5, "n2": 0.3, "n3": 0.2, "n4": 0.1}
    providers: list[dict[str, Any]] = [
        {"name": n, "traffic": {"kind": "poisson", "phases": [{"until_s": 60, "rate_per_s": rate}]}}
        for n, rate in rates.items()
    ]
    providers[1]["gpu"] = "a100-80g"
    providers[2]["online_s"] = [[0, 20], [35, 60]]
    providers[3]["misreport"] = {"load": 0.2, "speed": 2.0, "from_s": 10, "until_s": 50}
    mapping: dict[str, Any] = {
        "name": name,
        "duration_s": 60,
        "drain_s": 60,
        "slo": {
            "classes": {
                "chat": {"share": 0.7, "deadline_s": 5, "value": 3, "output": {"median": 50, "sigma": 0.6, "max": 400}},
                "batch": {"share": 0.3, "deadline_s": 30, "value": 1},
            }
        },
        "economy": {"duel_probability": 0.2, "compute_cost_per_ktok": 0.1},
        "defaults": {"max_num_seqs": 8, "lengths": {"output": {"median": 300, "sigma": 0.75, "max": 1000}}},
        "providers": providers,
    }
    return parse(mapping | changes)


def random_actions(env: MarketEnv, rng: np.random.Generator) -> dict[str, int]:
    """Any actions, legal or not."""
    return {agent: int(rng.integers(FLAT_ACTIONS)) for agent in env.agents}


def legal_actions(env: MarketEnv, observations: Mapping[str, Any], rng: np.random.Generator) -> dict[str, int]:
    return {a: int(rng.choice(np.flatnonzero(observations[a]["action_mask"]))) for a in env.agents}


def hold_all(env: MarketEnv) -> dict[str, int]:
    return dict.fromkeys(env.agents, int(encode(HOLD, AT_COST)))


def step_until_active(env: MarketEnv, observations: Mapping[str, Any], agent: str) -> Mapping[str, Any]:
    """Hold until the agent has a request to decide on."""
    for _ in range(200):
        if len(open_routes(observations[agent])) > 1:
            return observations
        observations, *_ = env.step(hold_all(env))
    raise AssertionError(f"{agent} was never active")


def open_routes(observation: Mapping[str, Any]) -> list[int]:
    mask = observation["action_mask"].reshape(ROUTES, MARKUPS.size)
    return np.flatnonzero(mask.any(axis=1)).tolist()


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit, through dicts and tuples."""
    if isinstance(a, Mapping):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, tuple):
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    else:
        assert a == b


@pytest.mark.filterwarnings("ignore:Observation space for each agent", "ignore:We recommend agents to be named")
@pytest.mark.filterwarnings("ignore:Observation is not a NumPy array")
def test_pettingzoo_finds_no_fault() -> None:
    parallel_api_test(parallel_env(market()), num_cycles=500)
    parallel_seed_test(lambda: parallel_env(market()))
    api_test(env(market()), num_cycles=100)


def test_two_environments_with_one_seed_are_the_same_to_the_end() -> None:
    one, two = (parallel_env(market()) for _ in range(2))
    for seed in (7, None, None):  # resets without a seed go on with the generator of the last one
        assert_same(one.reset(seed=seed), two.reset(seed=seed))
        rng, steps = np.random.default_rng(0), 0
        while one.agents:
            actions = random_actions(one, rng)
            assert_same(one.step(actions), two.step(actions))
            assert_same(one.state(), two.state())
            steps += 1
        assert not two.agents and steps > 60


def test_another_seed_is_another_market() -> None:
    one, two = parallel_env(market()), parallel_env(market())
    one.reset(seed=1), two.reset(seed=2)
    seen = []
    for each in (one, two):
        for _ in range(20):
            observations, *_ = each.step(hold_all(each))
        seen.append(np.concatenate([observations[a]["observation"] for a in each.agents]))
    assert not np.array_equal(*seen)


def test_resets_without_a_seed_differ() -> None:
    env = parallel_env(market())
    env.reset(seed=3)
    seeds = set()
    for _ in range(3):
        env.reset()
        assert env._batch is not None
        seeds.add(env._batch.plans[0].seed)
    assert len(seeds) == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_a_market_does_not_see_the_batch_it_runs_in(threads: int) -> None:
    scenarios = [market(), load("paper/alternating"), market("other", rtt_ms=200), load("liars/first"), market("third")]
    seeds = [11, 22, 33, 44, 55]
    batch = MarketBatch(scenarios, seeds, threads=threads)
    alone = [MarketBatch([s], [seed]) for s, seed in zip(scenarios, seeds, strict=True)]
    rng = np.random.default_rng(5)
    actions = batch.actions()
    for _ in range(300):
        actions.route[...] = rng.integers(0, ROUTES, actions.route.shape)
        actions.markup[...] = rng.integers(0, MARKUPS.size, actions.markup.shape)
        batch.step(actions)
        for b, one in enumerate(alone):
            n = one.providers
            mine = one.actions()
            for whole, part in zip(actions, mine, strict=True):
                part[0] = whole[b, :n]
            one.step(mine)
            for whole, part in zip(
                (*batch.views, batch.active, batch.uniforms, batch.reward),
                (*one.views, one.active, one.uniforms, one.reward),
                strict=True,
            ):
                assert_same(np.ascontiguousarray(whole[b, :n]), part[0])
            assert batch.now_s[b] == one.now_s[0]
    assert batch.over[0] and not batch.over[1]


def test_it_is_the_batch_step_by_step() -> None:
    """What an agent sees, earns and may do is its row of the batch's arrays, in the documented order."""
    env = parallel_env(market(), team_weight=0.25, gamma=0.9, dense=False)
    observations, _ = env.reset(seed=9)
    batch = MarketBatch([plan(market(), 9)], reward=Reward(team_weight=0.25, gamma=0.9, dense=False))
    actions = batch.actions()
    rng = np.random.default_rng(1)
    size = len(NODE_FEATURES)
    earned = []
    while env.agents:
        for i, agent in enumerate(env.possible_agents):
            vector = observations[agent]["observation"]
            assert vector[KV_USE] == batch.views.nodes[0, i, 0, KV_USE]
            assert vector[3 * size + FINISH_S] == batch.views.nodes[0, i, 3, FINISH_S]
            assert vector[NODES * size + FIRST_SLACK_S] == batch.views.request[0, i, FIRST_SLACK_S]
            assert vector[NODES * size + len(REQUEST_FEATURES) + HAS_REQUEST] == batch.views.me[0, i, HAS_REQUEST]
        chosen = legal_actions(env, observations, rng)
        actions.route[0], actions.markup[0] = decode(np.array([chosen[a] for a in env.agents]))
        batch.step(actions)
        observations, rewards, *_ = env.step(chosen)
        assert list(rewards.values()) == batch.reward[0].tolist()
        earned.append(list(rewards.values()))
    assert np.ptp(np.array(earned), axis=1).max() > 0  # rewards are each provider's own


@pytest.mark.parametrize("name", ["paper/bursty-churn", "liars/first", "market/deadlines", "short"])
def test_every_observation_lies_in_its_space(name: str) -> None:
    env = parallel_env(market() if name == "short" else name)
    observations, infos = env.reset(seed=4)
    rng = np.random.default_rng(4)
    offline = steps = 0
    while env.agents:
        for agent in env.possible_agents:
            observation = observations[agent]
            assert env.observation_space(agent).contains(observation), (env.state(), agent)
            assert observation["action_mask"].dtype == np.int8 and observation["action_mask"].any()
            if not infos[agent]["active"]:
                assert open_routes(observation) == [HOLD]
                assert observation["observation"][HAS_REQUEST - len(SELF_FEATURES)] == 0  # nor what it has decided on
            offline += not infos[agent]["online"]
        state = env.state()
        assert env.state_space.contains(state)
        assert env.agents == env.possible_agents
        steps += 1
        observations, _, _, _, infos = env.step(legal_actions(env, observations, rng))
        assert all(info["invalid"] == 0 for info in infos.values())
    assert all(env.observation_space(a).contains(observations[a]) for a in env.possible_agents)
    assert env.state_space.contains(env.state())
    assert steps >= env.scenario.duration_s
    assert (offline > 0) == (name in ("paper/bursty-churn", "short"))


def test_the_state_holds_all_observations_and_the_time() -> None:
    env = parallel_env(market())
    observations, infos = env.reset(seed=0)
    while True:
        count = len(env.possible_agents)
        vectors, rest = np.split(env.state(), [count * OBSERVATION_SIZE])
        np.testing.assert_array_equal(
            vectors.reshape(count, -1), [observations[a]["observation"] for a in env.possible_agents]
        )
        online, active, (arrivals, drain) = rest[:count], rest[count : 2 * count], rest[2 * count :]
        assert online.tolist() == [infos[a]["online"] for a in env.possible_agents]
        assert active.tolist() == [infos[a]["active"] for a in env.possible_agents]
        now_s = infos["n1"]["now_s"]
        assert (arrivals, drain) == pytest.approx((min(now_s / 60, 1), max(now_s - 60, 0) / 60))
        if not env.agents:
            break
        observations, _, _, _, infos = env.step(hold_all(env))


def test_the_mask_is_routes_by_markups() -> None:
    env = parallel_env(market())
    observations, _ = env.reset(seed=1)
    observations = step_until_active(env, observations, "n1")
    mask = observations["n1"]["action_mask"].reshape(ROUTES, MARKUPS.size)
    routes = mask[:, 0]
    assert routes[LOCAL] and routes.sum() >= 3
    np.testing.assert_array_equal(mask, routes[:, None] * np.ones((1, MARKUPS.size)))


def test_a_masked_action_is_hold_and_is_counted() -> None:
    """Two copies of a market part only in the counter when one holds and the other does what its mask forbids."""
    one, two = (parallel_env(market()) for _ in range(2))
    step_until_active(one, one.reset(seed=2)[0], "n1")
    observations = step_until_active(two, two.reset(seed=2)[0], "n1")
    forbidden = int(encode(ROUTES - 1, 2))
    assert observations["n1"]["action_mask"][forbidden] == 0 and HOLD in open_routes(observations["n1"])
    seen = [
        one.step({**hold_all(one), "n1": int(encode(HOLD, 2))}),
        two.step({**hold_all(two), "n1": forbidden}),
    ]
    rng = np.random.default_rng(0)
    while True:
        assert seen[0][4]["n1"].pop("invalid") == 0 and seen[1][4]["n1"].pop("invalid") == 1
        assert_same(*seen)
        if not one.agents:
            break
        actions = legal_actions(one, seen[0][0], rng)
        seen = [one.step(actions), two.step(actions)]
    for each, expected in ((one, 0), (two, 1)):
        assert each._batch is not None
        assert each._batch.markets.providers["counts"][0, :, INVALID].tolist() == [expected, 0, 0, 0]


@pytest.mark.parametrize("route", [HOLD, ROUTES - 1], ids=["hold", "candidate"])
def test_where_holding_is_over_the_request_runs_here(route: int) -> None:
    env = parallel_env(market())
    observations, _ = env.reset(seed=2)
    for _ in range(200):
        observations = step_until_active(env, observations, "n1")
        if HOLD not in open_routes(observations["n1"]):
            break
        observations, *_ = env.step(hold_all(env))
    assert env._batch is not None
    engines, counts = env._batch.markets.engines[0], env._batch.markets.providers["counts"][0]
    before = int(engines["running"][0] + engines["waiting"][0])
    _, _, _, _, infos = env.step({**hold_all(env), "n1": int(encode(route, 0))})
    assert infos["n1"]["invalid"] == counts[0, INVALID] == 1
    assert int(engines["running"][0] + engines["waiting"][0]) == before + 1


def test_actions_of_agents_that_are_not_active_change_nothing() -> None:
    one, two = (parallel_env(market()) for _ in range(2))
    (observations, infos), _ = one.reset(seed=6), two.reset(seed=6)
    rng = np.random.default_rng(3)
    ignored = 0
    while one.agents:
        actions = legal_actions(one, observations, rng)
        noisy = {a: x if infos[a]["active"] else int(rng.integers(FLAT_ACTIONS)) for a, x in actions.items()}
        ignored += noisy != actions
        seen = one.step(actions)
        assert_same(seen, two.step(noisy))
        observations, _, _, _, infos = seen
    assert ignored > 20


def test_the_end_is_a_truncation() -> None:
    env = parallel_env(market())
    env.reset(seed=0)
    while env.agents:
        assert env.agents == env.possible_agents
        _, rewards, terminations, truncations, infos = env.step(hold_all(env))
        assert terminations == dict.fromkeys(env.possible_agents, False)
        over = not env.agents
        assert truncations == dict.fromkeys(env.possible_agents, over)
        assert rewards.keys() == infos.keys() == set(env.possible_agents)
    assert infos["n1"]["now_s"] >= 60
    assert env.step({}) == ({}, {}, {}, {}, {})
    observations, _ = env.reset()
    assert env.agents == list(observations) == env.possible_agents


def test_time_moves_to_the_next_decision_or_not_at_all() -> None:
    """To what has something to decide, which need not be a tick, and never past a tick at which an advert is due."""
    env = parallel_env(market(decision_interval_s=0.5, gossip_interval_s=0.5))
    observations, infos = env.reset(seed=0)
    rng, elapsed = np.random.default_rng(0), set()
    now_s, instants = 0.0, {0.0}
    while env.agents:
        actions = legal_actions(env, observations, rng)
        for agent in env.agents:  # what is held is not decided on when more of its class arrives
            if LOCAL in open_routes(observations[agent]) and actions[agent] < encode(LOCAL, 0):
                actions[agent] = int(encode(LOCAL, 0))
        observations, _, _, _, infos = env.step(actions)
        elapsed.add(infos["n2"]["elapsed_s"])
        now_s += infos["n2"]["elapsed_s"]
        assert infos["n1"]["now_s"] == pytest.approx(now_s)
        assert not env.agents or infos["n2"]["elapsed_s"] == 0 or any(info["active"] for info in infos.values())
        instants.add(infos["n1"]["now_s"])
    assert max(elapsed) <= 0.5 + 1e-9
    assert env._batch is not None
    arrivals_s = env._batch.requests(0).arrival_s
    online = env._batch.plans[0].traffic.provider != 2  # the third is away for a while, and joins at a tick
    assert instants >= set(np.arange(0, infos["n1"]["now_s"], 0.5).tolist()) | set(arrivals_s[online].tolist())


def test_samples_are_uniform_over_the_legal_actions() -> None:
    space = MaskedDiscrete(6, seed=3)
    mask = np.array([0, 1, 1, 0, 0, 1], np.int8)
    found = np.bincount([space.sample(mask) for _ in range(3000)], minlength=6)
    assert not found[mask == 0].any() and (found[mask == 1] > 900).all()
    assert {int(space.sample()) for _ in range(200)} == set(range(6))
    assert space.sample(np.zeros(6, np.int8)) == 0  # as Discrete does


def test_later_steps_leave_what_was_returned_alone() -> None:
    env = parallel_env(market())
    observations, _ = env.reset(seed=0)
    kept = {a: {key: x.copy() for key, x in observations[a].items()} for a in env.agents}
    for _ in range(30):
        env.step(hold_all(env))
    assert_same(observations, kept)


@pytest.mark.parametrize(
    "bad",
    [-1, FLAT_ACTIONS, 3.5, None, "hold", np.array([1, 2])],
    ids=["below", "above", "float", "none", "text", "two"],
)
def test_an_action_outside_the_space_is_refused(bad: Any) -> None:
    env = parallel_env(market())
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action of n3 is .*, expected an integer, 0 to 89"):
        env.step({**hold_all(env), "n3": bad})


def test_a_missing_action_is_refused() -> None:
    env = parallel_env(market())
    env.reset(seed=0)
    with pytest.raises(ValueError, match="no action for agent 'n2'"):
        env.step({agent: 0 for agent in env.agents if agent != "n2"})


def test_nothing_works_before_reset() -> None:
    for use in (lambda e: e.step({}), lambda e: e.state()):
        with pytest.raises(RuntimeError, match="reset"):
            use(parallel_env(market()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"team_weight": 1.5}, "team_weight is 1.5"),
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"render_mode": "human"}, "render_mode is 'human'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallel_env(market(), **settings)
    with pytest.raises(ScenarioError):
        parallel_env("paper/alternatin")


def test_render_is_a_table_of_the_providers() -> None:
    env = parallel_env(market(), render_mode="ansi")
    env.reset(seed=0)
    while True:
        _, _, _, _, infos = env.step(hold_all(env))
        if infos["n1"]["now_s"] > 25:  # n3 is away from 20 s to 35 s
            break
    table = env.render()
    assert table is not None
    rows = [row.split() for row in table.splitlines()[2:]]
    assert [(name, online) for name, online, *_ in rows] == [("n1", "yes"), ("n2", "yes"), ("n3", "no"), ("n4", "yes")]
    assert parallel_env(market()).render() is None
