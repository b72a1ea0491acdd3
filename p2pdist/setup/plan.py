# SPDX-License-Identifier: Apache-2.0
"""What is wanted of a host, what a runtime's configuration would have to be for it, and what it is now.

Each runtime's module offers `found`, `plan` and `route` (see `Runtime`), which read through a `View` and never write.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlsplit

from p2pdist.errors import P2PDistError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from p2pdist.setup.tree import Tree

T = TypeVar("T", dict[str, Any], list[Any])

OURS = "# Written by `p2pdist setup`; `p2pdist setup --remove` takes it away again.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the runtimes shall do.

    Args:
        mirror: the agent's mirror as runtimes reach it, such as http://127.0.0.1:5050.
        registries: the names to configure where each one has to be named.
        all_registries: also every other registry, where the runtime knows such a thing.
        enforce: no way around the agent.
    """

    mirror: str
    registries: tuple[str, ...]
    all_registries: bool
    enforce: bool = False

    @property
    def address(self) -> str:
        return urlsplit(self.mirror).netloc

    @property
    def in_the_clear(self) -> bool:
        return self.mirror.startswith("http://")


@dataclass(frozen=True, slots=True)
class Places:
    """Where a host's runtimes, or those of one of its users, have their files."""

    home: str = ""
    """A user's home directory, for rootless runtimes; else empty."""

    def config(self, name: str) -> str:
        return f"{self.home}/.config/{name}" if self.home else f"/etc/{name}"

    @property
    def state(self) -> str:
        """The record's path: what it says is written back as root, so that it lies where no agent may write."""
        return f"{self.home}/.local/state/p2pdist/setup.json" if self.home else "/etc/p2pdist/setup.json"

    def systemctl(self, verb: str, unit: str) -> str:
        return f"systemctl {'--user ' if self.home else ''}{verb} {unit}"


@dataclass(frozen=True, slots=True)
class View:
    """The files of a host as they were before setup touched them.

    Args:
        before: the original content of those that it has changed; None: there was no such file.
        made: the directories that it has made.
    """

    tree: Tree
    before: Mapping[str, bytes | None] = field(default_factory=dict)
    made: frozenset[str] = frozenset()

    def read(self, path: str) -> str | None:
        """Return a file's text, or None where there is none. Raises P2PDistError where it is no text."""
        content = self.before[path] if path in self.before else self.tree.read(path)
        try:
            return None if content is None else content.decode()
        except UnicodeDecodeError as error:
            raise P2PDistError(f"{path} is not UTF-8 text: mend it first, or leave it out by --runtime") from error

    def names(self, path: str) -> list[str]:
        """Return what was in a directory, sorted."""
        inside = ((name, f"{path}/{name}") for name in self.tree.names(path))
        gone = {str(name) for name, content in self.before.items() if content is None} | self.made
        kept = {name for name, at in inside if at not in gone or (at in self.made and self.names(at))}
        prefix = f"{path}/"
        lost = {at.removeprefix(prefix) for at, content in self.before.items() if content is not None}
        return sorted(kept | {at for at in lost if at and "/" not in at})

    def is_directory(self, path: str) -> bool:
        return self.tree.is_directory(path)

    def exists(self, path: str) -> bool:
        return self.before[path] is not None if path in self.before else self.tree.exists(path)

    def has_program(self, *names: str) -> bool:
        """Return whether one of these programs is installed."""
        folders = ("/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/bin", "/sbin", "/opt/bin")
        return any(self.tree.exists(f"{folder}/{name}") for folder in folders for name in names)


def child(document: dict[str, Any], key: str, kind: type[T], where: str) -> T:
    """Return a table or list of a parsed file, an empty one where it is not there.

    Raises:
        P2PDistError: something else stands there.
    """
    value = document.get(key, kind())
    if not isinstance(value, kind):
        noun = "a table" if kind is dict else "a list"
        raise P2PDistError(f"{where}: {key} is not {noun}: mend it first, or leave it out by --runtime")
    return value


def tables(document: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """Return a list of tables, such as [[registry]]. Raises P2PDistError where it is something else."""
    found = child(document, key, list, where)
    if not all(isinstance(item, dict) for item in found):
        raise P2PDistError(f"{where}: {key} is not a list of tables: mend it first, or leave it out by --runtime")
    return found


@dataclass(frozen=True, slots=True)
class Edit:
    """What a file shall be, and the command after which its runtime knows it; "" where it reads it on each pull."""

    path: str
    text: str
    restart: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a runtime needs.

    Args:
        edits: files as they shall be; those that are so already change nothing.
        notes: lines that the person should read.
        unenforced: in the mode `enforce`, why this runtime can still go past the agent; else "".
    """

    edits: tuple[Edit, ...]
    notes: tuple[str, ...] = ()
    unenforced: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a runtime's pull from a registry goes, as its configuration says.

    Args:
        hosts: base URLs in the order in which they are asked.
        by_path: whether the registry's name is part of the path (podman), and not a query (containerd).
        where: the file that says so, or what is missing.
        possible: whether the runtime can have a mirror for this registry at all.
    """

    hosts: tuple[str, ...]
    by_path: bool = False
    where: str = ""
    possible: bool = True


class Runtime(Protocol):
    """What each runtime's module has."""

    def found(self, view: View, places: Places) -> bool:
        """Return whether the runtime is on the host."""

    def plan(self, view: View, places: Places, wanted: Wanted) -> Plan:
        """Return what it needs. Raises P2PDistError where its files cannot be edited."""

    def route(self, view: View, places: Places, registry: str) -> Route:
        """Return where it pulls from now. Raises P2PDistError where its files cannot be read."""
