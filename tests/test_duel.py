"""Duels between answers, as their origin and their executors see them."""

import asyncio
import contextlib

import msgspec
import numpy as np
import orjson
import pytest
from duel_net import COMPLETION, Net, Node, User, event, staked, stream

from wwwserve.agents.protocol import MICRO, MINORITY_SHARE, VOTE_A, VOTE_B, VOTE_UNDECIDED
from wwwserve.serving.duel import attestor as attestor_module
from wwwserve.serving.duel import duels as duel
from wwwserve.serving.duel.duels import Attempt
from wwwserve.serving.duel.judge import JudgeError
from wwwserve.serving.duel.messages import JUDGE_PATH, Attest, Declined
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.reply import Failed, RetryableError
from wwwserve.serving.http.sse import LAST_EVENT
from wwwserve.serving.ledger.verdicts import Answer, DuelOpening, Party, committed, verify_answer


def test_the_better_answer_wins_the_other_ones_stake() -> None:
    net = Net()
    user = asyncio.run(net.run())
    assert user.body == b"".join(stream(net.answers[net.good.name]))  # of the first that began
    assert net.stake(net.good) == 8 * MICRO and net.stake(net.bad) == 0
    assert [net.stake(judge) for judge in net.judges] == [4 * MICRO] * 3
    assert net.results == [(net.good.name, True), (net.bad.name, False)]
    [verdict] = net.verdicts
    assert len(verdict.votes) == 3 and net.count("won") == 1
    assert all((record.votes, record.outvoted, record.silent) == (1, 0, 0) for record in net.duels.records.values())
    [ended] = net.duels.recent
    assert (ended.outcome, ended.winner) == ("won", net.good.name)
    assert ended.executors == sorted([net.good.name, net.bad.name]) and len(ended.votes) == 3
    assert net.metrics.duels == {"won": 1, "tie": 0, "void": 0}
    assert net.stakes.losses() == [(net.bad.name, "verdict")]


def test_the_user_waits_for_the_first_answer_alone() -> None:
    async def run() -> None:
        net = Net()
        last = asyncio.Event()

        async def hand(name: str, attempt: Attempt) -> str:
            if name == net.good.name:
                await last.wait()
            return await net.hand(name, attempt)

        user = User()
        who = await net.duels.run(COMPLETION, (net.good.name, net.bad.name), hand, user)
        assert who == net.bad.name and user.body == b"".join(stream("bad")) and net.duels.open == 1
        last.set()
        while net.duels.open:
            await asyncio.sleep(0.001)
        assert user.body == b"".join(stream("bad"))  # nothing of the other one
        assert net.stake(net.good) == 8 * MICRO

    asyncio.run(run())


def test_a_whole_answer_is_judged_as_well() -> None:
    async def run() -> None:
        net = Net()
        completion = COMPLETION._replace(stream=False)

        async def hand(name: str, attempt: Attempt) -> None:
            body = orjson.dumps({"choices": [{"index": 0, "message": {"content": net.answers[name]}}]})
            await attempt.whole(200, "application/json", body)
            net.take(name, attempt)

        user = await net.run(hand, completion)
        assert b"it is long" in user.body and net.stake(net.bad) == 0

    asyncio.run(run())


