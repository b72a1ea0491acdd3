# SPDX-License-Identifier: Apache-2.0
"""Which identity an agent has by its settings: of its own PKI, got before with a token, to be got now, or none."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from p2pdist.errors import ConfigError
from p2pdist.identity.credentials import read_file
from p2pdist.identity.keeper import FilesKeeper, JoinedKeeper, files_of

if TYPE_CHECKING:
    from p2pdist.config import AgentConfig
    from p2pdist.identity.keeper import Keeper


async def keeper_of(config: AgentConfig) -> Keeper | None:
    """Return what keeps the agent's identity; None: it has none, and is not to have one.

    Raises:
        ConfigError: it cannot have the identity that it should have.
    """
    files = files_of(config.ca_file, config.cert_file, config.key_file, config.crl_file)
    if files is not None:
        return FilesKeeper(files)
    directory, rng = config.data_dir / "identity", random.Random()
    schedulers = [(address.host, address.port) for address in config.scheduler]
    if await trio.Path(directory / "agent.pem").exists():
        return JoinedKeeper(directory, schedulers, rng)
    if not config.join:
        return None
    if not schedulers:
        raise ConfigError("join: a token is for joining at a scheduler; give the cluster's with --scheduler HOST:PORT")
    text = config.join
    if text.startswith("@"):
        text = read_file(Path(text[1:]), "join").decode(errors="replace")
    return await JoinedKeeper.join(directory, schedulers, rng, text)
