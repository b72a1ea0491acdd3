# SPDX-License-Identifier: Apache-2.0
"""Shows a rollout while it runs: a bar for each node on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from bench.crowd import Rollout
    from bench.lab.pullers import Pull

_REFRESH_S = 0.2
_LINE_EVERY_S = 5.0
_STATUS_EVERY_S = 0.5
_BAR_WIDTH = 30
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Display:
    """A watcher for `run_rollout`.

    Args:
        ask_agents: whether to ask each agent now and then where its bytes come from; costs it some CPU.
    """

    console: Console
    title: str
    ask_agents: bool = False
    _peer_shares: dict[str, float] = field(default_factory=dict)
    """Of each node's bytes, the part that came from peers, as its agent last said."""

    async def watch(self, rollout: Rollout) -> None:
        """Show `rollout` until cancelled."""
        async with trio.open_nursery() as nursery:
            if self.ask_agents:
                nursery.start_soon(self._ask_agents, rollout)
            if self.console.is_terminal:
                await self._draw(rollout)
            else:
                await self._report(rollout)

    async def _ask_agents(self, rollout: Rollout) -> None:
        while True:
            await trio.sleep(_STATUS_EVERY_S)
            for agent in rollout.running.agents:
                moved = (await agent.status()).get("bytes", {})
                peers, origin = moved.get("from_peers", 0), moved.get("from_origin", 0)
                if peers + origin:
                    self._peer_shares[agent.host.name] = peers / (peers + origin)

    async def _draw(self, rollout: Rollout) -> None:
        with Live(console=self.console, auto_refresh=False) as live:
            try:
                while True:
                    live.update(self._bars(rollout, trio.current_time()), refresh=True)
                    await trio.sleep(_REFRESH_S)
            finally:
                live.update(self._bars(rollout, trio.current_time()), refresh=True)

    async def _report(self, rollout: Rollout) -> None:
        try:
            while True:
                await trio.sleep(_LINE_EVERY_S)
                self.console.print(_line(self.title, rollout, trio.current_time()))
        finally:
            self.console.print(_line(self.title, rollout, trio.current_time()))

    def _bars(self, rollout: Rollout, now_s: float) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row(f"[bold]{self.title}[/]", f"{now_s - rollout.started_s:.1f} s")
        for pull in rollout.pulls:
            bar = ProgressBar(total=rollout.pull_bytes, completed=pull.done_bytes, width=_BAR_WIDTH)
            done = f"{pull.done_bytes / MIB:6.1f} MiB"
            table.add_row(f"  {pull.node}", bar, done, self._source(rollout, pull), _state(pull, rollout))
        return table

    def _source(self, rollout: Rollout, pull: Pull) -> str:
        if not rollout.running.agents:
            return "registry"
        share = self._peer_shares.get(pull.node)
        return "" if share is None else f"{share:3.0%} from peers"


def _state(pull: Pull, rollout: Rollout) -> str:
    if pull.error:
        return f"[red]{pull.error[:60]}[/]"
    if pull.finished_s is not None:
        return f"[green]✓ all digests right, {pull.finished_s - rollout.started_s:.1f} s[/]"
    return ""


def _line(title: str, rollout: Rollout, now_s: float) -> str:
    done = sum(pull.right for pull in rollout.pulls)
    slowest = min(pull.done_bytes for pull in rollout.pulls) / rollout.pull_bytes
    return (
        f"{title}: {now_s - rollout.started_s:5.1f} s, {rollout.done_ratio:4.0%} of all bytes, "
        f"slowest node {slowest:4.0%}, {done} of {len(rollout.pulls)} nodes done"
    )
