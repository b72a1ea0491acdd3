# SPDX-License-Identifier: Apache-2.0
"""A small read-only registry over OCI layouts, for labs without docker-registry.

`python -m bench.lab.oci_registry ROOT --listen HOST:PORT` serves the layout in ROOT/<repository> under that name. Knows
GET and HEAD of `/v2/`, manifests and blobs, and single ranges; refuses everything else. Trusts its clients and
its files: it belongs into a lab, not on a network. Logs one JSON line for each response to standard output.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bench.lab.images import REF_NAME
from p2pdist.core.oci import ErrorCode, error_body

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROUTE = re.compile(r"/v2/(?P<name>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)/(?P<kind>manifests|blobs)/(?P<ref>[A-Za-z0-9._:-]+)")
_DIGEST = re.compile(r"sha256:(?P<hex>[0-9a-f]{64})")
_RANGE = re.compile(r"bytes=(?P<first>\d*)-(?P<last>\d*)")
_BLOB_TYPE = "application/octet-stream"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60
    root: ClassVar[Path]

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/v2/":
            return self._send(200, b"{}", "application/json")
        match = _ROUTE.fullmatch(path)
        if match is None:
            return self._refuse(404, ErrorCode.NAME_UNKNOWN, "no such route")
        layout = self.root / match["name"]
        if match["kind"] == "manifests":
            return self._manifest(layout, match["ref"])
        return self._blob(layout, match["ref"])

    def _manifest(self, layout: Path, reference: str) -> None:
        digest = reference if _DIGEST.fullmatch(reference) else _tagged(layout, reference)
        path = _blob_path(layout, digest)
        if path is None:
            return self._refuse(404, ErrorCode.MANIFEST_UNKNOWN, f"no manifest {reference}")
        body = path.read_bytes()
        self._send(200, body, json.loads(body)["mediaType"], {"Docker-Content-Digest": digest})

    def _blob(self, layout: Path, digest: str) -> None:
        path = _blob_path(layout, digest)
        if path is None:
            return self._refuse(404, ErrorCode.BLOB_UNKNOWN, f"no blob {digest}")
        size_bytes = path.stat().st_size
        span = _span(self.headers.get("Range", ""), size_bytes)
        if span is None:
            return self._send(416, b"", _BLOB_TYPE, {"Content-Range": f"bytes */{size_bytes}"})
        start, stop = span
        fields = {"Docker-Content-Digest": digest, "Accept-Ranges": "bytes"}
        if stop - start < size_bytes:
            fields["Content-Range"] = f"bytes {start}-{stop - 1}/{size_bytes}"
        self._head(206 if stop - start < size_bytes else 200, stop - start, _BLOB_TYPE, fields)
        self._stream(path, start, stop)

    def _stream(self, path: Path, start: int, stop: int) -> None:
        sent_bytes = 0
        if self.command == "GET" and start < stop:
            with path.open("rb") as content:
                content.seek(start)
                sent_bytes = self.connection.sendfile(content, start, stop - start)
        self._log(sent_bytes)

    def _refuse(self, status: int, code: ErrorCode, message: str) -> None:
        self._send(status, error_body(code, message), "application/json")

    def _send(self, status: int, body: bytes, media_type: str, fields: dict[str, str] | None = None) -> None:
        self._head(status, len(body), media_type, fields or {})
        if self.command == "GET":
            self.wfile.write(body)
        self._log(len(body) if self.command == "GET" else 0)

    def _head(self, status: int, length_bytes: int, media_type: str, fields: dict[str, str]) -> None:
        self._status = status
        self.send_response(status)
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(length_bytes))
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()

    def _log(self, written_bytes: int) -> None:
        entry = {
            "http.request.method": self.command,
            "http.request.uri": self.path,
            "http.response.status": self._status,
            "http.response.written": written_bytes,
        }
        sys.stdout.write(json.dumps(entry) + "\n")
        sys.stdout.flush()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class calls it so
        """Keep the base class from logging each request a second time."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def _blob_path(layout: Path, digest: str) -> Path | None:
    match = _DIGEST.fullmatch(digest)
    path = layout / "blobs" / "sha256" / match["hex"] if match else None
    return path if path and path.is_file() else None


def _tagged(layout: Path, tag: str) -> str:
    """Return the digest that a layout's index gives for a tag, "" for none."""
    try:
        index = json.loads((layout / "index.json").read_text())
    except OSError:
        return ""
    for entry in index["manifests"]:
        if entry.get("annotations", {}).get(REF_NAME) == tag:
            return str(entry["digest"])
    return ""


def _span(header: str, size_bytes: int) -> tuple[int, int] | None:
    """Return the half-open span that a Range header asks for: all for none or a malformed one, None for 416."""
    match = _RANGE.fullmatch(header)
    if match is None or not (match["first"] or match["last"]):
        return 0, size_bytes
    if not match["first"]:
        return max(0, size_bytes - int(match["last"])), size_bytes
    start, stop = int(match["first"]), size_bytes
    if match["last"]:
        stop = min(size_bytes, int(match["last"]) + 1)
    return (start, stop) if start < stop else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="a read-only registry over OCI layouts, for labs")
    parser.add_argument("root", type=Path)
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    options = parser.parse_args(arguments)
    _Handler.root = options.root
    address, _, port = options.listen.rpartition(":")
    with _Server((address, int(port)), _Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
