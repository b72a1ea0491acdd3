# SPDX-License-Identifier: Apache-2.0
"""What the parts of `p2pdist bench node` are measured on: a registry, an agent and nginx on loopback, and one client.

Every server gives the same blobs to the same client (node_client.py), in turn. Agent and nginx have one core and the
client another: left alone, the kernel puts a server on its client's core at one time and not at the next, and the same
nginx gives 1.5 or 3.9 GB/s. The registry, which must also feed the agent, runs where it likes.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from bench.lab import meters, proxy, ready
from bench.lab.agents import REGISTRY_NAME, start_agent
from bench.lab.hosts import loopback_lab
from bench.lab.processes import ProcessGroup
from bench.lab.registry import PORT as REGISTRY_PORT
from bench.lab.registry import find_docker_registry, start_registry
from bench.node_client import Load, run_client
from bench.node_figures import NGINX, P2PDIST, REGISTRY, Figure
from bench.systems import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from bench.lab.agents import Agent
    from bench.lab.hosts import Host
    from bench.lab.images import Image
    from bench.lab.processes import Process
    from bench.lab.workspace import Workspace
    from bench.node_client import Seen

MIRROR_PORT, PEER_PORT, NGINX_PORT = 5050, 5051, 5070
_CPUS = sorted(os.sched_getaffinity(0))
SERVER_CPU, CLIENT_CPU = _CPUS[0], _CPUS[-1]
_SETTLE_S = 2.0
_READY_TIMEOUT_S = 15.0
COPIES = 3
"""Of the content in the workspace: the image, the registry's, the agent's."""

# As a good administrator has it for large static files on a fast link: kernel sendfile in large parts, full segments,
# no log, connections kept, descriptors cached. One worker, as the agent is one process.
_NGINX = """\
daemon off; worker_processes 1; pid {root}/nginx.pid; error_log stderr warn; worker_rlimit_nofile 8192;
events {{ worker_connections 4096; multi_accept on; }}
http {{
  access_log off; sendfile on; sendfile_max_chunk 4m; tcp_nopush on; tcp_nodelay on;
  keepalive_timeout 60s; keepalive_requests 1000000; server_tokens off;
  open_file_cache max=8192 inactive=60s; open_file_cache_valid 60s;
  client_body_temp_path {root}; proxy_temp_path {root}; fastcgi_temp_path {root};
  uwsgi_temp_path {root}; scgi_temp_path {root};
  server {{ listen {address}:{port} backlog=1024; root {files}; }}
}}
"""


@dataclass(frozen=True, slots=True)
class Server:
    """What serves blobs: a process, where it listens, and what a blob is called there, {hex} being its SHA-256."""

    system: str
    process: Process
    address: str
    port: int
    target: str

    def ask(self, digests: Sequence[str], ranges: Sequence[str] = ("",)) -> list[tuple[str, str]]:
        """Return the requests for each range of each blob."""
        targets = [self.target.format(hex=digest.removeprefix("sha256:")) for digest in digests]
        return [(target, span) for target in targets for span in ranges]

    async def serve(self, requests: Sequence[tuple[str, str]], *, connections: int = 1, check: bool = False) -> Seen:
        """Let the client ask. Raises ClientError."""
        load = Load(host=self.address, port=self.port, requests=requests, connections=connections)
        return await run_client(replace(load, check=check, cpu=CLIENT_CPU))

    async def measure(self, part: str, requests: Sequence[tuple[str, str]], *, connections: int = 1) -> Figure:
        """Let the client ask, and return what that came to. Raises ClientError."""
        machine, before_s = meters.machine_cpu(), self.cpu_s()
        seen = await self.serve(requests, connections=connections)
        return Figure(
            part=part,
            system=self.system,
            seconds=seen.seconds,
            payload_bytes=seen.payload_bytes,
            cpu_s=self.cpu_s() - before_s,
            rss_mib_max=self.process.peak_rss_mib(),
            ttfb_s=seen.ttfb_s,
            requests=len(requests),
            idle_cpu_ratio=meters.machine_cpu().idle_ratio_since(machine),
        )

    def pin(self) -> None:
        """Keep all threads of the process, and of its children, on the servers' core."""
        for pid in (self.process.pid, *self._children()):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), [SERVER_CPU])

    def cpu_s(self) -> float:
        """Return the CPU time of the process and its children (nginx's worker)."""
        return self.process.cpu_s() + sum(meters.process_cpu_s(pid) for pid in self._children())

    def _children(self) -> list[int]:
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in task.read_text().split()]


@dataclass(frozen=True, slots=True)
class NodeStage:
    """A registry, and an agent with nothing in its store."""

    space: Workspace
    group: ProcessGroup
    agent: Agent
    mirror: Server
    origin: Server
    nginx: Server | None
    idle_rss_mib: float
    """The agent's, before its first request."""

    @property
    def servers(self) -> list[Server]:
        """What serves blobs: the agent, nginx where it is installed, the registry."""
        return [server for server in (self.mirror, self.nginx, self.origin) if server]


@asynccontextmanager
async def open_stage(images: Sequence[Image], space: Workspace) -> AsyncIterator[NodeStage]:
    """Give a stage with these images in the registry. Raises LabError."""
    with loopback_lab(["registry", "node"]) as lab, ProcessGroup(space.logs) as group:
        node = lab["node"]
        program = await trio.to_thread.run_sync(find_docker_registry, space)
        registry = await start_registry(group, lab["registry"], space, program=program)
        files = space.directory("files")
        for image in images:
            await trio.to_thread.run_sync(registry.push, image, REPOSITORY)
            for blob in image.blobs():
                (files / blob.digest.removeprefix("sha256:")).hardlink_to(image.blob_path(blob))
        agent = start_agent(group, node, space.directory("data"), registry.base_url, ["--no-mdns"])
        await agent.wait_ready()
        await trio.sleep(_SETTLE_S)
        blob_target = f"/v2/{REPOSITORY}/blobs/sha256:{{hex}}"
        mirror = Server(P2PDIST, agent.process, node.local_address, MIRROR_PORT, f"{blob_target}?ns={REGISTRY_NAME}")
        nginx = await _start_nginx(group, node, space, files)
        for server in (mirror, nginx):
            if server is not None:
                server.pin()
        yield NodeStage(
            space=space,
            group=group,
            agent=agent,
            mirror=mirror,
            origin=Server(REGISTRY, registry.process, lab["registry"].address, REGISTRY_PORT, blob_target),
            nginx=nginx,
            idle_rss_mib=agent.process.peak_rss_mib(),
        )


async def _start_nginx(group: ProcessGroup, host: Host, space: Workspace, files: Path) -> Server | None:
    """Start an nginx over a directory of files named by their SHA-256; None where it is not installed."""
    program = proxy.find_nginx()
    if program is None:
        return None
    root = space.directory("nginx")
    config = root / "nginx.conf"
    config.write_text(_NGINX.format(root=root, files=files, address=host.address, port=NGINX_PORT))
    process = group.start(host, "nginx", [program, "-c", str(config), "-p", str(root)])
    await ready.accepting(host, NGINX_PORT, process, _READY_TIMEOUT_S)
    return Server(NGINX, process, host.address, NGINX_PORT, "/{hex}")
