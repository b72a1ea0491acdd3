# SPDX-License-Identifier: Apache-2.0
"""The certificate in force, the TLS settings made of it, and what is said to whom it keeps out.

Owns ssl.SSLContext and the meaning of its errors. TLS 1.3 only, both sides with a certificate, no session tickets: each
connection shows its certificate anew, so that a revoked or expired one ends with the connection it was used on.
"""

from __future__ import annotations

import os
import ssl
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from p2pdist.core.identity import WARN_AT, Name, Revocations, admit, name_in
from p2pdist.errors import ConfigError, IdentityRefused, InvalidInput
from p2pdist.identity import certificates

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from p2pdist.core.identity import Role
    from p2pdist.core.types import PeerId

SPEAK, ENROL = "p2pdist/1", "p2pdist-enrol/1"
"""What a connection is for, by ALPN: the wire of docs/wire.md, or asking for a certificate."""

_GET_ONE = (
    "join with a token of this cluster (`p2pdist cluster token`), or see docs/identity.md for certificates of your own"
)
_PLAIN = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG",
          "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE", "UNSUPPORTED_PROTOCOL", "LENGTH_MISMATCH"}  # fmt: skip
_VERIFY = {
    2: "authority", 18: "authority", 19: "authority", 20: "authority", 21: "authority", 7: "authority",
    9: "early", 10: "expired", 23: "revoked", 26: "role", 3: "crl", 12: "crl",
}  # fmt: skip
"""OpenSSL's X509_V_ERR numbers."""
_CAUSES = {
    "authority": ("another CA signed its certificate: it is of another cluster", _GET_ONE),
    "early": ("its certificate is not valid yet", "compare the clocks of both hosts"),
    "expired": (
        "its certificate has expired",
        "compare the clocks; a node that was away for too long joins again with a new token",
    ),
    "revoked": ("its certificate is revoked", "a node that is to come back needs a certificate with a new key"),
    "role": ("its certificate is not for what it does", "each program needs a certificate of its own"),
    "crl": ("the PKI's revocation list is missing or has expired", "put a current one where `crl_file` says"),
}
_ALERTS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate, and this program showed none",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the CA of this program's certificate: it is of another cluster",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "this program's certificate has expired, by its clock",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "this program's certificate is revoked",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept this program's certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "this program's certificate is not for what it does",
}


