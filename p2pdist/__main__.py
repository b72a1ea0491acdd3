# SPDX-License-Identifier: Apache-2.0
"""`python -m p2pdist` is the `p2pdist` command."""

from p2pdist.cli import main

main(prog_name="p2pdist")
