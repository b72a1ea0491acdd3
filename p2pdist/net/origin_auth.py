# SPDX-License-Identifier: Apache-2.0
"""How the origin client becomes entitled to read a repository of one registry.

Owns: the order in which entitlements are tried, tokens and their renewal, whether a repository is public.
A repository is asked for openly first, then with an anonymous token, and, where its rule says
`node-credentials`, when both are refused (or limited, 429) with the credentials of this node, at last with
credentials asked for anew. So what was read before credentials came in is known to be public. Where its rule
says `passthrough`, only what a caller lent is shown: a header that the origin has just accepted from a runtime.

Invariants: credentials of this node go only to the registry itself or to the https token service that it named (http
only where the registry is configured as http); one token request at a time for a repository; nothing
secret is in a repr or an error text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import httpx
import trio

from p2pdist.core.challenge import (
    BearerToken,
    Challenge,
    format_challenge,
    parse_challenges,
    parse_token_answer,
    pull_scopes,
)
from p2pdist.core.retry import RETRYABLE_STATUSES
from p2pdist.errors import ConfigError, DeniedByOrigin, InvalidInput, OriginError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from p2pdist.core.access import AccessRule, Caller
    from p2pdist.core.types import Repository
    from p2pdist.net.credentials import Credentials, CredentialSource
    from p2pdist.net.origin_connection import Headers
    from p2pdist.net.origin_transport import Answer

    Send = Callable[[str, httpx.URL, Headers, bytes], Awaitable[Answer]]

_TOKEN_ANSWER_BYTES_MAX = 64 * 1024
_RECLASSIFY_S = 600.0
"""How long a repository is taken to need credentials before it is asked openly again."""
_BASIC_S = 60.0
"""How long a password is shown before the file that holds it is read again."""
_LENT_S = 3600.0
"""How long a caller's header fetches what that caller asked for; the origin may well end it earlier."""
_ACCESSES_MAX = 1024


class Level(IntEnum):
    """What a request shows, in the order of trying."""

    OPEN = 0
    ANONYMOUS_TOKEN = 1
    CREDENTIALS = 2
    FRESH_CREDENTIALS = 3


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """An Authorization header: at which level it was obtained, and until when to use it."""

    value: str = field(repr=False)
    level: Level
    expires_at: float


@dataclass(slots=True)
class Access:
    """What is known of reading one repository."""

    repository: Repository
    rule: AccessRule
    level: Level = Level.OPEN
    public: bool = False
    public_at: float = 0.0
    challenge: Challenge | None = None
    shown: Shown | None = None
    raised_at: float = 0.0
    credentials: Credentials | None = None
    lock: trio.Lock = field(default_factory=trio.Lock, repr=False)

    def succeeded(self, shown: Shown | None) -> None:
        """Note that content was read with `shown`, which need not be what is shown now."""
        if shown is None or shown.level < Level.CREDENTIALS:
            self.public, self.public_at = True, trio.current_time()


