# SPDX-License-Identifier: Apache-2.0
"""A span of a blob that is being fetched from an origin: which answers bring it, and how much of it is here.

Owns: what a 206 or a 200 must say before any of its bytes counts, and that not one more is taken than was asked for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import trio

from p2pdist.errors import OriginError
from p2pdist.net.origin_connection import READ_BYTES, Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable

    from p2pdist.core.rate import TokenBucket
    from p2pdist.net.origin_transport import Answer

_SKIP_BYTES_MAX = 64 * 1024 * 1024
"""How far into a blob a range is still fetched from an origin that ignores Range and sends it whole."""
_SKIP_READ_BYTES = 256 * 1024
CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19}|\*)")
_LENGTH = re.compile(r"\d{1,19}")


class Window:
    """The span of a blob that is being fetched, and how much of it is here."""

    def __init__(self, into: memoryview, start: int, blob_bytes: int, progress: Callable[[int], None]) -> None:
        self.done = 0
        self.stop = start + len(into)
        self._into = into
        self._start = start
        self._blob_bytes = blob_bytes
        self._progress = progress
        self._skip = 0
        self._stop_early = False

    @property
    def full(self) -> bool:
        return self.done == len(self._into)

    @property
    def position(self) -> int:
        """The next byte of the blob to come."""
        return self._start + self.done

    def check_range(self, answer: Answer) -> None:
        """Refuse a 206 that is not exactly the rest of the span, out of a blob of the right size."""
        said = CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        wanted = (str(self.position), str(self.stop - 1))
        if said is None or (said[1], said[2]) != wanted or length_of(answer, self.stop - self.position) is None:
            raise OriginError(f"{answer.server} sends another range than bytes {wanted[0]} to {wanted[1]}")
        if said[3] not in ("*", str(self._blob_bytes)):
            raise OriginError(f"{answer.server} has {said[3]} bytes, but the manifest says {self._blob_bytes}")
        self._skip, self._stop_early = 0, False

    def check_whole(self, answer: Answer) -> None:
        """Take a 200, which has ignored Range, where the span is near enough to the start."""
        length = length_of(answer)
        if length not in (None, self._blob_bytes):
            raise OriginError(f"{answer.server} has {length} bytes, but the manifest says {self._blob_bytes}")
        if self.position > _SKIP_BYTES_MAX:
            raise OriginError(f"{answer.server} ignores Range requests; it can serve small blobs only", status_code=200)
        self._skip, self._stop_early = self.position, self.stop < self._blob_bytes

    async def receive(self, answer: Answer, limit: TokenBucket | None) -> None:
        """Take the body, as fast as the limit allows: what is not read is not sent.

        Raises:
            Unreachable: it broke off; OriginError: there was more of it than there may be.
        """
        while self._skip:
            scratch = memoryview(bytearray(min(self._skip, _SKIP_READ_BYTES)))
            count = await answer.read_into(scratch)
            if not count:
                break
            self._skip -= count
            await _in_time(limit, count)
        while not self.full:
            count = await answer.read_into(self._into[self.done :][:READ_BYTES])
            if not count:
                break
            self.done += count
            self._progress(self.done)
            await _in_time(limit, count)
        if self.full and not self._stop_early and await answer.read_into(memoryview(bytearray(1))):
            raise OriginError(f"{answer.server} sends more bytes than there should be")
        if not self.full:
            raise Unreachable(f"{answer.server} ended {len(self._into) - self.done} bytes early")


async def _in_time(limit: TokenBucket | None, received_bytes: int) -> None:
    if limit is not None:
        await trio.sleep_until(limit.reserve(received_bytes, trio.current_time()))


def length_of(answer: Answer, wanted: int | None = None) -> int | None:
    """Return the Content-Length. With `wanted`: that, or None where the header says something else."""
    text = answer.headers.get("content-length", "")
    length = int(text) if _LENGTH.fullmatch(text) else None
    if wanted is None:
        return length
    return wanted if length in (None, wanted) else None
