"""The pages of a node for its operator: health, metrics, what it sees of the network, and the console."""

import orjson

from wwwserve.serving.console.app import Console
from wwwserve.serving.console.history import History
from wwwserve.serving.console.node import NodeSource
from wwwserve.serving.dispatcher import Dispatcher
from wwwserve.serving.http.asgi import Receive, Scope, Send, answer, check_host, check_key, expect, fail
from wwwserve.serving.http.drain import Drain
from wwwserve.serving.http.reply import Failed
from wwwserve.serving.overview import overview

PAGES = HEALTH, LIVE, METRICS, NETWORK = ("/health", "/health/live", "/metrics", "/network")
FOR_ALL = (HEALTH, LIVE)


class Pages:
    """Those of one node."""

    def __init__(self, dispatcher: Dispatcher, drain: Drain) -> None:
        self.dispatcher, self.drain, self.history = dispatcher, drain, History(dispatcher)
        self.console = Console(NodeSource(dispatcher, self.history, drain))

    def has(self, path: str) -> bool:
        """Whether there is a page at a path."""
        return path in PAGES or self.console.has(path)

    async def show(self, scope: Scope, receive: Receive, send: Send, is_here: bool, keyed: bool = False) -> None:
        """Answer a GET of a page, for who is on this machine or may look anyway. Others get to know whether the node is
        well, or there at all, and Failed is raised for all else. Where no key was asked for (`keyed`), it has to be
        asked for at an address: a name could be that of another site, which a browser on this machine is made to take
        for this one."""
        path = scope["path"]
        if path == HEALTH:
            await answer(send, *self._health(is_here))
            return
        if path == LIVE:  # whoever starts a node anew that does not answer is not to do so for its engine
            await answer(send, 200, orjson.dumps({"status": "ok"}))
            return
        if not is_here:
            raise Failed(403, "this is shown on the node's own machine alone, unless it has `admin`", "forbidden")
        if not keyed:
            check_host(dict(scope["headers"]).get(b"host", b""))
        if path in PAGES:
            await answer(send, *(self._metrics() if path == METRICS else self._network()))
        else:
            await self.console(scope, receive, send)

    def _health(self, is_here: bool) -> tuple[int, bytes, bytes]:
        up, ends = self.dispatcher.engine.healthy, self.drain.begun
        said = "this node is shutting down" if ends else "ok" if up else "the engine is down"
        status = {"status": said} | ({"reason": self.dispatcher.engine.reason} if is_here else {})
        return 200 if up and not ends else 503, orjson.dumps(status), b"application/json"

    def _metrics(self) -> tuple[int, bytes, bytes]:
        d = self.dispatcher
        ledger = d.accounts.ledger if d.accounts is not None else None
        known = {*d.provider.names, *(each.key for each in d.config.peers)}
        channels = ledger.books.channels if ledger is not None else {}
        page = d.metrics.page(
            held=d.provider.held, engine_up=d.engine.healthy, engines=d.engine.each(),
            peers=len(d.peers), peers_known=len(known),
            balances=ledger.balances() if ledger is not None else [],
            disputed={peer: each.short + each.over for peer, each in channels.items()},
            ledger_full=ledger is not None and bool(ledger.full),
            tariff=d.provider.tariff, markup=d.provider.markup, margin=d.provider.margin,
            unspoken=len(d.membership.unspoken()),
        )  # fmt: skip
        return 200, page, b"text/plain; version=0.0.4; charset=utf-8"

    def _network(self) -> tuple[int, bytes, bytes]:
        return 200, orjson.dumps(overview(self.dispatcher), option=orjson.OPT_SERIALIZE_NUMPY), b"application/json"


class Admin:
    """The ASGI application of the operator's own listener."""

    def __init__(self, pages: Pages, key: str | None) -> None:
        self.pages, self.keys = pages, [key.encode()] if key is not None else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        try:
            expect(scope["method"], "GET", "HEAD")
            if not self.pages.console.is_file(scope["path"]):  # the page itself asks for the key
                check_key(dict(scope["headers"]), self.keys)
            if not self.pages.has(scope["path"]):
                raise Failed(404, f"there is no {scope['path']}", "not_found_error")
            await self.pages.show(scope, receive, send, is_here=True, keyed=bool(self.keys))
        except Failed as failed:
            await fail(send, failed)