@pytest.mark.parametrize("what", ["breaks off", "says 500", "is too long", "is cut off", "is no text"])
def test_one_answer_is_no_duel(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        net = Net()

        async def hand(name: str, attempt: Attempt) -> str:
            if name == net.good.name:
                return await net.hand(name, attempt)
            await asyncio.sleep(0.01)
            await attempt.start(500 if what == "says 500" else 200, "text/event-stream")
            if what == "breaks off":
                raise Failed(502, "it broke off")
            chunks = [event("word" * 1000)] if what == "is too long" else stream("bad")
            if what == "is no text":
                chunks = [b"data: \xff\n\n", LAST_EVENT]
            for chunk in chunks[:-1] if what == "is cut off" else chunks:
                await attempt.pass_on(chunk)
            net.take(net.bad.name, attempt)
            return name

        if what == "is too long":
            monkeypatch.setattr(duel, "MOST_ANSWER_BYTES", 2000)
        user = await net.run(hand)
        assert user.body.endswith(LAST_EVENT) and net.count("void") == 1
        assert not net.verdicts and net.results == []
        assert net.stake(net.good) == net.stake(net.bad) == 4 * MICRO

    asyncio.run(run())


def test_the_one_that_answers_is_enough_and_without_any_it_is_given_back() -> None:
    async def run() -> None:
        net = Net()

        async def only_bad(name: str, attempt: Attempt) -> str:
            if name == net.good.name:
                raise RetryableError("it refuses")
            return await net.hand(name, attempt)

        assert (await net.run(only_bad)).body == b"".join(stream("bad"))

        async def neither(name: str, attempt: Attempt) -> None:
            raise RetryableError(f"{name} refuses")

        user = User()
        with pytest.raises(RetryableError, match=net.good.name):
            await net.duels.run(COMPLETION, (net.good.name, net.bad.name), neither, user)
        assert not user.started and net.duels.open == 0 and net.count("void") == 2

    asyncio.run(run())


def test_a_user_who_hangs_up_stops_both() -> None:
    async def run() -> None:
        net = Net()
        stopped = []

        async def endless(name: str, attempt: Attempt) -> None:
            try:
                await attempt.start(200, "text/event-stream")
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                stopped.append(name)
                raise

        asking = asyncio.create_task(net.duels.run(COMPLETION, (net.good.name, net.bad.name), endless, User()))
        await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert sorted(stopped) == sorted([net.good.name, net.bad.name]) and net.duels.open == 0

    asyncio.run(run())


def test_a_user_who_has_the_whole_answer_may_hang_up() -> None:
    async def run() -> None:
        net = Net()

        async def hand(name: str, attempt: Attempt) -> str:
            result = await net.hand(name, attempt)
            await asyncio.sleep(0.02)  # until the connection is closed
            return result

        user = User()
        asking = asyncio.create_task(net.duels.run(COMPLETION, (net.good.name, net.bad.name), hand, user))
        while not user.body.endswith(LAST_EVENT):
            await asyncio.sleep(0)
        asking.cancel()
        assert await asking == net.good.name and asking.cancelling() == 0
        while net.duels.open:
            await asyncio.sleep(0.001)
        assert net.count("won") == 1 and net.stake(net.bad) == 0

    asyncio.run(run())


def test_a_silent_judge_loses_nothing_as_who_says_so_may_have_left_its_vote_out() -> None:
    async def run() -> None:
        net = Net(judges=5, panel=5)
        request = net.request

        async def without(peer: str, path: str, body: bytes) -> bytes:
            if peer == net.judges[0].name and path == JUDGE_PATH:
                raise OSError("nobody there")
            return await request(peer, path, body)

        net.request = without  # type: ignore[method-assign]
        await net.run()
        assert [net.stake(judge) for judge in net.judges] == [4 * MICRO] * 5 and len(net.verdicts[0].votes) == 4
        assert net.stake(net.bad) == 0 and net.duels.records[net.judges[0].name].silent == 1

    asyncio.run(run())


@pytest.mark.parametrize("silent", [2, 3])
def test_no_duel_is_begun_for_a_while_after_one_that_nobody_judged(
    monkeypatch: pytest.MonkeyPatch, silent: int
) -> None:
    monkeypatch.setattr(duel, "REST_S", 0.05)

    async def run() -> None:
        net = Net()
        request = net.request

        async def declined(peer: str, path: str, body: bytes) -> bytes:
            if path == JUDGE_PATH and peer in [judge.name for judge in net.judges[:silent]]:
                raise OSError("it has judged enough for you, come again later")
            return await request(peer, path, body)

        net.request = declined  # type: ignore[method-assign]
        assert net.duels.may_begin()
        await net.run()
        assert (net.count("void"), net.count("won")) == ((1, 0) if silent == 3 else (0, 1))
        assert net.duels.may_begin() == (silent < 3) and not net.verdicts
        assert sorted(net.paid) == sorted([(net.good.name, True), (net.bad.name, True)])
        await asyncio.sleep(0.06)
        assert net.duels.may_begin()

    asyncio.run(run())


def test_a_judge_who_is_outvoted_is_fined() -> None:
    net = Net(judges=5, panel=5)
    net.judges[1].opinion = lambda first, second: VOTE_B if len(first) > len(second) else VOTE_A
    asyncio.run(net.run())
    fine = 4 * MICRO // MINORITY_SHARE  # of as much as the loser had at stake
    funds = [net.stakes.funds[judge.name] - 100 * MICRO for judge in net.judges]
    assert funds == [fine // 4, -fine, fine // 4, fine // 4, fine // 4]
    assert net.duels.records[net.judges[1].name].outvoted == 1 and net.stake(net.good) == 8 * MICRO


def test_stake_moves_only_if_judges_with_more_than_a_third_of_all_stake_say_so() -> None:
    """Two of three are a majority, which is enough for what the origin thinks of its peers; they have two of six."""
    net = Net()
    net.judges[1].opinion = lambda first, second: VOTE_B if len(first) > len(second) else VOTE_A
    asyncio.run(net.run())
    assert not net.verdicts and net.stake(net.bad) == 4 * MICRO
    assert net.results == [(net.good.name, True), (net.bad.name, False)] and net.count("won") == 1


def test_all_are_asked_only_if_the_first_know_a_winner() -> None:
    async def run(opinion: int | None) -> tuple[Net, int]:
        net, asked = Net(judges=9), set()
        request = net.request

        async def counted(peer: str, path: str, body: bytes) -> bytes:
            if path == JUDGE_PATH:
                asked.add(peer)
            return await request(peer, path, body)

        net.request = counted  # type: ignore[method-assign]
        for judge in net.judges:
            judge.opinion = judge.opinion if opinion is None else lambda first, second: opinion
        await net.run()
        return net, len(asked)

    net, asked = asyncio.run(run(None))
    assert asked == 9 and len(net.verdicts[0].votes) == 9 and net.stake(net.bad) == 0
    net, asked = asyncio.run(run(VOTE_UNDECIDED))
    assert asked == 3 and not net.verdicts and net.count("tie") == 1


def test_where_no_epoch_is_agreed_a_duel_moves_the_origins_record_alone() -> None:
    net = Net(agreed=False)
    asyncio.run(net.run())
    assert net.results == [(net.good.name, True), (net.bad.name, False)] and net.count("won") == 1
    assert not net.verdicts and net.stake(net.bad) == 4 * MICRO


def test_an_origin_without_a_bond_moves_no_stake() -> None:
    net = Net()
    net.stakes.heard(staked(net.origin, 2, MICRO - 1))
    asyncio.run(net.run())
    assert net.results == [(net.good.name, True), (net.bad.name, False)] and not net.verdicts


def test_an_answer_is_paid_once_and_only_if_its_executor_signs_it() -> None:
    net = Net()
    asyncio.run(net.run())
    assert sorted(net.paid) == sorted([(net.good.name, True), (net.bad.name, True)])
    net = Net()
    net.bad.signs = False
    asyncio.run(net.run())
    assert sorted(net.paid) == sorted([(net.good.name, True), (net.bad.name, False)])


def test_a_tie_moves_nothing() -> None:
    net = Net(judges=4, panel=4)
    for judge in net.judges[:2]:
        judge.opinion = lambda first, second: VOTE_A if len(first) < len(second) else VOTE_B
    asyncio.run(net.run())
    assert net.count("tie") == 1 and net.results == []
    assert [net.stake(node) for node in net.nodes.values()] == [4 * MICRO] * 6


def test_judges_whose_engines_cannot_say_decline_and_are_not_fined() -> None:
    """A vote of theirs would be paid for, and the second answer of the next duel as well."""

    def cannot(first: str, second: str) -> int:
        raise JudgeError("no log-probabilities here")

    net = Net()
    for judge in net.judges:
        judge.opinion = cannot
    asyncio.run(net.run())
    assert not net.verdicts and net.count("void") == 1
    assert all((record.votes, record.silent) == (0, 1) for record in net.duels.records.values())
    assert [net.stake(judge) for judge in net.judges] == [4 * MICRO] * 3


def test_without_judges_there_is_no_verdict() -> None:
    net = Net(judges=0)
    asyncio.run(net.run())
    assert net.count("void") == 1 and not net.verdicts


def test_an_executor_that_does_not_stand_by_its_answer_has_lost_here() -> None:
    net = Net()
    net.bad.signs = False
    asyncio.run(net.run())
    assert net.results == [(net.bad.name, False)] and net.count("void") == 1 and not net.verdicts


def test_an_executor_signs_once_what_it_answered_and_remembers_no_more_than_it_should(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attestor_module, "ANSWERS_KEPT", 10)
    node, origin, rival = Node(), Identity.generate(), Identity.generate()
    for k in range(50):
        node.attestor.answered(origin.name, "r", str(k), f"secret {k}")
    assert len(node.attestor._answered) == 10

    def opening(secret: str, request: str = "r", who: Identity = origin, nonce: str = "n") -> DuelOpening:
        parties = sorted([Party(node.name, committed(secret)), Party(rival.name, "c")], key=lambda each: each.name)
        return DuelOpening(who.name, "", request, *parties, committed(nonce), None).signed(who)

    def asked(opening: DuelOpening, answer: str, sender: str = origin.name) -> bytes:
        return node.attestor.attest(sender, msgspec.json.encode(Attest(opening, answer)))

    good = opening("secret 49")
    signed = msgspec.json.decode(asked(good, "49"), type=Answer)
    verify_answer(signed, good, Party(node.name, committed("secret 49")))
    assert (signed.executor, signed.duel, signed.answer, signed.secret) == (node.name, good.name(), "49", "secret 49")
    assert asked(good, "49") == asked(good, "49")  # it may come again
    for bad, answer, sender, message in (
        (opening("secret 49", nonce="other"), "49", origin.name, "signed for another duel"),
        (opening("secret 3"), "3", origin.name, "not answered here"),
        (opening("secret 48"), "47", origin.name, "not answered here"),
        (opening("secret 48", request="s"), "48", origin.name, "not answered here"),
        (opening("secret 48"), "48", rival.name, "not a duel of its sender"),
        (opening("secret 48", who=rival), "48", rival.name, "not answered here"),
        (msgspec.structs.replace(opening("secret 48"), signature=good.signature), "48", origin.name, "signed"),
        (msgspec.structs.replace(opening("secret 48"), epoch="e").signed(origin), "48", origin.name, "epoch"),
    ):
        with pytest.raises(Declined, match=message):
            asked(bad, answer, sender)
    assert b"secret 48" in asked(opening("secret 48"), "48")  # what was refused did not use it up


def test_nothing_is_left_of_duels_that_end_anyhow(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        net = Net()
        monkeypatch.setattr(duel, "SECOND_S", 0.05)
        monkeypatch.setattr(duel, "JUDGE_S", 0.05)
        generator = np.random.default_rng(1)
        request = net.request

        async def sometimes(peer: str, path: str, body: bytes) -> bytes:
            await asyncio.sleep([0.0, 0.0, 0.0, 1.0][generator.integers(4)])
            return await request(peer, path, body)

        net.request = sometimes  # type: ignore[method-assign]

        async def hand(name: str, attempt: Attempt) -> str:
            luck = generator.integers(8)
            if luck == 0:
                raise RetryableError("no")
            if luck == 1:
                await attempt.start(200, "text/event-stream")
                raise Failed(502, "it broke off")
            if luck == 2 and attempt.race.first is not None:
                await asyncio.sleep(3600)
            await attempt.start(200, "text/event-stream")
            for chunk in stream(f"{net.answers[name]} {generator.random()}"):
                await asyncio.sleep(0)
                await attempt.pass_on(chunk)
            net.take(name, attempt)
            return name

        async def one() -> None:
            patience_s = 0.0005 if generator.random() < 0.2 else 5.0
            with contextlib.suppress(RetryableError, Failed, TimeoutError):
                run = net.duels.run(COMPLETION, (net.good.name, net.bad.name), hand, User())
                await asyncio.wait_for(run, patience_s)

        for _ in range(10):
            await asyncio.gather(*(one() for _ in range(20)))
        until_s = asyncio.get_running_loop().time() + 120
        while net.duels.open:
            assert asyncio.get_running_loop().time() < until_s
            await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert net.count("won") > 10 and net.count("void") > 10
        assert sum(net.count(outcome) for outcome in ("won", "tie", "void")) == 200
        assert sum(net.stakes.stake(name) for name in net.nodes) <= 4 * MICRO * len(net.nodes)
        assert all(node.judge_pool.judging == 0 for node in net.judges)

    asyncio.run(run())


def test_a_node_that_ends_ends_its_duels() -> None:
    async def run() -> None:
        net = Net()

        async def hand(name: str, attempt: Attempt) -> str:
            if name == net.bad.name:
                await asyncio.sleep(3600)
            return await net.hand(name, attempt)

        await net.duels.run(COMPLETION, (net.good.name, net.bad.name), hand, User())
        assert net.duels.open == 1
        await net.duels.stop()
        assert net.duels.open == 0 and asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
