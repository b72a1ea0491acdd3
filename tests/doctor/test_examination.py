# SPDX-License-Identifier: Apache-2.0
"""The doctor finds each planted fault by its name, on an agent in this process, and none on a node that is well."""

from __future__ import annotations

import random
import shutil
import socket
import ssl
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import trio
import trustme

from p2pdist import __version__
from p2pdist.agent import Agent
from p2pdist.config import Address, AgentConfig, RegistryConfig
from p2pdist.core.access import AccessRule
from p2pdist.core.identity import Revocations
from p2pdist.core.oci import parse_image_reference
from p2pdist.core.types import PeerId
from p2pdist.core.wire import PeerAddress
from p2pdist.doctor.examination import examine
from p2pdist.doctor.node import Node
from p2pdist.doctor.report import Check, Result
from p2pdist.errors import PeerUnavailable
from p2pdist.identity.credentials import Identity
from p2pdist.setup.installer import Installer
from p2pdist.setup.plan import Places, View, Wanted
from p2pdist.setup.tree import Tree
from tests.fake_registry import FakeRegistry, Fault
from tests.identities import FixedKeeper, credential, make_authority
from tests.nodes import FakeOrigin, eventually, running_scheduler
from tests.nodes import Node as Neighbour
from tests.nodes import running as running_neighbours
from tests.setup.conftest import HOSTS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

ANY_PORT = Address("127.0.0.1", 0)
IMAGE = parse_image_reference("reg.test/lab/image:v1")
LAYER = random.Random(5).randbytes(1000)


