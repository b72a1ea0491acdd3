# SPDX-License-Identifier: Apache-2.0
"""The promises of p2pdist.net.credentials."""

from __future__ import annotations

import base64
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pdist.core.types import Repository
from p2pdist.errors import ConfigError
from p2pdist.net.credentials import CredentialFiles, Credentials, DockerConfig, docker_config_path

CANARY = "canary-5f1d"


def config(tmp_path: Path, document: object) -> DockerConfig:
    path = tmp_path / "config.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return DockerConfig(path)


def entry(username: str = "me", secret: str = CANARY) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{username}:{secret}".encode()).decode()}


def is_running(pid_file: Path) -> bool:
    return Path(f"/proc/{pid_file.read_text().strip()}").exists()


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401
    """Install a helper `docker-credential-test` from a shell script; it logs what it is asked into `asked`."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def install(script: str) -> Path:
        program = tmp_path / "docker-credential-test"
        program.write_text(f'#!/bin/sh\necho "$1 $(cat)" >> {tmp_path}/asked\n{script}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return tmp_path / "asked"

    return install


@pytest.mark.parametrize(
    ("key", "registry"),
    [
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
        ("registry-1.docker.io", "docker.io"),
        ("https://index.docker.io/v1/", "index.docker.io"),
        ("ghcr.io", "ghcr.io"),
        ("https://ghcr.io", "ghcr.io"),
        ("https://reg.lab:5000/v2/", "reg.lab:5000"),
        ("REG.lab:5000", "reg.lab:5000"),
    ],
)
async def test_a_registry_is_found_under_the_keys_that_tools_write(tmp_path: Path, key: str, registry: str) -> None:
    found = await config(tmp_path, {"auths": {key: entry()}}).get(registry)
    assert found == Credentials("me", CANARY)


@pytest.mark.parametrize("key", ["reg.lab", "reg.lab:5001", "other", "reg.lab:5000/team", "evil.example/reg.lab:5000"])
async def test_another_hosts_credentials_are_never_given(tmp_path: Path, key: str) -> None:
    assert await config(tmp_path, {"auths": {key: entry()}}).get("reg.lab:5000") is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (entry("me", "with:colon"), Credentials("me", "with:colon")),
        ({"username": "me", "password": "pw"}, Credentials("me", "pw")),
        ({**entry(), "identitytoken": "refresh"}, Credentials("<token>", "refresh", identity=True)),
        ({"auth": base64.b64encode(b"me:pw\0\0").decode()}, Credentials("me", "pw")),
        ({}, None),
        ({"auth": 5}, None),
        ({"auth": base64.b64encode(b"nocolon").decode()}, None),
        ("text", None),
    ],
)
async def test_each_form_of_an_entry_is_read(tmp_path: Path, fields: object, expected: Credentials | None) -> None:
    assert await config(tmp_path, {"auths": {"reg.lab": fields}}).get("reg.lab") == expected


async def test_a_missing_file_holds_no_credentials_and_a_login_counts_at_once(tmp_path: Path) -> None:
    source = DockerConfig(tmp_path / "config.json")
    assert await source.get("reg.lab") is None
    config(tmp_path, {"auths": {"reg.lab": entry()}})
    assert await source.get("reg.lab") is not None


@pytest.mark.parametrize(
    "document",
    [f"{{{CANARY}", f'["{CANARY}"]', "[" * 100_000, {"auths": {"reg.lab": {"auth": f"!{CANARY}"}}}, " " * 1_048_577],
    ids=["cut", "list", "deep", "not base64", "too long"],
)
async def test_a_broken_file_is_refused_by_name_and_without_its_content(tmp_path: Path, document: object) -> None:
    with pytest.raises(ConfigError, match=r"config\.json") as refusal:
        await config(tmp_path, document).get("reg.lab")
    assert CANARY not in str(refusal.value)


def test_a_secret_is_not_in_a_repr() -> None:
    assert CANARY not in repr(Credentials("me", CANARY))


async def test_a_helper_is_asked_on_stdin_and_only_once(tmp_path: Path, helper: Any) -> None:  # noqa: ANN401
    asked = helper(f'echo \'{{"ServerURL":"x","Username":"me","Secret":"{CANARY}"}}\'')
    source = config(tmp_path, {"credHelpers": {"reg.lab:5000": "test"}})
    for _ in range(2):
        assert await source.get("reg.lab:5000") == Credentials("me", CANARY)
    assert asked.read_text() == "get reg.lab:5000\n"


async def test_a_refused_answer_makes_the_helper_run_again(tmp_path: Path, helper: Any) -> None:  # noqa: ANN401
    asked = helper('echo \'{"Username":"<token>","Secret":"refresh"}\'')
    source = config(tmp_path, {"credsStore": "test"})
    assert await source.get("docker.io") == Credentials("<token>", "refresh", identity=True)
    await source.get("docker.io", fresh=True)
    assert asked.read_text() == "get https://index.docker.io/v1/\n" * 2


async def test_an_old_answer_makes_the_helper_run_again(tmp_path: Path, helper: Any) -> None:  # noqa: ANN401
    asked = helper('echo \'{"Username":"me","Secret":"pw"}\'')
    config(tmp_path, {"credsStore": "test"})
    source = DockerConfig(tmp_path / "config.json", helper_ttl_s=0)
    for _ in range(2):
        await source.get("reg.lab")
    assert len(asked.read_text().splitlines()) == 2


async def test_a_helper_without_the_credentials_leaves_the_file_to_answer(tmp_path: Path, helper: Any) -> None:  # noqa: ANN401
    helper("echo credentials not found in native keychain; exit 1")
    source = config(tmp_path, {"credsStore": "test", "auths": {"reg.lab": entry()}})
    assert await source.get("reg.lab") == Credentials("me", CANARY)
    assert await source.get("other.lab") is None


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (f"echo {CANARY}; exit 1", "failed for reg.lab"),
        (f"echo {CANARY} >&2; echo {CANARY}", "in no known form"),
        (f'echo \'{{"Username":"{CANARY}"}}\'', "in no known form"),
        (f"yes {CANARY}", "failed for reg.lab"),
    ],
)
async def test_a_failing_helper_is_named_and_not_quoted(tmp_path: Path, helper: Any, script: str, text: str) -> None:  # noqa: ANN401
    helper(script)
    with pytest.raises(ConfigError, match="docker-credential-test") as refusal:
        await config(tmp_path, {"credsStore": "test"}).get("reg.lab")
    assert text in str(refusal.value)
    assert CANARY not in str(refusal.value)


async def test_a_silent_helper_is_ended_at_its_deadline(tmp_path: Path, helper: Any) -> None:  # noqa: ANN401
    helper(f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    config(tmp_path, {"credsStore": "test"})
    with pytest.raises(ConfigError, match=r"no answer for reg\.lab within 0\.5 s"):
        await DockerConfig(tmp_path / "config.json", helper_deadline_s=0.5).get("reg.lab")
    assert not is_running(tmp_path / "pid")


async def test_a_cancelled_question_ends_the_helper(tmp_path: Path, helper: Any) -> None:  # noqa: ANN401
    os.mkfifo(tmp_path / "running")
    helper(f"echo $$ > {tmp_path}/pid; echo > {tmp_path}/running; exec sleep 1000")
    source = config(tmp_path, {"credsStore": "test"})
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.get, "reg.lab")
            await trio.Path(tmp_path / "running").read_text()
            nursery.cancel_scope.cancel()
    assert not is_running(tmp_path / "pid")


@pytest.mark.parametrize("name", ["../../bin/sh", "a b", "/bin/sh", "-x", "a\n", 5, ["x"]])
async def test_a_helper_is_a_plain_name(tmp_path: Path, name: object) -> None:
    with pytest.raises(ConfigError, match="not a plain name"):
        await config(tmp_path, {"credsStore": name}).get("reg.lab")


async def test_a_helper_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"docker-credential-absent.*install it"):
        await config(tmp_path, {"credsStore": "absent"}).get("reg.lab")


def test_the_file_is_where_dockers_tools_keep_it() -> None:
    assert docker_config_path({}, Path("/root")) == Path("/root/.docker/config.json")
    assert docker_config_path({"DOCKER_CONFIG": "/etc/docker"}, Path("/root")) == Path("/etc/docker/config.json")


# Repositories, Kubernetes' pull secrets


def auths(**passwords: str) -> dict[str, object]:
    return {"auths": {key: {"username": "me", "password": password} for key, password in passwords.items()}}


@pytest.mark.parametrize(
    ("registry", "name", "password"),
    [
        ("reg.lab", "other/app", "host"),
        ("reg.lab", "team/app", "team"),
        ("reg.lab", "team/app/deep", "deep"),
        ("reg.lab", "teams/app", "host"),
        ("reg.lab", "", "host"),
        ("a.example.com", "app", "glob"),
        ("b.example.com", "app", "exact"),
        ("a.b.example.com", "app", None),
        ("example.com", "app", None),
        ("a.example.com:5000", "app", None),
        ("docker.io", "library/alpine", "hub"),
    ],
)
async def test_the_most_particular_key_wins(tmp_path: Path, registry: str, name: str, password: str | None) -> None:
    keys = {"reg.lab": "host", "https://reg.lab/team": "team", "reg.lab/team/app/deep/": "deep"}
    keys |= {"*.example.com": "glob", "b.example.com": "exact", "https://index.docker.io/v1/": "hub"}
    (tmp_path / "config.json").write_text(json.dumps(auths(**keys)))
    found = await DockerConfig(tmp_path / "config.json").get(registry, name)
    assert (found and found.secret) == password


@pytest.mark.parametrize("name", ["config.json", ".dockerconfigjson", ".dockercfg"])
@pytest.mark.parametrize("mounted", [True, False], ids=["directory", "file"])
async def test_a_pull_secret_is_read_as_it_is_mounted(tmp_path: Path, name: str, mounted: bool) -> None:
    content = auths(**{"reg.lab": "pw"})
    (tmp_path / name).write_text(json.dumps(content["auths"] if name == ".dockercfg" else content))
    found = await DockerConfig(tmp_path if mounted else tmp_path / name).get("reg.lab", "app")
    assert found == Credentials("me", "pw")


async def test_a_directory_without_a_file_holds_nothing(tmp_path: Path) -> None:
    assert await DockerConfig(tmp_path).get("reg.lab", "app") is None


async def test_each_rule_has_its_file_and_the_others_the_common_one(tmp_path: Path) -> None:
    for name in ("common", "own"):
        (tmp_path / name).write_text(json.dumps(auths(**{"reg.lab": name})))
    repository, paths = Repository("reg.lab", "app"), [tmp_path / "common", None]
    source = CredentialFiles(lambda: paths[0])
    assert await source.get(repository, file=None) == Credentials("me", "common")
    assert await source.get(repository, file=tmp_path / "own") == Credentials("me", "own")
    (tmp_path / "own").write_text(json.dumps(auths(**{"reg.lab": "rotated"})))
    assert await source.get(repository, file=tmp_path / "own") == Credentials("me", "rotated")
    paths.pop(0)
    assert await source.get(repository, file=None) is None
