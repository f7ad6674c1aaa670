"""What credit begins with: amounts by key that all of a network agree on, or limits that two set for each other.

Nothing else makes credit. What a key has by the genesis is split evenly over its channels with the other keys there, as
nobody could see it spent twice; what it may stake is beside that. A genesis grows by amendments, each of which adds to
what is before it and names that by its digest; it counts if more than half of the accounts before it have signed it,
who hold more than two thirds of what may be staked: as many as can make verdicts anyway.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml

from wwwserve.agents import strict_yaml
from wwwserve.agents.protocol import MICRO
from wwwserve.serving.config import MOST_CREDITS, ConfigError, LedgerConfig, Struct
from wwwserve.serving.http.keys import NAME_CHARS, Identity, SignatureError, public_key
from wwwserve.serving.ledger.refills import Grant
from wwwserve.serving.ledger.statements import StatementError, check, digest, sign
from wwwserve.serving.ledger.statements import Struct as Stated
from wwwserve.serving.market import Whole

Table = dict[str, tuple[int, int]]  # credit and stake by key, micro-credits


class Account(Struct):
    """What a key begins with, or what is added to that, credits."""

    credit: float = 0.0
    stake: float = 0.0


class Amendment(Struct):
    """What is added to a genesis."""

    number: int  # from 1
    before: str  # digest of what it is added to
    accounts: dict[str, Account]  # new ones, and more for those that there are
    signatures: dict[str, str] = msgspec.field(default_factory=dict)  # by key


class Amended(Stated, frozen=True):
    """What is signed of an amendment."""

    number: Whole
    before: str
    accounts: tuple[tuple[str, Whole, Whole], ...]  # key, credit, stake, by key; micro-credits

    def digest(self) -> str:
        """Names the genesis with it."""
        return digest(msgspec.json.encode(self))


class Standing(NamedTuple):
    """Who has signed an amendment, of those who may."""

    signed: tuple[str, ...]
    missing: tuple[str, ...]
    stake: int  # of those who have, micro-credits,
    all_stake: int  # and of all

    @property
    def counts(self) -> bool:
        """Whether they are enough."""
        members = 2 * len(self.signed) > len(self.signed) + len(self.missing)
        return members and (3 * self.stake > 2 * self.all_stake or self.all_stake == 0)

    def __str__(self) -> str:
        of = f"{len(self.signed)} of {len(self.signed) + len(self.missing)} accounts"
        return f"{of}, with {self.stake / MICRO:g} of {self.all_stake / MICRO:g} credits of stake"


class Genesis(Struct):
    """The file, the same on all nodes."""

    accounts: dict[str, Account]
    amendments: tuple[Amendment, ...] = ()

    def added(self) -> list[Table]:
        """What each step adds: the accounts that it began with, and each amendment."""
        return [_table(each) for each in (self.accounts, *(step.accounts for step in self.amendments))]

    def tables(self) -> list[Table]:
        """What each key has in all after each step."""
        found: list[Table] = [{}]
        for step in self.added():
            before = found[-1]
            both = {key: before.get(key, (0, 0)) for key in (*before, *step)}
            found.append({key: _sum(has, step.get(key, (0, 0))) for key, has in both.items()})
        return found[1:]

    def digests(self) -> list[str]:
        """Of the genesis after each step."""
        first = {key: each for key, each in sorted(_table(self.accounts).items())}
        return [digest(msgspec.json.encode(first)), *(amended(each).digest() for each in self.amendments)]

    def members(self) -> set[str]:
        """All keys."""
        return set(self.accounts).union(*(each.accounts for each in self.amendments))

    def grants(self, name: str) -> dict[str, Grant]:
        """Of the channels of `name`. What a step adds to a key is split over its channels with all that are there
        then; a channel begins with what is granted at the first step at which both are."""
        tables, digests, added = self.tables(), self.digests(), self.added()
        found: dict[str, Grant] = {}
        for peer in self.members() - {name}:
            own = other = 0
            steps: list[Grant] = []
            for table, source, more in zip(tables, digests, added, strict=True):
                if name in table and peer in table:
                    channels = max(len(table) - 1, 1)
                    own += more.get(name, (0, 0))[0] // channels
                    other += more.get(peer, (0, 0))[0] // channels
                    steps.append(Grant(own, other, f"genesis {source}"))
            if steps:
                found[peer] = steps[0]._replace(later=tuple(steps[1:]))
        return found

    def funds(self) -> list[dict[str, int]]:
        """What each key may stake at most after each step, micro-credits."""
        return [{key: stake for key, (_, stake) in table.items()} for table in self.tables()]

    def standing(self, k: int, where: str) -> Standing:
        """Who has signed amendment `k`, from 0. Raises ConfigError for one that is not of this genesis, or has a
        signature that does not fit."""
        amendment, before = self.amendments[k], self.tables()[k]
        if amendment.number != k + 1:
            raise ConfigError(f"{where}: amendment {k + 1} has the number {amendment.number}")
        if amendment.before != self.digests()[k]:
            raise ConfigError(
                f"{where}: amendment {k + 1} is to the genesis {amendment.before[:16]!r}, and what is before it here "
                f"is {self.digests()[k][:16]!r}"
            )
        stated = amended(amendment)
        for key, signature in amendment.signatures.items():
            if key not in before:
                raise ConfigError(f"{where}: amendment {k + 1} is signed by {key}, which has no account before it")
            try:
                check(key, "genesis", stated, signature)
            except StatementError as error:
                raise ConfigError(f"{where}: amendment {k + 1}: {error}") from None
        return Standing(
            tuple(key for key in before if key in amendment.signatures),
            tuple(key for key in before if key not in amendment.signatures),
            sum(stake for key, (_, stake) in before.items() if key in amendment.signatures),
            sum(stake for _, stake in before.values()),
        )

    def verify(self, where: str) -> None:
        """Raises ConfigError unless each amendment counts."""
        for k in range(len(self.amendments)):
            standing = self.standing(k, where)
            if not standing.counts:
                raise ConfigError(
                    f"{where}: amendment {k + 1} is signed by {standing}; it has to be by more than half of them, with "
                    f"more than two thirds of the stake; not by {', '.join(standing.missing)}"
                )

    def with_account(self, key: str, account: Account) -> "Genesis":
        """With one more account, or more in it, in the last amendment if nobody has signed that, else in a new one."""
        amendments = [*self.amendments]
        if not amendments or amendments[-1].signatures:
            amendments.append(Amendment(number=len(amendments) + 1, before=self.digests()[-1], accounts={}))
        last = amendments[-1]
        if key in last.accounts:
            raise ConfigError(f"amendment {last.number} has an account of {key} already")
        amendments[-1] = msgspec.structs.replace(last, accounts=last.accounts | {key: account})
        return msgspec.structs.replace(self, amendments=tuple(amendments))

    def signed(self, identity: Identity) -> "Genesis":
        """With a signature under the last amendment. Raises ConfigError if there is none."""
        if not self.amendments:
            raise ConfigError("there is no amendment to sign")
        *before, last = self.amendments
        signatures = last.signatures | {identity.name: sign(identity, "genesis", amended(last))}
        return msgspec.structs.replace(
            self, amendments=(*before, msgspec.structs.replace(last, signatures=signatures))
        )  # fmt: skip

    def text(self) -> str:
        """As a file."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return yaml.safe_dump(plain, sort_keys=False)


