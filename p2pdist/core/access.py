# SPDX-License-Identifier: Apache-2.0
"""Who may read what through the mirror, and how fresh a tag must be: rules by registry and repository.

Owns: the rules, how they match, and what holds where none does. The first rule that matches wins; where none
does, content is served only if the origin gives it to anybody. Refuses to ask anyone: `gate.py` does.

Invariants: a `Policy` never changes; whoever wants another puts another in its place.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path  # noqa: TC003 - the settings' loader reads the hints
from typing import TYPE_CHECKING, Literal, get_args

from p2pdist.errors import InvalidInput

if TYPE_CHECKING:
    from p2pdist.core.types import Repository

Mode = Literal["public", "passthrough", "node-credentials", "deny"]
TagMode = Literal["origin", "stale-if-error", "pinned"]

_GLOB = re.compile(r"[a-z0-9._/:*\[\]-]{1,300}")
_STARS_MAX = 4
"""Matching costs up to the name's length to the power of the stars."""
_AUTHORIZATION = re.compile(r"(?:Basic|Bearer) +[!-~]{1,12000}", re.IGNORECASE)
_SALT = secrets.token_bytes(16)
"""Of this process: what is kept of a caller's secret is of no use elsewhere."""


def _matches(rule: AccessRule | TagRule, repository: Repository) -> bool:
    return bool(
        _compiled(rule.registry).fullmatch(repository.registry)
        and _compiled(rule.repository).fullmatch(repository.name)
    )


@lru_cache(maxsize=1024)
def _compiled(glob: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in glob.split("*")))


def _check_globs(registry: str, repository: str) -> None:
    for key, glob in (("registry", registry), ("repository", repository)):
        if not _GLOB.fullmatch(glob) or glob.count("*") > _STARS_MAX:
            raise InvalidInput(f"{key} {glob[:100]!r} is no glob over names, such as ghcr.io, *.lab or team/*")
    if "/" in registry:
        raise InvalidInput(f"registry {registry[:100]!r} has a slash; what follows it goes into `repository`")


def _parse_rule(text: str, words: tuple[str, ...]) -> tuple[str, str, str]:
    where, _, word = text.rpartition("=")
    registry, _, repository = where.partition("/")
    if not registry or word not in words:
        raise ValueError(f"{text!r} is not REGISTRY[/REPOSITORY]=MODE with a MODE of {', '.join(words)}")
    return registry, repository or "*", word


@dataclass(frozen=True, slots=True)
class AccessRule:
    """For the repositories that match: whose rights count at the origin, and whether peers may have the content.

    Args:
        registry, repository: globs over the names that runtimes use; `*` stands for any text, slashes included.
        credentials: for `node-credentials`, a Docker or Kubernetes credentials file or a directory with one;
            None: the agent's `docker_config`.
        share: offer peers also what it took credentials to read. Peers are not authenticated without a cluster
            identity, so this gives it to whoever reaches the peer port and knows the digest.
    """

    registry: str = "*"
    repository: str = "*"
    mode: Mode = "public"
    credentials: Path | None = None
    share: bool = False

    def __post_init__(self) -> None:
        _check_globs(self.registry, self.repository)
        if self.credentials is not None and self.mode != "node-credentials":
            raise InvalidInput(f"credentials go with mode 'node-credentials', not with {self.mode!r}")
        if self.share and self.mode in ("public", "deny"):
            raise InvalidInput(f"share says what happens to private content; mode {self.mode!r} has none")

    @classmethod
    def parse(cls, text: str) -> AccessRule:
        """Return what `REGISTRY[/REPOSITORY]=MODE` means, or raise ValueError."""
        registry, repository, mode = _parse_rule(text, get_args(Mode))
        return cls(registry, repository, mode)  # type: ignore[arg-type]

    def matches(self, repository: Repository) -> bool:
        return _matches(self, repository)


@dataclass(frozen=True, slots=True)
class TagRule:
    """For the repositories that match: what a tag's answer is worth once the origin has given it.

    `origin`: it holds for `tag_ttl_s`. `stale-if-error`: the last one also while the origin gives none.
    `pinned`: the first one for good.
    """

    registry: str = "*"
    repository: str = "*"
    policy: TagMode = "origin"

    def __post_init__(self) -> None:
        _check_globs(self.registry, self.repository)

    @classmethod
    def parse(cls, text: str) -> TagRule:
        """Return what `REGISTRY[/REPOSITORY]=POLICY` means, or raise ValueError."""
        registry, repository, policy = _parse_rule(text, get_args(TagMode))
        return cls(registry, repository, policy)  # type: ignore[arg-type]

    def matches(self, repository: Repository) -> bool:
        return _matches(self, repository)


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules, in order."""

    access: tuple[AccessRule, ...] = ()
    tags: tuple[TagRule, ...] = ()

    def access_to(self, repository: Repository) -> AccessRule:
        """Return the first rule that matches; where none does, that of public content."""
        return next((rule for rule in self.access if rule.matches(repository)), PUBLIC)

    def tag_mode(self, repository: Repository) -> TagMode:
        """Return the first matching rule's policy; where none matches, `origin`."""
        return next((rule.policy for rule in self.tags if rule.matches(repository)), "origin")


PUBLIC = AccessRule()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks the mirror: an Authorization header, or nobody in particular.

    `key` tells callers apart and gives nothing of the header away.
    """

    authorization: str = field(default="", repr=False)
    key: str = field(init=False, default="", repr=False)

    def __post_init__(self) -> None:
        if self.authorization:
            digest = hashlib.sha256(_SALT + self.authorization.encode()).hexdigest()
            object.__setattr__(self, "key", digest)

    @classmethod
    def of(cls, header: str | None) -> Caller:
        """Return the caller behind an Authorization header; one that is none that a registry knows counts as absent."""
        return cls(header) if header is not None and _AUTHORIZATION.fullmatch(header) else NOBODY


NOBODY = Caller()


def not_for_everybody(repository: Repository, said: str) -> str:
    """Return the line for a refusal of what only anonymous requests are made for: why, and what to configure."""
    return (
        f"{repository.registry} does not give it to everybody ({said}); for private images add an [[access]] rule with "
        f"registry = {repository.registry!r}, repository = {repository.name!r} and mode = 'passthrough' or "
        "'node-credentials'"
    )
