"""TLS between nodes: a certificate whose key is the node's own, by which each knows that it speaks to whom it means.

OpenSSL wants some authority above a certificate. Nodes have one whose private key everybody has, as it stands here: it
says nothing. What counts is the key in a certificate, which is the node's name, and which the handshake (TLS 1.3) shows
the other side to have. Users may be shown an ordinary certificate: nodes ask for `NODE_HOST`, and get the node's.
"""

import os
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from wwwserve.serving.http.keys import Identity, SignatureError, name_of, public_key

NODE_HOST = "node.wwwserve"  # that nodes ask each other for

_ANYBODY = Ed25519PrivateKey.from_private_bytes(sha256(b"wwwserve: whoever has a key may be a node").digest())
# All alike, whatever a node's clock says: who a certificate is of does not change.
_FROM, _UNTIL = datetime(2020, 1, 1, tzinfo=UTC), datetime(2120, 1, 1, tzinfo=UTC)


def _certificate(subject: str, key: Ed25519PublicKey, authority: bool) -> bytes:
    """A certificate in PEM of who has a key."""
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "wwwserve nodes")])
    made = (
        x509.CertificateBuilder()
        .subject_name(issuer if authority else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(int.from_bytes(sha256(subject.encode()).digest()[:16], "big") >> 1 | 1)
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(_ANYBODY.public_key()), critical=False)
    )
    if not authority:
        made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(NODE_HOST)]), critical=False)
    return made.sign(_ANYBODY, None).public_bytes(Encoding.PEM)


def fingerprint(name: str) -> str:
    """SHA-256 of the certificate that the node of a key shows to nodes, in hexadecimal: the same at each start. Raises
    SignatureError for what is no key."""
    shown = x509.load_pem_x509_certificate(_certificate(name, public_key(name), False))
    return shown.fingerprint(SHA256()).hex()


@contextmanager
def _in_a_file(content: bytes) -> Iterator[str]:
    """A file of that content for as long as it is needed, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        number = os.memfd_create("wwwserve", os.MFD_CLOEXEC)
        try:
            os.write(number, content)
            yield f"/proc/self/fd/{number}"
        finally:
            os.close(number)
    else:
        with tempfile.NamedTemporaryFile() as file:  # which only its owner may read
            file.write(content)
            file.flush()
            yield file.name


def _load(context: ssl.SSLContext, identity: Identity) -> None:
    """Have a context show a node's certificate and check others'."""
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=_certificate("wwwserve nodes", _ANYBODY.public_key(), True).decode())
    with _in_a_file(_certificate(identity.name, identity.public, False) + identity.pem()) as file:
        context.load_cert_chain(file)


def server_context(identity: Identity, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """For a server: nodes see the node's certificate, users an ordinary one from two files in PEM, if there are any.
    Clients may show a certificate. Raises OSError for files that cannot be used."""
    node = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    node.verify_mode = ssl.CERT_OPTIONAL
    _load(node, identity)
    node.num_tickets = 0
    if certificate is None:
        return node
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_OPTIONAL
    _load(context, identity)  # for what clients show
    context.num_tickets = 0
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError:  # which does not say of which file
        raise OSError(f"{certificate} and {key} are no certificate and its key, both in PEM") from None

    def choose(connection: ssl.SSLObject, host: str | None, _: ssl.SSLContext) -> None:
        if host == NODE_HOST:
            connection.context = node

    context.sni_callback = choose
    return context


class PeerContext(ssl.SSLContext):
    """For connections to one peer, to be checked by `KeyCheck`."""

    peer: str

    @classmethod
    def to(cls, identity: Identity, peer: str) -> "PeerContext":
        """By which `identity` speaks to `peer`."""
        made = cls(ssl.PROTOCOL_TLS_CLIENT)
        made.check_hostname = False  # its key is checked
        _load(made, identity)
        made.peer = peer
        return made


class KeyCheck(aiohttp.Fingerprint):
    """Has aiohttp send nothing before it is known that the other side of a connection has the key that it is to have.

    A connector with it sends over TLS with a context that the request brings alone: aiohttp checks no certificate else.
    """

    def __init__(self) -> None:
        super().__init__(bytes(32))

    def check(self, transport: Any) -> None:
        """See `aiohttp.Fingerprint`. Raises aiohttp.ServerFingerprintMismatch."""
        context = transport.get_extra_info("sslcontext")
        if isinstance(context, PeerContext) and certified(transport) != context.peer:
            host, port, *_ = transport.get_extra_info("peername")
            raise aiohttp.ServerFingerprintMismatch(
                context.peer.encode(), (certified(transport) or "").encode(), host, port
            )


def certified(transport: Any) -> str | None:
    """The key that the other side of a connection has shown to have; None for none."""
    secured = transport.get_extra_info("ssl_object")
    shown = secured.getpeercert(binary_form=True) if secured is not None else None
    if shown is None:
        return None
    try:
        key = x509.load_der_x509_certificate(shown).public_key()
        return name_of(key) if isinstance(key, Ed25519PublicKey) else None
    except (ValueError, SignatureError):
        return None
