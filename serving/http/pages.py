"""The pages of a node for its operator: health, metrics, what it sees of the network. And how all answers go out."""

import hmac
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

import orjson

from wwwserve.serving.dispatcher import Dispatcher
from wwwserve.serving.http.drain import Drain
from wwwserve.serving.http.reply import Failed
from wwwserve.serving.overview import overview

PAGES = HEALTH, METRICS, NETWORK = ("/health", "/metrics", "/network")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Pages:
    """Those of one node."""

    def __init__(self, dispatcher: Dispatcher, drain: Drain) -> None:
        self.dispatcher, self.drain = dispatcher, drain

    def page(self, path: str, is_here: bool) -> tuple[int, bytes, bytes]:
        """Status, body and type of one of `PAGES`, for who is on this machine or may look anyway. Others get to know
        whether the node is well, and Failed is raised for all else."""
        if path == HEALTH:
            return self._health(is_here)
        if not is_here:
            raise Failed(403, "this is shown on the node's own machine alone, unless it has `admin`", "forbidden")
        return self._metrics() if path == METRICS else self._network()

    def _health(self, is_here: bool) -> tuple[int, bytes, bytes]:
        up, ends = self.dispatcher.engine.healthy, self.drain.begun
        said = "this node is shutting down" if ends else "ok" if up else "the engine is down"
        status = {"status": said} | ({"reason": self.dispatcher.engine.reason} if is_here else {})
        return 200 if up and not ends else 503, orjson.dumps(status), b"application/json"

    def _metrics(self) -> tuple[int, bytes, bytes]:
        d = self.dispatcher
        balances = d.accounts.ledger.balances() if d.accounts is not None else []
        page = d.metrics.page(
            held=d.provider.held, engine_up=d.engine.healthy, peers=len(d.peers), balances=balances,
            ledger_full=d.accounts is not None and bool(d.accounts.ledger.full), tariff=d.provider.tariff,
            markup=d.provider.markup, margin=d.provider.margin,
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
            check_key(dict(scope["headers"]), self.keys)
            if scope["path"] not in PAGES:
                raise Failed(404, f"there is no {scope['path']}", "not_found_error")
            await answer(send, *self.pages.page(scope["path"], is_here=True))
        except Failed as failed:
            await fail(send, failed)


def check_key(headers: dict[bytes, bytes], keys: Sequence[bytes]) -> None:
    """Raises Failed for a request without one of the keys, if there are any."""
    if not keys:
        return
    key = bearer(headers)
    if not any([hmac.compare_digest(key, each) for each in keys]):
        raise Failed(401, "this API key is not known here", "authentication_error")


def bearer(headers: Mapping[bytes, bytes]) -> bytes:
    """The API key that a request shows; empty for none."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip(b" ") if scheme.lower() == b"bearer" else b""


def expect(method: str, *expected: str) -> None:
    """Raises Failed for another method."""
    if method not in expected:
        wanted = " or ".join(expected)
        raise Failed(405, f"method {method} is not allowed, expected {wanted}", "invalid_request_error")


async def fail(send: Send, failed: Failed, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Answer with an error."""
    extra = [each for each in headers if not each[0].startswith(b"retry-after")]  # an engine's, which may be wrong here
    if failed.retry_after_s is not None:
        extra.append((b"retry-after", str(failed.retry_after_s).encode()))
    await answer(send, failed.status, failed.body(), b"application/json", extra)


async def answer(
    send: Send, status: int, body: bytes, kind: bytes = b"application/json",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:  # fmt: skip
    """Answer at once."""
    head = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
