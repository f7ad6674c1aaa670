"""Work in processes gives what it gives here, in order."""

import os

import numpy as np
import pytest

from wwwserve.agents.rules import Rule
from wwwserve.envs.distribution import sample
from wwwserve.envs.state import plan
from wwwserve.eval.regret import measure
from wwwserve.eval.workers import each


def where(item: int) -> tuple[int, int]:
    if item < 0:
        raise ValueError(f"{item} is negative")
    return item, os.getpid()


@pytest.mark.parametrize("processes", [1, 2])
def test_each_item_in_order(processes: int) -> None:
    found = list(each(where, range(5), processes))
    assert [item for item, _ in found] == list(range(5))
    assert (os.getpid() in {pid for _, pid in found}) == (processes == 1)
    with pytest.raises(ValueError, match="-1 is negative"):
        list(each(where, [3, -1], processes))


def test_policies_are_measured_the_same_in_processes() -> None:
    market = sample("honest", np.random.default_rng(3), 60.0)
    among = {"one": [plan(market, k) for k in range(2)], "two": [plan(market, 9)]}
    policies = [Rule("single"), Rule("earliest_finish"), Rule("random")]
    here, there = (measure(policies, among, processes=k) for k in (1, 2))
    assert list(here) == list(there) == ["single", "earliest_finish", "random"]
    for name in here:
        for family in among:
            np.testing.assert_array_equal(here[name][family], there[name][family])
