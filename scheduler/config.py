# SPDX-License-Identifier: Apache-2.0
"""The scheduler's settings; loaded like the agent's (p2pdist/config.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from p2pdist.config import Address, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Everything that can be set for `p2pdist scheduler`."""

    listen: Address = setting(Address("0.0.0.0", 5060), "Where agents connect, HOST:PORT.", flag="--listen")
    api_listen: Address = setting(
        Address("127.0.0.1", 5061), "Where the HTTP API and `/metrics` answer, HOST:PORT.", flag="--api-listen"
    )
    data_dir: Path = setting(
        Path("/var/lib/p2pdist-scheduler"),
        "Kept for what a scheduler must remember; nothing is stored today, its state comes back from the agents.",
        flag="--data-dir",
    )
    ca_dir: Path | None = setting(
        None,
        "The cluster's CA, made by `p2pdist cluster init`: turns identity on; see docs/identity.md.",
        flag="--ca-dir",
    )
    certificate_s: float = setting(
        7 * 86400.0,
        "Seconds for which a certificate is valid; it is renewed at half of that.",
        low=10,
        high=366 * 86400,
    )
    ca_file: Path | None = setting(
        None, "The CA of the cluster's certificates, where they come from a PKI of your own."
    )
    cert_file: Path | None = setting(
        None, "This scheduler's certificate from it, with those in between; re-read on SIGHUP."
    )
    key_file: Path | None = setting(None, "The certificate's key.")
    crl_file: Path | None = setting(None, "The PKI's certificate revocation list, if it has one.")
    cluster: str = setting(
        "default", "The name of the cluster; agents of another are refused.", pattern=r"[\w.-]{1,63}"
    )
    degree: int = setting(20, "Neighbours per agent in a swarm too large for a full mesh.", low=4, high=100)
    tag_ttl_s: float = setting(
        5.0, "Seconds for which an answer of the origin about a tag is shared.", low=0, high=3600
    )
    max_agents: int = setting(20_000, "Connected agents; further ones are refused.", low=1, high=1_000_000)
    shutdown_grace_s: float = setting(2.0, "Seconds to let running API requests end.", low=0, high=60)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "`debug`, `info`, `warning` or `error`.")
    log_format: Literal["auto", "console", "json"] = setting(
        "auto", "`console`, `json`, or `auto`: console on a terminal, JSON elsewhere."
    )
