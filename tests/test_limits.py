# SPDX-License-Identifier: Apache-2.0
"""docs/limits.md says what the code does."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs/limits.md"
ROW = re.compile(r"\| (?P<what>[^|]+) \| (?P<limit>[^|]+) \| [^|]*\| (?:`(?P<where>[\w.]+)` )?\|")


def rows() -> list[tuple[str, str, str]]:
    """Return what, limit and where of each row that names a constant."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    found = [ROW.fullmatch(line) for line in lines if not line.startswith(("| what |", "| --- |"))]
    assert all(found)
    return [(row["what"], row["limit"], row["where"]) for row in found if row and row["where"]]


def value_at(where: str) -> float:
    """Return a constant, or the default of a dataclass's field."""
    owner, name = where.rsplit(".", 1)
    try:
        value: float = getattr(importlib.import_module(owner), name)
    except ModuleNotFoundError:
        module, class_name = owner.rsplit(".", 1)
        fields = dataclasses.fields(getattr(importlib.import_module(module), class_name))
        value = next(field.default for field in fields if field.name == name)
    return value


def in_words(where: str, value: float) -> str:
    name = where.rsplit(".", 1)[1].lower()
    if name.endswith("bytes_per_s"):
        return f"{value * 8 / 1e6:g} Mbit"
    if "bytes" in name:
        unit, size = next((unit, size) for unit, size in (("GiB", 30), ("MiB", 20), ("KiB", 10)) if value >= 1 << size)
        return f"{value / (1 << size):g} {unit}"
    if name.endswith("_s"):
        return f"{value / 3600:g} h" if value >= 3600 else f"{value:g} s"
    return f"{value:,}"


@pytest.mark.parametrize(("what", "limit", "where"), rows(), ids=lambda text: text)
def test_the_page_of_limits_says_what_the_code_does(what: str, limit: str, where: str) -> None:
    assert re.search(rf"(?<![\d,.]){re.escape(in_words(where, value_at(where)))}(?![\d,]|\.\d)", limit), what
