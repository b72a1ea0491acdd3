# SPDX-License-Identifier: Apache-2.0
"""The promises of p2pdist.core.addresses."""

from __future__ import annotations

import pytest

from p2pdist.core.addresses import is_ip_literal, is_public_address


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_public_addresses_may_be_dialled(address: str) -> None:
    assert is_public_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:1::1",
        "2001:db8::1",
        "not an address",
    ],
)
def test_inside_addresses_may_not(address: str) -> None:
    assert not is_public_address(address)


@pytest.mark.parametrize(
    ("host", "literal"),
    [
        ("127.0.0.1", True),
        ("[::1]", True),
        ("::1", True),
        ("127.1", True),
        ("2130706433", True),
        ("0x7f000001", True),
        ("registry.example.com", False),
        ("1.example.com", False),
    ],
)
def test_literal_addresses_are_told_from_names(host: str, literal: bool) -> None:
    assert is_ip_literal(host) is literal
