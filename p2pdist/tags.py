# SPDX-License-Identifier: Apache-2.0
"""What the origin says of a manifest, asked once for all who want to know, and how fresh a tag must be.

Owns: the answers about tags and digests that hold for `tag_ttl_s`, the questions to the scheduler (so that two agents
ask for the cluster), and the last answers that the tag policies `stale-if-error` and `pinned` live on. Refuses to
take a tag from a peer. Without a scheduler every agent asks for itself, by HEAD and only if what it knows has changed.

Invariants: only what anybody may read is asked for through the scheduler; an answer to one caller is no other's.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import structlog
import trio

from p2pdist.core.access import not_for_everybody
from p2pdist.core.oci import MANIFEST_TYPES
from p2pdist.core.types import ManifestInfo, parse_digest
from p2pdist.core.wire import Resolve, Resolved
from p2pdist.errors import DeniedByOrigin, InvalidInput, NotFoundAtOrigin, OriginError, P2PDistError, PullFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from p2pdist.core.access import Caller, Policy
    from p2pdist.core.types import Repository
    from p2pdist.exchange import Tracker
    from p2pdist.ports import Origin

log = structlog.get_logger(__name__)

TAG_TTL_S = 5.0
"""An answer about a tag serves the HEAD and GET of one pull; the scheduler shares it for as long."""
TAG_TRIES_S = 10.0
"""For the scheduler to come back with an answer; then this agent asks for itself."""
STALE_AFTER_S = 3.0
"""Where an older answer will do, the origin has so long to give a new one: a runtime waits."""
MAX_ANSWERS = 50_000
MAX_KEPT = 10_000
MAX_ASKING = 4096
"""Questions at once: who asked may have hung up, so the mirror's connections are no bound."""


class TagsFile(Protocol):
    """Where the last answers survive a restart."""

    def load(self) -> Mapping[str, ManifestInfo]: ...

    def save(self, tags: Mapping[str, ManifestInfo]) -> None:
        """Blocking, short. Raises StoreError."""


@dataclass(slots=True)
class _Question:
    """Something that somebody was asked for."""

    repository: Repository
    reference: str
    answered: trio.Event = field(default_factory=trio.Event)
    answer: ManifestInfo | None = None
    error: P2PDistError | None = None
    dropped: bool = False
    """Whether the scheduler that it was put to has gone, while there are others."""


