# SPDX-License-Identifier: Apache-2.0
"""How a program keeps its identity current: files of one's own PKI read again, a joined agent's certificate renewed.

    data_dir/identity/agent.pem     a joined agent's key and certificate, replaced as a whole
    data_dir/identity/ca.pem        the CA that it joined
    data_dir/identity/revoked       the signed lists that it has heard of

Invariants: what is in force is replaced as a whole or not at all; connections that exist are not touched here.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import structlog
import trio

from p2pdist.core.identity import parse_token, renewal_time
from p2pdist.errors import ConfigError, IdentityRefused, InvalidInput, P2PDistError, RemoteProtocolError
from p2pdist.identity import credentials, enrolment
from p2pdist.identity.authority import write_private
from p2pdist.identity.credentials import Identity, read_file
from p2pdist.identity.revocations import SignedLists

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from random import Random

    from p2pdist.identity.credentials import Credential
    from p2pdist.identity.enrolment import Enrolled

log = structlog.get_logger(__name__)

JOIN_S = 120.0
"""For the first certificate, while no scheduler answers."""
RETRY_S = 60.0
"""Between attempts to renew, at most; less where little of the certificate's life is left."""
LOOK_S = 30.0
"""How often the wall clock, which may jump, and the files of one's own PKI are looked at."""


@dataclass(frozen=True, slots=True)
class Files:
    """Where one's own PKI puts what it gives."""

    authority: Path
    certificate: Path
    key: Path
    crl: Path | None = None

    def load(self) -> Credential:
        """Return what is there now. Raises ConfigError."""
        parts = [
            read_file(path, key)
            for key, path in (("ca_file", self.authority), ("cert_file", self.certificate), ("key_file", self.key))
        ]
        crl = read_file(self.crl, "crl_file") if self.crl is not None else b""
        try:
            return credentials.load(*parts, crl=crl)
        except ConfigError as error:
            raise ConfigError(f"ca_file, cert_file, key_file: {error}") from error

    def marks(self) -> list[tuple[int, int, int] | None]:
        """Return what differs once a file was written or replaced."""
        return [_mark(path) for path in (self.authority, self.certificate, self.key, self.crl) if path is not None]


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def files_of(
    ca_file: Path | None, cert_file: Path | None, key_file: Path | None, crl_file: Path | None
) -> Files | None:
    """Return the files that settings name, None where they name none. Raises ConfigError where some are missing."""
    if ca_file is not None and cert_file is not None and key_file is not None:
        return Files(ca_file, cert_file, key_file, crl_file)
    if any(path is not None for path in (ca_file, cert_file, key_file, crl_file)):
        raise ConfigError("ca_file, cert_file and key_file go together: set all three, or none")
    return None


class Keeper(Protocol):
    """What an agent or scheduler needs of its identity's keeper."""

    identity: Identity
    trouble: str
    """Why there is no newer certificate although it was time for one; "" where all is well."""

    def heed(self, data: bytes) -> frozenset[str]:
        """Take in a signed list of revoked names, and return it. Raises RemoteProtocolError where it is none."""

    def lists(self) -> dict[bytes, frozenset[str]]:
        """Return the signed lists that are known, and what they say."""

    def reload(self) -> None:
        """Look at files again. Never raises a P2PDistError: what cannot be used leaves what was."""

    async def run(self) -> None:
        """Keep the identity current until cancelled."""


class FilesKeeper:
    """An identity from one's own PKI."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._marks = files.marks()
        self.identity = Identity(files.load())
        self.trouble = ""

    def reload(self) -> None:
        self._marks = self._files.marks()
        try:
            credential = self._files.load()
            if credential.name != self.identity.name:
                raise ConfigError(f"the certificate is now for {credential.name}, not {self.identity.name}: restart")
        except ConfigError as error:
            self.trouble = str(error)
            log.error("certificate not read again, the old one stays in force", why=self.trouble)
            return
        self.identity.credential, self.trouble = credential, ""
        log.info("certificate read", name=str(credential.name), ends=stamp(credential.not_after))

    def look(self) -> None:
        """Read the files again if somebody has changed them: not every PKI that renews can send a signal."""
        if self._files.marks() != self._marks:
            self.reload()

    def heed(self, data: bytes) -> frozenset[str]:
        """Return nothing: another PKI has its own lists (`crl_file`)."""
        return frozenset()

    def lists(self) -> dict[bytes, frozenset[str]]:
        return {}

    async def run(self) -> None:
        """Look at the files, and say when the certificate's end comes near and nobody has put another in its place."""
        warned = 0.0
        while True:
            self.look()
            credential = self.identity.credential
            if time.time() > credential.late_at and warned != credential.not_after:
                warned = credential.not_after
                log.warning("the certificate ends soon: put a new one in its place", ends=stamp(warned))
            await trio.sleep(LOOK_S)


