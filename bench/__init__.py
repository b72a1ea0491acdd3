# SPDX-License-Identifier: Apache-2.0
"""Rehearsals: hosts in network namespaces, real registries, the demo and the benchmarks."""
