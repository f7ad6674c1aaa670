"""What went between a node and its peers, as its process saw it and whatever its ledger says of it.

A line of JSON for each: what was delivered to a peer, what came of one, micro-credits at the prices that were agreed
on, and the digest of each request that went to two in a duel. Tokens that came are counted by the text of emulated
engines, four bytes each, not by what the peer bills.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from wwwserve.serving.duel.duels import Duels
from wwwserve.serving.duel.messages import JUDGED_IN, JUDGED_TOKENS
from wwwserve.serving.ledger import accounts
from wwwserve.serving.ledger.accounts import Came
from wwwserve.serving.ledger.channel_ledger import due_of
from wwwserve.serving.ledger.statements import digest
from wwwserve.serving.market import Promise

TOKEN_BYTES = 4
DELIVERED, CAME, DUEL = "delivered", "came", "duel"

_CONTENT = re.compile(rb'"content":"([^"]*)"')


class Seen(NamedTuple):
    """All that a node saw in all of its lives."""

    delivered: Counter[str]  # micro-credits by peer
    came: Counter[str]
    duels: set[str]  # digests of requests


def read(file: Path) -> Seen:
    """What a witness wrote. A line that a kill has cut is left out."""
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    duels = set()
    for line in file.read_bytes().splitlines() if file.exists() else ():
        with suppress(ValueError, TypeError):
            what, who, amount = orjson.loads(line)
            if what == DUEL:
                duels.add(who)
            else:
                sums[what][who] += amount
    return Seen(sums[DELIVERED], sums[CAME], duels)


def text_tokens(body: bytes) -> int:
    """Tokens of the text in the bytes of an answer, streamed or not."""
    return -(-sum(map(len, _CONTENT.findall(body))) // TOKEN_BYTES)


class Witness:
    """Writes to a file as things happen."""

    def __init__(self, file: Path) -> None:
        self._out = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._unsaid: list[bytes] = []  # while there is no space

    def say(self, what: str, who: str, amount: int = 0) -> None:
        """Something happened."""
        self._unsaid.append(orjson.dumps([what, who, amount]) + b"\n")
        with suppress(OSError):
            os.write(self._out, b"".join(self._unsaid))
            self._unsaid.clear()


def watch(file: Path) -> None:
    """Have the node that is about to run in this process seen."""
    witness = Witness(file)

    class Payment(accounts.Payment):
        """See there."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self._came = bytearray()

        def feed(self, chunk: bytes) -> None:
            self._came += chunk
            super().feed(chunk)

        def end(self, promise: Promise | None = None, came: Came | None = None) -> int:
            paid = super().end(promise, came)
            if came is not None:
                tokens = JUDGED_TOKENS if promise == JUDGED_IN else text_tokens(bytes(self._came))
                given, _, output = self.terms.tariff
                witness.say(CAME, self.peer, (given * self.terms.prompt + output * tokens) // 1000)
            return paid

    class Delivery(accounts.Delivery):
        """See there."""

        def end(self, answer: str, came: Came) -> None:
            super().end(answer, came)
            served = came.served(answer, self._terms, self._most)
            due = due_of(self._ledger.payment, self._terms, self._promise, served, self._longest)
            witness.say(DELIVERED, self._peer, due)

    duel = Duels.run

    async def run(self: Duels, completion: Any, *given: Any) -> Any:
        witness.say(DUEL, digest(completion.body))
        return await duel(self, completion, *given)

    accounts.Payment, accounts.Delivery = Payment, Delivery  # type: ignore[misc, assignment]
    Duels.run = run  # type: ignore[method-assign, assignment]


def total(seen: Iterable[Seen]) -> int:
    """Duels that were begun."""
    return sum(len(each.duels) for each in seen)
