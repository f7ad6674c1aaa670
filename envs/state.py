"""The state of a batch of markets, and how a scenario becomes one.

Records for what a market, a provider, a request and a duel are; every array leads with the market. Markets of different
size share one batch: arrays are as wide as the largest, and the market's record says how much of them is in use.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.classes import CLASS_MAX, CLASS_MEAN, MAX_CLASSES, class_row
from wwwserve.agents.decision import NODES
from wwwserve.agents.generator import GENERATOR_WORDS, make_generators
from wwwserve.agents.hardware import BLOCK_TOKENS, MODELS, QUANTIZATIONS, Profile, profile
from wwwserve.agents.kernel import records
from wwwserve.agents.knowledge import (
    AD_CONTEXT,
    AD_MEAN_OUTPUT,
    AD_MEAN_PROMPT,
    AD_MEAN_UNCACHED,
    AD_REUSE_S,
    AD_TIME_S,
    AD_UNSHARED,
    ADVERT_SIZE,
    LONGEST_REUSE_S,
    NO_TIME,
    PEER_STATS_SIZE,
    make_peer_stats,
    write_profile,
)
from wwwserve.agents.protocol import ACCOUNT_SIZE, FREE, MICRO, NO_BOUND, PAYMENTS, STAKED
from wwwserve.agents.provider import (
    AGREEMENT_FIELDS,
    HELD_FIELDS,
    OUT_FIELDS,
    PROVIDER_FIELDS,
    reset_provider,
    reset_requests,
    usual_context,
)
from wwwserve.agents.tariff import write_compute
from wwwserve.envs.engine import ENGINE, JOB_FIELDS, reset_engine, reset_jobs
from wwwserve.envs.prefix_cache import CACHED, NODE
from wwwserve.envs.scenario import (
    MAX_JUDGES,
    MAX_WINDOWS,
    Misreport,
    Provider,
    Scenario,
    SloClass,
)
from wwwserve.envs.traffic import Arrivals, arrivals, expected_output, expected_prompt

# Where a request is.
FUTURE, HELD, OFFERED, IN_ENGINE, ANSWERING, LOST, DONE, FAILED = range(8)  # from OFFERED to LOST it is under way
# What a request is.
USER, COPY, JUDGEMENT = range(3)
# What of it is on its way between two providers.
NOTHING, OFFER, REFUSAL, TIMEOUT, ANSWER = range(5)

# Columns of `counts`, per provider.
(
    OWN_ARRIVED, OWN_DONE, OWN_FAILED, RUN_LOCAL, DELEGATED, SERVED_FOR_PEERS, PROBES_REFUSED, PROBES_UNANSWERED,
    INVALID, HOLDS, CLIPPED, DUELS_STARTED, DUELS_SETTLED, DUELS_VOID, JUDGED, RETURNED,
) = range(16)  # fmt: skip
COUNTS = 16


MARKET = np.dtype(
    [
        *AGREEMENT_FIELDS,
        # the scenario
        ("duration_s", np.float64),
        ("drain_s", np.float64),
        ("duel_probability", np.float64),
        ("n_providers", np.int64),
        ("n_arrivals", np.int64),
        ("n_timed", np.int64),  # of them, those that come at a time of their own: the first ones
        ("judges", np.int64),
        # the reward
        ("team_weight", np.float64),
        ("gamma", np.float64),
        ("dense", np.int64),
        ("count_transfers", np.int64),
        ("by_decision", np.int64),
        ("count_future", np.int64),
        # the run
        ("now_s", np.float64),
        ("ticks", np.int64),
        ("remote", np.int64),  # peers' requests in all engines
        ("streams_sent", np.int64),  # ticks for which providers have sent on what they generated for peers
        ("steps", np.int64),
        ("elapsed_s", np.float64),  # of the last step
        ("over", np.int64),
        ("next_arrival", np.int64),
        ("used", np.int64),  # request records in use
        ("unresolved", np.int64),  # users' requests, arrived or not, without an end
        ("n_turns", np.int64),  # turns of sessions whose time is set, in the heap `turns`
        ("lost", np.int64),  # requests whose executor left, which their origins do not know yet
        ("n_duels", np.int64),
        ("mail_head", np.int64),  # requests of which something is on its way, by when it is there; -1 if none
        ("mail_tail", np.int64),
        ("minted", np.int64),  # micro-credits in existence
        ("generator", np.int64, GENERATOR_WORDS),  # of random numbers that are no provider's
    ],
    align=True,
)

PROVIDER = np.dtype(
    [
        *PROVIDER_FIELDS,
        # the scenario
        ("serves", np.int64),  # bit set of model names
        ("requests", np.int64),  # the bit of the name that its own users request
        ("windows", np.float64, (MAX_WINDOWS, 2)),  # online from, until
        ("lie_load", np.float64),  # misreport
        ("lie_speed", np.float64),
        ("lie_promise", np.float64),
        ("lie_from_s", np.float64),
        ("lie_until_s", np.float64),
        ("strength", np.float64),  # Bradley-Terry log-strength
        ("max_len", np.int64),  # prompt and output tokens of a request that its engine can run
        # the run
        ("online", np.int64),
        ("advert_lands_s", np.float64),  # when its last advert is there; inf if none is on its way
        # credits
        ("potential", np.float64),  # value of what has arrived and is not done: in full, once placed as predicted
        ("arrived", np.float64),  # value of what arrived in this step
        ("effect", np.float64),  # what its decisions changed in the predicted value of requests in this step
        ("flow", np.float64),  # value delivered less compute cost in this step
        ("transfers", np.float64),  # payments, fees and stakes won less lost in this step
        ("profit", np.float64),  # since the start
        ("counts", np.int64, COUNTS),
    ],
    align=True,
)

_LOOKED_AT = ("output", "generated", "finish_tick")
_SHARED = {name for name, *_ in HELD_FIELDS}
REQUEST = np.dtype(
    [
        # what its origin looks at while it is out: one cache line
        *(field for field in JOB_FIELDS if field[0] in _LOOKED_AT),
        *OUT_FIELDS,
        ("status", np.int32),
        # the rest
        *HELD_FIELDS,
        *(field for field in JOB_FIELDS if field[0] not in _SHARED.union(_LOOKED_AT)),
        ("origin", np.int32),
        ("kind", np.int32),
        ("duel", np.int32),  # -1, or the duel it belongs to
        ("mail", np.int32),  # what of it is on its way
        ("mail_next", np.int32),  # the next request of which something is on its way, -1 at the end
        ("mail_s", np.float64),  # when it is there
        ("noticed_s", np.float64),  # when the origin notices that a lost request is lost
        ("predicted", np.float64),  # its share of the origin's potential
        ("predicted_held", np.float64),  # the same before it was offered
        ("beside", np.float64),  # what its placement brought its origin's reward beside its predicted value
        ("next_turn", np.int32),  # the request that its user makes after the answer, -1 if none
        ("think_s", np.float64),  # from the answer before to its arrival
        ("answer_s", np.float64),  # when the user had the whole answer; NaN until then
        ("first_answer_s", np.float64),  # when the user had the first token
        ("locked", np.int64),  # escrow, micro-credits
    ],
    align=True,
)

_NEW_REQUEST = np.zeros(1, REQUEST)
reset_jobs(_NEW_REQUEST)
reset_requests(_NEW_REQUEST)
_NEW_REQUEST["duel"] = _NEW_REQUEST["mail_next"] = _NEW_REQUEST["next_turn"] = -1
_NEW_REQUEST["prompt"] = 1
_NEW_REQUEST["answer_s"] = _NEW_REQUEST["first_answer_s"] = np.nan

DUEL = np.dtype(
    [
        ("first", np.int32),  # the user's request
        ("second", np.int32),  # its copy
        ("void", np.int32),
        ("ended", np.int32),  # attempts completed
        ("pending", np.int32),  # judges that have not answered
        ("n_judges", np.int32),
        ("judges", np.int64, MAX_JUDGES),
        ("votes", np.int64, MAX_JUDGES),
    ],
    align=True,
)


class Markets(NamedTuple):
    """B markets of up to N providers, R requests and D duels."""

    market: NDArray[Any]  # [B] MARKET
    providers: NDArray[Any]  # [B, N] PROVIDER
    engines: NDArray[Any]  # [B, N] ENGINE
    requests: NDArray[Any]  # [B, R] REQUEST
    duels: NDArray[Any]  # [B, D] DUEL; D is 1 where there are none
    adverts: NDArray[np.float64]  # [B, N, ADVERT_SIZE] as last heard
    sent_adverts: NDArray[np.float64]  # [B, N, ADVERT_SIZE] as last sent
    peer_stats: NDArray[np.float64]  # [B, N, N, PEER_STATS_SIZE] of origin with peer
    accounts: NDArray[np.int64]  # [B, N, ACCOUNT_SIZE]
    # Prefixes; S is 1 where nothing is cached.
    tree: NDArray[Any]  # [B, S] NODE
    cached: NDArray[Any]  # [B, N, S] CACHED: what each engine has
    heard_s: NDArray[np.float64]  # [B, N, S] when the origin last had an answer of each provider whose path it is on
    turns: NDArray[np.int32]  # [B, R] a heap of the requests of sessions whose time is set, the next one first
    # Scratch buffers.
    done: NDArray[np.int64]  # [B, R]
    stake: NDArray[np.float64]  # [B, N]
    eligible: NDArray[np.bool_]  # [B, N]
    serves: NDArray[np.bool_]  # [B, N]
    acted: NDArray[np.bool_]  # [B, N]
    # What saves looking at every provider at every event.
    touched: NDArray[np.bool_]  # [B, N] may have something to decide
    wake_s: NDArray[np.float64]  # [B, N] nothing happens by itself before: engine and advert
    credit: NDArray[np.int64]  # [B, N]
    before: NDArray[np.float64]  # [B, N]
    idle_token_s: NDArray[np.float64]  # [B, NODES]
    looser_than: NDArray[np.int64]  # [B, MAX_CLASSES]


class Reward(NamedTuple):
    """What providers are paid by, in credits."""

    team_weight: float = 1.0
    """0: own profit alone; 1: the mean profit of the market; between: a mixture."""
    gamma: float = 0.99
    """Discount per second, which the dense form needs to leave the optimal policy as it is."""
    dense: bool = True
    """Pay a request's value when it arrives, the difference to what is predicted when it is placed, and to what is
    delivered when it is done; else all of it when it is done."""
    transfers: bool = True
    """Count payments, fees and stakes. They cancel in the mean, so a team learns the same without them."""
    by_decision: bool = False
    """Pay each provider what its own decisions on requests are expected to change, instead of what became of requests:
    a difference reward (Wolpert and Tumer 2002), free of what chance and others did. It counts the value of the request
    and of the own ones that run where it goes, own users who are yet to come there, compute and payments; what others
    gain or lose by it with `team_weight`. Holding a request costs what its wait makes impossible. What tariffs earn is
    not part of it. `dense`, `gamma` and `transfers` are then not read, and what arrivals
    bring is not part of it."""
    future: bool = True
    """By decision, count what a placement takes from own users who are yet to come there."""


class MarketPlan(NamedTuple):
    """A scenario with one draw of its traffic, as arrays; what `write_market` puts into a batch."""

    scenario: Scenario
    seed: int
    traffic: Arrivals
    profiles: tuple[Profile, ...]
    known: NDArray[np.float64]  # [N, C, CLASS_SIZE]
    deadlines: NDArray[np.float64]  # [C, T]
    mean_prompt: NDArray[np.float64]  # [N]
    mean_uncached: NDArray[np.float64]  # [N] tokens of it that are not of the session's turn before
    mean_output: NDArray[np.float64]  # [N]

    @property
    def nodes(self) -> int:
        """Nodes of the prefix tree that the run reads: none of a market where no two requests share a prefix."""
        return self.traffic.tree.parent.size if self.shares_prefixes else 1

    @property
    def shares_prefixes(self) -> bool:
        """Whether there is a prefix cache, and something to be found in it."""
        return self.scenario.prefix_cache is not None and bool((self.traffic.tree.parent >= 0).any())

    @property
    def capacity(self) -> int:
        """Entries of the request arrays that the run can use."""
        economy = self.scenario.economy
        extra = 1 + economy.judges if economy.duel_probability > 0 else 0
        return max(1, self.traffic.time_s.size * (1 + extra))


def _known(
    scenario: Scenario, provider: Provider, klass: SloClass | None, prompt: float, uncached: float
) -> NDArray[np.float64]:
    output = expected_output(provider, klass)
    if klass is None:
        return class_row(output, 1.0, scenario.slo.thresholds_s[-1], prompt, uncached)
    return class_row(output, klass.value, klass.deadline_s, prompt, uncached)


def _uncached_share(traffic: Arrivals, providers: int) -> NDArray[np.float64]:
    """Share [N] of the prompts of each provider's users that is not of the turn before."""
    before = np.where(traffic.follows >= 0, traffic.prompt[traffic.follows] + traffic.output[traffic.follows], 0)
    fresh = np.bincount(traffic.provider, np.maximum(traffic.prompt - before, 0), providers)
    return np.divide(
        fresh, np.bincount(traffic.provider, traffic.prompt, providers), where=fresh > 0, out=np.ones(providers)
    )


