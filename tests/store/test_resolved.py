# SPDX-License-Identifier: Apache-2.0
"""The file of resolved tags: what is saved is loaded, and what cannot be used counts as nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from p2pdist.core.types import ManifestInfo
from p2pdist.errors import StoreError
from p2pdist.store.resolved import ResolvedTags
from tests.strategies import digest

if TYPE_CHECKING:
    from pathlib import Path

TAGS = {"reg.lab/team/app:v1": ManifestInfo(digest(1), "application/vnd.oci.image.index.v1+json", 700)}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    file = ResolvedTags(tmp_path)
    assert file.load() == {}
    file.save(TAGS)
    file.save(TAGS)
    assert ResolvedTags(tmp_path).load() == TAGS
    assert [path.name for path in tmp_path.iterdir()] == ["tags.json"]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"x": 1}', b'{"x": {"digest": "sha256:x", "mediaType": "m", "size": 1}}', b"\xff"]
)
def test_a_file_that_cannot_be_used_counts_as_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tags.json").write_bytes(content)
    assert ResolvedTags(tmp_path).load() == {}


def test_a_directory_that_is_gone_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot write .*tags\.json"):
        ResolvedTags(tmp_path / "gone").save(TAGS)
