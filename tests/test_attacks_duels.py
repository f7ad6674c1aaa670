"""Attacks of strangers on duels and stakes, each of which once did harm, and variants of them."""

import asyncio
import itertools
from typing import Any

import msgspec
import pytest
from duel_cases import case_of, side_of, staked, verdict_on

from wwwserve.agents.protocol import MICRO, VOTE_A
from wwwserve.serving.duel.judge_pool import JudgePool
from wwwserve.serving.duel.messages import Declined, Pair
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger import verdicts
from wwwserve.serving.ledger.channel_ledger import ChannelLedger
from wwwserve.serving.ledger.exchange import Telling
from wwwserve.serving.ledger.journal import MemoryJournal
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import Signed, State, StatementError, digest, sign
from wwwserve.serving.ledger.verdicts import Case, Conflict, Staked, Verdict, Vote, decode, jury
from wwwserve.serving.metrics import Metrics

FUND, STAKE = 40 * MICRO, 4 * MICRO
CHAT = "/v1/chat/completions"
# The victim, honest members, and two who cheat; whoever else there is has no part in the genesis.
VICTIM, *HONEST = (Identity.generate() for _ in range(6))
CHEAT, FRIEND = Identity.generate(), Identity.generate()
MEMBERS = (VICTIM, *HONEST, CHEAT, FRIEND)


def stakes_of(funds: dict[str, int] | None = None) -> Stakes:
    return Stakes(funds or {who.name: FUND for who in MEMBERS}, agreed=True)


def against(case: Case, loser: Identity, *judges: Identity) -> Verdict:
    return verdict_on(case, dict.fromkeys(judges, 3 - side_of(case, loser)))


def told(*statements: Any, funds: dict[str, int] | None = None) -> Stakes:
    """What an honest node takes for true after a peer has told it these, as they come over the network."""
    ledger = ChannelLedger(
        HONEST[0], MemoryJournal(), {}, stakes_of(funds).started, exposure=MICRO, payment=0, agreed=True
    )
    asyncio.run(_tell(ledger, statements))
    return ledger.stakes


async def _tell(ledger: ChannelLedger, statements: Any) -> None:
    writing = asyncio.create_task(ledger.run())
    for each in statements:
        try:
            telling = Telling((msgspec.json.encode(each).decode(),))
            await ledger.received(CHEAT.name, msgspec.json.encode(telling))
        except StatementError:
            continue
    writing.cancel()


# Verdicts that a few make among themselves.


def _by_a_stranger() -> list[Any]:
    return [against(case_of(stakes_of(), Identity.generate(), VICTIM, CHEAT), VICTIM, FRIEND)]


def _by_a_stranger_whom_all_believe() -> list[Any]:
    stranger = Identity.generate()
    return [
        against(case_of(stakes_of(), stranger, VICTIM, CHEAT), VICTIM, *HONEST, FRIEND),
        against(case_of(stakes_of(), HONEST[0], VICTIM, stranger), VICTIM, *HONEST[1:], FRIEND),
    ]


def _by_a_member() -> list[Any]:
    return [against(case_of(stakes_of(), FRIEND, VICTIM, CHEAT), VICTIM, Identity.generate())]


def _by_two_members_and_strangers() -> list[Any]:
    strangers = [Identity.generate() for _ in range(60)]
    return [against(case_of(stakes_of(), HONEST[0], VICTIM, CHEAT), VICTIM, FRIEND, *strangers)]


def _by_a_judge_many_times() -> list[Any]:
    case = case_of(stakes_of(), HONEST[0], VICTIM, CHEAT)
    vote = Vote(case.name(), FRIEND.name, 3 - side_of(case, VICTIM)).signed(FRIEND)
    return [Verdict(case, (vote,) * 9)]


def _by_its_own_table() -> list[Any]:
    own = stakes_of({who.name: FUND for who in (VICTIM, CHEAT, FRIEND, HONEST[0])})
    return [against(case_of(own, HONEST[0], VICTIM, CHEAT), VICTIM, FRIEND)]


def _by_no_table() -> list[Any]:
    without = Stakes({}, agreed=False)
    return [against(case_of(without, HONEST[0], VICTIM, CHEAT), VICTIM, *HONEST[1:])]


def _by_parties() -> list[Any]:
    return [against(case_of(stakes_of(), FRIEND, VICTIM, CHEAT), VICTIM, CHEAT, FRIEND, VICTIM)]


