# SPDX-License-Identifier: Apache-2.0
"""The limit on open files: raised as far as it goes, and connections are fewer where that is not far enough."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from p2pdist.descriptors import connections_within
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(connections_within({wanted}), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "connections"),
    [
        pytest.param(256, 4096, 1000, 1000, id="enough"),
        pytest.param(256, 1024, 1000, 128, id="too few"),
        pytest.param(256, 512, 1000, 8, id="next to none"),
    ],
)
def test_connections_fit_under_the_limit_on_open_files(soft: int, hard: int, wanted: int, connections: int) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= hard
    program = PROGRAM.format(soft=soft, hard=hard, wanted=wanted)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{connections} {hard}"
    assert ("LimitNOFILE" in done.stdout) == (connections < wanted)
