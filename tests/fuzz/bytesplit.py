# SPDX-License-Identifier: Apache-2.0
"""Cutting an input into the parts that it arrives in: its first bytes say how."""

from __future__ import annotations

_LENGTHS = 4


class Splitter:
    """`rest` is the input without its first four bytes, which give the lengths of the parts in turn."""

    def __init__(self, data: bytes) -> None:
        self._lengths = [1 + length for length in data[:_LENGTHS]] or [1]
        self.rest = data[_LENGTHS:]

    def parts(self) -> list[bytes]:
        """Return the parts, none of them empty."""
        parts, at = [], 0
        while at < len(self.rest):
            length = self._lengths[len(parts) % len(self._lengths)]
            parts.append(self.rest[at : at + length])
            at += length
        return parts
