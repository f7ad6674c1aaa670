"""All adversaries by their names."""

from wwwserve.eval.live.world.adversaries import (
    Equivocator,
    Forger,
    Freeloader,
    FreeRider,
    Inflater,
    Liar,
    Replayer,
    Robber,
    Staller,
    Sybil,
    Withholder,
)
from wwwserve.eval.live.world.griefer import Griefer, Mixed
from wwwserve.eval.live.world.judge_buyers import Crowd, JudgeBuyer
from wwwserve.eval.live.world.leaver import Leaver
from wwwserve.eval.live.world.nodes import Strategy

_KINDS: tuple[type[Strategy], ...] = (
    FreeRider, Inflater, Staller, Liar, Replayer, Equivocator, Griefer, Robber, Sybil, Mixed, Withholder, Freeloader,
    Forger, JudgeBuyer, Crowd, Leaver,
)  # fmt: skip
ADVERSARIES = {each.name: each for each in _KINDS}


def make(name: str) -> Strategy:
    """The strategy of that name; honest for ""."""
    return ADVERSARIES[name]() if name else Strategy()
