# SPDX-License-Identifier: Apache-2.0
"""Checks of the swarm: peers, mDNS, the scheduler, one version everywhere, and the agent's certificate."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from p2pdist.config import Address
from p2pdist.core.schedulers import IN_USE
from p2pdist.doctor import web
from p2pdist.doctor.report import Check, fail, ok, warn
from p2pdist.errors import PeerUnavailable
from p2pdist.identity.standing import State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from p2pdist.core.wire import PeerAddress
    from p2pdist.doctor.node import Node

    Browse = Callable[[str], Awaitable[Sequence[PeerAddress]]]

_NAMED = 3
_RENEW = "start a scheduler that has the CA, or put a new certificate in its place; the agent's log has each attempt"
_JOIN_AGAIN = "delete the agent's `identity` directory and join with a new token, or put a new certificate in its place"


async def checks(node: Node, browse: Browse) -> list[Check]:
    """Return the checks of the swarm.

    Args:
        browse: returns which agents of a cluster announce themselves by mDNS, this node's own among them.
    """
    peers = [peer for peer in node.status.get("peers", []) if isinstance(peer, dict)]
    mdns, heard = await _mdns(node, browse)
    found = [mdns, await _peers(node, peers, heard), _versions(node, peers)]
    return [*found, await _scheduler(node, node.status.get("scheduler", {})), _identity(node)]


async def _mdns(node: Node, browse: Browse) -> tuple[Check, Sequence[PeerAddress]]:
    """Return the check, and the other agents that announce themselves."""
    state = str(node.status.get("mdns", "off"))
    if state == "off":
        return ok("mdns", "not used: the agent was started with --no-mdns"), []
    if state != "on":
        return fail("mdns", state, "mend the network, or name a --scheduler and use --no-mdns"), []
    try:
        heard = await browse(str(node.status.get("cluster", node.config.cluster)))
    except PeerUnavailable as error:
        return fail("mdns", str(error), "mend the network, or name a --scheduler and use --no-mdns"), []
    others = [agent for agent in heard if agent.peer_id != node.status.get("peer_id")]
    if len(others) == len(heard) and not others:
        blocked = "this agent's own announcement is not heard: multicast is blocked"
        return fail(
            "mdns", blocked, "let UDP port 5353 and 224.0.0.251 through the firewall, or name a --scheduler"
        ), []
    return ok("mdns", f"{len(others)} other agents announce themselves"), others


async def _peers(node: Node, peers: list[dict[str, Any]], heard: Sequence[PeerAddress]) -> Check:
    connected = {peer.get("peer_id") for peer in peers}
    missing = [agent for agent in heard if agent.peer_id not in connected]
    if peers:
        return ok("peers", f"connected to {len(peers)}")
    if missing:
        agent = missing[0]
        why = await web.dial(agent.host, agent.port) or "it can be dialled, and still there is no connection"
        at = Address(agent.host, agent.port)
        todo = f"let TCP port {agent.port} through the firewalls; look into the agent's log for a refusal"
        return fail("peers", f"{len(missing)} agents announce themselves, none is connected; {at}: {why}", todo)
    if node.status.get("scheduler", {}).get("configured"):
        return warn(
            "peers", "none: nobody else pulls what this node holds, or TCP port 5051 is blocked", "see scheduler"
        )
    if node.status.get("mdns") == "off":
        return warn("peers", "none: without mDNS and without a scheduler nobody can be found", "name a --scheduler")
    todo = "start agents on other nodes; where they run, multicast (UDP 5353) does not pass: name a --scheduler"
    return warn("peers", "no other agent is heard on this network", todo)


def _versions(node: Node, peers: list[dict[str, Any]]) -> Check:
    own = str(node.status.get("version", "?"))
    others = Counter(str(peer["version"]) for peer in peers if peer.get("version") not in (None, "", own))
    if others:
        shown = ", ".join(f"{count} run {version}" for version, count in others.most_common(_NAMED))
        return warn("peer-versions", f"this agent runs {own}, of its peers {shown}", "bring all nodes to one version")
    return ok("peer-versions", f"all run {own}" if peers else "no peers to compare with")


async def _scheduler(node: Node, state: dict[str, Any]) -> Check:
    configured = [str(address) for address in state.get("configured", [])]
    if not configured:
        return ok("scheduler", "none configured: the agents coordinate themselves")
    missing = [text for text in configured if not _in_use(text, state)]
    if not missing:
        return ok("scheduler", f"connected to {state.get('address')}")
    reasons = "; ".join([f"{text}: {await _why_not(text, state)}" for text in missing[:_NAMED]])
    todo = "start the scheduler, open its port (TCP 5060), or mend --scheduler; cluster and version must be the agent's"
    if state.get("connected"):
        return warn(
            "scheduler", f"{len(missing)} of {len(configured)} not used ({reasons}); the others do its work", todo
        )
    return fail("scheduler", f"not connected ({reasons}); the agents coordinate themselves", todo)


def _entry(text: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return what the agent says of one scheduler; an agent from before there were several says it of all."""
    each = [entry for entry in state.get("each", []) if isinstance(entry, dict)]
    known = {entry.get("address"): entry for entry in each}
    return known.get(text, {"state": IN_USE if state.get("connected") and not each else "lost"})


def _in_use(text: str, state: dict[str, Any]) -> bool:
    return _entry(text, state).get("state") == IN_USE


async def _why_not(text: str, state: dict[str, Any]) -> str:
    standing = str(_entry(text, state).get("state"))
    if standing != "lost":
        return standing
    address = Address.parse(text)
    return await web.dial(address.host, address.port) or "it can be dialled, and refuses this agent"


def _identity(node: Node) -> Check:
    told = node.status.get("identity") or {}
    state, what = told.get("state"), str(told.get("what", "the agent does not tell"))
    match state:
        case State.EXPOSED:
            return warn("identity", f"off: {what}", "give the cluster an identity, or take `share` out of the rules")
        case State.NOT_RENEWED | State.ENDING:
            return warn("identity", what, _RENEW)
        case State.EXPIRED:
            return fail("identity", what, f"compare this host's clock with others'; else {_JOIN_AGAIN}")
        case State.REVOKED:
            return fail("identity", what, f"where that is a mistake, {_JOIN_AGAIN}")
        case _:
            return ok("identity", f"off: {what}" if state == State.OFF else what)
