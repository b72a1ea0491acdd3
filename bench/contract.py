# SPDX-License-Identifier: Apache-2.0
"""What `--json` promises of every benchmark, and figures held against their targets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

KEYS = (
    "system",
    "nodes",
    "image_bytes",
    "link_mbit",
    "goodput_bytes_per_s",
    "bound_s",
    "first_s",
    "p50_s",
    "p99_s",
    "last_s",
    "ratio_to_bound",
    "origin_egress_ratio",
    "cpu_s_per_gib",
    "rss_mib_max",
    "control_bytes_per_node",
    "ttfb_p50_s",
    "ttfb_p99_s",
    "failed_pulls",
    "duplicate_bytes_ratio",
    "idle_cpu_ratio",
)
"""In every object that a benchmark writes; null where a benchmark has no such figure."""


def record(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures with every key of the contract."""
    return {**dict.fromkeys(KEYS), **figures}


def begin_file(file: Path) -> None:
    """Make an empty file for a benchmark's objects."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")


def add_line(file: Path, figures: Mapping[str, Any]) -> None:
    """Write an object in a line of its own."""
    with file.open("a") as lines:
        lines.write(json.dumps(figures) + "\n")


@dataclass(frozen=True, slots=True)
class Target:
    """A figure, what it should be, and whether it is."""

    what: str
    seen: str
    wanted: str
    met: bool


def at_most(what: str, seen: float, wanted: float, unit: str, digits: int = 0) -> Target:
    return Target(what, f"{seen:.{digits}f} {unit}", f"≤ {wanted:.{digits}f} {unit}", seen <= wanted)


def at_least(what: str, seen: float, wanted: float, unit: str, digits: int = 0) -> Target:
    return Target(what, f"{seen:.{digits}f} {unit}", f"≥ {wanted:.{digits}f} {unit}", seen >= wanted)


def target_table(targets: Sequence[Target]) -> Table:
    """Return a row for each target."""
    shown = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("target", "seen", "wanted", ""):
        shown.add_column(name, justify="left" if name in ("target", "") else "right", no_wrap=True)
    for target in targets:
        shown.add_row(target.what, target.seen, target.wanted, "met" if target.met else "MISSED")
    return shown
