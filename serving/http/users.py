"""The API for users, OpenAI's: completions, models, and what else the engine has. Bytes are passed through."""

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import orjson

from wwwserve.serving import boundary
from wwwserve.serving.boundary import BoundaryError
from wwwserve.serving.config import NodeConfig
from wwwserve.serving.dispatcher import Dispatcher
from wwwserve.serving.engine.prefix_index import prefix_of
from wwwserve.serving.http.asgi import Receive, Scope, Send, answer, expect, fail
from wwwserve.serving.http.clients import HttpReply, object_in, unless_gone
from wwwserve.serving.http.cors import Cors, with_headers
from wwwserve.serving.http.drain import Drain
from wwwserve.serving.http.handover import choices_in, limit_of, with_keys
from wwwserve.serving.http.limits import KeyCounts, User, Users
from wwwserve.serving.http.passthrough import PASSED, RESPONSES, Passthrough, error_event
from wwwserve.serving.http.places import address_of
from wwwserve.serving.http.quotas import Room
from wwwserve.serving.http.reply import COMPLETIONS, EVENTS, ClientDisconnect, CompletionRequest, Failed
from wwwserve.serving.http.sse import Usage
from wwwserve.serving.http.trace import Trace, trace_of
from wwwserve.serving.tracing import Span, Tracing

access = logging.getLogger("wwwserve.access")

CLASS_HEADER, LOCAL_ONLY = b"x-slo-class", b"x-wwwserve-local-only"
MODELS = "/v1/models"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # before JSON: engines in Python take it, others do not
SMALL = 1 << 16  # bytes of a body that is not counted while its answer is open

Body = Callable[[Receive, dict[bytes, bytes], str], Awaitable[bytes]]


_BY_LENGTH = sorted((*COMPLETIONS, *PASSED, MODELS), key=len, reverse=True)


class Call(NamedTuple):
    """A user's request."""

    scope: Scope
    path: str
    headers: dict[bytes, bytes]
    trace: Trace
    receive: Receive
    address: str


