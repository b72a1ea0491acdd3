# SPDX-License-Identifier: Apache-2.0
"""Which manifest a tag names, asked of the origin by two agents for all that want to know. Pure.

The first agents that ask for a tag, of different addresses, are told to ask the origin, the others wait. What WORDS of
them say alike is passed on and holds for a short time; where they differ each asks the origin itself: so a member that
lies about a tag misleads nobody. Whom the origin does not answer, or who is too slow or gone, is followed by the next
who waits; after a few of them all are told that the origin gives none: a crowd must not fall upon an origin because it
is in trouble. A refusal (no such tag, not for everybody) is a word like any other.

Invariants: each tag is asked for by at most WORDS agents at a time; each question of an agent is either waiting or
being asked, for exactly one tag; nobody is told what a single address says, but that the origin fails it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pdist.core.wire import Ask, Resolve, Resolved
from p2pdist.errors import RemoteProtocolError

if TYPE_CHECKING:
    from p2pdist.core.types import PeerId
    from p2pdist.core.wire import Message

WORDS = 2
"""That have to agree."""
ASK_S = 8.0
"""For the origin's answer to a tag; then the next who waits is asked."""
HURRY_S = 1.0
"""For the second word once the first is there: who is asked and says nothing must not keep all waiting."""
TRIES = 3
"""Agents that are let fail at the origin before all who wait are told so."""
FAILED_S = 2.0
"""For which that word holds; then somebody may try again."""
REFUSALS = ("401", "403", "404")
MAX_TAGS = 10_000
MAX_QUESTIONS = 256
"""Per agent at a time; one that has more asks the origin itself."""

TagKey = tuple[str, str, str]
Word = tuple[str, str, int]
Question = tuple["PeerId", int]
NO_WORD: Word = ("", "", 0)
"""Sends who gets it to the origin itself."""


def _is_good(word: Word) -> bool:
    return bool(word[0]) or word[1] in REFUSALS


@dataclass(slots=True)
class _Tag:
    """A tag that was asked for: resolved until `expires`, or being asked for."""

    answer: Word | None = None
    expires: float = 0.0
    """Of the answer, or of words that are not one yet."""
    words: dict[str, Word] = field(default_factory=dict)
    """What has been said, by address."""
    asked: dict[Question, tuple[str, float]] = field(default_factory=dict)
    """From where each is, and until when it is waited for."""
    waiting: dict[Question, str] = field(default_factory=dict)

    def next(self) -> Question | None:
        """Return the next question whose asker is to ask the origin, if one more is to."""
        good = sum(map(_is_good, self.words.values()))
        if len(self.asked) >= WORDS - good:
            return None
        taken = {*self.words, *(place for place, _ in self.asked.values())}
        return next((question for question, place in self.waiting.items() if place not in taken), None)


class Tags:
    """All tags that were asked for lately. `ttl_s`: for how long an answer holds."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._tags: dict[TagKey, _Tag] = {}
        self._questions: dict[PeerId, dict[int, TagKey]] = {}

    def resolve(self, peer: PeerId, message: Resolve, now: float, place: str = "") -> list[tuple[PeerId, Message]]:
        """Answer an agent's question, let it wait, or let it ask.

        Args:
            place: the agent's address; empty: it is told from others by its id alone.

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
            return [(peer, Resolved(message.number, *NO_WORD))]
        if tag is None:
            tag = self._tags[key] = _Tag()
        if tag.expires <= now:
            tag.answer, tag.words = None, {}
        tag.waiting[peer, message.number] = place or peer
        questions[message.number] = key
        return self._go_on(key, tag, now)

    def resolved(self, peer: PeerId, message: Resolved, now: float) -> list[tuple[PeerId, Message]]:
        """Take in what an agent that was asked found out; pass on what two have."""
        key = self._questions.get(peer, {}).get(message.number)
        question = (peer, message.number)
        if key is None or question not in (tag := self._tags[key]).asked:
            return []
        place, _ = tag.asked.pop(question)
        self._close(question)
        word = (message.digest, message.media_type, message.size_bytes)
        if tag.answer is None or tag.expires <= now:
            tag.answer, tag.words[place], tag.expires = None, word, now + self.ttl_s
            if self._judge(tag, word, now):
                return self._tell(tag, tag.answer or NO_WORD) + self._go_on(key, tag, now)
        return self._go_on(key, tag, now)

    def _judge(self, tag: _Tag, word: Word, now: float) -> bool:
        """Return whether those who wait can be told something, with what has been said last; `answer` is what."""
        words = list(tag.words.values())
        good = [each for each in words if _is_good(each)]
        if words.count(word) >= WORDS and _is_good(word):
            tag.answer, tag.expires = word, now + (self.ttl_s if word[0] else FAILED_S)
        elif len(good) >= WORDS:
            tag.expires = now
        elif not good and len(words) >= TRIES:
            tag.answer, tag.expires = (word, now + FAILED_S) if word[1] else (None, now)
        else:
            if good:
                tag.asked = {who: (place, min(until, now + HURRY_S)) for who, (place, until) in tag.asked.items()}
            return False
        tag.words = {}
        return True

    def _tell(self, tag: _Tag, word: Word) -> list[tuple[PeerId, Message]]:
        """Pass on an answer, good or bad."""
        waiting, tag.waiting = list(tag.waiting), {}
        for question in waiting:
            self._close(question)
        return [(waiter, Resolved(number, *word)) for waiter, number in waiting]

    def gone(self, peer: PeerId, now: float) -> list[tuple[PeerId, Message]]:
        """Forget an agent's questions; what it was asked, the next who waits is asked."""
        questions = self._questions.pop(peer, {})
        for number, key in questions.items():
            self._tags[key].waiting.pop((peer, number), None)
            self._tags[key].asked.pop((peer, number), None)
        out: list[tuple[PeerId, Message]] = []
        for key in dict.fromkeys(questions.values()):
            out += self._go_on(key, self._tags[key], now)
        return out

    def tick(self, now: float) -> list[tuple[PeerId, Message]]:
        """Forget old answers, and ask others where one who was asked is late."""
        out: list[tuple[PeerId, Message]] = []
        for key, tag in list(self._tags.items()):
            late = [question for question, (_, until) in tag.asked.items() if until <= now]
            for question in late:
                del tag.asked[question]
                self._close(question)
            if late or tag.expires <= now:
                out += self._go_on(key, tag, now)
        return out

    def _go_on(self, key: TagKey, tag: _Tag, now: float) -> list[tuple[PeerId, Message]]:
        """Let those ask the origin whose turn it is; forget a tag of which nothing is known nor wanted."""
        out: list[tuple[PeerId, Message]] = []
        while (question := tag.next()) is not None:
            tag.asked[question] = tag.waiting.pop(question), now + ASK_S
            out.append((question[0], Ask(question[1])))
        if not tag.asked:
            # Who waits is where one has spoken already.
            out += self._tell(tag, NO_WORD)
            if tag.expires <= now:
                del self._tags[key]
        return out

    def _close(self, question: Question) -> None:
        peer, number = question
        questions = self._questions.get(peer)
        if questions is not None:
            questions.pop(number)
            if not questions:
                del self._questions[peer]
