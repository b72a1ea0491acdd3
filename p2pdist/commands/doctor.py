# SPDX-License-Identifier: Apache-2.0
"""`p2pdist doctor`: what of this node works and what does not, in plain words or as JSON, with an exit code."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pdist.commands.setup import places_of
from p2pdist.commands.urls import agent_config, url_of
from p2pdist.core.oci import ImageReference, parse_image_reference
from p2pdist.doctor.node import Node
from p2pdist.doctor.report import Result
from p2pdist.errors import InvalidInput
from p2pdist.setup.plan import View
from p2pdist.setup.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from p2pdist.doctor.report import Check

_CANARY = "docker.io/library/hello-world:latest"
_STYLES = {Result.OK: "green", Result.SKIP: "blue", Result.WARN: "yellow", Result.FAIL: "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
@click.option("--canary", metavar="IMAGE", help=f"Pull this through the agent. [default: {_CANARY}]")
@click.option(
    "--own-pulls", is_flag=True, help="Let the runtimes' own commands pull the canary; it may stay on this node."
)
@click.option("--no-canary", is_flag=True, help="Pull nothing.")
@click.option("--admin", metavar="URL", help="The agent's admin port. [default: this node's]")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    envvar="P2PDIST_CONFIG",
    help="The agent's settings. [env: P2PDIST_CONFIG]",
)
@click.option(
    "--root", type=click.Path(path_type=Path), default=Path("/"), metavar="DIR", help="The root of the runtimes' files."
)
@click.option(
    "--home",
    metavar="DIR",
    help="Rootless runtimes of the user whose home this is. [default: yours, unless you are root]",
)
@click.pass_context
def doctor(
    ctx: click.Context,
    as_json: bool,
    canary: str | None,
    own_pulls: bool,
    no_canary: bool,
    admin: str | None,
    config_file: Path | None,
    root: Path,
    home: str | None,
) -> None:
    """Say what of this node works and what does not.

    Exit code: 0 no check failed, 1 at least one did, 2 wrong usage.
    """
    import trio

    from p2pdist.doctor.examination import examine

    if canary and no_canary:
        raise click.UsageError("--canary and --no-canary exclude each other")
    if own_pulls and root != Path("/"):
        raise click.UsageError("--own-pulls and --root exclude each other: the commands read this host's files")
    config = agent_config(config_file, os.environ)
    node = Node((admin or url_of(config.admin_listen)).rstrip("/"), config)
    view, places = View(Tree(root)), places_of(home, root)
    image = None if no_canary else _image(canary or _CANARY)
    checks = trio.run(partial(examine, node, view, places, canary=image, own_pulls=own_pulls))
    if as_json:
        click.echo(json.dumps({"checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    else:
        _show(checks)
    ctx.exit(int(any(check.result is Result.FAIL for check in checks)))


def _image(text: str) -> ImageReference:
    try:
        return parse_image_reference(text)
    except InvalidInput as error:
        raise click.BadParameter(str(error), param_hint="--canary") from error


def _show(checks: Sequence[Check]) -> None:
    width = max(len(_title(check)) for check in checks)
    for check in checks:
        click.echo(f"{click.style(f'{check.result:4}', _STYLES[check.result])}  {_title(check):{width}}  {check.what}")
        if check.todo:
            click.echo(f"{'':{width + 8}}-> {check.todo}")
    counts = Counter(check.result for check in checks)
    words = {Result.FAIL: "failed", Result.WARN: "to look at", Result.SKIP: "not looked at", Result.OK: "well"}
    click.echo(", ".join(f"{counts[result]} {word}" for result, word in words.items()))


def _title(check: Check) -> str:
    return f"{check.name} {check.about}" if check.about and not check.name.startswith("origin-") else check.name
