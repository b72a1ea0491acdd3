# SPDX-License-Identifier: Apache-2.0
"""The figures of rollouts as tables: a row for each run, and what several runs of a system came to. Pure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from bench.results import Result


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over the runs of a system; void runs and those without it are left out."""

    values: tuple[float, ...]

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    @property
    def worst(self) -> float | None:
        return max(self.values, default=None)


def spread(results: Iterable[Result], figure: Callable[[Result], float | None]) -> Spread:
    """Return a figure over those runs that are not void."""
    seen = (figure(result) for result in results if not result.void)
    return Spread(tuple(value for value in seen if value is not None))


def by_system(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the runs of each system, in the order in which systems first ran."""
    names = dict.fromkeys(result.system for result in results)
    return {name: [result for result in results if result.system == name] for name in names}


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


COLUMNS: Sequence[tuple[str, Callable[[Result], str]]] = (
    ("system", lambda result: result.system + (" (void)" if result.void else "")),
    ("right", lambda result: f"{result.nodes - result.failed_pulls}/{result.nodes}"),
    ("last s", lambda result: number(result.last_s)),
    ("÷ bound", lambda result: number(result.own_ratio_to_bound, 3)),
    ("egress ×", lambda result: number(result.origin_egress_ratio, 3)),
    ("dup %", lambda result: number(result.duplicate_bytes_ratio * 100, 1)),
    ("TTFB p99", lambda result: number(result.ttfb_p99_s, 2)),
    ("CPU-s/GiB", lambda result: number(result.cpu_s_per_gib)),
    ("RSS MiB", lambda result: number(result.rss_mib_max, 0)),
    ("idle %", lambda result: number(result.idle_cpu_ratio * 100, 0)),
)
_WHERE_KNOWN: Sequence[tuple[str, Callable[[Result], float | None], int]] = (
    ("late ×", lambda result: result.late_ratio_max, 3),
    ("into rack ×", lambda result: result.rack_ingress_ratio_max, 3),
    ("again MiB", lambda result: result.refetched_bytes / 2**20 if result.run.get("shared") else None, 1),
)
_HARNESS_LOUD_RATIO = 0.1


def columns(results: Sequence[Result]) -> list[tuple[str, Callable[[Result], str]]]:
    """Return the columns for these runs: those of all runs, and such as only some workloads have."""
    more = [
        (name, lambda result, figure=figure, digits=digits: number(figure(result), digits))
        for name, figure, digits in _WHERE_KNOWN
        if any(figure(result) is not None for result in results)
    ]
    return [*COLUMNS, *more]


def table(results: Sequence[Result]) -> Table:
    """Return a row for each run."""
    closing = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), caption=_caption(results))
    shown = columns(results)
    for name, _ in shown:
        closing.add_column(name, justify="left" if name == "system" else "right", no_wrap=True)
    for result in results:
        closing.add_row(*(cell(result) for _, cell in shown))
    return closing


def _caption(results: Sequence[Result]) -> str | None:
    """Return a remark where the harness itself weighed on the machine."""
    most = max((result.harness_cpu_ratio for result in results), default=0.0)
    return f"the harness used up to {most:.0%} of the CPU" if most > _HARNESS_LOUD_RATIO else None


_SUMMARY: Sequence[tuple[str, Callable[[Result], float | None]]] = (
    ("÷ bound", lambda result: result.own_ratio_to_bound),
    ("egress ×", lambda result: result.origin_egress_ratio),
    ("dup %", lambda result: result.duplicate_bytes_ratio * 100),
    ("TTFB p99", lambda result: result.ttfb_p99_s),
    ("late ×", lambda result: result.late_ratio_max),
    ("into rack ×", lambda result: result.rack_ingress_ratio_max),
)


def summary(results: Sequence[Result]) -> Table | None:
    """Return median and worst for each system that ran more than once, or None where none did."""
    repeated = {name: runs for name, runs in by_system(results).items() if len(runs) > 1}
    if not repeated:
        return None
    shown = [(name, figure) for name, figure in _SUMMARY if spread(results, figure).values]
    title = f"{results[0].run.get('workload', '')}: median, worst of the runs that are not void"
    rows = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), title=title)
    rows.add_column("system", no_wrap=True)
    rows.add_column("runs", justify="right", no_wrap=True)
    for name, _ in shown:
        rows.add_column(name, justify="right", no_wrap=True)
    for name, runs in repeated.items():
        spreads = [spread(runs, figure) for _, figure in shown]
        valid = sum(not run.void for run in runs)
        cells = [f"{number(seen.median, 3)}, {number(seen.worst, 3)}" for seen in spreads]
        rows.add_row(name, f"{valid}/{len(runs)}", *cells)
    return rows
