"""The malicious node: a real one whose process plays an adversary of `eval.live.world`, another in each of its lives.

Those were written for nodes on virtual time. `Played` is what they use of a node, on a real one; what they would have
their engine do to others' requests, `Altered` does to its answers.
"""

import asyncio
import logging
import math
import random
import re
import time
from collections import defaultdict
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

from wwwserve.eval.live.world.adversaries import (
    Adversary,
    Equivocator,
    Forger,
    Freeloader,
    Inflater,
    Liar,
    Replayer,
    Robber,
    Staller,
    Withholder,
)
from wwwserve.eval.live.world.griefer import Griefer, Mixed
from wwwserve.eval.live.world.nodes import Node
from wwwserve.serving.dispatcher import Dispatcher
from wwwserve.serving.http.reply import Reply
from wwwserve.serving.http.routes import App

JUNK_SHARE = 0.2  # of the answers of one that writes junk: each that loses a duel costs it what it staked
STALL_S = 0.02  # of one part of an answer, for each time that it is slower

_CONTENT = re.compile(rb'("content":")([^"]*)(")')
_BILLED = re.compile(rb'"(completion_tokens|total_tokens)":(\d+)')
_TURNED = bytes.maketrans(b"abcdefghijklmnopqrstuvwxyz", b"nopqrstuvwxyzabcdefghijklm")


class Altered(Reply):
    """A reply to a peer, slower, with other text, and with a higher bill."""

    def __init__(self, reply: Reply, server: Any, junk: bool) -> None:
        super().__init__()
        self._reply, self._server, self._junk = reply, server, junk

    async def start(self, status: int, content_type: str) -> None:
        """See `Reply`."""
        self.started = True
        await self._reply.start(status, content_type)

    async def pass_on(self, chunk: bytes) -> None:
        """See `Reply`."""
        await self._stall()
        await self._reply.pass_on(self._other(chunk))

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        """See `Reply`."""
        self.started = True
        await self._stall()
        await self._reply.whole(status, content_type, self._other(body))

    async def _stall(self) -> None:
        if self._server.slowness > 1.0:
            await asyncio.sleep(min(3600.0, STALL_S * (self._server.slowness - 1.0)))

    def _other(self, body: bytes) -> bytes:
        if self._junk:
            body = _CONTENT.sub(lambda found: found[1] + found[2].translate(_TURNED) + found[3], body)
        if self._server.billed > 1.0:
            times = self._server.billed
            body = _BILLED.sub(lambda found: b'"%b":%d' % (found[1], math.ceil(int(found[2]) * times)), body)
        return body


class RealEquivocator(Equivocator):
    """One whose old journals are put back by who starts it, see `nodes.Node.start`."""

    def _restart(self, node: Node) -> None:
        pass


STRATEGIES: dict[str, type[Adversary]] = {
    each.name: each
    for each in (
        Freeloader, Inflater, Staller, Liar, Forger, Replayer, Griefer, Robber, Withholder, Mixed, RealEquivocator,
    )
}  # fmt: skip


class Played:
    """What strategies use of a node."""

    def __init__(self, dispatcher: Dispatcher, app: App, call: Any, seed: int) -> None:
        self.dispatcher, self.row = dispatcher, 0
        accounts = dispatcher.accounts
        assert accounts is not None
        self.ledger, self.identity, self.name = accounts.ledger, accounts.ledger.identity, dispatcher.messages.name
        self.random = random.Random(seed)
        self.server = SimpleNamespace(slowness=1.0, billed=1.0, junk=False, letters=False, places=64, fair=frozenset())
        self.app: Any = lambda scope, receive, send: call(app, scope, receive, send)
        transport = dispatcher.client.transport
        send = transport.request

        @asynccontextmanager
        async def unheard(method: str, url: str, **more: Any) -> Any:
            """As it was sent, to whoever that address is of."""
            peer = next((name for name, each in dispatcher.peers.items() if url.startswith(each.url + "/")), "")
            async with send(method, url, peer=peer, **more) as response:
                yield _Read(response)

        self.host = SimpleNamespace(name="", wall_s=time.time)
        self.world = SimpleNamespace(
            names=[self.name, *dispatcher.provider.names], by_name=_Known(dispatcher), asked_of=defaultdict(frozenset),
            network=SimpleNamespace(transport=lambda _: SimpleNamespace(request=unheard)),
        )  # fmt: skip


class _Read:
    def __init__(self, response: Any) -> None:
        self.read = response.read


class _Known:
    """Peers by name, with the run that their adverts tell."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._of = dispatcher

    def __getitem__(self, name: str) -> Any:
        own = name == self._of.messages.name
        run = self._of.messages.run if own else self._of.peers[name].run if name in self._of.peers else 0
        return SimpleNamespace(name=name, dispatcher=SimpleNamespace(messages=SimpleNamespace(run=run)))


def play(strategy: str, seed: int) -> None:
    """Have the node that is about to run in this process play a strategy."""
    adversary = STRATEGIES[strategy]()
    apps: list[App] = []
    played: list[Played] = []
    made, call, run = App.__init__, App.__call__, Dispatcher.run

    def make(self: App, *given: Any, **more: Any) -> None:
        made(self, *given, **more)
        apps.append(self)

    async def hear(self: App, scope: Any, receive: Any, send: Any) -> None:
        await (played[0].app(scope, receive, send) if played else call(self, scope, receive, send))

    async def act(node: Played) -> None:
        while True:
            try:
                await adversary.act(cast(Node, node))
            except Exception:  # which an honest node's ledger would not have met
                logging.getLogger("malice").warning("it failed", exc_info=True)
            await asyncio.sleep(1.0)

    async def begin(self: Dispatcher) -> None:
        node = Played(self, apps[0], call, seed)
        adversary.prepare(cast(Node, node))
        answer = self.execution.run_on_one

        async def alter(completion: Any, prompt: int, reply: Reply, *given: Any) -> None:
            junk = node.server.junk and node.random.random() < JUNK_SHARE
            await answer(completion, prompt, Altered(reply, node.server, junk), *given)

        self.execution.run_on_one = alter  # type: ignore[method-assign, assignment]
        adversary.begin(cast(Node, node))
        played.append(node)
        acting = asyncio.create_task(act(node))
        try:
            await run(self)
        finally:
            acting.cancel()

    App.__init__, App.__call__, Dispatcher.run = make, hear, begin  # type: ignore[method-assign]
