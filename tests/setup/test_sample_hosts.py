# SPDX-License-Identifier: Apache-2.0
"""`p2pdist setup` on five sample hosts: what is written, and that taking it back leaves every file as it was."""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from p2pdist.cli import main
from tests.setup.conftest import HOSTS
from tests.setup.snapshots import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

NAMES = sorted(path.name for path in HOSTS.iterdir())
HOMES = {"mixed": "/home/ann"}
MIRROR = "http://127.0.0.1:5050"


def setup(root: Path, *arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["setup", "--root", str(root), *arguments])
    assert result.exit_code == code, result.output
    return result


def document(root: Path, path: str) -> dict[str, Any]:
    content = (root / path).read_text()
    return dict(json.loads(content) if path.endswith(".json") else tomllib.loads(content))


def places(name: str) -> list[list[str]]:
    """The runs that configure a whole host: the system's runtimes, and those of its user."""
    return [[], ["--home", HOMES[name]]] if name in HOMES else [[]]


@pytest.mark.parametrize("mode", ["accelerate", "enforce"])
@pytest.mark.parametrize("name", NAMES)
def test_setup_and_its_removal_leave_every_file_as_it_was(host: Callable[[str], Path], name: str, mode: str) -> None:
    root = host(name)
    before = snapshot(root)
    for place in places(name):
        CliRunner().invoke(main, ["setup", "--root", str(root), "--mode", mode, *place])
    assert snapshot(root) != before
    for place in places(name):
        setup(root, "--remove", *place)
    assert snapshot(root) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_shows_a_diff_and_writes_nothing(host: Callable[[str], Path], name: str) -> None:
    root = host(name)
    before = snapshot(root)
    shown = setup(root, "--dry-run").stdout
    assert snapshot(root) == before
    assert "\n+++ b/etc/" in shown
    assert "\n@@ " in shown
    assert "127.0.0.1:5050" in shown


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_changes_nothing(host: Callable[[str], Path], name: str) -> None:
    root = host(name)
    setup(root)
    after = snapshot(root)
    again = setup(root)
    assert again.stdout == ""
    assert "nothing to change" in again.stderr
    assert snapshot(root) == after
    assert setup(root, "--dry-run").stdout == ""


@pytest.mark.parametrize("name", NAMES)
def test_other_wishes_replace_the_earlier_ones(host: Callable[[str], Path], name: str) -> None:
    root = host(name)
    before = snapshot(root)
    setup(root)
    at_once = snapshot(root)
    setup(root, "--remove")
    arguments = ["setup", "--root", str(root), "--mode", "enforce", "--mirror", "http://10.0.0.1:6000"]
    CliRunner().invoke(main, arguments)
    assert snapshot(root) != at_once
    setup(root)
    assert snapshot(root) == at_once
    setup(root, "--remove")
    assert snapshot(root) == before


def test_containerd_1_gets_config_path_in_its_file_and_keeps_the_rest(host: Callable[[str], Path]) -> None:
    root = host("debian-containerd-1.6")
    before = document(root, "etc/containerd/config.toml")
    result = setup(root)
    after = document(root, "etc/containerd/config.toml")
    assert after["plugins"]["io.containerd.grpc.v1.cri"].pop("registry") == {"config_path": "/etc/containerd/certs.d"}
    assert after == before
    assert document(root, "etc/containerd/certs.d/_default/hosts.toml") == {
        "host": {MIRROR: {"capabilities": ["pull"]}}
    }
    assert "to do: systemctl restart containerd" in result.stderr


def test_containerd_2_gets_a_drop_in_and_existing_hosts_keep_their_order(host: Callable[[str], Path]) -> None:
    root = host("containerd-2")
    config = (root / "etc/containerd/config.toml").read_bytes()
    before = document(root, "etc/containerd/certs.d/reg.corp.example/hosts.toml")
    setup(root)
    assert (root / "etc/containerd/config.toml").read_bytes() == config
    drop_in = document(root, "etc/containerd/conf.d/zz-p2pdist.toml")
    assert drop_in["plugins"]["io.containerd.cri.v1.images"]["registry"] == {"config_path": "/etc/containerd/certs.d"}
    after = document(root, "etc/containerd/certs.d/reg.corp.example/hosts.toml")
    assert list(after["host"]) == [MIRROR, *before["host"]]
    assert after["host"].pop(MIRROR) == {"capabilities": ["pull"]}
    assert after == before


def test_certificates_that_a_new_hosts_toml_would_hide_are_named_in_it(host: Callable[[str], Path]) -> None:
    root = host("containerd-2")
    setup(root)
    made = document(root, "etc/containerd/certs.d/reg.lab_5000_/hosts.toml")
    assert made["ca"] == ["ca.crt"]
    assert made["client"] == [["node.cert", "node.key"]]


