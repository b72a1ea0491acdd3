# SPDX-License-Identifier: Apache-2.0
"""An OCI image layout on disk (image-spec, image-layout.md), and the check of each blob on its way there.

Invariants: a file under `blobs/` has the digest of its name: it is renamed into place only when it is whole
and right, and one that is found there is read again before it is trusted. `index.json` is replaced in one
step, last, and keeps the entries of other images.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from p2pdist.core.oci import OCI_INDEX
from p2pdist.core.verify import hash_like
from p2pdist.errors import IntegrityError, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

    from p2pdist.core.types import Descriptor, Manifest

_REF_NAME = "org.opencontainers.image.ref.name"
_IMAGE_NAME = "io.containerd.image.name"
_VERSION = {"imageLayoutVersion": "1.0.0"}


class BlobSink:
    """Takes a blob's bytes in order, hashes them, and writes them to `file` where there is one."""

    def __init__(self, blob: Descriptor, file: BinaryIO | None) -> None:
        self.written_bytes = 0
        self._blob = blob
        self._file = file
        self._hash = hash_like(blob.digest)

    def write(self, data: bytes) -> None:
        """Take the next bytes. Blocking; safe in a worker thread.

        Raises:
            IntegrityError: more bytes than the manifest says.
            OSError: the disk failed.
        """
        if self.written_bytes + len(data) > self._blob.size_bytes:
            raise IntegrityError(
                f"blob {self._blob.digest} is longer than the {self._blob.size_bytes} bytes that its manifest says"
            )
        self._hash.update(data)
        if self._file is not None:
            self._file.write(data)
        self.written_bytes += len(data)

    def check(self) -> None:
        """Raise IntegrityError unless the whole blob went through and it is what its digest says."""
        actual = f"{self._hash.name}:{self._hash.hexdigest()}"
        if self.written_bytes != self._blob.size_bytes or actual != self._blob.digest:
            raise IntegrityError(
                f"blob {self._blob.digest} is wrong: the {self.written_bytes} bytes that came have {actual}",
                expected=self._blob.digest,
                actual=actual,
            )


class OciLayout:
    """The directory of a layout, made where it is missing. All calls block.

    Raises:
        StoreError: the directory cannot be used, or holds something else.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blobs = directory / "blobs"
        with _disk(directory):
            (self._blobs / "sha256").mkdir(parents=True, exist_ok=True)
            marker = directory / "oci-layout"
            if not marker.exists():
                _replace(marker, json.dumps(_VERSION).encode())
            elif _read_object(marker).get("imageLayoutVersion") != _VERSION["imageLayoutVersion"]:
                raise StoreError(f"{directory} is an OCI layout of another version than 1.0.0")

    def has(self, blob: Descriptor) -> bool:
        """Return whether the blob is here and right; one that is wrong is deleted."""
        path = self._path(blob.digest)
        sink = BlobSink(blob, None)
        with _disk(path):
            try:
                with path.open("rb") as file:
                    while data := file.read(1 << 20):
                        sink.write(data)
                sink.check()
            except FileNotFoundError:
                return False
            except IntegrityError:
                path.unlink()
                return False
        return True

    @contextmanager
    def writing(self, blob: Descriptor) -> Iterator[BlobSink]:
        """Yield a sink; when the block ends well, check the blob and put it in place, else leave no trace."""
        path = self._path(blob.digest)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        with _disk(self.directory):
            try:
                with part.open("wb") as file:
                    sink = BlobSink(blob, file)
                    yield sink
                    sink.check()
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def add(self, manifest: Manifest) -> None:
        """Put a manifest, whose digest was checked, in place."""
        with _disk(self.directory):
            _replace(self._path(manifest.digest), manifest.body)

    def name(self, manifest: Manifest, image: str, tag: str) -> None:
        """Write `index.json`, in which `manifest` is known as `image` and, where one is given, by `tag`."""
        path = self.directory / "index.json"
        annotations = {_IMAGE_NAME: image} | ({_REF_NAME: tag} if tag else {})
        entry = {
            "mediaType": manifest.media_type,
            "digest": manifest.digest,
            "size": len(manifest.body),
            "annotations": annotations,
        }
        with _disk(path):
            before = _read_object(path).get("manifests", []) if path.exists() else []
            others = [other for other in before if not _same(other, entry)]
            index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*others, entry]}
            _replace(path, json.dumps(index, indent=2).encode())

    def _path(self, digest: str) -> Path:
        algorithm, _, digits = digest.partition(":")
        if algorithm != "sha256":
            with _disk(self.directory):
                (self._blobs / algorithm).mkdir(exist_ok=True)
        return self._blobs / algorithm / digits


def _same(other: Any, entry: dict[str, Any]) -> bool:  # noqa: ANN401 - read from a file
    """Whether `other` has to give way: the same tag, or the same manifest without another tag."""
    if not isinstance(other, dict):
        return True
    theirs, ours = other.get("annotations") or {}, entry["annotations"]
    if theirs.get(_REF_NAME) is not None:
        return bool(theirs.get(_REF_NAME) == ours.get(_REF_NAME))
    return bool(other.get("digest") == entry["digest"])


def _read_object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise StoreError(f"{path} is not JSON: {error}; name an empty directory") from error
    if not isinstance(document, dict):
        raise StoreError(f"{path} is not a JSON object; name an empty directory")
    return document


def _replace(path: Path, body: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(body)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write to {error.filename or path}: {error.strerror}") from error
