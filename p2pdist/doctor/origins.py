# SPDX-License-Identifier: Apache-2.0
"""Checks of the registries, as far as a request comes: name, port, certificate, API, token service; and the clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import trio

from p2pdist.config import WELL_KNOWN_REGISTRIES
from p2pdist.core.challenge import parse_challenges
from p2pdist.doctor import web
from p2pdist.doctor.report import Check, Result, fail, ok, skip, warn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from p2pdist.config import RegistryConfig

STAGES = ("dns", "connect", "tls", "api", "auth")
_TODO = {
    "dns": "mend the host's DNS, or the registry's name",
    "connect": "open the firewall for the registry's port, or mend the registry's URL; the agent uses no proxy",
    "tls": "give the agent the registry's CA with ca_file, or mend the registry's certificate",
    "api": "mend the registry's URL: it has to answer /v2/ with 200 or 401",
    "auth": "open the firewall for the token service; credentials go into docker_config",
}
_SKEW_WARN_S, _SKEW_FAIL_S = 30, 300
"""Tokens of registries are good for 5 minutes; certificates and logs suffer earlier."""
_ANY = "*"


@dataclass(slots=True)
class _Found:
    """How far a registry was reached: the stages that worked, and why the next one did not."""

    stages: list[str] = field(default_factory=list)
    failed: str = ""
    why: str = ""
    skew_s: float | None = None


async def checks(registries: Mapping[str, RegistryConfig]) -> list[Check]:
    """Return the checks of all registries, asked at the same time."""
    found: dict[str, _Found] = {name: _Found() for name in registries if name != _ANY}
    async with trio.open_nursery() as nursery:
        for name, entry in found.items():
            nursery.start_soon(_explore, registries[name], entry)
    built_in = {name for name in found if registries[name] == WELL_KNOWN_REGISTRIES.get(name)}
    return [*(_stage(stage, found, built_in) for stage in STAGES), _clock(found)]


async def _explore(registry: RegistryConfig, found: _Found) -> None:
    try:
        context = web.tls_context(registry.ca_file)
        await web.reach(registry.url, context)
        answer = await web.get(f"{registry.url}/v2/", context=context)
        found.stages += ["dns", "connect", "tls"]
        found.skew_s = _skew(answer)
        if answer.status not in (200, 401):
            raise web.Unreached("api", f"answers {answer.status} to /v2/")
        found.stages.append("api")
        await _ask_for_token(answer)
        found.stages.append("auth")
    except web.Unreached as error:
        found.failed, found.why = error.stage, str(error)
        found.stages = list(STAGES[: STAGES.index(error.stage)])


async def _ask_for_token(answer: web.Answer) -> None:
    """Ask the token service that a registry names; what it answers is worth nothing here, that it answers is."""
    for challenge in parse_challenges([answer.headers.get("www-authenticate", "")]):
        realm = challenge.parameters.get("realm", "")
        if answer.status != 401 or challenge.scheme != "bearer" or not realm.startswith(("http://", "https://")):
            continue
        try:
            token = await web.get(f"{realm}?service={challenge.parameters.get('service', '')}")
        except web.Unreached as error:
            raise web.Unreached("auth", f"its token service {realm} does not answer: {error}") from error
        if token.status >= 500:
            raise web.Unreached("auth", f"its token service {realm} answers {token.status}")


def _skew(answer: web.Answer) -> float | None:
    """Return how many seconds this host's clock is ahead of a server's, or None where it does not say."""
    try:
        return time.time() - parsedate_to_datetime(answer.headers.get("date", "")).timestamp()
    except (TypeError, ValueError):
        return None


def _stage(stage: str, found: Mapping[str, _Found], built_in: set[str]) -> Check:
    name = f"origin-{stage}"
    failed = {registry: entry.why for registry, entry in found.items() if entry.failed == stage}
    reached = [registry for registry, entry in found.items() if stage in entry.stages]
    if failed:
        what = "; ".join(f"{registry}: {why}" for registry, why in failed.items())
        # Nobody asked for the built-in ones by name: a site that cannot reach one of them may not need it.
        harmless = reached and set(failed) <= built_in
        return (warn if harmless else fail)(name, what, _TODO[stage], about=", ".join(failed))
    if not reached:
        return skip(name, "not tried: no registry was reached so far")
    return ok(name, f"{len(reached)} of {len(found)} registries: {', '.join(reached)}")


def _clock(found: Mapping[str, _Found]) -> Check:
    skews = [entry.skew_s for entry in found.values() if entry.skew_s is not None]
    if not skews:
        return skip("clock", "no registry told the time")
    # One registry with a wrong clock is not this host's trouble.
    skew = sorted(skews, key=abs)[(len(skews) - 1) // 2]
    what = f"this host's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the registries'"
    if abs(skew) < _SKEW_WARN_S:
        return ok("clock", "agrees with the registries' within 30 s")
    result = Result.FAIL if abs(skew) >= _SKEW_FAIL_S else Result.WARN
    return Check("clock", result, what, "set it (chrony, systemd-timesyncd): tokens and certificates depend on it")