class Authenticator:
    """The entitlements at one registry.

    Args:
        registry: its name; `base` its URL.
        source: the credentials; None where there are none.
        send: makes one request, with neither authorisation nor redirects.
        rule_of: says whose rights count for a repository; when its answer changes, all that was obtained is dropped.
    """

    def __init__(
        self,
        registry: str,
        base: httpx.URL,
        source: CredentialSource | None,
        send: Send,
        rule_of: Callable[[Repository], AccessRule],
    ) -> None:
        self._registry = registry
        self._base = base
        self._source = source
        self._send = send
        self._rule_of = rule_of
        self._accesses: dict[str, Access] = {}

    def access(self, repository: Repository) -> Access:
        """Return the state of a repository; the oldest of more than 1024 is forgotten."""
        access, rule = self._accesses.get(repository.name), self._rule_of(repository)
        if access is None or access.rule != rule:
            while len(self._accesses) >= _ACCESSES_MAX:
                del self._accesses[next(iter(self._accesses))]
            access = self._accesses[repository.name] = Access(repository, rule)
        return access

    def lend(self, repository: Repository, caller: Caller) -> None:
        """Show from now on what a caller showed, with which the origin has just served this repository."""
        access = self.access(repository)
        if access.rule.mode == "passthrough":
            expires_at = trio.current_time() + _LENT_S
            access.shown = Shown(caller.authorization, Level.CREDENTIALS, expires_at) if caller.authorization else None

    def is_public(self, repository: Repository) -> bool:
        """Return whether content was read without credentials and nothing since has spoken against it."""
        access = self._accesses.get(repository.name)
        return access is not None and access.public

    async def shown(self, access: Access) -> Shown | None:
        """Return what to show now; a token about to expire is renewed first."""
        now = trio.current_time()
        if access.rule.mode == "passthrough":
            if access.shown is not None and now >= access.shown.expires_at:
                access.shown = None
            return access.shown
        if access.level >= Level.CREDENTIALS and now - access.raised_at > _RECLASSIFY_S:
            access.level, access.shown = Level.OPEN, None
        if access.shown is None or now < access.shown.expires_at:
            return access.shown
        async with access.lock:
            if access.shown is not None and trio.current_time() >= access.shown.expires_at:
                await self._obtain(access, access.level)
            return access.shown

    async def renew(self, access: Access, answer: Answer, refused: Shown | None, tried: set[Level]) -> bool:
        """Find something else to show after a 401, 403 or 429; whether there is.

        Args:
            answer: the refusal.
            refused: what had been shown.
            tried: the levels obtained for the present request; grows.

        Raises:
            OriginError: the token service failed; DeniedByOrigin: it may not be asked.
        """
        async with access.lock:
            if access.shown is not None and access.shown is not refused:
                return True  # another request was refused before and has seen to it
            if access.rule.mode == "passthrough":
                access.shown = None
                return False
            challenges = parse_challenges(answer.headers.get_list("www-authenticate"))
            access.challenge = _choose(challenges) or access.challenge
            for level in Level:
                if level in tried or level < self._lowest(access, answer.status):
                    continue
                tried.add(level)
                found = await self._obtain(access, level)
                # A limit says nothing of who may read, but hides it: what is known holds for a while.
                lately = trio.current_time() - access.public_at <= _RECLASSIFY_S
                if level >= Level.CREDENTIALS and not (answer.status == 429 and lately):
                    access.public = False
                if found:
                    return True
            return False

    def _lowest(self, access: Access, status: int) -> Level:
        """An anonymous token answers a 401 only: a 403 or 429 means that being nobody is not enough."""
        return max(access.level, Level.ANONYMOUS_TOKEN if status == 401 else Level.CREDENTIALS)

    async def _obtain(self, access: Access, level: Level) -> bool:
        """Set what `level` shows; whether there is such. Called with the lock held."""
        credentials = None
        if level >= Level.CREDENTIALS:
            credentials = await self._credentials(access, fresh=level is Level.FRESH_CREDENTIALS)
            if credentials is None:
                return False
            access.level, access.credentials, access.raised_at = Level.CREDENTIALS, credentials, trio.current_time()
        challenge = access.challenge
        if challenge is None:
            return False
        if challenge.scheme == "basic":
            if credentials is None or credentials.identity:  # an identity token is no password
                return False
            access.shown = Shown(credentials.basic(), Level.CREDENTIALS, trio.current_time() + _BASIC_S)
            return True
        asked_at = trio.current_time()
        token = await self._ask_token(access.repository, challenge, credentials)
        if token is None:
            return False
        access.level = max(access.level, min(level, Level.CREDENTIALS))
        expires_at = asked_at + token.lifetime_s - min(10.0, token.lifetime_s / 5)
        access.shown = Shown(f"Bearer {token.value}", access.level, expires_at)
        return True

    async def _credentials(self, access: Access, *, fresh: bool) -> Credentials | None:
        """Return the credentials to try; asked for anew, only where they are others than those just refused."""
        if self._source is None or access.rule.mode != "node-credentials" or (fresh and access.credentials is None):
            return None
        try:
            found = await self._source.get(access.repository, file=access.rule.credentials, fresh=fresh)
            return None if fresh and found == access.credentials else found
        except ConfigError as error:
            raise DeniedByOrigin(f"{self._registry} asks for credentials, but {error}", status_code=401) from error

    async def _ask_token(
        self, repository: Repository, challenge: Challenge, credentials: Credentials | None
    ) -> BearerToken | None:
        """Return a token to pull from `repository`, or None where the token service refuses one."""
        realm = self._realm(challenge)
        fields = [("scope", scope) for scope in pull_scopes(repository.name, challenge)]
        if service := challenge.parameters.get("service"):
            fields.append(("service", service))
        if credentials is not None and credentials.identity:
            joined = " ".join(scope for name, scope in fields if name == "scope")
            form = {"grant_type": "refresh_token", "refresh_token": credentials.secret, "client_id": "p2pdist"}
            form |= {"service": service or "", "scope": joined}
            answer = await self._send("POST", realm, [_FORM], urlencode(form).encode())
        else:
            headers = [] if credentials is None else [(b"Authorization", credentials.basic().encode())]
            answer = await self._send(
                "GET", realm.copy_with(params=[*realm.params.multi_items(), *fields]), headers, b""
            )
        return await self._read_token(answer)

    async def _read_token(self, answer: Answer) -> BearerToken | None:
        body = await answer.read(_TOKEN_ANSWER_BYTES_MAX)
        if answer.status == 200:
            try:
                return parse_token_answer(body)
            except InvalidInput as error:
                raise OriginError(f"{self._registry}: {error} ({answer.server})") from None
        if 400 <= answer.status < 500 and answer.status not in RETRYABLE_STATUSES:
            return None
        message = f"{self._registry}: its token service {answer.server} answered HTTP {answer.status}"
        raise OriginError(message, status_code=answer.status)

    def relayed_challenges(self, repository: Repository, answer: Answer) -> tuple[str, ...]:
        """Return the challenges that a caller whose own rights count may be asked to answer, in our own spelling."""
        if answer.status != 401 or self._rule_of(repository).mode != "passthrough":
            return ()
        challenges = parse_challenges(answer.headers.get_list("www-authenticate"))
        return tuple(filter(None, (self._relayed(challenge) for challenge in challenges)))

    def _relayed(self, challenge: Challenge) -> str:
        if challenge.scheme == "bearer":
            try:
                self._realm(challenge)
            except DeniedByOrigin:
                return ""
        elif challenge.scheme != "basic":
            return ""
        return format_challenge(challenge)

    def _realm(self, challenge: Challenge) -> httpx.URL:
        """Return where tokens are given.

        Raises:
            DeniedByOrigin: nowhere that we would ask, let alone send a password to.
        """
        try:
            realm = httpx.URL(challenge.parameters.get("realm", ""))
        except httpx.InvalidURL:
            realm = httpx.URL("")
        plain_allowed = self._base.scheme == "http"
        if (
            not (realm.scheme == "https" or (realm.scheme == "http" and plain_allowed))
            or not realm.host
            or realm.userinfo
        ):
            message = f"{self._registry} names a token service without https; it is not asked"
            raise DeniedByOrigin(message, status_code=401)
        return realm.copy_with(fragment=None)


_FORM = (b"Content-Type", b"application/x-www-form-urlencoded")


def _choose(challenges: list[Challenge]) -> Challenge | None:
    """Return the challenge to answer: tokens rather than passwords, wherever both will do."""
    for scheme in ("bearer", "basic"):
        for challenge in challenges:
            if challenge.scheme == scheme:
                return challenge
    return None