class JoinedKeeper:
    """An identity from the cluster's CA, renewed at a scheduler.

    Args:
        directory: of agent.pem, ca.pem and revoked.
        schedulers: where to renew, tried in turn.
    """

    def __init__(self, directory: Path, schedulers: Sequence[tuple[str, int]], rng: Random) -> None:
        self._directory = directory
        self._schedulers = schedulers
        self._rng = rng
        self._authority = read_file(directory / "ca.pem", "identity")
        self.identity = Identity(self._load())
        self.renewals = 0
        self.trouble = ""
        self._lists = SignedLists(self._authority, self.identity.name.cluster)
        with suppress(FileNotFoundError):
            self._lists.unpack((directory / "revoked").read_bytes())
        self._revoke()

    @classmethod
    async def join(cls, directory: Path, schedulers: Sequence[tuple[str, int]], rng: Random, text: str) -> JoinedKeeper:
        """Return the keeper of a new identity, got for a join token.

        Raises:
            ConfigError: the token is no good, or no scheduler answers for JOIN_S.
        """
        try:
            token = parse_token(text)
        except InvalidInput as error:
            raise ConfigError(f"join: {error}") from error
        last: P2PDistError | None = None
        refusals: list[str] = []
        with trio.move_on_after(JOIN_S):
            while True:
                refusals.clear()
                for host, port in schedulers:
                    try:
                        enrolled = await enrolment.join(host, port, token)
                    except IdentityRefused as error:
                        # A token is one scheduler's: that others do not know it says nothing yet.
                        refusals.append(str(error))
                        continue
                    except P2PDistError as error:
                        log.warning("not joined yet", scheduler=f"{host}:{port}", why=str(error))
                        last = error
                        continue
                    _save(directory, enrolled)
                    keeper = cls(directory, schedulers, rng)
                    keeper.heed(enrolled.revoked)
                    log.info("joined the cluster", name=str(keeper.identity.name), scheduler=f"{host}:{port}")
                    return keeper
                if len(refusals) == len(schedulers):
                    raise ConfigError(f"join: {'; '.join(dict.fromkeys(refusals))}")
                await trio.sleep(2.0 * (0.5 + rng.random()))
        refused = "".join(f"; {why}" for why in refusals)
        raise ConfigError(
            f"join: no scheduler answers: {last}; is it running, and is its port open from here?{refused}"
        )

    def _load(self) -> Credential:
        pem = read_file(self._directory / "agent.pem", "identity")
        try:
            return credentials.load(self._authority, pem, b"")
        except ConfigError as error:
            raise ConfigError(f"{self._directory}: {error}; delete it and join again") from error

    def reload(self) -> None:
        """Do nothing: what is in force came from a scheduler."""

    def heed(self, data: bytes) -> frozenset[str]:
        if not data:
            return frozenset()
        try:
            kept, names = self._lists.take(data), self._lists.read(data).names
        except InvalidInput as error:
            raise RemoteProtocolError(str(error)) from error
        if kept:
            self._revoke()
            try:
                write_private(self._directory / "revoked", self._lists.pack())
            except OSError as error:
                log.error("the list of revoked names is not kept", why=str(error))
        return names

    def lists(self) -> dict[bytes, frozenset[str]]:
        return {signed: self._lists.read(signed).names for signed in self._lists.signed}

    def _revoke(self) -> None:
        """Put in force what the lists come to."""
        before, revocations = self.identity.revocations.names, self._lists.revocations
        self.identity.revocations = revocations
        if revocations.names != before:
            log.info("names are revoked", number=revocations.number, names=len(revocations.names))
        if self.identity.name.path in revocations.names - before:
            log.error(
                "this agent's certificate is revoked: nobody in the cluster talks to it any more",
                mend=f"where that is a mistake, delete {self._directory} and join with a new token",
            )

    async def run(self) -> None:
        while True:
            credential = self.identity.credential
            at = max(renewal_time(credential.not_before, credential.not_after, self._rng), time.time() + 1)
            while (wait_s := at - time.time()) > 0:  # noqa: ASYNC110 - the wall clock gives no event
                await trio.sleep(min(wait_s, LOOK_S))
            while not await self._renew(credential):
                left_s = max(credential.not_after - time.time(), 0)
                await trio.sleep(min(RETRY_S, 1 + left_s / 20) * (0.5 + self._rng.random()))

    async def _renew(self, credential: Credential) -> bool:
        """Get the next certificate from whichever scheduler gives one; return whether it is in force."""
        if not self._schedulers:
            self.trouble = "no scheduler is configured that could renew it"
        for host, port in self._schedulers:
            try:
                enrolled = await enrolment.renew(host, port, credential, self._authority)
                _save(self._directory, enrolled)
                fresh = self._load()
                self.heed(enrolled.revoked)
            except (P2PDistError, OSError) as error:
                self.trouble = str(error)
                log.warning(
                    "certificate not renewed",
                    scheduler=f"{host}:{port}",
                    why=str(error),
                    ends=stamp(credential.not_after),
                )
                continue
            self.identity.credential, self.trouble = fresh, ""
            self.renewals += 1
            log.info("certificate renewed", name=str(fresh.name), ends=stamp(fresh.not_after))
            return True
        return False


def _save(directory: Path, enrolled: Enrolled) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(directory / "ca.pem", enrolled.authority)
    write_private(directory / "agent.pem", enrolled.certificate + b"\n" + enrolled.key)


def stamp(unix_s: float) -> str:
    """Return a moment as people read it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_s))
