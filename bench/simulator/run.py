# SPDX-License-Identifier: Apache-2.0
"""`p2pdist bench simulate`: runs a plan once for each seed, shows how far it is, and what came of it."""

from __future__ import annotations

import gc
import json
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.results import percentile
from bench.simulator.plan import Outcome
from bench.simulator.swarm import Swarm
from p2pdist.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from rich.console import Console

    from bench.simulator.plan import Plan

_REFRESH_S = 0.5
_LINE_EVERY_S = 10.0


def simulate(plan: Plan, runs: int, json_file: Path | None, console: Console) -> bool:
    """Simulate with so many seeds, print, and return whether every node that stayed got everything.

    Raises:
        ConfigError: the JSON file cannot be written.
    """
    if json_file is not None:
        _write(json_file, "w", "")
    outcomes = []
    for seed in range(plan.seed, plan.seed + runs):
        with _progress(console) as watch:
            outcome = simulate_once(replace(plan, seed=seed), watch)
        outcomes.append(outcome)
        if json_file is not None:
            facts = asdict(outcome) | {"events_per_s": outcome.events_per_s, "plan": asdict(replace(plan, seed=seed))}
            _write(json_file, "a", json.dumps(facts) + "\n")
    console.print(table(outcomes))
    return not any(outcome.failed for outcome in outcomes)


def _write(file: Path, mode: str, text: str) -> None:
    try:
        with file.open(mode) as opened:
            opened.write(text)
    except OSError as error:
        raise ConfigError(f"--json {file}: {error.strerror}") from error


def simulate_once(plan: Plan, watch: Callable[[Swarm, float], None] | None = None) -> Outcome:
    """Return the figures of one seed.

    Args:
        watch: called now and then with the swarm and the seconds that passed.
    """
    began_s = time.perf_counter()
    with _without_gc():
        swarm = Swarm(plan)
        swarm.run(None if watch is None else lambda seen: watch(seen, time.perf_counter() - began_s))
    return outcome_of(swarm, time.perf_counter() - began_s)


@contextmanager
def _without_gc() -> Iterator[None]:
    """Collect no cycles meanwhile: the simulation makes next to none, and looking for them takes long."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def outcome_of(swarm: Swarm, wall_s: float) -> Outcome:
    """Return what a swarm that has run came to."""
    plan, nodes = swarm.plan, list(swarm.nodes.values())
    first_s, swarm_s = min(node.started_s for node in nodes), plan.swarm_s([node.up_rate for node in nodes])
    ratios, finished, late = [], [], []
    for node in swarm.alive:
        if node.finished_s is not None:
            bound_s = max(plan.image_bytes / node.down_rate, swarm_s - (node.started_s - first_s))
            ratios.append((node.finished_s - node.started_s) / bound_s)
            finished.append(node.finished_s - first_s)
            if plan.poisson_s and node.started_s > first_s:
                late.append((node.finished_s - node.started_s) * node.down_rate / plan.image_bytes)
    ratios.sort()
    counters = [node.machine.counters for node in nodes]
    grants, delivered = sum(each.grants for each in counters), swarm.transfers * swarm.cut.chunk_bytes
    duplicate = sum(each.duplicate for each in counters) + swarm.wasted_bytes
    return Outcome(
        nodes=plan.nodes,
        seed=plan.seed,
        failed=len(swarm.alive) - len(ratios),
        left=len(nodes) - len(swarm.alive),
        last_s=max(finished, default=0.0),
        ratio_last=ratios[-1] if ratios else float("nan"),
        ratio_p99=percentile(ratios, 99) or float("nan"),
        ratio_p50=percentile(ratios, 50) or float("nan"),
        late_ratio=max(late, default=None),
        origin_egress_ratio=swarm.origin_bytes / plan.image_bytes,
        duplicate_bytes_ratio=duplicate / delivered if delivered else 0.0,
        scheduler_in_per_node=swarm.scheduler_in / len(nodes),
        scheduler_out_per_node=swarm.scheduler_out / len(nodes),
        control_bytes_per_node=swarm.control_bytes / len(nodes),
        grants_per_chunk=grants / swarm.transfers if swarm.transfers else 0.0,
        declined_ratio=sum(each.declines for each in counters) / grants if grants else 0.0,
        late_chunks=sum(each.late_chunks for each in counters),
        transfers=swarm.transfers,
        events=swarm.events,
        wall_s=wall_s,
    )


# ------------------------------------------------------------------- display


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[Swarm, float], None]]:
    """Yield what shows how far a swarm is: on a terminal one line that changes, elsewhere a line now and then."""
    shown_s = 0.0
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def watch(swarm: Swarm, passed_s: float) -> None:
            nonlocal shown_s
            if passed_s - shown_s < (_REFRESH_S if console.is_terminal else _LINE_EVERY_S):
                return
            shown_s = passed_s
            line = progress_line(swarm, passed_s)
            if console.is_terminal:
                live.update(Text(line), refresh=True)
            else:
                console.print(line, highlight=False)

        yield watch


def progress_line(swarm: Swarm, passed_s: float) -> str:
    done = len(swarm.alive) - swarm.unfinished
    return (
        f"seed {swarm.plan.seed}: {swarm.now:6.1f} s simulated in {passed_s:4.0f} s, {swarm.chunks_done:4.0%} of all "
        f"chunks, {done} of {len(swarm.alive)} nodes done, {swarm.events / passed_s:,.0f} events/s"
    )


_COLUMNS: Sequence[tuple[str, Callable[[Outcome], str]]] = (
    ("nodes", lambda run: str(run.nodes)),
    ("seed", lambda run: str(run.seed)),
    ("failed", lambda run: str(run.failed)),
    ("left", lambda run: str(run.left or "-")),
    ("last s", lambda run: f"{run.last_s:.1f}"),
    ("÷ bound", lambda run: f"{run.ratio_last:.3f}"),
    ("p99", lambda run: f"{run.ratio_p99:.3f}"),
    ("p50", lambda run: f"{run.ratio_p50:.3f}"),
    ("late ×", lambda run: "-" if run.late_ratio is None else f"{run.late_ratio:.3f}"),
    ("egress ×", lambda run: f"{run.origin_egress_ratio:.3f}"),
    ("dup %", lambda run: f"{run.duplicate_bytes_ratio * 100:.2f}"),
    ("sched in", lambda run: f"{run.scheduler_in_per_node:.1f}"),
    ("out", lambda run: f"{run.scheduler_out_per_node:.1f}"),
    ("control KiB", lambda run: f"{run.control_bytes_per_node / 1024:.0f}"),
    ("wall s", lambda run: f"{run.wall_s:.0f}"),
    ("events/s", lambda run: f"{run.events_per_s:,.0f}"),
)


def table(outcomes: Sequence[Outcome]) -> Table:
    """Return a row for each seed, and below them median and worst; a column that says nothing is left out."""
    last = [outcome.ratio_last for outcome in outcomes]
    caption = (
        f"last node ÷ bound: median {statistics.median(last):.3f}, worst {max(last):.3f} of {len(last)}; "
        "each node from its own start.\nScheduler messages and control bytes are per node"
    )
    shown = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), caption=caption)
    columns = [(name, [cell(outcome) for outcome in outcomes]) for name, cell in _COLUMNS]
    said = [(name, cells) for name, cells in columns if any(each != "-" for each in cells)]
    for name, _ in said:
        shown.add_column(name, justify="right", no_wrap=True)
    for row in zip(*(cells for _, cells in said), strict=True):
        shown.add_row(*row)
    return shown
