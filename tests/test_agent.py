# SPDX-License-Identifier: Apache-2.0
"""One whole agent in this process: how it comes up, what it shows, how it stops, and what outlives it."""

from __future__ import annotations

import random
import signal
import socket
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio

from p2pdist.agent import Agent
from p2pdist.config import Address, AgentConfig, RegistryConfig
from p2pdist.core.access import AccessRule
from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.core.types import Repository
from p2pdist.core.wire import PeerAddress
from p2pdist.errors import ConfigError, StoreError
from tests.fake_registry import FakeRegistry, Fault, digest_of
from tests.http_client import Client
from tests.nodes import eventually, no_descriptor_left

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from trio.testing import MockClock

ANY_PORT = Address("127.0.0.1", 0)
LAYER = random.Random(13).randbytes(6 * MIN_CHUNK_BYTES)
IMAGE = "/v2/reg.test/lab/image"


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry().running() as registry:
        registry.add_image("lab/image", "v1", [LAYER])
        yield registry


def config_of(data_dir: Path, registry: FakeRegistry | None = None, **settings: Any) -> AgentConfig:  # noqa: ANN401
    url = registry.url if registry is not None else "http://127.0.0.1:1"
    config = AgentConfig(
        mirror_listen=ANY_PORT,
        peer_listen=ANY_PORT,
        admin_listen=ANY_PORT,
        mdns=False,
        data_dir=data_dir,
        registries={"reg.test": RegistryConfig(url)},
        store_min_free=0,
    )
    return replace(config, **settings)


@asynccontextmanager
async def running(config: AgentConfig) -> AsyncIterator[Agent]:
    """Run an agent; it is cancelled in the end, as when its process is ended in a hurry."""
    agent = Agent(config)
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.run)
        yield agent
        nursery.cancel_scope.cancel()


async def get(address: Address, target: str) -> Any:  # noqa: ANN401
    client = await Client.connect(address.port)
    try:
        return await client.get(target)
    finally:
        await client.stream.aclose()


# ------------------------------------------------------------------- coming up


