# SPDX-License-Identifier: Apache-2.0
"""`python -m scheduler`."""

from scheduler.cli import scheduler

scheduler()
