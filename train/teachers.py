"""Who is imitated in training: a policy for each kind of random market."""

from typing import NamedTuple

import numpy as np

from wwwserve.agents.decision import HOLD, LOCAL
from wwwserve.agents.kernel import Bools, Floats
from wwwserve.agents.rules import Actions, Policy, Rule
from wwwserve.agents.view import WAITING, Views
from wwwserve.envs.distribution import Kind
from wwwserve.eval.tuned import best_for

ACCEPT_WAIT_S = 5.0
LONGEST_QUEUE = 2  # requests that wait at an engine, beyond which none is bound to it


class LateBinding(NamedTuple):
    """A rule that holds a request while more than `most` others wait where it would go.

    It goes then to whichever node has room first, not to the one that was expected to. That helps where nodes are
    alike; elsewhere the good nodes are worth a wait.
    """

    rule: Rule
    most: int
    name: str = "late_binding"

    def decide(self, views: Views, active: Bools, dice: Floats, actions: Actions) -> None:
        """See `agents.rules.Policy.decide`."""
        self.rule.decide(views, active, dice, actions)
        at = np.nonzero(active & (actions.route > HOLD))
        node = actions.route[at] - LOCAL
        held = (views.nodes[(*at, node)][:, WAITING] > self.most) & (views.routes[(*at, np.full(len(node), HOLD))] > 0)
        actions.route[tuple(axis[held] for axis in at)] = HOLD


def teachers() -> dict[Kind, Policy]:
    """In each kind of market the rule that is best for it by `eval.tune`, with other settings.

    Those settings are, on validation markets of the kind, as good within noise, and better in the `paper/` and `liars/`
    scenarios, which one policy has to serve as well: peers' requests are taken where they wait up to ACCEPT_WAIT_S
    instead of 0.5 to 3 s (conversation apart, where that is long), the own node is favoured less, and crowds count for
    more, what a request costs those that run for less. In markets of equal nodes or of one model, time and crowd alone
    do best.
    """

    def varied(kind: Kind, **settings: float) -> Rule:
        best = best_for(kind)
        return Rule(best.name.split("@")[0], best.settings | settings)

    def plain(own_margin: float, crowd: float) -> Rule:
        settings = {"accept_wait_s": ACCEPT_WAIT_S, "own_margin": own_margin, "slowdown": 0.0, "crowd": crowd}
        return Rule("earliest_finish", settings)

    wary = varied("lying", accept_wait_s=ACCEPT_WAIT_S, own_margin=0.96, slowdown=0.2, crowd=20.0)
    return {
        "honest": varied("honest", accept_wait_s=ACCEPT_WAIT_S, own_margin=0.96, slowdown=0.3, crowd=10.0),
        "lying": wary,
        "switching": wary,
        "deadlines": varied("deadlines", own_margin=1.0),
        "conversation": best_for("conversation"),
        "alike": LateBinding(plain(own_margin=1.0, crowd=20.0), LONGEST_QUEUE),
        "hardware": plain(own_margin=0.98, crowd=10.0),
    }
