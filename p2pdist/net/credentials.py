# SPDX-License-Identifier: Apache-2.0
"""Credentials for registries from Docker's `config.json` and its credential helpers.

Owns: reading the file, matching a registry's name, running `docker-credential-<name> get`. Refuses to
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
    from collections.abc import Mapping

_FILE_BYTES_MAX = 1024 * 1024
_OUTPUT_BYTES_MAX = 64 * 1024
_CACHED_MAX = 64
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KEY = re.compile(r"(?:https?://)?(?P<host>[^/]+)(?:/|/v[12]/?)?")
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

    async def get(self, registry: str, *, fresh: bool = False) -> Credentials | None:
        """Return the credentials for a registry by the name that runtimes use, or None.

        Args:
            fresh: what was given before has been refused; do not answer from a cache.

        Raises:
            ConfigError: the file or helper is unusable; nothing secret is in the text.
        """


def docker_config_path(environment: Mapping[str, str], home: Path) -> Path:
    """Return where Docker's tools keep `config.json`: `$DOCKER_CONFIG`, else `~/.docker`."""
    directory = environment.get("DOCKER_CONFIG")
    return (Path(directory) if directory else home / ".docker") / "config.json"


class DockerConfig:
    """A Docker `config.json`, read anew for each question, so that a `docker login` counts at once.

    Args:
        path: the file; one that does not exist holds no credentials.
        helper_deadline_s: how long a helper may run.
        helper_ttl_s: how long its answer is used before it is run again; clouds give tokens of an hour and more.
    """

    def __init__(self, path: Path, *, helper_deadline_s: float = 10.0, helper_ttl_s: float = 900.0) -> None:
        self._path = path
        self._helper_deadline_s = helper_deadline_s
        self._helper_ttl_s = helper_ttl_s
        self._lock = trio.Lock()
        self._cached: dict[tuple[str, str], tuple[float, Credentials | None]] = {}

    async def get(self, registry: str, *, fresh: bool = False) -> Credentials | None:
        """See CredentialSource; a host's own helper beats the common one, which beats what is in the file."""
        config = await self._load()
        host = _normalise(registry)
        helpers = {_normalise(key): value for key, value in _table(config, "credHelpers").items()}
        helper = helpers.get(host) or config.get("credsStore")
        if helper:
            found = await self._ask_helper(helper, host, fresh=fresh)
            if found is not None:
                return found
        for key, entry in _table(config, "auths").items():
            if _normalise(key) == host and isinstance(entry, dict):
                return self._from_entry(key, entry)
        return None

    async def _load(self) -> dict[str, Any]:
        try:
            async with await trio.open_file(self._path, "rb") as file:
                text = await file.read(_FILE_BYTES_MAX + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ConfigError(f"cannot read the Docker credentials file {self._path}: {error.strerror}") from error
        try:
            config = json.loads(text) if len(text) <= _FILE_BYTES_MAX else None
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise ConfigError(f"the Docker credentials file {self._path} is not a JSON object; mend or remove it")
        return config

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


def _normalise(key: str) -> str:
    """Return the host that a key of the file or a runtime's registry name is about; keys with a path are themselves."""
    match = _KEY.fullmatch(key)
    host = match["host"].lower() if match else key
    return "docker.io" if host in _DOCKER_IO else host


def _table(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}
