# SPDX-License-Identifier: Apache-2.0
"""The scheduler's identity and its door: TLS with agents, certificates for those that join or renew, revocations.

With a CA (`ca_dir`) the scheduler gives itself a certificate at each start, whose key is never on a disk. An agent
without a certificate gets no further than asking for one. What another copy of the CA has revoked comes by agents, and
is added to this one's list.
"""

from __future__ import annotations

import json
import re
import socket
import time
from typing import TYPE_CHECKING

import structlog
import trio

from p2pdist.core.identity import RENEW_AT, Name, admit, another_name
from p2pdist.errors import ConfigError, IdentityRefused, InvalidInput, P2PDistError, RemoteProtocolError
from p2pdist.identity import certificates, credentials
from p2pdist.identity.authority import Authority, enrol
from p2pdist.identity.channel import TlsChannel, TlsStream, detached
from p2pdist.identity.credentials import ENROL, Identity, not_enrolled, read_file, shown_by
from p2pdist.identity.enrolment import ENROL_S, MAX_REQUEST_BYTES, read_document, read_line
from p2pdist.identity.keeper import FilesKeeper, files_of, stamp
from p2pdist.identity.refusals import Refusals
from p2pdist.identity.revocations import SignedLists
from p2pdist.identity.standing import Standing, standing

if TYPE_CHECKING:
    from p2pdist.core.types import PeerId
    from p2pdist.identity.credentials import Credential
    from scheduler.config import SchedulerConfig

log = structlog.get_logger("scheduler")

HANDSHAKE_S = 5.0
MAX_ENTERING = 1024
"""Connections that have not shown who they are; after a restart all agents come back within seconds."""


