# SPDX-License-Identifier: Apache-2.0
"""Digests and peer ids: only the one spelling passes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.types import Manifest, Repository, parse_digest, parse_peer_id
from p2pdist.errors import InvalidInput

HEX = "0123456789abcdef" * 4


@given(st.from_regex(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}", fullmatch=True))
def test_a_digest_passes_unchanged(text: str) -> None:
    assert parse_digest(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEX,
        f"sha256:{HEX}\n",
        f" sha256:{HEX}",
        f"sha256:{HEX[:-1]}",
        f"sha256:{HEX}0",
        f"sha256:{HEX.upper()}",
        f"SHA256:{HEX}",
        f"sha512:{HEX}",
        f"sha256:{HEX}{HEX}",
        f"sha384:{HEX}{HEX[:32]}",
        f"sha256:{HEX[:-1]}/",
        "sha256:../../../../etc/passwd",
        f"sha256:{'٣' * 64}",
    ],
)
def test_any_other_text_is_no_digest(text: str) -> None:
    with pytest.raises(InvalidInput, match="not a sha256 or sha512 digest"):
        parse_digest(text)


@given(st.text(max_size=2000).filter(lambda text: not text.startswith(("sha256:", "sha512:"))))
def test_a_complaint_is_one_short_line(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_digest(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize("text", ["", HEX[:31], HEX[:33], HEX[:32].upper(), HEX[:31] + "g", HEX[:32] + "\n"])
def test_a_peer_id_is_32_lower_case_hex_digits(text: str) -> None:
    assert parse_peer_id(HEX[:32]) == HEX[:32]
    with pytest.raises(InvalidInput, match="not a peer id"):
        parse_peer_id(text)


def test_a_repository_reads_as_people_write_it() -> None:
    assert str(Repository("docker.io", "library/alpine")) == "docker.io/library/alpine"


def test_a_manifests_info_has_the_size_of_its_body() -> None:
    assert Manifest(parse_digest(f"sha256:{HEX}"), "x/y", b"{}").info.size_bytes == 2
