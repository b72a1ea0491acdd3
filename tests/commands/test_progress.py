# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a pull."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.commands.progress import choose_display, describe, human_bytes
from p2pdist.core.types import Split
from tests.commands.fake_mirror import CONFIG_TYPE, describe_bytes

LAYER = describe_bytes(b"x" * 2048)
CONFIG = describe_bytes(b"{}", CONFIG_TYPE)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (102_400, "100 KiB"),
        (1_048_576, "1.0 MiB"),
        (104_857_600, "100 MiB"),
        (1 << 30, "1.0 GiB"),
        (1 << 50, "1024 TiB"),
    ],
)
def test_sizes_are_short_and_binary(count: int, text: str) -> None:
    assert human_bytes(count) == text


@given(st.integers(0, 1 << 49))
def test_no_size_is_wider_than_its_column(count: int) -> None:
    assert len(human_bytes(count)) <= 8


def test_sources_are_named_where_bytes_came_from_them() -> None:
    assert describe(Split(from_peers=2048, from_cache=10)) == "2.0 KiB from peers, 10 B from this node's cache"
    assert describe(Split()) == ""


def test_without_a_terminal_there_is_a_line_per_blob() -> None:
    stream = io.StringIO()
    with choose_display(stream) as display:
        assert not display.live
        display.expect((CONFIG, LAYER))
        display.moved(LAYER, 1000)
        display.source(LAYER, Split(from_peers=1000))
        display.done(CONFIG, "")
        display.done(LAYER, "2.0 KiB from peers")
    assert stream.getvalue().splitlines() == [
        "2 blobs, 2.0 KiB",
        f"config {CONFIG.digest[7:19]}       2 B",
        f"layer  {LAYER.digest[7:19]}   2.0 KiB  2.0 KiB from peers",
    ]


def test_on_a_terminal_there_is_a_row_per_blob() -> None:
    stream = Terminal()
    with choose_display(stream) as display:
        assert display.live
        display.expect((CONFIG, LAYER))
        display.moved(LAYER, 1000)
        display.source(LAYER, Split(from_peers=1000))
        display.done(LAYER, "all from peers")
    for part in (LAYER.digest[7:19], CONFIG.digest[7:19], "2.0/2.0 KiB", "all from peers"):
        assert part in stream.getvalue()
