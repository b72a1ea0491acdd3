# SPDX-License-Identifier: Apache-2.0
"""A program that works on a disk store and is killed in the middle; driven by test_kill.py.

Reads one request per line, as JSON: {"dir", "seed", "steps", and either "kill_after_reports" or "kill_at_call"}.
Each is done by a fork that kills itself with SIGKILL at the given call into the file system, or is killed after
so many of its reports. Answers one line: {"reports": [[what, verb, digest], ...], "signal": 9 or 0}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2pdist.store.disk import DiskStore
from tests.store.blobs import Content, content

if TYPE_CHECKING:
    from collections.abc import Callable

    from p2pdist.ports import ChunkStore

ROOM_BYTES = 200_000
CALLS = {"open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.utime"}


def blob_named(name: int) -> Content:
    return content(name, random.Random(name).randrange(60_000))


def work(data_dir: Path, seed: int, steps: int, report: Callable[[str, str, str], None]) -> None:
    rng = random.Random(seed)
    store = DiskStore(
        data_dir,
        max_bytes=ROOM_BYTES,
        low_bytes=ROOM_BYTES * 3 // 4,
        min_free_bytes=0,
        on_evicted=lambda digest: report("evicted", "", digest),
    )
    for _ in range(steps):
        blob = blob_named(rng.randrange(14))
        verb = rng.choices(["put", "leave", "add", "remove"], [5, 2, 1, 2])[0]
        if store.contains(blob.digest) == (verb == "remove"):
            report("begin", verb, blob.digest)
            VERBS[verb](store, blob, rng)
            report("done", verb, blob.digest)
    store.close()


def put(store: ChunkStore, blob: Content, rng: random.Random) -> None:
    partial = blob.start(store)
    missing = [index for index in range(blob.count) if index not in partial.have()]
    blob.write(partial, rng.sample(missing, len(missing)))
    partial.commit(public=True).close()
    partial.close()


def leave(store: ChunkStore, blob: Content, rng: random.Random) -> None:
    partial = blob.start(store)
    blob.write(partial, rng.sample(range(blob.count), blob.count // 2))
    partial.close()


def add(store: ChunkStore, blob: Content, rng: random.Random) -> None:
    store.add(blob.digest, blob.body, media_type="", public=True)


def remove(store: ChunkStore, blob: Content, rng: random.Random) -> None:
    store.remove(blob.digest)


VERBS = {"put": put, "leave": leave, "add": add, "remove": remove}


def kill_self_at(call: int) -> None:
    left = call

    def on_call(event: str, _arguments: object) -> None:
        nonlocal left
        if event in CALLS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_call)


def run(request: dict[str, Any], pipe: int) -> None:
    """Do the work in a fork; never returns."""
    status = 1
    try:
        if "kill_at_call" in request:
            kill_self_at(request["kill_at_call"])
        work(
            Path(request["dir"]),
            request["seed"],
            request["steps"],
            lambda *what: void(os.write(pipe, json.dumps(what).encode() + b"\n")),
        )
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def void(_: object) -> None:
    """Swallow a result."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        run(request, write_end)
    os.close(write_end)
    reports = []
    with open(read_end) as lines:
        for line in lines:
            reports.append(json.loads(line))
            if len(reports) == request.get("kill_after_reports"):
                os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the work failed of itself")
    return {"reports": reports, "signal": os.WTERMSIG(status)}


if __name__ == "__main__":
    for request in sys.stdin:
        print(json.dumps(answer(json.loads(request))), flush=True)
