"""The market as a PettingZoo environment: one market, one agent for each provider.

    env = parallel_env("paper/alternating")
    observations, infos = env.reset(seed=0)
    while env.agents:
        actions = {a: env.action_space(a).sample(observations[a]["action_mask"]) for a in env.agents}
        observations, rewards, terminations, truncations, infos = env.step(actions)

A step is one decision of every active provider; then the clock moves to the next instant at which somebody has
something to decide, or not at all while some request is undecided. Every provider stays in `agents` to the end. One
that is offline or has nothing to decide may only hold, and what it does is ignored. The end of a market is a
truncation: nothing terminates.

The version in the name goes up whenever agents trained before would see or earn something else.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from pettingzoo import AECEnv, ParallelEnv
from pettingzoo.utils import parallel_to_aec

from wwwserve.agents.decision import FLAT_ACTIONS, HOLD, NODES, ROUTES
from wwwserve.agents.kernel import Bools, Bytes, Ints, Singles, kernel
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import NODE_FEATURES, REQUEST_FEATURES, SELF_FEATURES, Views, bounds
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.scenario import Scenario, load
from wwwserve.envs.state import Reward, plan

OBSERVATION_SIZE = NODES * len(NODE_FEATURES) + len(REQUEST_FEATURES) + len(SELF_FEATURES)
INVALID_ROUTE = -1  # the market makes it hold and counts it
SEED_BOUND = 2**63

Observation = dict[str, NDArray[Any]]


def observation_bounds() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lowest and highest values of an observation, [OBSERVATION_SIZE] each; see `MarketEnv`."""
    node, request, me = (bounds(features) for features in (NODE_FEATURES, REQUEST_FEATURES, SELF_FEATURES))
    low, high = (np.concatenate((np.tile(node[k], NODES), request[k], me[k])) for k in (0, 1))
    return low, high


class MaskedDiscrete(spaces.Discrete):
    """`Discrete` that samples with a mask in a tenth of the time, as it does not check the mask."""

    def sample(self, mask: NDArray[np.int8] | None = None, probability: Any = None) -> np.int64:
        """One of the actions at which `mask` int8 [n] is 1, or by `probability` [n]; without either, any."""
        if mask is None:
            return super().sample(probability=probability)
        legal = mask.view(np.bool_).nonzero()[0]
        return legal[int(self.np_random.random() * legal.size)] if legal.size else self.start


@kernel
def _carry_out(chosen: Ints, active: Bools, masks: Bytes, route: Ints, markup: Ints, invalid: Ints) -> int:
    """Write the flat actions `chosen` [N] into `route` and `markup`; count in `invalid` [N] those masked.

    Returns the first agent whose action does not exist, before which nothing is written; -1 if all do.
    """
    for i in range(chosen.size):
        if not 0 <= chosen[i] < FLAT_ACTIONS:
            return i
    for i in range(chosen.size):
        route[i] = chosen[i] // MARKUPS.size
        markup[i] = chosen[i] % MARKUPS.size
        if active[i] and masks[i, chosen[i]] == 0:
            route[i] = INVALID_ROUTE
            invalid[i] += 1
    return -1


@kernel
def _observe(views: Views, active: Bools, vectors: Singles, masks: Bytes) -> None:
    """Write the observations `vectors` [N, OBSERVATION_SIZE] and `masks` [N, FLAT_ACTIONS] of a market's first N
    `views` [1, N]."""
    for i in range(active.size):
        at = 0
        for node in views.nodes[0, i]:
            for x in node:
                vectors[i, at] = x
                at += 1
        for x in views.request[0, i]:
            vectors[i, at] = x
            at += 1
        for x in views.me[0, i]:
            vectors[i, at] = x
            at += 1
        at = 0
        for route in range(ROUTES):
            is_open = views.routes[0, i, route] if active[i] else np.int8(route == HOLD)
            for _ in range(MARKUPS.size):
                masks[i, at] = is_open
                at += 1


def parallel_env(
    scenario: str | Scenario = "paper/alternating",
    *,
    team_weight: float = 1.0,
    transfers: bool = True,
    gamma: float = 0.99,
    dense: bool = True,
    render_mode: str | None = None,
) -> "MarketEnv":
    """The `MarketEnv` of a scenario that is packaged, in a file or built, paid by `envs.state.Reward`.

    Raises ScenarioError, and ValueError for a setting out of its range.
    """
    chosen = scenario if isinstance(scenario, Scenario) else load(scenario)
    reward = Reward(team_weight=team_weight, transfers=transfers, gamma=gamma, dense=dense)
    return MarketEnv(chosen, reward, render_mode)


