"""What the learned policy is made of, in one place: its layers, their order, sizes and names, and its constants.

`agents.policy.network` builds the torch module from this, `agents.policy.forward` the arrays of its kernels,
`agents.policy.bundle` the shapes that it accepts.
"""

import math
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from wwwserve.agents.decision import ROUTES
from wwwserve.agents.tariff import MARKUPS
from wwwserve.agents.view import (
    FINISH_S,
    KV_USE,
    LOAD_S,
    NODE_FEATURES,
    OVERDUE,
    PACE,
    RECORD,
    REQUEST_FEATURES,
    SELF_FEATURES,
    SLOWDOWN_S,
    SPEED_RANK,
    UTILITY,
    WAITING,
)

NAME = "pooled-pointer"
MAX_WIDTH = 1024

ABOUT = len(REQUEST_FEATURES) + len(SELF_FEATURES)
LOGITS = ROUTES + MARKUPS.size
FORBIDDEN = np.float32(-1e9)  # the logit of a route that the mask rules out

# What the rule within reads of a node: the time to finish there, what it discounts it by, how full the node is, and
# what the request brings there.
EVIDENCE = (FINISH_S, PACE, RECORD, OVERDUE, SLOWDOWN_S, LOAD_S, KV_USE, SPEED_RANK, WAITING, UTILITY)
# Its settings, in what a softplus of 1 stands for: weights of pace, record, overdue, slowdown and load; sharpness of
# the preference; KV use above which the fastest node counts as full, and the slowest; how far a full node is avoided;
# how far one is preferred that brings more.
SETTING_UNITS = (1.0, 1.0, 1.0, 1.0, 10.0, 1.0, 1.0, 1.0, 10.0, 10.0)
SETTINGS = len(SETTING_UNITS)
FULL_WIDTH = np.float32(0.05)  # of KV use, from hardly full to nearly full
SHORTEST_S = np.float32(1e-3)  # times to finish below this are taken for it
MOST_LATENESS = np.float32(50.0)  # in log time; beyond, its exponential overflows, and so do gradients

PAYS = "pays"  # weight: the share of its cost by now that others' work has to bring; set, not learned
PAYS_IN_FULL = np.float32(1.0)  # of bundles that do not say
MOST_PAYS = 2.0
KEEP = "keep"  # weight: how much dearer it sells for the share of its prompts that is cached; set as well
MOST_KEEP = 4.0
SET = {PAYS: PAYS_IN_FULL, KEEP: np.float32(0.0)}  # what is not learned, as it is in bundles that do not say

T = TypeVar("T")
Weights = dict[str, NDArray[np.float32]]
"""Every weight by its name in `shapes`."""


class Layers(NamedTuple, Generic[T]):
    """Something for each linear layer of the policy, in the order of its weights."""

    node_in: T  # a node's features
    about_in: T  # request and provider, added to the former
    node_hidden: T
    pool: T  # request and provider, mean and maximum over nodes
    score_node: T  # a node
    score_pool: T  # what is pooled, added to the former
    score: T  # the logit of a node
    hold: T  # the logit of holding
    markup: T  # logits of the markup
    setting: T  # settings of the rule within


class Size(NamedTuple):
    """Of a linear layer."""

    outputs: int
    inputs: int


def sizes(width: int) -> Layers[Size]:
    """The layers of a policy of this width."""
    return Layers(
        node_in=Size(width, len(NODE_FEATURES)),
        about_in=Size(width, ABOUT),
        node_hidden=Size(width, width),
        pool=Size(width, ABOUT + 2 * width),
        score_node=Size(width, width),
        score_pool=Size(width, width),
        score=Size(1, width),
        hold=Size(1, width),
        markup=Size(MARKUPS.size, width),
        setting=Size(SETTINGS, width),
    )


HEADS = ("score", "hold", "markup", "setting")  # whose outputs are not passed through a ReLU


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a policy of this width; matrices are [outputs, inputs]."""
    table: dict[str, tuple[int, ...]] = {"prior": (), PAYS: (), KEEP: ()}
    for name, size in sizes(width)._asdict().items():
        table[f"{name}.weight"] = tuple(size)
        table[f"{name}.bias"] = (size.outputs,)
    return table


def width_of(weights: Weights) -> int:
    """The width of the policy that has these weights."""
    return len(weights["node_in.bias"])


def parameters(width: int) -> int:
    """How many numbers of a policy of this width are learned."""
    return sum(math.prod(shape) for name, shape in shapes(width).items() if name not in SET)
