# SPDX-License-Identifier: Apache-2.0
"""WWW-Authenticate challenges and the token requests that answer them (RFC 9110 §11, distribution-spec).

Owns: splitting any number of header values into challenges, the scope of a pull, what a token service's
answer is worth. Refuses to decide who may have which credentials: that is the origin client's.
Invariants: never raises on what a server sent in a challenge; malformed rest of a header is dropped.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pdist.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_CHALLENGES_MAX = 16
_VALUE_CHARACTERS_MAX = 8192
_LIFETIME_DEFAULT_S = 60.0
"""What a token service that does not say grants (distribution's token specification)."""
_LIFETIME_MIN_S = 5.0
"""Below this a token would be renewed before it has been used."""
_LIFETIME_MAX_S = 3600.0
_TOKEN_BYTES_MAX = 16 * 1024

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TOKEN68 = re.compile(r"[A-Za-z0-9._~+/-]+=*(?=[ \t]*(?:,|$))")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_BARE = re.compile(r'[^\s,"]+')
"""Wider than RFC 9110's token: some registries leave out the quotes that the ':' and '/' of a realm need."""
_EQUALS = re.compile(r"[ \t]*=[ \t]*")
_BLANK = re.compile(r"[ \t]*")
_SEPARATOR = re.compile(r"[ \t,]*")
_QUOTABLE = re.compile(r"[ !#-\[\]-~]{1,1000}")
_SCOPE = re.compile(r"[!#-\[\]-~]{1,200}")
_BEARER = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge: its scheme and parameter names in lower case, values as sent, the first of equals."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    token68: str = ""


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """Return the challenges of all WWW-Authenticate values, in order, at most 16.

    A value may hold several challenges and a challenge commas within quotes. Where a value stops making
    sense the challenge it broke off in is dropped with what follows; the ones before it stand.
    """
    challenges: list[Challenge] = []
    for value in values:
        challenges += _parse_value(value[:_VALUE_CHARACTERS_MAX])
    return challenges[:_CHALLENGES_MAX]


def _parse_value(value: str) -> list[Challenge]:
    found: list[tuple[str, dict[str, str], str]] = []
    position = _skip(_SEPARATOR, value, 0)
    while position < len(value):
        name = _TOKEN.match(value, position)
        if name is None:
            return _challenges(found[:-1])
        equals = _EQUALS.match(value, name.end())
        if equals is None:
            token68 = _TOKEN68.match(value, _skip(_BLANK, value, name.end()))
            found.append((name[0].lower(), {}, token68[0] if token68 else ""))
            position = _skip(_SEPARATOR, value, token68.end() if token68 else name.end())
            continue
        parsed = _parse_parameter_value(value, equals.end())
        if parsed is None or not found:
            return _challenges(found[:-1])
        text, end = parsed
        found[-1][1].setdefault(name[0].lower(), text)
        position = _skip(_SEPARATOR, value, end)
    return _challenges(found)


def _challenges(found: list[tuple[str, dict[str, str], str]]) -> list[Challenge]:
    return [Challenge(scheme, parameters, token68) for scheme, parameters, token68 in found]


def _parse_parameter_value(value: str, position: int) -> tuple[str, int] | None:
    quoted = _QUOTED.match(value, position)
    if quoted:
        return re.sub(r"\\(.)", r"\1", quoted[1]), quoted.end()
    bare = _BARE.match(value, position)
    return (bare[0], bare.end()) if bare else None


def _skip(pattern: re.Pattern[str], value: str, position: int) -> int:
    match = pattern.match(value, position)
    return match.end() if match else position


def format_challenge(challenge: Challenge) -> str:
    """Return a Basic or Bearer challenge as a header value: the parameters that clients use, quoted, or ""."""
    parameters = {name: challenge.parameters.get(name, "") for name in ("realm", "service", "scope")}
    kept = [f'{name}="{value}"' for name, value in parameters.items() if value and _QUOTABLE.fullmatch(value)]
    if not kept or not kept[0].startswith("realm="):
        return ""
    return f"{challenge.scheme.capitalize()} {','.join(kept)}"


def pull_scopes(repository_name: str, challenge: Challenge) -> tuple[str, ...]:
    """Return the scopes to ask a token for: ours to pull, and what the challenge names beside repositories.

    A `repository:` scope of the challenge is not echoed: it could ask for more than a pull. Others
    (`aws` at public.ecr.aws) are the registry's own and must be.
    """
    said = challenge.parameters.get("scope", "").split()
    others = [scope for scope in said[:4] if not scope.startswith("repository:") and _SCOPE.fullmatch(scope)]
    return (f"repository:{repository_name}:pull", *others)


@dataclass(frozen=True, slots=True)
class BearerToken:
    """A token and for how long it is good, counted from when it was asked for."""

    value: str = field(repr=False)
    lifetime_s: float


def parse_token_answer(body: bytes) -> BearerToken:
    """Return the token of a token service's 200 answer (`token`, else `access_token`; default 60 s).

    Raises:
        InvalidInput: no usable token in it; the message has nothing of the body.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidInput("the token service's answer is not JSON") from None
    answer = answer if isinstance(answer, dict) else {}
    token = answer.get("token") or answer.get("access_token")
    if not isinstance(token, str) or len(token) > _TOKEN_BYTES_MAX or not _BEARER.fullmatch(token):
        raise InvalidInput("the token service's answer has no usable token")
    lifetime = answer.get("expires_in")
    if not isinstance(lifetime, int | float) or isinstance(lifetime, bool) or not lifetime > 0:
        lifetime = _LIFETIME_DEFAULT_S
    return BearerToken(token, float(min(max(lifetime, _LIFETIME_MIN_S), _LIFETIME_MAX_S)))
