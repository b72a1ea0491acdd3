# SPDX-License-Identifier: Apache-2.0
"""What the gate lets through: nothing by digest alone, to runtimes, cold and warm, whoever asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.core.access import NOBODY, Policy, TagRule
from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.core.types import Repository
from p2pdist.core.wire import Resolve, Resolved
from p2pdist.errors import DeniedByOrigin, NotFoundAtOrigin
from p2pdist.gate import CALLER_TTL_S
from p2pdist.store.memory import MemoryStore
from tests.fake_registry import OCI_MANIFEST, digest_of
from tests.gate.rights import (
    ALICE,
    ANYBODY,
    BOB,
    LAYER,
    MALLORY,
    NODE,
    OF_NODE,
    OPEN,
    PASSTHROUGH,
    PUBLIC_TTL_S,
    TEAM,
    RightsOrigin,
    blob,
    expect_nothing,
    expect_refusals,
    node_of,
    pull,
    rules,
)
from tests.nodes import Node, eventually, running, running_scheduler

if TYPE_CHECKING:
    from trio.testing import MockClock


# ----------------------------------------------------------------------- public


async def test_public_content_is_proved_once_and_then_served_without_asking(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    node = node_of(origin, stores[0], Policy())
    async with running(node):
        assert await pull(node, OPEN, digest) == LAYER
        asked = len(origin.requests)
        for _ in range(3):
            assert await pull(node, OPEN, digest) == LAYER
        assert len(origin.requests) == asked
        assert [request[0] for request in origin.requests].count("head") == 1


async def test_a_repository_that_turns_private_is_refused_once_the_proof_is_old(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    node = node_of(origin, stores[0], Policy())
    async with running(node):
        await pull(node, OPEN, digest)
        origin.readers[OPEN] = set()
        assert await pull(node, OPEN, digest) == LAYER
        await trio.sleep(PUBLIC_TTL_S)
        await expect_nothing(node, OPEN, digest, digest_of(LAYER))


async def test_a_refused_tag_ends_at_once_what_was_proved_before(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    node = node_of(origin, stores[0], Policy())
    async with running(node):
        await pull(node, OPEN, digest)
        origin.readers[OPEN] = set()
        with pytest.raises(DeniedByOrigin):
            await node.images.resolve(OPEN, "v1")
        await expect_nothing(node, OPEN, digest, digest_of(LAYER))


async def test_content_is_of_the_repository_that_it_was_asked_for_in(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    other = Repository("reg.test", "other")
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    origin.add(other, "v2", b"something else", ANYBODY)
    node = node_of(origin, stores[0], Policy())
    async with running(node):
        await pull(node, OPEN, digest)
        await expect_nothing(node, other, digest, digest_of(LAYER), secret=False)


async def test_a_blob_without_its_manifest_is_served_where_the_origin_has_it(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    """A runtime that resumes after the agent was started anew."""
    origin.add(OPEN, "v1", LAYER, ANYBODY)
    node = node_of(origin, stores[0], Policy())
    async with running(node):
        for _ in range(2):
            assert await blob(node, OPEN, digest_of(LAYER)) == LAYER
            assert await node.images.blob_size(OPEN, digest_of(LAYER)) == len(LAYER)
        assert [request[0] for request in origin.requests].count("size") == 1


async def test_many_questions_at_once_are_one_check(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    node = node_of(origin, stores[0], Policy())
    async with running(node), trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(pull, node, OPEN, digest)
    assert [request[0] for request in origin.requests].count("head") == 1


async def test_a_refusal_too_is_shared_by_all_who_ask_at_once(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, MALLORY.authorization)
    node = node_of(origin, stores[0], Policy())
    refused: list[DeniedByOrigin] = []

    async def ask() -> None:
        try:
            await node.images.manifest(OPEN, digest)
        except DeniedByOrigin as error:
            refused.append(error)

    async with running(node):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask)
        assert len(refused) == 20
    assert len(origin.requests) == 1


async def test_one_who_hangs_up_during_a_check_leaves_the_others_their_answer(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    node = node_of(origin, stores[0], Policy())
    origin.gate = trio.Event()
    async with running(node), trio.open_nursery() as nursery:
        nursery.start_soon(pull, node, OPEN, digest)
        with trio.move_on_after(0.5):
            await pull(node, OPEN, digest)
        origin.gate.set()
        assert await pull(node, OPEN, digest) == LAYER


async def test_with_a_scheduler_two_nodes_prove_for_all(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    async with running_scheduler() as (_, address, _scope):
        nodes = [Node(number + 1, origin, store, scheduler=address) for number, store in enumerate(stores)]
        async with running(*nodes):
            await eventually(lambda: all(node.machine.state.scheduled for node in nodes))
            for node in nodes:
                assert await pull(node, OPEN, digest) == LAYER
    assert [request[0] for request in origin.requests].count("head") == 2


# ----------------------------------------------------------- content of another


@pytest.mark.parametrize("policy", [PASSTHROUGH, OF_NODE], ids=["passthrough", "node-credentials"])
async def test_a_public_manifest_that_names_private_content_does_not_open_it(
    origin: RightsOrigin, stores: list[MemoryStore], policy: Policy, quick_clock: MockClock
) -> None:
    """Whoever may push to a public repository writes down a digest that he knows; the registry did not check."""
    private = origin.add(TEAM, "v1", LAYER, NODE, ALICE.authorization)
    bait = origin.add(OPEN, "bait", LAYER, ANYBODY)
    origin.content[OPEN] -= {digest_of(LAYER)}
    node = node_of(origin, stores[0], policy)
    async with running(node):
        assert await pull(node, TEAM, private, ALICE) == LAYER
        assert (await node.images.manifest(OPEN, bait)).digest == bait
        with pytest.raises(NotFoundAtOrigin):
            await node.images.open_blob(OPEN, digest_of(LAYER))
        with pytest.raises(NotFoundAtOrigin):
            await node.images.blob_size(OPEN, digest_of(LAYER))
        origin.content[OPEN] |= {digest_of(LAYER)}
        assert await blob(node, OPEN, digest_of(LAYER)) == LAYER


async def test_another_agents_word_does_not_open_what_this_node_alone_may_read(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    private = origin.add(TEAM, "v1", LAYER, NODE)
    origin.add(OPEN, "v1", b"other", ANYBODY)
    node = node_of(origin, stores[0], OF_NODE)
    sent: list[object] = []

    class Liar:
        """A scheduler that says yes to everything."""

        def send(self, message: object) -> None:
            sent.append(message)

    async with running(node):
        await pull(node, TEAM, private)
        node.resolver.tracker = Liar()
        node.resolver.scheduler_changed(True)
        with pytest.raises(NotFoundAtOrigin):
            await node.images.manifest(OPEN, private)
        assert not any(isinstance(message, Resolve) for message in sent)


@pytest.mark.parametrize("early", [True, False], ids=["before it is here", "after"])
async def test_another_agents_word_about_a_tag_does_not_either(
    origin: RightsOrigin, stores: list[MemoryStore], early: bool, quick_clock: MockClock
) -> None:
    private = origin.add(TEAM, "v1", LAYER, NODE)
    origin.add(OPEN, "v1", b"other", ANYBODY)
    node = node_of(origin, stores[0], OF_NODE)

    class Liar:
        """A scheduler that knows what every tag stands for."""

        def send(self, message: object) -> None:
            if isinstance(message, Resolve):
                node.resolver.resolved(Resolved(message.number, private, OCI_MANIFEST, 500))

    async with running(node):
        node.resolver.tracker = Liar()
        node.resolver.scheduler_changed(True)
        if early:
            with pytest.raises(NotFoundAtOrigin):
                await node.images.manifest(OPEN, "v1")
        await eventually(lambda: not node.puller.arrivals)
        await pull(node, TEAM, private)
        for reference in ("v1", private):
            with pytest.raises(NotFoundAtOrigin):
                await node.images.manifest(OPEN, reference)


@pytest.mark.parametrize("policy", [PASSTHROUGH, OF_NODE], ids=["passthrough", "node-credentials"])
async def test_what_arrives_during_a_check_is_not_opened_by_it(
    origin: RightsOrigin, stores: list[MemoryStore], policy: Policy, quick_clock: MockClock
) -> None:
    """A registry that takes its time over a bait while a tenant pulls what the bait names."""
    private = origin.add(TEAM, "v1", LAYER, NODE, ALICE.authorization)
    bait = origin.add(OPEN, "bait", LAYER, ANYBODY)
    origin.content[OPEN] -= {digest_of(LAYER), digest_of(b"{}")}
    node = node_of(origin, stores[0], policy)
    node.prefetch = False
    refused: list[bool] = []

    async def take() -> None:
        try:
            await blob(node, OPEN, digest_of(LAYER))
        except NotFoundAtOrigin:
            refused.append(True)

    async with running(node):
        await node.images.manifest(OPEN, bait)
        await trio.sleep(PUBLIC_TTL_S)
        origin.held_up[OPEN] = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            await eventually(lambda: origin.requests[-1] == ("head", OPEN, bait))
            assert await pull(node, TEAM, private, ALICE) == LAYER
            origin.held_up[OPEN].set()
    assert refused == [True]


async def test_what_a_repository_gave_before_it_turned_private_is_opened_by_no_other(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    other = Repository("reg.test", "other")
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    bait = origin.add(other, "bait", LAYER, ANYBODY)
    origin.content[other] -= {digest_of(LAYER)}
    node = node_of(origin, stores[0], Policy())
    async with running(node):
        await pull(node, OPEN, digest)
        origin.readers[OPEN] = set()
        with pytest.raises(DeniedByOrigin):
            await node.images.resolve(OPEN, "v1")
        await node.images.manifest(other, bait)
        with pytest.raises(NotFoundAtOrigin):
            await node.images.open_blob(other, digest_of(LAYER))


@pytest.mark.parametrize("policy", [PASSTHROUGH, OF_NODE], ids=["passthrough", "node-credentials"])
async def test_a_registry_that_only_says_that_it_has_anothers_content_opens_nothing(
    origin: RightsOrigin, stores: list[MemoryStore], policy: Policy, quick_clock: MockClock
) -> None:
    private = origin.add(TEAM, "v1", LAYER, NODE, ALICE.authorization)
    liar = Repository("liar.example", "bait")
    origin.empty.add(liar)
    origin.readers[liar] = {ANYBODY}
    node = node_of(origin, stores[0], policy)
    async with running(node):
        await expect_refusals(node, liar, private, digest_of(LAYER))
        await pull(node, TEAM, private, ALICE)
        await expect_refusals(node, liar, private, digest_of(LAYER))
        assert await pull(node, TEAM, private, ALICE) == LAYER


async def test_a_registry_that_gives_what_was_anothers_makes_it_everybodys(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    """The layers of a public base image, which a private image brought first."""
    private = origin.add(TEAM, "v1", LAYER, NODE)
    base = Repository("public.example", "base")
    digest = origin.add(base, "v1", LAYER, ANYBODY)
    node = node_of(origin, stores[0], OF_NODE)
    async with running(node):
        await pull(node, TEAM, private)
        assert await pull(node, base, digest) == LAYER
        assert ("fetch", base, digest_of(LAYER)) in origin.requests
        origin.requests.clear()
        assert await pull(node, base, digest) == LAYER
        assert await pull(node, TEAM, private) == LAYER
        assert not any(method == "fetch" for method, *_ in origin.requests)


async def test_what_is_left_of_a_private_pull_is_resumed_by_its_own_repository_only(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    origin.add(TEAM, "v1", LAYER, NODE)
    bait = origin.add(OPEN, "bait", LAYER, ANYBODY)
    origin.content[OPEN] -= {digest_of(LAYER)}
    origin.held[MIN_CHUNK_BYTES] = trio.Event()
    first = node_of(origin, stores[0], OF_NODE)
    async with running(first):
        reader = await first.images.open_blob(TEAM, digest_of(LAYER))
        assert await reader.available(0, MIN_CHUNK_BYTES) > 0
        reader.close()
    again = node_of(origin, stores[0], OF_NODE)
    async with running(again):
        await again.images.manifest(OPEN, bait)
        with pytest.raises(NotFoundAtOrigin):
            await again.images.open_blob(OPEN, digest_of(LAYER))
    assert again.machine.counters.to_peers == 0


# ------------------------------------------------------------------ passthrough


async def test_a_pinned_tag_is_not_told_to_one_who_may_not_have_it(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(TEAM, "v1", LAYER, ALICE.authorization)
    node = node_of(origin, stores[0], Policy(PASSTHROUGH.access, (TagRule(policy="pinned"),)))
    async with running(node):
        await pull(node, TEAM, "v1", ALICE)
        with pytest.raises(DeniedByOrigin) as refusal:
            await node.images.resolve(TEAM, "v1", MALLORY)
        assert digest not in str(refusal.value)
        assert "v1" in str(refusal.value)
        assert refusal.value.challenges


async def test_each_callers_own_rights_count(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(TEAM, "v1", LAYER, ALICE.authorization, BOB.authorization)
    node = node_of(origin, stores[0], PASSTHROUGH)
    async with running(node):
        assert await pull(node, TEAM, "v1", ALICE) == LAYER
        await expect_nothing(node, TEAM, digest, digest_of(LAYER), MALLORY)
        await expect_nothing(node, TEAM, digest, digest_of(LAYER), NOBODY)
        origin.requests.clear()
        assert await pull(node, TEAM, "v1", BOB) == LAYER
        assert [request[0] for request in origin.requests] == ["head"], "all else came from the cache"


async def test_a_caller_without_a_header_is_told_what_the_origin_asks_for(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(TEAM, "v1", LAYER, ALICE.authorization)
    node = node_of(origin, stores[0], PASSTHROUGH)
    async with running(node):
        for reference in ("v1", digest):
            with pytest.raises(DeniedByOrigin) as refusal:
                await node.images.manifest(TEAM, reference)
            assert refusal.value.challenges == ('Bearer realm="https://auth.test"',)


async def test_a_yes_to_a_caller_holds_for_a_minute(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(TEAM, "v1", LAYER, ALICE.authorization)
    node = node_of(origin, stores[0], PASSTHROUGH)
    async with running(node):
        await pull(node, TEAM, digest, ALICE)
        origin.readers[TEAM] = set()
        assert await blob(node, TEAM, digest_of(LAYER), ALICE) == LAYER
        await trio.sleep(CALLER_TTL_S)
        await expect_nothing(node, TEAM, digest, digest_of(LAYER), ALICE)


async def test_a_right_to_one_image_is_none_to_another_in_the_cache(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    """The registry took an image away, or a manifest was never there for this caller."""
    first = origin.add(TEAM, "v1", LAYER, ALICE.authorization)
    second = origin.add(TEAM, "v2", LAYER[::-1], ALICE.authorization)
    node = node_of(origin, stores[0], PASSTHROUGH)
    async with running(node):
        await pull(node, TEAM, first, ALICE)
        await pull(node, TEAM, second, ALICE)
        await trio.sleep(CALLER_TTL_S)
        origin.content[TEAM] -= {second, digest_of(LAYER[::-1])}
        assert await pull(node, TEAM, first, ALICE) == LAYER
        with pytest.raises(NotFoundAtOrigin):
            await node.images.manifest(TEAM, second, ALICE)
        with pytest.raises(NotFoundAtOrigin):
            await node.images.open_blob(TEAM, digest_of(LAYER[::-1]), ALICE)


async def test_a_header_is_shown_to_its_own_repositorys_registry_only(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    node = node_of(origin, stores[0], PASSTHROUGH)
    async with running(node):
        assert await pull(node, OPEN, digest, ALICE) == LAYER
        assert origin.lent == {}
        with pytest.raises(DeniedByOrigin):
            await node.images.manifest(TEAM, "v1")


# ---------------------------------------------------- deny, node, changed rules


async def test_what_the_rules_deny_is_not_even_asked_for(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(OPEN, "v1", LAYER, ANYBODY)
    node = node_of(origin, stores[0], rules("reg.test/open=deny"))
    async with running(node):
        await expect_nothing(node, OPEN, digest, digest_of(LAYER), ALICE)
    assert origin.requests == []


async def test_other_rules_are_in_force_at_once(
    origin: RightsOrigin, stores: list[MemoryStore], quick_clock: MockClock
) -> None:
    digest = origin.add(TEAM, "v1", LAYER, NODE, ALICE.authorization)
    node = node_of(origin, stores[0], OF_NODE)
    async with running(node):
        assert await pull(node, TEAM, digest) == LAYER
        node.gate.set_policy(PASSTHROUGH)
        await expect_nothing(node, TEAM, digest, digest_of(LAYER))
        assert await pull(node, TEAM, digest, ALICE) == LAYER
        node.gate.set_policy(rules("*=deny"))
        await expect_nothing(node, TEAM, digest, digest_of(LAYER), ALICE)
