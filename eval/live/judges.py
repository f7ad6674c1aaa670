"""How often a judge errs on pairs of answers of known quality, on real vLLM: `wwwserve judges --json FILE`.

SmolLM2 answers questions, and so does a model of random weights; SmolLM2 then judges pairs of an answer of its own and
a worse one: of the random model, to another question, or with its words in random order. Each pair is shown once as
(good, bad) and once as (bad, good). Compared are the likelihood of an answer given the question, the same less that of
the answer to no question, and the model's own word on which is better.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import aiohttp
import numpy as np
import orjson

from wwwserve.agents.arguments import Count, File, Range, UsageError, parse_args, refuse
from wwwserve.agents.protocol import VOTE_A, VOTE_B, VOTE_UNDECIDED
from wwwserve.eval.compare import write_json
from wwwserve.serving.duel.judge import JudgeError, Post, gain, likelihood, vote_by
from wwwserve.serving.engine.local_vllm import RANDOM, SMOLLM2, PrepareError
from wwwserve.serving.local_nodes import NetworkError, vllm

PROG = "wwwserve judges"
CHAT = "/v1/chat/completions"
AT_ONCE = 8  # requests in an engine
THINGS = (
    "a bridge", "the moon", "a violin", "bread", "a volcano", "democracy", "a bicycle", "the heart", "gravity",
    "a library", "coffee", "a glacier", "photosynthesis", "chess", "a lighthouse", "the internet", "salt", "a desert",
    "vaccination", "a telescope",
)  # fmt: skip
FRAMES = (
    "What is {}?", "Write two sentences about {}.", "Why does {} matter to people?",
    "Explain {} to a child of ten years.", "Name one surprising fact about {}.",
    "How would you describe {} to a friend?",
)  # fmt: skip
BALLOT = (
    "Question: {question}\n\nAnswer A: {a}\n\nAnswer B: {b}\n\nWhich answer to the question is better? "
    "Reply with one letter, A or B."
)

Judge = Callable[[Post, dict[str, Any], str, str], Awaitable[int]]


def question(number: int, tokens: int) -> dict[str, Any]:
    """One of 120 questions, as it is asked."""
    said = FRAMES[number // len(THINGS) % len(FRAMES)].format(THINGS[number % len(THINGS)])
    return {"model": SMOLLM2, "messages": [{"role": "user", "content": said}], "max_tokens": tokens, "seed": number}


async def by_likelihood(post: Post, asked: dict[str, Any], a: str, b: str) -> int:
    """By the likelihood of an answer to the question."""
    one, other = await likelihood(post, CHAT, asked, (a, b))
    return VOTE_UNDECIDED if one == other else VOTE_A if one > other else VOTE_B


async def by_gain(post: Post, asked: dict[str, Any], a: str, b: str) -> int:
    """As `serving.duel.judge` has it for the judges of duels."""
    return vote_by(*await gain(post, CHAT, asked, (a, b)))


async def by_asking(post: Post, asked: dict[str, Any], a: str, b: str) -> int:
    """By the model's word, a letter."""
    ballot = BALLOT.format(question=asked["messages"][0]["content"], a=a, b=b)
    messages = [{"role": "user", "content": ballot}]
    question = {"model": SMOLLM2, "messages": messages, "max_tokens": 4, "temperature": 0.0}
    answer = await post(CHAT, orjson.dumps(question))
    word = str(answer["choices"][0]["message"]["content"]).strip().upper()
    return {"A": VOTE_A, "B": VOTE_B}.get(word[:1], VOTE_UNDECIDED)


JUDGES: dict[str, Judge] = {"likelihood": by_likelihood, "likelihood_gain": by_gain, "word": by_asking}


