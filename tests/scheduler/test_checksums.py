# SPDX-License-Identifier: Apache-2.0
"""The checksums that outlive their swarms."""

from __future__ import annotations

from scheduler.checksums import Archive
from tests.strategies import digest

A, B, C = digest(1), digest(2), digest(3)


def test_what_is_put_is_kept() -> None:
    archive = Archive()
    archive.put(A, 5, b"old")
    archive.put(A, 6, b"new")
    assert archive.get(A) == (6, b"new")
    assert archive.get(B) is None


def test_the_least_recently_used_goes_when_there_is_no_room() -> None:
    archive = Archive(limit_bytes=8)
    archive.put(A, 1, b"aaaa")
    archive.put(B, 1, b"bbbb")
    archive.get(A)
    archive.put(C, 1, b"c")
    assert [archive.get(blob) is not None for blob in (A, B, C)] == [True, False, True]


def test_more_than_the_limit_is_not_kept_and_costs_nothing_later() -> None:
    archive = Archive(limit_bytes=8)
    archive.put(A, 1, b"a" * 9)
    archive.put(B, 1, b"b" * 8)
    assert archive.get(A) is None
    assert archive.get(B) == (1, b"b" * 8)
