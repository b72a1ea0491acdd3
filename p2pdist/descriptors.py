# SPDX-License-Identifier: Apache-2.0
"""The process's limit on open files, and how many connections to the mirror fit under it.

Owns: raising the soft limit to the hard one, once, at the start. Invariant: running out of descriptors in the middle
of a pull is prevented by fewer connections, never met by failing.
"""

from __future__ import annotations

import resource

import structlog

log = structlog.get_logger(__name__)

PER_CONNECTION = 2
"""A socket, and the blob that is read over it."""
RESERVED = 768
"""For what arrives (512 blobs at most), peers (80), origins (24), listeners and the rest."""
LEAST = 8
ENOUGH = 1 << 20
"""Some containers allow a thousand times more, and some libraries clear everything that could be open."""


def connections_within(wanted: int) -> int:
    """Raise the limit on open files as far as allowed; return how many of the wanted connections fit under it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    fitting = max(LEAST, (most - RESERVED) // PER_CONNECTION)
    if fitting < wanted:
        log.warning(
            "the limit on open files allows fewer connections; raise it (LimitNOFILE, ulimit -n)",
            open_files=most,
            max_connections=wanted,
            connections=fitting,
        )
    return min(wanted, fitting)
