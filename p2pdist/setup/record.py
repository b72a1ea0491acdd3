# SPDX-License-Identifier: Apache-2.0
"""What setup has done to a host: each file's original content and what it was made to be, kept until it is taken back.

The record is written before the files are, so that a run that was cut short at any point can be taken back or
repeated. It may hold what the files hold (hosts.toml may have an Authorization header), so only its owner reads it.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from p2pdist.errors import P2PDistError
from p2pdist.setup.merge import merge

if TYPE_CHECKING:
    from p2pdist.setup.tree import Tree

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One file.

    Args:
        runtimes: for whose sake it was changed.
        before: its original content; None: there was none.
        written: what setup has made it, the newest first; more than one while a run is under way.
        mirror: the agent's address in it.
        restart: the command after which the runtime knows of a change.
    """

    runtimes: tuple[str, ...]
    before: bytes | None
    written: tuple[bytes, ...]
    mirror: str
    restart: str = ""

    def original(self, path: str, current: bytes | None) -> bytes | None:
        """Return what the file would be without our part, given what it is now; None: it would not be there.

        Raises:
            P2PDistError: somebody changed the very lines that we did.
        """
        if current is None or current == self.before:
            return current
        if current in self.written:
            return self.before
        merged = self._without_ours(current)
        if merged is not None:
            return merged.encode() if merged.strip() or self.before is not None else None
        if self.mirror.encode() not in current:
            return current
        raise P2PDistError(
            f"{path} was changed since setup, on the lines that setup wrote: take {self.mirror} out of it by hand,"
            " then run this again"
        )

    def _without_ours(self, current: bytes) -> str | None:
        try:
            return merge(self.written[0].decode(), (self.before or b"").decode(), current.decode())
        except UnicodeDecodeError:
            return None


@dataclass(slots=True)
class Record:
    """Everything that setup has changed: files by path, and the directories that it made, the outermost first."""

    files: dict[str, Entry] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, tree: Tree, path: str) -> Record:
        """Return the record of a host; an empty one where there is none.

        Raises:
            P2PDistError: it cannot be read, or is not one.
        """
        content = tree.read(path)
        if content is None:
            return cls()
        try:
            document = json.loads(content)
            if document["format"] != _FORMAT:
                raise P2PDistError(f"{path} was written by another version of p2pdist: use that one")
            return cls(
                {name: _entry(value) for name, value in document["files"].items()}, list(document["directories"])
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise P2PDistError(
                f"{path} is damaged: take the agent out of the runtimes by hand, then delete it"
            ) from error

    def save(self, tree: Tree, path: str) -> None:
        """Write the record; without anything in it, remove it."""
        if not self.files and not self.directories:
            tree.remove(path)
            return
        document = {
            "format": _FORMAT,
            "files": {name: _plain(entry) for name, entry in self.files.items()},
            "directories": self.directories,
        }
        tree.write(path, json.dumps(document, indent=1).encode() + b"\n", mode=0o600)


def _entry(value: dict[str, Any]) -> Entry:
    before = value["before"]
    written = tuple(base64.b64decode(text, validate=True) for text in value["written"])
    content = None if before is None else base64.b64decode(before, validate=True)
    return Entry(
        tuple(value["runtimes"]), content, (written[0], *written[1:]), str(value["mirror"]), str(value["restart"])
    )


def _plain(entry: Entry) -> dict[str, Any]:
    return {
        "runtimes": entry.runtimes,
        "before": None if entry.before is None else base64.b64encode(entry.before).decode(),
        "written": [base64.b64encode(content).decode() for content in entry.written],
        "mirror": entry.mirror,
        "restart": entry.restart,
    }
