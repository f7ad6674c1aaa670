"""What ASGI applications here share: how they are called, and how they answer."""

import hmac
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from ipaddress import ip_address
from typing import Any

from wwwserve.serving.http.reply import Failed

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Watch = Callable[[Callable[[], None] | None], None]

WATCH = "wwwserve.watch"  # in the scope: a Watch, told what to call once the client hangs up, or hung up already


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


def check_host(host: bytes) -> None:
    """Raises Failed for a request that was not sent to an address, or to this machine by its own name for itself."""
    name = host.decode("latin-1").strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    if name in ("", "localhost"):
        return
    try:
        ip_address(name)
    except ValueError:
        message = f"without `admin.key` this is shown at an address, such as 127.0.0.1, not at {name!r}"
        raise Failed(421, message, "misdirected_request") from None


def expect(method: str, *expected: str) -> None:
    """Raises Failed for another method."""
    if method not in expected:
        wanted = " or ".join(expected)
        message = f"method {method} is not allowed, expected {wanted}"
        raise Failed(405, message, "invalid_request_error", allow=", ".join(expected))


async def fail(send: Send, failed: Failed, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Answer with an error."""
    extra = [each for each in headers if not each[0].startswith(b"retry-after")]  # an engine's, which may be wrong here
    await answer(send, failed.status, failed.body(), b"application/json", [*extra, *failed.headers])


async def answer(
    send: Send, status: int, body: bytes, kind: bytes = b"application/json",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:  # fmt: skip
    """Answer at once."""
    head = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
