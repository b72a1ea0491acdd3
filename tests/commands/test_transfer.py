# SPDX-License-Identifier: Apache-2.0
"""A whole image through the fake mirror: which parts are fetched, what is kept, what the summary says."""

from __future__ import annotations

import io
import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from p2pdist.commands.layout import OciLayout
from p2pdist.commands.mirror_client import MirrorClient
from p2pdist.commands.progress import Lines
from p2pdist.commands.transfer import PARALLEL_BLOBS, Pulled, pull_image, summary
from p2pdist.core.oci import Platform, parse_image_reference
from p2pdist.core.types import Split
from p2pdist.errors import IntegrityError, InvalidInput, TransferError
from tests.commands.fake_mirror import FakeMirror, Fault, as_json

if TYPE_CHECKING:
    from pathlib import Path

    from trio.testing import MockClock

    from p2pdist.core.types import Descriptor

IMAGE = parse_image_reference("reg.lab/team/app:v1")
AMD64 = Platform("linux", "amd64")
LAYERS = [random.Random(seed).randbytes(3000 + seed) for seed in range(5)]


async def transfer(
    mirror: FakeMirror,
    layout: OciLayout | None = None,
    platform: Platform | None = AMD64,
    image: str = str(IMAGE),
    display: Lines | None = None,
) -> Pulled:
    async with MirrorClient("http://mirror", transport=mirror) as client:
        return await pull_image(client, parse_image_reference(image), platform, layout, display or Lines(io.StringIO()))


def stored(layout: OciLayout) -> set[str]:
    return {"sha256:" + path.name for path in (layout.directory / "blobs/sha256").iterdir()}


def index(layout: OciLayout) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((layout.directory / "index.json").read_bytes())["manifests"]
    return entries


async def test_an_image_is_written_whole_and_named(tmp_path: Path) -> None:
    mirror, layout = FakeMirror(), OciLayout(tmp_path)
    root = mirror.add_image(LAYERS, tag="v1")
    pulled = await transfer(mirror, layout)
    assert stored(layout) == {root.digest, *mirror.blobs}
    assert index(layout)[0]["digest"] == pulled.manifest.digest == root.digest
    assert index(layout)[0]["annotations"]["org.opencontainers.image.ref.name"] == "v1"
    assert pulled.size_bytes == sum(map(len, mirror.blobs.values()))


async def test_without_a_layout_all_is_fetched_and_checked() -> None:
    mirror = FakeMirror()
    mirror.add_image(LAYERS, tag="v1")
    assert (await transfer(mirror)).blobs == len(LAYERS) + 1
    assert all(len(mirror.asked(digest)) == 2 for digest in mirror.blobs)  # the blob, and its split


async def test_a_layer_that_stands_twice_is_fetched_once() -> None:
    mirror = FakeMirror()
    mirror.add_image([LAYERS[0], LAYERS[0]], tag="v1")
    assert (await transfer(mirror)).blobs == 2


async def test_one_platform_of_an_index_stands_for_the_image(tmp_path: Path) -> None:
    mirror, layout = FakeMirror(), OciLayout(tmp_path)
    amd64, arm64 = mirror.add_image(LAYERS[:1]), mirror.add_image(LAYERS[1:2])
    mirror.add_index({"linux/arm64": arm64, "linux/amd64": amd64}, tag="v1")
    await transfer(mirror, layout)
    assert [entry["digest"] for entry in index(layout)] == [amd64.digest]
    assert arm64.digest not in stored(layout)


async def test_all_platforms_keep_the_index_and_everything_below(tmp_path: Path) -> None:
    mirror, layout = FakeMirror(), OciLayout(tmp_path)
    amd64, arm64 = mirror.add_image(LAYERS[:1]), mirror.add_image(LAYERS[1:2])
    root = mirror.add_index({"linux/arm64": arm64, "linux/amd64": amd64}, tag="v1")
    await transfer(mirror, layout, platform=None)
    assert index(layout)[0]["digest"] == root.digest
    assert stored(layout) == {root.digest, amd64.digest, arm64.digest, *mirror.blobs}


async def test_a_platform_that_the_image_lacks_is_refused_with_what_there_is() -> None:
    mirror = FakeMirror()
    mirror.add_index({"linux/arm64": mirror.add_image(LAYERS[:1])}, tag="v1")
    with pytest.raises(InvalidInput, match="no variant for linux/amd64; it has: linux/arm64"):
        await transfer(mirror)


async def test_indexes_that_nest_without_end_are_refused() -> None:
    mirror = FakeMirror()
    root = mirror.add_image(LAYERS[:1])
    for _ in range(5):
        root = mirror.add_index({"linux/amd64": root}, tag="v1")
    with pytest.raises(InvalidInput, match="deep"):
        await transfer(mirror)


async def test_blobs_that_are_there_are_checked_and_kept(tmp_path: Path) -> None:
    mirror, layout = FakeMirror(), OciLayout(tmp_path)
    mirror.add_image(LAYERS, tag="v1")
    first = await transfer(mirror, layout)
    spoilt = next(iter(mirror.blobs))
    (tmp_path / "blobs/sha256" / spoilt.removeprefix("sha256:")).write_bytes(b"rot")
    mirror.requests.clear()
    again = await transfer(mirror, layout)
    assert {request.url.path.rpartition("/")[2] for request in mirror.requests} == {"v1", spoilt}
    assert again.reused_bytes == first.size_bytes - len(mirror.blobs[spoilt])


