"""What is asked, where the answer goes, and how an attempt at it can end."""

from typing import NamedTuple, Protocol

import orjson

LAST = b"data: [DONE]\n\n"  # event of a stream; with it users hang up, and the answer is whole


class Ask(NamedTuple):
    """What a user asks."""

    path: str
    body: bytes
    model: str
    stream: bool
    klass: int = 0
    prompt_bytes: int = 0
    most: int = 0  # tokens of the answer, as the user limits it; 0 without a limit


class Reply(Protocol):
    """Where an answer goes."""

    started: bool  # something of it is out
    resumable: bool  # if it broke off now, another could go on

    async def start(self, status: int, content_type: str) -> None:
        """Begin an answer."""

    async def pass_on(self, chunk: bytes) -> None:
        """Some of its body."""

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        """All of an answer at once."""


class Failed(Exception):
    """A request that ends without its answer: an HTTP status, and a message for the user."""

    def __init__(self, status: int, message: str, kind: str = "server_error", retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.retry_after_s = status, kind, retry_after_s

    def body(self) -> bytes:
        """It as the OpenAI API tells of errors."""
        return orjson.dumps({"error": {"message": str(self), "type": self.kind, "param": None, "code": self.status}})


class GaveBack(Exception):
    """Whoever had the request did not bring an answer, and another may: the user has seen nothing of one, or it can be
    resumed."""


class Full(GaveBack):
    """It had no room."""
