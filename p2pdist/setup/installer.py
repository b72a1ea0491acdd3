# SPDX-License-Identifier: Apache-2.0
"""Setup and its removal: works out what each file shall be, shows it as a diff, and does it so that it can be undone.

Invariants: nothing is written before every plan is made and every file could be read; the record is on disk before the
first file changes; a second run with the same wishes changes nothing; a run starts from the files as they were before
setup, so that other wishes replace the earlier ones.
"""

from __future__ import annotations

import difflib
import fcntl
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from p2pdist.errors import P2PDistError
from p2pdist.setup.plan import Places, View
from p2pdist.setup.record import Entry, Record
from p2pdist.setup.runtimes import RUNTIMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from p2pdist.setup.plan import Edit, Wanted
    from p2pdist.setup.tree import Tree


@dataclass(frozen=True, slots=True)
class Change:
    """A file that is not yet as it shall be; None: there is none, or shall be none."""

    path: str
    current: bytes | None
    target: bytes | None
    restart: str

    @property
    def kind(self) -> str:
        return "created" if self.current is None else "removed" if self.target is None else "changed"

    def diff(self) -> str:
        """Return the change as a unified diff."""
        old, new = (
            (text or b"").decode(errors="replace").splitlines(keepends=True) for text in (self.current, self.target)
        )
        names = (
            ("/dev/null" if self.current is None else f"a{self.path}"),
            ("/dev/null" if self.target is None else f"b{self.path}"),
        )
        shown = difflib.unified_diff(old, new, *names)
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in shown)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is to be done, and what the person should know. `record` is what will then have been done."""

    changes: tuple[Change, ...]
    record: Record
    notes: tuple[str, ...] = ()
    unenforced: Mapping[str, str] | None = None

    @property
    def restarts(self) -> list[str]:
        return list(dict.fromkeys(change.restart for change in self.changes if change.restart))


class Installer:
    """Setup on one host, or for one user's rootless runtimes."""

    def __init__(self, tree: Tree, places: Places) -> None:
        self._tree, self._places = tree, places
        self._record = Record.load(tree, places.state)

    @property
    def set_up(self) -> list[str]:
        """Return the runtimes that setup has configured."""
        return sorted({name for entry in self._record.files.values() for name in entry.runtimes})

    def view(self) -> View:
        """Return the host as it would be without us. Raises P2PDistError where our part cannot be told from others'."""
        return View(self._tree, self._originals(), frozenset(self._record.directories))

    def install(self, runtimes: Sequence[str], wanted: Wanted) -> Outcome:
        """Work out what makes these runtimes do what is wanted."""
        view = self.view()
        plans = {name: RUNTIMES[name].plan(view, self._places, wanted) for name in runtimes}
        entries = self._others(runtimes)
        for name, plan in plans.items():
            for edit in plan.edits:
                self._add(entries, name, edit, view, wanted)
        notes = tuple(note for plan in plans.values() for note in plan.notes)
        unenforced = {name: plan.unenforced for name, plan in plans.items() if plan.unenforced}
        return self._outcome(entries, view.before, notes, unenforced)

    def remove(self, runtimes: Sequence[str]) -> Outcome:
        """Work out what takes us out of these runtimes."""
        return self._outcome(self._others(runtimes), self._originals(), (), {})

    def carry_out(self, outcome: Outcome) -> None:
        """Do it. A run that is cut short can be repeated, or taken back by `remove`."""
        if not outcome.changes and outcome.record == self._record:
            return
        with self._locked():
            self._underway(outcome).save(self._tree, self._places.state)
            for change in outcome.changes:
                if change.target is None:
                    self._tree.remove(change.path)
                    continue
                for directory in self._tree.missing_directories(change.path):
                    self._tree.make_directory(directory)
                self._tree.write(change.path, change.target)
            self._finish(outcome)

    # ------------------------------------------------------------- working out

    def _originals(self) -> dict[str, bytes | None]:
        return {path: entry.original(path, self._tree.read(path)) for path, entry in self._record.files.items()}

    def _others(self, runtimes: Sequence[str]) -> dict[str, Entry]:
        """Return the record's entries that remain when these runtimes are left out."""
        left = {
            path: replace(entry, runtimes=tuple(name for name in entry.runtimes if name not in runtimes))
            for path, entry in self._record.files.items()
        }
        return {path: entry for path, entry in left.items() if entry.runtimes}

    def _add(self, entries: dict[str, Entry], name: str, edit: Edit, view: View, wanted: Wanted) -> None:
        before, text = view.read(edit.path), edit.text.encode()
        content = None if before is None else before.encode()
        if text == (content or b""):
            return
        others = entries[edit.path].runtimes if edit.path in entries else ()
        entries[edit.path] = Entry((*others, name), content, (text,), wanted.address, edit.restart)

    def _outcome(
        self,
        entries: dict[str, Entry],
        originals: Mapping[str, bytes | None],
        notes: tuple[str, ...],
        unenforced: Mapping[str, str],
    ) -> Outcome:
        targets: dict[str, bytes | None] = dict(originals) | {path: entry.written[0] for path, entry in entries.items()}
        restarts = {path: entry.restart for path, entry in (self._record.files | entries).items()}
        changes = []
        for path, target in targets.items():
            current = self._tree.read(path)
            if current != target:
                changes.append(Change(path, current, target, restarts[path]))
        written = [change.path for change in changes if change.target is not None]
        made = dict.fromkeys(self._record.directories)
        for path in [*([self._places.state] if entries else []), *written]:
            made |= dict.fromkeys(self._tree.missing_directories(path))
        return Outcome(tuple(changes), Record(entries, list(made)), notes, unenforced)

    # ------------------------------------------------------------ carrying out

    def _underway(self, outcome: Outcome) -> Record:
        """Return the record of a run that may be cut short: what was and what will be written."""
        files = dict(self._record.files)
        for path, entry in outcome.record.files.items():
            earlier = files[path].written if path in files else ()
            files[path] = replace(entry, written=tuple(dict.fromkeys((*entry.written, *earlier))))
        return Record(files, outcome.record.directories)

    def _finish(self, outcome: Outcome) -> None:
        """Drop the directories that nothing needs any more, and record how things are."""
        used = {str(parent) for path in outcome.record.files for parent in PurePosixPath(path).parents}
        state = {str(parent) for parent in PurePosixPath(self._places.state).parents} if outcome.record.files else set()
        kept = [path for path in outcome.record.directories if path in used | state]
        mine = [path for path in outcome.record.directories if path not in kept]
        if not outcome.record.files:
            self._tree.remove(self._places.state)
        else:
            Record(outcome.record.files, kept).save(self._tree, self._places.state)
        for path in sorted(mine, key=len, reverse=True):
            self._tree.remove_directory_if_empty(path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the state's directory against another setup; it is made, and recorded, where it is missing."""
        state = self._places.state
        for directory in self._tree.missing_directories(state):
            self._tree.make_directory(directory)
        number = os.open(self._tree.real(state).parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise P2PDistError("another `p2pdist setup` is running on this host: wait for its end") from error
        else:
            yield
        finally:
            os.close(number)
