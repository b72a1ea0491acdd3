# SPDX-License-Identifier: Apache-2.0
"""Our part in swarms, and peers that come and go."""

from __future__ import annotations

from p2pdist.core import events as ev
from p2pdist.core.lease import NEWS_S, holder_of
from p2pdist.core.wire import Grant, Lease, Unshare
from tests.script import ME, B, Script, done, have, join, scheduled, send, share, takes, write
from tests.strategies import digest, peer


def test_a_peer_that_connects_is_told_of_the_pulls_that_go_on() -> None:
    script = Script()
    script.start(have=[1])
    script.start(blob=digest(2), shared=False)
    script.start(1, blob=digest(3), have=[0])
    script.on(ev.BlobVerified(blob=digest(3)))
    assert script.connect(2) == [send(2, share([1], reply=False))]


def test_what_strangers_and_lost_peers_say_is_not_heard() -> None:
    script = scheduled(2)
    assert script.says(9, share(range(4)), Grant(1)) == []
    assert script.on(ev.ChunkSent(peer=peer(9), number=1)) == []
    assert script.on(ev.PeerLost(peer=peer(9))) == []


def test_a_peer_that_leaves_the_swarm_is_counted_out() -> None:
    script = scheduled(2)
    script.says(2, have(0))
    assert script.says(2, Unshare(B)) == []
    assert script.machine.blobs[B].holders == [0, 0, 0, 0]
    script.ordered(Lease(B, 1, 15000))
    assert script.arrives(None, 1) == [write(1), done(1)]


def test_a_scheduler_that_connects_is_told_what_is_here_and_vouched_for() -> None:
    script = Script()
    script.connect(11)
    script.start(have=[1])
    script.start(blob=digest(2), shared=False)
    script.says(11, share())
    script.tick(NEWS_S)
    # By rendezvous this chunk is ours to vouch for, not the peer's.
    assert holder_of(B, 3, [ME, peer(11)]) == ME
    takes(script, 11, 1, 3)
    assert script.on(ev.SchedulerConnected()) == [join(1)]