def env(scenario: str | Scenario = "paper/alternating", **settings: Any) -> AECEnv:
    """The same as an AEC environment; `settings` as for `parallel_env`."""
    return parallel_to_aec(parallel_env(scenario, **settings))


class MarketEnv(ParallelEnv):
    """One market of a scenario; agents have the names of its providers.

    Observation: a dict of "observation", float32 [OBSERVATION_SIZE], and "action_mask", int8 [FLAT_ACTIONS]. The first
    is the provider's view in physical units, within `observation_bounds`: nodes, own first, then request, then self,
    each in the order of `agents.view`; feature f of node k is at k * len(NODE_FEATURES) + f.

    Action: `agents.decision.encode(route, markup)`; the markup is read when an advert is due. The mask forbids routes
    that are not open. A forbidden action becomes hold (where holding is no longer allowed, the request runs here) with
    its own markup, and is counted. An action of an agent that is not active is ignored. A peer's request is taken when
    its price is at least its marginal cost.

    Reward: credits of the step, see `envs.state.Reward`.

    Info: `active`, whether the agent has something to decide; `online`; `now_s`, the market's clock; `elapsed_s`,
    seconds that the step took, 0 for another round at the same instant; `invalid`, forbidden actions of the agent so
    far.

    State: all observations, then for each provider whether it is online and whether it is active, then the shares of
    the arrival time and of the drain time that are past.
    """

    metadata: dict[str, Any] = {"name": "market_v1", "render_modes": ["ansi"], "is_parallelizable": True}  # noqa: RUF012

    def __init__(self, scenario: Scenario, reward: Reward, render_mode: str | None = None) -> None:
        """Raises ValueError for a reward or a render mode that does not exist."""
        if not 0.0 <= reward.team_weight <= 1.0:
            raise ValueError(f"team_weight is {reward.team_weight}, expected a share, 0 to 1")
        if not 0.0 < reward.gamma <= 1.0:
            raise ValueError(f"gamma is {reward.gamma}, expected a discount per second, above 0 and at most 1")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is {render_mode!r}, expected None or one of {self.metadata['render_modes']}")
        self.scenario, self.reward, self.render_mode = scenario, reward, render_mode
        self.possible_agents = [provider.name for provider in scenario.providers]
        self.agents: list[str] = []
        self._batch: MarketBatch | None = None
        self._rng = np.random.default_rng()
        count = len(self.possible_agents)
        low, high = observation_bounds()
        self.observation_spaces = {
            agent: spaces.Dict({"observation": spaces.Box(low, high), "action_mask": spaces.MultiBinary(FLAT_ACTIONS)})
            for agent in self.possible_agents
        }
        self.action_spaces = {agent: MaskedDiscrete(FLAT_ACTIONS) for agent in self.possible_agents}
        share = np.ones(2 * count + 2, np.float32)
        self.state_space = spaces.Box(
            np.concatenate((np.tile(low, count), 0 * share)), np.concatenate((np.tile(high, count), share))
        )

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """The space of an agent's observations, always the same object."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        """The space of an agent's actions, always the same object."""
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Observation], dict[str, dict[str, Any]]]:
        """Start a market whose traffic and uniforms come from `seed`, a non-negative integer.

        Without a seed they come from the last one's generator: the same seed, then the same resets, give the same
        markets. `options` are not read.
        """
        if seed is None:
            seed = int(self._rng.integers(SEED_BOUND))
        else:
            self._rng = np.random.default_rng(seed)
        self._batch = MarketBatch([plan(self.scenario, seed)], reward=self.reward)
        self._actions = self._batch.actions()
        self._invalid = np.zeros(len(self.possible_agents), np.int64)
        self.agents = list(self.possible_agents)
        return self._look()

    def step(
        self, actions: Mapping[str, int]
    ) -> tuple[dict[str, Observation], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """Carry out one action for each agent; any left out is an error.

        Raises ValueError for an action that is missing or outside the action space, RuntimeError before `reset`. After
        the end there are no agents, and a step gives empty dicts.
        """
        batch = self._running()
        if not self.agents:
            return {}, {}, {}, {}, {}
        decided = self._actions
        refused = _carry_out(
            self._flat(actions), batch.active[0], self._masks, decided.route[0], decided.markup[0], self._invalid
        )
        if refused >= 0:
            raise self._no_action(actions, self.agents[refused])
        batch.step(decided)
        observations, infos = self._look()
        over = bool(batch.over[0])
        rewards = dict(zip(self.agents, batch.reward[0].tolist(), strict=True))
        terminations = dict.fromkeys(self.agents, False)
        truncations = dict.fromkeys(self.agents, over)
        if over:
            self.agents = []
        return observations, rewards, terminations, truncations, infos

    def state(self) -> NDArray[np.float32]:
        """What the whole market looks like, float32, within `state_space`; see the class."""
        batch = self._running()
        duration_s, drain_s = self.scenario.duration_s, self.scenario.drain_s
        now_s = float(batch.now_s[0])
        past = min(now_s / duration_s, 1.0), min(max(now_s - duration_s, 0.0) / max(drain_s, 1e-9), 1.0)
        return np.concatenate(
            (self._vectors.reshape(-1), batch.markets.providers["online"][0], batch.active[0], past), dtype=np.float32
        )

    def render(self) -> str | None:
        """With render mode "ansi", a table of the providers."""
        if self.render_mode is None:
            return None
        markets = self._running().markets
        rows = [f"{'provider':<16}{'online':>7}{'running':>8}{'waiting':>8}{'held':>6}{'markup':>7}{'profit':>9}"]
        for name, p, e in zip(self.possible_agents, markets.providers[0], markets.engines[0], strict=True):
            rows.append(
                f"{name[:15]:<16}{'yes' if p['online'] else 'no':>7}{e['running']:>8}{e['waiting']:>8}{p['held']:>6}"
                f"{p['markup']:>7.2f}{p['profit']:>9.2f}"
            )
        return "\n".join((f"{self.scenario.name} at {markets.market['now_s'][0]:g} s", *rows))

    def close(self) -> None:
        """Nothing is left open."""

    def _running(self) -> MarketBatch:
        if self._batch is None:
            raise RuntimeError("the market has not begun: call reset() first")
        return self._batch

    def _flat(self, actions: Mapping[str, int]) -> NDArray[np.int64]:
        """Actions [N] in the order of the agents."""
        try:
            chosen = [actions[agent] for agent in self.agents]
        except KeyError as error:
            raise ValueError(f"no action for agent {error.args[0]!r}") from None
        try:
            flat = np.array(chosen)
        except ValueError:  # their shapes differ
            flat = np.zeros(0)
        if flat.ndim == 1 and flat.dtype.kind in "iu":
            return flat.astype(np.int64, copy=False)
        for agent in self.agents:
            if not self.action_spaces[agent].contains(actions[agent]):
                raise self._no_action(actions, agent)
        return np.array([int(action) for action in chosen], np.int64)

    def _no_action(self, actions: Mapping[str, int], agent: str) -> ValueError:
        return ValueError(f"action of {agent} is {actions[agent]!r}, expected an integer, 0 to {FLAT_ACTIONS - 1}")

    def _look(self) -> tuple[dict[str, Observation], dict[str, dict[str, Any]]]:
        """Observations and infos of all agents, none of which a later step overwrites."""
        batch, count = self._running(), len(self.possible_agents)
        active = batch.active[0]
        self._vectors = np.empty((count, OBSERVATION_SIZE), np.float32)
        self._masks = np.empty((count, FLAT_ACTIONS), np.int8)
        _observe(batch.views, active, self._vectors, self._masks)
        now_s, elapsed_s = float(batch.now_s[0]), float(batch.elapsed_s[0])
        online = batch.markets.providers["online"][0].tolist()
        observations, infos = {}, {}
        for agent, vector, mask, is_active, is_online, invalid in zip(
            self.agents, self._vectors, self._masks, active.tolist(), online, self._invalid.tolist(),
            strict=True,
        ):  # fmt: skip
            observations[agent] = {"observation": vector, "action_mask": mask}
            infos[agent] = {
                "active": is_active, "online": is_online == 1, "now_s": now_s, "elapsed_s": elapsed_s,
                "invalid": invalid,
            }  # fmt: skip
        return observations, infos
