# SPDX-License-Identifier: Apache-2.0
"""One insertion into a JSON object's text that leaves every other byte as it was.

Owns: where the members of the outermost object stand. Refuses to reformat, and every text that `json` refuses.
"""

from __future__ import annotations

import json
import re
from typing import Any

from p2pdist.errors import P2PDistError

_SPACE = re.compile(r"[ \t\r\n]*")


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Return the object that a JSON text is.

    Raises:
        P2PDistError: it is not JSON or no object, or names a key twice; the line names `where`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except ValueError as error:
        raise P2PDistError(
            f"{where} is not valid JSON ({error}): mend it first, or leave it out by --runtime"
        ) from error
    if not isinstance(value, dict):
        raise P2PDistError(f"{where} is not a JSON object: mend it first, or leave it out by --runtime")
    return value


def prepend_item(text: str, key: str, item: str) -> str:
    """Return the text of an object with `item` as the first of the array `key`, which is made where it is not there."""
    opening = text.index("{") + 1
    first = _skip(text, opening)
    for name, value_at in _members(text, first):
        if name == key:
            inside = value_at + 1
            closing = _skip(text, inside)
            glue = "" if text[closing] == "]" else "," + (text[inside:closing] or " ")
            inside = inside if text[closing] == "]" else closing
            return f"{text[:inside]}{json.dumps(item)}{glue}{text[inside:]}"
    member = f"{json.dumps(key)}: [{json.dumps(item)}]"
    if text[first] == "}":
        return f"{text[:opening]}{member}{text[opening:]}"
    return f"{text[:first]}{member},{text[opening:first] or ' '}{text[first:]}"


def _members(text: str, at: int) -> list[tuple[str, int]]:
    """Return each key of the object whose first member may begin at `at`, with where its value begins."""
    decoder, found = json.JSONDecoder(), []
    while text[at] != "}":
        name, after = decoder.raw_decode(text, at)
        value_at = _skip(text, _skip(text, after) + 1)
        found.append((name, value_at))
        _, after = decoder.raw_decode(text, value_at)
        at = _skip(text, after)
        at = _skip(text, at + 1) if text[at] == "," else at
    return found


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value
