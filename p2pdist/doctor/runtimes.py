# SPDX-License-Identifier: Apache-2.0
"""Checks of the runtimes: does their configuration lead to the agent, and does a pull as they do it arrive there."""

from __future__ import annotations

import hashlib
import platform as machine_platform
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import trio

from p2pdist.core import oci
from p2pdist.doctor import programs, web
from p2pdist.doctor.report import Check, fail, ok, warn
from p2pdist.errors import InvalidInput, P2PDistError
from p2pdist.setup.runtimes import RUNTIMES, present

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from p2pdist.core.oci import ImageReference
    from p2pdist.setup.plan import Places, Route, View

_LOOPBACK = ("localhost", "::1")
_LOOKS, _LOOK_S = 10, 0.1


@dataclass(frozen=True, slots=True)
class Host:
    """The files of a host's runtimes, and where their pulls have to go."""

    view: View
    places: Places
    mirror: str
    registries: tuple[str, ...]


def checks(host: Host) -> tuple[list[Check], list[str]]:
    """Return a check for each runtime on the host, and those runtimes."""
    found = present(host.view, host.places)
    if not found:
        todo = "install one, or name the user whose rootless runtimes are meant with --home"
        return [warn("runtime", "no container runtime is on this host", todo)], []
    return [_configured(host, name) for name in found], found


def _configured(host: Host, name: str) -> Check:
    todo = f"run `sudo p2pdist setup --runtime {name}` and restart what it names"
    try:
        routes = {registry: route_of(host, name, registry) for registry in host.registries}
    except P2PDistError as error:
        return fail("runtime", str(error), f"mend the file, then {todo}", about=name)
    possible = {registry: route for registry, route in routes.items() if route.possible}
    past = {name: route for name, route in possible.items() if not _leads_to(route.hosts[0], host.mirror)}
    if not past:
        routes_after = {url for route in possible.values() for url in route.hosts if not _leads_to(url, host.mirror)}
        then = "and falls back to the registries" if routes_after else "and nothing else"
        return ok("runtime", f"asks the agent first, {then}", about=name)
    registry, route = next(iter(past.items()))
    what = f"asks {route.hosts[0]} for {registry} ({route.where})"
    if strays := [url for url in route.hosts if _is_here(url) and not _leads_to(url, host.mirror)]:
        what = f"asks {strays[0]}, but the mirror is {host.mirror} ({route.where})"
    if any(_leads_to(url, host.mirror) for url in route.hosts):
        return warn("runtime", f"{what} before the agent", "put the agent's table first in that file", about=name)
    others = f", and for {len(past) - 1} more" if len(past) > 1 else ""
    return fail("runtime", f"does not ask the agent: {what}{others}", todo, about=name)


def route_of(host: Host, name: str, registry: str) -> Route:
    return RUNTIMES[name].route(host.view, host.places, registry)


def may_have_mirror(host: Host, name: str, registry: str) -> bool:
    """Return whether this runtime can be sent to the agent for this registry; what cannot be read is not ruled out."""
    try:
        return route_of(host, name, registry).possible
    except P2PDistError:
        return True


async def canary(host: Host, name: str, image: ImageReference, sent_bytes: Callable[[], Awaitable[int]]) -> Check:
    """Pull manifest and config of an image from where this runtime would, and see whether the agent sent them.

    Args:
        sent_bytes: returns what the mirror has sent so far.
    """
    try:
        route = route_of(host, name, image.repository.registry)
    except P2PDistError as error:
        return fail("canary", str(error), "mend that file", about=name)
    first, again = route.hosts[0], f"run `sudo p2pdist setup --runtime {name}` and restart what it names"
    if not _leads_to(first, host.mirror):
        return fail("canary", f"a pull of {image} goes to {first}, past the agent ({route.where})", again, about=name)
    try:
        before = await sent_bytes()
        pulled_bytes = await _pull(first, image, by_path=route.by_path)
        passed_bytes = await _passed(sent_bytes, before, pulled_bytes)
    except (web.Unreached, InvalidInput) as error:
        todo = "see mirror and origin-*; the runtime falls back to the registry, or fails where it must not"
        return fail("canary", f"{image} did not come from {first}: {error}", todo, about=name)
    if passed_bytes < pulled_bytes:
        return fail("canary", f"{image} came from {first}, but the agent did not send it", again, about=name)
    return ok("canary", f"{image}: manifest and config came through the agent", about=name)


