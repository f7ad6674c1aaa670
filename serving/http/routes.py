"""The node's API: OpenAI's for users, the peers' beside it, and pages to look at. Plain ASGI, bytes passed through."""

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import orjson

from wwwserve.agents.protocol import TARIFF_SIZE
from wwwserve.serving.config import NodeConfig
from wwwserve.serving.delegation import PEER_PREFIX, PROMPT, REFUSED, TARIFF, TPOT, TTFT
from wwwserve.serving.dispatcher import Dispatcher, RemoteRequest
from wwwserve.serving.duel.messages import ATTEST_PATH, COMMITMENT, JUDGE_PATH, JUDGED_IN, JUDGED_TOKENS, Declined
from wwwserve.serving.engine.prefix_index import prefix_of
from wwwserve.serving.http.drain import Drain
from wwwserve.serving.http.handover import caps, choices_in, limit_in_force, limit_of, tells_usage
from wwwserve.serving.http.messages import SIGNATURE, Refusals, Refused
from wwwserve.serving.http.reply import COMPLETIONS, ClientDisconnect, CompletionRequest, Failed, Reply
from wwwserve.serving.http.sse import MOST_BYTES_PER_TOKEN
from wwwserve.serving.ledger.accounts import ESCROW, LEDGER_PATH, Delivery
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.journal import Full
from wwwserve.serving.ledger.statements import MOST_PRICE, StatementError
from wwwserve.serving.ledger.verdicts import committed
from wwwserve.serving.market import MOST_TOKENS, Tariff
from wwwserve.serving.membership.heartbeat import BEAT_PATH, MOST_BYTES
from wwwserve.serving.overview import overview

log = logging.getLogger("wwwserve.app")