def refusal(error: ssl.SSLError) -> IdentityRefused:
    """Return what a failed handshake or read means, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = _VERIFY.get(error.verify_code, "certificate")
        why, mend = _CAUSES.get(reason, (f"its certificate is not accepted: {error.verify_message}", _GET_ONE))
        return IdentityRefused(reason, why, mend)
    if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return no_certificate()
    if error.reason in _PLAIN:
        return not_tls()
    if error.reason in _ALERTS:
        return IdentityRefused(
            "refused-us", f"it refuses us: {_ALERTS[error.reason]}", "see its log and docs/identity.md"
        )
    return IdentityRefused("tls", f"TLS failed: {error.reason or error}", "see the other side's log")


def not_tls() -> IdentityRefused:
    return IdentityRefused("plain", "it does not speak TLS 1.3: it has no identity", _GET_ONE)


def no_certificate() -> IdentityRefused:
    return IdentityRefused("no-certificate", "it shows no certificate", _GET_ONE)


def not_enrolled(why: str) -> IdentityRefused:
    return IdentityRefused("not-enrolled", f"it gets no certificate: {why}", "see docs/identity.md")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who is at the other end, and until when that holds (Unix seconds)."""

    name: Name
    not_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A certificate with its key and the CA that others are measured by."""

    name: Name
    not_before: float
    not_after: float
    server: ssl.SSLContext
    client: ssl.SSLContext
    enrolling: ssl.SSLContext
    """A client that asks for the next certificate."""

    @property
    def late_at(self) -> float:
        """From when on it should have been renewed, in Unix seconds."""
        return self.not_before + WARN_AT * (self.not_after - self.not_before)


def load(authority: bytes, chain: bytes, key: bytes, *, crl: bytes = b"", optional: bool = False) -> Credential:
    """Return a credential made of PEM.

    Args:
        authority: the CA's certificate, or several.
        chain: the certificate, and those between it and the CA.
        crl: the PKI's revocation lists, if any; each CA's is then required, and a current one.
        optional: clients may come without a certificate (to enrol).

    Raises:
        ConfigError: they do not go together or say nothing of a cluster.
    """
    try:
        name, not_before, not_after = certificates.described(chain)
        server = _context(ssl.PROTOCOL_TLS_SERVER, [SPEAK, ENROL], authority, chain + b"\n" + key, crl)
        client = _context(ssl.PROTOCOL_TLS_CLIENT, [SPEAK], authority, chain + b"\n" + key, crl)
        enrolling = _context(ssl.PROTOCOL_TLS_CLIENT, [ENROL], authority, chain + b"\n" + key, crl)
    except ssl.SSLError as error:
        raise ConfigError(f"the certificate, its key and the CA cannot be used: {error.reason or error}") from error
    except InvalidInput as error:
        raise ConfigError(str(error)) from error
    if optional:
        server.verify_mode = ssl.CERT_OPTIONAL
    return Credential(
        name=name, not_before=not_before, not_after=not_after, server=server, client=client, enrolling=enrolling
    )


def stranger(authority: bytes) -> ssl.SSLContext:
    """Return what a node that has no certificate asks for one with; with b"" for the CA anybody may answer."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, [ENROL], authority, b"", b"")
    if not authority:
        context.verify_mode = ssl.CERT_NONE
    return context


def _context(protocol: int, alpn: list[str], authority: bytes, chain: bytes, crl: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(alpn)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    for data in filter(None, (authority, crl)):
        with _as_file(data) as path:
            context.load_verify_locations(cafile=path)
    if crl:
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    if chain:
        with _as_file(chain) as path:
            context.load_cert_chain(path)
    return context


@contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """Give bytes a path for OpenSSL, which reads files alone: a key is not to be written to a disk for that."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def shown_by(tls: ssl.SSLObject) -> Holder:
    """Return whose verified certificate the other side of a finished handshake has shown. Raises IdentityRefused."""
    shown = tls.getpeercert()
    if not shown:
        raise no_certificate()
    names = cast("Iterable[tuple[str, str]]", shown.get("subjectAltName", ()))
    try:
        name = name_in(value for kind, value in names if kind == "URI")
    except InvalidInput as error:
        raise IdentityRefused("name", str(error), _GET_ONE) from error
    return Holder(name, ssl.cert_time_to_seconds(str(shown["notAfter"])))


class Identity:
    """What this program is, whom it lets in, and since when: swapped as a whole at renewal, reload and revocation."""

    def __init__(self, credential: Credential, revocations: Revocations | None = None) -> None:
        self.credential = credential
        self.revocations = revocations or Revocations(credential.name.cluster)

    @property
    def name(self) -> Name:
        return self.credential.name

    def confirm(self, tls: ssl.SSLObject, role: Role, *, expected: PeerId | None = None) -> Holder:
        """Return who is at the other end of a finished handshake. Raises IdentityRefused."""
        holder = shown_by(tls)
        admit(holder.name, cluster=self.name.cluster, role=role, revoked=self.revocations.names, expected=expected)
        return holder

    def still(self, holder: Holder) -> str:
        """Return why a holder that was let in is not to stay; "" where nothing is against it."""
        if holder.name.path in self.revocations.names:
            return "its certificate is revoked"
        return "its certificate has expired" if time.time() >= holder.not_after else ""


def read_file(path: Path, key: str) -> bytes:
    """Return the content of a file that a setting names. Raises ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error.strerror}") from error
