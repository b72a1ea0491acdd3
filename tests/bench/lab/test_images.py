# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from bench.lab.errors import LabError
from bench.lab.images import LAYER_TAR, LAYER_TAR_GZIP, LAYER_TAR_ZSTD, Image, make_machine_image, make_random_image
from tests.layers import tar_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from p2pdist.core.types import Descriptor


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A small /usr: files, a directory, a link."""
    root, rng = tmp_path / "usr", random.Random(1)
    (root / "lib").mkdir(parents=True)
    for number in range(40):
        (root / "lib" / f"file{number:02}").write_bytes(rng.randbytes(64 << 10))
    (root / "lib" / "link").symlink_to("file00")
    return root


def read(image: Image, descriptor: Descriptor) -> bytes:
    return image.blob_path(descriptor).read_bytes()


def document(image: Image, descriptor: Descriptor) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(read(image, descriptor))
    return content


def check_layout(image: Image) -> None:
    """Check all digests, sizes and references of an image, and that each layer is the tar that its diff_id says."""
    for part in (*image.blobs(), *image.manifests()):
        content = read(image, part)
        assert (len(content), f"sha256:{hashlib.sha256(content).hexdigest()}") == (part.size_bytes, part.digest)
    manifest, config = document(image, image.manifest), document(image, image.config)
    assert manifest["config"]["digest"] == image.config.digest
    assert [layer["digest"] for layer in manifest["layers"]] == [layer.digest for layer in image.layers]
    tars = [tar_of(image, layer) for layer in image.layers]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars]
    (entry,) = json.loads((image.layout / "index.json").read_text())["manifests"]
    assert entry["digest"] == image.root.digest
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == image.tag


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path).lstrip("/"): path.read_bytes() for path in directory.rglob("file*")}


def files_of(image: Image) -> dict[str, bytes]:
    found = {}
    for layer in image.layers:
        with tarfile.open(fileobj=io.BytesIO(tar_of(image, layer))) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    return found


async def test_an_image_of_the_machine_holds_its_files_and_is_filled_up(tmp_path: Path, machine: Path) -> None:
    image = await make_machine_image(tmp_path / "image", image_bytes=6 << 20, layers=3, roots=[machine])
    check_layout(image)
    files = files_of(image)
    assert contents(machine).items() <= files.items()
    assert not any(name.endswith("link") for name in files)
    assert 6 << 20 < image.pull_bytes < 6.5 * (1 << 20)


async def test_an_image_of_a_large_machine_ends_near_the_wanted_size(tmp_path: Path, machine: Path) -> None:
    image = await make_machine_image(tmp_path / "image", image_bytes=1 << 20, layers=2, roots=[machine])
    check_layout(image)
    assert len(files_of(image)) < 40


async def test_the_same_machine_gives_the_same_image(tmp_path: Path, machine: Path) -> None:
    first = await make_machine_image(tmp_path / "1", image_bytes=1 << 20, layers=2, roots=[machine])
    second = await make_machine_image(tmp_path / "2", image_bytes=1 << 20, layers=2, roots=[machine])
    assert first.root == second.root


async def test_a_random_image_has_layers_of_exact_size(tmp_path: Path) -> None:
    image = await make_random_image(tmp_path / "image", image_bytes=3 << 20, layers=3, seed=7)
    check_layout(image)
    assert [layer.size_bytes for layer in image.layers] == [1 << 20] * 3
    assert len(files_of(image)) == 3


async def test_layers_are_of_the_wanted_types_in_turn(
    tmp_path: Path, machine: Path, require: Callable[[str, str], str]
) -> None:
    require("zstd", "zstd")
    types = (LAYER_TAR_GZIP, LAYER_TAR_ZSTD)
    image = await make_machine_image(
        tmp_path / "image", image_bytes=4 << 20, layers=3, roots=[machine], layer_types=types
    )
    check_layout(image)
    assert [layer.media_type for layer in image.layers] == [LAYER_TAR_GZIP, LAYER_TAR_ZSTD, LAYER_TAR_GZIP]
    assert 4 << 20 < image.pull_bytes < 5.5 * (1 << 20)
    random_image = await make_random_image(
        tmp_path / "random", image_bytes=3 << 20, layers=3, seed=1, layer_types=(LAYER_TAR, *types)
    )
    check_layout(random_image)
    assert [layer.media_type for layer in random_image.layers] == [LAYER_TAR, *types]


async def test_without_the_program_zstd_an_image_says_what_to_install(
    tmp_path: Path, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.RaisesGroup(pytest.RaisesExc(LabError, match="apt-get install zstd"), flatten_subgroups=True):
        await make_machine_image(
            tmp_path / "image", image_bytes=1 << 20, layers=1, roots=[machine], layer_types=[LAYER_TAR_ZSTD]
        )


async def test_the_seed_alone_decides_the_random_bytes(tmp_path: Path) -> None:
    images = [
        await make_random_image(tmp_path / str(number), image_bytes=1 << 20, layers=1, seed=seed)
        for number, seed in enumerate((1, 1, 2))
    ]
    assert images[0].root == images[1].root
    assert images[0].layers != images[2].layers


async def test_an_index_names_an_image_for_each_platform(tmp_path: Path) -> None:
    image = await make_random_image(tmp_path / "image", image_bytes=1 << 20, layers=2, seed=1, multi_arch=True)
    check_layout(image)
    children = document(image, image.root)["manifests"]
    assert [child["platform"]["architecture"] for child in children] == ["amd64", "arm64"]
    assert {child["digest"] for child in children} <= {manifest.digest for manifest in image.manifests()}


async def test_an_image_too_small_for_its_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few for 10 layers"):
        await make_random_image(tmp_path / "image", image_bytes=10_000, layers=10, seed=1)
