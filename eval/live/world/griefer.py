"""Who spoils what others do, at whatever cost, alone or as one of its sides."""

from typing import Any

import msgspec

from wwwserve.eval.live.world.adversaries import Adversary, FreeRider, Replayer, offer, request, tell, terms_of
from wwwserve.eval.live.world.nodes import Node
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.exchange import Acknowledged, Ask, Close, Declined, Held, Open, Refilling, Telling
from wwwserve.serving.ledger.statements import NOTHING_CAME, Ended, Refill, Served, digest, sign


class Griefer(Adversary):
    """Hangs up, disputes, declines, acknowledges what is not, and says of its requests what it likes."""

    name = "griefer"
    pause_s = 0.4

    def prepare(self, node: Node) -> None:
        """See `Strategy`."""
        self.declines = node.random.random() < 0.5

    def begin(self, node: Node) -> None:
        """See `Strategy`."""
        received, dice = node.ledger.received, node.random

        async def dispute(peer: str, body: bytes) -> bytes:
            told = await received(peer, body)
            if dice.random() < 0.5 or b'"open"' in body:
                return told
            channel = node.ledger.books.channels[peer]
            lies: list[Any] = [
                Declined("no"), Held(None), Acknowledged(channel.paid_number + 5, "A" * 86 + "=="),
                Acknowledged(1, "A" * 86 + "=="), Held(channel.vouchers[0] if channel.vouchers else None),
            ]  # fmt: skip
            return msgspec.json.encode(dice.choice(lies))

        if self.declines:
            node.ledger.received = dispute  # type: ignore[method-assign]

    async def do(self, node: Node, peer: str) -> None:
        """See `Adversary`."""
        dice, channel = node.random, node.ledger.books.channels.get(peer)
        if channel is None:
            return
        if dice.random() < 0.3:
            ask = Ask(dice.choice([0, channel.number]), dice.choice([0, channel.paid_number]))
            open_ = Open(msgspec.structs.replace(channel.opening, amount_a=1), "A" * 86 + "==")
            number, (a, b) = dice.randint(0, len(channel.refills) + 2), channel.granted
            refill = Refill(
                channel.digest, number, a + dice.choice([0, 1, 10**9]), b + dice.choice([-1, 0, 1]), "world"
            )
            add = Refilling(refill, sign(node.identity, "refill", refill))
            closing = node.ledger.closer._closing(peer, channel, channel.paid(peer, node.name))
            closing = msgspec.structs.replace(closing, number=closing.number + dice.choice([0, 0, 0, 1]))
            signed = sign(node.identity, "closing", closing)
            end = Close(Ended(closing, *((signed, "") if node.name < peer else ("", signed))))
            await tell(node, peer, dice.choice([ask, open_, b"{}", b"[" * 1000, Telling(("{}",)), add, end]))
            return
        tokens, prompt = dice.randrange(1, 200), dice.randrange(1, 60)
        body, terms = request(node, tokens, prompt), terms_of(node, peer, tokens, prompt)
        try:
            id = node.ledger.lock(peer, terms, dice.choice(["0" * 64, digest(body)]))
        except LedgerError:
            return
        _, promise = await offer(node, peer, body, terms, id, dice.choice([0.01, 0.3, 2.0, 20.0]))
        if id in channel.open:
            served = Served("", 0, 0, dice.randrange(2), 10, "part") if dice.random() < 0.5 else NOTHING_CAME
            node.ledger.settle(peer, id, promise, served, tokens)


class Mixed(Adversary):
    """Free rider, liar and griefer in one."""

    name = "mixed"

    def __init__(self) -> None:
        self.parts: tuple[Adversary, ...] = (FreeRider(), Griefer(), Replayer())

    def prepare(self, node: Node) -> None:
        """See `Strategy`."""
        for each in self.parts:
            each.prepare(node)

    def begin(self, node: Node) -> None:
        """See `Strategy`."""
        for each in self.parts:
            each.begin(node)

    async def do(self, node: Node, peer: str) -> None:
        """See `Adversary`."""
        await node.random.choice(self.parts[1:]).do(node, peer)
