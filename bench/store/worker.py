# SPDX-License-Identifier: Apache-2.0
"""A program that works on a disk store and is killed in the middle of it; `run.py` starts it and reads its reports.

Reads one request per line, as JSON: {"directory", "seed", "steps", and one of "kill_at_call" and "kill_after_s", which
counts from the fork}. Each is done by a fork. With "kill_at_call" come "of", the calls that count, and "how": whether
it ends before the call into the file system, after it or, where it is a write, with half of the bytes written.
Answers one line: {"reports": [[what, verb, digest], ...], "killed"}. A report stands in a pipe before the work goes
on, so that it outlives the kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.store.calls import hooked
from p2pdist.core.chunkmap import ChunkMap
from p2pdist.core.types import Digest
from p2pdist.core.verify import checksum_of
from p2pdist.store.disk import DiskStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from p2pdist.ports import PartialBlob

ROOM_BYTES = 200_000
"""A third of all blobs, so that most arrivals evict some."""
BLOBS = 14
CHUNK_BYTES = 1000
VERBS = ("put", "leave", "add", "remove")


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob of the work: always the same bytes under the same number."""

    body: bytes
    digest: Digest

    @classmethod
    def numbered(cls, number: int) -> Blob:
        rng = random.Random(number)
        body = rng.randbytes(rng.randrange(60_000))
        return cls(body, Digest(f"sha256:{hashlib.sha256(body).hexdigest()}"))


class Work:
    """Seeded work on one store: arrivals that are committed or left, small blobs, removals."""

    def __init__(self, directory: Path, seed: int, report: Callable[[str, str, str], None]) -> None:
        self._rng = random.Random(seed)
        self._report = report
        self.stage = ""
        self._enter("restart")
        self.store = DiskStore(
            directory,
            max_bytes=ROOM_BYTES,
            low_bytes=ROOM_BYTES * 3 // 4,
            min_free_bytes=0,
            on_evicted=lambda digest: report("evicted", "", digest),
        )

    def do(self, steps: int) -> None:
        """Take that many steps, and report each before it begins and when it is done."""
        for _ in range(steps):
            blob = Blob.numbered(self._rng.randrange(BLOBS))
            verb = self._rng.choices(VERBS, [5, 2, 1, 2])[0]
            if self.store.contains(blob.digest) != (verb == "remove"):
                continue
            self._report("begin", verb, blob.digest)
            getattr(self, f"_{verb}")(blob)
            self._report("done", verb, blob.digest)
        self._enter("close")
        self.store.close()

    def _enter(self, stage: str) -> None:
        self.stage = stage
        self._report("stage", stage, "")

    def _put(self, blob: Blob) -> None:
        with closing(self._start(blob)) as partial:
            self._write(blob, partial, 1.0)
            self._enter("commit")
            partial.commit(public=True).close()

    def _leave(self, blob: Blob) -> None:
        with closing(self._start(blob)) as partial:
            self._write(blob, partial, 0.5)

    def _start(self, blob: Blob) -> PartialBlob:
        self._enter("write")
        return self.store.start(blob.digest, len(blob.body), CHUNK_BYTES)

    def _write(self, blob: Blob, partial: PartialBlob, part: float) -> None:
        cut = ChunkMap(len(blob.body), CHUNK_BYTES)
        missing = [index for index in range(cut.count) if index not in partial.have()]
        for index in self._rng.sample(missing, int(len(missing) * part)):
            data = blob.body[cut.start(index) :][: cut.length(index)]
            partial.write_chunk(index, data, checksum_of(data))

    def _add(self, blob: Blob) -> None:
        self._enter("add")
        self.store.add(blob.digest, blob.body, media_type="", public=True)

    def _remove(self, blob: Blob) -> None:
        self._enter("remove")
        self.store.remove(blob.digest)


class Executioner:
    """Counts the calls into the file system, and kills this process at one of them."""

    def __init__(self, call: int, of: str, how: str, report: Callable[[str, str, str], None]) -> None:
        self._left = call
        self._of = of
        self._how = how
        self._report = report
        self.stage: Callable[[], str] = lambda: "restart"

    def __call__(self, name: str, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        self._left -= self._of in ("", name)
        if self._left or self._of not in ("", name):
            return function(*arguments, **named)
        stage = self.stage()
        if stage in ("write", "add", "commit") and name == "rename" and "/tmp/" in str(arguments[1]):
            stage = "evict"
        self._report("killed", stage, name)
        if self._how == "torn" and name == "pwrite":
            descriptor, data, offset = arguments
            function(descriptor, memoryview(data)[: len(data) // 2], offset)
        elif self._how == "after":
            with suppress(OSError):  # the work would go on
                function(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a process outlived its SIGKILL")


def _run(request: dict[str, Any], pipe: int) -> None:
    """Do the work in a fork; never returns."""
    status = 1

    def report(*what: str) -> None:
        os.write(pipe, json.dumps(what).encode() + b"\n")

    try:
        executioner = Executioner(request.get("kill_at_call", 0), request.get("of", ""), request.get("how", ""), report)
        with hooked(executioner):
            work = Work(Path(request["directory"]), request["seed"], report)
            executioner.stage = lambda: work.stage
            work.do(request["steps"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    kill_after_s = request.get("kill_after_s")
    kill_at = float("inf") if kill_after_s is None else time.monotonic() + kill_after_s
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _run(request, write_end)
    os.close(write_end)
    reports = _reports(read_end, child, kill_at)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the work failed of itself")
    return {"reports": reports, "killed": os.WIFSIGNALED(status)}


def _reports(read_end: int, child: int, kill_at: float) -> list[list[str]]:
    """Return all that the fork reports; kill it at `kill_at` (monotonic seconds), should it still live then."""
    told = bytearray()
    while True:
        wait_s = None if kill_at == float("inf") else max(0.0, kill_at - time.monotonic())
        if wait_s == 0.0:
            os.kill(child, signal.SIGKILL)  # it is a zombie at worst: nobody has waited for it
            kill_at = float("inf")
        elif select.select([read_end], [], [], wait_s)[0]:
            part = os.read(read_end, 1 << 16)
            if not part:
                break
            told += part
    os.close(read_end)
    return [json.loads(line) for line in told.splitlines()]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)
