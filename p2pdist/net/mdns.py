# SPDX-License-Identifier: Apache-2.0
"""Finding peers on the LAN by mDNS/DNS-SD, service type `_p2pdist._tcp` (RFC 6762, 6763).

The only file that imports zeroconf, which runs an asyncio loop in a thread of its own: it is built
and closed in worker threads, and what it finds is handed to trio by the token. Where the host has
no multicast, discovery is off and says so; the agent works on.
"""

from __future__ import annotations

import ipaddress
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import ifaddr  # comes with zeroconf
import trio
from zeroconf import InterfaceChoice, ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

from p2pdist.core.types import parse_peer_id
from p2pdist.core.wire import PeerAddress
from p2pdist.errors import InvalidInput, PeerUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SERVICE = "_p2pdist._tcp.local."
LOOK_UP_MS = 3000
CLOSE_S = 3.0


def _own_addresses() -> list[str]:
    """Return the addresses of this host that a neighbour may dial, without loopback."""
    found = []
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            address = ipaddress.ip_address(text)
            if not (address.is_loopback or address.is_link_local or address.is_multicast):
                found.append(text)
    return found


class _Listener(ServiceListener):
    """Runs on zeroconf's thread; hands what it finds to `found` on trio's."""

    def __init__(
        self, cluster: str, own: str, token: trio.lowlevel.TrioToken, found: Callable[[PeerAddress], None]
    ) -> None:
        self._cluster, self._own, self._token, self._found = cluster, own, token, found

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        info = zc.get_service_info(type_, name, timeout=LOOK_UP_MS)
        address = None if info is None else read_service(info, self._cluster, self._own)
        if address is None:
            return
        try:
            self._token.run_sync_soon(self._found, address)
        except trio.RunFinishedError:
            return

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Nothing to do: a peer is gone when its connection is."""


def read_service(info: ServiceInfo, cluster: str, own: str) -> PeerAddress | None:
    """Return where the announced agent listens; None where it is us, of another cluster, or malformed."""
    texts = {key: (value or b"").decode("utf-8", "replace") for key, value in info.properties.items()}
    addresses = info.parsed_addresses()
    try:
        peer_id = parse_peer_id(texts.get(b"id", ""))
    except InvalidInput:
        return None
    if peer_id == own or texts.get(b"cluster", "") != cluster or not addresses or not info.port:
        return None
    return PeerAddress(peer_id, addresses[0], info.port, texts.get(b"site", "")[:64], texts.get(b"rack", "")[:64])


@asynccontextmanager
async def discovery(own: PeerAddress, cluster: str, found: Callable[[PeerAddress], None]) -> AsyncIterator[None]:
    """Announce this agent and call `found` for each other one of the cluster, while the context is open.

    Args:
        own: this agent; an empty host announces all addresses of the machine.

    Raises:
        PeerUnavailable: multicast does not work here; the message says why.
    """
    token = trio.lowlevel.current_trio_token()
    addresses = [own.host] if own.host else _own_addresses()
    if not addresses:
        raise PeerUnavailable("mDNS is off: this host has no address but loopback")
    info = ServiceInfo(
        SERVICE,
        f"{own.peer_id}.{SERVICE}",
        port=own.port,
        parsed_addresses=addresses,
        properties={"id": own.peer_id, "cluster": cluster, "site": own.site, "rack": own.rack},
        server=f"p2pdist-{own.peer_id}.local.",
    )

    def begin() -> Zeroconf:
        zc = Zeroconf(interfaces=InterfaceChoice.All)
        try:
            # Names are random 128 bits: probing for conflicts would only cost 0.75 s.
            zc.register_service(info, cooperating_responders=True)
            ServiceBrowser(zc, SERVICE, _Listener(cluster, own.peer_id, token, found))
        except BaseException:
            zc.close()
            raise
        return zc

    def end(zc: Zeroconf) -> None:
        zc.unregister_service(info)
        zc.close()

    try:
        zc = await trio.to_thread.run_sync(begin)
    except OSError as error:
        raise PeerUnavailable(f"mDNS is off: {error}") from error
    try:
        yield
    finally:
        with trio.move_on_after(CLOSE_S, shield=True):
            await trio.to_thread.run_sync(end, zc, abandon_on_cancel=True)
