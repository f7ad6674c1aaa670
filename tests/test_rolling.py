"""Five nodes are restarted one after the other under load, and no user sees an error."""

import asyncio
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import openai

from wwwserve.serving import local_nodes
from wwwserve.serving.local_nodes import Accounts, Network, emulator, free_ports, look, sees

MODEL, NODES, TOKENS = "qwen3-8b", 5, 60
QUESTION: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": "Count for me."}], "max_tokens": TOKENS,
    "extra_body": {"ignore_eos": True},
}  # fmt: skip
RETRIES = 8  # of the client; 0.5 s, 1, 2, 4, 8, 8, 8, 8 at most, or as a node says in Retry-After


class FirstThatAnswers(httpx.AsyncBaseTransport):
    """As a load balancer does it: whoever takes no connection, breaks one off before its answer, or says 503 is left
    out, and the next one asked."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = [httpx.URL(each) for each in urls]
        self.inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        for url in self.urls:
            asked = httpx.Request(
                request.method, request.url.copy_with(host=url.host, port=url.port), headers=request.headers,
                content=body, extensions=request.extensions,
            )  # fmt: skip
            try:
                response = await self.inner.handle_async_request(asked)
            except httpx.TransportError:
                continue
            if response.status_code != 503:
                return response
            await response.aclose()
        raise httpx.ConnectError("no node answers")

    async def aclose(self) -> None:
        await self.inner.aclose()


class Users:
    """Who ask one request after the other, and what they see."""

    def __init__(self) -> None:
        self.stop = False
        self.seen: Counter[str] = Counter()
        self.errors: list[str] = []

    async def ask(self, who: str, client: openai.AsyncOpenAI, stream: bool) -> None:
        """Until told to stop."""
        while not self.stop:
            began_s = time.monotonic()
            try:
                await (self._stream(client) if stream else self._whole(client))
                self.seen[who] += 1
            except (openai.APIError, httpx.HTTPError, AssertionError) as error:
                self.errors.append(f"{who} after {time.monotonic() - began_s:.1f} s: {error!r}")
            await asyncio.sleep(0.05)

    async def _stream(self, client: openai.AsyncOpenAI) -> None:
        tokens, reasons = [], []  # a busy engine puts several tokens into one event
        told = {"include_usage": True}
        async for event in await client.chat.completions.create(**QUESTION, stream=True, stream_options=told):
            tokens += [event.usage.completion_tokens] if event.usage else []
            reasons += [choice.finish_reason for choice in event.choices if choice.finish_reason]
        assert (tokens, reasons) == ([TOKENS], ["length"]), (tokens, reasons)

    async def _whole(self, client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(**QUESTION)
        assert answer.usage.completion_tokens == TOKENS and answer.choices[0].finish_reason == "length"


@asynccontextmanager
async def asking(urls: list[str]) -> AsyncIterator[Users]:
    """Users of each node alone, and of all of them, with streams and without."""
    users, clients, tasks = Users(), [], []
    for k, url in enumerate(urls):
        alone = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=RETRIES)
        several = httpx.AsyncClient(transport=FirstThatAnswers(urls[k:] + urls[:k]))
        any_ = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", http_client=several)
        clients += [alone, any_]
        for name, client in (("one address", alone), ("several addresses", any_)):
            tasks += [
                asyncio.create_task(users.ask(f"{name}, {'stream' if stream else 'whole'}", client, stream))
                for stream in (True, False)
            ]
    try:
        yield users
    finally:
        users.stop = True
        await asyncio.gather(*tasks)
        for client in clients:
            await client.close()


async def until(what: Callable[[], bool], for_s: float) -> None:
    end_s = time.monotonic() + for_s
    while not await asyncio.to_thread(what):
        assert time.monotonic() < end_s, f"not within {for_s} s"
        await asyncio.sleep(0.05)


def configured() -> tuple[list[dict[str, Any]], list[local_nodes.Command]]:
    """Nodes whose first two engines are too small for their users, and their engines."""
    free = free_ports(2 * NODES)
    engines, ports = free[:NODES], free[NODES:]
    room = [2, 2, 16, 16, 16]
    nodes = [
        {
            "name": f"n{k}", "port": ports[k], "policy": "earliest_finish", "serves": [MODEL], "resume": True,
            "engine": {
                "url": f"http://127.0.0.1:{engines[k]}",
                "profile": {"kind": "catalogue", "gpu": "rtx-4090", "model": MODEL, "max_num_seqs": room[k]},
            },
            "limits": {"drain_s": 20.0},
        } for k in range(NODES)
    ]  # fmt: skip
    return nodes, [emulator(engines[k], max_num_seqs=room[k]) for k in range(NODES)]


@asynccontextmanager
async def ended(processes: list[subprocess.Popen[bytes]]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for each in processes:
            each.terminate()
        for each in processes:
            await asyncio.to_thread(each.wait, 30)


async def restart_all(network: Network, log: IO[bytes]) -> tuple[Users, int]:
    """Restart every node while users ask; returns what they saw, and how many requests peers had."""
    running, again = list(network.nodes), []
    async with ended(again), asking(network.urls) as users:
        await until(lambda: len(users.seen) == 4, 60)
        for k, files in enumerate(network.files):
            os.killpg(running[k].pid, signal.SIGTERM)
            await until(lambda process=running[k]: process.poll() is not None, 30)
            assert running[k].returncode == 0
            command = files.command()
            running[k] = subprocess.Popen(
                command.argv, stdout=log, stderr=log, env=command.environment, start_new_session=True
            )
            again.append(running[k])
            for url, key in zip(network.urls, network.keys, strict=True):
                await until(lambda url=url, key=key: sees(url, NODES - 1, key), 60)
        counts = [look(url)["requests"] for url in network.urls]
        await asyncio.sleep(1.0)
        users.stop = True
    return users, sum(int(each["handed_over"]) for each in counts)


def test_no_user_sees_an_error_while_five_nodes_are_restarted(tmp_path: Path) -> None:
    nodes, engines = configured()
    with (
        local_nodes.started(nodes, engines, accounts=Accounts(100.0, 1.0, 10.0)) as network,
        (tmp_path / "nodes.log").open("ab") as log,
    ):
        users, handed = asyncio.run(restart_all(network, log))
    assert not users.errors, "\n".join(users.errors)
    assert len(users.seen) == 4 and min(users.seen.values()) >= 2 * NODES and handed > 0
