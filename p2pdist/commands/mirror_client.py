# SPDX-License-Identifier: Apache-2.0
"""A registry client for one mirror, with containerd's naming (`?ns=`); the only user of httpx for pulls.

Refuses: a manifest over 4 MiB, a body longer than its descriptor, a resumed body that starts elsewhere.
Invariants: every wait has a deadline; a cut transfer is resumed a few times, then it is an error.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

import httpx
import trio

from p2pdist.core.oci import MANIFEST_BYTES_MAX, MANIFEST_TYPES
from p2pdist.core.types import Descriptor, Digest, Manifest, Repository, Split, parse_digest
from p2pdist.core.verify import digest_like
from p2pdist.errors import IntegrityError, P2PDistError, TransferError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from types import TracebackType

T = TypeVar("T")

TRIES = 5
"""Of one transfer; with the pauses between them some 8 s, enough for an agent to be restarted."""
PAUSE_S = 0.5
"""Before the first repetition; doubled before each further one."""

_TIMEOUTS = httpx.Timeout(60.0, connect=5.0)
_SPLIT_TIMEOUT_S = 2.0


class Sink(Protocol):
    @property
    def written_bytes(self) -> int: ...

    def write(self, data: bytes) -> None: ...


class MirrorClient:
    """Use as an async context manager.

    Args:
        url: the mirror's base, `http://127.0.0.1:5050`.
        transport: in the place of real connections.
    """

    def __init__(self, url: str, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        self._reached = False
        # No proxy from the environment: the mirror is this node's, or one that was named on purpose.
        self._http = httpx.AsyncClient(timeout=_TIMEOUTS, transport=transport, trust_env=False)

    async def __aenter__(self) -> MirrorClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await self._http.aclose()

    async def manifest(self, repository: Repository, reference: str) -> Manifest:
        """Return a manifest by tag or digest, its digest computed and, where one was asked for, checked.

        Raises:
            IntegrityError: it is not what its digest says.
            P2PDistError: the mirror refuses, or fails `TRIES` times.
        """

        async def once() -> Manifest:
            headers = {"Accept": ", ".join(MANIFEST_TYPES)}
            async with self._get(repository, f"manifests/{reference}", headers) as response:
                body = await _read_bounded(response)
                media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
                claimed = response.headers.get("Docker-Content-Digest", "")
            wanted = reference if ":" in reference else claimed
            digest = digest_like(parse_digest(wanted) if wanted else "sha256", body)
            expected = wanted or digest
            if digest != expected:
                raise IntegrityError(
                    f"manifest {repository} {reference} from {self.url} is wrong: expected {expected}, got {digest}",
                    expected=expected,
                    actual=digest,
                )
            return Manifest(digest, media_type, body)

        return await _persist(once)

    async def blob(
        self, repository: Repository, blob: Descriptor, sink: Sink, on_source: Callable[[str], None]
    ) -> None:
        """Write a blob into `sink` in order, from where it stands; after a cut go on by Range.

        Args:
            on_source: told what the mirror says of the bytes: `cache`, `swarm` or nothing.

        Raises:
            P2PDistError: the mirror refuses, sends what was not asked for, or fails `TRIES` times.
        """

        async def once() -> None:
            start = sink.written_bytes
            headers = {"Range": f"bytes={start}-"} if start else {}
            async with self._get(repository, f"blobs/{blob.digest}", headers) as response:
                on_source(response.headers.get("P2pdist-Source", ""))
                skip = start - _first_byte(response, start, blob.digest)

                def take(data: bytes) -> None:
                    nonlocal skip
                    sink.write(data[skip:])
                    skip = max(0, skip - len(data))

                await _consume(response, take)
            if sink.written_bytes < blob.size_bytes:
                raise TransferError(
                    f"{self.url} sent {sink.written_bytes} of the {blob.size_bytes} bytes of {blob.digest}"
                )

        await _persist(once)

    async def split(self, digest: Digest) -> Split | None:
        """Return where the agent had a blob's bytes from, or None where it does not tell."""
        try:
            response = await self._http.get(f"{self.url}/v2/_p2pdist/pulls/{digest}", timeout=_SPLIT_TIMEOUT_S)
            document = response.json() if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None
        if not isinstance(document, dict):
            return None
        counts = [document.get(key, 0) for key in ("from_peers", "from_origin", "from_cache")]
        return Split(*counts) if all(type(count) is int for count in counts) else None

    @asynccontextmanager
    async def _get(self, repository: Repository, target: str, headers: dict[str, str]) -> AsyncIterator[httpx.Response]:
        """Yield an open response of status 200 or 206; all that fails is a P2PDistError."""
        url = f"{self.url}/v2/{repository.name}/{target}"
        headers = {"Accept-Encoding": "identity", **headers}
        try:
            async with self._http.stream("GET", url, params={"ns": repository.registry}, headers=headers) as response:
                self._reached = True
                if response.status_code not in (200, 206):
                    raise await _refusal(response, self.url, f"{repository} {target}")
                yield response
        except httpx.ConnectError as error:
            # An agent that went away may come back; one that never answered is not running.
            kind = TransferError if self._reached else P2PDistError
            raise kind(
                f"nothing answers at {self.url} ({error}); start `p2pdist agent`, or name its mirror with --mirror URL"
            ) from error
        except httpx.TimeoutException as error:
            raise TransferError(f"{self.url} was silent for too long while sending {repository} {target}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise TransferError(
                f"{self.url} cut {repository} {target} short: {error or type(error).__name__}"
            ) from error


