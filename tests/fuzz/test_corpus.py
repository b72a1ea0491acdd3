# SPDX-License-Identifier: Apache-2.0
"""The fuzzers' corpus, replayed: every target stands every input that was ever worth keeping."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
CORPUS_BYTES_MAX = 256 * 1024


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_stands_its_corpus(name: str) -> None:
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for path in inputs:
        data = path.read_bytes()
        TARGETS[name](data)
        for length in (0, 1, len(data) // 2, len(data) - 1):
            TARGETS[name](data[:length])


def test_the_corpus_stays_small_and_has_no_strays() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < CORPUS_BYTES_MAX
