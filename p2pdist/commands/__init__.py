# SPDX-License-Identifier: Apache-2.0
"""The verbs of the agent's package, one per file; each imports what it needs when it runs."""