class Granted(NamedTuple):
    """What is agreed for one node."""

    grants: dict[str, Grant]  # of its channels
    funds: dict[str, int]  # what each key may stake at most, micro-credits
    earlier: tuple[dict[str, int], ...] = ()  # the same before each amendment


def amended(amendment: Amendment) -> Amended:
    """What is signed of it."""
    accounts = tuple((key, *both) for key, both in sorted(_table(amendment.accounts).items()))
    return Amended(amendment.number, amendment.before, accounts)


def agreed(settings: LedgerConfig, name: str) -> Granted:
    """What is agreed for the node `name`. Raises ConfigError."""
    if settings.genesis is not None:
        found = load(Path(settings.genesis))
        if name not in found.members():
            raise ConfigError(f"{settings.genesis}: accounts has no {name}, which is this node")
        *earlier, funds = found.funds()
        return Granted(found.grants(name), funds, tuple(earlier))
    grants = {key: Grant(_micro(each.ours), _micro(each.theirs), "limits") for key, each in settings.limits.items()}
    _check(grants, "ledger.limits")
    funds = {key: each.other for key, each in grants.items()}
    return Granted(grants, funds | {name: max((each.own for each in grants.values()), default=0)})


def load(path: Path) -> Genesis:
    """Read a genesis file whose amendments count. Raises ConfigError, naming the file and what is wrong."""
    found = read(path)
    found.verify(str(path))
    return found


def read(path: Path) -> Genesis:
    """Read a genesis file, whoever has signed its amendments. Raises ConfigError, naming the file and what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    return parse(text, str(path))


def parse(text: str, path: str) -> Genesis:
    """What the text of a file says, see `read`."""
    try:
        found = msgspec.convert(strict_yaml.load(text), Genesis)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    _check_accounts(found.accounts, f"{path}: accounts")
    for k, each in enumerate(found.amendments):
        where = f"{path}: amendments[{k}]"
        _check_accounts(each.accounts, f"{where}.accounts")
        if each.number < 1 or not any(account.credit or account.stake for account in each.accounts.values()):
            raise ConfigError(f"{where} must have a number from 1 and add credit or stake")
        _check(each.signatures, f"{where}.signatures")
    for key, both in found.tables()[-1].items():
        if max(both) > _micro(MOST_CREDITS):
            raise ConfigError(f"{path}: {key} has more than {MOST_CREDITS:,} credits in all")
    return found


def _check_accounts(accounts: Mapping[str, Account], where: str) -> None:
    _check(accounts, where)
    for key, account in accounts.items():
        if not (0 <= account.credit <= MOST_CREDITS and 0 <= account.stake <= MOST_CREDITS):
            raise ConfigError(f"{where}.{key} must be 0 to {MOST_CREDITS:,} credits")


def _check(names: Mapping[str, object], where: str) -> None:
    for name in names:
        try:
            public_key(name)
        except SignatureError:
            raise ConfigError(f"{where}: {name!r} must be a public key, {NAME_CHARS} characters of base64url") from None


def _table(accounts: Mapping[str, Account]) -> Table:
    return {key: (_micro(each.credit), _micro(each.stake)) for key, each in accounts.items()}


def _sum(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]


def _micro(credits: float) -> int:
    return round(credits * MICRO)
