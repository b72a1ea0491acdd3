# SPDX-License-Identifier: Apache-2.0
"""Pure decisions: no I/O, no clock, no global randomness; `now` and `rng` come in as arguments."""
