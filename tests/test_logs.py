# SPDX-License-Identifier: Apache-2.0
"""Log lines: one per event, in the asked form, and never with a credential in them."""

from __future__ import annotations

import io
import json
import logging
import os
from typing import TYPE_CHECKING

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from p2pdist import logs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import TextIO


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield io.StringIO()
    root.handlers = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_json_gives_one_object_per_line(stream: io.StringIO) -> None:
    logs.configure("info", "json", stream=stream)
    structlog.get_logger().info("image pulled", image="docker.io/x:1", from_peers_bytes=7)
    structlog.get_logger().warning("second")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first["event"] == "image pulled"
    assert first["from_peers_bytes"] == 7
    assert first["level"] == "info"
    assert first["time"].endswith("Z")
    assert second["level"] == "warning"


def test_auto_means_json_where_there_is_no_terminal(stream: io.StringIO) -> None:
    logs.configure("info", "auto", stream=stream)
    structlog.get_logger().info("x")
    assert json.loads(stream.getvalue())["event"] == "x"


def test_the_console_form_is_for_reading(stream: io.StringIO) -> None:
    logs.configure("info", "console", stream=stream)
    structlog.get_logger().info("image pulled", image="x")
    assert "image pulled" in stream.getvalue()
    assert "image=x" in stream.getvalue()


def test_what_is_below_the_level_is_not_written(stream: io.StringIO) -> None:
    logs.configure("warning", "json", stream=stream)
    structlog.get_logger().info("x")
    assert stream.getvalue() == ""


def test_libraries_are_heard_from_warning_on_even_at_debug(stream: io.StringIO) -> None:
    logs.configure("debug", "json", stream=stream)
    logging.getLogger("httpx").info("HTTP Request: GET https://x/?sig=abc")
    logging.getLogger("zeroconf").warning("odd packet from %s", "10.0.0.1")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["event"] == "odd packet from 10.0.0.1"
    assert json.loads(line)["library"] == "zeroconf"


def test_configuring_again_does_not_double_the_lines(stream: io.StringIO) -> None:
    logs.configure("info", "json", stream=stream)
    logs.configure("info", "json", stream=stream)
    logging.getLogger("x").warning("once")
    assert len(stream.getvalue().splitlines()) == 1


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_credential_in_an_exception_does_not_reach_the_log(stream: io.StringIO, style: str) -> None:
    logs.configure("info", style, stream=stream)
    for log in (structlog.get_logger(), logging.getLogger("httpx")):
        try:
            raise ValueError("GET https://user:hunter2@x/y?X-Amz-Signature=c0ffee refused")
        except ValueError:
            log.exception("failed")
    text = stream.getvalue()
    assert "refused" in text
    assert "hunter2" not in text
    assert "c0ffee" not in text


@pytest.mark.parametrize(
    ("text", "kept", "gone"),
    [
        ("https://u:s3cret@reg/x", "reg/x", "s3cret"),
        ("https://tokenonly@reg/x", "reg/x", "tokenonly"),
        ("GET https://cdn/blob?Expires=1&Signature=AbC failed", "https://cdn/blob?", "AbC"),
        ("Authorization: Bearer abc123def456", "Authorization", "abc123def456"),
        ("authorization: basic dXNlcjpwYXNz", "basic", "dXNlcjpwYXNz"),
        ("token eyJhbGciOiJ9.eyJzdWIiOiIx.sig-sig was refused", "was refused", "eyJ"),
        ('{"access_token": "zzz", "n": 1}', '"n": 1', "zzz"),
        ("password=hunter2, user=x", "user=x", "hunter2"),
    ],
)
def test_secrets_in_texts_are_cut_out(text: str, kept: str, gone: str) -> None:
    cleaned = logs.redact_text(text)
    assert kept in cleaned
    assert gone not in cleaned


@pytest.mark.parametrize(
    "text",
    [
        'Bearer realm="https://auth.docker.io/token",service="registry.docker.io"',
        "the origin sent a Basic challenge",
        "a Bearer challenge without a realm",
        "sha256:" + "a" * 64,
        "10.0.0.1:5051 left; docker.io/library/alpine@sha256:" + "0" * 64,
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert logs.redact_text(text) == text


secrets = st.from_regex(r"[A-Z][A-Za-z0-9]{11,30}", fullmatch=True)


@given(secrets, st.sampled_from(["Authorization", "password", "identity_token", "Cookie", "api_key", "clientSecret"]))
def test_values_of_secret_keys_are_gone_at_any_depth(secret: str, key: str) -> None:
    nested: object = {key: secret}
    for _ in range(6):
        nested = {"inner": [nested]}
    for event in ({key: secret}, {"headers": {key: secret}}, {"list": [{key: secret}]}, {"deep": nested}):
        cleaned = json.dumps(dict(logs.redact(None, "info", event)), default=str)
        assert secret not in cleaned


def test_plain_values_pass_unchanged() -> None:
    event = {"n": 1, "rate": 0.5, "ok": True, "none": None, "text": "x", "list": [1, "y"]}
    assert logs.redact(None, "info", dict(event)) == event


@pytest.fixture
def journal(stream: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TextIO]:
    """A stream that journald is said to read."""
    with (tmp_path / "journal").open("w+") as file:
        status = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        yield file


def written(file: TextIO) -> list[str]:
    file.flush()
    file.seek(0)
    return file.read().splitlines()


def test_journald_gets_json_behind_a_priority(journal: TextIO) -> None:
    logs.configure("debug", "auto", stream=journal)
    log = structlog.get_logger()
    for say in (log.debug, log.info, log.warning, log.error):
        say("x", n=1)
    logging.getLogger("zeroconf").warning("odd")
    lines = written(journal)
    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>", "<4>"]
    assert json.loads(lines[0][3:])["n"] == 1


def test_journald_gets_no_priority_where_the_console_form_is_asked_for(journal: TextIO) -> None:
    logs.configure("info", "console", stream=journal)
    structlog.get_logger().info("x")
    assert not written(journal)[0].startswith("<")


def test_another_stream_than_journalds_has_no_priority(journal: TextIO, tmp_path: Path) -> None:
    with (tmp_path / "elsewhere").open("w+") as file:
        logs.configure("info", "auto", stream=file)
        structlog.get_logger().info("x")
        assert written(file)[0].startswith("{")
