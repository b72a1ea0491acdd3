# SPDX-License-Identifier: Apache-2.0
"""The shells around the core that talk to a network, one I/O library per file."""
