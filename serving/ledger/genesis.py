"""What credit begins with: amounts by key that all of a network agree on, or limits that two set for each other.

Nothing else makes credit. What a key has by the genesis is split evenly over its channels with the other keys there, as
nobody could see it spent twice; what it may stake is beside that.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import yaml

from wwwserve.agents import strict_yaml
from wwwserve.agents.protocol import MICRO
from wwwserve.serving.config import MOST_CREDITS, ConfigError, LedgerConfig, Struct
from wwwserve.serving.http.keys import NAME_CHARS, SignatureError, public_key
from wwwserve.serving.ledger.channel_ledger import Grant
from wwwserve.serving.ledger.statements import digest


class Account(Struct):
    """What a key begins with, credits."""

    credit: float
    stake: float = 0.0


class Genesis(Struct):
    """The file, the same on all nodes."""

    accounts: dict[str, Account]

    def grants(self, name: str) -> dict[str, Grant]:
        """Of the channels of `name`."""
        if name not in self.accounts:
            return {}
        canonical = {key: (_micro(a.credit), _micro(a.stake)) for key, a in sorted(self.accounts.items())}
        source = f"genesis {digest(msgspec.json.encode(canonical))}"
        channels = max(len(self.accounts) - 1, 1)
        share = {key: _micro(account.credit) // channels for key, account in self.accounts.items()}
        return {key: Grant(share[name], share[key], source) for key in self.accounts if key != name}

    def funds(self) -> dict[str, int]:
        """What each key may stake at most, micro-credits."""
        return {key: _micro(account.stake) for key, account in self.accounts.items()}


def agreed(settings: LedgerConfig, name: str) -> tuple[dict[str, Grant], dict[str, int]]:
    """Grants of the channels of `name`, and what each key may stake at most. Raises ConfigError."""
    if settings.genesis is not None:
        found = load(Path(settings.genesis))
        if name not in found.accounts:
            raise ConfigError(f"{settings.genesis}: accounts has no {name}, which is this node")
        return found.grants(name), found.funds()
    grants = {key: Grant(_micro(each.ours), _micro(each.theirs), "limits") for key, each in settings.limits.items()}
    _check(grants, "ledger.limits")
    return grants, {key: each.other for key, each in grants.items()} | {
        name: max((each.own for each in grants.values()), default=0)
    }


def load(path: Path) -> Genesis:
    """Read a genesis file. Raises ConfigError, naming the file and what is wrong."""
    try:
        found = msgspec.convert(strict_yaml.load(path.read_text(encoding="utf-8")), Genesis)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    _check(found.accounts, f"{path}: accounts")
    for key, account in found.accounts.items():
        if not (0 <= account.credit <= MOST_CREDITS and 0 <= account.stake <= MOST_CREDITS):
            raise ConfigError(f"{path}: accounts.{key} must be 0 to {MOST_CREDITS:,} credits")
    return found


def _check(names: Mapping[str, object], where: str) -> None:
    for name in names:
        try:
            public_key(name)
        except SignatureError:
            raise ConfigError(f"{where}: {name!r} must be a public key, {NAME_CHARS} characters of base64url") from None


def _micro(credits: float) -> int:
    return round(credits * MICRO)
