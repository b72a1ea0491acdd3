# SPDX-License-Identifier: Apache-2.0
"""Random schedules of faults against the production state machines, on virtual time; see bench/README.md."""
