# SPDX-License-Identifier: Apache-2.0
"""Who was kept out, and why: counted for metrics, and logged, but not as often as a stranger likes to knock."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import structlog
import trio

if TYPE_CHECKING:
    from p2pdist.errors import IdentityRefused

log = structlog.get_logger(__name__)

REASONS = (
    *("plain", "no-certificate", "authority", "other-cluster", "expired", "early", "other-name", "role", "revoked"),
    *("not-enrolled", "refused-us", "crl", "name", "certificate", "tls"),
)
"""Why somebody may be refused, in the order of docs/identity.md: the values of a metric's label, and no others."""
QUIET_S = 60.0
"""The same host is named with the same reason once in so long."""
MAX_REMEMBERED = 1024


class Refusals:
    """The refusals of one program, by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._said: dict[tuple[str, str], float] = {}

    def note(self, port: str, source: str, error: IdentityRefused) -> None:
        """Count a connection that came to nothing, and say why where that was not just said.

        Args:
            port: what the connection was for, such as `peers`.
            source: the other end's address.
        """
        assert error.reason in REASONS, error.reason
        self.counts[error.reason] += 1
        now, key = trio.current_time(), (source, error.reason)
        if now - self._said.get(key, float("-inf")) < QUIET_S:
            return
        self._said.pop(key, None)
        if len(self._said) >= MAX_REMEMBERED:
            del self._said[next(iter(self._said))]
        self._said[key] = now
        log.warning("connection refused", port=port, source=source, reason=error.reason, why=error.why, mend=error.mend)
