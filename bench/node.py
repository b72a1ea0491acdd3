# SPDX-License-Identifier: Apache-2.0
"""`p2pdist bench node`: one agent without peers, on loopback: what it costs to pull a blob cold and to serve it warm.

The client reads with recv into a large buffer and hashes nothing, in a process of its own, so that the
figures are the agent's. nginx, where it is installed, serves the same file in the same run.
"""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import trio
from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.lab.agents import REGISTRY_NAME, start_agent
from bench.lab.hosts import loopback_lab
from bench.lab.images import make_random_image
from bench.lab.processes import ProcessGroup
from bench.lab.registry import start_registry
from bench.lab.workspace import workspace

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from bench.lab.hosts import Host
    from bench.lab.processes import Process
    from bench.lab.workspace import Workspace

REPOSITORY = "bench/node"
TTFB_REQUESTS = 100
_SETTLE_S = 3.0
_READ_BYTES = 4 << 20
_NGINX = """daemon off; worker_processes 1; pid {root}/nginx.pid; error_log stderr;
events {{}}
http {{ access_log off; sendfile on; sendfile_max_chunk 0; client_body_temp_path {root}; proxy_temp_path {root};
fastcgi_temp_path {root}; uwsgi_temp_path {root}; scgi_temp_path {root};
server {{ listen {address}:5070; root {files}; }} }}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measurement. CPU is that of the serving process alone, per GiB of the blob."""

    what: str
    seconds: float
    bytes_per_s: float
    cpu_s_per_gib: float
    peak_rss_mib: float


def _fetch(address: tuple[str, int], target: str) -> tuple[float, int]:
    """GET `target` to its end; return seconds and bytes of the body. Blocking."""
    began = time.perf_counter()
    with socket.create_connection(address, timeout=600) as sock:
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {address[0]}\r\nConnection: close\r\n\r\n".encode())
        buffer = memoryview(bytearray(_READ_BYTES))
        head = b""
        while b"\r\n\r\n" not in head:
            head += sock.recv(1)
        if not head.startswith(b"HTTP/1.1 200"):
            raise ValueError(head.decode(errors="replace"))
        total = 0
        while count := sock.recv_into(buffer):
            total += count
    return time.perf_counter() - began, total


def _first_bytes(address: tuple[str, int], target: str, requests: int) -> list[float]:
    """Return, for each of so many requests on connections of their own, the time to the first body byte."""
    times = []
    for _ in range(requests):
        began = time.perf_counter()
        with socket.create_connection(address, timeout=10) as sock:
            ask = f"GET {target} HTTP/1.1\r\nHost: {address[0]}\r\nRange: bytes=0-65535\r\nConnection: close\r\n\r\n"
            sock.sendall(ask.encode())
            head = b""
            while b"\r\n\r\n" not in head or len(head) <= head.index(b"\r\n\r\n") + 4:
                head += sock.recv(65536)
            times.append(time.perf_counter() - began)
    return times


def client_main(kind: str, host: str, port: str, target: str) -> None:
    """Run as a process of its own: print the result as JSON."""
    address = (host, int(port))
    print(json.dumps(_fetch(address, target) if kind == "fetch" else _first_bytes(address, target, TTFB_REQUESTS)))


async def _client(kind: str, host: str, port: int, target: str) -> list[float]:
    command = [sys.executable, "-m", "bench.node", kind, host, str(port), target]
    done = await trio.run_process(command, capture_stdout=True)
    result: list[float] = json.loads(done.stdout)
    return result


async def measure(image_mib: int, runs: int, json_file: Path | None, console: Console) -> None:
    """Measure and print."""
    size = image_mib << 20
    with (
        workspace(4 * size) as space,
        loopback_lab(["registry", "node"]) as lab,
        ProcessGroup(space.logs) as group,
    ):
        image = await make_random_image(space.path / "image", image_bytes=size, layers=1, seed=1)
        registry = await start_registry(group, lab["registry"], space, program=None)
        registry.push(image, REPOSITORY)
        data = space.directory("data")
        agent = start_agent(group, lab["node"], data, registry.base_url, ["--no-mdns"])
        await agent.wait_ready()
        await trio.sleep(_SETTLE_S)
        rest_mib = agent.process.peak_rss_mib()
        layer = image.layers[0]
        target = f"/v2/{REPOSITORY}/blobs/{layer.digest}?ns={REGISTRY_NAME}"
        host = lab["node"].local_address
        await _client("ttfb", host, 5050, f"/v2/{REPOSITORY}/manifests/{image.manifest.digest}?ns={REGISTRY_NAME}")
        figures = [await _figure("agent, cold", agent.process, host, 5050, target)]
        figures += [
            await _figure(f"agent, warm {run}", agent.process, host, 5050, target) for run in range(1, runs + 1)
        ]
        times = sorted(await _client("ttfb", host, 5050, target))
        if nginx := _start_nginx(group, lab["node"], space, image.blob_path(layer).parent):
            await trio.sleep(_SETTLE_S)
            name = "/" + layer.digest.removeprefix("sha256:")
            figures += [await _figure(f"nginx {run}", nginx, host, 5070, name) for run in range(1, runs + 1)]
    _show(console, figures, rest_mib, times, image_mib)
    if json_file is not None:
        ttfb = {"ttfb_p50_s": statistics.median(times), "ttfb_p99_s": times[int(0.99 * len(times))]}
        result = {"figures": [asdict(figure) for figure in figures], "rest_rss_mib": rest_mib, **ttfb}
        await trio.Path(json_file).write_text(json.dumps(result))


def _start_nginx(group: ProcessGroup, host: Host, space: Workspace, files: Path) -> Process | None:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        return None
    root = space.directory("nginx")
    config = root / "nginx.conf"
    config.write_text(_NGINX.format(root=root, files=files, address=host.local_address))
    return group.start(host, "nginx", [program, "-c", str(config), "-p", str(root)])


def _cpu_s(process: Process) -> float:
    """Return the CPU time of a process and its children (nginx's worker)."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
    from bench.lab.meters import process_cpu_s

    return process.cpu_s() + sum(process_cpu_s(int(pid)) for pid in listed.split())


async def _figure(what: str, process: Process, host: str, port: int, target: str) -> Figure:
    before = _cpu_s(process)
    seconds, total = await _client("fetch", host, port, target)
    used = _cpu_s(process) - before
    return Figure(
        what=what,
        seconds=seconds,
        bytes_per_s=total / seconds,
        cpu_s_per_gib=used / (total / (1 << 30)),
        peak_rss_mib=process.peak_rss_mib(),
    )


def _show(console: Console, figures: list[Figure], rest_mib: float, times: list[float], image_mib: int) -> None:
    shown = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in (f"{image_mib} MiB blob", "seconds", "GB/s", "CPU-s/GiB", "peak RSS MiB"):
        shown.add_column(name, justify="left" if name.endswith("blob") else "right")
    for figure in figures:
        shown.add_row(
            figure.what,
            f"{figure.seconds:.2f}",
            f"{figure.bytes_per_s / 1e9:.2f}",
            f"{figure.cpu_s_per_gib:.2f}",
            f"{figure.peak_rss_mib:.0f}",
        )
    console.print(shown)
    middle, late = statistics.median(times) * 1000, times[int(0.99 * len(times))] * 1000
    console.print(f"agent at rest: {rest_mib:.0f} MiB; warm first byte: median {middle:.1f} ms, p99 {late:.1f} ms")


if __name__ == "__main__":
    client_main(*sys.argv[1:])
