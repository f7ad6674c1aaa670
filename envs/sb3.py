"""Markets as a Stable-Baselines3 vectorized environment: every provider of every market is one environment of it.

One set of policy weights decides for all providers, each on its own view. One step of the `VecEnv` is one market step
for all, whether or not a provider has anything to decide; further rounds at one instant are steps in which the clock
stands. SB3 discounts every step alike, while `Reward.gamma` is a discount per second: the two agree where decisions are
a second apart and few instants need another round.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from wwwserve.agents.decision import HOLD, NODES, ROUTES
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import HAS_REQUEST, NODE_FEATURES, REQUEST_FEATURES, SELF_FEATURES, Views, normalise
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.scenario import Scenario
from wwwserve.envs.state import MarketPlan, Reward, Shape, plan

OBSERVATION_SIZE = NODES * len(NODE_FEATURES) + len(REQUEST_FEATURES) + len(SELF_FEATURES)
SEED_BOUND = 2**63

Sampler = Callable[[np.random.Generator], Scenario]


def observe(views: Views) -> NDArray[np.float32]:
    """Views [...] as normalised vectors [..., OBSERVATION_SIZE], in the order that `MarketVecEnv` gives."""
    nodes = normalise(views.nodes, NODE_FEATURES)
    parts = (
        nodes.reshape(*nodes.shape[:-2], -1),
        normalise(views.request, REQUEST_FEATURES),
        normalise(views.me, SELF_FEATURES),
    )
    return np.clip(np.concatenate(parts, axis=-1), -1.0, 1.0)


def closed_routes(views: Views, active: NDArray[np.bool_], route: NDArray[np.integer]) -> tuple[int, int]:
    """How many requests `route` [...] decides on, and for how many of them it is not open.

    An inactive provider, or one without a request, decides on none.
    """
    decided = active & (views.me[..., HAS_REQUEST] > 0.5)
    is_open = np.take_along_axis(views.routes, np.asarray(route, np.int64)[..., None], axis=-1)[..., 0] == 1
    return int(decided.sum()), int((decided & ~is_open).sum())


class MarketVecEnv(VecEnv):
    """`markets` markets of P providers each, as markets * P environments: provider p of market b is number b * P + p.

    Observations: float32 [num_envs, OBSERVATION_SIZE], features in [-1, 1], see `agents.view.normalise`: node by node,
    own first, then the request, then the provider itself. Actions: (route, markup), see `agents.decision`. A route that
    is not open becomes hold (where holding is no longer allowed, the request runs here); `env_method("action_masks")`
    gives what is open, for algorithms that mask. Since construction, `decisions` counts the requests decided on,
    `invalid` those whose route was not open. An action is ignored unless the provider was `active`, see the infos,
    which also have `elapsed_s`, the seconds that the step took.

    A market that reaches its horizon is truncated, never terminated: its infos have `TimeLimit.truncated` and
    `terminal_observation`, and it starts again with another seed. Markets draw their seeds, and their scenarios if
    `scenarios` is a sampler, each from a generator of its own, so that how many others there are changes nothing.
    """

    def __init__(
        self,
        scenarios: Scenario | Sequence[Scenario] | Sampler,
        markets: int = 16,
        *,
        seed: int | None = None,
        threads: int = 1,
        reward: Reward | None = None,
        arrivals: bool = True,
    ) -> None:
        """Market b runs scenario b modulo their number at every start, or what a sampler draws at each.

        `arrivals`: rewards count what arrivals bring, whatever is decided; to a learner that part is only noise.
        Raises ValueError where scenarios differ in their number of providers, at once or when a sampler draws another.
        """
        if markets < 1:
            raise ValueError(f"markets is {markets}, expected at least 1")
        if callable(scenarios):
            self._sampler: Sampler | None = scenarios
            self._scenarios: list[Scenario] = []
        else:
            self._sampler = None
            self._scenarios = [scenarios] if isinstance(scenarios, Scenario) else list(scenarios)
            if not self._scenarios:
                raise ValueError("scenarios is empty, expected at least one")
        self._markets, self._threads, self._reward = markets, threads, reward
        self._arrivals = arrivals
        self._providers = 0
        self.decisions = self.invalid = 0
        self._seed_markets(seed)
        self.batch = self._make([self._plan(b) for b in range(markets)])
        self._fresh = True
        self._actions = self.batch.actions()
        super().__init__(
            markets * self._providers,
            spaces.Box(-1.0, 1.0, (OBSERVATION_SIZE,), np.float32),
            spaces.MultiDiscrete([ROUTES, MARKUPS.size]),
        )

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed all markets; takes effect at the next `reset`. Without a seed it is drawn from the system."""
        self._seed_markets(seed)
        self._fresh = False
        return [None] * self.num_envs if seed is None else [seed] * self.num_envs

    def reset(self) -> NDArray[np.float32]:
        """Start every market."""
        if not self._fresh:
            self.batch = self._make([self._plan(b) for b in range(self._markets)])
        self._fresh = False
        self.reset_infos = self._infos()
        return observe(self.batch.views).reshape(self.num_envs, -1)

    def step_async(self, actions: NDArray[np.integer]) -> None:
        """Take in actions [num_envs, 2]. Raises ValueError for a shape or a choice that does not exist."""
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs, 2):
            raise ValueError(f"actions have shape {actions.shape}, expected {(self.num_envs, 2)}")
        if (actions < 0).any() or (actions >= (ROUTES, MARKUPS.size)).any():
            raise ValueError(f"an action is beyond {(ROUTES - 1, MARKUPS.size - 1)} or below 0")
        route, markup = actions.reshape(self._markets, self._providers, 2).transpose(2, 0, 1)
        self._actions.route[...] = route
        self._actions.markup[...] = markup

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Step all markets; observations, rewards, dones and infos of every environment."""
        decided, closed = closed_routes(self.batch.views, self.batch.active, self._actions.route)
        self.decisions += decided
        self.invalid += closed
        self.batch.step(self._actions)
        self._fresh = False
        rewards = (self.batch.reward if self._arrivals else self.batch.reward - self.batch.given).reshape(-1).copy()
        over = self.batch.over.copy()
        infos = self._infos()
        observations = observe(self.batch.views)
        for b in np.flatnonzero(over).tolist():
            for p in range(self._providers):
                info = infos[b * self._providers + p]
                info["terminal_observation"] = observations[b, p].copy()
                info["TimeLimit.truncated"] = True
            self._restart(b)
            observations[b] = observe(Views(*(each[b] for each in self.batch.views)))
        return observations.reshape(self.num_envs, -1), rewards, np.repeat(over, self._providers), infos

    def action_masks(self) -> NDArray[np.bool_]:
        """What is open to each environment, [num_envs, ROUTES + MARKUPS.size]: routes, then markups, which all are.

        Where a provider has nothing to decide, hold is the only route.
        """
        masks = np.ones((self._markets, self._providers, ROUTES + MARKUPS.size), np.bool_)
        masks[..., :ROUTES] = np.where(
            self.batch.active[..., None], self.batch.views.routes == 1, np.arange(ROUTES) == HOLD
        )
        return masks.reshape(self.num_envs, -1)

    def close(self) -> None:
        """Nothing is left open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """`render_mode`, which is None, or the method `action_masks` of each environment. Raises AttributeError."""
        if attr_name == "render_mode":
            return [None for _ in self._chosen(indices)]
        if attr_name == "action_masks":
            return [lambda i=i: self.action_masks()[i] for i in self._chosen(indices)]
        raise AttributeError(f"the environments of a MarketVecEnv have no {attr_name!r}")

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Always raises AttributeError: a provider's environment has nothing to set."""
        raise AttributeError(f"{attr_name!r} of a MarketVecEnv's environments cannot be set")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """`action_masks` of the chosen environments. Raises AttributeError for another method."""
        if method_name != "action_masks":
            raise AttributeError(f"the environments of a MarketVecEnv have no method {method_name!r}")
        masks = self.action_masks()
        return [masks[i] for i in self._chosen(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Never."""
        return [False for _ in self._chosen(indices)]

    def _chosen(self, indices: int | Iterable[int] | None) -> Iterable[int]:
        if indices is None:
            return range(self._markets * self._providers)
        return [indices] if isinstance(indices, int) else indices

    def _seed_markets(self, seed: int | None) -> None:
        entropy: Any = np.random.SeedSequence(seed).entropy  # an integer
        self._rngs = [np.random.default_rng((entropy, b)) for b in range(self._markets)]

    def _plan(self, b: int) -> MarketPlan:
        """What market b runs next."""
        rng = self._rngs[b]
        scenario = self._sampler(rng) if self._sampler else self._scenarios[b % len(self._scenarios)]
        count = len(scenario.providers)
        self._providers = self._providers or count
        if count != self._providers:
            raise ValueError(f"{scenario.name} has {count} providers, expected {self._providers} as in the first")
        return plan(scenario, int(rng.integers(SEED_BOUND)))

    def _make(self, plans: list[MarketPlan], shape: Shape | None = None) -> MarketBatch:
        return MarketBatch(plans, threads=self._threads, reward=self._reward, shape=shape)

    def _restart(self, b: int) -> None:
        """Start market b anew, in a larger batch if it has more requests than fit."""
        planned = self._plan(b)
        shape = Shape(*map(max, Shape.of([planned]), self.batch.shape))
        if shape != self.batch.shape:
            old, self.batch = self.batch, self._make(self.batch.plans, shape)
            new = self.batch
            state: list[Any] = [*old.markets, *old.views, old.active, old.uniforms, old.reward]
            larger: list[Any] = [*new.markets, *new.views, new.active, new.uniforms, new.reward]
            for source, target in zip(state, larger, strict=True):
                target[tuple(slice(size) for size in source.shape)] = source
        self.batch.reset(b, planned)

    def _infos(self) -> list[dict[str, Any]]:
        active, elapsed_s = self.batch.active.tolist(), self.batch.elapsed_s.tolist()
        return [{"active": each, "elapsed_s": s} for row, s in zip(active, elapsed_s, strict=True) for each in row]