class UserApi:
    """Of one node."""

    def __init__(self, dispatcher: Dispatcher, config: NodeConfig, drain: Drain, body: Body) -> None:
        """`body` receives that of a request. Raises ConfigError for a user's key that is not there."""
        self.dispatcher, self.config, self.drain, self._body = dispatcher, config, drain, body
        self.classes = {name.encode(): k for k, name in enumerate(config.class_names)}
        self.local_only = [each.local_only for each in config.classes.values()] or [False]
        self.cors = Cors(config.cors.origins) if config.cors is not None else None
        self._counting = bool(config.keys) or config.access_log
        self.held = Room(config.limits.held_bytes)
        self.passthrough = Passthrough(dispatcher, config.limits.held)
        counts = KeyCounts(dispatcher.metrics.registry) if config.keys else None
        self.users = Users(config.user_keys, counts, lambda: asyncio.get_running_loop().time())

    @staticmethod
    def has(path: str) -> bool:
        """Whether it is for this path."""
        return path in COMPLETIONS or path in PASSED or path == MODELS or path.startswith(MODELS + "/")

    @staticmethod
    def meant_by(path: str) -> str:
        """The path of this API that another one tells of, as it comes of a base URL with or without `/v1` where it
        should not be, slashes too many, or a path twice; empty for none."""
        plain = "/" + "/".join(part for part in path.split("/") if part)
        return next((each for each in _BY_LENGTH if plain.endswith(each.removeprefix("/v1"))), "")

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. Raises ClientDisconnect."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self.cors is not None:
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await answer(send, 204, b"", headers=self.cors.asked(headers))
                return
            send = with_headers(send, self.cors.granted(headers))
        trace, client = trace_of(headers), scope.get("client")
        if self.dispatcher.tracing is not None:
            trace = self._traced(self.dispatcher.tracing, trace, scope, headers)
        address = address_of(client[0]) if client else ""
        call = Call(scope, scope["path"], headers, trace, receive, address)
        said, begun_s, note = trace.for_user(), asyncio.get_running_loop().time(), dict[str, Any]()
        user, reply, status = None, HttpReply(send, said, self._counting), 500
        try:
            user = self.users.user_of(headers)
            if call.path == MODELS or call.path.startswith(MODELS + "/"):
                expect(scope["method"], "GET", "HEAD")
                await reply.whole(*self._models(call.path[len(MODELS) + 1 :]))
            else:
                expect(scope["method"], "POST")
                with self.drain.work():
                    try:
                        user.enter()
                    finally:
                        said += user.headers()  # which `reply` has
                    try:
                        await self._answer(call, user, reply, note)
                    finally:
                        user.leave()
            status = reply.status
        except ClientDisconnect:
            status = 499  # as nginx has it
            raise
        except Failed as failed:
            status = failed.status
            if not reply.started:
                await fail(send, failed, reply.headers)
            elif reply.kind.startswith(EVENTS):
                said_so = b"data: " + failed.body() + b"\n\n" if call.path in COMPLETIONS else error_event(failed)
                await reply.break_off(said_so)
            # Else the answer stays without its end, and the server breaks the connection off.
        finally:
            if user is not None:
                user.ended(status)
            if trace.span is not None:
                self._end_span(trace.span, user, reply, status, note)
            if self.config.access_log:
                self._log(call, user, reply, status, begun_s, note)

    async def _answer(self, call: Call, user: User, reply: HttpReply, note: dict[str, Any]) -> None:
        """Answer what an engine is asked. Raises Failed."""
        body = (await self._body(call.receive, call.headers, call.address)).removeprefix(BYTE_ORDER_MARK)
        size = len(body) if len(body) > SMALL else 0
        if not self.held.came(call.address, size):
            raise Failed(503, "too many large requests are open", "overloaded", retry_after_s=1)
        usage: Usage | None = None
        prompt, hung_up = 0, False
        try:
            request = object_in(body)
            body = self._by_its_name(request, body)
            note |= {"model": request.get("model"), "stream": request.get("stream") is True, "bytes": len(body)}
            if call.path in PASSED:
                self._check_passed(call.path, request)
                prompt = self.passthrough.prompt(body)
                reply.asked = "local"
                asked = self.passthrough.answer(call.path, body, call.trace, reply)
                usage = await unless_gone(call.scope, asked)
            else:
                completion = self._completion(call, request, body)
                prompt = self.dispatcher.estimate_prompt(completion.prompt_bytes, completion.prompt_ids)
                usage = await unless_gone(call.scope, self.dispatcher.answer(completion, reply))
            await reply.end()
        except ClientDisconnect:
            hung_up = True
            raise
        finally:
            self.held.gone(call.address, size)
            if reply.status == 200 or hung_up:
                given, output = (usage.prompt, usage.output) if usage is not None else (prompt, reply.events)
                note |= {"prompt_tokens": given, "output_tokens": output}
                user.used(given, output)

    def _by_its_name(self, request: dict[str, Any], body: bytes) -> bytes:
        """A request as the engine gets it: with its model, in `request` too, by the name that the engine knows."""
        name = request.get("model")
        if not (isinstance(name, str) and name in self.config.aliases) or name in self.dispatcher.serves:
            return body
        request["model"] = self.config.aliases[name]
        try:
            return orjson.dumps(request)
        except TypeError:  # nested deeper than orjson writes
            return with_keys(body, {"model": request["model"]})

    def _completion(self, call: Call, request: dict[str, Any], body: bytes) -> CompletionRequest:
        model, stream = request.get("model"), request.get("stream", False)
        if not isinstance(model, str):
            raise Failed(400, "model is missing, expected a string", "invalid_request_error")
        self._check_model(model)
        if not isinstance(stream, bool | None):
            raise Failed(400, "stream is not true or false", "invalid_request_error")
        klass = self.classes.get(call.headers.get(CLASS_HEADER, self.config.class_names[0].encode()))
        if klass is None:
            known = ", ".join(self.config.class_names)
            raise Failed(400, f"there is no such x-slo-class here, expected one of {known}", "invalid_request_error")
        try:
            local_only = boundary.flag_of(call.headers.get(LOCAL_ONLY, b""))
        except BoundaryError as error:
            raise Failed(400, f"header {LOCAL_ONLY.decode()}: {error}", "invalid_request_error") from None
        prompt_bytes, prompt_ids = boundary.prompt_size(request)
        return CompletionRequest(
            call.path, body, model, bool(stream), klass, prompt_bytes, prompt_ids, prefix_of(call.path, request),
            limit_of(call.path, request) or 0, choices_in(request),
            local_only or self.local_only[klass] or not _is_shareable(request), call.trace,
        )  # fmt: skip

    def _check_model(self, model: str) -> None:
        if not self.dispatcher.serves:
            raise Failed(503, "the engine has not said yet which models it serves", "overloaded", retry_after_s=1)
        if model not in self.dispatcher.serves:
            raise Failed(404, f"there is no model {model[:200]!r} here", "not_found_error")

    def _check_passed(self, path: str, request: dict[str, Any]) -> None:
        """Raises Failed for what cannot be passed through. Without a model it is for the one that the engine takes."""
        model = request.get("model")
        if not isinstance(model, str | None):
            raise Failed(400, "model is not a string", "invalid_request_error")
        if model is not None:
            self._check_model(model)
        if path == RESPONSES and request.get("background"):
            raise Failed(400, "background is not offered, nothing could fetch its answer here", "invalid_request_error")

    def _models(self, name: str) -> tuple[int, str, bytes]:
        """The list of models, or the one of that name. Raises Failed."""
        serves, described = self.dispatcher.serves, self.dispatcher.engine.described
        names = {each: each for each in serves}
        names |= {alias: each for alias, each in self.config.aliases.items() if each in names and alias not in names}
        models = [
            {"id": each, "object": "model", "created": 0, "owned_by": self.config.name}
            | ({"root": known} if known != each else {}) | described.get(known, {})
            for each, known in names.items() if not name or each == name
        ]  # fmt: skip
        if name and not models:
            self._check_model(name)
        found = models[0] if name else {"object": "list", "data": models}
        return 200, "application/json", orjson.dumps(found)

    def _traced(self, tracing: Tracing, trace: Trace, scope: Scope, headers: dict[bytes, bytes]) -> Trace:
        """A request within its span, if it is one of those that are traced."""
        method, route = scope["method"], scope["path"] if not scope["path"].startswith(MODELS) else MODELS
        method = method if method in ("GET", "HEAD", "POST") else "_OTHER"
        trace = tracing.begin(trace, f"{method} {route}", headers.get(b"traceparent") == trace.parent.encode())
        if trace.span is not None:
            klass = headers.get(CLASS_HEADER, b"").decode("latin-1")
            known = klass if klass in self.config.classes else None
            trace.span.note({"http.request.method": method, "http.route": route, "wwwserve.class": known})
        return trace

    def _end_span(self, span: Span, user: User | None, reply: HttpReply, status: int, note: dict[str, Any]) -> None:
        model = note.get("model")
        span.end(
            sys.exception() or (str(status) if status >= 500 else None),
            {
                "http.response.status_code": status,
                "gen_ai.request.model": model if model in self.dispatcher.serves else None,
                "wwwserve.stream": note.get("stream"),
                "wwwserve.executor": reply.asked,
                "wwwserve.key": user.name if user is not None and self.config.keys else None,
            },
        )

    def _log(
        self, call: Call, user: User | None, reply: HttpReply, status: int, begun_s: float, note: dict[str, Any]
    ) -> None:
        """One line for a request, without what it asked and got."""
        model = note.pop("model", None)
        first_s = round(reply.first_s - begun_s, 4) if reply.first_s is not None else None
        access.info(
            "request",
            extra={
                "method": call.scope["method"], "path": call.path if not call.path.startswith(MODELS) else MODELS,
                "status": status, "key": user.name if user is not None else None, "address": call.address,
                "request_id": call.trace.request_id, "trace": call.trace.parent[3:35],
                "model": model if model in self.dispatcher.serves else None, "executor": reply.asked,
                "took_s": round(asyncio.get_running_loop().time() - begun_s, 4), "first_s": first_s,
                "sent": reply.sent, **note,
            },
        )  # fmt: skip


def _is_shareable(request: dict[str, Any]) -> bool:
    try:
        boundary.check_shareable(request)
    except BoundaryError:
        return False
    return choices_in(request) <= boundary.MOST_CHOICES
