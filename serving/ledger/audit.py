"""Whether a journal is what its node wrote: its chain, signatures, sums, and that two sides of a channel agree."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from wwwserve.agents.protocol import ESCROW, MICRO
from wwwserve.serving.ledger.channel import OWN, PEER, Books, Channel, LedgerError
from wwwserve.serving.ledger.entries import (
    Acked,
    Closed,
    Credited,
    Event,
    Noted,
    Opened,
    Recovered,
    Refilled,
    Settled,
    Stated,
    Vouched,
)
from wwwserve.serving.ledger.journal import GENESIS, Journal, SqliteJournal, chained
from wwwserve.serving.ledger.statements import State, StatementError, check, decode
from wwwserve.serving.ledger.verdicts import decode as decode_stake


class Audit(NamedTuple):
    """What was found in a journal."""

    owner: str
    entries: int
    books: Books
    problems: list[str]
    vouched: dict[str, dict[int, State]]  # by peer and number, what the owner paid: each state it may have signed, ...
    acked: dict[str, set[int]]  # which of it the peer signed, ...
    credited: dict[str, dict[int, State]]  # and what both signed with the peer as payer
    stated: dict[str, int]  # by peer: up to which number of what the owner paid a closing stands for its vouchers


def audit(path: Path) -> Audit:
    """Replay a journal with every check. Raises serving.ledger.journal.JournalError for a file that is none."""
    journal = SqliteJournal(path, read_only=True)
    try:
        return audit_entries(journal, journal.owner, journal.damage())
    finally:
        journal.close()


def audit_entries(journal: Journal, owner: str, problems: list[str]) -> Audit:
    """Replay the journal of `owner` with every check; `problems` are those of what it is kept in."""
    found = Auditor(owner).follow(journal)
    return found._replace(problems=problems + found.problems)


class Auditor:
    """Replays a journal, and later what was added to it since."""

    def __init__(self, owner: str) -> None:
        self.found = Audit(owner, 0, Books(owner), [], {}, {}, {}, {})
        self._digest = GENESIS

    def follow(self, journal: Journal) -> Audit:
        """All so far, with the problems of the entries that are new and of what they come to."""
        books, problems = self.found.books, list[str]()
        snapshot = journal.snapshot()
        digest, due = self._digest, self.found.entries + 1
        for number, body, written in journal.entries(self.found.entries):
            if number != due:
                problems.append(f"entry {due} is missing")
            if chained(digest, body) != written:
                problems.append(f"entry {number}: the digest is not that of its content and of the entry before")
            digest, due = written, number + 1
            try:
                event: Event = decode(body, Event)
                _check_signatures(books, event)
                books.apply(event)
                _keep(self.found, event)
            except (StatementError, LedgerError) as error:
                problems.append(f"entry {number}: {error}")
                continue
            if snapshot is None or snapshot.number != number:
                continue
            if _again(books.owner, snapshot.body) != books.encode():
                problems.append(f"the snapshot at entry {number} is not what the entries come to")
        if snapshot is not None and not 0 < snapshot.number < due:
            problems.append(f"the snapshot is of entry {snapshot.number}, and the last is {due - 1}")
        problems += _check_sums(books, {each.peer: each for each in journal.balances()})
        self.found, self._digest = self.found._replace(entries=due - 1, problems=problems), digest
        return self.found


def _again(owner: str, snapshot: bytes) -> bytes:
    """A snapshot as it would be written now, as releases before wrote fewer fields; as it is, if it is none."""
    books = Books(owner)
    try:
        books.load(snapshot)
    except StatementError:
        return snapshot
    return books.encode()


def _check_signatures(books: Books, event: Event) -> None:
    """Raises StatementError for one that does not fit, LedgerError where there is no channel."""
    owner = books.owner
    if isinstance(event, Opened):
        check(owner, "opening", event.opening, event.own)
        check(event.peer, "opening", event.opening, event.other)
    elif isinstance(event, Refilled):
        event.agreed.verify(books.channel(event.peer).opening)
    elif isinstance(event, Closed):
        closing, names = event.ended.closing, (owner, event.peer)
        if closing.a.payer not in names or closing.b.payer not in names or closing.a.payer >= closing.b.payer:
            raise StatementError(f"closing {closing.number} is not of the two of its channel")
        for name, signature in ((closing.a.payer, event.ended.a), (closing.b.payer, event.ended.b)):
            if signature or name == owner:  # a peer may have been waited for in vain
                check(name, "closing", closing, signature)
    elif isinstance(event, Vouched):
        state = State(books.channel(event.peer).digest, owner, event.peer, event.number, event.total, event.head)
        check(owner, "voucher", state, event.signature)
    elif isinstance(event, Recovered):
        check(owner, "voucher", event.voucher.state, event.voucher.signature)
    elif isinstance(event, Acked):
        state = State(books.channel(event.peer).digest, owner, event.peer, event.number, event.total, event.head)
        check(event.peer, "acknowledgement", state, event.signature)
    elif isinstance(event, Credited):
        check(event.peer, "voucher", event.voucher.state, event.voucher.signature)
        check(owner, "acknowledgement", event.voucher.state, event.signature)
    elif isinstance(event, Stated):
        decode_stake(event.statement)


def _keep(found: Audit, event: Event) -> None:
    """Remember what was signed. Raises LedgerError for an acknowledgement of what was no voucher."""
    if isinstance(event, Settled):  # that it was signed may be forgotten, as entries are lost from the end
        channel = found.books.channel(event.peer)
        found.vouched.setdefault(event.peer, {})[channel.number] = channel.state(found.owner, event.peer)
    elif isinstance(event, Recovered):
        found.vouched.setdefault(event.peer, {})[event.voucher.state.number] = event.voucher.state
    elif isinstance(event, Closed):
        stated = event.ended.closing.of(found.owner)
        found.vouched.setdefault(event.peer, {})[stated.number] = stated
        found.stated[event.peer] = stated.number
    elif isinstance(event, Acked):
        state = found.vouched.get(event.peer, {}).get(event.number)
        if state is None or (state.total, state.head) != (event.total, event.head):
            raise LedgerError(f"{event.peer} acknowledges what was no voucher")
        found.acked.setdefault(event.peer, set()).add(event.number)
    elif isinstance(event, Credited):
        found.credited.setdefault(event.peer, {})[event.voucher.state.number] = event.voucher.state


def _check_sums(books: Books, kept: dict[str, Any]) -> Iterator[str]:
    for peer, channel in sorted(books.channels.items()):
        balance = channel.balance(peer)
        if min(balance[2:]) < 0 or sum(balance[2:]) != balance.opened:
            yield f"channel with {peer}: credit is not conserved: {balance}"
        locked = sum(each.terms.amount for each in channel.open.values()) - sum(channel.advanced.values())
        taken = sum(each.terms.amount for each in channel.taken.values()) - sum(channel.earned.values())
        if (locked, taken) != (channel.accounts[OWN, ESCROW], channel.accounts[PEER, ESCROW]):
            yield f"channel with {peer}: what is in escrow is not what is locked for its requests"
        own, _ = channel.owned(books.owner, channel.total, channel.paid_total)
        if own != balance.free + balance.escrow:
            yield f"channel with {peer}: the receipts come to {own} micro-credits, and not to what is owned"
        if kept.get(peer) != balance:
            yield f"channel with {peer}: the balance that is kept, {kept.get(peer)}, is not what the entries come to"
    for peer in sorted(set(kept) - set(books.channels)):
        yield f"a balance is kept with {peer}, and there is no channel"


def compare(one: Audit, other: Audit) -> list[str]:
    """Where the two sides of the channel of two nodes do not agree on what was signed."""
    a, b = one.books.channels.get(other.owner), other.books.channels.get(one.owner)
    if a is None or b is None:
        if a is b:
            return [f"there is no channel between {one.owner} and {other.owner}"]
        alone = a or b
        assert alone is not None  # opened by one of them, whose signature is on its way
        return ["the channel is in use by one of the two alone"] if alone.asked or alone.taken_id else []
    if a.opening != b.opening:
        return ["the two opened the channel on different terms"]
    problems = []
    if any(of_a.refill != of_b.refill for of_a, of_b in zip(a.refills, b.refills, strict=False)):
        problems.append(f"{one.owner} and {other.owner} added different credit to the channel")
    for payer, payee in ((one, other), (other, one)):
        vouched = payer.vouched.get(payee.owner, {})
        credited = payee.credited.get(payer.owner, {})
        for number, state in credited.items():
            forgotten = number not in vouched and number < payer.stated.get(payee.owner, 0)
            if vouched.get(number) != state and not forgotten:
                problems.append(f"{payee.owner} holds a voucher {number} that {payer.owner} has not written so")
        for number in payer.acked.get(payee.owner, ()):
            # It may have forgotten one, and been told again with a later one.
            if number > max(_stated(payee, payer.owner), max(credited, default=0)):
                problems.append(f"{payer.owner} holds an acknowledgement {number} that {payee.owner} has not written")
    return problems


def _stated(payee: Audit, payer: str) -> int:
    """Up to which number of what a payer paid a closing stands for its vouchers, as the payee has it."""
    ended = payee.books.channels[payer].ended
    return ended.closing.of(payer).number if ended is not None else 0


def settled(one: Audit, other: Audit) -> bool:
    """Whether nothing is under way in the channel of two nodes: both own the same by either's account."""
    a, b = one.books.channels.get(other.owner), other.books.channels.get(one.owner)
    if a is None or b is None:
        return a is b
    return a.balance("")[2:] == (*b.balance("")[4:], *b.balance("")[2:4]) and not a.exposed and not b.exposed


