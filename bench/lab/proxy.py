# SPDX-License-Identifier: Apache-2.0
"""One caching nginx in front of the registry: what many sites have today, tuned for a crowd.

Blobs are cached in slices, each fetched once under a lock: the crowd follows the first reader at a slice's distance,
where a cache of whole blobs would make it wait for each blob to its end. Connections to the registry are kept.
Manifests are cached by what they are asked for. Nothing is limited: its own link is what it has.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bench.lab import ready
from bench.lab.errors import LabError

if TYPE_CHECKING:
    from pathlib import Path

    from bench.lab.hosts import Host
    from bench.lab.processes import Process, ProcessGroup
    from bench.lab.registry import Registry

PORT = 5000
MISSING = "nginx not found; install with: apt-get install nginx-light"
_READY_TIMEOUT_S = 15.0

# One process, no master, and root where we are root: a user namespace has no other user to give files or workers to.
# The slice is nginx's usual one. `cached` is so large that nothing is ever evicted, which only the master would do.
_CONFIG = """\
daemon off; master_process off; {user} pid {root}/nginx.pid; error_log stderr warn; worker_rlimit_nofile 4096;
events {{ worker_connections 2048; }}
http {{
  access_log off; sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 100000; server_tokens off;
  client_body_temp_path {root}/temp; proxy_temp_path {root}/temp; fastcgi_temp_path {root}/temp;
  uwsgi_temp_path {root}/temp; scgi_temp_path {root}/temp;
  proxy_cache_path {root}/cached levels=1:2 keys_zone=images:16m max_size=1024g inactive=1d use_temp_path=off;
  upstream registry {{ server {registry}; keepalive 64; }}
  server {{
    listen {address}:{port} backlog=1024 reuseport;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host {registry};
    proxy_cache images;
    proxy_cache_lock on; proxy_cache_lock_timeout 1h; proxy_cache_lock_age 1h;
    proxy_cache_valid 200 206 1h;
    proxy_buffers 16 64k; proxy_buffer_size 64k; proxy_busy_buffers_size 128k;
    location ~ "/blobs/sha256:" {{
      slice 1m;
      proxy_set_header Range $slice_range;
      proxy_cache_key $uri$slice_range;
      proxy_pass http://registry;
    }}
    location / {{
      proxy_cache_key $request_method$uri$http_accept;
      proxy_cache_convert_head off;
      proxy_pass http://registry;
    }}
  }}
}}
"""


def find_nginx() -> str | None:
    """Return the program nginx, also where an ordinary user's PATH does not lead to it."""
    return shutil.which("nginx", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


async def start_proxy(group: ProcessGroup, host: Host, registry: Registry, root: Path) -> Process:
    """Start a caching proxy on a host, with an empty cache below `root`, and wait until it accepts connections.

    Raises:
        LabError: there is no nginx, or it does not come up.
    """
    program = find_nginx()
    if program is None:
        raise LabError(MISSING)
    (root / "temp").mkdir(parents=True)
    config = root / "nginx.conf"
    upstream = urlsplit(registry.base_url).netloc
    user = "user root root;" if os.geteuid() == 0 else ""
    config.write_text(_CONFIG.format(root=root, registry=upstream, address=host.address, port=PORT, user=user))
    process = group.start(host, "proxy", [program, "-c", str(config), "-p", str(root)])
    await ready.accepting(host, PORT, process, _READY_TIMEOUT_S)
    return process


def base_url(host: Host) -> str:
    """Return what nodes pull from."""
    return f"http://{host.address}:{PORT}"
