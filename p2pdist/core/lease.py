# SPDX-License-Identifier: Apache-2.0
"""Fetching from the origin: by lease or by rendezvous.

A lease is the right and duty to fetch one chunk. The scheduler hands them out; without one, each member
of the swarm ranks all members for a chunk by a hash of (chunk, member), and the first fetches it: all
that know the same members agree without a word, and when one leaves only its chunks move (rendezvous
hashing, Thaler and Ravishankar 1998). Content that may not be shared, or that nobody else wants, is a
swarm of one member, which leases all to itself. What is fetched without any lease is core/ladder.py's.

One request to the origin brings a run of adjacent chunks where they come fast (core/runs.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from p2pdist.core.chunkmap import chunk_set, lowest, members
from p2pdist.core.events import FetchOrigin, Tell
from p2pdist.core.runs import Rate, run_from, runs_of
from p2pdist.core.types import Checksum
from p2pdist.core.verify import Basis
from p2pdist.core.wire import Done, Failed, Lease, Renew

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from p2pdist.core.events import FetchFailed
    from p2pdist.core.peerbook import Peer
    from p2pdist.core.progress import Progress
    from p2pdist.core.state import SwarmState
    from p2pdist.core.types import Digest, PeerId
    from p2pdist.core.wire import Message, Reread

SETTLE_S = 0.6
"""After meeting a peer, before leasing by rendezvous: without it egress was 1.53 times the image (SWARM)."""
MAX_SETTLE_S = 1.8
"""Peers met meanwhile prolong that up to here, and peers met within REST_S of the first not at all any more:
a peer that comes and goes must not keep the others waiting."""
REST_S = 6.0
LOST_S = 2.0
"""After losing the last peer: whom a fault of the network took from all others has some back after one or two tries to
dial, and would else fetch the whole rest meanwhile, where the origin is fast (simulated, 8 nodes)."""
LOST_REST_S = 30.0
"""As long as this is not over, losing the last peer again is not waited for again."""
LEASES = 4
"""Requests to the origin in flight per swarm: 1, 2 and 8 measured worse (SWARM)."""
FIRST_AHEAD = 8
"""Blobs, in the order wanted, whose first chunks come before all else: more than runtimes read at a time."""
CATCH_UP_LEASES = 3
"""Without a scheduler: chunks that a member fetches at a time when others are ahead of it, or few are left. Chance
gives some members more than others: readers wait for theirs, and at the end the origin's link would idle."""
TOGETHER = 12
"""Without a scheduler: fetches of all members together. Each has its part of the registry's link: of 40 none would end
soon, and nobody would have anything to give meanwhile. Fewer were slower in large swarms, and would be where a registry
limits each connection."""
REACH_PER_MEMBER = 2
"""Without a scheduler: how many chunks past the first that nobody has or fetches may be fetched, per member; and no
more than twice as many as may be fetched now, for some owners may be slow to begin."""
SLOW_S = 1.0
SLOW_FACTOR = 4
"""Without a scheduler: whose fetches take so many times as long as those of most, and longer than this, fetches no
more. All members see the same times."""
STEP_IN_S = 3.0
"""Without a scheduler: the next in rank fetches a chunk that nobody has got for so long."""
LEFT_ALONE = 6
"""Without a scheduler: who has no chunk of its own left to fetch takes over chunks of a member that has more than so
many left, as second in rank and from the end. The member itself begins at the front, so that the two do not meet: what
chance, or a slow connection, left with one member is fetched by all."""
TAIL_PER_MEMBER = 4
"""And only when no more chunks than so many for each member are left: before, the origin's link is busy anyway."""
MANY = 4
"""Members from which on chunks are taken over. The word of both who may fetch a chunk counts there; among fewer it
would be nearly everybody's."""
NEWS_S = 3.0
"""Who has wanted a blob for less may have been unknown to another member when that one began to fetch: by then an
announcement has come, and what was being fetched has too."""
DOUBTERS = 3
"""A swarm of so many reads from the origin, once, what a single peer holds and nobody else can vouch for. It may not be
passed on before, so that otherwise all would take all of it from that peer."""
RENEW_S = 1.0
BEHIND_S = 2.0
"""With a scheduler: a lease is given back, for another member, by who has so much left to send of what it alone has, or
is fetching. Where an agent's way out is slow, its share of the leases took longer to leave it than the image takes
(docs/performance.md, Slow uplinks). At 50 Mbit/s that is fifty chunks."""
RESTING_S = 5.0
"""Who has sent nothing for so long is not behind: nobody takes what it has."""
RANKED_MAX = 100_000
"""Chunks times members whose order is worked out at a time, 0.5 µs each."""
NO_WORD = Checksum(b"")
"""Nobody's."""
NEVER = -1
"""The pause of a Failed that says: do not lease this blob to this agent again."""


