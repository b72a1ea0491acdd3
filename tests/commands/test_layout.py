# SPDX-License-Identifier: Apache-2.0
"""The OCI layout: nothing wrong or half is ever under a digest's name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from p2pdist.commands.layout import OciLayout
from p2pdist.core.oci import OCI_MANIFEST
from p2pdist.core.types import Manifest
from p2pdist.errors import IntegrityError, StoreError
from tests.commands.fake_mirror import describe_bytes

if TYPE_CHECKING:
    from pathlib import Path

LAYER = b"layer " * 1000
BLOB = describe_bytes(LAYER)


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def manifest(body: bytes = b"{}") -> Manifest:
    return Manifest(describe_bytes(body).digest, OCI_MANIFEST, body)


def index(directory: Path) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = json.loads((directory / "index.json").read_bytes())["manifests"]
    return entries


def test_a_new_layout_says_what_it_is(tmp_path: Path) -> None:
    OciLayout(tmp_path / "new" / "layout")
    assert json.loads((tmp_path / "new/layout/oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}


def test_a_right_blob_is_put_in_place(tmp_path: Path) -> None:
    layout = OciLayout(tmp_path)
    with layout.writing(BLOB) as sink:
        sink.write(LAYER[:10])
        sink.write(LAYER[10:])
    path = tmp_path / "blobs" / "sha256" / BLOB.digest.removeprefix("sha256:")
    assert path.read_bytes() == LAYER
    assert layout.has(BLOB)


@pytest.mark.parametrize("body", [LAYER[:-1], LAYER[:-1] + b"?", b""], ids=["short", "wrong", "empty"])
def test_a_wrong_blob_leaves_no_trace(tmp_path: Path, body: bytes) -> None:
    layout = OciLayout(tmp_path)
    with pytest.raises(IntegrityError, match=BLOB.digest), layout.writing(BLOB) as sink:
        sink.write(body)
    assert files(tmp_path) == {"oci-layout"}


def test_an_interrupted_blob_leaves_no_trace(tmp_path: Path) -> None:
    writing = OciLayout(tmp_path).writing(BLOB)
    writing.__enter__().write(LAYER)
    interrupt = KeyboardInterrupt()
    assert not writing.__exit__(KeyboardInterrupt, interrupt, None)
    assert files(tmp_path) == {"oci-layout"}


@pytest.mark.parametrize("body", [LAYER[:-1], LAYER + b"x", b"", b"?" * len(LAYER)])
def test_a_blob_that_went_bad_on_disk_is_deleted(tmp_path: Path, body: bytes) -> None:
    layout = OciLayout(tmp_path)
    path = tmp_path / "blobs" / "sha256" / BLOB.digest.removeprefix("sha256:")
    path.write_bytes(body)
    assert not layout.has(BLOB)
    assert not path.exists()


def test_the_index_names_image_and_tag(tmp_path: Path) -> None:
    OciLayout(tmp_path).name(manifest(), "docker.io/library/x:v1", "v1")
    (entry,) = index(tmp_path)
    assert entry["digest"] == manifest().digest
    assert entry["size"] == 2
    assert entry["annotations"] == {
        "org.opencontainers.image.ref.name": "v1",
        "io.containerd.image.name": "docker.io/library/x:v1",
    }


def test_the_index_keeps_other_images_and_replaces_a_tag(tmp_path: Path) -> None:
    layout = OciLayout(tmp_path)
    layout.name(manifest(b"{}"), "r/x:v1", "v1")
    layout.name(manifest(b"[]"), "r/x:v2", "v2")
    layout.name(manifest(b"{ }"), "r/x:v1", "v1")
    layout.name(manifest(b"{  }"), "r/x@sha256:0", "")
    layout.name(manifest(b"{  }"), "r/x@sha256:0", "")
    assert [entry["digest"] for entry in index(tmp_path)] == [
        manifest(body).digest for body in (b"[]", b"{ }", b"{  }")
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [("oci-layout", "{}"), ("oci-layout", "nonsense"), ("oci-layout", "[]"), ("blobs", "a file")],
)
def test_a_directory_of_something_else_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(StoreError, match=str(tmp_path)):
        OciLayout(tmp_path)


def test_a_broken_index_is_not_overwritten(tmp_path: Path) -> None:
    layout = OciLayout(tmp_path)
    (tmp_path / "index.json").write_text("not json")
    with pytest.raises(StoreError, match="is not JSON"):
        layout.name(manifest(), "r/x:v1", "v1")
    assert (tmp_path / "index.json").read_text() == "not json"


def test_a_disk_that_fails_is_named(tmp_path: Path) -> None:
    layout = OciLayout(tmp_path)
    (tmp_path / "blobs" / "sha256").rmdir()
    with pytest.raises(StoreError, match=f"cannot write to {tmp_path}.*No such file"), layout.writing(BLOB) as sink:
        sink.write(LAYER)
