# SPDX-License-Identifier: Apache-2.0
"""Tags: asked of the origin once for all, and as fresh as the policy wants them."""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.core.access import Policy, TagRule
from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.core.wire import Message, Resolve, Resolved
from p2pdist.errors import DeniedByOrigin, NotFoundAtOrigin, OriginError, P2PDistError
from p2pdist.store.memory import MemoryStore
from p2pdist.store.resolved import ResolvedTags
from p2pdist.tags import MAX_ASKING, TAG_TRIES_S, TAG_TTL_S
from tests.fake_registry import OCI_MANIFEST
from tests.nodes import REPOSITORY, FakeOrigin, Node, cluster, eventually, running, running_scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trio.testing import MockClock

    from p2pdist.core.types import ManifestInfo

LAYER = random.Random(11).randbytes(4 * MIN_CHUNK_BYTES)


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    store = MemoryStore(max_bytes=1 << 30)
    yield store
    store.close()


@pytest.fixture
def origin() -> FakeOrigin:
    return FakeOrigin()


@pytest.fixture
def node(origin: FakeOrigin, store: MemoryStore) -> Node:
    return Node(1, origin, store)


@dataclass
class FakeTracker:
    """A scheduler's line that notes what is sent on it."""

    sent: list[Message] = field(default_factory=list)

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def questions(self) -> list[Resolve]:
        return [message for message in self.sent if isinstance(message, Resolve)]


def schedule(node: Node) -> FakeTracker:
    """Let a node believe that it has a scheduler."""
    tracker = FakeTracker()
    node.resolver.tracker = tracker
    node.resolver.scheduler_changed(True)
    return tracker


async def resolve_many(node: Node, count: int, tag: str = "v1") -> list[ManifestInfo | P2PDistError]:
    """Ask for a tag so many times at once."""
    answers: list[ManifestInfo | P2PDistError] = []

    async def one() -> None:
        try:
            answers.append(await node.resolve(tag))
        except P2PDistError as error:
            answers.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return answers


