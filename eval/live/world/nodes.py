"""Real nodes of a world: dispatchers and ledgers on virtual time, before engines that show whose answer it is."""

import asyncio
import hashlib
import random
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, cast

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from wwwserve.agents.protocol import MICRO, PAYMENTS
from wwwserve.agents.rules import Rule
from wwwserve.eval.live.simulation.loop import VirtualLoop
from wwwserve.eval.live.simulation.membership import Members, MemoryMembership
from wwwserve.eval.live.simulation.network import Exchange, Host, MemoryNetwork, MemoryTransport
from wwwserve.eval.live.world.engine import WORD_BYTES, WordEngine, WordServer
from wwwserve.eval.live.world.truth import Ends, Got, Truth, most_tokens, text_tokens
from wwwserve.serving.config import CatalogueProfile, EngineConfig, LengthsConfig, MarketConfig, NodeConfig
from wwwserve.serving.delegation import PROMPT, TARIFF
from wwwserve.serving.dispatcher import Dispatcher, RemoteRequest
from wwwserve.serving.duel.attestor import Attestor
from wwwserve.serving.duel.judge import JudgeError, vote_by
from wwwserve.serving.duel.judge_pool import Charge, Fee, JudgePool
from wwwserve.serving.duel.messages import JUDGE_PATH, JUDGED_IN, JUDGED_TOKENS, Pair
from wwwserve.serving.engine.adapter import Engine
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import Messages, Refusals
from wwwserve.serving.http.reply import Reply
from wwwserve.serving.http.routes import App
from wwwserve.serving.http.sse import LAST_EVENT
from wwwserve.serving.ledger.accounts import ESCROW, TOLERANCE_S, Came, Delivery, slack_ms
from wwwserve.serving.ledger.channel_ledger import ChannelLedger, Grant
from wwwserve.serving.ledger.entries import Closed, Credited, Event, Recovered, Settled
from wwwserve.serving.ledger.exchange import Acknowledged
from wwwserve.serving.ledger.exchange import Answer as Replied
from wwwserve.serving.ledger.statements import Vouch
from wwwserve.serving.ledger.verdicts import Answer, Vote, committed
from wwwserve.serving.metrics import Metrics
from wwwserve.serving.node_provider import NodeProvider

MODEL = "m"
RTT_S = 0.05  # that nodes agree to reckon with; what the network takes is another matter
ENGINE_TIMEOUT_S = 15.0
JUDGING_S = 0.3  # that an engine compares two answers
OUTPUT = LengthsConfig(median=60.0, sigma=0.5, max=200)


class Agreed(NamedTuple):
    """What all nodes of a world have agreed on; amounts in micro-credits."""

    payment: int  # as `agents.protocol` numbers it
    exposure: int
    grant: int  # to each of the two of a channel
    stake: int  # that each may have at stake
    duels: float = 0.0  # chance of a request that is handed over to go to two, whose answers are judged
    refills: tuple[tuple[float, int], ...] = ()
    """from when on a node that starts finds so much added to what it and each of its peers were granted in all, s"""
    apart: tuple[tuple[int, int, float, float], ...] = ()
    """rows of a node and of a peer with whom it is to have no open channel, if it starts from one time to another, s"""
    close_after_s: float = 0.0  # until it closes one without its peer


@cache
def identity(row: int) -> Identity:
    """That of a node, the same in all worlds."""
    return Identity(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"world %d" % row).digest()))


class Strategy:
    """What a node does otherwise than an honest one: nothing."""

    name = "honest"
    honest = True
    granted = True  # others have a channel with it
    withholds = False  # it does not tell others what they forgot

    def prepare(self, node: "Node") -> None:
        """Once, before it starts for the first time."""

    def begin(self, node: "Node") -> None:
        """Change what was just made for a run of the node."""

    async def act(self, node: "Node") -> None:
        """Beside what the node does."""


