# SPDX-License-Identifier: Apache-2.0
"""The `p2pdist` command: finds the verb, and turns errors into one line and an exit code.

Only code here and in the verbs prints or exits. Exit codes: 0 done, 1 it failed, 2 a setting or an argument
is wrong, 130 interrupted. A verb's module is imported when the verb is run or its help is shown, so that
`p2pdist agent` loads no display and `p2pdist/` imports neither the scheduler nor the bench.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Any

import click

from p2pdist.errors import ConfigError, P2PDistError

if TYPE_CHECKING:
    from collections.abc import Iterator

_OWN_VERBS = {
    "agent": "p2pdist.commands.agent:agent",
    "cluster": "p2pdist.commands.cluster:cluster",
    "doctor": "p2pdist.commands.doctor:doctor",
    "pull": "p2pdist.commands.pull:pull",
    "setup": "p2pdist.commands.setup:setup",
    "status": "p2pdist.commands.status:status",
}
_VERBS_GROUP = "p2pdist.verbs"


class Verbs(click.Group):
    """A group whose commands are found by name: our own, and those of installed packages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_verbs())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        target = _verbs().get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            return _unloadable(cmd_name, error)
        return command

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - what click returns
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, P2PDistError, BaseExceptionGroup) as error:
            code, line = _verdict(error)
            if line:
                click.echo(f"p2pdist: {line}", err=True)
            ctx.exit(code)


def _verbs() -> dict[str, str]:
    """Return where each verb's command is, as `module:attribute`."""
    return {entry.name: entry.value for entry in entry_points(group=_VERBS_GROUP)} | _OWN_VERBS


def _unloadable(name: str, error: ImportError) -> click.Command:
    """Return a command that says why the verb cannot run, so that the others' help stays whole."""

    def fail() -> None:
        raise P2PDistError(f"the verb {name!r} cannot be loaded: {error}; run `make venv` to mend the installation")

    lenient = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(name, callback=fail, short_help=f"(cannot be loaded: {error})", context_settings=lenient)


def _verdict(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line for an error on purpose; raise what is not (a bug)."""
    leaves = list(_leaves(error))
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        return 130, ""
    if not all(isinstance(leaf, P2PDistError) for leaf in leaves):
        raise error
    leaf = next((leaf for leaf in leaves if isinstance(leaf, ConfigError)), leaves[0])
    return 2 if isinstance(leaf, ConfigError) else 1, " ".join(str(leaf).split())


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(version("p2pdist"), prog_name="p2pdist")
def main() -> None:
    """Distribute container images from node to node: a registry mirror whose peers share what they pull."""