def weight(blob: Digest, index: int, member: PeerId) -> int:
    """Return the 64-bit weight of a member for a chunk; the greatest leases it."""
    return xxh3_64_intdigest(f"{blob}/{index}/{member}".encode())


def rank_of(member: PeerId, blob: Digest, index: int, swarm: Collection[PeerId]) -> int:
    """Return how many of the swarm come before `member` for this chunk: 0 is the lease holder."""
    own = weight(blob, index, member)
    return sum(1 for other in swarm if other != member and weight(blob, index, other) > own)


def holder_of(blob: Digest, index: int, swarm: Collection[PeerId]) -> PeerId:
    """Return the member that leases the chunk; `swarm` is not empty."""
    return max(swarm, key=lambda member: weight(blob, index, member))


@dataclass(slots=True)
class _Request:
    """A fetch that brings one or several chunks."""

    renewed_at: float
    left: int
    """Chunks still to come."""
    begun_at: float


class Leasing:
    """The origin fetches of one agent."""

    def __init__(self, state: SwarmState) -> None:
        self._state = state
        self._met_at = float("-inf")
        self._settled_at = float("-inf")
        self._lost_at = float("-inf")
        self._fetching: dict[tuple[Digest, int], _Request] = {}
        self._requests = 0
        self._elsewhere = 0
        """Fetches of others, when that was looked at last."""
        self._rate = Rate()
        self._took: dict[PeerId, float] = {}
        """Seconds that a fetch of each member takes lately."""
        self._due: set[tuple[Digest, int]] = set()
        """Chunks whose fetch, leased or not, the scheduler is to hear the end of."""
        self._granted: set[tuple[Digest, int]] = set()
        """Chunks being fetched because the scheduler leased them to us."""
        self._ranked: dict[Digest, tuple[frozenset[PeerId], dict[int, tuple[PeerId, PeerId]]]] = {}
        """First and second in rank for chunks of a blob, as long as its swarm has these members."""

    def fetching(self) -> int:
        """Return how many requests are running."""
        return self._requests

    def is_fetching(self, progress: Progress, index: int) -> bool:
        """Whether a chunk is being read from the origin by us."""
        return (progress.blob, index) in self._fetching

    def met(self) -> None:
        """Note that a peer was met or the scheduler lost: for a while now, members are still being found."""
        now = self._state.now
        if now - self._met_at > REST_S:
            self._met_at = now
        self._settled_at = min(now + SETTLE_S, self._met_at + MAX_SETTLE_S)

    def lost_all(self) -> None:
        """Note that the last peer was lost: others may be back in a moment."""
        now = self._state.now
        if now - self._lost_at > LOST_REST_S:
            self._lost_at, self._settled_at = now, now + LOST_S

    def swarm_of(self, progress: Progress) -> frozenset[PeerId]:
        """Return the members of a blob's swarm as far as we know them: those that want it, and us."""
        me = self._state.peer_id
        if not progress.shared:
            return frozenset((me,))
        peers = self._state.book.peers.values()
        return frozenset((me, *(peer.peer_id for peer in peers if progress.blob in peer.wants and not peer.mute)))

    def took(self, member: PeerId, seconds: float) -> None:
        """Note what a fetch of a member's, ours too, has taken."""
        self._took[member] = 0.7 * self._took.get(member, seconds) + 0.3 * seconds

    def gone(self, member: PeerId) -> None:
        """Forget a peer that has gone."""
        self._took.pop(member, None)

    def _able(self, swarm: frozenset[PeerId]) -> frozenset[PeerId]:
        """Return those of a swarm that fetch: whoever takes much longer than most leaves it to the others."""
        times = sorted(self._took[member] for member in swarm if member in self._took)
        if len(times) < MANY:
            return swarm
        most_s = max(SLOW_S, SLOW_FACTOR * times[len(times) // 2])
        return frozenset(member for member in swarm if self._took.get(member, 0.0) <= most_s)

    def elders_and(self, peer: Peer, progress: Progress) -> frozenset[PeerId]:
        """Return this peer and all members that it must have known when it fetched what it has now.

        Of these the peer leases first what its word on counts for. Without that allowance nobody's word counts
        for what was fetched while a crowd arrived, and these are the first chunks, for which all runtimes wait.
        A peer that does not want the blob leases none of it.
        """
        if progress.blob not in peer.wants:
            return frozenset((self._state.peer_id,))
        until = self._state.now - NEWS_S
        peers = self._state.book.peers.values()
        elders = {other.peer_id for other in peers if other.wants.get(progress.blob, until + 1) <= until}
        if progress.since <= until:
            elders.add(self._state.peer_id)
        return frozenset(elders | {peer.peer_id})

    def tell_newcomer(self, progress: Progress, peer: Peer) -> None:
        """Tell a peer that is new to a swarm what of the blob is being fetched."""
        if self._state.scheduled:
            return
        for blob, index in self._fetching:
            if blob == progress.blob:
                self._state.send(peer, Renew(blob, index))

    def heard_of(self, peer: Peer, message: Renew | Failed) -> None:
        """Take in that a peer fetches a chunk, or does not any more."""
        progress = self._state.blobs.get(message.blob)
        if progress is None or not progress.wanted or message.index >= progress.count:
            return
        if isinstance(message, Renew):
            progress.fetches.note(peer.peer_id, message.index, self._state.now)
        else:
            progress.fetches.drop(peer.peer_id, 1 << message.index)

    def _tell_members(self, progress: Progress, message: Renew | Failed) -> None:
        """Tell those that want a blob, where no scheduler tells them what to fetch."""
        if self._state.scheduled or not progress.shared:
            return
        for peer in self._state.book.peers.values():
            if progress.blob in peer.wants:
                self._state.send(peer, message)

    def retell(self, blob: Digest) -> None:
        """Tell a scheduler that is new to a blob what of it is being fetched."""
        for key in self._fetching:
            if key[0] == blob and key in self._due:
                self.tell(Renew(*key))

    def vouches(self, peer: PeerId, progress: Progress, index: int, swarm: frozenset[PeerId]) -> bool:
        """Return whether this peer's word on a chunk counts: that of one who is to have it from the origin."""
        ranks = 2 if len(swarm) >= MANY else 1
        return peer in swarm and any(
            rank_of(peer, progress.blob, index, fetching) < ranks for fetching in (swarm, self._able(swarm))
        )

    def leased(self, message: Lease) -> None:
        """Take in a lease of the scheduler's: fetch, or give it back."""
        state, blob = self._state, message.blob
        progress = state.blobs.get(blob)
        if progress is None or not progress.shared or message.index >= progress.count:
            state.out.append(Tell(message=Failed(blob, message.index, NEVER)))
            return
        wanted = []
        behind = self._behind(progress)
        for index in range(message.index, min(message.index + message.count, progress.count)):
            if progress.offered >> index & 1:
                self._due.add((blob, index))
                self.done(progress, index)
            elif progress.final or not progress.wanted:
                state.out.append(Tell(message=Failed(blob, index, NEVER)))
            elif progress.checking:
                # Where the blob is right so is the chunk, else it is read then.
                self._due.add((blob, index))
                progress.postponed.add(index)
            elif behind:
                state.out.append(Tell(message=Failed(blob, index, 0)))
            else:
                state.helped_at = state.now
                self._granted.add((blob, index))
                wanted.append(index)
        self.fetch(progress, wanted)

    def _behind(self, progress: Progress) -> bool:
        """Return whether our way out is too slow for one more chunk of this blob, which another member may fetch."""
        state = self._state
        each_s = state.leaving_s
        idle = state.now - state.sent_at > max(RESTING_S, 2 * each_s)
        if not each_s or idle or len(self.swarm_of(progress)) < 2:
            return False
        peers = state.book.peers.values()
        wanted_by_others = {blob for peer in peers for blob in peer.wants}
        # What only those say they have that never gave us anything has not left yet: one that stalls claims all.
        givers = [peer.shared for peer in peers if peer.down_bytes and not peer.failures]
        alone = 0
        for other in state.wanted():
            if other.blob in wanted_by_others:
                passed_on = reduce(or_, (shared.get(other.blob, 0) for shared in givers), 0)
                alone += (other.offered & ~passed_on).bit_count()
        return (alone + len(self._granted)) * each_s > BEHIND_S

    def go_on(self, progress: Progress) -> None:
        """Fetch what was leased to us while the blob was checked, which has proved wrong."""
        postponed, progress.postponed = progress.postponed, set()
        self.fetch(progress, sorted(index for index in postponed if not progress.offered >> index & 1))

    def turns(self, progress: Progress, indices: Collection[int]) -> dict[int, int]:
        """Return how many members come before us in reading each of these chunks again, not counting its author.

        So a swarm that was misled together reads the blob about once, and not each member all of it. All zero where
        there are too many to work that out.
        """
        swarm, me = self.swarm_of(progress), self._state.peer_id
        if len(indices) * len(swarm) > RANKED_MAX:
            return dict.fromkeys(indices, 0)
        authors = {index: progress.vouchers.basis(index)[1] for index in indices}
        return {
            index: rank_of(me, progress.blob, index, [member for member in swarm if member != author])
            for index, author in authors.items()
        }

    def reread(self, message: Reread) -> None:
        """Take in the scheduler's wish that this agent read a chunk itself, or say what it is if that is known."""
        progress = self._state.blobs.get(message.blob)
        if progress is None or not progress.shared or message.index >= progress.count:
            return
        self._due.add((message.blob, message.index))
        if progress.vouchers.basis(message.index)[0] is Basis.CERTAIN:
            self.done(progress, message.index)
        else:
            # As what two peers dispute, of which it is the turn.
            progress.disputed[message.index] = self._state.peer_id, NO_WORD, float("-inf")

    def done(self, progress: Progress, index: int) -> None:
        """Report a chunk that was ours to fetch, once it is here and vouched for, whoever it came from."""
        key = (progress.blob, index)
        if key in self._due and progress.offered >> index & 1:
            self._due.discard(key)
            self.tell(Done(progress.blob, progress.size_bytes, index, progress.own[index], self._rate.run_bytes))

    def tell(self, message: Message) -> None:
        """Tell the scheduler, where there is one."""
        if self._state.scheduled:
            self._state.out.append(Tell(message=message))

    def arrived(self, blob: Digest, index: int, size_bytes: int = 0, taken_s: float | None = None) -> None:
        """Note that a chunk, or a manifest, was fetched."""
        if taken_s is not None:
            self._rate.measured(size_bytes, taken_s)
        if (request := self._fetching.get((blob, index))) is not None:
            self.took(self._state.peer_id, self._state.now - request.begun_at)
        self._end(blob, index)

    def failed(self, event: FetchFailed) -> None:
        """Note that chunks will not come, and give their leases back."""
        for index in range(event.index, event.index + event.count):
            key = (event.blob, index)
            self._end(*key)
            if (progress := self._state.blobs.get(event.blob)) is not None:
                self._tell_members(progress, Failed(*key, 0))
            if key in self._due:
                self._due.discard(key)
                self.tell(Failed(*key, NEVER if event.final else int(event.pause_s * 1000)))

    def _end(self, blob: Digest, index: int) -> None:
        request = self._fetching.pop((blob, index), None)
        if request is not None:
            request.left -= 1
            self._requests -= not request.left
        progress = self._state.blobs.get(blob)
        if progress is not None:
            progress.unask(index, None)
        if (blob, index) in self._granted:
            self._granted.discard((blob, index))
            self._state.helped_at = self._state.now

    @property
    def granted(self) -> bool:
        """Whether a lease of the scheduler's is being fetched."""
        return bool(self._granted)

    def forget(self, blob: Digest) -> None:
        """Drop all that concerns a blob."""
        self.hush(blob)
        for key in [key for key in self._fetching if key[0] == blob]:
            self._end(*key)

    def hush(self, blob: Digest) -> None:
        """Fetch what is being fetched of a blob, but coordinate with nobody any more."""
        self._ranked.pop(blob, None)
        self._due = {key for key in self._due if key[0] != blob}

    def fetch_run(self, progress: Progress, index: int, free: int) -> int:
        """Begin to fetch a chunk, with as many of the set `free` right behind it as come in a moment; return which."""
        cut = progress.chunks
        run = range(1) if cut is None else run_from(index, free, self._rate.run_bytes, cut.chunk_bytes)
        self.fetch(progress, run)
        return chunk_set(run)

    def fetch(self, progress: Progress, indices: Iterable[int]) -> None:
        """Begin to fetch chunks, ascending, each once, where that has not begun: one request for what is adjacent."""
        blob, now, new = progress.blob, self._state.now, []
        for index in indices:
            if progress.shared:
                self._due.add((blob, index))
            if (blob, index) not in self._fetching:
                new.append(index)
        for run in runs_of(new):
            request = _Request(now, len(run), now)
            self._requests += 1
            for index in run:
                self._fetching[blob, index] = request
                progress.ask(index, None, now)
                self._tell_members(progress, Renew(blob, index))
            self._state.out.append(FetchOrigin(blob=blob, index=run.start, count=len(run)))

    def renew(self) -> None:
        """Keep the leases whose fetches still run."""
        now, renewed = self._state.now, []
        for key, request in self._fetching.items():
            if now - request.renewed_at >= RENEW_S:
                renewed.append(request)
                if key in self._due:
                    self.tell(Renew(*key))
                if (progress := self._state.blobs.get(key[0])) is not None:
                    self._tell_members(progress, Renew(*key))
        for request in renewed:
            request.renewed_at = now

    def by_rendezvous(self) -> None:
        """Fetch what is ours to fetch where no scheduler leases it."""
        state = self._state
        settled = state.now >= self._settled_at
        if self._requests >= LEASES:
            return
        self._elsewhere = self._fetching_elsewhere()
        # The first chunk of each of the next blobs first: every runtime that waits gets its first byte.
        first = [progress for progress in state.wanted()[:FIRST_AHEAD] if self._may_fetch(progress, settled=settled)]
        for progress in first:
            self._fetch_own(progress, 1)
        self._fetch_read([progress for progress in first if progress.heads])
        for progress in state.wanted():
            # Else this looks at each of thousands of small blobs, for each that comes.
            if self._requests >= LEASES:
                return
            if self._may_fetch(progress, settled=settled):
                self._fetch_own(progress, progress.full)
        if settled and not self._requests:
            self._take_over()

    def _fetching_elsewhere(self) -> int:
        """Return how many fetches of others are known; of one member's only what it may have, whatever it says."""
        told: Counter[PeerId] = Counter()
        for progress in self._state.wanted():
            told.update(progress.fetches.peers(self._state.now))
        return sum(min(count, LEASES) for count in told.values())

    def _take_over(self) -> None:
        """Fetch a chunk of a member that has many left, if there is one for which we come next."""
        left: dict[PeerId, int] = {}
        ours: list[tuple[Progress, int, PeerId]] = []
        crowds = [
            (progress, self._able(self.swarm_of(progress)), self._free(progress)) for progress in self._state.wanted()
        ]
        crowds = [crowd for crowd in crowds if len(crowd[1]) >= MANY and self._may_fetch(crowd[0], settled=True)]
        most = TAIL_PER_MEMBER * max((len(swarm) for _, swarm, _ in crowds), default=0)
        if sum(free.bit_count() for _, _, free in crowds) > most:
            return
        for progress, swarm, free in crowds:
            for index in members(free):
                first, second = self._first_two(progress, index, swarm)
                left[first] = left.get(first, 0) + 1
                if second == self._state.peer_id:
                    ours.append((progress, index, first))
        for progress, index, first in reversed(ours):
            if left[first] > LEFT_ALONE:
                self.fetch(progress, [index])
                return

    def _first_two(self, progress: Progress, index: int, swarm: frozenset[PeerId]) -> tuple[PeerId, PeerId]:
        """Return the two members that come first in rank for a chunk; the swarm has at least two."""
        known = self._ranked.get(progress.blob)
        if known is None or known[0] != swarm:
            known = self._ranked[progress.blob] = (swarm, {})
        if index not in known[1]:
            second, first = sorted(swarm, key=lambda member: weight(progress.blob, index, member))[-2:]
            known[1][index] = first, second
        return known[1][index]

    def _free(self, progress: Progress) -> int:
        taken = progress.inflight | progress.fetches.under_way(self._state.now)
        return progress.full & ~(progress.have | progress.held | taken)

    def _may_fetch(self, progress: Progress, *, settled: bool) -> bool:
        if progress.shared and (self._state.scheduled or not settled):
            return False
        return not (progress.complete or progress.final or progress.retry_at > self._state.now)

    def _fetch_own(self, progress: Progress, within: int) -> None:
        """Fetch chunks of the set `within` that are ours, in order."""
        swarm = self._able(self.swarm_of(progress))
        while (index := self._own_chunk(progress, swarm, within)) is not None:
            if self._requests >= self._most(progress, swarm, index):
                return
            # What is behind it is another's to fetch, as a rule, where there are others.
            self.fetch_run(progress, index, self._free(progress) if len(swarm) == 1 else 0)

    def _fetch_read(self, read: list[Progress]) -> None:
        """Fetch chunks of blobs that are read, the lowest of all first.

        Blob by blob, whoever has many chunks of the first comes to those of the second last, and all readers of the
        second wait for them: of three blobs read at once, two stood still for 15 of 24 seconds.
        """
        swarms = [(progress, self._able(self.swarm_of(progress))) for progress in read]
        crowds = [(progress, swarm) for progress, swarm in swarms if len(swarm) > 1]
        while True:
            nexts = [
                (index, nth)
                for nth, (progress, swarm) in enumerate(crowds)
                if (index := self._own_chunk(progress, swarm, progress.full)) is not None
            ]
            if not nexts:
                return
            index, nth = min(nexts)
            progress, swarm = crowds[nth]
            if self._requests >= self._most(progress, swarm, index):
                return
            self.fetch(progress, [index])

    def _most(self, progress: Progress, swarm: frozenset[PeerId], index: int) -> int:
        """Return how many chunks to fetch at a time if this is the next.

        More where the others are ahead of us by chance, and at the end, when they have no more to fetch.
        """
        here = progress.have | progress.held
        missing = (progress.full & ~here).bit_count()
        last = progress is self._state.wanted()[-1] and missing <= len(swarm)
        behind = (here >> index).bit_count() > REACH_PER_MEMBER * len(swarm)
        return max(CATCH_UP_LEASES if len(swarm) > 1 and (last or behind) else 1, LEASES // len(swarm))

    def _doubtful(self, progress: Progress, swarm: frozenset[PeerId]) -> int:
        """Return the chunks of which this swarm has but the word of a single peer, which has the whole blob."""
        unsettled = progress.full & ~progress.vouchers.settled_bits
        if not unsettled or len(swarm) < DOUBTERS:
            return 0
        blob, peers = progress.blob, self._state.book.peers.values()
        wholly = sum(1 for peer in peers if blob not in peer.wants and peer.shared.get(blob) == progress.full)
        return unsettled if wholly == 1 else 0

    def _own_chunk(self, progress: Progress, swarm: frozenset[PeerId], within: int) -> int | None:
        """Return the next chunk in the set `within` that this agent leases to itself, or None."""
        state = self._state
        nowhere = ~(progress.have | progress.held)
        taken = progress.inflight | progress.fetches.under_way(state.now)
        free = within & progress.full & ~taken & (nowhere | self._doubtful(progress, swarm))
        if not free:
            return None
        if len(swarm) == 1:
            return lowest(free & progress.window or free)
        patience = int((state.now - progress.progress_at) / STEP_IN_S)
        if not patience and state.peer_id not in swarm:
            return None
        reach = REACH_PER_MEMBER * len(swarm)
        if not patience:
            reach = min(reach, 2 * (TOGETHER - self._requests - self._elsewhere))
        for nth, index in enumerate(members(free)):
            if nth >= reach:
                return None
            own = self._first_two(progress, index, swarm)[0] == state.peer_id
            if own or (patience and rank_of(state.peer_id, progress.blob, index, swarm) <= patience):
                return index
        return None
