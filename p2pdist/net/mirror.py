# SPDX-License-Identifier: Apache-2.0
"""The `/v2/` endpoint that container runtimes pull through.

Owns: which answer of distribution-spec each request gets, and how each failure is worded. Refuses pushes, what the
source does not grant the caller (401 with the origin's challenge where the caller's own credentials count, else 404:
the runtime then asks the origin itself), and to answer 429 (containerd would ask six times more instead of falling
back).

Invariants: headers go out within the answer deadline, or 503 does; after an error before the headers the runtime falls
back to the origin, after one in the body it sees the connection cut; every answer names its API version; a reader that
the source opened is closed by this module or by the response that carries it.
"""

from __future__ import annotations

import json
import secrets
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, assert_never

import structlog
import trio
from prometheus_client import Counter, Histogram

from p2pdist.core.access import Caller
from p2pdist.core.oci import OCI_INDEX, ErrorCode, error_body
from p2pdist.core.ranges import (
    Span,
    content_range,
    if_range_holds,
    none_match_holds,
    part_heads,
    requested_spans,
    unsatisfied_range,
)
from p2pdist.core.referrers import EMPTY, FILTERED, fallback_tag, only_of_type
from p2pdist.core.routes import (
    BlobRoute,
    ListRoute,
    ManifestRoute,
    Ping,
    Refusal,
    Registries,
    SplitRoute,
    next_page,
    parse_target,
)
from p2pdist.errors import (
    DeniedByOrigin,
    IntegrityError,
    InvalidInput,
    NotFoundAtOrigin,
    OriginError,
    P2PDistError,
    PullFailed,
)
from p2pdist.net.http_messages import FileBody, PartsBody, Request, Response

if TYPE_CHECKING:
    from collections.abc import Collection

    from prometheus_client import CollectorRegistry

    from p2pdist.core.types import Digest, Repository
    from p2pdist.net.http_messages import Exchange
    from p2pdist.ports import BlobReader, ImageSource

ContentRoute = ManifestRoute | BlobRoute | ListRoute

log = structlog.get_logger(__name__)

_VERSION = ("Docker-Distribution-Api-Version", "registry/2.0")
_OCTETS = ("Content-Type", "application/octet-stream")
_RANGES = ("Accept-Ranges", "bytes")
_JSON = ("Content-Type", "application/json")
_ALL = "bytes=0-"
"""How containerd asks whether it may fetch parts of a layer at once. It may not: what it fetches from an agent of its
own node gains nothing by that, and its readers of parts do not go on at the origin when the agent is gone."""

_HOP = "x-p2pdist-hop"
_ALLOW = ("Allow", "GET, HEAD")
_RELAYED_HEADERS = ("content-type", "oci-filters-applied")
_LIST_ERRORS: dict[int, type[OriginError]] = {404: NotFoundAtOrigin, 401: DeniedByOrigin, 403: DeniedByOrigin}
_UNKNOWN = {
    ManifestRoute: ErrorCode.MANIFEST_UNKNOWN,
    BlobRoute: ErrorCode.BLOB_UNKNOWN,
    ListRoute: ErrorCode.NAME_UNKNOWN,
}
_KINDS = {ManifestRoute: "manifest", BlobRoute: "blob", ListRoute: "list"}
_FIRST_BYTE_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long a runtime waits, in seconds; containerd 2.3 itself gives up after 30.

    Args:
        manifest_s: to the answer about a manifest, tags or referrers.
        blob_s: to a source of a blob.
        first_chunk_s: then, how long the headers wait for the first bytes: what fails in this time is still answered
            with 503, and the runtime falls back at once.
    """

    manifest_s: float = 12.0
    blob_s: float = 20.0
    first_chunk_s: float = 5.0


class MirrorMetrics:
    """What the mirror counts, registered where the caller says."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counts: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        """Looked up by kind and status, as the libraries' own look-up costs more than counting."""
        self._requests = Counter(
            "p2pdist_mirror_requests",
            "Requests of runtimes, by kind and status.",
            ["kind", "status"],
            registry=registry,
        )
        self._sent = Counter("p2pdist_mirror_sent_bytes", "Bytes of bodies sent to runtimes.", registry=registry)
        self._cut = Counter("p2pdist_mirror_cut", "Answers that ended early, on either side.", registry=registry)
        self._first_byte = Histogram(
            "p2pdist_mirror_first_byte_seconds",
            "From a request to the first byte of its answer.",
            ["kind"],
            registry=registry,
            buckets=_FIRST_BYTE_BUCKETS_S,
        )

        self.sent_bytes = 0

    def count(self, exchange: Exchange) -> None:
        self.sent_bytes += exchange.sent_bytes
        key = exchange.kind, exchange.status
        if key not in self._counts:
            requests = self._requests.labels(exchange.kind, str(exchange.status))
            self._counts[key] = requests, self._first_byte.labels(exchange.kind)
        requests, first_byte = self._counts[key]
        requests.inc()
        first_byte.observe(exchange.first_byte_s)
        self._sent.inc(exchange.sent_bytes)
        if not exchange.complete:
            self._cut.inc()


