# SPDX-License-Identifier: Apache-2.0
"""An origin with rights, and stores for nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from p2pdist.store.memory import MemoryStore
from tests.gate.rights import RightsOrigin

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def origin() -> RightsOrigin:
    return RightsOrigin()


@pytest.fixture
def stores() -> Iterator[list[MemoryStore]]:
    stores = [MemoryStore(max_bytes=1 << 30) for _ in range(3)]
    yield stores
    for store in stores:
        store.close()
