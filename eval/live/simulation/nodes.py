"""The nodes of a scenario, the real ones, on a virtual clock: dispatchers and providers before simulated engines.

What a market plays in arrays is played here by messages: users send the scenario's requests at their times, nodes
decide, hand over, pay and answer. Delays, loss, crashes and restarts come on top; the same seed gives the same history.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from wwwserve.agents.classes import CLASS_MAX
from wwwserve.agents.generator import make_generators
from wwwserve.agents.hardware import BLOCK_TOKENS
from wwwserve.agents.knowledge import AD_STAKE
from wwwserve.agents.protocol import FREE, MICRO, NO_BOUND, STAKED, milliseconds
from wwwserve.agents.rules import Policy
from wwwserve.envs.prompt_blocks import block_hashes
from wwwserve.envs.scenario import Scenario, SessionsTraffic, TraceTraffic
from wwwserve.envs.state import MarketPlan
from wwwserve.eval.live.simulation.bank import Bank
from wwwserve.eval.live.simulation.disk import MemoryDisk
from wwwserve.eval.live.simulation.engine import BYTES_PER_TOKEN, TEXT, EngineServer, SimulatedEngine
from wwwserve.eval.live.simulation.loop import Process, VirtualLoop
from wwwserve.eval.live.simulation.membership import Members, MemoryMembership
from wwwserve.eval.live.simulation.network import Delay, Host, MemoryNetwork
from wwwserve.serving.config import CatalogueProfile, ClassConfig, EngineConfig, LimitsConfig, MarketConfig, NodeConfig
from wwwserve.serving.dispatcher import Dispatcher
from wwwserve.serving.engine.adapter import Engine
from wwwserve.serving.engine.prefix_index import HERE, MESSAGE_BYTES, Added, Cached, Prefix, PrefixIndex, prefix_of
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import Messages, Refusals
from wwwserve.serving.http.reply import CHAT_PATH
from wwwserve.serving.http.routes import App
from wwwserve.serving.http.sse import LAST_EVENT
from wwwserve.serving.http.transport import Transport
from wwwserve.serving.ledger.accounts import TOLERANCE_S, Accounts
from wwwserve.serving.ledger.channel_ledger import ChannelLedger, Grant
from wwwserve.serving.market import Market
from wwwserve.serving.membership.heartbeat import Advert
from wwwserve.serving.metrics import Metrics
from wwwserve.serving.node_provider import NodeProvider

USERS = "users"  # as the network calls them; they are as near to a node as can be
AHEAD_S = 1e-6  # by which what an engine generates is there before the tick at which it is looked at
READ_TIMEOUT_S = 1e6
MOST_BYTES = 1 << 26  # of an answer
MOST_EXPOSURE = 10**15  # micro-credits, where there is no bound


class Outcome(NamedTuple):
    """What became of a user's request."""

    status: int  # of HTTP; 0 for a connection that broke off
    latency_s: float
    tokens: int  # of the answer


NEVER_CAME = Outcome(-1, math.inf, 0)  # a turn of a session that ended before