class Mirror:
    """An `http_messages.Application` over an `ImageSource`.

    Args:
        registries: names of the registries that may be asked for; see `core.routes.Registries`.
        default_registry: the registry of requests that name none.
        any_registry: whether every public registry may be asked for as well.
    """

    def __init__(
        self,
        source: ImageSource,
        registries: Collection[str],
        default_registry: str,
        *,
        any_registry: bool = False,
        metrics: MirrorMetrics | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._source = source
        self.registries = Registries(frozenset(registries), default_registry, any_registry)
        """May be replaced at any time."""
        self._metrics = metrics
        self._deadlines = deadlines or Deadlines()

    async def handle(self, request: Request) -> Response:
        if request.method not in ("GET", "HEAD"):
            return _error(405, ErrorCode.UNSUPPORTED, "a mirror is read-only: push to the registry", (_ALLOW,))
        if request.header(_HOP) is not None:
            return _error(404, ErrorCode.UNSUPPORTED, "this comes from a mirror already")
        route = parse_target(request.target, self.registries)
        match route:
            case Ping():
                return Response(200, (_VERSION, _JSON), b"{}", "ping")
            case SplitRoute():
                return self._split(route)
            case Refusal():
                return _error(route.status, route.code, route.message)
            case _:
                return await self._ask(route, request)

    def _split(self, route: SplitRoute) -> Response:
        split = self._source.split(route.digest)
        if split is None:
            return _error(404, ErrorCode.BLOB_UNKNOWN, "nothing of this blob is here")
        return Response(200, (_VERSION, _JSON), json.dumps(asdict(split)).encode())

    def refuse(self, status: int, message: str) -> Response:
        return _error(status, ErrorCode.UNKNOWN if status >= 500 else ErrorCode.UNSUPPORTED, message)

    def finished(self, exchange: Exchange) -> None:
        if self._metrics is not None:
            self._metrics.count(exchange)

    async def _ask(self, route: ContentRoute, request: Request) -> Response:
        """Answer from the source, or say why there is no answer."""
        deadline_s = self._deadlines.blob_s if isinstance(route, BlobRoute) else self._deadlines.manifest_s
        try:
            with trio.fail_after(deadline_s):
                match route:
                    case ManifestRoute():
                        return await self._manifest(route, request)
                    case BlobRoute():
                        return await self._blob(route, request)
                    case ListRoute():
                        return await self._list(route, request)
                    case _:
                        assert_never(route)
        except trio.TooSlowError:
            return _unavailable(route, f"no answer about {route} within {deadline_s:g} s")
        except P2PDistError as error:
            return _failure(route, error)

    async def _manifest(self, route: ManifestRoute, request: Request) -> Response:
        body = b""
        if request.method == "HEAD":
            info = await self._source.resolve(route.repository, route.reference, _caller(request))
        else:
            manifest = await self._source.manifest(route.repository, route.reference, _caller(request))
            info, body = manifest.info, manifest.body
        headers = (*_identity(route.repository, info.digest), ("Content-Type", info.media_type))
        if not none_match_holds(request.header("if-none-match"), _etag(info.digest)):
            return Response(304, headers, b"", _kind(route))
        return Response(200, headers, body, _kind(route), info.size_bytes)

    async def _blob(self, route: BlobRoute, request: Request) -> Response:
        if request.method == "HEAD":
            size_bytes = await self._source.blob_size(route.repository, route.digest, _caller(request))
            status = 200 if none_match_holds(request.header("if-none-match"), _etag(route.digest)) else 304
            return Response(status, _blob_headers(route), b"", _kind(route), size_bytes)
        with ExitStack() as closing:
            reader = await self._source.open_blob(route.repository, route.digest, _caller(request))
            closing.callback(reader.close)
            response = _blob_response(route, request, reader)
            if not isinstance(response.body, bytes):
                first = _first_span(response.body)
                with trio.move_on_after(self._deadlines.first_chunk_s):
                    first.ready = await reader.available(first.start, first.stop)
                closing.pop_all()
        return response

    async def _list(self, route: ListRoute, request: Request) -> Response:
        accept = request.header("accept") or "*/*"
        relayed = await self._source.relay(route.repository, route.target, accept, _caller(request))
        status = relayed.status_code
        if status == 404 and route.subject is not None:
            return await self._tagged_referrers(route, route.subject, _caller(request))
        if status != 200:
            raise _LIST_ERRORS.get(status, OriginError)(
                f"{route.repository.registry} answers {status} to {route}", status_code=status
            )
        headers = [_VERSION, _namespace(route.repository)]
        for name, value in relayed.headers:
            if name.lower() in _RELAYED_HEADERS:
                headers.append((name, value))
            elif name.lower() == "link" and (link := next_page(value, route)):
                headers.append(("Link", link))
        filtered = any(name.lower() == FILTERED[0].lower() for name, _ in headers)
        return _referrers(route, headers, relayed.body, filtered=filtered)

    async def _tagged_referrers(self, route: ListRoute, subject: Digest, caller: Caller) -> Response:
        """Answer for an origin without a referrers API from the tag that clients keep instead; without one, nothing."""
        body = EMPTY
        with suppress(NotFoundAtOrigin):
            manifest = await self._source.manifest(route.repository, fallback_tag(subject), caller)
            if manifest.media_type == OCI_INDEX:
                body = manifest.body
        headers = [_VERSION, _namespace(route.repository), ("Content-Type", OCI_INDEX)]
        return _referrers(route, headers, body, filtered=False)


def _referrers(route: ListRoute, headers: list[tuple[str, str]], body: bytes, *, filtered: bool) -> Response:
    """Return a list; one of referrers is filtered here where that was asked for and not done yet."""
    if route.artifact_type and not filtered:
        chosen = only_of_type(body, route.artifact_type)
        if chosen is not None:
            return Response(200, (*headers, FILTERED), chosen, _kind(route))
    return Response(200, tuple(headers), body, _kind(route))


def _caller(request: Request) -> Caller:
    return Caller.of(request.header("authorization"))


def _blob_response(route: BlobRoute, request: Request, reader: BlobReader) -> Response:
    """Return what a GET of a blob is answered with.

    Raises:
        InvalidInput: too many ranges.
    """
    source = ("P2pdist-Source", reader.source)
    headers = (*_blob_headers(route), source)
    etag, size_bytes = _etag(route.digest), reader.size_bytes
    if not none_match_holds(request.header("if-none-match"), etag):
        return Response(304, headers, b"", _kind(route))
    wanted = request.header("range") if if_range_holds(request.header("if-range"), etag) else None
    if wanted == _ALL and (request.header("user-agent") or "").startswith("containerd/"):
        wanted = None
    spans = requested_spans(wanted, size_bytes)
    if spans == ():
        extra = (("Content-Range", unsatisfied_range(size_bytes)), _namespace(route.repository))
        return _error(416, ErrorCode.UNSUPPORTED, f"the blob has {size_bytes} bytes", extra, _kind(route))
    if spans is None:
        return Response(200, headers, FileBody(reader, 0, size_bytes) if size_bytes else b"", _kind(route))
    if len(spans) > 1:
        boundary = secrets.token_hex(16)
        multipart = ("Content-Type", f"multipart/byteranges; boundary={boundary}")
        headers = (*_identity(route.repository, route.digest), multipart, _RANGES, source)
        return Response(206, headers, _parts(reader, spans, boundary), _kind(route))
    headers = (*headers, ("Content-Range", content_range(spans[0], size_bytes)))
    return Response(206, headers, FileBody(reader, spans[0].start, spans[0].stop), _kind(route))


def _parts(reader: BlobReader, spans: tuple[Span, ...], boundary: str) -> PartsBody:
    heads, tail = part_heads(spans, reader.size_bytes, _OCTETS[1], boundary)
    bodies = [FileBody(reader, span.start, span.stop) for span in spans]
    return PartsBody(reader, (*(part for pair in zip(heads, bodies, strict=True) for part in pair), tail))


def _first_span(body: FileBody | PartsBody) -> FileBody:
    return body if isinstance(body, FileBody) else next(part for part in body.parts if isinstance(part, FileBody))


def _etag(digest: Digest) -> str:
    return f'"{digest}"'


def _namespace(repository: Repository) -> tuple[str, str]:
    return ("OCI-Namespace", repository.registry)


def _identity(repository: Repository, digest: Digest) -> tuple[tuple[str, str], ...]:
    return (_VERSION, _namespace(repository), ("Docker-Content-Digest", digest), ("ETag", _etag(digest)))


def _blob_headers(route: BlobRoute) -> tuple[tuple[str, str], ...]:
    return (*_identity(route.repository, route.digest), _OCTETS, _RANGES)


def _kind(route: ContentRoute) -> str:
    return _KINDS[type(route)]


def _error(
    status: int,
    code: ErrorCode,
    message: str,
    headers: tuple[tuple[str, str], ...] = (),
    kind: str = "other",
    detail: object = None,
) -> Response:
    return Response(status, (_VERSION, _JSON, *headers), error_body(code, message, detail), kind)


def _unavailable(route: ContentRoute, message: str) -> Response:
    """503: the runtime goes to the origin itself."""
    log.warning("mirror.unavailable", image=str(route.repository), reason=message)
    return _error(503, ErrorCode.UNAVAILABLE, message, (_namespace(route.repository),), _kind(route))


def _failure(route: ContentRoute, error: P2PDistError) -> Response:
    """Word an error that came before the headers; the origin's own verdict counts where there is one."""
    verdict = _verdict(error)
    extra, kind = (_namespace(route.repository),), _kind(route)
    match verdict:
        case NotFoundAtOrigin():
            return _error(404, _UNKNOWN[type(route)], str(verdict), extra, kind)
        case DeniedByOrigin(challenges=challenges) if challenges:
            asked = tuple(("WWW-Authenticate", challenge) for challenge in challenges)
            return _error(401, ErrorCode.UNAUTHORIZED, str(verdict), (*extra, *asked), kind)
        case DeniedByOrigin():
            detail = {"origin_status": verdict.status_code, "advice": "ask the registry itself, with your credentials"}
            return _error(404, ErrorCode.DENIED, str(verdict), extra, kind, detail)
        case InvalidInput():
            code = ErrorCode.MANIFEST_INVALID if isinstance(route, ManifestRoute) else ErrorCode.UNSUPPORTED
            return _error(400, code, str(verdict), extra, kind)
        case IntegrityError() if isinstance(route, ManifestRoute):
            return _error(502, ErrorCode.MANIFEST_INVALID, str(verdict), extra, kind)
        case _:
            return _unavailable(route, str(verdict))


def _verdict(error: P2PDistError) -> P2PDistError:
    """Return what the origin said of the content, out of a pull that failed at all its sources; else the error."""
    if isinstance(error, PullFailed):
        for cause in error.causes:
            if isinstance(cause, NotFoundAtOrigin | DeniedByOrigin):
                return cause
    return error
