# SPDX-License-Identifier: Apache-2.0
"""Where this node's agent is, for the verbs that talk to it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from p2pdist.config import Address, AgentConfig, environment_name, load
from p2pdist.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def agent_url(key: str, environ: Mapping[str, str]) -> str:
    """Return the base URL of the agent's listener `key`, as its variable or else its default says.

    Raises:
        ConfigError: the variable is no address.
    """
    name = environment_name(key)
    default = next(field.default for field in dataclasses.fields(AgentConfig) if field.name == key)
    try:
        address = Address.parse(environ[name]) if environ.get(name) else default
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    assert isinstance(address, Address)
    return url_of(address)


def url_of(listens: Address) -> str:
    """Return the URL under which this node reaches what listens there."""
    return f"http://{Address(_ANYWHERE.get(listens.host, listens.host), listens.port)}"


def agent_config(file: Path | None, environ: Mapping[str, str]) -> AgentConfig:
    """Return this node's agent's settings, from its file and environment.

    Raises:
        ConfigError: they cannot be used.
    """
    return load(AgentConfig, file=file, environ=environ, flags={})
