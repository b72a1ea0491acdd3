# SPDX-License-Identifier: Apache-2.0
"""`p2pdist agent`: serve this node's container runtime, and its peers, until told to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from p2pdist.config import AgentConfig
from p2pdist.options import reloadable

if TYPE_CHECKING:
    from collections.abc import Callable


@click.command()
@reloadable(AgentConfig)
def agent(load: Callable[[], AgentConfig]) -> None:
    """Run the agent of this node: mirror, peer port and admin port.

    SIGTERM and Ctrl-C let running responses end, for at most `shutdown_grace_s`. SIGHUP reads the settings again.
    """
    config = load()
    import faulthandler

    import trio

    from p2pdist import logs
    from p2pdist.agent import run

    # What a watchdog's SIGABRT says of a loop that is stuck.
    faulthandler.enable()
    logs.configure(config.log_level, config.log_format)
    trio.run(run, config, load)