def closed_port() -> int:
    """Return a port at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def nobody(_cluster: str) -> list[PeerAddress]:
    return []


@dataclass
class Patient:
    """A node: an agent, or none, and the files of its runtimes."""

    config: AgentConfig
    root: Path
    agent: Agent | None = None
    browse: Callable[[str], Awaitable[Sequence[PeerAddress]]] = nobody
    checks: list[Check] = field(default_factory=list)

    async def examine(self, config: AgentConfig | None = None) -> Patient:
        at = self.agent.admin_at if self.agent else Address("127.0.0.1", closed_port())
        node = Node(f"http://{at}", config or self.config)
        self.checks = await examine(node, View(Tree(self.root)), Places(), canary=IMAGE, browse=self.browse)
        return self

    def set_up(self, *, mirror: str = "") -> None:
        assert self.agent is not None
        wanted = Wanted(
            mirror=mirror or f"http://{self.agent.mirror_at}", registries=("reg.test",), all_registries=True
        )
        installer = Installer(Tree(self.root), Places())
        installer.carry_out(installer.install(["containerd"], wanted))

    def found(self, *results: Result) -> set[str]:
        """Return the names of the checks that ended so."""
        return {check.name for check in self.checks if check.result in (results or (Result.WARN, Result.FAIL))}

    def one(self, name: str) -> Check:
        (check,) = [check for check in self.checks if check.name == name]
        return check


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry().running() as registry:
        registry.add_image("lab/image", "v1", [LAYER])
        yield registry


@asynccontextmanager
async def patient(tmp_path: Path, registry: FakeRegistry | RegistryConfig, **settings: Any) -> AsyncIterator[Patient]:  # noqa: ANN401
    """A node with an agent that is well, and containerd configured by setup."""
    origin = registry if isinstance(registry, RegistryConfig) else RegistryConfig(registry.url)
    config = AgentConfig(
        mirror_listen=ANY_PORT,
        peer_listen=ANY_PORT,
        admin_listen=ANY_PORT,
        mdns=False,
        data_dir=tmp_path / "data",
        registries={"reg.test": origin},
        store_min_free=0,
    )
    root = tmp_path / "root"
    shutil.copytree(HOSTS / "debian-containerd-1.6", root)
    agent = Agent(replace(config, **settings))
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.run)
        node = Patient(agent.config, root, agent)
        node.set_up()
        yield node
        nursery.cancel_scope.cancel()


async def test_a_node_that_is_well_has_no_fault(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        await node.examine()
        assert node.found(Result.FAIL) == set()
        assert node.found() == {"peers"}, "it is alone, and nothing else is to look at"
        assert node.one("canary").what == f"{IMAGE}: manifest and config came through the agent"
        assert node.one("runtime").what == "asks the agent first, and falls back to the registries"


# --------------------------------------------------------------- the agent and its host


async def test_an_agent_that_is_down(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        node.agent = None
        await node.examine()
    assert "agent" in node.found(Result.FAIL)
    assert "connection refused" in node.one("agent").what
    assert "origin-api" in node.found(Result.OK), "what needs no agent is still looked at"


async def test_another_server_on_the_admin_port(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        checks = await examine(
            Node(registry.url, node.config), View(Tree(node.root)), Places(), canary=None, browse=nobody
        )
    (check,) = [check for check in checks if check.name == "agent"]
    assert check.result is Result.FAIL
    assert "is not an agent's admin port" in check.what


async def test_a_mirror_that_hangs_up(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        assert node.agent is not None
        node.agent.mirror_at = Address("127.0.0.1", closed_port())
        await node.examine()
        assert {"mirror", "canary"} <= node.found(Result.FAIL)


async def test_an_agent_of_another_version_than_is_installed(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        told = b'{"peer_id": "x", "version": "0.0.9"}'
        registry.script("GET /status", Fault(status=200, body=told))
        checks = await examine(
            Node(registry.url, node.config), View(Tree(node.root)), Places(), canary=None, browse=nobody
        )
    (check,) = [check for check in checks if check.name == "version"]
    assert check.result is Result.WARN
    assert check.what == f"the agent runs 0.0.9, installed is {__version__}"


async def test_too_few_open_files(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        await node.examine(replace(node.config, max_connections=65536))
        assert "open-files" in node.found(Result.WARN)


async def test_a_disk_without_room(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        await node.examine(replace(node.config, store_min_free=1 << 60))
        assert node.found(Result.FAIL) == {"disk-space"}
        free = shutil.disk_usage(tmp_path).free
        await node.examine(replace(node.config, store_min_free=int(free / 1.5)))
        assert node.found(Result.WARN) == {"disk-space", "peers"}


async def test_a_data_directory_that_is_gone_or_no_directory(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        (tmp_path / "data").rename(tmp_path / "elsewhere")
        await node.examine()
        assert node.one("data-dir").what.endswith("data does not exist")
        (tmp_path / "data").write_text("")
        await node.examine()
        assert "data-dir" in node.found(Result.FAIL)
        assert node.one("data-dir").what.endswith("data is not a directory")
        (tmp_path / "data").unlink()
        (tmp_path / "elsewhere").rename(tmp_path / "data")


async def test_a_data_directory_that_the_agent_may_not_write_to(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        told = f'{{"peer_id": "x", "data_dir": "{tmp_path}", "data_dir_writable": false}}'
        registry.script("GET /status", Fault(status=200, body=told.encode()))
        checks = await examine(
            Node(registry.url, node.config), View(Tree(node.root)), Places(), canary=None, browse=nobody
        )
    (check,) = [check for check in checks if check.name == "data-dir"]
    assert check.result is Result.FAIL
    assert "cannot be written to" in check.what


# ------------------------------------------------------------------------- runtimes


async def test_a_runtime_that_was_never_set_up(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        installer = Installer(Tree(node.root), Places())
        installer.carry_out(installer.remove(["containerd"]))
        await node.examine()
        assert node.found(Result.FAIL) == {"runtime", "canary"}
        assert "does not ask the agent: asks https://reg.test" in node.one("runtime").what
        assert "config_path is not set" in node.one("runtime").what
        assert "p2pdist setup --runtime containerd" in node.one("runtime").todo


async def test_a_wrong_port_in_hosts_toml(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        node.set_up(mirror="http://127.0.0.1:5999")
        await node.examine()
        assert node.found(Result.FAIL) == {"runtime", "canary"}
        assert "asks http://127.0.0.1:5999, but the mirror is http://127.0.0.1:" in node.one("runtime").what


async def test_a_directory_that_leads_a_registry_past_the_agent(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        (node.root / "etc/containerd/certs.d/reg.test").mkdir()
        await node.examine()
        assert node.found(Result.FAIL) == {"runtime", "canary"}
        assert "goes to https://reg.test, past the agent" in node.one("canary").what


async def test_a_mirror_that_answers_but_is_not_the_agents(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        assert node.agent is not None
        node.agent.mirror_at = Address("127.0.0.1", registry.port)
        node.set_up()
        await node.examine()
        assert node.found(Result.FAIL) == {"canary"}
        assert "but the agent did not send it" in node.one("canary").what


async def test_a_configuration_that_cannot_be_read(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        (node.root / "etc/containerd/config.toml").write_text("x = [")
        await node.examine()
        assert "not valid TOML" in node.one("runtime").what
        assert {"runtime", "canary"} <= node.found(Result.FAIL)


async def test_a_canary_that_the_origin_does_not_have(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        registry.manifests.clear()
        await node.examine()
        assert node.found(Result.FAIL) == {"canary"}
        assert f"{IMAGE} did not come from http://127.0.0.1:" in node.one("canary").what


# ------------------------------------------------------------------------ the swarm


async def test_multicast_that_is_blocked(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        assert node.agent is not None
        node.agent.mdns_state = "on"
        await node.examine()
        assert node.found(Result.FAIL) == {"mdns"}
        assert "UDP port 5353" in node.one("mdns").todo


async def test_multicast_that_is_heard_and_nobody_there(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        agent = node.agent
        assert agent is not None
        agent.mdns_state = "on"

        async def hears_itself(cluster: str) -> list[PeerAddress]:
            assert cluster == "default"
            return [PeerAddress(agent.peer_id, "127.0.0.1", 1)]

        node.browse = hears_itself
        await node.examine()
        assert node.found() == {"peers"}
        assert "multicast" in node.one("peers").todo


async def test_agents_that_are_heard_and_cannot_be_dialled(tmp_path: Path, registry: FakeRegistry) -> None:
    port = closed_port()

    async def hears_another(_cluster: str) -> list[PeerAddress]:
        return [PeerAddress(PeerId("e" * 32), "127.0.0.1", port)]

    async with patient(tmp_path, registry) as node:
        assert node.agent is not None
        node.agent.mdns_state, node.browse = "on", hears_another
        await node.examine()
        assert node.found(Result.FAIL) == {"peers"}
        assert f"127.0.0.1:{port}: connection refused" in node.one("peers").what
        assert f"TCP port {port}" in node.one("peers").todo


async def test_a_host_without_multicast(tmp_path: Path, registry: FakeRegistry) -> None:
    async def cannot(_cluster: str) -> NoReturn:
        raise PeerUnavailable("mDNS is off: no such device")

    async with patient(tmp_path, registry) as node:
        assert node.agent is not None
        node.agent.mdns_state, node.browse = "on", cannot
        await node.examine()
        assert node.one("mdns").what == "mDNS is off: no such device"
        node.agent.mdns_state = "mDNS is off: this host has no address but loopback"
        await node.examine()
        assert node.found(Result.FAIL) == {"mdns"}


async def test_a_scheduler_that_cannot_be_reached(tmp_path: Path, registry: FakeRegistry) -> None:
    port = closed_port()
    async with patient(tmp_path, registry, scheduler=(Address("127.0.0.1", port),)) as node:
        await node.examine()
        assert node.found(Result.FAIL) == {"scheduler"}
        assert f"127.0.0.1:{port}: connection refused" in node.one("scheduler").what


async def test_one_of_two_schedulers_that_cannot_be_reached(tmp_path: Path, registry: FakeRegistry) -> None:
    gone = closed_port()
    async with running_scheduler(cluster="default") as (_, (host, port), _scope):
        two = (Address(host, port), Address("127.0.0.1", gone))
        async with patient(tmp_path, registry, scheduler=two) as node:
            agent = node.agent
            assert agent is not None
            await eventually(lambda: agent.tracker is not None and bool(agent.tracker.connected))
            await node.examine()
            assert node.found(Result.FAIL) == set()
            assert node.found(Result.WARN) >= {"scheduler"}
            assert f"1 of 2 not used (127.0.0.1:{gone}: connection refused)" in node.one("scheduler").what


async def test_a_peer_of_another_version(tmp_path: Path, registry: FakeRegistry) -> None:
    class Older(Neighbour):
        def hello(self) -> Any:  # noqa: ANN401 - a Hello
            return replace(super().hello(), cluster="default", software="0.0.8")

    older = Older(7, FakeOrigin())
    async with patient(tmp_path, registry) as node, running_neighbours(older):
        agent = node.agent
        assert agent is not None
        agent.neighbourhood.learn(older.address, "test")
        await eventually(lambda: bool(agent.exchange.links))
        await node.examine()
        assert node.found() == {"peer-versions"}
        assert node.one("peer-versions").what == f"this agent runs {__version__}, of its peers 1 run 0.0.8"
        assert node.one("peers").what == "connected to 1"
    older.store.close()


@pytest.mark.parametrize(
    ("starts", "trouble", "revoked", "result", "says"),
    [
        (0, "", False, Result.OK, "agent/"),
        (0, "scheduler a:5060 cannot be asked", False, Result.WARN, "cannot be asked"),
        (-3000, "", False, Result.WARN, "less than a third"),
        (-7200, "", False, Result.FAIL, "was good until"),
        (0, "", True, Result.FAIL, "is revoked"),
    ],
    ids=["well", "not renewed", "ends soon", "expired", "revoked"],
)
async def test_an_identity_that_needs_a_look(
    tmp_path: Path, registry: FakeRegistry, starts: float, trouble: str, revoked: bool, result: Result, says: str
) -> None:
    shown = credential(make_authority(tmp_path / "ca"), f"{1:032x}", starts=starts, lasts=3600)
    keeper = FixedKeeper(
        Identity(shown, Revocations(shown.name.cluster, 1, frozenset({shown.name.path} if revoked else ())))
    )
    keeper.trouble = trouble
    async with patient(tmp_path, registry) as node:
        assert node.agent is not None
        node.agent.keeper = keeper
        check = (await node.examine()).one("identity")
    assert (check.result, bool(check.todo)) == (result, result != Result.OK)
    assert says in check.what


async def test_private_content_that_is_shared_without_an_identity(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        assert (await node.examine()).one("identity").result == Result.OK
    rule = AccessRule(registry="reg.test", repository="x", mode="passthrough", share=True)
    async with patient(tmp_path / "sharing", registry, access=(rule,)) as node:
        check = (await node.examine()).one("identity")
    assert (check.result, "private content" in check.what) == (Result.WARN, True)


# ---------------------------------------------------------------------- the registries


async def test_a_name_that_does_not_resolve(tmp_path: Path) -> None:
    class NoNames(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: Any, port: Any, *_more: Any, **_named: Any) -> NoReturn:  # noqa: ANN401
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        async def getnameinfo(self, sockaddr: Any, flags: int) -> NoReturn:  # noqa: ANN401
            raise NotImplementedError

    async with patient(tmp_path, RegistryConfig("http://reg.invalid")) as node:
        trio.socket.set_custom_hostname_resolver(NoNames())
        await node.examine()
        assert node.found(Result.FAIL) == {"origin-dns", "canary"}
        assert node.one("origin-dns").what == "reg.test: name or service not known"
        assert node.one("origin-dns").about == "reg.test"
        assert node.found(Result.SKIP) == {"origin-connect", "origin-tls", "origin-api", "origin-auth", "clock"}


async def test_a_port_that_is_closed(tmp_path: Path) -> None:
    async with patient(tmp_path, RegistryConfig(f"http://127.0.0.1:{closed_port()}")) as node:
        await node.examine()
        assert node.found(Result.FAIL) == {"origin-connect", "canary"}
        assert node.one("origin-connect").what == "reg.test: connection refused"


async def test_a_certificate_that_is_not_trusted(tmp_path: Path) -> None:
    ca, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    async with FakeRegistry(tls=context).running() as registry:
        registry.add_image("lab/image", "v1", [LAYER])
        async with patient(tmp_path, registry) as node:
            await node.examine()
            assert node.found(Result.FAIL) == {"origin-tls", "canary"}
            assert "certificate is not trusted" in node.one("origin-tls").what
            assert "ca_file" in node.one("origin-tls").todo


async def test_a_certificate_that_the_ca_file_vouches_for(tmp_path: Path) -> None:
    ca, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    async with FakeRegistry(tls=context).running() as registry:
        registry.add_image("lab/image", "v1", [LAYER])
        async with patient(tmp_path, RegistryConfig(registry.url, tmp_path / "ca.pem")) as node:
            await node.examine()
            assert node.found(Result.FAIL) == set()


async def test_a_server_that_is_no_registry(tmp_path: Path, registry: FakeRegistry) -> None:
    async with patient(tmp_path, registry) as node:
        registry.script("GET /v2/", Fault(status=404))
        await node.examine()
        assert "origin-api" in node.found(Result.FAIL)
        assert node.one("origin-api").what == "reg.test: answers 404 to /v2/"


async def test_a_token_service_that_does_not_answer(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.auth, registry.realm = "bearer", f"http://127.0.0.1:{closed_port()}/token"
    async with patient(tmp_path, registry) as node:
        await node.examine()
        assert {"origin-auth"} <= node.found(Result.FAIL)
        assert "its token service" in node.one("origin-auth").what
        assert "origin-api" in node.found(Result.OK)


@pytest.mark.parametrize(
    ("minutes", "result"), [(0, Result.OK), (-2, Result.WARN), (10, Result.FAIL), (-600, Result.FAIL)]
)
async def test_a_clock_that_is_wrong(tmp_path: Path, registry: FakeRegistry, minutes: int, result: Result) -> None:
    told = format_datetime(datetime.now(UTC) + timedelta(minutes=minutes), usegmt=True)
    registry.every = Fault(headers=(("Date", told),))
    async with patient(tmp_path, registry) as node:
        await node.examine()
        assert node.one("clock").result is result


async def test_a_built_in_registry_that_nobody_needs_is_no_fault(tmp_path: Path, registry: FakeRegistry) -> None:
    class OnlyLoopback(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: Any, port: Any, *more: Any, **named: Any) -> Any:  # noqa: ANN401
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

        async def getnameinfo(self, sockaddr: Any, flags: int) -> NoReturn:  # noqa: ANN401
            raise NotImplementedError

    settings = {"reg.test": RegistryConfig(registry.url), "quay.io": RegistryConfig("https://quay.io")}
    async with patient(tmp_path, registry, registries=settings) as node:
        trio.socket.set_custom_hostname_resolver(OnlyLoopback())
        await node.examine()
        assert node.found(Result.WARN) >= {"origin-dns"}
        assert node.found(Result.FAIL) == set()