class Node:
    """One node: a host and an engine, and, while it runs, a dispatcher and a ledger."""

    def __init__(self, world: "Network", row: int, strategy: Strategy) -> None:
        self.world, self.row, self.strategy = world, row, strategy
        self.identity = identity(row)
        self.name = self.identity.name
        self.random = random.Random(f"node {world.seed} {row}")
        self.host: Host = world.network.host(f"n{row}", f"http://n{row}.simulated")
        self.server = WordServer(world.loop, places=world.places[row], model=MODEL)
        self.policy = world.policies[row]
        self.config = NodeConfig(
            name=f"n{row}", key="", serves=(MODEL,), stake=world.agreed.stake / MICRO, output=OUTPUT,
            engine=EngineConfig(
                url="http://engine.simulated", timeout_s=ENGINE_TIMEOUT_S,
                profile=CatalogueProfile(gpu="rtx-4090", model="llama-2-7b", max_num_seqs=world.places[row]),
            ),
            market=MarketConfig(
                payment=cast(Any, PAYMENTS[world.agreed.payment]), rtt_s=RTT_S, gossip_s=2.0, prefix_cache=False,
                duel_probability=world.agreed.duels, judges=2, stake_rule="fixed" if world.agreed.duels else "load",
            ),
        )  # fmt: skip
        self.dispatcher: WatchedDispatcher
        self.ledger: ChannelLedger
        self.app: App
        self.runs: list[Dispatcher] = []
        self.errors: list[BaseException] = []  # that ended its tasks, in all of its runs
        self.forgot = False  # whether its disk ever lost entries that it had called durable
        self._booted_s = 0.0

    @property
    def honest(self) -> bool:
        """Whether it does as it should."""
        return self.strategy.honest

    def restarted_since(self, at_s: float) -> bool:
        """Whether it was not there all the time since."""
        return not self.host.up or self._booted_s > at_s

    def crash(self, *, silent: bool, keep: int, torn: bool = False) -> None:
        """It dies; of writes that its disk called durable and were not, the first `keep` are there. The last one that
        is may be torn."""
        disk = self.host.disk
        self.forgot |= torn or disk.durable + keep < len(disk.batches)
        self.host.crash(silent=silent, keep=keep, torn=torn)

    def boot(self) -> None:
        """Start it, or start it anew after a crash."""
        world, host = self.world, self.host
        process = host.boot()
        process.errors = self.errors
        self._booted_s = world.loop.time()
        config = self.config
        provider = NodeProvider(
            Rule(self.policy), config.engine_profile(), config.agreed(), seed=world.seed * 64 + self.row,
            mean_prompt=40.0, mean_output=OUTPUT.median,
        )  # fmt: skip
        ledger = self.ledger = WatchedLedger(
            self, self.identity, host.disk.journal(self.name), world.grants(self), world.funds(), agreed=True,
            exposure=world.agreed.exposure, payment=world.agreed.payment,
            slack_ms=slack_ms(RTT_S),
            closed=world.apart(self), close_after_s=world.agreed.close_after_s, wall_clock=host.wall_s,
        )  # fmt: skip
        membership = MemoryMembership(world.members, self.name, process)
        messages, metrics = Messages(self.identity, membership.knows, host.wall_s), Metrics(config.class_names)
        transport = CountingTransport(world.network, host.name, process, self)
        dispatcher = self.dispatcher = WatchedDispatcher(
            config, provider, [cast(Engine, WordEngine(self.server, config.engine_profile()))], membership, messages,
            transport, metrics, host.url, ledger,
        )  # fmt: skip
        dispatcher.node = self
        dispatcher.judge_pool, dispatcher.attestor = CountedPool(self, dispatcher), CountedAttestor(self)
        self.runs.append(dispatcher)
        self.app = App(dispatcher, config, Refusals(metrics.message_refused, world.loop.time))
        self.strategy.begin(self)
        host.serve(self.app)
        process.spawn(dispatcher.run())
        if not self.honest:
            process.spawn(self.strategy.act(self))


