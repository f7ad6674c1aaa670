"""Judges of duels: how they are drawn, what they check, what they are paid, and how those that cheat are found."""

import asyncio
from typing import Any

import msgspec
import numpy as np
import pytest
from duel_net import BODY, PATH, Net, Node, staked, stream

from wwwserve.agents.protocol import MICRO, MINORITY_SHARE, VOTE_A, VOTE_B, VOTE_UNDECIDED
from wwwserve.serving.duel import judge_pool
from wwwserve.serving.duel.evidence import as_shown, b_first, chance_of_bias, record_of
from wwwserve.serving.duel.judge import WORTHLESS, vote_by
from wwwserve.serving.duel.messages import JUDGED_TOKENS, Declined, Pair
from wwwserve.serving.ledger.accounts import Came
from wwwserve.serving.ledger.statements import digest
from wwwserve.serving.ledger.verdicts import Answer, Case, DuelOpening, Party, committed, decode, jury

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
