# SPDX-License-Identifier: Apache-2.0
"""The origin client's connections: httpcore's pool, dialling with trio itself.

Owns: name resolution, dialling, TLS, the pool, and the translation of httpcore's errors. Refuses to
follow redirects, keep cookies, obey proxy variables or log. Invariants: a guarded transport connects
only to addresses that it has itself found public, so a name cannot be re-pointed inside between check
and dial (DNS rebinding); no error text holds a path, a query or a header; closing never blocks.

httpcore is the engine of httpx. Its client on top costs, on loopback, 3.1 CPU-s/GiB for ranges of
256 KiB and 1.3 for 4 MiB, against 2.4 and 1.0 here, and adds only what a registry client must do itself.
"""

from __future__ import annotations

import logging
import os
import ssl
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpcore
import httpx
import trio

from p2pdist.core.addresses import is_ip_literal, is_public_address
from p2pdist.errors import NotFoundAtOrigin, OriginError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Headers = list[tuple[bytes, bytes]]

READ_BYTES = 1024 * 1024
"""What one read may return: the cost of a read is per call, and httpcore asks for 64 KiB at a time."""
_KEEPALIVE_S = 30.0
_ADDRESSES_MAX = 4


class Unreachable(OriginError):
    """The connection could not be made or broke; another try may do better."""


class Transport:
    """A bounded pool of HTTP/1.1 connections.

    Args:
        context: TLS settings; its trust store says which servers are believed.
        connections: the most that are open at once.
        guarded: connect only to public addresses and by names.
        connect_s: how long a dial, and then a TLS handshake, may take.
        stall_s: how long one read or write may take.
        wait_s: how long a request may wait for one of the connections.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        connections: int,
        guarded: bool,
        connect_s: float,
        stall_s: float,
        wait_s: float,
    ) -> None:
        # At DEBUG httpcore logs header values and redirect targets: tokens and signed URLs.
        logging.getLogger("httpcore").setLevel(logging.INFO)
        self._extensions = {"timeout": {"connect": connect_s, "read": stall_s, "write": stall_s, "pool": wait_s}}
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=_KEEPALIVE_S,
            network_backend=_Backend(guarded=guarded),
        )

    async def send(self, method: str, url: httpx.URL, headers: Headers, content: bytes = b"") -> Answer:
        """Return the answer as soon as its headers are here; the caller closes it.

        Raises:
            Unreachable: the connection failed.
            OriginError: it must not be made, or cannot be on another try either.
        """
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        with _translated(url):
            response = await self._pool.handle_async_request(
                httpcore.Request(
                    method, target, headers=headers, content=_Content(content), extensions=self._extensions
                )
            )
        return Answer(response, url)

    async def aclose(self) -> None:
        """Close all connections at once."""
        await self._pool.aclose()


class Answer:
    """A response whose body is still arriving; iterate over it for the parts, undecoded."""

    def __init__(self, response: httpcore.Response, url: httpx.URL) -> None:
        self.status = response.status
        self.headers = httpx.Headers(response.headers)
        self.url = url
        self._response = response
        self._parts = response.aiter_stream()
        self._small: bytes | None = None

    @property
    def server(self) -> str:
        """Return who answered, `HOST[:PORT]`: all of the URL that may be shown."""
        return self.url.netloc.decode("ascii")

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> bytes:
        with _translated(self.url):
            return await anext(self._parts)

    async def read(self, limit_bytes: int) -> bytes:
        """Return the body and close; at most `limit_bytes` + 1, so that a longer one shows. May be repeated."""
        if self._small is None:
            body = bytearray()
            async for part in self:
                body += part
                if len(body) > limit_bytes:
                    break
            self._small = bytes(body[: limit_bytes + 1])
            await self.aclose()
        return self._small

    async def aclose(self) -> None:
        """Give the connection back, or close it where the body has not been read to its end."""
        with trio.CancelScope(shield=True):
            await self._response.aclose()
            # Generators left suspended would be finalised at some later time, with a warning; on a closed
            # connection these end after what h11 still holds.
            with suppress(httpcore.NetworkError, httpcore.ProtocolError):
                async for _ in self._parts:
                    pass


class _Content:
    """A request's body as httpcore wants it; no generator, which a cancelled request would leave suspended."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __aiter__(self) -> _Content:
        return self

    async def __anext__(self) -> bytes:
        data, self._data = self._data, b""
        if not data:
            raise StopAsyncIteration
        return data