async def test_an_agent_serves_the_mirror_and_shows_its_state(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(config_of(tmp_path, registry)) as agent:
        assert (await get(agent.mirror_at, "/v2/")).status == 200
        manifest = await get(agent.mirror_at, f"{IMAGE}/manifests/v1")
        assert manifest.body == registry.manifests["lab/image", "v1"][1]
        blob = await get(agent.mirror_at, f"{IMAGE}/blobs/{digest_of(LAYER)}")
        assert blob.body == LAYER
        await eventually(lambda: not agent.puller.arrivals and agent.images.pulled == 1)
        ready = await get(agent.admin_at, "/readyz")
        assert (ready.status, ready.json["ready"]) == (200, True)
        assert ready.json["parts"] == {
            "mirror": "ok",
            "store": "ok",
            "scheduler": "not configured",
            "mdns": "off",
            "identity": "off: nobody is authenticated, and only what anybody may read is shared",
            "peers": 0,
        }
        status = (await get(agent.admin_at, "/status")).json
        assert status["mirror"] == str(agent.mirror_at)
        assert (status["peers"], status["pulls"], status["images_pulled"]) == ([], [], 1)
        assert status["bytes"]["from_origin"] == len(LAYER) + 2
        assert status["bytes"]["to_runtime"] >= len(LAYER) + len(manifest.body)
        assert status["store"]["blobs"] == 3
        metrics = (await get(agent.admin_at, "/metrics")).body.decode()
        assert "p2pdist_images_pulled_total 1.0" in metrics


async def test_the_status_holds_all_that_it_promises(tmp_path: Path, registry: FakeRegistry) -> None:
    config = config_of(tmp_path, registry, scheduler=(Address("127.0.0.1", 1),), site="s", rack="r", cluster="c")
    registry.script(f"GET /v2/lab/image/blobs/{digest_of(LAYER)}", Fault(stall_after=0))
    async with running(config) as agent, running(config_of(tmp_path / "other", cluster="c")) as other:
        await get(agent.mirror_at, f"{IMAGE}/manifests/v1")
        other.neighbourhood.learn(address_of(agent), "mdns")
        await eventually(lambda: bool(agent.exchange.links and other.exchange.links))
        await eventually(lambda: (arrival := agent.puller.arrivals.get(digest_of(LAYER))) and arrival.chunks)
        status = (await get(agent.admin_at, "/status")).json
        assert set(status) == {
            *("version", "peer_id", "uptime_s", "cluster", "site", "rack", "mirror", "mdns", "peers", "scheduler"),
            *("banned", "identity", "store", "pulls", "bytes", "images_pulled", "access", "control_bytes"),
            *("data_dir", "data_dir_writable", "registries", "tasks"),
        }
        (scheduler,) = status["scheduler"].pop("each")
        assert scheduler["address"] == "127.0.0.1:1"
        assert scheduler["state"] == "lost"
        assert status["scheduler"] == {"configured": ["127.0.0.1:1"], "connected": False, "address": None}
        assert status["banned"] == []
        (peer,) = status["peers"]
        assert peer["peer_id"] == other.peer_id
        assert peer["source"] == "inbound"
        (pull,) = [pull for pull in status["pulls"] if pull["digest"] == digest_of(LAYER)]
        assert pull["image"] == "reg.test/lab/image"
        assert 0 <= pull["have_bytes"] <= pull["size_bytes"] == len(LAYER)


def address_of(agent: Agent) -> PeerAddress:
    return PeerAddress(agent.peer_id, "127.0.0.1", agent.peers_at.port)


async def test_a_second_agent_on_the_directory_refuses_and_the_first_goes_on(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with running(config_of(tmp_path, registry)) as agent:
        with pytest.raises(StoreError, match=str(tmp_path)):
            Agent(config_of(tmp_path, registry))
        assert (await get(agent.mirror_at, f"{IMAGE}/manifests/v1")).status == 200


@pytest.mark.parametrize("which", ["mirror_listen", "peer_listen", "admin_listen"])
async def test_a_port_in_use_is_named_and_nothing_stays_open(tmp_path: Path, which: str) -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    taken = Address("127.0.0.1", listener.socket.getsockname()[1])
    async with listener:
        with no_descriptor_left(), pytest.raises(ConfigError, match=f"{taken}.*choose another"):
            await Agent(config_of(tmp_path, **{which: taken})).run()
        async with running(config_of(tmp_path)) as agent:
            assert (await get(agent.mirror_at, "/v2/")).status == 200


def test_a_data_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data_dir: .*choose another directory"):
        Agent(config_of(tmp_path / "file" / "below"))


@pytest.mark.parametrize(
    ("settings", "host", "port"),
    [
        pytest.param({}, "127.0.0.1", None, id="one address"),
        pytest.param({"peer_listen": Address("0.0.0.0", 0)}, "", None, id="all addresses"),
        pytest.param({"advertise": "node7.lan:7000"}, "node7.lan", 7000, id="host and port"),
        pytest.param({"advertise": "node7.lan"}, "node7.lan", None, id="host"),
        pytest.param({"advertise": "[fd00::7]"}, "fd00::7", None, id="IPv6"),
        pytest.param({"advertise": "fd00::7"}, "fd00::7", None, id="IPv6 without brackets"),
    ],
)
async def test_what_others_should_dial(tmp_path: Path, settings: dict[str, Any], host: str, port: int | None) -> None:
    async with running(config_of(tmp_path, **settings)) as agent:
        hello = agent._hello()
        assert (hello.host, hello.port) == (host, port or agent.peers_at.port)


# ---------------------------------------------------------------------- sharing


async def test_two_agents_share_what_one_has(tmp_path: Path, registry: FakeRegistry, quick_clock: MockClock) -> None:
    async with (
        running(config_of(tmp_path / "a", registry)) as first,
        running(config_of(tmp_path / "b", registry)) as second,
    ):
        digest = (await get(first.mirror_at, f"{IMAGE}/manifests/v1")).headers["docker-content-digest"]
        await eventually(lambda: first.images.pulled == 1)
        second.neighbourhood.learn(address_of(first), "mdns")
        await eventually(lambda: bool(second.exchange.links))
        await trio.sleep(1)
        requests = len(registry.requests)
        assert (await get(second.mirror_at, f"{IMAGE}/manifests/{digest}")).status == 200
        assert (await get(second.mirror_at, f"{IMAGE}/blobs/{digest_of(LAYER)}")).body == LAYER
        # All that the origin sees is whether anybody may have it.
        assert [request.method for request in registry.requests[requests:]] == ["HEAD"]
        assert second.status()["bytes"]["from_peers"] >= len(LAYER)


async def test_with_credentials_only_what_was_read_without_them_is_shared(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    rule = AccessRule(mode="node-credentials", credentials=tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{}")
    repository = Repository("reg.test", "lab/image")
    async with running(config_of(tmp_path / "a", registry, access=(rule,))) as agent:
        assert not agent.gate.may_share(repository)
        await get(agent.mirror_at, f"{IMAGE}/manifests/v1")
        assert agent.gate.may_share(repository)
    shared = replace(rule, share=True)
    async with running(config_of(tmp_path / "b", registry, access=(shared,))) as agent:
        assert agent.gate.may_share(repository)
    async with running(config_of(tmp_path / "c", registry)) as agent:
        assert agent.gate.may_share(repository)


async def test_an_evicted_blob_is_offered_no_more(
    tmp_path: Path, registry: FakeRegistry, quick_clock: MockClock
) -> None:
    other = registry.add_blob(LAYER[::-1])
    config = config_of(tmp_path, registry, store_max=len(LAYER) + 100_000)
    async with running(config) as agent:
        first = digest_of(LAYER)
        await get(agent.mirror_at, f"{IMAGE}/blobs/{first}")
        await eventually(lambda: agent.store.contains(first) and not agent.puller.arrivals)
        assert first in agent.machine.blobs
        await get(agent.mirror_at, f"{IMAGE}/blobs/{other}")
        await eventually(lambda: first not in agent.machine.blobs)
        assert not agent.store.contains(first)
        agent._forget_evicted(other)
        assert other in agent.machine.blobs


# --------------------------------------------------------------------- settings


@asynccontextmanager
async def reloading(config: AgentConfig) -> AsyncIterator[tuple[Agent, Callable[[AgentConfig], Awaitable[None]]]]:
    """Run an agent; the function that comes with it has it reload, by the signal, what is then its file."""
    file = [config]
    agent = Agent(config, lambda: file[0])

    async def reload(asked: AgentConfig) -> None:
        file[0] = asked
        before = agent.settings.reloads
        signal.raise_signal(signal.SIGHUP)
        await eventually(lambda: agent.settings.reloads > before or agent.settings.failed is not None)

    async with trio.open_nursery() as nursery:
        await nursery.start(agent.run)
        yield agent, reload
        nursery.cancel_scope.cancel()


async def test_a_reload_adds_and_takes_away_registries(tmp_path: Path, registry: FakeRegistry) -> None:
    config = config_of(tmp_path, registry)
    async with reloading(config) as (agent, reload):
        other = IMAGE.replace("reg.test", "new.test")
        assert (await get(agent.mirror_at, f"{other}/manifests/v1")).status == 404
        await reload(replace(config, registries={"new.test": RegistryConfig(registry.url)}))
        assert (await get(agent.mirror_at, f"{other}/manifests/v1")).status == 200
        assert (await get(agent.mirror_at, f"{IMAGE}/manifests/v1")).status == 404


async def test_a_reload_spares_the_pulls_that_run(tmp_path: Path, registry: FakeRegistry) -> None:
    config = config_of(tmp_path, registry)
    async with reloading(config) as (agent, reload):
        await get(agent.mirror_at, f"{IMAGE}/manifests/v1")
        client = await Client.connect(agent.mirror_at.port)
        await client.send(f"GET {IMAGE}/blobs/{digest_of(LAYER)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer, reading = await client.start()
        await reload(replace(config, registries={**config.registries, "new.test": RegistryConfig("http://x")}))
        assert (answer.status, await client.rest(reading)) == (200, LAYER)
        await client.stream.aclose()


async def test_a_reload_takes_limits_in_and_leaves_what_needs_a_restart(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    async with reloading(config) as (agent, reload):
        limits = {"download_limit": 20_000_000, "origin_limit": 30_000_000}
        asked = replace(
            config, upload_slots=2, downloads=3, store_max=1 << 30, prefetch=False, cluster="other", **limits
        )
        await reload(asked)
        assert agent.config == replace(asked, cluster="default")
        settings = agent.machine.state.settings
        assert (settings.upload_slots, settings.downloads, agent.images.prefetch) == (2, 3, False)
        assert settings.download_bytes_per_s == 20_000_000
        assert agent.status()["store"]["max_bytes"] == 1 << 30  # type: ignore[index]
        metrics = (await get(agent.admin_at, "/metrics")).body.decode()
        assert "p2pdist_config_reloads_total 1.0" in metrics
        assert "p2pdist_config_reload_failed 0.0" in metrics


async def test_a_reload_limits_the_links_that_are_there(tmp_path: Path) -> None:
    config = config_of(tmp_path / "a")
    # The agent that began last hears the signals of this process.
    async with running(config_of(tmp_path / "b")) as other, reloading(config) as (agent, reload):
        other.neighbourhood.learn(address_of(agent), "mdns")
        await eventually(lambda: bool(agent.exchange.links))
        (link,) = agent.exchange.links.values()
        await reload(replace(config, upload_limit=4_000_000))
        assert link.limit is not None
        assert link.limit.bytes_per_s == 4_000_000
        assert agent.machine.state.settings.upload_slots < config.upload_slots
        await reload(config)
        assert link.limit is None
        assert agent.machine.state.settings.upload_slots == config.upload_slots


async def test_a_ca_file_that_is_gone_leaves_the_old_settings(tmp_path: Path, registry: FakeRegistry) -> None:
    config = config_of(tmp_path, registry)
    async with reloading(config) as (agent, reload):
        await reload(replace(config, registries={"x.test": RegistryConfig("https://x", tmp_path / "gone.pem")}))
        assert agent.config is config
        assert "gone.pem" in str(agent.settings.failed)
        assert (await get(agent.mirror_at, f"{IMAGE}/manifests/v1")).status == 200
        assert "p2pdist_config_reload_failed 1.0" in (await get(agent.admin_at, "/metrics")).body.decode()


async def test_the_service_manager_hears_of_each_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        config = config_of(tmp_path / "data", shutdown_grace_s=2.0)
        async with reloading(config) as (_agent, reload):
            await reload(config)
            signal.raise_signal(signal.SIGTERM)
            heard = await hear(listener, "STOPPING=1")
    assert [message for message in heard if not message.startswith("WATCHDOG")] == [
        "READY=1",
        "RELOADING=1",
        "READY=1",
        "STOPPING=1",
    ]
    assert "WATCHDOG=1" in heard


async def hear(listener: socket.socket, last: str) -> list[str]:
    """Return the first field of each message up to `last`."""
    heard: list[str] = []
    while last not in heard:
        await trio.lowlevel.wait_readable(listener)
        heard.append(listener.recv(4096).decode().split("\n")[0])
    return heard


# --------------------------------------------------------------------- stopping


async def test_a_signal_lets_a_running_response_end(tmp_path: Path, registry: FakeRegistry) -> None:
    agent = Agent(config_of(tmp_path, registry))
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.run)
        idle = await Client.connect(agent.mirror_at.port)
        assert (await idle.get("/v2/")).status == 200
        await get(agent.mirror_at, f"{IMAGE}/blobs/{digest_of(LAYER)}")
        busy = await Client.connect(agent.mirror_at.port)
        large = registry.add_blob(random.Random(14).randbytes(24 << 20))
        await busy.send(f"GET {IMAGE}/blobs/{large} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer, reading = await busy.start()
        signal.raise_signal(signal.SIGTERM)
        assert await idle.ends() == b""
        with pytest.raises(OSError, match="attempts to connect"):
            await Client.connect(agent.mirror_at.port)
        body = await busy.rest(reading)
        assert (answer.status, digest_of(body)) == (200, large)
        await idle.stream.aclose()
        await busy.stream.aclose()
    Agent(config_of(tmp_path, registry)).store.close()


async def test_a_response_that_does_not_end_is_cut_after_the_grace(
    tmp_path: Path, registry: FakeRegistry, quick_clock: MockClock
) -> None:
    registry.every = Fault(stall_after=100_000)
    agent = Agent(config_of(tmp_path, registry, shutdown_grace_s=5.0))
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.run)
        client = await Client.connect(agent.mirror_at.port)
        await client.send(f"GET {IMAGE}/blobs/{digest_of(LAYER)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await eventually(lambda: bool(agent.puller.arrivals))
        signal.raise_signal(signal.SIGTERM)
        began = trio.current_time()
        await client.ends()
        await client.stream.aclose()
    assert trio.current_time() - began <= 15


async def test_an_agent_that_is_stopped_leaves_nothing_open(
    tmp_path: Path, registry: FakeRegistry, quick_clock: MockClock
) -> None:
    await trio.to_thread.run_sync(lambda: None)
    with no_descriptor_left():
        registry.script("GET /v2/lab/image/blobs/", Fault(stall_after=1000))
        async with running(config_of(tmp_path, registry)) as agent:
            await get(agent.mirror_at, f"{IMAGE}/manifests/v1")
            await eventually(lambda: bool(agent.puller.arrivals))
        await registry.wait_connections(0)


# ---------------------------------------------------------------- what outlives it


async def test_the_identity_survives_a_restart(tmp_path: Path) -> None:
    async with running(config_of(tmp_path)) as agent:
        first = agent.peer_id
    async with running(config_of(tmp_path)) as agent:
        assert agent.peer_id == first
    (tmp_path / "peer_id").write_text("nonsense\n")
    async with running(config_of(tmp_path)) as agent:
        drawn = agent.peer_id
    assert drawn != first
    async with running(config_of(tmp_path)) as agent:
        assert agent.peer_id == drawn


async def test_a_restart_goes_on_where_the_last_run_stopped(
    tmp_path: Path, registry: FakeRegistry, quick_clock: MockClock
) -> None:
    large = random.Random(15).randbytes(16 * MIN_CHUNK_BYTES)
    digest = registry.add_blob(large)
    registry.script(f"GET /v2/lab/image/blobs/{digest}", *[Fault()] * 6, *[Fault(stall_after=0)] * 20)
    async with running(config_of(tmp_path, registry)) as agent, trio.open_nursery() as nursery:
        nursery.start_soon(get, agent.mirror_at, f"{IMAGE}/blobs/{digest}")
        await registry.wait_stalled()
        await eventually(lambda: agent.machine.counters.from_origin >= 4 * MIN_CHUNK_BYTES)
        nursery.cancel_scope.cancel()
    here = agent.machine.counters.from_origin
    registry._scripts.clear()
    async with running(config_of(tmp_path, registry)) as agent:
        assert (await get(agent.mirror_at, f"{IMAGE}/blobs/{digest}")).body == large
        assert agent.machine.counters.from_origin == len(large) - here


# --------------------------------------------------------------------- limits


async def test_limits_hold_between_agents_and_not_for_runtimes(
    tmp_path: Path, registry: FakeRegistry, quick_clock: MockClock
) -> None:
    digest, rate = digest_of(LAYER), 1_000_000
    ann = config_of(tmp_path / "ann", registry, upload_limit=rate)
    async with running(ann) as giver, running(config_of(tmp_path / "bob", registry)) as taker:
        await get(giver.mirror_at, f"{IMAGE}/blobs/{digest}")
        taker.neighbourhood.learn(address_of(giver), "mdns")
        await eventually(lambda: bool(giver.exchange.links and taker.exchange.links))
        began = trio.current_time()
        assert (await get(taker.mirror_at, f"{IMAGE}/blobs/{digest}")).body == LAYER
        from_peers = taker.machine.counters.from_peers
        assert from_peers > rate / 2
        # Nothing else may take any time: the clock's rounding decides.
        assert trio.current_time() - began >= (from_peers - 0.1 * rate) / rate - 1e-6
