# SPDX-License-Identifier: Apache-2.0
"""What the machine's parts share: the order of the pulls, and that each peer is told what is new once."""

from __future__ import annotations

from p2pdist.core import events as ev
from p2pdist.core.wire import Decline, Grant, Room
from tests.script import CHUNK, B, Script, have, send, share
from tests.strategies import digest, peer


def test_the_pulls_go_on_in_the_order_started() -> None:
    script = Script(scheduled=True)
    for number in (3, 1, 2):
        script.start(blob=digest(number))
    script.on(ev.PullCancelled(blob=digest(1)))
    assert [progress.blob for progress in script.machine.state.wanted()] == [digest(3), digest(2)]


def test_a_peer_is_told_what_is_new_before_it_decides_and_only_once() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start()
    script.says(2, share([]))
    assert send(2, have(1)) in script.arrives(None, 1)
    assert script.says(2, Grant(1)) == [send(2, Decline(1, False))]


def test_gains_are_announced_together() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start()
    script.says(2, share(range(4)))
    for index in (2, 0):
        script.arrives(None, index)
    assert script.tick(0.4) == []
    assert script.tick(0.5) == [send(2, have(2, 0))]
    assert script.tick(1.0) == []


def test_a_peer_that_takes_no_part_is_told_nothing() -> None:
    script = Script(scheduled=True)
    script.start()
    script.machine.handle(ev.PeerConnected(peer=peer(2)), 0.0)
    script.says(2, share(blob=digest(9), size=CHUNK, wants=False))
    script.on(ev.PullCancelled(blob=B))
    script.start(blob=digest(2), shared=False)
    script.arrives(None, 0, blob=digest(2))
    assert script.tick(1.0) == []
    assert script.says(2, Room()) == []
