"""Duels between answers, with identities, statements and stakes as they are, and the network between them left out."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest

from wwwserve.agents.protocol import MICRO, MINORITY_SHARE, VOTE_A, VOTE_B, VOTE_UNDECIDED
from wwwserve.serving.duel import attestor as attestor_module
from wwwserve.serving.duel import duels as duel
from wwwserve.serving.duel import judge_pool
from wwwserve.serving.duel.attestor import Attestor
from wwwserve.serving.duel.duels import Attempt, Duels
from wwwserve.serving.duel.evidence import as_shown, b_first, chance_of_bias, record_of
from wwwserve.serving.duel.judge import WORTHLESS, JudgeError, vote_by
from wwwserve.serving.duel.judge_pool import JudgePool
from wwwserve.serving.duel.messages import ATTEST_PATH, JUDGE_PATH, JUDGED_TOKENS, Attest, Declined, Pair
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.reply import CompletionRequest, Failed, Reply, RetryableError
from wwwserve.serving.http.sse import LAST_EVENT
from wwwserve.serving.ledger.accounts import Came
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import digest, sign
from wwwserve.serving.ledger.verdicts import (
    Answer,
    Case,
    DuelOpening,
    Party,
    Stake,
    Staked,
    Verdict,
    committed,
    decode,
    jury,
    verify_answer,
)
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
        self.join(None)
        self.opinion: Callable[[str, str], int] = lambda first, second: VOTE_A if len(first) > len(second) else VOTE_B
        self.signs = True

    def join(self, stakes: Stakes | None) -> None:
        """It knows what all have at stake."""
        self.attestor = Attestor(self.identity, stakes)
        self.judge_pool = JudgePool(self.identity, self.judge, Metrics(), stakes)

    async def judge(self, path: str, request: dict[str, Any], answers: tuple[str, str]) -> int:
        assert (path, request) == (PATH, orjson.loads(BODY))
        return self.opinion(*answers)


class Net:
    """An origin, two executors and some judges, all of one epoch and with 4 credits at stake."""

    def __init__(self, judges: int = 3, panel: int = 3, agreed: bool = True) -> None:
        self.origin, self.good, self.bad = Node(), Node(), Node()
        self.judges = [Node() for _ in range(judges)]
        self.nodes = {node.name: node for node in (self.good, self.bad, *self.judges)}
        self.stakes = Stakes({name: 100 * MICRO for name in (self.origin.name, *self.nodes)}, agreed=agreed)
        for node in (self.origin, *self.nodes.values()):
            self.stakes.heard(staked(node, 1, 4 * MICRO))
            assert self.stakes.stake(node.name) == 4 * MICRO
            node.join(self.stakes)
        self.verdicts: list[Verdict] = []
        self.results: list[tuple[str, bool]] = []
        self.paid: list[tuple[str, bool]] = []
        self.metrics = Metrics()
        self.duels = Duels(self.origin.identity, self, self.metrics, judges=panel, stakes=self.stakes)
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

    async def vote(self, judge: str, pair: Pair) -> bytes:
        return await self.request(judge, JUDGE_PATH, msgspec.json.encode(pair))

    def duelled(self, peer: str, won: bool) -> None:
        self.results.append((peer, won))

    def settle(self, verdict: Verdict) -> None:
        stated = decode(msgspec.json.encode(verdict))  # as whoever hears of it checks it
        assert stated == verdict and self.stakes.heard(stated)
        self.verdicts.append(verdict)

    async def hand(self, name: str, attempt: Attempt) -> str:
        await attempt.start(200, "text/event-stream")
        for chunk in stream(self.answers[name]):
            await asyncio.sleep(0)
            await attempt.pass_on(chunk)
        self.take(name, attempt)
        return name

    def take(self, name: str, attempt: Attempt) -> None:
        """An executor has answered all, which is not paid yet."""
        secret = f"secret of {name} {len(self.paid)} {digest(bytes(attempt.body))}"
        attempt.commitment = committed(secret)
        attempt.owed = lambda signed: self.paid.append((name, signed))
        self.nodes[name].attestor.answered(self.origin.name, digest(BODY), digest(bytes(attempt.body)), secret)

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


def test_judges_whose_engines_cannot_say_are_undecided_and_not_fined() -> None:
    def cannot(first: str, second: str) -> int:
        raise JudgeError("no log-probabilities here")

    net = Net()
    for judge in net.judges:
        judge.opinion = cannot
    asyncio.run(net.run())
    assert not net.verdicts and net.count("tie") == 1
    assert all(record.undecided == 1 for record in net.duels.records.values())
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


# The origin chooses neither the judges nor the order.


def pair(net: Net, height: int = 1, nonce: str = "n", **changed: Any) -> tuple[Pair, str]:
    """A pair that is in order, and a judge on whom the draw falls."""
    executors = sorted((net.good, net.bad), key=lambda node: node.name)
    texts = [b"".join(stream(net.answers[node.name])).decode() for node in executors]
    parties = [Party(node.name, committed(f"secret {node.name}")) for node in executors]
    opening = DuelOpening(
        net.origin.name, net.stakes.epoch, digest(BODY), *parties, committed(nonce), net.stakes.latest[net.origin.name]
    ).signed(net.origin.identity)
    answers = [
        Answer(
            node.name, opening.name(), digest(text.encode()), f"secret {node.name}", net.stakes.latest[node.name]
        ).signed(node.identity)
        for node, text in zip(executors, texts, strict=True)
    ]
    case = Case(opening, nonce, height, *answers)
    whole = Pair(case, PATH, True, BODY.decode(), *texts)
    changed = {"case": msgspec.structs.replace(case, **changed.pop("in_case", {})), **changed}
    return msgspec.structs.replace(whole, **changed), next(iter(net.stakes.jury(case).weights))


def test_a_judge_sees_that_the_origin_cheats() -> None:
    net = Net(judges=5)
    whole, judge = pair(net)
    case, pool = whole.case, net.nodes[judge].judge_pool
    a, b, opening = case.a, case.b, case.opening

    def opened(**changes: Any) -> dict[str, Any]:
        return {"opening": msgspec.structs.replace(opening, **changes).signed(net.origin.identity)}

    other_stake = staked(net.good, 1, MICRO)
    signed_b = msgspec.structs.replace(b, stake=other_stake, signature="")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"a": b, "b": a}, "not the one that its executor|not of this duel"),
        ({"a": msgspec.structs.replace(a, signature=b.signature)}, "signed"),
        ({"a": msgspec.structs.replace(a, secret="guessed")}, "does not fall|committed itself"),
        ({"a": msgspec.structs.replace(a, stake=None)}, "at stake"),
        ({"b": signed_b.signed(net.bad.identity)}, "its own stake|signed"),
        ({"secret": "guessed"}, "does not fall|committed itself"),
        (opened(a=opening.b, b=opening.a), "order of their names|not of this duel"),
        (opened(request=digest(b"other")), "not the one that was asked"),
        (opened(commitment=committed("other")), "committed itself"),
        (opened(epoch="another"), "another epoch"),
        (opened(bond=None), "bond"),
        (opened(bond=staked(net.origin, 1, MICRO - 1)), "bond"),
        (opened(bond=staked(net.good, 1, MICRO)), "bond"),
        (opened(a=Party(judge, committed("x"))), "none of them"),
        ({"height": 0}, "height"),
        ({"height": 1 + judge_pool.MOST_AHEAD}, "height"),
    ]  # fmt: skip
    for in_case, message in cases:
        body = msgspec.json.encode(msgspec.structs.replace(whole, case=msgspec.structs.replace(case, **in_case)))
        with pytest.raises(Declined, match=message):
            asyncio.run(pool.vote(net.origin.name, body))
    for changed, message in (
        ({"answer_a": whole.answer_b}, "not the one that its executor signed"),
        ({"request": '{"model": "m", "messages": []}'}, "not the one that was asked"),
        ({"path": "/v1/load_lora_adapter"}, "path is"),
        ({"path": PATH + " HTTP/1.1\r\n\r\nDELETE /x"}, "path is"),
    ):
        with pytest.raises(Declined, match=message):
            asyncio.run(pool.vote(net.origin.name, msgspec.json.encode(msgspec.structs.replace(whole, **changed))))
    with pytest.raises(Declined, match="not a pair"):
        asyncio.run(pool.vote(net.origin.name, b'{"path": "\xff"}'))
    with pytest.raises(Declined, match="who asks"):
        asyncio.run(pool.vote(net.good.name, msgspec.json.encode(whole)))
    stranger = Node()
    stranger.join(net.stakes)
    with pytest.raises(Declined, match="does not fall on this node"):
        asyncio.run(stranger.judge_pool.vote(net.origin.name, msgspec.json.encode(whole)))
    assert b"signature" in asyncio.run(pool.vote(net.origin.name, msgspec.json.encode(whole)))
    net.stakes.heard(staked(net.origin, 2, 0))  # which has withdrawn its bond meanwhile
    late, judge = pair(net, nonce="late")
    body = msgspec.json.encode(late)
    with pytest.raises(Declined, match="too little at stake"):
        asyncio.run(net.nodes[judge].judge_pool.vote(net.origin.name, body))


def test_a_judge_votes_once_on_a_duel() -> None:
    net = Net()
    whole, judge = pair(net)
    pool = net.nodes[judge].judge_pool
    body = msgspec.json.encode(whole)
    assert asyncio.run(pool.vote(net.origin.name, body)) == asyncio.run(pool.vote(net.origin.name, body))
    later = msgspec.structs.replace(whole, case=msgspec.structs.replace(whole.case, height=2))
    with pytest.raises(Declined, match="judged that duel already"):
        asyncio.run(pool.vote(net.origin.name, msgspec.json.encode(later)))


class Fee:
    """What a vote is paid with."""

    def __init__(self) -> None:
        self.tokens, self.ended = [], []

    def charge(self, tokens: int) -> "Fee":
        self.tokens.append(tokens)
        return self

    def end(self, answer: str, came: Came) -> None:
        self.ended.append((answer, came.tokens, came.whole))


def test_a_vote_is_paid_once_before_anything_is_computed_and_none_is_if_there_is_no_vote() -> None:
    async def run() -> None:
        net, fee = Net(), Fee()
        whole, judge = pair(net)
        pool, body, asked = net.nodes[judge].judge_pool, msgspec.json.encode(whole), []

        def unpaid(tokens: int) -> Fee:
            raise Declined("it is not paid")

        async def counted(*what: Any) -> int:
            asked.append(what)
            await asyncio.sleep(0.01)
            return VOTE_A

        pool.judge = counted
        with pytest.raises(Declined, match="not paid"):
            await pool.vote(net.origin.name, body, unpaid)
        assert not asked and not fee.ended
        voting = asyncio.create_task(pool.vote(net.origin.name, body, fee.charge))
        await asyncio.sleep(0)
        voting.cancel()
        await asyncio.gather(voting, return_exceptions=True)
        assert fee.ended == [(digest(b""), 0, False)]
        vote = await pool.vote(net.origin.name, body, fee.charge)
        assert fee.ended[1:] == [(digest(vote), JUDGED_TOKENS, True)] and fee.tokens == [whole.prompt()] * 2
        assert await pool.vote(net.origin.name, body, fee.charge) == vote and len(fee.ended) == 2
        with pytest.raises(Declined):  # what is not this one's to judge costs nothing
            await pool.vote(net.good.name, msgspec.json.encode(pair(net, nonce="m")[0]), fee.charge)
        assert len(fee.tokens) == 2 and whole.prompt() * 2 >= len(BODY) + len(whole.answer_a) + len(whole.answer_b)

    asyncio.run(run())


def test_an_origin_has_a_share_of_a_judges_time_and_others_have_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_pool, "JUDGED_BURST_S", 0.05)

    async def run() -> None:
        net, other = Net(), Net()

        async def slow(path: str, request: dict[str, Any], answers: tuple[str, str]) -> int:
            await asyncio.sleep(0.1)
            return VOTE_A

        pool = net.judges[0].judge_pool
        pool.judge = slow
        await pool.vote(net.origin.name, msgspec.json.encode(pair(net)[0]))
        with pytest.raises(Declined, match="come again later"):
            await pool.vote(net.origin.name, msgspec.json.encode(pair(net, nonce="m")[0]))
        pool.stakes = other.stakes
        with pytest.raises(Declined, match="does not fall"):
            await pool.vote(other.origin.name, msgspec.json.encode(pair(other)[0]))
        quotas = judge_pool._Quotas()
        quotas.use("o", 40.0, 0.0)
        assert quotas.used_s("o", 100.0) == 40.0 - 100.0 * judge_pool.JUDGED_SHARE and quotas.used_s("o", 1e9) == 0.0

    asyncio.run(run())


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
        votes = [
            asyncio.create_task(pool.vote(net.origin.name, msgspec.json.encode(pair(net, nonce=str(k))[0])))
            for k in range(judge_pool.MOST_JUDGING)
        ]
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
    electors = {f"j{k}": (k + 1) * MICRO for k in range(4)}
    times, shown_first = dict.fromkeys(electors, 0), 0
    for k in range(2000):
        seed = digest(b"%d" % k)
        drawn = jury(electors | {"x": 50 * MICRO, "none": 0}, ("x",), seed).weights
        assert drawn.keys() == electors.keys() and drawn == electors  # all of so few, by their stake
        first = next(iter(drawn))
        times[first] += 1
        shown_first += not b_first(seed, first)
        for vote in (VOTE_A, VOTE_B, VOTE_UNDECIDED):
            assert as_shown(as_shown(vote, seed, "j"), seed, "j") == vote
    np.testing.assert_allclose([count / 2000 for count in times.values()], [0.1, 0.2, 0.3, 0.4], atol=0.05)
    assert abs(shown_first - 1000) < 4 * 22.4


def test_of_many_who_may_judge_seats_are_drawn_by_stake() -> None:
    electors = {f"j{k:03d}": MICRO for k in range(200)} | {"large": 100 * MICRO}
    drawn = [jury(electors, (), digest(b"%d" % k)) for k in range(50)]
    assert all(each.needed == 42 for each in drawn)
    assert jury(electors, ("large",), digest(b"")).needed == 64  # those who are left have too little of the stake
    seats = [each.weights for each in drawn]
    assert all(sum(each.values()) == 64 for each in seats)
    assert abs(sum(each["large"] for each in seats) / (50 * 64) - 1 / 3) < 4 * (2 / 9 / 3200) ** 0.5


@pytest.mark.parametrize(
    ("a", "b", "vote"),
    [
        (WORTHLESS + 0.01, WORTHLESS, VOTE_A),
        (-0.5, 1.0, VOTE_B),
        (0.3, 1.4, VOTE_UNDECIDED),  # both answer the question
        (-0.3, -2.0, VOTE_UNDECIDED),
        (1.0, float("-inf"), VOTE_A),
    ],
)
def test_a_judge_votes_against_a_worthless_answer_alone(a: float, b: float, vote: int) -> None:
    assert vote_by(a, b) == vote


# Judges that cheat.


def test_a_judge_that_always_votes_for_the_first_is_found_and_pays() -> None:
    """In random order its vote is a coin, so it ends outvoted half of the time, and the votes it signed show it."""

    async def run() -> None:
        net = Net(judges=5, panel=5)
        lazy = net.judges[0]
        lazy.opinion = lambda first, second: VOTE_A
        for k in range(60):
            net.answers = {net.good.name: f"it is long and good {k}", net.bad.name: f"bad {k}"}
            net.stakes.heard(staked(net.bad, k + 2, MICRO))
            await net.run()
        evidence = [decode(msgspec.json.encode(verdict)) for verdict in net.verdicts]
        records = {judge: record_of(evidence, judge.name) for judge in net.judges}  # type: ignore[arg-type]
        assert records[lazy] == net.duels.records[lazy.name] and records[lazy].votes == 60
        assert records[lazy].said_first == 60 and chance_of_bias(60, 60) < 1e-15
        assert 15 < records[lazy].outvoted < 45
        for honest in net.judges[1:]:
            assert records[honest].outvoted == 0 and chance_of_bias(records[honest].said_first, 60) > 1e-4
            assert net.stakes.funds[honest.name] > 100 * MICRO
        assert net.stakes.funds[lazy.name] == 100 * MICRO - records[lazy].outvoted * (MICRO // MINORITY_SHARE)
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
