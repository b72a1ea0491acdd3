# SPDX-License-Identifier: Apache-2.0
"""Tags are asked of the origin by two for all."""

from __future__ import annotations

import heapq
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.types import PeerId
from p2pdist.core.wire import Ask, Message, Resolve, Resolved
from p2pdist.errors import RemoteProtocolError
from scheduler import tags as module
from scheduler.tags import ASK_S, FAILED_S, HURRY_S, MAX_QUESTIONS, REFUSALS, TRIES, WORDS, Tags
from tests.strategies import digest, peer

A, B, C, D, E = (peer(number) for number in range(1, 6))
TTL_S = 5.0


def resolve(number: int, tag: str = "latest") -> Resolve:
    return Resolve(number, "docker.io", "library/debian", tag)


def answer(number: int, found: str = digest(1)) -> Resolved:
    return Resolved(number, found, "m" if found else "", 100 if found else 0)


def agreed(tags: Tags, now: float) -> None:
    """Let two say what the tag is, under the numbers 101 and 102."""
    tags.resolve(D, resolve(101), now)
    tags.resolve(E, resolve(102), now)
    tags.resolved(D, answer(101), now)
    tags.resolved(E, answer(102), now)


def test_two_are_asked_and_the_others_wait_for_what_both_say() -> None:
    tags = Tags(TTL_S)
    assert tags.resolve(A, resolve(7), 0.0) == [(A, Ask(7))]
    assert tags.resolve(B, resolve(1), 0.1) == [(B, Ask(1))]
    assert tags.resolve(C, resolve(1), 0.1) == []
    assert tags.resolve(D, resolve(1), 0.1) == []
    assert tags.resolved(A, answer(7), 1.0) == []
    assert tags.resolved(B, answer(1), 1.0) == [(C, answer(1)), (D, answer(1))]
    assert not tags._questions


def test_who_lies_about_a_tag_misleads_nobody() -> None:
    tags = Tags(TTL_S)
    for each in (A, B, C, D):
        tags.resolve(each, resolve(1), 0.0)
    tags.resolved(A, answer(1, digest(666)), 0.1)
    # Each asks for itself.
    assert tags.resolved(B, answer(1), 0.2) == [(C, answer(1, "")), (D, answer(1, ""))]
    assert tags.resolve(E, resolve(1), 0.3) == [(E, Ask(1))]


@pytest.mark.parametrize("status", REFUSALS)
def test_who_says_that_there_is_no_such_tag_is_not_believed_alone(status: str) -> None:
    tags = Tags(TTL_S)
    for each in (A, B, C):
        tags.resolve(each, resolve(1), 0.0)
    assert tags.resolved(A, failed(1, status), 0.1) == []
    assert tags.resolved(B, answer(1), 0.2) == [(C, answer(1, ""))]


def test_agents_at_one_address_have_one_word() -> None:
    tags = Tags(TTL_S)
    assert tags.resolve(A, resolve(1), 0.0, "10.0.0.9") == [(A, Ask(1))]
    assert tags.resolve(B, resolve(1), 0.0, "10.0.0.9") == []
    # It asks for itself: there is nobody else to say the same.
    assert tags.resolved(A, answer(1, digest(666)), 0.1) == [(B, answer(1, ""))]
    assert tags.resolve(C, resolve(1), 0.2, "10.0.0.1") == [(C, Ask(1))]


def test_who_says_nothing_once_the_other_has_spoken_keeps_nobody_for_long() -> None:
    tags = Tags(TTL_S)
    for each in (A, B, C, D):
        tags.resolve(each, resolve(1), 0.0)
    tags.resolved(A, answer(1), 0.5)
    assert tags.tick(0.4 + HURRY_S) == []
    assert tags.tick(0.5 + HURRY_S) == [(C, Ask(1))]
    assert tags.resolved(C, answer(1), 2.0) == [(D, answer(1))]


def test_an_answer_holds_for_a_short_time() -> None:
    tags = Tags(TTL_S)
    agreed(tags, 1.0)
    assert tags.resolve(B, resolve(1), 5.9) == [(B, answer(1))]
    assert tags.tick(5.9) == []
    assert tags.resolve(B, resolve(2), 6.0) == [(B, Ask(2))]


def test_an_old_answer_is_forgotten() -> None:
    tags = Tags(TTL_S)
    agreed(tags, 1.0)
    tags.resolve(A, resolve(1, "alone"), 0.0)
    tags.resolved(A, answer(1), 1.0)
    assert tags.tick(6.0) == []
    assert not tags._tags


def failed(number: int, status: str = "") -> Resolved:
    return Resolved(number, "", status, 0)


