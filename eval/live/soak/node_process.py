"""A node of a soak in its own process: `python -m wwwserve.eval.live.soak.node_process CONFIG STRATEGY SEED OFF_S`.

It is the node that `wwwserve node` runs, with a clock that may be off, that reaches no port that the file beside its
configuration names which ends in `.blocked`, and is watched by a witness if it is honest.
"""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

HONEST = "honest"


def block(ports: Path) -> None:
    """Have this process reach none of the ports that a file names, while there is one."""
    request = aiohttp.ClientSession._request

    async def unless_blocked(self: aiohttp.ClientSession, method: str, url: Any, **more: Any) -> Any:
        with suppress(OSError):
            if any(f":{port}/" in str(url) for port in ports.read_text().split()):
                raise aiohttp.ClientConnectionError("the network is parted")
        return await request(self, method, url, **more)

    aiohttp.ClientSession._request = unless_blocked  # type: ignore[method-assign, assignment]


def play(config: Path, strategy: str, seed: int, off_s: float) -> int:
    """Be a node until it is told to end."""
    real = time.time
    time.time = lambda: real() + off_s
    block(config.with_suffix(".blocked"))
    from wwwserve.serving import node  # not before: what it imports binds the clock
    from wwwserve.serving.config import load

    if strategy == HONEST:
        from wwwserve.eval.live.soak.witness import watch

        watch(config.with_suffix(".seen"))
    else:
        from wwwserve.eval.live.soak.malice import play

        play(strategy, seed)
    node.run(load(config))
    return 0


if __name__ == "__main__":
    sys.exit(play(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
