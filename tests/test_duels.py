"""Whole nodes that have their peers' answers judged, before engines that know which words make sense."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from aiohttp import web

from eval import duels
from serving.config import ConfigError, parse

WORDS = ("bread", "is", "baked", "of", "flour", "and", "water")


@asynccontextmanager
async def engine(babbles: bool) -> AsyncIterator[str]:
    """An engine; its URL. It tells what is likely, and answers in words, or in others that mean nothing."""
    numbers = itertools.count()

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(
            text="vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n"
        )

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": duels.SMOLLM2}]})

    async def complete(request: web.Request) -> web.Response:
        asked = await request.json()
        prompt = " ".join(message["content"] for message in asked["messages"]).split()
        number = next(numbers)
        words = [f"zq{number}{k}" for k in range(6)] if babbles else [*WORDS, str(number)]
        told = {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": " ".join(words)}}],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(words)},
        }
        if "prompt_logprobs" in asked:
            scores = [{"1": {"logprob": -9.0 if word.startswith("zq") else -0.5}} for word in prompt]
            told |= {"prompt_logprobs": [None, *scores[1:]]}
        return web.json_response(told)

    app = web.Application()
    app.add_routes([
        web.get("/metrics", metrics), web.get("/v1/models", models), web.post("/v1/chat/completions", complete)
    ])  # fmt: skip
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def test_a_worthless_provider_loses_its_stake_and_nobody_else_does() -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            good, bad = [await stack.enter_async_context(engine(babbles)) for babbles in (False, True)]
            result = await duels.fight(good, bad, most=200)
        assert result["failed"] == 0 and result["worthless"]["stake"] == 0.0
        assert result["verdicts_until_nothing_is_left"] <= 200
        against = result["with_the_worthless"]
        assert against["verdicts"] == against["lost"] >= 3 and against["wrong_votes"] == 0
        assert result["worthless"]["duels_won"] == 0 and result["worthless"]["duels_lost"] >= 3
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


@pytest.mark.parametrize(
    "told", [{"duel_probability": 1.5}, {"duel_probability": -0.1}, {"judges": 0}, {"judges": 65}]
)  # fmt: skip
def test_what_cannot_be_is_refused(told: dict[str, float]) -> None:
    node = {
        "name": "n", "key": "file", "market": told,
        "engine": {"url": "http://127.0.0.1:1", "profile": {"kind": "catalogue", "gpu": "h100", "model": "qwen3-8b"}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=f"market.{next(iter(told))}"):
        parse(node, "node.yaml")
