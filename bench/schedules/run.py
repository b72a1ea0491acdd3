# SPDX-License-Identifier: Apache-2.0
"""`p2pdist bench schedules`: plays many schedules; those that fail are made smaller and printed."""

from __future__ import annotations

import gc
import json
import multiprocessing
import signal
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.text import Text

from bench.schedules.plan import Schedule, draw
from bench.schedules.shrink import play, shrink
from p2pdist.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from rich.console import Console

    from bench.schedules.shrink import Verdict

SHRUNK = 3
"""Failing schedules made smaller: the first of each of so many invariants."""
_BATCH = 8
_REFRESH_S = 0.5


def schedules(count: int, seed: int, processes: int, json_file: Path | None, console: Console) -> bool:
    """Play the schedules of so many seeds, print what came of them, and return whether all invariants held.

    Raises:
        ConfigError: the JSON file cannot be written.
    """
    began_s, verdicts = time.perf_counter(), {}
    with _shown(console, count) as show:
        for played, verdict in _played(range(seed, seed + count), processes):
            verdicts[played] = verdict
            show(len(verdicts), sum(bool(each.invariant) for each in verdicts.values()))
    wall_s = time.perf_counter() - began_s
    broken = [failed for failed, verdict in sorted(verdicts.items()) if verdict.invariant]
    for line in summary(verdicts, wall_s):
        console.print(line, highlight=False)
    smallest = [_explain(found, verdicts[found], console) for found in _first_of_each(broken, verdicts)]
    if json_file is not None:
        facts = figures(verdicts, wall_s) | {"seed": seed, "failed_seeds": broken, "smallest": smallest}
        _write(json_file, facts)
    return not broken


def replay(file: Path, console: Console) -> bool:
    """Play the schedules that `--json` kept, or a single one; print and return whether all invariants hold.

    Raises:
        ConfigError: the file holds none.
    """
    try:
        facts = json.loads(file.read_text())
        kept = [Schedule.from_dict(each["schedule"]) for each in facts.get("smallest", [facts])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--replay {file}: no schedule that `bench schedules --json` wrote ({error})") from error
    verdicts = [play(schedule) for schedule in kept]
    for schedule, verdict in zip(kept, verdicts, strict=True):
        console.print(f"{schedule}\n{verdict.what or 'all invariants hold'}\n", highlight=False, markup=False)
    return not any(verdict.invariant for verdict in verdicts)


def _played(seeds: range, processes: int) -> Iterable[tuple[int, Verdict]]:
    if processes == 1:
        with _without_gc():
            yield from map(_play, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(processes, _begin_worker) as pool:
        yield from pool.imap_unordered(_play, seeds, _BATCH)


def _begin_worker() -> None:
    # The one that started it ends it, also on Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()


def _play(seed: int) -> tuple[int, Verdict]:
    return seed, play(draw(seed))


@contextmanager
def _without_gc() -> Iterator[None]:
    """Collect cycles only between schedules (shrink.play): looking for them all the time takes a fifth longer."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _shown(console: Console, count: int) -> Iterator[Any]:
    """Yield what shows how far it is, on a terminal."""
    shown_s = 0.0
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show(done: int, failed: int) -> None:
            nonlocal shown_s
            if console.is_terminal and time.perf_counter() - shown_s > _REFRESH_S:
                shown_s = time.perf_counter()
                live.update(Text(f"{done} of {count} schedules, {failed} failed"), refresh=True)

        yield show


def figures(verdicts: dict[int, Verdict], wall_s: float) -> dict[str, Any]:
    """Return the figures of a run."""
    ratios = sorted(verdict.egress_ratio for verdict in verdicts.values())
    return {
        "schedules": len(verdicts),
        "failed": sum(bool(verdict.invariant) for verdict in verdicts.values()),
        "broken": dict(Counter(verdict.invariant for verdict in verdicts.values() if verdict.invariant)),
        "faults": sum(len(draw(seed).faults) for seed in verdicts),
        "failed_pulls_allowed": sum(verdict.failures for verdict in verdicts.values()),
        "egress_ratio_p50": ratios[len(ratios) // 2],
        "egress_ratio_p99": ratios[len(ratios) * 99 // 100],
        "egress_ratio_max": ratios[-1],
        "events": sum(verdict.events for verdict in verdicts.values()),
        "wall_s": round(wall_s, 1),
    }


def summary(verdicts: dict[int, Verdict], wall_s: float) -> Iterator[str]:
    """Yield lines for people."""
    facts = figures(verdicts, wall_s)
    yield (
        f"{facts['schedules']:,} schedules with {facts['faults']:,} faults in {facts['wall_s']:.0f} s "
        f"({facts['events']:,} events): {facts['failed']} failed"
    )
    yield (
        f"read from the origin, per byte of the image: median {facts['egress_ratio_p50']:.2f}, "
        f"99% below {facts['egress_ratio_p99']:.2f}, at most {facts['egress_ratio_max']:.2f}; "
        f"{facts['failed_pulls_allowed']} pulls failed as they may, and were asked for again"
    )
    for invariant, count in facts["broken"].items():
        yield f"  {count} × {invariant}"


def _first_of_each(broken: list[int], verdicts: dict[int, Verdict]) -> list[int]:
    firsts: dict[str, int] = {}
    for seed in broken:
        firsts.setdefault(verdicts[seed].invariant, seed)
    return list(firsts.values())[:SHRUNK]


def _explain(seed: int, verdict: Verdict, console: Console) -> dict[str, Any]:
    """Print a failing schedule as small as it gets, and return it."""
    with _without_gc():
        schedule = shrink(draw(seed), lambda smaller: play(smaller).invariant == verdict.invariant)
        shrunk = play(schedule)
    facts = {"invariant": verdict.invariant, "from_seed": seed, "schedule": schedule.as_dict()}
    lines = [f"\nseed {seed} broke: {verdict.what}", "the smallest schedule that does:", str(schedule), shrunk.what]
    for line in lines:
        console.print(line, highlight=False, markup=False)
    console.print(json.dumps(facts), highlight=False, markup=False, soft_wrap=True)
    return facts


def _write(file: Path, facts: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(facts) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {file}: {error.strerror}") from error
