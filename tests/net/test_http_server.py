# SPDX-License-Identifier: Apache-2.0
"""The HTTP server over real loopback sockets: parsing, limits, bodies, hang-ups and an orderly stop."""

from __future__ import annotations

import os
import resource
import socket
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from p2pdist.errors import ConfigError, PullFailed
from p2pdist.net.http_messages import CLIENT_LEFT, Exchange, FileBody, Limits, Request, Response
from p2pdist.net.http_server import open_listeners
from tests.fakes import FakeBlob, FakeReader
from tests.http_client import Client, Incomplete, request, start_server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from p2pdist.net.http_server import HttpServer

    Connect = Callable[[int], Awaitable[Client]]

LARGE_BYTES = 8 << 20
"""More than the buffers of both sides hold."""


class Echo:
    """An application with one path per behaviour."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.exchanges: list[Exchange] = []
        self.readers: list[FakeReader] = []
        self.blob = FakeBlob(bytes(range(256)) * (LARGE_BYTES // 256))
        self.file: int | None = None
        self.entered = trio.Event()
        self.cancelled = trio.Event()
        self._ended = trio.Event()

    async def handle(self, request: Request) -> Response:
        self.requests.append(request)
        match request.target:
            case "/boom":
                raise RuntimeError("a bug")
            case "/hang":
                self.entered.set()
                try:
                    await trio.sleep_forever()
                finally:
                    self.cancelled.set()
            case "/split":
                return Response(200, (("X-Kind", "echo\r\nX-Other: smuggled"),), b"", "echo")
            case "/file" | "/file?ns=docker.io":
                self.readers.append(FakeReader(self.blob, self.file))
                return Response(200, (), FileBody(self.readers[-1], 0, self.blob.size_bytes), "file")
        return Response(200, (("X-Kind", "echo"),), request.target.encode(), "echo")

    def refuse(self, status: int, message: str) -> Response:
        return Response(status, (), message.encode(), "refused")

    def finished(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        ended, self._ended = self._ended, trio.Event()
        ended.set()

    async def reports(self, count: int) -> list[Exchange]:
        """Wait for the first `count` exchanges to be over."""
        while len(self.exchanges) < count:
            await self._ended.wait()
        return self.exchanges


async def serve(nursery: trio.Nursery, **limits: float) -> tuple[Echo, HttpServer, int]:
    application = Echo()
    server, port = await start_server(nursery, application, Limits(**limits))  # type: ignore[arg-type]
    return application, server, port


async def test_a_connection_answers_request_after_request(connect: Connect, nursery: trio.Nursery) -> None:
    application, _, port = await serve(nursery)
    client = await connect(port)
    for target in ("/a", "/b", "/c"):
        answer = await client.get(target)
        assert (answer.status, answer.body, answer.headers["x-kind"]) == (200, target.encode(), "echo")
        assert answer.headers["content-length"] == "2"
        assert "date" in answer.headers
    for exchange in await application.reports(3):
        assert (exchange.kind, exchange.status, exchange.sent_bytes, exchange.complete) == ("echo", 200, 2, True)


async def test_pipelined_requests_are_answered_in_order_while_a_body_is_sent(
    connect: Connect, nursery: trio.Nursery
) -> None:
    application, _, port = await serve(nursery)
    client = await connect(port)
    await client.send(request("/a") + request("/file") + request("/b", method="HEAD") + request("/c")[:-5])
    assert (await client.answer()).body == b"/a"
    answer, reading = await client.start()
    await client.send(request("/c")[-5:])
    assert await client.rest(reading) == application.blob.data
    assert answer.headers["content-length"] == str(LARGE_BYTES)
    assert (await client.answer("HEAD")).headers["content-length"] == "2"
    assert (await client.answer()).body == b"/c"


async def test_a_request_may_arrive_byte_by_byte(connect: Connect, nursery: trio.Nursery) -> None:
    _, _, port = await serve(nursery)
    client = await connect(port)
    for byte in request("/a"):
        await client.send(bytes([byte]))
    assert (await client.answer()).body == b"/a"


async def test_http_1_0_and_connection_close_end_the_connection(connect: Connect, nursery: trio.Nursery) -> None:
    _, _, port = await serve(nursery)
    for raw in (b"GET /a HTTP/1.0\r\n\r\n", request("/a", ("Connection", "close"))):
        client = await connect(port)
        await client.send(raw)
        assert (await client.ends()).endswith(b"\r\n\r\n/a")


async def test_a_head_of_a_file_sends_no_body_and_closes_the_reader(connect: Connect, nursery: trio.Nursery) -> None:
    application, _, port = await serve(nursery)
    client = await connect(port)
    answer = await client.head("/file")
    assert answer.headers["content-length"] == str(LARGE_BYTES)
    assert (await client.get("/a")).body == b"/a"
    assert application.readers[0].closed.is_set()


async def test_repeated_headers_are_joined(connect: Connect, nursery: trio.Nursery) -> None:
    application, _, port = await serve(nursery)
    await (await connect(port)).get("/a", ("Accept", "x/y"), ("Accept", "z/*"))
    assert application.requests[0].header("accept") == "x/y, z/*"
    assert application.requests[0].header("range") is None


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 506, 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /a HTTP/1.1\r\n\r\n", 400),
        (b"GET /a HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /a\0b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /a HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n", 400),
        (b"GET /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 400),
        (b"GET /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
        (b"GET /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET /a HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 33_000 + b"\r\n\r\n", 431),
        (b"GET /a HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 70_000, 431),
        (b"GET /" + b"a" * 33_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"HEAD /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 400),
    ],
)
async def test_what_is_no_plain_request_is_refused_and_the_connection_ends(
    connect: Connect, nursery: trio.Nursery, raw: bytes, status: int
) -> None:
    application, _, port = await serve(nursery)
    client = await connect(port)
    await client.send(raw)
    answer = await client.ends()
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"connection: close" in answer.lower()
    assert answer.count(b"HTTP/1.1 ") == 1
    assert not application.requests


async def test_a_header_too_large_is_refused_even_when_it_comes_in_one_read(
    connect: Connect, nursery: trio.Nursery
) -> None:
    _, _, port = await serve(nursery, header_bytes=1000)
    client = await connect(port)
    assert (await client.get("/a", ("A", "b" * 900))).status == 200
    assert (await client.get("/a", ("A", "b" * 1000))).status == 431


async def test_a_push_is_answered_but_its_body_not_read(connect: Connect, nursery: trio.Nursery) -> None:
    application, _, port = await serve(nursery)
    client = await connect(port)
    await client.send(request("/a", ("Content-Length", "1000000"), method="POST") + b"x" * 300_000)
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert application.requests[0].method == "POST"
    assert await client.stream.receive_some() == b"", "a reset could have destroyed the answer"


async def test_a_bug_in_the_application_is_answered_with_500_and_the_server_lives_on(
    connect: Connect, nursery: trio.Nursery
) -> None:
    _, _, port = await serve(nursery)
    client = await connect(port)
    assert (await client.get("/boom")).status == 500
    assert (await client.get("/a")).status == 200


async def test_a_header_that_would_break_out_of_its_line_is_never_sent(connect: Connect, nursery: trio.Nursery) -> None:
    application, _, port = await serve(nursery)
    client = await connect(port)
    await client.send(request("/split"))
    with pytest.raises((Incomplete, trio.BrokenResourceError, ConnectionError)):
        await client.answer()
    assert not (await application.reports(1))[0].complete
    assert (await (await connect(port)).get("/a")).body == b"/a"


async def test_of_a_crowd_larger_than_the_server_all_are_served_but_never_more_at_once_than_there_is_room(
    connect: Connect, nursery: trio.Nursery
) -> None:
    _, server, port = await serve(nursery, connections=30)
    crowd = [await connect(port) for _ in range(40)]
    await trio.testing.wait_all_tasks_blocked()
    assert server.statistics()["connections"] == 30
    for client in crowd:
        await client.send(request("/a"))
    for client in crowd:
        assert (await client.answer()).body == b"/a"


async def test_a_file_arrives_byte_for_byte_and_its_reader_is_closed(connect: Connect, nursery: trio.Nursery) -> None:
    application, _, port = await serve(nursery)
    client = await connect(port)
    assert (await client.get("/file")).body == application.blob.data
    assert (await application.reports(1))[0].sent_bytes == LARGE_BYTES
    assert application.readers[0].closed.is_set()


async def test_a_file_that_is_only_on_disk_arrives_too(nursery: trio.Nursery, connect: Connect, tmp_path: Path) -> None:
    application, _, port = await serve(nursery)
    application.file = os.open(tmp_path / "blob", os.O_RDWR | os.O_CREAT)
    os.pwrite(application.file, application.blob.data, 0)
    client = await connect(port)
    await client.send(request("/file"))
    _, reading = await client.start()
    os.fsync(application.file)
    os.posix_fadvise(application.file, 0, 0, os.POSIX_FADV_DONTNEED)
    assert await client.rest(reading) == application.blob.data


async def test_a_file_is_sent_while_it_arrives(connect: Connect, nursery: trio.Nursery) -> None:
    application, _, port = await serve(nursery)
    application.blob.arrived_bytes = 1000
    client = await connect(port)
    await client.send(request("/file"))
    _, reading = await client.start()
    body = await client.read_exactly(reading, 1000)
    application.blob.arrive(5000)
    body += await client.read_exactly(reading, 4000)
    application.blob.arrive(LARGE_BYTES)
    assert body + await client.rest(reading) == application.blob.data


@pytest.mark.parametrize("error", [PullFailed("sha256:x", []), RuntimeError("a bug"), OSError(5, "input/output error")])
async def test_a_body_that_fails_is_cut_and_never_ended_cleanly(
    connect: Connect, nursery: trio.Nursery, error: Exception
) -> None:
    application, _, port = await serve(nursery)
    application.blob.arrived_bytes = 1000
    client = await connect(port)
    await client.send(request("/file"))
    _, reading = await client.start()
    await client.read_exactly(reading, 1000)
    application.blob.fail(error)
    with pytest.raises(trio.BrokenResourceError):
        await client.stream.receive_some()
    await application.readers[0].closed.wait()
    assert not (await application.reports(1))[0].complete
    assert (await (await connect(port)).get("/a")).status == 200


async def test_for_a_client_that_resumes_a_body_that_fails_ends_early_without_a_reset(
    connect: Connect, nursery: trio.Nursery
) -> None:
    application, _, port = await serve(nursery)
    application.blob.arrived_bytes = 1000
    client = await connect(port)
    await client.send(request("/file?ns=docker.io"))
    answer, reading = await client.start()
    assert answer.headers["content-length"] == str(LARGE_BYTES), "else an early end is taken for the end"
    await client.read_exactly(reading, 1000)
    application.blob.fail(PullFailed("sha256:x", []))
    assert await client.stream.receive_some() == b""


async def test_a_file_shorter_than_promised_is_cut(connect: Connect, nursery: trio.Nursery) -> None:
    application, _, port = await serve(nursery)
    application.blob = FakeBlob(b"x" * 1000, arrived_bytes=2000, size_bytes=2000)
    client = await connect(port)
    with pytest.raises(Incomplete):
        await client.get("/file")


async def test_a_client_that_hangs_up_ends_only_its_own_wait_for_bytes(connect: Connect, nursery: trio.Nursery) -> None:
    application, _, port = await serve(nursery)
    application.blob.arrived_bytes = 1000
    leaving, staying = await connect(port), await connect(port)
    readings = []
    for client in (leaving, staying):
        await client.send(request("/file"))
        readings.append((await client.start())[1])
    for reader in application.readers:
        await reader.waiting.wait()
    await leaving.stream.aclose()
    await application.readers[0].closed.wait()
    assert application.readers[0].cancelled
    assert not application.readers[1].closed.is_set()
    application.blob.arrive(LARGE_BYTES)
    assert await staying.rest(readings[1]) == application.blob.data


async def test_a_client_that_hangs_up_cancels_the_handler(connect: Connect, nursery: trio.Nursery) -> None:
    application, _, port = await serve(nursery)
    client = await connect(port)
    await client.send(request("/hang") + b"GET /pipe")
    await application.entered.wait()
    await client.stream.aclose()
    await application.cancelled.wait()
    assert (await application.reports(1))[0].status == CLIENT_LEFT


async def test_a_client_that_hangs_up_in_the_middle_of_a_body_frees_the_reader(
    connect: Connect, nursery: trio.Nursery
) -> None:
    application, _, port = await serve(nursery)
    client = await connect(port)
    await client.send(request("/file"))
    await client.start()
    await client.stream.aclose()
    assert not (await application.reports(1))[0].complete
    assert application.readers[0].closed.is_set()


async def test_a_client_that_ends_its_side_still_gets_an_answer_that_is_there(
    connect: Connect, nursery: trio.Nursery
) -> None:
    application, _, port = await serve(nursery)
    client = await connect(port)
    await client.send(request("/file"))
    await client.stream.send_eof()
    assert (await client.answer()).body == application.blob.data


async def test_a_client_that_takes_nothing_is_cut_after_the_stall_deadline(
    connect: Connect, nursery: trio.Nursery
) -> None:
    application, _, port = await serve(nursery, write_stall_s=0.05)
    client = await connect(port)
    await client.send(request("/file"))
    await application.reports(1)
    assert application.readers[0].closed.is_set()
    with pytest.raises(Incomplete):
        await client.answer()


async def test_a_header_that_never_ends_is_given_up(connect: Connect, nursery: trio.Nursery) -> None:
    _, _, port = await serve(nursery, header_s=0.05)
    client = await connect(port)
    await client.send(b"GET /a HTTP/1.1\r\nHost: x\r\n")
    assert (await client.ends()).startswith(b"HTTP/1.1 408 ")


async def test_a_connection_that_says_nothing_is_closed(connect: Connect, nursery: trio.Nursery) -> None:
    _, _, port = await serve(nursery, header_s=0.05)
    assert await (await connect(port)).ends() == b""


async def test_an_idle_connection_is_closed(connect: Connect, nursery: trio.Nursery) -> None:
    _, _, port = await serve(nursery, idle_s=0.05)
    client = await connect(port)
    assert (await client.get("/a")).status == 200
    assert await client.ends() == b""


async def test_two_hundred_slow_clients_do_not_keep_others_waiting(connect: Connect, nursery: trio.Nursery) -> None:
    application, server, port = await serve(nursery)
    slow = [await connect(port) for _ in range(200)]
    for number, client in enumerate(slow):
        await client.send(request("/hang") if number % 2 else b"GET /slow HTTP/1.1\r\nHo")
    while len(application.requests) < 100:
        await trio.testing.wait_all_tasks_blocked()
    quick = await connect(port)
    assert (await quick.get("/a")).body == b"/a"
    assert (await quick.get("/file")).body == application.blob.data
    assert server.statistics()["connections"] == 201
    for client in slow:
        client.stream.socket.close()


async def test_a_server_out_of_file_descriptors_goes_on_when_it_has_some_again(nursery: trio.Nursery) -> None:
    _, _, port = await serve(nursery)
    with trio.socket.socket() as raw:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        first_free = os.dup(0)
        os.close(first_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, limits[1]))
        try:
            await raw.connect(("127.0.0.1", port))
            await trio.testing.wait_all_tasks_blocked()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        client = Client(trio.SocketStream(raw))
        assert (await client.get("/a")).body == b"/a"


async def test_a_full_server_takes_the_next_client_when_one_ends(connect: Connect, nursery: trio.Nursery) -> None:
    application, server, port = await serve(nursery, connections=1)
    first, second = await connect(port), await connect(port)
    await first.send(request("/hang"))
    await application.entered.wait()
    await second.send(request("/a"))
    assert server.statistics() == {"connections": 1, "idle": 0, "displaced": 0}
    await first.stream.aclose()
    assert (await second.answer()).body == b"/a"


async def test_a_full_server_closes_an_idle_connection_for_a_new_client(
    connect: Connect, nursery: trio.Nursery
) -> None:
    _, _, port = await serve(nursery, connections=1)
    first = await connect(port)
    await first.get("/a")
    assert (await (await connect(port)).get("/b")).body == b"/b"
    assert await first.ends() == b""


async def test_a_full_server_keeps_no_connection_open_while_others_wait(
    connect: Connect, nursery: trio.Nursery
) -> None:
    application, _, port = await serve(nursery, connections=1)
    application.blob.arrived_bytes = 1000
    first = await connect(port)
    await first.send(request("/file"))
    _, reading = await first.start()
    second = await connect(port)
    await second.send(request("/b"))
    await trio.testing.wait_all_tasks_blocked()
    application.blob.arrive(LARGE_BYTES)
    assert await first.rest(reading) == application.blob.data
    assert (await second.answer()).body == b"/b"


@pytest.mark.parametrize("said", [b"", b"GET /slow HTTP/1.1\r\nHo"], ids=["nothing", "half a request"])
async def test_a_full_server_drops_a_client_that_owes_a_request_for_long(
    connect: Connect, nursery: trio.Nursery, quick_clock: trio.testing.MockClock, said: bytes
) -> None:
    _, server, port = await serve(nursery, connections=1, header_s=1000.0)
    first = await connect(port)
    await first.send(said)
    began = trio.current_time()
    assert (await (await connect(port)).get("/b")).body == b"/b"
    assert await first.ends() == b""
    assert Limits().patience_s <= trio.current_time() - began < Limits().patience_s + 1
    assert server.statistics()["displaced"] == 1


async def test_a_full_server_drops_a_reader_that_takes_next_to_nothing(
    connect: Connect, nursery: trio.Nursery, quick_clock: trio.testing.MockClock
) -> None:
    _, _, port = await serve(nursery, connections=2, write_stall_s=1000.0)
    stalled, slow = await connect(port), await connect(port)
    for client in (stalled, slow):
        await client.send(request("/file"))
        await client.start()
    await slow.stream.receive_some(1)
    await (await connect(port)).send(request("/hang"))
    assert (await (await connect(port)).get("/b")).body == b"/b"
    for client in (stalled, slow):
        with pytest.raises(trio.BrokenResourceError):
            while await client.stream.receive_some(1 << 20):
                pass


async def test_a_full_server_keeps_a_reader_that_takes_what_there_is(
    connect: Connect, nursery: trio.Nursery, quick_clock: trio.testing.MockClock
) -> None:
    application, server, port = await serve(nursery, connections=1)
    application.blob.arrived_bytes = 1000
    first = await connect(port)
    await first.send(request("/file"))
    _, reading = await first.start()
    second = await connect(port)
    await second.send(request("/b"))
    await trio.sleep(100)
    application.blob.arrive(LARGE_BYTES)
    body = b""
    while len(body) < LARGE_BYTES:
        await trio.sleep(1)
        body += await first.read_exactly(reading, min(1 << 20, LARGE_BYTES - len(body)))
    assert body == application.blob.data
    assert (await second.answer()).body == b"/b"
    assert server.statistics()["displaced"] <= 1


async def test_idle_clients_make_room_first_then_silent_ones_then_slow_readers(
    connect: Connect, nursery: trio.Nursery, quick_clock: trio.testing.MockClock
) -> None:
    _, _, port = await serve(nursery, connections=4, idle_s=1000.0, header_s=1000.0, write_stall_s=1000.0)
    reader, half, silent, idle = [await connect(port) for _ in range(4)]
    await reader.send(request("/file"))
    await reader.start()
    await half.send(b"GET")
    await idle.get("/idle")
    await trio.sleep(10)
    ended: list[str] = []

    async def watch(name: str, client: Client) -> None:
        await client.ends()
        ended.append(name)

    async with trio.open_nursery() as watching:
        for name, client in (("half", half), ("silent", silent), ("idle", idle)):
            watching.start_soon(watch, name, client)
        for _ in range(3):
            busy = await connect(port)
            await busy.send(request("/hang"))
            await trio.sleep(4)
    assert ended == ["idle", "silent", "half"]
    assert (await (await connect(port)).get("/last")).body == b"/last"


async def test_stop_lets_a_running_answer_end_and_closes_idle_connections(connect: Connect) -> None:
    async with trio.open_nursery() as nursery:
        application, server, port = await serve(nursery)
        application.blob.arrived_bytes = 1000
        idle, busy = await connect(port), await connect(port)
        await idle.get("/a")
        await busy.send(request("/file"))
        _, reading = await busy.start()
        server.stop(grace_s=60)
        assert await idle.ends() == b""
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", port)
        application.blob.arrive(LARGE_BYTES)
        assert await busy.rest(reading) == application.blob.data
        assert await busy.ends() == b""


async def test_stop_cuts_what_does_not_end_within_the_grace(connect: Connect) -> None:
    async with trio.open_nursery() as nursery:
        application, server, port = await serve(nursery)
        application.blob.arrived_bytes = 1000
        client = await connect(port)
        await client.send(request("/file"))
        _, reading = await client.start()
        server.stop(grace_s=0.05)
        with pytest.raises(Incomplete):
            await client.rest(reading)
    assert application.readers[0].closed.is_set()


async def test_cancelling_the_server_cuts_everything_and_closes_the_readers(connect: Connect) -> None:
    async with trio.open_nursery() as nursery:
        application, _, port = await serve(nursery)
        client = await connect(port)
        await client.send(request("/file"))
        _, reading = await client.start()
        nursery.cancel_scope.cancel()
    assert application.readers[0].closed.is_set()
    with pytest.raises(Incomplete):
        await client.rest(reading)


async def test_a_port_in_use_is_a_configuration_error_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*choose another port"):
            await open_listeners("127.0.0.1", port)


async def test_an_address_of_another_machine_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:5050"):
        await open_listeners("192.0.2.1", 5050)


async def test_ipv6_is_listened_on(nursery: trio.Nursery) -> None:
    if not socket.has_ipv6:
        return
    listeners = await open_listeners("::1", 0)
    assert listeners[0].socket.family == socket.AF_INET6
    for listener in listeners:
        await listener.aclose()
