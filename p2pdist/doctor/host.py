# SPDX-License-Identifier: Apache-2.0
"""Checks of the host: the agent's data directory and the room in its file system."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from p2pdist.doctor.report import Check, fail, ok, warn

if TYPE_CHECKING:
    from pathlib import Path

    from p2pdist.doctor.node import Node

_INODES_LEAST = 0.02


def checks(node: Node) -> list[Check]:
    """Return the checks of the data directory and of its disk."""
    found = [_rights(node)]
    return [*found, _space(node)] if node.data_dir.exists() else found


def _rights(node: Node) -> Check:
    path, told = node.data_dir, node.status.get("data_dir_writable")
    another = "or choose another with --data-dir"
    try:
        if not path.exists():
            return fail("data-dir", f"{path} does not exist", f"start the agent once, {another}")
        if not path.is_dir():
            return fail("data-dir", f"{path} is not a directory", f"move it away, {another}")
    except OSError as error:
        return fail("data-dir", f"{path} cannot be looked at: {error.strerror}", "run the doctor as root")
    # What the agent may is known best by the agent: it may run as another user.
    writable = told if isinstance(told, bool) else _is_writable(path)
    if not writable:
        return fail("data-dir", f"{path} cannot be written to", f"give it to the agent's user (chown), {another}")
    return ok("data-dir", f"{path} can be written to")


def _is_writable(path: Path) -> bool:
    """Return whether this process may; a store that cannot be entered belongs to the agent, which is right."""
    return os.access(path, os.W_OK | os.X_OK) or (
        os.geteuid() != 0 and path.stat().st_uid != os.geteuid() and path.stat().st_mode & 0o077 == 0
    )


def _space(node: Node) -> Check:
    try:
        disk = os.statvfs(node.data_dir)
    except OSError as error:
        return fail("disk-space", f"{node.data_dir} cannot be looked at: {error.strerror}", "run the doctor as root")
    free, least = disk.f_bavail * disk.f_frsize, node.config.store_min_free
    shown = f"{free / (1 << 30):.1f} GiB free in {node.data_dir}"
    room = "make room, or move --data-dir to a larger file system"
    if free < least:
        return fail(
            "disk-space", f"{shown}, less than store_min_free ({least / (1 << 30):.1f} GiB): nothing is kept", room
        )
    if disk.f_files and disk.f_favail < _INODES_LEAST * disk.f_files:
        return fail("disk-space", f"only {disk.f_favail} of {disk.f_files} inodes are free in {node.data_dir}", room)
    if free < 2 * least:
        return warn("disk-space", f"{shown}; below {least / (1 << 30):.1f} GiB nothing is kept", room)
    return ok("disk-space", shown)
