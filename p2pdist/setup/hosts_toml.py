# SPDX-License-Identifier: Apache-2.0
"""Directories of `hosts.toml` files, which containerd, nerdctl and Docker's containerd store read on each pull.

One directory per registry, `_default` for those that have none. Facts that decide what is written: hosts are asked in
the order of their tables and `server` last; a file with `server` alone is not decoded by containerd 1.6; a directory
without `hosts.toml` may hold `*.crt`, `*.cert` and `*.key`, which a `hosts.toml` beside them hides, so it names them;
without `server` the registry itself comes last, so it is not written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from p2pdist.setup import toml_text
from p2pdist.setup.plan import OURS, Edit, Route, child

if TYPE_CHECKING:
    from p2pdist.setup.plan import View, Wanted

DEFAULT = "_default"
DOCKER_HUB = "https://registry-1.docker.io"


def edits(view: View, directory: str, wanted: Wanted) -> tuple[Edit, ...]:
    """Return every hosts.toml below `directory` that has to be made or changed."""
    existing = [name for name in view.names(directory) if view.is_directory(f"{directory}/{name}")]
    named = [_directory_of(registry, existing) for registry in wanted.registries]
    chosen = dict.fromkeys([*existing, DEFAULT] if wanted.all_registries else named)
    return tuple(_edit(view, f"{directory}/{name}", wanted) for name in chosen)


def route(view: View, directory: str, registry: str) -> Route:
    """Return where a pull from a registry goes."""
    for name in (_underscored(registry), registry, DEFAULT):
        if view.is_directory(f"{directory}/{name}"):
            path = f"{directory}/{name}/hosts.toml"
            document = toml_text.parse(view.read(path) or "", path)
            hosts = [url for url, entry in _hosts(document, path).items() if _pulls(entry, path)]
            server = str(document.get("server") or origin_url(registry))
            return Route(tuple(map(_base, [*hosts, server])), where=path)
    return Route((origin_url(registry),), where=f"no directory for it, nor {DEFAULT}, in {directory}")


def origin_url(registry: str) -> str:
    """Return where a runtime that was told nothing asks for a registry's images."""
    return DOCKER_HUB if registry == "docker.io" else f"https://{registry}"


def _edit(view: View, directory: str, wanted: Wanted) -> Edit:
    path = f"{directory}/hosts.toml"
    text = view.read(path)
    document = toml_text.parse(text or "", path)
    if wanted.enforce:
        return Edit(path, OURS + f"server = {toml_text.quoted(wanted.mirror)}\n\n{_host(wanted, 'pull', 'resolve')}")
    hosts = _hosts(document, path)
    if hosts and _base(next(iter(hosts))) == wanted.mirror and _pulls(next(iter(hosts.values())), path):
        # It is there already, by somebody's hand.
        return Edit(path, text or "")
    if text is None or not text.strip():
        return Edit(path, f"{text or ''}{OURS}{_trust(view, directory)}\n{_host(wanted, 'pull')}")
    meant = {**document, "host": {wanted.mirror: {"capabilities": ["pull"]}, **hosts}}
    return Edit(path, toml_text.expect(toml_text.insert_before(text, "host", _host(wanted, "pull")), meant, path))


def _hosts(document: dict[str, Any], path: str) -> dict[str, dict[str, Any]]:
    hosts = child(document, "host", dict, path)
    return {url: child(hosts, url, dict, path) for url in hosts}


def _pulls(entry: dict[str, Any], path: str) -> bool:
    """Whether content is asked of a host; without a list it is good for everything."""
    return "pull" in (child(entry, "capabilities", list, path) or ["pull"])


def _host(wanted: Wanted, *capabilities: str) -> str:
    listed = ", ".join(map(toml_text.quoted, capabilities))
    return f"[host.{toml_text.quoted(wanted.mirror)}]\n  capabilities = [{listed}]\n"


def _trust(view: View, directory: str) -> str:
    """Return the lines of a new file that keep what containerd reads from a directory without one."""
    files = view.names(directory)
    cas = [toml_text.quoted(file) for file in files if file.endswith(".crt")]
    clients = [_client(file, files) for file in files if file.endswith(".cert")]
    lines = f"ca = [{', '.join(cas)}]\n" if cas else ""
    return lines + (f"client = [{', '.join(clients)}]\n" if clients else "")


def _client(file: str, files: list[str]) -> str:
    key = f"{file.removesuffix('.cert')}.key"
    pair = f"[{toml_text.quoted(file)}, {toml_text.quoted(key)}]"
    return pair if key in files else toml_text.quoted(file)


def _base(url: str) -> str:
    return (url if "://" in url else f"https://{url}").rstrip("/")


def _directory_of(registry: str, existing: list[str]) -> str:
    """Return the name of a registry's directory; of the two spellings of a port the one that is there."""
    return _underscored(registry) if _underscored(registry) in existing else registry


def _underscored(registry: str) -> str:
    host, colon, port = registry.rpartition(":")
    return f"{host}_{port}_" if colon and port.isdigit() else registry
