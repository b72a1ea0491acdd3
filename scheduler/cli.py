# SPDX-License-Identifier: Apache-2.0
"""`p2pdist scheduler`: coordinate a cluster's agents until told to stop."""

from __future__ import annotations

import click

from p2pdist.options import configured
from scheduler.config import SchedulerConfig


@click.command()
@configured(SchedulerConfig)
def scheduler(config: SchedulerConfig) -> None:
    """Run the scheduler: neighbours, origin leases and shared tag answers for a cluster of agents."""
    import trio

    from p2pdist import logs
    from scheduler.server import SchedulerServer

    async def serve() -> None:
        await SchedulerServer(config).run()

    logs.configure(config.log_level, config.log_format)
    trio.run(serve)
