# SPDX-License-Identifier: Apache-2.0
"""Where things are in the data directory.

    lock                          held by the one agent that uses the directory; names its process
    blobs/sha256/ab/<hex>         a whole, verified blob; its mtime is when all of it was last found to be right;
                                  blobs/sha512/ab/<hex> where its digest is of that kind
    blobs/sha256/ab/<hex>.meta    its sidecar; its mtime is the blob's last use
    partial/<hex>                 a blob that is arriving, preallocated
    partial/<hex>.journal         which of its chunks are here
    tmp/                          not yet named, or about to be deleted; emptied at start

A name is made only of a digest that `parse_digest` has passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2pdist.core.types import Digest

ALGORITHMS = {"sha256": 64, "sha512": 128}
"""And how many hex digits each has; the names are equally long."""

META = ".meta"
JOURNAL = ".journal"


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below one data directory; text, because they are made on hot paths."""

    root: str

    @property
    def lock(self) -> str:
        return f"{self.root}/lock"

    @property
    def roots(self) -> dict[str, str]:
        """Return the directory of each algorithm's blobs."""
        return {algorithm: f"{self.root}/blobs/{algorithm}" for algorithm in ALGORITHMS}

    @property
    def partials(self) -> str:
        return f"{self.root}/partial"

    @property
    def scratch(self) -> str:
        return f"{self.root}/tmp"

    def shard(self, digest: Digest) -> str:
        return f"{self.root}/blobs/{digest[:6]}/{digest[7:9]}"

    def blob(self, digest: Digest) -> str:
        return f"{self.shard(digest)}/{digest[7:]}"

    def meta(self, digest: Digest) -> str:
        return self.blob(digest) + META

    def partial(self, digest: Digest) -> str:
        return f"{self.partials}/{digest[7:]}"

    def journal(self, digest: Digest) -> str:
        return self.partial(digest) + JOURNAL
