"""What an origin knows of a class of its own requests, as one row."""

import numpy as np

from wwwserve.agents.kernel import Floats
from wwwserve.agents.lengths import Lognormal

MAX_CLASSES = 4
CLASS_MEDIAN, CLASS_SIGMA, CLASS_MAX, CLASS_MEAN, CLASS_VALUE, CLASS_LAST_DEADLINE_S = range(6)
CLASS_SIZE = 6


def class_row(output: Lognormal, multiplier: float, last_deadline_s: float) -> Floats:
    """A row [CLASS_SIZE]: answers of such lengths, in time until `last_deadline_s` after their arrival.

    An answer in time is worth `multiplier` x its expected length / 1000 credits: a credit is what a user pays for 1000
    tokens of it.
    """
    row = np.zeros(CLASS_SIZE)
    row[CLASS_MEDIAN], row[CLASS_SIGMA], row[CLASS_MAX] = output.median, output.sigma, output.max
    row[CLASS_MEAN] = output.mean
    row[CLASS_VALUE] = multiplier * output.mean / 1000.0
    row[CLASS_LAST_DEADLINE_S] = last_deadline_s
    return row
