"""A genesis and its amendments: what they grant, who has to sign, and that nodes with and without one get on."""

import asyncio
from pathlib import Path

import msgspec
import pytest
import yaml
from duel_cases import case_of, side_of, staked, verdict_on
from duel_net import Net
from ledger_sides import A, B, C, mirrored_of, play, written
from stub_nodes import GOOD

from wwwserve.agents.protocol import MICRO, QUOTED, VOTE_A
from wwwserve.serving import cli
from wwwserve.serving.config import ConfigError, LedgerConfig
from wwwserve.serving.config import parse as parse_node
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.channel import LedgerError
from wwwserve.serving.ledger.channel_ledger import ChannelLedger, Grant
from wwwserve.serving.ledger.genesis import Account, Amendment, Genesis, agreed, load, parse, read
from wwwserve.serving.ledger.journal import MemoryJournal
from wwwserve.serving.ledger.stakes import Stakes
from wwwserve.serving.ledger.statements import digest
from wwwserve.serving.setup.card import card_of
from wwwserve.serving.setup.genesis_commands import GenesisSign

D, E, NEW = (Identity.generate() for _ in range(3))
FOUNDERS = (A, B, C, D)


def founded(stake: float = 4.0) -> Genesis:
    accounts = {who.name: Account(credit=90.0 + 30 * k, stake=stake) for k, who in enumerate(FOUNDERS)}
    return Genesis(accounts=accounts)


def grown(genesis: Genesis, accounts: dict[str, Account], *signers: Identity) -> Genesis:
    for key, account in accounts.items():
        genesis = genesis.with_account(key, account)
    for each in signers:
        genesis = genesis.signed(each)
    return genesis


NEWCOMER = {NEW.name: Account(credit=40.0, stake=4.0), A.name: Account(credit=8.0)}


def test_what_a_genesis_without_amendments_grants_is_as_before() -> None:
    genesis = founded()
    canonical = {key: (round(a.credit * MICRO), round(a.stake * MICRO)) for key, a in sorted(genesis.accounts.items())}
    source = f"genesis {digest(msgspec.json.encode(canonical))}"
    grants = genesis.grants(A.name)
    assert grants.keys() == {B.name, C.name, D.name} and not genesis.grants(NEW.name).get(NEW.name)
    assert grants[C.name] == (30 * MICRO, 50 * MICRO, source, ())
    assert genesis.funds() == [{who.name: 4 * MICRO for who in FOUNDERS}]


