# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from p2pdist.store.disk import DiskStore
from p2pdist.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from p2pdist.core.types import Digest
    from p2pdist.store.base import BaseStore

ROOM_BYTES = 1 << 20


class MakeStore(Protocol):
    def __call__(
        self, *, max_bytes: int = ..., low_bytes: int | None = ..., on_evicted: Callable[[Digest], None] | None = ...
    ) -> BaseStore: ...


@pytest.fixture(params=["disk", "memory"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    """Makes stores of the one and the other kind, each on a medium of its own; all are closed at the end."""
    stores = ExitStack()

    def make(
        *,
        max_bytes: int = ROOM_BYTES,
        low_bytes: int | None = None,
        on_evicted: Callable[[Digest], None] | None = None,
    ) -> BaseStore:
        made: BaseStore
        if request.param == "memory":
            made = MemoryStore(max_bytes=max_bytes, low_bytes=low_bytes, on_evicted=on_evicted)
        else:
            low_bytes = max_bytes if low_bytes is None else low_bytes
            made = DiskStore(
                tmp_path, max_bytes=max_bytes, low_bytes=low_bytes, min_free_bytes=0, on_evicted=on_evicted
            )
        stores.callback(made.close)
        return made

    with stores:
        yield make


@pytest.fixture
def store(make_store: MakeStore) -> BaseStore:
    return make_store()


@pytest.fixture
def tiny_disk(require: Callable[[str, str], str]) -> Iterator[Path]:
    """A file system of 2 MiB, in a mount namespace of its own that ends with the test."""
    unshare = require("unshare", "util-linux")
    mount = "mount -t tmpfs -o size=2m,mode=0700 p2pdist-test /mnt && echo mounted && exec cat"
    with subprocess.Popen(
        [unshare, *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--mount", "sh", "-c", mount],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        if keeper.stdout.readline() != b"mounted\n":
            keeper.stdin.close()
            pytest.skip("needs root or user namespaces: sysctl kernel.unprivileged_userns_clone=1")
        yield Path(f"/proc/{keeper.pid}/root/mnt")
        keeper.stdin.close()
