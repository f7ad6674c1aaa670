"""What nodes agree on: the market that they are in, tariffs, promises, and how large a number can be."""

from typing import Annotated, Any, NamedTuple

from msgspec import Meta
from numpy.typing import NDArray

from wwwserve.agents.classes import CLASS_SIZE, MAX_CLASSES
from wwwserve.agents.kernel import Floats, records
from wwwserve.agents.protocol import LATENESS, MICRO, NO_BOUND
from wwwserve.agents.provider import AGREEMENT, MAX_DEADLINES
from wwwserve.agents.tariff import MAX_TARIFF

MOST_INT = 2**63 - 1  # of whole numbers from outside, as kernels and databases take no larger ones
MOST_PRICE = int(MAX_TARIFF) * MICRO  # micro-credits per 1000 tokens
MOST_TOKENS = 1 << 30  # of one request, so that prices stay in 64 bits

Whole = Annotated[int, Meta(ge=0, le=MOST_INT)]  # one from outside
Tariff = tuple[Whole, Whole, Whole]  # INPUT, CACHED_INPUT, OUTPUT of agents.protocol: micro-credits per 1000 tokens


class Market(NamedTuple):
    """What all providers of a market have agreed on, and what one knows of its own users."""

    known: Floats  # [C, CLASS_SIZE] own requests by class
    deadlines: Floats  # [C, T] s since arrival
    payment: int = LATENESS  # as `agents.protocol` numbers it
    rtt_s: float = 0.05  # between two providers
    gossip_s: float = 3.0  # between two adverts of a provider
    tick_s: float = 1.0  # between two looks at what is held

    def agreement(self) -> NDArray[Any]:
        """One AGREEMENT record [1]. Raises ValueError for tables of another shape, or more than a record holds."""
        classes, deadlines = len(self.known), self.deadlines.shape[-1]
        if self.known.shape != (classes, CLASS_SIZE) or not 1 <= classes <= MAX_CLASSES:
            raise ValueError(f"classes have shape {self.known.shape}, expected 1 to {MAX_CLASSES} rows of {CLASS_SIZE}")
        if self.deadlines.shape != (classes, deadlines) or not 1 <= deadlines <= MAX_DEADLINES:
            raise ValueError(
                f"deadlines have shape {self.deadlines.shape}, expected {classes} rows of 1 to {MAX_DEADLINES}"
            )
        made = records(1, AGREEMENT)
        made["tick_s"], made["gossip_s"], made["rtt_s"] = self.tick_s, self.gossip_s, self.rtt_s
        made["n_classes"], made["n_deadlines"] = classes, deadlines
        made["deadlines"][0, :classes, :deadlines] = self.deadlines
        made["payment"], made["exposure"] = self.payment, NO_BOUND
        return made


class Promise(NamedTuple):
    """What a provider promises when it takes a request, or expects."""

    ttft_s: float
    tpot_s: float

    def text(self) -> tuple[str, str]:
        """As it is said to a peer."""
        return f"{self.ttft_s:.9g}", f"{self.tpot_s:.9g}"
