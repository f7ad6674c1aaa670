"""Cross-origin requests: pages in browsers that may ask a node's API for users, where its operator wants that."""

from collections.abc import Mapping, Sequence

from wwwserve.serving.http.asgi import Message, Send

ALL = b"*"
_METHODS = b"GET, HEAD, POST, OPTIONS"
_HEADERS = (
    b"authorization, content-type, content-encoding, x-request-id, x-slo-class, x-wwwserve-local-only, traceparent"
)
_SHOWN = b"x-request-id, traceparent, retry-after, " + b", ".join(
    b"x-ratelimit-%b-%b" % (what, of) for what in (b"limit", b"remaining", b"reset") for of in (b"requests", b"tokens")
)
PREFLIGHT_S = 600  # for which a browser remembers what it may ask

Headers = list[tuple[bytes, bytes]]


class Cors:
    """Of one node."""

    def __init__(self, origins: Sequence[str]) -> None:
        self.origins = frozenset(each.encode() for each in origins)

    def granted(self, headers: Mapping[bytes, bytes]) -> Headers:
        """What is said to a browser with an answer: nothing if its page may not read it."""
        origin = headers.get(b"origin", b"")
        if not origin or not (ALL in self.origins or origin in self.origins):
            return [(b"vary", b"origin")] if ALL not in self.origins else []
        said = ALL if ALL in self.origins else origin
        return [
            (b"access-control-allow-origin", said), (b"access-control-expose-headers", _SHOWN), (b"vary", b"origin")
        ]  # fmt: skip

    def asked(self, headers: Mapping[bytes, bytes]) -> Headers:
        """What is said to a browser that asks first."""
        granted = self.granted(headers)
        if len(granted) <= 1:
            return granted
        return [
            *granted, (b"access-control-allow-methods", _METHODS), (b"access-control-allow-headers", _HEADERS),
            (b"access-control-max-age", b"%d" % PREFLIGHT_S),
        ]  # fmt: skip


def with_headers(send: Send, headers: Headers) -> Send:
    """`send`, with headers on each answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *headers]
        await send(message)

    return sending
