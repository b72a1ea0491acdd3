# SPDX-License-Identifier: Apache-2.0
"""`p2pdist status`: what the agent of this node is doing, as a table for people or JSON for programs."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from p2pdist.commands.urls import agent_url
from p2pdist.errors import P2PDistError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

_TIMEOUT_S = 5.0
_PEERS_SHOWN = 50


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the agent's answer as JSON.")
@click.option(
    "--admin", metavar="URL", help="The agent's admin port. [default: this node's; env: P2PDIST_ADMIN_LISTEN]"
)
def status(as_json: bool, admin: str | None) -> None:
    """Show the agent's peers, store and running pulls."""
    document = fetch(admin or agent_url("admin_listen", os.environ))
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    from rich.console import Console

    show(document, Console())


def fetch(url: str) -> dict[str, Any]:
    """Return the status document of the agent whose admin port is at `url`.

    Raises:
        P2PDistError: no agent answers there, or not as one would.
    """
    import httpx

    base = url.rstrip("/").removesuffix("/status")
    try:
        response = httpx.get(f"{base}/status", timeout=_TIMEOUT_S, trust_env=False)
    except httpx.ConnectError as error:
        raise P2PDistError(
            f"no agent answers at {base}; start one with `p2pdist agent`, or give --admin URL"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise P2PDistError(f"the agent's admin port {base} does not answer: {error}") from error
    try:
        document = response.json() if response.status_code == 200 else None
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise P2PDistError(f"{base} is not the admin port of an agent (it answered {response.status_code} to /status)")
    return document


def show(document: dict[str, Any], console: Console) -> None:
    """Print a status document for a person; what it lacks is left out."""
    from rich.table import Table

    facts = Table.grid(padding=(0, 2))
    for name, text in _facts(document):
        facts.add_row(f"[bold]{name}[/]", text)
    console.print(facts)
    if peers := document.get("peers"):
        console.print(_peer_table(peers))
    if banned := document.get("banned"):
        console.print(_banned_table(banned))
    if pulls := document.get("pulls"):
        console.print(_pull_table(pulls))


def _facts(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from rich.markup import escape

    from p2pdist.commands.progress import human_bytes

    store, moved = document.get("store", {}), document.get("bytes", {})
    place = "/".join(part for part in (document.get("cluster"), document.get("site"), document.get("rack")) if part)
    yield "agent", f"{document.get('version', '?')}, up {_duration(document.get('uptime_s', 0))}"
    yield "peer id", escape(str(document.get("peer_id", "?")))
    yield "cluster", escape(place or "?")
    if identity := document.get("identity"):
        yield "identity", escape(f"{identity.get('state', '?')}: {identity.get('what', '')}")
    yield "mirror", escape(str(document.get("mirror", "?")))
    yield "scheduler", escape(_scheduler(document.get("scheduler", {})))
    limit = f" of {human_bytes(store['max_bytes'])}" if store.get("max_bytes") else ""
    yield "store", f"{store.get('blobs', 0)} blobs, {human_bytes(store.get('bytes', 0))}{limit}"
    yield "to runtimes", human_bytes(moved.get("to_runtime", 0))
    yield (
        "received",
        f"{human_bytes(moved.get('from_peers', 0))} from peers, {human_bytes(moved.get('from_origin', 0))} from origins"
        f" ({human_bytes(moved.get('duplicate', 0))} twice)",
    )
    yield "to peers", human_bytes(moved.get("to_peers", 0))
    yield "control", human_bytes(document.get("control_bytes", 0))
    access = document.get("access", {})
    yield (
        "access",
        f"{access.get('rules', 0)} rules, {access.get('checks', 0)} checks, {access.get('refused', 0)} refused",
    )


def _scheduler(state: dict[str, Any]) -> str:
    configured = ", ".join(map(str, state.get("configured") or []))
    if not configured:
        return "none: the agents coordinate themselves"
    each = [entry for entry in state.get("each", []) if isinstance(entry, dict)]
    if state.get("connected") and len(each) > 1:
        return "\n".join(map(_one_of_several, each))
    if state.get("connected"):
        return f"connected to {state.get('address')}"
    return f"not reachable ({configured}): the agents coordinate themselves"


def _one_of_several(entry: dict[str, Any]) -> str:
    why = f" ({entry['why']})" if entry.get("why") else ""
    swarms = f", {entry['swarms']} running pulls" if entry.get("swarms") else ""
    return f"{entry.get('address')} {entry.get('state')}{swarms}{why}"


def _peer_table(peers: list[dict[str, Any]]) -> Any:  # noqa: ANN401 - a rich Table, which is imported late
    from rich.markup import escape
    from rich.table import Table

    from p2pdist.commands.progress import human_bytes

    table = Table("peer", "address", "site/rack", "found by", title=f"peers: {len(peers)}", title_justify="left")
    table.add_column("received", justify="right")
    table.add_column("sent", justify="right")
    busiest = sorted(peers, key=lambda peer: -peer.get("down_bytes", 0) - peer.get("up_bytes", 0))
    for peer in busiest[:_PEERS_SHOWN]:
        place = "/".join(part for part in (peer.get("site"), peer.get("rack")) if part)
        cells = (str(peer.get("peer_id", ""))[:12], str(peer.get("address", "")), place, str(peer.get("source", "")))
        table.add_row(*map(escape, cells), human_bytes(peer.get("down_bytes", 0)), human_bytes(peer.get("up_bytes", 0)))
    if len(peers) > _PEERS_SHOWN:
        table.caption = f"{len(peers) - _PEERS_SHOWN} more: --json shows all"
    return table


def _banned_table(banned: list[dict[str, Any]]) -> Any:  # noqa: ANN401 - a rich Table, which is imported late
    from rich.markup import escape
    from rich.table import Table

    table = Table("peer", "address", "did", title=f"banned peers: {len(banned)}", title_justify="left")
    table.add_column("for", justify="right")
    for peer in banned[:_PEERS_SHOWN]:
        cells = (str(peer.get("peer_id", ""))[:12], str(peer.get("host", "")), str(peer.get("reason", "")))
        table.add_row(*map(escape, cells), _duration(peer.get("for_s", 0)))
    return table


def _pull_table(pulls: list[dict[str, Any]]) -> Any:  # noqa: ANN401 - a rich Table, which is imported late
    from rich.markup import escape
    from rich.table import Table

    from p2pdist.commands.progress import human_bytes

    table = Table("pulling", title=f"running pulls: {len(pulls)}", title_justify="left")
    for heading in ("have", "size", "from peers", "from origin"):
        table.add_column(heading, justify="right")
    for pull in pulls[:_PEERS_SHOWN]:
        sizes = (pull.get(key, 0) for key in ("have_bytes", "size_bytes", "from_peers", "from_origin"))
        table.add_row(escape(str(pull.get("digest", ""))[:19]), *map(human_bytes, sizes))
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{count} {unit}" for count, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")) if count]
    return " ".join(parts[:2]) or "0 s"
