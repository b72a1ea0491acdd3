# SPDX-License-Identifier: Apache-2.0
"""Asking for a certificate: what a node and a scheduler say to each other about it, and the node's side of it.

One line of JSON each way on a TLS connection of its own (ALPN `p2pdist-enrol/1`) to the scheduler's agent port:

    {"ask": "authority"}                               -> {"authority": PEM}
    {"ask": "certificate", "token", "request": PEM}    -> {"certificate": PEM, "revoked"} or {"refused": why}

A node that has only a token asks twice: first for the CA's certificate, whose key the token pins, then, on a second
connection that is verified against that CA, with the token's secret. To renew it shows its certificate instead.
The private key never leaves the node.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from p2pdist.core.identity import Name, admit
from p2pdist.errors import IdentityRefused, InvalidInput, PeerUnavailable, RemoteProtocolError, TransferTimeout
from p2pdist.identity import certificates
from p2pdist.identity.channel import TlsChannel, TlsStream, detached
from p2pdist.identity.credentials import shown_by, stranger

if TYPE_CHECKING:
    import ssl

    from p2pdist.core.identity import Token
    from p2pdist.identity.credentials import Credential

ENROL_S = 10.0
"""For one connection, with its answer: many nodes may be asking at once."""
MAX_REQUEST_BYTES = 16 * 1024
MAX_ANSWER_BYTES = 4 * 1024 * 1024
"""It holds the list of revoked names."""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What a node has got: its certificate, the CA's and the signed list of revoked names (PEM, PEM, b"" if none)."""

    authority: bytes
    certificate: bytes
    key: bytes
    revoked: bytes


async def join(host: str, port: int, token: Token) -> Enrolled:
    """Return a first certificate, for a new key.

    Raises:
        IdentityRefused: the scheduler is not the one that the token is for, or does not take the token.
        PeerUnavailable, TransferTimeout, RemoteProtocolError: it cannot be asked.
    """
    answer = await _ask(host, port, stranger(b""), {"ask": "authority"}, cluster=None)
    authority = _pem(answer, "authority")
    try:
        right = certificates.pin_of(authority) == token.pin
    except InvalidInput as error:
        raise RemoteProtocolError(f"scheduler {host}:{port}: {error}") from error
    if not right:
        why = f"scheduler {host}:{port} has another CA than the join token is for"
        raise IdentityRefused("authority", why, "use a token made with that scheduler's CA, or another scheduler")
    key = certificates.make_key()
    name = Name(token.cluster, "agent", certificates.peer_id_of(key.public_key()))
    return await _request(host, port, stranger(authority), authority, key, name, token.secret)


async def renew(host: str, port: int, credential: Credential, authority: bytes) -> Enrolled:
    """Return a certificate for the same name and a new key, on the strength of the one in force. Raises as `join`."""
    key = certificates.make_key()
    return await _request(host, port, credential.enrolling, authority, key, credential.name, "")


async def _request(
    host: str,
    port: int,
    context: ssl.SSLContext,
    authority: bytes,
    key: certificates.PrivateKey,
    name: Name,
    secret: str,
) -> Enrolled:
    request = certificates.make_request(key, name).decode()
    question = {"ask": "certificate", "token": secret, "request": request}
    answer = await _ask(host, port, context, question, cluster=name.cluster)
    if "refused" in answer:
        why = f"scheduler {host}:{port} gives no certificate: {str(answer['refused'])[:500]}"
        raise IdentityRefused("not-enrolled", why, "see its log and docs/identity.md")
    certificate = _pem(answer, "certificate")
    try:
        given, key_given = certificates.described(certificate)[0], certificates.key_of(certificate)
    except InvalidInput as error:
        raise RemoteProtocolError(f"scheduler {host}:{port}: {error}") from error
    if given != name or key_given != key.public_key():
        raise RemoteProtocolError(f"scheduler {host}:{port} gives a certificate for {given} and not for {name}")
    return Enrolled(authority, certificate, certificates.key_pem(key), _pem(answer, "revoked"))


async def _ask(
    host: str, port: int, context: ssl.SSLContext, question: dict[str, str], *, cluster: str | None
) -> dict[str, Any]:
    """Return the answer to one question; with a cluster the scheduler has to show that it is one of that."""
    where = f"scheduler {host}:{port}"
    try:
        with trio.fail_after(ENROL_S):
            async with await trio.open_tcp_stream(host, port) as plain:
                channel = TlsChannel(detached(plain), context, server_side=False)
                async with TlsStream(channel) as stream:
                    await channel.handshake()
                    if cluster is not None:
                        admit(shown_by(channel.tls).name, cluster=cluster, role="scheduler", revoked=frozenset())
                    await stream.send_all(json.dumps(question).encode() + b"\n")
                    return read_document(await read_line(stream, MAX_ANSWER_BYTES))
    except trio.TooSlowError as error:
        raise TransferTimeout(f"{where} did not answer within {ENROL_S:.0f} s") from error
    except (OSError, ValueError) as error:
        raise PeerUnavailable(f"{where} cannot be asked for a certificate: {error}") from error


async def read_line(stream: TlsStream, limit: int) -> bytes:
    """Return what comes before the first line break.

    Raises:
        RemoteProtocolError: it is longer than `limit` bytes, or there is none.
        OSError, IdentityRefused: the connection broke.
    """
    line = bytearray()
    while b"\n" not in line:
        data = await stream.receive_some()
        line += data
        if not data or len(line) > limit:
            raise RemoteProtocolError("it hung up" if not data else f"a line of more than {limit} bytes")
    return bytes(line[: line.index(b"\n")])


def read_document(line: bytes) -> dict[str, Any]:
    """Return a JSON object. Raises RemoteProtocolError."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise RemoteProtocolError("not a JSON object")
    return document


def _pem(answer: dict[str, Any], key: str) -> bytes:
    value = answer.get(key)
    if not isinstance(value, str):
        raise RemoteProtocolError(f"the scheduler's answer has no {key!r}: {str(answer.get('refused', ''))[:300]}")
    return value.encode()
