# SPDX-License-Identifier: Apache-2.0
"""The fuzzers' corpus, replayed: every target stands every input that was ever worth keeping."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_stands_its_corpus_mangled(name: str) -> None:
    inputs = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    part = st.binary(max_size=20) | st.sampled_from(inputs)

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(inputs), st.floats(0, 1), st.floats(0, 1), part)
    def stands(data: bytes, start: float, stop: float, put: bytes) -> None:
        start, stop = sorted((start, stop))
        TARGETS[name](data[: int(start * len(data))] + put + data[int(stop * len(data)) :])

    stands()


def test_the_corpus_stays_small_and_has_no_strays() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < CORPUS_BYTES_MAX
