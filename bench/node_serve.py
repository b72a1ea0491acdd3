# SPDX-License-Identifier: Apache-2.0
"""One agent without peers, on loopback: what it costs to pull a blob cold, to serve it warm, whole and in ranges.

nginx and the registry serve the same blob to the same client in the same run, in turn. Every server first gives the
blob to a client that compares its SHA-256.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from bench.lab import meters, proxy, ready
from bench.lab.agents import REGISTRY_NAME, start_agent
from bench.lab.hosts import loopback_lab
from bench.lab.images import make_random_image
from bench.lab.processes import ProcessGroup
from bench.lab.registry import PORT as REGISTRY_PORT
from bench.lab.registry import find_docker_registry, start_registry
from bench.lab.workspace import workspace
from bench.node_client import Load, run_client
from bench.node_figures import NGINX, P2PDIST, REGISTRY, Figure
from bench.systems import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.lab.hosts import Host
    from bench.lab.processes import Process
    from bench.lab.workspace import Workspace

MIRROR_PORT = 5050
NGINX_PORT = 5070
RANGE_BYTES = 1 << 20
RANGE_READERS = 64
_SETTLE_S = 2.0
_READY_TIMEOUT_S = 15.0

# As a good administrator has it for large static files on a fast link: one worker as the agent is one process, kernel
# sendfile in large parts, full segments, no log, connections kept, descriptors cached.
_NGINX = """\
daemon off; worker_processes 1; pid {root}/nginx.pid; error_log stderr warn; worker_rlimit_nofile 8192;
events {{ worker_connections 4096; multi_accept on; }}
http {{
  access_log off; sendfile on; sendfile_max_chunk 4m; tcp_nopush on; tcp_nodelay on;
  keepalive_timeout 60s; keepalive_requests 1000000; server_tokens off; etag off;
  open_file_cache max=8192 inactive=60s; open_file_cache_valid 60s;
  client_body_temp_path {root}; proxy_temp_path {root}; fastcgi_temp_path {root};
  uwsgi_temp_path {root}; scgi_temp_path {root};
  server {{ listen {address}:{port} backlog=1024 {sndbuf}; root {files}; }}
}}
"""


@dataclass(frozen=True, slots=True)
class Server:
    """What serves blobs: a process, where it listens, and what a blob is called there."""

    system: str
    process: Process
    host: Host
    port: int
    target: str
    """With {hex} where the digest's hex belongs."""

    def load(self, hexes: Sequence[str], ranges: Sequence[str] = ("",), *, connections: int, check: bool) -> Load:
        """Return the load that asks for each range of each blob."""
        requests = [(self.target.format(hex=name), span) for name in hexes for span in ranges]
        address = self.host.local_address if self.system == P2PDIST else self.host.address
        return Load(host=address, port=self.port, requests=requests, connections=connections, check=check)

    def cpu_s(self) -> float:
        """Return the CPU time of the process and its children (nginx's worker)."""
        listed = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return self.process.cpu_s() + sum(meters.process_cpu_s(int(pid)) for pid in listed.stdout.split())


async def start_nginx(
    group: ProcessGroup, host: Host, space: Workspace, files: Path, *, sndbuf: str = ""
) -> Server | None:
    """Start an nginx over a directory of files named by their SHA-256; None where there is none. Raises LabError."""
    program = proxy.find_nginx()
    if program is None:
        return None
    root = space.directory("nginx")
    config = root / "nginx.conf"
    config.write_text(_NGINX.format(root=root, files=files, address=host.address, port=NGINX_PORT, sndbuf=sndbuf))
    process = group.start(host, "nginx", [program, "-c", str(config), "-p", str(root)])
    await ready.accepting(host, NGINX_PORT, process, _READY_TIMEOUT_S)
    return Server(NGINX, process, host, NGINX_PORT, "/{hex}")


async def figure(part: str, server: Server, load: Load) -> Figure:
    """Run a load against a server and return what it came to. Raises ClientError."""
    machine, before_s = meters.machine_cpu(), server.cpu_s()
    seen = await run_client(load)
    return Figure(
        part=part,
        system=server.system,
        seconds=seen.seconds,
        payload_bytes=seen.payload_bytes,
        cpu_s=server.cpu_s() - before_s,
        rss_mib_max=server.process.peak_rss_mib(),
        ttfb_s=seen.ttfb_s,
        requests=len(load.requests),
        idle_cpu_ratio=meters.machine_cpu().idle_ratio_since(machine),
    )


async def measure_serving(blob_bytes: int, *, runs: int) -> list[Figure]:
    """Return figures of a blob: cold, warm, and in 1 MiB ranges to 64 readers at once.

    Raises:
        LabError: a server does not come up.
        ClientError: a server does not serve the blob.
    """
    with (
        workspace(4 * blob_bytes) as space,
        loopback_lab(["registry", "node"]) as lab,
        ProcessGroup(space.logs) as group,
    ):
        program = await trio.to_thread.run_sync(find_docker_registry, space)
        registry = await start_registry(group, lab["registry"], space, program=program)
        image = await make_random_image(space.path / "image", image_bytes=blob_bytes, layers=1, seed=1)
        registry.push(image, REPOSITORY)
        agent = start_agent(group, lab["node"], space.directory("data"), registry.base_url, ["--no-mdns"])
        await agent.wait_ready()
        await trio.sleep(_SETTLE_S)
        blob = f"/v2/{REPOSITORY}/blobs/sha256:{{hex}}"
        mirror = Server(P2PDIST, agent.process, lab["node"], MIRROR_PORT, f"{blob}?ns={REGISTRY_NAME}")
        origin = Server(REGISTRY, registry.process, lab["registry"], REGISTRY_PORT, blob)
        nginx = await start_nginx(group, lab["node"], space, image.blob_path(image.layers[0]).parent)
        name = image.layers[0].digest.removeprefix("sha256:")
        figures = [
            Figure(
                part="idle",
                system=P2PDIST,
                seconds=0,
                payload_bytes=0,
                cpu_s=0,
                rss_mib_max=agent.process.peak_rss_mib(),
            )
        ]
        for server in (origin, mirror):
            figures.append(await figure("cold", server, server.load([name], connections=1, check=False)))
        servers = [server for server in (mirror, nginx, origin) if server]
        for server in servers:
            await run_client(server.load([name], connections=1, check=True))
        size = image.layers[0].size_bytes
        spans = [f"bytes={start}-{min(start + RANGE_BYTES, size) - 1}" for start in range(0, size, RANGE_BYTES)]
        for _ in range(runs):
            for server in servers:
                figures.append(await figure("warm", server, server.load([name], connections=1, check=False)))
        for _ in range(runs):
            for server in servers:
                load = server.load([name], spans, connections=RANGE_READERS, check=False)
                figures.append(await figure("ranges", server, load))
        return figures