def plan(scenario: Scenario, seed: int) -> MarketPlan:
    """Draw a scenario's traffic from `seed` and work out its constants."""
    classes: Sequence[SloClass | None] = scenario.slo.classes or (None,)
    shares = np.array([1.0 if c is None else c.share for c in classes])
    deadlines = np.array([scenario.slo.thresholds_s if c is None else (c.deadline_s,) for c in classes], np.float64)
    profiles = tuple(
        profile(p.gpu, p.model, p.max_num_seqs, quantization=p.quantization, attention=p.attention)
        for p in scenario.providers
    )
    longest = np.array([min(each.max_model_len, each.kv_tokens) for each in profiles])
    prompts = [expected_prompt(p, most) for p, most in zip(scenario.providers, longest.tolist(), strict=True)]
    mean_prompt = np.array([each.mean for each in prompts])
    traffic = arrivals(scenario, seed, longest)
    mean_uncached = mean_prompt * _uncached_share(traffic, len(scenario.providers))
    known = np.array(
        [
            [_known(scenario, p, c, *of) for c in classes]
            for p, *of in zip(scenario.providers, mean_prompt, mean_uncached, strict=True)
        ]
    )
    return MarketPlan(
        scenario=scenario,
        seed=seed,
        traffic=traffic,
        profiles=profiles,
        known=known,
        deadlines=deadlines,
        mean_prompt=mean_prompt,
        mean_uncached=mean_uncached,
        mean_output=known[:, :, CLASS_MEAN] @ shares,
    )


