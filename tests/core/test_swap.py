# SPDX-License-Identifier: Apache-2.0
"""What latecomers take from seeds, so that they have something to swap."""

from __future__ import annotations

import pytest

from p2pdist.core import events as ev
from p2pdist.core.lease import holder_of
from p2pdist.core.select import WINDOW_FRACTION
from p2pdist.core.swap import SPAN
from p2pdist.core.wire import Grant, Unshare
from tests.script import ME, B, Script, have, share, take
from tests.strategies import CHUNK, digest, peer

COUNT = 160
WINDOW = range(1, 1 + COUNT // WINDOW_FRACTION)
TAKERS = [ME, peer(3), peer(4)]
OURS = [index for index in range(COUNT) if holder_of(B, index, TAKERS) == ME]


def latecomer(*seeds: int, others: tuple[int, ...] = (3, 4), seed: int = 0) -> Script:
    """An agent whose runtime has read one chunk of B, with peers that have all of it and others that want it too."""
    script = Script(scheduled=True, seed=seed, downloads=COUNT)
    script.connect(*seeds, *others)
    script.start(COUNT)
    script.on(ev.HeadMoved(blob=B, reader=1, index=1))
    for number in seeds:
        script.says(number, share(range(COUNT), size=COUNT * CHUNK, wants=False))
    for number in others:
        script.says(number, share(size=COUNT * CHUNK))
    return script


def taken(script: Script, number: int, grant: int) -> int:
    (command,) = script.says(number, Grant(grant))
    assert isinstance(command, ev.TakeChunk)
    return command.index


def test_of_what_one_seed_has_each_that_wants_it_takes_its_own_part_in_order() -> None:
    script = latecomer(2)
    assert [taken(script, 2, grant) for grant in range(5)] == OURS[:5]


def test_what_another_has_already_is_left_for_swapping() -> None:
    script = latecomer(2)
    script.says(3, have(*OURS[:2]))
    assert taken(script, 2, 1) == OURS[2]


def test_where_our_part_is_done_one_of_the_next_is_taken_at_random() -> None:
    picks = set()
    for seed in range(40):
        script = latecomer(2, seed=seed)
        script.says(3, have(*OURS))
        picks.add(taken(script, 2, 1))
    assert not picks & set(OURS)
    assert len(picks) > 10
    assert max(picks) < SPAN * len(TAKERS) * 3


@pytest.mark.parametrize(("seeds", "others"), [((2,), ()), ((2, 5), (3,))])
def test_where_seeds_are_enough_for_all_the_readers_window_decides(
    seeds: tuple[int, ...], others: tuple[int, ...]
) -> None:
    script = latecomer(*seeds, others=others)
    assert [taken(script, 2, grant) in WINDOW for grant in range(3)] == [True] * 3


def test_of_what_little_is_left_the_window_comes_first() -> None:
    script = latecomer(2)
    script.says(3, have(*range(COUNT // WINDOW_FRACTION, COUNT)))
    assert taken(script, 2, 1) in WINDOW


def test_the_blob_that_fewer_have_whole_comes_first() -> None:
    script, rare = latecomer(2, 5), digest(2)
    script.start(COUNT, blob=rare)
    script.says(2, share(range(COUNT), blob=rare, size=COUNT * CHUNK, wants=False))
    for number in (3, 4):
        script.says(number, share(blob=rare, size=COUNT * CHUNK))
    ours = [index for index in range(COUNT) if holder_of(rare, index, TAKERS) == ME]
    assert script.says(2, Grant(1)) == [take(2, 1, ours[0], blob=rare)]
    assert script.says(5, Grant(1)) == [take(5, 1, OURS[0])]


def test_the_first_chunk_that_a_reader_waits_for_comes_before_all() -> None:
    script = latecomer(2)
    script.on(ev.HeadMoved(blob=B, reader=1, index=0))
    assert taken(script, 2, 1) == 0


def test_when_another_wants_no_more_its_part_is_ours_and_a_pull_that_ends_leaves_nothing() -> None:
    script = latecomer(2)
    assert taken(script, 2, 1) == OURS[0]
    script.says(4, Unshare(B))
    ours = [index for index in range(COUNT) if holder_of(B, index, [ME, peer(3)]) == ME]
    assert taken(script, 2, 2) == next(index for index in ours if index != OURS[0])
    script.on(ev.PullCancelled(blob=B))
    script.tick(1.0)
    assert not script.machine._taking._swap._parts
