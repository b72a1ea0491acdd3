# SPDX-License-Identifier: Apache-2.0
"""The directory that holds all files of a lab: images, registries, data directories, logs.

It is on tmpfs where that has room, so that a slow disk does not stand in for the network, and is gone
afterwards. Leftovers of labs that died are removed at the start of the next.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.lab import ownership

if TYPE_CHECKING:
    from collections.abc import Iterator

_TMPFS = Path("/dev/shm")
_SPARE_BYTES = 1 << 30
"""What a tmpfs workspace must leave free of memory: room for agents, pullers and the page cache."""


@dataclass(frozen=True, slots=True)
class Workspace:
    path: Path
    on_tmpfs: bool

    def directory(self, name: str) -> Path:
        """Return a directory of this name in the workspace, made if need be."""
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def logs(self) -> Path:
        return self.directory("logs")


@contextmanager
def workspace(needed_bytes: int) -> Iterator[Workspace]:
    """Give a new directory, on tmpfs if `needed_bytes` fit there well, and remove it at the end."""
    on_tmpfs = _fits_tmpfs(needed_bytes)
    parent = _TMPFS if on_tmpfs else Path(tempfile.gettempdir())
    for path in {_TMPFS, Path(tempfile.gettempdir())}:
        _sweep(path)
    root = parent / ownership.new_name()
    root.mkdir(mode=0o755)
    try:
        yield Workspace(root, on_tmpfs)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _fits_tmpfs(needed_bytes: int) -> bool:
    if not _TMPFS.is_dir():
        return False
    wanted_bytes = needed_bytes + _SPARE_BYTES
    return shutil.disk_usage(_TMPFS).free >= wanted_bytes and _memory_available_bytes() >= wanted_bytes


def _memory_available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _sweep(parent: Path) -> None:
    if not parent.is_dir():
        return
    for path in parent.iterdir():
        if ownership.is_left_over(path.name):
            shutil.rmtree(path, ignore_errors=True)
