# SPDX-License-Identifier: Apache-2.0
"""nerdctl: the hosts.toml files of the directory that nerdctl.toml names, or else of containerd's own."""

from __future__ import annotations

from p2pdist.setup import hosts_toml, toml_text
from p2pdist.setup.plan import Places, Plan, Route, View, Wanted, child


def found(view: View, places: Places) -> bool:
    return view.is_directory(places.config("nerdctl")) or (not places.home and view.has_program("nerdctl"))


def plan(view: View, places: Places, wanted: Wanted) -> Plan:
    return Plan(hosts_toml.edits(view, _directory(view, places), wanted))


def route(view: View, places: Places, registry: str) -> Route:
    return hosts_toml.route(view, _directory(view, places), registry)


def _directory(view: View, places: Places) -> str:
    path = f"{places.config('nerdctl')}/nerdctl.toml"
    named = child(toml_text.parse(view.read(path) or "", path), "hosts_dir", list, path)
    return str(named[0]).rstrip("/") if named else f"{places.config('containerd')}/certs.d"