@pytest.mark.parametrize("status", REFUSALS)
def test_a_refusal_goes_to_all_and_holds_for_a_moment(status: str) -> None:
    tags = Tags(TTL_S)
    for each in (A, B, C):
        tags.resolve(each, resolve(1), 0.0)
    tags.resolved(A, failed(1, status), 1.0)
    assert tags.resolved(B, failed(1, status), 1.0) == [(C, failed(1, status))]
    assert tags.resolve(C, resolve(1), 1.0 + FAILED_S / 2) == [(C, failed(1, status))]
    assert tags.resolve(C, resolve(2), 1.0 + FAILED_S) == [(C, Ask(2))]


@pytest.mark.parametrize("status", ["", "0", "429", "503"])
def test_after_one_whom_the_origin_fails_a_few_others_are_asked_and_then_all_are_told(status: str) -> None:
    tags = Tags(TTL_S)
    peers = [peer(number) for number in range(1, 3 * TRIES)]
    for each in peers:
        tags.resolve(each, resolve(1), 0.0)
    for asked, following in zip(peers[: TRIES - 1], peers[WORDS:], strict=False):
        assert tags.resolved(asked, failed(1, status), 1.0) == [(following, Ask(1))]
    told = tags.resolved(peers[TRIES - 1], failed(1, status), 1.0)
    assert told == [(each, failed(1, status)) for each in peers[TRIES + WORDS - 1 :]]
    # A word of the origin holds for a moment; none at all leaves everybody to ask.
    again = tags.resolve(A, resolve(9), 1.0)
    assert again == [(A, failed(9, status))] if status else [(A, Ask(9))]


def test_those_whom_the_origin_serves_after_others_failed_are_believed() -> None:
    tags = Tags(TTL_S)
    for each in (A, B, C, D):
        tags.resolve(each, resolve(1), 0.0)
    assert tags.resolved(A, failed(1, "503"), 1.0) == [(C, Ask(1))]
    assert tags.resolved(B, answer(1), 2.0) == []
    assert tags.resolved(C, answer(1), 2.0) == [(D, answer(1))]
    assert tags.resolve(A, resolve(1), 3.0) == [(A, answer(1))]


@pytest.mark.parametrize(
    ("status", "most"),
    [
        pytest.param(200, 24, id="an image"),
        pytest.param(404, 40, id="no such tag"),
        pytest.param(429, 60, id="a limit"),
    ],
)
def test_a_crowd_costs_the_origin_a_handful_of_requests(status: int, most: int) -> None:
    """A thousand agents want one tag within 20 s; each tenth of them goes away or hangs; an answer takes 0.3 s."""
    rng, tags, asks = Random(5), Tags(TTL_S), 0
    events: list[tuple[float, int, PeerId, Message | None]] = [
        (rng.uniform(0, 20), number, peer(number), resolve(number)) for number in range(1, 1001)
    ]
    events += [(float(second), 2000 + second, PeerId(""), None) for second in range(60)]
    heapq.heapify(events)
    answered = 0
    while events:
        now, _, who, message = heapq.heappop(events)
        if message is None:
            out = tags.tick(now)
        elif isinstance(message, Resolve):
            out = tags.resolve(who, message, now)
        else:
            assert isinstance(message, Resolved)
            out = tags.resolved(who, message, now)
        for to, said in out:
            if isinstance(said, Resolved):
                answered += 1
                continue
            assert isinstance(said, Ask)
            asks += 1
            if rng.random() < 0.1:
                continue  # it hangs
            found = answer(said.number) if status == 200 else failed(said.number, str(status))
            heapq.heappush(events, (now + 0.3, 10_000 + asks, to, found))
    assert asks <= most
    assert answered >= 1000 - asks


def test_after_one_who_is_late_the_next_is_asked() -> None:
    tags = Tags(TTL_S)
    for number, each in enumerate((A, B, C), 1):
        tags.resolve(each, resolve(number), 0.0)
    assert tags.tick(ASK_S - 0.1) == []
    assert tags.tick(ASK_S) == [(C, Ask(3))]
    # The late answer is nobody's any more.
    assert tags.resolved(A, answer(1), ASK_S + 0.1) == []
    assert tags.tick(2 * ASK_S) == []
    assert not tags._tags
    assert not tags._questions


def test_after_one_who_is_gone_the_next_is_asked() -> None:
    tags = Tags(TTL_S)
    tags.resolve(A, resolve(1), 0.0)
    tags.resolve(A, resolve(2), 0.0)
    tags.resolve(B, resolve(3), 0.0)
    tags.resolve(C, resolve(4), 0.0)
    tags.resolve(D, resolve(5), 0.0)
    assert tags.gone(A, 1.0) == [(C, Ask(4))]
    assert tags.gone(D, 1.0) == []
    assert tags.gone(C, 1.0) == []
    assert tags.gone(B, 1.0) == []
    assert not tags._tags
    assert tags.gone(B, 1.0) == []


