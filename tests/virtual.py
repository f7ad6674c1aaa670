"""A clock that jumps to whatever is waited for next, and an engine on it: time passes without any being taken."""

import asyncio
import itertools
import random
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from wwwserve.agents.hardware import BLOCK_TOKENS
from wwwserve.envs.emulator import Emulator
from wwwserve.envs.emulator_api import BYTES_PER_TOKEN, words
from wwwserve.envs.prompt_blocks import block_hashes
from wwwserve.serving.engine.probe import Prober, Settings, Stream

TELLS_CACHED = True  # engines say how many tokens were cached
OVERHEAD_S = 5e-3  # of a request, on its way to the engine
Result = TypeVar("Result")


class Jumping(selectors.DefaultSelector):
    """Nothing is waited for: the time of the loop jumps."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout:
            self.now_s += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop that takes no time to sleep."""

    def __init__(self) -> None:
        self.jumping = Jumping()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.now_s


class VirtualEngine(Emulator):
    """An emulated engine on the loop's clock."""

    @property
    def now_s(self) -> float:
        return asyncio.get_running_loop().time()


NO_STALLS = itertools.repeat(0.0)


class VirtualProber(Prober):
    """Asks an engine of this process, for which it takes `OVERHEAD_S`."""

    def __init__(self, engine: VirtualEngine, settings: Settings) -> None:
        loop = asyncio.get_running_loop()
        super().__init__("http://engine", "m", settings, None, loop.time)  # type: ignore[arg-type]
        self.engine, self.random = engine, random.Random(5)
        self.stalls = NO_STALLS

    async def complete(self, prompt: str | list[int], tokens: int, stream: Stream | None = None) -> Stream:
        seen = stream or Stream()
        seen.sent_s = self.clock()
        await asyncio.sleep(OVERHEAD_S)
        seen.prompt = len(prompt) // BYTES_PER_TOKEN if isinstance(prompt, str) else len(prompt)
        hashes = block_hashes({"prompt": prompt}, False, words(0, tokens), BLOCK_TOKENS)
        job = self.engine.put(seen.prompt, tokens, streams=True, hashes=hashes)
        try:
            sent = 0
            while sent < tokens:
                await job.changed.wait()
                job.changed.clear()
                await asyncio.sleep(next(self.stalls))
                seen.times_s += [self.clock()] * (job.tokens > sent)
                sent = job.tokens
                seen.first_s, seen.last_s = seen.times_s[0], self.clock()
                seen.begun.set()
        finally:
            self.engine.withdraw(job)
        seen.tokens, seen.cached = sent, job.cached if TELLS_CACHED else 0
        return seen


def virtually(act: Coroutine[Any, Any, Result]) -> Result:
    """Run it on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(act)