def describe(found: Audit) -> str:
    """A journal for people."""
    lines = [f"node     {found.owner}", f"entries  {found.entries:,}"]
    for peer, c in sorted(found.books.channels.items()):
        balance = c.balance(peer)
        lines += [
            "",
            f"channel with {peer}, by {c.opening.source}{_end_of(c)}",
            f"  own      {_credits(balance.free)} free, {_credits(balance.escrow)} in escrow for "
            f"{len(c.open)} requests",
            f"  peer's   {_credits(balance.peer_free)} free, {_credits(balance.peer_escrow)} in escrow for "
            f"{len(c.taken)} requests",
            f"  paid     {_credits(c.total)} by {c.number:,} receipts, {c.acked:,} of them signed by the peer",
            f"  granted  {_credits(c.granted[c.opening.a != found.owner])}, the peer "
            f"{_credits(c.granted[c.opening.a == found.owner])}, with {len(c.refills)} refills",
            f"  earned   {_credits(c.paid_total)} by {c.paid_number:,} receipts, all signed by both",
        ]
        if c.short:
            lines.append(f"  short    {_credits(c.short)} that the peer paid less than was delivered")
    return "\n".join(lines)


def _end_of(channel: Channel) -> str:
    if channel.is_closed:
        return ", closed" if channel.is_agreed else ", closed without the peer"
    return ", to be closed" if channel.leaving_ms else ""


def evidence(path: Path) -> list[Noted]:
    """What was noted of peers."""
    journal = SqliteJournal(path, read_only=True)
    try:
        events = (msgspec.json.decode(entry.body, type=Event) for entry in journal.entries())
        return [event for event in events if isinstance(event, Noted)]
    finally:
        journal.close()


def _credits(amount: int) -> str:
    return f"{amount // MICRO}.{amount % MICRO:06d}"
