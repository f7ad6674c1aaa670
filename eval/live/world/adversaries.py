"""Those who are out to win: what each does otherwise than an honest node, whose key and channels it has.

A strategy changes a node of its own, or sends what an honest one never would, signed as it should be. What it draws, it
draws from its node's own dice.
"""

import asyncio
import contextlib
import math
from typing import Any, cast

import msgspec
import orjson

from wwwserve.agents.knowledge import AD_CONTEXT, AD_HELD, AD_KV_TOKENS, AD_PREFILL, AD_RUNNING, AD_TARIFF, AD_WAITING
from wwwserve.agents.protocol import TARIFF_SIZE
from wwwserve.agents.tariff import in_micro
from wwwserve.eval.live.world.engine import WORD_BYTES, word
from wwwserve.eval.live.world.nodes import Node, Strategy
from wwwserve.serving.delegation import PROMPT, TARIFF
from wwwserve.serving.ledger.accounts import ESCROW, LEDGER_PATH
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.exchange import (
    Known,
    Telling,
    Vouching,
)
from wwwserve.serving.ledger.statements import (
    NOTHING_CAME,
    Receipt,
    Served,
    Signed,
    State,
    Terms,
    Vouch,
    link,
    sign,
)
from wwwserve.serving.ledger.verdicts import Stake, Staked
from wwwserve.serving.market import Promise, Tariff

PATH = "/peer/v1/chat/completions"
ASK_S = 5.0
JUNK = 1200  # of requests of its own, whose words no user's request has
TARIFFS = slice(AD_TARIFF, AD_TARIFF + TARIFF_SIZE)


class Adversary(Strategy):
    """One that may send as it likes."""

    honest = False
    pause_s = 0.5  # between two things that it does

    async def act(self, node: Node) -> None:
        """Do one thing after the other, and mind no refusal."""
        while True:
            await asyncio.sleep(self.pause_s * node.random.uniform(0.2, 2.0))
            peers = sorted(node.dispatcher.peers)
            if peers:
                with contextlib.suppress(OSError, TimeoutError, LedgerError):
                    await self.do(node, node.random.choice(peers))

    async def do(self, node: Node, peer: str) -> None:
        """One thing to a peer."""
        await asyncio.sleep(ASK_S)


async def tell(node: Node, peer: str, message: Any) -> bytes:
    """Send a message to a peer's ledger. Raises OSError."""
    body = message if isinstance(message, bytes) else msgspec.json.encode(message)
    return await node.dispatcher.client.post(peer, LEDGER_PATH, body, timeout_s=ASK_S)


