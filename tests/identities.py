# SPDX-License-Identifier: Apache-2.0
"""CAs and certificates for tests: right ones, and each kind of wrong one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from p2pdist.core.identity import Name
from p2pdist.identity import certificates, credentials
from p2pdist.identity.authority import Authority
from p2pdist.identity.credentials import Identity

if TYPE_CHECKING:
    from pathlib import Path

    from p2pdist.core.identity import Role
    from p2pdist.identity.credentials import Credential

CLUSTER = "lab"


def make_authority(directory: Path, cluster: str = CLUSTER) -> Authority:
    return Authority.make(directory, cluster, time.time())


def pem_of(
    authority: Authority,
    name: str,
    role: Role = "agent",
    *,
    cluster: str = CLUSTER,
    starts: float = 0.0,
    lasts: float = 3600.0,
) -> tuple[bytes, bytes]:
    """Return a certificate and its key; it starts and ends so many seconds from now."""
    key = certificates.make_key()
    now = time.time() + starts
    pem = authority.issue(key.public_key(), Name(cluster, role, name), lasts, now)
    return pem, certificates.key_pem(key)


def credential(
    authority: Authority,
    name: str,
    role: Role = "agent",
    *,
    trusts: Authority | None = None,
    cluster: str = CLUSTER,
    starts: float = 0.0,
    lasts: float = 3600.0,
) -> Credential:
    """Return what `pem_of` gives, ready for use.

    Args:
        trusts: another CA that it measures others by.
    """
    pem, key = pem_of(authority, name, role, cluster=cluster, starts=starts, lasts=lasts)
    return credentials.load((trusts or authority).certificate, pem, key)


def identity(authority: Authority, name: str, role: Role = "agent") -> Identity:
    return Identity(credential(authority, name, role))


class FixedKeeper:
    """A keeper of an identity that never changes."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.trouble = ""

    def heed(self, data: bytes) -> frozenset[str]:
        return frozenset()

    def lists(self) -> dict[bytes, frozenset[str]]:
        return {}

    def reload(self) -> None:
        pass

    async def run(self) -> None:
        pass
