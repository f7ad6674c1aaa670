"""Many independent markets in lockstep: arrays in, arrays out, threads over markets.

A market's course depends on its scenario, its seed and the actions it is given, not on the batch or the threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.decision import Actions, make_actions
from wwwserve.agents.generator import UNIFORMS_PER_DECISION
from wwwserve.agents.kernel import bound
from wwwserve.agents.view import make_views
from wwwserve.envs.market import start_market, step_range
from wwwserve.envs.scenario import Scenario
from wwwserve.envs.state import MarketPlan, Reward, Shape, make_markets, plan, write_market


class RequestTable(NamedTuple):
    """What became of a market's requests, [R] each; turns of sessions that never came are left out."""

    arrival_s: NDArray[np.float64]
    origin: NDArray[np.int32]
    executor: NDArray[np.int32]  # -1 if never placed
    klass: NDArray[np.int32]
    prompt: NDArray[np.int64]
    cached: NDArray[np.int64]  # tokens of the prompt found in the executor's prefix cache
    output: NDArray[np.int64]
    latency_s: NDArray[np.float64]  # inf if unfinished or failed
    first_token_s: NDArray[np.float64]  # since arrival; inf likewise


class MarketBatch:
    """`len(scenarios)` markets, market b with `scenarios[b]` and `seeds[b]`.

    views: see `agents.view`, leading axes [B, N]; active [B, N]: who is to decide; uniforms [B, N, 4]: random
    numbers in (0, 1) for policies; reward [B, N] float32, elapsed_s [B] and over [B] of the last step; given [B, N]:
    the part of the reward that arrivals brought, whatever was decided, which a learner may subtract. All are
    overwritten by `step`. An action is read only where `active` is set. A market that is over stays as it is until
    `reset`.
    """

    def __init__(
        self,
        scenarios: Sequence[Scenario | MarketPlan],
        seeds: Sequence[int] | None = None,
        *,
        threads: int = 1,
        reward: Reward | None = None,
        shape: Shape | None = None,
    ) -> None:
        """`seeds` are for the scenarios that are not planned yet. `shape` allows for larger markets later."""
        if seeds is not None and len(seeds) != len(scenarios):
            raise ValueError(f"{len(scenarios)} scenarios and {len(seeds)} seeds; give one seed a scenario")
        if threads < 1:
            raise ValueError(f"threads is {threads}, expected at least 1")
        plans = [
            s if isinstance(s, MarketPlan) else plan(s, seeds[b] if seeds is not None else b)
            for b, s in enumerate(scenarios)
        ]
        if not plans:
            raise ValueError("a batch needs at least one scenario")
        self.reward_rule = reward or Reward()
        self.shape = shape or Shape.of(plans)
        self.count, self.providers = len(plans), self.shape.providers
        self.markets = make_markets(self.count, self.shape)
        self.views = make_views(self.count, self.providers)
        self.active = np.zeros((self.count, self.providers), np.bool_)
        self.uniforms = np.zeros((self.count, self.providers, UNIFORMS_PER_DECISION))
        self.reward = np.zeros((self.count, self.providers), np.float32)
        self.given = np.zeros((self.count, self.providers), np.float32)
        self.plans: list[MarketPlan] = list(plans)
        cuts = np.linspace(0, self.count, min(threads, self.count) + 1).astype(int)
        self._spans = list(pairwise(cuts))
        self._pool = ThreadPoolExecutor(len(self._spans) - 1) if len(self._spans) > 1 else None
        self._over: NDArray[np.int64] = self.markets.market["over"]
        self._elapsed_s: NDArray[np.float64] = self.markets.market["elapsed_s"]
        # The actions of the last step, and from their second on the step of each span with them.
        self._last_actions: Actions | None = None
        self._again: list[Callable[[], Any]] = []
        for b, planned in enumerate(plans):
            self.reset(b, planned)

    @property
    def elapsed_s(self) -> NDArray[np.float64]:
        """Seconds that the last step took in each market; 0 for a further round at the same instant."""
        return self._elapsed_s

    @property
    def over(self) -> NDArray[np.bool_]:
        """Which markets have reached their horizon. That is a truncation: the market itself would go on."""
        return np.asarray(self._over != 0)

    @property
    def now_s(self) -> NDArray[np.float64]:
        """Each market's clock."""
        return np.asarray(self.markets.market["now_s"])

    def reset(self, b: int, planned: MarketPlan) -> None:
        """Start market `b` anew with a plan. Raises ValueError if it is larger than the batch's shape."""
        need = Shape.of([planned])
        if any(a > b for a, b in zip(need, self.shape, strict=True)):
            raise ValueError(f"{planned.scenario.name} needs {need}, the batch holds {self.shape}")
        self.plans[b] = planned
        write_market(self.markets, b, planned, self.reward_rule)
        for array in (*self.views, self.active, self.uniforms, self.reward, self.given):
            array[b] = 0
        start_market(self.markets, b, self.views, self.active, self.uniforms)

    def actions(self) -> Actions:
        """Actions of the batch's shape: hold, take what pays, at cost."""
        return make_actions(self.count, self.providers)

    def step(self, actions: Actions) -> None:
        """Carry out one decision of every active provider and move each market on."""
        steps = self._again
        if actions is not self._last_actions or not steps:
            repeat: Callable[..., Callable[[], Any]] = bound if actions is self._last_actions else partial
            args = (actions, self.views, self.active, self.uniforms, self.reward, self.given)
            steps = [repeat(step_range, self.markets, int(low), int(high), *args) for low, high in self._spans]
            self._again = steps if actions is self._last_actions else []
            self._last_actions = actions
        first, *rest = steps
        others = [self._pool.submit(step) for step in rest] if self._pool is not None else []
        first()
        for other in others:
            other.result()

    def requests(self, b: int) -> RequestTable:
        """What became of market b's user requests so far."""
        count = int(self.markets.market["n_arrivals"][b])
        q = self.markets.requests[b, :count]
        q = q[np.isfinite(q["arrival_s"])]
        arrival_s = np.array(q["arrival_s"])
        return RequestTable(
            arrival_s=arrival_s,
            origin=np.array(q["origin"]),
            executor=np.array(q["executor"]),
            klass=np.array(q["klass"]),
            prompt=np.array(q["prompt"]),
            cached=np.maximum(q["hit"], 0),
            output=np.array(q["output"]),
            latency_s=np.nan_to_num(q["answer_s"] - arrival_s, nan=np.inf, posinf=np.inf),
            first_token_s=np.nan_to_num(q["first_answer_s"] - arrival_s, nan=np.inf, posinf=np.inf),
        )
