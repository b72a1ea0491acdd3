# SPDX-License-Identifier: Apache-2.0
"""What a field of a message may be: kinds of numbers and texts, and the check of each.

Refuses to know messages: core/wire.py says which field is of which kind. A check returns the value as it is, or raises
ValueError.
"""

from __future__ import annotations

from typing import Annotated

from p2pdist.core.chunkmap import MAX_BLOB_BYTES

Number = Annotated[int, "0 to 2**32 - 1"]
"""An index or the number of a grant or question: never negative, where a shift would raise."""
Size = Annotated[int, "-1 to MAX_BLOB_BYTES"]
"""A blob's size, -1: not known. The bound keeps what is computed from it (a set of all chunks) small."""
Port = Annotated[int, "0 to 65535"]

_INT_LIMIT = 1 << 53
_TEXT_LIMIT = 512


def check_int(value: object) -> int:
    if type(value) is not int or not -1 <= value < _INT_LIMIT:
        raise ValueError("not a number in range")
    return value


def check_number(value: object) -> int:
    number = check_int(value)
    if not 0 <= number < 1 << 32:
        raise ValueError("not an index or number")
    return number


def check_size(value: object) -> int:
    size = check_int(value)
    if size > MAX_BLOB_BYTES:
        raise ValueError("not a blob's size")
    return size


def check_port(value: object) -> int:
    port = check_int(value)
    if not 0 <= port < 65536:
        raise ValueError("not a port")
    return port


def check_bool(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError("not a boolean")
    return value


def check_str(value: object) -> str:
    if type(value) is not str or len(value) > _TEXT_LIMIT:
        raise ValueError("not a short text")
    return value


def check_bytes(value: object) -> bytes:
    if type(value) is not bytes:
        raise ValueError("not bytes")
    return value
