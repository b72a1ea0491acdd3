# SPDX-License-Identifier: Apache-2.0
"""What tests draw at random, and short ways to name what they use: digests, peers, messages."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, get_type_hints

from hypothesis import strategies as st

from p2pdist.core import fields as kinds
from p2pdist.core import wire
from p2pdist.core.chunkmap import MAX_BLOB_BYTES, MIN_CHUNK_BYTES
from p2pdist.core.types import Checksum, Digest, PeerId

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

CHUNK = MIN_CHUNK_BYTES


def digest(number: int) -> Digest:
    return Digest(f"sha256:{number:064x}")


def peer(number: int) -> PeerId:
    return PeerId(f"{number:032x}")


def checksum(number: int) -> Checksum:
    return Checksum(number.to_bytes(16, "big"))


digests: SearchStrategy[Digest] = st.integers(0, 2**256 - 1).map(digest)
peers: SearchStrategy[PeerId] = st.integers(0, 2**128 - 1).map(peer)
numbers = st.integers(0, 2**32 - 1)
sizes = st.integers(-1, MAX_BLOB_BYTES)
texts = st.text(max_size=512)
addresses = st.builds(wire.PeerAddress, peers, texts, st.integers(1, 65535), texts, texts)

_FIELDS: dict[object, SearchStrategy[object]] = {
    int: st.integers(-1, 2**53 - 1),
    kinds.Number: numbers,
    kinds.Size: sizes,
    kinds.Port: st.integers(0, 65535),
    str: texts,
    bool: st.booleans(),
    bytes: st.binary(max_size=200),
    Digest: digests,
    PeerId: peers,
    list[wire.PeerAddress]: st.lists(addresses, max_size=5),
    list[Digest]: st.lists(digests, max_size=5),
    list[PeerId]: st.lists(peers, max_size=wire.MAX_SCHEDULERS),
}


KINDS = sorted((layout[0] for layout in wire._TYPES.values()), key=lambda kind: kind.CODE)


def messages() -> SearchStrategy[wire.Message]:
    """Every kind of message, each field anywhere within its bounds."""
    return st.one_of([messages_of(kind) for kind in KINDS])


def messages_of(kind: type[wire.Message]) -> SearchStrategy[wire.Message]:
    hints = get_type_hints(kind, include_extras=True)
    return st.builds(kind, *[_FIELDS[hints[field.name]] for field in fields(kind)])  # type: ignore[arg-type]
