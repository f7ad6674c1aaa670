"""The nodes of a scenario, the real ones, on a virtual clock: dispatchers and providers before simulated engines.

What a market plays in arrays is played here by messages: users send the scenario's requests at their times, nodes
decide, hand over, pay and answer. Delays, loss, crashes and restarts come on top; the same seed gives the same history.
"""

import hashlib
import random
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from wwwserve.agents.classes import CLASS_MAX
from wwwserve.agents.generator import make_generators
from wwwserve.agents.knowledge import AD_STAKE
from wwwserve.agents.protocol import FREE, MICRO, NO_BOUND, STAKED, milliseconds
from wwwserve.agents.rules import Policy
from wwwserve.envs.scenario import Scenario
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
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import Messages, Refusals
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
            ahead_s=AHEAD_S, look_at_all=False,
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
            mean_output=float(planned.mean_output[row]), compute_per_ktok=scenario.economy.compute_cost_per_ktok,
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
        metrics = Metrics()
        messages = Messages(self.identity, membership.knows, self.host.wall_s)
        transport = nodes.network.transport(self.host.name)
        dispatcher = self.dispatcher = Dispatcher(
            self.config, provider, cast(Engine, SimulatedEngine(self.server)), membership, messages, transport, metrics,
            self.host.url, self.ledger,
        )  # fmt: skip
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
    ) -> None:  # fmt: skip
        """`policy_of` makes each node's policy, by its row. `delay_s` one way between nodes, by default half the
        scenario's round trip; `loss` is the chance of a message between nodes to be lost. With `ledgers` nodes keep
        accounts with each other, as real ones do; else a bank keeps them."""
        scenario = planned.scenario
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

    def boot(self) -> None:
        """Start all of them."""
        for node in self.nodes:
            node.boot()

    async def play(self) -> list[Outcome]:
        """Let users send all requests of the plan and wait for their ends."""
        traffic, transport = self.planned.traffic, self.network.transport(USERS)
        asking = []
        for k, time_s in enumerate(traffic.time_s.tolist()):
            await self.loop.sleep_until(time_s)
            asking.append(self.loop.create_task(self._ask(transport, k)))
        return [await each for each in asking]

    async def _ask(self, transport: Transport, k: int) -> Outcome:
        """Send the kth request and read its answer."""
        traffic, scenario = self.planned.traffic, self.planned.scenario
        row, klass, came_s = int(traffic.provider[k]), int(traffic.klass[k]), self.loop.time()
        node, output = self.nodes[row], int(traffic.output[k])
        longest = int(self.planned.known[row, klass, CLASS_MAX])
        prompt = "x" * (BYTES_PER_TOKEN * int(traffic.prompt[k]))
        body = orjson.dumps(
            {
                "model": node.plan.serves[0], "prompt": prompt,
                "max_tokens": longest, "min_tokens": output, "stream": True,
            }
        )  # fmt: skip
        headers = {"content-type": "application/json"}
        if scenario.slo.classes:
            headers["x-slo-class"] = scenario.slo.classes[klass].name
        url = f"{node.host.url}/v1/completions"
        try:
            async with transport.request(
                "POST", url, body=body, headers=headers, timeout_s=None, read_timeout_s=READ_TIMEOUT_S
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
