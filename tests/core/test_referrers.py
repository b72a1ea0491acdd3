# SPDX-License-Identifier: Apache-2.0
"""Referrers for origins that do not list or filter them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.oci import parse_tag
from p2pdist.core.referrers import EMPTY, fallback_tag, only_of_type
from p2pdist.core.types import Digest

SIGNATURE, SBOM = "application/vnd.example.signature", "application/spdx+json"


def index_of(*types: str | None, **fields: Any) -> bytes:  # noqa: ANN401
    entries = [{"digest": str(number)} | ({"artifactType": kind} if kind else {}) for number, kind in enumerate(types)]
    return json.dumps({"schemaVersion": 2, "manifests": entries, **fields}).encode()


@pytest.mark.parametrize(
    ("subject", "tag"),
    [("sha256:" + "ab" * 32, "sha256-" + "ab" * 32), ("sha512:" + "cd" * 64, "sha512-" + "cd" * 32)],
)
def test_the_fallback_tag_is_the_subjects_digest_as_a_tag_of_the_allowed_length(subject: str, tag: str) -> None:
    assert fallback_tag(Digest(subject)) == parse_tag(tag)


def test_only_the_entries_of_the_wanted_type_stay_and_the_rest_of_the_index_as_it_is() -> None:
    kept = json.loads(only_of_type(index_of(SIGNATURE, SBOM, SIGNATURE, annotations={"a": "b"}), SIGNATURE) or b"")
    assert [entry["digest"] for entry in kept["manifests"]] == ["0", "2"]
    assert kept["annotations"] == {"a": "b"}
    assert json.loads(only_of_type(EMPTY, SBOM) or b"") == json.loads(EMPTY)


def test_a_list_with_an_entry_of_unknown_type_is_not_filtered() -> None:
    assert only_of_type(index_of(SIGNATURE, None), SIGNATURE) is None


@given(st.one_of(st.binary(), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps)))
def test_what_is_no_index_is_not_filtered(body: bytes | str) -> None:
    assert only_of_type(body.encode() if isinstance(body, str) else body, SBOM) is None