def test_what_an_amendment_adds_is_split_over_the_channels_that_there_are_then() -> None:
    genesis = grown(founded(), NEWCOMER, A, B, C)
    again = grown(genesis, {B.name: Account(credit=4.0), E.name: Account(credit=5.0, stake=1.0)}, A, B, C, D)
    grants = again.grants(A.name)
    first, second, third = (f"genesis {each}" for each in again.digests())
    assert grants[B.name][:3] == (30 * MICRO, 40 * MICRO, first)
    assert [each[:3] for each in grants[B.name].later] == [
        (32 * MICRO, 40 * MICRO, second), (32 * MICRO, 40 * MICRO + 4 * MICRO // 5, third)
    ]  # fmt: skip
    assert grants[NEW.name][:3] == (2 * MICRO, 10 * MICRO, second) and grants[E.name][:3] == (0, MICRO, third)
    names = sorted(again.members())
    for one in names:
        mine = again.grants(one)
        for other in names:
            if other != one:
                theirs = again.grants(other)[one]
                assert [(b, a, source) for a, b, source in steps(theirs)] == steps(mine[other])
        spent = sum((grant, *grant.later)[-1].own for grant in mine.values())
        assert spent <= again.tables()[-1][one][0]  # nothing is granted twice
    assert again.funds()[-1][E.name] == MICRO and E.name not in again.funds()[1]


def steps(grant: Grant) -> list[tuple[int, int, str]]:
    return [(each.own, each.other, each.source) for each in (grant, *grant.later)]


WHALE = {A.name: 100.0, B.name: 1.0, C.name: 1.0, D.name: 1.0}


@pytest.mark.parametrize(
    ("stakes", "signers", "counts"),
    [
        ({}, (A, B, C), True), ({}, (A, B), False), ({}, (), False), ({}, FOUNDERS, True),
        (WHALE, (A,), False),  # nearly all of the stake, and too few
        (WHALE, (B, C, D), False),  # most, and next to none of the stake
        (WHALE, (A, B, C), True),
        (dict.fromkeys(WHALE, 0.0), (A, B, C), True), (dict.fromkeys(WHALE, 0.0), (A, B), False),
        ({A.name: 2.0, B.name: 2.0, C.name: 1.0, D.name: 1.0}, (B, C, D), False),  # two thirds, and not more
    ],
)  # fmt: skip
def test_an_amendment_counts_by_most_accounts_with_more_than_two_thirds_of_the_stake(
    stakes: dict[str, float], signers: tuple[Identity, ...], counts: bool
) -> None:
    genesis = founded()
    accounts = {key: Account(credit=each.credit, stake=stakes.get(key, 4.0)) for key, each in genesis.accounts.items()}
    genesis = grown(Genesis(accounts=accounts), NEWCOMER, *signers)
    if counts:
        genesis.verify("g")
        return
    with pytest.raises(ConfigError, match=r"amendment 1 is signed by \d of 4 accounts") as refused:
        genesis.verify("g")
    for who in FOUNDERS:
        assert (who.name in str(refused.value)) == (who not in signers)


def test_an_amendment_that_is_not_what_was_signed_is_refused_by_name() -> None:
    good = grown(founded(), NEWCOMER, A, B, C)
    later = grown(good, {E.name: Account(credit=1.0)}, A, B, C, D)
    later.verify("g")
    one, two = later.amendments

    def amendments(*several: Amendment) -> Genesis:
        return msgspec.structs.replace(later, amendments=several)

    def changed(amendment: Amendment, **changes: object) -> Amendment:
        return msgspec.structs.replace(amendment, **changes)

    richer = {**one.accounts, NEW.name: Account(credit=41.0, stake=4.0)}
    borrowed = {**one.signatures, B.name: one.signatures[A.name]}
    for bad, said in (
        (amendments(two), "amendment 1 has the number 2"),
        (amendments(two, one), "amendment 1 has the number 2"),
        (amendments(changed(two, number=1)), "and what is before it here is"),
        (amendments(one, changed(two, before=one.before)), "amendment 2 is to the genesis"),
        (amendments(one, one), "amendment 2 has the number 1"),
        (amendments(one, changed(one, number=2)), "amendment 2 is to the genesis"),
        (amendments(changed(one, accounts=richer), two), f"genesis that {A.name} is said to have signed"),
        (amendments(changed(one, signatures=borrowed)), f"genesis that {B.name} is said to have signed"),
        (grown(founded(), NEWCOMER, A, B, NEW), f"signed by {NEW.name}, which has no account before it"),
        (grown(founded(), NEWCOMER, A, B, C, E), f"signed by {E.name}, which has no account before it"),
        (msgspec.structs.replace(later, accounts=founded(stake=5.0).accounts), "and what is before it here is"),
    ):
        with pytest.raises(ConfigError, match="g: amendment") as refused:
            bad.verify("g")
        assert said in str(refused.value)


def test_a_signature_counts_once_and_a_file_is_read_strictly(tmp_path: Path) -> None:
    genesis = grown(founded(), NEWCOMER, A, B)
    text = genesis.text()
    assert parse(text, "g") == genesis
    line = next(each for each in text.splitlines() if each.strip().startswith(A.name) and "==" in each)
    for wrong, said in (
        (text.replace(line, f"{line}\n{line}"), "twice"),
        (text.replace("amendments:", "amendment:"), "unknown field"),
        (text.replace("number: 1", "number: 0"), "number from 1"),
        (text.replace(line, line.replace(A.name, "nobody")), "must be a public key"),
        (text.replace("credit: 40.0", "credit: -1"), "0 to"),
        (
            text.replace("credit: 40.0", "credit: 1000000000.0").replace("credit: 90.0", "credit: 1000000000.0"),
            "in all",
        ),
        (Genesis(accounts={}, amendments=(Amendment(number=1, before="", accounts={}),)).text(), "add credit or stake"),
    ):
        assert wrong != text
        with pytest.raises(ConfigError, match="g") as refused:
            parse(wrong, "g")
        assert said in str(refused.value)
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="no amendment to sign"):
        founded().signed(A)
    with pytest.raises(ConfigError, match="an account of"):
        founded().with_account(NEW.name, Account(credit=1.0)).with_account(NEW.name, Account(credit=1.0))


