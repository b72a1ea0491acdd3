# SPDX-License-Identifier: Apache-2.0
"""What the gate lets peers have: nothing private, unless its rule says so, and nothing that was not proved lately."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.core.access import AccessRule, Policy
from p2pdist.core.types import Digest, Repository
from p2pdist.errors import P2PDistError
from p2pdist.store.memory import MemoryStore
from tests.fake_registry import digest_of
from tests.gate.rights import (
    ALICE,
    ANYBODY,
    LAYER,
    MALLORY,
    NODE,
    OPEN,
    PUBLIC_TTL_S,
    TEAM,
    RightsOrigin,
    node_of,
    pull,
    rules,
)
from tests.nodes import Node, connect_all, running

if TYPE_CHECKING:
    from trio.testing import MockClock


async def try_to_take(node: Node, repository: Repository, manifest: Digest) -> bool:
    """Return whether a node gets an image that the origin does not give it, from whatever its peers let it have."""
    with trio.move_on_after(30):
        try:
            await pull(node, repository, manifest)
        except P2PDistError:
            return False
        return True
    return False


@pytest.mark.parametrize(
    ("rule", "given"),
    [
        pytest.param(AccessRule("*", "team/*", "node-credentials"), False, id="node-credentials"),
        pytest.param(AccessRule("*", "team/*", "passthrough"), False, id="passthrough"),
        pytest.param(AccessRule("*", "team/*", "node-credentials", share=True), True, id="shared by its rule"),
    ],
)
async def test_peers_are_given_private_content_only_where_the_rule_says_so(
    origin: RightsOrigin, stores: list[MemoryStore], rule: AccessRule, given: bool, quick_clock: MockClock
) -> None:
    digest = origin.add(TEAM, "v1", LAYER, NODE, ALICE.authorization)
    holder = node_of(origin, stores[0], Policy((rule,)))
    tenant = node_of(origin, stores[1], Policy(), number=2)
    async with running(holder, tenant):
        await connect_all([holder, tenant])
        await pull(holder, TEAM, digest, ALICE)
        # The tenant's own registry serves a name under which it asks for the very digests.
        mine = Repository("reg.test", "mine")
        origin.readers[mine], origin.content[mine] = {ANYBODY}, set(origin.content[TEAM])
        origin.mute = True
        assert await try_to_take(tenant, mine, digest) is given
        assert (holder.machine.counters.to_peers > 0) is given


async def test_peers_are_not_given_what_has_turned_private(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    holder, second, third = (node_of(origin, store, Policy(), number + 1) for number, store in enumerate(stores))
    async with running(holder, second, third):
        await pull(holder, OPEN, digest)
        await connect_all([holder, second, third])
        assert await pull(second, OPEN, digest) == LAYER
        assert holder.machine.counters.to_peers >= len(LAYER)
        given = [node.machine.counters.to_peers for node in (holder, second)]
        origin.readers[OPEN] = {MALLORY.authorization}
        await trio.sleep(PUBLIC_TTL_S)
        third.gate.set_policy(rules("*=passthrough"))
        third.gate.may_share = lambda _repository: True  # type: ignore[method-assign]
        origin.mute = True
        with trio.move_on_after(30), suppress(P2PDistError):
            await pull(third, OPEN, digest, MALLORY)
        assert [node.machine.counters.to_peers for node in (holder, second)] == given


async def test_peers_wait_for_a_new_proof_and_then_get_what_is_still_public(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    holder, second = (node_of(origin, store, Policy(), number + 1) for number, store in enumerate(stores[:2]))
    async with running(holder, second):
        await pull(holder, OPEN, digest)
        await connect_all([holder, second])
        await trio.sleep(PUBLIC_TTL_S)
        origin.requests.clear()
        assert await pull(second, OPEN, digest) == LAYER
        assert not any(method == "fetch" and what == digest_of(LAYER) for method, _, what in origin.requests)


async def test_a_restarted_node_gives_what_it_has_after_one_proof(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    first = node_of(origin, stores[0], Policy())
    async with running(first):
        await pull(first, OPEN, digest)
    again, second = (node_of(origin, store, Policy(), number + 5) for number, store in enumerate(stores[:2]))
    async with running(again, second):
        await connect_all([again, second])
        origin.requests.clear()
        assert await pull(second, OPEN, digest) == LAYER
        assert [method for method, _, _ in origin.requests if method in ("get", "fetch")] == []
        assert len(origin.requests) <= 3
