# SPDX-License-Identifier: Apache-2.0
"""podman, CRI-O, skopeo and buildah: one drop-in in registries.conf.d.

A drop-in's entry replaces the entry of the same prefix as a whole, so ours repeats what the host had set for the
registry and puts the agent's mirror in front. The only wildcard is `*.example.com`: registries are named one by one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from p2pdist.errors import P2PDistError
from p2pdist.setup import toml_text
from p2pdist.setup.plan import OURS, Edit, Places, Plan, Route, View, Wanted, child, tables

if TYPE_CHECKING:
    from collections.abc import Iterator

_DROP_IN = "zz-p2pdist.conf"
"""Read after the others, so that its entries hold."""
_VERSION_1 = ("search", "insecure", "block")


def found(view: View, places: Places) -> bool:
    programs = view.has_program("podman", "skopeo", "buildah", "crio")
    return programs or view.is_directory(places.config("containers"))


def plan(view: View, places: Places, wanted: Wanted) -> Plan:
    path = f"{places.config('containers')}/registries.conf.d/{_DROP_IN}"
    entries = _entries(view, places, besides=path)
    # A path cannot hold the brackets of an IPv6 address.
    named = [name for name in wanted.registries if "[" not in name]
    text = OURS + "".join("\n" + _tables(_entry(name, entries.get(name, {}), wanted)) for name in named)
    restart = places.systemctl("reload", "crio") if not places.home and view.has_program("crio") else ""
    notes = [
        f"podman: {name} cannot be part of a mirror's path: not configured" for name in wanted.registries if "[" in name
    ]
    unenforced = ""
    if wanted.enforce:
        notes.append(
            f"podman, CRI-O, skopeo, buildah: held to the agent for {', '.join(named)}; others are asked directly"
        )
        narrower = ", ".join(_narrower(named, entries))
        unenforced = f"entries of their own go past the agent: {narrower}; take them out" if narrower else ""
    return Plan((Edit(path, text, restart),), tuple(notes), unenforced)


def route(view: View, places: Places, registry: str) -> Route:
    entry = _entries(view, places).get(registry, {})
    locations = [mirror for mirror in entry.get("mirror", []) if mirror.get("pull-from-mirror") != "tag-only"]
    urls = [_url(mirror) for mirror in [*locations, {"location": registry, **entry}]]
    return Route(tuple(urls), by_path=True, where=f"{places.config('containers')}/registries.conf.d")


def _url(entry: dict[str, Any]) -> str:
    location = entry.get("location") or entry.get("prefix", "")
    return f"{'http' if entry.get('insecure') else 'https'}://{location}"


def _narrower(named: list[str], entries: dict[str, Any]) -> list[str]:
    """Return the prefixes that hold in the place of ours for a part of a registry."""
    return [prefix for prefix in entries for name in named if prefix.startswith(f"{name}/")]


def _entry(name: str, before: dict[str, Any], wanted: Wanted) -> dict[str, Any]:
    here = {"location": f"{wanted.address}/{name.replace(':', '__')}", "insecure": wanted.in_the_clear}
    if wanted.enforce:
        return {"prefix": name, **here}
    others = [mirror for mirror in before.get("mirror", []) if mirror.get("location") != here["location"]]
    return {"prefix": name, "location": name, **before, "mirror": [here, *others]}


def _tables(entry: dict[str, Any]) -> str:
    lines = ["[[registry]]", *_lines({key: value for key, value in entry.items() if key != "mirror"})]
    for mirror in entry.get("mirror", []):
        lines += ["", "[[registry.mirror]]", *_lines(mirror)]
    return "\n".join(lines) + "\n"


def _lines(values: dict[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if value is not False:
            yield f"{key} = {json.dumps(value)}"


def _entries(view: View, places: Places, *, besides: str = "") -> dict[str, dict[str, Any]]:
    """Return the host's entries by prefix, as the libraries read them: the main file, then the drop-ins by name."""
    entries: dict[str, dict[str, Any]] = {}
    for path in _files(view, places):
        if path == besides:
            continue
        document = toml_text.parse(view.read(path) or "", path)
        if any(key in child(document, "registries", dict, path) for key in _VERSION_1):
            raise P2PDistError(
                f"{path} has the old form [registries.search], beside which no drop-in is read:"
                f" write it as [[registry]] tables first, or leave podman out by --runtime"
            )
        for entry in tables(document, "registry", path):
            tables(entry, "mirror", path)
            entries[str(entry.get("prefix") or entry.get("location", ""))] = entry
    return entries


def _files(view: View, places: Places) -> list[str]:
    own = "/etc/containers"
    mains = [f"{places.config('containers')}/registries.conf", f"{own}/registries.conf"]
    main = next((path for path in mains if view.exists(path)), mains[-1])
    folders = dict.fromkeys([f"{own}/registries.conf.d", f"{places.config('containers')}/registries.conf.d"])
    drop_ins = [f"{folder}/{name}" for folder in folders for name in view.names(folder) if name.endswith(".conf")]
    return [main, *drop_ins]