class Network:
    """All nodes of a world, and what they have agreed on."""

    def __init__(
        self, loop: VirtualLoop, network: MemoryNetwork, seed: int, agreed: Agreed, strategies: list[Strategy],
        places: list[int], policies: list[str],
    ) -> None:  # fmt: skip
        """`places`: requests at once in the engine of each node; `policies`: names of their rules."""
        self.loop, self.network, self.seed, self.agreed = loop, network, seed, agreed
        self.places, self.policies = places, policies
        self.truth, self.ends = Truth(agreed.payment, RTT_S + TOLERANCE_S), Ends()
        self.names = [identity(row).name for row in range(len(strategies))]
        self.members = Members(network, {name: f"n{row}" for row, name in enumerate(self.names)})
        self.strategies = strategies
        self.asked_of: dict[int, frozenset[str]] = {}  # words of the requests of each node's own users, by its row
        self.nodes = [Node(self, row, strategy) for row, strategy in enumerate(strategies)]
        self.by_url = {node.host.url: node for node in self.nodes}
        self.by_name = {node.name: node for node in self.nodes}

    def granted(self) -> list[str]:
        """Who has channels."""
        return [name for name, each in zip(self.names, self.strategies, strict=True) if each.granted]

    def grants(self, node: Node) -> dict[str, Grant]:
        """What the channels of a node begin with."""
        amount, granted = self.agreed.grant, self.granted()
        if node.name not in granted:
            return {}
        totals = accumulate((more for at_s, more in self.agreed.refills if at_s <= self.loop.time()), initial=amount)
        grant, *later = (Grant(each, each, "world") for each in totals)
        return {name: grant._replace(later=tuple(later)) for name in granted if name != node.name}

    def apart(self, node: Node) -> list[str]:
        """Peers with whom a node that starts now is to have no open channel."""
        now_s = self.loop.time()
        return [
            self.names[peer] for row, peer, from_s, to_s in self.agreed.apart
            if row == node.row and from_s <= now_s < to_s
        ]  # fmt: skip

    def funds(self) -> dict[str, int]:
        """What each may have at stake."""
        return dict.fromkeys(self.granted(), self.agreed.stake)


class WatchedLedger(ChannelLedger):
    """One that tells the truth of what it signed, if its node is honest."""

    def __init__(self, node: Node, *given: Any, **more: Any) -> None:
        self.node = node
        super().__init__(*given, **more)

    def _add(self, event: Event) -> None:
        super()._add(event)
        ends, name = self.node.world.ends, self.name
        if not self.node.honest:
            return
        if isinstance(event, Closed):
            ends.closed(name, event.peer, len(self.node.runs), event.ended.closing)
        elif isinstance(event, Settled | Credited | Recovered):
            ends.receipts[name, event.peer] += 1 if isinstance(event, Settled) else len(event.receipts)
            ends.signed[name, event.peer] = max(ends.signed[name, event.peer], self.books.channel(event.peer).total)

    async def _on_voucher(self, peer: str, vouch: Vouch) -> Replied:
        answer = await super()._on_voucher(peer, vouch)
        if self.node.honest and isinstance(answer, Acknowledged):
            ends, total = self.node.world.ends, vouch.voucher.state.total
            ends.vouched[self.name, peer] = max(ends.vouched[self.name, peer], total)
        return answer


class WatchedDispatcher(Dispatcher):
    """One that tells the truth of what it ran for peers."""

    node: Node

    async def run_for(self, remote: RemoteRequest, reply: Reply, paid: Delivery | None = None) -> bool:
        """See `Dispatcher`."""
        counted, taken_s, whole = _Counted(reply), self.clock(), False
        try:
            whole = await super().run_for(remote, counted, paid)
        finally:
            self.node.world.truth.deliver(
                self.messages.name, remote.origin, remote.tariff, remote.prompt, text_tokens(remote.completion.body),
                counted.tokens, remote.longest, remote.promise, self.clock() - taken_s, whole,
            )  # fmt: skip
        return whole

    async def _judge(self, path: str, request: dict[str, Any], answers: tuple[str, str]) -> int:
        """See `Dispatcher`: an engine finds that a question explains an answer of its own word."""
        await asyncio.sleep(JUDGING_S)
        if not self.node.server.up:
            raise JudgeError("the engine is down")
        own = request["messages"][0]["content"][:WORD_BYTES]
        one, other = (float(answer.startswith(own)) for answer in answers)
        return vote_by(one, other)


