# SPDX-License-Identifier: Apache-2.0
"""How many bytes a message takes on the wire, without encoding it each time. Pure."""

from __future__ import annotations

from dataclasses import fields

from p2pdist.core import wire

_RAW: dict[type[wire.Message], tuple[str, ...]] = {
    cls: tuple(field.name for field in fields(cls) if str(field.type) == "bytes")
    for cls in (wire.Have, wire.Share, wire.Join, wire.Done, wire.Missing, wire.Checksums)
}
_frames: dict[type[wire.Message], int] = {}


def frame_bytes(message: wire.Message) -> int:
    """Return the size of the message's frame, exact but for a few bytes of numbers and lengths."""
    cls = type(message)
    raw = 0
    for name in _RAW.get(cls, ()):
        raw += len(getattr(message, name))
    known = _frames.get(cls)
    if known is None:
        known = _frames[cls] = len(wire.encode(message)) - raw
    return known + raw