def request(node: Node, tokens: int, prompt: int) -> bytes:
    """One of its own."""
    said = word(JUNK + node.row) + "p" * (WORD_BYTES * (prompt - 1))
    body = {
        "model": node.dispatcher.serves[0], "messages": [{"role": "user", "content": said}],
        "max_tokens": tokens, "min_tokens": tokens,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return orjson.dumps(body)


async def offer(node: Node, peer: str, body: bytes, terms: Terms, id: int, for_s: float) -> tuple[int, Promise | None]:
    """Ask a peer for an answer, and hang up after so long; returns the status, and what was promised."""
    advert = node.dispatcher.peers.get(peer)
    if advert is None:
        return 0, None
    headers = {
        PROMPT: str(terms.prompt), TARIFF: " ".join(map(str, terms.tariff)), ESCROW: f"v3 {id} {terms.amount}",
    }  # fmt: skip
    status, promise = 0, None
    with contextlib.suppress(OSError, TimeoutError, KeyError):
        async with (
            asyncio.timeout(for_s),
            node.dispatcher.client.request(peer, PATH, body, headers, timeout_s=None, read_timeout_s=20.0) as got,
        ):
            status, named = got.response.status, got.response.headers
            if status == 200:
                promise = Promise(float(named["x-wwwserve-ttft"]), float(named["x-wwwserve-tpot"]))
            await got.response.read(1 << 20)
    return status, promise


def terms_of(node: Node, peer: str, tokens: int, prompt: int) -> Terms:
    """By the tariff that a peer advertises."""
    given, cached, output = (round(1e6 * price) for price in node.dispatcher.peers[peer].load[TARIFFS])
    return Terms((given, cached, output), prompt, max((given * prompt + output * tokens) // 1000 + 1, 0))


class FreeRider(Adversary):
    """Hands its users' requests to others and pays nothing, a tenth, or never says that it owes anything."""

    name = "free rider"

    def prepare(self, node: Node) -> None:
        """See `Strategy`."""
        node.server.slowness = 30.0  # so that its users are served elsewhere
        self.how = node.random.choice(["nothing", "tenth", "silent", "early", "short prompt"])

    def begin(self, node: Node) -> None:
        """See `Strategy`."""
        ledger, how = node.ledger, self.how
        settle, message = ledger.settle, ledger.message

        def pay(peer: str, id: int, promise: Promise | None, served: Served, most: int) -> int:
            if how == "tenth":
                served = msgspec.structs.replace(served, tokens=served.tokens // 10, prompt=served.prompt // 10)
                return settle(peer, id, promise, served, most)
            if how in ("nothing", "early"):
                return settle(peer, id, None, NOTHING_CAME, 1)
            return settle(peer, id, promise, served, most)

        async def say(peer: str) -> bytes | None:
            return await message(peer) if peer not in ledger.books.channels or not ledger.is_reconciled(peer) else None

        ledger.settle = pay  # type: ignore[method-assign]
        if how in ("nothing", "tenth", "early"):
            ledger.advance = lambda *_: None  # type: ignore[method-assign]
        if how == "silent":
            ledger.message = say  # type: ignore[method-assign]
        if how == "early":
            accepted = node.dispatcher.provider.accepted

            def lie(*given: Any) -> None:  # that nothing came, as soon as it is accepted
                accepted(*given)
                for peer, channel in ledger.books.channels.items():
                    for id in list(channel.open):
                        settle(peer, id, None, NOTHING_CAME, 1)

            node.dispatcher.provider.accepted = lie  # type: ignore[method-assign, assignment]
            ledger.settle = lambda peer, id, *_: 0  # type: ignore[method-assign]
        if how == "short prompt":
            delegate = node.dispatcher.delegation._hand_over

            async def less(offered: Any, reply: Any) -> Any:
                least = max(1, offered.prompt // 4)
                return await delegate(offered._replace(prompt=least), reply)

            node.dispatcher.delegation._hand_over = less  # type: ignore[method-assign, assignment]


class Freeloader(FreeRider):
    """A free rider that has its own engine as well, should nobody serve it."""

    name = "freeloader"

    def prepare(self, node: Node) -> None:
        """See `Strategy`."""
        super().prepare(node)
        node.server.slowness = 1.0


class Inflater(Adversary):
    """Bills more than it delivers."""

    name = "inflater"

    def prepare(self, node: Node) -> None:
        """See `Strategy`."""
        node.server.billed = node.random.choice([1.5, 3.0, 100.0])
        node.server.junk = node.random.random() < 0.5
        node.server.letters = node.server.junk and node.random.random() < 0.5
        node.server.places = 16

    def begin(self, node: Node) -> None:
        """See `Strategy`."""
        advertise_idle(node, cheap=1.0)


class Staller(Adversary):
    """Takes requests and lets them wait."""

    name = "staller"

    def prepare(self, node: Node) -> None:
        """See `Strategy`."""
        node.server.slowness = node.random.choice([10.0, 100.0, math.inf])
        node.server.places = 64

    def begin(self, node: Node) -> None:
        """See `Strategy`."""
        advertise_idle(node, cheap=1.0)
        received, dice = node.ledger.received, node.random

        async def later(peer: str, body: bytes) -> bytes:
            await asyncio.sleep(dice.choice([0.0, 1.0, 10.0]))
            return await received(peer, body)

        node.ledger.received = later  # type: ignore[method-assign]


class Forger(Adversary):
    """Answers its own users as it should, and peers with text that no model wrote, of the length that they ask for."""

    name = "forger"

    def prepare(self, node: Node) -> None:
        """See `Strategy`."""
        node.server.junk, node.server.places = True, 16
        node.server.fair = node.world.asked_of[node.row]

    def begin(self, node: Node) -> None:
        """See `Strategy`."""
        advertise_idle(node, cheap=0.9)


def advertise_idle(node: Node, cheap: float) -> None:
    """Say that nothing is under way here, at a fraction of the price, and take everything."""
    provider = node.dispatcher.provider
    advertise, consider = provider.advertise, provider.consider

    def lie(now_s: float) -> Any:
        load = advertise(now_s).copy()
        for column in (AD_RUNNING, AD_WAITING, AD_KV_TOKENS, AD_PREFILL):
            load[column] = 0.0
        load[AD_HELD : AD_HELD + 2] = 0.0
        load[TARIFFS] *= cheap
        if node.dispatcher.accounts is not None and cheap != 1.0:  # what is offered at that price is taken
            node.dispatcher.accounts.advertised(cast(Tariff, tuple(map(in_micro, load[TARIFFS]))))
        load[AD_CONTEXT] = max(0.1, load[AD_CONTEXT] * 0.1)
        return load

    def take(prompt: int, cached: int, longest: int, tariff: Any) -> Promise | None:
        return consider(prompt, cached, longest, tariff) or Promise(0.05, 0.01)

    provider.advertise, provider.consider = lie, take  # type: ignore[method-assign]


class Liar(Adversary):
    """Advertises that it is idle and cheap, and is neither."""

    name = "liar"

    def prepare(self, node: Node) -> None:
        """See `Strategy`."""
        node.server.slowness = node.random.choice([2.0, 8.0])
        node.server.junk = node.random.random() < 0.5

    def begin(self, node: Node) -> None:
        """See `Strategy`."""
        advertise_idle(node, cheap=node.random.choice([0.1, 1.0]))


class Replayer(Adversary):
    """Sends again what it sent, and to others what was sent to it, also in another's name."""

    name = "replayer"

    def begin(self, node: Node) -> None:
        """See `Strategy`."""
        self.seen: list[tuple[str, bytes, dict[str, str]]] = []
        app, transport, seen = node.app, node.dispatcher.client.transport, self.seen
        send = transport.request

        async def hear(scope: Any, receive: Any, reply: Any) -> None:
            async def listen() -> Any:
                message = await receive()
                if message["type"] == "http.request" and scope["path"].startswith("/peer"):
                    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
                    seen.append((scope["path"], message["body"], headers))
                return message

            await app(scope, listen, reply)

        def say(method: str, url: str, **more: Any) -> Any:
            path = "/" + url.split("/", 3)[3]
            seen.append((path, more["body"], dict(more["headers"])))
            return send(method, url, **more)

        node.app = hear  # type: ignore[assignment]
        transport.request = say  # type: ignore[method-assign]

    async def do(self, node: Node, peer: str) -> None:
        """See `Adversary`."""
        advert = node.dispatcher.peers.get(peer)
        if not self.seen or advert is None:
            return
        path, body, headers = node.random.choice(self.seen[-200:])
        if node.random.random() < 0.3:
            headers = forged(node, peer, headers)
        if node.random.random() < 0.5:  # signed anew
            terms = {name: value for name, value in headers.items() if name.startswith("x-wwwserve-")}
            terms.pop("x-wwwserve-signature", None)
            async with node.dispatcher.client.request(
                peer, path, body, terms, timeout_s=ASK_S, read_timeout_s=ASK_S
            ) as got:
                await got.response.read(1 << 20)
            return
        async with node.world.network.transport(node.host.name).request(
            "POST", advert.url + path, body=body, headers=headers, timeout_s=ASK_S, read_timeout_s=ASK_S
        ) as response:
            await response.read(1 << 20)


def forged(node: Node, peer: str, headers: dict[str, str]) -> dict[str, str]:
    """The headers of a message in the name of another node, under a signature that is none."""
    claim = headers.get("x-wwwserve-signature", "").split()
    others = [name for name in node.world.names if name not in (node.name, peer)]
    if len(claim) != 8 or not others:
        return headers
    victim = node.world.by_name[node.random.choice(others)]
    runs = [node.world.by_name[name].dispatcher.messages.run for name in (peer, victim.name)]  # all adverts tell them
    now_ms, number = round(node.host.wall_s() * 1e3), node.random.randrange(1000, 9000)
    of = [victim.name, peer, *map(str, (runs[0], now_ms, runs[1], number)), *claim[6:]]
    escrow = {ESCROW: f"v3 {node.random.randrange(1000, 10**6)} 10000"} if ESCROW in headers else {}
    return headers | escrow | {"x-wwwserve-signature": " ".join(of)}


class Equivocator(Adversary):
    """Signs two vouchers of one number, pays what it never asked for, and goes on from old copies of its journal."""

    name = "equivocator"
    pause_s = 2.0

    def begin(self, node: Node) -> None:
        """See `Strategy`."""
        if node.random.random() < 0.5:  # it does not ask what it forgot
            node.ledger._reconciler.done = set(node.world.names)

    async def do(self, node: Node, peer: str) -> None:
        """See `Adversary`."""
        channel = node.ledger.books.channels.get(peer)
        if channel is None:
            return
        if node.random.random() < 0.2:
            self._restart(node)
            return
        for _ in range(2):
            terms = Terms((1, 1, node.random.randrange(1, 1000)), 1, 1000)
            receipt = Receipt(channel.asked + node.random.randrange(1, 9), "0" * 64, terms, None, NOTHING_CAME, 0)
            number, head = channel.number + 1, link(channel.head, receipt)
            state = State(channel.digest, node.name, peer, number, channel.total, head)
            vouch = Vouch(
                Signed(state, sign(node.identity, "voucher", state)), channel.acked + 1, (*channel.unacked, receipt)
            )
            await tell(node, peer, Vouching(vouch))

    def _restart(self, node: Node) -> None:
        batches = node.host.disk.batches
        del batches[len(batches) * 2 // 3 :]
        node.host.disk.sync()
        loop = node.world.loop
        loop.call_soon(node.host.crash)
        loop.call_later(1.0, lambda: node.boot() if not node.host.up else None)


class Withholder(Adversary):
    """Tells nobody what it forgot: who then signs a number again with other content is accused."""

    name = "withholder"
    withholds = True

    def begin(self, node: Node) -> None:
        """See `Strategy`."""
        received = node.ledger.received

        async def keep_back(peer: str, body: bytes) -> bytes:
            if b'"type":"ask"' in body:
                return msgspec.json.encode(Known((), 0, (), ""))
            return await received(peer, body)

        node.ledger.received = keep_back  # type: ignore[method-assign]
        advertise_idle(node, cheap=0.5)


class Robber(Adversary):
    """Asks for as much as it can with credit that it does not have, under numbers that it used before."""

    name = "robber"
    pause_s = 0.3

    async def do(self, node: Node, peer: str) -> None:
        """See `Adversary`."""
        dice = node.random
        tokens, prompt = dice.randrange(50, 400), dice.randrange(1, 60)
        terms, channel = terms_of(node, peer, tokens, prompt), node.ledger.books.channels.get(peer)
        if dice.random() < 0.5:
            terms = msgspec.structs.replace(terms, amount=1)
        id = dice.randrange(1, 4) if dice.random() < 0.3 else (channel.asked if channel else 0) + dice.randrange(1, 500)
        body = request(node, tokens, prompt)
        task = asyncio.ensure_future(offer(node, peer, body, terms, id, 20.0))
        if dice.random() < 0.5:
            await task


class Sybil(Robber):
    """One of a crowd of keys that nobody granted anything: it advertises wonders, asks for answers, states stakes."""

    name = "sybil"
    granted = False

    def begin(self, node: Node) -> None:
        """See `Strategy`."""
        advertise_idle(node, cheap=0.01)

    async def do(self, node: Node, peer: str) -> None:
        """See `Adversary`."""
        if node.random.random() < 0.5:
            await super().do(node, peer)
            return
        stake = Stake(node.name, node.random.randrange(1, 1 << 40), 10**15)
        staked = Staked(stake, sign(node.identity, "stake", stake))
        await tell(node, peer, Telling((msgspec.json.encode(staked).decode(),)))
