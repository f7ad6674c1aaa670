"""Who abuses the end of channels: it closes, refills and opens them again as suits it, above all while it owes."""

import contextlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec

from wwwserve.eval.live.world.adversaries import Adversary, offer, request, tell, terms_of
from wwwserve.eval.live.world.nodes import Node
from wwwserve.serving.ledger.channel import Channel, LedgerError
from wwwserve.serving.ledger.exchange import Close, Declined, Refilling
from wwwserve.serving.ledger.statements import (
    NOTHING_CAME,
    Closing,
    Ended,
    Refill,
    State,
    StatementError,
    digest,
    sign,
)

KEPT = 64  # messages about ends of channels
OWED_S = 3.0  # for which it waits for an answer that it does not pay


class Leaver(Adversary):
    """Closes channels while it owes, with old vouchers, twice or for others to sign alone, and opens them again."""

    name = "leaver"
    pause_s = 0.3

    def __init__(self) -> None:
        self.kept: list[tuple[str, Close]] = []  # what peers signed of the end of their channels, in all of its runs
        self.states: defaultdict[str, list[State]] = defaultdict(list)  # of the chains by which it paid

    def prepare(self, node: Node) -> None:
        """See `Strategy`."""
        node.server.slowness = node.random.choice([1.0, 30.0])  # so that its users are served elsewhere
        self.owes, self.signs = node.random.random() < 0.7, node.random.choice([0.0, 0.5, 1.0])

    def begin(self, node: Node) -> None:
        """See `Strategy`."""
        message, received, dice = node.ledger.message, node.ledger.received, node.random

        async def say(peer: str) -> bytes | None:
            body = await message(peer)
            return None if self.owes and body is not None and body.startswith(b'{"type":"vouch"') else body

        async def hear(peer: str, body: bytes) -> bytes:
            self._keep(peer, body)
            if body.startswith(b'{"type":"close"') and dice.random() >= self.signs:
                return msgspec.json.encode(Declined("later"))
            return await received(peer, body)

        node.ledger.message, node.ledger.received = say, hear  # type: ignore[method-assign]
        for name in ("settle", "free", "advance"):  # of what was under way when it closed
            setattr(node.ledger, name, _if_it_can(getattr(node.ledger, name)))

    async def do(self, node: Node, peer: str) -> None:
        """See `Adversary`."""
        channel = node.ledger.books.channels.get(peer)
        if channel is None:
            return
        self.states[peer].append(channel.state(node.name, peer))
        acts = [
            self._owe, self._owe, self._close_alone, self._close, self._close, self._close_otherwise,
            self._open_otherwise, self._sign_what_was_kept, self._refill, self._again_and_again,
        ]  # fmt: skip
        with contextlib.suppress(StatementError):
            await node.random.choice(acts)(node, peer, channel)

    async def _owe(self, node: Node, peer: str, channel: Channel) -> None:
        """Have something answered, and do not settle it."""
        tokens, prompt = node.random.randrange(1, 200), node.random.randrange(1, 60)
        body, terms = request(node, tokens, prompt), terms_of(node, peer, tokens, prompt)
        id = node.ledger.lock(peer, terms, digest(body))
        await offer(node, peer, body, terms, id, node.random.choice([0.3, OWED_S]))

    async def _close_alone(self, node: Node, peer: str, channel: Channel) -> None:
        """As if its peer had had its time; it tells the peer next."""
        for id in sorted(channel.open):
            node.ledger.settle(peer, id, None, NOTHING_CAME, 1)
        node.ledger.closer.close_alone(peer)

    async def _close(self, node: Node, peer: str, channel: Channel) -> None:
        await self._tell(node, peer, _closing(node, peer, channel), times=node.random.choice([1, 2]))

    async def _close_otherwise(self, node: Node, peer: str, channel: Channel) -> None:
        """With an old voucher, or with what is not so, which its peer puts right and signs."""
        right, dice = _closing(node, peer, channel), node.random
        own, theirs = right.of(node.name), right.of(peer)
        lies: list[Callable[[], Closing]] = [
            lambda: _with(right, node.name, dice.choice(self.states[peer])),
            lambda: _with(right, node.name, changed(own, number=own.number + dice.choice([1, 10**9]), head="0" * 64)),
            lambda: _with(right, node.name, changed(own, total=max(0, own.total - 1))),
            lambda: _with(right, peer, changed(theirs, number=theirs.number + 1, total=theirs.total + 1)),
            lambda: _with(right, peer, changed(theirs, number=max(0, theirs.number - 1))),
            lambda: changed(right, number=max(0, right.number + dice.choice([-1, 1]))),
            lambda: changed(right, refills=right.refills + 1),
        ]
        await self._tell(node, peer, dice.choice(lies)())

    async def _open_otherwise(self, node: Node, peer: str, channel: Channel) -> None:
        """What is open already, or was closed alone, or with other chains than it was closed with."""
        right = _closing(node, peer, channel)
        await self._tell(node, peer, changed(right, open=True), times=node.random.choice([1, 2]))

    async def _sign_what_was_kept(self, node: Node, peer: str, channel: Channel) -> None:
        """What a peer proposed once, or put right, and that its peer may have forgotten since."""
        kept = [close for name, close in self.kept if name == peer and close.ended.signature(peer, node.name)]
        if kept:
            close = node.random.choice(kept)
            await self._tell(node, peer, close.ended.closing, theirs=close.ended.signature(peer, node.name))

    async def _refill(self, node: Node, peer: str, channel: Channel) -> None:
        """What is due, what was there before, or what nobody agreed to."""
        dice, (a, b) = node.random, channel.granted
        made_up = Refill(channel.digest, len(channel.refills) + dice.randint(1, 2), a + 10**6, b, "world")
        refill = dice.choice(
            [node.ledger.refills.next(peer) or made_up, made_up, *(each.refill for each in channel.refills)]
        )
        for _ in range(dice.choice([1, 2])):
            await tell(node, peer, Refilling(refill, sign(node.identity, "refill", refill)))

    async def _again_and_again(self, node: Node, peer: str, channel: Channel) -> None:
        """Close and open, so that each writes an entry."""
        for _ in range(node.random.choice([1, 3, 50])):
            closing = _closing(node, peer, channel)
            closing = changed(closing, number=closing.number + channel.is_closed * (not channel.is_agreed))
            closing = changed(closing, open=channel.is_closed)
            await self._tell(node, peer, closing, heard=True)

    async def _tell(
        self, node: Node, peer: str, closing: Closing, *, times: int = 1, theirs: str = "", heard: bool = False
    ) -> None:  # fmt: skip
        """Sign a closing and send it; what is answered may be forgotten, unless it is to be `heard`."""
        signatures = sign(node.identity, "closing", closing), theirs
        end = Close(Ended(closing, *(signatures if node.name < peer else signatures[::-1])))
        for _ in range(times):
            answer = await tell(node, peer, end)
            self._keep(peer, answer)
            if heard or node.random.random() < 0.5:
                await node.ledger.replied(peer, answer)

    def _keep(self, peer: str, body: bytes) -> None:
        if body.startswith(b'{"type":"close"'):
            with contextlib.suppress(msgspec.DecodeError):
                self.kept = [*self.kept[1 - KEPT :], (peer, msgspec.json.decode(body, type=Close))]


changed = msgspec.structs.replace


def _if_it_can(act: Callable[..., int | None]) -> Callable[..., int]:
    """It, or nothing for a request that is not in the books any more."""

    def tried(*given: Any) -> int:
        with contextlib.suppress(LedgerError, KeyError):
            return act(*given) or 0
        return 0

    return tried


def _closing(node: Node, peer: str, channel: Channel) -> Closing:
    """The right one."""
    return node.ledger.closer._closing(peer, channel, channel.paid(peer, node.name))


def _with(closing: Closing, payer: str, state: State) -> Closing:
    """It with another state of one chain."""
    return changed(closing, a=state) if closing.a.payer == payer else changed(closing, b=state)
