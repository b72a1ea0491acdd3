# SPDX-License-Identifier: Apache-2.0
"""What fields of messages may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from p2pdist.core import fields
from p2pdist.core.chunkmap import MAX_BLOB_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

FIELDS = [
    pytest.param(fields.check_int, [-1, 2**53 - 1], [-2, 2**53, True, 1.0, "1", None], id="int"),
    pytest.param(fields.check_number, [0, 2**32 - 1], [-1, 2**32, False, b"1"], id="number"),
    pytest.param(fields.check_size, [-1, MAX_BLOB_BYTES], [-2, MAX_BLOB_BYTES + 1, "1"], id="size"),
    pytest.param(fields.check_port, [0, 65535], [-1, 65536, True], id="port"),
    pytest.param(fields.check_bool, [True, False], [0, 1, None], id="bool"),
    pytest.param(fields.check_str, ["", "x" * 512], ["x" * 513, b"x", None], id="str"),
    pytest.param(fields.check_bytes, [b"", b"x"], ["x", bytearray(b"x"), None], id="bytes"),
]


@pytest.mark.parametrize(("check", "good", "bad"), FIELDS)
def test_a_field_is_of_its_kind_and_within_its_bounds(
    check: Callable[[object], object], good: list[object], bad: list[object]
) -> None:
    for value in good:
        assert check(value) is value
    for value in bad:
        with pytest.raises(ValueError, match="not "):
            check(value)
