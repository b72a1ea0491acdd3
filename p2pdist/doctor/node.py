# SPDX-License-Identifier: Apache-2.0
"""What the doctor knows of a node: the agent's settings as its file has them, and its own account where it runs.

The account wins: flags of the running agent are not in the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2pdist.config import RegistryConfig
from p2pdist.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from p2pdist.config import AgentConfig


@dataclass(frozen=True, slots=True)
class Node:
    """One node.

    Args:
        admin: the base URL of the agent's admin port.
        config: the settings of its file and environment.
        status: the agent's `/status`, empty where it does not answer.
        metrics: the agent's `/metrics` without labels, by name.
    """

    admin: str
    config: AgentConfig
    status: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def mirror(self) -> str:
        """Return where runtimes have to ask."""
        return f"http://{_loopback(str(self.status.get('mirror') or self.config.mirror_listen))}"

    @property
    def registries(self) -> dict[str, RegistryConfig]:
        told = self.status.get("registries")
        if not isinstance(told, dict):
            return dict(self.config.registries)
        try:
            return {name: RegistryConfig(entry["url"], _path(entry.get("ca_file"))) for name, entry in told.items()}
        except (ConfigError, LookupError, TypeError, AttributeError):
            return dict(self.config.registries)

    @property
    def data_dir(self) -> Path:
        return Path(str(self.status.get("data_dir") or self.config.data_dir))

    @property
    def to_runtime_bytes(self) -> int:
        """Return the bytes that the mirror has sent so far."""
        return int(self.status.get("bytes", {}).get("to_runtime", 0))


def _path(text: object) -> Path | None:
    return Path(text) if isinstance(text, str) and text else None


def _loopback(address: str) -> str:
    """Return an address to ask at for one that means all of them."""
    return address.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:")
