# SPDX-License-Identifier: Apache-2.0
"""What all tests share: `require`, for the real programs that a test drives; `quick_clock`, for what waits."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from trio.testing import MockClock

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def require() -> Callable[[str, str], str]:
    """Return a function (command, Debian package) -> the command's path.

    Where the command is missing the test fails in CI and is skipped elsewhere, with what installs it.
    """

    def find(command: str, package: str) -> str:
        path = shutil.which(command, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
        if path is None:
            missing = f"{command} is missing: apt-get install {package}"
            if os.environ.get("CI") == "true":
                pytest.fail(missing)
            pytest.skip(missing)
        return path

    return find


@pytest.fixture
def quick_clock() -> MockClock:
    """A clock for tests over real loopback sockets: it jumps to the next deadline once nothing has happened for 5 ms.

    It works where the test function itself asks for it.
    """
    return MockClock(autojump_threshold=0.005)
