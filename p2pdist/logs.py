# SPDX-License-Identifier: Apache-2.0
"""Logging: one line per event on stderr, for people on a terminal, as JSON for programs, with priorities for journald.

Owns: how events look, and that no credential is ever in one: `redact` is the last step before a line is
made, for our own events and for those of the libraries, which are heard from `warning` on.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from typing import TextIO

    from structlog.typing import Processor

REDACTED = "[redacted]"

_SECRET_KEY = re.compile(r"authorization|cookie|password|passwd|secret|token|credential|api_?key", re.IGNORECASE)
_SECRETS = (
    # scheme://user:password@host
    (re.compile(r"(?<=://)[^\s/@'\"]+@"), f"{REDACTED}@"),
    # The query of a URL: signed URLs carry their signature there.
    (re.compile(r"(://[^\s?'\"]+\?)[^\s'\"#]+"), rf"\1{REDACTED}"),
    # A header's value; prose such as "Bearer challenge" has no digit, capital or equals sign.
    (re.compile(r"\b((?i:Bearer|Basic))\s+(?!realm=)(?=\S*[A-Z0-9=]|\S{20})[A-Za-z0-9+/=._~-]{6,}"), rf"\1 {REDACTED}"),
    # A JSON web token, wherever it stands.
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"), REDACTED),
    (re.compile(r"(?i)\b((?:access_|refresh_|identity)?token|password|secret)(['\"]?\s*[=:]\s*['\"]?)[^\s'\",&}]+"),
     rf"\1\2{REDACTED}"),
)  # fmt: skip
_DEPTH_MAX = 4
_PRIORITIES = {"critical": 2, "error": 3, "exception": 3, "warning": 4, "info": 6, "debug": 7}
"""syslog(3)'s, which journald takes from the beginning of a line: `<4>{...}`."""


def configure(level: str, style: str, *, stream: TextIO | None = None) -> None:
    """Send all logging to stderr; may be called again.

    Args:
        level: `debug`, `info`, `warning` or `error`; libraries are heard from `warning` on whatever it is.
        style: `console`, `json`, or `auto`: console where the stream is a terminal, JSON elsewhere. JSON that goes
            to journald begins with a priority, which journald takes off.
        stream: in the place of stderr.
    """
    stream = stream or sys.stderr
    terminal = stream.isatty()
    console = style == "console" or (style == "auto" and terminal)
    common = _processors()
    renderer = _renderer(console, colors=terminal)
    if not console and _is_journal(stream):
        renderer = _with_priority(renderer)
    render: list[Processor] = [structlog.processors.format_exc_info, redact, renderer]
    structlog.configure(
        processors=[*common, *render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.ExtraAdder(), _name_library],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)


def redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Return `event` without credentials: by key, by their look in texts, and the queries of URLs."""
    return {key: _clean(key, value, _DEPTH_MAX) for key, value in event.items()}


def redact_text(text: str) -> str:
    """Return `text` without what looks like a credential or a signed URL's query."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _clean(key: str, value: object, depth: int) -> object:
    if _SECRET_KEY.search(key) and value is not None and not isinstance(value, bool):
        return REDACTED
    if isinstance(value, str):
        return redact_text(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, dict | list | tuple | set | frozenset) and depth == 0:
        return "..."
    if isinstance(value, dict):
        return {inner: _clean(str(inner), item, depth - 1) for inner, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean("", item, depth - 1) for item in value]
    return redact_text(str(value))


def _processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]


def _renderer(console: bool, *, colors: bool) -> Processor:
    if console:
        return structlog.dev.ConsoleRenderer(
            colors=colors, timestamp_key="time", exception_formatter=structlog.dev.plain_traceback
        )
    return structlog.processors.JSONRenderer()


def _is_journal(stream: TextIO) -> bool:
    """Return whether journald reads the stream: systemd gives the device and inode of what it has connected."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _with_priority(renderer: Processor) -> Processor:
    def prioritised(logger: object, method: str, event: MutableMapping[str, Any]) -> str:
        priority = _PRIORITIES.get(event.get("level", ""), 6)
        line = renderer(logger, method, event)
        assert isinstance(line, str)
        return f"<{priority}>{line}"

    return prioritised


def _name_library(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["library"] = event["_record"].name
    return event
