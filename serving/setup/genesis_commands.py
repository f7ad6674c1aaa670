"""The commands by which a genesis grows: `genesis show`, `genesis amend`, `genesis sign`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from wwwserve.agents.arguments import Range, UsageError
from wwwserve.agents.protocol import MICRO
from wwwserve.serving.config import MOST_CREDITS
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.ledger.genesis import Account, Genesis, parse, read
from wwwserve.serving.setup.card import read_card
from wwwserve.serving.setup.node_file import replace_file

GenesisFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="GENESIS.YAML")]
Credits = Annotated[float, Range(0, MOST_CREDITS)]


@dataclass
class GenesisShow:
    """Say who has what by a genesis, and who has signed its amendments."""

    file: GenesisFile
    """of the genesis"""

    def run(self) -> int:
        found = read(self.file)
        counts = [_said(found, k, str(self.file)) for k in range(len(found.amendments))]
        print(f"genesis {found.digests()[-1]}")
        for key, (credit, stake) in found.tables()[-1].items():
            print(f"  {key}  credit {credit / MICRO:g}, stake {stake / MICRO:g}")
        return int(not all(counts))


@dataclass
class GenesisAmend:
    """Add an account to a genesis, or more to one that there is, in an amendment that its members then sign."""

    file: GenesisFile
    """of the genesis; it is changed, and of no use to a node until enough have signed: amend a copy"""
    card: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CARD")]
    """card of the node that gets it, as `wwwserve card` prints it"""
    credit: Credits = 0.0
    """credits, split evenly over its channels with all members"""
    stake: Credits = 0.0
    """credits that it may stake at most, beside that"""

    def run(self) -> int:
        if not self.credit and not self.stake:
            raise UsageError("give --credit, --stake or both: what is added")
        found, key = read(self.file), read_card(self.card).key
        if found.amendments and found.amendments[-1].signatures:
            found.verify(str(self.file))  # `sign` signs the last amendment alone: one before it would never count
        _write(self.file, found.with_account(key, Account(credit=self.credit, stake=self.stake)))
        return 0


@dataclass
class GenesisSign:
    """Sign the last amendment of a genesis, as one of its members."""

    file: GenesisFile
    """of the genesis; the signature is added to it"""
    key: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="KEY.PEM")]
    """file of the private key of a member's node"""

    def run(self) -> int:
        _write(self.file, read(self.file).signed(Identity.load(self.key)))
        return 0


def _write(file: Path, changed: Genesis) -> None:
    """Write a genesis if it is what it should be, whoever has signed its amendments, and say who has: once it is
    written, as who reads what is said may leave."""
    parse(changed.text(), str(file))
    for k in range(len(changed.amendments)):
        changed.standing(k, str(file))
    replace_file(file, changed.text())
    for k in range(len(changed.amendments)):
        _said(changed, k, str(file))


def _said(found: Genesis, k: int, where: str) -> bool:
    """Say how an amendment stands; returns whether it counts."""
    standing, amendment = found.standing(k, where), found.amendments[k]
    print(
        f"amendment {k + 1}, {'which counts' if standing.counts else 'which does not count yet'}: signed by {standing}"
    )
    for key, account in amendment.accounts.items():
        print(f"  adds to {key}  credit {account.credit:g}, stake {account.stake:g}")
    for key in standing.signed:
        print(f"  signed by {key}: {amendment.signatures[key]}")
    for key in standing.missing:
        print(f"  not by {key}")
    return standing.counts
