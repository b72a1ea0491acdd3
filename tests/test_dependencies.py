# SPDX-License-Identifier: Apache-2.0
"""What `pip install p2pdist` brings onto a node is known, freely licensed, used, and as it was published.

Known holes are looked up over the network by `make audit`; these checks need none.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OURS = ("p2pdist", "scheduler", "bench")
FREE = re.compile(r"MIT|BSD|Apache|MPL|Mozilla|LGPL|PSF|ISC", re.IGNORECASE)


def brought(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """Return the names of all that a distribution needs here, its own among them."""
    found, left = set(), [(name, extras)]
    done = set()
    while left:
        step = left.pop()
        if step in done:
            continue
        done.add(step)
        found.add(canonicalize_name(step[0]))
        for text in metadata.requires(step[0]) or []:
            wanted = Requirement(text)
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in step[1] or {""}):
                left.append((wanted.name, frozenset(wanted.extras)))
    return found


BROUGHT = sorted(brought("p2pdist") - {"p2pdist"})


def test_everything_that_is_brought_is_named_in_the_decision() -> None:
    """A library that another one begins to need is noticed, and looked at, before it reaches a node."""
    text = (ROOT / "docs/decisions/0001-dependencies.md").read_text()
    named = {canonicalize_name(word) for word in re.findall(r"[A-Za-z0-9_.-]*[A-Za-z0-9]", text)}
    assert not set(BROUGHT) - named


@pytest.mark.parametrize("name", ["p2pdist", *BROUGHT])
def test_a_library_has_the_versions_that_it_asks_for(name: str) -> None:
    wanted = [Requirement(text) for text in metadata.requires(name) or []]
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = {one.name: metadata.version(one.name) for one in needed}
    assert [f"{one} is {found[one.name]}" for one in needed if not one.specifier.contains(found[one.name], True)] == []


@pytest.mark.parametrize("name", BROUGHT)
def test_a_library_is_under_a_free_licence(name: str) -> None:
    about = metadata.metadata(name)
    said = [about.get("License-Expression"), about.get("License"), *(about.get_all("Classifier") or [])]
    assert FREE.search(" ".join(text for text in said if text and "Topic" not in text)[:2000]), said


@pytest.mark.parametrize("name", BROUGHT)
def test_a_library_is_what_its_wheel_was(name: str) -> None:
    for file in metadata.files(name) or []:
        if file.hash is None or not file.locate().is_file():
            continue
        digest = hashlib.new(file.hash.mode, Path(file.locate()).read_bytes()).digest()
        assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value, file


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    wanted = [Requirement(text) for text in metadata.requires("p2pdist") or []]
    declared = {canonicalize_name(one.name) for one in wanted}
    needed = {canonicalize_name(one.name) for one in wanted if one.marker is None}
    distributions = metadata.packages_distributions()
    imported = {
        canonicalize_name(distributions[module][0])
        for module in imports()
        if module not in sys.stdlib_module_names and module not in OURS
    }
    assert imported <= declared
    assert needed <= imported


def imports() -> set[str]:
    """Return the top-level names of all modules that our packages import."""
    found = set()
    for file in (file for package in OURS for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").split(".")[0])
    return found
