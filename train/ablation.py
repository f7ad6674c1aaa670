"""What is taken from a policy to see what it is worth: the estimates it reads, and its choice among candidates."""

import numpy as np
import torch
from numpy.typing import NDArray

from wwwserve.agents.decision import FIRST_CANDIDATE, Actions
from wwwserve.agents.policy.network import Actor
from wwwserve.agents.rules import Policy
from wwwserve.agents.view import (
    CHANCE,
    CROWD_S,
    FINISH_RANK,
    FINISH_S,
    FIRST_TOKEN_S,
    NODE_FEATURES,
    SLOWDOWN_S,
    TOKEN_S,
    Views,
)

ESTIMATES = (FINISH_S, CHANCE, FIRST_TOKEN_S, TOKEN_S, SLOWDOWN_S, CROWD_S, FINISH_RANK)
"""The features of a node that `agents.estimate` works out; all others are counts, ages and records."""


def forget_estimates(actor: Actor) -> None:
    """Make the actor blind to `ESTIMATES`, now and however long it learns: no weight on them, and no prior."""
    seen = torch.ones(len(NODE_FEATURES), device=actor.prior.device)
    seen[list(ESTIMATES)] = 0.0
    with torch.no_grad():
        actor.node_in.weight.mul_(seen)
        actor.prior.zero_()
    actor.node_in.weight.register_hook(lambda gradient: gradient * seen)
    actor.prior.register_hook(torch.zeros_like)


def close_choice(views: Views) -> None:
    """Leave of the candidates in `views` [...] the first alone, as if stake had drawn no other."""
    views.routes[..., FIRST_CANDIDATE + 1 :] = 0


class StakeOnly:
    """A policy that may hand a request to the first candidate alone: dispatch by stake, without choice."""

    def __init__(self, policy: Policy) -> None:
        self.name = policy.name
        self._policy = policy

    def decide(self, views: Views, active: NDArray[np.bool_], dice: NDArray[np.float64], actions: Actions) -> None:
        """See `agents.rules.Policy.decide`."""
        narrow = views._replace(routes=views.routes.copy())
        close_choice(narrow)
        self._policy.decide(narrow, active, dice, actions)
