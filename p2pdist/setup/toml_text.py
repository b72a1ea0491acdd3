# SPDX-License-Identifier: Apache-2.0
"""Small insertions into a TOML text that leave every other byte, comments above all, as it was.

Owns: where tables, keys and values stand in a text that tomllib accepts. Refuses to reformat. An edit is text
in, text out; whoever edits compares what tomllib reads afterwards with what was meant (`expect`), so that a form
that these functions do not know ends in a refusal, never in a wrong file.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from typing import Any

from p2pdist.errors import P2PDistError

_BLANKS = re.compile(r"[ \t]*")
_SPACE = re.compile(r"[ \t\r\n]*")
_TRIVIA = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_PART = re.compile(r"""[ \t]*([A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*')[ \t]*""")
_TOKEN = re.compile(
    r""""{3}(?:\\.|[^\\])*?"{3,5}|'{3}.*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|#[^\n]*|[\[{]|[\]}]|\n|[^"'#\[\]{}\n]+""",
    re.DOTALL,
)

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """A line `[table]` or `[[table]]`: its characters [start, stop), without the end of the line."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A `key = value`: where the key begins, and the characters [value_start, value_stop) of the value."""

    table: Path
    key: Path
    start: int
    value_start: int
    value_stop: int


def parse(text: str, where: str) -> dict[str, Any]:
    """Return what a TOML text says.

    Raises:
        P2PDistError: it is not TOML; the line names `where`.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise P2PDistError(
            f"{where} is not valid TOML ({error}): mend it first, or leave it out by --runtime"
        ) from error


def expect(text: str, meant: dict[str, Any], where: str) -> str:
    """Return `text`, the result of an edit; raise P2PDistError where it does not say what was meant."""
    try:
        right = tomllib.loads(text) == meant
    except tomllib.TOMLDecodeError:
        right = False
    if not right:
        raise P2PDistError(
            f"{where} is written in a form that cannot be edited safely: edit it by hand (docs/runtimes.md)"
        )
    return text


def quoted(text: str) -> str:
    """Return `text` as a TOML basic string."""
    return json.dumps(text, ensure_ascii=True)


def statements(text: str) -> list[Header | Pair]:
    """Return the headers and pairs of a valid TOML text, in order; those of inline tables are part of their value."""
    found: list[Header | Pair] = []
    table: Path = ()
    at = _skip(_TRIVIA, text, 0)
    while at < len(text):
        if text[at] == "[":
            double = text.startswith("[[", at)
            table, stop = _key(text, at + 1 + double)
            stop += 1 + double
            found.append(Header(table, at, stop))
        else:
            key, after = _key(text, at)
            value_start = _skip(_BLANKS, text, after + 1)
            stop = _value_stop(text, value_start)
            found.append(Pair(table, key, at, value_start, stop))
        at = _skip(_TRIVIA, text, stop)
    return found


def set_value(text: str, table: Path, key: str, literal: str) -> str:
    """Return `text` with `key = literal` in the table, which is appended where it is not there."""
    items = statements(text)
    for item in items:
        if isinstance(item, Pair) and (*item.table, *item.key) == (*table, key):
            return text[: item.value_start] + literal + text[item.value_stop :]
    for item in items:
        if isinstance(item, Header) and item.path == table:
            end = text.find("\n", item.stop)
            line = f"{_indent(text, item.start)}  {key} = {literal}\n"
            return text[: end + 1] + line + text[end + 1 :] if end >= 0 else f"{text}\n{line}"
    name = ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else quoted(part) for part in table)
    return append(text, f"[{name}]\n  {key} = {literal}\n")


def prepend_item(text: str, table: Path, key: str, literal: str) -> str:
    """Return `text` with `literal` as the first item of an array, which is made where it is not there."""
    for item in statements(text):
        if isinstance(item, Pair) and (*item.table, *item.key) == (*table, key):
            inside = item.value_start + 1
            if text[_skip(_TRIVIA, text, inside)] == "]":
                return f"{text[:inside]}{literal}{text[inside:]}"
            space = text[inside : _skip(_SPACE, text, inside)]
            return f"{text[:inside]}{space}{literal},{'' if space else ' '}{text[inside:]}"
    return set_value(text, table, key, f"[{literal}]")


def insert_before(text: str, name: str, lines: str) -> str:
    """Return `text` with `lines` (whole tables) before the first table `name` or below it; else at the end."""
    for item in statements(text):
        if isinstance(item, Header) and item.path[0] == name:
            start = _with_comments(text, text.rfind("\n", 0, item.start) + 1)
            return f"{text[:start]}{lines}\n{text[start:]}"
    return append(text, lines)


def append(text: str, lines: str) -> str:
    """Return `text` with `lines` after an empty line."""
    if not text.strip():
        return text + lines
    return f"{text}{'' if text.endswith(chr(10)) else chr(10)}\n{lines}"


def _key(text: str, at: int) -> tuple[Path, int]:
    """Return a dotted key and where the character after it is."""
    parts = []
    while True:
        match = _PART.match(text, at)
        assert match is not None
        part = match[1]
        parts.append(tomllib.loads(f"x = {part}")["x"] if part[0] in "\"'" else part)
        at = match.end()
        if text[at : at + 1] != ".":
            return tuple(parts), at
        at += 1


def _value_stop(text: str, start: int) -> int:
    """Return where the value that begins at `start` ends."""
    depth, at, stop = 0, start, start
    while at < len(text):
        match = _TOKEN.match(text, at)
        assert match is not None
        token = match[0]
        if depth == 0 and (token == "\n" or token[0] == "#"):
            break
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token, 0)
        at = match.end()
        if token.strip() and token[0] != "#":
            stop = match.start() + len(token.rstrip())
    return stop


def _with_comments(text: str, start: int) -> int:
    """Return where the comment lines directly above the line at `start` begin."""
    while start:
        above = text.rfind("\n", 0, start - 1) + 1
        if not text[above:start].lstrip().startswith("#"):
            break
        start = above
    return start


def _indent(text: str, at: int) -> str:
    return text[text.rfind("\n", 0, at) + 1 : at]


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at
