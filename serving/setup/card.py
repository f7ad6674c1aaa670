"""A node's card: what a peer has to know of it, in a small file that the node has signed.

The signature shows that whoever wrote the card has the key in it, and that nothing was changed on the way. It does not
show whose key that is: who gets a card compares the key with its owner by another way, if it matters. A node that takes
another key has both sign its card, which shows to those who know the old one that it is the same node.
"""

from base64 import urlsafe_b64encode
from pathlib import Path

import msgspec
import yaml

from wwwserve.agents import strict_yaml
from wwwserve.serving.boundary import BoundaryError, check_url
from wwwserve.serving.config import ConfigError, NodeConfig
from wwwserve.serving.http.addresses import host_of, is_unspecified
from wwwserve.serving.http.certificates import fingerprint
from wwwserve.serving.http.keys import Identity, SignatureError, public_key, signature_of, statement, verify
from wwwserve.serving.membership.heartbeat import MOST_LABEL

MOST_BYTES = 4096  # of a card
SUFFIX = ".card.yaml"
KIND = "card"  # of what is signed


class CardError(ValueError):
    """A card that cannot be used; the message says why."""


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What a node says of itself to those who are to list it."""

    name: str  # for people
    key: str  # public
    url: str  # at which peers reach it
    certificate: str | None = None  # SHA-256 of what it shows to nodes; None: it has no TLS
    replaces: str | None = None  # the key that the node had before
    signature: str  # of all of the above, by the key
    replaces_signature: str | None = None  # and by that

    def signed(self) -> bytes:
        """What is signed."""
        fields: dict[str, object] = msgspec.to_builtins(self)
        return statement(KIND, {name: said for name, said in fields.items() if not name.endswith("signature")})

    def text(self) -> str:
        """The file."""
        head = f"# Card of a wwwserve node. On a peer's machine: wwwserve join {file_name(self.name)}\n"
        return head + yaml.safe_dump(msgspec.to_builtins(self), sort_keys=False, allow_unicode=True, width=1000)


def file_name(name: str) -> str:
    """What the card of a node is called, without what a file's name must not have."""
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".")
    return (plain or "node") + SUFFIX


def card_of(config: NodeConfig, identity: Identity, replaces: Identity | None = None) -> Card:
    """The card of a node, which had another key before or not. Raises ConfigError where peers could not reach it at
    what it says."""
    if config.url is None and config.port == 0:
        raise ConfigError("port is 0: a card has to say at which port peers reach the node")
    url = config.url_at(config.port)
    if is_unspecified(host_of(url)):
        raise ConfigError(f"url must be given where host is {config.host}: at which peers reach this machine")
    made = Card(
        name=config.name, key=identity.name, url=url, certificate=fingerprint(identity.name) if config.tls else None,
        replaces=replaces.name if replaces is not None else None, signature="",
    )  # fmt: skip
    content = made.signed()
    return msgspec.structs.replace(
        made, signature=_text(identity, content),
        replaces_signature=_text(replaces, content) if replaces is not None else None,
    )  # fmt: skip


def _text(identity: Identity, content: bytes) -> str:
    return urlsafe_b64encode(identity.sign(content)).decode()


def read_card(path: Path) -> Card:
    """The card in a file. Raises CardError for a file that is none, and for a card that was changed."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise CardError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise CardError(f"{path}: is no card, it has more than {MOST_BYTES} bytes")
    try:
        card = msgspec.convert(strict_yaml.load(content.decode()), Card)
    except (UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise CardError(f"{path}: is no card: {' '.join(str(error).split())}") from None
    try:
        _check(card)
    except (BoundaryError, SignatureError) as error:
        raise CardError(f"{path}: {error}") from None
    return card


def _check(card: Card) -> None:
    """Raises BoundaryError for what cannot be, SignatureError for what the key has not signed."""
    if not (0 < len(card.name) <= MOST_LABEL and card.name.isprintable()):
        raise BoundaryError(f"name is not 1 to {MOST_LABEL} printable characters")
    check_url(card.url)
    if is_unspecified(host_of(card.url)):
        raise BoundaryError(f"url is {card.url!r}, at which nobody reaches it: its operator has to set `url`")
    public_key(card.key)
    try:
        verify(card.key, card.signed(), signature_of(card.signature))
        if card.replaces is not None:
            verify(card.replaces, card.signed(), signature_of(card.replaces_signature or ""))
    except SignatureError:
        raise SignatureError(
            "it was changed after it was signed: ask for it again, by a way on which nobody can change it"
        ) from None
    if card.certificate is not None and not card.url.startswith("https://"):
        raise BoundaryError(f"it has a certificate, and url is {card.url!r}, expected https://")
    if card.certificate not in (None, fingerprint(card.key)):
        raise BoundaryError("certificate is not what a node of that key shows: it has another version of wwwserve")
