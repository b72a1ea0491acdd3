# SPDX-License-Identifier: Apache-2.0
"""A store that is killed at any instant keeps all that was committed, serves nothing wrong and leaks no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from bench.cli import bench
from bench.lab.workspace import workspace
from bench.store.expected import Expected, check
from bench.store.run import CALLS, HOW, kill_over_and_over, worker
from bench.store.worker import Blob, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.store.run import Crash
    from p2pdist.core.types import Digest

pytestmark = pytest.mark.real

STEPS = 20
KILLS = 60


@pytest.fixture
def crash() -> Iterator[Callable[..., Crash]]:
    with worker() as ask:
        yield ask


@pytest.fixture
def place() -> Iterator[Path]:
    """In memory where that can be: a kill is the same on every file system, and a sync takes no time."""
    with workspace(64 << 20) as space:
        yield space.path


@pytest.mark.parametrize("call", sorted(CALLS.keys() - {"pwrite"}))
def test_a_kill_at_any_call_that_changes_names_or_syncs_is_survived(
    place: Path, crash: Callable[..., Crash], call: str
) -> None:
    verbs, number, killed = set(), 0, True
    while killed:
        number += 1
        directory, expected = place / str(number), Expected()
        told = crash(
            directory=str(directory), seed=5, steps=STEPS, kill_at_call=number, of=call, how=HOW[number % len(HOW)]
        )
        expected.hear(told["reports"])
        assert check(directory, expected) == []
        verbs |= {verb for what, verb, _ in told["reports"] if what == "done"}
        killed = told["killed"]
    assert verbs == {"put", "add", "leave", "remove"}, "the work does not do all that it should"
    assert number > 3, "it hardly calls this"


def test_kills_at_random_points_one_after_the_other_and_of_the_restart_are_survived(
    place: Path, crash: Callable[..., Crash]
) -> None:
    record = kill_over_and_over(place, KILLS, 2, crash)
    assert record.faults == []
    assert record.kills == KILLS
    assert {stage for stage, _ in record.stages} >= {"write", "commit", "evict", "restart"}
    assert record.committed > KILLS
    assert record.evicted


def committed(directory: Path) -> tuple[Expected, list[Digest]]:
    """Leave three blobs in a directory; return them, and what is expected of it."""
    reports: list[tuple[str, str, str]] = []
    work = Work(directory, 3, lambda *what: reports.append(what))
    work.do(8)
    expected = Expected()
    expected.hear(reports)
    assert len(expected.order) > 1
    return expected, list(expected.order)


def paths(directory: Path, digest: Digest) -> tuple[Path, Path]:
    blob = directory / "blobs/sha256" / digest[7:9] / digest[7:]
    return blob, blob.with_suffix(".meta")


def test_a_blob_that_is_lost_is_told(tmp_path: Path) -> None:
    expected, digests = committed(tmp_path)
    for path in paths(tmp_path, digests[0]):
        path.unlink()
    assert any(f"{digests[0]} was committed and is lost" in fault for fault in check(tmp_path, expected))


def test_a_blob_that_was_removed_and_is_back_is_told(tmp_path: Path) -> None:
    expected, digests = committed(tmp_path)
    expected.hear([("begin", "remove", digests[0]), ("done", "remove", digests[0])])
    assert check(tmp_path, expected) == [f"{digests[0]} is here and should not be"]


def test_a_wrong_byte_is_told(tmp_path: Path) -> None:
    expected, digests = committed(tmp_path)
    blob = paths(tmp_path, digests[0])[0]
    blob.write_bytes(b"?" + blob.read_bytes()[1:])
    assert check(tmp_path, expected) == [f"{digests[0]} has other bytes"]


def test_a_file_that_nobody_knows_is_told(tmp_path: Path) -> None:
    expected, _ = committed(tmp_path)
    (tmp_path / "partial" / "stray").write_bytes(b"")
    (fault,) = check(tmp_path, expected)
    assert "stray" in fault


def test_the_verb_counts_kills_by_what_was_going_on(tmp_path: Path) -> None:
    file, place = tmp_path / "kills.json", tmp_path / "store"
    done = CliRunner().invoke(
        bench, ["store", "--kills", "10", "--seed", "4", "--directory", str(place), "--json", str(file)]
    )
    assert done.exit_code == 0, done.output
    assert "10 kills, seed 4: no committed blob lost" in done.output
    assert sum(json.loads(file.read_text())["at"].values()) == 10
    again = CliRunner().invoke(bench, ["store", "--directory", str(place)])
    assert "is not empty" in str(again.exception)


def test_the_work_has_the_same_blobs_each_time() -> None:
    assert Blob.numbered(3) == Blob.numbered(3) != Blob.numbered(4)
