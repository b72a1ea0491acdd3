# SPDX-License-Identifier: Apache-2.0
"""The verbs `demo` and `bench`: what may be asked for, in click's words; the only file here that exits."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bench.faults.plan import NAMES as SCENARIOS
from bench.node_figures import PARTS
from bench.systems import SYSTEMS
from bench.workloads import NAMES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from rich.console import Console

T = TypeVar("T")

_NODES = click.IntRange(1, 200)
_MBIT = click.FloatRange(1, 100_000)
_MIB = click.IntRange(1, 64 << 10)
_PART = click.FloatRange(0, 1)
_FILE = click.Path(dir_okay=False, path_type=Path)
_DIRECTORY = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--nodes", type=_NODES, default=8, show_default=True, help="Nodes that pull at once.")
@click.option("--link-mbit", type=_MBIT, default=100.0, show_default=True, help="Each link, Mbit/s both ways.")
@click.option("--image-mib", type=_MIB, default=80, show_default=True, help="About the size of the image, MiB.")
def demo(nodes: int, link_mbit: float, image_mib: int) -> None:
    """Show p2pdist at work: one image to all nodes of a small cluster on this machine, next to direct pulls.

    Needs no configuration. As root, or where user namespaces are allowed, each node has a shaped link of
    its own. Everything that it starts ends with it, also on Ctrl-C.
    """
    from bench.crowd import Shape
    from bench.demo import Demo, show
    from bench.lab import netns

    reason = netns.why_not(announce=click.echo)
    shape = Shape(nodes=nodes, link_mbit=link_mbit, origin_mbit=link_mbit, image_bytes=image_mib << 20)
    right = _run(partial(show, Demo(shape, reason, netns.in_user_namespace()), _console()))
    sys.exit(0 if right else 1)


@click.group()
def bench() -> None:
    """Measure p2pdist on this machine."""


@bench.command()
@click.option(
    "--workload", "names", type=click.Choice(NAMES), multiple=True, help="May be repeated; see bench/README.md."
)
@click.option("--nodes", type=_NODES, help="Nodes that pull.  [default: 12]")
@click.option("--link-mbit", type=_MBIT, help="Each node's link, Mbit/s both ways.  [default: 100]")
@click.option("--origin-mbit", type=_MBIT, help="The registry's link.  [default: as --link-mbit]")
@click.option("--origin-per-connection-mbit", type=_MBIT, help="What the registry limits each connection to.")
@click.option("--image-mib", type=_MIB, help="Size of the image, MiB.  [default: 64]")
@click.option("--layers", type=click.IntRange(1, 127), help="Its layers, of equal size.  [default: 3]")
@click.option("--jitter-s", type=click.FloatRange(0), help="Spread of the starts, s.  [default: 0]")
@click.option("--batches", type=click.FloatRange(0, 1, min_open=True), help="Part of the nodes that starts at once.")
@click.option("--poisson", "poisson_s", type=click.FloatRange(0, min_open=True), help="Nodes join, so many s apart.")
@click.option("--shared", type=click.FloatRange(0, 1, max_open=True), help="Part of the layers that nodes have before.")
@click.option("--racks", type=click.IntRange(0, 50), help="Racks, each with a switch.  [default: 0, all on one]")
@click.option("--rack-uplink-mbit", type=_MBIT, help="What all nodes of a rack share, both ways.")
@click.option(
    "--system", "systems", type=click.Choice(SYSTEMS), multiple=True, help="May be repeated.  [default: p2pdist]"
)
@click.option("--runs", "--seeds", type=click.IntRange(1, 100), default=1, show_default=True, help="Of each system.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the first run; then one more for each.")
@click.option("--schedulers", type=click.IntRange(1, 8), default=1, show_default=True, help="That agents are given.")
@click.option(
    "--kill-scheduler-at",
    type=click.FloatRange(0, 1),
    help="Kill the scheduler, of several the busiest, at this part of all bytes, 0 to 1.",
)
@click.option("--json", "json_file", type=_FILE, help="Write one JSON object per run and line.")
@click.option("--report", type=click.Path(path_type=Path), help="Write an HTML report: a directory, or FILE.html.")
@click.option("--keep-logs", type=_DIRECTORY, help="Copy the logs of all processes there.")
def rollout(
    names: tuple[str, ...],
    systems: tuple[str, ...],
    runs: int,
    seed: int,
    schedulers: int,
    kill_scheduler_at: float | None,
    json_file: Path | None,
    report: Path | None,
    keep_logs: Path | None,
    **sizes: Any,  # noqa: ANN401  # the fields of Workload, of their types
) -> None:
    """Pull one image on all nodes, with one system after another, and measure.

    --workload sets all sizes at once, and each option for a size changes it. The bound is the bytes that a
    node lacks over what one bulk TCP flow gets from the registry. A run with under 25% idle CPU is void: it
    measured the machine.
    """
    from bench.lab import netns
    from bench.rollout import Plan, rollouts
    from bench.workloads import CUSTOM, named

    changes = {name: value for name, value in sizes.items() if value is not None}
    workloads = [workload for name in names for workload in named(name)] or [CUSTOM]
    reason = netns.why_not(announce=click.echo)
    plan = Plan(
        workloads=[replace(workload, **changes) for workload in workloads],
        systems=tuple(dict.fromkeys(systems)) or ("p2pdist",),
        runs=runs,
        seed=seed,
        schedulers=schedulers,
        kill_scheduler_at=kill_scheduler_at,
        json_file=json_file,
        report=report,
        keep_logs=keep_logs,
        loopback_reason=reason,
    )
    sys.exit(0 if _run(partial(rollouts, plan, _console())) else 1)


@bench.command()
@click.option(
    "--scenario", "names", type=click.Choice(SCENARIOS), multiple=True, help="May be repeated.  [default: all]"
)
@click.option("--chaos", is_flag=True, help="In the place of scenarios: what a seed says breaks, and who lies.")
@click.option("--soak", type=click.IntRange(4, 10_000), help="In their place: so many rollouts in a row.")
@click.option("--nodes", type=_NODES, help="Nodes; of W5 those that lie too.  [default: 12; W5 20; --soak 6]")
@click.option("--link-mbit", type=_MBIT, help="Each link, Mbit/s both ways.  [default: 50; W5 25; --soak 1000]")
@click.option("--image-mib", type=_MIB, help="Size of the image, MiB.  [default: 128; W5 64; --chaos 16; --soak 2.5]")
@click.option("--runs", "--seeds", type=click.IntRange(1, 1000), default=1, show_default=True, help="Of each scenario.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the first run; then one more for each.")
@click.option("--json", "json_file", type=_FILE, help="Write one JSON object per run and line.")
@click.option("--report", type=click.Path(path_type=Path), help="Write an HTML report: a directory, or FILE.html.")
@click.option("--keep-logs", type=_DIRECTORY, help="Copy the logs of all processes there.")
def faults(
    names: tuple[str, ...],
    chaos: bool,
    soak: int | None,
    runs: int,
    seed: int,
    json_file: Path | None,
    report: Path | None,
    keep_logs: Path | None,
    **sizes: Any,  # noqa: ANN401  # the fields of Workload, of their types
) -> None:
    """Roll an image out while things break and peers lie; exit code 1 where that is not as promised.

    Scenarios are named rollouts, each held against an undisturbed one of the same seed. See bench/README.md.
    """
    from bench.faults import chaos as chaotic
    from bench.faults import scenarios
    from bench.faults import soak as soaking
    from bench.faults.plan import named
    from bench.lab import netns
    from bench.lab.errors import LabError

    if bool(names) + chaos + (soak is not None) > 1:
        raise click.UsageError("--scenario, --chaos and --soak exclude each other")
    if reason := netns.why_not(announce=click.echo):
        raise LabError(f"faults need network namespaces: {reason}")
    changes = {name: value for name, value in sizes.items() if value is not None}
    main: Callable[[], Awaitable[bool]]
    if chaos:
        plan = chaotic.Plan(runs=runs, seed=seed, json_file=json_file, keep_logs=keep_logs, **changes)
        main = partial(chaotic.run_chaos, plan, _console())
    elif soak is not None:
        if "image_mib" in changes:
            changes["image_kib"] = changes.pop("image_mib") << 10
        main = partial(
            soaking.run_soak, soaking.Plan(rollouts=soak, seed=seed, json_file=json_file, **changes), _console()
        )
    else:
        chosen = {scenario.name: scenario for name in names or SCENARIOS for scenario in named(name)}
        files = {"json_file": json_file, "report": report, "keep_logs": keep_logs}
        resized = [replace(each, workload=replace(each.workload, **changes)) for each in chosen.values()]
        main = partial(
            scenarios.run_scenarios, scenarios.Plan(scenarios=resized, runs=runs, seed=seed, **files), _console()
        )
    sys.exit(0 if _run(main) else 1)


@bench.command()
@click.option(
    "--part", "parts", type=click.Choice(PARTS), multiple=True, help="What to measure; may be repeated.  [default: all]"
)
@click.option("--image-mib", type=_MIB, default=1024, show_default=True, help="Size of the blob or image, MiB.")
@click.option("--runs", type=click.IntRange(1, 20), default=3, show_default=True, help="Of each measurement.")
@click.option("--nodes", type=click.IntRange(2, 50), default=3, show_default=True, help="Agents of the part swarm.")
@click.option("--layers", type=click.IntRange(1, 127), default=4, show_default=True, help="Layers of its image.")
@click.option("--identity", is_flag=True, help="Measure it with certificates and TLS, too, taking turns.")
@click.option("--json", "json_file", type=_FILE, help="Write one JSON object per measurement and line.")
def node(parts: tuple[str, ...], identity: bool, json_file: Path | None, **sizes: int) -> None:
    """Measure what agents cost without the network's limits: warm, cold, in a swarm; next to nginx and a registry.

    Everything shares this machine, the clients too; only the CPU of what serves is counted.
    """
    from bench.lab import netns
    from bench.node import Plan, measure

    shaped = netns.why_not(announce=click.echo) is None
    chosen = tuple(dict.fromkeys(parts)) or PARTS
    plan = Plan(parts=chosen, namespaces=shaped, identity=identity, json_file=json_file, **sizes)
    _run(partial(measure, plan, _console()))


@bench.command()
@click.option("--agents", type=click.IntRange(1, 19_000), default=5000, show_default=True, help="Simulated agents.")
@click.option("--image-mib", type=_MIB, default=256, show_default=True, help="Size of the image, MiB.")
@click.option("--layers", type=click.IntRange(1, 127), default=5, show_default=True, help="Its layers, of equal size.")
@click.option("--spread-s", type=click.FloatRange(0), default=9.0, show_default=True, help="Spread of the starts, s.")
@click.option("--origin-mbit", type=_MBIT, default=200.0, show_default=True, help="The modelled registry, Mbit/s.")
@click.option("--link-mbit", type=_MBIT, default=1000.0, show_default=True, help="Each modelled link, Mbit/s.")
@click.option("--runs", type=click.IntRange(1, 100), default=1, show_default=True, help="Runs, each of its own seed.")
@click.option("--json", "json_file", type=_FILE, help="Write one JSON object per run and line.")
def scheduler(json_file: Path | None, runs: int, image_mib: int, **shape: float) -> None:
    """Measure one scheduler process under agents that all start the same image; they move no chunks, only words.

    A run is void where the simulated agents or other programs needed the CPU that was to be measured.
    """
    from bench.scheduler_load import measure
    from bench.scheduler_model import Plan

    plans = [Plan(image_bytes=image_mib << 20, seed=seed, **shape) for seed in range(1, runs + 1)]  # type: ignore[arg-type]
    sys.exit(0 if _run(partial(measure, plans, json_file, _console())) else 1)


@bench.command()
@click.option("--nodes", type=click.IntRange(2, 200_000), help="Simulated agents.  [default: 1000]")
@click.option("--link-mbit", type=_MBIT, help="Each node's link, Mbit/s both ways.  [default: 50]")
@click.option("--origin-mbit", type=_MBIT, help="The registry's link.  [default: as --link-mbit]")
@click.option("--origin-per-connection-mbit", type=_MBIT, help="What the registry limits each connection to.")
@click.option("--image-mib", type=_MIB, help="Size of the image, MiB.  [default: 64]")
@click.option("--layers", type=click.IntRange(1, 127), help="Its layers, of equal size.  [default: 1]")
@click.option("--degree", type=click.IntRange(4, 100), help="Neighbours per agent.  [default: 20]")
@click.option("--jitter-s", type=click.FloatRange(0), help="Spread of the starts, s.  [default: 1]")
@click.option("--latency-s", type=click.FloatRange(0, 1), help="Of each message, one way.  [default: 0.005]")
@click.option("--slow", "slow_ratio", type=_PART, help="Part of the nodes that have slow links.  [default: 0]")
@click.option("--slow-factor", type=click.FloatRange(0.001, 1), help="Their rate over the others'.  [default: 0.1]")
@click.option("--slow-uplinks", is_flag=True, default=None, help="Only what these nodes send is slow.")
@click.option("--leave", "leave_per_minute", type=_PART, help="Part of the nodes that leaves per minute.  [default: 0]")
@click.option("--replaced/--not-replaced", default=None, help="Whether for each that leaves a new node joins.")
@click.option("--racks", type=click.IntRange(0, 10_000), help="Racks, each with a switch.  [default: 0, all on one]")
@click.option("--rack-uplink-mbit", "rack_mbit", type=_MBIT, help="What all nodes of a rack share, both ways.")
@click.option("--scheduler/--no-scheduler", default=None, help="Whether there is one.  [default: yes]")
@click.option("--poisson-s", type=click.FloatRange(0.001), help="Mean gap between starts, s.  [default: --jitter-s]")
@click.option("--tick-s", type=click.FloatRange(0.01, 1), help="Between looks at an agent's timers.  [default: 0.1]")
@click.option("--like-lab", is_flag=True, help="Start from what `rollout --workload W1` measures.")
@click.option("--compile", "compiles", is_flag=True, help="Compile the core first: half the time, the same figures.")
@click.option("--runs", "--seeds", type=click.IntRange(1, 100), default=1, show_default=True, help="Of one seed each.")
@click.option("--seed", type=int, help="Of the first run; then one more for each.  [default: 1]")
@click.option("--json", "json_file", type=_FILE, help="Write one JSON object per run and line.")
def simulate(runs: int, like_lab: bool, compiles: bool, json_file: Path | None, **sizes: Any) -> None:  # noqa: ANN401
    """Simulate a rollout to thousands of nodes: the agents' and the scheduler's own decisions on virtual time.

    Links are shared fairly, and CPU costs nothing. The bound is the image over a node's own link, or what the
    registry and all nodes together can give, whichever is later. See bench/README.md.
    """
    from bench.simulator.plan import LIKE_LAB, Plan
    from bench.simulator.run import simulate

    if compiles:
        _run_compiled()
    changes = {name: value for name, value in sizes.items() if value is not None}
    plan = replace(LIKE_LAB if like_lab else Plan(), **changes)
    sys.exit(0 if simulate(plan, runs, json_file, _console()) else 1)


def _run_compiled() -> None:
    """Become the same command, compiled; return where that cannot be."""
    from bench.simulator.compiled import CannotCompile, command, compiled_tree, default_cache

    click.echo("compiling, if that is not done yet: about a minute", err=True)
    try:
        arguments, environment = command(
            compiled_tree(default_cache()), [word for word in sys.argv[1:] if word != "--compile"]
        )
    except CannotCompile as error:
        click.echo(f"not compiled: {error}; goes on without, at half the speed", err=True)
        return
    os.execve(arguments[0], arguments, environment)


@bench.command()
@click.option("--kills", type=click.IntRange(1, 1_000_000), default=1000, show_default=True, help="SIGKILLs, in a row.")
@click.option("--seed", type=int, default=1, show_default=True, help="All but the instants of kills follows from it.")
@click.option("--directory", type=_DIRECTORY, help="An empty one, to try its file system.  [default: one in memory]")
@click.option("--json", "json_file", type=_FILE, help="Write one JSON object.")
def store(kills: int, seed: int, directory: Path | None, json_file: Path | None) -> None:
    """Kill users of a store over and over, and look after each whether it holds what it should, and nothing else.

    At instants and at calls into the file system: while it writes, commits, evicts, removes and restarts.
    """
    from bench.store.run import measure

    sys.exit(0 if measure(kills, seed, directory, json_file, _console()) else 1)


@bench.command()
@click.option("--count", type=click.IntRange(1), default=1000, show_default=True, help="Schedules.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the first; one more for each.")
@click.option("--processes", type=click.IntRange(1, 64), default=1, show_default=True, help="That play them.")
@click.option("--replay", "kept", type=_FILE, help="Play again what --json kept, instead.")
@click.option("--json", "json_file", type=_FILE, help="Write one JSON object: figures, and failing schedules.")
def schedules(count: int, seed: int, processes: int, kept: Path | None, json_file: Path | None) -> None:
    """Play random schedules of faults against the agents' and the scheduler's own decisions, on virtual time.

    Small swarms, in which nodes die, freeze and lie, links break, and the registry fails. What must hold in each is
    checked; a schedule that fails is made as small as it gets, and printed. See bench/README.md.
    """
    from bench.schedules import run

    console = _console()
    held = run.replay(kept, console) if kept else run.schedules(count, seed, processes, json_file, console)
    sys.exit(0 if held else 1)


def _run(main: Callable[[], Awaitable[T]]) -> T:
    """Run to the end or to a signal; show the log that explains a failure before the command names it."""
    from bench import interrupt
    from bench.lab.errors import LabError

    try:
        return interrupt.run(main)
    except interrupt.Interrupted as error:
        click.echo("stopped; all that was started has ended", err=True)
        sys.exit(128 + error.signal)
    except (LabError, BaseExceptionGroup) as error:
        for log in _logs(error):
            click.echo(log, err=True)
        raise


def _console() -> Console:
    from rich.console import Console

    # A file or pipe has no width of its own; 80 columns would cut lines for nobody.
    return Console() if sys.stdout.isatty() else Console(width=120)


def _logs(error: BaseException) -> Iterator[str]:
    from bench.lab.errors import LabError

    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _logs(inner)
    elif isinstance(error, LabError) and error.log:
        yield error.log