def _without_the_victim() -> list[Any]:
    """All that it signed is of another duel, for another origin or another request."""
    stakes = stakes_of()
    real = case_of(stakes, HONEST[0], VICTIM, CHEAT)
    other = case_of(stakes, HONEST[0], VICTIM, CHEAT, nonce="other", request=b"another")
    alike = case_of(stakes, HONEST[0], VICTIM, CHEAT, request=b"another")  # to which all committed themselves as before
    return [
        against(msgspec.structs.replace(alike, a=real.a, b=real.b), VICTIM, *HONEST[1:], FRIEND),
        against(msgspec.structs.replace(other, a=real.a, b=real.b), VICTIM, *HONEST[1:], FRIEND),
        against(msgspec.structs.replace(real, secret="other"), VICTIM, *HONEST[1:], FRIEND),
    ]


def _without_a_bond() -> list[Any]:
    case = case_of(stakes_of(), HONEST[0], VICTIM, CHEAT)
    opening = msgspec.structs.replace(case.opening, bond=staked(HONEST[0], MICRO - 1)).signed(HONEST[0])
    return [against(msgspec.structs.replace(case, opening=opening), VICTIM, *HONEST[1:], FRIEND)]


@pytest.mark.parametrize(
    "make",
    [
        _by_a_stranger, _by_a_stranger_whom_all_believe, _by_a_member, _by_two_members_and_strangers,
        _by_a_judge_many_times, _by_its_own_table, _by_no_table, _by_parties, _without_the_victim, _without_a_bond,
    ],
)  # fmt: skip
def test_what_a_few_state_among_themselves_takes_nobodys_stake(make: Any) -> None:
    stakes = told(staked(VICTIM, STAKE), staked(CHEAT, STAKE), staked(FRIEND, STAKE), *make())
    assert stakes.funds == {who.name: FUND for who in MEMBERS} and not stakes.slashes
    assert stakes.stake(VICTIM.name) == STAKE


def test_a_good_verdict_does_take_it() -> None:
    """So that the tests beside this one cannot pass for another reason."""
    case = case_of(stakes_of(), HONEST[0], VICTIM, CHEAT, amount=STAKE)
    stakes = told(against(case, VICTIM, *HONEST[1:], FRIEND))
    assert (stakes.funds[VICTIM.name], stakes.funds[CHEAT.name]) == (FUND - STAKE, FUND + STAKE)


def test_a_third_of_the_stake_that_has_all_other_votes_left_out_takes_nothing() -> None:
    members = [Identity.generate() for _ in range(30)]
    stakes = Stakes({who.name: FUND for who in members}, agreed=True)
    ours, honest = members[:10], members[10:]
    case = case_of(stakes, ours[0], ours[1], honest[0])
    assert not stakes.heard(decode(msgspec.json.encode(against(case, honest[0], *ours[2:]))))
    assert not stakes.heard(decode(msgspec.json.encode(against(case, honest[0], *ours[2:], *honest[1:6]))))
    assert stakes.funds[honest[0].name] == FUND


