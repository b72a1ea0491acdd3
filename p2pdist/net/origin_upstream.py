# SPDX-License-Identifier: Apache-2.0
"""One upstream registry: a request with its redirects and challenges, retries, and errors in words.

Owns: how a single question gets its answer. What is asked, and what a good answer is worth, is `origin`'s.
Invariants: Authorization goes to the registry's own scheme, host and port only; https is never left for
http; hosts other than the registry's and those configured with it are dialled only where they are public;
error texts name servers, never paths or queries behind a redirect.
"""

from __future__ import annotations

import functools
import json
import re
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeVar

import httpx
import trio

from p2pdist.core.access import not_for_everybody
from p2pdist.core.retry import RETRYABLE_STATUSES, backoff_s, parse_http_date, parse_retry_after
from p2pdist.errors import ConfigError, DeniedByOrigin, NotFoundAtOrigin, OriginError
from p2pdist.net.origin_auth import Access, Authenticator, Level, Shown
from p2pdist.net.origin_connection import Unreachable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection
    from random import Random

    from p2pdist.core.access import AccessRule, Caller
    from p2pdist.core.types import Repository
    from p2pdist.net.credentials import CredentialSource
    from p2pdist.net.origin_connection import Headers
    from p2pdist.net.origin_transport import Answer, Transport

T = TypeVar("T")

SMALL_BYTES_MAX = 64 * 1024
"""How much of an error's or redirect's body is read to keep its connection."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_REDIRECTS_MAX = 5
_EXCHANGES_MAX = 12
_RETRY_AFTER_MAX_S = 30.0
_CODE = re.compile(r"[A-Z][A-Z_]{0,39}")
_COMMON_HEADERS = [(b"User-Agent", b"p2pdist"), (b"Accept-Encoding", b"identity")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long to wait, in seconds, and how often to try.

    `manifest_s` and `fetch_s` bound a whole call with its retries: a runtime waits for the first, a lease
    for the second. `location_s` is how long the place that a blob was redirected to is used without asking.
    """

    connect_s: float = 5.0
    header_s: float = 15.0
    stall_s: float = 15.0
    manifest_s: float = 10.0
    fetch_s: float = 300.0
    tries: int = 4
    backoff_s: float = 0.25
    backoff_max_s: float = 8.0
    location_s: float = 30.0


