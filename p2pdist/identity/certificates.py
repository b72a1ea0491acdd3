# SPDX-License-Identifier: Apache-2.0
"""Keys, certificates, requests and signed lists, as PEM; the only file that imports cryptography.

All keys are ECDSA on P-256: the cheapest handshake of those that every TLS library knows. What a request says beside
its key and its one name is not looked at, and what a certificate says is written here, not by whoever asks.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from p2pdist.core.identity import Name, encode_secret, name_in, parse_revocations
from p2pdist.core.types import PeerId
from p2pdist.errors import ConfigError, InvalidInput

if TYPE_CHECKING:
    from p2pdist.core.identity import Revocations

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey

AUTHORITY_DAYS = 3650
SKEW_S = 300.0
"""A certificate is valid from so long ago, or a tenth of its life: other clocks may be behind."""
_CURVE = ec.SECP256R1
_MALFORMED = (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension)


def make_key() -> PrivateKey:
    return ec.generate_private_key(_CURVE())


def key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_key(pem: bytes) -> PrivateKey:
    """Return the private key; raises ConfigError."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except _MALFORMED as error:
        raise ConfigError(f"not a private key in PEM without a password: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("not an elliptic-curve key")
    return key


def _spki(key: PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def peer_id_of(key: PublicKey) -> PeerId:
    """Return the peer id that a key stands for: 128 bits of its SHA-256. Nobody can ask for another's."""
    return PeerId(hashlib.sha256(_spki(key)).hexdigest()[:32])


def pin_of(pem: bytes) -> str:
    """Return the hash of a certificate's key, as tokens carry it. Raises InvalidInput."""
    key = _certificate(pem).public_key()
    data = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encode_secret(hashlib.sha256(data).digest())


def make_authority(cluster: str, now: float) -> tuple[bytes, bytes]:
    """Return the certificate and the key of a new cluster's CA, which signs no other CA."""
    key = make_key()
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    subject = _subject(cluster)
    certificate = (
        _builder(key.public_key(), subject, subject, now, AUTHORITY_DAYS * 86400.0)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key_pem(key)


def cluster_of(pem: bytes) -> str:
    """Return the cluster that `make_authority` made this CA for. Raises InvalidInput."""
    names = _certificate(pem).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1:
        raise InvalidInput("the CA's certificate does not name a cluster")
    return str(names[0].value)


def issue(
    authority_pem: bytes, authority_key: PrivateKey, key: PublicKey, name: Name, lifetime_s: float, now: float
) -> bytes:
    """Return a certificate for a key and a name, signed by the CA and valid for so long from now."""
    authority = _certificate(authority_pem)
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH]
    if name.role == "agent":
        purposes.append(ExtendedKeyUsageOID.CLIENT_AUTH)
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    issuer_key = authority_key.public_key()
    certificate = (
        _builder(key, _subject(f"{name.role} {name.name}"[:64]), authority.subject, now, lifetime_s)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(name))]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _subject(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    key: PublicKey, subject: x509.Name, issuer: x509.Name, now: float, lifetime_s: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_moment(now - min(SKEW_S, lifetime_s / 10)))
        .not_valid_after(_moment(now + lifetime_s))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _moment(unix_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(unix_s), datetime.UTC)


def make_request(key: PrivateKey, name: Name) -> bytes:
    """Return a signing request for a key and a name."""
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(name))])
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(f"{name.role} {name.name}"[:64]))
    request = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes) -> tuple[PublicKey, Name]:
    """Return the key, whose possession the request proves, and the name that it asks for. Raises InvalidInput."""
    try:
        request = x509.load_pem_x509_csr(pem)
        key = request.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVE):
            raise InvalidInput("the request's key is not one of P-256")
        if not request.is_signature_valid:
            raise InvalidInput("the request is not signed with its key")
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (*_MALFORMED, x509.ExtensionNotFound, InvalidSignature) as error:
        raise InvalidInput(f"not a certificate signing request with a name: {error}") from error
    if len(names) != 1:
        raise InvalidInput(f"the request asks for {len(names)} names where one is given")
    return key, name_in(names.get_values_for_type(x509.UniformResourceIdentifier))


def key_of(pem: bytes) -> PublicKey:
    """Return the key in a certificate of ours. Raises InvalidInput."""
    key = _certificate(pem).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InvalidInput("the certificate's key is not an elliptic-curve key")
    return key


def described(pem: bytes) -> tuple[Name, float, float]:
    """Return the name in a certificate, and from and until when it is valid in Unix seconds. Raises InvalidInput."""
    certificate = _certificate(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (*_MALFORMED, x509.ExtensionNotFound):
        uris: list[str] = []
    else:
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return name_in(uris), since.timestamp(), until.timestamp()


def _certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except _MALFORMED as error:
        raise InvalidInput(f"not a certificate in PEM: {error}") from error


def sign_list(revocations: Revocations, authority_key: PrivateKey) -> bytes:
    """Return a list with the CA's signature before it, as it is kept and sent."""
    body = revocations.encode()
    return base64.b64encode(authority_key.sign(body, ec.ECDSA(hashes.SHA256()))) + b"\n" + body


def read_list(data: bytes, authority_pem: bytes, cluster: str) -> Revocations:
    """Return a list that the CA has signed for this cluster. Raises InvalidInput."""
    signature, _, body = data.partition(b"\n")
    try:
        key_of(authority_pem).verify(base64.b64decode(signature, validate=True), body, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError) as error:
        raise InvalidInput("the list of revoked names is not signed by this cluster's CA") from error
    revocations = parse_revocations(body)
    if revocations.cluster != cluster:
        raise InvalidInput(f"the list of revoked names is cluster {revocations.cluster!r}'s, not {cluster!r}'s")
    return revocations
