# SPDX-License-Identifier: Apache-2.0
"""What others say: which chunks a peer has, their checksums, and whose word on these counts.

Peers announce by Share and Have, the scheduler sends what the lease holders found, and what this agent reads from the
origin is certain. A better word takes the place of a lesser one, and wrong chunks back out of the store. It falls back
on whoever gave the lesser word; on a chunk's sender only where nobody else had spoken. What peers say against words
that are no better is a dispute, which reading the chunk from the origin ends (core/ladder.py).
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import ChunkMap, chunk_set, members
from p2pdist.core.events import ForgetChunks, LookUp
from p2pdist.core.packing import check_checksums, unpack_checksums, unpack_indices
from p2pdist.core.peerbook import MAX_SHARED_BLOBS
from p2pdist.core.progress import MAX_WHOLE_BYTES, read_share
from p2pdist.core.reputation import Offence
from p2pdist.core.verify import Basis
from p2pdist.core.wire import Refuted
from p2pdist.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from p2pdist.core.lease import Leasing
    from p2pdist.core.membership import Membership
    from p2pdist.core.peerbook import Peer
    from p2pdist.core.progress import Progress
    from p2pdist.core.serve import Giving
    from p2pdist.core.state import SwarmState
    from p2pdist.core.types import Checksum, Digest, PeerId
    from p2pdist.core.wire import Checksums, Have, Share, Withdrawn

WRONG_WORDS = 3
"""Checksums of one peer's that proved wrong, of which nobody else is known to have spoken before, and more than half as
many as it is believed about: it lies. Who has fewer may have believed a liar: honest agents pass on what witnesses, a
lease holder or a scheduler misled them about, until they hear better, and are then the first to say what is right."""
REFUTED_MAX = 16
"""Checksums of the scheduler's that this agent itself has found wrong, before it believes none of them until it is
connected anew: before a lying lease holder gets so far, the scheduler has found it out."""
PARDONS = 64
MUTE_S = 3.0
"""Without a scheduler: for so long a peer that has never granted a slot is believed to have what we lack, where nobody
else helps either. Before, one that claims everything and gives nothing kept all from fetching for 6 to 12 s."""
WITHDRAWN_MAX = 16
"""Liars' words that the scheduler takes back, before it is believed no more in that until it is connected anew: each
time chunks are thrown away."""


class Hearing:
    """One agent's ear."""

    def __init__(self, state: SwarmState, leasing: Leasing, giving: Giving, membership: Membership) -> None:
        self._state = state
        self._leasing = leasing
        self._giving = giving
        self._membership = membership
        self._refuted = 0
        self._withdrawn = 0
        self._on_its_word: deque[tuple[PeerId, Digest, int, Checksum]] = deque(maxlen=PARDONS)
        """Peers blamed because the scheduler said otherwise, and what they had said."""

    # --------------------------------------------------------------- peers

    def share_came(self, peer: Peer, message: Share) -> None:
        """Take in a peer's part in a swarm, and answer with ours.

        Raises:
            RemoteProtocolError: it shares too much, or its parts do not fit each other.
        """
        if len(peer.wants) > MAX_SHARED_BLOBS or len(peer.shared) > MAX_SHARED_BLOBS:
            raise RemoteProtocolError(f"more than {MAX_SHARED_BLOBS} blobs shared")
        if message.wants:
            peer.wants.setdefault(message.blob, self._state.now)
        else:
            peer.wants.pop(message.blob, None)
        progress = self._state.blobs.get(message.blob)
        if progress is None:
            if message.wants:
                self._state.out.append(LookUp(blob=message.blob))
            return
        if not progress.shared:
            return
        self._note_share(progress, peer, message)
        if not message.reply:
            self._state.share_with(peer, progress, reply=True)
            self._leasing.tell_newcomer(progress, peer)
        peer.passed_until = 0.0
        self._giving.grant()

    def _note_share(self, progress: Progress, peer: Peer, message: Share) -> None:
        """Learn what a peer has of a blob; a Share replaces all that was known."""
        self._membership.unhold(peer, message.blob)
        if peer.mute:
            return
        self._learn_size(progress, message.size_bytes)
        if progress.chunks is None or message.size_bytes != progress.chunks.size_bytes:
            return
        bits, checksums = read_share(message, progress.chunks)
        progress.media_type = progress.media_type or message.media_type
        words = list(zip(members(bits), checksums, strict=True))
        if stale := progress.vouchers.stale(words):
            # It has not heard yet that this proved wrong.
            words = [(index, word) for index, word in words if not stale >> index & 1]
            peer.doubted[message.blob] = stale
        peer.shared[message.blob] = bits & ~stale
        self._holds(progress, peer, bits & ~stale)
        self._heard(progress, peer, words)

    def have_came(self, peer: Peer, message: Have) -> None:
        """Take in what a peer gained. Raises RemoteProtocolError as share_came."""
        progress = self._state.blobs.get(message.blob)
        if progress is None or progress.chunks is None or message.blob not in peer.shared:
            return
        indices = unpack_indices(message.indices, progress.count)
        check_checksums(message.checksums, len(indices))
        known, new = peer.shared[message.blob], chunk_set(indices)
        peer.shared[message.blob] = known | new
        self._state.peers_gained += (new & ~known).bit_count()
        if progress.wanted:
            self._holds(progress, peer, new & ~known)
            if not progress.vouchers.agree(indices, message.checksums):
                checksums = unpack_checksums(message.checksums, len(indices))
                self._heard(progress, peer, zip(indices, checksums, strict=True))
        if known | new == progress.full:
            peer.wants.pop(message.blob, None)

    def pass_over(self) -> None:
        """Count no more on what peers claim that have never granted anything, while nobody helps."""
        state = self._state
        if state.scheduled or state.now - state.helped_at < MUTE_S:
            return
        for progress in state.wanted():
            if progress.held & ~progress.have and state.now - progress.progress_at >= MUTE_S:
                for peer in state.book.peers.values():
                    if peer.granted < 0 and peer.shared.get(progress.blob, 0) & ~progress.have:
                        peer.mute = True
                        self._membership.unhold(peer, progress.blob)

    def count_on(self, peer: Peer) -> None:
        """Ask a peer that was passed over, and grants now, what it has."""
        peer.mute = False
        for progress in self._state.wanted():
            if progress.shared:
                self._state.share_with(peer, progress, reply=False)

    def _learn_size(self, progress: Progress, size_bytes: int) -> None:
        """Learn the size of content of which only the digest was known; one too large is fetched by each for itself.

        That it is empty is nobody's to say but the origin's: there would be nothing to get, and nothing to check.
        """
        if progress.chunks is not None or size_bytes <= 0:
            return
        if size_bytes <= MAX_WHOLE_BYTES:
            progress.size(ChunkMap.of(size_bytes))
        else:
            self._membership.keep_to_ourselves(progress)

    def _holds(self, progress: Progress, peer: Peer, bits: int) -> None:
        """Count a peer's chunks."""
        for since in progress.fetches.drop(peer.peer_id, bits):
            self._leasing.took(peer.peer_id, self._state.now - since)
        progress.add_holder(bits)
        if progress.news(bits):
            progress.progress_at = self._state.now

    def _heard(self, progress: Progress, peer: Peer, words: Iterable[tuple[int, Checksum]]) -> None:
        """Weigh a peer's word on checksums; a lease holder's own settles it where no scheduler does."""
        vouchers, connected = progress.vouchers, self._state.book.peers
        settled = vouchers.settled
        swarm = None if self._state.scheduled else self._leasing.elders_and(peer, progress)
        for index, checksum in words:
            known = settled.get(index)
            if known is not None:
                if known != checksum:
                    self._contradicted(progress, peer, index, checksum)
                    if peer.peer_id not in connected:
                        return
                continue
            if swarm is not None and self._leasing.vouches(peer.peer_id, progress, index, swarm):
                basis = Basis.HOLDER
            elif vouchers.claim(index, checksum, peer.peer_id):
                basis = Basis.WITNESSES
            else:
                continue
            self._settle(progress, index, checksum, basis, vouchers.author(index, checksum, peer.peer_id))
            self._offer(progress, index)

    def _settle(
        self, progress: Progress, index: int, checksum: Checksum, basis: Basis, by: PeerId | None = None
    ) -> None:
        """Take a checksum as right, and draw the consequences for those who said otherwise."""
        for dissenter, word in progress.vouchers.settle(index, checksum, basis, by):
            peer = self._state.book.peers.get(dissenter)
            if peer is not None:
                self._contradicted(progress, peer, index, word)
        if basis >= Basis.SCHEDULER and (said := progress.disputed.pop(index, None)) is not None:
            disputer = self._state.book.peers.get(said[0])
            if disputer is not None and said[1] != checksum:
                self._contradicted(progress, disputer, index, said[1])

    def _contradicted(self, progress: Progress, peer: Peer, index: int, word: Checksum) -> None:
        """Weigh a peer's word against the settled one, which differs."""
        basis, _ = progress.vouchers.basis(index)
        known = peer.shared.get(progress.blob, 0)
        if known >> index & 1:
            # What it has is not what we want.
            peer.shared[progress.blob] = known & ~(1 << index)
            peer.doubted[progress.blob] = peer.doubted.get(progress.blob, 0) | 1 << index
            others = (other.shared.get(progress.blob, 0) for other in self._state.book.peers.values())
            progress.drop_holder(1 << index, others)
        if basis is None or basis < Basis.SCHEDULER:
            if word not in progress.vouchers.known_wrong.get(index, ()):
                progress.disputed.setdefault(index, (peer.peer_id, word, self._state.now))
            return
        if not progress.vouchers.news(index, word):
            return  # It may believe who said so first, as we may have done.
        if basis is Basis.SCHEDULER:
            self._on_its_word.append((peer.peer_id, progress.blob, index, word))
        agreed = known & progress.vouchers.settled_bits & ~(1 << index)
        self._false_word(peer, progress, index, max(peer.good, agreed.bit_count()))

    def _false_word(self, peer: Peer, progress: Progress, index: int, right: int) -> None:
        """Count a refuted word. Its author may have believed a liar whom we have not heard: see WRONG_WORDS."""
        if self._mostly_wrong(peer, 1, right):
            reason = f"gave a wrong checksum of chunk {index} of {progress.blob}"
            self._convict(peer.peer_id, Offence.FALSE_CHECKSUM, reason)

    def _mostly_wrong(self, peer: Peer, more: int, right: int) -> bool:
        """Count so many wrong words of a peer's; return whether it is a liar and not one who believed one.

        Args:
            right: its words, of the same kind, that are believed still.
        """
        peer.wrong += more
        return peer.wrong >= WRONG_WORDS and 2 * peer.wrong > right

    def refute(self, progress: Progress, index: int, sender: PeerId, checksum: Checksum) -> None:
        """Blame a peer for a chunk that is not what it should be, unless what it should be is disputed.

        Who has said before, or meanwhile, that it has something else sends what it has; and what proved wrong while it
        was on its way, the sender may have believed as we had.
        """
        basis, _ = progress.vouchers.basis(index)
        peer = self._state.book.peers.get(sender)
        if index in progress.disputed and basis is not None and basis < Basis.SCHEDULER:
            return
        if peer is not None and not peer.shared.get(progress.blob, 0) >> index & 1:
            doubted = peer.doubted.get(progress.blob, 0) >> index & 1
            if doubted or checksum in progress.vouchers.known_wrong.get(index, ()):
                return
        if basis is Basis.SCHEDULER:
            self._on_its_word.append((sender, progress.blob, index, checksum))
        self._convict(sender, Offence.CORRUPT, f"sent a corrupt chunk {index} of {progress.blob}")

    def _convict(self, peer_id: PeerId, offence: Offence, reason: str) -> None:
        """Count an offence; where the peer is banned for it, believe nothing any more that rests on its word alone."""
        if not self._membership.offended(peer_id, offence, reason):
            return
        for progress in self._state.wanted():
            vouchers, senders = progress.vouchers, progress.senders
            vouchers.withdraw(peer_id)
            if progress.checking:
                continue
            alone = [index for index, sender in senders.items() if sender == peer_id and index not in vouchers.settled]
            doubtful = sorted({*alone, *vouchers.resting_on(peer_id)})
            self._throw_away(progress, doubtful)

    def _throw_away(self, progress: Progress, indices: list[int]) -> None:
        """Forget what is known of chunks, and the chunks; ask all what they have of them now."""
        believed = [index for index in indices if progress.vouchers.basis(index)[0] is not None]
        progress.vouchers.forget(indices)
        self._disbelieve(progress, believed)
        if here := [index for index in indices if progress.have >> index & 1]:
            self._state.out.append(ForgetChunks(blob=progress.blob, indices=here))
            progress.lose(here)
            self._tell_again(progress, reply=False)

    def _disbelieve(self, progress: Progress, believed: Iterable[int]) -> None:
        """Count on nobody for chunks of which all who have them believed what we did; who has better ones says so."""
        wrong, peers = chunk_set(believed), self._state.book.peers.values()
        for peer in peers:
            known = peer.shared.get(progress.blob, 0)
            if gone := known & wrong:
                peer.shared[progress.blob] = known & ~gone
                progress.drop_holder(gone, (other.shared.get(progress.blob, 0) for other in peers))

    def _tell_again(self, progress: Progress, *, reply: bool = True) -> None:
        for peer in self._state.book.peers.values():
            if progress.blob in peer.cursors:
                self._state.share_with(peer, progress, reply=reply)

    def _offer(self, progress: Progress, index: int) -> None:
        self._state.offer(progress, index)
        self._leasing.done(progress, index)

    # ----------------------------------------------------------- checksums

    def checksums_came(self, message: Checksums) -> None:
        """Take in the scheduler's word, unless this agent has found too much of it wrong."""
        progress = self._state.blobs.get(message.blob)
        if progress is None or not progress.wanted or not progress.shared:
            return
        self._learn_size(progress, message.size_bytes)
        if progress.chunks is None or progress.size_bytes != message.size_bytes:
            return
        indices = unpack_indices(message.indices, progress.count)
        checksums = unpack_checksums(message.checksums, len(indices))
        progress.done |= chunk_set(indices)
        settled, basis = progress.vouchers.settled, progress.vouchers.basis
        better: dict[int, Checksum] = {}
        for index, word in zip(indices, checksums, strict=True):
            if basis(index)[0] is not Basis.CERTAIN:
                better[index] = word
            elif settled[index] != word:
                self._scheduler_erred(progress, index, settled[index])
        if progress.checking:
            progress.unweighed.update(better)
        elif self._refuted < REFUTED_MAX:
            self._better(progress, better, Basis.SCHEDULER)

    def catch_up(self, progress: Progress) -> None:
        """Take in what the scheduler said while the whole blob was being checked, which proved wrong."""
        vouchers, gone, progress.withdrawn = progress.vouchers, progress.withdrawn, []
        self._throw_away(progress, [index for index in gone if vouchers.basis(index)[0] is not Basis.CERTAIN])
        better, progress.unweighed = progress.unweighed, {}
        certain = {index for index in better if progress.vouchers.basis(index)[0] is Basis.CERTAIN}
        self._better(progress, {index: word for index, word in better.items() if index not in certain}, Basis.SCHEDULER)

    def trust_again(self) -> None:
        """Believe a scheduler that was connected just now."""
        self._refuted = self._withdrawn = 0

    def withdrawn(self, message: Withdrawn) -> None:
        """Have nothing to do with an agent that others have found to lie, and forget what is its word alone."""
        progress = self._state.blobs.get(message.blob)
        if self._withdrawn >= WITHDRAWN_MAX or message.peer == self._state.peer_id:
            return
        self._withdrawn += 1
        if progress is not None and progress.wanted and progress.shared:
            vouchers, indices = progress.vouchers, unpack_indices(message.indices, progress.count)
            progress.done &= ~chunk_set(indices)
            if progress.checking:
                # Whether it is right is known in a moment; until then nobody is told that it is.
                progress.withdrawn += indices
                progress.retract(indices)
                self._tell_again(progress)
            else:
                self._throw_away(progress, [at for at in indices if vouchers.basis(at)[0] is not Basis.CERTAIN])
        self._convict(message.peer, Offence.FALSE_CHECKSUM, f"said false checksums of {message.blob} to the scheduler")

    def read(self, progress: Progress, index: int, checksum: Checksum) -> None:
        """Take in what this agent has read from the origin itself."""
        vouchers = progress.vouchers
        word, basis, _ = vouchers.overturned.get(index, (None, None, None))
        if index in vouchers.settled:
            word, basis = vouchers.settled[index], vouchers.basis(index)[0]
        if basis is Basis.SCHEDULER and word != checksum:
            self._scheduler_erred(progress, index, checksum)
        self._better(progress, {index: checksum}, Basis.CERTAIN)

    def _scheduler_erred(self, progress: Progress, index: int, checksum: Checksum) -> None:
        """Tell the scheduler that it was told wrong, and pardon who was blamed for saying what is right."""
        self._refuted += 1
        self._leasing.tell(Refuted(progress.blob, index, checksum))
        for blamed in [blamed for blamed in self._on_its_word if blamed[1:] == (progress.blob, index, checksum)]:
            self._on_its_word.remove(blamed)
            self._state.book.reputation.pardon(blamed[0])

    def _better(self, progress: Progress, words: dict[int, Checksum], basis: Basis) -> None:
        """Take in better words than those before; chunks that differ go."""
        settled, own, have = progress.vouchers.settled, progress.own, progress.have
        differs = [
            index
            for index, word in words.items()
            if settled.get(index, word) != word or (have >> index & 1 and own[index] != word)
        ]
        if differs:
            here = [index for index in differs if have >> index & 1]
            if here:
                self._state.out.append(ForgetChunks(blob=progress.blob, indices=here))
            self.blame(progress, differs, "sent corrupt chunks of", lacking=basis is Basis.SCHEDULER)
        redeemed = progress.vouchers.redeem(words)
        for index, word in words.items():
            self._settle(progress, index, word, basis)
            self._offer(progress, index)
        if redeemed:
            self._ask_doubted(progress, redeemed)

    def _ask_doubted(self, progress: Progress, indices: list[int]) -> None:
        """Ask who was not believed to have these chunks: it may have been right, and will not say so by itself."""
        for peer in self._state.book.peers.values():
            if peer.doubted.get(progress.blob, 0) & chunk_set(indices) and progress.blob in peer.cursors:
                self._state.share_with(peer, progress, reply=False)

    def most_suspect(self, progress: Progress, suspects: list[int]) -> int:
        """Return which of some chunks of a wrong blob to read first: what is disputed, or the word of one who erred."""
        erring = {peer.peer_id for peer in self._state.book.peers.values() if peer.wrong}
        basis = progress.vouchers.basis
        by_them = (index for index in suspects if basis(index)[1] in erring)
        disputed = (index for index in suspects if index in progress.disputed)
        return next(disputed, next(by_them, suspects[0]))

    def blame(self, progress: Progress, indices: list[int], reason: str, *, lacking: bool = False) -> None:
        """Forget wrong chunks and words; blame whose words they were, and senders for what they alone vouched for.

        Args:
            lacking: the right chunks are not here; those who contradicted us may have had them all along.
        """
        vouchers = progress.vouchers
        senders: Counter[PeerId] = Counter()
        words: list[tuple[PeerId, int]] = []
        believed: list[int] = []
        for index in indices:
            basis, by = vouchers.basis(index)
            believed += [index] * (basis is not None)
            sender = progress.senders.get(index)
            if sender is not None and (basis is None or progress.whole):
                senders[sender] += 1
            self._state.counters.corrupt_chunks += sender is not None or progress.have >> index & 1
            if by is not None:
                words.append((by, index))
        progress.lose(indices)
        vouchers.forget(indices)
        self._disbelieve(progress, believed)
        for sender, count in senders.items():
            peer = self._state.book.peers.get(sender)
            liar = progress.whole or (peer is not None and self._mostly_wrong(peer, count, peer.good))
            self._convict(sender, Offence.CORRUPT if liar else Offence.SUSPECT, f"{reason} {progress.blob}")
        for voucher, index in words:
            if (author := self._state.book.peers.get(voucher)) is not None:
                self._false_word(author, progress, index, len(vouchers.resting_on(voucher)))
        self._tell_again(progress, reply=not (lacking and believed))
