# SPDX-License-Identifier: Apache-2.0
"""`make fuzz`: one target under atheris, libFuzzer for Python, guided by the coverage of our own modules and h11.

    python -m tests.fuzz.run TARGET WORK_DIR -max_total_time=600

What it comes upon is kept in WORK_DIR/TARGET, so that the next run goes on from there; a finding goes to a file beside
it and ends the run with an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

CORPUS = Path(__file__).parent / "corpus"
LIMITS = ("-timeout=10", "-rss_limit_mb=1024", "-max_len=8192", "-print_final_stats=1")
"""A finding is also what takes longer than 10 s, or lets the process grow beyond 1 GiB."""


def main() -> None:
    name, work, *options = sys.argv[1:]
    found = Path(work) / name
    found.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["p2pdist.core", "p2pdist.net.http_connection", "h11"]):
        from tests.fuzz.targets import TARGETS
    arguments = [sys.argv[0], *LIMITS, f"-artifact_prefix={work}/{name}-", *options, str(found), str(CORPUS / name)]
    atheris.Setup(arguments, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
