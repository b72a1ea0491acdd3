# SPDX-License-Identifier: Apache-2.0
"""What the tests of the origin client share: a repository, its content, and a client of a scriptable registry."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING

from p2pdist.core.access import AccessRule
from p2pdist.core.rate import TokenBucket
from p2pdist.core.types import Repository
from p2pdist.net.credentials import Credentials
from p2pdist.net.origin import OriginClient, RegistrySettings
from p2pdist.net.origin_upstream import Deadlines
from tests.fake_registry import OCI_MANIFEST, FakeRegistry, digest_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

REPO = Repository("reg.lab", "team/app")
BLOB = bytes(range(256)) * 40
CANARY = "canary-7c1e"
QUICK = Deadlines(backoff_s=0.001, backoff_max_s=0.002)
PATIENT = Deadlines(connect_s=2000, header_s=2000, stall_s=2000, manifest_s=2000, fetch_s=2000)
"""For tests that let the clock run or jump."""
MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": []}).encode()


class Vault:
    """Credentials by registry; counts and answers anew what `fresh` holds."""

    def __init__(self, known: Mapping[str, Credentials], fresh: Credentials | None = None) -> None:
        self.known = dict(known)
        self.fresh = fresh
        self.asked: list[tuple[str, bool]] = []

    async def get(self, repository: Repository, *, file: Path | None, fresh: bool = False) -> Credentials | None:
        self.asked.append((repository.registry, fresh))
        return self.fresh if fresh and self.fresh else self.known.get(repository.registry)


@asynccontextmanager
async def client_of(
    registry: FakeRegistry,
    *,
    deadlines: Deadlines = QUICK,
    credentials: Vault | None = None,
    ca_file: Path | None = None,
    allow_any: bool = False,
    connections: int = 8,
    limit: TokenBucket | None = None,
    rule_of: Callable[[Repository], AccessRule] | None = None,
) -> AsyncIterator[OriginClient]:
    client = OriginClient(
        {REPO.registry: RegistrySettings(registry.url, ca_file)},
        allow_any=allow_any,
        credentials=credentials,
        connections=connections,
        rng=Random(1),
        deadlines=deadlines,
        limit=limit,
        rule_of=rule_of,
    )
    try:
        yield client
    finally:
        await client.aclose()


async def fetched(client: OriginClient, start: int, stop: int, blob: bytes = BLOB) -> bytes:
    into, told = bytearray(stop - start), [0]
    await client.fetch(REPO, digest_of(blob), start, memoryview(into), blob_bytes=len(blob), progress=told.append)
    assert told[-1] == len(into)
    assert told == sorted(set(told))
    return bytes(into)
