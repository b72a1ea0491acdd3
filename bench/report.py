# SPDX-License-Identifier: Apache-2.0
"""The report of `bench rollout`: one HTML file with pictures, which needs nothing but itself; pure but for its style.

For each workload: what was measured, the figures of all runs, the ratio to the bound of each system with its spread,
and, of each system's middle run, how its nodes got the image and what left the origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from bench.charts import Bar, Frame, Line, Mark, bars, lines
from bench.tables import by_system, columns, number, spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.contract import Target
    from bench.crowd import Outcome
    from bench.results import Result
    from bench.workloads import Workload

_COLOURS = {"p2pdist-mdns": "mdns", "bittorrent-plain": "plain", "undisturbed": "direct"}
"""Of systems whose name is not the name of their colour."""

_TARGET_HEAD = "<th>wanted</th><th>seen</th><th>limit</th><th></th>"
_MET, _MISSED = "<td>met</td>", '<td class="warn">MISSED</td>'
_PANEL = Frame(width=470, height=250)
_WIDE = Frame(width=1100, height=300, right=150)
_HEAD_ROOM = 1.04

_NOTES = """\
<h2>How to read this</h2>
<p>Each node is a network namespace behind a link of its own, shaped both ways. The <b>bound</b> is what no node can
beat: the bytes that it lacks over what one bulk TCP flow gets, measured before. <b>÷ bound</b> is that of the slowest
node, from its own start; 1.00 is perfect. <b>Egress</b> is the payload that left the origin over what one node lacks:
1.00 is the least, as many as there are nodes is what pulling straight from the registry takes. <b>Idle</b> is the
machine's CPU; a run with under a quarter idle measured the machine, not the network: it is <b>void</b>, shown, and left
out of medians. Times to the first byte (TTFB) are of each blob, as the container runtime sees them.</p>
"""


@dataclass(frozen=True, slots=True)
class Chapter:
    """One workload: what was measured, in lines, all its runs, and what was wanted of them."""

    workload: Workload
    description: str
    outcomes: Sequence[Outcome]
    targets: Sequence[Target] = ()

    @property
    def results(self) -> list[Result]:
        return [outcome.result for outcome in self.outcomes]


@dataclass(frozen=True, slots=True)
class Report:
    """What is told; `machine` and `when` in a line each, `command` is what was run."""

    machine: str
    when: str
    chapters: Sequence[Chapter]
    command: str = "p2pdist bench rollout"


def report_place(place: Path, name: str) -> Path:
    """Return the file of a report that goes to a directory, or to a file that ends in .html; its directory exists."""
    file = place if place.suffix == ".html" else place / name
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def page(report: Report) -> str:
    """Return the report as an HTML document."""
    style = Path(__file__).with_name("report.css").read_text()
    body = "".join(_chapter(chapter) for chapter in report.chapters)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{report.command}</title><style>\n{style}</style></head><body>\n"
        "<h1>An image to all nodes</h1>\n"
        f'<p class="soft">{report.command} · {escape(report.when)}<br/>{escape(report.machine)}</p>\n'
        f"{body}{_NOTES}</body></html>\n"
    )


def _chapter(chapter: Chapter) -> str:
    said = "<br/>".join(escape(line) for line in chapter.description.splitlines())
    middle = [_middle(runs) for runs in _outcomes_by_system(chapter.outcomes)]
    return (
        f"<h2>{escape(chapter.workload.title)}</h2>\n"
        f'<p class="soft">{said}</p>\n{_failures(chapter.results)}'
        f"{_targets(chapter.targets)}{_table(chapter.results)}"
        f"<h3>Slowest node ÷ bound</h3>\n<figure>{_ratio_bars(chapter.results)}</figure>\n"
        f"<h3>What each node has, over time</h3>\n"
        f'<div class="panels">{"".join(_panel(outcome) for outcome in middle)}</div>\n'
        f"<h3>What has left the origin, over time</h3>\n<figure>{_origin(middle)}</figure>\n"
    )


def _failures(results: Iterable[Result]) -> str:
    errors = [f"{result.system}: {error}" for result in results for error in result.errors]
    return "".join(f'<p class="warn">{escape(error)}</p>\n' for error in errors)


def _targets(targets: Sequence[Target]) -> str:
    """Return what was wanted and what was seen, where something was wanted."""
    if not targets:
        return ""
    rows = "".join(
        f"<tr><td>{escape(target.what)}</td><td>{escape(target.seen)}</td><td>{escape(target.wanted)}</td>"
        f"{_MET if target.met else _MISSED}</tr>"
        for target in targets
    )
    return f'<div class="scroll"><table><thead><tr>{_TARGET_HEAD}</tr></thead><tbody>{rows}</tbody></table></div>\n'


def _table(results: Sequence[Result]) -> str:
    system, *others = columns(results)
    shown = [system, ("seed", _seed), *others]
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in shown)
    rows = "".join(_row(result, [cell(result) for _, cell in shown]) for result in results)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n'


def _seed(result: Result) -> str:
    return str(result.run.get("seed", ""))


def _row(result: Result, cells: Sequence[str]) -> str:
    void = ' class="void"' if result.void else ""
    return f"<tr{void}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _ratio_bars(results: Sequence[Result]) -> str:
    rows = [bar for name, runs in by_system(results).items() if (bar := _ratio_bar(name, runs))]
    frame = Frame(width=1100, height=52 + 34 * max(1, len(rows)), left=112, right=190, top=6, bottom=38)
    return bars(rows, frame, base_label="1 = the bound; logarithmic; dots are runs")


def _ratio_bar(name: str, runs: Sequence[Result]) -> Bar | None:
    seen = spread(runs, lambda result: result.own_ratio_to_bound)
    if seen.median is None or seen.worst is None:
        ratios = sorted(run.own_ratio_to_bound for run in runs if run.own_ratio_to_bound is not None)
        if not ratios:
            return None
        return Bar(name, ratios[len(ratios) // 2], ratios, _colour(name), "void: the CPU starved", hollow=True)
    label = number(seen.median, 3) + (f", worst {number(seen.worst, 3)}" if len(seen.values) > 1 else "")
    return Bar(name, seen.median, seen.values, _colour(name), label)


def _panel(outcome: Outcome) -> str:
    """Return one run's nodes, each a curve that begins when the node does."""
    result, series = outcome.result, outcome.series
    curves = [
        Line(
            _from_start(list(zip(series.times_s, series.node(node), strict=True)), result.image_bytes),
            colour,
            thin=True,
        )
        for colour in [_colour(result.system)]
        for node in range(result.nodes)
    ]
    last_s = series.times_s[-1] if series.times_s else 0.0
    drawn = lines(
        curves,
        _PANEL,
        x_label="seconds",
        y_tick=lambda part: f"{part:.0%}",
        x_max=max(last_s, result.bound_s) * _HEAD_ROOM,
        y_max=1.0,
        mark=Mark(result.bound_s, f"bound {result.bound_s:.1f} s"),
    )
    said = f"last node {number(result.last_s)} s, {number(result.own_ratio_to_bound, 3)} × bound from its own start"
    seed = result.run.get("seed")
    void = " · void" if result.void else ""
    caption = f"<figcaption><b>{escape(result.system)}</b> · {said} · seed {escape(str(seed))}{void}</figcaption>"
    return f"<figure>{caption}{drawn}</figure>"


