# SPDX-License-Identifier: Apache-2.0
"""How many bytes a message takes on the wire, without encoding it each time. Pure."""

from __future__ import annotations

from dataclasses import fields

from p2pdist.core import wire

_RAW: dict[type[wire.Message], tuple[str, ...]] = {
    cls: tuple(field.name for field in fields(cls) if str(field.type) == "bytes")
    for cls in (wire.Have, wire.Share, wire.Join, wire.Done, wire.Missing, wire.Checksums)
}
_known: dict[type[wire.Message], tuple[int, tuple[str, ...]]] = {}
"""What frames of a type take without the bytes that differ in length, and the fields that hold these."""


def frame_bytes(message: wire.Message) -> int:
    """Return the size of the message's frame, exact but for a few bytes of numbers and lengths."""
    known = _known.get(type(message)) or _learn(message)
    size, names = known
    for name in names:
        size += len(getattr(message, name))
    return size


def _learn(message: wire.Message) -> tuple[int, tuple[str, ...]]:
    names = _RAW.get(type(message), ())
    raw = sum(len(getattr(message, name)) for name in names)
    known = _known[type(message)] = len(wire.encode(message)) - raw, names
    return known
