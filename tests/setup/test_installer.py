# SPDX-License-Identifier: Apache-2.0
"""What setup promises when things go wrong: a run cut short, files that others changed, files that nobody can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from p2pdist.errors import P2PDistError
from p2pdist.setup.installer import Installer
from p2pdist.setup.plan import Places, Wanted
from p2pdist.setup.runtimes import present
from p2pdist.setup.tree import Tree
from tests.setup.conftest import HOSTS
from tests.setup.snapshots import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAMES = sorted(path.name for path in HOSTS.iterdir())
ACCELERATE = Wanted(mirror="http://127.0.0.1:5050", registries=("docker.io", "quay.io"), all_registries=True)
ENFORCE = Wanted(mirror="http://10.1.1.1:80", registries=("docker.io",), all_registries=True, enforce=True)
HOSTS_TOML = "etc/containerd/certs.d/reg.corp.example/hosts.toml"


class Crash(BaseException):
    """The machine stops here."""


class Crashing(Tree):
    """A tree whose host stops before its next change, once so many were made."""

    def __init__(self, root: Path, changes: int) -> None:
        super().__init__(root)
        self.left = changes

    def _step(self) -> None:
        if self.left == 0:
            raise Crash
        self.left -= 1

    def write(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        self._step()
        super().write(path, content, mode=mode)

    def remove(self, path: str) -> None:
        self._step()
        super().remove(path)

    def make_directory(self, path: str) -> None:
        self._step()
        super().make_directory(path)

    def remove_directory_if_empty(self, path: str) -> None:
        self._step()
        super().remove_directory_if_empty(path)


def install(tree: Tree, wanted: Wanted = ACCELERATE) -> None:
    installer = Installer(tree, Places())
    installer.carry_out(installer.install(present(installer.view(), Places()), wanted))


def remove(tree: Tree) -> None:
    installer = Installer(tree, Places())
    installer.carry_out(installer.remove(installer.set_up))


def crash_everywhere(root: Path, run: Callable[[Tree], None], after: Callable[[], None]) -> int:
    """Run again and again, each time one change further, until a run ends; `after` looks at each crash."""
    for changes in range(100):
        try:
            run(Crashing(root, changes))
        except Crash:
            after()
        else:
            return changes
    raise AssertionError("no end")


@pytest.mark.parametrize("name", NAMES)
def test_a_setup_cut_short_anywhere_can_be_taken_back(host: Callable[[str], Path], name: str) -> None:
    root = host(name)
    before = snapshot(root)

    def take_back() -> None:
        remove(Tree(root))
        # What was cut short between making its directory and writing the record leaves that directory.
        left = {path: state for path, state in snapshot(root).items() if path != "etc/p2pdist"}
        assert left == before

    assert crash_everywhere(root, install, take_back) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_a_setup_cut_short_anywhere_can_be_repeated(host: Callable[[str], Path], name: str) -> None:
    root = host(name)
    before = snapshot(root)
    crash_everywhere(root, install, lambda: None)
    once = {path: state[1] for path, state in snapshot(root).items()}
    remove(Tree(root))
    assert snapshot(root).keys() - {"etc/p2pdist"} == before.keys()
    install(Tree(root))
    assert {path: state[1] for path, state in snapshot(root).items()}.keys() == once.keys()


@pytest.mark.parametrize("name", NAMES)
def test_another_setup_over_the_first_can_be_cut_short_anywhere(host: Callable[[str], Path], name: str) -> None:
    root = host(name)
    before = snapshot(root)

    def take_back_and_begin_anew() -> None:
        remove(Tree(root))
        assert snapshot(root) == before
        install(Tree(root), ENFORCE)

    install(Tree(root), ENFORCE)
    crash_everywhere(root, install, take_back_and_begin_anew)
    remove(Tree(root))
    assert snapshot(root) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_removal_cut_short_anywhere_can_be_repeated(host: Callable[[str], Path], name: str) -> None:
    root = host(name)
    before = snapshot(root)
    install(Tree(root))
    crash_everywhere(root, remove, lambda: None)
    files = {path for path, state in snapshot(root).items() if state[0] != "directory"}
    assert files == {path for path, state in before.items() if state[0] != "directory"}
    assert {path: state for path, state in snapshot(root).items() if path in before} == before


# ------------------------------------------------------------- somebody else's changes


def test_what_others_changed_since_stays_and_ours_goes(host: Callable[[str], Path]) -> None:
    root = host("containerd-2")
    file = root / HOSTS_TOML
    original = file.read_text()
    install(Tree(root))
    file.write_text(file.read_text().replace("never push here", "never ever") + "\n# audited in May\n")
    remove(Tree(root))
    assert file.read_text() == original.replace("never push here", "never ever") + "\n# audited in May\n"


def test_a_file_of_ours_that_others_added_to_keeps_what_they_added(host: Callable[[str], Path]) -> None:
    root = host("debian-containerd-1.6")
    install(Tree(root))
    file = root / "etc/containerd/certs.d/_default/hosts.toml"
    added = '\n[host."https://other.example"]\n  capabilities = ["pull"]\n'
    file.write_text(file.read_text() + added)
    remove(Tree(root))
    assert file.read_text() == added
    assert not (root / "etc/p2pdist").exists()


def test_what_others_took_out_or_deleted_is_no_trouble(host: Callable[[str], Path]) -> None:
    root = host("containerd-2")
    original = (root / HOSTS_TOML).read_bytes()
    install(Tree(root))
    (root / HOSTS_TOML).write_bytes(original + b"# by hand\n")
    (root / "etc/containerd/conf.d/zz-p2pdist.toml").unlink()
    remove(Tree(root))
    assert (root / HOSTS_TOML).read_bytes() == original + b"# by hand\n"
    assert sorted(os.listdir(root / "etc/containerd/conf.d")) == ["10-gpu.toml"]


def test_a_change_on_our_own_lines_is_refused_and_nothing_is_touched(host: Callable[[str], Path]) -> None:
    root = host("docker")
    install(Tree(root))
    file = root / "etc/docker/daemon.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    before = snapshot(root)
    with pytest.raises(
        P2PDistError, match=r"daemon.json was changed since setup.*take 127.0.0.1:5050 out of it by hand"
    ):
        remove(Tree(root))
    assert snapshot(root) == before
    file.write_text('{"live-restore": true}')
    remove(Tree(root))
    assert file.read_text() == '{"live-restore": true}'


def test_a_mode_that_others_changed_stays(host: Callable[[str], Path]) -> None:
    root = host("containerd-2")
    install(Tree(root))
    (root / HOSTS_TOML).chmod(0o640)
    remove(Tree(root))
    assert (root / HOSTS_TOML).stat().st_mode & 0o777 == 0o640


def test_an_entry_that_is_there_by_hand_is_left_alone_and_not_taken_away(host: Callable[[str], Path]) -> None:
    root = host("debian-containerd-1.6")
    default = root / "etc/containerd/certs.d/_default/hosts.toml"
    default.parent.mkdir(parents=True)
    default.write_text('[host."http://127.0.0.1:5050/"]\ncapabilities = ["pull", "resolve"]\n')
    before = snapshot(root)
    install(Tree(root))
    assert (root / default).read_text() == before[str(default.relative_to(root))][1].decode()  # type: ignore[attr-defined]
    remove(Tree(root))
    assert snapshot(root) == before


def test_two_setups_at_once_do_not_mix(host: Callable[[str], Path]) -> None:
    tree = Tree(host("docker"))
    installer = Installer(tree, Places())
    outcome = installer.install(["docker"], ACCELERATE)
    with installer._locked(), pytest.raises(P2PDistError, match="another `p2pdist setup` is running"):
        Installer(tree, Places()).carry_out(outcome)


# ------------------------------------------------------------------- odd files


@pytest.mark.parametrize(
    ("name", "path", "content", "complaint"),
    [
        ("docker", "etc/docker/daemon.json", b"{", r"/etc/docker/daemon.json is not valid JSON \(.*line 1"),
        ("docker", "etc/docker/daemon.json", b'{"a": 1, "a": 2}', "a key occurs twice"),
        ("docker", "etc/docker/daemon.json", b"[]", "is not a JSON object"),
        ("docker", "etc/docker/daemon.json", b'{"registry-mirrors": "x"}', "registry-mirrors is not a list"),
        ("docker", "etc/docker/daemon.json", b"\xff\xfe", "is not UTF-8 text"),
        ("docker", "etc/containerd/config.toml", b"x = [", r"config.toml is not valid TOML \("),
        ("containerd-2", HOSTS_TOML, b"host = {}\n[host.x]", "not valid TOML"),
        ("containerd-2", HOSTS_TOML, b'host = {"https://a" = {}}', "cannot be edited safely"),
        ("containerd-2", HOSTS_TOML, b"host = 1", "host is not a table"),
        ("podman-crio", "etc/containers/registries.conf", b'[registries.search]\nregistries = ["a"]', "old form"),
        ("podman-crio", "etc/containers/registries.conf", b"registry = 3", "registry is not a list"),
        ("mixed", "etc/buildkit/buildkitd.toml", b"registry = 1", "registry is not a table"),
        ("mixed", "etc/rancher/k3s/registries.yaml", b"mirrors: {docker.io: {}}\n", "cannot be edited safely"),
        ("mixed", "etc/rancher/k3s/registries.yaml", b"mirrors:\n  docker.io: *x\n", "cannot be edited safely"),
        ("mixed", "etc/nerdctl/nerdctl.toml", b"x", "not valid TOML"),
        (
            "debian-containerd-1.6",
            "etc/containerd/config.toml",
            b'version=2\n[plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]\nendpoint=["https://m"]',
            "registry.mirrors, beside which containerd takes no config_path",
        ),
    ],
)
def test_a_file_that_cannot_be_edited_ends_setup_with_one_line_and_no_change(
    host: Callable[[str], Path], name: str, path: str, content: bytes, complaint: str
) -> None:
    root = host(name)
    (root / path).write_bytes(content)
    before = snapshot(root)
    with pytest.raises(P2PDistError, match=complaint) as caught:
        install(Tree(root))
    assert "\n" not in str(caught.value)
    assert snapshot(root) == before


def test_a_directory_in_the_place_of_a_file_is_named(host: Callable[[str], Path]) -> None:
    root = host("docker")
    (root / "etc/docker/daemon.json").unlink()
    (root / "etc/docker/daemon.json").mkdir()
    with pytest.raises(P2PDistError, match=r"/etc/docker/daemon\.json: Is a directory"):
        install(Tree(root))


def test_links_are_followed_inside_the_root_and_stay_links(host: Callable[[str], Path]) -> None:
    root = host("docker")
    real = root / "etc/docker/daemon.json"
    (root / "srv").mkdir()
    real.rename(root / "srv/daemon.json")
    real.symlink_to("/srv/../../../srv/daemon.json")
    before = snapshot(root)
    install(Tree(root))
    assert b"127.0.0.1:5050" in (root / "srv/daemon.json").read_bytes()
    remove(Tree(root))
    assert snapshot(root) == before


def test_links_in_a_circle_are_a_line(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(P2PDistError, match="too many symbolic links"):
        Tree(tmp_path).read("/a/x")


def test_a_damaged_record_is_a_line(host: Callable[[str], Path]) -> None:
    root = host("docker")
    install(Tree(root))
    for content in ("{", "{}", '{"format": 1, "files": {"/x": {}}, "directories": []}'):
        (root / "etc/p2pdist/setup.json").write_text(content)
        with pytest.raises(P2PDistError, match=r"setup.json is damaged"):
            remove(Tree(root))
    (root / "etc/p2pdist/setup.json").write_text('{"format": 2}')
    with pytest.raises(P2PDistError, match="written by another version"):
        remove(Tree(root))


def test_the_record_may_hold_secrets_and_is_its_owners_alone(host: Callable[[str], Path]) -> None:
    root = host("containerd-2")
    install(Tree(root))
    assert (root / "etc/p2pdist/setup.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up its rights: run it as root")
def test_without_rights_it_says_who_may(host: Callable[[str], Path], tmp_path: Path) -> None:
    root = host("docker")
    for path in (tmp_path, *tmp_path.parents):
        if str(path).startswith("/tmp/"):
            path.chmod(path.stat().st_mode | 0o055)
    code = (
        "import os, difflib, p2pdist.commands.setup; from p2pdist.cli import main;"
        f"os.setgroups([]); os.setgid(65534); os.setuid(65534); main(['setup', '--root', {str(root)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("p2pdist: /etc/docker/daemon.json: Permission denied; run it as root")
    assert done.stderr.count("\n") == 1
