# SPDX-License-Identifier: Apache-2.0
"""`p2pdist setup`: its flags, and what it says to wrong ones; what it writes is tested in tests/setup."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from p2pdist.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


def setup(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["setup", "--root", str(root), *arguments])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--mirror", "127.0.0.1:5050"], "is not a URL such as http://127.0.0.1:5050"),
        (["--mirror", "http://me:pw@host"], "is not a URL"),
        (["--mirror", "http://host/v2"], "is not a URL"),
        (["--mirror", "http://host:99999"], "is not a URL"),
        (["--registry", "a b"], "not a registry name"),
        (["--runtime", "rkt"], "'rkt' is not one of"),
        (["--mode", "some"], "'some' is not one of"),
        (["--home", "ann"], "is not an absolute path"),
        (["--home", "/nowhere"], "is not a directory"),
        (["--restart"], "--restart and --root exclude each other"),
        (["--config", "/nonexistent.toml"], "cannot read the configuration"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_writes_nothing(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    # The runtime is named, so that only the flag in question is wrong.
    result = setup(tmp_path, "--runtime", "containerd", *arguments)
    assert result.exit_code == 2, result.output
    assert complaint in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_none_is_a_line(tmp_path: Path) -> None:
    result = setup(tmp_path / "nothing")
    assert result.exit_code == 1
    assert "is not a directory: --root names" in result.stderr


def test_a_host_without_a_runtime_says_what_was_looked_for(tmp_path: Path) -> None:
    result = setup(tmp_path)
    assert result.exit_code == 1
    assert "no container runtime found (looked for containerd, k3s, podman" in result.stderr


def test_mirror_and_registries_come_from_the_agents_settings(tmp_path: Path) -> None:
    settings = tmp_path / "agent.toml"
    settings.write_text('mirror_listen = "0.0.0.0:6000"\n[registries."reg.lab:5000"]\nurl = "http://r"\n')
    root = tmp_path / "root"
    root.mkdir()
    result = setup(root, "--runtime", "skopeo", "--config", str(settings))
    assert result.exit_code == 0, result.output
    (entry,) = tomllib.loads((root / "etc/containers/registries.conf.d/zz-p2pdist.conf").read_text())["registry"]
    assert entry["prefix"] == "reg.lab:5000"
    assert entry["mirror"] == [{"location": "127.0.0.1:6000/reg.lab__5000", "insecure": True}]


def test_a_runtime_that_is_named_need_not_be_there_and_vanishes_again(tmp_path: Path) -> None:
    for name in ("containerd", "k3s", "cri-o", "docker", "buildkit", "nerdctl"):
        assert setup(tmp_path, "--runtime", name).exit_code == 0
    assert setup(tmp_path, "--remove").exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_file_of_one_runtime_is_left_out_by_naming_the_others(tmp_path: Path) -> None:
    (tmp_path / "etc/docker").mkdir(parents=True)
    (tmp_path / "etc/docker/daemon.json").write_text("{")
    (tmp_path / "etc/containerd").mkdir()
    refused = setup(tmp_path)
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    assert "leave it out by --runtime" in refused.stderr
    assert setup(tmp_path, "--runtime", "containerd").exit_code == 0