def test_of_few_who_are_left_to_judge_a_third_of_all_stake_has_to_agree() -> None:
    """The parties have nearly all of the stake, so that the friend has more than half of the rest."""
    funds = {who.name: 100 * FUND if who in (VICTIM, HONEST[0]) else FUND // 9 for who in MEMBERS} | {FRIEND.name: FUND}
    stakes = told(against(case_of(stakes_of(funds), HONEST[0], VICTIM, CHEAT), VICTIM, FRIEND), funds=funds)
    assert stakes.funds == funds


def test_an_answer_loses_once_however_often_the_victim_stakes_anew() -> None:
    """The same answer and votes again, in other spellings, orders and parts, and under statements of more stake."""
    stakes = stakes_of()
    case = case_of(stakes, HONEST[0], VICTIM, CHEAT, amount=STAKE)
    judges = (*HONEST[1:], FRIEND)
    whole = against(case, VICTIM, *judges)
    statements: list[Any] = [whole]
    for number, votes in enumerate(itertools.islice(itertools.permutations(whole.votes), 50), 2):
        respelled = [v.signature[:9] + "!" + v.signature[9:] for v in votes]
        victim, again = staked(VICTIM, STAKE, number), msgspec.structs.replace(case, height=number)
        restaked = msgspec.structs.replace(case.a if case.a.executor == VICTIM.name else case.b, stake=victim)
        side = "a" if case.a.executor == VICTIM.name else "b"
        statements += [
            victim, Verdict(case, votes), Verdict(case, votes[1:]), against(again, VICTIM, *judges),
            against(msgspec.structs.replace(case, **{side: restaked}), VICTIM, *judges),
            Verdict(case, tuple(map(lambda v, s: msgspec.structs.replace(v, signature=s), votes, respelled))),
        ]  # fmt: skip
    stakes = told(*statements)
    assert stakes.funds == {who.name: FUND for who in MEMBERS} | {VICTIM.name: FUND - STAKE, CHEAT.name: FUND + STAKE}
    assert len(stakes.slashes) == 1


def test_of_two_cases_of_one_duel_all_take_the_same_whichever_they_hear_first() -> None:
    case = case_of(stakes_of(), HONEST[0], VICTIM, CHEAT, amount=STAKE, height=3)
    other = msgspec.structs.replace(case, height=4)
    verdicts_ = against(case, VICTIM, *HONEST[1:]), against(other, CHEAT, *HONEST[1:])
    one, two = told(*verdicts_), told(*reversed(verdicts_))
    assert one.funds == two.funds and one.funds[VICTIM.name] == FUND - STAKE
    assert one.slashes == two.slashes and one.height(VICTIM.name) == two.height(VICTIM.name) == 3


def test_votes_of_strangers_fill_no_memory() -> None:
    case = case_of(stakes_of(), HONEST[0], VICTIM, CHEAT, amount=STAKE)
    good = against(case, CHEAT, *HONEST[1:])
    with_others = Verdict(case, (*good.votes, *against(case, CHEAT, Identity.generate()).votes))
    assert not told(with_others).slashes and told(good, with_others).slashes == told(good).slashes != {}


def test_nobody_is_fined_for_votes_that_somebody_left_out() -> None:
    case = case_of(stakes_of(), HONEST[0], VICTIM, CHEAT, amount=STAKE)
    stakes = told(against(case, CHEAT, *HONEST[1:]))  # without that of the friend
    assert [stakes.funds[who.name] for who in (*HONEST, FRIEND)] == [FUND] * 6
    assert stakes.funds[CHEAT.name] == FUND - STAKE


# A loss that is undone.


def test_a_loser_cannot_bring_its_stake_to_a_friend_before_the_winner_has_it() -> None:
    stakes = stakes_of()
    lost = against(case_of(stakes, HONEST[0], VICTIM, CHEAT, amount=STAKE), CHEAT, *HONEST[1:])
    for k in range(20):
        one, other = (State(f"channel {k}", CHEAT.name, FRIEND.name, 1, due, "head") for due in (1, 2))
        conflict = Conflict(Signed(one, sign(CHEAT, "voucher", one)), Signed(other, sign(CHEAT, "voucher", other)))
        to_friend = case_of(stakes, HONEST[0], CHEAT, FRIEND, amount=STAKE, nonce=f"later {k}", height=2)
        for order in ((lost, conflict), (conflict, lost), (against(to_friend, CHEAT, *HONEST[1:]), conflict, lost)):
            found = told(*order)
            assert found.funds[VICTIM.name] == FUND + STAKE and found.funds[FRIEND.name] == FUND
            assert found.funds[CHEAT.name] == FUND - STAKE and found.stake(CHEAT.name) == 0


def test_a_judge_votes_on_no_duel_that_is_to_come_before_what_it_knows() -> None:
    stakes = stakes_of()
    for who in MEMBERS:
        stakes.heard(staked(who, STAKE))
    stakes.heard(against(case_of(stakes, HONEST[0], VICTIM, CHEAT, amount=STAKE), CHEAT, *HONEST[1:]))
    assert stakes.height(CHEAT.name) == 1
    answers = {who.name: who.name for who in MEMBERS}

    def vote(height: int) -> bytes:
        case = case_of(
            stakes, HONEST[0], CHEAT, FRIEND, amount=STAKE, nonce=f"n {height}", height=height, request=b"{}"
        )
        pair = Pair(case, CHAT, False, "{}", answers[case.a.executor], answers[case.b.executor])
        pool = JudgePool(HONEST[1], lambda *what: asyncio.sleep(0, VOTE_A), Metrics(), stakes)
        return asyncio.run(pool.vote(HONEST[0].name, msgspec.json.encode(pair)))

    for height in (0, 1, 66, 2**62):
        with pytest.raises(Declined, match="height"):
            vote(height)
    assert b"signature" in vote(2)


# What a node states of its stake.


def test_two_stakes_of_one_number_are_found_in_whatever_order_they_come() -> None:
    five, other, six, seven = (staked(CHEAT, *each) for each in ((STAKE, 5), (0, 5), (STAKE, 6), (MICRO, 7)))
    for order in itertools.permutations((five, other, six, seven)):
        stakes = stakes_of()
        for each in order:
            stakes.heard(each)
        assert stakes.stake(CHEAT.name) == 0, [each.stake.number for each in order]


def test_who_has_withdrawn_its_stake_loses_none_by_an_earlier_statement() -> None:
    """What it has at stake is what it signs with its answer, and another statement in its place is not signed."""
    stakes = stakes_of()
    case = case_of(stakes, HONEST[0], VICTIM, CHEAT, amount=0, number=2)
    side = "a" if case.a.executor == VICTIM.name else "b"
    old = msgspec.structs.replace(getattr(case, side), stake=staked(VICTIM, STAKE, 1))
    forged = msgspec.structs.replace(case, **{side: old})
    found = told(
        staked(VICTIM, STAKE, 1), staked(VICTIM, 0, 2), *(against(each, VICTIM, *HONEST[1:]) for each in (forged, case))
    )
    assert found.funds[VICTIM.name] == FUND


# The draw.


def test_no_spelling_and_no_signature_changes_the_draw() -> None:
    stakes = stakes_of()
    case = case_of(stakes, HONEST[0], VICTIM, CHEAT)
    a, b, opening = case.a, case.b, case.opening
    for k in range(100):
        respelled = a.signature[:20] + "!" * k + a.signature[20:]
        others = [
            msgspec.structs.replace(case, a=msgspec.structs.replace(a, signature=respelled)),
            msgspec.structs.replace(case, opening=msgspec.structs.replace(opening, signature=respelled)),
            msgspec.structs.replace(case, b=msgspec.structs.replace(b, answer=digest(b"%d" % k)).signed(CHEAT)),
            msgspec.structs.replace(case, height=k),
        ]
        assert {each.seed() for each in others} == {case.seed()}
    for other in (
        msgspec.structs.replace(case, secret="another"),
        msgspec.structs.replace(case, a=msgspec.structs.replace(a, secret="another").signed(VICTIM)),
        msgspec.structs.replace(case, b=msgspec.structs.replace(b, secret="another").signed(VICTIM)),
    ):
        assert other.seed() != case.seed()
        with pytest.raises(StatementError):
            verdicts.verify_case(other)


def test_a_small_stake_is_a_small_chance_to_judge_whoever_draws() -> None:
    """With a five-thousandth of the stake, in 64 seats of a hundred honest ones."""
    electors = {f"honest {k}": STAKE for k in range(100)} | {"mine": STAKE // 50}
    drawn = sum("mine" in jury(electors, (), digest(b"%d" % k)).weights for k in range(400))
    assert drawn < 20  # 5 are to be expected


# What strangers have a node compute.


def test_what_cannot_be_news_costs_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = 0
    check = verdicts.check

    def counted(*what: Any) -> None:
        nonlocal checks
        checks += 1
        check(*what)

    monkeypatch.setattr(verdicts, "check", counted)
    case = case_of(stakes_of(), HONEST[0], VICTIM, CHEAT)
    good = against(case, CHEAT, *HONEST[1:])
    useless = [make() for make in (_by_a_stranger, _by_a_member, _by_its_own_table, _by_no_table, _by_parties)]
    known = (staked(VICTIM, STAKE), good)
    told(*known)
    once, checks = checks, 0
    told(*known * 20, *itertools.chain(*useless), staked(Identity.generate(), 1))
    assert checks == once


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter", CHAT + "/../../load_lora_adapter", CHAT + "?x=1", CHAT + " ", "/V1/chat/completions",
        "//v1/chat/completions", "/v1/%63hat/completions", CHAT + " HTTP/1.1\r\nhost: a\r\n\r\nDELETE /any",
        "http://inner" + CHAT, "", "*",
    ],
)  # fmt: skip
def test_a_judges_engine_is_asked_at_no_path_but_those_of_the_api(path: str) -> None:
    asked: list[Any] = []

    async def judge(*what: Any) -> int:
        asked.append(what)
        return VOTE_A

    case = case_of(Stakes({}), CHEAT, VICTIM, FRIEND, request=b"{}")
    pair = Pair(case, path, False, "{}", case.a.executor, case.b.executor)
    pool = JudgePool(HONEST[0], judge, Metrics())
    with pytest.raises(Declined, match="path"):
        asyncio.run(pool.vote(CHEAT.name, msgspec.json.encode(pair)))
    assert not asked
    asyncio.run(pool.vote(CHEAT.name, msgspec.json.encode(msgspec.structs.replace(pair, path=CHAT))))
    assert len(asked) == 1


# One spelling.


@pytest.mark.parametrize(
    "respell",
    [
        lambda text: text[:10] + "!" + text[10:],  # what is no base64 is left out when it is read
        lambda text: text[:10] + "\n" + text[10:],
        lambda text: text + "=",
        lambda text: text + "AAAA",
        lambda text: text.replace("=", ""),
        lambda text: text.replace("-", "+").replace("_", "/") if {"-", "_"} & set(text) else " " + text,
        lambda text: text[:85] + chr(ord(text[85]) + 1) + "==",  # bits that no byte has
        lambda text: text[:-1] + "\u00bd",
    ],
)  # fmt: skip
def test_a_signature_that_is_spelled_in_another_way_is_refused(respell: object) -> None:
    who = Identity.generate()
    for number in range(1, 9):
        good = staked(who, 1, number)
        decode(msgspec.json.encode(good))
        with pytest.raises(StatementError):
            decode(msgspec.json.encode(Staked(good.stake, respell(good.signature))))  # type: ignore[operator]
