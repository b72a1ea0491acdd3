# SPDX-License-Identifier: Apache-2.0
"""Makes OCI images as layouts on disk: of the machine's own files, or of random bytes of exact size.

Both have layers that a runtime can unpack, with right diff_ids. The same arguments on the same machine give the
same bytes: entries carry no times and no owners, random bytes come from the seed alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import stat
import subprocess
import tarfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import trio

from bench.lab.errors import LabError
from p2pdist.core.oci import OCI_INDEX, OCI_MANIFEST
from p2pdist.core.types import Descriptor, parse_digest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
LAYER_TAR_GZIP = f"{LAYER_TAR}+gzip"
LAYER_TAR_ZSTD = f"{LAYER_TAR}+zstd"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
REF_NAME = "org.opencontainers.image.ref.name"

MACHINE_ROOTS = (Path("/usr/lib"), Path("/usr/share"), Path("/usr/bin"))
_FILE_MAX_BYTES = 4 << 20
"""Larger files are left out, so that layers end near the wanted size."""

_TAR_BLOCK_BYTES = 512
_TAR_FRAME_BYTES = 3 * _TAR_BLOCK_BYTES
"""A header and the two empty blocks at the end: what a tar of one file has besides its content."""

_TAR_BUFFER_BYTES = 64 << 10
_RANDOM_PART_BYTES = 1 << 20
_ZSTD_FRAME_BYTES = 1 << 20
_ZSTD_TIMEOUT_S = 60.0
_CREATED = "2000-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True)
class Image:
    """An image in an OCI layout.

    Args:
        root: what the tag names: the manifest itself, or the index over it.
        others: what else the index names, with its config and layers; no part of a pull for amd64.
    """

    layout: Path
    tag: str
    root: Descriptor
    manifest: Descriptor
    config: Descriptor
    layers: tuple[Descriptor, ...]
    others: tuple[Descriptor, ...] = ()

    @property
    def pull_bytes(self) -> int:
        """The bytes of one pull."""
        return sum(part.size_bytes for part in self.parts)

    def pull_bytes_without(self, held: Collection[str]) -> int:
        """Return the bytes of a pull by a runtime that has the blobs `held`, by digest."""
        return sum(part.size_bytes for part in self.parts if part.digest not in held)

    @property
    def parts(self) -> tuple[Descriptor, ...]:
        """What one pull brings: manifest, config and layers."""
        return (self.manifest, self.config, *self.layers)

    def blobs(self) -> list[Descriptor]:
        """Return configs and layers."""
        return [part for part in (self.config, *self.layers, *self.others) if not _is_manifest(part)]

    def manifests(self) -> list[Descriptor]:
        """Return manifests, children before the index."""
        children = [part for part in (self.manifest, *self.others) if _is_manifest(part)]
        return children if self.root == self.manifest else [*children, self.root]

    def blob_path(self, descriptor: Descriptor) -> Path:
        return self.layout / "blobs" / descriptor.digest.replace(":", "/")


class LayerMaker(Protocol):
    def __call__(self, layout: Path, index: int) -> tuple[Descriptor, str]:
        """Write layer `index` in a worker thread; return its descriptor and diff_id."""


async def make_machine_image(
    layout: Path,
    *,
    image_bytes: int,
    layers: int,
    tag: str = "v1",
    roots: Sequence[Path] = MACHINE_ROOTS,
    layer_types: Sequence[str] = (LAYER_TAR_GZIP,),
) -> Image:
    """Make an image of the machine's own files, compressed, of about `image_bytes`.

    Where the machine has too few files, random bytes fill the layers up.

    Args:
        layer_types: the layers' media types, in turn.

    Raises:
        LabError: a layer is to be zstd, and there is no such program.
    """
    files = await trio.to_thread.run_sync(lambda: list(_regular_files(roots)))
    types = [layer_types[index % len(layer_types)] for index in range(layers)]
    maker = partial(_machine_layer, files=files, types=types, layer_bytes=image_bytes // layers)
    return await _make(layout, maker, layers, tag, multi_arch=True)


async def make_random_image(
    layout: Path,
    *,
    image_bytes: int,
    layers: int,
    seed: int,
    tag: str = "v1",
    multi_arch: bool = False,
    shared: tuple[int, int] | None = None,
    layer_types: Sequence[str] = (LAYER_TAR,),
) -> Image:
    """Make an image of incompressible layers whose sizes are exact (to 512 bytes) and add up to `image_bytes`.

    Args:
        multi_arch: whether the tag names an index, with a second platform that shares the first layer.
        shared: (layers, seed): its first layers are those of the image that this seed gives.
        layer_types: the layers' media types, in turn; sizes are only about right where one compresses.

    Raises:
        ValueError: a layer would be smaller than a tar of one byte.
        LabError: a layer is to be zstd, and there is no such program.
    """
    layer_bytes = image_bytes // layers // _TAR_BLOCK_BYTES * _TAR_BLOCK_BYTES
    if layer_bytes <= _TAR_FRAME_BYTES:
        raise ValueError(f"{image_bytes} bytes are too few for {layers} layers")
    shared_layers, shared_seed = shared or (0, seed)
    seeds = [shared_seed if index < shared_layers else seed for index in range(layers)]
    types = [layer_types[index % len(layer_types)] for index in range(layers)]
    maker = partial(_random_layer, layer_bytes=layer_bytes, seeds=seeds, types=types)
    return await _make(layout, maker, layers, tag, multi_arch=multi_arch)


async def _make(layout: Path, maker: LayerMaker, layers: int, tag: str, *, multi_arch: bool) -> Image:
    (layout / "blobs" / "sha256").mkdir(parents=True)
    made: dict[int, tuple[Descriptor, str]] = {}

    async def make_one(index: int) -> None:
        made[index] = await trio.to_thread.run_sync(maker, layout, index)

    async with trio.open_nursery() as nursery:
        for index in range(layers):
            nursery.start_soon(make_one, index)
    return _finish(layout, [made[index] for index in range(layers)], tag, multi_arch=multi_arch)


def _finish(layout: Path, layers: list[tuple[Descriptor, str]], tag: str, *, multi_arch: bool) -> Image:
    """Write configs, manifests, index and the layout's own files around the layers."""
    manifest, config = _write_manifest(layout, layers, "amd64")
    root, others = manifest, tuple[Descriptor, ...]()
    descriptors = tuple(descriptor for descriptor, _ in layers)
    entries = [_entry(manifest, "amd64")]
    if multi_arch:
        other, other_config = _write_manifest(layout, layers[:1], "arm64")
        others = (other, other_config)
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*entries, _entry(other, "arm64")]}
        root = _write_json(layout, index, OCI_INDEX)
        entries = [_entry(root)]
    entries[0]["annotations"] = {REF_NAME: tag}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return Image(layout, tag, root, manifest, config, descriptors, others)


