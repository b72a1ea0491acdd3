# SPDX-License-Identifier: Apache-2.0
"""The scheduler's HTTP API: health, metrics, and what it knows, for people and programs. Read only."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from p2pdist import __version__
from p2pdist.identity import standing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric
    from starlette.requests import Request

    from scheduler.server import SchedulerServer

MAX_LISTED = 1000
"""Agents and swarms in one /status answer."""


class _SchedulerCollector(Collector):
    """Reads the state at each scrape: nothing is counted twice, and the hot path counts nothing."""

    def __init__(self, server: SchedulerServer) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        state, doorway = self._server.state, self._server.doorway
        yield from standing.metrics(doorway.identity, doorway.refusals)
        yield GaugeMetricFamily("p2pdist_scheduler_agents", "Connected agents.", len(state.members))
        out = len(state.reports.out)
        yield GaugeMetricFamily("p2pdist_scheduler_agents_shut_out", "Agents that a quorum of others has banned.", out)
        yield GaugeMetricFamily("p2pdist_scheduler_swarms", "Blobs that some agent wants.", len(state.swarms))
        led = sum(not swarm.closed for swarm in state.swarms.values())
        yield GaugeMetricFamily("p2pdist_scheduler_swarms_led", "Of these, those that this scheduler leases of.", led)
        live = len(state.leading.live)
        yield GaugeMetricFamily("p2pdist_scheduler_schedulers", "Schedulers that most agents count on.", live)
        leases = sum(len(swarm.leases) for swarm in state.swarms.values())
        yield GaugeMetricFamily("p2pdist_scheduler_leases", "Chunks leased at the moment.", leases)
        yield CounterMetricFamily("p2pdist_scheduler_leases_granted", "Leases granted.", state.leases_granted)
        yield CounterMetricFamily("p2pdist_scheduler_leases_lapsed", "Leases not renewed in time.", state.leases_lapsed)
        yield CounterMetricFamily("p2pdist_scheduler_messages_received", "From agents.", self._server.messages_in)
        yield CounterMetricFamily("p2pdist_scheduler_messages_sent", "To agents.", self._server.messages_out)


def make_api(server: SchedulerServer) -> Starlette:
    """Return the API as an ASGI application."""
    registry = CollectorRegistry()
    registry.register(_SchedulerCollector(server))
    ProcessCollector(registry=registry)

    async def live(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def ready(_request: Request) -> Response:
        parts = {"agents": len(server.state.members), "identity": str(server.doorway.standing())}
        return JSONResponse({"ready": True, "parts": parts})

    async def metrics(_request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def status(_request: Request) -> Response:
        return JSONResponse(_status(server))

    routes = [Route("/livez", live), Route("/readyz", ready), Route("/metrics", metrics), Route("/status", status)]
    # A browser that is lured here by DNS rebinding sends another name.
    host = server.config.api_listen.host
    allowed = ["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host]
    if host in ("0.0.0.0", "::"):
        allowed = ["*"]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed)])


def _status(server: SchedulerServer) -> dict[str, object]:
    state = server.state
    agents = [
        {
            "peer_id": peer,
            "host": member.address.host,
            "port": member.address.port,
            "site": member.address.site,
            "leases": member.leases,
        }
        for peer, member in list(state.members.items())[:MAX_LISTED]
    ]
    swarms = [
        {
            "blob": swarm.blob,
            "size_bytes": swarm.size_bytes,
            "members": len(swarm.members),
            "chunks_done": swarm.done_bits.bit_count(),
            "chunks": swarm.full.bit_count(),
            "leases": len(swarm.leases),
            "led": not swarm.closed,
        }
        for swarm in list(state.swarms.values())[:MAX_LISTED]
    ]
    return {
        "version": __version__,
        "cluster": server.cluster,
        "identity": standing.document(server.doorway.identity, server.doorway.standing(), server.doorway.refusals),
        "scheduler": state.leading.own_id,
        "schedulers": sorted(state.leading.live),
        "uptime_s": round(time.monotonic() - server.started, 1),
        "agents": len(state.members),
        "agent_list": agents,
        "shut_out": sorted(state.reports.out),
        "swarms": swarms,
        "leases_granted": state.leases_granted,
        "leases_lapsed": state.leases_lapsed,
        "messages_in": server.messages_in,
        "messages_out": server.messages_out,
    }
