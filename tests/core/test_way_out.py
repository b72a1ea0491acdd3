# SPDX-License-Identifier: Apache-2.0
"""How fast chunks leave: what is tried, what counts as slow, how that ends, and which leases are given back for it."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from p2pdist.core.lease import RESTING_S
from p2pdist.core.state import PullSettings, SwarmState
from p2pdist.core.uplink import FORGET_S
from p2pdist.core.way_out import (
    CAREFUL_S,
    LONG_TRIAL,
    NARROW_BYTES,
    PROBE_EVERY,
    PROOF_S,
    PROOFS,
    RECENT,
    TRIAL_SLOTS,
    TRIALS,
    TRIED_AT_ONCE,
    WIDE_BYTES,
    WayOut,
)
from p2pdist.core.wire import Failed, Lease
from tests.script import CHUNK, B, Script, fetches, have, share, tell
from tests.strategies import peer

if TYPE_CHECKING:
    from collections.abc import Iterator


class Leaving:
    """One peer, and chunks that leave for it one after the other."""

    def __init__(self) -> None:
        self.state = SwarmState(peer_id=peer(1), rng=Random(1), settings=PullSettings())
        self.way_out = WayOut(self.state)

    def chunks(self, count: int, each_s: float, *, gained: int = 0, counts: bool = True) -> Iterator[int]:
        """Let so many leave, while peers gain so many others during each; yield the window of each."""
        for _ in range(count):
            self.way_out.begins()
            yield self.way_out.window_bytes
            self.state.now += each_s
            self.state.peers_gained += gained
            self.way_out.left(counts=counts)


@pytest.fixture
def leaving() -> Leaving:
    return Leaving()


def test_until_chunks_have_left_fast_they_leave_few_at_a_time_and_then_all_slots_are_used(leaving: Leaving) -> None:
    most = leaving.state.settings.upload_slots
    assert (leaving.way_out.at_once, leaving.way_out.slots) == (TRIED_AT_ONCE, TRIAL_SLOTS)
    assert list(leaving.chunks(PROOFS + 1, PROOF_S)) == [WIDE_BYTES] * PROOFS + [0]
    assert leaving.way_out.at_once == leaving.way_out.slots == most


def test_a_single_fast_chunk_proves_nothing_for_links_let_a_burst_pass(leaving: Leaving) -> None:
    list(leaving.chunks(1, 0.0))
    assert list(leaving.chunks(3, 1.0)) == [WIDE_BYTES] * 3


def test_whose_chunks_take_long_among_its_like_is_tried_for_so_long_and_not_longer(leaving: Leaving) -> None:
    long = int(TRIALS / LONG_TRIAL)
    assert list(leaving.chunks(long + 1, 2.0, gained=1)) == [WIDE_BYTES] * long + [0]
    assert leaving.state.slow_s == 0


def test_a_slow_way_out_shows_as_soon_as_peers_gain_more_however_little_they_gained_at_first(leaving: Leaving) -> None:
    list(leaving.chunks(2 * TRIALS, 1.0, gained=1))
    list(leaving.chunks(RECENT, 1.0, gained=10))
    assert leaving.state.slow_s == 1.0


def test_chunks_that_waited_for_their_receivers_do_not_make_the_way_out_slow(leaving: Leaving) -> None:
    list(leaving.chunks(TRIALS, 0.9 * CAREFUL_S, gained=20))
    assert (leaving.state.slow_s, leaving.way_out.window_bytes) == (0, 0)
    list(leaving.chunks(RECENT, 0.1, gained=1))
    assert leaving.state.slow_s == 0


def test_a_slow_way_out_is_known_after_two_chunks_and_little_stands_before_it_but_once_in_a_while(
    leaving: Leaving,
) -> None:
    list(leaving.chunks(2, 1.0, gained=10))
    assert (leaving.state.slow_s, leaving.way_out.at_once, leaving.way_out.slots) == (1.0, 1, 1)
    windows = list(leaving.chunks(2 + 2 * RECENT, 1.0, gained=10))
    assert windows == [NARROW_BYTES if sent % PROBE_EVERY else WIDE_BYTES for sent in range(2, 4 + 2 * RECENT)]


def until_wide(leaving: Leaving) -> None:
    while leaving.way_out.window_bytes == NARROW_BYTES:
        list(leaving.chunks(1, 1.0, gained=10))


def test_who_was_taken_for_slow_and_sends_fast_when_it_may_is_not_slow_any_more(leaving: Leaving) -> None:
    list(leaving.chunks(3, 1.0, gained=10))
    until_wide(leaving)
    assert list(leaving.chunks(PROOFS + 1, 0.1, gained=1)) == [WIDE_BYTES] * PROOFS + [0]
    assert leaving.state.slow_s == 0


def test_a_burst_does_not_make_a_slow_way_out_fast(leaving: Leaving) -> None:
    list(leaving.chunks(3, 1.0, gained=10))
    until_wide(leaving)
    assert list(leaving.chunks(PROOFS - 1, 0.0)) == [WIDE_BYTES] * (PROOFS - 1)
    list(leaving.chunks(1, 1.0))
    assert leaving.state.slow_s > CAREFUL_S
    assert leaving.way_out.window_bytes == NARROW_BYTES


def test_small_chunks_tell_nothing_but_are_not_tried_for_ever(leaving: Leaving) -> None:
    list(leaving.chunks(TRIALS, 2.0, gained=20, counts=False))
    assert (leaving.state.slow_s, leaving.way_out.window_bytes) == (0, 0)


def test_after_a_long_rest_the_way_out_is_tried_again(leaving: Leaving) -> None:
    list(leaving.chunks(PROOFS, 0.1))
    leaving.state.now += FORGET_S + 1
    assert next(leaving.chunks(1, 0.1)) == WIDE_BYTES


def test_a_limit_that_was_found_by_the_queue_before_it_makes_careful_at_once(leaving: Leaving) -> None:
    list(leaving.chunks(PROOFS, 0.1))
    leaving.state.held_to_bytes_per_s = 100_000
    assert leaving.way_out.at_once == 1
    assert leaving.way_out.window_bytes == NARROW_BYTES


# ------------------------------------------------- leases of who is slow


def behind(*, wanted: bool = True, chunks: int = 3) -> Script:
    """An agent whose chunks take a second each to leave, and who alone has some of a blob."""
    script = Script(scheduled=True)
    script.connect(2)
    script.start(8)
    script.says(2, share(size=8 * CHUNK, wants=wanted))
    for index in range(chunks):
        script.ordered(Lease(B, index, 15000))
        script.arrives(None, index)
    script.machine.state.slow_s, script.machine.state.sent_at = 1.0, script.now
    script.machine.book.peers[peer(2)].down_bytes = CHUNK
    return script


def test_who_is_behind_with_sending_what_it_alone_has_gives_leases_back() -> None:
    script = behind()
    assert script.ordered(Lease(B, 5, 15000)) == [tell(Failed(B, 5, 0))]
    script.says(2, have(0, 1))
    assert fetches(script.ordered(Lease(B, 5, 15000))) == [5]
    assert script.ordered(Lease(B, 6, 15000)) != []
    assert script.ordered(Lease(B, 7, 15000)) == [tell(Failed(B, 7, 0))]


@pytest.mark.parametrize(("down_bytes", "failures"), [(0, 0), (CHUNK, 1)], ids=["stranger", "stalls"])
def test_what_a_peer_that_gives_nothing_says_it_has_has_not_left_yet(down_bytes: int, failures: int) -> None:
    script = behind()
    known = script.machine.book.peers[peer(2)]
    known.down_bytes, known.failures = down_bytes, failures
    script.says(2, have(0, 1, 2))
    assert script.ordered(Lease(B, 5, 15000)) == [tell(Failed(B, 5, 0))]


def test_a_lease_that_nobody_else_can_have_is_not_given_back() -> None:
    assert fetches(behind(wanted=False).ordered(Lease(B, 5, 15000))) == [5]


def test_who_has_sent_nothing_for_a_while_is_not_behind() -> None:
    script = behind()
    script.now += RESTING_S + 0.1
    assert fetches(script.ordered(Lease(B, 5, 15000))) == [5]
