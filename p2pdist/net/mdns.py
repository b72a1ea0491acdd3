# SPDX-License-Identifier: Apache-2.0
"""Finding peers on the LAN by mDNS/DNS-SD, service type `_p2pdist._tcp` (RFC 6762, 6763).

The only file that imports zeroconf, which runs an asyncio loop in a thread of its own: it is built
and closed in worker threads, and what it finds is handed to trio by the token. Where the host has
no multicast, discovery is off and says so; the agent works on.
"""

from __future__ import annotations

import ipaddress
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import ifaddr  # comes with zeroconf
import trio
from zeroconf import Error, InterfaceChoice, ServiceInfo, ServiceListener, Zeroconf

from p2pdist.core.types import parse_peer_id
from p2pdist.core.wire import PeerAddress
from p2pdist.errors import InvalidInput, PeerUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

SERVICE = "_p2pdist._tcp.local."
LOOK_UP_MS = 3000
CLOSE_S = 3.0


Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def _own_interfaces() -> list[Interface]:
    """Return the addresses of this host with their networks."""
    addresses = [ip for adapter in ifaddr.get_adapters() for ip in adapter.ips]
    return [
        ipaddress.ip_interface(f"{ip.ip if isinstance(ip.ip, str) else ip.ip[0]}/{ip.network_prefix}")
        for ip in addresses
    ]


def _on_lan(own: Sequence[Interface]) -> list[str]:
    """Return the addresses that a neighbour may dial."""
    return [str(at.ip) for at in own if not (at.is_loopback or at.is_link_local or at.is_multicast)]


def nearest(announced: Sequence[str], own: Sequence[Interface]) -> str:
    """Return which of an agent's addresses to dial: one in a network of ours before others.

    What is also an address of ours comes last: every host with containers has the same 172.17.0.1.
    """

    def distance(text: str) -> int:
        address = ipaddress.ip_address(text)
        if any(address == at.ip for at in own):
            return 2
        return 0 if any(address in at.network for at in own) else 1

    return min(announced, key=distance)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


class _Listener(ServiceListener):
    """Runs on zeroconf's thread; hands what it finds to `found` on trio's."""

    def __init__(
        self,
        cluster: str,
        peer_id: str,
        own: Sequence[Interface],
        token: trio.lowlevel.TrioToken,
        found: Callable[[PeerAddress], None],
    ) -> None:
        self._cluster, self._peer_id, self._own, self._token, self._found = cluster, peer_id, own, token, found

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        # Both may end while this thread is in the middle of a look-up.
        with suppress(Error, trio.RunFinishedError):
            info = zc.get_service_info(type_, name, timeout=LOOK_UP_MS)
            address = None if info is None else read_service(info, self._cluster, self._peer_id, self._own)
            if address is not None:
                self._token.run_sync_soon(self._found, address)

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Nothing to do: a peer is gone when its connection is."""


def read_service(info: ServiceInfo, cluster: str, own_id: str, own: Sequence[Interface] = ()) -> PeerAddress | None:
    """Return where the announced agent listens; None where it is us, of another cluster, or malformed."""
    texts = {key: (value or b"").decode("utf-8", "replace") for key, value in info.properties.items()}
    # Link-local IPv6 addresses carry a zone, which means something on one host only.
    addresses = [address for address in info.parsed_addresses() if "%" not in address]
    try:
        peer_id = parse_peer_id(texts.get(b"id", ""))
    except InvalidInput:
        return None
    if peer_id == own_id or texts.get(b"cluster", "") != cluster or not addresses or not info.port:
        return None
    site, rack = texts.get(b"site", "")[:64], texts.get(b"rack", "")[:64]
    return PeerAddress(peer_id, nearest(addresses, own), info.port, site, rack)


async def browse(cluster: str, seconds: float) -> list[PeerAddress]:
    """Return the agents of a cluster that are heard within so many seconds, one on this host among them.

    Raises:
        PeerUnavailable: multicast does not work here; the message says why.
    """
    heard: dict[str, PeerAddress] = {}
    token = trio.lowlevel.current_trio_token()
    interfaces = await trio.to_thread.run_sync(_own_interfaces)
    listener = _Listener(cluster, "", interfaces, token, lambda address: heard.update({address.peer_id: address}))

    def begin() -> Zeroconf:
        zc = Zeroconf(interfaces=InterfaceChoice.All)
        zc.add_service_listener(SERVICE, listener)
        return zc

    try:
        zc = await trio.to_thread.run_sync(begin)
    except (OSError, Error) as error:
        raise PeerUnavailable(f"mDNS is off: {str(error) or type(error).__name__}") from error
    try:
        await trio.sleep(seconds)
    finally:
        with trio.move_on_after(CLOSE_S, shield=True):
            await trio.to_thread.run_sync(zc.close, abandon_on_cancel=True)
    return list(heard.values())


@asynccontextmanager
async def discovery(own: PeerAddress, cluster: str, found: Callable[[PeerAddress], None]) -> AsyncIterator[None]:
    """Announce this agent and call `found` for each other one of the cluster, while the context is open.

    Args:
        own: this agent. Where its host is an address of this machine, mDNS speaks on that interface alone;
            an address of elsewhere is announced everywhere, and a name or nothing stands for all addresses.

    Raises:
        PeerUnavailable: multicast does not work here; the message says why.
    """
    token = trio.lowlevel.current_trio_token()
    interfaces = await trio.to_thread.run_sync(_own_interfaces)
    addresses = [own.host] if _is_address(own.host) else _on_lan(interfaces)
    here = any(str(at.ip) == own.host and at.version == 4 for at in interfaces)
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
        zc = Zeroconf(interfaces=[own.host] if here else InterfaceChoice.All)
        try:
            # Names are random 128 bits: probing for conflicts would only cost 0.75 s.
            zc.register_service(info, cooperating_responders=True)
            zc.add_service_listener(SERVICE, _Listener(cluster, own.peer_id, interfaces, token, found))
        except BaseException:
            zc.close()
            raise
        return zc

    def end(zc: Zeroconf) -> None:
        with suppress(Error, OSError):
            zc.unregister_service(info)
        zc.close()

    try:
        zc = await trio.to_thread.run_sync(begin)
    except (OSError, Error) as error:
        raise PeerUnavailable(f"mDNS is off: {str(error) or type(error).__name__}") from error
    try:
        yield
    finally:
        with trio.move_on_after(CLOSE_S, shield=True):
            await trio.to_thread.run_sync(end, zc, abandon_on_cancel=True)
