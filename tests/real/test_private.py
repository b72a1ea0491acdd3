# SPDX-License-Identifier: Apache-2.0
"""Private images with real processes: who has no rights gets nothing from anywhere, and no secret is left behind."""

from __future__ import annotations

import base64
import json
import random
import re
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.fake_registry import digest_of
from tests.real.cluster import until
from tests.real.tenants import ALICE, MALLORY, Tape, TokenService, basic, demand, free_port, program, push

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from p2pdist.core.types import Digest

REPOSITORY = "team/app"
LAYER = random.Random(21).randbytes(3 << 20)
HTPASSWD = {
    ALICE: "$2b$05$abcdefghijklmnopqrstuucZrnvViHJ5vUQpXVao6M5RH3VaPaN1O",
    MALLORY: "$2b$05$abcdefghijklmnopqrstuuON/KvVLS4VmEV1STnUVfhLrjHEbBbZ.",
}
"""bcrypt of the passwords; Python has none built in that will stay."""


@dataclass
class Scene:
    """A registry with rights, a scheduler and agents behind recording proxies."""

    path: Path
    auth: str
    registry: str = ""
    tokens: TokenService | None = None
    manifest: Digest = field(init=False)
    mirrors: dict[str, int] = field(default_factory=dict)
    peers: dict[str, int] = field(default_factory=dict)
    admins: dict[str, int] = field(default_factory=dict)
    tapes: list[Tape] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)

    async def authorization(self, mirror: str, user: tuple[str, str], challenge: str) -> str:
        """Return what a runtime shows after this challenge, as containerd would."""
        if challenge.startswith("Basic "):
            return basic(user)
        said = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        async with httpx.AsyncClient(trust_env=False) as client:
            asked = {"service": said["service"], "scope": said["scope"]}
            answer = await client.get(said["realm"], params=asked, headers={"Authorization": basic(user)})
        return f"Bearer {answer.json()['token']}"

    async def ask(
        self, agent: str, what: str, authorization: str = "", method: str = "GET", **headers: str
    ) -> httpx.Response:
        shown = {"Authorization": authorization} if authorization else {}
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            url = f"http://127.0.0.1:{self.mirrors[agent]}/v2/{REPOSITORY}/{what}?ns=reg.lab"
            return await client.request(method, url, headers={**shown, **headers})

    async def pull(self, agent: str, user: tuple[str, str]) -> None:
        """Pull as containerd does: ask, take up the challenge, ask again; all that comes must be right."""
        refused = await self.ask(agent, "manifests/v1")
        assert refused.status_code == 401, refused.text
        shown = await self.authorization(agent, user, refused.headers["www-authenticate"])
        self.secrets.append(shown.partition(" ")[2])
        manifest = await self.ask(agent, "manifests/v1", shown)
        assert (manifest.status_code, manifest.headers["docker-content-digest"]) == (200, self.manifest), manifest.text
        for layer in (b"{}", LAYER):
            assert (await self.ask(agent, f"blobs/{digest_of(layer)}", shown)).content == layer

    async def settled(self, agent: str) -> None:
        """Wait until an agent has stored all that it pulled."""
        await until(lambda: self._idle(agent), f"{agent} has stored all that it pulled")

    async def _idle(self, agent: str) -> bool:
        async with httpx.AsyncClient(trust_env=False) as client:
            pulls: list[object] = (await client.get(f"http://127.0.0.1:{self.admins[agent]}/status")).json()["pulls"]
        return not pulls

    async def expect_nothing(self, agent: str, authorization: str) -> None:
        """Ask a mirror for everything, by every name; not a byte of the content may come."""
        digests = (self.manifest, digest_of(LAYER), digest_of(b"{}"))
        targets = ["manifests/v1", *(f"{kind}/{digest}" for kind in ("manifests", "blobs") for digest in digests)]
        for target in (*targets, "tags/list", f"referrers/{self.manifest}"):
            for method in ("GET", "HEAD"):
                answer = await self.ask(agent, target, authorization, method, Range="bytes=0-99")
                assert answer.status_code in (401, 404), (target, answer.status_code)
                assert LAYER[:64] not in answer.content
                assert answer.headers.get("docker-content-digest") is None
        async with httpx.AsyncClient(trust_env=False) as client:
            base = f"http://127.0.0.1:{self.mirrors[agent]}/v2"
            for target in (f"reg.lab/{REPOSITORY}/blobs/{digests[1]}", f"other/app/blobs/{digests[1]}?ns=reg.lab"):
                answer = await client.get(f"{base}/{target}", headers={"Authorization": authorization})
                assert answer.status_code in (401, 404)
            assert (await client.get(f"{base}/_p2pdist/pulls/{digests[1]}")).status_code == 404

    async def expect_no_secret(self) -> None:
        """Search for every planted secret, and what it was sent as, in all that the agents left or said."""
        secrets = [*self.secrets, *(user[1] for user in (ALICE, MALLORY))]
        secrets += [base64.b64encode(":".join(user).encode()).decode() for user in (ALICE, MALLORY)]
        places = {f"tape {number}": bytes(tape.data) for number, tape in enumerate(self.tapes)}
        for file in self.path.rglob("*"):
            if file.is_file() and "registry" not in file.relative_to(self.path).parts[0]:
                places[str(file)] = file.read_bytes()
        async with httpx.AsyncClient(trust_env=False) as client:
            for agent, port in self.admins.items():
                for target in ("metrics", "status", "readyz"):
                    places[f"{agent}/{target}"] = (await client.get(f"http://127.0.0.1:{port}/{target}")).content
        assert any(name.endswith("-agent.log") for name in places)
        assert sum(len(tape.data) for tape in self.tapes) > 1000, "the proxies saw nothing"
        for name, content in places.items():
            for secret in secrets:
                assert secret.encode() not in content, f"a secret is in {name}"


