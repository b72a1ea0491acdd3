# SPDX-License-Identifier: Apache-2.0
"""Sample hosts for setup: small trees under hosts/, copied with the modes that git does not keep."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

HOSTS = Path(__file__).parent / "hosts"
SECRET = ("hosts.toml", "daemon.json")
"""Files that a host may keep from others' eyes."""


@pytest.fixture
def host(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function: name of a sample host -> the root of a copy of it."""

    def copy(name: str) -> Path:
        root = tmp_path / name
        shutil.copytree(HOSTS / name, root, symlinks=True)
        for path in root.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
            else:
                path.chmod(0o600 if path.name in SECRET else 0o644)
        return root

    return copy
