# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.types import Checksum
from p2pdist.core.verify import checksum_of
from p2pdist.store.sidecar import Sidecar, decode, encode

sidecars = st.builds(
    Sidecar,
    size_bytes=st.integers(0, 1 << 40),
    media_type=st.text(max_size=100),
    public=st.booleans(),
    chunk_bytes=st.integers(1, 1 << 22),
    checksums=st.lists(st.binary(min_size=16, max_size=16).map(Checksum), max_size=5).map(tuple),
)


@given(sidecars)
def test_what_is_encoded_is_decoded(sidecar: Sidecar) -> None:
    assert decode(encode(sidecar)) == sidecar


@given(sidecars, st.data())
def test_damage_is_noticed(sidecar: Sidecar, data: st.DataObject) -> None:
    encoded = bytearray(encode(sidecar))
    at = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(ValueError, match="damaged"):
        decode(bytes(encoded[:at]))
    encoded[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError, match="damaged"):
        decode(bytes(encoded))


def test_another_version_is_not_guessed_at() -> None:
    packed = msgpack.packb({"version": 99, "colour": "blue"})
    with pytest.raises(ValueError, match="of another version"):
        decode(packed + checksum_of(packed))
