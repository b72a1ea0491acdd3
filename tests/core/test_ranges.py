# SPDX-License-Identifier: Apache-2.0
"""Ranges and validators, as RFC 9110 and RUNTIMES want them answered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.ranges import (
    RANGES_MAX,
    Span,
    content_range,
    if_range_holds,
    none_match_holds,
    part_heads,
    requested_spans,
    unsatisfied_range,
)
from p2pdist.errors import InvalidInput

ETAG = '"sha256:' + "ab" * 32 + '"'
SIZE = 100


@pytest.mark.parametrize(
    ("value", "spans"),
    [
        ("bytes=0-", [(0, 100)]),
        ("bytes=0-0", [(0, 1)]),
        ("bytes=10-19", [(10, 20)]),
        ("bytes=99-", [(99, 100)]),
        ("bytes=90-1000", [(90, 100)]),
        ("bytes=-1", [(99, 100)]),
        ("bytes=-100", [(0, 100)]),
        ("bytes=-1000", [(0, 100)]),
        ("Bytes = 0-4 , 6-", [(0, 5), (6, 100)]),
        ("bytes=5-4,7-7", [(7, 8)]),
        ("bytes=,0-1,,", [(0, 2)]),
        ("bytes=0-1,200-", [(0, 2)]),
        ("bytes=00000000000000000000000005-6", [(5, 7)]),
    ],
)
def test_a_range_within_the_blob_becomes_half_open(value: str, spans: list[tuple[int, int]]) -> None:
    assert requested_spans(value, SIZE) == tuple(Span(*span) for span in spans)


@pytest.mark.parametrize("value", ["bytes=100-", "bytes=100-200", "bytes=-0", "bytes=" + "9" * 5000 + "-", "bytes=5-4"])
def test_a_range_past_the_end_or_of_nothing_is_unsatisfiable(value: str) -> None:
    assert requested_spans(value, SIZE) == ()


@pytest.mark.parametrize(
    "value",
    [None, "", "bytes", "bytes=", "bytes=,", "bytes=-", "bytes=a-b", "bytes=0-1,x", "bytes=1--2",
     "items=0-1", "bytes 0-1", "bytes=+1-2", "bytes=0x1-2", "bytes=\u0661-", "bytes=0-1;2-3"],
)  # fmt: skip
def test_what_is_no_byte_range_is_ignored(value: str | None) -> None:
    assert requested_spans(value, SIZE) is None


def test_an_empty_blob_is_always_sent_whole() -> None:
    assert requested_spans("bytes=0-", 0) is None


def test_too_many_ranges_are_refused() -> None:
    ranges = [f"{2 * number}-{2 * number}" for number in range(RANGES_MAX + 1)]
    assert len(requested_spans("bytes=" + ",".join(ranges[1:]), 1000) or ()) == RANGES_MAX
    with pytest.raises(InvalidInput, match="129 ranges"):
        requested_spans("bytes=" + ",".join(ranges), 1000)


def test_ranges_that_overlap_never_cost_more_than_the_whole() -> None:
    assert requested_spans("bytes=0-49,50-", SIZE) == (Span(0, 50), Span(50, 100))
    assert requested_spans("bytes=0-49,49-", SIZE) is None
    assert requested_spans("bytes=" + ",".join(["0-"] * 100), SIZE) is None


@given(st.one_of(st.text(), st.from_regex(r"bytes=[0-9,\- ]{0,60}", fullmatch=True)), st.integers(0, 2**63))
def test_any_header_gives_spans_within_the_blob_or_is_refused(value: str, size_bytes: int) -> None:
    try:
        spans = requested_spans(value, size_bytes)
    except InvalidInput:
        return
    for span in spans or ():
        assert 0 <= span.start < span.stop <= size_bytes
        assert span.length_bytes > 0


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_range_that_is_written_out_is_read_back(start: int, length_bytes: int) -> None:
    span, size_bytes = Span(start, start + length_bytes), start + length_bytes
    first_to_last = content_range(span, size_bytes).removeprefix("bytes ").partition("/")[0]
    assert requested_spans(f"bytes={first_to_last}", size_bytes) == (span,)


def test_the_parts_of_a_multipart_body_say_where_they_belong() -> None:
    heads, tail = part_heads((Span(0, 5), Span(10, 20)), 100, "a/b", "xyz")
    assert heads[0] == b"\r\n--xyz\r\nContent-Type: a/b\r\nContent-Range: bytes 0-4/100\r\n\r\n"
    assert b"bytes 10-19/100" in heads[1]
    assert tail == b"\r\n--xyz--\r\n"


def test_content_range_is_inclusive() -> None:
    assert content_range(Span(10, 20), 100) == "bytes 10-19/100"
    assert unsatisfied_range(100) == "bytes */100"


@pytest.mark.parametrize(
    ("value", "holds"),
    [
        (None, True),
        ('"other"', True),
        ("", True),
        ("*", False),
        (ETAG, False),
        (f'"other", {ETAG}', False),
        (f"W/{ETAG}", False),
        (ETAG.strip('"'), True),
    ],
)
def test_none_match_lets_the_body_through_only_for_other_tags(value: str | None, holds: bool) -> None:
    assert none_match_holds(value, ETAG) is holds


@pytest.mark.parametrize(
    ("value", "holds"),
    [(None, True), (ETAG, True), ('"other"', False), (f"W/{ETAG}", False), ("Sat, 29 Oct 1994 19:43:31 GMT", False)],
)
def test_if_range_wants_exactly_our_tag(value: str | None, holds: bool) -> None:
    assert if_range_holds(value, ETAG) is holds
