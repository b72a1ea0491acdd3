# SPDX-License-Identifier: Apache-2.0
"""Which addresses are on the public internet (the guard against requests forged toward the inside), and which tell
peers apart."""

from __future__ import annotations

import ipaddress

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_6TO4 = ipaddress.IPv6Network("2002::/16")


def is_ip_literal(host: str) -> bool:
    """Return whether `host` is an IPv4 or IPv6 address, brackets allowed, rather than a name."""
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]").partition("%")[0])
    except ValueError:
        # What the resolver takes for IPv4 although it is not dotted quad: 127.1, 0x7f000001, 2130706433.
        return all(part[:1].isdigit() for part in host.split("."))
    return True


def telling(host: str) -> str:
    """Return an address where it tells one machine from another, empty where it does not: loopback, or a name."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return "" if address.is_loopback or address.is_unspecified else str(address)


def is_public_address(text: str) -> bool:
    """Return whether an address, as a resolver gives it, is globally routed unicast.

    IPv6 forms that carry an IPv4 address (mapped, NAT64, 6to4) are judged by that address.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        carried = _carried_ipv4(address)
        if carried is not None:
            return is_public_address(str(carried))
        if address.scope_id is not None or address.is_site_local or address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _carried_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.sixtofour if address in _6TO4 else None
