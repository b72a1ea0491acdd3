# SPDX-License-Identifier: Apache-2.0
"""What has been shown of who may read what: grants, and which content belongs to which manifest. Pure.

A grant says that the origin has served this manifest or blob of this repository to this subject, a moment ago.
What a granted manifest names is granted with it, in the same repository and only there: content is shared between
repositories, rights are not.

Invariants: a grant ends by itself; both tables are bounded, and what falls out of them is asked for again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from p2pdist.core.types import Digest, Repository

MAX_GRANTS = 20_000
MAX_NAMED = 50_000
_MAX_PARENTS = 8
"""Of one blob in one repository: base layers belong to every image there."""
_MAX_DEPTH = 4
"""An index, an index in it, a manifest, a blob."""


class Grants:
    """All grants of one agent. Subjects are opaque; "" is the agent itself."""

    def __init__(self) -> None:
        self._until: OrderedDict[tuple[str, Repository, Digest], float] = OrderedDict()
        self._parents: OrderedDict[tuple[Repository, Digest], tuple[Digest, ...]] = OrderedDict()

    def grant(self, subject: str, repository: Repository, digest: Digest, until: float) -> None:
        key = (subject, repository, digest)
        self._until[key] = until
        self._until.move_to_end(key)
        while len(self._until) > MAX_GRANTS:
            self._until.popitem(last=False)

    def name(self, repository: Repository, parent: Digest, children: Iterable[Digest]) -> None:
        """Note what a manifest names; its bytes match its digest, so it says the same in every repository."""
        for child in children:
            key = (repository, child)
            others = tuple(known for known in self._parents.get(key, ()) if known != parent)
            self._parents[key] = (parent, *others)[:_MAX_PARENTS]
            self._parents.move_to_end(key)
        while len(self._parents) > MAX_NAMED:
            self._parents.popitem(last=False)

    def parents(self, repository: Repository, digest: Digest) -> tuple[Digest, ...]:
        """Return the manifests of this repository that name it, the latest first."""
        return self._parents.get((repository, digest), ())

    def itself(self, subject: str, repository: Repository, digest: Digest, now: float) -> bool:
        """Return whether exactly this was granted."""
        return self._until.get((subject, repository, digest), 0.0) > now

    def holds(self, subject: str, repository: Repository, digest: Digest, now: float) -> bool:
        """Return whether it, or a manifest that leads to it, was granted."""
        layer = {digest}
        for _ in range(_MAX_DEPTH):
            if any(self.itself(subject, repository, each, now) for each in layer):
                return True
            layer = {parent for each in layer for parent in self.parents(repository, each)}
        return False

    def revoke(self, subject: str, repository: Repository) -> None:
        """Take back all that this subject was granted in a repository."""
        for key in [key for key in self._until if key[:2] == (subject, repository)]:
            del self._until[key]

    def clear(self) -> None:
        """Take back everything; what belongs to what stays known."""
        self._until.clear()
