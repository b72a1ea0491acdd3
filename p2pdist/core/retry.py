# SPDX-License-Identifier: Apache-2.0
"""When to ask again: back-off with jitter, and Retry-After (RFC 9110 §10.2.3).

Pure arithmetic; time and randomness are arguments.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

_SECONDS = re.compile(r"[0-9]{1,9}")
_DATE = re.compile(
    r"[A-Z][a-z]{2}, (?P<day>\d{2}) (?P<month>[A-Z][a-z]{2}) (?P<year>\d{4})"
    r" (?P<hour>\d{2}):(?P<minute>\d{2}):(?P<second>\d{2}) GMT"
)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""What a server may answer otherwise a moment later."""


def backoff_s(attempt: int, base_s: float, cap_s: float, rng: Random) -> float:
    """Return how long to wait after failed attempt number `attempt` (0 is the first).

    Half of the wait is fixed, half drawn: nodes that failed together do not come back together.
    """
    full_s = min(cap_s, base_s * 2.0 ** min(attempt, 32))
    return full_s / 2 + rng.random() * full_s / 2


def parse_http_date(value: str) -> float | None:
    """Return the Unix time of a date in the one form that RFC 9110 lets servers send; None where it is none."""
    date = _DATE.fullmatch(value.strip())
    if date is None or date["month"] not in _MONTHS:
        return None
    month = _MONTHS.index(date["month"]) + 1
    day, hour, minute, second = (int(date[part]) for part in ("day", "hour", "minute", "second"))
    try:
        return datetime(int(date["year"]), month, day, hour, minute, second, tzinfo=UTC).timestamp()
    except ValueError:
        return None


def parse_retry_after(value: str, now_unix_s: float) -> float | None:
    """Return the seconds from now that a Retry-After asks for, never negative; None where it says nothing.

    Args:
        value: seconds, or a date.
        now_unix_s: the time by the clock of who sent it, for the date.
    """
    text = value.strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    when = parse_http_date(text)
    return None if when is None else max(0.0, when - now_unix_s)
