# SPDX-License-Identifier: Apache-2.0
"""A store that is killed at any instant keeps all that was committed, serves nothing wrong and leaks no file."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from p2pdist.core.types import Digest
from p2pdist.core.verify import checksum_of
from p2pdist.store.disk import DiskStore
from tests.store.crasher import ROOM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent.parent
CALLS_MAX = 400
KILLS = 30


@pytest.fixture
def crash() -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs crasher.py's work on a directory until it is killed; returns what it reported."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.store.crasher"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as crasher:
        assert crasher.stdin is not None
        assert crasher.stdout is not None

        def ask(**request: object) -> dict[str, Any]:
            assert crasher.stdin is not None
            assert crasher.stdout is not None
            crasher.stdin.write(json.dumps(request) + "\n")
            crasher.stdin.flush()
            answer: dict[str, Any] = json.loads(crasher.stdout.readline())
            return answer

        yield ask
        crasher.stdin.close()


class Expected:
    """What has to be in the store by what the killed process reported; oldest first."""

    def __init__(self) -> None:
        self.order: list[Digest] = []
        self.pending: tuple[str, Digest] | None = None

    def hear(self, reports: list[tuple[str, str, Digest]]) -> None:
        self.pending = None
        for what, verb, digest in reports:
            if what == "begin":
                self.pending = verb, digest
                continue
            if digest in self.order and (what == "evicted" or verb == "remove"):
                self.order.remove(digest)
            elif verb in ("put", "add"):
                self.order.append(digest)
            if what == "done":
                self.pending = None

    def compare(self, here: set[Digest]) -> None:
        """Assert that `here` is what there should be, with only the step in which it was killed in doubt."""
        verb, digest = self.pending or ("", Digest(""))
        if verb == "remove" and digest not in here:
            self.order.remove(digest)
        if verb in ("put", "add") and digest in here:
            self.order.append(digest)
        if verb in ("put", "add", "leave"):  # it may have evicted the oldest without having told
            while self.order and self.order[0] not in here:
                del self.order[0]
        assert set(self.order) == here


def check(data_dir: Path, expected: Expected) -> None:
    store = DiskStore(data_dir, max_bytes=ROOM_BYTES, low_bytes=ROOM_BYTES, min_free_bytes=0)
    expected.compare(set(store.digests()))
    for digest in store.digests():
        blob = store.open(digest)
        assert blob is not None
        body = blob.read(0, blob.size_bytes)
        assert f"sha256:{hashlib.sha256(body).hexdigest()}" == digest
        chunks = (body[at : at + blob.chunk_bytes] for at in range(0, len(body), blob.chunk_bytes))
        assert blob.checksums == tuple(checksum_of(chunk) for chunk in chunks)
        blob.close()
    expected.order = list(store.digests())[::-1]  # reading them was a use
    statistics = store.statistics()
    files = [path for path in data_dir.rglob("*") if path.is_file()]
    assert len(files) == 1 + 2 * statistics["blobs"] + 2 * statistics["partial_blobs"], files
    assert statistics["bytes"] + statistics["partial_bytes"] <= ROOM_BYTES
    store.close()


def test_a_kill_at_any_call_into_the_file_system_is_survived(
    tmp_path: Path, crash: Callable[..., dict[str, Any]]
) -> None:
    for call in range(1, CALLS_MAX):
        data_dir = tmp_path / str(call)
        data_dir.mkdir()
        told = crash(dir=str(data_dir), seed=5, steps=14, kill_at_call=call)
        expected = Expected()
        expected.hear(told["reports"])
        check(data_dir, expected)
        if not told["signal"]:
            break
    else:
        pytest.fail("the work never came to its end")
    whats = {what for what, _, _ in told["reports"]} | {verb for _, verb, _ in told["reports"]}
    assert whats >= {"evicted", "put", "add", "leave", "remove"}, "the work does not do all that it should"


def test_kills_at_random_instants_one_after_the_other_are_survived(
    tmp_path: Path, crash: Callable[..., dict[str, Any]]
) -> None:
    rng = random.Random(2)
    expected = Expected()
    for kill in range(KILLS):
        told = crash(dir=str(tmp_path), seed=kill, steps=1000, kill_after_reports=rng.randrange(1, 40))
        assert told["signal"], "it came to its end before it could be killed"
        expected.hear(told["reports"])
        check(tmp_path, expected)
        rot_a_partial_blob(tmp_path, rng)


def rot_a_partial_blob(data_dir: Path, rng: random.Random) -> None:
    """Change a byte: the work of the next round fails if the resume takes it for right."""
    for path in sorted((data_dir / "partial").glob("*")):
        if path.suffix or not path.stat().st_size:
            continue
        with open(path, "r+b") as file:
            at = rng.randrange(path.stat().st_size)
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)
