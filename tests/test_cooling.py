"""Peers and engines that fail are left alone for a while, longer each time, and users do not notice."""

import asyncio

import pytest
from stub_nodes import Net, Stub, busy, net, play

from wwwserve.serving import cooling
from wwwserve.serving.cooling import COOL_S, FAILURES, MOST_COOL_S, Cooling
from wwwserve.serving.dispatcher import Dispatcher
from wwwserve.serving.engine.adapter import FULL_S, MOST_FULL_S, Availability


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_it_takes_failures_in_a_row_and_each_time_is_twice_as_long() -> None:
    clock = Clock()
    cooling, times = Cooling(clock), []
    for _ in range(2):  # an answer begins the row anew
        cooling.answered("a")
        assert [cooling.failed("a") for _ in range(FAILURES - 1)] == [None] * (FAILURES - 1)
    while len(times) < 7:
        until_s = cooling.failed("a")
        assert until_s is not None and cooling.left_s("a") == until_s - clock.now_s
        times.append(until_s - clock.now_s)
        assert cooling.failed("a") is None  # asked before
        clock.now_s = until_s
        assert cooling.left_s("a") == 0.0
    assert times == [min(COOL_S * 2**k, MOST_COOL_S) for k in range(7)]
    assert cooling.left_s("b") == 0.0


def test_a_peer_that_says_when_to_come_again_is_left_alone_at_once_and_not_for_ever() -> None:
    cooling = Cooling(Clock())
    assert cooling.failed("a", 7) == 7.0
    assert cooling.failed("b", 99_999) == MOST_COOL_S


@pytest.mark.parametrize("mode", ["500", "401", "404"])
def test_a_peer_that_fails_is_asked_nothing_for_a_while_and_then_again(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cooling, "COOL_S", 10.0)  # in which even a busy machine asks three times

    async def scene() -> None:
        async with net(busy(), Stub(mode=mode), Stub(waiting=20)) as n:  # the second is the first choice
            for _ in range(FAILURES):
                assert (await n.ask())[0] == 200
            assert n.stubs[1].begun == FAILURES and n.stubs[0].begun + n.stubs[2].begun == FAILURES
            assert await left_alone(n) == {"n1": True, "n2": False}
            for _ in range(3):
                assert (await n.ask())[0] == 200
            assert n.stubs[1].begun == FAILURES
            n.stubs[1].mode = "well"
            await n.until(lambda: back(n))
            assert (await n.ask())[0] == 200 and n.stubs[1].begun == FAILURES + 1
            async with n.session.get(n.urls[0] + "/metrics") as response:
                assert "wwwserve_peers_left_alone_total 1.0" in await response.text()

    async def left_alone(n: Net) -> dict[str, bool]:
        return {each["label"]: each["left_alone_s"] > 0 for each in (await n.see())["peers"]}

    async def back(n: Net) -> bool:
        return not (await left_alone(n))["n1"]

    play(scene)


def test_a_peer_that_does_not_want_a_request_now_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dispatcher, "consider", lambda *_: None)

    async def scene() -> None:
        async with net(Stub(waiting=200), Stub()) as n:
            while await refused(n) < 2 * FAILURES:
                assert (await n.ask())[0] == 200
            assert (await n.see())["peers"][0]["left_alone_s"] == 0

    async def refused(n: Net) -> float:
        async with n.session.get(n.urls[1] + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("wwwserve_offers_refused_total"))

    play(scene)


def test_an_engine_that_answers_errors_is_tried_again_later_and_later() -> None:
    async def scene() -> None:
        engine, now_s, waits = Availability(), asyncio.get_running_loop().time, []
        for _ in range(9):
            engine.failures = 0  # its page was read
            engine.failed(b"a", "500")
            engine.failed(b"b", "500")
            engine.failed(b"c", "500")
            waits.append(round(max(0.0, engine._full_until_s - now_s())))
            engine._full_until_s = 0.0
        assert waits == [0, 0, *(round(min(FULL_S * 2**k, MOST_FULL_S)) for k in range(7))]
        engine.answered()
        engine.failures = 0
        engine.failed(b"a", "500")
        assert engine.takes

    play(scene)
