"""Stake: what verdicts move, what they need, and what a node may stake."""

import itertools

import msgspec
import pytest
from duel_cases import case_of, side_of, staked, verdict_on
from ledger_sides import A, B, C, Sides, play, written

from wwwserve.agents.protocol import MICRO, VOTE_A, VOTE_B
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import StatementError, digest
from wwwserve.serving.ledger.verdicts import Twice, Verdict, decode


def test_a_verdict_moves_stake_as_the_rules_say_in_whatever_order_it_is_heard() -> None:
    judges = sorted((Identity.generate() for _ in range(4)), key=lambda each: each.name)
    funds = {who.name: 4 * MICRO for who in (A, B, C, *judges)}
    alone = Stakes(funds, agreed=True)
    cases = [case_of(alone, C, A, B, nonce=str(k), height=1 + k) for k in range(3)]
    heard = [
        verdict_on(cases[0], dict.fromkeys(judges[:3], side_of(cases[0], A)) | {judges[3]: side_of(cases[0], B)}),
        verdict_on(cases[1], dict.fromkeys(judges[:3], side_of(cases[1], B))),
        verdict_on(cases[2], {judge: side_of(cases[2], A if k % 2 else B) for k, judge in enumerate(judges)}),
    ]
    heard = [decode(msgspec.json.encode(each)) for each in heard]
    assert alone.heard(heard[0]) and not alone.heard(heard[0])
    assert [alone.stake(who.name) for who in (A, B)] == [4 * MICRO, 0]
    fine = 2 * MICRO // 5
    assert [alone.funds[who.name] - 4 * MICRO for who in judges] == [
        fine - 2 * (fine // 3),
        fine // 3,
        fine // 3,
        -fine,
    ]
    assert alone.height(A.name) == 1 and not alone.heard(heard[2])  # a tie
    results = set()
    for order in itertools.permutations(range(3)):
        stakes = Stakes(funds, agreed=True)
        for k in order:
            stakes.heard(heard[k])
        assert sum(stakes.funds.values()) == sum(funds.values()) and min(stakes.funds.values()) >= 0
        results.add(tuple(stakes.funds.items()))
    moved = {A.name: 2 * MICRO, B.name: 6 * MICRO, C.name: 4 * MICRO}
    assert results == {tuple((alone.funds | moved).items())}
    alone.heard(staked(B, MICRO, 2))
    assert alone.stake(B.name) == MICRO  # it stakes anew out of what it has left


def test_verdicts_without_evidence_are_refused() -> None:
    judge, other = Identity.generate(), Identity.generate()
    stakes = Stakes({who.name: 4 * MICRO for who in (A, B, C, judge, other)}, agreed=True)
    case = case_of(stakes, C, A, B)
    good = verdict_on(case, {judge: VOTE_A, other: VOTE_A})
    decode(msgspec.json.encode(good))
    one, two = good.votes
    a, b, opening = case.a, case.b, case.opening

    def changed(**changes: object) -> Verdict:
        return verdict_on(msgspec.structs.replace(case, **changes), {judge: VOTE_A})

    for bad in (
        changed(a=msgspec.structs.replace(a, answer=digest(b"other"))),
        changed(a=b),
        changed(a=b, b=a),
        changed(secret="another"),
        changed(opening=msgspec.structs.replace(opening, request=digest(b"other"))),
        changed(opening=msgspec.structs.replace(opening, origin=A.name).signed(A)),
        changed(opening=msgspec.structs.replace(opening, bond=None).signed(C)),
        changed(opening=msgspec.structs.replace(opening, bond=staked(C, 1)).signed(C)),
        changed(a=msgspec.structs.replace(a, stake=staked(other, MICRO)).signed(A if a.executor == A.name else B)),
        msgspec.structs.replace(good, votes=(msgspec.structs.replace(one, vote=VOTE_B), two)),
        msgspec.structs.replace(good, votes=(one, one)),
        msgspec.structs.replace(good, votes=(msgspec.structs.replace(one, judge=other.name),)),
        msgspec.structs.replace(good, votes=(msgspec.structs.replace(one, vote=7).signed(judge),)),
        Verdict(case_of(stakes, C, A, B, nonce="m"), good.votes),
    ):
        with pytest.raises(StatementError):
            decode(msgspec.json.encode(bad))


def test_who_signs_two_stakes_of_one_number_has_none() -> None:
    stakes = Stakes({A.name: 4 * MICRO})
    assert stakes.heard(staked(A, MICRO)) and not stakes.heard(staked(A, MICRO))
    assert stakes.stake(A.name) == MICRO
    stakes.heard(staked(A, 2 * MICRO))
    assert stakes.stake(A.name) == 0
    [proof] = stakes.fresh
    other = Stakes({A.name: 4 * MICRO})
    other.heard(staked(A, MICRO, 2))
    assert other.heard(decode(msgspec.json.encode(proof))) and other.stake(A.name) == 0  # whoever hears of it can tell
    assert other.losses() == [(A.name, "twice")]
    for forged in (
        Twice(staked(A, 1), staked(A, 1)),
        Twice(staked(A, 1), staked(A, 2, 2)),
        Twice(staked(A, 1), staked(B, 2)),
    ):
        with pytest.raises(StatementError):
            decode(msgspec.json.encode(forged))


def test_what_is_staked_is_at_most_what_was_granted_and_numbers_go_on_after_a_restart(sides: Sides) -> None:
    async def scene() -> None:
        first = await written(sides.a, sides.a.restake(10 * MICRO))
        assert first == staked(A, 10 * MICRO, first.stake.number)
        assert sides.a.stakes.stake(A.name) == 4 * MICRO
        sides.kill(A)
        assert await sides.a.restake(MICRO) is None  # before a peer has told what it knows
        await sides.exchange()
        again = await written(sides.a, sides.a.restake(MICRO))
        assert again == staked(A, MICRO, again.stake.number) and again.stake.number > first.stake.number
        assert await sides.a.restake(MICRO) is None
        sides.a.heard(B.name, msgspec.json.encode(staked(A, 2 * MICRO, again.stake.number)))
        assert await sides.a.restake(2 * MICRO) is None  # it would count for nothing

    play(scene)
