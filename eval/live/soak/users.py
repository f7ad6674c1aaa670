"""The users of a soak: they talk several turns with a node, and each of their requests has to end once."""

import asyncio
import random
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import aiohttp
import orjson

from wwwserve.eval.live.soak.nodes import MODEL, Network, Node
from wwwserve.serving.http.sse import LAST_EVENT

ANSWER_S = 90.0
MOST_TURNS = 6
THINK_S = 0.5  # between two turns, in the mean
HANG_UP_SHARE, STREAM_SHARE = 0.1, 0.5
SYSTEM = ["You are patient. " * 40, "You are brief. " * 70, "You are a pirate. " * 20, ""]  # that sessions share
TOLD = 502, 503  # by which a node says that it cannot serve now
WRONG = ("no end", "not one end", "broken off")  # of a request


class Users:
    """All of them."""

    def __init__(self, network: Network, seed: int, rate_per_s: float) -> None:
        """`rate_per_s`: requests/s of all users together, about."""
        self.network, self.rate_per_s = network, rate_per_s
        self.draw = random.Random(seed)
        self.ended: Counter[str] = Counter()  # at honest nodes
        self.at_malicious: Counter[str] = Counter()
        self.asked = self.sessions = self.turns = 0  # `turns`: after the first of a session
        self._talking: set[asyncio.Task[None]] = set()

    async def load(self) -> None:
        """Begin sessions, until cancelled."""
        while True:
            task = asyncio.create_task(self.talk())
            self._talking.add(task)
            task.add_done_callback(self._talking.discard)
            await asyncio.sleep(self.draw.expovariate(self.rate_per_s / (1 + MOST_TURNS) * 2))

    async def end(self) -> None:
        """Until all that was asked has ended."""
        await asyncio.gather(*self._talking, return_exceptions=True)

    async def talk(self) -> None:
        """One session at a node that runs: each turn has all that was said before."""
        running = [node for node in self.network.nodes if node.up]
        if not running:
            return
        self.sessions += 1
        node, messages = self.draw.choice(running), []
        if system := self.draw.choice(SYSTEM):
            messages.append({"role": "system", "content": system})
        for turn in range(self.draw.randint(1, MOST_TURNS)):
            if turn:
                await asyncio.sleep(self.draw.expovariate(1 / THINK_S))
            self.asked += 1
            self.turns += turn > 0
            said = f"Request {self.asked}. " + "And then? " * self.draw.randrange(30)
            messages.append({"role": "user", "content": said})
            answer = await self.request(node, messages)
            if answer is None:
                return
            messages.append({"role": "assistant", "content": answer})

    async def request(self, node: Node, messages: list[dict[str, str]]) -> str | None:
        """One request; returns its answer, None if it has none."""
        number, stream, hang_up = self.asked, self.draw.random() < STREAM_SHARE, self.draw.random() < HANG_UP_SHARE
        body = {"model": MODEL, "stream": stream, "max_tokens": self.draw.randrange(20, 300), "messages": messages}
        life, ready, read, status, why = node.lives, node.ready, b"", 0, ""
        try:
            timeout = aiohttp.ClientTimeout(total=self.draw.uniform(0.05, 0.5) if hang_up else ANSWER_S)
            asked = self.network.session.post(node.url + "/v1/chat/completions", json=body, timeout=timeout)
            async with asked as response:
                status = response.status
                read = await response.read()
            outcome = self._outcome(status, stream, read)
        except TimeoutError:
            outcome = "hung up" if hang_up else "no end"
        except (aiohttp.ClientError, OSError) as error:
            await asyncio.sleep(0.1)  # a kill is noticed here before it is there
            alive = node.lives == life and node.up and ready and node.ready
            outcome, why = "broken off" if alive else "node down", repr(error)
        if node.honest and outcome in WRONG:
            end = read[-200:].decode(errors="replace")
            if node.frozen is not None:
                at_s, frozen = node.frozen
                why += f" ({'frozen' if frozen else 'thawed'} {time.monotonic() - at_s:.1f} s before)"
            self.network.problems.append(
                f"request {number} at {node.name} ({status}, stream {stream}): {outcome} {why} {end}"
            )
        (self.ended if node.honest else self.at_malicious)[outcome] += 1
        return _text(stream, read) if outcome == "answered" else None

    def _outcome(self, status: int, stream: bool, body: bytes) -> str:
        if status != 200:
            return "refused" if status in TOLD else "not one end"
        if not stream:
            return "answered" if body.startswith(b"{") and body.count(b'"usage"') == 1 else "not one end"
        ends, errors = body.count(LAST_EVENT), body.count(b'data: {"error"')
        if ends == 1 and errors == 0 and body.endswith(LAST_EVENT):
            return "answered"
        return "ended with an error" if errors == 1 and ends == 0 else "not one end"


def _text(stream: bool, body: bytes) -> str:
    """What an answer says."""
    said: list[str] = []
    lines = [line[6:] for line in body.splitlines() if line.startswith(b"data: {")] if stream else [body]
    for line in lines:
        with suppress(ValueError, KeyError, IndexError, TypeError):
            choice: dict[str, Any] = orjson.loads(line)["choices"][0]
            said.append((choice.get("delta") or choice.get("message") or {}).get("content") or "")
    return "".join(said)
