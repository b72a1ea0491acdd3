# SPDX-License-Identifier: Apache-2.0
"""`p2pdist bench faults`: rollouts while things break and peers lie, held against what is promised.

`plan` says what breaks when, `injector` breaks it, `liars` starts lying peers, `verdict` judges; `scenarios`, `chaos`
and `soak` are the three ways to run it.
"""