def test_only_who_was_asked_may_answer() -> None:
    tags = Tags(TTL_S)
    for number, each in enumerate((A, B, C), 1):
        tags.resolve(each, resolve(number), 0.0)
    assert tags.resolved(C, answer(3, digest(9)), 1.0) == []
    assert tags.resolved(D, answer(1, digest(9)), 1.0) == []
    assert tags.resolved(A, answer(9, digest(9)), 1.0) == []
    tags.resolved(A, answer(1), 1.0)
    assert tags.resolved(B, answer(2), 1.0) == [(C, answer(3))]


def test_tags_do_not_mix() -> None:
    tags = Tags(TTL_S)
    assert tags.resolve(A, resolve(1, "a"), 0.0) == [(A, Ask(1))]
    assert tags.resolve(A, resolve(2, "b"), 0.0) == [(A, Ask(2))]
    assert tags.resolve(B, resolve(1, "b"), 0.0) == [(B, Ask(1))]
    tags.resolve(C, resolve(1, "b"), 0.0)
    assert tags.resolved(A, answer(1), 0.0) == []
    assert tags.resolved(A, answer(2), 0.0) == []
    assert tags.resolved(B, answer(1), 0.0) == [(C, answer(1))]


def test_a_number_that_is_open_cannot_be_used_again_but_one_that_is_answered_can() -> None:
    tags = Tags(TTL_S)
    tags.resolve(A, resolve(1), 0.0)
    with pytest.raises(RemoteProtocolError, match="asked twice"):
        tags.resolve(A, resolve(1, "other"), 0.0)
    tags.resolved(A, answer(1), 0.0)
    assert tags.resolve(A, resolve(1, "other"), 0.0) == [(A, Ask(1))]


def test_an_agent_with_too_many_questions_asks_the_origin_itself() -> None:
    tags = Tags(TTL_S)
    for number in range(MAX_QUESTIONS):
        tags.resolve(A, resolve(number), 0.0)
    assert tags.resolve(A, resolve(MAX_QUESTIONS), 0.0) == [(A, answer(MAX_QUESTIONS, ""))]
    assert tags.resolve(B, resolve(1), 0.0) == [(B, Ask(1))]


def test_more_tags_than_there_is_room_for_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TAGS", 2)
    tags = Tags(TTL_S)
    for number in range(2):
        tags.resolve(A, resolve(number, f"v{number}"), 0.0)
    assert tags.resolve(A, resolve(2, "v2"), 0.0) == [(A, answer(2, ""))]
    assert tags.resolve(B, resolve(0, "v1"), 0.0) == [(B, Ask(0))]


steps = st.tuples(
    st.sampled_from(["resolve", "resolved", "empty", "gone", "tick"]),
    st.sampled_from([A, B, C]),
    st.integers(0, 3),
    st.sampled_from(["a", "b"]),
)


@given(st.lists(steps, max_size=40))
def test_each_question_is_answered_once_or_asked_and_nothing_is_left(script: list[tuple[str, str, int, str]]) -> None:
    tags, now, out = Tags(TTL_S), 0.0, list[tuple[str, Message]]()
    open_: dict[tuple[str, int], str] = {}
    asked: dict[tuple[str, int], None] = {}
    for what, who, number, tag in script:
        now += 1.0
        match what:
            case "resolve":
                if (who, number) in open_ or (who, number) in asked:
                    with pytest.raises(RemoteProtocolError):
                        tags.resolve(who, resolve(number, tag), now)  # type: ignore[arg-type]
                    continue
                open_[who, number] = tag
                out = tags.resolve(who, resolve(number, tag), now)  # type: ignore[arg-type,assignment]
            case "resolved" | "empty":
                out = tags.resolved(who, answer(number, digest(1) if what == "resolved" else ""), now)  # type: ignore[arg-type,assignment]
                asked.pop((who, number), None)
            case "gone":
                open_ = {key: tag for key, tag in open_.items() if key[0] != who}
                asked = {key: None for key in asked if key[0] != who}
                out = tags.gone(who, now)  # type: ignore[arg-type,assignment]
            case _:
                now += ASK_S
                out = tags.tick(now)  # type: ignore[assignment]
                asked.clear()
        for to, message in out:
            assert isinstance(message, Ask | Resolved)
            del open_[to, message.number]
            if isinstance(message, Ask):
                asked[to, message.number] = None
    for who in (A, B, C):
        tags.gone(who, now)
    tags.tick(now + TTL_S + ASK_S)
    assert not tags._tags
    assert not tags._questions