async def test_a_wrong_blob_ends_the_pull_and_names_no_image(tmp_path: Path) -> None:
    mirror, layout = FakeMirror(), OciLayout(tmp_path)
    mirror.add_image(LAYERS, tag="v1")
    victim = list(mirror.blobs)[2]
    mirror.faults[victim] = [Fault(body=b"\0" * len(mirror.blobs[victim]))]
    with pytest.RaisesGroup(pytest.RaisesExc(IntegrityError, match=victim), flatten_subgroups=True):
        await transfer(mirror, layout)
    assert not (tmp_path / "index.json").exists()
    assert victim not in stored(layout)
    assert not list((tmp_path / "blobs/sha256").glob(".*"))


async def test_a_cut_in_every_blob_is_got_over(tmp_path: Path, autojump_clock: MockClock) -> None:
    mirror, layout = FakeMirror(), OciLayout(tmp_path)
    mirror.add_image(LAYERS, tag="v1")
    for digest in mirror.blobs:
        mirror.faults[digest] = [Fault(cut_after=7)]
    await transfer(mirror, layout)
    assert stored(layout) >= set(mirror.blobs)


async def test_so_many_blobs_are_fetched_at_once_and_no_more() -> None:
    mirror = FakeMirror()
    mirror.add_image(LAYERS, tag="v1")
    for digest in mirror.blobs:
        mirror.faults[digest] = [Fault(cut_after=1, hang=True)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transfer, mirror)
        await wait_all_tasks_blocked()
        assert len(mirror.requests) == 1 + PARALLEL_BLOBS
        nursery.cancel_scope.cancel()


class Counting(Lines):
    """A display that tells when so many blobs are done."""

    def __init__(self, count: int) -> None:
        super().__init__(io.StringIO())
        self.reached = trio.Event()
        self._left = count

    def done(self, blob: Descriptor, note: str) -> None:
        self._left -= 1
        if self._left == 0:
            self.reached.set()


async def test_a_cancelled_pull_leaves_whole_blobs_only(tmp_path: Path) -> None:
    mirror, layout = FakeMirror(), OciLayout(tmp_path)
    mirror.add_image(LAYERS, tag="v1")
    stuck = list(mirror.blobs)[1]
    mirror.faults[stuck] = [Fault(cut_after=1000, hang=True)]
    display = Counting(len(mirror.blobs) - 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transfer, mirror, layout, AMD64, str(IMAGE), display)
        with trio.fail_after(20):
            await display.reached.wait()
        nursery.cancel_scope.cancel()
    assert stored(layout) == set(mirror.blobs) - {stuck}


async def test_the_sources_are_added_up_over_the_blobs() -> None:
    mirror = FakeMirror()
    mirror.add_image(LAYERS, tag="v1")
    for digest in mirror.blobs:
        mirror.splits[digest] = {"from_peers": 10, "from_origin": 1}
    count = len(mirror.blobs)
    assert (await transfer(mirror)).split == Split(from_peers=10 * count, from_origin=count)


async def test_what_came_from_the_cache_is_not_asked_about_again() -> None:
    mirror = FakeMirror(source="cache")
    mirror.add_image(LAYERS, tag="v1")
    pulled = await transfer(mirror)
    assert pulled.split == Split(from_cache=pulled.size_bytes)
    assert not mirror.asked("pulls")
    assert all(len(mirror.asked(digest)) == 1 for digest in mirror.blobs)


class Watching(Lines):
    """A display that says it is live, and notes what it is told of sources."""

    live = True

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.splits: list[Split] = []

    def source(self, blob: Descriptor, split: Split) -> None:
        self.splits.append(split)


async def test_a_live_display_hears_of_the_sources_while_bytes_arrive(autojump_clock: MockClock) -> None:
    mirror, display = FakeMirror(), Watching()
    blob = mirror.add_blob(LAYERS[0])
    mirror.add_manifest({"config": as_json(blob), "layers": []}, "application/vnd.oci.image.manifest.v1+json", tag="v1")
    mirror.splits[blob.digest] = {"from_peers": 5}
    mirror.faults[blob.digest] = [Fault(cut_after=1000, hang=True)]
    with trio.move_on_after(2):
        await transfer(mirror, display=display)
    assert display.splits[:2] == [Split(from_peers=5)] * 2


async def test_the_live_watch_ends_with_the_last_blob(autojump_clock: MockClock) -> None:
    mirror = FakeMirror()
    mirror.add_image(LAYERS, tag="v1")
    for digest in mirror.blobs:
        mirror.splits[digest] = {"from_peers": 5}
    with trio.fail_after(60):
        await transfer(mirror, display=Watching())


async def test_an_error_beside_the_live_watch_ends_the_pull(autojump_clock: MockClock) -> None:
    mirror = FakeMirror()
    mirror.add_image(LAYERS[:1], tag="v1")
    for digest in mirror.blobs:
        mirror.faults[digest] = [Fault(status=500)] * 5
    with pytest.RaisesGroup(TransferError, flatten_subgroups=True, allow_unwrapped=True):
        await transfer(mirror, display=Watching())


async def test_the_summary_tells_image_digest_sizes_and_sources() -> None:
    mirror = FakeMirror(source="cache")
    root = mirror.add_image(LAYERS, tag="v1")
    line = summary(IMAGE, await transfer(mirror))
    assert line.startswith(f"pulled reg.lab/team/app:v1 {root.digest}: 6 blobs, 14.7 KiB in ")
    assert line.endswith("; 14.7 KiB from this node's cache")


async def test_an_image_by_digest_is_named_without_a_tag(tmp_path: Path) -> None:
    mirror, layout = FakeMirror(), OciLayout(tmp_path)
    root = mirror.add_image(LAYERS)
    await transfer(mirror, layout, image=f"reg.lab/team/app@{root.digest}")
    assert index(layout)[0]["annotations"] == {"io.containerd.image.name": f"reg.lab/team/app@{root.digest}"}
