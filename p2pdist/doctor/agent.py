# SPDX-License-Identifier: Apache-2.0
"""Checks of the agent itself: does it answer, is it the installed version, may it open enough files."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from p2pdist import __version__
from p2pdist.doctor import web
from p2pdist.doctor.report import Check, fail, ok, warn

if TYPE_CHECKING:
    from p2pdist.doctor.node import Node

_START = "start it: `systemctl start p2pdist-agent`, or `p2pdist agent`; `--admin URL` names another port"
_FILES_BESIDES = 256
"""Descriptors for the store, origins and the process itself, beyond one per connection."""


async def meet(node: Node) -> tuple[Node, list[Check]]:
    """Return what the agent says of itself, and the checks of it."""
    try:
        status = await web.get(f"{node.admin}/status")
        metrics = await web.get(f"{node.admin}/metrics")
    except web.Unreached as error:
        return node, [fail("agent", f"no agent answers at {node.admin}: {error}", _START)]
    document = status.json() if status.status == 200 else {}
    if "peer_id" not in document:
        return node, [fail("agent", f"{node.admin} is not an agent's admin port", _START)]
    node = replace(node, status=document, metrics=_plain_metrics(metrics.body.decode(errors="replace")))
    checks = [ok("agent", f"answers at {node.admin}, peer id {document['peer_id']}"), await _mirror(node)]
    return node, [*checks, _version(node), _open_files(node)]


async def _mirror(node: Node) -> Check:
    try:
        answer = await web.get(f"{node.mirror}/v2/")
    except web.Unreached as error:
        return fail("mirror", f"{node.mirror} does not answer: {error}", "look into the agent's log and restart it")
    if answer.status not in (200, 401):
        return fail("mirror", f"{node.mirror}/v2/ answers {answer.status}", "look into the agent's log")
    return ok("mirror", f"answers at {node.mirror}")


def _version(node: Node) -> Check:
    running = str(node.status.get("version", "?"))
    if running != __version__:
        return warn("version", f"the agent runs {running}, installed is {__version__}", "restart the agent")
    return ok("version", f"{running}, as installed")


def _open_files(node: Node) -> Check:
    limit, used = node.metrics.get("process_max_fds"), node.metrics.get("process_open_fds", 0)
    # Connections of runtimes and of peers have a limit each.
    needed = 2 * node.config.max_connections + _FILES_BESIDES
    raise_it = f"raise it to {needed} (LimitNOFILE= in the unit, or `ulimit -n`)"
    if limit is None:
        return ok("open-files", "the agent does not tell its limit")
    if used > 0.9 * limit:
        return fail("open-files", f"{used:.0f} files are open and {limit:.0f} allowed", raise_it)
    if limit < needed:
        return warn("open-files", f"{limit:.0f} open files are allowed, {needed} can be needed", raise_it)
    return ok("open-files", f"{used:.0f} open, {limit:.0f} allowed")


def _plain_metrics(text: str) -> dict[str, float]:
    """Return the samples without labels of the Prometheus text format."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if not line.startswith("#") and "{" not in name:
            try:
                found[name] = float(value)
            except ValueError:
                continue
    return found
