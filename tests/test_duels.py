"""Whole nodes that have their peers' answers judged, before engines that know which words make sense."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from engines import engine

from wwwserve.eval.live import duels
from wwwserve.serving.config import ConfigError, parse


def test_a_worthless_provider_loses_its_stake_and_nobody_else_does() -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            good, bad = [await stack.enter_async_context(engine(babbles)) for babbles in (False, True)]
            result = await duels.fight(good, bad, most=400, at_once=2)
        assert result["failed"] == 0 and result["funds_left"] == 0.0
        assert 3 <= result["verdicts_until_nothing_is_left"] <= result["verdicts"]
        against = result["with_the_worthless"]
        assert against["verdicts"] == against["lost"] >= 3 and against["wrong_votes"] == 0
        assert result["worthless"]["duels_won"] == 0 and result["worthless"]["duels_lost"] >= 3

        assert result["votes_paid"] >= against["votes"] and result["paid_for_votes"] > 0

    asyncio.run(run())


@pytest.mark.parametrize(
    "economy", [{"duel_probability": 1.5}, {"duel_probability": -0.1}, {"judges": 0}, {"judges": 65}]
)  # fmt: skip
def test_what_cannot_be_is_refused(economy: dict[str, float]) -> None:
    node = {
        "name": "n", "key": "file", "market": economy,
        "engine": {"url": "http://127.0.0.1:1", "profile": {"kind": "catalogue", "gpu": "h100", "model": "qwen3-8b"}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=f"market.{next(iter(economy))}"):
        parse(node, "node.yaml")
