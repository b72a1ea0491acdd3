# SPDX-License-Identifier: Apache-2.0
"""BuildKit: mirrors per registry in buildkitd.toml; it always goes on to the registry itself, so it cannot be held."""

from __future__ import annotations

import copy

from p2pdist.setup import hosts_toml, toml_text
from p2pdist.setup.plan import OURS, Edit, Places, Plan, Route, View, Wanted, child

_UNENFORCED = "BuildKit always goes on to the registry itself: block the registries in the firewall"


def found(view: View, places: Places) -> bool:
    return view.is_directory(places.config("buildkit")) or (not places.home and view.has_program("buildkitd"))


def plan(view: View, places: Places, wanted: Wanted) -> Plan:
    path = f"{places.config('buildkit')}/buildkitd.toml"
    before = view.read(path)
    config = toml_text.parse(before or "", path)
    text, meant = before or OURS, copy.deepcopy(config)
    address = toml_text.quoted(wanted.address)
    registries = meant["registry"] = child(meant, "registry", dict, path)
    for name in wanted.registries:
        entry = registries[name] = child(registries, name, dict, path)
        mirrors = entry["mirrors"] = child(entry, "mirrors", list, path)
        if wanted.address not in mirrors:
            mirrors.insert(0, wanted.address)
            text = toml_text.prepend_item(text, ("registry", name), "mirrors", address)
    own = child(registries, wanted.address, dict, path)
    if wanted.in_the_clear and not own.get("http"):
        registries[wanted.address] = {**own, "http": True}
        text = toml_text.set_value(text, ("registry", wanted.address), "http", "true")
    edit = Edit(path, toml_text.expect(text, meant, path), places.systemctl("restart", "buildkit"))
    return Plan((edit,), unenforced=_UNENFORCED if wanted.enforce else "")


def route(view: View, places: Places, registry: str) -> Route:
    path = f"{places.config('buildkit')}/buildkitd.toml"
    registries = child(toml_text.parse(view.read(path) or "", path), "registry", dict, path)
    mirrors = [str(address) for address in child(child(registries, registry, dict, path), "mirrors", list, path)]
    clear = [address for address in mirrors if child(registries, address, dict, path).get("http")]
    urls = [f"{'http' if address in clear else 'https'}://{address}" for address in mirrors]
    return Route((*urls, hosts_toml.origin_url(registry)), where=path)