class CountedPool(JudgePool):
    """A judge that tells the truth of what it is to be paid for."""

    def __init__(self, node: Node, dispatcher: Dispatcher) -> None:
        super().__init__(node.identity, dispatcher._judge, dispatcher.metrics, node.ledger.stakes)
        self.node = node

    async def vote(self, origin: str, body: bytes, charge: Charge = lambda tokens: None) -> bytes:
        """See `JudgePool`."""

        def counted(tokens: int) -> Fee | None:
            fee = charge(tokens)
            return _CountedFee(self.node, origin, fee) if isinstance(fee, Delivery) else fee

        vote = await super().vote(origin, body, counted)
        truth, duel = self.node.world.truth, msgspec.json.decode(body, type=Pair).case.opening.name()
        truth.signed[self.node.name, duel].add(msgspec.json.decode(vote, type=Vote).case)
        return vote


class CountedAttestor(Attestor):
    """An executor that tells the truth of what it signs."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.identity, node.ledger.stakes)
        self.node = node

    def attest(self, origin: str, body: bytes) -> bytes:
        """See `Attestor`."""
        signed = super().attest(origin, body)
        answer = msgspec.json.decode(signed, type=Answer)
        self.node.world.truth.signed[self.node.name, committed(answer.secret)].add(answer.duel)
        return signed


class _CountedFee:
    def __init__(self, node: Node, origin: str, fee: Delivery) -> None:
        self.node, self.origin, self.fee = node, origin, fee

    def end(self, answer: str, came: Came) -> None:
        terms = self.fee._terms
        self.node.world.truth.deliver(
            self.node.name, self.origin, terms.tariff, terms.prompt, terms.prompt, came.tokens, JUDGED_TOKENS,
            JUDGED_IN, came.took_s, came.whole,
        )  # fmt: skip
        self.fee.end(answer, came)


class _Counted(Reply):
    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.tokens = 0
        self._reply = reply

    async def start(self, status: int, content_type: str) -> None:
        await self._reply.start(status, content_type)

    async def pass_on(self, chunk: bytes) -> None:
        self.tokens += text_tokens(chunk)
        await self._reply.pass_on(chunk)

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        await self._reply.whole(status, content_type, body)


class CountingTransport(MemoryTransport):
    """That of a node, which tells the truth of what came to it."""

    def __init__(self, network: MemoryNetwork, name: str, process: object, node: Node) -> None:
        super().__init__(network, name, process)  # type: ignore[arg-type]
        self.node = node

    def request(
        self, method: str, url: str, *, body: bytes = b"", headers: Mapping[str, str], timeout_s: float | None,
        read_timeout_s: float, peer: str = "",
    ) -> AbstractAsyncContextManager[Exchange]:  # fmt: skip
        """See `serving.http.transport.Transport`."""
        exchange = _CountedExchange(self, method, url, body, headers, timeout_s, read_timeout_s)
        if ESCROW in headers and peer:
            given, cached, output = map(int, headers[TARIFF].split())
            if url.endswith(JUDGE_PATH):
                prompt = msgspec.json.decode(body, type=Pair).prompt()
                exchange.got = Got((given, cached, output), prompt, JUDGED_TOKENS, vote=True)
            else:
                exchange.got = Got((given, cached, output), int(headers.get(PROMPT, 0)), most_tokens(body))
            self.node.world.truth.got[self.node.name, peer].append(exchange.got)
        return exchange


class _CountedExchange(Exchange):
    got: Got | None = None

    def began(self, status: int, headers: object) -> None:
        if self.got is not None and self.error is None and status == 200:
            self.got.taken = True
        super().began(status, headers)  # type: ignore[arg-type]

    def came(self, piece: bytes, last: bool) -> None:
        if self.got is not None and self.error is None:
            self.got.tokens += text_tokens(piece)
            self.got.whole |= last or LAST_EVENT in piece
            if self.got.vote and last:
                self.got.tokens = JUDGED_TOKENS
        super().came(piece, last)
