"""Engines that are quick to start, for tests of what nodes do with answers."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from wwwserve.eval.live import duels

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
        answer = {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": " ".join(words)}}],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(words)},
        }
        if "prompt_logprobs" in asked:
            known = -0.5 if asked["messages"][0]["content"] else -3.0  # which a question makes likelier
            scores = [{"1": {"logprob": -9.0 if word.startswith("zq") else known}} for word in prompt]
            answer |= {"prompt_logprobs": [None, *scores[1:]]}
        return web.json_response(answer)

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
