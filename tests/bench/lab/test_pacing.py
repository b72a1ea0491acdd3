# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from bench.lab.errors import LabError
from bench.lab.pacing import pace_connections

SO_MAX_PACING_RATE = 47


def test_a_server_limits_the_connections_that_it_accepts_from_then_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as other:
        unlimited = other.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE)
        pace_connections(os.getpid(), 625_000)
        with socket.create_connection(server.getsockname()), server.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE) == 625_000
        assert other.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE) == unlimited, "it does not listen"


def test_a_program_that_does_not_listen_is_refused() -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        with pytest.raises(LabError, match="it does not listen"):
            pace_connections(process.pid, 625_000)
        process.communicate()
