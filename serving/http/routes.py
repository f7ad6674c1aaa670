"""What a node answers: its users, peers, and pages to look at. Plain ASGI, bytes passed through."""

import asyncio
import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from wwwserve.serving import boundary
from wwwserve.serving.boundary import BoundaryError
from wwwserve.serving.config import NodeConfig
from wwwserve.serving.delegation import PEER_PREFIX, PROMPT, REFUSED, TARIFF, TPOT, TTFT
from wwwserve.serving.dispatcher import Dispatcher, RemoteRequest
from wwwserve.serving.duel.messages import ATTEST_PATH, COMMITMENT, JUDGE_PATH, JUDGED_IN, JUDGED_TOKENS, Declined
from wwwserve.serving.engine.prefix_index import prefix_of
from wwwserve.serving.http.addresses import is_loopback
from wwwserve.serving.http.asgi import Receive, Scope, Send, answer, expect, fail
from wwwserve.serving.http.clients import HttpReply, object_in, receive_body, unless_gone
from wwwserve.serving.http.connection import CONNECTION, Connection
from wwwserve.serving.http.drain import Drain
from wwwserve.serving.http.handover import caps, choices_in, limit_in_force, tells_usage
from wwwserve.serving.http.keys import NAME_CHARS
from wwwserve.serving.http.messages import SIGNATURE, Claim, Refusals, Refused
from wwwserve.serving.http.pages import FOR_ALL, Pages
from wwwserve.serving.http.places import address_of
from wwwserve.serving.http.quotas import Quotas
from wwwserve.serving.http.reply import COMPLETIONS, ClientDisconnect, CompletionRequest, Failed
from wwwserve.serving.http.sse import MOST_BYTES_PER_TOKEN
from wwwserve.serving.http.trace import trace_of_peer
from wwwserve.serving.http.users import UserApi
from wwwserve.serving.ledger.accounts import ESCROW, LEDGER_PATH, Delivery
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.journal import Full
from wwwserve.serving.ledger.statements import StatementError
from wwwserve.serving.ledger.verdicts import committed
from wwwserve.serving.market import MOST_TOKENS, Tariff
from wwwserve.serving.membership.heartbeat import BEAT_PATH, MOST_BYTES

log = logging.getLogger("wwwserve.app")

PEERS = PEER_PREFIX + "/"
MOST_STATED = 2 << 20  # bytes of a message about payment or stake of who was granted nothing

_STATED = re.compile(rb'signature\\?"')  # a field in a statement, or in one that is in a string


