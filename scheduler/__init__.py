# SPDX-License-Identifier: Apache-2.0
"""The scheduler: membership, neighbours, origin leases and shared tag resolution of one cluster."""
