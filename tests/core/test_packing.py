# SPDX-License-Identifier: Apache-2.0
"""Packed indices and checksums: what goes in comes out, and what is cut short is the peer's fault."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.packing import pack_indices, unpack_checksums, unpack_indices
from p2pdist.errors import RemoteProtocolError


def test_indices_are_packed_little_endian() -> None:
    assert pack_indices([1, 256]) == b"\x01\x00\x00\x00\x00\x01\x00\x00"


@given(st.lists(st.integers(0, 65535), max_size=50))
def test_indices_round_trip(indices: list[int]) -> None:
    assert unpack_indices(pack_indices(indices), 65536) == indices


@pytest.mark.parametrize("data", [b"\x01", b"\x01\x00\x00", b"\x05\x00\x00\x00", b"\xff\xff\xff\xff"])
def test_indices_cut_short_or_past_the_end_are_the_peers_fault(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        unpack_indices(data, 5)


def test_checksums_come_sixteen_bytes_each() -> None:
    assert unpack_checksums(bytes(16) + b"\x01" * 16, 2) == [bytes(16), b"\x01" * 16]
    for wrong in (bytes(31), bytes(48), b""):
        with pytest.raises(RemoteProtocolError):
            unpack_checksums(wrong, 2)
