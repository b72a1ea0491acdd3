# SPDX-License-Identifier: Apache-2.0
"""The agent's admin endpoint: `/metrics`, `/livez`, `/readyz`, `/status`.

Owns: those four paths. Refuses to know what they report (callables say) and every Host that is a name: a web page
whose name was pointed at a loopback address (DNS rebinding) must not read a node's state.
"""

from __future__ import annotations

import ipaddress
import json
import re
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from p2pdist.net.http_messages import Response

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from prometheus_client import CollectorRegistry

    from p2pdist.net.http_messages import Exchange, Request

_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::[0-9]{1,5})?")
_TEXT = ("Content-Type", "text/plain; charset=utf-8")
_UNCACHED = ("Cache-Control", "no-store")


class Admin:
    """An `http_messages.Application` for people and their monitoring.

    Args:
        registry: what `/metrics` shows.
        ready: returns whether the agent can serve, and what to say of each of its parts; quick.
        status: returns what `p2pdist status` shows, as JSON knows it; quick.
        names: host names, besides addresses and `localhost`, under which the endpoint may be asked.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        ready: Callable[[], tuple[bool, Mapping[str, object]]],
        status: Callable[[], Mapping[str, object]],
        *,
        names: Collection[str] = (),
    ) -> None:
        self._registry = registry
        self._ready = ready
        self._status = status
        self._names = frozenset(name.lower() for name in ("localhost", *names))

    async def handle(self, request: Request) -> Response:
        host = request.header("host")
        if host is not None and not self._answers_to(host):
            return _text(403, f"ask by address, not as {host[:100]!r}")
        if request.method not in ("GET", "HEAD"):
            return _text(405, "only GET and HEAD", ("Allow", "GET, HEAD"))
        match request.target.partition("?")[0]:
            case "/livez":
                return _text(200, "ok")
            case "/readyz":
                ready, parts = self._ready()
                return _json(200 if ready else 503, {"ready": ready, "parts": parts})
            case "/status":
                return _json(200, self._status())
            case "/metrics":
                return Response(200, (("Content-Type", CONTENT_TYPE_LATEST),), generate_latest(self._registry))
            case _:
                return _text(404, "there are /metrics, /livez, /readyz and /status")

    def refuse(self, status: int, message: str) -> Response:
        return _text(status, message)

    def finished(self, exchange: Exchange) -> None:
        """Nothing is counted: what watches the agent is no load worth watching."""

    def _answers_to(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].strip("[]").lower()
        return name in self._names or _is_address(name)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _text(status: int, message: str, *headers: tuple[str, str]) -> Response:
    return Response(
        status, (("Content-Type", "text/plain; charset=utf-8"), _UNCACHED, *headers), f"{message}\n".encode()
    )


def _json(status: int, value: Mapping[str, object]) -> Response:
    return Response(status, (("Content-Type", "application/json"), _UNCACHED), json.dumps(value).encode())
