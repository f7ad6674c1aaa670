"""Who is imitated, and the teacher that holds."""

import numpy as np
import pytest

from wwwserve.agents.decision import HOLD, LOCAL
from wwwserve.agents.rules import Rule
from wwwserve.agents.view import WAITING
from wwwserve.envs.batch import MarketBatch
from wwwserve.envs.distribution import KINDS
from wwwserve.envs.scenario import load
from wwwserve.envs.state import plan
from wwwserve.train.teachers import LateBinding, teachers


def test_every_kind_of_market_has_a_teacher() -> None:
    assert set(teachers()) == set(KINDS)


@pytest.mark.parametrize("most", [0, 2])
def test_late_binding_holds_where_its_rule_would_queue(most: int) -> None:
    """It decides as its rule where at most `most` requests wait, and holds elsewhere, if it may."""
    rule = Rule("earliest_finish", {"own_margin": 1.0})
    teacher = LateBinding(rule, most)
    batch = MarketBatch([plan(load("paper/alternating-queue"), seed) for seed in (1, 2)])
    actions, plain = batch.actions(), batch.actions()
    held = placed = 0
    while not batch.over.all() and held < 50:
        rule.decide(batch.views, batch.active, batch.dice, plain)
        teacher.decide(batch.views, batch.active, batch.dice, actions)
        for at in zip(*np.nonzero(batch.active & (plain.route > HOLD)), strict=True):
            route = plain.route[at]
            waits = batch.views.nodes[at][route - LOCAL, WAITING] > most
            if waits and batch.views.routes[at][HOLD]:
                assert actions.route[at] == HOLD
                held += 1
            else:
                assert actions.route[at] == route
                placed += 1
        batch.step(actions)
    assert held > 10 and placed > 10
