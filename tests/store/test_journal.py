# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from p2pdist.core.chunkmap import ChunkMap
from p2pdist.core.verify import checksum_of
from p2pdist.store.journal import Journal, recheck

if TYPE_CHECKING:
    from pathlib import Path

CUT = ChunkMap(2500, 1000)
SUM = checksum_of(b"a chunk")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "x.journal")


def noted(path: str, cut: ChunkMap = CUT) -> set[int] | None:
    journal = Journal.reopen(path, cut)
    if journal is None:
        return None
    chunks = set(journal.noted(cut))
    journal.close()
    return chunks


def test_notes_survive_and_can_be_taken_back(path: str) -> None:
    journal = Journal.create(path, CUT)
    size = os.stat(path).st_size
    journal.note(2, SUM)
    journal.note(0, SUM)
    assert noted(path) == {0, 2}
    journal.forget(0)
    assert journal.noted(CUT) == {2: SUM}
    journal.close()
    journal.close()
    assert noted(path) == {2}
    assert os.stat(path).st_size == size


@pytest.mark.parametrize("cut", [ChunkMap(2501, 1000), ChunkMap(2500, 999), ChunkMap(2500, 100), ChunkMap(0, 1000)])
def test_a_journal_of_another_cut_is_not_taken(path: str, cut: ChunkMap) -> None:
    Journal.create(path, CUT).close()
    assert noted(path, cut) is None


@pytest.mark.parametrize("at", [0, 7, 8, 16])
def test_a_journal_with_another_header_is_not_taken(path: str, at: int) -> None:
    Journal.create(path, CUT).close()
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"?")
    assert noted(path) is None


@pytest.mark.parametrize("size", [0, 10, 31, 32, 79])
def test_a_journal_that_was_cut_short_is_not_taken(path: str, size: int) -> None:
    Journal.create(path, CUT).close()
    os.truncate(path, size)
    assert noted(path) is None


def test_a_torn_note_is_dropped_by_the_recheck(tmp_path: Path, path: str) -> None:
    chunks = [b"a" * 1000, b"b" * 1000, b"c" * 500]
    (tmp_path / "data").write_bytes(b"".join(chunks))
    journal = Journal.create(path, CUT)
    for index, chunk in enumerate(chunks):
        journal.note(index, checksum_of(chunk))
    os.pwrite(journal._fd, bytes(9), 32 + 16 + 7)
    with open(tmp_path / "data", "rb") as data:
        assert set(journal.noted(CUT)) == {0, 1, 2}
        assert recheck(data.fileno(), CUT, journal.noted(CUT)) == {0: checksum_of(chunks[0]), 2: checksum_of(chunks[2])}
    journal.close()


def test_chunks_past_the_end_of_the_data_are_dropped_by_the_recheck(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"a" * 1999)
    noted = {0: checksum_of(b"a" * 1000), 1: checksum_of(b"a" * 1000), 2: checksum_of(b"")}
    with open(tmp_path / "data", "rb") as data:
        assert set(recheck(data.fileno(), CUT, noted)) == {0}
