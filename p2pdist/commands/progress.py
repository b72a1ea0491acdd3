# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a pull: a live row per blob on a terminal (live.py), else one line per finished blob."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from types import TracebackType
    from typing import TextIO

    from p2pdist.core.types import Descriptor, Split

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Display(Protocol):
    live: bool
    """Whether it is worth asking for the sources while bytes still arrive."""

    def __enter__(self) -> Display: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def expect(self, blobs: tuple[Descriptor, ...]) -> None:
        """Make room for blobs that will arrive."""

    def moved(self, blob: Descriptor, arrived_bytes: int) -> None:
        """So many bytes of the blob are here now."""

    def source(self, blob: Descriptor, split: Split) -> None:
        """The bytes so far came from there."""

    def done(self, blob: Descriptor, note: str) -> None:
        """The blob is whole and right."""


def human_bytes(count: float) -> str:
    """Return a size in binary units, three digits long: `512 B`, `1.5 MiB`, `83 GiB`."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 or count >= 99.95 else f"{count:.1f} {_UNITS[unit]}"


def describe(split: Split) -> str:
    """Return where bytes came from, in words: `92 MiB from peers, 8.2 MiB from the origin`."""
    parts = (
        (split.from_peers, "from peers"),
        (split.from_origin, "from the origin"),
        (split.from_cache, "from this node's cache"),
    )
    return ", ".join(f"{human_bytes(count)} {where}" for count, where in parts if count)


def choose_display(stream: TextIO | None = None) -> Display:
    """Return a live display where `stream` (stderr) is a terminal, else plain lines."""
    stream = stream or sys.stderr
    if not stream.isatty():
        return Lines(stream)
    from p2pdist.commands.live import Live

    return Live(stream)


def label(blob: Descriptor) -> str:
    """Return what a blob is called on the screen: its kind and the start of its digest."""
    kind = "config" if "config" in blob.media_type or "container.image" in blob.media_type else "layer "
    return f"{kind} {blob.digest.removeprefix('sha256:')[:12]}"


class Lines:
    """One line per finished blob."""

    live = False

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def expect(self, blobs: tuple[Descriptor, ...]) -> None:
        total = sum(blob.size_bytes for blob in blobs)
        print(f"{len(blobs)} blobs, {human_bytes(total)}", file=self._stream, flush=True)

    def moved(self, blob: Descriptor, arrived_bytes: int) -> None:
        pass

    def source(self, blob: Descriptor, split: Split) -> None:
        pass

    def done(self, blob: Descriptor, note: str) -> None:
        tail = f"  {note}" if note else ""
        print(f"{label(blob)}  {human_bytes(blob.size_bytes):>8}{tail}", file=self._stream, flush=True)
