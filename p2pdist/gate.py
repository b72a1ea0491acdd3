# SPDX-License-Identifier: Apache-2.0
"""Who may have what: nothing leaves the cache before the origin has shown that it would give it, too.

Owns: the check of each request against the repository's access rule, what has been shown so far, and whether peers
may have a repository's content now. Refuses to serve by digest alone: content belongs to a repository through a
manifest that was granted there, or because the origin serves it there.

Whose rights count follows from the rule. `public`: anybody's, by anonymous requests of this agent or, through the
scheduler, of one in the cluster. `node-credentials`: this agent's. `passthrough`: the caller's own.

An origin that refuses ends what it granted before; one that says nothing (down, limited) takes nothing away from
what peers may have, nor from what this node's own credentials have read, but never speaks for a caller.

Invariants: a caller's secret is neither kept (a salted hash is) nor in any text; each wait has a deadline; private
content in the store is served under another repository only after the origin served it there itself.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog
import trio

from p2pdist.core.grants import Grants
from p2pdist.errors import DeniedByOrigin, NotFoundAtOrigin, OriginError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from p2pdist.core.access import AccessRule, Caller, Policy
    from p2pdist.core.types import Digest, Home, ManifestInfo, Repository
    from p2pdist.ports import Origin
    from p2pdist.tags import Resolver

log = structlog.get_logger(__name__)

PUBLIC_TTL_S = 600.0
CALLER_TTL_S = 60.0
"""For how long a yes to a caller holds."""
CHECK_S = 2.5
"""For the origin's verdict where it may stay out; containerd waits for headers, and its other mirrors wait for us."""
CALLER_CHECK_S = 8.0
SILENT_S = 30.0
"""An origin that gave no verdict is asked again after so long."""
MAX_PROOFS = 4096
_SILENCE = "silence"
"""The subject of what is given while the origin says nothing: no yes, so it opens only what stands without one."""

_DIRECT = "direct"
"""The subject of what the origin has given to this agent itself, asked without the scheduler."""


@dataclass(slots=True)
class _Check:
    """A question that the origin is being asked."""

    done: trio.Event = field(default_factory=trio.Event)
    error: OriginError | None = None


