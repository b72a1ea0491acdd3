# SPDX-License-Identifier: Apache-2.0
"""A cluster's CA in a directory: its certificate and key, join tokens, the list of revoked names.

    ca.pem        to give to anybody
    ca-key.pem    whoever has it is the cluster
    revoked       the signed list
    tokens/       one file for each, by the hash of its secret: when it ends, and how often it may be used

Invariants: a token is counted as used, on disk, before a certificate is given for it, and is of one directory, never
copied to another; commands and schedulers that share the directory take turns (flock); files are replaced as a whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pdist.core.identity import Name, Revocations, Token, encode_secret, secret_hash
from p2pdist.errors import ConfigError, InvalidInput
from p2pdist.identity import certificates

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from p2pdist.core.types import PeerId

KEPT_S = 86400.0
"""For so long after its end a token is known, so that whoever tries it is told that it has expired."""


@dataclass(frozen=True, slots=True)
class Authority:
    """The CA of a cluster. All methods are short and blocking; OSError becomes ConfigError."""

    directory: Path
    cluster: str
    certificate: bytes
    key: certificates.PrivateKey

    @classmethod
    def make(cls, directory: Path, cluster: str, now: float) -> Authority:
        """Make a CA in a directory that has none. Raises ConfigError."""
        if (directory / "ca-key.pem").exists() or (directory / "ca.pem").exists():
            raise ConfigError(f"{directory} has a CA already; choose another directory, or delete what is there")
        certificate, key = certificates.make_authority(cluster, now)
        return cls._put(directory, certificate, certificates.read_key(key))

    @classmethod
    def copy(cls, source: Path, directory: Path) -> Authority:
        """Make a directory for another scheduler: of the same CA with its revoked names, and without its tokens.

        Where there is a copy already it hears of names revoked since. The source is only read.

        Raises:
            ConfigError: the source has no CA, or the directory has another one.
        """
        original = cls.open(source)
        if (directory / "ca.pem").exists():
            copied = cls.open(directory)
            if copied.certificate != original.certificate:
                raise ConfigError(f"{directory} has the CA of {copied.cluster}, {source} that of {original.cluster}")
        else:
            copied = cls._put(directory, original.certificate, original.key)
        if original.signed_revocations():
            copied.merge(original.revocations())
        return copied

    @classmethod
    def _put(cls, directory: Path, certificate: bytes, key: certificates.PrivateKey) -> Authority:
        with _named(directory):
            for place in (directory, directory / "tokens"):
                _make_private(place)
            write_private(directory / "ca-key.pem", certificates.key_pem(key))
            write_private(directory / "ca.pem", certificate)
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> Authority:
        """Return the CA in a directory. Raises ConfigError."""
        with _named(directory):
            certificate, key = (directory / "ca.pem").read_bytes(), (directory / "ca-key.pem").read_bytes()
        try:
            authority = cls(directory, certificates.cluster_of(certificate), certificate, certificates.read_key(key))
            if certificates.key_of(certificate) != authority.key.public_key():
                raise InvalidInput("ca-key.pem is not the key of ca.pem")
        except (InvalidInput, ConfigError) as error:
            raise ConfigError(f"{directory}: {error}; `p2pdist cluster init` makes a CA") from error
        return authority

    def issue(self, key: certificates.PublicKey, name: Name, lifetime_s: float, now: float) -> bytes:
        return certificates.issue(self.certificate, self.key, key, name, lifetime_s, now)

    # ---------------------------------------------------------------- tokens

    def make_token(self, *, uses: int, lifetime_s: float, now: float) -> Token:
        """Return a token that may be used so often, for so long; old ones are forgotten. Raises ConfigError."""
        token = Token(self.cluster, encode_secret(secrets.token_bytes(16)), certificates.pin_of(self.certificate))
        with self._turn():
            self._forget_old(now)
            self._write_token(secret_hash(token.secret), uses, now + lifetime_s)
        return token

    def spend(self, secret: str, now: float) -> None:
        """Count one use of a token.

        Raises:
            InvalidInput: it is unknown, has expired, or has been used as often as it may.
            ConfigError: the directory cannot be written.
        """
        known_as = secret_hash(secret)
        with self._turn():
            try:
                entry = json.loads((self.directory / "tokens" / known_as).read_bytes())
                uses, ends = int(entry["uses"]), float(entry["ends"])
            except FileNotFoundError as error:
                raise InvalidInput("the join token is not one of this scheduler's") from error
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidInput("the join token's file is damaged; make a new one") from error
            if now >= ends:
                raise InvalidInput("the join token has expired; `p2pdist cluster token` makes a new one")
            if uses <= 0:
                raise InvalidInput("the join token is spent; `p2pdist cluster token --uses N` makes one for N nodes")
            self._write_token(known_as, uses - 1, ends)

    def _write_token(self, known_as: str, uses: int, ends: float) -> None:
        write_private(self.directory / "tokens" / known_as, json.dumps({"uses": uses, "ends": ends}).encode())

    def _forget_old(self, now: float) -> None:
        for path in list((self.directory / "tokens").iterdir()):
            with suppress(ValueError, KeyError, TypeError):
                if json.loads(path.read_bytes())["ends"] + KEPT_S < now:
                    path.unlink()

    # ------------------------------------------------------------ revocation

    def signed_revocations(self) -> bytes:
        """Return the signed list, b"" where nobody is revoked."""
        with _named(self.directory):
            try:
                return (self.directory / "revoked").read_bytes()
            except FileNotFoundError:
                return b""

    def revocations(self) -> Revocations:
        """Return the list. Raises ConfigError where it is not what this CA signed."""
        data = self.signed_revocations()
        if not data:
            return Revocations(self.cluster)
        try:
            return certificates.read_list(data, self.certificate, self.cluster)
        except InvalidInput as error:
            raise ConfigError(f"{self.directory}/revoked: {error}") from error

    def revoke(self, path: str) -> Revocations:
        """Put a name on the list, `agent/PEER_ID` or `scheduler/NAME`. Raises ConfigError, InvalidInput."""
        with self._turn():
            revocations = self.revocations()
            if path not in revocations.names:
                revocations = revocations.with_name(path)
                self._write_list(revocations)
        return revocations

    def merge(self, heard: Revocations) -> bytes:
        """Add the names of a list that another copy of this CA has signed; return the whole list, signed.

        Never waits. Raises ConfigError: the directory cannot be written, or another program is at it.
        """
        with self._turn(waits=False):
            revocations = self.revocations()
            try:
                merged = revocations.merged(heard)
            except InvalidInput as error:
                raise ConfigError(f"{self.directory}/revoked: {error}") from error
            if merged.names != revocations.names:
                self._write_list(merged)
            return self.signed_revocations()

    def _write_list(self, revocations: Revocations) -> None:
        write_private(self.directory / "revoked", certificates.sign_list(revocations, self.key))

    @contextmanager
    def _turn(self, *, waits: bool = True) -> Iterator[None]:
        with _named(self.directory):
            descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _hand_over(descriptor, self.directory)
                fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield
            finally:
                os.close(descriptor)


def enrol(
    authority: Authority, request: bytes, lifetime_s: float, now: float, *, holder: PeerId | None, secret: str
) -> bytes:
    """Return the certificate that a request gets; blocking.

    Args:
        holder: the peer whose valid certificate came with the connection (a renewal), else None.
        secret: of the join token that is spent where there is no holder.

    Raises:
        InvalidInput: it asks for what it may not have.
        ConfigError: the directory cannot be used.
    """
    key, name = certificates.read_request(request)
    if name.cluster != authority.cluster or name.role != "agent":
        raise InvalidInput(f"{name} is not an agent of cluster {authority.cluster!r}")
    if holder is None and name.name != certificates.peer_id_of(key):
        raise InvalidInput("the peer id that is asked for is not that of the request's key")
    if holder is not None and name.name != holder:
        raise InvalidInput(f"{holder} may not have the certificate of {name.name}")
    if name.path in authority.revocations().names:
        raise InvalidInput(f"{name.path} is revoked; delete the agent's `identity` directory and join anew")
    if holder is None:
        authority.spend(secret, now)
    return authority.issue(key, name, lifetime_s, now)


def write_private(path: Path, data: bytes) -> None:
    """Put a file in place as a whole and durably, for the eyes of the directory's owner only."""
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        _hand_over(descriptor, path.parent)
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(fresh, path)


def _make_private(directory: Path) -> None:
    """Make a directory if there is none, for the eyes of its parent's owner only."""
    if directory.is_dir():
        return
    directory.mkdir(mode=0o700, parents=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _hand_over(descriptor, directory.parent)
    finally:
        os.close(descriptor)


def _hand_over(descriptor: int, directory: Path) -> None:
    """Give what root makes to the owner of the directory that it is in: the scheduler's user has to read it."""
    if os.geteuid() == 0:
        owner = directory.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


@contextmanager
def _named(directory: Path) -> Iterator[None]:
    """Turn the system's errors into one line that names the directory."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or directory}: {error.strerror}; `p2pdist cluster init` makes a CA"
        ) from error
