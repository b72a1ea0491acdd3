# SPDX-License-Identifier: Apache-2.0
"""An agent in the swarm that lies about what it fetched for all: the others end right, and it is known who it was."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.errors import P2PDistError
from tests.nodes import FakeOrigin, Node, connect_all, eventually, running, running_scheduler

if TYPE_CHECKING:
    from trio.testing import MockClock

    from p2pdist.core.types import Digest

CHUNK = MIN_CHUNK_BYTES
BLOB = random.Random(6).randbytes(32 * CHUNK + 77)
HONEST = 5
MAX_COPIES = 3
"""Of the registry's bytes: measured 1.3 to 2.4."""


class LyingOrigin(FakeOrigin):
    """What an agent that lies has in the place of the registry: other bytes, of the same length."""

    def _blob(self, digest: Digest) -> bytes:
        return bytes(len(super()._blob(digest)))


async def pull(node: Node, digest: Digest) -> None:
    """Pull a blob again and again until it is here, as runtimes do whose response was cut."""
    while not node.store.contains(digest):
        try:
            assert await node.read_blob(digest) == BLOB
        except P2PDistError:
            await trio.sleep(0.5)


async def rollout(honest: list[Node], liar: Node, digest: Digest) -> None:
    """Let all pull at once; the liar never ends."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull, liar, digest)
        async with trio.open_nursery() as pulls:
            for node in honest:
                pulls.start_soon(pull, node, digest)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("scheduled", [False, True], ids=["alone", "scheduled"])
async def test_a_lying_lease_holder_misleads_all_and_all_end_right_and_know_who_it_was(
    scheduled: bool, quick_clock: MockClock
) -> None:
    origin, wrong = FakeOrigin(), LyingOrigin()
    origin.chunk_s = wrong.chunk_s = 0.3
    digest = origin.add_blob(BLOB)
    wrong.add_blob(BLOB)
    async with AsyncExitStack() as stack:
        server = address = None
        if scheduled:
            server, address, _ = await stack.enter_async_context(running_scheduler())
        honest = [Node(number, origin, scheduler=address) for number in range(1, 1 + HONEST)]
        liar = Node(99, wrong, scheduler=address)
        for node in (*honest, liar):
            stack.callback(node.store.close)
        await stack.enter_async_context(running(*honest, liar))
        if scheduled:
            await eventually(lambda: all(node.uses(1) for node in (*honest, liar)))
        else:
            await connect_all([*honest, liar])
        with trio.fail_after(200):
            await rollout(honest, liar, digest)
        assert wrong.egress_bytes, "it fetched nothing: the test shows nothing"
        for node in honest:
            assert await node.read_blob(digest) == BLOB
            # Those that had believed the liar are not to blame.
            assert set(node.machine.book.reputation.banned(trio.current_time())) <= {liar.peer_id}
        assert any(node.machine.book.reputation.records for node in honest)
        assert server is None or server.state.reports.out == {liar.peer_id}
        # A copy for all, the search, and what rested on the liar's word again; each for itself it was four.
        assert origin.egress_bytes < MAX_COPIES * len(BLOB)
