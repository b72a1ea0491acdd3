# SPDX-License-Identifier: Apache-2.0
"""The promises of p2pdist.core.retry."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.retry import backoff_s, parse_http_date, parse_retry_after


@given(st.integers(0, 2000), st.integers(0, 99))
def test_a_wait_is_between_half_and_all_of_the_doubled_base(attempt: int, seed: int) -> None:
    full_s = min(8.0, 0.25 * 2.0 ** min(attempt, 32))
    assert full_s / 2 <= backoff_s(attempt, 0.25, 8.0, Random(seed)) <= full_s


def test_two_nodes_that_failed_together_wait_differently() -> None:
    waits = {backoff_s(3, 0.25, 8.0, Random(seed)) for seed in range(100)}
    assert len(waits) == 100


@pytest.mark.parametrize(
    ("value", "expected_s"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("Thu, 01 Jan 1970 00:01:00 GMT", 50.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Thu, 31 Feb 1970 00:00:00 GMT", None),
        ("Thu, 01 Xxx 1970 00:00:00 GMT", None),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("9" * 400, None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, expected_s: float | None) -> None:
    assert parse_retry_after(value, now_unix_s=10.0) == expected_s


@given(st.text(max_size=40))
def test_any_retry_after_is_taken_or_ignored(value: str) -> None:
    wait_s = parse_retry_after(value, 0.0)
    assert wait_s is None or wait_s >= 0


def test_a_date_header_says_what_time_a_server_has() -> None:
    assert parse_http_date("Thu, 01 Jan 1970 00:01:00 GMT") == 60.0
    assert parse_http_date("now") is None