def test_operators_amend_sign_and_show_a_genesis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, card = tmp_path / "genesis.yaml", tmp_path / "new.card.yaml"
    file.write_text(yaml.safe_dump({"accounts": {who.name: {"credit": 9, "stake": 2} for who in (A, B, C)}}))
    before = file.read_bytes()
    for who, name in ((A, "a"), (B, "b"), (C, "c"), (NEW, "new")):
        who.save(tmp_path / f"{name}.pem")
    card.write_text(card_of(parse_node(GOOD, "a node"), NEW).text())

    def run(*given: object) -> tuple[int, str, str]:
        status = cli.main(["genesis", *map(str, given)])
        return status, *capsys.readouterr()

    settings = LedgerConfig(file="f", genesis=str(file))
    assert run("show", file)[0] == 0
    assert run("sign", file, tmp_path / "a.pem") == (1, "", "wwwserve: there is no amendment to sign\n")
    status, _, wrong = run("amend", file, card)  # it adds nothing
    assert status == 2 and "give --credit, --stake or both" in wrong and file.read_bytes() == before
    assert run("amend", file, card, "--credit", -1)[0] == 2
    status, said, _ = run("amend", file, card, "--credit", 6, "--stake", 1)
    assert status == 0 and "does not count yet: signed by 0 of 3 accounts, with 0 of 6 credits of stake" in said
    assert run("show", file)[0] == 1
    with pytest.raises(ConfigError, match="amendment 1 is signed by 0 of 3"):
        agreed(settings, A.name)
    status, _, wrong = run("sign", file, tmp_path / "new.pem")
    assert status == 1 and f"signed by {NEW.name}, which has no account before it" in wrong
    assert run("sign", file, tmp_path / "b.pem")[0] == 0
    status, said, _ = run("sign", file, tmp_path / "a.pem")
    assert status == 0 and "2 of 3 accounts, with 4 of 6" in said and f"not by {C.name}" in said
    assert run("show", file)[0] == 1
    signed = file.read_bytes()
    status, _, wrong = run("amend", file, card, "--credit", 1)  # the next would keep C from signing this one
    assert status == 1 and "amendment 1 is signed by 2 of 3" in wrong and f"not by {C.name}" in wrong
    assert file.read_bytes() == signed
    status, said, _ = run("sign", file, tmp_path / "c.pem")
    assert "which counts: signed by 3 of 3" in said and run("show", file)[0] == 0
    granted = agreed(settings, NEW.name)
    assert granted.grants[A.name][:2] == (2 * MICRO, 0) and granted.funds[NEW.name] == MICRO
    assert granted.earlier == ({who.name: 2 * MICRO for who in (A, B, C)},)
    status, said, _ = run("amend", file, card, "--credit", 1)
    assert status == 0 and "amendment 2, which does not count yet: signed by 0 of 4 accounts" in said


