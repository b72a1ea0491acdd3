# SPDX-License-Identifier: Apache-2.0
"""The runtimes that setup and doctor know, by the names that people call them."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from p2pdist.setup import buildkit, containerd, containers, docker, k3s, nerdctl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from p2pdist.setup.plan import Places, Runtime, View

RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {
        "containerd": containerd,
        "k3s": k3s,
        "podman": containers,
        "docker": docker,
        "buildkit": buildkit,
        "nerdctl": nerdctl,
    }
)

ALIASES: Mapping[str, str] = MappingProxyType(
    {"cri-o": "podman", "crio": "podman", "skopeo": "podman", "buildah": "podman"}
)
"""Programs that read the same files as podman."""


def present(view: View, places: Places) -> list[str]:
    """Return the runtimes that are on the host."""
    return [name for name, runtime in RUNTIMES.items() if runtime.found(view, places)]