def _write_manifest(
    layout: Path, layers: list[tuple[Descriptor, str]], architecture: str
) -> tuple[Descriptor, Descriptor]:
    content = {
        "created": _CREATED,
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": ["/usr/bin/true"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
        "history": [{"created": _CREATED, "created_by": "p2pdist bench"} for _ in layers],
    }
    config = _write_json(layout, content, OCI_CONFIG)
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": _entry(config),
        "layers": [_entry(descriptor) for descriptor, _ in layers],
    }
    return _write_json(layout, manifest, OCI_MANIFEST), config


def _entry(descriptor: Descriptor, architecture: str | None = None) -> dict[str, object]:
    entry: dict[str, object] = {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size_bytes,
    }
    if architecture:
        entry["platform"] = {"os": "linux", "architecture": architecture}
    return entry


def _write_json(layout: Path, content: object, media_type: str) -> Descriptor:
    writer = _BlobWriter(layout, media_type)
    writer.write(json.dumps(content, separators=(",", ":")).encode())
    return writer.finish()


def _is_manifest(descriptor: Descriptor) -> bool:
    return descriptor.media_type in (OCI_MANIFEST, OCI_INDEX)


class _BlobWriter:
    """A blob on its way into the layout, hashed as it is written."""

    def __init__(self, layout: Path, media_type: str) -> None:
        self._directory = layout / "blobs" / "sha256"
        self._path = self._directory / f".{os.getpid()}-{id(self)}"
        self._file = self._path.open("wb")
        self._sha256 = hashlib.sha256()
        self._media_type = media_type
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.size_bytes += len(data)

    def finish(self) -> Descriptor:
        self._file.close()
        digest = parse_digest(f"sha256:{self._sha256.hexdigest()}")
        self._path.rename(self._directory / self._sha256.hexdigest())
        return Descriptor(digest, self.size_bytes, self._media_type)


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Zstd:
    """A zstd stream of frames of 1 MiB, made by the program `zstd`, as Python 3.11 has no zstd of its own."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def compress(self, data: bytes, /) -> bytes:
        self._buffer += data
        return self.flush() if len(self._buffer) >= _ZSTD_FRAME_BYTES else b""

    def flush(self) -> bytes:
        """Return a frame of all that was not returned before."""
        content, self._buffer = bytes(self._buffer), bytearray()
        command = ["zstd", "-q", "-c"]
        return subprocess.run(
            command, input=content, stdout=subprocess.PIPE, check=True, timeout=_ZSTD_TIMEOUT_S
        ).stdout


def _compressor(media_type: str) -> _Compressor | None:
    if media_type == LAYER_TAR_ZSTD:
        if shutil.which("zstd") is None:
            raise LabError("zstd layers need the program zstd; install it with: apt-get install zstd")
        return _Zstd()
    # Level 1: the demo's user waits for it. A gzip stream of zlib's own carries no time stamp.
    return zlib.compressobj(1, zlib.DEFLATED, 31) if media_type == LAYER_TAR_GZIP else None


class _LayerWriter(io.RawIOBase):
    """A tar on its way into a layer, as it is or compressed; knows the diff_id."""

    def __init__(self, layout: Path, media_type: str) -> None:
        self._compressor = _compressor(media_type)
        self._blob = _BlobWriter(layout, media_type)
        self._diff = hashlib.sha256()

    @property
    def size_bytes(self) -> int:
        return self._blob.size_bytes

    def write(self, data: bytes) -> int:  # type: ignore[override]  # tarfile writes nothing else
        self._diff.update(data)
        self._blob.write(self._compressor.compress(data) if self._compressor else data)
        return len(data)

    def finish(self) -> tuple[Descriptor, str]:
        if self._compressor:
            self._blob.write(self._compressor.flush())
        return self._blob.finish(), f"sha256:{self._diff.hexdigest()}"


def _machine_layer(
    layout: Path, index: int, *, files: Sequence[Path], types: Sequence[str], layer_bytes: int
) -> tuple[Descriptor, str]:
    writer = _LayerWriter(layout, types[index])
    with tarfile.open(fileobj=writer, mode="w|", format=tarfile.GNU_FORMAT, bufsize=_TAR_BUFFER_BYTES) as tar:
        for path in files[index :: len(types)]:
            trio.from_thread.check_cancelled()
            if writer.size_bytes >= layer_bytes:
                break
            _add_file(tar, path)
        if (missing_bytes := layer_bytes - writer.size_bytes) > 0:
            filler = b"".join(_random_parts(random.Random(index), missing_bytes))
            _add(tar, f"opt/p2pdist/filler-{index}", 0o644, filler)
    return writer.finish()


def _random_layer(
    layout: Path, index: int, *, layer_bytes: int, seeds: Sequence[int], types: Sequence[str]
) -> tuple[Descriptor, str]:
    content_bytes = layer_bytes - _TAR_FRAME_BYTES
    header = tarfile.TarInfo(f"opt/p2pdist/random-{index}")
    header.size = content_bytes
    writer = _LayerWriter(layout, types[index])
    writer.write(header.tobuf(format=tarfile.USTAR_FORMAT))
    for part in _random_parts(random.Random(f"{seeds[index]}/{index}"), content_bytes):
        trio.from_thread.check_cancelled()
        writer.write(part)
    writer.write(bytes(2 * _TAR_BLOCK_BYTES))
    return writer.finish()


def _random_parts(rng: random.Random, total_bytes: int) -> Iterator[bytes]:
    for start in range(0, total_bytes, _RANDOM_PART_BYTES):
        yield rng.randbytes(min(_RANDOM_PART_BYTES, total_bytes - start))


def _regular_files(roots: Sequence[Path]) -> Iterator[Path]:
    for root in roots:
        for directory, subdirectories, names in os.walk(root):
            subdirectories.sort()
            yield from (Path(directory, name) for name in sorted(names))


def _add_file(tar: tarfile.TarFile, path: Path) -> None:
    """Add a regular file of bounded size; others, and those that may not be read, are passed over."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or not 0 < found.st_size <= _FILE_MAX_BYTES:
            return
        content = path.read_bytes()
    except OSError:
        return
    _add(tar, str(path).lstrip("/"), stat.S_IMODE(found.st_mode), content)


def _add(tar: tarfile.TarFile, name: str, mode: int, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(content), mode
    tar.addfile(header, io.BytesIO(content))
