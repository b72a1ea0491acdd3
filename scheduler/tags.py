# SPDX-License-Identifier: Apache-2.0
"""Which manifest a tag names, asked of the origin once for all agents that want to know. Pure.

The first agent that asks for a tag is told to ask the origin, the others wait for its answer, which then
holds for a short time. Whom the origin does not answer, or who is too slow or gone, is followed by the
next who waits; after a few of them all are told that the origin gives none, and a refusal (no such tag, not
for everybody) counts at once: a crowd must not fall upon an origin because it is in trouble.

Invariants: each tag is asked for by at most one agent at a time; each question of an agent is either
waiting or being asked, for exactly one tag.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pdist.core.wire import Ask, Resolve, Resolved
from p2pdist.errors import RemoteProtocolError

if TYPE_CHECKING:
    from p2pdist.core.types import PeerId
    from p2pdist.core.wire import Message

ASK_S = 8.0
"""For the origin's answer to a tag; then the next who waits is asked."""
TRIES = 3
"""Agents that are let fail at the origin before all who wait are told so."""
FAILED_S = 2.0
"""For which that word holds; then somebody may try again."""
REFUSALS = ("401", "403", "404")
MAX_TAGS = 10_000
MAX_QUESTIONS = 256
"""Per agent at a time; one that has more asks the origin itself."""

TagKey = tuple[str, str, str]


@dataclass(slots=True)
class _Tag:
    """A tag that was asked for: resolved until `expires`, or being asked for by `asked`."""

    answer: tuple[str, str, int] | None = None
    expires: float = 0.0
    failures: int = 0
    asked: tuple[PeerId, int] | None = None
    waiting: dict[tuple[PeerId, int], None] = field(default_factory=dict)


class Tags:
    """All tags that were asked for lately. `ttl_s`: for how long an answer holds."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._tags: dict[TagKey, _Tag] = {}
        self._questions: dict[PeerId, dict[int, TagKey]] = {}

    def resolve(self, peer: PeerId, message: Resolve, now: float) -> list[tuple[PeerId, Message]]:
        """Answer an agent's question, let it wait, or let it ask.

        Raises:
            RemoteProtocolError: a question under this number is still open.
        """
        questions = self._questions.setdefault(peer, {})
        if message.number in questions:
            raise RemoteProtocolError(f"question {message.number} asked twice")
        key = (message.registry, message.repository, message.tag)
        tag = self._tags.get(key)
        if tag is not None and tag.answer is not None and tag.expires > now:
            return [(peer, Resolved(message.number, *tag.answer))]
        if len(questions) >= MAX_QUESTIONS or (tag is None and len(self._tags) >= MAX_TAGS):
            return [(peer, Resolved(message.number, "", "", 0))]
        if tag is None:
            tag = self._tags[key] = _Tag()
        tag.answer = None
        tag.waiting[peer, message.number] = None
        questions[message.number] = key
        return [] if tag.asked is not None else self._ask_next(key, tag, now)

    def resolved(self, peer: PeerId, message: Resolved, now: float) -> list[tuple[PeerId, Message]]:
        """Pass on what the agent that was asked found out."""
        key = self._questions.get(peer, {}).get(message.number)
        if key is None or (tag := self._tags[key]).asked != (peer, message.number):
            return []
        self._close(tag.asked)
        tag.asked = None
        if not message.digest and message.media_type not in REFUSALS:
            tag.failures += 1
            if tag.failures < TRIES and tag.waiting:
                return self._ask_next(key, tag, now)
        return self._tell_all(tag, message, now)

    def _tell_all(self, tag: _Tag, message: Resolved, now: float) -> list[tuple[PeerId, Message]]:
        """Pass on an answer, good or bad; one without any word of the origin sends each there."""
        answer = (message.digest, message.media_type, message.size_bytes)
        tag.answer = answer if message.media_type else None
        tag.failures = 0
        tag.expires = now + (self.ttl_s if message.digest else FAILED_S if message.media_type else 0.0)
        waiting, tag.waiting = list(tag.waiting), {}
        for question in waiting:
            self._close(question)
        return [(waiter, Resolved(number, *answer)) for waiter, number in waiting]

    def gone(self, peer: PeerId, now: float) -> list[tuple[PeerId, Message]]:
        """Forget an agent's questions; what it was asked, the next who waits is asked."""
        questions = self._questions.pop(peer, {})
        for number, key in questions.items():
            self._tags[key].waiting.pop((peer, number), None)
        out: list[tuple[PeerId, Message]] = []
        for key in dict.fromkeys(questions.values()):
            tag = self._tags[key]
            if tag.asked is not None and tag.asked[0] == peer:
                out += self._ask_next(key, tag, now)
        return out

    def tick(self, now: float) -> list[tuple[PeerId, Message]]:
        """Forget old answers, and ask others where the one who was asked is late."""
        out: list[tuple[PeerId, Message]] = []
        for key, tag in list(self._tags.items()):
            if tag.expires <= now:
                out += self._ask_next(key, tag, now)
        return out

    def _ask_next(self, key: TagKey, tag: _Tag, now: float) -> list[tuple[PeerId, Message]]:
        """Let the next who waits ask the origin; where nobody waits, forget the tag."""
        if tag.asked is not None:
            self._close(tag.asked)
            tag.asked = None
        if not tag.waiting:
            del self._tags[key]
            return []
        tag.asked = next(iter(tag.waiting))
        del tag.waiting[tag.asked]
        tag.expires = now + ASK_S
        return [(tag.asked[0], Ask(tag.asked[1]))]

    def _close(self, question: tuple[PeerId, int]) -> None:
        peer, number = question
        questions = self._questions.get(peer)
        if questions is not None:
            questions.pop(number)
            if not questions:
                del self._questions[peer]