def poster(session: aiohttp.ClientSession, url: str) -> Post:
    """Requests to an engine, a few at once, and none of them twice."""
    turn = asyncio.Semaphore(AT_ONCE)
    asked: dict[bytes, asyncio.Task[Any]] = {}

    async def post(path: str, body: bytes) -> Any:
        if path.encode() + body not in asked:
            asked[path.encode() + body] = asyncio.create_task(once(path, body))
        return await asked[path.encode() + body]

    async def once(path: str, body: bytes) -> Any:
        async with turn, session.post(url + path, data=body, headers={"content-type": "application/json"}) as response:
            content = await response.read()
            if response.status != 200:
                raise JudgeError(f"{url}{path} answers {response.status}: {content[:200]!r}")
            return orjson.loads(content)

    return post


async def measure(good_url: str, random_url: str, pairs: int, tokens: int) -> dict[str, Any]:
    """Errors of each judge on each kind of pair."""
    generator = np.random.default_rng(0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)) as session:
        smol, random = poster(session, good_url), poster(session, random_url)

        async def answer(post: Post, number: int) -> str:
            answer = await post(CHAT, orjson.dumps(question(number, tokens)))
            return str(answer["choices"][0]["message"]["content"])

        began_s = time.monotonic()
        good = await asyncio.gather(*(answer(smol, number) for number in range(pairs)))
        bad = await asyncio.gather(*(answer(random, number) for number in range(pairs)))
        answered_s = time.monotonic() - began_s
        worse = {
            "random_weights": bad,
            "other_question": [good[(number + 7) % pairs] for number in range(pairs)],
            "shuffled_words": [" ".join(generator.permutation(text.split())) for text in good],
        }
        result: dict[str, Any] = {"pairs": pairs, "tokens": tokens, "answers_s": round(answered_s, 1), "judges": {}}
        for name, judge in JUDGES.items():
            result["judges"][name] = {}
            for kind, other in worse.items():
                began_s = time.monotonic()

                async def both(number: int, judge: Judge = judge, other: list[str] = other) -> tuple[int, int]:
                    asked, a, b = question(number, tokens), good[number], other[number]
                    return await judge(smol, asked, a, b), await judge(smol, asked, b, a)

                votes = await asyncio.gather(*(both(number) for number in range(pairs)))
                result["judges"][name][kind] = count(votes) | {"s": round(time.monotonic() - began_s, 1)}
        result["examples"] = [[good[n], *(texts[n] for texts in worse.values())] for n in range(3)]
    return result


def count(votes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Of the votes on pairs, first shown as (good, bad), then as (bad, good)."""
    flat = [vote for pair in votes for vote in pair]
    wrong = sum(first == VOTE_B for first, _ in votes) + sum(second == VOTE_A for _, second in votes)
    undecided = flat.count(VOTE_UNDECIDED)
    return {
        "votes": len(flat), "wrong": wrong, "undecided": undecided, "said_a": flat.count(VOTE_A),
        "error_rate": round((wrong + 0.5 * undecided) / len(flat), 4),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'judge':<16} {'worse answer':<16} {'votes':>6} {'wrong':>6} {'undecided':>10} {'error rate':>11}"]
    for name, kinds in result["judges"].items():
        for kind, seen in kinds.items():
            lines.append(
                f"{name:<16} {kind:<16} {seen['votes']:>6} {seen['wrong']:>6} {seen['undecided']:>10} "
                f"{seen['error_rate']:>11.3f}"
            )
    return "\n".join(lines)


@dataclass
class Args:
    """Measure how often a judge errs on pairs of answers of known quality, on real vLLM."""

    pairs: Annotated[int, Range(8)] = 60
    """of each kind, at most 120 differ"""
    tokens: Count = 48
    """of an answer at most"""
    json: File = None
    """write the figures to this file"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        args = parse_args(Args, PROG, argv)
        with vllm([SMOLLM2, RANDOM], name=SMOLLM2) as ((good_url, bad_url), _):
            result = asyncio.run(measure(good_url, bad_url, args.pairs, args.tokens))
        print(table(result))
        if args.json:
            write_json(args.json, result)
    except (UsageError, NetworkError, PrepareError, JudgeError) as error:
        return refuse(PROG, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
