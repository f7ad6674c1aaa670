"""How many tokens requests have."""

import math
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta


@dataclass(frozen=True)
class Lognormal:
    """A token count: lognormal, rounded, clipped to [1, max]."""

    median: Annotated[float, Meta(ge=1, le=1e6)]
    """Median before clipping, tokens."""
    sigma: Annotated[float, Meta(ge=0, le=4)]
    """Standard deviation of the logarithm."""
    max: Annotated[int, Meta(ge=1, le=1_000_000)]
    """Largest count, tokens."""

    def moment(self, k: int) -> float:
        """E[min(X, max)^k], X lognormal: exp(k mu + k^2 s^2/2) Phi(z - k s) + max^k Phi(-z), z = (ln max - mu) / s."""
        if self.sigma == 0:
            return min(self.median, float(self.max)) ** k
        z = math.log(self.max / self.median) / self.sigma
        below = 0.5 * math.erfc((k * self.sigma - z) / math.sqrt(2))
        above = 0.5 * math.erfc(z / math.sqrt(2))
        return self.median**k * math.exp((k * self.sigma) ** 2 / 2) * below + float(self.max) ** k * above

    @property
    def mean(self) -> float:
        """Mean count, tokens."""
        return self.moment(1)
