# SPDX-License-Identifier: Apache-2.0
"""`p2pdist bench scheduler`: one real scheduler process under thousands of simulated agents on loopback sockets.

The agents live in a process of their own (scheduler_agents.py); this one starts both, shows how far they are, and
prints what came of it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

import trio
from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.contract import Target, at_most, target_table
from bench.lab.agents import start_scheduler
from bench.lab.errors import LabError
from bench.lab.hosts import loopback_lab
from bench.lab.processes import ProcessGroup
from bench.lab.workspace import workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

    from bench.lab.processes import Process
    from bench.scheduler_model import Plan

SCHEDULER_PORT = 5060
"""Where the lab starts a scheduler."""
START_S, ANSWER_MS = 10.0, 250.0
_WORKSPACE_BYTES = 16 << 20
_REPORT_EVERY_S = 2.0


async def measure(plans: Sequence[Plan], json_file: Path | None, console: Console) -> bool:
    """Do all runs and print; return whether every agent got through.

    Raises:
        LabError: the scheduler or the load does not come up.
    """
    results = []
    if json_file is not None:
        _write(json_file, "w", "")
    for plan in plans:
        result = await run(plan, console)
        results.append(result)
        if json_file is not None:
            _write(json_file, "a", json.dumps(result) + "\n")
    console.print(table(results))
    console.print(target_table(targets(results)))
    for result in results:
        if result["void"]:
            console.print(f"void: {result['void']}", markup=False, highlight=False)
    return not any(result["failed_agents"] for result in results)


def _write(file: Path, mode: str, text: str) -> None:
    with file.open(mode) as opened:
        opened.write(text)


async def run(plan: Plan, console: Console) -> dict[str, Any]:
    """Return the figures of one run against a scheduler of its own.

    Raises:
        LabError: the scheduler ended, or the load did before its end.
    """
    with (
        workspace(_WORKSPACE_BYTES) as space,
        loopback_lab(["scheduler"]) as lab,
        ProcessGroup(space.logs) as group,
    ):
        host = lab["scheduler"]
        scheduler = await start_scheduler(group, host, space.directory("data"))
        command = [sys.executable, "-m", "bench.scheduler_agents", json.dumps(asdict(plan))]
        load = group.start(host, "load", [*command, host.address, str(SCHEDULER_PORT), str(scheduler.pid)])
        while load.running:
            await trio.sleep(_REPORT_EVERY_S)
            scheduler.check()
            if progress := _last(load.log, "progress"):
                console.print(_progress(plan, progress), highlight=False)
        return _last(load.log, "result") or _fail(load)


def _last(log: Path, kind: str) -> dict[str, Any] | None:
    """Return what the load process last said of this kind."""
    for line in reversed(log.read_text().splitlines()):
        if line.startswith(f'{{"{kind}"'):
            said: dict[str, Any] = json.loads(line)[kind]
            return said
    return None


def _fail(load: Process) -> NoReturn:
    raise LabError(f"the simulated agents ended early, exit code {load.exit_code}", log=load.tail())


def _progress(plan: Plan, counts: dict[str, int]) -> str:
    if "finished" in counts:
        return f"{counts['finished']} of {plan.agents} agents have the image"
    return f"{counts['connected']} of {plan.agents} agents are connected"


def targets(results: Sequence[dict[str, Any]]) -> list[Target]:
    """Return what is wanted of a scheduler under 5,000 agents; of several runs the worst counts."""
    answer_ms = max(result["answer_p99_ms"] or 0.0 for result in results)
    return [
        at_most("all agents have started", max(result["started_s"] for result in results), START_S, "s", 1),
        at_most("CPU in the start", 100 * max(result["cpu_start_ratio"] for result in results), 100, "% of a core"),
        at_most("answers, p99", answer_ms, ANSWER_MS, "ms"),
        at_most("agents that failed", max(result["failed_agents"] for result in results), 0, "agents"),
    ]


_COLUMNS: Sequence[tuple[str, Callable[[dict[str, Any]], str]]] = (
    ("agents", lambda run: f"{run['agents']}" + (" (void)" if run["void"] else "")),
    ("started s", lambda run: f"{run['started_s']:.1f}"),
    ("joins/s", lambda run: f"{run['joins_per_s']:.0f}"),
    ("tags/s", lambda run: f"{run['resolves_per_s']:.0f}"),
    ("leases/s", lambda run: f"{run['leases_per_s']:.0f}"),
    ("p50 ms", lambda run: _number(run["answer_p50_ms"])),
    ("p99", lambda run: _number(run["answer_p99_ms"])),
    ("max", lambda run: _number(run["answer_max_ms"])),
    ("CPU %", lambda run: f"{run['cpu_start_ratio'] * 100:.0f}"),
    ("worst s", lambda run: f"{run['cpu_peak_ratio'] * 100:.0f}"),
    ("KiB each", lambda run: f"{run['memory_kib_per_agent']:.1f}"),
    ("MiB", lambda run: f"{run['rss_mib_max']:.0f}"),
    ("failed", lambda run: str(run["failed_agents"])),
)


def table(results: Sequence[dict[str, Any]]) -> Table:
    """Return a row for each run, and below them each kind of answer of the last one."""
    last = results[-1]
    kinds = (("join → neighbours", "join"), ("resolve → resolved", "resolve"), ("done → next lease", "lease"))
    lines = [
        f"{words}: p50 {_number(last[f'{kind}_p50_ms'])}, p99 {_number(last[f'{kind}_p99_ms'])}, "
        f"max {_number(last[f'{kind}_max_ms'])} ms"
        for words, kind in kinds
    ]
    lines.append(
        f"an agent sent {last['messages_per_agent_sent']:.1f} messages, {last['bytes_per_agent_sent'] / 1024:.1f} KiB, "
        f"and got {last['messages_per_agent_received']:.1f}, {last['bytes_per_agent_received'] / 1024:.1f} KiB"
    )
    shown = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), caption="\n".join(lines))
    for name, _ in _COLUMNS:
        shown.add_column(name, justify="left" if name == "agents" else "right", no_wrap=True)
    for result in results:
        shown.add_row(*(cell(result) for _, cell in _COLUMNS))
    return shown


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