class App:
    """The ASGI application of one node."""

    def __init__(self, dispatcher: Dispatcher, config: NodeConfig, refusals: Refusals) -> None:
        self.dispatcher, self.config, self.refusals = dispatcher, config, refusals
        self.quotas = Quotas(
            config.limits.peer_messages_per_s, config.limits.receiving_bytes, lambda: asyncio.get_running_loop().time()
        )
        self.drain = Drain()
        self.pages = Pages(dispatcher, self.drain)
        self.users = UserApi(dispatcher, config, self.drain, partial(self._receive, encodings=True))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            raise ValueError(f"scope is of type {scope['type']}, expected http")
        path, method = scope["path"], scope["method"]
        try:
            await (self.quotas.peers if path.startswith(PEERS) else self.quotas.users).take()
            if self.users.has(path):
                await self.users.handle(scope, receive, send)
                return
            headers: dict[bytes, bytes] = dict(scope["headers"])
            if path == BEAT_PATH:
                expect(method, "POST")
                await self._beat(scope, receive, send)
            elif path.startswith(PEER_PREFIX) and path[len(PEER_PREFIX) :] in COMPLETIONS:
                expect(method, "POST")
                await self._complete_for_peer(scope, headers, receive, send)
            elif path in (ATTEST_PATH, JUDGE_PATH):
                expect(method, "POST")
                await self._on_duel(scope, headers, receive, send)
            elif path == LEDGER_PATH:
                expect(method, "POST")
                await self._on_ledger(scope, headers, receive, send)
            elif path in FOR_ALL or (self.config.admin is None and self.pages.has(path)):
                expect(method, "GET", "HEAD")
                await self.pages.show(scope, receive, send, is_here=_is_here(scope))
            else:
                meant = self.users.meant_by(path)
                hint = f", expected {meant}" if meant else ""
                raise Failed(404, f"there is no {path[:200]} here{hint}", "not_found_error")
        except ClientDisconnect:
            pass
        except Failed as failed:
            await fail(send, failed)
        except Refused as refused:
            self.refusals(refused)
            status, again_s = (429, 1) if refused.kind == "crowded" else (403, None)
            await fail(send, Failed(status, str(refused), refused.kind, again_s))
        except Exception:  # the user sees no more of it than that it happened
            log.exception("a request met an error", extra={"path": path})
            await fail(send, Failed(500, "an error inside the node", "internal_error"))

    async def _complete_for_peer(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        """Run a peer's request, or refuse it at once."""
        messages, path = self.dispatcher.messages, scope["path"][len(PEER_PREFIX) :]
        claim, body = await self._open(scope, headers, receive)
        try:
            remote, paid = self._take(path, headers, body, claim.sender)
        except Failed as failed:  # signed, as who asked takes what is in escrow back
            seal = [(REFUSED.encode(), b"%d" % failed.status)]
            seal.append((SIGNATURE.encode(), messages.sign_answer(claim, seal)))
            await fail(send, failed, seal)
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
                whole = await unless_gone(scope, self.dispatcher.run_for(remote, reply, paid))
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
        request = object_in(body)
        prompt, tariff = _prompt_and_tariff(headers, request)
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
                cached = self.dispatcher.execution.cached(prefix, prompt)
                promise = self.dispatcher.consider(prompt, cached, longest, tariff)
            if promise is None:
                self.dispatcher.metrics.offer_refused()
                raise Failed(409, "not now", "refused")
            if accounts is not None:
                seems = self.dispatcher.estimate_prompt(*boundary.prompt_size(request))
                paid = accounts.take(sender, id, terms, body, promise, longest, most, seems)
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
            path, body, str(model), bool(request.get("stream")), prefix=prefix, choices=choices,
            trace=trace_of_peer(headers),
        )  # fmt: skip
        secret = secrets.token_hex(32) if self.config.market.duel_probability else ""
        return RemoteRequest(sender, completion, prompt, longest, tariff, promise, added, secret), paid

    async def _on_duel(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        """A peer asks to sign an answer, or to judge two."""
        claim, body = await self._open(scope, headers, receive)
        try:
            if scope["path"] == ATTEST_PATH:
                said = self.dispatcher.attestor.attest(claim.sender, body)
            else:
                with self.drain.work():
                    charge = partial(self._charge, claim.sender, headers, body)
                    said = await unless_gone(scope, self.dispatcher.judge_pool.vote(claim.sender, body, charge))
        except Declined as error:
            raise Failed(409, str(error), "declined") from None
        await answer(send, 200, said)

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
        claim, body = await self._open(scope, headers, receive)
        try:
            said = await accounts.received(claim.sender, body)
        except (LedgerError, StatementError) as error:
            raise Failed(409, str(error), "ledger_error") from None
        except Full:
            raise _not_writable() from None
        await answer(send, 200, said)

    async def _beat(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = _address(scope)
        if self.quotas.forged.left(address) < 1:
            raise Refused("crowded", "too much that was forged came from this address")
        body = await self._receive(receive, {}, address, MOST_BYTES)
        with self._counted(address):
            self._check_certified(scope, body[:NAME_CHARS].decode("latin-1"))
            peer = self.dispatcher.membership.received(body)
        _proved(scope, peer)
        await answer(send, 204, b"")

    async def _open(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> tuple[Claim, bytes]:
        """A peer's message and its body, once both are known to be its own. Raises Refused."""
        address = _address(scope)
        with self._counted(address):
            claim = self.dispatcher.messages.open(
                scope["path"], scope["headers"], lambda sender: self._admit(scope, sender, address)
            )
        self.quotas.signed.spend(claim.sender)
        _proved(scope, claim.sender)
        body = await self._receive(receive, headers, claim.sender, self._most_of(scope["path"], claim.sender))
        claim.check(body)
        if scope["path"] in (LEDGER_PATH, JUDGE_PATH):  # what it states is signed as well
            self.quotas.signed.spend(claim.sender, len(_STATED.findall(body)))
        return claim, body

    def _most_of(self, path: str, peer: str) -> int:
        """Bytes of a message. Who was granted credit here may have to tell all again that this node forgot."""
        most, accounts = self.config.limits.body_bytes, self.dispatcher.accounts
        if path == LEDGER_PATH and accounts is not None and peer not in accounts.ledger.grants:
            return min(most, MOST_STATED)
        return most

    def _admit(self, scope: Scope, peer: str, address: str) -> None:
        """Raises Refused for a message of who is said to be `peer` that is not to be looked at."""
        self._check_certified(scope, peer)
        self.quotas.admit(peer, address)

    def _check_certified(self, scope: Scope, peer: str) -> None:
        if self.config.tls is not None and scope[CONNECTION].certified != peer:
            raise Refused("uncertified", f"its connection is not one of {peer}")

    @contextmanager
    def _counted(self, address: str) -> Iterator[None]:
        """What is forged in it counts for an address."""
        try:
            yield
        except Refused as refused:
            if refused.kind == "forged":
                self.quotas.forged.spend(address)
            raise

    async def _receive(
        self, receive: Receive, headers: dict[bytes, bytes], who: str, limit: int | None = None, encodings: bool = False
    ) -> bytes:  # fmt: skip
        limit = self.config.limits.body_bytes if limit is None else limit
        return await receive_body(receive, headers, who, limit, self.quotas.coming, encodings)


def _proved(scope: Scope, peer: str) -> None:
    """Its connection is a peer's. In a network that is simulated there is none. Raises Refused."""
    connection: Connection | None = scope.get(CONNECTION)
    if connection is not None:
        connection.proved(peer)


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return address_of(client[0]) if client else ""


def _is_here(scope: Scope) -> bool:
    """Whether a client is on this machine."""
    client = scope.get("client")
    return not client or is_loopback(client[0])


def _prompt_and_tariff(headers: dict[bytes, bytes], request: dict[str, Any]) -> tuple[int, Tariff]:
    """Prompt tokens and tariff of a peer's request, which is one that is run for others. Raises Failed."""
    name, (prompt_bytes, prompt_ids) = "", boundary.prompt_size(request)
    try:
        boundary.check_shareable(request)
        if choices_in(request) > boundary.MOST_CHOICES:
            raise BoundaryError(f"it asks for more than {boundary.MOST_CHOICES} answers")
        name = f"header {PROMPT}: "
        least = prompt_ids + prompt_bytes // MOST_BYTES_PER_TOKEN  # fewer would not pay what is computed
        prompt = boundary.prompt_tokens(headers.get(PROMPT.encode(), b""), least)
    except BoundaryError as error:
        raise Failed(400, f"{name}{error}", "invalid_request_error") from None
    return prompt, _tariff(headers)


def _tariff(headers: dict[bytes, bytes]) -> Tariff:
    """The tariff that a peer goes by. Raises Failed."""
    try:
        return boundary.tariff_of(headers.get(TARIFF.encode(), b""))
    except BoundaryError as error:
        raise Failed(400, f"header {TARIFF}: {error}", "invalid_request_error") from None


def _not_writable() -> Failed:
    """Said to peers, whom files here do not concern."""
    return Failed(507, "the ledger cannot be written", "overloaded")
