# SPDX-License-Identifier: Apache-2.0
"""A BitTorrent peer that does what a lab tells it: libtorrent with settings for a crowd on a fast, trusted network.

`python -m bench.lab.torrent_peer --listen HOST:PORT --control HOST:PORT`. Each connection to the control port carries
one order, a line of JSON, and gets one line back. Knows only the peers it is told of: no tracker, DHT, local discovery
or port mapping. Trusts whoever reaches the control port: it belongs into a lab.
"""

from __future__ import annotations

import argparse
import json
import socketserver
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import libtorrent as lt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PIECE_BYTES = 256 << 10
"""As small as is usual: a piece can be given on only once it is whole."""

_ANSWER_MAX_S = 30.0
_ENCRYPTION_OFF = 2

# What makes a difference in a crowd of dozens on links of 10 to 1000 Mbit/s; all else is libtorrent's default.
TUNED: Mapping[str, Any] = {
    # Nobody but the peers that are named.
    **dict.fromkeys(("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp"), False),
    # TCP without encryption: uTP yields to other traffic and costs more CPU.
    **dict.fromkeys(("enable_incoming_utp", "enable_outgoing_utp"), False),
    **dict.fromkeys(("in_enc_policy", "out_enc_policy"), _ENCRYPTION_OFF),
    # All meet at once, and whoever was not ready is tried again soon.
    "smooth_connects": False,
    "connection_speed": 500,
    "torrent_connect_boost": 100,
    "min_reconnect_time": 1,
    "listen_queue_size": 128,
    "allow_multiple_connections_per_ip": True,
    # Rounds of choking as short as the transfer is; slots for a third of the neighbours or so.
    "unchoke_slots_limit": 8,
    "unchoke_interval": 2,
    "optimistic_unchoke_interval": 4,
    # Three seconds of requests in flight, the default, let peers sit on what others could give sooner.
    "request_queue_time": 1,
    "send_buffer_watermark": 256 << 10,
    # Files are in memory: more threads only contend.
    "aio_threads": 1,
    "hashing_threads": 1,
}


@dataclass(slots=True)
class _Torrent:
    handle: lt.torrent_handle
    finished: threading.Event = field(default_factory=threading.Event)
    flushed: threading.Event = field(default_factory=threading.Event)
    error: str | None = None


class _Peer:
    """The session and its torrents; orders come from many threads, libtorrent's session is safe for that."""

    def __init__(self, listen: str) -> None:
        address = listen.rpartition(":")[0]
        told = {"listen_interfaces": listen, "outgoing_interfaces": address}
        categories = lt.alert_category.status | lt.alert_category.error | lt.alert_category.storage
        self._session = lt.session({**TUNED, **told, "alert_mask": categories})
        self._torrents: list[_Torrent] = []

    def seed(self, *, directory: str, files: Mapping[str, int], torrent: str, super_seeding: bool) -> dict[str, Any]:
        """Make a torrent of files below `directory`, write it to `torrent`, and seed it."""
        root = Path(directory)
        entries = [lt.create_file_entry(f"{root.name}/{name}", size) for name, size in files.items()]
        # Pieces that no two files share: whoever has a layer need not fetch a part of it again.
        made = lt.create_torrent(entries, PIECE_BYTES, lt.create_torrent.v1_only | lt.create_torrent.canonical_files)
        made.set_priv(True)
        lt.set_piece_hashes(made, str(root.parent))
        Path(torrent).write_bytes(lt.bencode(made.generate()))
        flags = lt.torrent_flags.seed_mode | (lt.torrent_flags.super_seeding if super_seeding else 0)
        self._add(torrent, str(root.parent), flags)
        return {}

    def leech(
        self, *, torrent: str, directory: str, held: Sequence[str], peers: Sequence[Sequence[Any]]
    ) -> dict[str, Any]:
        """Fetch a torrent into `directory`, without the files `held`, from and with `peers`."""
        handle = self._add(torrent, directory, 0, held).handle
        for address, port in peers:
            handle.connect_peer((address, port))
        return {}

    def status(self, *, wait_s: float) -> dict[str, Any]:
        """Tell how it goes with the latest torrent, as soon as it is finished or after `wait_s`."""
        latest = self._torrents[-1]
        finished = latest.finished.wait(min(wait_s, _ANSWER_MAX_S))
        return {
            "done_bytes": latest.handle.status().total_wanted_done,
            "finished": finished,
            "error": latest.error,
        }

    def counters(self) -> dict[str, int]:
        """Tell what went over the wire for all torrents so far."""
        seen = [torrent.handle.status() for torrent in self._torrents]
        return {
            "uploaded_bytes": sum(each.total_payload_upload for each in seen),
            "downloaded_bytes": sum(each.total_payload_download for each in seen),
            "wasted_bytes": sum(each.total_redundant_bytes + each.total_failed_bytes for each in seen),
            "control_bytes": sum(each.total_upload - each.total_payload_upload for each in seen),
        }

    def flush(self) -> dict[str, Any]:
        """Have all of the latest torrent on disk."""
        latest = self._torrents[-1]
        latest.flushed.clear()
        latest.handle.flush_cache()
        return {"flushed": latest.flushed.wait(_ANSWER_MAX_S)}

    def watch(self) -> None:
        """Hear what libtorrent tells, for ever."""
        while True:
            self._session.wait_for_alert(1000)
            for alert in self._session.pop_alerts():
                if isinstance(alert, lt.torrent_alert):
                    self._note(alert)

    def _add(self, torrent: str, directory: str, flags: int, held: Sequence[str] = ()) -> _Torrent:
        parameters = lt.load_torrent_file(torrent)
        parameters.save_path = directory
        parameters.flags = flags
        files = parameters.ti.files()
        paths = [files.file_path(index) for index in range(files.num_files())]
        parameters.file_priorities = [0 if Path(path).name in held else 4 for path in paths]
        added = _Torrent(self._session.add_torrent(parameters))
        self._torrents.append(added)
        if added.handle.status().is_finished:
            added.finished.set()
        return added

    def _note(self, alert: lt.torrent_alert) -> None:
        for torrent in self._torrents:
            if torrent.handle != alert.handle:
                continue
            if isinstance(alert, lt.torrent_finished_alert):
                torrent.finished.set()
            elif isinstance(alert, lt.cache_flushed_alert):
                torrent.flushed.set()
            elif isinstance(alert, lt.torrent_error_alert | lt.file_error_alert):
                torrent.error = alert.message()
                torrent.finished.set()


class _Control(socketserver.StreamRequestHandler):
    orders: ClassVar[Mapping[str, Callable[..., dict[str, Any]]]]

    def handle(self) -> None:
        order = json.loads(self.rfile.readline())
        answer = self.orders[order.pop("order")](**order)
        self.wfile.write(json.dumps(answer).encode() + b"\n")


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until killed."""
    parser = argparse.ArgumentParser(description="a BitTorrent peer for labs")
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    parser.add_argument("--control", required=True, metavar="HOST:PORT")
    options = parser.parse_args(arguments)
    peer = _Peer(options.listen)
    orders = (peer.seed, peer.leech, peer.status, peer.counters, peer.flush)
    _Control.orders = {order.__name__: order for order in orders}
    address, _, port = options.control.rpartition(":")
    with _Server((address, int(port)), _Control) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        peer.watch()


if __name__ == "__main__":
    main()
