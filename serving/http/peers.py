"""The one client to peers: whatever a node sends to another is signed here, and goes where the peer's advert says."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple

from wwwserve.serving.http.messages import SIGNATURE, Messages
from wwwserve.serving.http.transport import Response, Transport
from wwwserve.serving.membership.heartbeat import Advert

MOST_MESSAGE = 64 * 2**20  # bytes of an answer to a message
MOST_REASON = 500  # bytes of a refusal that are kept


class PeerError(OSError):
    """A peer refuses: the HTTP status of its answer, and what it says."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"it answers {status}: {reason}" if reason else f"it answers {status}")
        self.status, self.reason = status, reason


class PeerAnswer(NamedTuple):
    """A peer's answer on its way, and the signature of what was asked, to which its head is bound."""

    response: Response
    sealed: str


class PeerClient:
    """Sends to those of whom there is an advert, by name."""

    def __init__(self, messages: Messages, transport: Transport, adverts: Mapping[str, Advert]) -> None:
        self.messages, self.transport, self.adverts = messages, transport, adverts

    @asynccontextmanager
    async def request(
        self, peer: str, path: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float | None,
        read_timeout_s: float,
    ) -> AsyncIterator[PeerAnswer]:  # fmt: skip
        """A signed request, with `headers` in lower case. Raises OSError and TimeoutError."""
        advert = self.adverts.get(peer)
        if advert is None:
            raise OSError("it is gone")
        sent = {"content-type": "application/json", **headers}
        sealed = sent[SIGNATURE] = self.messages.sign(peer, advert.run, path, sent, body)
        async with self.transport.request(
            "POST",
            advert.url + path,
            body=body,
            headers=sent,
            timeout_s=timeout_s,
            read_timeout_s=read_timeout_s,
            peer=peer,
        ) as response:
            yield PeerAnswer(response, sealed)

    async def post(self, peer: str, path: str, body: bytes, *, timeout_s: float) -> bytes:
        """The whole answer to a signed message. Raises PeerError for a refusal, OSError and TimeoutError."""
        async with self.request(peer, path, body, {}, timeout_s=timeout_s, read_timeout_s=timeout_s) as (response, _):
            if response.status != 200:
                raise await refusal(response)
            return await response.read(MOST_MESSAGE)


async def refusal(response: Response) -> PeerError:
    """What a peer says that does not do as it is asked."""
    try:
        reason = (await response.read(64 * MOST_REASON))[:MOST_REASON].decode(errors="replace")
    except (OSError, TimeoutError):
        reason = ""
    return PeerError(response.status, reason)
