# SPDX-License-Identifier: Apache-2.0
"""What a start finds in the data directory, after a clean end, a kill or a power cut.

A commit names the sidecar first, then the blob, and drops the journal last, so the pairs that can be found are few:

    blob and sidecar              whole; not hashed again, but the size has to agree (a bit that rotted is caught when
                                  its chunk is checked, before it is served)
    sidecar alone                 the commit did not get there, or an eviction got half way: delete
    blob alone, journal           the disk kept the names in another order: move it back to the partial blobs
    blob alone                    delete
    partial blob and journal      resumable, unless older than its time to live, or the blob is whole
    either alone                  delete
    what cannot be read           delete

Refuses: to touch a name that is not the store's.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

import structlog

from p2pdist.core.types import parse_digest
from p2pdist.store.base import DAMAGED, Entry
from p2pdist.store.checks import Record
from p2pdist.store.files import read_file, unlink_if_there
from p2pdist.store.layout import ALGORITHMS, JOURNAL, META
from p2pdist.store.sidecar import decode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from p2pdist.core.types import Digest
    from p2pdist.store.layout import Layout

_SHARD = re.compile(r"[0-9a-f]{2}")
_BLOB = re.compile(r"[0-9a-f]{64}|[0-9a-f]{128}")

_ALGORITHM_OF = {digits: algorithm for algorithm, digits in ALGORITHMS.items()}

_log = structlog.get_logger()


def recover(layout: Layout, now_s: float, partial_ttl_s: float) -> tuple[list[Entry], list[Entry]]:
    """Clean up the directory; return the whole and the partial blobs in it. Raises OSError.

    A blob that cannot be read, or deleted, is left out, and the rest goes on. 10,000 blobs take about half a second.
    """
    for name in os.listdir(layout.scratch):
        _delete(f"{layout.scratch}/{name}")
    whole = [
        entry
        for algorithm, root in layout.roots.items()
        for shard in os.listdir(root)
        for entry in _recover_shard(layout, algorithm, shard, now_s)
    ]
    partial = list(_recover_partials(layout, now_s - partial_ttl_s))
    return whole, partial


def _recover_shard(layout: Layout, algorithm: str, shard: str, now_s: float) -> Iterator[Entry]:
    if not _SHARD.fullmatch(shard):
        return
    try:
        names = set(os.listdir(f"{layout.roots[algorithm]}/{shard}"))
    except OSError as error:
        _log.error("stored blobs cannot be listed; they are fetched again when asked for", shard=shard, why=str(error))
        return
    for digest in _digests(names, META):
        if not digest.startswith(f"{algorithm}:{shard}"):
            continue
        if digest[7:] not in names:
            _delete(layout.meta(digest))
        elif digest[7:] + META not in names:
            _recover_unnamed(layout, digest)
        elif (entry := _read_entry(layout, digest, now_s)) is not None:
            yield entry


def _recover_unnamed(layout: Layout, digest: Digest) -> None:
    """Deal with a blob that has no sidecar."""
    if os.path.exists(layout.journal(digest)) and not os.path.exists(layout.partial(digest)):
        os.rename(layout.blob(digest), layout.partial(digest))
    else:
        _delete(layout.blob(digest))


def _read_entry(layout: Layout, digest: Digest, now_s: float) -> Entry | None:
    """Return the index entry of a blob and its sidecar; delete both where they do not fit."""
    try:
        sidecar = decode(read_file(layout.meta(digest)))
        blob, meta = os.stat(layout.blob(digest)), os.stat(layout.meta(digest))
        if blob.st_size == sidecar.size_bytes:
            used_s = min(meta.st_mtime, now_s)
            return Entry(
                digest,
                sidecar.size_bytes,
                used_s,
                whole=True,
                public=sidecar.public,
                home=sidecar.home,
                use_saved_s=used_s,
                checked=Record(whole_s=min(blob.st_mtime, now_s)),
            )
        why = "its size is not the one noted"
    except (ValueError, OSError) as error:
        why = str(error)
    _log.warning(DAMAGED, blob=digest, why=why)
    _delete(layout.blob(digest))
    _delete(layout.meta(digest))
    return None


def _recover_partials(layout: Layout, oldest_s: float) -> Iterator[Entry]:
    names = set(os.listdir(layout.partials))
    for digest in _digests(names, JOURNAL):
        paths = layout.partial(digest), layout.journal(digest)
        if digest[7:] in names and digest[7:] + JOURNAL in names and not os.path.exists(layout.blob(digest)):
            with contextlib.suppress(OSError):
                data, journal = (os.stat(path) for path in paths)
                used_s = max(data.st_mtime, journal.st_mtime)
                if used_s >= oldest_s:
                    yield Entry(digest, data.st_size, used_s, whole=False)
                    continue
        for path in paths:
            _delete(path)


def _delete(path: str) -> None:
    """Delete what is of no use; where that cannot be, it only takes room."""
    try:
        unlink_if_there(path)
    except OSError as error:
        _log.error("a file of no use cannot be deleted", path=path, why=str(error))


def _digests(names: set[str], suffix: str) -> Iterator[Digest]:
    """Yield each digest that has a file, a companion with `suffix`, or both."""
    for stem in {name.removesuffix(suffix) for name in names}:
        if _BLOB.fullmatch(stem):
            yield parse_digest(f"{_ALGORITHM_OF[len(stem)]}:{stem}")