def _from_start(points: Sequence[tuple[float, int]], image_bytes: int) -> list[tuple[float, float]]:
    """Return a node's curve as parts of the image, from the reading before its first byte to that of its last."""
    first = next((place for place, (_, done) in enumerate(points) if done), len(points))
    last = next((place for place, (_, done) in enumerate(points) if done >= image_bytes), len(points) - 1)
    return [(time_s, done / image_bytes) for time_s, done in points[max(0, first - 1) : last + 1]]


def _origin(outcomes: Sequence[Outcome]) -> str:
    """Return each run's bytes out of the origin's host, headers included, as multiples of what one node lacks."""
    curves = []
    for outcome in outcomes:
        result, series = outcome.result, outcome.series
        points = [
            (time_s, sent / result.image_bytes)
            for time_s, sent in zip(series.times_s, series.origin_bytes, strict=True)
        ]
        label = f"{result.system} {points[-1][1]:.2f} ×" if points else ""
        curves.append(Line(points, _colour(result.system), label))
    ends = [curve.points[-1] for curve in curves if curve.points]
    return lines(
        curves,
        _WIDE,
        x_label="seconds; with headers",
        y_tick=lambda part: f"{part:g} ×",
        x_max=max((x for x, _ in ends), default=1.0),
        y_max=max((y for _, y in ends), default=1.0) * _HEAD_ROOM,
    )


def _outcomes_by_system(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    names = dict.fromkeys(outcome.result.system for outcome in outcomes)
    return [[outcome for outcome in outcomes if outcome.result.system == name] for name in names]


def _middle(runs: Sequence[Outcome]) -> Outcome:
    """Return the run whose ratio is the median of those that are not void, or else of all."""
    valid = [run for run in runs if not run.result.void] or list(runs)
    ordered = sorted(valid, key=lambda run: run.result.own_ratio_to_bound or 0.0)
    return ordered[len(ordered) // 2]


def _colour(system: str) -> str:
    return _COLOURS.get(system, system)
