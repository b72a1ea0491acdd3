# SPDX-License-Identifier: Apache-2.0
"""`p2pdist setup`: the agent as a mirror in the runtimes' configuration, shown first if wished, and out of it again."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from p2pdist.commands.urls import agent_config, url_of
from p2pdist.core.oci import parse_registry
from p2pdist.errors import InvalidInput, P2PDistError
from p2pdist.setup.installer import Installer
from p2pdist.setup.plan import Places, View, Wanted
from p2pdist.setup.runtimes import ALIASES, RUNTIMES, present
from p2pdist.setup.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from p2pdist.setup.installer import Outcome

_ROOT = Path("/")
_RESTART_S = 120


@click.command()
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice([*RUNTIMES, *ALIASES]),
    help="Configure these. [default: those on the host]",
)
@click.option(
    "--registry",
    "registries",
    multiple=True,
    metavar="NAME",
    help="Only pulls from these. [default: all; where each has to be named, the agent's]",
)
@click.option("--mirror", metavar="URL", help="The agent's mirror. [default: this node's]")
@click.option(
    "--mode",
    type=click.Choice(["accelerate", "enforce"]),
    default="accelerate",
    show_default=True,
    help="Fall back to the registry, or allow no way around the agent.",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    envvar="P2PDIST_CONFIG",
    help="The agent's settings, for its mirror and registries. [env: P2PDIST_CONFIG]",
)
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=_ROOT,
    metavar="DIR",
    help="The root of another host's file system.",
)
@click.option(
    "--home",
    metavar="DIR",
    help="Rootless runtimes of the user whose home this is. [default: yours, unless you are root]",
)
@click.option("--dry-run", is_flag=True, help="Show what would change as a diff, and write nothing.")
@click.option("--remove", is_flag=True, help="Take the agent out again: every file as it was.")
@click.option("--restart", is_flag=True, help="Also restart what has to be restarted.")
def setup(
    runtimes: tuple[str, ...],
    registries: tuple[str, ...],
    mirror: str | None,
    mode: str,
    config_file: Path | None,
    root: Path,
    home: str | None,
    dry_run: bool,
    remove: bool,
    restart: bool,
) -> None:
    """Make this host's container runtimes pull through the agent."""
    if restart and root != _ROOT:
        raise click.UsageError("--restart and --root exclude each other: nothing runs there")
    places = places_of(home, root)
    installer = Installer(Tree(root), places)
    if remove:
        chosen = list(dict.fromkeys(ALIASES.get(name, name) for name in runtimes)) or installer.set_up
        outcome = installer.remove(chosen)
    else:
        chosen = list(dict.fromkeys(ALIASES.get(name, name) for name in runtimes)) or _present(installer.view(), places)
        outcome = installer.install(chosen, wanted(registries, mirror, config_file, enforce=mode == "enforce"))
    if dry_run:
        click.echo("".join(change.diff() for change in outcome.changes), nl=False)
    else:
        installer.carry_out(outcome)
        for change in outcome.changes:
            click.echo(f"{change.kind}  {change.path}")
    _tell(outcome, chosen, removed=remove)
    if restart and not dry_run:
        _restart(outcome.restarts)
    if outcome.unenforced:
        raise P2PDistError(f"not enforced: {', '.join(outcome.unenforced)}; see above")


def places_of(home: str | None, root: Path) -> Places:
    """Return where to look: a user's own files where one is named or runs this, else the system's."""
    if home is None:
        home = os.path.expanduser("~") if os.geteuid() and root == _ROOT else ""
    if not home:
        return Places()
    if not home.startswith("/"):
        raise click.BadParameter(f"{home!r} is not an absolute path", param_hint="--home")
    directory = Tree(root).real(home)
    if not directory.is_dir():
        raise click.BadParameter(f"{home} is not a directory", param_hint="--home")
    owner = directory.stat()
    if os.geteuid() == 0 and owner.st_uid:
        # A link in a user's directory must not lead root's hand elsewhere.
        os.setegid(owner.st_gid)
        os.seteuid(owner.st_uid)
    return Places(home.rstrip("/"))


def wanted(registries: Sequence[str], mirror: str | None, config_file: Path | None, *, enforce: bool) -> Wanted:
    """Return what the flags and the agent's settings ask for.

    Raises:
        ConfigError: the settings cannot be used.
    """
    config = agent_config(config_file, os.environ)
    named = [name for name in registries if name != "*"]
    try:
        names = tuple(dict.fromkeys(map(parse_registry, named))) or tuple(config.registries)
    except InvalidInput as error:
        raise click.BadParameter(str(error), param_hint="--registry") from error
    return Wanted(
        mirror=_checked(mirror) if mirror else url_of(config.mirror_listen),
        registries=names,
        all_registries=not named,
        enforce=enforce,
    )


def _checked(mirror: str) -> str:
    try:
        parts = urlsplit(mirror)
        good = (
            parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/") and "@" not in parts.netloc
        )
        good = good and not (parts.query or parts.fragment) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise click.BadParameter(f"{mirror!r} is not a URL such as http://127.0.0.1:5050", param_hint="--mirror")
    return mirror.rstrip("/")


def _present(view: View, places: Places) -> list[str]:
    found = present(view, places)
    if not found:
        raise P2PDistError(f"no container runtime found (looked for {', '.join(RUNTIMES)}): name one with --runtime")
    return found


def _tell(outcome: Outcome, chosen: Sequence[str], *, removed: bool) -> None:
    """Say what is so now, what to do next, and what is not as wished; on stderr, as the diff is on stdout."""
    if not outcome.changes:
        done = "the agent is in none of their files" if removed else "set up already"
        click.echo(f"nothing to change: {', '.join(chosen) or 'every runtime'}: {done}", err=True)
    for note in outcome.notes:
        click.echo(f"note: {note}", err=True)
    for name, why in (outcome.unenforced or {}).items():
        click.echo(f"not enforced: {name}: {why}", err=True)
    for command in outcome.restarts:
        click.echo(f"to do: {command}", err=True)


def _restart(commands: Sequence[str]) -> None:
    for command in commands:
        try:
            done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=_RESTART_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise P2PDistError(f"{command}: {error}; run it yourself") from error
        if done.returncode:
            raise P2PDistError(f"{command}: exit code {done.returncode}: {done.stderr.strip()[:300]}; run it yourself")
        click.echo(f"done  {command}")
