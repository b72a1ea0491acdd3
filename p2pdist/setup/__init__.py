# SPDX-License-Identifier: Apache-2.0
"""Putting the agent into the configuration of container runtimes, and taking it out again."""
