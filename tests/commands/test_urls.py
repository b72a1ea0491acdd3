# SPDX-License-Identifier: Apache-2.0
"""Where the verbs look for this node's agent."""

from __future__ import annotations

import pytest

from p2pdist.commands.urls import agent_url


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({}, "http://127.0.0.1:5052"),
        ({"P2PDIST_ADMIN_LISTEN": ""}, "http://127.0.0.1:5052"),
        ({"P2PDIST_ADMIN_LISTEN": "10.0.0.1:80"}, "http://10.0.0.1:80"),
        ({"P2PDIST_ADMIN_LISTEN": "0.0.0.0:5052"}, "http://127.0.0.1:5052"),
        ({"P2PDIST_ADMIN_LISTEN": "[::]:5052"}, "http://[::1]:5052"),
    ],
)
def test_the_agent_is_where_its_listener_is(environ: dict[str, str], url: str) -> None:
    assert agent_url("admin_listen", environ) == url
