# SPDX-License-Identifier: Apache-2.0
"""BuildKit: mirrors per registry in buildkitd.toml; it always goes on to the registry itself, so it cannot be held."""

from __future__ import annotations

import copy
from typing import Any

from p2pdist.errors import P2PDistError
from p2pdist.setup import hosts_toml, toml_text
from p2pdist.setup.plan import OURS, Edit, Places, Plan, Route, View, Wanted

_UNENFORCED = "BuildKit always goes on to the registry itself: block the registries in the firewall"


def found(view: View, places: Places) -> bool:
    return view.is_directory(places.config("buildkit")) or (not places.home and view.has_program("buildkitd"))


def plan(view: View, places: Places, wanted: Wanted) -> Plan:
    path = f"{places.config('buildkit')}/buildkitd.toml"
    before = view.read(path)
    config = toml_text.parse(before or "", path)
    text, meant = before or OURS, copy.deepcopy(config)
    address = toml_text.quoted(wanted.address)
    try:
        registries = meant.setdefault("registry", {})
        for name in wanted.registries:
            mirrors = registries.setdefault(name, {}).setdefault("mirrors", [])
            if wanted.address not in mirrors:
                mirrors.insert(0, wanted.address)
                text = toml_text.prepend_item(text, ("registry", name), "mirrors", address)
        if wanted.in_the_clear and not registries.setdefault(wanted.address, {}).get("http"):
            registries[wanted.address]["http"] = True
            text = toml_text.set_value(text, ("registry", wanted.address), "http", "true")
    except (AttributeError, TypeError) as error:
        raise P2PDistError(
            f"{path}: registry is not a table: mend it first, or leave buildkit out by --runtime"
        ) from error
    edit = Edit(path, toml_text.expect(text, meant, path), places.systemctl("restart", "buildkit"))
    return Plan((edit,), unenforced=_UNENFORCED if wanted.enforce else "")


def route(view: View, places: Places, registry: str) -> Route:
    path = f"{places.config('buildkit')}/buildkitd.toml"
    registries: dict[str, Any] = toml_text.parse(view.read(path) or "", path).get("registry", {})
    mirrors = registries.get(registry, {}).get("mirrors", [])
    urls = [f"{'http' if registries.get(address, {}).get('http') else 'https'}://{address}" for address in mirrors]
    return Route((*urls, hosts_toml.origin_url(registry)), where=path)
