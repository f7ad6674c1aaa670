"""What a coalition of members can buy: nothing with a third of the stake, and more is found out."""

import pytest

from wwwserve.eval.live.coalition import measure

SETTINGS = {"redraws": 5, "worthless": 20, "seed": 1}


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("count", [6, 12, 80])
def test_a_third_of_the_stake_slashes_no_honest_member(count: int, spread: float) -> None:
    found = measure(count, 300, share=1 / 3, spread=spread, errors=0.0, **SETTINGS)
    assert found["slashed"] == 0 and found["most_of_what_is_needed"] <= 1
    if count > 6:  # of so few, two who stand together are enough to shield each other
        assert found["worthless_lost_all"] > 15 and found["duels_until_then"][0] < 10


def test_judges_that_err_now_and_then_change_nothing_where_many_have_as_much() -> None:
    assert measure(30, 300, share=1 / 3, spread=0.0, errors=0.02, **SETTINGS)["slashed"] == 0


@pytest.mark.parametrize("count", [12, 80])
def test_two_thirds_of_the_stake_slash_whom_they_like(count: int) -> None:
    assert measure(count, 50, share=0.67, spread=0.0, errors=0.0, **SETTINGS | {"worthless": 0})["slashed"] > 10
