"""Who a node is: an Ed25519 key, whose public half is its name among peers.

Whatever is signed begins with a tag that says what kind of statement it is, so that a signature under one never passes
for one under another.
"""

import os
import re
import secrets
import stat
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha512
from pathlib import Path
from typing import Self

import orjson
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

NAME_CHARS = 43
SIGNATURE_BYTES = 64
KEYS_KEPT = 4096  # parsed public keys
MOST_FILE_BYTES = 4096  # of a key

_NAME = re.compile(rf"[A-Za-z0-9_-]{{{NAME_CHARS}}}")
_PRIME = 2**255 - 19
_ORDER_8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
# y of the points whose order divides 8: to a key there, signatures fit that nobody made for what they are under.
_WEAK = {0, 1, _PRIME - 1, _ORDER_8, _PRIME - _ORDER_8}


class SignatureError(ValueError):
    """Not signed by whom it should be; the message says what is wrong."""


class IdentityError(ValueError):
    """A file of a key that cannot be used; the message says why."""


class Identity:
    """A key pair."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.name = _text(private.public_key().public_bytes_raw())  # as verify takes it

    @classmethod
    def generate(cls) -> Self:
        """A new one."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Self:
        """From a file, PKCS #8 in PEM, which only its owner may read. Raises IdentityError."""
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                content = file.read(MOST_FILE_BYTES)
        except OSError as error:
            raise IdentityError(f"{path}: cannot be read: {error.strerror}") from None
        if mode & 0o077:
            raise IdentityError(f"{path}: others may read it, its mode is {mode:04o}, expected 0600")
        try:
            private = load_pem_private_key(content, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise IdentityError(f"{path}: is no private key in PEM without a password") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise IdentityError(f"{path}: is a key of another kind, expected Ed25519")
        return cls(private)

    @property
    def public(self) -> Ed25519PublicKey:
        """Its public half."""
        return self._private.public_key()

    def pem(self) -> bytes:
        """The private half, PKCS #8 in PEM."""
        return self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def save(self, path: Path) -> None:
        """To a new file, whole or not at all, with mode 0600. Raises IdentityError, also if there is one."""
        content = self.pem()
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with open(file, "wb") as out:
                    out.write(content)
                    out.flush()
                    os.fsync(file)
                os.link(part, path)  # fails where there is a file, which a rename would replace
            finally:
                part.unlink()
            _sync_folder(path.parent)
        except OSError as error:
            raise IdentityError(f"{path}: cannot be written: {error.strerror}") from None

    def sign(self, message: bytes) -> bytes:
        """Its signature [64 bytes]."""
        return self._private.sign(message)

    def shared(self, name: str) -> bytes:
        """A secret [32 bytes] that only this one and `name` can make. Raises SignatureError for what is no name.

        X25519 between the Montgomery forms of the two keys (RFC 7748, section 4.1).
        """
        y = int.from_bytes(public_key(name).public_bytes_raw(), "little") & (2**255 - 1)
        u = (1 + y) * pow(1 - y, -1, _PRIME) % _PRIME
        scalar = sha512(self._private.private_bytes_raw()).digest()[:32]
        other = X25519PublicKey.from_public_bytes(u.to_bytes(32, "little"))
        return X25519PrivateKey.from_private_bytes(scalar).exchange(other)


def verify(name: str, message: bytes, signature: bytes) -> None:
    """Raises SignatureError unless `name` signed the message."""
    if len(signature) != SIGNATURE_BYTES:
        raise SignatureError(f"the signature has {len(signature)} bytes, expected {SIGNATURE_BYTES}")
    try:
        public_key(name).verify(signature, message)
    except InvalidSignature:
        raise SignatureError("the signature does not fit what is signed and the key") from None


def signature_of(text: str | bytes) -> bytes:
    """The signature that base64url says, with padding. Raises SignatureError for any but its one spelling."""
    said = text.encode() if isinstance(text, str) else text
    try:
        signature = urlsafe_b64decode(said)
    except ValueError:  # binascii's as well
        raise SignatureError("the signature is not base64") from None
    if urlsafe_b64encode(signature) != said:
        raise SignatureError("the signature is not how it is written")
    return signature


@lru_cache(maxsize=KEYS_KEPT)
def public_key(name: str) -> Ed25519PublicKey:
    """The key that is a name. Raises SignatureError for what is no name."""
    if not _NAME.fullmatch(name):
        raise SignatureError(
            f"{name[: 2 * NAME_CHARS]!r} is no public key, expected {NAME_CHARS} characters of base64url"
        )
    raw = urlsafe_b64decode(name + "=")
    y = int.from_bytes(raw, "little") & (2**255 - 1)
    # Two ways to write one key would be two names of one node.
    if _text(raw) != name or y >= _PRIME:
        raise SignatureError(f"{name!r} is not how that public key is written")
    if y in _WEAK:
        raise SignatureError(f"{name!r} is a weak public key")
    return Ed25519PublicKey.from_public_bytes(raw)


def name_of(key: Ed25519PublicKey) -> str:
    """The name of who has a key. Raises SignatureError for one that is none."""
    name = _text(key.public_bytes_raw())
    public_key(name)
    return name


def tagged(kind: str, content: bytes) -> bytes:
    """What is signed of some content, as a statement of a kind."""
    return b"wwwserve/%b/1\n%b" % (kind.encode(), content)


def statement(kind: str, fields: Mapping[str, object]) -> bytes:
    """What is signed of some fields: their one encoding, JSON with sorted keys and without spaces."""
    return tagged(kind, orjson.dumps(fields, option=orjson.OPT_SORT_KEYS))


def _text(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
