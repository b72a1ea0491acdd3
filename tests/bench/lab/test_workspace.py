# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from bench.lab import ownership
from bench.lab.workspace import workspace


@pytest.fixture(autouse=True)
def _temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def left_over_name() -> str:
    prefix, start, suffix = ownership.new_name().rsplit("-", 2)
    return f"{prefix}-{int(start) - 1}-{suffix}"


def test_nothing_is_left_of_a_workspace_even_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="midway"), workspace(1) as space:
        (space.logs / "agent.log").write_text("x")
        raise RuntimeError("midway")
    assert not space.path.exists()


def test_what_needs_more_than_the_memory_goes_to_disk(tmp_path: Path) -> None:
    with workspace(1 << 60) as space:
        assert space.path.parent == tmp_path
        assert not space.on_tmpfs


def test_a_new_workspace_removes_those_of_dead_labs_and_nothing_else(tmp_path: Path) -> None:
    dead, alive, foreign = tmp_path / left_over_name(), tmp_path / ownership.new_name(), tmp_path / "foreign"
    for path in (dead, alive, foreign):
        (path / "data").mkdir(parents=True)
    with workspace(1):
        assert not dead.exists()
        assert alive.exists()
        assert foreign.exists()
