# SPDX-License-Identifier: Apache-2.0
"""Programs of Debian packages that a lab wants and the machine lacks. Blocking, bounded in time, root only."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_TIMEOUT_S = 120.0
_IMPATIENT = ("-qq", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=5", "-o", "DPkg::Lock::Timeout=20")


def install(package: str) -> bool:
    """Install a package with apt; return whether that worked."""
    return _with_lists(["apt-get", *_IMPATIENT, "install", "--yes", "--no-install-recommends", package], None)


def unpack(package: str, directory: Path) -> Path | None:
    """Unpack a package below an empty directory and return where, or None; changes nothing else on the machine."""
    if not _with_lists(["apt-get", *_IMPATIENT, "download", package], directory):
        return None
    files = list(directory.glob(f"{package}_*.deb"))
    root = directory / "unpacked"
    return root if files and _run(["dpkg-deb", "-x", str(files[0]), str(root)], directory) else None


def _with_lists(command: list[str], directory: Path | None) -> bool:
    """Run an apt command, a second time after fetching the package lists; a fresh container has none."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return False
    return _run(command, directory) or (_run(["apt-get", *_IMPATIENT, "update"], None) and _run(command, directory))


def _run(command: list[str], directory: Path | None) -> bool:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