@dataclass(slots=True)
class Counters:
    """What a registry has cost: requests, bytes of bodies, retries, and calls that failed."""

    requests: int = 0
    bytes: int = 0
    retries: int = 0
    errors: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Upstream:
    """One registry.

    Args:
        name: as runtimes name it; `base` is its URL.
        transport: for the registry's own host and `hosts`; `elsewhere` for the others, where it redirects or
            names a token service.
        rule_of: says whose rights count for a repository.
    """

    def __init__(
        self,
        name: str,
        base: httpx.URL,
        transport: Transport,
        elsewhere: Transport,
        hosts: Collection[str],
        credentials: CredentialSource | None,
        rule_of: Callable[[Repository], AccessRule],
        deadlines: Deadlines,
        rng: Random,
    ) -> None:
        self.name = name
        self.counters = Counters()
        self.auth = Authenticator(name, base, credentials, self.exchange, rule_of)
        self._base = base
        self._prefix = str(base).rstrip("/")
        self._transport = transport
        self._elsewhere = elsewhere
        self._hosts = frozenset(host.lower() for host in hosts)
        self._deadlines = deadlines
        self._rng = rng

    def url(self, repository: Repository, rest: str) -> httpx.URL:
        """Return the URL of something in a repository; both have been checked by the caller."""
        return _parsed(f"{self._prefix}/v2/{repository.name}/{rest}")

    def is_at(self, url: httpx.URL) -> bool:
        """Return whether `url` is on the registry itself rather than where it redirects."""
        return (url.scheme, url.host, url.port) == (self._base.scheme, self._base.host, self._base.port)

    def _is_meant(self, url: httpx.URL) -> bool:
        """Return whether the configuration names this host, so that it may be anywhere."""
        return url.host == self._base.host or not self._hosts.isdisjoint((url.host, url.netloc.decode("ascii")))

    async def exchange(self, method: str, url: httpx.URL, headers: Headers, content: bytes = b"") -> Answer:
        """Make one request and return its answer when the headers are here; the caller closes it.

        Raises:
            Unreachable, OriginError.
        """
        self.counters.requests += 1
        headers = [(b"Host", url.netloc), *_COMMON_HEADERS, *headers]
        if content:
            headers.append((b"Content-Length", b"%d" % len(content)))
        with trio.move_on_after(self._deadlines.header_s):
            if self._is_meant(url):
                return await self._transport.send(method, url, headers, content)
            try:
                return await self._elsewhere.send(method, url, headers, content)
            except NotFoundAtOrigin:
                where = url.netloc.decode("ascii")
                raise OriginError(
                    f"{self.name} sends us to {where}, which is not on the public internet; if that is meant, add "
                    f'hosts = ["{where}"] to [registries."{self.name}"]'
                ) from None
        raise Unreachable(f"no answer from {url.netloc.decode('ascii')} in {self._deadlines.header_s:g} s")

    async def ask(
        self,
        repository: Repository,
        method: str,
        url: httpx.URL,
        headers: Headers,
        *,
        content: bool = True,
        caller: Caller | None = None,
    ) -> Answer:
        """Return the answer behind redirects and challenges; the caller closes it.

        Args:
            content: whether a good answer shows that who asked may read the repository.
            caller: ask with this caller's rights and no others; None: with those of the repository's rule.

        Raises:
            Unreachable, OriginError: also a redirect that is not followed.
        """
        access = self.auth.access(repository)
        tried: set[Level] = set()
        shown: Shown | None = None
        redirects = 0
        for _ in range(_EXCHANGES_MAX):
            ours = self.is_at(url)
            if ours:
                shown = await self._shown(access, caller)
            extra = [] if shown is None or not ours else [(b"Authorization", shown.value.encode())]
            answer = await self.exchange(method, url, [*headers, *extra])
            try:
                if answer.status in _REDIRECTS:
                    redirects += 1
                    url = self._redirected(answer, redirects)
                    await answer.read(SMALL_BYTES_MAX)
                    continue
                if ours and answer.status in (401, 403, 429):
                    await answer.read(SMALL_BYTES_MAX)
                    if caller is None and await self.auth.renew(access, answer, shown, tried):
                        continue
                elif content and (answer.status < 300 or answer.status == 304):
                    access.succeeded(shown)
            except BaseException:
                await answer.aclose()
                raise
            return answer
        raise OriginError(f"{self.name} redirects and challenges without end")

    async def _shown(self, access: Access, caller: Caller | None) -> Shown | None:
        if caller is None:
            return await self.auth.shown(access)
        return Shown(caller.authorization, Level.CREDENTIALS, float("inf")) if caller.authorization else None

    def _redirected(self, answer: Answer, count: int) -> httpx.URL:
        try:
            url = answer.url.join(answer.headers.get("location", "")).copy_with(fragment=None)
        except httpx.InvalidURL:
            raise OriginError(f"{answer.server} redirects to what is no URL", status_code=answer.status) from None
        if count > _REDIRECTS_MAX:
            raise OriginError(f"{self.name} redirects more than {_REDIRECTS_MAX} times", status_code=answer.status)
        allowed = ("https", "http") if self._base.scheme == "http" else ("https",)
        if url.scheme not in allowed or not url.host or url.userinfo:
            message = f"{answer.server} redirects to another place without https; that is not followed"
            raise OriginError(message, status_code=answer.status)
        return url

    async def expect(self, answer: Answer, repository: Repository, *statuses: int) -> None:
        """Return where the answer's status is one of `statuses`, or read and close it and say what it means.

        Raises:
            NotFoundAtOrigin: 404, DeniedByOrigin: 401 and 403, OriginError: any other.
        """
        if answer.status in statuses:
            return
        code = _error_code(await answer.read(SMALL_BYTES_MAX)) if self.is_at(answer.url) else ""
        said = f"HTTP {answer.status} {code}".rstrip()
        if answer.status == 404:
            raise NotFoundAtOrigin(f"not found at {answer.server} ({said})", status_code=404)
        if answer.status in (401, 403):
            challenges = self.auth.relayed_challenges(repository, answer) if self.is_at(answer.url) else ()
            message = self._denial(answer, repository, said)
            raise DeniedByOrigin(message, status_code=answer.status, challenges=challenges)
        # A date counts by the server's own clock: ours may be an hour off.
        sent_at = parse_http_date(answer.headers.get("date", ""))
        retry_after_s = parse_retry_after(answer.headers.get("retry-after", ""), sent_at or time.time())
        message = f"{answer.server} answered {said}"
        raise OriginError(message, status_code=answer.status, retry_after_s=retry_after_s)

    def _denial(self, answer: Answer, repository: Repository, said: str) -> str:
        if not self.is_at(answer.url):
            return f"{answer.server}, to which {self.name} redirects, refuses it ({said})"
        access = self.auth.access(repository)
        if access.rule.mode == "passthrough":
            return f"{answer.server} refuses it to this caller ({said})"
        if access.level >= Level.CREDENTIALS:
            return f"{answer.server} refuses it to the credentials configured for {self.name} ({said})"
        if access.rule.mode == "node-credentials":
            return f"{answer.server} refuses it without credentials, and none are configured for {self.name} ({said})"
        return not_for_everybody(repository, said)

    async def retrying(self, what: str, once: Callable[[], Awaitable[T]], deadline_s: float) -> T:
        """Return what `once` does, tried again after passing failures.

        Args:
            what: the image or blob, to begin the error's text with.
            deadline_s: for all tries together.

        Raises:
            OriginError: the last try's, or that the deadline passed.
        """
        failure: OriginError | None = None
        with trio.move_on_after(deadline_s) as scope:
            for attempt in range(self._deadlines.tries):
                try:
                    return await once()
                except OriginError as error:
                    failure = error
                wait_s = self._wait_s(failure, attempt)
                last = attempt + 1 == self._deadlines.tries
                if wait_s is None or last or trio.current_time() + wait_s >= scope.deadline:
                    break
                self.counters.retries += 1
                await trio.sleep(wait_s)
        self.counters.errors += 1
        if failure is None or scope.cancelled_caught:
            before = f" (before: {failure})" if failure else ""
            raise OriginError(f"{what}: {self.name} did not deliver within {deadline_s:g} s{before}")
        message = f"{what}: {failure}"
        if isinstance(failure, DeniedByOrigin):
            raise DeniedByOrigin(message, status_code=failure.status_code, challenges=failure.challenges) from failure
        kind = OriginError if isinstance(failure, Unreachable) else type(failure)
        raise kind(message, status_code=failure.status_code, retry_after_s=failure.retry_after_s) from failure

    def _wait_s(self, failure: OriginError, attempt: int) -> float | None:
        """Return how long to wait before the next try, or None where none would help."""
        if not isinstance(failure, Unreachable) and failure.status_code not in RETRYABLE_STATUSES:
            return None
        wait_s = backoff_s(attempt, self._deadlines.backoff_s, self._deadlines.backoff_max_s, self._rng)
        return max(wait_s, min(failure.retry_after_s or 0.0, _RETRY_AFTER_MAX_S))


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> httpx.URL:
    """Parsing costs 60 us, and a blob's URL is asked for once for each of its chunks."""
    return httpx.URL(text)


def parse_base_url(registry: str, text: str) -> httpx.URL:
    """Return a registry's base URL, or raise ConfigError."""
    problem = ConfigError(f"registry {registry}: {text[:200]!r} is not http(s)://HOST[:PORT][/PATH]")
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        raise problem from None
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise problem
    if url.userinfo:  # not quoted: it may hold a password
        raise ConfigError(f"registry {registry}: no user or password in the URL; use a Docker credentials file")
    return url


def _error_code(body: bytes) -> str:
    """Return the code of an OCI error body; its message stays unsaid, for it may quote what we sent."""
    try:
        code = json.loads(body)["errors"][0]["code"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return ""
    return code if isinstance(code, str) and _CODE.fullmatch(code) else ""
