# SPDX-License-Identifier: Apache-2.0
"""Three-way merge of lines: takes our part out of a file that somebody else has changed since.

Pure. Refuses (returns None) where both changed the same lines: guessing would leave a configuration that nobody wrote.
"""

from __future__ import annotations

from difflib import SequenceMatcher

Change = tuple[int, int, tuple[str, ...]]
"""Lines [start, stop) of the base, and what stands there instead."""


def merge(base: str, ours: str, theirs: str) -> str | None:
    """Return `base` with the changes that lead to `ours` and those that lead to `theirs`, or None where they meet."""
    lines = base.splitlines(keepends=True)
    # What both changed alike is one change.
    changes = sorted(
        {*_changes(lines, ours.splitlines(keepends=True)), *_changes(lines, theirs.splitlines(keepends=True))}
    )
    merged: list[str] = []
    at = 0
    for number, (start, stop, instead) in enumerate(changes):
        if number and _meet(changes[number - 1], changes[number]):
            return None
        merged += [*lines[at:start], *instead]
        at = stop
    return "".join([*merged, *lines[at:]])


def _changes(base: list[str], other: list[str]) -> list[Change]:
    codes = SequenceMatcher(None, base, other, autojunk=False).get_opcodes()
    return [(start, stop, tuple(other[low:high])) for kind, start, stop, low, high in codes if kind != "equal"]


def _meet(first: Change, second: Change) -> bool:
    """Whether two changes overlap, or insert at the same place, where the order is not known."""
    return second[0] < first[1] or (second[0] == first[0] and second[1] == first[1])
