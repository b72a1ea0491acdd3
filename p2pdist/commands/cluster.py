# SPDX-License-Identifier: Apache-2.0
"""`p2pdist cluster`: the cluster's CA, tokens to join with, and whose certificates count no more."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import click

from p2pdist.core.types import parse_peer_id
from p2pdist.errors import ConfigError, InvalidInput

_DEFAULT_DIRECTORY = Path("/var/lib/p2pdist-scheduler/cluster")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_directory = click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=_DEFAULT_DIRECTORY,
    show_default=True,
    help="Where the CA is: the scheduler's --ca-dir.",
)


class Duration(click.ParamType[float]):
    """`90s`, `30m`, `24h` or `7d`, in seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value)
        if text[:-1].isascii() and text[:-1].isdigit() and text[-1:] in _UNITS_S and len(text) < 8:
            seconds = float(int(text[:-1]) * _UNITS_S[text[-1]])
            if 1 <= seconds <= 30 * 86400:
                return seconds
        self.fail(f"{text!r} is not a time up to 30d, such as 30m, 24h or 7d", param, ctx)


@click.group()
def cluster() -> None:
    """Give a cluster an identity: its CA, join tokens, revoked certificates. See docs/identity.md."""


@cluster.command()
@click.argument("name", default="cluster")
@_directory
def init(name: str, directory: Path) -> None:
    """Make a CA for a new cluster; its id is NAME and eight random digits."""
    from p2pdist.core.identity import parse_name
    from p2pdist.identity.authority import Authority

    cluster_id = f"{name}-{secrets.token_hex(4)}"
    try:
        parse_name(f"p2pdist://{cluster_id}/scheduler/any")
    except InvalidInput as error:
        raise ConfigError(
            f"{name!r} is no name for a cluster: letters, digits, '.', '_' and '-', at most 54"
        ) from error
    Authority.make(directory, cluster_id, time.time())
    click.echo(f"cluster {cluster_id}: its CA is in {directory}. Whoever can read ca-key.pem there is the cluster.")
    click.echo(f"next: p2pdist scheduler --ca-dir {directory}")
    click.echo(f"then: p2pdist cluster token --dir {directory}, and p2pdist agent --scheduler HOST:5060 --join TOKEN")


@cluster.command()
@_directory
@click.option(
    "--uses", type=click.IntRange(1, 100_000), default=1, show_default=True, help="Nodes that may join with it."
)
@click.option("--lifetime", type=Duration(), default="1h", show_default=True, help="Until when, such as 30m or 24h.")
def token(directory: Path, uses: int, lifetime: float) -> None:
    """Print a token with which agents join: `p2pdist agent --join TOKEN`. It is a secret until it is used up."""
    from p2pdist.identity.authority import Authority

    click.echo(str(Authority.open(directory).make_token(uses=uses, lifetime_s=lifetime, now=time.time())))


@cluster.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_directory
def copy(source: Path, directory: Path) -> None:
    """Give another scheduler the CA in SOURCE, with its revoked names and without its tokens.

    A token is good only at the scheduler that it was made for. Where there is a copy already it stays, and hears of
    names revoked since.
    """
    from p2pdist.identity.authority import Authority

    copied = Authority.copy(source, directory)
    click.echo(f"{directory} has the CA of cluster {copied.cluster}")


@cluster.command()
@_directory
@click.option("--scheduler", "scheduler", is_flag=True, help="NAME is a scheduler's: its host name.")
@click.argument("name")
def revoke(directory: Path, scheduler: bool, name: str) -> None:
    """Let the certificates of the agent with the peer id NAME count no more; the scheduler tells the others."""
    from p2pdist.identity.authority import Authority

    if not scheduler:
        try:
            parse_peer_id(name)
        except InvalidInput as error:
            raise ConfigError(f"{error}; `p2pdist status` shows an agent's") from error
    try:
        names = Authority.open(directory).revoke(f"{'scheduler' if scheduler else 'agent'}/{name}").names
    except InvalidInput as error:
        raise ConfigError(str(error)) from error
    click.echo(
        f"revoked; the list holds {len(names)} names. The schedulers tell their agents, and those the other schedulers."
    )
