# SPDX-License-Identifier: Apache-2.0
"""Everything about a tree of files that setup must leave as it was."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

Seen = dict[str, tuple[object, ...]]


def snapshot(root: Path) -> Seen:
    """Return kind, content, mode and owner of everything below `root`, links as links."""
    return {str(path.relative_to(root)): _state(path) for path in sorted(root.rglob("*"))}


def _state(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    facts = (oct(status.st_mode), status.st_uid, status.st_gid)
    if path.is_symlink():
        return ("link", os.readlink(path), *facts)
    return ("directory", *facts) if path.is_dir() else ("file", path.read_bytes(), *facts)
