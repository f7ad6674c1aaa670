"""An origin, executors and judges with identities, statements and stakes as they are, and no network between them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import orjson

from wwwserve.agents.protocol import MICRO, VOTE_A, VOTE_B
from wwwserve.serving.duel.attestor import Attestor
from wwwserve.serving.duel.duels import Attempt, Duels
from wwwserve.serving.duel.judge_pool import JudgePool
from wwwserve.serving.duel.messages import ATTEST_PATH, JUDGE_PATH, Declined, Pair
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.reply import CompletionRequest, Reply
from wwwserve.serving.http.sse import LAST_EVENT
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import digest, sign
from wwwserve.serving.ledger.verdicts import Stake, Staked, Verdict, committed, decode
from wwwserve.serving.metrics import Metrics

PATH = "/v1/chat/completions"
BODY = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "Why?"}], "stream": True})
COMPLETION = CompletionRequest(PATH, BODY, "m", True)
Hand = Callable[[str, Attempt], Awaitable[Any]]


def event(text: str) -> bytes:
    return b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}) + b"\n\n"


def stream(text: str) -> list[bytes]:
    return [*(event(word) for word in text.split()), LAST_EVENT]


class User(Reply):
    """Who asked."""

    def __init__(self) -> None:
        super().__init__()
        self.body = b""

    async def start(self, status: int, content_type: str) -> None:
        self.started = True

    async def pass_on(self, chunk: bytes) -> None:
        self.body += chunk

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        self.started, self.body = True, body


class Node:
    """A peer: it signs what it answered, and judges, by default for the longer answer."""

    def __init__(self) -> None:
        self.identity = Identity.generate()
        self.name = self.identity.name
        self.join(None)
        self.opinion: Callable[[str, str], int] = lambda first, second: VOTE_A if len(first) > len(second) else VOTE_B
        self.signs = True

    def join(self, stakes: Stakes | None) -> None:
        """It knows what all have at stake."""
        self.attestor = Attestor(self.identity, stakes)
        self.judge_pool = JudgePool(self.identity, self.judge, Metrics(), stakes)

    async def judge(self, path: str, request: dict[str, Any], answers: tuple[str, str]) -> int:
        assert (path, request) == (PATH, orjson.loads(BODY))
        return self.opinion(*answers)


class Net:
    """An origin, two executors and some judges, all of one epoch and with 4 credits at stake."""

    def __init__(self, judges: int = 3, panel: int = 3, agreed: bool = True) -> None:
        self.origin, self.good, self.bad = Node(), Node(), Node()
        self.judges = [Node() for _ in range(judges)]
        self.nodes = {node.name: node for node in (self.good, self.bad, *self.judges)}
        self.stakes = Stakes({name: 100 * MICRO for name in (self.origin.name, *self.nodes)}, agreed=agreed)
        for node in (self.origin, *self.nodes.values()):
            self.stakes.heard(staked(node, 1, 4 * MICRO))
            assert self.stakes.stake(node.name) == 4 * MICRO
            node.join(self.stakes)
        self.verdicts: list[Verdict] = []
        self.results: list[tuple[str, bool]] = []
        self.paid: list[tuple[str, bool]] = []
        self.metrics = Metrics()
        self.duels = Duels(self.origin.identity, self, self.metrics, judges=panel, stakes=self.stakes)
        self.answers = {self.good.name: "it is long and good", self.bad.name: "bad"}

    def electors(self, model: str) -> dict[str, int]:
        return {name: self.stakes.stake(name) for name in self.nodes}

    async def request(self, peer: str, path: str, body: bytes) -> bytes:
        node = self.nodes[peer]
        try:
            if path == ATTEST_PATH and node.signs:
                return node.attestor.attest(self.origin.name, body)
            if path == JUDGE_PATH:
                return await node.judge_pool.vote(self.origin.name, body)
        except Declined as refused:
            raise OSError(str(refused)) from None
        raise OSError("no answer")

    async def vote(self, judge: str, pair: Pair) -> bytes:
        return await self.request(judge, JUDGE_PATH, msgspec.json.encode(pair))

    def duelled(self, peer: str, won: bool) -> None:
        self.results.append((peer, won))

    def settle(self, verdict: Verdict) -> None:
        stated = decode(msgspec.json.encode(verdict))  # as whoever hears of it checks it
        assert stated == verdict and self.stakes.heard(stated)
        self.verdicts.append(verdict)

    async def hand(self, name: str, attempt: Attempt) -> str:
        await attempt.start(200, "text/event-stream")
        for chunk in stream(self.answers[name]):
            await asyncio.sleep(0)
            await attempt.pass_on(chunk)
        self.take(name, attempt)
        return name

    def take(self, name: str, attempt: Attempt) -> None:
        """An executor has answered all, which is not paid yet."""
        secret = f"secret of {name} {len(self.paid)} {digest(bytes(attempt.body))}"
        attempt.commitment = committed(secret)
        attempt.owed = lambda signed: self.paid.append((name, signed))
        self.nodes[name].attestor.answered(self.origin.name, digest(BODY), digest(bytes(attempt.body)), secret)

    async def run(self, hand: Hand | None = None, completion: CompletionRequest = COMPLETION) -> User:
        """One duel to its end."""
        user = User()
        await self.duels.run(completion, (self.good.name, self.bad.name), hand or self.hand, user)
        while self.duels.open:
            await asyncio.sleep(0.001)
        return user

    def count(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("wwwserve_duels_total", {"outcome": outcome}) or 0.0

    def stake(self, node: Node) -> int:
        return self.stakes.stake(node.name)


def staked(node: Node, number: int, amount: int) -> Staked:
    stake = Stake(node.name, number, amount)
    return Staked(stake, sign(node.identity, "stake", stake))
