# SPDX-License-Identifier: Apache-2.0
"""Credentials for registries from Docker's `config.json`, Kubernetes' pull secrets and credential helpers.

Owns: reading the file (`config.json`, `.dockerconfigjson`, the old `.dockercfg`, or a directory with one of them, as
a mounted secret is), matching a repository's name with its keys, running `docker-credential-<name> get`. Refuses to
send anything anywhere. Invariants: a secret is in no repr and no error text; a helper is a plain name
looked up on PATH, gets the server's name on stdin, runs at most 10 s and is heard for at most 64 KiB.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import TYPE_CHECKING, Any, Protocol

import trio

from p2pdist.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from p2pdist.core.types import Repository

_FILE_BYTES_MAX = 1024 * 1024
_OUTPUT_BYTES_MAX = 64 * 1024
_CACHED_MAX = 64
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KEY = re.compile(r"(?:https?://)?(?P<host>[^/]+)(?:/v[12])?/?(?P<path>[^?#]*)")
_NAMES = ("config.json", ".dockerconfigjson", ".dockercfg")
"""In a directory: Docker's own, and the keys of Kubernetes' two kinds of pull secret."""
_FILES_MAX = 64
_STARS_MAX = 8
_DOCKER_IO = ("docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")
_DOCKER_IO_SERVER = "https://index.docker.io/v1/"
"""The name under which `docker login` keeps Docker Hub's credentials, in files and helpers alike."""
_IDENTITY = "<token>"
"""The user name by which a helper says that the secret is an identity (refresh) token."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user name and password, or an identity token to be traded for access tokens."""

    username: str
    secret: str = field(repr=False)
    identity: bool = False

    def basic(self) -> str:
        """Return the value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.secret}".encode()).decode()


class CredentialSource(Protocol):
    """Where the origin client asks when a registry does not serve it anonymously."""

    async def get(self, repository: Repository, *, file: Path | None, fresh: bool = False) -> Credentials | None:
        """Return the credentials for a repository by the name that runtimes use, or None.

        Args:
            file: where to look; None: wherever the agent looks by default.
            fresh: what was given before has been refused; do not answer from a cache.

        Raises:
            ConfigError: the file or helper is unusable; nothing secret is in the text.
        """


def docker_config_path(environment: Mapping[str, str], home: Path) -> Path:
    """Return where Docker's tools keep `config.json`: `$DOCKER_CONFIG`, else `~/.docker`."""
    directory = environment.get("DOCKER_CONFIG")
    return (Path(directory) if directory else home / ".docker") / "config.json"


class CredentialFiles:
    """A CredentialSource over files. `default`: says which is for rules that name none, at each question."""

    def __init__(self, default: Callable[[], Path | None]) -> None:
        self._default = default
        self._files: dict[Path, DockerConfig] = {}

    async def get(self, repository: Repository, *, file: Path | None, fresh: bool = False) -> Credentials | None:
        """See CredentialSource."""
        path = file or self._default()
        if path is None:
            return None
        if path not in self._files:
            while len(self._files) >= _FILES_MAX:
                del self._files[next(iter(self._files))]
            self._files[path] = DockerConfig(path)
        return await self._files[path].get(repository.registry, repository.name, fresh=fresh)


