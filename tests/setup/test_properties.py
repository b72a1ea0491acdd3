# SPDX-License-Identifier: Apache-2.0
"""Whatever files a host has, setup and its removal leave them byte for byte, and in between they say what was meant."""

from __future__ import annotations

import json
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pdist.errors import P2PDistError
from p2pdist.setup import json_text, toml_text
from p2pdist.setup.installer import Installer
from p2pdist.setup.merge import merge
from p2pdist.setup.plan import Places, Wanted
from p2pdist.setup.tree import Tree
from tests.setup.snapshots import snapshot

MIRROR = "http://127.0.0.1:5050"
FILES = {
    "containerd": ["etc/containerd/config.toml", "etc/containerd/certs.d/reg.example/hosts.toml"],
    "podman": ["etc/containers/registries.conf", "etc/containers/registries.conf.d/10-own.conf"],
    "docker": ["etc/docker/daemon.json", "etc/docker/certs.d/_default/hosts.toml"],
    "buildkit": ["etc/buildkit/buildkitd.toml"],
    "k3s": ["etc/rancher/k3s/registries.yaml"],
}

comments = st.sampled_from(["", "  ", "# plain", '# [odd] "comment', "\t# ''' #"])
values = st.sampled_from(
    [
        "1",
        "true # x = [",
        '"a ] # \\" b"',
        "'[x]'",
        '"""\n[not.a.table]\nkey = 1\n"""',
        "'''\n# no comment\n'''",
        '["a", # b\n "]" , ]',
        "[]",
        "[[1, 2], [ ]]",
        '{ a = "}", b = [1] }',
        "1979-05-27T07:32:00Z",
        '""""quoted" """',
    ]
)
keys = st.sampled_from(["a", '"b.c"', "'d'", "server", "mirrors", "e . f", "version", "imports"])
tables = st.sampled_from(
    [
        "[host]",
        '[host."https://a"]',
        '[host."https://a".header]',
        "[ plugins ]",
        '[plugins."io.containerd.grpc.v1.cri"]',
        '  [plugins."io.containerd.grpc.v1.cri".registry]',
        '[registry."docker.io"]',
        "[[registry]]",
        "[[registry.mirror]]",
        "[x.'y']",
    ]
)
lines = st.one_of(
    comments, st.tuples(keys, values).map(" = ".join), tables, st.just("version = 2"), st.just('location = "q"')
)
toml_texts = st.tuples(st.lists(lines, max_size=12), st.sampled_from(["\n", "\r\n"]), st.booleans()).map(
    lambda parts: parts[1].join(parts[0]) + (parts[1] if parts[2] else "")
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.sampled_from(['"]', "{", "registry-mirrors", "ü"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
json_objects = st.dictionaries(
    st.sampled_from(["a", "debug", 'o"d}d', "registry-mirrors"]),
    json_values | st.lists(st.just("https://m")),
    max_size=4,
)
json_texts = st.tuples(
    json_objects,
    st.sampled_from([None, 1, "\t"]),
    st.sampled_from([(",", ":"), (" , ", " : ")]),
    st.sampled_from(["", "\n", " \r\n"]),
).map(lambda p: p[3] + json.dumps(p[0], indent=p[1], separators=p[2], ensure_ascii=False) + p[3])
yaml_lines = st.sampled_from(
    [
        "mirrors:",
        "configs:",
        '  "docker.io":',
        "  quay.io:",
        "    endpoint:",
        '      - "https://m"',
        "# note",
        "",
        "    rewrite:",
    ]
)
yaml_texts = st.lists(yaml_lines, max_size=8).map("\n".join)
junk = st.binary(max_size=40)


def contents(path: str) -> st.SearchStrategy[bytes | None]:
    texts = json_texts if path.endswith(".json") else yaml_texts if path.endswith(".yaml") else toml_texts
    return st.one_of(st.none(), texts.map(str.encode), texts.map(str.encode), junk)


hosts = st.sampled_from(sorted(FILES)).flatmap(
    lambda name: st.tuples(st.just(name), st.fixed_dictionaries({path: contents(path) for path in FILES[name]}))
)


def document(path: str, content: bytes) -> Any:  # noqa: ANN401 - of any file
    return json.loads(content) if path.endswith(".json") else tomllib.loads(content.decode())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(hosts, st.booleans())
def test_any_files_come_back_byte_for_byte(host: tuple[str, dict[str, bytes | None]], enforce: bool) -> None:
    name, files = host
    wanted = Wanted(mirror=MIRROR, registries=("docker.io", "reg.example"), all_registries=True, enforce=enforce)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for path, content in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                (root / path).write_bytes(content)
        before = snapshot(root)
        try:
            installer = Installer(Tree(root), Places())
            installer.carry_out(installer.install([name], wanted))
        except P2PDistError:
            assert snapshot(root) == before
            return
        for path in files:
            if (root / path).exists() and not path.endswith(".yaml"):
                document(
                    path, (root / path).read_bytes() or b"{}" if path.endswith(".json") else (root / path).read_bytes()
                )
        again = Installer(Tree(root), Places())
        assert again.install([name], wanted).changes == ()
        again.carry_out(again.remove([name]))
        assert snapshot(root) == before


def at(document: dict[str, Any], path: tuple[str, ...]) -> Any:  # noqa: ANN401 - of any document
    found: Any = document
    for part in path:
        found = found[-1][part] if isinstance(found, list) else found[part]
    return found


@settings(max_examples=400, deadline=None)
@given(toml_texts)
def test_the_scanner_finds_every_value_where_it_is(text: str) -> None:
    try:
        whole = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    if "[[" in text:
        return
    last: dict[tuple[str, ...], str] = {}
    for item in toml_text.statements(text):
        if isinstance(item, toml_text.Pair):
            last[(*item.table, *item.key)] = text[item.value_start : item.value_stop]
        else:
            assert text[item.start] == "["
            assert text[item.stop - 1] == "]"
    for path, literal in last.items():
        assert at(whole, path) == tomllib.loads(f"x = {literal}")["x"]


@settings(max_examples=200, deadline=None)
@given(json_texts)
def test_a_json_array_gets_its_item_and_nothing_else_changes(text: str) -> None:
    value = json.loads(text)
    if not isinstance(value.get("registry-mirrors", []), list):
        return
    edited = json.loads(json_text.prepend_item(text, "registry-mirrors", MIRROR))
    assert edited == {**value, "registry-mirrors": [MIRROR, *value.get("registry-mirrors", [])]}


some_lines = st.lists(st.sampled_from("abc"), max_size=6).map(lambda names: "".join(f"{name}\n" for name in names))


@given(some_lines, some_lines)
def test_a_merge_with_one_side_unchanged_is_the_other(base: str, other: str) -> None:
    assert merge(base, base, other) == other
    assert merge(base, other, base) == other
    assert merge(base, other, other) == other


@given(some_lines, some_lines, st.integers(0, 6), st.sampled_from("xyz"))
def test_a_line_added_elsewhere_survives_the_removal_of_ours(top: str, bottom: str, place: int, added: str) -> None:
    before, ours = f"{top}anchor\n{bottom}", f"{top}ours\nanchor\n{bottom}"
    after = [*ours.splitlines(keepends=True), "end\n"]
    after.insert(len(top.splitlines()) + 2, f"{added}\n")
    merged = merge(ours, before, "".join(after))
    assert merged == f"{top}anchor\n{added}\n{bottom}end\n" or merged is None