CLASS_HEADER = b"x-slo-class"
MOST_PROMPT = 1 << 24  # tokens that a peer may say a prompt has

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class HttpReply(Reply):
    """An answer on its way to the client."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self._ended, self._send = False, send

    async def start(self, status: int, content_type: str, *headers: tuple[bytes, bytes]) -> None:
        """See `Reply`."""
        self.started = True
        head = [(b"content-type", content_type.encode("latin-1")), *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": head})

    async def pass_on(self, chunk: bytes) -> None:
        """See `Reply`."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        """See `Reply`."""
        self.started = self._ended = True
        await _answer(self._send, status, body, content_type.encode("latin-1"))

    async def end(self) -> None:
        """All of it is out."""
        if not self._ended:
            self._ended = True
            await self._send({"type": "http.response.body", "body": b""})


class App:
    """The ASGI application of one node."""

    def __init__(self, dispatcher: Dispatcher, config: NodeConfig, refusals: Refusals) -> None:
        self.dispatcher, self.config, self.refusals = dispatcher, config, refusals
        self.drain = Drain()
        self.keys = [key.encode() for key in config.keys]
        self.classes = {name.encode(): k for k, name in enumerate(config.class_names)}
        self.pages: dict[str, Callable[[], tuple[int, bytes, bytes]]] = {
            "/health": self._health, "/metrics": self._metrics, "/network": self._network, "/v1/models": self._models
        }  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            raise ValueError(f"scope is of type {scope['type']}, expected http")
        path, method = scope["path"], scope["method"]
        try:
            headers: dict[bytes, bytes] = dict(scope["headers"])
            if path in COMPLETIONS:
                _expect(method, "POST")
                self._check_key(headers)
                await self._complete(path, headers, receive, send)
            elif path == BEAT_PATH:
                _expect(method, "POST")
                await self._beat(receive, send)
            elif path.startswith(PEER_PREFIX) and path[len(PEER_PREFIX) :] in COMPLETIONS:
                _expect(method, "POST")
                await self._complete_for_peer(scope, headers, receive, send)
            elif path in (ATTEST_PATH, JUDGE_PATH):
                _expect(method, "POST")
                await self._on_duel(scope, headers, receive, send)
            elif path == LEDGER_PATH:
                _expect(method, "POST")
                await self._on_ledger(scope, headers, receive, send)
            elif path in self.pages:
                _expect(method, "GET")
                if path == "/v1/models":
                    self._check_key(headers)
                await _answer(send, *self.pages[path]())
            else:
                raise Failed(404, f"there is no {path}", "not_found_error")
        except ClientDisconnect:
            pass
        except Failed as failed:
            await _fail(send, failed)
        except Refused as refused:
            self.refusals(refused)
            await _fail(send, Failed(403, str(refused), refused.kind))
        except Exception:  # the user sees no more of it than that it happened
            log.exception("a request met an error", extra={"path": path})
            await _fail(send, Failed(500, "an error inside the node", "internal_error"))

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if not self.keys:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not any([hmac.compare_digest(key, each) for each in self.keys]):
            raise Failed(401, "this API key is not known here", "authentication_error")

    # The OpenAI API.

    async def _complete(self, path: str, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        body = await _body(receive, headers, self.config.limits.body_bytes)
        completion = self._asked(path, headers, body)
        reply = HttpReply(send)
        try:
            with self.drain.work():
                await _unless_gone(receive, self.dispatcher.answer(completion, reply))
        except Failed as failed:
            if not reply.started:
                raise
            await reply.pass_on(b"data: " + failed.body() + b"\n\n")
        await reply.end()

    def _asked(self, path: str, headers: dict[bytes, bytes], body: bytes) -> CompletionRequest:
        request = _object(body)
        model, stream = request.get("model"), request.get("stream", False)
        if not isinstance(model, str):
            raise Failed(400, "model is missing, expected a string", "invalid_request_error")
        if not self.dispatcher.serves:
            raise Failed(503, "the engine has not said yet which models it serves", "overloaded", retry_after_s=1)
        if model not in self.dispatcher.serves:
            raise Failed(404, f"there is no model {model!r} here", "not_found_error")
        if not isinstance(stream, bool | None):
            raise Failed(400, "stream is not true or false", "invalid_request_error")
        klass = self.classes.get(headers.get(CLASS_HEADER, self.config.class_names[0].encode()))
        if klass is None:
            known = ", ".join(self.config.class_names)
            raise Failed(400, f"there is no such x-slo-class here, expected one of {known}", "invalid_request_error")
        prompt_bytes, prompt_ids = _prompt_size(request)
        return CompletionRequest(
            path, body, model, bool(stream), klass, prompt_bytes, prompt_ids, prefix_of(path, request),
            limit_of(path, request) or 0, choices_in(request),
        )  # fmt: skip

    async def _complete_for_peer(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        """Run a peer's request, or refuse it at once."""
        messages, path = self.dispatcher.messages, scope["path"][len(PEER_PREFIX) :]
        claim = messages.open(scope["path"], scope["headers"])
        body = await _body(receive, headers, self.config.limits.body_bytes)
        claim.check(body)
        try:
            remote, paid = self._take(path, headers, body, claim.sender)
        except Failed as failed:  # signed, as who asked takes what is in escrow back
            seal = [(REFUSED.encode(), b"%d" % failed.status)]
            seal.append((SIGNATURE.encode(), messages.sign_answer(claim, seal)))
            await _fail(send, failed, seal)
            return
        reply = HttpReply(send)
        head = [(name.encode(), said.encode()) for name, said in zip((TTFT, TPOT), remote.promise.text(), strict=True)]
        if remote.secret:
            head.append((COMMITMENT.encode(), committed(remote.secret).encode()))
        head.append((SIGNATURE.encode(), messages.sign_answer(claim, head)))
        whole = False
        try:
            with suppress(Failed), self.drain.work():
                await reply.start(200, "application/octet-stream", *head)
                whole = await _unless_gone(receive, self.dispatcher.run_for(remote, reply, paid))
        finally:
            if paid is not None:
                paid.close()
        if whole:
            await reply.end()
        # Else the answer stays without its end, and the server breaks the connection off.

    def _take(
        self, path: str, headers: dict[bytes, bytes], body: bytes, sender: str
    ) -> tuple[RemoteRequest, Delivery | None]:
        """Take a peer's request, with a promise. Raises Failed."""
        request = _object(body)
        prompt, tariff = _prompt_tokens(headers, *_prompt_size(request)), _tariff(headers)
        limit, choices, model = limit_in_force(path, request), choices_in(request), request.get("model")
        most = limit * choices if limit is not None else None
        longest = min(most or self.config.output.max * choices, MOST_TOKENS)
        accounts, paid = self.dispatcher.accounts, None
        try:
            if accounts is not None:
                if not tells_usage(request):
                    raise LedgerError("a stream that is paid for is to tell its usage, stream_options.include_usage")
                id, terms = accounts.offered(headers.get(ESCROW.encode(), b""), tariff, prompt, most)
            salt = self.dispatcher.salt_of(sender, request)
            prefix = prefix_of(path, request, salt)
            promise = None
            if model in self.dispatcher.serves and not self.drain.begun:
                promise = self.dispatcher.consider(prompt, self.dispatcher.cached_here(prefix, prompt), longest, tariff)
            if promise is None:
                self.dispatcher.metrics.offer_refused()
                raise Failed(409, "not now", "refused")
            if accounts is not None:
                paid = accounts.take(sender, id, terms, body, promise, longest, most)
        except LedgerError as error:
            self.dispatcher.metrics.offer_refused()
            raise Failed(402, f"it is not taken: {error}", "payment_error") from None
        except Full:
            self.dispatcher.metrics.offer_refused()
            raise _not_writable() from None
        added: dict[str, object] = {**caps(path, request, limit)} if paid is not None else {}
        if salt:
            added["cache_salt"] = salt
        completion = CompletionRequest(
            path, body, str(model), bool(request.get("stream")), prefix=prefix, choices=choices
        )  # fmt: skip
        secret = secrets.token_hex(32) if self.config.market.duel_probability else ""
        return RemoteRequest(sender, completion, prompt, longest, tariff, promise, added, secret), paid

    async def _on_duel(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        """A peer asks to sign an answer, or to judge two."""
        claim = self.dispatcher.messages.open(scope["path"], scope["headers"])
        body = await _body(receive, headers, self.config.limits.body_bytes)
        claim.check(body)
        try:
            if scope["path"] == ATTEST_PATH:
                answer = self.dispatcher.attestor.attest(claim.sender, body)
            else:
                with self.drain.work():
                    charge = partial(self._charge, claim.sender, headers, body)
                    answer = await _unless_gone(receive, self.dispatcher.judge_pool.vote(claim.sender, body, charge))
        except Declined as error:
            raise Failed(409, str(error), "declined") from None
        await _answer(send, 200, answer)

    def _charge(self, sender: str, headers: dict[bytes, bytes], body: bytes, tokens: int) -> Delivery | None:
        """Agree to what a peer pays for a vote; None where nothing is paid. Raises Declined."""
        accounts = self.dispatcher.accounts
        if accounts is None:
            return None
        try:
            id, terms = accounts.offered(headers.get(ESCROW.encode(), b""), _tariff(headers), tokens, JUDGED_TOKENS)
            return accounts.take(sender, id, terms, body, JUDGED_IN, JUDGED_TOKENS, JUDGED_TOKENS)
        except (LedgerError, Full) as error:
            raise Declined(f"judging is not paid: {error}") from None

    async def _on_ledger(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        """A peer tells of payment or stake."""
        accounts = self.dispatcher.accounts
        if accounts is None:
            raise Failed(404, "this node keeps no ledger", "not_found_error")
        claim = self.dispatcher.messages.open(scope["path"], scope["headers"])
        body = await _body(receive, headers, self.config.limits.body_bytes)
        claim.check(body)
        try:
            answer = await accounts.received(claim.sender, body)
        except (LedgerError, StatementError) as error:
            raise Failed(409, str(error), "ledger_error") from None
        except Full:
            raise _not_writable() from None
        await _answer(send, 200, answer)

    async def _beat(self, receive: Receive, send: Send) -> None:
        self.dispatcher.membership.received(await _body(receive, {}, MOST_BYTES))
        await _answer(send, 204, b"")

    # Pages.

    def _health(self) -> tuple[int, bytes, bytes]:
        up, ends = self.dispatcher.engine.healthy, self.drain.begun
        said = "this node is shutting down" if ends else "ok" if up else "the engine is down"
        status = {"status": said, "reason": self.dispatcher.engine.reason}
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

    def _models(self) -> tuple[int, bytes, bytes]:
        models = [
            {"id": name, "object": "model", "created": 0, "owned_by": self.config.name}
            for name in self.dispatcher.serves
        ]
        return 200, orjson.dumps({"object": "list", "data": models}), b"application/json"


def _prompt_tokens(headers: dict[bytes, bytes], prompt_bytes: int, prompt_ids: int) -> int:
    """Tokens of a peer's prompt as it says. Raises Failed for fewer than it can have, as what is computed would not be
    paid."""
    header = headers.get(PROMPT.encode(), b"")
    least = max(1, prompt_ids + prompt_bytes // MOST_BYTES_PER_TOKEN)
    if not (header.isdigit() and len(header) < 10 and least <= int(header) < MOST_PROMPT):
        expected = f"expected a header {PROMPT}, {least} tokens or more"
        raise Failed(400, expected, "invalid_request_error")
    return int(header)


def _tariff(headers: dict[bytes, bytes]) -> Tariff:
    """The tariff that a peer goes by. Raises Failed."""
    prices = headers.get(TARIFF.encode(), b"").split()
    if len(prices) != TARIFF_SIZE or not all(p.isdigit() and len(p) < 11 and int(p) <= MOST_PRICE for p in prices):
        expected = f"expected a header {TARIFF}, {TARIFF_SIZE} prices in micro-credits"
        raise Failed(400, expected, "invalid_request_error")
    given, cached, output = map(int, prices)
    return given, cached, output


def _not_writable() -> Failed:
    """Said to peers, whom files here do not concern."""
    return Failed(507, "the ledger cannot be written", "overloaded")


def _expect(method: str, expected: str) -> None:
    if method != expected:
        raise Failed(405, f"method {method} is not allowed, expected {expected}", "invalid_request_error")


def _object(body: bytes) -> dict[str, Any]:
    try:
        request = orjson.loads(body)
    except ValueError:
        raise Failed(400, "the body is not JSON", "invalid_request_error") from None
    if not isinstance(request, dict):
        raise Failed(400, f"the body is a {type(request).__name__}, expected an object", "invalid_request_error")
    return request


def _prompt_size(request: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the texts that a model reads, as far as they can be seen, and tokens that it is given as such."""
    prompt, messages = request.get("prompt"), request.get("messages")
    if isinstance(prompt, str):
        return len(prompt.encode(errors="replace")), 0
    if isinstance(prompt, list):  # of tokens, or of texts or lists of tokens, each a prompt
        texts = sum(len(each.encode(errors="replace")) for each in prompt if isinstance(each, str))
        return texts, sum(len(each) if isinstance(each, list) else 1 for each in prompt if not isinstance(each, str))
    if not isinstance(messages, list):
        return 0, 0
    size = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        parts: Sequence[Any] = content if isinstance(content, list) else [content]
        for part in parts:
            text = part.get("text") if isinstance(part, dict) else part
            size += len(text.encode(errors="replace")) if isinstance(text, str) else 0
    return size, 0


async def _body(receive: Receive, headers: dict[bytes, bytes], limit: int) -> bytes:
    too_large = Failed(413, f"the body is larger than {limit} bytes", "invalid_request_error")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise too_large
    message = await receive()
    body: bytes = message.get("body", b"")
    parts = [body]
    size = len(body)
    while message.get("more_body", False):
        if size > limit:
            raise too_large
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    if size > limit:
        raise too_large
    return b"".join(parts) if len(parts) > 1 else body


async def _unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up; then raises ClientDisconnect."""
    worker = asyncio.current_task()
    assert worker is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        worker.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if gone and worker.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()


async def _fail(send: Send, failed: Failed, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    extra = [*headers]
    if failed.retry_after_s is not None:
        extra.append((b"retry-after", str(failed.retry_after_s).encode()))
    await _answer(send, failed.status, failed.body(), b"application/json", extra)


async def _answer(
    send: Send, status: int, body: bytes, kind: bytes = b"application/json",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:  # fmt: skip
    head = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
