# SPDX-License-Identifier: Apache-2.0
"""Whole reads and writes at an offset, durable small files, and what an OSError means to a person."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from p2pdist.errors import StoreError, StoreFullError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FULL = {errno.ENOSPC, errno.EDQUOT}
_PRIVATE = 0o600
"""A store may hold what a registry gives only to those with credentials."""


def store_error(error: OSError, doing: str) -> StoreError:
    """Return the StoreError to raise: `doing` completes "cannot ..." and names the blob or directory."""
    why = error.strerror or str(error)
    if error.errno in _FULL:
        return StoreFullError(f"cannot {doing}: {why}; free disk space or lower `store_max`")
    return StoreError(f"cannot {doing}: {why}; check the disk and the permissions of the data directory")


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn an OSError inside the block into a StoreError."""
    try:
        yield
    except OSError as error:
        raise store_error(error, doing) from error


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, however little the system takes at a time. Raises OSError."""
    written = os.pwrite(fd, data, offset)
    rest = memoryview(data).cast("B")[written:]
    while rest:
        written = os.pwrite(fd, rest, offset := offset + written)
        if not written:
            raise OSError(errno.EIO, "the disk takes no more bytes")
        rest = rest[written:]


def read_all(fd: int, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of the file. Raises OSError, also where the file ends before `stop`."""
    data = os.pread(fd, stop - start, start)
    while len(data) < stop - start:
        more = os.pread(fd, stop - start - len(data), start + len(data))
        if not more:
            raise OSError(errno.EIO, f"the file ends at byte {start + len(data)} of {stop}")
        data += more
    return data


def create(path: str, size_bytes: int = 0) -> int:
    """Return a descriptor, for reading and writing, of a new file whose blocks are all allocated.

    Raises:
        OSError: above all ENOSPC; then no file is left.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _PRIVATE)
    try:
        if size_bytes:
            os.posix_fallocate(fd, 0, size_bytes)
    except BaseException:
        os.close(fd)
        os.unlink(path)
        raise
    return fd


def write_durably(path: str, content: bytes) -> None:
    """Write a small file and wait until it is on the disk; its name may not be yet. Raises OSError."""
    fd = create(path)
    try:
        write_all(fd, content, 0)
        os.fsync(fd)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def read_file(path: str) -> bytes:
    """Return a small file's content. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_all(fd, 0, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def sync_directory(path: str) -> None:
    """Wait until the names in a directory are on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unlink_if_there(path: str) -> None:
    """Delete a file; it is no error if there is none. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