def test_a_signature_is_kept_where_nobody_reads_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, key = tmp_path / "genesis.yaml", tmp_path / "a.pem"
    file.write_text(founded().with_account(NEW.name, Account(credit=1.0)).text())
    A.save(key)

    def broken(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)  # as after `| head -1`
    with pytest.raises(BrokenPipeError):
        GenesisSign(file, key).run()
    assert A.name in read(file).amendments[-1].signatures


class Members:
    """Ledgers of members, each by the genesis that it has."""

    def __init__(self) -> None:
        self.journals: dict[str, MemoryJournal] = {}
        self.ledgers: dict[str, ChannelLedger] = {}

    def start(self, who: Identity, genesis: Genesis) -> ChannelLedger:
        *earlier, funds = genesis.funds()
        journal = self.journals.setdefault(who.name, MemoryJournal())
        self.ledgers[who.name] = ledger = ChannelLedger(
            who, journal, genesis.grants(who.name), funds, exposure=10 * MICRO, payment=QUOTED, agreed=True,
            earlier=earlier,
        )  # fmt: skip
        return ledger

    async def exchange(self) -> None:
        """Until nobody has anything to send."""
        for _ in range(10):
            sent = False
            for one in self.ledgers.values():
                for other in self.ledgers.values():
                    if other is not one and one.has_to_tell(other.name):
                        message = await written(one, one.message(other.name))
                        answer = await written(other, other.received(one.name, message))
                        try:
                            await written(one, one.replied(other.name, answer))
                            sent = True
                        except LedgerError as error:
                            assert "nothing was granted" in str(error)
            if not sent:
                return
        raise AssertionError("they do not come to an end")


def test_members_with_and_without_an_amendment_trade_and_come_to_the_same_when_all_have_it() -> None:
    async def scene() -> None:
        plain, more = founded(), grown(founded(), NEWCOMER, A, B, C)
        members = Members()
        for who in (A, B, C):
            members.start(who, plain)
        await members.exchange()
        members.start(A, more)
        members.start(NEW, more)
        members.ledgers.pop(C.name)  # it is away
        await members.exchange()
        a, b, new = (members.ledgers[who.name] for who in (A, B, NEW))
        assert a.is_reconciled(B.name) and sum(a.books.channels[B.name].granted) == 70 * MICRO
        mirrored_of(a, b)
        mirrored_of(a, new)
        assert a.books.channels[NEW.name].granted in ((2 * MICRO, 10 * MICRO), (10 * MICRO, 2 * MICRO))
        assert NEW.name not in b.books.channels
        members.start(B, more)
        members.start(C, more)
        await members.exchange()
        ledgers = [members.ledgers[who.name] for who in (A, B, C, NEW)]
        for one in ledgers:
            for other in ledgers:
                if one is not other:
                    mirrored_of(one, other)
                    last = one.grants[other.name].later[-1:] or (one.grants[other.name],)
                    [balance] = [each for each in one.balances() if each.peer == other.name]
                    assert (balance.free, balance.peer_free) == last[0][:2]
        assert b.books.channels[A.name].opening.source == f"genesis {plain.digests()[0]}"

    play(scene)


def tables() -> tuple[dict[str, int], dict[str, int]]:
    """What each may stake before and after an amendment."""
    before = {who.name: 4 * MICRO for who in (A, B, C, D, E)}
    return before, before | {NEW.name: 4 * MICRO, A.name: 6 * MICRO}


def test_a_verdict_of_before_an_amendment_stays_what_it_was() -> None:
    before, after = tables()
    old = Stakes(before, agreed=True)
    case = case_of(old, C, A, B, amount=4 * MICRO)
    verdict = verdict_on(case, {D: side_of(case, A), E: side_of(case, A)})
    for stakes in (old, grew := Stakes(after, agreed=True, earlier=(before,))):
        assert stakes.heard(verdict) and stakes.stake(B.name) == 0 and stakes.has(old.epoch)
        assert [name for name, _ in stakes.losses()] == [B.name]
    assert grew.epoch != old.epoch and sum(grew.funds.values()) == sum(after.values())
    # One of after it is no news to who has not got that, and no fault.
    later = case_of(grew, C, A, D, nonce="later", height=2)
    judged = verdict_on(later, {B: side_of(later, A), E: side_of(later, A), NEW: side_of(later, A)})
    assert not old.is_news(judged) and not old.heard(judged) and not old.fresh[1:]
    assert grew.heard(judged) and grew.stake(D.name) == 2 * MICRO - 2 * MICRO


