# SPDX-License-Identifier: Apache-2.0
"""`p2pdist bench store`: a store that is killed at random points, one after the other, and looked at after each.

Two thirds of the kills are at a call into the file system (before it, after it, or with half of a write written), a
third at an instant; after half of them the restart is killed too, before the store is looked at. All of it follows
from the seed, but for the instants.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.lab.errors import LabError
from bench.lab.workspace import workspace
from bench.store.expected import Expected, check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console

STEPS = 1000
"""More than a round lives to see."""
CALLS = {
    "pwrite": 300,
    "open": 30,
    "fsync": 30,
    "rename": 30,
    "unlink": 30,
    "posix_fallocate": 12,
    "utime": 12,
    "mkdir": 6,
}
"""Which call, and up to which of its kind: about six arrivals."""
HOW = ("before", "torn", "after")
RESTART_CALLS = 40
"""Of a start on the leftovers of a kill: one for each blob, and what it deletes."""
INSTANT_S = 0.06
_WORKSPACE_BYTES = 64 << 20

Crash = dict[str, Any]


@dataclass(slots=True)
class Record:
    """What came of it."""

    kills: int = 0
    stages: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kills by what the store was doing and at which call; `instant` where it was at no chosen call."""
    committed: int = 0
    evicted: int = 0
    faults: list[str] = field(default_factory=list)

    def hear(self, told: Crash) -> None:
        """Count what one round reported."""
        stage = ("restart", "instant")
        for what, verb, text in told["reports"]:
            if what == "stage":
                stage = (verb, "instant")
            elif what == "killed":
                stage = (verb, text)
            self.evicted += what == "evicted"
            self.committed += what == "done" and verb in ("put", "add")
        if told["killed"]:
            self.kills += 1
            self.stages[stage] += 1


@contextmanager
def worker() -> Iterator[Callable[..., Crash]]:
    """Give a function that runs worker.py's work until it is killed, and returns what that reported."""
    command = [sys.executable, "-m", "bench.store.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def ask(**request: object) -> Crash:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
            line = answers.readline()
            if not line:
                raise LabError("the work on the store failed of itself; its traceback is above")
            answer: Crash = json.loads(line)
            return answer

        yield ask
        requests.close()


def kill_over_and_over(directory: Path, kills: int, seed: int, crash: Callable[..., Crash]) -> Record:
    """Kill users of the store in `directory` until there were so many kills or a fault."""
    rng, record, expected = random.Random(seed), Record(), Expected()
    while record.kills < kills and not record.faults:
        how = _moment(rng)
        told = crash(directory=str(directory), seed=rng.randrange(1 << 30), steps=STEPS, **how)
        record.hear(told)
        expected.hear(told["reports"])
        while record.kills < kills and rng.random() < 0.5:
            at = {"kill_at_call": rng.randrange(1, RESTART_CALLS), "how": rng.choice(HOW)}
            record.hear(crash(directory=str(directory), seed=0, steps=0, **at))
        record.faults = [f"{fault} (kill {record.kills}, {how})" for fault in check(directory, expected)]
        _rot_partial_blobs(directory, rng)
    return record


def _moment(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 1 / 3:
        return {"kill_after_s": rng.random() * INSTANT_S}
    of = rng.choice(tuple(CALLS))
    return {"kill_at_call": rng.randrange(1, CALLS[of]), "of": of, "how": rng.choice(HOW)}


def _rot_partial_blobs(directory: Path, rng: random.Random) -> None:
    """Change a byte of each: a later commit fails of itself if a resume takes it for right."""
    for path in sorted((directory / "partial").glob("*")):
        if path.suffix or not path.stat().st_size:
            continue
        with open(path, "r+b") as file:
            at = rng.randrange(path.stat().st_size)
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)


def measure(kills: int, seed: int, directory: Path | None, json_file: Path | None, console: Console) -> bool:
    """Do it and print what came of it; return whether nothing was wrong.

    Args:
        directory: where the store is, to try a file system; None: one in memory that is gone afterwards.

    Raises:
        LabError: the work failed otherwise than by a kill.
    """
    if directory is not None and directory.exists() and any(directory.iterdir()):
        raise LabError(f"{directory} is not empty; name one that is, or none")
    with workspace(_WORKSPACE_BYTES) as space, worker() as crash:
        record = kill_over_and_over(directory or space.directory("store"), kills, seed, crash)
    console.print(_table(record))
    for fault in record.faults:
        console.print(fault, markup=False, highlight=False, soft_wrap=True)
    verdict = "no committed blob lost, none wrong, nothing left over" if not record.faults else "not as it should be"
    console.print(f"{record.kills} kills, seed {seed}: {verdict}")
    if json_file is not None:
        stages = {f"{stage} {call}": count for (stage, call), count in sorted(record.stages.items())}
        figures = {"committed": record.committed, "evicted": record.evicted, "faults": record.faults, "at": stages}
        json_file.write_text(json.dumps({"system": "store", "seed": seed, "kills": record.kills, **figures}) + "\n")
    return not record.faults


def _table(record: Record) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for heading in ("killed in", "kills", "at"):
        table.add_column(heading, justify="right" if heading == "kills" else "left")
    for stage in sorted({stage for stage, _ in record.stages}):
        calls = {call: count for (found, call), count in sorted(record.stages.items()) if found == stage}
        table.add_row(stage, str(sum(calls.values())), ", ".join(f"{call} {n}" for call, n in calls.items()))
    return table
