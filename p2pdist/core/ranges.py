# SPDX-License-Identifier: Apache-2.0
"""HTTP ranges and validators (RFC 9110 §13, §14) as half-open spans.

Owns: the only place where HTTP's inclusive ranges exist. Refuses to decide what is sent: it says which
spans were asked for, the mirror whether it answers 200, 206 or 416.

Invariants: a returned span is never empty and lies within [0, size_bytes); nothing but InvalidInput is raised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from p2pdist.errors import InvalidInput

RANGES_MAX = 128
"""A client of zstd:chunked layers asks for up to 1,024, halves them on a 400, and gives up where 64 are too many."""

_RANGE = re.compile(r"([0-9]*)-([0-9]*)")
_UNITS = re.compile(r"[ \t]*bytes[ \t]*=(.*)", re.IGNORECASE)
_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_DIGITS_MAX = 19
"""Enough for 2**63; longer numbers lie past the end of anything."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, stop) of a blob."""

    start: int
    stop: int

    @property
    def length_bytes(self) -> int:
        return self.stop - self.start


def requested_spans(value: str | None, size_bytes: int) -> tuple[Span, ...] | None:
    """Return the spans that a Range header asks for, in its order.

    Returns:
        None where the whole is to be sent: no header, another unit, malformed, an empty blob, or more bytes in all
        than the blob has (ranges that overlap: CVE-2011-3192).
        An empty tuple where no range lies within the blob, or each ends before it begins: 416.

    Raises:
        InvalidInput: more than RANGES_MAX ranges.
    """
    match = _UNITS.fullmatch(value) if value is not None else None
    if match is None:
        return None
    texts = [text for part in match[1].split(",") if (text := part.strip(" \t"))]
    if len(texts) > RANGES_MAX:
        raise InvalidInput(f"{len(texts)} ranges in one request; at most {RANGES_MAX} are answered")
    bounds = [_bounds(text) for text in texts]
    if size_bytes == 0 or not bounds or None in bounds:
        return None
    spans = (_within(first, last, size_bytes) for first, last in filter(None, bounds))
    found = tuple(span for span in spans if span is not None)
    return found if sum(span.length_bytes for span in found) <= size_bytes else None


def _bounds(text: str) -> tuple[int | None, int | None] | None:
    """Return the first and last position of `F-L`, `F-` or `-COUNT` (then the count); None if malformed."""
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    first, last = _number(match[1]), _number(match[2])
    return None if first is None and last is None else (first, last)


def _number(digits: str) -> int | None:
    """Return the number, or None for no digits; clamped, since Python refuses to read thousands of digits."""
    if not digits:
        return None
    significant = digits.lstrip("0") or "0"
    return int(significant) if len(significant) <= _DIGITS_MAX else 10**_DIGITS_MAX


def _within(first: int | None, last: int | None, size_bytes: int) -> Span | None:
    if first is None:
        start, stop = max(0, size_bytes - (last or 0)), size_bytes
    else:
        start, stop = first, size_bytes if last is None else min(last + 1, size_bytes)
    return Span(start, stop) if start < stop else None


def content_range(span: Span, size_bytes: int) -> str:
    """Return the Content-Range of a 206 that carries `span`."""
    return f"bytes {span.start}-{span.stop - 1}/{size_bytes}"


def unsatisfied_range(size_bytes: int) -> str:
    """Return the Content-Range of a 416."""
    return f"bytes */{size_bytes}"


def part_heads(spans: tuple[Span, ...], size_bytes: int, media_type: str, boundary: str) -> tuple[list[bytes], bytes]:
    """Return what comes before each span in a multipart/byteranges body, and what comes after the last."""
    heads = [
        f"\r\n--{boundary}\r\nContent-Type: {media_type}\r\nContent-Range: {content_range(span, size_bytes)}\r\n\r\n"
        for span in spans
    ]
    return [head.encode() for head in heads], f"\r\n--{boundary}--\r\n".encode()


def none_match_holds(value: str | None, etag: str) -> bool:
    """Return whether If-None-Match lets the body be sent (no header, or none of its tags is `etag`).

    Args:
        etag: ours, strong, with its quotes. The comparison is weak, as RFC 9110 §13.1.2 has it.
    """
    if value is None:
        return True
    if value.strip() == "*":
        return False
    return etag not in (tag.removeprefix("W/") for tag in _TAG.findall(value))


def if_range_holds(value: str | None, etag: str) -> bool:
    """Return whether Range counts: no If-Range, or exactly our `etag`; a date never matches, we send none."""
    return value is None or value.strip() == etag