def test_who_is_added_judges_nothing_of_before_and_no_more_than_its_stake_after() -> None:
    before, after = tables()
    stakes = Stakes(after, agreed=True, earlier=(before,))
    old = case_of(Stakes(before, agreed=True), C, A, B)
    assert NEW.name not in stakes.jury(old).weights and not stakes.heard(verdict_on(old, {NEW: VOTE_A, D: VOTE_A}))
    new = case_of(stakes, C, A, B)
    assert stakes.jury(new).weights == {D.name: 4 * MICRO, E.name: 4 * MICRO, NEW.name: 4 * MICRO}
    assert not stakes.heard(verdict_on(new, {NEW: VOTE_A}))
    elsewhere = case_of(Stakes(after | {NEW.name: 999 * MICRO}, agreed=True), C, A, B)  # by a table of its own
    assert stakes.jury(elsewhere).weights == {} and not stakes.heard(verdict_on(elsewhere, {NEW: VOTE_A}))


def test_a_duel_is_of_the_last_epoch_that_its_three_know() -> None:
    before, after = tables()
    old, stakes = Stakes(before, agreed=True), Stakes(after, agreed=True, earlier=(before,))
    stakes.said[A.name] = stakes.epoch
    three = (A.name, B.name, C.name)
    assert stakes.epoch_of(three) == old.epoch  # B and C have said nothing yet
    stakes.said |= {B.name: stakes.epoch, C.name: "one that is not known here, and so a later one"}
    assert stakes.epoch_of(three) == stakes.epoch
    assert stakes.epoch_of((A.name, B.name, NEW.name)) == stakes.epoch  # whatever it says: it is in none before
    stakes.said[B.name] = old.epoch
    assert stakes.epoch_of(three) == old.epoch and stakes.epoch_of((A.name, B.name, NEW.name)) == ""
    assert old.epoch_of(three) == old.epoch and old.epoch_of((A.name, NEW.name, B.name)) == ""
    assert Stakes(before).epoch_of(three) == "" and not Stakes(before).has(old.epoch)


@pytest.mark.parametrize("amended", ["origin", "executors", "judges", "all"])
def test_duels_go_on_among_nodes_with_and_without_an_amendment(amended: str) -> None:
    async def scene() -> None:
        net = Net()
        before = {name: 100 * MICRO for name in (net.origin.name, *net.nodes)}
        groups = {"origin": [net.origin], "executors": [net.good, net.bad], "judges": net.judges}
        for group, nodes in groups.items():
            for node in nodes:
                has = amended in (group, "all")
                stakes = (
                    Stakes(before | {NEW.name: 50 * MICRO}, agreed=True, earlier=(before,))
                    if has else Stakes(before, agreed=True)
                )  # fmt: skip
                for each in (net.origin, *net.nodes.values()):
                    stakes.heard(staked(each.identity, 4 * MICRO))
                node.join(stakes)
                if node is net.origin:
                    net.stakes = net.duels.stakes = stakes
        if amended == "all":
            net.stakes.said |= dict.fromkeys(before, net.stakes.epoch)
        net.stakes.said[net.origin.name] = net.stakes.epoch
        await net.run()
        assert [verdict.case.opening.epoch for verdict in net.verdicts] == [
            net.stakes.epoch if amended == "all" else Stakes(before, agreed=True).epoch
        ]
        assert dict(net.paid) == {net.good.name: True, net.bad.name: True}
        assert net.stakes.stake(net.bad.name) == 0

    asyncio.run(asyncio.wait_for(scene(), 60.0))