class Node:
    """One provider's node: a host and an engine, and, while it runs, a dispatcher with its provider."""

    def __init__(self, nodes: "Nodes", row: int, policy: Policy) -> None:
        self.nodes, self.row, self.policy = nodes, row, policy
        scenario = nodes.planned.scenario
        self.plan = scenario.providers[row]
        tick_s, rtt_s = scenario.decision_interval_s, scenario.rtt_ms / 1000
        self.host: Host = nodes.network.host(self.plan.name, f"http://{self.plan.name}.simulated")
        self.identity = _identity(row)
        self.server = EngineServer(
            nodes.loop, nodes.planned.profiles[row], self.plan.serves, look_s=tick_s, lag_s=0.5 * rtt_s,
            ahead_s=AHEAD_S, look_at_all=False, block_tokens=nodes.block_tokens,
        )  # fmt: skip
        self.config = NodeConfig(
            name=self.plan.name, key="", serves=self.plan.serves,
            engine=EngineConfig(
                url=SimulatedEngine.URL, profile=CatalogueProfile(gpu=self.plan.gpu, model=self.plan.model)
            ),
            stake=float(nodes.bank.accounts[row, STAKED]) / MICRO,
            classes={each.name: ClassConfig(deadline_s=each.deadline_s) for each in scenario.slo.classes},
            limits=LimitsConfig(held=1 << 20),
            # The bank moves stakes as often as it is asked, which a market does at every tick.
            market=MarketConfig(
                tick_s=tick_s, gossip_s=tick_s, rtt_s=rtt_s, stake_rule=_rule(scenario),
                prefix_cache=nodes.planned.shares_prefixes,
            ),
        )  # fmt: skip
        self.dispatcher: Dispatcher
        self.provider: NodeProvider
        self.ledger: ChannelLedger | None
        self.disk = MemoryDisk()
        self.errors: list[BaseException] = []  # that ended its tasks, in all of its runs

    def boot(self) -> None:
        """Start it, or start it anew after a crash."""
        nodes, loop, row = self.nodes, self.nodes.loop, self.row
        process = self.host.boot()
        process.errors = self.errors
        planned, scenario = nodes.planned, nodes.planned.scenario
        market = Market(
            known=planned.known[row], deadlines=planned.deadlines, payment=nodes.bank.payment,
            rtt_s=scenario.rtt_ms / 1000,
            gossip_s=scenario.gossip_interval_s, tick_s=scenario.decision_interval_s,
        )  # fmt: skip
        provider = self.provider = NodeProvider(
            self.policy, planned.profiles[row], market, mean_prompt=float(planned.mean_prompt[row]),
            mean_uncached=float(planned.mean_uncached[row]), mean_output=float(planned.mean_output[row]),
            compute_per_ktok=scenario.economy.compute_cost_per_ktok,
        )  # fmt: skip
        record, count = provider.record, len(nodes.names)
        record["generator"] = make_generators((planned.seed, 2), count)[row]
        record["next_gossip_s"] = scenario.gossip_interval_s * (row + 1) / count
        record["advert_due"] = 1
        for name in nodes.names:  # so that all have their peers in the same order
            if name != self.identity.name:
                provider.gone(name)
        holder, self.ledger = nodes.bank.holders[row], self._open_ledger() if nodes.ledgers else None
        if self.ledger is None:
            provider.account = holder.account
            provider.pay(holder.ledger.free_credit())
            holder.ledger.changed.update(provider.names)
        membership = _Membership(nodes.members, self.identity.name, process, holder.stakes_said)
        metrics = Metrics(self.config.class_names)
        messages = Messages(self.identity, membership.knows, self.host.wall_s)
        transport = nodes.network.transport(self.host.name)
        dispatcher = self.dispatcher = Dispatcher(
            self.config, provider, [cast(Engine, SimulatedEngine(self.server))], membership, messages, transport,
            metrics, self.host.url, self.ledger,
        )  # fmt: skip
        if nodes.exact:
            known = _OwnCache(dispatcher.prefixes, self.server, nodes.talk)
            dispatcher.prefixes = dispatcher.delegation.prefixes = dispatcher.execution.prefixes = known
        if self.ledger is None:
            dispatcher.delegation.accounts = cast(Accounts, holder)
        self.host.serve(App(dispatcher, self.config, Refusals(metrics.message_refused, loop.time)))
        process.spawn(dispatcher.run())

    def _open_ledger(self) -> ChannelLedger:
        """Its ledger, from its disk: what it has by the scenario is split evenly over its channels."""
        nodes, bank = self.nodes, self.nodes.bank
        free, staked = ({name: int(bank.begins[k, c]) for k, name in enumerate(nodes.names)} for c in (FREE, STAKED))
        others = [name for name in nodes.names if name != self.identity.name]
        share = {name: amount // len(others) for name, amount in free.items()}
        grants = {name: Grant(share[self.identity.name], share[name], "scenario") for name in others}
        exposure = MOST_EXPOSURE if bank.exposure == NO_BOUND else bank.exposure
        slack_ms = int(milliseconds(nodes.planned.scenario.rtt_ms / 1000 + TOLERANCE_S))
        return ChannelLedger(
            self.identity, self.disk.journal(self.identity.name), grants, staked, exposure=exposure,
            payment=bank.payment, slack_ms=slack_ms,
        )  # fmt: skip


class Nodes:
    """All nodes of a scenario with one draw of its traffic."""

    def __init__(
        self, loop: VirtualLoop, planned: MarketPlan, policy_of: Callable[[int], Policy], *, seed: int = 0,
        delay_s: Delay | None = None, loss: float = 0.0, keep_history: bool = False, ledgers: bool = False,
        exact: bool = False,
    ) -> None:  # fmt: skip
        """`policy_of` makes each node's policy, by its row. `delay_s` one way between nodes, by default half the
        scenario's round trip; `loss` is the chance of a message between nodes to be lost. With `ledgers` nodes keep
        accounts with each other, as real ones do; else a bank keeps them. If `exact`, a node sees what its engine has
        cached, and how many tokens text has, as a market's provider does; a real one estimates both. Raises ValueError
        for traces whose requests share prefixes, which are not played."""
        scenario = planned.scenario
        cache = scenario.prefix_cache if planned.shares_prefixes else None
        self.block_tokens, self.exact = cache.block_tokens if cache else 0, exact
        self.talk = Talk(planned)
        half_s = 0.5 * (scenario.rtt_ms / 1000)
        self.loop, self.planned, self.ledgers = loop, planned, ledgers

        def delay(source: str, destination: str, generator: random.Random) -> float:
            if USERS in (source, destination):
                return 0.0
            return delay_s(source, destination, generator) if delay_s is not None else half_s

        self.network = MemoryNetwork(
            loop, seed=seed, delay_s=delay, loss=loss, reliable=(USERS,), keep_history=keep_history
        )
        self.names = [_identity(row).name for row in range(len(scenario.providers))]
        self.bank = Bank(loop, scenario, self.names)
        self.members = Members(self.network, dict(zip(self.names, (p.name for p in scenario.providers), strict=True)))
        self.nodes = [Node(self, row, policy_of(row)) for row in range(len(self.names))]
        self.arrived: dict[float, int] = {}  # request that came at a time

    def boot(self) -> None:
        """Start all of them."""
        for node in self.nodes:
            node.boot()

    async def play(self) -> list[Outcome]:
        """Let users send all requests of the plan, turns of a session a think time after the answer before, and wait
        for their ends."""
        traffic, transport = self.planned.traffic, self.network.transport(USERS)
        outcomes = [NEVER_CAME] * len(traffic.time_s)
        asking = []
        for k in np.flatnonzero(traffic.follows < 0).tolist():
            await self.loop.sleep_until(float(traffic.time_s[k]))
            asking.append(self.loop.create_task(self._come(transport, k, outcomes)))
        for each in asking:
            await each
        return outcomes

    async def _come(self, transport: Transport, first: int, outcomes: list[Outcome]) -> None:
        """A request, and those that follow its answer."""
        traffic, k = self.planned.traffic, first
        while True:
            self.arrived[self.loop.time()] = k
            outcomes[k] = await self._ask(transport, k)
            after = self.talk.next_turn.get(k)
            if after is None or outcomes[k].tokens == 0:
                return
            at_s = self.loop.time() + float(traffic.think_s[after])
            if at_s >= self.planned.scenario.duration_s:
                return
            await self.loop.sleep_until(at_s)
            k = after

    async def _ask(self, transport: Transport, k: int) -> Outcome:
        """Send the kth request and read its answer."""
        traffic, scenario = self.planned.traffic, self.planned.scenario
        row, klass, came_s = int(traffic.provider[k]), int(traffic.klass[k]), self.loop.time()
        node, output = self.nodes[row], int(traffic.output[k])
        longest = int(self.planned.known[row, klass, CLASS_MAX])
        request = {
            "model": node.plan.serves[0], "messages": self.talk.messages(k),
            "max_tokens": longest, "min_tokens": output, "stream": True,
        }  # fmt: skip
        if self.exact:
            origin = node.identity.name
            salts = ["" if each is node else each.dispatcher.messages.salt(origin, None) for each in self.nodes]
            self.talk.note(request, salts)
        headers = {"content-type": "application/json"}
        if scenario.slo.classes:
            headers["x-slo-class"] = scenario.slo.classes[klass].name
        url = f"{node.host.url}{CHAT_PATH}"
        try:
            async with transport.request(
                "POST", url, body=orjson.dumps(request), headers=headers, timeout_s=None, read_timeout_s=READ_TIMEOUT_S
            ) as response:
                answer = await response.read(MOST_BYTES)
                tokens = answer.count(TEXT.encode()) if answer.endswith(LAST_EVENT) else 0
                return Outcome(response.status, self.loop.time() - came_s, tokens)
        except (OSError, TimeoutError):
            return Outcome(0, self.loop.time() - came_s, 0)

    def close(self) -> None:
        """End all of them."""
        for node in self.nodes:
            node.host.crash()


class Talk:
    """What users say: a token is four letters, and each request has its own."""

    def __init__(self, planned: MarketPlan) -> None:
        """Raises ValueError for a trace whose requests share prefixes."""
        traffic = planned.traffic
        self.planned = planned
        self.next_turn = {int(u): k for k, u in enumerate(traffic.follows.tolist()) if u >= 0}
        self.blocks: dict[bytes, list[bytes]] = {}  # hashes of a prompt's blocks, by the last of its chain
        self.sizes: dict[bytes, tuple[int, ...]] = {}  # bytes of its text up to the end of each piece, likewise
        self._messages: dict[int, list[dict[str, str]]] = {}
        if planned.shares_prefixes and any(isinstance(p.traffic, TraceTraffic) for p in planned.scenario.providers):
            raise ValueError(f"{planned.scenario.name}: what requests of a trace share is not played")

    def messages(self, k: int) -> list[dict[str, str]]:
        """Those of the kth request; of a turn, those of the turn before with its answer, and one more."""
        traffic, u = self.planned.traffic, int(self.planned.traffic.follows[k])
        plan = self.planned.scenario.providers[row := int(traffic.provider[k])].traffic
        said, tokens = [], int(traffic.prompt[k])
        if u >= 0:
            output = int(traffic.output[u])
            said = [*self._messages[u], {"role": "assistant", "content": TEXT * output}]
            tokens -= int(traffic.prompt[u]) + output
        elif isinstance(plan, SessionsTraffic) and plan.system_tokens:
            said = [{"role": "system", "content": f"s{row:03d}" * plan.system_tokens}]
            tokens -= plan.system_tokens
        self._messages[k] = [*said, {"role": "user", "content": np.base_repr(k, 36).zfill(BYTES_PER_TOKEN) * tokens}]
        return self._messages[k]

    def note(self, request: dict[str, Any], salts: Iterable[str]) -> None:
        """Remember blocks and sizes of a request's prompt, under each of these salts, "" for none."""
        texts = [len(each["content"]) for each in request["messages"]]
        pieces = [min(MESSAGE_BYTES, size - start) for size in texts for start in range(0, size, MESSAGE_BYTES)]
        sizes, whole = tuple(itertools.accumulate(pieces)), sum(texts) // (BYTES_PER_TOKEN * BLOCK_TOKENS)
        for salt in salts:
            salted = request | ({"cache_salt": salt} if salt else {})
            last = prefix_of(CHAT_PATH, request, salt).hashes[-1]
            self.blocks[last], self.sizes[last] = block_hashes(salted, True, "", BLOCK_TOKENS)[:whole], sizes


class _OwnCache(PrefixIndex):
    """An index that sees what the own engine has, and how many tokens text has; what peers have, it remembers."""

    def __init__(self, of: PrefixIndex, server: EngineServer, talk: Talk) -> None:
        super().__init__(of.clock, of.kv_tokens)
        self._server, self._talk = server, talk

    def cached(self, prefix: Prefix, prompt: int, peer: str = HERE, since_s: float = -math.inf) -> Cached:
        """See `PrefixIndex`."""
        if peer != HERE:
            return super().cached(prefix, prompt, peer, since_s)
        return Cached(self._server.cached(self._talk.blocks[prefix.hashes[-1]], prompt), self.clock())

    def remember(
        self, peer: str, prefix: Prefix, prompt: int, output: int = 0, answer_bytes: int = 0, told: bool = True
    ) -> Added:
        """See `PrefixIndex`."""
        known = prefix._replace(sizes=self._talk.sizes[prefix.hashes[-1]])
        output += peer != HERE and output > 0  # in a market, a peer is believed to have the last token as well
        return super().remember(peer, known, prompt, output, answer_bytes, told)

    def reuse_s(self) -> float:
        """See `PrefixIndex`."""
        return self._server.reuse_s()


class _Membership(MemoryMembership):
    """That of a node whose accounts take for a peer's stake what it advertised."""

    def __init__(self, members: Members, name: str, process: Process, advertised: dict[str, float]) -> None:
        super().__init__(members, name, process)
        self._advertised = advertised

    def hear(self, advert: Advert) -> None:
        """See `MemoryMembership`."""
        self._advertised[advert.name] = advert.load[AD_STAKE]
        super().hear(advert)


def _identity(row: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"node %d" % row).digest()))


def _rule(scenario: Scenario) -> Literal["load", "fixed"]:
    return "load" if scenario.economy.stake_rule == "load" else "fixed"