class Resolver:
    """The origin's word on manifests.

    Attributes:
        together: whether a repository may be asked for through the scheduler, as anybody may read it.
        granted: told of each answer that the origin has just given, and to whom; None: to this agent.
    """

    def __init__(
        self,
        origin: Origin,
        nursery: trio.Nursery,
        policy: Policy,
        *,
        ttl_s: float = TAG_TTL_S,
        file: TagsFile | None = None,
    ) -> None:
        self.policy = policy
        self.tracker: Tracker | None = None
        self.scheduled = False
        self.together: Callable[[Repository], bool] = lambda _repository: False
        self.granted: Callable[[Repository, ManifestInfo, Caller | None], None] = lambda *_what: None
        self._origin = origin
        self._nursery = nursery
        self.ttl_s = ttl_s
        self._file = file
        self._kept: OrderedDict[str, ManifestInfo] = OrderedDict(file.load() if file is not None else {})
        self._saving = False
        self._answers: OrderedDict[tuple[Repository, str, str], tuple[float, ManifestInfo]] = OrderedDict()
        self._refused: OrderedDict[Repository, float] = OrderedDict()
        """When the origin last refused a repository to this agent."""
        self._asking: dict[tuple[Repository, str, str], _Question] = {}
        self._questions: dict[int, _Question] = {}
        self._next_question = 1

    async def tag(self, repository: Repository, tag: str, who: Caller | None) -> ManifestInfo:
        """Return what a tag stands for under the repository's tag policy.

        Raises:
            OriginError, IntegrityError, PullFailed.
        """
        mode, name = self.policy.tag_mode(repository), f"{repository}:{tag}"
        last = self._kept.get(name) if mode != "origin" else None
        if last is not None and mode == "pinned":
            return last
        try:
            if last is None:
                info = await self.ask(repository, tag, who)
            else:
                with trio.fail_after(STALE_AFTER_S):
                    info = await self.ask(repository, tag, who)
        except (OriginError, trio.TooSlowError) as error:
            if last is None or isinstance(error, NotFoundAtOrigin | DeniedByOrigin):
                raise
            log.warning("the origin does not resolve a tag; its last answer is used", image=name, why=str(error))
            return last
        if mode != "origin":
            self._keep(name, info)
        return info

    def _keep(self, name: str, info: ManifestInfo) -> None:
        if self._kept.get(name) == info:
            return
        self._kept[name] = info
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        if self._file is not None and not self._saving:
            self._saving = True
            self._nursery.start_soon(self._save, self._file)

    async def _save(self, file: TagsFile) -> None:
        self._saving = False
        tags = dict(self._kept)
        try:
            await trio.to_thread.run_sync(file.save, tags)
        except P2PDistError as error:
            log.error("the tags that were resolved are not kept over a restart", why=str(error))

    async def ask(self, repository: Repository, reference: str, who: Caller | None) -> ManifestInfo:
        """Return what a tag or digest stands for at the origin; all who ask meanwhile share one answer, or one error.

        Args:
            who: whose rights count; None: the agent's own.
        """
        key = (repository, reference, "" if who is None else f"caller {who.key}")
        known = self._answers.get(key)
        if known is not None and self._holds(repository, known[0]):
            return known[1]
        asking = self._asking.get(key)
        if asking is None:
            if len(self._asking) >= MAX_ASKING:
                raise OriginError(f"{MAX_ASKING} questions wait for the registries' answers; ask again later")
            asking = self._asking[key] = _Question(repository, reference)
            # In a task of its own: the runtime that asked first may hang up.
            self._nursery.start_soon(self._find, key, asking, who, known[1] if known is not None else None)
        await asking.answered.wait()
        if asking.answer is None:
            raise asking.error or PullFailed(reference, [])
        return asking.answer

    def _holds(self, repository: Repository, until: float) -> bool:
        return until > trio.current_time() and until - self.ttl_s > self._refused.get(repository, -1.0)

    def refused(self, repository: Repository) -> None:
        """Take back what the origin answered before it refused."""
        self._refused[repository] = trio.current_time()
        self._refused.move_to_end(repository)
        while len(self._refused) > MAX_KEPT:
            self._refused.popitem(last=False)

    async def _find(
        self, key: tuple[Repository, str, str], asking: _Question, who: Caller | None, known: ManifestInfo | None
    ) -> None:
        try:
            asking.answer = await self._ask(asking, who, known)
        except P2PDistError as error:
            asking.error = error
        else:
            self.granted(asking.repository, asking.answer, who)
            self._answers[key] = (trio.current_time() + self.ttl_s, asking.answer)
            self._answers.move_to_end(key)
            while len(self._answers) > MAX_ANSWERS:
                self._answers.popitem(last=False)
        finally:
            del self._asking[key]
            asking.answered.set()

    async def _ask(self, asking: _Question, who: Caller | None, known: ManifestInfo | None) -> ManifestInfo:
        """Ask by way of the scheduler, so that two agents ask for all; by ourselves where that brings nothing."""
        if who is None and self.tracker is not None and self.together(asking.repository):
            with trio.move_on_after(TAG_TRIES_S):
                while self.scheduled:
                    question = await self._ask_together(asking, self.tracker)
                    if question.error is not None:
                        raise question.error
                    if question.answer is not None:
                        return question.answer
                    if not question.dropped:
                        break
        return await self._origin.head_manifest(asking.repository, asking.reference, known=known, caller=who)

    async def _ask_together(self, asking: _Question, tracker: Tracker) -> _Question:
        """Put a question to the scheduler; return it when it is answered, or has no one to answer it any more."""
        number = self._next_question
        self._next_question += 1
        repository, reference = asking.repository, asking.reference
        question = self._questions[number] = _Question(repository, reference)
        tracker.send(Resolve(number, repository.registry, repository.name, reference))
        try:
            await question.answered.wait()
        finally:
            del self._questions[number]
        return question

    def ask_again(self, number: int) -> None:
        """Put a question to the next scheduler: the one that was asked has gone."""
        question = self._questions.get(number)
        if question is not None:
            question.dropped = True
            question.answered.set()

    def asked(self, number: int) -> None:
        """Take in the scheduler's wish that this agent ask the origin."""
        question = self._questions.get(number)
        if question is not None:
            self._nursery.start_soon(self._answer, number, question)
        elif self.tracker is not None:
            self.tracker.send(Resolved(number, "", "", 0))

    async def _answer(self, number: int, question: _Question) -> None:
        answer = Resolved(number, "", "", 0)
        try:
            info = await self._origin.head_manifest(question.repository, question.reference)
        except P2PDistError as error:
            question.error = error
            if isinstance(error, OriginError):
                answer = Resolved(number, "", str(error.status_code or 0), 0)
        else:
            question.answer = info
            # What it took credentials to learn is no matter of the others.
            if self.together(question.repository):
                answer = Resolved(number, info.digest, info.media_type, info.size_bytes)
        if self.tracker is not None:
            self.tracker.send(answer)
        question.answered.set()

    def resolved(self, message: Resolved) -> None:
        """Take in the scheduler's answer; an empty one sends us to the origin ourselves."""
        question = self._questions.get(message.number)
        if question is None:
            return
        # What is no answer of a registry is as good as none: it would go into the headers for the runtime.
        if not message.digest:
            question.error = _told(question.repository, message.media_type)
        elif message.size_bytes > 0 and message.media_type in MANIFEST_TYPES:
            with suppress(InvalidInput):
                question.answer = ManifestInfo(parse_digest(message.digest), message.media_type, message.size_bytes)
        question.answered.set()

    def scheduler_changed(self, connected: bool) -> None:
        """Let nobody wait for the answer of a scheduler that has gone."""
        self.scheduled = connected
        if not connected:
            for question in self._questions.values():
                question.answered.set()


def _told(repository: Repository, status: str) -> OriginError | None:
    """Return the error that another agent was given by the origin; None where the text is no status."""
    if not status.isascii() or not status.isdigit() or len(status) > 3:
        return None
    code = int(status)
    said = f"HTTP {code}" if code else "no answer"
    if code == 404:
        return NotFoundAtOrigin(f"not found at {repository.registry} ({said} to another agent)", status_code=code)
    if code in (401, 403):
        return DeniedByOrigin(not_for_everybody(repository, f"{said} to another agent"), status_code=code)
    return OriginError(f"{repository.registry} gave other agents {said}", status_code=code or None)
