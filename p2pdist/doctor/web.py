# SPDX-License-Identifier: Apache-2.0
"""The doctor's own requests: each with a deadline, never by a proxy, failures told apart by how far they came."""

from __future__ import annotations

import os
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import trio

from p2pdist.errors import P2PDistError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TIMEOUT_S = 8.0
_BODY_BYTES_MAX = 8 << 20


class Unreached(P2PDistError):
    """No answer.

    Args:
        stage: `dns`, `connect`, `tls` or `api`: what did not work.
    """

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; header names in lower case, repeated ones joined by commas."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the JSON object in the body; an empty one where there is none."""
        try:
            value = httpx.Response(200, content=self.body).json()
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Return what servers are believed by, as the agent does: the system's store and this file.

    Raises:
        Unreached: the file cannot be used.
    """
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise Unreached("tls", f"the CA file {ca_file} cannot be used: {error}") from error
    return context


async def reach(url: str, context: ssl.SSLContext) -> None:
    """Look a server up, connect to it and, for https, shake hands.

    Raises:
        Unreached: with the first of these that did not work.
    """
    parts = httpx.URL(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    stage, stream = "dns", None
    try:
        with trio.fail_after(TIMEOUT_S):
            await trio.socket.getaddrinfo(parts.host, port, type=trio.socket.SOCK_STREAM)
            stage = "connect"
            stream = await trio.open_tcp_stream(parts.host, port)
            if parts.scheme == "https":
                stage = "tls"
                await trio.SSLStream(stream, context, server_hostname=parts.host).do_handshake()
    except trio.TooSlowError as error:
        raise Unreached(stage, f"no answer within {TIMEOUT_S:.0f} s") from error
    except (OSError, trio.BrokenResourceError) as error:
        raise Unreached(stage, _reason(error)) from error
    finally:
        if stream is not None:
            await trio.aclose_forcefully(stream)


async def get(url: str, *, headers: Mapping[str, str] | None = None, context: ssl.SSLContext | None = None) -> Answer:
    """Return the answer to a GET, redirects followed (a registry's blobs are elsewhere).

    Raises:
        Unreached: there is none within TIMEOUT_S, or it is larger than 8 MiB.
    """
    verify = context or ssl.create_default_context()
    try:
        with trio.fail_after(TIMEOUT_S):
            async with (
                httpx.AsyncClient(verify=verify, trust_env=False, timeout=TIMEOUT_S, follow_redirects=True) as client,
                client.stream("GET", url, headers=dict(headers or {})) as response,
            ):
                body = bytearray()
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > _BODY_BYTES_MAX:
                        raise Unreached("api", f"{url} answers with more than {_BODY_BYTES_MAX >> 20} MiB")
                return Answer(response.status_code, dict(response.headers), bytes(body))
    except trio.TooSlowError as error:
        raise Unreached("api", f"no answer within {TIMEOUT_S:.0f} s") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreached("connect" if isinstance(error, httpx.ConnectError) else "api", _reason(error)) from error


async def dial(host: str, port: int) -> str:
    """Return "" where a TCP connection can be made, else why not."""
    try:
        with trio.fail_after(TIMEOUT_S):
            await trio.aclose_forcefully(await trio.open_tcp_stream(host, port))
    except trio.TooSlowError:
        return f"no answer within {TIMEOUT_S:.0f} s"
    except OSError as error:
        return _reason(error)
    return ""


def _reason(error: BaseException) -> str:
    """Return why, in the words of the innermost error that says something."""
    while not isinstance(error, ssl.SSLError):
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif (inner := error.__cause__ or error.__context__) is not None:  # httpcore raises from None
            error = inner
        else:
            break
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error)
    if isinstance(error, socket.gaierror):
        return str(error.strerror).lower()
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__
