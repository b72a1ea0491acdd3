# SPDX-License-Identifier: Apache-2.0
"""Which peers this agent is connected to: whom it has heard of, whom it dials, whom it lets in.

Peers named by the scheduler are dialled at once, those found by mDNS as long as there are fewer than
`degree` connections. Where no scheduler says who fetches what, agents have to know each other: all of a
LAN are dialled, up to four times as many. Two agents have one connection: where both dialled, both keep
the one that the smaller peer id dialled. A peer that does not answer is tried again after a growing pause.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import trio

from p2pdist.core.addresses import telling
from p2pdist.core.peerbook import MESH_PER_DEGREE
from p2pdist.core.rate import TokenBucket
from p2pdist.core.reputation import Offence
from p2pdist.core.uplink import LOOK_S, Uplink
from p2pdist.core.wire import SPAN_BYTES, Decoder, Hello, PeerAddress
from p2pdist.errors import FloodError, IdentityRefused, P2PDistError, PeerUnavailable, RemoteProtocolError
from p2pdist.identity.channel import secure
from p2pdist.net.peer_link import HELLO_S, ClearChannel, PeerLink, address_of, connect, detach, greet

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Hashable

    from p2pdist.core.types import PeerId
    from p2pdist.core.uplink import Sent
    from p2pdist.exchange import Exchange
    from p2pdist.identity.credentials import Identity
    from p2pdist.identity.refusals import Refusals
    from p2pdist.net.peer_link import Channel

log = structlog.get_logger(__name__)

MAX_KNOWN = 4096
MAX_DIALS = 16
MAX_GREETING = 64
"""Inbound connections that have not said who they are; more are closed at once."""
MAX_PER_ADDRESS = 16
"""Of these, and of connections, from one address (not loopback): a single host must not take all places. Agents behind
one address translator share them."""
FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 60.0
SCHEDULER_TRIES = 4
"""Peers that only the scheduler named are forgotten after so many failures: it names them again."""
YOUNG_S = 5.0
"""Two connections made within this are taken for both sides dialling; later ones for a peer that came back."""
REVIEW_S = 2.0


@dataclass(slots=True)
class _Known:
    address: PeerAddress
    source: str
    failures: int = 0
    not_before: float = 0.0
    dialling: bool = False


class Neighbourhood:
    """All peers known. `run` dials; `accept` serves those that dial us.

    With an identity both sides of each connection show a certificate, and the peer's id is what that says.
    """

    exchange: Exchange
    """Set once by the composition root."""
    identity: Identity | None = None
    refusals: Refusals
    """Set with the identity."""

    def __init__(
        self, own_hello: Callable[[], Hello], *, degree: int, max_peers: int, upload_limit: TokenBucket | None = None
    ) -> None:
        self.known: dict[PeerId, _Known] = {}
        self.telling = telling
        """Which address tells one machine from another."""
        self._own_hello = own_hello
        self._degree = degree
        self._max_peers = max_peers
        self._upload_limit = upload_limit
        self._uplink = Uplink()
        self._found_limit: TokenBucket | None = None
        """That of a slow uplink."""
        self._dials = trio.CapacityLimiter(MAX_DIALS)
        self._dialling = 0
        self._greeting: Counter[str] = Counter()
        """Inbound connections that have not said who they are, by address."""
        self._changed = trio.Event()

    def limit_uploads(self, limit: TokenBucket | None) -> None:
        """Hold what all peers together are sent to another limit, or to none."""
        self._upload_limit = limit
        self._hold_to_limit()

    @property
    def _limit(self) -> TokenBucket | None:
        """The tighter limit of those that there are."""
        limits = [limit for limit in (self._upload_limit, self._found_limit) if limit is not None]
        return min(limits, key=lambda limit: limit.bytes_per_s, default=None)

    def _hold_to_limit(self) -> None:
        limit = self._limit
        for link in self.exchange.links.values():
            link.limit = limit

    async def _watch_uplink(self) -> None:
        """Send no more than a slow uplink carries."""
        while True:
            await trio.sleep(LOOK_S)
            if not self.exchange.machine.busy:
                continue
            links = self.exchange.links.values()
            seen: dict[Hashable, Sent] = {link: sent for link in links if (sent := link.sent()) is not None}
            self._uplink.look(seen, trio.current_time())
            self._found(self._uplink.bytes_per_s)

    def _found(self, bytes_per_s: int) -> None:
        """Take over what the uplink carries, 0 where it is not slow."""
        self.exchange.machine.hold_to(bytes_per_s)
        if not bytes_per_s:
            self._found_limit = None
        elif self._found_limit is None:
            log.info("the uplink is slow; what is sent is held to it", bytes_per_s=bytes_per_s)
            self._found_limit = TokenBucket(bytes_per_s, SPAN_BYTES)
        else:
            self._found_limit.change(bytes_per_s, trio.current_time())
        self._hold_to_limit()

    def learn(self, address: PeerAddress, source: str) -> None:
        """Take note of a peer; dial it soon if it is one to be connected to."""
        if address.peer_id == self._own_hello().peer_id:
            return
        known = self.known.get(address.peer_id)
        if known is None:
            if len(self.known) >= MAX_KNOWN:
                return
            known = self.known[address.peer_id] = _Known(address, source)
        elif known.address != address or source == "scheduler":
            known.address, known.failures, known.not_before = address, 0, 0.0
        if source == "scheduler":
            known.source = source
        self._changed.set()

    async def run(self) -> None:
        """Dial whom we should be connected to, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_uplink)
            while True:
                self._changed = trio.Event()
                if self.identity is not None:
                    self._part_with_strangers(self.identity)
                for known in list(self.known.values()):
                    if self._should_dial(known):
                        known.dialling = True
                        self._dialling += 1
                        nursery.start_soon(self._dial, known)
                with trio.move_on_after(REVIEW_S):
                    await self._changed.wait()

    def _part_with_strangers(self, identity: Identity) -> None:
        """End the connections of those that are revoked or expired, and, in a quiet moment, one that our own renewal
        has left behind, so that it is made anew before it expires in the middle of a transfer."""
        quiet = not self.exchange.machine.busy
        for link in list(self.exchange.links.values()):
            if link.channel.holder is None:
                continue
            if why := identity.still(link.channel.holder):
                log.warning("peer dropped", peer=link.peer_id, address=link.address, why=why)
                link.close(why)
            elif link.idle and (link.channel.worn or (quiet and link.credential is not identity.credential)):
                quiet = False
                link.close("it is to be made anew, with new keys")

    def _should_dial(self, known: _Known) -> bool:
        peer, now, links = known.address.peer_id, trio.current_time(), self.exchange.links
        if known.dialling or peer in links or known.not_before > now:
            return False
        if self.exchange.machine.book.is_banned(peer, now):
            return False
        sought = self._degree if self.exchange.machine.state.scheduled else MESH_PER_DEGREE * self._degree
        limit = self._max_peers if known.source == "scheduler" else min(sought, self._max_peers)
        return len(links) + self._dialling < limit

    async def _dial(self, known: _Known) -> None:
        address = known.address
        try:
            link = await self._reach(known)
            await self._run(link)
            known.failures = 0
            known.not_before = trio.current_time() + FIRST_PAUSE_S
        except P2PDistError as error:
            known.failures += 1
            pause_s = min(FIRST_PAUSE_S * 2**known.failures, LAST_PAUSE_S)
            known.not_before = trio.current_time() + pause_s
            log.debug("peer not reached", peer=address.peer_id, host=address.host, port=address.port, why=str(error))
            if known.source == "scheduler" and known.failures >= SCHEDULER_TRIES:
                self.known.pop(address.peer_id, None)
        finally:
            known.dialling = False

    async def _reach(self, known: _Known) -> PeerLink:
        address = known.address
        try:
            async with self._dials:
                sock = await connect(address.host, address.port)
            return await self._greet(sock, dialled=True, source=known.source, expected=address.peer_id)
        finally:
            self._dialling -= 1

    async def accept(self, stream: trio.SocketStream) -> None:
        """Serve a peer that dialled us, until it goes; nothing that it does ends the agent."""
        place = self._place_of(stream)
        if self._greeting.total() >= MAX_GREETING or (place and self._greeting[place] >= MAX_PER_ADDRESS):
            await trio.aclose_forcefully(stream)
            return
        self._greeting[place] += 1
        try:
            link = await self._greet(detach(stream), dialled=False, source="inbound", expected=None)
        except P2PDistError as error:
            log.debug("inbound peer refused", why=str(error))
            return
        finally:
            self._greeting -= Counter((place,))
        await self._run(link)

    async def _greet(self, sock: socket.socket, *, dialled: bool, source: str, expected: PeerId | None) -> PeerLink:
        """Return the link to the peer at the other end, admitted; else the socket is closed and P2PDistError raised."""
        decoder = Decoder()
        host = ""
        try:
            host = address_of(sock)[0]
            channel = await self._channel(sock, dialled=dialled, expected=expected)
            hello, early = await greet(channel, self._own_hello(), decoder)
            link = PeerLink(
                channel,
                hello,
                self.exchange,
                decoder=decoder,
                early=early,
                dialled=dialled,
                source=source,
                limit=self._limit,
                credential=self.identity.credential if self.identity is not None else None,
            )
            self._admit(link, expected)
        except BaseException as error:
            sock.close()
            if isinstance(error, IdentityRefused):
                self.refusals.note("peers", host, error)
            raise
        return link

    async def _channel(self, sock: socket.socket, *, dialled: bool, expected: PeerId | None) -> Channel:
        if self.identity is None:
            return ClearChannel(sock)
        return await secure(
            sock, self.identity, server_side=not dialled, role="agent", deadline_s=HELLO_S, expected=expected
        )

    async def _run(self, link: PeerLink) -> None:
        """Run an admitted link until it ends."""
        why = "closed"
        try:
            await link.run()
        except RemoteProtocolError as error:
            why = str(error)
            log.warning("peer broke the protocol", peer=link.peer_id, address=link.address, why=why)
            offence = Offence.FLOOD if isinstance(error, FloodError) else Offence.PROTOCOL
            self.exchange.offended(link.peer_id, offence, why)
        except P2PDistError as error:
            why = str(error)
        finally:
            self.exchange.remove_link(link)
            log.debug("peer gone", peer=link.peer_id, address=link.address, why=link.why or why)

    def _admit(self, link: PeerLink, expected: PeerId | None) -> None:
        """Make it the link to its peer; raises PeerUnavailable where it may not be."""
        own, peer, now = self._own_hello().peer_id, link.peer_id, trio.current_time()
        if peer == own:
            raise PeerUnavailable("that is this agent itself")
        if expected is not None and peer != expected:
            self.known.pop(expected, None)
            raise PeerUnavailable(f"another agent listens there than the one expected ({expected})")
        if self.exchange.machine.book.is_banned(peer, now, self.telling(link.host)):
            raise PeerUnavailable("the peer is banned for now")
        old = self.exchange.links.get(peer)
        if old is not None:
            dialler = own if link.dialled else peer
            if now - old.since < YOUNG_S and old.dialled != link.dialled and dialler != min(own, peer):
                raise PeerUnavailable("there is a connection to this peer already")
            old.close("another connection to the same peer took its place")
            self.exchange.remove_link(old)
        elif len(self.exchange.links) >= self._max_peers:
            raise PeerUnavailable(f"there are {self._max_peers} connections already")
        elif not link.dialled and self._connected_from(self.telling(link.host)) >= MAX_PER_ADDRESS:
            raise PeerUnavailable(f"there are {MAX_PER_ADDRESS} connections from {link.host} already")
        self.exchange.add_link(link)
        log.debug("peer connected", peer=peer, address=link.address, source=link.source)

    def _connected_from(self, place: str) -> int:
        """Return the connections from an address; 0 where it tells nobody apart."""
        return sum(self.telling(link.host) == place for link in self.exchange.links.values()) if place else 0

    def _place_of(self, stream: trio.SocketStream) -> str:
        """Return where a connection comes from; empty where that tells nobody apart."""
        try:
            return self.telling(stream.socket.getpeername()[0])
        except OSError:
            return ""