class DockerConfig:
    """A credentials file, read anew for each question, so that a `docker login` or a new secret counts at once.

    Args:
        path: the file, or a directory with it; one that does not exist holds no credentials.
        helper_deadline_s: how long a helper may run.
        helper_ttl_s: how long its answer is used before it is run again; clouds give tokens of an hour and more.
    """

    def __init__(self, path: Path, *, helper_deadline_s: float = 10.0, helper_ttl_s: float = 900.0) -> None:
        self._path = path
        self._helper_deadline_s = helper_deadline_s
        self._helper_ttl_s = helper_ttl_s
        self._lock = trio.Lock()
        self._cached: dict[tuple[str, str], tuple[float, Credentials | None]] = {}

    async def get(self, registry: str, name: str = "", *, fresh: bool = False) -> Credentials | None:
        """Return the credentials for a registry, or for a repository of it; see CredentialSource.

        The most particular key wins (`host/team` before `host`, a name before `*.host`). A host's own helper beats
        the common one, which beats what is in the file.
        """
        config = await self._load()
        host = _split(registry)[0]
        helpers = _table(config, "credHelpers")
        helper_key = _best(helpers, host, name)
        helper = helpers[helper_key] if helper_key is not None else config.get("credsStore")
        if helper:
            found = await self._ask_helper(helper, host, fresh=fresh)
            if found is not None:
                return found
        auths = _table(config, "auths")
        key = _best({key: entry for key, entry in auths.items() if isinstance(entry, dict)}, host, name)
        return None if key is None else self._from_entry(key, auths[key])

    async def _load(self) -> dict[str, Any]:
        path = await trio.to_thread.run_sync(self._file)
        try:
            async with await trio.open_file(path, "rb") as file:
                text = await file.read(_FILE_BYTES_MAX + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ConfigError(f"cannot read the Docker credentials file {path}: {error.strerror}") from error
        try:
            config = json.loads(text) if len(text) <= _FILE_BYTES_MAX else None
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise ConfigError(f"the Docker credentials file {path} is not a JSON object; mend or remove it")
        return {"auths": config} if _is_dockercfg(config) else config

    def _file(self) -> Path:
        """Return the file; in a directory, the first there is of those that tools put there."""
        named = [self._path / name for name in _NAMES]
        return next((path for path in named if path.is_file()), named[0]) if self._path.is_dir() else self._path

    def _from_entry(self, key: str, entry: dict[str, Any]) -> Credentials | None:
        token = entry.get("identitytoken")
        if isinstance(token, str) and token:
            return Credentials(_IDENTITY, token, identity=True)
        username, secret = entry.get("username"), entry.get("password")
        if isinstance(entry.get("auth"), str) and entry["auth"]:
            try:
                decoded = base64.b64decode(entry["auth"], validate=True).decode()
            except ValueError:
                raise ConfigError(f"the auth of {key[:100]!r} in {self._path} is not base64; log in again") from None
            username, _, secret = decoded.rstrip("\0").partition(":")
        if not isinstance(username, str) or not isinstance(secret, str) or not (username and secret):
            return None
        return Credentials(username, secret)

    async def _ask_helper(self, helper: object, host: str, *, fresh: bool) -> Credentials | None:
        if not isinstance(helper, str) or not _HELPER.fullmatch(helper):
            raise ConfigError(f"{self._path} names a credential helper that is not a plain name")
        async with self._lock:
            cached = self._cached.get((helper, host))
            if cached is not None and not fresh and trio.current_time() < cached[0]:
                return cached[1]
            server = _DOCKER_IO_SERVER if host == "docker.io" else host
            found = await _run_helper(f"docker-credential-{helper}", server, self._helper_deadline_s)
            while len(self._cached) >= _CACHED_MAX:
                del self._cached[next(iter(self._cached))]
            self._cached[helper, host] = (trio.current_time() + self._helper_ttl_s, found)
            return found


async def _run_helper(program: str, server: str, deadline_s: float) -> Credentials | None:
    output = b""
    try:
        process = await trio.lowlevel.open_process(
            [program, "get"], stdin=PIPE, stdout=PIPE, stderr=DEVNULL, start_new_session=True
        )
    except OSError as error:
        raise ConfigError(f"cannot run the credential helper {program}: {error.strerror}; install it") from error
    try:
        with trio.move_on_after(deadline_s) as scope:
            output = await _converse(process, server.encode())
    finally:
        await _end(process)
    if scope.cancelled_caught:
        raise ConfigError(f"the credential helper {program} gave no answer for {server} within {deadline_s:g} s")
    return _parse_helper_output(program, server, process.returncode, output)


async def _converse(process: trio.Process, question: bytes) -> bytes:
    """Return what the helper prints, at most one byte too many, and wait for its end unless it printed that."""
    assert process.stdin is not None
    assert process.stdout is not None
    output = bytearray()
    with suppress(trio.BrokenResourceError):
        async with process.stdin:
            await process.stdin.send_all(question)
    while len(output) <= _OUTPUT_BYTES_MAX:
        part = await process.stdout.receive_some(_OUTPUT_BYTES_MAX + 1 - len(output))
        if not part:
            await process.wait()
            break
        output += part
    return bytes(output)


async def _end(process: trio.Process) -> None:
    """Kill the helper with its children unless it has ended, and reap it."""
    with trio.CancelScope(shield=True):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        await trio.aclose_forcefully(process.stdin)
        await trio.aclose_forcefully(process.stdout)


def _parse_helper_output(program: str, server: str, status: int | None, output: bytes) -> Credentials | None:
    """Read a helper's answer; what a failing one printed stays unsaid, for it may be anything."""
    if status != 0:
        if b"credentials not found" in output:
            return None
        raise ConfigError(f"the credential helper {program} failed for {server} (exit status {status})")
    try:
        answer = json.loads(output)
        username, secret = answer["Username"], answer["Secret"]
    except (ValueError, RecursionError, KeyError, TypeError):
        username = secret = None
    if not isinstance(username, str) or not isinstance(secret, str):
        raise ConfigError(f"the credential helper {program} answered for {server} in no known form")
    return Credentials(username, secret, identity=username == _IDENTITY) if secret else None


def _is_dockercfg(config: dict[str, Any]) -> bool:
    """Return whether the entries stand at the top, as in Kubernetes' older kind of secret."""
    return "auths" not in config and any(
        isinstance(entry, dict) and ("auth" in entry or "password" in entry) for entry in config.values()
    )


def _split(key: str) -> tuple[str, str]:
    """Return the host and the path that a key of the file, or a registry's name, is about."""
    match = _KEY.fullmatch(key)
    if match is None:
        return key, ""
    host = match["host"].lower()
    return "docker.io" if host in _DOCKER_IO else host, match["path"].rstrip("/")


def _best(entries: Mapping[str, object], host: str, name: str) -> str | None:
    """Return the key that speaks most particularly of a repository, or None; of equals the first."""
    fitting = [(rank, key) for key in entries if (rank := _rank(key, host, name)) is not None]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None


def _rank(key: str, host: str, name: str) -> tuple[int, bool] | None:
    """Return how particular a key is that fits; None where it does not."""
    key_host, path = _split(key)
    if path and not f"{name}/".startswith(f"{path}/"):
        return None
    if key_host == host:
        return len(path), True
    return (len(path), False) if "*" in key_host and _host_glob(key_host, host) else None


def _host_glob(glob: str, host: str) -> bool:
    """Return whether a Kubernetes glob fits: each `*` stands for text within one label of the name."""
    pattern = "[^.:]*".join(re.escape(part) for part in glob.split("*"))
    return glob.count("*") <= _STARS_MAX and re.fullmatch(pattern, host) is not None


def _table(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}
