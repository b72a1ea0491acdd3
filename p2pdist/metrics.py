# SPDX-License-Identifier: Apache-2.0
"""The agent's metrics, read from its parts at each scrape: the hot path only adds to plain integers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import trio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from p2pdist.core.reputation import Offence
from p2pdist.core.schedulers import IN_USE
from p2pdist.identity import standing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

    from p2pdist.agent import Agent
    from p2pdist.net.origin import OriginClient

_SWARM_DOCS = {
    "from_peers": "Chunk bytes received from peers.",
    "from_origin": "Chunk bytes read from origins.",
    "to_peers": "Chunk bytes sent to peers.",
    "duplicate": "Chunk bytes received that were here already.",
    "corrupt_chunks": "Chunks whose checksum was wrong.",
    "late_chunks": "Chunks that a peer did not deliver in time.",
    "grants": "Upload slots offered to peers.",
    "declines": "Offers that peers declined.",
}
_BYTES = ("from_peers", "from_origin", "to_peers", "duplicate")


class AgentCollector(Collector):
    """Everything but the mirror's own counters."""

    def __init__(self, agent: Agent, origin: OriginClient) -> None:
        self._agent = agent
        self._origin = origin

    def describe(self) -> list[Metric]:
        """Promise no names: the families are made at each scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        agent = self._agent
        for name, value in dataclasses.asdict(agent.machine.counters).items():
            unit = "_bytes" if name in _BYTES else ""
            yield CounterMetricFamily(f"p2pdist_swarm_{name}{unit}", _SWARM_DOCS[name], value)
        yield CounterMetricFamily(
            "p2pdist_control_bytes", "Message bytes to peers and scheduler.", agent.control_bytes()
        )
        yield CounterMetricFamily("p2pdist_images_pulled", "Images whose every blob is here.", agent.images.pulled)
        yield CounterMetricFamily(
            "p2pdist_access_checks", "Times that an origin was asked for a right.", agent.gate.checks
        )
        yield CounterMetricFamily(
            "p2pdist_access_refused", "Requests that rules or origins refused.", agent.gate.refused
        )
        yield from self._ban_metrics()
        yield from standing.metrics(agent.identity, agent.refusals)
        yield GaugeMetricFamily("p2pdist_peers", "Connected peers.", len(agent.exchange.links))
        yield GaugeMetricFamily("p2pdist_pulls", "Blobs on their way.", len(agent.puller.arrivals))
        yield GaugeMetricFamily("p2pdist_tasks", "Running tasks.", trio.lowlevel.current_statistics().tasks_living)
        yield from self._scheduler_metrics()
        for name, value in agent.store.statistics().items():
            yield GaugeMetricFamily(f"p2pdist_store_{name}", f"The store's {name.replace('_', ' ')}.", value)
        failing = int(agent.upkeep.failing is not None)
        yield GaugeMetricFamily("p2pdist_store_failing", "1 while the disk takes no bytes.", failing)
        reloads = agent.settings
        yield CounterMetricFamily("p2pdist_config_reloads", "Times that settings were reloaded.", reloads.reloads)
        failed = int(reloads.failed is not None)
        yield GaugeMetricFamily("p2pdist_config_reload_failed", "1 while the file last read is unusable.", failed)
        yield from self._origin_metrics()

    def _ban_metrics(self) -> Iterator[Metric]:
        machine = self._agent.machine
        reputation = machine.book.reputation
        bans = CounterMetricFamily("p2pdist_peer_bans", "Peers sent away, by what they did.", labels=["reason"])
        for offence in Offence:
            bans.add_metric([offence], reputation.bans[offence])
        yield bans
        banned = len(reputation.banned(machine.state.now))
        yield GaugeMetricFamily("p2pdist_peers_banned", "Peers not talked to at the moment.", banned)

    def _scheduler_metrics(self) -> Iterator[Metric]:
        tracker = self._agent.tracker
        connected = int(tracker is not None and bool(tracker.connected))
        yield GaugeMetricFamily("p2pdist_scheduler_connected", "1 while a scheduler is connected.", connected)
        up = GaugeMetricFamily("p2pdist_scheduler_up", "1 while this scheduler is in use.", labels=["scheduler"])
        swarms = GaugeMetricFamily(
            "p2pdist_scheduler_joined_swarms",
            "Blobs on their way that this scheduler coordinates.",
            labels=["scheduler"],
        )
        for each in tracker.status() if tracker is not None else ():
            up.add_metric([each.address], int(each.state == IN_USE))
            swarms.add_metric([each.address], each.swarms)
        yield from (up, swarms)

    def _origin_metrics(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily] = {}
        for registry, counts in self._origin.statistics().items():
            for name, value in counts.items():
                family = families.setdefault(
                    name, CounterMetricFamily(f"p2pdist_origin_{name}", f"Origins' {name}.", labels=["registry"])
                )
                family.add_metric([registry], value)
        yield from families.values()