async def own_canary(
    name: str, command: tuple[str, ...], image: ImageReference, sent_bytes: Callable[[], Awaitable[int]]
) -> Check:
    """Let a runtime pull the image itself, and see whether the agent sent anything."""
    try:
        before = await sent_bytes()
        await programs.pull(command, str(image))
        passed_bytes = await _passed(sent_bytes, before, 1)
    except P2PDistError as error:
        return fail("canary", f"{image}: {error}", "see runtime, mirror and origin-*", about=name)
    if not passed_bytes:
        todo = "name an image that this node has not yet with --canary; restart the runtime if setup named a command"
        return fail("canary", f"{command[0]} pulled {image}, and the agent sent nothing", todo, about=name)
    return ok("canary", f"{command[0]} pulled {image} through the agent", about=name)


async def _passed(sent_bytes: Callable[[], Awaitable[int]], before: int, least: int) -> int:
    """Return what the mirror has sent since; it counts a moment after the last byte."""
    for _ in range(_LOOKS):
        passed = await sent_bytes() - before
        if passed >= least:
            break
        await trio.sleep(_LOOK_S)
    return passed


async def _pull(base: str, image: ImageReference, *, by_path: bool) -> int:
    """Return the bytes of an image's manifests and config, each checked against its digest."""
    parts = urlsplit(base)
    name, query = image.repository.name, f"?ns={quote(image.repository.registry, safe='')}"
    if by_path:
        name, query = f"{parts.path.strip('/')}/{name}".lstrip("/"), ""
    root = f"{parts.scheme}://{parts.netloc}/v2/{name}"
    body, media_type = await _manifest(f"{root}/manifests/{image.reference}{query}", image.reference)
    total, manifest = len(body), oci.parse_manifest(body, media_type)
    if manifest.kind == "index":
        child = oci.pick_platform(manifest, oci.platform_of_machine(machine_platform.machine()))
        body, media_type = await _manifest(f"{root}/manifests/{child.digest}{query}", child.digest)
        total, manifest = total + len(body), oci.parse_manifest(body, media_type)
    if manifest.config is not None:
        config = await _content(f"{root}/blobs/{manifest.config.digest}{query}", {}, manifest.config.digest)
        total += len(config.body)
    return total


async def _manifest(url: str, reference: str) -> tuple[bytes, str]:
    answer = await _content(url, {"Accept": ", ".join(oci.MANIFEST_TYPES)}, reference)
    return answer.body, answer.headers.get("content-type", "").partition(";")[0].strip()


async def _content(url: str, headers: Mapping[str, str], reference: str) -> web.Answer:
    answer = await web.get(url, headers=headers)
    if answer.status != 200:
        said = answer.json().get("errors")
        reason = (
            str(said[0].get("message", "")) if isinstance(said, list) and said and isinstance(said[0], dict) else ""
        )
        raise web.Unreached("api", f"{answer.status} {reason}".strip()[:300])
    algorithm, colon, expected = reference.partition(":")
    if colon and hashlib.new(algorithm, answer.body).hexdigest() != expected:
        raise web.Unreached("api", f"wrong content for {reference}")
    return answer


def _leads_to(url: str, mirror: str) -> bool:
    """Whether a URL, perhaps with a registry's name as its path, is the agent's mirror."""
    ours, theirs = urlsplit(mirror), urlsplit(url)
    same_host = theirs.hostname == ours.hostname or {theirs.hostname, ours.hostname} <= {"127.0.0.1", *_LOOPBACK}
    return theirs.scheme == ours.scheme and same_host and theirs.port == ours.port


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in _LOOPBACK or host.startswith("127.")
