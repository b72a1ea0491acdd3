# SPDX-License-Identifier: Apache-2.0
"""The origin of a lab: Debian's docker-registry, or the small read-only one beside this file where that is missing.

Both write one JSON line for each response, so that the bytes that left the registry are counted exactly, as payload:
what its bodies held, not what headers and retransmissions added.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bench.lab import debian, netns, pacing, ready
from bench.lab.errors import LabError
from bench.lab.images import REF_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from bench.lab.hosts import Host
    from bench.lab.images import Image
    from bench.lab.processes import Process, ProcessGroup
    from bench.lab.workspace import Workspace
    from p2pdist.core.types import Descriptor

PORT = 5000
_READY_TIMEOUT_S = 15.0
_VERSION_TIMEOUT_S = 10.0
_PUSH_TIMEOUT_S = 60.0
_PUSH_PART_BYTES = 1 << 20

_CONFIG = """\
version: 0.1
log: {{level: info, formatter: json, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {root}}}, cache: {{blobdescriptor: inmemory}}}}
http: {{addr: "{address}:{port}"}}
"""


class Registry:
    """A running registry; images are put into it with `push`."""

    def __init__(self, process: Process, host: Host, kind: str) -> None:
        self.process = process
        self.kind = kind
        self.base_url = f"http://{host.address}:{PORT}"
        self._host = host
        self._log_position = 0
        self._sent_bytes = 0

    def push(self, image: Image, repository: str) -> None:
        """Make an image available under a repository name and its tag. Blocking. Raises LabError."""
        raise AssertionError("a kind of registry says how")

    def pace_connections(self, bytes_per_s: float) -> None:
        """Limit what each connection that is accepted from now on gets. Raises LabError."""
        pacing.pace_connections(self.process.pid, bytes_per_s)

    def sent_bytes(self) -> int:
        """Return the payload bytes of all GETs answered so far; responses count when they end."""
        with self.process.log.open("rb") as log:
            log.seek(self._log_position)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._log_position += len(line)
                self._sent_bytes += _body_bytes(line)
        return self._sent_bytes

    async def wait_ready(self) -> None:
        """Wait until the registry accepts connections. Raises LabError."""
        await ready.accepting(self._host, PORT, self.process, _READY_TIMEOUT_S)


class DockerRegistry(Registry):
    """Debian's docker-registry on a directory of its own; images are pushed over HTTP on its own host."""

    def push(self, image: Image, repository: str) -> None:
        connection = _HostConnection(self._host)
        try:
            for blob in image.blobs():
                self._push_blob(connection, image.blob_path(blob), repository, blob)
            for manifest in image.manifests():
                reference = image.tag if manifest == image.root else manifest.digest
                body = image.blob_path(manifest).read_bytes()
                path = f"/v2/{repository}/manifests/{reference}"
                _expect(connection, "PUT", path, 201, body, {"Content-Type": manifest.media_type})
        except (OSError, http.client.HTTPException) as error:
            raise LabError(f"cannot push the image to docker-registry: {error}", log=self.process.tail()) from error
        finally:
            connection.close()

    @staticmethod
    def _push_blob(connection: _HostConnection, path: Path, repository: str, blob: Descriptor) -> None:
        session = _expect(connection, "POST", f"/v2/{repository}/blobs/uploads/", 202, b"", {})
        upload = urlsplit(session)
        target = f"{upload.path}?{upload.query}&digest={blob.digest}"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size_bytes)}
        with path.open("rb") as content:
            _expect(connection, "PUT", target, 201, content, headers)


class LayoutRegistry(Registry):
    """The read-only registry of `bench.lab.oci_registry`; an image is there as soon as its blobs are linked."""

    def __init__(self, process: Process, host: Host, root: Path) -> None:
        super().__init__(process, host, "p2pdist's own read-only registry")
        self._root = root

    def push(self, image: Image, repository: str) -> None:
        # The repository is one layout, into which every image pushed to it is linked.
        layout = self._root / repository
        blobs = layout / "blobs" / "sha256"
        blobs.mkdir(parents=True, exist_ok=True)
        index = layout / "index.json"
        earlier = json.loads(index.read_text())["manifests"] if index.exists() else []
        entries = json.loads((image.layout / "index.json").read_text())["manifests"]
        entries += [entry for entry in earlier if entry["annotations"][REF_NAME] != image.tag]
        for blob in (image.layout / "blobs" / "sha256").iterdir():
            (blobs / blob.name).unlink(missing_ok=True)
            (blobs / blob.name).symlink_to(blob)
        index.write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))


async def start_registry(group: ProcessGroup, host: Host, space: Workspace, *, program: str | None) -> Registry:
    """Start a registry on a host and wait until it answers.

    Args:
        program: docker-registry as `find_docker_registry` gives it; None for our own.

    Raises:
        LabError: it does not come up.
    """
    root = space.directory("registry")
    registry: Registry
    if program is None:
        listen = f"{host.address}:{PORT}"
        command = [sys.executable, "-m", "bench.lab.oci_registry", str(root), "--listen", listen]
        registry = LayoutRegistry(group.start(host, "registry", command), host, root)
    else:
        config = root / "config.yml"
        config.write_text(_CONFIG.format(root=root / "storage", address=host.address, port=PORT))
        process = group.start(host, "registry", [program, "serve", str(config)])
        registry = DockerRegistry(process, host, f"docker-registry {_version(program)}")
    await registry.wait_ready()
    return registry


def find_docker_registry(space: Workspace) -> str | None:
    """Return the program docker-registry: installed, or unpacked from its Debian package into the workspace, or None.

    A user namespace of our own has no network to fetch a package by. Blocking, bounded.
    """
    installed = shutil.which("docker-registry")
    if installed or netns.in_user_namespace():
        return installed
    unpacked = debian.unpack("docker-registry", space.directory("package"))
    return shutil.which("docker-registry", path=str(unpacked / "usr/bin")) if unpacked else None


def _version(program: str) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S)
    return said.stdout.split()[-1] if said.stdout.split() else ""


def _body_bytes(line: bytes) -> int:
    """Return what a line of the log says a GET's body held; 0 for all other lines."""
    if b'"http.response.written"' not in line:
        return 0
    entry = json.loads(line)
    return int(entry["http.response.written"]) if entry.get("http.request.method") == "GET" else 0


class _HostConnection(http.client.HTTPConnection):
    """http.client on a socket of one of the lab's hosts."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.address, PORT, timeout=_PUSH_TIMEOUT_S, blocksize=_PUSH_PART_BYTES)
        self._lab_host = host

    def connect(self) -> None:
        self.sock = self._lab_host.socket()
        self.sock.settimeout(_PUSH_TIMEOUT_S)
        self.sock.connect((self.host, self.port))


def _expect(
    connection: _HostConnection, method: str, target: str, status: int, body: object, headers: dict[str, str]
) -> str:
    """Make a request; return the Location of its answer, "" without one. Raises LabError on another status."""
    connection.request(method, target, body, headers)  # type: ignore[arg-type]  # bytes or an open file
    response = connection.getresponse()
    said = response.read()
    if response.status != status:
        raise LabError(f"registry: {method} {target} gave {response.status}: {said[:200].decode(errors='replace')}")
    return response.headers.get("Location", "")
