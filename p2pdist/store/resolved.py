# SPDX-License-Identifier: Apache-2.0
"""The last answers about tags, for the tag policies that outlive a restart: `tags.json` in the data directory.

Invariants: a file that is damaged counts as empty; one that is being written never takes the old one's place half done.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import structlog

from p2pdist.core.types import ManifestInfo, parse_digest
from p2pdist.errors import P2PDistError
from p2pdist.store.files import translated, write_durably

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

log = structlog.get_logger(__name__)

_BYTES_MAX = 16 * 1024 * 1024


class ResolvedTags:
    """A `tags.TagsFile`: one JSON object, by `registry/repository:tag`, that a person may edit while no agent runs."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "tags.json"

    def load(self) -> Mapping[str, ManifestInfo]:
        """Return what the file holds; nothing where there is none or it cannot be used."""
        try:
            with self._path.open("rb") as file:
                entries = json.loads(file.read(_BYTES_MAX))
            return {
                str(name): ManifestInfo(parse_digest(entry["digest"]), str(entry["mediaType"]), int(entry["size"]))
                for name, entry in entries.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, P2PDistError) as error:
            log.warning(
                "the resolved tags cannot be read; they are resolved anew", file=str(self._path), why=str(error)
            )
            return {}

    def save(self, tags: Mapping[str, ManifestInfo]) -> None:
        """Put these in the place of what the file holds. Blocking. Raises StoreError."""
        entries = {
            name: {"digest": info.digest, "mediaType": info.media_type, "size": info.size_bytes}
            for name, info in tags.items()
        }
        fresh = f"{self._path}.new"
        with translated(f"write {self._path}"):
            write_durably(fresh, json.dumps(entries, indent=1).encode())
            os.replace(fresh, self._path)
