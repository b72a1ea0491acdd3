# SPDX-License-Identifier: Apache-2.0
"""The one error of the lab."""

from __future__ import annotations

from p2pdist.errors import P2PDistError


class LabError(P2PDistError):
    """The lab cannot be built or something in it did not start; the message says what to do about it.

    Args:
        message: one line.
        log: the end of the log that tells why, or "".
    """

    def __init__(self, message: str, *, log: str = "") -> None:
        super().__init__(message)
        self.log = log