def test_enforce_leaves_containerd_no_other_host(host: Callable[[str], Path]) -> None:
    root = host("containerd-2")
    setup(root, "--mode", "enforce")
    for directory in (root / "etc/containerd/certs.d").iterdir():
        found = tomllib.loads((directory / "hosts.toml").read_text())
        assert found == {"server": MIRROR, "host": {MIRROR: {"capabilities": ["pull", "resolve"]}}}


def test_podmans_drop_in_repeats_what_the_host_had_set_behind_the_agent(host: Callable[[str], Path]) -> None:
    root = host("podman-crio")
    result = setup(root, "--registry", "docker.io", "--registry", "registry.corp.example:5000")
    hub, corp = document(root, "etc/containers/registries.conf.d/zz-p2pdist.conf")["registry"]
    assert hub["mirror"] == [
        {"location": "127.0.0.1:5050/docker.io", "insecure": True},
        {"location": "hub-copy.corp.example/docker", "pull-from-mirror": "digest-only"},
    ]
    assert corp["insecure"] is True
    assert corp["mirror"] == [{"location": "127.0.0.1:5050/registry.corp.example__5000", "insecure": True}]
    assert "to do: systemctl reload crio" in result.stderr


def test_enforce_names_the_entries_that_go_past_the_agent(host: Callable[[str], Path]) -> None:
    root = host("podman-crio")
    result = setup(root, "--mode", "enforce", code=1)
    assert "not enforced: podman: entries of their own go past the agent: docker.io/acme" in result.stderr
    hub = document(root, "etc/containers/registries.conf.d/zz-p2pdist.conf")["registry"][0]
    assert hub == {"prefix": "docker.io", "location": "127.0.0.1:5050/docker.io", "insecure": True}


def test_dockers_odd_formatting_stays(host: Callable[[str], Path]) -> None:
    root = host("docker")
    before = (root / "etc/docker/daemon.json").read_bytes()
    setup(root)
    after = (root / "etc/docker/daemon.json").read_bytes()
    assert after.replace(b'"http://127.0.0.1:5050",\r\n\t\t', b"", 1) == before
    assert document(root, "etc/docker/daemon.json")["registry-mirrors"] == [MIRROR, "https://hub-copy.corp.example"]


def test_a_containerd_that_kubernetes_does_not_use_keeps_its_config_toml(host: Callable[[str], Path]) -> None:
    root = host("docker")
    before = (root / "etc/containerd/config.toml").read_bytes()
    setup(root)
    assert (root / "etc/containerd/config.toml").read_bytes() == before


def test_docker_says_when_it_cannot_be_held_to_the_agent(host: Callable[[str], Path]) -> None:
    root = host("docker")
    assert "not enforced: docker: the classic image store" in setup(root, "--mode", "enforce", code=1).stderr
    (root / "etc/docker/daemon.json").write_text('{"features": {"containerd-snapshotter": true}}')
    setup(root, "--mode", "enforce")
    made = document(root, "etc/docker/certs.d/_default/hosts.toml")
    assert made["server"] == MIRROR


def test_k3s_gets_the_agent_before_other_endpoints_and_rewrites_are_left_alone(host: Callable[[str], Path]) -> None:
    root = host("mixed")
    result = setup(
        root, "--runtime", "k3s", "--registry", "reg.lab:5000", "--registry", "docker.io", "--registry", "quay.io"
    )
    text = (root / "etc/rancher/k3s/registries.yaml").read_text()
    assert '    endpoint:\n    - "http://127.0.0.1:5050"\n    - https://reg.lab:5000\n' in text
    assert 'mirrors:\n  "quay.io":\n    endpoint:\n      - "http://127.0.0.1:5050"\n  docker.io:\n' in text
    assert "note: k3s: docker.io has a rewrite" in result.stderr


def test_buildkit_keeps_comments_and_other_mirrors(host: Callable[[str], Path]) -> None:
    root = host("mixed")
    setup(root, "--runtime", "buildkit")
    text = (root / "etc/buildkit/buildkitd.toml").read_text()
    assert '  mirrors = [\n    "127.0.0.1:5050",\n    # the office copy\n    "hub-copy.corp.example", # slow\n' in text
    assert document(root, "etc/buildkit/buildkitd.toml")["registry"]["127.0.0.1:5050"] == {"http": True}


def test_nerdctl_is_configured_where_its_own_file_says(host: Callable[[str], Path]) -> None:
    root = host("mixed")
    setup(root, "--runtime", "nerdctl")
    assert (root / "etc/nerdctl/certs.d/_default/hosts.toml").exists()
    setup(root, "--runtime", "nerdctl", "--home", "/home/ann")
    assert (root / "home/ann/.config/containerd/certs.d/_default/hosts.toml").exists()


def test_one_runtime_of_several_is_taken_back_alone(host: Callable[[str], Path]) -> None:
    root = host("docker")
    before = snapshot(root)
    setup(root, "--runtime", "docker")
    only_docker = snapshot(root)
    setup(root, "--runtime", "containerd")
    setup(root, "--remove", "--runtime", "containerd")
    assert snapshot(root) == only_docker
    setup(root, "--remove", "--runtime", "docker")
    assert snapshot(root) == before
