"""Keys, their files, and signatures."""

import errno
import os
import subprocess
from pathlib import Path

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from wwwserve.serving.http.keys import (
    KEYS_KEPT,
    Identity,
    IdentityError,
    SignatureError,
    _text,
    public_key,
    statement,
    tagged,
    verify,
)

PRIME = 2**255 - 19


def name_of(y: int) -> str:
    return _text(y.to_bytes(32, "little"))


def test_what_is_signed_is_verified_and_nothing_else() -> None:
    one, other = Identity.generate(), Identity.generate()
    signature = one.sign(b"message")
    verify(one.name, b"message", signature)
    assert len(one.name) == 43 and len(signature) == 64 and one.name != other.name
    for name, message, bytes_ in (
        (other.name, b"message", signature),
        (one.name, b"messagE", signature),
        (one.name, b"message", other.sign(b"message")),
        (one.name, b"message", bytes([signature[0] ^ 1]) + signature[1:]),
    ):
        with pytest.raises(SignatureError, match="does not fit"):
            verify(name, message, bytes_)
    with pytest.raises(SignatureError, match="has 63 bytes, expected 64"):
        verify(one.name, b"message", signature[:63])


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_key_has_one_name(bits: int) -> None:
    name = Identity.generate().name
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    again = name[:-1] + digits[digits.index(name[-1]) | bits]  # the last two bits of its 43 characters mean nothing
    with pytest.raises(SignatureError, match="not how that public key is written"):
        public_key(again)
    with pytest.raises(SignatureError, match="not how"):
        public_key(name_of(PRIME + 2))  # y = 2
    for nonsense in ("", "north", name + "=", name[:-1] + "é", name[:-1] + "+", name + "\n"):
        with pytest.raises(SignatureError, match="is no public key"):
            public_key(nonsense)


def test_keys_that_sign_without_being_asked_are_refused() -> None:
    order_8 = 2707385501144840649318225287225658788936804267575313519463743609750303402022
    no_signature = (1).to_bytes(32, "little") + bytes(32)  # made without any key
    for y in (0, 1, PRIME - 1, order_8, PRIME - order_8):
        for sign in (0, 1 << 255):
            raw = (y | sign).to_bytes(32, "little")
            fits = 0
            for k in range(64):
                try:
                    Ed25519PublicKey.from_public_bytes(raw).verify(no_signature, b"%d" % k)
                    fits += 1
                except Exception:
                    pass
            assert fits or (y in (1, PRIME - 1) and sign), "the library would take it, so we must not"
            with pytest.raises(SignatureError, match="weak"):
                verify(_text(raw), b"0", no_signature)


def test_parsed_keys_are_kept_but_not_without_bound() -> None:
    name = Identity.generate().name
    assert public_key(name) is public_key(name)
    for y in range(2, 2 * KEYS_KEPT):
        public_key(name_of(y))
    assert public_key.cache_info().currsize == KEYS_KEPT


def test_a_statement_has_one_encoding_and_one_kind() -> None:
    assert statement("voucher", {"to": "é", "amount": 3, "a": {"d": 1, "c": None}}) == (
        'wwwserve/voucher/1\n{"a":{"c":null,"d":1},"amount":3,"to":"é"}'.encode()
    )
    assert statement("voucher", {"a": 1, "b": 2}) == statement("voucher", {"b": 2, "a": 1})
    assert statement("voucher", {"a": 1}) != statement("receipt", {"a": 1})
    assert statement("voucher", {"a": 1}) == tagged("voucher", orjson.dumps({"a": 1}))


def test_a_saved_key_is_private_and_the_same(tmp_path: Path) -> None:
    path = tmp_path / "node.pem"
    one = Identity.generate()
    before = os.umask(0)
    try:
        one.save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["node.pem"]
    again = Identity.load(path)
    verify(one.name, b"x", again.sign(b"x"))
    shown = subprocess.run(["openssl", "pkey", "-in", str(path), "-noout", "-text"], capture_output=True, text=True)
    assert shown.returncode == 0 and "ED25519" in shown.stdout


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "node.pem"
    one = Identity.generate()
    one.save(path)
    with pytest.raises(IdentityError, match="cannot be written: File exists"):
        Identity.generate().save(path)
    assert Identity.load(path).name == one.name
    assert [each.name for each in tmp_path.iterdir()] == ["node.pem"]
    with pytest.raises(IdentityError, match="No such file"):
        one.save(tmp_path / "none" / "node.pem")


def test_a_full_disk_leaves_no_half_of_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IdentityError, match="No space left"):
        Identity.generate().save(tmp_path / "node.pem")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_may_read_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "node.pem"
    Identity.generate().save(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"others may read it, its mode is {mode:04o}"):
        Identity.load(path)


def test_what_is_no_key_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "node.pem"
    with pytest.raises(IdentityError, match="cannot be read: No such file"):
        Identity.load(path)
    path.touch(0o600)
    one = Identity.generate()
    other = X25519PrivateKey.generate()
    locked = one._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    for content, message in (
        (b"", "no private key in PEM"),
        (b"\xff" * 10_000, "no private key in PEM"),
        (locked, "without a password"),
        (other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "expected Ed25519"),
    ):
        path.write_bytes(content)
        with pytest.raises(IdentityError, match=message):
            Identity.load(path)