class Doorway:
    """Who comes in. Without `ca_dir` or certificate files everybody does, in the clear.

    Raises:
        ConfigError: the CA or the certificate cannot be used.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.refusals = Refusals()
        self.identity: Identity | None = None
        self._lists: SignedLists | None = None
        """Which agents are told."""
        self._trouble = ""
        self._authority: Authority | None = None
        self._files: FilesKeeper | None = None
        self._lifetime_s = config.certificate_s
        self._issuing = trio.CapacityLimiter(1)
        self._entering = 0
        files = files_of(config.ca_file, config.cert_file, config.key_file, config.crl_file)
        if files is not None and config.ca_dir is not None:
            raise ConfigError("ca_dir, ca_file: either the cluster's own CA or another PKI, not both")
        if files is not None:
            self._files = FilesKeeper(files)
            self.identity = self._files.identity
            self._lists = SignedLists(read_file(files.authority, "ca_file"), self.identity.name.cluster)
        elif config.ca_dir is not None:
            self._authority = Authority.open(config.ca_dir)
            self.identity = Identity(self._own_credential(self._authority))
            self._lists = SignedLists(self._authority.certificate, self._authority.cluster)
            self.look()

    def _own_credential(self, authority: Authority) -> Credential:
        key = certificates.make_key()
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:63] or "scheduler"
        name = Name(authority.cluster, "scheduler", host)
        pem = authority.issue(key.public_key(), name, self._lifetime_s, time.time())
        return credentials.load(authority.certificate, pem, certificates.key_pem(key), optional=True)

    def reload(self) -> None:
        """Look at files again, on SIGHUP. Never raises a P2PDistError."""
        if self._files is not None:
            self._files.reload()
        self.look()

    def standing(self) -> Standing:
        """Return how it stands with this scheduler's certificate."""
        return standing(self.identity, self._files.trouble if self._files is not None else "", time.time())

    @property
    def revoked(self) -> tuple[bytes, ...]:
        """The signed lists that agents are told: one, but for moments."""
        return self._lists.signed if self._lists is not None else ()

    def look(self) -> None:
        """Renew our certificate where it is time, and bring the CA's list of revoked names and ours together."""
        authority, identity, lists = self._authority, self.identity, self._lists
        if self._files is not None:
            self._files.look()
        if authority is None or identity is None or lists is None:
            return
        credential = identity.credential
        if time.time() > credential.not_before + RENEW_AT * (credential.not_after - credential.not_before):
            identity.credential = self._own_credential(authority)
        try:
            data = authority.signed_revocations()
            known = self._take(data) if data else frozenset()
            if lists.revocations.names - known:
                self._take(authority.merge(lists.revocations))
            self._trouble = ""
        except (ConfigError, InvalidInput) as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.error("the CA's list of revoked names cannot be used; what is known is in force", why=str(error))

    def heard(self, data: bytes) -> bool:
        """Take in a list that an agent brings; return whether it says anything new.

        Raises:
            RemoteProtocolError: the cluster's CA has not signed it.
        """
        before = self.revoked
        try:
            self._take(data)
        except InvalidInput as error:
            raise RemoteProtocolError(str(error)) from error
        return self.revoked != before

    def _take(self, data: bytes) -> frozenset[str]:
        """Put a signed list in force, and return what it says. Raises InvalidInput."""
        if self._lists is None or self.identity is None:
            raise InvalidInput("this scheduler has no identity")
        before = self.identity.revocations.names
        self._lists.take(data)
        revocations = self.identity.revocations = self._lists.revocations
        if revocations.names != before:
            log.info("names are revoked", number=revocations.number, names=len(revocations.names))
        return self._lists.read(data).names

    async def enter(self, stream: trio.SocketStream) -> trio.SocketStream | TlsStream | None:
        """Return the agent's connection, or None where it was dealt with here; the stream is then of no more use.

        Raises:
            P2PDistError: it is not let in.
            OSError, trio.TooSlowError: it hung up, or said nothing.
        """
        if self.identity is None:
            return stream
        if self._entering >= MAX_ENTERING:
            raise RemoteProtocolError(f"{MAX_ENTERING} connections have not shown who they are")
        self._entering += 1
        sock = detached(stream)
        kept = False
        try:
            source = sock.getpeername()[0]
            channel = TlsChannel(sock, self.identity.credential.server, server_side=True)
            try:
                with trio.fail_after(HANDSHAKE_S):
                    await channel.handshake()
                if channel.tls.selected_alpn_protocol() == ENROL:
                    await self._enrol(TlsStream(channel), source)
                    return None
                channel.holder = self.identity.confirm(channel.tls, "agent")
            except IdentityRefused as error:
                self.refusals.note("agents", source, error)
                raise
            kept = True
            return TlsStream(channel)
        finally:
            self._entering -= 1
            if not kept:
                sock.close()

    def compare(self, channel: TlsChannel, says: PeerId) -> None:
        """Return if an agent is who it says it is, else raise IdentityRefused."""
        if channel.holder is not None and says != channel.holder.name.peer_id:
            error = another_name(says, channel.holder.name)
            self.refusals.note("agents", channel.sock.getpeername()[0], error)
            raise error

    async def _enrol(self, stream: TlsStream, source: str) -> None:
        with trio.fail_after(ENROL_S):
            question = read_document(await read_line(stream, MAX_REQUEST_BYTES))
            try:
                answer = await self._answer(question, stream.channel, source)
            except InvalidInput as error:
                self.refusals.note("enrol", source, not_enrolled(str(error)))
                answer = {"refused": str(error)}
            except ConfigError as error:
                log.error("no certificate given", source=source, why=str(error))
                answer = {"refused": "the scheduler cannot use its CA directory; its log says why"}
            await stream.send_all(json.dumps(answer).encode() + b"\n")

    async def _answer(self, question: dict[str, object], channel: TlsChannel, source: str) -> dict[str, str]:
        authority = self._authority
        if authority is None:
            raise InvalidInput("this scheduler has no CA (ca_dir); its agents get their certificates elsewhere")
        if question.get("ask") == "authority":
            return {"authority": authority.certificate.decode()}
        secret, request = question.get("token"), question.get("request")
        if question.get("ask") != "certificate" or not isinstance(secret, str) or not isinstance(request, str):
            raise InvalidInput("not a question that this scheduler knows")
        holder = self._holder(channel)
        certificate = await trio.to_thread.run_sync(
            lambda: enrol(authority, request.encode(), self._lifetime_s, time.time(), holder=holder, secret=secret),
            limiter=self._issuing,
        )
        name, _, ends = certificates.described(certificate)
        log.info("certificate given", name=str(name), source=source, renewal=holder is not None, ends=stamp(ends))
        return {"certificate": certificate.decode(), "revoked": self.revoked[-1].decode() if self.revoked else ""}

    def _holder(self, channel: TlsChannel) -> PeerId | None:
        """Return the agent whose certificate came with the connection, if one did. Raises InvalidInput."""
        assert self.identity is not None
        if not channel.tls.getpeercert():
            return None
        try:
            name = shown_by(channel.tls).name
            admit(name, cluster=self.identity.name.cluster, role="agent", revoked=self.identity.revocations.names)
        except P2PDistError as error:
            raise InvalidInput(str(error)) from error
        return name.peer_id
