# SPDX-License-Identifier: Apache-2.0
"""The p2pdist agent: a registry mirror that swaps verified chunks with its peers."""

__version__ = "0.1.0"
