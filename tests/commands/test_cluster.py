# SPDX-License-Identifier: Apache-2.0
"""`p2pdist cluster` as its user sees it: what it prints, what it leaves, and how it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from p2pdist import cli
from p2pdist.core.identity import parse_token
from p2pdist.identity.authority import Authority

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


def cluster(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["cluster", *arguments])


@pytest.fixture
def directory(tmp_path: Path) -> str:
    assert cluster("init", "prod", "--dir", str(tmp_path / "ca")).exit_code == 0
    return str(tmp_path / "ca")


def test_two_clusters_of_one_name_are_two(directory: str, tmp_path: Path) -> None:
    assert cluster("init", "prod", "--dir", str(tmp_path / "other")).exit_code == 0
    names = [Authority.open(place).cluster for place in (tmp_path / "ca", tmp_path / "other")]
    assert all(name.startswith("prod-") for name in names)
    assert names[0] != names[1]


def test_a_token_is_one_line_and_good_for_this_cluster(directory: str, tmp_path: Path) -> None:
    result = cluster("token", "--dir", directory, "--uses", "3", "--lifetime", "30m")
    assert result.exit_code == 0
    assert parse_token(result.output).cluster == Authority.open(tmp_path / "ca").cluster


def test_a_revoked_peer_is_on_the_list(directory: str, tmp_path: Path) -> None:
    assert cluster("revoke", "a" * 32, "--dir", directory).exit_code == 0
    assert cluster("revoke", "host", "--scheduler", "--dir", directory).exit_code == 0
    assert Authority.open(tmp_path / "ca").revocations().names == {"agent/" + "a" * 32, "scheduler/host"}


def test_a_copy_for_another_scheduler_has_the_ca_and_no_token(directory: str, tmp_path: Path) -> None:
    cluster("token", "--dir", directory)
    for _ in range(2):
        result = cluster("copy", directory, "--dir", str(tmp_path / "copy"))
        assert result.exit_code == 0, result.output
    assert Authority.open(tmp_path / "copy").certificate == Authority.open(tmp_path / "ca").certificate
    assert list((tmp_path / "copy/tokens").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["copy", "/nowhere", "--dir", "{}"], "does not exist"),
        (["init", "prod", "--dir", "{}"], "has a CA already"),
        (["init", "a/b", "--dir", "{}-new"], "no name for a cluster"),
        (["token", "--dir", "{}-new"], "p2pdist cluster init"),
        (["token", "--dir", "{}", "--lifetime", "31d"], "not a time"),
        (["token", "--dir", "{}", "--lifetime", "soon"], "not a time"),
        (["revoke", "nobody", "--dir", "{}"], "p2pdist status"),
    ],
    ids=["a copy of nothing", "twice", "a bad name", "no CA", "for too long", "no time", "no peer id"],
)
def test_a_mistake_is_one_line_and_exit_code_2(directory: str, arguments: list[str], says: str) -> None:
    result = cluster(*(argument.format(directory) for argument in arguments))
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output
