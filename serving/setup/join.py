"""Take a peer's card: `wwwserve join FILE`."""

from pathlib import Path
from typing import NamedTuple

import msgspec

from wwwserve.agents import strict_yaml
from wwwserve.serving import config
from wwwserve.serving.config import LedgerConfig, NodeConfig, StaticConfig
from wwwserve.serving.http.addresses import host_of, is_loopback
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.setup.card import Card, CardError, card_of, file_name, read_card
from wwwserve.serving.setup.node_file import replace_file, with_key, with_peer, with_url


class Joined(NamedTuple):
    """What became of a card."""

    changed: bool  # the file
    said: str  # in one line
    notes: list[str]  # what else there is to do


def join(file: Path, card_file: Path, name: str | None = None) -> Joined:
    """Add the peer of a card to the `peers` of `file`, called `name` there (default: as its card says). A card that was
    taken before changes nothing; of a key that is listed it may bring another url, and, signed by that, another key.

    Raises ConfigError, IdentityError, OSError for the own files, CardError for a card that is not taken.
    """
    card, own = read_card(card_file), config.load(file)
    card = msgspec.structs.replace(card, url=card.url.rstrip("/"))  # as a configuration has it
    identity = Identity.load(Path(own.key))
    listed = next((peer for peer in own.peers if peer.key == card.key), None)
    before = next((peer for peer in own.peers if peer.key == card.replaces), None) if listed is None else None
    name = name or (before.name if before is not None else None) or card.name
    _check(own, identity, card, name, file)
    with file.open(encoding="utf-8", newline="") as content:
        text = content.read()
    notes = _notes(own, identity, card, name, file, has_ours=before is not None)
    if before is not None:
        changed = with_key(with_url(text, before.key, card.url), before.key, card.key)
        said = f"{name} has a new key, {card.key}, which its old one, {before.key}, has signed"
        if own.trust is not None and before.key in own.trust:
            notes.insert(0, f"`trust` lists the old key: put {card.key} in its place")
        if own.ledger is not None:
            notes.insert(
                0, "what the old key owes and is owed stays with that: `ledger` has to name the new one as well"
            )
    elif listed is None:
        changed = with_peer(text, {"name": name, "key": card.key, "url": card.url})
        said = f"{name} is a peer now, at {card.url}"
    elif listed.url != card.url:
        changed = with_url(text, card.key, card.url)
        said = f"{listed.name or name} has moved from {listed.url} to {card.url}"
    else:
        return Joined(False, f"{listed.name or name} is a peer already, at {card.url}; nothing is changed", notes)
    config.parse(strict_yaml.load(changed), str(file), file.parent)
    replace_file(file, changed)
    return Joined(True, said, [*notes, f"a node that runs reads {file} at its next start"])


def _check(own: NodeConfig, identity: Identity, card: Card, name: str, file: Path) -> None:
    """Raises CardError for a card that is not to be taken."""
    if not isinstance(own.membership, StaticConfig):
        raise CardError(
            f"membership in {file} is zenoh, which finds peers itself; where there is a `trust`, add {card.key} to it"
        )
    if card.key == identity.name:
        raise CardError("this is the node's own card: send it to your peers, and take theirs")
    for peer in own.peers:
        if peer.key == card.replaces:
            continue
        if peer.key != card.key and peer.name == name:
            raise CardError(
                f"{file} has {name} with another key, {peer.key}, and this card has {card.key}. Either it is another "
                f"node, then give it another name by --name; or {name} has a new key, which somebody else could say as "
                f"well: its operator can have the old key sign the card, by `wwwserve card --replaces`. If that is "
                f"lost, ask by a way that you trust, remove the old entry from `peers`, and join again"
            )
        if peer.key != card.key and peer.url == card.url:
            raise CardError(
                f"{file} has another key, {peer.key}, at {card.url}, and this card has {card.key}: ask its operator "
                "by a way that you trust which is right, remove the old entry from `peers`, and join again"
            )
    if own.tls is not None and not card.url.startswith("https://"):
        raise CardError(
            f"this node has `tls`, and {name} at {card.url} has not: all nodes of a network need it, or none"
        )
    if own.tls is None and card.certificate is not None:
        raise CardError(f"{name} has `tls`, and this node has not: all nodes of a network need it, or none")
    if card.url == own.url_at(own.port):
        raise CardError(
            f"this node is at {card.url} itself: if {name} is on this machine, give one of the two another `port`; if "
            "not, both have to set `url` to an address of their machines. Then exchange cards anew, `wwwserve card`"
        )
    if is_loopback(host_of(card.url)) and not is_loopback(host_of(own.url_at(own.port))):
        raise CardError(
            f"{card.url} is {name}'s machine only for itself: its operator has to set `url` in its node.yaml, and send "
            "what `wwwserve card node.yaml` prints then"
        )


def _notes(own: NodeConfig, identity: Identity, card: Card, name: str, file: Path, has_ours: bool) -> list[str]:
    """What is left to do; `has_ours`: the peer was one before, so it has this node's card."""
    notes = []
    at = own.url_at(own.port)
    if is_loopback(host_of(at)) and not is_loopback(host_of(card.url)):
        notes.append(f"{name} cannot reach this node at {at}: set `url` and `host` in {file}, and send your card anew")
    if not own.trusts(card.key):
        notes.append(f"`trust` does not list {card.key}: {name} is not given prompts")
    ledger = own.ledger
    if isinstance(ledger, LedgerConfig) and ledger.genesis is None and card.key not in ledger.limits:
        notes.append(f"`ledger.limits` has no {card.key}: agree on credit with {name}, or it is lent nothing")
    if not has_ours:
        notes.append(
            f"{name} needs your card too: send {file_name(card_of(own, identity).name)}, or what "
            f"`wwwserve card {file}` prints"
        )
    return notes
