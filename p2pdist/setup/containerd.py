# SPDX-License-Identifier: Apache-2.0
"""containerd: a directory of hosts.toml files, and `config_path`, which tells its CRI plugin of that directory.

Where `config_path` goes depends on the version of the configuration file, not of the program: 1 and 2 belong to
containerd 1.x, which 2.x translates; 3 and later name the images plugin. A file of version 3 whose `imports` cover a
directory gets a drop-in there, as containerd 2 merges tables; containerd 1 replaces a plugin's whole table by the
imported one, so there the value is inserted in the file that has the table.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from p2pdist.errors import P2PDistError
from p2pdist.setup import hosts_toml, toml_text
from p2pdist.setup.plan import OURS, Edit, Places, Plan, Route, View, Wanted, child

_SECTIONS = {
    1: ("plugins", "cri", "registry"),
    2: ("plugins", "io.containerd.grpc.v1.cri", "registry"),
    3: ("plugins", "io.containerd.cri.v1.images", "registry"),
}
_DROP_IN = "zz-p2pdist.toml"
"""Read after the others of its directory, so that its value holds."""


def found(view: View, places: Places) -> bool:
    return view.is_directory(places.config("containerd")) or (not places.home and view.has_program("containerd"))


def plan(view: View, places: Places, wanted: Wanted) -> Plan:
    main = _read(view, f"{places.config('containerd')}/config.toml")
    effective = _config_path(view, main)
    directory = _certs_directory(places, effective)
    edits = hosts_toml.edits(view, directory, wanted)
    if _runs_cri(main, places) and not effective:
        edits += (_config_edit(view, main, directory, places.systemctl("restart", "containerd")),)
    return Plan(edits, notes=_notes(effective))


def route(view: View, places: Places, registry: str) -> Route:
    main = _read(view, f"{places.config('containerd')}/config.toml")
    effective = _config_path(view, main)
    if _runs_cri(main, places) and not effective:
        return Route((hosts_toml.origin_url(registry),), where=f"config_path is not set in {main.path}")
    return hosts_toml.route(view, _certs_directory(places, effective), registry)


@dataclass(frozen=True, slots=True)
class _File:
    """A configuration file; `text` is None where there is none."""

    path: str
    text: str | None
    values: dict[str, Any]

    @property
    def version(self) -> int:
        """Return the form: 1, 2, or 3 for all later ones; a new file's is 2, which every containerd reads."""
        return min(int(self.values.get("version", 1)), 3) if self.values else 2

    def table(self, depth: int) -> dict[str, Any]:
        """Return the first `depth` parts of where registries are set, an empty table where they are not."""
        at = self.values
        for part in _SECTIONS[self.version][:depth]:
            at = child(at, part, dict, self.path)
        return at


def _read(view: View, path: str) -> _File:
    text = view.read(path)
    values = toml_text.parse(text or "", path)
    if not isinstance(values.get("version", 1), int):
        raise P2PDistError(f"{path}: version is not a number: mend it first, or leave containerd out by --runtime")
    return _File(path, text, values)


def _runs_cri(main: _File, places: Places) -> bool:
    """Whether Kubernetes may pull through it: else only the directory matters, which the clients name themselves."""
    if places.home and not main.values:
        return False
    return not any("cri" in str(name).split(".") for name in child(main.values, "disabled_plugins", list, main.path))


def _certs_directory(places: Places, effective: str) -> str:
    """Return the directory to write to: the configured one, or the first of several."""
    return effective.split(":")[0].rstrip("/") or f"{places.config('containerd')}/certs.d"


def _notes(effective: str) -> tuple[str, ...]:
    if ":" not in effective:
        return ()
    return (f"containerd: config_path lists {effective}; containerd 2.1 and later reads no list: keep one directory",)


def _config_path(view: View, main: _File) -> str:
    """Return the `config_path` that holds, "" where there is none."""
    files = _holders(view, main)
    values = [file.table(3).get("config_path") for file in (files if main.version >= 3 else files[-1:])]
    return str(next((value for value in reversed(values) if value), ""))


def _holders(view: View, main: _File) -> list[_File]:
    """Return the file and what it imports, where they have the plugin's table; the last one wins.

    One level of imports, as that is what people use.
    """
    files = [main]
    for pattern in child(main.values, "imports", list, main.path):
        at = PurePosixPath(main.path).parent / str(pattern)
        paths = (f"{at.parent}/{name}" for name in view.names(str(at.parent)) if fnmatchcase(name, at.name))
        files += [_read(view, path) for path in paths if path != main.path]
    return [main, *(file for file in files[1:] if file.table(2))]


def _config_edit(view: View, main: _File, directory: str, restart: str) -> Edit:
    """Return the edit that sets `config_path`."""
    file = _holders(view, main)[-1]
    section, literal = _SECTIONS[file.version], toml_text.quoted(directory)
    for legacy in ("mirrors", "configs"):
        if file.table(3).get(legacy):
            raise P2PDistError(
                f"{file.path} has registry.{legacy}, beside which containerd takes no config_path: move it into"
                " hosts.toml files first (docs/runtimes.md), or leave containerd out by --runtime"
            )
    drop_ins = _drop_in_directory(main) if main.version >= 3 else ""
    if drop_ins:
        text = f"{OURS}version = {main.values['version']}\n"
        path = f"{drop_ins}/{_DROP_IN}"
        return Edit(path, toml_text.set_value(text, _SECTIONS[3], "config_path", literal), restart)
    if not file.values:
        text = f"{file.text or ''}{OURS}version = 2\n"
        return Edit(file.path, toml_text.set_value(text, section, "config_path", literal), restart)
    meant = copy.deepcopy(file.values)
    at = meant
    for part in section:
        at = at.setdefault(part, {})
    at["config_path"] = directory
    text = toml_text.set_value(file.text or "", section, "config_path", literal)
    return Edit(file.path, toml_text.expect(text, meant, file.path), restart)


def _drop_in_directory(main: _File) -> str:
    for pattern in child(main.values, "imports", list, main.path):
        at = PurePosixPath(main.path).parent / str(pattern)
        if fnmatchcase(_DROP_IN, at.name):
            return str(at.parent)
    return ""
