"""Several engines behind one node: one engine to the market, and inside the one that a request suits best.

All serve the same model, with the same profile, and share the node's work. To the market n engines are one with n times
their slots, KV cache and pace. A request goes to the engine where the product of two things is least: tokens of prompts
that are to be computed there, its own less what is cached counted in, and requests that are there, itself counted in.
This is LMetric, `agents.prefix_rules.lmetric` (docs/sessions.md): a session stays where its prefix is until too many
wait there, and what has no prefix goes where least is to be done.

An engine that fails or is full is left out until it is heard again.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any

from wwwserve.agents.hardware import Profile, pooled
from wwwserve.agents.kernel import Floats
from wwwserve.agents.knowledge import AD_MEAN_UNCACHED
from wwwserve.serving.engine.adapter import DOWN_WAITING, Engine, EngineError, Load, Sent
from wwwserve.serving.engine.prefix_index import HERE

log = logging.getLogger("wwwserve.engine")

Lookup = Callable[[str], int]
"""Tokens of a prompt that the engine of a place has cached."""


def place_of(k: int) -> str:
    """Where the index of prefixes has what the kth engine of a node has cached; no key of a peer is so short."""
    return str(k) if k else HERE


class Pool:
    """The engines of one node, which are one to all who do not ask for more."""

    def __init__(self, engines: Sequence[Engine], usual: Floats) -> None:
        """`usual` [ADVERT_SIZE] is the provider's own state, of which the usual tokens to compute are read."""
        self.engines, self._usual = list(engines), usual
        self._only = self.engines[0] if len(self.engines) == 1 else None
        self.alone = self.engines[0].profile
        self._profiles = [pooled(self.alone, count) for count in range(1, len(self.engines) + 1)]
        self._turn = 0
        self._turns = {engine: 0 for engine in self.engines}  # when each was chosen last
        self._scraping: dict[Engine, asyncio.Task[None]] = {}
        self._differ = ""  # how the models are that engines serve, where they have none in common
        self._same: dict[Engine, Engine] = {}  # engines that others are too, under other names, and are left out
        self._agreed: list[str] = []  # names of models that all served when they last had some in common
        self._odd: set[Engine] = set()  # engines that serve none of these, and are left out
        for k, engine in enumerate(self.engines):
            engine.place = place_of(k)

    # As one.

    @property
    def there(self) -> list[Engine]:
        """Those that can be asked; all where none can."""
        return [each for each in self.engines if self._can_be_asked(each)] or self.engines

    @property
    def count(self) -> int:
        """How many are in what the node says that it can do."""
        return 1 if self._only is not None else len(self.there)

    @property
    def profile(self) -> Profile:
        """What they can do together, those that can be asked."""
        return self._profiles[self.count - 1]

    @property
    def healthy(self) -> bool:
        """Whether one of them was heard of lately."""
        return any(each.healthy for each in self.engines)

    @property
    def takes(self) -> bool:
        """Whether one of them can be asked."""
        return any(self._can_be_asked(each) for each in self.engines)

    def _can_be_asked(self, engine: Engine) -> bool:
        return engine.takes and engine not in self._odd and engine not in self._same

    @property
    def reason(self) -> str:
        """Why engines cannot be asked, or their load is not known."""
        if self._only is not None:
            return self._only.reason
        said = [f"{each.label}: {each.reason}" for each in self.engines if each.reason]
        said += [f"{one.label} is {other.label} by another name" for one, other in self._same.items()]
        return "; ".join([*said, *([self._differ] if self._differ else [])])

    @property
    def url(self) -> str:
        """Where they are."""
        return ", ".join(each.url for each in self.engines)

    @property
    def described(self) -> dict[str, dict[str, Any]]:
        """What engines say of each model that they serve."""
        return next((each.described for each in self.engines if each.healthy and each.described), {})

    def load(self) -> Load:
        """The load of those that can be asked, in all; as full as can be where none can."""
        if self._only is not None:
            return self._only.load()
        there = self.there
        loads = [each.load() for each in there]
        running, kv_tokens = sum(each.running for each in loads), sum(each.kv_tokens for each in loads)
        waiting = sum(each.waiting for each in loads) if there[0].takes else DOWN_WAITING
        return Load(running, waiting, kv_tokens)

    def each(self) -> dict[str, tuple[float, float, float, float]]:
        """By what each is called: whether it takes requests, those that run and wait there, and the share of its KV
        cache in use; as full as can be where it takes none."""
        loads = {each: each.load() for each in self.engines}
        return {
            each.label: (self._can_be_asked(each), load.running, load.waiting, load.kv_tokens / self.alone.kv_tokens)
            for each, load in loads.items()
        }

    def progress(self, requests: Collection[Sent], now_s: float) -> Iterator[tuple[Sent, float]]:
        """Of requests that engines have, those that run on one that can be asked: see `Engine.progress`."""
        if self._only is not None:
            yield from self._only.progress(requests, now_s)
            return
        for engine in self.there:
            yield from engine.progress([each for each in requests if each.engine is engine], now_s)

    # Which one.

    def spare(self, tried: Collection[Engine]) -> bool:
        """Whether there is one that can be asked and was not tried."""
        return any(self._can_be_asked(each) and each not in tried for each in self.engines)

    def choose(self, prompt: int, cached: Lookup, tried: Collection[Engine] = ()) -> Engine:
        """The engine for a request of `prompt` tokens, of those that can be asked, else of those that are but full, and
        were not `tried` if there are others; of equal ones the one that was chosen least lately."""
        if self._only is not None:
            return self._only
        there = [each for each in self.there if each.healthy] or self.there
        each_waiting = float(self._usual[AD_MEAN_UNCACHED])
        best, least = there[0], (math.inf, 0)
        for engine in [each for each in there if each not in tried] or there:
            load = engine.load()
            to_compute = load.waiting * each_waiting + max(1, prompt - cached(engine.place))
            score = to_compute * (load.running + load.waiting + 1.0), self._turns[engine]
            if score < least:
                best, least = engine, score
        return best

    def chosen(self, engine: Engine) -> None:
        """A request goes to an engine."""
        self._turn += 1
        self._turns[engine] = self._turn

    # What they say.

    async def scrape(self) -> None:
        """Read their load. One that is down is not waited for while there are others. Raises EngineError where none
        answers."""
        if self._only is not None:
            await self._only.scrape()
            return
        for engine in self.engines:
            if engine not in self._scraping:
                self._scraping[engine] = asyncio.create_task(engine.scrape())
        awaited = [self._scraping[each] for each in self.engines if each.healthy] or [*self._scraping.values()]
        await asyncio.wait(awaited)
        for engine, task in [*self._scraping.items()]:
            if task.done():
                del self._scraping[engine]
                with suppress(EngineError):  # it is in its reason
                    task.result()
        self._find_same()
        if not self.healthy:
            raise EngineError(self.reason)

    def _find_same(self) -> None:
        """Leave out what is an engine that is there already."""
        before, self._same = self._same, {}
        first: dict[str, Engine] = {}
        for engine in [each for each in self.engines if each.healthy and each.made_at]:
            same = first.setdefault(engine.made_at, engine)
            if same is not engine:
                self._same[engine] = same
                if before.get(engine) is not same:
                    said = "an engine is named twice and counts once: take one of the two out of `engine.url`"
                    log.error(said, extra={"engines": [same.url, engine.url]})

    async def models(self) -> list[str]:
        """The names that all serve which answer. Raises EngineError where none says, or they have none in common."""
        if self._only is not None:
            return await self._only.models()
        asked = [each for each in self.engines if each.healthy]
        said = await asyncio.gather(*(each.models() for each in asked), return_exceptions=True)
        served: dict[Engine, list[str]] = {}
        for engine, names in zip(asked, said, strict=True):
            if isinstance(names, list):
                served[engine] = names
            elif not isinstance(names, EngineError):
                raise names
        if not served:
            raise EngineError("no engine says which models it serves" if asked else self.reason)
        odd = {engine for engine, names in served.items() if self._agreed and not set(names) & set(self._agreed)}
        self._odd = odd if len(odd) < len(served) else set()  # where all have changed, they may agree anew
        first, *others = [engine for engine in served if engine not in self._odd]
        common, apart = served[first], next(iter(self._odd), None)
        for other in others:
            if not set(common) & set(served[other]):
                apart = other
            common = [name for name in common if name in served[other]]
        before, self._differ = self._differ, ""
        if apart is not None:
            said_of = [f"{each.url} serves {', '.join(served[each])}" for each in (first, apart)]
            self._differ = f"engines of a node have to serve the same models, and {', while '.join(said_of)}"
            if self._differ != before:
                log.error("engines serve different models", extra={"reason": self._differ})
        if not common:
            raise EngineError(self._differ)
        self._agreed = common
        return common

    def close(self) -> None:
        """Ask no more of those that are being asked for their load."""
        for task in self._scraping.values():
            task.cancel()
