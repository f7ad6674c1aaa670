"""Who users are, by their API keys, and how much each key may have: requests and tokens in a minute, requests at once.

A key has a bucket for each limit, which fills evenly and holds a minute's worth. A request takes one from the first;
what its prompt and its answer came to is taken from the second when it has ended, which may leave it in debt.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256

from prometheus_client import CollectorRegistry, Counter, Gauge

from wwwserve.serving.config import ConfigError, KeyConfig
from wwwserve.serving.http.asgi import bearer
from wwwserve.serving.http.reply import Failed

MINUTE_S = 60.0


class Bucket:
    """What is left of so much in a minute."""

    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._left, self._at_s = per_minute, clock()

    def left(self) -> float:
        """How much there is now; below 0 in debt."""
        now_s = self._clock()
        self._left = min(self.per_minute, self._left + (now_s - self._at_s) * self.per_minute / MINUTE_S)
        self._at_s = now_s
        return self._left

    def take(self, amount: float) -> None:
        """So much of it is used."""
        self._left = self.left() - amount

    def wait_s(self, amount: float) -> float:
        """Until there is that much."""
        return max(0.0, amount - self.left()) * MINUTE_S / self.per_minute

    def headers(self, of: bytes) -> list[tuple[bytes, bytes]]:
        """As OpenAI's API tells of it."""
        left = self.left()
        reset_s = (self.per_minute - left) * MINUTE_S / self.per_minute
        return [
            (b"x-ratelimit-limit-" + of, b"%d" % self.per_minute),
            (b"x-ratelimit-remaining-" + of, b"%d" % max(0.0, left)),
            (b"x-ratelimit-reset-" + of, b"%.3fs" % reset_s),
        ]


class KeyCounts:
    """Usage by the name of the key."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "wwwserve_key_requests", "Requests by API key and status.", ("key", "status"), registry=registry
        )
        self.tokens = Counter("wwwserve_key_tokens", "Tokens by API key.", ("key", "kind"), registry=registry)
        self.limited = Counter(
            "wwwserve_key_limited",
            "Requests that an API key's limits turned away.",
            ("key", "limit"),
            registry=registry,
        )
        self.open = Gauge(
            "wwwserve_key_requests_open", "Requests that are under way by API key.", ("key",), registry=registry
        )


class User:
    """Who has a key, or everyone where there are none."""

    def __init__(self, config: KeyConfig, clock: Callable[[], float], counts: KeyCounts | None) -> None:
        self.name, self._counts = config.name, counts
        self._requests, self._tokens = (
            Bucket(each, clock) if each is not None else None
            for each in (config.requests_per_minute, config.tokens_per_minute)
        )
        self._concurrent, self._open = config.concurrent, 0

    def enter(self) -> None:
        """A request of it is under way until `leave`. Raises Failed for one that is too much."""
        if self._concurrent is not None and self._open >= self._concurrent:
            raise self._limited("concurrent", f"{self._concurrent} requests of this key are under way", 1.0)
        if self._tokens is not None and self._tokens.left() <= 0.0:
            used = f"this key has used its {self._tokens.per_minute:g} tokens a minute"
            raise self._limited("tokens", used, self._tokens.wait_s(1.0))
        if self._requests is not None:
            if self._requests.left() < 1.0:
                used = f"this key has used its {self._requests.per_minute:g} requests a minute"
                raise self._limited("requests", used, self._requests.wait_s(1.0))
            self._requests.take(1.0)
        self._open += 1
        self._show_open()

    def leave(self) -> None:
        """A request of it has ended."""
        self._open -= 1
        self._show_open()

    def used(self, prompt: int, output: int) -> None:
        """So many tokens."""
        if self._tokens is not None:
            self._tokens.take(prompt + output)
        if self._counts is not None:
            self._counts.tokens.labels(self.name, "prompt").inc(prompt)
            self._counts.tokens.labels(self.name, "output").inc(output)

    def ended(self, status: int) -> None:
        """A request of it was answered."""
        if self._counts is not None:
            self._counts.requests.labels(self.name, status).inc()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What it is told of its limits."""
        found: list[tuple[bytes, bytes]] = []
        if self._requests is not None:
            found += self._requests.headers(b"requests")
        if self._tokens is not None:
            found += self._tokens.headers(b"tokens")
        return found

    def _show_open(self) -> None:
        if self._counts is not None:
            self._counts.open.labels(self.name).set(self._open)

    def _limited(self, limit: str, message: str, wait_s: float) -> Failed:
        if self._counts is not None:
            self._counts.limited.labels(self.name, limit).inc()
        return Failed(429, message, "rate_limit_exceeded", max(1, math.ceil(wait_s)))


class Users:
    """Those of one node."""

    def __init__(self, keys: Sequence[KeyConfig], counts: KeyCounts | None, clock: Callable[[], float]) -> None:
        """Raises ConfigError for a key that is not there, or that two have."""
        self._everyone = User(KeyConfig(name=""), clock, None) if not keys else None
        self._users: dict[bytes, User] = {}
        for each in keys:
            digest = _digest(each.secret().encode())
            if digest in self._users:
                raise ConfigError(f"keys must differ, {self._users[digest].name} and {each.name} are the same key")
            self._users[digest] = User(each, clock, counts)

    def user_of(self, headers: Mapping[bytes, bytes]) -> User:
        """Whose request it is. Raises Failed for a key that is not known."""
        if self._everyone is not None:
            return self._everyone
        key = bearer(headers)
        user = self._users.get(_digest(key))
        if user is None and not key:
            raise Failed(401, "no API key is shown, expected `Authorization: Bearer KEY`", "authentication_error")
        if user is None:
            raise Failed(401, "this API key is not known here", "authentication_error")
        return user


def _digest(key: bytes) -> bytes:
    """By which a key is looked up: how long that takes tells nothing of those that there are."""
    return sha256(key).digest()