@asynccontextmanager
async def scene_of(path: Path, docker_registry: str, auth: str, **rules: str) -> AsyncIterator[Scene]:
    """Start everything; `rules` are the access rules of each agent, by its name."""
    scene = Scene(path, auth)
    async with AsyncExitStack() as stack:
        port = free_port()
        scene.registry = f"http://127.0.0.1:{port}"
        if auth == "htpasswd":
            users = "".join(f"{user[0]}:{hashed}\n" for user, hashed in HTPASSWD.items())
            (path / "registry.htpasswd").write_text(users)
            how = f"htpasswd: {{realm: lab, path: {path / 'registry.htpasswd'}}}"
            shown = basic(ALICE)
        else:
            scene.tokens = await stack.enter_async_context(
                TokenService(path, {ALICE: "team/", MALLORY: "mallory/"}).running()
            )
            realm = f"http://127.0.0.1:{scene.tokens.port}/token"
            bundle = scene.tokens.bundle
            how = f"token: {{realm: '{realm}', service: registry, issuer: tokens, rootcertbundle: {bundle}}}"
            shown = f"Bearer {scene.tokens.token(basic(ALICE), f'repository:{REPOSITORY}:pull,push')}"
        (path / "registry.yml").write_text(
            f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {path / 'registry'}}}}}\n"
            f"http: {{addr: '127.0.0.1:{port}'}}\nauth: {{{how}}}\n"
        )
        command = [docker_registry, "serve", str(path / "registry.yml")]
        await stack.enter_async_context(program(command, path / "registry.log", port))
        scene.manifest = await push(scene.registry, REPOSITORY, LAYER, shown)
        at = free_port()
        command = [sys.executable, "-m", "p2pdist", "scheduler", "--listen", f"127.0.0.1:{at}"]
        command += ["--api-listen", f"127.0.0.1:{free_port()}", "--data-dir", str(path / "scheduler")]
        await stack.enter_async_context(program(command, path / "scheduler.log", at))
        for name, rule in rules.items():
            await start_agent(scene, stack, name, rule, at)
        yield scene


