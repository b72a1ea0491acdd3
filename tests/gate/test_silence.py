# SPDX-License-Identifier: Apache-2.0
"""What the gate lets through while the origin is silent: what it gave before, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.core.access import Policy
from p2pdist.core.types import Repository
from p2pdist.errors import DeniedByOrigin, OriginError, P2PDistError
from p2pdist.gate import SILENT_S
from p2pdist.store.memory import MemoryStore
from tests.fake_registry import digest_of
from tests.gate.rights import (
    ALICE,
    ANYBODY,
    LAYER,
    NODE,
    OF_NODE,
    OPEN,
    PASSTHROUGH,
    PUBLIC_TTL_S,
    TEAM,
    RightsOrigin,
    expect_refusals,
    node_of,
    pull,
    rules,
)
from tests.nodes import eventually, running

if TYPE_CHECKING:
    from trio.testing import MockClock


@pytest.mark.parametrize("how", ["down", "hangs"])
@pytest.mark.parametrize(
    ("policy", "repository", "served"),
    [
        pytest.param(Policy(), OPEN, True, id="public"),
        pytest.param(OF_NODE, TEAM, True, id="node-credentials"),
        pytest.param(PASSTHROUGH, TEAM, False, id="passthrough"),
        pytest.param(rules("reg.test/team/*=public"), TEAM, False, id="private before the rules changed"),
    ],
)
async def test_while_the_origin_is_silent_only_what_it_gave_this_node_before_is_served(
    origin: RightsOrigin,
    stores: list[MemoryStore],
    policy: Policy,
    repository: Repository,
    served: bool,
    how: str,
    quick_clock: MockClock,
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    origin.add(TEAM, "v1", LAYER, NODE, ALICE.authorization)
    first = node_of(origin, stores[0], OF_NODE)
    async with running(first):
        await pull(first, repository, digest, ALICE)
    origin.error = OriginError("down") if how == "down" else None
    origin.gate = trio.Event() if how == "hangs" else None
    again = node_of(origin, stores[0], policy, number=2)
    async with running(again):
        for _ in range(2):
            with trio.move_on_after(20) as runtime:
                if served:
                    assert await pull(again, repository, digest, ALICE) == LAYER
                else:
                    with pytest.raises(P2PDistError):
                        await pull(again, repository, digest, ALICE)
            assert runtime.cancelled_caught is (how == "hangs" and policy is PASSTHROUGH)
            await trio.sleep(SILENT_S)


@pytest.mark.parametrize("policy", [PASSTHROUGH, OF_NODE], ids=["passthrough", "node-credentials"])
async def test_silence_opens_nothing_that_comes_later(
    origin: RightsOrigin, stores: list[MemoryStore], policy: Policy, quick_clock: MockClock
) -> None:
    private = origin.add(TEAM, "v1", LAYER, NODE, ALICE.authorization)
    node = node_of(origin, stores[0], policy)
    async with running(node):
        origin.error = OriginError("HTTP 429", status_code=429)
        await expect_refusals(node, OPEN, private, digest_of(LAYER))
        origin.error = None
        await eventually(lambda: not node.puller.arrivals)
        assert await pull(node, TEAM, private, ALICE) == LAYER
        origin.error = OriginError("HTTP 429", status_code=429)
        await expect_refusals(node, OPEN, private, digest_of(LAYER))


async def test_silence_does_not_open_what_another_repository_has_been_refused(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    other = Repository("reg.test", "other")
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    node = node_of(origin, stores[0], Policy())
    async with running(node):
        await pull(node, OPEN, digest)
        origin.readers[OPEN] = set()
        with pytest.raises(DeniedByOrigin):
            await node.images.resolve(OPEN, "v1")
        origin.error = OriginError("HTTP 429", status_code=429)
        await expect_refusals(node, other, digest, digest_of(LAYER))


async def test_a_refusal_ends_what_silence_let_stand(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    node = node_of(origin, stores[0], Policy())
    async with running(node):
        await pull(node, OPEN, digest)
        await trio.sleep(PUBLIC_TTL_S)
        origin.error = OriginError("down")
        assert await node.gate.prove(OPEN, digest, manifest=True)
        assert node.gate.may_give(OPEN)
        origin.error, origin.readers[OPEN] = None, set()
        with pytest.raises(DeniedByOrigin):
            await node.images.manifest(OPEN, digest)
        assert node.gate.may_give(OPEN) is False