@contextmanager
def _translated(url: httpx.URL) -> Iterator[None]:
    """Turn httpcore's errors into ours. `from None`: h11's texts quote headers."""
    server = url.netloc.decode("ascii")
    try:
        yield
    except (httpcore.ConnectTimeout, httpcore.PoolTimeout):
        raise Unreachable(f"no connection to {server} in time") from None
    except httpcore.ConnectError as error:
        raise Unreachable(f"cannot connect to {server}: {error}") from None
    except httpcore.TimeoutException:
        raise Unreachable(f"{server} stopped answering") from None
    except (httpcore.NetworkError, httpcore.RemoteProtocolError):
        raise Unreachable(f"{server} broke off or spoke no HTTP") from None
    except (httpcore.ProtocolError, httpcore.UnsupportedProtocol):
        raise OriginError(f"the request to {server} cannot be sent") from None


class _Backend(httpcore.AsyncNetworkBackend):
    def __init__(self, *, guarded: bool) -> None:
        self._guarded = guarded

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect; `local_address` and `socket_options` are never given by our pool."""
        try:
            with trio.fail_after(_or_forever(timeout)):
                return _Stream(await (self._dial_public(host, port) if self._guarded else _dial(host, port)))
        except trio.TooSlowError:
            raise httpcore.ConnectTimeout from None
        except OSError as error:
            raise httpcore.ConnectError(_reason(error)) from None

    async def _dial_public(self, host: str, port: int) -> trio.SocketStream:
        """Connect to one of the first few of the host's addresses, provided that all of them are public."""
        if is_ip_literal(host):
            raise NotFoundAtOrigin(f"{host} is an address; only public names are allowed here", status_code=404)
        found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(is_public_address(address) for address in addresses):
            raise NotFoundAtOrigin(f"{host} is not on the public internet; add it with --registry", status_code=404)
        failure = OSError("no address answered")
        for address in addresses[:_ADDRESSES_MAX]:
            try:
                return await trio.open_tcp_stream(address, port)
            except OSError as error:
                failure = error
        raise failure

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


async def _dial(host: str, port: int) -> trio.SocketStream:
    return await trio.open_tcp_stream(host, port)


class _Stream(httpcore.AsyncNetworkStream):
    """A trio stream as httpcore wants it; closed at once and without farewell, so that closing cannot hang."""

    def __init__(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            with trio.fail_after(_or_forever(timeout)):
                return bytes(await self._stream.receive_some(max(max_bytes, READ_BYTES)))
        except trio.TooSlowError:
            raise httpcore.ReadTimeout from None
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise httpcore.ReadError from None

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            with trio.fail_after(_or_forever(timeout)):
                await self._stream.send_all(buffer)
        except trio.TooSlowError:
            raise httpcore.WriteTimeout from None
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise httpcore.WriteError from None

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Shake hands, or close the connection, also when cancelled."""
        assert isinstance(self._stream, trio.SocketStream)
        stream = trio.SSLStream(self._stream, ssl_context, server_hostname=server_hostname, https_compatible=True)
        try:
            with trio.fail_after(_or_forever(timeout)):
                await stream.do_handshake()
        except BaseException as error:
            await trio.aclose_forcefully(stream)
            if isinstance(error, trio.TooSlowError):
                raise httpcore.ConnectTimeout from None
            if isinstance(error, trio.BrokenResourceError):
                raise _handshake_error(error.__cause__, server_hostname) from None
            raise
        return _Stream(stream)

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401
        """Answer whether an idle connection has been closed by the server; nothing else is needed."""
        if info != "is_readable":
            return None
        plain = self._stream if isinstance(self._stream, trio.SocketStream) else self._stream.transport_stream
        return plain.socket.is_readable()


def _handshake_error(cause: BaseException | None, host: str | None) -> Exception:
    """A certificate that is not believed will not be on the next try either."""
    if isinstance(cause, ssl.SSLCertVerificationError):
        return OriginError(f"the certificate of {host} is not trusted: {cause.verify_message}; give its CA as ca_file")
    return httpcore.ConnectError("no TLS there" if isinstance(cause, ssl.SSLError) else "broke off during TLS")


def _reason(error: OSError) -> str:
    """Return why a dial failed, without the address; trio gathers the failures of several in the cause."""
    if isinstance(error.__cause__, ExceptionGroup) and isinstance(error.__cause__.exceptions[0], OSError):
        error = error.__cause__.exceptions[0]
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or "no address answered"


def _or_forever(timeout: float | None) -> float:
    return float("inf") if timeout is None else timeout
