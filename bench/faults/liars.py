# SPDX-License-Identifier: Apache-2.0
"""Lying peers beside a rollout: started on hosts of their own, and what agents said of them afterwards."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from bench.lab import liar, ready
from bench.lab.agents import REGISTRY_NAME, scheduler_address
from bench.lab.lying_peer import Behaviour

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench.crowd import Rollout, Stage
    from bench.lab.agents import Agent
    from bench.lab.images import Image
    from bench.lab.processes import Process, ProcessGroup

_READY_TIMEOUT_S = 30.0
_LOOK_EVERY_S = 1.0
CORRUPTING = (Behaviour.CORRUPT, Behaviour.FORGE)
STALLING = (Behaviour.STALL, Behaviour.TRICKLE)


def behaviours(stalling: int, corrupting: int, seed: int) -> dict[str, Behaviour]:
    """Return the hosts of the lying peers and what they do; odd seeds begin with the first kind of each sort."""
    chosen = [STALLING[(seed + 1 + number) % 2] for number in range(stalling)]
    chosen += [CORRUPTING[(seed + 1 + number) % 2] for number in range(corrupting)]
    return {f"liar{number}": behaviour for number, behaviour in enumerate(chosen, start=1)}


@dataclass(frozen=True, slots=True)
class Blame:
    """What came of one corrupting peer's wrong chunks at one agent.

    Args:
        named_s: from the first wrong chunk to the line of the agent's log that names the peer; None: never.
    """

    liar: str
    node: str
    named_s: float | None


@dataclass(slots=True)
class Company:
    """The lying peers of one rollout."""

    stage: Stage
    image: Image
    kinds: dict[str, Behaviour]
    _processes: dict[str, Process] = field(default_factory=dict)

    async def start(self, group: ProcessGroup) -> None:
        """Start them, and wait until they may be told to join. Raises LabError."""
        lab = self.stage.lab
        for name, behaviour in self.kinds.items():
            self._processes[name] = liar.start(
                group,
                lab[name],
                behaviour,
                scheduler=scheduler_address(lab["scheduler"]),
                registry=REGISTRY_NAME,
                blobs={layer.digest: layer.size_bytes for layer in self.image.layers},
            )
        for process in self._processes.values():
            await ready.until(partial(_is_ready, process), process, _READY_TIMEOUT_S)

    async def run(self, _: Rollout) -> None:
        """Let them join now, and see that they go on. Raises LabError: one has ended."""
        for process in self._processes.values():
            process.send_signal(signal.SIGUSR1)
        while True:
            await trio.sleep(_LOOK_EVERY_S)
            for process in self._processes.values():
                process.check()

    def blames(self, agents: tuple[Agent, ...]) -> list[Blame]:
        """Return for each corrupting peer, and each agent that it sent a whole wrong chunk, when it was named."""
        logs = {_peer_id(agent.process.log): agent for agent in agents}
        found = []
        for name, behaviour in self.kinds.items():
            if behaviour not in CORRUPTING:
                continue
            for peer, first in _first_wrong(self._processes[name].log).items():
                if agent := logs.get(peer):
                    named_s = _named_s(agent.process.log, name, first)
                    found.append(Blame(f"{name} ({behaviour})", agent.host.name, named_s))
        return found

    def unnamed(self, agents: tuple[Agent, ...]) -> list[str]:
        """Return the corrupting peers that no agent has banned."""
        names = [name for name, behaviour in self.kinds.items() if behaviour in CORRUPTING]
        return [name for name in names if not any(_bans(agent.process.log, name) for agent in agents)]


async def _is_ready(process: Process) -> bool:
    return any(entry["event"] == liar.READY for entry in _entries(process.log))


def _entries(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith('{"') and line.endswith("}"):
            yield json.loads(line)


def _peer_id(log: Path) -> str:
    return next((entry["peer_id"] for entry in _entries(log) if "peer_id" in entry), "")


def _first_wrong(log: Path) -> dict[str, datetime]:
    """Return by agent when it had been sent its first wrong chunk."""
    first: dict[str, datetime] = {}
    for entry in _entries(log):
        if entry["event"] == liar.SENT:
            first.setdefault(entry["peer"], datetime.fromisoformat(entry["time"]))
    return first


def _bans(log: Path, liar_name: str) -> list[datetime]:
    """Return when an agent's log says that a liar is banned."""
    peer = liar.peer_id_of(liar_name)
    lines = (entry for entry in _entries(log) if entry.get("peer") == peer and entry.get("banned_s"))
    return [datetime.fromisoformat(entry["time"]) for entry in lines]


def _named_s(log: Path, liar_name: str, since: datetime) -> float | None:
    """Return how long after its first wrong chunk a liar is banned by an agent, in seconds; 0 where it was before."""
    bans = _bans(log, liar_name)
    return max(0.0, (bans[0] - since).total_seconds()) if bans else None