async def _persist(attempt: Callable[[], Awaitable[T]]) -> T:
    """Return what `attempt` returns; on a TransferError pause and repeat, `TRIES` times in all."""
    for repetition in range(TRIES - 1):
        try:
            return await attempt()
        except TransferError:
            await trio.sleep(PAUSE_S * 2**repetition)
    return await attempt()


async def _consume(response: httpx.Response, take: Callable[[bytes], None]) -> None:
    """Give the body to `take`, part by part.

    The loop is never left early, or httpx's nested generators would wait for the garbage collector: when
    `take` fails, the connection is closed, which ends them all, and then its error is raised.
    """
    failure: Exception | None = None
    try:
        async for data in response.aiter_raw():
            if failure is None:
                try:
                    take(data)
                except Exception as error:
                    failure = error
                    await response.aclose()
    except httpx.HTTPError:
        if failure is None:
            raise
    if failure is not None:
        raise failure


async def _read_bounded(response: httpx.Response) -> bytes:
    body = bytearray()

    def take(data: bytes) -> None:
        body.extend(data)
        if len(body) > MANIFEST_BYTES_MAX:
            raise P2PDistError(f"{response.url.path} has more than {MANIFEST_BYTES_MAX} bytes")

    await _consume(response, take)
    if (length := response.headers.get("Content-Length", "")).isdigit() and len(body) < int(length):
        raise TransferError(f"{response.url.path} was cut short")
    return bytes(body)


def _first_byte(response: httpx.Response, asked: int, digest: Digest) -> int:
    """Return the offset at which the body begins: what was asked for, or 0 where Range was passed over."""
    if response.status_code == 200:
        return 0
    given = response.headers.get("Content-Range", "")
    if not given.startswith(f"bytes {asked}-"):
        raise P2PDistError(f"the mirror resumed {digest} at {given[:60]!r}, not at byte {asked}")
    return asked


async def _refusal(response: httpx.Response, mirror: str, what: str) -> P2PDistError:
    """Return the error for a status that is no success; a TransferError where trying again may help."""
    reason = ""
    try:
        body = await _read_bounded(response)
        entry = httpx.Response(200, content=body).json()["errors"][0]
        reason = f": {entry.get('code', '')} {entry.get('message', '')}"[:300]
    except (P2PDistError, ValueError, LookupError, TypeError, AttributeError):
        pass
    line = f"{mirror} answered {response.status_code} to {what}{reason.rstrip()}"
    again = response.status_code in (408, 429) or response.status_code >= 500
    return TransferError(line) if again else P2PDistError(line)