class Shape(NamedTuple):
    """How wide the arrays of a batch are."""

    providers: int
    requests: int
    duels: int
    nodes: int = 1

    @staticmethod
    def of(plans: Sequence[MarketPlan]) -> "Shape":
        """The smallest shape that holds every plan."""
        duels = (p.traffic.time_s.size for p in plans if p.scenario.economy.duel_probability > 0)
        return Shape(
            providers=max(len(p.profiles) for p in plans),
            requests=max(p.capacity for p in plans),
            duels=max(duels, default=1) or 1,
            nodes=max(p.nodes for p in plans),
        )


def make_markets(count: int, shape: Shape) -> Markets:
    """Arrays for `count` markets, each to be filled by `write_market`; until then they are over."""
    n, r = shape.providers, shape.requests
    markets = Markets(
        market=records(count, MARKET),
        providers=records((count, n), PROVIDER),
        engines=records((count, n), ENGINE),
        requests=records((count, r), REQUEST),
        duels=records((count, shape.duels), DUEL),
        adverts=np.zeros((count, n, ADVERT_SIZE)),
        sent_adverts=np.zeros((count, n, ADVERT_SIZE)),
        peer_stats=np.zeros((count, n, n, PEER_STATS_SIZE)),
        accounts=np.zeros((count, n, ACCOUNT_SIZE), np.int64),
        tree=records((count, shape.nodes), NODE),
        cached=records((count, n, shape.nodes), CACHED),
        heard_s=np.zeros((count, n, shape.nodes)),
        turns=np.zeros((count, r), np.int32),
        done=np.zeros((count, r), np.int64),
        stake=np.zeros((count, n)),
        eligible=np.zeros((count, n), np.bool_),
        serves=np.zeros((count, n), np.bool_),
        acted=np.zeros((count, n), np.bool_),
        touched=np.zeros((count, n), np.bool_),
        wake_s=np.zeros((count, n)),
        credit=np.zeros((count, n), np.int64),
        before=np.zeros((count, n)),
        idle_token_s=np.zeros((count, NODES)),
        looser_than=np.zeros((count, MAX_CLASSES), np.int64),
    )
    markets.market["over"] = 1
    return markets


