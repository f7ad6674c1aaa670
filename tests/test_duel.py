"""Duels between answers, with identities, statements and stakes as they are, and the network between them left out."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest

from wwwserve.agents.protocol import MICRO, MINORITY_SHARE, SILENT_SHARE, VOTE_A, VOTE_B, VOTE_UNDECIDED
from wwwserve.serving.duel import duels as duel
from wwwserve.serving.duel.duels import ATTEST_PATH, JUDGE_PATH, Attempt, Attestor, Declined, Duels, JudgePool, Pair
from wwwserve.serving.duel.evidence import as_shown, b_first, chance_of_bias, draw, in_order, record_of
from wwwserve.serving.duel.judge import JudgeError
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.reply import CompletionRequest, Failed, Reply, RetryableError
from wwwserve.serving.http.sse import LAST_EVENT
from wwwserve.serving.ledger.stakes import Answer, Stake, Staked, Stakes, Verdict, decode
from wwwserve.serving.ledger.statements import digest, sign
from wwwserve.serving.metrics import Metrics

PATH = "/v1/chat/completions"
BODY = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "Why?"}], "stream": True})
COMPLETION = CompletionRequest(PATH, BODY, "m", True)
Hand = Callable[[str, Attempt], Awaitable[Any]]


def event(text: str) -> bytes:
    return b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}) + b"\n\n"


def stream(text: str) -> list[bytes]:
    return [*(event(word) for word in text.split()), LAST_EVENT]


class User(Reply):
    """Who asked."""

    def __init__(self) -> None:
        super().__init__()
        self.body = b""

    async def start(self, status: int, content_type: str) -> None:
        self.started = True

    async def pass_on(self, chunk: bytes) -> None:
        self.body += chunk

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        self.started, self.body = True, body


class Node:
    """A peer: it signs what it answered, and judges, by default for the longer answer."""

    def __init__(self) -> None:
        self.identity = Identity.generate()
        self.name = self.identity.name
        self.attestor = Attestor(self.identity)
        self.judge_pool = JudgePool(self.identity, self.judge, Metrics())
        self.opinion: Callable[[str, str], int] = lambda first, second: VOTE_A if len(first) > len(second) else VOTE_B
        self.signs = True

    async def judge(self, path: str, request: dict[str, Any], answers: tuple[str, str]) -> int:
        assert (path, request) == (PATH, orjson.loads(BODY))
        return self.opinion(*answers)


class Net:
    """An origin, which stakes nothing, two executors and some judges, all with 4 credits at stake."""

    def __init__(self, judges: int = 3) -> None:
        self.origin, self.good, self.bad = Node(), Node(), Node()
        self.judges = [Node() for _ in range(judges)]
        self.nodes = {node.name: node for node in (self.good, self.bad, *self.judges)}
        self.stakes = Stakes({name: 100 * MICRO for name in self.nodes})
        for name, node in self.nodes.items():
            self.stakes.heard(staked(node, 1, 4 * MICRO))
            assert self.stakes.stake(name) == 4 * MICRO
        self.verdicts: list[Verdict] = []
        self.results: list[tuple[str, bool]] = []
        self.metrics = Metrics()
        self.duels = Duels(self.origin.identity, self, self.metrics, judges=3)
        self.answers = {self.good.name: "it is long and good", self.bad.name: "bad"}

    def electors(self, model: str) -> dict[str, int]:
        return {name: self.stakes.stake(name) for name in self.nodes}

    async def request(self, peer: str, path: str, body: bytes) -> bytes:
        node = self.nodes[peer]
        try:
            if path == ATTEST_PATH and node.signs:
                return node.attestor.attest(self.origin.name, body)
            if path == JUDGE_PATH:
                return await node.judge_pool.vote(self.origin.name, body)
        except Declined as refused:
            raise OSError(str(refused)) from None
        raise OSError("no answer")

    def duelled(self, peer: str, won: bool) -> None:
        self.results.append((peer, won))

    def staked(self, peer: str) -> Staked | None:
        return self.stakes.latest.get(peer)

    def settle(self, verdict: Verdict) -> None:
        stated = decode(msgspec.json.encode(verdict))  # as whoever hears of it checks it
        assert stated == verdict and self.stakes.heard(stated)
        self.verdicts.append(verdict)

    async def hand(self, name: str, attempt: Attempt) -> str:
        await attempt.start(200, "text/event-stream")
        for chunk in stream(self.answers[name]):
            await asyncio.sleep(0)
            await attempt.pass_on(chunk)
        self.nodes[name].attestor.answered(self.origin.name, digest(BODY), digest(attempt.body))
        return name

    async def run(self, hand: Hand | None = None, completion: CompletionRequest = COMPLETION) -> User:
        """One duel to its end."""
        user = User()
        await self.duels.run(completion, (self.good.name, self.bad.name), hand or self.hand, user)
        while self.duels.open:
            await asyncio.sleep(0.001)
        return user

    def count(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("wwwserve_duels_total", {"outcome": outcome}) or 0.0

    def stake(self, node: Node) -> int:
        return self.stakes.stake(node.name)


def staked(node: Node, number: int, amount: int) -> Staked:
    stake = Stake(node.name, number, amount)
    return Staked(stake, sign(node.identity, "stake", stake))


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
            net.nodes[name].attestor.answered(net.origin.name, digest(BODY), digest(body))
            await attempt.whole(200, "application/json", body)

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
            net.bad.attestor.answered(net.origin.name, digest(BODY), digest(attempt.body))
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


def test_a_silent_judge_is_fined() -> None:
    async def run() -> None:
        net = Net()
        del net.nodes[net.judges[0].name].judge_pool
        request = net.request

        async def without(peer: str, path: str, body: bytes) -> bytes:
            if peer == net.judges[0].name:
                raise OSError("nobody there")
            return await request(peer, path, body)

        net.request = without  # type: ignore[method-assign]
        await net.run()
        fine = 4 * MICRO // SILENT_SHARE
        assert net.stake(net.judges[0]) == 4 * MICRO - fine
        assert sorted(net.stake(judge) for judge in net.judges[1:]) == [4 * MICRO + fine // 2] * 2
        assert net.stake(net.bad) == 0 and net.duels.records[net.judges[0].name].silent == 1

    asyncio.run(run())


def test_a_judge_who_is_outvoted_is_fined() -> None:
    net = Net()
    net.judges[1].opinion = lambda first, second: VOTE_B if len(first) > len(second) else VOTE_A
    asyncio.run(net.run())
    assert net.stake(net.judges[1]) == 4 * MICRO - 4 * MICRO // MINORITY_SHARE
    assert net.duels.records[net.judges[1].name].outvoted == 1 and net.stake(net.good) == 8 * MICRO


def test_a_tie_moves_nothing() -> None:
    net = Net(judges=2)
    net.judges[0].opinion = lambda first, second: VOTE_A if len(first) < len(second) else VOTE_B
    asyncio.run(net.run())
    assert net.count("tie") == 1 and net.results == []
    assert [net.stake(node) for node in net.nodes.values()] == [4 * MICRO] * 4


def test_judges_whose_engines_cannot_say_are_undecided_and_not_fined() -> None:
    def cannot(first: str, second: str) -> int:
        raise JudgeError("no log-probabilities here")

    net = Net()
    for judge in net.judges:
        judge.opinion = cannot
    asyncio.run(net.run())
    [verdict] = net.verdicts
    assert [vote.vote for vote in verdict.votes] == [VOTE_UNDECIDED] * 3 and net.count("tie") == 1
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


def test_an_executor_signs_only_what_it_answered_and_remembers_no_more_than_it_should(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duel, "ANSWERS_KEPT", 10)
    node = Node()
    for k in range(50):
        node.attestor.answered("o", "r", str(k))
    assert len(node.attestor._answered) == 10

    def asked(origin: str, answer: str) -> bytes:
        return node.attestor.attest(origin, msgspec.json.encode(duel.Attest("r", answer)))

    signed = msgspec.json.decode(asked("o", "49"), type=Answer)
    duel._check_answer(signed)
    assert (signed.executor, signed.request, signed.answer) == (node.name, "r", "49")
    for origin, answer in (("o", "3"), ("p", "49"), ("o", "x")):
        with pytest.raises(Declined, match="not answered here"):
            asked(origin, answer)


# The origin chooses neither the judges nor the order.


def pair(net: Net, **changed: Any) -> tuple[Pair, str]:
    """A pair that is in order, and a judge on whom the draw falls."""
    texts = {node.name: b"".join(stream(net.answers[node.name])).decode() for node in (net.good, net.bad)}
    signed = [
        Answer(node.name, digest(BODY), digest(texts[node.name].encode())).signed(node.identity)
        for node in (net.good, net.bad)
    ]
    a, b = in_order(*signed)
    electors = {judge.name: 4 * MICRO for judge in net.judges}
    whole = Pair(
        PATH, True, BODY.decode(), a, b, texts[a.executor], texts[b.executor], tuple(sorted(electors.items())), 3
    )
    return msgspec.structs.replace(whole, **changed), draw(a, b, electors, 3).judges[0]


def test_a_judge_sees_that_the_origin_cheats() -> None:
    net = Net(judges=5)
    whole, judge = pair(net)
    pool = net.nodes[judge].judge_pool
    swapped = {"a": whole.b, "b": whole.a, "answer_a": whole.answer_b, "answer_b": whole.answer_a}
    drawn = draw(whole.a, whole.b, dict(whole.electors), 3).judges
    left_out = next(node for node in net.judges if node.name not in drawn)
    cases = [
        (swapped, pool, "not for the origin to say"),
        ({"answer_a": whole.answer_b}, pool, "not the one that its executor signed"),
        ({"request": '{"model": "m", "messages": []}'}, pool, "not the one that its executor signed"),
        ({"a": msgspec.structs.replace(whole.a, signature=whole.b.signature)}, pool, "signed|for the origin"),
        ({"electors": (*whole.electors, whole.electors[0])}, pool, "twice"),
        ({"electors": (*whole.electors, (net.good.name, 1))}, pool, "none of them"),
        ({}, left_out.judge_pool, "does not fall on this node"),
        ({"path": "/v1/load_lora_adapter"}, pool, "path is"),
        ({"path": PATH + " HTTP/1.1\r\n\r\nDELETE /x"}, pool, "path is"),
        ({"electors": tuple(each for each in whole.electors if each[0] != judge)}, pool, "does not fall"),
    ]  # fmt: skip
    for changed, who, message in cases:
        body = msgspec.json.encode(msgspec.structs.replace(whole, **changed))
        with pytest.raises(Declined, match=message):
            asyncio.run(who.vote(net.origin.name, body))
    with pytest.raises(Declined, match="not a pair"):
        asyncio.run(pool.vote(net.origin.name, b'{"path": "\xff"}'))
    vote = asyncio.run(pool.vote(net.origin.name, msgspec.json.encode(whole)))
    assert b"signature" in vote


def test_a_judge_judges_a_few_at_once() -> None:
    async def run() -> None:
        net = Net()
        whole, judge = pair(net)
        wait = asyncio.Event()

        async def slow(path: str, request: dict[str, Any], answers: tuple[str, str]) -> int:
            await wait.wait()
            return VOTE_A

        pool = net.nodes[judge].judge_pool
        pool.judge = slow
        body = msgspec.json.encode(whole)
        votes = [asyncio.create_task(pool.vote(net.origin.name, body)) for _ in range(duel.MOST_JUDGING)]
        await asyncio.sleep(0)
        with pytest.raises(Declined, match="enough"):
            await pool.vote(net.origin.name, body)
        votes[0].cancel()
        await asyncio.sleep(0)
        wait.set()
        await asyncio.gather(*votes, return_exceptions=True)
        assert pool.judging == 0

    asyncio.run(run())


def test_judges_are_drawn_by_stake_and_answers_are_shown_in_random_order() -> None:
    net = Net(judges=0)
    electors = {f"j{k}": (k + 1) * MICRO for k in range(4)}
    times, first, shown_first = dict.fromkeys(electors, 0), 0, 0
    for k in range(2000):
        answers = [Answer(name, "r", digest(b"%d%b" % (k, name.encode())), "s") for name in ("x", "y")]
        a, b = in_order(*answers)
        assert in_order(b, a) == (a, b)
        drawn = draw(a, b, electors, 1)
        times[drawn.judges[0]] += 1
        first += a.executor == "x"
        shown_first += not b_first(drawn.duel, drawn.judges[0])
        for vote in (VOTE_A, VOTE_B, VOTE_UNDECIDED):
            assert as_shown(as_shown(vote, drawn.duel, "j"), drawn.duel, "j") == vote
    np.testing.assert_allclose([count / 2000 for count in times.values()], [0.1, 0.2, 0.3, 0.4], atol=0.05)
    assert abs(first - 1000) < 4 * 22.4 and abs(shown_first - 1000) < 4 * 22.4
    assert net.duels.open == 0


# Judges that cheat.


def test_a_judge_that_always_votes_for_the_first_is_found_and_pays() -> None:
    """In random order its vote is a coin, so it ends outvoted half of the time, and the votes it signed show it."""

    async def run() -> None:
        net = Net()
        lazy = net.judges[0]
        lazy.opinion = lambda first, second: VOTE_A
        for k in range(60):
            net.answers = {net.good.name: f"it is long and good {k}", net.bad.name: f"bad {k}"}
            await net.run()
        evidence = [decode(msgspec.json.encode(verdict)) for verdict in net.verdicts]
        records = {judge: record_of(evidence, judge.name) for judge in net.judges}  # type: ignore[arg-type]
        assert records[lazy] == net.duels.records[lazy.name] and records[lazy].votes == 60
        assert records[lazy].said_first == 60 and chance_of_bias(60, 60) < 1e-15
        assert 15 < records[lazy].outvoted < 45
        for honest in net.judges[1:]:
            assert records[honest].outvoted == 0 and chance_of_bias(records[honest].said_first, 60) > 1e-4
            assert net.stake(honest) > 4 * MICRO
        assert net.stake(lazy) < 4 * MICRO
        assert net.count("won") == 60 and net.stake(net.bad) == 0

    asyncio.run(run())


def test_the_chance_of_bias_is_that_of_a_fair_coin() -> None:
    assert chance_of_bias(5, 10) == 1.0 and chance_of_bias(0, 0) == 1.0
    assert chance_of_bias(10, 10) == chance_of_bias(0, 10) == 2 / 1024
    assert chance_of_bias(9, 10) == pytest.approx(22 / 1024)


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
            net.nodes[name].attestor.answered(net.origin.name, digest(BODY), digest(attempt.body))
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