class Gate:
    """The node's view of everybody's rights.

    Args:
        home_of: where content in the store, or on its way there, comes from.
        public_ttl_s: for how long it counts that the origin gave something to anybody, or to this node.
    """

    def __init__(
        self,
        policy: Policy,
        origin: Origin,
        resolver: Resolver,
        home_of: Callable[[Digest], Home | None],
        *,
        public_ttl_s: float = PUBLIC_TTL_S,
    ) -> None:
        self.checks = 0
        self.refused = 0
        self._policy = policy
        self._origin = origin
        self._resolver = resolver
        self._home_of = home_of
        self.public_ttl_s = public_ttl_s
        self._grants = Grants()
        self._public: OrderedDict[Repository, float] = OrderedDict()
        """Until when a repository counts as anybody's."""
        self._refused: OrderedDict[Repository, float] = OrderedDict()
        """Until when peers are refused a repository without asking."""
        self._unsaid: OrderedDict[Repository, float] = OrderedDict()
        """Until when peers are given what they were given before, as its origin says nothing."""
        self._sizes: OrderedDict[tuple[Repository, Digest], int] = OrderedDict()
        self._proving: dict[Repository, trio.Event] = {}
        self._checking: dict[tuple[str, str, Repository, Digest], _Check] = {}
        resolver.together = self.is_anybodys
        resolver.granted = self.granted

    @property
    def policy(self) -> Policy:
        return self._policy

    def set_policy(self, policy: Policy) -> None:
        """Put other rules in force; what was granted under the old ones is asked for again."""
        self._policy = self._resolver.policy = policy
        self._grants.clear()
        self._public.clear()
        self._refused.clear()
        self._unsaid.clear()

    def who(self, repository: Repository, caller: Caller) -> Caller | None:
        """Return whose rights count: the caller's, or None: this agent's.

        Raises:
            DeniedByOrigin: nobody's, by the rules.
        """
        rule = self._rule(repository)
        if rule.mode == "deny":
            self.refused += 1
            raise DeniedByOrigin(f"the access rules of this node refuse {repository}", status_code=403)
        return caller if rule.mode == "passthrough" else None

    async def tag(self, repository: Repository, tag: str, who: Caller | None) -> ManifestInfo:
        """Return what a tag stands for, where `who` may have that. Raises as `manifest`."""
        try:
            info = await self._resolver.tag(repository, tag, who)
        except DeniedByOrigin:
            self.refused += 1
            self._denied(repository, who)
            raise
        try:
            await self.manifest(repository, info.digest, who)
        except OriginError as error:
            # An answer that was kept is nothing to tell to one who may not have it.
            error.args = (str(error).replace(info.digest, tag),)
            raise
        return info

    async def manifest(self, repository: Repository, digest: Digest, who: Caller | None) -> None:
        """Return where `who` may have a manifest of this repository.

        Raises:
            DeniedByOrigin, NotFoundAtOrigin: the origin's verdict.
            OriginError: it gave none, and only it can tell.
        """
        subject = _subject(who)
        await self._checked(
            "manifest",
            subject,
            repository,
            digest,
            lambda: self._may_have_manifest(subject, repository, digest),
            lambda: self._check_manifest(repository, digest, who),
        )

    async def blob(self, repository: Repository, digest: Digest, who: Caller | None) -> None:
        """Return where `who` may have a blob of this repository. Raises as `manifest`."""
        subject = _subject(who)
        await self._checked(
            "blob",
            subject,
            repository,
            digest,
            lambda: self._may_have_blob(subject, repository, digest),
            lambda: self._check_blob(repository, digest, who),
        )

    def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        """Return the size of a blob, where a check has shown it."""
        return self._sizes.get((repository, digest))

    def named(self, repository: Repository, manifest: Digest, children: Iterable[Digest]) -> None:
        """Note what a manifest, which was granted, names."""
        self._grants.name(repository, manifest, children)

    def granted(self, repository: Repository, info: ManifestInfo, who: Caller | None) -> None:
        """Note that the origin has just given this manifest."""
        # Another agent's word, by way of the scheduler, must not open what this node alone may read.
        if who is not None or not self._is_foreign(repository, info.digest):
            self._grant(repository, info.digest, who)

    def is_anothers(self, repository: Repository, digest: Digest) -> bool:
        """Return whether what is here is another registry's, and not for everybody.

        The word of this repository's registry, which may be anybody's, is then no proof that it has the content.
        """
        home = self._home_of(digest)
        if home is None or not self._is_foreign(repository, digest):
            return False
        return home.repository is None or home.repository.registry != repository.registry

    # --------------------------------------------------------------- for peers

    def is_anybodys(self, repository: Repository) -> bool:
        """Return whether only anonymous requests are made for a repository, or they alone have sufficed so far."""
        mode = self._rule(repository).mode
        return mode == "public" or (mode == "node-credentials" and self._origin.is_public(repository))

    def may_share(self, repository: Repository) -> bool:
        """Return whether peers may have what is being pulled from here now."""
        return self._rule(repository).share or self.is_anybodys(repository)

    def may_give(self, repository: Repository) -> bool | None:
        """Return whether peers may have what is stored from here; None: that has to be proved first."""
        rule = self._rule(repository)
        if rule.share:
            return True
        if rule.mode in ("passthrough", "deny"):
            return False
        now = trio.current_time()
        if self._public.get(repository, 0.0) > now or self._unsaid.get(repository, 0.0) > now:
            return True
        return False if self._refused.get(repository, 0.0) > now else None

    async def prove(self, repository: Repository, digest: Digest, *, manifest: bool) -> bool:
        """Ask the origin whether anybody may have this, and so its repository; where it says nothing, that stands."""
        while (running := self._proving.get(repository)) is not None:
            await running.wait()
            if (known := self.may_give(repository)) is not None:
                return known
        done = self._proving[repository] = trio.Event()
        try:
            return await self._prove(repository, digest, manifest=manifest)
        finally:
            del self._proving[repository]
            done.set()

    async def _prove(self, repository: Repository, digest: Digest, *, manifest: bool) -> bool:
        now = trio.current_time()
        try:
            with trio.fail_after(CHECK_S):
                if manifest:
                    await self._resolver.ask(repository, digest, None)
                else:
                    await self._origin.blob_size(repository, digest, deadline_s=CHECK_S)
        except NotFoundAtOrigin:
            return False
        except DeniedByOrigin:
            self._denied(repository, None)
            return False
        except (OriginError, trio.TooSlowError):
            _note(self._unsaid, repository, now + SILENT_S)
            return True
        if self.is_anybodys(repository):
            return self._note_public(repository)
        _note(self._refused, repository, now + SILENT_S)
        return False

    def _note_public(self, repository: Repository) -> bool:
        _note(self._public, repository, trio.current_time() + self.public_ttl_s)
        return True

    def _denied(self, repository: Repository, who: Caller | None) -> None:
        """Take back what was granted before the origin refused."""
        self._take_back(_subject(who), repository)
        if who is None:
            self._resolver.refused(repository)
            self._public.pop(repository, None)
            self._unsaid.pop(repository, None)
            _note(self._refused, repository, trio.current_time() + SILENT_S)

    def _take_back(self, subject: str, repository: Repository) -> None:
        for each in (subject,) if subject else ("", _DIRECT, _SILENCE):
            self._grants.revoke(each, repository)

    # ---------------------------------------------------------------- checking

    def _rule(self, repository: Repository) -> AccessRule:
        return self._policy.access_to(repository)

    def _may_have_manifest(self, subject: str, repository: Repository, digest: Digest) -> bool:
        now = trio.current_time()
        if subject or self._is_foreign(repository, digest):
            return self._grants.itself(subject or _DIRECT, repository, digest, now)
        return self._holds(subject, repository, digest, now)

    def _may_have_blob(self, subject: str, repository: Repository, digest: Digest) -> bool:
        now = trio.current_time()
        if self._is_foreign(repository, digest):
            return self._grants.itself(subject or _DIRECT, repository, digest, now)
        return self._holds(subject, repository, digest, now)

    def _holds(self, subject: str, repository: Repository, digest: Digest, now: float) -> bool:
        if self._grants.holds(subject, repository, digest, now):
            return True
        silent = not subject and self._grants.holds(_SILENCE, repository, digest, now)
        return silent and self._stands(repository, digest)

    def _is_foreign(self, repository: Repository, digest: Digest) -> bool:
        """Return whether what is here came from another repository, and is not, or no longer, for everybody."""
        home = self._home_of(digest)
        return home is not None and home.repository != repository and not self._is_given(home)

    def _is_given(self, home: Home) -> bool:
        """Return whether nothing is known to speak against giving what comes from there to anybody."""
        return home.shared and (home.repository is None or self.may_give(home.repository) is not False)

    async def _checked(
        self,
        kind: str,
        subject: str,
        repository: Repository,
        digest: Digest,
        allowed: Callable[[], bool],
        check: Callable[[], Awaitable[None]],
    ) -> None:
        """Return at once where it is allowed already; else check, once for all who have the same question."""
        key = (kind, subject, repository, digest)
        while not allowed():
            running = self._checking.get(key)
            if running is not None:
                await running.done.wait()
                if running.error is not None:
                    raise running.error
                continue
            mine = self._checking[key] = _Check()
            self.checks += 1
            foreign = self._is_foreign(repository, digest)
            try:
                await check()
            except OriginError as error:
                mine.error = error
                if isinstance(error, DeniedByOrigin):
                    self.refused += 1
                    self._take_back(subject, repository)
                raise
            finally:
                del self._checking[key]
                mine.done.set()
            # What came here meanwhile, from where it is not for everybody, was not asked about.
            if foreign or not self._is_foreign(repository, digest):
                return

    async def _check_manifest(self, repository: Repository, digest: Digest, who: Caller | None) -> None:
        if who is not None:
            await self._origin.head_manifest(repository, digest, caller=who, deadline_s=CALLER_CHECK_S)
        elif self._is_foreign(repository, digest):
            # Not through the scheduler: another agent's word must not open what this node alone may read.
            await self._origin.head_manifest(repository, digest, deadline_s=CALLER_CHECK_S)
            self._grants.grant(_DIRECT, repository, digest, trio.current_time() + self.public_ttl_s)
        elif not await self._own_verdict(repository, digest, lambda: self._resolver.ask(repository, digest, None)):
            return
        self._grant(repository, digest, who)

    async def _check_blob(self, repository: Repository, digest: Digest, who: Caller | None) -> None:
        foreign = self._is_foreign(repository, digest)
        if not foreign:
            for parent in self._grants.parents(repository, digest):
                try:
                    await self.manifest(repository, parent, who)
                except NotFoundAtOrigin:
                    continue  # deleted meanwhile; another one, or the blob itself, may still be there
                return
        if who is not None or foreign:
            await self._ask_size(repository, digest, who, CALLER_CHECK_S)
            if who is None:
                self._grants.grant(_DIRECT, repository, digest, trio.current_time() + self.public_ttl_s)
        elif not await self._own_verdict(repository, digest, lambda: self._ask_size(repository, digest, None, CHECK_S)):
            return
        self._grant(repository, digest, who)

    async def _ask_size(self, repository: Repository, digest: Digest, who: Caller | None, deadline_s: float) -> None:
        self._sizes[repository, digest] = await self._origin.blob_size(
            repository, digest, caller=who, deadline_s=deadline_s
        )
        while len(self._sizes) > MAX_PROOFS:
            self._sizes.popitem(last=False)

    async def _own_verdict(self, repository: Repository, digest: Digest, ask: Callable[[], Awaitable[object]]) -> bool:
        """Return whether the origin said yes to this agent; False where it said nothing and what is known stands.

        Raises:
            DeniedByOrigin, NotFoundAtOrigin; OriginError where it said nothing and that is not enough.
        """
        try:
            with trio.fail_after(CHECK_S):
                await ask()
        except DeniedByOrigin:
            self._denied(repository, None)
            raise
        except NotFoundAtOrigin:
            raise
        except (OriginError, trio.TooSlowError) as error:
            if not self._stands(repository, digest):
                raise OriginError(f"{repository.registry} does not say who may read {repository}: {error}") from error
            log.info("the origin gives no verdict; what it gave before stands", image=str(repository), why=str(error))
            self._grants.grant(_SILENCE, repository, digest, trio.current_time() + SILENT_S)
            return False
        return True

    def _stands(self, repository: Repository, digest: Digest) -> bool:
        """Return whether this may be served while the origin is silent."""
        home = self._home_of(digest)
        if home is None or self._is_given(home):
            return True  # It is not here: what comes is what peers may have, or the origin's after all.
        return self._rule(repository).mode == "node-credentials" and home.repository == repository

    def _grant(self, repository: Repository, digest: Digest, who: Caller | None) -> None:
        now = trio.current_time()
        if who is not None:
            self._origin.lend(repository, who)
            self._grants.grant(_subject(who), repository, digest, now + CALLER_TTL_S)
            return
        self._grants.grant("", repository, digest, now + self.public_ttl_s)
        if self.is_anybodys(repository):
            self._note_public(repository)
            self._refused.pop(repository, None)
        else:
            self._public.pop(repository, None)
            self._unsaid.pop(repository, None)


def _subject(who: Caller | None) -> str:
    return "" if who is None else f"caller {who.key}"


def _note(table: OrderedDict[Repository, float], repository: Repository, until: float) -> None:
    table[repository] = until
    table.move_to_end(repository)
    while len(table) > MAX_PROOFS:
        table.popitem(last=False)
