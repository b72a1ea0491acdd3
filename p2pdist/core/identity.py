# SPDX-License-Identifier: Apache-2.0
"""Who a certificate speaks for: names, roles, join tokens, revoked names, and why somebody is not let in.

Owns the rules, not the cryptography: a chain has been verified (ssl) before a name is looked at here.

Invariants: a certificate has exactly one name of ours; a name has one role, and an agent's is never taken for a
scheduler's; the peer id of an agent follows from its name alone, so that nobody can say that it is somebody else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from p2pdist.core.types import PeerId
from p2pdist.errors import IdentityRefused, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable
    from random import Random

Role = Literal["agent", "scheduler"]
SCHEME = "p2pdist://"
MAX_REVOKED = 20_000
"""Names on one list: it goes to each agent as one message."""
RENEW_AT = 0.5
"""Part of its life after which a certificate is renewed: as much is left for schedulers that are away."""
RENEW_JITTER = 0.1
WARN_AT = 2 / 3
"""Part of its life after which a certificate that nobody has renewed is something to look at."""

_LABEL = r"[A-Za-z0-9._-]{1,63}"
_NAME = re.compile(rf"p2pdist://({_LABEL})/(agent|scheduler)/({_LABEL})")
_PATH = re.compile(rf"(agent|scheduler)/{_LABEL}")
_TOKEN = re.compile(rf"({_LABEL}):([A-Za-z0-9_-]{{22}}):([A-Za-z0-9_-]{{43}})")
_PEER_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Name:
    """What a certificate says in its one URI: `p2pdist://<cluster>/<role>/<name>`."""

    cluster: str
    role: Role
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.cluster}/{self.path}"

    @property
    def path(self) -> str:
        """`<role>/<name>`, which a list of revoked names holds."""
        return f"{self.role}/{self.name}"

    @property
    def peer_id(self) -> PeerId:
        """The name itself where it has a peer id's form (ours always do), else 128 bits of its SHA-256."""
        if _PEER_ID.fullmatch(self.name):
            return PeerId(self.name)
        return PeerId(hashlib.sha256(str(self).encode()).hexdigest()[:32])


def parse_name(uri: str) -> Name:
    """Return what a URI says; raises InvalidInput."""
    match = _NAME.fullmatch(uri)
    if match is None:
        raise InvalidInput(f"{uri[:200]!r} is not {SCHEME}CLUSTER/agent/NAME or {SCHEME}CLUSTER/scheduler/NAME")
    return Name(match[1], "agent" if match[2] == "agent" else "scheduler", match[3])


def name_in(uris: Iterable[str]) -> Name:
    """Return the one name of ours among a certificate's URIs.

    Raises:
        InvalidInput: there is none, there are several, or it is malformed.
    """
    ours = [uri for uri in uris if uri.startswith(SCHEME)]
    if len(ours) != 1:
        raise InvalidInput(f"the certificate has {len(ours)} URIs {SCHEME}CLUSTER/ROLE/NAME where it must have one")
    return parse_name(ours[0])


def admit(other: Name, *, cluster: str, role: Role, revoked: frozenset[str], expected: PeerId | None = None) -> None:
    """Return if the holder of a verified certificate may be talked to, else raise IdentityRefused.

    Args:
        role: what the other side has to be.
        expected: the peer that was dialled, if any.
    """
    if other.cluster != cluster:
        raise IdentityRefused(
            "other-cluster",
            f"its certificate is for cluster {other.cluster!r}, this is {cluster!r}",
            "give it a certificate of this cluster, or the address of a scheduler of its own",
        )
    if other.role != role:
        raise IdentityRefused(
            "role",
            f"its certificate ({other}) is not one of role {role}",
            "each program needs a certificate of its own",
        )
    if other.path in revoked:
        raise IdentityRefused(
            "revoked", f"its certificate ({other}) is revoked", "a node that is to come back joins anew, with a new key"
        )
    if expected is not None and other.peer_id != expected:
        raise IdentityRefused(
            "other-name", f"its certificate is {other}, not that of {expected}", "nothing, if nodes changed addresses"
        )


def another_name(says: PeerId, shown: Name) -> IdentityRefused:
    """Return the refusal of somebody whose words and certificate differ."""
    why = f"it says that it is {says}, and its certificate is {shown}"
    return IdentityRefused("other-name", why, "give each node a certificate of its own")


@dataclass(frozen=True, slots=True)
class Token:
    """A join token: the cluster, a secret that a scheduler knows by its hash, and the hash of the CA's key."""

    cluster: str
    secret: str
    pin: str

    def __str__(self) -> str:
        return f"{self.cluster}:{self.secret}:{self.pin}"

    def __repr__(self) -> str:
        return f"Token({self.cluster!r}, ...)"


def parse_token(text: str) -> Token:
    """Return what a join token says; the error does not repeat it."""
    match = _TOKEN.fullmatch(text.strip())
    if match is None:
        raise InvalidInput("not a join token (CLUSTER:SECRET:KEY, as `p2pdist cluster token` prints it)")
    return Token(match[1], match[2], match[3])


def encode_secret(data: bytes) -> str:
    """Return bytes in the token's alphabet: URL-safe base64 without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def secret_hash(secret: str) -> str:
    """Return by what a token's secret is known where it was made."""
    return hashlib.sha256(secret.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Revocations:
    """The names that are revoked in a cluster. They only become more; `number` counts the lists, for people."""

    cluster: str
    number: int = 0
    names: frozenset[str] = frozenset()

    def with_name(self, path: str) -> Revocations:
        """Return the next list, with one name more. Raises InvalidInput."""
        if not _PATH.fullmatch(path):
            raise InvalidInput(f"{path[:100]!r} is not agent/NAME or scheduler/NAME")
        if len(self.names) >= MAX_REVOKED:
            raise InvalidInput(f"the list holds {MAX_REVOKED} names; make a new cluster")
        return Revocations(self.cluster, self.number + 1, self.names | {path})

    def merged(self, other: Revocations) -> Revocations:
        """Return a list of the names of both, the same whoever joins them. Raises InvalidInput: they are too many."""
        names = self.names | other.names
        if len(names) > MAX_REVOKED:
            raise InvalidInput(f"lists of revoked names come to more than {MAX_REVOKED}; make a new cluster")
        fresh = names not in (self.names, other.names)
        return Revocations(self.cluster, max(self.number, other.number) + fresh, names)

    def encode(self) -> bytes:
        """Return the list as what is signed: the same bytes for the same list."""
        document = {"cluster": self.cluster, "number": self.number, "revoked": sorted(self.names)}
        return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def parse_revocations(data: bytes) -> Revocations:
    """Return the list in bytes whose signature has been verified. Raises InvalidInput."""
    try:
        document = json.loads(data)
        cluster, number, names = document["cluster"], document["number"], document["revoked"]
        right = type(cluster) is str and type(number) is int and type(names) is list and len(names) <= MAX_REVOKED
        if not right or not all(type(name) is str and _PATH.fullmatch(name) for name in names):
            raise ValueError("a field of another type")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInput(f"not a list of revoked names: {error}") from error
    return Revocations(cluster, number, frozenset(names))


def renewal_time(not_before: float, not_after: float, rng: Random) -> float:
    """Return when to renew a certificate, in Unix seconds: at half of its life, spread so that not all come at once."""
    part = RENEW_AT + RENEW_JITTER * (rng.random() - 0.5)
    return not_before + part * (not_after - not_before)