def write_market(markets: Markets, b: int, planned: MarketPlan, reward: Reward) -> None:
    """Put a plan into market `b`, at its time 0."""
    scenario, traffic = planned.scenario, planned.traffic
    economy = scenario.economy
    n, (c, t) = len(scenario.providers), planned.deadlines.shape
    count = traffic.time_s.size

    # Without duels nothing reads requests beyond the plan's.
    in_use = planned.capacity if economy.duel_probability == 0 else markets.requests.shape[1]
    for array in markets:
        array[b] = np.zeros((), array.dtype)
    m = markets.market[b : b + 1]
    m["duration_s"], m["drain_s"] = scenario.duration_s, scenario.drain_s
    m["tick_s"], m["gossip_s"] = scenario.decision_interval_s, scenario.gossip_interval_s
    m["rtt_s"] = scenario.rtt_ms / 1000
    m["duel_probability"], m["judges"] = economy.duel_probability, economy.judges
    m["exposure"] = NO_BOUND if economy.exposure is None else round(economy.exposure * MICRO)
    m["n_providers"], m["n_classes"], m["n_deadlines"] = n, c, t
    m["n_timed"] = np.count_nonzero(traffic.follows < 0)
    m["n_arrivals"] = m["used"] = m["unresolved"] = count
    m["payment"] = PAYMENTS.index(economy.payment)
    m["stake_follows_load"] = economy.stake_rule == "load"
    m["deadlines"][0, :c, :t] = planned.deadlines
    m["team_weight"], m["gamma"], m["dense"] = reward.team_weight, reward.gamma, reward.dense
    m["count_transfers"] = reward.transfers
    m["by_decision"], m["count_future"] = reward.by_decision, reward.future
    m["mail_head"] = m["mail_tail"] = -1
    m["generator"] = make_generators((planned.seed, 1))

    cache_unit = 0
    if scenario.prefix_cache is not None and planned.shares_prefixes:
        cache_unit = scenario.prefix_cache.block_tokens // BLOCK_TOKENS
        tree = markets.tree[b, : planned.nodes]
        tree["parent"], tree["start"], tree["blocks"] = traffic.tree
        markets.heard_s[b] = NO_TIME
    providers, engines = markets.providers[b], markets.engines[b]
    names = sorted({name for p in scenario.providers for name in p.serves})
    reset_provider(providers)
    providers["generator"] = make_generators((planned.seed, 2), len(providers))
    providers["advert_lands_s"] = np.inf
    providers["known"][:n, :c] = planned.known
    providers["own"][:n, AD_MEAN_PROMPT] = planned.mean_prompt
    providers["own"][:n, AD_MEAN_UNCACHED] = planned.mean_uncached
    providers["own"][:n, AD_MEAN_OUTPUT] = planned.mean_output
    providers["own"][:, AD_REUSE_S] = LONGEST_REUSE_S
    providers["next_gossip_s"][:n] = scenario.gossip_interval_s * np.arange(1, n + 1) / n
    for i, provider in enumerate(scenario.providers):
        p, planned_profile = providers[i : i + 1], planned.profiles[i]
        p["serves"] = sum(1 << names.index(name) for name in set(provider.serves))
        p["requests"] = 1 << names.index(provider.serves[0])
        p["windows"][0, : len(provider.online_s)] = provider.online_s
        lie = provider.misreport or Misreport(from_s=np.inf)
        p["lie_load"], p["lie_speed"], p["lie_promise"] = lie.load, lie.speed, lie.promise
        p["lie_from_s"], p["lie_until_s"] = lie.from_s, lie.until_s
        strength = MODELS[provider.model].strength + QUANTIZATIONS[provider.quantization].strength
        p["strength"] = strength if provider.strength is None else provider.strength
        credit = economy.initial_credit if provider.initial_credit is None else provider.initial_credit
        stake = economy.initial_stake if provider.initial_stake is None else provider.initial_stake
        markets.accounts[b, i, FREE], markets.accounts[b, i, STAKED] = round(credit * MICRO), round(stake * MICRO)
        p["max_len"] = min(planned_profile.max_model_len, planned_profile.kv_tokens)
        write_profile(p["own"][0], planned_profile.row(), 1.0)
        p["own"][0, AD_CONTEXT], p["own"][0, AD_UNSHARED] = usual_context(p[0], m[0]), 1.0
        write_compute(p["compute"][0], p["own"][0], economy.compute_cost_per_ktok)
        reset_engine(engines[i], planned_profile.row(), cache_unit)

    m["minted"] = markets.accounts[b].sum()
    markets.adverts[b, :, AD_TIME_S] = NO_TIME
    markets.peer_stats[b] = make_peer_stats(*markets.peer_stats.shape[1:3])

    requests = markets.requests[b, :in_use]
    requests[...] = _NEW_REQUEST
    q = requests[:count]
    q["origin"], q["klass"], q["prompt"], q["output"] = traffic.provider, traffic.klass, traffic.prompt, traffic.output
    q["longest"] = providers["known"][traffic.provider, traffic.klass, CLASS_MAX]
    q["arrival_s"] = traffic.time_s
    q["leaf"], q["turn"], q["think_s"] = traffic.leaf, traffic.turn, traffic.think_s
    later = np.flatnonzero(traffic.follows >= 0)
    q["next_turn"][traffic.follows[later]] = later