async def test_many_who_ask_for_a_tag_at_once_cost_one_request(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    digest = origin.add_image("v1", [LAYER])
    async with running(node):
        answers = await resolve_many(node, 50)
        assert {answer.digest for answer in answers} == {digest}
        await node.manifest("v1")
        assert origin.count("head_manifest") == 1
        assert origin.count("get_manifest") == 1


async def test_an_answer_about_a_tag_holds_for_seconds_only(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    first = origin.add_image("v1", [LAYER])
    async with running(node):
        assert (await node.resolve("v1")).digest == first
        second = origin.add_image("v1", [LAYER[::-1]])
        assert (await node.resolve("v1")).digest == first
        await trio.sleep(TAG_TTL_S)
        assert (await node.resolve("v1")).digest == second


async def test_many_share_an_error_too_and_the_next_asks_again(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    """With the origin down, each would else wait for all the failures before his own."""
    digest = origin.add_image("v1", [LAYER])
    origin.error = OriginError("down")
    async with running(node):
        assert {str(answer) for answer in await resolve_many(node, 50)} == {"down"}
        assert origin.count("head_manifest") == 1
        origin.error = None
        assert (await node.resolve("v1")).digest == digest


async def test_the_first_to_ask_may_hang_up(node: Node, origin: FakeOrigin, quick_clock: MockClock) -> None:
    digest = origin.add_image("v1", [LAYER])
    origin.gate = trio.Event()
    async with running(node), trio.open_nursery() as nursery:
        with trio.move_on_after(0.1) as hung_up:
            nursery.start_soon(resolve_many, node, 3)
            await node.resolve("v1")
        assert hung_up.cancelled_caught
        origin.gate.set()
        assert (await node.resolve("v1")).digest == digest
    assert origin.count("head_manifest") == 1


async def test_those_who_hang_up_leave_a_bounded_number_of_questions(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    digest = origin.add_image("v1", [LAYER])
    origin.gate = trio.Event()
    async with running(node):
        async with trio.open_nursery() as hasty:
            for number in range(MAX_ASKING):
                hasty.start_soon(node.resolver.ask, REPOSITORY, f"v{number}", None)
            await eventually(lambda: origin.count("head_manifest") == MAX_ASKING)
            hasty.cancel_scope.cancel()
        with pytest.raises(OriginError, match="ask again later"):
            await node.resolver.ask(REPOSITORY, "other", None)
        origin.gate.set()
        assert (await node.resolve("v1")).digest == digest


async def test_a_tag_that_is_not_there_is_said_so(node: Node, origin: FakeOrigin, quick_clock: MockClock) -> None:
    async with running(node):
        with pytest.raises(NotFoundAtOrigin):
            await node.resolve("nothing")
        with pytest.raises(NotFoundAtOrigin):
            await node.manifest("nothing")


async def test_with_a_scheduler_two_nodes_ask_for_all(quick_clock: MockClock) -> None:
    origin = FakeOrigin()
    digest = origin.add_image("v1", [LAYER])
    async with (
        running_scheduler() as (_, address, _scope),
        cluster(5, origin, scheduler=address) as nodes,
        trio.open_nursery() as nursery,
    ):

        async def one(node: Node) -> None:
            assert (await node.resolve("v1")).digest == digest

        for node in nodes * 3:
            nursery.start_soon(one, node)
    assert origin.count("head_manifest") == 2


async def test_a_node_that_lies_about_a_tag_misleads_no_other(quick_clock: MockClock) -> None:
    origin, wrong = FakeOrigin(), FakeOrigin()
    digest = origin.add_image("v1", [LAYER])
    other = wrong.add_image("v1", [LAYER[:-1]])
    async with running_scheduler() as (_, address, _scope):
        liar = Node(9, wrong, scheduler=address)
        honest = [Node(number, origin, scheduler=address) for number in (1, 2, 3)]
        with ExitStack() as stack:
            for node in (liar, *honest):
                stack.callback(node.store.close)
            async with running(liar, *honest):
                await eventually(lambda: all(node.uses(1) for node in (liar, *honest)))
                assert (await liar.resolve("v1")).digest == other
                for node in honest:
                    assert (await node.resolve("v1")).digest == digest


async def test_what_the_origin_refuses_one_node_is_refused_to_all_for_a_moment(quick_clock: MockClock) -> None:
    origin = FakeOrigin()
    async with running_scheduler() as (_, address, _scope), cluster(3, origin, scheduler=address) as nodes:
        for node in nodes:
            with pytest.raises(NotFoundAtOrigin):
                await node.resolve("nothing")
        assert origin.count("head_manifest") == 2


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Resolved(1, "", "", 0), id="empty"),
        pytest.param(Resolved(1, "sha256:x", OCI_MANIFEST, 10), id="no digest"),
        pytest.param(Resolved(1, "sha256:" + "0" * 64, "text/html\r\nX: y", 10), id="no media type"),
        pytest.param(Resolved(1, "sha256:" + "0" * 64, OCI_MANIFEST, -1), id="no size"),
    ],
)
async def test_an_answer_that_is_none_sends_the_node_to_the_origin(
    node: Node, origin: FakeOrigin, answer: Resolved, quick_clock: MockClock
) -> None:
    digest = origin.add_image("v1", [LAYER])
    async with running(node), trio.open_nursery() as nursery:
        tracker = schedule(node)
        nursery.start_soon(resolve_many, node, 3)
        await eventually(lambda: bool(tracker.questions()))
        node.resolver.resolved(answer)
        assert (await node.resolve("v1")).digest == digest
        assert len(tracker.questions()) == origin.count("head_manifest") == 1


@pytest.mark.parametrize("how", ["lost", "silent"])
async def test_a_scheduler_that_does_not_answer_is_done_without(
    node: Node, origin: FakeOrigin, how: str, quick_clock: MockClock
) -> None:
    digest = origin.add_image("v1", [LAYER])
    async with running(node), trio.open_nursery() as nursery:
        tracker = schedule(node)
        nursery.start_soon(resolve_many, node, 3)
        await eventually(lambda: bool(tracker.questions()))
        began = trio.current_time()
        if how == "lost":
            node.resolver.scheduler_changed(False)
        assert (await node.resolve("v1")).digest == digest
        assert trio.current_time() - began <= (0.1 if how == "lost" else TAG_TRIES_S + 0.1)


async def test_a_question_that_nobody_asks_any_more_is_answered_empty(node: Node, quick_clock: MockClock) -> None:
    async with running(node):
        tracker = schedule(node)
        node.resolver.asked(77)
        node.resolver.resolved(Resolved(77, "sha256:" + "0" * 64, OCI_MANIFEST, 10))
        assert tracker.sent == [Resolved(77, "", "", 0)]


async def test_the_tags_of_private_repositories_are_no_matter_of_the_scheduler(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    origin.add_image("v1", [LAYER])
    node.public = False
    async with running(node):
        tracker = schedule(node)
        await node.resolve("v1")
        await node.manifest("v1")
        assert tracker.sent == []


# -------------------------------------------------------------------- policies


@pytest.mark.parametrize("policy", ["origin", "stale-if-error", "pinned"])
async def test_a_tag_that_moves_is_followed_unless_it_is_pinned(
    origin: FakeOrigin, store: MemoryStore, policy: str, quick_clock: MockClock
) -> None:
    first = origin.add_image("v1", [LAYER])
    node = Node(1, origin, store, policy=Policy(tags=(TagRule(policy=policy),)))  # type: ignore[arg-type]
    async with running(node):
        assert (await node.resolve("v1")).digest == first
        second = origin.add_image("v1", [LAYER[::-1]])
        await trio.sleep(TAG_TTL_S)
        assert (await node.resolve("v1")).digest == (first if policy == "pinned" else second)
        assert origin.count("head_manifest") == (1 if policy == "pinned" else 2)


@pytest.mark.parametrize("policy", ["origin", "stale-if-error", "pinned"])
@pytest.mark.parametrize("how", ["down", "silent"])
async def test_while_the_origin_gives_no_answer_the_last_one_holds_where_the_policy_says_so(
    origin: FakeOrigin, store: MemoryStore, policy: str, how: str, quick_clock: MockClock
) -> None:
    first = origin.add_image("v1", [LAYER])
    node = Node(1, origin, store, policy=Policy(tags=(TagRule(policy=policy),)))  # type: ignore[arg-type]
    async with running(node):
        await node.manifest("v1")
        await trio.sleep(TAG_TTL_S)
        if how == "down":
            origin.error = OriginError("down")
        else:
            origin.gate = trio.Event()
        with trio.move_on_after(12) as runtime:
            if policy == "origin" and how == "down":
                with pytest.raises(OriginError, match="down"):
                    await node.manifest("v1")
            else:
                assert (await node.manifest("v1")).digest == first
        assert runtime.cancelled_caught is (policy == "origin" and how == "silent")


@pytest.mark.parametrize("error", [NotFoundAtOrigin("gone", status_code=404), DeniedByOrigin("no", status_code=401)])
async def test_what_the_origin_refuses_is_not_served_from_memory(
    origin: FakeOrigin, store: MemoryStore, error: OriginError, quick_clock: MockClock
) -> None:
    origin.add_image("v1", [LAYER])
    node = Node(1, origin, store, policy=Policy(tags=(TagRule(policy="stale-if-error"),)))
    async with running(node):
        await node.resolve("v1")
        await trio.sleep(TAG_TTL_S)
        origin.error = error
        with pytest.raises(type(error)):
            await node.resolve("v1")


async def test_a_pin_outlives_the_agent(
    origin: FakeOrigin, store: MemoryStore, tmp_path: Path, quick_clock: MockClock
) -> None:
    first = origin.add_image("v1", [LAYER])
    policy, file = Policy(tags=(TagRule(policy="pinned"),)), ResolvedTags(tmp_path)
    node = Node(1, origin, store, policy=policy, tags_file=file)
    async with running(node):
        await node.resolve("v1")
        await eventually(lambda: bool(file.load()))
    origin.add_image("v1", [LAYER[::-1]])
    again = Node(2, origin, store, policy=policy, tags_file=file)
    async with running(again):
        assert (await again.resolve("v1")).digest == first


async def test_a_tag_that_is_asked_for_again_is_asked_with_what_is_known(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    digest = origin.add_image("v1", [LAYER])
    async with running(node):
        await node.resolve("v1")
        await trio.sleep(TAG_TTL_S)
        await node.resolve("v1")
    assert [known and known.digest for known in origin.known] == [None, digest]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("404", NotFoundAtOrigin),
        ("401", DeniedByOrigin),
        ("403", DeniedByOrigin),
        ("429", OriginError),
        ("0", OriginError),
    ],
)
async def test_what_the_origin_said_to_another_agent_is_said_to_the_runtime(
    node: Node, origin: FakeOrigin, status: str, kind: type[OriginError], quick_clock: MockClock
) -> None:
    async with running(node), trio.open_nursery() as nursery:
        tracker = schedule(node)
        answers: list[ManifestInfo | P2PDistError] = []

        async def ask() -> None:
            answers.extend(await resolve_many(node, 2))

        nursery.start_soon(ask)
        await eventually(lambda: bool(tracker.questions()))
        node.resolver.resolved(Resolved(1, "", status, 0))
        await eventually(lambda: len(answers) == 2)
        assert {type(answer) for answer in answers} == {kind}
        assert origin.count("head_manifest") == 0


async def test_without_a_scheduler_each_node_asks_once(quick_clock: MockClock) -> None:
    origin = FakeOrigin()
    digest = origin.add_image("v1", [LAYER])
    async with cluster(4, origin) as nodes, trio.open_nursery() as nursery:

        async def one(node: Node) -> None:
            assert (await node.resolve("v1")).digest == digest

        for node in nodes * 3:
            nursery.start_soon(one, node)
    assert origin.count("head_manifest") == 4
