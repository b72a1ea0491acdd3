# SPDX-License-Identifier: Apache-2.0
"""The tests mirror the source tree, so that the test of a module is found by its name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCHEDULER_CORE = ("swarm.py", "handout.py", "leading.py", "tags.py")


def pure_modules() -> list[tuple[str, str]]:
    """Pairs (source, test) of every module that does no I/O, except those that only declare classes or nothing."""
    core = [path.name for path in sorted((ROOT / "p2pdist/core").glob("*.py")) if has_functions(path)]
    pairs = [(f"p2pdist/core/{name}", f"tests/core/test_{name}") for name in core]
    return pairs + [(f"scheduler/{name}", f"tests/scheduler/test_{name}") for name in SCHEDULER_CORE]


def has_functions(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(path.read_text())))


@pytest.mark.parametrize(("source", "test"), pure_modules(), ids=lambda path: path)
def test_each_pure_module_has_a_test_of_its_name(source: str, test: str) -> None:
    assert (ROOT / source).exists(), f"{source} is gone: update SCHEDULER_CORE here and pyproject.toml"
    assert (ROOT / test).exists(), f"{source} has no {test}"


def test_no_test_of_a_pure_module_outlives_it() -> None:
    expected = {ROOT / test for _, test in pure_modules()}
    found = {path for folder in ("core", "scheduler") for path in (ROOT / "tests" / folder).glob("test_*.py")}
    strays = {path for path in found - expected if not (ROOT / "scheduler" / path.name.removeprefix("test_")).exists()}
    assert not strays


def test_every_source_file_names_its_licence() -> None:
    folders = ("p2pdist", "scheduler", "bench", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    without = [
        str(path) for path in files if not path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
    ]
    assert not without
