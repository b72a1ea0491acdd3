# SPDX-License-Identifier: Apache-2.0
"""k3s: registries.yaml, from which k3s writes its containerd's configuration at each start.

Without a YAML parser only the form that k3s documents is edited: block style, `mirrors:` at the margin, each registry
with an `endpoint:` list below it. Every other form is refused with the lines to add by hand.
"""

from __future__ import annotations

import re

from p2pdist.errors import P2PDistError
from p2pdist.setup import hosts_toml
from p2pdist.setup.plan import OURS, Edit, Places, Plan, Route, View, Wanted

_TOP = re.compile(r"[A-Za-z_]+:(\s.*)?")
_NAME = re.compile(r"""(\s+)(?:"([^"]+)"|'([^']+)'|([\w.*:-]+)):\s*(?:#.*)?""")
_ENDPOINT = re.compile(r"\s+endpoint:\s*(?:#.*)?")
_ITEM = re.compile(r"""(\s*)-\s+["']?([^"'\s#]+)["']?\s*(?:#.*)?""")
_UNENFORCED = "k3s goes on to the registry itself unless it runs with --disable-default-registry-endpoint"


def found(view: View, places: Places) -> bool:
    return not places.home and (view.is_directory("/etc/rancher/k3s") or view.has_program("k3s"))


def plan(view: View, places: Places, wanted: Wanted) -> Plan:
    path = "/etc/rancher/k3s/registries.yaml"
    lines = (view.read(path) or OURS).splitlines()
    _expect_known(lines, path, wanted)
    rewritten = [name for name in wanted.registries if _is_rewritten(lines, name)]
    for name in reversed(wanted.registries):
        if name not in rewritten:
            lines = _with_mirror(lines, name, wanted.mirror, path)
    edit = Edit(path, "\n".join(lines) + "\n", places.systemctl("restart", "k3s"))
    notes = tuple(
        f"k3s: {name} has a rewrite, which would change the agent's requests too: left alone" for name in rewritten
    )
    return Plan((edit,), notes, _UNENFORCED if wanted.enforce else "")


def route(view: View, places: Places, registry: str) -> Route:
    path = "/etc/rancher/k3s/registries.yaml"
    lines = (view.read(path) or "").splitlines()
    names, _ = _names(lines)
    at = names.get(registry, names.get("*"))
    endpoints = [] if at is None else [match[2] for match in map(_ITEM.fullmatch, _below(lines, at)) if match]
    return Route((*(url.rstrip("/") for url in endpoints), hosts_toml.origin_url(registry)), where=path)


def _expect_known(lines: list[str], path: str, wanted: Wanted) -> None:
    """Raise P2PDistError unless every line is of the documented form."""
    for line in lines:
        code = line.strip()
        if code and code[0] != "#" and (code[0] in "{[&*!|>%" or "\t" in line or line.startswith(("---", "..."))):
            raise _refusal(path, wanted.mirror)
        if line[:1].strip() and line[0] != "#" and not _TOP.fullmatch(line):
            raise _refusal(path, wanted.mirror)
        if line.startswith("mirrors:") and line.partition(":")[2].partition("#")[0].strip():
            raise _refusal(path, wanted.mirror)
    names, start = _names(lines)
    below = [line for line in ([] if start is None else _below(lines, start)) if _is_code(line)]
    # Each line of the first one's depth has to be a registry, each registry once.
    if len(names) != sum(_margin(line) == _margin(below[0]) for line in below):
        raise _refusal(path, wanted.mirror)


def _is_rewritten(lines: list[str], name: str) -> bool:
    at = _names(lines)[0].get(name)
    return at is not None and any(line.strip().startswith("rewrite:") for line in _below(lines, at))


def _refusal(path: str, mirror: str) -> P2PDistError:
    return P2PDistError(
        f"{path} is written in a form that cannot be edited safely: add endpoint {mirror} to its mirrors by hand"
        f" (docs/runtimes.md), or leave k3s out by --runtime"
    )


def _with_mirror(lines: list[str], name: str, mirror: str, path: str) -> list[str]:
    names, start = _names(lines)
    if start is None:
        return _with_mirror([*lines, "mirrors:"], name, mirror, path)
    indent = next((_margin(line) for line in _below(lines, start) if _is_code(line)), 2)
    if name not in names:
        margin = " " * indent
        entry = [f'{margin}"{name}":', f"{margin}  endpoint:", f'{margin}    - "{mirror}"']
        return [*lines[: start + 1], *entry, *lines[start + 1 :]]
    below = _below(lines, names[name])
    items = [match for match in map(_ITEM.fullmatch, below) if match]
    if any(match[2].rstrip("/") == mirror for match in items):
        return lines
    at = next((number for number, line in enumerate(below) if _ENDPOINT.fullmatch(line)), None)
    if at is None or at + 1 >= len(below) or not (first := _ITEM.fullmatch(below[at + 1])):
        raise _refusal(path, mirror)
    place = names[name] + at + 2
    return [*lines[:place], f'{first[1]}- "{mirror}"', *lines[place:]]


def _names(lines: list[str]) -> tuple[dict[str, int], int | None]:
    """Return the line of each registry below `mirrors:`, and that line itself."""
    start = next((number for number, line in enumerate(lines) if line.startswith("mirrors:")), None)
    if start is None:
        return {}, None
    found: dict[str, int] = {}
    indent = ""
    for number, line in enumerate(_below(lines, start), start + 1):
        match = _NAME.fullmatch(line)
        if match and (not indent or match[1] == indent):
            indent = match[1]
            found[match[2] or match[3] or match[4]] = number
    return found, start


def _below(lines: list[str], at: int) -> list[str]:
    """Return the lines that belong to the key at this line."""
    below = []
    for line in lines[at + 1 :]:
        if _is_code(line) and _margin(line) <= _margin(lines[at]):
            break
        below.append(line)
    return below


def _margin(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_code(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")
