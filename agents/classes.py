"""What an origin knows of a class of its own requests, as one row."""

import numpy as np

from wwwserve.agents.kernel import Floats, plain
from wwwserve.agents.lengths import Lognormal

MAX_CLASSES = 4
CLASS_MEDIAN, CLASS_SIGMA, CLASS_MAX, CLASS_MEAN, CLASS_VALUE, CLASS_LAST_DEADLINE_S = range(6)
CLASS_SIZE = 6

INPUT_WORTH = 0.25  # of a token of input to one of output, as users pay them; list prices of open models: 0.12 to 0.5
CACHED_WORTH = 0.1  # of a token of input of the turn before to another one


@plain
def worth_of(fresh: float, cached: float, output: float) -> float:
    """What users pay for so many tokens of input, of input of the turn before, and of output: in tokens of output."""
    return output + INPUT_WORTH * (fresh + CACHED_WORTH * cached)


def class_row(
    output: Lognormal, multiplier: float, last_deadline_s: float, prompt: float, uncached: float | None = None
) -> Floats:
    """A row [CLASS_SIZE]: answers of such lengths, in time until `last_deadline_s` after their arrival, to prompts of
    `prompt` tokens on average, of which `uncached`, by default all, are not of the session's turn before.

    An answer in time is worth what users pay, times `multiplier`: a credit for 1000 tokens of output, for input as much
    less as INPUT_WORTH and CACHED_WORTH say. Did input count for nothing, as in a price by tokens of output alone, code
    and agents would not be worth the compute.
    """
    fresh = prompt if uncached is None else uncached
    row = np.zeros(CLASS_SIZE)
    row[CLASS_MEDIAN], row[CLASS_SIGMA], row[CLASS_MAX] = output.median, output.sigma, output.max
    row[CLASS_MEAN] = output.mean
    row[CLASS_VALUE] = multiplier * worth_of(fresh, prompt - fresh, output.mean) / 1000.0
    row[CLASS_LAST_DEADLINE_S] = last_deadline_s
    return row