async def start_agent(scene: Scene, stack: AsyncExitStack, name: str, rule: str, scheduler: int) -> None:
    """Start an agent that others reach, and that reaches the scheduler, through recording proxies."""
    ports = mirror, peer, admin = free_port(), free_port(), free_port()
    to_peer = await stack.enter_async_context(Tape(peer).running())
    to_scheduler = await stack.enter_async_context(Tape(scheduler).running())
    scene.tapes += [to_peer, to_scheduler]
    scene.mirrors[name], scene.peers[name], scene.admins[name] = ports
    config = scene.path / f"{name}.toml"
    config.write_text(
        f'mirror_listen = "127.0.0.1:{mirror}"\npeer_listen = "127.0.0.1:{peer}"\nadmin_listen = "127.0.0.1:{admin}"\n'
        f'advertise = "127.0.0.1:{to_peer.port}"\nscheduler = ["127.0.0.1:{to_scheduler.port}"]\nmdns = false\n'
        f'data_dir = "{scene.path / name}"\nstore_min_free = 0\nlog_level = "debug"\nlog_format = "json"\n'
        f'[registries."reg.lab"]\nurl = "{scene.registry}"\n{rule}\n'
    )
    command = [sys.executable, "-m", "p2pdist", "agent", "--config", str(config)]
    await stack.enter_async_context(program(command, scene.path / f"{name}-agent.log", mirror))


PASSTHROUGH = '[[access]]\nregistry = "reg.lab"\nmode = "passthrough"'


@pytest.mark.parametrize("auth", ["htpasswd", "token"])
async def test_a_tenant_without_rights_who_knows_every_digest_gets_nothing(
    require: Callable[[str, str], str], tmp_path: Path, auth: str
) -> None:
    registry = require("docker-registry", "docker-registry")
    async with scene_of(tmp_path, registry, auth, first=PASSTHROUGH, second=PASSTHROUGH, plain="") as scene:
        await scene.pull("first", ALICE)
        await scene.settled("first")
        digests = [scene.manifest, digest_of(LAYER), digest_of(b"{}")]
        wrong = basic((MALLORY[0], "guessed"))
        if scene.tokens is not None:
            wrong = f"Bearer {scene.tokens.token(basic(MALLORY), f'repository:{REPOSITORY}:pull')}"
            scene.secrets.append(wrong.partition(" ")[2])
        for agent in ("first", "second", "plain"):
            await scene.expect_nothing(agent, wrong)
            await scene.expect_nothing(agent, "")
        for agent in ("first", "second"):
            chunks, everything = await demand(scene.peers[agent], digests, 3.0)
            assert not chunks
            assert LAYER[:64] not in everything
        await scene.pull("second", ALICE)
        await scene.pull("first", ALICE)
        said = (tmp_path / "plain-agent.log").read_text()
        assert "Traceback" not in said
        await scene.expect_no_secret()


async def test_what_the_node_reads_with_its_credentials_stays_on_the_node(
    require: Callable[[str, str], str], tmp_path: Path
) -> None:
    registry = require("docker-registry", "docker-registry")
    secret = tmp_path / "registry-secret"
    secret.mkdir()
    auths = {"auths": {"reg.lab/team": {"username": ALICE[0], "password": ALICE[1]}}}
    (secret / ".dockerconfigjson").write_text(json.dumps(auths))
    rule = f'[[access]]\nregistry = "reg.lab"\nmode = "node-credentials"\ncredentials = "{secret}"'
    async with scene_of(tmp_path, registry, "htpasswd", node=rule, plain="") as scene:
        assert (await scene.ask("node", "manifests/v1")).status_code == 200
        assert (await scene.ask("node", f"blobs/{digest_of(LAYER)}")).content == LAYER
        await scene.settled("node")
        chunks, _ = await demand(scene.peers["node"], [scene.manifest, digest_of(LAYER)], 3.0)
        assert not chunks
        await scene.expect_nothing("plain", "")
        refused = await scene.ask("plain", "manifests/v1")
        assert "[[access]]" in refused.text
        await scene.expect_no_secret()
