# SPDX-License-Identifier: Apache-2.0
"""`p2pdist scheduler`: coordinate a cluster's agents until told to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from p2pdist.options import reloadable
from scheduler.config import SchedulerConfig

if TYPE_CHECKING:
    from collections.abc import Callable


@click.command()
@reloadable(SchedulerConfig)
def scheduler(load: Callable[[], SchedulerConfig]) -> None:
    """Run the scheduler: neighbours, origin leases and shared tag answers for a cluster of agents.

    SIGHUP reads the settings again.
    """
    config = load()
    import faulthandler

    import trio

    from p2pdist import logs
    from scheduler.server import SchedulerServer

    async def serve() -> None:
        await SchedulerServer(config, load).run()

    # What a watchdog's SIGABRT says of a loop that is stuck.
    faulthandler.enable()
    logs.configure(config.log_level, config.log_format)
    trio.run(serve)
