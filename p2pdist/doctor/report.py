# SPDX-License-Identifier: Apache-2.0
"""What a check is: a stable name, a result, one line of what is so and one of what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Result(StrEnum):
    """How a check ended; `warn` is worth a look but hinders no pull, `skip` could not be looked at."""

    OK = "ok"
    SKIP = "skip"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One check's answer.

    Args:
        name: one of CHECKS; `about` says of what, where there are several.
        what: what was found, one line.
        todo: what to do about it; empty where nothing has to be done.
    """

    name: str
    result: Result
    what: str
    todo: str = ""
    about: str = ""

    def __post_init__(self) -> None:
        assert self.name in CHECKS, self.name


def ok(name: str, what: str, *, about: str = "") -> Check:
    return Check(name, Result.OK, what, about=about)


def skip(name: str, what: str) -> Check:
    return Check(name, Result.SKIP, what)


def warn(name: str, what: str, todo: str, *, about: str = "") -> Check:
    return Check(name, Result.WARN, what, todo, about)


def fail(name: str, what: str, todo: str, *, about: str = "") -> Check:
    return Check(name, Result.FAIL, what, todo, about)


CHECKS: Mapping[str, str] = MappingProxyType(
    {
        "agent": "The agent's admin port answers.",
        "mirror": "The mirror that runtimes ask answers.",
        "version": "The agent runs the version that is installed.",
        "open-files": "The agent may open as many files as its connections can need.",
        "data-dir": "The agent can write to its data directory.",
        "disk-space": "The file system of the data directory has room.",
        "runtime": "A container runtime is told to ask the agent first; one check per runtime.",
        "canary": "A pull as that runtime does it came from the agent; one check per runtime.",
        "peers": "The agent is connected to other agents.",
        "mdns": "Agents on this network hear of each other by multicast.",
        "peer-versions": "All agents run the same version.",
        "scheduler": "The schedulers are connected, where any are configured.",
        "identity": "The agent's certificate is good and renewed in time, where it has one.",
        "origin-dns": "The registries' names resolve.",
        "origin-connect": "The registries' ports can be reached.",
        "origin-tls": "The registries' certificates are trusted.",
        "origin-api": "The registries answer as registries do.",
        "origin-auth": "The registries' token services answer.",
        "clock": "This host's clock agrees with the registries'.",
    }
)
"""Every check by name, in the order of the report. Names are a contract: scripts match them (docs/doctor.md)."""


def in_order(checks: list[Check]) -> list[Check]:
    """Return the checks in the order of CHECKS."""
    order = list(CHECKS)
    return sorted(checks, key=lambda check: (order.index(check.name), check.about))
