# SPDX-License-Identifier: Apache-2.0
"""Docker: `registry-mirrors` in daemon.json, and certs.d for its containerd image store.

The classic image store knows mirrors of docker.io alone and goes past them by itself; the containerd store
(`features.containerd-snapshotter`) also reads certs.d, where the classic one looks at certificates only.
"""

from __future__ import annotations

from typing import Any

from p2pdist.errors import P2PDistError
from p2pdist.setup import hosts_toml, json_text
from p2pdist.setup.plan import Edit, Places, Plan, Route, View, Wanted, child

_KEY = "registry-mirrors"
_UNENFORCED = (
    "the classic image store asks docker.io itself when a mirror refuses: set"
    ' {"features": {"containerd-snapshotter": true}} in daemon.json, or block the registries in the firewall'
)


def found(view: View, places: Places) -> bool:
    return view.is_directory(places.config("docker")) or (not places.home and view.has_program("dockerd"))


def plan(view: View, places: Places, wanted: Wanted) -> Plan:
    path = f"{places.config('docker')}/daemon.json"
    text = view.read(path)
    config = _parsed(text, path)
    restart = places.systemctl("reload", "docker")
    edits = hosts_toml.edits(view, f"{places.config('docker')}/certs.d", wanted)
    if "docker.io" in wanted.registries and wanted.mirror not in _mirrors(config, path):
        edits += (Edit(path, _with_mirror(text, config, wanted.mirror, path), restart),)
    store = _containerd_store(config)
    notes = (
        ()
        if store or "docker.io" in wanted.registries
        else ("docker: the classic image store knows mirrors of docker.io only",)
    )
    return Plan(edits, notes, "" if store or not wanted.enforce else _UNENFORCED)


def route(view: View, places: Places, registry: str) -> Route:
    path = f"{places.config('docker')}/daemon.json"
    config = _parsed(view.read(path), path)
    if _containerd_store(config):
        found = hosts_toml.route(view, f"{places.config('docker')}/certs.d", registry)
        if len(found.hosts) > 1 or registry != "docker.io":
            return found
    mirrors = _mirrors(config, path) if registry == "docker.io" else []
    return Route((*mirrors, hosts_toml.origin_url(registry)), where=path, possible=registry == "docker.io")


def _parsed(text: str | None, path: str) -> dict[str, Any]:
    return json_text.parse_object(text, path) if text is not None and text.strip() else {}


def _mirrors(config: dict[str, Any], path: str) -> list[str]:
    return [str(url).rstrip("/") for url in child(config, _KEY, list, path)]


def _containerd_store(config: dict[str, Any]) -> bool:
    features = config.get("features")
    return isinstance(features, dict) and features.get("containerd-snapshotter") is True


def _with_mirror(text: str | None, config: dict[str, Any], mirror: str, path: str) -> str:
    if text is None or not text.strip():
        return f'{{\n  "{_KEY}": ["{mirror}"]\n}}\n'
    edited = json_text.prepend_item(text, _KEY, mirror)
    if json_text.parse_object(edited, path) != {**config, _KEY: [mirror, *config.get(_KEY, [])]}:
        raise P2PDistError(
            f"{path} is written in a form that cannot be edited safely: edit it by hand (docs/runtimes.md)"
        )
    return edited
