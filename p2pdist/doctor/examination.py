# SPDX-License-Identifier: Apache-2.0
"""The whole examination of a node: which checks are made, at the same time where they do not need each other."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from p2pdist.doctor import agent, host, origins, programs, runtimes, swarm, web
from p2pdist.doctor.report import Check, fail, in_order
from p2pdist.net import mdns

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from p2pdist.core.oci import ImageReference
    from p2pdist.core.wire import PeerAddress
    from p2pdist.doctor.node import Node
    from p2pdist.doctor.swarm import Browse
    from p2pdist.setup.plan import Places, View

DEADLINE_S = 120.0
"""For all checks together; each request has a shorter one of its own."""
_BROWSE_S = 3.0
"""Agents that hear of each other at all do within 1.5 s."""


async def browse(cluster: str) -> list[PeerAddress]:
    return await mdns.browse(cluster, _BROWSE_S)


async def examine(
    node: Node,
    view: View,
    places: Places,
    *,
    canary: ImageReference | None,
    own_pulls: bool = False,
    browse: Browse = browse,
) -> list[Check]:
    """Return every check of a node, in the order of `report.CHECKS`.

    Args:
        view: the host's files, with the runtimes' configuration as it is.
        canary: the image that is pulled through the agent; None: none is.
        own_pulls: let the runtimes' own commands pull it, where they are installed.
        browse: see `swarm.checks`.
    """
    checks: list[Check] = []
    with trio.move_on_after(DEADLINE_S) as scope:
        node, about_agent = await agent.meet(node)
        checks += [*about_agent, *host.checks(node)]
        place = runtimes.Host(view, places, node.mirror, tuple(name for name in node.registries if name != "*"))
        configured, found = runtimes.checks(place)
        checks += configured
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_gather, checks, partial(origins.checks, node.registries))
            if node.status:
                nursery.start_soon(_gather, checks, partial(swarm.checks, node, browse))
                if canary is not None:
                    nursery.start_soon(_gather, checks, partial(_canaries, node, place, found, canary, own_pulls))
    if scope.cancelled_caught:
        checks.append(fail("agent", f"the examination did not end within {DEADLINE_S:.0f} s", "run it again"))
    return in_order(checks)


async def _gather(checks: list[Check], make: Callable[[], Awaitable[list[Check]]]) -> None:
    checks += await make()


async def _canaries(
    node: Node, place: runtimes.Host, found: list[str], image: ImageReference, own: bool
) -> list[Check]:
    """One after the other, as they are told apart by what the mirror has sent."""

    async def sent_bytes() -> int:
        status = (await web.get(f"{node.admin}/status")).json()
        return int(status.get("bytes", {}).get("to_runtime", 0))

    registry = image.repository.registry
    able = [name for name in found if runtimes.may_have_mirror(place, name, registry)]
    checks = []
    for name in able:
        command = programs.puller_of(name) if own else None
        if command is None:
            checks.append(await runtimes.canary(place, name, image, sent_bytes))
        else:
            checks.append(await runtimes.own_canary(name, command, image, sent_bytes))
    return checks
